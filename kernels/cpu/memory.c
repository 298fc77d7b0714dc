/* Zeroing, conversion between dtypes, FP8 weights, and copies between dense host memory and tensors. */
#include <math.h>
#include <string.h>

#include "base/float8.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/view.h"

static char *piece_at(const wn_tensor *t, wn_cpu_piece p) {
  return (char *)t->data + (wn_cpu_row_offset(t, p.row) + p.from) * wn_dtype_bytes(t->dtype);
}

static void expect_dense_last(const wn_tensor *t) {
  WN_ASSERT(t->dim[t->rank - 1] <= 1 || t->stride[t->rank - 1] == 1, "last stride %lld",
            (long long)t->stride[t->rank - 1]);
}

wn_status WN_CPU(zero)(wn_device *device, wn_tensor *x) {
  expect_dense_last(x);
  if (device->dry) return NULL;
  wn_cpu_pieces pieces = wn_cpu_pieces_of(x);
  size_t element = (size_t)wn_dtype_bytes(x->dtype);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < pieces.count; i++) {
    wn_cpu_piece p = wn_cpu_piece_at(&pieces, i);
    memset(piece_at(x, p), 0, (size_t)p.count * element);
  }
  return NULL;
}

/* FP64 to BF16 with one rounding: to odd in FP32 first (the last bit remembers that something was cut off), which
 * leaves the rounding to nearest even of the shorter format exact. */
static uint16_t bf16_from_f64(double x) {
  float y = (float)x;
  if ((double)y != x && !isnan(x)) {
    if (fabs((double)y) > fabs(x)) y = nextafterf(y, 0.0f);
    uint32_t bits;
    memcpy(&bits, &y, sizeof bits);
    bits |= 1u;
    memcpy(&y, &bits, sizeof y);
  }
  return wn_bf16_from_f32(y);
}

static void convert(char *restrict to, wn_dtype to_dtype, const char *restrict from, wn_dtype from_dtype, int64_t n) {
  float *to_f32 = (float *)to;
  double *to_f64 = (double *)to;
  uint16_t *to_bf16 = (uint16_t *)to;
  const float *f32 = (const float *)from;
  const double *f64 = (const double *)from;
  const uint16_t *bf16 = (const uint16_t *)from;
  if (from_dtype == WN_F32 && to_dtype == WN_F64) {
    for (int64_t i = 0; i < n; i++) to_f64[i] = (double)f32[i];
  } else if (from_dtype == WN_F32) {
    for (int64_t i = 0; i < n; i++) to_bf16[i] = wn_bf16_from_f32(f32[i]);
  } else if (from_dtype == WN_F64 && to_dtype == WN_F32) {
    for (int64_t i = 0; i < n; i++) to_f32[i] = (float)f64[i];
  } else if (from_dtype == WN_F64) {
    for (int64_t i = 0; i < n; i++) to_bf16[i] = bf16_from_f64(f64[i]);
  } else if (to_dtype == WN_F32) {
    for (int64_t i = 0; i < n; i++) to_f32[i] = wn_f32_from_bf16(bf16[i]);
  } else {
    for (int64_t i = 0; i < n; i++) to_f64[i] = (double)wn_f32_from_bf16(bf16[i]);
  }
}

static bool is_float(wn_dtype dtype) {
  return dtype == WN_F32 || dtype == WN_F64 || dtype == WN_BF16;
}

wn_status WN_CPU(cast)(wn_device *device, wn_tensor *dst, const wn_tensor *src) {
  WN_ASSERT(wn_tensor_same_shape(dst, src), "cast between shapes");
  WN_ASSERT(dst->dtype == src->dtype || (is_float(dst->dtype) && is_float(src->dtype)), "cast from %s to %s",
            wn_dtype_name(src->dtype), wn_dtype_name(dst->dtype));
  expect_dense_last(dst);
  expect_dense_last(src);
  if (device->dry) return NULL;
  wn_cpu_pieces pieces = wn_cpu_pieces_of(dst);
  size_t element = (size_t)wn_dtype_bytes(dst->dtype);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < pieces.count; i++) {
    wn_cpu_piece p = wn_cpu_piece_at(&pieces, i);
    char *to = piece_at(dst, p);
    const char *from = piece_at(src, p);
    if (dst->dtype == src->dtype)
      memmove(to, from, (size_t)p.count * element);
    else
      convert(to, dst->dtype, from, src->dtype, p.count);
  }
  return NULL;
}

wn_status WN_CPU(dequantise)(wn_device *device, wn_tensor *w, const wn_tensor *codes, const wn_tensor *scale) {
  enum { AT_ONCE = 1024 };
  int64_t rows = codes->dim[0], cols = codes->dim[1];
  WN_EXPECT(w, w->dtype == WN_BF16 ? WN_BF16 : WN_REAL_DTYPE, 2, rows, cols);
  WN_EXPECT(codes, WN_F8_E4M3, 2, rows, cols);
  WN_EXPECT(scale, WN_F32, 2, wn_f8_blocks(rows), wn_f8_blocks(cols));
  WN_ASSERT(wn_tensor_dense(w) && wn_tensor_dense(codes) && wn_tensor_dense(scale), "strided FP8 weights");
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    float wide[AT_ONCE];
    for (int64_t at = row * cols, n; at < (row + 1) * cols; at += n) {
      n = wn_cpu_min(AT_ONCE, (row + 1) * cols - at);
      wn_f8_dequantise(wide, (const uint8_t *)codes->data + at, scale->data, cols, at, n);
      if (w->dtype == WN_BF16) {
        wn_bf16s_from_f32((uint16_t *)w->data + at, wide, n);
      } else {
        wn_real *to = (wn_real *)w->data + at;
        wn_f32s_round_to_bf16(wide, n);
        for (int64_t i = 0; i < n; i++) to[i] = (wn_real)wide[i];
      }
    }
  }
  return NULL;
}

wn_status WN_CPU(upload)(wn_device *device, wn_tensor *dst, const void *host) {
  wn_tensor dense =
      wn_tensor_of((void *)(uintptr_t)host, dst->dtype, dst->rank, dst->dim[0], dst->dim[1], dst->dim[2], dst->dim[3]);
  return WN_CPU(cast)(device, dst, &dense);
}

wn_status WN_CPU(download)(wn_device *device, void *host, const wn_tensor *src) {
  if (device->dry) {
    memset(host, 0, (size_t)wn_tensor_bytes(src));
    return NULL;
  }
  wn_tensor dense = wn_tensor_of(host, src->dtype, src->rank, src->dim[0], src->dim[1], src->dim[2], src->dim[3]);
  return WN_CPU(cast)(device, &dense, src);
}
