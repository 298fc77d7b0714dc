/* Backward of the per-head attention, without a sum that two blocks share. P is made again from the saved log-sum-exp,
 * S = scale Q K^T, dP = dO V^T, dS = P (dP - delta).
 * - keys: a block keeps 128 keys of a head and walks row tiles, its products transposed so that P^T and dS^T are
 *   already the left operands of dV += P^T dO and dK += scale dS^T Q; dS^T goes to scratch as well. Where both sums do
 *   not fit the registers (widths of 256) it runs once for each.
 * - rows: a block keeps 128 or 256 rows of a head and walks key tiles: dQ = scale dS K, one product of what lies in
 *   scratch (attention_rows.cuh). Making dS again would be two products more.
 * So that scratch grows with T and no faster, both take a part at a time: some heads, or some keys of one head.
 *
 * P and dS are rounded to BF16 for the products; sums are FP32 and are added to dK, dV once. */
#ifndef WN_KERNELS_CUDA_ATTENTION_BACKWARD_CUH
#define WN_KERNELS_CUDA_ATTENTION_BACKWARD_CUH

#include "kernels/cuda/attention_rows.cuh"

/* ---- what both forms share ---- */

/* What the keys kernel knows of 64 rows, beside Q and dO. */
typedef struct wn_row_facts {
  float base[WN_TILE], delta[WN_TILE];   /* log-sum-exp to base 2 */
  int32_t first[WN_TILE], last[WN_TILE]; /* dense */
  uint64_t words[2][WN_TILE];            /* masked: of the block's two key tiles */
} wn_row_facts;

