/* One GPU and two compute the same, and each holds half. */
#include "support/gpu.h"
#include "support/ranks.h"

#include <signal.h>

static void needs_two_gpus(void) {
  wn_needs_gpus(2);
}

static void run_to(void **state, const char *run, int32_t ranks, int64_t steps) {
  const shared *at = *state;
  wn_winnow_ends(0, ranks,
                 "pretrain %s/job.yaml init=%s/base run_dir=%s/%s training.steps=%lld training.micro_batch_seqs=1 %s",
                 at->dir, at->dir, at->dir, run, (long long)steps, at->options);
}

static void two_gpus_repeat_and_resume(void **state) {
  needs_two_gpus();
  run_to(state, "two-a", 2, 12);
  run_to(state, "two-b", 2, 12);
  tiny_expect_same_tree(tiny_step(state, "two-a", 12).text, tiny_step(state, "two-b", 12).text);
  tiny_expect_same_tables(state, "two-a", "two-b");
  run_to(state, "two-c", 2, 5);
  run_to(state, "two-c", 2, 12);
  /* its tables have rows of its own at step 5, which was a last one */
  tiny_expect_same_tree(tiny_step(state, "two-a", 12).text, tiny_step(state, "two-c", 12).text);
}

static double weights_bytes(void **state, const char *run) {
  char path[WN_PATH_BYTES], *text;
  OK(wn_path(path, "%s/%s/memory.txt", (const char *)*state, run));
  OK(wn_read_file(&text, NULL, path, 1 << 20));
  double bytes = 0;
  static const char *const names[] = {"masters", "weights", "first moments", "second moments", "gradients"};
  for (char *line = strtok(text, "\n"); line; line = strtok(NULL, "\n")) {
    char arena[32], name[64], rest[64];
    if (sscanf(line, "%31s %63[^0-9(] %63s", arena, name, rest) != 3 || strcmp(arena, "weights") != 0) continue;
    for (char *end = name + strlen(name); end > name && end[-1] == ' ';) *--end = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
      if (strcmp(name, names[i]) == 0) bytes += strtod(rest, NULL);
  }
  free(text);
  return bytes;
}

static void state_halves(void **state) {
  needs_two_gpus();
  run_to(state, "one", 1, 1);
  run_to(state, "two", 2, 1);
  double one = weights_bytes(state, "one"), two = weights_bytes(state, "two");
  print_message("state on one GPU %.0f bytes, on each of two %.0f\n", one, two);
  assert_true(one > 0 && two > 0.48 * one && two < 0.56 * one);
}

/* A run of two ranks from `init` with `signal_number` sent to the second after a few steps: how it ended. */
static void disturbed(void **state, const char *init, const char *run, int signal_number, wn_program *p) {
  const shared *at = *state;
  char table[WN_PATH_BYTES];
  pid_t rank[8];
  OK(wn_path(table, "%s/%s/metrics/train.csv", at->dir, run));
  wn_running running = wn_winnow_start(2,
                                       "pretrain %s/job.yaml init=%s/%s run_dir=%s/%s training.steps=1000000 "
                                       "training.micro_batch_seqs=1 parallelism.timeout_s=5 %s",
                                       at->dir, at->dir, init, at->dir, run, at->options);
  wn_wait_for_lines(&running, table, 4);
  assert_int_equal(wn_children(running.pid, rank, 8), 2);
  kill(rank[1], signal_number);
  wn_winnow_wait(running, p);
}

static void expect_stopped(void **state, const char *init, const char *run) {
  wn_program p;
  disturbed(state, init, run, SIGSTOP, &p);
  if (p.code != WN_E_WORLD || !strstr(p.err, " waited ") || !strstr(p.err, "rank "))
    fail_msg("ended with %d and said: %s", p.code, p.err);
  assert_true(p.seconds < 60);
}

static void a_stopped_rank_ends_all(void **state) {
  needs_two_gpus();
  expect_stopped(state, "base", "stopped");
}

/* Without experts the host reads nothing before the step's end, so that it could ask for a whole long step at once:
 * more than the driver holds. */
static void a_stopped_rank_ends_a_long_step(void **state) {
  needs_two_gpus();
  const shared *at = *state;
  wn_model_config config = tiny_config();
  shared long_steps = *at;
  char options[256];
  config.first_k_dense_replace = config.num_hidden_layers;
  tiny_model(wn_temp(state, "dense").text, &config, 1, 1, NULL);
  snprintf(options, sizeof options, "%s training.global_batch_seqs=512 metrics.layers_every=0", at->options);
  long_steps.options = options;
  void *changed = &long_steps;
  expect_stopped(&changed, "dense", "stopped-long");
}

static void a_killed_rank_ends_all(void **state) {
  needs_two_gpus();
  wn_program p;
  disturbed(state, "base", "killed", SIGKILL, &p);
  if (p.code == 0 || !strstr(p.err, "rank")) fail_msg("ended with %d and said: %s", p.code, p.err);
  assert_true(p.seconds < 60);
}

static void a_third_rank_is_refused(void **state) {
  needs_two_gpus();
  if (wn_cuda_count(NULL) > 2) skip();
  const shared *at = *state;
  wn_program p;
  wn_winnow(&p, 4, "pretrain %s/job.yaml init=%s/base run_dir=%s/never device=cuda training.micro_batch_seqs=1",
            at->dir, at->dir, at->dir);
  assert_int_not_equal(p.code, 0);
  if (!strstr(p.err, "process 2 of its host")) fail_msg("it said: %s", p.err);
}

int main(int argc, char **argv) {
  if (argc > 3) return rank_main(argc, argv);
  shared at = {.self = argv[0],
               .options = "device=cuda",
               .most_ranks = 2,
               .needs = needs_two_gpus,
               .gradient_bar = 1e-4,
               .first_loss_bar = 1e-6,
               .loss_bar = 2e-2};
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_prestate(pretrain_is_the_same, &at),
      cmocka_unit_test_prestate(warmup_is_the_same, &at),
      cmocka_unit_test_prestate(adapt_is_the_same, &at),
      cmocka_unit_test_prestate(two_gpus_repeat_and_resume, &at),
      cmocka_unit_test_prestate(state_halves, &at),
      cmocka_unit_test_prestate(a_stopped_rank_ends_all, &at),
      cmocka_unit_test_prestate(a_stopped_rank_ends_a_long_step, &at),
      cmocka_unit_test_prestate(a_killed_rank_ends_all, &at),
      cmocka_unit_test_prestate(a_third_rank_is_refused, &at),
  };
  void *state = &at;
  if (ranks_setup(&state)) return 1;
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  return ranks_teardown(&state) ? 1 : failed;
}
