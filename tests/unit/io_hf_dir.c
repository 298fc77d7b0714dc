#include "support/test.h"

#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "io/files.h"
#include "io/hf_dir.h"

static char root[WN_PATH_BYTES], outer[WN_PATH_BYTES];

static int set_up(void **state) {
  (void)state;
  snprintf(outer, sizeof outer, "/tmp/winnow-io-hf-XXXXXX");
  if (!mkdtemp(outer)) return -1;
  OK(wn_path(root, "%s/model", outer));
  OK(wn_make_dirs(root));
  return 0;
}

static int tear_down(void **state) {
  (void)state;
  OK(wn_remove_tree(outer));
  return 0;
}

static void write_text(const char *name, const char *text) {
  char path[WN_PATH_BYTES];
  OK(wn_path(path, "%s/%s", root, name));
  OK(wn_write_file_atomic(path, text, strlen(text)));
}

/* A shard with F32 scalars of these names, each holding its place. */
static void write_shard(const char *file, const char *const *names, int n) {
  static const float values[] = {10, 11, 12, 13};
  wn_st_spec specs[4];
  const void *data[4];
  char path[WN_PATH_BYTES];
  for (int i = 0; i < n; i++) {
    specs[i] = (wn_st_spec){.name = names[i], .dtype = WN_F32};
    data[i] = &values[i];
  }
  OK(wn_path(path, "%s/%s", root, file));
  OK(wn_safetensors_write(path, specs, data, n));
}

static void refuse(const char *part) {
  wn_hf_dir *dir = NULL;
  REFUSED(wn_hf_dir_open(&dir, root), WN_E_INPUT, part);
  assert_null(dir);
}

static void index_of(const char *weight_map) {
  char text[2 * WN_PATH_BYTES];
  snprintf(text, sizeof text, "{\"metadata\": {\"total_size\": 8}, \"weight_map\": %s}", weight_map);
  write_text("model.safetensors.index.json", text);
}

static const char *const ab[] = {"a", "b"}, *const cd[] = {"d", "c"}, *const b_only[] = {"b"};

/* Other names in memory: found by them, and the shard no longer counts as what the directory says. */
static void renamed(void **state) {
  (void)state;
  wn_hf_dir *dir;
  int64_t n = -1;
  write_shard("a.safetensors", ab, 2);
  write_shard("b.safetensors", cd, 2);
  index_of("{\"a\": \"a.safetensors\", \"b\": \"a.safetensors\", \"c\": \"b.safetensors\", \"d\": \"b.safetensors\"}");
  OK(wn_hf_dir_open(&dir, root));
  assert_false(wn_hf_dir_renamed(dir, 0) || wn_hf_dir_renamed(dir, 1));
  OK(wn_hf_dir_rename(dir, "c", "x.y", &n));
  assert_int_equal(n, 1);
  int32_t shard = -1;
  const wn_st_entry *entry = wn_hf_dir_find(dir, "x.y", &shard);
  assert_non_null(entry);
  assert_string_equal(entry->name, "x.y");
  assert_int_equal(shard, 1);
  assert_true(*(const float *)entry->data == 11);
  assert_null(wn_hf_dir_find(dir, "c", NULL));
  assert_non_null(wn_hf_dir_find(dir, "d", NULL));
  assert_true(!wn_hf_dir_renamed(dir, 0) && wn_hf_dir_renamed(dir, 1));
  wn_hf_dir_close(dir);
  OK(wn_hf_dir_open(&dir, root));
  REFUSED(wn_hf_dir_rename(dir, "c", "a", &n), WN_E_INPUT, "1 tensor stands in two shards: a (");
  wn_hf_dir_close(dir);
}

static void a_single_file(void **state) {
  (void)state;
  write_shard("model.safetensors", ab, 2);
  write_shard("stray.safetensors", ab, 2); /* other files are none of ours */
  wn_hf_dir *dir;
  OK(wn_hf_dir_open(&dir, root));
  assert_int_equal(wn_hf_dir_count(dir), 2);
  assert_int_equal(wn_hf_dir_shards(dir), 1);
  assert_string_equal(wn_hf_dir_path(dir), root);
  int32_t shard = -1;
  assert_string_equal(wn_hf_dir_find(dir, "b", &shard)->name, "b");
  assert_int_equal(shard, 0);
  assert_null(wn_hf_dir_find(dir, "c", NULL));
  wn_hf_dir_close(dir);
}

