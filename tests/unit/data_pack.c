#include "data/pack.h"

#include <math.h>

#include "data/text.h"
#include "support/temp.h"

enum { END = 256 }; /* the byte tokenizer's */

static wn_status pack_bytes(wn_pack_result *out, const wn_pack_settings *settings) {
  wn_tokenizer *tokenizer;
  OK(wn_tokenizer_bytes(&tokenizer));
  wn_status status = wn_pack(out, tokenizer, settings, NULL);
  wn_tokenizer_free(tokenizer);
  return status;
}

/* The dataset's tokens, all of them; END shows as '|', bytes as they are. */
static char *shown(const char *prefix, int64_t *n) {
  wn_dataset *d;
  OK(wn_dataset_open(&d, prefix));
  *n = wn_dataset_tokens(d);
  int32_t *tokens = malloc((size_t)*n * sizeof *tokens);
  char *text = malloc((size_t)*n + 1);
  assert_true(tokens && text);
  wn_dataset_copy(d, 0, *n, tokens, NULL);
  for (int64_t i = 0; i < *n; i++) text[i] = tokens[i] == END ? '|' : (char)tokens[i];
  text[*n] = 0;
  for (int64_t i = 1; i <= wn_dataset_documents(d); i++)
    assert_int_equal(tokens[wn_dataset_document_start(d, i) - 1], END);
  wn_dataset_close(d);
  free(tokens);
  return text;
}

static void assert_packs_to(void **state, const char *separator, const char *expected) {
  wn_temp_path a = wn_temp(state, "a.txt"), b = wn_temp(state, "b.txt"), prefix = wn_temp(state, "out");
  const char *files[2] = {a.text, b.text};
  wn_pack_result result;
  int64_t n;
  OK(pack_bytes(&result, &(wn_pack_settings){
                             .prefix = prefix.text, .files = files, .n_files = 2, .document_separator = separator}));
  char *text = shown(prefix.text, &n);
  assert_string_equal(text, expected);
  assert_int_equal(result.tokens, n);
  int64_t ends = 0;
  for (const char *at = text; *at; at++) ends += *at == '|';
  assert_int_equal(result.documents, ends);
  assert_int_equal(result.copy_documents, 0);
  assert_false(wn_path_exists(wn_temp(state, "out.scored").text));
  free(text);
}

static void files_and_separators_make_documents(void **state) {
  static const char a[] = "one\n--\n--\ntwo -- \n---\n--\r\nthree\n--", b[] = "four\n--\n";
  wn_temp_write(wn_temp(state, "a.txt").text, a, sizeof a - 1);
  wn_temp_write(wn_temp(state, "b.txt").text, b, sizeof b - 1);
  assert_packs_to(state, NULL, "one\n--\n--\ntwo -- \n---\n--\r\nthree\n--|four\n--\n|");
  assert_packs_to(state, "--", "one\n|two -- \n---\n|three\n|four\n|");
  assert_packs_to(state, "---", "one\n--\n--\ntwo -- \n|--\r\nthree\n--|four\n--\n|");
  wn_temp_write(wn_temp(state, "a.txt").text, "", 0); /* an empty file is no document */
  assert_packs_to(state, NULL, "four\n--\n|");
}

static void any_bytes_are_text(void **state) {
  char all[512], back[512];
  for (int i = 0; i < 512; i++) all[i] = (char)(i * 7 + i / 256); /* NUL and every invalid sequence start among them */
  wn_temp_path file = wn_temp(state, "a"), prefix = wn_temp(state, "out");
  const char *files[1] = {file.text};
  wn_pack_result result;
  wn_temp_write(file.text, all, sizeof all);
  OK(pack_bytes(&result, &(wn_pack_settings){.prefix = prefix.text, .files = files, .n_files = 1}));
  assert_int_equal(result.bytes, 512);
  wn_dataset *d;
  int32_t tokens[513];
  OK(wn_dataset_open(&d, prefix.text));
  assert_int_equal(wn_dataset_tokens(d), 513);
  wn_dataset_copy(d, 0, 513, tokens, NULL);
  for (int i = 0; i < 512; i++) back[i] = (char)tokens[i];
  assert_memory_equal(all, back, sizeof all);
  wn_dataset_close(d);
}

