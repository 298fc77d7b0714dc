/* Tiles of products of BF16 rows, d[i,j] = sum over x of a_i[x] b_j[x] in FP32: 128 x 128 of them by a block of 256
 * threads on mma.sync, any width, any strides. What the selections have in common.
 *
 * Both operands pass through shared memory in pieces of 64 columns, two pieces under way; a row of a piece is 128
 * bytes, its 16-byte chunks permuted by the row's number so that ldmatrix meets no bank twice. Rows and columns that do
 * not exist are zeros. */
#ifndef WN_KERNELS_CUDA_DOT_TILE_CUH
#define WN_KERNELS_CUDA_DOT_TILE_CUH

#include "kernels/cuda/ptx/mma.cuh"
#include "kernels/cuda/support.cuh"

enum {
  WN_DOT_TILE = 128,
  WN_DOT_THREADS = 256,
  WN_DOT_PIECE = 64,                                   /* columns under way at a time */
  WN_DOT_PIECE_BYTES = WN_DOT_TILE * WN_DOT_PIECE * 2, /* of one operand */
  WN_DOT_SHARED_BYTES = 4 * WN_DOT_PIECE_BYTES         /* two pieces of two operands; 128-byte aligned */
};

/* Vector i of the operand is data[(i >> shift) * row + (i & (2^shift - 1)) * head]: shift 0 for plain rows, else
 * 2^shift places for the heads of a row, of which `heads` exist. */
typedef struct wn_dot_rows {
  const wn_bf16 *data;
  int64_t row, head; /* strides, elements */
  int32_t n, heads, shift, width;
  bool vectors; /* 16-byte accesses are fine */
} wn_dot_rows;

/* Rows of one head. */
static inline wn_dot_rows wn_dot_rows_of(const wn_view<wn_bf16> &v, int64_t from, int64_t n) {
  return wn_dot_rows{v.data + from * v.row, v.row, v.head, (int32_t)n, 1, 0, v.width, wn_view_vectors(v)};
}

__device__ __forceinline__ uint32_t wn_dot_chunk(int32_t row, int32_t chunk) {
  return (uint32_t)(row * WN_DOT_PIECE * 2 + ((chunk ^ (row & 7)) << 4));
}

/* Columns x0 .. x0 + 63 of vectors i0 .. i0 + 127 to shared memory. */
__device__ __forceinline__ void wn_dot_load(uint32_t shared, const wn_dot_rows &rows, int64_t i0, int32_t x0) {
  const int32_t chunk = (int32_t)threadIdx.x % 8, x = x0 + chunk * 8;
#pragma unroll
  for (int32_t r = (int32_t)threadIdx.x / 8; r < WN_DOT_TILE; r += WN_DOT_THREADS / 8) {
    const int64_t i = i0 + r, row = i >> rows.shift;
    const int32_t head = (int32_t)(i & ((1 << rows.shift) - 1));
    const int32_t left = row < rows.n && head < rows.heads ? rows.width - x : 0; /* elements there are */
    const wn_bf16 *from = rows.data + (left > 0 ? row * rows.row + head * rows.head + x : 0);
    const uint32_t to = shared + wn_dot_chunk(r, chunk);
    if (rows.vectors) {
      wn_cp_async_16(to, from, left > 0 ? 16 : 0); /* the width is a multiple of 8 */
    } else {
      uint32_t pair[4];
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const float lo = 2 * p < left ? __bfloat162float(from[2 * p]) : 0.0f;
        const float hi = 2 * p + 1 < left ? __bfloat162float(from[2 * p + 1]) : 0.0f;
        pair[p] = wn_pack_bf16(lo, hi);
      }
      wn_store_shared_16(to, make_uint4(pair[0], pair[1], pair[2], pair[3]));
    }
  }
}

/* Warp w holds rows 32 (w % 4) .. + 31 and columns 64 (w / 4) .. + 63: acc[i][j] is the 16 x 8 tile of rows 16 i,
 * columns 8 j of those, in the layout of wn_mma_bf16. */
__device__ __forceinline__ void wn_dot_piece(float acc[2][8][4], uint32_t a, uint32_t b) {
  const int32_t lane = (int32_t)threadIdx.x % 32, warp = (int32_t)threadIdx.x / 32;
  const int32_t row = warp % 4 * 32 + (lane & 15), column = warp / 4 * 64 + (lane & 7) + (lane >> 4) * 8;
#pragma unroll
  for (int32_t step = 0; step < WN_DOT_PIECE / 16; step++) {
    uint32_t x[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++) wn_ldmatrix_x4(x[i], a + wn_dot_chunk(row + 16 * i, step * 2 + (lane >> 4)));
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32_t y[4];
      wn_ldmatrix_x4(y, b + wn_dot_chunk(column + 8 * j, step * 2 + (lane >> 3 & 1)));
#pragma unroll
      for (int i = 0; i < 2; i++) {
        wn_mma_bf16(acc[i][j], x[i], y);
        wn_mma_bf16(acc[i][j + 1], x[i], y + 2);
      }
    }
  }
}

/* acc = products of vectors a0 .. and b0 ..; `shared` holds WN_DOT_SHARED_BYTES and is free again afterwards. */
__device__ __forceinline__ void wn_dot_tile(float acc[2][8][4], uint32_t shared, const wn_dot_rows &a, int64_t a0,
                                            const wn_dot_rows &b, int64_t b0) {
#pragma unroll
  for (int i = 0; i < 2 * 8 * 4; i++) acc[i / 32][i / 4 % 8][i % 4] = 0.0f;
  const int32_t pieces = (a.width + WN_DOT_PIECE - 1) / WN_DOT_PIECE;
  for (int32_t p = -1; p < pieces; p++) {
    if (p + 1 < pieces) {
      const uint32_t to = shared + (uint32_t)((p + 1) % 2 * 2 * WN_DOT_PIECE_BYTES);
      wn_dot_load(to, a, a0, (p + 1) * WN_DOT_PIECE);
      wn_dot_load(to + WN_DOT_PIECE_BYTES, b, b0, (p + 1) * WN_DOT_PIECE);
    }
    wn_cp_async_commit();
    if (p < 0) continue;
    wn_cp_async_wait<1>();
    __syncthreads();
    const uint32_t at = shared + (uint32_t)(p % 2 * 2 * WN_DOT_PIECE_BYTES);
    wn_dot_piece(acc, at, at + WN_DOT_PIECE_BYTES);
    __syncthreads();
  }
}

/* Which products a thread's acc holds: those of row i of 4 and column e of 16, counted from `first`. */
__device__ __forceinline__ int32_t wn_dot_own_row(int32_t first, int i) {
  return first + (int32_t)(threadIdx.x / 32 % 4) * 32 + i * 8 + (int32_t)(threadIdx.x % 32) / 4;
}
__device__ __forceinline__ int32_t wn_dot_own_column(int32_t first, int e) {
  return first + (int32_t)(threadIdx.x / 128) * 64 + e / 2 * 8 + (int32_t)(threadIdx.x % 4) * 2 + e % 2;
}
/* Its place in acc. */
#define WN_DOT_OWN(acc, i, e) ((acc)[(i) / 2][(e) / 2][(i) % 2 * 2 + (e) % 2])

#endif
