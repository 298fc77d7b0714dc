/* Weights out of a directory in every precision they lie in, and what is refused by name. That FP8 codes, scales and
 * products are right is for io_float8. */
#include "support/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/float8.h"
#include "io/files.h"
#include "io/hf_dir.h"
#include "support/temp.h"

enum { MOST = 8 };

typedef struct written {
  wn_st_spec spec[MOST];
  const void *data[MOST];
  int64_t n;
} written;

static void add(written *w, const char *name, wn_dtype dtype, int32_t rank, int64_t d0, int64_t d1, const void *data) {
  assert_true(w->n < MOST);
  w->spec[w->n] = (wn_st_spec){.name = name, .dtype = dtype, .rank = rank, .dim = {d0, d1}};
  w->data[w->n++] = data;
}

/* Tensors 0 .. cut - 1 into one shard, the rest into another; cut 0: all into model.safetensors. */
static wn_hf_dir *open_written(void **state, const written *w, int64_t cut) {
  wn_temp_path root = wn_temp(state, "model");
  char path[WN_PATH_BYTES], index[4096] = "{\"weight_map\": {";
  wn_hf_dir *dir;
  OK(wn_remove_tree(root.text));
  OK(wn_make_dirs(root.text));
  if (!cut) {
    OK(wn_path(path, "%s/model.safetensors", root.text));
    OK(wn_safetensors_write(path, w->spec, w->data, w->n));
  } else {
    OK(wn_path(path, "%s/0.safetensors", root.text));
    OK(wn_safetensors_write(path, w->spec, w->data, cut));
    OK(wn_path(path, "%s/1.safetensors", root.text));
    OK(wn_safetensors_write(path, w->spec + cut, w->data + cut, w->n - cut));
    for (int64_t i = 0; i < w->n; i++)
      snprintf(index + strlen(index), sizeof index - strlen(index), "%s\"%s\": \"%d.safetensors\"", i ? "," : "",
               w->spec[i].name, i >= cut);
    snprintf(index + strlen(index), sizeof index - strlen(index), "}}");
    OK(wn_path(path, "%s/model.safetensors.index.json", root.text));
    OK(wn_write_file_atomic(path, index, strlen(index)));
  }
  OK(wn_hf_dir_open(&dir, root.text));
  return dir;
}

static wn_hf_weight find(const wn_hf_dir *dir, const char *name) {
  wn_hf_weight weight;
  OK(wn_hf_weight_find(&weight, dir, name));
  assert_non_null(weight.entry);
  return weight;
}

static void floats(void **state) {
  static const float f32[3] = {1.5f, -0.f, 3e38f};
  static const uint16_t bf16[3] = {0x3fc0, 0xff7f, 0x0001}, f16[3] = {0x3e00, 0x0001, 0xfbff};
  static const uint8_t odd[1] = {7}, f8[3] = {1, 2, 3};
  written w = {0};
  add(&w, "odd", WN_U8, 1, 1, 0, odd); /* the odd byte leaves everything after it unaligned */
  add(&w, "f32", WN_F32, 1, 3, 0, f32);
  add(&w, "bf16", WN_BF16, 1, 3, 0, bf16);
  add(&w, "f16", WN_F16, 1, 3, 0, f16);
  add(&w, "f8", WN_F8_E4M3, 1, 3, 0, f8);
  wn_hf_dir *dir = open_written(state, &w, 0);
  wn_hf_weight weight = find(dir, "f32"), none;
  float single[3];
  double wide[3];
  uint16_t narrow[3];
  OK(wn_hf_read(single, WN_F32, &weight, 0, 3));
  assert_memory_equal(single, f32, sizeof f32);
  OK(wn_hf_read(wide, WN_F64, &weight, 1, 2));
  assert_true(wide[0] == 0 && signbit(wide[0]) && wide[1] == (double)3e38f);
  OK(wn_hf_read(narrow, WN_BF16, &weight, 0, 2));
  assert_true(narrow[0] == 0x3fc0 && narrow[1] == 0x8000);
  weight = find(dir, "bf16");
  OK(wn_hf_read(single, WN_F32, &weight, 0, 3));
  assert_true(single[0] == 1.5f && single[1] == -0x1.fep127f && single[2] == 0x1p-133f);
  OK(wn_hf_read(wide, WN_F64, &weight, 0, 1));
  assert_true(wide[0] == 1.5);
  OK(wn_hf_read(narrow, WN_BF16, &weight, 1, 2));
  assert_memory_equal(narrow, bf16 + 1, 4);
  weight = find(dir, "f16");
  OK(wn_hf_read(single, WN_F32, &weight, 1, 2));
  assert_true(single[0] == 0x1p-24f && single[1] == -65504);
  OK(wn_hf_read(wide, WN_F64, &weight, 3, 0));
  weight = find(dir, "odd");
  REFUSED(wn_hf_read(single, WN_F32, &weight, 0, 1), WN_E_INPUT, "odd is stored as U8");
  weight = (wn_hf_weight){.entry = wn_hf_dir_find(dir, "f8", NULL)};
  REFUSED(wn_hf_read(single, WN_F32, &weight, 0, 3), WN_E_INPUT, "f8 is stored as F8_E4M3");
  REFUSED(wn_hf_weight_find(&none, dir, "f8"), WN_E_INPUT, "f8 is FP8 and of rank 1");
  OK(wn_hf_weight_find(&none, dir, "elsewhere"));
  assert_null(none.entry);
  wn_hf_dir_close(dir);
}

