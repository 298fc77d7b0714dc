#include "data/text.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "io/files.h"

struct wn_text {
  FILE *file;
  char path[WN_PATH_BYTES], separator[WN_TEXT_SEPARATOR_BYTES];
  size_t separator_bytes; /* 0: none */
  char *buffer;           /* [WN_TEXT_PIECE_BYTES] */
  size_t from, to;        /* what is read and not yet given out */
  bool end_of_file, line_start /* buffer[from] begins a line */, finished;
};

wn_status wn_text_open(wn_text **out, const char *path, const char *separator) {
  wn_status status = NULL;
  size_t bytes = separator ? strlen(separator) : 0;
  if (separator && (bytes == 0 || bytes >= WN_TEXT_SEPARATOR_BYTES || strpbrk(separator, "\r\n")))
    return WN_FAIL(WN_E_USAGE, "a document separator is one line of 1 to %d bytes, not \"%.40s\"",
                   WN_TEXT_SEPARATOR_BYTES - 1, separator);
  wn_text *text = calloc(1, sizeof *text);
  if (text) text->buffer = malloc(WN_TEXT_PIECE_BYTES);
  if (!text || !text->buffer) {
    status = WN_FAIL(WN_E_MEMORY, "out of memory reading %s", path);
    goto failed;
  }
  WN_TRY_GOTO(status, failed, wn_path(text->path, "%s", path));
  text->file = fopen(path, "rb");
  if (!text->file) {
    status = WN_FAIL(WN_E_IO, "cannot open %s: %s", path, strerror(errno));
    goto failed;
  }
  if (separator) memcpy(text->separator, separator, bytes);
  text->separator_bytes = bytes;
  text->line_start = true;
  *out = text;
  return NULL;
failed:
  wn_text_close(text);
  return status;
}

void wn_text_close(wn_text *text) {
  if (!text) return;
  if (text->file) fclose(text->file);
  free(text->buffer);
  free(text);
}

static wn_status fill(wn_text *text) {
  memmove(text->buffer, text->buffer + text->from, text->to - text->from);
  text->to -= text->from;
  text->from = 0;
  while (!text->end_of_file && text->to < WN_TEXT_PIECE_BYTES) {
    size_t got = fread(text->buffer + text->to, 1, WN_TEXT_PIECE_BYTES - text->to, text->file);
    text->to += got;
    if (ferror(text->file)) return WN_FAIL(WN_E_IO, "cannot read %s: %s", text->path, strerror(errno));
    text->end_of_file = feof(text->file);
  }
  return NULL;
}

static bool is_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}

/* Where to cut buffer[from .. limit): see the header. */
static size_t cut_before(const wn_text *text, size_t limit) {
  const char *b = text->buffer;
  for (size_t i = limit - 1; i > text->from; i--)
    if (is_space(b[i]) && !is_space(b[i - 1]) && (unsigned char)b[i - 1] < 0x80) return i;
  size_t last = limit - 1; /* no such place: at least not within a UTF-8 character */
  while (last > text->from && limit - last < 4 && ((unsigned char)b[last] & 0xC0) == 0x80) last--;
  return last > text->from && (unsigned char)b[last] >= 0xC0 ? last : limit;
}

/* Looks through the lines of buffer[from .. to) for the separator. Found: *end is where it begins, *next where the line
 * after it does. Else *end is how far the text may be given out: not into an unfinished line that could still become
 * one. */
static bool find_separator(const wn_text *text, size_t *end, size_t *next) {
  const char *b = text->buffer;
  size_t line = text->from, n = text->separator_bytes;
  bool line_start = text->line_start;
  *end = text->to;
  while (n > 0 && line < text->to) {
    const char *newline = memchr(b + line, '\n', text->to - line);
    if (!newline && !text->end_of_file) {
      if (line_start && text->to - line <= n + 1) *end = line;
      return false;
    }
    size_t stop = newline ? (size_t)(newline - b) : text->to;
    size_t content = stop - line - (newline && stop > line && b[stop - 1] == '\r');
    if (line_start && content == n && memcmp(b + line, text->separator, n) == 0) {
      *end = line;
      *next = newline ? stop + 1 : stop;
      return true;
    }
    line = newline ? stop + 1 : stop;
    line_start = true;
  }
  return false;
}

wn_status wn_text_next(wn_text *text, wn_text_piece *piece, bool *more) {
  *more = !text->finished;
  if (text->finished) return NULL;
  WN_TRY(fill(text));
  size_t end, next;
  bool separated = find_separator(text, &end, &next);
  piece->ends_document = separated || text->end_of_file;
  if (!piece->ends_document)
    next = end = cut_before(text, end);
  else if (!separated)
    next = end;
  piece->data = text->buffer + text->from;
  piece->bytes = end - text->from;
  text->line_start = separated || (end > text->from && text->buffer[end - 1] == '\n');
  text->from = next;
  text->finished = text->end_of_file && text->from == text->to;
  return NULL;
}
