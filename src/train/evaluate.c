#include "train/evaluate.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "train/batch.h"

typedef struct evaluation {
  const wn_eval_settings *settings;
  wn_pass pass;
  wn_tensor *by_param;
  float *logp;  /* [seq_len] host */
  float *stats; /* [sample_rows, WN_N_STATS] host */
  int32_t sample_rows;
  double sums[WN_N_STATS];
} evaluation;

static wn_status sample(evaluation *ev, wn_tensor *out, int64_t window) {
  wn_device *device = ev->settings->device;
  int32_t *rows = (int32_t *)(void *)ev->stats; /* same element size, used before the stats are */
  uint64_t key = wn_rng_u64(ev->settings->seed, WN_RNG_SAMPLE, (uint64_t)window);
  for (int32_t i = 0; i < ev->sample_rows; i++)
    rows[i] = (int32_t)wn_rng_permute(key, WN_RNG_SAMPLE, (uint64_t)ev->settings->seq_len, (uint64_t)i);
  WN_TRY(wn_device_tensor(device, out, device->stash, "sampled rows", WN_INDEX, 1, ev->sample_rows, 0, 0, 0));
  return device->ops->upload(device, out, rows);
}

static wn_status layers_forward(evaluation *ev, const wn_batch *batch, wn_tensor h[2], const wn_tensor *rows) {
  const wn_eval_settings *s = ev->settings;
  wn_device *device = s->device;
  wn_layer_tensors weights;
  wn_layer_measures measures = {0};
  wn_tensor picks[2];
  int32_t layers = s->model->config.num_hidden_layers;
  if (rows) {
    measures.sample = *rows;
    WN_TRY(wn_device_tensor(device, &measures.stats, device->stash, "selection stats", WN_STAT, 2, rows->dim[0],
                            WN_N_STATS, 0, 0));
    for (int i = 0; i < 2; i++)
      WN_TRY(wn_device_tensor(device, &picks[i], device->stash, "sampled picks", WN_INDEX, 2, rows->dim[0],
                              ev->pass.topk, 0, 0));
  }
  for (int32_t l = 0; l < layers; l++) {
    WN_TRY(wn_layer_acquire(&weights, &s->model->table, s->store, l, ev->by_param));
    WN_TRY(wn_store_prefetch(s->store, l + 1));
    if (rows) {
      measures.picks = picks[l & 1];
      measures.picks_prev = l > 0 ? picks[(l + 1) & 1] : (wn_tensor){0};
    }
    WN_TRY(wn_layer_forward(s->model, l, &weights, NULL, &ev->pass, &batch->rows, &h[(l + 1) & 1], NULL, &h[l & 1],
                            NULL, &measures));
    WN_TRY(wn_store_release(s->store, l));
    if (!rows) continue;
    WN_TRY(device->ops->download(device, ev->stats, &measures.stats));
    for (int32_t i = 0; i < ev->sample_rows; i++) {
      const float *row = ev->stats + (int64_t)i * WN_N_STATS;
      if (row[WN_STAT_COUNTED] != 1.0f) continue;
      for (int32_t c = 0; c < WN_N_STATS; c++)
        if (c != WN_STAT_IOU_PREV || l > 0) ev->sums[c] += (double)row[c];
    }
  }
  return NULL;
}

/* One window through the model; `counts` false: the pass only keeps this rank in step with the others' collectives. */
static wn_status one_window(evaluation *ev, int64_t window, bool counts, wn_eval_sequence *out) {
  const wn_eval_settings *s = ev->settings;
  wn_device *device = s->device;
  size_t mark = wn_arena_mark(device->stash), host_mark = wn_arena_mark(device->host);
  wn_batch batch;
  wn_layer_tensors weights;
  wn_tensor h[2], logp, rows;
  int32_t last = s->model->config.num_hidden_layers, T = s->seq_len;
  double before[WN_N_STATS];
  memcpy(before, ev->sums, sizeof before);
  WN_TRY(wn_batch_load(&batch, device, s->dataset, (wn_batch_settings){.seq_len = T, .document_mask = s->document_mask},
                       &window, 1));
  for (int i = 0; i < 2; i++)
    WN_TRY(wn_device_tensor(device, &h[i], device->stash, "hidden states", WN_ACT, 2, T, s->model->config.hidden_size,
                            0, 0));
  WN_TRY(wn_device_tensor(device, &logp, device->stash, "token log-probabilities", WN_STAT, 1, T, 0, 0, 0));
  if (ev->sample_rows) WN_TRY(sample(ev, &rows, window));
  WN_TRY(wn_layer_acquire(&weights, &s->model->table, s->store, -1, ev->by_param));
  WN_TRY(wn_model_embed(s->model, &weights, &h[0], &batch.tokens));
  WN_TRY(wn_store_release(s->store, -1));
  WN_TRY(layers_forward(ev, &batch, h, ev->sample_rows ? &rows : NULL));
  WN_TRY(wn_layer_acquire(&weights, &s->model->table, s->store, last, ev->by_param));
  WN_TRY(wn_model_head(s->model, &weights, NULL, &logp, NULL, &h[last & 1], &batch.target, NULL));
  WN_TRY(wn_store_release(s->store, last));
  WN_TRY(device->ops->download(device, ev->logp, &logp));
  if (counts) {
    *out = (wn_eval_sequence){.tokens = batch.predicted, .scored = batch.scored_count};
    for (int32_t i = 0; i < T; i++) {
      out->loss_sum -= (double)ev->logp[i]; /* 0 where nothing is predicted */
      if (batch.scored[i]) out->scored_sum -= (double)ev->logp[i];
    }
  } else {
    memcpy(ev->sums, before, sizeof before);
  }
  wn_arena_release(device->stash, mark);
  wn_arena_release(device->host, host_mark);
  return NULL;
}

