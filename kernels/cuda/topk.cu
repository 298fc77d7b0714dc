/* Exact top-k of rows of FP32 scores: a block per row.
 *
 * What decides is an integer of the score's order (-0 as 0, NaN as -inf), then the place. Three ways, the same answer:
 * a short row is read once into registers; a long one is read once after a sample of it has said which value a little
 * more than k scores will reach, and those that reach it are collected in shared memory. Either lot falls into bins of
 * equal width; whole bins above the k-th largest are in, and the few scores of its own bin are ranked against each
 * other. Where that guess fails (plateaus, one score far from all others), the thorough way sweeps the row for the
 * digits of the k-th largest and once more to write the picks. Picks come out in order because they are bits of a map
 * of the row.
 *
 * Scores read on an H200, TB/s, k 2048 (a copy reads and writes 4.2); 4096 rows of 128K keys; rows 16K .. 32K of 32K
 * keys; 8K rows of 8K keys:
 * - a sample parted by digits, candidates parted by the digits of their keys: 2.0 to 2.25; 0.89 to 0.99; 0.32
 * - bins of equal width, short rows in registers: 1.61; 1.39; 0.70
 * - long rows collected by one comparison a score, binned afterwards (this): 2.09; 1.90; 0.70
 *
 * It does not help short rows to count only the scores above a guess. */
#include "kernels/cuda/topk.cuh"

enum {
  THREADS = WN_PICK_THREADS,
  DIGIT_BITS = 10,
  BINS = 1 << DIGIT_BITS,
  INSIDE_MOST = BINS / 2, /* scores of one bin that are ranked */
  SHORT_GROUPS = 8,       /* of 4 scores, of a thread */
  UNROLL = 4,             /* groups that a thread has under way in a long row */
  RUNS_MOST = 512,
  RUN_SHARE = 16, /* of the sample; a run is two groups, at most one in 16 begins a run */
  RUNS_A_THREAD = RUNS_MOST / WN_PICK_THREADS,
  QUICK_PICKS = 4096,   /* above: the thorough way */
  QUICK_KEYS = 1 << 18, /* likewise */
  LEAST_CANDIDATES = 1024,
  CANDIDATES_MULTIPLE = 256
};

/* A score's integer and its place in the row. */
typedef struct candidate {
  uint32_t key, place;
} candidate;

/* A score that was collected. */
typedef struct found {
  float score;
  uint32_t place;
} found;

typedef struct shared_words {
  union {
    uint32_t hist[BINS];
    candidate inside[INSIDE_MOST];
  };
  uint64_t warps[WN_PICK_WARPS];
  uint32_t digit, n_above, n_equal; /* of find_digit */
  uint32_t n_candidates, n_inside;
  uint32_t smallest, largest; /* keys of finite scores */
} shared_words;

/* A row's visible scores, 16-byte aligned: element i of groups * 4 is one when begin <= i < end. */
typedef struct span {
  const float4 *at;
  int32_t begin, end, groups;
} span;

__device__ __forceinline__ uint32_t ordered(float x) {
  x = x == x ? x : -INFINITY;
  x = __fadd_rn(x, 0.0f); /* -0 + 0 is 0 */
  const uint32_t bits = __float_as_uint(x);
  return bits ^ ((uint32_t)((int32_t)bits >> 31) | 0x80000000u);
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

/* The scores of a group that all exist. */
__device__ __forceinline__ void inner_scores_of(float score[4], const span &s, int32_t g) {
  const float4 x = __ldcs(s.at + g);
  score[0] = x.x;
  score[1] = x.y;
  score[2] = x.z;
  score[3] = x.w;
}

/* The scores of group g, -inf where there is none; those that do not exist are not read. */
__device__ __forceinline__ void scores_of(float score[4], const span &s, int32_t g) {
  if (g > 0 && g < s.groups - 1) {
    inner_scores_of(score, s, g);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int32_t i = 4 * g + e;
    score[e] = i >= s.begin && i < s.end ? __ldcs((const float *)s.at + i) : -INFINITY;
  }
}

/* The largest digit that at least `wanted` counts reach (1 <= wanted <= all); how many lie above it and in it. */
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
  uint32_t total, above = wn_block_scan(sum, &total, (uint32_t *)w->warps);
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    if (above < wanted && wanted <= above + count[i]) {
      w->digit = (uint32_t)(top - i);
      w->n_above = above;
      w->n_equal = count[i];
    }
    above += count[i];
  }
  __syncthreads();
}

