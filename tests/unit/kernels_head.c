/* Embedding and the fused head against plain FP64 loops. */
#include "support/cpu.h"

enum { MARGIN = 3 };

typedef struct head {
  wn_tensor logp, dh, dw, h, w, target, weight;
  int32_t chunk_rows;
} head;

static void run_head(wn_device *d, void *context) {
  head *c = context;
  OK(d->ops->head_loss(d, &c->logp, &c->dh, &c->dw, &c->h, &c->w, &c->target, &c->weight,
                       &(wn_head_params){.chunk_rows = c->chunk_rows}));
}

static head operands(wn_device *d, int64_t n, int64_t width, int64_t vocabulary) {
  head c = {.chunk_rows = 1};
  c.h = wn_test_random(d, WN_F32, 1, 1, MARGIN, 2, n, width, 0);
  c.w = wn_test_random(d, WN_F32, 2, 1, MARGIN, 2, vocabulary, width, 0);
  c.weight = wn_test_random(d, WN_F32, 3, 1, 0, 1, n, 0, 0);
  c.target = wn_test_tensor(d, WN_I32, 1, n, 0, 0);
  for (int64_t i = 0; i < n; i++) {
    bool ignored = i % 5 == 3;
    int64_t token = (int64_t)wn_rng_below(7, WN_RNG_TEST, (uint64_t)i, (uint64_t)vocabulary);
    wn_test_set(&c.target, i, ignored ? -1 : (double)token);
    if (ignored) wn_test_set(&c.weight, i, (double)NAN); /* the contract: not looked at */
  }
  c.logp = wn_test_tensor(d, WN_F32, 1, n, 0, 0);
  c.dh = wn_test_strided(d, WN_F32, MARGIN, 2, n, width, 0);
  c.dw = wn_test_strided(d, WN_F32, MARGIN, 2, vocabulary, width, 0);
  return c;
}

static void reference(const double *h, const double *w, int64_t width, int64_t vocabulary, int64_t target,
                      double weight, double *logp, double *dh, double *dw) {
  *logp = 0;
  for (int64_t j = 0; j < width; j++) dh[j] = 0;
  if (target < 0) return;
  double top = -1e300, sum = 0;
  for (int pass = 0; pass < 3; pass++)
    for (int64_t v = 0; v < vocabulary; v++) {
      double logit = 0;
      for (int64_t j = 0; j < width; j++) logit += h[j] * w[v * width + j];
      if (pass == 0) top = logit > top ? logit : top;
      if (pass == 1) sum += exp(logit - top);
      if (pass < 2) continue;
      if (v == target) *logp = logit - top - log(sum);
      double g = weight * (exp(logit - top) / sum - (v == target ? 1 : 0));
      for (int64_t j = 0; j < width; j++) {
        dh[j] += g * w[v * width + j];
        dw[v * width + j] += g * h[j];
      }
    }
}

static void check_head(wn_device *d, int64_t n, int64_t width, int64_t vocabulary, int32_t chunk_rows) {
  size_t mark = wn_arena_mark(d->stash);
  head c = operands(d, n, width, vocabulary);
  c.chunk_rows = chunk_rows;
  double *logp = wn_test_doubles(d, &c.logp), *dh = wn_test_doubles(d, &c.dh);
  double *dw = wn_test_before(d, &(wn_test_out){&c.dw, true});
  const double *h = wn_test_doubles(d, &c.h), *w = wn_test_doubles(d, &c.w);
  for (int64_t i = 0; i < n; i++)
    reference(h + i * width, w, width, vocabulary, (int64_t)wn_test_get(&c.target, i), wn_test_get(&c.weight, i),
              &logp[i], dh + i * width, dw);
  const wn_test_out outs[] = {{&c.logp, false}, {&c.dh, false}, {&c.dw, true}};
  wn_test_repeats(d, run_head, &c, outs, 3);
  wn_test_close_to("logp", &c.logp, logp, 3e-5, 1e-6);
  wn_test_close_to("dh", &c.dh, dh, 3e-5, 1e-5);
  wn_test_close_to("dw", &c.dw, dw, 3e-5, 1e-5);
  wn_test_margin_untouched(&c.dh, MARGIN);
  wn_test_margin_untouched(&c.dw, MARGIN);
  wn_tensor alone = wn_test_tensor(d, WN_F32, 1, n, 0, 0);
  OK(d->ops->head_loss(d, &alone, NULL, NULL, &c.h, &c.w, &c.target, NULL, &(wn_head_params){chunk_rows}));
  wn_test_close("logp without gradients", &alone, &c.logp, 0, 0);
  wn_arena_release(d->stash, mark);
}

