/* Backward of the per-head attention, in two kernels without a shared sum. P is made again from the saved log-sum-exp,
 * S = scale Q K^T, dP = dO V^T, dS = P (dP - delta).
 * - rows: a block keeps 128 rows of a head and walks key tiles: dQ = scale dS K.
 * - keys: a block keeps 128 keys of a head and walks row tiles, its products transposed so that P^T and dS^T are
 *   already the left operands of dV += P^T dO and dK += scale dS^T Q. Where both sums do not fit the registers (widths
 *   of 256) it runs once for each.
 *
 * P and dS are rounded to BF16 for the products; sums are FP32 and are added to dK, dV once. */
#ifndef WN_KERNELS_CUDA_ATTENTION_BACKWARD_CUH
#define WN_KERNELS_CUDA_ATTENTION_BACKWARD_CUH

#include "kernels/cuda/attention_tile.cuh"

/* ---- what both forms share ---- */

/* s becomes dS of a warp's [16, 64] without the scale; word bits clear: 0. */
__device__ __forceinline__ void wn_logit_gradients(float (&s)[8][4], const float (&dp)[8][4], const uint64_t words[2],
                                                   bool full, const float lse[2], const float delta[2], float scale) {
  const int col = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const uint64_t shifted = words[r] >> col;
    const uint32_t half[2] = {(uint32_t)shifted, (uint32_t)(shifted >> 32)};
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const float p = wn_exp2(s[j][2 * r + e] * (scale * WN_LOG2E) - lse[r] * WN_LOG2E);
        const bool seen = full || ((half[j >> 2] >> (8 * (j & 3) + e)) & 1);
        s[j][2 * r + e] = seen ? p * (dp[j][2 * r + e] - delta[r]) : 0;
      }
  }
}

/* What the keys kernel knows of 64 rows, beside Q and dO. */
typedef struct wn_row_facts {
  float lse[WN_TILE], delta[WN_TILE];
  int32_t first[WN_TILE], last[WN_TILE]; /* dense */
  uint64_t words[2][WN_TILE];            /* masked: of the block's two key tiles */
} wn_row_facts;

/* Of row r of the tile; rows past the end see nothing. */
template <bool MASKED>
__device__ __forceinline__ void wn_bring_facts(wn_row_facts *to, const wn_attend_job &job, int head, int row0,
                                               int key_block, int r) {
  const int row = row0 + r;
  const bool real = row < job.n;
  to->lse[r] = real ? job.lse.data[row * job.lse.row + head] : 0;
  to->delta[r] = real ? job.delta.data[row * job.delta.row + head] : 0;
  if (MASKED) {
#pragma unroll
    for (int w = 0; w < 2; w++)
      to->words[w][r] =
          real && (2 * key_block + w) * WN_TILE < job.m ? job.words[(2 * key_block + w) * job.word_pitch + row] : 0;
  } else {
    to->first[r] = real ? job.first[row] : 1;
    to->last[r] = real ? job.last[row] : 0;
  }
}

/* Bits 0, 1: keys `key`, `key` + 8 of the tile's row r. */
template <bool MASKED>
__device__ __forceinline__ int wn_keys_seen(const wn_row_facts *facts, int r, int key, int tile) {
  if (MASKED) {
    const uint64_t word = facts->words[tile][r] >> (key & (WN_TILE - 1));
    return (int)(word & 1) | (int)(word >> 7 & 2);
  }
  const int first = facts->first[r], last = facts->last[r];
  return (first <= key && key <= last) | (first <= key + 8 && key + 8 <= last) << 1;
}

/* A row tile that the block of 128 keys has to look at. */
template <bool MASKED>
__device__ __forceinline__ bool wn_row_tile_active(const wn_attend_job &job, int tile, int block) {
  if (MASKED) return job.active[(int64_t)tile * job.active_pitch + (block >> 4)] >> (2 * block & 31) & 3;
  const wn_tile_bounds b = job.bounds[tile];
  return b.lowest_first < (block + 1) * WN_BLOCK_ROWS && b.highest_last >= block * WN_BLOCK_ROWS;
}

