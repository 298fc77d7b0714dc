/* Attention over the latents, in the form that a pass takes:
 *
 *   dense, masked  [k_nope | v]_h = kv_b(c), k_h = [k_nope_h | k_pe]; a head's own keys, whole or at the selection
 *   absorbed       q'_h = [q_nope_h W_UK_h | q_pe_h]; every head reads the same kv = [c | k_pe]; o_h = o'_h W_UV_h^T
 *
 * kv_b is [H, nope + v, latent]: W_UK is its first nope rows of each head, W_UV the others. The absorbed form's q', o'
 * and their gradients are H * (latent + rope) wide, so they exist for device->chunk_rows rows at a time only: its
 * backward runs forward and backward chunk by chunk. */
#include "model/parts.h"

static wn_tensor up_weights(const wn_call *c, const wn_tensor *kv_b) {
  const wn_model_config *f = c->config;
  return wn_tensor_view(*kv_b, 3, f->num_attention_heads, f->qk_nope_head_dim + f->v_head_dim, f->kv_lora_rank, 0);
}

static wn_tensor uk_part(const wn_call *c, wn_tensor up) {
  return wn_tensor_slice(up, 1, 0, c->config->qk_nope_head_dim);
}

static wn_tensor uv_part(const wn_call *c, wn_tensor up) {
  return wn_tensor_slice(up, 1, c->config->qk_nope_head_dim, c->config->v_head_dim);
}

static wn_tensor values(const wn_call *c, wn_tensor up) {
  return wn_tensor_slice(up, 2, c->config->qk_nope_head_dim, c->config->v_head_dim);
}

static wn_tensor rows_of(wn_tensor t, int64_t from, int64_t count) {
  return wn_tensor_slice(t, 0, from, count);
}

static wn_rows chunk_of(const wn_rows *rows, int64_t from, int64_t count) {
  return (wn_rows){.n_rows = (int32_t)count,
                   .n_keys = rows->n_keys,
                   .first_key = rows->first_key + from,
                   .last_key = rows->last_key + from,
                   .position = rows->position + from};
}

static wn_attention_params constants(const wn_call *c) {
  return (wn_attention_params){.scale = c->model->softmax_scale, .v_width = c->config->kv_lora_rank};
}

static wn_status allocate(wn_call *c, wn_attention *a, bool backward) {
  const wn_model_config *f = c->config;
  WN_ASSERT(!a->kept.data || !c->sparse || c->form == WN_FORM_MASKED, "absorbed attention is not kept");
  if (!a->o.data) WN_TRY(wn_state(c, &a->o, "o", WN_ACT, 3, c->n, f->num_attention_heads, f->v_head_dim));
  if (!a->lse.data) WN_TRY(wn_state(c, &a->lse, "lse", WN_STAT, 2, c->n, f->num_attention_heads, 0));
  if (!backward) return NULL;
  return wn_scratch(c, &a->delta, "delta", WN_STAT, 2, c->n, f->num_attention_heads, 0);
}

wn_status wn_attention_keys(wn_call *c, wn_attention *a, const wn_mla *m) {
  const wn_model_config *f = c->config;
  int64_t heads = f->num_attention_heads, nope = f->qk_nope_head_dim, rope = f->qk_rope_head_dim;
  int64_t up_width = nope + f->v_head_dim;
  WN_TRY(wn_state(c, &a->up, "k_nope and v", WN_ACT, 3, c->n, heads, up_width));
  WN_TRY(wn_state(c, &a->k, "k", WN_ACT, 3, c->n, heads, nope + rope));
  wn_tensor flat = wn_tensor_view(a->up, 2, c->n, heads * up_width, 0, 0);
  wn_tensor latent = wn_tensor_slice(m->kv, 1, 0, f->kv_lora_rank);
  wn_tensor k_pe = wn_tensor_slice(m->kv, 1, f->kv_lora_rank, rope);
  WN_TRY(c->ops->linear(c->device, &flat, &latent, &c->weights->slot[WN_P_KV_B], &(wn_accumulate){0}));
  wn_tensor up_nope = wn_tensor_slice(a->up, 2, 0, nope), k_nope = wn_tensor_slice(a->k, 2, 0, nope);
  wn_tensor k_rope = wn_tensor_slice(a->k, 2, nope, rope);
  WN_TRY(c->ops->cast(c->device, &k_nope, &up_nope));
  return c->ops->broadcast_heads(c->device, &k_rope, &k_pe);
}

/* ---- a head's own keys: dense and masked ---- */