/* Reads a file in pieces; they must join to the documents expected: `text` with documents ending at the ends given. */
static void assert_pieces(const char *path, const char *separator, const char *text, const size_t *ends, size_t n_ends,
                          bool cut_at_space) {
  wn_text *reader;
  wn_text_piece piece;
  bool more;
  size_t at = 0, documents = 0;
  OK(wn_text_open(&reader, path, separator));
  for (;;) {
    OK(wn_text_next(reader, &piece, &more));
    if (!more) break;
    assert_in_range(piece.bytes, 0, WN_TEXT_PIECE_BYTES);
    assert_memory_equal(piece.data, text + at, piece.bytes);
    at += piece.bytes;
    if (piece.ends_document) {
      assert_true(documents < n_ends);
      assert_int_equal(at, ends[documents++]);
    } else if (cut_at_space) {
      assert_true(text[at] == ' ' || text[at] == '\n');
      assert_true(text[at - 1] >= 'a' && text[at - 1] <= 'z');
    }
  }
  assert_int_equal(documents, n_ends);
  wn_text_close(reader);
}

static void long_documents_are_cut_between_words(void **state) {
  size_t n = 3 * (size_t)WN_TEXT_PIECE_BYTES + 77;
  char *text = malloc(n);
  assert_non_null(text);
  for (size_t i = 0; i < n; i++) {
    uint64_t r = wn_rng_below(1, WN_RNG_TEST, i, 40);
    text[i] = r < 26 ? (char)('a' + r) : r < 30 ? ' ' : r < 32 ? '\n' : (char)(0x80 + r);
  }
  wn_temp_path path = wn_temp(state, "long");
  wn_temp_write(path.text, text, n);
  assert_pieces(path.text, NULL, text, &n, 1, true);
  assert_pieces(path.text, "never there", text, &n, 1, true);
  /* no white space: cut anyway, but not within a character */
  for (size_t i = 0; i < n; i++) text[i] = "\xE2\x82\xAC"[i % 3];
  wn_temp_write(path.text, text, n);
  assert_pieces(path.text, NULL, text, &n, 1, false);
  wn_text *reader;
  wn_text_piece piece;
  bool more;
  OK(wn_text_open(&reader, path.text, NULL));
  OK(wn_text_next(reader, &piece, &more));
  assert_int_equal(piece.bytes % 3, 0);
  wn_text_close(reader);
  free(text);
}

/* A separator wherever it may stand near the end of a piece. */
static void separators_are_found_across_pieces(void **state) {
  static const char *const lines[] = {"\n=====\n", "\n=====\r\n"};
  wn_temp_path path = wn_temp(state, "long");
  size_t n = 2 * (size_t)WN_TEXT_PIECE_BYTES;
  char *text = malloc(n), *joined = malloc(n);
  assert_true(text && joined);
  for (size_t k = 0; k < 2; k++)
    for (size_t shift = 0; shift < 12; shift++) {
      size_t bytes = strlen(lines[k]), at = WN_TEXT_PIECE_BYTES - shift, ends[2] = {at + 1, n - bytes + 1};
      memset(text, 'x', n);
      for (size_t i = 0; i < n; i += 50) text[i] = ' ';
      memcpy(text + at, lines[k], bytes);
      memcpy(joined, text, at + 1); /* the newline before the separator belongs to the text */
      memcpy(joined + at + 1, text + at + bytes, n - at - bytes);
      wn_temp_write(path.text, text, n);
      assert_pieces(path.text, "=====", joined, ends, 2, false);
    }
  /* what looks like a separator only because a piece began there is none */
  memset(text, 'x', n);
  memcpy(text + WN_TEXT_PIECE_BYTES - 3, " ==\n", 4);
  wn_temp_write(path.text, text, n);
  assert_pieces(path.text, " ==", text, &n, 1, false);
  free(text);
  free(joined);
}

