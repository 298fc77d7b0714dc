/* The run directory's CSV dashboards: train, speed, layers, eval, events (columns: docs/formats.md). Rank 0 writes. */
#ifndef WN_TRAIN_METRICS_H
#define WN_TRAIN_METRICS_H

#include "train/evaluate.h"
#include "train/step.h"

typedef struct wn_metrics wn_metrics;

/* Opens the tables of RUN_DIR/metrics, cut back to rows of steps up to `last_step` (0: all rows go). */
WN_MUST_USE wn_status wn_metrics_create(wn_metrics **out, const char *run_dir, int64_t last_step);
WN_MUST_USE wn_status wn_metrics_close(wn_metrics *metrics); /* NULL is fine */

typedef struct wn_train_row {
  int64_t step, tokens;
  double lr, indexer_lr, loss, lm_loss, indexer_kl, grad_norm, indexer_grad_norm; /* NaN: not measured */
  bool skipped;
} wn_train_row;
typedef struct wn_speed_row {
  int64_t step;
  double step_ms, data_ms, comm_wait_ms, tokens_per_s, tflops, mfu_pct, mem_peak_gib;
} wn_speed_row;

/* All do nothing with metrics NULL (ranks other than 0). */
WN_MUST_USE wn_status wn_metrics_train(wn_metrics *metrics, const wn_train_row *row);
WN_MUST_USE wn_status wn_metrics_speed(wn_metrics *metrics, const wn_speed_row *row);
/* One row a layer; with_kl and with_stats false leave those cells empty. */
WN_MUST_USE wn_status wn_metrics_layers(wn_metrics *metrics, int64_t step, const wn_model_config *config,
                                        const wn_step_sums *sums, bool with_kl, bool with_stats);
WN_MUST_USE wn_status wn_metrics_eval(wn_metrics *metrics, int64_t step, const char *split, const char *selection,
                                      const wn_eval_result *result);
WN_MUST_USE wn_status wn_metrics_event(wn_metrics *metrics, int64_t step, int32_t rank, const char *kind,
                                       const char *detail);

#endif