static wn_status per_head_forward(wn_call *c, wn_attention *a, const wn_tensor *d_o, const wn_mla *m,
                                  const wn_tensor *selection) {
  wn_tensor v = values(c, a->up), *delta = d_o ? &a->delta : NULL, *o = a->kept.data ? &a->kept : &a->o;
  wn_attention_params params = constants(c);
  if (selection)
    WN_TRY(c->ops->attention_masked(c->device, o, &a->lse, delta, d_o, &m->q, &a->k, &v, selection, c->rows, &params));
  else
    WN_TRY(c->ops->attention_dense(c->device, o, &a->lse, delta, d_o, &m->q, &a->k, &v, c->rows, &params));
  return a->kept.data ? c->ops->cast(c->device, &a->o, &a->kept) : NULL;
}

static wn_status per_head_backward(wn_call *c, wn_attention *a, wn_tensor *dq, wn_tensor *dkv, wn_tensor *p,
                                   const wn_tensor *d_o, const wn_mla *m, const wn_tensor *selection) {
  const wn_model_config *f = c->config;
  int64_t heads = f->num_attention_heads, nope = f->qk_nope_head_dim, rope = f->qk_rope_head_dim;
  int64_t latent = f->kv_lora_rank, up_width = nope + f->v_head_dim;
  wn_attention_params params = constants(c);
  wn_tensor dup, dk;
  if (a->kept.data)
    WN_TRY(c->ops->attention_delta(c->device, &a->delta, &a->o, &a->kept, d_o));
  else
    WN_TRY(per_head_forward(c, a, d_o, m, selection));
  size_t mark = wn_arena_mark(c->device->scratch);
  WN_TRY(wn_scratch(c, &dup, "k_nope and v gradient", WN_ACT, 3, c->n, heads, up_width));
  WN_TRY(wn_scratch(c, &dk, "dk", WN_ACT, 3, c->n, heads, nope + rope));
  WN_TRY(c->ops->zero(c->device, &dup));
  WN_TRY(c->ops->zero(c->device, &dk));
  wn_tensor v = values(c, a->up), dv = values(c, dup);
  if (selection)
    WN_TRY(c->ops->attention_masked_backward(c->device, dq, &dk, &dv, p, d_o, &m->q, &a->k, &v, selection, &a->lse,
                                             &a->delta, c->rows, &params));
  else
    WN_TRY(c->ops->attention_dense_backward(c->device, dq, &dk, &dv, d_o, &m->q, &a->k, &v, &a->lse, &a->delta, c->rows,
                                            &params));
  wn_tensor dup_nope = wn_tensor_slice(dup, 2, 0, nope), dk_nope = wn_tensor_slice(dk, 2, 0, nope);
  wn_tensor dk_rope = wn_tensor_slice(dk, 2, nope, rope), flat = wn_tensor_view(dup, 2, c->n, heads * up_width, 0, 0);
  wn_tensor dc = wn_tensor_slice(*dkv, 1, 0, latent), dk_pe = wn_tensor_slice(*dkv, 1, latent, rope);
  wn_tensor latents = wn_tensor_slice(m->kv, 1, 0, latent);
  WN_TRY(c->ops->cast(c->device, &dup_nope, &dk_nope));
  WN_TRY(c->ops->sum_heads(c->device, &dk_pe, &dk_rope, &(wn_accumulate){0}));
  WN_TRY(wn_call_weight_grad(c, WN_P_KV_B, &flat, &latents));
  WN_TRY(c->ops->linear_backward_input(c->device, &dc, &flat, &c->weights->slot[WN_P_KV_B], &(wn_accumulate){0}));
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}

/* ---- absorbed ---- */

typedef struct absorbed_chunk {
  int64_t from, count;
  wn_rows rows;
  wn_tensor q, o; /* q'[count,H,latent+rope], o'[count,H,latent] */
} absorbed_chunk;

static wn_status absorbed_chunk_alloc(wn_call *c, absorbed_chunk *chunk, int64_t from) {
  const wn_model_config *f = c->config;
  int64_t heads = f->num_attention_heads, left = c->n - from;
  chunk->from = from;
  chunk->count = left < c->device->chunk_rows ? left : c->device->chunk_rows;
  chunk->rows = chunk_of(c->rows, from, chunk->count);
  WN_TRY(wn_scratch(c, &chunk->q, "absorbed q", WN_ACT, 3, chunk->count, heads, f->kv_lora_rank + f->qk_rope_head_dim));
  return wn_scratch(c, &chunk->o, "absorbed o", WN_ACT, 3, chunk->count, heads, f->kv_lora_rank);
}

