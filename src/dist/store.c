/* The parameter store: layout of units, memory of pieces, and the life of gathered weights and gradients.
 *
 * A unit whose group is one rank is never gathered: its piece is the whole unit, weights and gradients are views of it.
 * Other units live in slots while a layer is in use: two slots of weights and two of gradients, each as large as the
 * largest layer needs, so that a layer can be gathered while its neighbour computes. */
#include "dist/store.h"

#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "kernels/kernels.h"

enum { N_SLOTS = 2, MAX_GROUPS = 4, ALIGN_BYTES = 256, NONE = -1 };

/* What the store knows of piece i beyond the piece itself. */
typedef struct unit {
  wn_group *group;
  int64_t elements, piece_elements; /* elements = group size * piece_elements */
  int64_t slot_bytes_at, grad_at;   /* in a slot, for units of more than one rank: bytes; elements */
  bool trains, shared;              /* shared: its group has more than one rank */
  wn_transfer *gathering;
} unit;

typedef struct layer_state {
  int32_t layer;
  int32_t first_param, n_params;
  int32_t first_unit, n_units;
  int32_t weight_slot, grad_slot; /* NONE: not held, not open */
  bool acquired, trains;
} layer_state;

/* Gradients of a slot that are on their way: it can be used again when they have arrived. */
typedef struct reducing {
  wn_transfer **transfers; /* [n_params]: more than a layer has units */
  int32_t n;
} reducing;

struct wn_store {
  wn_device *device;
  wn_comm *comm;
  wn_group *groups[MAX_GROUPS];
  int32_t n_groups;
  const wn_param *params;
  int32_t n_params;
  int32_t *unit_of;      /* [n_params] */
  int64_t *param_offset; /* [n_params] first element inside its unit */
  int32_t n_units, n_layers, n_segments;
  unit *units;
  wn_piece *pieces; /* parallel to units */
  layer_state *layers;
  wn_segment *segments;
  int64_t slot_bytes, grad_slot_elements, largest_reduced; /* elements of the largest unit that is summed */
  wn_tensor weight_slots[N_SLOTS], grad_slots[N_SLOTS];
  bool weight_slot_taken[N_SLOTS], grad_slot_taken[N_SLOTS];
  reducing reducing[N_SLOTS];
};

static int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

int64_t wn_param_elements(const wn_param *p) {
  int64_t n = 1;
  for (int32_t i = 0; i < p->rank; i++) n *= p->dim[i];
  return n;
}

bool wn_kind_trains(wn_kind kind) {
  return kind == WN_BASE || kind == WN_INDEXER;
}

/* Elements between tensors so that a unit's tensors are aligned in every dtype it exists in. */
static int64_t align_elements(const wn_device *device) {
  static const wn_role roles[] = {WN_MASTER, WN_ACT, WN_WGRAD};
  int64_t smallest = 8;
  for (size_t i = 0; i < sizeof roles / sizeof *roles; i++) {
    int64_t bytes = wn_dtype_bytes(device->dtype_of[roles[i]]);
    if (bytes < smallest) smallest = bytes;
  }
  return ALIGN_BYTES / smallest;
}

static void check_params(const wn_store *store) {
  for (int32_t i = 0; i < store->n_params; i++) {
    const wn_param *p = &store->params[i];
    WN_ASSERT(i == 0 || p[-1].layer <= p->layer, "%s is out of order", p->hf_name);
    WN_ASSERT(p->group >= 0 && p->group < store->n_groups, "group %d of %s", p->group, p->hf_name);
    WN_ASSERT(p->rank >= 1 && p->rank <= 3 && wn_param_elements(p) > 0, "shape of %s", p->hf_name);
    WN_ASSERT((uint32_t)p->kind < WN_N_KINDS, "kind %d of %s", (int)p->kind, p->hf_name);
    WN_ASSERT(p->role == WN_ACT || (p->role == WN_STAT && !wn_kind_trains(p->kind)), "role %d of %s", (int)p->role,
              p->hf_name);
  }
}

