/* Picks that came from elsewhere, looked at before they become addresses. */
#include <assert.h>

#include "kernels/cuda/picks.cuh"

enum { THREADS = 256 };

__global__ static void expect_kernel(wn_view<int32_t> selection, int64_t n_keys) {
  const int64_t all = selection.n * selection.width, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    const int32_t key = selection.data[i / selection.width * selection.row + i % selection.width];
    assert(key < n_keys);
  }
}

wn_status wn_cuda_expect_picks(wn_device *device, const wn_view<int32_t> &selection, int64_t n_keys) {
  const int64_t blocks = wn_ceil_div(selection.n * selection.width, THREADS * 8);
  const int64_t most = (int64_t)wn_cuda_of(device)->n_sms * 8;
  if (blocks == 0) return NULL;
  expect_kernel<<<(unsigned)(blocks < most ? blocks : most), THREADS, 0, wn_cuda_stream(device)>>>(selection, n_keys);
  WN_CUDA_LAUNCHED("a look at the picks");
  return NULL;
}
