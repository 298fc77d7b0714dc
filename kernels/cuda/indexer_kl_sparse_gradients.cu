/* The gradients of the sparse KL, from the sign bits and g (indexer_kl_sparse.cu has the whole idea): two kinds of
 * blocks in one launch, and the scatter's scales, sums and end. */
#include <math.h>

#include "kernels/cuda/indexer_kl_sparse.cuh"
#include "kernels/cuda/ptx/mbarrier.cuh"
#include "kernels/cuda/ptx/tile_copy.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "kernels/cuda/reduce.cuh"

enum {
  WARP = 32,
  WARPS = WN_SPARSE_KL_WARPS,
  THREADS = WARPS * WARP,
  FLAT_THREADS = 256, /* of the kernels without rows */
  HEADS = WN_SPARSE_KL_HEADS,
  WIDTH = WN_SPARSE_KL_WIDTH,
  TILE = WN_SPARSE_KL_TILE,
  SLICE = WIDTH / WARPS, /* columns of a warp */
  QUERY_KEYS = 2 * TILE, /* of a stage */
  SLICE_BYTES = QUERY_KEYS * SLICE * 2,
  STAGE_BITS = SLICE_BYTES, /* where they stand in a stage, and g */
  STAGE_G = STAGE_BITS + 2 * WARP * 4,
  QUERY_STAGES = 3,
  QUERY_STAGE_BYTES = STAGE_G + QUERY_KEYS * 4,
  QUERY_BYTES = WARPS * QUERY_STAGES * QUERY_STAGE_BYTES,
  SUM_KEYS = 2 * TILE,       /* of a step of the scatter */
  SUM_ROW = (WIDTH + 8) * 4, /* bytes; the padding keeps rows apart in the banks */
  SUM_BYTES = SUM_KEYS * SUM_ROW,
  RING = 4,                      /* steps that are known of at a time */
  TEAM_MOST = WN_SPARSE_KL_TEAM, /* at most a warp's row each */
  WINDOW = 1 << 15,              /* keys looked at together */
  KEY_BITS = WN_SPARSE_KL_KEY_BITS,
  WIDE_BITS = WN_SPARSE_KL_WIDE_BYTES, /* where they stand in a stage of 64 keys, and g */
  WIDE_G = WIDE_BITS + 4 * WARP * 4,
  WIDE_STAGE_BYTES = WIDE_BITS + 1024,
  SHARED_BYTES = 2 * WIDE_STAGE_BYTES + 1024, /* which begin at a multiple of 1024 */
  SUM_BITS = 30                               /* of the magnitudes at a key's scale */
};
static_assert((int)SHARED_BYTES >= (int)WN_SPARSE_KL_Q_BYTES && (int)SHARED_BYTES >= (int)QUERY_BYTES &&
                  (int)SHARED_BYTES >= 2 * (int)SUM_BYTES,
              "weighted queries, narrow rows of queries and sums");
#define FULL_WARP 0xffffffffu

typedef wn_sparse_kl job;

/* The scale of each key's integers. Sums of magnitudes stay below 2^30 plus a half a contribution. */
__global__ static void scale_kernel(job j) {
  const int64_t key = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (key >= j.n_keys) return;
  const uint64_t bound = j.bound[key];
  const int32_t bits = 64 - __clzll((long long)bound); /* bound < 2^bits units */
  const int32_t exponent = SUM_BITS - bits + wn_sparse_unit_exponent(j.largest);
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

/* Of 32 picks from `from` on, if the row has them: a warp's columns of their keys (`pick`: the lane's own, -1 where
 * there is none), their turned bits, their g. */
template <bool VECTORS>
__device__ __forceinline__ void gather_slice(const job &j, uint32_t stage, int64_t row, int32_t from, int32_t pick) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, column = (int32_t)threadIdx.x / WARP * SLICE + lane % 4 * 8;
  const int32_t first = __shfl_sync(FULL_WARP, pick, 0);
  if (first < 0) return;
  const bool there = column < j.k.width;
  const char *keys = (const char *)(j.k.data + (there ? column : 0));
  pick = min(pick < 0 ? first : pick, (int32_t)j.n_keys - 1);
#pragma unroll
  for (int i = 0; i < QUERY_KEYS / 8; i++) {
    const uint32_t to = stage + slice_place(lane / 4 + 8 * i, lane % 4);
    const int32_t key = __shfl_sync(FULL_WARP, pick, lane / 4 + 8 * i);
    if (VECTORS)
      wn_cp_async_16(to, keys + (int64_t)key * j.k_row_bytes, there ? 16 : 0);
    else
      wn_sparse_stage(to, j.k.data + key * j.k.row, column, j.k.width, false);
  }
  const uint32_t *bits = j.turned + (row * (j.pitch / TILE) + from / TILE) * WARP;
  const float *g = j.index + row * j.pitch + from;
  if (lane < 16) wn_cp_async_16(stage + STAGE_BITS + lane * 16, bits + lane * 4, 16);
  if (lane >= 16 && lane < 24) wn_cp_async_16(stage + STAGE_G + (lane - 16) * 16, g + (lane - 16) * 4, 16);
}

