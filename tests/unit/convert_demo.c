/* The demo's shards against tests/fixtures/demo_shards.json, which tests/oracle/demo_shards.py makes from the
 * converter's description alone; and what the released converter gets wrong. */
#include "support/conversion.h"

static json_t *fixture;

static int load_fixture(void **state) {
  (void)state;
  fixture = json_load_file("tests/fixtures/demo_shards.json", 0, NULL);
  return fixture ? 0 : -1;
}

static int free_fixture(void **state) {
  (void)state;
  json_decref(fixture);
  return 0;
}

static wn_model_config small_config(void) {
  wn_model_config c = conv_odd_config();
  c.vocab_size = 20;
  c.num_attention_heads = 4;
  return c;
}

static wn_model_config bf16_config(void) {
  wn_model_config c = small_config();
  c.hidden_size = 40;
  c.intermediate_size = 28;
  c.moe_intermediate_size = 12;
  c.n_routed_experts = 8;
  c.q_lora_rank = 18;
  c.kv_lora_rank = 14;
  c.qk_nope_head_dim = 6;
  c.qk_rope_head_dim = 4;
  c.v_head_dim = 5;
  c.index_n_heads = 3;
  c.index_head_dim = 10;
  return c;
}

static wn_model_config fp8_config(void) {
  wn_model_config c = small_config();
  c.hidden_size = 136;
  c.intermediate_size = 512;
  c.moe_intermediate_size = 512;
  c.n_routed_experts = 4;
  c.q_lora_rank = 72;
  c.kv_lora_rank = 40;
  c.qk_nope_head_dim = 128;
  c.qk_rope_head_dim = 128;
  c.v_head_dim = 128;
  c.index_n_heads = 2;
  c.index_head_dim = 160;
  return c;
}

static wn_model_config fp8_dense_config(void) {
  wn_model_config c = fp8_config();
  c.has_indexer = false;
  c.hidden_size = 130;
  c.intermediate_size = 1024;
  c.n_routed_experts = 8;
  c.q_lora_rank = 129;
  c.kv_lora_rank = 16;
  return c;
}

static const conv_dir fp8 = {.stored = CONV_RELEASED, .scales = WN_F32, .powers = true, .mtp = 1, .shards = 3};
static const conv_dir bf16 = {.stored = CONV_BF16, .mtp = 1, .shards = 2};

/* As in demo_shards.py. */
static uint64_t digest(const wn_st_entry *entry) {
  uint64_t sum = 0;
  for (uint64_t i = 0; i < entry->bytes; i++) sum += (((const unsigned char *)entry->data)[i] + 1u) * conv_hash(i);
  return sum;
}

static void expect_tensor(const wn_st_entry *entry, const json_t *want) {
  char text[20];
  if (!want) fail_msg("%s is in no shard of the converter's", entry->name);
  assert_string_equal(wn_dtype_name(entry->dtype), json_string_value(json_array_get(want, 0)));
  const json_t *shape = json_array_get(want, 1);
  assert_int_equal(entry->rank, json_array_size(shape));
  for (int32_t d = 0; d < entry->rank; d++)
    assert_int_equal(entry->dim[d], json_integer_value(json_array_get(shape, (size_t)d)));
  snprintf(text, sizeof text, "%016llx", (unsigned long long)digest(entry));
  if (strcmp(text, json_string_value(json_array_get(want, 2))) != 0) fail_msg("%s holds other bytes", entry->name);
}

static void expect_shards(const char *out, const char *name, int32_t of) {
  char number[16], path[WN_PATH_BYTES];
  snprintf(number, sizeof number, "%d", of);
  const json_t *shards = json_object_get(json_object_get(fixture, name), number);
  assert_int_equal(json_array_size(shards), of);
  for (int32_t shard = 0; shard < of; shard++) {
    const json_t *want = json_array_get(shards, (size_t)shard);
    wn_safetensors *file;
    OK(wn_path(path, "%s/model%d-mp%d.safetensors", out, shard, of));
    OK(wn_safetensors_open(&file, path));
    assert_int_equal(wn_safetensors_count(file), json_object_size(want));
    for (int64_t i = 0; i < wn_safetensors_count(file); i++) {
      const wn_st_entry *entry = wn_safetensors_at(file, i);
      expect_tensor(entry, json_object_get(want, entry->name));
    }
    wn_safetensors_close(file);
  }
}

static void try_demo(void **state, const char *name, wn_model_config config, conv_dir how) {
  char place[32];
  wn_temp_path in = wn_temp(state, "in");
  conv_write_dir(in.text, &config, how);
  for (int32_t of = 1; of <= 4; of *= 2) {
    snprintf(place, sizeof place, "out%d", of);
    wn_temp_path out = wn_temp(state, place);
    wn_convert_job job = conv_job(in.text, out.text, WN_TO_DEMO);
    job.model_parallel = of;
    OK(wn_convert(&job, NULL));
    expect_shards(out.text, name, of);
  }
}

static void shards_of_bf16(void **state) {
  try_demo(state, "bf16", bf16_config(), bf16);
}

