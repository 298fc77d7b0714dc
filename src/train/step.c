#include "train/step.h"

#include <stdlib.h>
#include <string.h>

#include "base/range.h"
#include "base/rng.h"
#include "base/time.h"
#include "train/batch.h"

/* ---- sums ---- */

wn_status wn_step_sums_create(wn_step_sums *out, const wn_model_config *config) {
  size_t layers = (size_t)config->num_hidden_layers;
  *out = (wn_step_sums){
      .kl = calloc(layers, sizeof(double)),
      .stats = calloc(layers * WN_N_STATS, sizeof(double)),
      .load = calloc(layers * (size_t)config->n_routed_experts + 1, sizeof(int64_t)),
  };
  if (out->kl && out->stats && out->load) return NULL;
  wn_step_sums_free(out);
  return WN_FAIL(WN_E_MEMORY, "out of memory for the step's sums");
}

void wn_step_sums_free(wn_step_sums *sums) {
  free(sums->kl);
  free(sums->stats);
  free(sums->load);
  *sums = (wn_step_sums){0};
}

/* What a step needs besides the run, for its length. Host results of one sequence each stand apart, so that the global
 * sums run in sequence order whatever the number of ranks. */
typedef struct work {
  wn_run *run;
  int64_t step;
  bool with_stats, keeps_attention;
  wn_pass pass;
  int32_t n_micro, sample_rows;        /* sampled rows a sequence */
  wn_batch *batches;                   /* [n_micro] */
  int64_t first_sequence;              /* of this rank, within the global batch */
  double *sequence_logp, *sequence_kl; /* [B], [B * L] */
  /* Measures stay on the device until the step's end, so that the host waits once. One row a micro-batch and layer,
   * m * L + l; data NULL: not measured. */
  wn_tensor logp;           /* [n_micro, n] STAT */
  wn_tensor kl;             /* [n_micro * L, n] STAT */
  wn_tensor stats, balance; /* [n_micro * L, s * WN_N_STATS], [n_micro * L, 1] STAT */
  wn_tensor load;           /* [L, E] INDEX, over the micro-batches */
  wn_step_sums *sums;
} work;

static void *host_array(wn_device *device, const char *name, int64_t bytes, wn_status *status) {
  void *out = NULL;
  if (!*status) *status = wn_arena_alloc(device->host, &out, name, (size_t)bytes);
  if (!*status) memset(out, 0, (size_t)bytes);
  return out;
}

static wn_status zeroed(wn_device *device, wn_tensor *out, const char *name, wn_role role, int64_t rows,
                        int64_t width) {
  WN_TRY(wn_device_tensor(device, out, device->stash, name, role, 2, rows, width, 0, 0));
  return device->ops->zero(device, out);
}

static wn_tensor row_of(wn_tensor t, int64_t row) {
  return wn_tensor_view(wn_tensor_slice(t, 0, row, 1), 1, t.dim[1], 0, 0, 0);
}

/* Host copy of a STAT or INDEX tensor as doubles; in the host arena, above the caller's mark. */
static wn_status read_doubles(wn_device *device, double **out, const wn_tensor *t) {
  int64_t n = wn_tensor_count(t);
  void *values;
  wn_tensor raw;
  WN_TRY(wn_arena_alloc(device->host, &values, "host copies", (size_t)n * sizeof **out));
  *out = values;
  WN_TRY(wn_tensor_alloc(&raw, device->host, "host copies", t->dtype, 1, n, 0, 0, 0));
  if (device->dry) return NULL; /* nothing was measured: only the room counts */
  WN_TRY(device->ops->download(device, raw.data, t));
  for (int64_t i = 0; i < n; i++) {
    if (t->dtype == WN_F32)
      (*out)[i] = (double)((const float *)raw.data)[i];
    else if (t->dtype == WN_F64)
      (*out)[i] = ((const double *)raw.data)[i];
    else
      (*out)[i] = ((const int32_t *)raw.data)[i];
  }
  return NULL;
}

/* ---- loading ---- */

