/* Stage 2's loss on the selected set. A row's picks are gathered twice; between the two the row's softmax is known.
 *
 * scores: keys are the rows of tiles and heads their columns, so that the sum over heads runs along a thread's own
 * registers. Groups of 64 heads go by warpgroup, 64 keys at a time; narrower ones by warp, each with its own tiles of
 * 16 keys and the row's queries in registers. For the gradients only the signs of q.k are needed again, a bit each: z =
 * q.k enters dw through q.u alone, u being dq before its factor. The bits are kept by key and, for the sums over keys,
 * as fragments with keys and heads exchanged.
 *
 * With m the bits, g = softmax(I) - p in FP32 and f = coeff scale:
 *   u[h] = sum_j g_j m_hj k_j,  dq[h] = f w_h u[h],  dw[h] = f q_h . u[h],  dk[j] = g_j sum_h m_hj (f w_h q_h).
 * The bits are exact BF16 operands; g enters the first sum as two BF16, f w_h q_h the last one rounded to one.
 *
 * dk is scattered over keys, order-free: 32-bit integers at a power-of-two scale per key. The scale is not guessed and
 * nothing is launched again: |contribution| <= |g| B with B = max_d sum_h |f w_h q_hd| known before any product, so a
 * pass of 64-bit integer sums gives every key a true bound on the sum of magnitudes, and 2^30 over it is the scale.
 * A key that every one of 128K rows picks keeps, by estimate, 1e-4 of its gradient as rounding, a spike of 1e4 in one
 * row costs only the keys of that row, and no sum can overflow. A value that is not finite makes its key's gradient
 * NaN.
 *
 * Neighbouring rows pick much the same keys. With few heads, where the scatter is most of the time, rows go in teams of
 * two or four: a list is made of the keys that any of them picks, and what they give to a key is added up in FP32
 * before it is scattered. Which rows are a team follows from their numbers alone.
 *
 * Ladder, on an H200: 64 heads of 128, 2048 picks a row. ms for 8192 rows over 8192 keys, 32768 over 32768 (causal,
 * picks from all over), the last 16384 rows of 131072 keys with picks from all over and from the last 4096; and 16
 * heads with 1024 picks, 16384 rows over as many keys, picks from all over and the last 1024.
 *
 *   version                                              8192   32768   of 128K      16 heads
 *   scores, loss, queries, keys one after another        5.36   23.5    12.9  12.3
 *   queries and keys side by side in one launch          4.77   21.0
 *   gathers without branches; the scatter's small facts
 *   by copies that its fence does not wait for           4.32   19.0
 *   g as two BF16 (worst dw row 1e-5, was 9e-3)          4.57   19.9    12.6  10.3   4.89  4.85
 *   groups of 16 and 32 heads beside those of 64                                     3.91  4.08
 *   picks asked for two tiles before their keys are             19.2                 3.89  4.06
 *   teams of rows: four with up to 16 heads                     18.9                 3.78  2.53
 *   scores of 64 heads by warpgroup                             18.4    12.7
 *   dq and dw of 64 heads by warpgroup, ships            3.92   17.2    12.5  9.0    3.78  2.53
 *
 * 32 heads, 16384 rows and keys, 2048 picks from all over and from the last 2048: 9.29 ms before, then 7.70 and 7.85
 * one row at a time, 7.50 and 6.01 in twos (ships), 8.18 and 5.76 in fours. 64 heads in twos: 23.1 at 32768, since a
 * multiprocessor holds fewer blocks and a product has the whole list's rows; in fours 32.1.
 *
 * Of 17.2 ms, four chunks of rows, each: scores 0.86, loss 0.26, queries and keys 3.05; alone they take 0.97 and 2.68,
 * so the scatter is the limit: 3.1 TB/s of integers. Of 3.78 (16 heads): 0.57, 0.35, 2.64, alone 0.82 and 2.07.
 *
 * Did not help: queries of a team in shared memory instead of registers (16 heads in fours 4.77 beside 4.04 then, in
 * eights 6.42); five blocks on a multiprocessor (3.96); cutting 128K keys into parts of 32 MB of sums, or of 12 MB, to
 * stay in the cache (12.1 and 12.1, 14.2 and 12.2 ms). Not tried: blocks that own some 300 keys' sums in shared memory
 * and walk all rows. By account sums would take 6 ms instead of 10.7 at 32768, with no queries beside them, and 18
 * instead of 9 with picks from all over 128K, where such a block meets few of a row's picks. */
