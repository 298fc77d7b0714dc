/* A job file as a flat list of dotted keys with their lines: strict mappings of scalars, nothing else (libyaml). */
#ifndef WN_IO_YAML_H
#define WN_IO_YAML_H

#include <stdint.h>

#include "base/status.h"

typedef struct wn_yaml_entry {
  char *key, *value;
  int32_t line;
} wn_yaml_entry; /* "data.seq_len", "512", 7 */
typedef struct wn_yaml {
  wn_yaml_entry *entries;
  int32_t n;
} wn_yaml;

/* Refuses, naming file and line: syntax errors, sequences, anchors, aliases, tags, several documents, non-scalar keys,
 * keys without a value (or null), empty sections, duplicate keys, nesting deeper than two. WN_E_CONFIG. A file without
 * content has no entries. */
WN_MUST_USE wn_status wn_yaml_load(wn_yaml *out, const char *path);
void wn_yaml_free(wn_yaml *yaml);

#endif
