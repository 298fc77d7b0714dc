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
 * the rows, unless it is a few rows itself. */
static inline void twin_close_sum(twin_bench *b, const char *what, const twin *t) {
  twin_error e = twin_compare(b, what, t);
  print_message("  %-40s norm %.2e  worst row %.2e (row %lld)\n", what, e.norm, e.worst, (long long)e.worst_row);
  bool few = wn_tensor_count(&t->cpu) / t->cpu.dim[t->cpu.rank - 1] < 16;
  if (!(e.norm <= (few ? 5e-2 : 5e-3) && e.worst <= 0.2))
    fail_msg("%s: off by %.3e in norm and %.3e in row %lld", what, e.norm, e.worst, (long long)e.worst_row);
}

#endif
