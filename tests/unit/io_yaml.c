#include "support/test.h"

#include <stdlib.h>
#include <string.h>

#include "io/files.h"
#include "io/yaml.h"

static char root[WN_PATH_BYTES], path[WN_PATH_BYTES];

static int set_up(void **state) {
  (void)state;
  snprintf(root, sizeof root, "/tmp/winnow-io-yaml-XXXXXX");
  if (!mkdtemp(root)) return -1;
  OK(wn_path(path, "%s/job.yaml", root));
  return 0;
}

static int tear_down(void **state) {
  (void)state;
  OK(wn_remove_tree(root));
  return 0;
}

static wn_status load(wn_yaml *yaml, const char *text) {
  OK(wn_write_file_atomic(path, text, strlen(text)));
  return wn_yaml_load(yaml, path);
}

static void expect(const wn_yaml *yaml, int i, const char *key, const char *value, int line) {
  assert_string_equal(yaml->entries[i].key, key);
  assert_string_equal(yaml->entries[i].value, value);
  assert_int_equal(yaml->entries[i].line, line);
}

static void a_job_file(void **state) {
  (void)state;
  wn_yaml yaml;
  OK(load(&yaml, "# a comment\ninit: a/b c   # where from\ndata: {train: x,\n       seq_len: 512}\n\n"
                 "optimizer:\n  lr: 1.0e-3\n  \"eps\": '1e-8'\nempty: \"\"\numl: \"\xc3\xa9\"\n"));
  assert_int_equal(yaml.n, 7);
  expect(&yaml, 0, "init", "a/b c", 2);
  expect(&yaml, 1, "data.train", "x", 3);
  expect(&yaml, 2, "data.seq_len", "512", 4);
  expect(&yaml, 3, "optimizer.lr", "1.0e-3", 7);
  expect(&yaml, 4, "optimizer.eps", "1e-8", 8);
  expect(&yaml, 5, "empty", "", 9);
  expect(&yaml, 6, "uml", "\xc3\xa9", 10);
  wn_yaml_free(&yaml);
  assert_int_equal(yaml.n, 0);
}

static void files_without_content(void **state) {
  (void)state;
  wn_yaml yaml;
  static const char *const texts[] = {"", "\n\n", "# only a comment\n", "{}", "---\n{}\n...\n"};
  for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
    OK(load(&yaml, texts[i]));
    assert_int_equal(yaml.n, 0);
    wn_yaml_free(&yaml);
  }
  REFUSED(wn_yaml_load(&yaml, "/absent/job.yaml"), WN_E_CONFIG, "/absent/job.yaml is absent");
}

static void refusals(void **state) {
  (void)state;
  static const struct {
    const char *text, *part;
  } cases[] = {
      {"a: 1\nb: [1, 2]\n", "job.yaml:2: a list stands where a value should"},
      {"a:\n- 1\n", "job.yaml:2: a list stands where a value should"},
      {"- a\n", "job.yaml:1: not a mapping"},
      {"word\n", "job.yaml:1: not a mapping"},
      {"a: 1\na: 2\n", "job.yaml:2: a stands already in line 1"},
      {"d: {x: 1}\nd: {y: 2}\n", "job.yaml:2: d stands already in line 1"},
      {"d: {x: 1}\nd: 2\n", "job.yaml:2: d stands already in line 1"},
      {"d: {x: 1, x: 1}\n", "d.x stands already in line 1"},
      {"d.x: 1\nd: {x: 1}\n", "job.yaml:2: d.x stands already in line 1"},
      {"a: {b: {c: 1}}\n", "job.yaml:1: a.b is a mapping; only two levels"},
      {"a: &name 1\n", "job.yaml:1: anchors (&name)"},
      {"a: &name {b: 1}\n", "anchors (&name)"},
      {"&name a: 1\n", "anchors (&name)"},
      {"&name\na: 1\n", "anchors (&name)"},
      {"a: &n 1\nb: *n\n", "anchors (&n)"},
      {"b: *n\n", "job.yaml:1: aliases (*name)"},
      {"a: !!int 1\n", "tags (tag:yaml.org,2002:int)"},
      {"a: !mine {b: 1}\n", "tags (!mine)"},
      {"a: 1\n---\nb: 2\n", "job.yaml:2: a second document begins here"},
      {"[a]: 1\n", "a list stands where a key should"},
      {"{a: 1}: 1\n", "a mapping stands where a key should"},
      {"a:\n", "job.yaml:1: a has no value"},
      {"a: ~\n", "a has no value"},
      {"a: null\n", "a has no value"},
      {"\n\nd: {}\n", "job.yaml:3: section d is empty"},
      {"\"\": 1\n", "a key is empty"},
      {"a: \"x\\0y\"\n", "a value holds a NUL character"},
      {"a: 1\n b: 2\n", "job.yaml:2: "},
      {"a: {b: 1\n", "job.yaml:2: "},
      {"a: \"open\n", "job.yaml:"},
      {"a:\tb\n\tc: d\n", "job.yaml:"},
      {"a: \xff\n", "job.yaml: "},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    wn_yaml yaml;
    wn_status status = load(&yaml, cases[i].text);
    if (!status) print_error("accepted: %s\n", cases[i].text);
    REFUSED(status, WN_E_CONFIG, cases[i].part);
    assert_int_equal(yaml.n, 0);
    assert_null(yaml.entries);
  }
}

static void deep_nesting(void **state) {
  (void)state;
  static char text[100000];
  wn_yaml yaml;
  memset(text, '[', sizeof text - 1);
  REFUSED(load(&yaml, text), WN_E_CONFIG, "job.yaml:1");
  memset(text, '{', sizeof text - 1);
  REFUSED(load(&yaml, text), WN_E_CONFIG, "job.yaml:1");
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
  const struct CMUnitTest tests[] = {TEST(a_job_file), TEST(files_without_content), TEST(refusals), TEST(deep_nesting)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
