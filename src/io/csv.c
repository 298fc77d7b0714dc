/* A row is collected in memory and written by one call, so that a kill leaves at most one torn row, at the end. A torn
 * row is one without its line end; whoever opens or cuts the table drops it. */
#include "io/csv.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/files.h"

enum { FIRST_ROW_BYTES = 4096 };
static const size_t most_table_bytes = (size_t)16 << 30;

struct wn_csv {
  char *path;
  int fd;
  int32_t n_columns, cells; /* cells: of the row being collected */
  char *row;
  size_t row_bytes, row_room;
  bool out_of_memory; /* seen while collecting; reported by end_row */
};

static void append(wn_csv *csv, const char *text, size_t bytes) {
  if (csv->row_bytes + bytes > csv->row_room) {
    size_t room = csv->row_room ? csv->row_room : FIRST_ROW_BYTES;
    while (room < csv->row_bytes + bytes) room *= 2;
    char *grown = realloc(csv->row, room);
    if (!grown) {
      csv->out_of_memory = true;
      return;
    }
    csv->row = grown;
    csv->row_room = room;
  }
  memcpy(csv->row + csv->row_bytes, text, bytes);
  csv->row_bytes += bytes;
}

static void begin_cell(wn_csv *csv) {
  if (csv->cells++ > 0) append(csv, ",", 1);
}

void wn_csv_int(wn_csv *csv, int64_t value) {
  char text[32];
  begin_cell(csv);
  append(csv, text, (size_t)snprintf(text, sizeof text, "%" PRId64, value));
}

void wn_csv_real(wn_csv *csv, double value) {
  char text[32];
  begin_cell(csv);
  if (!isnan(value)) append(csv, text, (size_t)snprintf(text, sizeof text, "%.9g", value));
}

void wn_csv_text(wn_csv *csv, const char *value) {
  begin_cell(csv);
  if (!strpbrk(value, ",\"\r\n")) {
    append(csv, value, strlen(value));
    return;
  }
  append(csv, "\"", 1);
  for (const char *at = value; *at; at++) append(csv, *at == '"' ? "\"\"" : at, *at == '"' ? 2 : 1);
  append(csv, "\"", 1);
}

/* One write: a file opened for append takes it whole or, on a full disk, in part, which is cut off again. */
static wn_status write_row(wn_csv *csv) {
  off_t end = lseek(csv->fd, 0, SEEK_END);
  size_t done = 0;
  while (done < csv->row_bytes) {
    ssize_t took = write(csv->fd, csv->row + done, csv->row_bytes - done);
    if (took < 0 && errno == EINTR) continue;
    if (took <= 0) {
      int reason = errno;
      if (done > 0 && ftruncate(csv->fd, end) != 0) reason = errno;
      return WN_FAIL(WN_E_IO, "cannot write %s: %s", csv->path, strerror(reason));
    }
    done += (size_t)took;
  }
  return NULL;
}

wn_status wn_csv_end_row(wn_csv *csv) {
  WN_ASSERT(csv->cells == csv->n_columns, "%s: %d cells in a row of %d", csv->path, (int)csv->cells,
            (int)csv->n_columns);
  append(csv, "\n", 1);
  wn_status status = csv->out_of_memory ? WN_FAIL(WN_E_MEMORY, "out of memory writing %s", csv->path) : write_row(csv);
  csv->cells = 0;
  csv->row_bytes = 0;
  csv->out_of_memory = false;
  return status;
}

/* The record that begins at `at`: its bytes, line end included; 0 when it has no line end (torn, or the end). */
static size_t record_bytes(const char *at, const char *end) {
  bool quoted = false;
  for (const char *c = at; c < end; c++) {
    if (*c == '"') quoted = !quoted;
    if (*c == '\n' && !quoted) return (size_t)(c - at) + 1;
  }
  return 0;
}

/* Cell `column` of a record, as it is written, without copying. */
static const char *cell(const char *at, size_t record, int32_t column, size_t *bytes) {
  const char *end = at + record - 1, *from = at;
  bool quoted = false;
  if (end > at && end[-1] == '\r') end--;
  for (const char *c = at; c <= end; c++) {
    if (c < end && *c == '"') quoted = !quoted;
    if (c < end && (*c != ',' || quoted)) continue;
    if (column-- == 0) {
      *bytes = (size_t)(c - from);
      return from;
    }
    from = c + 1;
  }
  return NULL;
}

/* The header as this table would write it, in the row buffer; nothing is left there by end_row. */
static void collect_header(wn_csv *csv, const char *const *columns) {
  for (int32_t i = 0; i < csv->n_columns; i++) wn_csv_text(csv, columns[i]);
}

