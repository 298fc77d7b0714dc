/* `winnow plan` for GPUs, made without touching one, against what runs on them take: the allocator's table, and the
 * memory that the driver counts. */
#include "kernels/cuda/card.h"
#include "support/gpu.h"
#include "support/plan.h"

/* How far what the driver counts beside the arenas may lie from what plans have for it: they are one figure for all
 * jobs, and the driver's own varies with its version. */
static const double own_band = 0.1;

static double held_bytes(const json_t *plan) {
  double bytes = 0;
  size_t i;
  json_t *one;
  json_array_foreach(json_object_get(plan, "arenas"), i, one) {
    if (strcmp(json_string_value(json_object_get(one, "arena")), "host") != 0) bytes += plan_number(one, "held_bytes");
  }
  return bytes;
}

/* Of each rank, by its line in RUN/memory.txt: the pages of its arenas are the planned ones, and what the driver counts
 * beside them (CUDA, cuBLAS, NCCL, the kernels' code) is what the plan has for it. */
static void compare_gpus(void **state, const json_t *plan, const char *run, int32_t ranks) {
  char path[WN_PATH_BYTES], key[64], *text;
  OK(wn_path(path, "%s/%s/memory.txt", (const char *)*state, run));
  OK(wn_read_file(&text, NULL, path, 1 << 20));
  double planned = held_bytes(plan), own = plan_number(plan, "own_bytes");
  for (int32_t r = 0; r < ranks; r++) {
    unsigned long long used, arenas;
    snprintf(key, sizeof key, "GPU of rank %d: ", r);
    const char *line = strstr(text, key);
    if (!line || sscanf(line + strlen(key), "%llu bytes in use, of which %llu in arenas", &used, &arenas) != 2)
      fail_msg("%s has no line of rank %d", path, r);
    double beside = (double)used - (double)arenas;
    print_message("%s, rank %d of %d: arenas %.3f GB (planned %.3f), by the driver %.3f GB, beside them %.3f GB "
                  "(planned %.3f), difference %+.3f GB\n",
                  run, r, ranks, (double)arenas * 1e-9, planned * 1e-9, (double)used * 1e-9, beside * 1e-9, own * 1e-9,
                  (beside - own) * 1e-9);
    if (fabs((double)arenas - planned) > 0.01 * planned) fail_msg("rank %d: the arenas are not as planned", r);
    if (fabs(beside - own) > own_band * own)
      fail_msg("rank %d: %.0f bytes beside the arenas, %.0f planned", r, beside, own);
  }
  free(text);
}

static void compare(void **state, const char *stage, const char *job, const char *run, int32_t ranks) {
  char words[1200];
  const char *dir = *state;
  snprintf(words, sizeof words,
           "%s device=cuda run_dir=%s/%s training.steps=1 metrics.log_every=1 --stage %s "
           "--ranks %d --device h200",
           job, dir, run, stage, ranks);
  json_t *plan = plan_of(words);
  wn_winnow_ends(0, ranks, "%s %s device=cuda run_dir=%s/%s training.steps=1 metrics.log_every=1", stage, job, dir,
                 run);
  compare_gpus(state, plan, run, ranks);
  expect_planned_arenas(state, plan, run);
  json_decref(plan);
}

static void stages(void **state, int32_t ranks) {
  static const char *const names[] = {"warmup", "pretrain", "adapt"};
  char job[1024], run[64];
  const char *dir = *state;
  for (int s = 0; s < 3; s++) {
    /* sequences of 448 take the absorbed form, of 32 the masked one */
    for (int longer = 0; longer < 2; longer++) {
      snprintf(run, sizeof run, "%s-%d-%d", names[s], ranks, longer);
      snprintf(job, sizeof job, "%s/job.yaml init=%s/%s training.micro_batch_seqs=1 metrics.eval_every=1 %s", dir, dir,
               s == 2 ? "sparse" : "base", longer ? "data.seq_len=448" : "");
      compare(state, names[s], job, run, ranks);
    }
  }
}

static void one_gpu(void **state) {
  wn_needs_gpus(1);
  stages(state, 1);
}

static void two_gpus(void **state) {
  wn_needs_gpus(2);
  stages(state, 2);
}

/* A model of 70 million parameters at 8192 tokens: gigabytes, not pages. */
static void a_larger_model(void **state) {
  wn_needs_gpus(1);
  char job[1024];
  const char *dir = *state;
  snprintf(job, sizeof job, "configs/jobs/mini/pretrain.yaml data.train=%s/long data.valid= metrics.eval_every=0", dir);
  tiny_data(wn_temp(state, "long").text, TINY_VOCAB, 20000, 3);
  compare(state, "pretrain", job, "mini", 1);
}

/* Without --device it is the card that is there, by its name and with its memory. */
static void the_card_that_is_here(void **state) {
  wn_needs_gpus(1);
  wn_cuda_card card;
  wn_program p;
  char words[1024];
  const char *dir = *state;
  OK(wn_cuda_card_of(&card, 0));
  snprintf(words, sizeof words, "%s/job.yaml init=%s/base device=cuda run_dir=%s/never", dir, dir, dir);
  wn_winnow(&p, 1, "plan %s --stage warmup --ranks 1 --json", words);
  assert_int_equal(p.code, 0);
  json_t *plan = json_loads(p.out, 0, NULL);
  assert_string_equal(json_string_value(json_object_get(plan, "machine")), card.name);
  assert_true(plan_number(plan, "memory_bytes") == (double)card.memory_bytes);
  json_decref(plan);
  wn_winnow(&p, 1, "warmup %s --check", words);
  assert_int_equal(p.code, 0);
  if (!strstr(p.err, card.name) || !strstr(p.err, "the job fits")) fail_msg("%s", p.err);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(the_card_that_is_here), cmocka_unit_test(one_gpu),
                                     cmocka_unit_test(two_gpus), cmocka_unit_test(a_larger_model)};
  return cmocka_run_group_tests(tests, plan_setup, wn_temp_teardown);
}
