/* Dense attention on the GPU against the FP64 CPU: shapes off every tile, documents, empty rows, views with free
 * strides, large logits, accumulation, repeats. Everything runs forward and backward, each device on its own lse and
 * delta. */
#include "support/twin_attention.h"

typedef struct shape {
  int32_t n, heads, dq, dv;
} shape;

enum { SEED_Q = 11, SEED_K, SEED_V, SEED_DO, SEED_DK, SEED_DV };

static attention attention_of(twin_bench *b, shape s, twin_rows rows, double q_deviation, int64_t margin) {
  return twin_attention(b, rows, s.heads, s.dq, s.dv, SEED_Q, q_deviation, margin);
}

static void forward(twin_bench *b, attention *a) {
  OK(b->cuda->ops->attention_dense(b->cuda, &a->o.cuda, &a->lse.cuda, &a->delta.cuda, &a->d_o.cuda, &a->q.cuda,
                                   &a->k.cuda, &a->v.cuda, &a->rows.cuda, &a->params));
  OK(b->cpu->ops->attention_dense(b->cpu, &a->o.cpu, &a->lse.cpu, &a->delta.cpu, &a->d_o.cpu, &a->q.cpu, &a->k.cpu,
                                  &a->v.cpu, &a->rows.cpu, &a->params));
}

static void backward(twin_bench *b, attention *a) {
  OK(b->cuda->ops->attention_dense_backward(b->cuda, &a->dq.cuda, &a->dk.cuda, &a->dv.cuda, &a->d_o.cuda, &a->q.cuda,
                                            &a->k.cuda, &a->v.cuda, &a->lse.cuda, &a->delta.cuda, &a->rows.cuda,
                                            &a->params));
  OK(b->cpu->ops->attention_dense_backward(b->cpu, &a->dq.cpu, &a->dk.cpu, &a->dv.cpu, &a->d_o.cpu, &a->q.cpu,
                                           &a->k.cpu, &a->v.cpu, &a->lse.cpu, &a->delta.cpu, &a->rows.cpu, &a->params));
}

/* A row of width 1 is one number, which may cancel. */
static void close_rows(twin_bench *b, const char *what, const twin *t) {
  if (t->cpu.dim[2] > 1)
    twin_close(b, what, t, twin_bf16);
  else
    twin_close_sum(b, what, t);
}

static void both_ways(twin_bench *b, attention *a) {
  forward(b, a);
  close_rows(b, "o", &a->o);
  twin_close(b, "lse", &a->lse, twin_f32);
  twin_close_sum(b, "delta", &a->delta);
  backward(b, a);
  twin_close_sum(b, "dq", &a->dq);
  close_rows(b, "dk", &a->dk);
  close_rows(b, "dv", &a->dv);
}

static void check(twin_bench *b, shape s, twin_rows rows, int64_t margin) {
  attention a = attention_of(b, s, rows, 1, margin);
  both_ways(b, &a);
  twin_end(b);
}

static const shape widths[] = {{0, 3, 192, 128}, {0, 1, 18, 12},   {0, 3, 64, 64}, {0, 2, 96, 32}, {0, 3, 40, 24},
                               {0, 2, 128, 128}, {0, 2, 256, 256}, {0, 1, 1, 1},   {0, 2, 64, 200}};
enum { N_WIDTHS = sizeof widths / sizeof *widths };

static void every_width_and_length(void **state) {
  twin_bench *b = twin_begin(state);
  static const int32_t lengths[] = {1, 2, 63, 64, 65, 129, 257};
  for (int w = 0; w < N_WIDTHS; w++)
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
      shape s = widths[w];
      print_message("n %d, heads %d, widths %d/%d\n", lengths[i], s.heads, s.dq, s.dv);
      check(b, s, twin_causal(b, lengths[i], 0, false), 0);
    }
}

static void documents_and_empty_rows(void **state) {
  twin_bench *b = twin_begin(state);
  static const int32_t documents[] = {0, 1, 50, 64, 100};
  for (size_t i = 0; i < sizeof documents / sizeof *documents; i++)
    check(b, (shape){0, 3, 192, 128}, twin_causal(b, 331, documents[i], true), 0);
}

