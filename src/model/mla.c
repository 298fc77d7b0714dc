/* Latent projections of multi-head latent attention: x -> qr -> q and x -> [c | k_pe] (DeepSeek-V3 report, eqs. 1 to
 * 11). */
#include "model/parts.h"

static wn_tensor rope_part(wn_tensor q, int64_t nope, int64_t rope) {
  return wn_tensor_slice(q, 2, nope, rope);
}

/* The rotated columns of kv[n,latent+rope], as one head. */
static wn_tensor key_rope_part(wn_tensor kv, int64_t latent, int64_t rope) {
  return wn_tensor_split_last(wn_tensor_slice(kv, 1, latent, rope), 1, rope);
}

static wn_tensor flat_heads(wn_tensor q) {
  return wn_tensor_view(q, 2, q.dim[0], q.dim[1] * q.dim[2], 0, 0);
}

/* Queries are made from the normed low-rank latent, or from x itself where there is none. */
static wn_slot query_slot(const wn_call *c) {
  return c->config->q_lora_rank > 0 ? WN_P_Q_B : WN_P_Q;
}

static wn_status project_query_latent(wn_call *c, wn_mla *m) {
  const wn_model_config *f = c->config;
  const wn_tensor *w = c->weights->slot;
  WN_TRY(wn_state(c, &m->qa, "qa", WN_ACT, 2, c->n, f->q_lora_rank, 0));
  WN_TRY(wn_state(c, &m->qa_inv, "qa_inv", WN_STAT, 1, c->n, 0, 0));
  WN_TRY(wn_state(c, &m->qr, "qr", WN_ACT, 2, c->n, f->q_lora_rank, 0));
  WN_TRY(c->ops->linear(c->device, &m->qa, &m->x, &w[WN_P_Q_A], &(wn_accumulate){0}));
  return c->ops->rms_norm(c->device, &m->qr, &m->qa_inv, &m->qa, &w[WN_P_Q_A_NORM],
                          &(wn_norm_params){.eps = WN_LATENT_EPS});
}

static wn_status project_queries(wn_call *c, wn_mla *m) {
  const wn_model_config *f = c->config;
  int64_t nope = f->qk_nope_head_dim, rope = f->qk_rope_head_dim;
  if (f->q_lora_rank > 0)
    WN_TRY(project_query_latent(c, m));
  else
    m->qr = m->x;
  WN_TRY(wn_state(c, &m->q, "q", WN_ACT, 3, c->n, f->num_attention_heads, nope + rope));
  wn_tensor flat = flat_heads(m->q), q_pe = rope_part(m->q, nope, rope);
  WN_TRY(c->ops->linear(c->device, &flat, &m->qr, &c->weights->slot[query_slot(c)], &(wn_accumulate){0}));
  return wn_call_rope(c, &q_pe, true, false);
}

static wn_status project_keys(wn_call *c, wn_mla *m) {
  const wn_model_config *f = c->config;
  const wn_tensor *w = c->weights->slot;
  int64_t latent = f->kv_lora_rank, rope = f->qk_rope_head_dim;
  WN_TRY(wn_state(c, &m->kv_raw, "kv_raw", WN_ACT, 2, c->n, latent + rope, 0));
  WN_TRY(wn_state(c, &m->c_inv, "c_inv", WN_STAT, 1, c->n, 0, 0));
  WN_TRY(wn_state(c, &m->kv, "kv", WN_ACT, 2, c->n, latent + rope, 0));
  WN_TRY(c->ops->linear(c->device, &m->kv_raw, &m->x, &w[WN_P_KV_A], &(wn_accumulate){0}));
  wn_tensor raw = wn_tensor_slice(m->kv_raw, 1, 0, latent), normed = wn_tensor_slice(m->kv, 1, 0, latent);
  WN_TRY(c->ops->rms_norm(c->device, &normed, &m->c_inv, &raw, &w[WN_P_KV_A_NORM],
                          &(wn_norm_params){.eps = WN_LATENT_EPS}));
  wn_tensor raw_pe = key_rope_part(m->kv_raw, latent, rope), k_pe = key_rope_part(m->kv, latent, rope);
  WN_TRY(c->ops->cast(c->device, &k_pe, &raw_pe));
  return wn_call_rope(c, &k_pe, true, false);
}

wn_status wn_mla_project(wn_call *c, wn_mla *m, const wn_tensor *h_in) {
  WN_TRY(wn_state(c, &m->x, "attention input", WN_ACT, 2, c->n, c->config->hidden_size, 0));
  WN_TRY(wn_state(c, &m->x_inv, "attention input_inv", WN_STAT, 1, c->n, 0, 0));
  WN_TRY(c->ops->rms_norm(c->device, &m->x, &m->x_inv, h_in, &c->weights->slot[WN_P_INPUT_NORM],
                          &(wn_norm_params){.eps = c->config->rms_norm_eps}));
  WN_TRY(project_queries(c, m));
  return project_keys(c, m);
}

