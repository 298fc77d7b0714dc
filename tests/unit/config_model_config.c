#include "support/test.h"

#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "config/model_config.h"
#include "config/real_text.h"
#include "io/files.h"

static char root[WN_PATH_BYTES], path[WN_PATH_BYTES];

static int set_up(void **state) {
  (void)state;
  snprintf(root, sizeof root, "/tmp/winnow-config-XXXXXX");
  if (!mkdtemp(root)) return -1;
  OK(wn_path(path, "%s/config.json", root));
  return 0;
}

static int tear_down(void **state) {
  (void)state;
  OK(wn_remove_tree(root));
  return 0;
}

static json_t *model(const char *name) {
  char file[WN_PATH_BYTES];
  OK(wn_path(file, "configs/models/%s/config.json", name));
  json_t *config = json_load_file(file, 0, NULL);
  assert_non_null(config);
  return config;
}

/* `json` NULL removes the key. */
static void set(json_t *config, const char *key, const char *json) {
  if (!json) {
    json_object_del(config, key);
    return;
  }
  json_t *value = json_loads(json, JSON_DECODE_ANY, NULL);
  assert_non_null(value);
  assert_int_equal(json_object_set_new(config, key, value), 0);
}

static wn_status load(wn_model_config *out, json_t *config) {
  assert_int_equal(json_dump_file(config, path, 0), 0);
  json_decref(config);
  return wn_model_config_load(out, root);
}

static void released_v31(void **state) {
  (void)state;
  wn_model_config c;
  OK(wn_model_config_load(&c, "configs/models/deepseek-v3.1"));
  assert_int_equal(c.vocab_size, 129280);
  assert_int_equal(c.hidden_size, 7168);
  assert_int_equal(c.intermediate_size, 18432);
  assert_int_equal(c.moe_intermediate_size, 2048);
  assert_int_equal(c.num_hidden_layers, 61);
  assert_int_equal(c.first_k_dense_replace, 3);
  assert_int_equal(c.num_attention_heads, 128);
  assert_int_equal(c.n_routed_experts, 256);
  assert_int_equal(c.n_shared_experts, 1);
  assert_int_equal(c.num_experts_per_tok, 8);
  assert_int_equal(c.n_group, 8);
  assert_int_equal(c.topk_group, 4);
  assert_true(c.norm_topk_prob);
  assert_true(c.routed_scaling_factor == 2.5);
  assert_int_equal(c.q_lora_rank, 1536);
  assert_int_equal(c.kv_lora_rank, 512);
  assert_int_equal(c.qk_nope_head_dim, 128);
  assert_int_equal(c.qk_rope_head_dim, 64);
  assert_int_equal(c.v_head_dim, 128);
  assert_false(c.has_indexer);
  assert_int_equal(c.index_topk, 0);
  assert_true(c.rms_norm_eps == 1e-6 && c.rope_theta == 10000 && c.initializer_range == 0.02);
  assert_int_equal(c.max_position_embeddings, 163840);
  assert_true(c.yarn && c.rope_factor == 40 && c.beta_fast == 32 && c.beta_slow == 1);
  assert_true(c.mscale == 1 && c.mscale_all_dim == 1);
  assert_int_equal(c.original_max_position_embeddings, 4096);
  assert_int_equal(c.bos_token_id, 0);
  assert_int_equal(c.eos_token_id, 1);
  assert_false(wn_model_config_is_moe(&c, 2));
  assert_true(wn_model_config_is_moe(&c, 3));
}

static void released_v32(void **state) {
  (void)state;
  wn_model_config c, dense;
  OK(wn_model_config_load(&c, "configs/models/deepseek-v3.2"));
  OK(wn_model_config_load(&dense, "configs/models/deepseek-v3.1"));
  assert_true(c.has_indexer);
  assert_int_equal(c.index_n_heads, 64);
  assert_int_equal(c.index_head_dim, 128);
  assert_int_equal(c.index_topk, 2048);
  dense.has_indexer = true;
  dense.index_n_heads = 64;
  dense.index_head_dim = 128;
  dense.index_topk = 2048;
  assert_memory_equal(&c, &dense, sizeof c);
}

