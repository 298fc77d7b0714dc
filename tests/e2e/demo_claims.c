/* The demo's claims hold for figures that bear them out, and for nothing else: not where a figure is missing, and not
 * where it is no number. */
#include "support/program.h"
#include "support/temp.h"

enum { WINDOWS = 20 };

/* Rows of the tables in eval/ that bear all claims out. */
static const char eval_head[] = "step,split,selection,tokens,loss,loss_scored,mass_at_k,mass_best,recall_at_k\n";
static const char base[] = "0,valid,dense,100,1.80,0.20,,,\n"
                           "0,valid,indexer,100,1.82,0.19,0.81,0.83,0.77\n"
                           "0,valid,recent,100,2.50,2.40,,,\n"
                           "0,valid,sink,100,2.53,2.45,,,\n";
static const char adapted[] = "0,valid,indexer,100,1.81,0.18,0.80,0.82,0.76\n";
static const char control[] = "0,valid,dense,100,1.80,0.17,,,\n";

static void write_eval(void **state, const char *name, const char *rows, const char *old, const char *new) {
  char text[1024], file[64];
  const char *at = old ? strstr(rows, old) : NULL;
  int before = at ? (int)(at - rows) : 0;
  if (at)
    snprintf(text, sizeof text, "%s%.*s%s%s", eval_head, before, rows, new, at + strlen(old));
  else
    snprintf(text, sizeof text, "%s%s", eval_head, rows);
  snprintf(file, sizeof file, "eval/%s.csv", name);
  wn_temp_write(wn_temp(state, file).text, text, strlen(text));
}

/* Sums of a window: 10 scored tokens; the indexer's lie below the others' by `gap` and a little noise. */
static void write_sequences(void **state, double gap) {
  static const char *const selections[] = {"dense", "indexer", "recent", "sink"};
  FILE *file = fopen(wn_temp(state, "eval/base.sequences.csv").text, "w");
  assert_non_null(file);
  fputs("selection,sequence,tokens,loss_sum,scored,scored_sum\n", file);
  for (int s = 0; s < 4; s++)
    for (int i = 0; i < WINDOWS; i++)
      fprintf(file, "%s,%d,100,180,10,%.9g\n", selections[s], i,
              2 + 0.1 * (i * 7 % 5) + (s > 1 ? gap + 0.02 * (i % 3 - 1) : 0));
  assert_int_equal(fclose(file), 0);
}

static void expect_claims(void **state, bool hold, const char *name, const char *old, const char *new, double gap) {
  static const char train[] = "step,indexer_kl\n1,2.2\n2,0.1\n";
  static const char *const folders[] = {"eval", "warmup/metrics", "adapt/metrics"};
  wn_program p;
  for (int i = 0; i < 3; i++) OK(wn_make_dirs(wn_temp(state, folders[i]).text));
  wn_temp_write(wn_temp(state, "warmup/metrics/train.csv").text, train, strlen(train));
  wn_temp_write(wn_temp(state, "adapt/metrics/train.csv").text, train, strlen(train));
  write_eval(state, "base", base, strcmp(name, "base") ? NULL : old, new);
  write_eval(state, "adapted", adapted, strcmp(name, "adapted") ? NULL : old, new);
  write_eval(state, "control", control, strcmp(name, "control") ? NULL : old, new);
  write_sequences(state, gap);
  wn_winnow_wait(wn_command_start(1, "sh", "configs/jobs/demo/summary.sh %s", (const char *)*state), &p);
  bool failed = strstr(p.out, "FAILS") != NULL;
  if (p.err[0] || p.code != !hold || failed == hold)
    fail_msg("%s, '%s' as '%s': ended with %d: %s%s", name, old ? old : "", new ? new : "", p.code, p.out, p.err);
}

static void good_figures_hold(void **state) {
  expect_claims(state, true, "", NULL, NULL, 2);
}

static void bad_figures_do_not(void **state) {
  expect_claims(state, false, "base", "2.50,2.40", "2.50,0.24", 2);
  expect_claims(state, false, "base", "0.81,0.83", "0.70,0.83", 2);
  expect_claims(state, false, "", NULL, NULL, 0);
  expect_claims(state, false, "adapted", "1.81,0.18", "1.83,0.18", 2);
  expect_claims(state, false, "adapted", "1.81,0.18", "1.81,0.21", 2);
}

static void nor_do_figures_that_are_none(void **state) {
  static const char *const none[] = {"", "nan", "-nan", "inf", "0"};
  for (int i = 0; i < 5; i++) {
    expect_claims(state, false, "base", "0.20", none[i], 2);
    expect_claims(state, false, "base", "2.40", none[i], 2);
    expect_claims(state, false, "base", "0.81", none[i], 2);
    expect_claims(state, false, "base", "0.83", none[i], 2);
    expect_claims(state, false, "adapted", "1.81", none[i], 2);
    expect_claims(state, false, "adapted", "0.18", none[i], 2);
    expect_claims(state, false, "control", "1.80", none[i], 2);
    expect_claims(state, false, "control", "0.17", none[i], 2);
  }
  expect_claims(state, false, "adapted", "0,valid,indexer", "0,valid,dense", 2);
  expect_claims(state, false, "control", "0,valid,dense", "0,valid,indexer", 2);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEMP_TEST(good_figures_hold),
      TEMP_TEST(bad_figures_do_not),
      TEMP_TEST(nor_do_figures_that_are_none),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
