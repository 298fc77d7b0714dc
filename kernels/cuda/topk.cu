/* Exact top-k of rows of FP32 scores: a block per row.
 *
 * Scores become integers of the same order (-0 as 0, NaN as -inf). The quick way reads a row once: a sample says which
 * value a little more than k scores will reach, those that reach it are collected in shared memory, and a radix select
 * parts them exactly. Where the guess fails (plateaus, odd distributions), the thorough way sweeps the row three times
 * for the digits of the k-th largest and once more to write the picks. Both give the same exact answer: a pick is
 * decided by its score and its place alone. Picks come out in order because they are bits of a map of the row. */
#include "kernels/cuda/topk.cuh"

enum {
  THREADS = WN_PICK_THREADS,
  DIGIT_BITS = 11,
  BINS = 1 << DIGIT_BITS,
  UNROLL = 4,       /* vectors of 4 scores that a thread has under way */
  RUNS_MOST = 1024, /* of the sample; a run is 8 scores */
  RUNS_A_THREAD = RUNS_MOST / WN_PICK_THREADS,
  QUICK_PICKS = 4096,   /* above: the thorough way */
  QUICK_KEYS = 1 << 18, /* likewise */
  LEAST_CANDIDATES = 2048,
  CANDIDATES_MULTIPLE = 512
};

typedef struct shared_words {
  uint32_t hist[BINS];
  uint64_t warps[WN_PICK_WARPS];
  uint32_t digit, above, inside; /* of find_digit */
  uint32_t n_candidates, largest;
} shared_words;

/* A row's visible scores, 16-byte aligned: element i of groups * 4 is one when begin <= i < end. */
typedef struct span {
  const float4 *at;
  int32_t begin, end, groups;
} span;

/* Where the k-th largest lies: keys with (key >> shift) > edge are picked, and `ties` of those where it is equal. */
typedef struct parting {
  uint32_t edge, shift, ties;
} parting;

__device__ __forceinline__ uint32_t ordered(float x) {
  x = x == x ? x : -INFINITY;
  x = __fadd_rn(x, 0.0f); /* -0 + 0 is 0 */
  const uint32_t bits = __float_as_uint(x);
  return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}

/* The keys of group g, 0 (below that of -inf) where there is no score. */
__device__ __forceinline__ void keys_of(uint32_t key[4], const span &s, int32_t g, float4 x) {
  const float score[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int32_t i = 4 * g + e;
    key[e] = i >= s.begin && i < s.end ? ordered(score[e]) : 0;
  }
}

__device__ __forceinline__ float4 group_of(const span &s, int32_t g) {
  return g < s.groups ? __ldg(s.at + g) : make_float4(0, 0, 0, 0);
}

__device__ static void clear_hist(shared_words *w) {
  for (int32_t i = (int32_t)threadIdx.x; i < BINS; i += THREADS) w->hist[i] = 0;
  __syncthreads();
}

/* One more in hist[digit] where `hit`; a whole warp calls. The digit of the first lane that hits goes in one sum, so
 * that a plateau is not a queue of 32. */
__device__ __forceinline__ void count_digit(uint32_t *hist, uint32_t digit, bool hit) {
  const uint32_t hits = __ballot_sync(~0u, hit);
  if (!hits) return;
  const int leader = __ffs((int)hits) - 1;
  const uint32_t common = __shfl_sync(~0u, digit, leader);
  const uint32_t same = __ballot_sync(~0u, hit && digit == common);
  if ((int)(threadIdx.x % 32) == leader)
    atomicAdd(hist + common, (uint32_t)__popc(same));
  else if (hit && digit != common)
    atomicAdd(hist + digit, 1u);
}