#include <math.h>

#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/index_score.cuh"
#include "kernels/cuda/indexer_kl.cuh"
#include "kernels/cuda/indexer_kl_sparse.cuh"
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/picks.cuh"
#include "kernels/cuda/ptx/mbarrier.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "kernels/cuda/reduce.cuh"

enum {
  WARP = 32,
  WARPS = WN_SPARSE_KL_WARPS,
  THREADS = WARPS * WARP,
  LOSS_THREADS = 256,
  HEADS = WN_SPARSE_KL_HEADS,
  WIDTH = WN_SPARSE_KL_WIDTH,
  TILE = WN_SPARSE_KL_TILE,
  PAD_PICKS = 64,
  ROW_BYTES = WN_SPARSE_KL_ROW_BYTES,
  TILE_BYTES = TILE * ROW_BYTES,
  STAGES = 4, /* of a warp's tiles */
  WIDE_BYTES = WN_SPARSE_KL_WIDE_BYTES,
  WIDE_STAGES = 3
};
#define FULL_WARP 0xffffffffu
static const int64_t chunk_pairs = (int64_t)1 << 24; /* picks whose bits and g exist at a time */

typedef wn_sparse_kl job;

/* ---- counts and bounds ---- */

__device__ static float block_max(float x, float *shared) {
  for (int32_t step = WARP / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
  __syncthreads();
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();
  x = shared[0];
  for (uint32_t i = 1; i < blockDim.x / WARP; i++) x = fmaxf(x, shared[i]);
  return x;
}

/* A row a block: its picks, and B over all heads. */
__global__ static void __launch_bounds__(THREADS) begin_kernel(job j) {
  __shared__ float shared[WARPS];
  const int64_t row = blockIdx.x;
  int32_t n = 0;
  for (int32_t from = 0; from < j.selection.width; from += THREADS) {
    const int32_t i = from + (int32_t)threadIdx.x;
    n += __syncthreads_count(i < j.selection.width && j.selection.data[row * j.selection.row + i] >= 0);
  }
  if (threadIdx.x == 0) j.count[row] = n < 2 ? 0 : n;
  if (!j.gradients) return;
  float sum = 0;
  if ((int32_t)threadIdx.x < j.q.width)
    for (int32_t h = 0; h < j.q.heads; h++)
      sum += fabsf(j.factor * j.w.data[row * j.w.row + h] *
                   __bfloat162float(j.q.data[row * j.q.row + h * j.q.head + threadIdx.x]));
  const bool finite = !__syncthreads_or(!(sum < INFINITY));
  const float most = block_max(finite ? 1.01f * sum : 0.0f, shared); /* a little above, for the operands' rounding */
  if (threadIdx.x != 0) return;
  j.row_bound[row] = finite ? most : INFINITY;
  if (finite && most < INFINITY) atomicMax(j.largest, __float_as_uint(most));
}

/* ---- scores ---- */

/* The lane's 32 bits: bit c + 8 b is (key 8 b + lane / 4, head 8 c + 2 (lane % 4)), bit 16 above it the next head. */
template <int CHUNKS>
__device__ __forceinline__ uint32_t weigh_tile(float part[2], const float (&acc)[CHUNKS][4],
                                               const float (&weight)[CHUNKS][2]) {
  uint32_t bits[4] = {0, 0, 0, 0}; /* short chains: few warps are there to hide them */
  float sum[4][2] = {};
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (!(acc[c][e] <= 0)) { /* NaN passes */
        sum[c % 2 * 2 + e % 2][e / 2] = fmaf(weight[c][e % 2], acc[c][e], sum[c % 2 * 2 + e % 2][e / 2]);
        bits[e] |= 1u << (c + e / 2 * 8 + 16 * (e % 2));
      }
#pragma unroll
  for (int b = 0; b < 2; b++) {
    part[b] = sum[0][b] + sum[1][b] + (sum[2][b] + sum[3][b]);
    part[b] = wn_quad_sum(part[b]);
  }
  return bits[0] | bits[1] | (bits[2] | bits[3]);
}

/* The same bits with keys and heads exchanged: bit c + 8 b is (head 8 c + lane / 4, key 8 b + 2 (lane % 4)), bit 16
 * above it the next key. */
template <int CHUNKS> __device__ __forceinline__ uint32_t turn_bits(uint32_t bits) {
  uint32_t turned[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 2 * CHUNKS; i++) turned[i % 4] |= wn_transpose_8x8(bits & 0x00010001u << (i / 2 + i % 2 * 8));
  return turned[0] | turned[1] | (turned[2] | turned[3]);
}

/* A warp's tile t of a row: its scores and bits from the products. */
template <bool GRADIENTS, int CHUNKS>
__device__ __forceinline__ void finish_tile(const job &j, int64_t row, int32_t t, const float (&acc)[CHUNKS][4],
                                            const float (&weight)[CHUNKS][2]) {
  const int32_t lane = (int32_t)threadIdx.x % WARP;
  float part[2];
  const uint32_t bits = weigh_tile<CHUNKS>(part, acc, weight);
  float *index = j.index + row * j.pitch + t * TILE + lane / 4 + lane % 4 * 8;
  if (lane % 4 < 2) *index = (j.head0 ? *index : 0.0f) + (lane % 4 ? part[1] : part[0]);
  if (!GRADIENTS) return;
  uint16_t *own = j.bits + (row * j.pitch + t * TILE) * 4 + lane;
  const uint32_t by_key = __byte_perm(bits, 0, 0x3120);
  own[0] = (uint16_t)by_key;
  own[WARP] = (uint16_t)(by_key >> 16);
  j.turned[(row * (j.pitch / TILE) + t) * WARP + lane] = turn_bits<CHUNKS>(bits);
}

/* The weights of the lane's columns of products. */
template <int CHUNKS>
__device__ __forceinline__ void own_weights(float (&weight)[CHUNKS][2], const job &j, int64_t row) {
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int32_t h = 8 * c + (int32_t)threadIdx.x % 4 * 2 + e;
      weight[c][e] = h < j.heads ? j.scale * j.w.data[row * j.w.row + j.head0 + h] : 0.0f;
    }
}

