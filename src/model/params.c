/* The parameter table: names as Hugging Face has them, shapes from the configuration, order by (layer, slot, expert).
 */
#include "model/params.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/rng.h"

enum { MOST_PARAMS = 1 << 22 }; /* 1 GB of table, sixty times V3.1's: a config.json beyond that lies */

static const char *const slot_names[WN_N_SLOTS] = {
    [WN_P_EMBED] = "model.embed_tokens.weight",
    [WN_P_INPUT_NORM] = "input_layernorm.weight",
    [WN_P_Q] = "self_attn.q_proj.weight",
    [WN_P_Q_A] = "self_attn.q_a_proj.weight",
    [WN_P_Q_A_NORM] = "self_attn.q_a_layernorm.weight",
    [WN_P_Q_B] = "self_attn.q_b_proj.weight",
    [WN_P_KV_A] = "self_attn.kv_a_proj_with_mqa.weight",
    [WN_P_KV_A_NORM] = "self_attn.kv_a_layernorm.weight",
    [WN_P_KV_B] = "self_attn.kv_b_proj.weight",
    [WN_P_O] = "self_attn.o_proj.weight",
    [WN_P_POST_NORM] = "post_attention_layernorm.weight",
    [WN_P_MLP_GATE] = "mlp.gate_proj.weight",
    [WN_P_MLP_UP] = "mlp.up_proj.weight",
    [WN_P_MLP_DOWN] = "mlp.down_proj.weight",
    [WN_P_ROUTER] = "mlp.gate.weight",
    [WN_P_ROUTER_BIAS] = "mlp.gate.e_score_correction_bias",
    [WN_P_SHARED_GATE] = "mlp.shared_experts.gate_proj.weight",
    [WN_P_SHARED_UP] = "mlp.shared_experts.up_proj.weight",
    [WN_P_SHARED_DOWN] = "mlp.shared_experts.down_proj.weight",
    [WN_P_EXPERT_GATE] = "gate_proj.weight",
    [WN_P_EXPERT_UP] = "up_proj.weight",
    [WN_P_EXPERT_DOWN] = "down_proj.weight",
    [WN_P_INDEX_Q_B] = "self_attn.indexer.wq_b.weight",
    [WN_P_INDEX_K] = "self_attn.indexer.wk.weight",
    [WN_P_INDEX_K_NORM] = "self_attn.indexer.k_norm.weight",
    [WN_P_INDEX_K_NORM_BIAS] = "self_attn.indexer.k_norm.bias",
    [WN_P_INDEX_WEIGHTS] = "self_attn.indexer.weights_proj.weight",
    [WN_P_FINAL_NORM] = "model.norm.weight",
    [WN_P_HEAD] = "lm_head.weight",
};

static bool is_expert(int32_t slot) {
  return slot >= WN_P_EXPERT_GATE && slot <= WN_P_EXPERT_DOWN;
}
bool wn_slot_of_indexer(int32_t slot) {
  return slot >= WN_P_INDEX_Q_B && slot <= WN_P_INDEX_WEIGHTS;
}
static bool is_bias(int32_t slot) {
  return slot == WN_P_ROUTER_BIAS || slot == WN_P_INDEX_K_NORM_BIAS;
}
static bool always_f32(int32_t slot) {
  return is_bias(slot) || slot == WN_P_INDEX_K_NORM;
}

/* How many parameters `layer` has in `slot`: 0, 1, or one an expert. */
static int32_t slot_count(const wn_model_config *c, int32_t layer, int32_t slot) {
  if (slot == WN_P_EMBED) return layer == -1;
  if (slot == WN_P_FINAL_NORM || slot == WN_P_HEAD) return layer == c->num_hidden_layers;
  if (layer < 0 || layer >= c->num_hidden_layers) return 0;
  if (wn_slot_of_indexer(slot)) return c->has_indexer;
  if (slot == WN_P_Q) return c->q_lora_rank == 0;
  if (slot >= WN_P_Q_A && slot <= WN_P_Q_B) return c->q_lora_rank > 0;
  bool moe = wn_model_config_is_moe(c, layer);
  if (slot >= WN_P_MLP_GATE && slot <= WN_P_MLP_DOWN) return !moe;
  if (slot == WN_P_ROUTER || slot == WN_P_ROUTER_BIAS) return moe;
  if (slot >= WN_P_SHARED_GATE && slot <= WN_P_SHARED_DOWN) return moe && c->n_shared_experts > 0;
  if (is_expert(slot)) return moe ? c->n_routed_experts : 0;
  return 1;
}

