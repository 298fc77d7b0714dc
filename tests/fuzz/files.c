#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fuzz.h"

enum { MOST_FILES = 8, MOST_OPEN = 8, MOST_MAPPED = 8, FIRST_FD = 1 << 20, PATH_BYTES = 128, DIRECTORY = -2 };

typedef struct memory_file {
  char path[PATH_BYTES]; /* "" where the place is free */
  char *data;
  size_t bytes;
} memory_file;

static memory_file files[MOST_FILES];
static struct {
  int file; /* its place, plus 1; 0: closed; DIRECTORY */
  size_t at;
} opened[MOST_OPEN];
static void *mapped[MOST_MAPPED];

static bool in_memory(const char *path) {
  return !strncmp(path, FUZZ_ROOT, strlen(FUZZ_ROOT));
}

static int file_of(const char *path) {
  for (int i = 0; i < MOST_FILES; i++)
    if (!strcmp(files[i].path, path)) return i;
  return -1;
}

static void drop(int i) {
  free(files[i].data);
  files[i] = (memory_file){0};
}

static int made(const char *path) {
  int i = file_of(path);
  if (i < 0) i = file_of("");
  WN_ASSERT(i >= 0 && strlen(path) < PATH_BYTES, "no place for %s", path);
  drop(i);
  strcpy(files[i].path, path);
  return i;
}

void fuzz_file(const char *path, const void *data, size_t bytes) {
  if (!data) {
    int i = file_of(path);
    if (i >= 0) drop(i);
    return;
  }
  memory_file *file = &files[made(path)];
  file->data = malloc(bytes + 1);
  WN_ASSERT(file->data, "no memory for %zu bytes", bytes);
  memcpy(file->data, data, bytes);
  file->bytes = bytes;
}

/* ---- the wrapped calls; __real_ is the C library's ---- */

int __real_open(const char *path, int flags, ...);
int __real_stat(const char *path, struct stat *info);
int __real_fstat(int fd, struct stat *info);
int __real_close(int fd);
int __real_fsync(int fd);
ssize_t __real_read(int fd, void *to, size_t bytes);
ssize_t __real_pread(int fd, void *to, size_t bytes, off_t at);
ssize_t __real_pwrite(int fd, const void *from, size_t bytes, off_t at);
void *__real_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *at, size_t bytes);
int __real_madvise(void *at, size_t bytes, int advice);
int __real_rename(const char *from, const char *to);
int __real_unlink(const char *path);

int __wrap_open(const char *path, int flags, ...) {
  if (!in_memory(path)) {
    va_list args;
    va_start(args, flags);
    int mode = flags & O_CREAT ? va_arg(args, int) : 0;
    va_end(args);
    return __real_open(path, flags, mode);
  }
  bool directory = !strcmp(path, FUZZ_ROOT);
  int file = directory ? DIRECTORY : file_of(path), slot = 0;
  if (!directory && flags & O_CREAT) file = made(path);
  if (file == -1) return errno = ENOENT, -1;
  while (slot < MOST_OPEN && opened[slot].file) slot++;
  WN_ASSERT(slot < MOST_OPEN, "%d files are open: some are not closed", slot);
  opened[slot].file = directory ? DIRECTORY : file + 1;
  opened[slot].at = 0;
  return FIRST_FD + slot;
}

static memory_file *open_file(int fd) {
  WN_ASSERT(fd - FIRST_FD < MOST_OPEN && opened[fd - FIRST_FD].file > 0, "descriptor %d is not that of a file", fd);
  return &files[opened[fd - FIRST_FD].file - 1];
}

int __wrap_close(int fd) {
  if (fd < FIRST_FD) return __real_close(fd);
  WN_ASSERT(fd - FIRST_FD < MOST_OPEN && opened[fd - FIRST_FD].file, "descriptor %d is closed twice", fd);
  opened[fd - FIRST_FD].file = 0;
  return 0;
}

static int describe(const memory_file *file, struct stat *info) {
  *info = (struct stat){.st_mode = file ? S_IFREG | 0644 : S_IFDIR | 0755, .st_size = file ? (off_t)file->bytes : 0};
  return 0;
}

