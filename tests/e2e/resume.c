/* A run that dies and goes on is the run that never died: weights, moments, state and tables, byte for byte. */
#include "support/tiny.h"

#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include "train/checkpoint.h"
#include "train/checkpoint_parts.h"
#include "train/state.h"

/* One job: a stage from a model, under so many ranks. */
typedef struct job {
  void **state;
  int32_t ranks;
  const char *stage, *init, *options; /* init: a name in the test's directory, or of an earlier run's last checkpoint */
} job;

static void start_line(const job *j, const char *run, char *out, size_t bytes) {
  const char *dir = *j->state;
  int n = snprintf(out, bytes, "%s %s/job.yaml init=%s/%s run_dir=%s/%s %s", j->stage, dir, dir, j->init, dir, run,
                   j->options);
  assert_true(n > 0 && (size_t)n < bytes);
}

static void run_to(const job *j, const char *run, int64_t steps, int64_t interval) {
  char line[4096];
  start_line(j, run, line, sizeof line);
  wn_winnow_ends(0, j->ranks, "%s training.steps=%lld checkpoint.interval=%lld", line, (long long)steps,
                 (long long)interval);
}

static wn_temp_path checkpoints_of(const job *j, const char *run) {
  wn_temp_path path;
  snprintf(path.text, sizeof path.text, "%s/%s/checkpoints", (const char *)*j->state, run);
  return path;
}

/* The process gets this far while the signal travels: checkpoints made meanwhile go, as if it had come at once. */
static void forget_after(const job *j, const char *run, int64_t step) {
  char **names, path[WN_PATH_BYTES], last[32];
  size_t n;
  wn_temp_path dir = checkpoints_of(j, run);
  snprintf(last, sizeof last, "step-%06lld", (long long)step);
  OK(wn_list_dir(&names, &n, dir.text));
  for (size_t i = 0; i < n; i++) {
    if (strncmp(names[i], "step-", 5) != 0 || strcmp(names[i], last) <= 0) continue;
    OK(wn_path(path, "%s/%s", dir.text, names[i]));
    OK(wn_remove_tree(path));
  }
  wn_list_free(names, n);
}

static void kill_it(const wn_running *running, int32_t ranks, int with) {
  pid_t rank[8];
  int32_t n = ranks > 1 ? wn_children(running->pid, rank, 8) : 0;
  if (ranks == 1) kill(running->pid, with);
  for (int32_t i = 0; i < n; i++) kill(rank[i], with);
}

/* Runs without an end in sight, and dies by kill -9 a few steps after the checkpoint of step `at` (at 0: before any).
 */
static void run_and_die(const job *j, const char *run, int64_t at) {
  char line[4096], table[WN_PATH_BYTES];
  wn_program p;
  start_line(j, run, line, sizeof line);
  OK(wn_path(table, "%s/%s/metrics/train.csv", (const char *)*j->state, run));
  wn_running running =
      wn_winnow_start(j->ranks, "%s training.steps=1000000 checkpoint.interval=%lld", line, (long long)at);
  wn_wait_for_lines(&running, table, 1 + at + 3);
  kill_it(&running, j->ranks, SIGKILL);
  wn_winnow_wait(running, &p);
  if (p.code == 0) fail_msg("it was not killed: %s", p.err);
  int64_t rows;
  tiny_cell(j->state, run, "train", 0, "step", &rows);
  assert_true(rows >= at + 3);
  if (at > 0) forget_after(j, run, at);
}

static void expect_same_run(const job *j, const char *run, const char *other, int64_t steps) {
  tiny_expect_same_tree(tiny_step(j->state, run, steps).text, tiny_step(j->state, other, steps).text);
  tiny_expect_same_tables(j->state, run, other);
}

/* `whole` in one go to step `steps`; `run` dies after the checkpoint of `at` and goes on. */
static void expect_resumes(const job *j, const char *whole, const char *run, int64_t at, int64_t steps) {
  int64_t rows;
  run_to(j, whole, steps, at);
  run_and_die(j, run, at);
  run_to(j, run, steps, at);
  tiny_cell(j->state, run, "train", 0, "step", &rows);
  assert_int_equal(rows, steps);
  if (at > 0) tiny_expect_same_tree(tiny_step(j->state, run, at).text, tiny_step(j->state, whole, at).text);
  expect_same_run(j, run, whole, steps);
}

