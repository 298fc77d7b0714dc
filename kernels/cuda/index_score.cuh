/* The lightning indexer's scores of a range of rows against all keys: I[t,s] = sum_h w[t,h] relu(scale q[t,h].k[s]).
 *
 * Every score is one fixed chain of operations that depends on the shapes HI and dI (and on whether the tensors are
 * 16-byte aligned), never on the range of rows or keys it is computed in: whoever asks again gets the same bits, so
 * that every selection made from these scores is the same selection. */
#ifndef WN_KERNELS_CUDA_INDEX_SCORE_CUH
#define WN_KERNELS_CUDA_INDEX_SCORE_CUH

#include "kernels/cuda/support.cuh"

/* Asserts q[n,HI,dI], k[m,dI] [ACT], w[n,HI] [STAT] for these rows. */
void wn_cuda_expect_indexer(const wn_tensor *q, const wn_tensor *k, const wn_tensor *w, const wn_rows *rows);

/* scores[i * pitch + key] of rows row0 + i, i in 0 .. n-1, at the keys they see; nothing else is written. Rows that see
 * at most `least` keys may be left out. scores: FP32 on the device, pitch at least n_keys. Enqueues; needs no scratch.
 * scale > 0. */
WN_MUST_USE wn_status wn_cuda_index_scores(wn_device *device, float *scores, int64_t pitch, const wn_tensor *q,
                                           const wn_tensor *k, const wn_tensor *w, const wn_rows *rows, int64_t row0,
                                           int64_t n, int32_t least, double scale);

/* relu that lets NaN through. */
__device__ __forceinline__ float wn_relu(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

#endif
