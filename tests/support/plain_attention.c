#include "support/plain_attention.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "support/test.h"

static void *take(wn_arena *arena, int64_t bytes) {
  void *memory;
  OK(wn_arena_alloc(arena, &memory, "plain", (size_t)bytes));
  memset(memory, 0, (size_t)bytes);
  return memory;
}

wn_tensor plain_zeros(wn_arena *arena, int32_t rank, int64_t d0, int64_t d1, int64_t d2) {
  wn_tensor t = wn_tensor_of(NULL, WN_F64, rank, d0, d1, d2, 0);
  t.data = take(arena, wn_tensor_bytes(&t));
  return t;
}

wn_tensor plain_copy(wn_arena *arena, const wn_tensor *t) {
  wn_tensor copy = plain_zeros(arena, t->rank, t->dim[0], t->dim[1], t->dim[2]);
  int64_t n = wn_tensor_count(t);
  for (int64_t i = 0; i < n; i++) ((double *)copy.data)[i] = wn_test_get(t, i);
  return copy;
}

uint8_t *plain_seen(wn_arena *arena, const wn_rows *rows, const wn_tensor *selection) {
  int64_t m = rows->n_keys;
  uint8_t *seen = take(arena, rows->n_rows * m);
  for (int64_t i = 0; i < rows->n_rows; i++) {
    if (!selection)
      for (int64_t s = rows->first_key[i]; s <= rows->last_key[i]; s++) seen[i * m + s] = 1;
    for (int64_t j = 0; selection && j < selection->dim[1]; j++) {
      int64_t s = (int64_t)wn_test_get(selection, i * selection->dim[1] + j);
      if (s >= 0) seen[i * m + s] = 1;
    }
  }
  return seen;
}

static double *at(const wn_tensor *t, int64_t i, int64_t h) {
  return (double *)t->data + i * t->stride[0] + (t->dim[1] == 1 ? 0 : h) * t->stride[1];
}

static double dot(const double *a, const double *b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

static void add_scaled(double *y, const double *x, double factor, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] += factor * x[i];
}

/* softmax over what is seen; p is 0 elsewhere; returns the log-sum-exp */
static double softmax(double *p, const double *s, const uint8_t *seen, int64_t m) {
  double top = -INFINITY, sum = 0;
  for (int64_t j = 0; j < m; j++)
    if (seen[j] && s[j] > top) top = s[j];
  for (int64_t j = 0; j < m; j++)
    if (seen[j]) sum += exp(s[j] - top);
  for (int64_t j = 0; j < m; j++) p[j] = seen[j] ? exp(s[j] - top) / sum : 0;
  return top + log(sum);
}

plain_attention plain_attend(wn_arena *arena, const wn_tensor *q_, const wn_tensor *k_, const wn_tensor *v_,
                             const wn_tensor *d_o_, const uint8_t *seen, double scale) {
  wn_tensor q = plain_copy(arena, q_), k = plain_copy(arena, k_), v = plain_copy(arena, v_),
            d_o = plain_copy(arena, d_o_);
  int64_t n = q.dim[0], m = k.dim[0], n_heads = q.dim[1], dq = q.dim[2], dv = v.dim[2];
  plain_attention a = {.p = plain_zeros(arena, 3, n_heads, n, m),
                       .p_mean = plain_zeros(arena, 2, n, m, 0),
                       .o = plain_zeros(arena, 3, n, n_heads, dv),
                       .lse = plain_zeros(arena, 2, n, n_heads, 0),
                       .delta = plain_zeros(arena, 2, n, n_heads, 0),
                       .dq = plain_zeros(arena, 3, n, n_heads, dq),
                       .dk = plain_zeros(arena, 3, m, k.dim[1], dq),
                       .dv = plain_zeros(arena, 3, m, v.dim[1], dv)};
  double *s = take(arena, m * (int64_t)sizeof(double));
  for (int64_t h = 0; h < n_heads; h++)
    for (int64_t i = 0; i < n; i++) {
      double *p = (double *)a.p.data + (h * n + i) * m, *o = at(&a.o, i, h), *delta = at(&a.delta, i, 0) + h;
      for (int64_t j = 0; j < m; j++) s[j] = seen[i * m + j] ? scale * dot(at(&q, i, h), at(&k, j, h), dq) : 0;
      at(&a.lse, i, 0)[h] = softmax(p, s, seen + i * m, m);
      add_scaled((double *)a.p_mean.data + i * m, p, 1.0 / (double)n_heads, m);
      for (int64_t j = 0; j < m; j++)
        if (seen[i * m + j]) add_scaled(o, at(&v, j, h), p[j], dv);
      *delta = dot(at(&d_o, i, h), o, dv);
      for (int64_t j = 0; j < m; j++) {
        if (!seen[i * m + j]) continue;
        double ds = scale * p[j] * (dot(at(&d_o, i, h), at(&v, j, h), dv) - *delta);
        add_scaled(at(&a.dv, j, h), at(&d_o, i, h), p[j], dv);
        add_scaled(at(&a.dk, j, h), at(&q, i, h), ds, dq);
        add_scaled(at(&a.dq, i, h), at(&k, j, h), ds, dq);
      }
    }
  return a;
}

