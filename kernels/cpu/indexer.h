/* The lightning indexer's operations on the CPU device, and the selections; contracts in kernels/kernels.h.
 */
#ifndef WN_KERNELS_CPU_INDEXER_H
#define WN_KERNELS_CPU_INDEXER_H

#include "kernels/cpu/real.h"

WN_MUST_USE wn_status WN_CPU(indexer_scores)(wn_device *device, wn_tensor *scores, const wn_tensor *q,
                                             const wn_tensor *k, const wn_tensor *w, const wn_rows *rows,
                                             const wn_indexer_params *params);
WN_MUST_USE wn_status WN_CPU(indexer_select)(wn_device *device, wn_tensor *selection, const wn_tensor *q,
                                             const wn_tensor *k, const wn_tensor *w, const wn_rows *rows,
                                             const wn_indexer_params *params);
WN_MUST_USE wn_status WN_CPU(indexer_kl_dense)(wn_device *device, wn_tensor *kl, wn_tensor *dq, wn_tensor *dk,
                                               wn_tensor *dw, const wn_tensor *q, const wn_tensor *k,
                                               const wn_tensor *w, const wn_tensor *qa, const wn_tensor *ka,
                                               const wn_tensor *lse, const wn_rows *rows,
                                               const wn_indexer_params *params);
WN_MUST_USE wn_status WN_CPU(indexer_kl_sparse)(wn_device *device, wn_tensor *kl, wn_tensor *dq, wn_tensor *dk,
                                                wn_tensor *dw, const wn_tensor *q, const wn_tensor *k,
                                                const wn_tensor *w, const wn_tensor *selection, const wn_tensor *p,
                                                const wn_rows *rows, const wn_indexer_params *params);
WN_MUST_USE wn_status WN_CPU(selection_stats)(wn_device *device, wn_tensor *stats, wn_tensor *picks,
                                              const wn_tensor *sample, const wn_tensor *picks_prev, const wn_tensor *q,
                                              const wn_tensor *k, const wn_tensor *w, const wn_tensor *qa,
                                              const wn_tensor *ka, const wn_rows *rows,
                                              const wn_indexer_params *params);
WN_MUST_USE wn_status WN_CPU(select_best)(wn_device *device, wn_tensor *selection, const wn_tensor *qa,
                                          const wn_tensor *ka, const wn_rows *rows, const wn_attention_params *params);
WN_MUST_USE wn_status WN_CPU(select_pattern)(wn_device *device, wn_tensor *selection, const wn_rows *rows,
                                             const wn_pattern_params *params);

#endif
