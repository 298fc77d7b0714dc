/* What tests of CUDA operations share: the same tensors on the CPU in FP64 and on the GPU in their role's dtype, the
 * comparison of what came out, as a norm and as the worst row of a head, and twenty bitwise repeats. Inputs are rounded
 * to the GPU's dtype first, so both devices compute from the same numbers. */
#ifndef WN_TEST_TWIN_H
#define WN_TEST_TWIN_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cuda/cuda.h"
#include "support/test.h"

typedef struct twin_bench {
  wn_device *cpu, *cuda; /* cpu: FP64 */
} twin_bench;

/* One tensor on both. Memory from the stashes; it goes with twin_end. */
typedef struct twin {
  wn_tensor cpu, cuda;
  wn_role role;
} twin;

enum { TWIN_REPEATS = 20 };

/* Group setup and teardown: *state is a twin_bench. Without a GPU every test of the program is skipped, aloud. */
static inline int twin_setup(void **state) {
  const char *why;
  twin_bench *b = calloc(1, sizeof *b);
  if (wn_cuda_count(&why) > 0) {
    OK(wn_cpu_create_f64(&b->cpu, (wn_cpu_settings){0}));
    OK(wn_cuda_create(&b->cuda, (wn_cuda_settings){0}));
  } else {
    print_message("every test here is skipped: %s\n", why);
  }
  *state = b;
  return 0;
}

static inline int twin_teardown(void **state) {
  twin_bench *b = *state;
  if (b->cpu) wn_cpu_free_f64(b->cpu);
  wn_cuda_free(b->cuda);
  free(b);
  return 0;
}

/* First line of every test: the bench, empty. */
static inline twin_bench *twin_begin(void **state) {
  twin_bench *b = *state;
  if (!b->cuda) skip();
  return b;
}

/* Last line of every test: all tensors go, and no scratch may be left. */
static inline void twin_end(twin_bench *b) {
  OK(wn_cuda_synchronize(b->cuda));
  assert_int_equal(wn_arena_used_bytes(b->cuda->scratch), 0);
  assert_int_equal(wn_arena_used_bytes(b->cpu->scratch), 0);
  wn_arena_release(b->cuda->stash, 0);
  wn_arena_release(b->cpu->stash, 0);
}

/* Dense, but for `margin` elements after every innermost row of the GPU's (0: dense). Content undefined. */
static inline twin twin_strided(twin_bench *b, wn_role role, int64_t margin, int32_t rank, int64_t d0, int64_t d1,
                                int64_t d2) {
  twin t = {.role = role};
  int64_t dim[3] = {d0, d1, d2}, width = dim[rank - 1];
  OK(wn_device_tensor(b->cpu, &t.cpu, b->cpu->stash, "test", role, rank, d0, d1, d2, 0));
  dim[rank - 1] += margin;
  OK(wn_device_tensor(b->cuda, &t.cuda, b->cuda->stash, "test", role, rank, dim[0], dim[1], dim[2], 0));
  t.cuda = wn_tensor_slice(t.cuda, rank - 1, 0, width);
  return t;
}

static inline twin twin_tensor(twin_bench *b, wn_role role, int32_t rank, int64_t d0, int64_t d1, int64_t d2) {
  return twin_strided(b, role, 0, rank, d0, d1, d2);
}

/* Both get these values, [count] in row-major order, rounded to the GPU's dtype. */
static inline void twin_set(twin_bench *b, twin *t, const double *values) {
  int64_t n = wn_tensor_count(&t->cpu);
  wn_tensor host = wn_tensor_of(malloc((size_t)n * 8 + 8), t->cuda.dtype, 1, n, 0, 0, 0);
  assert_non_null(host.data);
  for (int64_t i = 0; i < n; i++) {
    wn_test_set(&host, i, values[i]);
    wn_test_set(&t->cpu, i, wn_test_get(&host, i));
  }
  OK(b->cuda->ops->upload(b->cuda, &t->cuda, host.data));
  free(host.data);
}

/* Normal values from (seed, element), rounded likewise. */
static inline void twin_fill(twin_bench *b, twin *t, uint64_t seed, double deviation, double mean) {
  int64_t n = wn_tensor_count(&t->cpu);
  wn_tensor values = wn_tensor_of(malloc((size_t)n * 8 + 8), WN_F64, 1, n, 0, 0, 0);
  assert_non_null(values.data);
  wn_test_fill(&values, seed, deviation, mean);
  twin_set(b, t, values.data);
  free(values.data);
}

static inline void twin_constant(twin_bench *b, twin *t, double value) {
  int64_t n = wn_tensor_count(&t->cpu);
  double *values = malloc((size_t)n * sizeof *values + 8);
  assert_non_null(values);
  for (int64_t i = 0; i < n; i++) values[i] = value;
  twin_set(b, t, values);
  free(values);
}

