/* base/float8 against torch, bit for bit: tests/fixtures/float8.safetensors, made by
 * tests/oracle/make_float8_fixture.py. */
#include "support/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/float8.h"
#include "io/safetensors.h"

static wn_safetensors *fixture;

static int set_up(void **state) {
  (void)state;
  OK(wn_safetensors_open(&fixture, "tests/fixtures/float8.safetensors"));
  return 0;
}

static int tear_down(void **state) {
  (void)state;
  wn_safetensors_close(fixture);
  return 0;
}

static const wn_st_entry *find(int number, const char *name) {
  char full[64];
  snprintf(full, sizeof full, "case%d.%s", number, name);
  return wn_safetensors_find(fixture, number < 0 ? name : full);
}

/* An aligned copy; freed by the caller. */
static void *copy(const wn_st_entry *entry, wn_dtype dtype, int64_t *n) {
  assert_non_null(entry);
  assert_int_equal(entry->dtype, dtype);
  void *data = malloc(entry->bytes);
  assert_non_null(data);
  memcpy(data, entry->data, entry->bytes);
  if (n) *n = (int64_t)entry->bytes / wn_dtype_bytes(dtype);
  return data;
}

static float from_bits(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

static void expect_float(const char *what, int64_t i, float got, float want) {
  if (isnan(got) && isnan(want)) return;
  if (memcmp(&got, &want, sizeof got) != 0) fail_msg("%s[%lld]: %a, expected %a", what, (long long)i, got, want);
}

static void expect_code(const char *what, int64_t i, float x, uint8_t want) {
  uint8_t got = wn_e4m3_from_f32(x);
  if (got != want) fail_msg("%s[%lld]: %a became %02x, expected %02x", what, (long long)i, x, got, want);
}

static void every_code(void **state) {
  (void)state;
  int32_t *e4m3 = copy(find(-1, "e4m3.values"), WN_I32, NULL), *e8m0 = copy(find(-1, "e8m0.values"), WN_I32, NULL);
  for (int code = 0; code < 256; code++) {
    expect_float("e4m3", code, wn_f32_from_e4m3((uint8_t)code), from_bits(e4m3[code]));
    expect_float("e8m0", code, wn_f32_from_e8m0((uint8_t)code), from_bits(e8m0[code]));
    if ((code & 0x7f) != 0x7f) expect_code("its own", code, from_bits(e4m3[code]), (uint8_t)code);
  }
  free(e4m3);
  free(e8m0);
}

static void every_bf16_and_chosen_floats(void **state) {
  (void)state;
  int64_t n;
  uint8_t *codes = copy(find(-1, "bf16.codes"), WN_U8, &n);
  assert_int_equal(n, 65536);
  for (int64_t i = 0; i < n; i++) expect_code("bf16", i, wn_f32_from_bf16((uint16_t)i), codes[i]);
  free(codes);
  int32_t *bits = copy(find(-1, "floats"), WN_I32, &n);
  codes = copy(find(-1, "floats.codes"), WN_U8, NULL);
  assert_true(n > 8192);
  for (int64_t i = 0; i < n; i++) expect_code("floats", i, from_bits(bits[i]), codes[i]);
  free(codes);
  free(bits);
}

static void scales(void **state) {
  (void)state;
  int64_t n;
  float *amax = copy(find(-1, "amax"), WN_F32, &n), *want = copy(find(-1, "amax.scales"), WN_F32, NULL);
  for (int64_t i = 0; i < n; i++) expect_float("scale", i, wn_f8_scale(amax[i]), want[i]);
  free(amax);
  free(want);
}

static void dequantise(int number, const wn_st_entry *entry) {
  int64_t n, cols = entry->dim[1];
  uint8_t *codes = copy(entry, WN_U8, &n);
  float *scale = copy(find(number, "scales"), WN_F32, NULL), *got = calloc((size_t)n + 1, sizeof *got);
  int32_t *want = copy(find(number, "f32"), WN_I32, NULL);
  uint16_t *bf16 = copy(find(number, "bf16"), WN_BF16, NULL);
  assert_non_null(got);
  wn_f8_dequantise(got, codes, scale, cols, 0, n);
  for (int64_t i = 0; i < n; i++) {
    expect_float("dequantised", i, got[i], from_bits(want[i]));
    expect_float("and rounded", i, wn_f32_from_bf16(wn_bf16_from_f32(got[i])), wn_f32_from_bf16(bf16[i]));
  }
  for (int64_t first = 0; first < n; first += 1 + n / 7) { /* any flat range, and nothing beyond it */
    int64_t count = (n - first) / 2;
    memset(got, 0, (size_t)n * sizeof *got);
    wn_f8_dequantise(got, codes + first, scale, cols, first, count);
    for (int64_t i = 0; i < count; i++) expect_float("range", first + i, got[i], from_bits(want[first + i]));
    assert_true(got[count] == 0);
  }
  free(codes);
  free(scale);
  free(got);
  free(want);
  free(bf16);
}

static void quantise(int number, const wn_st_entry *entry) {
  int64_t n, rows = entry->dim[0], cols = entry->dim[1], across = wn_f8_blocks(cols);
  float *x = copy(entry, WN_F32, &n), *scale = copy(find(number, "scales"), WN_F32, NULL);
  uint8_t *want = copy(find(number, "codes"), WN_U8, NULL), *got = calloc((size_t)n, 1);
  assert_non_null(got);
  for (int64_t r = 0; r < rows; r += WN_F8_BLOCK)
    for (int64_t c = 0; c < cols; c += WN_F8_BLOCK) {
      float one;
      int64_t high = rows - r < WN_F8_BLOCK ? rows - r : WN_F8_BLOCK, at = r * cols + c;
      int64_t wide = cols - c < WN_F8_BLOCK ? cols - c : WN_F8_BLOCK;
      wn_f8_quantise_block(got + at, &one, x + at, high, wide, cols, cols);
      expect_float("block's scale", at, one, scale[r / WN_F8_BLOCK * across + c / WN_F8_BLOCK]);
    }
  for (int64_t i = 0; i < n; i++)
    if (got[i] != want[i]) fail_msg("case %d[%lld]: %02x, expected %02x", number, (long long)i, got[i], want[i]);
  free(x);
  free(scale);
  free(want);
  free(got);
}

static void matrices(void **state) {
  (void)state;
  int number = 0;
  for (; find(number, "codes"); number++) {
    const wn_st_entry *x = find(number, "x");
    if (x)
      quantise(number, x);
    else
      dequantise(number, find(number, "codes"));
  }
  assert_int_equal(number, 10);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_code),
      cmocka_unit_test(every_bf16_and_chosen_floats),
      cmocka_unit_test(scales),
      cmocka_unit_test(matrices),
  };
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
