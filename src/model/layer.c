/* One layer, forward and backward. The backward recomputes what is not kept: first the MLP from h_mid, so that the
 * attention output's gradient is known when the attention is recomputed from h_in and delta comes out of that forward.
 */
#include "model/parts.h"

wn_status wn_scratch(wn_call *c, wn_tensor *out, const char *name, wn_role role, int32_t rank, int64_t d0, int64_t d1,
                     int64_t d2) {
  return wn_device_tensor(c->device, out, c->device->scratch, name, role, rank, d0, d1, d2, 0);
}

wn_status wn_state(wn_call *c, wn_tensor *out, const char *name, wn_role role, int32_t rank, int64_t d0, int64_t d1,
                   int64_t d2) {
  return wn_device_tensor(c->device, out, c->state, name, role, rank, d0, d1, d2, 0);
}

wn_tensor *wn_call_grad(wn_call *c, wn_slot slot) {
  return c->grads && c->grads->slot[slot].data ? &c->grads->slot[slot] : NULL;
}

wn_status wn_call_weight_grad(wn_call *c, wn_slot slot, const wn_tensor *dy, const wn_tensor *x) {
  wn_tensor *grad = wn_call_grad(c, slot);
  return grad ? c->ops->linear_backward_weight(c->device, grad, dy, x) : NULL;
}

wn_status wn_call_rope(wn_call *c, wn_tensor *x, bool interleaved, bool inverse) {
  wn_rope_params params = {.inv_freq = c->model->inv_freq, .interleaved = interleaved, .inverse = inverse};
  return c->ops->rope(c->device, x, c->rows->position, &params);
}

/* A sequence's length decides, so that the form does not depend on the micro-batch. */
static wn_attention_form form_of(const wn_model *model, const wn_pass *pass, int32_t n_keys) {
  if (pass->form != WN_FORM_AUTO) return pass->form;
  int32_t keys = pass->rows_per_sequence ? pass->rows_per_sequence : n_keys;
  return wn_model_attention_form(&model->config, model->device->head_tile, keys, pass->topk);
}

bool wn_model_keeps_attention(const wn_model *model, const wn_pass *pass, int32_t n_keys) {
  return pass->selection == WN_SELECT_DENSE || form_of(model, pass, n_keys) == WN_FORM_MASKED;
}

wn_status wn_model_keep(const wn_model *model, wn_replay *replay) {
  void *kept, *offset;
  size_t offset_bytes = ((size_t)model->config.n_routed_experts + 1) * sizeof(int64_t);
  WN_TRY(wn_arena_alloc(model->device->host, &kept, "kept layers", sizeof(wn_kept)));
  WN_TRY(wn_arena_alloc(model->device->host, &offset, "kept layers", offset_bytes));
  replay->kept = kept;
  *replay->kept = (wn_kept){.expert_offset = offset};
  return NULL;
}

static wn_call make_call(wn_model *model, int32_t layer, const wn_layer_tensors *weights, wn_layer_tensors *grads,
                         const wn_pass *pass, const wn_rows *rows, const wn_tensor *h, const wn_replay *replay) {
  const wn_model_config *f = &model->config;
  WN_ASSERT(layer >= 0 && layer < f->num_hidden_layers, "layer %d of %d", layer, f->num_hidden_layers);
  WN_ASSERT(rows->n_rows == rows->n_keys, "%d rows over %d keys", rows->n_rows, rows->n_keys);
  WN_ASSERT(h->rank == 2 && h->dim[0] == rows->n_rows && h->dim[1] == f->hidden_size,
            "hidden states [%lld, %lld] for %d rows of %d", (long long)h->dim[0], (long long)h->dim[1], rows->n_rows,
            f->hidden_size);
  WN_ASSERT(pass->selection == WN_SELECT_DENSE || pass->topk > 0, "a sparse pass with topk %d", pass->topk);
  wn_call c = {.model = model,
               .device = model->device,
               .ops = model->device->ops,
               .config = f,
               .weights = weights,
               .grads = grads,
               .pass = pass,
               .rows = rows,
               .layer = layer,
               .n = rows->n_rows,
               .moe_rows = rows->n_rows,
               .sparse = pass->selection != WN_SELECT_DENSE,
               .form = form_of(model, pass, rows->n_keys),
               .state = model->device->scratch,
               .kept = replay ? replay->kept : NULL};
  return c;
}

