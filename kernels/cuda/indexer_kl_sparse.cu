/* Stage 2's loss on the selected set. A row's picks are gathered twice; between the two the row's softmax is known.
 *
 * scores: keys are the rows of tiles and heads their columns, so that the sum over heads runs along a thread's own
 * registers. The row's queries stay in registers as fragments; every warp gathers its own tiles of 16 keys. For the
 * gradients only the signs of q.k are needed again, a bit each: z = q.k enters dw through q.u alone, u being dq before
 * its factor. A lane keeps the 32 bits that are its own fragment of the tile, and the same transposed.
 *
 * With m the bits, g = softmax(I) - p in FP32 and f = coeff scale:
 *   u[h] = sum_j g_j m_hj k_j,  dq[h] = f w_h u[h],  dw[h] = f q_h . u[h],  dk[j] = g_j sum_h m_hj (f w_h q_h).
 * The bits are exact BF16 operands; what is rounded to BF16 is g in the first sum and f w_h q_h in the last.
 *
 * dk is scattered over keys, order-free: 32-bit integers at a power-of-two scale per key. The scale is not guessed and
 * nothing is launched again: |contribution| <= |g| B with B = max_d sum_h |f w_h q_hd| known before any product, so a
 * pass of 64-bit integer sums gives every key a true bound on the sum of magnitudes, and 2^30 over it is the scale.
 * A key that every one of 128K rows picks keeps about 1e-4 of its gradient as rounding, a spike of 1e4 in one row costs
 * only the keys of that row, and no sum can overflow. A value that is not finite makes its key's gradient NaN. */
#include <math.h>

#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/index_score.cuh"
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/ptx/mma.cuh"
#include "kernels/cuda/ptx/scatter.cuh"

enum {
  WARP = 32,
  WARPS = 4,
  THREADS = WARPS * WARP,
  LOSS_THREADS = 256,
  HEADS = 64,  /* of a group */
  WIDTH = 128, /* of heads and keys; narrower ones are padded with zeros */
  TILE = 16,   /* keys */
  PAD_PICKS = 64,
  ROW_BYTES = WIDTH * 2,
  TILE_BYTES = TILE * ROW_BYTES,
  Q_BYTES = HEADS * ROW_BYTES,
  SCORE_STAGES = 4,
  SCORE_BYTES = Q_BYTES + WARPS * SCORE_STAGES * TILE_BYTES,
  SLICE = WIDTH / WARPS, /* columns of a warp in the gradients */
  SLICE_BYTES = TILE * SLICE * 2,
  QUERY_STAGES = 6,
  QUERY_STAGE_BYTES = SLICE_BYTES + WARP * 4 + TILE * 4 + 64,
  SUM_KEYS = 2 * TILE,       /* of a step of the scatter */
  SUM_ROW = (WIDTH + 8) * 4, /* bytes; the padding keeps rows apart in the banks */
  SUM_BYTES = SUM_KEYS * SUM_ROW,
  QUERY_BYTES = WARPS * QUERY_STAGES * QUERY_STAGE_BYTES,
  GRADIENT_BYTES = QUERY_BYTES > 2 * SUM_BYTES ? QUERY_BYTES : 2 * SUM_BYTES,
  BOUND_BITS = 40, /* a bound's unit is 2^-40 of the largest B, or less */
  SUM_BITS = 30    /* of the magnitudes at a key's scale */
};
#define FULL_WARP 0xffffffffu
static const int64_t chunk_pairs = (int64_t)1 << 24; /* picks whose bits and g exist at a time */
static const int64_t cached_bytes = 32 << 20;        /* of sums at a time: what stays in the L2 cache */

/* A chunk of rows; views begin at its first row. */
typedef struct job {
  wn_view<wn_bf16> q, k, dq;
  wn_view<float> w, p, kl, dw, dk;
  wn_view<int32_t> selection;
  int64_t n, n_keys;
  int32_t head0, heads; /* the group's */
  int32_t pitch;        /* picks a row, padded */
  int32_t sum_row;      /* integers a key */
  int32_t k_row_bytes;
  int32_t key_from, key_end; /* keys whose gradient this launch makes */
  bool queries;              /* whether it makes the queries' */
  bool q_vectors, k_vectors, gradients;
  float scale, factor, coeff;
  float *index;            /* [n][pitch]: I, then g */
  uint32_t *bits, *turned; /* [n][pitch / 16][32] */
  int32_t *count;          /* [n]: picks of the row, 0 where there are fewer than two */
  float *row_bound;        /* [n]: B */
  uint32_t *largest;       /* bits of the largest finite B */
  uint64_t *bound;         /* [m]; the top bit: not finite */
  float *key_scale;        /* [m] */
  int32_t *sums;           /* [m][sum_row] */
} job;

