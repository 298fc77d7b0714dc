/* A model directory opened to be run, not trained: device, model, store, weights. */
#ifndef WN_TRAIN_INFERENCE_H
#define WN_TRAIN_INFERENCE_H

#include "base/log.h"
#include "dist/world.h"
#include "config/job.h"
#include "model/model.h"

typedef struct wn_inference {
  wn_device *device;
  wn_model *model;
  wn_store *store;
  wn_world *world; /* borrowed */
} wn_inference;

/* with_grads: gradients of every parameter can be made (for `winnow forward --grads`). Collective. */
WN_MUST_USE wn_status wn_inference_open(wn_inference *out, const char *dir, wn_job_device device, int32_t threads,
                                        bool with_grads, wn_world *world, wn_log *log);
void wn_inference_close(wn_inference *inference);

typedef struct wn_forward_settings {
  const int32_t *tokens; /* [n] */
  int32_t n;
  const int32_t *document_first; /* [n_documents], the first 0 */
  int32_t n_documents;
  bool sparse;                    /* top-k attention by the indexer; else dense */
  bool base_grads, indexer_grads; /* at most one */
} wn_forward_settings;

/* Runs one sequence and writes what docs/formats.md ("Forward dump") lists to `path`: logits, hidden.N, attn.N,
 * index_scores.N, topk.N, kl.N and grad.<parameter>. */
WN_MUST_USE wn_status wn_forward_dump(wn_inference *inference, const wn_forward_settings *settings, const char *path);

#endif
