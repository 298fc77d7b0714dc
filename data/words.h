/* Byte strings numbered 0, 1, 2 ... in order of first appearance: the distinct words of a text. */
#ifndef WN_DATA_WORDS_H
#define WN_DATA_WORDS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct wn_words {
  uint32_t n; /* words */
  char *text; /* all of them, one after another */
  size_t text_bytes, text_room;
  size_t *end;    /* [n]: where each ends in text */
  uint64_t *hash; /* [n] */
  uint32_t *slot; /* [slots]: 1 + word, 0 where free; open addressing, at most half full */
  size_t room, slots;
} wn_words; /* all zero: empty */

/* The word's number; *added tells whether it is new. WN_E_MEMORY. */
WN_MUST_USE wn_status wn_words_add(wn_words *words, const char *word, size_t bytes, uint32_t *number, bool *added);
const char *wn_words_at(const wn_words *words, uint32_t number, size_t *bytes);
void wn_words_clear(wn_words *words); /* empty again, memory kept */
void wn_words_free(wn_words *words);

/* `array`: address of a pointer to malloc'ed elements of `size` bytes; doubles them until there is room for `needed`.
 * WN_E_MEMORY. */
WN_MUST_USE wn_status wn_grow(void *array, size_t *room, size_t needed, size_t size);

#endif
