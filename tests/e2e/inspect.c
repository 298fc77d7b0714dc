/* `winnow inspect` on everything that it knows, whole and damaged. */
#include <sys/stat.h>

#include "io/json.h"
#include "support/fp8_model.h"

static json_t *inspect(const char *path, const char *more) {
  wn_program p;
  json_error_t error;
  wn_winnow(&p, 1, "inspect %s --json%s", path, more);
  if (p.code != 0) fail_msg("inspect %s ended with %d: %s", path, p.code, p.err);
  json_t *root = json_loads(p.out, JSON_REJECT_DUPLICATES, &error);
  if (!root) fail_msg("inspect %s: %s in %s", path, error.text, p.out);
  return root;
}

static const json_t *at(const json_t *root, const char *section, const char *key) {
  const json_t *value = json_object_get(section ? json_object_get(root, section) : root, key);
  if (!value) fail_msg("no %s in %s", key, section ? section : "the root");
  return value;
}

static void expect_text(const json_t *root, const char *section, const char *key, const char *text) {
  assert_string_equal(json_string_value(at(root, section, key)), text);
}

static void expect_int(const json_t *root, const char *section, const char *key, int64_t value) {
  assert_int_equal(json_integer_value(at(root, section, key)), value);
}

static void a_configuration_alone(void **state) {
  (void)state;
  json_t *root = inspect("configs/models/deepseek-v3.2", "");
  expect_text(root, NULL, "kind", "model configuration");
  expect_text(root, "model", "model_type", "deepseek_v32");
  expect_int(root, "model", "parameters", 685355329792);
  expect_int(root, "model", "main", 671877944064);
  expect_int(root, "model", "mtp_layers", 1);
  assert_null(json_object_get(root, "weights"));
  json_decref(root);
  wn_program p;
  wn_winnow(&p, 1, "inspect configs/models/deepseek-v3.2");
  assert_non_null(strstr(p.out, "685.4B"));
}

static void a_model_directory(void **state) {
  wn_model_config config = tiny_config();
  wn_param_table table = tiny_table(&config);
  int64_t parameters = 0;
  for (int32_t i = 0; i < table.n; i++) parameters += tiny_count(&table.params[i]);
  json_t *root = inspect(wn_temp(state, "base").text, "");
  expect_text(root, NULL, "kind", "model directory");
  expect_int(root, "model", "parameters", parameters);
  expect_int(root, "weights", "parameters", parameters);
  expect_int(root, "weights", "tensors", table.n);
  expect_int(root, "weights", "files", 4);
  expect_int(root, "weights", "bytes", 4 * parameters);
  expect_text(root, "weights", "fits_config", "yes");
  json_decref(root);
  root = inspect(wn_temp(state, "base/model-00002-of-00004.safetensors").text, "");
  expect_text(root, NULL, "kind", "safetensors file");
  assert_true(json_integer_value(at(root, "weights", "parameters")) < parameters);
  json_decref(root);
  wn_param_table_free(&table);
}

/* FP8, with a layer for multi-token prediction: config.json says as many parameters as the files hold, and scales are
 * none of them. */
static void a_model_in_fp8(void **state) {
  wn_model_config config = tiny_config();
  fp8_model(wn_temp(state, "fp8").text, &config, 5, 2, true, true);
  json_t *root = inspect(wn_temp(state, "fp8").text, ""), *one;
  int64_t parameters = json_integer_value(at(root, "model", "parameters"));
  expect_int(root, "model", "mtp_layers", 1);
  expect_int(root, "weights", "parameters", parameters);
  expect_text(root, "weights", "fits_config", "yes");
  assert_true(json_integer_value(at(root, "weights", "scales")) > 0);
  int64_t fp8 = 0;
  size_t i;
  json_array_foreach(at(root, "weights", "dtypes"), i, one) {
    if (strcmp(json_string_value(json_object_get(one, "dtype")), "F8_E4M3") == 0)
      fp8 = json_integer_value(json_object_get(one, "bytes"));
  }
  assert_true(fp8 > parameters / 2 && fp8 < parameters);
  json_decref(root);
}

/* Weights of another shape than config.json's. */
static void what_does_not_fit_is_said(void **state) {
  wn_model_config config = tiny_config();
  wn_temp_path other = wn_temp(state, "other");
  tiny_model(other.text, &config, 1, 1, NULL);
  config.n_routed_experts = 8;
  OK(wn_model_config_save(&config, other.text, NULL, "float32"));
  json_t *root = inspect(other.text, "");
  const char *fits = json_string_value(at(root, "weights", "fits_config"));
  if (strncmp(fits, "no: ", 4) != 0 || !strstr(fits, "mlp.")) fail_msg("fits_config: %s", fits);
  json_decref(root);
}

static void a_dataset(void **state) {
  static const char *const names[] = {"train", "train.bin", "train.idx"};
  wn_dataset *dataset;
  OK(wn_dataset_open(&dataset, wn_temp(state, "train").text));
  for (int i = 0; i < 3; i++) {
    json_t *root = inspect(wn_temp(state, names[i]).text, "");
    expect_text(root, NULL, "kind", "dataset");
    expect_int(root, "dataset", "tokens", wn_dataset_tokens(dataset));
    expect_int(root, "dataset", "documents", wn_dataset_documents(dataset));
    json_decref(root);
  }
  wn_dataset_close(dataset);
}

