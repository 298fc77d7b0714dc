/* One rank and several compute the same. */
#include "support/ranks.h"

static wn_temp_path path_of(void **state, const char *name) {
  return wn_temp(state, name);
}

/* ---- memory ---- */

/* Weights, moments and gradients of some 120 MB; layers of a hundredth of that, so that what a layer's gathered weights
 * and gradients take is small beside it. */
static wn_model_config heavy_config(void) {
  wn_model_config config = tiny_config();
  config.hidden_size = 128;
  config.intermediate_size = 256;
  config.num_hidden_layers = config.first_k_dense_replace = 60;
  return config;
}

static double peak_gib(void **state, const char *model, int32_t ranks) {
  const shared *at = *state;
  char run[64];
  snprintf(run, sizeof run, "%s-%d", model, ranks);
  wn_winnow_ends(0, ranks,
                 "pretrain %s/job.yaml model=%s/%s run_dir=%s/%s training.steps=1 training.micro_batch_seqs=1 "
                 "metrics.eval_every=0",
                 at->dir, at->dir, model, at->dir, run);
  return tiny_cell(state, run, "speed", 0, "mem_peak_gib", NULL);
}

/* Resident memory of a run whose state is most of it falls to 1/N on N ranks. What the process takes in any case is
 * measured with the same layers in a narrower model. */
static void memory_falls_with_the_ranks(void **state) {
  wn_model_config heavy = heavy_config(), light = heavy;
  light.hidden_size = light.intermediate_size = 16;
  light.vocab_size = heavy.vocab_size = TINY_VOCAB;
  OK(wn_make_dirs(path_of(state, "heavy").text));
  OK(wn_make_dirs(path_of(state, "light").text));
  OK(wn_model_config_save(&heavy, path_of(state, "heavy").text, NULL, "float32"));
  OK(wn_model_config_save(&light, path_of(state, "light").text, NULL, "float32"));
  wn_param_table table = tiny_table(&heavy);
  double elements = 0, share[5] = {0};
  for (int32_t i = 0; i < table.n; i++) elements += (double)tiny_count(&table.params[i]);
  wn_param_table_free(&table);
  double state_gib = elements * 16 / (1 << 30);
  for (int32_t ranks = 1; ranks <= 4; ranks *= 2)
    share[ranks] = (peak_gib(state, "heavy", ranks) - peak_gib(state, "light", ranks)) / state_gib;
  print_message("state of %.0f MiB; resident on 1, 2 and 4 ranks: %.3f, %.3f, %.3f of it\n", state_gib * 1024, share[1],
                share[2], share[4]);
  assert_true(share[1] > 0.9 && share[1] < 1.15);
  assert_true(share[2] > 0.4 && share[2] < 0.6);
  assert_true(share[4] > 0.2 && share[4] < 0.35);
}

int main(int argc, char **argv) {
  if (argc > 3) return rank_main(argc, argv);
  shared at = {
      .self = argv[0], .options = "", .most_ranks = 4, .gradient_bar = 1e-5, .first_loss_bar = 1e-6, .loss_bar = 1e-4};
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_prestate(pretrain_is_the_same, &at),
      cmocka_unit_test_prestate(warmup_is_the_same, &at),
      cmocka_unit_test_prestate(adapt_is_the_same, &at),
      cmocka_unit_test_prestate(memory_falls_with_the_ranks, &at),
  };
  void *state = &at;
  if (ranks_setup(&state)) return 1;
  int failed = cmocka_run_group_tests(tests, NULL, NULL);
  return ranks_teardown(&state) ? 1 : failed;
}
