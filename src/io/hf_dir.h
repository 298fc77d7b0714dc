/* A Hugging Face model directory: config.json, and either model.safetensors or shards with
 * model.safetensors.index.json. Files that neither names are not looked at. */
#ifndef WN_IO_HF_DIR_H
#define WN_IO_HF_DIR_H

#include "io/safetensors.h"

#define WN_INDEX_NAME "model.safetensors.index.json"

typedef struct wn_hf_dir wn_hf_dir;

/* Opens every shard. WN_E_INPUT with names: no weights, both forms at once, index.json that is not one, names a file
 * outside the directory or one that is absent, places a tensor in a file that lacks it or does not list one that is
 * there, or a tensor that stands in two shards. */
WN_MUST_USE wn_status wn_hf_dir_open(wn_hf_dir **out, const char *path);
void wn_hf_dir_close(wn_hf_dir *dir);
/* Whether the directory has files of weights, by their names: a config.json may stand alone. */
bool wn_hf_dir_has_weights(const char *path);
const char *wn_hf_dir_path(const wn_hf_dir *dir);
/* Tensors in order: shards by file name, tensors as they lie in their file. */
int64_t wn_hf_dir_count(const wn_hf_dir *dir);
const wn_st_entry *wn_hf_dir_at(const wn_hf_dir *dir, int64_t i, int32_t *shard); /* shard may be NULL */
const wn_st_entry *wn_hf_dir_find(const wn_hf_dir *dir, const char *name, int32_t *shard);
int32_t wn_hf_dir_shards(const wn_hf_dir *dir);
const char *wn_hf_dir_shard_path(const wn_hf_dir *dir, int32_t shard);

/* Every tensor whose name holds `part` is called with `other` in its place from now on; *n: how many. The files keep
 * the names they have, so a shard with such tensors (wn_hf_dir_renamed) is no longer what the directory says. Once a
 * directory. WN_E_INPUT where a tensor of the new name stands already. */
WN_MUST_USE wn_status wn_hf_dir_rename(wn_hf_dir *dir, const char *part, const char *other, int64_t *n);
bool wn_hf_dir_renamed(const wn_hf_dir *dir, int32_t shard);

/* ---- weights ---- */

/* A tensor with what it takes to read it. An FP8 matrix (F8_E4M3) [out, in] has its scales beside it, by the name of
 * the weight and this suffix, [ceil(out/128), ceil(in/128)] in F32, BF16 or F8_E8M0; they may lie in another shard. */
#define WN_HF_SCALE_SUFFIX "_scale_inv"
typedef struct wn_hf_weight {
  const wn_st_entry *entry, *scale; /* scale NULL unless FP8 */
} wn_hf_weight;

/* entry NULL: absent. WN_E_INPUT by name: an FP8 weight that is no matrix or has no scales, scales of another shape or
 * dtype, scales beside a weight that is not FP8 or not there. Their values are checked as they are read. */
WN_MUST_USE wn_status wn_hf_weight_find(wn_hf_weight *out, const wn_hf_dir *dir, const char *name);
/* The entry of `name`'s scales, or NULL. */
const wn_st_entry *wn_hf_scale_entry(const wn_hf_dir *dir, const char *name);
bool wn_hf_scale_readable(const wn_st_entry *scale);
bool wn_hf_scale_fits(const wn_st_entry *scale, const wn_st_entry *weight);

/* Scales first .. first + count - 1 (flat) as FP32. WN_E_INPUT by name unless each is above 0 and the largest code
 * times it is finite in BF16. */
WN_MUST_USE wn_status wn_hf_read_scales(float *out, const wn_hf_weight *weight, int64_t first, int64_t count);
/* Copies elements first .. first + count - 1 (flat, row-major), converted to `dtype`: F32, F64, or BF16 (to nearest,
 * even). Stored F32, F16 and BF16 are read exactly; FP8 is code * scale in FP32, rounded to BF16, as DeepSeek's
 * weight_dequant leaves it. As F8_E4M3 an FP8 weight gives its codes. WN_E_INPUT, naming the tensor and the element:
 * other stored dtypes, NaN and infinities, numbers that BF16 was asked of and does not reach, what wn_hf_read_scales
 * refuses. */
WN_MUST_USE wn_status wn_hf_read(void *out, wn_dtype dtype, const wn_hf_weight *weight, int64_t first, int64_t count);
/* WN_E_INPUT: element i (flat) of the tensor is x, and `why` that will not do. */
WN_MUST_USE wn_status wn_hf_refuse_number(const wn_st_entry *entry, int64_t i, float x, const char *why);
#define WN_HF_BEYOND_BF16 ", beyond the range of BF16"

#endif
