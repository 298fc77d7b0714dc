#include "data/pack.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/rng.h"
#include "data/text.h"
#include "io/files.h"

enum { COPY_PIECE = 1 << 14 };

static wn_status check_settings(const wn_pack_settings *s) {
  if (s->n_files < 1) return WN_FAIL(WN_E_USAGE, "no text files were given to pack");
  if (!(s->copy_share >= 0 && s->copy_share <= 1))
    return WN_FAIL(WN_E_USAGE, "the share of copy documents is %g, allowed is 0 to 1", s->copy_share);
  if (s->copy_share == 0) return NULL;
  int64_t document = s->copy_document_tokens, low = s->copy_min_passage, high = s->copy_max_passage;
  int64_t near = s->copy_min_distance, far = s->copy_max_distance;
  if (low < 1 || high < low)
    return WN_FAIL(WN_E_USAGE, "passages of %" PRId64 " to %" PRId64 " tokens make no range", low, high);
  if (s->copy_skip < 0 || s->copy_skip >= low)
    return WN_FAIL(WN_E_USAGE, "%d tokens of a second copy are to go unmarked, but a passage may have only %" PRId64,
                   s->copy_skip, low);
  if (near < 0 || far < 0 || (far > 0 && far < near))
    return WN_FAIL(WN_E_USAGE, "distances of %" PRId64 " to %" PRId64 " tokens make no range", near, far);
  /* the longest passage has the fewest places to stand */
  int64_t least = near > high ? near : high, most = document - 1 - high;
  if (least > most || (far > 0 && far < high))
    return WN_FAIL_HINT(WN_E_USAGE, "the second copy must begin after the first one ends and fit before the end token",
                        "a passage of %" PRId64 " tokens cannot be repeated at a distance of %" PRId64 " to %" PRId64
                        " in a document of %" PRId64,
                        high, least, far > 0 && far < most ? far : most, document);
  return NULL;
}

/* ---- text to tokens */

typedef struct id_buffer {
  int32_t *ids;
  size_t n, room;
} id_buffer;

static wn_status pack_file(wn_pack_result *out, wn_tokenizer *tokenizer, const wn_pack_settings *s, const char *path,
                           wn_dataset_writer *writer, id_buffer *buffer, wn_log *log) {
  wn_text *text = NULL;
  wn_status status = NULL;
  wn_text_piece piece;
  bool more, open = false; /* the document has tokens */
  int64_t before = out->bytes;
  const int32_t end = wn_tokenizer_end_of_document(tokenizer);
  WN_TRY_GOTO(status, done, wn_text_open(&text, path, s->document_separator));
  for (;;) {
    WN_TRY_GOTO(status, done, wn_text_next(text, &piece, &more));
    if (!more) break;
    buffer->n = 0;
    WN_TRY_GOTO(status, done,
                wn_tokenizer_encode(tokenizer, piece.data, piece.bytes, &buffer->ids, &buffer->n, &buffer->room));
    WN_TRY_GOTO(status, done, wn_dataset_writer_append(writer, buffer->ids, NULL, (int64_t)buffer->n));
    out->bytes += (int64_t)piece.bytes;
    out->tokens += (int64_t)buffer->n;
    open = open || buffer->n > 0;
    if (!piece.ends_document || !open) continue;
    WN_TRY_GOTO(status, done, wn_dataset_writer_add(writer, &end, NULL, 1));
    out->tokens++;
    out->documents++;
    open = false;
  }
  if (out->bytes == before) wn_warn(log, "%s holds no text and gives no document", path);
done:
  wn_text_close(text);
  return wn_status_prefix(status, "packing %s", path);
}