/* The members of a group must lay out the same parameters: a rank that read another configuration is found here. */
static wn_status check_same_table(const wn_store *store, int32_t group) {
  enum { NUMBERS = 7 };
  wn_group *members = store->groups[group];
  wn_hash own = wn_hash_fold(NULL, 0);
  for (int32_t i = 0; i < store->n_params; i++) {
    const wn_param *p = &store->params[i];
    if (p->group != group) continue;
    int64_t numbers[NUMBERS] = {p->layer, p->kind, p->rank};
    for (int32_t d = 0; d < p->rank; d++) numbers[3 + d] = p->dim[d];
    numbers[NUMBERS - 1] = p->slot;
    wn_hash chain[3] = {own, wn_hash_bytes(p->hf_name, strlen(p->hf_name)), wn_hash_bytes(numbers, sizeof numbers)};
    own = wn_hash_fold(chain, 3);
  }
  int32_t size = wn_group_size(members), other = NONE;
  wn_hash *all = malloc((size_t)size * sizeof *all);
  if (!all) return WN_FAIL(WN_E_MEMORY, "out of memory for the digests of %d ranks", size);
  WN_TRY(wn_group_gather(members, all, &own, sizeof own));
  for (int32_t r = 0; r < size && other == NONE; r++)
    if (!wn_hash_equal(all[r], own)) other = r;
  free(all);
  if (other == NONE) return NULL;
  return WN_FAIL_HINT(WN_E_WORLD, "start every rank with the same job file and the same program",
                      "rank %d and rank %d of group %d lay out different parameters", wn_group_rank(members), other,
                      group);
}

/* ---- layout ---------------------------------------------------------------------------------------------------- */

static bool belongs(const wn_param *p, const wn_piece *piece) {
  return p->group == piece->group && p->kind == piece->kind && p->role == piece->role;
}

static int32_t find_unit(const wn_store *store, const layer_state *layer, const wn_param *p) {
  for (int32_t u = layer->first_unit; u < layer->first_unit + layer->n_units; u++)
    if (belongs(p, &store->pieces[u])) return u;
  WN_ASSERT(false, "%s is in no unit", p->hf_name);
}

static void add_unit(wn_store *store, layer_state *layer, wn_piece piece) {
  bool any = false;
  for (int32_t i = layer->first_param; i < layer->first_param + layer->n_params && !any; i++)
    any = belongs(&store->params[i], &piece);
  if (!any) return;
  wn_group *members = store->groups[piece.group];
  store->pieces[store->n_units] = piece;
  store->units[store->n_units] =
      (unit){.group = members, .trains = wn_kind_trains(piece.kind), .shared = wn_group_size(members) > 1};
  store->n_units++;
  layer->n_units++;
  layer->trains = layer->trains || wn_kind_trains(piece.kind);
}

/* Units come by layer, then group, then kind, then role; only those with parameters exist. */
static void add_layer_units(wn_store *store, layer_state *layer) {
  static const wn_role roles[] = {WN_ACT, WN_STAT};
  layer->first_unit = store->n_units;
  for (int32_t group = 0; group < store->n_groups; group++)
    for (wn_kind kind = WN_BASE; kind < WN_N_KINDS; kind++)
      for (size_t r = 0; r < sizeof roles / sizeof *roles; r++)
        add_unit(store, layer, (wn_piece){.layer = layer->layer, .group = group, .kind = kind, .role = roles[r]});
}

static void place_params(wn_store *store, const layer_state *layer, int64_t align) {
  for (int32_t i = layer->first_param; i < layer->first_param + layer->n_params; i++) {
    int32_t u = find_unit(store, layer, &store->params[i]);
    store->unit_of[i] = u;
    store->param_offset[i] = store->units[u].elements;
    store->units[u].elements += round_up(wn_param_elements(&store->params[i]), align);
  }
}

