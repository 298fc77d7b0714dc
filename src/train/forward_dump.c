#include <stdlib.h>
#include <string.h>

#include "io/safetensors.h"
#include "kernels/kernels.h"
#include "train/batch.h"
#include "train/checkpoint_parts.h"
#include "train/inference.h"

/* What will stand in the file: host copies, in order. */
typedef struct dump {
  wn_st_spec *specs;
  void **data;
  int64_t n, room;
} dump;

static wn_status dump_grow(dump *d) {
  if (d->n < d->room) return NULL;
  d->room = d->room ? 2 * d->room : 64;
  wn_st_spec *specs = realloc(d->specs, (size_t)d->room * sizeof *specs);
  if (specs) d->specs = specs;
  void **data = realloc(d->data, (size_t)d->room * sizeof *data);
  if (data) d->data = data;
  return specs && data ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for the dump");
}

/* Adds a host copy of `t` under "prefix" + name, or, with a number >= 0, "prefix" + number. */
static wn_status dump_add(dump *d, wn_device *device, const wn_tensor *t, const char *prefix, const char *name,
                          int32_t number) {
  WN_TRY(dump_grow(d));
  wn_dtype dtype = t->dtype == WN_BF16 ? WN_F32 : t->dtype;
  char *full = malloc(WN_NAME_BYTES + 32);
  void *host = malloc((size_t)wn_tensor_count(t) * (size_t)wn_dtype_bytes(dtype) + 1);
  if (!full || !host) {
    free(full);
    free(host);
    return WN_FAIL(WN_E_MEMORY, "out of memory for the dump");
  }
  if (number >= 0)
    snprintf(full, WN_NAME_BYTES + 32, "%s%d", prefix, number);
  else
    snprintf(full, WN_NAME_BYTES + 32, "%s%s", prefix, name);
  wn_st_spec spec = {.name = full, .dtype = dtype, .rank = t->rank};
  memcpy(spec.dim, t->dim, sizeof spec.dim);
  d->specs[d->n] = spec;
  d->data[d->n] = host;
  d->n++;
  return wn_floats_download(device, host, t);
}

static void dump_free(dump *d) {
  for (int64_t i = 0; i < d->n; i++) {
    free((void *)(uintptr_t)d->specs[i].name);
    free(d->data[i]);
  }
  free(d->specs);
  free(d->data);
}

typedef struct job {
  wn_inference *in;
  const wn_forward_settings *settings;
  wn_batch batch;
  wn_pass pass;
  wn_tensor *by_param, *grads_by_param;
  wn_tensor *h, *mid; /* [L + 1], [L] */
  wn_replay *replay;  /* [L] */
  dump out;
} job;

static wn_status tensor(job *j, wn_tensor *out, wn_role role, int64_t d0, int64_t d1) {
  wn_device *device = j->in->device;
  return wn_device_tensor(device, out, device->stash, "forward dump", role, d1 ? 2 : 1, d0, d1, 0, 0);
}

static wn_status acquire(job *j, int32_t layer, wn_layer_tensors *weights, wn_layer_tensors *grads) {
  WN_TRY(wn_layer_acquire(weights, &j->in->model->table, j->in->store, layer, j->by_param));
  if (!grads) return NULL;
  WN_TRY(wn_store_grads(j->in->store, layer, j->grads_by_param));
  wn_layer_bind(grads, &j->in->model->table, layer, j->grads_by_param);
  return NULL;
}

static wn_status release(job *j, int32_t layer, bool reduce) {
  WN_TRY(wn_store_release(j->in->store, layer));
  return reduce ? wn_store_reduce(j->in->store, layer) : NULL;
}

static wn_status dump_kl(job *j, int32_t layer, const wn_tensor *rows) {
  wn_device *device = j->in->device;
  size_t mark = wn_arena_mark(device->scratch), host_mark = wn_arena_mark(device->host);
  wn_tensor host, mean;
  double sum = 0;
  WN_TRY(wn_tensor_alloc(&host, device->host, "host copy", WN_F32, 1, j->settings->n, 0, 0, 0));
  WN_TRY(wn_tensor_alloc(&mean, device->scratch, "mean", WN_F32, 1, 1, 0, 0, 0));
  WN_TRY(device->ops->download(device, host.data, rows));
  for (int32_t i = 0; i < j->settings->n; i++) sum += (double)((float *)host.data)[i];
  float divided = (float)(sum / (double)(j->batch.kl_rows ? j->batch.kl_rows : 1));
  WN_TRY(device->ops->upload(device, &mean, &divided));
  WN_TRY(dump_add(&j->out, device, &mean, "kl.", NULL, layer));
  wn_arena_release(device->host, host_mark);
  wn_arena_release(device->scratch, mark);
  return NULL;
}