/* ---- attention block ---- */

static bool wanted(const wn_layer_measures *measures, size_t offset) {
  return measures && ((const wn_tensor *)((const char *)measures + offset))->data;
}
#define WANTED(measures, field) wanted((measures), offsetof(wn_layer_measures, field))

/* What the attention block computes beside the attention. */
typedef struct plan {
  bool indexer, keys, select, kl, learn;
  bool stats, scores, topk; /* measures that need the indexer */
} plan;

static plan make_plan(const wn_call *c, bool backward, bool have_selection, const wn_layer_measures *measures) {
  const wn_pass *pass = c->pass;
  plan p = {.select = c->sparse && !have_selection};
  bool indexer_trains = c->grads && c->grads->slot[WN_P_INDEX_K].data;
  p.learn = pass->indexer_grads && indexer_trains && (backward || !c->sparse);
  p.kl = p.learn || pass->indexer_kl;
  if (!backward) {
    p.stats = WANTED(measures, stats);
    p.scores = WANTED(measures, index_scores);
    p.topk = WANTED(measures, topk);
  }
  p.indexer = (p.select && pass->selection == WN_SELECT_INDEXER) || p.kl || p.stats || p.scores || p.topk;
  p.keys = !c->sparse || c->form == WN_FORM_MASKED || (p.select && pass->selection == WN_SELECT_BEST) || p.stats;
  WN_ASSERT(!p.indexer || c->config->has_indexer, "a pass that needs an indexer in a model without one");
  return p;
}

static wn_status choose(wn_call *c, wn_tensor *selection, const wn_mla *m, const wn_attention *a,
                        const wn_index_state *s) {
  wn_indexer_params indexer = wn_indexer_constants(c);
  wn_attention_params attention = {.scale = c->model->softmax_scale};
  wn_pattern_params pattern = {.seed = c->pass->seed, .layer = c->layer};
  switch (c->pass->selection) {
  case WN_SELECT_INDEXER: return c->ops->indexer_select(c->device, selection, &s->q, &s->k, &s->w, c->rows, &indexer);
  case WN_SELECT_BEST: return c->ops->select_best(c->device, selection, &m->q, &a->k, c->rows, &attention);
  case WN_SELECT_RECENT: pattern.pattern = WN_PATTERN_RECENT; break;
  case WN_SELECT_SINK: pattern.pattern = WN_PATTERN_SINK; break;
  case WN_SELECT_RANDOM: pattern.pattern = WN_PATTERN_RANDOM; break;
  case WN_SELECT_DENSE:
  case WN_N_SELECTIONS: WN_ASSERT(false, "selection %d chooses nothing", (int)c->pass->selection);
  }
  return c->ops->select_pattern(c->device, selection, c->rows, &pattern);
}

/* Everything an attention block holds while it runs. */
typedef struct block {
  plan plan;
  wn_mla mla;
  wn_attention attention;
  wn_index_state index;
  wn_tensor selection, p, kl; /* [n,k] INDEX, [n,k] STAT, [n] STAT; data NULL: absent */
} block;

static const wn_tensor *selection_of(const block *b) {
  return b->selection.data ? &b->selection : NULL;
}
static wn_tensor *p_of(block *b) {
  return b->p.data ? &b->p : NULL;
}

