/* Command-line flags from a declarative table, from which the command's --help comes too. */
#ifndef WN_CLI_FLAGS_H
#define WN_CLI_FLAGS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "config/job.h"

typedef enum wn_flag_kind {
  WN_FLAG_SWITCH, /* bool: present or not */
  WN_FLAG_INT,    /* int64_t */
  WN_FLAG_REAL,   /* double */
  WN_FLAG_TEXT,   /* const char * */
  WN_FLAG_RANGE   /* int64_t[2]: MIN:MAX, or one number for both */
} wn_flag_kind;

typedef struct wn_flag {
  const char *name; /* "--data" */
  wn_flag_kind kind;
  void *value;                 /* where it goes; holds the default */
  double least, most;          /* INT, REAL and RANGE: allowed values, both included; equal: anything */
  const char *argument, *help; /* "PREFIX", "dataset to read" */
} wn_flag;

/* --device auto|cpu|cuda into a const char *, for wn_flag_device. */
#define WN_FLAG_DEVICE(text)                                                                                           \
  {                                                                                                                    \
    .name = "--device", .kind = WN_FLAG_TEXT, .value = (text), .argument = "auto|cpu|cuda",                            \
    .help = "where it runs (default auto: a GPU where there is one)"                                                   \
  }
WN_MUST_USE wn_status wn_flag_device(wn_job_device *out, const char *text);

/* --threads N into an int64_t. */
#define WN_FLAG_THREADS(number, text)                                                                                  \
  {                                                                                                                    \
    .name = "--threads", .kind = WN_FLAG_INT, .value = (number), .least = 0, .most = 4096, .argument = "N",            \
    .help = (text)                                                                                                     \
  }

typedef struct wn_command_help {
  const char *usage, *about;
} wn_command_help;

/* Reads argv[1 ..]; what is not a flag is moved to the front of argv[1 ..] and counted in *n_positional. "--" ends
 * flags. "--help" prints and sets *helped. WN_E_USAGE: unknown flag (naming the nearest), missing or ill-typed or
 * out-of-range value. */
WN_MUST_USE wn_status wn_flags_parse(int argc, char **argv, const wn_flag *flags, int32_t n_flags,
                                     const wn_command_help *help, int32_t *n_positional, bool *helped);

#endif
