/* The selections that eval compares the indexer with: the best possible, and those that ask no one.
 *
 * The best: a chunk of rows at a time, p (dense_target.cu), then the same top-k as the indexer's. On an H200, 2048
 * rows, 8192 keys, 128 heads of 192: 157 TFLOP/s of both sweeps (16% of the limit: it serves evaluation only); 140 with
 * a sweep that did not cut the keys into pieces.
 *
 * The random pattern: a row marks its draws in a map of the keys it sees, 2^19 keys at a time. */
#include "base/rng.h"
#include "kernels/cuda/dense_target.cuh"
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/topk.cuh"

enum { SINK_KEYS = 4, SEGMENT_WORDS = 1 << 14 };

/* ---- best ---- */

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
  void *memory;
  WN_TRY(wn_cuda_scratch(device, &memory, "dense rows", chunk * pitch * (int64_t)sizeof(float)));
  for (int64_t row0 = 0; row0 < picks.n; row0 += chunk) {
    wn_view<int32_t> part = picks;
    wn_view<wn_bf16> queries = q;
    part.data += row0 * picks.row;
    queries.data += row0 * q.row;
    part.n = queries.n = picks.n - row0 < chunk ? picks.n - row0 : chunk;
    const wn_rows some = {(int32_t)part.n, rows->n_keys, rows->first_key + row0, rows->last_key + row0, NULL};
    float *p = (float *)memory;
    WN_TRY(wn_cuda_dense_target(device, p, pitch, queries, k, &some, picks.width, params->scale));
    WN_TRY(wn_cuda_top_k(device, part, p, pitch, some.first_key, some.last_key, rows->n_keys));
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
