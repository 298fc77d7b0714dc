/* Linear layers: plain, one weight a head, one weight an expert. All are tiled products (gemm.h). */
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/view.h"

/* y = x w^T */
static wn_cpu_gemm forward_of(const wn_tensor *y, const wn_tensor *x, const wn_tensor *w, bool accumulate) {
  int64_t n = x->dim[0], inputs = w->dim[1], outputs = w->dim[0];
  WN_EXPECT(y, WN_REAL_DTYPE, 2, n, outputs);
  WN_EXPECT(x, WN_REAL_DTYPE, 2, n, inputs);
  WN_EXPECT(w, WN_REAL_DTYPE, 2, outputs, inputs);
  return (wn_cpu_gemm){.c = y->data,
                       .a = x->data,
                       .b = w->data,
                       .m = n,
                       .n = outputs,
                       .k = inputs,
                       .c_stride = y->stride[0],
                       .a_stride = x->stride[0],
                       .b_stride = w->stride[0],
                       .transpose_b = true,
                       .accumulate = accumulate};
}

/* dx = dy w */
static wn_cpu_gemm backward_input_of(const wn_tensor *dx, const wn_tensor *dy, const wn_tensor *w, bool accumulate) {
  int64_t n = dy->dim[0], inputs = w->dim[1], outputs = w->dim[0];
  WN_EXPECT(dx, WN_REAL_DTYPE, 2, n, inputs);
  WN_EXPECT(dy, WN_REAL_DTYPE, 2, n, outputs);
  WN_EXPECT(w, WN_REAL_DTYPE, 2, outputs, inputs);
  return (wn_cpu_gemm){.c = dx->data,
                       .a = dy->data,
                       .b = w->data,
                       .m = n,
                       .n = inputs,
                       .k = outputs,
                       .c_stride = dx->stride[0],
                       .a_stride = dy->stride[0],
                       .b_stride = w->stride[0],
                       .accumulate = accumulate};
}

/* dw += dy^T x */
static wn_cpu_gemm backward_weight_of(const wn_tensor *dw, const wn_tensor *dy, const wn_tensor *x) {
  int64_t n = dy->dim[0], inputs = x->dim[1], outputs = dy->dim[1];
  WN_EXPECT(dw, WN_REAL_DTYPE, 2, outputs, inputs);
  WN_EXPECT(dy, WN_REAL_DTYPE, 2, n, outputs);
  WN_EXPECT(x, WN_REAL_DTYPE, 2, n, inputs);
  return (wn_cpu_gemm){.c = dw->data,
                       .a = dy->data,
                       .b = x->data,
                       .m = outputs,
                       .n = inputs,
                       .k = n,
                       .c_stride = dw->stride[0],
                       .a_stride = dy->stride[0],
                       .b_stride = x->stride[0],
                       .transpose_a = true,
                       .accumulate = true};
}

wn_status WN_CPU(linear)(wn_device *device, wn_tensor *y, const wn_tensor *x, const wn_tensor *w,
                         const wn_accumulate *params) {
  wn_cpu_gemm g = forward_of(y, x, w, params->accumulate);
  if (device->dry) return NULL;
  WN_CPU(gemm)(&g);
  return NULL;
}

wn_status WN_CPU(linear_backward_input)(wn_device *device, wn_tensor *dx, const wn_tensor *dy, const wn_tensor *w,
                                        const wn_accumulate *params) {
  wn_cpu_gemm g = backward_input_of(dx, dy, w, params->accumulate);
  if (device->dry) return NULL;
  WN_CPU(gemm)(&g);
  return NULL;
}

wn_status WN_CPU(linear_backward_weight)(wn_device *device, wn_tensor *dw, const wn_tensor *dy, const wn_tensor *x) {
  wn_cpu_gemm g = backward_weight_of(dw, dy, x);
  if (device->dry) return NULL;
  WN_CPU(gemm)(&g);
  return NULL;
}