/* The largest digit that at least `wanted` counts reach (1 <= wanted <= all); how many lie above it and inside. */
__device__ static void find_digit(shared_words *w, uint32_t wanted) {
  enum { EACH = BINS / THREADS };
  __syncthreads();
  const int32_t top = BINS - 1 - (int32_t)threadIdx.x * EACH;
  uint32_t count[EACH], sum = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    count[i] = w->hist[top - i];
    sum += count[i];
  }
  uint64_t total;
  uint32_t above = (uint32_t)wn_block_scan(sum, &total, w->warps);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    if (above < wanted && wanted <= above + count[i]) {
      w->digit = (uint32_t)(top - i);
      w->above = above;
      w->inside = count[i];
    }
    above += count[i];
  }
  __syncthreads();
}

/* ---- the quick way ---- */

/* A value (as a key) that the `rank` largest of the sample reach, give or take the digits left out: it is rounded
 * down. */
__device__ static uint32_t sample_pivot(shared_words *w, const span &s, int32_t runs, uint32_t rank) {
  uint32_t key[RUNS_A_THREAD * 8];
#pragma unroll
  for (int r = 0; r < RUNS_A_THREAD; r++) {
    const int32_t run = r * THREADS + (int32_t)threadIdx.x;
    const int32_t g = (int32_t)((int64_t)run * s.groups / runs);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int32_t at = run < runs ? g + h : s.groups;
      keys_of(key + r * 8 + h * 4, s, at, group_of(s, at));
    }
  }
  uint32_t prefix = 0, mask = 0;
#pragma unroll
  for (int level = 0; level < 2; level++) {
    const uint32_t shift = 32 - DIGIT_BITS * (level + 1);
    clear_hist(w);
#pragma unroll
    for (int i = 0; i < RUNS_A_THREAD * 8; i++)
      count_digit(w->hist, key[i] >> shift & (BINS - 1), (key[i] & mask) == prefix && key[i]);
    find_digit(w, rank);
    prefix |= w->digit << shift;
    mask |= (uint32_t)(BINS - 1) << shift;
    rank -= w->above;
  }
  return prefix;
}

/* Keys that reach the pivot (at least 1) with their places, the first `capacity` that come; counts them all and finds
 * the largest. */
__device__ static void collect(shared_words *w, uint32_t *key_at, uint32_t *place_at, uint32_t capacity, const span &s,
                               uint32_t pivot) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t largest = 0;
  for (int32_t base = 0; base < s.groups; base += UNROLL * THREADS) {
    float4 x[UNROLL];
    uint32_t key[UNROLL * 4], hits = 0;
    const int32_t g0 = base + (int32_t)threadIdx.x;
#pragma unroll
    for (int u = 0; u < UNROLL; u++) x[u] = group_of(s, g0 + u * THREADS);
#pragma unroll
    for (int u = 0; u < UNROLL; u++) keys_of(key + 4 * u, s, g0 + u * THREADS, x[u]);
#pragma unroll
    for (int i = 0; i < UNROLL * 4; i++) hits |= (uint32_t)(key[i] >= pivot) << i;
    uint32_t sum = (uint32_t)__popc(hits);
    if (!__any_sync(~0u, sum)) continue;
#pragma unroll
    for (uint32_t d = 1; d < 32; d *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, sum, d);
      sum += lane >= d ? other : 0;
    }
    uint32_t at = 0;
    if (lane == 31) at = atomicAdd(&w->n_candidates, sum);
    at = __shfl_sync(~0u, at, 31);
    if (at >= capacity) break; /* too many already: the guess has failed */
    at += sum - (uint32_t)__popc(hits);
#pragma unroll
    for (int i = 0; i < UNROLL * 4; i++) {
      if (!(hits >> i & 1)) continue;
      if (at < capacity) {
        key_at[at] = key[i];
        place_at[at] = (uint32_t)(4 * (g0 + i / 4 * THREADS) + i % 4);
      }
      largest = key[i] > largest ? key[i] : largest;
      at++;
    }
  }
  largest = __reduce_max_sync(~0u, largest);
  if (lane == 0) atomicMax(&w->largest, largest);
  __syncthreads();
}

/* Parts the k largest of n candidates from the rest; their keys are taken less `pivot`, their range decides the
 * digits. */
