/* What tests of several ranks share, on either device: a program that is a test when started by hand, and under mpirun,
 * with arguments, a rank that takes one step and writes the reduced gradient of every parameter; and the comparison of
 * gradients and losses with those of one rank. */
#ifndef WN_TEST_RANKS_H
#define WN_TEST_RANKS_H

#include "stages/stages.h"
#include "support/rank_exit.h"
#include "support/tiny.h"
#include "train/step.h"

/* ---- what a rank does ---- */

/* The whole gradient of every trained parameter, gathered from the pieces, as F64. */
static inline wn_status dump_gradients(wn_run *run, const char *path) {
  int32_t n, dumped = 0;
  const wn_param *params = wn_store_params(run->store, &n);
  wn_st_spec *specs = calloc((size_t)n, sizeof *specs);
  double **data = calloc((size_t)n, sizeof *data);
  wn_status status = specs && data ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory");
  for (int32_t p = 0; p < n && !status; p++) {
    if (params[p].kind != WN_BASE && params[p].kind != WN_INDEXER) continue;
    size_t count = (size_t)tiny_count(&params[p]);
    double *whole = data[dumped] = calloc(count, sizeof *whole);
    if (!whole) return WN_FAIL(WN_E_MEMORY, "out of memory");
    for (int32_t i = 0; i < wn_store_pieces(run->store); i++) {
      const wn_piece *piece = wn_store_piece(run->store, i);
      for (int32_t s = 0; s < piece->n_segments; s++) {
        wn_segment at = piece->segments[s];
        if (at.param != p) continue;
        wn_tensor part = wn_tensor_slice(piece->grad, 0, at.offset, at.count);
        float *values = malloc((size_t)at.count * sizeof *values);
        if (!values) return WN_FAIL(WN_E_MEMORY, "out of memory");
        WN_TRY(run->device->ops->download(run->device, values, &part));
        for (int64_t e = 0; e < at.count; e++) whole[at.first + e] = (double)values[e];
        free(values);
      }
    }
    specs[dumped] = (wn_st_spec){.name = params[p].hf_name, .dtype = WN_F64, .rank = params[p].rank};
    memcpy(specs[dumped++].dim, params[p].dim, sizeof params[p].dim);
    status = wn_group_sum_f64(wn_world_all(run->world), whole, count);
  }
  if (!status && wn_world_rank(run->world) == 0)
    status = wn_safetensors_write(path, specs, (const void *const *)data, dumped);
  for (int32_t i = 0; i < dumped; i++) free(data[i]);
  free(data);
  free(specs);
  return status;
}

static inline wn_status one_step(wn_world *world, wn_stage stage, int argc, char **argv) {
  wn_job job;
  wn_job_source *source;
  wn_run *run;
  wn_step_sums sums;
  wn_recipe recipe = stage == WN_STAGE_WARMUP  ? wn_stage_warmup()
                     : stage == WN_STAGE_ADAPT ? wn_stage_adapt()
                                               : wn_stage_pretrain();
  WN_TRY(wn_job_load(&job, &source, stage, argv[3], (const char *const *)(argv + 4), argc - 4));
  WN_TRY(wn_run_create(&run, recipe, &job, source, world, NULL));
  WN_TRY(wn_step_sums_create(&sums, &run->model->config));
  WN_TRY(wn_step_run(run, 0, true, &sums));
  WN_TRY(dump_gradients(run, argv[2]));
  wn_step_sums_free(&sums);
  wn_run_free(run);
  wn_job_source_free(source);
  return NULL;
}

/* STAGE OUT.safetensors JOB.yaml key=value ... */
static inline int rank_main(int argc, char **argv) {
  wn_world *world;
  wn_status status = wn_world_create(&world, 60);
  for (wn_stage stage = WN_STAGE_PRETRAIN; !status && stage < WN_N_STAGES; stage++)
    if (strcmp(argv[1], wn_stage_name(stage)) == 0) status = one_step(world, stage, argc, argv);
  return wn_rank_exit(world, status);
}

/* ---- gradients ---- */

typedef struct shared {
  char dir[64];
  const char *self, *options; /* of every job, "" or "key=value ..." */
  int32_t most_ranks;
  void (*needs)(void);                           /* NULL, or skips where there is too little for most_ranks */
  double gradient_bar, first_loss_bar, loss_bar; /* relative */
} shared; /* *state begins with the directory: the tiny_ helpers take it for one */

