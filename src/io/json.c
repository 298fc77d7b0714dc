#include "io/json.h"

#include <stdlib.h>

#include "io/files.h"

wn_status wn_json_load(json_t **out, const char *path, size_t most_bytes, wn_code code) {
  char *text = NULL;
  size_t bytes = 0;
  json_error_t error;
  *out = NULL;
  WN_TRY(wn_read_file(&text, &bytes, path, most_bytes));
  *out = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
  free(text);
  return *out ? NULL : WN_FAIL(code, "%s:%d: bad JSON: %s", path, error.line, error.text);
}
