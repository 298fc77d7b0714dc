/* The queue of a dry device: what is asked of it is not done.
 *
 * What an operation allocates is decided by its own host code, from shapes, so a plan runs that code as it is. Only
 * the calls that enqueue work end here: the linker leads them through the functions below (--wrap, in the Makefile),
 * which look at the queue and hand them on to the CUDA runtime for every queue but this one. A kernel's attributes have
 * no queue: where no GPU is open they are not set, so that planning beside a job leaves its GPU alone; and what the
 * runtime minds about being without one is no error. */
#include "kernels/cuda/support.cuh"

static const char queue = 0;

extern "C" cudaStream_t wn_cuda_dry_queue(void) {
  return (cudaStream_t)(uintptr_t)&queue;
}

#define HAND_ON(name, stream, parameters, arguments)                                                                   \
  extern "C" cudaError_t __real_##name parameters;                                                                     \
  extern "C" cudaError_t __wrap_##name parameters;                                                                     \
  extern "C" cudaError_t __wrap_##name parameters {                                                                    \
    return (stream) == wn_cuda_dry_queue() ? cudaSuccess : __real_##name arguments;                                    \
  }

HAND_ON(__cudaLaunchKernel, stream,
        (cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes, cudaStream_t stream),
        (kernel, grid, block, arguments, shared_bytes, stream))
HAND_ON(cudaLaunchKernelExC, config->stream, (const cudaLaunchConfig_t *config, const void *kernel, void **arguments),
        (config, kernel, arguments))
HAND_ON(cudaMemcpyAsync, stream, (void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream),
        (to, from, bytes, kind, stream))
HAND_ON(cudaMemcpy2DAsync, stream,
        (void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
         cudaMemcpyKind kind, cudaStream_t stream),
        (to, to_pitch, from, from_pitch, width, height, kind, stream))
HAND_ON(cudaMemsetAsync, stream, (void *to, int value, size_t bytes, cudaStream_t stream), (to, value, bytes, stream))
HAND_ON(cudaMemset2DAsync, stream,
        (void *to, size_t pitch, int value, size_t width, size_t height, cudaStream_t stream),
        (to, pitch, value, width, height, stream))
HAND_ON(cudaEventRecord, stream, (cudaEvent_t event, cudaStream_t stream), (event, stream))

extern "C" cudaError_t __real_cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value);
extern "C" cudaError_t __wrap_cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value);
extern "C" cudaError_t __wrap_cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value) {
  return wn_cuda_opened() ? __real_cudaFuncSetAttribute(kernel, attribute, value) : cudaSuccess;
}

extern "C" cudaError_t __real_cudaGetLastError(void);
extern "C" cudaError_t __wrap_cudaGetLastError(void);
extern "C" cudaError_t __wrap_cudaGetLastError(void) {
  const cudaError_t last = __real_cudaGetLastError();
  return wn_cuda_opened() ? last : cudaSuccess;
}
