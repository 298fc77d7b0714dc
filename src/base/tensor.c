#include "base/tensor.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <string.h>

#include "base/bits.h"
#include "base/stream.h"

static const struct {
  const char *name;
  int64_t bytes;
} dtypes[WN_N_DTYPES] = {
    [WN_F32] = {"F32", 4}, [WN_F64] = {"F64", 8},         [WN_BF16] = {"BF16", 2},
    [WN_F16] = {"F16", 2}, [WN_F8_E4M3] = {"F8_E4M3", 1}, [WN_F8_E8M0] = {"F8_E8M0", 1},
    [WN_I32] = {"I32", 4}, [WN_I64] = {"I64", 8},         [WN_U8] = {"U8", 1},
};

int64_t wn_dtype_bytes(wn_dtype dtype) {
  WN_ASSERT((unsigned)dtype < WN_N_DTYPES, "dtype %d", (int)dtype);
  return dtypes[dtype].bytes;
}

const char *wn_dtype_name(wn_dtype dtype) {
  WN_ASSERT((unsigned)dtype < WN_N_DTYPES, "dtype %d", (int)dtype);
  return dtypes[dtype].name;
}

static void set_dense_strides(wn_tensor *t) {
  int64_t stride = 1;
  for (int32_t i = t->rank - 1; i >= 0; i--) {
    t->stride[i] = stride;
    stride *= t->dim[i];
  }
}

wn_tensor wn_tensor_of(void *data, wn_dtype dtype, int32_t rank, int64_t d0, int64_t d1, int64_t d2, int64_t d3) {
  WN_ASSERT(rank >= 1 && rank <= WN_MAX_RANK, "rank %d", rank);
  const int64_t dims[WN_MAX_RANK] = {d0, d1, d2, d3};
  wn_tensor t = {.data = data, .dtype = dtype, .rank = rank};
  for (int32_t i = 0; i < rank; i++) {
    WN_ASSERT(dims[i] >= 0, "dimension %d is %lld", i, (long long)dims[i]);
    t.dim[i] = dims[i];
  }
  set_dense_strides(&t);
  return t;
}

wn_tensor wn_tensor_slice(wn_tensor t, int32_t axis, int64_t from, int64_t count) {
  WN_ASSERT(axis >= 0 && axis < t.rank, "axis %d of rank %d", axis, t.rank);
  WN_ASSERT(from >= 0 && count >= 0 && from + count <= t.dim[axis], "slice %lld+%lld of %lld", (long long)from,
            (long long)count, (long long)t.dim[axis]);
  if (t.data) t.data = (char *)t.data + from * t.stride[axis] * wn_dtype_bytes(t.dtype);
  t.dim[axis] = count;
  return t;
}

wn_tensor wn_tensor_view(wn_tensor t, int32_t rank, int64_t d0, int64_t d1, int64_t d2, int64_t d3) {
  wn_tensor v = wn_tensor_of(t.data, t.dtype, rank, d0, d1, d2, d3);
  WN_ASSERT(wn_tensor_dense(&t), "view of a strided tensor");
  WN_ASSERT(wn_tensor_count(&v) == wn_tensor_count(&t), "view of %lld elements as %lld", (long long)wn_tensor_count(&t),
            (long long)wn_tensor_count(&v));
  return v;
}

wn_tensor wn_tensor_split_last(wn_tensor t, int64_t a, int64_t b) {
  int32_t last = t.rank - 1;
  WN_ASSERT(t.rank < WN_MAX_RANK && t.dim[last] == a * b, "split %lld into %lld x %lld", (long long)t.dim[last],
            (long long)a, (long long)b);
  t.rank += 1;
  t.dim[last] = a;
  t.stride[last] = b;
  t.dim[last + 1] = b;
  t.stride[last + 1] = 1;
  return t;
}

int64_t wn_tensor_count(const wn_tensor *t) {
  int64_t count = 1;
  for (int32_t i = 0; i < t->rank; i++) count *= t->dim[i];
  return count;
}

int64_t wn_tensor_bytes(const wn_tensor *t) {
  return wn_tensor_count(t) * wn_dtype_bytes(t->dtype);
}

bool wn_tensor_dense(const wn_tensor *t) {
  int64_t stride = 1;
  for (int32_t i = t->rank - 1; i >= 0; i--) {
    if (t->dim[i] != 1 && t->stride[i] != stride) return false;
    stride *= t->dim[i];
  }
  return true;
}