/* q' = [q_nope W_UK | q_pe]; o', lse (and delta); o = o' W_UV^T. d_o is the gradient of o', or NULL. */
static wn_status absorbed_chunk_forward(wn_call *c, absorbed_chunk *chunk, wn_attention *a, const wn_tensor *d_o,
                                        const wn_mla *m, const wn_tensor *selection) {
  const wn_model_config *f = c->config;
  int64_t from = chunk->from, count = chunk->count, latent = f->kv_lora_rank, rope = f->qk_rope_head_dim;
  wn_tensor up = up_weights(c, &c->weights->slot[WN_P_KV_B]), uk = uk_part(c, up), uv = uv_part(c, up);
  wn_tensor q = rows_of(m->q, from, count);
  wn_tensor q_nope = wn_tensor_slice(q, 2, 0, f->qk_nope_head_dim);
  wn_tensor q_pe = wn_tensor_slice(q, 2, f->qk_nope_head_dim, rope);
  wn_tensor to_nope = wn_tensor_slice(chunk->q, 2, 0, latent), to_pe = wn_tensor_slice(chunk->q, 2, latent, rope);
  WN_TRY(c->ops->per_head_linear(c->device, &to_nope, &q_nope, &uk, &(wn_per_head_params){0}));
  WN_TRY(c->ops->cast(c->device, &to_pe, &q_pe));
  wn_tensor lse = rows_of(a->lse, from, count), delta, picks = rows_of(*selection, from, count);
  if (d_o) delta = rows_of(a->delta, from, count);
  wn_attention_params params = constants(c);
  WN_TRY(c->ops->attention_sparse(c->device, &chunk->o, &lse, d_o ? &delta : NULL, d_o, &chunk->q, &m->kv, &picks,
                                  &chunk->rows, &params));
  wn_tensor o = rows_of(a->o, from, count);
  return c->ops->per_head_linear(c->device, &o, &chunk->o, &uv, &(wn_per_head_params){.transpose = true});
}

static wn_status absorbed_forward(wn_call *c, wn_attention *a, wn_tensor *p, const wn_mla *m,
                                  const wn_tensor *selection) {
  wn_attention_params params = constants(c);
  for (int64_t from = 0; from < c->n; from += c->device->chunk_rows) {
    size_t mark = wn_arena_mark(c->device->scratch);
    absorbed_chunk chunk;
    WN_TRY(absorbed_chunk_alloc(c, &chunk, from));
    WN_TRY(absorbed_chunk_forward(c, &chunk, a, NULL, m, selection));
    if (p) {
      wn_tensor p_rows = rows_of(*p, from, chunk.count), picks = rows_of(*selection, from, chunk.count);
      wn_tensor lse = rows_of(a->lse, from, chunk.count);
      WN_TRY(c->ops->attention_sparse_backward(c->device, NULL, NULL, &p_rows, NULL, &chunk.q, &m->kv, &picks, &lse,
                                               NULL, &chunk.rows, &params));
    }
    wn_arena_release(c->device->scratch, mark);
  }
  return NULL;
}

/* From dq'[count,H,latent+rope]: dq of these rows, and W_UK's gradient. */
static wn_status unabsorb_queries(wn_call *c, const absorbed_chunk *chunk, wn_tensor *dq, const wn_tensor *dq_absorbed,
                                  const wn_mla *m, const wn_tensor *uk) {
  const wn_model_config *f = c->config;
  int64_t nope = f->qk_nope_head_dim, rope = f->qk_rope_head_dim, latent = f->kv_lora_rank;
  wn_tensor rows = rows_of(*dq, chunk->from, chunk->count);
  wn_tensor dq_nope = wn_tensor_slice(rows, 2, 0, nope), dq_pe = wn_tensor_slice(rows, 2, nope, rope);
  wn_tensor from_nope = wn_tensor_slice(*dq_absorbed, 2, 0, latent);
  wn_tensor from_pe = wn_tensor_slice(*dq_absorbed, 2, latent, rope);
  WN_TRY(c->ops->per_head_linear(c->device, &dq_nope, &from_nope, uk, &(wn_per_head_params){.transpose = true}));
  WN_TRY(c->ops->cast(c->device, &dq_pe, &from_pe));
  wn_tensor *grad = wn_call_grad(c, WN_P_KV_B);
  if (!grad) return NULL;
  wn_tensor q_nope = wn_tensor_slice(rows_of(m->q, chunk->from, chunk->count), 2, 0, nope);
  wn_tensor duk = uk_part(c, up_weights(c, grad));
  return c->ops->per_head_linear_backward_weight(c->device, &duk, &q_nope, &from_nope);
}