__device__ static parting part_candidates(shared_words *w, const uint32_t *key_at, uint32_t n, uint32_t pivot,
                                          uint32_t k) {
  parting p = {0, 0, k};
  uint32_t bits = 32 - (uint32_t)__clz((int)(w->largest - pivot));
  p.shift = bits;
  while (p.shift > 0) {
    const uint32_t digit_bits = p.shift < DIGIT_BITS ? p.shift : DIGIT_BITS, before = p.shift;
    p.shift -= digit_bits;
    clear_hist(w);
    for (uint32_t base = 0; base < n; base += THREADS) {
      const uint32_t i = base + threadIdx.x, key = i < n ? key_at[i] - pivot : 0;
      const bool hit = i < n && (before == bits || key >> before == p.edge);
      count_digit(w->hist, key >> p.shift & ((1u << digit_bits) - 1), hit);
    }
    find_digit(w, p.ties);
    p.edge = p.edge << digit_bits | w->digit;
    p.ties -= w->above;
    if (w->inside == p.ties) break; /* all of them: no need to part them */
  }
  return p;
}

/* False: the guess failed, nothing was written. */
__device__ static bool quick_row(shared_words *w, uint32_t *memory, uint32_t capacity, int32_t n_words, int32_t *pick,
                                 const span &s, uint32_t k, int32_t base) {
  uint32_t *key_at = memory, *place_at = memory + capacity, *above = place_at + capacity, *equal = above + n_words;
  const int32_t visible = s.end - s.begin, words = (s.groups * 4 + 31) / 32;
  uint32_t pivot = 1;
  if ((uint32_t)visible > capacity) {
    const int32_t runs = s.groups / 8 < RUNS_MOST ? s.groups / 8 : RUNS_MOST;
    const float expected = (float)k * 8.0f * (float)runs / (float)visible;
    const uint32_t rank = (uint32_t)(expected + 4.0f * sqrtf(expected) + 8.0f);
    if (rank + 8 >= 8 * (uint32_t)runs) return false; /* the sample may lack up to 6 places at the row's ends */
    pivot = sample_pivot(w, s, runs, rank);
    pivot = pivot ? pivot : 1;
  }
  if (threadIdx.x == 0) w->n_candidates = w->largest = 0;
  for (int32_t i = (int32_t)threadIdx.x; i < words; i += THREADS) above[i] = equal[i] = 0;
  __syncthreads();
  collect(w, key_at, place_at, capacity, s, pivot);
  const uint32_t n = w->n_candidates;
  if (n < k || n > capacity) return false;
  const parting p = part_candidates(w, key_at, n, pivot, k);
  for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
    const uint32_t key = (key_at[i] - pivot) >> p.shift, place = place_at[i];
    if (key > p.edge) atomicOr(above + place / 32, 1u << place % 32);
    if (key == p.edge) atomicOr(equal + place / 32, 1u << place % 32);
  }
  __syncthreads();
  wn_emit_bits(pick, above, equal, words, p.ties, base, w->warps);
  return true;
}

/* ---- the thorough way ---- */

__device__ static parting part_row(shared_words *w, const span &s, uint32_t k) {
  parting p = {0, 32, k};
  while (p.shift > 0) {
    const uint32_t digit_bits = p.shift < DIGIT_BITS ? p.shift : DIGIT_BITS, before = p.shift;
    p.shift -= digit_bits;
    clear_hist(w);
    for (int32_t base = 0; base < s.groups; base += THREADS) {
      const int32_t g = base + (int32_t)threadIdx.x;
      uint32_t key[4];
      keys_of(key, s, g, group_of(s, g));
#pragma unroll
      for (int e = 0; e < 4; e++)
        count_digit(w->hist, key[e] >> p.shift & ((1u << digit_bits) - 1),
                    key[e] && (before == 32 || key[e] >> before == p.edge));
    }
    find_digit(w, p.ties);
    p.edge = p.edge << digit_bits | w->digit;
    p.ties -= w->above;
    if (w->inside == p.ties) break;
  }
  return p;
}

