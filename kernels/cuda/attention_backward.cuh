/* Backward of the per-head attention, in two kernels without a shared sum. P is made again from the saved log-sum-exp,
 * S = scale Q K^T, dP = dO V^T, dS = P (dP - delta).
 * - rows: a block keeps 128 rows of a head and walks key tiles: dQ = scale dS K.
 * - keys: a block keeps 128 keys of a head and walks row tiles, its products transposed so that P^T and dS^T are
 * already the left operands of dV += P^T dO and dK += scale dS^T Q. Where both sums do not fit the registers (widths of
 * 256) it runs once for each. P and dS are rounded to BF16 for the products; sums are FP32 and are added to dK, dV
 * once. */
#ifndef WN_KERNELS_CUDA_ATTENTION_BACKWARD_CUH
#define WN_KERNELS_CUDA_ATTENTION_BACKWARD_CUH

#include "kernels/cuda/attention_tile.cuh"

enum { WN_BACKWARD_THREADS = 256, WN_SUBTILE = 32 /* rows whose products a warp of the keys kernel holds */ };

/* ---- rows ---- */

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

template <int DQ, int DV, int STAGES, bool MASKED>
__global__ void __launch_bounds__(WN_BACKWARD_THREADS, 1)
    wn_attend_rows_kernel(const __grid_constant__ wn_attend_job job) {
  constexpr int THREADS = WN_BACKWARD_THREADS, STAGE = WN_TILE * (DQ + DV) * 2;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t q = wn_shared_address(shared), d_o = q + WN_BLOCK_ROWS * DQ * 2, stages = d_o + WN_BLOCK_ROWS * DV * 2;
  const int blocks = (job.n + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS, warp_row = (int)(threadIdx.x >> 5) * 16;
  int head, block;
  wn_block_place(job, blocks, &head, &block);
  block = blocks - 1 - block;
  const int row0 = block * WN_BLOCK_ROWS + warp_row, mine = row0 + (int)(threadIdx.x & 31) / 4;
  float lse[2], delta[2], dq[1][DQ / 8][4];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const bool real = mine + 8 * r < job.n;
    lse[r] = real ? job.lse.data[(mine + 8 * r) * job.lse.row + head] : 0;
    delta[r] = real ? job.delta.data[(mine + 8 * r) * job.delta.row + head] : 0;
  }
  wn_clear(dq);
  wn_key_walk walk;
  int t = wn_begin_walk<MASKED>(job, block, &walk), stage = 0;
  auto load = [&](int tile, int to) {
    if (tile < walk.end) {
      wn_tile_load<WN_TILE, DQ, THREADS>(stages + to * STAGE, job.k, head, tile * WN_TILE, job.m);
      wn_tile_load<WN_TILE, DV, THREADS>(stages + to * STAGE + WN_TILE * DQ * 2, job.v, head, tile * WN_TILE, job.m);
    }
    wn_cp_async_commit();
  };
  if (t < walk.end) {
    wn_tile_load<WN_BLOCK_ROWS, DQ, THREADS>(q, job.q, head, block * WN_BLOCK_ROWS, job.n);
    wn_tile_load<WN_BLOCK_ROWS, DV, THREADS>(d_o, job.d_o, head, block * WN_BLOCK_ROWS, job.n);
    load(t, 0);
  }
  for (int next; t < walk.end; t = next) {
    const uint32_t k = stages + stage * STAGE, v = k + WN_TILE * DQ * 2;
    next = wn_next_tile<MASKED>(job, walk, block, t + 1);
    if (STAGES == 2) {
      stage ^= 1;
      load(next, stage);
    }
    wn_cp_async_wait<STAGES - 1>();
    __syncthreads();
    const bool full = !MASKED && t >= walk.full_low && t < walk.full_end;
    uint64_t words[2] = {0, 0};
    if (!full)
#pragma unroll
      for (int r = 0; r < 2; r++) words[r] = wn_row_word<MASKED>(job, mine + 8 * r, t);
    float s[1][8][4], dp[1][8][4];
    wn_clear(s);
    wn_product_shared<1, 8, DQ / 16, WN_BLOCK_ROWS, WN_TILE>(s, q, warp_row, k, 0);
    wn_clear(dp);
    wn_product_shared<1, 8, DV / 16, WN_BLOCK_ROWS, WN_TILE>(dp, d_o, warp_row, v, 0);
    wn_logit_gradients(s[0], dp[0], words, full, lse, delta, job.scale);
    uint32_t ds[1][4][4];
    wn_fragments<8>(ds[0], s[0]);
    wn_product_registers<1, DQ / 8, 4, WN_TILE>(dq, ds, k, 0);
    __syncthreads(); /* the stage is done with */
    if (STAGES == 1) load(next, 0);
  }
  wn_put_rows<false>(job.dq, row0, job.n, 0, head, dq[0], job.scale);
}

