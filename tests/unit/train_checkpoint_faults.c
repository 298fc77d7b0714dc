/* What can go wrong with a checkpoint: damage, kill -9 in the middle of a save, a full disk, a directory that cannot
 * be. */
#include "support/checkpoint.h"
#include "support/one_world.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>

static const wn_param_settings settings = {.train_base = true, .train_indexer = true, .file_dtype = WN_BF16};

static wn_status save_step(test_rig *rig, int64_t step) {
  wn_state at = test_state;
  at.step = step;
  WN_TRY(test_values(rig, TEST_FILL, (uint64_t)step, false, false));
  return wn_checkpoint_save(&rig->plan, &at);
}

/* Warnings are wanted in the log's file, not on the test's output. */
static wn_status newest_quietly(test_rig *rig, char path[WN_PATH_BYTES], bool *found) {
  fflush(stderr);
  int kept = dup(STDERR_FILENO), nowhere = open("/dev/null", O_WRONLY);
  dup2(nowhere, STDERR_FILENO);
  wn_status status = wn_checkpoint_newest(&rig->plan, path, found);
  fflush(stderr);
  dup2(kept, STDERR_FILENO);
  close(kept);
  close(nowhere);
  return status;
}

/* The newest checkpoint is whole, and holds exactly what was saved at its step. */
static int64_t newest_step(test_rig *rig) {
  char path[WN_PATH_BYTES];
  bool found;
  wn_state read;
  OK(newest_quietly(rig, path, &found));
  if (!found) return -1;
  OK(wn_checkpoint_load(&rig->plan, path, &read));
  OK(test_values(rig, TEST_COMPARE, (uint64_t)read.step, false, false));
  return read.step;
}

static size_t entries(const char *dir) {
  char **names;
  size_t n;
  OK(wn_list_dir(&names, &n, dir));
  wn_list_free(names, n);
  return n;
}

/* ---- damage ---- */

typedef enum damage { FLIP, CUT, GROW, REMOVE, EXTRA, UNLISTED, NO_MANIFEST, N_DAMAGES } damage;

static void do_damage(damage what, const char *dir, const char *name) {
  char path[WN_PATH_BYTES], to[WN_PATH_BYTES];
  struct stat info;
  OK(wn_path(path, "%s/%s", dir, name));
  assert_int_equal(stat(path, &info), 0);
  if (what == FLIP) wn_temp_flip(path, 1 + (long)info.st_size / 2, 0x10);
  if (what == CUT) assert_int_equal(truncate(path, info.st_size - 1), 0);
  if (what == GROW) assert_int_equal(truncate(path, info.st_size + 1), 0);
  if (what == REMOVE) assert_int_equal(unlink(path), 0);
  OK(wn_path(to, "%s/other", dir));
  if (what == EXTRA) wn_temp_write(to, "x", 1);
  if (what == UNLISTED) assert_int_equal(rename(path, to), 0);
  OK(wn_path(to, "%s/" WN_MANIFEST_NAME, dir));
  if (what == NO_MANIFEST) assert_int_equal(unlink(to), 0);
}

static void expect_logged(const char *log_path, const char *part) {
  char *text;
  OK(wn_read_file(&text, NULL, log_path, 1 << 20));
  if (!strstr(text, part)) fail_msg("the log does not say '%s': %s", part, text);
  free(text);
}

/* The last file of the directory whose name begins so. */
static void full_name(char out[WN_FILE_NAME_BYTES], const char *dir, const char *beginning) {
  char **names;
  size_t n;
  out[0] = 0;
  OK(wn_list_dir(&names, &n, dir));
  for (size_t i = 0; i < n; i++)
    if (!strncmp(names[i], beginning, strlen(beginning))) snprintf(out, WN_FILE_NAME_BYTES, "%s", names[i]);
  wn_list_free(names, n);
  assert_true(out[0] != 0);
}

