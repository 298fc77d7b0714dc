/* The operation table of the CUDA device. Every entry is a function by name: a family that is not there does not link.
 */
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/pace.cuh"

/* An operation, begun when the GPU is not too far behind. */
template <auto OPERATION> struct paced;
template <typename... Operands, wn_status (*OPERATION)(wn_device *, Operands...)> struct paced<OPERATION> {
  static wn_status run(wn_device *device, Operands... operands) {
    WN_TRY(wn_cuda_keep_pace(device));
    return OPERATION(device, operands...);
  }
};

extern "C" const wn_ops wn_cuda_ops = {
    .name = "cuda",
    .zero = paced<wn_cuda_zero>::run,
    .cast = paced<wn_cuda_cast>::run,
    .dequantise = paced<wn_cuda_dequantise>::run,
    .upload = paced<wn_cuda_upload>::run,
    .download = paced<wn_cuda_download>::run,
    .linear = paced<wn_cuda_linear>::run,
    .linear_backward_input = paced<wn_cuda_linear_backward_input>::run,
    .linear_backward_weight = paced<wn_cuda_linear_backward_weight>::run,
    .per_head_linear = paced<wn_cuda_per_head_linear>::run,
    .per_head_linear_backward_weight = paced<wn_cuda_per_head_linear_backward_weight>::run,
    .rms_norm = paced<wn_cuda_rms_norm>::run,
    .rms_norm_backward = paced<wn_cuda_rms_norm_backward>::run,
    .layer_norm = paced<wn_cuda_layer_norm>::run,
    .layer_norm_backward = paced<wn_cuda_layer_norm_backward>::run,
    .rope = paced<wn_cuda_rope>::run,
    .add = paced<wn_cuda_add>::run,
    .scale = paced<wn_cuda_scale>::run,
    .sum_heads = paced<wn_cuda_sum_heads>::run,
    .broadcast_heads = paced<wn_cuda_broadcast_heads>::run,
    .swiglu = paced<wn_cuda_swiglu>::run,
    .swiglu_backward = paced<wn_cuda_swiglu_backward>::run,
    .embedding = paced<wn_cuda_embedding>::run,
    .embedding_backward = paced<wn_cuda_embedding_backward>::run,
    .head_loss = paced<wn_cuda_head_loss>::run,
    .router = paced<wn_cuda_router>::run,
    .router_backward = paced<wn_cuda_router_backward>::run,
    .moe_permute = paced<wn_cuda_moe_permute>::run,
    .moe_permute_backward = paced<wn_cuda_moe_permute_backward>::run,
    .grouped_linear = paced<wn_cuda_grouped_linear>::run,
    .grouped_linear_backward_input = paced<wn_cuda_grouped_linear_backward_input>::run,
    .grouped_linear_backward_weight = paced<wn_cuda_grouped_linear_backward_weight>::run,
    .moe_combine = paced<wn_cuda_moe_combine>::run,
    .moe_combine_backward = paced<wn_cuda_moe_combine_backward>::run,
    .attention_dense = paced<wn_cuda_attention_dense>::run,
    .attention_dense_backward = paced<wn_cuda_attention_dense_backward>::run,
    .attention_sparse = paced<wn_cuda_attention_sparse>::run,
    .attention_sparse_backward = paced<wn_cuda_attention_sparse_backward>::run,
    .attention_masked = paced<wn_cuda_attention_masked>::run,
    .attention_masked_backward = paced<wn_cuda_attention_masked_backward>::run,
    .attention_delta = paced<wn_cuda_attention_delta>::run,
    .indexer_scores = paced<wn_cuda_indexer_scores>::run,
    .indexer_select = paced<wn_cuda_indexer_select>::run,
    .indexer_kl_dense = paced<wn_cuda_indexer_kl_dense>::run,
    .indexer_kl_sparse = paced<wn_cuda_indexer_kl_sparse>::run,
    .selection_stats = paced<wn_cuda_selection_stats>::run,
    .select_best = paced<wn_cuda_select_best>::run,
    .select_pattern = paced<wn_cuda_select_pattern>::run,
    .adamw = paced<wn_cuda_adamw>::run,
    .sum_squares = paced<wn_cuda_sum_squares>::run,
};
