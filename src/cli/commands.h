/* One function a command; argv[0] is the command's name. */
#ifndef WN_CLI_COMMANDS_H
#define WN_CLI_COMMANDS_H

#include "base/log.h"
#include "config/job.h"
#include "dist/world.h"

WN_MUST_USE wn_status wn_cmd_train(wn_stage stage, int argc, char **argv, wn_world *world, wn_log *log);
WN_MUST_USE wn_status wn_cmd_eval(int argc, char **argv, wn_world *world, wn_log *log);
WN_MUST_USE wn_status wn_cmd_forward(int argc, char **argv, wn_world *world, wn_log *log);
WN_MUST_USE wn_status wn_cmd_bench(int argc, char **argv, wn_world *world, wn_log *log);
WN_MUST_USE wn_status wn_cmd_report(int argc, char **argv, wn_log *log);
WN_MUST_USE wn_status wn_cmd_plan(int argc, char **argv);
WN_MUST_USE wn_status wn_cmd_inspect(int argc, char **argv);
WN_MUST_USE wn_status wn_cmd_options(int argc, char **argv, wn_log *log);
WN_MUST_USE wn_status wn_cmd_convert(int argc, char **argv, wn_world *world, wn_log *log);
WN_MUST_USE wn_status wn_cmd_data(int argc, char **argv, wn_log *log);
WN_MUST_USE wn_status wn_cmd_verify(int argc, char **argv, wn_log *log); /* a checkpoint against its manifest */

/* What a check finds in the files that it was asked to check is WN_E_CHECK, not WN_E_INPUT. Takes its argument. */
WN_MUST_USE wn_status wn_check_answer(wn_status status);

#endif
