/* What a GPU is, asked without taking it into use: planning for it takes none of its memory. */
#ifndef WN_KERNELS_CUDA_CARD_H
#define WN_KERNELS_CUDA_CARD_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct wn_cuda_card {
  char name[256]; /* "NVIDIA H200" */
  int32_t multiprocessors;
  size_t memory_bytes, block_shared_bytes; /* as the driver counts them */
} wn_cuda_card;

/* GPU `ordinal` of those that this process sees. WN_E_DEVICE: there is none such, or it is none that this build's
 * machine code runs on (compute capability 9.0). */
WN_MUST_USE wn_status wn_cuda_card_of(wn_cuda_card *out, int32_t ordinal);

#endif