int __wrap_stat(const char *path, struct stat *info) {
  if (!in_memory(path)) return __real_stat(path, info);
  if (!strcmp(path, FUZZ_ROOT)) return describe(NULL, info);
  int file = file_of(path);
  return file < 0 ? (errno = ENOENT, -1) : describe(&files[file], info);
}

int __wrap_fstat(int fd, struct stat *info) {
  return fd < FIRST_FD ? __real_fstat(fd, info) : describe(open_file(fd), info);
}

int __wrap_fsync(int fd) {
  return fd < FIRST_FD ? __real_fsync(fd) : 0;
}

ssize_t __wrap_pread(int fd, void *to, size_t bytes, off_t at) {
  if (fd < FIRST_FD) return __real_pread(fd, to, bytes, at);
  const memory_file *file = open_file(fd);
  size_t from = (size_t)at < file->bytes ? (size_t)at : file->bytes;
  size_t n = bytes < file->bytes - from ? bytes : file->bytes - from;
  if (n) memcpy(to, file->data + from, n);
  return (ssize_t)n;
}

ssize_t __wrap_read(int fd, void *to, size_t bytes) {
  if (fd < FIRST_FD) return __real_read(fd, to, bytes);
  ssize_t n = __wrap_pread(fd, to, bytes, (off_t)opened[fd - FIRST_FD].at);
  opened[fd - FIRST_FD].at += (size_t)n;
  return n;
}

ssize_t __wrap_pwrite(int fd, const void *from, size_t bytes, off_t at) {
  if (fd < FIRST_FD) return __real_pwrite(fd, from, bytes, at);
  memory_file *file = open_file(fd);
  WN_ASSERT(at >= 0 && (size_t)at <= file->bytes, "a hole before byte %lld of %s", (long long)at, file->path);
  size_t end = (size_t)at + bytes;
  char *grown = realloc(file->data, end > file->bytes ? end : file->bytes);
  WN_ASSERT(grown, "no memory for %zu bytes", end);
  memcpy(grown + at, from, bytes);
  file->data = grown;
  if (end > file->bytes) file->bytes = end;
  return (ssize_t)bytes;
}

void *__wrap_mmap(void *at, size_t bytes, int protection, int flags, int fd, off_t offset) {
  if (fd < FIRST_FD) return __real_mmap(at, bytes, protection, flags, fd, offset);
  const memory_file *file = open_file(fd);
  int slot = 0;
  while (slot < MOST_MAPPED && mapped[slot]) slot++;
  WN_ASSERT(slot < MOST_MAPPED, "%d files are mapped: some are not unmapped", slot);
  WN_ASSERT(protection == PROT_READ && offset == 0 && bytes == file->bytes, "%s is not mapped whole and read-only",
            file->path);
  mapped[slot] = malloc(bytes);
  WN_ASSERT(mapped[slot], "no memory for %zu bytes", bytes);
  return memcpy(mapped[slot], file->data, bytes);
}

static int mapping_of(const void *at) {
  for (int i = 0; at && i < MOST_MAPPED; i++)
    if (mapped[i] == at) return i;
  return -1;
}

int __wrap_munmap(void *at, size_t bytes) {
  int slot = mapping_of(at);
  if (slot < 0) return __real_munmap(at, bytes);
  free(mapped[slot]);
  mapped[slot] = NULL;
  return 0;
}

int __wrap_madvise(void *at, size_t bytes, int advice) {
  return mapping_of(at) < 0 ? __real_madvise(at, bytes, advice) : 0;
}

int __wrap_rename(const char *from, const char *to) {
  if (!in_memory(from)) return __real_rename(from, to);
  int file = file_of(from);
  if (file < 0) return errno = ENOENT, -1;
  memory_file moved = files[file];
  files[file] = (memory_file){0};
  file = made(to);
  files[file].data = moved.data;
  files[file].bytes = moved.bytes;
  return 0;
}

int __wrap_unlink(const char *path) {
  if (!in_memory(path)) return __real_unlink(path);
  int file = file_of(path);
  if (file < 0) return errno = ENOENT, -1;
  drop(file);
  return 0;
}
