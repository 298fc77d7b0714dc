#include "model/flops.h"

/* FLOPs a row of the linear layers of one layer, forward. */
static double layer_linear(const wn_model_config *c, int32_t layer) {
  double D = c->hidden_size, H = c->num_attention_heads, dq = c->qk_nope_head_dim + c->qk_rope_head_dim;
  double queries = c->q_lora_rank ? (D + H * dq) * c->q_lora_rank : D * H * dq;
  double weights = queries + D * (c->kv_lora_rank + c->qk_rope_head_dim) +
                   c->kv_lora_rank * H * (c->qk_nope_head_dim + c->v_head_dim) + H * c->v_head_dim * D;
  if (wn_model_config_is_moe(c, layer))
    weights +=
        D * c->n_routed_experts + 3 * D * c->moe_intermediate_size * (c->num_experts_per_tok + c->n_shared_experts);
  else
    weights += 3 * D * c->intermediate_size;
  return 2 * weights;
}

/* Attention over `pairs`: QK^T and PV forward; five products backward. Sparse attention counts in the latent form (keys
 * c + r wide, values c). */
static double attention(const wn_model_config *c, double pairs, bool sparse, bool backward) {
  double H = c->num_attention_heads;
  double key = sparse ? c->kv_lora_rank + c->qk_rope_head_dim : c->qk_nope_head_dim + c->qk_rope_head_dim;
  double value = sparse ? c->kv_lora_rank : c->v_head_dim;
  double forward = 2 * H * pairs * (key + value);
  return backward ? forward + 2 * H * pairs * (3 * key + 2 * value) : forward;
}

/* The indexer: projections forward and backward; logits over all visible pairs (to select, or for the log-sum); the
 * KL's target where no attention backward gives it, and its gradients (logits again, dq, dk) over the pairs the KL runs
 * over. */
static double indexer(const wn_model_config *c, const wn_flops_work *w) {
  double width = (double)c->index_n_heads * c->index_head_dim;
  double weights = c->q_lora_rank * width + (double)c->hidden_size * (c->index_head_dim + c->index_n_heads);
  double key = c->qk_nope_head_dim + c->qk_rope_head_dim;
  bool dense = w->selected_pairs == 0;
  double kl_pairs = dense ? w->visible_pairs : w->selected_pairs;
  double work = 2 * weights * w->rows * 2 + 2 * width * w->visible_pairs + 3 * 2 * width * kl_pairs;
  return dense ? work + 2 * c->num_attention_heads * key * w->visible_pairs : work;
}

double wn_flops(const wn_model_config *config, const wn_flops_work *work) {
  bool sparse = work->selected_pairs > 0;
  double total = 0, passes = work->backward_base ? 3 : 1;
  for (int32_t l = 0; l < config->num_hidden_layers; l++) {
    total += layer_linear(config, l) * work->rows * passes;
    total += attention(config, sparse ? work->selected_pairs : work->visible_pairs, sparse, work->backward_base);
    if (work->indexer) total += indexer(config, work);
  }
  if (work->head) total += 2.0 * config->hidden_size * config->vocab_size * work->rows * passes;
  return total;
}
