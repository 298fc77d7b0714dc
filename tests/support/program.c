#include "support/program.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/time.h"
#include "support/test.h"

enum { MOST_WORDS = 96, LINE_BYTES = 16384, PATIENCE_S = 120, CANNOT_TRACE = 126 };

/* A command line cut at blanks. */
typedef struct words {
  char text[LINE_BYTES];
  char *argv[MOST_WORDS + 1];
  int n;
} words;

static void add_words(words *w, const char *text) {
  size_t used = w->n ? (size_t)(w->argv[w->n - 1] - w->text) + strlen(w->argv[w->n - 1]) + 1 : 0;
  assert_true(used + strlen(text) < sizeof w->text);
  char *rest = w->text + used;
  memcpy(rest, text, strlen(text) + 1);
  for (char *word; (word = strsep(&rest, " "));) {
    if (!*word) continue;
    assert_true(w->n < MOST_WORDS);
    w->argv[w->n++] = word;
  }
}

static void command_line(words *w, int32_t ranks, const char *program, const char *arguments) {
  char launcher[96];
  snprintf(launcher, sizeof launcher, "mpirun --allow-run-as-root --oversubscribe -np %d", ranks);
  if (ranks > 1) add_words(w, launcher);
  add_words(w, program);
  add_words(w, arguments);
  w->argv[w->n] = NULL;
}

static int capture_file(void) {
  char path[] = "/tmp/wn-words-XXXXXX";
  int fd = mkstemp(path);
  assert_true(fd >= 0);
  unlink(path);
  return fd;
}

static void become(words *w, int out, int err, bool traced) {
  setenv("OMPI_MCA_mpi_yield_when_idle", "1", 1);
  setenv("OMPI_MCA_btl_vader_single_copy_mechanism", "none", 1);
  setenv("OMP_NUM_THREADS", "1", 1);
  prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0); /* huge pages would hide how much of a reservation is touched */
  int nothing = open("/dev/null", O_RDONLY);
  dup2(nothing, 0);
  dup2(out, 1);
  dup2(err, 2);
  if (traced && ptrace(PTRACE_TRACEME, 0, NULL, NULL) != 0) _exit(CANNOT_TRACE);
  execvp(w->argv[0], w->argv);
  dprintf(2, "cannot start %s: %s\n", w->argv[0], strerror(errno));
  _exit(127);
}

static wn_running start(int32_t ranks, const char *program, const char *arguments, bool traced) {
  words w = {.n = 0};
  command_line(&w, ranks, program, arguments);
  wn_running running = {.out = capture_file(), .err = capture_file(), .started_s = wn_time_s()};
  running.pid = fork();
  assert_true(running.pid >= 0);
  if (running.pid == 0) become(&w, running.out, running.err, traced);
  return running;
}

#define FORMAT_ARGUMENTS(text, format)                                                                                 \
  char text[LINE_BYTES];                                                                                               \
  do {                                                                                                                 \
    va_list args;                                                                                                      \
    va_start(args, format);                                                                                            \
    int length = vsnprintf(text, sizeof text, format, args);                                                           \
    va_end(args);                                                                                                      \
    assert_true(length >= 0 && (size_t)length < sizeof text);                                                          \
  } while (0)

static const char *winnow_path(void) {
  return getenv("WINNOW") ? getenv("WINNOW") : "build/winnow";
}

wn_running wn_winnow_start(int32_t ranks, const char *format, ...) {
  FORMAT_ARGUMENTS(text, format);
  return start(ranks, winnow_path(), text, false);
}

wn_running wn_command_start(int32_t ranks, const char *program, const char *format, ...) {
  FORMAT_ARGUMENTS(text, format);
  return start(ranks, program, text, false);
}

static void read_back(int fd, char text[WN_PROGRAM_TEXT_BYTES]) {
  ssize_t n = pread(fd, text, WN_PROGRAM_TEXT_BYTES - 1, 0);
  text[n > 0 ? n : 0] = 0;
  close(fd);
}

