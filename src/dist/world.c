/* The world and its groups: starting and ending MPI, and agreement on failures. A group is arithmetic on ranks, not a
 * communicator, so making one sends nothing and cannot hang. */
#include "dist/world.h"

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/time.h"
#include "dist/internal.h"

static int32_t env_count(const char *name) {
  const char *text = getenv(name);
  if (!text || !*text) return -1;
  long value = strtol(text, NULL, 10);
  return value > 0 && value <= INT32_MAX ? (int32_t)value : -1;
}

/* How many processes the launcher started; 1 without one; 0 when there is a launcher that does not say. A batch
 * script's own shell also has SLURM_PROCID: only a step's task count means srun. */
static int32_t launched_processes(void) {
  static const char *const counts[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"};
  for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
    if (env_count(counts[i]) > 0) return env_count(counts[i]);
  if (getenv("SLURM_PROCID") && env_count("SLURM_STEP_NUM_TASKS") > 0) return env_count("SLURM_STEP_NUM_TASKS");
  return getenv("PMIX_RANK") ? 0 : 1;
}

static wn_status start_mpi(wn_world *world, int32_t launched) {
  int initialised = 0, provided = 0, rank = 0, size = 1;
  MPI_Initialized(&initialised);
  if (initialised) return WN_FAIL(WN_E_WORLD, "MPI was initialised already: one world a process");
  setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0); /* ranks may share cores; before MPI_Init reads it */
  int code = MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided);
  if (code != MPI_SUCCESS) return WN_FAIL(WN_E_WORLD, "MPI did not start (code %d)", code);
  world->mpi = true;
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (provided < MPI_THREAD_FUNNELED)
    return WN_FAIL(WN_E_WORLD, "this MPI allows no threads beside it (level %d, needed %d)", provided,
                   MPI_THREAD_FUNNELED);
  if (launched > 0 && size != launched)
    return WN_FAIL_HINT(WN_E_WORLD, "start with the mpirun of the MPI that the program was built with",
                        "the launcher started %d processes, but MPI sees a world of %d", launched, size);
  world->rank = rank;
  world->size = size;
  return NULL;
}

static wn_status start_groups(wn_world *world) {
  world->codes = calloc((size_t)world->size, sizeof *world->codes); /* so that an agreement takes no memory */
  if (!world->codes) return WN_FAIL(WN_E_MEMORY, "out of memory for a world of %d ranks", world->size);
  world->groups[0] = (wn_group){.world = world, .size = world->size, .rank = world->rank, .step = 1};
  world->n_groups = 1;
  return NULL;
}

wn_status wn_world_create(wn_world **out, int32_t timeout_s) {
  WN_ASSERT(timeout_s > 0, "timeout of %d s", timeout_s);
  wn_world *world = calloc(1, sizeof *world);
  if (!world) return WN_FAIL(WN_E_MEMORY, "out of memory for the world");
  world->size = 1;
  world->timeout_s = timeout_s;
  int32_t launched = launched_processes();
  wn_status status = launched == 1 ? NULL : start_mpi(world, launched);
  if (!status) status = start_groups(world);
  if (status) {
    world->broken = world->mpi;
    wn_world_free(world);
    return status;
  }
  *out = world;
  return NULL;
}

wn_status wn_world_create_dry(wn_world **out, int32_t size) {
  WN_ASSERT(size > 0, "a world of %d", size);
  wn_world *world = calloc(1, sizeof *world);
  if (!world) return WN_FAIL(WN_E_MEMORY, "out of memory for the world");
  world->size = size;
  world->timeout_s = 1;
  world->dry = true;
  wn_status status = start_groups(world);
  if (status)
    wn_world_free(world);
  else
    *out = world;
  return status;
}

/* Tells every rank that this one ends, and waits for the same from them. */
static wn_status leave(wn_world *world) {
  wn_group *all = wn_world_all(world);
  wn_request *request;
  WN_TRY(wn_exchange_begin_tag(&request, all, "the end of the run", 2 * (size_t)world->size, 0, WN_EXIT_TAG));
  for (int32_t r = 0; r < world->size; r++) {
    if (r == world->rank) continue;
    WN_TRY(wn_exchange_receive(request, r, NULL, 0));
    WN_TRY(wn_exchange_send(request, r, NULL, 0));
  }
  return wn_request_wait(request);
}

