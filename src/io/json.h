/* A JSON file, whole and strict. */
#ifndef WN_IO_JSON_H
#define WN_IO_JSON_H

#include <jansson.h>
#include <stddef.h>

#include "base/status.h"

/* Reads a file of at most most_bytes, which holds one JSON value without duplicate keys; the caller releases it with
 * json_decref. `code`, naming file and line, when it is not JSON; WN_E_IO; WN_E_INPUT when it is too long. */
WN_MUST_USE wn_status wn_json_load(json_t **out, const char *path, size_t most_bytes, wn_code code);

#endif
