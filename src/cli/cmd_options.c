#include "cli/commands.h"
#include "cli/flags.h"
#include "train/checkpoint.h"

wn_status wn_cmd_options(int argc, char **argv, wn_log *log) {
  bool markdown = false, helped;
  int32_t n;
  const wn_flag flags[] = {
      {.name = "--markdown", .kind = WN_FLAG_SWITCH, .value = &markdown, .help = "as docs/options.md"}};
  const wn_command_help help = {"winnow options [--markdown]",
                                "Every key of a job file: type, range, default, meaning."};
  (void)log;
  WN_TRY(wn_flags_parse(argc, argv, flags, 1, &help, &n, &helped));
  if (helped) return NULL;
  if (n) return WN_FAIL_HINT(WN_E_USAGE, help.usage, "options takes no arguments");
  return wn_job_print_options(stdout, markdown);
}

wn_status wn_cmd_verify(int argc, char **argv, wn_log *log) {
  bool helped;
  int32_t n;
  const wn_command_help help = {"winnow verify CHECKPOINT_DIR",
                                "Reads every file of a checkpoint and compares it with MANIFEST.json."};
  WN_TRY(wn_flags_parse(argc, argv, NULL, 0, &help, &n, &helped));
  if (helped) return NULL;
  if (n != 1) return WN_FAIL_HINT(WN_E_USAGE, help.usage, "verify wants one checkpoint directory");
  wn_status status = wn_checkpoint_verify(argv[1]);
  if (!status) wn_info(log, "%s: whole", argv[1]);
  if (wn_status_code(status) != WN_E_INPUT) return status;
  wn_status answer = WN_FAIL(WN_E_CHECK, "%s", wn_status_text(status)); /* the check was what was asked for */
  wn_status_free(status);
  return answer;
}
