/* Messages to a person: on standard error, and copied to a file once a run directory exists. Rank 0 speaks;
 * other ranks only warn. A progress line is redrawn in place on a terminal and printed plainly elsewhere. */
#ifndef WN_BASE_LOG_H
#define WN_BASE_LOG_H

#include <stdbool.h>

#include "base/status.h"

typedef struct wn_log wn_log;

typedef struct wn_log_settings {
  int rank;
  bool quiet; /* warnings and errors only */
} wn_log_settings;

WN_MUST_USE wn_status wn_log_create(wn_log **out, wn_log_settings settings);
void wn_log_free(wn_log *log);
/* Appends everything from now on to `path` as well (plain, dated). WN_E_IO. */
WN_MUST_USE wn_status wn_log_open_file(wn_log *log, const char *path);

/* `log` may be NULL everywhere below: then nothing is said. */
bool wn_log_terminal(const wn_log *log); /* a progress line is redrawn in place */
void wn_info(wn_log *log, const char *format, ...) WN_PRINTF(2, 3);
void wn_warn(wn_log *log, const char *format, ...) WN_PRINTF(2, 3);
/* The progress line; on a terminal it replaces the previous one. */
void wn_progress(wn_log *log, const char *format, ...) WN_PRINTF(2, 3);
/* The error's sentence, hint and, in the file, its trail. Does not free it. */
void wn_report_error(wn_log *log, wn_status status);

#endif
