/* Fixtures: tests/fixtures/tokenizer, made with Hugging Face's tokenizers (tests/oracle/make_tokenizer_fixture.py). */
#include "data/tokenizer.h"

#include "data/tokenizer_parts.h"
#include "support/temp.h"

#define FIXTURES "tests/fixtures/tokenizer/"

typedef struct id_list {
  int32_t *ids;
  size_t n, room;
} id_list;

static id_list encode(wn_tokenizer *t, const char *text, size_t bytes) {
  id_list list = {0};
  OK(wn_tokenizer_encode(t, text, bytes, &list.ids, &list.n, &list.room));
  return list;
}

/* Joins the ids' bytes and compares with the text. */
static void assert_decodes(const wn_tokenizer *t, const id_list *list, const char *text, size_t bytes) {
  size_t at = 0, n;
  for (size_t i = 0; i < list->n; i++) {
    const char *piece = wn_tokenizer_bytes_of(t, list->ids[i], &n);
    assert_true(at + n <= bytes && memcmp(piece, text + at, n) == 0);
    at += n;
  }
  assert_int_equal(at, bytes);
}

static void bytes_are_their_own_ids(void **state) {
  (void)state;
  wn_tokenizer *t;
  size_t n;
  OK(wn_tokenizer_bytes(&t));
  assert_int_equal(wn_tokenizer_vocab_size(t), 257);
  assert_int_equal(wn_tokenizer_end_of_document(t), 256);
  id_list list = encode(t, "a\0\xFF", 3);
  assert_int_equal(list.n, 3);
  assert_int_equal(list.ids[0], 'a');
  assert_int_equal(list.ids[1], 0);
  assert_int_equal(list.ids[2], 255);
  assert_decodes(t, &list, "a\0\xFF", 3);
  wn_tokenizer_bytes_of(t, 256, &n);
  assert_int_equal(n, 0);
  free(list.ids);
  wn_tokenizer_free(t);
}

static void the_alphabet_is_gpt2s(void **state) {
  (void)state;
  static const struct {
    int byte;
    const char *symbol;
  } known[] = {{' ', "Ġ"},  {'\n', "Ċ"}, {'\t', "ĉ"}, {0, "Ā"},    {'a', "a"},
               {0x7F, "ġ"}, {0xA0, "ł"}, {0xA1, "¡"}, {0xAD, "Ń"}, {0xFF, "ÿ"}};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
    char symbol[2];
    size_t n = wn_byte_symbol((uint8_t)known[i].byte, symbol);
    assert_int_equal(n, strlen(known[i].symbol));
    assert_memory_equal(symbol, known[i].symbol, n);
  }
  for (int byte = 0; byte < 256; byte++) {
    char symbol[2];
    size_t n = wn_byte_symbol((uint8_t)byte, symbol), read;
    assert_int_equal(wn_byte_of_symbol(symbol, n, &read), byte);
    assert_int_equal(read, n);
  }
  static const char *const none[] = {" ", "\n", "\x7F", "\xC2\xA0", "\xC2\xAD", "\xC5\x84", "\xE2\x82\xAC", "\xC4"};
  for (size_t i = 0; i < 8; i++) {
    size_t read;
    assert_int_equal(wn_byte_of_symbol(none[i], strlen(none[i]), &read), -1);
  }
}

