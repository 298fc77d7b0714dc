/* Held-out loss of a model under any of the six selections, per sequence, with the selection's quality on sampled rows.
 */
#ifndef WN_TRAIN_EVALUATE_H
#define WN_TRAIN_EVALUATE_H

#include "data/dataset.h"
#include "dist/world.h"
#include "model/model.h"

typedef struct wn_eval_settings {
  wn_world *world;
  wn_device *device;
  wn_model *model;
  wn_store *store;
  const wn_dataset *dataset;
  int32_t seq_len;
  bool document_mask;
  int64_t n_seqs;      /* windows spread evenly over the data; 0 or more than there are: all */
  int32_t topk;        /* picks a row */
  int32_t sample_rows; /* rows a sequence for the quality columns; 0: none. Only where the model has an indexer */
  uint64_t seed;
} wn_eval_settings;

typedef struct wn_eval_sequence {
  double loss_sum, scored_sum;
  int64_t tokens, scored;
} wn_eval_sequence; /* sums of -logp, nats */

typedef struct wn_eval_result {
  int64_t n_seqs, tokens, scored;
  double loss, loss_scored;    /* means over tokens; loss_scored NaN where nothing is marked */
  wn_eval_sequence *sequences; /* [n_seqs], the same on all ranks */
  double stats[WN_N_STATS];    /* means over sampled rows and layers; NaN where not measured */
} wn_eval_result;

/* Collective. */
WN_MUST_USE wn_status wn_evaluate(wn_eval_result *out, const wn_eval_settings *settings, wn_selection selection);
void wn_eval_result_free(wn_eval_result *result);

#endif
