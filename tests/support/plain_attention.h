/* The attention and indexer operations in their plainest form: FP64, T x T, one loop per letter of the
 * formula. Everything is a dense F64 tensor from the given arena; inputs are read through wn_test_get,
 * whatever they are. */
#ifndef WN_PLAIN_ATTENTION_H
#define WN_PLAIN_ATTENTION_H

#include "kernels/kernels.h"

/* seen[n][m]: 1 where the row sees the key and, with a selection, picked it. */
uint8_t *plain_seen(wn_arena *arena, const wn_rows *rows, const wn_tensor *selection);
/* A dense F64 copy. */
wn_tensor plain_copy(wn_arena *arena, const wn_tensor *t);
wn_tensor plain_zeros(wn_arena *arena, int32_t rank, int64_t d0, int64_t d1, int64_t d2);

typedef struct plain_attention {
  wn_tensor p;          /* [H,n,m] */
  wn_tensor p_mean;     /* [n,m] */
  wn_tensor o, lse;     /* [n,H,dv], [n,H] */
  wn_tensor delta;      /* [n,H] */
  wn_tensor dq, dk, dv; /* of sum(d_o * o) */
} plain_attention;

/* k[m,H or 1,dq], v[m,H or 1,dv]; one head of keys or values serves all, and takes all heads' gradients. */
plain_attention plain_attend(wn_arena *arena, const wn_tensor *q, const wn_tensor *k, const wn_tensor *v,
                             const wn_tensor *d_o, const uint8_t *seen, double scale);

/* I[n,m]: -inf where not seen. */
wn_tensor plain_index(wn_arena *arena, const wn_tensor *q, const wn_tensor *k, const wn_tensor *w, const uint8_t *seen,
                      double scale);

typedef struct plain_kl {
  wn_tensor kl;         /* [n] */
  wn_tensor dq, dk, dw; /* of coeff * sum of kl, by the chain rule through z */
} plain_kl;

/* p[n,m]; rows that see fewer than two keys have no loss. */
plain_kl plain_indexer_kl(wn_arena *arena, const wn_tensor *q, const wn_tensor *k, const wn_tensor *w,
                          const wn_tensor *p, const uint8_t *seen, double scale, double coeff);

/* pick[k]: of score[m] where seen[m]: largest first by (score, lowest key), NaN as -inf; then sorted, padded
 * with -1. */
void plain_top_k(int32_t *pick, int64_t k, const double *score, const uint8_t *seen, int64_t m);

/* The same with keys m of [first, last] tests share: causal rows n of m keys (row i sees 0 .. m-n+i), and
 * variations. */
typedef enum plain_rows_kind { PLAIN_CAUSAL, PLAIN_DOCUMENTS, PLAIN_HOLES, PLAIN_ONE_KEY } plain_rows_kind;
wn_rows plain_rows(wn_arena *arena, int32_t n, int32_t m, plain_rows_kind kind);

/* A tensor of `role`, its rows and heads further apart than they need be, so that strides are honoured or
 * seen not to be; filled with normal values. */
wn_tensor plain_input(const wn_device *device, wn_role role, uint64_t seed, double deviation, int32_t rank, int64_t d0,
                      int64_t d1, int64_t d2);

#endif
