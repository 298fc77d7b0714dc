#include "base/meter.h"

#include <stdio.h>
#include <string.h>

#include "base/time.h"

enum { BAR_WIDTH = 30 };
static const double QUIET_S = 0.5, EVERY_S = 0.1, MOST_LEFT_S = 59999;

void wn_meter_start(wn_meter *meter, wn_log *log, const char *what, int64_t total_bytes) {
  double now = wn_time_s();
  *meter = (wn_meter){.log = log, .what = what, .total_bytes = total_bytes, .started_s = now, .shown_s = now + QUIET_S};
}

void wn_meter_text(const wn_meter *meter, double now_s, bool bar, char text[WN_METER_TEXT_BYTES]) {
  double share = meter->total_bytes > 0 ? (double)meter->done_bytes / (double)meter->total_bytes : 1;
  double spent_s = now_s - meter->started_s, rate = spent_s > 0 ? (double)meter->done_bytes / spent_s : 0;
  double left_s = rate > 0 ? (double)(meter->total_bytes - meter->done_bytes) / rate : 0;
  if (left_s > MOST_LEFT_S) left_s = MOST_LEFT_S;
  char drawn[BAR_WIDTH + 4] = "";
  if (bar) {
    int full = (int)(share * BAR_WIDTH);
    memset(drawn, ' ', BAR_WIDTH + 3);
    drawn[1] = '[';
    memset(drawn + 2, '=', (size_t)full);
    drawn[BAR_WIDTH + 2] = ']';
  }
  snprintf(text, WN_METER_TEXT_BYTES, "%s%s %3d%%  %.2f of %.2f GB  %.2f GB/s  ETA %d:%02d", meter->what, drawn,
           (int)(share * 100), (double)meter->done_bytes * 1e-9, (double)meter->total_bytes * 1e-9, rate * 1e-9,
           (int)(left_s / 60), (int)left_s % 60);
}

void wn_meter_add(wn_meter *meter, int64_t bytes) {
  char text[WN_METER_TEXT_BYTES];
  double now = wn_time_s();
  meter->done_bytes += bytes;
  WN_ASSERT(meter->done_bytes <= meter->total_bytes, "%s: %lld bytes of %lld", meter->what,
            (long long)meter->done_bytes, (long long)meter->total_bytes);
  if (now - meter->shown_s < EVERY_S) return;
  meter->shown_s = now;
  wn_meter_text(meter, now, wn_log_terminal(meter->log), text);
  wn_progress(meter->log, "%s", text);
}

void wn_meter_end(wn_meter *meter) {
  double spent_s = wn_time_s() - meter->started_s;
  wn_info(meter->log, "%s: %.2f GB in %.2f s (%.2f GB/s)", meter->what, (double)meter->done_bytes * 1e-9, spent_s,
          spent_s > 0 ? (double)meter->done_bytes / spent_s * 1e-9 : 0);
}
