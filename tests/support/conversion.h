/* Model directories whose every byte is a function of tensor name and element, in any stored form; the same function
 * is in tests/oracle/demo_shards.py. For tests of src/convert. */
#ifndef WN_TEST_CONVERSION_H
#define WN_TEST_CONVERSION_H

#include "base/float8.h"
#include "convert/convert.h"
#include "io/hf_dir.h"
#include "model/params.h"
#include "support/model_list.h"
#include "support/temp.h"

/* ---- contents ---- */

static inline uint64_t conv_hash(uint64_t x) { /* splitmix64 */
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

static inline uint64_t conv_seed(const char *name) { /* FNV-1a */
  uint64_t seed = 0xcbf29ce484222325u;
  for (; *name; name++) seed = (seed ^ (unsigned char)*name) * 0x100000001b3u;
  return seed;
}

/* Element i of a tensor, as stored. Numbers lie between 2^-9 and 1; `positive` ones, which scales are, likewise. */
static inline void conv_element(char *out, wn_dtype dtype, uint64_t seed, int64_t i, bool positive) {
  uint64_t h = conv_hash(seed + (uint64_t)i);
  uint32_t sign = positive ? 0 : (uint32_t)(h >> 63), exponent = 118 + (uint32_t)(h >> 32 & 7), wide;
  uint16_t half;
  switch (dtype) {
  case WN_F32:
    wide = sign << 31 | exponent << 23 | (uint32_t)(h & 0x7fffff);
    memcpy(out, &wide, 4);
    return;
  case WN_BF16:
    half = (uint16_t)(sign << 15 | exponent << 7 | (h & 0x7f));
    memcpy(out, &half, 2);
    return;
  case WN_F16:
    half = (uint16_t)(sign << 15 | (exponent - 112) << 10 | (h & 0x3ff));
    memcpy(out, &half, 2);
    return;
  case WN_F8_E4M3: *out = (char)((h & 0x7f) == 0x7f ? h ^ 1 : h); return;
  case WN_F8_E8M0: *out = (char)exponent; return;
  default: fail_msg("no contents for %s", wn_dtype_name(dtype));
  }
}

/* ---- a directory ---- */

typedef enum conv_stored { CONV_RELEASED, CONV_F32, CONV_BF16, CONV_F16 } conv_stored;

typedef struct conv_dir {
  conv_stored stored;  /* RELEASED: FP8 as the release has it, BF16 else; in all, F32 where the release has that */
  wn_dtype scales;     /* of FP8: F32, BF16 or F8_E8M0 */
  bool powers;         /* F32 scales are powers of two, and config.json says so */
  int32_t mtp, shards; /* layers behind the last; 1 or more files */
  const char *without; /* tensors whose name holds this are left out */
  bool mtp_without_indexer;
  const char *extra; /* a tensor that no model has */
} conv_dir;

static inline bool conv_fp8(const char *name) {
  static const char *const kinds[] = {"_proj.weight", "_proj_with_mqa.weight", ".wq_b.weight", ".wk.weight"};
  if (strstr(name, "weights_proj") || strstr(name, "eh_proj")) return false;
  for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
    size_t length = strlen(name), tail = strlen(kinds[i]);
    if (length > tail && strcmp(name + length - tail, kinds[i]) == 0) return true;
  }
  return false;
}

static inline bool conv_f32(const char *name) {
  return strstr(name, "k_norm") || strstr(name, "e_score_correction_bias");
}

static inline void conv_add(model_list *t, const conv_dir *how, const char *name, wn_dtype dtype, int32_t rank,
                            int64_t d0, int64_t d1, bool scales) {
  if (how->without && strstr(name, how->without)) return;
  int64_t n = rank == 2 ? d0 * d1 : d0, width = wn_dtype_bytes(dtype);
  char *data = model_list_add(t, name, dtype, rank, d0, d1);
  for (int64_t i = 0; i < n; i++) {
    conv_element(data + i * width, dtype, conv_seed(name), i, scales);
    if (scales && dtype == WN_F32 && how->powers) memset(data + i * 4, 0, 2), data[i * 4 + 2] &= (char)0x80;
  }
}

