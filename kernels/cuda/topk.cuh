/* Exact top-k of rows of FP32 scores, and what selections share. */
#ifndef WN_KERNELS_CUDA_TOPK_CUH
#define WN_KERNELS_CUDA_TOPK_CUH

#include "kernels/cuda/support.cuh"

/* selection[i,k] = the k largest scores[i * pitch + key] among the keys first[i] .. last[i], ascending, -1 at the end;
 * lowest key on ties, -0 equals 0, NaN counts as -inf. Other scores, and all scores of rows that see at most k keys,
 * never decide anything. scores is 16-byte aligned, pitch a multiple of 4 and at least n_keys; first, last [n] on the
 * device. */
WN_MUST_USE wn_status wn_cuda_top_k(wn_device *device, wn_view<int32_t> selection, const float *scores, int64_t pitch,
                                    const int32_t *first, const int32_t *last, int32_t n_keys);

/* Rows of scores that exist at a time: at most 2 GiB of them, and whole tiles of 128 rows where that is possible. A
 * function of shapes only. */
static inline int64_t wn_score_pitch(int32_t n_keys) {
  return wn_ceil_div(n_keys, 4) * 4;
}
static inline int64_t wn_score_chunk(int64_t n_rows, int64_t pitch) {
  int64_t most = ((int64_t)1 << 29) / (pitch > 0 ? pitch : 1);
  most = most >= 128 ? most / 128 * 128 : most > 0 ? most : 1;
  return n_rows < most ? n_rows : most;
}

enum { WN_PICK_THREADS = 256, WN_PICK_WARPS = WN_PICK_THREADS / 32 };

/* Two counts in one word: of bits above, and of bits equal. */
__device__ __forceinline__ uint64_t wn_two_counts(int32_t above, int32_t equal) {
  return (uint64_t)(uint32_t)equal << 32 | (uint32_t)above;
}

/* Sum of x over the threads before this one; *total over all. `warps` is shared memory, WN_PICK_WARPS of them. T is
 * uint32_t or uint64_t. */
template <typename T> __device__ __forceinline__ T wn_block_scan(T x, T *total, T *warps) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T sum = x;
#pragma unroll
  for (uint32_t d = 1; d < 32; d *= 2) {
    const T other = __shfl_up_sync(~0u, sum, d);
    sum += lane >= d ? other : 0;
  }
  __syncthreads(); /* of an earlier scan all has been read */
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  T before = 0, all = 0;
#pragma unroll
  for (uint32_t w = 0; w < WN_PICK_WARPS; w++) {
    const T one = warps[w];
    before += w < warp ? one : 0;
    all += one;
  }
  *total = all;
  return before + sum - x;
}

/* pick[0 ..] = base + the places of the bits that are set in `above`, and of the first `ties` of those in `equal` (may
 * be null), ascending; returns how many. */
__device__ __forceinline__ uint32_t wn_emit_bits(int32_t *pick, const uint32_t *above, const uint32_t *equal,
                                                 int32_t n_words, uint32_t ties, int32_t base, uint64_t *warps) {
  const int32_t each = (n_words + WN_PICK_THREADS - 1) / WN_PICK_THREADS, from = (int32_t)threadIdx.x * each;
  const int32_t end = from + each < n_words ? from + each : n_words;
  uint64_t counts = 0, total;
  for (int32_t i = from; i < end; i++) counts += wn_two_counts(__popc(above[i]), equal ? __popc(equal[i]) : 0);
  counts = wn_block_scan(counts, &total, warps);
  uint32_t n_above = (uint32_t)counts, n_equal = (uint32_t)(counts >> 32);
  for (int32_t i = from; i < end; i++) {
    const uint32_t equals = equal ? equal[i] : 0;
    for (uint32_t left = above[i] | equals; left; left &= left - 1) {
      const int32_t bit = __ffs((int)left) - 1;
      const bool tie = equals >> bit & 1;
      if (!tie || n_equal < ties) pick[n_above + (n_equal < ties ? n_equal : ties)] = base + i * 32 + bit;
      n_above += !tie;
      n_equal += tie;
    }
  }
  const uint32_t n_ties = (uint32_t)(total >> 32);
  return (uint32_t)total + (n_ties < ties ? n_ties : ties);
}

#endif
