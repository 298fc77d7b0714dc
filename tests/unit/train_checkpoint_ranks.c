/* The world's size is not part of the format. Started by hand this is a cmocka test that starts itself under mpirun; a
 * rank runs the scenario named by its argument and ends like the program's main would: with the error's sentence and
 * code. */
#include "support/checkpoint.h"
#include "support/rank_exit.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* ---- what a rank does ---- */

static const wn_param_settings adapt = {.train_base = true, .train_indexer = true, .file_dtype = WN_BF16};
static const wn_param_settings warmup = {.train_indexer = true, .file_dtype = WN_F32};

static wn_status save_adapt(test_rig *rig) {
  WN_TRY(test_values(rig, TEST_FILL, 11, false, false));
  return wn_checkpoint_save(&rig->plan, &test_state);
}

static wn_status load_adapt(test_rig *rig) {
  char path[WN_PATH_BYTES];
  bool found;
  wn_state read;
  WN_TRY(test_values(rig, TEST_CLEAR, 0, false, false));
  WN_TRY(wn_checkpoint_newest(&rig->plan, path, &found));
  if (!found) return WN_FAIL(WN_E_CHECK, "found no checkpoint in %s", rig->plan.run_dir);
  WN_TRY(wn_checkpoint_load(&rig->plan, path, &read));
  WN_TRY(test_values(rig, TEST_COMPARE, 11, false, false));
  WN_TRY(test_same_state(&read, &test_state));
  WN_TRY(test_values(rig, TEST_CLEAR, 0, false, false));
  WN_TRY(wn_init_load(&rig->plan, path, false));
  return test_values(rig, TEST_COMPARE, 11, true, true);
}

/* The last rank may write no file longer than a few bytes: everyone's save fails, and rank 0 cleans up. */
static wn_status save_where_one_cannot(test_rig *rig) {
  wn_state at = test_state;
  at.step++;
  if (wn_world_rank(rig->world) == wn_world_size(rig->world) - 1) {
    struct rlimit small = {.rlim_cur = 64, .rlim_max = 64};
    signal(SIGXFSZ, SIG_IGN);
    if (setrlimit(RLIMIT_FSIZE, &small) != 0) return WN_FAIL(WN_E_CHECK, "setrlimit");
  }
  return wn_checkpoint_save(&rig->plan, &at);
}

/* From init, drawn indexer and all: what each rank holds is what one rank alone would hold. */
static wn_status start_warmup(test_rig *rig) {
  WN_TRY(wn_init_load(&rig->plan, rig->plan.init_dir, true));
  return wn_checkpoint_save(&rig->plan, &test_state);
}

static wn_status start_random(test_rig *rig) {
  WN_TRY(wn_init_random(&rig->plan));
  return wn_checkpoint_save(&rig->plan, &test_state);
}

typedef struct scenario {
  const char *name;
  wn_status (*run)(test_rig *);
  wn_stage stage;
  const wn_param_settings *settings;
} scenario;
static const scenario scenarios[] = {
    {"save", save_adapt, WN_STAGE_ADAPT, &adapt},
    {"load", load_adapt, WN_STAGE_ADAPT, &adapt},
    {"fail", save_where_one_cannot, WN_STAGE_ADAPT, &adapt},
    {"random", start_random, WN_STAGE_ADAPT, &adapt},
    {"warmup", start_warmup, WN_STAGE_WARMUP, &warmup},
};

static int rank_main(const char *name, const char *run, const char *init) {
  wn_world *world = NULL;
  test_rig rig = {0};
  wn_status status = wn_world_create(&world, 30);
  for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
    if (status || strcmp(name, scenarios[i].name) != 0) continue;
    status = test_rig_create(&rig, world, &test_config, *scenarios[i].settings, scenarios[i].stage, run, init);
    if (!status) status = scenarios[i].run(&rig);
  }
  test_rig_free(&rig);
  return wn_rank_exit(world, status);
}

/* ---- what the test does ---- */

static const char *self;

static int launch(char text[16384], int32_t ranks, const char *name, const char *run, const char *init) {
  char command[4096];
  int used = snprintf(command, sizeof command,
                      "OMPI_MCA_mpi_yield_when_idle=1 OMP_NUM_THREADS=1 timeout 60 mpirun --allow-run-as-root "
                      "--oversubscribe -np %d '%s' %s '%s' '%s' 2>&1",
                      ranks, self, name, run, init);
  assert_true(used > 0 && used < (int)sizeof command);
  FILE *pipe = popen(command, "r");
  assert_non_null(pipe);
  size_t got = fread(text, 1, 16383, pipe);
  text[got] = 0;
  while (fgetc(pipe) != EOF) continue;
  int ended = pclose(pipe);
  return WIFEXITED(ended) ? WEXITSTATUS(ended) : -1;
}

static void must_hold(int32_t ranks, const char *name, const char *run, const char *init) {
  char text[16384];
  int code = launch(text, ranks, name, run, init);
  if (code != 0) fail_msg("%s on %d ranks ended with %d: %s", name, ranks, code, text);
}

