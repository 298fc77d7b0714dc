/* The exact top-k of one row, on its own: it is the one place that breaks ties. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "support/test.h"

#include "kernels/cpu/topk.h"
#include "support/plain_attention.h"

/* This file is the FP32 build's (WN_REAL64 is not set in tests); FP64 goes through the operations. */
enum { MAX = 700 };

static void check_row(const char *what, const float *score, int32_t count, int64_t k, int32_t base) {
  int32_t pick[MAX], want[MAX];
  wn_score_key *key = malloc(sizeof *key * MAX);
  double wide[MAX];
  uint8_t seen[MAX];
  float *kept = malloc(sizeof *kept * (size_t)(count ? count : 1));
  for (int32_t i = 0; i < count; i++) {
    kept[i] = score[i];
    wide[i] = (double)score[i];
    seen[i] = 1;
  }
  for (int64_t i = 0; i < k; i++) pick[i] = -7;
  wn_cpu_top_k_f32(pick, k, kept, key, count, base);
  plain_top_k(want, k, wide, seen, count);
  for (int64_t i = 0; i < k; i++) {
    int32_t expected = want[i] < 0 ? -1 : want[i] + base;
    if (pick[i] != expected)
      fail_msg("%s: count %d k %lld place %lld: %d, expected %d", what, count, (long long)k, (long long)i, pick[i],
               expected);
  }
  assert_memory_equal(kept, score, (size_t)count * sizeof *kept);
  free(key);
  free(kept);
}

static const int64_t ks[] = {1, 2, 3, 16, 64, 257};
static const int32_t counts[] = {0, 1, 2, 15, 16, 17, 63, 64, 65, 257, 258, 600};

static void every_size(const char *what, const float *score) {
  for (size_t i = 0; i < sizeof ks / sizeof ks[0]; i++)
    for (size_t j = 0; j < sizeof counts / sizeof counts[0]; j++)
      check_row(what, score, counts[j], ks[i], (int32_t)j * 3);
}

static float draw(uint64_t seed, int i) {
  return (float)wn_rng_normal(seed, WN_RNG_TEST, (uint64_t)i);
}

static void random_rows(void **state) {
  (void)state;
  float score[MAX];
  for (uint64_t seed = 0; seed < 6; seed++) {
    for (int i = 0; i < MAX; i++) score[i] = draw(seed, i) * powf(10, (float)seed - 3);
    every_size("random", score);
  }
}

static void ties_go_to_the_lowest_key(void **state) {
  (void)state;
  float score[MAX];
  for (int i = 0; i < MAX; i++) score[i] = 0;
  every_size("all zero", score);
  for (int i = 0; i < MAX; i++) score[i] = -3.25f;
  every_size("all equal and negative", score);
  for (int i = 0; i < MAX; i++) score[i] = i % 2 ? 0.0f : -0.0f;
  every_size("zeros of both signs", score);
  for (int i = 0; i < MAX; i++) score[i] = fmaxf(draw(3, i) - 1, 0); /* dead ReLUs */
  every_size("plateau at zero", score);
  for (int i = 0; i < MAX; i++) score[i] = i % 7 == 0 ? -fmaxf(draw(4, i), 0) : 0;
  every_size("plateau above negatives", score);
  for (int i = 0; i < MAX; i++) score[i] = (float)(int)(draw(5, i) * 2);
  every_size("few values", score);
}

/* Neighbours in the last bit, and all exponents: what coarse keys and fixed buckets get wrong. */
static void near_and_far_values(void **state) {
  (void)state;
  float score[MAX], x = 1;
  for (int i = 0; i < MAX; i++) {
    score[(i * 211) % MAX] = x;
    x = nextafterf(x, 2);
  }
  every_size("one bucket", score);
  for (int i = 0; i < MAX; i++) score[i] = ldexpf(draw(6, i), (i * 37) % 250 - 125);
  every_size("all exponents", score);
  for (int i = 0; i < MAX; i++) score[i] = (float)(i % 5 - 2) * 1.4e-45f;
  every_size("subnormals", score);
}

static void infinities_and_nan(void **state) {
  (void)state;
  float score[MAX];
  for (int i = 0; i < MAX; i++) score[i] = -INFINITY;
  every_size("all -inf", score);
  for (int i = 0; i < MAX; i++) score[i] = i % 2 ? NAN : -NAN;
  every_size("all NaN", score);
  for (int i = 0; i < MAX; i++) score[i] = i % 3 == 0 ? NAN : i % 3 == 1 ? -INFINITY : draw(7, i);
  every_size("NaN, -inf and numbers", score);
  for (int i = 0; i < MAX; i++)
    score[i] = i % 5 == 0 ? INFINITY : i % 5 == 1 ? -FLT_MAX : i % 5 == 2 ? FLT_MAX : draw(8, i);
  every_size("infinities and largest", score);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(random_rows),
      cmocka_unit_test(ties_go_to_the_lowest_key),
      cmocka_unit_test(near_and_far_values),
      cmocka_unit_test(infinities_and_nan),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
