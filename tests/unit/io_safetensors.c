#include "support/test.h"

#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "io/files.h"
#include "io/safetensors.h"

static char root[WN_PATH_BYTES], path[WN_PATH_BYTES];

static int set_up(void **state) {
  (void)state;
  snprintf(root, sizeof root, "/tmp/winnow-io-st-XXXXXX");
  if (!mkdtemp(root)) return -1;
  OK(wn_path(path, "%s/f.safetensors", root));
  return 0;
}

static int tear_down(void **state) {
  (void)state;
  OK(wn_remove_tree(root));
  return 0;
}

/* A file with this header (whose length word may lie) and `data_bytes` zeros. */
static void write_raw(const char *header, size_t header_bytes, uint64_t claimed, size_t data_bytes) {
  size_t bytes = 8 + header_bytes + data_bytes;
  char *file = calloc(1, bytes);
  assert_non_null(file);
  for (int i = 0; i < 8; i++) file[i] = (char)(claimed >> (8 * i) & 255);
  memcpy(file + 8, header, header_bytes);
  OK(wn_write_file_atomic(path, file, bytes));
  free(file);
}

static void write_header(const char *header, size_t data_bytes) {
  write_raw(header, strlen(header), strlen(header), data_bytes);
}

static void refuse(const char *header, size_t data_bytes, const char *part) {
  wn_safetensors *file = NULL;
  write_header(header, data_bytes);
  wn_status status = wn_safetensors_open(&file, path);
  if (!status) print_error("accepted: %.200s\n", header);
  assert_null(file);
  if (status) assert_non_null(strstr(wn_status_text(status), path));
  REFUSED(status, WN_E_INPUT, part);
}

static void accept(const char *header, size_t data_bytes, int64_t n) {
  wn_safetensors *file = NULL;
  write_header(header, data_bytes);
  OK(wn_safetensors_open(&file, path));
  assert_int_equal(wn_safetensors_count(file), n);
  wn_safetensors_close(file);
}

#define T(name, dtype, shape, from, to)                                                                                \
  "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #from "," #to "]}"

static void the_plainest_file(void **state) {
  (void)state;
  accept("{}", 0, 0);
  accept("{" T("a", "F32", "[2]", 0, 8) "}", 8, 1);
  accept("{" T("a", "F32", "[2]", 0, 8) "}     ", 8, 1);
  accept("{\"__metadata__\":{\"format\":\"pt\"}," T("a", "F32", "[]", 0, 4) "}", 4, 1); /* a scalar */
  accept("{" T("a", "F32", "[2]", 4, 12) "," T("b", "F32", "[1]", 0, 4) "}", 12, 2);    /* any order of names */
}

/* A name may hold any character: the sentence that quotes it stays one line, and commands no terminal. */
static void names_in_sentences(void **state) {
  (void)state;
  refuse("{" T("a\\n\\u001b[2Jb\\u007f", "F32", "[2]", 0, 4) "}", 4, "tensor a??[2Jb?: holds 4 bytes");
}

static void lengths_that_lie(void **state) {
  (void)state;
  wn_safetensors *file;
  REFUSED(wn_safetensors_open(&file, root), WN_E_INPUT, "not a regular file");
  OK(wn_write_file_atomic(path, "", 0));
  REFUSED(wn_safetensors_open(&file, path), WN_E_INPUT, "too few");
  OK(wn_write_file_atomic(path, "1234567", 7));
  REFUSED(wn_safetensors_open(&file, path), WN_E_INPUT, "too few");
  write_raw("{}", 2, 0, 0);
  REFUSED(wn_safetensors_open(&file, path), WN_E_INPUT, "does not begin");
  write_raw("{}", 2, 3, 0);
  REFUSED(wn_safetensors_open(&file, path), WN_E_INPUT, "beyond the file");
  write_raw("{}", 2, 100000001, 0);
  REFUSED(wn_safetensors_open(&file, path), WN_E_INPUT, "above 100000000");
  write_raw("{}", 2, UINT64_MAX, 0);
  REFUSED(wn_safetensors_open(&file, path), WN_E_INPUT, "above 100000000");
  write_raw("{}", 2, UINT64_MAX - 7, 0); /* 8 + length wraps around to 0 */
  REFUSED(wn_safetensors_open(&file, path), WN_E_INPUT, "above 100000000");
  write_raw("{}", 2, 1, 0);
  REFUSED(wn_safetensors_open(&file, path), WN_E_INPUT, "bad JSON");
  OK(wn_path(path, "%s/absent", root));
  REFUSED(wn_safetensors_open(&file, path), WN_E_IO, "absent");
}

