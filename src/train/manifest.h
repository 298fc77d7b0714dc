/* MANIFEST.json: name, length and digest of every file of a checkpoint. It is written last, so a directory that has one
 * was whole; whether it still is, is found by reading every byte. */
#ifndef WN_TRAIN_MANIFEST_H
#define WN_TRAIN_MANIFEST_H

#include <stdbool.h>

#include "base/hash.h"
#include "io/files.h"

#define WN_MANIFEST_NAME "MANIFEST.json"

enum { WN_FILE_NAME_BYTES = 256 };

typedef struct wn_manifest_entry {
  char name[WN_FILE_NAME_BYTES];
  uint64_t bytes;
  wn_hash hash;
} wn_manifest_entry;
typedef struct wn_manifest {
  wn_manifest_entry *entries;
  size_t n;
} wn_manifest; /* sorted by name */

/* WN_E_INPUT, naming the file, when it is not a manifest; WN_E_IO when it cannot be read. */
WN_MUST_USE wn_status wn_manifest_load(wn_manifest *out, const char *dir);
void wn_manifest_free(wn_manifest *manifest);
/* Sorts the entries and writes DIR/MANIFEST.json, synced. */
WN_MUST_USE wn_status wn_manifest_write(wn_manifest *manifest, const char *dir);
const wn_manifest_entry *wn_manifest_find(const wn_manifest *manifest, const char *name); /* NULL: not listed */
/* The directory holds the files of the manifest and nothing else, by name. */
WN_MUST_USE wn_status wn_manifest_check_names(const wn_manifest *manifest, const char *dir);
/* One file's length and digest. */
WN_MUST_USE wn_status wn_manifest_check_file(const wn_manifest_entry *entry, const char *dir);
/* The same by name; a file that is not listed is WN_E_INPUT too. */
WN_MUST_USE wn_status wn_manifest_check_listed(const wn_manifest *manifest, const char *name, const char *dir);
/* The digest that DIR's manifest knows for a file which is as long as listed and was not touched after the manifest was
 * written; *known false when there is none to trust. Never fails: what cannot be believed is computed by the caller. */
void wn_manifest_known(const char *dir, const char *name, wn_manifest_entry *out, bool *known);

#endif