__device__ static void thorough_row(shared_words *w, int32_t *pick, const span &s, uint32_t k, int32_t base) {
  const parting p = part_row(w, s, k);
  uint32_t n_above = 0, n_equal = 0; /* before this sweep's scores */
  for (int32_t from = 0; from < s.groups; from += THREADS) {
    const int32_t g = from + (int32_t)threadIdx.x;
    uint32_t key[4];
    int32_t aboves = 0, equals = 0;
    keys_of(key, s, g, group_of(s, g));
#pragma unroll
    for (int e = 0; e < 4; e++) {
      aboves += key[e] && key[e] >> p.shift > p.edge;
      equals += key[e] && key[e] >> p.shift == p.edge;
    }
    uint64_t total;
    const uint64_t before = wn_block_scan(wn_two_counts(aboves, equals), &total, w->warps);
    uint32_t a = n_above + (uint32_t)before, q = n_equal + (uint32_t)(before >> 32);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const bool above = key[e] && key[e] >> p.shift > p.edge, equal = key[e] && key[e] >> p.shift == p.edge;
      if (above || (equal && q < p.ties)) pick[a + (q < p.ties ? q : p.ties)] = base + 4 * g + e;
      a += above;
      q += equal;
    }
    n_above += (uint32_t)total;
    n_equal += (uint32_t)(total >> 32);
  }
}

/* capacity 0: the thorough way only */
__global__ static void __launch_bounds__(THREADS, 2)
    top_k_kernel(wn_view<int32_t> selection, const float *scores, int64_t pitch, const int32_t *first_key,
                 const int32_t *last_key, uint32_t capacity, int32_t n_words) {
  __shared__ shared_words w;
  extern __shared__ uint4 memory[];
  const int64_t row = gridDim.x - 1 - blockIdx.x; /* the last rows see most keys: they go first */
  const int32_t first = first_key[row], last = last_key[row], k = selection.width;
  const int32_t visible = last >= first ? last - first + 1 : 0;
  int32_t *pick = selection.data + row * selection.row;
  if (visible <= k) {
    for (int32_t i = (int32_t)threadIdx.x; i < k; i += THREADS) pick[i] = i < visible ? first + i : -1;
    return;
  }
  const int32_t base = first & ~3;
  span s = {(const float4 *)(scores + row * pitch + base), first - base, last + 1 - base, (last - base) / 4 + 1};
  if (capacity && quick_row(&w, (uint32_t *)memory, capacity, n_words, pick, s, (uint32_t)k, base)) return;
  thorough_row(&w, pick, s, (uint32_t)k, base);
}

wn_status wn_cuda_top_k(wn_device *device, wn_view<int32_t> selection, const float *scores, int64_t pitch,
                        const int32_t *first, const int32_t *last, int32_t n_keys) {
  WN_ASSERT((uintptr_t)scores % 16 == 0 && pitch % 4 == 0 && pitch >= n_keys, "scores of %lld a row", (long long)pitch);
  if (selection.n == 0 || selection.width == 0) return NULL;
  const bool quick = selection.width <= QUICK_PICKS && n_keys <= QUICK_KEYS;
  int64_t capacity = wn_ceil_div(2 * (int64_t)selection.width, CANDIDATES_MULTIPLE) * CANDIDATES_MULTIPLE;
  if (capacity < LEAST_CANDIDATES) capacity = LEAST_CANDIDATES;
  if (!quick) capacity = 0;
  const int32_t n_words = (int32_t)(wn_ceil_div(pitch + 4, 128) * 4);
  const int32_t bytes = quick ? (int32_t)(capacity * 8 + n_words * 8) : 0;
  WN_CUDA_TRY(cudaFuncSetAttribute(top_k_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  top_k_kernel<<<(unsigned)selection.n, THREADS, (size_t)bytes, wn_cuda_stream(device)>>>(
      selection, scores, pitch, first, last, (uint32_t)capacity, n_words);
  WN_CUDA_LAUNCHED("top_k");
  return NULL;
}
