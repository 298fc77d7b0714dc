/* Both ends of the vocabulary on the GPU against the CPU in FP64: embedding and its gradient, the head fused with the
 * loss. */
#include "support/twin.h"

/* Some tokens are frequent, most never occur: `i`th of a vocabulary. */
static int32_t skewed(uint64_t seed, int64_t i, int64_t vocabulary) {
  uint64_t x = (seed * 1000003 + (uint64_t)i) * 0x9e3779b97f4a7c15u;
  x ^= x >> 29;
  x *= 0xbf58476d1ce4e5b9u;
  x ^= x >> 32;
  return (int32_t)(x % 3 == 0 ? x / 3 % (uint64_t)(vocabulary < 3 ? vocabulary : 3) : x / 3 % (uint64_t)vocabulary);
}

static twin skewed_tokens(twin_bench *b, uint64_t seed, int64_t n, int64_t vocabulary, bool holes) {
  int32_t *x = malloc((size_t)n * sizeof *x + 8);
  assert_non_null(x);
  for (int64_t i = 0; i < n; i++) x[i] = holes && i % 5 == 2 ? -1 : skewed(seed, i, vocabulary);
  twin t = twin_ints(b, x, 1, n, 0);
  free(x);
  return t;
}

static const struct embedding_shape {
  int64_t n, width, vocabulary;
} embedding_shapes[] = {{1, 1, 1},      {5, 13, 7},    {200, 64, 31}, {333, 72, 5000},
                        {1000, 96, 17}, {64, 2056, 9}, {3000, 40, 1}, {0, 16, 8}};

static void every_embedding(void **state, void (*check)(twin_bench *, struct embedding_shape, int64_t margin)) {
  twin_bench *b = twin_begin(state);
  for (size_t i = 0; i < sizeof embedding_shapes / sizeof *embedding_shapes; i++)
    for (int64_t margin = 0; margin < 9; margin += 4) check(b, embedding_shapes[i], margin);
  twin_end(b);
}

static void check_embedding(twin_bench *b, struct embedding_shape s, int64_t margin) {
  twin w = twin_random(b, WN_ACT, 1, 1, margin, 2, s.vocabulary, s.width, 0);
  twin h = twin_strided(b, WN_ACT, margin, 2, s.n, s.width, 0), tokens = skewed_tokens(b, 2, s.n, s.vocabulary, 0);
  twin_poison(b, &h);
  OK(b->cuda->ops->embedding(b->cuda, &h.cuda, &tokens.cuda, &w.cuda));
  OK(b->cpu->ops->embedding(b->cpu, &h.cpu, &tokens.cpu, &w.cpu));
  twin_close(b, "embedding", &h, 0);
}
static void embedding_copies_rows(void **state) {
  every_embedding(state, check_embedding);
}

static void check_embedding_backward(twin_bench *b, struct embedding_shape s, int64_t margin) {
  twin dw = twin_random(b, WN_WGRAD, 1, 1, margin, 2, s.vocabulary, s.width, 0);
  twin dh = twin_random(b, WN_ACT, 2, 1, margin, 2, s.n, s.width, 0);
  twin tokens = skewed_tokens(b, 3, s.n, s.vocabulary, 0);
  OK(b->cuda->ops->embedding_backward(b->cuda, &dw.cuda, &dh.cuda, &tokens.cuda));
  OK(b->cpu->ops->embedding_backward(b->cpu, &dw.cpu, &dh.cpu, &tokens.cpu));
  twin_close(b, "embedding_backward", &dw, twin_f32);
}
static void embedding_gradient_matches(void **state) {
  every_embedding(state, check_embedding_backward);
}

typedef struct head_case {
  twin logp, dh, dw, h, w, target, weight;
  wn_head_params params;
} head_case;

