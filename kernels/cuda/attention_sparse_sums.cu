/* The scales of the order-free sums, their review, and what they become in the end: attention_sparse_sums.cuh. */
#include "kernels/cuda/attention_sparse_sums.cuh"

#include <math.h>

enum {
  THREADS = 256,
  SUM_BITS = 29,      /* bounds are scaled below 2^30: half of it is left for rounding */
  FEW_UNITS = 256,    /* a mean contribution below this many units is summed again if that helps */
  WORTH_IT = 4,       /* that is, if the scale rises by this factor */
  WELL_SAMPLED = 512, /* picks of a key from which the sample's largest is close to the largest */
  UNSAMPLED_LOG2 = 5, /* headroom over the typical key's largest, for keys that the sample missed */
  EXPONENT_OFFSET = 256,
  MOST_EXPONENT = 120 /* a scale and its inverse stay normal numbers */
};

__global__ static void count_kernel(wn_view<int32_t> selection, int32_t *count) {
  const int64_t all = selection.n * selection.width, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    const int32_t key = selection.data[i / selection.width * selection.row + i % selection.width];
    if (key >= 0) atomicAdd(count + key, 1);
  }
}

__device__ static bool finite_bits(uint32_t magnitude) {
  return magnitude < 0x7f800000u;
}

/* The largest power of two that keeps a sum of magnitudes below 2^(SUM_BITS + 1) units. */
__device__ static float scale_for(double sum) {
  if (!(sum > 0)) return 1;
  const int e = isfinite(sum) ? SUM_BITS - ilogb(sum) : -MOST_EXPONENT;
  return (float)ldexp(1.0, min(max(e, -MOST_EXPONENT), (int)MOST_EXPONENT));
}

/* Sum of the exponents of what the sample saw, over keys: an integer, so in any order. */
__global__ static void exponents_kernel(wn_sparse_sums sums, int64_t m) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t bits = i < m ? sums.sampled[i] : 0;
  const bool counts = bits != 0 && finite_bits(bits);
  const unsigned exponent = counts ? (unsigned)(ilogbf(__uint_as_float(bits)) + EXPONENT_OFFSET) : 0;
  const unsigned sum = __reduce_add_sync(0xffffffffu, exponent), n = __reduce_add_sync(0xffffffffu, counts);
  if ((threadIdx.x & 31) != 0 || n == 0) return;
  atomicAdd(sums.global + WN_SPARSE_EXPONENTS, sum);
  atomicAdd(sums.global + WN_SPARSE_SAMPLED, n);
}

/* The first scale: twice what the contributions would sum to, were each the largest that may be expected. */
__global__ static void scale_kernel(wn_sparse_sums sums, int64_t m) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= m) return;
  const double most = __uint_as_float(sums.global[WN_SPARSE_MOST]), own = __uint_as_float(sums.sampled[i]);
  const unsigned sampled = sums.global[WN_SPARSE_SAMPLED];
  double each = own * (sums.count[i] >= WELL_SAMPLED ? 4 : 16);
  if (own == 0 && sampled)
    each = ldexp(1.0, (int)(sums.global[WN_SPARSE_EXPONENTS] / sampled) - EXPONENT_OFFSET + UNSAMPLED_LOG2);
  sums.scale[i] = scale_for(2.0 * sums.count[i] * sums.groups * fmin(each, most));
}

/* One warp per key: is its sum sound? */
__global__ static void review_kernel(wn_sparse_sums sums, int64_t m) {
  const int64_t i = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (i >= m || sums.most[i] == 0 || !finite_bits(sums.most[i])) return;
  unsigned long long bound = lane < WN_SPARSE_SLICES ? sums.bound[i * WN_SPARSE_SLICES + lane] : 0;
  for (int d = WN_SPARSE_SLICES / 2; d > 0; d /= 2) bound = max(bound, __shfl_xor_sync(0xffffffffu, bound, d));
  bound = __shfl_sync(0xffffffffu, bound, 0);
  const unsigned long long contributions = (unsigned long long)sums.count[i] * sums.groups;
  const float better = scale_for((double)contributions * __uint_as_float(sums.most[i]));
  const bool over = bound >> 31 != 0, coarse = bound < contributions * FEW_UNITS;
  if (!over && !(coarse && better >= WORTH_IT * sums.scale[i])) return;
  for (int c = lane; c < sums.pitch; c += 32) sums.sums[i * sums.pitch + c] = 0;
  __syncwarp();
  if (lane != 0) return;
  sums.scale[i] = better;
  sums.again[i] = 1;
  atomicMax(sums.global + WN_SPARSE_AGAIN, 1u);
}