static void set_matrix(wn_param *p, int64_t rows, int64_t cols) {
  p->rank = 2;
  p->dim[0] = rows;
  p->dim[1] = cols;
}

static void set_vector(wn_param *p, int64_t n) {
  p->rank = 1;
  p->dim[0] = n;
}

static void set_shape(wn_param *p, const wn_model_config *c) {
  int64_t hidden = c->hidden_size, heads = c->num_attention_heads, latent = c->kv_lora_rank;
  int64_t nope = c->qk_nope_head_dim, rope = c->qk_rope_head_dim, v = c->v_head_dim;
  int64_t shared = (int64_t)c->n_shared_experts * c->moe_intermediate_size;
  switch ((wn_slot)p->slot) {
  case WN_P_EMBED:
  case WN_P_HEAD: set_matrix(p, c->vocab_size, hidden); return;
  case WN_P_INPUT_NORM:
  case WN_P_POST_NORM:
  case WN_P_FINAL_NORM: set_vector(p, hidden); return;
  case WN_P_Q: set_matrix(p, heads * (nope + rope), hidden); return;
  case WN_P_Q_A: set_matrix(p, c->q_lora_rank, hidden); return;
  case WN_P_Q_A_NORM: set_vector(p, c->q_lora_rank); return;
  case WN_P_Q_B: set_matrix(p, heads * (nope + rope), c->q_lora_rank); return;
  case WN_P_KV_A: set_matrix(p, latent + rope, hidden); return;
  case WN_P_KV_A_NORM: set_vector(p, latent); return;
  case WN_P_KV_B: set_matrix(p, heads * (nope + v), latent); return;
  case WN_P_O: set_matrix(p, hidden, heads * v); return;
  case WN_P_MLP_GATE:
  case WN_P_MLP_UP: set_matrix(p, c->intermediate_size, hidden); return;
  case WN_P_MLP_DOWN: set_matrix(p, hidden, c->intermediate_size); return;
  case WN_P_ROUTER: set_matrix(p, c->n_routed_experts, hidden); return;
  case WN_P_ROUTER_BIAS: set_vector(p, c->n_routed_experts); return;
  case WN_P_SHARED_GATE:
  case WN_P_SHARED_UP: set_matrix(p, shared, hidden); return;
  case WN_P_SHARED_DOWN: set_matrix(p, hidden, shared); return;
  case WN_P_EXPERT_GATE:
  case WN_P_EXPERT_UP: set_matrix(p, c->moe_intermediate_size, hidden); return;
  case WN_P_EXPERT_DOWN: set_matrix(p, hidden, c->moe_intermediate_size); return;
  case WN_P_INDEX_Q_B: set_matrix(p, (int64_t)c->index_n_heads * c->index_head_dim, c->q_lora_rank); return;
  case WN_P_INDEX_K: set_matrix(p, c->index_head_dim, hidden); return;
  case WN_P_INDEX_K_NORM:
  case WN_P_INDEX_K_NORM_BIAS: set_vector(p, c->index_head_dim); return;
  case WN_P_INDEX_WEIGHTS: set_matrix(p, c->index_n_heads, hidden); return;
  case WN_N_SLOTS: break;
  }
  WN_ASSERT(false, "slot %d", p->slot);
}