/* The first active row tile from `tile` on. */
template <bool MASKED>
__device__ __forceinline__ int wn_next_rows(const wn_attend_job &job, int tile, int tiles, int block) {
  while (tile < tiles && !wn_row_tile_active<MASKED>(job, tile, block)) tile++;
  return tile;
}

/* Dense: every row of the tile sees all keys of the block. */
template <bool MASKED> __device__ __forceinline__ bool wn_row_tile_full(const wn_attend_job &job, int tile, int block) {
  if (MASKED) return false;
  const wn_tile_bounds b = job.bounds[tile];
  return b.highest_first <= block * WN_BLOCK_ROWS && b.lowest_last >= (block + 1) * WN_BLOCK_ROWS - 1;
}

/* s: from products to P^T of a warp's [16 keys, 8 NT rows]; 0 where the row does not see the key. */
template <bool MASKED, int NT>
__device__ __forceinline__ void wn_key_weights(float (&s)[NT][4], const wn_row_facts *facts, int r0, int key, int tile,
                                               bool full, float scale) {
  const int col = (threadIdx.x & 3) * 2;
  uint32_t seen = ~0u; /* two bits for each of the lane's rows */
  if (!full) {
    seen = 0;
#pragma unroll
    for (int i = 0; i < 2 * NT; i++)
      seen |= (uint32_t)wn_keys_seen<MASKED>(facts, r0 + 8 * (i >> 1) + col + (i & 1), key, tile) << 2 * i;
  }
#pragma unroll
  for (int j = 0; j < NT; j++) {
    const float2 lse = *(const float2 *)&facts->lse[r0 + 8 * j + col];
    const float base[2] = {lse.x * WN_LOG2E, lse.y * WN_LOG2E};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float p = wn_exp2(s[j][e] * (scale * WN_LOG2E) - base[e & 1]);
      s[j][e] = seen >> (4 * j + 2 * (e & 1) + (e >> 1)) & 1 ? p : 0;
    }
  }
}

/* dp: from dP^T to dS^T, given P^T as rounded for the products (FP32 would not fit the registers) */
template <int NT>
__device__ __forceinline__ void wn_key_gradients(float (&dp)[NT][4], const uint32_t (&p)[NT / 2][4],
                                                 const wn_row_facts *facts, int r0) {
  const int col = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int j = 0; j < NT; j++) {
    const float2 delta = *(const float2 *)&facts->delta[r0 + 8 * j + col];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t pair = p[j / 2][(j & 1) * 2 + half];
      dp[j][2 * half] = __uint_as_float(pair << 16) * (dp[j][2 * half] - delta.x);
      dp[j][2 * half + 1] = __uint_as_float(pair & 0xffff0000u) * (dp[j][2 * half + 1] - delta.y);
    }
  }
}

/* ---- any width: warp-level products ---- */

