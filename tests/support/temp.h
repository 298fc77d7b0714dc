/* A directory of its own for each test that writes files (needs module io): pass wn_temp_setup and wn_temp_teardown to
 * cmocka_unit_test_setup_teardown; *state is the directory's path. */
#ifndef WN_TEST_TEMP_H
#define WN_TEST_TEMP_H

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/files.h"
#include "support/test.h"

static inline int wn_temp_setup(void **state) {
  char *path = strdup("/tmp/wn-test-XXXXXX");
  *state = path;
  return path && mkdtemp(path) ? 0 : -1;
}

static inline int wn_temp_teardown(void **state) {
  wn_status status = wn_remove_tree(*state);
  int failed = status != NULL;
  wn_status_free(status);
  free(*state);
  return failed;
}

/* directory + "/" + name */
typedef struct wn_temp_path {
  char text[256];
} wn_temp_path;
static inline wn_temp_path wn_temp(void **state, const char *name) {
  wn_temp_path path;
  snprintf(path.text, sizeof path.text, "%s/%s", (const char *)*state, name);
  return path;
}

static inline void wn_temp_write(const char *path, const void *data, size_t bytes) {
  FILE *file = fopen(path, "wb");
  assert_non_null(file);
  assert_int_equal(fwrite(data, 1, bytes, file), bytes);
  assert_int_equal(fclose(file), 0);
}

/* Other bits of the byte that stands `from_end` before the file's end (1: its last). */
static inline void wn_temp_flip(const char *path, long from_end, int bits) {
  FILE *file = fopen(path, "r+b");
  assert_non_null(file);
  assert_int_equal(fseek(file, -from_end, SEEK_END), 0);
  int was = fgetc(file);
  assert_int_equal(fseek(file, -from_end, SEEK_END), 0);
  assert_int_equal(fputc(was ^ bits, file), was ^ bits);
  assert_int_equal(fclose(file), 0);
}

#define TEMP_TEST(name) cmocka_unit_test_setup_teardown(name, wn_temp_setup, wn_temp_teardown)

#endif
