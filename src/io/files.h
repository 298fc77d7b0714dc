/* Files that are whole or absent: written beside their place, synced, renamed, and the directory synced.
 * Every failure is WN_E_IO unless said otherwise, naming the path and the system's reason. */
#ifndef WN_IO_FILES_H
#define WN_IO_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum { WN_PATH_BYTES = 4096 };

/* "a/b" into out[WN_PATH_BYTES]; printf-like. WN_E_USAGE when it does not fit. */
WN_MUST_USE wn_status wn_path(char out[WN_PATH_BYTES], const char *format, ...) WN_PRINTF(2, 3);
bool wn_path_exists(const char *path); /* follows links: a dangling one does not exist */
bool wn_path_is_dir(const char *path);
WN_MUST_USE wn_status wn_make_dirs(const char *path);   /* like mkdir -p */
WN_MUST_USE wn_status wn_remove_tree(const char *path); /* fine when absent; links are removed, not followed */
/* The whole file, NUL-terminated, malloc'ed; `bytes` may be NULL. WN_E_INPUT when longer than most_bytes, or not a
 * regular file: a directory, a device, a pipe, which might never end. */
WN_MUST_USE wn_status wn_read_file(char **text, size_t *bytes, const char *path, size_t most_bytes);
/* The same of a pipe too, whose writer is waited for: for what the user names on the command line. */
WN_MUST_USE wn_status wn_read_stream(char **text, size_t *bytes, const char *path, size_t most_bytes);
WN_MUST_USE wn_status wn_write_file_atomic(const char *path, const void *data, size_t bytes);
WN_MUST_USE wn_status wn_sync_file(const char *path);
WN_MUST_USE wn_status wn_sync_dir(const char *path);
/* rename(from, to) and sync of the parent directory; WN_E_IO where `to` is a device or a pipe. */
WN_MUST_USE wn_status wn_rename_sync(const char *from, const char *to);
/* Creates `path` with its full length (sparse); refuses when it exists. */
WN_MUST_USE wn_status wn_create_sized(const char *path, uint64_t bytes);
/* pwrite of everything, or an error naming file and offset. */
WN_MUST_USE wn_status wn_write_at(int fd, const char *path, const void *data, size_t bytes, uint64_t offset);
/* A synced copy; refuses when `to` exists, and leaves nothing behind on failure. */
WN_MUST_USE wn_status wn_copy_file(const char *from, const char *to);
/* Hard link, else symbolic link to the absolute path, else copy; *how is "linked", "symlinked" or "copied". A link
 * `from` is followed first, so that the new name leads to the file itself. Refuses when `to` exists. */
WN_MUST_USE wn_status wn_link_or_copy(const char *from, const char *to, const char **how);
/* Names in a directory, sorted by byte, without . and ..; free with wn_list_free. */
WN_MUST_USE wn_status wn_list_dir(char ***names, size_t *n, const char *path);
void wn_list_free(char **names, size_t n);

#endif
