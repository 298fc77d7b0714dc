/* Operands, looks at outputs, and times, for cmd_bench.c. */
#include "cli/bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/rng.h"
#include "base/time.h"
#include "io/csv.h"
#include "kernels/cuda/cuda.h"

/* A prime: tensors repeat it, and rows of no width line up with it. */
enum { NOISE = 1048573, CHUNK = 1 << 26 };

wn_status wn_bench_host(wn_bench *b, void **out, int64_t bytes) {
  return wn_arena_alloc(b->device->host, out, "bench", (size_t)bytes);
}

wn_status wn_bench_noise(wn_bench *b) {
  void *memory;
  WN_TRY(wn_bench_host(b, &memory, NOISE * (int64_t)sizeof *b->noise));
  float *noise = b->noise = memory;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < NOISE; i++) noise[i] = (float)wn_rng_normal(1, WN_RNG_TEST, (uint64_t)i);
  return NULL;
}

/* ---- filling ---- */

static wn_tensor flat(wn_tensor t) {
  return wn_tensor_view(t, 1, wn_tensor_count(&t), 0, 0, 0);
}

/* The first `count` values of a dense tensor come from the host, in its dtype; then what is there is doubled. */
static wn_status spread(wn_bench *b, wn_tensor *t, const void *host, int64_t count) {
  wn_tensor whole = flat(*t);
  int64_t n = whole.dim[0];
  wn_tensor head = wn_tensor_slice(whole, 0, 0, count < n ? count : n);
  WN_TRY(b->ops->upload(b->device, &head, host));
  for (int64_t done = count; done < n;) {
    int64_t more = done < n - done ? done : n - done;
    wn_tensor from = wn_tensor_slice(whole, 0, 0, more), to = wn_tensor_slice(whole, 0, done, more);
    WN_TRY(b->ops->cast(b->device, &to, &from));
    done += more;
  }
  return NULL;
}

/* Element i of host memory of a dtype. */
static void put(void *host, wn_dtype dtype, int64_t i, float value) {
  if (dtype == WN_F32)
    ((float *)host)[i] = value;
  else if (dtype == WN_BF16)
    ((uint16_t *)host)[i] = wn_bf16_from_f32(value);
  else
    WN_ASSERT(false, "operands of dtype %s", wn_dtype_name(dtype));
}

static double get(const void *host, wn_dtype dtype, int64_t i) {
  switch (dtype) {
  case WN_F32: return (double)((const float *)host)[i];
  case WN_BF16: return (double)wn_f32_from_bf16(((const uint16_t *)host)[i]);
  case WN_I32: return (double)((const int32_t *)host)[i];
  default: WN_ASSERT(false, "operands of dtype %s", wn_dtype_name(dtype));
  }
}

wn_status wn_bench_fill(wn_bench *b, wn_tensor *t, double deviation) {
  if (deviation == 0) return b->ops->zero(b->device, t);
  size_t mark = wn_arena_mark(b->device->host);
  void *host;
  WN_TRY(wn_bench_host(b, &host, NOISE * 4));
  /* tensors of equal shape differ: each begins elsewhere */
  int64_t from = (int64_t)(((uintptr_t)t->data / WN_ARENA_ALIGN * 7919) % NOISE);
  for (int64_t i = 0; i < NOISE; i++)
    put(host, t->dtype, i, (float)deviation * b->noise[i + from < NOISE ? i + from : i + from - NOISE]);
  WN_TRY(spread(b, t, host, NOISE));
  wn_arena_release(b->device->host, mark);
  return NULL;
}

wn_status wn_bench_poison(wn_bench *b, wn_tensor *t) {
  /* NaN in BF16 and F32 alike; no key's number, and not -1 */
  uint32_t nan = t->dtype == WN_I32 ? 0xfefefefeu : 0xffffffffu;
  wn_tensor whole = flat(*t);
  int64_t first = 4 / wn_dtype_bytes(t->dtype);
  if (whole.dim[0] == 0) return NULL;
  return spread(b, &whole, &nan, first < whole.dim[0] ? first : whole.dim[0]);
}

static wn_status allocate(wn_bench *b, wn_tensor *t, wn_role role, int32_t rank, int64_t d0, int64_t d1, int64_t d2) {
  WN_TRY(wn_device_tensor(b->device, t, b->device->stash, "bench operand", role, rank, d0, d1, d2, 0));
  b->work += (double)wn_tensor_bytes(t);
  return NULL;
}

wn_status wn_bench_in(wn_bench *b, wn_role role, double deviation, int32_t rank, int64_t d0, int64_t d1, int64_t d2) {
  WN_ASSERT(b->n_in < WN_BENCH_TENSORS, "more than %d inputs", WN_BENCH_TENSORS);
  wn_tensor *t = &b->in[b->n_in++];
  WN_TRY(allocate(b, t, role, rank, d0, d1, d2));
  return wn_bench_fill(b, t, deviation);
}

