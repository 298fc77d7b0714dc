/* `winnow data pack`: text files -> indexed dataset. One file is one document (or, with `document_separator`, several). */
#ifndef WN_DATA_PACK_H
#define WN_DATA_PACK_H

#include "base/log.h"
#include "data/dataset.h"
#include "data/tokenizer.h"

/* Copy documents: passage, other text, the same passage again, exactly `document_tokens` long with its end token. The second copy (but for its
 * first `copy_skip` tokens) is marked in PREFIX.scored. They make distance matter: see docs/guide.md. */
typedef struct wn_pack_settings {
  const char *prefix;          /* output */
  const char *const *files;    /* input, in this order */
  int32_t n_files;
  const char *document_separator; /* NULL: a file is a document; else a line equal to it ends one */
  double copy_share;           /* share of the output's tokens in copy documents, 0..1 */
  int32_t copy_document_tokens, copy_min_passage, copy_max_passage, copy_skip;
  int32_t copy_min_distance, copy_max_distance; /* tokens from the first copy's start to the second's; 0: as the document's length allows */
  uint64_t seed;
} wn_pack_settings;

typedef struct wn_pack_result { int64_t documents, tokens, bytes, copy_documents, scored_tokens; } wn_pack_result;

WN_MUST_USE wn_status wn_pack(wn_pack_result *out, const wn_tokenizer *tokenizer, const wn_pack_settings *settings, wn_log *log);

#endif
