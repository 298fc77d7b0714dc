/* The sigmoid router with grouped choice, and its sequence-wise balance loss. Source: DeepSeek-V3 report
 * (arXiv 2412.19437), eqs. 12 to 20. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/view.h"

enum { ROW_BLOCK = 64 };

/* Keeps the weights finite where every chosen score underflowed; also HF's. */
static const double tiny_sum = 1e-20;

static int32_t *count_at(const wn_tensor *load, int64_t e) {
  return (int32_t *)load->data + e * load->stride[0];
}

/* The first untaken entry with the largest value (NaN counts as -inf), and marks it taken. */
static int32_t take_best(const wn_real *value, bool *taken, int64_t n) {
  int32_t best = -1;
  for (int32_t i = 0; i < n; i++)
    if (!taken[i] && (best < 0 || value[i] > value[best])) best = i;
  taken[best] = true;
  return best;
}

/* Sum of the two largest of n values, or the one. */
static wn_real group_score(const wn_real *value, int64_t n) {
  wn_real first = value[0], second = -(wn_real)INFINITY;
  for (int64_t i = 1; i < n; i++) {
    if (value[i] > first) {
      second = first;
      first = value[i];
    } else if (value[i] > second) {
      second = value[i];
    }
  }
  return n > 1 ? first + second : first;
}

/* Temporaries of one row's choice. */
typedef struct choice {
  wn_real *biased, *group;
  bool *taken, *group_taken;
} choice;

static void choose(int32_t *index, int64_t n_choices, const wn_real *scores, const wn_tensor *bias, int64_t n_experts,
                   const wn_router_params *params, choice *c) {
  int64_t per_group = n_experts / params->n_group;
  for (int64_t e = 0; e < n_experts; e++) {
    wn_real b = scores[e] + *wn_cpu_at(bias, e);
    c->biased[e] = isnan(b) ? -(wn_real)INFINITY : b;
    c->taken[e] = true;
  }
  for (int64_t g = 0; g < params->n_group; g++) {
    c->group[g] = group_score(c->biased + g * per_group, per_group);
    c->group_taken[g] = false;
  }
  for (int64_t i = 0; i < params->topk_group; i++) {
    int64_t g = take_best(c->group, c->group_taken, params->n_group);
    for (int64_t e = g * per_group; e < (g + 1) * per_group; e++) c->taken[e] = false;
  }
  for (int64_t k = 0; k < n_choices; k++) index[k] = take_best(c->biased, c->taken, n_experts);
}

static double chosen_sum(const wn_real *scores, const int32_t *index, int64_t n_choices) {
  double sum = tiny_sum;
  for (int64_t k = 0; k < n_choices; k++) sum += (double)scores[index[k]];
  return sum;
}

static double row_sum(const wn_real *scores, int64_t n) {
  double sum = tiny_sum;
  for (int64_t e = 0; e < n; e++) sum += (double)scores[e];
  return sum;
}

/* Rows from .. to - 1: scores from logits, choices, weights. */
static void route_rows(wn_tensor *scores, wn_tensor *index, wn_tensor *weight, const wn_tensor *bias, int64_t from,
                       int64_t to, const wn_router_params *params, choice *c) {
  int64_t n_experts = scores->dim[1], n_choices = index->dim[1];
  for (int64_t i = from; i < to; i++) {
    wn_real *s = wn_cpu_row(scores, i), *w = wn_cpu_row(weight, i);
    int32_t *chosen = wn_cpu_index_row(index, i);
#pragma omp simd
    for (int64_t e = 0; e < n_experts; e++) s[e] = 1 / (1 + wn_real_exp(-s[e]));
    if (!params->forced) choose(chosen, n_choices, s, bias, n_experts, params, c);
    for (int64_t k = 0; k < n_choices; k++)
      WN_ASSERT(chosen[k] >= 0 && chosen[k] < n_experts, "expert %d of %lld", chosen[k], (long long)n_experts);
    double factor = params->norm_topk ? params->scale / chosen_sum(s, chosen, n_choices) : params->scale;
    for (int64_t k = 0; k < n_choices; k++) w[k] = (wn_real)((double)s[chosen[k]] * factor);
  }
}

/* f[e] = E / (K T) times how often the sequence's rows chose e. */
static void sequence_frequency(double *f, const wn_tensor *index, int64_t n_experts, int64_t from, int64_t rows) {
  int64_t n_choices = index->dim[1];
  for (int64_t e = 0; e < n_experts; e++) f[e] = 0;
  for (int64_t i = from; i < from + rows; i++)
    for (int64_t k = 0; k < n_choices; k++) f[wn_cpu_index_row(index, i)[k]] += 1;
  double unit = (double)n_experts / ((double)n_choices * (double)rows);
  for (int64_t e = 0; e < n_experts; e++) f[e] *= unit;
}