static void shards(void **state) {
  (void)state;
  write_shard("model-00001-of-000002.safetensors", cd, 2);
  write_shard("model-00002-of-000002.safetensors", ab, 2);
  index_of("{\"a\": \"model-00002-of-000002.safetensors\", \"b\": \"model-00002-of-000002.safetensors\","
           " \"c\": \"model-00001-of-000002.safetensors\", \"d\": \"model-00001-of-000002.safetensors\"}");
  wn_hf_dir *dir;
  OK(wn_hf_dir_open(&dir, root));
  assert_int_equal(wn_hf_dir_count(dir), 4);
  assert_int_equal(wn_hf_dir_shards(dir), 2);
  static const char *const order[] = {"d", "c", "a", "b"};
  for (int i = 0; i < 4; i++) {
    int32_t shard = -1, again = -1;
    const wn_st_entry *entry = wn_hf_dir_at(dir, i, &shard);
    assert_string_equal(entry->name, order[i]);
    assert_int_equal(shard, i / 2);
    assert_ptr_equal(wn_hf_dir_find(dir, order[i], &again), entry);
    assert_int_equal(again, shard);
    float value;
    OK(wn_hf_read(&value, WN_F32, &(wn_hf_weight){.entry = entry}, 0, 1));
    assert_true(value == (float)(10 + i % 2));
  }
  assert_non_null(strstr(wn_hf_dir_shard_path(dir, 1), "model-00002-of-000002.safetensors"));
  wn_hf_dir_close(dir);
}

/* More shards than this process may have files open, until it asks. */
static void very_many_shards(void **state) {
  (void)state;
  enum { SHARDS = 300 };
  struct rlimit limit;
  char *map = malloc(SHARDS * 64), name[16], file[32];
  size_t used = 0;
  assert_non_null(map);
  assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
  if (limit.rlim_max < SHARDS + 256) {
    print_message("skipped: no more than %llu files may be open here\n", (unsigned long long)limit.rlim_max);
    skip();
  }
  limit.rlim_cur = 64;
  assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
  for (int i = 0; i < SHARDS; i++) {
    snprintf(name, sizeof name, "t%d", i);
    snprintf(file, sizeof file, "%04d.safetensors", i);
    write_shard(file, (const char *const[]){name}, 1);
    used += (size_t)snprintf(map + used, 64, "%s\"%s\":\"%s\"", i ? "," : "{", name, file);
  }
  snprintf(map + used, 2, "}");
  char *text = malloc(used + 64), path[WN_PATH_BYTES];
  assert_non_null(text);
  snprintf(text, used + 64, "{\"weight_map\": %s}", map);
  OK(wn_path(path, "%s/model.safetensors.index.json", root));
  OK(wn_write_file_atomic(path, text, strlen(text)));
  wn_hf_dir *dir;
  OK(wn_hf_dir_open(&dir, root));
  float value;
  const wn_hf_weight last = {.entry = wn_hf_dir_find(dir, "t299", NULL)};
  OK(wn_hf_read(&value, WN_F32, &last, 0, 1));
  assert_true(value == 10);
  wn_hf_dir_close(dir);
  free(map);
  free(text);
}

/* A file that is cut while it is open is an error and not a signal. */
static void a_file_that_shrinks(void **state) {
  (void)state;
  char path[WN_PATH_BYTES];
  wn_hf_dir *dir;
  float value;
  write_shard("model.safetensors", ab, 2);
  OK(wn_hf_dir_open(&dir, root));
  OK(wn_path(path, "%s/model.safetensors", root));
  assert_int_equal(truncate(path, 100), 0);
  const wn_hf_weight b = {.entry = wn_hf_dir_find(dir, "b", NULL)};
  REFUSED(wn_hf_read(&value, WN_F32, &b, 0, 1), WN_E_IO, "became shorter while it was read; tensor b is cut off");
  wn_hf_dir_close(dir);
}

static void directories_without_weights(void **state) {
  (void)state;
  refuse("holds no weights");
  wn_hf_dir *dir;
  char path[WN_PATH_BYTES];
  OK(wn_path(path, "%s/absent", root));
  REFUSED(wn_hf_dir_open(&dir, path), WN_E_INPUT, "is absent");
  write_text("file", "");
  OK(wn_path(path, "%s/file", root));
  REFUSED(wn_hf_dir_open(&dir, path), WN_E_INPUT, "not a directory");
  write_text("model.safetensors", "{}");
  refuse("too few");
  write_shard("model.safetensors", ab, 2);
  index_of("{\"a\": \"model.safetensors\", \"b\": \"model.safetensors\"}");
  refuse("holds both");
}

