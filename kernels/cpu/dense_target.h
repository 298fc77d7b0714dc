/* The head-averaged dense attention p of a few rows, over all keys they see, from q and k alone. */
#ifndef WN_KERNELS_CPU_DENSE_TARGET_H
#define WN_KERNELS_CPU_DENSE_TARGET_H

#include "kernels/cpu/tile.h"

enum { WN_TARGET_ROWS = 8 };

typedef struct wn_target {
  const wn_tensor *qa, *ka; /* [n,H,dq], [m,H,dq] or [m,1,dq] */
  const wn_rows *rows;
  wn_real scale;
} wn_target;

/* Memory of one thread: p and one head's logits, [WN_TARGET_ROWS][pitch], and the rows' queries of one head.
 */
typedef struct wn_target_work {
  wn_real *p, *logit, *q;
  int64_t pitch;
} wn_target_work;

#define wn_target_take WN_CPU(target_take)
#define wn_target_rows WN_CPU(target_rows)
void wn_target_take(wn_target_work *work, wn_carver *carver, const wn_target *target);
/* work->p[r * pitch + key - first_key] for the n_rows (at most WN_TARGET_ROWS) rows numbered in `row`; an
 * empty row's is left alone. */
void wn_target_rows(wn_target_work *work, const wn_target *target, const int32_t *row, int32_t n_rows);

#endif
