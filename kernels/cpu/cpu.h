/* The CPU device. Compiled twice from one source: FP32, which ships, and FP64, which the gradient tests use. */
#ifndef WN_KERNELS_CPU_H
#define WN_KERNELS_CPU_H

#include "kernels/kernels.h"

/* Arena capacities are address space, not memory; 0: as much as the machine has memory, so that what cannot fit is
 * refused with a sentence before the system ends the process. `threads` 0: all cores this process may run on. Sets
 * OpenMP's thread count, and OpenBLAS to one thread (parallelism is ours, in fixed chunks). */
typedef struct wn_cpu_settings {
  int32_t threads;
  size_t weights_bytes, stash_bytes, scratch_bytes;
  bool dry; /* base/device.h; capacities are then without limit */
} wn_cpu_settings;

WN_MUST_USE wn_status wn_cpu_create_f32(wn_device **out, wn_cpu_settings settings);
WN_MUST_USE wn_status wn_cpu_create_f64(wn_device **out, wn_cpu_settings settings);
void wn_cpu_free_f32(wn_device *device);
void wn_cpu_free_f64(wn_device *device);

#endif
