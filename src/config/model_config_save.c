/* Writes config.json as the released ones look: keys sorted, two spaces, numbers in Python's form. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config/model_config_keys.h"
#include "config/real_text.h"
#include "io/files.h"

/* Keys of a source file that would no longer be true: they name remote code or a storage Winnow does not write, or say
 * in another form what is written below. */
static const char *const dropped[] = {"auto_map",        "quantization_config", "rope_parameters",
                                      "mlp_layer_types", "layer_types",         "dtype",
                                      "index_n_heads",   "index_head_dim",      "index_topk"};

/* Written whatever the source says, because Winnow has only this form. */
static const struct {
  const char *key, *json;
} fixed[] = {
    {"attention_bias", "false"},     {"attention_dropout", "0.0"},    {"hidden_act", "\"silu\""},
    {"moe_layer_freq", "1"},         {"scoring_func", "\"sigmoid\""}, {"tie_word_embeddings", "false"},
    {"topk_method", "\"noaux_tc\""},
};

/* Of the released key set, but nothing Winnow knows of: written where the source does not say. */
static const struct { const char *key, *json; } defaults[] = {{"ep_size", "1"}, {"use_cache", "true"}};

static int set(json_t *object, const char *key, json_t *value) {
  return json_object_set_new(object, key, value);
}
static int set_json(json_t *object, const char *key, const char *json) {
  return set(object, key, json_loads(json, JSON_DECODE_ANY, NULL));
}
static json_t *token(int32_t id) {
  return id < 0 ? json_null() : json_integer(id);
}
/* The released files have rope's settings as 10000, not 10000.0. */
static json_t *short_number(double x) {
  return x == (double)(int64_t)x ? json_integer((json_int_t)x) : json_real(x);
}

static int set_rope(json_t *root, const wn_model_config *c) {
  int bad = set(root, "rope_theta", short_number(c->rope_theta));
  if (!c->yarn) return bad | set(root, "rope_scaling", json_null());
  json_t *rope = json_object();
  /* only where it was given: the rest says another */
  if (wn_model_config_attention_factor(c) != 1) bad |= set(rope, "attention_factor", json_real(1));
  bad |= set(rope, "beta_fast", short_number(c->beta_fast));
  bad |= set(rope, "beta_slow", short_number(c->beta_slow));
  bad |= set(rope, "factor", short_number(c->rope_factor));
  bad |= set(rope, "mscale", json_real(c->mscale));
  bad |= set(rope, "mscale_all_dim", json_real(c->mscale_all_dim));
  bad |= set(rope, "original_max_position_embeddings", json_integer(c->original_max_position_embeddings));
  bad |= set(rope, "type", json_string("yarn"));
  return bad | set(root, "rope_scaling", rope);
}

static int set_ints(json_t *root, const wn_model_config *config, const wn_model_int *ints) {
  wn_model_config copy = *config;
  int bad = 0;
  for (; ints->key; ints++) bad |= set(root, ints->key, json_integer(*wn_model_int_at(&copy, ints)));
  return bad;
}

static int set_quantization(json_t *root, const char *scale_fmt) {
  json_t *blocks = json_pack("[ii]", 128, 128), *quantization = json_object();
  int bad = set(quantization, "activation_scheme", json_string("dynamic"));
  bad |= set(quantization, "fmt", json_string("e4m3"));
  bad |= set(quantization, "quant_method", json_string("fp8"));
  if (scale_fmt) bad |= set(quantization, "scale_fmt", json_string(scale_fmt));
  bad |= set(quantization, "weight_block_size", blocks);
  return bad | set(root, "quantization_config", quantization);
}

/* transformers matches these against the end of a module's name, and has no list of its own beside one that is given.
 * The router is no linear layer there. */
static int add_kept(json_t *names, const char *name) {
  for (size_t i = 0; i < json_array_size(names); i++) {
    const char *there = json_string_value(json_array_get(names, i));
    if (there && !strcmp(there, name)) return 0;
  }
  return json_array_append_new(names, json_string(name));
}

/* Behind what the source names already. rewritten: by train/rewrite.h, which gives a base without a low rank of the
 * queries a q_a_proj of floats; the checkpoints after the first find that in their source's list. */
static int set_kept(json_t *root, json_t *quantization, bool rewritten) {
  static const char *const floats[] = {"lm_head", "self_attn.indexer.wq_b", "self_attn.indexer.wk",
                                       "self_attn.indexer.weights_proj"};
  json_t *before = json_object_get(quantization, "modules_to_not_convert");
  json_t *names = json_is_array(before) ? json_copy(before) : json_array();
  int bad = 0;
  for (size_t i = 0; i < sizeof floats / sizeof *floats; i++) bad |= add_kept(names, floats[i]);
  if (rewritten) bad |= add_kept(names, "self_attn.q_a_proj");
  bad |= set(quantization, "modules_to_not_convert", names);
  return bad | json_object_set(root, "quantization_config", quantization);
}

