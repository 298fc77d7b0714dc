/* From released directories into training: FP8 bases, whole tensor lists, one rank and several. */
#include "support/fp8_model.h"

#include <unistd.h>

enum { V31_TENSORS = 91991, V31_SHARDS = 163 };

/* Every tensor that both checkpoints have as floats, bit for bit. Returns how many. */
static int64_t expect_same_floats(const char *a, const char *b) {
  wn_hf_dir *x, *y;
  int64_t n = 0;
  OK(wn_hf_dir_open(&x, a));
  OK(wn_hf_dir_open(&y, b));
  for (int64_t i = 0; i < wn_hf_dir_count(x); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(x, i, NULL), *other = wn_hf_dir_find(y, entry->name, NULL);
    if (!other || entry->dtype != other->dtype || entry->dtype == WN_F8_E4M3) continue;
    if (tiny_bits_differ(entry, other)) fail_msg("%s differs between %s and %s", entry->name, a, b);
    n++;
  }
  wn_hf_dir_close(x);
  wn_hf_dir_close(y);
  return n;
}

/* An FP8 base and the BF16 that it stands for are one model: nothing that training writes differs by a bit. In stage 1
 * the base stays FP8 on disk, whatever the number of ranks; stage 2 trains it and writes floats. */
static void fp8_trains_as_what_it_stands_for(void **state) {
  const char *dir = *state;
  for (int32_t ranks = 1; ranks <= 2; ranks++) {
    for (int32_t fp8 = 0; fp8 < 2; fp8++) {
      const char *name = fp8 ? "fp8" : "bf16";
      wn_winnow_ends(0, ranks, "warmup %s/job.yaml init=%s/%s run_dir=%s/warm-%s-%d training.steps=3", dir, dir, name,
                     dir, name, ranks);
      wn_winnow_ends(
          0, ranks,
          "adapt %s/job.yaml init=%s/warm-%s-%d/checkpoints/step-000003 run_dir=%s/adapt-%s-%d training.steps=2 "
          "checkpoint.dtype=bf16",
          dir, dir, name, ranks, dir, name, ranks);
    }
    for (int32_t stage = 0; stage < 2; stage++) {
      char run[64], twin[64];
      snprintf(run, sizeof run, "%s-fp8-%d", stage ? "adapt" : "warm", ranks);
      snprintf(twin, sizeof twin, "%s-bf16-%d", stage ? "adapt" : "warm", ranks);
      tiny_expect_same_tables(state, run, twin);
      int64_t same =
          expect_same_floats(tiny_step(state, run, stage ? 2 : 3).text, tiny_step(state, twin, stage ? 2 : 3).text);
      assert_true(same >= (stage ? 110 : 15 + 10)); /* in stage 2 with those of the prediction layer */
      wn_winnow_ends(0, 1, "verify %s", tiny_step(state, run, stage ? 2 : 3).text);
    }
  }
  wn_hf_dir *warm, *adapted;
  OK(wn_hf_dir_open(&warm, tiny_step(state, "warm-fp8-2", 3).text));
  OK(wn_hf_dir_open(&adapted, tiny_step(state, "adapt-fp8-2", 2).text));
  static const char matrix[] = "model.layers.1.mlp.experts.3.down_proj.weight",
                    mtp[] = "model.layers.3.mlp.experts.3.down_proj.weight";
  assert_int_equal(wn_hf_dir_find(warm, matrix, NULL)->dtype, WN_F8_E4M3);
  assert_non_null(wn_hf_scale_entry(warm, matrix));
  assert_int_equal(wn_hf_dir_find(adapted, matrix, NULL)->dtype, WN_BF16);
  assert_null(wn_hf_scale_entry(adapted, matrix));
  assert_int_equal(wn_hf_dir_find(warm, mtp, NULL)->dtype, WN_F8_E4M3);
  assert_int_equal(wn_hf_dir_find(adapted, mtp, NULL)->dtype,
                   WN_BF16); /* with the rest: config.json says nothing of FP8 */
  for (int64_t i = 0; i < wn_hf_dir_count(adapted); i++)
    if (wn_hf_dir_at(adapted, i, NULL)->dtype == WN_F8_E4M3 ||
        strstr(wn_hf_dir_at(adapted, i, NULL)->name, WN_HF_SCALE_SUFFIX))
      fail_msg("%s is there", wn_hf_dir_at(adapted, i, NULL)->name);
  wn_hf_dir_close(warm);
  wn_hf_dir_close(adapted);
}

