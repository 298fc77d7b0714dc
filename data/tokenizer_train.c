/* Training of byte-pair merges. The text is reduced to its distinct words with their counts; every pair of neighbours
 * has its count and the list of words it was seen in. A merge rewrites only those words and corrects only the pairs
 * beside each place it changes, so its cost is that of the words it touches. The best pair comes from a heap whose
 * entries may be out of date: counts that grew were entered again, counts that fell are noticed when an entry comes to
 * the top. */
#include <inttypes.h>
#include <stdlib.h>

#include "data/text.h"
#include "data/tokenizer_parts.h"

enum { LONGEST_WORD = 256, LEAST_COUNT = 2 };

typedef struct counted_pair {
  int32_t left, right;
  int64_t count;
  uint32_t *words; /* that have it, or had it */
  size_t n_words, room;
  bool grew; /* stands in trainer.grown */
} counted_pair;

typedef struct candidate {
  int64_t count;
  uint32_t pair;
} candidate;

typedef struct trainer {
  wn_words words;
  int64_t *count;  /* [words] */
  int32_t *length; /* [words]: ids of the word now */
  int32_t *ids;    /* word w's ids begin where its bytes do */
  size_t count_room;
  wn_words pair_numbers; /* a pair's two ids as eight bytes -> its number */
  counted_pair *pairs;
  size_t pair_room;
  candidate *heap;
  size_t heap_n, heap_room;
  uint32_t *grown;
  size_t n_grown, grown_room;
} trainer;

static wn_status count_words(trainer *t, const char *path, wn_split *split) {
  wn_text *text;
  wn_text_piece piece;
  bool more;
  wn_status status = NULL;
  WN_TRY(wn_text_open(&text, path, NULL));
  for (;;) {
    WN_TRY_GOTO(status, done, wn_text_next(text, &piece, &more));
    if (!more) break;
    wn_split_cursor cursor = {.text = piece.data, .bytes = piece.bytes};
    for (;;) {
      const char *word;
      size_t bytes;
      uint32_t number;
      bool added;
      WN_TRY_GOTO(status, done, wn_split_next(split, &cursor, &word, &bytes));
      if (bytes == 0) break;
      if (bytes > LONGEST_WORD) continue;
      WN_TRY_GOTO(status, done, wn_words_add(&t->words, word, bytes, &number, &added));
      WN_TRY_GOTO(status, done, wn_grow(&t->count, &t->count_room, t->words.n, sizeof *t->count));
      if (added) t->count[number] = 0;
      t->count[number]++;
    }
  }
done:
  wn_text_close(text);
  return status;
}

/* Adds `change` to the pair's count; a pair that is new or grows remembers the word. */
static wn_status change_count(trainer *t, int32_t left, int32_t right, int64_t change, uint32_t word) {
  const int32_t key[2] = {left, right};
  uint32_t number;
  bool added;
  WN_TRY(wn_words_add(&t->pair_numbers, (const char *)key, sizeof key, &number, &added));
  WN_TRY(wn_grow(&t->pairs, &t->pair_room, t->pair_numbers.n, sizeof *t->pairs));
  counted_pair *pair = &t->pairs[number];
  if (added) *pair = (counted_pair){.left = left, .right = right};
  pair->count += change;
  if (change < 0) return NULL;
  if (pair->n_words == 0 || pair->words[pair->n_words - 1] != word) {
    WN_TRY(wn_grow(&pair->words, &pair->room, pair->n_words + 1, sizeof *pair->words));
    pair->words[pair->n_words++] = word;
  }
  if (pair->grew) return NULL;
  WN_TRY(wn_grow(&t->grown, &t->grown_room, t->n_grown + 1, sizeof *t->grown));
  t->grown[t->n_grown++] = number;
  pair->grew = true;
  return NULL;
}

static bool better(const trainer *t, candidate a, candidate b) {
  if (a.count != b.count) return a.count > b.count;
  const counted_pair *p = &t->pairs[a.pair], *q = &t->pairs[b.pair];
  return p->left != q->left ? p->left < q->left : p->right < q->right;
}

static wn_status push(trainer *t, uint32_t pair) {
  candidate entry = {t->pairs[pair].count, pair};
  if (entry.count < LEAST_COUNT) return NULL;
  WN_TRY(wn_grow(&t->heap, &t->heap_room, t->heap_n + 1, sizeof *t->heap));
  size_t i = t->heap_n++;
  for (size_t parent; i > 0 && better(t, entry, t->heap[parent = (i - 1) / 2]); i = parent)
    t->heap[i] = t->heap[parent];
  t->heap[i] = entry;
  return NULL;
}

static candidate pop(trainer *t) {
  candidate top = t->heap[0], last = t->heap[--t->heap_n];
  size_t i = 0;
  for (size_t child; (child = 2 * i + 1) < t->heap_n; i = child) {
    if (child + 1 < t->heap_n && better(t, t->heap[child + 1], t->heap[child])) child++;
    if (!better(t, t->heap[child], last)) break;
    t->heap[i] = t->heap[child];
  }
  t->heap[i] = last;
  return top;
}

static wn_status push_grown(trainer *t) {
  for (size_t i = 0; i < t->n_grown; i++) {
    t->pairs[t->grown[i]].grew = false;
    WN_TRY(push(t, t->grown[i]));
  }
  t->n_grown = 0;
  return NULL;
}

