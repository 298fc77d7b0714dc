#include "stages/stages.h"

/* A dense base from scratch, or a dense control that goes on from one: the whole model learns from the token loss under
 * dense attention. An indexer that the model already has is carried along, frozen. */
wn_recipe wn_stage_pretrain(void) {
  return (wn_recipe){
      .stage = WN_STAGE_PRETRAIN,
      .train_base = true,
      .train_indexer = false,
      .selection = WN_SELECT_DENSE,
      .layer_major = false,
  };
}