static wn_status load_batches(work *w) {
  wn_run *run = w->run;
  const wn_job *job = &run->job;
  double start = wn_time_s();
  int32_t micro = job->training.micro_batch_seqs;
  int64_t windows = wn_dataset_windows(run->train, job->data.seq_len), chosen[256];
  WN_ASSERT(micro <= 256, "micro batch of %d", micro);
  int64_t counts[5] = {0};
  wn_batch_settings settings = {job->data.seq_len, job->data.document_mask, 0};
  if (run->recipe.selection != WN_SELECT_DENSE) settings.topk = run->model->config.index_topk;
  for (int32_t m = 0; m < w->n_micro; m++) {
    for (int32_t s = 0; s < micro; s++)
      chosen[s] = wn_sampler_window(job->training.seed, windows, w->step, job->training.global_batch_seqs,
                                    w->first_sequence + (int64_t)m * micro + s);
    WN_TRY(wn_batch_load(&w->batches[m], run->device, run->train, settings, chosen, micro));
    counts[0] += w->batches[m].predicted;
    counts[1] += w->batches[m].kl_rows;
    counts[2] += w->batches[m].pairs;
    counts[3] += w->batches[m].n_rows;
    counts[4] += w->batches[m].selected;
  }
  WN_TRY(wn_group_sum_i64(wn_world_all(run->world), counts, 5));
  w->sums->predicted = counts[0];
  w->sums->kl_rows = counts[1];
  w->sums->pairs = counts[2];
  w->sums->rows = counts[3];
  w->sums->selected = counts[4];
  w->sums->sequences = job->training.global_batch_seqs;
  w->sums->data_s = wn_time_s() - start;
  return NULL;
}

/* ---- measures ---- */

static int compare_ints(const void *a, const void *b) {
  int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
  return (x > y) - (x < y);
}

/* Rows for selection_stats: of each sequence `sample_rows` distinct ones, a pure function of (seed, step, sequence). */
static wn_status sample_rows(work *w, wn_tensor *out, int32_t m) {
  const wn_batch *batch = &w->batches[m];
  wn_device *device = w->run->device;
  int32_t s = w->sample_rows, n = s * batch->n_seqs;
  wn_status status = NULL;
  int32_t *rows = host_array(device, "sampled rows", (int64_t)n * 4, &status);
  WN_TRY(status);
  for (int32_t q = 0; q < batch->n_seqs; q++) {
    uint64_t sequence = (uint64_t)(w->first_sequence + (int64_t)m * batch->n_seqs + q);
    uint64_t key = wn_rng_u64(w->run->job.training.seed, WN_RNG_SAMPLE, (uint64_t)w->step << 24 | sequence);
    for (int32_t i = 0; i < s; i++)
      rows[q * s + i] =
          q * batch->seq_len + (int32_t)wn_rng_permute(key, WN_RNG_SAMPLE, (uint64_t)batch->seq_len, (uint64_t)i);
    qsort(rows + q * s, (size_t)s, sizeof *rows, compare_ints);
  }
  WN_TRY(wn_device_tensor(device, out, device->stash, "sampled rows", WN_INDEX, 1, n, 0, 0, 0));
  return device->ops->upload(device, out, rows);
}

static wn_status allocate_measures(work *w) {
  const wn_run *run = w->run;
  wn_device *device = run->device;
  const wn_model_config *config = &run->model->config;
  int64_t n = (int64_t)run->job.training.micro_batch_seqs * run->job.data.seq_len, layers = config->num_hidden_layers;
  int64_t rows = w->n_micro * layers,
          sampled = (int64_t)w->sample_rows * run->job.training.micro_batch_seqs * WN_N_STATS;
  if (run->recipe.train_base) WN_TRY(zeroed(device, &w->logp, "token log-probabilities", WN_STAT, w->n_micro, n));
  if (w->pass.indexer_kl) WN_TRY(zeroed(device, &w->kl, "kl", WN_STAT, rows, n));
  if (w->with_stats) WN_TRY(zeroed(device, &w->stats, "selection stats", WN_STAT, rows, sampled));
  if (config->n_routed_experts == 0) return NULL;
  WN_TRY(zeroed(device, &w->balance, "balance", WN_STAT, rows, 1));
  return zeroed(device, &w->load, "expert load", WN_INDEX, layers, config->n_routed_experts);
}

/* What the forward of a layer measures of a micro-batch. */
static wn_layer_measures forward_measures(const work *w, int32_t layer, int32_t m, const wn_tensor *sample,
                                          wn_tensor picks[2]) {
  const wn_model_config *config = &w->run->model->config;
  int64_t row = (int64_t)m * config->num_hidden_layers + layer;
  wn_layer_measures measures = {0};
  if (wn_model_config_is_moe(config, layer)) {
    measures.load = row_of(w->load, layer);
    measures.balance = row_of(w->balance, row);
  }
  if (!sample->data) return measures;
  measures.sample = *sample;
  measures.stats = wn_tensor_split_last(row_of(w->stats, row), sample->dim[0], WN_N_STATS);
  measures.picks = picks[layer & 1];
  if (layer > 0) measures.picks_prev = picks[(layer + 1) & 1];
  return measures;
}

