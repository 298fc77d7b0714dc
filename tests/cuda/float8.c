/* FP8 weights on the GPU, bit for bit as on the CPU. */
#include "support/twin.h"

static float scale_at(int64_t block) {
  static const float some[] = {1.0f, 0x1p-10f, 3.1e-4f, 1.2345678e-20f, 7.9e30f, 0x1p-130f, 1e-38f, 0.0f, 3e38f};
  return some[block % (int64_t)(sizeof some / sizeof *some)];
}

typedef struct operands {
  wn_tensor w, codes, scale;
} operands;

/* `off`: elements between a 256-byte address and the first. */
static operands on(wn_device *d, int64_t rows, int64_t cols, int64_t off, const uint8_t *codes, const float *scale) {
  operands o;
  OK(wn_tensor_alloc(&o.w, d->stash, "test", d->dtype_of[WN_ACT], 1, rows * cols + off, 0, 0, 0));
  OK(wn_tensor_alloc(&o.codes, d->stash, "test", WN_F8_E4M3, 1, rows * cols + off, 0, 0, 0));
  OK(wn_tensor_alloc(&o.scale, d->stash, "test", WN_F32, 2, (rows + 127) / 128, (cols + 127) / 128, 0, 0));
  o.w = wn_tensor_view(wn_tensor_slice(o.w, 0, off, rows * cols), 2, rows, cols, 0, 0);
  o.codes = wn_tensor_view(wn_tensor_slice(o.codes, 0, off, rows * cols), 2, rows, cols, 0, 0);
  OK(d->ops->upload(d, &o.codes, codes));
  OK(d->ops->upload(d, &o.scale, scale));
  OK(d->ops->dequantise(d, &o.w, &o.codes, &o.scale));
  return o;
}

static void one_shape(twin_bench *b, int64_t rows, int64_t cols, int64_t off) {
  int64_t n = rows * cols, blocks = (rows + 127) / 128 * ((cols + 127) / 128);
  uint8_t *codes = malloc((size_t)n);
  uint16_t *got = malloc((size_t)n * 2);
  float *scale = malloc((size_t)blocks * sizeof *scale);
  assert_true(codes && got && scale);
  for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)(i * 37 + i / 256);
  for (int64_t i = 0; i < blocks; i++) scale[i] = scale_at(i);
  operands cpu = on(b->cpu, rows, cols, 0, codes, scale), cuda = on(b->cuda, rows, cols, off, codes, scale);
  OK(b->cuda->ops->download(b->cuda, got, &cuda.w));
  for (int64_t i = 0; i < n; i++) {
    double want = wn_test_get(&cpu.w, i);
    uint16_t bits = wn_bf16_from_f32((float)want);
    if (isnan(want) ? (got[i] & 0x7fff) > 0x7f80 : got[i] == bits) continue;
    fail_msg("[%lld,%lld] at %lld, code %02x: %04x instead of %04x", (long long)rows, (long long)cols, (long long)i,
             codes[i], got[i], bits);
  }
  free(codes);
  free(got);
  free(scale);
}

static void as_the_cpu(void **state) {
  twin_bench *b = twin_begin(state);
  static const int64_t shapes[][2] = {{1, 1},     {1, 256}, {128, 128}, {129, 127}, {2, 1000},
                                      {300, 257}, {1, 131}, {576, 384}, {37, 16},   {1001, 2048}};
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
    for (int64_t off = 0; off <= 1; off++) {
      one_shape(b, shapes[i][0], shapes[i][1], off);
      twin_end(b);
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(as_the_cpu)};
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