/* Compares the header, and drops a torn last row. `text` is the file. */
static wn_status adopt(wn_csv *csv, const char *text, size_t bytes) {
  size_t header = record_bytes(text, text + bytes), kept = 0, record;
  if (header == 0) { /* a kill before the header was out, which is then a beginning of it */
    if (bytes > csv->row_bytes || memcmp(text, csv->row, bytes) != 0)
      return WN_FAIL(WN_E_INPUT, "%s is not a table of this kind: it has no header line", csv->path);
    if (ftruncate(csv->fd, 0) != 0) return WN_FAIL(WN_E_IO, "cannot cut %s: %s", csv->path, strerror(errno));
    return wn_csv_end_row(csv);
  }
  if (header - 1 != csv->row_bytes || memcmp(text, csv->row, csv->row_bytes) != 0)
    return WN_FAIL_HINT(WN_E_INPUT, "move the file away; another version may have written it",
                        "%s has the columns %.*s; expected %.*s", csv->path, (int)(header - 1 < 300 ? header - 1 : 300),
                        text, (int)(csv->row_bytes < 300 ? csv->row_bytes : 300), csv->row);
  csv->row_bytes = 0;
  csv->cells = 0;
  while ((record = record_bytes(text + kept, text + bytes)) > 0) kept += record;
  if (kept < bytes && ftruncate(csv->fd, (off_t)kept) != 0)
    return WN_FAIL(WN_E_IO, "cannot cut %s: %s", csv->path, strerror(errno));
  return NULL;
}

wn_status wn_csv_open(wn_csv **out, const char *path, const char *const *columns, int32_t n_columns) {
  wn_status status = NULL;
  char *text = NULL;
  size_t bytes = 0;
  *out = NULL;
  wn_csv *csv = calloc(1, sizeof *csv);
  if (!csv) return WN_FAIL(WN_E_MEMORY, "out of memory opening %s", path);
  csv->n_columns = n_columns;
  csv->path = strdup(path);
  csv->fd = csv->path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666) : -1;
  if (csv->fd < 0) {
    status = csv->path ? WN_FAIL(WN_E_IO, "cannot open %s: %s", path, strerror(errno))
                       : WN_FAIL(WN_E_MEMORY, "out of memory opening %s", path);
    goto fail;
  }
  WN_TRY_GOTO(status, fail, wn_read_file(&text, &bytes, path, most_table_bytes));
  collect_header(csv, columns);
  if (csv->out_of_memory) {
    status = WN_FAIL(WN_E_MEMORY, "out of memory opening %s", path);
    goto fail;
  }
  if (bytes == 0)
    WN_TRY_GOTO(status, fail, wn_csv_end_row(csv));
  else
    WN_TRY_GOTO(status, fail, adopt(csv, text, bytes));
  free(text);
  *out = csv;
  return NULL;
fail:
  free(text);
  if (csv->fd >= 0) close(csv->fd);
  free(csv->row);
  free(csv->path);
  free(csv);
  return status;
}

wn_status wn_csv_close(wn_csv *csv) {
  if (!csv) return NULL;
  wn_status status = NULL;
  if (close(csv->fd) != 0) status = WN_FAIL(WN_E_IO, "cannot close %s: %s", csv->path, strerror(errno));
  free(csv->row);
  free(csv->path);
  free(csv);
  return status;
}

static int32_t find_column(const char *text, size_t header, const char *name) {
  const char *at;
  size_t bytes;
  for (int32_t i = 0; (at = cell(text, header, i, &bytes)); i++)
    if (bytes == strlen(name) && !memcmp(at, name, bytes)) return i;
  return -1;
}

static bool cell_as_int(const char *text, size_t record, int32_t column, int64_t *out) {
  char digits[32], *end;
  size_t bytes;
  const char *at = cell(text, record, column, &bytes);
  if (!at || bytes == 0 || bytes >= sizeof digits) return false;
  memcpy(digits, at, bytes);
  digits[bytes] = 0;
  errno = 0;
  *out = strtoll(digits, &end, 10);
  return *end == 0 && errno == 0;
}

/* Moves the rows to keep to the front of `text`; *kept is their length. */
static wn_status keep_rows(char *text, size_t bytes, size_t *kept, const char *path, const char *column, int64_t last) {
  size_t header = record_bytes(text, text + bytes), at = header, record;
  int line = 1;
  *kept = header;
  if (header == 0) return NULL; /* nothing but a torn header */
  int32_t index = find_column(text, header, column);
  if (index < 0) return WN_FAIL(WN_E_INPUT, "%s has no column %s", path, column);
  for (; (record = record_bytes(text + at, text + bytes)) > 0; at += record) {
    int64_t value;
    line++;
    if (!cell_as_int(text + at, record, index, &value))
      return WN_FAIL(WN_E_INPUT, "%s: row %d has no whole number in column %s", path, line, column);
    if (value > last) continue;
    memmove(text + *kept, text + at, record);
    *kept += record;
  }
  return NULL;
}

wn_status wn_csv_cut(const char *path, const char *column, int64_t last) {
  char *text = NULL;
  size_t bytes = 0, kept = 0;
  if (!wn_path_exists(path)) return NULL;
  WN_TRY(wn_read_file(&text, &bytes, path, most_table_bytes));
  wn_status status = keep_rows(text, bytes, &kept, path, column, last);
  if (!status && kept != bytes) status = wn_write_file_atomic(path, text, kept);
  free(text);
  return wn_status_trail(status, __FILE__, __LINE__);
}
