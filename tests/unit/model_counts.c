/* Parameters by part, against the figures that DeepSeek publishes and a count of the released files. */
#include "model/counts.h"
#include "support/test.h"

static wn_model_counts count(const char *dir, int32_t mtp_layers) {
  wn_model_config config;
  wn_model_counts counts;
  OK(wn_model_config_load(&config, dir));
  OK(wn_model_count(&counts, &config, mtp_layers));
  return counts;
}

static void the_released_models(void **state) {
  (void)state;
  wn_model_counts dense = count("configs/models/deepseek-v3.1", 1), sparse = count("configs/models/deepseek-v3.2", 1);
  assert_int_equal(dense.main, 671026419200);
  assert_int_equal(dense.mtp_own, 11610068224);
  assert_int_equal(sparse.main, 671877944064);
  assert_int_equal(sparse.part[WN_PART_INDEXER], 61 * 13959424LL);
  assert_int_equal(sparse.main - dense.main, sparse.part[WN_PART_INDEXER]);
  assert_int_equal(sparse.mtp_own - dense.mtp_own, 13959424); /* its layer has an indexer too */
  assert_int_equal(sparse.part[WN_PART_EXPERTS], 58 * 256 * 3LL * 7168 * 2048);
  assert_int_equal(sparse.part[WN_PART_HEAD], 129280LL * 7168);
  assert_int_equal(sparse.mtp_copies, 2 * 129280LL * 7168);
  assert_int_equal(sparse.total, 685355329792); /* "685B" */
}

static void parts_add_up(void **state) {
  (void)state;
  static const char *const dirs[] = {"configs/models/deepseek-v3.2", "configs/models/tiny", "configs/models/small"};
  for (size_t i = 0; i < sizeof dirs / sizeof *dirs; i++) {
    wn_model_counts c = count(dirs[i], 0);
    int64_t sum = 0;
    for (int32_t p = 0; p < WN_N_PARTS; p++) sum += c.part[p];
    assert_int_equal(sum, c.main);
    assert_int_equal(c.total, c.main); /* without a layer for multi-token prediction */
  }
}

static void a_token_takes_some_experts(void **state) {
  (void)state;
  wn_model_counts c = count("configs/models/deepseek-v3.1", 0);
  assert_int_equal(c.main - c.active, 58 * (256 - 8) * 3LL * 7168 * 2048); /* 37.6B are left: "37B activated" */
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(the_released_models), cmocka_unit_test(parts_add_up),
                                     cmocka_unit_test(a_token_takes_some_experts)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
