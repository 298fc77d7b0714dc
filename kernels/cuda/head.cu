/* Both ends of the vocabulary: embedding, its gradient, and the output head fused with the loss.
 *
 * head_loss. A chunk of rows at a time: logits in FP32 by a product, one kernel that turns them into log-probabilities
 * and gradients, the gradients in BF16 by two products into dh and dw. The kernel gives a row to a cluster of blocks:
 * first a maximum and a sum in one reading (a thread rescales its sum when its maximum grows), exchanged through the
 * cluster's shared memory in rank order; then the gradient in a second reading. A cluster is as large as it takes for
 * all rows at work to stay in the second-level cache between the two readings.
 *
 * embedding_backward. The rows of a token are added in row order, by one thread a column; those of a frequent token in
 * shares, one a warp, which are then added in their order. The lists of rows come from a counting sort: integer atomics
 * give every token a place and its rows some order; then each row's rank among its token's rows gives the right one.
 * Where a token's list lies depends on timing; what is in it does not.
 *
 * Ladder, on one H200. head_loss counts 6 n D V FLOP; its three products alone run at 655, 658 and 605 TFLOP/s.
 *   head_loss, n 16384, D 7168, V 129280, chunks of 4096   forward 47.9 ms, 634; with gradients 142 ms, 640 TFLOP/s
 *   head_loss, n 16384, D 1024, V 8192, chunks of 4096     forward 0.81 ms, 340; with gradients 1.70 ms, 485 TFLOP/s
 *   embedding, n 16384, D 7168                             0.10 ms, 4.6 TB/s (repeated rows come from the cache)
 *   embedding_backward, Zipf tokens, D 7168                n 16384      n 131072
 *     1: one thread a column for every token               0.32 ms      2.11 ms
 *     2: frequent tokens in shares                         0.27 ms      1.42 ms, 2.6 TB/s    ships */
#include <assert.h>
#include <cooperative_groups.h>

#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/ptx/mma.cuh"

namespace groups = cooperative_groups;

enum { THREADS = 256, PACK = 8 /* columns a thread takes at once */ };

static unsigned grid_for(wn_device *device, int64_t items, int64_t threads) {
  const int64_t blocks = wn_ceil_div(items, threads), most = (int64_t)wn_cuda_of(device)->n_sms * 16;
  return (unsigned)(blocks < most ? blocks : most);
}

__device__ static int32_t token_at(const wn_view<int32_t> &tokens, int64_t i, int64_t vocabulary) {
  const int32_t token = tokens.data[i * tokens.row];
  assert(token >= 0 && token < vocabulary);
  return token;
}

/* ---- embedding ---- */

/* T: 16 bytes, or one element; a row is `packs` of them. */
template <typename T>
__global__ static void embedding_kernel(wn_view<wn_bf16> h, wn_view<int32_t> tokens, wn_view<wn_bf16> w,
                                        int64_t packs) {
  const int64_t all = h.n * packs, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    const int64_t row = i / packs, at = i % packs;
    const int64_t token = token_at(tokens, row, w.n);
    ((T *)(h.data + row * h.row))[at] = ((const T *)(w.data + token * w.row))[at];
  }
}

wn_status wn_cuda_embedding(wn_device *device, wn_tensor *h, const wn_tensor *tokens, const wn_tensor *w) {
  WN_CUDA_EXPECT(h, WN_BF16, 2, tokens->dim[0], w->dim[1], 0);
  WN_CUDA_EXPECT(tokens, WN_I32, 1, h->dim[0], 0, 0);
  WN_CUDA_EXPECT(w, WN_BF16, 2, w->dim[0], h->dim[1], 0);
  const wn_view<wn_bf16> to = wn_view_of<wn_bf16>(h), from = wn_view_of<wn_bf16>(w);
  const wn_view<int32_t> t = wn_view_of<int32_t>(tokens);
  if (to.n == 0 || to.width == 0) return NULL;
  const bool packed = wn_view_vectors(to) && wn_view_vectors(from);
  const int64_t packs = packed ? to.width / PACK : to.width;
  const unsigned grid = grid_for(device, to.n * packs, THREADS);
  if (packed)
    embedding_kernel<uint4><<<grid, THREADS, 0, wn_cuda_stream(device)>>>(to, t, from, packs);
  else
    embedding_kernel<wn_bf16><<<grid, THREADS, 0, wn_cuda_stream(device)>>>(to, t, from, packs);
  WN_CUDA_LAUNCHED("embedding");
  return NULL;
}

