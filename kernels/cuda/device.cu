/* The CUDA device: the GPU checked and named, two queues, arenas whose pages are mapped as they are first needed, and
 * checked calls. The driver's own functions are asked for by name at run time, so that the program starts on machines
 * without a driver. */
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/pace.cuh"

extern "C" {
#include "base/time.h"
#include "kernels/cuda/card.h"
}

enum {
  LEAST_MAJOR = 9,
  CHUNK_ROWS = 4096,
  HEAD_TILE = 64,
  BLAS_WORKSPACE_BYTES = 64 << 20,
  HOPPER_SHARED_BYTES = 227 << 10
};
/* The host is at most 128 operations ahead; most are one or two launches, few more than ten. */
enum { PACES = 8, OPERATIONS_A_PACE = 16 };
static const size_t page_bytes = (size_t)32 << 20;

/* GPUs that this process has open: it alone decides whether there is a context to ask. */
static int32_t n_open;
bool wn_cuda_opened(void) {
  return n_open > 0;
}

wn_status wn_cuda_check(cudaError_t error, const char *call, const char *file, int line) {
  if (error == cudaSuccess) return NULL;
  return wn_fail_at(file, line, error == cudaErrorMemoryAllocation ? WN_E_MEMORY : WN_E_DEVICE, NULL,
                    "the GPU failed: %s: %s", call, cudaGetErrorString(error));
}

wn_status wn_cublas_check(cublasStatus_t error, const char *call, const char *file, int line) {
  if (error == CUBLAS_STATUS_SUCCESS) return NULL;
  return wn_fail_at(file, line, WN_E_DEVICE, NULL, "cuBLAS failed: %s: %s", call, cublasGetStatusString(error));
}

void wn_cuda_expect(const char *name, const wn_tensor *t, wn_dtype dtype, int32_t rank, int64_t d0, int64_t d1,
                    int64_t d2) {
  const int64_t dim[3] = {d0, d1, d2};
  WN_ASSERT(t, "%s is absent", name);
  bool ok = t->dtype == dtype && t->rank == rank;
  for (int32_t i = 0; ok && i < rank; i++) ok = t->dim[i] == dim[i];
  ok = ok && (rank == 1 || t->dim[rank - 1] <= 1 || t->stride[rank - 1] == 1);
  WN_ASSERT(ok, "%s is %s of rank %d [%lld,%lld,%lld], last stride %lld; expected %s of rank %d [%lld,%lld,%lld]", name,
            wn_dtype_name(t->dtype), t->rank, (long long)t->dim[0], (long long)t->dim[1], (long long)t->dim[2],
            (long long)t->stride[t->rank - 1], wn_dtype_name(dtype), rank, (long long)d0, (long long)d1, (long long)d2);
}

/* ---- virtual memory ---- */

typedef struct driver {
  decltype(&cuMemAddressReserve) reserve;
  decltype(&cuMemAddressFree) free_address;
  decltype(&cuMemCreate) create;
  decltype(&cuMemRelease) release;
  decltype(&cuMemMap) map;
  decltype(&cuMemUnmap) unmap;
  decltype(&cuMemSetAccess) set_access;
} driver;

wn_status wn_cuda_entry_point(const char *name, void **out) {
  cudaDriverEntryPointQueryResult found;
  WN_CUDA_TRY(cudaGetDriverEntryPointByVersion(name, out, 12000, cudaEnableDefault, &found));
  if (found == cudaDriverEntryPointSuccess) return NULL;
  return WN_FAIL_HINT(WN_E_DEVICE, "install a newer driver", "the GPU's driver has no %s", name);
}