/* Rows of which none sees anything, over whole tiles. */
static void nothing_visible(void **state) {
  twin_bench *b = twin_begin(state);
  int32_t first[200], last[200];
  for (int i = 0; i < 200; i++) {
    first[i] = 5;
    last[i] = i < 140 ? 4 : i;
  }
  check(b, (shape){0, 2, 64, 64}, twin_rows_of(b, 200, first, last, first, 200), 0);
}

/* Rows 192 .. 256 of a longer sequence; then rows that see windows, with keys that nobody sees at both ends. */
static void a_chunk_of_rows(void **state) {
  twin_bench *b = twin_begin(state);
  enum { N = 65, M = 257 };
  int32_t first[N] = {0}, last[N];
  for (int i = 0; i < N; i++) last[i] = M - N + i;
  check(b, (shape){0, 3, 192, 128}, twin_rows_of(b, M, first, last, last, N), 0);
  for (int i = 0; i < N; i++) {
    first[i] = 70 + 2 * (i % 16);
    last[i] = first[i] + 90 - i;
  }
  check(b, (shape){0, 3, 128, 128}, twin_rows_of(b, M, first, last, last, N), 0);
}

/* These rows, but from .. to - 1 see nothing. */
static twin_rows blinded(twin_bench *b, const twin_rows *rows, int32_t from, int32_t to) {
  const wn_rows *x = &rows->cpu;
  int32_t *last = malloc((size_t)x->n_rows * sizeof *last);
  assert_non_null(last);
  for (int32_t i = 0; i < x->n_rows; i++) last[i] = i >= from && i < to ? x->first_key[i] - 1 : x->last_key[i];
  twin_rows result = twin_rows_of(b, x->n_keys, x->first_key, last, x->position, x->n_rows);
  free(last);
  return result;
}

/* The second has few rows and many heads: blocks make several units of rows, of which some see nothing. */
static void many_heads(void **state) {
  twin_bench *b = twin_begin(state);
  check(b, (shape){0, 16, 192, 128}, twin_causal(b, 300, 0, false), 0);
  const twin_rows seeing = twin_causal(b, 300, 50, true);
  check(b, (shape){0, 200, 192, 128}, blinded(b, &seeing, 128, 256), 0);
  check(b, (shape){0, 2, 192, 128}, twin_causal(b, 1500, 0, false), 0);
}

/* Lengths at which a backward takes its heads one after another, and then one head's keys in two ranges, between which
 * lies a document. */
static void backward_in_parts(void **state) {
  twin_bench *b = twin_begin(state);
  check(b, (shape){0, 3, 128, 128}, twin_causal(b, 33000, 500, true), 0);
  check(b, (shape){0, 2, 64, 64}, twin_causal(b, 66000, 500, true), 0);
}

/* Margins of 8 keep 16-byte accesses, 2 keeps pairs, 1 and 3 neither. */
static void strided_views(void **state) {
  twin_bench *b = twin_begin(state);
  static const int64_t margins[] = {8, 2, 1, 3};
  for (size_t i = 0; i < sizeof margins / sizeof *margins; i++)
    for (int w = 0; w < N_WIDTHS; w++) check(b, widths[w], twin_causal(b, 100, 0, true), margins[i]);
}

/* k_nope and v are slices of one tensor [m, heads, nope + v], and so are their gradients. */
static void values_beside_keys(void **state) {
  twin_bench *b = twin_begin(state);
  attention a = attention_of(b, (shape){0, 3, 128, 128}, twin_causal(b, 150, 0, false), 1, 0);
  twin kv = twin_random(b, WN_ACT, SEED_V, 1, 0, 3, 150, 3, 256);
  twin dkv = twin_random(b, WN_ACT, SEED_DV, 0.3, 0, 3, 150, 3, 256);
  /* the CPU's slices need no copy: its tensors have strides too */
  a.k = twin_slice(kv, 2, 0, 128);
  a.v = twin_slice(kv, 2, 128, 128);
  a.dk = twin_slice(dkv, 2, 0, 128);
  a.dv = twin_slice(dkv, 2, 128, 128);
  forward(b, &a);
  backward(b, &a);
  twin_close(b, "o", &a.o, twin_bf16);
  twin_close_sum(b, "dq", &a.dq);
  twin_close(b, "dk and dv", &dkv, twin_bf16);
  twin_end(b);
}

