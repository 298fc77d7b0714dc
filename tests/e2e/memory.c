/* A step's memory grows with the length of the sequence and not with its square: the peaks of the allocator, fitted,
 * and the resident memory of whole runs. */
#include "support/tiny.h"

#include <unistd.h>

#include "stages/stages.h"
#include "train/step.h"

enum { LENGTHS = 4 };

static int setup(void **state) {
  if (tiny_setup(state)) return -1;
  wn_model_config config = tiny_sparse_config();
  tiny_model(wn_temp(state, "sparse").text, &config, 1, 1, NULL);
  tiny_data(wn_temp(state, "long").text, TINY_VOCAB, 20000, 3);
  return 0;
}

/* Peak bytes of one step's temporaries with sequences of `seq_len` tokens, quality columns and all. */
static double peak_bytes(void **state, wn_recipe recipe, int32_t topk, int32_t seq_len) {
  char init[300], run_dir[300], train[300], length[64], picks[64];
  const char *dir = *state;
  snprintf(init, sizeof init, "init=%s/%s", dir, recipe.stage == WN_STAGE_ADAPT ? "sparse" : "base");
  snprintf(run_dir, sizeof run_dir, "run_dir=%s/peak-%s-%d-%d", dir, wn_stage_name(recipe.stage), topk, seq_len);
  snprintf(picks, sizeof picks, "dsa.index_topk=%d", topk);
  snprintf(train, sizeof train, "data.train=%s/long", dir);
  snprintf(length, sizeof length, "data.seq_len=%d", seq_len);
  const char *const options[] = {init,
                                 run_dir,
                                 train,
                                 length,
                                 "data.document_mask=false",
                                 "training.micro_batch_seqs=1",
                                 "training.global_batch_seqs=2",
                                 picks,
                                 "data.valid=",
                                 "metrics.eval_every=0"};
  wn_job job;
  wn_job_source *source;
  wn_world *world;
  wn_run *run;
  wn_step_sums sums;
  OK(wn_world_create(&world, 10));
  OK(wn_job_load(&job, &source, recipe.stage, wn_temp(state, "job.yaml").text, options,
                 (int32_t)(sizeof options / sizeof *options)));
  OK(wn_run_create(&run, recipe, &job, source, world, NULL));
  OK(wn_step_sums_create(&sums, &run->model->config));
  wn_arena_reset_peak(run->device->scratch);
  wn_arena_reset_peak(run->device->stash);
  OK(wn_step_run(run, 0, true, &sums));
  double peak = (double)(wn_arena_peak_bytes(run->device->scratch) + wn_arena_peak_bytes(run->device->stash));
  wn_step_sums_free(&sums);
  wn_run_free(run);
  wn_job_source_free(source);
  wn_world_free(world);
  return peak;
}

/* Least squares of bytes = a + b t + c t^2; t in units of the longest. */
static void fit(const double *t, const double *bytes, double coefficient[3]) {
  double matrix[3][4] = {{0}};
  for (int i = 0; i < LENGTHS; i++) {
    double power[3] = {1, t[i], t[i] * t[i]};
    for (int r = 0; r < 3; r++) {
      for (int c = 0; c < 3; c++) matrix[r][c] += power[r] * power[c];
      matrix[r][3] += power[r] * bytes[i];
    }
  }
  for (int p = 0; p < 3; p++)
    for (int r = 0; r < 3; r++) {
      double factor = r == p ? 0 : matrix[r][p] / matrix[p][p];
      for (int c = 0; c < 4; c++) matrix[r][c] -= factor * matrix[p][c];
    }
  for (int p = 0; p < 3; p++) coefficient[p] = matrix[p][3] / matrix[p][p];
}

