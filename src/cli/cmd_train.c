#include "cli/commands.h"
#include "cli/flags.h"
#include "stages/stages.h"
#include "train/plan.h"

/* The planner's figure for as many ranks as there are, on what this machine would run the job on. */
static wn_status show_memory(wn_recipe recipe, const wn_job *job, wn_world *world, wn_log *log) {
  static const double giga = 1e9;
  wn_plan *plan;
  wn_machine machine;
  if (wn_world_rank(world) != 0) return NULL;
  wn_status status = wn_machine_here(&machine, job);
  if (!status) status = wn_plan_create(&plan, recipe, job, wn_world_size(world), &machine, 0);
  if (wn_status_code(status) == WN_E_DEVICE) {
    wn_warn(log, "its memory is not known: %s", wn_status_text(status));
    wn_status_free(status);
    return NULL;
  }
  WN_TRY(status);
  const wn_device *device = plan->run->device;
  wn_info(log, "memory of a rank: %.3f GB, of which weights %.3f, stash %.3f, scratch %.3f (`winnow plan` says what)",
          plan->total_bytes / giga, (double)wn_arena_held_bytes(device->weights) / giga,
          (double)wn_arena_held_bytes(device->stash) / giga, (double)wn_arena_held_bytes(device->scratch) / giga);
  if (machine.memory_bytes > 0)
    wn_info(log, "%s has %.1f GB: the job %s", machine.name, machine.memory_bytes / giga,
            plan->fits ? "fits" : "does not fit");
  wn_plan_free(plan);
  return NULL;
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
  wn_status status = wn_job_load(&job, &source, stage, argv[1], (const char *const *)(argv + 2), n - 1);
  if ((status = wn_world_agree(world, status))) {
    wn_job_source_free(source);
    return status;
  }
  wn_world_set_timeout(world, job.parallelism.timeout_s);
  wn_recipe recipe = wn_recipe_of(stage);
  status = check ? wn_run_check(recipe, &job, world, log) : wn_train(recipe, &job, source, world, log);
  if (check && !status) status = show_memory(recipe, &job, world, log);
  wn_job_source_free(source);
  if (check && !status) wn_info(log, "%s: the job is valid", argv[1]);
  return status;
}
