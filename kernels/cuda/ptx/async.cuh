/* Small asynchronous copies from global to shared memory: 4 or 8 bytes, zeros where nothing is to be read. PTX ISA 9.0,
 * section "cp.async". */
#ifndef WN_KERNELS_CUDA_PTX_ASYNC_CUH
#define WN_KERNELS_CUDA_PTX_ASYNC_CUH

#include <stdint.h>

/* The source has to be a valid address even where it is not read. */
__device__ __forceinline__ void wn_cp_async_4(uint32_t shared, const void *global, bool read) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(read ? 4 : 0) : "memory");
}
__device__ __forceinline__ void wn_cp_async_8(uint32_t shared, const void *global, bool read) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(read ? 8 : 0) : "memory");
}

#endif