/* Each kind of damage to each kind of file: verify says which file, newest warns and takes the one before. */
static void damage_falls_back(void **state) {
  static const char *const names[] = {"model-0",     "optimizer-0", "state.json",
                                      "config.json", WN_INDEX_NAME, WN_MANIFEST_NAME};
  static const char *const says[N_DAMAGES] = {"differs from its digest",
                                              "bytes long; MANIFEST.json lists",
                                              "bytes long; MANIFEST.json lists",
                                              "is missing",
                                              "other is not listed in",
                                              "other is not listed in",
                                              "cannot open"};
  test_rig rig;
  wn_log *log;
  char dir[WN_PATH_BYTES], name[WN_FILE_NAME_BYTES], log_path[300];
  snprintf(log_path, sizeof log_path, "%s", wn_temp(state, "log.txt").text);
  OK(test_rig_create(&rig, world, &test_config, settings, WN_STAGE_ADAPT, *state, ""));
  OK(save_step(&rig, 1));
  OK(wn_log_create(&log, (wn_log_settings){.rank = 1, .quiet = true}));
  OK(wn_log_open_file(log, log_path));
  OK(wn_path(dir, "%s/checkpoints/step-000002", (const char *)*state));
  for (damage what = FLIP; what < N_DAMAGES; what++)
    for (size_t f = 0; f < sizeof names / sizeof *names; f++) {
      bool manifest = !strcmp(names[f], WN_MANIFEST_NAME);
      if (manifest && what != FLIP && what != CUT) continue;
      if (f > 0 && what != FLIP && what != CUT && what != REMOVE)
        continue; /* every kind once, the likely ones to every file */
      rig.plan.log = NULL;
      OK(save_step(&rig, 2));
      assert_int_equal(newest_step(&rig), 2);
      rig.plan.log = log;
      full_name(name, dir, names[f]);
      do_damage(what, dir, name);
      REFUSED(wn_checkpoint_verify(dir), what == NO_MANIFEST ? WN_E_IO : WN_E_INPUT,
              manifest ? WN_MANIFEST_NAME : says[what]);
      assert_int_equal(newest_step(&rig), 1);
      expect_logged(log_path, "passing over a damaged checkpoint");
      if (what < REMOVE && !manifest) expect_logged(log_path, name);
    }
  wn_log_free(log);
  test_rig_free(&rig);
}

/* With nothing whole left the run does not start anew in silence. */
static void nothing_whole_is_refused(void **state) {
  test_rig rig;
  char dir[WN_PATH_BYTES];
  bool found;
  OK(test_rig_create(&rig, world, &test_config, settings, WN_STAGE_ADAPT, *state, ""));
  for (int64_t step = 1; step <= 2; step++) {
    OK(save_step(&rig, step));
    OK(wn_path(dir, "%s/checkpoints/" WN_STEP_FORMAT, (const char *)*state, (long long)step));
    do_damage(FLIP, dir, "config.json");
  }
  REFUSED(wn_checkpoint_newest(&rig.plan, dir, &found), WN_E_INPUT, "holds no whole checkpoint; the newest: ");
  REFUSED(wn_checkpoint_newest(&rig.plan, dir, &found), WN_E_INPUT, "step-000002/config.json");
  test_rig_free(&rig);
}

/* Every byte of every file counts, headers, padding and the manifest itself too: flips at 100 places. */
static void any_byte_counts(void **state) {
  test_rig rig;
  char dir[WN_PATH_BYTES], path[WN_PATH_BYTES], **names;
  size_t n;
  struct stat info;
  OK(test_rig_create(&rig, world, &test_config, settings, WN_STAGE_ADAPT, *state, ""));
  OK(save_step(&rig, 1));
  OK(wn_path(dir, "%s/checkpoints/step-000001", (const char *)*state));
  OK(wn_list_dir(&names, &n, dir));
  for (uint64_t i = 0; i < 100; i++) {
    const char *name = names[wn_rng_below(1, WN_RNG_TEST, 2 * i, n)];
    if (!strcmp(name, WN_MANIFEST_NAME)) continue; /* a flipped blank between its tokens says the same */
    OK(wn_path(path, "%s/%s", dir, name));
    assert_int_equal(stat(path, &info), 0);
    long from_end = 1 + (long)wn_rng_below(1, WN_RNG_TEST, 2 * i + 1, (uint64_t)info.st_size);
    wn_temp_flip(path, from_end, 0x10);
    REFUSED(wn_checkpoint_verify(dir), WN_E_INPUT, name);
    wn_temp_flip(path, from_end, 0x10);
  }
  OK(wn_checkpoint_verify(dir));
  wn_list_free(names, n);
  test_rig_free(&rig);
}

