/* THE option table: everything a job file may say. Validation, --help, docs/options.md and config.resolved.yaml come
 * from it and from nowhere else. Internal to src/config and its tests. */
#ifndef WN_CONFIG_OPTIONS_H
#define WN_CONFIG_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "config/job.h"

typedef enum wn_option_type { WN_PATH, WN_INT32, WN_INT64, WN_UINT64, WN_REAL, WN_BOOL, WN_CHOICE } wn_option_type;

typedef struct wn_option {
  const char *key; /* "section.name", or a name at the top */
  wn_option_type type;
  size_t offset;              /* in wn_job */
  double low, high;           /* of numbers, inclusive; at most 2^53, so exact */
  bool above_low, below_high; /* a bound that itself is not allowed */
  const char *fallback;       /* the default as text, or another option's key when same_as; NULL: must be given */
  bool same_as;
  bool may_change;  /* on resume */
  const char *unit; /* NULL: none */
  const char *help;
  const char *const *choices; /* of WN_CHOICE: NULL-terminated; the index is the value */
} wn_option;

int32_t wn_option_count(void);
const wn_option *wn_option_at(int32_t i);
int32_t wn_option_index(const char *key);       /* -1: unknown */
const char *wn_option_nearest(const char *key); /* the known key of smallest edit distance, by whole key or last part */

/* Sets the option's field. WN_E_CONFIG: key, value seen, value allowed (the caller puts the place in front). */
WN_MUST_USE wn_status wn_option_parse(const wn_option *option, const char *text, wn_job *job);
/* The field as text that parses to the same value (a path as it is, unquoted). */
void wn_option_value(const wn_option *option, const wn_job *job, char out[WN_PATH_BYTES]);
/* "whole number, 1 to 256", "real number, above 0, up to 10", "cpu, cuda or auto"... */
void wn_option_allowed(const wn_option *option, char out[WN_PATH_BYTES]);

#endif