static void bad_json(void **state) {
  (void)state;
  refuse("[]", 0, "does not begin");
  refuse(" {}", 0, "does not begin");
  refuse("{\"a\":", 0, "bad JSON");
  refuse("{} x", 0, "bad JSON");
  refuse("{\"\xff\":1}", 0, "bad JSON"); /* not UTF-8 */
  refuse("{" T("a\\u0000b", "F32", "[2]", 0, 8) "}", 8, "bad JSON");
  refuse("{" T("a", "F32", "[2]", 0, 8) "," T("a", "F32", "[2]", 8, 16) "}", 16, "duplicate");
  refuse("{" T("a", "F32", "[2]", 0, 99999999999999999999) "}", 16, "bad JSON");
  wn_safetensors *file;
  write_raw("{}\0\0", 4, 4, 0); /* padded with NUL instead of spaces */
  REFUSED(wn_safetensors_open(&file, path), WN_E_INPUT, "bad JSON");
  write_raw("{\"a\0b\":1}", 9, 9, 0);
  REFUSED(wn_safetensors_open(&file, path), WN_E_INPUT, "bad JSON");
  size_t deep = 1 << 20;
  char *text = malloc(deep + 6);
  assert_non_null(text);
  memcpy(text, "{\"a\":", 5);
  memset(text + 5, '[', deep);
  text[deep + 5] = 0;
  refuse(text, 0, "bad JSON");
  free(text);
}

/* A short text that would be a gigabyte once parsed. */
static void header_bombs(void **state) {
  (void)state;
  enum { BYTES = 12 << 20 };
  struct rusage before, after;
  char *text = malloc(BYTES + 1);
  assert_non_null(text);
  memcpy(text, "{\"a\":[0", 7);
  for (size_t i = 7; i < BYTES - 2; i += 2) memcpy(text + i, ",0", 2);
  memcpy(text + BYTES - 2, "]}", 3);
  write_header(text, 0);
  free(text);
  wn_safetensors *file;
  assert_int_equal(getrusage(RUSAGE_SELF, &before), 0);
  REFUSED(wn_safetensors_open(&file, path), WN_E_INPUT, "hold more than 4194304 values");
  assert_int_equal(getrusage(RUSAGE_SELF, &after), 0);
  if (after.ru_maxrss - before.ru_maxrss > 2 * BYTES / 1024)
    fail_msg("%ld KiB more", after.ru_maxrss - before.ru_maxrss);
}

/* jansson's null is one object: tensors that are null were taken for the metadata where that was null too. */
static void nulls(void **state) {
  (void)state;
  accept("{\"__metadata__\":null}", 0, 0);
  accept("{\"__metadata__\":null," T("a", "F32", "[1]", 0, 4) "}", 4, 1);
  refuse("{\"__metadata__\":null,\"a\":null,\"b\":null}", 0, "tensor a: not an object");
  refuse("{\"a\":null}", 0, "tensor a: not an object");
}

