/* The selections that eval compares the indexer with: the best possible, and those that ask no one.
 *
 * The best: a chunk of rows at a time, one sweep over the keys for each head's log-sum-exp, a second one that sums the
 * heads' probabilities of a 128 x 128 tile in registers, then the same top-k as the indexer's. Heads are summed in
 * order. Everything is in units of log 2. On an H200: 104 TFLOP/s of both sweeps at 4096 rows and keys, 16 heads of
 * 192; 156 for 4096 rows of 32768 shared keys, 16 heads of 576 (10% and 16% of the limit: it serves evaluation only).
 *
 * The random pattern: a row marks its draws in a map of the keys it sees, 2^19 keys at a time. */
#include "base/rng.h"
#include "kernels/cuda/dot_tile.cuh"
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/topk.cuh"

enum { SINK_KEYS = 4, SEGMENT_WORDS = 1 << 14 };

/* ---- best ---- */

typedef struct best_job {
  wn_dot_rows q, k; /* of head 0 */
  int64_t q_head, k_head;
  float scale; /* of the logits, in units of log 2 */
  int32_t n_heads, n_rows, least;
  const int32_t *first, *last;
  float *lse, *p; /* [n_heads, n_rows]; [n_rows, pitch] */
  int64_t pitch;
} best_job;

/* The lowest and the highest key that some of the tile's rows needs, low > high when none needs any. The whole block
 * calls. */
__device__ static void keys_of_tile(const best_job &j, int32_t row0, int32_t *low, int32_t *high) {
  __shared__ int32_t lowest, highest;
  if (threadIdx.x == 0) {
    lowest = INT32_MAX;
    highest = -1;
  }
  __syncthreads();
  const int32_t row = row0 + (int32_t)threadIdx.x;
  if ((int32_t)threadIdx.x < WN_DOT_TILE && row < j.n_rows) {
    const int32_t first = j.first[row], last = j.last[row];
    if (last - first + 1 > j.least) {
      atomicMin(&lowest, first);
      atomicMax(&highest, last);
    }
  }
  __syncthreads();
  *low = lowest;
  *high = highest;
}

typedef struct row_range {
  int32_t first, last;
} row_range;

/* What the row sees, nothing where it does not exist. */
__device__ __forceinline__ row_range range_of(const best_job &j, int32_t row) {
  row_range r = {1, 0};
  if (row < j.n_rows) r = row_range{j.first[row], j.last[row]};
  return r;
}

/* One row's share of a tile: logits that it does not see become -inf. */
__device__ __forceinline__ void add_tile(float *top, float *sum, const float acc[8][4], int low, row_range r,
                                         int32_t key0, float scale) {
  float x[16], most = *top;
#pragma unroll
  for (int e = 0; e < 16; e++) {
    const int32_t key = wn_dot_own_column(key0, e);
    x[e] = key >= r.first && key <= r.last ? acc[e / 2][low * 2 + e % 2] * scale : -INFINITY;
    most = fmaxf(most, x[e]);
  }
  const float at = most == -INFINITY ? 0.0f : most;
  float all = *sum * wn_exp2(*top - at);
#pragma unroll
  for (int e = 0; e < 16; e++) all += wn_exp2(x[e] - at);
  *top = most;
  *sum = all;
}

