/* Every form out of every stored form: names, shapes, dtypes, and each value against plain arithmetic. */
#include "support/conversion.h"

#include <math.h>

static const conv_dir released = {.stored = CONV_RELEASED, .scales = WN_F32, .powers = true, .mtp = 1, .shards = 3};

static conv_dir stored_as(conv_stored stored) {
  conv_dir how = released;
  how.stored = stored;
  return how;
}

/* ---- plain arithmetic, from the formats' definitions ---- */

static double plain_e4m3(uint8_t code) {
  int exponent = code >> 3 & 15, mantissa = code & 7;
  double x = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
  return code & 0x80 ? -x : x;
}

/* The nearest code; of two as near, the even one. */
static uint8_t plain_to_e4m3(double x) {
  int below = 0, above = 0x7e;
  double magnitude = fabs(x);
  while (above - below > 1) {
    int middle = (below + above) / 2;
    if (plain_e4m3((uint8_t)middle) <= magnitude)
      below = middle;
    else
      above = middle;
  }
  double down = magnitude - plain_e4m3((uint8_t)below), up = plain_e4m3((uint8_t)above) - magnitude;
  int best = down < up || (down == up && below % 2 == 0) ? below : above;
  return (uint8_t)(signbit(x) ? best | 0x80 : best);
}

/* A tensor with the scales that an FP8 one has. */
typedef struct plain {
  const wn_st_entry *entry, *scale;
} plain;

static plain plain_find(const wn_hf_dir *dir, const char *name) {
  char beside[256];
  snprintf(beside, sizeof beside, "%s_scale_inv", name);
  plain p = {wn_hf_dir_find(dir, name, NULL), wn_hf_dir_find(dir, beside, NULL)};
  if (!p.entry) fail_msg("%s is missing", name);
  assert_int_equal(p.entry->dtype == WN_F8_E4M3, p.scale != NULL);
  return p;
}

static float plain_number(const wn_st_entry *entry, int64_t i) {
  uint16_t half;
  float x;
  if (entry->dtype == WN_F8_E8M0) return (float)ldexp(1, ((const uint8_t *)entry->data)[i] - 127);
  if (entry->dtype == WN_F32) {
    memcpy(&x, (const char *)entry->data + 4 * i, 4);
    return x;
  }
  memcpy(&half, (const char *)entry->data + 2 * i, 2);
  if (entry->dtype == WN_BF16) return wn_f32_from_bf16(half);
  int exponent = half >> 10 & 31;
  double f16 = ldexp(1024 + (half & 1023), exponent - 25); /* conv_element makes normal ones */
  return (float)(half & 0x8000 ? -f16 : f16);
}

static float plain_scale(plain p, int64_t i) {
  int64_t cols = p.entry->dim[1];
  return plain_number(p.scale, i / cols / 128 * p.scale->dim[1] + i % cols / 128);
}

static float plain_value(plain p, int64_t i) {
  if (!p.scale) return plain_number(p.entry, i);
  double x = plain_e4m3(((const uint8_t *)p.entry->data)[i]) * (double)plain_scale(p, i); /* exact, rounded once */
  return wn_f32_from_bf16(wn_bf16_from_f32((float)x));
}

/* ---- comparisons ---- */

static void expect_numbers(const wn_hf_dir *from, const wn_st_entry *got) {
  int64_t n = (int64_t)got->bytes / wn_dtype_bytes(got->dtype);
  plain source = plain_find(from, got->name);
  for (int64_t i = 0; i < n; i++) {
    float want = plain_value(source, i), have;
    uint16_t half;
    if (got->dtype == WN_BF16) {
      want = wn_f32_from_bf16(wn_bf16_from_f32(want));
      memcpy(&half, (const char *)got->data + 2 * i, 2);
      have = wn_f32_from_bf16(half);
    } else {
      memcpy(&have, (const char *)got->data + 4 * i, 4);
    }
    if (memcmp(&have, &want, 4) != 0) fail_msg("%s[%lld] is %a, expected %a", got->name, (long long)i, have, want);
  }
}