static void shards_of_fp8(void **state) {
  try_demo(state, "fp8", fp8_config(), fp8);
}

static void shards_of_a_dense_model(void **state) {
  conv_dir how = fp8;
  how.powers = false;
  try_demo(state, "fp8_dense", fp8_dense_config(), how);
}

/* ---- its configuration ---- */

static void expect_config(const char *out, const char *want) {
  char path[WN_PATH_BYTES], *text;
  OK(wn_path(path, "%s/demo_config.json", out));
  json_t *config = json_load_file(path, 0, NULL), *expected = json_loads(want, 0, NULL);
  assert_true(config && expected);
  text = json_dumps(config, JSON_INDENT(1));
  if (!json_equal(config, expected)) fail_msg("the demo's configuration is %s", text);
  free(text);
  json_decref(config);
  json_decref(expected);
}

static void configurations(void **state) {
  wn_model_config config = fp8_config();
  wn_temp_path in = wn_temp(state, "in"), out = wn_temp(state, "out");
  config.yarn = true;
  config.rope_factor = 40;
  config.beta_fast = 32;
  config.beta_slow = 1;
  config.mscale = config.mscale_all_dim = 1;
  config.original_max_position_embeddings = 4096;
  config.max_position_embeddings = 163840;
  conv_write_dir(in.text, &config, fp8);
  wn_convert_job job = conv_job(in.text, out.text, WN_TO_DEMO);
  OK(wn_convert(&job, NULL));
  expect_config(out.text,
                "{\"vocab_size\": 20, \"dim\": 136, \"inter_dim\": 512, \"moe_inter_dim\": 512, \"n_layers\": 2,"
                "\"n_dense_layers\": 1, \"n_heads\": 4, \"n_routed_experts\": 4, \"n_shared_experts\": 1,"
                "\"n_activated_experts\": 2, \"n_expert_groups\": 2, \"n_limited_groups\": 1, \"route_scale\": 1.5,"
                "\"score_func\": \"sigmoid\", \"q_lora_rank\": 72, \"kv_lora_rank\": 40, \"qk_nope_head_dim\": 128,"
                "\"qk_rope_head_dim\": 128, \"v_head_dim\": 128, \"dtype\": \"fp8\", \"scale_fmt\": \"ue8m0\","
                "\"index_n_heads\": 2, \"index_head_dim\": 160, \"index_topk\": 16, \"max_seq_len\": 16384,"
                "\"original_seq_len\": 4096, \"rope_theta\": 10000.0, \"rope_factor\": 40.0, \"beta_fast\": 32,"
                "\"beta_slow\": 1, \"mscale\": 1.0}");
  OK(wn_remove_tree(in.text));
  OK(wn_remove_tree(out.text));
  config = fp8_dense_config();
  conv_dir how = fp8;
  how.powers = false;
  config.routed_scaling_factor = 2.446;
  conv_write_dir(in.text, &config, how);
  OK(wn_convert(&job, NULL));
  char *text;
  OK(wn_read_file(&text, NULL, wn_temp(state, "out/demo_config.json").text, 10000));
  assert_non_null(strstr(text, "\"route_scale\": 2.446,"));
  free(text);
  expect_config(out.text,
                "{\"vocab_size\": 20, \"dim\": 130, \"inter_dim\": 1024, \"moe_inter_dim\": 512, \"n_layers\": 2,"
                "\"n_dense_layers\": 1, \"n_heads\": 4, \"n_routed_experts\": 8, \"n_shared_experts\": 1,"
                "\"n_activated_experts\": 2, \"n_expert_groups\": 2, \"n_limited_groups\": 1, \"route_scale\": 2.446,"
                "\"score_func\": \"sigmoid\", \"q_lora_rank\": 129, \"kv_lora_rank\": 16, \"qk_nope_head_dim\": 128,"
                "\"qk_rope_head_dim\": 128, \"v_head_dim\": 128, \"dtype\": \"fp8\", \"scale_fmt\": null,"
                "\"max_seq_len\": 4096, \"original_seq_len\": 4096, \"rope_theta\": 10000.0}");
}

/* ---- what must be refused ---- */

static void refuse(void **state, wn_model_config config, conv_dir how, int32_t of, wn_code code, const char *part) {
  wn_temp_path in = wn_temp(state, "in"), out = wn_temp(state, "out");
  OK(wn_remove_tree(in.text));
  conv_write_dir(in.text, &config, how);
  wn_convert_job job = conv_job(in.text, out.text, WN_TO_DEMO);
  job.model_parallel = of;
  REFUSED(wn_convert(&job, NULL), code, part);
  assert_false(wn_path_exists(out.text));
}

