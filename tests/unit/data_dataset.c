#include "data/dataset.h"

#include "support/temp.h"

enum { SEQ = 3 };

/* ---- .idx and .bin made by hand, from the description in dataset.h alone */

typedef struct hand {
  uint64_t version, sequences, boundaries;
  uint8_t code;
  int32_t length[8];
  int64_t offset[8], document[8];
  size_t n_length, n_offset, n_document; /* how many are written, whatever the counts say */
} hand;

/* 3 documents of 2, 0 and 3 tokens in 4 sequences (2 | | 1 2), u16 */
static const hand good = {.version = 1,
                          .sequences = 4,
                          .boundaries = 4,
                          .code = 8,
                          .length = {2, 0, 1, 2},
                          .offset = {0, 4, 4, 6},
                          .document = {0, 1, 2, 4},
                          .n_length = 4,
                          .n_offset = 4,
                          .n_document = 4};

static size_t put(unsigned char *to, size_t at, const void *data, size_t bytes) {
  memcpy(to + at, data, bytes);
  return at + bytes;
}

static size_t hand_bytes(unsigned char to[512], const hand *h) {
  size_t n = put(to, 0, "MMIDIDX\0", 9);
  n = put(to, n, &h->version, 8);
  n = put(to, n, &h->code, 1);
  n = put(to, n, &h->sequences, 8);
  n = put(to, n, &h->boundaries, 8);
  n = put(to, n, h->length, 4 * h->n_length);
  n = put(to, n, h->offset, 8 * h->n_offset);
  return put(to, n, h->document, 8 * h->n_document);
}

static const uint16_t hand_tokens[5] = {10, 11, 20, 21, 65535};

/* Writes PREFIX "x" with the first `bin_bytes` of the tokens and opens it. */
static wn_status open_hand(void **state, wn_dataset **out, const hand *h, size_t bin_bytes) {
  unsigned char idx[512];
  size_t n = hand_bytes(idx, h);
  wn_temp_write(wn_temp(state, "x.idx").text, idx, n);
  wn_temp_write(wn_temp(state, "x.bin").text, hand_tokens, bin_bytes);
  return wn_dataset_open(out, wn_temp(state, "x").text);
}

static void reads_several_sequences_a_document(void **state) {
  wn_dataset *d;
  OK(open_hand(state, &d, &good, 10));
  assert_string_equal(wn_dataset_dtype(d), "uint16");
  assert_int_equal(wn_dataset_documents(d), 3);
  assert_int_equal(wn_dataset_tokens(d), 5);
  assert_false(wn_dataset_has_scored(d));
  const int64_t start[4] = {0, 2, 2, 5};
  for (int64_t i = 0; i < 4; i++) assert_int_equal(wn_dataset_document_start(d, i), start[i]);
  const int64_t of[5] = {0, 0, 2, 2, 2}; /* document 1 is empty: no token is its */
  for (int64_t t = 0; t < 5; t++) assert_int_equal(wn_dataset_document_of(d, t), of[t]);
  int32_t tokens[5];
  uint8_t scored[5];
  wn_dataset_copy(d, 0, 5, tokens, scored);
  for (int i = 0; i < 5; i++) assert_int_equal(tokens[i], hand_tokens[i]);
  for (int i = 0; i < 5; i++) assert_int_equal(scored[i], 0);
  OK(wn_dataset_check_vocab(d, 65536));
  REFUSED(wn_dataset_check_vocab(d, 65535), WN_E_INPUT, "token 2 of document 2 has id 65535, the vocabulary has 65535");
  wn_dataset_close(d);
}

static void reads_every_integer_dtype(void **state) {
  static const struct {
    uint8_t code;
    size_t bytes;
    const char *name;
  } dtypes[] = {{1, 1, "uint8"}, {2, 1, "int8"}, {3, 2, "int16"}, {4, 4, "int32"}, {5, 8, "int64"}, {8, 2, "uint16"}};
  static const int64_t ids[3] = {0, 1, 127};
  for (size_t k = 0; k < 6; k++) {
    hand h = {.version = 1,
              .sequences = 1,
              .boundaries = 2,
              .code = dtypes[k].code,
              .length = {3},
              .document = {0, 1},
              .n_length = 1,
              .n_offset = 1,
              .n_document = 2};
    unsigned char idx[512], bin[24];
    size_t n = hand_bytes(idx, &h), at = 0;
    for (int i = 0; i < 3; i++) at = put(bin, at, &ids[i], dtypes[k].bytes);
    wn_temp_write(wn_temp(state, "x.idx").text, idx, n);
    wn_temp_write(wn_temp(state, "x.bin").text, bin, at);
    wn_dataset *d;
    int32_t tokens[3];
    OK(wn_dataset_open(&d, wn_temp(state, "x").text));
    assert_string_equal(wn_dataset_dtype(d), dtypes[k].name);
    wn_dataset_copy(d, 0, 3, tokens, NULL);
    for (int i = 0; i < 3; i++) assert_int_equal(tokens[i], ids[i]);
    wn_dataset_close(d);
  }
}

