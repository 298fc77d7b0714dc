/* The operation table of the CPU device. Every entry is a function by name: a family that is not there does not link.
 */
#include "kernels/cpu/attention.h"
#include "kernels/cpu/indexer.h"
#include "kernels/cpu/operations.h"

const wn_ops WN_CPU(ops) = {
    .name = "cpu",

    .zero = WN_CPU(zero),
    .cast = WN_CPU(cast),
    .dequantise = WN_CPU(dequantise),
    .upload = WN_CPU(upload),
    .download = WN_CPU(download),

    .linear = WN_CPU(linear),
    .linear_backward_input = WN_CPU(linear_backward_input),
    .linear_backward_weight = WN_CPU(linear_backward_weight),
    .per_head_linear = WN_CPU(per_head_linear),
    .per_head_linear_backward_weight = WN_CPU(per_head_linear_backward_weight),

    .rms_norm = WN_CPU(rms_norm),
    .rms_norm_backward = WN_CPU(rms_norm_backward),
    .layer_norm = WN_CPU(layer_norm),
    .layer_norm_backward = WN_CPU(layer_norm_backward),
    .rope = WN_CPU(rope),
    .add = WN_CPU(add),
    .scale = WN_CPU(scale),
    .sum_heads = WN_CPU(sum_heads),
    .broadcast_heads = WN_CPU(broadcast_heads),
    .swiglu = WN_CPU(swiglu),
    .swiglu_backward = WN_CPU(swiglu_backward),
    .embedding = WN_CPU(embedding),
    .embedding_backward = WN_CPU(embedding_backward),

    .head_loss = WN_CPU(head_loss),

    .router = WN_CPU(router),
    .router_backward = WN_CPU(router_backward),
    .moe_permute = WN_CPU(moe_permute),
    .moe_permute_backward = WN_CPU(moe_permute_backward),
    .grouped_linear = WN_CPU(grouped_linear),
    .grouped_linear_backward_input = WN_CPU(grouped_linear_backward_input),
    .grouped_linear_backward_weight = WN_CPU(grouped_linear_backward_weight),
    .moe_combine = WN_CPU(moe_combine),
    .moe_combine_backward = WN_CPU(moe_combine_backward),

    .attention_dense = WN_CPU(attention_dense),
    .attention_dense_backward = WN_CPU(attention_dense_backward),
    .attention_sparse = WN_CPU(attention_sparse),
    .attention_sparse_backward = WN_CPU(attention_sparse_backward),
    .attention_masked = WN_CPU(attention_masked),
    .attention_masked_backward = WN_CPU(attention_masked_backward),
    .attention_delta = WN_CPU(attention_delta),

    .indexer_scores = WN_CPU(indexer_scores),
    .indexer_select = WN_CPU(indexer_select),
    .indexer_kl_dense = WN_CPU(indexer_kl_dense),
    .indexer_kl_sparse = WN_CPU(indexer_kl_sparse),
    .selection_stats = WN_CPU(selection_stats),
    .select_best = WN_CPU(select_best),
    .select_pattern = WN_CPU(select_pattern),

    .adamw = WN_CPU(adamw),
    .sum_squares = WN_CPU(sum_squares),
};
