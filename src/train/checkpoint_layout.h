/* What the files of a checkpoint hold and where in them everything stands: a pure function of the parameter table and
 * of the headers of the source directory, so every rank computes the same without a word.
 *
 * The source is the directory that unchanged tensors come from. Its shards that hold nothing but unchanged tensors are
 * linked; unchanged tensors out of other shards are copied byte for byte (or widened: wn_fate) into "carried" files;
 * what trains is written from the store. In that order the model files are numbered, so that a checkpoint made from an
 * earlier one of the same run has the same files. */
#ifndef WN_TRAIN_CHECKPOINT_LAYOUT_H
#define WN_TRAIN_CHECKPOINT_LAYOUT_H

#include "dist/store.h"
#include "io/hf_dir.h"
#include "io/hf_write.h"
#include "train/manifest.h"

/* ---- parameters by name ---- */

typedef struct wn_names {
  const wn_param *params, **sorted;
  int32_t n;
  bool fp8; /* some are held as FP8 */
} wn_names;
WN_MUST_USE wn_status wn_names_create(wn_names *out, const wn_param *params, int32_t n);
void wn_names_free(wn_names *names);
int32_t wn_names_find(const wn_names *names, const char *hf_name); /* -1: no such parameter */

/* The name of the weight whose FP8 scales `name` is, into weight[WN_NAME_BYTES]; false where it is not of such a form.
 */
bool wn_scaled_name(char weight[WN_NAME_BYTES], const char *name);

/* What of a trained parameter is stored, and how its optimizer tensors are called: hf_name + suffix. */
typedef enum wn_field { WN_FIELD_WEIGHT, WN_FIELD_MASTER, WN_FIELD_M, WN_FIELD_V, WN_N_FIELDS } wn_field;
enum { WN_FIELD_NAME_BYTES = WN_NAME_BYTES + 8 };
const char *wn_field_suffix(wn_field field); /* "", ".master", ".m", ".v" */
void wn_field_name(char out[WN_FIELD_NAME_BYTES], const wn_param *p, wn_field field);
wn_tensor *wn_field_of(wn_piece *piece, wn_field field); /* the flat FP32 tensor that holds it */

/* ---- the files ---- */

/* What becomes of a tensor of the source. Where a frozen base stays FP8, FP8 travels as it is and config.json says so.
 * Where nothing else is FP8 any more, no reader would take what is left of it (prediction layers) for FP8: it is
 * written as the BF16 that it stands for. */
typedef enum wn_fate {
  WN_CARRIED, /* its bytes */
  WN_WIDENED, /* FP8 that becomes BF16 */
  WN_LEFT     /* a weight that trains, which is written from the store; scales of what is no longer FP8 */
} wn_fate;
wn_fate wn_source_fate(const wn_names *names, const wn_hf_dir *source, const wn_st_entry *entry);

typedef struct wn_file_tensor {
  char name[WN_FIELD_NAME_BYTES];
  wn_dtype dtype;
  int32_t rank;
  int64_t dim[WN_MAX_RANK];
  int32_t param; /* of the table; -1 where `source` is copied */
  wn_field field;
  const wn_st_entry *source; /* not NULL: these bytes, as they are, or FP8 widened to `dtype` */
} wn_file_tensor;

typedef struct wn_checkpoint_file {
  char name[WN_FILE_NAME_BYTES];
  int32_t source_shard; /* linked to this shard of the source; -1: written */
  wn_st_layout *layout; /* of a written file, with its tensors; NULL when linked */
  const wn_file_tensor *tensors;
  int64_t n;
} wn_checkpoint_file;

typedef struct wn_checkpoint_layout {
  wn_file_tensor *tensors;
  wn_checkpoint_file *files; /* the model files, then the optimizer files */
  int32_t n_model, n_files;
} wn_checkpoint_layout;

/* source NULL: nothing to carry over; frozen parameters are then written from the store in FP32. moments: F32 or BF16.
 * WN_E_INPUT when a frozen parameter's shape in the source is another one, or one that the store has as FP8 is absent.
 * The layout points into params and source. */
WN_MUST_USE wn_status wn_checkpoint_layout_create(wn_checkpoint_layout **out, const wn_param *params, int32_t n,
                                                  const wn_hf_dir *source, wn_dtype moments, int64_t shard_bytes);
void wn_checkpoint_layout_free(wn_checkpoint_layout *layout);
/* DIR/model.safetensors.index.json, names sorted. */
WN_MUST_USE wn_status wn_checkpoint_write_index(const wn_checkpoint_layout *layout, const wn_hf_dir *source,
                                                const char *dir);

#endif