/* Rows without a target have a weight that nobody may read. */
static head_case make_head(twin_bench *b, int64_t n, int64_t width, int64_t vocabulary, int32_t chunk, int64_t margin,
                           double size, bool holes) {
  head_case c = {.logp = twin_tensor(b, WN_STAT, 1, n, 0, 0),
                 .dh = twin_strided(b, WN_ACT, margin, 2, n, width, 0),
                 .dw = twin_random(b, WN_WGRAD, 1, 0.01, margin, 2, vocabulary, width, 0),
                 .h = twin_random(b, WN_ACT, 2, size, margin, 2, n, width, 0),
                 .w = twin_random(b, WN_ACT, 3, 1 / sqrt((double)width), margin, 2, vocabulary, width, 0),
                 .target = skewed_tokens(b, 4, n, vocabulary, holes),
                 .weight = twin_tensor(b, WN_STAT, 1, n, 0, 0),
                 .params = {.chunk_rows = chunk}};
  double *weights = malloc((size_t)n * sizeof *weights + 8);
  assert_non_null(weights);
  for (int64_t i = 0; i < n; i++)
    weights[i] = ((const int32_t *)c.target.cpu.data)[i] < 0 ? (double)NAN : 0.25 + (double)(i % 7);
  twin_set(b, &c.weight, weights);
  free(weights);
  twin_poison(b, &c.logp);
  twin_poison(b, &c.dh);
  return c;
}

static void run_head(wn_device *device, void *context) {
  head_case *c = context;
  OK(device->ops->head_loss(device, &c->logp.cuda, &c->dh.cuda, &c->dw.cuda, &c->h.cuda, &c->w.cuda, &c->target.cuda,
                            &c->weight.cuda, &c->params));
}

static void check_head(twin_bench *b, head_case *c) {
  run_head(b->cuda, c);
  OK(b->cpu->ops->head_loss(b->cpu, &c->logp.cpu, &c->dh.cpu, &c->dw.cpu, &c->h.cpu, &c->w.cpu, &c->target.cpu,
                            &c->weight.cpu, &c->params));
  twin_close(b, "logp", &c->logp, twin_f32);
  twin_close(b, "dh", &c->dh, twin_bf16);
  twin_close(b, "dw", &c->dw, twin_bf16);
  twin_poison(b, &c->logp);
  OK(b->cuda->ops->head_loss(b->cuda, &c->logp.cuda, NULL, NULL, &c->h.cuda, &c->w.cuda, &c->target.cuda, NULL,
                             &c->params));
  OK(b->cpu->ops->head_loss(b->cpu, &c->logp.cpu, NULL, NULL, &c->h.cpu, &c->w.cpu, &c->target.cpu, NULL, &c->params));
  twin_close(b, "logp alone", &c->logp, twin_f32);
}

/* Vocabularies for one, two, four and eight blocks a row, their edges, and odd ones. */
static void head_matches(void **state) {
  static const struct {
    int64_t n, width, vocabulary;
    int32_t chunk;
  } shapes[] = {{1, 8, 1, 4},         {3, 13, 7, 2},     {37, 64, 257, 16},  {130, 96, 1000, 64},
                {130, 40, 4104, 200}, {7, 24, 16384, 4}, {6, 24, 16385, 6},  {5, 16, 40000, 3},
                {5, 16, 32769, 5},    {9, 32, 70001, 4}, {2, 16, 129280, 2}, {2, 8, 200003, 1}};
  twin_bench *b = twin_begin(state);
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
    for (int64_t margin = 0; margin <= 5; margin += 5) {
      head_case c =
          make_head(b, shapes[i].n, shapes[i].width, shapes[i].vocabulary, shapes[i].chunk, margin, 2, margin);
      check_head(b, &c);
    }
  twin_end(b);
}

/* Logits of a thousand and more: the softmax is one-hot or nearly, the losses are large. */
static void large_logits_stay_finite(void **state) {
  twin_bench *b = twin_begin(state);
  head_case c = make_head(b, 50, 64, 3001, 16, 0, 600, true);
  check_head(b, &c);
  twin_end(b);
}

