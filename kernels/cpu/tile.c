#include "kernels/cpu/tile.h"

#include <string.h>

void *WN_CPU(take)(wn_carver *carver, size_t bytes) {
  void *at = carver->base ? carver->base + carver->used : NULL;
  carver->used += (bytes + WN_ARENA_ALIGN - 1) / WN_ARENA_ALIGN * WN_ARENA_ALIGN;
  return at;
}

void wn_transpose(wn_real *out, int64_t lanes, const wn_real *rows, int64_t stride, int64_t n_rows, int64_t n_columns) {
  for (int64_t c = 0; c < n_columns; c++) {
    for (int64_t r = 0; r < n_rows; r++) out[c * lanes + r] = rows[r * stride + c];
    for (int64_t r = n_rows; r < lanes; r++) out[c * lanes + r] = 0;
  }
}

void wn_walk_take(wn_key_walk *walk, wn_carver *carver, const wn_tensor *selection, int64_t n_keys) {
  walk->selection = selection;
  walk->mask = wn_take_reals(carver, WN_K_TILE * WN_Q_BLOCK);
  walk->list = selection ? wn_take_ints(carver, n_keys) : NULL;
  walk->place = selection ? wn_take_ints(carver, n_keys) : NULL;
}

/* The picked keys of the block, each once. */
static void list_picks(wn_key_walk *walk) {
  walk->n_list = 0;
  if (walk->low > walk->high) return;
  int32_t low = walk->low, span = walk->high - low + 1;
  memset(walk->place, 0, (size_t)span * sizeof(int32_t));
  int64_t k = walk->selection->dim[1];
  for (int32_t i = 0; i < walk->n_rows; i++) {
    const int32_t *pick = wn_row_i32(walk->selection, walk->row0 + i);
    walk->slot[i] = walk->slot_end[i] = 0;
    for (int64_t j = 0; j < k && pick[j] >= 0; j++) {
      WN_ASSERT(pick[j] >= walk->first[i] && pick[j] <= walk->last[i], "row %lld picks key %d, sees %d .. %d",
                (long long)(walk->row0 + i), pick[j], walk->first[i], walk->last[i]);
      walk->place[pick[j] - low] = 1;
    }
  }
  for (int32_t i = 0; i < span; i++) {
    if (!walk->place[i]) continue;
    walk->place[i] = walk->n_list;
    walk->list[walk->n_list++] = low + i;
  }
}

void wn_walk_begin(wn_key_walk *walk, const wn_rows *rows, int64_t row0, int32_t n_rows) {
  walk->row0 = row0;
  walk->n_rows = n_rows;
  walk->lanes = (int32_t)wn_pad_lanes(n_rows);
  walk->low = INT32_MAX;
  walk->high = -1;
  for (int32_t i = 0; i < walk->lanes; i++) {
    int32_t first = i < n_rows ? rows->first_key[row0 + i] : 1, last = i < n_rows ? rows->last_key[row0 + i] : 0;
    if (first > last) {
      walk->first[i] = 1;
      walk->last[i] = 0;
      continue;
    }
    WN_ASSERT(first >= 0 && last < rows->n_keys, "row %lld sees keys %d .. %d of %d", (long long)(row0 + i), first,
              last, rows->n_keys);
    walk->first[i] = first;
    walk->last[i] = last;
    walk->low = wn_min_i32(walk->low, first);
    walk->high = wn_max_i32(walk->high, last);
  }
  if (walk->selection) list_picks(walk);
  walk->next = walk->selection ? 0 : walk->low;
}

static bool next_run(wn_key_walk *walk) {
  while (walk->next <= walk->high) {
    int32_t from = walk->next, end = wn_min_i32((from / WN_K_TILE + 1) * WN_K_TILE, walk->high + 1);
    bool any = false, all = true;
    for (int32_t i = 0; i < walk->n_rows; i++) {
      any |= walk->first[i] < end && walk->last[i] >= from && walk->first[i] <= walk->last[i];
      all &= walk->first[i] <= from && walk->last[i] >= end - 1;
    }
    walk->next = end;
    if (!any) continue;
    walk->keys = NULL;
    walk->key0 = from;
    walk->n_keys = end - from;
    walk->partial = !all;
    for (int32_t j = 0; !all && j < walk->n_keys; j++)
      for (int32_t i = 0; i < walk->lanes; i++)
        walk->mask[j * walk->lanes + i] = (wn_real)(from + j >= walk->first[i] && from + j <= walk->last[i]);
    return true;
  }
  return false;
}

static bool next_list(wn_key_walk *walk) {
  if (walk->next >= walk->n_list) return false;
  int32_t from = walk->next, end = wn_min_i32(from + WN_K_TILE, walk->n_list);
  walk->next = end;
  walk->keys = walk->list + from;
  walk->key0 = from;
  walk->n_keys = end - from;
  walk->partial = true;
  memset(walk->mask, 0, (size_t)walk->n_keys * (size_t)walk->lanes * sizeof(wn_real));
  int64_t k = walk->selection->dim[1];
  for (int32_t i = 0; i < walk->n_rows; i++) {
    const int32_t *pick = wn_row_i32(walk->selection, walk->row0 + i);
    int32_t s = walk->slot[i] = walk->slot_end[i];
    for (; s < k && pick[s] >= 0 && walk->place[pick[s] - walk->low] < end; s++)
      walk->mask[(walk->place[pick[s] - walk->low] - from) * walk->lanes + i] = 1;
    walk->slot_end[i] = s;
  }
  return true;
}

bool wn_walk_next(wn_key_walk *walk) {
  return walk->selection ? next_list(walk) : next_run(walk);
}

wn_status wn_partials_create(wn_device *device, wn_partials *out, int64_t n_groups, int64_t n_keys, int64_t width) {
  void *memory;
  WN_TRY(wn_arena_alloc(device->scratch, &memory, "gradient shares",
                        (size_t)(n_groups * n_keys * width) * sizeof(wn_real)));
  *out = (wn_partials){.share = memory, .n_groups = n_groups, .n_keys = n_keys, .width = width};
  return NULL;
}

wn_real *wn_partials_begin(const wn_partials *partials, int64_t group) {
  int64_t count = partials->n_keys * partials->width;
  wn_real *share = partials->share + group * count;
  memset(share, 0, (size_t)count * sizeof(wn_real));
  return share;
}

void wn_partials_add(wn_device *device, const wn_partials *partials, wn_tensor *to) {
  int64_t width = partials->width, count = partials->n_keys * width;
#pragma omp parallel for num_threads(device->threads) schedule(static)
  for (int64_t i = 0; i < partials->n_keys; i++) {
    wn_real *restrict out = wn_row(to, i);
    for (int64_t g = 0; g < partials->n_groups; g++) {
      const wn_real *restrict share = partials->share + g * count + i * width;
      for (int64_t c = 0; c < width; c++) out[c] += share[c];
    }
  }
}
