/* Attention with keys and values of their own for each head, over all visible keys or over a selection: the
 * core of attention_dense and attention_masked. */
#ifndef WN_KERNELS_CPU_ATTEND_H
#define WN_KERNELS_CPU_ATTEND_H

#include "kernels/cpu/tile.h"

typedef struct wn_attend {
  const wn_tensor *q, *k, *v;
  const wn_tensor *selection; /* NULL: all visible keys */
  const wn_rows *rows;
  wn_real scale;
} wn_attend;

/* out[walk->n_keys][width]: one head of the tile's listed keys */
void WN_CPU(gather_keys)(wn_real *out, const wn_tensor *from, int64_t h, const wn_key_walk *walk);

/* o, lse and, with d_o, delta. */
WN_MUST_USE wn_status WN_CPU(attend)(wn_device *device, const wn_attend *attend, wn_tensor *o, wn_tensor *lse,
                                     wn_tensor *delta, const wn_tensor *d_o);
/* dq =, dk +=, dv +=, p = (with a selection; may be null); dq, dk, dv, d_o, delta may be null together. */
WN_MUST_USE wn_status WN_CPU(attend_backward)(wn_device *device, const wn_attend *attend, wn_tensor *dq, wn_tensor *dk,
                                              wn_tensor *dv, wn_tensor *p, const wn_tensor *d_o, const wn_tensor *lse,
                                              const wn_tensor *delta);

#endif