/* text.txt in the tokenizer `name`.json is `name`.ids. */
static void assert_fixture(const char *name, int32_t end_of_document) {
  char path[256], *text, *expected, *at;
  size_t bytes, n_expected;
  wn_tokenizer *t;
  snprintf(path, sizeof path, FIXTURES "%s.json", name);
  OK(wn_tokenizer_load(&t, path));
  assert_int_equal(wn_tokenizer_vocab_size(t), 400);
  assert_int_equal(wn_tokenizer_end_of_document(t), end_of_document);
  OK(wn_read_file(&text, &bytes, FIXTURES "text.txt", 1 << 20));
  snprintf(path, sizeof path, FIXTURES "%s.ids", name);
  OK(wn_read_file(&expected, &n_expected, path, 1 << 20));
  for (int repeat = 0; repeat < 2; repeat++) { /* the second time from the cache */
    id_list list = encode(t, text, bytes);
    at = expected;
    for (size_t i = 0; i < list.n; i++) assert_int_equal(list.ids[i], strtol(at, &at, 10));
    assert_string_equal(at, "\n");
    assert_decodes(t, &list, text, bytes);
    free(list.ids);
  }
  free(text);
  free(expected);
  wn_tokenizer_free(t);
}

static void encodes_as_hugging_face_does(void **state) {
  (void)state;
  assert_fixture("hf", 0);
  assert_fixture("ours", 399);
}

/* Words in brackets. A run of bytes that are no UTF-8 is one word, and divides what stands beside it. */
static void words_are_gpt2s(void **state) {
  (void)state;
  static const struct {
    const char *text, *words;
  } cases[] = {{"", ""},
               {"it's 12ab  x", "[it]['s][ 12][ab][ ][ x]"},
               {"I'LL we'll d'", "[I]['][LL][ we]['ll][ d][']"},
               {"a \n\n b  ", "[a][ \n\n][ b][  ]"},
               {"x\xC2\xA0\xC2\xA0y", "[x][\xC2\xA0][\xC2\xA0][y]"},
               {"a\xE1\xA0\x8E!", "[a][\xE1\xA0\x8E!]"}, /* U+180E is white space no more */
               {"!\xED\xA0\x80!", "[!][\xED\xA0\x80][!]"},
               {"!\xED\x9F\xBF!", "[!\xED\x9F\xBF!]"},
               {"!\xC0\x80!\xE0\x9F\xBF!\xF0\x8F\xBF\xBF!\xF4\x90\x80\x80!",
                "[!][\xC0\x80][!][\xE0\x9F\xBF][!][\xF0\x8F\xBF\xBF][!][\xF4\x90\x80\x80][!]"},
               {"!\xE0\xA0\x80!\xF0\x90\x80\x80!\xF4\x8F\xBF\xBF!",
                "[!][\xE0\xA0\x80][!][\xF0\x90\x80\x80][!\xF4\x8F\xBF\xBF!]"},
               {"a\xFF\x80\xFE\xC3", "[a][\xFF\x80\xFE\xC3]"}};
  wn_split *split;
  OK(wn_split_create(&split));
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    wn_split_cursor cursor = {.text = cases[i].text, .bytes = strlen(cases[i].text)};
    char shown[256] = "";
    const char *word;
    size_t n;
    for (;;) {
      OK(wn_split_next(split, &cursor, &word, &n));
      if (n == 0) break;
      size_t at = strlen(shown);
      snprintf(shown + at, sizeof shown - at, "[%.*s]", (int)n, word);
    }
    assert_string_equal(shown, cases[i].words);
  }
  wn_split_free(split);
}

/* Bytes that are no UTF-8 at every place, long words, and more words than the cache holds. */
static void any_bytes_come_back(void **state) {
  (void)state;
  enum { BYTES = 3 << 20 };
  wn_tokenizer *t;
  char *text = malloc(BYTES);
  assert_non_null(text);
  OK(wn_tokenizer_load(&t, FIXTURES "ours.json"));
  static const char *const odd[] = {"",
                                    "\xFF",
                                    "a\x80z",
                                    "\xC3",
                                    "\xE2\x82",
                                    "\xED\xA0\x80",
                                    "\xC0\x80",
                                    "\xE0\x80\x80",
                                    "\xF0\x80\x80\x80",
                                    "\xF4\x90\x80\x80",
                                    "\xF8\x88\x80\x80\x80",
                                    "ab\xE2\x82 c",
                                    "é\xFFé",
                                    "\xF0\x9F\x98"};
  for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
    id_list list = encode(t, odd[i], strlen(odd[i]));
    assert_decodes(t, &list, odd[i], strlen(odd[i]));
    free(list.ids);
  }
  for (int kind = 0; kind < 4; kind++) {
    for (size_t i = 0; i < BYTES; i++) {
      uint64_t r = wn_rng_u64(7, WN_RNG_TEST, i);
      text[i] = kind == 0 ? (char)r : kind == 1 ? "abcdefghijklmnopqrstuvwxyz     \n"[r % 32] : kind == 2 ? ' ' : 'e';
    }
    size_t bytes = kind < 2 ? BYTES : BYTES / 3;
    id_list list = encode(t, text, bytes);
    assert_decodes(t, &list, text, bytes);
    free(list.ids);
  }
  free(text);
  wn_tokenizer_free(t);
}

