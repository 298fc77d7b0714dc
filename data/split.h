/* Cuts text into words before byte-pair encoding, as GPT-2's pattern does:
 *   '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 * (openai/gpt-2 src/encoder.py; Hugging Face's ByteLevel). \s is Unicode's White_Space. A run of bytes that is not
 * UTF-8 is a word of its own, so that any bytes survive. */
#ifndef WN_DATA_SPLIT_H
#define WN_DATA_SPLIT_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

typedef struct wn_split wn_split;

WN_MUST_USE wn_status wn_split_create(wn_split **out);
void wn_split_free(wn_split *split); /* NULL is fine */

/* All zero but for text and bytes at first. */
typedef struct wn_split_cursor {
  const char *text;
  size_t bytes, at, valid_end; /* text[at .. valid_end) is UTF-8 */
} wn_split_cursor;

/* The next word; *word_bytes 0 at the end of the text. One thread at a time. */
WN_MUST_USE wn_status wn_split_next(wn_split *split, wn_split_cursor *cursor, const char **word, size_t *word_bytes);

#endif