wn_tensor plain_index(wn_arena *arena, const wn_tensor *q_, const wn_tensor *k_, const wn_tensor *w_,
                      const uint8_t *seen, double scale) {
  wn_tensor q = plain_copy(arena, q_), k = plain_copy(arena, k_), w = plain_copy(arena, w_);
  int64_t n = q.dim[0], m = k.dim[0], n_heads = q.dim[1], width = q.dim[2];
  wn_tensor index = plain_zeros(arena, 2, n, m, 0);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < m; j++) {
      double *out = (double *)index.data + i * m + j;
      if (!seen[i * m + j]) *out = -INFINITY;
      for (int64_t h = 0; seen[i * m + j] && h < n_heads; h++) {
        double z = scale * dot(at(&q, i, h), (double *)k.data + j * width, width);
        *out += ((double *)w.data)[i * n_heads + h] * (z <= 0 ? 0 : z);
      }
    }
  return index;
}

plain_kl plain_indexer_kl(wn_arena *arena, const wn_tensor *q_, const wn_tensor *k_, const wn_tensor *w_,
                          const wn_tensor *p_, const uint8_t *seen, double scale, double coeff) {
  wn_tensor q = plain_copy(arena, q_), k = plain_copy(arena, k_), w = plain_copy(arena, w_), p = plain_copy(arena, p_);
  int64_t n = q.dim[0], m = k.dim[0], n_heads = q.dim[1], width = q.dim[2];
  wn_tensor index = plain_index(arena, q_, k_, w_, seen, scale);
  plain_kl r = {.kl = plain_zeros(arena, 1, n, 0, 0),
                .dq = plain_zeros(arena, 3, n, n_heads, width),
                .dk = plain_zeros(arena, 2, m, width, 0),
                .dw = plain_zeros(arena, 2, n, n_heads, 0)};
  double *student = take(arena, m * (int64_t)sizeof(double));
  for (int64_t i = 0; i < n; i++) {
    const double *score = (double *)index.data + i * m, *target = (double *)p.data + i * m;
    int64_t count = 0;
    for (int64_t j = 0; j < m; j++) count += seen[i * m + j];
    if (count < 2) continue;
    double lse = softmax(student, score, seen + i * m, m);
    for (int64_t j = 0; j < m; j++) {
      if (!seen[i * m + j]) continue;
      const double *key = (double *)k.data + j * width;
      double g = coeff * (student[j] - target[j]);
      if (target[j] > 0) ((double *)r.kl.data)[i] += target[j] * (log(target[j]) - (score[j] - lse));
      for (int64_t h = 0; h < n_heads; h++) {
        double weight = ((double *)w.data)[i * n_heads + h], z = scale * dot(at(&q, i, h), key, width);
        if (z <= 0) continue;
        ((double *)r.dw.data)[i * n_heads + h] += g * z;
        add_scaled(at(&r.dq, i, h), key, g * weight * scale, width);
        add_scaled((double *)r.dk.data + j * width, at(&q, i, h), g * weight * scale, width);
      }
    }
  }
  return r;
}

void plain_top_k(int32_t *pick, int64_t k, const double *score, const uint8_t *seen, int64_t m) {
  int64_t n = 0;
  for (; n < k; n++) {
    int64_t best = -1;
    for (int64_t j = 0; j < m; j++) {
      bool taken = !seen[j];
      for (int64_t s = 0; s < n; s++) taken |= pick[s] == j;
      if (taken) continue;
      double x = isnan(score[j]) ? -INFINITY : score[j], y = best < 0 || isnan(score[best]) ? -INFINITY : score[best];
      if (best < 0 || x > y) best = j;
    }
    if (best < 0) break;
    pick[n] = (int32_t)best;
  }
  for (int64_t a = 0; a < n; a++)
    for (int64_t b = a + 1; b < n; b++)
      if (pick[b] < pick[a]) {
        int32_t swap = pick[a];
        pick[a] = pick[b];
        pick[b] = swap;
      }
  for (; n < k; n++) pick[n] = -1;
}

wn_rows plain_rows(wn_arena *arena, int32_t n, int32_t m, plain_rows_kind kind) {
  int32_t *first = take(arena, n * (int64_t)sizeof *first), *last = take(arena, n * (int64_t)sizeof *last);
  int32_t *position = take(arena, n * (int64_t)sizeof *position);
  for (int32_t i = 0; i < n; i++) {
    int32_t self = m - n + i; /* n <= m: the rows are the last n of the keys */
    position[i] = last[i] = self;
    first[i] = 0;
    if (kind == PLAIN_DOCUMENTS) first[i] = self / 37 * 37 > self - 90 ? self / 37 * 37 : 0;
    if (kind == PLAIN_DOCUMENTS && self / 37 % 3 == 2) first[i] = self / 37 * 37 - 37;
    if (kind == PLAIN_HOLES && i % 3 == 1) {
      first[i] = i % 2 ? m : 1;
      last[i] = first[i] - 1 - i % 5;
    }
    if (kind == PLAIN_ONE_KEY) first[i] = self;
  }
  return (wn_rows){.n_rows = n, .n_keys = m, .first_key = first, .last_key = last, .position = position};
}

wn_tensor plain_input(const wn_device *device, wn_role role, uint64_t seed, double deviation, int32_t rank, int64_t d0,
                      int64_t d1, int64_t d2) {
  wn_tensor wide, t;
  if (rank == 3) {
    OK(wn_device_tensor(device, &wide, device->weights, "input", role, 3, d0, d1 + 1, d2 + 3, 0));
    wn_test_fill(&wide, 77, 100, 0);
    t = wn_tensor_slice(wn_tensor_slice(wide, 1, 1, d1), 2, 2, d2);
  } else {
    OK(wn_device_tensor(device, &wide, device->weights, "input", role, 2, d0, d1 + 5, 0, 0));
    wn_test_fill(&wide, 77, 100, 0);
    t = wn_tensor_slice(wide, 1, 4, d1);
  }
  wn_test_fill(&t, seed, deviation, 0);
  return t;
}
