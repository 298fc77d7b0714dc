/* Picks the command, and turns its outcome into the exit code. Nothing else in the program exits. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/environment.h"
#include "cli/commands.h"

static const char usage[] =
    "usage: winnow COMMAND ...\n"
    "\n"
    "  pretrain JOB.yaml [key=value ...]   dense base from scratch, or a dense control run\n"
    "  warmup   JOB.yaml [key=value ...]   stage 1: train the indexer alone, against dense attention\n"
    "  adapt    JOB.yaml [key=value ...]   stage 2: sparse attention, everything trains\n"
    "  eval     MODEL_DIR --data PREFIX    held-out loss under dense and sparse selections\n"
    "  forward  MODEL_DIR --tokens ...     every intermediate tensor of one sequence, to compare with other programs\n"
    "  convert  IN_DIR OUT_DIR --to FORM   a model directory as V3.2, V3, BF16, FP8, or the demo's shards\n"
    "  plan     JOB.yaml --ranks N         memory, time, traffic and disk of a job, without running it\n"
    "  data     pack | tokenize | detokenize | train-tokenizer | inspect | verify\n"
    "  bench    [OPERATION | layer]        times of the device's operations, or of a whole layer\n"
    "  inspect  PATH [--json]              what a model, checkpoint, shard, dataset or run directory is\n"
    "  report   RUN_DIR                    plots of a run's metrics\n"
    "  verify   CHECKPOINT_DIR             every byte against the checkpoint's manifest\n"
    "  options  [--markdown]               every key of a job file\n"
    "\n"
    "Every command answers --help. Jobs run alone or under mpirun or srun.\n"
    "--quiet, anywhere before --, leaves only warnings and errors.\n";

static wn_status dispatch(int argc, char **argv, wn_world *world, wn_log *log) {
  const char *name = argv[0];
  for (int s = 0; s < WN_N_STAGES; s++)
    if (strcmp(name, wn_stage_name((wn_stage)s)) == 0) return wn_cmd_train((wn_stage)s, argc, argv, world, log);
  if (strcmp(name, "eval") == 0) return wn_cmd_eval(argc, argv, world, log);
  if (strcmp(name, "forward") == 0) return wn_cmd_forward(argc, argv, world, log);
  if (strcmp(name, "convert") == 0) return wn_cmd_convert(argc, argv, world, log);
  if (strcmp(name, "bench") == 0) return wn_cmd_bench(argc, argv, world, log);
  if (strcmp(name, "data") == 0) return wn_cmd_data(argc, argv, log);
  if (strcmp(name, "plan") == 0) return wn_cmd_plan(argc, argv);
  if (strcmp(name, "inspect") == 0) return wn_cmd_inspect(argc, argv);
  if (strcmp(name, "report") == 0) return wn_cmd_report(argc, argv, log);
  if (strcmp(name, "verify") == 0) return wn_cmd_verify(argc, argv, log);
  if (strcmp(name, "options") == 0) return wn_cmd_options(argc, argv, log);
  return WN_FAIL_HINT(WN_E_USAGE, "run `winnow --help` for the commands", "unknown command '%s'", name);
}

/* Takes --quiet out of the words, wherever it stands before "--". Returns how many are left. */
static int take_quiet(int argc, char **argv, bool *quiet) {
  int kept = 1, i = 1;
  for (; i < argc && strcmp(argv[i], "--") != 0; i++)
    if (strcmp(argv[i], "--quiet") == 0)
      *quiet = true;
    else
      argv[kept++] = argv[i];
  for (; i < argc; i++) argv[kept++] = argv[i];
  argv[kept] = NULL;
  return kept;
}

int main(int argc, char **argv) {
  enum { COLLECTIVE_TIMEOUT_S = 600 };
  wn_log_settings settings = {0};
  wn_log *log = NULL;
  wn_world *world = NULL;
  wn_environment_prepare(argv);
  argc = take_quiet(argc, argv, &settings.quiet);
  if (argc < 2 || strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
    fputs(usage, argc < 2 ? stderr : stdout);
    return argc < 2 ? WN_E_USAGE : WN_OK;
  }
  wn_status status = wn_world_create(&world, COLLECTIVE_TIMEOUT_S);
  if (!status) {
    settings.rank = wn_world_rank(world);
    status = wn_log_create(&log, settings);
  }
  if (!status) status = dispatch(argc - 1, argv + 1, world, log);
  wn_code code = wn_status_code(status);
  if (log)
    wn_report_error(log, status);
  else if (status)
    fprintf(stderr, "winnow: %s\n", wn_status_text(status));
  wn_status_free(status);
  wn_log_free(log);
  wn_world_free(world);
  return (int)code;
}
