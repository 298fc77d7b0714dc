#include "data/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "data/tokenizer_parts.h"

enum { CACHE_WORDS = 1 << 17, CACHE_WORD_BYTES = 64 };

wn_status wn_tokenizer_bytes(wn_tokenizer **out) {
  wn_tokenizer *t = calloc(1, sizeof *t);
  if (t) {
    t->vocab_size = 257;
    t->end_of_document = 256;
    t->bytes = malloc(256);
    t->bytes_end = malloc(257 * sizeof *t->bytes_end);
  }
  if (!t || !t->bytes || !t->bytes_end) {
    wn_tokenizer_free(t);
    return WN_FAIL(WN_E_MEMORY, "out of memory for the byte tokenizer");
  }
  for (int i = 0; i < 256; i++) {
    t->bytes[i] = (char)i;
    t->bytes_end[i] = (size_t)i + 1;
    t->byte_id[i] = i;
  }
  t->bytes_end[256] = 256;
  *out = t;
  return NULL;
}

void wn_tokenizer_free(wn_tokenizer *t) {
  if (!t) return;
  free(t->bytes);
  free(t->bytes_end);
  wn_split_free(t->split);
  wn_merges_free(&t->merges);
  wn_words_free(&t->words);
  free(t->cached);
  free(t->cached_end);
  wn_bpe_work_free(&t->work);
  free(t);
}

int32_t wn_tokenizer_vocab_size(const wn_tokenizer *t) {
  return t->vocab_size;
}
int32_t wn_tokenizer_end_of_document(const wn_tokenizer *t) {
  return t->end_of_document;
}

const char *wn_tokenizer_bytes_of(const wn_tokenizer *t, int32_t id, size_t *bytes) {
  WN_ASSERT(id >= 0 && id < t->vocab_size, "id %d of %d", id, t->vocab_size);
  size_t begin = id ? t->bytes_end[id - 1] : 0;
  *bytes = t->bytes_end[id] - begin;
  return t->bytes + begin;
}

/* Encodes a word behind ids[*n]; there is room. */
static wn_status encode_word(wn_tokenizer *t, const char *word, size_t bytes, int32_t *ids, size_t *n) {
  size_t made;
  for (size_t i = 0; i < bytes; i++) ids[*n + i] = t->byte_id[(unsigned char)word[i]];
  WN_TRY(wn_bpe_encode(&t->merges, &t->work, ids + *n, bytes, &made));
  *n += made;
  return NULL;
}

static wn_status encode_cached(wn_tokenizer *t, const char *word, size_t bytes, int32_t *ids, size_t *n) {
  uint32_t number;
  bool added;
  if (t->words.n >= CACHE_WORDS) {
    wn_words_clear(&t->words);
    t->n_cached = 0;
  }
  /* room first: a word that is known must have its ids */
  WN_TRY(wn_grow(&t->cached, &t->cached_room, t->n_cached + bytes, sizeof *t->cached));
  WN_TRY(wn_grow(&t->cached_end, &t->cached_end_room, (size_t)t->words.n + 1, sizeof *t->cached_end));
  WN_TRY(wn_words_add(&t->words, word, bytes, &number, &added));
  if (added) {
    size_t end = t->n_cached;
    t->cached_end[number] = end;
    wn_status status = encode_word(t, word, bytes, t->cached, &end);
    if (status) { /* out of memory: forget the words, of which the last has no ids */
      wn_words_clear(&t->words);
      t->n_cached = 0;
      return wn_status_trail(status, __FILE__, __LINE__);
    }
    t->n_cached = t->cached_end[number] = end;
  }
  size_t begin = number ? t->cached_end[number - 1] : 0, count = t->cached_end[number] - begin;
  memcpy(ids + *n, t->cached + begin, count * sizeof *ids);
  *n += count;
  return NULL;
}

wn_status wn_tokenizer_encode(wn_tokenizer *t, const char *text, size_t bytes, int32_t **ids, size_t *n, size_t *room) {
  if (!t->split) {
    WN_TRY(wn_grow(ids, room, *n + bytes, sizeof **ids));
    for (size_t i = 0; i < bytes; i++) (*ids)[(*n)++] = (unsigned char)text[i];
    return NULL;
  }
  wn_split_cursor cursor = {.text = text, .bytes = bytes};
  const char *word;
  size_t word_bytes;
  for (;;) {
    WN_TRY(wn_split_next(t->split, &cursor, &word, &word_bytes));
    if (word_bytes == 0) return NULL;
    WN_TRY(wn_grow(ids, room, *n + word_bytes, sizeof **ids));
    if (word_bytes <= CACHE_WORD_BYTES)
      WN_TRY(encode_cached(t, word, word_bytes, *ids, n));
    else
      WN_TRY(encode_word(t, word, word_bytes, *ids, n));
  }
}