static void expect_block(plain from, const wn_st_entry *got, const wn_st_entry *scales, int64_t br, int64_t bc) {
  int64_t rows = got->dim[0], cols = got->dim[1];
  double largest = 0;
  float scale;
  for (int64_t r = br * 128; r < rows && r < br * 128 + 128; r++)
    for (int64_t c = bc * 128; c < cols && c < bc * 128 + 128; c++)
      largest = fmax(largest, fabs((double)plain_value(from, r * cols + c)));
  memcpy(&scale, (const char *)scales->data + 4 * (br * scales->dim[1] + bc), 4);
  int exponent;
  double mantissa = frexp((double)(float)((float)fmax(largest, 1e-4f) / 448.0f), &exponent);
  assert_true(scale == (float)ldexp(1, mantissa == 0.5 ? exponent - 1 : exponent));
  for (int64_t r = br * 128; r < rows && r < br * 128 + 128; r++)
    for (int64_t c = bc * 128; c < cols && c < bc * 128 + 128; c++) {
      double x = (double)plain_value(from, r * cols + c);
      uint8_t have = ((const uint8_t *)got->data)[r * cols + c], want = plain_to_e4m3(x / (double)scale);
      if (have != want)
        fail_msg("%s[%lld, %lld]: %g became %02x instead of %02x", got->name, (long long)r, (long long)c, x, have,
                 want);
    }
}

static void expect_blocks(const wn_hf_dir *from, const wn_hf_dir *to, const wn_st_entry *got) {
  char beside[256];
  snprintf(beside, sizeof beside, "%s_scale_inv", got->name);
  const wn_st_entry *scales = wn_hf_dir_find(to, beside, NULL);
  assert_non_null(scales);
  assert_int_equal(scales->dtype, WN_F32);
  assert_int_equal(scales->dim[0], (got->dim[0] + 127) / 128);
  assert_int_equal(scales->dim[1], (got->dim[1] + 127) / 128);
  for (int64_t r = 0; r < scales->dim[0]; r++)
    for (int64_t c = 0; c < scales->dim[1]; c++) expect_block(plain_find(from, got->name), got, scales, r, c);
}

/* Everything that `from` has, but for scales and, without indexers, those, is in `to` in the released dtype of the
 * form, with its values; and nothing else is. */
static void expect_form(const wn_hf_dir *from, const wn_hf_dir *to, bool fp8, bool indexers) {
  int64_t wanted = 0;
  for (int64_t i = 0; i < wn_hf_dir_count(from); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(from, i, NULL);
    if (strstr(entry->name, "_scale_inv") || (!indexers && strstr(entry->name, ".indexer."))) continue;
    const wn_st_entry *got = wn_hf_dir_find(to, entry->name, NULL);
    if (!got) fail_msg("%s is missing", entry->name);
    bool blocks = fp8 && conv_fp8(entry->name);
    wanted += blocks ? 2 : 1;
    assert_int_equal(got->dtype, conv_f32(entry->name) ? WN_F32 : blocks ? WN_F8_E4M3 : WN_BF16);
    assert_int_equal(got->rank, entry->rank);
    assert_memory_equal(got->dim, entry->dim, sizeof got->dim);
    if (!blocks)
      expect_numbers(from, got);
    else if (entry->dtype == WN_F8_E4M3)
      assert_memory_equal(got->data, entry->data, entry->bytes);
    else
      expect_blocks(from, to, got);
  }
  assert_int_equal(wn_hf_dir_count(to), wanted);
}

static json_t *load_json(const char *dir, const char *name) {
  char path[WN_PATH_BYTES];
  OK(wn_path(path, "%s/%s", dir, name));
  json_t *root = json_load_file(path, 0, NULL);
  assert_non_null(root);
  return root;
}

static void expect_config(const char *dir, bool fp8, bool indexers, int mtp) {
  wn_model_config config;
  OK(wn_model_config_load(&config, dir));
  assert_int_equal(config.has_indexer, indexers);
  json_t *root = load_json(dir, "config.json"), *index = load_json(dir, WN_INDEX_NAME);
  assert_int_equal(json_object_get(root, "quantization_config") != NULL, fp8);
  assert_string_equal(json_string_value(json_object_get(root, "torch_dtype")), "bfloat16");
  assert_int_equal(json_integer_value(json_object_get(root, "num_nextn_predict_layers")), mtp);
  wn_hf_dir *dir_again;
  int64_t total = 0;
  OK(wn_hf_dir_open(&dir_again, dir));
  for (int64_t i = 0; i < wn_hf_dir_count(dir_again); i++) total += (int64_t)wn_hf_dir_at(dir_again, i, NULL)->bytes;
  wn_hf_dir_close(dir_again);
  assert_int_equal(json_integer_value(json_object_get(json_object_get(index, "metadata"), "total_size")), total);
  json_decref(root);
  json_decref(index);
}

