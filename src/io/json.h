/* A JSON file, whole and strict. */
#ifndef WN_IO_JSON_H
#define WN_IO_JSON_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/status.h"

/* A parsed value takes up to some hundred times the memory of its text, so texts of more values than this, by their
 * commas, are not parsed. The index of a full-size model holds 100 thousand. */
enum { WN_JSON_MOST_VALUES = 4 << 20 };
bool wn_json_modest(const char *text, size_t bytes);

/* Reads a file of at most most_bytes, which holds one JSON value without duplicate keys; the caller releases it with
 * json_decref. `code`, naming file and line, when it is not JSON or not modest; WN_E_IO; WN_E_INPUT when it is too
 * long. */
WN_MUST_USE wn_status wn_json_load(json_t **out, const char *path, size_t most_bytes, wn_code code);
/* Writes `root` (NULL: it could not be made, WN_E_MEMORY) atomically, with jansson's flags. */
WN_MUST_USE wn_status wn_json_write(const json_t *root, const char *path, size_t flags);

#endif