/* Weights are nearly all 0 or 1, so most of dk is next to nothing, too. */
static void large_logits(void **state) {
  twin_bench *b = twin_begin(state);
  attention a = attention_of(b, (shape){0, 3, 192, 128}, twin_causal(b, 257, 0, false), 300, 0);
  forward(b, &a);
  twin_close(b, "o", &a.o, twin_bf16);
  twin_close(b, "lse", &a.lse, twin_f32);
  twin_close_sum(b, "delta", &a.delta);
  backward(b, &a);
  twin_close_sum(b, "dq", &a.dq);
  twin_close_sum(b, "dk", &a.dk);
  twin_close(b, "dv", &a.dv, twin_bf16);
  twin_end(b);
}

static void set_keys_alike(twin_bench *b, twin *k, int64_t group) {
  int64_t m = k->cpu.dim[0], row = k->cpu.dim[1] * k->cpu.dim[2];
  double *values = malloc((size_t)(m * row) * sizeof *values);
  assert_non_null(values);
  for (int64_t i = 0; i < m * row; i++) values[i] = wn_test_get(&k->cpu, i / row / group * group * row + i % row);
  twin_set(b, k, values);
  free(values);
}

/* Keys in groups of 16 that are alike; then all alike: every weight is the same, so o before its rounding is a plain
 * mean, and delta agrees to FP32 - which a delta made of the rounded o does not. */
static void keys_alike(void **state) {
  twin_bench *b = twin_begin(state);
  attention a = attention_of(b, (shape){0, 3, 192, 128}, twin_causal(b, 200, 0, false), 1, 0);
  set_keys_alike(b, &a.k, 16);
  both_ways(b, &a);
  twin_end(b);
  for (int w = 0; w < N_WIDTHS; w++) {
    a = attention_of(b, widths[w], twin_causal(b, 200, 0, false), 1, 0);
    set_keys_alike(b, &a.k, 200);
    forward(b, &a);
    twin_close(b, "delta of a mean", &a.delta, twin_f32);
    twin_end(b);
  }
}

static void forward_on_gpu(twin_bench *b, attention *a) {
  OK(b->cuda->ops->attention_dense(b->cuda, &a->o.cuda, &a->lse.cuda, &a->delta.cuda, &a->d_o.cuda, &a->q.cuda,
                                   &a->k.cuda, &a->v.cuda, &a->rows.cuda, &a->params));
}

static void a_row_without_numbers(void **state) {
  twin_bench *b = twin_begin(state);
  static const shape shapes[] = {{0, 3, 192, 128}, {0, 2, 256, 256}};
  for (int w = 0; w < 2; w++) {
    attention a = attention_of(b, shapes[w], twin_causal(b, 200, 0, true), 1, 0);
    twin_nan_row(b, &a, 70, 1, forward_on_gpu);
    twin_end(b);
  }
}

static void without_delta(void **state) {
  twin_bench *b = twin_begin(state);
  attention a = attention_of(b, (shape){0, 3, 192, 128}, twin_causal(b, 200, 0, true), 1, 0);
  OK(b->cuda->ops->attention_dense(b->cuda, &a.o.cuda, &a.lse.cuda, NULL, NULL, &a.q.cuda, &a.k.cuda, &a.v.cuda,
                                   &a.rows.cuda, &a.params));
  OK(b->cpu->ops->attention_dense(b->cpu, &a.o.cpu, &a.lse.cpu, NULL, NULL, &a.q.cpu, &a.k.cpu, &a.v.cpu, &a.rows.cpu,
                                  &a.params));
  twin_close(b, "o", &a.o, twin_bf16);
  twin_close(b, "lse", &a.lse, twin_f32);
  twin_end(b);
}

