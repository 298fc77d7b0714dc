#include "convert/place.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/version.h"
#include "io/files.h"
#include "io/json.h"

struct wn_output_place {
  const char *dir;
  int fd;
};

enum { FORMAT = 1, MOST_RECORD_BYTES = 1 << 16 };

/* ---- the record ---- */

/* What the shards' bytes depend on, but for reading every byte: like make, it goes by lengths and times. */
static wn_status digest_of(const wn_hf_dir *source, char text[WN_HASH_TEXT_BYTES]) {
  char path[WN_PATH_BYTES], *lines = NULL;
  size_t bytes = 0;
  struct stat info;
  wn_hash config;
  uint64_t config_bytes;
  WN_TRY(wn_path(path, "%s/config.json", wn_hf_dir_path(source)));
  WN_TRY(wn_hash_file(&config, &config_bytes, path));
  wn_hash_text(config, text);
  FILE *out = open_memstream(&lines, &bytes);
  if (!out) return WN_FAIL(WN_E_MEMORY, "out of memory for a digest");
  wn_status status = NULL;
  fprintf(out, "%s\n", text);
  for (int32_t i = 0; !status && i < wn_hf_dir_shards(source); i++) {
    const char *shard = wn_hf_dir_shard_path(source, i);
    if (stat(shard, &info) != 0)
      status = WN_FAIL(WN_E_IO, "cannot look at %s: %s", shard, strerror(errno));
    else
      fprintf(out, "%s %lld %lld.%09ld\n", strrchr(shard, '/') + 1, (long long)info.st_size,
              (long long)info.st_mtim.tv_sec, info.st_mtim.tv_nsec);
  }
  if (fclose(out) != 0) WN_KEEP_FIRST(status, WN_FAIL(WN_E_MEMORY, "out of memory for a digest"));
  if (!status) wn_hash_text(wn_hash_bytes(lines, bytes), text);
  free(lines);
  return status;
}

static wn_status make_record(json_t **out, const wn_convert_job *job, const wn_hf_dir *source) {
  char digest[WN_HASH_TEXT_BYTES];
  WN_TRY(digest_of(source, digest));
  bool demo = job->form == WN_TO_DEMO;
  *out = json_pack("{si ss si sI ss ss}", "format", FORMAT, "to", wn_convert_form_names[job->form], "model_parallel",
                   demo ? job->model_parallel : 0, "shard_bytes", demo ? (json_int_t)0 : (json_int_t)job->shard_bytes,
                   "source", digest, "version", WN_VERSION);
  return *out ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for " WN_OUTPUT_RECORD);
}

static wn_status compare_records(const wn_output_place *place, const json_t *ours, const json_t *theirs) {
  static const struct {
    const char *key, *flag;
  } settings[] = {{"to", "--to"}, {"model_parallel", "--model-parallel"}, {"shard_bytes", "--shard-bytes"}};
  static const char hint[] = "go on with the same command, or remove the directory";
  for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
    json_t *seen = json_object_get(theirs, settings[i].key);
    if (json_equal(seen, json_object_get(ours, settings[i].key))) continue;
    char number[32];
    snprintf(number, sizeof number, "%lld", (long long)json_integer_value(seen));
    return WN_FAIL_HINT(WN_E_USAGE, hint, "%s holds the beginning of a conversion with %s %.80s", place->dir,
                        settings[i].flag, json_is_string(seen) ? json_string_value(seen) : number);
  }
  if (json_equal(ours, theirs)) return NULL;
  return WN_FAIL_HINT(WN_E_USAGE, hint,
                      "%s holds the beginning of a conversion of other weights, of these before they changed, or by "
                      "another version of winnow",
                      place->dir);
}

/* ---- what stands in the directory ---- */

/* "NAME.tmp.123", as files that are written at once are called on their way. */
static bool written_at_once(const char *name) {
  const char *mark = strstr(name, ".tmp.");
  return mark && mark[5] && strspn(mark + 5, "0123456789") == strlen(mark + 5);
}

static wn_status refuse_others(const wn_output_place *place, char *const *names, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (strncmp(names[i], WN_OUTPUT_RECORD, strlen(WN_OUTPUT_RECORD)) != 0 || !written_at_once(names[i]))
      return WN_FAIL_HINT(WN_E_USAGE, "give a directory that is empty or not there",
                          "%s holds %s already; nothing was written", place->dir, names[i]);
  return NULL;
}