static wn_status pack_text(wn_pack_result *out, wn_tokenizer *tokenizer, const wn_pack_settings *s, const char *prefix,
                           wn_log *log) {
  wn_dataset_writer *writer = NULL;
  id_buffer buffer = {0};
  wn_status status = NULL;
  *out = (wn_pack_result){0};
  WN_TRY(wn_dataset_writer_create(&writer, prefix, wn_tokenizer_vocab_size(tokenizer), false));
  for (int32_t i = 0; i < s->n_files && !status; i++) {
    status = pack_file(out, tokenizer, s, s->files[i], writer, &buffer, log);
    if (!status && s->n_files > 1)
      wn_progress(log, "packing: %d of %d files, %" PRId64 " tokens", i + 1, s->n_files, out->tokens);
  }
  if (!status && out->tokens == 0) status = WN_FAIL(WN_E_INPUT, "the %d files given to pack hold no text", s->n_files);
  free(buffer.ids);
  WN_KEEP_FIRST(status, wn_dataset_writer_close(writer, status == NULL));
  return status;
}

/* ---- copy documents */

/* The corpus from a random place on, without its ends of documents, and round again from its end. */
typedef struct stretch {
  const wn_dataset *text;
  int64_t at;
  int32_t end_of_document;
  int64_t have, used;
  int32_t piece[COPY_PIECE];
} stretch;

static void take(stretch *s, int32_t *out, int64_t n) {
  for (int64_t i = 0; i < n;) {
    if (s->used == s->have) {
      int64_t left = wn_dataset_tokens(s->text) - s->at;
      s->have = left < COPY_PIECE ? left : COPY_PIECE;
      s->used = 0;
      wn_dataset_copy(s->text, s->at, s->have, s->piece, NULL);
      s->at = (s->at + s->have) % wn_dataset_tokens(s->text);
    }
    int32_t id = s->piece[s->used++];
    if (id != s->end_of_document) out[i++] = id;
  }
}

static int64_t draw(const wn_pack_settings *s, int64_t document, uint64_t which, int64_t low, int64_t high) {
  uint64_t index = (uint64_t)document * 4 + which;
  return low + (int64_t)wn_rng_below(s->seed, WN_RNG_PACK, index, (uint64_t)(high - low) + 1);
}

/* Fills tokens and marks [copy_document_tokens]; returns how many are marked. */
static int64_t make_copy(const wn_pack_settings *s, int64_t document, stretch *from, int32_t *tokens, uint8_t *marks) {
  int64_t content = s->copy_document_tokens - 1, far = s->copy_max_distance;
  int64_t passage = draw(s, document, 0, s->copy_min_passage, s->copy_max_passage);
  int64_t least = s->copy_min_distance > passage ? s->copy_min_distance : passage;
  int64_t most = far > 0 && far < content - passage ? far : content - passage;
  int64_t distance = draw(s, document, 1, least, most);
  int64_t first = draw(s, document, 2, 0, content - distance - passage), second = first + distance;
  from->at = draw(s, document, 3, 0, wn_dataset_tokens(from->text) - 1);
  from->have = from->used = 0;
  take(from, tokens, second);
  memcpy(tokens + second, tokens + first, (size_t)passage * sizeof *tokens);
  take(from, tokens + second + passage, content - second - passage);
  tokens[content] = from->end_of_document;
  memset(marks, 0, (size_t)content + 1);
  memset(marks + second + s->copy_skip, 1, (size_t)(passage - s->copy_skip));
  return passage - s->copy_skip;
}

static wn_status add_copies(wn_pack_result *out, const wn_pack_settings *s, stretch *from, int64_t n,
                            wn_dataset_writer *writer) {
  int64_t length = s->copy_document_tokens;
  wn_status status = NULL;
  int32_t *tokens = malloc((size_t)length * sizeof *tokens);
  uint8_t *marks = malloc((size_t)length);
  if (!tokens || !marks)
    status = WN_FAIL(WN_E_MEMORY, "out of memory for a copy document of %" PRId64 " tokens", length);
  for (int64_t i = 0; i < n && !status; i++) {
    out->scored_tokens += make_copy(s, i, from, tokens, marks);
    status = wn_dataset_writer_add(writer, tokens, marks, length);
  }
  free(tokens);
  free(marks);
  out->copy_documents = n;
  out->documents += n;
  out->tokens += n * length;
  return status;
}