/* Block (x, y): rows 128 x .. of head y. */
__global__ static void __launch_bounds__(WN_DOT_THREADS, 1) log_sum_kernel(best_job j) {
  extern __shared__ uint4 memory[];
  __shared__ float tops[WN_DOT_TILE], sums[WN_DOT_TILE];
  const int32_t row0 = (int32_t)blockIdx.x * WN_DOT_TILE, head = (int32_t)blockIdx.y;
  int32_t low, high;
  keys_of_tile(j, row0, &low, &high);
  wn_dot_rows q = j.q, k = j.k;
  q.data += head * j.q_head;
  k.data += head * j.k_head;
  row_range range[4];
  float top[4], sum[4], acc[2][8][4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    range[i] = range_of(j, wn_dot_own_row(row0, i));
    top[i] = -INFINITY;
    sum[i] = 0;
  }
  for (int32_t key0 = low; key0 <= high; key0 += WN_DOT_TILE) {
    wn_dot_tile(acc, wn_shared_address(memory), q, row0, k, key0);
#pragma unroll
    for (int i = 0; i < 4; i++) add_tile(top + i, sum + i, acc[i / 2], i % 2, range[i], key0, j.scale);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      const float other_top = __shfl_xor_sync(~0u, top[i], lanes), other_sum = __shfl_xor_sync(~0u, sum[i], lanes);
      wn_merge_sums(top + i, sum + i, other_top, other_sum);
    }
  }
  const bool writer = threadIdx.x % 4 == 0;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (threadIdx.x >= 128 && writer) {
      tops[wn_dot_own_row(0, i)] = top[i];
      sums[wn_dot_own_row(0, i)] = sum[i];
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (threadIdx.x < 128 && writer && wn_dot_own_row(row0, i) < j.n_rows) {
      wn_merge_sums(top + i, sum + i, tops[wn_dot_own_row(0, i)], sums[wn_dot_own_row(0, i)]);
      j.lse[(int64_t)head * j.n_rows + wn_dot_own_row(row0, i)] = top[i] + log2f(sum[i]);
    }
}

/* Block (x, y): rows 128 x .. at keys 128 y .. */
__global__ static void __launch_bounds__(WN_DOT_THREADS, 1) mean_heads_kernel(best_job j) {
  extern __shared__ uint4 memory[];
  const int32_t row0 = (int32_t)blockIdx.x * WN_DOT_TILE, key0 = (int32_t)blockIdx.y * WN_DOT_TILE;
  int32_t low, high;
  keys_of_tile(j, row0, &low, &high);
  if (low > high || key0 > high || key0 + WN_DOT_TILE <= low) return;
  float acc[2][8][4], p[2][8][4] = {};
  wn_dot_rows q = j.q, k = j.k;
  for (int32_t head = 0; head < j.n_heads; head++) {
    wn_dot_tile(acc, wn_shared_address(memory), q, row0, k, key0);
    q.data += j.q_head;
    k.data += j.k_head;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int32_t row = wn_dot_own_row(row0, i);
      const float lse = row < j.n_rows ? __ldg(j.lse + (int64_t)head * j.n_rows + row) : 0.0f;
#pragma unroll
      for (int e = 0; e < 16; e++) WN_DOT_OWN(p, i, e) += wn_exp2(WN_DOT_OWN(acc, i, e) * j.scale - lse);
    }
  }
  const float share = 1.0f / (float)j.n_heads;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int32_t row = wn_dot_own_row(row0, i);
    const row_range range = range_of(j, row);
#pragma unroll
    for (int e = 0; e < 16; e++) {
      const int32_t key = wn_dot_own_column(key0, e);
      if (key >= range.first && key <= range.last) j.p[row * j.pitch + key] = WN_DOT_OWN(p, i, e) * share;
    }
  }
}

static wn_status dense_rows(wn_device *device, const best_job *j, int32_t n_keys) {
  if (n_keys == 0) return NULL; /* rows that see nothing; a launch over no keys is an error */
  const unsigned tiles = (unsigned)wn_ceil_div(j->n_rows, WN_DOT_TILE);
  const dim3 heads(tiles, (unsigned)j->n_heads), keys(tiles, (unsigned)wn_ceil_div(n_keys, WN_DOT_TILE));
  WN_ASSERT(keys.y < 65536, "%d keys", n_keys);
  WN_CUDA_TRY(cudaFuncSetAttribute(log_sum_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, WN_DOT_SHARED_BYTES));
  log_sum_kernel<<<heads, WN_DOT_THREADS, WN_DOT_SHARED_BYTES, wn_cuda_stream(device)>>>(*j);
  WN_CUDA_LAUNCHED("select_best");
  WN_CUDA_TRY(
      cudaFuncSetAttribute(mean_heads_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, WN_DOT_SHARED_BYTES));
  mean_heads_kernel<<<keys, WN_DOT_THREADS, WN_DOT_SHARED_BYTES, wn_cuda_stream(device)>>>(*j);
  WN_CUDA_LAUNCHED("select_best");
  return NULL;
}

