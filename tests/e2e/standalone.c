/* A run that saved something needs nothing of init any more: where init has gone away, it goes on to the same bytes. */
#include "support/tiny.h"

static void goes_on(void **state, const char *stage, const char *init, int64_t steps) {
  const char *dir = *state;
  char line[2048], whole[64], cut[64];
  snprintf(whole, sizeof whole, "%s-whole", stage);
  snprintf(cut, sizeof cut, "%s-cut", stage);
  snprintf(line, sizeof line, "%s %s/job.yaml init=%s/gone checkpoint.interval=2", stage, dir, dir);
  OK(wn_rename_sync(wn_temp(state, init).text, wn_temp(state, "gone").text));
  wn_winnow_ends(0, 1, "%s run_dir=%s/%s training.steps=%lld", line, dir, whole, (long long)steps);
  wn_winnow_ends(0, 1, "%s run_dir=%s/%s training.steps=%lld", line, dir, cut, (long long)steps - 2);
  OK(wn_rename_sync(wn_temp(state, "gone").text, wn_temp(state, init).text));
  wn_winnow_refuses(WN_E_CONFIG, "gone/config.json is absent", "%s run_dir=%s/other training.steps=1", line, dir);
  wn_winnow_ends(0, 1, "%s run_dir=%s/%s training.steps=%lld", line, dir, cut, (long long)steps);
  tiny_expect_same_tree(tiny_step(state, cut, steps).text, tiny_step(state, whole, steps).text);
}

static void a_warmup_outlives_its_base(void **state) {
  goes_on(state, "warmup", "base", 4);
}

static void an_adaptation_outlives_its_warmup(void **state) {
  goes_on(state, "adapt", "warmup-whole/checkpoints/step-000004", 4);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_warmup_outlives_its_base),
      cmocka_unit_test(an_adaptation_outlives_its_warmup),
  };
  return cmocka_run_group_tests(tests, tiny_setup, wn_temp_teardown);
}