static void set_name(wn_param *p) {
  int length;
  if (p->slot == WN_P_EMBED || p->slot == WN_P_FINAL_NORM || p->slot == WN_P_HEAD)
    length = snprintf(p->hf_name, sizeof p->hf_name, "%s", slot_names[p->slot]);
  else if (p->expert >= 0)
    length = snprintf(p->hf_name, sizeof p->hf_name, "model.layers.%d.mlp.experts.%d.%s", p->layer, p->expert,
                      slot_names[p->slot]);
  else
    length = snprintf(p->hf_name, sizeof p->hf_name, "model.layers.%d.%s", p->layer, slot_names[p->slot]);
  WN_ASSERT(length > 0 && length < (int)sizeof p->hf_name, "name of %d bytes", length);
}

static wn_kind kind_of(int32_t slot, wn_param_settings settings) {
  if (wn_slot_of_indexer(slot)) return settings.train_indexer ? WN_INDEXER : WN_FROZEN;
  if (!settings.train_base) return WN_FROZEN;
  return slot == WN_P_ROUTER_BIAS ? WN_BUFFER : WN_BASE;
}

/* How many experts make a part, all of a size; 0: no parts. */
static int32_t experts_a_part(const wn_model_config *c, wn_param_settings settings) {
  int64_t most = settings.most_gathered > 0 ? settings.most_gathered : WN_MOST_GATHERED;
  int64_t expert = 3 * (int64_t)c->moe_intermediate_size * c->hidden_size, experts = c->n_routed_experts;
  if (settings.train_base || experts * expert <= most) return 0;
  int64_t fit = most / expert > 1 ? most / expert : 1, parts = (experts + fit - 1) / fit;
  return (int32_t)((experts + parts - 1) / parts);
}

wn_status wn_param_table_create(wn_param_table *out, const wn_model_config *config, wn_param_settings settings) {
  WN_ASSERT(settings.file_dtype == WN_F32 || settings.file_dtype == WN_BF16, "checkpoints of dtype %s",
            wn_dtype_name(settings.file_dtype));
  int32_t layers = config->num_hidden_layers;
  size_t n = 0;
  for (int32_t layer = -1; layer <= layers; layer++)
    for (int32_t slot = 0; slot < WN_N_SLOTS; slot++) n += (size_t)slot_count(config, layer, slot);
  if (n > MOST_PARAMS)
    return WN_FAIL(WN_E_CONFIG, "%zu parameters in the model, at most %d are possible", n, MOST_PARAMS);
  wn_param_table table = {.params = calloc(n, sizeof *table.params),
                          .first = calloc((size_t)layers + 3, sizeof *table.first)};
  if (!table.params || !table.first) {
    wn_param_table_free(&table);
    return WN_FAIL(WN_E_MEMORY, "no memory for a table of %zu parameters", n);
  }
  table.experts_a_part = experts_a_part(config, settings);
  for (int32_t layer = -1; layer <= layers; layer++) {
    table.first[layer + 1] = table.n;
    for (int32_t slot = 0; slot < WN_N_SLOTS; slot++) {
      int32_t count = slot_count(config, layer, slot);
      for (int32_t i = 0; i < count; i++) {
        wn_param *p = &table.params[table.n++];
        *p = (wn_param){.layer = layer,
                        .slot = slot,
                        .expert = is_expert(slot) ? i : -1,
                        .kind = kind_of(slot, settings),
                        .role = slot == WN_P_ROUTER_BIAS ? WN_STAT : WN_ACT,
                        .group = is_expert(slot) ? settings.expert_group : 0,
                        .file_dtype = always_f32(slot) ? WN_F32 : settings.file_dtype};
        if (p->expert >= 0 && table.experts_a_part) p->part = 1 + p->expert / table.experts_a_part;
        set_shape(p, config);
        set_name(p);
        p->decay = p->rank > 1;
      }
    }
  }
  table.first[layers + 2] = table.n;
  *out = table;
  return NULL;
}

void wn_param_table_free(wn_param_table *table) {
  free(table->params);
  free(table->first);
  *table = (wn_param_table){0};
}

