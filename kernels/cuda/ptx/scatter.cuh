/* Sums of integers into global memory by rows, through the bulk copy engine, and the transpose of a fragment. PTX ISA
 * 9.0, sections "cp.reduce.async.bulk", "fence.proxy", "cp.async", "movmatrix". */
#ifndef WN_KERNELS_CUDA_PTX_SCATTER_CUH
#define WN_KERNELS_CUDA_PTX_SCATTER_CUH

#include <stdint.h>

/* What this thread wrote to shared memory becomes visible to the copy engine (before the barrier that precedes the
 * issuing thread's call). */
__device__ __forceinline__ void wn_fence_async_shared(void) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/* global[i] += shared[i], 32-bit integers; addresses and bytes are multiples of 16. Part of the thread's open group. */
__device__ __forceinline__ void wn_bulk_add_s32(int32_t *global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(global), "r"(shared),
               "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void wn_bulk_commit(void) {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/* Until shared memory has been read by all of this thread's groups. */
__device__ __forceinline__ void wn_bulk_wait_read(void) {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/* 4 bytes from global to shared memory, asynchronously; a zero where nothing is to be read, though the source has to be
 * a valid address even then. */
__device__ __forceinline__ void wn_cp_async_word(uint32_t shared, const void *global, bool read) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(read ? 4 : 0) : "memory");
}

/* An 8 x 8 matrix of 16-bit elements, two a lane as ldmatrix deals them out, transposed across the warp. */
__device__ __forceinline__ uint32_t wn_transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

#endif
