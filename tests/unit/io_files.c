#include "support/test.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "io/files.h"

static char root[WN_PATH_BYTES];

static int set_up(void **state) {
  (void)state;
  snprintf(root, sizeof root, "/tmp/winnow-io-files-XXXXXX");
  return mkdtemp(root) ? 0 : -1;
}

static int tear_down(void **state) {
  (void)state;
  OK(wn_remove_tree(root));
  return 0;
}

static const char *in_root(const char *name) {
  static char paths[4][WN_PATH_BYTES];
  static int next;
  char *path = paths[next++ % 4];
  OK(wn_path(path, "%s/%s", root, name));
  return path;
}

static void write_text(const char *name, const char *text) {
  OK(wn_write_file_atomic(in_root(name), text, strlen(text)));
}

static void expect_text(const char *name, const char *text) {
  char *got;
  size_t bytes;
  OK(wn_read_file(&got, &bytes, in_root(name), 1000));
  assert_int_equal(bytes, strlen(text));
  assert_string_equal(got, text);
  free(got);
}

static void paths_that_do_not_fit(void **state) {
  (void)state;
  static char big[2 * WN_PATH_BYTES];
  char out[WN_PATH_BYTES];
  memset(big, 'x', sizeof big - 1);
  REFUSED(wn_path(out, "%s", big), WN_E_USAGE, "longer than");
  big[WN_PATH_BYTES - 1] = 0;
  OK(wn_path(out, "%s", big));
  assert_string_equal(out, big);
}

static void make_and_remove(void **state) {
  (void)state;
  OK(wn_make_dirs(in_root("a/b//c/")));
  OK(wn_make_dirs(in_root("a/b/c")));
  assert_true(wn_path_is_dir(in_root("a/b/c")));
  write_text("a/file", "x");
  assert_false(wn_path_is_dir(in_root("a/file")));
  REFUSED(wn_make_dirs(in_root("a/file")), WN_E_IO, "a file of that name");
  REFUSED(wn_make_dirs(in_root("a/file/d")), WN_E_IO, "a/file");
  write_text("kept", "kept");
  assert_int_equal(symlink(in_root("kept"), in_root("a/b/link")), 0);
  OK(wn_remove_tree(in_root("a")));
  assert_false(wn_path_exists(in_root("a")));
  expect_text("kept", "kept"); /* the link went, not what it led to */
  OK(wn_remove_tree(in_root("a")));
  OK(wn_remove_tree(in_root("kept")));
  assert_false(wn_path_exists(in_root("kept")));
}

static void atomic_writes(void **state) {
  (void)state;
  write_text("f", "one");
  write_text("f", "second");
  expect_text("f", "second");
  write_text("empty", "");
  expect_text("empty", "");
  char **names;
  size_t n;
  OK(wn_list_dir(&names, &n, root)); /* no temporary file is left */
  assert_int_equal(n, 2);
  assert_string_equal(names[0], "empty");
  assert_string_equal(names[1], "f");
  wn_list_free(names, n);
}

static void a_failed_write_leaves_the_old_file(void **state) {
  (void)state;
  OK(wn_make_dirs(in_root("locked")));
  write_text("locked/f", "old");
  assert_int_equal(chmod(in_root("locked"), 0555), 0);
  assert_int_equal(chmod(root, 0755), 0);
  uid_t user = geteuid();
  if (user == 0) assert_int_equal(seteuid(65534), 0); /* permissions do not bind root */
  REFUSED(wn_write_file_atomic(in_root("locked/f"), "new", 3), WN_E_IO, "locked/f");
  REFUSED(wn_make_dirs(in_root("locked/d")), WN_E_IO, "Permission denied");
  REFUSED(wn_create_sized(in_root("locked/s"), 10), WN_E_IO, "Permission denied");
  if (user == 0) assert_int_equal(seteuid(user), 0);
  assert_int_equal(chmod(in_root("locked"), 0755), 0);
  expect_text("locked/f", "old");

  OK(wn_make_dirs(in_root("dir/below"))); /* a rename over a directory that is not empty fails at the last moment */
  REFUSED(wn_write_file_atomic(in_root("dir"), "x", 1), WN_E_IO, "cannot rename");
  char **names;
  size_t n;
  OK(wn_list_dir(&names, &n, root));
  assert_int_equal(n, 2);
  wn_list_free(names, n);
  REFUSED(wn_write_file_atomic(in_root("absent/f"), "x", 1), WN_E_IO, "No such file");
}

