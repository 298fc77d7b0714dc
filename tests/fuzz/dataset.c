/* An indexed dataset: the input is two lengths (u16), then .idx, .bin and .scored, which is absent when empty. */
#include "data/dataset.h"

#include <stdlib.h>
#include <string.h>

#include "data/dataset_format.h"
#include "fuzz.h"

#define PREFIX FUZZ_ROOT "/d"

enum { LENGTHS_BYTES = 4, SEQ_LEN = 5, IDX = 1, BIN = 2, SCORED = 3, PARTS = 4 };

static void split(const uint8_t *data, size_t size, size_t part[PARTS]) {
  uint16_t length[2];
  memcpy(length, data, LENGTHS_BYTES);
  part[0] = LENGTHS_BYTES;
  size -= LENGTHS_BYTES;
  part[IDX] = length[0] < size ? length[0] : size;
  part[BIN] = length[1] < size - part[IDX] ? length[1] : size - part[IDX];
  part[SCORED] = size - part[IDX] - part[BIN];
}

static void use(const wn_dataset *d) {
  int32_t tokens[SEQ_LEN + 1], start[SEQ_LEN];
  uint8_t predicted[SEQ_LEN], scored[SEQ_LEN + 1];
  int64_t n = wn_dataset_tokens(d), documents = wn_dataset_documents(d), at = 0;
  for (int64_t i = 0; i < documents; i++) {
    int64_t from = wn_dataset_document_start(d, i), to = wn_dataset_document_start(d, i + 1);
    FUZZ_CHECK(from == at && to >= from && to <= n);
    if (to > from) FUZZ_CHECK(wn_dataset_document_of(d, from) == i && wn_dataset_document_of(d, to - 1) == i);
    at = to;
  }
  FUZZ_CHECK(at == n);
  wn_dataset_copy(d, n - 1, 1, tokens, scored);
  wn_window window = {.tokens = tokens, .document_start = start, .predicted = predicted, .scored = scored};
  for (int64_t i = 0; i < wn_dataset_windows(d, SEQ_LEN); i++) {
    wn_dataset_read(d, i, SEQ_LEN, &window);
    for (int32_t row = 0; row < SEQ_LEN; row++) FUZZ_CHECK(start[row] >= 0 && start[row] <= row);
  }
  wn_status status = wn_dataset_check_vocab(d, 1000);
  if (status) fuzz_refused(status, WN_E_INPUT);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (size < LENGTHS_BYTES) return 0;
  size_t part[PARTS];
  wn_dataset *d;
  split(data, size, part);
  data += LENGTHS_BYTES;
  fuzz_file(PREFIX ".idx", data, part[IDX]);
  fuzz_file(PREFIX ".bin", data + part[IDX], part[BIN]);
  fuzz_file(PREFIX ".scored", part[SCORED] ? data + part[IDX] + part[BIN] : NULL, part[SCORED]);
  wn_status status = wn_dataset_open(&d, PREFIX);
  if (status) return fuzz_refused(status, WN_E_INPUT), 0;
  use(d);
  wn_dataset_close(d);
  return 0;
}

/* Makes counts, lengths, offsets and document index of an .idx of about `bytes` bytes agree, and gives their tokens. */
static size_t repair(uint8_t *idx, size_t *bytes, unsigned *seed) {
  static const uint8_t width[] = {0, 1, 1, 2, 4, 8, 0, 0, 2};
  uint8_t code = idx[WN_IDX_DTYPE_AT] < sizeof width ? idx[WN_IDX_DTYPE_AT] : 0;
  size_t room = *bytes - WN_IDX_HEADER_BYTES;
  uint64_t sequences = fuzz_random(seed) % (room / 12 + 1), boundaries = (room - 12 * sequences) / 8, tokens = 0;
  uint8_t *lengths = idx + WN_IDX_HEADER_BYTES, *offsets = lengths + 4 * sequences, *index = offsets + 8 * sequences;
  memcpy(idx + WN_IDX_SEQUENCES_AT, &sequences, 8);
  memcpy(idx + WN_IDX_DOCUMENTS_AT, &boundaries, 8);
  for (uint64_t i = 0; i < sequences; i++) {
    int32_t length = (int32_t)(fuzz_random(seed) % 8);
    memcpy(lengths + 4 * i, &length, 4);
    memcpy(offsets + 8 * i, &(uint64_t){tokens * width[code]}, 8);
    tokens += (uint64_t)length;
  }
  for (uint64_t i = 0; i < boundaries; i++)
    memcpy(index + 8 * i, &(uint64_t){boundaries > 1 ? sequences * i / (boundaries - 1) : 0}, 8);
  *bytes = WN_IDX_HEADER_BYTES + 12 * sequences + 8 * boundaries;
  return tokens;
}

/* Lays out .bin and .scored anew behind a repaired index. */
static size_t fill(uint8_t *data, size_t most, size_t part[PARTS], size_t tokens, unsigned *seed) {
  size_t before = LENGTHS_BYTES + part[IDX], width = 1u << fuzz_random(seed) % 4, header = WN_SCORED_HEADER_BYTES;
  bool marked = fuzz_random(seed) % 2;
  if (before + tokens * width + (marked ? header + tokens : 0) > most) return 0;
  part[BIN] = tokens * width;
  part[SCORED] = marked ? header + tokens : 0;
  uint8_t *bin = data + before, *scored = bin + part[BIN];
  for (size_t i = 0; i < part[BIN]; i++) bin[i] = i % width ? 0 : (uint8_t)fuzz_random(seed);
  if (!marked) return before + part[BIN];
  memcpy(scored, WN_SCORED_MAGIC, WN_SCORED_MAGIC_BYTES);
  memcpy(scored + WN_SCORED_MAGIC_BYTES, &(uint64_t){tokens}, 8);
  for (size_t i = 0; i < tokens; i++) scored[header + i] = fuzz_random(seed) % 2;
  return before + part[BIN] + part[SCORED];
}

/* Mutates one of the three files, or makes them all agree. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
  size_t part[PARTS], made = 0;
  if (size < LENGTHS_BYTES || most < 64) return LLVMFuzzerMutate(data, size, most);
  split(data, size, part);
  if (fuzz_random(&seed) % 4 == 0 && part[IDX] >= WN_IDX_HEADER_BYTES) {
    size_t idx = part[IDX], tokens = repair(data + LENGTHS_BYTES, &idx, &seed);
    size_t parts[PARTS] = {LENGTHS_BYTES, idx, 0, 0};
    made = fill(data, most, parts, tokens, &seed);
    if (made) memcpy(part, parts, sizeof part);
  }
  if (!made) size = fuzz_mutate_part(data, most, part, PARTS, 1 + (int)(fuzz_random(&seed) % 3));
  uint16_t length[2] = {(uint16_t)part[IDX], (uint16_t)part[BIN]};
  memcpy(data, length, LENGTHS_BYTES);
  return made ? made : size;
}
