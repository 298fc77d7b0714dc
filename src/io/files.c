#include "io/files.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fts.h>
#include <inttypes.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { COPY_BYTES = 1 << 20 };

wn_status wn_path(char out[WN_PATH_BYTES], const char *format, ...) {
  va_list args;
  va_start(args, format);
  int used = vsnprintf(out, WN_PATH_BYTES, format, args);
  va_end(args);
  if (used < 0 || used >= WN_PATH_BYTES)
    return WN_FAIL(WN_E_USAGE, "path %.60s... is longer than %d bytes", out, WN_PATH_BYTES - 1);
  return NULL;
}

bool wn_path_exists(const char *path) {
  struct stat info;
  return stat(path, &info) == 0;
}

bool wn_path_is_dir(const char *path) {
  struct stat info;
  return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

wn_status wn_make_dirs(const char *path) {
  char part[WN_PATH_BYTES];
  WN_TRY(wn_path(part, "%s", path));
  for (char *at = part;; at++) {
    char kept = *at;
    if (kept != '/' && kept != 0) continue;
    if (at > part) {
      *at = 0;
      if (mkdir(part, 0777) != 0) {
        int reason = errno;
        if (!wn_path_is_dir(part))
          return WN_FAIL(WN_E_IO, "cannot create directory %s: %s", part,
                         reason == EEXIST ? "a file of that name stands there" : strerror(reason));
      }
      *at = kept;
    }
    if (kept == 0) return NULL;
  }
}

wn_status wn_remove_tree(const char *path) {
  struct stat info;
  if (lstat(path, &info) != 0 && errno == ENOENT) return NULL;
  char root[WN_PATH_BYTES];
  WN_TRY(wn_path(root, "%s", path));
  char *const roots[] = {root, NULL};
  wn_status status = NULL;
  FTS *walk = fts_open(roots, FTS_PHYSICAL | FTS_NOCHDIR, NULL);
  if (!walk) return WN_FAIL(WN_E_IO, "cannot remove %s: %s", path, strerror(errno));
  FTSENT *entry;
  while (!status && (errno = 0, entry = fts_read(walk))) {
    if (entry->fts_info == FTS_D) continue; /* met again, empty, as FTS_DP */
    if (entry->fts_info == FTS_DNR || entry->fts_info == FTS_ERR || entry->fts_info == FTS_NS)
      status = WN_FAIL(WN_E_IO, "cannot remove %s: %s", entry->fts_path, strerror(entry->fts_errno));
    else if (remove(entry->fts_accpath) != 0)
      status = WN_FAIL(WN_E_IO, "cannot remove %s: %s", entry->fts_path, strerror(errno));
  }
  if (!status && errno != 0) status = WN_FAIL(WN_E_IO, "cannot remove %s: %s", path, strerror(errno));
  fts_close(walk);
  return status;
}

/* All that fd gives, of which so much is expected. */
static wn_status read_all(char **text, size_t *bytes, int fd, size_t expected, const char *path, size_t most_bytes) {
  wn_status status = NULL;
  char *data = NULL;
  size_t used = 0, room = 0;
  for (;;) {
    if (used > most_bytes || expected > most_bytes) {
      status = WN_FAIL(WN_E_INPUT, "%s is longer than the %zu bytes that such a file may have", path, most_bytes);
      goto fail;
    }
    if (used + 1 >= room) { /* one byte more than the file, so that its end is seen without growing again */
      size_t more = room ? 2 * room : expected + 2;
      char *grown = realloc(data, more);
      if (!grown) {
        status = WN_FAIL(WN_E_MEMORY, "out of memory reading %s", path);
        goto fail;
      }
      data = grown;
      room = more;
    }
    ssize_t got = read(fd, data + used, room - used - 1);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      status = WN_FAIL(WN_E_IO, "cannot read %s: %s", path, strerror(errno));
      goto fail;
    }
    if (got == 0) break;
    used += (size_t)got;
  }
  data[used] = 0;
  *text = data;
  if (bytes) *bytes = used;
  return NULL;
fail:
  free(data);
  return status;
}

