/* delta and o of an output that attention left unrounded are, to the bit, those that it makes itself: what a backward
 * that keeps attention's output and one that computes it again agree on. */
#include "support/twin_attention.h"

/* Row i picks every third key that it sees, from the last on backwards, up to k of them. */
static twin picks_of(twin_bench *b, const wn_rows *rows, int32_t k) {
  int32_t *picks = malloc((size_t)rows->n_rows * (size_t)k * sizeof *picks);
  assert_non_null(picks);
  for (int32_t i = 0; i < rows->n_rows; i++) {
    int32_t visible = rows->last_key[i] - rows->first_key[i] + 1, n = visible > 0 ? (visible + 2) / 3 : 0;
    if (n > k) n = k;
    for (int32_t j = 0; j < k; j++) picks[i * k + j] = j < n ? rows->last_key[i] - 3 * (n - 1 - j) : -1;
  }
  twin t = twin_ints(b, picks, 2, rows->n_rows, k);
  free(picks);
  return t;
}

/* With o in ACT and delta, or with o in STAT. */
static void forward(twin_bench *b, attention *a, wn_tensor *o, wn_tensor *lse, bool with_delta) {
  const wn_ops *ops = b->cuda->ops;
  wn_tensor *delta = with_delta ? &a->delta.cuda : NULL, *d_o = with_delta ? &a->d_o.cuda : NULL;
  if (a->selection.cuda.data)
    OK(ops->attention_masked(b->cuda, o, lse, delta, d_o, &a->q.cuda, &a->k.cuda, &a->v.cuda, &a->selection.cuda,
                             &a->rows.cuda, &a->params));
  else
    OK(ops->attention_dense(b->cuda, o, lse, delta, d_o, &a->q.cuda, &a->k.cuda, &a->v.cuda, &a->rows.cuda,
                            &a->params));
}

static void expect_same_bits(twin_bench *b, const char *what, const twin *t, const twin *other) {
  wn_tensor x = twin_download(b, &t->cuda), y = twin_download(b, &other->cuda);
  int64_t bytes = wn_dtype_bytes(x.dtype);
  for (int64_t i = 0; i < wn_tensor_count(&x); i++)
    if (memcmp((char *)x.data + i * bytes, (char *)y.data + i * bytes, (size_t)bytes) != 0)
      fail_msg("%s: element %lld is %.9g and %.9g", what, (long long)i, wn_test_get(&x, i), wn_test_get(&y, i));
  free(x.data);
  free(y.data);
}

static void expect_same(twin_bench *b, attention *a, int64_t margin) {
  int64_t n = a->o.cpu.dim[0], heads = a->o.cpu.dim[1], dv = a->o.cpu.dim[2];
  twin unrounded = twin_strided(b, WN_STAT, margin, 3, n, heads, dv), lse = twin_strided(b, WN_STAT, 0, 2, n, heads, 0);
  twin o = twin_strided(b, WN_ACT, margin, 3, n, heads, dv), delta = twin_strided(b, WN_STAT, 0, 2, n, heads, 0);
  twin_poison(b, &unrounded);
  twin_poison(b, &lse);
  twin_poison(b, &o);
  twin_poison(b, &delta);
  forward(b, a, &a->o.cuda, &a->lse.cuda, true);
  forward(b, a, &unrounded.cuda, &lse.cuda, false);
  OK(b->cuda->ops->attention_delta(b->cuda, &delta.cuda, &o.cuda, &unrounded.cuda, &a->d_o.cuda));
  expect_same_bits(b, "lse", &lse, &a->lse);
  expect_same_bits(b, "o", &o, &a->o);
  expect_same_bits(b, "delta", &delta, &a->delta);
}

static void the_same_bits(void **state) {
  twin_bench *b = twin_begin(state);
  static const int32_t widths[][3] = {{3, 192, 128}, {2, 64, 64}, {2, 128, 128}, {3, 40, 24},
                                      {1, 18, 12},   {2, 17, 13}, {1, 1, 1},     {2, 256, 256}};
  static const int32_t lengths[] = {1, 63, 130, 331};
  for (size_t w = 0; w < sizeof widths / sizeof *widths; w++)
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
      for (int masked = 0; masked < 2; masked++)
        for (int64_t margin = 0; margin <= 3; margin += 3) {
          twin_rows rows = twin_causal(b, lengths[i], lengths[i] > 100 ? 50 : 0, true);
          attention a = twin_attention(b, rows, widths[w][0], widths[w][1], widths[w][2], 31, 1, margin);
          if (masked) a.selection = picks_of(b, &rows.cpu, 16);
          expect_same(b, &a, margin);
          twin_end(b);
        }
}

typedef struct operands {
  twin delta, o, unrounded, d_o;
} operands;

static void run(wn_device *device, void *context) {
  operands *x = context;
  OK(device->ops->attention_delta(device, &x->delta.cuda, &x->o.cuda, &x->unrounded.cuda, &x->d_o.cuda));
}

/* Against plain sums, and twenty times. */
static void against_the_cpu(void **state) {
  twin_bench *b = twin_begin(state);
  operands x = {.delta = twin_tensor(b, WN_STAT, 2, 1000, 16, 0),
                .o = twin_tensor(b, WN_ACT, 3, 1000, 16, 128),
                .unrounded = twin_random(b, WN_STAT, 5, 1, 0, 3, 1000, 16, 128),
                .d_o = twin_random(b, WN_ACT, 6, 1, 0, 3, 1000, 16, 128)};
  const twin_out outs[] = {{&x.delta, false}, {&x.o, false}};
  twin_repeats(b, run, &x, outs, 2);
  OK(b->cpu->ops->attention_delta(b->cpu, &x.delta.cpu, &x.o.cpu, &x.unrounded.cpu, &x.d_o.cpu));
  twin_close(b, "delta", &x.delta, twin_f32);
  twin_close(b, "o", &x.o, twin_bf16);
  twin_end(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_same_bits),
      cmocka_unit_test(against_the_cpu),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