/* ---- rows in shared memory ---- */

/* Where 16-byte chunk c of a row of 256 bytes lies: chunks are permuted so that ldmatrix meets no bank twice. */
__device__ __forceinline__ uint32_t place(int32_t row, int32_t chunk) {
  return (uint32_t)(row * ROW_BYTES + ((chunk ^ (row & 7)) << 4));
}

/* 8 elements of a row from `column` on, zeros from `width` on; from is the row, and has to be a valid address. */
__device__ __forceinline__ void stage_chunk(uint32_t to, const wn_bf16 *from, int32_t column, int32_t width,
                                            bool vectors) {
  if (vectors) {
    wn_cp_async_16(to, from + (column < width ? column : 0), column < width ? 16 : 0);
    return;
  }
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int32_t at = column + 2 * i;
    pair[i] = wn_pack_bf16(at < width ? __bfloat162float(from[at]) : 0.0f,
                           at + 1 < width ? __bfloat162float(from[at + 1]) : 0.0f);
  }
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(pair[0]), "r"(pair[1]), "r"(pair[2]), "r"(pair[3])
               : "memory");
}

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

__device__ static float block_sum(float x, float *shared) {
  for (int32_t step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
  __syncthreads();
  if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
  __syncthreads();
  x = 0;
  for (uint32_t i = 0; i < blockDim.x / WARP; i++) x += shared[i];
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

/* The exponent of the unit of bounds: a bound is an integer times 2^-unit_exponent. */
__device__ __forceinline__ int32_t unit_exponent(const uint32_t *largest) {
  return min(BOUND_BITS - 1 - ((int32_t)(*largest >> 23) - 127), 126);
}

/* ---- scores ---- */

/* The picks of tile t, a lane each of the first 16; -1 where there is none. */
__device__ __forceinline__ int32_t tile_picks(const job &j, int64_t row, int32_t t, int32_t n) {
  const int32_t at = t * TILE + (int32_t)threadIdx.x % WARP;
  return threadIdx.x % WARP < TILE && at < n ? j.selection.data[row * j.selection.row + at] : -1;
}

/* Where `picks` end, the tile's first is taken again: its g is 0, and no key is read that the row has not picked. */
__device__ __forceinline__ int32_t filled(const job &j, int32_t picks) {
  const int32_t first = __shfl_sync(FULL_WARP, picks, 0);
  return min(picks < 0 ? first : picks, (int32_t)j.n_keys - 1);
}

/* Keys of a tile to a warp's stage; the tile has a pick. */
__device__ __forceinline__ void gather_tile(const job &j, uint32_t stage, int32_t picks) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, chunk = lane % 16;
  const bool there = chunk * 8 < j.k.width;
  const char *from = (const char *)(j.k.data + (there ? chunk * 8 : 0));
  picks = filled(j, picks);
#pragma unroll
  for (int i = 0; i < TILE / 2; i++) {
    const int32_t r = lane / 16 + 2 * i, key = __shfl_sync(FULL_WARP, picks, r);
    if (j.k_vectors)
      wn_cp_async_16(stage + place(r, chunk), from + (int64_t)key * j.k_row_bytes, there ? 16 : 0);
    else
      stage_chunk(stage + place(r, chunk), j.k.data + key * j.k.row, chunk * 8, j.k.width, false);
  }
}

/* The lane's 32 bits: bit 2 c + b is (key 8 b + lane / 4, head 8 c + 2 (lane % 4)), bit 16 above it the next head. */
__device__ __forceinline__ uint32_t weigh_tile(float part[2], const float acc[8][4], const float weight[8][2]) {
  uint32_t bits[4] = {0, 0, 0, 0}; /* short chains: few warps are there to hide them */
  float sum[4][2] = {};
#pragma unroll
  for (int c = 0; c < 8; c++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (!(acc[c][e] <= 0)) { /* NaN passes */
        sum[c % 2 * 2 + e % 2][e / 2] = fmaf(weight[c][e % 2], acc[c][e], sum[c % 2 * 2 + e % 2][e / 2]);
        bits[e] |= 1u << (2 * c + e / 2 + 16 * (e % 2));
      }
#pragma unroll
  for (int b = 0; b < 2; b++) {
    part[b] = sum[0][b] + sum[1][b] + (sum[2][b] + sum[3][b]);
    part[b] += __shfl_xor_sync(FULL_WARP, part[b], 1);
    part[b] += __shfl_xor_sync(FULL_WARP, part[b], 2);
  }
  return bits[0] | bits[1] | (bits[2] | bits[3]);
}

/* The same bits with keys and heads exchanged: bit 4 (c / 2) + 2 b + c % 2 is (head 8 c + lane / 4, key 8 b + 2 (lane %
 * 4)), bit 16 above it the next key. */
__device__ __forceinline__ uint32_t turn_bits(uint32_t bits) {
  uint32_t turned[4] = {0, 0, 0, 0};
#pragma unroll
  for (int c = 0; c < 8; c++)
#pragma unroll
    for (int b = 0; b < 2; b++)
      turned[c % 2 * 2 + b] |= wn_transpose_8x8(bits >> (2 * c + b) & 0x00010001u) << (4 * (c / 2) + 2 * b + c % 2);
  return turned[0] | turned[1] | (turned[2] | turned[3]);
}

/* A row a block; warp w makes tiles w, w + 4, ... */
template <bool GRADIENTS> __global__ static void __launch_bounds__(THREADS, 2) scores_kernel(job j) {
  extern __shared__ uint4 memory[];
  const int64_t row = blockIdx.x;
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP, n = j.count[row];
  const int32_t tiles = (n + TILE - 1) / TILE;
  const uint32_t shared = wn_shared_address(memory);
  const uint32_t stages = shared + Q_BYTES + (uint32_t)(warp * SCORE_STAGES * TILE_BYTES);
  if (n == 0) return;
  const wn_bf16 *q = j.q.data + row * j.q.row + j.head0 * j.q.head;
  for (int32_t i = (int32_t)threadIdx.x; i < HEADS * 16; i += THREADS) {
    const bool there = i / 16 < j.heads;
    stage_chunk(shared + place(i / 16, i % 16), q + (there ? i / 16 * j.q.head : 0), i % 16 * 8, there ? j.q.width : 0,
                j.q_vectors);
  }
  wn_cp_async_commit();
  wn_cp_async_wait<0>();
  __syncthreads();
  uint32_t b[8][8][2]; /* [step of 16 columns][8 heads] */
#pragma unroll
  for (int s = 0; s < 8; s++)
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
      uint32_t r[4];
      wn_ldmatrix_x4(r, shared + place(c * 8 + lane / 16 * 8 + lane % 8, 2 * s + lane / 8 % 2));
      b[s][c][0] = r[0];
      b[s][c][1] = r[1];
      b[s][c + 1][0] = r[2];
      b[s][c + 1][1] = r[3];
    }
  float weight[8][2];
#pragma unroll
  for (int c = 0; c < 8; c++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int32_t h = 8 * c + lane % 4 * 2 + e;
      weight[c][e] = h < j.heads ? j.scale * j.w.data[row * j.w.row + j.head0 + h] : 0.0f;
    }
  int32_t picks = tile_picks(j, row, warp, n);
  for (int32_t s = 0; s < SCORE_STAGES - 1; s++) {
    if (warp + s * WARPS < tiles) gather_tile(j, stages + (uint32_t)(s * TILE_BYTES), picks);
    wn_cp_async_commit();
    picks = tile_picks(j, row, warp + (s + 1) * WARPS, n);
  }
  int32_t stage = 0;
  for (int32_t t = warp; t < tiles; t += WARPS) {
    wn_cp_async_wait<SCORE_STAGES - 2>();
    __syncwarp();
    const int32_t free_stage = (stage + SCORE_STAGES - 1) % SCORE_STAGES;
    if (t + (SCORE_STAGES - 1) * WARPS < tiles) gather_tile(j, stages + (uint32_t)(free_stage * TILE_BYTES), picks);
    wn_cp_async_commit();
    picks = tile_picks(j, row, t + SCORE_STAGES * WARPS, n);
    float acc[8][4] = {}, part[2];
#pragma unroll
    for (int s = 0; s < 8; s++) {
      uint32_t a[4];
      wn_ldmatrix_x4(a, stages + (uint32_t)(stage * TILE_BYTES) + place(lane % 16, 2 * s + lane / 16));
#pragma unroll
      for (int c = 0; c < 8; c++) wn_mma_bf16(acc[c], a, b[s][c]);
    }
    stage = (stage + 1) % SCORE_STAGES;
    const uint32_t bits = weigh_tile(part, acc, weight);
    float *index = j.index + row * j.pitch + t * TILE + lane / 4;
    if (lane % 4 == 0) index[0] = (j.head0 ? index[0] : 0.0f) + part[0];
    if (lane % 4 == 1) index[8] = (j.head0 ? index[8] : 0.0f) + part[1];
    if (GRADIENTS) {
      const int64_t at = (row * (j.pitch / TILE) + t) * WARP + lane;
      j.bits[at] = bits;
      j.turned[at] = turn_bits(bits);
    }
  }
  wn_cp_async_wait<0>();
}

/* ---- loss ---- */

/* A row a block: kl, and g in place of I, and each key's bound. */
__global__ static void __launch_bounds__(LOSS_THREADS) loss_kernel(job j) {
  __shared__ float shared[LOSS_THREADS / WARP];
  const int64_t row = blockIdx.x;
  const int32_t n = j.count[row];
  float *index = j.index + row * j.pitch;
  const float *p = j.p.data + row * j.p.row;
  if (n == 0) {
    if (threadIdx.x == 0) j.kl.data[row * j.kl.row] = 0;
    return;
  }
  float top = -INFINITY, sum = 0, kl = 0;
  for (int32_t i = (int32_t)threadIdx.x; i < n; i += LOSS_THREADS) top = fmaxf(top, index[i]);
  top = block_max(top, shared);
  for (int32_t i = (int32_t)threadIdx.x; i < n; i += LOSS_THREADS) sum += expf(index[i] - top);
  sum = block_sum(sum, shared);
  const float log_sum = logf(sum), inverse = 1.0f / sum;
  for (int32_t i = (int32_t)threadIdx.x; i < n; i += LOSS_THREADS) {
    const float above = index[i] - top;
    kl += p[i] > 0 ? p[i] * (logf(p[i]) - (above - log_sum)) : 0.0f;
  }
  kl = block_sum(kl, shared);
  if (threadIdx.x == 0) j.kl.data[row * j.kl.row] = kl;
  if (!j.gradients) return;
  const float most = j.row_bound[row], unit = ldexpf(1, unit_exponent(j.largest));
  for (int32_t i = (int32_t)threadIdx.x; i < j.pitch; i += LOSS_THREADS) {
    if (i >= (n + PAD_PICKS - 1) / PAD_PICKS * PAD_PICKS) break;
    const float g = i < n ? expf(index[i] - top) * inverse - p[i] : 0.0f;
    index[i] = g;
    const int32_t key = i < n ? j.selection.data[row * j.selection.row + i] : -1;
    if ((uint32_t)key >= (uint32_t)j.n_keys) continue;
    unsigned long long *bound = (unsigned long long *)j.bound + key;
    if (fabsf(g) <= 2 && most < INFINITY)
      atomicAdd(bound, __float2ull_ru(__fmul_ru(__fmul_ru(fabsf(g), most), unit)));
    else
      atomicOr(bound, 1ull << 63);
  }
}

/* The scale of each key's integers. Sums of magnitudes stay below 2^30 plus a half a contribution. */
__global__ static void scale_kernel(job j) {
  const int64_t key = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (key >= j.n_keys) return;
  const uint64_t bound = j.bound[key];
  const int32_t bits = 64 - __clzll((long long)bound); /* bound < 2^bits units */
  const int32_t exponent = SUM_BITS - bits + unit_exponent(j.largest);
  j.key_scale[key] = bound >> 63 ? NAN : bound ? ldexpf(1, min(max(exponent, -126), 126)) : 1.0f;
}

/* ---- gradients ---- */

/* Pair i of a lane's bits as two BF16, 2 where set: 2 is a single bit. */
__device__ __forceinline__ uint32_t twos(uint32_t bits, int i) {
  return (i < 15 ? bits << (14 - i) : bits >> 1) & 0x40004000u;
}
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

/* Where chunk c of a slice's row of 64 bytes lies. */
__device__ __forceinline__ uint32_t slice_place(int32_t row, int32_t chunk) {
  return (uint32_t)(row * SLICE * 2 + ((chunk ^ (row >> 1 & 3)) << 4));
}

/* Of tile t: a warp's columns of its keys (`picks`: those of rows lane / 4 and 8 more), its turned bits, its g. */
__device__ __forceinline__ void gather_slice(const job &j, uint32_t stage, int64_t row, int32_t t,
                                             const int32_t picks[2]) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, column = (int32_t)threadIdx.x / WARP * SLICE + lane % 4 * 8;
  const bool there = column < j.k.width;
  const char *from = (const char *)(j.k.data + (there ? column : 0));
  const int32_t first = __shfl_sync(FULL_WARP, picks[0], 0);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t to = stage + slice_place(lane / 4 + 8 * i, lane % 4);
    const int32_t key = min(picks[i] < 0 ? first : picks[i], (int32_t)j.n_keys - 1);
    if (j.k_vectors)
      wn_cp_async_16(to, from + (int64_t)key * j.k_row_bytes, there ? 16 : 0);
    else
      stage_chunk(to, j.k.data + key * j.k.row, column, j.k.width, false);
  }
  const uint32_t *bits = j.turned + (row * (j.pitch / TILE) + t) * WARP;
  const float *g = j.index + row * j.pitch + t * TILE;
  if (lane < 8) wn_cp_async_16(stage + SLICE_BYTES + lane * 16, bits + lane * 4, 16);
  if (lane >= 8 && lane < 12) wn_cp_async_16(stage + SLICE_BYTES + WARP * 4 + (lane - 8) * 16, g + (lane - 8) * 4, 16);
}