/* Of row r of the tile; rows past the end see nothing. */
template <bool MASKED>
__device__ __forceinline__ void wn_bring_facts(wn_row_facts *to, const wn_attend_job &job, int head, int row0,
                                               int key_block, int r) {
  const int row = row0 + r;
  const bool real = row < job.n;
  to->base[r] = real ? job.lse.data[row * job.lse.row + head] * WN_LOG2E : 0;
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

/* ranges[block] = its first active row tile, one past the last; 0, 0: none. A warp a block. Looking for them tile by
 * tile, as every thread of the kernels below would have to, takes longer than making them where few rows see a key. */
template <bool MASKED>
__global__ void __launch_bounds__(32) wn_attend_ranges_kernel(const __grid_constant__ wn_attend_job job, int2 *ranges) {
  const int block = blockIdx.x, tiles = (job.n + WN_TILE - 1) / WN_TILE;
  int first = INT32_MAX, end = 0;
  for (int tile = threadIdx.x; tile < tiles; tile += 32)
    if (wn_row_tile_active<MASKED>(job, tile, block)) first = min(first, tile), end = tile + 1;
  first = __reduce_min_sync(~0u, first);
  end = __reduce_max_sync(~0u, end);
  if (threadIdx.x == 0) ranges[block] = make_int2(end > 0 ? first : 0, end);
}

/* The next active row tile of a range from `tile` on, or its end. */
template <bool MASKED>
__device__ __forceinline__ int wn_next_rows(const wn_attend_job &job, int tile, int end, int block) {
  while (tile < end && !wn_row_tile_active<MASKED>(job, tile, block)) tile++;
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
#pragma unroll
  for (int j = 0; j < NT; j++) {
    const float2 base = *(const float2 *)&facts->base[r0 + 8 * j + col];
#pragma unroll
    for (int e = 0; e < 4; e++) s[j][e] = wn_exp2(s[j][e] * (scale * WN_LOG2E) - (e & 1 ? base.y : base.x));
  }
  if (full) return;
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int seen = wn_keys_seen<MASKED>(facts, r0 + 8 * j + col + e, key, tile);
      if (!(seen & 1)) s[j][e] = 0;
      if (!(seen & 2)) s[j][2 + e] = 0;
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

/* A warp's sums are added to its 16 keys of dK or dV in the place of its rows of K or V, once these are done with:
 * brought, then (after wn_lines_come) added and put back. */
template <int BLOCKS>
__device__ __forceinline__ void wn_bring_keys(const wn_view<wn_bf16> &y, int key, int keys, int head, char *tile) {
  if (!wn_view_vectors(y)) return;
#pragma unroll
  for (int c = 0; c < BLOCKS; c++) wn_bring_lines(y, key, keys, 64 * c, head, tile + c * WN_BLOCK_ROWS * 128);
}
template <int BLOCKS>
__device__ __forceinline__ void wn_add_keys(const wn_view<wn_bf16> &y, int key, int keys, int head,
                                            float (&sums)[BLOCKS][8][4], float factor, char *tile) {
  const bool lines = wn_view_vectors(y);
#pragma unroll
  for (int c = 0; c < BLOCKS; c++) {
    char *here = tile + c * WN_BLOCK_ROWS * 128;
    if (!lines) {
      wn_put_rows<true>(y, key, keys, 64 * c, head, sums[c], factor);
      continue;
    }
    wn_add_lines(sums[c], factor, here);
    __syncwarp();
    wn_put_lines(y, key, keys, 64 * c, head, sums[c], here);
  }
}

/* ---- any width: warp-level products ---- */

/* What a block of the keys kernel makes: both sums do not fit the registers. */
typedef enum wn_keys_made { WN_MAKE_DK, WN_MAKE_DV } wn_keys_made;

enum { WN_SUBTILE = 32 /* rows whose products a warp holds */ };

/* Shared memory: K, V, then Q, dO and facts of a row tile. */
template <int DQ, int DV, wn_keys_made MAKE, bool MASKED>
__global__ void __launch_bounds__(WN_MAKERS, 1)
    wn_attend_keys_kernel(const __grid_constant__ wn_attend_job job, const __grid_constant__ wn_attend_part part) {
  constexpr int NO = (MAKE == WN_MAKE_DK ? DQ : DV) / 8;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t k = wn_shared_address(shared), v = k + WN_BLOCK_ROWS * DQ * 2, q = v + WN_BLOCK_ROWS * DV * 2,
                 d_o = q + WN_TILE * DQ * 2;
  wn_row_facts *facts = (wn_row_facts *)(shared + (WN_BLOCK_ROWS + WN_TILE) * (DQ + DV) * 2);
  const int tiles = (job.n + WN_TILE - 1) / WN_TILE, warp_key = (int)(threadIdx.x >> 5) * 16;
  int head, block;
  wn_block_place(job, blockIdx.x, part.blocks, &head, &block); /* the first keys are seen by most rows: they go first */
  block += part.block;
  const int first = block * WN_BLOCK_ROWS + warp_key, key = first + (int)(threadIdx.x & 31) / 4;
  float made[NO][4];
  const int2 range = part.ranges[block];
  if (range.y == 0) return;
  wn_clear(made);
  wn_tile_load<WN_BLOCK_ROWS, DQ, WN_MAKERS>(k, job.k, head, block * WN_BLOCK_ROWS, job.m);
  wn_tile_load<WN_BLOCK_ROWS, DV, WN_MAKERS>(v, job.v, head, block * WN_BLOCK_ROWS, job.m);
  for (int t = range.x; t < range.y; t = wn_next_rows<MASKED>(job, t + 1, range.y, block)) {
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
        wn_ds_put(wn_ds_image(part, tiles, head, block, t, warp_key / WN_TILE), warp_key % WN_TILE, r0 / 32, p);
      }
    }
    __syncthreads(); /* this tile is done with */
  }
  const wn_view<wn_bf16> &to = MAKE == WN_MAKE_DK ? job.dk : job.dv;
  char *tile = shared + (MAKE == WN_MAKE_DK ? 0 : WN_BLOCK_ROWS * DQ * 2) + warp_key * 128;
  wn_bring_keys<NO / 8>(to, first, job.m, head, tile);
  wn_lines_come();
  wn_add_keys(to, first, job.m, head, *(float(*)[NO / 8][8][4]) made, MAKE == WN_MAKE_DK ? job.scale : 1, tile);
}

/* ---- widths up to 192/128: the products of warpgroups ---- */

/* Shared memory of the kernels below: what the block keeps, stages of what it walks, barriers: of each stage, come and
 * done with, then of what is kept. */
template <int DQ, int DV, int FACTS> struct wn_walk_layout {
  static constexpr int kept = WN_BLOCK_ROWS * (DQ + DV) * 2, tiles = WN_TILE * (DQ + DV) * 2, stage = tiles + FACTS;
  static constexpr int stages = 3, barriers = kept + stages * stage, full = barriers, empty = full + 8 * stages;
  static constexpr int kept_full = empty + 8 * stages, bytes = kept_full + 8;
};

