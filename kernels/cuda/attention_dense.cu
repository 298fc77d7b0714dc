/* Attention with keys and values of their own for each head, over all visible keys.
 *
 * The idea: nothing of size T x T ever leaves a block. Forward: one pass over the keys with a running maximum
 * (attention_forward.cuh). Backward: P is made again from the saved log-sum-exp, once for dQ and once for dK and dV, so
 * that no two blocks add into one place (attention_backward.cuh). Row tiles that see all of a key tile skip the mask,
 * tiles of which nothing is visible are skipped whole. Widths up to 192/128 run on warpgroup products, wider ones, up
 * to 256, on warp-level ones.
 *
 * Ladder, 192/128, 16 heads, causal, T = 16384, counted as the visible half (backward 2.5 times the forward); forward
 * with delta, then backward:
 *   1  warp-level products, cp.async                             4.62 ms 297 TFLOP/s   17.02 ms 202 TFLOP/s
 *   2  warpgroup products; next logits during this softmax       3.15 ms 437           10.15 ms 339
 *   3  a third warpgroup starts the copy engine, the others      2.08 ms 661            8.46 ms 406
 *      wait for tiles only; dO for delta fetched as the last key tile (1.88 ms and 731 in another run)
 * 3 ships: 85% and 52% of the 780 TFLOP/s of a large product. At T = 8192: 0.56 ms 609 and 2.31 ms 371; with 128 heads
 * 4.66 ms 590 and 17.9 ms 384. The backward executes 7 products for the 5 that are counted: 585 TFLOP/s. Version 1's
 * kernels still serve 256/256: 8 heads, T = 8192: 1.01 ms 272 and 4.28 ms 161. */
#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/attention_forward.cuh"

wn_status wn_cuda_attention_dense(wn_device *device, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                                  const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k, const wn_tensor *v,
                                  const wn_rows *rows, const wn_attention_params *params) {
  const size_t mark = wn_arena_mark(device->scratch);
  const int64_t n = rows->n_rows, heads = q->dim[1], dv = v->dim[2];
  wn_attend_job job;
  WN_ASSERT(!delta == !d_o, "delta and d_o come together");
  WN_TRY(wn_attend_begin(device, &job, q, k, v, rows, params));
  wn_attend_output(&job, o, dv);
  job.lse = wn_attend_stat(lse, n, heads);
  if (delta) {
    wn_attend_heads(d_o, n, heads, dv);
    WN_TRY(wn_attend_operand(device, &job.d_o, d_o));
    job.delta = wn_attend_stat(delta, n, heads);
  }
  if (n > 0 && heads > 0) {
    WN_TRY(wn_attend_plan_bounds(device, &job));
    WN_TRY(wn_with_widths((int32_t)q->dim[2], (int32_t)dv, wn_attend_forward_launch<false>{device, &job}));
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}

wn_status wn_cuda_attention_dense_backward(wn_device *device, wn_tensor *dq, wn_tensor *dk, wn_tensor *dv,
                                           const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k,
                                           const wn_tensor *v, const wn_tensor *lse, const wn_tensor *delta,
                                           const wn_rows *rows, const wn_attention_params *params) {
  const size_t mark = wn_arena_mark(device->scratch);
  const int64_t n = rows->n_rows, m = rows->n_keys, heads = q->dim[1];
  wn_attend_job job;
  WN_TRY(wn_attend_begin(device, &job, q, k, v, rows, params));
  job.dq = wn_attend_heads(dq, n, heads, q->dim[2]);
  job.dk = wn_attend_heads(dk, m, heads, q->dim[2]);
  job.dv = wn_attend_heads(dv, m, heads, v->dim[2]);
  wn_attend_heads(d_o, n, heads, v->dim[2]);
  WN_TRY(wn_attend_operand(device, &job.d_o, d_o));
  job.lse = wn_attend_stat(lse, n, heads);
  job.delta = wn_attend_stat(delta, n, heads);
  if (n > 0 && heads > 0) {
    WN_TRY(wn_attend_plan_bounds(device, &job));
    WN_TRY(wn_with_widths((int32_t)q->dim[2], (int32_t)v->dim[2], wn_attend_backward_launch<false>{device, &job}));
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}