/* What is no file stays what it is: written as root, /dev/null would become one for all programs. */
static void devices_are_not_replaced(void **state) {
  (void)state;
  struct stat info;
  assert_int_equal(mkfifo(in_root("pipe"), 0600), 0);
  REFUSED(wn_write_file_atomic(in_root("pipe"), "x", 1), WN_E_IO, "pipe is a device or a pipe");
  assert_int_equal(stat(in_root("pipe"), &info), 0);
  assert_true(S_ISFIFO(info.st_mode));
  char **names;
  size_t n;
  OK(wn_list_dir(&names, &n, root));
  assert_int_equal(n, 1);
  wn_list_free(names, n);
}

static void reading(void **state) {
  (void)state;
  char *text;
  write_text("ten", "0123456789");
  OK(wn_read_file(&text, NULL, in_root("ten"), 10));
  free(text);
  REFUSED(wn_read_file(&text, NULL, in_root("ten"), 9), WN_E_INPUT, "longer than the 9 bytes");
  REFUSED(wn_read_file(&text, NULL, "/dev/zero", 5000), WN_E_INPUT, "/dev/zero is not a regular file");
  assert_int_equal(mkfifo(in_root("pipe"), 0600), 0); /* nobody writes to it, and nobody waits for that */
  REFUSED(wn_read_file(&text, NULL, in_root("pipe"), 10), WN_E_INPUT, "pipe is not a regular file");
  REFUSED(wn_read_file(&text, NULL, in_root("absent"), 10), WN_E_IO, "absent");
  REFUSED(wn_read_file(&text, NULL, root, 1 << 20), WN_E_INPUT, "is not a regular file");
}

/* A pipe is read until its writer ends, in whatever pieces; what never ends is cut off at the limit. */
static void reading_a_stream(void **state) {
  (void)state;
  char *text, name[64];
  size_t bytes;
  int ends[2];
  assert_int_equal(pipe(ends), 0);
  pid_t writer = fork();
  assert_true(writer >= 0);
  if (writer == 0) {
    for (int i = 0; i < 3; i++) {
      usleep(2000);
      if (write(ends[1], "0123456789", 10) != 10) _exit(1);
    }
    _exit(0);
  }
  close(ends[1]);
  snprintf(name, sizeof name, "/dev/fd/%d", ends[0]);
  OK(wn_read_stream(&text, &bytes, name, 30));
  assert_int_equal(bytes, 30);
  assert_string_equal(text, "012345678901234567890123456789");
  free(text);
  close(ends[0]);
  int ended;
  assert_int_equal(waitpid(writer, &ended, 0), writer);
  assert_int_equal(ended, 0);
  REFUSED(wn_read_stream(&text, NULL, "/dev/zero", 5000), WN_E_INPUT, "/dev/zero is longer than the 5000 bytes");
  REFUSED(wn_read_stream(&text, NULL, root, 1 << 20), WN_E_INPUT, "is not a regular file");
}

static void places_in_a_file(void **state) {
  (void)state;
  OK(wn_create_sized(in_root("s"), 100));
  REFUSED(wn_create_sized(in_root("s"), 100), WN_E_IO, "exists");
  REFUSED(wn_create_sized(in_root("huge"), UINT64_MAX), WN_E_IO, "huge");
  assert_false(wn_path_exists(in_root("huge")));
  int fd = open(in_root("s"), O_RDWR);
  assert_true(fd >= 0);
  OK(wn_write_at(fd, "s", "abc", 3, 50));
  char back[4] = {0};
  assert_int_equal(pread(fd, back, 3, 50), 3);
  assert_string_equal(back, "abc");
  close(fd);
  REFUSED(wn_write_at(fd, "s", "abc", 3, 0), WN_E_IO, "cannot write s at byte 0");
  OK(wn_sync_file(in_root("s")));
  OK(wn_sync_dir(root));
  REFUSED(wn_sync_dir(in_root("s")), WN_E_IO, "cannot open");
  fd = open("/dev/full", O_WRONLY);
  if (fd < 0) return;
  REFUSED(wn_write_at(fd, "/dev/full", "abc", 3, 0), WN_E_IO, "No space left");
  close(fd);
}