__device__ __forceinline__ void slice_picks(const job &j, int64_t row, int32_t t, int32_t n, int32_t picks[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int32_t at = t * TILE + (int32_t)threadIdx.x % WARP / 4 + 8 * i;
    picks[i] = at < n ? j.selection.data[row * j.selection.row + at] : -1;
  }
}

/* u[64 heads, the warp's 32 columns] += (g m)[64, 16 keys] k[16, 32] */
__device__ __forceinline__ void add_slice(float u[4][4][4], uint32_t stage) {
  const int32_t lane = (int32_t)threadIdx.x % WARP;
  uint32_t bits, b[2][4], g[2];
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(stage + SLICE_BYTES + lane * 4));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float x, y;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x), "=f"(y)
                 : "r"(stage + SLICE_BYTES + WARP * 4 + lane % 4 * 8 + i * 32));
    g[i] = wn_pack_bf16(0.5f * x, 0.5f * y);
    wn_ldmatrix_x4_trans(b[i], stage + slice_place(lane % 16, 2 * i + lane / 16));
  }
#pragma unroll
  for (int h = 0; h < 4; h++) {
    uint32_t a[4];
#pragma unroll
    for (int r = 0; r < 4; r++) a[r] = multiply_pairs(twos(bits, 4 * h + r), g[r / 2]);
#pragma unroll
    for (int c = 0; c < 4; c++) wn_mma_bf16(u[h][c], a, b[c / 2] + c % 2 * 2);
  }
}

