/* The gated MLP, and the mixture of experts with its shared experts (DeepSeek-V3 report, 2.1.2). Backwards recompute
 * from the normed input x. */
#include "model/parts.h"

#include <string.h>

/* ---- gated MLP: y += (silu(x Wg^T) * x Wu^T) Wd^T ---- */

static wn_status gated_alloc(wn_call *c, wn_gated *g, int64_t rows, int64_t width) {
  WN_TRY(wn_state(c, &g->gate, "mlp gate", WN_ACT, 2, rows, width, 0));
  WN_TRY(wn_state(c, &g->up, "mlp up", WN_ACT, 2, rows, width, 0));
  return wn_state(c, &g->act, "mlp act", WN_ACT, 2, rows, width, 0);
}

static wn_status mlp_inner(wn_call *c, wn_gated *g, const wn_tensor *x, wn_slot gate) {
  const wn_tensor *w = &c->weights->slot[gate];
  WN_TRY(gated_alloc(c, g, c->n, w[0].dim[0]));
  WN_TRY(c->ops->linear(c->device, &g->gate, x, &w[0], &(wn_accumulate){0}));
  WN_TRY(c->ops->linear(c->device, &g->up, x, &w[1], &(wn_accumulate){0}));
  return c->ops->swiglu(c->device, &g->act, &g->gate, &g->up);
}

wn_status wn_mlp_forward(wn_call *c, wn_tensor *y, const wn_tensor *x, wn_slot gate) {
  size_t mark = wn_arena_mark(c->device->scratch);
  wn_gated g;
  WN_TRY(mlp_inner(c, &g, x, gate));
  if (c->kept) c->kept->gated = g;
  WN_TRY(c->ops->linear(c->device, y, &g.act, &c->weights->slot[gate + 2], &(wn_accumulate){.accumulate = true}));
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}

wn_status wn_mlp_backward(wn_call *c, wn_tensor *dx, bool accumulate, const wn_tensor *dy, const wn_tensor *x,
                          wn_slot gate) {
  const wn_tensor *w = &c->weights->slot[gate];
  size_t mark = wn_arena_mark(c->device->scratch);
  wn_gated g;
  wn_tensor dact;
  if (c->kept)
    g = c->kept->gated;
  else
    WN_TRY(mlp_inner(c, &g, x, gate));
  WN_TRY(wn_scratch(c, &dact, "mlp act gradient", WN_ACT, 2, c->n, w[0].dim[0], 0));
  WN_TRY(wn_call_weight_grad(c, gate + 2, dy, &g.act));
  WN_TRY(c->ops->linear_backward_input(c->device, &dact, dy, &w[2], &(wn_accumulate){0}));
  WN_TRY(c->ops->swiglu_backward(c->device, &g.gate, &g.up, &dact, &g.gate, &g.up));
  WN_TRY(wn_call_weight_grad(c, gate, &g.gate, x));
  WN_TRY(wn_call_weight_grad(c, gate + 1, &g.up, x));
  WN_TRY(c->ops->linear_backward_input(c->device, dx, &g.gate, &w[0], &(wn_accumulate){.accumulate = accumulate}));
  WN_TRY(c->ops->linear_backward_input(c->device, dx, &g.up, &w[1], &(wn_accumulate){.accumulate = true}));
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}

/* ---- experts ---- */

static wn_router_params router_constants(const wn_call *c, bool forced) {
  const wn_model_config *f = c->config;
  int32_t whole = (int32_t)c->n;
  return (wn_router_params){.n_group = f->n_group,
                            .topk_group = f->topk_group,
                            .norm_topk = f->norm_topk_prob,
                            .scale = f->routed_scaling_factor,
                            .forced = forced,
                            .rows_per_sequence = c->pass->rows_per_sequence ? c->pass->rows_per_sequence : whole,
                            .balance_coeff = c->pass->balance_coeff};
}

