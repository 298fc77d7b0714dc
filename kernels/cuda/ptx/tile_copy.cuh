/* Copies of tiles by the copy engine, and sums that leave for global memory without waiting. PTX ISA 9.0, sections
 * "cp.async.bulk.tensor", "cp.async.bulk", "cp.reduce.async.bulk", "red". */
#ifndef WN_KERNELS_CUDA_PTX_TILE_COPY_CUH
#define WN_KERNELS_CUDA_PTX_TILE_COPY_CUH

#include <cuda.h>
#include <stdint.h>

/* ---- boxes of a tensor to shared memory ----
 *
 * One thread calls. The map's box whose first element is (x, y, z), the innermost coordinate first, to `shared`, a
 * multiple of 128 bytes, of 1024 with the 128-byte swizzle. Elements outside the tensor become 0 and count: the whole
 * box's bytes come to the barrier (mbarrier.cuh). */

/* cp.async.bulk.tensor.2d */
__device__ __forceinline__ void wn_copy_tile_2d(uint32_t shared, const CUtensorMap *map, int32_t x, int32_t y,
                                                uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
               "l"(map), "r"(x), "r"(y), "r"(barrier)
               : "memory");
}
/* cp.async.bulk.tensor.3d */
__device__ __forceinline__ void wn_copy_tile_3d(uint32_t shared, const CUtensorMap *map, int32_t x, int32_t y,
                                                int32_t z, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared),
               "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
               : "memory");
}
/* The same to this address in every block of the cluster whose bit is set; the bytes come to the barrier that stands at
 * this address in that block. cp.async.bulk.tensor.3d ... .multicast::cluster */
__device__ __forceinline__ void wn_copy_tile_3d_to_blocks(uint32_t shared, const CUtensorMap *map, int32_t x, int32_t y,
                                                          int32_t z, uint32_t barrier, uint16_t blocks) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared),
               "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(blocks)
               : "memory");
}

/* The same for bytes that lie side by side in global memory, a multiple of 16, from and to multiples of 16.
 * cp.async.bulk */
__device__ __forceinline__ void wn_copy_bytes(uint32_t shared, const void *global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}

/* ---- sums to global memory ---- */

/* A thread: global[i] += shared[i], 32-bit integers, by the copy engine; addresses and bytes are multiples of 16. What
 * stands in shared memory has to be published (wn_publish_shared). Part of the thread's open group.
 * cp.reduce.async.bulk */
__device__ __forceinline__ void wn_bulk_add_s32(int32_t *global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(global), "r"(shared),
               "r"(bytes)
               : "memory");
}
/* The thread: what it sent becomes a group. cp.async.bulk.commit_group */
__device__ __forceinline__ void wn_bulk_commit(void) {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/* The thread: until all its groups have read their shared memory. cp.async.bulk.wait_group.read */
__device__ __forceinline__ void wn_bulk_wait_read(void) {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

/* A thread: to[0..3] += x without waiting; 16-byte aligned. Deterministic only where nobody else adds to the same
 * place. red.global.add.v4.f32 */
__device__ __forceinline__ void wn_send_sum(float *to, float x0, float x1, float x2, float x3) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x0), "f"(x1), "f"(x2), "f"(x3)
               : "memory");
}

#endif
