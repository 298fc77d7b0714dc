/* What a card is to the planner, by the name that its driver gives it. */
#include "support/test.h"

#include <stdlib.h>

#include "train/plan.h"

static wn_machine machine_of(const char *name, int32_t multiprocessors, double memory_bytes) {
  wn_cuda_card card = {.multiprocessors = multiprocessors, .memory_bytes = (size_t)memory_bytes};
  wn_machine machine;
  snprintf(card.name, sizeof card.name, "%s", name);
  wn_machine_of_card(&machine, &card);
  assert_true(machine.gpu && machine.multiprocessors == multiprocessors && machine.memory_bytes == memory_bytes);
  assert_string_equal(machine.name, name);
  return machine;
}

/* Its own memory, and the rates of the machine that it is. */
static void cards_that_are_known(void **state) {
  static const struct {
    const char *card, *name;
    double memory_bytes;
  } known[] = {{"NVIDIA H200", "h200", 150.0e9},
               {"NVIDIA H100 80GB HBM3", "h100", 84.9e9},
               {"NVIDIA GH200 480GB", "gh200", 101.5e9},
               {"NVIDIA GH200 144G HBM3e", "gh200", 153.0e9}};
  (void)state;
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    wn_machine card = machine_of(known[i].card, 132, known[i].memory_bytes), named;
    OK(wn_machine_named(&named, known[i].name, 1));
    assert_true(card.flops > 0 && card.flops == named.flops && card.link_bytes_s == named.link_bytes_s &&
                card.fabric_bytes_s == named.fabric_bytes_s && card.ranks_a_host == named.ranks_a_host &&
                card.own_bytes == named.own_bytes && card.nccl_bytes == named.nccl_bytes);
  }
}

/* Cards of lesser rates have names that begin alike: their memory is known, their rates are not made up. */
static void cards_that_are_not(void **state) {
  static const char *const strangers[] = {"NVIDIA H200 NVL", "NVIDIA H100 PCIe", "NVIDIA H100 NVL",
                                          "NVIDIA H20",      "NVIDIA H20-3e",    "NVIDIA"};
  (void)state;
  for (size_t i = 0; i < sizeof strangers / sizeof *strangers; i++) {
    wn_machine card = machine_of(strangers[i], 114, 80e9);
    assert_true(card.flops == 0 && card.link_bytes_s == 0 && card.fabric_bytes_s == 0 && card.own_bytes > 0);
  }
}

/* A step's time needs a rate; memory does not. */
static void a_plan_without_rates(void **state) {
  (void)state;
  wn_job *job = calloc(1, sizeof *job);
  wn_job_source *source;
  wn_plan *plan;
  static const char *const overrides[] = {"model=configs/models/tiny", "device=cpu"};
  assert_non_null(job);
  OK(wn_job_load(job, &source, WN_STAGE_PRETRAIN, "configs/jobs/tiny/pretrain.yaml", overrides, 2));
  wn_machine machine = {.name = "cpu"};
  const wn_recipe recipe = {.stage = WN_STAGE_PRETRAIN, .train_base = true};
  OK(wn_plan_create(&plan, recipe, job, 2, &machine, 0));
  assert_true(plan->flops > 0 && plan->compute_s == 0 && plan->step_s == 0 && plan->hours == 0 && plan->fits);
  wn_plan_free(plan);
  wn_job_source_free(source);
  free(job);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(cards_that_are_known), cmocka_unit_test(cards_that_are_not),
                                     cmocka_unit_test(a_plan_without_rates)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