static void expect_whole_sequences(int64_t n, int64_t rows) {
  WN_ASSERT(rows > 0 && n % rows == 0, "%lld rows in sequences of %lld", (long long)n, (long long)rows);
}

/* sum over sequences of sum_e f_e P_e. With u[t,e] = s[t,e] / sum_j s[t,j] a row adds sum_e f_e u[t,e] / T. */
static wn_status balance_value(wn_device *device, double *value, const wn_tensor *scores, const wn_tensor *index,
                               int64_t rows) {
  int64_t n = scores->dim[0], n_experts = scores->dim[1];
  expect_whole_sequences(n, rows);
  void *memory;
  WN_TRY(wn_arena_alloc(device->scratch, &memory, "balance loss", (size_t)(n + n_experts) * sizeof(double)));
  *value = 0;
  if (device->dry) return NULL;
  double *part = memory, *f = part + n;
  for (int64_t from = 0; from < n; from += rows) {
    sequence_frequency(f, index, n_experts, from, rows);
#pragma omp parallel for schedule(static)
    for (int64_t i = from; i < from + rows; i++) {
      const wn_real *s = wn_cpu_row(scores, i);
      double sum = 0;
      for (int64_t e = 0; e < n_experts; e++) sum += f[e] * (double)s[e];
      part[i] = sum / row_sum(s, n_experts) / (double)rows;
    }
  }
  for (int64_t i = 0; i < n; i++) *value += part[i];
  return NULL;
}

static wn_status route(wn_device *device, wn_tensor *scores, wn_tensor *index, wn_tensor *weight, const wn_tensor *bias,
                       const wn_router_params *params) {
  int64_t n = scores->dim[0], n_experts = scores->dim[1], n_group = params->n_group;
  int64_t blocks = wn_cpu_blocks(n, ROW_BLOCK);
  size_t reals = (size_t)(n_experts + n_group) * sizeof(wn_real), flags = (size_t)(n_experts + n_group) * sizeof(bool);
  size_t stride = (reals + flags + sizeof(wn_real) - 1) / sizeof(wn_real) * sizeof(wn_real);
  void *memory;
  WN_TRY(wn_arena_alloc(device->scratch, &memory, "router choices", (size_t)blocks * stride));
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    char *own = (char *)memory + (size_t)b * stride;
    choice c = {.biased = (wn_real *)own,
                .group = (wn_real *)own + n_experts,
                .taken = (bool *)(own + reals),
                .group_taken = (bool *)(own + reals) + n_experts};
    route_rows(scores, index, weight, bias, b * ROW_BLOCK, wn_cpu_min(n, (b + 1) * ROW_BLOCK), params, &c);
  }
  return NULL;
}

