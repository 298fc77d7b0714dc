#include "convert/write.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "base/float8.h"
#include "io/files.h"

enum { TILE_ROWS = WN_F8_BLOCK, TILE_COLS = 64 * WN_F8_BLOCK, TILE = TILE_ROWS * TILE_COLS };

typedef struct room {
  float values[TILE];
  char bytes[TILE * sizeof(float)];
  float scales[TILE_COLS / WN_F8_BLOCK];
} room;

struct wn_tile_rooms {
  room **room;
  int32_t n;
};

wn_status wn_tile_rooms_create(wn_tile_rooms **out, int32_t threads) {
  wn_tile_rooms *rooms = calloc(1, sizeof *rooms);
  bool enough = rooms && (rooms->room = calloc((size_t)threads, sizeof(room *)));
  for (int32_t i = 0; enough && i < threads; i++) {
    enough = (rooms->room[i] = malloc(sizeof(room))) != NULL;
    rooms->n += enough;
  }
  *out = rooms;
  if (enough) return NULL;
  wn_tile_rooms_free(rooms);
  *out = NULL;
  return WN_FAIL(WN_E_MEMORY, "out of memory for the tiles of %d threads", threads);
}

void wn_tile_rooms_free(wn_tile_rooms *rooms) {
  if (!rooms) return;
  for (int32_t i = 0; i < rooms->n; i++) free(rooms->room[i]);
  free(rooms->room);
  free(rooms);
}

/* One output's matrix (a vector is one row) and where it comes from and goes to. */
typedef struct work {
  const wn_output *output;
  const wn_st_entry *entry; /* the stored tensor: the weight or its scales */
  int64_t stored_cols, first_row, first_col, rows, cols;
  int fd;
  const char *path;
  uint64_t offset, scale_offset;
} work;

typedef struct tile {
  int64_t row, col, rows, cols;
} tile;

static bool of_scales(const work *w) {
  return wn_output_is_scale(w->output);
}

/* ---- reading ---- */

static wn_status read_run(float *out, const work *w, int64_t first, int64_t count) {
  if (of_scales(w)) return wn_hf_read_scales(out, &w->output->weight->from, first, count);
  return wn_hf_read(out, WN_F32, &w->output->weight->from, first, count);
}

static wn_status read_values(float *out, const work *w, tile t) {
  int64_t first = (w->first_row + t.row) * w->stored_cols + w->first_col + t.col;
  if (t.cols == w->stored_cols) return read_run(out, w, first, t.rows * t.cols);
  for (int64_t r = 0; r < t.rows; r++) WN_TRY(read_run(out + r * t.cols, w, first + r * w->stored_cols, t.cols));
  return NULL;
}

static wn_status copy_bytes(char *out, const work *w, tile t) {
  int64_t width = wn_dtype_bytes(w->entry->dtype);
  int64_t first = (w->first_row + t.row) * w->stored_cols + w->first_col + t.col;
  bool whole = t.cols == w->stored_cols; /* rows lie one behind another */
  int64_t runs = whole ? 1 : t.rows, run = (whole ? t.rows : 1) * t.cols * width;
  for (int64_t r = 0; r < runs; r++)
    WN_TRY(wn_st_read(out + r * run, w->entry, (uint64_t)((first + r * w->stored_cols) * width), (uint64_t)run));
  return NULL;
}

/* ---- making ---- */

static wn_status round_to_bf16(const work *w, tile t, char *out, const float *x) {
  for (int64_t i = 0; i < t.rows * t.cols; i++) {
    uint16_t rounded = wn_bf16_from_f32(x[i]);
    int64_t row = w->first_row + t.row + i / t.cols, col = w->first_col + t.col + i % t.cols;
    if ((rounded & 0x7f80u) == 0x7f80u)
      return wn_hf_refuse_number(w->entry, row * w->stored_cols + col, x[i], WN_HF_BEYOND_BF16);
    memcpy(out + 2 * i, &rounded, sizeof rounded);
  }
  return NULL;
}