/* A released V3.2: its indexers are FP8 too, but for their norms and weights_proj, and go on in either stage. */
static void fp8_indexers_go_on(void **state) {
  static const char *const stages[] = {"warmup", "adapt"};
  const char *dir = *state;
  wn_model_config config = tiny_sparse_config();
  fp8_model(wn_temp(state, "v32-fp8").text, &config, 5, 3, true, false);
  fp8_model(wn_temp(state, "v32-bf16").text, &config, 5, 2, false, false);
  for (int32_t s = 0; s < 2; s++) {
    char run[2][64];
    for (int32_t fp8 = 0; fp8 < 2; fp8++) {
      const char *name = fp8 ? "v32-fp8" : "v32-bf16";
      snprintf(run[fp8], sizeof run[fp8], "%s-%s", stages[s], name);
      wn_winnow_ends(0, 2, "%s %s/job.yaml init=%s/%s run_dir=%s/%s training.steps=2", stages[s], dir, dir, name, dir,
                     run[fp8]);
    }
    tiny_expect_same_tables(state, run[0], run[1]);
    assert_true(expect_same_floats(tiny_step(state, run[0], 2).text, tiny_step(state, run[1], 2).text) > 20);
  }
}

/* A run on an FP8 base is resumed from its own checkpoint, init gone, as if it had never stopped. */
static void fp8_runs_resume(void **state) {
  const char *dir = *state;
  wn_winnow_ends(0, 1, "warmup %s/job.yaml init=%s/fp8 run_dir=%s/whole training.steps=4", dir, dir, dir);
  wn_winnow_ends(0, 1, "warmup %s/job.yaml init=%s/fp8 run_dir=%s/halves training.steps=4 checkpoint.interval=2", dir,
                 dir, dir);
  OK(wn_remove_tree(tiny_step(state, "halves", 4).text));
  OK(wn_remove_tree(wn_temp(state, "fp8").text));
  wn_winnow_ends(0, 1, "warmup %s/job.yaml init=%s/fp8 run_dir=%s/halves training.steps=4 checkpoint.interval=2", dir,
                 dir, dir);
  expect_same_floats(tiny_step(state, "whole", 4).text, tiny_step(state, "halves", 4).text);
  tiny_expect_same_tables(state, "whole", "halves");
}

/* NaN in the last element of a model in one file, which only the last rank reads, ends all of them with its sentence.
 */
static void refuse_nan(void **state, bool fp8, int32_t ranks, const char *sentence) {
  static const char last[] = "model.layers.2.mlp.experts.3.down_proj.weight";
  const char *dir = *state;
  wn_model_config config = tiny_config();
  wn_program program;
  char path[WN_PATH_BYTES];
  wn_hf_dir *model;
  OK(wn_remove_tree(wn_temp(state, "nan").text));
  fp8_model(wn_temp(state, "nan").text, &config, 4, 1, fp8, false);
  OK(wn_path(path, "%s/nan/model-00001-of-000001.safetensors", dir));
  OK(wn_hf_dir_open(&model, wn_temp(state, "nan").text));
  const wn_st_entry *entry = wn_hf_dir_find(model, last, NULL),
                    *end = wn_hf_dir_at(model, wn_hf_dir_count(model) - 1, NULL);
  const char *file_end = (const char *)end->data + end->bytes;
  long at = (long)(file_end - ((const char *)entry->data + entry->bytes)) + 1; /* its last byte, from the file's end */
  wn_hf_dir_close(model);
  FILE *file = fopen(path, "r+b");
  assert_non_null(file);
  assert_int_equal(fseek(file, fp8 ? -at : -at - 1, SEEK_END), 0);
  if (!fp8) fputc(0xc0, file);
  fputc(0x7f, file);
  assert_int_equal(fclose(file), 0);
  wn_winnow(&program, ranks, "warmup %s/job.yaml init=%s/nan run_dir=%s/never", dir, dir, dir);
  assert_int_equal(program.code, WN_E_INPUT);
  if (!strstr(program.err, sentence)) fail_msg("%s", program.err);
}

static void what_one_rank_finds_ends_all(void **state) {
  for (int32_t ranks = 1; ranks <= 2; ranks++) {
    refuse_nan(state, true, ranks, "experts.3.down_proj.weight holds NaN");
    refuse_nan(state, false, ranks, "experts.3.down_proj.weight: element [31, 11] is nan; weights are finite numbers");
  }
}

/* A dataset that the last rank's host has not: an evaluation, too, ends with its sentence and code on all. */
static void what_one_rank_lacks_ends_an_evaluation(void **state) {
  static const char sentence[] = "rank 2 failed: cannot open ",
                    eval[] = "eval %s/base --device cpu --seq-len 32 --data";
  const char *dir = *state, *winnow = getenv("WINNOW") ? getenv("WINNOW") : "build/winnow";
  char words[WN_PATH_BYTES];
  wn_program program;
  OK(wn_path(words, eval, dir));
  wn_winnow(&program, 2, "%s %s/valid : -np 1 %s %s %s/absent", words, dir, winnow, words, dir);
  if (program.code != WN_E_IO || !strstr(program.err, sentence)) fail_msg("code %d: %s", program.code, program.err);
}

static int64_t mtp_layers_of(const char *dir) {
  wn_model_config config;
  OK(wn_model_config_load(&config, dir));
  return config.num_nextn_predict_layers;
}

