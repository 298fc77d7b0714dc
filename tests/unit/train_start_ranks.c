/* A rank that gets no memory at the start ends all of them at once, with one sentence: no collective waits for it. This
 * is a cmocka test that starts itself under mpirun. A rank makes a run again and again; in the last rank one allocation
 * after another fails, until the start needs no further one. */
#include "support/rank_exit.h"
#include "support/tiny.h"

#include <stdlib.h>
#include <sys/wait.h>

#include "base/time.h"
#include "train/run.h"

/* ---- allocations that fail ---- */

extern void *__libc_calloc(size_t n, size_t size);
extern char __executable_start, etext;

/* Only what this program's own code asks for, not MPI's or a library's, and not the small requests that messages
 * between ranks are made of: a message that cannot be sent is no outcome to agree on. */
enum { LEAST_BYTES = 300 };
static int64_t fails_after = -1; /* such allocations from now on that are served; -1: all */

void *calloc(size_t n, size_t size) {
  const char *caller = __builtin_return_address(0);
  bool ours = caller >= &__executable_start && caller < &etext && n * size >= LEAST_BYTES;
  if (ours && fails_after >= 0 && fails_after-- == 0) return NULL;
  return __libc_calloc(n, size);
}

/* ---- what a rank does ---- */

/* Whether the start needed more than `served` of the last rank's allocations. */
static wn_status start(wn_world *world, const char *dir, int64_t served, bool *failed) {
  char path[WN_PATH_BYTES], init[WN_PATH_BYTES], run_dir[WN_PATH_BYTES];
  wn_job *job = malloc(sizeof *job);
  wn_job_source *source;
  wn_run *run = NULL;
  int64_t failures;
  const wn_recipe recipe = {.stage = WN_STAGE_WARMUP, .train_indexer = true, .layer_major = true};
  WN_ASSERT(job, "no memory for the test");
  WN_TRY(wn_path(path, "%s/job.yaml", dir));
  WN_TRY(wn_path(init, "init=%s/base", dir));
  WN_TRY(wn_path(run_dir, "run_dir=%s/run", dir));
  const char *overrides[] = {init, run_dir};
  WN_TRY(wn_job_load(job, &source, WN_STAGE_WARMUP, path, overrides, 2));
  if (wn_world_rank(world) == wn_world_size(world) - 1) fails_after = served;
  double before = wn_time_s();
  wn_status status = wn_run_create(&run, recipe, job, source, world, NULL);
  fails_after = -1;
  double seconds = wn_time_s() - before;
  failures = *failed = status != NULL;
  if (status && (wn_status_code(status) != WN_E_MEMORY || seconds > 5)) {
    fprintf(stderr, "rank %d, %lld served, %.1f s: %s\n", wn_world_rank(world), (long long)served, seconds,
            wn_status_text(status));
    return status;
  }
  wn_status_free(status);
  if (!*failed) wn_run_free(run);
  wn_job_source_free(source);
  free(job);
  WN_TRY(wn_group_sum_i64(wn_world_all(world), &failures, 1));
  return failures == 0 || failures == wn_world_size(world)
             ? NULL
             : WN_FAIL(WN_E_CHECK, "%lld ranks failed", (long long)failures);
}

static int rank_main(const char *dir) {
  wn_world *world = NULL;
  wn_status status = wn_world_create(&world, 20);
  bool failed = true;
  int64_t served = 0;
  for (; !status && failed; served++) status = start(world, dir, served, &failed);
  if (!status && wn_world_rank(world) == 0) printf("failed %lld times\n", (long long)served - 1);
  return wn_rank_exit(world, status);
}

/* ---- what the test does ---- */

static const char *self;

static void no_rank_waits_for_one_without_memory(void **state) {
  char command[1024], text[8192];
  snprintf(command, sizeof command, "timeout 100 mpirun --allow-run-as-root --oversubscribe -np 2 '%s' '%s' 2>&1", self,
           (const char *)*state);
  FILE *pipe = popen(command, "r");
  assert_non_null(pipe);
  size_t got = fread(text, 1, sizeof text - 1, pipe);
  text[got] = 0;
  int ended = pclose(pipe);
  if (!WIFEXITED(ended) || WEXITSTATUS(ended) != 0) fail_msg("%s", text);
  const char *times = strstr(text, "failed ");
  if (!times || strtoll(times + 7, NULL, 10) < 20) fail_msg("%s", text);
  print_message("%s", times);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(no_rank_waits_for_one_without_memory)};
  if (argc > 1) return rank_main(argv[1]);
  self = argv[0];
  return cmocka_run_group_tests(tests, tiny_setup, wn_temp_teardown);
}
