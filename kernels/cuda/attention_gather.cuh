/* What the two directions of absorbed sparse attention share: tiles in shared memory, the gather of picked rows, and
 * how eight warps divide a product of heads with 64 keys.
 *
 * A tile is [rows][columns] of BF16 in panels of 64 columns. Within a panel a row takes 128 bytes, and its eight
 * 16-byte pieces are permuted by the row's last three bits, so that eight rows of one piece lie in all 32 banks. Rows
 * and columns that do not exist are zeros. */
#ifndef WN_KERNELS_CUDA_ATTENTION_GATHER_CUH
#define WN_KERNELS_CUDA_ATTENTION_GATHER_CUH

#include "kernels/cuda/ptx/mma.cuh"
#include "kernels/cuda/ptx/warpgroup.cuh"
#include "kernels/cuda/support.cuh"

enum {
  WN_SPARSE_THREADS = 256,
  WN_SPARSE_WARPS = 8,
  WN_SPARSE_KEYS = 64, /* picks in a tile */
  WN_PANEL_COLUMNS = 64,
  WN_PANEL_ROW_BYTES = 128,
  WN_PIECE_COLUMNS = 8, /* 16 bytes */
  /* of the kernels for 512 + 64 columns and many heads */
  WN_WIDE_HEADS = 64,
  WN_WIDE_VALUES = 512,
  WN_WIDE_WIDTH = 576,
  WN_WIDE_PANEL_BYTES = 64 * WN_PANEL_ROW_BYTES /* of 64 heads or 64 keys */
};

/* How eight warps divide [16 MT heads][64 keys]: warp w makes the heads of m-tiles from MI * wm and the keys of n-tiles
 * from NI * wn; the warps w and w + 4 of one such block share the work on it (side = w / 4). */
template <int MT> struct wn_split {
  static constexpr int WM = MT >= 2 ? 2 : 1, WN = 4 / WM;
  static constexpr int MI = MT / WM, NI = WN_SPARSE_KEYS / 8 / WN, OWN = NI / 2;
  static constexpr int HEADS = 16 * MT, BLOCK_BYTES = MI * 16 * NI * 16; /* of one block in BF16 */
};

__host__ __device__ static inline int wn_tile_bytes(int rows, int columns) {
  return (columns + WN_PANEL_COLUMNS - 1) / WN_PANEL_COLUMNS * rows * WN_PANEL_ROW_BYTES;
}

/* Bytes from the tile's begin to a piece. */
__device__ __forceinline__ uint32_t wn_tile_at(int rows, int row, int piece) {
  return (uint32_t)(((piece >> 3) * rows + row) * WN_PANEL_ROW_BYTES + (((piece ^ row) & 7) << 4));
}

/* A matrix [heads][64 keys] of BF16 as the blocks of wn_split, each [its heads][its keys] on its own, so that the pair
 * of warps that made a block may use its bytes meanwhile: bytes to the 8 keys `piece` of the block's key range. */
template <int MT> __device__ __forceinline__ uint32_t wn_block_at(int head, int wn, int piece) {
  typedef wn_split<MT> S;
  const int swizzle = (head / (8 / S::NI)) & (S::NI - 1);
  return (uint32_t)((wn * S::HEADS + head) * (S::NI * 16) + ((piece ^ swizzle) << 4));
}

/* One row into a tile by eight threads (`eighth` 0 .. 7): `width` elements of `from` (NULL: zeros), zeros up to column
 * 8 `pieces`. aligned: from is a multiple of 16 bytes; `valid` is a row that may be named. */