/* dq of the warp's slice, and its share of f q.u by head. */
__device__ static void finish_queries(const job &j, const float u[4][4][4], int64_t row, float *dots) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, slice = (int32_t)threadIdx.x / WARP * SLICE;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int32_t h = i * 8 + lane / 4;
    const bool there = h < j.heads;
    const int64_t head = j.head0 + (there ? h : 0);
    const wn_bf16 *q = j.q.data + row * j.q.row + head * j.q.head;
    wn_bf16 *dq = j.dq.data + row * j.dq.row + head * j.dq.head;
    const float by = j.factor * j.w.data[row * j.w.row + head];
    float dot = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int32_t column = slice + e / 2 * 8 + lane % 4 * 2 + e % 2;
      const float x = u[i / 2][e / 2][i % 2 * 2 + e % 2];
      if (!there || column >= j.q.width) continue;
      dot = fmaf(__bfloat162float(q[column]), x, dot);
      dq[column] = __float2bfloat16_rn(by * x);
    }
    dot += __shfl_xor_sync(FULL_WARP, dot, 1);
    dot += __shfl_xor_sync(FULL_WARP, dot, 2);
    if (lane % 4 == 0) dots[h] = dot;
  }
}

/* A row a block, 32 columns a warp: dq and dw. */
__device__ static void query_row(const job &j, int64_t row, uint4 *memory) {
  __shared__ float dots[WARPS][HEADS];
  const int32_t warp = (int32_t)threadIdx.x / WARP, n = j.count[row];
  const int32_t tiles = warp * SLICE < j.q.width ? (n + TILE - 1) / TILE : 0;
  const uint32_t stages = wn_shared_address(memory) + (uint32_t)(warp * QUERY_STAGES * QUERY_STAGE_BYTES);
  float u[4][4][4] = {};
  int32_t picks[2], stage = 0;
  slice_picks(j, row, 0, n, picks);
  for (int32_t t = 0; t < QUERY_STAGES - 1; t++) {
    if (t < tiles) gather_slice(j, stages + (uint32_t)(t * QUERY_STAGE_BYTES), row, t, picks);
    wn_cp_async_commit();
    slice_picks(j, row, t + 1, n, picks);
  }
  for (int32_t t = 0; t < tiles; t++) {
    wn_cp_async_wait<QUERY_STAGES - 2>();
    __syncwarp();
    const int32_t next = t + QUERY_STAGES - 1, free_stage = (stage + QUERY_STAGES - 1) % QUERY_STAGES;
    if (next < tiles) gather_slice(j, stages + (uint32_t)(free_stage * QUERY_STAGE_BYTES), row, next, picks);
    wn_cp_async_commit();
    slice_picks(j, row, next + 1, n, picks);
    add_slice(u, stages + (uint32_t)(stage * QUERY_STAGE_BYTES));
    stage = (stage + 1) % QUERY_STAGES;
  }
  finish_queries(j, u, row, dots[warp]);
  __syncthreads();
  const int32_t h = (int32_t)threadIdx.x;
  if (h < j.heads) {
    float dot = 0;
    for (int32_t i = 0; i < WARPS; i++) dot += dots[i][h];
    j.dw.data[row * j.dw.row + j.head0 + h] = j.factor * dot;
  }
}

