#include "cli/commands.h"
#include "cli/flags.h"
#include "train/checkpoint.h"

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
  return wn_check_answer(status);
}

wn_status wn_check_answer(wn_status status) {
  if (wn_status_code(status) != WN_E_INPUT) return status;
  const char *hint = wn_status_hint(status);
  wn_status answer = *hint ? WN_FAIL_HINT(WN_E_CHECK, hint, "%s", wn_status_text(status))
                           : WN_FAIL(WN_E_CHECK, "%s", wn_status_text(status));
  wn_status_free(status);
  return answer;
}