static void names_ids_that_are_none(void **state) {
  hand h = {.version = 1,
            .sequences = 1,
            .boundaries = 2,
            .code = 5,
            .length = {2},
            .document = {0, 1},
            .n_length = 1,
            .n_offset = 1,
            .n_document = 2};
  unsigned char idx[512];
  int64_t wide[2] = {7, 1ll << 32};
  wn_dataset *d;
  int32_t tokens[2];
  wn_temp_write(wn_temp(state, "x.idx").text, idx, hand_bytes(idx, &h));
  wn_temp_write(wn_temp(state, "x.bin").text, wide, 16);
  OK(wn_dataset_open(&d, wn_temp(state, "x").text));
  REFUSED(wn_dataset_check_vocab(d, INT32_MAX), WN_E_INPUT, "token 1 of document 0 has id 4294967296");
  wn_dataset_copy(d, 0, 2, tokens, NULL);
  assert_int_equal(tokens[1], -1);
  wn_dataset_close(d);
  h.code = 2;
  const int8_t negative[2] = {3, -4};
  wn_temp_write(wn_temp(state, "x.idx").text, idx, hand_bytes(idx, &h));
  wn_temp_write(wn_temp(state, "x.bin").text, negative, 2);
  OK(wn_dataset_open(&d, wn_temp(state, "x").text));
  REFUSED(wn_dataset_check_vocab(d, INT32_MAX), WN_E_INPUT, "token 1 of document 0 has id -4");
  wn_dataset_close(d);
}

/* ---- an index that lies */

static void refuses_lies(void **state) {
  wn_dataset *d;
  hand h = good;
#define LIE(change, part) h = good, change, REFUSED(open_hand(state, &d, &h, 10), WN_E_INPUT, part)
  LIE(h.version = 2, "version 2");
  LIE(h.code = 7, "floating point");
  LIE(h.code = 6, "floating point");
  LIE(h.code = 0, "dtype code 0");
  LIE(h.code = 9, "dtype code 9");
  LIE(h.sequences = 5, "truncated");
  LIE(h.sequences = UINT64_MAX, "truncated");
  LIE(h.sequences = UINT64_MAX / 12 + 1, "truncated"); /* times 12 it would wrap to 8 */
  LIE(h.boundaries = 5, "truncated");
  LIE(h.boundaries = 1ull << 61, "truncated"); /* times 8 it would wrap to 0 */
  LIE(h.boundaries = 3, "8 bytes after its document index");
  LIE(h.boundaries = 0, "after its document index");
  LIE(h.n_document = 3, "truncated");
  LIE(h.length[2] = -1, "sequence 2 has length -1");
  LIE(h.length[3] = 3, "sequence 3 (3 tokens from byte 6) ends beyond the 10 bytes");
  LIE(h.length[3] = INT32_MAX, "ends beyond");
  LIE(h.length[3] = 1, "has 10 bytes, its index describes 8");
  LIE(h.offset[0] = 2, "sequence 0 begins at byte 2");
  LIE(h.offset[2] = 5, "sequence 2 begins at byte 5, the ones before it end at 4");
  LIE(h.offset[3] = -6, "sequence 3 begins at byte -6");
  LIE(h.offset[3] = INT64_MAX, "sequence 3 begins at byte 9223372036854775807");
  LIE(h.document[0] = 1, "entry 0 of the document index is 1");
  LIE((h.document[1] = 3, h.document[2] = 2), "entry 2 of the document index is 2");
  LIE(h.document[1] = -1, "entry 1 of the document index is -1");
  LIE(h.document[3] = 3, "entry 3 of the document index is 3");
  LIE(h.document[2] = 5, "entry 2 of the document index is 5");
#undef LIE
  REFUSED(open_hand(state, &d, &good, 9), WN_E_INPUT, "ends beyond");
  REFUSED(open_hand(state, &d, &good, 0), WN_E_INPUT, "ends beyond");
  hand empty = {.version = 1,
                .sequences = 1,
                .boundaries = 2,
                .code = 8,
                .document = {0, 1},
                .n_length = 1,
                .n_offset = 1,
                .n_document = 2};
  REFUSED(open_hand(state, &d, &empty, 0), WN_E_INPUT, "no tokens");
  REFUSED(open_hand(state, &d, &(hand){.version = 1, .boundaries = 1, .code = 8, .n_document = 1}, 0), WN_E_INPUT,
          "no documents");
}

