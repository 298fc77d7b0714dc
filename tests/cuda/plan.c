/* `winnow plan` for GPUs, made without touching one, against what runs on them take: the allocator's table, and the
 * memory that the driver counts. */
#include "support/gpu.h"
#include "support/plan.h"

static double held_bytes(const json_t *plan) {
  double bytes = 0;
  size_t i;
  json_t *one;
  json_array_foreach(json_object_get(plan, "arenas"), i, one) {
    if (strcmp(json_string_value(json_object_get(one, "arena")), "host") != 0) bytes += plan_number(one, "held_bytes");
  }
  return bytes;
}

/* Beside the arenas' pages lies what CUDA, cuBLAS, NCCL and the kernels' code take: a figure of the plan's own, which
 * should be near what the driver counts. */
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
  double held = held_bytes(plan), used = tiny_cell(state, run, "speed", 0, "mem_peak_gib", NULL) * 1073741824.0;
  print_message("%s: arenas %.3f GB, by the driver %.3f GB, so %.3f GB beside them (planned %.3f)\n", run, held * 1e-9,
                used * 1e-9, (used - held) * 1e-9, plan_number(plan, "own_bytes") * 1e-9);
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

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(one_gpu), cmocka_unit_test(two_gpus),
                                     cmocka_unit_test(a_larger_model)};
  return cmocka_run_group_tests(tests, plan_setup, wn_temp_teardown);
}