static wn_status read_opened(char **text, size_t *bytes, const char *path, size_t most_bytes, bool pipes) {
  *text = NULL;
  int fd = open(path, O_RDONLY | O_CLOEXEC | (pipes ? 0 : O_NONBLOCK)); /* what is refused is not waited for */
  if (fd < 0) return WN_FAIL(WN_E_IO, "cannot open %s: %s", path, strerror(errno));
  struct stat info;
  bool regular = fstat(fd, &info) == 0 && S_ISREG(info.st_mode), flows = !regular && pipes && !S_ISDIR(info.st_mode);
  size_t expected = regular && info.st_size > 0 ? (size_t)info.st_size : 0;
  wn_status status = regular || flows ? read_all(text, bytes, fd, expected, path, most_bytes)
                                      : WN_FAIL(WN_E_INPUT, "%s is not a regular file", path);
  close(fd);
  return status;
}

wn_status wn_read_file(char **text, size_t *bytes, const char *path, size_t most_bytes) {
  return read_opened(text, bytes, path, most_bytes, false);
}

wn_status wn_read_stream(char **text, size_t *bytes, const char *path, size_t most_bytes) {
  return read_opened(text, bytes, path, most_bytes, true);
}

wn_status wn_write_at(int fd, const char *path, const void *data, size_t bytes, uint64_t offset) {
  const char *at = data;
  while (bytes > 0) {
    ssize_t done = pwrite(fd, at, bytes, (off_t)offset);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0)
      return WN_FAIL(WN_E_IO, "cannot write %s at byte %" PRIu64 ": %s", path, offset,
                     done < 0 ? strerror(errno) : "nothing was taken");
    at += done;
    bytes -= (size_t)done;
    offset += (uint64_t)done;
  }
  return NULL;
}

/* "a/b/c" -> "a/b"; "c" -> "."; "/c" -> "/". */
static wn_status parent_of(char out[WN_PATH_BYTES], const char *path) {
  WN_TRY(wn_path(out, "%s", path));
  size_t end = strlen(out);
  while (end > 1 && out[end - 1] == '/') end--;
  while (end > 0 && out[end - 1] != '/') end--;
  while (end > 1 && out[end - 1] == '/') end--;
  if (end == 0) out[end++] = '.';
  out[end] = 0;
  return NULL;
}

static wn_status sync_path(const char *path, int flags) {
  int fd = open(path, flags | O_RDONLY | O_CLOEXEC);
  if (fd < 0) return WN_FAIL(WN_E_IO, "cannot open %s to sync it: %s", path, strerror(errno));
  wn_status status = NULL;
  /* some network file systems cannot sync a directory and say EINVAL: then there is nothing more to do */
  if (fsync(fd) != 0 && !(flags == O_DIRECTORY && errno == EINVAL))
    status = WN_FAIL(WN_E_IO, "cannot sync %s: %s", path, strerror(errno));
  close(fd);
  return status;
}

wn_status wn_sync_file(const char *path) {
  return sync_path(path, 0);
}
wn_status wn_sync_dir(const char *path) {
  return sync_path(path, O_DIRECTORY);
}

wn_status wn_rename_sync(const char *from, const char *to) {
  char parent[WN_PATH_BYTES];
  WN_TRY(parent_of(parent, to));
  struct stat info; /* root's rename onto /dev/null would leave every program without one */
  if (stat(to, &info) == 0 && !S_ISREG(info.st_mode) && !S_ISDIR(info.st_mode))
    return WN_FAIL(WN_E_IO, "%s is a device or a pipe, which no file takes the place of", to);
  if (rename(from, to) != 0) return WN_FAIL(WN_E_IO, "cannot rename %s to %s: %s", from, to, strerror(errno));
  return wn_sync_dir(parent);
}

/* Syncs and closes; errors of both count, because a full disk may show only here. */
static wn_status finish(int fd, const char *path) {
  wn_status status = NULL;
  if (fsync(fd) != 0) status = WN_FAIL(WN_E_IO, "cannot sync %s: %s", path, strerror(errno));
  if (close(fd) != 0) WN_KEEP_FIRST(status, WN_FAIL(WN_E_IO, "cannot close %s: %s", path, strerror(errno)));
  return status;
}

wn_status wn_write_file_atomic(const char *path, const void *data, size_t bytes) {
  char beside[WN_PATH_BYTES];
  WN_TRY(wn_path(beside, "%s.tmp.%ld", path, (long)getpid()));
  int fd = open(beside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) return WN_FAIL(WN_E_IO, "cannot create %s: %s", beside, strerror(errno));
  wn_status status = wn_write_at(fd, beside, data, bytes, 0);
  WN_KEEP_FIRST(status, finish(fd, beside));
  if (!status) status = wn_rename_sync(beside, path);
  if (status) unlink(beside); /* gone already when only the directory's sync failed */
  return status;
}