static void test_head(void **state) {
  check_head(*state, 1, 1, 1, 1);
  check_head(*state, 37, 19, 101, 8);
  check_head(*state, 37, 19, 101, 64); /* one chunk, larger than the rows */
  check_head(*state, 300, 33, 257, 150);
}

/* Logits far beyond exp's range: the shift by the maximum must carry. */
static void test_large_logits(void **state) {
  wn_device *d = *state;
  float h[2] = {1, 1}, w[3] = {1000, 999, -1000}, logp[2], dh[2], dw[3] = {0}, weight[2] = {1, 1};
  int32_t target[2] = {1, 2};
  wn_tensor th = wn_tensor_of(h, WN_F32, 2, 2, 1, 0, 0), tw = wn_tensor_of(w, WN_F32, 2, 3, 1, 0, 0),
            tlogp = wn_tensor_of(logp, WN_F32, 1, 2, 0, 0, 0), tdh = wn_tensor_of(dh, WN_F32, 2, 2, 1, 0, 0),
            tdw = wn_tensor_of(dw, WN_F32, 2, 3, 1, 0, 0), ttarget = wn_tensor_of(target, WN_I32, 1, 2, 0, 0, 0),
            tweight = wn_tensor_of(weight, WN_F32, 1, 2, 0, 0, 0);
  OK(d->ops->head_loss(d, &tlogp, &tdh, &tdw, &th, &tw, &ttarget, &tweight, &(wn_head_params){2}));
  wn_test_near("logp of 1", (double)logp[0], -1 - log1p(exp(-1)), 1e-6);
  wn_test_near("logp of 2", (double)logp[1], -2000 - log1p(exp(-1)), 1e-3);
  wn_test_near("dw of 2", (double)dw[2], -1, 1e-6);
}

typedef struct tokens {
  wn_tensor h, dw, w, dh, tokens;
} tokens;

static void run_embedding(wn_device *d, void *context) {
  tokens *c = context;
  OK(d->ops->embedding(d, &c->h, &c->tokens, &c->w));
  OK(d->ops->embedding_backward(d, &c->dw, &c->dh, &c->tokens));
}

static void test_embedding(void **state) {
  enum { N = 403, V = 97, WIDTH = 13 };
  wn_device *d = *state;
  tokens c = {.w = wn_test_random(d, WN_F32, 1, 1, MARGIN, 2, V, WIDTH, 0),
              .dh = wn_test_random(d, WN_F32, 2, 1, MARGIN, 2, N, WIDTH, 0),
              .h = wn_test_strided(d, WN_F32, MARGIN, 2, N, WIDTH, 0),
              .dw = wn_test_strided(d, WN_F32, MARGIN, 2, V, WIDTH, 0),
              .tokens = wn_test_tensor(d, WN_I32, 1, N, 0, 0)};
  for (int64_t i = 0; i < N; i++)
    wn_test_set(&c.tokens, i, i % 3 ? (double)wn_rng_below(5, WN_RNG_TEST, (uint64_t)i, V) : V - 1);
  double *h = wn_test_doubles(d, &c.h), *dw = wn_test_before(d, &(wn_test_out){&c.dw, true});
  for (int64_t i = 0; i < N * WIDTH; i++) {
    int64_t from = (int64_t)wn_test_get(&c.tokens, i / WIDTH) * WIDTH + i % WIDTH;
    h[i] = wn_test_get(&c.w, from);
    dw[from] += wn_test_get(&c.dh, i);
  }
  const wn_test_out outs[] = {{&c.h, false}, {&c.dw, true}};
  wn_test_repeats(d, run_embedding, &c, outs, 2);
  wn_test_close_to("h", &c.h, h, 0, 0);
  wn_test_close_to("dw", &c.dw, dw, 1e-5, 1e-6);
}

static int set_up(void **state) {
  *state = wn_test_cpu_f32();
  return 0;
}

static int tear_down(void **state) {
  wn_cpu_free_f32(*state);
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_head),
      cmocka_unit_test(test_large_logits),
      cmocka_unit_test(test_embedding),
  };
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