static wn_tensor kl_of(const work *w, int32_t layer, int32_t m) {
  if (!w->kl.data) return (wn_tensor){0};
  return row_of(w->kl, (int64_t)m * w->run->model->config.num_hidden_layers + layer);
}

/* Sums of one row of `values` [n_micro ..., n] by sequence: into[sequence * stride]. */
static void add_by_sequence(const work *w, int32_t m, const double *values, double *into, int64_t stride) {
  const wn_batch *batch = &w->batches[m];
  for (int32_t i = 0; i < batch->n_rows; i++)
    into[(w->first_sequence + (int64_t)m * batch->n_seqs + i / batch->seq_len) * stride] += values[i];
}

static void add_stats(const work *w, int32_t layer, const double *rows, int64_t n) {
  double *sums = w->sums->stats + (int64_t)layer * WN_N_STATS;
  for (int64_t i = 0; i < n; i++) {
    const double *row = rows + i * WN_N_STATS;
    if (row[WN_STAT_COUNTED] != 1) continue;
    for (int32_t c = 0; c < WN_N_STATS; c++)
      if (c != WN_STAT_IOU_PREV || layer > 0) sums[c] += row[c];
  }
}

/* The one time a step that the host waits for the device, but for the experts' loads inside the layers. */
static wn_status read_measures(work *w) {
  wn_device *device = w->run->device;
  int32_t layers = w->run->model->config.num_hidden_layers;
  double *logp = NULL, *kl = NULL, *stats = NULL, *balance = NULL, *load = NULL;
  if (w->logp.data) WN_TRY(read_doubles(device, &logp, &w->logp));
  if (w->kl.data) WN_TRY(read_doubles(device, &kl, &w->kl));
  if (w->stats.data) WN_TRY(read_doubles(device, &stats, &w->stats));
  if (w->balance.data) WN_TRY(read_doubles(device, &balance, &w->balance));
  if (w->load.data) WN_TRY(read_doubles(device, &load, &w->load));
  if (device->dry) return NULL;
  for (int32_t m = 0; m < w->n_micro; m++) {
    int64_t n = w->batches[m].n_rows;
    if (logp) add_by_sequence(w, m, logp + m * n, w->sequence_logp, 1);
    for (int32_t l = 0; l < layers; l++) {
      int64_t row = (int64_t)m * layers + l;
      if (kl) add_by_sequence(w, m, kl + row * n, w->sequence_kl + l, layers);
      if (stats) add_stats(w, l, stats + row * w->stats.dim[1], w->stats.dim[1] / WN_N_STATS);
      if (balance) w->sums->balance += balance[row];
    }
  }
  for (int64_t i = 0; load && i < wn_tensor_count(&w->load); i++) w->sums->load[i] += (int64_t)load[i];
  return NULL;
}

static wn_status begin_sampling(work *w, int32_t m, wn_tensor *sample, wn_tensor picks[2]) {
  wn_device *device = w->run->device;
  *sample = picks[0] = picks[1] = (wn_tensor){0};
  if (!w->with_stats) return NULL;
  WN_TRY(sample_rows(w, sample, m));
  for (int i = 0; i < 2; i++)
    WN_TRY(wn_device_tensor(device, &picks[i], device->stash, "sampled picks", WN_INDEX, 2, sample->dim[0],
                            w->pass.topk, 0, 0));
  return NULL;
}

/* ---- layers and the store ---- */

static wn_status acquire(wn_run *run, int32_t layer, wn_layer_tensors *weights) {
  return wn_layer_acquire(weights, &run->model->table, run->store, layer, run->by_param);
}

static wn_status take_grads(wn_run *run, int32_t layer, wn_layer_tensors *grads) {
  WN_TRY(wn_store_grads(run->store, layer, run->grads_by_param));
  wn_layer_bind(grads, &run->model->table, layer, run->grads_by_param);
  return NULL;
}

static wn_status prefetch(wn_run *run, int32_t layer) {
  if (layer < -1 || layer > run->model->config.num_hidden_layers) return NULL;
  return wn_store_prefetch(run->store, layer);
}

