/* Reductions that several kernels have in common. */
#ifndef WN_KERNELS_CUDA_REDUCE_CUH
#define WN_KERNELS_CUDA_REDUCE_CUH

#include <math.h>

#include "kernels/cuda/ptx/mma.cuh"

/* Sum, or largest, over the four lanes that hold a row of the tensor cores' accumulators. */
__device__ __forceinline__ float wn_quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float wn_quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

/* Sums 2^(x - top) with a top that moves: (top, sum) of both. */
__device__ __forceinline__ void wn_merge_sums(float *top, float *sum, float other_top, float other_sum) {
  const float most = fmaxf(*top, other_top), at = most == -INFINITY ? 0.0f : most;
  *sum = *sum * wn_exp2(*top - at) + other_sum * wn_exp2(other_top - at);
  *top = most;
}

#endif