/* ---- kill -9 ---- */

/* Saves steps from `first` on, each of them twice (the second replaces the first), and tells each through the pipe. */
static void saver(const char *run, int64_t first, int pipe_end) {
  test_rig rig;
  wn_status status = test_rig_create(&rig, world, &test_config, settings, WN_STAGE_ADAPT, run, "");
  rig.plan.keep = 2;
  for (int64_t step = first; !status; step++)
    for (int32_t twice = 0; !status && twice < 2; twice++) {
      status = save_step(&rig, step);
      if (!status && write(pipe_end, &step, sizeof step) != sizeof step) _exit(3);
    }
  fprintf(stderr, "%s\n", wn_status_text(status));
  _exit(2);
}

static void kills(void **state) {
  enum { KILLS = 30 };
  test_rig rig;
  int64_t told = 0, mid_save = 0;
  char checkpoints[WN_PATH_BYTES];
  OK(wn_path(checkpoints, "%s/checkpoints", (const char *)*state));
  OK(test_rig_create(&rig, world, &test_config, settings, WN_STAGE_ADAPT, *state, ""));
  for (uint64_t i = 0; i < KILLS; i++) {
    int ends[2], ended;
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    if (child == 0) {
      close(ends[0]);
      saver(*state, told + 1, ends[1]);
    }
    close(ends[1]);
    int64_t step, before = told;
    if (i == 0 || wn_rng_below(7, WN_RNG_TEST, 2 * i, 4) == 0)
      assert_int_equal(read(ends[0], &told, sizeof told), sizeof told);
    long wait_us = (long)wn_rng_below(7, WN_RNG_TEST, 2 * i + 1, 60000);
    nanosleep(&(struct timespec){.tv_nsec = 1000 * wait_us}, NULL);
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, &ended, 0), child);
    assert_true(WIFSIGNALED(ended) && WTERMSIG(ended) == SIGKILL);
    while (read(ends[0], &step, sizeof step) == sizeof step) told = step;
    close(ends[0]);
    char **names;
    size_t n;
    OK(wn_list_dir(&names, &n, checkpoints));
    for (size_t k = 0; k < n; k++) mid_save += names[k][0] == '.';
    wn_list_free(names, n);
    /* the newest is whole and no older than the last that was told; it may be one that there was no time to tell */
    int64_t newest = newest_step(&rig);
    if (newest < told || newest > told + 1)
      fail_msg("kill %d: told %lld (before %lld), newest %lld", (int)i, (long long)told, (long long)before,
               (long long)newest);
    assert_true(entries(checkpoints) <= 3); /* keep 2, and one more when the retention was not reached */
    told = newest;
  }
  print_message("%d kills, %lld of them in the middle of a save; %lld steps saved\n", KILLS, (long long)mid_save,
                (long long)told);
  assert_true(mid_save > 0);
  test_rig_free(&rig);
}

/* ---- a disk that is full, a place that cannot be ---- */

/* The save fails with one sentence, leaves nothing behind, and the earlier checkpoint stands. */
static void expect_failed_save(test_rig *rig, const char *run, const char *sentence) {
  char checkpoints[WN_PATH_BYTES];
  OK(wn_path(checkpoints, "%s/checkpoints", run));
  REFUSED(save_step(rig, 2), WN_E_IO, sentence);
  assert_int_equal(entries(checkpoints), 1);
}

static void file_too_large(void **state) {
  test_rig rig;
  struct rlimit limit, small;
  OK(test_rig_create(&rig, world, &test_config, settings, WN_STAGE_ADAPT, *state, ""));
  OK(save_step(&rig, 1));
  assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
  void (*before)(int) = signal(SIGXFSZ, SIG_IGN);
  for (rlim_t bytes = 256; bytes < 6000; bytes *= 2) {
    small = (struct rlimit){.rlim_cur = bytes, .rlim_max = limit.rlim_max};
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    expect_failed_save(&rig, *state, "File too large");
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
  }
  signal(SIGXFSZ, before);
  assert_int_equal(newest_step(&rig), 1);
  OK(save_step(&rig, 2));
  assert_int_equal(newest_step(&rig), 2);
  test_rig_free(&rig);
}