static void refuses_what_cannot_be_packed(void **state) {
  wn_temp_path file = wn_temp(state, "a"), empty = wn_temp(state, "empty"), prefix = wn_temp(state, "out");
  wn_temp_path absent = wn_temp(state, "absent");
  const char *files[2] = {file.text, absent.text}, *nothing[1] = {empty.text}, *directory[1] = {*state};
  wn_pack_result result;
  wn_temp_write(file.text, "abc", 3);
  wn_temp_write(empty.text, "", 0);
  wn_pack_settings s = {.prefix = prefix.text, .files = files, .n_files = 2};
  REFUSED(pack_bytes(&result, &s), WN_E_IO, absent.text);
  s.files = directory, s.n_files = 1;
  REFUSED(pack_bytes(&result, &s), WN_E_IO, *state);
  s.files = nothing;
  REFUSED(pack_bytes(&result, &s), WN_E_INPUT, "no text");
  s.n_files = 0;
  REFUSED(pack_bytes(&result, &s), WN_E_USAGE, "no text files");
  s.files = files, s.n_files = 1, s.document_separator = "";
  REFUSED(pack_bytes(&result, &s), WN_E_USAGE, "separator");
  s.document_separator = "a\nb";
  REFUSED(pack_bytes(&result, &s), WN_E_USAGE, "separator");
  s = (wn_pack_settings){.prefix = prefix.text,
                         .files = files,
                         .n_files = 1,
                         .copy_share = 0.5,
                         .copy_document_tokens = 64,
                         .copy_min_passage = 8,
                         .copy_max_passage = 16,
                         .copy_skip = 2};
  REFUSED(pack_bytes(&result, &s), WN_E_INPUT, "3 tokens, one copy document needs 64");
  wn_pack_settings bad = s;
#define BAD(change, part) bad = s, change, REFUSED(pack_bytes(&result, &bad), WN_E_USAGE, part)
  BAD(bad.copy_share = 1.01, "1.01");
  BAD(bad.copy_share = -0.1, "-0.1");
  BAD(bad.copy_share = (double)NAN, "nan");
  BAD(bad.copy_min_passage = 0, "passages of 0");
  BAD(bad.copy_max_passage = 7, "passages of 8 to 7");
  BAD(bad.copy_max_passage = 32, "cannot be repeated"); /* 2 * 32 and the end token are 65 */
  BAD(bad.copy_skip = 8, "unmarked");
  BAD(bad.copy_skip = -1, "unmarked");
  BAD(bad.copy_min_distance = 48, "cannot be repeated"); /* 48 + 16 + 1 > 64 */
  BAD(bad.copy_max_distance = 15, "cannot be repeated");
  BAD((bad.copy_min_distance = 30, bad.copy_max_distance = 29), "distances of 30 to 29");
#undef BAD
  char **names;
  size_t n;
  OK(wn_list_dir(&names, &n, *state));
  assert_int_equal(n, 2); /* the two inputs; nothing is left of what failed */
  wn_list_free(names, n);
}

/* ---- copy documents */

/* Text of numbers written in base 26, so that a stretch of eight characters tells where it is from. */
static void write_text(const char *path, int64_t from, int64_t bytes) {
  FILE *file = fopen(path, "wb");
  assert_non_null(file);
  for (int64_t i = 0; i < bytes; i += 4) {
    int64_t number = from + i / 4;
    char word[4] = {(char)('a' + number / 676 % 26), (char)('a' + number / 26 % 26), (char)('a' + number % 26), ' '};
    assert_int_equal(fwrite(word, 1, 4, file), 4);
  }
  assert_int_equal(fclose(file), 0);
}

typedef struct copy_bounds {
  int64_t passage[2], distance[2], skip, length;
} copy_bounds;

