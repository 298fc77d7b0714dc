/* Both ends of the model: embedding; final norm and head. */
#include "model/model.h"

wn_status wn_model_embed(wn_model *model, const wn_layer_tensors *weights, wn_tensor *h, const wn_tensor *tokens) {
  return model->device->ops->embedding(model->device, h, tokens, &weights->slot[WN_P_EMBED]);
}

wn_status wn_model_embed_backward(wn_model *model, wn_layer_tensors *grads, const wn_tensor *dh,
                                  const wn_tensor *tokens) {
  return model->device->ops->embedding_backward(model->device, &grads->slot[WN_P_EMBED], dh, tokens);
}

static wn_status final_norm(wn_model *model, const wn_layer_tensors *weights, wn_tensor *x, wn_tensor *inv,
                            const wn_tensor *h) {
  wn_device *device = model->device;
  int64_t n = h->dim[0], width = model->config.hidden_size;
  WN_ASSERT(h->rank == 2 && h->dim[1] == width, "hidden states of width %lld", (long long)h->dim[1]);
  WN_TRY(wn_device_tensor(device, x, device->scratch, "head input", WN_ACT, 2, n, width, 0, 0));
  WN_TRY(wn_device_tensor(device, inv, device->scratch, "head input_inv", WN_STAT, 1, n, 0, 0, 0));
  return device->ops->rms_norm(device, x, inv, h, &weights->slot[WN_P_FINAL_NORM],
                               &(wn_norm_params){.eps = model->config.rms_norm_eps});
}

static wn_status head(wn_model *model, const wn_layer_tensors *weights, wn_layer_tensors *grads, wn_tensor *logp,
                      wn_tensor *dh, const wn_tensor *h, const wn_tensor *target, const wn_tensor *weight) {
  wn_device *device = model->device;
  const wn_tensor *w = weights->slot;
  wn_head_params params = {.chunk_rows = device->chunk_rows};
  wn_tensor x, inv, dx;
  WN_TRY(final_norm(model, weights, &x, &inv, h));
  if (!dh) return device->ops->head_loss(device, logp, NULL, NULL, &x, &w[WN_P_HEAD], target, NULL, &params);
  WN_ASSERT(grads && grads->slot[WN_P_HEAD].data && weight, "the head's gradient goes nowhere, or has no weights");
  WN_TRY(wn_device_tensor(device, &dx, device->scratch, "head input gradient", WN_ACT, 2, x.dim[0], x.dim[1], 0, 0));
  WN_TRY(
      device->ops->head_loss(device, logp, &dx, &grads->slot[WN_P_HEAD], &x, &w[WN_P_HEAD], target, weight, &params));
  return device->ops->rms_norm_backward(device, dh, &grads->slot[WN_P_FINAL_NORM], &dx, h, &inv, &w[WN_P_FINAL_NORM],
                                        &(wn_norm_params){.eps = model->config.rms_norm_eps});
}

wn_status wn_model_head(wn_model *model, const wn_layer_tensors *weights, wn_layer_tensors *grads, wn_tensor *logp,
                        wn_tensor *dh, const wn_tensor *h, const wn_tensor *target, const wn_tensor *weight) {
  size_t mark = wn_arena_mark(model->device->scratch);
  wn_status status = head(model, weights, grads, logp, dh, h, target, weight);
  wn_arena_release(model->device->scratch, mark);
  return status;
}

static wn_status logits_of(wn_model *model, const wn_layer_tensors *weights, wn_tensor *logits, const wn_tensor *h) {
  wn_tensor x, inv;
  WN_TRY(final_norm(model, weights, &x, &inv, h));
  return model->device->ops->linear(model->device, logits, &x, &weights->slot[WN_P_HEAD], &(wn_accumulate){0});
}

wn_status wn_model_logits(wn_model *model, const wn_layer_tensors *weights, wn_tensor *logits, const wn_tensor *h) {
  size_t mark = wn_arena_mark(model->device->scratch);
  wn_status status = logits_of(model, weights, logits, h);
  wn_arena_release(model->device->scratch, mark);
  return status;
}
