#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TEXT_BYTES = 1024, HINT_BYTES = 512, TRACE_BYTES = 1024 };

struct wn_error {
  wn_code code;
  char text[TEXT_BYTES];
  char hint[HINT_BYTES];
  char trace[TRACE_BYTES];
};

/* What stands in when there is no memory for an error of its own; never written to, never freed. */
static const struct wn_error out_of_memory = {WN_E_MEMORY, "out of memory while reporting an error", "", ""};

static int is_static(wn_status status) {
  return status == (wn_status)(size_t)&out_of_memory;
}

static const char *base_name(const char *file) {
  const char *slash = strrchr(file, '/');
  return slash ? slash + 1 : file;
}

/* Names out of hostile files end up in sentences: a sentence is one line, and commands no terminal. */
static void replace_control_characters(char *text) {
  for (; *text; text++)
    if ((unsigned char)*text < 0x20 || *text == 0x7f) *text = '?';
}

wn_status wn_fail_at(const char *file, int line, wn_code code, const char *hint, const char *format, ...) {
  struct wn_error *error = calloc(1, sizeof *error);
  if (!error) return (wn_status)(size_t)&out_of_memory;
  error->code = code;
  va_list args;
  va_start(args, format);
  vsnprintf(error->text, sizeof error->text, format, args);
  va_end(args);
  replace_control_characters(error->text);
  if (hint) snprintf(error->hint, sizeof error->hint, "%s", hint);
  snprintf(error->trace, sizeof error->trace, "%s:%d", base_name(file), line);
  return error;
}

wn_status wn_status_trail(wn_status status, const char *file, int line) {
  if (!status || is_static(status)) return status;
  size_t used = strlen(status->trace);
  snprintf(status->trace + used, sizeof status->trace - used, " < %s:%d", base_name(file), line);
  return status;
}

wn_status wn_status_prefix(wn_status status, const char *format, ...) {
  if (!status || is_static(status)) return status;
  char text[TEXT_BYTES];
  va_list args;
  va_start(args, format);
  int used = vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (used >= 0 && used < TEXT_BYTES) {
    replace_control_characters(text);
    snprintf(text + used, sizeof text - (size_t)used, ": %.*s", TEXT_BYTES - used, status->text);
    memcpy(status->text, text, sizeof text);
  }
  return status;
}

wn_status wn_status_first(wn_status first, wn_status second) {
  if (!first) return second;
  wn_status_free(second);
  return first;
}

wn_code wn_status_code(wn_status status) {
  return status ? status->code : WN_OK;
}
const char *wn_status_text(wn_status status) {
  return status ? status->text : "";
}
const char *wn_status_hint(wn_status status) {
  return status ? status->hint : "";
}
const char *wn_status_trace(wn_status status) {
  return status ? status->trace : "";
}

void wn_status_free(wn_status status) {
  if (status && !is_static(status)) free(status);
}

void wn_assert_failed(const char *file, int line, const char *condition, const char *format, ...) {
  fprintf(stderr, "winnow: internal error at %s:%d: %s: ", file, line, condition);
  va_list args;
  va_start(args, format);
  vfprintf(stderr, format, args);
  va_end(args);
  fputc('\n', stderr);
  abort();
}