static void entries_that_lie(void **state) {
  (void)state;
  refuse("{\"a\":3}", 0, "tensor a: not an object");
  refuse("{\"a\":{}}", 0, "dtype is not a string");
  refuse("{" T("a", "F33", "[2]", 0, 8) "}", 8, "dtype F33 is not supported");
  refuse("{" T("a", "", "[2]", 0, 8) "}", 8, "is not supported");
  refuse("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", 8, "shape is not a list");
  refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "data_offsets");
  refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", 8, "data_offsets");
  refuse("{" T("a", "F32", "[1,1,1,1,2]", 0, 8) "}", 8, "rank 5; at most 4");
  refuse("{" T("a", "F32", "[2.0]", 0, 8) "}", 8, "dimension 0");
  refuse("{" T("a", "F32", "[2,-1]", 0, 8) "}", 8, "dimension 1");
  refuse("{" T("a", "F32", "[4294967296,4294967296]", 0, 8) "}", 8, "overflows");
  refuse("{" T("a", "F32", "[4294967296,4294967296,0]", 0, 0) "}", 0, "overflows");
  refuse("{" T("a", "F32", "[4611686018427387904]", 0, 8) "}", 8, "overflows"); /* the count fits, the bytes do not */
  refuse("{" T("a", "F32", "[3]", 0, 8) "}", 8, "its shape and dtype make 12");
  refuse("{" T("a", "F32", "[2]", -8, 0) "}", 8, "not a pair");
  refuse("{\"__metadata__\":[]," T("a", "F32", "[2]", 0, 8) "}", 8, "__metadata__ is not an object");
  refuse("{\"__metadata__\":{\"x\":1}," T("a", "F32", "[2]", 0, 8) "}", 8, "__metadata__.x");
}

static void offsets_that_lie(void **state) {
  (void)state;
  refuse("{" T("a", "F32", "[2]", 8, 0) "}", 8, "run backwards");
  refuse("{" T("a", "F32", "[2]", 0, 8) "," T("b", "F32", "[2]", 4, 12) "}", 16, "tensor b begins at byte 4");
  refuse("{" T("a", "F32", "[2]", 0, 8) "," T("b", "F32", "[2]", 0, 8) "}", 8, "overlapping");
  refuse("{" T("a", "F32", "[2]", 0, 8) "," T("b", "F32", "[2]", 12, 20) "}", 20, "leaving a hole");
  refuse("{" T("a", "F32", "[2]", 4, 12) "}", 12, "leaving a hole");
  refuse("{" T("a", "F32", "[2]", 0, 8) "}", 7, "of which there are 7");
  refuse("{" T("a", "F32", "[2]", 0, 8) "}", 9, "1 bytes after the last tensor");
  refuse("{}", 8, "8 bytes after the last tensor");
  refuse("{" T("a", "F32", "[2]", 0, 8) "," T("e", "F32", "[0]", 16, 16) "}", 8, "leaving a hole");
}

static void empty_tensors(void **state) {
  (void)state;
  accept("{" T("e", "F32", "[0]", 0, 0) "}", 0, 1);
  accept("{" T("z", "F32", "[0,7]", 0, 0) "," T("a", "F32", "[2]", 0, 8) "," T("e", "F32", "[0]", 8,
                                                                               8) "," T("f", "F32", "[3,0]", 8, 8) "}",
         8, 4);
}