static wn_state state_of(void **state, const char *run, int64_t step) {
  wn_state s = {0};
  wn_stage stage;
  bool found;
  OK(wn_checkpoint_read_state(tiny_step(state, run, step).text, &s, &stage, &found));
  assert_true(found);
  OK(wn_checkpoint_verify(tiny_step(state, run, step).text));
  return s;
}

/* ---- 30 steps are 17 and 13 ---- */

static void pretrain_resumes(void **state) {
  expect_resumes(&(job){state, 1, "pretrain", "base", ""}, "pre", "pre-killed", 17, 30);
  wn_state s = state_of(state, "pre-killed", 30);
  assert_true(s.step == 30 && s.tokens == 30 * 4 * TINY_SEQ_LEN && s.adam_base == 30 && s.router_bias_updates == 30);
  assert_true(s.adam_indexer == 0 && s.skipped == 0 && !s.indexer_trained);
}

static void warmup_resumes(void **state) {
  expect_resumes(&(job){state, 1, "warmup", "base", ""}, "warm", "warm-killed", 17, 30);
  wn_state s = state_of(state, "warm-killed", 30);
  assert_true(s.step == 30 && s.tokens == 30 * 4 * TINY_SEQ_LEN && s.adam_base == 0 && s.router_bias_updates == 0);
  assert_true(s.adam_indexer == 30 && s.skipped == 0 && s.indexer_trained);
}

static void adapt_resumes(void **state) {
  expect_resumes(&(job){state, 1, "adapt", "warm/checkpoints/step-000030", ""}, "adapt", "adapt-killed", 17, 30);
  wn_state s = state_of(state, "adapt-killed", 30);
  assert_true(s.step == 30 && s.tokens == 30 * 4 * TINY_SEQ_LEN && s.adam_base == 30 && s.router_bias_updates == 30);
  assert_true(s.adam_indexer == 60 && s.skipped == 0 && s.indexer_trained);
}

static void rounded_checkpoints_resume_exactly(void **state) {
  expect_resumes(&(job){state, 1, "adapt", "warm/checkpoints/step-000030", "checkpoint.dtype=bf16"}, "bf16",
                 "bf16-killed", 4, 8);
}

/* Whether every moment of a checkpoint is stored so. */
static void expect_moments(void **state, const char *run, int64_t step, wn_dtype dtype) {
  wn_optimizer_files files;
  int64_t moments = 0;
  OK(wn_optimizer_open(&files, tiny_step(state, run, step).text));
  for (size_t f = 0; f < files.n; f++)
    for (int64_t i = 0; i < wn_safetensors_count(files.files[f]); i++) {
      const wn_st_entry *entry = wn_safetensors_at(files.files[f], i);
      const char *suffix = strrchr(entry->name, '.');
      if (strcmp(suffix, ".m") != 0 && strcmp(suffix, ".v") != 0) continue;
      assert_int_equal(entry->dtype, dtype);
      moments++;
    }
  assert_true(moments > 0);
  wn_optimizer_close(&files);
}

/* Moments in BF16 are saved as they are; they go over into either format. */
static void moments_in_bf16_resume(void **state) {
  const char *options = "optimizer.moments=bf16", *warm = "warm-narrow/checkpoints/step-000006";
  expect_resumes(&(job){state, 1, "warmup", "base", options}, "warm-narrow", "warm-narrow-killed", 4, 6);
  expect_moments(state, "warm-narrow", 6, WN_BF16);
  expect_resumes(&(job){state, 1, "adapt", warm, options}, "adapt-narrow", "adapt-narrow-killed", 3, 5);
  expect_moments(state, "adapt-narrow", 5, WN_BF16);
  assert_int_equal(state_of(state, "adapt-narrow", 5).adam_indexer, 11);
  run_to(&(job){state, 1, "adapt", warm, ""}, "adapt-wide", 2, 0);
  expect_moments(state, "adapt-wide", 2, WN_F32);
  run_to(&(job){state, 1, "adapt", "warm/checkpoints/step-000030", options}, "adapt-narrowed", 2, 0);
  expect_moments(state, "adapt-narrowed", 2, WN_BF16);
}