/* One copy document: tokens and marks [length]. Returns the marked tokens, and the distance. */
static int64_t check_copy(const int32_t *tokens, const uint8_t *marks, copy_bounds b, int64_t *distance) {
  int64_t first = 0, last = b.length - 1, marked = 0;
  while (first < b.length && !marks[first]) first++;
  while (last > 0 && !marks[last]) last--;
  marked = last - first + 1;
  assert_in_range(marked, 1, b.length);
  for (int64_t i = first; i <= last; i++) assert_int_equal(marks[i], 1);
  for (int64_t i = 0; i < b.length; i++) assert_int_equal(tokens[i] == END, i == b.length - 1);
  assert_int_equal(marks[b.length - 1], 0);
  int64_t begin = first - b.skip, passage = marked + b.skip, found = -1;
  assert_in_range(passage, b.passage[0], b.passage[1]);
  /* the passage stands before itself, once, at a distance that is allowed */
  for (int64_t at = 0; at + passage <= begin; at++) {
    if (memcmp(tokens + at, tokens + begin, (size_t)passage * sizeof *tokens) != 0) continue;
    assert_int_equal(found, -1);
    found = at;
  }
  assert_true(found >= 0);
  assert_in_range(begin - found, b.distance[0], b.distance[1]);
  *distance = begin - found;
  /* without the second copy it is the corpus in its order: number after number, but for the ends of the two files */
  int64_t breaks = 0, before = -1;
  for (int64_t i = tokens[3] == ' ' ? 0 : 4; i + 4 < b.length; i++) {
    if (i >= begin - 3 && i < begin + passage) continue;
    if (tokens[i + 3] != ' ') continue;
    int64_t number = (tokens[i] - 'a') * 676 + (tokens[i + 1] - 'a') * 26 + tokens[i + 2] - 'a';
    breaks += before >= 0 && i < begin && number != before + 1;
    before = number;
  }
  assert_in_range(breaks, 0, 2);
  return marked;
}

static void copies_are_what_they_say(void **state) {
  enum { LENGTH = 128 };
  static const struct {
    double share;
    copy_bounds bounds;
    int32_t near, far;
  } cases[] = {{0.25, {{12, 20}, {12, 115}, 4, LENGTH}, 0, 0},
               {1.0, {{12, 20}, {40, 60}, 0, LENGTH}, 40, 60},
               {0.9, {{31, 31}, {96, 96}, 30, LENGTH}, 96, 0}};
  wn_temp_path a = wn_temp(state, "a"), b = wn_temp(state, "b"), prefix = wn_temp(state, "out");
  const char *files[2] = {a.text, b.text};
  write_text(a.text, 0, 20000);
  write_text(b.text, 5000, 4000);
  for (size_t c = 0; c < 3; c++) {
    copy_bounds bounds = cases[c].bounds;
    wn_pack_result result;
    OK(pack_bytes(&result, &(wn_pack_settings){.prefix = prefix.text,
                                               .files = files,
                                               .n_files = 2,
                                               .copy_share = cases[c].share,
                                               .copy_document_tokens = LENGTH,
                                               .copy_min_passage = (int32_t)bounds.passage[0],
                                               .copy_max_passage = (int32_t)bounds.passage[1],
                                               .copy_skip = (int32_t)bounds.skip,
                                               .copy_min_distance = cases[c].near,
                                               .copy_max_distance = cases[c].far,
                                               .seed = 9}));
    double text = cases[c].share < 1 ? 24002 : 0;
    assert_int_equal(result.tokens, (int64_t)text + result.copy_documents * LENGTH);
    assert_true(fabs((double)(result.copy_documents * LENGTH) / (double)result.tokens - cases[c].share) < 0.005);
    wn_dataset *d;
    OK(wn_dataset_open(&d, prefix.text));
    OK(wn_dataset_check_vocab(d, 257));
    assert_int_equal(wn_dataset_documents(d), result.documents);
    assert_int_equal(result.documents, result.copy_documents + (cases[c].share < 1 ? 2 : 0));
    int64_t marked = 0, rows = 0, nearest = LENGTH, farthest = 0, distance;
    int32_t tokens[LENGTH + 1], start[LENGTH];
    uint8_t marks[LENGTH], predicted[LENGTH], scored[LENGTH];
    wn_window window = {tokens, start, predicted, scored};
    for (int64_t i = 0; i < result.copy_documents; i++) {
      assert_int_equal(wn_dataset_document_start(d, i), i * LENGTH);
      wn_dataset_copy(d, i * LENGTH, LENGTH, tokens, marks);
      marked += check_copy(tokens, marks, bounds, &distance);
      if (distance < nearest) nearest = distance;
      if (distance > farthest) farthest = distance;
      if (i >= wn_dataset_windows(d, LENGTH)) continue;
      wn_dataset_read(d, i, LENGTH, &window); /* windows of the same length are whole documents */
      for (int r = 0; r < LENGTH; r++) rows += scored[r];
      for (int r = 0; r < LENGTH; r++) assert_int_equal(start[r], 0);
      for (int r = 0; r < LENGTH; r++) assert_int_equal(predicted[r], r < LENGTH - 1);
      for (int r = 0; r + 1 < LENGTH; r++) assert_int_equal(scored[r], marks[r + 1]);
    }
    assert_int_equal(marked, result.scored_tokens);
    /* dozens of draws come near both ends of the range */
    assert_true(nearest - bounds.distance[0] <= 20 && bounds.distance[1] - farthest <= 20);
    assert_in_range(rows, marked - bounds.passage[1], marked);
    for (int64_t at = result.copy_documents * LENGTH; at < wn_dataset_tokens(d); at++) { /* the text is not marked */
      wn_dataset_copy(d, at, 1, tokens, marks);
      assert_int_equal(marks[0], 0);
    }
    wn_dataset_close(d);
  }
  assert_false(wn_path_exists(wn_temp(state, "out.text.bin").text));
  assert_false(wn_path_exists(wn_temp(state, "out.text.idx").text));
}