static void try_config(void **state, wn_model_config config, conv_dir how, wn_convert_form form) {
  wn_hf_dir *from, *to;
  wn_temp_path in = wn_temp(state, "in"), out = wn_temp(state, "out");
  OK(wn_remove_tree(in.text));
  OK(wn_remove_tree(out.text));
  conv_write_dir(in.text, &config, how);
  wn_convert_job job = conv_job(in.text, out.text, form);
  OK(wn_convert(&job, NULL));
  OK(wn_hf_dir_open(&from, in.text));
  OK(wn_hf_dir_open(&to, out.text));
  expect_form(from, to, form == WN_TO_FP8, form != WN_TO_V3);
  wn_hf_dir_close(from);
  wn_hf_dir_close(to);
  expect_config(out.text, form == WN_TO_FP8, form != WN_TO_V3, how.mtp);
}

static void try_form(void **state, conv_dir how, wn_convert_form form) {
  try_config(state, conv_odd_config(), how, form);
}

static int32_t up_to(int most, uint64_t trial, uint64_t which) {
  return 1 + (int32_t)wn_rng_below(17, WN_RNG_TEST, trial << 8 | which, (uint64_t)most);
}

/* Widths on both sides of one, two and three blocks, from each stored form to each other. */
static void shapes_at_random(void **state) {
  for (uint64_t trial = 0; trial < 12; trial++) {
    wn_model_config c = conv_odd_config();
    c.hidden_size = up_to(300, trial, 0);
    c.intermediate_size = up_to(400, trial, 1);
    c.moe_intermediate_size = up_to(140, trial, 2);
    c.q_lora_rank = up_to(300, trial, 3);
    c.kv_lora_rank = up_to(150, trial, 4);
    c.qk_rope_head_dim = 2 * up_to(20, trial, 5);
    c.qk_nope_head_dim = up_to(90, trial, 6);
    c.v_head_dim = up_to(90, trial, 7);
    c.index_head_dim = c.qk_rope_head_dim + up_to(120, trial, 8);
    c.index_n_heads = up_to(4, trial, 9);
    c.vocab_size = 1 + up_to(300, trial, 10);
    conv_dir how = stored_as((conv_stored)(trial % 4));
    how.shards = up_to(5, trial, 11);
    try_config(state, c, how, trial % 3 == 0 ? WN_TO_BF16 : WN_TO_FP8);
  }
}

static void bf16_of_anything(void **state) {
  for (int stored = CONV_RELEASED; stored <= CONV_F16; stored++)
    try_form(state, stored_as((conv_stored)stored), WN_TO_BF16);
}

static void v32_and_v3(void **state) {
  try_form(state, stored_as(CONV_F32), WN_TO_V32);
  try_form(state, stored_as(CONV_F32), WN_TO_V3);
  try_form(state, released, WN_TO_V3);
}

static void fp8_of_numbers(void **state) {
  try_form(state, stored_as(CONV_F32), WN_TO_FP8);
  try_form(state, stored_as(CONV_BF16), WN_TO_FP8);
}

/* Codes as they are; scales as F32 whatever they were. */
static void fp8_of_fp8(void **state) {
  static const wn_dtype scales[] = {WN_F32, WN_BF16, WN_F8_E8M0};
  for (size_t i = 0; i < sizeof scales / sizeof *scales; i++) {
    conv_dir how = released;
    how.scales = scales[i];
    how.powers = scales[i] != WN_BF16;
    try_form(state, how, WN_TO_FP8);
    wn_hf_dir *from, *to;
    OK(wn_hf_dir_open(&from, wn_temp(state, "in").text));
    OK(wn_hf_dir_open(&to, wn_temp(state, "out").text));
    int64_t seen = 0;
    for (int64_t e = 0; e < wn_hf_dir_count(to); e++) {
      const wn_st_entry *got = wn_hf_dir_at(to, e, NULL);
      if (!strstr(got->name, "_scale_inv")) continue;
      assert_int_equal(got->dtype, WN_F32);
      expect_numbers(from, got);
      seen++;
    }
    assert_true(seen > 20);
    wn_hf_dir_close(from);
    wn_hf_dir_close(to);
    json_t *root = load_json(wn_temp(state, "out").text, "config.json");
    const json_t *format = json_object_get(json_object_get(root, "quantization_config"), "scale_fmt");
    assert_int_equal(format != NULL, how.powers);
    json_decref(root);
  }
}