static wn_status hidden(work *w, wn_tensor *out, const char *name, int32_t m) {
  wn_device *device = w->run->device;
  return wn_device_tensor(device, out, device->stash, name, WN_ACT, 2, w->batches[m].n_rows,
                          w->run->model->config.hidden_size, 0, 0);
}

/* ---- stage 1: layers outside, sequences inside; nothing but hidden states between layers ---- */

static wn_status layer_major(work *w) {
  wn_run *run = w->run;
  wn_device *device = run->device;
  int32_t layers = run->model->config.num_hidden_layers;
  wn_status status = NULL;
  wn_tensor *h = host_array(device, "hidden state table", (int64_t)sizeof(wn_tensor) * w->n_micro, &status), spare;
  wn_tensor *sample = host_array(device, "hidden state table", (int64_t)sizeof(wn_tensor) * w->n_micro, &status);
  wn_tensor(*picks)[2] = host_array(device, "hidden state table", (int64_t)sizeof(wn_tensor) * 2 * w->n_micro, &status);
  WN_TRY(status);
  WN_TRY(hidden(w, &spare, "hidden states", 0));
  wn_layer_tensors weights, grads;
  WN_TRY(acquire(run, -1, &weights));
  WN_TRY(prefetch(run, 0));
  for (int32_t m = 0; m < w->n_micro; m++) {
    WN_TRY(hidden(w, &h[m], "hidden states", m));
    WN_TRY(begin_sampling(w, m, &sample[m], picks[m]));
    WN_TRY(wn_model_embed(run->model, &weights, &h[m], &w->batches[m].tokens));
  }
  WN_TRY(wn_store_release(run->store, -1));
  for (int32_t l = 0; l < layers; l++) {
    wn_range_begin("layer", l);
    WN_TRY(acquire(run, l, &weights));
    if (l + 1 < layers) WN_TRY(prefetch(run, l + 1));
    WN_TRY(take_grads(run, l, &grads));
    for (int32_t m = 0; m < w->n_micro; m++) {
      wn_layer_measures measures = forward_measures(w, l, m, &sample[m], picks[m]);
      measures.kl = kl_of(w, l, m);
      WN_TRY(wn_layer_forward(run->model, l, &weights, &grads, &w->pass, &w->batches[m].rows, &spare, NULL, &h[m], NULL,
                              &measures));
      wn_tensor swap = h[m];
      h[m] = spare;
      spare = swap;
    }
    WN_TRY(wn_store_release(run->store, l));
    WN_TRY(wn_store_reduce(run->store, l));
    wn_range_end();
  }
  return NULL;
}

/* ---- stage 2 and pre-training: sequences outside; a layer's input, middle residual and choices are kept, with them
 * what training.keep says; the rest is recomputed ---- */

typedef struct kept {
  wn_tensor h, mid;
  wn_replay replay;
} kept; /* of one layer */

static wn_status keep_layer(work *w, int32_t layer, int32_t m, kept *k) {
  wn_device *device = w->run->device;
  const wn_model_config *config = &w->run->model->config;
  int64_t n = w->batches[m].n_rows;
  WN_TRY(hidden(w, &k->h, "layer inputs", m));
  if (layer == config->num_hidden_layers) return NULL;
  WN_TRY(hidden(w, &k->mid, "middle residuals", m));
  if (wn_model_config_is_moe(config, layer))
    WN_TRY(wn_device_tensor(device, &k->replay.expert, device->stash, "expert replay", WN_INDEX, 2, n,
                            config->num_experts_per_tok, 0, 0));
  if (w->pass.selection != WN_SELECT_DENSE)
    WN_TRY(wn_device_tensor(device, &k->replay.selection, device->stash, "selection replay", WN_INDEX, 2, n,
                            w->pass.topk, 0, 0));
  if (w->run->job.training.keep == WN_KEEP_ALL) WN_TRY(wn_model_keep(w->run->model, &k->replay));
  if (!w->keeps_attention) return NULL;
  WN_TRY(wn_device_tensor(device, &k->replay.o, device->stash, "attention outputs", WN_STAT, 3, n,
                          config->num_attention_heads, config->v_head_dim, 0));
  return wn_device_tensor(device, &k->replay.lse, device->stash, "attention log-sums", WN_STAT, 2, n,
                          config->num_attention_heads, 0, 0);
}

