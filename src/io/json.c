#include "io/json.h"

#include <stdlib.h>
#include <string.h>

#include "io/files.h"

bool wn_json_modest(const char *text, size_t bytes) {
  size_t commas = 0;
#pragma omp simd reduction(+ : commas)
  for (size_t i = 0; i < bytes; i++) commas += text[i] == ',';
  return commas <= WN_JSON_MOST_VALUES;
}

wn_status wn_json_load(json_t **out, const char *path, size_t most_bytes, wn_code code) {
  char *text = NULL;
  size_t bytes = 0;
  json_error_t error;
  *out = NULL;
  WN_TRY(wn_read_file(&text, &bytes, path, most_bytes));
  if (!wn_json_modest(text, bytes)) {
    free(text);
    return WN_FAIL(code, "%s holds more than %d values", path, WN_JSON_MOST_VALUES);
  }
  *out = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
  free(text);
  return *out ? NULL : WN_FAIL(code, "%s:%d: bad JSON: %s", path, error.line, error.text);
}

wn_status wn_json_write(const json_t *root, const char *path, size_t flags) {
  char *text = root ? json_dumps(root, flags) : NULL;
  wn_status status =
      text ? wn_write_file_atomic(path, text, strlen(text)) : WN_FAIL(WN_E_MEMORY, "out of memory writing %s", path);
  free(text);
  return status;
}