static inline wn_safetensors *gradients(void **state, const char *stage, const char *init, int32_t ranks) {
  const shared *at = *state;
  char out[128];
  wn_program p;
  wn_safetensors *file;
  snprintf(out, sizeof out, "%s/grads-%s-%d.safetensors", at->dir, stage, ranks);
  wn_winnow_wait(wn_command_start(ranks, at->self,
                                  "%s %s %s/job.yaml init=%s run_dir=%s/grads-%s-%d training.micro_batch_seqs=1 %s",
                                  stage, out, at->dir, init, at->dir, stage, ranks, at->options),
                 &p);
  if (p.code != 0) fail_msg("%s on %d ranks ended with %d: %s", stage, ranks, p.code, p.err);
  OK(wn_safetensors_open(&file, out));
  return file;
}

static inline double compare(const wn_st_entry *a, const wn_st_entry *b) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < a->bytes / sizeof(double); i++) {
    double x, y;
    memcpy(&x, (const double *)a->data + i, sizeof x);
    memcpy(&y, (const double *)b->data + i, sizeof y);
    difference += (x - y) * (x - y);
    size += y * y;
  }
  if (!(size > 0) && strstr(b->name, ".experts.") == NULL) fail_msg("%s has no gradient", b->name);
  return difference == 0 ? 0 : sqrt(difference / size); /* NaN is a difference */
}

static inline void expect_same_gradients(void **state, const char *stage, const char *init, int64_t expected) {
  const shared *at = *state;
  wn_safetensors *one = gradients(state, stage, init, 1);
  assert_int_equal(wn_safetensors_count(one), expected);
  for (int32_t ranks = 2; ranks <= at->most_ranks; ranks += 2) {
    wn_safetensors *several = gradients(state, stage, init, ranks);
    double worst = 0;
    assert_int_equal(wn_safetensors_count(several), expected);
    for (int64_t i = 0; i < expected; i++) {
      const wn_st_entry *a = wn_safetensors_at(one, i), *b = wn_safetensors_find(several, a->name);
      double error = compare(b, a);
      if (!(error <= at->gradient_bar))
        fail_msg("%s on %d ranks: gradient of %s is off by %.3g", stage, ranks, a->name, error);
      worst = fmax(worst, error);
    }
    print_message("%s: gradients of %d ranks and of one differ by %.2g at most\n", stage, ranks, worst);
    wn_safetensors_close(several);
  }
  wn_safetensors_close(one);
}

/* ---- losses ---- */

static inline void expect_same_losses(void **state, const char *stage, const char *init, const char *column) {
  const shared *at = *state;
  char run[2][32];
  double worst = 0;
  for (int32_t r = 0; r < 2; r++) {
    snprintf(run[r], sizeof run[r], "loss-%s-%d", stage, r + 1);
    wn_winnow_ends(0, r + 1, "%s %s/job.yaml init=%s run_dir=%s/%s training.steps=20 %s", stage, at->dir, init, at->dir,
                   run[r], at->options);
  }
  for (int64_t row = 0; row < 20; row++) {
    double a = tiny_cell(state, run[0], "train", row, column, NULL),
           b = tiny_cell(state, run[1], "train", row, column, NULL);
    double error = fabs(a - b) / fabs(a);
    if (!(error <= (row ? at->loss_bar : at->first_loss_bar)))
      fail_msg("%s, step %lld: %s is %.9g on two ranks, %.9g on one", stage, (long long)row + 1, column, b, a);
    worst = fmax(worst, error);
  }
  print_message("%s: losses of two ranks and of one differ by %.2g at most in 20 steps\n", stage, worst);
}

/* ---- tests that both devices have ---- */

static inline void needed(void **state) {
  const shared *at = *state;
  if (at->needs) at->needs();
}

static inline void pretrain_is_the_same(void **state) {
  needed(state);
  expect_same_gradients(state, "pretrain", wn_temp(state, "base").text, 65);
  expect_same_losses(state, "pretrain", wn_temp(state, "base").text, "lm_loss");
}

static inline void warmup_is_the_same(void **state) {
  needed(state);
  expect_same_gradients(state, "warmup", wn_temp(state, "base").text, 15);
  expect_same_losses(state, "warmup", wn_temp(state, "base").text, "indexer_kl");
}

static inline void adapt_is_the_same(void **state) {
  needed(state);
  wn_temp_path warm = wn_temp(state, "loss-warmup-1/checkpoints/step-000020");
  expect_same_gradients(state, "adapt", warm.text, 80);
  expect_same_losses(state, "adapt", warm.text, "loss");
}

/* Group setup and teardown: the directory of a tiny job. */
static inline int ranks_setup(void **state) {
  shared *at = *state;
  void *dir = NULL;
  if (tiny_setup(&dir)) return -1;
  snprintf(at->dir, sizeof at->dir, "%s", (const char *)dir);
  free(dir);
  return 0;
}

static inline int ranks_teardown(void **state) {
  void *dir = strdup(((const shared *)*state)->dir);
  return wn_temp_teardown(&dir);
}

#endif