/* The lane's of 32 picks from `from` on. */
__device__ __forceinline__ int32_t pick_of(const job &j, int64_t row, int32_t from, int32_t n) {
  const int32_t at = from + (int32_t)threadIdx.x % WARP;
  return at < n ? j.selection.data[row * j.selection.row + at] : -1;
}

/* Half of g of a tile's 16 keys (the bits are twos) as pairs of two BF16, one and what it leaves: g sums to nothing
 * over a row, so what one would drop is a larger share of dw than of g. */
__device__ __forceinline__ void two_parts(uint32_t g[2], uint32_t rest[2], uint32_t from) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float x, y;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(from + threadIdx.x % 4 * 8 + i * 32));
    g[i] = wn_pack_bf16(0.5f * x, 0.5f * y);
    rest[i] = wn_pack_bf16(0.5f * x - __uint_as_float(g[i] << 16), 0.5f * y - __uint_as_float(g[i] & 0xffff0000u));
  }
}

/* u[heads, the warp's 32 columns] += (g m)[heads, 16 keys] k[16, 32], of a tile of the stage. */
template <int STEPS> __device__ __forceinline__ void add_slice(float (&u)[STEPS][4][4], uint32_t stage, int tile) {
  const int32_t lane = (int32_t)threadIdx.x % WARP;
  uint32_t bits, b[2][4], g[2], rest[2];
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(stage + STAGE_BITS + tile * WARP * 4 + lane * 4));
  two_parts(g, rest, stage + STAGE_G + tile * TILE * 4);
#pragma unroll
  for (int i = 0; i < 2; i++)
    wn_ldmatrix_x4_trans(b[i], stage + slice_place(tile * TILE + lane % 16, 2 * i + lane / 16));
#pragma unroll
  for (int h = 0; h < STEPS; h++) {
    uint32_t mask[4], a[4];
#pragma unroll
    for (int r = 0; r < 4; r++) mask[r] = twos(bits, 2 * h + r % 2 + r / 2 * 8);
#pragma unroll
    for (int part = 0; part < 2; part++) {
#pragma unroll
      for (int r = 0; r < 4; r++) a[r] = multiply_pairs(mask[r], part ? rest[r / 2] : g[r / 2]);
#pragma unroll
      for (int c = 0; c < 4; c++) wn_mma_bf16(u[h][c], a, b[c / 2] + c % 2 * 2);
    }
  }
}

/* A row's head as dq is made: q, dq and the factor of u; of a head that there is not nothing is touched. */
typedef struct head_of_row {
  const wn_bf16 *q;
  wn_bf16 *dq;
  float by;
  bool there;
} head_of_row;
__device__ __forceinline__ head_of_row head_at(const job &j, int64_t row, int32_t h) {
  const bool there = h < j.heads;
  const int64_t head = j.head0 + (there ? h : 0);
  return {j.q.data + row * j.q.row + head * j.q.head, j.dq.data + row * j.dq.row + head * j.dq.head,
          j.factor * j.w.data[row * j.w.row + head], there};
}
/* dq of a column; *dot += q.u */
__device__ __forceinline__ void finish_column(const job &j, const head_of_row &head, int32_t column, float u,
                                              float *dot) {
  if (!head.there || column >= j.q.width) return;
  *dot = fmaf(__bfloat162float(head.q[column]), u, *dot);
  head.dq[column] = __float2bfloat16_rn(head.by * u);
}

