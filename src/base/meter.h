/* How far a long copy or read has come: a bar on a terminal, a line now and then elsewhere, and one line at the end. */
#ifndef WN_BASE_METER_H
#define WN_BASE_METER_H

#include <stdint.h>

#include "base/log.h"

typedef struct wn_meter {
  wn_log *log;
  const char *what; /* "reading weights" */
  int64_t total_bytes, done_bytes;
  double started_s, shown_s;
} wn_meter;

/* `log` may be NULL; `what` is not copied. Nothing is drawn in the first half second. */
void wn_meter_start(wn_meter *meter, wn_log *log, const char *what, int64_t total_bytes);
void wn_meter_add(wn_meter *meter, int64_t bytes);
/* Says, as any message, "reading weights: 12.34 GB in 3.2 s (3.86 GB/s)". */
void wn_meter_end(wn_meter *meter);

/* The progress line, at `now_s`: "reading weights  42%  5.18 of 12.34 GB  3.86 GB/s  ETA 0:02", with a bar behind the
 * words where `bar`. */
enum { WN_METER_TEXT_BYTES = 200 };
void wn_meter_text(const wn_meter *meter, double now_s, bool bar, char text[WN_METER_TEXT_BYTES]);

#endif
