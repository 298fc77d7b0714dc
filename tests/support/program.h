/* The built program, run as a user runs it: a process of its own, under mpirun for several ranks, its words and its end
 * captured. Where it lies: $WINNOW, else build/winnow. */
#ifndef WN_TEST_PROGRAM_H
#define WN_TEST_PROGRAM_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "base/status.h"

enum { WN_PROGRAM_TEXT_BYTES = 32768, WN_PROGRAM_SAYS = 1024 };

typedef struct wn_program {
  int code; /* exit code, or minus the signal that ended it */
  double seconds;
  int64_t peak_kib; /* largest resident size of the process itself (of mpirun, not of its ranks) */
  char out[WN_PROGRAM_TEXT_BYTES], err[WN_PROGRAM_TEXT_BYTES]; /* the beginnings */
} wn_program;

/* A command under way. */
typedef struct wn_running {
  pid_t pid;
  int out, err; /* unlinked files */
  double started_s;
} wn_running;

/* `format`: the words of the command line, apart by blanks (none may hold one). Nothing goes through a shell. The
 * program gets one thread a rank unless `threads=` says otherwise. A command that cannot be started fails the test. */
wn_running wn_winnow_start(int32_t ranks, const char *format, ...) WN_PRINTF(2, 3);
wn_running wn_command_start(int32_t ranks, const char *program, const char *format, ...) WN_PRINTF(3, 4);
void wn_winnow_wait(wn_running running, wn_program *out); /* killed after two minutes */
void wn_winnow(wn_program *out, int32_t ranks, const char *format, ...) WN_PRINTF(3, 4);
/* Fails the test, with what the program said, unless it ends with `code`. */
void wn_winnow_ends(int code, int32_t ranks, const char *format, ...) WN_PRINTF(3, 4);

/* The program refuses: exit code `code`; on standard error exactly one sentence, which holds `part`, and at most one
 * hint; nothing on standard output. Warnings may stand before it. */
void wn_winnow_refuses(int code, const char *part, const char *format, ...) WN_PRINTF(3, 4);

/* Runs it (one rank) and kills it, as by kill -9, where its main thread is about to make its change number `nth` (from
 * 0) of the file system: create, write, sync, link, rename, remove. *made (may be NULL): how many it had made. False:
 * it came to its end before (with code 0, else the test fails). Skips the test where the system forbids tracing. */
bool wn_winnow_killed_at(int64_t nth, int64_t *made, const char *format, ...) WN_PRINTF(3, 4);

/* Waits until a path exists, or the text file `path` has `lines` whole lines; fails the test when the program ends
 * before, or after a minute. */
void wn_wait_for_path(const wn_running *running, const char *path);
void wn_wait_for_lines(const wn_running *running, const char *path, int64_t lines);

/* Processes whose parent is `pid`: the ranks below an mpirun. Returns how many, at most n. */
int32_t wn_children(pid_t pid, pid_t *out, int32_t n);

#endif
