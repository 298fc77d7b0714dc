/* How good the indexer's picks are, exactly, on sampled rows.
 *
 * The sampled rows are brought together first, so that everything after works on neighbours: their index scores are
 * those of indexer_select bit for bit (the same function), p is dense_target.cu's, both top-k are the selections' own.
 * Then a block takes a row and sums its columns in a fixed order. At most CHUNK_ROWS rows are under way, so scratch is
 * O(keys).
 *
 * Ladder, on an H200: 256 rows spread over a causal sequence, 128 heads of 192, indexer 64 x 128, 2048 picks. TFLOP/s
 * of the visible half of both sweeps and the scores.
 *
 *   version                                              8192 keys           32768 keys
 *   1: tiles of 128 x 128, two pieces under way, ships   1.54 ms   78        4.46 ms   108
 *   2: three pieces, no pause between heads              1.60 ms   75        4.65 ms   103
 *
 * Left: warpgroup products in both sweeps. */
#include <assert.h>
#include <math.h>

#include "kernels/cuda/dense_target.cuh"
#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/index_score.cuh"
#include "kernels/cuda/indexer_kl.cuh"
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/topk.cuh"

enum { WARP = 32, THREADS = 512, CHUNK_ROWS = 256, SINK_KEYS = 4, LOCAL_TOKENS = 128 };
#define FULL_WARP 0xffffffffu

/* Sampled rows, brought together. */
typedef struct sampled {
  wn_tensor q, w, qa; /* [s,HI,dI], [s,HI], [s,H,dq] */
  int32_t *first, *last;
  int32_t n; /* s */
} sampled;

/* ---- gathering ---- */

__device__ static int64_t number_of(const wn_view<int32_t> &sample, int64_t s, int64_t n_rows) {
  const int64_t row = sample.data[s * sample.row];
  assert(row >= 0 && row < n_rows); /* a programmer's error, which would be an address */
  return row;
}

template <typename T> __global__ static void gather_kernel(wn_view<T> to, wn_view<T> from, wn_view<int32_t> sample) {
  const int64_t row = number_of(sample, blockIdx.x, from.n);
  for (int32_t i = (int32_t)threadIdx.x; i < from.heads * from.width; i += THREADS) {
    const int64_t head = i / from.width, column = i % from.width;
    to.data[blockIdx.x * to.row + head * to.head + column] = from.data[row * from.row + head * from.head + column];
  }
}

__global__ static void gather_ranges_kernel(int32_t *first, int32_t *last, const int32_t *first_key,
                                            const int32_t *last_key, int64_t n_rows, wn_view<int32_t> sample) {
  const int32_t s = (int32_t)(blockIdx.x * blockDim.x + threadIdx.x);
  if (s >= sample.n) return;
  const int64_t row = number_of(sample, s, n_rows);
  first[s] = first_key[row];
  last[s] = last_key[row];
}

/* Rows of BF16 heads. What is 16-byte aligned stays so and what is not stays not: the scores' chain of operations may
 * depend on it. */
static wn_status gather_heads(wn_device *device, wn_tensor *to, const wn_tensor *from, const wn_view<int32_t> &sample) {
  const int64_t width = from->dim[2], odd = wn_view_vectors(wn_view_of<wn_bf16>(from)) ? 0 : 1;
  WN_TRY(wn_tensor_alloc(to, device->scratch, "sampled rows", WN_BF16, 3, sample.n, from->dim[1], width + odd, 0));
  *to = wn_tensor_slice(*to, 2, 0, width);
  gather_kernel<<<(unsigned)sample.n, THREADS, 0, wn_cuda_stream(device)>>>(wn_view_of<wn_bf16>(to),
                                                                            wn_view_of<wn_bf16>(from), sample);
  WN_CUDA_LAUNCHED("selection_stats");
  return NULL;
}