/* Projections, keys, selection: what forward and recompute share. */
static wn_status prepare(wn_call *c, block *b, bool backward, const wn_tensor *h_in, const wn_replay *replay,
                         const wn_layer_measures *measures) {
  bool held = replay && replay->selection.data;
  bool have = c->sparse && held && (backward || replay->force_selection);
  WN_ASSERT(!c->sparse || !replay || !replay->force_selection || held, "a forced selection that is absent");
  *b = (block){.plan = make_plan(c, backward, have, measures)};
  if (replay) {
    WN_ASSERT(!replay->o.data == !replay->lse.data, "o and lse are kept together");
    b->attention.kept = replay->o;
    b->attention.lse = replay->lse;
  }
  if (backward && c->kept) {
    b->mla = c->kept->mla;
    b->attention = c->kept->attention;
    b->index = c->kept->index;
  } else {
    WN_TRY(wn_mla_project(c, &b->mla, h_in));
  }
  if (b->plan.keys && !b->attention.up.data) WN_TRY(wn_attention_keys(c, &b->attention, &b->mla));
  if (b->plan.indexer && !b->index.q.data) WN_TRY(wn_indexer_project(c, &b->index, &b->mla));
  if (c->sparse && held)
    b->selection = replay->selection;
  else if (c->sparse)
    WN_TRY(wn_scratch(c, &b->selection, "selection", WN_INDEX, 2, c->n, c->pass->topk, 0));
  if (b->plan.select) WN_TRY(choose(c, &b->selection, &b->mla, &b->attention, &b->index));
  if (!b->plan.kl) return NULL;
  if (c->sparse) WN_TRY(wn_scratch(c, &b->p, "p", WN_STAT, 2, c->n, b->selection.dim[1], 0));
  if (WANTED(measures, kl)) {
    b->kl = measures->kl;
    return NULL;
  }
  return wn_scratch(c, &b->kl, "kl", WN_STAT, 1, c->n, 0, 0);
}

static wn_status measure(wn_call *c, const block *b, wn_layer_measures *measures) {
  const wn_index_state *s = &b->index;
  wn_indexer_params params = wn_indexer_constants(c);
  if (b->plan.scores)
    WN_TRY(c->ops->indexer_scores(c->device, &measures->index_scores, &s->q, &s->k, &s->w, c->rows, &params));
  if (b->plan.topk) WN_TRY(c->ops->indexer_select(c->device, &measures->topk, &s->q, &s->k, &s->w, c->rows, &params));
  if (!b->plan.stats) return NULL;
  WN_ASSERT(measures->sample.data && measures->picks.data, "selection statistics without sample or picks");
  return c->ops->selection_stats(c->device, &measures->stats, &measures->picks, &measures->sample,
                                 measures->picks_prev.data ? &measures->picks_prev : NULL, &s->q, &s->k, &s->w,
                                 &b->mla.q, &b->attention.k, c->rows, &params);
}

static wn_tensor flat_output(const wn_attention *a) {
  return wn_tensor_view(a->o, 2, a->o.dim[0], a->o.dim[1] * a->o.dim[2], 0, 0);
}

/* h_mid = h_in + attention(norm(h_in)) */
static wn_status attention_forward(wn_call *c, wn_tensor *h_mid, const wn_tensor *h_in, wn_replay *replay,
                                   wn_layer_measures *measures) {
  size_t mark = wn_arena_mark(c->device->scratch);
  block b;
  WN_TRY(prepare(c, &b, false, h_in, replay, measures));
  WN_TRY(wn_attention_forward(c, &b.attention, p_of(&b), &b.mla, selection_of(&b)));
  if (b.plan.kl)
    WN_TRY(wn_indexer_kl(c, &b.kl, b.plan.learn, &b.index, &b.mla, &b.attention, selection_of(&b), p_of(&b)));
  WN_TRY(measure(c, &b, measures));
  wn_tensor o = flat_output(&b.attention);
  WN_TRY(c->ops->linear(c->device, h_mid, &o, &c->weights->slot[WN_P_O], &(wn_accumulate){0}));
  if (c->kept) {
    c->kept->mla = b.mla;
    c->kept->attention = b.attention;
    c->kept->index = b.index;
  }
  if (WANTED(measures, attention)) WN_TRY(c->ops->cast(c->device, &measures->attention, h_mid));
  WN_TRY(c->ops->add(c->device, h_mid, h_mid, h_in));
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}