/* ---- its gradient ---- */

enum { FEW_ROWS = 64, SHARES = 16, AHEAD = 8 /* rows under way at once */ };

/* The rows of token v, ascending, are order[start[v]] .. order[end[v] - 1]. Tokens that occur: token[r] for r < *n_few;
 * those of more than FEW_ROWS rows are listed from the end of token, *n_many of them. */
typedef struct runs {
  int32_t *count, *start, *end, *token; /* [vocabulary] */
  int32_t *unsorted, *order;            /* [n] */
  int32_t *n_placed, *n_few, *n_many;
} runs;

__global__ static void count_kernel(runs r, wn_view<int32_t> tokens, int64_t vocabulary) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < tokens.n) atomicAdd(&r.count[token_at(tokens, i, vocabulary)], 1);
}

__global__ static void allot_kernel(runs r, int64_t vocabulary) {
  const int64_t v = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (v >= vocabulary || r.count[v] == 0) return;
  r.start[v] = r.end[v] = atomicAdd(r.n_placed, r.count[v]);
  const int64_t at = r.count[v] > FEW_ROWS ? vocabulary - 1 - atomicAdd(r.n_many, 1) : atomicAdd(r.n_few, 1);
  r.token[at] = (int32_t)v;
}

__global__ static void place_kernel(runs r, wn_view<int32_t> tokens) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < tokens.n) r.unsorted[atomicAdd(&r.end[tokens.data[i * tokens.row]], 1)] = (int32_t)i;
}

__global__ static void rank_kernel(runs r, wn_view<int32_t> tokens) {
  const int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= tokens.n) return;
  const int32_t row = r.unsorted[at], token = tokens.data[row * tokens.row];
  int32_t rank = 0;
  for (int32_t u = r.start[token]; u < r.end[token]; u++) rank += r.unsorted[u] < row;
  r.order[r.start[token] + rank] = row;
}

static wn_status sort_rows(wn_device *device, runs *r, const wn_view<int32_t> &tokens, int64_t vocabulary) {
  cudaStream_t stream = wn_cuda_stream(device);
  const int64_t n = tokens.n;
  int32_t *table;
  WN_ASSERT(n < INT32_MAX && vocabulary < INT32_MAX, "%lld rows of %lld tokens", (long long)n, (long long)vocabulary);
  WN_TRY(wn_cuda_scratch(device, (void **)&table, "rows by token", (4 * vocabulary + 2 * n + 3) * 4));
  r->n_placed = table, r->n_few = table + 1, r->n_many = table + 2, r->count = table + 3;
  r->start = r->count + vocabulary, r->end = r->start + vocabulary, r->token = r->end + vocabulary;
  r->unsorted = r->token + vocabulary, r->order = r->unsorted + n;
  WN_CUDA_TRY(cudaMemsetAsync(table, 0, (size_t)(vocabulary + 3) * 4, stream));
  const unsigned by_row = (unsigned)wn_ceil_div(n, THREADS), by_token = (unsigned)wn_ceil_div(vocabulary, THREADS);
  count_kernel<<<by_row, THREADS, 0, stream>>>(*r, tokens, vocabulary);
  allot_kernel<<<by_token, THREADS, 0, stream>>>(*r, vocabulary);
  place_kernel<<<by_row, THREADS, 0, stream>>>(*r, tokens);
  rank_kernel<<<by_row, THREADS, 0, stream>>>(*r, tokens);
  WN_CUDA_LAUNCHED("embedding_backward");
  return NULL;
}

/* 16 bytes, or one element */
template <int WIDTH> __device__ static void load_bf16(wn_bf16 x[WIDTH], const wn_bf16 *from) {
  if (WIDTH == PACK)
    *(uint4 *)x = *(const uint4 *)from;
  else
    x[0] = from[0];
}

template <int WIDTH> __device__ static void add_columns(float *to, const float sum[WIDTH]) {
#pragma unroll
  for (int v = 0; v < WIDTH; v += WIDTH == 1 ? 1 : 4)
    if (WIDTH == 1) {
      to[v] += sum[v];
    } else {
      float4 x = *(const float4 *)(to + v);
      x.x += sum[v], x.y += sum[v + 1], x.z += sum[v + 2], x.w += sum[v + 3];
      *(float4 *)(to + v) = x;
    }
}

