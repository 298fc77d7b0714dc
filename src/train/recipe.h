/* What a stage asks of the trainer: what trains, which attention runs, which losses there are (a trained base learns
 * from the token loss, a trained indexer from the KL), and which loop is outer. The stages/ folder holds one of these
 * each. */
#ifndef WN_TRAIN_RECIPE_H
#define WN_TRAIN_RECIPE_H

#include "config/job.h"
#include "model/model.h"

typedef struct wn_recipe {
  wn_stage stage;
  bool train_base, train_indexer;
  wn_selection selection; /* WN_SELECT_DENSE or WN_SELECT_INDEXER */
  bool layer_major;       /* layers outside, sequences inside: only where the base is frozen */
} wn_recipe;

#endif