template <int DQ, int DV, bool MASKED>
__global__ void __launch_bounds__(WN_MAKERS, 1) wn_attend_rows_kernel(const __grid_constant__ wn_attend_job job) {
  extern __shared__ __align__(1024) char shared[];
  const uint32_t q = wn_shared_address(shared), d_o = q + WN_BLOCK_ROWS * DQ * 2, k = d_o + WN_BLOCK_ROWS * DV * 2,
                 v = k + WN_TILE * DQ * 2;
  const int blocks = (job.n + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS, warp_row = (int)(threadIdx.x >> 5) * 16;
  int head, block;
  wn_block_place(job, blocks, &head, &block);
  block = blocks - 1 - block;
  const int row0 = block * WN_BLOCK_ROWS + warp_row, mine = row0 + (int)(threadIdx.x & 31) / 4;
  float lse[2], delta[2], dq[DQ / 8][4];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const bool real = mine + 8 * r < job.n;
    lse[r] = real ? job.lse.data[(mine + 8 * r) * job.lse.row + head] : 0;
    delta[r] = real ? job.delta.data[(mine + 8 * r) * job.delta.row + head] : 0;
  }
  wn_clear(dq);
  wn_key_walk walk;
  int t = wn_begin_walk<MASKED>(job, block, &walk);
  if (t < walk.end) {
    wn_tile_load<WN_BLOCK_ROWS, DQ, WN_MAKERS>(q, job.q, head, block * WN_BLOCK_ROWS, job.n);
    wn_tile_load<WN_BLOCK_ROWS, DV, WN_MAKERS>(d_o, job.d_o, head, block * WN_BLOCK_ROWS, job.n);
  }
  for (; t < walk.end; t = wn_next_tile<MASKED>(job, walk, block, t + 1)) {
    wn_tile_load<WN_TILE, DQ, WN_MAKERS>(k, job.k, head, t * WN_TILE, job.m);
    wn_tile_load<WN_TILE, DV, WN_MAKERS>(v, job.v, head, t * WN_TILE, job.m);
    wn_cp_async_commit();
    const bool full = !MASKED && t >= walk.full_low && t < walk.full_end;
    uint64_t words[2] = {0, 0};
    if (!full)
#pragma unroll
      for (int r = 0; r < 2; r++) words[r] = wn_row_word<MASKED>(job, mine + 8 * r, t);
    float s[8][4], dp[8][4];
    uint32_t ds[4][4];
    wn_cp_async_wait<0>();
    __syncthreads();
    wn_clear(s);
    wn_product_shared<8, DQ / 16, WN_BLOCK_ROWS, WN_TILE>(s, q, warp_row, k, 0);
    wn_clear(dp);
    wn_product_shared<8, DV / 16, WN_BLOCK_ROWS, WN_TILE>(dp, d_o, warp_row, v, 0);
    wn_logit_gradients(s, dp, words, full, lse, delta, job.scale);
    wn_fragments<8>(ds, s);
    wn_product_registers<DQ / 8, 4, WN_TILE>(dq, ds, k, 0);
    __syncthreads(); /* this tile is done with */
  }
  wn_put_rows<false>(job.dq, row0, job.n, 0, head, dq, job.scale);
}

/* What a block of the keys kernel makes: both sums do not fit the registers. */
typedef enum wn_keys_made { WN_MAKE_DK, WN_MAKE_DV } wn_keys_made;

enum { WN_SUBTILE = 32 /* rows whose products a warp holds */ };