static wn_status route(wn_call *c, wn_routed *r, const wn_tensor *x, wn_moe_choice *choice) {
  const wn_model_config *f = c->config;
  const wn_tensor *w = c->weights->slot;
  int64_t experts = f->n_routed_experts, k = f->num_experts_per_tok;
  wn_tensor load = choice->load;
  WN_TRY(wn_state(c, &r->scores, "router scores", WN_STAT, 2, c->n, experts, 0));
  WN_TRY(wn_state(c, &r->weight, "router weight", WN_STAT, 2, c->n, k, 0));
  if (!choice->expert.data) {
    WN_ASSERT(!choice->forced, "forced experts that are absent");
    WN_TRY(wn_scratch(c, &choice->expert, "router experts", WN_INDEX, 2, c->n, k, 0));
  }
  if (!load.data) {
    WN_TRY(wn_scratch(c, &load, "router load", WN_INDEX, 1, experts, 0, 0));
    WN_TRY(c->ops->zero(c->device, &load));
  }
  wn_router_params params = router_constants(c, choice->forced);
  return c->ops->router(c->device, &r->scores, &choice->expert, &r->weight, &load,
                        choice->balance.data ? &choice->balance : NULL, x, &w[WN_P_ROUTER], &w[WN_P_ROUTER_BIAS],
                        &params);
}

/* Copies of the rows for their experts, and the room for what is between. */
static wn_status permute(wn_call *c, wn_routed *r, const wn_tensor *x, const wn_tensor *expert) {
  const wn_model_config *f = c->config;
  int64_t pairs = x->dim[0] * f->num_experts_per_tok;
  WN_TRY(wn_state(c, &r->xp, "expert rows", WN_ACT, 2, pairs, f->hidden_size, 0));
  WN_TRY(wn_state(c, &r->slot, "expert slots", WN_INDEX, 1, pairs, 0, 0));
  WN_TRY(gated_alloc(c, &r->g, pairs, f->moe_intermediate_size));
  return c->ops->moe_permute(c->device, &r->xp, &r->slot, c->model->expert_offset, x, expert, f->n_routed_experts);
}

/* Experts first .. first + count - 1, which are consecutive rows of xp: up to the down projection. */
static wn_status experts_inner(wn_call *c, const wn_routed *r, int32_t first, int32_t count) {
  const wn_layer_tensors *w = c->weights;
  const int64_t *offset = c->model->expert_offset + first;
  int64_t rows = offset[count] - offset[0];
  wn_gated g = r->g;
  WN_TRY(
      c->ops->grouped_linear(c->device, &g.gate, &r->xp, w->expert_gate + first, count, offset, &(wn_accumulate){0}));
  WN_TRY(c->ops->grouped_linear(c->device, &g.up, &r->xp, w->expert_up + first, count, offset, &(wn_accumulate){0}));
  g.gate = wn_tensor_slice(g.gate, 0, offset[0], rows);
  g.up = wn_tensor_slice(g.up, 0, offset[0], rows);
  g.act = wn_tensor_slice(g.act, 0, offset[0], rows);
  return c->ops->swiglu(c->device, &g.act, &g.gate, &g.up);
}

static wn_status experts_down(wn_call *c, wn_routed *r, int32_t first, int32_t count) {
  return c->ops->grouped_linear(c->device, &r->yp, &r->g.act, c->weights->expert_down + first, count,
                                c->model->expert_offset + first, &(wn_accumulate){0});
}

static wn_status outputs_alloc(wn_call *c, wn_routed *r) {
  return wn_state(c, &r->yp, "expert outputs", WN_ACT, 2, r->xp.dim[0], r->xp.dim[1], 0);
}

wn_status wn_moe_prefetch(const wn_layer_tensors *weights) {
  return weights->store ? wn_store_prefetch_part(weights->store, weights->layer, 1) : NULL;
}

/* All experts over the rows of xp. Where they come in parts: one part computes while the next is on its way; `again`:
 * the first part is wanted once more after the last. */
