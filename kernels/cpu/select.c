/* The selections that eval compares the indexer with: the best possible, and those that ask no one. */
#include <omp.h>
#include <string.h>

#include "base/rng.h"
#include "kernels/cpu/dense_target.h"
#include "kernels/cpu/indexer.h"
#include "kernels/cpu/topk.h"

enum { SINK_KEYS = 4 };

wn_status WN_CPU(select_best)(wn_device *device, wn_tensor *selection, const wn_tensor *qa, const wn_tensor *ka,
                              const wn_rows *rows, const wn_attention_params *params) {
  wn_target target = {.qa = qa, .ka = ka, .rows = rows, .scale = (wn_real)params->scale};
  int32_t n = rows->n_rows;
  WN_EXPECT(selection, WN_I32, 2, n, selection->dim[1]);
  size_t mark = wn_arena_mark(device->scratch);
  wn_status status = NULL;
  wn_carver count = {0};
  wn_target_work counted;
  wn_target_take(&counted, &count, &target);
  (void)WN_CPU(take)(&count, (size_t)counted.pitch * sizeof(wn_score_key));
  void *memory;
  WN_TRY_GOTO(status, done,
              wn_arena_alloc(device->scratch, &memory, "dense rows", count.used * (size_t)device->threads));
  if (device->dry) goto done;
#pragma omp parallel num_threads(device->threads)
  {
    wn_target_work work;
    wn_carver carver = {.base = (char *)memory + count.used * (size_t)omp_get_thread_num()};
    wn_target_take(&work, &carver, &target);
    wn_score_key *key = WN_CPU(take)(&carver, (size_t)work.pitch * sizeof(wn_score_key));
#pragma omp for schedule(dynamic, 1)
    for (int32_t row0 = 0; row0 < n; row0 += WN_TARGET_ROWS) {
      int32_t row[WN_TARGET_ROWS], n_rows = wn_min_i32(WN_TARGET_ROWS, n - row0);
      for (int32_t r = 0; r < n_rows; r++) row[r] = row0 + r;
      wn_target_rows(&work, &target, row, n_rows);
      for (int32_t r = 0; r < n_rows; r++) {
        int32_t first = rows->first_key[row[r]], visible = wn_max_i32(rows->last_key[row[r]] - first + 1, 0);
        wn_top_k(wn_row_i32(selection, row[r]), selection->dim[1], work.p + r * work.pitch, key, visible, first);
      }
    }
  }
done:
  wn_arena_release(device->scratch, mark);
  return status;
}

/* k distinct of `visible` keys, marked one byte each: the first k places of a permutation of the row's own.
 */
static void draw_picks(uint8_t *picked, int32_t visible, int64_t k, int32_t position, const wn_pattern_params *params) {
  uint64_t row = (uint64_t)(uint32_t)params->layer << 32 | (uint32_t)position;
  uint64_t seed = wn_rng_u64(params->seed, WN_RNG_SELECT, row);
  memset(picked, 0, (size_t)visible);
  for (int64_t j = 0; j < k; j++) picked[wn_rng_permute(seed, WN_RNG_SELECT, (uint64_t)visible, (uint64_t)j)] = 1;
}

static void pattern_row(int32_t *pick, int64_t k, int32_t first, int32_t visible, int32_t position, uint8_t *picked,
                        const wn_pattern_params *params) {
  int64_t n = 0, sink = 0;
  if (visible > k && params->pattern == WN_PATTERN_RANDOM) {
    draw_picks(picked, visible, k, position, params);
    for (int32_t j = 0; j < visible; j++)
      if (picked[j]) pick[n++] = first + j;
  } else {
    int64_t kept = wn_cpu_min(visible, k);
    if (params->pattern == WN_PATTERN_SINK) sink = wn_cpu_min(SINK_KEYS, kept);
    for (; n < sink; n++) pick[n] = first + (int32_t)n;
    for (; n < kept; n++) pick[n] = first + visible - (int32_t)(kept - n);
  }
  for (; n < k; n++) pick[n] = -1;
}

wn_status WN_CPU(select_pattern)(wn_device *device, wn_tensor *selection, const wn_rows *rows,
                                 const wn_pattern_params *params) {
  int64_t k = selection->dim[1];
  WN_EXPECT(selection, WN_I32, 2, rows->n_rows, k);
  WN_ASSERT((unsigned)params->pattern <= WN_PATTERN_RANDOM, "pattern %d", (int)params->pattern);
  size_t mark = wn_arena_mark(device->scratch);
  wn_status status = NULL;
  int64_t n_keys = rows->n_keys;
  void *memory;
  WN_TRY_GOTO(status, done,
              wn_arena_alloc(device->scratch, &memory, "random picks", (size_t)(device->threads * n_keys)));
  if (device->dry) goto done;
#pragma omp parallel for num_threads(device->threads) schedule(static)
  for (int32_t i = 0; i < rows->n_rows; i++) {
    uint8_t *picked = (uint8_t *)memory + omp_get_thread_num() * n_keys;
    int32_t first = rows->first_key[i], visible = wn_max_i32(rows->last_key[i] - first + 1, 0);
    pattern_row(wn_row_i32(selection, i), k, first, visible, rows->position[i], picked, params);
  }
done:
  wn_arena_release(device->scratch, mark);
  return status;
}
