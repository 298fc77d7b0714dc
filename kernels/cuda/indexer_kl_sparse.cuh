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
  float scale, factor;     /* of q.k in I; of the gradients: coeff scale */
  float *index;            /* [n][pitch]: I, then g */
  uint32_t *bits, *turned; /* [n][pitch / 16][32] */
  int32_t *count;          /* [n]: picks of the row, 0 where there are fewer than two */
  float *row_bound;        /* [n]: B */
  uint32_t *largest;       /* bits of the largest finite B */
  uint64_t *bound;         /* [m]; the top bit: not finite */
  float *key_scale;        /* [m] */
  int32_t *sums;           /* [m][sum_row] */
} wn_sparse_kl;

/* The group of heads from head0 on, with its share of the bits. */
static inline wn_sparse_kl wn_sparse_group(const wn_sparse_kl *j, int32_t head0) {
  wn_sparse_kl g = *j;
  const int64_t words = j->n * (j->pitch / WN_SPARSE_KL_TILE) * 32;
  g.head0 = head0;
  g.heads = j->q.heads - head0 < WN_SPARSE_KL_HEADS ? j->q.heads - head0 : WN_SPARSE_KL_HEADS;
  if (j->gradients) {
    g.bits += head0 / WN_SPARSE_KL_HEADS * words;
    g.turned += head0 / WN_SPARSE_KL_HEADS * words;
  }
  return g;
}

/* Where 16-byte chunk c of a row of 256 bytes lies: chunks are permuted so that ldmatrix meets no bank twice. */
__device__ __forceinline__ uint32_t wn_sparse_place(int32_t row, int32_t chunk) {
  return (uint32_t)(row * WN_SPARSE_KL_ROW_BYTES + ((chunk ^ (row & 7)) << 4));
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

/* The exponent of the unit of bounds: a bound is an integer times 2^-unit_exponent. */
__device__ __forceinline__ int32_t wn_sparse_unit_exponent(const uint32_t *largest) {
  return min(WN_SPARSE_KL_BOUND_BITS - 1 - ((int32_t)(*largest >> 23) - 127), 126);
}

/* From bits and g: dq, dw and dk += of the chunk. Enqueues; `job` has all its scratch. */
WN_MUST_USE wn_status wn_sparse_kl_gradients(wn_device *device, const wn_sparse_kl *job);

#endif