/* sum += rows first, first + step, ... of the sorted ones, in that order */
template <int WIDTH>
__device__ static void add_rows(float sum[WIDTH], const wn_view<wn_bf16> &dh, const int32_t *order, int32_t first,
                                int32_t end, int32_t step, int64_t column) {
  for (int32_t at = first; at < end; at += AHEAD * step) {
    alignas(16) wn_bf16 x[AHEAD][WIDTH];
#pragma unroll
    for (int u = 0; u < AHEAD; u++)
      if (at + u * step < end) load_bf16<WIDTH>(x[u], dh.data + order[at + u * step] * dh.row + column);
#pragma unroll
    for (int u = 0; u < AHEAD; u++)
      if (at + u * step < end)
#pragma unroll
        for (int v = 0; v < WIDTH; v++) sum[v] += __bfloat162float(x[u][v]);
  }
}

/* A block adds up one token's rows in blockDim.x * WIDTH columns. */
template <int WIDTH>
__global__ static void few_rows_kernel(wn_view<float> dw, wn_view<wn_bf16> dh, runs r, int32_t tiles) {
  const int64_t items = (int64_t)*r.n_few * tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t token = r.token[item / tiles];
    const int64_t column = (item % tiles * blockDim.x + threadIdx.x) * WIDTH;
    if (column >= dw.width) continue;
    float sum[WIDTH] = {};
    add_rows<WIDTH>(sum, dh, r.order, r.start[token], r.end[token], 1, column);
    add_columns<WIDTH>(dw.data + token * dw.row + column, sum);
  }
}

/* The same for frequent tokens and 32 * WIDTH columns: a warp adds up every SHARES-th row. */
template <int WIDTH>
__global__ static void many_rows_kernel(wn_view<float> dw, wn_view<wn_bf16> dh, runs r, int32_t tiles) {
  __shared__ float shares[SHARES][32 * WIDTH];
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t items = (int64_t)*r.n_many * tiles;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t token = r.token[dw.n - 1 - item / tiles];
    const int64_t first = item % tiles * 32 * WIDTH, column = first + lane * WIDTH;
    float sum[WIDTH] = {};
    if (column < dw.width) add_rows<WIDTH>(sum, dh, r.order, r.start[token] + warp, r.end[token], SHARES, column);
#pragma unroll
    for (int v = 0; v < WIDTH; v++) shares[warp][v * 32 + lane] = sum[v];
    __syncthreads();
    for (int32_t at = threadIdx.x; at < 32 * WIDTH; at += SHARES * 32) {
      const int64_t to = first + at % 32 * WIDTH + at / 32;
      float total = 0;
      for (int s = 0; s < SHARES; s++) total += shares[s][at];
      if (to < dw.width) dw.data[token * dw.row + to] += total;
    }
    __syncthreads();
  }
}

template <int WIDTH>
static wn_status sum_rows(wn_device *device, const wn_view<float> &dw, const wn_view<wn_bf16> &dh, const runs &r) {
  enum { FEW_THREADS = 128 };
  const int32_t few_tiles = (int32_t)wn_ceil_div(dw.width, FEW_THREADS * WIDTH);
  const int32_t many_tiles = (int32_t)wn_ceil_div(dw.width, 32 * WIDTH);
  const int64_t few = dh.n < dw.n ? dh.n : dw.n, many = wn_ceil_div(dh.n, FEW_ROWS);
  const unsigned few_grid = grid_for(device, few * few_tiles, 1), many_grid = grid_for(device, many * many_tiles, 1);
  many_rows_kernel<WIDTH><<<many_grid, SHARES * 32, 0, wn_cuda_stream(device)>>>(dw, dh, r, many_tiles);
  few_rows_kernel<WIDTH><<<few_grid, FEW_THREADS, 0, wn_cuda_stream(device)>>>(dw, dh, r, few_tiles);
  WN_CUDA_LAUNCHED("embedding_backward");
  return NULL;
}