void wn_world_free(wn_world *world) {
  if (!world) return;
  /* Finalising waits for every rank without a limit: only safe when all are here. Otherwise the process ends without
   * it, and the launcher stops the rest. */
  if (world->mpi && !world->broken) {
    wn_status status = world->size > 1 ? leave(world) : NULL;
    if (!status) MPI_Finalize();
    wn_status_free(status);
  }
  free(world->codes);
  free(world);
}

int32_t wn_world_rank(const wn_world *world) {
  return world->rank;
}
int32_t wn_world_size(const wn_world *world) {
  return world->size;
}

int32_t wn_world_local_rank(const wn_world *world) {
  static const char *const places[] = {"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID"};
  if (world->size == 1) return 0;
  for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
    const char *text = getenv(places[i]);
    char *end = NULL;
    long place = text && *text ? strtol(text, &end, 10) : -1;
    if (place >= 0 && place < world->size && !*end) return (int32_t)place;
  }
  return world->rank;
}

wn_group *wn_world_all(wn_world *world) {
  return &world->groups[0];
}

void wn_world_set_timeout(wn_world *world, int32_t timeout_s) {
  WN_ASSERT(timeout_s > 0, "timeout of %d s", timeout_s);
  world->timeout_s = timeout_s;
}

double wn_world_take_wait_s(wn_world *world) {
  double wait_s = world->wait_s;
  world->wait_s = 0;
  return wait_s;
}

wn_status wn_world_split(wn_world *world, wn_group **out, int32_t n_classes) {
  if (n_classes < 1 || world->size % n_classes)
    return WN_FAIL_HINT(WN_E_CONFIG, "use a number of ranks that is a multiple of it",
                        "%d ranks cannot be split into %d classes of equal size", world->size, n_classes);
  WN_ASSERT(world->n_groups < WN_MAX_GROUPS, "more than %d groups", WN_MAX_GROUPS);
  wn_group *group = &world->groups[world->n_groups];
  *group = (wn_group){.world = world,
                      .index = world->n_groups,
                      .size = world->size / n_classes,
                      .rank = world->rank / n_classes,
                      .first = world->rank % n_classes,
                      .step = n_classes};
  world->n_groups++;
  *out = group;
  return NULL;
}

int32_t wn_group_rank(const wn_group *group) {
  return group->rank;
}
int32_t wn_group_size(const wn_group *group) {
  return group->size;
}
int32_t wn_group_world_rank(const wn_group *group, int32_t place) {
  return group->first + place * group->step;
}

/* Long enough for any wn_status; cut off beyond. */
typedef struct failure_text {
  char text[1024], hint[512];
} failure_text;

static wn_status agree_among(wn_world *world, wn_status local) {
  wn_group *all = wn_world_all(world);
  int32_t *codes = world->codes, code = (int32_t)wn_status_code(local), worst = -1;
  wn_status status = wn_group_gather(all, codes, &code, sizeof code);
  for (int32_t r = 0; !status && r < world->size && worst < 0; r++)
    if (codes[r] != WN_OK) worst = r;
  if (!status && worst >= 0) {
    failure_text failure = {0};
    snprintf(failure.text, sizeof failure.text, "%s", wn_status_text(local));
    snprintf(failure.hint, sizeof failure.hint, "%s", wn_status_hint(local));
    status = wn_group_broadcast(all, &failure, sizeof failure, worst);
    if (!status)
      status = wn_fail_at(__FILE__, __LINE__, (wn_code)codes[worst], *failure.hint ? failure.hint : NULL,
                          "rank %d failed: %s", worst, failure.text);
  }
  return status;
}

wn_status wn_world_agree(wn_world *world, wn_status local) {
  if (world->size == 1) return local;
  return wn_status_first(local, agree_among(world, local));
}