/* Two columns a thread. What was not finite becomes NaN. */
__global__ static void finish_kernel(wn_view<float> dkv, wn_sparse_sums sums) {
  const int pairs = sums.pitch / 2;
  const int64_t all = dkv.n * pairs, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    const int64_t key = i / pairs;
    const int column = (int)(i % pairs) * 2;
    const uint32_t most = sums.most[key];
    if (most == 0 || column >= dkv.width) continue;
    const unsigned long long both = *(const unsigned long long *)(sums.sums + key * sums.pitch + column);
    const int32_t low = (int32_t)(uint32_t)both;
    const int32_t high = (int32_t)(uint32_t)((both - (unsigned long long)(long long)low) >> 32);
    const float unit = finite_bits(most) ? 1 / sums.scale[key] : NAN;
    float *out = dkv.data + key * dkv.row + column;
    out[0] += (float)low * unit;
    if (column + 1 < dkv.width) out[1] += (float)high * unit;
  }
}

/* ---- host ---- */

static unsigned blocks_for(int64_t items, int64_t most) {
  const int64_t blocks = wn_ceil_div(items, THREADS);
  return (unsigned)(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

wn_status wn_sparse_sums_create(wn_device *device, wn_sparse_sums *out, int64_t m, int32_t width, int32_t groups,
                                wn_view<int32_t> selection) {
  out->groups = groups;
  out->pitch = (int32_t)wn_ceil_div(width, 16) * 16;
  const int64_t sums = m * out->pitch * 4, bound = m * WN_SPARSE_SLICES * 8;
  const int64_t zeroed = sums + bound + 4 * m * 4 + WN_SPARSE_N_GLOBAL * 4;
  void *memory;
  WN_TRY(wn_cuda_scratch(device, &memory, "dkv sums", zeroed + m * 4));
  WN_CUDA_TRY(cudaMemsetAsync(memory, 0, (size_t)zeroed, wn_cuda_stream(device)));
  char *at = (char *)memory;
  out->sums = (int32_t *)at;
  out->bound = (unsigned long long *)(at += sums);
  out->count = (int32_t *)(at += bound);
  out->sampled = (uint32_t *)(at += m * 4);
  out->most = (uint32_t *)(at += m * 4);
  out->again = (uint32_t *)(at += m * 4);
  out->global = (uint32_t *)(at += m * 4);
  out->scale = (float *)(at += WN_SPARSE_N_GLOBAL * 4);
  const int64_t many = (int64_t)wn_cuda_of(device)->n_sms * 16;
  count_kernel<<<blocks_for(selection.n * selection.width, many), THREADS, 0, wn_cuda_stream(device)>>>(selection,
                                                                                                        out->count);
  WN_CUDA_LAUNCHED("attention_sparse_backward's counts");
  return NULL;
}

wn_status wn_sparse_sums_estimate(wn_device *device, wn_sparse_sums sums, int64_t m) {
  exponents_kernel<<<blocks_for(m, INT32_MAX), THREADS, 0, wn_cuda_stream(device)>>>(sums, m);
  scale_kernel<<<blocks_for(m, INT32_MAX), THREADS, 0, wn_cuda_stream(device)>>>(sums, m);
  WN_CUDA_LAUNCHED("attention_sparse_backward's scales");
  return NULL;
}

wn_status wn_sparse_sums_review(wn_device *device, wn_sparse_sums sums, int64_t m) {
  review_kernel<<<blocks_for(m * 32, INT32_MAX), THREADS, 0, wn_cuda_stream(device)>>>(sums, m);
  WN_CUDA_LAUNCHED("attention_sparse_backward's review");
  return NULL;
}

wn_status wn_sparse_sums_finish(wn_device *device, wn_sparse_sums sums, wn_view<float> dkv) {
  const int64_t many = (int64_t)wn_cuda_of(device)->n_sms * 16;
  finish_kernel<<<blocks_for(dkv.n * sums.pitch / 2, many), THREADS, 0, wn_cuda_stream(device)>>>(dkv, sums);
  WN_CUDA_LAUNCHED("attention_sparse_backward's sums");
  return NULL;
}
