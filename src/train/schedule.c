#include "train/schedule.h"

#include <math.h>

double wn_schedule_factor(const wn_job *job, int64_t step) {
  int64_t warmup = job->lr_schedule.warmup_steps;
  if (step < warmup) return (double)(step + 1) / (double)warmup;
  if (job->lr_schedule.type == WN_SCHEDULE_CONSTANT) return 1.0;
  int64_t decay = job->lr_schedule.decay_steps ? job->lr_schedule.decay_steps : job->training.steps - warmup;
  double floor = job->lr_schedule.min_lr;
  if (decay <= 0 || step - warmup >= decay) return floor;
  double progress = (double)(step - warmup) / (double)decay;
  double shape = job->lr_schedule.type == WN_SCHEDULE_LINEAR ? 1.0 - progress
                                                             : 0.5 * (1.0 + cos(3.14159265358979323846 * progress));
  return floor + (1.0 - floor) * shape;
}