static void finish(wn_eval_result *out, const double *sums, int32_t layers) {
  double loss = 0, scored = 0;
  for (int64_t i = 0; i < out->n_seqs; i++) {
    loss += out->sequences[i].loss_sum;
    scored += out->sequences[i].scored_sum;
    out->tokens += out->sequences[i].tokens;
    out->scored += out->sequences[i].scored;
  }
  out->loss = out->tokens ? loss / (double)out->tokens : NAN;
  out->loss_scored = out->scored ? scored / (double)out->scored : NAN;
  double counted = sums[WN_STAT_COUNTED];
  for (int32_t c = 0; c < WN_N_STATS; c++) out->stats[c] = counted > 0 ? sums[c] / counted : NAN;
  /* the first layer has no previous picks: that column's mean is over the others */
  out->stats[WN_STAT_IOU_PREV] = layers > 1 ? out->stats[WN_STAT_IOU_PREV] * layers / (layers - 1) : NAN;
}

static wn_status share(const wn_eval_settings *s, wn_eval_result *out, double *sums) {
  enum { FIELDS = 4 };
  size_t n = (size_t)out->n_seqs;
  double *flat = calloc(n * FIELDS + WN_N_STATS, sizeof *flat);
  if (!flat) return WN_FAIL(WN_E_MEMORY, "out of memory for the evaluation's sums");
  for (size_t i = 0; i < n; i++) {
    const wn_eval_sequence *q = &out->sequences[i];
    double fields[FIELDS] = {q->loss_sum, q->scored_sum, (double)q->tokens, (double)q->scored};
    memcpy(flat + i * FIELDS, fields, sizeof fields);
  }
  memcpy(flat + n * FIELDS, sums, WN_N_STATS * sizeof *sums);
  wn_status status = wn_group_sum_f64(wn_world_all(s->world), flat, n * FIELDS + WN_N_STATS);
  for (size_t i = 0; i < n && !status; i++)
    out->sequences[i] = (wn_eval_sequence){flat[i * FIELDS], flat[i * FIELDS + 1], (int64_t)flat[i * FIELDS + 2],
                                           (int64_t)flat[i * FIELDS + 3]};
  memcpy(sums, flat + n * FIELDS, WN_N_STATS * sizeof *sums);
  free(flat);
  return status;
}

wn_status wn_evaluate(wn_eval_result *out, const wn_eval_settings *s, wn_selection selection) {
  wn_status status = NULL;
  int64_t windows = wn_dataset_windows(s->dataset, s->seq_len),
          n = s->n_seqs > 0 && s->n_seqs < windows ? s->n_seqs : windows;
  int64_t ranks = wn_world_size(s->world), rank = wn_world_rank(s->world);
  bool quality = s->model->config.has_indexer && s->sample_rows > 0;
  evaluation ev = {.settings = s};
  ev.sample_rows = !quality ? 0 : s->sample_rows < s->seq_len ? s->sample_rows : s->seq_len;
  ev.pass = (wn_pass){.selection = selection,
                      .topk = s->topk < s->seq_len ? s->topk : s->seq_len,
                      .rows_per_sequence = s->seq_len,
                      .seed = s->seed};
  ev.by_param = calloc((size_t)s->model->table.n, sizeof *ev.by_param);
  ev.logp = calloc((size_t)s->seq_len, sizeof *ev.logp);
  ev.stats = calloc((size_t)ev.sample_rows * WN_N_STATS + 1, sizeof *ev.stats);
  *out = (wn_eval_result){.n_seqs = n, .sequences = calloc((size_t)n, sizeof *out->sequences)};
  if (!ev.by_param || !ev.logp || !ev.stats || !out->sequences) {
    status = WN_FAIL(WN_E_MEMORY, "out of memory for the evaluation");
    goto done;
  }
  WN_ASSERT(s->device->dtype_of[WN_STAT] == WN_F32, "statistics in %s", wn_dtype_name(s->device->dtype_of[WN_STAT]));
  for (int64_t i = rank; i - rank < n; i += ranks) { /* every rank makes the same number of passes */
    int64_t at = i < n ? i : n - 1;
    WN_TRY_GOTO(status, done, one_window(&ev, at * windows / n, i < n, &out->sequences[at]));
  }
  WN_TRY_GOTO(status, done, share(s, out, ev.sums));
  finish(out, ev.sums, s->model->config.num_hidden_layers);
done:
  free(ev.by_param);
  free(ev.logp);
  free(ev.stats);
  if (status) wn_eval_result_free(out);
  return status;
}

void wn_eval_result_free(wn_eval_result *result) {
  free(result->sequences);
  result->sequences = NULL;
}
