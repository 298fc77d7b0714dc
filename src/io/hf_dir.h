/* A Hugging Face model directory: config.json, and either model.safetensors or shards with
 * model.safetensors.index.json. Files that neither names are not looked at. */
#ifndef WN_IO_HF_DIR_H
#define WN_IO_HF_DIR_H

#include "io/safetensors.h"

typedef struct wn_hf_dir wn_hf_dir;

/* Opens every shard. WN_E_INPUT with names: no weights, both forms at once, index.json that is not one, names a file
 * outside the directory or one that is absent, places a tensor in a file that lacks it or does not list one that is
 * there, or a tensor that stands in two shards. */
WN_MUST_USE wn_status wn_hf_dir_open(wn_hf_dir **out, const char *path);
void wn_hf_dir_close(wn_hf_dir *dir);
const char *wn_hf_dir_path(const wn_hf_dir *dir);
/* Tensors in order: shards by file name, tensors as they lie in their file. */
int64_t wn_hf_dir_count(const wn_hf_dir *dir);
const wn_st_entry *wn_hf_dir_at(const wn_hf_dir *dir, int64_t i, int32_t *shard); /* shard may be NULL */
const wn_st_entry *wn_hf_dir_find(const wn_hf_dir *dir, const char *name, int32_t *shard);
int32_t wn_hf_dir_shards(const wn_hf_dir *dir);
const char *wn_hf_dir_shard_path(const wn_hf_dir *dir, int32_t shard);

/* Copies elements first .. first + count - 1 (flat, row-major) of an entry, converted to `dtype` (F32 or F64). Stored
 * F32, F16 and BF16 are read, exactly; WN_E_INPUT, naming the tensor, for others. */
WN_MUST_USE wn_status wn_hf_read(void *out, wn_dtype dtype, const wn_st_entry *entry, int64_t first, int64_t count);

#endif
