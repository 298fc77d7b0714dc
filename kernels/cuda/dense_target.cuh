/* Dense attention, averaged over heads: what an indexer is measured by. */
#ifndef WN_KERNELS_CUDA_DENSE_TARGET_CUH
#define WN_KERNELS_CUDA_DENSE_TARGET_CUH

#include "kernels/cuda/support.cuh"

/* p[n, pitch] = mean over heads of softmax(scale q.k) at the keys that each row sees; nothing else is written, and rows
 * that see at most `least` keys are left out. q: the n rows of `rows`; k has its heads or one. Enqueues; scratch is
 * heads * n, and 8 bytes more for each piece of 8192 keys. */
WN_MUST_USE wn_status wn_cuda_dense_target(wn_device *device, float *p, int64_t pitch, const wn_view<wn_bf16> &q,
                                           const wn_view<wn_bf16> &k, const wn_rows *rows, int32_t least, double scale);

#endif