/* Pads units so that pieces are equal and aligned, and places the shared ones in the slots. */
static void finish_units(wn_store *store, const layer_state *layer, int64_t align) {
  int64_t weights = 0, grads = 0;
  for (int32_t u = layer->first_unit; u < layer->first_unit + layer->n_units; u++) {
    unit *at = &store->units[u];
    at->elements = round_up(at->elements, align * wn_group_size(at->group));
    at->piece_elements = at->elements / wn_group_size(at->group);
    if (!at->shared) continue;
    at->slot_bytes_at = weights;
    weights += at->elements * wn_dtype_bytes(store->device->dtype_of[store->pieces[u].role]);
    if (!at->trains) continue;
    at->grad_at = grads;
    grads += at->elements;
    if (at->elements > store->largest_reduced) store->largest_reduced = at->elements;
  }
  if (weights > store->slot_bytes) store->slot_bytes = weights;
  if (grads > store->grad_slot_elements) store->grad_slot_elements = grads;
}

/* This rank's share of every parameter; parameters of a unit are in order of offset. A layer's parameters may belong
 * to several units, so a parameter yields at most one segment here. */
static void cut_segments(wn_store *store) {
  for (int32_t l = 0; l < store->n_layers; l++) {
    const layer_state *layer = &store->layers[l];
    for (int32_t u = layer->first_unit; u < layer->first_unit + layer->n_units; u++) {
      wn_piece *piece = &store->pieces[u];
      int64_t from = wn_group_rank(store->units[u].group) * store->units[u].piece_elements;
      int64_t to = from + store->units[u].piece_elements;
      piece->segments = store->segments + store->n_segments;
      for (int32_t i = layer->first_param; i < layer->first_param + layer->n_params; i++) {
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

static void lay_out(wn_store *store) {
  int64_t align = align_elements(store->device);
  for (int32_t i = 0; i < store->n_params; i++) {
    if (i == 0 || store->params[i].layer != store->params[i - 1].layer)
      store->layers[store->n_layers++] =
          (layer_state){.layer = store->params[i].layer, .first_param = i, .weight_slot = NONE, .grad_slot = NONE};
    store->layers[store->n_layers - 1].n_params++;
  }
  for (int32_t l = 0; l < store->n_layers; l++) {
    add_layer_units(store, &store->layers[l]);
    place_params(store, &store->layers[l], align);
    finish_units(store, &store->layers[l], align);
  }
  cut_segments(store);
}

/* ---- memory ---------------------------------------------------------------------------------------------------- */

static wn_status zeroed(wn_store *store, wn_tensor *out, const char *name, wn_role role, int64_t elements) {
  WN_TRY(wn_device_tensor(store->device, out, store->device->weights, name, role, 1, elements, 0, 0, 0));
  return store->device->ops->zero(store->device, out);
}

static wn_status allocate_piece(wn_store *store, int32_t u) {
  const wn_device *device = store->device;
  wn_piece *piece = &store->pieces[u];
  int64_t n = store->units[u].piece_elements;
  /* a frozen piece has nothing but what operations take */
  WN_TRY(zeroed(store, &piece->master, "masters", piece->kind == WN_FROZEN ? piece->role : WN_MASTER, n));
  piece->weight = piece->master;
  if (piece->master.dtype != device->dtype_of[piece->role])
    WN_TRY(zeroed(store, &piece->weight, "weights", piece->role, n));
  if (!store->units[u].trains) return NULL;
  WN_TRY(zeroed(store, &piece->m, "first moments", WN_MASTER, n));
  WN_TRY(zeroed(store, &piece->v, "second moments", WN_MASTER, n));
  return zeroed(store, &piece->grad, "gradients", WN_WGRAD, n);
}

static wn_status allocate_memory(wn_store *store) {
  for (int32_t u = 0; u < store->n_units; u++) WN_TRY(allocate_piece(store, u));
  for (int32_t s = 0; s < N_SLOTS; s++) {
    if (store->slot_bytes > 0)
      WN_TRY(wn_tensor_alloc(&store->weight_slots[s], store->device->weights, "weight slots", WN_U8, 1,
                             store->slot_bytes, 0, 0, 0));
    if (store->grad_slot_elements > 0)
      WN_TRY(zeroed(store, &store->grad_slots[s], "gradient slots", WN_WGRAD, store->grad_slot_elements));
  }
  return NULL;
}

static wn_status allocate_tables(wn_store *store) {
  /* no more layers, units or segments than parameters */
  size_t n = (size_t)store->n_params;
  store->unit_of = calloc(n, sizeof *store->unit_of);
  store->param_offset = calloc(n, sizeof *store->param_offset);
  store->units = calloc(n, sizeof *store->units);
  store->pieces = calloc(n, sizeof *store->pieces);
  store->layers = calloc(n, sizeof *store->layers);
  store->segments = calloc(n, sizeof *store->segments);
  for (int32_t s = 0; s < N_SLOTS; s++) store->reducing[s].transfers = calloc(n, sizeof(wn_transfer *));
  if (!store->unit_of || !store->param_offset || !store->units || !store->pieces || !store->layers ||
      !store->segments || !store->reducing[0].transfers || !store->reducing[1].transfers)
    return WN_FAIL(WN_E_MEMORY, "out of memory for the tables of %d parameters", store->n_params);
  return NULL;
}

wn_status wn_store_create(wn_store **out, wn_device *device, wn_world *world, wn_group *const *groups, int32_t n_groups,
                          const wn_param *params, int32_t n_params) {
  WN_ASSERT(n_params > 0 && n_groups > 0 && n_groups <= MAX_GROUPS, "%d parameters, %d groups", n_params, n_groups);
  wn_store *store = calloc(1, sizeof *store);
  if (!store) return WN_FAIL(WN_E_MEMORY, "out of memory for the parameter store");
  *store = (wn_store){.device = device, .n_groups = n_groups, .params = params, .n_params = n_params};
  memcpy(store->groups, groups, (size_t)n_groups * sizeof *groups);
  wn_status status = NULL;
  check_params(store);
  for (int32_t g = 0; g < n_groups; g++)
    WN_KEEP_FIRST(status, check_same_table(store, g)); /* every rank in every group */
  if (!status) status = allocate_tables(store);
  if (!status) {
    lay_out(store);
    status = allocate_memory(store);
  }
  WN_TRY_GOTO(status, fail, wn_world_agree(world, status));
  WN_TRY_GOTO(status, fail, wn_comm_create(&store->comm, device, world, groups, n_groups, store->largest_reduced));
  *out = store;
  return NULL;
fail:
  wn_store_free(store);
  return status;
}

void wn_store_free(wn_store *store) {
  if (!store) return;
  wn_comm_free(store->comm);
  for (int32_t s = 0; s < N_SLOTS; s++) free(store->reducing[s].transfers);
  free(store->unit_of);
  free(store->param_offset);
  free(store->units);
  free(store->pieces);
  free(store->layers);
  free(store->segments);
  free(store);
}

/* ---- weights --------------------------------------------------------------------------------------------------- */

static layer_state *find_layer(const wn_store *store, int32_t layer) {
  for (int32_t l = 0; l < store->n_layers; l++)
    if (store->layers[l].layer == layer) return &store->layers[l];
  WN_ASSERT(false, "no parameters in layer %d", layer);
}

static int32_t take_slot(bool *taken, const char *what, int32_t layer) {
  for (int32_t s = 0; s < N_SLOTS; s++)
    if (!taken[s]) {
      taken[s] = true;
      return s;
    }
  WN_ASSERT(false, "%s of layer %d wanted while %d layers hold theirs", what, layer, N_SLOTS);
}

static wn_tensor weights_of(const wn_store *store, const layer_state *layer, int32_t u) {
  const unit *at = &store->units[u];
  if (!at->shared) return store->pieces[u].weight;
  return wn_tensor_of((char *)store->weight_slots[layer->weight_slot].data + at->slot_bytes_at,
                      store->pieces[u].weight.dtype, 1, at->elements, 0, 0, 0);
}

static wn_tensor grads_of(const wn_store *store, const layer_state *layer, int32_t u) {
  const unit *at = &store->units[u];
  if (!at->shared) return store->pieces[u].grad;
  return wn_tensor_slice(store->grad_slots[layer->grad_slot], 0, at->grad_at, at->elements);
}

static wn_tensor param_view(const wn_store *store, int32_t i, wn_tensor whole) {
  const wn_param *p = &store->params[i];
  wn_tensor flat = wn_tensor_slice(whole, 0, store->param_offset[i], wn_param_elements(p));
  return wn_tensor_of(flat.data, flat.dtype, p->rank, p->dim[0], p->rank > 1 ? p->dim[1] : 0,
                      p->rank > 2 ? p->dim[2] : 0, 0);
}

static wn_status hold(wn_store *store, layer_state *layer) {
  if (layer->weight_slot != NONE) return NULL;
  layer->weight_slot = take_slot(store->weight_slot_taken, "weights", layer->layer);
  for (int32_t u = layer->first_unit; u < layer->first_unit + layer->n_units; u++) {
    if (!store->units[u].shared) continue;
    wn_tensor whole = weights_of(store, layer, u);
    WN_TRY(wn_comm_gather(store->comm, store->units[u].group, &store->units[u].gathering, &whole,
                          &store->pieces[u].weight));
  }
  return NULL;
}

static wn_status await(wn_store *store, const layer_state *layer) {
  for (int32_t u = layer->first_unit; u < layer->first_unit + layer->n_units; u++) {
    wn_transfer *transfer = store->units[u].gathering;
    store->units[u].gathering = NULL;
    wn_status status = wn_comm_finish(store->comm, transfer);
    if (status) return wn_status_prefix(status, "gathering the weights of layer %d", layer->layer);
  }
  return NULL;
}

wn_status wn_store_publish(wn_store *store) {
  for (int32_t u = 0; u < store->n_units; u++) {
    wn_piece *piece = &store->pieces[u];
    if (piece->weight.data != piece->master.data)
      WN_TRY(store->device->ops->cast(store->device, &piece->weight, &piece->master));
  }
  return NULL;
}

wn_status wn_store_prefetch(wn_store *store, int32_t layer) {
  return hold(store, find_layer(store, layer));
}

wn_status wn_store_acquire(wn_store *store, int32_t layer_number, wn_tensor *by_param) {
  layer_state *layer = find_layer(store, layer_number);
  WN_ASSERT(!layer->acquired, "layer %d is acquired already", layer_number);
  WN_TRY(hold(store, layer));
  WN_TRY(await(store, layer));
  layer->acquired = true;
  for (int32_t i = layer->first_param; i < layer->first_param + layer->n_params; i++)
    by_param[i] = param_view(store, i, weights_of(store, layer, store->unit_of[i]));
  return NULL;
}

wn_status wn_store_release(wn_store *store, int32_t layer_number) {
  layer_state *layer = find_layer(store, layer_number);
  WN_ASSERT(layer->weight_slot != NONE, "layer %d is not held", layer_number);
  WN_TRY(await(store, layer)); /* prefetched and never used: the slot must not be written to any more */
  store->weight_slot_taken[layer->weight_slot] = false;
  layer->weight_slot = NONE;
  layer->acquired = false;
  return NULL;
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

wn_status wn_store_grads(wn_store *store, int32_t layer_number, wn_tensor *by_param) {
  layer_state *layer = find_layer(store, layer_number);
  WN_ASSERT(layer->grad_slot == NONE, "the gradients of layer %d are open already", layer_number);
  if (layer->trains) {
    layer->grad_slot = take_slot(store->grad_slot_taken, "gradients", layer_number);
    WN_TRY(arrive(store, layer->grad_slot));
  }
  for (int32_t i = layer->first_param; i < layer->first_param + layer->n_params; i++) {
    int32_t u = store->unit_of[i];
    by_param[i] = store->units[u].trains ? param_view(store, i, grads_of(store, layer, u)) : (wn_tensor){0};
  }
  return NULL;
}

wn_status wn_store_reduce(wn_store *store, int32_t layer_number) {
  layer_state *layer = find_layer(store, layer_number);
  if (!layer->trains) return NULL;
  WN_ASSERT(layer->grad_slot != NONE, "the gradients of layer %d are not open", layer_number);
  for (int32_t u = layer->first_unit; u < layer->first_unit + layer->n_units; u++) {
    if (!store->units[u].shared || !store->units[u].trains) continue;
    wn_tensor whole = grads_of(store, layer, u);
    reducing *r = &store->reducing[layer->grad_slot];
    wn_status status =
        wn_comm_reduce_scatter(store->comm, store->units[u].group, &r->transfers[r->n], &store->pieces[u].grad, &whole);
    r->n++;
    if (status) return wn_status_prefix(status, "summing the gradients of layer %d", layer_number);
  }
  store->grad_slot_taken[layer->grad_slot] = false;
  layer->grad_slot = NONE;
  return NULL;
}

/* ---- access ---------------------------------------------------------------------------------------------------- */

int32_t wn_store_pieces(const wn_store *store) {
  return store->n_units;
}

wn_piece *wn_store_piece(wn_store *store, int32_t i) {
  WN_ASSERT(i >= 0 && i < store->n_units, "piece %d of %d", i, store->n_units);
  return &store->pieces[i];
}

const wn_param *wn_store_params(const wn_store *store, int32_t *n) {
  *n = store->n_params;
  return store->params;
}

wn_status wn_store_take_wait_s(wn_store *store, double *seconds) {
  return wn_comm_take_wait_s(store->comm, seconds);
}

wn_group *wn_store_group(const wn_store *store, int32_t group) {
  WN_ASSERT(group >= 0 && group < store->n_groups, "group %d of %d", group, store->n_groups);
  return store->groups[group];
}

void wn_store_print(const wn_store *store, FILE *out) {
  static const char *const kind_names[WN_N_KINDS] = {"base", "indexer", "frozen", "buffer"};
  int64_t elements = 0, bytes = 0;
  fprintf(out, "%5s %5s %-8s %14s %18s\n", "layer", "group", "kind", "elements", "bytes a rank");
  for (int32_t u = 0; u < store->n_units; u++) {
    const wn_piece *piece = &store->pieces[u];
    int64_t unit_bytes = wn_tensor_bytes(&piece->master);
    if (piece->weight.data != piece->master.data) unit_bytes += wn_tensor_bytes(&piece->weight);
    if (store->units[u].trains)
      unit_bytes += wn_tensor_bytes(&piece->m) + wn_tensor_bytes(&piece->v) + wn_tensor_bytes(&piece->grad);
    fprintf(out, "%5d %5d %-8s %14lld %18lld\n", piece->layer, piece->group, kind_names[piece->kind],
            (long long)store->units[u].elements, (long long)unit_bytes);
    elements += store->units[u].elements;
    bytes += unit_bytes;
  }
  int64_t slot_bytes = 0;
  for (int32_t s = 0; s < N_SLOTS; s++)
    slot_bytes += store->slot_bytes + store->grad_slot_elements * wn_dtype_bytes(store->device->dtype_of[WN_WGRAD]);
  fprintf(out, "%5s %5s %-8s %14s %18lld\n", "", "", "slots", "", (long long)slot_bytes);
  fprintf(out, "%5s %5s %-8s %14lld %18lld\n", "", "", "total", (long long)elements, (long long)(bytes + slot_bytes));
}
