#include "kernels/cpu/attend.h"
#include "kernels/cpu/attention.h"

static wn_attend checked(const wn_tensor *q, const wn_tensor *k, const wn_tensor *v, const wn_tensor *selection,
                         const wn_rows *rows, const wn_attention_params *params) {
  WN_EXPECT(q, WN_REAL_DTYPE, 3, rows->n_rows, q->dim[1], q->dim[2]);
  WN_EXPECT(k, WN_REAL_DTYPE, 3, rows->n_keys, q->dim[1], q->dim[2]);
  WN_EXPECT(v, WN_REAL_DTYPE, 3, rows->n_keys, q->dim[1], v->dim[2]);
  WN_EXPECT(selection, WN_I32, 2, rows->n_rows, selection->dim[1]);
  return (wn_attend){.q = q, .k = k, .v = v, .selection = selection, .rows = rows, .scale = (wn_real)params->scale};
}

wn_status WN_CPU(attention_masked)(wn_device *device, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                                   const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k, const wn_tensor *v,
                                   const wn_tensor *selection, const wn_rows *rows, const wn_attention_params *params) {
  wn_attend attend = checked(q, k, v, selection, rows, params);
  int64_t n = rows->n_rows, n_heads = q->dim[1];
  WN_EXPECT(o, WN_REAL_DTYPE, 3, n, n_heads, v->dim[2]);
  WN_EXPECT(lse, WN_REAL_DTYPE, 2, n, n_heads);
  WN_ASSERT(!delta == !d_o, "delta and d_o come together");
  if (delta) {
    WN_EXPECT(delta, WN_REAL_DTYPE, 2, n, n_heads);
    WN_EXPECT(d_o, WN_REAL_DTYPE, 3, n, n_heads, v->dim[2]);
  }
  WN_TRY(WN_CPU(attend)(device, &attend, o, lse, delta, d_o));
  return NULL;
}

wn_status WN_CPU(attention_masked_backward)(wn_device *device, wn_tensor *dq, wn_tensor *dk, wn_tensor *dv,
                                            wn_tensor *p, const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k,
                                            const wn_tensor *v, const wn_tensor *selection, const wn_tensor *lse,
                                            const wn_tensor *delta, const wn_rows *rows,
                                            const wn_attention_params *params) {
  wn_attend attend = checked(q, k, v, selection, rows, params);
  int64_t n = rows->n_rows, m = rows->n_keys, n_heads = q->dim[1];
  WN_EXPECT(lse, WN_REAL_DTYPE, 2, n, n_heads);
  WN_ASSERT(!dq == !dk && !dq == !dv && !dq == !d_o && !dq == !delta, "dq, dk, dv, d_o and delta come together");
  if (dq) {
    WN_EXPECT(dq, WN_REAL_DTYPE, 3, n, n_heads, q->dim[2]);
    WN_EXPECT(dk, WN_REAL_DTYPE, 3, m, n_heads, q->dim[2]);
    WN_EXPECT(dv, WN_REAL_DTYPE, 3, m, n_heads, v->dim[2]);
    WN_EXPECT(d_o, WN_REAL_DTYPE, 3, n, n_heads, v->dim[2]);
    WN_EXPECT(delta, WN_REAL_DTYPE, 2, n, n_heads);
  }
  if (p) WN_EXPECT(p, WN_REAL_DTYPE, 2, n, selection->dim[1]);
  WN_TRY(WN_CPU(attend_backward)(device, &attend, dq, dk, dv, p, d_o, lse, delta));
  return NULL;
}