wn_status wn_cuda_select_best(wn_device *device, wn_tensor *selection, const wn_tensor *qa, const wn_tensor *ka,
                              const wn_rows *rows, const wn_attention_params *params) {
  const wn_view<wn_bf16> q = wn_view_of<wn_bf16>(qa), k = wn_view_of<wn_bf16>(ka);
  const wn_view<int32_t> picks = wn_view_of<int32_t>(selection);
  WN_ASSERT(qa->rank == 3 && ka->rank == 3 && selection->rank == 2, "ranks %d, %d, %d", qa->rank, ka->rank,
            selection->rank);
  WN_ASSERT(q.n == rows->n_rows && k.n == rows->n_keys && picks.n == rows->n_rows, "%lld queries, %lld keys, %lld rows",
            (long long)q.n, (long long)k.n, (long long)picks.n);
  WN_ASSERT(q.width == k.width && (k.heads == q.heads || k.heads == 1), "%d heads of %d, keys %d of %d", q.heads,
            q.width, k.heads, k.width);
  if (picks.n == 0) return NULL;
  const int64_t pitch = wn_score_pitch(rows->n_keys), chunk = wn_score_chunk(picks.n, pitch);
  const size_t mark = wn_arena_mark(device->scratch);
  void *p, *lse;
  WN_TRY(wn_cuda_scratch(device, &p, "dense rows", chunk * pitch * (int64_t)sizeof(float)));
  WN_TRY(wn_cuda_scratch(device, &lse, "dense log-sums", chunk * q.heads * (int64_t)sizeof(float)));
  best_job j = {};
  j.k = wn_dot_rows_of(k, 0, k.n);
  j.q_head = q.head;
  j.k_head = k.heads == 1 ? 0 : k.head;
  j.scale = (float)(params->scale * 1.4426950408889634074);
  j.n_heads = q.heads;
  j.least = picks.width;
  j.lse = (float *)lse;
  j.p = (float *)p;
  j.pitch = pitch;
  for (int64_t row0 = 0; row0 < picks.n; row0 += chunk) {
    wn_view<int32_t> part = picks;
    part.data += row0 * picks.row;
    part.n = picks.n - row0 < chunk ? picks.n - row0 : chunk;
    j.q = wn_dot_rows_of(q, row0, part.n);
    j.n_rows = (int32_t)part.n;
    j.first = rows->first_key + row0;
    j.last = rows->last_key + row0;
    WN_TRY(dense_rows(device, &j, rows->n_keys));
    WN_TRY(wn_cuda_top_k(device, part, j.p, pitch, j.first, j.last, rows->n_keys));
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}

/* ---- patterns: base/rng.c again, number for number ---- */

__device__ static uint64_t random_word(uint64_t seed, uint64_t index) {
  uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32), c2 = WN_RNG_SELECT, c3 = 0;
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ key0;
    c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ key1;
    c3 = (uint32_t)a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return (uint64_t)c1 << 32 | c0;
}

/* Place `index` of the permutation of 0 .. n-1 that the seed names. */
__device__ static uint64_t permuted(uint64_t seed, uint64_t n, uint64_t index) {
  int half_bits = 1;
  while (half_bits < 32 && (uint64_t)1 << (2 * half_bits) < n) half_bits++;
  const uint64_t mask = ((uint64_t)1 << half_bits) - 1;
  uint64_t value = index;
  do {
    uint64_t left = value >> half_bits, right = value & mask;
    for (uint64_t round = 0; round < 6; round++) {
      const uint64_t next = left ^ (random_word(seed, (round + 1) << 56 | right) & mask);
      left = right;
      right = next;
    }
    value = left << half_bits | right;
  } while (value >= n);
  return value;
}

