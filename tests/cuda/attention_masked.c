/* Attention over a selection, per head, on the GPU against the FP64 CPU. Selections are ascending, distinct and end in
 * -1; p is checked with and without gradients. */
#include "support/twin_attention.h"

typedef struct shape {
  int32_t k, heads, dq, dv;
} shape;

enum { SEED_Q = 21, SEED_K, SEED_V, SEED_DO, SEED_DK, SEED_DV, SEED_PICKS };

/* How picks are drawn: `most` of a row's visible keys, chosen evenly at random, always with `fixed` (-1: none). */
typedef struct draw {
  int32_t most, fixed;
} draw;

static void draw_row(int32_t *picks, int32_t k, draw d, int32_t first, int32_t last, int64_t row) {
  int32_t visible = first > last ? 0 : last - first + 1, want = d.most < visible ? d.most : visible, n = 0;
  bool fixed = d.fixed >= first && d.fixed <= last && want > 0;
  int32_t left = fixed ? want - 1 : want, pool = fixed ? visible - 1 : visible;
  for (int32_t key = first; key <= last; key++) {
    if (fixed && key == d.fixed) {
      picks[n++] = key;
      continue;
    }
    /* each key with the chance left / pool leaves exactly `want` */
    if ((double)pool * wn_rng_uniform(SEED_PICKS, WN_RNG_TEST, (uint64_t)row * 100003u + (uint64_t)key) < left) {
      picks[n++] = key;
      left--;
    }
    pool--;
  }
  for (; n < k; n++) picks[n] = -1;
}

static twin selection_of(twin_bench *b, const wn_rows *rows, int32_t k, draw d) {
  int32_t *picks = malloc((size_t)rows->n_rows * (size_t)k * sizeof *picks);
  assert_non_null(picks);
  for (int32_t i = 0; i < rows->n_rows; i++)
    draw_row(picks + (int64_t)i * k, k, d, rows->first_key[i], rows->last_key[i], i);
  twin t = twin_ints(b, picks, 2, rows->n_rows, k);
  free(picks);
  return t;
}

static attention attention_of(twin_bench *b, shape s, twin_rows rows, draw d, int64_t margin) {
  attention a = twin_attention(b, rows, s.heads, s.dq, s.dv, SEED_Q, 1, margin);
  a.p = twin_strided(b, WN_STAT, margin, 2, rows.cpu.n_rows, s.k, 0);
  a.selection = selection_of(b, &rows.cpu, s.k, d);
  twin_poison(b, &a.p);
  return a;
}

static void forward_on(wn_device *device, const attention *a, bool cuda) {
#define OF(t) (cuda ? (t).cuda : (t).cpu)
  wn_tensor o = OF(a->o), lse = OF(a->lse), delta = OF(a->delta), d_o = OF(a->d_o), q = OF(a->q), k = OF(a->k),
            v = OF(a->v), selection = OF(a->selection);
  const wn_rows rows = OF(a->rows);
  OK(device->ops->attention_masked(device, &o, &lse, &delta, &d_o, &q, &k, &v, &selection, &rows, &a->params));
}

/* gradients, p: which results are asked for */
static void backward_on(wn_device *device, const attention *a, bool cuda, bool gradients, bool with_p) {
  wn_tensor delta = OF(a->delta), d_o = OF(a->d_o), q = OF(a->q), k = OF(a->k), v = OF(a->v), lse = OF(a->lse),
            selection = OF(a->selection), dq = OF(a->dq), dk = OF(a->dk), dv = OF(a->dv), p = OF(a->p);
  const wn_rows rows = OF(a->rows);
  OK(device->ops->attention_masked_backward(device, gradients ? &dq : NULL, gradients ? &dk : NULL,
                                            gradients ? &dv : NULL, with_p ? &p : NULL, gradients ? &d_o : NULL, &q, &k,
                                            &v, &selection, &lse, gradients ? &delta : NULL, &rows, &a->params));
#undef OF
}