/* dx = gradient of x through the queries. */
static wn_status queries_backward(wn_call *c, wn_tensor *dx, wn_tensor *dq, const wn_mla *m) {
  const wn_model_config *f = c->config;
  const wn_tensor *w = c->weights->slot;
  wn_tensor dqr, dqa, flat = flat_heads(*dq), dq_pe = rope_part(*dq, f->qk_nope_head_dim, f->qk_rope_head_dim);
  WN_TRY(wn_call_rope(c, &dq_pe, true, true));
  WN_TRY(wn_call_weight_grad(c, query_slot(c), &flat, &m->qr));
  if (f->q_lora_rank == 0) return c->ops->linear_backward_input(c->device, dx, &flat, &w[WN_P_Q], &(wn_accumulate){0});
  WN_TRY(wn_scratch(c, &dqr, "dqr", WN_ACT, 2, c->n, f->q_lora_rank, 0));
  WN_TRY(wn_scratch(c, &dqa, "dqa", WN_ACT, 2, c->n, f->q_lora_rank, 0));
  WN_TRY(c->ops->linear_backward_input(c->device, &dqr, &flat, &w[WN_P_Q_B], &(wn_accumulate){0}));
  WN_TRY(c->ops->rms_norm_backward(c->device, &dqa, wn_call_grad(c, WN_P_Q_A_NORM), &dqr, &m->qa, &m->qa_inv,
                                   &w[WN_P_Q_A_NORM], &(wn_norm_params){.eps = WN_LATENT_EPS}));
  WN_TRY(wn_call_weight_grad(c, WN_P_Q_A, &dqa, &m->x));
  return c->ops->linear_backward_input(c->device, dx, &dqa, &w[WN_P_Q_A], &(wn_accumulate){0});
}

/* dx += gradient of x through the latents. */
static wn_status keys_backward(wn_call *c, wn_tensor *dx, wn_tensor *dkv, const wn_mla *m) {
  const wn_model_config *f = c->config;
  const wn_tensor *w = c->weights->slot;
  int64_t latent = f->kv_lora_rank, rope = f->qk_rope_head_dim;
  wn_tensor dkv_raw;
  WN_TRY(wn_scratch(c, &dkv_raw, "dkv_raw", WN_ACT, 2, c->n, latent + rope, 0));
  wn_tensor dk_pe = key_rope_part(*dkv, latent, rope), draw_pe = key_rope_part(dkv_raw, latent, rope);
  WN_TRY(wn_call_rope(c, &dk_pe, true, true));
  WN_TRY(c->ops->cast(c->device, &draw_pe, &dk_pe));
  wn_tensor dc = wn_tensor_slice(*dkv, 1, 0, latent), draw = wn_tensor_slice(dkv_raw, 1, 0, latent);
  wn_tensor raw = wn_tensor_slice(m->kv_raw, 1, 0, latent);
  WN_TRY(c->ops->rms_norm_backward(c->device, &draw, wn_call_grad(c, WN_P_KV_A_NORM), &dc, &raw, &m->c_inv,
                                   &w[WN_P_KV_A_NORM], &(wn_norm_params){.eps = WN_LATENT_EPS}));
  WN_TRY(wn_call_weight_grad(c, WN_P_KV_A, &dkv_raw, &m->x));
  return c->ops->linear_backward_input(c->device, dx, &dkv_raw, &w[WN_P_KV_A], &(wn_accumulate){.accumulate = true});
}

wn_status wn_mla_project_backward(wn_call *c, wn_tensor *dh, wn_tensor *dq, wn_tensor *dkv, const wn_mla *m,
                                  const wn_tensor *h_in) {
  size_t mark = wn_arena_mark(c->device->scratch);
  wn_tensor dx;
  WN_TRY(wn_scratch(c, &dx, "attention input gradient", WN_ACT, 2, c->n, c->config->hidden_size, 0));
  WN_TRY(queries_backward(c, &dx, dq, m));
  WN_TRY(keys_backward(c, &dx, dkv, m));
  WN_TRY(c->ops->rms_norm_backward(c->device, dh, wn_call_grad(c, WN_P_INPUT_NORM), &dx, h_in, &m->x_inv,
                                   &c->weights->slot[WN_P_INPUT_NORM],
                                   &(wn_norm_params){.eps = c->config->rms_norm_eps, .accumulate = true}));
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}
