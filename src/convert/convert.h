/* `winnow convert`: a Hugging Face directory of a V3 or V3.2 model (F32, F16, BF16 or FP8; a checkpoint is one too)
 * into another form of the same model.
 *
 * The output directory is filled in place. It begins with .convert.json, which says what is being made of what; every
 * shard is written as .tmp-NAME, synced and renamed; the small files follow, the index last; then .convert.json goes.
 * So a directory without it is whole, and one with it is taken up again by the same command: shards that stand there
 * under their names are not written anew. */
#ifndef WN_CONVERT_CONVERT_H
#define WN_CONVERT_CONVERT_H

#include <stdint.h>

#include "base/log.h"

typedef enum wn_convert_form {
  WN_TO_V32,  /* BF16, with indexers: a V3.2 model */
  WN_TO_V3,   /* BF16, indexers left out: a V3 model */
  WN_TO_BF16, /* BF16, the model that it is */
  WN_TO_FP8,  /* as the release stores it: FP8 with scales of 128 x 128 blocks */
  WN_TO_DEMO, /* DeepSeek's demo: model{i}-mp{N}.safetensors, dtypes as they are */
  WN_N_CONVERT_FORMS
} wn_convert_form;
extern const char *const wn_convert_form_names[WN_N_CONVERT_FORMS];

typedef struct wn_convert_job {
  const char *in, *out;
  wn_convert_form form;
  int32_t model_parallel; /* DEMO: shards, 1 or more */
  int64_t shard_bytes;    /* others: most bytes of a shard's tensors, unless one weight is larger */
  int32_t threads;
} wn_convert_job;

/* A byte of the output does not depend on `threads`, nor on how often the work was broken off. Memory: headers and
 * lists, about 1 KB a tensor, and 9 MiB a thread.
 * WN_E_CONFIG: no indexer where one is wanted, a number of demo shards that splits no weight rightly (naming it and the
 * numbers that do). WN_E_INPUT: tensors missing, misshapen, surplus, of a type that cannot be read, or not finite.
 * WN_E_USAGE: `out` holds something else, or the beginning of another conversion. WN_E_IO: a full disk among others. */
WN_MUST_USE wn_status wn_convert(const wn_convert_job *job, wn_log *log);

#endif
