/* The life of gathered weights and of gradients.
 *
 * A unit whose group is one rank is never gathered: its piece is the whole unit, weights and gradients are views of it.
 * Other units live in slots while their layer is in use: two slots of weights and two of gradients, each as large as
 * the largest layer needs, so that a layer can be gathered while its neighbour computes. Parts of a layer's experts
 * have two slots of their own. What is stored as FP8 arrives as FP8, and is widened once it is acquired, into memory of
 * which there is one for layers and one for parts: the compute queue widens the next when it is done with the last. */
#include "dist/store_internal.h"
#include "kernels/kernels.h"

static holding *find_holding(const wn_store *store, int32_t layer, int32_t part) {
  for (int32_t l = 0; l < store->n_holdings; l++)
    if (store->holdings[l].layer == layer && store->holdings[l].part == part) return &store->holdings[l];
  WN_ASSERT(false, "no parameters in layer %d, part %d", layer, part);
}

static int32_t take_slot(bool *taken, const char *what, int32_t layer) {
  for (int32_t s = 0; s < N_SLOTS; s++)
    if (!taken[s]) {
      taken[s] = true;
      return s;
    }
  WN_ASSERT(false, "%s of layer %d wanted while %d hold theirs", what, layer, N_SLOTS);
}

/* ---- weights --------------------------------------------------------------------------------------------------- */

/* As they are stored. */
static wn_tensor gathered(const wn_store *store, const holding *h, int32_t u) {
  const unit *at = &store->units[u];
  if (!at->shared) return store->pieces[u].weight;
  return wn_tensor_of((char *)store->weight_slots[wn_class_of(h->part)][h->weight_slot].data + at->slot_bytes_at,
                      store->pieces[u].weight.dtype, 1, at->elements, 0, 0, 0);
}

/* As operations take them. */
static wn_tensor weights_of(const wn_store *store, const holding *h, int32_t u) {
  const unit *at = &store->units[u];
  if (!store->pieces[u].fp8) return gathered(store, h, u);
  return wn_tensor_slice(store->wide[wn_class_of(h->part)], 0, at->wide_at, at->elements);
}

static wn_tensor grads_of(const wn_store *store, const holding *h, int32_t u) {
  const unit *at = &store->units[u];
  if (!at->shared) return store->pieces[u].grad;
  return wn_tensor_slice(store->grad_slots[h->grad_slot], 0, at->grad_at, at->elements);
}

static wn_tensor param_view(const wn_store *store, int32_t i, wn_tensor whole) {
  const wn_param *p = &store->params[i];
  wn_tensor flat = wn_tensor_slice(whole, 0, store->param_offset[i], wn_param_elements(p));
  return wn_tensor_of(flat.data, flat.dtype, p->rank, p->dim[0], p->rank > 1 ? p->dim[1] : 0,
                      p->rank > 2 ? p->dim[2] : 0, 0);
}

static wn_status hold(wn_store *store, holding *h) {
  if (h->weight_slot != NONE) return NULL;
  h->weight_slot = take_slot(store->weight_slot_taken[wn_class_of(h->part)], "weights", h->layer);
  for (int32_t u = h->first_unit; u < h->first_unit + h->n_units; u++) {
    if (!store->units[u].shared) continue;
    wn_tensor whole = gathered(store, h, u);
    WN_TRY(wn_comm_gather(store->comm, store->groups[store->pieces[u].group], &store->units[u].gathering, &whole,
                          &store->pieces[u].weight));
  }
  return NULL;
}

static wn_status await(wn_store *store, const holding *h) {
  for (int32_t u = h->first_unit; u < h->first_unit + h->n_units; u++) {
    wn_transfer *transfer = store->units[u].gathering;
    store->units[u].gathering = NULL;
    wn_status status = wn_comm_finish(store->comm, transfer);
    if (status) return wn_status_prefix(status, "gathering the weights of layer %d", h->layer);
  }
  return NULL;
}

/* No operation sees FP8. */
static wn_status widen(wn_store *store, const holding *h, int32_t i) {
  int32_t u = store->unit_of[i];
  wn_tensor wide = param_view(store, i, weights_of(store, h, u)), codes = param_view(store, i, gathered(store, h, u));
  wn_tensor scales = wn_store_scales(store, i);
  return store->device->ops->dequantise(store->device, &wide, &codes, &scales);
}

wn_status wn_store_publish(wn_store *store) {
  for (int32_t u = 0; u < store->n_units; u++) {
    wn_piece *piece = &store->pieces[u];
    if (piece->weight.data != piece->master.data)
      WN_TRY(store->device->ops->cast(store->device, &piece->weight, &piece->master));
  }
  return NULL;
}

