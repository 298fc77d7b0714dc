/* Every operation of the CUDA device. A declaration takes its type from the operation table, so that a contract stands
 * in kernels.h only and cannot drift from it. */
#ifndef WN_KERNELS_CUDA_OPERATIONS_CUH
#define WN_KERNELS_CUDA_OPERATIONS_CUH

#include <type_traits>

#include "kernels/cuda/support.cuh"

#define WN_CUDA_OPERATION(name) std::remove_pointer<decltype(wn_ops::name)>::type wn_cuda_##name

extern "C" {
extern const wn_ops wn_cuda_ops; /* table.cu */

/* memory.cu */
WN_CUDA_OPERATION(zero);
WN_CUDA_OPERATION(cast);
WN_CUDA_OPERATION(upload);
WN_CUDA_OPERATION(download);

/* float8.cu */
WN_CUDA_OPERATION(dequantise);

/* products.cu */
WN_CUDA_OPERATION(linear);
WN_CUDA_OPERATION(linear_backward_input);
WN_CUDA_OPERATION(linear_backward_weight);
WN_CUDA_OPERATION(per_head_linear);
WN_CUDA_OPERATION(per_head_linear_backward_weight);
WN_CUDA_OPERATION(grouped_linear);
WN_CUDA_OPERATION(grouped_linear_backward_input);
WN_CUDA_OPERATION(grouped_linear_backward_weight);

/* norms.cu */
WN_CUDA_OPERATION(rms_norm);
WN_CUDA_OPERATION(rms_norm_backward);
WN_CUDA_OPERATION(layer_norm);
WN_CUDA_OPERATION(layer_norm_backward);

/* elementwise.cu */
WN_CUDA_OPERATION(rope);
WN_CUDA_OPERATION(add);
WN_CUDA_OPERATION(scale);
WN_CUDA_OPERATION(sum_heads);
WN_CUDA_OPERATION(broadcast_heads);
WN_CUDA_OPERATION(swiglu);
WN_CUDA_OPERATION(swiglu_backward);

/* head.cu */
WN_CUDA_OPERATION(embedding);
WN_CUDA_OPERATION(embedding_backward);
WN_CUDA_OPERATION(head_loss);

/* router.cu */
WN_CUDA_OPERATION(router);
WN_CUDA_OPERATION(router_backward);

/* moe.cu */
WN_CUDA_OPERATION(moe_permute);
WN_CUDA_OPERATION(moe_permute_backward);
WN_CUDA_OPERATION(moe_combine);
WN_CUDA_OPERATION(moe_combine_backward);

/* attention_dense.cu */
WN_CUDA_OPERATION(attention_dense);
WN_CUDA_OPERATION(attention_dense_backward);

/* attention_sparse.cu, attention_sparse_backward.cu */
WN_CUDA_OPERATION(attention_sparse);
WN_CUDA_OPERATION(attention_sparse_backward);

/* attention_masked.cu */
WN_CUDA_OPERATION(attention_masked);
WN_CUDA_OPERATION(attention_masked_backward);

/* attention_delta.cu */
WN_CUDA_OPERATION(attention_delta);

/* indexer_select.cu */
WN_CUDA_OPERATION(indexer_scores);
WN_CUDA_OPERATION(indexer_select);

/* select.cu */
WN_CUDA_OPERATION(select_best);
WN_CUDA_OPERATION(select_pattern);

/* indexer_kl_dense.cu */
WN_CUDA_OPERATION(indexer_kl_dense);

/* indexer_kl_sparse.cu */
WN_CUDA_OPERATION(indexer_kl_sparse);

/* selection_stats.cu */
WN_CUDA_OPERATION(selection_stats);

/* optimizer.cu */
WN_CUDA_OPERATION(adamw);
WN_CUDA_OPERATION(sum_squares);
}

#endif
