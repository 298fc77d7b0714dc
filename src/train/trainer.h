/* The loop that all stages share: steps, updates, metrics, evaluation, checkpoints, signals. */
#ifndef WN_TRAIN_TRAINER_H
#define WN_TRAIN_TRAINER_H

#include "train/run.h"

/* Runs the job from its state to training.steps and saves the last checkpoint. SIGINT and SIGTERM finish the step,
 * save, and give WN_E_INTERRUPTED. More than training.max_skipped_in_a_row non-finite steps in a row: WN_E_TRAINING.
 * Collective. */
WN_MUST_USE wn_status wn_train(wn_recipe recipe, const wn_job *job, wn_job_source *source, wn_world *world,
                               wn_log *log);

/* What a run asks of its device, in order, until its first step is done and its first evaluation (where the job has
 * any), on a dry device: its arenas then know what the run takes. *flops is the step's counted work, all ranks;
 * *traffic is what the step moved. */
WN_MUST_USE wn_status wn_train_rehearse(wn_run *run, double *flops, wn_traffic *traffic);

#endif