/* A row's queries into tiles, at place(head, piece of eight columns); heads that there are not: zeros. */
template <int GROUP, typename Place>
__device__ __forceinline__ void stage_queries(const job &j, int64_t row, Place place) {
  const wn_bf16 *q = j.q.data + row * j.q.row + j.head0 * j.q.head;
  for (int32_t i = (int32_t)threadIdx.x; i < GROUP * 16; i += THREADS) {
    const bool there = i / 16 < j.heads;
    wn_sparse_stage(place(i / 16, i % 16), q + (there ? i / 16 * j.q.head : 0), i % 16 * 8, there ? j.q.width : 0,
                    j.q_vectors);
  }
}

template <int GROUP> static constexpr int scores_shared_bytes = GROUP *ROW_BYTES + WARPS *STAGES *TILE_BYTES;

/* A row a block, GROUP heads; warp w makes tiles w, w + 4, ... */
template <bool GRADIENTS, bool VECTORS, int GROUP>
__global__ static void __launch_bounds__(THREADS, GROUP == 64 ? 2 : 3) scores_kernel(job j) {
  constexpr int CHUNKS = GROUP / 8;
  extern __shared__ __align__(256) uint4 memory[];
  const int64_t row = blockIdx.x;
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP, n = j.count[row];
  const int32_t tiles = (n + TILE - 1) / TILE;
  const uint32_t shared = wn_shared_address(memory);
  const uint32_t stages = shared + GROUP * ROW_BYTES + (uint32_t)(warp * STAGES * TILE_BYTES);
  const uint32_t own = stages + wn_sparse_place(lane / 16, lane % 16);
  if (n == 0) return;
  stage_queries<GROUP>(j, row, [&](int32_t head, int32_t piece) { return shared + wn_sparse_place(head, piece); });
  wn_cp_async_commit();
  wn_cp_async_wait<0>();
  __syncthreads();
  uint32_t b[8][CHUNKS][2]; /* [step of 16 columns][8 heads] */
#pragma unroll
  for (int s = 0; s < 8; s++)
#pragma unroll
    for (int c = 0; c < CHUNKS; c += 2) {
      uint32_t r[4];
      wn_ldmatrix_x4(r, shared + wn_sparse_place(c * 8 + lane / 16 * 8 + lane % 8, 2 * s + lane / 8 % 2));
      b[s][c][0] = r[0];
      b[s][c][1] = r[1];
      b[s][c + 1][0] = r[2];
      b[s][c + 1][1] = r[3];
    }
  float weight[CHUNKS][2];
  own_weights(weight, j, row);
  int32_t picks = wn_sparse_picks(j, row, warp, n),
          after = wn_sparse_picks(j, row, warp + WARPS, n); /* they come from far */
  for (int32_t s = 0; s < STAGES - 1; s++) {
    wn_sparse_gather<VECTORS, ROW_BYTES>(j, own + (uint32_t)(s * TILE_BYTES), picks);
    wn_cp_async_commit();
    picks = after;
    after = wn_sparse_picks(j, row, warp + (s + 2) * WARPS, n);
  }
  int32_t stage = 0;
  for (int32_t t = warp; t < tiles; t += WARPS) {
    wn_cp_async_wait<STAGES - 2>();
    __syncwarp();
    const int32_t free_stage = (stage + STAGES - 1) % STAGES;
    wn_sparse_gather<VECTORS, ROW_BYTES>(j, own + (uint32_t)(free_stage * TILE_BYTES), picks);
    wn_cp_async_commit();
    picks = after;
    after = wn_sparse_picks(j, row, t + (STAGES + 1) * WARPS, n);
    float acc[CHUNKS][4] = {};
#pragma unroll
    for (int s = 0; s < 8; s++) {
      uint32_t a[4];
      wn_ldmatrix_x4(a, (stages + (uint32_t)(stage * TILE_BYTES) + wn_sparse_place(lane % 16, lane / 16)) ^
                            (uint32_t)(2 * s << 4));
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) wn_mma_bf16(acc[c], a, b[s][c]);
    }
    stage = (stage + 1) % STAGES;
    finish_tile<GRADIENTS>(j, row, t, acc, weight);
  }
  wn_cp_async_wait<0>();
}

