/* The indexer's scores by Hopper's asynchronous tensor cores, for the shapes that models have. */
#ifndef WN_KERNELS_CUDA_INDEX_SCORE_WIDE_CUH
#define WN_KERNELS_CUDA_INDEX_SCORE_WIDE_CUH

#include "kernels/cuda/support.cuh"

/* 8, 16, 32 or 64 heads of 64 or 128 columns, 16-byte aligned. */
bool wn_cuda_index_scores_wide_fits(const wn_view<wn_bf16> &q, const wn_view<wn_bf16> &k);

/* As wn_cuda_index_scores; q, w, first and last begin at row 0 of the range, q.n rows. */
WN_MUST_USE wn_status wn_cuda_index_scores_wide(wn_device *device, float *scores, int64_t pitch,
                                                const wn_view<wn_bf16> &q, const wn_view<wn_bf16> &k,
                                                const wn_view<float> &w, const int32_t *first, const int32_t *last,
                                                int32_t least, float scale);

#endif
