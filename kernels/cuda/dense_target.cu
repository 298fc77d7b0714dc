/* Dense attention, averaged over heads, in two sweeps over the keys: one for each head's log-sum-exp, pieces of the
 * keys side by side and merged in order, and one that sums the heads' probabilities of a 128 x 128 tile in registers,
 * one head after another. Logits are in units of log 2. */
#include <math.h>

#include "kernels/cuda/dense_target.cuh"
#include "kernels/cuda/dot_tile.cuh"
#include "kernels/cuda/reduce.cuh"

enum { PIECE_KEYS = 8192, MERGE_THREADS = 512 };

typedef struct target_job {
  wn_dot_rows q, k; /* of head 0 */
  int64_t q_head, k_head;
  float scale;
  int32_t n_heads, n_rows, least, n_pieces;
  const int32_t *first, *last;
  float2 *part; /* [pieces][heads][rows]: largest logit, sum of 2^(logit - largest) */
  float *lse;   /* [heads][rows] */
  float *p;     /* [rows][pitch] */
  int64_t pitch;
} target_job;

typedef struct key_range {
  int32_t first, last;
} key_range;

/* What a row sees; nothing where it does not exist or sees too few keys to count. */
__device__ __forceinline__ key_range range_of(const target_job &j, int32_t row) {
  key_range r = {1, 0};
  if (row >= j.n_rows) return r;
  const int32_t first = j.first[row], last = j.last[row];
  if (last - first + 1 > j.least) r = key_range{first, last};
  return r;
}

/* All keys that some row of the tile sees. The whole block calls. */
__device__ static key_range range_of_tile(const target_job &j, int32_t row0) {
  __shared__ int32_t low, high;
  if (threadIdx.x == 0) {
    low = INT32_MAX;
    high = -1;
  }
  __syncthreads();
  if (threadIdx.x < WN_DOT_TILE) {
    const key_range r = range_of(j, row0 + (int32_t)threadIdx.x);
    if (r.first <= r.last) {
      atomicMin(&low, r.first);
      atomicMax(&high, r.last);
    }
  }
  __syncthreads();
  return key_range{low, high};
}

__device__ __forceinline__ float2 merged(float2 a, float2 b) {
  wn_merge_sums(&a.x, &a.y, b.x, b.y);
  return a;
}

/* Block (rows, head, piece of the keys). */
__global__ static void __launch_bounds__(WN_DOT_THREADS, 2) log_sum_kernel(target_job j) {
  extern __shared__ uint4 memory[];
  __shared__ float2 halves[WN_DOT_TILE];
  const int32_t row0 = (int32_t)blockIdx.x * WN_DOT_TILE, head = (int32_t)blockIdx.y;
  key_range tile = range_of_tile(j, row0);
  tile.first = max(tile.first, (int32_t)blockIdx.z * PIECE_KEYS);
  tile.last = min(tile.last, ((int32_t)blockIdx.z + 1) * PIECE_KEYS - 1);
  wn_dot_rows q = j.q, k = j.k;
  q.data += head * j.q_head;
  k.data += head * j.k_head;
  float2 sum[4];
#pragma unroll
  for (int i = 0; i < 4; i++) sum[i] = make_float2(-INFINITY, 0);
  for (int32_t key0 = tile.first; key0 <= tile.last; key0 += WN_DOT_TILE) {
    float acc[2][8][4];
    wn_dot_tile(acc, wn_shared_address(memory), q, row0, k, key0);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const key_range seen = range_of(j, row0 + wn_dot_own_row(0, i));
      float top = sum[i].x, all = 0;
#pragma unroll
      for (int e = 0; e < 16; e++) {
        const int32_t key = key0 + wn_dot_own_column(0, e);
        /* no other piece's keys either */
        WN_DOT_OWN(acc, i, e) =
            key >= seen.first && key <= min(seen.last, tile.last) ? WN_DOT_OWN(acc, i, e) * j.scale : -INFINITY;
        top = fmaxf(top, WN_DOT_OWN(acc, i, e));
      }
      const float at = top == -INFINITY ? 0.0f : top;
#pragma unroll
      for (int e = 0; e < 16; e++) all += wn_exp2(WN_DOT_OWN(acc, i, e) - at);
      sum[i] = make_float2(top, sum[i].y * wn_exp2(sum[i].x - at) + all);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2)
      sum[i] =
          merged(sum[i], make_float2(__shfl_xor_sync(~0u, sum[i].x, lanes), __shfl_xor_sync(~0u, sum[i].y, lanes)));
  const bool writer = threadIdx.x % 4 == 0;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (threadIdx.x >= 128 && writer) halves[wn_dot_own_row(0, i)] = sum[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (threadIdx.x < 128 && writer && row0 + wn_dot_own_row(0, i) < j.n_rows)
      j.part[((int64_t)blockIdx.z * j.n_heads + head) * j.n_rows + row0 + wn_dot_own_row(0, i)] =
          merged(sum[i], halves[wn_dot_own_row(0, i)]);
}

__global__ static void merge_kernel(target_job j) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, all = (int64_t)j.n_heads * j.n_rows;
  if (i >= all) return;
  float2 sum = j.part[i];
  for (int32_t piece = 1; piece < j.n_pieces; piece++) sum = merged(sum, j.part[piece * all + i]);
  j.lse[i] = sum.x + log2f(sum.y);
}