/* Encoding appends, and a special token's name in text is text. */
static void encoding_appends(void **state) {
  (void)state;
  wn_tokenizer *t;
  OK(wn_tokenizer_load(&t, FIXTURES "ours.json"));
  id_list whole = encode(t, "one two", 7), list = encode(t, "one", 3);
  OK(wn_tokenizer_encode(t, " two", 4, &list.ids, &list.n, &list.room));
  assert_int_equal(list.n, whole.n);
  assert_memory_equal(list.ids, whole.ids, list.n * sizeof *list.ids);
  free(whole.ids);
  list.n = 0;
  OK(wn_tokenizer_encode(t, WN_END_OF_DOCUMENT, strlen(WN_END_OF_DOCUMENT), &list.ids, &list.n, &list.room));
  for (size_t i = 0; i < list.n; i++) assert_int_not_equal(list.ids[i], wn_tokenizer_end_of_document(t));
  assert_decodes(t, &list, WN_END_OF_DOCUMENT, strlen(WN_END_OF_DOCUMENT));
  free(list.ids);
  wn_tokenizer_free(t);
}

/* ---- training */

static void training_is_reproducible(void **state) {
  wn_temp_path out = wn_temp(state, "t.json");
  static const char *const files[] = {FIXTURES "train.txt"};
  char *made, *expected;
  size_t n, n_expected;
  OK(wn_tokenizer_train(files, 1, 400, out.text, NULL));
  OK(wn_read_file(&made, &n, out.text, 1 << 20));
  OK(wn_read_file(&expected, &n_expected, FIXTURES "ours.json", 1 << 20));
  assert_int_equal(n, n_expected);
  assert_memory_equal(made, expected, n);
  free(made);
  free(expected);
}

/* Byte-pair training as its definition reads: all pairs of all words counted anew for every merge. */
enum { PLAIN_WORDS = 4096, PLAIN_IDS = 400 };
static void train_plainly(int32_t (*chosen)[2], int32_t n, int32_t (*words)[16], int32_t *length, int32_t n_words) {
  static int32_t count[PLAIN_IDS][PLAIN_IDS];
  for (int32_t m = 0; m < n; m++) {
    memset(count, 0, sizeof count);
    for (int32_t w = 0; w < n_words; w++)
      for (int32_t i = 0; i + 1 < length[w]; i++) count[words[w][i]][words[w][i + 1]]++;
    int32_t best = 0;
    for (int32_t a = 0; a < PLAIN_IDS; a++)
      for (int32_t b = 0; b < PLAIN_IDS; b++)
        if (count[a][b] > best) best = count[chosen[m][0] = a][chosen[m][1] = b];
    for (int32_t w = 0; w < n_words; w++) {
      int32_t kept = 0;
      for (int32_t i = 0; i < length[w]; i++) {
        bool here = i + 1 < length[w] && words[w][i] == chosen[m][0] && words[w][i + 1] == chosen[m][1];
        words[w][kept++] = here ? 256 + m : words[w][i];
        i += here;
      }
      length[w] = kept;
    }
  }
}