static void an_index_that_is_none(void **state) {
  (void)state;
  write_shard("s.safetensors", ab, 2);
  write_text("model.safetensors.index.json", "");
  refuse("bad JSON");
  write_text("model.safetensors.index.json", "[]");
  refuse("holds no weight_map");
  write_text("model.safetensors.index.json", "{\"weight_map\": [\"a\"]}");
  refuse("holds no weight_map");
  index_of("{\"a\": 3}");
  refuse("is not a string");
  index_of("{\"a\": \"s.safetensors\", \"a\": \"s.safetensors\"}");
  refuse("duplicate");
  size_t n = 5 << 20; /* five million values in ten megabytes */
  char *text = malloc(2 * n + 1);
  assert_non_null(text);
  for (size_t i = 0; i < n; i++) memcpy(text + 2 * i, "0,", 2);
  memcpy(text, "[ ", 2);
  memcpy(text + 2 * n - 2, "0]", 3);
  write_text("model.safetensors.index.json", text);
  free(text);
  refuse("holds more than 4194304 values");
}

static void names_that_lead_out(void **state) {
  (void)state;
  char path[WN_PATH_BYTES];
  write_shard("s.safetensors", ab, 2);
  OK(wn_path(path, "%s/x.safetensors", outer));
  static const float one = 1;
  const wn_st_spec spec = {.name = "a", .dtype = WN_F32};
  const void *data = &one;
  OK(wn_safetensors_write(path, &spec, &data, 1)); /* it exists and is good: only the name is wrong */
  index_of("{\"a\": \"../x.safetensors\"}");
  refuse("'../x.safetensors', which is not the name of a file in the directory");
  char map[WN_PATH_BYTES + 20];
  snprintf(map, sizeof map, "{\"a\": \"%s\"}", path);
  index_of(map);
  refuse("not the name of a file");
  index_of("{\"a\": \"..\"}");
  refuse("not the name of a file");
  index_of("{\"a\": \"\"}");
  refuse("not the name of a file");
  snprintf(map, sizeof map, "{\"a\": \"%0256d\"}", 0); /* longer than a file system takes */
  index_of(map);
  refuse("not the name of a file");
  snprintf(map, sizeof map, "{\"a\": \"%0255d\"}", 0);
  index_of(map);
  refuse("names 1 file that is absent");
}

static void index_and_shards_disagree(void **state) {
  (void)state;
  write_shard("1.safetensors", ab, 2);
  write_shard("2.safetensors", cd, 2);
  index_of("{\"a\":\"1.safetensors\",\"b\":\"1.safetensors\",\"c\":\"3.safetensors\"}");
  refuse("names 1 file that is absent: 3.safetensors");
  index_of("{\"a\":\"1.safetensors\",\"b\":\"2.safetensors\",\"c\":\"2.safetensors\",\"d\":\"2.safetensors\"}");
  refuse("places 1 tensor wrongly: b (2.safetensors, but it lies in 1.safetensors)");
  index_of("{\"a\":\"2.safetensors\",\"b\":\"2.safetensors\",\"c\":\"2.safetensors\",\"d\":\"1.safetensors\"}");
  refuse("places 3 tensors wrongly: a (2.safetensors, but it lies in 1.safetensors), b (");
  index_of("{\"a\":\"1.safetensors\",\"b\":\"1.safetensors\",\"x\":\"1.safetensors\"}");
  refuse("places 1 tensor wrongly: x (1.safetensors, but it lies in no file)");
  index_of("{\"a\":\"1.safetensors\"}");
  refuse("hold 1 tensor that model.safetensors.index.json does not list: b (in 1.safetensors)");
  write_shard("2.safetensors", b_only, 1);
  index_of("{\"a\":\"1.safetensors\",\"b\":\"2.safetensors\"}");
  refuse("1 tensor stands in two shards: b (1.safetensors and 2.safetensors)");
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
  const struct CMUnitTest tests[] = {
      TEST(a_single_file),
      TEST(renamed),
      TEST(shards),
      TEST(very_many_shards),
      TEST(a_file_that_shrinks),
      TEST(directories_without_weights),
      TEST(an_index_that_is_none),
      TEST(names_that_lead_out),
      TEST(index_and_shards_disagree),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