/* Checkpoints and conversions count the prediction layers that there are. */
static void layers_that_are_absent(void **state) {
  static const char *const words[] = {"of the 1 layers for multi-token prediction that config.json names 1 are absent"};
  const char *dir = *state;
  wn_model_config config = tiny_config();
  wn_program program;
  for (int32_t there = 0; there < 2; there++) {
    char run[64];
    snprintf(run, sizeof run, "counted-%d", there);
    OK(wn_remove_tree(wn_temp(state, "counted").text));
    fp8_model(wn_temp(state, "counted").text, &config, 4, 1, false, there == 1);
    model_set_mtp_layers(wn_temp(state, "counted").text, 1);
    wn_winnow(&program, 1, "warmup %s/job.yaml init=%s/counted run_dir=%s/%s training.steps=2 checkpoint.interval=1",
              dir, dir, dir, run);
    assert_int_equal(program.code, 0);
    assert_int_equal(strstr(program.err, words[0]) == NULL, there);
    for (int64_t step = 1; step <= 2; step++) assert_int_equal(mtp_layers_of(tiny_step(state, run, step).text), there);
    wn_winnow_ends(0, 1, "convert %s/counted %s/counted-v3-%d --to v3", dir, dir, there);
    snprintf(run, sizeof run, "counted-v3-%d", there);
    assert_int_equal(mtp_layers_of(wn_temp(state, run).text), there);
  }
  model_set_mtp_layers(wn_temp(state, "counted").text, 2);
  wn_winnow_ends(0, 1, "warmup %s/job.yaml init=%s/counted run_dir=%s/two training.steps=1", dir, dir, dir);
  assert_int_equal(mtp_layers_of(tiny_step(state, "two", 1).text), 1);
}

/* A config.json of fewer layers than there are: what lies behind them and its prediction layer is told of. */
static void layers_that_nobody_names(void **state) {
  static const char *const words[] = {"of layers that config.json does not name (num_hidden_layers 2",
                                      "(multi-token prediction) are not trained"};
  const char *dir = *state;
  wn_model_config config = tiny_config();
  wn_program program;
  fp8_model(wn_temp(state, "deep").text, &config, 4, 1, true, true);
  for (int32_t fewer = 0; fewer < 2; fewer++) {
    config.num_hidden_layers -= fewer;
    fp8_write_config(wn_temp(state, "deep").text, &config, true, true);
    wn_winnow(&program, 2, "warmup %s/job.yaml init=%s/deep run_dir=%s/deep-%d training.steps=1", dir, dir, dir, fewer);
    assert_int_equal(program.code, 0);
    assert_int_equal(strstr(program.err, words[0]) != NULL, fewer);
    assert_non_null(strstr(program.err, words[1]));
  }
}

/* The release's whole list, in as many shards: a step of each stage on one rank and on two, and out again as V3.2. */
static void the_whole_list_of_tensors(void **state) {
  const char *dir = *state;
  wn_model_config config = fp8_v31_config();
  assert_int_equal(fp8_model(wn_temp(state, "v31").text, &config, 6, V31_SHARDS, true, true), V31_TENSORS);
  for (int32_t ranks = 1; ranks <= 2; ranks++) {
    wn_winnow_ends(0, ranks, "warmup %s/job.yaml init=%s/v31 run_dir=%s/v31-warm-%d training.steps=1", dir, dir, dir,
                   ranks);
    wn_winnow_ends(
        0, ranks,
        "adapt %s/job.yaml init=%s/v31-warm-%d/checkpoints/step-000001 run_dir=%s/v31-adapt-%d training.steps=1", dir,
        dir, ranks, dir, ranks);
  }
  wn_winnow_ends(0, 1, "convert %s %s/v32 --to fp8", tiny_step(state, "v31-warm-2", 1).text, dir);
  wn_hf_dir *warm, *exported;
  OK(wn_hf_dir_open(&warm, tiny_step(state, "v31-warm-2", 1).text));
  OK(wn_hf_dir_open(&exported, wn_temp(state, "v32").text));
  assert_int_equal(wn_hf_dir_count(warm), V31_TENSORS + 61 * 5);
  assert_int_equal(wn_hf_dir_count(exported), V31_TENSORS + 61 * 7); /* wq_b and wk have scales */
  wn_hf_dir_close(warm);
  wn_hf_dir_close(exported);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(fp8_trains_as_what_it_stands_for),
      cmocka_unit_test(fp8_indexers_go_on),
      cmocka_unit_test(fp8_runs_resume),
      cmocka_unit_test(what_one_rank_finds_ends_all),
      cmocka_unit_test(what_one_rank_lacks_ends_an_evaluation),
      cmocka_unit_test(layers_that_are_absent),
      cmocka_unit_test(layers_that_nobody_names),
      cmocka_unit_test(the_whole_list_of_tensors),
  };
  return cmocka_run_group_tests(tests, fp8_pair_setup, wn_temp_teardown);
}
