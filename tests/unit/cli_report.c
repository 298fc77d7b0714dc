/* winnow report: draws what a run measured and leaves out what it did not, whatever the stage. */
#include "cli/commands.h"
#include "support/temp.h"

#define TRAIN "step,tokens,lr,indexer_lr,loss,lm_loss,indexer_kl,grad_norm,indexer_grad_norm,skipped\n"
#define LAYERS                                                                                                         \
  "step,layer,kl,kl_dense,kl_uniform,mass_at_k,mass_best,mass_recent,mass_sink,mass_random,recall_at_k,top1_hit,"      \
  "entropy_target,entropy_index,select_dist_mean,select_local_ratio,select_iou_prev,density,expert_load_max\n"
#define EVAL "step,split,selection,tokens,loss,loss_scored\n"

static void write_table(void **state, const char *name, const char *text) {
  char file[64];
  OK(wn_make_dirs(wn_temp(state, "it's a run/metrics").text));
  snprintf(file, sizeof file, "it's a run/metrics/%s.csv", name);
  wn_temp_write(wn_temp(state, file).text, text, strlen(text));
}

static wn_status report(void **state) {
  wn_temp_path dir = wn_temp(state, "it's a run");
  char *argv[] = {(char *)(uintptr_t) "report", dir.text, NULL};
  return wn_cmd_report(2, argv, NULL);
}

static void needs_gnuplot(void) {
  if (system("gnuplot --version >/dev/null 2>&1") == 0) return;
  print_message("skipped: gnuplot is not installed\n");
  skip();
}

static void expect_drawn(void **state, const char *name, bool drawn) {
  static const char *const suffixes[] = {"svg", "png"};
  for (int i = 0; i < 2; i++) {
    char file[64];
    snprintf(file, sizeof file, "it's a run/report/%s.%s", name, suffixes[i]);
    if (wn_path_exists(wn_temp(state, file).text) != drawn) fail_msg("%s: drawn is not %d", file, drawn);
  }
}

static void a_pretraining_has_a_loss(void **state) {
  needs_gnuplot();
  write_table(state, "train", TRAIN "1,8,0.1,,5,5,,1,,0\n2,16,0.1,,,,,,,1\n3,24,0.1,,4,4,,1,,0\n");
  write_table(state, "layers", LAYERS "2,0,,,,,,,,,,,,,,,,,\n2,1,,,,,,,,,,,,,,,,,1.5\n");
  write_table(state, "eval", EVAL);
  OK(report(state));
  expect_drawn(state, "loss", true);
  expect_drawn(state, "kl", false);
  expect_drawn(state, "mass", false);
  expect_drawn(state, "recall", false);
}

#define ROW(step, layer, mass) step "," layer ",1,1,1," mass ",.9,.4,.4,.3,.7,1,2,2,9,1,,.3,\n"

static char *picture(void **state, const char *name) {
  char file[64], *text;
  snprintf(file, sizeof file, "it's a run/report/%s.svg", name);
  OK(wn_read_file(&text, NULL, wn_temp(state, file).text, 1 << 20));
  return text;
}

static void a_warmup_has_no_loss_of_its_own(void **state) {
  needs_gnuplot();
  write_table(state, "train", TRAIN "1,8,,0.1,0.5,,0.25,,1,0\n2,16,,0.1,0.4,,0.2,,1,0\n");
  write_table(state, "layers", LAYERS ROW("2", "0", ".5") ROW("2", "1", ".6") ROW("2", "2", ".7"));
  write_table(state, "eval", EVAL);
  OK(report(state));
  expect_drawn(state, "loss", false);
  expect_drawn(state, "kl", true);
  expect_drawn(state, "mass", true);
  expect_drawn(state, "recall", true);
  char *recall = picture(state, "recall");
  assert_non_null(strstr(recall, "layer 0"));
  assert_non_null(strstr(recall, "layer 2"));
  free(recall);
}

static void mass_is_that_of_the_last_step(void **state) {
  needs_gnuplot();
  write_table(state, "train", TRAIN "1,8,,0.1,0.5,,0.25,,1,0\n");
  write_table(state, "layers", LAYERS ROW("20", "0", ".5") ROW("20", "1", ".6"));
  OK(report(state));
  char *alone = picture(state, "mass");
  write_table(state, "layers",
              LAYERS ROW("1", "0", ".2") ROW("1", "1", ".3") ROW("20", "0", ".5") ROW("20", "1", ".6"));
  OK(report(state));
  char *last = picture(state, "mass");
  assert_string_equal(last, alone);
  free(alone);
  free(last);
}

static void an_evaluated_warmup_has_one(void **state) {
  needs_gnuplot();
  write_table(state, "train", TRAIN "1,8,,0.1,0.5,,0.25,,1,0\n2,16,,0.1,0.4,,0.2,,1,0\n");
  write_table(state, "eval", EVAL "2,\"valid, or not\",indexer,8,4.5,\n");
  OK(report(state));
  expect_drawn(state, "loss", true);
  expect_drawn(state, "kl", true);
}

static void refuses_what_is_no_run(void **state) {
  REFUSED(report(state), WN_E_INPUT, "not a run directory");
  write_table(state, "train", TRAIN);
  REFUSED(report(state), WN_E_INPUT, "not a run directory");
  write_table(state, "train", TRAIN "1,8,0.1,,,,,,,1\n");
  REFUSED(report(state), WN_E_INPUT, "no loss and no KL");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEMP_TEST(a_pretraining_has_a_loss),      TEMP_TEST(a_warmup_has_no_loss_of_its_own),
      TEMP_TEST(mass_is_that_of_the_last_step), TEMP_TEST(an_evaluated_warmup_has_one),
      TEMP_TEST(refuses_what_is_no_run),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
