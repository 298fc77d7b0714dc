#include "base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/time.h"

struct wn_log {
  wn_log_settings settings;
  bool terminal, color, line_open; /* line_open: a progress line stands without its newline */
  double last_progress_s;
  FILE *file;
};

wn_status wn_log_create(wn_log **out, wn_log_settings settings) {
  wn_log *log = calloc(1, sizeof *log);
  if (!log) return WN_FAIL(WN_E_MEMORY, "out of memory for the log");
  const char *no_color = getenv("NO_COLOR");
  log->settings = settings;
  log->terminal = isatty(STDERR_FILENO) == 1;
  log->color = log->terminal && !(no_color && no_color[0]);
  *out = log;
  return NULL;
}

void wn_log_free(wn_log *log) {
  if (!log) return;
  if (log->line_open) fputc('\n', stderr);
  if (log->file) fclose(log->file);
  free(log);
}

wn_status wn_log_open_file(wn_log *log, const char *path) {
  if (!log) return NULL;
  FILE *file = fopen(path, "a");
  if (!file) return WN_FAIL(WN_E_IO, "cannot open %s: %s", path, strerror(errno));
  if (log->file) fclose(log->file);
  log->file = file;
  return NULL;
}

bool wn_log_terminal(const wn_log *log) {
  return log && log->terminal;
}

typedef enum kind { INFO, WARN, PROGRESS, ERROR_LINE } kind;

enum { PLAIN_PROGRESS_S = 5 }; /* off a terminal, progress lines come at most this often */

static void say(wn_log *log, kind k, const char *text) {
  bool loud = k == WARN || k == ERROR_LINE;
  if (k == PROGRESS && !log->terminal) {
    double now = wn_time_s();
    if (now - log->last_progress_s < PLAIN_PROGRESS_S) return;
    log->last_progress_s = now;
  }
  if (log->file) {
    char when[32];
    wn_time_utc(when);
    fprintf(log->file, "%s %s%s\n", when, k == WARN ? "warning: " : k == ERROR_LINE ? "error: " : "", text);
    fflush(log->file);
  }
  if (!loud && (log->settings.quiet || log->settings.rank != 0)) return;
  if (log->line_open) fputs(log->terminal ? "\r\033[K" : "\n", stderr);
  log->line_open = false;
  const char *head = k == WARN ? "warning: " : k == ERROR_LINE ? "winnow: " : "";
  const char *on = log->color && loud ? (k == WARN ? "\033[33m" : "\033[31m") : "", *off = on[0] ? "\033[0m" : "";
  fprintf(stderr, "%s%s%s%s", on, head, off, text);
  if (k == PROGRESS && log->terminal)
    log->line_open = true;
  else
    fputc('\n', stderr);
  fflush(stderr);
}

#define SAY(log, k)                                                                                                    \
  do {                                                                                                                 \
    if (!(log)) return;                                                                                                \
    char text[2048];                                                                                                   \
    va_list args;                                                                                                      \
    va_start(args, format);                                                                                            \
    vsnprintf(text, sizeof text, format, args);                                                                        \
    va_end(args);                                                                                                      \
    say(log, k, text);                                                                                                 \
  } while (0)

void wn_info(wn_log *log, const char *format, ...) {
  SAY(log, INFO);
}
void wn_warn(wn_log *log, const char *format, ...) {
  SAY(log, WARN);
}
void wn_progress(wn_log *log, const char *format, ...) {
  SAY(log, PROGRESS);
}

void wn_report_error(wn_log *log, wn_status status) {
  if (!log || !status) return;
  say(log, ERROR_LINE, wn_status_text(status));
  if (wn_status_hint(status)[0]) {
    char text[600];
    snprintf(text, sizeof text, "hint: %s", wn_status_hint(status));
    say(log, ERROR_LINE, text);
  }
  if (log->file) {
    fprintf(log->file, "  at %s\n", wn_status_trace(status));
    fflush(log->file);
  }
}
