#include "train/optimizer.h"

#include <float.h>
#include <math.h>

#include "kernels/kernels.h"
#include "model/params.h"

/* Over the gradients of all pieces at once, so that the host waits once; the sums are added in the pieces' order. */
static wn_status sum_pieces(wn_device *device, wn_store *store, double squares[2], int64_t *non_finite) {
  size_t mark = wn_arena_mark(device->host), pieces = (size_t)wn_store_pieces(store);
  void *memory[3];
  int32_t n = 0;
  WN_TRY(wn_arena_alloc(device->host, &memory[0], "gradient norms", pieces * sizeof(wn_tensor)));
  WN_TRY(wn_arena_alloc(device->host, &memory[1], "gradient norms", pieces * sizeof(double)));
  WN_TRY(wn_arena_alloc(device->host, &memory[2], "gradient norms", pieces * sizeof(int64_t)));
  wn_tensor *grad = memory[0];
  double *sum = memory[1];
  int64_t *bad = memory[2];
  for (int32_t i = 0; i < wn_store_pieces(store); i++)
    if (wn_kind_trains(wn_store_piece(store, i)->kind)) grad[n++] = wn_store_piece(store, i)->grad;
  WN_TRY(device->ops->sum_squares(device, sum, bad, grad, n));
  n = 0;
  for (int32_t i = 0; i < wn_store_pieces(store); i++) {
    const wn_piece *piece = wn_store_piece(store, i);
    if (!wn_kind_trains(piece->kind)) continue;
    squares[piece->kind == WN_INDEXER] += sum[n];
    *non_finite += bad[n++];
  }
  wn_arena_release(device->host, mark);
  return NULL;
}

wn_status wn_optimizer_norms(wn_gradient_norms *out, wn_device *device, wn_world *world, wn_store *store,
                             double base_divisor, double indexer_divisor) {
  double squares[2] = {0, 0};
  int64_t non_finite = 0;
  WN_TRY(sum_pieces(device, store, squares, &non_finite));
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

bool wn_optimizer_takes(const wn_gradient_norms *norms, double clip_grad) {
  double norm = fmax(norms->base, norms->indexer);
  if (clip_grad > 0) norm = fmin(norm, clip_grad);
  return norms->non_finite == 0 && norm * norm <= (double)FLT_MAX;
}

/* Elements from .. to - 1 of a piece. Between parameters lies padding whose gradients, moments and masters are 0, and
 * stay 0. */
static wn_status update_run(wn_device *device, wn_piece *piece, int64_t from, int64_t to,
                            const wn_adamw_params *adamw) {
  wn_tensor master = wn_tensor_slice(piece->master, 0, from, to - from);
  wn_tensor m = wn_tensor_slice(piece->m, 0, from, to - from), v = wn_tensor_slice(piece->v, 0, from, to - from);
  wn_tensor grad = wn_tensor_slice(piece->grad, 0, from, to - from);
  wn_tensor weight = wn_tensor_slice(piece->weight, 0, from, to - from);
  bool copy = piece->weight.data != piece->master.data;
  return device->ops->adamw(device, &master, &m, &v, copy ? &weight : NULL, &grad, adamw);
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
    for (int32_t s = 0, next; s < piece->n_segments; s = next) {
      bool decay = params[piece->segments[s].param].decay;
      for (next = s + 1; next < piece->n_segments && params[piece->segments[next].param].decay == decay;) next++;
      const wn_segment *last = &piece->segments[next - 1];
      adamw.weight_decay = decay ? job->optimizer.weight_decay : 0;
      WN_TRY(update_run(device, piece, piece->segments[s].offset, last->offset + last->count, &adamw));
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

/* Up for an expert below the mean load, down for one above it. Nothing is read back: the host sends the steps. */
static wn_status move_biases(wn_device *device, wn_piece *piece, const wn_segment *at, double speed,
                             const int64_t *load, int32_t n_experts, int64_t total) {
  size_t mark = wn_arena_mark(device->scratch), host_mark = wn_arena_mark(device->host);
  wn_tensor bias = wn_tensor_slice(piece->master, 0, at->offset, at->count), steps, host;
  WN_ASSERT(bias.dtype == WN_F32, "router bias master is %s", wn_dtype_name(bias.dtype));
  WN_TRY(wn_tensor_alloc(&steps, device->scratch, "router bias steps", WN_F32, 2, 1, at->count, 0, 0));
  WN_TRY(wn_tensor_alloc(&host, device->host, "router bias steps", WN_F32, 2, 1, at->count, 0, 0));
  float *step = host.data;
  for (int64_t j = 0; j < at->count; j++) {
    int64_t scaled = load[at->first + j] * n_experts;
    step[j] = scaled == total ? 0 : (float)(scaled > total ? -speed : speed);
  }
  WN_TRY(device->ops->upload(device, &steps, step));
  bias = wn_tensor_view(bias, 2, 1, at->count, 0, 0);
  WN_TRY(device->ops->add(device, &bias, &bias, &steps));
  wn_arena_release(device->host, host_mark);
  wn_arena_release(device->scratch, mark);
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
      if (params[piece->segments[s].param].slot != WN_P_ROUTER_BIAS) continue;
      WN_TRY(move_biases(device, piece, &piece->segments[s], speed, layer_load, n_experts, total));
    }
  }
  return NULL;
}
