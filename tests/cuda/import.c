/* Released FP8 directories into training on a GPU: the codes stay codes on the device, and what they train is what the
 * BF16 that they stand for trains. */
#include "support/fp8_model.h"
#include "support/gpu.h"

static void fp8_trains_as_what_it_stands_for(void **state) {
  wn_needs_gpus(1);
  const char *dir = *state;
  for (int32_t fp8 = 0; fp8 < 2; fp8++)
    wn_winnow_ends(0, 1, "warmup %s/job.yaml device=cuda init=%s/%s run_dir=%s/%s-run training.steps=4", dir, dir,
                   fp8 ? "fp8" : "bf16", dir, fp8 ? "fp8" : "bf16");
  tiny_expect_same_tables(state, "fp8-run", "bf16-run");
  wn_hf_dir *before, *after, *twin;
  int64_t codes = 0, floats = 0;
  OK(wn_hf_dir_open(&before, wn_temp(state, "fp8").text));
  OK(wn_hf_dir_open(&after, tiny_step(state, "fp8-run", 4).text));
  OK(wn_hf_dir_open(&twin, tiny_step(state, "bf16-run", 4).text));
  for (int64_t i = 0; i < wn_hf_dir_count(after); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(after, i, NULL), *base = wn_hf_dir_find(before, entry->name, NULL);
    const wn_st_entry *other = wn_hf_dir_find(twin, entry->name, NULL);
    if (base && tiny_bits_differ(entry, base)) fail_msg("%s changed", entry->name);
    if (!base && (!other || tiny_bits_differ(entry, other))) fail_msg("%s differs", entry->name);
    codes += entry->dtype == WN_F8_E4M3;
    floats += !base;
  }
  assert_true(codes > 50);
  assert_int_equal(floats, 3 * 5);
  wn_hf_dir_close(before);
  wn_hf_dir_close(after);
  wn_hf_dir_close(twin);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(fp8_trains_as_what_it_stands_for)};
  return cmocka_run_group_tests(tests, fp8_pair_setup, wn_temp_teardown);
}
