/* What warpgroups (four warps, the first of index 0 modulo 4) agree on: registers, named barriers, turns. PTX ISA 9.0,
 * sections "setmaxnreg", "bar". */
#ifndef WN_KERNELS_CUDA_PTX_WARPGROUP_CUH
#define WN_KERNELS_CUDA_PTX_WARPGROUP_CUH

#include <stdint.h>

/* Every warp of the warpgroup: registers that its threads may use from here on, a multiple of 8. setmaxnreg */
template <int COUNT> __device__ __forceinline__ void wn_registers_grow(void) {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void wn_registers_shrink(void) {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

/* Waits for the `threads` threads, whole warps, that come to barrier `number`: 1 .. 15, as 0 is __syncthreads, and not
 * 1 or 2 where turns are taken. bar.sync */
__device__ __forceinline__ void wn_named_sync(int32_t number, int32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

/* Two warpgroups take turns at issuing products, so that one multiplies while the other computes: left alone they fall
 * into step and wait for each other. Every warp of warpgroup `group` (0 or 1) waits for its turn, and gives the turn to
 * the other; warpgroup 1 begins by giving to 0. To each giving belongs a waiting: either warpgroup 1 does not give
 * after its last turn, or warpgroup 0 waits for it. Named barriers 1 and 2. bar.sync, bar.arrive */
__device__ __forceinline__ void wn_turn_wait(int32_t group) {
  asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
}
__device__ __forceinline__ void wn_turn_give(int32_t other) {
  asm volatile("bar.arrive %0, 256;" ::"r"(1 + other) : "memory");
}

#endif
