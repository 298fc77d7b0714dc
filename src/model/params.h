/* The parameter table of a model, from its configuration alone; and a layer's weights by name. */
#ifndef WN_MODEL_PARAMS_H
#define WN_MODEL_PARAMS_H

#include "config/model_config.h"
#include "dist/store.h"
#include "io/hf_dir.h"

typedef enum wn_slot {
  WN_P_EMBED, /* model.embed_tokens.weight [V,D] */
  WN_P_INPUT_NORM,
  WN_P_Q, /* where q_lora_rank is null; the next three are where it is not */
  WN_P_Q_A,
  WN_P_Q_A_NORM,
  WN_P_Q_B,
  WN_P_KV_A,
  WN_P_KV_A_NORM,
  WN_P_KV_B,
  WN_P_O,
  WN_P_POST_NORM,
  WN_P_MLP_GATE,
  WN_P_MLP_UP,
  WN_P_MLP_DOWN, /* leading dense layers */
  WN_P_ROUTER,
  WN_P_ROUTER_BIAS, /* [E,D]; [E] */
  WN_P_SHARED_GATE,
  WN_P_SHARED_UP,
  WN_P_SHARED_DOWN,
  WN_P_EXPERT_GATE,
  WN_P_EXPERT_UP,
  WN_P_EXPERT_DOWN, /* one parameter an expert; experts consecutive in a slot */
  WN_P_INDEX_Q_B,
  WN_P_INDEX_K,
  WN_P_INDEX_K_NORM,
  WN_P_INDEX_K_NORM_BIAS,
  WN_P_INDEX_WEIGHTS,
  WN_P_FINAL_NORM,
  WN_P_HEAD,
  WN_N_SLOTS
} wn_slot;

typedef struct wn_param_table {
  wn_param *params; /* sorted by layer (-1, 0 .. L-1, L), then slot, then expert */
  int32_t n;
  int32_t *first;         /* first[layer + 1] .. first[layer + 2]: the layer's parameters */
  int32_t experts_a_part; /* 0: experts are gathered with their layer; else so many make a part of the store's */
} wn_param_table;

typedef struct wn_param_settings {
  bool train_base, train_indexer; /* false: FROZEN (and the router bias FROZEN with the base) */
  wn_dtype file_dtype;            /* of matrices and norms; k_norm and the router bias are always F32 */
  int32_t expert_group;  /* the store's group of the routed experts; 0 where experts are not split over ranks */
  int64_t most_gathered; /* elements of a layer's routed experts that are gathered at a time, where they are frozen and
                            there are more; 0: WN_MOST_GATHERED */
} wn_param_settings;

/* A layer of V3.1's has ten times as many, 22.5 GB in BF16 on every rank. */
#define WN_MOST_GATHERED ((int64_t)1 << 30)

WN_MUST_USE wn_status wn_param_table_create(wn_param_table *out, const wn_model_config *config,
                                            wn_param_settings settings);
void wn_param_table_free(wn_param_table *table);
/* Whether DeepSeek's FP8 releases have this weight in FP8: matrices, but embedding, head, router and the indexer's
 * head weights. */
bool wn_slot_released_fp8(wn_slot slot);
bool wn_slot_of_indexer(int32_t slot);

/* The number in a name that begins with "model.layers.N."; -1: it does not. */
int64_t wn_name_layer(const char *name);
/* Of the layers for multi-token prediction that the configuration counts, how many the directory has. WN_E_INPUT for
 * one that is absent before one that is there. */
WN_MUST_USE wn_status wn_mtp_layers_there(int32_t *out, const wn_hf_dir *dir, const wn_model_config *config);

/* A layer's tensors by slot (experts as arrays); absent ones have data NULL. Used for weights and for gradients. */
typedef struct wn_layer_tensors {
  wn_tensor slot[WN_N_SLOTS];
  const wn_tensor *expert_gate, *expert_up, *expert_down; /* [n_routed_experts], inside by_param */
  /* Weights whose experts come in parts: where they come from. store NULL: all experts are there. */
  wn_store *store;
  wn_tensor *by_param;
  int32_t layer, parts, experts_a_part;
} wn_layer_tensors;
/* All are there. */
void wn_layer_bind(wn_layer_tensors *out, const wn_param_table *table, int32_t layer, wn_tensor *by_param);
/* Acquired from the store, but for experts that come in parts: the layer's pass acquires these, one after another. To
 * be released by wn_store_release. */
WN_MUST_USE wn_status wn_layer_acquire(wn_layer_tensors *out, const wn_param_table *table, wn_store *store,
                                       int32_t layer, wn_tensor *by_param);

/* Element `i` of parameter `p` at random initialisation: normal(0, initializer_range) for matrices, 1 for norms, 0
 * for biases. A pure function of (seed, name): independent of the world and of which other parameters exist. */
double wn_param_initial(const wn_param *p, const wn_model_config *config, uint64_t seed, int64_t i);

#endif
