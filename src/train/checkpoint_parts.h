/* What saving, loading and initialising share. */
#ifndef WN_TRAIN_CHECKPOINT_PARTS_H
#define WN_TRAIN_CHECKPOINT_PARTS_H

#include "train/checkpoint.h"
#include "train/checkpoint_layout.h"

#define WN_STATE_NAME "state.json"

/* This rank's part of every parameter; piece NULL where it has none. A parameter lies in one unit and a rank holds one
 * contiguous piece of it, so there is at most one. */
typedef struct wn_part {
  wn_piece *piece;
  int64_t first, offset, count;
} wn_part; /* parameter element, piece element, elements */
WN_MUST_USE wn_status wn_parts_create(wn_part **out, wn_store *store, int32_t n_params);

/* Elements that are converted at a time: bounds the host memory of saves and loads. */
enum { WN_COPY_ELEMENTS = 1 << 18 };

/* Host floats to and from a tensor that may be BF16, as a frozen piece is on a GPU (upload rounds in place, so `values`
 * is used up; download needs room for floats). Of any other dtype as it is. */
WN_MUST_USE wn_status wn_floats_upload(wn_device *device, wn_tensor *place, float *values);
WN_MUST_USE wn_status wn_floats_download(wn_device *device, void *values, const wn_tensor *place);

/* The part of `field` that this rank holds, written into an open file as `dtype` (F32 or BF16) at tensor_offset + first
 * * width. `scratch`: as many uint16. */
WN_MUST_USE wn_status wn_part_write(wn_device *device, const wn_part *part, wn_field field, wn_dtype dtype, int fd,
                                    const char *path, uint64_t tensor_offset, float *buffer, uint16_t *scratch);

/* ---- checks of a directory against the parameter table ---- */

typedef struct wn_dir_rules {
  bool new_indexer_allowed; /* indexer parameters may be absent, but then all of them */
  int32_t n_layers;         /* tensors of model.layers.N with N >= n_layers are MTP layers, and passed over */
} wn_dir_rules;
/* Every parameter there (but for those that wn_rewrite_makes) and of its shape, in F32, F16, BF16 or FP8 with its
 * scales, and nothing else; in MTP layers FP8 has its scales too, and no name is longer than checkpoints take.
 * *indexer_absent: as the rules allow; *passed_over: tensors of MTP layers. WN_E_INPUT with up to five names and the
 * count. */
WN_MUST_USE wn_status wn_dir_check(const wn_hf_dir *dir, const wn_names *names, wn_dir_rules rules,
                                   bool *indexer_absent, int64_t *passed_over);

/* Reads this rank's share of what wn_source_fate has widened into checkpoints, so that a value that is none is refused
 * at the start (WN_E_INPUT) and not at the first save. */
WN_MUST_USE wn_status wn_check_widened(const wn_hf_dir *dir, const wn_names *names, int32_t rank, int32_t size);

/* Where a run's frozen weights stand: in its newest checkpoint before `step` that opens, which holds them whatever has
 * become of init since; else in init ("" where that is ""). */
WN_MUST_USE wn_status wn_checkpoint_source(char out[WN_PATH_BYTES], const char *checkpoints, int64_t step,
                                           const char *init_dir);
/* Before the store is made: frozen matrices of the layers that the directory has in FP8 are kept so. */
void wn_params_keep_fp8(wn_param *params, int32_t n, const wn_hf_dir *dir);

/* ---- optimizer files ---- */

typedef struct wn_optimizer_files {
  wn_safetensors **files;
  size_t n, last;
} wn_optimizer_files;
WN_MUST_USE wn_status wn_optimizer_open(wn_optimizer_files *out, const char *dir);
void wn_optimizer_close(wn_optimizer_files *files);
const wn_st_entry *wn_optimizer_find(wn_optimizer_files *files, const wn_param *p, wn_field field); /* NULL: absent */
/* NULL when the entry has the parameter's shape and is F32, or BF16 where it is a moment: a moment is read in the run's
 * own format, whichever of the two it was saved in. */
WN_MUST_USE wn_status wn_optimizer_check(const wn_st_entry *entry, const wn_param *p, wn_field field, const char *dir);

/* ---- state.json ---- */

WN_MUST_USE wn_status wn_state_write(const wn_checkpoint_plan *plan, const wn_state *state, const char *dir);

#endif