static int set_all(json_t *root, const wn_model_config *c, const char *torch_dtype) {
  int bad = 0;
  for (size_t i = 0; i < sizeof dropped / sizeof *dropped; i++) json_object_del(root, dropped[i]);
  for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++) bad |= set_json(root, fixed[i].key, fixed[i].json);
  for (size_t i = 0; i < sizeof defaults / sizeof *defaults; i++)
    if (!json_object_get(root, defaults[i].key)) bad |= set_json(root, defaults[i].key, defaults[i].json);
  bad |=
      set(root, "architectures", json_pack("[s]", c->has_indexer ? "DeepseekV32ForCausalLM" : "DeepseekV3ForCausalLM"));
  bad |= set(root, "model_type", json_string(c->has_indexer ? "deepseek_v32" : "deepseek_v3"));
  bad |= set_ints(root, c, wn_model_ints);
  if (c->has_indexer) bad |= set_ints(root, c, wn_model_index_ints);
  bad |= set(root, "num_nextn_predict_layers", json_integer(c->num_nextn_predict_layers));
  bad |= set(root, "first_k_dense_replace", json_integer(c->first_k_dense_replace));
  bad |= set(root, "q_lora_rank", c->q_lora_rank ? json_integer(c->q_lora_rank) : json_null());
  bad |= set(root, "num_key_value_heads", json_integer(c->num_attention_heads));
  bad |= set(root, "norm_topk_prob", json_boolean(c->norm_topk_prob));
  bad |= set(root, "routed_scaling_factor", json_real(c->routed_scaling_factor));
  bad |= set(root, "rms_norm_eps", json_real(c->rms_norm_eps));
  bad |= set(root, "initializer_range", json_real(c->initializer_range));
  bad |= set(root, "bos_token_id", token(c->bos_token_id));
  if (!json_is_array(json_object_get(root, "eos_token_id"))) /* several: the first is what the model knows of */
    bad |= set(root, "eos_token_id", token(c->eos_token_id));
  bad |= set(root, "torch_dtype", json_string(torch_dtype));
  return bad | set_rope(root, c);
}

static void indent(FILE *out, int depth) {
  fprintf(out, "\n%*s", 2 * depth, "");
}

static int by_text(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static int print(FILE *out, json_t *value, int depth);

static int print_object(FILE *out, json_t *object, int depth) {
  size_t n = 0;
  const char *key, **keys = calloc(json_object_size(object) + 1, sizeof *keys);
  json_t *value;
  if (!keys) return -1;
  json_object_foreach(object, key, value) keys[n++] = key;
  qsort(keys, n, sizeof *keys, by_text);
  int bad = 0;
  fputc('{', out);
  for (size_t i = 0; i < n && !bad; i++) {
    if (i) fputc(',', out);
    indent(out, depth + 1);
    json_t *name = json_string(keys[i]);
    bad = print(out, name, 0);
    json_decref(name);
    fputs(": ", out);
    bad |= print(out, json_object_get(object, keys[i]), depth + 1);
  }
  if (n) indent(out, depth);
  fputc('}', out);
  free(keys);
  return bad;
}

static int print(FILE *out, json_t *value, int depth) {
  if (json_is_object(value)) return print_object(out, value, depth);
  if (json_is_array(value)) {
    size_t n = json_array_size(value);
    int bad = 0;
    fputc('[', out);
    for (size_t i = 0; i < n && !bad; i++) {
      if (i) fputc(',', out);
      indent(out, depth + 1);
      bad = print(out, json_array_get(value, i), depth + 1);
    }
    if (n) indent(out, depth);
    fputc(']', out);
    return bad;
  }
  if (json_is_real(value)) {
    char text[WN_REAL_TEXT_BYTES];
    wn_real_text(text, json_real_value(value));
    return fputs(text, out) < 0;
  }
  return json_dumpf(value, out, JSON_ENCODE_ANY);
}

typedef enum storage { FLOATS, FP8, KEPT } storage;

static wn_status save(const wn_model_config *config, const char *dir, const char *source_dir, const char *torch_dtype,
                      storage stored, const char *scale_fmt) {
  wn_status status = NULL;
  char path[WN_PATH_BYTES];
  json_t *root = NULL, *before = NULL;
  char *text = NULL;
  size_t bytes = 0;
  FILE *out = NULL;
  if (source_dir) {
    WN_TRY(wn_path(path, "%s/config.json", source_dir));
    WN_TRY(wn_model_config_parse(&root, path));
  } else {
    root = json_object();
  }
  before = json_incref(json_object_get(root, "quantization_config"));
  WN_TRY_GOTO(status, done, wn_path(path, "%s/config.json", dir));
  bool rewritten = config->q_lora_rank > 0 && json_is_null(json_object_get(root, "q_lora_rank"));
  out = open_memstream(&text, &bytes);
  int bad = !root || !out || set_all(root, config, torch_dtype);
  if (stored == FP8 || (stored == KEPT && !json_is_object(before))) bad |= set_quantization(root, scale_fmt);
  if (stored == KEPT)
    bad |= set_kept(root, json_is_object(before) ? before : json_object_get(root, "quantization_config"), rewritten);
  if (!bad) bad = print(out, root, 0);
  if (!bad) fputc('\n', out);
  if (out && fclose(out) != 0) bad = 1;
  if (bad)
    status = WN_FAIL(WN_E_MEMORY, "out of memory writing %s", path);
  else
    status = wn_write_file_atomic(path, text, bytes);
done:
  free(text);
  json_decref(before);
  json_decref(root);
  return status;
}

wn_status wn_model_config_save(const wn_model_config *config, const char *dir, const char *source_dir,
                               const char *torch_dtype) {
  WN_ASSERT(!strcmp(torch_dtype, "bfloat16") || !strcmp(torch_dtype, "float32"), "torch_dtype %s", torch_dtype);
  return save(config, dir, source_dir, torch_dtype, FLOATS, NULL);
}

wn_status wn_model_config_save_fp8(const wn_model_config *config, const char *dir, const char *source_dir,
                                   const char *scale_fmt) {
  return save(config, dir, source_dir, "bfloat16", FP8, scale_fmt);
}

wn_status wn_model_config_save_kept(const wn_model_config *config, const char *dir, const char *source_dir) {
  return save(config, dir, source_dir, "bfloat16", KEPT, NULL);
}
