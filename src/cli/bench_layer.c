/* `winnow bench layer`: one MoE layer of the given widths with random weights, as a stage runs it. Stage 1: dense
 * forward and the indexer's KL with its gradients; stage 2: sparse forward, then backward with recomputation. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/bench.h"
#include "kernels/cuda/cuda.h"
#include "model/flops.h"
#include "model/model.h"

typedef struct layer_bench {
  wn_bench *b;
  wn_model *model;
  wn_tensor *by_param, *grads_by_param;
  wn_layer_tensors weights, grads;
  wn_pass pass;
  wn_tensor h, mid, out, dh, d_out, kl; /* d_out: what dh comes in as */
  wn_replay replay;
  bool adapt; /* stage 2 */
} layer_bench;

static wn_model_config config_of(const wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  int32_t groups = s->experts % 8 == 0 && s->experts >= 16 ? 8 : 1;
  return (wn_model_config){.vocab_size = (int32_t)s->vocab,
                           .hidden_size = (int32_t)s->hidden,
                           .intermediate_size = (int32_t)s->expert_width,
                           .moe_intermediate_size = (int32_t)s->expert_width,
                           .num_hidden_layers = 1,
                           .num_attention_heads = (int32_t)s->heads,
                           .n_routed_experts = (int32_t)s->experts,
                           .n_shared_experts = 1,
                           .num_experts_per_tok = (int32_t)s->experts_a_token,
                           .n_group = groups,
                           .topk_group = groups > 1 ? groups / 2 : 1,
                           .norm_topk_prob = true,
                           .routed_scaling_factor = 2.5,
                           .q_lora_rank = (int32_t)s->q_latent,
                           .kv_lora_rank = (int32_t)s->latent,
                           .qk_nope_head_dim = (int32_t)s->nope,
                           .qk_rope_head_dim = (int32_t)s->rope,
                           .v_head_dim = (int32_t)s->v,
                           .has_indexer = true,
                           .index_n_heads = (int32_t)s->index_heads,
                           .index_head_dim = (int32_t)s->index_width,
                           .index_topk = (int32_t)s->topk,
                           .rms_norm_eps = 1e-6,
                           .rope_theta = 10000,
                           .initializer_range = 0.02,
                           .max_position_embeddings = 163840,
                           .bos_token_id = -1,
                           .eos_token_id = -1};
}

/* Random matrices whose products keep the size of what they multiply, random norms, no router bias, so that experts get
 * about the same; and a place for the gradient of what trains. */
static wn_status make_weights(layer_bench *l) {
  wn_bench *b = l->b;
  wn_device *device = b->device;
  const wn_param_table *table = &l->model->table;
  for (int32_t i = table->first[1]; i < table->first[2]; i++) {
    const wn_param *p = &table->params[i];
    wn_tensor *w = &l->by_param[i], *g = &l->grads_by_param[i];
    WN_TRY(
        wn_device_tensor(device, w, device->weights, "weights", p->role, p->rank, p->dim[0], p->dim[1], p->dim[2], 0));
    double deviation = p->slot == WN_P_ROUTER_BIAS ? 0 : p->rank == 1 ? 1 : 1 / sqrt((double)p->dim[1]);
    WN_TRY(wn_bench_fill(b, w, deviation));
    if (!wn_kind_trains(p->kind)) continue;
    WN_TRY(wn_device_tensor(device, g, device->weights, "gradients", WN_WGRAD, p->rank, p->dim[0], p->dim[1], p->dim[2],
                            0));
    WN_TRY(b->ops->zero(device, g));
  }
  wn_layer_bind(&l->weights, table, 0, l->by_param);
  wn_layer_bind(&l->grads, table, 0, l->grads_by_param);
  return NULL;
}