/* As transformers 5 saves small models. */
static void the_newer_form(void **state) {
  (void)state;
  wn_model_config c;
  json_t *config = model("tiny");
  set(config, "rope_theta", NULL);
  set(config, "rope_scaling", NULL);
  set(config, "rope_parameters", "{\"rope_theta\": 50000.0, \"rope_type\": \"default\"}");
  set(config, "first_k_dense_replace", NULL);
  set(config, "mlp_layer_types", "[\"dense\", \"dense\", \"sparse\", \"sparse\"]");
  set(config, "dtype", "\"float32\"");
  set(config, "rope_interleave", "true");
  set(config, "bos_token_id", NULL);
  set(config, "eos_token_id", "null");
  OK(load(&c, config));
  assert_true(c.rope_theta == 50000 && !c.yarn);
  assert_int_equal(c.first_k_dense_replace, 2);
  assert_int_equal(c.bos_token_id, -1);
  assert_int_equal(c.eos_token_id, -1);

  config = model("tiny");
  set(config, "rope_scaling", NULL); /* rope_theta may stay at the top */
  set(config, "rope_parameters",
      "{\"rope_type\": \"yarn\", \"factor\": 4.0, \"mscale\": 0.7, \"mscale_all_dim\": 0.7, \"beta_fast\": null,"
      " \"original_max_position_embeddings\": 128}");
  OK(load(&c, config));
  assert_true(c.yarn && c.rope_theta == 10000 && c.rope_factor == 4 && c.beta_fast == 32 && c.beta_slow == 1);

  config = model("tiny");
  set(config, "mlp_layer_types", "[\"sparse\", \"sparse\", \"sparse\", \"sparse\"]");
  set(config, "first_k_dense_replace", "null");
  OK(load(&c, config));
  assert_int_equal(c.first_k_dense_replace, 0);
}

/* docs/relatives.md's table. */
static void relatives(void **state) {
  (void)state;
  wn_model_config c;
  OK(wn_model_config_load(&c, "configs/models/moonlight"));
  assert_int_equal(c.q_lora_rank, 0);
  assert_int_equal(c.n_group, 1);
  assert_true(c.rope_theta == 50000 && c.rms_norm_eps == 1e-5 && !c.yarn);
  OK(wn_model_config_load(&c, "configs/models/glm-4.7-flash"));
  assert_int_equal(c.qk_nope_head_dim, 192);
  assert_int_equal(c.v_head_dim, 256);
  assert_int_equal(c.num_attention_heads, 20);
  assert_int_equal(c.eos_token_id, 154820);
  assert_true(c.rope_theta == 1e6 && c.rms_norm_eps == 1e-5);
  OK(wn_model_config_load(&c, "configs/models/kimi-k2"));
  assert_int_equal(c.n_routed_experts, 384);
  assert_true(c.yarn && c.beta_fast == 1 && c.beta_slow == 1);
  OK(wn_model_config_load(&c, "tests/fixtures/relatives/academic-ds-9b"));
  assert_int_equal(c.q_lora_rank, 1024);
  wn_status status = wn_model_config_load(&c, "tests/fixtures/relatives/glm-5");
  assert_non_null(strstr(wn_status_hint(status), "interleaved"));
  REFUSED(status, WN_E_CONFIG, "model_type is glm_moe_dsa");
  status = wn_model_config_load(&c, "tests/fixtures/relatives/deepseek-v2-lite");
  assert_non_null(strstr(wn_status_hint(status), "softmax"));
  REFUSED(status, WN_E_CONFIG, "model_type is deepseek_v2");
}