bool wn_tensor_same_shape(const wn_tensor *a, const wn_tensor *b) {
  if (a->rank != b->rank) return false;
  return memcmp(a->dim, b->dim, (size_t)a->rank * sizeof a->dim[0]) == 0;
}

wn_status wn_tensor_alloc(wn_tensor *out, wn_arena *arena, const char *name, wn_dtype dtype, int32_t rank, int64_t d0,
                          int64_t d1, int64_t d2, int64_t d3) {
  wn_tensor t = wn_tensor_of(NULL, dtype, rank, d0, d1, d2, d3);
  WN_TRY(wn_arena_alloc(arena, &t.data, name, (size_t)wn_tensor_bytes(&t)));
  wn_arena_describe(arena, (int32_t)dtype, rank, t.dim);
  *out = t;
  return NULL;
}

/* ---- conversions: by bits and free of branches, so that their loops become vector code */

static inline uint16_t narrow(float x) {
  uint32_t bits = wn_bits_of(x), rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40u : rounded >> 16);
}

static inline float widen(uint16_t x) {
  return wn_float_of((uint32_t)x << 16);
}

static inline float widen_f16(uint16_t x) {
  uint32_t sign = (uint32_t)(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
  uint32_t normal = (magnitude << 13) + (112u << 23), infinite = 0x7f800000u | magnitude << 13;
  uint32_t subnormal = wn_bits_of((float)(int32_t)magnitude * 0x1p-24f); /* exact */
  uint32_t bits = magnitude < 0x0400u ? subnormal : normal;
  return wn_float_of(sign | (magnitude >= 0x7c00u ? infinite : bits));
}

uint16_t wn_bf16_from_f32(float x) {
  return narrow(x);
}
float wn_f32_from_bf16(uint16_t x) {
  return widen(x);
}
float wn_f32_from_f16(uint16_t x) {
  return widen_f16(x);
}

static inline uint16_t half_at(const void *from, int64_t i) {
  uint16_t half;
  memcpy(&half, (const char *)from + 2 * i, sizeof half);
  return half;
}

/* brain: BF16, else F16; a constant wherever this is called */
static inline uint16_t widen_all(float *out, const void *from, int64_t n, bool brain) {
  uint16_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    uint16_t half = half_at(from, i), magnitude = half & 0x7fff;
    most = magnitude > most ? magnitude : most;
    out[i] = brain ? widen(half) : widen_f16(half);
  }
  return most;
}

/* Whole weights pass here once, and are next used when others have taken the cache: written past it, they need not be
 * fetched before they are overwritten. */
#ifdef __AVX2__
/* n a multiple of 8, out on a multiple of 32 bytes */
static uint16_t widen_past_the_cache(float *out, const void *from, int64_t n) {
  const __m128i unsigned_part = _mm_set1_epi16(0x7fff);
  __m128i most = _mm_setzero_si128();
  for (int64_t i = 0; i < n; i += 8) {
    __m128i halves = _mm_loadu_si128((const void *)((const char *)from + 2 * i));
    most = _mm_max_epu16(most, _mm_and_si128(halves, unsigned_part));
    _mm256_stream_si256((void *)(out + i), _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  _mm_sfence();
  /* SSE has a least of eight, and the complement makes it the largest */
  const __m128i ones = _mm_set1_epi16(-1);
  return (uint16_t)~_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(most, ones)), 0);
}
#else
static uint16_t widen_past_the_cache(float *out, const void *from, int64_t n) {
  return widen_all(out, from, n, true);
}
#endif

static uint16_t larger(uint16_t a, uint16_t b) {
  return a > b ? a : b;
}

uint16_t wn_f32s_from_bf16(float *out, const void *from, int64_t n) {
  const char *halves = from;
  int64_t before = wn_f32s_before_line(out, n), past = (n - before) / 8 * 8, after = before + past;
  uint16_t most = widen_all(out, from, before, true);
  most = larger(most, widen_past_the_cache(out + before, halves + 2 * before, past));
  return larger(most, widen_all(out + after, halves + 2 * after, n - after, true));
}

uint16_t wn_f32s_from_f16(float *out, const void *from, int64_t n) {
  return widen_all(out, from, n, false);
}

void wn_bf16s_from_f32(uint16_t *out, const float *from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] = narrow(from[i]);
}

void wn_f32s_round_to_bf16(float *x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] = widen(narrow(x[i]));
}
