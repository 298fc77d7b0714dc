#include <inttypes.h>

#include "base/rng.h"
#include "data/dataset.h"

int64_t wn_sampler_window(uint64_t seed, int64_t n_windows, int64_t step, int64_t global_batch, int64_t index) {
  WN_ASSERT(n_windows >= 1 && step >= 0 && index >= 0 && index < global_batch,
            "%" PRId64 " windows, step %" PRId64 ", sequence %" PRId64 " of %" PRId64, n_windows, step, index,
            global_batch);
  uint64_t sequence = (uint64_t)(step * global_batch + index), n = (uint64_t)n_windows;
  uint64_t epoch = sequence / n;
  /* the permutation draws at indices of 2^56 and up, so an epoch's key shares no number with another use */
  uint64_t key = wn_rng_u64(seed, WN_RNG_ORDER, epoch);
  return (int64_t)wn_rng_permute(key, WN_RNG_ORDER, n, sequence % n);
}