/* dq of the warp's slice, and its share of f q.u by head. */
template <int STEPS>
__device__ static void finish_queries(const job &j, const float (&u)[STEPS][4][4], int64_t row, float *dots) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, slice = (int32_t)threadIdx.x / WARP * SLICE;
#pragma unroll
  for (int i = 0; i < 2 * STEPS; i++) {
    const int32_t h = i * 8 + lane / 4;
    const head_of_row head = head_at(j, row, h);
    float dot = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int32_t column = slice + e / 2 * 8 + lane % 4 * 2 + e % 2;
      finish_column(j, head, column, u[i / 2][e / 2][i % 2 * 2 + e % 2], &dot);
    }
    dot = wn_quad_sum(dot);
    if (lane % 4 == 0) dots[h] = dot;
  }
}

/* dq of a head from the lane's columns of u, the lower rows or the upper, and f q.u. */
__device__ __forceinline__ float finish_head(const job &j, const float (&u)[WIDTH / 8][4], int64_t row, int32_t h,
                                             int upper) {
  const head_of_row head = head_at(j, row, h);
  float dot = 0;
#pragma unroll
  for (int i = 0; i < WIDTH / 4; i++) {
    const int32_t column = i / 2 * 8 + (int32_t)threadIdx.x % 4 * 2 + i % 2;
    finish_column(j, head, column, u[i / 2][upper * 2 + i % 2], &dot);
  }
  return wn_quad_sum(dot);
}

/* A row a block, 32 columns a warp: dq and dw. */
template <bool VECTORS, int STEPS> __device__ static void query_row(const job &j, int64_t row, uint4 *memory) {
  __shared__ float dots[WARPS][16 * STEPS];
  const int32_t warp = (int32_t)threadIdx.x / WARP, n = j.count[row];
  const int32_t end = warp * SLICE < j.q.width ? n : 0;
  const uint32_t stages = wn_shared_address(memory) + (uint32_t)(warp * QUERY_STAGES * QUERY_STAGE_BYTES);
  float u[STEPS][4][4] = {};
  int32_t stage = 0;
  for (int32_t i = 0; i < QUERY_STAGES - 1; i++) {
    gather_slice<VECTORS>(j, stages + (uint32_t)(i * QUERY_STAGE_BYTES), row, i * QUERY_KEYS,
                          pick_of(j, row, i * QUERY_KEYS, end));
    wn_cp_async_commit();
  }
  /* picks are asked for two stages before their keys are: they come from far */
  int32_t next = pick_of(j, row, (QUERY_STAGES - 1) * QUERY_KEYS, end);
  int32_t after = pick_of(j, row, QUERY_STAGES * QUERY_KEYS, end);
  for (int32_t from = 0; from < end; from += QUERY_KEYS) {
    wn_cp_async_wait<QUERY_STAGES - 2>();
    __syncwarp();
    const int32_t free_stage = (stage + QUERY_STAGES - 1) % QUERY_STAGES;
    gather_slice<VECTORS>(j, stages + (uint32_t)(free_stage * QUERY_STAGE_BYTES), row,
                          from + (QUERY_STAGES - 1) * QUERY_KEYS, next);
    wn_cp_async_commit();
    next = after;
    after = pick_of(j, row, from + (QUERY_STAGES + 1) * QUERY_KEYS, end);
#pragma unroll(STEPS < 4 ? 2 : 1) /* registers */
    for (int tile = 0; tile < QUERY_KEYS / TILE; tile++)
      add_slice(u, stages + (uint32_t)(stage * QUERY_STAGE_BYTES), tile);
    stage = (stage + 1) % QUERY_STAGES;
  }
  wn_cp_async_wait<0>();
  finish_queries(j, u, row, dots[warp]);
  __syncthreads();
  const int32_t h = (int32_t)threadIdx.x;
  if (h < j.heads) {
    float dot = 0;
    for (int32_t i = 0; i < WARPS; i++) dot += dots[i][h];
    j.dw.data[row * j.dw.row + j.head0 + h] = j.factor * dot;
  }
}

/* Of picks 64 i and on, if the row has them: keys, turned bits and g; each warp sees to a tile. */
__device__ __forceinline__ void gather_wide(const job &j, uint32_t stage, int64_t row, int32_t t, int32_t n,
                                            int32_t picks) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP;
  if ((t - warp) * TILE >= n) return;
  wn_sparse_gather<true, 128>(j, stage + wn_sparse_wide_place(warp * TILE + lane / 16, lane % 16), picks);
  if (lane < 8)
    wn_cp_async_16(stage + WIDE_BITS + warp * WARP * 4 + lane * 16,
                   j.turned + (row * (j.pitch / TILE) + t) * WARP + lane * 4, 16);
  else if (lane < 12)
    wn_cp_async_16(stage + WIDE_G + warp * TILE * 4 + (lane - 8) * 16,
                   j.index + row * j.pitch + t * TILE + (lane - 8) * 4, 16);
}

