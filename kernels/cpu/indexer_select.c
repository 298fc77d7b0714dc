#include <math.h>
#include <omp.h>

#include "kernels/cpu/index_score.h"
#include "kernels/cpu/indexer.h"
#include "kernels/cpu/topk.h"

enum { ROWS = 8 }; /* of a task */

wn_status WN_CPU(indexer_scores)(wn_device *device, wn_tensor *scores, const wn_tensor *q, const wn_tensor *k,
                                 const wn_tensor *w, const wn_rows *rows, const wn_indexer_params *params) {
  WN_CPU(expect_indexer)(q, k, w, rows);
  WN_EXPECT(scores, WN_REAL_DTYPE, 2, rows->n_rows, rows->n_keys);
  size_t mark = wn_arena_mark(device->scratch);
  wn_status status = NULL;
  wn_index_keys keys;
  WN_TRY_GOTO(status, done, wn_index_keys_pack(device, &keys, k, rows));
  int64_t width = (int64_t)keys.n_panels * WN_PANEL;
  void *memory;
  WN_TRY_GOTO(
      status, done,
      wn_arena_alloc(device->scratch, &memory, "indexer scores", (size_t)(device->threads * width) * sizeof(wn_real)));
  if (device->dry) goto done;
#pragma omp parallel for num_threads(device->threads) schedule(dynamic, ROWS)
  for (int32_t i = 0; i < rows->n_rows; i++) {
    wn_real *score = (wn_real *)memory + omp_get_thread_num() * width, *out = wn_row(scores, i);
    int32_t first = rows->first_key[i], last = rows->last_key[i];
    wn_index_row row = wn_index_row_of(q, w, i, params);
    wn_index_score(score, NULL, 0, &row, &keys, keys.first, first, last + 1);
    for (int32_t s = 0; s < rows->n_keys; s++)
      out[s] = s >= first && s <= last ? score[s - keys.first] : -(wn_real)INFINITY;
  }
done:
  wn_arena_release(device->scratch, mark);
  return status;
}

wn_status WN_CPU(indexer_select)(wn_device *device, wn_tensor *selection, const wn_tensor *q, const wn_tensor *k,
                                 const wn_tensor *w, const wn_rows *rows, const wn_indexer_params *params) {
  WN_CPU(expect_indexer)(q, k, w, rows);
  int64_t n_picks = selection->dim[1];
  WN_EXPECT(selection, WN_I32, 2, rows->n_rows, n_picks);
  size_t mark = wn_arena_mark(device->scratch);
  wn_status status = NULL;
  wn_index_keys keys;
  WN_TRY_GOTO(status, done, wn_index_keys_pack(device, &keys, k, rows));
  int64_t width = (int64_t)keys.n_panels * WN_PANEL;
  void *score_memory, *key_memory;
  WN_TRY_GOTO(status, done,
              wn_arena_alloc(device->scratch, &score_memory, "indexer scores",
                             (size_t)(device->threads * width) * sizeof(wn_real)));
  WN_TRY_GOTO(status, done,
              wn_arena_alloc(device->scratch, &key_memory, "indexer score keys",
                             (size_t)(device->threads * width) * sizeof(wn_score_key)));
  int32_t n = rows->n_rows;
  if (device->dry) goto done;
#pragma omp parallel for num_threads(device->threads) schedule(dynamic, ROWS)
  for (int32_t at = 0; at < n; at++) {
    int32_t i = n - 1 - at; /* the last rows see most keys: they go first */
    wn_real *score = (wn_real *)score_memory + omp_get_thread_num() * width;
    wn_score_key *key = (wn_score_key *)key_memory + omp_get_thread_num() * width;
    int32_t first = rows->first_key[i], visible = wn_max_i32(rows->last_key[i] - first + 1, 0);
    if (visible > n_picks) {
      wn_index_row row = wn_index_row_of(q, w, i, params);
      wn_index_score(score, NULL, 0, &row, &keys, keys.first, first, first + visible);
    }
    wn_top_k(wn_row_i32(selection, i), n_picks, score + (visible ? first - keys.first : 0), key, visible, first);
  }
done:
  wn_arena_release(device->scratch, mark);
  return status;
}