static wn_status remove_garbage(const wn_output_place *place, char *const *names, size_t n) {
  char path[WN_PATH_BYTES];
  for (size_t i = 0; i < n; i++) {
    if (strncmp(names[i], WN_OUTPUT_TEMPORARY, strlen(WN_OUTPUT_TEMPORARY)) != 0 && !written_at_once(names[i]))
      continue;
    WN_TRY(wn_path(path, "%s/%s", place->dir, names[i]));
    WN_TRY(wn_remove_tree(path));
  }
  return NULL;
}

static wn_status begin(const wn_output_place *place, const json_t *record, const char *path) {
  wn_status status = wn_json_write(record, path, JSON_INDENT(1));
  return status ? status : wn_sync_dir(place->dir);
}

static wn_status settle(const wn_output_place *place, const json_t *record) {
  char path[WN_PATH_BYTES], **names;
  size_t n;
  json_t *theirs;
  wn_status status = NULL;
  WN_TRY(wn_path(path, "%s/" WN_OUTPUT_RECORD, place->dir));
  WN_TRY(wn_list_dir(&names, &n, place->dir));
  if (!wn_path_exists(path)) {
    status = refuse_others(place, names, n);
    if (!status) status = begin(place, record, path);
  } else {
    status = wn_json_load(&theirs, path, MOST_RECORD_BYTES, WN_E_INPUT);
    if (!status) {
      status = compare_records(place, record, theirs);
      json_decref(theirs);
    }
  }
  if (!status) status = remove_garbage(place, names, n);
  wn_list_free(names, n);
  return status;
}

/* The kernel lets go of the lock when the process ends, however it ends. */
static wn_status lock(wn_output_place *place, wn_log *log) {
  place->fd = open(place->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (place->fd < 0) return WN_FAIL(WN_E_IO, "cannot open %s: %s", place->dir, strerror(errno));
  if (flock(place->fd, LOCK_EX | LOCK_NB) == 0) return NULL;
  if (errno == EWOULDBLOCK)
    return WN_FAIL(WN_E_USAGE, "%s is in use: another process is converting into it", place->dir);
  wn_warn(log, "%s cannot be locked here (%s): see to it that one process at a time writes to it", place->dir,
          strerror(errno));
  return NULL;
}

wn_status wn_output_place_open(wn_output_place **out, const wn_convert_job *job, const wn_hf_dir *source, wn_log *log) {
  json_t *record = NULL;
  wn_status status = NULL;
  wn_output_place *place = calloc(1, sizeof *place);
  *out = place;
  if (!place) return WN_FAIL(WN_E_MEMORY, "out of memory opening %s", job->out);
  *place = (wn_output_place){.dir = job->out, .fd = -1};
  WN_TRY_GOTO(status, done, make_record(&record, job, source));
  WN_TRY_GOTO(status, done, wn_make_dirs(job->out));
  WN_TRY_GOTO(status, done, lock(place, log));
  WN_TRY_GOTO(status, done, settle(place, record));
done:
  json_decref(record);
  return status;
}

wn_status wn_output_place_has(const char *path, const wn_st_layout *layout, bool *stands) {
  uint64_t header_bytes;
  const char *header = wn_st_layout_header(layout, &header_bytes);
  struct stat info;
  *stands = false;
  if (stat(path, &info) != 0) {
    if (errno == ENOENT) return NULL;
    return WN_FAIL(WN_E_IO, "cannot look at %s: %s", path, strerror(errno));
  }
  bool same = (uint64_t)info.st_size == wn_st_layout_file_bytes(layout);
  char *theirs = same ? malloc(header_bytes) : NULL;
  if (same && !theirs) return WN_FAIL(WN_E_MEMORY, "out of memory reading %s", path);
  int fd = same ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  for (uint64_t at = 0; same && at < header_bytes;) {
    ssize_t got = pread(fd, theirs + at, header_bytes - at, (off_t)at);
    same = got > 0;
    at += same ? (uint64_t)got : 0;
  }
  same = same && memcmp(theirs, header, header_bytes) == 0;
  if (fd >= 0) close(fd);
  free(theirs);
  *stands = same;
  if (same) return NULL;
  return WN_FAIL_HINT(WN_E_INPUT, "remove the directory and begin anew",
                      "%s stands there, but is not what this conversion writes", path);
}

wn_status wn_output_place_finish(wn_output_place *place) {
  char path[WN_PATH_BYTES];
  WN_TRY(wn_path(path, "%s/" WN_OUTPUT_RECORD, place->dir));
  WN_TRY(wn_sync_dir(place->dir));
  WN_TRY(wn_remove_tree(path));
  return wn_sync_dir(place->dir);
}

void wn_output_place_close(wn_output_place *place) {
  if (!place) return;
  if (place->fd >= 0) close(place->fd);
  free(place);
}