static wn_status forward(work *w, int32_t m, kept *layers_kept) {
  wn_run *run = w->run;
  int32_t layers = run->model->config.num_hidden_layers;
  wn_tensor sample, picks[2];
  wn_pass pass = w->pass;
  pass.indexer_kl = pass.indexer_grads = false; /* both follow the attention's backward */
  WN_TRY(begin_sampling(w, m, &sample, picks));
  wn_layer_tensors weights;
  WN_TRY(acquire(run, -1, &weights));
  WN_TRY(prefetch(run, 0));
  WN_TRY(wn_model_embed(run->model, &weights, &layers_kept[0].h, &w->batches[m].tokens));
  WN_TRY(wn_store_release(run->store, -1));
  for (int32_t l = 0; l < layers; l++) {
    wn_layer_measures measures = forward_measures(w, l, m, &sample, picks);
    wn_range_begin("forward of layer", l);
    WN_TRY(acquire(run, l, &weights));
    WN_TRY(prefetch(run, l + 1));
    WN_TRY(wn_layer_forward(run->model, l, &weights, NULL, &pass, &w->batches[m].rows, &layers_kept[l + 1].h,
                            &layers_kept[l].mid, &layers_kept[l].h, &layers_kept[l].replay, &measures));
    WN_TRY(wn_store_release(run->store, l));
    wn_range_end();
  }
  return NULL;
}

static wn_status head(work *w, int32_t m, const wn_tensor *h, wn_tensor *dh) {
  wn_run *run = w->run;
  const wn_batch *batch = &w->batches[m];
  int32_t last = run->model->config.num_hidden_layers;
  wn_layer_tensors weights, grads;
  wn_tensor logp = row_of(w->logp, m);
  WN_TRY(acquire(run, last, &weights));
  WN_TRY(prefetch(run, last - 1));
  WN_TRY(take_grads(run, last, &grads));
  WN_TRY(wn_model_head(run->model, &weights, &grads, &logp, dh, h, &batch->target, &batch->weight));
  WN_TRY(wn_store_release(run->store, last));
  return wn_store_reduce(run->store, last);
}

static wn_status backward(work *w, int32_t m, kept *layers_kept, wn_tensor *dh) {
  wn_run *run = w->run;
  wn_layer_tensors weights, grads;
  for (int32_t l = run->model->config.num_hidden_layers - 1; l >= 0; l--) {
    wn_layer_measures measures = {.kl = kl_of(w, l, m)};
    wn_replay *replay = &layers_kept[l].replay;
    replay->force_expert = replay->expert.data != NULL;
    replay->force_selection = replay->selection.data != NULL;
    wn_range_begin("backward of layer", l);
    WN_TRY(acquire(run, l, &weights));
    WN_TRY(prefetch(run, l - 1));
    WN_TRY(take_grads(run, l, &grads));
    WN_TRY(wn_layer_backward(run->model, l, &weights, &grads, &w->pass, &w->batches[m].rows, dh, &layers_kept[l].h,
                             &layers_kept[l].mid, replay, &measures));
    WN_TRY(wn_store_release(run->store, l));
    WN_TRY(wn_store_reduce(run->store, l));
    wn_range_end();
  }
  WN_TRY(acquire(run, -1, &weights));
  WN_TRY(take_grads(run, -1, &grads));
  WN_TRY(wn_model_embed_backward(run->model, &grads, dh, &w->batches[m].tokens));
  WN_TRY(wn_store_release(run->store, -1));
  return wn_store_reduce(run->store, -1);
}

static wn_status sequence_major(work *w) {
  wn_device *device = w->run->device;
  int32_t layers = w->run->model->config.num_hidden_layers;
  /* each micro-batch asks for the same memory and moves the same bytes: a rehearsal needs one */
  int32_t n_micro = device->dry ? 1 : w->n_micro;
  for (int32_t m = 0; m < n_micro; m++) {
    size_t mark = wn_arena_mark(device->stash), host_mark = wn_arena_mark(device->host);
    wn_status status = NULL;
    wn_tensor dh;
    kept *layers_kept = host_array(device, "hidden state table", (int64_t)sizeof(kept) * (layers + 1), &status);
    WN_TRY(status);
    for (int32_t l = 0; l <= layers; l++) WN_TRY(keep_layer(w, l, m, &layers_kept[l]));
    WN_TRY(hidden(w, &dh, "hidden gradient", m));
    WN_TRY(forward(w, m, layers_kept));
    wn_range_begin("head", -1);
    WN_TRY(head(w, m, &layers_kept[layers].h, &dh));
    wn_range_end();
    WN_TRY(backward(w, m, layers_kept, &dh));
    wn_arena_release(device->stash, mark);
    wn_arena_release(device->host, host_mark);
  }
  return NULL;
}