wn_status wn_store_prefetch_part(wn_store *store, int32_t layer, int32_t part) {
  return hold(store, find_holding(store, layer, part));
}

wn_status wn_store_acquire_part(wn_store *store, int32_t layer, int32_t part, wn_tensor *by_param) {
  holding *h = find_holding(store, layer, part);
  bool *wide_taken = &store->wide_taken[wn_class_of(part)];
  WN_ASSERT(!h->acquired, "layer %d, part %d, is acquired already", layer, part);
  WN_ASSERT(!h->fp8 || !*wide_taken, "layer %d, part %d, wanted while another's FP8 weights are in use", layer, part);
  WN_TRY(hold(store, h));
  WN_TRY(await(store, h));
  h->acquired = true;
  if (h->fp8) *wide_taken = true;
  for (int32_t i = h->first_param; i < h->first_param + h->n_params; i++) {
    if (store->params[i].part != part) continue;
    if (store->params[i].fp8) WN_TRY(widen(store, h, i));
    by_param[i] = param_view(store, i, weights_of(store, h, store->unit_of[i]));
  }
  return NULL;
}

wn_status wn_store_release_part(wn_store *store, int32_t layer, int32_t part) {
  holding *h = find_holding(store, layer, part);
  slot_class class = wn_class_of(part);
  WN_ASSERT(h->weight_slot != NONE, "layer %d, part %d, is not held", layer, part);
  WN_TRY(await(store, h)); /* prefetched and never used: the slot must not be written to any more */
  store->weight_slot_taken[class][h->weight_slot] = false;
  if (h->fp8 && h->acquired) store->wide_taken[class] = false;
  h->weight_slot = NONE;
  h->acquired = false;
  return NULL;
}

wn_status wn_store_prefetch(wn_store *store, int32_t layer) {
  return wn_store_prefetch_part(store, layer, 0);
}

wn_status wn_store_acquire(wn_store *store, int32_t layer, wn_tensor *by_param) {
  return wn_store_acquire_part(store, layer, 0, by_param);
}

wn_status wn_store_release(wn_store *store, int32_t layer) {
  return wn_store_release_part(store, layer, 0);
}

/* ---- gradients ------------------------------------------------------------------------------------------------- */

/* What was sent from a slot has been added where it belongs, and the slot is zero again. */
static wn_status arrive(wn_store *store, int32_t slot) {
  reducing *r = &store->reducing[slot];
  for (int32_t i = 0; i < r->n; i++) {
    wn_status status = wn_comm_finish(store->comm, r->transfers[i]);
    if (status) return wn_status_prefix(status, "summing gradients");
  }
  r->n = 0;
  return NULL;
}

wn_status wn_store_settle(wn_store *store) {
  for (int32_t s = 0; s < N_SLOTS; s++) WN_TRY(arrive(store, s));
  return NULL;
}

wn_status wn_store_grads(wn_store *store, int32_t layer, wn_tensor *by_param) {
  holding *h = find_holding(store, layer, 0);
  WN_ASSERT(h->grad_slot == NONE, "the gradients of layer %d are open already", layer);
  if (h->trains) {
    h->grad_slot = take_slot(store->grad_slot_taken, "gradients", layer);
    WN_TRY(arrive(store, h->grad_slot));
  }
  for (int32_t i = h->first_param; i < h->first_param + h->n_params; i++) {
    int32_t u = store->unit_of[i];
    by_param[i] = store->units[u].trains ? param_view(store, i, grads_of(store, h, u)) : (wn_tensor){0};
  }
  return NULL;
}

wn_status wn_store_reduce(wn_store *store, int32_t layer) {
  holding *h = find_holding(store, layer, 0);
  if (!h->trains) return NULL;
  WN_ASSERT(h->grad_slot != NONE, "the gradients of layer %d are not open", layer);
  for (int32_t u = h->first_unit; u < h->first_unit + h->n_units; u++) {
    if (!store->units[u].shared || !store->units[u].trains) continue;
    wn_tensor whole = grads_of(store, h, u);
    reducing *r = &store->reducing[h->grad_slot];
    wn_status status = wn_comm_reduce_scatter(store->comm, store->groups[store->pieces[u].group], &r->transfers[r->n],
                                              &store->pieces[u].grad, &whole);
    r->n++;
    if (status) return wn_status_prefix(status, "summing the gradients of layer %d", layer);
  }
  store->grad_slot_taken[h->grad_slot] = false;
  h->grad_slot = NONE;
  return NULL;
}
