#include "kernels/cpu/attend.h"
#include "kernels/cpu/attention.h"

static wn_attend checked(const wn_tensor *q, const wn_tensor *k, const wn_tensor *v, const wn_rows *rows,
                         const wn_attention_params *params) {
  WN_EXPECT(q, WN_REAL_DTYPE, 3, rows->n_rows, q->dim[1], q->dim[2]);
  WN_EXPECT(k, WN_REAL_DTYPE, 3, rows->n_keys, q->dim[1], q->dim[2]);
  WN_EXPECT(v, WN_REAL_DTYPE, 3, rows->n_keys, q->dim[1], v->dim[2]);
  return (wn_attend){.q = q, .k = k, .v = v, .rows = rows, .scale = (wn_real)params->scale};
}

wn_status WN_CPU(attention_dense)(wn_device *device, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                                  const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k, const wn_tensor *v,
                                  const wn_rows *rows, const wn_attention_params *params) {
  wn_attend attend = checked(q, k, v, rows, params);
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

wn_status WN_CPU(attention_dense_backward)(wn_device *device, wn_tensor *dq, wn_tensor *dk, wn_tensor *dv,
                                           const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k,
                                           const wn_tensor *v, const wn_tensor *lse, const wn_tensor *delta,
                                           const wn_rows *rows, const wn_attention_params *params) {
  wn_attend attend = checked(q, k, v, rows, params);
  int64_t n = rows->n_rows, m = rows->n_keys, n_heads = q->dim[1];
  WN_EXPECT(dq, WN_REAL_DTYPE, 3, n, n_heads, q->dim[2]);
  WN_EXPECT(dk, WN_REAL_DTYPE, 3, m, n_heads, q->dim[2]);
  WN_EXPECT(dv, WN_REAL_DTYPE, 3, m, n_heads, v->dim[2]);
  WN_EXPECT(d_o, WN_REAL_DTYPE, 3, n, n_heads, v->dim[2]);
  WN_EXPECT(lse, WN_REAL_DTYPE, 2, n, n_heads);
  WN_EXPECT(delta, WN_REAL_DTYPE, 2, n, n_heads);
  WN_TRY(WN_CPU(attend_backward)(device, &attend, dq, dk, dv, NULL, d_o, lse, delta));
  return NULL;
}
