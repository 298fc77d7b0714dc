#include "stages/stages.h"

/* Sparse training stage (DeepSeek-V3.2, 2.1.1): every layer attends to the indexer's top-k keys and all parameters
 * adapt. The indexer's input is detached: the indexer learns only from the KL on the selected set, the base only from
 * the token loss. */
wn_recipe wn_stage_adapt(void) {
  return (wn_recipe){
      .stage = WN_STAGE_ADAPT,
      .train_base = true,
      .train_indexer = true,
      .selection = WN_SELECT_INDEXER,
      .layer_major = false,
  };
}
