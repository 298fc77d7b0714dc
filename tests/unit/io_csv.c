#include "support/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <signal.h>
#include <sys/stat.h>

#include "io/csv.h"
#include "io/files.h"

static char root[WN_PATH_BYTES], path[WN_PATH_BYTES];
static const char *const columns[] = {"step", "loss", "note"};
#define HEADER "step,loss,note\n"

static int set_up(void **state) {
  (void)state;
  snprintf(root, sizeof root, "/tmp/winnow-io-csv-XXXXXX");
  if (!mkdtemp(root)) return -1;
  OK(wn_path(path, "%s/t.csv", root));
  return 0;
}

static int tear_down(void **state) {
  (void)state;
  OK(wn_remove_tree(root));
  return 0;
}

static void write_text(const char *text) {
  OK(wn_write_file_atomic(path, text, strlen(text)));
}

static void expect_text(const char *expected) {
  char *text;
  OK(wn_read_file(&text, NULL, path, 100000));
  assert_string_equal(text, expected);
  free(text);
}

static void add(wn_csv *csv, int64_t step, double loss, const char *note) {
  wn_csv_int(csv, step);
  wn_csv_real(csv, loss);
  if (note)
    wn_csv_text(csv, note);
  else
    wn_csv_real(csv, (double)NAN);
  OK(wn_csv_end_row(csv));
}

static void rows(void **state) {
  (void)state;
  wn_csv *csv;
  OK(wn_csv_open(&csv, path, columns, 3));
  expect_text(HEADER);
  add(csv, 1, 0.1, NULL);
  expect_text(HEADER "1,0.1,\n"); /* at once, not when it is closed */
  add(csv, -9223372036854775807, 1234567890.123, "plain");
  add(csv, 3, NAN, "a,b");
  add(csv, 4, INFINITY, "say \"x\"");
  add(csv, 5, -INFINITY, "two\nlines\r");
  add(csv, 6, 1.0 / 3, "");
  add(csv, 7, 1e-300, " blanks ");
  OK(wn_csv_close(csv));
  expect_text(HEADER "1,0.1,\n-9223372036854775807,1.23456789e+09,plain\n3,,\"a,b\"\n4,inf,\"say \"\"x\"\"\"\n"
                     "5,-inf,\"two\nlines\r\"\n6,0.333333333,\n7,1e-300, blanks \n");
  OK(wn_csv_close(NULL));
}

static void long_rows(void **state) {
  (void)state;
  static char note[20000];
  wn_csv *csv;
  struct stat info;
  memset(note, 'n', sizeof note - 1);
  OK(wn_csv_open(&csv, path, columns, 3));
  add(csv, 1, 2, note);
  OK(wn_csv_close(csv));
  assert_int_equal(stat(path, &info), 0);
  assert_int_equal(info.st_size, strlen(HEADER) + 4 + sizeof note - 1 + 1);
}

static void opening_again(void **state) {
  (void)state;
  static const struct {
    const char *before, *after;
  } cases[] = {
      {"", HEADER "9,1,\n"},
      {"step,lo", HEADER "9,1,\n"}, /* killed within the header */
      {HEADER, HEADER "9,1,\n"},
      {HEADER "1,2,\n", HEADER "1,2,\n9,1,\n"},
      {HEADER "1,2,\n2,3", HEADER "1,2,\n9,1,\n"},
      {HEADER "1,2,\n2,3,\"torn\nin quotes", HEADER "1,2,\n9,1,\n"},
      {HEADER "1,2,\"whole\nin quotes\"\n", HEADER "1,2,\"whole\nin quotes\"\n9,1,\n"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    wn_csv *csv;
    write_text(cases[i].before);
    OK(wn_csv_open(&csv, path, columns, 3));
    add(csv, 9, 1, NULL);
    OK(wn_csv_close(csv));
    expect_text(cases[i].after);
  }
}

static void refusals(void **state) {
  (void)state;
  static const char *const others[] = {"step,loss\n", "step,loss,note,more\n", "step,loss,nota\n", "\n", "no header"};
  wn_csv *csv;
  for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
    write_text(others[i]);
    REFUSED(wn_csv_open(&csv, path, columns, 3), WN_E_INPUT, path);
    expect_text(others[i]); /* left alone */
  }
  REFUSED(wn_csv_open(&csv, root, columns, 3), WN_E_IO, root);
  REFUSED(wn_csv_open(&csv, "/proc/absent/t.csv", columns, 3), WN_E_IO, "/proc/absent/t.csv");
}

