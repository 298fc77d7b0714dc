/* The CUDA device of a build without nvcc: it says so. */
#include "kernels/cuda/card.h"
#include "kernels/cuda/cuda.h"

static const char why_absent[] = "this build has no CUDA half: nvcc was not there when it was made";

int32_t wn_cuda_count(const char **why) {
  if (why) *why = why_absent;
  return 0;
}

wn_status wn_cuda_card_of(wn_cuda_card *out, int32_t ordinal) {
  (void)out, (void)ordinal;
  return WN_FAIL_HINT(WN_E_DEVICE, "install the CUDA Toolkit and build again, or use device: cpu", "%s", why_absent);
}

wn_status wn_cuda_create(wn_device **out, wn_cuda_settings settings) {
  (void)out;
  (void)settings;
  return WN_FAIL_HINT(WN_E_DEVICE, "install the CUDA Toolkit and build again, or use device: cpu", "%s", why_absent);
}

wn_status wn_cuda_create_dry(wn_device **out, int32_t multiprocessors, int32_t threads) {
  (void)out, (void)multiprocessors, (void)threads;
  return WN_FAIL_HINT(WN_E_DEVICE, "install the CUDA Toolkit and build again, or plan for device: cpu", "%s",
                      why_absent);
}

void wn_cuda_free(wn_device *device) {
  WN_ASSERT(!device, "a CUDA device in a build without CUDA");
}

const char *wn_cuda_name(const wn_device *device) {
  WN_ASSERT(!device, "a CUDA device in a build without CUDA");
  return "";
}

wn_status wn_cuda_memory(wn_device *device, size_t *total_used, size_t *arenas, size_t *other) {
  WN_ASSERT(!device, "a CUDA device in a build without CUDA");
  *total_used = *arenas = *other = 0;
  return NULL;
}

wn_status wn_cuda_synchronize(wn_device *device) {
  WN_ASSERT(!device, "a CUDA device in a build without CUDA");
  return NULL;
}

void wn_cuda_set_watch(wn_device *device, wn_status (*watch)(void *context, double waited_s), void *context) {
  (void)watch, (void)context;
  WN_ASSERT(!device, "a CUDA device in a build without CUDA");
}

wn_status wn_cuda_timer_start(wn_device *device) {
  WN_ASSERT(!device, "a CUDA device in a build without CUDA");
  return NULL;
}

wn_status wn_cuda_timer_stop(wn_device *device, double *seconds) {
  WN_ASSERT(!device, "a CUDA device in a build without CUDA");
  *seconds = 0;
  return NULL;
}

void *wn_cuda_compute_queue(wn_device *device) {
  WN_ASSERT(!device, "a CUDA device in a build without CUDA");
  return NULL;
}

void *wn_cuda_comm_queue(wn_device *device) {
  WN_ASSERT(!device, "a CUDA device in a build without CUDA");
  return NULL;
}

wn_status wn_cuda_sum_pieces(wn_device *device, void *queue, float *piece, const float *received, int32_t size,
                             int64_t n) {
  WN_ASSERT(!device, "a CUDA device in a build without CUDA");
  (void)queue;
  (void)piece;
  (void)received;
  (void)size;
  (void)n;
  return NULL;
}