/* f w_h q_h, halved (the bits are twos), as B fragments of the warp's columns: [16 heads][8 columns]. `shared` holds
 * Q_BYTES and is free again afterwards. */
__device__ static void weighted_queries(uint32_t b[4][4][2], const job &j, int64_t row, uint4 *shared) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, slice = (int32_t)threadIdx.x / WARP * SLICE;
  for (int32_t i = (int32_t)threadIdx.x; i < HEADS * WIDTH / 2; i += THREADS) {
    const int32_t h = i / (WIDTH / 2), column = i % (WIDTH / 2) * 2;
    float x[2] = {0, 0};
    if (h < j.heads) {
      const wn_bf16 *q = j.q.data + row * j.q.row + (j.head0 + h) * j.q.head;
      const float by = 0.5f * j.factor * j.w.data[row * j.w.row + j.head0 + h];
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (column + e < j.q.width) x[e] = by * __bfloat162float(q[column + e]);
    }
    *(uint32_t *)((char *)shared + place(h, column / 8) + column % 8 * 2) = wn_pack_bf16(x[0], x[1]);
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < 4; s++)
#pragma unroll
    for (int c = 0; c < 4; c += 2) {
      uint32_t r[4];
      wn_ldmatrix_x4_trans(r, wn_shared_address(shared) + place(s * 16 + lane % 16, slice / 8 + c + lane / 16));
      b[s][c][0] = r[0];
      b[s][c][1] = r[1];
      b[s][c + 1][0] = r[2];
      b[s][c + 1][1] = r[3];
    }
  __syncthreads();
}

