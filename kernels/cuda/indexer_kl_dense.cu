/* Stage 1's loss and its gradients, dense: KL(p || softmax(I)) of every row over all the keys it sees.
 *
 * Rows go in chunks, so that the two matrices p and I of a chunk, FP32, take at most CHUNK_BYTES: memory is O(n + m).
 * Per chunk:
 *   A. indexer_kl_dense_scores.cu makes p (sum over attention heads) and I (sum over indexer heads), tile by tile;
 *   B. here: per row log sum exp I, the KL, and g = softmax(I) - p in p's place;
 *   C, D. indexer_kl_dense_gradients.cu makes dq and dw from g with the queries standing still, and dk with the keys
 * standing still, each making q.k again. Counted work per (row, visible key): 2 H dq for p, 2 HI dI for I, 6 HI dI for
 * the gradients; executed: 8 HI dI for those, as q.k is made in C and in D.
 *
 * Tiles of rows that see nothing of a tile of keys cost nothing. A chunk's size depends on shapes only, and so does the
 * order of every sum.
 *
 * Ladder: V3.1 width (H 128 x 192, HI 64 x 128), one causal sequence of T = 8192, 16384, 32768, value and gradients,
 * medians of 7 or more on an H200, with TFLOP/s counted as above (executed: 8/7 of it) and the share of 989.5:
 * - 1, mma.sync m16n8k16 everywhere: 18.6, 73.4, 289 ms; 207, 210, 213; 0.21.
 * - 2, A by warpgroups (wgmma, copy engine), 128 x 192 tiles: 12.3, 48.5, 196 ms; 313, 317, 314; 0.32.
 * - 3, C and D by warpgroups, 128 x 128 tiles: 9.3, 36.3, 145 ms; 413, 424, 425; 0.43.
 * - 4, in A pairs of blocks share the keys that they read: 9.2, 35.4, 141 ms; 420, 434, 437; 0.44.
 * - 5, 1[q.k > 0] by a multiplication, warpgroups in turns: 8.3, 31.4, 125 ms; 466, 490, 493; 0.50.
 * - 6, in A log2(e) is in the scale and the indexer's keys stay: 8.0, 31.3, 122 ms; 480, 492, 503; 0.51.
 * - 7, p and I in one launch, C and D in one, shares of dk added side by side: 6.9, 29.5, 118 ms; 560, 522, 520; 0.53
 *   (with two launches each, in the same run: 7.4, 30.5, 120).
 * Versions were measured a run each, and runs differ by more than the smaller steps. Within one run, at T = 32768,
 * version 5 took 125 ms, without A's turns 126, without turns in C and D and without A's pairs 128; version 6 took
 * 122.3, with keys that do not stay 122.8. Version 7 ships; version 1 serves what operands' shapes or strides exclude
 * from the others. Of version 6 at T = 32768 A and B take 69 ms (510 counted). Under version 4's load the GPU drew up
 * to 695 W and lowered its clock to 1.65 - 1.75 GHz: power is near its cap. Scratch: 384, 768, 1536 MiB. */
#include "kernels/cuda/indexer_kl.cuh"
#include "kernels/cuda/indexer_kl_dense.cuh"
#include "kernels/cuda/operations.cuh"

enum { LOSS_THREADS = 256, LOSS_WARPS = LOSS_THREADS / 32 };
static const int64_t CHUNK_BYTES = (int64_t)2 << 30, SHARE_BYTES = (int64_t)512 << 20;

/* ---- which keys a tile of rows sees ---- */