/* What is V3 under another name is written as V3, with what V3 says of it; an indexer asks for low-rank queries. */
static void relatives_are_written_as_v3(void **state) {
  (void)state;
  static const char *const names[] = {"configs/models/moonlight", "configs/models/glm-4.7-flash",
                                      "configs/models/kimi-k2"};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    wn_model_config c, again;
    OK(wn_model_config_load(&c, names[i]));
    OK(wn_model_config_save(&c, root, names[i], "bfloat16"));
    json_t *written = json_load_file(path, 0, NULL);
    assert_string_equal(json_string_value(json_object_get(written, "model_type")), "deepseek_v3");
    assert_true(json_is_null(json_object_get(written, "q_lora_rank")) == (i == 0));
    assert_true(json_is_array(json_object_get(written, "eos_token_id")) == (i == 1));
    OK(wn_model_config_load(&again, root));
    assert_memory_equal(&again, &c, sizeof c);
    set(written, "model_type", "\"deepseek_v32\"");
    set(written, "index_n_heads", "64");
    set(written, "index_head_dim", "128");
    set(written, "index_topk", "2048");
    wn_status status = load(&c, written);
    if (i > 0)
      OK(status);
    else
      REFUSED(status, WN_E_CONFIG, "q_lora_rank is null in a model with an indexer");
  }
}

