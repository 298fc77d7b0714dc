/* One update: norms and finiteness of the whole gradient, clip, AdamW on this rank's pieces, the router's bias. Base
 * and indexer have their own divisor, norm, clip, learning rate and Adam clock, and never mix. */
#ifndef WN_TRAIN_OPTIMIZER_H
#define WN_TRAIN_OPTIMIZER_H

#include "config/job.h"
#include "dist/store.h"

typedef struct wn_gradient_norms {
  double base, indexer;
  int64_t non_finite;
} wn_gradient_norms;

/* Norms of gradient sums divided by their divisors (0 where a kind has no parameters). Collective. */
WN_MUST_USE wn_status wn_optimizer_norms(wn_gradient_norms *out, wn_device *device, wn_world *world, wn_store *store,
                                         double base_divisor, double indexer_divisor);

/* Whether an update can take the gradient: all of it is finite, and so, in FP32, are its squares once clipped, or
 * Adam's second moment would be infinite, and stay so. */
bool wn_optimizer_takes(const wn_gradient_norms *norms, double clip_grad);

typedef struct wn_update {
  double lr, indexer_lr;
  double base_divisor, indexer_divisor;
  wn_gradient_norms norms;
  int64_t adam_base, adam_indexer; /* this update's Adam steps, from 1 */
} wn_update;
WN_MUST_USE wn_status wn_optimizer_update(wn_device *device, wn_store *store, const wn_job *job,
                                          const wn_update *update);
WN_MUST_USE wn_status wn_optimizer_zero_grads(wn_device *device, wn_store *store);

/* b_e += speed for experts below their layer's mean load, -= speed above (DeepSeek-V3 report, 2.1.2). load[layers *
 * n_experts] over the whole global batch, rows of dense layers ignored. */
WN_MUST_USE wn_status wn_optimizer_router_bias(wn_device *device, wn_store *store, double speed, const int64_t *load,
                                               int32_t n_experts);

#endif