static void round_trip(void **state) {
  (void)state;
  static const float a[6] = {1, 2, 3, 4, 5, 6};
  static const uint16_t b[3] = {0x3f80, 0x4000, 0x7fc0};
  static const int32_t c[1] = {-7};
  static const wn_st_spec specs[] = {{"layer.\xc3\xa9\"quoted\"", WN_F32, 2, {2, 3}},
                                     {"b", WN_BF16, 1, {3}},
                                     {"none", WN_F32, 2, {0, 5}},
                                     {"scalar", WN_I32, 0, {0}}};
  const void *data[] = {a, b, NULL, c};
  OK(wn_safetensors_write(path, specs, data, 4));
  wn_safetensors *file;
  OK(wn_safetensors_open(&file, path));
  assert_int_equal(wn_safetensors_count(file), 4);
  assert_string_equal(wn_safetensors_metadata(file, "format"), "pt");
  assert_null(wn_safetensors_metadata(file, "absent"));
  assert_null(wn_safetensors_find(file, "absent"));
  assert_string_equal(wn_safetensors_path(file), path);
  for (int i = 0; i < 4; i++) {
    const wn_st_entry *entry = wn_safetensors_find(file, specs[i].name);
    assert_non_null(entry);
    assert_int_equal(entry->dtype, specs[i].dtype);
    assert_int_equal(entry->rank, specs[i].rank);
    for (int axis = 0; axis < entry->rank; axis++) assert_int_equal(entry->dim[axis], specs[i].dim[axis]);
    if (entry->bytes) assert_memory_equal(entry->data, data[i], entry->bytes);
  }
  assert_string_equal(wn_safetensors_at(file, 0)->name, specs[0].name); /* file order */
  wn_safetensors_close(file);
}

static void layout_places(void **state) {
  (void)state;
  static const wn_st_spec specs[] = {{"a", WN_F32, 1, {3}}, {"b", WN_U8, 1, {5}}, {"c", WN_F64, 2, {2, 2}}};
  wn_st_layout *layout;
  OK(wn_st_layout_create(&layout, specs, 3));
  uint64_t header_bytes;
  const void *header = wn_st_layout_header(layout, &header_bytes);
  assert_non_null(header);
  assert_int_equal(header_bytes % 8, 0);
  assert_int_equal(wn_st_layout_offset(layout, 0), header_bytes);
  assert_int_equal(wn_st_layout_offset(layout, 1), header_bytes + 12);
  assert_int_equal(wn_st_layout_offset(layout, 2), header_bytes + 17);
  assert_int_equal(wn_st_layout_file_bytes(layout), header_bytes + 49);
  wn_st_layout_free(layout);
  static const wn_st_spec twice[] = {{"a", WN_F32, 1, {3}}, {"a", WN_U8, 1, {5}}};
  REFUSED(wn_st_layout_create(&layout, twice, 2), WN_E_INPUT, "tensor a would stand twice");
  OK(wn_st_layout_create(&layout, NULL, 0));
  assert_true(wn_st_layout_file_bytes(layout) % 8 == 0);
  wn_st_layout_free(layout);
  const void *none[1] = {NULL};
  static const wn_st_spec one[] = {{"a", WN_F32, 1, {0}}};
  REFUSED(wn_safetensors_write("/proc/absent/f", one, none, 1), WN_E_IO, "/proc/absent/f");
}

/* Every prefix of a good file is refused: whatever a broken download leaves. */
static void truncations(void **state) {
  (void)state;
  static const float a[6] = {1, 2, 3, 4, 5, 6};
  static const wn_st_spec specs[] = {{"a", WN_F32, 2, {2, 3}}};
  const void *data[] = {a};
  char *text;
  size_t bytes;
  OK(wn_safetensors_write(path, specs, data, 1));
  OK(wn_read_file(&text, &bytes, path, 1000));
  for (size_t length = 0; length < bytes; length++) {
    wn_safetensors *file;
    OK(wn_write_file_atomic(path, text, length));
    wn_status status = wn_safetensors_open(&file, path);
    assert_non_null(status);
    assert_int_equal(wn_status_code(status), WN_E_INPUT);
    wn_status_free(status);
  }
  free(text);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
  const struct CMUnitTest tests[] = {
      TEST(the_plainest_file), TEST(names_in_sentences), TEST(lengths_that_lie), TEST(bad_json),      TEST(nulls),
      TEST(header_bombs),      TEST(entries_that_lie),   TEST(offsets_that_lie), TEST(empty_tensors), TEST(round_trip),
      TEST(layout_places),     TEST(truncations),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