/* BF16 -> FP8 -> BF16 -> FP8 -> BF16: off by at most half a step of E4M3 at first, then never again. */
static void round_trips(void **state) {
  static const char *const steps[] = {"in", "a8", "a16", "b8", "b16"};
  wn_model_config config = conv_odd_config();
  wn_hf_dir *dir[5];
  conv_write_dir(wn_temp(state, "in").text, &config, stored_as(CONV_BF16));
  for (int s = 1; s < 5; s++) {
    wn_temp_path in = wn_temp(state, steps[s - 1]), out = wn_temp(state, steps[s]);
    wn_convert_job job = conv_job(in.text, out.text, s % 2 ? WN_TO_FP8 : WN_TO_BF16);
    OK(wn_convert(&job, NULL));
  }
  for (int s = 0; s < 5; s++) OK(wn_hf_dir_open(&dir[s], wn_temp(state, steps[s]).text));
  for (int64_t i = 0; i < wn_hf_dir_count(dir[0]); i++) {
    const wn_st_entry *at = wn_hf_dir_at(dir[0], i, NULL), *first = wn_hf_dir_find(dir[2], at->name, NULL),
                      *second = wn_hf_dir_find(dir[4], at->name, NULL);
    assert_memory_equal(first->data, second->data, first->bytes);
    if (!conv_fp8(at->name)) {
      assert_memory_equal(at->data, first->data, at->bytes);
      continue;
    }
    plain before = plain_find(dir[0], at->name), codes = plain_find(dir[1], at->name),
          after = plain_find(dir[2], at->name);
    for (int64_t e = 0; e < at->dim[0] * at->dim[1]; e++) {
      double scale = (double)plain_scale(codes, e);
      double was = (double)plain_value(before, e), is = (double)plain_value(after, e);
      int exponent;
      frexp(was / scale, &exponent); /* was / scale in [2^(e-1), 2^e): codes lie 2^(e-4) apart, at least 2^-9 */
      double step = scale * ldexp(1, exponent - 4 > -9 ? exponent - 4 : -9);
      if (!(fabs(was - is) <= step / 2)) fail_msg("%s[%lld]: %a came back as %a", at->name, (long long)e, was, is);
    }
  }
  for (int s = 0; s < 5; s++) wn_hf_dir_close(dir[s]);
}

/* ---- shards ---- */

static void shards_of_a_chosen_size(void **state) {
  wn_model_config config = conv_odd_config();
  wn_temp_path in = wn_temp(state, "in"), out = wn_temp(state, "out");
  conv_write_dir(in.text, &config, stored_as(CONV_F32));
  wn_convert_job job = conv_job(in.text, out.text, WN_TO_FP8);
  job.shard_bytes = 100000;
  OK(wn_convert(&job, NULL));
  wn_hf_dir *dir;
  OK(wn_hf_dir_open(&dir, out.text));
  int32_t n = wn_hf_dir_shards(dir), shard, beside_shard;
  assert_true(n > 8);
  int64_t bytes[1000] = {0}, largest[1000] = {0};
  for (int64_t i = 0; i < wn_hf_dir_count(dir); i++) {
    char beside[256], name[64];
    const wn_st_entry *entry = wn_hf_dir_at(dir, i, &shard);
    snprintf(name, sizeof name, "/model-%05d-of-%06d.safetensors", shard + 1, n);
    assert_non_null(strstr(wn_hf_dir_shard_path(dir, shard), name));
    bytes[shard] += (int64_t)entry->bytes;
    if ((int64_t)entry->bytes > largest[shard]) largest[shard] = (int64_t)entry->bytes;
    if (entry->dtype != WN_F8_E4M3) continue;
    snprintf(beside, sizeof beside, "%s_scale_inv", entry->name);
    assert_non_null(wn_hf_dir_find(dir, beside, &beside_shard));
    assert_int_equal(shard, beside_shard);
  }
  for (int32_t s = 0; s < n; s++) assert_true(bytes[s] <= 100000 || largest[s] > 95000);
  wn_hf_dir_close(dir);
}

