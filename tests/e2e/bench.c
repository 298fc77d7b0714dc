/* `winnow bench` on a CPU with small sizes: a row of every operation, both layers, what it refuses. */
#include "cli/bench.h"
#include "support/temp.h"
#include "support/test.h"

#include <string.h>
#include <stdlib.h>

#include "io/files.h"
#include "support/program.h"

/* Odd sizes, fewer queries than keys, rows with fewer keys than picks. */
static const char sizes[] = "--device cpu --threads 1 --repeats 3 --seconds 0 --seq 67 --rows 41 --topk 33 --heads 3 "
                            "--hidden 72 --nope 10 --rope 8 --value 12 --latent 16 --q-latent 24 --index-heads 2 "
                            "--index-width 16 --experts 5 --experts-a-token 2 --expert-width 20 --vocab 101 "
                            "--sampled 7 --elements 5001";

static int lines_of(const char *text) {
  int n = 0;
  for (; *text; text++) n += *text == '\n';
  return n;
}

static void every_operation_has_a_row(void **state) {
  static const char *const more[] = {"--picks random", "--picks recent", "--document 23",
                                     "--document 40 --picks recent"};
  enum { TIMES = sizeof more / sizeof *more };
  wn_temp_path csv = wn_temp(state, "bench.csv");
  wn_program p, names;
  wn_winnow(&names, 1, "bench --list");
  assert_int_equal(names.code, 0);
  assert_true(lines_of(names.out) > 40);
  for (int i = 0; i < TIMES; i++) {
    wn_winnow(&p, 1, "bench %s %s --csv %s", sizes, more[i], csv.text);
    if (p.code != 0) fail_msg("exit code %d: %s", p.code, p.err);
    assert_int_equal(lines_of(p.out), lines_of(names.out) + 1);
    assert_true(strncmp(p.out,
                        "operation,shape,repeats,median_ms,min_ms,max_ms,work,rate,unit,limit_pct,cublas_tflops\n",
                        80) == 0);
  }
  char *content;
  size_t bytes;
  OK(wn_read_file(&content, &bytes, csv.text, 1 << 20));
  assert_int_equal(lines_of(content), TIMES * lines_of(names.out) + 1);
  free(content);
}

/* Work is counted by hand for shapes small enough to count. */
static void work_is_counted(void **state) {
  (void)state;
  static const struct {
    const char *operation; /* and flags */
    double work;
    bool documents; /* are named with the shape */
  } expected[] = {
      {"attention_dense", 2.0 * 3 * (27 + 67) * 41 / 2 * (18 + 12), false},
      {"indexer_select", 2.0 * 2 * 16 * (27 + 67) * 41 / 2, false},
      {"attention_sparse", 2.0 * 3 * (27 + 28 + 29 + 30 + 31 + 32 + 33 * 35) * (24 + 16), false},
      /* rows see 4 .. 23 keys, then 1 .. 21 */
      {"attention_dense --document 23", 2.0 * 3 * (270 + 231) * (18 + 12), true},
      {"attention_masked --document 23", 2.0 * 3 * (270 + 231) * (18 + 12), true},
      {"attention_sparse --document 23 --topk 20", 2.0 * 3 * (270 - 6 + 231 - 1) * (24 + 16), true},
      {"indexer_select --document 23", 2.0 * 2 * 16 * (270 + 231), true},
      {"rms_norm --document 23", 4.0 * (2 * 41 * 72 + 72 + 41), false},
      {"adamw", 4.0 * 5001 * 7, false},
  };
  for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
    wn_program p;
    char work[64];
    wn_winnow(&p, 1, "bench %s %s --quiet", sizes, expected[i].operation);
    if (p.code != 0) fail_msg("%s: exit code %d: %s", expected[i].operation, p.code, p.err);
    snprintf(work, sizeof work, ",%.9g,", expected[i].work);
    if (!strstr(p.out, work)) fail_msg("%s: no work of %s in %s", expected[i].operation, work, p.out);
    if ((strstr(p.out, " documents of 23,") != NULL) != expected[i].documents)
      fail_msg("%s: %s", expected[i].operation, p.out);
  }
}

static void layers_run(void **state) {
  (void)state;
  wn_program p;
  for (int stage = 1; stage <= 2; stage++) {
    for (int32_t document = 30; document <= 67; document += 37) {
      wn_winnow(&p, 1, "bench layer %s --rows 67 --document %d --stage %d --memory", sizes, document, stage);
      if (p.code != 0) fail_msg("stage %d, documents of %d: exit code %d: %s", stage, document, p.code, p.err);
      assert_int_equal(lines_of(p.out), 2);
      assert_non_null(strstr(p.err, "(peak)"));
      assert_non_null(strstr(p.out, document == 30 ? ",67,30," : ",67,67,"));
    }
  }
}

static void what_it_refuses(void **state) {
  (void)state;
  wn_winnow_refuses(WN_E_USAGE, "no operation 'attention'", "bench attention --device cpu --quiet");
  wn_winnow_refuses(WN_E_USAGE, "--rows is 9, but --seq only 8", "bench add --device cpu --seq 8 --rows 9 --quiet");
  wn_winnow_refuses(WN_E_USAGE, "--picks", "bench add --picks some");
  wn_winnow_refuses(WN_E_USAGE, "one operation", "bench add scale");
  wn_winnow_refuses(WN_E_USAGE, "no --rows", "bench layer --device cpu --seq 8 --rows 4 --quiet");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEMP_TEST(every_operation_has_a_row),
      cmocka_unit_test(work_is_counted),
      cmocka_unit_test(layers_run),
      cmocka_unit_test(what_it_refuses),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