int64_t wn_name_layer(const char *name) {
  static const char prefix[] = "model.layers.";
  char *end;
  const char *digits = name + sizeof prefix - 1;
  if (strncmp(name, prefix, sizeof prefix - 1) != 0 || *digits < '0' || *digits > '9') return -1;
  long long layer = strtoll(digits, &end, 10);
  return *end == '.' ? (int64_t)layer : -1;
}

static bool has_layer(const wn_hf_dir *dir, int32_t layer) {
  for (int64_t i = 0; i < wn_hf_dir_count(dir); i++)
    if (wn_name_layer(wn_hf_dir_at(dir, i, NULL)->name) == layer) return true;
  return false;
}

wn_status wn_mtp_layers_there(int32_t *out, const wn_hf_dir *dir, const wn_model_config *config) {
  int32_t n = 0, first = config->num_hidden_layers;
  for (int32_t i = 0; i < config->num_nextn_predict_layers; i++) {
    if (!has_layer(dir, first + i)) continue;
    if (n != i)
      return WN_FAIL_HINT(WN_E_INPUT, "readers count such layers from the model's last on",
                          "%s: layer %d (multi-token prediction) is absent, and layer %d is there", wn_hf_dir_path(dir),
                          first + n, first + i);
    n++;
  }
  *out = n;
  return NULL;
}

bool wn_slot_released_fp8(wn_slot slot) {
  switch (slot) {
  case WN_P_Q:
  case WN_P_Q_A:
  case WN_P_Q_B:
  case WN_P_KV_A:
  case WN_P_KV_B:
  case WN_P_O:
  case WN_P_MLP_GATE:
  case WN_P_MLP_UP:
  case WN_P_MLP_DOWN:
  case WN_P_SHARED_GATE:
  case WN_P_SHARED_UP:
  case WN_P_SHARED_DOWN:
  case WN_P_EXPERT_GATE:
  case WN_P_EXPERT_UP:
  case WN_P_EXPERT_DOWN:
  case WN_P_INDEX_Q_B:
  case WN_P_INDEX_K: return true;
  default: return false;
  }
}

void wn_layer_bind(wn_layer_tensors *out, const wn_param_table *table, int32_t layer, wn_tensor *by_param) {
  *out = (wn_layer_tensors){0};
  for (int32_t i = table->first[layer + 1]; i < table->first[layer + 2]; i++) {
    const wn_param *p = &table->params[i];
    if (p->expert < 0) out->slot[p->slot] = by_param[i];
    if (p->expert != 0) continue;
    if (p->slot == WN_P_EXPERT_GATE) out->expert_gate = &by_param[i];
    if (p->slot == WN_P_EXPERT_UP) out->expert_up = &by_param[i];
    if (p->slot == WN_P_EXPERT_DOWN) out->expert_down = &by_param[i];
  }
}

wn_status wn_layer_acquire(wn_layer_tensors *out, const wn_param_table *table, wn_store *store, int32_t layer,
                           wn_tensor *by_param) {
  WN_TRY(wn_store_acquire(store, layer, by_param));
  wn_layer_bind(out, table, layer, by_param);
  for (int32_t i = table->first[layer + 1]; i < table->first[layer + 2]; i++)
    if (table->params[i].part > out->parts) out->parts = table->params[i].part;
  if (out->parts == 0) return NULL;
  out->store = store;
  out->by_param = by_param;
  out->layer = layer;
  out->experts_a_part = table->experts_a_part;
  return NULL;
}

double wn_param_initial(const wn_param *p, const wn_model_config *config, uint64_t seed, int64_t i) {
  if (p->rank == 1) return is_bias(p->slot) ? 0.0 : 1.0;
  uint64_t name = wn_hash_bytes(p->hf_name, strlen(p->hf_name)).low;
  return config->initializer_range * wn_rng_normal(wn_rng_u64(seed, WN_RNG_INIT, name), WN_RNG_INIT, (uint64_t)i);
}