static void refuses_every_truncation(void **state) {
  unsigned char idx[512];
  size_t n = hand_bytes(idx, &good);
  wn_dataset *d;
  wn_temp_path path = wn_temp(state, "x.idx"), prefix = wn_temp(state, "x");
  wn_temp_write(wn_temp(state, "x.bin").text, hand_tokens, 10);
  for (size_t kept = 0; kept < n; kept++) {
    wn_temp_write(path.text, idx, kept);
    REFUSED(wn_dataset_open(&d, prefix.text), WN_E_INPUT, "x.idx");
  }
  idx[3] = 'x';
  wn_temp_write(path.text, idx, n);
  REFUSED(wn_dataset_open(&d, prefix.text), WN_E_INPUT, "MMIDIDX");
  idx[3] = 'I', idx[8] = 1; /* the ninth byte of the magic */
  wn_temp_write(path.text, idx, n);
  REFUSED(wn_dataset_open(&d, prefix.text), WN_E_INPUT, "MMIDIDX");
  unlink(path.text);
  REFUSED(wn_dataset_open(&d, prefix.text), WN_E_IO, "x.idx");
  REFUSED(wn_dataset_open(&d, "/nowhere/at/all"), WN_E_IO, "/nowhere/at/all.idx");
}

static void refuses_marks_that_do_not_fit(void **state) {
  wn_dataset *d;
  unsigned char marks[32] = "WNSCORE1";
  uint64_t n = 5;
  wn_temp_path path = wn_temp(state, "x.scored");
  memcpy(marks + 8, &n, 8);
  marks[16 + 3] = 1;
  wn_temp_write(path.text, marks, 21);
  OK(open_hand(state, &d, &good, 10));
  assert_true(wn_dataset_has_scored(d));
  int32_t tokens[5];
  uint8_t scored[5];
  wn_dataset_copy(d, 0, 5, tokens, scored);
  for (int i = 0; i < 5; i++) assert_int_equal(scored[i], i == 3);
  OK(wn_dataset_check_vocab(d, 65536));
  wn_dataset_close(d);
  marks[17] = 2;
  wn_temp_write(path.text, marks, 21);
  OK(open_hand(state, &d, &good, 10));
  REFUSED(wn_dataset_check_vocab(d, 65536), WN_E_INPUT, "the mark of token 1 is 2");
  wn_dataset_close(d);
  wn_temp_write(path.text, marks, 20);
  REFUSED(open_hand(state, &d, &good, 10), WN_E_INPUT, "x.scored");
  wn_temp_write(path.text, marks, 7);
  REFUSED(open_hand(state, &d, &good, 10), WN_E_INPUT, "WNSCORE1");
  n = 6;
  memcpy(marks + 8, &n, 8);
  wn_temp_write(path.text, marks, 21);
  REFUSED(open_hand(state, &d, &good, 10), WN_E_INPUT, "marks 6 tokens");
}

/* ---- windows */