static wn_status add_documents(wn_pack_result *out, stretch *from, wn_dataset_writer *writer) {
  for (int64_t d = 0; d < wn_dataset_documents(from->text); d++) {
    int64_t at = wn_dataset_document_start(from->text, d), end = wn_dataset_document_start(from->text, d + 1);
    out->tokens += end - at;
    for (int64_t n; at < end; at += n) {
      n = end - at < COPY_PIECE ? end - at : COPY_PIECE;
      wn_dataset_copy(from->text, at, n, from->piece, NULL);
      WN_TRY(wn_dataset_writer_append(writer, from->piece, NULL, n));
    }
    WN_TRY(wn_dataset_writer_end_document(writer));
    out->documents++;
  }
  return NULL;
}

static wn_status pack_copies(wn_pack_result *out, const wn_dataset *text, const wn_tokenizer *tokenizer,
                             const wn_pack_settings *s) {
  int64_t length = s->copy_document_tokens, words = out->tokens - out->documents;
  if (words < length)
    return WN_FAIL_HINT(WN_E_INPUT, "give more text or shorter copy documents",
                        "the text has %" PRId64 " tokens, one copy document needs %" PRId64, words, length);
  double share = s->copy_share, wanted = (share < 1 ? share / (1 - share) : 1) * (double)out->tokens / (double)length;
  if (wanted * (double)length > 1e15)
    return WN_FAIL(WN_E_USAGE, "a share of %.17g would need %g copy documents; 1 means nothing else", share, wanted);
  int64_t n = llround(wanted) > 1 ? llround(wanted) : 1;
  wn_dataset_writer *writer = NULL;
  wn_status status = NULL;
  stretch *from = calloc(1, sizeof *from);
  if (!from) return WN_FAIL(WN_E_MEMORY, "out of memory making copy documents");
  *from = (stretch){.text = text, .end_of_document = wn_tokenizer_end_of_document(tokenizer)};
  *out = (wn_pack_result){.bytes = out->bytes};
  WN_TRY_GOTO(status, done, wn_dataset_writer_create(&writer, s->prefix, wn_tokenizer_vocab_size(tokenizer), true));
  WN_TRY_GOTO(status, done, add_copies(out, s, from, n, writer));
  if (share < 1) WN_TRY_GOTO(status, done, add_documents(out, from, writer));
done:
  if (writer) WN_KEEP_FIRST(status, wn_dataset_writer_close(writer, status == NULL));
  free(from);
  return status;
}

static void remove_dataset(const char *prefix) {
  static const char *const suffixes[] = {"bin", "idx"};
  char path[WN_PATH_BYTES + 8];
  for (int i = 0; i < 2; i++) {
    snprintf(path, sizeof path, "%s.%s", prefix, suffixes[i]);
    unlink(path);
  }
}

wn_status wn_pack(wn_pack_result *out, wn_tokenizer *tokenizer, const wn_pack_settings *s, wn_log *log) {
  WN_TRY(check_settings(s));
  if (s->copy_share == 0) return pack_text(out, tokenizer, s, s->prefix, log);
  /* copies are drawn from all of the text: it is packed once beside the output, then read at random places */
  char prefix[WN_PATH_BYTES];
  wn_dataset *text = NULL;
  wn_status status = NULL;
  WN_TRY(wn_path(prefix, "%s.text", s->prefix));
  WN_TRY(pack_text(out, tokenizer, s, prefix, log));
  WN_TRY_GOTO(status, done, wn_dataset_open(&text, prefix));
  WN_TRY_GOTO(status, done, pack_copies(out, text, tokenizer, s));
done:
  wn_dataset_close(text);
  remove_dataset(prefix);
  return status;
}
