#include "cli/commands.h"
#include "cli/flags.h"
#include "stages/stages.h"
#include "train/trainer.h"

static wn_recipe recipe_of(wn_stage stage) {
  switch (stage) {
  case WN_STAGE_WARMUP: return wn_stage_warmup();
  case WN_STAGE_ADAPT: return wn_stage_adapt();
  case WN_STAGE_PRETRAIN:
  case WN_N_STAGES: break;
  }
  return wn_stage_pretrain();
}

wn_status wn_cmd_train(wn_stage stage, int argc, char **argv, wn_world *world, wn_log *log) {
  static const char *const abouts[WN_N_STAGES] = {
      "Trains the whole model from the token loss under dense attention: from random weights (model:), or on from "
      "init:.",
      "Stage 1: the base is frozen; the lightning indexer alone learns, by KL against the dense attention of every "
      "layer.",
      "Stage 2: every layer attends to its indexer's top-k keys; the base learns from the token loss, the indexer from "
      "the KL.",
  };
  bool check = false, helped;
  int32_t n;
  char line[128];
  snprintf(line, sizeof line, "winnow %s JOB.yaml [key=value ...] [--check]", wn_stage_name(stage));
  const wn_flag flags[] = {{.name = "--check",
                            .kind = WN_FLAG_SWITCH,
                            .value = &check,
                            .help = "validate the job and print its memory, without running it"}};
  const wn_command_help help = {line, abouts[stage]};
  WN_TRY(wn_flags_parse(argc, argv, flags, 1, &help, &n, &helped));
  if (helped) {
    puts("\nkeys of a job file:");
    return wn_job_print_options(stdout, false);
  }
  if (n < 1) return WN_FAIL_HINT(WN_E_USAGE, line, "no job file given");
  wn_job job;
  wn_job_source *source = NULL;
  WN_TRY(wn_job_load(&job, &source, stage, argv[1], (const char *const *)(argv + 2), n - 1));
  wn_world_set_timeout(world, job.parallelism.timeout_s);
  wn_status status =
      check ? wn_run_check(recipe_of(stage), &job, world, log) : wn_train(recipe_of(stage), &job, source, world, log);
  wn_job_source_free(source);
  if (check && !status) wn_info(log, "%s: the job is valid", argv[1]);
  return status;
}
