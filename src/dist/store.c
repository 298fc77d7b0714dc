/* The parameter store: creation, memory of the pieces, access. Its layout is store_layout.c, the life of gathered
 * weights and gradients store_flow.c. */
#include "dist/store.h"

#include <stdlib.h>
#include <string.h>

#include "base/float8.h"
#include "base/hash.h"
#include "dist/store_internal.h"
#include "kernels/kernels.h"

int64_t wn_param_elements(const wn_param *p) {
  int64_t n = 1;
  for (int32_t i = 0; i < p->rank; i++) n *= p->dim[i];
  return n;
}

bool wn_kind_trains(wn_kind kind) {
  return kind == WN_BASE || kind == WN_INDEXER;
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
    WN_ASSERT(!p->fp8 || (p->kind == WN_FROZEN && p->role == WN_ACT && p->rank == 2), "%s as FP8", p->hf_name);
    WN_ASSERT(p->part == 0 || (p->part > 0 && p->kind == WN_FROZEN), "part %d of %s", p->part, p->hf_name);
  }
}

/* The members of a group must lay out the same parameters: a rank that read another configuration is found here.
 * all: room for as many digests as the group has members. */
static wn_status check_same_table(const wn_store *store, int32_t group, wn_hash *all) {
  enum { NUMBERS = 9 };
  wn_group *members = store->groups[group];
  wn_hash own = wn_hash_fold(NULL, 0);
  for (int32_t i = 0; i < store->n_params; i++) {
    const wn_param *p = &store->params[i];
    if (p->group != group) continue;
    int64_t numbers[NUMBERS] = {p->layer, p->kind, p->rank, p->slot, p->part, p->fp8};
    for (int32_t d = 0; d < p->rank; d++) numbers[6 + d] = p->dim[d];
    wn_hash chain[3] = {own, wn_hash_bytes(p->hf_name, strlen(p->hf_name)), wn_hash_bytes(numbers, sizeof numbers)};
    own = wn_hash_fold(chain, 3);
  }
  int32_t size = wn_group_size(members), other = NONE;
  WN_TRY(wn_group_gather(members, all, &own, sizeof own));
  for (int32_t r = 0; r < size && other == NONE; r++)
    if (!wn_hash_equal(all[r], own)) other = r;
  if (other == NONE) return NULL;
  return WN_FAIL_HINT(WN_E_WORLD, "start every rank with the same job file and the same program",
                      "rank %d and rank %d of group %d lay out different parameters", wn_group_rank(members), other,
                      group);
}

/* ---- memory ---------------------------------------------------------------------------------------------------- */

static wn_status zeroed(wn_store *store, wn_tensor *out, const char *name, wn_dtype dtype, int64_t elements) {
  WN_TRY(wn_tensor_alloc(out, store->device->weights, name, dtype, 1, elements, 0, 0, 0));
  return store->device->ops->zero(store->device, out);
}

static wn_status allocate_piece(wn_store *store, int32_t u) {
  const unit *at = &store->units[u];
  wn_piece *piece = &store->pieces[u];
  const wn_dtype *dtype_of = store->dtype_of, weight = wn_stored_dtype(store, piece);
  int64_t n = at->piece_elements;
  /* a frozen piece has nothing but what is gathered */
  WN_TRY(zeroed(store, &piece->master, "masters", piece->kind == WN_FROZEN ? weight : dtype_of[WN_MASTER], n));
  piece->weight = piece->master;
  if (piece->master.dtype != weight) WN_TRY(zeroed(store, &piece->weight, "weights", weight, n));
  if (piece->fp8) WN_TRY(zeroed(store, &piece->scale, "block scales", WN_F32, at->n_scales));
  if (!at->trains) return NULL;
  WN_TRY(zeroed(store, &piece->m, "first moments", dtype_of[WN_MOMENT], n));
  WN_TRY(zeroed(store, &piece->v, "second moments", dtype_of[WN_MOMENT], n));
  return zeroed(store, &piece->grad, "gradients", dtype_of[WN_WGRAD], n);
}

static wn_status allocate_memory(wn_store *store) {
  static const char *const slots[N_CLASSES] = {"weight slots", "expert slots"};
  static const char *const wide[N_CLASSES] = {"dequantised weights", "dequantised experts"};
  wn_arena *arena = store->device->weights;
  for (int32_t u = 0; u < store->n_units; u++) WN_TRY(allocate_piece(store, u));
  for (int c = 0; c < N_CLASSES; c++) { /* written whole before they are read */
    for (int s = 0; s < N_SLOTS && store->slot_bytes[c] > 0; s++)
      WN_TRY(wn_tensor_alloc(&store->weight_slots[c][s], arena, slots[c], WN_U8, 1, store->slot_bytes[c], 0, 0, 0));
    if (store->wide_elements[c] > 0)
      WN_TRY(wn_tensor_alloc(&store->wide[c], arena, wide[c], store->dtype_of[WN_ACT], 1, store->wide_elements[c], 0, 0,
                             0));
  }
  for (int s = 0; s < N_SLOTS && store->grad_slot_elements > 0; s++)
    WN_TRY(
        zeroed(store, &store->grad_slots[s], "gradient slots", store->dtype_of[WN_WGRAD], store->grad_slot_elements));
  return NULL;
}