/* A schedule and a clip that bite depend on the step too. */
static void schedules_resume(void **state) {
  const char *options =
      "lr_schedule.type=cosine lr_schedule.warmup_steps=3 lr_schedule.decay_steps=9 optimizer.clip_grad=0.1 "
      "metrics.eval_every=4 data.document_mask=false";
  expect_resumes(&(job){state, 1, "adapt", "warm/checkpoints/step-000030", options}, "cosine", "cosine-killed", 6, 14);
}

/* ---- around the stage boundary ---- */

static void a_resumed_warmup_hands_over_the_same(void **state) {
  run_to(&(job){state, 1, "adapt", "warm/checkpoints/step-000030", ""}, "after", 4, 0);
  run_to(&(job){state, 1, "adapt", "warm-killed/checkpoints/step-000030", ""}, "after-killed", 4, 0);
  expect_same_run(&(job){.state = state}, "after", "after-killed", 4);
}

static void a_finished_stage_has_nothing_to_do(void **state) {
  tiny_file before = tiny_read(wn_temp(state, "warm/metrics/train.csv").text);
  run_to(&(job){state, 1, "warmup", "base", ""}, "warm", 30, 17);
  run_to(&(job){state, 1, "warmup", "base", ""}, "warm", 20, 17);
  tiny_file after = tiny_read(wn_temp(state, "warm/metrics/train.csv").text);
  assert_int_equal(before.bytes, after.bytes);
  assert_memory_equal(before.text, after.text, before.bytes);
  expect_same_run(&(job){.state = state}, "warm", "warm-killed", 30);
  free(before.text);
  free(after.text);
}

/* Death before the first checkpoint: the second start begins where the first did, at the hand-over. */
static void a_stage_that_dies_at_once_starts_over(void **state) {
  job j = {state, 1, "adapt", "warm/checkpoints/step-000030", ""};
  run_and_die(&j, "atonce", 0);
  run_to(&j, "atonce", 4, 0);
  expect_same_run(&j, "atonce", "after", 4);
  assert_int_equal(state_of(state, "atonce", 4).adam_indexer, 34);
}

static void a_longer_run_goes_on_from_a_finished_one(void **state) {
  job j = {state, 1, "warmup", "base", "metrics.eval_every=0 metrics.layers_every=0"};
  run_to(&j, "short", 17, 0);
  run_to(&j, "short", 30, 0);
  tiny_expect_same_tree(tiny_step(state, "short", 30).text, tiny_step(state, "warm", 30).text);
}

/* ---- repeats ---- */

static void two_runs_are_one(void **state) {
  static const char *const stages[] = {"pretrain", "warmup", "adapt"};
  for (size_t i = 0; i < 3; i++) {
    char run[3][32];
    for (int32_t r = 0; r < 3; r++) {
      snprintf(run[r], sizeof run[r], "twice-%s-%d", stages[i], r);
      job j = {state, 1, stages[i], i == 2 ? "warm/checkpoints/step-000030" : "base", r == 2 ? "threads=2" : ""};
      run_to(&j, run[r], 5, 0);
    }
    expect_same_run(&(job){.state = state}, run[0], run[1], 5);
    expect_same_run(&(job){.state = state}, run[0], run[2], 5);
  }
}

/* ---- several ranks ---- */

static void two_ranks_resume(void **state) {
  expect_resumes(&(job){state, 2, "warmup", "base", ""}, "warm2", "warm2-killed", 5, 9);
  expect_resumes(&(job){state, 2, "adapt", "warm2/checkpoints/step-000009", ""}, "adapt2", "adapt2-killed", 5, 9);
}

