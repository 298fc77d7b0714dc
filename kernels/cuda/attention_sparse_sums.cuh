/* dkv of absorbed sparse attention as order-free sums: any row may pick any key, so contributions are added in 32-bit
 * integers, whose sum no order can change: x as round(scale[key] x), scale[key] a power of two. What makes this exact
 * enough, without state and without asking the host:
 * 1. Pick counts of every key, and a launch over every WN_SPARSE_SAMPLE-th row that keeps the largest contribution to
 *    each key. From both an estimate of the sum of magnitudes, with headroom, hence scale[key].
 * 2. The launch over all rows. Beside the sums it keeps, per key and slice of columns, the sum of each contribution's
 *    largest magnitude in units, which bounds every partial sum, and the largest contribution.
 * 3. Keys whose bound passed 2^31, or whose contributions were too few units, get the scale that the largest
 *    contribution times the count allows (it cannot overflow), zeroed sums, and a second launch, which skips tiles
 *    without such keys; where there are none its blocks return at once.
 * 4. dkv += sums / scale. */
#ifndef WN_KERNELS_CUDA_ATTENTION_SPARSE_SUMS_CUH
#define WN_KERNELS_CUDA_ATTENTION_SPARSE_SUMS_CUH

#include "kernels/cuda/support.cuh"

enum { WN_SPARSE_SAMPLE = 64, WN_SPARSE_SLICES = 8 };

/* What is kept for each key beside its sums. All of it begins as zeros. */
typedef struct wn_sparse_sums {
  int32_t *count;            /* rows that picked it */
  uint32_t *sampled, *most;  /* bits of the largest |contribution|, in the sample and in all rows */
  unsigned long long *bound; /* [m][slices]: sum of the largest |contribution| of a slice of columns, in units */
  float *scale;              /* units per 1 */
  uint32_t *again;           /* 1: summed again */
  uint32_t *global;          /* of all keys: WN_SPARSE_* below */
  int32_t *sums;             /* [m][pitch] */
  int32_t pitch;
  int32_t groups; /* contributions per pick: blocks that divide the heads */
} wn_sparse_sums;

enum { WN_SPARSE_MOST, WN_SPARSE_EXPONENTS, WN_SPARSE_SAMPLED, WN_SPARSE_AGAIN, WN_SPARSE_N_GLOBAL };

/* Scratch for m keys of `width`, zeroed, and the counts. */
WN_MUST_USE wn_status wn_sparse_sums_create(wn_device *device, wn_sparse_sums *out, int64_t m, int32_t width,
                                            int32_t groups, wn_view<int32_t> selection);
/* After the launch over the sample: the scales. */
WN_MUST_USE wn_status wn_sparse_sums_estimate(wn_device *device, wn_sparse_sums sums, int64_t m);
/* After the launch over all rows: which keys are summed again, with which scales. */
WN_MUST_USE wn_status wn_sparse_sums_review(wn_device *device, wn_sparse_sums sums, int64_t m);
/* dkv += sums / scale */
WN_MUST_USE wn_status wn_sparse_sums_finish(wn_device *device, wn_sparse_sums sums, wn_view<float> dkv);

__device__ __forceinline__ uint32_t wn_magnitude_bits(float x) {
  return __float_as_uint(x) & 0x7fffffffu;
}

/* Two columns in one addition: the sum of such words is the sum of the low columns plus 2^32 times that of the high
 * ones, and comes apart again exactly while each fits 32 bits. */
__device__ __forceinline__ void wn_add_pair(int32_t *at, float x, float y, float scale) {
  const int32_t low = __float2int_rn(x * scale), high = __float2int_rn(y * scale);
  atomicAdd((unsigned long long *)at, ((unsigned long long)(uint32_t)high << 32) + (unsigned long long)(long long)low);
}

/* One contribution's largest magnitude (bits of a float) in a slice. */
__device__ __forceinline__ void wn_add_bound(const wn_sparse_sums &sums, int64_t key, int slice, uint32_t most,
                                             float scale) {
  if (most == 0) return;
  atomicMax(sums.most + key, most);
  atomicAdd(sums.bound + key * WN_SPARSE_SLICES + slice,
            (unsigned long long)__float2uint_ru(__uint_as_float(most) * scale));
}
__device__ __forceinline__ void wn_add_sampled(const wn_sparse_sums &sums, int64_t key, uint32_t most) {
  if (most == 0) return;
  atomicMax(sums.sampled + key, most);
  atomicMax(sums.global + WN_SPARSE_MOST, most);
}

#endif
