/* What a source may lack, and what it may not hold. */
#include "support/conversion.h"

#include <math.h>

static const conv_dir released = {.stored = CONV_RELEASED, .scales = WN_F32, .powers = true, .mtp = 1, .shards = 2};

static wn_model_config small_config(void) {
  wn_model_config c = conv_odd_config();
  c.intermediate_size = 150;
  return c;
}

static wn_status convert(void **state, wn_convert_form form) {
  wn_temp_path in = wn_temp(state, "in"), out = wn_temp(state, "out");
  OK(wn_remove_tree(out.text));
  wn_convert_job job = conv_job(in.text, out.text, form);
  return wn_convert(&job, NULL);
}

static void make(void **state, conv_dir how) {
  wn_model_config config = small_config();
  OK(wn_remove_tree(wn_temp(state, "in").text));
  conv_write_dir(wn_temp(state, "in").text, &config, how);
}

/* Overwrites bytes of a tensor of the source, where it lies in its file. */
static void poke(void **state, const char *name, int64_t at, const void *bytes, size_t n) {
  wn_hf_dir *dir;
  int32_t shard, other;
  char path[WN_PATH_BYTES];
  int64_t before = 0, total = 0;
  OK(wn_hf_dir_open(&dir, wn_temp(state, "in").text));
  const wn_st_entry *entry = wn_hf_dir_find(dir, name, &shard);
  assert_non_null(entry);
  for (int64_t i = 0; i < wn_hf_dir_count(dir); i++) {
    const wn_st_entry *e = wn_hf_dir_at(dir, i, &other);
    if (other != shard) continue;
    total += (int64_t)e->bytes;
    if ((const char *)e->data < (const char *)entry->data) before += (int64_t)e->bytes;
  }
  OK(wn_path(path, "%s", wn_hf_dir_shard_path(dir, shard)));
  wn_hf_dir_close(dir);
  FILE *file = fopen(path, "r+b");
  assert_non_null(file);
  assert_int_equal(fseek(file, 0, SEEK_END), 0);
  assert_int_equal(fseek(file, (long)(ftell(file) - total + before + at), SEEK_SET), 0);
  assert_int_equal(fwrite(bytes, 1, n, file), n);
  assert_int_equal(fclose(file), 0);
}

static bool has(void **state, const char *name) {
  wn_hf_dir *dir;
  OK(wn_hf_dir_open(&dir, wn_temp(state, "out").text));
  bool found = wn_hf_dir_find(dir, name, NULL) != NULL;
  wn_hf_dir_close(dir);
  return found;
}

/* ---- MTP layers ---- */

static void mtp_layers(void **state) {
  conv_dir how = released;
  how.mtp = 2;
  make(state, how);
  OK(convert(state, WN_TO_FP8));
  assert_true(has(state, "model.layers.3.mlp.experts.3.down_proj.weight_scale_inv"));
  assert_true(has(state, "model.layers.3.eh_proj.weight") && !has(state, "model.layers.3.eh_proj.weight_scale_inv"));
  OK(convert(state, WN_TO_V3));
  assert_false(has(state, "model.layers.2.self_attn.indexer.wk.weight"));
}

static void mtp_layers_of_v31_have_no_indexer(void **state) {
  conv_dir how = released;
  how.mtp_without_indexer = true;
  make(state, how);
  OK(convert(state, WN_TO_V32));
  assert_true(has(state, "model.layers.1.self_attn.indexer.wk.weight"));
  assert_false(has(state, "model.layers.2.self_attn.indexer.wk.weight"));
  how.without = "layers.2.self_attn.indexer.wk.weight"; /* but not half of one */
  how.mtp_without_indexer = false;
  make(state, how);
  REFUSED(convert(state, WN_TO_V32), WN_E_INPUT, "layers.2.self_attn.indexer.wk.weight");
}

