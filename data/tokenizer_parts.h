/* What a tokenizer is made of: for the files that build one (tokenizer.c, tokenizer_json.c). */
#ifndef WN_DATA_TOKENIZER_PARTS_H
#define WN_DATA_TOKENIZER_PARTS_H

#include "data/bpe.h"
#include "data/split.h"
#include "data/tokenizer.h"
#include "data/words.h"

struct wn_tokenizer {
  int32_t vocab_size, end_of_document;
  char *bytes;       /* of all ids, one after another */
  size_t *bytes_end; /* [vocab_size] */
  /* byte-pair encoding; split NULL: plain bytes */
  wn_split *split;
  wn_merges merges;
  int32_t byte_id[256];
  /* cache of words already encoded: word number i has ids cached[cached_end[i-1] .. cached_end[i]) */
  wn_words words;
  int32_t *cached;
  size_t *cached_end;
  size_t n_cached, cached_room, cached_end_room;
  wn_bpe_work work;
};

/* GPT-2's printable stand-ins for bytes (bytes_to_unicode): '!'..'~', 0xA1..0xAC and 0xAE..0xFF stand for themselves,
 * the 68 others, in order, are U+0100 and up. Writes the UTF-8 of `byte`'s stand-in, returns its length (1 or 2). */
size_t wn_byte_symbol(uint8_t byte, char out[2]);
/* The byte of the stand-in at text[0 .. n), its length in *bytes; -1 when it is none. */
int32_t wn_byte_of_symbol(const char *text, size_t n, size_t *bytes);

/* Writes tokenizer.json: merge i makes id 256 + i from pair[i]; the end of document comes last. */
WN_MUST_USE wn_status wn_tokenizer_write(const char *path, const int32_t (*pair)[2], int32_t n_merges);

#endif
