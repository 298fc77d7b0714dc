/* The lightning indexer's scores for dumps, and its selection: chunks of rows whose scores fit in 2 GiB of scratch, an
 * exact top-k of each row of a chunk. Both take their scores from one function (index_score.cuh), so a dump and a
 * selection never disagree. */
#include "kernels/cuda/index_score.cuh"
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/topk.cuh"

enum { THREADS = 256 };

__global__ static void fill_kernel(wn_view<float> scores) {
  const int64_t all = scores.n * scores.width, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step)
    scores.data[i / scores.width * scores.row + i % scores.width] = -INFINITY;
}

wn_status wn_cuda_indexer_scores(wn_device *device, wn_tensor *scores, const wn_tensor *q, const wn_tensor *k,
                                 const wn_tensor *w, const wn_rows *rows, const wn_indexer_params *params) {
  wn_cuda_expect_indexer(q, k, w, rows);
  const wn_view<float> out = wn_view_of<float>(scores);
  WN_ASSERT(scores->rank == 2 && out.n == rows->n_rows && out.width == rows->n_keys, "scores [%lld, %d]",
            (long long)out.n, out.width);
  if (out.n == 0 || out.width == 0) return NULL;
  const int64_t blocks = wn_ceil_div(out.n * out.width, THREADS), most = (int64_t)wn_cuda_of(device)->n_sms * 8;
  fill_kernel<<<(unsigned)(blocks < most ? blocks : most), THREADS, 0, wn_cuda_stream(device)>>>(out);
  WN_CUDA_LAUNCHED("indexer_scores");
  return wn_cuda_index_scores(device, out.data, out.row, q, k, w, rows, 0, out.n, 0, params->scale);
}

wn_status wn_cuda_indexer_select(wn_device *device, wn_tensor *selection, const wn_tensor *q, const wn_tensor *k,
                                 const wn_tensor *w, const wn_rows *rows, const wn_indexer_params *params) {
  wn_cuda_expect_indexer(q, k, w, rows);
  const wn_view<int32_t> picks = wn_view_of<int32_t>(selection);
  WN_ASSERT(selection->rank == 2 && picks.n == rows->n_rows, "selection of %lld rows", (long long)picks.n);
  const int64_t pitch = wn_score_pitch(rows->n_keys), chunk = wn_score_chunk(picks.n, pitch);
  const size_t mark = wn_arena_mark(device->scratch);
  void *memory;
  WN_TRY(wn_cuda_scratch(device, &memory, "indexer scores", chunk * pitch * (int64_t)sizeof(float)));
  for (int64_t row0 = 0; row0 < picks.n; row0 += chunk) {
    const int64_t n = picks.n - row0 < chunk ? picks.n - row0 : chunk;
    wn_view<int32_t> part = picks;
    part.data += row0 * picks.row;
    part.n = n;
    WN_TRY(wn_cuda_index_scores(device, (float *)memory, pitch, q, k, w, rows, row0, n, picks.width, params->scale));
    WN_TRY(wn_cuda_top_k(device, part, (const float *)memory, pitch, rows->first_key + row0, rows->last_key + row0,
                         rows->n_keys));
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}