static inline twin twin_random(twin_bench *b, wn_role role, uint64_t seed, double deviation, int64_t margin,
                               int32_t rank, int64_t d0, int64_t d1, int64_t d2) {
  twin t = twin_strided(b, role, margin, rank, d0, d1, d2);
  twin_fill(b, &t, seed, deviation, 0);
  return t;
}

static inline twin twin_ints(twin_bench *b, const int32_t *values, int32_t rank, int64_t d0, int64_t d1) {
  twin t = twin_tensor(b, WN_INDEX, rank, d0, d1, 0);
  memcpy(t.cpu.data, values, (size_t)wn_tensor_bytes(&t.cpu));
  OK(b->cuda->ops->upload(b->cuda, &t.cuda, values));
  return t;
}

/* What an output holds beforehand, so that an element that is not written shows: NaN, or -7 for integers. */
static inline void twin_poison(twin_bench *b, twin *t) {
  twin_constant(b, t, t->role == WN_INDEX ? -7 : (double)NAN);
}

static inline twin twin_slice(twin t, int32_t axis, int64_t from, int64_t count) {
  return (twin){wn_tensor_slice(t.cpu, axis, from, count), wn_tensor_slice(t.cuda, axis, from, count), t.role};
}

/* Rows on both devices. */
typedef struct twin_rows {
  wn_rows cpu, cuda;
} twin_rows;

static inline twin_rows twin_rows_of(twin_bench *b, int32_t n_keys, const int32_t *first, const int32_t *last,
                                     const int32_t *position, int32_t n) {
  twin f = twin_ints(b, first, 1, n, 0), l = twin_ints(b, last, 1, n, 0), p = twin_ints(b, position, 1, n, 0);
  return (twin_rows){{n, n_keys, f.cpu.data, l.cpu.data, p.cpu.data},
                     {n, n_keys, f.cuda.data, l.cuda.data, p.cuda.data}};
}

/* Rows from .. from + n - 1 of `rows`, of one device. */
static inline wn_rows twin_run(wn_rows rows, int64_t from, int64_t n) {
  return (wn_rows){(int32_t)n, rows.n_keys, rows.first_key + from, rows.last_key + from, rows.position + from};
}

/* The last n of m causal rows over m keys, in documents of `document` rows (0: one). With `holes`, every 7th is empty.
 */
static inline twin_rows twin_causal_end(twin_bench *b, int32_t n, int32_t m, int32_t document, bool holes) {
  int32_t *x = malloc((size_t)n * 3 * sizeof *x);
  assert_non_null(x);
  for (int32_t i = 0; i < n; i++) {
    int32_t at = m - n + i;
    x[i] = document ? at / document * document : 0;
    x[n + i] = holes && i % 7 == 3 ? x[i] - 1 : at;
    x[2 * n + i] = at;
  }
  twin_rows rows = twin_rows_of(b, m, x, x + n, x + 2 * n, n);
  free(x);
  return rows;
}

/* All n of them. */
static inline twin_rows twin_causal(twin_bench *b, int32_t n, int32_t document, bool holes) {
  return twin_causal_end(b, n, n, document, holes);
}

/* A host copy of the GPU's in its own dtype, dense. The caller frees .data. */
static inline wn_tensor twin_download(twin_bench *b, const wn_tensor *t) {
  wn_tensor host = wn_tensor_of(malloc((size_t)wn_tensor_bytes(t) + 8), t->dtype, t->rank, t->dim[0], t->dim[1],
                                t->dim[2], t->dim[3]);
  assert_non_null(host.data);
  OK(b->cuda->ops->download(b->cuda, host.data, t));
  return host;
}

static inline void twin_same_ints(twin_bench *b, const char *what, const twin *t) {
  wn_tensor host = twin_download(b, &t->cuda);
  for (int64_t i = 0; i < wn_tensor_count(&host); i++)
    if (wn_test_get(&host, i) != wn_test_get(&t->cpu, i))
      fail_msg("%s: element %lld is %g, the CPU has %g", what, (long long)i, wn_test_get(&host, i),
               wn_test_get(&t->cpu, i));
  free(host.data);
}

typedef struct twin_error {
  double norm, worst; /* of the whole; of the worst row of a head */
  int64_t worst_row;  /* rows of the last dimension, in row-major order */
} twin_error;

/* ||gpu - cpu|| / ||cpu|| over all; and the largest over rows of the last dimension (a tensor of rank 1 is one row per
 * element), where a row is measured against its own norm or, if that is smaller, a tenth of the root mean square of all
 * rows' norms. Infinities and NaN must stand in the same places, with the same sign. */