wn_status wn_cuda_embedding_backward(wn_device *device, wn_tensor *dw, const wn_tensor *dh, const wn_tensor *tokens) {
  WN_CUDA_EXPECT(dw, WN_F32, 2, dw->dim[0], dh->dim[1], 0);
  WN_CUDA_EXPECT(dh, WN_BF16, 2, tokens->dim[0], dw->dim[1], 0);
  WN_CUDA_EXPECT(tokens, WN_I32, 1, dh->dim[0], 0, 0);
  const wn_view<float> to = wn_view_of<float>(dw);
  const wn_view<wn_bf16> from = wn_view_of<wn_bf16>(dh);
  const wn_view<int32_t> t = wn_view_of<int32_t>(tokens);
  if (from.n == 0 || from.width == 0) return NULL;
  const size_t mark = wn_arena_mark(device->scratch);
  runs r;
  WN_TRY(sort_rows(device, &r, t, to.n));
  if (wn_view_vectors(to) && wn_view_vectors(from))
    WN_TRY(sum_rows<PACK>(device, to, from, r));
  else
    WN_TRY(sum_rows<1>(device, to, from, r));
  wn_arena_release(device->scratch, mark);
  return NULL;
}

/* ---- head and loss ---- */

enum { LOSS_THREADS = 512, FEWER_THREADS = 256, MOST_BLOCKS_A_ROW = 8, COLUMNS_A_BLOCK = 16384 };

/* sum of e^(x - top) over some x; {-inf, 0} over none */
typedef struct soft_sum {
  float top, sum;
} soft_sum;

/* e^(x - top) */
__device__ static float lifted(float x, float top) {
  return wn_exp2((x - top) * WN_LOG2E);
}

__device__ static soft_sum joined(soft_sum a, soft_sum b) {
  const float top = fmaxf(a.top, b.top);
  if (a.top == -INFINITY) return {top, a.sum + b.sum}; /* a.sum is 0, or NaN where there was one */
  if (b.top == -INFINITY) return {top, a.sum + b.sum};
  return {top, a.sum * lifted(a.top, top) + b.sum * lifted(b.top, top)};
}

__device__ static void load_logits(float x[PACK], const float *row, int64_t column, int64_t vocabulary) {
  *(float4 *)x = *(const float4 *)(row + column);
  *(float4 *)(x + 4) = *(const float4 *)(row + column + 4);
#pragma unroll
  for (int v = 0; v < PACK; v++)
    if (column + v >= vocabulary) x[v] = -INFINITY;
}

/* Over the columns first, first + step, ... of a row, PACK at each. */
__device__ static soft_sum sum_columns(const float *row, int64_t first, int64_t step, int64_t vocabulary) {
  soft_sum s = {-INFINITY, 0};
#pragma unroll 2
  for (int64_t column = first; column < vocabulary; column += step) {
    float x[PACK];
    load_logits(x, row, column, vocabulary);
    float top = x[0];
#pragma unroll
    for (int v = 1; v < PACK; v++) top = fmaxf(top, x[v]);
    if (top > s.top) {
      s.sum *= s.top == -INFINITY ? 1.0f : lifted(s.top, top);
      s.top = top;
    }
#pragma unroll
    for (int v = 0; v < PACK; v++) s.sum += lifted(x[v], s.top);
  }
  return s;
}

/* Over all threads of the cluster; the same bits in each. The caller passes a cluster barrier before it returns, since
 * others read its shared memory. */
__device__ static soft_sum sum_cluster(groups::cluster_group cluster, soft_sum s) {
  __shared__ soft_sum warps[LOSS_THREADS / 32], block;
  for (int lane = 16; lane > 0; lane /= 2)
    s = joined(s, {__shfl_down_sync(~0u, s.top, lane), __shfl_down_sync(~0u, s.sum, lane)});
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned i = 1; i < blockDim.x / 32; i++) s = joined(s, warps[i]);
    block = s;
  }
  cluster.sync();
  s = *cluster.map_shared_rank(&block, 0);
  for (unsigned i = 1; i < cluster.num_blocks(); i++) s = joined(s, *cluster.map_shared_rank(&block, i));
  return s;
}