/* A row a block, for groups of 64 heads whose keys come in vectors: dq and dw by the warpgroup, 64 keys at a time, 16
 * heads a warp. */
__device__ static void wide_query_row(const job &j, int64_t row, uint32_t stages) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP, n = j.count[row];
  float u[WIDTH / 8][4] = {};
  int32_t stage = 0;
  gather_wide(j, stages, row, warp, n, wn_sparse_picks(j, row, warp, n));
  wn_cp_async_commit();
  int32_t next = wn_sparse_picks(j, row, warp + WARPS, n), after = wn_sparse_picks(j, row, warp + 2 * WARPS, n);
  for (int32_t t = warp; (t - warp) * TILE < n; t += WARPS) {
    const uint32_t now = stages + (uint32_t)(stage * WIDE_STAGE_BYTES);
    wn_cp_async_wait<0>();
    wn_publish_shared();
    __syncthreads(); /* all have come, and the other stage is done with */
    stage = 1 - stage;
    gather_wide(j, stages + (uint32_t)(stage * WIDE_STAGE_BYTES), row, t + WARPS, n, next);
    wn_cp_async_commit();
    next = after;
    after = wn_sparse_picks(j, row, t + 3 * WARPS, n);
    uint32_t a[2][4][4]; /* g as two BF16; [16 keys] */
#pragma unroll
    for (int s = 0; s < 4; s++) {
      uint32_t bits, g[2], rest[2];
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(now + WIDE_BITS + s * WARP * 4 + lane * 4));
      bits >>= 2 * warp; /* those of the warp's heads */
      two_parts(g, rest, now + WIDE_G + s * TILE * 4);
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const uint32_t mask = twos(bits, r % 2 + r / 2 * 8);
        a[0][s][r] = multiply_pairs(mask, g[r / 2]);
        a[1][s][r] = multiply_pairs(mask, rest[r / 2]);
      }
    }
    wn_wgmma_settle(u);
    wn_wgmma_fence();
#pragma unroll
    for (int i = 0; i < 8; i++)
      wn_wgmma_registers(u, a[i % 2][i / 2], wn_wgmma_operand(now, WN_SPARSE_KL_PIECE_BYTES) + i / 2 * 128);
    wn_wgmma_commit();
    wn_wgmma_wait<0>();
    wn_wgmma_settle(u);
  }
  wn_cp_async_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int32_t h = warp * 16 + half * 8 + lane / 4;
    const float dot = finish_head(j, u, row, h, half);
    if (lane % 4 == 0 && h < j.heads) j.dw.data[row * j.dw.row + j.head0 + h] = j.factor * dot;
  }
}

/* f w_h q_h, halved (the bits are twos), as B fragments of the warp's columns: [16 heads][8 columns]. `shared` holds
 * Q_BYTES and is free again afterwards. */
template <int STEPS>
__device__ static void weighted_queries(uint32_t (&b)[STEPS][4][2], const job &j, int64_t row, uint4 *shared) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, slice = (int32_t)threadIdx.x / WARP * SLICE;
  for (int32_t i = (int32_t)threadIdx.x; i < 16 * STEPS * WIDTH / 2; i += THREADS) {
    const int32_t h = i / (WIDTH / 2), column = i % (WIDTH / 2) * 2;
    float x[2] = {0, 0};
    if (h < j.heads) {
      const wn_bf16 *q = j.q.data + row * j.q.row + (j.head0 + h) * j.q.head;
      const float by = 0.5f * j.factor * j.w.data[row * j.w.row + j.head0 + h];
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (column + e < j.q.width) x[e] = by * __bfloat162float(q[column + e]);
    }
    *(uint32_t *)((char *)shared + wn_sparse_place(h, column / 8) + column % 8 * 2) = wn_pack_bf16(x[0], x[1]);
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < STEPS; s++)
#pragma unroll
    for (int c = 0; c < 4; c += 2) {
      uint32_t r[4];
      wn_ldmatrix_x4_trans(r,
                           wn_shared_address(shared) + wn_sparse_place(s * 16 + lane % 16, slice / 8 + c + lane / 16));
      b[s][c][0] = r[0];
      b[s][c][1] = r[1];
      b[s][c + 1][0] = r[2];
      b[s][c + 1][1] = r[3];
    }
  __syncthreads();
}