/* The same for groups of 64 heads whose keys come in vectors: by warpgroup, 64 keys at a time, of which each warp
 * gathers 16. */
template <bool GRADIENTS> __global__ static void __launch_bounds__(THREADS, 3) wide_scores_kernel(job j) {
  extern __shared__ __align__(1024) char wide_memory[];
  const int64_t row = blockIdx.x;
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP, n = j.count[row];
  const uint32_t queries = wn_shared_address(wide_memory), stages = queries + WIDE_BYTES;
  const uint32_t own = stages + wn_sparse_wide_place(warp * TILE + lane / 16, lane % 16);
  if (n == 0) return;
  stage_queries<HEADS>(j, row,
                       [&](int32_t head, int32_t piece) { return queries + wn_sparse_wide_place(head, piece); });
  float weight[HEADS / 8][2];
  own_weights(weight, j, row);
  int32_t picks = wn_sparse_picks(j, row, warp, n), after = wn_sparse_picks(j, row, warp + WARPS, n);
  for (int32_t s = 0; s < WIDE_STAGES - 1; s++) {
    wn_sparse_gather<true, 128>(j, own + (uint32_t)(s * WIDE_BYTES), picks);
    wn_cp_async_commit();
    picks = after;
    after = wn_sparse_picks(j, row, warp + (s + 2) * WARPS, n);
  }
  int32_t stage = 0;
  for (int32_t t = warp; t - warp < (n + TILE - 1) / TILE; t += WARPS) {
    wn_cp_async_wait<WIDE_STAGES - 2>();
    wn_publish_shared();
    __syncthreads(); /* all have come, and the stage before is done with */
    const int32_t free_stage = (stage + WIDE_STAGES - 1) % WIDE_STAGES;
    wn_sparse_gather<true, 128>(j, own + (uint32_t)(free_stage * WIDE_BYTES), picks);
    wn_cp_async_commit();
    picks = after;
    after = wn_sparse_picks(j, row, t + (WIDE_STAGES + 1) * WARPS, n);
    float acc[HEADS / 8][4];
    wn_wgmma_fence();
#pragma unroll
    for (int s = 0; s < WIDTH / 16; s++) {
      const uint32_t piece = (uint32_t)(s / 4 * WN_SPARSE_KL_PIECE_BYTES);
      wn_wgmma<WN_ALONG, WN_ALONG>(acc, wn_wgmma_operand(stages + (uint32_t)(stage * WIDE_BYTES) + piece) + s % 4 * 2,
                                   wn_wgmma_operand(queries + piece) + s % 4 * 2, s > 0);
    }
    wn_wgmma_commit();
    wn_wgmma_wait<0>();
    wn_wgmma_settle(acc);
    stage = (stage + 1) % WIDE_STAGES;
    if (t * TILE < n) finish_tile<GRADIENTS>(j, row, t, acc, weight);
  }
  wn_cp_async_wait<0>();
}

