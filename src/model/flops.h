/* Counted work: the one place where a FLOP is defined, for bench, metrics and the planner. One multiply-add is two
 * FLOPs; causal work counts the visible pairs only, sparse work the selected keys only; the recomputation of layers is
 * not counted. */
#ifndef WN_MODEL_FLOPS_H
#define WN_MODEL_FLOPS_H

#include "config/model_config.h"

/* Dense BF16, of H100 and H200 (NVIDIA's datasheet, SXM): what a GPU's mfu_pct is a share of. */
#define WN_HOPPER_BF16_FLOPS 989.5e12

typedef struct wn_flops_work {
  double rows;           /* tokens through the layers */
  double visible_pairs;  /* (row, key) pairs that dense attention covers */
  double selected_pairs; /* pairs that sparse attention covers; 0: attention is dense */
  bool backward_base;    /* gradients of all weights and activations */
  bool indexer;          /* the indexer's projections and KL with their gradients */
  bool head;             /* final norm and logits */
} wn_flops_work;

double wn_flops(const wn_model_config *config, const wn_flops_work *work);

#endif