__device__ static void random_row(int32_t *pick, int32_t k, int32_t first, int32_t visible, int32_t position,
                                  const wn_pattern_params &params) {
  extern __shared__ uint32_t picked[];
  __shared__ uint64_t warps[WN_PICK_WARPS];
  const uint64_t row = (uint64_t)(uint32_t)params.layer << 32 | (uint32_t)position;
  const uint64_t seed = random_word(params.seed, row);
  for (int32_t from = 0; from < visible; from += SEGMENT_WORDS * 32) {
    const int32_t keys = visible - from < SEGMENT_WORDS * 32 ? visible - from : SEGMENT_WORDS * 32;
    const int32_t words = (keys + 31) / 32;
    for (int32_t i = (int32_t)threadIdx.x; i < words; i += WN_PICK_THREADS) picked[i] = 0;
    __syncthreads();
    for (int32_t i = (int32_t)threadIdx.x; i < k; i += WN_PICK_THREADS) {
      const int32_t at = (int32_t)permuted(seed, (uint64_t)visible, (uint64_t)i) - from;
      if (at >= 0 && at < keys) atomicOr(picked + at / 32, 1u << at % 32);
    }
    __syncthreads();
    pick += wn_emit_bits(pick, picked, NULL, words, 0, first + from, warps);
    __syncthreads();
  }
}

__global__ static void __launch_bounds__(WN_PICK_THREADS)
    pattern_kernel(wn_view<int32_t> selection, const int32_t *first_key, const int32_t *last_key,
                   const int32_t *position, wn_pattern_params params) {
  const int64_t row = blockIdx.x;
  const int32_t first = first_key[row], last = last_key[row], k = selection.width;
  const int32_t visible = last >= first ? last - first + 1 : 0, kept = visible < k ? visible : k;
  int32_t *pick = selection.data + row * selection.row;
  if (visible > k && params.pattern == WN_PATTERN_RANDOM) {
    random_row(pick, k, first, visible, position[row], params);
    return;
  }
  const int32_t sink = params.pattern != WN_PATTERN_SINK ? 0 : kept < SINK_KEYS ? kept : SINK_KEYS;
  for (int32_t i = (int32_t)threadIdx.x; i < k; i += WN_PICK_THREADS)
    pick[i] = i < sink ? first + i : i < kept ? last + 1 - (kept - i) : -1;
}

wn_status wn_cuda_select_pattern(wn_device *device, wn_tensor *selection, const wn_rows *rows,
                                 const wn_pattern_params *params) {
  const wn_view<int32_t> picks = wn_view_of<int32_t>(selection);
  WN_ASSERT(selection->rank == 2 && picks.n == rows->n_rows, "selection of %lld rows", (long long)picks.n);
  WN_ASSERT((unsigned)params->pattern <= WN_PATTERN_RANDOM, "pattern %d", (int)params->pattern);
  if (picks.n == 0) return NULL;
  int64_t words = wn_ceil_div(rows->n_keys, 32);
  if (words > SEGMENT_WORDS) words = SEGMENT_WORDS;
  const size_t bytes = params->pattern == WN_PATTERN_RANDOM ? (size_t)words * 4 : 0;
  WN_CUDA_TRY(cudaFuncSetAttribute(pattern_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  pattern_kernel<<<(unsigned)picks.n, WN_PICK_THREADS, bytes, wn_cuda_stream(device)>>>(
      picks, rows->first_key, rows->last_key, rows->position, *params);
  WN_CUDA_LAUNCHED("select_pattern");
  return NULL;
}
