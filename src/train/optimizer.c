#include "train/optimizer.h"

#include <math.h>

#include "kernels/kernels.h"
#include "model/params.h"

wn_status wn_optimizer_norms(wn_gradient_norms *out, wn_device *device, wn_world *world, wn_store *store,
                             double base_divisor, double indexer_divisor) {
  double squares[2] = {0, 0};
  int64_t non_finite = 0;
  for (int32_t i = 0; i < wn_store_pieces(store); i++) {
    const wn_piece *piece = wn_store_piece(store, i);
    if (!wn_kind_trains(piece->kind)) continue;
    double sum;
    int64_t bad;
    WN_TRY(device->ops->sum_squares(device, &sum, &bad, &piece->grad));
    squares[piece->kind == WN_INDEXER] += sum;
    non_finite += bad;
  }
  wn_group *all = wn_world_all(world);
  WN_TRY(wn_group_sum_f64(all, squares, 2));
  WN_TRY(wn_group_sum_i64(all, &non_finite, 1));
  out->base = sqrt(squares[0]) / base_divisor;
  out->indexer = sqrt(squares[1]) / indexer_divisor;
  out->non_finite = non_finite;
  return NULL;
}

static double clip_scale(double norm, double clip, double divisor) {
  return (clip > 0 && norm > clip ? clip / norm : 1.0) / divisor;
}

wn_status wn_optimizer_update(wn_device *device, wn_store *store, const wn_job *job, const wn_update *update) {
  const wn_param *params = wn_store_params(store, &(int32_t){0});
  double clip = job->optimizer.clip_grad;
  for (int32_t i = 0; i < wn_store_pieces(store); i++) {
    wn_piece *piece = wn_store_piece(store, i);
    if (!wn_kind_trains(piece->kind)) continue;
    bool indexer = piece->kind == WN_INDEXER;
    wn_adamw_params adamw = {
        .lr = indexer ? update->indexer_lr : update->lr,
        .beta1 = job->optimizer.beta1,
        .beta2 = job->optimizer.beta2,
        .eps = job->optimizer.eps,
        .grad_scale = indexer ? clip_scale(update->norms.indexer, clip, update->indexer_divisor)
                              : clip_scale(update->norms.base, clip, update->base_divisor),
        .step = indexer ? update->adam_indexer : update->adam_base,
    };
    for (int32_t s = 0; s < piece->n_segments; s++) {
      wn_segment at = piece->segments[s];
      adamw.weight_decay = params[at.param].decay ? job->optimizer.weight_decay : 0;
      wn_tensor master = wn_tensor_slice(piece->master, 0, at.offset, at.count);
      wn_tensor m = wn_tensor_slice(piece->m, 0, at.offset, at.count);
      wn_tensor v = wn_tensor_slice(piece->v, 0, at.offset, at.count);
      wn_tensor grad = wn_tensor_slice(piece->grad, 0, at.offset, at.count);
      WN_TRY(device->ops->adamw(device, &master, &m, &v, NULL, &grad, &adamw));
    }
  }
  return NULL;
}

wn_status wn_optimizer_zero_grads(wn_device *device, wn_store *store) {
  for (int32_t i = 0; i < wn_store_pieces(store); i++) {
    wn_piece *piece = wn_store_piece(store, i);
    if (wn_kind_trains(piece->kind)) WN_TRY(device->ops->zero(device, &piece->grad));
  }
  return NULL;
}

wn_status wn_optimizer_router_bias(wn_device *device, wn_store *store, double speed, const int64_t *load,
                                   int32_t n_experts) {
  const wn_param *params = wn_store_params(store, &(int32_t){0});
  for (int32_t i = 0; i < wn_store_pieces(store); i++) {
    wn_piece *piece = wn_store_piece(store, i);
    if (piece->kind != WN_BUFFER) continue;
    const int64_t *layer_load = load + (int64_t)piece->layer * n_experts;
    int64_t total = 0;
    for (int32_t e = 0; e < n_experts; e++) total += layer_load[e];
    for (int32_t s = 0; s < piece->n_segments; s++) {
      wn_segment at = piece->segments[s];
      if (params[at.param].slot != WN_P_ROUTER_BIAS) continue;
      for (int64_t j = 0; j < at.count; j++) { /* a few dozen scalars a layer: read, changed and written one by one */
        wn_tensor one = wn_tensor_slice(piece->master, 0, at.offset + j, 1);
        int64_t scaled = layer_load[at.first + j] * n_experts;
        if (scaled == total) continue;
        float bias;
        WN_ASSERT(piece->master.dtype == WN_F32, "router bias master is %s", wn_dtype_name(piece->master.dtype));
        WN_TRY(device->ops->download(device, &bias, &one));
        bias += (float)(scaled > total ? -speed : speed);
        WN_TRY(device->ops->upload(device, &one, &bias));
      }
    }
  }
  return NULL;
}