/* ---- loss ---- */

/* A contribution of at most size * most to a key's bound. */
__device__ __forceinline__ void bound_key(const job &j, int32_t key, float size, float most, float unit) {
  if ((uint32_t)key >= (uint32_t)j.n_keys) return;
  unsigned long long *bound = (unsigned long long *)j.bound + key;
  if (size <= 2 && most < INFINITY)
    atomicAdd(bound, __float2ull_ru(__fmul_ru(__fmul_ru(size, most), unit)));
  else
    atomicOr(bound, 1ull << 63);
}

/* A row a block: kl, and g in place of I, and each key's bound. */
__global__ static void __launch_bounds__(LOSS_THREADS) loss_kernel(job j) {
  __shared__ float tops[LOSS_THREADS / WARP];
  __shared__ double sums[LOSS_THREADS / WARP];
  const int64_t row = blockIdx.x;
  const int32_t n = j.count[row];
  float *index = j.index + row * j.pitch;
  const float *p = j.p.data + row * j.p.row;
  if (n == 0) {
    if (threadIdx.x == 0) j.kl.data[row * j.kl.row] = 0;
    return;
  }
  float top = -INFINITY;
  double sum = 0, kl = 0;
  for (int32_t i = (int32_t)threadIdx.x; i < n; i += LOSS_THREADS) top = fmaxf(top, index[i]);
  top = block_max(top, tops);
  for (int32_t i = (int32_t)threadIdx.x; i < n; i += LOSS_THREADS) sum += (double)expf(index[i] - top);
  const float log_sum = (float)log(wn_kl_block_sum(sum, sums));
  const float most = j.gradients ? j.row_bound[row] : 0;
  const float unit = j.gradients ? ldexpf(1, wn_sparse_unit_exponent(j.largest)) : 0;
  const int32_t end = (n + PAD_PICKS - 1) / PAD_PICKS * PAD_PICKS;
  for (int32_t i = (int32_t)threadIdx.x; i < end; i += LOSS_THREADS) {
    float g = 0;
    if (i < n) {
      const float log_q = index[i] - top - log_sum;
      g = expf(log_q) - p[i];
      kl += (double)wn_kl_loss_term(p[i], log_q, g);
    }
    if (!j.gradients) continue;
    index[i] = g;
    if (i < n) bound_key(j, j.selection.data[row * j.selection.row + i], fabsf(g), most, unit);
  }
  kl = wn_kl_block_sum(kl, sums);
  if (threadIdx.x == 0) j.kl.data[row * j.kl.row] = (float)kl;
}

