/* What the two halves of the sparse KL share: a chunk of rows and its scratch, and rows in shared memory. */
#ifndef WN_KERNELS_CUDA_INDEXER_KL_SPARSE_CUH
#define WN_KERNELS_CUDA_INDEXER_KL_SPARSE_CUH

#include "kernels/cuda/ptx/mma.cuh"
#include "kernels/cuda/support.cuh"

enum {
  WN_SPARSE_KL_WARPS = 4,   /* of a block */
  WN_SPARSE_KL_HEADS = 64,  /* of a group */
  WN_SPARSE_KL_WIDTH = 128, /* of heads and keys; narrower ones are padded with zeros */
  WN_SPARSE_KL_TILE = 16,   /* keys */
  WN_SPARSE_KL_ROW_BYTES = WN_SPARSE_KL_WIDTH * 2,
  WN_SPARSE_KL_Q_BYTES = WN_SPARSE_KL_HEADS * WN_SPARSE_KL_ROW_BYTES,
  WN_SPARSE_KL_PIECE_BYTES = 64 * 128, /* of 64 rows, 64 columns */
  WN_SPARSE_KL_WIDE_BYTES = 2 * WN_SPARSE_KL_PIECE_BYTES,
  WN_SPARSE_KL_TEAM = 4,       /* rows of a team at most */
  WN_SPARSE_KL_KEY_BITS = 28,  /* of a listed key */
  WN_SPARSE_KL_BOUND_BITS = 40 /* a bound's unit is 2^-40 of the largest B, or less */
};

/* A chunk of rows; views begin at its first row. */
typedef struct wn_sparse_kl {
  wn_view<wn_bf16> q, k, dq;
  wn_view<float> w, p, kl, dw, dk;
  wn_view<int32_t> selection;
  int64_t n, n_keys;
  int32_t head0, heads; /* the group's */
  int32_t pitch;        /* picks a row, padded */
  int32_t sum_row;      /* integers a key */
  int32_t k_row_bytes;
  bool q_vectors, k_vectors, gradients;
  float scale, factor; /* of q.k in I; of the gradients: coeff scale */
  float *index;        /* [n][pitch]: I, then g */
  uint16_t *bits;      /* [n][pitch][4] */
  uint32_t *turned;    /* [n][pitch / 16][32] */
  int32_t *count;      /* [n]: picks of the row, 0 where there are fewer than two */
  float *row_bound;    /* [n]: B */
  uint32_t *largest;   /* bits of the largest finite B */
  uint64_t *bound;     /* [m]; the top bit: not finite */
  float *key_scale;    /* [m] */
  int32_t *sums;       /* [m][sum_row] */
  int32_t team;        /* rows whose contributions are added before they are scattered */
  uint32_t *list;      /* [teams][team * pitch]: keys that some row of the team picks; bit 28 + i: row i does */
  int32_t *listed;     /* [teams] */
} wn_sparse_kl;

/* The group of heads from head0 on, with its share of the bits. */
static inline wn_sparse_kl wn_sparse_group(const wn_sparse_kl *j, int32_t head0) {
  wn_sparse_kl g = *j;
  const int64_t pairs = j->n * j->pitch;
  g.head0 = head0;
  g.heads = j->q.heads - head0 < WN_SPARSE_KL_HEADS ? j->q.heads - head0 : WN_SPARSE_KL_HEADS;
  if (j->gradients) {
    g.bits += head0 / WN_SPARSE_KL_HEADS * pairs * 4;
    g.turned += head0 / WN_SPARSE_KL_HEADS * pairs / WN_SPARSE_KL_TILE * 32;
  }
  return g;
}

/* Where 16-byte chunk c of a row of 256 bytes lies: chunks are permuted so that ldmatrix meets no bank twice. */
__device__ __forceinline__ uint32_t wn_sparse_place(int32_t row, int32_t chunk) {
  return (uint32_t)(row * WN_SPARSE_KL_ROW_BYTES + ((chunk ^ (row & 7)) << 4));
}

/* The same for rows of 128 bytes of which a tile of 64 has two pieces, one after the other: wgmma's operands. */
__device__ __forceinline__ uint32_t wn_sparse_wide_place(int32_t row, int32_t chunk) {
  return (uint32_t)(chunk / 8 * WN_SPARSE_KL_PIECE_BYTES + row * 128 + ((chunk % 8 ^ (row & 7)) << 4));
}

/* 8 elements of a row from `column` on, zeros from `width` on; from is the row, and has to be a valid address. */
__device__ __forceinline__ void wn_sparse_stage(uint32_t to, const wn_bf16 *from, int32_t column, int32_t width,
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
  wn_store_shared_16(to, make_uint4(pair[0], pair[1], pair[2], pair[3]));
}

/* The picks of tile t, a lane each of the first 16; -1 where there is none. */
__device__ __forceinline__ int32_t wn_sparse_picks(const wn_sparse_kl &j, int64_t row, int32_t t, int32_t n) {
  const int32_t at = t * WN_SPARSE_KL_TILE + (int32_t)threadIdx.x % 32;
  return threadIdx.x % 32 < WN_SPARSE_KL_TILE && at < n ? j.selection.data[row * j.selection.row + at] : -1;
}

/* Keys of a tile to a warp's rows of ROW bytes; `to`: where chunk lane % 16 of row lane / 16 belongs. Where `picks`
 * end, the tile's first is taken again: its g is 0, and no key is read that the row has not picked. A tile without
 * picks becomes zeros. */
template <bool VECTORS, int ROW>
__device__ __forceinline__ void wn_sparse_gather(const wn_sparse_kl &j, uint32_t to, int32_t picks) {
  const int32_t lane = (int32_t)threadIdx.x % 32, chunk = lane % 16, first = __shfl_sync(~0u, picks, 0);
  const bool there = first >= 0 && chunk * 8 < j.k.width;
  const char *from = (const char *)(j.k.data + (there ? chunk * 8 : 0));
  picks = max(min(picks < 0 ? first : picks, (int32_t)j.n_keys - 1), 0);
#pragma unroll
  for (int i = 0; i < WN_SPARSE_KL_TILE / 2; i++) { /* row lane / 16 + 2 i */
    const int32_t key = __shfl_sync(~0u, picks, lane / 16 + 2 * i);
    const uint32_t at = (to ^ (2 * i % 8 << 4)) + 2 * i * ROW;
    if (VECTORS)
      wn_cp_async_16(at, from + (int64_t)key * j.k_row_bytes, there ? 16 : 0);
    else
      wn_sparse_stage(at, j.k.data + key * j.k.row, chunk * 8, there ? j.k.width : 0, false);
  }
}

/* The exponent of the unit of bounds: a bound is an integer times 2^-unit_exponent. */
__device__ __forceinline__ int32_t wn_sparse_unit_exponent(const uint32_t *largest) {
  return min(WN_SPARSE_KL_BOUND_BITS - 1 - ((int32_t)(*largest >> 23) - 127), 126);
}

/* From bits and g: dq, dw and dk += of the chunk. Enqueues; `job` has all its scratch. */
WN_MUST_USE wn_status wn_sparse_kl_gradients(wn_device *device, const wn_sparse_kl *job);

#endif