/* ---- the step ---- */

static wn_status prepare(work *w) {
  wn_run *run = w->run;
  const wn_job *job = &run->job;
  wn_device *device = run->device;
  const wn_model_config *config = &run->model->config;
  int32_t ranks = wn_world_size(run->world), B = job->training.global_batch_seqs,
          micro = job->training.micro_batch_seqs;
  wn_status status = NULL;
  w->n_micro = B / ranks / micro;
  w->first_sequence = (int64_t)wn_world_rank(run->world) * (B / ranks);
  w->sample_rows = job->metrics.sample_rows < job->data.seq_len ? job->metrics.sample_rows : job->data.seq_len;
  w->with_stats = w->with_stats && config->has_indexer && w->sample_rows > 0;
  w->batches = host_array(device, "batches", (int64_t)sizeof(wn_batch) * w->n_micro, &status);
  w->sequence_logp = host_array(device, "per-sequence sums", (int64_t)sizeof(double) * B, &status);
  w->sequence_kl =
      host_array(device, "per-sequence sums", (int64_t)sizeof(double) * B * config->num_hidden_layers, &status);
  WN_TRY(status);
  WN_TRY(load_batches(w));
  w->pass = (wn_pass){
      .selection = run->recipe.selection,
      .topk = config->has_indexer ? config->index_topk : 0,
      .indexer_kl = run->recipe.train_indexer,
      .indexer_grads = run->recipe.train_indexer,
      .kl_coeff = job->dsa.loss_coeff,
      .rows_per_sequence = job->data.seq_len,
      /* gradients are sums over predicted tokens, divided once at the end: the mean over sequences carries its own
         divisor in */
      .balance_coeff = run->recipe.train_base
                           ? job->moe.balance_loss_coeff * (double)w->sums->predicted / (double)w->sums->sequences
                           : 0,
      .seed = job->training.seed,
  };
  if (w->pass.topk > job->data.seq_len) w->pass.topk = job->data.seq_len;
  w->keeps_attention =
      job->training.keep != WN_KEEP_INPUTS && wn_model_keeps_attention(run->model, &w->pass, job->data.seq_len);
  return allocate_measures(w);
}

static wn_status add_up(work *w) {
  wn_run *run = w->run;
  wn_group *all = wn_world_all(run->world);
  const wn_model_config *config = &run->model->config;
  int32_t B = run->job.training.global_batch_seqs, layers = config->num_hidden_layers;
  WN_TRY(wn_group_sum_f64(all, w->sequence_logp, (size_t)B));
  WN_TRY(wn_group_sum_f64(all, w->sequence_kl, (size_t)B * (size_t)layers));
  WN_TRY(wn_group_sum_f64(all, w->sums->stats, (size_t)layers * WN_N_STATS));
  WN_TRY(wn_group_sum_f64(all, &w->sums->balance, 1));
  WN_TRY(wn_group_sum_i64(all, w->sums->load, (size_t)layers * (size_t)config->n_routed_experts));
  for (int32_t b = 0; b < B; b++) {
    w->sums->neg_logp -= w->sequence_logp[b];
    for (int32_t l = 0; l < layers; l++) w->sums->kl[l] += w->sequence_kl[(int64_t)b * layers + l];
  }
  return NULL;
}

wn_status wn_step_run(wn_run *run, int64_t step, bool with_stats, wn_step_sums *sums) {
  const wn_model_config *config = &run->model->config;
  size_t layers = (size_t)config->num_hidden_layers, mark = wn_arena_mark(run->device->stash);
  size_t host_mark = wn_arena_mark(run->device->host);
  work w = {.run = run, .step = step, .with_stats = with_stats, .sums = sums};
  memset(sums->kl, 0, layers * sizeof *sums->kl);
  memset(sums->stats, 0, layers * WN_N_STATS * sizeof *sums->stats);
  memset(sums->load, 0, layers * (size_t)config->n_routed_experts * sizeof *sums->load);
  sums->neg_logp = sums->balance = 0;
  WN_TRY(prepare(&w));
  WN_TRY(run->recipe.layer_major ? layer_major(&w) : sequence_major(&w));
  WN_TRY(wn_store_settle(run->store));
  WN_TRY(read_measures(&w));
  WN_TRY(add_up(&w));
  wn_arena_release(run->device->stash, mark);
  wn_arena_release(run->device->host, host_mark);
  return NULL;
}
