/* Every operation of the CPU device that is not attention or indexer. A declaration takes its type from the
 * operation table, so that a contract stands in kernels.h only and cannot drift from it. */
#ifndef WN_KERNELS_CPU_OPERATIONS_H
#define WN_KERNELS_CPU_OPERATIONS_H

#include "kernels/cpu/real.h"

#define WN_CPU_OPERATION(name) __typeof__(*((const wn_ops *)0)->name) WN_CPU(name)

extern const wn_ops WN_CPU(ops); /* table.c */

/* memory.c */
WN_CPU_OPERATION(zero);
WN_CPU_OPERATION(cast);
WN_CPU_OPERATION(dequantise);
WN_CPU_OPERATION(upload);
WN_CPU_OPERATION(download);

/* products.c */
WN_CPU_OPERATION(linear);
WN_CPU_OPERATION(linear_backward_input);
WN_CPU_OPERATION(linear_backward_weight);
WN_CPU_OPERATION(per_head_linear);
WN_CPU_OPERATION(per_head_linear_backward_weight);
WN_CPU_OPERATION(grouped_linear);
WN_CPU_OPERATION(grouped_linear_backward_input);
WN_CPU_OPERATION(grouped_linear_backward_weight);

/* norms.c */
WN_CPU_OPERATION(rms_norm);
WN_CPU_OPERATION(rms_norm_backward);
WN_CPU_OPERATION(layer_norm);
WN_CPU_OPERATION(layer_norm_backward);

/* elementwise.c */
WN_CPU_OPERATION(rope);
WN_CPU_OPERATION(add);
WN_CPU_OPERATION(scale);
WN_CPU_OPERATION(sum_heads);
WN_CPU_OPERATION(broadcast_heads);
WN_CPU_OPERATION(swiglu);
WN_CPU_OPERATION(swiglu_backward);

/* head.c */
WN_CPU_OPERATION(embedding);
WN_CPU_OPERATION(embedding_backward);
WN_CPU_OPERATION(head_loss);

/* router.c */
WN_CPU_OPERATION(router);
WN_CPU_OPERATION(router_backward);

/* moe.c */
WN_CPU_OPERATION(moe_permute);
WN_CPU_OPERATION(moe_permute_backward);
WN_CPU_OPERATION(moe_combine);
WN_CPU_OPERATION(moe_combine_backward);

/* optimizer.c */
WN_CPU_OPERATION(adamw);
WN_CPU_OPERATION(sum_squares);

#endif
