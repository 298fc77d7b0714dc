/* Exact top-k of one row. */
#ifndef WN_KERNELS_CPU_TOPK_H
#define WN_KERNELS_CPU_TOPK_H

#include "kernels/cpu/real.h"

/* An integer whose order is the score's. */
#ifdef WN_REAL64
typedef int64_t wn_score_key;
#else
typedef int32_t wn_score_key;
#endif

/* pick[0 .. k-1] = base + i of the k largest score[i], i in 0 .. count-1, ascending; -1 from place count on
 * when count is below k. Lowest i on ties; -0 equals 0; NaN counts as -inf. key[count]: memory to work in. */
#define wn_top_k WN_CPU(top_k)
void wn_top_k(int32_t *pick, int64_t k, const wn_real *score, wn_score_key *key, int32_t count, int32_t base);

#endif
