/* Attention with keys and values of their own for each head, over all visible keys.
 *
 * The idea: nothing of size T x T is ever kept. Forward: one pass over the keys with a running maximum
 * (attention_forward.cuh). Backward: P is made again from the saved log-sum-exp for dK and dV, and dS goes through
 * scratch, a part of the heads or keys at a time, to one product for dQ: no two blocks add into one place
 * (attention_backward.cuh). Row tiles that see all of a key tile skip the mask, tiles of which nothing is visible are
 * skipped whole. Widths up to 192/128 run on warpgroup products and make nothing twice in the backward; wider ones, up
 * to 256, on warp-level ones, but for dQ's, and make S for dK and for dV.
 *
 * Ladder, 192/128, 16 heads, causal, T = 16384, counted as the visible half (backward 2.6 times the forward); forward
 * with delta, then backward:
 *   1  warp-level products, cp.async                             4.62 ms 297 TFLOP/s   17.02 ms 210 TFLOP/s
 *   2  warpgroup products; next logits during this softmax       3.15 ms 437           10.15 ms 352
 *   3  a third warpgroup starts the copy engine, the others      2.08 ms 661            8.46 ms 422
 *      wait for tiles only; dO for delta fetched as the last key tile (1.88 ms and 731 in another run)
 *   4  dS once, through scratch, in place of two walks that                             7.15 ms 500
 *      both make it (7 products for the 5 that are counted)
 *   5  the mask's tests only in tiles that it cuts                                      7.00 ms 510
 *   6  older maxima, Q in registers, whole tiles apart, stores    1.79 ms 768           7.14 ms 500
 *      of whole lines; in long calls two blocks share keys
 *   7  blocks, or pairs that share, make units until none is      1.78 ms 771           7.05 ms 507
 *      left (1.76 and 780 in another run)
 *   8  row tiles that see keys looked up once; dK and dV as                             6.71 ms 533
 *      whole lines; 4 GB of dS at a time, not 2
 * 8 ships: up to 98% and 68% of the 780 TFLOP/s of a large product. With 128 heads, T = 8192, 16384, 32768: forward
 * 3.70 ms 742, 15.8 ms 697, 61.2 ms 719 (FlashAttention 4 in the same run 668, 673, 697), backward 14.1 ms 507, 56.2 ms
 * 509, 221 ms 516 (388, 415, 431 deterministic, 465, 489, 487 as it comes, in the same run). Version 1's forward kernel
 * still serves 256/256. docs/performance.md has each step. */
#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/attention_forward.cuh"

wn_status wn_cuda_attention_dense(wn_device *device, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                                  const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k, const wn_tensor *v,
                                  const wn_rows *rows, const wn_attention_params *params) {
  const size_t mark = wn_arena_mark(device->scratch);
  wn_attend_job job;
  WN_TRY(wn_attend_begin_forward(device, &job, o, lse, delta, d_o, q, k, v, rows, params));
  if (job.n > 0 && job.heads > 0) {
    WN_TRY(wn_attend_plan_bounds(device, &job));
    WN_TRY(wn_with_widths(job.q.width, job.v.width, wn_attend_forward_launch<false>{device, &job}));
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}

wn_status wn_cuda_attention_dense_backward(wn_device *device, wn_tensor *dq, wn_tensor *dk, wn_tensor *dv,
                                           const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k,
                                           const wn_tensor *v, const wn_tensor *lse, const wn_tensor *delta,
                                           const wn_rows *rows, const wn_attention_params *params) {
  const size_t mark = wn_arena_mark(device->scratch);
  wn_attend_job job;
  WN_ASSERT(dq, "attention_dense_backward without gradients");
  WN_TRY(wn_attend_begin_backward(device, &job, dq, dk, dv, d_o, q, k, v, lse, delta, rows, params));
  if (job.n > 0 && job.heads > 0) {
    WN_TRY(wn_attend_plan_bounds(device, &job));
    WN_TRY(wn_with_widths(job.q.width, job.v.width, wn_attend_backward_launch<false>{device, &job, NULL, true, true}));
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}
