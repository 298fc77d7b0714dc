/* The last product of the per-head attention's backward, dQ = scale dS K, from dS that the keys' kernel left in scratch
 * (attention_backward.cuh). A block keeps the sums of two warpgroups' rows and walks 64 keys at a time; one warp of a
 * third warpgroup looks up which of the block's row tiles see them and starts the copies.
 *
 * An image is dS^T of 64 keys and 64 rows as BF16: a line of 128 bytes for each key, its eight 16-byte chunks exchanged
 * by the key's three low bits, so that the tensor cores read it as it lies. In a line the rows stand in the order in
 * which a lane of the keys' kernel holds them, so that it writes 16 bytes at once: chunk 4 i + c holds rows 32 i + 8 j
 * + 2 c + e at place 2 j + e. */
#ifndef WN_KERNELS_CUDA_ATTENTION_ROWS_CUH
#define WN_KERNELS_CUDA_ATTENTION_ROWS_CUH

#include "kernels/cuda/attention_tile.cuh"

enum { WN_IMAGE_BYTES = WN_TILE * WN_TILE * 2 };

/* A part of a backward: the heads of a job, all rows, blocks block .. block + blocks - 1 of 128 keys. */
typedef struct wn_attend_part {
  uint4 *images; /* [heads][blocks][row tiles][2]; those of row tiles that see nothing of a block are never written */
  const int2 *ranges; /* [blocks of the job's keys] row tiles that see a block: the first, one past the last */
  int32_t block, blocks;
  float *sum;       /* [heads, n, DQ]: dQ / scale of the parts before; not used by a part that is first and last */
  bool first, last; /* of the parts with these heads */
} wn_attend_part;

/* The image of 64 keys, the first (which = 0) or the second half of `block`, and the rows of a tile. */
__device__ __forceinline__ uint4 *wn_ds_image(const wn_attend_part &part, int tiles, int head, int block, int tile,
                                              int which) {
  const int64_t place = ((int64_t)head * part.blocks + (block - part.block)) * tiles + tile;
  return part.images + (2 * place + which) * (WN_IMAGE_BYTES / 16);
}

/* A warp's dS^T of 16 keys from `key` on and 16 KS rows from 32 `part` on, as rounded by wn_fragments. */
template <int KS>
__device__ __forceinline__ void wn_ds_put(uint4 *image, int key, int part, const uint32_t (&ds)[KS][4]) {
  const int lane = threadIdx.x & 31, line = key + (lane >> 2);
#pragma unroll
  for (int i = 0; i < KS / 2; i++)
#pragma unroll
    for (int r = 0; r < 2; r++)
      image[(line + 8 * r) * 8 + ((4 * (part + i) + (lane & 3)) ^ (line & 7))] =
          make_uint4(ds[2 * i][r], ds[2 * i][2 + r], ds[2 * i + 1][r], ds[2 * i + 1][2 + r]);
}

/* TILES: row tiles of a warpgroup. Shared memory: stages of K and the block's images, an image of zeros for row tiles
 * that do not see the keys, barriers, which images a stage has as bits (-1: the walk is over). */
template <int DQ> struct wn_rows_layout {
  static constexpr int TILES = DQ <= 192 ? 2 : 1, keys = WN_TILE * DQ * 2, stages = 3;
  static constexpr int stage = keys + 2 * TILES * WN_IMAGE_BYTES, zeros = stages * stage;
  static constexpr int full = zeros + WN_IMAGE_BYTES, empty = full + 8 * stages;
  static constexpr int seen = empty + 8 * stages, bytes = seen + 4 * stages;
};

