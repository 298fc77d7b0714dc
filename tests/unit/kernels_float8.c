/* FP8 weights to what operations take, against a table of codes written from the format's definition and products in
 * FP64. */
#include <stdlib.h>

#include "support/cpu.h"

/* (-1)^sign 2^(exponent - 7) (1 + mantissa / 8); exponent 0: 2^-6 mantissa / 8; exponent and mantissa full: NaN. */
static double value_of(int code) {
  int exponent = code >> 3 & 15, mantissa = code & 7;
  double magnitude = exponent ? ldexp(1 + mantissa / 8.0, exponent - 7) : ldexp(mantissa / 8.0, -6);
  if ((code & 0x7f) == 0x7f) return NAN;
  return code & 0x80 ? -magnitude : magnitude;
}

/* FP32 product, then BF16 to nearest even: in FP64 the product is exact. */
static double released(int code, float scale) {
  float product = (float)(value_of(code) * (double)scale);
  uint32_t bits, low;
  if (isnan(product) || isinf(product)) return (double)product;
  memcpy(&bits, &product, sizeof bits);
  low = bits & 0xffff;
  bits -= low;
  if (low > 0x8000 || (low == 0x8000 && (bits & 0x10000))) bits += 0x10000;
  memcpy(&product, &bits, sizeof bits);
  return (double)product;
}

static float scale_at(int64_t block) {
  static const float some[] = {1.0f, 0x1p-10f, 3.1e-4f, 1.2345678e-20f, 7.9e30f, 0x1p-130f, 1e-38f, 0.0f, 3e38f};
  return some[block % (int64_t)(sizeof some / sizeof *some)];
}

static void one_shape(wn_device *d, wn_dtype act, int64_t rows, int64_t cols) {
  int64_t high = (rows + 127) / 128, wide = (cols + 127) / 128;
  wn_tensor w = wn_test_tensor(d, act, 2, rows, cols, 0), codes, scale;
  OK(wn_tensor_alloc(&codes, d->stash, "test", WN_F8_E4M3, 2, rows, cols, 0, 0));
  OK(wn_tensor_alloc(&scale, d->stash, "test", WN_F32, 2, high, wide, 0, 0));
  for (int64_t i = 0; i < rows * cols; i++) ((uint8_t *)codes.data)[i] = (uint8_t)(i * 37 + i / 256);
  for (int64_t i = 0; i < high * wide; i++) ((float *)scale.data)[i] = scale_at(i);
  OK(d->ops->dequantise(d, &w, &codes, &scale));
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c++) {
      int code = ((uint8_t *)codes.data)[r * cols + c];
      double want = released(code, scale_at(r / 128 * wide + c / 128)), got = wn_test_get(&w, r * cols + c);
      if (isnan(want) ? isnan(got) : memcmp(&want, &got, sizeof got) == 0) continue;
      fail_msg("[%lld,%lld] of [%lld,%lld], code %02x: %.9g instead of %.9g", (long long)r, (long long)c,
               (long long)rows, (long long)cols, (unsigned)code, got, want);
    }
  wn_arena_release(d->stash, 0);
}

static void dequantises_as_released(void **state) {
  (void)state;
  static const int64_t shapes[][2] = {{1, 1},     {1, 256}, {128, 128}, {129, 127}, {2, 1000},
                                      {300, 257}, {1, 131}, {576, 384}, {37, 16}};
  wn_device *f32 = wn_test_cpu_f32(), *f64 = wn_test_cpu_f64();
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    one_shape(f32, WN_F32, shapes[i][0], shapes[i][1]);
    one_shape(f32, WN_BF16, shapes[i][0], shapes[i][1]);
    one_shape(f64, WN_F64, shapes[i][0], shapes[i][1]);
  }
  wn_cpu_free_f32(f32);
  wn_cpu_free_f64(f64);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(dequantises_as_released)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