__device__ __forceinline__ void wn_load_row(uint32_t tile, int rows, int row, const wn_bf16 *from, int width,
                                            int pieces, int eighth, bool aligned, const wn_bf16 *valid) {
  const uint32_t at = tile + wn_tile_at(rows, row, eighth), panel_bytes = (uint32_t)(rows * WN_PANEL_ROW_BYTES);
  if (aligned) {
    const wn_bf16 *source = (from ? from : valid) + eighth * WN_PIECE_COLUMNS;
    const int whole = width / WN_PANEL_COLUMNS;
#pragma unroll 3
    for (int panel = 0; panel < whole; panel++)
      wn_cp_async_16(at + panel * panel_bytes, source + panel * WN_PANEL_COLUMNS, from ? 16 : 0);
    if (whole * 8 + eighth >= pieces) return;
    const int left = from ? width - (whole * 8 + eighth) * WN_PIECE_COLUMNS : 0, bytes = left >= 8 ? 16 : 2 * left;
    wn_cp_async_16(at + whole * panel_bytes, bytes > 0 ? source + whole * WN_PANEL_COLUMNS : valid,
                   bytes > 0 ? (uint32_t)bytes : 0);
    return;
  }
  for (int piece = eighth; piece < pieces; piece += 8) {
    const int left = from ? width - piece * WN_PIECE_COLUMNS : 0;
    __align__(16) uint16_t x[8];
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] = e < left ? ((const uint16_t *)from)[piece * WN_PIECE_COLUMNS + e] : 0;
    wn_store_shared_16(at + (piece >> 3) * panel_bytes, *(const uint4 *)x);
  }
}

/* Rows of heads from .. from + HEADS - 1 of query i; heads that do not exist are zeros. */
template <int HEADS>
__device__ __forceinline__ void wn_load_heads(uint32_t tile, const wn_view<wn_bf16> &x, int64_t i, int from,
                                              bool aligned) {
  const int pieces = (x.width + 15) / 16 * 2;
  for (int row = threadIdx.x >> 3; row < HEADS; row += WN_SPARSE_THREADS / 8) {
    const int h = from + row;
    const wn_bf16 *source = h < x.heads ? x.data + i * x.row + h * x.head : NULL;
    wn_load_row(tile, HEADS, row, source, x.width, pieces, threadIdx.x & 7, aligned, x.data);
  }
}

/* The keys of this thread's two rows of tile `t`: its rows are threadIdx.x / 8 and that plus 32. -1 past `count`. */
__device__ __forceinline__ void wn_read_picks(int32_t key[2], const int32_t *pick, int t, int count) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int j = t * WN_SPARSE_KEYS + (threadIdx.x >> 3) + 32 * r;
    key[r] = j < count ? pick[j] : -1;
  }
}

__device__ __forceinline__ void wn_gather(uint32_t tile, const wn_view<wn_bf16> &kv, const int32_t key[2],
                                          bool aligned) {
  const int pieces = (kv.width + 15) / 16 * 2;
#pragma unroll
  for (int r = 0; r < 2; r++)
    wn_load_row(tile, WN_SPARSE_KEYS, (threadIdx.x >> 3) + 32 * r, key[r] >= 0 ? kv.data + key[r] * kv.row : NULL,
                kv.width, pieces, threadIdx.x & 7, aligned, kv.data);
}

/* How many of pick[k] there are (-1 stands at the end only). `shared` is a word of shared memory that holds 0. Ends
 * with a barrier. */
__device__ __forceinline__ int wn_count_picks(int *shared, const int32_t *pick, int k) {
  int n = 0;
  for (int j = threadIdx.x; j < k; j += blockDim.x) n += pick[j] >= 0;
  n = __reduce_add_sync(0xffffffffu, n);
  if ((threadIdx.x & 31) == 0 && n) atomicAdd(shared, n);
  __syncthreads();
  return *shared;
}

/* acc[MI][NI][4] += a[heads][k] b[keys][k]^T over k16-steps from .. to - 1: m-tiles from MI * wm, n-tiles from NI * wn.
 */