__device__ static void clear_words(uint32_t *words, int32_t n) {
  for (int32_t i = (int32_t)threadIdx.x; i < n; i += THREADS) words[i] = 0;
}

/* ---- bins of equal width: monotone, so that bins above the k-th largest's hold larger scores only ---- */

typedef struct bins {
  float scale, offset;
} bins;

/* Bin plus 2^23, exactly, so that the bin is the low bits; what lies outside, and NaN (lowest), is in the end bins. */
__device__ __forceinline__ float bin_place(const bins &b, float x) {
  return __fmaf_rn(__saturatef(__fmaf_rn(x, b.scale, b.offset)), (float)(BINS - 1), 8388608.0f);
}
__device__ __forceinline__ uint32_t bin_of(const bins &b, float x) {
  return __float_as_uint(bin_place(b, x)) & (BINS - 1);
}

/* Everything is in bin 0 where there is nothing to part. */
__device__ __forceinline__ bins bins_of(float low, float high) {
  const float scale = 1.0f / (high - low), offset = -low * scale;
  if (!(scale > 0 && scale < INFINITY && fabsf(offset) < INFINITY)) return bins{0.0f, 0.0f};
  return bins{scale, offset};
}

/* The finite extremes of all threads' n scores; smallest and largest were set up before a barrier. */
template <int N> __device__ __forceinline__ void extremes(shared_words *w, const float (&x)[N]) {
  float low = INFINITY, high = -INFINITY;
#pragma unroll
  for (int i = 0; i < N; i++)
    if (fabsf(x[i]) < INFINITY) {
      low = fminf(low, x[i]);
      high = fmaxf(high, x[i]);
    }
  const uint32_t smallest = __reduce_min_sync(~0u, ordered(low)), largest = __reduce_max_sync(~0u, ordered(high));
  if (threadIdx.x % 32 == 0) {
    atomicMin(&w->smallest, smallest);
    atomicMax(&w->largest, largest);
  }
  __syncthreads();
}

/* Ranks the scores of the k-th largest's bin and writes the row's picks; `map` already has all that lie above. */
__device__ static void finish_row(shared_words *w, uint32_t *map, int32_t words, uint32_t wanted, int32_t *pick,
                                  int32_t base) {
  __syncthreads();
  const uint32_t n = w->n_inside;
  for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
    const candidate own = w->inside[i];
    uint32_t before = 0;
    for (uint32_t j = 0; j < n; j++) {
      const candidate other = w->inside[j];
      before += other.key > own.key || (other.key == own.key && other.place < own.place);
    }
    if (before < wanted) atomicOr(map + own.place / 32, 1u << own.place % 32);
  }
  __syncthreads();
  wn_emit_bits(pick, map, NULL, words, 0, base, w->warps);
}

/* ---- a short row ---- */