/* ---- operation ---- */

static wn_status take(wn_device *device, void **out, int64_t bytes) {
  return wn_cuda_scratch(device, out, "indexer rows", bytes);
}

/* Scratch of a chunk of `rows` rows. */
static wn_status lay_out(wn_device *device, job *j, int64_t rows, int64_t groups) {
  const int64_t pairs = rows * j->pitch, teams = wn_ceil_div(rows, j->team);
  WN_TRY(take(device, (void **)&j->index, pairs * 4));
  WN_TRY(take(device, (void **)&j->count, rows * 4));
  if (!j->gradients) return NULL;
  WN_TRY(take(device, (void **)&j->bits, groups * pairs * 8));
  WN_TRY(take(device, (void **)&j->turned, groups * pairs * 8));
  if (j->team > 1) WN_TRY(take(device, (void **)&j->list, teams * j->team * j->pitch * 4));
  if (j->team > 1) WN_TRY(take(device, (void **)&j->listed, teams * 4));
  WN_TRY(take(device, (void **)&j->row_bound, rows * 4));
  WN_TRY(take(device, (void **)&j->largest, 4));
  WN_TRY(take(device, (void **)&j->bound, j->n_keys * 8));
  WN_TRY(take(device, (void **)&j->key_scale, j->n_keys * 4));
  return take(device, (void **)&j->sums, j->n_keys * j->sum_row * 4);
}