static wn_status experts_in_turn(wn_call *c, wn_routed *r, bool again) {
  const wn_layer_tensors *w = c->weights;
  int32_t experts = c->config->n_routed_experts;
  if (!w->store) {
    WN_TRY(experts_inner(c, r, 0, experts));
    return experts_down(c, r, 0, experts);
  }
  for (int32_t part = 1; part <= w->parts; part++) {
    int32_t first = (part - 1) * w->experts_a_part, left = experts - first;
    int32_t count = left < w->experts_a_part ? left : w->experts_a_part;
    WN_TRY(wn_store_acquire_part(w->store, w->layer, part, w->by_param));
    if (part < w->parts)
      WN_TRY(wn_store_prefetch_part(w->store, w->layer, part + 1));
    else if (again)
      WN_TRY(wn_store_prefetch_part(w->store, w->layer, 1));
    WN_TRY(experts_inner(c, r, first, count));
    WN_TRY(experts_down(c, r, first, count));
    WN_TRY(wn_store_release_part(w->store, w->layer, part));
  }
  return NULL;
}

static size_t offsets_bytes(const wn_call *c) {
  return ((size_t)c->config->n_routed_experts + 1) * sizeof(int64_t);
}

wn_status wn_moe_forward(wn_call *c, wn_tensor *y, const wn_tensor *x, wn_moe_choice *choice) {
  size_t mark = wn_arena_mark(c->device->scratch);
  wn_routed r;
  WN_TRY(route(c, &r, x, choice));
  for (int64_t from = 0, n; from < c->n; from += n) { /* rows do not depend on each other */
    n = c->n - from < c->moe_rows ? c->n - from : c->moe_rows;
    size_t rows_mark = wn_arena_mark(c->device->scratch);
    wn_tensor rows = wn_tensor_slice(*x, 0, from, n), out = wn_tensor_slice(*y, 0, from, n);
    wn_tensor expert = wn_tensor_slice(choice->expert, 0, from, n), weight = wn_tensor_slice(r.weight, 0, from, n);
    WN_TRY(permute(c, &r, &rows, &expert));
    WN_TRY(outputs_alloc(c, &r));
    WN_TRY(experts_in_turn(c, &r, from + n < c->n));
    WN_TRY(c->ops->moe_combine(c->device, &out, &r.yp, &r.slot, &weight));
    wn_arena_release(c->device->scratch, rows_mark);
  }
  wn_arena_release(c->device->scratch, mark);
  if (c->kept) {
    c->kept->routed = r;
    memcpy(c->kept->expert_offset, c->model->expert_offset, offsets_bytes(c));
  }
  if (!c->weights->slot[WN_P_SHARED_GATE].data) return NULL;
  return wn_mlp_forward(c, y, x, WN_P_SHARED_GATE);
}

static wn_status expert_weight_grad(wn_call *c, const wn_tensor *dw, const wn_tensor *dy, const wn_tensor *x) {
  if (!dw || !dw[0].data) return NULL;
  /* the operation's dw is an array of tensors that it adds into: views, so the array itself stays as it is */
  return c->ops->grouped_linear_backward_weight(c->device, (wn_tensor *)dw, dy, x, c->config->n_routed_experts,
                                                c->model->expert_offset);
}

/* What the forward made, up to the experts' outputs. */
static wn_status experts_again(wn_call *c, wn_routed *r, const wn_tensor *x, wn_moe_choice *choice) {
  if (c->kept) {
    *r = c->kept->routed;
    memcpy(c->model->expert_offset, c->kept->expert_offset, offsets_bytes(c));
    return NULL;
  }
  WN_TRY(route(c, r, x, choice));
  WN_TRY(permute(c, r, x, &choice->expert));
  return experts_inner(c, r, 0, c->config->n_routed_experts);
}