static void finish(wn_running running, int ended, int64_t peak_kib, wn_program *out) {
  out->code = WIFEXITED(ended) ? WEXITSTATUS(ended) : -WTERMSIG(ended);
  out->seconds = wn_time_s() - running.started_s;
  out->peak_kib = peak_kib;
  read_back(running.out, out->out);
  read_back(running.err, out->err);
  if (getenv("WINNOW_TEST_VERBOSE"))
    print_message("%.2f s, code %d\n%s%s", out->seconds, out->code, out->out, out->err);
}

void wn_winnow_wait(wn_running running, wn_program *out) {
  struct rusage usage;
  int ended;
  pid_t got;
  while ((got = wait4(running.pid, &ended, WNOHANG, &usage)) == 0) {
    if (wn_time_s() - running.started_s > PATIENCE_S) {
      kill(running.pid, SIGKILL);
      waitpid(running.pid, &ended, 0);
      fail_msg("the program did not end in %d s", PATIENCE_S);
    }
    usleep(500);
  }
  assert_int_equal(got, running.pid);
  finish(running, ended, usage.ru_maxrss, out);
}

void wn_winnow(wn_program *out, int32_t ranks, const char *format, ...) {
  FORMAT_ARGUMENTS(text, format);
  wn_winnow_wait(start(ranks, winnow_path(), text, false), out);
}

void wn_winnow_ends(int code, int32_t ranks, const char *format, ...) {
  FORMAT_ARGUMENTS(text, format);
  wn_program p;
  wn_winnow_wait(start(ranks, winnow_path(), text, false), &p);
  if (p.code != code) fail_msg("winnow %s\nended with %d, not %d: %s", text, p.code, code, p.err);
}

/* ---- refusals ---- */

void wn_winnow_refuses(int code, const char *part, const char *format, ...) {
  FORMAT_ARGUMENTS(text, format);
  char arguments[LINE_BYTES + 16];
  int sentences = 0, hints = 0, others = 0;
  wn_program p;
  snprintf(arguments, sizeof arguments, "--quiet %s", text);
  wn_winnow_wait(start(1, winnow_path(), arguments, false), &p);
  char copy[WN_PROGRAM_TEXT_BYTES], *rest = copy;
  memcpy(copy, p.err, sizeof copy);
  for (char *line; (line = strsep(&rest, "\n"));) {
    if (!*line || strncmp(line, "warning: ", 9) == 0) continue;
    if (strncmp(line, "winnow: hint: ", 14) == 0)
      hints++;
    else if (strncmp(line, "winnow: ", 8) == 0)
      sentences++;
    else
      others++;
  }
  if (p.code != code || sentences != 1 || hints > 1 || others || p.out[0] || !strstr(p.err, part))
    fail_msg(
        "winnow %s\nended with %d (wanted %d and one sentence with '%s')\nstandard error: %s\nstandard output: %.200s",
        text, p.code, code, part, p.err, p.out);
  if (getenv("WINNOW_TEST_REFUSALS")) print_message("%d  %s", p.code, p.err);
}

/* ---- death at a chosen point ---- */

static bool changes_files(uint64_t call, uint64_t second, uint64_t third) {
  switch (call) {
  case SYS_openat: return (third & O_CREAT) != 0;
#ifdef SYS_open
  case SYS_open: return (second & O_CREAT) != 0;
#endif
#ifdef SYS_rename
  case SYS_rename:
  case SYS_link:
  case SYS_symlink:
  case SYS_unlink:
  case SYS_mkdir:
  case SYS_rmdir:
#endif
  case SYS_renameat:
  case SYS_renameat2:
  case SYS_linkat:
  case SYS_symlinkat:
  case SYS_unlinkat:
  case SYS_mkdirat:
  case SYS_ftruncate:
  case SYS_pwrite64:
  case SYS_write:
  case SYS_fsync:
  case SYS_fdatasync: return true;
  default: return false;
  }
}