/* Every half, singly and as a vector, against its definition. */
static void every_f16(void **state) {
  (void)state;
  uint16_t *halves = malloc(65536 * sizeof *halves);
  float *singles = malloc(65536 * sizeof *singles);
  assert_true(halves && singles);
  for (int32_t i = 0; i < 65536; i++) halves[i] = (uint16_t)i;
  wn_f32s_from_f16(singles, halves, 65536);
  for (int32_t i = 0; i < 65536; i++) {
    int32_t exponent = i >> 10 & 31, mantissa = i & 1023;
    double want = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    if (exponent == 31) want = mantissa ? NAN : INFINITY;
    float one = wn_f32_from_f16(halves[i]), expected = (float)(i & 0x8000 ? -want : want);
    bool same = isnan(want) ? isnan(one) && isnan(singles[i])
                            : memcmp(&one, &expected, 4) == 0 && memcmp(&singles[i], &expected, 4) == 0;
    if (!same) fail_msg("half %04x became %a and %a", (unsigned)i, (double)one, (double)singles[i]);
  }
  free(halves);
  free(singles);
}

/* ---- what is no number ---- */

enum { TALL = 300, WIDE = 331, ALL = TALL * WIDE }; /* more than is on its way at a time */

/* `bits` at an element of a matrix of ones: whoever reads it is told, in every precision, and nobody else. */
static void refuse_element(void **state, wn_dtype dtype, int64_t at, uint32_t bits, const char *is) {
  const int64_t width = wn_dtype_bytes(dtype);
  const uint32_t one = dtype == WN_F32 ? 0x3f800000 : dtype == WN_BF16 ? 0x3f80 : 0x3c00;
  char *data = malloc((size_t)(ALL * width)), sentence[128];
  double *out = malloc(ALL * sizeof *out);
  written w = {0};
  assert_true(data && out);
  for (int64_t i = 0; i < ALL; i++) memcpy(data + i * width, i == at ? &bits : &one, (size_t)width);
  add(&w, "w", dtype, 2, TALL, WIDE, data);
  wn_hf_dir *dir = open_written(state, &w, 0);
  wn_hf_weight weight = find(dir, "w");
  static const wn_dtype as[] = {WN_F32, WN_F64, WN_BF16};
  for (size_t i = 0; i < sizeof as / sizeof *as; i++) {
    snprintf(sentence, sizeof sentence, "/model.safetensors: tensor w: element [%d, %d] is %s", (int)(at / WIDE),
             (int)(at % WIDE), is);
    REFUSED(wn_hf_read(out, as[i], &weight, 0, ALL), WN_E_INPUT, sentence);
    REFUSED(wn_hf_read(out, as[i], &weight, at, 1), WN_E_INPUT, sentence);
    OK(wn_hf_read(out, as[i], &weight, 0, at));
    OK(wn_hf_read(out, as[i], &weight, at + 1, ALL - at - 1));
  }
  wn_hf_dir_close(dir);
  free(data);
  free(out);
}

static void elements_that_are_no_numbers(void **state) {
  static const struct {
    wn_dtype dtype;
    uint32_t bits;
    const char *is;
  } bad[] = {{WN_F32, 0x7f800000, "inf; weights are finite"},
             {WN_F32, 0xff800000, "-inf"},
             {WN_F32, 0x7f800001, "nan"},
             {WN_F32, 0xffffffff, "-nan"},
             {WN_BF16, 0x7f80, "inf; weights are finite"},
             {WN_BF16, 0xff80, "-inf"},
             {WN_BF16, 0x7f81, "nan"},
             {WN_BF16, 0xffff, "-nan"},
             {WN_F16, 0x7c00, "inf; weights are finite"},
             {WN_F16, 0xfc00, "-inf"},
             {WN_F16, 0x7c01, "nan"},
             {WN_F16, 0xffff, "-nan"}};
  static const int64_t places[] = {0, 9, 40007, ALL - 2}; /* where the lanes of a vector begin depends on memory */
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
    for (size_t p = 0; p < sizeof places / sizeof *places; p++)
      refuse_element(state, bad[i].dtype, places[p], bad[i].bits, bad[i].is);
}