/* ---- keys ---- */

/* The keys that the rows of a team pick, ascending, with who picks them; a team a block. */
__global__ static void __launch_bounds__(FLAT_THREADS) list_kernel(job j) {
  __shared__ uint32_t picked[TEAM_MOST][WINDOW / 32];
  __shared__ int32_t in_warp[FLAT_THREADS / WARP];
  const int64_t team = blockIdx.x;
  const int32_t thread = (int32_t)threadIdx.x, lane = thread % WARP;
  uint32_t *list = j.list + team * j.team * j.pitch;
  int32_t listed = 0;
  for (int32_t window = 0; window < j.n_keys; window += WINDOW) {
    for (int32_t i = thread; i < j.team * (WINDOW / 32); i += FLAT_THREADS) picked[0][i] = 0;
    __syncthreads();
    for (int32_t r = 0; r < j.team && team * j.team + r < j.n; r++) {
      const int64_t row = team * j.team + r;
      for (int32_t i = thread; i < j.count[row]; i += FLAT_THREADS) {
        const int32_t key = j.selection.data[row * j.selection.row + i] - window;
        if ((uint32_t)key < (uint32_t)WINDOW) atomicOr(&picked[r][key / 32], 1u << key % 32);
      }
    }
    __syncthreads();
    for (int32_t from = 0; from < WINDOW / 32; from += FLAT_THREADS) {
      uint32_t who[TEAM_MOST], some = 0;
#pragma unroll
      for (int r = 0; r < TEAM_MOST; r++) some |= who[r] = r < j.team ? picked[r][from + thread] : 0;
      int32_t before = __popc(some);
#pragma unroll
      for (int step = 1; step < WARP; step *= 2) {
        const int32_t below = __shfl_up_sync(FULL_WARP, before, step);
        if (lane >= step) before += below;
      }
      if (lane == WARP - 1) in_warp[thread / WARP] = before;
      __syncthreads();
      uint32_t *to = list + listed + before - __popc(some);
      for (int32_t i = 0; i < FLAT_THREADS / WARP; i++) {
        if (i < thread / WARP) to += in_warp[i];
        listed += in_warp[i];
      }
      __syncthreads();
      for (; some; some &= some - 1) {
        const int32_t bit = __ffs((int32_t)some) - 1;
        uint32_t rows = 0;
#pragma unroll
        for (int r = 0; r < TEAM_MOST; r++) rows |= (who[r] >> bit & 1) << r;
        *to++ = (uint32_t)(window + (from + thread) * 32 + bit) | rows << KEY_BITS;
      }
    }
  }
  if (thread == 0) j.listed[team] = listed;
}

/* What a step needs to know of its 32 keys: of each row that picks one its bits and g, else zeros. A key is -1 and its
 * scale 0 where the list has ended. */
template <int TEAM> struct step_keys {
  uint16_t bits[TEAM][SUM_KEYS][4];
  float g[TEAM][SUM_KEYS], scale[SUM_KEYS];
  int32_t key[SUM_KEYS];
};

/* The integers of the keys, the warp's columns, to shared memory: sums over the team's rows in FP32 first. What a row
 * has not picked stays out, whatever 0 times its queries is. */
template <int TEAM, int STEPS>
__device__ __forceinline__ void step_sums(char *to, const step_keys<TEAM> &keys,
                                          const uint32_t (&b)[TEAM][STEPS][4][2]) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, slice = (int32_t)threadIdx.x / WARP * SLICE;
