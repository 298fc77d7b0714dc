/* The store's layout: which parameters share a unit, where they stand in it, which run of it this rank holds. A pure
 * function of the parameters, the groups' sizes and the device's dtypes. */
#include <stdlib.h>

#include "base/float8.h"
#include "dist/store_internal.h"

enum { ALIGN_BYTES = 256 };

static int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

/* Elements between tensors so that a unit's tensors are aligned in every dtype it exists in. */
static int64_t align_elements(const wn_store *store, const wn_piece *piece) {
  static const wn_role roles[] = {WN_MASTER, WN_MOMENT, WN_ACT, WN_WGRAD};
  int64_t smallest = wn_dtype_bytes(wn_stored_dtype(store, piece));
  for (size_t i = 0; i < sizeof roles / sizeof *roles; i++) {
    int64_t bytes = wn_dtype_bytes(store->dtype_of[roles[i]]);
    if (bytes < smallest) smallest = bytes;
  }
  return ALIGN_BYTES / smallest;
}

static bool belongs(const wn_param *p, const wn_piece *piece) {
  return p->part == piece->part && p->group == piece->group && p->kind == piece->kind && p->role == piece->role &&
         p->fp8 == piece->fp8;
}

static int32_t find_unit(const wn_store *store, const holding *h, const wn_param *p) {
  for (int32_t u = h->first_unit; u < h->first_unit + h->n_units; u++)
    if (belongs(p, &store->pieces[u])) return u;
  WN_ASSERT(false, "%s is in no unit", p->hf_name);
}

static void add_unit(wn_store *store, holding *h, wn_piece piece) {
  bool any = false;
  for (int32_t i = h->first_param; i < h->first_param + h->n_params && !any; i++)
    any = belongs(&store->params[i], &piece);
  if (!any) return;
  store->pieces[store->n_units] = piece;
  store->units[store->n_units] =
      (unit){.trains = wn_kind_trains(piece.kind), .shared = store->group_size[piece.group] > 1};
  store->n_units++;
  h->n_units++;
  h->trains = h->trains || wn_kind_trains(piece.kind);
  h->fp8 = h->fp8 || piece.fp8;
}

/* Units come by layer, part, group, kind, role, then what they are stored as; only those with parameters exist. */
static void add_units(wn_store *store, holding *h) {
  static const wn_role roles[] = {WN_ACT, WN_STAT};
  h->first_unit = store->n_units;
  for (int32_t group = 0; group < store->n_groups; group++)
    for (wn_kind kind = WN_BASE; kind < WN_N_KINDS; kind++)
      for (size_t r = 0; r < sizeof roles / sizeof *roles; r++)
        for (int fp8 = 0; fp8 < 2; fp8++)
          add_unit(
              store, h,
              (wn_piece){
                  .layer = h->layer, .part = h->part, .group = group, .kind = kind, .role = roles[r], .fp8 = fp8 != 0});
}

static void place_params(wn_store *store, const holding *h) {
  for (int32_t i = h->first_param; i < h->first_param + h->n_params; i++) {
    const wn_param *p = &store->params[i];
    if (p->part != h->part) continue;
    int32_t u = find_unit(store, h, p);
    unit *at = &store->units[u];
    store->unit_of[i] = u;
    store->param_offset[i] = at->elements;
    store->scale_offset[i] = at->n_scales;
    at->elements += round_up(wn_param_elements(p), align_elements(store, &store->pieces[u]));
    if (p->fp8) at->n_scales += wn_f8_blocks(p->dim[0]) * wn_f8_blocks(p->dim[1]);
  }
}