static wn_status load_driver(driver *d) {
  WN_TRY(wn_cuda_entry_point("cuMemAddressReserve", (void **)&d->reserve));
  WN_TRY(wn_cuda_entry_point("cuMemAddressFree", (void **)&d->free_address));
  WN_TRY(wn_cuda_entry_point("cuMemCreate", (void **)&d->create));
  WN_TRY(wn_cuda_entry_point("cuMemRelease", (void **)&d->release));
  WN_TRY(wn_cuda_entry_point("cuMemMap", (void **)&d->map));
  WN_TRY(wn_cuda_entry_point("cuMemUnmap", (void **)&d->unmap));
  return wn_cuda_entry_point("cuMemSetAccess", (void **)&d->set_access);
}

/* The device with what only this file needs. */
typedef struct whole_device {
  wn_cuda cuda; /* first */
  bool open;    /* counted in n_open */
  driver driver;
  cudaEvent_t timer[2];    /* start, stop */
  cudaEvent_t pace[PACES]; /* on the compute queue, one every OPERATIONS_A_PACE */
  int64_t n_operations;    /* asked for so far */
} whole_device;

static wn_status reserve_pages(void *context, void **base, size_t bytes) {
  whole_device *d = (whole_device *)context;
  CUdeviceptr at = 0;
  CUresult result = d->driver.reserve(&at, bytes, 0, 0, 0);
  if (result != CUDA_SUCCESS)
    return WN_FAIL(WN_E_MEMORY, "cannot reserve %zu bytes of the GPU's address space (error %d)", bytes, (int)result);
  *base = (void *)at;
  return NULL;
}

static CUmemAllocationProp page_kind(int ordinal) {
  CUmemAllocationProp kind = {};
  kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  kind.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  kind.location.id = ordinal;
  return kind;
}

static wn_status commit_pages(void *context, const char *name, void *base, size_t from, size_t to) {
  whole_device *d = (whole_device *)context;
  CUmemAllocationProp kind = page_kind(d->cuda.ordinal);
  CUdeviceptr at = (CUdeviceptr)base + from;
  CUmemGenericAllocationHandle pages;
  CUresult result = d->driver.create(&pages, to - from, &kind, 0);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    size_t left = 0, total = 0;
    WN_CUDA_TRY(cudaMemGetInfo(&left, &total));
    return WN_FAIL_HINT(WN_E_MEMORY,
                        "lower data.seq_len or training.micro_batch_seqs, set training.keep: inputs, use more "
                        "GPUs, or see what "
                        "else runs there",
                        "%s is full: the %s arena wants %.2f GiB more, %.2f of %.2f GiB are left", d->cuda.name, name,
                        (double)(to - from) / (1 << 30), (double)left / (1 << 30), (double)total / (1 << 30));
  }
  if (result == CUDA_SUCCESS) result = d->driver.map(at, to - from, 0, pages, 0);
  if (result == CUDA_SUCCESS) {
    CUmemAccessDesc access = {kind.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    result = d->driver.set_access(at, to - from, &access, 1);
    d->driver.release(pages); /* the mapping keeps them */
  }
  if (result != CUDA_SUCCESS)
    return WN_FAIL(WN_E_DEVICE, "mapping %zu bytes for the %s arena failed (error %d)", to - from, name, (int)result);
  d->cuda.committed_bytes += to - from;
  return NULL;
}

static void release_pages(void *context, void *base, size_t reserved, size_t committed) {
  whole_device *d = (whole_device *)context;
  if (committed) d->driver.unmap((CUdeviceptr)base, committed);
  d->driver.free_address((CUdeviceptr)base, reserved);
  d->cuda.committed_bytes -= committed;
}

/* ---- the device ---- */

int32_t wn_cuda_count(const char **why) {
  int n = 0;
  cudaError_t error = cudaGetDeviceCount(&n);
  if (error != cudaSuccess) (void)cudaGetLastError();
  if (why) {
    *why = cudaGetErrorString(error);
    if (error == cudaSuccess) *why = "this machine has no GPU";
    if (error == cudaErrorInsufficientDriver) *why = "this machine has no GPU driver, or one older than CUDA 13.0";
  }
  return error == cudaSuccess ? n : 0;
}