/* The largest numbers of each form are none of these; BF16's range ends below FP32's. */
static void the_largest_numbers(void **state) {
  static const float f32[2] = {0x1.fep127f, 3.4e38f}; /* the second rounds up to infinity */
  static const uint16_t bf16[2] = {0x7f7f, 0xff7f}, f16[2] = {0x7bff, 0xfbff};
  written w = {0};
  float single[2];
  uint16_t narrow[2];
  add(&w, "f32", WN_F32, 1, 2, 0, f32);
  add(&w, "bf16", WN_BF16, 1, 2, 0, bf16);
  add(&w, "f16", WN_F16, 1, 2, 0, f16);
  wn_hf_dir *dir = open_written(state, &w, 0);
  wn_hf_weight weight = find(dir, "bf16");
  OK(wn_hf_read(single, WN_F32, &weight, 0, 2));
  OK(wn_hf_read(narrow, WN_BF16, &weight, 0, 2));
  assert_memory_equal(narrow, bf16, 4);
  weight = find(dir, "f16");
  OK(wn_hf_read(narrow, WN_BF16, &weight, 0, 2));
  weight = find(dir, "f32");
  OK(wn_hf_read(single, WN_F32, &weight, 0, 2));
  OK(wn_hf_read(narrow, WN_BF16, &weight, 0, 1));
  REFUSED(wn_hf_read(narrow, WN_BF16, &weight, 0, 2), WN_E_INPUT,
          "tensor f32: element [1] is 3.4e+38, beyond the range of BF16");
  wn_hf_dir_close(dir);
}

/* ---- FP8 ---- */

enum { ROWS = 130, COLS = 150 };

static uint8_t codes[ROWS * COLS];
static const float good[4] = {0x1p-3f, 3.0e-4f, 0x1p-20f, 0x1p4f}; /* one is no power of two */

static void fill_codes(void) {
  for (int32_t i = 0; i < ROWS * COLS; i++) codes[i] = (uint8_t)(i % 127 + (i % 3 ? 128 : 0)); /* no NaN */
}

static float product(const float *scales, int64_t i) {
  float exact = wn_f32_from_e4m3(codes[i]) * scales[i / COLS / 128 * 2 + i % COLS / 128];
  return wn_f32_from_bf16(wn_bf16_from_f32(exact));
}

static void expect_products(wn_hf_dir *dir, const float *scales) {
  wn_hf_weight weight = find(dir, "w");
  assert_non_null(weight.scale);
  float *out = malloc(sizeof *out * ROWS * COLS);
  uint16_t *narrow = malloc(sizeof *narrow * ROWS * COLS);
  assert_true(out && narrow);
  for (int64_t first = 0; first < ROWS * COLS; first += 397) { /* ranges that begin and end anywhere */
    int64_t count = (ROWS * COLS - first) / (1 + first % 3);
    OK(wn_hf_read(out, WN_F32, &weight, first, count));
    OK(wn_hf_read(narrow, WN_BF16, &weight, first, count));
    for (int64_t i = 0; i < count; i++) {
      float want = product(scales, first + i), twin = wn_f32_from_bf16(narrow[i]);
      if (memcmp(&out[i], &want, 4) != 0 || memcmp(&twin, &want, 4) != 0)
        fail_msg("element %lld is %a and %a instead of %a", (long long)(first + i), (double)out[i], (double)twin,
                 (double)want);
    }
  }
  uint8_t *raw = (uint8_t *)out;
  OK(wn_hf_read(raw, WN_F8_E4M3, &weight, 7, ROWS * COLS - 9));
  assert_memory_equal(raw, codes + 7, ROWS * COLS - 9);
  free(out);
  free(narrow);
  wn_hf_dir_close(dir);
}

static void fp8(void **state) {
  uint16_t halves[4];
  float rounded[4], powers[4];
  static const uint8_t e8m0[4] = {127, 1, 140, 90};
  fill_codes();
  for (int32_t i = 0; i < 4; i++) {
    halves[i] = wn_bf16_from_f32(good[i]);
    rounded[i] = wn_f32_from_bf16(halves[i]);
    powers[i] = ldexpf(1, e8m0[i] - 127);
  }
  for (int64_t cut = 0; cut < 2; cut++) { /* together, and weight and scales in two shards */
    written f32 = {0}, bf16 = {0}, power = {0};
    add(&f32, "w", WN_F8_E4M3, 2, ROWS, COLS, codes);
    bf16 = power = f32;
    add(&f32, "w_scale_inv", WN_F32, 2, 2, 2, good);
    add(&bf16, "w_scale_inv", WN_BF16, 2, 2, 2, halves);
    add(&power, "w_scale_inv", WN_F8_E8M0, 2, 2, 2, e8m0);
    expect_products(open_written(state, &f32, cut), good);
    expect_products(open_written(state, &bf16, cut), rounded);
    expect_products(open_written(state, &power, cut), powers);
  }
}