static void mtp_layers_in_part(void **state) {
  conv_dir how = released;
  wn_model_config config;
  how.without = "layers.2.";
  make(state, how); /* absent altogether, as other programs' conversions leave them */
  OK(convert(state, WN_TO_BF16));
  OK(wn_model_config_load(&config, wn_temp(state, "out").text));
  assert_int_equal(config.num_nextn_predict_layers, 0);
  how.mtp = 2;
  make(state, how); /* the first of two */
  REFUSED(convert(state, WN_TO_BF16), WN_E_INPUT, "layer 2 (multi-token prediction) is absent, and layer 3 is there");
  how.without = "layers.3.";
  make(state, how);
  OK(convert(state, WN_TO_BF16));
  OK(wn_model_config_load(&config, wn_temp(state, "out").text));
  assert_int_equal(config.num_nextn_predict_layers, 1);
  how.mtp = 1;
  how.without = "layers.2.hnorm";
  make(state, how);
  REFUSED(convert(state, WN_TO_BF16), WN_E_INPUT, "1 tensor missing: model.layers.2.hnorm.weight");
  how.without = "layers.2.shared_head.head"; /* a copy of the head, which some leave out */
  make(state, how);
  OK(convert(state, WN_TO_BF16));
}

static void more_layers_than_named(void **state) {
  conv_dir how = released;
  char path[WN_PATH_BYTES];
  make(state, how);
  OK(wn_path(path, "%s/in/config.json", (const char *)*state));
  json_t *root = json_load_file(path, 0, NULL);
  json_object_del(root, "num_nextn_predict_layers");
  assert_int_equal(json_dump_file(root, path, 0), 0);
  REFUSED(convert(state, WN_TO_BF16), WN_E_INPUT, "tensors that this model does not have: ");
  json_object_set_new(root, "num_nextn_predict_layers", json_real(1.5));
  assert_int_equal(json_dump_file(root, path, 0), 0);
  REFUSED(convert(state, WN_TO_BF16), WN_E_CONFIG, "num_nextn_predict_layers is not a whole number from 0 to 64");
  json_decref(root);
}

/* ---- tensors ---- */

static void missing_surplus_misshapen(void **state) {
  conv_dir how = released;
  how.without = "experts.2.up_proj.weight"; /* in both layers, with their scales */
  make(state, how);
  REFUSED(
      convert(state, WN_TO_FP8), WN_E_INPUT,
      "2 tensors missing: model.layers.1.mlp.experts.2.up_proj.weight, model.layers.2.mlp.experts.2.up_proj.weight");
  how.without = "layers.0.self_attn.o_proj.weight_scale_inv";
  make(state, how);
  REFUSED(convert(state, WN_TO_FP8), WN_E_INPUT, "model.layers.0.self_attn.o_proj.weight is FP8 and has no");
  how = released;
  how.extra = "model.layers.1.mlp.gate_proj.weight";
  make(state, how);
  REFUSED(convert(state, WN_TO_BF16), WN_E_INPUT,
          "1 tensor that this model does not have: model.layers.1.mlp.gate_proj.weight");
  make(state, released);
  char path[WN_PATH_BYTES];
  wn_model_config config = small_config();
  config.kv_lora_rank += 1;
  OK(wn_path(path, "%s/in", (const char *)*state));
  conv_write_config(path, &config, &released);
  REFUSED(
      convert(state, WN_TO_BF16), WN_E_INPUT,
      "kv_a_proj_with_mqa.weight [41, 150] instead of [42, 150], model.layers.0.self_attn.kv_a_layernorm.weight [33] "
      "instead of [34]");
}

static void types_that_cannot_be_read(void **state) {
  conv_dir how = released;
  char *text;
  size_t bytes;
  how.stored = CONV_F32;
  make(state, how);
  wn_temp_path shard = wn_temp(state, "in/model-00001-of-000002.safetensors");
  OK(wn_read_file(&text, &bytes, shard.text, (size_t)1 << 30));
  for (size_t i = 0; i + 5 < bytes; i++)
    if (memcmp(text + i, "\"F32\"", 5) == 0) text[i + 1] = 'I';
  wn_temp_write(shard.text, text, bytes);
  free(text);
  REFUSED(convert(state, WN_TO_FP8), WN_E_INPUT, "of a type that cannot be read: model.embed_tokens.weight (I32)");
}