wn_status wn_cuda_card_of(wn_cuda_card *out, int32_t ordinal) {
  cudaDeviceProp p;
  const char *why;
  int32_t n = wn_cuda_count(&why);
  if (n == 0) return WN_FAIL_HINT(WN_E_DEVICE, "use device: cpu", "no GPU can be used: %s", why);
  if (ordinal < 0 || ordinal >= n)
    return WN_FAIL_HINT(WN_E_DEVICE, "start one process per GPU",
                        "GPU %d is wanted, but this process sees %d (numbered from 0)", ordinal, n);
  WN_CUDA_TRY(cudaGetDeviceProperties(&p, ordinal));
  if (p.major != LEAST_MAJOR || p.minor != 0) /* machine code for wgmma runs on 9.0 alone */
    return WN_FAIL_HINT(WN_E_DEVICE, "use device: cpu, or a Hopper GPU (H100, H200, GH200)",
                        "%s has compute capability %d.%d; this build needs 9.0", p.name, p.major, p.minor);
  snprintf(out->name, sizeof out->name, "%s", p.name);
  out->multiprocessors = p.multiProcessorCount;
  out->memory_bytes = p.totalGlobalMem;
  out->block_shared_bytes = p.sharedMemPerBlockOptin;
  return NULL;
}

static wn_status check_gpu(wn_cuda *c, int32_t ordinal) {
  wn_cuda_card card;
  WN_TRY(wn_cuda_card_of(&card, ordinal));
  snprintf(c->name, sizeof c->name, "%s, %d multiprocessors, %.1f GiB", card.name, card.multiprocessors,
           (double)card.memory_bytes / (1 << 30));
  c->ordinal = ordinal;
  c->n_sms = card.multiprocessors;
  c->total_bytes = card.memory_bytes;
  c->block_shared_bytes = card.block_shared_bytes;
  return NULL;
}

static wn_status make_host_arena(wn_device *device) {
  return wn_arena_create(&device->host, "host", (size_t)1 << 38);
}

static wn_status make_arenas(whole_device *d, wn_cuda_settings settings) {
  wn_cuda *c = &d->cuda;
  wn_memory pages = {d, page_bytes, reserve_pages, commit_pages, release_pages};
  const size_t all = c->total_bytes;
  WN_TRY(
      wn_arena_create_in(&c->device.weights, "weights", settings.weights_bytes ? settings.weights_bytes : all, &pages));
  WN_TRY(wn_arena_create_in(&c->device.stash, "stash", settings.stash_bytes ? settings.stash_bytes : all, &pages));
  WN_TRY(
      wn_arena_create_in(&c->device.scratch, "scratch", settings.scratch_bytes ? settings.scratch_bytes : all, &pages));
  return make_host_arena(&c->device);
}

static wn_status allocate_workspace(wn_device *device, void **out) {
  return wn_arena_alloc(device->weights, out, "cuBLAS workspace", BLAS_WORKSPACE_BYTES);
}

