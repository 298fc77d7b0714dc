/* The work of one optimizer step on this rank's sequences: forward and backward, sequence-major or layer-major,
 * gradients left as sums in the store's pieces. Every result is a sum over the global batch, the same on all ranks. */
#ifndef WN_TRAIN_STEP_H
#define WN_TRAIN_STEP_H

#include "train/run.h"

typedef struct wn_step_sums {
  int64_t sequences, rows, predicted, kl_rows, pairs, selected; /* over the global batch */
  double neg_logp;                                              /* -sum of log-probabilities, in sequence order */
  double balance;                                               /* sum over sequences and layers of sum_e f_e P_e */
  double *kl;                                                   /* [L] sum over rows */
  double *stats; /* [L * WN_N_STATS] sums over the counted sampled rows; WN_STAT_COUNTED is their number */
  int64_t *load; /* [L * E] tokens an expert */
  double data_s; /* time this rank spent reading windows */
} wn_step_sums;

WN_MUST_USE wn_status wn_step_sums_create(wn_step_sums *out, const wn_model_config *config);
void wn_step_sums_free(wn_step_sums *sums);
/* with_stats: make selection_stats on metrics.sample_rows rows of every sequence. */
WN_MUST_USE wn_status wn_step_run(wn_run *run, int64_t step, bool with_stats, wn_step_sums *sums);

#endif