static void make_blocks(room *in, tile t) {
  for (int64_t c = 0; c < t.cols; c += WN_F8_BLOCK)
    wn_f8_quantise_block((uint8_t *)in->bytes + c, &in->scales[c / WN_F8_BLOCK], in->values + c, t.rows,
                         t.cols - c < WN_F8_BLOCK ? t.cols - c : WN_F8_BLOCK, t.cols, t.cols);
}

static wn_status make_tile(const work *w, tile t, room *in) {
  WN_TRY(read_values(in->values, w, t)); /* which looks at every number, also of what is copied */
  switch (w->output->making) {
  case WN_MAKE_COPY:
  case WN_COPY_SCALES: return copy_bytes(in->bytes, w, t);
  case WN_MAKE_BLOCKS: make_blocks(in, t); return NULL;
  case WN_MAKE_NUMBERS:
    if (w->output->dtype == WN_BF16) return round_to_bf16(w, t, in->bytes, in->values);
    break;
  case WN_CONVERT_SCALES: break;
  case WN_MAKE_SCALES: WN_ASSERT(false, "%s: its weight writes its scales", w->output->weight->name);
  }
  memcpy(in->bytes, in->values, (size_t)(t.rows * t.cols) * sizeof(float));
  return NULL;
}

/* ---- writing ---- */

static wn_status write_tile(const work *w, tile t, const room *in) {
  int64_t width = wn_dtype_bytes(w->output->dtype), run = t.cols * width;
  uint64_t at = w->offset + (uint64_t)((t.row * w->cols + t.col) * width);
  if (t.cols == w->cols) {
    WN_TRY(wn_write_at(w->fd, w->path, in->bytes, (size_t)(t.rows * run), at));
  } else {
    for (int64_t r = 0; r < t.rows; r++)
      WN_TRY(wn_write_at(w->fd, w->path, in->bytes + r * run, (size_t)run, at + (uint64_t)(r * w->cols * width)));
  }
  if (w->output->making != WN_MAKE_BLOCKS) return NULL;
  int64_t first = t.row / WN_F8_BLOCK * wn_f8_blocks(w->cols) + t.col / WN_F8_BLOCK;
  return wn_write_at(w->fd, w->path, in->scales, (size_t)wn_f8_blocks(t.cols) * sizeof(float),
                     w->scale_offset + (uint64_t)first * sizeof(float));
}

static int64_t at_most(int64_t n, int64_t most) {
  return n < most ? n : most;
}

wn_status wn_output_write(const wn_output *output, int fd, const char *path, uint64_t offset, uint64_t scale_offset,
                          wn_tile_rooms *rooms) {
  work w = {.output = output, .fd = fd, .path = path, .offset = offset, .scale_offset = scale_offset};
  w.entry = of_scales(&w) ? output->weight->from.scale : output->weight->from.entry;
  bool matrix = output->rank == 2;
  w.stored_cols = w.entry->dim[matrix];
  w.first_row = matrix ? output->first[0] : 0;
  w.first_col = output->first[matrix];
  w.rows = matrix ? output->dim[0] : 1;
  w.cols = output->dim[matrix];
  int64_t across = (w.cols + TILE_COLS - 1) / TILE_COLS, down = (w.rows + TILE_ROWS - 1) / TILE_ROWS;
  wn_status status = NULL;
  bool stop = false;
#pragma omp parallel for num_threads(rooms->n) schedule(dynamic) if (across * down > 1)
  for (int64_t i = 0; i < across * down; i++) {
    bool stopped;
    tile t = {.row = i / across * TILE_ROWS, .col = i % across * TILE_COLS};
    t.rows = at_most(w.rows - t.row, TILE_ROWS);
    t.cols = at_most(w.cols - t.col, TILE_COLS);
    room *mine = rooms->room[omp_get_thread_num()];
#pragma omp atomic read
    stopped = stop;
    if (stopped) continue;
    wn_status one = make_tile(&w, t, mine);
    if (!one) one = write_tile(&w, t, mine);
    if (!one) continue;
#pragma omp atomic write
    stop = true;
#pragma omp critical
    WN_KEEP_FIRST(status, one);
  }
  return status;
}