static wn_status gather_rows(wn_device *device, sampled *out, const wn_tensor *q, const wn_tensor *w,
                             const wn_tensor *qa, const wn_rows *rows, const wn_view<int32_t> &sample) {
  void *ranges;
  out->n = (int32_t)sample.n;
  WN_TRY(gather_heads(device, &out->q, q, sample));
  WN_TRY(gather_heads(device, &out->qa, qa, sample));
  WN_TRY(wn_tensor_alloc(&out->w, device->scratch, "sampled rows", WN_F32, 2, sample.n, w->dim[1], 0, 0));
  /* a matrix is one head of rows */
  gather_kernel<<<(unsigned)sample.n, THREADS, 0, wn_cuda_stream(device)>>>(wn_view_of<float>(&out->w),
                                                                            wn_view_of<float>(w), sample);
  WN_TRY(wn_cuda_scratch(device, &ranges, "sampled rows", sample.n * 2 * (int64_t)sizeof(int32_t)));
  out->first = (int32_t *)ranges;
  out->last = out->first + sample.n;
  gather_ranges_kernel<<<(unsigned)wn_ceil_div(sample.n, THREADS), THREADS, 0, wn_cuda_stream(device)>>>(
      out->first, out->last, rows->first_key, rows->last_key, rows->n_rows, sample);
  WN_CUDA_LAUNCHED("selection_stats");
  return NULL;
}

/* ---- columns ---- */

typedef struct stats_job {
  wn_view<float> stats;
  wn_view<int32_t> picks, best, prev; /* prev.data may be NULL */
  const float *p, *index;
  int64_t pitch;
  const int32_t *first, *last;
} stats_job;

template <typename T, typename F> __device__ static T block_reduce(T x, F combine) {
  __shared__ T shared[THREADS / WARP];
  for (int step = WARP / 2; step; step /= 2) x = combine(x, __shfl_xor_sync(FULL_WARP, x, step));
  __syncthreads();
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();
  x = shared[0];
  for (int i = 1; i < THREADS / WARP; i++) x = combine(x, shared[i]);
  return x;
}
__device__ static float block_sum(float x) {
  return block_reduce(x, [](float a, float b) { return a + b; });
}