static inline twin_error twin_compare(twin_bench *b, const char *what, const twin *t) {
  wn_tensor host = twin_download(b, &t->cuda);
  int64_t n = wn_tensor_count(&host), width = host.rank > 1 ? host.dim[host.rank - 1] : 1, rows = width ? n / width : 0;
  double total = 0, error = 0;
  twin_error out = {0};
  for (int64_t i = 0; i < n; i++) {
    double x = wn_test_get(&host, i), y = wn_test_get(&t->cpu, i);
    if (isfinite(x) != isfinite(y) || (!isfinite(y) && memcmp(&x, &y, sizeof x) != 0 && !(isnan(x) && isnan(y))))
      fail_msg("%s: element %lld is %g, the CPU has %g", what, (long long)i, x, y);
    if (!isfinite(y)) continue;
    total += y * y;
    error += (x - y) * (x - y);
  }
  double floor = 0.1 * sqrt(total / (double)(rows ? rows : 1));
  out.norm = total > 0 ? sqrt(error / total) : sqrt(error);
  for (int64_t r = 0; r < rows; r++) {
    double own = 0, off = 0;
    for (int64_t i = r * width; i < (r + 1) * width; i++) {
      double x = wn_test_get(&host, i), y = wn_test_get(&t->cpu, i);
      if (!isfinite(y)) continue;
      own += y * y;
      off += (x - y) * (x - y);
    }
    double measure = fmax(sqrt(own), floor), e = measure > 0 ? sqrt(off) / measure : sqrt(off);
    if (e > out.worst) {
      out.worst = e;
      out.worst_row = r;
    }
  }
  free(host.data);
  return out;
}

/* Fails unless both errors stay within `bar`; prints them. */
static inline void twin_close(twin_bench *b, const char *what, const twin *t, double bar) {
  twin_error e = twin_compare(b, what, t);
  print_message("  %-40s norm %.2e  worst row %.2e (row %lld)\n", what, e.norm, e.worst, (long long)e.worst_row);
  if (!(e.norm <= bar && e.worst <= bar))
    fail_msg("%s: off by %.3e in norm and %.3e in row %lld, bar %.1e", what, e.norm, e.worst, (long long)e.worst_row,
             bar);
}

/* Bars of the comparison: operands in BF16, or everything in FP32. */
static const double twin_bf16 = 1e-2, twin_f32 = 1e-5;

/* Plain selections are sorts: larger first, of equals the lower key; then by key. */
typedef struct twin_ranked {
  double score;
  int32_t key;
} twin_ranked;

static inline int twin_by_score(const void *a, const void *b) {
  const twin_ranked *x = a, *y = b;
  if (x->score != y->score) return x->score > y->score ? -1 : 1;
  return x->key < y->key ? -1 : x->key > y->key;
}

static inline int twin_by_number(const void *a, const void *b) {
  return *(const int32_t *)a < *(const int32_t *)b ? -1 : *(const int32_t *)a > *(const int32_t *)b;
}

/* An output of twin_repeats, and whether the operation adds into it (then it begins as zeros, else as NaN or -7). */
typedef struct twin_out {
  const twin *t;
  bool accumulated;
} twin_out;

/* Twenty runs on the GPU from equal beginnings: every bit agrees. */
static inline void twin_repeats(twin_bench *b, void (*run)(wn_device *, void *), void *context, const twin_out *outs,
                                int32_t n_outs) {
  wn_tensor first[8] = {0};
  assert_true(n_outs <= 8);
  for (int trial = 0; trial < TWIN_REPEATS; trial++) {
    for (int32_t i = 0; i < n_outs; i++) {
      wn_tensor t = outs[i].t->cuda;
      void *beginning = malloc((size_t)wn_tensor_bytes(&t) + 8);
      assert_non_null(beginning);
      memset(beginning, outs[i].accumulated ? 0 : 0xff, (size_t)wn_tensor_bytes(&t)); /* all ones: NaN, or -1 */
      OK(b->cuda->ops->upload(b->cuda, &t, beginning));
      free(beginning);
    }
    run(b->cuda, context);
    for (int32_t i = 0; i < n_outs; i++) {
      wn_tensor host = twin_download(b, &outs[i].t->cuda);
      size_t bytes = (size_t)wn_tensor_bytes(&host);
      if (trial == 0) {
        first[i] = host;
        continue;
      }
      if (memcmp(first[i].data, host.data, bytes) != 0) fail_msg("output %d of run %d differs from run 0", i, trial);
      free(host.data);
    }
  }
  for (int32_t i = 0; i < n_outs; i++) free(first[i].data);
}

#endif