static wn_status make_states(layer_bench *l) {
  wn_bench *b = l->b;
  wn_device *device = b->device;
  int64_t n = b->s.seq, D = b->s.hidden;
  wn_tensor *hidden[] = {&l->h, &l->out, &l->mid, &l->dh, &l->d_out};
  for (int i = 0; i < (l->adapt ? 5 : 2); i++)
    WN_TRY(wn_device_tensor(device, hidden[i], device->stash, "hidden states", WN_ACT, 2, n, D, 0, 0));
  WN_TRY(wn_device_tensor(device, &l->kl, device->stash, "kl", WN_STAT, 1, n, 0, 0, 0));
  WN_TRY(wn_bench_fill(b, &l->h, 1));
  WN_TRY(wn_bench_poison(b, &l->out));
  WN_TRY(wn_bench_poison(b, &l->kl));
  if (!l->adapt) return NULL;
  WN_TRY(wn_bench_fill(b, &l->d_out, 1e-3));
  WN_TRY(wn_device_tensor(device, &l->replay.expert, device->stash, "expert replay", WN_INDEX, 2, n,
                          b->s.experts_a_token, 0, 0));
  WN_TRY(wn_device_tensor(device, &l->replay.selection, device->stash, "selection replay", WN_INDEX, 2, n, b->s.topk, 0,
                          0));
  if (!wn_model_keeps_attention(l->model, &l->pass, (int32_t)n)) return NULL;
  WN_TRY(
      wn_device_tensor(device, &l->replay.o, device->stash, "attention outputs", WN_STAT, 3, n, b->s.heads, b->s.v, 0));
  return wn_device_tensor(device, &l->replay.lse, device->stash, "attention log-sums", WN_STAT, 2, n, b->s.heads, 0, 0);
}

/* ---- what a step of the stage runs of this layer for one sequence ---- */

static wn_status warmup_forward(wn_bench *b, void *context) {
  layer_bench *l = context;
  wn_layer_measures measures = {.kl = l->kl};
  return wn_layer_forward(l->model, 0, &l->weights, &l->grads, &l->pass, &b->rows, &l->out, NULL, &l->h, NULL,
                          &measures);
}

static wn_status adapt_forward(wn_bench *b, void *context) {
  layer_bench *l = context;
  wn_layer_measures measures = {0};
  wn_pass pass = l->pass;
  pass.indexer_kl = pass.indexer_grads = false; /* both follow the attention's backward */
  return wn_layer_forward(l->model, 0, &l->weights, NULL, &pass, &b->rows, &l->out, &l->mid, &l->h, &l->replay,
                          &measures);
}

/* After a forward. dh comes in anew each time. */
static wn_status adapt_backward(wn_bench *b, void *context) {
  layer_bench *l = context;
  wn_layer_measures measures = {.kl = l->kl};
  WN_TRY(b->ops->cast(b->device, &l->dh, &l->d_out));
  return wn_layer_backward(l->model, 0, &l->weights, &l->grads, &l->pass, &b->rows, &l->dh, &l->h, &l->mid, &l->replay,
                           &measures);
}

/* ---- looking ---- */

static wn_status all_finite(wn_bench *b, const char *what, const wn_tensor *t) {
  int64_t bad;
  WN_TRY(wn_bench_not_finite(b, &bad, t));
  if (bad == 0) return NULL;
  return WN_FAIL(WN_E_CHECK, "%lld elements of %s were not written or are not finite", (long long)bad, what);
}

static wn_status check(layer_bench *l) {
  wn_bench *b = l->b;
  const wn_param_table *table = &l->model->table;
  WN_TRY(all_finite(b, "the hidden states", &l->out));
  WN_TRY(all_finite(b, "the KL", &l->kl));
  if (l->adapt) WN_TRY(all_finite(b, "the hidden states' gradient", &l->dh));
  for (int32_t i = table->first[1]; i < table->first[2]; i++) {
    wn_tensor *g = &l->grads_by_param[i];
    double sum;
    int64_t bad;
    if (!g->data) continue;
    WN_TRY(b->ops->sum_squares(b->device, &sum, &bad, g, 1));
    /* an expert that no token came to has no gradient */
    if (bad || (sum == 0 && table->params[i].expert < 0))
      return WN_FAIL(WN_E_CHECK, "the gradient of %s %s", table->params[i].hf_name,
                     bad ? "is not finite everywhere" : "is zero");
  }
  return NULL;
}