template <int MT>
__device__ __forceinline__ void wn_multiply_keys(float acc[wn_split<MT>::MI][wn_split<MT>::NI][4], uint32_t a,
                                                 uint32_t b, int wm, int wn, int from, int to) {
  typedef wn_split<MT> S;
  const int lane = threadIdx.x & 31, r = lane & 7;
  const uint32_t a_row = a + (uint32_t)(wm * S::MI * 16 + (lane & 15)) * WN_PANEL_ROW_BYTES;
  const uint32_t b_row = b + (uint32_t)(wn * S::NI * 8 + (lane >> 4) * 8 + r) * WN_PANEL_ROW_BYTES;
  const uint32_t a_piece = (uint32_t)((lane >> 4) ^ r) << 4, b_piece = (uint32_t)(((lane >> 3) & 1) ^ r) << 4;
#pragma unroll 2
  for (int step = from; step < to; step++) {
    const uint32_t panel = (uint32_t)(step >> 2) * WN_PANEL_ROW_BYTES, within = (uint32_t)(step & 3) << 5;
    const uint32_t a_at = a_row + panel * S::HEADS + (a_piece ^ within);
    const uint32_t b_at = b_row + panel * WN_SPARSE_KEYS + (b_piece ^ within);
    uint32_t fa[S::MI][4], fb[S::NI / 2][4];
#pragma unroll
    for (int mi = 0; mi < S::MI; mi++) wn_ldmatrix_x4(fa[mi], a_at + mi * 16 * WN_PANEL_ROW_BYTES);
#pragma unroll
    for (int ni = 0; ni < S::NI / 2; ni++) wn_ldmatrix_x4(fb[ni], b_at + ni * 16 * WN_PANEL_ROW_BYTES);
#pragma unroll
    for (int mi = 0; mi < S::MI; mi++)
#pragma unroll
      for (int ni = 0; ni < S::NI; ni++) wn_mma_bf16(acc[mi][ni], fa[mi], &fb[ni / 2][ni % 2 * 2]);
  }
}

/* acc[MT][NT][4] += p[heads][64 keys] v[64 keys][columns from 8 NT * warp], p in blocks, only n-tiles that begin below
 * `columns`. */
template <int MT, int NT>
__device__ __forceinline__ void wn_multiply_columns(float acc[MT][NT][4], uint32_t p, uint32_t v, int warp,
                                                    int columns) {
  typedef wn_split<MT> S;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int step = 0; step < WN_SPARSE_KEYS / 16; step++) {
    const int wn = step * 2 / S::NI, piece = step * 2 % S::NI + (lane >> 4);
    uint32_t fp[MT][4];
#pragma unroll
    for (int mi = 0; mi < MT; mi++) wn_ldmatrix_x4(fp[mi], p + wn_block_at<MT>(mi * 16 + (lane & 15), wn, piece));
#pragma unroll
    for (int ni = 0; ni < NT; ni += 2) {
      uint32_t fv[4];
      if ((warp * NT + ni) * 8 >= columns) continue;
      const bool two = ni + 1 < NT && (warp * NT + ni + 1) * 8 < columns;
      const int row = step * 16 + (lane & 15);
      if (two)
        wn_ldmatrix_x4_trans(fv, v + wn_tile_at(WN_SPARSE_KEYS, row, warp * NT + ni + (lane >> 4)));
      else
        wn_ldmatrix_x2_trans(fv, v + wn_tile_at(WN_SPARSE_KEYS, row, warp * NT + ni));
#pragma unroll
      for (int mi = 0; mi < MT; mi++) {
        wn_mma_bf16(acc[mi][ni], fp[mi], fv);
        if (ni + 1 < NT && two) wn_mma_bf16(acc[mi][ni + 1], fp[mi], fv + 2);
      }
    }
  }
}

/* Two neighbouring outputs of one head as BF16, where they exist. */
__device__ __forceinline__ void wn_store_pair(wn_bf16 *row, int column, int width, float x, float y, bool aligned) {
  if (aligned && column + 1 < width) {
    *(uint32_t *)(row + column) = wn_pack_bf16(x, y);
    return;
  }
  if (column < width) row[column] = __float2bfloat16_rn(x);
  if (column + 1 < width) row[column + 1] = __float2bfloat16_rn(y);
}

/* Two neighbours of one head as FP32; both exist. */
typedef struct wn_two {
  float x, y;
} wn_two;

__device__ __forceinline__ wn_two wn_load_pair(const wn_bf16 *row, int column, bool aligned) {
  if (!aligned) return (wn_two){__bfloat162float(row[column]), __bfloat162float(row[column + 1])};
  const uint32_t both = *(const uint32_t *)(row + column);
  return (wn_two){__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}

/* Rows that cp.async may read; pairs that one 4-byte store may write. */
static inline bool wn_gather_aligned(const wn_view<wn_bf16> &v) {
  return wn_view_aligned(v, 16);
}
static inline bool wn_pairs_aligned(const wn_view<wn_bf16> &v) {
  return wn_view_aligned(v, 4);
}

#endif
