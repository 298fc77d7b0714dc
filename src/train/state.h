/* What a run is apart from its weights and moments: saved as state.json in every checkpoint. */
#ifndef WN_TRAIN_STATE_H
#define WN_TRAIN_STATE_H

#include <stdbool.h>
#include <stdint.h>

typedef struct wn_state {
  int64_t step;                    /* optimizer steps done or skipped: the next step's number */
  int64_t tokens;                  /* input tokens seen by this run */
  int64_t adam_base, adam_indexer; /* Adam clocks: updates done */
  int64_t router_bias_updates;
  int64_t skipped, skipped_in_a_row;
  bool indexer_trained; /* the indexer of this model has been through a warm-up (or came from a V3.2 model) */
} wn_state;

#endif
