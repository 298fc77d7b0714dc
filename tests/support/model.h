/* A whole small model for tests: random weights (every norm, bias and scale too), gradients, and passes over packed
 * documents, layer by layer, with everything a pass leaves behind kept for the test to look at. Lives in the device's
 * stash; free the device and it is gone. */
#ifndef WN_TEST_MODEL_H
#define WN_TEST_MODEL_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model/model.h"
#include "support/cpu.h"

enum { WN_TEST_LAYERS = 4, WN_TEST_DOCUMENTS = 8 };

/* Widths differ from each other, so that a swap of two shows. */
static inline wn_model_config wn_test_config(void) {
  return (wn_model_config){.vocab_size = 23,
                           .hidden_size = 20,
                           .intermediate_size = 13,
                           .moe_intermediate_size = 5,
                           .num_hidden_layers = 3,
                           .first_k_dense_replace = 1,
                           .num_attention_heads = 3,
                           .n_routed_experts = 8,
                           .n_shared_experts = 2,
                           .num_experts_per_tok = 3,
                           .n_group = 4,
                           .topk_group = 2,
                           .norm_topk_prob = true,
                           .routed_scaling_factor = 2.5,
                           .q_lora_rank = 12,
                           .kv_lora_rank = 9,
                           .qk_nope_head_dim = 6,
                           .qk_rope_head_dim = 4,
                           .v_head_dim = 7,
                           .has_indexer = true,
                           .index_n_heads = 4,
                           .index_head_dim = 10,
                           .index_topk = 5,
                           .rms_norm_eps = 1e-6,
                           .rope_theta = 10000,
                           .initializer_range = 0.02,
                           .max_position_embeddings = 640,
                           .yarn = true,
                           .rope_factor = 40,
                           .beta_fast = 32,
                           .beta_slow = 1,
                           .mscale = 1,
                           .mscale_all_dim = 1,
                           .original_max_position_embeddings = 16,
                           .bos_token_id = 0,
                           .eos_token_id = 1};
}

typedef struct wn_test_model {
  wn_device *device;
  wn_model *model;
  wn_tensor *weights, *grads;                                                  /* [table.n] */
  wn_layer_tensors weight_of[WN_TEST_LAYERS + 2], grad_of[WN_TEST_LAYERS + 2]; /* [layer + 1] */
} wn_test_model;

static inline wn_tensor wn_test_role(wn_device *d, wn_role role, int32_t rank, int64_t d0, int64_t d1, int64_t d2) {
  wn_tensor t;
  OK(wn_device_tensor(d, &t, d->stash, "test", role, rank, d0, d1, d2, 0));
  OK(d->ops->zero(d, &t));
  return t;
}

static inline void wn_test_model_bind(wn_test_model *t) {
  for (int32_t layer = -1; layer <= t->model->config.num_hidden_layers; layer++) {
    wn_layer_bind(&t->weight_of[layer + 1], &t->model->table, layer, t->weights);
    wn_layer_bind(&t->grad_of[layer + 1], &t->model->table, layer, t->grads);
  }
}

/* Everything trains. Weights and gradients are zero. */
static inline wn_test_model wn_test_model_create(wn_device *d, const wn_model_config *config) {
  wn_test_model t = {.device = d};
  assert_true(config->num_hidden_layers <= WN_TEST_LAYERS);
  OK(wn_model_create(&t.model, d, config,
                     (wn_param_settings){.train_base = true, .train_indexer = true, .file_dtype = WN_F32}));
  int32_t n = t.model->table.n;
  t.weights = calloc((size_t)n, sizeof *t.weights);
  t.grads = calloc((size_t)n, sizeof *t.grads);
  assert_true(t.weights && t.grads);
  for (int32_t i = 0; i < n; i++) {
    const wn_param *p = &t.model->table.params[i];
    t.weights[i] = wn_test_role(d, WN_ACT, p->rank, p->dim[0], p->dim[1], p->dim[2]);
    if (p->kind == WN_BASE || p->kind == WN_INDEXER)
      t.grads[i] = wn_test_role(d, WN_WGRAD, p->rank, p->dim[0], p->dim[1], p->dim[2]);
  }
  wn_test_model_bind(&t);
  return t;
}

static inline void wn_test_model_free(wn_test_model *t) {
  wn_model_free(t->model);
  free(t->weights);
  free(t->grads);
}