#pragma unroll
  for (int m = 0; m < 2; m++) {
    const int32_t key = m * TILE + lane / 4;
    float sum[4][4] = {};
#pragma unroll
    for (int row = 0; row < TEAM; row++) {
      const uint32_t bits = __byte_perm(keys.bits[row][key][lane % 4], keys.bits[row][key + 8][lane % 4], 0x5140);
      const float g[2] = {keys.g[row][key], keys.g[row][key + 8]};
      float acc[4][4] = {};
#pragma unroll
      for (int s = 0; s < STEPS; s++) {
        uint32_t a[4];
#pragma unroll
        for (int r = 0; r < 4; r++) a[r] = twos(bits, 2 * s + r / 2 + r % 2 * 8);
#pragma unroll
        for (int c = 0; c < 4; c++) wn_mma_bf16(acc[c], a, b[row][s][c]);
      }
#pragma unroll
      for (int c = 0; c < 4; c++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (TEAM == 1 || g[e / 2] != 0) sum[c][e] = fmaf(g[e / 2], acc[c][e], sum[c][e]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float by = keys.scale[key + 8 * half];
#pragma unroll
      for (int c = 0; c < 4; c++)
        *(int2 *)(to + (key + 8 * half) * SUM_ROW + (slice + c * 8 + lane % 4 * 2) * 4) =
            make_int2(__float2int_rn(sum[c][2 * half] * by), __float2int_rn(sum[c][2 * half + 1] * by));
    }
  }
}

/* A warp's part in knowing of steps ahead: warp i looks up row i of the team, the last one the keys and their scales.
 * Copies that a memory fence does not wait for, as it would for loads. */
typedef struct scout {
  const uint32_t *list; /* of a team of one: the row's picks */
  int32_t n;            /* keys in the list */
  int64_t picks;        /* where the row's next begin */
} scout;

__device__ __forceinline__ void fetch_list(uint32_t *to, const scout &s, int32_t from) {
  const int32_t at = from + (int32_t)threadIdx.x % WARP;
  if (from < s.n) wn_cp_async_4(wn_shared_address(to + threadIdx.x % WARP), s.list + min(at, s.n - 1), at < s.n);
}
/* Once the list's piece is there. A key outside would be added to outside. */
template <int TEAM>
__device__ __forceinline__ void fetch_step(step_keys<TEAM> *to, const uint32_t *piece, const job &j, scout *s,
                                           int32_t from) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP;
  if (from >= s->n) return;
  const uint32_t entry = piece[lane], who = TEAM > 1 ? entry >> KEY_BITS : from + lane < s->n;
  if (warp < TEAM) {
    const bool picks = who >> warp & 1;
    const uint32_t all = __ballot_sync(FULL_WARP, picks);
    const int64_t at = picks ? s->picks + __popc(all & ((1u << lane) - 1)) : 0;
    wn_cp_async_8(wn_shared_address(to->bits[warp][lane]), j.bits + at * 4, picks);
    wn_cp_async_4(wn_shared_address(to->g[warp] + lane), j.index + at, picks);
    s->picks += __popc(all);
  }
  if (warp == WARPS - 1) {
    const uint32_t key = TEAM > 1 ? entry & ((1u << KEY_BITS) - 1) : entry;
    const bool there = who && key < (uint64_t)j.n_keys;
    to->key[lane] = there ? (int32_t)key : -1;
    wn_cp_async_4(wn_shared_address(to->scale + lane), j.key_scale + (there ? key : 0), there);
  }
}

/* A team of rows a block, 32 columns a warp: contributions to dk, as integers, added to their keys' by the copy engine.
 * Two buffers: while one is read, the other is written; a barrier a step. Of every step the first 8 lanes of a warp
 * look after 8 keys. */
template <int TEAM, int STEPS> __device__ static void key_rows(const job &j, int64_t team, uint4 *memory) {
  __shared__ __align__(16) step_keys<TEAM> ring[RING];
  __shared__ uint32_t pieces[WARPS][RING][WARP];
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP;
  const int32_t own = warp * 8 + lane % 8, n = TEAM > 1 ? j.listed[team] : j.count[team];
  const int64_t row0 = team * TEAM;
  const bool keeper = lane < 8;
  scout s = {TEAM > 1 ? j.list + row0 * j.pitch : (const uint32_t *)j.selection.data + row0 * j.selection.row, n,
             (row0 + warp) * j.pitch};
  if (n == 0) return;
  for (int32_t i = 0; i < RING - 1; i++) fetch_list(pieces[warp][i], s, i * SUM_KEYS);
  wn_cp_async_commit();
  wn_cp_async_wait<0>();
  __syncwarp();
  for (int32_t i = 0; i < RING - 2; i++) fetch_step(ring + i, pieces[warp][i], j, &s, i * SUM_KEYS);
  wn_cp_async_commit();
  wn_cp_async_wait<0>();
  uint32_t b[TEAM][STEPS][4][2];
#pragma unroll
  for (int row = 0; row < TEAM; row++)
    weighted_queries(b[row], j, min(row0 + row, j.n - 1), memory); /* with a barrier at its end */
  for (int32_t from = 0, step = 0; from < n; from += SUM_KEYS, step++) {
    char *sums = (char *)memory + step % 2 * SUM_BYTES;
    const step_keys<TEAM> &now = ring[step % RING];
    wn_cp_async_wait<0>(); /* sent for a step ago */
    __syncwarp();
    fetch_step(ring + (step + 2) % RING, pieces[warp][(step + 2) % RING], j, &s, from + 2 * SUM_KEYS);
    fetch_list(pieces[warp][(step + 3) % RING], s, from + 3 * SUM_KEYS);
    wn_cp_async_commit();
    step_sums(sums, now, b);
    const int32_t key = now.key[own];
    if (keeper) wn_bulk_wait_read(); /* of the other buffer, before the barrier that lets it be written again */
    wn_publish_shared();
    __syncthreads();
    if (keeper && key >= 0) {
      wn_bulk_add_s32(j.sums + (int64_t)key * j.sum_row, wn_shared_address(sums + own * SUM_ROW),
                      (uint32_t)j.sum_row * 4);
      wn_bulk_commit();
    }
  }
  if (keeper) wn_bulk_wait_read();
}

