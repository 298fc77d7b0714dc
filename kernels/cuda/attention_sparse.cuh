/* What the two forms of absorbed sparse attention's forward share. */
#ifndef WN_KERNELS_CUDA_ATTENTION_SPARSE_CUH
#define WN_KERNELS_CUDA_ATTENTION_SPARSE_CUH

#include "kernels/cuda/support.cuh"

typedef struct wn_sparse_forward {
  wn_view<wn_bf16> q, kv, o, d_o; /* d_o.data NULL: no delta */
  wn_view<float> lse, delta;
  wn_view<int32_t> selection;
  float scale_log2; /* scale / ln 2 */
  int32_t v_width, groups, stages;
  bool q_aligned, kv_aligned, o_pairs, d_o_pairs;
} wn_sparse_forward;

/* For 512 + 64 columns, aligned rows and more than 16 heads. Enqueues. attention_sparse_wide.cu */
WN_MUST_USE wn_status wn_sparse_forward_wide(wn_device *device, wn_sparse_forward a);

#endif