/* A block is a tile of rows. Rows that see fewer than two keys have no loss and count as rows that see none. */
__global__ static void __launch_bounds__(WN_DENSE_KL_TILE) seen_kernel(const wn_dense_kl_chunk chunk) {
  __shared__ int32_t low, high;
  if (threadIdx.x == 0) {
    low = INT32_MAX;
    high = 0;
  }
  __syncthreads();
  const int32_t row = blockIdx.x * WN_DENSE_KL_TILE + threadIdx.x;
  if (row < chunk.n_rows && chunk.last_key[row] > chunk.first_key[row]) {
    atomicMin(&low, chunk.first_key[row]);
    atomicMax(&high, chunk.last_key[row] + 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int32_t tile = WN_DENSE_KL_TILE;
    chunk.seen[blockIdx.x] = high ? make_int2(low / tile * tile, (high + tile - 1) / tile * tile) : make_int2(0, 0);
  }
}

/* ---- the loss of a row ---- */

typedef struct log_sum {
  float top;
  double sum; /* of exp(I - top) */
} log_sum;

/* In a fixed order wherever it is called, so that the result repeats. */
__device__ static log_sum joined(log_sum a, log_sum b) {
  const float top = fmaxf(a.top, b.top);
  if (top == -INFINITY) return a;
  return {top, a.sum * (double)expf(a.top - top) + b.sum * (double)expf(b.top - top)};
}

/* The row's log-sum-exp in two parts, top and log(sum): their rounded sum would cost digits of softmax(I) - p. */
__device__ static log_sum row_log_sum(const float *index, int32_t first, int32_t last) {
  __shared__ log_sum parts[LOSS_WARPS];
  log_sum own = {-INFINITY, 0};
  for (int32_t key = first / 4 * 4 + threadIdx.x * 4; key <= last; key += LOSS_THREADS * 4) {
    const float4 four = *(const float4 *)(index + key);
    const float x[4] = {four.x, four.y, four.z, four.w};
    float top = own.top;
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (key + e >= first && key + e <= last) top = fmaxf(top, x[e]);
    if (top > own.top) own.sum *= (double)expf(own.top - top);
    own.top = top;
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (key + e >= first && key + e <= last) own.sum += (double)expf(x[e] - top);
  }
  for (int step = 16; step; step /= 2)
    own = joined(own, {__shfl_down_sync(~0u, own.top, step), __shfl_down_sync(~0u, own.sum, step)});
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = own;
  __syncthreads();
  own = parts[0];
  for (int i = 1; i < LOSS_WARPS; i++) own = joined(own, parts[i]);
  return own;
}

/* A block is a row of the chunk's tiles, those past the last row included: their g is 0 too. */
__global__ static void __launch_bounds__(LOSS_THREADS)
    loss_kernel(const wn_dense_kl_chunk chunk, float *kl, int64_t kl_row, bool gradients) {
  __shared__ double parts[LOSS_WARPS];
  const int32_t row = blockIdx.x;
  const int2 seen = chunk.seen[row / WN_DENSE_KL_TILE];
  int32_t first = 0, last = -1;
  if (row < chunk.n_rows && chunk.last_key[row] > chunk.first_key[row]) {
    first = chunk.first_key[row];
    last = chunk.last_key[row];
  }
  const float *index = chunk.index + (int64_t)row * chunk.columns;
  float *target = chunk.p + (int64_t)row * chunk.columns;
  log_sum all = {0, 1};
  if (last > first) all = row_log_sum(index, first, last);
  const float top = all.top, log_all = (float)log(all.sum);
  double sum = 0;
  const int32_t end = gradients ? seen.y : last + 1;
  for (int32_t key = seen.x + threadIdx.x * 4; key < end; key += LOSS_THREADS * 4) {
    float g[4] = {0, 0, 0, 0};
    if (key + 3 >= first && key <= last) {
      const float4 four_i = *(const float4 *)(index + key), four_p = *(const float4 *)(target + key);
      const float x[4] = {four_i.x, four_i.y, four_i.z, four_i.w}, p[4] = {four_p.x, four_p.y, four_p.z, four_p.w};
#pragma unroll
      for (int e = 0; e < 4; e++) {
        if (key + e < first || key + e > last) continue;
        const float log_q = x[e] - top - log_all;
        g[e] = expf(log_q) - p[e];
        sum += (double)wn_kl_loss_term(p[e], log_q, g[e]);
      }
    }
    if (gradients) *(float4 *)(target + key) = make_float4(g[0], g[1], g[2], g[3]);
  }
  sum = wn_kl_block_sum(sum, parts);
  if (threadIdx.x == 0 && row < chunk.n_rows) kl[row * kl_row] = (float)sum;
}

/* ---- the operation ---- */

typedef struct tensors {
  wn_view<float> kl, dk, dw, w, lse;
  wn_view<wn_bf16> dq, q, k, qa, ka;
  bool gradients;
} tensors;

template <typename T>
static void expect(const wn_view<T> &v, const char *name, int64_t n, int64_t heads, int64_t width) {
  WN_ASSERT(v.n == n && v.heads == heads && v.width == width, "%s is [%lld, %d, %d], wanted [%lld, %lld, %lld]", name,
            (long long)v.n, v.heads, v.width, (long long)n, (long long)heads, (long long)width);
}

static void check(const tensors *t, const wn_rows *rows, const wn_indexer_params *params) {
  const int64_t n = rows->n_rows, m = rows->n_keys, heads = t->q.heads, width = t->q.width;
  expect(t->q, "q", n, heads, width);
  expect(t->k, "k", m, 1, width);
  expect(t->w, "w", n, 1, heads);
  expect(t->qa, "qa", n, t->qa.heads, t->qa.width);
  expect(t->ka, "ka", m, t->ka.heads == 1 ? 1 : t->qa.heads, t->qa.width);
  expect(t->lse, "lse", n, 1, t->qa.heads);
  expect(t->kl, "kl", n, 1, 1);
  WN_ASSERT(params->scale > 0, "scale %g", params->scale);
  if (!t->gradients) return;
  expect(t->dq, "dq", n, heads, width);
  expect(t->dk, "dk", m, 1, width);
  expect(t->dw, "dw", n, 1, heads);
}

template <typename T> static wn_view<T> rows_from(wn_view<T> v, int64_t row) {
  v.data += row * v.row;
  return v;
}

/* Rows of a chunk: a multiple of the tile, from shapes alone. */
static int64_t chunk_rows(int64_t n, int64_t columns) {
  const int64_t tile = WN_DENSE_KL_TILE, most = CHUNK_BYTES / (columns * 2 * (int64_t)sizeof(float)) / tile;
  int64_t tiles = wn_ceil_div(n, tile);
  if (tiles > WN_DENSE_KL_MAX_TILES) tiles = WN_DENSE_KL_MAX_TILES;
  if (tiles > most) tiles = most > 0 ? most : 1;
  return tiles * tile;
}

/* As many shares as SHARE_BYTES hold: a block of the key gradient then has that much less to do. */
static wn_status alloc_shares(wn_device *device, wn_dense_kl_shares *shares, int64_t row_tiles, int64_t columns,
                              int32_t width) {
  const int64_t one = columns * width * (int64_t)sizeof(float), most = SHARE_BYTES / one;
  const int64_t wanted = most < 1 ? 1 : most < row_tiles ? most : row_tiles;
  shares->width = width;
  shares->tiles_per_split = (int32_t)wn_ceil_div(row_tiles, wanted);
  shares->n_splits = (int32_t)wn_ceil_div(row_tiles, shares->tiles_per_split);
  return wn_cuda_scratch(device, (void **)&shares->data, "dense kl shares", one * shares->n_splits);
}

static wn_status do_chunk(wn_device *device, const wn_dense_kl_chunk *chunk, const wn_dense_kl_shares *shares,
                          const tensors *t, int64_t row0, const wn_indexer_params *params) {
  cudaStream_t stream = wn_cuda_stream(device);
  const wn_view<wn_bf16> q = rows_from(t->q, row0), qa = rows_from(t->qa, row0);
  const wn_view<float> w = rows_from(t->w, row0), lse = rows_from(t->lse, row0);
  seen_kernel<<<(unsigned)chunk->n_row_tiles, WN_DENSE_KL_TILE, 0, stream>>>(*chunk);
  WN_CUDA_LAUNCHED("indexer_kl_dense's visible tiles");
  WN_TRY(wn_dense_kl_scores(device, chunk, q, t->k, w, qa, t->ka, lse, params->scale, params->attention_scale));
  loss_kernel<<<(unsigned)(chunk->n_row_tiles * WN_DENSE_KL_TILE), LOSS_THREADS, 0, stream>>>(
      *chunk, t->kl.data + row0 * t->kl.row, t->kl.row, t->gradients);
  WN_CUDA_LAUNCHED("indexer_kl_dense's loss");
  if (!t->gradients) return NULL;
  const wn_dense_kl_gradient gradient = {*chunk,
                                         *shares,
                                         q,
                                         t->k,
                                         rows_from(t->dq, row0),
                                         w,
                                         rows_from(t->dw, row0),
                                         t->dk,
                                         (float)(params->coeff * params->scale)};
  return wn_dense_kl_gradients(device, &gradient);
}

wn_status wn_cuda_indexer_kl_dense(wn_device *device, wn_tensor *kl, wn_tensor *dq, wn_tensor *dk, wn_tensor *dw,
                                   const wn_tensor *q, const wn_tensor *k, const wn_tensor *w, const wn_tensor *qa,
                                   const wn_tensor *ka, const wn_tensor *lse, const wn_rows *rows,
                                   const wn_indexer_params *params) {
  WN_ASSERT(!dq == !dk && !dq == !dw, "dq, dk and dw come together");
  tensors t = {};
  t.kl = wn_view_of<float>(kl);
  t.q = wn_view_of<wn_bf16>(q);
  t.k = wn_view_of<wn_bf16>(k);
  t.w = wn_view_of<float>(w);
  t.qa = wn_view_of<wn_bf16>(qa);
  t.ka = wn_view_of<wn_bf16>(ka);
  t.lse = wn_view_of<float>(lse);
  t.gradients = dq != NULL;
  if (dq) {
    t.dq = wn_view_of<wn_bf16>(dq);
    t.dk = wn_view_of<float>(dk);
    t.dw = wn_view_of<float>(dw);
  }
  check(&t, rows, params);
  const int64_t n = rows->n_rows, tile = WN_DENSE_KL_TILE;
  if (n == 0) return NULL;
  const int64_t columns = (rows->n_keys > 0 ? wn_ceil_div(rows->n_keys, tile) : 1) * tile;
  const int64_t step = chunk_rows(n, columns), bytes = step * columns * (int64_t)sizeof(float);
  const size_t mark = wn_arena_mark(device->scratch);
  wn_dense_kl_chunk chunk = {};
  wn_dense_kl_shares shares = {};
  chunk.n_keys = rows->n_keys;
  chunk.columns = (int32_t)columns;
  WN_TRY(wn_cuda_scratch(device, (void **)&chunk.p, "dense kl target", bytes));
  WN_TRY(wn_cuda_scratch(device, (void **)&chunk.index, "dense kl scores", bytes));
  WN_TRY(wn_cuda_scratch(device, (void **)&chunk.seen, "dense kl tiles", step / tile * (int64_t)sizeof(int2)));
  if (dq) WN_TRY(alloc_shares(device, &shares, step / tile, columns, wn_dense_kl_padded_width(t.q.width)));
  for (int64_t row0 = 0; row0 < n; row0 += step) {
    chunk.first_key = rows->first_key + row0;
    chunk.last_key = rows->last_key + row0;
    chunk.n_rows = (int32_t)(n - row0 < step ? n - row0 : step);
    chunk.n_row_tiles = (int32_t)wn_ceil_div(chunk.n_rows, tile);
    WN_TRY(do_chunk(device, &chunk, &shares, &t, row0, params));
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}