template <bool GRADIENTS, bool VECTORS, int GROUP> static wn_status launch_scores(wn_device *device, const job *j) {
  const int bytes = scores_shared_bytes<GROUP>;
  WN_CUDA_TRY(cudaFuncSetAttribute(scores_kernel<GRADIENTS, VECTORS, GROUP>,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  scores_kernel<GRADIENTS, VECTORS, GROUP><<<(unsigned)j->n, THREADS, bytes, wn_cuda_stream(device)>>>(*j);
  return NULL;
}

template <bool GRADIENTS> static wn_status launch_wide_scores(wn_device *device, const job *j) {
  const int bytes = (1 + WIDE_STAGES) * WIDE_BYTES;
  WN_CUDA_TRY(cudaFuncSetAttribute(wide_scores_kernel<GRADIENTS>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  wide_scores_kernel<GRADIENTS><<<(unsigned)j->n, THREADS, bytes, wn_cuda_stream(device)>>>(*j);
  return NULL;
}

/* Narrow groups are for speed alone: what does not come in vectors is not fast anyway. */
template <bool GRADIENTS> static wn_status scores(wn_device *device, const job *j) {
  if (!j->k_vectors) return launch_scores<GRADIENTS, false, HEADS>(device, j);
  if (j->q.heads <= 16) return launch_scores<GRADIENTS, true, 16>(device, j);
  if (j->q.heads <= 32) return launch_scores<GRADIENTS, true, 32>(device, j);
  return launch_wide_scores<GRADIENTS>(device, j);
}

static wn_status run_chunk(wn_device *device, const job *j) {
  cudaStream_t stream = wn_cuda_stream(device);
  const unsigned rows = (unsigned)j->n;
  if (j->gradients) {
    WN_CUDA_TRY(cudaMemsetAsync(j->largest, 0, 4, stream));
    WN_CUDA_TRY(cudaMemsetAsync(j->bound, 0, (size_t)(j->n_keys * 8), stream));
  }
  begin_kernel<<<rows, THREADS, 0, stream>>>(*j);
  for (int32_t head0 = 0; head0 < j->q.heads; head0 += HEADS) {
    const job g = wn_sparse_group(j, head0);
    WN_TRY(j->gradients ? scores<true>(device, &g) : scores<false>(device, &g));
  }
  loss_kernel<<<rows, LOSS_THREADS, 0, stream>>>(*j);
  WN_CUDA_LAUNCHED("indexer_kl_sparse");
  return j->gradients ? wn_sparse_kl_gradients(device, j) : NULL;
}

static job rows_from(const job *j, int64_t from, int64_t n) {
  job c = *j;
  c.n = n;
  c.q.data += from * c.q.row;
  c.w.data += from * c.w.row;
  c.p.data += from * c.p.row;
  c.kl.data += from * c.kl.row;
  c.selection.data += from * c.selection.row;
  if (!c.gradients) return c;
  c.dq.data += from * c.dq.row;
  c.dw.data += from * c.dw.row;
  return c;
}

wn_status wn_cuda_indexer_kl_sparse(wn_device *device, wn_tensor *kl, wn_tensor *dq, wn_tensor *dk, wn_tensor *dw,
                                    const wn_tensor *q, const wn_tensor *k, const wn_tensor *w,
                                    const wn_tensor *selection, const wn_tensor *p, const wn_rows *rows,
                                    const wn_indexer_params *params) {
  const int64_t n = rows->n_rows, heads = q->dim[1], width = q->dim[2], picks = selection->dim[1];
  wn_cuda_expect_indexer(q, k, w, rows);
  wn_cuda_expect("kl", kl, WN_F32, 1, n, 0, 0);
  wn_cuda_expect("selection", selection, WN_I32, 2, n, picks, 0);
  wn_cuda_expect("p", p, WN_F32, 2, n, picks, 0);
  WN_ASSERT(!dq == !dk && !dq == !dw, "dq, dk and dw come together");
  WN_ASSERT(params->scale > 0, "scale %g", params->scale);
  WN_ASSERT(rows->n_keys < 1 << WN_SPARSE_KL_KEY_BITS, "%d keys", rows->n_keys);
  WN_ASSERT(width <= WIDTH, "an indexer width of %lld; at most %d is built", (long long)width, WIDTH);
  job j = {};
  j.q = wn_view_of<wn_bf16>(q);
  j.k = wn_view_of<wn_bf16>(k);
  j.w = wn_view_of<float>(w);
  j.p = wn_view_of<float>(p);
  j.kl = wn_view_of<float>(kl);
  j.selection = wn_view_of<int32_t>(selection);
  j.gradients = dq != NULL;
  if (dq) {
    wn_cuda_expect("dq", dq, WN_BF16, 3, n, heads, width);
    wn_cuda_expect("dk", dk, WN_F32, 2, rows->n_keys, width, 0);
    wn_cuda_expect("dw", dw, WN_F32, 2, n, heads, 0);
    j.dq = wn_view_of<wn_bf16>(dq);
    j.dk = wn_view_of<float>(dk);
    j.dw = wn_view_of<float>(dw);
  }
  j.n_keys = rows->n_keys;
  j.pitch = (int32_t)(wn_ceil_div(picks, PAD_PICKS) * PAD_PICKS);
  j.sum_row = (int32_t)wn_ceil_div(width, 4) * 4;
  WN_ASSERT(j.k.row * 2 <= INT32_MAX, "keys every %lld elements", (long long)j.k.row);
  j.k_row_bytes = (int32_t)(j.k.row * 2);
  j.q_vectors = wn_view_vectors(j.q);
  j.k_vectors = wn_view_vectors(j.k);
  j.team = !j.k_vectors || heads > 32 ? 1 : heads > 16 ? 2 : 4;
  j.scale = (float)params->scale;
  j.factor = (float)(params->coeff * params->scale);
  if (n == 0) return NULL;
  int64_t chunk = chunk_pairs / (j.pitch ? j.pitch : 1);
  chunk = chunk < 1 ? 1 : chunk < n ? chunk : n;
  WN_TRY(wn_cuda_expect_picks(device, j.selection, j.n_keys));
  const size_t mark = wn_arena_mark(device->scratch);
  WN_TRY(lay_out(device, &j, chunk, wn_ceil_div(heads, HEADS)));
  for (int64_t from = 0; from < n; from += chunk) {
    const job c = rows_from(&j, from, n - from < chunk ? n - from : chunk);
    WN_TRY(run_chunk(device, &c));
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}