/* dh: gradient of h_mid on entry, of h_in on exit. */
static wn_status attention_backward(wn_call *c, wn_tensor *dh, const wn_tensor *h_in, const wn_replay *replay,
                                    const wn_layer_measures *measures) {
  const wn_model_config *f = c->config;
  int64_t heads = f->num_attention_heads, width = f->v_head_dim;
  size_t mark = wn_arena_mark(c->device->scratch);
  block b;
  wn_tensor d_o, dq, dkv;
  WN_TRY(wn_scratch(c, &d_o, "d_o", WN_ACT, 3, c->n, heads, width));
  WN_TRY(prepare(c, &b, true, h_in, replay, measures));
  WN_TRY(wn_scratch(c, &dq, "dq", WN_ACT, 3, c->n, heads, b.mla.q.dim[2]));
  WN_TRY(wn_scratch(c, &dkv, "dkv", WN_ACT, 2, c->n, b.mla.kv.dim[1], 0));
  wn_tensor d_o_flat = wn_tensor_view(d_o, 2, c->n, heads * width, 0, 0);
  WN_TRY(c->ops->linear_backward_input(c->device, &d_o_flat, dh, &c->weights->slot[WN_P_O], &(wn_accumulate){0}));
  WN_TRY(wn_attention_backward(c, &b.attention, &dq, &dkv, p_of(&b), &d_o, &b.mla, selection_of(&b)));
  wn_tensor o = flat_output(&b.attention);
  WN_TRY(wn_call_weight_grad(c, WN_P_O, dh, &o));
  if (b.plan.kl)
    WN_TRY(wn_indexer_kl(c, &b.kl, b.plan.learn, &b.index, &b.mla, &b.attention, selection_of(&b), p_of(&b)));
  WN_TRY(wn_mla_project_backward(c, dh, &dq, &dkv, &b.mla, h_in));
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}

/* ---- MLP block ---- */

static wn_status post_norm(wn_call *c, wn_tensor *x, wn_tensor *inv, const wn_tensor *h_mid) {
  WN_TRY(wn_state(c, x, "mlp input", WN_ACT, 2, c->n, c->config->hidden_size, 0));
  WN_TRY(wn_state(c, inv, "mlp input_inv", WN_STAT, 1, c->n, 0, 0));
  return c->ops->rms_norm(c->device, x, inv, h_mid, &c->weights->slot[WN_P_POST_NORM],
                          &(wn_norm_params){.eps = c->config->rms_norm_eps});
}

/* h_out = h_mid + mlp(norm(h_mid)) */
static wn_status mlp_forward(wn_call *c, wn_tensor *h_out, const wn_tensor *h_mid, wn_replay *replay,
                             const wn_layer_measures *measures) {
  size_t mark = wn_arena_mark(c->device->scratch);
  wn_tensor x, inv;
  WN_TRY(post_norm(c, &x, &inv, h_mid));
  if (c->kept) {
    c->kept->x = x;
    c->kept->x_inv = inv;
  }
  WN_TRY(c->ops->cast(c->device, h_out, h_mid));
  if (!wn_model_config_is_moe(c->config, c->layer)) {
    WN_TRY(wn_mlp_forward(c, h_out, &x, WN_P_MLP_GATE));
  } else {
    wn_moe_choice choice = {0};
    if (replay) choice = (wn_moe_choice){.expert = replay->expert, .forced = replay->force_expert};
    if (measures) {
      choice.load = measures->load;
      choice.balance = measures->balance;
    }
    WN_TRY(wn_moe_forward(c, h_out, &x, &choice));
  }
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}

