/* Byte-level tokenizers: plain bytes (ids 0..255, 256 = end of document), or byte-pair encoding read from and written
 * to a Hugging Face tokenizer.json (ByteLevel alphabet, <|endoftext|> as the end of document). */
#ifndef WN_DATA_TOKENIZER_H
#define WN_DATA_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#include "base/log.h"
#include "base/status.h"

typedef struct wn_tokenizer wn_tokenizer;

#define WN_END_OF_DOCUMENT "<|endoftext|>"

WN_MUST_USE wn_status wn_tokenizer_bytes(wn_tokenizer **out);
/* WN_E_IO; WN_E_INPUT naming what is no byte-level BPE as this program understands it: whatever would encode otherwise
 * is refused. */
WN_MUST_USE wn_status wn_tokenizer_load(wn_tokenizer **out, const char *path);
void wn_tokenizer_free(wn_tokenizer *tokenizer);                /* NULL is fine */
int32_t wn_tokenizer_vocab_size(const wn_tokenizer *tokenizer); /* end of document included */
int32_t wn_tokenizer_end_of_document(const wn_tokenizer *tokenizer);
/* Appends the ids of `text` (any bytes; text that spells a special token is text) to a malloc'ed array that grows:
 * *ids, *n, *room. Keeps a bounded cache of words: one thread at a time. */
WN_MUST_USE wn_status wn_tokenizer_encode(wn_tokenizer *tokenizer, const char *text, size_t bytes, int32_t **ids,
                                          size_t *n, size_t *room);
/* The bytes of one id (not NUL-terminated); none for special tokens. The ids of a text give back its bytes exactly. */
const char *wn_tokenizer_bytes_of(const wn_tokenizer *tokenizer, int32_t id, size_t *bytes);

/* Trains byte-pair merges on files until the vocabulary has vocab_size entries: 256 bytes (id = byte), merges, end of
 * document (the last id); writes tokenizer.json. The pair seen most often is merged next, of equal ones the pair of
 * smallest ids, so the result is a pure function of the text. Words of more than 256 bytes are not counted. WN_E_USAGE
 * for a size below 257, WN_E_INPUT when no pair is left that is seen twice, WN_E_IO. */
WN_MUST_USE wn_status wn_tokenizer_train(const char *const *files, int32_t n_files, int32_t vocab_size,
                                         const char *out_path, wn_log *log);

#endif
