/* Micro-batches against their definition, worked out token by token from the documents alone: what each row reads,
 * predicts and sees, and the counts that losses are divided by. */
#include "train/batch.h"

#include <stdlib.h>

#include "kernels/cpu/cpu.h"
#include "support/temp.h"

enum { T = 7, N_DOCUMENTS = 6, N_TOKENS = 38, N_SEQS = 2, N = T * N_SEQS, PICKS = 3 };

/* Documents that end inside a window, at its end, and span several; one of a single token. */
static const int32_t lengths[N_DOCUMENTS] = {3, 4, 1, 16, 2, 12};

typedef struct corpus {
  int32_t token[N_TOKENS];
  uint8_t mark[N_TOKENS];
  int32_t begin[N_TOKENS]; /* first token of the token's document */
  wn_dataset *dataset;
} corpus;

static void corpus_open(void **state, corpus *c) {
  wn_dataset_writer *writer;
  wn_temp_path prefix = wn_temp(state, "text");
  OK(wn_dataset_writer_create(&writer, prefix.text, 100, true));
  for (int32_t d = 0, at = 0; d < N_DOCUMENTS; at += lengths[d++]) {
    for (int32_t i = 0; i < lengths[d]; i++) {
      c->token[at + i] = 1 + (37 * (at + i)) % 97;
      c->mark[at + i] = (uint8_t)((at + i) % 3 == 1);
      c->begin[at + i] = at;
    }
    OK(wn_dataset_writer_add(writer, c->token + at, c->mark + at, lengths[d]));
  }
  OK(wn_dataset_writer_close(writer, true));
  OK(wn_dataset_open(&c->dataset, prefix.text));
}

static int32_t int_at(const wn_tensor *t, int32_t i) {
  return ((const int32_t *)t->data)[i];
}

static void expect(const char *what, int32_t row, int64_t got, int64_t want) {
  if (got != want) fail_msg("row %d: %s is %lld instead of %lld", row, what, (long long)got, (long long)want);
}

/* Row i of sequence s reads token `window * T + i`. */
static void check(const corpus *c, const wn_batch *batch, const int64_t *windows, bool masked) {
  int64_t predicted = 0, scored = 0, kl_rows = 0, pairs = 0, selected = 0;
  for (int32_t row = 0; row < N; row++) {
    int32_t base = row / T * T, i = row - base, first = (int32_t)windows[row / T] * T, at = first + i;
    int32_t begin = masked && c->begin[at] > first ? c->begin[at] - first : 0; /* row within the window */
    bool ends = c->begin[at + 1] != c->begin[at], predicts = !masked || !ends;
    expect("token", row, int_at(&batch->tokens, row), c->token[at]);
    expect("target", row, int_at(&batch->target, row), predicts ? c->token[at + 1] : -1);
    expect("first key", row, batch->rows.first_key[row], base + begin);
    expect("last key", row, batch->rows.last_key[row], row);
    expect("position", row, batch->rows.position[row], i); /* positions do not begin again with a document */
    expect("weight", row, (int64_t)wn_test_get(&batch->weight, row), predicts);
    expect("mark", row, batch->scored[row], !ends && c->mark[at + 1]);
    predicted += predicts;
    scored += !ends && c->mark[at + 1];
    kl_rows += i > begin;
    pairs += i - begin + 1;
    selected += i - begin + 1 < PICKS ? i - begin + 1 : PICKS;
  }
  assert_int_equal(batch->rows.n_rows, N);
  assert_int_equal(batch->rows.n_keys, N);
  assert_int_equal(batch->predicted, predicted);
  assert_int_equal(batch->scored_count, scored);
  assert_int_equal(batch->kl_rows, kl_rows);
  assert_int_equal(batch->pairs, pairs);
  assert_int_equal(batch->selected, selected);
}

static void windows_become_rows(void **state) {
  corpus c;
  wn_device *device;
  OK(wn_cpu_create_f32(&device, (wn_cpu_settings){.threads = 1}));
  corpus_open(state, &c);
  assert_int_equal(wn_dataset_windows(c.dataset, T), 5);
  for (int64_t w = 0; w < 25; w++)
    for (int masked = 0; masked < 2; masked++) {
      int64_t windows[N_SEQS] = {w / 5, w % 5};
      wn_batch batch;
      size_t mark = wn_arena_mark(device->stash);
      OK(wn_batch_load(&batch, device, c.dataset, (wn_batch_settings){T, masked, PICKS}, windows, N_SEQS));
      check(&c, &batch, windows, masked);
      wn_arena_release(device->stash, mark);
    }
  wn_dataset_close(c.dataset);
  wn_cpu_free_f32(device);
}

static void tokens_given_by_hand(void **state) {
  static const int32_t tokens[9] = {5, 6, 7, 8, 9, 10, 11, 12, 13}, starts[3] = {0, 1, 6};
  static const int32_t first_key[9] = {0, 1, 1, 1, 1, 1, 6, 6, 6};
  (void)state;
  wn_device *device;
  wn_batch batch;
  OK(wn_cpu_create_f32(&device, (wn_cpu_settings){.threads = 1}));
  OK(wn_batch_from_tokens(&batch, device, tokens, 9, starts, 3));
  for (int32_t i = 0; i < 9; i++) {
    expect("token", i, int_at(&batch.tokens, i), tokens[i]);
    expect("target", i, int_at(&batch.target, i), i < 8 ? tokens[i + 1] : -1);
    expect("first key", i, batch.rows.first_key[i], first_key[i]);
    expect("last key", i, batch.rows.last_key[i], i);
    expect("position", i, batch.rows.position[i], i);
  }
  assert_int_equal(batch.predicted, 8);
  assert_int_equal(batch.kl_rows, 6);
  assert_int_equal(batch.pairs, 1 + 15 + 6);
  wn_cpu_free_f32(device);
}

int main(void) {
  const struct CMUnitTest tests[] = {TEMP_TEST(windows_become_rows), cmocka_unit_test(tokens_given_by_hand)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
