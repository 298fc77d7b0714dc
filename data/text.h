/* A text file as a stream of pieces of at most WN_TEXT_PIECE_BYTES, cut into documents at separator lines. Any bytes
 * are text: NUL and invalid UTF-8 pass through. */
#ifndef WN_DATA_TEXT_H
#define WN_DATA_TEXT_H

#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

enum { WN_TEXT_PIECE_BYTES = 1 << 20, WN_TEXT_SEPARATOR_BYTES = 1024 };

typedef struct wn_text wn_text;

typedef struct wn_text_piece {
  const char *data; /* valid until the next call */
  size_t bytes;     /* may be 0 */
  bool ends_document;
} wn_text_piece;

/* `separator` NULL: the file is one document; else a line that equals it ("\n" or "\r\n" aside) ends one and belongs to
 * none. WN_E_IO; WN_E_USAGE for a separator that is empty, has a newline or WN_TEXT_SEPARATOR_BYTES and more. */
WN_MUST_USE wn_status wn_text_open(wn_text **out, const char *path, const char *separator);
void wn_text_close(wn_text *text); /* NULL is fine */
/* The next piece; *more false when there is none. A document longer than a piece is cut after an ASCII character that
 * is not white space and before one that is: no word of a tokenizer crosses such a place, so the ids are those of the
 * whole. Only where a whole piece has no such place (binary data, text without ASCII space) may they differ, at the
 * cut. The last piece of a file ends a document. */
WN_MUST_USE wn_status wn_text_next(wn_text *text, wn_text_piece *piece, bool *more);

#endif
