/* Learning rates as pure functions of the step. */
#ifndef WN_TRAIN_SCHEDULE_H
#define WN_TRAIN_SCHEDULE_H

#include "config/job.h"

/* Factor of the peak learning rate for the update of `step` (from 0): linear from 1/warmup_steps up to 1 over
 * warmup_steps, then constant, linear or cosine down to min_lr over decay_steps (0: up to total_steps), then min_lr. */
double wn_schedule_factor(const wn_job *job, int64_t step);

#endif