static void packing_is_a_pure_function_of_text_and_seed(void **state) {
  wn_temp_path a = wn_temp(state, "a");
  const char *files[1] = {a.text};
  write_text(a.text, 0, 8000);
  wn_pack_result result;
  wn_pack_settings s = {.files = files,
                        .n_files = 1,
                        .copy_share = 0.5,
                        .copy_document_tokens = 64,
                        .copy_min_passage = 8,
                        .copy_max_passage = 16};
  char *bytes[3][3];
  size_t n[3][3];
  for (int run = 0; run < 3; run++) {
    wn_temp_path prefix = wn_temp(state, "out");
    s.prefix = prefix.text, s.seed = run == 2;
    OK(pack_bytes(&result, &s));
    static const char *const names[3] = {"out.bin", "out.idx", "out.scored"};
    for (int i = 0; i < 3; i++) OK(wn_read_file(&bytes[run][i], &n[run][i], wn_temp(state, names[i]).text, 1 << 20));
  }
  for (int i = 0; i < 3; i++) {
    assert_int_equal(n[0][i], n[1][i]);
    assert_memory_equal(bytes[0][i], bytes[1][i], n[0][i]);
  }
  assert_memory_not_equal(bytes[0][0], bytes[2][0], n[0][0]);
  assert_memory_not_equal(bytes[0][2], bytes[2][2], n[0][2]);
  for (int run = 0; run < 3; run++)
    for (int i = 0; i < 3; i++) free(bytes[run][i]);
}

int main(void) {
  const struct CMUnitTest tests[] = {TEMP_TEST(files_and_separators_make_documents),
                                     TEMP_TEST(any_bytes_are_text),
                                     TEMP_TEST(long_documents_are_cut_between_words),
                                     TEMP_TEST(separators_are_found_across_pieces),
                                     TEMP_TEST(refuses_what_cannot_be_packed),
                                     TEMP_TEST(copies_are_what_they_say),
                                     TEMP_TEST(packing_is_a_pure_function_of_text_and_seed)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
