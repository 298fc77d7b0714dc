/* Errors travel as values. A wn_status is NULL when all is well, else it owns an error: a code that becomes
 * the program's exit code, one sentence (what failed, value seen, value allowed), a hint, and the file:line
 * trail it came up by. Whoever receives one returns it, keeps it or frees it. Only main turns it into an exit. */
#ifndef WN_BASE_STATUS_H
#define WN_BASE_STATUS_H

#include <stddef.h>

typedef struct wn_error *wn_status;

/* The process's exit codes, documented in docs/guide.md. */
typedef enum wn_code {
  WN_OK = 0,
  WN_E_CHECK = 1,       /* a check the user asked for did not hold (verify, the demo's claims) */
  WN_E_USAGE = 2,       /* command line */
  WN_E_CONFIG = 3,      /* job file, config.json, option value, a stage that cannot follow */
  WN_E_INPUT = 4,       /* checkpoint, dataset, tokenizer: what a file holds */
  WN_E_IO = 5,          /* the operating system refused: open, read, write, rename, disk full */
  WN_E_MEMORY = 6,      /* does not fit */
  WN_E_DEVICE = 7,      /* the GPU or its driver */
  WN_E_WORLD = 8,       /* MPI, NCCL, another rank's failure */
  WN_E_TRAINING = 9,    /* training cannot go on (too many non-finite steps in a row) */
  WN_E_INTERRUPTED = 10 /* asked to stop by a signal; state was saved */
} wn_code;

#define WN_MUST_USE __attribute__((warn_unused_result))
#define WN_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))

/* Makes an error; control characters of its sentence become '?'. `hint` may be NULL. Never returns NULL (a static error
 * stands in when memory is out). */
WN_MUST_USE wn_status wn_fail_at(const char *file, int line, wn_code code, const char *hint, const char *format, ...)
    WN_PRINTF(5, 6);
/* Adds a trail entry; returns its argument. */
WN_MUST_USE wn_status wn_status_trail(wn_status status, const char *file, int line);
/* Puts a sentence in front: "reading shard 3: <old text>". Returns its argument. */
WN_MUST_USE wn_status wn_status_prefix(wn_status status, const char *format, ...) WN_PRINTF(2, 3);
/* Keeps `first` if it is an error (and frees `second`), else gives `second`. */
WN_MUST_USE wn_status wn_status_first(wn_status first, wn_status second);

wn_code wn_status_code(wn_status status);      /* WN_OK for NULL */
const char *wn_status_text(wn_status status);  /* "" for NULL */
const char *wn_status_hint(wn_status status);  /* "" when there is none */
const char *wn_status_trace(wn_status status); /* "file:line < file:line", innermost first */
void wn_status_free(wn_status status);         /* NULL is fine */

#define WN_FAIL(code, ...) wn_fail_at(__FILE__, __LINE__, (code), NULL, __VA_ARGS__)
#define WN_FAIL_HINT(code, hint, ...) wn_fail_at(__FILE__, __LINE__, (code), (hint), __VA_ARGS__)

#define WN_TRY(expression)                                                                                             \
  do {                                                                                                                 \
    wn_status wn_try_status_ = (expression);                                                                           \
    if (wn_try_status_) return wn_status_trail(wn_try_status_, __FILE__, __LINE__);                                    \
  } while (0)

/* For functions with one cleanup label: stores into `status` and jumps. */
#define WN_TRY_GOTO(status, label, expression)                                                                         \
  do {                                                                                                                 \
    (status) = (expression);                                                                                           \
    if (status) {                                                                                                      \
      (status) = wn_status_trail((status), __FILE__, __LINE__);                                                        \
      goto label;                                                                                                      \
    }                                                                                                                  \
  } while (0)

/* Runs the expression always; remembers only the first error (for cleanups and closes). */
#define WN_KEEP_FIRST(status, expression) ((status) = wn_status_first((status), (expression)))

/* Programmer errors, checked in release builds too. Never used on file contents or user input. */
#define WN_ASSERT(condition, ...)                                                                                      \
  do {                                                                                                                 \
    if (!(condition)) wn_assert_failed(__FILE__, __LINE__, #condition, __VA_ARGS__);                                   \
  } while (0)
__attribute__((noreturn)) void wn_assert_failed(const char *file, int line, const char *condition, const char *format,
                                                ...) WN_PRINTF(4, 5);

#endif