static void a_run_and_its_checkpoint(void **state) {
  const char *dir = *state;
  char path[WN_PATH_BYTES];
  wn_winnow_ends(0, 1, "warmup %s/job.yaml init=%s/base run_dir=%s/run training.steps=2", dir, dir, dir);
  json_t *root = inspect(wn_temp(state, "run").text, "");
  expect_text(root, NULL, "kind", "run directory");
  expect_text(root, "job", "stage", "warmup");
  assert_int_equal(json_array_size(at(root, NULL, "checkpoints")), 1);
  expect_int(root, "checkpoint", "step", 2);
  expect_text(root, "checkpoint", "verifies", "yes");
  json_decref(root);
  root = inspect(tiny_step(state, "run", 2).text, "");
  expect_text(root, NULL, "kind", "checkpoint");
  expect_text(root, "checkpoint", "stage", "warmup");
  expect_int(root, "checkpoint", "step", 2);
  expect_int(root, "checkpoint", "tokens", 2 * 4 * TINY_SEQ_LEN);
  expect_text(root, "weights", "fits_config", "yes");
  json_decref(root);
  OK(wn_path(path, "%s/state.json", tiny_step(state, "run", 2).text));
  wn_temp_flip(path, 1, 1);
  wn_winnow_refuses(WN_E_INPUT, "state.json", "inspect %s", tiny_step(state, "run", 2).text);
  wn_temp_flip(path, 1, 1);
  OK(wn_path(path, "%s/config.json", tiny_step(state, "run", 2).text));
  tiny_file config = tiny_read(path);
  memcpy(strstr(config.text, "\"initializer_range\""), "\"initialiser_range\"", 19); /* as long, and never missed */
  wn_temp_write(path, config.text, config.bytes);
  free(config.text);
  root = inspect(tiny_step(state, "run", 2).text, "");
  const char *verifies = json_string_value(at(root, "checkpoint", "verifies"));
  if (strncmp(verifies, "no: ", 4) != 0 || !strstr(verifies, "config.json")) fail_msg("verifies: %s", verifies);
  json_decref(root);
  root = inspect(tiny_step(state, "run", 2).text, " --quick");
  expect_text(root, "checkpoint", "verifies", "by names and lengths");
  json_decref(root);
}

static void a_name_that_is_not_utf8(void **state) {
  wn_temp_path odd = wn_temp(state, "odd\xff"), config = wn_temp(state, "odd\xff/config.json");
  OK(wn_make_dirs(odd.text));
  OK(wn_copy_file("configs/models/tiny/config.json", config.text));
  json_t *root = inspect(odd.text, "");
  assert_non_null(strstr(json_string_value(at(root, NULL, "path")), "/odd?"));
  json_decref(root);
}

static void what_is_none_of_these(void **state) {
  wn_temp_path empty = wn_temp(state, "empty");
  OK(wn_make_dirs(empty.text));
  wn_winnow_refuses(WN_E_INPUT, "holds no model and no run", "inspect %s", empty.text);
  wn_winnow_refuses(WN_E_INPUT, "is absent", "inspect %s/nothing", empty.text);
  wn_winnow_refuses(WN_E_INPUT, "is this a safetensors file", "inspect README.md");
  wn_winnow_refuses(WN_E_USAGE, "inspect wants one path", "inspect");
  wn_temp_path pipe = wn_temp(state, "pipe");
  assert_int_equal(mkfifo(pipe.text, 0600), 0);
  wn_winnow_refuses(WN_E_INPUT, "is not a regular file", "inspect %s", pipe.text);
  wn_temp_path config = wn_temp(state, "empty/config.json");
  tiny_write(config.text, "{\"model_type\": \"llama\"}");
  wn_winnow_refuses(WN_E_CONFIG, "model_type is llama", "inspect %s", empty.text);
  tiny_write(config.text, "{\"model_type\": ");
  wn_winnow_refuses(WN_E_CONFIG, "bad JSON", "inspect %s", empty.text);
  assert_int_equal(truncate(config.text, (16 << 20) + 1), 0);
  wn_winnow_refuses(WN_E_INPUT, "config.json is longer than the 16777216 bytes", "inspect %s", empty.text);
  assert_int_equal(unlink(config.text), 0);
  assert_int_equal(mkfifo(config.text, 0600), 0);
  wn_winnow_refuses(WN_E_INPUT, "config.json is not a regular file", "inspect %s", empty.text);
  wn_winnow_refuses(WN_E_INPUT, "holds the checkpoints of a run, 1, the newest step-000002",
                    "inspect %s/run/checkpoints", (const char *)*state);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_configuration_alone),
      cmocka_unit_test(a_model_directory),
      cmocka_unit_test(a_model_in_fp8),
      cmocka_unit_test(what_does_not_fit_is_said),
      cmocka_unit_test(a_dataset),
      cmocka_unit_test(a_run_and_its_checkpoint),
      cmocka_unit_test(a_name_that_is_not_utf8),
      cmocka_unit_test(what_is_none_of_these),
  };
  return cmocka_run_group_tests(tests, tiny_setup, wn_temp_teardown);
}
