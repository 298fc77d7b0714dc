/* Commands in this process: what they refuse before anything runs, and what a check answers. */
#include "cli/commands.h"
#include "data/dataset.h"
#include "support/temp.h"

#define MODEL "tests/fixtures/oracle/v32_dense/model"

static wn_status eval(void **state, const char *selection) {
  wn_world *world;
  wn_temp_path data = wn_temp(state, "data");
  const char *argv[] = {"eval", MODEL,      "--data", data.text,     "--seq-len",
                        "8",    "--device", "cpu",    "--selection", selection};
  OK(wn_world_create(&world, 10));
  wn_status status = wn_cmd_eval((int)(sizeof argv / sizeof *argv), (char **)(uintptr_t)argv, world, NULL);
  wn_world_free(world);
  return status;
}

static void eval_wants_a_selection(void **state) {
  wn_dataset_writer *writer;
  const int32_t tokens[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
  OK(wn_dataset_writer_create(&writer, wn_temp(state, "data").text, 32, false));
  OK(wn_dataset_writer_add(writer, tokens, NULL, 11));
  OK(wn_dataset_writer_close(writer, true));
  REFUSED(eval(state, ""), WN_E_USAGE, "--selection names none");
  REFUSED(eval(state, ","), WN_E_USAGE, "unknown selection ''");
  REFUSED(eval(state, "dense,indexer,all"), WN_E_USAGE, "unknown selection 'all'");
  OK(eval(state, "recent,"));
}

static void what_a_check_finds_is_its_answer(void **state) {
  (void)state;
  assert_null(wn_check_answer(NULL));
  REFUSED(wn_check_answer(WN_FAIL(WN_E_IO, "unread")), WN_E_IO, "unread");
  REFUSED(wn_check_answer(WN_FAIL(WN_E_INPUT, "wrong")), WN_E_CHECK, "wrong");
  wn_status answer = wn_check_answer(WN_FAIL_HINT(WN_E_INPUT, "look there", "wrong"));
  assert_int_equal(wn_status_code(answer), WN_E_CHECK);
  assert_string_equal(wn_status_hint(answer), "look there");
  wn_status_free(answer);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEMP_TEST(eval_wants_a_selection),
      cmocka_unit_test(what_a_check_finds_is_its_answer),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