wn_status wn_create_sized(const char *path, uint64_t bytes) {
  int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0) return WN_FAIL(WN_E_IO, "cannot create %s: %s", path, strerror(errno));
  wn_status status = NULL;
  if (bytes > INT64_MAX || ftruncate(fd, (off_t)bytes) != 0)
    status = WN_FAIL(WN_E_IO, "cannot make %s %" PRIu64 " bytes long: %s", path, bytes,
                     bytes > INT64_MAX ? strerror(EFBIG) : strerror(errno));
  WN_KEEP_FIRST(status, finish(fd, path));
  if (status) unlink(path);
  return status;
}

wn_status wn_copy_file(const char *from, const char *to) {
  wn_status status = NULL;
  int in = -1, out = -1;
  char *buffer = malloc(COPY_BYTES);
  if (!buffer) return WN_FAIL(WN_E_MEMORY, "out of memory copying %s", from);
  in = open(from, O_RDONLY | O_CLOEXEC);
  if (in < 0) {
    status = WN_FAIL(WN_E_IO, "cannot open %s: %s", from, strerror(errno));
    goto done;
  }
  out = open(to, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (out < 0) {
    status = WN_FAIL(WN_E_IO, "cannot create %s: %s", to, strerror(errno));
    goto done;
  }
  for (uint64_t offset = 0; !status;) {
    ssize_t got = read(in, buffer, COPY_BYTES);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) status = WN_FAIL(WN_E_IO, "cannot read %s: %s", from, strerror(errno));
    if (got <= 0) break;
    status = wn_write_at(out, to, buffer, (size_t)got, offset);
    offset += (uint64_t)got;
  }
  WN_KEEP_FIRST(status, finish(out, to));
  if (status) unlink(to);
done:
  if (in >= 0) close(in);
  free(buffer);
  return status;
}

wn_status wn_link_or_copy(const char *from, const char *to, const char **how) {
  char absolute[PATH_MAX];
  if (!realpath(from, absolute)) return WN_FAIL(WN_E_IO, "cannot link %s: %s", from, strerror(errno));
  if (link(absolute, to) == 0) {
    *how = "linked";
    return NULL;
  }
  if (errno == EEXIST || errno == ENOENT || errno == ENOTDIR || errno == ENOSPC || errno == EROFS)
    return WN_FAIL(WN_E_IO, "cannot link %s to %s: %s", from, to, strerror(errno));
  if (symlink(absolute, to) == 0) {
    *how = "symlinked";
    return NULL;
  }
  *how = "copied";
  return wn_copy_file(absolute, to);
}

static int by_bytes(const void *a, const void *b) {
  return strcmp(*(char *const *)a, *(char *const *)b);
}

wn_status wn_list_dir(char ***names, size_t *n, const char *path) {
  wn_status status = NULL;
  char **list = NULL;
  size_t used = 0, room = 0;
  *names = NULL;
  *n = 0;
  DIR *dir = opendir(path);
  if (!dir) return WN_FAIL(WN_E_IO, "cannot list %s: %s", path, strerror(errno));
  struct dirent *entry;
  while ((errno = 0, entry = readdir(dir))) {
    if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
    if (used == room) {
      room = room ? 2 * room : 16;
      char **grown = realloc(list, room * sizeof *list);
      if (!grown) {
        status = WN_FAIL(WN_E_MEMORY, "out of memory listing %s", path);
        goto fail;
      }
      list = grown;
    }
    list[used] = strdup(entry->d_name);
    if (!list[used]) {
      status = WN_FAIL(WN_E_MEMORY, "out of memory listing %s", path);
      goto fail;
    }
    used++;
  }
  if (errno != 0) {
    status = WN_FAIL(WN_E_IO, "cannot list %s: %s", path, strerror(errno));
    goto fail;
  }
  closedir(dir);
  if (used) qsort(list, used, sizeof *list, by_bytes);
  *names = list;
  *n = used;
  return NULL;
fail:
  closedir(dir);
  wn_list_free(list, used);
  return status;
}

void wn_list_free(char **names, size_t n) {
  for (size_t i = 0; i < n; i++) free(names[i]);
  free(names);
}