/* Two runs of rows add into the same dk and dv. */
static void row_chunks_add_up(void **state) {
  twin_bench *b = twin_begin(state);
  enum { N = 200, CUT = 77 };
  attention a = attention_of(b, (shape){0, 2, 64, 64}, twin_causal(b, N, 0, false), 1, 0);
  forward(b, &a);
  for (int part = 0; part < 2; part++) {
    int64_t from = part ? CUT : 0, count = part ? N - CUT : CUT;
    const wn_rows rows = twin_run(a.rows.cuda, from, count);
    twin dq = twin_slice(a.dq, 0, from, count), d_o = twin_slice(a.d_o, 0, from, count),
         q = twin_slice(a.q, 0, from, count), lse = twin_slice(a.lse, 0, from, count),
         delta = twin_slice(a.delta, 0, from, count);
    OK(b->cuda->ops->attention_dense_backward(b->cuda, &dq.cuda, &a.dk.cuda, &a.dv.cuda, &d_o.cuda, &q.cuda, &a.k.cuda,
                                              &a.v.cuda, &lse.cuda, &delta.cuda, &rows, &a.params));
  }
  OK(b->cpu->ops->attention_dense_backward(b->cpu, &a.dq.cpu, &a.dk.cpu, &a.dv.cpu, &a.d_o.cpu, &a.q.cpu, &a.k.cpu,
                                           &a.v.cpu, &a.lse.cpu, &a.delta.cpu, &a.rows.cpu, &a.params));
  twin_close_sum(b, "dq", &a.dq);
  twin_close(b, "dk", &a.dk, twin_bf16);
  twin_close(b, "dv", &a.dv, twin_bf16);
  twin_end(b);
}

/* [rows + heads - 1, 1, width] as [rows, heads, width], each head a row after the one before: rows of its own without
 * memory of its own. */
static wn_tensor overlapping_heads(twin t, int64_t heads) {
  wn_tensor x = t.cuda;
  x.dim[0] -= heads - 1;
  x.dim[1] = heads;
  x.stride[1] = x.stride[0];
  return x;
}

/* o, lse and delta of all rows: a number each, but for lse of rows that see nothing. */
static void all_numbers(const wn_tensor *t, const wn_rows *rows, bool lse) {
  int64_t each = wn_tensor_count(t) / t->dim[0];
  for (int64_t i = 0; i < wn_tensor_count(t); i++) {
    double x = wn_test_get(t, i);
    bool empty = rows->last_key[i / each] < rows->first_key[i / each];
    if (lse && empty ? x != -INFINITY : !(fabs(x) < INFINITY))
      fail_msg("element %lld of row %lld is %g", (long long)(i % each), (long long)(i / each), x);
  }
}

/* Enough work that two blocks share keys, which the forward decides from 2^32 products of rows, keys and heads on: the
 * same bits as from runs of rows, each of which is too little for that, with delta and without. The last rows of many,
 * each pair of blocks with several units to make. One case has rows that see few keys beside some that see all, another
 * short documents, so that the next unit is begun soon, and units that see nothing. */
