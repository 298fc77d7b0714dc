#include <omp.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/flags.h"
#include "convert/convert.h"

static wn_status find_form(wn_convert_form *out, const char *name) {
  for (int i = 0; i < WN_N_CONVERT_FORMS; i++) {
    *out = (wn_convert_form)i;
    if (strcmp(name, wn_convert_form_names[i]) == 0) return NULL;
  }
  return WN_FAIL(WN_E_USAGE, "--to is v32, v3, bf16, fp8 or demo, not '%s'", name);
}

wn_status wn_cmd_convert(int argc, char **argv, wn_world *world, wn_log *log) {
  const char *to = NULL;
  /* the release's first shard has 5,234,139,343 bytes: 5 GiB it is */
  int64_t shards = 0, shard_bytes = 0, threads = 0;
  const int64_t usual_shard_bytes = (int64_t)5 << 30;
  const wn_flag flags[] = {
      {.name = "--to",
       .kind = WN_FLAG_TEXT,
       .value = &to,
       .argument = "v32|v3|bf16|fp8|demo",
       .help = "V3.2 or V3 in BF16; the same model in BF16 or FP8; the demo's shards"},
      {.name = "--model-parallel",
       .kind = WN_FLAG_INT,
       .value = &shards,
       .least = 1,
       .most = 4096,
       .argument = "N",
       .help = "of the demo: how many shards (default 1)"},
      {.name = "--shard-bytes",
       .kind = WN_FLAG_INT,
       .value = &shard_bytes,
       .least = 1,
       .most = 1e15,
       .argument = "BYTES",
       .help = "of the others: most bytes of a shard (default 5 GiB, as the release)"},
      WN_FLAG_THREADS(&threads, "CPU threads (default: all cores)"),
  };
  const wn_command_help help = {
      "winnow convert IN_DIR OUT_DIR --to v32|v3|bf16|fp8|demo [flags]",
      "Writes a model directory or checkpoint (F32, F16, BF16 or FP8) in another form, with config.json, index and\n"
      "tokenizer. Killed, it goes on where it was when the same command is given again."};
  int32_t n;
  bool helped;
  wn_convert_form form;
  WN_TRY(wn_flags_parse(argc, argv, flags, (int32_t)(sizeof flags / sizeof *flags), &help, &n, &helped));
  if (helped) return NULL;
  if (n != 2 || !to)
    return WN_FAIL_HINT(WN_E_USAGE, help.usage, "convert wants the directory to read, the one to write, and --to");
  WN_TRY(find_form(&form, to));
  if (shards && form != WN_TO_DEMO) return WN_FAIL(WN_E_USAGE, "--model-parallel goes with --to demo, not %s", to);
  if (shard_bytes && form == WN_TO_DEMO)
    return WN_FAIL(WN_E_USAGE, "--shard-bytes does not go with --to demo: --model-parallel says how many shards");
  if (wn_world_size(world) != 1) return WN_FAIL(WN_E_USAGE, "convert runs on one rank, not %d", wn_world_size(world));
  wn_convert_job job = {.in = argv[1],
                        .out = argv[2],
                        .form = form,
                        .model_parallel = shards ? (int32_t)shards : 1,
                        .shard_bytes = shard_bytes ? shard_bytes : usual_shard_bytes,
                        .threads = threads ? (int32_t)threads : omp_get_num_procs()};
  return wn_convert(&job, log);
}
