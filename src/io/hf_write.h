/* What a written Hugging Face directory has besides its weights: the index of the shards, and what travels along. */
#ifndef WN_IO_HF_WRITE_H
#define WN_IO_HF_WRITE_H

#include "base/log.h"
#include "io/files.h"

/* model.safetensors.index.json under way: {"metadata": {"total_size": bytes of all tensors}, "weight_map": {...}}. */
typedef struct wn_hf_index wn_hf_index;
WN_MUST_USE wn_status wn_hf_index_create(wn_hf_index **out);
void wn_hf_index_free(wn_hf_index *index);
WN_MUST_USE wn_status wn_hf_index_add(wn_hf_index *index, const char *tensor, int64_t bytes, const char *file);
WN_MUST_USE wn_status wn_hf_index_write(const wn_hf_index *index, const char *dir); /* atomically, names sorted */

/* Copies what belongs to a model besides config.json and weights: files with "token" in their names,
 * generation_config.json, chat templates, vocab.json and merges.txt. Each is copied to DIR/.tmp-NAME and renamed, in
 * the place of one that stands there; what is longer than 64 MiB, a directory or a link to nothing is left out with a
 * warning. only_tokens: nothing but the first. */
WN_MUST_USE wn_status wn_hf_copy_companions(const char *from_dir, const char *to_dir, bool only_tokens, wn_log *log);

#endif