/* The integers of a step's 32 keys, the warp's columns, to shared memory. gain: g times the key's scale. */
__device__ __forceinline__ void step_sums(char *to, const uint32_t bits[2], const uint32_t b[4][4][2],
                                          const float *gain) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, slice = (int32_t)threadIdx.x / WARP * SLICE;
#pragma unroll
  for (int m = 0; m < 2; m++) {
    float acc[4][4] = {};
#pragma unroll
    for (int s = 0; s < 4; s++) {
      uint32_t a[4];
#pragma unroll
      for (int r = 0; r < 4; r++) a[r] = twos(bits[m], 4 * s + r);
#pragma unroll
      for (int c = 0; c < 4; c++) wn_mma_bf16(acc[c], a, b[s][c]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int32_t key = m * TILE + half * 8 + lane / 4;
      const float by = gain[key];
#pragma unroll
      for (int c = 0; c < 4; c++)
        *(int2 *)(to + key * SUM_ROW + (slice + c * 8 + lane % 4 * 2) * 4) =
            make_int2(__float2int_rn(acc[c][2 * half] * by), __float2int_rn(acc[c][2 * half + 1] * by));
    }
  }
}

/* What a lane knows of pick i: the first 8 lanes of a warp look after 8 keys of every step. */
typedef struct pick {
  int32_t key; /* -1: none of this launch's */
  float g;
} pick;
__device__ __forceinline__ pick pick_of(const job &j, int64_t row, int32_t i, int32_t n) {
  pick x = {-1, 0};
  if (i < n) x = pick{j.selection.data[row * j.selection.row + i], j.index[row * j.pitch + i]};
  if (x.key < j.key_from || x.key >= j.key_end) x = pick{-1, 0};
  return x;
}

/* How many of a row's n ascending picks lie below `key`; the warp asks together. */
__device__ static int32_t picks_below(const job &j, int64_t row, int32_t n, int32_t key) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, *picks = j.selection.data + row * j.selection.row;
  int32_t low = 0, high = n; /* the answer is in low .. high */
  while (low < high) {
    const int32_t step = (high - low + WARP - 1) / WARP, at = low + lane * step;
    const int32_t below = __popc(__ballot_sync(FULL_WARP, at < high && picks[at] < key));
    high = min(high, low + below * step);
    low = below ? low + (below - 1) * step + 1 : low;
  }
  return low;
}

