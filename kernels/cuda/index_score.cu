/* Scores of the lightning indexer on tensor cores. Keys are the rows of a tile and (query, head) its columns, so that
 * the sum over heads runs along a thread's own registers and ends in two exchanges among the four threads that share a
 * key. The product is with the ReLU and the weight in one pass over the accumulators; no head's logits are stored.
 *
 * The general form: mma.sync, any number of heads (padded to 8, 16, 32, 64 or a multiple of 64 columns a query), any
 * width, any strides: 122 TFLOP/s at 64 heads x 128 on an H200 (12% of the limit). Shapes that models have go to
 * index_score_wide.cu, whose scores are the same bits. */
#include "kernels/cuda/dot_tile.cuh"
#include "kernels/cuda/index_score.cuh"
#include "kernels/cuda/index_score_wide.cuh"
#include "kernels/cuda/reduce.cuh"

typedef struct score_job {
  wn_dot_rows q, k; /* columns and rows of tiles; q's heads are those of one group of at most 64 */
  const float *w;
  int64_t w_row;
  float scale;
  int32_t n_heads, group, n_groups; /* places of a group: 8, 16, 32 or 64 */
  const int32_t *first, *last;
  int32_t n_rows, least;
  float *scores;
  int64_t pitch;
} score_job;

/* Does any of `count` rows from row0 need a key of key0 .. key0 + WN_DOT_TILE - 1? The whole block calls and agrees. */
__device__ static bool tile_needed(const score_job &j, int32_t row0, int32_t count, int32_t key0) {
  const int32_t row = row0 + (int32_t)threadIdx.x;
  bool needed = false;
  if ((int32_t)threadIdx.x < count && row < j.n_rows) {
    const int32_t first = j.first[row], last = j.last[row];
    needed = last - first + 1 > j.least && first < key0 + WN_DOT_TILE && last >= key0;
  }
  return __syncthreads_or(needed);
}

/* part[i][half] (keys 16 i + 8 half + lane / 4 of the warp's 32) summed over the four lanes that share a key; lane t of
 * the four stores the sum t. */
__device__ static void store_scores(const score_job &j, float part[2][2], int32_t row, int32_t key0) {
  const int32_t lane = (int32_t)threadIdx.x % 32, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float *p = &part[i / 2][i % 2];
    *p = wn_quad_sum(*p);
  }
  if (row >= j.n_rows) return;
  const float score = t == 0 ? part[0][0] : t == 1 ? part[0][1] : t == 2 ? part[1][0] : part[1][1];
  const int32_t key = key0 + t * 8 + lane / 4;
  if (key >= j.first[row] && key <= j.last[row]) j.scores[row * j.pitch + key] = score;
}

__global__ static void __launch_bounds__(WN_DOT_THREADS, 2) scores_kernel(score_job j) {
  extern __shared__ uint4 memory[];
  const int32_t rows_a_tile = WN_DOT_TILE / j.group, row0 = (int32_t)blockIdx.x * rows_a_tile;
  const int32_t key0 = (int32_t)blockIdx.y * WN_DOT_TILE;
  if (!tile_needed(j, row0, rows_a_tile, key0)) return;
  const int32_t lane = (int32_t)threadIdx.x % 32, warp = (int32_t)threadIdx.x / 32;
  const int32_t column0 = warp / 4 * 64 + 2 * (lane % 4);
  float acc[2][8][4], part[2][2] = {{0, 0}, {0, 0}};
  for (int32_t g = 0; g < j.n_groups; g++) {
    wn_dot_rows q = j.q;
    q.data += g * 64 * q.head;
    q.heads -= g * 64;
    wn_dot_tile(acc, wn_shared_address(memory), j.k, key0, q, (int64_t)row0 * j.group);
#pragma unroll
    for (int c = 0; c < 8; c++) {
      const int32_t column = column0 + 8 * c, row = row0 + column / j.group, head = g * 64 + column % j.group;
#pragma unroll
      for (int e = 0; e < 2; e++) {
        if (row >= j.n_rows || head + e >= j.n_heads) continue; /* no product: 0 times an infinite key is NaN */
        const float weight = j.scale * __ldg(j.w + row * j.w_row + head + e);
#pragma unroll
        for (int i = 0; i < 4; i++) part[i / 2][i % 2] += weight * wn_relu(acc[i / 2][c][i % 2 * 2 + e]);
      }
      if (g == j.n_groups - 1 && (c + 1) * 8 % j.group == 0) {
        store_scores(j, part, row, key0 + warp % 4 * 32);
        part[0][0] = part[0][1] = part[1][0] = part[1][1] = 0;
      }
    }
  }
}