static void shared_keys(void **state) {
  twin_bench *b = twin_begin(state);
  enum { N = 1100, M = 32768, HEADS = 128, CUT = 500 };
  static const struct {
    int32_t dq, dv, document, blind; /* rows 200 .. blind - 1 see nothing */
  } cases[] = {{192, 128, 0, 0}, {64, 64, M - N / 2, 0}, {128, 128, 0, 0}, {192, 128, 40, 600}};
  assert_true((int64_t)N * M * HEADS >= (int64_t)1 << 32 && (int64_t)(N - CUT) * M * HEADS < (int64_t)1 << 32);
  for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
    const int32_t dq = cases[c].dq, dv = cases[c].dv;
    const wn_attention_params params = {.scale = 1 / sqrt((double)dq)};
    const twin_rows seeing = twin_causal_end(b, N, M, cases[c].document, true),
                    rows = blinded(b, &seeing, 200, cases[c].blind);
    twin q = twin_random(b, WN_ACT, SEED_Q, 1, 0, 3, N, HEADS, dq),
         d_o = twin_random(b, WN_ACT, SEED_DO, 1, 0, 3, N, HEADS, dv), out[3][3];
    const wn_tensor k = overlapping_heads(twin_random(b, WN_ACT, SEED_K, 1, 0, 3, M + HEADS - 1, 1, dq), HEADS),
                    v = overlapping_heads(twin_random(b, WN_ACT, SEED_V, 1, 0, 3, M + HEADS - 1, 1, dv), HEADS);
    for (int i = 0; i < 3; i++) {
      out[i][0] = twin_tensor(b, WN_ACT, 3, N, HEADS, dv);
      for (int j = 1; j < 3; j++) out[i][j] = twin_tensor(b, WN_STAT, 2, N, HEADS, 0);
      for (int j = 0; j < 3; j++) twin_poison(b, &out[i][j]);
    }
    OK(b->cuda->ops->attention_dense(b->cuda, &out[0][0].cuda, &out[0][1].cuda, &out[0][2].cuda, &d_o.cuda, &q.cuda, &k,
                                     &v, &rows.cuda, &params));
    OK(b->cuda->ops->attention_dense(b->cuda, &out[2][0].cuda, &out[2][1].cuda, NULL, NULL, &q.cuda, &k, &v, &rows.cuda,
                                     &params));
    for (int64_t from = 0, count = CUT; from < N; from += count, count = N - CUT) {
      const wn_rows run = twin_run(rows.cuda, from, count);
      twin some[3], some_q = twin_slice(q, 0, from, count), some_d_o = twin_slice(d_o, 0, from, count);
      for (int j = 0; j < 3; j++) some[j] = twin_slice(out[1][j], 0, from, count);
      OK(b->cuda->ops->attention_dense(b->cuda, &some[0].cuda, &some[1].cuda, &some[2].cuda, &some_d_o.cuda,
                                       &some_q.cuda, &k, &v, &run, &params));
    }
    for (int j = 0; j < 3; j++) {
      wn_tensor whole = twin_download(b, &out[0][j].cuda);
      all_numbers(&whole, &rows.cpu, j == 1);
      for (int i = 1; i < (j < 2 ? 3 : 2); i++) {
        wn_tensor other = twin_download(b, &out[i][j].cuda);
        assert_memory_equal(whole.data, other.data, (size_t)wn_tensor_bytes(&whole));
        free(other.data);
      }
      free(whole.data);
    }
    twin_end(b);
  }
}

static void run_both(wn_device *device, void *context) {
  attention *a = context;
  OK(device->ops->attention_dense(device, &a->o.cuda, &a->lse.cuda, &a->delta.cuda, &a->d_o.cuda, &a->q.cuda,
                                  &a->k.cuda, &a->v.cuda, &a->rows.cuda, &a->params));
  OK(device->ops->attention_dense_backward(device, &a->dq.cuda, &a->dk.cuda, &a->dv.cuda, &a->d_o.cuda, &a->q.cuda,
                                           &a->k.cuda, &a->v.cuda, &a->lse.cuda, &a->delta.cuda, &a->rows.cuda,
                                           &a->params));
}

static void repeats(void **state) {
  twin_bench *b = twin_begin(state);
  for (int w = 0; w <= N_WIDTHS; w++) {
    const shape s = w < N_WIDTHS ? widths[w] : (shape){0, 100, 192, 128}; /* 500 units of rows */
    attention a = attention_of(b, s, twin_causal(b, 513, 200, true), 1, 0);
    const twin_out outs[] = {{&a.o, false},  {&a.lse, false}, {&a.delta, false},
                             {&a.dq, false}, {&a.dk, true},   {&a.dv, true}};
    twin_repeats(b, run_both, &a, outs, 6);
    twin_end(b);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_width_and_length),
      cmocka_unit_test(documents_and_empty_rows),
      cmocka_unit_test(nothing_visible),
      cmocka_unit_test(a_chunk_of_rows),
      cmocka_unit_test(many_heads),
      cmocka_unit_test(backward_in_parts),
      cmocka_unit_test(strided_views),
      cmocka_unit_test(values_beside_keys),
      cmocka_unit_test(large_logits),
      cmocka_unit_test(keys_alike),
      cmocka_unit_test(a_row_without_numbers),
      cmocka_unit_test(without_delta),
      cmocka_unit_test(row_chunks_add_up),
      cmocka_unit_test(shared_keys),
      cmocka_unit_test(repeats),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
