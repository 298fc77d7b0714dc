/* The attention operations of the CPU device; contracts in kernels/kernels.h. */
#ifndef WN_KERNELS_CPU_ATTENTION_H
#define WN_KERNELS_CPU_ATTENTION_H

#include "kernels/cpu/real.h"

WN_MUST_USE wn_status WN_CPU(attention_dense)(wn_device *device, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                                              const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k,
                                              const wn_tensor *v, const wn_rows *rows,
                                              const wn_attention_params *params);
WN_MUST_USE wn_status WN_CPU(attention_dense_backward)(wn_device *device, wn_tensor *dq, wn_tensor *dk, wn_tensor *dv,
                                                       const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k,
                                                       const wn_tensor *v, const wn_tensor *lse, const wn_tensor *delta,
                                                       const wn_rows *rows, const wn_attention_params *params);
WN_MUST_USE wn_status WN_CPU(attention_sparse)(wn_device *device, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                                               const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *kv,
                                               const wn_tensor *selection, const wn_rows *rows,
                                               const wn_attention_params *params);
WN_MUST_USE wn_status WN_CPU(attention_sparse_backward)(wn_device *device, wn_tensor *dq, wn_tensor *dkv, wn_tensor *p,
                                                        const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *kv,
                                                        const wn_tensor *selection, const wn_tensor *lse,
                                                        const wn_tensor *delta, const wn_rows *rows,
                                                        const wn_attention_params *params);
WN_MUST_USE wn_status WN_CPU(attention_masked)(wn_device *device, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                                               const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k,
                                               const wn_tensor *v, const wn_tensor *selection, const wn_rows *rows,
                                               const wn_attention_params *params);
WN_MUST_USE wn_status WN_CPU(attention_masked_backward)(wn_device *device, wn_tensor *dq, wn_tensor *dk, wn_tensor *dv,
                                                        wn_tensor *p, const wn_tensor *d_o, const wn_tensor *q,
                                                        const wn_tensor *k, const wn_tensor *v,
                                                        const wn_tensor *selection, const wn_tensor *lse,
                                                        const wn_tensor *delta, const wn_rows *rows,
                                                        const wn_attention_params *params);
WN_MUST_USE wn_status WN_CPU(attention_delta)(wn_device *device, wn_tensor *delta, wn_tensor *o,
                                              const wn_tensor *unrounded, const wn_tensor *d_o);

#endif
