/* How many parameters a model has, and where: from its configuration alone. */
#ifndef WN_MODEL_COUNTS_H
#define WN_MODEL_COUNTS_H

#include "config/model_config.h"

typedef enum wn_model_part {
  WN_PART_EMBEDDING,
  WN_PART_ATTENTION, /* its norms of the latents apart */
  WN_PART_INDEXER,   /* with its key's norm */
  WN_PART_DENSE_MLP,
  WN_PART_EXPERTS, /* the routed ones */
  WN_PART_SHARED_EXPERTS,
  WN_PART_ROUTER, /* with its selection bias */
  WN_PART_NORMS,
  WN_PART_HEAD,
  WN_N_PARTS
} wn_model_part;
const char *wn_model_part_name(wn_model_part part); /* "routed experts" */

typedef struct wn_model_counts {
  int64_t part[WN_N_PARTS]; /* of the main model */
  int64_t main;             /* their sum */
  /* What one token passes through: everything but the experts that it does not take; the embedding counts whole. */
  int64_t active;
  /* Layers for multi-token prediction: each a layer of the model's last kind (with indexer, where the model has one),
   * two norms, a projection [D,2D] and a norm; in files also a copy of embedding and head. */
  int64_t mtp_own, mtp_copies;
  int64_t total; /* main + mtp_own + mtp_copies: what the files of a release hold */
} wn_model_counts;

WN_MUST_USE wn_status wn_model_count(wn_model_counts *out, const wn_model_config *config, int32_t mtp_layers);

#endif
