/* `winnow data pack`: text files -> indexed dataset. One file is one document (or, with `document_separator`, several);
 * each ends with the end-of-document token. Memory does not grow with the corpus. */
#ifndef WN_DATA_PACK_H
#define WN_DATA_PACK_H

#include "base/log.h"
#include "data/dataset.h"
#include "data/tokenizer.h"

/* A copy document is a stretch of the corpus, document boundaries left out, in which a passage is repeated farther on:
 *   text | passage | text that follows it | passage again | text that follows | end of document
 * exactly `copy_document_tokens` long with its end token. The second copy, but for its first `copy_skip` tokens, is
 * marked in PREFIX.scored: only who looks back to the first copy can predict it. See docs/formats.md. Copy documents
 * come first in the output, so that windows of seq_len = copy_document_tokens coincide with them. The text follows
 * whole, unless copy_share is 1: then there are only copy documents, about as many tokens as the text has. */
typedef struct wn_pack_settings {
  const char *prefix;       /* output */
  const char *const *files; /* input, in this order */
  int32_t n_files;
  const char *document_separator; /* NULL: a file is a document; else a line equal to it ends one */
  double copy_share;              /* share of the output's tokens in copy documents, 0..1; 0: no marks file either */
  int32_t copy_document_tokens, copy_min_passage, copy_max_passage, copy_skip;
  /* tokens from the first copy's start to the second's, at least the passage's own length; 0: as the document allows */
  int32_t copy_min_distance, copy_max_distance;
  uint64_t seed;
} wn_pack_settings;

typedef struct wn_pack_result {
  int64_t documents, tokens, bytes; /* written; of text read */
  int64_t copy_documents, scored_tokens;
} wn_pack_result;

/* WN_E_USAGE for settings that do not fit each other (before anything is read), WN_E_IO naming the file, WN_E_INPUT
 * when the text is empty or shorter than one copy document. On error nothing of the name PREFIX is left or changed. */
WN_MUST_USE wn_status wn_pack(wn_pack_result *out, wn_tokenizer *tokenizer, const wn_pack_settings *settings,
                              wn_log *log);

#endif