/* Of TEAM + 1 blocks the last makes the gradients of a team's keys, which is traffic, the others those of a row's
 * queries, which is arithmetic: side by side on every multiprocessor each hides behind the other. */
template <bool VECTORS, int GROUP, int TEAM>
__global__ static void __launch_bounds__(THREADS, 4) gradients_kernel(job j) {
  extern __shared__ uint4 memory[];
  const int64_t team = blockIdx.x / (TEAM + 1), place = blockIdx.x % (TEAM + 1);
  if (place == TEAM)
    key_rows<TEAM, GROUP / 16>(j, team, memory);
  else if (team * TEAM + place >= j.n)
    return;
  else if (VECTORS && GROUP == HEADS)
    wide_query_row(j, team * TEAM + place, (wn_shared_address(memory) + 1023) & ~1023u);
  else
    query_row<VECTORS, GROUP / 16>(j, team * TEAM + place, memory);
}

template <bool VECTORS, int GROUP, int TEAM> static wn_status launch_gradients(wn_device *device, const job *j) {
  const unsigned blocks = (unsigned)wn_ceil_div(j->n, TEAM) * (TEAM + 1);
  WN_CUDA_TRY(cudaFuncSetAttribute(gradients_kernel<VECTORS, GROUP, TEAM>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   SHARED_BYTES));
  gradients_kernel<VECTORS, GROUP, TEAM><<<blocks, THREADS, SHARED_BYTES, wn_cuda_stream(device)>>>(*j);
  return NULL;
}

static wn_status gradients(wn_device *device, const job *j) {
  if (!j->k_vectors) return launch_gradients<false, HEADS, 1>(device, j);
  if (j->q.heads <= 16) return launch_gradients<true, 16, 4>(device, j);
  if (j->q.heads <= 32) return launch_gradients<true, 32, 2>(device, j);
  return launch_gradients<true, HEADS, 1>(device, j);
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

wn_status wn_sparse_kl_gradients(wn_device *device, const job *j) {
  cudaStream_t stream = wn_cuda_stream(device);
  const int64_t blocks = wn_ceil_div(j->n_keys * j->dk.width, FLAT_THREADS);
  const int64_t most = (int64_t)wn_cuda_of(device)->n_sms * 16;
  if (j->n_keys > 0) {
    scale_kernel<<<(unsigned)wn_ceil_div(j->n_keys, FLAT_THREADS), FLAT_THREADS, 0, stream>>>(*j);
    WN_CUDA_TRY(cudaMemsetAsync(j->sums, 0, (size_t)(j->n_keys * j->sum_row * 4), stream));
  }
  if (j->team > 1) list_kernel<<<(unsigned)wn_ceil_div(j->n, j->team), FLAT_THREADS, 0, stream>>>(*j);
  for (int32_t head0 = 0; head0 < j->q.heads; head0 += HEADS) {
    const job g = wn_sparse_group(j, head0);
    WN_TRY(gradients(device, &g));
  }
  if (j->n_keys > 0) finish_kernel<<<(unsigned)(blocks < most ? blocks : most), FLAT_THREADS, 0, stream>>>(*j);
  WN_CUDA_LAUNCHED("indexer_kl_sparse's gradients");
  return NULL;
}