/* The warp that starts copies, for row tiles tile0 ..; all lanes. */
template <int DQ, bool MASKED>
__device__ __forceinline__ void wn_rows_fetch(char *shared, const wn_attend_job &job, const wn_attend_maps &maps,
                                              const wn_attend_part &part, int head, int tile0) {
  typedef wn_rows_layout<DQ> layout;
  const uint32_t base = wn_shared_address(shared);
  const int lane = threadIdx.x & 31, tiles = (job.n + WN_TILE - 1) / WN_TILE, tile = tile0 + lane;
  const bool mine = lane < 2 * layout::TILES && tile < tiles;
  int key = 2 * part.block, end = min(2 * (part.block + part.blocks), (job.m + WN_TILE - 1) / WN_TILE);
  int low = INT32_MAX, high = -1;
  if (!MASKED) {
    if (mine) low = job.bounds[tile].lowest_first, high = job.bounds[tile].highest_last;
    key = max(key, (int)__reduce_min_sync(~0u, low) / WN_TILE);
    end = min(end, ((int)__reduce_max_sync(~0u, high) + WN_TILE) / WN_TILE);
  }
  wn_walk_place at = {0, 0};
  for (; key < end; key++) {
    bool sees = mine;
    if (MASKED)
      sees = sees && job.active[(int64_t)tile * job.active_pitch + (key >> 5)] >> (key & 31) & 1;
    else
      sees = low < (key + 1) * WN_TILE && high >= key * WN_TILE;
    const uint32_t seen = __ballot_sync(~0u, sees);
    if (seen == 0) continue;
    if (lane == 0) {
      const uint32_t to = base + at.stage * layout::stage, full = base + layout::full + 8 * at.stage;
      wn_mbarrier_wait(base + layout::empty + 8 * at.stage, at.parity ^ 1); /* passes at once the first time round */
      ((int32_t *)(shared + layout::seen))[at.stage] = (int32_t)seen;
      wn_mbarrier_expect(full, (uint32_t)(layout::keys + __popc(seen) * WN_IMAGE_BYTES));
      wn_tile_fetch<WN_TILE, DQ>(to, &maps.k, head, key * WN_TILE, full);
      for (int i = 0; i < 2 * layout::TILES; i++)
        if (seen >> i & 1)
          wn_copy_bytes(to + layout::keys + i * WN_IMAGE_BYTES,
                        wn_ds_image(part, tiles, head, key >> 1, tile0 + i, key & 1), WN_IMAGE_BYTES, full);
    }
    wn_walk_on(at, layout::stages);
  }
  if (lane == 0) {
    wn_mbarrier_wait(base + layout::empty + 8 * at.stage, at.parity ^ 1);
    ((int32_t *)(shared + layout::seen))[at.stage] = -1;
    wn_mbarrier_arrive(base + layout::full + 8 * at.stage);
  }
}

/* acc[64, DQ] += dS[64 rows, 64 keys] K[64 keys, DQ], under way until wn_wgmma_wait */
template <int NT> __device__ __forceinline__ void wn_rows_product(float (&acc)[NT][4], uint32_t image, uint32_t keys) {
  const uint64_t left = wn_wgmma_operand(image), right = wn_wgmma_operand(keys, WN_TILE * 128);
#pragma unroll
  for (int ks = 0; ks < WN_TILE / 16; ks++)
    wn_wgmma<WN_ACROSS, WN_ACROSS>(acc, left + (uint64_t)(ks * 2048 >> 4), right + (uint64_t)(ks * 2048 >> 4), true);
}

/* The row of a tile whose sums stand in a lane's r-th line. */
__device__ __forceinline__ int wn_ds_row(int r) {
  const int warp = threadIdx.x >> 5 & 3, lane = threadIdx.x & 31;
  return 32 * (warp >> 1) + 8 * (lane >> 3) + 2 * ((2 * warp + r) & 3) + (lane >> 2 & 1);
}

/* Sums, with what the parts before left, to the next ones or as the result. */
template <int NT>
__device__ __forceinline__ void wn_rows_put(float (&acc)[NT][4], const wn_attend_job &job, const wn_attend_part &part,
                                            int head, int row0) {
  const int col = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = row0 + wn_ds_row(r);
    float *sum = part.sum + ((int64_t)head * job.n + row) * (8 * NT) + col;
    if (row >= job.n) continue;
    if (!part.first) { /* a row's are read before any is written, or each would wait for memory */
#pragma unroll
      for (int j = 0; j < NT; j++) {
        const float2 before = *(const float2 *)(sum + 8 * j);
        acc[j][2 * r] += before.x;
        acc[j][2 * r + 1] += before.y;
      }
    }
#pragma unroll
    for (int j = 0; j < NT; j++) {
      const float a = acc[j][2 * r], b = acc[j][2 * r + 1];
      if (part.last)
        wn_put_pair<false>(job.dq, row, head, 8 * j + col, a, b, job.scale);
      else
        *(float2 *)(sum + 8 * j) = make_float2(a, b);
    }
  }
}