/* Same names and same bytes, but for state.json, which says how many ranks wrote it, and so the manifest. */
static void expect_same_files(const char *a, const char *b) {
  char left[WN_PATH_BYTES], right[WN_PATH_BYTES], **names, **others;
  size_t n, m, bytes_a, bytes_b, compared = 0;
  OK(wn_list_dir(&names, &n, a));
  OK(wn_list_dir(&others, &m, b));
  assert_int_equal(n, m);
  for (size_t i = 0; i < n; i++) {
    char *x, *y;
    assert_string_equal(names[i], others[i]);
    if (!strcmp(names[i], "state.json") || !strcmp(names[i], WN_MANIFEST_NAME)) continue;
    OK(wn_path(left, "%s/%s", a, names[i]));
    OK(wn_path(right, "%s/%s", b, names[i]));
    OK(wn_read_file(&x, &bytes_a, left, 1 << 20));
    OK(wn_read_file(&y, &bytes_b, right, 1 << 20));
    if (bytes_a != bytes_b || memcmp(x, y, bytes_a) != 0) fail_msg("%s and %s differ", left, right);
    compared++;
    free(x);
    free(y);
  }
  assert_true(compared >= 4);
  wn_list_free(names, n);
  wn_list_free(others, m);
}

typedef struct run_paths {
  char run[300], step[400];
} run_paths;
static run_paths paths_of(void **state, const char *name, int32_t ranks) {
  run_paths paths;
  snprintf(paths.run, sizeof paths.run, "%s/%s%d", (const char *)*state, name, ranks);
  snprintf(paths.step, sizeof paths.step, "%s/checkpoints/step-000100", paths.run);
  return paths;
}

static void compare_worlds(void **state, const char *name, const char *init) {
  run_paths one = paths_of(state, name, 1), two = paths_of(state, name, 2), three = paths_of(state, name, 3);
  must_hold(1, name, one.run, init);
  must_hold(2, name, two.run, init);
  must_hold(3, name, three.run, init);
  OK(wn_checkpoint_verify(two.step));
  OK(wn_checkpoint_verify(three.step));
  expect_same_files(one.step, two.step);
  expect_same_files(one.step, three.step);
}

static void save_and_load_anywhere(void **state) {
  compare_worlds(state, "save", "");
  must_hold(1, "load", paths_of(state, "save", 2).run, "");
  must_hold(3, "load", paths_of(state, "save", 2).run, "");
  must_hold(2, "load", paths_of(state, "save", 3).run, "");
}

static void start_anywhere(void **state) {
  wn_temp_path init = wn_temp(state, "init");
  wn_model_config base = test_config;
  base.has_indexer = false;
  test_dir_write(init.text, &base, (test_dir){.dtype = WN_BF16, .shards = 2, .mtp = true}, 5);
  compare_worlds(state, "warmup", init.text);
  compare_worlds(state, "random", "");
}

static void one_rank_cannot_write(void **state) {
  run_paths paths = paths_of(state, "save", 2);
  char text[16384], checkpoints[400], **names;
  size_t n;
  must_hold(2, "save", paths.run, "");
  assert_int_equal(launch(text, 2, "fail", paths.run, ""), WN_E_IO);
  if (!strstr(text, "rank says: rank 1 failed: cannot write") || !strstr(text, "rank says: cannot write"))
    fail_msg("ranks said: %s", text);
  snprintf(checkpoints, sizeof checkpoints, "%s/checkpoints", paths.run);
  OK(wn_list_dir(&names, &n, checkpoints));
  assert_int_equal(n, 1);
  wn_list_free(names, n);
  must_hold(3, "load", paths.run, "");
}

/* A byte of any file, whichever rank it is that reads it. */
static void damage_is_seen_by_all(void **state) {
  run_paths paths = paths_of(state, "save", 2);
  char text[16384], path[WN_PATH_BYTES], **names, *data;
  size_t n, bytes;
  must_hold(2, "save", paths.run, "");
  OK(wn_list_dir(&names, &n, paths.step));
  for (size_t i = 0; i < n; i += 3) {
    if (!strcmp(names[i], WN_MANIFEST_NAME)) continue;
    OK(wn_path(path, "%s/%s", paths.step, names[i]));
    OK(wn_read_file(&data, &bytes, path, 1 << 20));
    data[bytes / 2] ^= 1;
    wn_temp_write(path, data, bytes);
    assert_int_equal(launch(text, 2, "load", paths.run, ""), WN_E_INPUT);
    if (!strstr(text, names[i])) fail_msg("%s was damaged; the ranks said: %s", names[i], text);
    data[bytes / 2] ^= 1;
    wn_temp_write(path, data, bytes);
    free(data);
  }
  wn_list_free(names, n);
  must_hold(2, "load", paths.run, "");
}

int main(int argc, char **argv) {
  if (argc == 4) return rank_main(argv[1], argv[2], argv[3]);
  self = argv[0];
  const struct CMUnitTest tests[] = {
      TEMP_TEST(save_and_load_anywhere),
      TEMP_TEST(start_anywhere),
      TEMP_TEST(one_rank_cannot_write),
      TEMP_TEST(damage_is_seen_by_all),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