/* Small probabilities stand beside large ones: p is compared by rows and as a whole. */
static void check_p(twin_bench *b, attention *a) {
  twin_close(b, "p", &a->p, twin_f32);
  wn_tensor p = twin_download(b, &a->p.cuda);
  for (int64_t i = 0; i < wn_tensor_count(&p); i++)
    if (wn_test_get(&a->selection.cpu, i) < 0 && wn_test_get(&p, i) != 0)
      fail_msg("p at an absent pick is %g", wn_test_get(&p, i));
  free(p.data);
}

static void both_ways(twin_bench *b, attention *a) {
  forward_on(b->cuda, a, true);
  forward_on(b->cpu, a, false);
  twin_close(b, "o", &a->o, twin_bf16);
  twin_close(b, "lse", &a->lse, twin_f32);
  twin_close_sum(b, "delta", &a->delta);
  backward_on(b->cuda, a, true, true, true);
  backward_on(b->cpu, a, false, true, true);
  twin_close_sum(b, "dq", &a->dq);
  twin_close(b, "dk", &a->dk, twin_bf16);
  twin_close(b, "dv", &a->dv, twin_bf16);
  check_p(b, a);
}

static void check(twin_bench *b, shape s, twin_rows rows, draw d, int64_t margin) {
  attention a = attention_of(b, s, rows, d, margin);
  both_ways(b, &a);
  twin_end(b);
}

static const shape shapes[] = {{16, 3, 192, 128}, {7, 1, 18, 12},  {16, 2, 64, 64},
                               {32, 2, 96, 32},   {16, 3, 40, 24}, {48, 2, 256, 256}};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

static void every_width_and_length(void **state) {
  twin_bench *b = twin_begin(state);
  static const int32_t lengths[] = {1, 2, 63, 64, 65, 129, 257};
  for (int w = 0; w < N_SHAPES; w++)
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
      shape s = shapes[w];
      print_message("n %d, k %d, heads %d, widths %d/%d\n", lengths[i], s.k, s.heads, s.dq, s.dv);
      check(b, s, twin_causal(b, lengths[i], 0, false), (draw){s.k, -1}, 0);
    }
}

static void fewer_keys_than_picks(void **state) {
  twin_bench *b = twin_begin(state);
  static const int32_t lengths[] = {40, 64, 65};
  for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
    check(b, (shape){64, 3, 192, 128}, twin_causal(b, lengths[i], 0, false), (draw){64, -1}, 0);
}

static void empty_rows_and_padding(void **state) {
  twin_bench *b = twin_begin(state);
  static const int32_t documents[] = {0, 50, 64};
  for (size_t i = 0; i < sizeof documents / sizeof *documents; i++) {
    check(b, (shape){32, 3, 192, 128}, twin_causal(b, 300, documents[i], true), (draw){32, -1}, 0);
    /* every row's list ends in -1 */
    check(b, (shape){40, 2, 64, 64}, twin_causal(b, 300, documents[i], true), (draw){13, -1}, 0);
    /* nobody picks anything */
    check(b, (shape){8, 2, 64, 64}, twin_causal(b, 300, documents[i], true), (draw){0, -1}, 0);
  }
}

/* One pick a row, of more rows than one run takes: o is the pick's value. */
static void one_pick(void **state) {
  twin_bench *b = twin_begin(state);
  attention a = attention_of(b, (shape){1, 2, 64, 64}, twin_causal(b, 700, 0, false), (draw){1, -1}, 0);
  both_ways(b, &a);
  wn_tensor o = twin_download(b, &a.o.cuda);
  for (int64_t i = 0; i < 700; i++)
    for (int64_t j = 0; j < 128; j++)
      if (wn_test_get(&o, i * 128 + j) != wn_test_get(&a.v.cpu, (int64_t)wn_test_get(&a.selection.cpu, i) * 128 + j))
        fail_msg("row %lld is not its one pick's value", (long long)i);
  free(o.data);
  twin_end(b);
}