/* False here and below: the guess failed, nothing was written. */
__device__ static bool short_row(shared_words *w, uint32_t *map, int32_t *pick, const span &s, uint32_t k,
                                 int32_t base) {
  const int32_t words = (s.groups * 4 + 31) / 32;
  float x[SHORT_GROUPS * 4];
#pragma unroll
  for (int u = 0; u < SHORT_GROUPS; u++) scores_of(x + 4 * u, s, u * THREADS + (int32_t)threadIdx.x);
  clear_words(map, words);
  float some[SHORT_GROUPS];
#pragma unroll
  for (int u = 0; u < SHORT_GROUPS; u++) some[u] = x[4 * u + u % 4]; /* the end bins take what lies outside */
  extremes(w, some);
  const bins b = bins_of(value_of(w->smallest), value_of(w->largest));
#pragma unroll
  for (int i = 0; i < SHORT_GROUPS * 4; i++) {
    const int32_t g = i / 4 * THREADS + (int32_t)threadIdx.x;
    if (g < s.groups) atomicAdd(w->hist + bin_of(b, x[i]), 1u); /* at the ends up to 6 too many in the lowest */
  }
  find_digit(w, k);
  const uint32_t above = w->n_above;
  const float edge = 8388608.0f + (float)w->digit;
  if (w->n_equal > INSIDE_MOST) return false;
#pragma unroll
  for (int u = 0; u < SHORT_GROUPS; u++) {
    const int32_t g = u * THREADS + (int32_t)threadIdx.x;
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float place = bin_place(b, x[4 * u + e]);
      if (place > edge) bits |= 1u << e;
      if (place == edge && 4 * g + e >= s.begin && 4 * g + e < s.end)
        w->inside[atomicAdd(&w->n_inside, 1u)] = candidate{ordered(x[4 * u + e]), (uint32_t)(4 * g + e)};
    }
    if (bits) atomicOr(map + g / 8, bits << g % 8 * 4);
  }
  finish_row(w, map, words, k - above, pick, base);
  return true;
}

/* ---- a long row ---- */

/* x[i], for an i that is not known at compile time: a tree of selections. */
__device__ __forceinline__ float element_of(const float (&x)[16], uint32_t i) {
  float a[8], b[4];
#pragma unroll
  for (int j = 0; j < 8; j++) a[j] = i & 1 ? x[2 * j + 1] : x[2 * j];
#pragma unroll
  for (int j = 0; j < 4; j++) b[j] = i & 2 ? a[2 * j + 1] : a[2 * j];
  const float c0 = i & 4 ? b[1] : b[0], c1 = i & 4 ? b[3] : b[2];
  return i & 8 ? c1 : c0;
}

/* The scores that reach `least`, the first `capacity` that come; counts them all. */
__device__ static void collect(shared_words *w, found *all, uint32_t capacity, const span &s, float least) {
  const uint32_t lane = threadIdx.x % 32, below = (1u << lane) - 1;
  for (int32_t from = 0; from < s.groups; from += UNROLL * THREADS) {
    float x[UNROLL * 4];
    uint32_t hits = 0;
    const int32_t g0 = from + (int32_t)threadIdx.x;
    if (from > 0 && from + UNROLL * THREADS < s.groups) {
#pragma unroll
      for (int u = 0; u < UNROLL; u++) inner_scores_of(x + 4 * u, s, g0 + u * THREADS);
    } else {
#pragma unroll
      for (int u = 0; u < UNROLL; u++) scores_of(x + 4 * u, s, g0 + u * THREADS);
    }
#pragma unroll
    for (int i = 0; i < UNROLL * 4; i++)
      if (x[i] >= least) hits |= 1u << i;
    const uint32_t sum = __reduce_add_sync(~0u, (uint32_t)__popc(hits));
    if (sum == 0) continue;
    uint32_t at = 0;
    if (lane == 0) at = atomicAdd(&w->n_candidates, sum);
    at = __shfl_sync(~0u, at, 0);
    if (at + sum > capacity) break; /* too many */
    for (uint32_t left = __ballot_sync(~0u, hits); left; left = __ballot_sync(~0u, hits)) {
      if (hits) {
        const uint32_t i = (uint32_t)__ffs((int)hits) - 1;
        all[at + (uint32_t)__popc(left & below)] =
            found{element_of(x, i), (uint32_t)g0 * 4 + (i & ~3u) * THREADS + (i & 3)};
        hits &= hits - 1;
      }
      at += (uint32_t)__popc(left);
    }
  }
  __syncthreads();
}

