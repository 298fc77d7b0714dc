/* CSV tables as design.md fixes them: one header line, RFC 4180, '.' decimals, 9 significant digits, flushed per row. */
#ifndef WN_IO_CSV_H
#define WN_IO_CSV_H

#include <stdint.h>

#include "base/status.h"

typedef struct wn_csv wn_csv;

/* Opens for append, or creates with the header. An existing file whose header differs is refused by name. `columns` (names) must outlive the table. */
WN_MUST_USE wn_status wn_csv_open(wn_csv **out, const char *path, const char *const *columns, int32_t n_columns);
WN_MUST_USE wn_status wn_csv_close(wn_csv *csv);
/* One cell after another; n_columns cells, then end_row, which writes and flushes the row. */
void wn_csv_int(wn_csv *csv, int64_t value);
void wn_csv_real(wn_csv *csv, double value); /* NaN is an empty cell; infinities are inf and -inf */
void wn_csv_text(wn_csv *csv, const char *value);
void wn_csv_empty(wn_csv *csv);
WN_MUST_USE wn_status wn_csv_end_row(wn_csv *csv);
/* Keeps the header and the rows whose integer column `column` is at most `last`; drops a torn last line. Atomic. Fine when absent. */
WN_MUST_USE wn_status wn_csv_cut(const char *path, const char *column, int64_t last);

#endif