/* dh: gradient of h_out on entry, of h_mid on exit. */
static wn_status mlp_backward(wn_call *c, wn_tensor *dh, const wn_tensor *h_mid, const wn_replay *replay) {
  size_t mark = wn_arena_mark(c->device->scratch);
  wn_tensor x, inv, dx;
  if (c->kept) {
    x = c->kept->x;
    inv = c->kept->x_inv;
  } else {
    WN_TRY(post_norm(c, &x, &inv, h_mid));
  }
  WN_TRY(wn_scratch(c, &dx, "mlp input gradient", WN_ACT, 2, c->n, c->config->hidden_size, 0));
  if (!wn_model_config_is_moe(c->config, c->layer)) {
    WN_TRY(wn_mlp_backward(c, &dx, false, dh, &x, WN_P_MLP_GATE));
  } else {
    wn_moe_choice choice = {0};
    if (replay) choice = (wn_moe_choice){.expert = replay->expert, .forced = replay->expert.data != NULL};
    WN_TRY(wn_moe_backward(c, &dx, dh, &x, &choice));
  }
  WN_TRY(c->ops->rms_norm_backward(c->device, dh, wn_call_grad(c, WN_P_POST_NORM), &dx, h_mid, &inv,
                                   &c->weights->slot[WN_P_POST_NORM],
                                   &(wn_norm_params){.eps = c->config->rms_norm_eps, .accumulate = true}));
  wn_arena_release(c->device->scratch, mark);
  return NULL;
}

wn_status wn_layer_forward(wn_model *model, int32_t layer, const wn_layer_tensors *weights, wn_layer_tensors *grads,
                           const wn_pass *pass, const wn_rows *rows, wn_tensor *h_out, wn_tensor *h_mid,
                           const wn_tensor *h_in, wn_replay *replay, wn_layer_measures *measures) {
  wn_call c = make_call(model, layer, weights, grads, pass, rows, h_in, replay);
  WN_ASSERT(!c.kept || h_mid, "layer %d is kept for a backward without h_mid", layer);
  if (c.kept) c.state = model->device->stash;
  /* a backward takes all rows at once, and a product of fewer may round otherwise: what it computes again must be what
     the forward made */
  if (!h_mid) c.moe_rows = model->moe_rows;
  size_t mark = wn_arena_mark(model->device->scratch);
  wn_status status = NULL;
  wn_tensor mid;
  WN_TRY_GOTO(status, end, wn_moe_prefetch(weights)); /* it travels while the attention computes */
  if (h_mid)
    mid = *h_mid;
  else
    WN_TRY_GOTO(status, end, wn_scratch(&c, &mid, "h_mid", WN_ACT, 2, c.n, model->config.hidden_size, 0));
  WN_TRY_GOTO(status, end, attention_forward(&c, &mid, h_in, replay, measures));
  WN_TRY_GOTO(status, end, mlp_forward(&c, h_out, &mid, replay, measures));
end:
  wn_arena_release(model->device->scratch, mark);
  return status;
}

wn_status wn_layer_backward(wn_model *model, int32_t layer, const wn_layer_tensors *weights, wn_layer_tensors *grads,
                            const wn_pass *pass, const wn_rows *rows, wn_tensor *dh, const wn_tensor *h_in,
                            const wn_tensor *h_mid, wn_replay *replay, wn_layer_measures *measures) {
  wn_call c = make_call(model, layer, weights, grads, pass, rows, h_in, replay);
  WN_ASSERT(h_mid && wn_tensor_same_shape(h_mid, h_in) && wn_tensor_same_shape(dh, h_in), "layer %d's h_mid, dh",
            layer);
  WN_ASSERT(wn_call_grad(&c, WN_P_INPUT_NORM), "a backward is for a base that trains");
  size_t mark = wn_arena_mark(model->device->scratch);
  wn_status status = NULL;
  WN_TRY_GOTO(status, end, mlp_backward(&c, dh, h_mid, replay));
  WN_TRY_GOTO(status, end, attention_backward(&c, dh, h_in, replay, measures));
end:
  wn_arena_release(model->device->scratch, mark);
  return status;
}
