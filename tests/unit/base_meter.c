#include "support/test.h"

#include <string.h>

#include "base/meter.h"

static void lines(void **state) {
  (void)state;
  wn_meter meter;
  char text[WN_METER_TEXT_BYTES];
  wn_meter_start(&meter, NULL, "reading weights", 4000000000);
  meter.started_s = 100;
  wn_meter_text(&meter, 100, false, text);
  assert_string_equal(text, "reading weights   0%  0.00 of 4.00 GB  0.00 GB/s  ETA 0:00");
  meter.done_bytes = 1000000000;
  wn_meter_text(&meter, 125, false, text);
  assert_string_equal(text, "reading weights  25%  1.00 of 4.00 GB  0.04 GB/s  ETA 1:15");
  wn_meter_text(&meter, 125, true, text);
  assert_string_equal(text,
                      "reading weights [=======                       ]  25%  1.00 of 4.00 GB  0.04 GB/s  ETA 1:15");
  meter.done_bytes = 4000000000;
  wn_meter_text(&meter, 200, true, text);
  assert_string_equal(text,
                      "reading weights [==============================] 100%  4.00 of 4.00 GB  0.04 GB/s  ETA 0:00");
  meter.done_bytes = 1; /* a first byte that took long says little */
  wn_meter_text(&meter, 200, false, text);
  assert_string_equal(text, "reading weights   0%  0.00 of 4.00 GB  0.00 GB/s  ETA 999:59");
  wn_meter_end(&meter); /* without a log nothing is said */
}

/* A total of nothing is all of it. */
static void nothing(void **state) {
  (void)state;
  wn_meter meter;
  char text[WN_METER_TEXT_BYTES];
  wn_meter_start(&meter, NULL, "reading weights", 0);
  wn_meter_text(&meter, meter.started_s, true, text);
  assert_non_null(strstr(text, "] 100%"));
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(lines), cmocka_unit_test(nothing)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
