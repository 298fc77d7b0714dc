/* Byte-level tokenizers: plain bytes (ids 0..255, 256 = end of document), or byte-pair encoding read from and written to
 * a Hugging Face tokenizer.json (ByteLevel alphabet, one special token <|endoftext|> at the last id). */
#ifndef WN_DATA_TOKENIZER_H
#define WN_DATA_TOKENIZER_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

typedef struct wn_tokenizer wn_tokenizer;

WN_MUST_USE wn_status wn_tokenizer_bytes(wn_tokenizer **out);
WN_MUST_USE wn_status wn_tokenizer_load(wn_tokenizer **out, const char *path); /* WN_E_INPUT */
void wn_tokenizer_free(wn_tokenizer *tokenizer);
int32_t wn_tokenizer_vocab_size(const wn_tokenizer *tokenizer); /* end of document included */
int32_t wn_tokenizer_end_of_document(const wn_tokenizer *tokenizer);
/* Appends the ids of `text` (any bytes) to a malloc'ed array that grows: *ids, *n, *room. */
WN_MUST_USE wn_status wn_tokenizer_encode(const wn_tokenizer *tokenizer, const char *text, size_t bytes, int32_t **ids, size_t *n, size_t *room);
/* The bytes of one id (not NUL-terminated); empty for the end of document. */
const char *wn_tokenizer_bytes_of(const wn_tokenizer *tokenizer, int32_t id, size_t *bytes);
/* Trains byte-pair merges on files until the vocabulary has vocab_size entries (256 bytes + merges + end of document); writes tokenizer.json. Ties go
 * to the pair of smallest ids, so the result is a pure function of the text. */
WN_MUST_USE wn_status wn_tokenizer_train(const char *const *files, int32_t n_files, int32_t vocab_size, const char *out_path);

#endif