static double median(const double *x, int32_t n) {
  return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

static wn_status report(layer_bench *l, const double *forward, int32_t n, const double *backward, int32_t n_backward,
                        const char *csv) {
  const wn_bench *b = l->b;
  wn_device *device = b->device;
  size_t used = 0, arenas, other;
  if (device->kind == WN_CUDA) WN_TRY(wn_cuda_memory(device, &used, &arenas, &other));
  const wn_flops_work work = {.rows = (double)b->s.seq,
                              .visible_pairs = b->pairs,
                              .selected_pairs = l->adapt ? b->picked : 0,
                              .backward_base = l->adapt,
                              .indexer = true};
  bool both = l->adapt;
  double flops = wn_flops(&l->model->config, &work), back = both ? median(backward, n_backward) : (double)NAN;
  double total = median(forward, n) + (both ? back : 0), rate = flops / total;
  double limit = device->kind == WN_CUDA ? WN_HOPPER_BF16_FLOPS : b->product_rate;
  const wn_bench_cell cells[] = {
      {"stage", NULL, l->adapt ? 2 : 1},
      {"seq", NULL, (double)b->s.seq},
      {"document", NULL, (double)b->s.document},
      {"experts", NULL, (double)b->s.experts},
      {"repeats", NULL, n},
      {"median_ms", NULL, total * 1e3},
      {"min_ms", NULL, (forward[0] + (both ? backward[0] : 0)) * 1e3},
      {"max_ms", NULL, (forward[n - 1] + (both ? backward[n_backward - 1] : 0)) * 1e3},
      {"forward_ms", NULL, median(forward, n) * 1e3},
      {"backward_ms", NULL, back * 1e3},
      {"work", NULL, flops},
      {"rate", NULL, rate * 1e-12},
      {"unit", "TFLOP/s", 0},
      {"limit_pct", NULL, 100 * rate / limit},
      {"cublas_tflops", NULL, b->product_rate * 1e-12},
      {"weights_bytes", NULL, (double)wn_arena_peak_bytes(device->weights)},
      {"stash_bytes", NULL, (double)wn_arena_peak_bytes(device->stash)},
      {"scratch_bytes", NULL, (double)wn_arena_peak_bytes(device->scratch)},
      {"device_bytes", NULL, used ? (double)used : (double)NAN},
  };
  return wn_bench_row(cells, (int32_t)(sizeof cells / sizeof *cells), true, csv);
}

static wn_status measure(layer_bench *l, const char *csv, bool memory) {
  wn_bench *b = l->b;
  double *forward, *backward = NULL;
  int32_t n, n_backward = 0;
  WN_TRY(make_weights(l));
  WN_TRY(make_states(l));
  WN_TRY(wn_bench_causal(b));
  wn_arena_reset_peak(b->device->stash);
  wn_arena_reset_peak(b->device->scratch);
  WN_TRY(wn_bench_time(b, l->adapt ? adapt_forward : warmup_forward, l, &forward, &n));
  if (l->adapt) WN_TRY(wn_bench_time(b, adapt_backward, l, &backward, &n_backward));
  wn_status status = report(l, forward, n, backward, n_backward, csv);
  if (!status && memory) wn_arena_print(b->device->scratch, stderr);
  return status ? status : check(l);
}

wn_status wn_bench_layer(wn_bench *b, int32_t stage, const char *csv, bool memory) {
  const wn_model_config config = config_of(b);
  layer_bench l = {.b = b, .adapt = stage == 2};
  wn_status status = NULL;
  if (b->s.rows != b->s.seq) return WN_FAIL(WN_E_USAGE, "a layer's rows are its keys: no --rows here");
  WN_TRY(wn_model_create(
      &l.model, b->device, &config,
      (wn_param_settings){.train_base = l.adapt, .train_indexer = true, .file_dtype = b->device->dtype_of[WN_ACT]}));
  l.pass = (wn_pass){.selection = l.adapt ? WN_SELECT_INDEXER : WN_SELECT_DENSE,
                     .topk = (int32_t)b->s.topk,
                     .indexer_kl = true,
                     .indexer_grads = true,
                     .kl_coeff = 1 / (double)b->s.seq,
                     .rows_per_sequence = (int32_t)b->s.seq,
                     .balance_coeff = l.adapt ? 1e-4 : 0};
  l.by_param = calloc((size_t)l.model->table.n, sizeof *l.by_param);
  l.grads_by_param = calloc((size_t)l.model->table.n, sizeof *l.grads_by_param);
  if (!l.by_param || !l.grads_by_param)
    status = WN_FAIL(WN_E_MEMORY, "no memory for a table of %d parameters", l.model->table.n);
  else
    status = measure(&l, csv, memory);
  free(l.by_param);
  free(l.grads_by_param);
  wn_model_free(l.model);
  return status;
}