/* gain: a matrix's deviation times the root of its inputs. Norms lie around 1, biases around 0, all of them random. */
static inline void wn_test_model_fill(wn_test_model *t, uint64_t seed, double gain) {
  for (int32_t i = 0; i < t->model->table.n; i++) {
    const wn_param *p = &t->model->table.params[i];
    uint64_t own = seed * 1000003 + (uint64_t)i;
    bool bias = p->slot == WN_P_ROUTER_BIAS || p->slot == WN_P_INDEX_K_NORM_BIAS;
    if (p->slot == WN_P_EMBED)
      wn_test_fill(&t->weights[i], own, gain, 0);
    else if (p->rank == 2)
      wn_test_fill(&t->weights[i], own, gain / sqrt((double)p->dim[1]), 0);
    else
      wn_test_fill(&t->weights[i], own, 0.3, bias ? 0 : 1);
  }
}

static inline void wn_test_model_zero_grads(wn_test_model *t) {
  for (int32_t i = 0; i < t->model->table.n; i++)
    if (t->grads[i].data) OK(t->device->ops->zero(t->device, &t->grads[i]));
}

/* Documents of these lengths, end to end; `sequence` rows to a sequence, over which positions run. */
typedef struct wn_test_text {
  wn_rows rows;
  wn_tensor tokens, target; /* [n] INDEX; target -1 at a document's last row */
  wn_tensor weight;         /* [n] STAT, random */
  int32_t sequence;
} wn_test_text;

static inline wn_test_text wn_test_text_create(wn_device *d, int32_t vocab, uint64_t seed, int32_t sequence,
                                               const int32_t *lengths, int32_t n_documents) {
  int32_t n = 0;
  for (int32_t i = 0; i < n_documents; i++) n += lengths[i];
  wn_test_text t = {.sequence = sequence};
  wn_tensor first = wn_test_role(d, WN_INDEX, 1, n, 0, 0), last = wn_test_role(d, WN_INDEX, 1, n, 0, 0);
  wn_tensor position = wn_test_role(d, WN_INDEX, 1, n, 0, 0);
  t.tokens = wn_test_role(d, WN_INDEX, 1, n, 0, 0);
  t.target = wn_test_role(d, WN_INDEX, 1, n, 0, 0);
  t.weight = wn_test_role(d, WN_STAT, 1, n, 0, 0);
  for (int32_t i = 0; i < n; i++)
    wn_test_set(&t.tokens, i, (double)wn_rng_below(seed, WN_RNG_TEST, (uint64_t)i, (uint64_t)vocab));
  for (int32_t i = 0, row = 0; i < n_documents; i++) {
    for (int32_t start = row; row < start + lengths[i]; row++) {
      wn_test_set(&first, row, start);
      wn_test_set(&last, row, row);
      wn_test_set(&position, row, row % sequence);
      wn_test_set(&t.target, row, row + 1 < start + lengths[i] ? wn_test_get(&t.tokens, row + 1) : -1);
      wn_test_set(&t.weight, row, 0.5 + wn_rng_uniform(seed + 1, WN_RNG_TEST, (uint64_t)row));
    }
  }
  t.rows =
      (wn_rows){.n_rows = n, .n_keys = n, .first_key = first.data, .last_key = last.data, .position = position.data};
  return t;
}

/* What a pass leaves behind. */
typedef struct wn_test_run {
  wn_tensor h[WN_TEST_LAYERS + 1], h_mid[WN_TEST_LAYERS]; /* [n,D] */
  wn_replay replay[WN_TEST_LAYERS];
  wn_layer_measures measures[WN_TEST_LAYERS]; /* kl, load, balance */
  wn_tensor logp, dh;
} wn_test_run;

static inline wn_test_run wn_test_run_create(const wn_test_model *t, int32_t n, int32_t topk) {
  const wn_model_config *f = &t->model->config;
  wn_device *d = t->device;
  wn_test_run run = {0};
  for (int32_t l = 0; l <= f->num_hidden_layers; l++) run.h[l] = wn_test_role(d, WN_ACT, 2, n, f->hidden_size, 0);
  for (int32_t l = 0; l < f->num_hidden_layers; l++) {
    run.h_mid[l] = wn_test_role(d, WN_ACT, 2, n, f->hidden_size, 0);
    run.replay[l].expert = wn_test_role(d, WN_INDEX, 2, n, f->num_experts_per_tok, 0);
    run.replay[l].selection = wn_test_role(d, WN_INDEX, 2, n, topk, 0);
    run.measures[l].load = wn_test_role(d, WN_INDEX, 1, f->n_routed_experts, 0, 0);
    run.measures[l].balance = wn_test_role(d, WN_STAT, 1, 1, 0, 0);
    run.measures[l].kl = wn_test_role(d, WN_STAT, 1, n, 0, 0);
  }
  run.logp = wn_test_role(d, WN_STAT, 1, n, 0, 0);
  run.dh = wn_test_role(d, WN_ACT, 2, n, f->hidden_size, 0);
  return run;
}

