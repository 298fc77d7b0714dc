#include "train/device.h"

#include <omp.h>
#include <sys/resource.h>

#include "base/rng.h"
#include "base/time.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cuda/cuda.h"

static wn_status open_gpu(wn_device **out, int32_t threads, wn_world *world) {
  const char *why;
  int32_t gpus = wn_cuda_count(&why), place = wn_world_local_rank(world);
  if (gpus == 0) return WN_FAIL_HINT(WN_E_DEVICE, "use device: cpu or device: auto", "device is cuda, but %s", why);
  if (place >= gpus)
    return WN_FAIL_HINT(WN_E_DEVICE, "start one process per GPU, and let each see all GPUs of its host",
                        "rank %d is process %d of its host, which shows it %d GPU%s", wn_world_rank(world), place, gpus,
                        gpus == 1 ? "" : "s");
  return wn_cuda_create(out, (wn_cuda_settings){.ordinal = place, .threads = threads ? threads : omp_get_num_procs()});
}

bool wn_chooses_gpu(wn_job_device choice) {
  return choice == WN_JOB_CUDA || (choice == WN_JOB_AUTO && wn_cuda_count(NULL) > 0);
}

static wn_status open_local(wn_device **out, wn_job_device choice, int32_t threads, wn_world *world, wn_log *log) {
  if (wn_chooses_gpu(choice)) {
    WN_TRY(open_gpu(out, threads, world));
    wn_info(log, "device: %s", wn_cuda_name(*out));
    return NULL;
  }
  WN_TRY(wn_cpu_create_f32(out, (wn_cpu_settings){.threads = threads}));
  wn_info(log, "device: cpu, %d thread%s", (*out)->threads, (*out)->threads == 1 ? "" : "s");
  return NULL;
}

/* One rank on a GPU and another without would wait for each other in different collectives. */
static wn_status check_same_kind(const wn_device *device, wn_world *world) {
  int64_t gpus = device->kind == WN_CUDA;
  WN_TRY(wn_group_sum_i64(wn_world_all(world), &gpus, 1));
  if (gpus == 0 || gpus == wn_world_size(world)) return NULL;
  return WN_FAIL_HINT(WN_E_DEVICE, "say which with device: cpu or device: cuda",
                      "%lld of %d ranks found a GPU, the others none", (long long)gpus, wn_world_size(world));
}

wn_status wn_open_device(wn_device **out, wn_job_device choice, int32_t threads, wn_world *world, wn_log *log) {
  wn_device *device = NULL;
  wn_status status = wn_world_agree(world, open_local(&device, choice, threads, world, log));
  if (!status) status = check_same_kind(device, world);
  if (status) wn_close_device(device);
  if (!status) *out = device;
  return status;
}

void wn_close_device(wn_device *device) {
  if (!device) return;
  if (device->kind == WN_CUDA)
    wn_cuda_free(device);
  else
    wn_cpu_free_f32(device);
}

wn_status wn_device_product_rate(wn_device *device, int64_t n, double *flops_a_s) {
  enum { REPEATS = 10 }; /* the best counts */
  size_t mark = wn_arena_mark(device->scratch), host_mark = wn_arena_mark(device->host);
  wn_tensor a, b, c, values, ends[1];
  WN_TRY(wn_device_tensor(device, &a, device->scratch, "rate probe", WN_ACT, 2, n, n, 0, 0));
  WN_TRY(wn_device_tensor(device, &b, device->scratch, "rate probe", WN_ACT, 2, n, n, 0, 0));
  WN_TRY(wn_device_tensor(device, &c, device->scratch, "rate probe", WN_ACT, 2, n, n, 0, 0));
  WN_TRY(wn_device_tensor(device, &values, device->scratch, "rate probe", WN_STAT, 2, n, n, 0, 0));
  void *host, *seen;
  WN_TRY(wn_arena_alloc(device->host, &host, "rate probe", (size_t)(n * n) * sizeof(float)));
  WN_TRY(wn_arena_alloc(device->host, &seen, "rate probe", (size_t)wn_dtype_bytes(c.dtype)));
  for (int64_t i = 0; i < n * n && !device->dry; i++)
    ((float *)host)[i] = (float)wn_rng_normal(1, WN_RNG_TEST, (uint64_t)i);
  WN_TRY(device->ops->upload(device, &values, host));
  WN_TRY(device->ops->cast(device, &a, &values));
  WN_TRY(device->ops->cast(device, &b, &values));
  ends[0] = wn_tensor_slice(wn_tensor_slice(c, 0, 0, 1), 1, 0, 1);
  double best = 1e30;
  for (int r = 0; r < REPEATS; r++) {
    double start = wn_time_s();
    WN_TRY(device->ops->linear(device, &c, &a, &b, &(wn_accumulate){false}));
    WN_TRY(device->ops->download(device, seen, &ends[0])); /* waits for the product */
    double seconds = wn_time_s() - start;
    if (seconds < best) best = seconds;
  }
  wn_arena_release(device->scratch, mark);
  wn_arena_release(device->host, host_mark);
  *flops_a_s = 2.0 * (double)n * (double)n * (double)n / best;
  return NULL;
}

wn_status wn_device_peak_gib(wn_device *device, double *gib) {
  static const double bytes_a_gib = 1024.0 * 1024 * 1024, kib_a_gib = 1024.0 * 1024;
  struct rusage usage;
  size_t used, arenas, other;
  if (device->kind == WN_CUDA) {
    WN_TRY(wn_cuda_memory(device, &used, &arenas, &other));
    *gib = (double)used / bytes_a_gib;
    return NULL;
  }
  getrusage(RUSAGE_SELF, &usage);
  *gib = (double)usage.ru_maxrss / kib_a_gib;
  return NULL;
}
