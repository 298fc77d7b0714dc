/* CSV tables as run directories hold them: one header line, RFC 4180 quoting, '.' decimals, 9 significant digits, lines
 * that end in '\n', written row by row. */
#ifndef WN_IO_CSV_H
#define WN_IO_CSV_H

#include <stdint.h>

#include "base/status.h"

typedef struct wn_csv wn_csv;

/* Opens for append, or creates with the header; a torn last line, such as a kill leaves, is dropped. WN_E_INPUT, naming
 * file and columns, when an existing file's header differs; WN_E_IO. `columns` are not kept. */
WN_MUST_USE wn_status wn_csv_open(wn_csv **out, const char *path, const char *const *columns, int32_t n_columns);
WN_MUST_USE wn_status wn_csv_close(wn_csv *csv); /* NULL is fine */
/* One cell after another; n_columns cells (asserted), then end_row, which hands the row to the system in one write. */
void wn_csv_int(wn_csv *csv, int64_t value);
void wn_csv_real(wn_csv *csv, double value); /* NaN is an empty cell; infinities are inf and -inf */
void wn_csv_text(wn_csv *csv, const char *value);
WN_MUST_USE wn_status
wn_csv_end_row(wn_csv *csv); /* WN_E_IO; then the row is not in the file, and the next may be tried */
/* Keeps the header and the rows whose integer column `column` is at most `last`; drops a torn last line. Atomic, and
 * the file is not touched where nothing changes. Fine when absent. WN_E_INPUT when a row has no such number. */
WN_MUST_USE wn_status wn_csv_cut(const char *path, const char *column, int64_t last);

#endif