/* A value that a little more than k scores reach, if the sample is any good; -inf if it is none. */
__device__ static float guess_least(shared_words *w, const span &s, uint32_t k) {
  const int32_t runs = s.groups / RUN_SHARE < RUNS_MOST ? s.groups / RUN_SHARE : RUNS_MOST;
  const float expected = (float)k * 8.0f * (float)runs / (float)(s.end - s.begin);
  const uint32_t rank = (uint32_t)(expected + 3.5f * sqrtf(expected) + 4.0f);
  if (rank > 8 * (uint32_t)runs) return -INFINITY;
  float x[RUNS_A_THREAD * 8];
#pragma unroll
  for (int r = 0; r < RUNS_A_THREAD; r++) {
    const int32_t run = r * THREADS + (int32_t)threadIdx.x, g = (int32_t)((int64_t)run * s.groups / runs);
#pragma unroll
    for (int h = 0; h < 2; h++) scores_of(x + r * 8 + h * 4, s, run < runs ? g + h : s.groups);
  }
  extremes(w, x);
  const float low = value_of(w->smallest), range = value_of(w->largest) - low;
  const bins b = bins_of(low, low + range);
  if (b.scale == 0) return -INFINITY;
#pragma unroll
  for (int i = 0; i < RUNS_A_THREAD * 8; i++)
    if (i / 8 * THREADS + (int32_t)threadIdx.x < runs) atomicAdd(w->hist + bin_of(b, x[i]), 1u);
  find_digit(w, rank);
  return low + range * (((float)w->digit - 0.5f) / (float)(BINS - 1));
}

__device__ static bool long_row(shared_words *w, uint32_t *map, found *all, uint32_t capacity, int32_t *pick,
                                const span &s, uint32_t k, int32_t base) {
  const int32_t words = (s.groups * 4 + 31) / 32;
  clear_words(map, words);
  const float least = guess_least(w, s, k);
  if (least == -INFINITY) return false;
  clear_words(w->hist, BINS);
  if (threadIdx.x == 0) w->largest = 0;
  collect(w, all, capacity, s, least);
  const uint32_t n = w->n_candidates;
  if (n < k || n > capacity) return false;
  uint32_t largest = 0;
  for (uint32_t i = threadIdx.x; i < n; i += THREADS)
    if (all[i].score < INFINITY) largest = max(largest, ordered(all[i].score));
  largest = __reduce_max_sync(~0u, largest);
  if (threadIdx.x % 32 == 0) atomicMax(&w->largest, largest);
  __syncthreads();
  const bins b = bins_of(least, value_of(w->largest));
  for (uint32_t i = threadIdx.x; i < n; i += THREADS) atomicAdd(w->hist + bin_of(b, all[i].score), 1u);
  find_digit(w, k);
  const uint32_t digit = w->digit, above = w->n_above;
  if (w->n_equal > INSIDE_MOST) return false;
  for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
    const found f = all[i];
    const uint32_t bin = bin_of(b, f.score);
    if (bin > digit) atomicOr(map + f.place / 32, 1u << f.place % 32);
    if (bin == digit) w->inside[atomicAdd(&w->n_inside, 1u)] = candidate{ordered(f.score), f.place};
  }
  finish_row(w, map, words, k - above, pick, base);
  return true;
}

/* ---- the thorough way ---- */

/* Where the k-th largest lies: keys with (key >> shift) > edge are picked, and `ties` of those where it is equal. */
typedef struct parting {
  uint32_t edge, shift, ties;
} parting;