wn_status WN_CPU(router)(wn_device *device, wn_tensor *scores, wn_tensor *index, wn_tensor *weight, wn_tensor *load,
                         wn_tensor *balance, const wn_tensor *x, const wn_tensor *w, const wn_tensor *bias,
                         const wn_router_params *params) {
  int64_t n = x->dim[0], n_experts = w->dim[0], n_choices = index->dim[1], width = x->dim[1];
  WN_EXPECT(scores, WN_REAL_DTYPE, 2, n, n_experts);
  WN_EXPECT(index, WN_I32, 2, n, n_choices);
  WN_EXPECT(weight, WN_REAL_DTYPE, 2, n, n_choices);
  WN_EXPECT(load, WN_I32, 1, n_experts);
  WN_EXPECT(x, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(w, WN_REAL_DTYPE, 2, n_experts, width);
  WN_EXPECT(bias, WN_REAL_DTYPE, 1, n_experts);
  WN_ASSERT(params->n_group > 0 && n_experts % params->n_group == 0 && params->topk_group > 0 &&
                params->topk_group <= params->n_group && n_choices <= n_experts / params->n_group * params->topk_group,
            "%lld of %lld experts from %d of %d groups", (long long)n_choices, (long long)n_experts, params->topk_group,
            params->n_group);
  wn_cpu_gemm logits = {.c = scores->data,
                        .a = x->data,
                        .b = w->data,
                        .m = n,
                        .n = n_experts,
                        .k = width,
                        .c_stride = scores->stride[0],
                        .a_stride = x->stride[0],
                        .b_stride = w->stride[0],
                        .transpose_b = true};
  if (!device->dry) WN_CPU(gemm)(&logits);
  wn_status status = NULL;
  size_t mark = wn_arena_mark(device->scratch);
  WN_TRY_GOTO(status, done, route(device, scores, index, weight, bias, params));
  for (int64_t i = 0; i < n && !device->dry; i++)
    for (int64_t k = 0; k < n_choices; k++) ++*count_at(load, wn_cpu_index_row(index, i)[k]);
  if (balance) {
    WN_EXPECT(balance, WN_REAL_DTYPE, 1, 1);
    double value = 0;
    WN_TRY_GOTO(status, done, balance_value(device, &value, scores, index, params->rows_per_sequence));
    if (!device->dry) *wn_cpu_at(balance, 0) += (wn_real)value;
  }
done:
  wn_arena_release(device->scratch, mark);
  return status;
}

/* dz of one row: the gradient of the logits, through the weights and, with f, through the balance loss. */
static void logits_gradient(wn_real *dz, const wn_real *dweight, const wn_real *s, const int32_t *index,
                            int64_t n_choices, int64_t n_experts, const double *f, const wn_router_params *params) {
  double sum = 0, mean = 0;
  if (f) {
    sum = row_sum(s, n_experts);
    for (int64_t e = 0; e < n_experts; e++) mean += f[e] * (double)s[e];
    mean /= sum;
  }
  double share = f ? params->balance_coeff / ((double)params->rows_per_sequence * sum) : 0;
  for (int64_t e = 0; e < n_experts; e++) dz[e] = f ? (wn_real)(share * (f[e] - mean)) : 0;
  double factor = params->scale, pull = 0;
  if (params->norm_topk) {
    double chosen = chosen_sum(s, index, n_choices);
    factor /= chosen;
    for (int64_t k = 0; k < n_choices; k++) pull += (double)dweight[k] * (double)s[index[k]] / chosen;
  }
  for (int64_t k = 0; k < n_choices; k++) dz[index[k]] += (wn_real)(factor * ((double)dweight[k] - pull));
  for (int64_t e = 0; e < n_experts; e++) dz[e] *= s[e] * (1 - s[e]);
}

wn_status WN_CPU(router_backward)(wn_device *device, wn_tensor *dx, wn_tensor *dw, const wn_tensor *dweight,
                                  const wn_tensor *scores, const wn_tensor *index, const wn_tensor *x,
                                  const wn_tensor *w, const wn_router_params *params) {
  int64_t n = x->dim[0], n_experts = w->dim[0], n_choices = index->dim[1], width = x->dim[1];
  WN_EXPECT(dx, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(dw, WN_REAL_DTYPE, 2, n_experts, width);
  WN_EXPECT(dweight, WN_REAL_DTYPE, 2, n, n_choices);
  WN_EXPECT(scores, WN_REAL_DTYPE, 2, n, n_experts);
  WN_EXPECT(index, WN_I32, 2, n, n_choices);
  WN_EXPECT(x, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(w, WN_REAL_DTYPE, 2, n_experts, width);
  bool balanced = params->balance_coeff != 0;
  int64_t rows = balanced ? params->rows_per_sequence : n;
  if (balanced) expect_whole_sequences(n, rows);
  size_t mark = wn_arena_mark(device->scratch);
  void *memory;
  WN_TRY(wn_arena_alloc(device->scratch, &memory, "router gradient",
                        (size_t)n_experts * sizeof(double) + (size_t)(n * n_experts) * sizeof(wn_real)));
  if (device->dry) return wn_cpu_release(device, mark);
  double *f = memory;
  wn_real *dz = (wn_real *)(f + n_experts);
  for (int64_t from = 0; from < n; from += rows) {
    if (balanced) sequence_frequency(f, index, n_experts, from, rows);
#pragma omp parallel for schedule(static)
    for (int64_t i = from; i < from + rows; i++)
      logits_gradient(dz + i * n_experts, wn_cpu_row(dweight, i), wn_cpu_row(scores, i), wn_cpu_index_row(index, i),
                      n_choices, n_experts, balanced ? f : NULL, params);
  }
  wn_cpu_gemm input = {.c = dx->data,
                       .a = dz,
                       .b = w->data,
                       .m = n,
                       .n = width,
                       .k = n_experts,
                       .c_stride = dx->stride[0],
                       .a_stride = n_experts,
                       .b_stride = w->stride[0],
                       .accumulate = true};
  wn_cpu_gemm matrix = {.c = dw->data,
                        .a = dz,
                        .b = x->data,
                        .m = n_experts,
                        .n = width,
                        .k = n,
                        .c_stride = dw->stride[0],
                        .a_stride = n_experts,
                        .b_stride = x->stride[0],
                        .transpose_a = true,
                        .accumulate = true};
#pragma omp parallel
  {
    WN_CPU(gemm_tiles)(&input);
    WN_CPU(gemm_tiles)(&matrix);
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}
