/* A running job: what it was asked, what it stands on, what it holds. Created from a job file, by fresh initialisation
 * or by resuming the newest whole checkpoint of its run directory. */
#ifndef WN_TRAIN_RUN_H
#define WN_TRAIN_RUN_H

#include "data/dataset.h"
#include "train/checkpoint.h"
#include "train/recipe.h"

typedef struct wn_run {
  wn_log *log;     /* borrowed */
  wn_world *world; /* borrowed */
  wn_recipe recipe;
  wn_job job;
  wn_job_source *source;
  wn_device *device;
  wn_model *model;
  wn_store *store;
  wn_dataset *train, *valid;            /* valid NULL: none given */
  wn_tensor *by_param, *grads_by_param; /* [table.n]: filled by the store, layer by layer */
  wn_state state;
  bool resumed;
  int lock_fd; /* RUN_DIR/lock, held by rank 0 while the run lasts; -1 elsewhere */
} wn_run;

/* Everything that can be found wrong without training is found here, each in one sentence. Collective. */
WN_MUST_USE wn_status wn_run_create(wn_run **out, wn_recipe recipe, const wn_job *job, wn_job_source *source,
                                    wn_world *world, wn_log *log);
/* The same on a dry device (base/device.h) and a dry world: no weights, no files, blank data. Of `init` only
 * config.json has to be there. Takes the device, whatever comes of it. For planning. */
WN_MUST_USE wn_status wn_run_create_dry(wn_run **out, wn_recipe recipe, const wn_job *job, wn_world *world,
                                        wn_device *device);
void wn_run_free(wn_run *run);
/* What wn_run_create would refuse, without weights or memory: model configuration, indexer, divisibility, datasets. For
 * --check. */
WN_MUST_USE wn_status wn_run_check(wn_recipe recipe, const wn_job *job, wn_world *world, wn_log *log);
wn_checkpoint_plan wn_run_checkpoint_plan(const wn_run *run);

#endif
