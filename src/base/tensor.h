/* A tensor is a view: it never owns memory. Strides are in elements; the last dimension is dense
 * (stride 1), the others are free, so that a slice of heads, columns or rows is a view and not a copy. */
#ifndef WN_BASE_TENSOR_H
#define WN_BASE_TENSOR_H

#include <stdbool.h>
#include <stdint.h>

#include "base/arena.h"
#include "base/status.h"

typedef enum wn_dtype {
  WN_F32,
  WN_F64,
  WN_BF16,
  WN_F16,
  WN_F8_E4M3,
  WN_I32,
  WN_I64,
  WN_U8,
  WN_F8_E8M0,
  WN_N_DTYPES
} wn_dtype;

enum { WN_MAX_RANK = 4 };

typedef struct wn_tensor {
  void *data; /* NULL: absent */
  wn_dtype dtype;
  int32_t rank;
  int64_t dim[WN_MAX_RANK];
  int64_t stride[WN_MAX_RANK];
} wn_tensor;

int64_t wn_dtype_bytes(wn_dtype dtype);
const char *wn_dtype_name(wn_dtype dtype); /* safetensors spelling: F32, BF16, F8_E4M3, I32 ... */

/* Dense view of `data`. Unused dimensions are given as 0: wn_tensor_of(p, WN_F32, 2, n, d, 0, 0). */
wn_tensor wn_tensor_of(void *data, wn_dtype dtype, int32_t rank, int64_t d0, int64_t d1, int64_t d2, int64_t d3);
/* Elements `from` .. `from + count` of dimension `axis`. */
wn_tensor wn_tensor_slice(wn_tensor t, int32_t axis, int64_t from, int64_t count);
/* The same memory with other dimensions; asserts that it is dense and that the counts agree. */
wn_tensor wn_tensor_view(wn_tensor t, int32_t rank, int64_t d0, int64_t d1, int64_t d2, int64_t d3);
/* Splits the last dimension in two, [.., a * b] -> [.., a, b]; works on row-strided tensors. */
wn_tensor wn_tensor_split_last(wn_tensor t, int64_t a, int64_t b);
int64_t wn_tensor_count(const wn_tensor *t); /* elements */
int64_t wn_tensor_bytes(const wn_tensor *t); /* elements times element size */
bool wn_tensor_dense(const wn_tensor *t);
bool wn_tensor_same_shape(const wn_tensor *a, const wn_tensor *b);

/* Dense tensor carved from an arena (not zeroed). Fails with WN_E_MEMORY, naming arena and tensor. */
WN_MUST_USE wn_status wn_tensor_alloc(wn_tensor *out, wn_arena *arena, const char *name, wn_dtype dtype, int32_t rank,
                                      int64_t d0, int64_t d1, int64_t d2, int64_t d3);

/* BF16 conversions: to nearest, ties to even; NaN stays NaN. */
uint16_t wn_bf16_from_f32(float x);
float wn_f32_from_bf16(uint16_t x);
float wn_f32_from_f16(uint16_t x);
/* The same for n at a time; `from` need not be aligned. Returned is the largest without its sign, as it is stored (0 of
 * none): from WN_BF16_INFINITY or WN_F16_INFINITY on, some are infinite or NaN. */
#define WN_BF16_INFINITY 0x7f80
#define WN_F16_INFINITY 0x7c00
uint16_t wn_f32s_from_bf16(float *out, const void *from, int64_t n);
uint16_t wn_f32s_from_f16(float *out, const void *from, int64_t n);
void wn_bf16s_from_f32(uint16_t *out, const float *from, int64_t n);
void wn_f32s_round_to_bf16(float *x, int64_t n); /* each to the nearest value that BF16 has, in place */

#endif