static void renaming(void **state) {
  (void)state;
  write_text("x", "x");
  OK(wn_rename_sync(in_root("x"), in_root("y")));
  expect_text("y", "x");
  REFUSED(wn_rename_sync(in_root("x"), in_root("z")), WN_E_IO, "cannot rename");
  char before[WN_PATH_BYTES]; /* a bare name has the working directory as parent */
  assert_non_null(getcwd(before, sizeof before));
  assert_int_equal(chdir(root), 0);
  OK(wn_rename_sync("y", "w"));
  assert_int_equal(chdir(before), 0);
  expect_text("w", "x");
}

static void linking(void **state) {
  (void)state;
  const char *how = "";
  struct stat a, b;
  write_text("file", "body");
  OK(wn_link_or_copy(in_root("file"), in_root("hard"), &how));
  assert_string_equal(how, "linked");
  assert_int_equal(stat(in_root("file"), &a), 0);
  assert_int_equal(lstat(in_root("hard"), &b), 0);
  assert_true(a.st_ino == b.st_ino);
  /* a relative link, as in a Hugging Face cache: the new name must lead to the file, not copy the link */
  OK(wn_make_dirs(in_root("sub")));
  assert_int_equal(symlink("file", in_root("soft")), 0);
  OK(wn_link_or_copy(in_root("soft"), in_root("sub/hard"), &how));
  assert_int_equal(lstat(in_root("sub/hard"), &b), 0);
  assert_true(a.st_ino == b.st_ino);
  REFUSED(wn_link_or_copy(in_root("file"), in_root("hard"), &how), WN_E_IO, "exists");
  REFUSED(wn_link_or_copy(in_root("none"), in_root("n"), &how), WN_E_IO, "none");
  REFUSED(wn_link_or_copy(in_root("file"), in_root("none/n"), &how), WN_E_IO, "none/n");

  OK(wn_copy_file(in_root("file"), in_root("copy")));
  expect_text("copy", "body");
  REFUSED(wn_copy_file(in_root("file"), in_root("copy")), WN_E_IO, "exists");
  REFUSED(wn_copy_file(root, in_root("copy2")), WN_E_IO, "directory");
  assert_false(wn_path_exists(in_root("copy2")));
}

static void linking_across_devices(void **state) {
  (void)state;
  struct stat here, there;
  if (stat("/dev/shm", &there) != 0 || stat(root, &here) != 0 || here.st_dev == there.st_dev ||
      access("/dev/shm", W_OK) != 0) {
    print_message("skipped: /dev/shm is not a second, writable file system\n");
    skip();
  }
  char far[WN_PATH_BYTES];
  const char *how = "";
  OK(wn_path(far, "/dev/shm/winnow-io-files-%ld", (long)getpid()));
  write_text("file", "body");
  OK(wn_link_or_copy(in_root("file"), far, &how));
  assert_string_equal(how, "symlinked");
  char *text;
  OK(wn_read_file(&text, NULL, far, 100));
  assert_string_equal(text, "body");
  free(text);
  OK(wn_remove_tree(far));
  expect_text("file", "body");
}

static void listing(void **state) {
  (void)state;
  char **names;
  size_t n;
  OK(wn_list_dir(&names, &n, root));
  assert_int_equal(n, 0);
  wn_list_free(names, n);
  for (int i = 0; i < 40; i++) {
    char name[16];
    snprintf(name, sizeof name, "f%02d", (i * 7) % 40);
    write_text(name, "");
  }
  OK(wn_list_dir(&names, &n, root));
  assert_int_equal(n, 40);
  for (size_t i = 1; i < n; i++) assert_true(strcmp(names[i - 1], names[i]) < 0);
  wn_list_free(names, n);
  REFUSED(wn_list_dir(&names, &n, in_root("f00")), WN_E_IO, "cannot list");
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
  const struct CMUnitTest tests[] = {
      TEST(paths_that_do_not_fit),
      TEST(make_and_remove),
      TEST(atomic_writes),
      TEST(a_failed_write_leaves_the_old_file),
      TEST(reading),
      TEST(reading_a_stream),
      TEST(devices_are_not_replaced),
      TEST(places_in_a_file),
      TEST(renaming),
      TEST(linking),
      TEST(linking_across_devices),
      TEST(listing),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
