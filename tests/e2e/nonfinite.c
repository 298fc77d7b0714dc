/* Losses and gradients that are not finite, or whose squares are not: such steps are skipped and counted, nothing of
 * them enters weights or moments, and too many in a row end the run. Weights are numbers, or they are not imported:
 * these are so large that a product overflows. */
#include "support/tiny.h"

#include <float.h>

#include "train/checkpoint.h"

enum { POISON = TINY_VOCAB - 1, FEATURE = 3 }; /* a token that only some documents hold; a column of hidden states */

static void poison_all(const wn_param_table *table, float **values) {
  for (int32_t i = 0; i < table->n; i++)
    if (table->params[i].slot == WN_P_INPUT_NORM && table->params[i].layer == 1) values[i][FEATURE] = FLT_MAX;
}

/* The feature is 0 in every token but POISON, and the first norm multiplies it beyond every number. */
static void poison_inputs(const wn_param_table *table, float **values) {
  for (int32_t i = 0; i < table->n; i++) {
    const wn_param *p = &table->params[i];
    if (p->slot == WN_P_INPUT_NORM && p->layer == 0) values[i][FEATURE] = FLT_MAX;
    for (int64_t t = 0; p->slot == WN_P_EMBED && t < p->dim[0]; t++)
      values[i][t * p->dim[1] + FEATURE] = t == POISON ? 100 : 0;
  }
}

static void weigh_targets(const wn_param_table *table, float **values, float weight) {
  for (int32_t i = 0; i < table->n; i++) {
    const wn_param *p = &table->params[i];
    if (p->slot == WN_P_FINAL_NORM) values[i][FEATURE] = 1;
    if (p->slot == WN_P_HEAD) values[i][POISON * p->dim[1] + FEATURE] = weight;
    for (int64_t t = 0; p->slot == WN_P_EMBED && t < p->dim[0]; t++) values[i][t * p->dim[1] + FEATURE] = 30;
  }
}
/* The feature is large in every token, and makes POISON's logit minus infinity: of probability 0, which only a row that
 * is to predict it feels. A base that trains needs this form: gradients of the other one overflow in every step. */
static void poison_targets(const wn_param_table *table, float **values) {
  weigh_targets(table, values, -FLT_MAX);
}
/* The same, but loss and gradient are numbers: the gradient's squares alone are none. */
static void enlarge_targets(const wn_param_table *table, float **values) {
  weigh_targets(table, values, -1e22f);
}

/* The tokens but POISON, and it here and there. */
static void rarely_poisoned(const char *prefix) {
  wn_dataset_writer *writer;
  OK(wn_dataset_writer_create(&writer, prefix, TINY_VOCAB, false));
  for (int32_t d = 0; d < 60; d++) {
    int32_t document[33];
    for (int32_t i = 0; i < 33; i++)
      document[i] = (int32_t)wn_rng_below(9, WN_RNG_TEST, (uint64_t)(d * 64 + i), POISON);
    if (d % 6 == 5) document[7] = POISON;
    OK(wn_dataset_writer_add(writer, document, NULL, 33));
  }
  OK(wn_dataset_writer_close(writer, true));
}

static int setup(void **state) {
  if (tiny_setup(state)) return -1;
  wn_model_config config = tiny_config();
  tiny_model(wn_temp(state, "poisoned").text, &config, 1, 2, poison_all);
  tiny_model(wn_temp(state, "rare-pretrain").text, &config, 1, 2, poison_targets);
  tiny_model(wn_temp(state, "rare-warmup").text, &config, 1, 2, poison_inputs);
  tiny_model(wn_temp(state, "large-pretrain").text, &config, 1, 2, enlarge_targets);
  config = tiny_sparse_config();
  tiny_model(wn_temp(state, "sparse").text, &config, 1, 2, poison_all);
  tiny_model(wn_temp(state, "rare-adapt").text, &config, 1, 2, poison_targets);
  rarely_poisoned(wn_temp(state, "mixed").text);
  return 0;
}

static wn_state state_of(void **state, const char *run, int64_t step) {
  wn_state s = {0};
  wn_stage stage;
  bool found;
  OK(wn_checkpoint_read_state(tiny_step(state, run, step).text, &s, &stage, &found));
  assert_true(found);
  return s;
}

