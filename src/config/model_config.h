/* config.json: the shape of a DeepSeek-V3 (dense) or V3.2 (indexer on every layer) model. Names are Hugging Face's. */
#ifndef WN_CONFIG_MODEL_CONFIG_H
#define WN_CONFIG_MODEL_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

typedef struct wn_model_config {
  int32_t vocab_size, hidden_size, intermediate_size, moe_intermediate_size;
  int32_t num_hidden_layers, first_k_dense_replace, num_attention_heads;
  int32_t num_nextn_predict_layers; /* for multi-token prediction, behind the model's last; absent or null: 0 */
  int32_t n_routed_experts, n_shared_experts, num_experts_per_tok, n_group, topk_group;
  bool norm_topk_prob;
  double routed_scaling_factor;
  int32_t q_lora_rank; /* 0: null, the queries have no low-rank latent */
  int32_t kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim;
  bool has_indexer; /* index_topk is there: a V3.2 model */
  int32_t index_n_heads, index_head_dim, index_topk;
  double rms_norm_eps, rope_theta, initializer_range;
  int32_t max_position_embeddings;
  bool yarn;
  double rope_factor, beta_fast, beta_slow, mscale, mscale_all_dim;
  int32_t original_max_position_embeddings;
  int32_t bos_token_id, eos_token_id; /* -1: null */
  bool tie_word_embeddings;
} wn_model_config;

/* Reads DIR/config.json: the released form, and the one that transformers 5 writes (rope_parameters, mlp_layer_types),
 * of model_type deepseek_v3 or deepseek_v32, or of kimi_k2 or glm4_moe_lite, which are V3 under another name.
 * A null stands for an absent key; quantization_config is not looked at (the weights decide). WN_E_CONFIG, naming file
 * and key: missing or ill-typed keys, sizes out of range, shapes that contradict each other (heads, groups, odd rope
 * width, index_head_dim below the rope width), features Winnow does not have (q_lora_rank null beside an indexer,
 * scoring_func other than sigmoid, attention_bias, tied embeddings, other rope types, YaRN that scales cos and sin...).
 */
WN_MUST_USE wn_status wn_model_config_load(wn_model_config *out, const char *dir);
/* A text of DIR/config.json that is not the model's shape, of `section` (NULL: of the whole); "" where it is absent,
 * cut where it is longer. */
enum { WN_CONFIG_TEXT_BYTES = 64 };
WN_MUST_USE wn_status wn_model_config_text(char out[WN_CONFIG_TEXT_BYTES], const char *dir, const char *section,
                                           const char *key);
/* Writes DIR/config.json atomically with the released key set and order: deepseek_v32 when it has an indexer, else
 * deepseek_v3. `source_dir` may be NULL; keys of its config.json that Winnow does not know are carried over, but for
 * auto_map and quantization_config.
 * torch_dtype is "bfloat16" or "float32". WN_E_IO, WN_E_CONFIG for a source that is no JSON object. */
WN_MUST_USE wn_status wn_model_config_save(const wn_model_config *config, const char *dir, const char *source_dir,
                                           const char *torch_dtype);
/* The same, for weights that are FP8 with a scale a 128 x 128 block: torch_dtype "bfloat16", and the released
 * quantization_config, whose scale_fmt is "ue8m0" (scales are powers of two) or left out where NULL (any FP32). */
WN_MUST_USE wn_status wn_model_config_save_fp8(const wn_model_config *config, const char *dir, const char *source_dir,
                                               const char *scale_fmt);
/* The same, for weights of which some are FP8 as the source has them, and the indexer's are floats: torch_dtype
 * "bfloat16", the source's quantization_config (the released one without scale_fmt, where it has none), and in it the
 * names of the linear layers that are not FP8, for readers that go by it and not by the tensors. */
WN_MUST_USE wn_status wn_model_config_save_kept(const wn_model_config *config, const char *dir, const char *source_dir);
/* inv_freq[qk_rope_head_dim / 2] in FP32: rope_theta^(-2j / width), with YaRN where the config has it, rounded where
 * transformers rounds. Source: transformers modeling_rope_utils.py, _compute_yarn_parameters. */
void wn_model_config_inv_freq(const wn_model_config *config, float *inv_freq);
/* (nope + rope)^-0.5, times mscale^2 under YaRN with mscale_all_dim. */
double wn_model_config_softmax_scale(const wn_model_config *config);
bool wn_model_config_is_moe(const wn_model_config *config, int32_t layer);

#endif
