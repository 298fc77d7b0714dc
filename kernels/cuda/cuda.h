/* The CUDA device, as host code sees it. One process drives one GPU. In a build without nvcc only absent.c stands
 * behind this header: everything then says so in a sentence. */
#ifndef WN_KERNELS_CUDA_H
#define WN_KERNELS_CUDA_H

#include "kernels/kernels.h"

typedef struct wn_cuda_settings {
  int32_t ordinal; /* which of the GPUs that this process sees */
  int32_t threads; /* CPU threads, recorded in the device */
  /* arena capacities are address space; 0: as much as the GPU has memory */
  size_t weights_bytes, stash_bytes, scratch_bytes;
} wn_cuda_settings;

/* How many GPUs this process could use (0 without a driver, or in a build without CUDA); *why (may be NULL) gets a
 * literal that says why there are none. Never fails. */
int32_t wn_cuda_count(const char **why);

/* ACT is BF16, the other roles F32. WN_E_DEVICE, naming the GPU: none there, too old (compute capability below 9.0),
 * driver too old; WN_E_MEMORY: too full. */
WN_MUST_USE wn_status wn_cuda_create(wn_device **out, wn_cuda_settings settings);
/* A dry device (base/device.h) of the shapes of a Hopper GPU with so many multiprocessors. Needs no GPU, but a build
 * with the CUDA half (else WN_E_DEVICE). */
WN_MUST_USE wn_status wn_cuda_create_dry(wn_device **out, int32_t multiprocessors, int32_t threads);
void wn_cuda_free(wn_device *device); /* NULL is fine */

/* "NVIDIA H200, 132 multiprocessors, 139.8 GiB" */
const char *wn_cuda_name(const wn_device *device);
/* Bytes of GPU memory in use, as the driver counts them; arenas never shrink, so this is the most so far. arenas: their
 * pages; other: what CUDA, cuBLAS and NCCL take for themselves (and other processes on the GPU). */
WN_MUST_USE wn_status wn_cuda_memory(wn_device *device, size_t *total_used, size_t *arenas, size_t *other);
/* Waits until all work asked for so far is done; work that failed shows here. */
WN_MUST_USE wn_status wn_cuda_synchronize(wn_device *device);
/* While the host waits for the device, `watch` (NULL: none) is called about every millisecond with the seconds waited
 * so far; its error ends the wait. */
void wn_cuda_set_watch(wn_device *device, wn_status (*watch)(void *context, double waited_s), void *context);
/* A stopwatch on the compute queue, by the GPU's own clock: seconds that what was asked for between start and stop
 * took. stop waits for it. */
WN_MUST_USE wn_status wn_cuda_timer_start(wn_device *device);
WN_MUST_USE wn_status wn_cuda_timer_stop(wn_device *device, double *seconds);
/* The two queues, as cudaStream_t: operations run on compute; collectives on comm. */
void *wn_cuda_compute_queue(wn_device *device);
void *wn_cuda_comm_queue(wn_device *device);
/* piece[n] += the sum over ranks r of received[r * n + i], in the fixed order of a reduce-scatter on the CPU
 * (src/dist/collective.c: ((0+1)+(2+3))+((4+5)+6)): the same bits. Enqueued on `queue` (a cudaStream_t); both arrays
 * live on the GPU. */
WN_MUST_USE wn_status wn_cuda_sum_pieces(wn_device *device, void *queue, float *piece, const float *received,
                                         int32_t size, int64_t n);

#endif
