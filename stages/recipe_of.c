#include "stages/stages.h"

wn_recipe wn_recipe_of(wn_stage stage) {
  switch (stage) {
  case WN_STAGE_WARMUP: return wn_stage_warmup();
  case WN_STAGE_ADAPT: return wn_stage_adapt();
  case WN_STAGE_PRETRAIN:
  case WN_N_STAGES: break;
  }
  return wn_stage_pretrain();
}