/* Arrivals that end the filling of a stage, and the use of it. */
template <typename Layout> __device__ __forceinline__ void wn_walk_barriers(uint32_t base, int filled, int used) {
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < 8 * Layout::stages; i += 8) {
      wn_mbarrier_init(base + Layout::full + i, (uint32_t)filled);
      wn_mbarrier_init(base + Layout::empty + i, (uint32_t)used);
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

/* A warpgroup's 64 keys. While one makes weights the other's products run. */
template <int DQ, int DV, bool MASKED>
__device__ __forceinline__ void wn_keys_make(char *shared, const wn_attend_job &job, const wn_attend_part &part,
                                             int head, int block, int t, int end) {
  typedef wn_walk_layout<DQ, DV, sizeof(wn_row_facts)> layout;
  const uint32_t base = wn_shared_address(shared), v = base + WN_BLOCK_ROWS * DQ * 2;
  const int warp_key = (int)(threadIdx.x >> 5) * 16, lane = threadIdx.x & 31, group_key = warp_key / 64 * 64;
  const int first = block * WN_BLOCK_ROWS + warp_key, tiles = (job.n + WN_TILE - 1) / WN_TILE;
  float dk[DQ / 64][8][4], dv[DV / 64][8][4];
  wn_clear_blocks(dk);
  wn_clear_blocks(dv);
  wn_walk_place at = {0, 0};
  wn_mbarrier_wait(base + layout::kept_full, 0);
  while (t < end) {
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
    uint4 *image = wn_ds_image(part, tiles, head, block, t, group_key / WN_TILE);
    t = wn_next_rows<MASKED>(job, t + 1, end, block);
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
    wn_ds_put(image, warp_key % WN_TILE, 0, ds);
    wn_wgmma_fence();
    wn_group_accumulate<DQ / 64, 4>(dk, ds, q);
    wn_wgmma_commit();
    wn_wgmma_wait<0>();
    wn_pin_blocks(dv);
    wn_pin_blocks(dk);
    wn_mbarrier_arrive(base + layout::empty + 8 * at.stage);
    wn_walk_on(at, layout::stages);
  }
  char *keys = shared + warp_key * 128, *values = keys + WN_BLOCK_ROWS * DQ * 2;
  wn_named_sync(1 + wn_uniform((int)threadIdx.x / 128), 128); /* all four warps' products have read K and V */
  wn_bring_keys<DQ / 64>(job.dk, first, job.m, head, keys);
  wn_bring_keys<DV / 64>(job.dv, first, job.m, head, values);
  wn_lines_come();
  wn_add_keys(job.dk, first, job.m, head, dk, job.scale, keys);
  wn_add_keys(job.dv, first, job.m, head, dv, 1, values);
}

/* Two warpgroups of 64 keys each; of a third, a thread starts the copies and two warps bring what is known of rows. */
template <int DQ, int DV, bool MASKED>
__global__ void __launch_bounds__(WN_GROUP_THREADS, 1)
    wn_attend_keys_group_kernel(const __grid_constant__ wn_attend_job job, const __grid_constant__ wn_attend_maps maps,
                                const __grid_constant__ wn_attend_part part) {
  typedef wn_walk_layout<DQ, DV, sizeof(wn_row_facts)> layout;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = wn_shared_address(shared);
  int head, block;
  wn_block_place(job, blockIdx.x, part.blocks, &head, &block); /* the first keys are seen by most rows: they go first */
  block += part.block;
  const int2 range = part.ranges[block];
  int t = range.x;
  if (range.y == 0) return;
  wn_walk_barriers<layout>(base, 1 + WN_TILE, WN_MAKERS); /* every thread that writes or reads facts */
  if (threadIdx.x >= WN_MAKERS) {
    wn_registers_shrink<24>();
    const int warp = (int)(threadIdx.x - WN_MAKERS) / 32;
    wn_walk_place at = {0, 0};
    if (threadIdx.x == WN_MAKERS) wn_fetch_kept<DQ, DV, layout>(base, &maps.k, &maps.v, head, block * WN_BLOCK_ROWS);
    for (; warp <= WN_TILE / 32 && t < range.y; t = wn_next_rows<MASKED>(job, t + 1, range.y, block)) {
      if (threadIdx.x == WN_MAKERS) {
        wn_fetch_stage<DQ, DV, layout>(base, at, &maps.q, &maps.d_o, head, t * WN_TILE);
      } else if (warp > 0) {
        wn_mbarrier_wait(base + layout::empty + 8 * at.stage, at.parity ^ 1);
        wn_bring_facts<MASKED>((wn_row_facts *)(shared + layout::kept + at.stage * layout::stage + layout::tiles), job,
                               head, t * WN_TILE, block, (int)threadIdx.x - WN_MAKERS - 32);
        wn_mbarrier_arrive(base + layout::full + 8 * at.stage);
      }
      wn_walk_on(at, layout::stages);
    }
  } else {
    wn_registers_grow<240>();
    wn_keys_make<DQ, DV, MASKED>(shared, job, part, head, block, t, range.y);
  }
}

/* Heads and blocks of 128 keys that a part takes: four gigabytes of dS, or where that is too few for the GPU, two
 * blocks for each multiprocessor. Either whole heads, or a range of one head's keys. */
typedef struct wn_part_size {
  int64_t heads, blocks;
} wn_part_size;

static inline wn_part_size wn_part_of(wn_device *device, const wn_attend_job *job) {
  const int64_t tiles = wn_ceil_div(job->n, WN_TILE), blocks = wn_ceil_div(job->m, WN_BLOCK_ROWS);
  const int64_t rounds = 2 * wn_cuda_of(device)->n_sms, fits = ((int64_t)4 << 30) / (tiles * 2 * WN_IMAGE_BYTES);
  const int64_t most = fits > rounds ? fits : rounds;
  if (blocks > most) return {1, wn_ceil_div(blocks, wn_ceil_div(blocks, most))};
  const int64_t heads = blocks > 0 && most / blocks < job->heads ? most / blocks : job->heads;
  return {wn_ceil_div(job->heads, wn_ceil_div(job->heads, heads)), blocks};
}

/* sum: room for [heads, n, DQ] where keys come in several runs; else NULL. first, last: whether this run is */
template <bool MASKED> struct wn_attend_backward_launch {
  wn_device *device;
  const wn_attend_job *job;
  float *sum;
  bool first, last;

  template <int DQ, int DV> wn_status keys(const wn_attend_job &some, const wn_attend_part &part) const {
    const int64_t blocks = (int64_t)some.heads * part.blocks;
    if (blocks == 0) return NULL;
    if constexpr (DV <= 128) {
      wn_attend_maps maps;
      WN_TRY(wn_attend_describe(&maps, &some, WN_TILE, WN_BLOCK_ROWS));
      return wn_attend_launch(device, wn_attend_keys_group_kernel<DQ, DV, MASKED>, blocks, WN_GROUP_THREADS,
                              wn_walk_layout<DQ, DV, sizeof(wn_row_facts)>::bytes, some, maps, part);
    } else {
      constexpr int bytes = (WN_BLOCK_ROWS + WN_TILE) * (DQ + DV) * 2 + (int)sizeof(wn_row_facts);
      WN_TRY(wn_attend_launch(device, wn_attend_keys_kernel<DQ, DV, WN_MAKE_DK, MASKED>, blocks, WN_MAKERS, bytes, some,
                              part));
      return wn_attend_launch(device, wn_attend_keys_kernel<DQ, DV, WN_MAKE_DV, MASKED>, blocks, WN_MAKERS, bytes, some,
                              part);
    }
  }

  template <int DQ, int DV> wn_status run() const {
    const size_t mark = wn_arena_mark(device->scratch);
    const int64_t tiles = wn_ceil_div(job->n, WN_TILE), blocks = wn_ceil_div(job->m, WN_BLOCK_ROWS);
    const wn_part_size size = wn_part_of(device, job);
    void *images, *ranges, *sums = NULL;
    WN_TRY(wn_cuda_scratch(device, &images, "logit gradients", size.heads * size.blocks * tiles * 2 * WN_IMAGE_BYTES));
    WN_TRY(wn_cuda_scratch(device, &ranges, "row tiles that see keys", blocks * (int64_t)sizeof(int2)));
    WN_TRY(wn_attend_launch(device, wn_attend_ranges_kernel<MASKED>, blocks, 32, 0, *job, (int2 *)ranges));
    if (!sum && size.blocks < blocks)
      WN_TRY(wn_cuda_scratch(device, &sums, "query gradients", job->n * (int64_t)(DQ * sizeof(float))));
    for (int64_t head = 0; head < job->heads; head += size.heads) {
      const int64_t heads = job->heads - head < size.heads ? job->heads - head : size.heads;
      const wn_attend_job some = wn_take_heads(job, (int32_t)head, (int32_t)heads);
      int64_t at = 0;
      do {
        const int64_t taken = blocks - at < size.blocks ? blocks - at : size.blocks;
        const wn_attend_part part = {.images = (uint4 *)images,
                                     .ranges = (const int2 *)ranges,
                                     .block = (int32_t)at,
                                     .blocks = (int32_t)taken,
                                     .sum = sum ? sum + head * job->n * DQ : (float *)sums,
                                     .first = first && at == 0,
                                     .last = last && at + taken == blocks};
        at += taken;
        WN_TRY((keys<DQ, DV>(some, part)));
        WN_TRY((wn_rows_launch<DQ, MASKED>(device, some, part)));
      } while (at < blocks);
    }
    wn_arena_release(device->scratch, mark);
    return NULL;
  }
};

#endif
