/* A model directory of two shards: the input is its model.safetensors.index.json. */
#include "io/hf_dir.h"

#include <stdio.h>
#include <string.h>

#include "fuzz.h"

static void put_shard(const char *path, const char *header, size_t data_bytes) {
  char file[512] = {0};
  uint64_t bytes = strlen(header);
  memcpy(file, &bytes, sizeof bytes);
  memcpy(file + sizeof bytes, header, bytes);
  WN_ASSERT(sizeof bytes + bytes + data_bytes <= sizeof file, "%s is too long", path);
  fuzz_file(path, file, sizeof bytes + bytes + data_bytes);
}

static void use(const wn_hf_dir *dir) {
  for (int64_t i = 0; i < wn_hf_dir_count(dir); i++) {
    int32_t shard = -1, found = -1;
    float out[4];
    const wn_st_entry *entry = wn_hf_dir_at(dir, i, &shard);
    FUZZ_CHECK(wn_hf_dir_find(dir, entry->name, &found) == entry && found == shard);
    FUZZ_CHECK(shard >= 0 && shard < wn_hf_dir_shards(dir) && wn_hf_dir_shard_path(dir, shard));
    fuzz_touch(entry->data, entry->bytes);
    wn_status status = wn_hf_read(out, WN_F32, &(wn_hf_weight){.entry = entry}, 0,
                                  (int64_t)entry->bytes / wn_dtype_bytes(entry->dtype));
    FUZZ_CHECK(!status);
  }
  FUZZ_CHECK(!wn_hf_dir_find(dir, "absent", NULL));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static bool ready;
  if (!ready) {
    put_shard(FUZZ_ROOT "/a.safetensors",
              "{\"w\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]},"
              "\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[8,14]}}",
              14);
    put_shard(FUZZ_ROOT "/b.safetensors", "{\"u\":{\"dtype\":\"F16\",\"shape\":[1,2],\"data_offsets\":[0,4]}}", 4);
    ready = true;
  }
  wn_hf_dir *dir;
  fuzz_file(FUZZ_ROOT "/model.safetensors.index.json", data, size);
  wn_status status = wn_hf_dir_open(&dir, FUZZ_ROOT);
  if (status) return fuzz_refused(status, WN_E_INPUT), 0;
  use(dir);
  int64_t n;
  status = wn_hf_dir_rename(dir, "w", "v", &n);
  FUZZ_CHECK(!status);
  use(dir);
  wn_hf_dir_close(dir);
  return 0;
}