/* A row a block, 32 columns a warp: each pick's contribution to dk, as integers, added to its key's by the copy engine.
 * Two buffers: while one is read, the other is written; a barrier a step. */
__device__ static void key_row(const job &j, int64_t row, uint4 *memory) {
  __shared__ float gain[2][SUM_KEYS];
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP, all = j.count[row];
  const int32_t own = warp * 8 + lane; /* of lanes below 8 */
  const bool keeper = lane < 8;
  const int32_t begin = picks_below(j, row, all, j.key_from) / SUM_KEYS * SUM_KEYS;
  const int32_t n = picks_below(j, row, all, j.key_end);
  if (begin >= n) return;
  uint32_t b[4][4][2], bits[2];
  weighted_queries(b, j, row, memory);
  const uint32_t *words = j.bits + row * (j.pitch / TILE) * WARP + lane;
  pick now = {-1, 0}, next = {-1, 0};
  if (keeper) {
    now = pick_of(j, row, begin + own, n);
    next = pick_of(j, row, begin + own + SUM_KEYS, n);
    gain[0][own] = now.key >= 0 ? now.g * j.key_scale[now.key] : 0.0f;
  }
  bits[0] = words[begin / TILE * WARP];
  bits[1] = begin + TILE < n ? words[(begin / TILE + 1) * WARP] : 0;
  __syncthreads();
  for (int32_t from = begin, buffer = 0; from < n; from += SUM_KEYS, buffer ^= 1) {
    char *sums = (char *)memory + buffer * SUM_BYTES;
    uint32_t coming[2] = {0, 0};
    pick after = {-1, 0};
    float scale = 0;
#pragma unroll
    for (int m = 0; m < 2; m++)
      if (from + SUM_KEYS + m * TILE < n) coming[m] = words[(from / TILE + 2 + m) * WARP];
    if (keeper) {
      after = pick_of(j, row, from + 2 * SUM_KEYS + own, n);
      if (next.key >= 0) scale = j.key_scale[next.key];
    }
    step_sums(sums, bits, b, gain[buffer]);
    if (keeper) {
      gain[buffer ^ 1][own] = next.g * scale;
      wn_bulk_wait_read(); /* of the other buffer, before the barrier that lets it be written again */
    }
    wn_fence_async_shared();
    __syncthreads();
    if (keeper && now.key >= 0) {
      wn_bulk_add_s32(j.sums + (int64_t)now.key * j.sum_row, wn_shared_address(sums + own * SUM_ROW),
                      (uint32_t)j.sum_row * 4);
      wn_bulk_commit();
    }
    now = next;
    next = after;
    bits[0] = coming[0];
    bits[1] = coming[1];
  }
  if (keeper) wn_bulk_wait_read();
}

/* Of a launch that makes both, even blocks make queries' gradients, which is arithmetic, odd ones those of keys, which
 * is traffic: side by side on every multiprocessor each hides behind the other. */
__global__ static void __launch_bounds__(THREADS, 4) gradients_kernel(job j) {
  extern __shared__ uint4 memory[];
  if (!j.queries)
    key_row(j, blockIdx.x, memory);
  else if (blockIdx.x % 2 == 0)
    query_row(j, blockIdx.x / 2, memory);
  else
    key_row(j, blockIdx.x / 2, memory);
}

/* dk += sums / scale */
__global__ static void finish_kernel(job j) {
  const int64_t all = j.n_keys * j.dk.width, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    const int64_t key = i / j.dk.width, column = i % j.dk.width;
    const int32_t sum = j.sums[key * j.sum_row + column];
    const float scale = j.key_scale[key];
    if (sum != 0 || scale != scale) j.dk.data[key * j.dk.row + column] += (float)sum / scale;
  }
}

/* ---- operation ---- */

static wn_status take(wn_device *device, void **out, int64_t bytes) {
  return wn_cuda_scratch(device, out, "indexer rows", bytes);
}

