#include "train/metrics.h"

#include <math.h>
#include <stdlib.h>

#include "base/time.h"
#include "io/csv.h"

enum { TRAIN, SPEED, LAYERS, EVAL, EVENTS, N_TABLES };

static const char *const train_columns[] = {"step",    "tokens",     "lr",        "indexer_lr",        "loss",
                                            "lm_loss", "indexer_kl", "grad_norm", "indexer_grad_norm", "skipped"};
static const char *const speed_columns[] = {"step",         "step_ms", "data_ms", "comm_wait_ms",
                                            "tokens_per_s", "tflops",  "mfu_pct", "mem_peak_gib"};
static const char *const layers_columns[] = {"step",
                                             "layer",
                                             "kl",
                                             "kl_dense",
                                             "kl_uniform",
                                             "mass_at_k",
                                             "mass_best",
                                             "mass_recent",
                                             "mass_sink",
                                             "mass_random",
                                             "recall_at_k",
                                             "top1_hit",
                                             "entropy_target",
                                             "entropy_index",
                                             "select_dist_mean",
                                             "select_local_ratio",
                                             "select_iou_prev",
                                             "density",
                                             "expert_load_max"};
static const char *const eval_columns[] = {"step", "split", "selection", "tokens", "loss", "loss_scored"};
static const char *const events_columns[] = {"time", "step", "rank", "kind", "detail"};

#define COUNT(a) ((int32_t)(sizeof(a) / sizeof *(a)))
static const struct {
  const char *name;
  const char *const *columns;
  int32_t n;
} tables[N_TABLES] = {
    [TRAIN] = {"train", train_columns, COUNT(train_columns)},
    [SPEED] = {"speed", speed_columns, COUNT(speed_columns)},
    [LAYERS] = {"layers", layers_columns, COUNT(layers_columns)},
    [EVAL] = {"eval", eval_columns, COUNT(eval_columns)},
    [EVENTS] = {"events", events_columns, COUNT(events_columns)},
};

struct wn_metrics {
  wn_csv *csv[N_TABLES];
};

wn_status wn_metrics_create(wn_metrics **out, const char *run_dir, int64_t last_step) {
  wn_metrics *metrics = calloc(1, sizeof *metrics);
  wn_status status = NULL;
  if (!metrics) return WN_FAIL(WN_E_MEMORY, "out of memory for the metrics");
  for (int t = 0; t < N_TABLES; t++) {
    char path[WN_PATH_BYTES];
    WN_TRY_GOTO(status, fail, wn_path(path, "%s/metrics/%s.csv", run_dir, tables[t].name));
    /* events tell what happened, also to steps that a resumed run does again: they are never cut */
    if (t != EVENTS) WN_TRY_GOTO(status, fail, wn_csv_cut(path, "step", last_step));
    WN_TRY_GOTO(status, fail, wn_csv_open(&metrics->csv[t], path, tables[t].columns, tables[t].n));
  }
  *out = metrics;
  return NULL;
fail:
  return wn_status_first(status, wn_metrics_close(metrics));
}

wn_status wn_metrics_close(wn_metrics *metrics) {
  wn_status status = NULL;
  if (!metrics) return NULL;
  for (int t = 0; t < N_TABLES; t++)
    if (metrics->csv[t]) WN_KEEP_FIRST(status, wn_csv_close(metrics->csv[t]));
  free(metrics);
  return status;
}

wn_status wn_metrics_train(wn_metrics *metrics, const wn_train_row *row) {
  if (!metrics) return NULL;
  wn_csv *csv = metrics->csv[TRAIN];
  const double cells[] = {row->lr,        row->indexer_lr,       row->loss, row->lm_loss, row->indexer_kl,
                          row->grad_norm, row->indexer_grad_norm};
  wn_csv_int(csv, row->step);
  wn_csv_int(csv, row->tokens);
  for (int32_t i = 0; i < COUNT(cells); i++) wn_csv_real(csv, cells[i]);
  wn_csv_int(csv, row->skipped);
  return wn_csv_end_row(csv);
}