/* A file size limit stands in for a full disk: the row that does not fit leaves no piece of itself. */
static void a_full_disk(void **state) {
  (void)state;
  static char note[1000];
  struct rlimit before, limit;
  wn_csv *csv;
  memset(note, 'n', sizeof note - 1);
  OK(wn_csv_open(&csv, path, columns, 3));
  add(csv, 1, 2, NULL);
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &before), 0);
  limit = before;
  limit.rlim_cur = 500;
  signal(SIGXFSZ, SIG_IGN);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
  wn_csv_int(csv, 2);
  wn_csv_real(csv, (double)NAN);
  wn_csv_text(csv, note);
  wn_status status = wn_csv_end_row(csv);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &before), 0);
  REFUSED(status, WN_E_IO, "File too large");
  expect_text(HEADER "1,2,\n");
  add(csv, 2, 3, NULL);
  OK(wn_csv_close(csv));
  expect_text(HEADER "1,2,\n2,3,\n");
}

static void cutting(void **state) {
  (void)state;
  OK(wn_csv_cut(path, "step", 5)); /* absent */
  assert_false(wn_path_exists(path));
  static const struct {
    const char *before;
    int64_t last;
    const char *after;
  } cases[] = {
      {HEADER "1,a,\n2,b,\n3,c,\n", 2, HEADER "1,a,\n2,b,\n"},
      {HEADER "1,a,\n2,b,\n3,c,\n", 0, HEADER},
      {HEADER "1,a,\n2,b,\n3,c,\n", 9, HEADER "1,a,\n2,b,\n3,c,\n"},
      {HEADER "1,a,\n3,c,\n2,b,\n-1,x,\n", 2, HEADER "1,a,\n2,b,\n-1,x,\n"},
      {HEADER "1,a,\n2,", 9, HEADER "1,a,\n"},
      {HEADER "1,a,\n1", 9, HEADER "1,a,\n"},
      {HEADER "1,\"x,\n9\",\n2,\"y\"\"\n\",\n", 1, HEADER "1,\"x,\n9\",\n"},
      {"step,loss\r\n1,a\r\n2,b\r\n", 1, "step,loss\r\n1,a\r\n"},
      {"", 3, ""},
      {"step,l", 3, ""},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    write_text(cases[i].before);
    OK(wn_csv_cut(path, "step", cases[i].last));
    expect_text(cases[i].after);
  }
  write_text("a,\"x,y\",step\n5,6,7\n5,6,8\n"); /* the column is found by name, wherever it is */
  OK(wn_csv_cut(path, "step", 7));
  expect_text("a,\"x,y\",step\n5,6,7\n");
  write_text(HEADER "1,a,\n");
  struct stat before, after;
  assert_int_equal(stat(path, &before), 0);
  OK(wn_csv_cut(path, "step", 5));
  assert_int_equal(stat(path, &after), 0);
  assert_true(before.st_ino == after.st_ino); /* nothing to drop: not written anew */
}

static void cuts_refused(void **state) {
  (void)state;
  static const struct {
    const char *text, *part;
  } cases[] = {
      {HEADER "1,a,\nx,b,\n", "row 3 has no whole number in column step"},
      {HEADER "1,a,\n,b,\n", "row 3 has no whole number in column step"},
      {HEADER "1.5,a,\n", "row 2 has no whole number"},
      {HEADER "99999999999999999999,a,\n", "row 2 has no whole number"},
      {"loss,note\n1,2\n", "has no column step"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    write_text(cases[i].text);
    REFUSED(wn_csv_cut(path, "step", 5), WN_E_INPUT, cases[i].part);
    expect_text(cases[i].text);
  }
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
  const struct CMUnitTest tests[] = {TEST(rows),        TEST(long_rows), TEST(opening_again), TEST(refusals),
                                     TEST(a_full_disk), TEST(cutting),   TEST(cuts_refused)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