/* ---- every step ---- */

static void expect_weights_of(void **state, const char *run, int64_t step, const char *init) {
  wn_hf_dir *before, *after;
  OK(wn_hf_dir_open(&before, wn_temp(state, init).text));
  OK(wn_hf_dir_open(&after, tiny_step(state, run, step).text));
  for (int64_t i = 0; i < wn_hf_dir_count(before); i++) {
    const wn_st_entry *a = wn_hf_dir_at(before, i, NULL), *b = wn_hf_dir_find(after, a->name, NULL);
    if (!b || tiny_bits_differ(a, b)) fail_msg("%s changed in steps that were skipped", a->name);
  }
  wn_hf_dir_close(before);
  wn_hf_dir_close(after);
}

static void gives_up(void **state, const char *stage, int32_t ranks) {
  const char *dir = *state, *init = strcmp(stage, "adapt") ? "poisoned" : "sparse";
  char run[32];
  wn_program p;
  snprintf(run, sizeof run, "up-%s-%d", stage, ranks);
  wn_winnow(&p, ranks,
            "%s %s/job.yaml init=%s/%s run_dir=%s/%s training.steps=9 checkpoint.interval=1 metrics.eval_every=0",
            stage, dir, dir, init, dir, run);
  if (p.code != WN_E_TRAINING ||
      !strstr(p.err, "winnow: 4 steps in a row had a loss, gradient or gradient's square that is not finite "
                     "(training.max_skipped_in_a_row is 3)"))
    fail_msg("%s ended with %d: %s", stage, p.code, p.err);
  wn_state s = state_of(state, run, 3);
  assert_true(s.step == 3 && s.skipped == 3 && s.skipped_in_a_row == 3 && s.adam_base == 0 && s.adam_indexer == 0 &&
              s.router_bias_updates == 0);
  assert_false(wn_path_exists(tiny_step(state, run, 4).text));
  expect_weights_of(state, run, 3, init);
  int64_t rows;
  for (int64_t row = 0; row < 4; row++) assert_true(tiny_cell(state, run, "train", row, "skipped", &rows) == 1);
  assert_int_equal(rows, 4);
  wn_safetensors *moments = tiny_optimizer(tiny_step(state, run, 3).text);
  for (int64_t i = 0; i < wn_safetensors_count(moments); i++) {
    const wn_st_entry *m = wn_safetensors_at(moments, i);
    for (uint64_t e = 0; e < m->bytes; e++)
      if (((const char *)m->data)[e]) fail_msg("%s is not zero", m->name);
  }
  wn_safetensors_close(moments);
  /* the counter survives: going on, the next such step is the one too many */
  wn_winnow(&p, ranks,
            "%s %s/job.yaml init=%s/%s run_dir=%s/%s training.steps=9 checkpoint.interval=1 metrics.eval_every=0",
            stage, dir, dir, init, dir, run);
  if (p.code != WN_E_TRAINING || !strstr(p.err, "winnow: 4 steps in a row"))
    fail_msg("resumed %s ended with %d: %s", stage, p.code, p.err);
}

static void pretrain_gives_up(void **state) {
  gives_up(state, "pretrain", 1);
}
static void warmup_gives_up(void **state) {
  gives_up(state, "warmup", 1);
}
static void adapt_gives_up(void **state) {
  gives_up(state, "adapt", 1);
}
static void all_ranks_give_up(void **state) {
  gives_up(state, "adapt", 2);
}

/* ---- some steps ---- */

/* Whether the batch of `step` (from 0) holds the token as an input, or as one that is predicted. */
static bool poisoned_step(const wn_dataset *data, int64_t step, bool as_input) {
  int32_t tokens[TINY_SEQ_LEN + 1], first[TINY_SEQ_LEN];
  uint8_t predicted[TINY_SEQ_LEN], scored[TINY_SEQ_LEN];
  wn_window window = {tokens, first, predicted, scored};
  bool found = false;
  for (int64_t i = 0; i < 4; i++) {
    wn_dataset_read(data, wn_sampler_window(3, wn_dataset_windows(data, TINY_SEQ_LEN), step, 4, i), TINY_SEQ_LEN,
                    &window);
    for (int32_t t = 0; t < TINY_SEQ_LEN; t++)
      found = found || (as_input ? tokens[t] == POISON : predicted[t] && tokens[t + 1] == POISON);
  }
  return found;
}