/* Words of two letters' random strings: overlapping pairs (aaa), ties and deep merges abound. */
static void training_follows_its_definition(void **state) {
  enum { MERGES = 100 };
  static int32_t words[PLAIN_WORDS][16], length[PLAIN_WORDS];
  int32_t chosen[MERGES][2] = {{0}};
  wn_temp_path text = wn_temp(state, "text"), out = wn_temp(state, "t.json");
  FILE *file = fopen(text.text, "wb");
  assert_non_null(file);
  for (int32_t w = 0; w < PLAIN_WORDS; w++) {
    char line[17] = " ";
    length[w] = 2 + (int32_t)wn_rng_below(1, WN_RNG_TEST, (uint64_t)w, 14);
    for (int32_t i = 1; i < length[w]; i++) line[i] = "aaab"[wn_rng_below(2, WN_RNG_TEST, (uint64_t)(w * 16 + i), 4)];
    for (int32_t i = 0; i < length[w]; i++) words[w][i] = line[i];
    fwrite(line, 1, (size_t)length[w], file);
  }
  assert_int_equal(fclose(file), 0);
  train_plainly(chosen, MERGES, words, length, PLAIN_WORDS);
  const char *files[1] = {text.text};
  OK(wn_tokenizer_train(files, 1, 257 + MERGES, out.text, NULL));
  wn_tokenizer *t;
  OK(wn_tokenizer_load(&t, out.text));
  for (int32_t m = 0; m < MERGES; m++) {
    const wn_merge *merge = wn_merges_find(&t->merges, chosen[m][0], chosen[m][1]);
    assert_non_null(merge);
    assert_int_equal(merge->rank, m);
    assert_int_equal(merge->id, 256 + m);
  }
  wn_tokenizer_free(t);
}

static void refuses_to_train(void **state) {
  wn_temp_path text = wn_temp(state, "text"), out = wn_temp(state, "t.json"), absent = wn_temp(state, "absent");
  const char *files[2] = {text.text, absent.text};
  wn_temp_write(text.text, "abab abab", 9);
  REFUSED(wn_tokenizer_train(files, 1, 256, out.text, NULL), WN_E_USAGE, "256");
  REFUSED(wn_tokenizer_train(files, 2, 300, out.text, NULL), WN_E_IO, absent.text);
  REFUSED(wn_tokenizer_train(files, 1, 300, out.text, NULL), WN_E_INPUT,
          "a vocabulary of 259 and no more"); /* ab, abab */
  assert_false(wn_path_exists(out.text));
  OK(wn_tokenizer_train(files, 1, 259, out.text, NULL));
  OK(wn_tokenizer_train(files, 1, 257, out.text, NULL)); /* bytes alone */
}

/* ---- files that are not what they should be */