/* Scratch of a chunk of `rows` rows. */
static wn_status lay_out(wn_device *device, job *j, int64_t rows, int64_t groups) {
  const int64_t pairs = rows * j->pitch, words = pairs / TILE * WARP * 4;
  WN_TRY(take(device, (void **)&j->index, pairs * 4));
  WN_TRY(take(device, (void **)&j->count, rows * 4));
  if (!j->gradients) return NULL;
  WN_TRY(take(device, (void **)&j->bits, groups * words));
  WN_TRY(take(device, (void **)&j->turned, groups * words));
  WN_TRY(take(device, (void **)&j->row_bound, rows * 4));
  WN_TRY(take(device, (void **)&j->largest, 4));
  WN_TRY(take(device, (void **)&j->bound, j->n_keys * 8));
  WN_TRY(take(device, (void **)&j->key_scale, j->n_keys * 4));
  return take(device, (void **)&j->sums, j->n_keys * j->sum_row * 4);
}

static wn_status ask_shared(void) {
  WN_CUDA_TRY(cudaFuncSetAttribute(scores_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, SCORE_BYTES));
  WN_CUDA_TRY(cudaFuncSetAttribute(scores_kernel<false>, cudaFuncAttributeMaxDynamicSharedMemorySize, SCORE_BYTES));
  WN_CUDA_TRY(cudaFuncSetAttribute(gradients_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, GRADIENT_BYTES));
  return NULL;
}

/* The group of heads from head0 on, with its share of the bits. */
static job group_of(const job *j, int32_t head0) {
  job g = *j;
  const int64_t words = j->n * (j->pitch / TILE) * WARP;
  g.head0 = head0;
  g.heads = j->q.heads - head0 < HEADS ? j->q.heads - head0 : HEADS;
  if (j->gradients) {
    g.bits += head0 / HEADS * words;
    g.turned += head0 / HEADS * words;
  }
  return g;
}

/* dq and dw, and the integer sums of dk: of all keys at once, or as many at a time as the cache holds. */
static void launch_gradients(cudaStream_t stream, const job *j) {
  const int64_t parts = wn_ceil_div(j->n_keys * j->sum_row * 4, cached_bytes);
  const int64_t keys = parts ? wn_ceil_div(j->n_keys, parts) : 1;
  const unsigned rows = (unsigned)j->n;
  for (int32_t head0 = 0; head0 < j->q.heads; head0 += HEADS) {
    job g = group_of(j, head0);
    int64_t from = 0;
    do {
      g.key_from = (int32_t)from;
      g.key_end = (int32_t)(j->n_keys - from < keys ? j->n_keys : from + keys);
      g.queries = from == 0;
      gradients_kernel<<<g.queries ? 2 * rows : rows, THREADS, GRADIENT_BYTES, stream>>>(g);
      from += keys;
    } while (from < j->n_keys);
  }
}

static wn_status run_gradients(wn_device *device, const job *j) {
  cudaStream_t stream = wn_cuda_stream(device);
  const int64_t blocks = wn_ceil_div(j->n_keys * j->dk.width, LOSS_THREADS);
  const int64_t most = (int64_t)wn_cuda_of(device)->n_sms * 16;
  if (j->n_keys > 0) {
    scale_kernel<<<(unsigned)wn_ceil_div(j->n_keys, LOSS_THREADS), LOSS_THREADS, 0, stream>>>(*j);
    WN_CUDA_TRY(cudaMemsetAsync(j->sums, 0, (size_t)(j->n_keys * j->sum_row * 4), stream));
  }
  launch_gradients(stream, j);
  if (j->n_keys > 0) finish_kernel<<<(unsigned)(blocks < most ? blocks : most), LOSS_THREADS, 0, stream>>>(*j);
  WN_CUDA_LAUNCHED("indexer_kl_sparse's gradients");
  return NULL;
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
    if (j->gradients)
      scores_kernel<true><<<rows, THREADS, SCORE_BYTES, stream>>>(group_of(j, head0));
    else
      scores_kernel<false><<<rows, THREADS, SCORE_BYTES, stream>>>(group_of(j, head0));
  }
  loss_kernel<<<rows, LOSS_THREADS, 0, stream>>>(*j);
  WN_CUDA_LAUNCHED("indexer_kl_sparse");
  return j->gradients ? run_gradients(device, j) : NULL;
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
  j.scale = (float)params->scale;
  j.factor = (float)(params->coeff * params->scale);
  if (n == 0) return NULL;
  int64_t chunk = chunk_pairs / (j.pitch ? j.pitch : 1);
  chunk = chunk < 1 ? 1 : chunk < n ? chunk : n;
  const size_t mark = wn_arena_mark(device->scratch);
  WN_TRY(lay_out(device, &j, chunk, wn_ceil_div(heads, HEADS)));
  WN_TRY(ask_shared());
  for (int64_t from = 0; from < n; from += chunk) {
    const job c = rows_from(&j, from, n - from < chunk ? n - from : chunk);
    WN_TRY(run_chunk(device, &c));
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}