static void another_number_of_ranks_goes_on(void **state) {
  job two = {state, 2, "adapt", "warm2/checkpoints/step-000009", ""}, one = two;
  one.ranks = 1;
  run_to(&two, "fewer", 5, 0);
  run_to(&one, "fewer", 9, 0);
  for (int64_t row = 0; row < 9; row++) {
    double a = tiny_cell(state, "fewer", "train", row, "loss", NULL),
           b = tiny_cell(state, "adapt2", "train", row, "loss", NULL);
    if (!(fabs(a - b) <= 1e-4 * fabs(b))) fail_msg("step %lld: %.9g instead of %.9g", (long long)row + 1, a, b);
  }
}

/* ---- signals ---- */

static void expect_stops(void **state, int32_t ranks, int signal_sent, int32_t to_ranks, const char *stopped,
                         const char *straight) {
  job j = {state, ranks, "warmup", "base", "metrics.layers_every=0 metrics.eval_every=0"};
  char line[4096], table[WN_PATH_BYTES];
  wn_program p;
  start_line(&j, stopped, line, sizeof line);
  OK(wn_path(table, "%s/%s/metrics/train.csv", (const char *)*state, stopped));
  wn_running running = wn_winnow_start(ranks, "%s training.steps=1000000", line);
  wn_wait_for_lines(&running, table, 6);
  pid_t rank[8];
  int32_t n = ranks > 1 ? wn_children(running.pid, rank, 8) : 0;
  if (ranks == 1) kill(running.pid, signal_sent);
  for (int32_t i = 0; i < n && i < to_ranks; i++) kill(rank[i], signal_sent);
  wn_winnow_wait(running, &p);
  int64_t steps;
  tiny_cell(state, stopped, "train", 0, "step", &steps);
  if (p.code != WN_E_INTERRUPTED || !strstr(p.err, "stopped by a signal after step"))
    fail_msg("ended with %d: %s", p.code, p.err);
  assert_true(steps >= 5 && state_of(state, stopped, steps).step == steps);
  run_to(&j, stopped, steps + 4, 0);
  run_to(&j, straight, steps + 4, 0);
  expect_same_run(&j, stopped, straight, steps + 4);
}

static void sigterm_finishes_the_step(void **state) {
  expect_stops(state, 1, SIGTERM, 0, "term", "term-straight");
}
static void sigint_too(void **state) {
  expect_stops(state, 1, SIGINT, 0, "int", "int-straight");
}
static void a_signal_to_one_rank_stops_all(void **state) {
  expect_stops(state, 2, SIGTERM, 1, "term2", "term2-straight");
}

/* A second process in the same run directory is turned away, and the first does not notice. */
static void one_process_at_a_time(void **state) {
  job j = {state, 1, "warmup", "base", "metrics.layers_every=0 metrics.eval_every=0"};
  char line[4096], table[WN_PATH_BYTES];
  wn_program p;
  start_line(&j, "locked", line, sizeof line);
  OK(wn_path(table, "%s/locked/metrics/train.csv", (const char *)*state));
  wn_running running = wn_winnow_start(1, "%s training.steps=1000000 checkpoint.interval=1", line);
  wn_wait_for_lines(&running, table, 4);
  wn_winnow_refuses(WN_E_CONFIG, "is in use", "%s training.steps=1000000 checkpoint.interval=1", line);
  kill(running.pid, SIGTERM);
  wn_winnow_wait(running, &p);
  if (p.code != WN_E_INTERRUPTED) fail_msg("the first ended with %d: %s", p.code, p.err);
}

/* ---- a disk that is full ---- */

/* A limit on the length of files stands in for it: the save fails with one sentence, what was saved before stays, and
 * with room again the run goes on to the same end. (What several ranks make of one's failure is in
 * tests/unit/dist_mpi.c.) */
static void a_save_that_fails_loses_nothing(void **state) {
  const struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY}, little = {24 << 10, RLIM_INFINITY};
  job j = {state, 1, "adapt", "warm/checkpoints/step-000030", "metrics.layers_every=0 metrics.eval_every=0"};
  char line[4096], **names;
  size_t n;
  run_to(&j, "full", 2, 2);
  run_to(&j, "room", 6, 2);
  start_line(&j, "full", line, sizeof line);
  signal(SIGXFSZ, SIG_IGN); /* inherited: writes then fail, as they do on a full disk */
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &little), 0);
  wn_winnow_refuses(WN_E_IO, "File too large", "%s training.steps=6 checkpoint.interval=2", line);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &none), 0);
  signal(SIGXFSZ, SIG_DFL);
  OK(wn_list_dir(&names, &n, checkpoints_of(&j, "full").text));
  assert_true(n == 1 && strcmp(names[0], "step-000002") == 0);
  wn_list_free(names, n);
  run_to(&j, "full", 6, 2);
  expect_same_run(&j, "full", "room", 6);
}

