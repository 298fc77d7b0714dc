#include "cli/commands.h"
#include "cli/flags.h"

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