wn_status wn_metrics_speed(wn_metrics *metrics, const wn_speed_row *row) {
  if (!metrics) return NULL;
  wn_csv *csv = metrics->csv[SPEED];
  const double cells[] = {row->step_ms, row->data_ms, row->comm_wait_ms, row->tokens_per_s,
                          row->tflops,  row->mfu_pct, row->mem_peak_gib};
  wn_csv_int(csv, row->step);
  for (int32_t i = 0; i < COUNT(cells); i++) wn_csv_real(csv, cells[i]);
  return wn_csv_end_row(csv);
}

static double load_max(const int64_t *load, int32_t n) {
  int64_t most = 0, total = 0;
  for (int32_t e = 0; e < n; e++) {
    total += load[e];
    if (load[e] > most) most = load[e];
  }
  return total ? (double)most * n / (double)total : NAN;
}

wn_status wn_metrics_layers(wn_metrics *metrics, int64_t step, const wn_model_config *config, const wn_step_sums *sums,
                            bool with_kl, bool with_stats) {
  static const wn_stat_column order[] = {
      WN_STAT_KL_DENSE,      WN_STAT_KL_UNIFORM,  WN_STAT_MASS_AT_K,    WN_STAT_MASS_BEST, WN_STAT_MASS_RECENT,
      WN_STAT_MASS_SINK,     WN_STAT_MASS_RANDOM, WN_STAT_RECALL_AT_K,  WN_STAT_TOP1_HIT,  WN_STAT_ENTROPY_TARGET,
      WN_STAT_ENTROPY_INDEX, WN_STAT_SELECT_DIST, WN_STAT_SELECT_LOCAL, WN_STAT_IOU_PREV,  WN_STAT_DENSITY};
  if (!metrics) return NULL;
  wn_csv *csv = metrics->csv[LAYERS];
  for (int32_t l = 0; l < config->num_hidden_layers; l++) {
    const double *stats = sums->stats + (int64_t)l * WN_N_STATS;
    double counted = stats[WN_STAT_COUNTED];
    wn_csv_int(csv, step);
    wn_csv_int(csv, l);
    wn_csv_real(csv, with_kl && sums->kl_rows ? sums->kl[l] / (double)sums->kl_rows : NAN);
    for (int32_t c = 0; c < COUNT(order); c++) {
      bool absent = !with_stats || counted == 0 || (order[c] == WN_STAT_IOU_PREV && l == 0);
      wn_csv_real(csv, absent ? NAN : stats[order[c]] / counted);
    }
    wn_csv_real(csv, wn_model_config_is_moe(config, l)
                         ? load_max(sums->load + (int64_t)l * config->n_routed_experts, config->n_routed_experts)
                         : NAN);
    WN_TRY(wn_csv_end_row(csv));
  }
  return NULL;
}

wn_status wn_metrics_eval(wn_metrics *metrics, int64_t step, const char *split, const char *selection,
                          const wn_eval_result *result) {
  if (!metrics) return NULL;
  wn_csv *csv = metrics->csv[EVAL];
  wn_csv_int(csv, step);
  wn_csv_text(csv, split);
  wn_csv_text(csv, selection);
  wn_csv_int(csv, result->tokens);
  wn_csv_real(csv, result->loss);
  wn_csv_real(csv, result->loss_scored);
  return wn_csv_end_row(csv);
}

wn_status wn_metrics_event(wn_metrics *metrics, int64_t step, int32_t rank, const char *kind, const char *detail) {
  if (!metrics) return NULL;
  char when[32];
  wn_csv *csv = metrics->csv[EVENTS];
  wn_time_utc(when);
  wn_csv_text(csv, when);
  wn_csv_int(csv, step);
  wn_csv_int(csv, rank);
  wn_csv_text(csv, kind);
  wn_csv_text(csv, detail);
  return wn_csv_end_row(csv);
}