/* A real file system that runs out of room: a tmpfs with room for one checkpoint and a part of the next. */
static void disk_full(void **state) {
  test_rig rig;
  wn_temp_path disk = wn_temp(state, "disk"), ballast = wn_temp(state, "disk/ballast");
  assert_int_equal(mkdir(disk.text, 0777), 0);
  if (mount("tmpfs", disk.text, "tmpfs", 0, "size=1m") != 0) {
    print_message("skipped: cannot mount a tmpfs: %s\n", strerror(errno));
    skip();
  }
  OK(test_rig_create(&rig, world, &test_config, settings, WN_STAGE_ADAPT, disk.text, ""));
  OK(save_step(&rig, 1));
  char *page = calloc(1, 4096);
  FILE *file = fopen(ballast.text, "wb");
  assert_true(file && page);
  while (fwrite(page, 4096, 1, file) == 1 && fflush(file) == 0) continue;
  int fd = fileno(file);
  struct stat info;
  assert_int_equal(fstat(fd, &info), 0);
  for (long free_pages = 0; free_pages < 40; free_pages += 3) {
    assert_int_equal(ftruncate(fd, info.st_size / 4096 * 4096 - 4096 * free_pages), 0);
    wn_status status = save_step(&rig, 2);
    if (!status) { /* it fits by now */
      assert_true(free_pages > 6);
      break;
    }
    REFUSED(status, WN_E_IO, "No space left on device");
    char checkpoints[WN_PATH_BYTES];
    OK(wn_path(checkpoints, "%s/checkpoints", disk.text));
    assert_int_equal(entries(checkpoints), 1);
    assert_int_equal(newest_step(&rig), 1);
  }
  fclose(file);
  unlink(ballast.text);
  OK(save_step(&rig, 3));
  assert_int_equal(newest_step(&rig), 3);
  free(page);
  test_rig_free(&rig);
  assert_int_equal(umount(disk.text), 0);
}

static void a_place_that_cannot_be(void **state) {
  test_rig rig;
  wn_temp_path file = wn_temp(state, "file");
  wn_temp_write(file.text, "x", 1);
  OK(test_rig_create(&rig, world, &test_config, settings, WN_STAGE_ADAPT, file.text, ""));
  REFUSED(save_step(&rig, 1), WN_E_IO, "cannot create directory");
  wn_temp_path run = wn_temp(state, "run"), beneath = wn_temp(state, "run/checkpoints");
  assert_int_equal(mkdir(run.text, 0777), 0);
  wn_temp_write(beneath.text, "x", 1);
  rig.plan.run_dir = run.text;
  REFUSED(save_step(&rig, 1), WN_E_IO, "a file of that name stands there");
  test_rig_free(&rig);
}

static void a_read_only_place(void **state) {
  test_rig rig;
  wn_temp_path disk = wn_temp(state, "disk");
  assert_int_equal(mkdir(disk.text, 0777), 0);
  if (mount("tmpfs", disk.text, "tmpfs", 0, "size=1m") != 0) {
    print_message("skipped: cannot mount a tmpfs: %s\n", strerror(errno));
    skip();
  }
  OK(test_rig_create(&rig, world, &test_config, settings, WN_STAGE_ADAPT, disk.text, ""));
  OK(save_step(&rig, 1));
  assert_int_equal(mount(NULL, disk.text, NULL, MS_REMOUNT | MS_RDONLY, NULL), 0);
  expect_failed_save(&rig, disk.text, "Read-only file system");
  assert_int_equal(newest_step(&rig), 1);
  test_rig_free(&rig);
  assert_int_equal(umount(disk.text), 0);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEMP_TEST(damage_falls_back),      TEMP_TEST(nothing_whole_is_refused),
      TEMP_TEST(any_byte_counts),        TEMP_TEST(kills),
      TEMP_TEST(file_too_large),         TEMP_TEST(disk_full),
      TEMP_TEST(a_place_that_cannot_be), TEMP_TEST(a_read_only_place),
  };
  return cmocka_run_group_tests(tests, make_world, free_world);
}
