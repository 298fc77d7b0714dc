/* What tests of attention with keys of each head share, dense or over a selection. */
#ifndef WN_TEST_TWIN_ATTENTION_H
#define WN_TEST_TWIN_ATTENTION_H

#include "support/twin.h"

/* Operands and results of one attention; p and selection where it has them. */
typedef struct attention {
  twin q, k, v, d_o, o, lse, delta, dq, dk, dv, p, selection;
  twin_rows rows;
  wn_attention_params params;
} attention;

/* Without p and selection. `margin` elements stand after every head's row of every tensor. Results are poisoned; dk and
 * dv begin as numbers. Seeds: `seed` of q, and on of k, v, d_o, dk and dv. */
static inline attention twin_attention(twin_bench *b, twin_rows rows, int64_t heads, int64_t dq, int64_t dv,
                                       uint64_t seed, double q_deviation, int64_t margin) {
  int64_t n = rows.cpu.n_rows, m = rows.cpu.n_keys;
  attention a = {.rows = rows, .params = {.scale = 1 / sqrt((double)dq)}};
  a.q = twin_random(b, WN_ACT, seed, q_deviation, margin, 3, n, heads, dq);
  a.k = twin_random(b, WN_ACT, seed + 1, 1, margin, 3, m, heads, dq);
  a.v = twin_random(b, WN_ACT, seed + 2, 1, margin, 3, m, heads, dv);
  a.d_o = twin_random(b, WN_ACT, seed + 3, 1, margin, 3, n, heads, dv);
  a.o = twin_strided(b, WN_ACT, margin, 3, n, heads, dv);
  a.lse = twin_strided(b, WN_STAT, margin, 2, n, heads, 0);
  a.delta = twin_strided(b, WN_STAT, margin, 2, n, heads, 0);
  a.dq = twin_strided(b, WN_ACT, margin, 3, n, heads, dq);
  a.dk = twin_random(b, WN_ACT, seed + 4, 0.3, margin, 3, m, heads, dq);
  a.dv = twin_random(b, WN_ACT, seed + 5, 0.3, margin, 3, m, heads, dv);
  twin_poison(b, &a.o);
  twin_poison(b, &a.lse);
  twin_poison(b, &a.delta);
  twin_poison(b, &a.dq);
  return a;
}

/* delta and dq are sums that cancel: in a row that sees few keys, or whose weight is all on one, next to
 * nothing is left, while each term keeps the rounding of its BF16 weight. So the whole is held to a tighter bar than
 * the rows, unless it is a few rows itself, or rows of one number. */
static inline void twin_close_sum(twin_bench *b, const char *what, const twin *t) {
  twin_error e = twin_compare(b, what, t);
  print_message("  %-40s norm %.2e  worst row %.2e (row %lld)\n", what, e.norm, e.worst, (long long)e.worst_row);
  int64_t width = t->cpu.dim[t->cpu.rank - 1];
  bool few = wn_tensor_count(&t->cpu) / width < 16 || (t->cpu.rank == 3 && width == 1);
  if (!(e.norm <= (few ? 5e-2 : 5e-3) && e.worst <= 0.2))
    fail_msg("%s: off by %.3e in norm and %.3e in row %lld", what, e.norm, e.worst, (long long)e.worst_row);
}

/* Row `row` of head `head` of t (rows [n,H] or [n,H,D]) is all NaN, and every other bit is that of `clean`. */
static inline void twin_only_nan(twin_bench *b, const char *what, const twin *t, const wn_tensor *clean, int64_t row,
                                 int64_t head) {
  wn_tensor host = twin_download(b, &t->cuda);
  int64_t width = host.rank > 2 ? host.dim[2] : 1;
  for (int64_t i = 0; i < wn_tensor_count(&host); i++) {
    double x = wn_test_get(&host, i), y = wn_test_get(clean, i);
    if (i / width == row * host.dim[1] + head ? !isnan(x) : memcmp(&x, &y, sizeof x) != 0)
      fail_msg("%s: element %lld is %g, beside a NaN in row %lld of head %lld", what, (long long)i, x, (long long)row,
               (long long)head);
  }
  free(host.data);
}

/* One element of q becomes NaN: o, lse and delta of its row and head are NaN, all else stays as it was. forward() runs
 * the operation on the GPU. */
static inline void twin_nan_row(twin_bench *b, attention *a, int64_t row, int64_t head,
                                void (*forward)(twin_bench *, attention *)) {
  const twin *outs[] = {&a->o, &a->lse, &a->delta};
  wn_tensor clean[3];
  forward(b, a);
  for (int i = 0; i < 3; i++) clean[i] = twin_download(b, &outs[i]->cuda);
  double *q = malloc((size_t)wn_tensor_count(&a->q.cpu) * sizeof *q);
  assert_non_null(q);
  for (int64_t i = 0; i < wn_tensor_count(&a->q.cpu); i++) q[i] = wn_test_get(&a->q.cpu, i);
  q[(row * a->q.cpu.dim[1] + head) * a->q.cpu.dim[2] + 5] = (double)NAN;
  twin_set(b, &a->q, q);
  free(q);
  forward(b, a);
  for (int i = 0; i < 3; i++) {
    twin_only_nan(b, "beside NaN", outs[i], &clean[i], row, head);
    free(clean[i].data);
  }
}

#endif
