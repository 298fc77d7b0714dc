#include "model/model.h"

#include <math.h>
#include <stdlib.h>

static const char *const selection_names[WN_N_SELECTIONS] = {
    [WN_SELECT_DENSE] = "dense",   [WN_SELECT_INDEXER] = "indexer", [WN_SELECT_BEST] = "best",
    [WN_SELECT_RECENT] = "recent", [WN_SELECT_SINK] = "sink",       [WN_SELECT_RANDOM] = "random",
};

const char *wn_selection_name(wn_selection selection) {
  WN_ASSERT((unsigned)selection < WN_N_SELECTIONS, "selection %d", (int)selection);
  return selection_names[selection];
}

/* What the operations of a GPU are built for (kernels/cuda): wider ones would not fit a block's shared memory. The
 * latents' width matters to sparse attention alone, and with it the rope's, which is no more than index_head_dim. */
static wn_status check_gpu_widths(const wn_model_config *c) {
  const struct {
    const char *what;
    int32_t is, most;
  } widths[] = {
      {"qk_nope_head_dim + qk_rope_head_dim", c->qk_nope_head_dim + c->qk_rope_head_dim, 256},
      {"v_head_dim", c->v_head_dim, 256},
      {"n_routed_experts", c->n_routed_experts, 2048},
      {"index_head_dim", c->has_indexer ? c->index_head_dim : 0, 128},
      {"kv_lora_rank", c->has_indexer ? c->kv_lora_rank : 0, 1024},
  };
  for (size_t i = 0; i < sizeof widths / sizeof *widths; i++)
    if (widths[i].is > widths[i].most)
      return WN_FAIL_HINT(WN_E_CONFIG, "use device: cpu", "%s is %d; on a GPU it may be %d at most", widths[i].what,
                          widths[i].is, widths[i].most);
  return NULL;
}

wn_status wn_model_create(wn_model **out, wn_device *device, const wn_model_config *config,
                          wn_param_settings settings) {
  if (device->kind == WN_CUDA) WN_TRY(check_gpu_widths(config));
  wn_model *model = calloc(1, sizeof *model);
  if (!model) return WN_FAIL(WN_E_MEMORY, "no memory for the model");
  model->config = *config;
  model->device = device;
  model->moe_rows = WN_MOE_ROWS;
  model->inv_freq = calloc((size_t)config->qk_rope_head_dim / 2, sizeof *model->inv_freq);
  model->expert_offset = calloc((size_t)config->n_routed_experts + 1, sizeof *model->expert_offset);
  wn_status status = NULL;
  if (!model->inv_freq || !model->expert_offset) {
    status = WN_FAIL(WN_E_MEMORY, "no memory for the model's tables");
    goto fail;
  }
  wn_model_config_inv_freq(config, model->inv_freq);
  model->softmax_scale = wn_model_config_softmax_scale(config);
  if (config->has_indexer) model->index_scale = 1.0 / sqrt((double)config->index_head_dim);
  WN_TRY_GOTO(status, fail, wn_param_table_create(&model->table, config, settings));
  *out = model;
  return NULL;
fail:
  wn_model_free(model);
  return status;
}

void wn_model_free(wn_model *model) {
  if (!model) return;
  wn_param_table_free(&model->table);
  free(model->inv_freq);
  free(model->expert_offset);
  free(model);
}

wn_attention_form wn_model_attention_form(const wn_model_config *config, int32_t head_tile, int32_t n_keys,
                                          int32_t topk) {
  double picked = topk < n_keys ? topk : n_keys, visible = ((double)n_keys + 1) / 2;
  double heads = config->num_attention_heads, tiled = heads < head_tile ? head_tile : heads;
  double absorbed_width = 2.0 * config->kv_lora_rank + config->qk_rope_head_dim;
  double masked_width = (double)config->qk_nope_head_dim + config->qk_rope_head_dim + config->v_head_dim;
  return tiled * picked * absorbed_width < heads * visible * masked_width ? WN_FORM_ABSORBED : WN_FORM_MASKED;
}