static wn_status start(whole_device *d, wn_cuda_settings settings) {
  wn_cuda *c = &d->cuda;
  WN_TRY(check_gpu(c, settings.ordinal));
  WN_CUDA_TRY(cudaSetDevice(settings.ordinal));
  WN_CUDA_TRY(cudaFree(NULL)); /* makes the context */
  d->open = true;
  n_open++;
  WN_TRY(load_driver(&d->driver));
  WN_CUDA_TRY(cudaStreamCreateWithFlags(&c->compute, cudaStreamNonBlocking));
  WN_CUDA_TRY(cudaStreamCreateWithFlags(&c->comm, cudaStreamNonBlocking));
  for (int i = 0; i < 2; i++) {
    WN_CUDA_TRY(cudaMallocHost(&c->pinned[i], WN_PINNED_BYTES));
    WN_CUDA_TRY(cudaEventCreateWithFlags(&c->staged[i], cudaEventDisableTiming));
    WN_CUDA_TRY(cudaEventCreate(&d->timer[i]));
  }
  for (int i = 0; i < PACES; i++) WN_CUDA_TRY(cudaEventCreateWithFlags(&d->pace[i], cudaEventDisableTiming));
  WN_TRY(make_arenas(d, settings));
  void *workspace;
  WN_TRY(allocate_workspace(&c->device, &workspace));
  WN_CUBLAS_TRY(cublasCreate(&c->blas));
  WN_CUBLAS_TRY(cublasSetStream(c->blas, c->compute));
  /* one queue and a workspace of our own: cuBLAS then repeats bit for bit */
  WN_CUBLAS_TRY(cublasSetWorkspace(c->blas, workspace, BLAS_WORKSPACE_BYTES));
  WN_CUBLAS_TRY(cublasSetMathMode(c->blas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
  return NULL;
}

static whole_device *describe(int32_t threads) {
  whole_device *d = (whole_device *)calloc(1, sizeof *d);
  if (!d) return NULL;
  wn_device *device = &d->cuda.device;
  device->kind = WN_CUDA;
  device->ops = &wn_cuda_ops;
  for (int role = 0; role < WN_N_ROLES; role++) device->dtype_of[role] = WN_F32;
  device->dtype_of[WN_ACT] = WN_BF16;
  device->dtype_of[WN_INDEX] = WN_I32;
  device->chunk_rows = CHUNK_ROWS;
  device->head_tile = HEAD_TILE;
  device->threads = threads > 0 ? threads : 1;
  return d;
}

wn_status wn_cuda_create(wn_device **out, wn_cuda_settings settings) {
  whole_device *d = describe(settings.threads);
  if (!d) return WN_FAIL(WN_E_MEMORY, "no memory for the device (%zu bytes)", sizeof *d);
  wn_status status = start(d, settings);
  if (status) {
    wn_cuda_free(&d->cuda.device);
    return status;
  }
  *out = &d->cuda.device;
  return NULL;
}

static wn_status start_dry(wn_device *device) {
  void *workspace;
  WN_TRY(wn_arena_create_counting(&device->weights, "weights", page_bytes));
  WN_TRY(wn_arena_create_counting(&device->stash, "stash", page_bytes));
  WN_TRY(wn_arena_create_counting(&device->scratch, "scratch", page_bytes));
  WN_TRY(make_host_arena(device));
  return allocate_workspace(device, &workspace);
}

wn_status wn_cuda_create_dry(wn_device **out, int32_t multiprocessors, int32_t threads) {
  whole_device *d = describe(threads);
  if (!d) return WN_FAIL(WN_E_MEMORY, "no memory for the device (%zu bytes)", sizeof *d);
  d->cuda.device.dry = true;
  d->cuda.n_sms = multiprocessors;
  d->cuda.block_shared_bytes = HOPPER_SHARED_BYTES;
  d->cuda.compute = wn_cuda_dry_queue();
  wn_status status = start_dry(&d->cuda.device);
  if (status) {
    wn_cuda_free(&d->cuda.device);
    return status;
  }
  *out = &d->cuda.device;
  return NULL;
}

void wn_cuda_free(wn_device *device) {
  if (!device) return;
  wn_cuda *c = wn_cuda_of(device);
  if (device->dry) c->compute = NULL;
  if (c->compute) cudaStreamSynchronize(c->compute);
  if (c->comm) cudaStreamSynchronize(c->comm);
  if (c->blas) cublasDestroy(c->blas);
  for (int i = 0; i < 2; i++) {
    if (c->pinned[i]) cudaFreeHost(c->pinned[i]);
    if (c->staged[i]) cudaEventDestroy(c->staged[i]);
    if (((whole_device *)c)->timer[i]) cudaEventDestroy(((whole_device *)c)->timer[i]);
  }
  for (int i = 0; i < PACES; i++)
    if (((whole_device *)c)->pace[i]) cudaEventDestroy(((whole_device *)c)->pace[i]);
  if (c->compute) cudaStreamDestroy(c->compute);
  if (c->comm) cudaStreamDestroy(c->comm);
  wn_arena_free(device->weights);
  wn_arena_free(device->stash);
  wn_arena_free(device->scratch);
  wn_arena_free(device->host);
  if (((whole_device *)c)->open) n_open--;
  free(c);
}

const char *wn_cuda_name(const wn_device *device) {
  return ((const wn_cuda *)device)->name;
}

wn_status wn_cuda_memory(wn_device *device, size_t *total_used, size_t *arenas, size_t *other) {
  wn_cuda *c = wn_cuda_of(device);
  size_t left, total;
  WN_CUDA_TRY(cudaMemGetInfo(&left, &total));
  *total_used = total - left;
  *arenas = c->committed_bytes;
  *other = *total_used > *arenas ? *total_used - *arenas : 0;
  return NULL;
}

/* Spins at first, since most waits end within the time of a launch or two; then in naps, with a look at the watch. */
wn_status wn_cuda_await(wn_device *device, cudaEvent_t event) {
  enum { SPINS = 2000, NAP_NS = 20000, NAPS_A_LOOK = 50 };
  wn_cuda *c = wn_cuda_of(device);
  double start = wn_time_s();
  if (device->dry) return NULL;
  for (int64_t i = 0;; i++) {
    cudaError_t state = cudaEventQuery(event);
    if (state == cudaSuccess) return NULL;
    if (state != cudaErrorNotReady) return wn_cuda_check(state, "work asked for before", __FILE__, __LINE__);
    if (i < SPINS) continue;
    const struct timespec nap = {0, NAP_NS};
    nanosleep(&nap, NULL);
    if (c->watch && i % NAPS_A_LOOK == 0) WN_TRY(c->watch(c->watch_context, wn_time_s() - start));
  }
}

wn_status wn_cuda_keep_pace(wn_device *device) {
  whole_device *d = (whole_device *)wn_cuda_of(device);
  const int64_t n = d->n_operations++;
  if (n % OPERATIONS_A_PACE != 0) return NULL;
  cudaEvent_t event = d->pace[n / OPERATIONS_A_PACE % PACES];
  WN_TRY(wn_cuda_await(device, event)); /* one that was never recorded has happened */
  WN_CUDA_TRY(cudaEventRecord(event, d->cuda.compute));
  return NULL;
}

void wn_cuda_set_watch(wn_device *device, wn_status (*watch)(void *context, double waited_s), void *context) {
  wn_cuda *c = wn_cuda_of(device);
  c->watch = watch;
  c->watch_context = context;
}

wn_status wn_cuda_synchronize(wn_device *device) {
  wn_cuda *c = wn_cuda_of(device);
  cudaStream_t queues[2] = {c->compute, c->comm};
  for (int i = 0; i < 2; i++) {
    WN_TRY(wn_cuda_await(device, c->staged[i])); /* uploads on the way keep their buffers */
    WN_CUDA_TRY(cudaEventRecord(c->staged[i], queues[i]));
    WN_TRY(wn_cuda_await(device, c->staged[i]));
  }
  return NULL;
}

wn_status wn_cuda_timer_start(wn_device *device) {
  whole_device *d = (whole_device *)wn_cuda_of(device);
  WN_CUDA_TRY(cudaEventRecord(d->timer[0], d->cuda.compute));
  return NULL;
}

wn_status wn_cuda_timer_stop(wn_device *device, double *seconds) {
  whole_device *d = (whole_device *)wn_cuda_of(device);
  float ms;
  WN_CUDA_TRY(cudaEventRecord(d->timer[1], d->cuda.compute));
  WN_TRY(wn_cuda_await(device, d->timer[1]));
  WN_CUDA_TRY(cudaEventElapsedTime(&ms, d->timer[0], d->timer[1]));
  *seconds = (double)ms * 1e-3;
  return NULL;
}

void *wn_cuda_compute_queue(wn_device *device) {
  return wn_cuda_of(device)->compute;
}

void *wn_cuda_comm_queue(wn_device *device) {
  return wn_cuda_of(device)->comm;
}