static void v32_needs_an_indexer(void **state) {
  wn_model_config config = small_config();
  config.has_indexer = false;
  conv_write_dir(wn_temp(state, "in").text, &config, released);
  REFUSED(convert(state, WN_TO_V32), WN_E_CONFIG, "a V3.2 model has an indexer in every layer");
  OK(convert(state, WN_TO_V3));
}

/* ---- numbers ---- */

static const float not_a_number = NAN, infinite = INFINITY, huge = 3.4e38f, negative = -1, zero = 0;

static void f32_that_is_not_finite(void **state) {
  static const char name[] = "model.layers.1.mlp.experts.1.down_proj.weight"; /* [150, 131] */
  conv_dir how = released;
  how.stored = CONV_F32;
  make(state, how);
  poke(state, name, 4 * (140 * 131 + 130), &not_a_number, 4);
  REFUSED(convert(state, WN_TO_BF16), WN_E_INPUT, "model.layers.1.mlp.experts.1.down_proj.weight: element [140, 130]");
  REFUSED(convert(state, WN_TO_FP8), WN_E_INPUT, "element [140, 130]");
  REFUSED(convert(state, WN_TO_DEMO), WN_E_INPUT, "element [140, 130]");
  poke(state, name, 4 * (140 * 131 + 130), &infinite, 4);
  REFUSED(convert(state, WN_TO_FP8), WN_E_INPUT, "element [140, 130] is inf");
  poke(state, name, 4 * (140 * 131 + 130), &huge, 4);
  REFUSED(convert(state, WN_TO_BF16), WN_E_INPUT, "element [140, 130] is 3.4e+38, beyond the range of BF16");
  OK(convert(state, WN_TO_FP8));
  OK(convert(state, WN_TO_DEMO));
}

static void halves_that_are_not_finite(void **state) {
  static const uint16_t bf16 = 0x7fc1, f16 = 0xfc00;
  conv_dir how = released;
  make(state, how);
  poke(state, "model.norm.weight", 2 * 149, &bf16, 2);
  REFUSED(convert(state, WN_TO_FP8), WN_E_INPUT, "tensor model.norm.weight: element [149] is nan");
  how.stored = CONV_F16;
  make(state, how);
  poke(state, "lm_head.weight", 2 * 36 * 150, &f16, 2);
  REFUSED(convert(state, WN_TO_BF16), WN_E_INPUT, "tensor lm_head.weight: element [36, 0] is -inf");
}

static void fp8_that_is_not_finite(void **state) {
  static const uint8_t nan_code = 0xff;
  static const char name[] = "model.layers.0.self_attn.o_proj.weight",
                    scales[] = "model.layers.0.self_attn.o_proj.weight_scale_inv"; /* [150, 135]: 2 x 2 blocks */
  const float *bad[] = {&not_a_number, &infinite, &negative, &zero};
  make(state, released);
  poke(state, name, 149 * 135 + 134, &nan_code, 1);
  for (int form = WN_TO_V32; form < WN_N_CONVERT_FORMS; form++)
    REFUSED(convert(state, (wn_convert_form)form), WN_E_INPUT, "model.layers.0.self_attn.o_proj.weight holds NaN");
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    make(state, released);
    poke(state, scales, 4 * 3, bad[i], 4);
    for (int form = WN_TO_V32; form < WN_N_CONVERT_FORMS; form++)
      REFUSED(convert(state, (wn_convert_form)form), WN_E_INPUT, "o_proj.weight_scale_inv: scale [1, 1] is");
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEMP_TEST(mtp_layers),
      TEMP_TEST(mtp_layers_of_v31_have_no_indexer),
      TEMP_TEST(mtp_layers_in_part),
      TEMP_TEST(more_layers_than_named),
      TEMP_TEST(missing_surplus_misshapen),
      TEMP_TEST(types_that_cannot_be_read),
      TEMP_TEST(v32_needs_an_indexer),
      TEMP_TEST(f32_that_is_not_finite),
      TEMP_TEST(halves_that_are_not_finite),
      TEMP_TEST(fp8_that_is_not_finite),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