static inline void conv_weight(model_list *t, const conv_dir *how, const char *name, int32_t rank, int64_t d0,
                               int64_t d1) {
  static const wn_dtype plain[] = {WN_BF16, WN_F32, WN_BF16, WN_F16};
  char beside[WN_NAME_BYTES + 16];
  bool fp8 = how->stored == CONV_RELEASED && rank == 2 && conv_fp8(name);
  conv_add(t, how, name, conv_f32(name) ? WN_F32 : fp8 ? WN_F8_E4M3 : plain[how->stored], rank, d0, d1, false);
  if (!fp8) return;
  snprintf(beside, sizeof beside, "%s" WN_HF_SCALE_SUFFIX, name);
  conv_add(t, how, beside, how->scales, 2, wn_f8_blocks(d0), wn_f8_blocks(d1), true);
}

static inline void conv_mtp(model_list *t, const conv_dir *how, const wn_model_config *c, int32_t layer) {
  char name[WN_NAME_BYTES];
#define NAME(what) (snprintf(name, sizeof name, "model.layers.%d." what ".weight", layer), name)
  conv_weight(t, how, NAME("enorm"), 1, c->hidden_size, 0);
  conv_weight(t, how, NAME("hnorm"), 1, c->hidden_size, 0);
  conv_weight(t, how, NAME("eh_proj"), 2, c->hidden_size, (int64_t)2 * c->hidden_size);
  conv_weight(t, how, NAME("embed_tokens"), 2, c->vocab_size, c->hidden_size);
  conv_weight(t, how, NAME("shared_head.norm"), 1, c->hidden_size, 0);
  conv_weight(t, how, NAME("shared_head.head"), 2, c->vocab_size, c->hidden_size);
#undef NAME
}

static inline void conv_write_config(const char *path, const wn_model_config *config, const conv_dir *how) {
  OK(how->stored == CONV_RELEASED ? wn_model_config_save_fp8(config, path, NULL, how->powers ? "ue8m0" : NULL)
                                  : wn_model_config_save(config, path, NULL, "float32"));
  model_set_mtp_layers(path, how->mtp);
}

static inline void conv_write_dir(const char *path, const wn_model_config *config, conv_dir how) {
  wn_param_table table;
  wn_model_config deeper = *config;
  model_list t = {0};
  deeper.num_hidden_layers += how.mtp;
  OK(wn_param_table_create(&table, &deeper, (wn_param_settings){.file_dtype = WN_F32}));
  for (int32_t i = 0; i < table.n; i++) {
    const wn_param *p = &table.params[i];
    bool mtp = p->layer >= config->num_hidden_layers && p->layer < deeper.num_hidden_layers;
    if (mtp && how.mtp_without_indexer && strstr(p->hf_name, ".indexer.")) continue;
    conv_weight(&t, &how, p->hf_name, p->rank, p->dim[0], p->dim[1]);
  }
  for (int32_t m = 0; m < how.mtp; m++) conv_mtp(&t, &how, config, config->num_hidden_layers + m);
  if (how.extra) conv_add(&t, &how, how.extra, WN_F32, 1, 3, 0, false);
  model_list_write(&t, path, how.shards);
  conv_write_config(path, config, &how);
  model_list_free(&t);
  wn_param_table_free(&table);
}

/* No dimension a multiple of 128, one matrix wider than a tile; two layers, the second with experts. */
static inline wn_model_config conv_odd_config(void) {
  return (wn_model_config){.vocab_size = 37,
                           .hidden_size = 150,
                           .intermediate_size = 8392,
                           .moe_intermediate_size = 131,
                           .num_hidden_layers = 2,
                           .first_k_dense_replace = 1,
                           .num_attention_heads = 3,
                           .n_routed_experts = 4,
                           .n_shared_experts = 1,
                           .num_experts_per_tok = 2,
                           .n_group = 2,
                           .topk_group = 1,
                           .norm_topk_prob = true,
                           .routed_scaling_factor = 1.5,
                           .q_lora_rank = 129,
                           .kv_lora_rank = 33,
                           .qk_nope_head_dim = 40,
                           .qk_rope_head_dim = 8,
                           .v_head_dim = 45,
                           .has_indexer = true,
                           .index_n_heads = 5,
                           .index_head_dim = 50,
                           .index_topk = 16,
                           .rms_norm_eps = 1e-6,
                           .rope_theta = 10000,
                           .initializer_range = 0.02,
                           .max_position_embeddings = 4096,
                           .bos_token_id = 0,
                           .eos_token_id = 1};
}

static inline wn_convert_job conv_job(const char *in, const char *out, wn_convert_form form) {
  return (wn_convert_job){
      .in = in, .out = out, .form = form, .model_parallel = 1, .shard_bytes = (int64_t)1 << 40, .threads = 2};
}

#endif
