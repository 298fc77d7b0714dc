/* What warpgroups (four warps, the first of index 0 modulo 4) agree on: registers, named barriers, turns. PTX ISA 9.0,
 * sections "setmaxnreg", "bar". */
#ifndef WN_KERNELS_CUDA_PTX_WARPGROUP_CUH
#define WN_KERNELS_CUDA_PTX_WARPGROUP_CUH

#include <stdint.h>

#include "kernels/cuda/ptx/mbarrier.cuh"
#include "kernels/cuda/ptx/tile_copy.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"

/* Every warp of the warpgroup: registers that its threads may use from here on, a multiple of 8. setmaxnreg */
template <int COUNT> __device__ __forceinline__ void wn_registers_grow(void) {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void wn_registers_shrink(void) {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
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

/* Names that attention's files still use. */
#define wn_barrier_init wn_mbarrier_init
#define wn_barrier_init_fence wn_mbarrier_init_fence
#define wn_barrier_arrive wn_mbarrier_arrive
#define wn_barrier_expect wn_mbarrier_expect
#define wn_barrier_wait wn_mbarrier_wait
#define wn_copy_tile wn_copy_tile_3d
#define wn_tile_descriptor wn_wgmma_operand
#define wn_wgmma_begin wn_wgmma_fence
#define wn_pin wn_wgmma_settle
#define wn_warpgroup_shared wn_wgmma<WN_ALONG, WN_ALONG>
#define wn_warpgroup_registers wn_wgmma_registers

#endif
