#include "train/batch.h"

#include <string.h>

typedef struct host_rows {
  int32_t *tokens, *target, *first_key, *last_key, *position;
} host_rows;

/* Staging lives in the host arena for the length of the load; what the device keeps is uploaded to the stash. */
static wn_status host_ints(wn_device *device, int32_t **out, int64_t n) {
  wn_tensor t;
  WN_TRY(wn_tensor_alloc(&t, device->host, "batch staging", WN_I32, 1, n, 0, 0, 0));
  *out = t.data;
  return NULL;
}

static wn_status upload_ints(wn_device *device, wn_tensor *out, const char *name, const int32_t *host, int64_t n) {
  WN_TRY(wn_device_tensor(device, out, device->stash, name, WN_INDEX, 1, n, 0, 0, 0));
  return device->ops->upload(device, out, host);
}

static wn_status upload(wn_batch *batch, wn_device *device, const host_rows *host, int32_t topk) {
  int64_t n = batch->n_rows;
  wn_tensor first, last, position;
  WN_TRY(upload_ints(device, &batch->tokens, "tokens", host->tokens, n));
  WN_TRY(upload_ints(device, &batch->target, "targets", host->target, n));
  WN_TRY(upload_ints(device, &first, "rows", host->first_key, n));
  WN_TRY(upload_ints(device, &last, "rows", host->last_key, n));
  WN_TRY(upload_ints(device, &position, "rows", host->position, n));
  batch->rows = (wn_rows){(int32_t)n, (int32_t)n, first.data, last.data, position.data};
  wn_tensor weight;
  WN_TRY(wn_tensor_alloc(&weight, device->host, "batch staging", WN_F32, 1, n, 0, 0, 0));
  float *w = weight.data;
  for (int64_t i = 0; i < n; i++) {
    w[i] = host->target[i] >= 0 ? 1.0f : 0.0f;
    batch->predicted += host->target[i] >= 0;
    batch->kl_rows += host->last_key[i] > host->first_key[i];
    batch->pairs += host->last_key[i] - host->first_key[i] + 1;
    int32_t visible = host->last_key[i] - host->first_key[i] + 1;
    batch->selected += visible < topk ? visible : topk;
  }
  WN_TRY(wn_device_tensor(device, &batch->weight, device->stash, "token weights", WN_STAT, 1, n, 0, 0, 0));
  if (device->dtype_of[WN_STAT] == WN_F32) return device->ops->upload(device, &batch->weight, w);
  return device->ops->cast(device, &batch->weight,
                           &weight); /* the FP64 device of the gradient tests is in host memory */
}

static wn_status stage_rows(wn_device *device, host_rows *host, int64_t n) {
  WN_TRY(host_ints(device, &host->tokens, n));
  WN_TRY(host_ints(device, &host->target, n));
  WN_TRY(host_ints(device, &host->first_key, n));
  WN_TRY(host_ints(device, &host->last_key, n));
  return host_ints(device, &host->position, n);
}

wn_status wn_batch_load(wn_batch *out, wn_device *device, const wn_dataset *dataset, wn_batch_settings settings,
                        const int64_t *windows, int32_t n_seqs) {
  int32_t T = settings.seq_len;
  int64_t n = (int64_t)T * n_seqs;
  wn_tensor flags, scored;
  WN_TRY(wn_tensor_alloc(&scored, device->host, "scored marks", WN_U8, 1, n, 0, 0, 0));
  size_t mark = wn_arena_mark(device->host);
  host_rows host;
  wn_batch batch = {.n_seqs = n_seqs, .seq_len = T, .n_rows = (int32_t)n};
  wn_window window;
  WN_TRY(stage_rows(device, &host, n));
  WN_TRY(host_ints(device, &window.tokens, T + 1));
  WN_TRY(host_ints(device, &window.document_start, T));
  WN_TRY(wn_tensor_alloc(&flags, device->host, "batch staging", WN_U8, 2, 2, T, 0, 0));
  window.predicted = flags.data;
  window.scored = (uint8_t *)flags.data + T;
  uint8_t *marks = scored.data;
  for (int32_t s = 0; s < n_seqs; s++) {
    int32_t base = s * T;
    wn_dataset_read(dataset, windows[s], T, &window);
    for (int32_t i = 0; i < T; i++) {
      bool predicted = settings.document_mask ? window.predicted[i] : true;
      host.tokens[base + i] = window.tokens[i];
      host.target[base + i] = predicted ? window.tokens[i + 1] : -1;
      host.first_key[base + i] = base + (settings.document_mask ? window.document_start[i] : 0);
      host.last_key[base + i] = base + i;
      host.position[base + i] = i;
      marks[base + i] = (uint8_t)(predicted && window.scored[i]);
      batch.scored_count += marks[base + i];
    }
  }
  batch.scored = marks;
  WN_TRY(upload(&batch, device, &host, settings.topk));
  wn_arena_release(device->host, mark);
  *out = batch;
  return NULL;
}

wn_status wn_batch_from_tokens(wn_batch *out, wn_device *device, const int32_t *tokens, int32_t n,
                               const int32_t *document_first, int32_t n_documents) {
  host_rows host;
  wn_batch batch = {.n_seqs = 1, .seq_len = n, .n_rows = n};
  WN_ASSERT(n > 0 && n_documents > 0 && document_first[0] == 0, "%d tokens, %d documents", n, n_documents);
  wn_tensor scored;
  WN_TRY(wn_tensor_alloc(&scored, device->host, "scored marks", WN_U8, 1, n, 0, 0, 0));
  memset(scored.data, 0, (size_t)n);
  size_t mark = wn_arena_mark(device->host);
  WN_TRY(stage_rows(device, &host, n));
  for (int32_t i = 0, document = 0; i < n; i++) {
    while (document + 1 < n_documents && document_first[document + 1] <= i) document++;
    host.tokens[i] = tokens[i];
    host.target[i] = i + 1 < n ? tokens[i + 1] : -1;
    host.first_key[i] = document_first[document];
    host.last_key[i] = i;
    host.position[i] = i;
  }
  batch.scored = scored.data;
  WN_TRY(upload(&batch, device, &host, 0));
  wn_arena_release(device->host, mark);
  *out = batch;
  return NULL;
}