/* ours.json with `from` replaced by `to` (once), loaded. */
static wn_status load_changed(void **state, const char *from, const char *to) {
  char *text;
  size_t n;
  OK(wn_read_file(&text, &n, FIXTURES "ours.json", 1 << 20));
  char *at = strstr(text, from);
  assert_non_null(at);
  wn_temp_path path = wn_temp(state, "changed.json");
  FILE *file = fopen(path.text, "wb");
  assert_non_null(file);
  fprintf(file, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
  assert_int_equal(fclose(file), 0);
  free(text);
  wn_tokenizer *t = NULL;
  wn_status status = wn_tokenizer_load(&t, path.text);
  if (!status) wn_tokenizer_free(t);
  return status;
}

static void refuses_what_it_would_encode_otherwise(void **state) {
#define CHANGED(from, to, part) REFUSED(load_changed(state, from, to), WN_E_INPUT, part)
  OK(load_changed(state, "\"version\": \"1.0\"", "\"version\": \"1.0\""));
  CHANGED("{", "[", "changed.json:2: bad JSON");
  CHANGED("\"normalizer\": null", "\"normalizer\": {\"type\": \"NFC\"}", "normalizer");
  CHANGED("\"truncation\": null", "\"truncation\": {}", "truncation");
  CHANGED("\"use_regex\": true", "\"use_regex\": false", "pre_tokenizer");
  CHANGED("\"add_prefix_space\": false", "\"add_prefix_space\": true", "pre_tokenizer");
  CHANGED("\"type\": \"ByteLevel\"", "\"type\": \"Whitespace\"", "pre_tokenizer");
  CHANGED("\"post_processor\": null", "\"post_processor\": {\"type\": \"TemplateProcessing\"}", "post_processor");
  CHANGED("\"type\": \"BPE\"", "\"type\": \"Unigram\"", "model.type");
  CHANGED("\"dropout\": null", "\"dropout\": 0.1", "dropout");
  CHANGED("\"byte_fallback\": false", "\"byte_fallback\": true", "byte_fallback");
  CHANGED("\"ignore_merges\": false", "\"ignore_merges\": true", "ignore_merges");
  CHANGED("\"end_of_word_suffix\": null", "\"end_of_word_suffix\": \"</w>\"", "end_of_word_suffix");
  CHANGED("\"special\": true", "\"special\": false", "not special");
  CHANGED("\"content\": \"<|endoftext|>\"", "\"content\": \"<|end|>\"", "another's");
  CHANGED("\"id\": 399", "\"id\": 398", "another's");
  CHANGED("\"id\": 399", "\"id\": 4000", "too large");
  CHANGED("\"id\": 399", "\"id\": -1", "no id");
  CHANGED("\"a\": 97", "\"a\": 98", "same id");
  CHANGED("\"a\": 97", "\"a\": 4000", "id 4000");
  CHANGED("\"a\": 97", "\"a\": \"x\"", "no id");
  CHANGED("\"a\": 97,", "", "no token has id 97");
  CHANGED("\"a\": 97", "\"€\": 97", "alphabet");
  CHANGED("\"a\": 97", "\"aa\": 97", "byte 97 has no token");
  CHANGED("\"b\": 98", "\"a\": 98", "bad JSON: duplicate"); /* a duplicate key */
  CHANGED("\"merges\": [", "\"merges\": [\"a a a\",", "merge 0 is not two tokens");
  CHANGED("\"merges\": [", "\"merges\": [\"a\",", "merge 0 is not two tokens");
  CHANGED("\"merges\": [", "\"merges\": [7,", "merge 0 is not two tokens");
  CHANGED("\"merges\": [", "\"merges\": [[\"a\"],", "merge 0 is not two tokens");
  CHANGED("\"merges\": [", "\"merges\": [\"a zzz\",", "\"zzz\", which is not in the vocabulary");
  CHANGED("\"merges\": [", "\"merges\": [\"ÿ ÿ\",", "\"ÿÿ\", which is not in the vocabulary");
  CHANGED("\"merges\": [", "\"merges\": [\"i n\",", "merged twice");
  CHANGED("\"merges\": [", "\"merges\": {}, \"x\": [", "model.merges");
#undef CHANGED
  wn_tokenizer *t;
  REFUSED(wn_tokenizer_load(&t, "/nowhere/at/all.json"), WN_E_IO, "/nowhere/at/all.json");
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(bytes_are_their_own_ids),
                                     cmocka_unit_test(the_alphabet_is_gpt2s),
                                     cmocka_unit_test(encodes_as_hugging_face_does),
                                     cmocka_unit_test(words_are_gpt2s),
                                     cmocka_unit_test(any_bytes_come_back),
                                     cmocka_unit_test(encoding_appends),
                                     TEMP_TEST(training_is_reproducible),
                                     TEMP_TEST(training_follows_its_definition),
                                     TEMP_TEST(refuses_to_train),
                                     TEMP_TEST(refuses_what_it_would_encode_otherwise)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
