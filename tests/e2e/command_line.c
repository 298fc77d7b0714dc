/* The program's own words: help, quiet, what is missing. */
#include "support/tiny.h"

static void help_is_no_error(void **state) {
  (void)state;
  static const char *const asked[] = {"--help",      "help",        "-h",          "warmup --help",
                                      "eval --help", "data --help", "data pack -h"};
  wn_program p;
  for (size_t i = 0; i < sizeof asked / sizeof *asked; i++) {
    wn_winnow(&p, 1, "%s", asked[i]);
    if (p.code != 0 || !strstr(p.out, "usage: winnow") || p.err[0]) fail_msg("%s: %d, %s", asked[i], p.code, p.err);
  }
}

static void no_command_is_one(void **state) {
  (void)state;
  wn_program p;
  wn_winnow(&p, 1, "--quiet");
  assert_int_equal(p.code, WN_E_USAGE);
  assert_non_null(strstr(p.err, "usage: winnow"));
  assert_string_equal(p.out, "");
}

/* Before the command or behind its words, but not behind "--", where everything is a name. */
static void quiet_stands_anywhere(void **state) {
  wn_temp_path text = wn_temp(state, "text"), out = wn_temp(state, "packed");
  wn_program p;
  tiny_write(text.text, "some words\n");
  for (int i = 0; i < 3; i++) {
    wn_winnow(&p, 1, "%sdata %spack --out %s %s%s", i == 0 ? "--quiet " : "", i == 1 ? "--quiet " : "", out.text,
              text.text, i == 2 ? " --quiet" : "");
    if (p.code != 0 || p.err[0]) fail_msg("place %d: %d, %s", i, p.code, p.err);
  }
  wn_winnow(&p, 1, "data pack --out %s %s", out.text, text.text);
  if (p.code != 0 || !strstr(p.err, "tokens from 11 bytes")) fail_msg("%d, %s", p.code, p.err);
  wn_winnow_refuses(WN_E_IO, "cannot open --quiet", "data pack --out %s -- --quiet", out.text);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(help_is_no_error),
      cmocka_unit_test(no_command_is_one),
      TEMP_TEST(quiet_stands_anywhere),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