/* The exact values of a head that knows nothing: logp = -log V, the gradient of a zero weight is zero. */
static void a_blank_head_is_uniform(void **state) {
  enum { N = 9, WIDTH = 16, VOCABULARY = 20011 };
  twin_bench *b = twin_begin(state);
  head_case c = make_head(b, N, WIDTH, VOCABULARY, 4, 0, 1, false);
  twin_constant(b, &c.w, 0);
  check_head(b, &c);
  OK(b->cuda->ops->head_loss(b->cuda, &c.logp.cuda, NULL, NULL, &c.h.cuda, &c.w.cuda, &c.target.cuda, NULL, &c.params));
  wn_tensor logp = twin_download(b, &c.logp.cuda);
  for (int i = 0; i < N; i++) assert_true(fabs(wn_test_get(&logp, i) + log(VOCABULARY)) < 1e-5);
  free(logp.data);
  twin_end(b);
}

/* Rows without a target: logp 0, no gradient, even where a whole chunk has none. */
static void rows_without_target_are_silent(void **state) {
  enum { N = 12, WIDTH = 24, VOCABULARY = 300 };
  twin_bench *b = twin_begin(state);
  int32_t none[N];
  for (int i = 0; i < N; i++) none[i] = -1;
  head_case c = make_head(b, N, WIDTH, VOCABULARY, 4, 0, 1, false);
  c.target = twin_ints(b, none, 1, N, 0);
  twin_constant(b, &c.weight, (double)NAN);
  twin_constant(b, &c.dw, 0.5);
  run_head(b->cuda, &c);
  twin zero = c.dh, kept = c.dw, nothing = c.logp;
  OK(b->cpu->ops->zero(b->cpu, &zero.cpu));
  OK(b->cpu->ops->zero(b->cpu, &nothing.cpu));
  twin_close(b, "dh", &zero, 0);
  twin_close(b, "dw", &kept, 0);
  twin_close(b, "logp", &nothing, 0);
  twin_end(b);
}

/* The chunk changes nothing but the order of additions into dw. */
static void chunks_agree(void **state) {
  twin_bench *b = twin_begin(state);
  head_case c = make_head(b, 100, 64, 500, 100, 0, 2, true);
  run_head(b->cuda, &c);
  wn_tensor whole = twin_download(b, &c.logp.cuda);
  c.params.chunk_rows = 7;
  run_head(b->cuda, &c);
  wn_tensor parts = twin_download(b, &c.logp.cuda);
  assert_true(wn_test_relative_norm(&parts, &whole) < twin_f32);
  free(whole.data);
  free(parts.data);
  twin_end(b);
}

typedef struct embedding_case {
  twin dw, dh, tokens;
} embedding_case;

static void run_embedding_backward(wn_device *device, void *context) {
  embedding_case *c = context;
  OK(device->ops->embedding_backward(device, &c->dw.cuda, &c->dh.cuda, &c->tokens.cuda));
}

static void repeats_bit_for_bit(void **state) {
  twin_bench *b = twin_begin(state);
  head_case c = make_head(b, 300, 128, 33000, 128, 0, 2, true);
  const twin_out outs[] = {{&c.logp, false}, {&c.dh, false}, {&c.dw, true}};
  twin_repeats(b, run_head, &c, outs, 3);
  embedding_case e = {.dw = twin_tensor(b, WN_WGRAD, 2, 50, 256, 0),
                      .dh = twin_random(b, WN_ACT, 1, 1, 0, 2, 20000, 256, 0),
                      .tokens = skewed_tokens(b, 5, 20000, 50, false)};
  twin_repeats(b, run_embedding_backward, &e, &(twin_out){&e.dw, true}, 1);
  twin_end(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(embedding_copies_rows),
      cmocka_unit_test(embedding_gradient_matches),
      cmocka_unit_test(head_matches),
      cmocka_unit_test(large_logits_stay_finite),
      cmocka_unit_test(a_blank_head_is_uniform),
      cmocka_unit_test(rows_without_target_are_silent),
      cmocka_unit_test(chunks_agree),
      cmocka_unit_test(repeats_bit_for_bit),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