static inline void wn_test_force(wn_test_run *run, bool force) {
  for (int32_t l = 0; l < WN_TEST_LAYERS; l++) run->replay[l].force_expert = run->replay[l].force_selection = force;
}

/* Forward through all layers and the head. With `learn` the gradients are given to the layers (a dense pass with
 * indexer_grads adds to the indexer's). */
static inline void wn_test_forward(wn_test_model *t, wn_test_run *run, const wn_test_text *text, const wn_pass *pass,
                                   bool learn) {
  int32_t layers = t->model->config.num_hidden_layers;
  OK(wn_model_embed(t->model, &t->weight_of[0], &run->h[0], &text->tokens));
  for (int32_t l = 0; l < layers; l++) {
    OK(t->device->ops->zero(t->device, &run->measures[l].load));
    OK(t->device->ops->zero(t->device, &run->measures[l].balance));
    OK(wn_layer_forward(t->model, l, &t->weight_of[l + 1], learn ? &t->grad_of[l + 1] : NULL, pass, &text->rows,
                        &run->h[l + 1], &run->h_mid[l], &run->h[l], &run->replay[l], &run->measures[l]));
  }
  OK(wn_model_head(t->model, &t->weight_of[layers + 1], NULL, &run->logp, NULL, &run->h[layers], &text->target, NULL));
}

/* Backward after it; gradients are added. */
static inline void wn_test_backward(wn_test_model *t, wn_test_run *run, const wn_test_text *text, const wn_pass *pass) {
  int32_t layers = t->model->config.num_hidden_layers;
  OK(wn_model_head(t->model, &t->weight_of[layers + 1], &t->grad_of[layers + 1], &run->logp, &run->dh, &run->h[layers],
                   &text->target, &text->weight));
  for (int32_t l = layers - 1; l >= 0; l--)
    OK(wn_layer_backward(t->model, l, &t->weight_of[l + 1], &t->grad_of[l + 1], pass, &text->rows, &run->dh, &run->h[l],
                         &run->h_mid[l], &run->replay[l], &run->measures[l]));
  OK(wn_model_embed_backward(t->model, &t->grad_of[0], &run->dh, &text->tokens));
}

/* -sum weight logp + balance_coeff * sum over layers of the balance sums */
static inline double wn_test_token_loss(const wn_test_model *t, const wn_test_run *run, const wn_test_text *text,
                                        const wn_pass *pass) {
  double loss = 0;
  for (int32_t i = 0; i < text->rows.n_rows; i++)
    if (wn_test_get(&text->target, i) >= 0) loss -= wn_test_get(&text->weight, i) * wn_test_get(&run->logp, i);
  for (int32_t l = 0; l < t->model->config.num_hidden_layers; l++)
    if (wn_model_config_is_moe(&t->model->config, l))
      loss += pass->balance_coeff * wn_test_get(&run->measures[l].balance, 0);
  return loss;
}

/* kl_coeff * sum over layers and rows */
static inline double wn_test_kl_loss(const wn_test_model *t, const wn_test_run *run, const wn_pass *pass) {
  double loss = 0;
  for (int32_t l = 0; l < t->model->config.num_hidden_layers; l++)
    for (int64_t i = 0; i < run->measures[l].kl.dim[0]; i++)
      loss += pass->kl_coeff * wn_test_get(&run->measures[l].kl, i);
  return loss;
}

static inline bool wn_test_same_bits(const wn_tensor *a, const wn_tensor *b) {
  assert_true(wn_tensor_same_shape(a, b) && wn_tensor_dense(a) && wn_tensor_dense(b));
  return memcmp(a->data, b->data, (size_t)wn_tensor_bytes(a)) == 0;
}

static inline double wn_test_largest(const wn_tensor *t) {
  double largest = 0;
  for (int64_t i = 0; i < wn_tensor_count(t); i++) {
    double size = fabs(wn_test_get(t, i));
    if (isnan(size)) return size;
    largest = fmax(largest, size);
  }
  return largest;
}

#endif