wn_status wn_bench_ints(wn_bench *b, const int32_t *host, int32_t rank, int64_t d0, int64_t d1) {
  WN_ASSERT(b->n_in < WN_BENCH_TENSORS, "more than %d inputs", WN_BENCH_TENSORS);
  wn_tensor *t = &b->in[b->n_in++];
  WN_TRY(allocate(b, t, WN_INDEX, rank, d0, d1, 0));
  return b->ops->upload(b->device, t, host);
}

wn_status wn_bench_out_of(wn_bench *b, wn_role role, wn_bench_out kind, int32_t rank, int64_t d0, int64_t d1,
                          int64_t d2) {
  WN_ASSERT(b->n_out < WN_BENCH_TENSORS, "more than %d outputs", WN_BENCH_TENSORS);
  wn_tensor *t = &b->out[b->n_out];
  b->kind[b->n_out++] = kind;
  WN_TRY(allocate(b, t, role, rank, d0, d1, d2));
  if (kind == WN_BENCH_ADD || kind == WN_BENCH_KEEP) b->work += (double)wn_tensor_bytes(t);
  if (kind == WN_BENCH_ADD || kind == WN_BENCH_COUNT) return b->ops->zero(b->device, t);
  return kind == WN_BENCH_KEEP ? wn_bench_fill(b, t, 1) : wn_bench_poison(b, t);
}

int64_t wn_bench_first(const wn_bench *b, int64_t row) {
  return (b->s.seq - b->s.rows + row) / b->s.document * b->s.document;
}
int64_t wn_bench_visible(const wn_bench *b, int64_t row) {
  return b->s.seq - b->s.rows + row + 1 - wn_bench_first(b, row);
}

wn_status wn_bench_causal(wn_bench *b) {
  int64_t n = b->s.rows, m = b->s.seq;
  int32_t *host;
  wn_tensor t;
  WN_TRY(wn_bench_host(b, (void **)&host, 3 * n * 4));
  b->pairs = b->picked = 0;
  for (int64_t i = 0; i < n; i++) {
    int64_t visible = wn_bench_visible(b, i);
    host[i] = (int32_t)wn_bench_first(b, i);
    host[n + i] = host[2 * n + i] = (int32_t)(m - n + i);
    b->pairs += (double)visible;
    b->picked += (double)(visible < b->s.topk ? visible : b->s.topk);
  }
  WN_TRY(wn_device_tensor(b->device, &t, b->device->stash, "bench rows", WN_INDEX, 2, 3, n, 0, 0));
  WN_TRY(b->ops->upload(b->device, &t, host));
  const int32_t *rows = t.data;
  b->rows = (wn_rows){(int32_t)n, (int32_t)m, rows, rows + n, rows + 2 * n};
  return NULL;
}

/* ---- looking ---- */

wn_status wn_bench_values(wn_bench *b, double **out, wn_tensor t) {
  int64_t n = wn_tensor_count(&t);
  void *host;
  WN_TRY(wn_bench_host(b, &host, wn_tensor_bytes(&t)));
  WN_TRY(wn_bench_host(b, (void **)out, n * 8));
  WN_TRY(b->ops->download(b->device, host, &t));
  for (int64_t i = 0; i < n; i++) (*out)[i] = get(host, t.dtype, i);
  return NULL;
}

wn_status wn_bench_close(const wn_bench *b, const char *what, const double *got, const double *expected, int64_t n) {
  double bar = b->device->dtype_of[WN_ACT] == WN_BF16 ? 2e-2 : 1e-4, off = 0, all = 0;
  for (int64_t i = 0; i < n; i++) {
    off += (got[i] - expected[i]) * (got[i] - expected[i]);
    all += expected[i] * expected[i];
  }
  if (sqrt(off) <= bar * sqrt(all)) return NULL;
  return WN_FAIL(WN_E_CHECK, "%s is off by %.3g of its norm, at most %g is rounding", what, sqrt(off / all), bar);
}

wn_status wn_bench_not_finite(wn_bench *b, int64_t *count, const wn_tensor *t) {
  size_t mark = wn_arena_mark(b->device->scratch);
  wn_tensor whole = flat(*t), wide;
  *count = 0;
  WN_TRY(wn_device_tensor(b->device, &wide, b->device->scratch, "bench look", WN_STAT, 1,
                          whole.dim[0] < CHUNK ? whole.dim[0] : CHUNK, 0, 0, 0));
  for (int64_t from = 0; from < whole.dim[0]; from += CHUNK) {
    int64_t n = whole.dim[0] - from < CHUNK ? whole.dim[0] - from : CHUNK, bad;
    double sum;
    wn_tensor part = wn_tensor_slice(whole, 0, from, n), to = wn_tensor_slice(wide, 0, 0, n);
    WN_TRY(b->ops->cast(b->device, &to, &part));
    WN_TRY(b->ops->sum_squares(b->device, &sum, &bad, &to, 1));
    *count += bad;
  }
  wn_arena_release(b->device->scratch, mark);
  return NULL;
}