bool wn_winnow_killed_at(int64_t nth, int64_t *made, const char *format, ...) {
  FORMAT_ARGUMENTS(text, format);
  wn_running running = start(1, winnow_path(), text, true);
  int64_t seen = 0;
  int ended = 0, deliver = 0;
  bool killed = false;
  assert_int_equal(waitpid(running.pid, &ended, 0), running.pid);
  if (WIFEXITED(ended) && WEXITSTATUS(ended) == CANNOT_TRACE) {
    print_message("skipped: this system forbids tracing\n");
    skip();
  }
  assert_true(WIFSTOPPED(ended));
  ptrace(PTRACE_SETOPTIONS, running.pid, NULL,
         (void *)(uintptr_t)(PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL));
  for (;;) {
    ptrace(PTRACE_SYSCALL, running.pid, NULL, (void *)(uintptr_t)deliver);
    if (waitpid(running.pid, &ended, 0) < 0 || !WIFSTOPPED(ended)) break;
    bool at_call = WSTOPSIG(ended) == (SIGTRAP | 0x80);
    deliver = at_call || WSTOPSIG(ended) == SIGTRAP ? 0 : WSTOPSIG(ended);
    struct __ptrace_syscall_info info = {0};
    if (!at_call || ptrace(PTRACE_GET_SYSCALL_INFO, running.pid, sizeof info, &info) <= 0) continue;
    if (info.op != PTRACE_SYSCALL_INFO_ENTRY || !changes_files(info.entry.nr, info.entry.args[1], info.entry.args[2]))
      continue;
    if (seen++ < nth) continue;
    killed = true;
    kill(running.pid, SIGKILL);
    waitpid(running.pid, &ended, 0);
    break;
  }
  wn_program p;
  finish(running, ended, 0, &p);
  if (p.code != (killed ? -SIGKILL : 0)) fail_msg("winnow %s\nended with %d: %s", text, p.code, p.err);
  if (made) *made = killed ? seen - 1 : seen;
  return killed;
}

/* ---- waiting and watching ---- */

static int64_t whole_lines(const char *path) {
  int64_t lines = 0;
  FILE *file = fopen(path, "rb");
  for (int c; file && (c = fgetc(file)) != EOF;) lines += c == '\n';
  if (file) fclose(file);
  return lines;
}

static void wait_for(const wn_running *running, const char *path, int64_t lines) {
  struct stat info;
  for (;;) {
    if (stat(path, &info) == 0 && whole_lines(path) >= lines) return;
    siginfo_t end = {0};
    bool ended = waitid(P_PID, (id_t)running->pid, &end, WEXITED | WNOHANG | WNOWAIT) != 0 || end.si_pid != 0;
    if (ended) {
      char words_said[WN_PROGRAM_TEXT_BYTES];
      ssize_t n = pread(running->err, words_said, sizeof words_said - 1, 0);
      words_said[n > 0 ? n : 0] = 0;
      fail_msg("the program ended before %s was there: %s", path, words_said);
    }
    if (wn_time_s() - running->started_s > PATIENCE_S / 2) {
      kill(running->pid, SIGKILL);
      fail_msg("%s did not come", path);
    }
    usleep(200);
  }
}

void wn_wait_for_path(const wn_running *running, const char *path) {
  wait_for(running, path, 0);
}
void wn_wait_for_lines(const wn_running *running, const char *path, int64_t lines) {
  wait_for(running, path, lines);
}

int32_t wn_children(pid_t pid, pid_t *out, int32_t n) {
  char path[64];
  int32_t found = 0;
  long child;
  snprintf(path, sizeof path, "/proc/%ld/task/%ld/children", (long)pid, (long)pid);
  FILE *file = fopen(path, "r");
  while (file && found < n && fscanf(file, "%ld", &child) == 1) out[found++] = (pid_t)child;
  if (file) fclose(file);
  return found;
}
