/* The gated MLP, and the mixture of experts with its shared experts (DeepSeek-V3 report, 2.1.2). Backwards recompute
 * from the normed input x. */
#include "model/parts.h"

/* ---- gated MLP: y += (silu(x Wg^T) * x Wu^T) Wd^T ---- */

typedef struct gated {
  wn_tensor gate, up, act;
} gated; /* [rows,F] each */

static wn_status gated_alloc(wn_call *c, gated *g, int64_t rows, int64_t width) {
  WN_TRY(wn_scratch(c, &g->gate, "mlp gate", WN_ACT, 2, rows, width, 0));
  WN_TRY(wn_scratch(c, &g->up, "mlp up", WN_ACT, 2, rows, width, 0));
  return wn_scratch(c, &g->act, "mlp act", WN_ACT, 2, rows, width, 0);
}

static wn_status mlp_inner(wn_call *c, gated *g, const wn_tensor *x, wn_slot gate) {
  const wn_tensor *w = &c->weights->slot[gate];
  WN_TRY(gated_alloc(c, g, c->n, w[0].dim[0]));
  WN_TRY(c->ops->linear(c->device, &g->gate, x, &w[0], &(wn_accumulate){0}));
  WN_TRY(c->ops->linear(c->device, &g->up, x, &w[1], &(wn_accumulate){0}));
  return c->ops->swiglu(c->device, &g->act, &g->gate, &g->up);
}

wn_status wn_mlp_forward(wn_call *c, wn_tensor *y, const wn_tensor *x, wn_slot gate) {
  size_t mark = wn_arena_mark(c->device->scratch);
  gated g;
  WN_TRY(mlp_inner(c, &g, x, gate));
  WN_TRY(c->ops->linear(c->device, y, &g.act, &c->weights->slot[gate + 2], &(wn_accumulate){.accumulate = true}));
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}

wn_status wn_mlp_backward(wn_call *c, wn_tensor *dx, bool accumulate, const wn_tensor *dy, const wn_tensor *x,
                          wn_slot gate) {
  const wn_tensor *w = &c->weights->slot[gate];
  size_t mark = wn_arena_mark(c->device->scratch);
  gated g;
  wn_tensor dact;
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

typedef struct routed {
  wn_tensor scores, weight; /* [n,E], [n,K] STAT */
  wn_tensor xp, slot;       /* [n*K,D] rows sorted by expert; [n*K] INDEX */
  gated g;                  /* [n*K,F] */
} routed;

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

static wn_status route(wn_call *c, routed *r, const wn_tensor *x, wn_moe_choice *choice) {
  const wn_model_config *f = c->config;
  const wn_tensor *w = c->weights->slot;
  int64_t experts = f->n_routed_experts, k = f->num_experts_per_tok;
  wn_tensor load = choice->load;
  WN_TRY(wn_scratch(c, &r->scores, "router scores", WN_STAT, 2, c->n, experts, 0));
  WN_TRY(wn_scratch(c, &r->weight, "router weight", WN_STAT, 2, c->n, k, 0));
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

/* Everything up to the experts' down projection. */
static wn_status experts_inner(wn_call *c, routed *r, const wn_tensor *x, wn_moe_choice *choice) {
  const wn_model_config *f = c->config;
  int64_t pairs = c->n * f->num_experts_per_tok, *offset = c->model->expert_offset;
  WN_TRY(route(c, r, x, choice));
  WN_TRY(wn_scratch(c, &r->xp, "expert rows", WN_ACT, 2, pairs, f->hidden_size, 0));
  WN_TRY(wn_scratch(c, &r->slot, "expert slots", WN_INDEX, 1, pairs, 0, 0));
  WN_TRY(gated_alloc(c, &r->g, pairs, f->moe_intermediate_size));
  WN_TRY(c->ops->moe_permute(c->device, &r->xp, &r->slot, offset, x, &choice->expert, f->n_routed_experts));
  WN_TRY(c->ops->grouped_linear(c->device, &r->g.gate, &r->xp, c->weights->expert_gate, f->n_routed_experts, offset,
                                &(wn_accumulate){0}));
  WN_TRY(c->ops->grouped_linear(c->device, &r->g.up, &r->xp, c->weights->expert_up, f->n_routed_experts, offset,
                                &(wn_accumulate){0}));
  return c->ops->swiglu(c->device, &r->g.act, &r->g.gate, &r->g.up);
}

static wn_status experts_down(wn_call *c, wn_tensor *yp, const routed *r) {
  WN_TRY(wn_scratch(c, yp, "expert outputs", WN_ACT, 2, r->xp.dim[0], r->xp.dim[1], 0));
  return c->ops->grouped_linear(c->device, yp, &r->g.act, c->weights->expert_down, c->config->n_routed_experts,
                                c->model->expert_offset, &(wn_accumulate){0});
}

wn_status wn_moe_forward(wn_call *c, wn_tensor *y, const wn_tensor *x, wn_moe_choice *choice) {
  size_t mark = wn_arena_mark(c->device->scratch);
  routed r;
  wn_tensor yp;
  WN_TRY(experts_inner(c, &r, x, choice));
  WN_TRY(experts_down(c, &yp, &r));
  WN_TRY(c->ops->moe_combine(c->device, y, &yp, &r.slot, &r.weight));
  wn_arena_release(c->device->scratch, mark);
  if (!c->weights->slot[WN_P_SHARED_GATE].data) return NULL;
  return wn_mlp_forward(c, y, x, WN_P_SHARED_GATE);
}

static wn_status expert_weight_grad(wn_call *c, const wn_tensor *dw, const wn_tensor *dy, const wn_tensor *x) {
  if (!dw || !dw[0].data) return NULL;
  /* the operation's dw is an array of tensors that it adds into: views, so the array itself stays as it is */
  return c->ops->grouped_linear_backward_weight(c->device, (wn_tensor *)dw, dy, x, c->config->n_routed_experts,
                                                c->model->expert_offset);
}

/* dact[n*K,F] and dweight[n,K] from dy[n,D], and the down projections' gradients. */
static wn_status experts_down_backward(wn_call *c, wn_tensor *dact, wn_tensor *dweight, const wn_tensor *dy,
                                       const routed *r) {
  size_t mark = wn_arena_mark(c->device->scratch);
  wn_tensor yp, dyp;
  WN_TRY(experts_down(c, &yp, r));
  WN_TRY(wn_scratch(c, &dyp, "expert outputs gradient", WN_ACT, 2, yp.dim[0], yp.dim[1], 0));
  WN_TRY(c->ops->moe_combine_backward(c->device, &dyp, dweight, dy, &yp, &r->slot, &r->weight));
  WN_TRY(expert_weight_grad(c, c->grads ? c->grads->expert_down : NULL, &dyp, &r->g.act));
  WN_TRY(c->ops->grouped_linear_backward_input(c->device, dact, &dyp, c->weights->expert_down,
                                               c->config->n_routed_experts, c->model->expert_offset,
                                               &(wn_accumulate){0}));
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}

/* dx += through the experts' inputs; g's gate and up hold their gradients. */
static wn_status experts_inner_backward(wn_call *c, wn_tensor *dx, const routed *r) {
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
  routed r;
  wn_tensor dact, dweight;
  WN_TRY(experts_inner(c, &r, x, choice));
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