/* Four lengths from `first` on, `more` apart. */
static void expect_linear(void **state, wn_recipe recipe, int32_t topk, int32_t first, int32_t more) {
  double t[LENGTHS], bytes[LENGTHS], c[3];
  int32_t longest = first + (LENGTHS - 1) * more;
  for (int i = 0; i < LENGTHS; i++) {
    t[i] = (double)(first + i * more) / longest;
    bytes[i] = peak_bytes(state, recipe, topk, first + i * more);
  }
  fit(t, bytes, c);
  print_message("%s, %d picks, %d to %d tokens: %.3f MiB, + %.3f MiB by length, %+.4f MiB by its square\n",
                wn_stage_name(recipe.stage), topk, first, longest, c[0] / (1 << 20), c[1] / (1 << 20),
                c[2] / (1 << 20));
  /* a hundredth of the linear part, and far less than one byte a pair */
  if (!(fabs(c[2]) < 0.01 * c[1] && fabs(c[2]) < 0.1 * longest * longest))
    fail_msg("the part that grows with the square is %.3g of the linear one", c[2] / c[1]);
  assert_true(c[1] > c[0]);
}

static void peaks_are_linear(void **state) {
  expect_linear(state, wn_stage_warmup(), TINY_TOPK, 512, 512);
  expect_linear(state, wn_stage_pretrain(), TINY_TOPK, 512, 512);
  expect_linear(state, wn_stage_adapt(), TINY_TOPK, 512, 512); /* the absorbed form */
  expect_linear(state, wn_stage_adapt(), 700, 1024, 256);      /* the masked form */
}

/* What a run of so many tokens a sequence holds at most. */
static double resident_kib(void **state, const char *stage, const char *init, int32_t seq_len) {
  const char *dir = *state;
  wn_program p;
  wn_winnow(&p, 1,
            "%s %s/job.yaml init=%s/%s run_dir=%s/resident-%s-%d data.train=%s/long data.seq_len=%d "
            "data.document_mask=false training.steps=1 "
            "training.micro_batch_seqs=1 training.global_batch_seqs=2 data.valid= metrics.eval_every=0",
            stage, dir, dir, init, dir, stage, seq_len, dir, seq_len);
  if (p.code != 0) fail_msg("%s at %d tokens ended with %d: %s", stage, seq_len, p.code, p.err);
  return (double)p.peak_kib;
}

static void resident_memory_agrees(void **state) {
  static const char *const stages[] = {"warmup", "adapt"};
  for (int s = 0; s < 2; s++) {
    double kib[3];
    for (int i = 0; i < 3; i++) kib[i] = resident_kib(state, stages[s], s ? "sparse" : "base", 2048 << i);
    double first = kib[1] - kib[0], second = kib[2] - kib[1];
    print_message("%s, resident at 2048, 4096 and 8192 tokens: %.1f, %.1f, %.1f MiB\n", stages[s], kib[0] / 1024,
                  kib[1] / 1024, kib[2] / 1024);
    /* twice the length, twice the growth; a matrix of T x T floats would be 64 MiB at 4096 */
    assert_true(first > 0 && second < 2.4 * first && second > 1.6 * first);
    assert_true(second < 32 * 1024);
  }
}

/* The allocator's own table of what holds how much stands in the run directory. */
static void the_table_is_written(void **state) {
  const char *dir = *state;
  char path[WN_PATH_BYTES], *text;
  resident_kib(state, "adapt", "sparse", 64);
  OK(wn_path(path, "%s/resident-adapt-64/memory.txt", dir));
  OK(wn_read_file(&text, NULL, path, 1 << 20));
  assert_non_null(strstr(text, "indexer"));      /* the units */
  assert_non_null(strstr(text, "layer inputs")); /* the stash */
  const char *scratch = strstr(text, "scratch    (peak)");
  assert_non_null(scratch);
  assert_true(strtod(scratch + strlen("scratch    (peak)"), NULL) > 1000);
  free(text);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(the_table_is_written), cmocka_unit_test(resident_memory_agrees),
                                     cmocka_unit_test(peaks_are_linear)};
  return cmocka_run_group_tests(tests, setup, wn_temp_teardown);
}
