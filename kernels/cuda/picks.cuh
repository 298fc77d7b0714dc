/* Picks that came from elsewhere, looked at before they become addresses. */
#ifndef WN_KERNELS_CUDA_PICKS_CUH
#define WN_KERNELS_CUDA_PICKS_CUH

#include "kernels/cuda/support.cuh"

/* A pick that is no key is a programmer's error: an assertion on the device, after which nothing runs there. Kernels of
 * wgmma cannot assert themselves: with a call in them, and be it never taken, their products run one by one. Enqueues.
 */
WN_MUST_USE wn_status wn_cuda_expect_picks(wn_device *device, const wn_view<int32_t> &selection, int64_t n_keys);

#endif
