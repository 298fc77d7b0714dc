/* Small helpers of the CPU operations: asserting what a tensor must be, walking its rows, cutting work by fixed
 * chunks. Only real.h's scalar type appears, so each build has its own. */
#ifndef WN_KERNELS_CPU_VIEW_H
#define WN_KERNELS_CPU_VIEW_H

#include "kernels/cpu/real.h"

/* Asserts dtype, rank and dimensions of an operand, and that its last dimension is dense. */
#define WN_EXPECT(t, dtype_, rank_, ...)                                                                               \
  wn_cpu_expect(__FILE__, __LINE__, #t, (t), (dtype_), (rank_), (const int64_t[WN_MAX_RANK]){__VA_ARGS__})

static inline void wn_cpu_expect(const char *file, int line, const char *name, const wn_tensor *t, wn_dtype dtype,
                                 int32_t rank, const int64_t dim[WN_MAX_RANK]) {
  bool ok = t && t->dtype == dtype && t->rank == rank;
  for (int32_t i = 0; ok && i < rank; i++) ok = t->dim[i] == dim[i];
  ok = ok && (t->dim[rank - 1] <= 1 || t->stride[rank - 1] == 1);
  if (ok) return;
  if (!t) wn_assert_failed(file, line, name, "absent");
  wn_assert_failed(file, line, name,
                   "%s rank %d [%lld,%lld,%lld] last stride %lld, expected %s rank %d [%lld,%lld,%lld]",
                   wn_dtype_name(t->dtype), t->rank, (long long)t->dim[0], (long long)t->dim[1], (long long)t->dim[2],
                   (long long)t->stride[t->rank - 1], wn_dtype_name(dtype), rank, (long long)dim[0], (long long)dim[1],
                   (long long)dim[2]);
}

/* A "row" is a run along the last dimension; rows are counted in row-major order of the other dimensions. */
static inline int64_t wn_cpu_n_rows(const wn_tensor *t) {
  int64_t n = 1;
  for (int32_t i = 0; i < t->rank - 1; i++) n *= t->dim[i];
  return n;
}

static inline int64_t wn_cpu_row_offset(const wn_tensor *t, int64_t row) {
  if (t->rank == 2) return row * t->stride[0];
  int64_t offset = 0;
  for (int32_t i = t->rank - 2; i >= 0; i--) {
    offset += row % t->dim[i] * t->stride[i];
    row /= t->dim[i];
  }
  return offset;
}

static inline wn_real *wn_cpu_row(const wn_tensor *t, int64_t row) {
  return (wn_real *)t->data + wn_cpu_row_offset(t, row);
}

static inline int32_t *wn_cpu_index_row(const wn_tensor *t, int64_t row) {
  return (int32_t *)t->data + wn_cpu_row_offset(t, row);
}

/* Element i of a vector [n]. */
static inline wn_real *wn_cpu_at(const wn_tensor *t, int64_t i) {
  return (wn_real *)t->data + i * t->stride[0];
}

/* The end of an operation that only allocates (device->dry). */
static inline wn_status wn_cpu_release(wn_device *device, size_t mark) {
  wn_arena_release(device->scratch, mark);
  return NULL;
}

static inline int64_t wn_cpu_min(int64_t a, int64_t b) {
  return a < b ? a : b;
}

static inline int64_t wn_cpu_blocks(int64_t n, int64_t block) {
  return (n + block - 1) / block;
}

/* Elementwise work in pieces of at most WN_CPU_PIECE neighbours, so that one long row is shared out as well. */
enum { WN_CPU_PIECE = 16384 };

typedef struct wn_cpu_pieces {
  int64_t count, per_row, width;
} wn_cpu_pieces;
typedef struct wn_cpu_piece {
  int64_t row, from, count;
} wn_cpu_piece;

static inline wn_cpu_pieces wn_cpu_pieces_of(const wn_tensor *t) {
  int64_t width = t->dim[t->rank - 1], per_row = wn_cpu_blocks(width, WN_CPU_PIECE);
  return (wn_cpu_pieces){.count = wn_cpu_n_rows(t) * per_row, .per_row = per_row, .width = width};
}

static inline wn_cpu_piece wn_cpu_piece_at(const wn_cpu_pieces *pieces, int64_t i) {
  int64_t from = i % pieces->per_row * WN_CPU_PIECE;
  return (wn_cpu_piece){
      .row = i / pieces->per_row, .from = from, .count = wn_cpu_min(WN_CPU_PIECE, pieces->width - from)};
}

#endif