static void bytes_do_not_depend_on_threads(void **state) {
  wn_model_config config = conv_odd_config();
  wn_temp_path in = wn_temp(state, "in");
  char name[16];
  wn_hash first = {0};
  conv_write_dir(in.text, &config, stored_as(CONV_F32));
  for (int32_t threads = 1; threads <= 3; threads++) {
    snprintf(name, sizeof name, "out%d", threads);
    wn_temp_path out = wn_temp(state, name);
    wn_convert_job job = conv_job(in.text, out.text, WN_TO_FP8);
    wn_hash hash;
    uint64_t bytes;
    char path[WN_PATH_BYTES];
    job.threads = threads;
    OK(wn_convert(&job, NULL));
    OK(wn_path(path, "%s/model-00001-of-000001.safetensors", out.text));
    OK(wn_hash_file(&hash, &bytes, path));
    if (threads == 1) first = hash;
    assert_true(wn_hash_equal(hash, first));
  }
}

/* ---- what travels along ---- */

static void expect_text(void **state, const char *name, const char *want) {
  char *text;
  OK(wn_read_file(&text, NULL, wn_temp(state, name).text, 1 << 20));
  assert_string_equal(text, want);
  free(text);
}

static void small_files(void **state) {
  static const char *const copied[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                       "generation_config.json", "chat_template.jinja"};
  wn_model_config config = conv_odd_config();
  wn_temp_path in = wn_temp(state, "in"), out = wn_temp(state, "out"), demo = wn_temp(state, "demo");
  char name[64];
  conv_write_dir(in.text, &config, stored_as(CONV_BF16));
  wn_convert_job job = conv_job(in.text, wn_temp(state, "bare").text, WN_TO_BF16);
  OK(wn_convert(&job, NULL));
  expect_text(state, "bare/generation_config.json",
              "{\n  \"_from_model_config\": true,\n  \"bos_token_id\": 0,\n  \"eos_token_id\": 1\n}\n");
  for (size_t i = 0; i < sizeof copied / sizeof *copied; i++) {
    snprintf(name, sizeof name, "in/%s", copied[i]);
    wn_temp_write(wn_temp(state, name).text, copied[i], strlen(copied[i]));
  }
  wn_temp_write(wn_temp(state, "in/README.md").text, "x", 1);
  job = conv_job(in.text, out.text, WN_TO_FP8);
  OK(wn_convert(&job, NULL));
  job = conv_job(in.text, demo.text, WN_TO_DEMO);
  OK(wn_convert(&job, NULL));
  for (size_t i = 0; i < sizeof copied / sizeof *copied; i++) {
    snprintf(name, sizeof name, "out/%s", copied[i]);
    expect_text(state, name, copied[i]);
    snprintf(name, sizeof name, "demo/%s", copied[i]);
    assert_int_equal(wn_path_exists(wn_temp(state, name).text), strstr(copied[i], "token") != NULL);
  }
  char **names;
  size_t n;
  OK(wn_list_dir(&names, &n, out.text));
  assert_int_equal(n, 5 + 3); /* config.json, the index, one shard */
  wn_list_free(names, n);
  OK(wn_list_dir(&names, &n, demo.text));
  assert_int_equal(n, 3 + 2); /* demo_config.json, one shard; no config.json */
  wn_list_free(names, n);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEMP_TEST(bf16_of_anything),
      TEMP_TEST(v32_and_v3),
      TEMP_TEST(fp8_of_numbers),
      TEMP_TEST(fp8_of_fp8),
      TEMP_TEST(shapes_at_random),
      TEMP_TEST(round_trips),
      TEMP_TEST(shards_of_a_chosen_size),
      TEMP_TEST(bytes_do_not_depend_on_threads),
      TEMP_TEST(small_files),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
