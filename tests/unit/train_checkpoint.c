/* Saving and loading on one rank: what comes back, what the files are, and which checkpoints stand. */
#include "support/checkpoint.h"

#include <sys/stat.h>

static wn_world *world;

static int make_world(void **state) {
  (void)state;
  wn_status status = wn_world_create(&world, 60);
  wn_status_free(status);
  return status != NULL;
}

static int free_world(void **state) {
  (void)state;
  wn_world_free(world);
  return 0;
}

static const wn_param_settings all_f32 = {.train_base = true, .train_indexer = true, .file_dtype = WN_F32};
static const wn_param_settings all_bf16 = {.train_base = true, .train_indexer = true, .file_dtype = WN_BF16};

static void round_trip(void **state, wn_param_settings settings) {
  test_rig rig;
  bool found;
  char path[WN_PATH_BYTES];
  wn_state read = {0};
  OK(test_rig_create(&rig, world, &test_config, settings, WN_STAGE_ADAPT, *state, ""));
  OK(test_values(&rig, TEST_FILL, 1, false, false));
  OK(wn_checkpoint_save(&rig.plan, &test_state));
  OK(test_values(&rig, TEST_CLEAR, 0, false, false));
  OK(wn_checkpoint_newest(&rig.plan, path, &found));
  assert_true(found);
  assert_string_equal(strrchr(path, '/'), "/step-000100");
  OK(wn_checkpoint_load(&rig.plan, path, &read));
  OK(test_values(&rig, TEST_COMPARE, 1, false, false));
  OK(test_same_state(&read, &test_state));
  /* as init: the weights alone, rounded where the model files are */
  OK(test_values(&rig, TEST_CLEAR, 0, false, false));
  OK(wn_init_load(&rig.plan, path, false));
  OK(test_values(&rig, TEST_COMPARE, 1, true, settings.file_dtype == WN_BF16));
  test_rig_free(&rig);
}

static void round_trip_f32(void **state) { round_trip(state, all_f32); }
static void round_trip_bf16(void **state) { round_trip(state, all_bf16); }

int main(void) {
  const struct CMUnitTest tests[] = {
      TEMP_TEST(round_trip_f32),
      TEMP_TEST(round_trip_bf16),
  };
  return cmocka_run_group_tests(tests, make_world, free_world);
}
