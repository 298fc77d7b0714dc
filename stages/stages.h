/* The stages, each a recipe for the one trainer. */
#ifndef WN_STAGES_H
#define WN_STAGES_H

#include "train/recipe.h"

wn_recipe wn_stage_pretrain(void);
wn_recipe wn_stage_warmup(void);
wn_recipe wn_stage_adapt(void);
wn_recipe wn_recipe_of(wn_stage stage);

#endif