wn_status WN_CPU(per_head_linear)(wn_device *device, wn_tensor *y, const wn_tensor *x, const wn_tensor *w,
                                  const wn_per_head_params *params) {
  int64_t n = x->dim[0], heads = w->dim[0], rows = w->dim[1], cols = w->dim[2];
  int64_t inputs = params->transpose ? cols : rows, outputs = params->transpose ? rows : cols;
  WN_EXPECT(y, WN_REAL_DTYPE, 3, n, heads, outputs);
  WN_EXPECT(x, WN_REAL_DTYPE, 3, n, heads, inputs);
  WN_EXPECT(w, WN_REAL_DTYPE, 3, heads, rows, cols);
  if (device->dry) return NULL;
#pragma omp parallel
  for (int64_t h = 0; h < heads; h++) {
    wn_cpu_gemm g = {.c = (wn_real *)y->data + h * y->stride[1],
                     .a = (const wn_real *)x->data + h * x->stride[1],
                     .b = (const wn_real *)w->data + h * w->stride[0],
                     .m = n,
                     .n = outputs,
                     .k = inputs,
                     .c_stride = y->stride[0],
                     .a_stride = x->stride[0],
                     .b_stride = w->stride[1],
                     .transpose_b = params->transpose,
                     .accumulate = params->accumulate};
    WN_CPU(gemm_tiles)(&g);
  }
  return NULL;
}

wn_status WN_CPU(per_head_linear_backward_weight)(wn_device *device, wn_tensor *dw, const wn_tensor *a,
                                                  const wn_tensor *b) {
  int64_t n = a->dim[0], heads = a->dim[1], rows = a->dim[2], cols = b->dim[2];
  WN_EXPECT(dw, WN_REAL_DTYPE, 3, heads, rows, cols);
  WN_EXPECT(a, WN_REAL_DTYPE, 3, n, heads, rows);
  WN_EXPECT(b, WN_REAL_DTYPE, 3, n, heads, cols);
  if (device->dry) return NULL;
#pragma omp parallel
  for (int64_t h = 0; h < heads; h++) {
    wn_cpu_gemm g = {.c = (wn_real *)dw->data + h * dw->stride[0],
                     .a = (const wn_real *)a->data + h * a->stride[1],
                     .b = (const wn_real *)b->data + h * b->stride[1],
                     .m = rows,
                     .n = cols,
                     .k = n,
                     .c_stride = dw->stride[1],
                     .a_stride = a->stride[0],
                     .b_stride = b->stride[0],
                     .transpose_a = true,
                     .accumulate = true};
    WN_CPU(gemm_tiles)(&g);
  }
  return NULL;
}

/* Rows of expert e. */
static wn_tensor expert_rows(const wn_tensor *t, const int64_t *offset, int32_t e) {
  return wn_tensor_slice(*t, 0, offset[e], offset[e + 1] - offset[e]);
}

wn_status WN_CPU(grouped_linear)(wn_device *device, wn_tensor *y, const wn_tensor *x, const wn_tensor *w,
                                 int32_t n_experts, const int64_t *offset, const wn_accumulate *params) {
  if (device->dry) return NULL;
#pragma omp parallel
  for (int32_t e = 0; e < n_experts; e++) {
    wn_tensor ye = expert_rows(y, offset, e), xe = expert_rows(x, offset, e);
    wn_cpu_gemm g = forward_of(&ye, &xe, &w[e], params->accumulate);
    WN_CPU(gemm_tiles)(&g);
  }
  return NULL;
}

wn_status WN_CPU(grouped_linear_backward_input)(wn_device *device, wn_tensor *dx, const wn_tensor *dy,
                                                const wn_tensor *w, int32_t n_experts, const int64_t *offset,
                                                const wn_accumulate *params) {
  if (device->dry) return NULL;
#pragma omp parallel
  for (int32_t e = 0; e < n_experts; e++) {
    wn_tensor dxe = expert_rows(dx, offset, e), dye = expert_rows(dy, offset, e);
    wn_cpu_gemm g = backward_input_of(&dxe, &dye, &w[e], params->accumulate);
    WN_CPU(gemm_tiles)(&g);
  }
  return NULL;
}

wn_status WN_CPU(grouped_linear_backward_weight)(wn_device *device, wn_tensor *dw, const wn_tensor *dy,
                                                 const wn_tensor *x, int32_t n_experts, const int64_t *offset) {
  if (device->dry) return NULL;
#pragma omp parallel
  for (int32_t e = 0; e < n_experts; e++) {
    wn_tensor dye = expert_rows(dy, offset, e), xe = expert_rows(x, offset, e);
    wn_cpu_gemm g = backward_weight_of(&dw[e], &dye, &xe);
    WN_CPU(gemm_tiles)(&g);
  }
  return NULL;
}