/* Shared memory: K, V, then Q, dO and facts of a row tile. */
template <int DQ, int DV, wn_keys_made MAKE, bool MASKED>
__global__ void __launch_bounds__(WN_MAKERS, 1) wn_attend_keys_kernel(const __grid_constant__ wn_attend_job job) {
  constexpr int NO = (MAKE == WN_MAKE_DK ? DQ : DV) / 8;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t k = wn_shared_address(shared), v = k + WN_BLOCK_ROWS * DQ * 2, q = v + WN_BLOCK_ROWS * DV * 2,
                 d_o = q + WN_TILE * DQ * 2;
  wn_row_facts *facts = (wn_row_facts *)(shared + (WN_BLOCK_ROWS + WN_TILE) * (DQ + DV) * 2);
  const int blocks = (job.m + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS, tiles = (job.n + WN_TILE - 1) / WN_TILE;
  const int warp_key = (int)(threadIdx.x >> 5) * 16;
  int head, block;
  wn_block_place(job, blocks, &head, &block); /* the first keys are seen by most rows: they go first */
  const int first = block * WN_BLOCK_ROWS + warp_key, key = first + (int)(threadIdx.x & 31) / 4;
  float made[NO][4];
  int t = wn_next_rows<MASKED>(job, 0, tiles, block);
  if (t >= tiles) return;
  wn_clear(made);
  wn_tile_load<WN_BLOCK_ROWS, DQ, WN_MAKERS>(k, job.k, head, block * WN_BLOCK_ROWS, job.m);
  wn_tile_load<WN_BLOCK_ROWS, DV, WN_MAKERS>(v, job.v, head, block * WN_BLOCK_ROWS, job.m);
  for (; t < tiles; t = wn_next_rows<MASKED>(job, t + 1, tiles, block)) {
    wn_tile_load<WN_TILE, DQ, WN_MAKERS>(q, job.q, head, t * WN_TILE, job.n);
    wn_tile_load<WN_TILE, DV, WN_MAKERS>(d_o, job.d_o, head, t * WN_TILE, job.n);
    wn_cp_async_commit();
    if (threadIdx.x < WN_TILE) wn_bring_facts<MASKED>(facts, job, head, t * WN_TILE, block, (int)threadIdx.x);
    const bool full = wn_row_tile_full<MASKED>(job, t, block);
    wn_cp_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (int r0 = 0; r0 < WN_TILE; r0 += WN_SUBTILE) {
      float s[4][4];
      uint32_t p[2][4];
      wn_clear(s);
      wn_product_shared<4, DQ / 16, WN_BLOCK_ROWS, WN_TILE>(s, k, warp_key, q, r0);
      wn_key_weights<MASKED>(s, facts, r0, key, warp_key / WN_TILE, full, job.scale);
      wn_fragments<4>(p, s);
      if constexpr (MAKE == WN_MAKE_DV) {
        wn_product_registers<NO, 2, WN_TILE>(made, p, d_o, r0);
      } else {
        wn_clear(s); /* now dP^T */
        wn_product_shared<4, DV / 16, WN_BLOCK_ROWS, WN_TILE>(s, v, warp_key, d_o, r0);
        wn_key_gradients(s, p, facts, r0);
        wn_fragments<4>(p, s);
        wn_product_registers<NO, 2, WN_TILE>(made, p, q, r0);
      }
    }
    __syncthreads(); /* this tile is done with */
  }
  wn_put_rows<true>(MAKE == WN_MAKE_DK ? job.dk : job.dv, first, job.m, 0, head, made,
                    MAKE == WN_MAKE_DK ? job.scale : 1);
}

/* ---- widths up to 192/128: the products of warpgroups ---- */

/* Shared memory of the kernels below: what the block keeps, stages of what it walks, barriers: of each stage, come and
 * done with, then of what is kept. */
template <int DQ, int DV, int FACTS> struct wn_walk_layout {
  static constexpr int kept = WN_BLOCK_ROWS * (DQ + DV) * 2, tiles = WN_TILE * (DQ + DV) * 2, stage = tiles + FACTS;
  static constexpr int stages = 3, barriers = kept + stages * stage, full = barriers, empty = full + 8 * stages;
  static constexpr int kept_full = empty + 8 * stages, bytes = kept_full + 8;
};
typedef struct wn_walk_place {
  uint32_t stage, parity;
} wn_walk_place;
__device__ __forceinline__ void wn_walk_on(wn_walk_place &at, uint32_t stages) {
  if (++at.stage == stages) at = {0, at.parity ^ 1};
}

template <typename Layout> __device__ __forceinline__ void wn_walk_barriers(uint32_t base, int arrivals) {
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < 8 * Layout::stages; i += 8) {
      wn_mbarrier_init(base + Layout::full + i, (uint32_t)arrivals);
      wn_mbarrier_init(base + Layout::empty + i, WN_MAKERS / 32);
    }
    wn_mbarrier_init(base + Layout::kept_full, 1);
    wn_mbarrier_init_fence();
  }
  __syncthreads();
}

/* The two operands of 128 rows (or keys) that a block keeps. */
template <int DQ, int DV, typename Layout>
__device__ __forceinline__ void wn_fetch_kept(uint32_t base, const CUtensorMap *a, const CUtensorMap *b, int head,
                                              int row0) {
  wn_mbarrier_expect(base + Layout::kept_full, Layout::kept);
  wn_tile_fetch<WN_BLOCK_ROWS, DQ>(base, a, head, row0, base + Layout::kept_full);
  wn_tile_fetch<WN_BLOCK_ROWS, DV>(base + WN_BLOCK_ROWS * DQ * 2, b, head, row0, base + Layout::kept_full);
}
/* The two operands of 64 rows of the next stage, when it is free. */
template <int DQ, int DV, typename Layout>
__device__ __forceinline__ void wn_fetch_stage(uint32_t base, wn_walk_place at, const CUtensorMap *a,
                                               const CUtensorMap *b, int head, int row0) {
  const uint32_t tile = base + Layout::kept + at.stage * Layout::stage, full = base + Layout::full + 8 * at.stage;
  wn_mbarrier_wait(base + Layout::empty + 8 * at.stage, at.parity ^ 1); /* passes at once the first time round */
  wn_mbarrier_expect(full, Layout::tiles);
  wn_tile_fetch<WN_TILE, DQ>(tile, a, head, row0, full);
  wn_tile_fetch<WN_TILE, DV>(tile + WN_TILE * DQ * 2, b, head, row0, full);
}

