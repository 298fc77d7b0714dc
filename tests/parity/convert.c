/* Exports of `winnow convert` against tests/fixtures/export (tests/oracle/export.py: transformers on weights that torch
 * rounded): the same logits to 2e-4, and the same picks. */
#include <jansson.h>
#include <math.h>

#include "cli/commands.h"
#include "convert/convert.h"
#include "io/safetensors.h"
#include "support/temp.h"

static const double tolerance = 2e-4; /* of the largest logit, or of 1 */

typedef struct export_case {
  const char *name;
  wn_convert_form form;
  bool sparse;
} export_case;

static const export_case cases[] = {
    {"v32_sparse_large", WN_TO_V32, true},        {"v32_sparse_large", WN_TO_V3, false},
    {"v32_sparse_docs", WN_TO_V32, true},         {"v32_sparse_docs", WN_TO_FP8, true},
    {"v32_sparse_wide", WN_TO_V32, true},         {"v32_sparse_wide", WN_TO_FP8, true},
    {"v32_sparse_wide", WN_TO_V3, false},         {"v3_dense_yarn_docs", WN_TO_V3, false},
    {"v3_dense_yarn_docs", WN_TO_FP8, false},     {"v3_dense_whole_queries", WN_TO_V3, false},
    {"v3_dense_whole_queries", WN_TO_FP8, false},
};

static void list_text(char *out, size_t bytes, const json_t *list) {
  size_t used = 0;
  for (size_t i = 0; i < json_array_size(list); i++) {
    used +=
        (size_t)snprintf(out + used, bytes - used, i ? ",%d" : "%d", (int)json_integer_value(json_array_get(list, i)));
    assert_true(used < bytes);
  }
}

static void forward(const export_case *c, const char *model, const char *dump) {
  char path[256], tokens[1024], documents[256];
  wn_world *world = NULL;
  snprintf(path, sizeof path, "tests/fixtures/oracle/%s/case.json", c->name);
  json_t *root = json_load_file(path, 0, NULL);
  assert_non_null(root);
  list_text(tokens, sizeof tokens, json_object_get(root, "tokens"));
  list_text(documents, sizeof documents, json_object_get(root, "documents"));
  json_decref(root);
  const char *argv[] = {
      "forward",     model,     "--tokens",  tokens, "--dump",   dump, "--attention", c->sparse ? "sparse" : "dense",
      "--documents", documents, "--threads", "2",    "--device", "cpu"};
  OK(wn_world_create(&world, 10));
  OK(wn_cmd_forward((int)(sizeof argv / sizeof *argv), (char **)(uintptr_t)argv, world, NULL));
  wn_world_free(world);
}

static void compare(const char *name, const wn_st_entry *got, const wn_st_entry *want) {
  assert_non_null(got);
  assert_int_equal(got->bytes, want->bytes);
  if (want->dtype == WN_I32) {
    assert_memory_equal(got->data, want->data, want->bytes);
    return;
  }
  const float *a = got->data, *b = want->data;
  int64_t n = (int64_t)want->bytes / 4;
  double size = 1;
  for (int64_t i = 0; i < n; i++) size = fmax(size, fabs((double)b[i]));
  for (int64_t i = 0; i < n; i++)
    if (!(fabs((double)a[i] - (double)b[i]) <= tolerance * size))
      fail_msg("%s: %s[%lld] is %.9g, expected %.9g", name, want->name, (long long)i, (double)a[i], (double)b[i]);
}

static void agrees(void **state) {
  const export_case *c = *state;
  void *dir = NULL;
  char in[256], expected_path[256], name[64];
  wn_safetensors *dump, *expected;
  assert_int_equal(wn_temp_setup(&dir), 0);
  wn_temp_path out = wn_temp(&dir, "export"), dump_path = wn_temp(&dir, "dump.safetensors");
  snprintf(in, sizeof in, "tests/fixtures/oracle/%s/model", c->name);
  snprintf(name, sizeof name, "%s.%s", c->name, wn_convert_form_names[c->form]);
  snprintf(expected_path, sizeof expected_path, "tests/fixtures/export/%s.safetensors", name);
  OK(wn_convert(
      &(wn_convert_job){
          .in = in, .out = out.text, .form = c->form, .model_parallel = 1, .shard_bytes = 20000, .threads = 1},
      NULL));
  forward(c, out.text, dump_path.text);
  OK(wn_safetensors_open(&dump, dump_path.text));
  OK(wn_safetensors_open(&expected, expected_path));
  int64_t picks = 0;
  for (int64_t i = 0; i < wn_safetensors_count(expected); i++) {
    const wn_st_entry *want = wn_safetensors_at(expected, i);
    picks += want->dtype == WN_I32;
    compare(name, wn_safetensors_find(dump, want->name), want);
  }
  assert_int_equal(picks > 0, c->sparse);
  wn_safetensors_close(dump);
  wn_safetensors_close(expected);
  assert_int_equal(wn_temp_teardown(&dir), 0);
}

int main(void) {
  enum { N = sizeof cases / sizeof *cases };
  struct CMUnitTest tests[N];
  char names[N][64];
  for (size_t i = 0; i < N; i++) {
    snprintf(names[i], sizeof names[i], "%s as %s", cases[i].name, wn_convert_form_names[cases[i].form]);
    tests[i] = (struct CMUnitTest){names[i], agrees, NULL, NULL, (void *)(uintptr_t)&cases[i]};
  }
  return cmocka_run_group_tests(tests, NULL, NULL);
}
