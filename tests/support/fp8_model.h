/* Model directories as DeepSeek releases them: FP8 matrices with block scales, everything else BF16 or F32, a layer of
 * multi-token prediction behind the last, in as many shards as wanted; and the same weights in BF16. */
#ifndef WN_TEST_FP8_MODEL_H
#define WN_TEST_FP8_MODEL_H

#include "base/float8.h"
#include "support/model_list.h"
#include "support/tiny.h"

/* V3.1's whole list of tensors, 91,991 of them with scales, in 22 MB: its depth, experts and groups, hardly any width.
 * A few matrices have two blocks. */
static inline wn_model_config fp8_v31_config(void) {
  wn_model_config config = tiny_config();
  config.hidden_size = 24;
  config.intermediate_size = 136;
  config.moe_intermediate_size = 8;
  config.num_hidden_layers = 61;
  config.first_k_dense_replace = 3;
  config.num_attention_heads = 4;
  config.n_routed_experts = 256;
  config.num_experts_per_tok = 8;
  config.n_group = 8;
  config.topk_group = 4;
  config.routed_scaling_factor = 2.5;
  config.q_lora_rank = 16;
  config.qk_nope_head_dim = 32;
  return config;
}

static inline void fp8_add_bf16(model_list *list, const char *name, int32_t rank, int64_t d0, int64_t d1,
                                const float *values) {
  uint16_t *to = model_list_add(list, name, WN_BF16, rank, d0, d1);
  wn_bf16s_from_f32(to, values, rank == 1 ? d0 : d0 * d1);
}

/* Quantised, and written as codes and scales or as the BF16 that these stand for. */
static inline void fp8_add_matrix(model_list *list, const char *name, int64_t rows, int64_t cols, const float *values,
                                  bool fp8) {
  char scale_name[WN_NAME_BYTES + 16];
  int64_t down = wn_f8_blocks(rows), across = wn_f8_blocks(cols);
  uint8_t *codes = malloc((size_t)(rows * cols));
  float *scales = malloc((size_t)(down * across) * sizeof *scales),
        *wide = malloc((size_t)(rows * cols) * sizeof *wide);
  assert_true(codes && scales && wide);
  for (int64_t r = 0; r < down; r++)
    for (int64_t c = 0; c < across; c++) {
      int64_t at = r * WN_F8_BLOCK * cols + c * WN_F8_BLOCK, high = rows - r * WN_F8_BLOCK,
              wide_by = cols - c * WN_F8_BLOCK;
      wn_f8_quantise_block(codes + at, &scales[r * across + c], values + at, high < WN_F8_BLOCK ? high : WN_F8_BLOCK,
                           wide_by < WN_F8_BLOCK ? wide_by : WN_F8_BLOCK, cols, cols);
    }
  if (fp8) {
    memcpy(model_list_add(list, name, WN_F8_E4M3, 2, rows, cols), codes, (size_t)(rows * cols));
    snprintf(scale_name, sizeof scale_name, "%.*s" WN_HF_SCALE_SUFFIX, WN_NAME_BYTES, name);
    memcpy(model_list_add(list, scale_name, WN_F32, 2, down, across), scales, (size_t)(down * across) * sizeof *scales);
  } else {
    wn_f8_dequantise(wide, codes, scales, cols, 0, rows * cols);
    fp8_add_bf16(list, name, 2, rows, cols, wide);
  }
  free(codes);
  free(scales);
  free(wide);
}

/* As the release does: projections of attention and MLPs are FP8, the router, norms, embedding and head are not. */
static inline bool fp8_is_quantised(const wn_param *p) {
  return p->rank == 2 && p->slot != WN_P_EMBED && p->slot != WN_P_HEAD && p->slot != WN_P_ROUTER &&
         p->slot != WN_P_INDEX_WEIGHTS;
}

static inline void fp8_add_param(model_list *list, const wn_param *p, uint64_t seed, bool fp8) {
  float *values = tiny_values(p, seed);
  if (p->slot == WN_P_ROUTER_BIAS || p->slot == WN_P_INDEX_K_NORM || p->slot == WN_P_INDEX_K_NORM_BIAS)
    memcpy(model_list_add(list, p->hf_name, WN_F32, 1, p->dim[0], 0), values, (size_t)p->dim[0] * sizeof *values);
  else if (fp8_is_quantised(p))
    fp8_add_matrix(list, p->hf_name, p->dim[0], p->dim[1], values, fp8);
  else
    fp8_add_bf16(list, p->hf_name, p->rank, p->dim[0], p->dim[1], values);
  free(values);
}

/* What a layer of multi-token prediction has besides a layer's tensors. */
static inline void fp8_add_mtp(model_list *list, const wn_model_config *c) {
  static const struct {
    const char *name;
    int32_t rank, heights, widths; /* of the hidden size; a height of 0: the vocabulary */
  } extra[] = {{"enorm.weight", 1, 1, 1},
               {"hnorm.weight", 1, 1, 1},
               {"eh_proj.weight", 2, 1, 2},
               {"embed_tokens.weight", 2, 0, 1},
               {"shared_head.norm.weight", 1, 1, 1},
               {"shared_head.head.weight", 2, 0, 1}};
  for (size_t i = 0; i < sizeof extra / sizeof *extra; i++) {
    wn_param p = {.slot = WN_P_HEAD, .rank = extra[i].rank};
    snprintf(p.hf_name, sizeof p.hf_name, "model.layers.%d.%s", c->num_hidden_layers, extra[i].name);
    p.dim[0] = extra[i].heights ? extra[i].heights * c->hidden_size : c->vocab_size;
    p.dim[1] = extra[i].widths * c->hidden_size;
    fp8_add_param(list, &p, 900 + i, true);
  }
}

/* config.json, which says how many layers of multi-token prediction there are. */
static inline void fp8_write_config(const char *dir, const wn_model_config *config, bool fp8, bool mtp) {
  OK(fp8 ? wn_model_config_save_fp8(config, dir, NULL, "ue8m0") : wn_model_config_save(config, dir, NULL, "bfloat16"));
  model_set_mtp_layers(dir, mtp);
}

/* fp8 false: the same weights, dequantised to BF16. Returns the number of tensors. */
static inline int64_t fp8_model(const char *dir, const wn_model_config *config, uint64_t seed, int32_t shards, bool fp8,
                                bool mtp) {
  wn_model_config deeper = *config;
  deeper.num_hidden_layers += mtp;
  wn_param_table table = tiny_table(&deeper);
  model_list list = {0};
  for (int32_t i = 0; i < table.n; i++) fp8_add_param(&list, &table.params[i], seed * 100000 + (uint64_t)i, fp8);
  if (mtp) fp8_add_mtp(&list, config);
  model_list_write(&list, dir, shards);
  fp8_write_config(dir, config, fp8, mtp);
  int64_t n = list.n;
  model_list_free(&list);
  wn_param_table_free(&table);
  return n;
}

/* Setup for tests of one base in two forms: tiny's, and DIR/fp8 and DIR/bf16, widths off 128 in every direction. */
static inline int fp8_pair_setup(void **state) {
  if (tiny_setup(state)) return -1;
  wn_model_config config = tiny_config();
  config.hidden_size = 144;
  config.moe_intermediate_size = 136;
  fp8_model(wn_temp(state, "fp8").text, &config, 4, 5, true, true);
  fp8_model(wn_temp(state, "bf16").text, &config, 4, 2, false, true);
  return 0;
}

#endif
