#include "data/dataset.h"

#include <stdlib.h>

#include "support/test.h"

/* Each run of n consecutive sequences from a multiple of n on meets every window once, whatever the batch size. */
static void an_epoch_is_a_permutation(void **state) {
  (void)state;
  static const int64_t sizes[] = {1, 2, 3, 7, 64, 1000}, batches[] = {1, 3, 16, 64};
  for (size_t s = 0; s < 6; s++)
    for (size_t b = 0; b < 4; b++) {
      int64_t n = sizes[s], batch = batches[b];
      for (int64_t epoch = 0; epoch < 3; epoch++) {
        uint8_t *seen = calloc((size_t)n, 1);
        assert_non_null(seen);
        for (int64_t i = epoch * n; i < (epoch + 1) * n; i++) {
          int64_t window = wn_sampler_window(11, n, i / batch, batch, i % batch);
          assert_in_range(window, 0, n - 1);
          assert_int_equal(seen[window]++, 0);
        }
        free(seen);
      }
    }
}

static int64_t agreements(uint64_t seed_a, int64_t epoch_a, uint64_t seed_b, int64_t epoch_b) {
  int64_t same = 0, n = 1000;
  for (int64_t i = 0; i < n; i++)
    same += wn_sampler_window(seed_a, n, epoch_a * n + i, 1, 0) == wn_sampler_window(seed_b, n, epoch_b * n + i, 1, 0);
  return same;
}

/* Two random permutations agree in one place on average (Poisson): 12 has probability 1e-10. */
static void epochs_and_seeds_differ(void **state) {
  (void)state;
  assert_int_equal(agreements(1, 0, 1, 0), 1000);
  assert_in_range(agreements(1, 0, 1, 1), 0, 12);
  assert_in_range(agreements(1, 1, 1, 2), 0, 12);
  assert_in_range(agreements(1, 0, 2, 0), 0, 12);
  assert_in_range(agreements(1, 0, 1ull << 63, 0), 0, 12);
}

static void order_depends_on_the_sequence_alone(void **state) {
  (void)state;
  for (int64_t i = 0; i < 96; i++)
    assert_int_equal(wn_sampler_window(3, 41, i / 16, 16, i % 16), wn_sampler_window(3, 41, i / 3, 3, i % 3));
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(an_epoch_is_a_permutation),
                                     cmocka_unit_test(epochs_and_seeds_differ),
                                     cmocka_unit_test(order_depends_on_the_sequence_alone)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