/* dact[n*K,F] and dweight[n,K] from dy[n,D], and the down projections' gradients. */
static wn_status experts_down_backward(wn_call *c, wn_tensor *dact, wn_tensor *dweight, const wn_tensor *dy,
                                       wn_routed *r) {
  size_t mark = wn_arena_mark(c->device->scratch);
  wn_tensor dyp;
  if (!c->kept) {
    WN_TRY(outputs_alloc(c, r));
    WN_TRY(experts_down(c, r, 0, c->config->n_routed_experts));
  }
  WN_TRY(wn_scratch(c, &dyp, "expert outputs gradient", WN_ACT, 2, r->xp.dim[0], r->xp.dim[1], 0));
  WN_TRY(c->ops->moe_combine_backward(c->device, &dyp, dweight, dy, &r->yp, &r->slot, &r->weight));
  WN_TRY(expert_weight_grad(c, c->grads ? c->grads->expert_down : NULL, &dyp, &r->g.act));
  WN_TRY(c->ops->grouped_linear_backward_input(c->device, dact, &dyp, c->weights->expert_down,
                                               c->config->n_routed_experts, c->model->expert_offset,
                                               &(wn_accumulate){0}));
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}

/* dx += through the experts' inputs; g's gate and up hold their gradients. */
static wn_status experts_inner_backward(wn_call *c, wn_tensor *dx, const wn_routed *r) {
  int32_t experts = c->config->n_routed_experts;
  const int64_t *offset = c->model->expert_offset;
  size_t mark = wn_arena_mark(c->device->scratch);
  wn_tensor dxp;
  WN_TRY(wn_scratch(c, &dxp, "expert rows gradient", WN_ACT, 2, r->xp.dim[0], r->xp.dim[1], 0));
  WN_TRY(expert_weight_grad(c, c->grads ? c->grads->expert_gate : NULL, &r->g.gate, &r->xp));
  WN_TRY(expert_weight_grad(c, c->grads ? c->grads->expert_up : NULL, &r->g.up, &r->xp));
  WN_TRY(c->ops->grouped_linear_backward_input(c->device, &dxp, &r->g.gate, c->weights->expert_gate, experts, offset,
                                               &(wn_accumulate){0}));
  WN_TRY(c->ops->grouped_linear_backward_input(c->device, &dxp, &r->g.up, c->weights->expert_up, experts, offset,
                                               &(wn_accumulate){.accumulate = true}));
  WN_TRY(c->ops->moe_permute_backward(c->device, dx, &dxp, &r->slot));
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}

wn_status wn_moe_backward(wn_call *c, wn_tensor *dx, const wn_tensor *dy, const wn_tensor *x, wn_moe_choice *choice) {
  size_t mark = wn_arena_mark(c->device->scratch);
  wn_routed r;
  wn_tensor dact, dweight;
  WN_ASSERT(!c->weights->store, "a backward through experts that come in parts");
  WN_TRY(experts_again(c, &r, x, choice));
  WN_TRY(wn_scratch(c, &dact, "expert act gradient", WN_ACT, 2, r.g.act.dim[0], r.g.act.dim[1], 0));
  WN_TRY(wn_scratch(c, &dweight, "router weight gradient", WN_STAT, 2, c->n, r.weight.dim[1], 0));
  WN_TRY(experts_down_backward(c, &dact, &dweight, dy, &r));
  WN_TRY(c->ops->swiglu_backward(c->device, &r.g.gate, &r.g.up, &dact, &r.g.gate, &r.g.up));
  WN_TRY(c->ops->zero(c->device, dx));
  WN_TRY(experts_inner_backward(c, dx, &r));
  wn_router_params params = router_constants(c, true);
  WN_TRY(c->ops->router_backward(c->device, dx, wn_call_grad(c, WN_P_ROUTER), &dweight, &r.scores, &choice->expert, x,
                                 &c->weights->slot[WN_P_ROUTER], &params));
  wn_arena_release(c->device->scratch, mark);
  if (!c->weights->slot[WN_P_SHARED_GATE].data) return NULL;
  return wn_mlp_backward(c, dx, true, dy, x, WN_P_SHARED_GATE);
}