static void windows_know_their_documents(void **state) {
  /* documents: [1 2 3] [4] [5 6 7 8] [9 10]; marks on 2, 4 (begins a document), 7, 9 (too) and 10 */
  static const int32_t documents[4][4] = {{1, 2, 3}, {4}, {5, 6, 7, 8}, {9, 10}};
  static const uint8_t marks[4][4] = {{0, 1, 0}, {1}, {0, 0, 1, 0}, {1, 1}};
  static const int64_t length[4] = {3, 1, 4, 2};
  wn_temp_path prefix = wn_temp(state, "w");
  wn_dataset_writer *w;
  wn_dataset *d;
  OK(wn_dataset_writer_create(&w, prefix.text, 11, true));
  for (int i = 0; i < 4; i++) OK(wn_dataset_writer_add(w, documents[i], marks[i], length[i]));
  OK(wn_dataset_writer_close(w, true));
  OK(wn_dataset_open(&d, prefix.text));
  assert_int_equal(wn_dataset_windows(d, SEQ), 3); /* 10 tokens: targets 1..9 */
  assert_int_equal(wn_dataset_windows(d, 9), 1);
  assert_int_equal(wn_dataset_windows(d, 10), 0);
  static const struct {
    int32_t tokens[SEQ + 1], start[SEQ];
    uint8_t predicted[SEQ], scored[SEQ];
  } expected[3] = {{{1, 2, 3, 4}, {0, 0, 0}, {1, 1, 0}, {1, 0, 0}},
                   {{4, 5, 6, 7}, {0, 1, 1}, {0, 1, 1}, {0, 0, 1}},
                   {{7, 8, 9, 10}, {0, 0, 2}, {1, 0, 1}, {0, 0, 1}}};
  int32_t tokens[SEQ + 1], start[SEQ];
  uint8_t predicted[SEQ], scored[SEQ];
  wn_window window = {tokens, start, predicted, scored};
  for (int64_t i = 2; i >= 0; i--) {
    wn_dataset_read(d, i, SEQ, &window);
    assert_memory_equal(tokens, expected[i].tokens, sizeof tokens);
    assert_memory_equal(start, expected[i].start, sizeof start);
    assert_memory_equal(predicted, expected[i].predicted, sizeof predicted);
    assert_memory_equal(scored, expected[i].scored, sizeof scored);
  }
  wn_dataset_close(d);
}

/* Windows against a row-by-row definition, over random documents (empty ones among them) and odd lengths. */
static void windows_agree_with_their_definition(void **state) {
  enum { DOCUMENTS = 60, MOST = 7 };
  wn_temp_path prefix = wn_temp(state, "w");
  wn_dataset_writer *w;
  wn_dataset *d;
  int32_t token[DOCUMENTS * MOST], owner[DOCUMENTS * MOST], first_of[DOCUMENTS], n = 0;
  OK(wn_dataset_writer_create(&w, prefix.text, 100000, false));
  for (int32_t i = 0; i < DOCUMENTS; i++) {
    int64_t length = (int64_t)wn_rng_below(5, WN_RNG_TEST, (uint64_t)i, MOST);
    first_of[i] = n;
    for (int64_t k = 0; k < length; k++, n++) token[n] = 99999 - n, owner[n] = i;
    OK(wn_dataset_writer_add(w, token + first_of[i], NULL, length));
  }
  OK(wn_dataset_writer_close(w, true));
  OK(wn_dataset_open(&d, prefix.text));
  assert_string_equal(wn_dataset_dtype(d), "int32");
  assert_int_equal(wn_dataset_tokens(d), n);
  assert_int_equal(wn_dataset_documents(d), DOCUMENTS);
  static const int32_t seq_lens[] = {1, 2, 7, 16, 31};
  for (size_t s = 0; s < 5; s++) {
    int32_t length = seq_lens[s], tokens[32], start[31];
    uint8_t predicted[31], scored[31];
    wn_window window = {tokens, start, predicted, scored};
    for (int64_t i = 0; i < wn_dataset_windows(d, length); i++) {
      int32_t from = (int32_t)i * length;
      wn_dataset_read(d, i, length, &window);
      for (int32_t r = 0; r <= length; r++) assert_int_equal(tokens[r], token[from + r]);
      for (int32_t r = 0; r < length; r++) {
        int32_t begin = first_of[owner[from + r]];
        assert_int_equal(start[r], begin > from ? begin - from : 0);
        assert_int_equal(predicted[r], owner[from + r] == owner[from + r + 1]);
        assert_int_equal(scored[r], 0);
      }
    }
  }
  wn_dataset_close(d);
}

/* ---- writer */