/* A warpgroup's 64 rows: the products of the next S and dP and of this dQ run while the next dS is made. */
template <int DQ, int DV, bool MASKED>
__device__ __forceinline__ void wn_rows_make(uint32_t base, const wn_attend_job &job, int head, int block) {
  typedef wn_walk_layout<DQ, DV, 0> layout;
  const int warp_row = (int)(threadIdx.x >> 5) * 16, lane = threadIdx.x & 31, group_row = warp_row / 64 * 64;
  const int row0 = block * WN_BLOCK_ROWS + warp_row, mine = row0 + lane / 4;
  const uint32_t d_o = base + WN_BLOCK_ROWS * DQ * 2;
  float lse[2], delta[2], dq[DQ / 64][8][4];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const bool real = mine + 8 * r < job.n;
    lse[r] = real ? job.lse.data[(mine + 8 * r) * job.lse.row + head] : 0;
    delta[r] = real ? job.delta.data[(mine + 8 * r) * job.delta.row + head] : 0;
  }
  wn_clear_blocks(dq);
  wn_key_walk walk;
  int t = wn_begin_walk<MASKED>(job, block, &walk);
  if (t < walk.end) {
    uint32_t ds[4][4] = {}; /* of the tile before: of the first, nothing */
    wn_walk_place at = {0, 0};
    uint32_t before = 0;
    wn_mbarrier_wait(base + layout::kept_full, 0);
    for (bool first = true; t < walk.end; first = false) {
      const uint32_t k = base + layout::kept + at.stage * layout::stage, v = k + WN_TILE * DQ * 2;
      float s[8][4], dp[8][4];
      wn_mbarrier_wait(base + layout::full + 8 * at.stage, at.parity);
      wn_wgmma_fence();
      wn_group_product<8, DQ, WN_BLOCK_ROWS>(s, base, group_row, k);
      wn_group_product<8, DV, WN_BLOCK_ROWS>(dp, d_o, group_row, v);
      wn_wgmma_commit();
      wn_group_accumulate<DQ / 64, 4>(dq, ds, base + layout::kept + before * layout::stage);
      wn_wgmma_commit();
      const bool full = !MASKED && t >= walk.full_low && t < walk.full_end;
      uint64_t words[2] = {0, 0};
      if (!full)
#pragma unroll
        for (int r = 0; r < 2; r++) words[r] = wn_row_word<MASKED>(job, mine + 8 * r, t);
      t = wn_next_tile<MASKED>(job, walk, block, t + 1);
      wn_wgmma_wait<1>();
      wn_wgmma_settle(s);
      wn_wgmma_settle(dp);
      wn_logit_gradients(s, dp, words, full, lse, delta, job.scale);
      wn_wgmma_wait<0>();
      wn_pin_blocks(dq);
      if (lane == 0 && !first) wn_mbarrier_arrive(base + layout::empty + 8 * before);
      wn_fragments<8>(ds, s);
      before = at.stage;
      wn_walk_on(at, layout::stages);
    }
    wn_wgmma_fence();
    wn_group_accumulate<DQ / 64, 4>(dq, ds, base + layout::kept + before * layout::stage);
    wn_wgmma_commit();
    wn_wgmma_wait<0>();
    wn_pin_blocks(dq);
  }
#pragma unroll
  for (int c = 0; c < DQ / 64; c++) wn_put_rows<false>(job.dq, row0, job.n, 64 * c, head, dq[c], job.scale);
}