static void refuse(void **state, const written *w, const char *name, const char *sentence) {
  wn_hf_dir *dir = open_written(state, w, 0);
  wn_hf_weight weight;
  REFUSED(wn_hf_weight_find(&weight, dir, name), WN_E_INPUT, sentence);
  wn_hf_dir_close(dir);
}

static void scales_that_do_not_fit(void **state) {
  written alone = {0}, w;
  fill_codes();
  add(&alone, "w", WN_F8_E4M3, 2, ROWS, COLS, codes);
  refuse(state, &alone, "w", "w is FP8 and has no w_scale_inv");
  w = alone;
  add(&w, "w_scale_inv", WN_F32, 2, 1, 4, good);
  refuse(state, &w, "w", "w_scale_inv has not the shape [2, 2]");
  w = alone;
  add(&w, "w_scale_inv", WN_F32, 1, 4, 0, good);
  refuse(state, &w, "w", "w_scale_inv has not the shape [2, 2]");
  w = alone;
  add(&w, "w_scale_inv", WN_I32, 2, 2, 2, good);
  refuse(state, &w, "w", "w_scale_inv is I32");
  w = (written){0};
  add(&w, "w_scale_inv", WN_F32, 2, 2, 2, good);
  refuse(state, &w, "w", "w_scale_inv belongs to no FP8 weight: w is absent");
  add(&w, "w", WN_BF16, 2, 65, 150, codes);
  refuse(state, &w, "w", "w_scale_inv belongs to no FP8 weight: w is BF16");
}

/* A value is refused by whoever reads its block, and by nobody else. */
static void refuse_value(void **state, float scale, int32_t code_at, uint8_t code, const char *sentence) {
  float scales[4] = {good[0], good[1], good[2], scale}, *out = malloc(sizeof *out * ROWS * COLS);
  written w = {0};
  assert_non_null(out);
  fill_codes();
  codes[code_at] = code;
  add(&w, "w", WN_F8_E4M3, 2, ROWS, COLS, codes);
  add(&w, "w_scale_inv", WN_F32, 2, 2, 2, scales);
  wn_hf_dir *dir = open_written(state, &w, 0);
  wn_hf_weight weight = find(dir, "w");
  REFUSED(wn_hf_read(out, WN_F32, &weight, 0, ROWS * COLS), WN_E_INPUT, sentence);
  REFUSED(wn_hf_read(out, WN_BF16, &weight, 128 * COLS, 2 * COLS), WN_E_INPUT, sentence);
  if (code) REFUSED(wn_hf_read(out, WN_F8_E4M3, &weight, 128 * COLS, 2 * COLS), WN_E_INPUT, sentence);
  OK(wn_hf_read(out, WN_F32, &weight, 0, 128 * COLS));
  wn_hf_dir_close(dir);
  free(out);
}

static void values_that_are_none(void **state) {
  const int32_t last = ROWS * COLS - 1;
  refuse_value(state, NAN, 0, 0,
               "/model.safetensors: tensor w_scale_inv: scale [1, 1] is nan; scales lie above 0 and below 7.6e35");
  refuse_value(state, -NAN, 0, 0, "w_scale_inv: scale [1, 1] is");
  refuse_value(state, INFINITY, 0, 0, "w_scale_inv: scale [1, 1] is inf");
  refuse_value(state, 0, 0, 0, "w_scale_inv: scale [1, 1] is 0");
  refuse_value(state, -1, 0, 0, "w_scale_inv: scale [1, 1] is -1");
  refuse_value(state, 1, last, 0x7f, "/model.safetensors: tensor w holds NaN at [129, 149]");
  refuse_value(state, 1, last, 0xff, "w holds NaN at [129, 149]");
  refuse_value(state, 8e35f, 0, 0, "w_scale_inv: scale [1, 1] is 8e+35");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEMP_TEST(floats),
      TEMP_TEST(every_f16),
      TEMP_TEST(elements_that_are_no_numbers),
      TEMP_TEST(the_largest_numbers),
      TEMP_TEST(fp8),
      TEMP_TEST(scales_that_do_not_fit),
      TEMP_TEST(values_that_are_none),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