/* ---- keys ---- */

/* What the keys kernel knows of 64 rows, beside Q and dO. */
typedef struct wn_row_facts {
  float lse[WN_TILE], delta[WN_TILE];
  int32_t first[WN_TILE], last[WN_TILE]; /* dense */
  uint64_t words[2][WN_TILE];            /* masked: of the block's two key tiles */
} wn_row_facts;

template <bool MASKED>
__device__ __forceinline__ void wn_load_facts(wn_row_facts *to, const wn_attend_job &job, int head, int row0,
                                              int key_block) {
  const int i = threadIdx.x, r = i % WN_TILE, row = min(row0 + r, job.n - 1);
  const bool real = row0 + r < job.n;
  if (i < WN_TILE) {
    wn_cp_async_4(wn_shared_address(&to->lse[r]), job.lse.data + row * job.lse.row + head, real);
    if (!MASKED) wn_cp_async_4(wn_shared_address(&to->first[r]), job.first + row, real);
  } else if (i < 2 * WN_TILE) {
    wn_cp_async_4(wn_shared_address(&to->delta[r]), job.delta.data + row * job.delta.row + head, real);
    if (!MASKED) wn_cp_async_4(wn_shared_address(&to->last[r]), job.last + row, real);
  } else if (MASKED) {
    const int w = i / WN_TILE - 2;
    const bool there = (2 * key_block + w) * WN_TILE < job.m;
    wn_cp_async_8(wn_shared_address(&to->words[w][r]),
                  there ? job.words + (2 * key_block + w) * job.word_pitch + row : job.words, real && there);
  }
}

/* Bits 0, 1: keys `key`, `key` + 8 of the tile's row r. Rows past the end see none. */
template <bool MASKED>
__device__ __forceinline__ int wn_keys_seen(const wn_row_facts *facts, int r, int rows_left, int key, int tile) {
  if (MASKED) {
    const uint64_t word = facts->words[tile][r] >> (key & (WN_TILE - 1));
    return (int)(word & 1) | (int)(word >> 7 & 2);
  }
  const int first = facts->first[r], last = facts->last[r];
  if (r >= rows_left) return 0;
  return (first <= key && key <= last) | (first <= key + 8 && key + 8 <= last) << 1;
}

/* A row tile that the block of 128 keys has to look at. */
template <bool MASKED>
__device__ __forceinline__ bool wn_row_tile_active(const wn_attend_job &job, int tile, int block) {
  if (MASKED) return job.active[(int64_t)tile * job.active_pitch + (block >> 4)] >> (2 * block & 31) & 3;
  const wn_tile_bounds b = job.bounds[tile];
  return b.lowest_first < (block + 1) * WN_BLOCK_ROWS && b.highest_last >= block * WN_BLOCK_ROWS;
}

/* The first active row tile from `tile` on; *full when every one of its rows sees all the block's keys. */
template <bool MASKED>
__device__ __forceinline__ int wn_next_rows(const wn_attend_job &job, int tile, int tiles, int block) {
  while (tile < tiles && !wn_row_tile_active<MASKED>(job, tile, block)) tile++;
  return tile;
}