/* weight (softmax - one-hot) of the columns first, first + step, ...; padding columns get 0 */
__device__ static void write_gradient(wn_bf16 *to, const float *row, int64_t first, int64_t step, int64_t vocabulary,
                                      soft_sum s, int32_t target, float weight) {
  const float factor = weight / s.sum;
#pragma unroll 2
  for (int64_t column = first; column < vocabulary; column += step) {
    float x[PACK];
    load_logits(x, row, column, vocabulary);
#pragma unroll
    for (int v = 0; v < PACK; v++) {
      x[v] = factor * lifted(x[v], s.top);
      if (column + v == target) x[v] -= weight;
    }
    *(uint4 *)(to + column) = make_uint4(wn_pack_bf16(x[0], x[1]), wn_pack_bf16(x[2], x[3]), wn_pack_bf16(x[4], x[5]),
                                         wn_pack_bf16(x[6], x[7]));
  }
}

typedef struct loss_chunk {
  float *logits;     /* [rows, stride] */
  wn_bf16 *gradient; /* [rows, stride], or NULL */
  int64_t stride, vocabulary;
  wn_view<float> logp, weight; /* of these rows */
  wn_view<int32_t> target;
} loss_chunk;

/* One cluster a row. */
__global__ static void __launch_bounds__(LOSS_THREADS) loss_kernel(loss_chunk c) {
  groups::cluster_group cluster = groups::this_cluster();
  const int64_t i = blockIdx.x / cluster.num_blocks();
  const int64_t first = ((int64_t)cluster.block_rank() * blockDim.x + threadIdx.x) * PACK;
  const int64_t step = (int64_t)cluster.num_blocks() * blockDim.x * PACK;
  const float *row = c.logits + i * c.stride;
  wn_bf16 *gradient = c.gradient ? c.gradient + i * c.stride : NULL;
  const int32_t target = c.target.data[i * c.target.row];
  const bool speaks = cluster.block_rank() == 0 && threadIdx.x == 0;
  assert(target >= -1 && target < c.vocabulary);
  if (target < 0) {
    if (speaks) c.logp.data[i * c.logp.row] = 0;
    if (gradient)
      for (int64_t column = first; column < c.vocabulary; column += step)
        *(uint4 *)(gradient + column) = make_uint4(0, 0, 0, 0);
    return;
  }
  const soft_sum s = sum_cluster(cluster, sum_columns(row, first, step, c.vocabulary));
  if (speaks) c.logp.data[i * c.logp.row] = (row[target] - s.top) - logf(s.sum);
  if (gradient) write_gradient(gradient, row, first, step, c.vocabulary, s, target, c.weight.data[i * c.weight.row]);
  cluster.sync();
}

static wn_status launch_loss(wn_device *device, const loss_chunk *chunk, int64_t rows) {
  unsigned blocks = 1;
  while (blocks < MOST_BLOCKS_A_ROW && blocks * COLUMNS_A_BLOCK < chunk->vocabulary) blocks *= 2;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((unsigned)rows * blocks);
  config.blockDim = dim3(blocks == 1 ? FEWER_THREADS : LOSS_THREADS);
  config.stream = wn_cuda_stream(device);
  config.attrs = &cluster;
  config.numAttrs = 1;
  WN_CUDA_TRY(cudaLaunchKernelEx(&config, loss_kernel, *chunk));
  return NULL;
}

/* dh = g w, dw += g^T h */
static wn_status loss_products(wn_device *device, const loss_chunk *chunk, wn_tensor *dh, wn_tensor *dw,
                               const wn_tensor *h, const wn_tensor *w) {
  wn_product input = {}, matrix = {};
  input.c = dh->data, input.a = chunk->gradient, input.b = w->data;
  input.c_dtype = WN_BF16;
  input.m = h->dim[0], input.n = h->dim[1], input.k = chunk->vocabulary;
  input.c_stride = dh->stride[0], input.a_stride = chunk->stride, input.b_stride = w->stride[0];
  WN_TRY(wn_cuda_product(device, &input));
  matrix.c = dw->data, matrix.a = chunk->gradient, matrix.b = h->data;
  matrix.c_dtype = WN_F32;
  matrix.m = chunk->vocabulary, matrix.n = h->dim[1], matrix.k = h->dim[0];
  matrix.c_stride = dw->stride[0], matrix.a_stride = chunk->stride, matrix.b_stride = h->stride[0];
  matrix.transpose_a = true;
  matrix.accumulate = true;
  return wn_cuda_product(device, &matrix);
}