static int32_t *ids_of(const trainer *t, uint32_t word) {
  size_t bytes;
  return t->ids + (wn_words_at(&t->words, word, &bytes) - t->words.text);
}

static wn_status count_pairs(trainer *t) {
  t->length = malloc(((size_t)t->words.n + 1) * sizeof *t->length);
  t->ids = malloc((t->words.text_bytes + 1) * sizeof *t->ids);
  if (!t->length || !t->ids) return WN_FAIL(WN_E_MEMORY, "out of memory for %u distinct words", t->words.n);
  for (size_t i = 0; i < t->words.text_bytes; i++) t->ids[i] = (unsigned char)t->words.text[i];
  for (uint32_t w = 0; w < t->words.n; w++) {
    size_t bytes;
    (void)wn_words_at(&t->words, w, &bytes);
    const int32_t *ids = ids_of(t, w);
    t->length[w] = (int32_t)bytes;
    for (size_t i = 0; i + 1 < bytes; i++) WN_TRY(change_count(t, ids[i], ids[i + 1], t->count[w], w));
  }
  return push_grown(t);
}

/* left, right -> made, from left to right, within one word. */
static wn_status merge_in_word(trainer *t, int32_t left, int32_t right, int32_t made, uint32_t word) {
  int32_t *ids = ids_of(t, word), n = t->length[word], kept = 0;
  int64_t count = t->count[word];
  for (int32_t i = 0; i < n; i++) {
    if (i + 1 == n || ids[i] != left || ids[i + 1] != right) {
      ids[kept++] = ids[i];
      continue;
    }
    if (kept > 0) {
      WN_TRY(change_count(t, ids[kept - 1], left, -count, word));
      WN_TRY(change_count(t, ids[kept - 1], made, count, word));
    }
    if (i + 2 < n) {
      WN_TRY(change_count(t, right, ids[i + 2], -count, word));
      WN_TRY(change_count(t, made, ids[i + 2], count, word));
    }
    ids[kept++] = made;
    i++;
  }
  t->length[word] = kept;
  return NULL;
}

/* The next merge: applied everywhere and put into chosen; *found false when no pair is seen often enough. */
static wn_status merge_best(trainer *t, int32_t made, int32_t chosen[2], bool *found) {
  *found = false;
  while (t->heap_n > 0 && !*found) {
    candidate best = pop(t);
    int64_t count = t->pairs[best.pair].count;
    if (best.count == count) {
      counted_pair *pair = &t->pairs[best.pair];
      uint32_t *words = pair->words; /* no word joins this list any more: a new pair holds the new id */
      size_t n_words = pair->n_words;
      chosen[0] = pair->left, chosen[1] = pair->right;
      for (size_t i = 0; i < n_words; i++) WN_TRY(merge_in_word(t, chosen[0], chosen[1], made, words[i]));
      pair = &t->pairs[best.pair];
      pair->count = 0;
      free(pair->words);
      pair->words = NULL;
      pair->n_words = pair->room = 0;
      *found = true;
    } else if (best.count > count)
      WN_TRY(push(t, best.pair));
  }
  return push_grown(t);
}

static void free_trainer(trainer *t) {
  for (size_t i = 0; i < t->pair_numbers.n && t->pairs; i++) free(t->pairs[i].words);
  wn_words_free(&t->words);
  wn_words_free(&t->pair_numbers);
  free(t->count);
  free(t->length);
  free(t->ids);
  free(t->pairs);
  free(t->heap);
  free(t->grown);
}

wn_status wn_tokenizer_train(const char *const *files, int32_t n_files, int32_t vocab_size, const char *out_path,
                             wn_log *log) {
  enum { MOST_IDS = 1000000 };
  int64_t n = (int64_t)vocab_size - 257;
  trainer t = {0};
  wn_split *split = NULL;
  wn_status status = NULL;
  if (vocab_size < 257 || vocab_size > MOST_IDS)
    return WN_FAIL(WN_E_USAGE, "a vocabulary of %d was asked for, allowed is 257 to %d", vocab_size, MOST_IDS);
  int32_t(*chosen)[2] = malloc(((size_t)n + 1) * sizeof *chosen);
  if (!chosen) status = WN_FAIL(WN_E_MEMORY, "out of memory for %" PRId64 " merges", n);
  if (!status) status = wn_split_create(&split);
  for (int32_t i = 0; i < n_files && !status; i++) {
    status = wn_status_prefix(count_words(&t, files[i], split), "training on %s", files[i]);
    wn_progress(log, "reading: %d of %d files, %u distinct words", i + 1, n_files, t.words.n);
  }
  if (!status) status = count_pairs(&t);
  for (int64_t i = 0; i < n && !status; i++) {
    bool found = false;
    status = merge_best(&t, 256 + (int32_t)i, chosen[i], &found);
    if (!status && !found)
      status =
          WN_FAIL_HINT(WN_E_INPUT, "give more text or a smaller vocabulary",
                       "the text gives a vocabulary of %" PRId64 " and no more, %d was asked for", i + 257, vocab_size);
    if ((i + 1) % 256 == 0) wn_progress(log, "merging: %" PRId64 " of %" PRId64, i + 1, n);
  }
  if (!status) status = wn_tokenizer_write(out_path, (const int32_t(*)[2])chosen, (int32_t)n);
  free_trainer(&t);
  wn_split_free(split);
  free(chosen);
  return status;
}
