/* What the dense and the sparse KL share. */
#ifndef WN_KERNELS_CUDA_INDEXER_KL_CUH
#define WN_KERNELS_CUDA_INDEXER_KL_CUH

#include <stdint.h>

/* p log(p / q) - p + q, never below 0, where log_q = log q and gain = q - p. Over a whole row the sum of the last two
 * vanishes, but with them every term is small where q is near p, and the rounding of either log-sum-exp, which moves
 * all of p or all of q, cancels to first order. */
__device__ __forceinline__ float wn_kl_loss_term(float p, float log_q, float gain) {
  if (!(p > 0)) return gain;
  const float x = logf(p) - log_q; /* q = p exp(-x) */
  return fabsf(x) < 0.5f ? p * (x + expm1f(-x)) : fmaf(p, x, gain);
}

/* The sum over a block of whole warps, in all threads; `shared` holds one number a warp. */
__device__ __forceinline__ double wn_kl_block_sum(double x, double *shared) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  __syncthreads(); /* what stood there has been read */
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (uint32_t i = 0; i < blockDim.x / 32; i++) sum += shared[i];
  return sum;
}

#endif