/* s: from products to P^T of a warp's [16 keys, 8 NT rows]; 0 where the row does not see the key. */
template <bool MASKED, int NT>
__device__ __forceinline__ void wn_key_weights(float (&s)[NT][4], const wn_row_facts *facts, int r0, int rows_left,
                                               int key, int tile, bool full, float scale) {
  const int col = (threadIdx.x & 3) * 2;
  uint32_t seen = ~0u; /* two bits for each of the lane's rows */
  if (!full) {
    seen = 0;
#pragma unroll
    for (int i = 0; i < 2 * NT; i++)
      seen |= (uint32_t)wn_keys_seen<MASKED>(facts, r0 + 8 * (i >> 1) + col + (i & 1), rows_left, key, tile) << 2 * i;
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

/* dp: from dP^T to dS^T, given P^T */
template <int NT>
__device__ __forceinline__ void wn_key_gradients(float (&dp)[NT][4], const float (&p)[NT][4], const wn_row_facts *facts,
                                                 int r0) {
  const int col = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int j = 0; j < NT; j++) {
    const float2 delta = *(const float2 *)&facts->delta[r0 + 8 * j + col];
#pragma unroll
    for (int e = 0; e < 4; e++) dp[j][e] = p[j][e] * (dp[j][e] - (e & 1 ? delta.y : delta.x));
  }
}

/* What a block of the keys kernel makes. */
enum { WN_MAKE_DK = 1, WN_MAKE_DV = 2 };

/* Shared memory of the keys kernel: K, V, then stages of Q, dO and facts. */
template <int DQ, int DV> struct wn_keys_layout {
  static constexpr int kept = WN_BLOCK_ROWS * (DQ + DV) * 2, tiles = WN_TILE * (DQ + DV) * 2;
  static constexpr int stage = tiles + (int)sizeof(wn_row_facts);
  static constexpr int stages = kept + 2 * stage <= 227 * 1024 ? 2 : 1;
  static constexpr int bytes = kept + stages * stage;
};

template <int DQ, int DV, int MAKE, bool MASKED>
__global__ void __launch_bounds__(WN_BACKWARD_THREADS, 1)
    wn_attend_keys_kernel(const __grid_constant__ wn_attend_job job) {
  typedef wn_keys_layout<DQ, DV> layout;
  constexpr int THREADS = WN_BACKWARD_THREADS;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t k = wn_shared_address(shared), v = k + WN_BLOCK_ROWS * DQ * 2;
  const int blocks = (job.m + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS, tiles = (job.n + WN_TILE - 1) / WN_TILE;
  const int warp_key = (int)(threadIdx.x >> 5) * 16;
  int head, block, stage = 0;
  wn_block_place(job, blocks, &head, &block); /* the first keys are seen by most rows: they go first */
  const int key = block * WN_BLOCK_ROWS + warp_key + (int)(threadIdx.x & 31) / 4;
  float dk[1][MAKE & WN_MAKE_DK ? DQ / 8 : 1][4], dv[1][MAKE & WN_MAKE_DV ? DV / 8 : 1][4];
  wn_clear(dk);
  wn_clear(dv);
  auto load = [&](int tile, int to) {
    if (tile < tiles) {
      const uint32_t q = k + layout::kept + to * layout::stage;
      wn_tile_load<WN_TILE, DQ, THREADS>(q, job.q, head, tile * WN_TILE, job.n);
      wn_tile_load<WN_TILE, DV, THREADS>(q + WN_TILE * DQ * 2, job.d_o, head, tile * WN_TILE, job.n);
      wn_load_facts<MASKED>((wn_row_facts *)(shared + layout::kept + to * layout::stage + layout::tiles), job, head,
                            tile * WN_TILE, block);
    }
    wn_cp_async_commit();
  };
  int t = wn_next_rows<MASKED>(job, 0, tiles, block);
  if (t >= tiles) return;
  wn_tile_load<WN_BLOCK_ROWS, DQ, THREADS>(k, job.k, head, block * WN_BLOCK_ROWS, job.m);
  wn_tile_load<WN_BLOCK_ROWS, DV, THREADS>(v, job.v, head, block * WN_BLOCK_ROWS, job.m);
  load(t, 0);
  for (int next; t < tiles; t = next) {
    const char *here = shared + layout::kept + stage * layout::stage;
    const wn_row_facts *facts = (const wn_row_facts *)(here + layout::tiles);
    const uint32_t q = wn_shared_address(here), d_o = q + WN_TILE * DQ * 2;
    next = wn_next_rows<MASKED>(job, t + 1, tiles, block);
    if (layout::stages == 2) {
      stage ^= 1;
      load(next, stage);
    }
    wn_cp_async_wait<layout::stages - 1>();
    __syncthreads();
    const bool full = !MASKED && job.bounds[t].highest_first <= block * WN_BLOCK_ROWS &&
                      job.bounds[t].lowest_last >= (block + 1) * WN_BLOCK_ROWS - 1;
#pragma unroll 1
    for (int r0 = 0; r0 < WN_TILE; r0 += WN_SUBTILE) {
      float s[1][4][4], dp[1][4][4];
      uint32_t left[1][2][4];
      wn_clear(s);
      wn_product_shared<1, 4, DQ / 16, WN_BLOCK_ROWS, WN_TILE>(s, k, warp_key, q, r0);
      wn_key_weights<MASKED>(s[0], facts, r0, job.n - t * WN_TILE, key, warp_key / WN_TILE, full, job.scale);
      if constexpr ((MAKE & WN_MAKE_DV) != 0) {
        wn_fragments<4>(left[0], s[0]);
        wn_product_registers<1, DV / 8, 2, WN_TILE>(dv, left, d_o, r0);
      }
      if constexpr ((MAKE & WN_MAKE_DK) != 0) {
        wn_clear(dp);
        wn_product_shared<1, 4, DV / 16, WN_BLOCK_ROWS, WN_TILE>(dp, v, warp_key, d_o, r0);
        wn_key_gradients(dp[0], s[0], facts, r0);
        wn_fragments<4>(left[0], dp[0]);
        wn_product_registers<1, DQ / 8, 2, WN_TILE>(dk, left, q, r0);
      }
    }
    __syncthreads(); /* the stage is done with */
    if (layout::stages == 1) load(next, 0);
  }
  const int first = block * WN_BLOCK_ROWS + warp_key;
  if constexpr ((MAKE & WN_MAKE_DK) != 0) wn_put_rows<true>(job.dk, first, job.m, 0, head, dk[0], job.scale);
  if constexpr ((MAKE & WN_MAKE_DV) != 0) wn_put_rows<true>(job.dv, first, job.m, 0, head, dv[0], 1);
}

/* ---- widths up to 192/128: the products of warpgroups ---- */

/* Two warpgroups of 64 rows each. The products of the next S and dP and of this dQ run while the next dS is made; three
 * stages of keys and values. */
template <int DQ, int DV, bool MASKED>
__global__ void __launch_bounds__(WN_BACKWARD_THREADS, 1)
    wn_attend_rows_group_kernel(const __grid_constant__ wn_attend_job job) {
  constexpr int THREADS = WN_BACKWARD_THREADS, STAGE = WN_TILE * (DQ + DV) * 2, STAGES = 3;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t q = wn_shared_address(shared), d_o = q + WN_BLOCK_ROWS * DQ * 2, stages = d_o + WN_BLOCK_ROWS * DV * 2;
  const int blocks = (job.n + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS, warp_row = (int)(threadIdx.x >> 5) * 16;
  const int group_row = warp_row / 64 * 64;
  int head, block, stage = 0;
  wn_block_place(job, blocks, &head, &block);
  block = blocks - 1 - block;
  const int row0 = block * WN_BLOCK_ROWS + warp_row, mine = row0 + (int)(threadIdx.x & 31) / 4;
  float lse[2], delta[2], dq[DQ / 64][8][4];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const bool real = mine + 8 * r < job.n;
    lse[r] = real ? job.lse.data[(mine + 8 * r) * job.lse.row + head] : 0;
    delta[r] = real ? job.delta.data[(mine + 8 * r) * job.delta.row + head] : 0;
  }
  wn_clear(dq);
  wn_key_walk walk;
  int t = wn_begin_walk<MASKED>(job, block, &walk);
  auto load = [&](int tile, int to) {
    if (tile < walk.end) {
      wn_tile_load<WN_TILE, DQ, THREADS>(stages + to * STAGE, job.k, head, tile * WN_TILE, job.m);
      wn_tile_load<WN_TILE, DV, THREADS>(stages + to * STAGE + WN_TILE * DQ * 2, job.v, head, tile * WN_TILE, job.m);
    }
    wn_cp_async_commit();
  };
  if (t < walk.end) {
    uint32_t ds[4][4] = {}; /* of the tile before: of the first, nothing */
    wn_tile_load<WN_BLOCK_ROWS, DQ, THREADS>(q, job.q, head, block * WN_BLOCK_ROWS, job.n);
    wn_tile_load<WN_BLOCK_ROWS, DV, THREADS>(d_o, job.d_o, head, block * WN_BLOCK_ROWS, job.n);
    load(t, 0);
    for (int before = 0; t < walk.end;) {
      const uint32_t k = stages + stage * STAGE, v = k + WN_TILE * DQ * 2;
      const int next = wn_next_tile<MASKED>(job, walk, block, t + 1), after = stage + 1 == STAGES ? 0 : stage + 1;
      float s[8][4], dp[8][4];
      wn_cp_async_wait<0>();
      wn_fence_shared_for_products();
      __syncthreads(); /* tile t has come; the one two tiles before is done with */
      load(next, after);
      wn_wgmma_begin();
      wn_group_product<8, DQ, WN_BLOCK_ROWS>(s, q, group_row, k);
      wn_group_product<8, DV, WN_BLOCK_ROWS>(dp, d_o, group_row, v);
      wn_wgmma_commit();
      wn_group_accumulate<DQ / 64, 4>(dq, ds, stages + before * STAGE);
      wn_wgmma_commit();
      const bool full = !MASKED && t >= walk.full_low && t < walk.full_end;
      uint64_t words[2] = {0, 0};
      if (!full)
#pragma unroll
        for (int r = 0; r < 2; r++) words[r] = wn_row_word<MASKED>(job, mine + 8 * r, t);
      wn_wgmma_wait<1>();
      wn_pin(s);
      wn_pin(dp);
      wn_logit_gradients(s, dp, words, full, lse, delta, job.scale);
      wn_wgmma_wait<0>();
      wn_pin_blocks(dq);
      wn_fragments<8>(ds, s);
      before = stage;
      stage = after;
      t = next;
    }
    wn_wgmma_begin();
    wn_group_accumulate<DQ / 64, 4>(dq, ds, stages + (stage == 0 ? STAGES - 1 : stage - 1) * STAGE);
    wn_wgmma_commit();
    wn_wgmma_wait<0>();
    wn_pin_blocks(dq);
  }
#pragma unroll
  for (int c = 0; c < DQ / 64; c++) wn_put_rows<false>(job.dq, row0, job.n, 64 * c, head, dq[c], job.scale);
}

/* Two warpgroups of 64 keys each; two stages of rows. */
template <int DQ, int DV, bool MASKED>
__global__ void __launch_bounds__(WN_BACKWARD_THREADS, 1)
    wn_attend_keys_group_kernel(const __grid_constant__ wn_attend_job job) {
  typedef wn_keys_layout<DQ, DV> layout;
  constexpr int THREADS = WN_BACKWARD_THREADS;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t k = wn_shared_address(shared), v = k + WN_BLOCK_ROWS * DQ * 2;
  const int blocks = (job.m + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS, tiles = (job.n + WN_TILE - 1) / WN_TILE;
  const int warp_key = (int)(threadIdx.x >> 5) * 16, group_key = warp_key / 64 * 64;
  int head, block, stage = 0;
  wn_block_place(job, blocks, &head, &block); /* the first keys are seen by most rows: they go first */
  const int key = block * WN_BLOCK_ROWS + warp_key + (int)(threadIdx.x & 31) / 4;
  float dk[DQ / 64][8][4], dv[DV / 64][8][4];
  wn_clear(dk);
  wn_clear(dv);
  auto load = [&](int tile, int to) {
    if (tile < tiles) {
      const uint32_t q = k + layout::kept + to * layout::stage;
      wn_tile_load<WN_TILE, DQ, THREADS>(q, job.q, head, tile * WN_TILE, job.n);
      wn_tile_load<WN_TILE, DV, THREADS>(q + WN_TILE * DQ * 2, job.d_o, head, tile * WN_TILE, job.n);
      wn_load_facts<MASKED>((wn_row_facts *)(shared + layout::kept + to * layout::stage + layout::tiles), job, head,
                            tile * WN_TILE, block);
    }
    wn_cp_async_commit();
  };
  int t = wn_next_rows<MASKED>(job, 0, tiles, block);
  if (t >= tiles) return;
  wn_tile_load<WN_BLOCK_ROWS, DQ, THREADS>(k, job.k, head, block * WN_BLOCK_ROWS, job.m);
  wn_tile_load<WN_BLOCK_ROWS, DV, THREADS>(v, job.v, head, block * WN_BLOCK_ROWS, job.m);
  load(t, 0);
  for (int next; t < tiles; t = next, stage ^= 1) {
    const char *here = shared + layout::kept + stage * layout::stage;
    const wn_row_facts *facts = (const wn_row_facts *)(here + layout::tiles);
    const uint32_t q = wn_shared_address(here), d_o = q + WN_TILE * DQ * 2;
    float s[8][4], dp[8][4];
    uint32_t p[4][4], ds[4][4];
    wn_cp_async_wait<0>();
    wn_fence_shared_for_products();
    __syncthreads(); /* this stage has come, the other is done with */
    wn_wgmma_begin();
    wn_group_product<8, DQ, WN_BLOCK_ROWS>(s, k, group_key, q);
    wn_wgmma_commit();
    wn_group_product<8, DV, WN_BLOCK_ROWS>(dp, v, group_key, d_o);
    wn_wgmma_commit();
    next = wn_next_rows<MASKED>(job, t + 1, tiles, block);
    load(next, stage ^ 1);
    const bool full = !MASKED && job.bounds[t].highest_first <= block * WN_BLOCK_ROWS &&
                      job.bounds[t].lowest_last >= (block + 1) * WN_BLOCK_ROWS - 1;
    wn_wgmma_wait<1>();
    wn_pin(s);
    wn_key_weights<MASKED>(s, facts, 0, job.n - t * WN_TILE, key, group_key / WN_TILE, full, job.scale);
    wn_fragments<8>(p, s);
    wn_wgmma_wait<0>();
    wn_pin(dp);
    wn_key_gradients(dp, s, facts, 0);
    wn_fragments<8>(ds, dp);
    wn_wgmma_begin();
    wn_group_accumulate<DV / 64, 4>(dv, p, d_o);
    wn_group_accumulate<DQ / 64, 4>(dk, ds, q);
    wn_wgmma_commit();
    wn_wgmma_wait<0>();
    wn_pin_blocks(dv);
    wn_pin_blocks(dk);
  }
  const int first = block * WN_BLOCK_ROWS + warp_key;
#pragma unroll
  for (int c = 0; c < DQ / 64; c++) wn_put_rows<true>(job.dk, first, job.m, 64 * c, head, dk[c], job.scale);
#pragma unroll
  for (int c = 0; c < DV / 64; c++) wn_put_rows<true>(job.dv, first, job.m, 64 * c, head, dv[c], 1);
}

template <bool MASKED> struct wn_attend_backward_launch {
  wn_device *device;
  const wn_attend_job *job;

  template <typename Kernel> wn_status rows(Kernel kernel, int bytes) const {
    return wn_attend_launch(device, kernel, wn_ceil_div(job->n, WN_BLOCK_ROWS) * job->heads, WN_BACKWARD_THREADS, bytes,
                            *job);
  }
  template <typename Kernel> wn_status keys(Kernel kernel, int bytes) const {
    return wn_attend_launch(device, kernel, wn_ceil_div(job->m, WN_BLOCK_ROWS) * job->heads, WN_BACKWARD_THREADS, bytes,
                            *job);
  }
  template <int DQ, int DV> wn_status run() const {
    constexpr int kept = WN_BLOCK_ROWS * (DQ + DV) * 2, stage = WN_TILE * (DQ + DV) * 2;
    constexpr int keys_bytes = wn_keys_layout<DQ, DV>::bytes;
    if constexpr (DV <= 128) {
      WN_TRY(rows(wn_attend_rows_group_kernel<DQ, DV, MASKED>, kept + 3 * stage));
      WN_TRY(keys(wn_attend_keys_group_kernel<DQ, DV, MASKED>, keys_bytes));
    } else {
      WN_TRY(rows(wn_attend_rows_kernel<DQ, DV, 1, MASKED>, kept + stage));
      WN_TRY(keys(wn_attend_keys_kernel<DQ, DV, WN_MAKE_DK, MASKED>, keys_bytes));
      WN_TRY(keys(wn_attend_keys_kernel<DQ, DV, WN_MAKE_DV, MASKED>, keys_bytes));
    }
    return NULL;
  }
};

#endif