/* Blocks of the forward make several units of rows. */
static void many_heads(void **state) {
  twin_bench *b = twin_begin(state);
  check(b, (shape){4, 200, 64, 64}, twin_causal(b, 600, 70, true), (draw){4, -1}, 0);
  check(b, (shape){20, 100, 192, 128}, twin_causal(b, 400, 0, true), (draw){20, -1}, 0);
}

static void everybody_picks_one_key(void **state) {
  twin_bench *b = twin_begin(state);
  check(b, (shape){16, 3, 192, 128}, twin_causal(b, 400, 0, false), (draw){16, 0}, 0);
  check(b, (shape){1, 3, 192, 128}, twin_causal(b, 400, 0, false), (draw){1, 0}, 0);
}

/* More keys than the plan's kernel holds words of at a time, and picks on both sides of the cut. */
static void many_keys(void **state) {
  twin_bench *b = twin_begin(state);
  enum { N = 70, M = 17000 };
  int32_t first[N] = {0}, last[N];
  for (int i = 0; i < N; i++) last[i] = M - N + i;
  check(b, (shape){100, 1, 64, 64}, twin_rows_of(b, M, first, last, last, N), (draw){100, -1}, 0);
}

static void strided_views(void **state) {
  twin_bench *b = twin_begin(state);
  static const int64_t margins[] = {8, 2, 1};
  for (size_t i = 0; i < sizeof margins / sizeof *margins; i++)
    for (int w = 0; w < 3; w++) check(b, shapes[w], twin_causal(b, 100, 0, true), (draw){shapes[w].k, -1}, margins[i]);
}

static void p_alone_and_gradients_alone(void **state) {
  twin_bench *b = twin_begin(state);
  attention a = attention_of(b, (shape){32, 3, 192, 128}, twin_causal(b, 300, 0, true), (draw){32, -1}, 0);
  forward_on(b->cuda, &a, true);
  forward_on(b->cpu, &a, false);
  backward_on(b->cuda, &a, true, false, true);
  backward_on(b->cpu, &a, false, false, true);
  check_p(b, &a);
  backward_on(b->cuda, &a, true, true, false);
  backward_on(b->cpu, &a, false, true, false);
  twin_close_sum(b, "dq", &a.dq);
  twin_close(b, "dk", &a.dk, twin_bf16);
  twin_close(b, "dv", &a.dv, twin_bf16);
  twin_end(b);
}

/* With all visible keys picked, the dense operation's results. */
static void all_picked_is_dense(void **state) {
  twin_bench *b = twin_begin(state);
  attention a = attention_of(b, (shape){300, 3, 192, 128}, twin_causal(b, 300, 120, true), (draw){300, -1}, 0);
  forward_on(b->cuda, &a, true);
  backward_on(b->cuda, &a, true, true, false);
  /* the dense results of the same GPU stand where the CPU's would */
  twin dense[6] = {a.o, a.lse, a.delta, a.dq, a.dk, a.dv};
  const twin *masked[6] = {&a.o, &a.lse, &a.delta, &a.dq, &a.dk, &a.dv};
  static const char *const names[6] = {"o", "lse", "delta", "dq", "dk", "dv"};
  for (int i = 0; i < 6; i++) {
    const wn_tensor t = masked[i]->cuda;
    dense[i] = twin_tensor(b, masked[i]->role, t.rank, t.dim[0], t.dim[1], t.dim[2]);
    twin_poison(b, &dense[i]);
  }
  twin_fill(b, &dense[4], SEED_DK, 0.3, 0);
  twin_fill(b, &dense[5], SEED_DV, 0.3, 0);
  OK(b->cuda->ops->attention_dense(b->cuda, &dense[0].cuda, &dense[1].cuda, &dense[2].cuda, &a.d_o.cuda, &a.q.cuda,
                                   &a.k.cuda, &a.v.cuda, &a.rows.cuda, &a.params));
  OK(b->cuda->ops->attention_dense_backward(b->cuda, &dense[3].cuda, &dense[4].cuda, &dense[5].cuda, &a.d_o.cuda,
                                            &a.q.cuda, &a.k.cuda, &a.v.cuda, &dense[1].cuda, &dense[2].cuda,
                                            &a.rows.cuda, &a.params));
  for (int i = 0; i < 6; i++) {
    wn_tensor host = twin_download(b, &dense[i].cuda);
    twin both = *masked[i];
    for (int64_t j = 0; j < wn_tensor_count(&host); j++) wn_test_set(&both.cpu, j, wn_test_get(&host, j));
    free(host.data);
    twin_close(b, names[i], &both, i == 1 ? twin_f32 : twin_bf16);
  }
  twin_end(b);
}

