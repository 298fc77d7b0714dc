/* Reductions of the tensor cores' fragments: four neighbouring lanes hold a row of the accumulators. */
#ifndef WN_KERNELS_CUDA_REDUCE_CUH
#define WN_KERNELS_CUDA_REDUCE_CUH

/* Sum, or largest, over the four lanes that hold a row. */
__device__ __forceinline__ float wn_quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float wn_quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

#endif