static wn_status layer_forward(job *j, int32_t l) {
  wn_model *model = j->in->model;
  wn_device *device = j->in->device;
  int64_t n = j->settings->n;
  bool indexer = model->config.has_indexer, stage1_grads = j->settings->indexer_grads && !j->settings->sparse;
  size_t mark = wn_arena_mark(device->stash);
  wn_layer_tensors weights, grads;
  wn_layer_measures measures = {0};
  wn_pass pass = j->pass;
  pass.indexer_kl = indexer;
  pass.indexer_grads = stage1_grads;
  WN_TRY(tensor(j, &measures.attention, WN_ACT, n, model->config.hidden_size));
  if (indexer) {
    WN_TRY(tensor(j, &measures.kl, WN_STAT, n, 0));
    WN_TRY(tensor(j, &measures.index_scores, WN_STAT, n, n));
    WN_TRY(tensor(j, &measures.topk, WN_INDEX, n, pass.topk));
  }
  WN_TRY(acquire(j, l, &weights, stage1_grads ? &grads : NULL));
  WN_TRY(wn_layer_forward(model, l, &weights, stage1_grads ? &grads : NULL, &pass, &j->batch.rows, &j->h[l + 1],
                          &j->mid[l], &j->h[l], &j->replay[l], &measures));
  WN_TRY(release(j, l, stage1_grads));
  WN_TRY(dump_add(&j->out, device, &j->h[l], "hidden.", NULL, l));
  WN_TRY(dump_add(&j->out, device, &measures.attention, "attn.", NULL, l));
  if (indexer) {
    WN_TRY(dump_add(&j->out, device, &measures.index_scores, "index_scores.", NULL, l));
    WN_TRY(dump_add(&j->out, device, &measures.topk, "topk.", NULL, l));
    WN_TRY(dump_kl(j, l, &measures.kl));
  }
  wn_arena_release(device->stash, mark);
  return NULL;
}

/* The backward that training runs: with base_grads from the token loss, with indexer_grads from a zero gradient, so
 * that whatever the KL leaks into the base shows. */
static wn_status run_backward(job *j) {
  wn_model *model = j->in->model;
  wn_device *device = j->in->device;
  int32_t L = model->config.num_hidden_layers;
  int64_t n = j->settings->n;
  wn_layer_tensors weights, grads;
  wn_tensor dh, logp, kl;
  WN_TRY(tensor(j, &dh, WN_ACT, n, model->config.hidden_size));
  WN_TRY(tensor(j, &logp, WN_STAT, n, 0));
  WN_TRY(tensor(j, &kl, WN_STAT, n, 0));
  WN_TRY(device->ops->zero(device, &dh));
  if (j->settings->base_grads) {
    WN_TRY(acquire(j, L, &weights, &grads));
    WN_TRY(wn_model_head(model, &weights, &grads, &logp, &dh, &j->h[L], &j->batch.target, &j->batch.weight));
    WN_TRY(release(j, L, true));
  }
  for (int32_t l = L - 1; l >= 0; l--) {
    wn_layer_measures measures = {0};
    wn_pass pass = j->pass;
    pass.indexer_kl = pass.indexer_grads = j->settings->indexer_grads;
    if (pass.indexer_kl) measures.kl = kl;
    j->replay[l].force_expert = j->replay[l].expert.data != NULL;
    j->replay[l].force_selection = j->replay[l].selection.data != NULL;
    WN_TRY(acquire(j, l, &weights, &grads));
    WN_TRY(wn_layer_backward(model, l, &weights, &grads, &pass, &j->batch.rows, &dh, &j->h[l], &j->mid[l],
                             &j->replay[l], &measures));
    WN_TRY(release(j, l, true));
  }
  WN_TRY(acquire(j, -1, &weights, &grads));
  WN_TRY(wn_model_embed_backward(model, &grads, &dh, &j->batch.tokens));
  return release(j, -1, true);
}

/* Gradients of means: the sums divided by their counts. The indexer's carry theirs in kl_coeff already. A buffer (the
 * router's bias) has no gradient; it is written as zeros, so that every parameter is there. */
