/* What the tables say of the losses: by which counts they are divided, and that the logged KL is the raw mean. */
#include "support/tiny.h"

enum { LAYERS = 3 };

static void train(void **state, const char *stage, const char *init, const char *run, const char *more) {
  const char *dir = *state;
  wn_winnow_ends(0, 1, "%s %s/job.yaml init=%s run_dir=%s/%s metrics.eval_every=0 %s", stage, dir, init, dir, run,
                 more);
}

static void expect_close(const char *what, double got, double want) {
  if (!(fabs(got - want) <= 1e-6 * fabs(want))) fail_msg("%s is %.9g instead of %.9g", what, got, want);
}

/* indexer_kl is the mean of the layers' own, whatever the coefficient; loss has the coefficient and the sum. */
static void the_logged_kl_is_raw(void **state) {
  static const double coefficients[] = {1, 0.25};
  double kl[2];
  for (int i = 0; i < 2; i++) {
    char run[16], more[128];
    snprintf(run, sizeof run, "raw-%d", i);
    snprintf(more, sizeof more, "training.steps=1 dsa.loss_coeff=%g", coefficients[i]);
    train(state, "warmup", wn_temp(state, "base").text, run, more);
    double mean = 0;
    for (int l = 0; l < LAYERS; l++) mean += tiny_cell(state, run, "layers", l, "kl", NULL) / LAYERS;
    kl[i] = tiny_cell(state, run, "train", 0, "indexer_kl", NULL);
    expect_close("indexer_kl", kl[i], mean);
    expect_close("loss", tiny_cell(state, run, "train", 0, "loss", NULL), coefficients[i] * LAYERS * mean);
  }
  assert_true(kl[0] == kl[1] && kl[0] > 0);
}

/* One step over every window there is, and the evaluation of the same model on the same windows: one number, the mean
 * over the tokens that are predicted. */
static void the_token_loss_is_the_evaluations(void **state) {
  const char *dir = *state;
  wn_dataset *valid;
  char more[512];
  OK(wn_dataset_open(&valid, wn_temp(state, "valid").text));
  long long windows = (long long)wn_dataset_windows(valid, TINY_SEQ_LEN);
  wn_dataset_close(valid);
  assert_true(windows > 10 && windows < 256);
  snprintf(more, sizeof more,
           "data.train=%s/valid training.steps=1 training.global_batch_seqs=%lld training.micro_batch_seqs=1 "
           "moe.balance_loss_coeff=0",
           dir, windows);
  train(state, "pretrain", wn_temp(state, "base").text, "whole", more);
  wn_winnow_ends(0, 1, "eval %s --data %s/valid --selection dense --seq-len %d --threads 1 --sequences %s/whole.csv",
                 wn_temp(state, "base").text, dir, TINY_SEQ_LEN, dir);
  tiny_file file = tiny_read(wn_temp(state, "whole.csv").text);
  char *rest = file.text, *line = strsep(&rest, "\n");
  assert_string_equal(line, "selection,sequence,tokens,loss_sum,scored,scored_sum");
  double tokens = 0, sum = 0;
  long long rows = 0;
  while ((line = strsep(&rest, "\n")) && *line) {
    double row_tokens, row_sum;
    assert_int_equal(sscanf(line, "dense,%*d,%lf,%lf", &row_tokens, &row_sum), 2);
    tokens += row_tokens;
    sum += row_sum;
    rows++;
  }
  free(file.text);
  assert_int_equal(rows, windows);
  assert_true(tokens < (double)windows * TINY_SEQ_LEN); /* documents end in between */
  double loss = tiny_cell(state, "whole", "train", 0, "lm_loss", NULL);
  expect_close("lm_loss", loss, sum / tokens);
  expect_close("loss", tiny_cell(state, "whole", "train", 0, "loss", NULL), loss);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_logged_kl_is_raw),
      cmocka_unit_test(the_token_loss_is_the_evaluations),
  };
  return cmocka_run_group_tests(tests, tiny_setup, wn_temp_teardown);
}
