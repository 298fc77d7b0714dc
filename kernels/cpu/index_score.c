#include "kernels/cpu/index_score.h"

#include <string.h>

typedef wn_real vector __attribute__((vector_size(WN_VECTOR_BYTES)));
#ifdef WN_REAL64
typedef int64_t bits __attribute__((vector_size(WN_VECTOR_BYTES)));
#else
typedef int32_t bits __attribute__((vector_size(WN_VECTOR_BYTES)));
#endif
enum { LANES = WN_VECTOR_BYTES / (int)sizeof(wn_real), VECTORS = WN_PANEL / LANES };

void WN_CPU(expect_indexer)(const wn_tensor *q, const wn_tensor *k, const wn_tensor *w, const wn_rows *rows) {
  WN_EXPECT(q, WN_REAL_DTYPE, 3, rows->n_rows, q->dim[1], q->dim[2]);
  WN_EXPECT(k, WN_REAL_DTYPE, 2, rows->n_keys, q->dim[2]);
  WN_EXPECT(w, WN_REAL_DTYPE, 2, rows->n_rows, q->dim[1]);
}

wn_status wn_index_keys_pack(wn_device *device, wn_index_keys *out, const wn_tensor *k, const wn_rows *rows) {
  int32_t low = device->dry ? 0 : INT32_MAX, high = device->dry ? rows->n_keys - 1 : -1; /* unread: the most */
  for (int32_t i = 0; i < rows->n_rows && !device->dry; i++) {
    if (rows->first_key[i] > rows->last_key[i]) continue;
    low = wn_min_i32(low, rows->first_key[i]);
    high = wn_max_i32(high, rows->last_key[i]);
  }
  if (high < 0) low = 0;
  WN_ASSERT(low >= 0 && high < rows->n_keys, "rows see keys %d .. %d of %d", low, high, rows->n_keys);
  int64_t width = k->dim[1];
  int32_t first = low / WN_K_TILE * WN_K_TILE, n_panels = (high - first) / WN_PANEL + 1;
  if (high < 0) n_panels = 0;
  void *memory;
  WN_TRY(wn_arena_alloc(device->scratch, &memory, "packed indexer keys",
                        (size_t)n_panels * (size_t)(WN_PANEL * width) * sizeof(wn_real)));
  wn_real *panel = memory;
  *out = (wn_index_keys){.panel = panel, .first = first, .n_panels = n_panels, .width = width};
  if (device->dry) return NULL;
#pragma omp parallel for num_threads(device->threads) schedule(static) if (n_panels > 4)
  for (int32_t p = 0; p < n_panels; p++) {
    int64_t key = first + (int64_t)p * WN_PANEL;
    wn_transpose(panel + p * WN_PANEL * width, WN_PANEL, wn_row(k, key), k->stride[0],
                 wn_cpu_min(WN_PANEL, k->dim[0] - key), width);
  }
  return NULL;
}

/* n heads of a row against one panel; n is a constant wherever this is inlined, so that all sums stay in
 * registers */
static inline __attribute__((always_inline)) void heads_by_panel(vector sum[VECTORS], wn_real *z, int64_t z_stride,
                                                                 const wn_index_row *row, int64_t h0, int n,
                                                                 const wn_real *panel, int64_t width) {
  vector dot[WN_SCORE_HEADS][VECTORS];
  memset(dot, 0, sizeof dot);
  for (int64_t d = 0; d < width; d++) {
    vector key[VECTORS];
    for (int c = 0; c < VECTORS; c++) memcpy(&key[c], panel + d * WN_PANEL + c * LANES, sizeof key[c]);
    for (int j = 0; j < n; j++) {
      wn_real x = row->q[(h0 + j) * row->q_stride + d];
      for (int c = 0; c < VECTORS; c++) dot[j][c] += x * key[c];
    }
  }
  for (int j = 0; j < n; j++)
    for (int c = 0; c < VECTORS; c++) {
      vector scaled = dot[j][c] * row->scale;
      if (z) memcpy(z + (h0 + j) * z_stride + c * LANES, &scaled, sizeof scaled);
      bits positive = (bits)scaled & ~(bits)(scaled <= 0); /* relu that lets NaN through */
      sum[c] += row->w[h0 + j] * (vector)positive;
    }
}

void wn_index_score(wn_real *score, wn_real *z, int64_t z_stride, const wn_index_row *row, const wn_index_keys *keys,
                    int32_t origin, int32_t from, int32_t end) {
  if (from >= end) return;
  for (int32_t at = wn_panel_floor(keys, from); at < end; at += WN_PANEL) {
    const wn_real *panel = keys->panel + (int64_t)(at - keys->first) * keys->width;
    wn_real *z_at = z ? z + (at - origin) : NULL;
    vector sum[VECTORS];
    memset(sum, 0, sizeof sum);
    int64_t h = 0;
    for (; h + WN_SCORE_HEADS <= row->n_heads; h += WN_SCORE_HEADS)
      heads_by_panel(sum, z_at, z_stride, row, h, WN_SCORE_HEADS, panel, keys->width);
    for (; h < row->n_heads; h++) heads_by_panel(sum, z_at, z_stride, row, h, 1, panel, keys->width);
    memcpy(score + (at - origin), sum, sizeof sum);
  }
}
