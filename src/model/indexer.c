/* The lightning indexer: projections, and the KL that alone trains it (DeepSeek-V3.2 report, 2.1). Its inputs, the
 * normed x and the normed query latent, are detached: gradients stop at its own five tensors. No Hadamard rotation and
 * no FP8: both belong to inference, and the rotation changes nothing in exact arithmetic. */
#include "model/parts.h"

#include <math.h>

static wn_tensor one_head(wn_tensor k) {
  return wn_tensor_split_last(k, 1, k.dim[1]);
}

/* The FIRST rope columns of every head: the attention rotates the last ones. */
static wn_tensor rope_part(const wn_call *c, wn_tensor q) {
  return wn_tensor_slice(q, 2, 0, c->config->qk_rope_head_dim);
}

static double weight_scale(const wn_call *c) {
  return 1.0 / sqrt((double)c->config->index_n_heads);
}

wn_indexer_params wn_indexer_constants(const wn_call *c) {
  return (wn_indexer_params){
      .scale = c->model->index_scale, .attention_scale = c->model->softmax_scale, .coeff = c->pass->kl_coeff};
}

wn_status wn_indexer_project(wn_call *c, wn_index_state *s, const wn_mla *m) {
  const wn_tensor *w = c->weights->slot;
  int64_t heads = c->config->index_n_heads, width = c->config->index_head_dim;
  WN_TRY(wn_state(c, &s->q, "indexer q", WN_ACT, 3, c->n, heads, width));
  WN_TRY(wn_state(c, &s->k_raw, "indexer k_raw", WN_ACT, 2, c->n, width, 0));
  WN_TRY(wn_state(c, &s->k_stat, "indexer k_stat", WN_STAT, 2, c->n, 2, 0));
  WN_TRY(wn_state(c, &s->k, "indexer k", WN_ACT, 2, c->n, width, 0));
  WN_TRY(wn_state(c, &s->w, "indexer w", WN_STAT, 2, c->n, heads, 0));
  wn_tensor flat = wn_tensor_view(s->q, 2, c->n, heads * width, 0, 0);
  wn_tensor q_pe = rope_part(c, s->q), k_pe = rope_part(c, one_head(s->k));
  WN_TRY(c->ops->linear(c->device, &flat, &m->qr, &w[WN_P_INDEX_Q_B], &(wn_accumulate){0}));
  WN_TRY(wn_call_rope(c, &q_pe, false, false));
  WN_TRY(c->ops->linear(c->device, &s->k_raw, &m->x, &w[WN_P_INDEX_K], &(wn_accumulate){0}));
  WN_TRY(c->ops->layer_norm(c->device, &s->k, &s->k_stat, &s->k_raw, &w[WN_P_INDEX_K_NORM], &w[WN_P_INDEX_K_NORM_BIAS],
                            &(wn_norm_params){.eps = WN_LATENT_EPS}));
  WN_TRY(wn_call_rope(c, &k_pe, false, false));
  WN_TRY(c->ops->linear(c->device, &s->w, &m->x, &w[WN_P_INDEX_WEIGHTS], &(wn_accumulate){0}));
  return c->ops->scale(c->device, &s->w, &s->w, weight_scale(c));
}

/* From the gradients of q, k and w (used up) to those of the five tensors. */
static wn_status project_backward(wn_call *c, wn_tensor *dq, wn_tensor *dk, wn_tensor *dw, const wn_index_state *s,
                                  const wn_mla *m) {
  int64_t heads = c->config->index_n_heads, width = c->config->index_head_dim;
  wn_tensor flat = wn_tensor_view(*dq, 2, c->n, heads * width, 0, 0), dk_raw;
  wn_tensor dq_pe = rope_part(c, *dq), dk_pe = rope_part(c, one_head(*dk));
  WN_TRY(wn_scratch(c, &dk_raw, "indexer dk_raw", WN_ACT, 2, c->n, width, 0));
  WN_TRY(wn_call_rope(c, &dq_pe, false, true));
  WN_TRY(wn_call_weight_grad(c, WN_P_INDEX_Q_B, &flat, &m->qr));
  WN_TRY(wn_call_rope(c, &dk_pe, false, true));
  WN_TRY(c->ops->layer_norm_backward(c->device, &dk_raw, wn_call_grad(c, WN_P_INDEX_K_NORM),
                                     wn_call_grad(c, WN_P_INDEX_K_NORM_BIAS), dk, &s->k_raw, &s->k_stat,
                                     &c->weights->slot[WN_P_INDEX_K_NORM], &(wn_norm_params){.eps = WN_LATENT_EPS}));
  WN_TRY(wn_call_weight_grad(c, WN_P_INDEX_K, &dk_raw, &m->x));
  WN_TRY(c->ops->scale(c->device, dw, dw, weight_scale(c)));
  return wn_call_weight_grad(c, WN_P_INDEX_WEIGHTS, dw, &m->x);
}

static wn_status kl(wn_call *c, wn_tensor *out, wn_tensor *dq, wn_tensor *dk, wn_tensor *dw, const wn_index_state *s,
                    const wn_mla *m, const wn_attention *a, const wn_tensor *selection, const wn_tensor *p) {
  wn_indexer_params params = wn_indexer_constants(c);
  if (selection)
    return c->ops->indexer_kl_sparse(c->device, out, dq, dk, dw, &s->q, &s->k, &s->w, selection, p, c->rows, &params);
  return c->ops->indexer_kl_dense(c->device, out, dq, dk, dw, &s->q, &s->k, &s->w, &m->q, &a->k, &a->lse, c->rows,
                                  &params);
}

wn_status wn_indexer_kl(wn_call *c, wn_tensor *out, bool learn, const wn_index_state *s, const wn_mla *m,
                        const wn_attention *a, const wn_tensor *selection, const wn_tensor *p) {
  if (!learn) return kl(c, out, NULL, NULL, NULL, s, m, a, selection, p);
  size_t mark = wn_arena_mark(c->device->scratch);
  wn_tensor dq, dk, dw;
  WN_TRY(wn_scratch(c, &dq, "indexer dq", WN_ACT, 3, c->n, s->q.dim[1], s->q.dim[2]));
  WN_TRY(wn_scratch(c, &dk, "indexer dk", WN_WGRAD, 2, c->n, s->k.dim[1], 0));
  WN_TRY(wn_scratch(c, &dw, "indexer dw", WN_STAT, 2, c->n, s->w.dim[1], 0));
  WN_TRY(c->ops->zero(c->device, &dk));
  WN_TRY(kl(c, out, &dq, &dk, &dw, s, m, a, selection, p));
  WN_TRY(project_backward(c, &dq, &dk, &dw, s, m));
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}