static wn_status absorbed_chunk_backward(wn_call *c, int64_t from, wn_attention *a, wn_tensor *dq, wn_tensor *dkv,
                                         wn_tensor *p, const wn_tensor *d_o, const wn_mla *m,
                                         const wn_tensor *selection) {
  wn_tensor up = up_weights(c, &c->weights->slot[WN_P_KV_B]), uk = uk_part(c, up), uv = uv_part(c, up);
  wn_attention_params params = constants(c);
  absorbed_chunk chunk;
  WN_TRY(absorbed_chunk_alloc(c, &chunk, from));
  int64_t count = chunk.count;
  wn_tensor d_o_absorbed, dq_absorbed, d_o_rows = rows_of(*d_o, from, count), p_rows;
  WN_TRY(wn_scratch(c, &d_o_absorbed, "absorbed d_o", WN_ACT, 3, count, chunk.o.dim[1], chunk.o.dim[2]));
  WN_TRY(wn_scratch(c, &dq_absorbed, "absorbed dq", WN_ACT, 3, count, chunk.q.dim[1], chunk.q.dim[2]));
  WN_TRY(c->ops->per_head_linear(c->device, &d_o_absorbed, &d_o_rows, &uv, &(wn_per_head_params){0}));
  WN_TRY(absorbed_chunk_forward(c, &chunk, a, &d_o_absorbed, m, selection));
  wn_tensor *grad = wn_call_grad(c, WN_P_KV_B);
  if (grad) {
    wn_tensor duv = uv_part(c, up_weights(c, grad));
    WN_TRY(c->ops->per_head_linear_backward_weight(c->device, &duv, &d_o_rows, &chunk.o));
  }
  wn_tensor picks = rows_of(*selection, from, count), lse = rows_of(a->lse, from, count);
  wn_tensor delta = rows_of(a->delta, from, count);
  if (p) p_rows = rows_of(*p, from, count);
  WN_TRY(c->ops->attention_sparse_backward(c->device, &dq_absorbed, dkv, p ? &p_rows : NULL, &d_o_absorbed, &chunk.q,
                                           &m->kv, &picks, &lse, &delta, &chunk.rows, &params));
  return unabsorb_queries(c, &chunk, dq, &dq_absorbed, m, &uk);
}

static wn_status absorbed_backward(wn_call *c, wn_attention *a, wn_tensor *dq, wn_tensor *dkv, wn_tensor *p,
                                   const wn_tensor *d_o, const wn_mla *m, const wn_tensor *selection) {
  size_t outer = wn_arena_mark(c->device->scratch);
  wn_tensor sum; /* over chunks, so in the gradients' precision */
  WN_TRY(wn_scratch(c, &sum, "dkv sum", WN_WGRAD, 2, c->n, dkv->dim[1], 0));
  WN_TRY(c->ops->zero(c->device, &sum));
  for (int64_t from = 0; from < c->n; from += c->device->chunk_rows) {
    size_t mark = wn_arena_mark(c->device->scratch);
    WN_TRY(absorbed_chunk_backward(c, from, a, dq, &sum, p, d_o, m, selection));
    wn_arena_release(c->device->scratch, mark);
  }
  WN_TRY(c->ops->cast(c->device, dkv, &sum));
  wn_arena_release(c->device->scratch, outer);
  return NULL;
}

wn_status wn_attention_forward(wn_call *c, wn_attention *a, wn_tensor *p, const wn_mla *m, const wn_tensor *selection) {
  WN_ASSERT(selection || !p, "p belongs to a selection");
  WN_TRY(allocate(c, a, false));
  if (selection && c->form == WN_FORM_ABSORBED) return absorbed_forward(c, a, p, m, selection);
  WN_TRY(per_head_forward(c, a, NULL, m, selection));
  if (!p) return NULL;
  wn_tensor v = values(c, a->up);
  wn_attention_params params = constants(c);
  return c->ops->attention_masked_backward(c->device, NULL, NULL, NULL, p, NULL, &m->q, &a->k, &v, selection, &a->lse,
                                           NULL, c->rows, &params);
}

wn_status wn_attention_backward(wn_call *c, wn_attention *a, wn_tensor *dq, wn_tensor *dkv, wn_tensor *p,
                                const wn_tensor *d_o, const wn_mla *m, const wn_tensor *selection) {
  WN_ASSERT(selection || !p, "p belongs to a selection");
  WN_TRY(allocate(c, a, true));
  if (selection && c->form == WN_FORM_ABSORBED) return absorbed_backward(c, a, dq, dkv, p, d_o, m, selection);
  return per_head_backward(c, a, dq, dkv, p, d_o, m, selection);
}