static void forward_on_gpu(twin_bench *b, attention *a) {
  forward_on(b->cuda, a, true);
}

static void a_row_without_numbers(void **state) {
  twin_bench *b = twin_begin(state);
  attention a = attention_of(b, (shape){32, 3, 192, 128}, twin_causal(b, 300, 0, true), (draw){32, -1}, 0);
  twin_nan_row(b, &a, 70, 1, forward_on_gpu);
  twin_end(b);
}

/* More keys than the words of one run cover, 32 k, and a key that every row picks. Its dv begins at 256, where BF16
 * steps by 2: what 256 rows add is lost in one rounding, what all 2000 add is not. */
static void gradients_are_rounded_once(void **state) {
  twin_bench *b = twin_begin(state);
  attention a = attention_of(b, (shape){4, 2, 64, 64}, twin_causal(b, 2000, 0, false), (draw){4, 0}, 0);
  twin_constant(b, &a.d_o, 0.01);
  twin_constant(b, &a.dv, 256);
  forward_on(b->cuda, &a, true);
  forward_on(b->cpu, &a, false);
  backward_on(b->cuda, &a, true, true, true);
  backward_on(b->cpu, &a, false, true, true);
  twin_close(b, "dv", &a.dv, 5e-3);
  check_p(b, &a);
  twin_end(b);
  check(b, (shape){4, 2, 64, 64}, twin_causal(b, 2000, 300, true), (draw){4, -1}, 0);
  check(b, (shape){4, 1, 256, 256}, twin_causal(b, 700, 0, false), (draw){4, 0}, 0);
}

static void run_both(wn_device *device, void *context) {
  forward_on(device, context, true);
  backward_on(device, context, true, true, true);
}

static void repeats(void **state) {
  twin_bench *b = twin_begin(state);
  for (int w = 0; w < N_SHAPES; w++) {
    attention a = attention_of(b, shapes[w], twin_causal(b, 513, 200, true), (draw){shapes[w].k, -1}, 0);
    const twin_out outs[] = {{&a.o, false}, {&a.lse, false}, {&a.delta, false}, {&a.dq, false},
                             {&a.dk, true}, {&a.dv, true},   {&a.p, false}};
    twin_repeats(b, run_both, &a, outs, 7);
    twin_end(b);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_width_and_length),
      cmocka_unit_test(fewer_keys_than_picks),
      cmocka_unit_test(empty_rows_and_padding),
      cmocka_unit_test(one_pick),
      cmocka_unit_test(many_heads),
      cmocka_unit_test(everybody_picks_one_key),
      cmocka_unit_test(many_keys),
      cmocka_unit_test(strided_views),
      cmocka_unit_test(p_alone_and_gradients_alone),
      cmocka_unit_test(all_picked_is_dense),
      cmocka_unit_test(a_row_without_numbers),
      cmocka_unit_test(gradients_are_rounded_once),
      cmocka_unit_test(repeats),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