/* ---- damage ---- */

/* The newest is passed over, whatever of it was damaged, and the run goes on from the one before. */
static void a_damaged_checkpoint_is_passed_over(void **state) {
  static const char *const files[] = {"optimizer-00001-of-00001.safetensors", "state.json", "config.json",
                                      "MANIFEST.json"};
  job j = {state, 1, "adapt", "warm/checkpoints/step-000030", "metrics.layers_every=0 metrics.eval_every=0"};
  char line[4096], path[WN_PATH_BYTES];
  wn_program p;
  run_to(&j, "hurt", 6, 2);
  run_to(&j, "unhurt", 8, 2);
  for (size_t i = 0; i < 5; i++) {
    OK(wn_path(path, "%s/%s", tiny_step(state, "hurt", 6).text, files[i % 4]));
    if (i < 4)
      wn_temp_flip(path, 5, 1);
    else
      assert_int_equal(truncate(path, 100), 0);
    start_line(&j, "hurt", line, sizeof line);
    wn_winnow(&p, 1, "%s training.steps=6 checkpoint.interval=2", line);
    if (p.code != 0 || !strstr(p.err, "warning: passing over a damaged checkpoint") ||
        !strstr(p.err, "step-000004 (step 4)"))
      fail_msg("%s changed: ended with %d: %s", files[i % 4], p.code, p.err);
    tiny_expect_same_tree(tiny_step(state, "hurt", 6).text, tiny_step(state, "unhurt", 6).text);
  }
  run_to(&j, "hurt", 8, 2);
  expect_same_run(&j, "hurt", "unhurt", 8);
}

static int64_t newest_of(void **state, const char *run) {
  int64_t newest = 0;
  for (int64_t step = 2; step <= 4; step += 2)
    if (wn_path_exists(tiny_step(state, run, step).text)) newest = step;
  return newest;
}

/* Whatever bears a checkpoint's name is one, but `damaged` (0: none). */
static void expect_whole(const job *j, const char *run, int64_t damaged, bool nothing_else) {
  char **names, path[WN_PATH_BYTES], hurt[32];
  size_t n;
  wn_temp_path dir = checkpoints_of(j, run);
  if (!wn_path_exists(dir.text)) return;
  snprintf(hurt, sizeof hurt, "step-%06lld", (long long)damaged);
  OK(wn_list_dir(&names, &n, dir.text));
  for (size_t i = 0; i < n; i++) {
    bool step = strncmp(names[i], "step-", 5) == 0;
    if (!step && nothing_else) fail_msg("%s: %s was left behind", run, names[i]);
    if (!step || strcmp(names[i], hurt) == 0) continue;
    OK(wn_path(path, "%s/%s", dir.text, names[i]));
    OK(wn_checkpoint_verify(path));
  }
  wn_list_free(names, n);
}

static const char *const four_steps = "training.steps=4 checkpoint.interval=2";

/* Death at changes of the file system spread over a whole run, and then at others in its resume, between saves and in
 * the middle of them: what had been saved is still there, and the same command arrives where the undisturbed run did.
 */