/* Block (rows, keys): the heads' probabilities, one head after another. */
__global__ static void __launch_bounds__(WN_DOT_THREADS, 1) mean_heads_kernel(target_job j) {
  extern __shared__ uint4 memory[];
  const int32_t row0 = (int32_t)blockIdx.x * WN_DOT_TILE, key0 = (int32_t)blockIdx.y * WN_DOT_TILE;
  const key_range tile = range_of_tile(j, row0);
  if (tile.first > tile.last || key0 > tile.last || key0 + WN_DOT_TILE <= tile.first) return;
  float acc[2][8][4], p[2][8][4] = {};
  wn_dot_rows q = j.q, k = j.k;
  for (int32_t head = 0; head < j.n_heads; head++) {
    wn_dot_tile(acc, wn_shared_address(memory), q, row0, k, key0);
    q.data += j.q_head;
    k.data += j.k_head;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int32_t row = row0 + wn_dot_own_row(0, i);
      const float lse = row < j.n_rows ? __ldg(j.lse + (int64_t)head * j.n_rows + row) : 0.0f;
#pragma unroll
      for (int e = 0; e < 16; e++) WN_DOT_OWN(p, i, e) += wn_exp2(WN_DOT_OWN(acc, i, e) * j.scale - lse);
    }
  }
  const float share = 1.0f / (float)j.n_heads;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const key_range seen = range_of(j, row0 + wn_dot_own_row(0, i));
#pragma unroll
    for (int e = 0; e < 16; e++) {
      const int32_t key = key0 + wn_dot_own_column(0, e);
      if (key >= seen.first && key <= seen.last)
        j.p[(row0 + wn_dot_own_row(0, i)) * j.pitch + key] = WN_DOT_OWN(p, i, e) * share;
    }
  }
}

wn_status wn_cuda_dense_target(wn_device *device, float *p, int64_t pitch, const wn_view<wn_bf16> &q,
                               const wn_view<wn_bf16> &k, const wn_rows *rows, int32_t least, double scale) {
  cudaStream_t stream = wn_cuda_stream(device);
  if (q.n == 0 || k.n == 0) return NULL; /* a launch over no keys is an error */
  target_job j = {};
  j.q = wn_dot_rows_of(q, 0, q.n);
  j.k = wn_dot_rows_of(k, 0, k.n);
  j.q_head = q.head;
  j.k_head = k.heads == 1 ? 0 : k.head;
  j.scale = (float)(scale * M_LOG2E);
  j.n_heads = q.heads;
  j.n_rows = rows->n_rows;
  j.least = least;
  j.n_pieces = (int32_t)wn_ceil_div(k.n, PIECE_KEYS);
  j.first = rows->first_key;
  j.last = rows->last_key;
  j.p = p;
  j.pitch = pitch;
  const int64_t all = (int64_t)j.n_heads * j.n_rows;
  const unsigned tiles = (unsigned)wn_ceil_div(j.n_rows, WN_DOT_TILE), keys = (unsigned)wn_ceil_div(k.n, WN_DOT_TILE);
  WN_ASSERT(keys < 65536 && j.n_heads < 65536, "%lld keys, %d heads", (long long)k.n, j.n_heads);
  const size_t mark = wn_arena_mark(device->scratch);
  WN_TRY(wn_cuda_scratch(device, (void **)&j.part, "dense log-sums", all * j.n_pieces * (int64_t)sizeof(float2)));
  WN_TRY(wn_cuda_scratch(device, (void **)&j.lse, "dense log-sums", all * (int64_t)sizeof(float)));
  WN_CUDA_TRY(cudaFuncSetAttribute(log_sum_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, WN_DOT_SHARED_BYTES));
  WN_CUDA_TRY(
      cudaFuncSetAttribute(mean_heads_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, WN_DOT_SHARED_BYTES));
  log_sum_kernel<<<dim3(tiles, (unsigned)j.n_heads, (unsigned)j.n_pieces), WN_DOT_THREADS, WN_DOT_SHARED_BYTES,
                   stream>>>(j);
  merge_kernel<<<(unsigned)wn_ceil_div(all, MERGE_THREADS), MERGE_THREADS, 0, stream>>>(j);
  mean_heads_kernel<<<dim3(tiles, keys), WN_DOT_THREADS, WN_DOT_SHARED_BYTES, stream>>>(j);
  WN_CUDA_LAUNCHED("the mean over heads");
  wn_arena_release(device->scratch, mark);
  return NULL;
}
