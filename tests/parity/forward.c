/* `winnow forward` against every case of tests/fixtures/oracle: the dump holds exactly the tensors that the case and
 * the model's parameters ask for, by name, with the expected values. */
#include <jansson.h>
#include <math.h>

#include "cli/commands.h"
#include "io/safetensors.h"
#include "support/temp.h"

/* Relative to a tensor's largest finite value (tests/oracle/README.md); where the KL is close to 0 its gradients, and
 * in them softmax(I) - p, are small differences. */
static const double tolerance = 6e-5, near_tolerance = 6e-4;

static const char *const cases[] = {
    "v3_dense_small",  "v3_dense_whole_queries", "v3_dense_glm4_lite",   "v32_sparse_wide", "v3_dense_yarn_docs",
    "v32_dense",       "v32_dense_docs",         "v32_dense_near",       "v32_sparse_docs", "v32_sparse_large",
    "v32_sparse_long", "v32_sparse_near",        "v32_sparse_small_eps", "v32_sparse_short"};

static void list_text(char *out, size_t bytes, const json_t *list) {
  size_t used = 0;
  out[0] = 0;
  for (size_t i = 0; i < json_array_size(list); i++) {
    used +=
        (size_t)snprintf(out + used, bytes - used, i ? ",%d" : "%d", (int)json_integer_value(json_array_get(list, i)));
    assert_true(used < bytes);
  }
}

/* The command, in this process. `grads` may be NULL. */
static wn_status forward(const char *name, const char *dump, const char *grads) {
  char model[256], path[256], tokens[1024], documents[256];
  wn_world *world = NULL;
  snprintf(model, sizeof model, "tests/fixtures/oracle/%s/model", name);
  snprintf(path, sizeof path, "tests/fixtures/oracle/%s/case.json", name);
  json_t *root = json_load_file(path, 0, NULL);
  assert_non_null(root);
  list_text(tokens, sizeof tokens, json_object_get(root, "tokens"));
  list_text(documents, sizeof documents, json_object_get(root, "documents"));
  const char *attention = json_string_value(json_object_get(root, "attention"));
  const char *argv[] = {"forward",     model,     "--tokens",  tokens, "--dump",   dump,  "--attention", attention,
                        "--documents", documents, "--threads", "2",    "--device", "cpu", "--grads",     grads};
  int argc = (int)(sizeof argv / sizeof *argv) - (grads ? 0 : 2);
  OK(wn_world_create(&world, 10));
  wn_status status = wn_cmd_forward(argc, (char **)(uintptr_t)argv, world, NULL);
  wn_world_free(world);
  json_decref(root);
  return status;
}

static void compare(const wn_st_entry *got, const wn_st_entry *want, double limit) {
  double size = 0;
  int64_t n = (int64_t)want->bytes / 4;
  assert_int_equal(got->dtype, want->dtype);
  assert_int_equal(got->rank, want->rank);
  for (int32_t d = 0; d < want->rank; d++) assert_int_equal(got->dim[d], want->dim[d]);
  if (want->dtype == WN_I32) {
    assert_memory_equal(got->data, want->data, want->bytes);
    return;
  }
  assert_int_equal(want->dtype, WN_F32);
  const float *a = got->data, *b = want->data;
  for (int64_t i = 0; i < n; i++)
    if (isfinite(b[i])) size = fmax(size, fabs((double)b[i]));
  for (int64_t i = 0; i < n; i++)
    if (a[i] != b[i] && !(fabs((double)a[i] - (double)b[i]) <= limit * size))
      fail_msg("%s[%lld] is %.9g, expected %.9g", got->name, (long long)i, (double)a[i], (double)b[i]);
}

static bool begins(const char *text, const char *with) {
  return strncmp(text, with, strlen(with)) == 0;
}

/* Every tensor of the dump is expected, and the other way round; but for the router's bias, whose gradient is zero. */
static void check_dump(const char *name, const char *path, const char *grads) {
  char file[256], expected_name[256], prefix[32];
  wn_safetensors *dump, *expected;
  int64_t found = 0, wanted = 0;
  bool near = strstr(name, "near") != NULL;
  snprintf(file, sizeof file, "tests/fixtures/oracle/%s/expected.safetensors", name);
  snprintf(prefix, sizeof prefix, "grad.%s.", grads ? grads : "none");
  OK(wn_safetensors_open(&dump, path));
  OK(wn_safetensors_open(&expected, file));
  for (int64_t i = 0; i < wn_safetensors_count(dump); i++) {
    const wn_st_entry *got = wn_safetensors_at(dump, i);
    bool gradient = begins(got->name, "grad.");
    snprintf(expected_name, sizeof expected_name, "%s%s", gradient ? prefix : "", got->name + (gradient ? 5 : 0));
    const wn_st_entry *want = wn_safetensors_find(expected, expected_name);
    if (!want && gradient && strstr(got->name, "e_score_correction_bias")) {
      for (int64_t e = 0; e < got->dim[0]; e++) assert_true(((const float *)got->data)[e] == 0);
      continue;
    }
    if (!want) fail_msg("%s: the dump holds %s, which nobody asked for", name, got->name);
    compare(got, want, near && (gradient || begins(got->name, "kl.")) ? near_tolerance : tolerance);
    found++;
  }
  for (int64_t i = 0; i < wn_safetensors_count(expected); i++) {
    const char *at = wn_safetensors_at(expected, i)->name;
    wanted += !begins(at, "grad.") || begins(at, prefix);
  }
  if (found != wanted) fail_msg("%s: the dump holds %lld of %lld tensors", name, (long long)found, (long long)wanted);
  wn_safetensors_close(dump);
  wn_safetensors_close(expected);
}

static void agrees(void **state) {
  const char *name = *state;
  void *dir = NULL;
  assert_int_equal(wn_temp_setup(&dir), 0);
  wn_temp_path dump = wn_temp(&dir, "dump.safetensors");
  OK(forward(name, dump.text, NULL));
  check_dump(name, dump.text, NULL);
  OK(forward(name, dump.text, "base"));
  check_dump(name, dump.text, "base");
  if (begins(name, "v3_")) {
    REFUSED(forward(name, dump.text, "indexer"), WN_E_CONFIG, "has no indexer");
  } else {
    OK(forward(name, dump.text, "indexer"));
    check_dump(name, dump.text, "indexer");
  }
  assert_int_equal(wn_temp_teardown(&dir), 0);
}

int main(void) {
  enum { N = sizeof cases / sizeof *cases };
  struct CMUnitTest tests[N];
  for (size_t i = 0; i < N; i++)
    tests[i] = (struct CMUnitTest){cases[i], agrees, NULL, NULL, (void *)(uintptr_t)cases[i]};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