/* Pads units so that pieces are equal and aligned, and places in the slots what does not lie in the pieces. */
static void finish_units(wn_store *store, const holding *h) {
  int64_t weights = 0, wide = 0, grads = 0;
  slot_class class = wn_class_of(h->part);
  for (int32_t u = h->first_unit; u < h->first_unit + h->n_units; u++) {
    unit *at = &store->units[u];
    const wn_piece *piece = &store->pieces[u];
    int32_t ranks = store->group_size[piece->group];
    at->elements = round_up(at->elements, align_elements(store, piece) * ranks);
    at->piece_elements = at->elements / ranks;
    at->wide_at = wide;
    if (piece->fp8) wide += at->elements;
    if (!at->shared) continue;
    at->slot_bytes_at = weights;
    weights += at->elements * wn_dtype_bytes(wn_stored_dtype(store, piece));
    if (!at->trains) continue;
    at->grad_at = grads;
    grads += at->elements;
    if (at->elements > store->largest_reduced) store->largest_reduced = at->elements;
  }
  if (weights > store->slot_bytes[class]) store->slot_bytes[class] = weights;
  if (wide > store->wide_elements[class]) store->wide_elements[class] = wide;
  if (grads > store->grad_slot_elements) store->grad_slot_elements = grads;
}

/* This rank's share of every parameter; parameters of a unit are in order of offset. A parameter lies in one unit, so
 * it yields at most one segment. */
static void cut_segments(wn_store *store) {
  for (int32_t l = 0; l < store->n_holdings; l++) {
    const holding *h = &store->holdings[l];
    for (int32_t u = h->first_unit; u < h->first_unit + h->n_units; u++) {
      wn_piece *piece = &store->pieces[u];
      int64_t from = store->group_rank[piece->group] * store->units[u].piece_elements;
      int64_t to = from + store->units[u].piece_elements;
      piece->segments = store->segments + store->n_segments;
      for (int32_t i = h->first_param; i < h->first_param + h->n_params; i++) {
        if (store->unit_of[i] != u) continue;
        int64_t first = store->param_offset[i], last = first + wn_param_elements(&store->params[i]);
        int64_t begin = first > from ? first : from, end = last < to ? last : to;
        if (begin >= end) continue;
        store->segments[store->n_segments++] =
            (wn_segment){.param = i, .first = begin - first, .offset = begin - from, .count = end - begin};
        piece->n_segments++;
      }
    }
  }
}

/* A layer, then the parts of its experts. */
static void add_holdings(wn_store *store, int32_t first_param, int32_t n_params) {
  int32_t layer = store->params[first_param].layer, parts = 0;
  for (int32_t i = first_param; i < first_param + n_params; i++)
    if (store->params[i].part > parts) parts = store->params[i].part;
  for (int32_t part = 0; part <= parts; part++)
    store->holdings[store->n_holdings++] = (holding){.layer = layer,
                                                     .part = part,
                                                     .first_param = first_param,
                                                     .n_params = n_params,
                                                     .weight_slot = NONE,
                                                     .grad_slot = NONE};
}

static wn_status allocate_tables(wn_store *store) {
  /* no more units or segments than parameters; holdings: a layer each, and parts, which are not empty */
  size_t n = (size_t)store->n_params;
  store->unit_of = calloc(n, sizeof *store->unit_of);
  store->param_offset = calloc(n, sizeof *store->param_offset);
  store->scale_offset = calloc(n, sizeof *store->scale_offset);
  store->units = calloc(n, sizeof *store->units);
  store->pieces = calloc(n, sizeof *store->pieces);
  store->holdings = calloc(2 * n, sizeof *store->holdings);
  store->segments = calloc(n, sizeof *store->segments);
  for (int32_t s = 0; s < N_SLOTS; s++) store->reducing[s].transfers = calloc(n, sizeof(wn_transfer *));
  if (!store->unit_of || !store->param_offset || !store->scale_offset || !store->units || !store->pieces ||
      !store->holdings || !store->segments || !store->reducing[0].transfers || !store->reducing[1].transfers)
    return WN_FAIL(WN_E_MEMORY, "out of memory for the tables of %d parameters", store->n_params);
  return NULL;
}

wn_status wn_store_lay_out(wn_store *store) {
  WN_TRY(allocate_tables(store));
  for (int32_t i = 0, next; i < store->n_params; i = next) {
    for (next = i + 1; next < store->n_params && store->params[next].layer == store->params[i].layer;) next++;
    add_holdings(store, i, next - i);
  }
  for (int32_t l = 0; l < store->n_holdings; l++) {
    add_units(store, &store->holdings[l]);
    place_params(store, &store->holdings[l]);
    finish_units(store, &store->holdings[l]);
  }
  cut_segments(store);
  return NULL;
}
