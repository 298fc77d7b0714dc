#include "stages/stages.h"

/* "We keep dense attention and freeze all model parameters except for the lightning indexer", which learns by KL
 * divergence from the main attention's distribution over all visible keys, summed across heads and L1-normalised
 * (DeepSeek-V3.2, 2.1.1, dense warm-up stage). No gradient enters the base, so nothing is kept between layers but
 * hidden states, and each layer's weights are read once a step. */
wn_recipe wn_stage_warmup(void) {
  return (wn_recipe){
      .stage = WN_STAGE_WARMUP,
      .train_base = false,
      .train_indexer = true,
      .selection = WN_SELECT_DENSE,
      .layer_major = true,
  };
}