void wn_cuda_expect_indexer(const wn_tensor *q, const wn_tensor *k, const wn_tensor *w, const wn_rows *rows) {
  WN_ASSERT(q->rank == 3 && k->rank == 2 && w->rank == 2, "ranks %d, %d, %d", q->rank, k->rank, w->rank);
  WN_ASSERT(q->dtype == WN_BF16 && k->dtype == WN_BF16 && w->dtype == WN_F32, "dtypes of the indexer");
  WN_ASSERT(q->dim[0] == rows->n_rows && w->dim[0] == rows->n_rows && w->dim[1] == q->dim[1],
            "q [%lld, %lld], w [%lld, %lld], %d rows", (long long)q->dim[0], (long long)q->dim[1], (long long)w->dim[0],
            (long long)w->dim[1], rows->n_rows);
  WN_ASSERT(k->dim[0] == rows->n_keys && k->dim[1] == q->dim[2], "k [%lld, %lld], width %lld, %d keys",
            (long long)k->dim[0], (long long)k->dim[1], (long long)q->dim[2], rows->n_keys);
}

wn_status wn_cuda_index_scores(wn_device *device, float *scores, int64_t pitch, const wn_tensor *q, const wn_tensor *k,
                               const wn_tensor *w, const wn_rows *rows, int64_t row0, int64_t n, int32_t least,
                               double scale) {
  WN_ASSERT(scale > 0, "the indexer's scale is %g", scale);
  if (n == 0 || rows->n_keys == 0) return NULL;
  const wn_view<wn_bf16> qv = wn_view_of<wn_bf16>(q), kv = wn_view_of<wn_bf16>(k);
  const wn_view<float> wv = wn_view_of<float>(w);
  if (wn_cuda_index_scores_wide_fits(qv, kv)) {
    wn_view<wn_bf16> part = qv;
    wn_view<float> weights = wv;
    part.data += row0 * qv.row;
    weights.data += row0 * wv.row;
    part.n = weights.n = n;
    return wn_cuda_index_scores_wide(device, scores, pitch, part, kv, weights, rows->first_key + row0,
                                     rows->last_key + row0, least, (float)scale);
  }
  score_job j = {};
  j.q = wn_dot_rows_of(qv, row0, n);
  j.k = wn_dot_rows_of(kv, 0, kv.n);
  j.q.heads = j.n_heads = qv.heads;
  for (j.q.shift = 3; j.q.shift < 6 && 1 << j.q.shift < qv.heads;) j.q.shift++;
  j.group = 1 << j.q.shift;
  j.n_groups = (int32_t)wn_ceil_div(qv.heads, j.group);
  j.w = wv.data + row0 * wv.row;
  j.w_row = wv.row;
  j.scale = (float)scale;
  j.first = rows->first_key + row0;
  j.last = rows->last_key + row0;
  j.n_rows = (int32_t)n;
  j.least = least;
  j.scores = scores;
  j.pitch = pitch;
  const dim3 grid((unsigned)wn_ceil_div(n, WN_DOT_TILE / j.group), (unsigned)wn_ceil_div(rows->n_keys, WN_DOT_TILE));
  WN_ASSERT(grid.y < 65536, "%d keys", rows->n_keys);
  WN_CUDA_TRY(cudaFuncSetAttribute(scores_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, WN_DOT_SHARED_BYTES));
  scores_kernel<<<grid, WN_DOT_THREADS, WN_DOT_SHARED_BYTES, wn_cuda_stream(device)>>>(j);
  WN_CUDA_LAUNCHED("indexer_scores");
  return NULL;
}
