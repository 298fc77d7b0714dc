/* Counter-based random numbers: a value is a pure function of (seed, purpose, index), so nothing has to be
 * saved, and any rank can draw any value. Philox4x32-10 (Salmon et al., SC 2011). */
#ifndef WN_BASE_RNG_H
#define WN_BASE_RNG_H

#include <stdint.h>

/* One entry per use, so that no two uses share numbers. Append only: the values are part of run state. */
typedef enum wn_purpose {
  WN_RNG_INIT = 1,   /* weights: index = (parameter id << 40) + element */
  WN_RNG_ORDER = 2,  /* data order */
  WN_RNG_SAMPLE = 3, /* rows of selection_stats */
  WN_RNG_SELECT = 4, /* the random selection of eval */
  WN_RNG_PACK = 5,   /* data pack */
  WN_RNG_TEST = 6
} wn_purpose;

uint64_t wn_rng_u64(uint64_t seed, wn_purpose purpose, uint64_t index);
double wn_rng_uniform(uint64_t seed, wn_purpose purpose, uint64_t index); /* [0, 1) */
double wn_rng_normal(uint64_t seed, wn_purpose purpose, uint64_t index);  /* mean 0, deviation 1 */
/* Uniform in 0 .. n-1, n >= 1. */
uint64_t wn_rng_below(uint64_t seed, wn_purpose purpose, uint64_t index, uint64_t n);
/* Place `index` of a pseudo-random permutation of 0 .. n-1 (a keyed Feistel network, cycle-walked). */
uint64_t wn_rng_permute(uint64_t seed, wn_purpose purpose, uint64_t n, uint64_t index);

#endif
