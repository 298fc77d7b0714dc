/* AdamW with decoupled decay (Loshchilov and Hutter, ICLR 2019; torch.optim.AdamW's order), and the sum of squares
 * that the gradient norm comes from. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/view.h"

static void expect_flat(const wn_tensor *t, int64_t n) {
  WN_EXPECT(t, WN_REAL_DTYPE, 1, n);
}

/* The update's constants, in the precision of the state. */
typedef struct adamw_constants {
  wn_real beta1, rest1, beta2, rest2, step_size, unbias, eps, keep, grad_scale;
} adamw_constants;

static void adamw_piece(wn_real *w, wn_real *m, wn_real *v, const wn_real *gradient, int64_t n,
                        const adamw_constants *c) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    wn_real g = gradient[i] * c->grad_scale;
    m[i] = c->beta1 * m[i] + c->rest1 * g;
    v[i] = c->beta2 * v[i] + c->rest2 * (g * g);
    w[i] = w[i] * c->keep - c->step_size * m[i] / (wn_real_sqrt(v[i]) * c->unbias + c->eps);
  }
}

/* Moments in BF16 go through blocks of the state's precision, so that there is one formula. */
static void adamw_narrow(wn_real *w, uint16_t *m, uint16_t *v, const wn_real *gradient, int64_t n,
                         const adamw_constants *c) {
  enum { BLOCK = 1024 };
  wn_real wide_m[BLOCK], wide_v[BLOCK];
  for (int64_t from = 0; from < n; from += BLOCK) {
    int64_t count = wn_cpu_min(BLOCK, n - from);
    for (int64_t i = 0; i < count; i++) wide_m[i] = (wn_real)wn_f32_from_bf16(m[from + i]);
    for (int64_t i = 0; i < count; i++) wide_v[i] = (wn_real)wn_f32_from_bf16(v[from + i]);
    adamw_piece(w + from, wide_m, wide_v, gradient + from, count, c);
    for (int64_t i = 0; i < count; i++) m[from + i] = wn_bf16_from_f32((float)wide_m[i]);
    for (int64_t i = 0; i < count; i++) v[from + i] = wn_bf16_from_f32((float)wide_v[i]);
  }
}

/* With g = grad * grad_scale and t = step:
 *   m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
 *   w = w - lr weight_decay w - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
 * A non-finite gradient would stay in m and v for ever: the trainer looks before it calls. */
wn_status WN_CPU(adamw)(wn_device *device, wn_tensor *master, wn_tensor *m, wn_tensor *v, wn_tensor *weight,
                        const wn_tensor *grad, const wn_adamw_params *params) {
  int64_t n = master->dim[0];
  expect_flat(master, n);
  bool narrow = m->dtype == WN_BF16;
  WN_EXPECT(m, narrow ? WN_BF16 : WN_REAL_DTYPE, 1, n);
  WN_EXPECT(v, m->dtype, 1, n);
  WN_ASSERT(!narrow || (wn_tensor_dense(m) && wn_tensor_dense(v)), "strided moments");
  expect_flat(grad, n);
  if (weight) expect_flat(weight, n);
  WN_ASSERT(params->step >= 1, "step %lld", (long long)params->step);
  const adamw_constants c = {
      .beta1 = (wn_real)params->beta1,
      .rest1 = (wn_real)(1 - params->beta1),
      .beta2 = (wn_real)params->beta2,
      .rest2 = (wn_real)(1 - params->beta2),
      .step_size = (wn_real)(params->lr / (1 - pow(params->beta1, (double)params->step))),
      .unbias = (wn_real)(1 / sqrt(1 - pow(params->beta2, (double)params->step))),
      .eps = (wn_real)params->eps,
      .keep = (wn_real)(1 - params->lr * params->weight_decay),
      .grad_scale = (wn_real)params->grad_scale,
  };
  if (device->dry) return NULL;
  wn_cpu_pieces pieces = wn_cpu_pieces_of(master);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < pieces.count; i++) {
    wn_cpu_piece p = wn_cpu_piece_at(&pieces, i);
    wn_real *w = wn_cpu_at(master, p.from);
    const wn_real *g = wn_cpu_at(grad, p.from);
    if (narrow)
      adamw_narrow(w, (uint16_t *)m->data + p.from, (uint16_t *)v->data + p.from, g, p.count, &c);
    else
      adamw_piece(w, wn_cpu_at(m, p.from), wn_cpu_at(v, p.from), g, p.count, &c);
    if (weight) memmove(wn_cpu_at(weight, p.from), w, (size_t)p.count * sizeof *w);
  }
  return NULL;
}

/* Non-finite elements are counted and left out of the sum. */
static double piece_squares(const wn_real *x, int64_t n, int64_t *non_finite) {
  double sum = 0;
  int64_t bad = 0;
#pragma omp simd reduction(+ : sum, bad)
  for (int64_t i = 0; i < n; i++) {
    bool finite = x[i] - x[i] == 0;
    double value = finite ? (double)x[i] : 0;
    sum += value * value;
    bad += !finite;
  }
  *non_finite = bad;
  return sum;
}

static wn_status tensor_squares(wn_device *device, double *sum, int64_t *non_finite, const wn_tensor *x) {
  WN_EXPECT(x, WN_REAL_DTYPE, x->rank, x->dim[0], x->dim[1], x->dim[2], x->dim[3]);
  wn_cpu_pieces pieces = wn_cpu_pieces_of(x);
  size_t mark = wn_arena_mark(device->scratch);
  void *memory;
  WN_TRY(wn_arena_alloc(device->scratch, &memory, "sums of squares",
                        (size_t)pieces.count * (sizeof(double) + sizeof(int64_t))));
  *sum = 0;
  *non_finite = 0;
  if (device->dry) return wn_cpu_release(device, mark);
  double *part = memory;
  int64_t *bad = (int64_t *)(part + pieces.count);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < pieces.count; i++) {
    wn_cpu_piece p = wn_cpu_piece_at(&pieces, i);
    part[i] = piece_squares(wn_cpu_row(x, p.row) + p.from, p.count, &bad[i]);
  }
  for (int64_t i = 0; i < pieces.count; i++) {
    *sum += part[i];
    *non_finite += bad[i];
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}

wn_status WN_CPU(sum_squares)(wn_device *device, double *sum, int64_t *non_finite, const wn_tensor *x, int32_t n) {
  for (int32_t i = 0; i < n; i++) WN_TRY(tensor_squares(device, &sum[i], &non_finite[i], &x[i]));
  return NULL;
}