/* ---- times ---- */

wn_status wn_bench_start(wn_bench *b, double *mark) {
  if (b->device->kind == WN_CUDA) return wn_cuda_timer_start(b->device);
  *mark = wn_time_s();
  return NULL;
}

wn_status wn_bench_stop(wn_bench *b, double mark, double *seconds) {
  if (b->device->kind == WN_CUDA) return wn_cuda_timer_stop(b->device, seconds);
  *seconds = wn_time_s() - mark;
  return NULL;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

wn_status wn_bench_time(wn_bench *b, wn_status (*run)(wn_bench *, void *), void *context, double **times, int32_t *n) {
  enum { LEAST = 3, WARM_UPS = 3 };
  double mark = 0, total = 0, one = 0;
  WN_TRY(wn_bench_host(b, (void **)times, (int64_t)b->repeats * 8));
  for (int32_t i = 0; i < WARM_UPS && total <= b->seconds / 4; i++, total += one) {
    WN_TRY(wn_bench_start(b, &mark));
    WN_TRY(run(b, context));
    WN_TRY(wn_bench_stop(b, mark, &one));
  }
  total = 0;
  for (*n = 0; *n < b->repeats && (*n < LEAST || total < b->seconds); (*n)++) {
    WN_TRY(wn_bench_start(b, &mark));
    WN_TRY(run(b, context));
    WN_TRY(wn_bench_stop(b, mark, &(*times)[*n]));
    total += (*times)[*n];
  }
  qsort(*times, (size_t)*n, sizeof **times, ascending);
  return NULL;
}

static wn_status run_copy(wn_bench *b, void *context) {
  (void)context;
  return b->ops->cast(b->device, &b->out[0], &b->in[0]);
}

static wn_status run_product(wn_bench *b, void *context) {
  (void)context;
  return b->ops->linear(b->device, &b->out[0], &b->in[0], &b->in[1], &(wn_accumulate){0});
}

wn_status wn_bench_limits(wn_bench *b) {
  bool gpu = b->device->kind == WN_CUDA;
  int64_t n = gpu ? (int64_t)1 << 29 : (int64_t)1 << 24, side = gpu ? 8192 : 512;
  size_t mark = wn_arena_mark(b->device->stash), host = wn_arena_mark(b->device->host);
  double *times;
  int32_t k = 0;
  b->copy_rate = b->product_rate = (double)NAN;
  WN_TRY(wn_bench_in(b, WN_ACT, 1, 1, n, 0, 0));
  WN_TRY(wn_bench_out_of(b, WN_ACT, WN_BENCH_SET, 1, n, 0, 0));
  WN_TRY(wn_bench_time(b, run_copy, NULL, &times, &k));
  b->copy_rate = b->work / times[k / 2];
  wn_arena_release(b->device->stash, mark);
  b->n_in = b->n_out = 0;
  b->work = 0;
  if (b->ops->linear) {
    for (int i = 0; i < 2; i++) WN_TRY(wn_bench_in(b, WN_ACT, 1, 2, side, side, 0));
    WN_TRY(wn_bench_out_of(b, WN_ACT, WN_BENCH_SET, 2, side, side, 0));
    WN_TRY(wn_bench_time(b, run_product, NULL, &times, &k));
    b->product_rate = 2.0 * (double)side * (double)side * (double)side / times[k / 2];
  }
  wn_arena_release(b->device->stash, mark);
  wn_arena_release(b->device->host, host);
  b->n_in = b->n_out = 0;
  b->work = 0;
  return NULL;
}

/* ---- rows of the table ---- */

static wn_status append(const wn_bench_cell *cells, int32_t n, const char *path) {
  const char *columns[32] = {0};
  wn_csv *csv;
  WN_ASSERT(n <= 32, "%d columns", n);
  for (int32_t i = 0; i < n; i++) columns[i] = cells[i].name;
  WN_TRY(wn_csv_open(&csv, path, columns, n));
  for (int32_t i = 0; i < n; i++)
    if (cells[i].text)
      wn_csv_text(csv, cells[i].text);
    else
      wn_csv_real(csv, cells[i].real);
  wn_status status = wn_csv_end_row(csv);
  WN_KEEP_FIRST(status, wn_csv_close(csv));
  return status;
}

wn_status wn_bench_row(const wn_bench_cell *cells, int32_t n, bool first, const char *csv) {
  for (int32_t i = 0; first && i < n; i++) printf("%s%s", i ? "," : "", cells[i].name);
  if (first) putchar('\n');
  for (int32_t i = 0; i < n; i++) {
    if (i) putchar(',');
    if (cells[i].text)
      fputs(cells[i].text, stdout);
    else if (!isnan(cells[i].real))
      printf("%.9g", cells[i].real);
  }
  putchar('\n');
  fflush(stdout);
  return csv ? append(cells, n, csv) : NULL;
}
