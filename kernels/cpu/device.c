/* The CPU device: four arenas, roles as dtypes, thread counts. One place sets both OpenMP and OpenBLAS, because
 * OpenBLAS's own threads would make the order of sums depend on their number. */
#include "kernels/cpu/cpu.h"

#include <omp.h>
#include <stdlib.h>
#include <unistd.h>

#include "kernels/cpu/operations.h"

/* Part of the arithmetic (sums over chunks), so it follows nothing at run time. */
enum { CHUNK_ROWS = 256 };
/* Real memory, of which little is touched. */
static const size_t dry_host_bytes = (size_t)1 << 40;

static size_t capacity(size_t wanted) {
  static const size_t unknown_machine_bytes = (size_t)64 << 30;
  long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGE_SIZE);
  if (wanted) return wanted;
  return pages > 0 && page_bytes > 0 ? (size_t)pages * (size_t)page_bytes : unknown_machine_bytes;
}

static void free_device(wn_device *device) {
  if (!device) return;
  wn_arena_free(device->weights);
  wn_arena_free(device->stash);
  wn_arena_free(device->scratch);
  wn_arena_free(device->host);
  free(device);
}

static wn_status make_arena(wn_arena **out, const char *name, size_t wanted, bool dry) {
  return dry ? wn_arena_create_counting(out, name, 0) : wn_arena_create(out, name, capacity(wanted));
}

static wn_status create(wn_device **out, wn_cpu_settings settings) {
  WN_ASSERT(settings.threads >= 0, "threads %d", settings.threads);
  wn_status status = NULL;
  wn_device *device = calloc(1, sizeof *device);
  if (!device) return WN_FAIL(WN_E_MEMORY, "no memory for the device (%zu bytes)", sizeof *device);
  WN_TRY_GOTO(status, fail, make_arena(&device->weights, "weights", settings.weights_bytes, settings.dry));
  WN_TRY_GOTO(status, fail, make_arena(&device->stash, "stash", settings.stash_bytes, settings.dry));
  WN_TRY_GOTO(status, fail, make_arena(&device->scratch, "scratch", settings.scratch_bytes, settings.dry));
  WN_TRY_GOTO(status, fail, wn_arena_create(&device->host, "host", settings.dry ? dry_host_bytes : capacity(0)));
  device->kind = WN_CPU;
  device->dry = settings.dry;
  device->ops = &WN_CPU(ops);
  for (int32_t role = 0; role < WN_N_ROLES; role++) device->dtype_of[role] = WN_REAL_DTYPE;
  device->dtype_of[WN_INDEX] = WN_I32;
  device->chunk_rows = CHUNK_ROWS;
  device->head_tile = 1;
  device->threads = settings.threads ? settings.threads : omp_get_num_procs();
  omp_set_num_threads(device->threads);
  openblas_set_num_threads(1);
  *out = device;
  return NULL;
fail:
  free_device(device);
  return status;
}

wn_status WN_CPU(create)(wn_device **out, wn_cpu_settings settings) {
  return create(out, settings);
}

void WN_CPU(free)(wn_device *device) {
  free_device(device);
}