/* Two warpgroups of 64 rows each, and one whose first thread starts the copies. */
template <int DQ, int DV, bool MASKED>
__global__ void __launch_bounds__(WN_GROUP_THREADS, 1)
    wn_attend_rows_group_kernel(const __grid_constant__ wn_attend_job job,
                                const __grid_constant__ wn_attend_maps maps) {
  typedef wn_walk_layout<DQ, DV, 0> layout;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = wn_shared_address(shared);
  const int blocks = (job.n + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS;
  int head, block;
  wn_block_place(job, blocks, &head, &block);
  block = blocks - 1 - block;
  wn_walk_barriers<layout>(base, 1);
  if (threadIdx.x >= WN_MAKERS) {
    wn_registers_shrink<24>();
    if (threadIdx.x == WN_MAKERS) {
      wn_key_walk walk;
      wn_walk_place at = {0, 0};
      int t = wn_begin_walk<MASKED>(job, block, &walk);
      if (t < walk.end) wn_fetch_kept<DQ, DV, layout>(base, &maps.q, &maps.d_o, head, block * WN_BLOCK_ROWS);
      for (; t < walk.end; t = wn_next_tile<MASKED>(job, walk, block, t + 1)) {
        wn_fetch_stage<DQ, DV, layout>(base, at, &maps.k, &maps.v, head, t * WN_TILE);
        wn_walk_on(at, layout::stages);
      }
    }
  } else {
    wn_registers_grow<240>();
    wn_rows_make<DQ, DV, MASKED>(base, job, head, block);
  }
}

/* A warpgroup's 64 keys. While one makes weights the other's products run. */
template <int DQ, int DV, bool MASKED>
__device__ __forceinline__ void wn_keys_make(char *shared, const wn_attend_job &job, int head, int block, int t,
                                             int tiles) {
  typedef wn_walk_layout<DQ, DV, sizeof(wn_row_facts)> layout;
  const uint32_t base = wn_shared_address(shared), v = base + WN_BLOCK_ROWS * DQ * 2;
  const int warp_key = (int)(threadIdx.x >> 5) * 16, lane = threadIdx.x & 31, group_key = warp_key / 64 * 64;
  const int first = block * WN_BLOCK_ROWS + warp_key;
  float dk[DQ / 64][8][4], dv[DV / 64][8][4];
  wn_clear_blocks(dk);
  wn_clear_blocks(dv);
  wn_walk_place at = {0, 0};
  wn_mbarrier_wait(base + layout::kept_full, 0);
  while (t < tiles) {
    const char *here = shared + layout::kept + at.stage * layout::stage;
    const wn_row_facts *facts = (const wn_row_facts *)(here + layout::tiles);
    const uint32_t q = wn_shared_address(here), d_o = q + WN_TILE * DQ * 2;
    float s[8][4], dp[8][4];
    uint32_t p[4][4], ds[4][4];
    wn_mbarrier_wait(base + layout::full + 8 * at.stage, at.parity);
    wn_wgmma_fence();
    wn_group_product<8, DQ, WN_BLOCK_ROWS>(s, base, group_key, q);
    wn_wgmma_commit();
    const bool full = wn_row_tile_full<MASKED>(job, t, block);
    t = wn_next_rows<MASKED>(job, t + 1, tiles, block);
    wn_wgmma_wait<0>();
    wn_wgmma_settle(s);
    wn_key_weights<MASKED>(s, facts, 0, first + lane / 4, group_key / WN_TILE, full, job.scale);
    wn_fragments<8>(p, s);
    wn_wgmma_fence();
    wn_group_product<8, DV, WN_BLOCK_ROWS>(dp, v, group_key, d_o);
    wn_wgmma_commit();
    wn_group_accumulate<DV / 64, 4>(dv, p, d_o);
    wn_wgmma_commit();
    wn_wgmma_wait<1>();
    wn_wgmma_settle(dp);
    wn_key_gradients(dp, p, facts, 0);
    wn_fragments<8>(ds, dp);
    wn_wgmma_fence();
    wn_group_accumulate<DQ / 64, 4>(dk, ds, q);
    wn_wgmma_commit();
    wn_wgmma_wait<0>();
    wn_pin_blocks(dv);
    wn_pin_blocks(dk);
    __syncwarp(); /* every lane has read the rows' facts */
    if (lane == 0) wn_mbarrier_arrive(base + layout::empty + 8 * at.stage);
    wn_walk_on(at, layout::stages);
  }
#pragma unroll
  for (int c = 0; c < DQ / 64; c++) wn_put_rows<true>(job.dk, first, job.m, 64 * c, head, dk[c], job.scale);
#pragma unroll
  for (int c = 0; c < DV / 64; c++) wn_put_rows<true>(job.dv, first, job.m, 64 * c, head, dv[c], 1);
}

/* Two warpgroups of 64 keys each; of a third, a thread starts the copies and two warps bring what is known of rows. */
template <int DQ, int DV, bool MASKED>
__global__ void __launch_bounds__(WN_GROUP_THREADS, 1)
    wn_attend_keys_group_kernel(const __grid_constant__ wn_attend_job job,
                                const __grid_constant__ wn_attend_maps maps) {
  typedef wn_walk_layout<DQ, DV, sizeof(wn_row_facts)> layout;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = wn_shared_address(shared);
  const int blocks = (job.m + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS, tiles = (job.n + WN_TILE - 1) / WN_TILE;
  int head, block;
  wn_block_place(job, blocks, &head, &block); /* the first keys are seen by most rows: they go first */
  int t = wn_next_rows<MASKED>(job, 0, tiles, block);
  if (t >= tiles) return;
  wn_walk_barriers<layout>(base, 1 + WN_TILE / 32);
  if (threadIdx.x >= WN_MAKERS) {
    wn_registers_shrink<24>();
    const int warp = (int)(threadIdx.x - WN_MAKERS) / 32;
    wn_walk_place at = {0, 0};
    if (threadIdx.x == WN_MAKERS) wn_fetch_kept<DQ, DV, layout>(base, &maps.k, &maps.v, head, block * WN_BLOCK_ROWS);
    for (; warp <= WN_TILE / 32 && t < tiles; t = wn_next_rows<MASKED>(job, t + 1, tiles, block)) {
      if (threadIdx.x == WN_MAKERS) {
        wn_fetch_stage<DQ, DV, layout>(base, at, &maps.q, &maps.d_o, head, t * WN_TILE);
      } else if (warp > 0) {
        wn_mbarrier_wait(base + layout::empty + 8 * at.stage, at.parity ^ 1);
        wn_bring_facts<MASKED>((wn_row_facts *)(shared + layout::kept + at.stage * layout::stage + layout::tiles), job,
                               head, t * WN_TILE, block, (int)threadIdx.x - WN_MAKERS - 32);
        __syncwarp(); /* the warp's stores come before the arrival of its first lane */
        if (threadIdx.x % 32 == 0) wn_mbarrier_arrive(base + layout::full + 8 * at.stage);
      }
      wn_walk_on(at, layout::stages);
    }
  } else {
    wn_registers_grow<240>();
    wn_keys_make<DQ, DV, MASKED>(shared, job, head, block, t, tiles);
  }
}

template <bool MASKED> struct wn_attend_backward_launch {
  wn_device *device;
  const wn_attend_job *job;

  template <int DQ, int DV> wn_status run() const {
    const int64_t row_blocks = wn_ceil_div(job->n, WN_BLOCK_ROWS) * job->heads;
    const int64_t key_blocks = wn_ceil_div(job->m, WN_BLOCK_ROWS) * job->heads;
    if constexpr (DV <= 128) {
      WN_TRY(wn_attend_launch_fetching(device, wn_attend_rows_group_kernel<DQ, DV, MASKED>, row_blocks,
                                       WN_GROUP_THREADS, wn_walk_layout<DQ, DV, 0>::bytes, *job, WN_BLOCK_ROWS,
                                       WN_TILE));
      WN_TRY(wn_attend_launch_fetching(device, wn_attend_keys_group_kernel<DQ, DV, MASKED>, key_blocks,
                                       WN_GROUP_THREADS, wn_walk_layout<DQ, DV, sizeof(wn_row_facts)>::bytes, *job,
                                       WN_TILE, WN_BLOCK_ROWS));
    } else {
      constexpr int bytes = (WN_BLOCK_ROWS + WN_TILE) * (DQ + DV) * 2, facts = (int)sizeof(wn_row_facts);
      WN_TRY(wn_attend_launch(device, wn_attend_rows_kernel<DQ, DV, MASKED>, row_blocks, WN_MAKERS, bytes, *job));
      WN_TRY(wn_attend_launch(device, wn_attend_keys_kernel<DQ, DV, WN_MAKE_DK, MASKED>, key_blocks, WN_MAKERS,
                              bytes + facts, *job));
      WN_TRY(wn_attend_launch(device, wn_attend_keys_kernel<DQ, DV, WN_MAKE_DV, MASKED>, key_blocks, WN_MAKERS,
                              bytes + facts, *job));
    }
    return NULL;
  }
};

#endif
