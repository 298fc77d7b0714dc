#include "data/words.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

wn_status wn_grow(void *array, size_t *room, size_t needed, size_t size) {
  if (needed <= *room) return NULL;
  size_t more = *room ? *room : 64;
  while (more < needed && more <= SIZE_MAX / 4 / size) more *= 2;
  void *old;
  memcpy(&old, array, sizeof old); /* whatever it points to: a pointer's bytes, not its type */
  void *moved = more >= needed ? realloc(old, more * size) : NULL;
  if (!moved) return WN_FAIL(WN_E_MEMORY, "out of memory: %zu elements of %zu bytes", needed, size);
  memcpy(array, &moved, sizeof moved);
  *room = more;
  return NULL;
}

static void place(wn_words *w, uint32_t number) {
  size_t at = w->hash[number] & (w->slots - 1);
  while (w->slot[at]) at = (at + 1) & (w->slots - 1);
  w->slot[at] = number + 1;
}

/* Makes room for one more word of `bytes` bytes; changes nothing that is visible. */
static wn_status reserve(wn_words *w, size_t bytes) {
  if (w->n >= UINT32_MAX - 1) return WN_FAIL(WN_E_MEMORY, "more than %u distinct words", UINT32_MAX - 1);
  WN_TRY(wn_grow(&w->text, &w->text_room, w->text_bytes + bytes, 1));
  if (w->n >= w->room) {
    size_t hash_room = w->room;
    WN_TRY(wn_grow(&w->hash, &hash_room, w->n + 1, sizeof *w->hash));
    WN_TRY(wn_grow(&w->end, &w->room, w->n + 1, sizeof *w->end));
  }
  if (2 * ((size_t)w->n + 1) <= w->slots) return NULL;
  size_t slots = w->slots ? 2 * w->slots : 256;
  uint32_t *slot = calloc(slots, sizeof *slot);
  if (!slot) return WN_FAIL(WN_E_MEMORY, "out of memory for %zu word slots", slots);
  free(w->slot);
  w->slot = slot;
  w->slots = slots;
  for (uint32_t i = 0; i < w->n; i++) place(w, i);
  return NULL;
}

const char *wn_words_at(const wn_words *w, uint32_t number, size_t *bytes) {
  size_t begin = number ? w->end[number - 1] : 0;
  *bytes = w->end[number] - begin;
  return w->text + begin;
}

wn_status wn_words_add(wn_words *w, const char *word, size_t bytes, uint32_t *number, bool *added) {
  uint64_t hash = XXH3_64bits(word, bytes);
  for (size_t at = hash & (w->slots - 1); w->slots && w->slot[at]; at = (at + 1) & (w->slots - 1)) {
    uint32_t other = w->slot[at] - 1;
    size_t other_bytes;
    const char *text = wn_words_at(w, other, &other_bytes);
    if (w->hash[other] != hash || other_bytes != bytes || memcmp(text, word, bytes) != 0) continue;
    *number = other;
    *added = false;
    return NULL;
  }
  WN_TRY(reserve(w, bytes));
  memcpy(w->text + w->text_bytes, word, bytes);
  w->text_bytes += bytes;
  w->end[w->n] = w->text_bytes;
  w->hash[w->n] = hash;
  *number = w->n++;
  *added = true;
  place(w, *number);
  return NULL;
}

void wn_words_clear(wn_words *w) {
  w->n = 0;
  w->text_bytes = 0;
  if (w->slot) memset(w->slot, 0, w->slots * sizeof *w->slot);
}

void wn_words_free(wn_words *w) {
  free(w->text);
  free(w->end);
  free(w->hash);
  free(w->slot);
  *w = (wn_words){0};
}
