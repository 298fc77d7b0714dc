/* The lightning indexer's score I[s] = sum_h w[h] relu(scale q[h].k[s]) of one row against panels of keys.
 * Every score is one fixed chain of operations, whatever the chunk of rows or the range of keys it is
 * computed in: a selection made again, by any operation, is the same selection. */
#ifndef WN_KERNELS_CPU_INDEX_SCORE_H
#define WN_KERNELS_CPU_INDEX_SCORE_H

#include "kernels/cpu/tile.h"

#ifdef __AVX512F__
enum { WN_VECTOR_BYTES = 64, WN_SCORE_HEADS = 4 };
#else
enum { WN_VECTOR_BYTES = 32, WN_SCORE_HEADS = 2 };
#endif
/* Keys of a panel: four vectors. WN_K_TILE is a multiple of it. */
enum { WN_PANEL = 4 * WN_VECTOR_BYTES / (int)sizeof(wn_real) };

/* Keys first .. first + n_panels * WN_PANEL - 1, transposed: panel[i][d][WN_PANEL]; keys past the end are 0.
 */
typedef struct wn_index_keys {
  const wn_real *panel;
  int32_t first, n_panels;
  int64_t width;
} wn_index_keys;

/* Packs the keys that some row sees; `first` is a multiple of WN_K_TILE. The memory is the caller's scratch
 * to release. */
#define wn_index_keys_pack WN_CPU(index_keys_pack)
WN_MUST_USE wn_status wn_index_keys_pack(wn_device *device, wn_index_keys *out, const wn_tensor *k,
                                         const wn_rows *rows);

typedef struct wn_index_row {
  const wn_real *q; /* [HI][dI], heads q_stride apart */
  const wn_real *w; /* [HI] */
  int64_t q_stride, n_heads;
  wn_real scale;
} wn_index_row;

void WN_CPU(expect_indexer)(const wn_tensor *q, const wn_tensor *k, const wn_tensor *w, const wn_rows *rows);

static inline wn_index_row wn_index_row_of(const wn_tensor *q, const wn_tensor *w, int64_t i,
                                           const wn_indexer_params *params) {
  return (wn_index_row){.q = wn_head_row(q, i, 0),
                        .w = wn_row(w, i),
                        .q_stride = q->stride[1],
                        .n_heads = q->dim[1],
                        .scale = (wn_real)params->scale};
}

/* Scores of the panels that hold keys from .. end - 1; score[0] belongs to key origin (a multiple of WN_PANEL
 * from keys->first, at or below from). Whole panels are written, with scores of no meaning outside from ..
 * end - 1. z (may be null): scale q[h].k[s] at z[h * z_stride + key - origin]. */
#define wn_index_score WN_CPU(index_score)
void wn_index_score(wn_real *score, wn_real *z, int64_t z_stride, const wn_index_row *row, const wn_index_keys *keys,
                    int32_t origin, int32_t from, int32_t end);

/* Where a row's scores of keys first_key .. may begin: the panel's first key. */
static inline int32_t wn_panel_floor(const wn_index_keys *keys, int32_t key) {
  return keys->first + (key - keys->first) / WN_PANEL * WN_PANEL;
}

#endif