static void writes_many_documents(void **state) {
  enum { DOCUMENTS = 40000 }; /* more than the writer reads back at a time */
  wn_temp_path prefix = wn_temp(state, "m");
  wn_dataset_writer *w;
  wn_dataset *d;
  OK(wn_dataset_writer_create(&w, prefix.text, 65536, false));
  for (int32_t i = 0; i < DOCUMENTS; i++) {
    int32_t tokens[3] = {i, i + 1, i + 2};
    OK(wn_dataset_writer_append(w, tokens, NULL, i % 3));
    OK(wn_dataset_writer_append(w, tokens + i % 3, NULL, 1));
    OK(wn_dataset_writer_end_document(w));
  }
  assert_false(wn_path_exists(wn_temp(state, "m.idx").text));
  OK(wn_dataset_writer_close(w, true));
  OK(wn_dataset_open(&d, prefix.text));
  assert_string_equal(wn_dataset_dtype(d), "uint16");
  assert_int_equal(wn_dataset_documents(d), DOCUMENTS);
  for (int64_t i = 0, at = 0; i < DOCUMENTS; i++) {
    assert_int_equal(wn_dataset_document_start(d, i), at);
    int32_t tokens[3];
    wn_dataset_copy(d, at, i % 3 + 1, tokens, NULL);
    for (int64_t k = 0; k <= i % 3; k++) assert_int_equal(tokens[k], i + k);
    at += i % 3 + 1;
  }
  wn_dataset_close(d);
}

static void a_failed_or_given_up_dataset_leaves_nothing(void **state) {
  char **names;
  size_t n;
  wn_dataset_writer *w;
  const int32_t tokens[2] = {5, 6};
  OK(wn_dataset_writer_create(&w, wn_temp(state, "a").text, 7, true));
  OK(wn_dataset_writer_add(w, tokens, NULL, 2));
  OK(wn_dataset_writer_close(w, false));
  OK(wn_dataset_writer_create(&w, wn_temp(state, "a").text, 6, true));
  REFUSED(wn_dataset_writer_add(w, tokens, NULL, 2), WN_E_INPUT,
          "token 1 of document 0 has id 6, the vocabulary has 6");
  OK(wn_dataset_writer_close(w, false));
  OK(wn_dataset_writer_create(&w, wn_temp(state, "a").text, 6, false));
  REFUSED(wn_dataset_writer_close(w, true), WN_E_INPUT, "no tokens");
  OK(wn_list_dir(&names, &n, *state));
  assert_int_equal(n, 0);
  wn_list_free(names, n);
  REFUSED(wn_dataset_writer_create(&w, wn_temp(state, "absent/a").text, 6, false), WN_E_IO, "absent/a.bin");
}

static void a_new_dataset_replaces_the_old_with_its_marks(void **state) {
  wn_temp_path prefix = wn_temp(state, "a");
  wn_dataset_writer *w;
  wn_dataset *d;
  const int32_t tokens[2] = {5, 6};
  for (int with_scored = 1; with_scored >= 0; with_scored--) {
    OK(wn_dataset_writer_create(&w, prefix.text, 7, with_scored));
    OK(wn_dataset_writer_add(w, tokens, NULL, 2 - (with_scored == 0)));
    OK(wn_dataset_writer_close(w, true));
    OK(wn_dataset_open(&d, prefix.text));
    assert_int_equal(wn_dataset_has_scored(d), with_scored);
    wn_dataset_close(d);
  }
}

static void a_blank_one_is_one_document(void **state) {
  (void)state;
  enum { T = 100 };
  wn_dataset *d;
  int32_t tokens[T + 1], start[T];
  uint8_t predicted[T], scored[T];
  wn_window window = {.tokens = tokens, .document_start = start, .predicted = predicted, .scored = scored};
  OK(wn_dataset_create_blank(&d, 3 * T + 1));
  OK(wn_dataset_check_vocab(d, 1));
  assert_int_equal(wn_dataset_documents(d), 1);
  assert_int_equal(wn_dataset_windows(d, T), 3);
  wn_dataset_read(d, 1, T, &window);
  for (int32_t i = 0; i < T; i++)
    assert_true(tokens[i + 1] == 0 && start[i] == 0 && predicted[i] == 1 && scored[i] == 0);
  wn_dataset_close(d);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(a_blank_one_is_one_document),
                                     TEMP_TEST(reads_several_sequences_a_document),
                                     TEMP_TEST(reads_every_integer_dtype),
                                     TEMP_TEST(names_ids_that_are_none),
                                     TEMP_TEST(refuses_lies),
                                     TEMP_TEST(refuses_every_truncation),
                                     TEMP_TEST(refuses_marks_that_do_not_fit),
                                     TEMP_TEST(windows_know_their_documents),
                                     TEMP_TEST(windows_agree_with_their_definition),
                                     TEMP_TEST(writes_many_documents),
                                     TEMP_TEST(a_failed_or_given_up_dataset_leaves_nothing),
                                     TEMP_TEST(a_new_dataset_replaces_the_old_with_its_marks)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