static void expect_finite(const wn_st_entry *entry, const char *where) {
  for (size_t e = 0; e < entry->bytes / sizeof(float); e++) {
    float value;
    memcpy(&value, (const float *)entry->data + e, sizeof value);
    if (!isfinite(value)) fail_msg("%s: %s[%zu] is %g", where, entry->name, e, (double)value);
  }
}

/* init: before the stage's name; finite: whether the loss of a skipped step is a number. */
static void skips_and_goes_on(void **state, const char *stage, const char *init, bool finite, const char *options) {
  enum { STEPS = 24, DEATH = 11 };
  const char *dir = *state;
  char run[32], line[2048];
  wn_dataset *data;
  int64_t skipped = 0;
  snprintf(run, sizeof run, "%s-run-%s", init, stage);
  snprintf(line, sizeof line,
           "%s %s/job.yaml init=%s/%s-%s run_dir=%s/%s data.train=%s/mixed training.max_skipped_in_a_row=20 "
           "metrics.eval_every=0 checkpoint.interval=%d %s",
           stage, dir, dir, init, stage, dir, run, dir, DEATH, options);
  wn_winnow_ends(0, 1, "%s training.steps=%d", line, DEATH);
  wn_winnow_ends(0, 1, "%s training.steps=%d", line, STEPS);
  OK(wn_dataset_open(&data, wn_temp(state, "mixed").text));
  for (int64_t step = 0; step < STEPS; step++) {
    bool expected = poisoned_step(data, step, strcmp(stage, "warmup") == 0);
    skipped += expected;
    if (tiny_cell(state, run, "train", step, "skipped", NULL) != (expected ? 1 : 0))
      fail_msg("%s: step %lld", stage, (long long)step + 1);
    assert_true(isfinite(tiny_cell(state, run, "train", step, "loss", NULL)) == (finite || !expected));
  }
  wn_dataset_close(data);
  assert_true(skipped > 3 && skipped < STEPS - 3);
  wn_state s = state_of(state, run, STEPS);
  int64_t base = strcmp(stage, "warmup") ? STEPS - skipped : 0,
          indexer = strcmp(stage, "pretrain") ? STEPS - skipped : 0;
  assert_true(s.step == STEPS && s.tokens == STEPS * 4 * TINY_SEQ_LEN && s.skipped == skipped);
  assert_true(s.adam_base == base && s.adam_indexer == indexer && s.router_bias_updates == base);
  wn_safetensors *moments = tiny_optimizer(tiny_step(state, run, STEPS).text);
  wn_hf_dir *model;
  OK(wn_hf_dir_open(&model, tiny_step(state, run, STEPS).text));
  for (int64_t i = 0; i < wn_safetensors_count(moments); i++) expect_finite(wn_safetensors_at(moments, i), stage);
  for (int64_t i = 0; i < wn_hf_dir_count(model); i++) expect_finite(wn_hf_dir_at(model, i, NULL), stage);
  wn_safetensors_close(moments);
  wn_hf_dir_close(model);
}

static void pretrain_skips(void **state) {
  skips_and_goes_on(state, "pretrain", "rare", false, "");
}
static void pretrain_skips_what_it_cannot_square(void **state) {
  skips_and_goes_on(state, "pretrain", "large", true, "optimizer.clip_grad=0");
}
static void warmup_skips(void **state) {
  skips_and_goes_on(state, "warmup", "rare", false, "");
}
static void adapt_skips(void **state) {
  skips_and_goes_on(state, "adapt", "rare", false, "");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(pretrain_gives_up), cmocka_unit_test(warmup_gives_up),
      cmocka_unit_test(adapt_gives_up),    cmocka_unit_test(all_ranks_give_up),
      cmocka_unit_test(pretrain_skips),    cmocka_unit_test(warmup_skips),
      cmocka_unit_test(adapt_skips),       cmocka_unit_test(pretrain_skips_what_it_cannot_square),
  };
  return cmocka_run_group_tests(tests, setup, wn_temp_teardown);
}
