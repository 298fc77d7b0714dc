/* The output directory: what is refused, and how a conversion that was broken off goes on. (Kills at every change of
 * the file system are in tests/e2e/convert.c.) */
#include "support/conversion.h"
#include "support/tiny.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>

enum { SHARD_BYTES = 40000 };

static wn_convert_job a_job(void **state, const char *out) {
  static char in[WN_PATH_BYTES], to[WN_PATH_BYTES];
  OK(wn_path(in, "%s/in", (const char *)*state));
  OK(wn_path(to, "%s/%s", (const char *)*state, out));
  wn_convert_job job = conv_job(in, to, WN_TO_FP8);
  job.shard_bytes = SHARD_BYTES;
  return job;
}

static int setup(void **state) {
  if (wn_temp_setup(state)) return -1;
  wn_model_config config = conv_odd_config();
  config.intermediate_size = 600; /* a matrix of 90000 bytes in FP8 */
  config.first_k_dense_replace = 1;
  conv_write_dir(wn_temp(state, "in").text, &config, (conv_dir){.stored = CONV_BF16, .mtp = 1, .shards = 2});
  wn_temp_write(wn_temp(state, "in/tokenizer.json").text, "{}", 2);
  wn_convert_job job = a_job(state, "whole");
  OK(wn_convert(&job, NULL));
  return 0;
}

/* A limit on the length of files stands in for a full disk. */
static void with_little_room(void **state, const char *out) {
  const struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY}, little = {60000, RLIM_INFINITY};
  wn_convert_job job = a_job(state, out);
  signal(SIGXFSZ, SIG_IGN);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &little), 0);
  wn_status status = wn_convert(&job, NULL);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &none), 0);
  signal(SIGXFSZ, SIG_DFL);
  REFUSED(status, WN_E_IO, "File too large");
}

static struct stat info_of(void **state, const char *name) {
  struct stat info;
  if (stat(wn_temp(state, name).text, &info) != 0) fail_msg("%s is absent", name);
  return info;
}

static char first_shard[128];

/* The name of the first shard of the half-done directory. */
static const char *first_of(void **state, const char *dir) {
  char **names;
  size_t n;
  OK(wn_list_dir(&names, &n, wn_temp(state, dir).text));
  assert_string_equal(names[0], ".convert.json");
  assert_true(n > 1 && strncmp(names[1], "model-00001-of-", 15) == 0);
  assert_true(snprintf(first_shard, sizeof first_shard, "%s/%s", dir, names[1]) < (int)sizeof first_shard);
  for (size_t i = 1; i < n; i++) assert_true(strncmp(names[i], "model-", 6) == 0); /* nothing half written */
  wn_list_free(names, n);
  return first_shard;
}

static void goes_on(void **state) {
  with_little_room(state, "half");
  struct stat before = info_of(state, first_of(state, "half")), after;
  wn_temp_write(wn_temp(state, "half/.tmp-model-00002-of-000009.safetensors").text, "x", 1);
  wn_temp_write(wn_temp(state, "half/config.json.tmp.123").text, "x", 1);
  wn_temp_write(wn_temp(state, "half/tokenizer.json").text, "an old one", 10);
  wn_convert_job job = a_job(state, "half");
  OK(wn_convert(&job, NULL));
  after = info_of(state, first_shard);
  assert_true(before.st_ino == after.st_ino && before.st_mtim.tv_nsec == after.st_mtim.tv_nsec);
  tiny_expect_same_tree(wn_temp(state, "half").text, wn_temp(state, "whole").text);
}

static void beginnings_of_other_conversions(void **state) {
  static const char sentence[] = "holds the beginning of a conversion with";
  struct stat source = info_of(state, "in/model-00001-of-000002.safetensors");
  with_little_room(state, "other");
  wn_convert_job job = a_job(state, "other");
  job.form = WN_TO_BF16;
  REFUSED(wn_convert(&job, NULL), WN_E_USAGE, "beginning of a conversion with --to fp8");
  job.form = WN_TO_DEMO;
  REFUSED(wn_convert(&job, NULL), WN_E_USAGE, sentence);
  job = a_job(state, "other");
  job.shard_bytes = SHARD_BYTES + 1;
  REFUSED(wn_convert(&job, NULL), WN_E_USAGE, "conversion with --shard-bytes 40000");
  job = a_job(state, "other");
  job.threads = 1; /* no setting that matters */
  wn_temp_path shard = wn_temp(state, "in/model-00001-of-000002.safetensors");
  struct timespec times[2] = {source.st_mtim, source.st_mtim};
  times[1].tv_sec += 1;
  assert_int_equal(utimensat(AT_FDCWD, shard.text, times, 0), 0);
  REFUSED(wn_convert(&job, NULL), WN_E_USAGE, "of other weights, of these before they changed");
  times[1].tv_sec -= 1;
  assert_int_equal(utimensat(AT_FDCWD, shard.text, times, 0), 0);
  OK(wn_convert(&job, NULL));
  tiny_expect_same_tree(wn_temp(state, "other").text, wn_temp(state, "whole").text);
}

static void a_shard_that_is_another(void **state) {
  with_little_room(state, "changed");
  wn_convert_job job = a_job(state, "changed");
  wn_temp_path shard = wn_temp(state, first_of(state, "changed"));
  assert_int_equal(truncate(shard.text, 1000), 0);
  REFUSED(wn_convert(&job, NULL), WN_E_INPUT, "is not what this conversion writes");
}

static void what_stands_there(void **state) {
  wn_convert_job job = a_job(state, "whole");
  REFUSED(wn_convert(&job, NULL), WN_E_USAGE, "whole holds config.json already; nothing was written");
  job.out = job.in;
  REFUSED(wn_convert(&job, NULL), WN_E_USAGE, "already; nothing was written");
  job = a_job(state, "in/tokenizer.json");
  REFUSED(wn_convert(&job, NULL), WN_E_IO, "a file of that name stands there");
  OK(wn_make_dirs(wn_temp(state, "empty").text));
  wn_temp_write(wn_temp(state, "empty/.convert.json.tmp.77").text, "{", 1); /* killed before its first word was out */
  job = a_job(state, "empty");
  OK(wn_convert(&job, NULL));
  tiny_expect_same_tree(wn_temp(state, "empty").text, wn_temp(state, "whole").text);
}

static void one_process_at_a_time(void **state) {
  OK(wn_make_dirs(wn_temp(state, "locked").text));
  int fd = open(wn_temp(state, "locked").text, O_RDONLY | O_DIRECTORY);
  assert_true(fd >= 0 && flock(fd, LOCK_EX) == 0);
  wn_convert_job job = a_job(state, "locked");
  REFUSED(wn_convert(&job, NULL), WN_E_USAGE, "locked is in use");
  close(fd);
  OK(wn_convert(&job, NULL));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(goes_on),
      cmocka_unit_test(beginnings_of_other_conversions),
      cmocka_unit_test(a_shard_that_is_another),
      cmocka_unit_test(what_stands_there),
      cmocka_unit_test(one_process_at_a_time),
  };
  return cmocka_run_group_tests(tests, setup, wn_temp_teardown);
}