/* One chunk; every tensor but w and dw is of its rows. */
static wn_status loss_rows(wn_device *device, loss_chunk *chunk, wn_tensor *logp, wn_tensor *dh, wn_tensor *dw,
                           const wn_tensor *h, const wn_tensor *w, const wn_tensor *target, const wn_tensor *weight) {
  wn_product forward = {};
  forward.c = chunk->logits, forward.a = h->data, forward.b = w->data;
  forward.c_dtype = WN_F32;
  forward.m = h->dim[0], forward.n = chunk->vocabulary, forward.k = h->dim[1];
  forward.c_stride = chunk->stride, forward.a_stride = h->stride[0], forward.b_stride = w->stride[0];
  forward.transpose_b = true;
  WN_TRY(wn_cuda_product(device, &forward));
  chunk->logp = wn_view_of<float>(logp);
  chunk->target = wn_view_of<int32_t>(target);
  if (weight) chunk->weight = wn_view_of<float>(weight);
  WN_TRY(launch_loss(device, chunk, h->dim[0]));
  return weight ? loss_products(device, chunk, dh, dw, h, w) : NULL;
}

static void expect_loss(const wn_tensor *logp, const wn_tensor *dh, const wn_tensor *dw, const wn_tensor *h,
                        const wn_tensor *w, const wn_tensor *target, const wn_tensor *weight) {
  const int64_t n = h->dim[0], vocabulary = w->dim[0], width = w->dim[1];
  WN_CUDA_EXPECT(logp, WN_F32, 1, n, 0, 0);
  WN_CUDA_EXPECT(h, WN_BF16, 2, n, width, 0);
  WN_CUDA_EXPECT(w, WN_BF16, 2, vocabulary, width, 0);
  WN_CUDA_EXPECT(target, WN_I32, 1, n, 0, 0);
  WN_ASSERT((dh == NULL) == (dw == NULL) && (dh == NULL) == (weight == NULL), "dh, dw, weight come together");
  if (!dh) return;
  WN_CUDA_EXPECT(dh, WN_BF16, 2, n, width, 0);
  WN_CUDA_EXPECT(dw, WN_F32, 2, vocabulary, width, 0);
  WN_CUDA_EXPECT(weight, WN_F32, 1, n, 0, 0);
}

wn_status wn_cuda_head_loss(wn_device *device, wn_tensor *logp, wn_tensor *dh, wn_tensor *dw, const wn_tensor *h,
                            const wn_tensor *w, const wn_tensor *target, const wn_tensor *weight,
                            const wn_head_params *params) {
  enum { ALIGN = 64 }; /* columns: rows of logits and gradients begin at whole cache lines, whatever the vocabulary */
  const int64_t n = h->dim[0], vocabulary = w->dim[0];
  expect_loss(logp, dh, dw, h, w, target, weight);
  WN_ASSERT(params->chunk_rows > 0, "chunk_rows %d", params->chunk_rows);
  if (n == 0) return NULL;
  const int64_t rows = params->chunk_rows < n ? params->chunk_rows : n;
  const size_t mark = wn_arena_mark(device->scratch);
  loss_chunk chunk = {};
  chunk.vocabulary = vocabulary;
  chunk.stride = wn_ceil_div(vocabulary, ALIGN) * ALIGN;
  WN_TRY(wn_cuda_scratch(device, (void **)&chunk.logits, "logits", rows * chunk.stride * (int64_t)sizeof(float)));
  if (dh)
    WN_TRY(wn_cuda_scratch(device, (void **)&chunk.gradient, "logits gradient",
                           rows * chunk.stride * (int64_t)sizeof(wn_bf16)));
  for (int64_t from = 0; from < n; from += rows) {
    const int64_t count = n - from < rows ? n - from : rows;
    wn_tensor h_rows = wn_tensor_slice(*h, 0, from, count), logp_rows = wn_tensor_slice(*logp, 0, from, count);
    wn_tensor target_rows = wn_tensor_slice(*target, 0, from, count), dh_rows, weight_rows;
    if (dh) dh_rows = wn_tensor_slice(*dh, 0, from, count);
    if (dh) weight_rows = wn_tensor_slice(*weight, 0, from, count);
    WN_TRY(loss_rows(device, &chunk, &logp_rows, dh ? &dh_rows : NULL, dw, &h_rows, w, &target_rows,
                     dh ? &weight_rows : NULL));
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}