static void splits_that_would_be_wrong(void **state) {
  wn_model_config config = fp8_config();
  refuse(state, config, fp8, 3, WN_E_CONFIG,
         "num_attention_heads 4 is not a multiple of --model-parallel 3; possible are 1, 2, 4");
  config.n_routed_experts = 6;
  refuse(state, config, fp8, 4, WN_E_CONFIG,
         "n_routed_experts 6 is not a multiple of --model-parallel 4; possible are 1, 2");
  config = fp8_config();
  config.moe_intermediate_size =
      256; /* the shared expert's blocks of 128 do not go in four; one scale row each of two */
  refuse(state, config, fp8, 4, WN_E_CONFIG,
         "model.layers.1.mlp.shared_experts.gate_proj.weight [256, 136]: --model-parallel 4 cuts its rows every 64, "
         "inside blocks of 128 that share a scale; possible are 1, 2");
  config.moe_intermediate_size = 200; /* two scales for two shards, but the second's first 28 rows want the first */
  refuse(state, config, fp8, 2, WN_E_CONFIG,
         "shared_experts.gate_proj.weight [200, 136]: --model-parallel 2 cuts its rows every 100");
  config = fp8_config();
  config.v_head_dim = 96; /* rows of kv_b: 4 x 224 */
  refuse(state, config, fp8, 2, WN_E_CONFIG, "kv_b_proj.weight [896, 40]: --model-parallel 2 cuts its rows every 448");
  config = bf16_config();
  config.vocab_size = 22;
  refuse(state, config, bf16, 4, WN_E_CONFIG,
         "tensor model.embed_tokens.weight [22, 40]: its rows do not divide by --model-parallel 4; possible are 1, 2");
}

static void what_is_missing(void **state) {
  conv_dir how = bf16;
  how.without = "layers.1.mlp.experts.5.up_proj.weight";
  refuse(state, bf16_config(), how, 1, WN_E_INPUT, "1 tensor missing: model.layers.1.mlp.experts.5.up_proj.weight");
}

static void a_mixture_of_types(void **state) {
  conv_dir how = fp8;
  char path[WN_PATH_BYTES];
  wn_model_config config = fp8_config();
  wn_temp_path in = wn_temp(state, "in"), out = wn_temp(state, "out");
  how.without = "indexer.wk.weight";
  conv_write_dir(in.text, &config, how);
  json_t *map = NULL;
  OK(wn_path(path, "%s/" WN_INDEX_NAME, in.text));
  json_t *root = json_load_file(path, 0, NULL);
  map = json_object_get(root, "weight_map");
  for (int32_t layer = 0; layer < 3; layer++) { /* an indexer that was trained beside frozen FP8 */
    char name[128], file[64];
    snprintf(name, sizeof name, "model.layers.%d.self_attn.indexer.wk.weight", layer);
    snprintf(file, sizeof file, "model-new%d.safetensors", layer);
    json_object_set_new(map, name, json_string(file));
    wn_st_spec spec = {.name = name, .dtype = WN_F32, .rank = 2, .dim = {160, 136}};
    float *zeros = calloc(160 * 136, sizeof *zeros);
    const void *data = zeros;
    char shard[WN_PATH_BYTES];
    OK(wn_path(shard, "%s/%s", in.text, file));
    OK(wn_safetensors_write(shard, &spec, &data, 1));
    free(zeros);
  }
  assert_int_equal(json_dump_file(root, path, 0), 0);
  json_decref(root);
  wn_convert_job job = conv_job(in.text, out.text, WN_TO_DEMO);
  REFUSED(wn_convert(&job, NULL), WN_E_INPUT, "indexer.wk.weight is F32, while others are FP8");
  wn_temp_path whole = wn_temp(state, "whole");
  wn_convert_job first = conv_job(in.text, whole.text, WN_TO_FP8);
  OK(wn_convert(&first, NULL));
  job.in = whole.text;
  OK(wn_convert(&job, NULL));
}

/* A layer 61 that is one of the model's own is kept, which the released converter drops by its number. */
static void a_deep_model(void **state) {
  wn_model_config config = bf16_config();
  wn_temp_path in = wn_temp(state, "in"), out = wn_temp(state, "out");
  config.num_hidden_layers = 63;
  config.n_routed_experts = 4;
  conv_write_dir(in.text, &config, bf16);
  wn_convert_job job = conv_job(in.text, out.text, WN_TO_DEMO);
  OK(wn_convert(&job, NULL));
  wn_safetensors *file;
  OK(wn_safetensors_open(&file, wn_temp(state, "out/model0-mp1.safetensors").text));
  assert_non_null(wn_safetensors_find(file, "layers.61.attn.wkv_b.weight"));
  assert_non_null(wn_safetensors_find(file, "layers.62.ffn.experts.3.w2.weight"));
  assert_null(wn_safetensors_find(file, "layers.63.attn.wkv_b.weight"));
  wn_safetensors_close(file);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEMP_TEST(shards_of_bf16),
      TEMP_TEST(shards_of_fp8),
      TEMP_TEST(shards_of_a_dense_model),
      TEMP_TEST(configurations),
      TEMP_TEST(splits_that_would_be_wrong),
      TEMP_TEST(what_is_missing),
      TEMP_TEST(a_mixture_of_types),
      TEMP_TEST(a_deep_model),
  };
  return cmocka_run_group_tests(tests, load_fixture, free_fixture);
}
