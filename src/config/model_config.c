#include "config/model_config.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include "config/model_config_keys.h"
#include "io/files.h"
#include "io/json.h"

enum { MOST_CONFIG_BYTES = 16 << 20 };

const wn_model_int wn_model_ints[] = {
#define INT(key, low, high)                                                                                            \
  { #key, offsetof(wn_model_config, key), low, high }
    INT(vocab_size, 1, 1 << 24),
    INT(hidden_size, 1, 1 << 17),
    INT(intermediate_size, 1, 1 << 20),
    INT(moe_intermediate_size, 1, 1 << 20),
    INT(num_hidden_layers, 1, 4096),
    INT(num_attention_heads, 1, 4096),
    INT(n_routed_experts, 1, 1 << 16),
    INT(n_shared_experts, 1, 64),
    INT(num_experts_per_tok, 1, 1 << 16),
    INT(n_group, 1, 1 << 16),
    INT(topk_group, 1, 1 << 16),
    INT(kv_lora_rank, 1, 1 << 17),
    INT(qk_nope_head_dim, 1, 4096),
    INT(qk_rope_head_dim, 2, 4096),
    INT(v_head_dim, 1, 4096),
    INT(max_position_embeddings, 1, 1 << 30),
#undef INT
    {NULL, 0, 0, 0},
};

const wn_model_int wn_model_index_ints[] = {
    {"index_n_heads", offsetof(wn_model_config, index_n_heads), 1, 4096},
    {"index_head_dim", offsetof(wn_model_config, index_head_dim), 1, 4096},
    {"index_topk", offsetof(wn_model_config, index_topk), 1, 1 << 30},
    {NULL, 0, 0, 0},
};

/* What Winnow has only one form of. Absent or null means that form. */
static const struct {
  const char *key, *only;
} single_forms[] = {
    {"hidden_act", "\"silu\""},           {"scoring_func", "\"sigmoid\""}, {"topk_method", "\"noaux_tc\""},
    {"attention_bias", "false"},          {"mlp_bias", "false"},           {"tie_word_embeddings", "false"},
    {"attention_dropout", "0"},           {"moe_layer_freq", "1"},         {"rope_interleave", "true"},
    {"indexer_rope_interleave", "false"}, {"partial_rotary_factor", "1"},
};

/* Whose arithmetic and tensor names are DeepSeek-V3's: all are written as deepseek_v3, or with an indexer as
 * deepseek_v32. */
static const char *const model_types[] = {"deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe_lite"};

/* Those that look like it, and what is different. */
static const struct {
  const char *type, *hint;
} strangers[] = {
    {"deepseek_v2", "DeepSeek-V2 routes by a softmax, which no V3.2 model can say"},
    {"glm_moe_dsa", "GLM-5's indexer turns interleaved pairs, and its selections may be shared by several layers"},
    {"kimi_linear", "Kimi-Linear has linear attention in most layers"},
};

/* One object being read, and where it stands: "dir/config.json" and "rope_scaling." */
typedef struct reader {
  const char *path, *prefix;
  const json_t *object;
} reader;

static const json_t *get(reader in, const char *key) {
  const json_t *value = json_object_get(in.object, key);
  return json_is_null(value) ? NULL : value;
}

static wn_status int_of(reader in, const char *key, const json_t *value, int64_t low, int64_t high, int32_t *out) {
  if (!json_is_integer(value)) return WN_FAIL(WN_E_CONFIG, "%s: %s%s is not a whole number", in.path, in.prefix, key);
  int64_t seen = json_integer_value(value);
  if (seen < low || seen > high)
    return WN_FAIL(WN_E_CONFIG, "%s: %s%s is %lld; allowed are %lld to %lld", in.path, in.prefix, key, (long long)seen,
                   (long long)low, (long long)high);
  *out = (int32_t)seen;
  return NULL;
}

static wn_status read_int(reader in, const char *key, int64_t low, int64_t high, int32_t *out) {
  const json_t *value = get(in, key);
  if (!value) return WN_FAIL(WN_E_CONFIG, "%s: %s%s is missing", in.path, in.prefix, key);
  return int_of(in, key, value, low, high, out);
}

/* Greater than `above`, at most `high`. `otherwise` stands in where the key is absent, unless it is NaN. */
static wn_status read_real(reader in, const char *key, double above, double high, double otherwise, double *out) {
  const json_t *value = get(in, key);
  *out = otherwise;
  if (!value && !isnan(otherwise)) return NULL;
  if (!value) return WN_FAIL(WN_E_CONFIG, "%s: %s%s is missing", in.path, in.prefix, key);
  if (!json_is_number(value)) return WN_FAIL(WN_E_CONFIG, "%s: %s%s is not a number", in.path, in.prefix, key);
  *out = json_number_value(value);
  if (!(*out > above && *out <= high))
    return WN_FAIL(WN_E_CONFIG, "%s: %s%s is %g; allowed is above %g, up to %g", in.path, in.prefix, key, *out, above,
                   high);
  return NULL;
}

static wn_status read_ints(reader in, const wn_model_int *ints, wn_model_config *out) {
  for (; ints->key; ints++) WN_TRY(read_int(in, ints->key, ints->low, ints->high, wn_model_int_at(out, ints)));
  return NULL;
}

static wn_status check_single_forms(reader in) {
  for (size_t i = 0; i < sizeof single_forms / sizeof *single_forms; i++) {
    const json_t *seen = get(in, single_forms[i].key);
    if (!seen) continue;
    json_t *only = json_loads(single_forms[i].only, JSON_DECODE_ANY, NULL);
    if (!only) return WN_FAIL(WN_E_MEMORY, "out of memory reading %s", in.path);
    bool same = json_is_number(only) ? json_is_number(seen) && json_number_value(only) == json_number_value(seen)
                                     : json_equal(only, seen);
    json_decref(only);
    if (same) continue;
    char *text = json_dumps(seen, JSON_ENCODE_ANY | JSON_COMPACT);
    wn_status status = WN_FAIL(WN_E_CONFIG, "%s: %s is %.80s; Winnow has only %s", in.path, single_forms[i].key,
                               text ? text : "something else", single_forms[i].only);
    free(text);
    return status;
  }
  return NULL;
}

/* transformers 5 lists every layer's kind; V3 models have the dense ones first. */
static wn_status read_layer_kinds(reader in, wn_model_config *out) {
  const json_t *kinds = get(in, "mlp_layer_types"), *attention = get(in, "layer_types");
  for (size_t i = 0; i < json_array_size(attention); i++) {
    const char *kind = json_string_value(json_array_get(attention, i));
    if (!kind || strcmp(kind, "deepseek_sparse_attention") != 0)
      return WN_FAIL(WN_E_CONFIG, "%s: layer_types[%zu] is %.40s; Winnow has only deepseek_sparse_attention", in.path,
                     i, kind ? kind : "not a string");
  }
  if (!kinds) return read_int(in, "first_k_dense_replace", 0, out->num_hidden_layers, &out->first_k_dense_replace);
  if (!json_is_array(kinds) || json_array_size(kinds) != (size_t)out->num_hidden_layers)
    return WN_FAIL(WN_E_CONFIG, "%s: mlp_layer_types is not a list of num_hidden_layers = %d kinds", in.path,
                   (int)out->num_hidden_layers);
  int32_t dense = 0;
  for (int32_t i = 0; i < out->num_hidden_layers; i++) {
    const char *kind = json_string_value(json_array_get(kinds, (size_t)i));
    if (kind && !strcmp(kind, "dense") && dense == i)
      dense++;
    else if (!kind || strcmp(kind, "sparse") != 0)
      return WN_FAIL(WN_E_CONFIG, "%s: mlp_layer_types[%d] is %.40s; allowed are dense layers, then sparse ones",
                     in.path, (int)i, kind ? kind : "not a string");
  }
  out->first_k_dense_replace = dense;
  if (!get(in, "first_k_dense_replace")) return NULL;
  int32_t other;
  WN_TRY(read_int(in, "first_k_dense_replace", 0, out->num_hidden_layers, &other));
  if (other != dense)
    return WN_FAIL(WN_E_CONFIG, "%s: first_k_dense_replace is %d, but mlp_layer_types begins with %d dense layers",
                   in.path, (int)other, (int)dense);
  return NULL;
}

static double get_mscale(double factor, double mscale) {
  return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1;
}

double wn_model_config_attention_factor(const wn_model_config *config) {
  if (config->mscale <= 0 || config->mscale_all_dim <= 0) return get_mscale(config->rope_factor, 1);
  return get_mscale(config->rope_factor, config->mscale) / get_mscale(config->rope_factor, config->mscale_all_dim);
}

/* Models that scale cos and sin (attention_factor other than 1) are none of the V3 family's: refused, not
 * approximated. */
static wn_status read_yarn(reader in, wn_model_config *out) {
  out->yarn = true;
  WN_TRY(read_real(in, "factor", 0, 1e6, NAN, &out->rope_factor));
  WN_TRY(read_real(in, "beta_fast", 0, 1e6, 32, &out->beta_fast));
  WN_TRY(read_real(in, "beta_slow", 0, 1e6, 1, &out->beta_slow));
  WN_TRY(read_real(in, "mscale", -1, 100, 0, &out->mscale));
  WN_TRY(read_real(in, "mscale_all_dim", -1, 100, 0, &out->mscale_all_dim));
  WN_TRY(read_int(in, "original_max_position_embeddings", 1, 1 << 30, &out->original_max_position_embeddings));
  if (out->rope_factor < 1)
    return WN_FAIL(WN_E_CONFIG, "%s: %sfactor is %g; YaRN stretches by 1 or more", in.path, in.prefix,
                   out->rope_factor);
  if (out->beta_fast < out->beta_slow)
    return WN_FAIL(WN_E_CONFIG, "%s: %sbeta_fast %g is below beta_slow %g", in.path, in.prefix, out->beta_fast,
                   out->beta_slow);
  if (out->mscale < 0 || out->mscale_all_dim < 0)
    return WN_FAIL(WN_E_CONFIG, "%s: %smscale and mscale_all_dim must not be negative", in.path, in.prefix);
  const json_t *truncate = get(in, "truncate"), *given = get(in, "attention_factor");
  if (truncate && !json_is_true(truncate))
    return WN_FAIL(WN_E_CONFIG, "%s: %struncate is not true; Winnow has only true", in.path, in.prefix);
  double attention_factor = given ? json_number_value(given) : wn_model_config_attention_factor(out);
  if (attention_factor != 1)
    return WN_FAIL_HINT(WN_E_CONFIG, "models of the DeepSeek-V3 family have mscale equal to mscale_all_dim",
                        "%s: %smscale %g and mscale_all_dim %g scale cos and sin by %.9g; Winnow has only 1", in.path,
                        in.prefix, out->mscale, out->mscale_all_dim, attention_factor);
  return NULL;
}

/* Released files have rope_theta and rope_scaling; transformers 5 writes both into rope_parameters. */
static wn_status read_rope(reader in, wn_model_config *out) {
  const json_t *new_form = get(in, "rope_parameters"), *scaling = new_form ? new_form : get(in, "rope_scaling");
  reader inner = {in.path, new_form ? "rope_parameters." : "rope_scaling.", scaling};
  if (scaling && !json_is_object(scaling))
    return WN_FAIL(WN_E_CONFIG, "%s: %.*s is not an object", in.path, (int)strlen(inner.prefix) - 1, inner.prefix);
  bool inside = new_form && get(inner, "rope_theta");
  WN_TRY(read_real(inside ? inner : in, "rope_theta", 1, 1e12, NAN, &out->rope_theta));
  if (inside && get(in, "rope_theta") && json_number_value(get(in, "rope_theta")) != out->rope_theta)
    return WN_FAIL(WN_E_CONFIG, "%s: rope_theta and rope_parameters.rope_theta differ", in.path);
  if (new_form && get(in, "rope_scaling"))
    return WN_FAIL(WN_E_CONFIG, "%s: holds both rope_scaling and rope_parameters", in.path);
  double partial;
  WN_TRY(read_real(inner, "partial_rotary_factor", 0, 1, 1, &partial));
  if (partial != 1)
    return WN_FAIL(WN_E_CONFIG, "%s: %spartial_rotary_factor is %g; Winnow has only 1", in.path, inner.prefix, partial);
  if (!scaling) return NULL;
  const json_t *type = get(inner, "rope_type") ? get(inner, "rope_type") : get(inner, "type");
  const char *name = type ? json_string_value(type) : "default";
  if (name && !strcmp(name, "default")) return NULL;
  if (!name || strcmp(name, "yarn") != 0)
    return WN_FAIL(WN_E_CONFIG, "%s: %stype is %.40s; Winnow has yarn and default", in.path, inner.prefix,
                   name ? name : "not a string");
  return read_yarn(inner, out);
}

/* Of several tokens that end a text the first stands for all. */
static wn_status read_token(reader in, const char *key, int32_t vocab_size, int32_t *out) {
  const json_t *value = get(in, key);
  *out = -1;
  return value ? int_of(in, key, json_is_array(value) ? json_array_get(value, 0) : value, 0, vocab_size - 1, out)
               : NULL;
}

static wn_status check_shapes(reader in, const wn_model_config *c) {
  int32_t per_group = c->n_routed_experts / c->n_group;
  if (c->n_routed_experts % c->n_group != 0)
    return WN_FAIL(WN_E_CONFIG, "%s: n_routed_experts %d is not a multiple of n_group %d", in.path,
                   (int)c->n_routed_experts, (int)c->n_group);
  if (c->topk_group > c->n_group)
    return WN_FAIL(WN_E_CONFIG, "%s: topk_group %d is above n_group %d", in.path, (int)c->topk_group, (int)c->n_group);
  if (c->num_experts_per_tok > c->topk_group * per_group)
    return WN_FAIL(WN_E_CONFIG, "%s: num_experts_per_tok %d is above the %d experts of topk_group groups", in.path,
                   (int)c->num_experts_per_tok, (int)(c->topk_group * per_group));
  if (c->qk_rope_head_dim % 2 != 0)
    return WN_FAIL(WN_E_CONFIG, "%s: qk_rope_head_dim %d is odd; rope turns pairs", in.path, (int)c->qk_rope_head_dim);
  if (c->has_indexer && c->index_head_dim < c->qk_rope_head_dim)
    return WN_FAIL(WN_E_CONFIG, "%s: index_head_dim %d is below qk_rope_head_dim %d, which it contains", in.path,
                   (int)c->index_head_dim, (int)c->qk_rope_head_dim);
  int32_t kv_heads = c->num_attention_heads;
  if (get(in, "num_key_value_heads")) WN_TRY(read_int(in, "num_key_value_heads", 1, 4096, &kv_heads));
  if (kv_heads != c->num_attention_heads)
    return WN_FAIL(WN_E_CONFIG,
                   "%s: num_key_value_heads %d differs from num_attention_heads %d; in latent attention they are equal",
                   in.path, (int)kv_heads, (int)c->num_attention_heads);
  return NULL;
}

static wn_status read_model_type(reader in, wn_model_config *out) {
  const char *type = json_string_value(get(in, "model_type")), *hint = NULL;
  bool known = false;
  for (size_t i = 0; type && i < sizeof model_types / sizeof *model_types; i++)
    known = known || !strcmp(type, model_types[i]);
  for (size_t i = 0; type && i < sizeof strangers / sizeof *strangers; i++)
    if (!strcmp(type, strangers[i].type)) hint = strangers[i].hint;
  if (!known)
    return WN_FAIL_HINT(WN_E_CONFIG, hint,
                        "%s: model_type is %.40s; Winnow reads deepseek_v3, deepseek_v32, kimi_k2 and glm4_moe_lite",
                        in.path, type ? type : "missing");
  out->has_indexer = !strcmp(type, "deepseek_v32");
  for (const wn_model_int *field = wn_model_index_ints; !out->has_indexer && field->key; field++)
    if (get(in, field->key))
      return WN_FAIL(WN_E_CONFIG, "%s: has %s, but model_type is %s; a model with an indexer is a deepseek_v32",
                     in.path, field->key, type);
  return out->has_indexer ? read_ints(in, wn_model_index_ints, out) : NULL;
}

/* A null is no low rank (0); an absent key is not that, since transformers takes 1536 for it. */
static wn_status read_q_lora_rank(reader in, wn_model_config *out) {
  if (!json_is_null(json_object_get(in.object, "q_lora_rank")))
    return read_int(in, "q_lora_rank", 1, 1 << 17, &out->q_lora_rank);
  if (out->has_indexer)
    return WN_FAIL_HINT(WN_E_CONFIG, "every consumer of V3.2 models needs the low-rank query",
                        "%s: q_lora_rank is null in a model with an indexer", in.path);
  out->q_lora_rank = 0;
  return NULL;
}

static wn_status read_mtp_layers(reader in, wn_model_config *out) {
  enum { MOST_MTP_LAYERS = 64 };
  const json_t *layers = get(in, "num_nextn_predict_layers");
  json_int_t n = json_integer_value(layers);
  if (layers && (!json_is_integer(layers) || n < 0 || n > MOST_MTP_LAYERS))
    return WN_FAIL(WN_E_CONFIG, "%s: num_nextn_predict_layers is not a whole number from 0 to %d", in.path,
                   MOST_MTP_LAYERS);
  out->num_nextn_predict_layers = (int32_t)n;
  return NULL;
}

static wn_status read_config(reader in, wn_model_config *out) {
  WN_TRY(read_model_type(in, out));
  WN_TRY(check_single_forms(in));
  WN_TRY(read_ints(in, wn_model_ints, out));
  WN_TRY(read_q_lora_rank(in, out));
  WN_TRY(read_layer_kinds(in, out));
  WN_TRY(read_mtp_layers(in, out));
  const json_t *norm = get(in, "norm_topk_prob");
  if (!json_is_boolean(norm)) return WN_FAIL(WN_E_CONFIG, "%s: norm_topk_prob is not true or false", in.path);
  out->norm_topk_prob = json_is_true(norm);
  WN_TRY(read_real(in, "routed_scaling_factor", 0, 1000, NAN, &out->routed_scaling_factor));
  WN_TRY(read_real(in, "rms_norm_eps", 0, 1, NAN, &out->rms_norm_eps));
  WN_TRY(read_real(in, "initializer_range", 0, 10, 0.02, &out->initializer_range));
  WN_TRY(read_token(in, "bos_token_id", out->vocab_size, &out->bos_token_id));
  WN_TRY(read_token(in, "eos_token_id", out->vocab_size, &out->eos_token_id));
  WN_TRY(read_rope(in, out));
  return check_shapes(in, out);
}

wn_status wn_model_config_parse(json_t **out, const char *path) {
  WN_TRY(wn_json_load(out, path, MOST_CONFIG_BYTES, WN_E_CONFIG));
  if (json_is_object(*out)) return NULL;
  json_decref(*out);
  *out = NULL;
  return WN_FAIL(WN_E_CONFIG, "%s: not a JSON object", path);
}

wn_status wn_model_config_load(wn_model_config *out, const char *dir) {
  char path[WN_PATH_BYTES];
  json_t *root;
  *out = (wn_model_config){.bos_token_id = -1, .eos_token_id = -1};
  WN_TRY(wn_path(path, "%s/config.json", dir));
  if (!wn_path_exists(path))
    return WN_FAIL_HINT(WN_E_CONFIG, "a model directory holds its shape in config.json", "%s is absent", path);
  WN_TRY(wn_model_config_parse(&root, path));
  wn_status status = read_config((reader){path, "", root}, out);
  json_decref(root);
  return wn_status_trail(status, __FILE__, __LINE__);
}

wn_status wn_model_config_text(char out[WN_CONFIG_TEXT_BYTES], const char *dir, const char *section, const char *key) {
  char path[WN_PATH_BYTES];
  json_t *root;
  WN_TRY(wn_path(path, "%s/config.json", dir));
  WN_TRY(wn_model_config_parse(&root, path));
  const char *text = json_string_value(json_object_get(section ? json_object_get(root, section) : root, key));
  snprintf(out, WN_CONFIG_TEXT_BYTES, "%s", text ? text : "");
  json_decref(root);
  return NULL;
}

/* "low" and "high" are the pairs that turn beta_fast and beta_slow times over the original context; between them the
 * frequencies go linearly from as they are to divided by the factor. Every step is rounded where transformers rounds
 * (_compute_yarn_parameters): bounds in FP64, tensors in FP32. Casts keep products and sums from being fused. */
void wn_model_config_inv_freq(const wn_model_config *config, float *inv_freq) {
  int32_t dim = config->qk_rope_head_dim;
  double low = 0, high = 0;
  if (config->yarn) {
    double context = config->original_max_position_embeddings, log_base = 2 * log(config->rope_theta),
           pi = 3.14159265358979323846;
    low = fmax(floor(dim * log(context / (config->beta_fast * 2 * pi)) / log_base), 0);
    high = fmin(ceil(dim * log(context / (config->beta_slow * 2 * pi)) / log_base), dim - 1);
    if (low == high) high += 0.001;
  }
  for (int32_t j = 0; j < dim / 2; j++) {
    float exponent = (float)(2 * j) / (float)dim, period = (float)pow(config->rope_theta, (double)exponent);
    float as_is = 1.0f / period;
    inv_freq[j] = as_is;
    if (!config->yarn) continue;
    float stretched = 1.0f / ((float)config->rope_factor * period);
    float ramp = ((float)j - (float)low) / (float)(high - low);
    float keep = 1.0f - fminf(fmaxf(ramp, 0), 1);
    float a = (float)((double)stretched * (double)(1.0f - keep)), b = (float)((double)as_is * (double)keep);
    inv_freq[j] = (float)((double)a + (double)b);
  }
}

double wn_model_config_softmax_scale(const wn_model_config *config) {
  double scale = pow(config->qk_nope_head_dim + config->qk_rope_head_dim, -0.5);
  if (!config->yarn || config->mscale_all_dim == 0) return scale;
  double mscale = get_mscale(config->rope_factor, config->mscale_all_dim);
  return scale * mscale * mscale;
}

bool wn_model_config_is_moe(const wn_model_config *config, int32_t layer) {
  return layer >= config->first_k_dense_replace;
}