static void death_at_any_point_loses_nothing(void **state) {
  enum { POINTS = 17 };
  job j = {state, 1, "adapt", "warm/checkpoints/step-000030",
           "metrics.layers_every=0 metrics.eval_every=0 checkpoint.keep=1"};
  char line[4096];
  int64_t changes;
  start_line(&j, "undying", line, sizeof line);
  assert_false(wn_winnow_killed_at(INT64_MAX, &changes, "%s %s", line, four_steps));
  assert_true(changes > 3 * POINTS);
  int64_t stood = 0;
  for (int64_t i = 0; i < POINTS; i++) {
    char run[32];
    snprintf(run, sizeof run, "dying-%lld", (long long)i);
    start_line(&j, run, line, sizeof line);
    assert_true(wn_winnow_killed_at((changes - 1) * i / (POINTS - 1), NULL, "%s %s", line, four_steps));
    int64_t newest = newest_of(state, run);
    if (newest < stood) fail_msg("%s: step %lld was there when it died sooner", run, (long long)stood);
    stood = newest;
    expect_whole(&j, run, 0, false);
    wn_winnow_killed_at(changes * (i * 7 % POINTS) / POINTS, NULL, "%s %s", line, four_steps);
    if (newest_of(state, run) < newest) fail_msg("%s: the checkpoint of step %lld is gone", run, (long long)newest);
    expect_whole(&j, run, 0, false);
    run_to(&j, run, 4, 2);
    expect_same_run(&j, run, "undying", 4);
    expect_whole(&j, run, 0, true);
  }
  assert_int_equal(stood, 4);
}

/* The same where the save must take the place of a damaged checkpoint of its own step, and an older one is then
 * removed: changes of the last third. */
static void nor_does_death_while_replacing(void **state) {
  job j = {state, 1, "adapt", "warm/checkpoints/step-000030", "metrics.layers_every=0 metrics.eval_every=0"};
  char line[4096], path[WN_PATH_BYTES];
  enum { STRIDE = 3 };
  int64_t changes = STRIDE;
  run_to(&j, "undying-all", 4, 2);
  for (int64_t i = 0; i <= changes / 3; i += STRIDE) {
    char run[32];
    snprintf(run, sizeof run, "replacing-%lld", (long long)i);
    start_line(&j, run, line, sizeof line);
    run_to(&j, run, 4, 2);
    OK(wn_path(path, "%s/state.json", tiny_step(state, run, 4).text));
    wn_temp_flip(path, 5, 1);
    if (i == 0)
      assert_false(wn_winnow_killed_at(INT64_MAX, &changes, "%s %s checkpoint.keep=1", line, four_steps));
    else
      assert_true(wn_winnow_killed_at(changes - i, NULL, "%s %s checkpoint.keep=1", line, four_steps));
    assert_true(newest_of(state, run) >= 2);
    bool replaced = wn_path_exists(path) &&
                    tiny_same_file(path, wn_temp(state, "undying-all/checkpoints/step-000004/state.json").text);
    expect_whole(&j, run, replaced ? 0 : 4, false);
    wn_winnow_ends(0, 1, "%s %s checkpoint.keep=1", line, four_steps);
    tiny_expect_same_tree(tiny_step(state, run, 4).text, tiny_step(state, "undying-all", 4).text);
    expect_whole(&j, run, 0, true);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(pretrain_resumes),
      cmocka_unit_test(warmup_resumes),
      cmocka_unit_test(adapt_resumes),
      cmocka_unit_test(rounded_checkpoints_resume_exactly),
      cmocka_unit_test(moments_in_bf16_resume),
      cmocka_unit_test(schedules_resume),
      cmocka_unit_test(a_resumed_warmup_hands_over_the_same),
      cmocka_unit_test(a_finished_stage_has_nothing_to_do),
      cmocka_unit_test(a_stage_that_dies_at_once_starts_over),
      cmocka_unit_test(a_longer_run_goes_on_from_a_finished_one),
      cmocka_unit_test(two_runs_are_one),
      cmocka_unit_test(two_ranks_resume),
      cmocka_unit_test(another_number_of_ranks_goes_on),
      cmocka_unit_test(sigterm_finishes_the_step),
      cmocka_unit_test(sigint_too),
      cmocka_unit_test(one_process_at_a_time),
      cmocka_unit_test(a_signal_to_one_rank_stops_all),
      cmocka_unit_test(a_save_that_fails_loses_nothing),
      cmocka_unit_test(a_damaged_checkpoint_is_passed_over),
      cmocka_unit_test(death_at_any_point_loses_nothing),
      cmocka_unit_test(nor_does_death_while_replacing),
  };
  return cmocka_run_group_tests(tests, tiny_setup, wn_temp_teardown);
}