/* The keys of group g, 0 (below that of -inf) where there is no score. */
__device__ __forceinline__ void keys_of(uint32_t key[4], const span &s, int32_t g) {
  float x[4];
  scores_of(x, s, g);
#pragma unroll
  for (int e = 0; e < 4; e++) key[e] = 4 * g + e >= s.begin && 4 * g + e < s.end ? ordered(x[e]) : 0;
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

__device__ static parting part_row(shared_words *w, const span &s, uint32_t k) {
  parting p = {0, 32, k};
  while (p.shift > 0) {
    const uint32_t digit_bits = p.shift < DIGIT_BITS ? p.shift : DIGIT_BITS, before = p.shift;
    p.shift -= digit_bits;
    __syncthreads();
    clear_words(w->hist, BINS);
    __syncthreads();
    for (int32_t from = 0; from < s.groups; from += THREADS) {
      uint32_t key[4];
      keys_of(key, s, from + (int32_t)threadIdx.x);
#pragma unroll
      for (int e = 0; e < 4; e++)
        count_digit(w->hist, key[e] >> p.shift & ((1u << digit_bits) - 1),
                    key[e] && (before == 32 || key[e] >> before == p.edge));
    }
    find_digit(w, p.ties);
    p.edge = p.edge << digit_bits | w->digit;
    p.ties -= w->n_above;
    if (w->n_equal == p.ties) break; /* all of them: no need to part them */
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
    keys_of(key, s, g);
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

/* quick false: the thorough way only; capacity 0: no row is long */
__global__ static void __launch_bounds__(THREADS, 4)
    top_k_kernel(wn_view<int32_t> selection, const float *scores, int64_t pitch, const int32_t *first_key,
                 const int32_t *last_key, bool quick, uint32_t capacity) {
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
  const span s = {(const float4 *)(scores + row * pitch + base), first - base, last + 1 - base, (last - base) / 4 + 1};
  if (quick) {
    found *all = (found *)memory;
    uint32_t *map = (uint32_t *)(all + capacity);
    if (threadIdx.x == 0) {
      w.n_candidates = w.n_inside = 0;
      w.smallest = UINT32_MAX;
      w.largest = 0;
    }
    clear_words(w.hist, BINS);
    __syncthreads();
    if (s.groups <= SHORT_GROUPS * THREADS ? short_row(&w, map, pick, s, (uint32_t)k, base)
                                           : long_row(&w, map, all, capacity, pick, s, (uint32_t)k, base))
      return;
  }
  thorough_row(&w, pick, s, (uint32_t)k, base);
}

wn_status wn_cuda_top_k(wn_device *device, wn_view<int32_t> selection, const float *scores, int64_t pitch,
                        const int32_t *first, const int32_t *last, int32_t n_keys) {
  WN_ASSERT((uintptr_t)scores % 16 == 0 && pitch % 4 == 0 && pitch >= n_keys, "scores of %lld a row", (long long)pitch);
  if (selection.n == 0 || selection.width == 0) return NULL;
  const bool quick = selection.width <= QUICK_PICKS && n_keys <= QUICK_KEYS;
  const bool long_rows = n_keys > (SHORT_GROUPS * THREADS - 1) * 4;
  int64_t capacity = wn_ceil_div(2 * (int64_t)selection.width, CANDIDATES_MULTIPLE) * CANDIDATES_MULTIPLE;
  if (capacity < LEAST_CANDIDATES) capacity = LEAST_CANDIDATES;
  if (!quick || !long_rows) capacity = 0;
  const int64_t map_words = quick ? wn_ceil_div(pitch + 4, 32) : 0;
  const size_t bytes = (size_t)(capacity * (int64_t)sizeof(found) + map_words * 4);
  WN_CUDA_TRY(cudaFuncSetAttribute(top_k_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  top_k_kernel<<<(unsigned)selection.n, THREADS, bytes, wn_cuda_stream(device)>>>(selection, scores, pitch, first, last,
                                                                                  quick, (uint32_t)capacity);
  WN_CUDA_LAUNCHED("top_k");
  return NULL;
}