/* Is `key` in the ascending list of n? */
__device__ static bool listed(const int32_t *list, int32_t n, int32_t key) {
  int32_t low = 0, high = n;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (list[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low < n && list[low] == key;
}

/* Columns that compare the distributions p and softmax(I) over the visible keys. */
__device__ static void distribution_columns(float *out, const float *p, const float *index, int32_t visible) {
  __shared__ double shared[THREADS / WARP];
  float top = -INFINITY, entropy_p = 0, entropy_index = 0;
  double sum = 0, kl = 0;
  for (int32_t i = (int32_t)threadIdx.x; i < visible; i += THREADS) top = fmaxf(top, index[i]);
  top = block_reduce(top, [](float a, float b) { return fmaxf(a, b); });
  for (int32_t i = (int32_t)threadIdx.x; i < visible; i += THREADS) sum += (double)expf(index[i] - top);
  const float log_sum = (float)log(wn_kl_block_sum(sum, shared));
  for (int32_t i = (int32_t)threadIdx.x; i < visible; i += THREADS) {
    const float target = p[i], log_index = index[i] - top - log_sum, share = expf(log_index);
    kl += (double)wn_kl_loss_term(target, log_index, share - target);
    if (share > 0) entropy_index -= share * log_index;
    if (target != 0) entropy_p -= target * logf(target);
  }
  kl = wn_kl_block_sum(kl, shared);
  entropy_p = block_sum(entropy_p);
  entropy_index = block_sum(entropy_index);
  if (threadIdx.x != 0) return;
  out[WN_STAT_KL_DENSE] = (float)kl;
  out[WN_STAT_KL_UNIFORM] = logf((float)visible) - entropy_p;
  out[WN_STAT_ENTROPY_TARGET] = entropy_p;
  out[WN_STAT_ENTROPY_INDEX] = entropy_index;
}

/* The first of the largest p: order of the value above, then lower places. */
__device__ static int32_t first_largest(const float *p, int32_t visible) {
  uint64_t best = 0;
  for (int32_t i = (int32_t)threadIdx.x; i < visible; i += THREADS) {
    const uint64_t key = (uint64_t)__float_as_uint(p[i] > 0 ? p[i] : 0.0f) << 32 | (uint32_t)~i;
    best = key > best ? key : best;
  }
  best = block_reduce(best, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
  return (int32_t) ~(uint32_t)best;
}

__device__ static float mass_of_range(const float *p, int32_t from, int32_t end) {
  float sum = 0;
  for (int32_t i = from + (int32_t)threadIdx.x; i < end; i += THREADS) sum += p[i];
  return block_sum(sum);
}

/* Columns about the picks; the row sees more than k keys, so there are exactly k. */
__device__ static void pick_columns(float *out, const stats_job &j, int64_t s, const float *p, int32_t first,
                                    int32_t visible) {
  const int32_t k = j.picks.width, sink = k < SINK_KEYS ? k : SINK_KEYS, top1 = first + first_largest(p, visible);
  const int32_t *pick = j.picks.data + s * j.picks.row, *best = j.best.data + s * j.best.row;
  float at_k = 0, of_best = 0, recall = 0, hit = 0, distance = 0, local = 0;
  for (int32_t i = (int32_t)threadIdx.x; i < k; i += THREADS) {
    const int32_t gap = first + visible - 1 - pick[i];
    at_k += p[pick[i] - first];
    of_best += p[best[i] - first];
    recall += listed(best, k, pick[i]);
    hit += pick[i] == top1;
    distance += (float)gap;
    local += gap < LOCAL_TOKENS;
  }
  at_k = block_sum(at_k);
  of_best = block_sum(of_best);
  recall = block_sum(recall);
  hit = block_sum(hit);
  distance = block_sum(distance);
  local = block_sum(local);
  const float recent = mass_of_range(p, visible - k, visible);
  const float sunk = mass_of_range(p, 0, sink) + mass_of_range(p, visible - (k - sink), visible);
  if (threadIdx.x != 0) return;
  out[WN_STAT_MASS_AT_K] = at_k;
  out[WN_STAT_MASS_BEST] = of_best;
  out[WN_STAT_MASS_RECENT] = recent;
  out[WN_STAT_MASS_SINK] = sunk;
  out[WN_STAT_MASS_RANDOM] = out[WN_STAT_DENSITY] = (float)k / (float)visible;
  out[WN_STAT_RECALL_AT_K] = recall / (float)k;
  out[WN_STAT_TOP1_HIT] = hit;
  out[WN_STAT_SELECT_DIST] = distance / (float)k;
  out[WN_STAT_SELECT_LOCAL] = local / (float)k;
}

/* Jaccard with the previous picks, which end at the first -1. */
__device__ static float overlap(const stats_job &j, int64_t s) {
  const int32_t k = j.picks.width, *pick = j.picks.data + s * j.picks.row, *prev = j.prev.data + s * j.prev.row;
  float common = 0, n = 0;
  for (int32_t i = (int32_t)threadIdx.x; i < k; i += THREADS) {
    n += prev[i] >= 0;
    common += prev[i] >= 0 && listed(pick, k, prev[i]);
  }
  common = block_sum(common);
  n = block_sum(n);
  return common / ((float)k + n - common);
}

__global__ static void __launch_bounds__(THREADS) columns_kernel(stats_job j) {
  const int64_t s = blockIdx.x;
  const int32_t first = j.first[s], visible = j.last[s] - first + 1;
  const float *p = j.p + s * j.pitch + first, *index = j.index + s * j.pitch + first;
  float *out = j.stats.data + s * j.stats.row;
  if (visible <= j.picks.width) {
    if (threadIdx.x < WN_N_STATS) out[threadIdx.x] = 0;
    return;
  }
  distribution_columns(out, p, index, visible);
  pick_columns(out, j, s, p, first, visible);
  const float iou = j.prev.data ? overlap(j, s) : NAN;
  if (threadIdx.x != 0) return;
  out[WN_STAT_COUNTED] = 1;
  out[WN_STAT_IOU_PREV] = iou;
}

/* ---- operation ---- */

/* Views that begin at the chunk's first sample. */
typedef struct chunk_views {
  wn_view<int32_t> sample, picks, prev;
  wn_view<float> stats;
} chunk_views;

static wn_status run_chunk(wn_device *device, const chunk_views *v, const wn_tensor *q, const wn_tensor *k,
                           const wn_tensor *w, const wn_tensor *qa, const wn_tensor *ka, const wn_rows *rows,
                           const wn_indexer_params *params) {
  const int64_t n = v->sample.n, pitch = wn_score_pitch(rows->n_keys), picks = v->picks.width;
  const size_t mark = wn_arena_mark(device->scratch);
  sampled some;
  wn_tensor index, p, best;
  WN_TRY(gather_rows(device, &some, q, w, qa, rows, v->sample));
  WN_TRY(wn_tensor_alloc(&index, device->scratch, "sampled scores", WN_F32, 2, n, pitch, 0, 0));
  WN_TRY(wn_tensor_alloc(&p, device->scratch, "sampled p", WN_F32, 2, n, pitch, 0, 0));
  WN_TRY(wn_tensor_alloc(&best, device->scratch, "sampled picks", WN_I32, 2, n, picks, 0, 0));
  const wn_rows few = {(int32_t)n, rows->n_keys, some.first, some.last, NULL};
  const wn_view<int32_t> bests = wn_view_of<int32_t>(&best);
  const stats_job j = {v->stats, v->picks,   bests,    v->prev, (const float *)p.data, (const float *)index.data,
                       pitch,    some.first, some.last};
  WN_TRY(wn_cuda_index_scores(device, (float *)index.data, pitch, &some.q, k, &some.w, &few, 0, n, (int32_t)picks,
                              params->scale));
  WN_TRY(wn_cuda_top_k(device, v->picks, j.index, pitch, some.first, some.last, rows->n_keys));
  WN_TRY(wn_cuda_dense_target(device, (float *)p.data, pitch, wn_view_of<wn_bf16>(&some.qa), wn_view_of<wn_bf16>(ka),
                              &few, (int32_t)picks, params->attention_scale));
  WN_TRY(wn_cuda_top_k(device, bests, j.p, pitch, some.first, some.last, rows->n_keys));
  columns_kernel<<<(unsigned)n, THREADS, 0, wn_cuda_stream(device)>>>(j);
  WN_CUDA_LAUNCHED("selection_stats");
  wn_arena_release(device->scratch, mark);
  return NULL;
}

wn_status wn_cuda_selection_stats(wn_device *device, wn_tensor *stats, wn_tensor *picks, const wn_tensor *sample,
                                  const wn_tensor *picks_prev, const wn_tensor *q, const wn_tensor *k,
                                  const wn_tensor *w, const wn_tensor *qa, const wn_tensor *ka, const wn_rows *rows,
                                  const wn_indexer_params *params) {
  const int64_t n = sample->dim[0];
  wn_cuda_expect_indexer(q, k, w, rows);
  wn_cuda_expect("sample", sample, WN_I32, 1, n, 0, 0);
  wn_cuda_expect("stats", stats, WN_F32, 2, n, WN_N_STATS, 0);
  wn_cuda_expect("picks", picks, WN_I32, 2, n, picks->dim[1], 0);
  if (picks_prev) wn_cuda_expect("picks_prev", picks_prev, WN_I32, 2, n, picks->dim[1], 0);
  wn_cuda_expect("qa", qa, WN_BF16, 3, rows->n_rows, qa->dim[1], qa->dim[2]);
  wn_cuda_expect("ka", ka, WN_BF16, 3, rows->n_keys, ka->dim[1], qa->dim[2]);
  WN_ASSERT(ka->dim[1] == qa->dim[1] || ka->dim[1] == 1, "%lld heads of keys", (long long)ka->dim[1]);
  for (int64_t from = 0; from < n; from += CHUNK_ROWS) {
    const int64_t count = n - from < CHUNK_ROWS ? n - from : (int64_t)CHUNK_ROWS;
    const wn_tensor s = wn_tensor_slice(*sample, 0, from, count), t = wn_tensor_slice(*stats, 0, from, count),
                    p = wn_tensor_slice(*picks, 0, from, count);
    chunk_views v = {wn_view_of<int32_t>(&s), wn_view_of<int32_t>(&p), {}, wn_view_of<float>(&t)};
    if (picks_prev) {
      const wn_tensor prev = wn_tensor_slice(*picks_prev, 0, from, count);
      v.prev = wn_view_of<int32_t>(&prev);
    }
    WN_TRY(run_chunk(device, &v, q, k, w, qa, ka, rows, params));
  }
  return NULL;
}
