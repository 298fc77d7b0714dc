/* What the files of indexer_kl_dense share: a chunk of rows, and copies of rows into shared memory. */
#ifndef WN_KERNELS_CUDA_INDEXER_KL_DENSE_CUH
#define WN_KERNELS_CUDA_INDEXER_KL_DENSE_CUH

#include <cuda.h>

#include "kernels/cuda/ptx/mma.cuh"
#include "kernels/cuda/support.cuh"

/* Rows and keys go in tiles of this many; whether a tile of rows sees a tile of keys decides what is computed. A chunk
 * has at most WN_DENSE_KL_MAX_TILES tiles of rows. */
enum { WN_DENSE_KL_TILE = 128, WN_DENSE_KL_MAX_TILES = 32 };

/* Rows whose target and scores exist at once. Only tiles that `seen` names are ever written or read. */
typedef struct wn_dense_kl_chunk {
  const int32_t *first_key, *last_key; /* of the chunk's rows */
  int32_t n_rows, n_keys;
  int32_t n_row_tiles;
  int32_t columns; /* keys rounded up to tiles: the stride of p and index */
  int2 *seen;   /* [row tile]: keys x .. y - 1, multiples of WN_DENSE_KL_TILE, hold all that its rows see; 0, 0: none */
  float *p;     /* [row tiles * WN_DENSE_KL_TILE, columns]: the target; then g = softmax(I) - p, 0 where not visible */
  float *index; /* the same shape: I */
} wn_dense_kl_chunk;

/* A sum over heads of a function of products: out[t,s] = mean over heads of exp(scale x.y - term[t,h]) (the target), or
 * sum over heads of term[t,h] relu(scale x.y) (the scores). */
typedef struct wn_dense_kl_sum {
  wn_dense_kl_chunk chunk;
  wn_view<wn_bf16> x, y; /* rows: qa or q; keys: ka or k (head stride 0 where all heads share them) */
  const float *term;     /* [rows, heads]: lse or w */
  int64_t term_row;
  float *out;
  float scale; /* the target's: times log2(e) */
  bool x_vectors, y_vectors;
} wn_dense_kl_sum;

/* One head's product z into the sum. Target: scale and t = lse come multiplied by log2(e); scores: t = w * scale / 2.
 */
template <bool TARGET> __device__ __forceinline__ float wn_dense_kl_folded(float sum, float z, float t, float scale) {
  if (!TARGET) return fmaf(t, z + fabsf(z), sum); /* z + |z| is 2 relu(z) at the full rate */
  return sum + wn_exp2(fmaf(z, scale, -t));
}
template <bool TARGET> __device__ __forceinline__ float wn_dense_kl_term(float term, float scale) {
  return term * (TARGET ? WN_LOG2E : 0.5f * scale);
}

/* The target, the scores, or both in one launch (NULL: not that one), for operands of 16-byte rows, by warpgroups.
 * indexer_kl_dense_scores_wide.cu */
WN_MUST_USE wn_status wn_dense_kl_sums_wide(wn_device *device, const wn_dense_kl_sum *target,
                                            const wn_dense_kl_sum *index);

/* p and index from the chunk's rows of qa, lse, q and w. indexer_kl_dense_scores.cu */
WN_MUST_USE wn_status wn_dense_kl_scores(wn_device *device, const wn_dense_kl_chunk *chunk, const wn_view<wn_bf16> &q,
                                         const wn_view<wn_bf16> &k, const wn_view<float> &w, const wn_view<wn_bf16> &qa,
                                         const wn_view<wn_bf16> &ka, const wn_view<float> &lse, double scale,
                                         double attention_scale);

/* Where dk's shares of a chunk stand before they are added up: [n_splits, columns, width]; share i is of row tiles
 * i * tiles_per_split and on. */
typedef struct wn_dense_kl_shares {
  float *data;
  int32_t n_splits, tiles_per_split, width;
} wn_dense_kl_shares;

typedef struct wn_dense_kl_gradient {
  wn_dense_kl_chunk chunk;
  wn_dense_kl_shares shares;
  wn_view<wn_bf16> q, k, dq; /* the chunk's rows of q, dq, w, dw */
  wn_view<float> w, dw, dk;
  float factor; /* coeff * scale */
} wn_dense_kl_gradient;

/* From g in chunk.p: dq = and dw = for the chunk's rows, dk +=. indexer_kl_dense_gradients.cu */
WN_MUST_USE wn_status wn_dense_kl_gradients(wn_device *device, const wn_dense_kl_gradient *a);
/* dq =, dw =, and dk's shares, by warpgroups, for shapes that wn_dense_kl_gradients_fit.
 * indexer_kl_dense_gradients_wide.cu */
WN_MUST_USE wn_status wn_dense_kl_gradients_wide(wn_device *device, const wn_dense_kl_gradient *a);
bool wn_dense_kl_gradients_fit(const wn_dense_kl_gradient *a);
/* The width that the gradients' kernels pad dI to. */
int32_t wn_dense_kl_padded_width(int32_t width);

/* ---- in kernels ---- */

__device__ __forceinline__ bool wn_dense_kl_sees(const wn_dense_kl_chunk &chunk, int32_t row_tile, int32_t key) {
  const int2 seen = chunk.seen[row_tile];
  return key >= seen.x && key < seen.y;
}

/* 1 where z > 0, else 0 (NaN too), by one multiplication at the full rate, which comparisons do not have. Of positive z
 * only those below 3e-39, denormals, come out as less than 1. */
__device__ __forceinline__ float wn_dense_kl_gate(float z) {
  return __saturatef(z * 3.4e38f);
}

/* Elements column .. column + 7 of a row to 16 bytes of shared memory; zeros past the width, or where the row does not
 * exist. `vectors`: see wn_view_vectors; without it elements travel one by one, and not asynchronously. */
__device__ __forceinline__ void wn_dense_kl_copy_8(uint32_t shared, const wn_view<wn_bf16> &v, int64_t offset,
                                                   int32_t column, bool exists, bool vectors) {
  if (vectors) {
    const bool in = exists && column < v.width;
    wn_cp_async_16(shared, in ? v.data + offset + column : v.data, in ? 16 : 0);
    return;
  }
  const unsigned short *from = (const unsigned short *)v.data + offset + column;
  uint32_t x[4] = {0, 0, 0, 0};
#pragma unroll
  for (int e = 0; e < 8; e++)
    if (exists && column + e < v.width) x[e / 2] |= (uint32_t)from[e] << (e % 2 * 16);
  wn_store_shared_16(shared, make_uint4(x[0], x[1], x[2], x[3]));
}

#endif