wn_status wn_store_create(wn_store **out, wn_device *device, wn_world *world, wn_group *const *groups, int32_t n_groups,
                          const wn_param *params, int32_t n_params) {
  WN_ASSERT(n_params > 0 && n_groups > 0 && n_groups <= MAX_GROUPS, "%d parameters, %d groups", n_params, n_groups);
  wn_store *store = calloc(1, sizeof *store);
  wn_hash *digests = calloc((size_t)wn_world_size(world), sizeof *digests);
  wn_status status =
      wn_world_agree(world, store && digests ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for the parameter store"));
  if (status) {
    free(digests);
    free(store);
    return status;
  }
  *store = (wn_store){.device = device, .n_groups = n_groups, .params = params, .n_params = n_params};
  memcpy(store->dtype_of, device->dtype_of, sizeof store->dtype_of);
  for (int32_t g = 0; g < n_groups; g++) {
    store->groups[g] = groups[g];
    store->group_size[g] = wn_group_size(groups[g]);
    store->group_rank[g] = wn_group_rank(groups[g]);
  }
  check_params(store);
  for (int32_t g = 0; g < n_groups; g++)
    WN_KEEP_FIRST(status, check_same_table(store, g, digests)); /* every rank in every group */
  free(digests);
  if (!status) status = wn_store_lay_out(store);
  if (!status) status = allocate_memory(store);
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
  free(store->scale_offset);
  free(store->units);
  free(store->pieces);
  free(store->holdings);
  free(store->segments);
  free(store);
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

wn_traffic wn_store_traffic(const wn_store *store) {
  return wn_comm_traffic(store->comm);
}

wn_group *wn_store_group(const wn_store *store, int32_t group) {
  WN_ASSERT(group >= 0 && group < store->n_groups, "group %d of %d", group, store->n_groups);
  return store->groups[group];
}

wn_tensor wn_store_scales(const wn_store *store, int32_t param) {
  const wn_param *p = &store->params[param];
  WN_ASSERT(p->fp8, "block scales of %s", p->hf_name);
  int64_t rows = wn_f8_blocks(p->dim[0]), cols = wn_f8_blocks(p->dim[1]);
  wn_tensor flat =
      wn_tensor_slice(store->pieces[store->unit_of[param]].scale, 0, store->scale_offset[param], rows * cols);
  return wn_tensor_view(flat, 2, rows, cols, 0, 0);
}

static int64_t piece_bytes(const wn_piece *piece) {
  const wn_tensor *const all[] = {&piece->master, &piece->weight, &piece->scale, &piece->m, &piece->v, &piece->grad};
  int64_t bytes = 0;
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    bool again = all[i] == &piece->weight && piece->weight.data == piece->master.data;
    if (all[i]->data && !again) bytes += wn_tensor_bytes(all[i]);
  }
  return bytes;
}

void wn_store_print(const wn_store *store, FILE *out) {
  static const char *const kind_names[WN_N_KINDS] = {"base", "indexer", "frozen", "buffer"};
  int64_t elements = 0, bytes = 0, slot_bytes = 0;
  fprintf(out, "%5s %5s %-8s %14s %18s\n", "layer", "group", "kind", "elements", "bytes a rank");
  for (int32_t u = 0; u < store->n_units; u++) {
    const wn_piece *piece = &store->pieces[u];
    fprintf(out, "%5d %5d %-8s %14lld %18lld\n", piece->layer, piece->group,
            piece->fp8 ? "fp8" : kind_names[piece->kind], (long long)store->units[u].elements,
            (long long)piece_bytes(piece));
    elements += store->units[u].elements;
    bytes += piece_bytes(piece);
  }
  for (int c = 0; c < N_CLASSES; c++)
    slot_bytes += N_SLOTS * store->slot_bytes[c] + store->wide_elements[c] * wn_dtype_bytes(store->dtype_of[WN_ACT]);
  slot_bytes += N_SLOTS * store->grad_slot_elements * wn_dtype_bytes(store->dtype_of[WN_WGRAD]);
  fprintf(out, "%5s %5s %-8s %14s %18lld\n", "", "", "slots", "", (long long)slot_bytes);
  fprintf(out, "%5s %5s %-8s %14lld %18lld\n", "", "", "total", (long long)elements, (long long)(bytes + slot_bytes));
}