static wn_status dump_grads(job *j) {
  wn_device *device = j->in->device;
  const wn_param_table *table = &j->in->model->table;
  double factor = j->settings->base_grads ? 1.0 / (double)(j->batch.predicted ? j->batch.predicted : 1) : 1.0;
  for (int32_t layer = -1; layer <= j->in->model->config.num_hidden_layers; layer++) {
    WN_TRY(wn_store_grads(j->in->store, layer, j->grads_by_param));
    for (int32_t p = table->first[layer + 1]; p < table->first[layer + 2]; p++) {
      const wn_param *param = &table->params[p];
      wn_tensor *grad = &j->grads_by_param[p];
      if (grad->data) {
        WN_TRY(device->ops->scale(device, grad, grad, factor));
      } else {
        WN_TRY(wn_device_tensor(device, grad, device->stash, "forward dump", WN_WGRAD, param->rank, param->dim[0],
                                param->dim[1], param->dim[2], 0));
        WN_TRY(device->ops->zero(device, grad));
      }
      WN_TRY(dump_add(&j->out, device, grad, "grad.", param->hf_name, -1));
    }
    WN_TRY(wn_store_reduce(j->in->store, layer));
  }
  return NULL;
}

static wn_status prepare(job *j) {
  const wn_model_config *config = &j->in->model->config;
  const wn_forward_settings *s = j->settings;
  int32_t L = config->num_hidden_layers;
  size_t layers = (size_t)L + 1, params = (size_t)j->in->model->table.n;
  j->by_param = calloc(params, sizeof *j->by_param);
  j->grads_by_param = calloc(params, sizeof *j->grads_by_param);
  j->h = calloc(layers, sizeof *j->h);
  j->mid = calloc(layers, sizeof *j->mid);
  j->replay = calloc(layers, sizeof *j->replay);
  if (!j->by_param || !j->grads_by_param || !j->h || !j->mid || !j->replay)
    return WN_FAIL(WN_E_MEMORY, "out of memory for the dump");
  WN_TRY(wn_batch_from_tokens(&j->batch, j->in->device, s->tokens, s->n, s->document_first, s->n_documents));
  j->pass = (wn_pass){
      .selection = s->sparse ? WN_SELECT_INDEXER : WN_SELECT_DENSE,
      .topk = config->index_topk < s->n ? config->index_topk : s->n,
      .kl_coeff = 1.0 / (double)(j->batch.kl_rows ? j->batch.kl_rows : 1),
      .rows_per_sequence = s->n,
  };
  for (int32_t l = 0; l <= L; l++) {
    WN_TRY(tensor(j, &j->h[l], WN_ACT, s->n, config->hidden_size));
    if (l == L) continue;
    WN_TRY(tensor(j, &j->mid[l], WN_ACT, s->n, config->hidden_size));
    if (wn_model_config_is_moe(config, l))
      WN_TRY(tensor(j, &j->replay[l].expert, WN_INDEX, s->n, config->num_experts_per_tok));
    if (s->sparse) WN_TRY(tensor(j, &j->replay[l].selection, WN_INDEX, s->n, j->pass.topk));
  }
  return NULL;
}

static wn_status run(job *j, const char *path) {
  wn_model *model = j->in->model;
  wn_device *device = j->in->device;
  int32_t L = model->config.num_hidden_layers;
  wn_layer_tensors weights;
  wn_tensor logits;
  WN_TRY(prepare(j));
  WN_TRY(acquire(j, -1, &weights, NULL));
  WN_TRY(wn_model_embed(model, &weights, &j->h[0], &j->batch.tokens));
  WN_TRY(release(j, -1, false));
  for (int32_t l = 0; l < L; l++) WN_TRY(layer_forward(j, l));
  WN_TRY(dump_add(&j->out, device, &j->h[L], "hidden.", NULL, L));
  WN_TRY(tensor(j, &logits, WN_STAT, j->settings->n, model->config.vocab_size));
  WN_TRY(acquire(j, L, &weights, NULL));
  WN_TRY(wn_model_logits(model, &weights, &logits, &j->h[L]));
  WN_TRY(release(j, L, false));
  WN_TRY(dump_add(&j->out, device, &logits, "logits", "", -1));
  bool stage1 = j->settings->indexer_grads && !j->settings->sparse; /* made during the forward, as warm-up does */
  if (j->settings->base_grads || j->settings->indexer_grads) {
    if (!stage1) WN_TRY(run_backward(j));
    WN_TRY(dump_grads(j));
  }
  return wn_safetensors_write(path, j->out.specs, (const void *const *)j->out.data, j->out.n);
}

wn_status wn_forward_dump(wn_inference *inference, const wn_forward_settings *settings, const char *path) {
  job j = {.in = inference, .settings = settings};
  size_t mark = wn_arena_mark(inference->device->stash), host_mark = wn_arena_mark(inference->device->host);
  WN_ASSERT(wn_world_size(inference->world) == 1, "a dump on %d ranks", wn_world_size(inference->world));
  wn_status status = run(&j, path);
  wn_arena_release(inference->device->stash, mark);
  wn_arena_release(inference->device->host, host_mark);
  free(j.by_param);
  free(j.grads_by_param);
  free(j.h);
  free(j.mid);
  free(j.replay);
  dump_free(&j.out);
  return status;
}
