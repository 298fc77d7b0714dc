/* What the attention and indexer operations share: addresses, per-thread memory, and the walk of
 * one block of query rows over the keys it sees. */
#ifndef WN_KERNELS_CPU_TILE_H
#define WN_KERNELS_CPU_TILE_H

#include "kernels/cpu/expo.h"
#include "kernels/cpu/view.h"

enum {
  WN_Q_BLOCK = 64, /* query rows of a tile */
  WN_K_TILE = 128, /* keys of a tile; tiles end at multiples of it */
  WN_LANES = 16    /* rows of temporaries are padded to this many elements: vector loops need no remainder */
};

/* Stands for a masked logit until its probability is forced to 0. Finite, so that no inf - inf arises. */
#define WN_MASKED_LOGIT ((wn_real)-1e30)

static inline int32_t wn_min_i32(int32_t a, int32_t b) {
  return a < b ? a : b;
}
static inline int32_t wn_max_i32(int32_t a, int32_t b) {
  return a > b ? a : b;
}
static inline int64_t wn_pad_lanes(int64_t n) {
  return (n + WN_LANES - 1) / WN_LANES * WN_LANES;
}

/* Row i of a matrix; row i, head h of a rank-3 tensor. */
static inline wn_real *wn_row(const wn_tensor *t, int64_t i) {
  return (wn_real *)t->data + i * t->stride[0];
}
static inline int32_t *wn_row_i32(const wn_tensor *t, int64_t i) {
  return (int32_t *)t->data + i * t->stride[0];
}
static inline wn_real *wn_head_row(const wn_tensor *t, int64_t i, int64_t h) {
  return (wn_real *)t->data + i * t->stride[0] + h * t->stride[1];
}
/* Keys may be shared by all heads: [m,1,D]. */
static inline int64_t wn_key_head(const wn_tensor *k, int64_t h) {
  return k->dim[1] == 1 ? 0 : h;
}

/* y = alpha op(a) op(b) + beta y with row-major operands; m, n, k as BLAS has them. */
static inline void wn_product(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, wn_real alpha,
                              const wn_real *a, int64_t lda, const wn_real *b, int64_t ldb, wn_real beta, wn_real *y,
                              int64_t ldy) {
  wn_gemm(CblasRowMajor, trans_a ? CblasTrans : CblasNoTrans, trans_b ? CblasTrans : CblasNoTrans, (int)m, (int)n,
          (int)k, alpha, a, (int)lda, b, (int)ldb, beta, y, (int)ldy);
}

/* Per-thread memory is laid out by running the same list of wn_take twice: once over a null base to count,
 * once over each thread's share. */
typedef struct wn_carver {
  char *base; /* NULL: only count */
  size_t used;
} wn_carver;
void *WN_CPU(take)(wn_carver *carver, size_t bytes);
#define wn_take_reals(carver, count) ((wn_real *)WN_CPU(take)((carver), (size_t)(count) * sizeof(wn_real)))
#define wn_take_ints(carver, count) ((int32_t *)WN_CPU(take)((carver), (size_t)(count) * sizeof(int32_t)))

/* out[c][lanes] = rows[r][c] for r < n_rows; lanes beyond n_rows are 0. */
#define wn_transpose WN_CPU(transpose)
void wn_transpose(wn_real *out, int64_t lanes, const wn_real *rows, int64_t stride, int64_t n_rows, int64_t n_columns);

/* How a block of query rows meets its keys. Without a selection the tiles are runs of neighbouring keys; with
 * one, a tile lists keys that some row of the block picked (others are never read). Tiles that no row sees do
 * not appear. */
typedef struct wn_key_walk {
  int64_t row0;
  int32_t n_rows, lanes;                       /* lanes: n_rows padded */
  int32_t first[WN_Q_BLOCK], last[WN_Q_BLOCK]; /* of each lane; empty: 1, 0 */
  int32_t low, high;                           /* keys that some row sees lie here (inclusive) */
  int32_t next;                                /* key (or place in list) where the next tile begins */
  const wn_tensor *selection;                  /* NULL: all visible keys */
  int32_t *list, *place;                       /* [n_keys] picked keys, ascending; where key low + i stands in it */
  int32_t n_list;
  int32_t slot[WN_Q_BLOCK], slot_end[WN_Q_BLOCK]; /* of each row: its picks that stand in this tile */
  /* the current tile */
  const int32_t *keys; /* NULL: key0, key0 + 1, ... */
  int32_t key0, n_keys;
  bool partial; /* some pair is masked: mask[key][lane] is 1 where the row sees the key, else 0 */
  wn_real *mask;
} wn_key_walk;

#define wn_walk_take WN_CPU(walk_take)
#define wn_walk_begin WN_CPU(walk_begin)
#define wn_walk_next WN_CPU(walk_next)
void wn_walk_take(wn_key_walk *walk, wn_carver *carver, const wn_tensor *selection, int64_t n_keys);
void wn_walk_begin(wn_key_walk *walk, const wn_rows *rows, int64_t row0, int32_t n_rows);
bool wn_walk_next(wn_key_walk *walk);

/* Shares of a gradient [n_keys, width] that all rows add to: one for each of a fixed number of groups of
 * rows, so that the order of the sum does not depend on the threads. */
typedef struct wn_partials {
  wn_real *share; /* [n_groups][n_keys][width] */
  int64_t n_groups, n_keys, width;
} wn_partials;

#define wn_partials_create WN_CPU(partials_create)
#define wn_partials_begin WN_CPU(partials_begin)
#define wn_partials_add WN_CPU(partials_add)
/* From scratch, which the caller releases. */
WN_MUST_USE wn_status wn_partials_create(wn_device *device, wn_partials *out, int64_t n_groups, int64_t n_keys,
                                         int64_t width);
wn_real *wn_partials_begin(const wn_partials *partials, int64_t group); /* zeroed [n_keys][width] */
/* to[n_keys,width] += the shares, in order of group */
void wn_partials_add(wn_device *device, const wn_partials *partials, wn_tensor *to);

#endif