/* A warpgroup's rows. */
template <int DQ>
__device__ __forceinline__ void wn_rows_make(const char *shared, const wn_attend_job &job, const wn_attend_part &part,
                                             int head, int tile0) {
  typedef wn_rows_layout<DQ> layout;
  const uint32_t base = wn_shared_address(shared);
  const int group = wn_uniform((int)threadIdx.x / 128), lane = threadIdx.x & 31;
  float dq[layout::TILES][DQ / 8][4];
#pragma unroll
  for (int i = 0; i < layout::TILES; i++) wn_clear(dq[i]);
  for (wn_walk_place at = {0, 0};; wn_walk_on(at, layout::stages)) {
    const uint32_t keys = base + at.stage * layout::stage, images = keys + layout::keys;
    wn_mbarrier_wait(base + layout::full + 8 * at.stage, at.parity);
    /* read by the lane alone that arrives below, before which nothing else orders the other lanes' reads */
    const int seen = wn_uniform(lane == 0 ? ((const int32_t *)(shared + layout::seen))[at.stage] : 0);
    if (seen < 0) break;
    wn_wgmma_fence();
#pragma unroll
    for (int i = 0; i < layout::TILES; i++) {
      const int tile = layout::TILES * group + i; /* without a branch, in which products would wait for each other */
      wn_rows_product(dq[i], seen >> tile & 1 ? images + tile * WN_IMAGE_BYTES : base + layout::zeros, keys);
    }
    wn_wgmma_commit();
    wn_wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < layout::TILES; i++) wn_wgmma_settle(dq[i]);
    if (lane == 0) wn_mbarrier_arrive(base + layout::empty + 8 * at.stage);
  }
#pragma unroll
  for (int i = 0; i < layout::TILES; i++)
    wn_rows_put(dq[i], job, part, head, (tile0 + layout::TILES * group + i) * WN_TILE);
}

template <int DQ, bool MASKED>
__global__ void __launch_bounds__(WN_GROUP_THREADS, 1)
    wn_attend_rows_kernel(const __grid_constant__ wn_attend_job job, const __grid_constant__ wn_attend_maps maps,
                          const __grid_constant__ wn_attend_part part) {
  typedef wn_rows_layout<DQ> layout;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = wn_shared_address(shared);
  const int rows = 2 * layout::TILES * WN_TILE, blocks = (job.n + rows - 1) / rows;
  int head, block;
  wn_block_place_last_first(job, blockIdx.x, blocks, &head, &block);
  const int tile0 = block * 2 * layout::TILES;
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < 8 * layout::stages; i += 8) {
      wn_mbarrier_init(base + layout::full + i, 1);
      wn_mbarrier_init(base + layout::empty + i, WN_MAKERS / 32);
    }
    wn_mbarrier_init_fence();
  }
  for (int i = threadIdx.x; i < WN_IMAGE_BYTES / 16; i += WN_GROUP_THREADS)
    ((uint4 *)(shared + layout::zeros))[i] = make_uint4(0, 0, 0, 0);
  wn_publish_shared();
  __syncthreads();
  if (threadIdx.x >= WN_MAKERS) {
    wn_registers_shrink<24>();
    if (threadIdx.x < WN_MAKERS + 32) wn_rows_fetch<DQ, MASKED>(shared, job, maps, part, head, tile0);
  } else {
    wn_registers_grow<240>();
    wn_rows_make<DQ>(shared, job, part, head, tile0);
  }
}

template <int DQ, bool MASKED>
static inline wn_status wn_rows_launch(wn_device *device, const wn_attend_job &job, const wn_attend_part &part) {
  typedef wn_rows_layout<DQ> layout;
  wn_attend_maps maps;
  WN_TRY(wn_attend_describe(&maps, &job, WN_TILE, WN_TILE));
  return wn_attend_launch(device, wn_attend_rows_kernel<DQ, MASKED>,
                          wn_ceil_div(job.n, 2 * layout::TILES * WN_TILE) * job.heads, WN_GROUP_THREADS, layout::bytes,
                          job, maps, part);
}

#endif