static void refusals(void **state) {
  (void)state;
  static const struct {
    const char *key, *json, *part;
  } cases[] = {
      {"model_type", NULL, "model_type is missing"},
      {"model_type", "\"deepseek_v2\"", "model_type is deepseek_v2"},
      {"model_type", "\"glm4_moe\"", "model_type is glm4_moe; Winnow reads"},
      {"model_type", "\"kimi_linear\"", "model_type is kimi_linear"},
      {"model_type", "\"deepseek_v32\"", "index_n_heads is missing"},
      {"index_topk", "16", "has index_topk, but model_type is deepseek_v3"},
      {"vocab_size", NULL, "vocab_size is missing"},
      {"vocab_size", "null", "vocab_size is missing"},
      {"vocab_size", "\"257\"", "vocab_size is not a whole number"},
      {"vocab_size", "257.0", "vocab_size is not a whole number"},
      {"vocab_size", "true", "vocab_size is not a whole number"},
      {"hidden_size", "0", "hidden_size is 0; allowed are 1 to"},
      {"hidden_size", "-4", "hidden_size is -4"},
      {"hidden_size", "4294967424", "hidden_size is 4294967424"}, /* 128 in 32 bits */
      {"q_lora_rank", NULL, "q_lora_rank is missing"},
      {"q_lora_rank", "0", "q_lora_rank is 0; allowed are 1 to"},
      {"scoring_func", "\"softmax\"", "scoring_func is \"softmax\"; Winnow has only \"sigmoid\""},
      {"topk_method", "\"greedy\"", "topk_method is \"greedy\""},
      {"hidden_act", "\"gelu\"", "hidden_act is \"gelu\""},
      {"attention_bias", "true", "attention_bias is true"},
      {"attention_dropout", "0.1", "attention_dropout is 0.1"},
      {"attention_dropout", "\"0\"", "attention_dropout is \"0\""},
      {"mlp_bias", "true", "mlp_bias is true"},
      {"tie_word_embeddings", "true", "tie_word_embeddings is true"},
      {"moe_layer_freq", "2", "moe_layer_freq is 2"},
      {"rope_interleave", "false", "rope_interleave is false"},
      {"indexer_rope_interleave", "true", "indexer_rope_interleave is true"},
      {"first_k_dense_replace", NULL, "first_k_dense_replace is missing"},
      {"first_k_dense_replace", "5", "first_k_dense_replace is 5; allowed are 0 to 4"},
      {"mlp_layer_types", "[\"dense\"]", "not a list of num_hidden_layers = 4"},
      {"mlp_layer_types", "[\"dense\", \"sparse\", \"dense\", \"sparse\"]", "mlp_layer_types[2] is dense"},
      {"mlp_layer_types", "[\"dense\", \"sparse\", 3, \"sparse\"]", "mlp_layer_types[2] is not a string"},
      {"mlp_layer_types", "[\"dense\", \"dense\", \"sparse\", \"sparse\"]", "first_k_dense_replace is 1, but"},
      {"layer_types", "[\"full_attention\"]", "layer_types[0] is full_attention"},
      {"norm_topk_prob", "1", "norm_topk_prob is not true or false"},
      {"rms_norm_eps", "0", "rms_norm_eps is 0; allowed is above 0"},
      {"rms_norm_eps", "\"1e-6\"", "rms_norm_eps is not a number"},
      {"routed_scaling_factor", NULL, "routed_scaling_factor is missing"},
      {"n_group", "3", "n_routed_experts 8 is not a multiple of n_group 3"},
      {"topk_group", "3", "topk_group 3 is above n_group 2"},
      {"num_experts_per_tok", "5", "num_experts_per_tok 5 is above the 4 experts"},
      {"qk_rope_head_dim", "15", "qk_rope_head_dim 15 is odd"},
      {"num_key_value_heads", "2", "num_key_value_heads 2 differs"},
      {"eos_token_id", "257", "eos_token_id is 257; allowed are 0 to 256"},
      {"eos_token_id", "[257, 2]", "eos_token_id is 257"},
      {"eos_token_id", "[]", "eos_token_id is not a whole number"},
      {"eos_token_id", "[[1]]", "eos_token_id is not a whole number"},
      {"partial_rotary_factor", "0.5", "partial_rotary_factor is 0.5"},
      {"rope_theta", NULL, "rope_theta is missing"},
      {"rope_theta", "1", "rope_theta is 1; allowed is above 1"},
      {"rope_scaling", "3", "rope_scaling is not an object"},
      {"rope_parameters", "[]", "rope_parameters is not an object"},
      {"rope_parameters", "{\"rope_theta\": 5000}", "rope_theta and rope_parameters.rope_theta differ"},
      {"rope_parameters", "{\"partial_rotary_factor\": 0.5}", "partial_rotary_factor is 0.5"},
      {"rope_scaling", "{\"type\": \"linear\", \"factor\": 2}", "rope_scaling.type is linear"},
      {"rope_scaling", "{\"type\": 3}", "rope_scaling.type is not a string"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    wn_model_config c;
    json_t *config = model("tiny");
    set(config, cases[i].key, cases[i].json);
    wn_status status = load(&c, config);
    if (!status) print_error("accepted: %s = %s\n", cases[i].key, cases[i].json ? cases[i].json : "(absent)");
    if (status) assert_non_null(strstr(wn_status_text(status), path));
    REFUSED(status, WN_E_CONFIG, cases[i].part);
  }
}

static void refusals_of_yarn(void **state) {
  (void)state;
  static const struct {
    const char *key, *json, *part;
  } cases[] = {
      {"factor", NULL, "rope_scaling.factor is missing"},
      {"factor", "0.5", "rope_scaling.factor is 0.5"},
      {"factor", "null", "rope_scaling.factor is missing"},
      {"beta_fast", "0.5", "beta_fast 0.5 is below beta_slow 1"},
      {"beta_slow", "0", "rope_scaling.beta_slow is 0"},
      {"original_max_position_embeddings", NULL, "rope_scaling.original_max_position_embeddings is missing"},
      {"truncate", "false", "rope_scaling.truncate is not true"},
      {"mscale", "0.707", "mscale 0.707 and mscale_all_dim 1 scale cos and sin"},
      {"mscale_all_dim", NULL, "scale cos and sin by 1.36888795"},
      {"mscale", "-1", "rope_scaling.mscale"},
      {"attention_factor", "1.2", "scale cos and sin by 1.2"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    wn_model_config c;
    json_t *config = model("deepseek-v3.1");
    set(json_object_get(config, "rope_scaling"), cases[i].key, cases[i].json);
    REFUSED(load(&c, config), WN_E_CONFIG, cases[i].part);
  }
  wn_model_config c;
  json_t *config = model("deepseek-v3.1");
  set(config, "rope_parameters", "{}");
  REFUSED(load(&c, config), WN_E_CONFIG, "both rope_scaling and rope_parameters");
  config = model("deepseek-v3.2");
  set(config, "index_head_dim", "32");
  REFUSED(load(&c, config), WN_E_CONFIG, "index_head_dim 32 is below qk_rope_head_dim 64");
  config = model("deepseek-v3.2");
  set(config, "index_topk", NULL);
  REFUSED(load(&c, config), WN_E_CONFIG, "index_topk is missing");
}

static void files_that_are_none(void **state) {
  (void)state;
  wn_model_config c;
  REFUSED(wn_model_config_load(&c, root), WN_E_CONFIG, "config.json is absent");
  OK(wn_write_file_atomic(path, "{\n\"a\": }", 8));
  REFUSED(wn_model_config_load(&c, root), WN_E_CONFIG, "config.json:2: bad JSON");
  OK(wn_write_file_atomic(path, "[]", 2));
  REFUSED(wn_model_config_load(&c, root), WN_E_CONFIG, "not a JSON object");
  OK(wn_write_file_atomic(path, "{\"a\":1,\"a\":2}", 13));
  REFUSED(wn_model_config_load(&c, root), WN_E_CONFIG, "duplicate");
}

/* From transformers 5.17's rotary embeddings, run on the same configurations: exact bits, one unit in the last place
 * allowed where its vectorised pow rounds otherwise. */
static void expect_inv_freq(const wn_model_config *c, const float *expected, int n) {
  float got[64];
  assert_int_equal(c->qk_rope_head_dim, 2 * n);
  wn_model_config_inv_freq(c, got);
  for (int j = 0; j < n; j++)
    if (!(fabsf(got[j] - expected[j]) <= ldexpf(expected[j], -23)))
      fail_msg("pair %d: %a, expected %a", j, got[j], expected[j]);
}

static void rope_frequencies(void **state) {
  (void)state;
  static const float v3[32] = {0x1.000000p+0f,  0x1.7ff222p-1f,  0x1.1feb34p-1f,  0x1.afd136p-2f,  0x1.43d136p-2f,
                               0x1.e5a846p-3f,  0x1.6c310ep-3f,  0x1.111aeep-3f,  0x1.99999ap-4f,  0x1.33281ap-4f,
                               0x1.ccab84p-5f,  0x1.3f8b74p-5f,  0x1.b86436p-6f,  0x1.2d1b86p-6f,  0x1.97e506p-7f,
                               0x1.111aeep-7f,  0x1.6872b2p-8f,  0x1.d2e0ccp-9f,  0x1.26d42cp-9f,  0x1.67459ap-10f,
                               0x1.9e7c6ep-11f, 0x1.b32624p-12f, 0x1.74eea6p-13f, 0x1.17a8e2p-15f, 0x1.a36e2ep-16f,
                               0x1.3a8746p-16f, 0x1.d7b9e0p-17f, 0x1.61bea2p-17f, 0x1.094566p-17f, 0x1.8dd9bap-18f,
                               0x1.2a5884p-18f, 0x1.bf749ep-19f};
  static const float plain[8] = {0x1.000000p+0f, 0x1.43d136p-2f, 0x1.99999ap-4f,  0x1.030dc6p-5f,
                                 0x1.47ae14p-7f, 0x1.9e7c70p-9f, 0x1.0624dep-10f, 0x1.4b96c0p-12f};
  static const float odd[12] = {0x1.000000p+0f,  0x1.9fa446p-2f,  0x1.516b04p-3f,  0x1.b0dae0p-5f,
                                0x1.020da4p-6f,  0x1.0b6e62p-8f,  0x1.b2338cp-10f, 0x1.607c1cp-11f,
                                0x1.1e25aap-12f, 0x1.d096b4p-14f, 0x1.79273ep-15f, 0x1.322c48p-16f};
  wn_model_config c;
  OK(wn_model_config_load(&c, "configs/models/deepseek-v3.1"));
  expect_inv_freq(&c, v3, 32);
  assert_true(fabs(wn_model_config_softmax_scale(&c) - 0.1352337788608801) < 1e-16);
  OK(wn_model_config_load(&c, "configs/models/tiny"));
  expect_inv_freq(&c, plain, 8);
  assert_true(fabs(wn_model_config_softmax_scale(&c) - 0.1767766952966369) < 1e-16);
  json_t *config = model("tiny");
  set(config, "rope_theta", "50000.0");
  set(config, "qk_rope_head_dim", "24");
  set(config, "rope_scaling",
      "{\"type\": \"yarn\", \"factor\": 2.7, \"beta_fast\": 16, \"beta_slow\": 2, \"mscale\": 0.707,"
      " \"mscale_all_dim\": 0.707, \"original_max_position_embeddings\": 1000}");
  OK(load(&c, config));
  expect_inv_freq(&c, odd, 12);
  assert_true(fabs(wn_model_config_softmax_scale(&c) - 0.18110001390208252) < 1e-16);
}

static char *text_of(const char *dir) {
  char file[WN_PATH_BYTES], *text;
  OK(wn_path(file, "%s/config.json", dir));
  OK(wn_read_file(&text, NULL, file, 10000));
  return text;
}

/* `text` without the lines from the one that holds `first` to the one that holds `last`. */
static void cut_lines(char *text, const char *first, const char *last) {
  char *from = strstr(text, first);
  assert_non_null(from);
  char *to = strstr(from, last);
  assert_non_null(to);
  while (from > text && from[-1] != '\n') from--;
  to = strchr(to, '\n') + 1;
  memmove(from, to, strlen(to) + 1);
}

static void v31_becomes_v32(void **state) {
  (void)state;
  wn_model_config c, again;
  OK(wn_model_config_load(&c, "configs/models/deepseek-v3.1"));
  c.has_indexer = true;
  c.index_n_heads = 64;
  c.index_head_dim = 128;
  c.index_topk = 2048;
  OK(wn_model_config_save(&c, root, "configs/models/deepseek-v3.1", "bfloat16"));
  char *got = text_of(root), *expected = text_of("configs/models/deepseek-v3.2");
  cut_lines(expected, "quantization_config", "},");
  assert_string_equal(got, expected); /* to the byte: no FP8, hence no quantization_config */
  free(got);
  free(expected);
  OK(wn_model_config_load(&again, root));
  assert_memory_equal(&again, &c, sizeof c);
}

/* Where mscale and mscale_all_dim alone would scale cos and sin, the factor that was given travels along. Found by
 * fuzzing. */
static void a_given_attention_factor_is_kept(void **state) {
  (void)state;
  wn_model_config c, again;
  json_t *config = model("tiny");
  set(config, "rope_scaling",
      "{\"type\": \"yarn\", \"factor\": 40, \"mscale\": 1.0, \"attention_factor\": 1.0,"
      " \"original_max_position_embeddings\": 4096}");
  OK(load(&c, config));
  OK(wn_model_config_save(&c, root, NULL, "float32"));
  OK(wn_model_config_load(&again, root));
  assert_memory_equal(&again, &c, sizeof c);
}

static void v32_becomes_v31(void **state) {
  (void)state;
  wn_model_config c;
  OK(wn_model_config_load(&c, "configs/models/deepseek-v3.2"));
  c.has_indexer = false;
  OK(wn_model_config_save(&c, root, "configs/models/deepseek-v3.2", "bfloat16"));
  char *got = text_of(root), *expected = text_of("configs/models/deepseek-v3.1");
  cut_lines(expected, "quantization_config", "},");
  cut_lines(expected, "auto_map", "},");
  assert_string_equal(got, expected);
  free(got);
  free(expected);
}

/* The released file itself, byte for byte; and without scale_fmt, as V3's first weights are. */
static void fp8_is_the_released_file(void **state) {
  (void)state;
  wn_model_config c;
  OK(wn_model_config_load(&c, "configs/models/deepseek-v3.2"));
  OK(wn_model_config_save_fp8(&c, root, "configs/models/deepseek-v3.2", "ue8m0"));
  char *got = text_of(root), *expected = text_of("configs/models/deepseek-v3.2");
  assert_string_equal(got, expected);
  free(got);
  OK(wn_model_config_save_fp8(&c, root, "configs/models/deepseek-v3.2", NULL));
  got = text_of(root);
  cut_lines(expected, "scale_fmt", "ue8m0");
  assert_string_equal(got, expected);
  free(got);
  free(expected);
}

/* A base that stays in FP8 beside an indexer that does not: what the source says of its storage, and the names of what
 * is stored otherwise. */
static void fp8_that_is_kept(void **state) {
  (void)state;
  wn_model_config c;
  json_t *source = model("deepseek-v3.2"), *got, *quantization;
  OK(wn_model_config_load(&c, "configs/models/deepseek-v3.2"));
  for (int k = 0; k < 2; k++) { /* as released; without a word, as of a directory whose tensors alone say it */
    char file[WN_PATH_BYTES], dir[WN_PATH_BYTES];
    OK(wn_path(dir, "%s/source", root));
    OK(wn_make_dirs(dir));
    OK(wn_path(file, "%s/config.json", dir));
    if (k) assert_int_equal(json_object_del(source, "quantization_config"), 0);
    assert_int_equal(json_dump_file(source, file, 0), 0);
    OK(wn_model_config_save_kept(&c, root, dir));
    got = json_load_file(path, 0, NULL);
    assert_non_null(got);
    quantization = json_object_get(got, "quantization_config");
    assert_int_equal(json_array_size(json_object_get(quantization, "modules_to_not_convert")), 4);
    assert_int_equal(json_object_del(quantization, "modules_to_not_convert"), 0);
    if (k == 0) assert_true(json_equal(got, source));
    assert_string_equal(json_string_value(json_object_get(quantization, "quant_method")), "fp8");
    json_decref(got);
  }
  json_decref(source);
}

/* The matrix that the rewriting of queries without a low rank adds to a base that stays FP8: named at the first
 * checkpoint, whose source has no low rank, and at those that follow from it. */
static void fp8_that_is_kept_beside_rewritten_queries(void **state) {
  (void)state;
  wn_model_config c;
  json_t *source = model("moonlight"), *got;
  OK(load(&c, source));
  c.q_lora_rank = c.hidden_size;
  c.has_indexer = true;
  c.index_n_heads = 64;
  c.index_head_dim = 128;
  c.index_topk = 2048;
  for (int k = 0; k < 2; k++) { /* in place: the second reads what the first wrote */
    OK(wn_model_config_save_kept(&c, root, root));
    got = json_load_file(path, 0, NULL);
    const json_t *names = json_object_get(json_object_get(got, "quantization_config"), "modules_to_not_convert");
    assert_int_equal(json_array_size(names), 5);
    assert_string_equal(json_string_value(json_array_get(names, 4)), "self_attn.q_a_proj");
    json_decref(got);
  }
}

/* What the source has as floats besides stays named. */
static void fp8_that_is_kept_beside_other_floats(void **state) {
  (void)state;
  static const char *const expected[] = {"lm_head", "self_attn.kv_b_proj", "self_attn.indexer.wq_b",
                                         "self_attn.indexer.wk", "self_attn.indexer.weights_proj"};
  wn_model_config c;
  json_t *source = model("deepseek-v3.2"), *got;
  assert_int_equal(json_object_set_new(json_object_get(source, "quantization_config"), "modules_to_not_convert",
                                       json_pack("[ss]", expected[0], expected[1])),
                   0);
  OK(load(&c, source));
  OK(wn_model_config_save_kept(&c, root, root));
  got = json_load_file(path, 0, NULL);
  const json_t *names = json_object_get(json_object_get(got, "quantization_config"), "modules_to_not_convert");
  assert_int_equal(json_array_size(names), 5);
  for (size_t i = 0; i < 5; i++) assert_string_equal(json_string_value(json_array_get(names, i)), expected[i]);
  json_decref(got);
}

static void without_a_source(void **state) {
  (void)state;
  wn_model_config c, again;
  OK(wn_model_config_load(&c, "configs/models/tiny"));
  OK(wn_model_config_save(&c, root, NULL, "float32"));
  char *got = text_of(root), *expected = text_of("configs/models/tiny");
  assert_string_equal(got, expected);
  free(got);
  free(expected);
  OK(wn_model_config_load(&again, root));
  assert_memory_equal(&again, &c, sizeof c);
}

static void unknown_keys_are_carried_over(void **state) {
  (void)state;
  wn_model_config c;
  char other[WN_PATH_BYTES];
  OK(wn_path(other, "%s/other", root));
  OK(wn_make_dirs(other));
  json_t *config = model("tiny");
  set(config, "zz_note", "{\"b\": [1, 2.50, \"\\u00e9\\n\"], \"a\": {}, \"c\": [], \"d\": 1e-7}");
  set(config, "num_nextn_predict_layers", "1");
  set(config, "mlp_layer_types", "[\"dense\", \"sparse\", \"sparse\", \"sparse\"]");
  set(config, "rope_theta", NULL);
  set(config, "rope_scaling", NULL);
  set(config, "rope_parameters", "{\"rope_type\": \"default\", \"rope_theta\": 10000.5}");
  set(config, "dtype", "\"bfloat16\"");
  OK(load(&c, config));
  OK(wn_model_config_save(&c, other, root, "float32"));
  char *got = text_of(other);
  assert_non_null(strstr(got,
                         "  \"zz_note\": {\n    \"a\": {},\n    \"b\": [\n      1,\n      2.5,\n      \"\xc3\xa9\\n\"\n"
                         "    ],\n    \"c\": [],\n    \"d\": 1e-07\n  }\n}\n"));
  assert_non_null(strstr(got, "\"num_nextn_predict_layers\": 1,"));
  assert_non_null(strstr(got, "\"rope_theta\": 10000.5,"));
  assert_null(strstr(got, "mlp_layer_types"));
  assert_null(strstr(got, "rope_parameters"));
  assert_null(strstr(got, "\"dtype\""));
  free(got);
  REFUSED(wn_model_config_save(&c, "/proc/absent", NULL, "float32"), WN_E_IO, "/proc/absent");
  REFUSED(wn_model_config_save(&c, root, "/absent", "float32"), WN_E_IO, "/absent");
}

static void real_texts(void **state) {
  (void)state;
  static const struct {
    double value;
    const char *text;
  } cases[] = {
      {0, "0.0"},
      {1, "1.0"},
      {-2.5, "-2.5"},
      {1e-6, "1e-06"},
      {0.001, "0.001"},
      {7.3e-6, "7.3e-06"},
      {10000, "10000.0"},
      {0.1, "0.1"},
      {1e16, "1e+16"},
      {1e15, "1000000000000000.0"},
      {1.0 / 3, "0.3333333333333333"},
      {123456.75, "123456.75"},
      {1e-4, "0.0001"},
      {5e-324, "5e-324"},
      {0.1 + 0.2, "0.30000000000000004"},
      {INFINITY, "inf"},
  };
  char text[WN_REAL_TEXT_BYTES];
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    wn_real_text(text, cases[i].value);
    assert_string_equal(text, cases[i].text);
  }
  for (uint64_t i = 0; i < 20000; i++) {
    double value = ldexp(wn_rng_uniform(1, WN_RNG_TEST, i) - 0.5, (int)wn_rng_below(2, WN_RNG_TEST, i, 2000) - 1000);
    wn_real_text(text, value);
    assert_true(strtod(text, NULL) == value);
  }
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
  const struct CMUnitTest tests[] = {
      TEST(released_v31),
      TEST(released_v32),
      TEST(the_newer_form),
      TEST(refusals),
      TEST(relatives),
      TEST(relatives_are_written_as_v3),
      TEST(refusals_of_yarn),
      TEST(files_that_are_none),
      TEST(rope_frequencies),
      TEST(v31_becomes_v32),
      TEST(a_given_attention_factor_is_kept),
      TEST(v32_becomes_v31),
      TEST(fp8_is_the_released_file),
      TEST(fp8_that_is_kept),
      TEST(fp8_that_is_kept_beside_rewritten_queries),
      TEST(fp8_that_is_kept_beside_other_floats),
      TEST(without_a_source),
      TEST(unknown_keys_are_carried_over),
      TEST(real_texts),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
