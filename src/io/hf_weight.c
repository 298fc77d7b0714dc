/* Reading weights out of a Hugging Face directory, in whatever precision they lie there. */
#include <stdlib.h>
#include <string.h>

#include "base/bits.h"
#include "base/float8.h"
#include "base/name_list.h"
#include "base/stream.h"
#include "io/hf_dir.h"

#define MOST_SCALE (0x1.fep127f / 448) /* the largest BF16 by the largest code */

enum { CHUNK = 1 << 16 }; /* elements that are on their way at a time: few enough for a core's cache */

/* ---- finding ---- */

const wn_st_entry *wn_hf_scale_entry(const wn_hf_dir *dir, const char *name) {
  char scale[512];
  int length = snprintf(scale, sizeof scale, "%s" WN_HF_SCALE_SUFFIX, name);
  return length < (int)sizeof scale ? wn_hf_dir_find(dir, scale, NULL) : NULL;
}

bool wn_hf_scale_readable(const wn_st_entry *scale) {
  return scale->dtype == WN_F32 || scale->dtype == WN_BF16 || scale->dtype == WN_F8_E8M0;
}

bool wn_hf_scale_fits(const wn_st_entry *scale, const wn_st_entry *weight) {
  return scale->rank == 2 && weight->rank == 2 && scale->dim[0] == wn_f8_blocks(weight->dim[0]) &&
         scale->dim[1] == wn_f8_blocks(weight->dim[1]);
}

static wn_status check_scale(const wn_st_entry *entry, const wn_st_entry *scale, const char *dir) {
  if (entry->rank != 2)
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s is FP8 and of rank %d; only matrices are read from FP8", dir, entry->name,
                   entry->rank);
  if (!scale)
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s is FP8 and has no %s" WN_HF_SCALE_SUFFIX, dir, entry->name, entry->name);
  if (!wn_hf_scale_readable(scale))
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s is %s; scales are read from F32, BF16 and F8_E8M0", dir, scale->name,
                   wn_dtype_name(scale->dtype));
  if (!wn_hf_scale_fits(scale, entry))
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s has not the shape [%lld, %lld] of one scale for each 128 x 128 block",
                   dir, scale->name, (long long)wn_f8_blocks(entry->dim[0]), (long long)wn_f8_blocks(entry->dim[1]));
  return NULL;
}

wn_status wn_hf_weight_find(wn_hf_weight *out, const wn_hf_dir *dir, const char *name) {
  const wn_st_entry *entry = wn_hf_dir_find(dir, name, NULL), *scale = wn_hf_scale_entry(dir, name);
  bool fp8 = entry && entry->dtype == WN_F8_E4M3;
  *out = (wn_hf_weight){0};
  if (fp8)
    WN_TRY(check_scale(entry, scale, wn_hf_dir_path(dir)));
  else if (scale)
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s belongs to no FP8 weight: %s is %s", wn_hf_dir_path(dir), scale->name,
                   name, entry ? wn_dtype_name(entry->dtype) : "absent");
  *out = (wn_hf_weight){entry, scale};
  return NULL;
}

/* ---- finite numbers ---- */

wn_status wn_hf_refuse_number(const wn_st_entry *entry, int64_t i, float x, const char *why) {
  int64_t place[WN_MAX_RANK] = {0};
  char text[WN_SHAPE_TEXT_BYTES];
  for (int32_t axis = entry->rank - 1; axis >= 0; i /= entry->dim[axis--]) place[axis] = i % entry->dim[axis];
  wn_shape_text(text, entry->rank, place);
  return WN_FAIL(WN_E_INPUT, "%s: tensor %s: element %s is %g%s", wn_safetensors_path(entry->file), entry->name, text,
                 (double)x, why);
}

#define NOT_FINITE "; weights are finite numbers"

/* Every NaN and infinity has larger bits than any number, so a maximum of integers finds one. most: the largest. */
static wn_status check_singles(const wn_st_entry *entry, uint32_t most, const float *x, int64_t first) {
  if (most < WN_F32_INFINITY) return NULL;
  while ((wn_bits_of(*x) & 0x7fffffffu) < WN_F32_INFINITY) x++, first++;
  return wn_hf_refuse_number(entry, first, *x, NOT_FINITE);
}

static uint16_t largest_of(const uint16_t *x, int64_t n) {
  uint16_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    uint16_t magnitude = x[i] & 0x7fff;
    most = magnitude > most ? magnitude : most;
  }
  return most;
}

/* x: BF16, or F16 where the entry is that; most: the largest of them. */
static wn_status check_halves(const wn_st_entry *entry, uint16_t most, const uint16_t *x, int64_t first) {
  bool brain = entry->dtype == WN_BF16;
  uint16_t infinite = brain ? WN_BF16_INFINITY : WN_F16_INFINITY;
  if (most < infinite) return NULL;
  while ((*x & 0x7fff) < infinite) x++, first++;
  return wn_hf_refuse_number(entry, first, brain ? wn_f32_from_bf16(*x) : wn_f32_from_f16(*x), NOT_FINITE);
}

/* rounded: what x became as BF16. */
static wn_status check_range(const wn_st_entry *entry, const uint16_t *rounded, const float *x, int64_t first,
                             int64_t n) {
  if (largest_of(rounded, n) < WN_BF16_INFINITY) return NULL;
  while ((*rounded & 0x7fff) < WN_BF16_INFINITY) rounded++, x++, first++;
  return wn_hf_refuse_number(entry, first, *x, WN_HF_BEYOND_BF16);
}

/* ---- reading ---- */

/* Elements first .. first + count - 1 of an F32, BF16 or F16 tensor, as floats; checked: which are finite. Singles come
 * by way of a buffer that stays in the cache: looked at where they lie in the end, they would be fetched again. */
static wn_status read_plain(float *out, const wn_st_entry *entry, int64_t first, int64_t count, bool checked) {
  union {
    float single[CHUNK / 2];
    uint16_t half[CHUNK];
  } raw;
  bool single = entry->dtype == WN_F32, brain = entry->dtype == WN_BF16;
  int64_t most_at_once = single ? CHUNK / 2 : CHUNK, width = wn_dtype_bytes(entry->dtype);
  for (int64_t done = 0, n; done < count; done += n) {
    n = count - done < most_at_once ? count - done : most_at_once;
    WN_TRY(wn_st_read(&raw, entry, (uint64_t)((first + done) * width), (uint64_t)(n * width)));
    if (single) {
      uint32_t most = wn_f32s_stream(out + done, raw.single, n);
      if (checked) WN_TRY(check_singles(entry, most, raw.single, first + done));
    } else {
      uint16_t most = brain ? wn_f32s_from_bf16(out + done, raw.half, n) : wn_f32s_from_f16(out + done, raw.half, n);
      if (checked) WN_TRY(check_halves(entry, most, raw.half, first + done));
    }
  }
  return NULL;
}

static wn_status read_powers(float *out, const wn_st_entry *entry, int64_t first, int64_t count) {
  uint8_t raw[CHUNK];
  for (int64_t done = 0, n; done < count; done += n) {
    n = count - done < CHUNK ? count - done : CHUNK;
    WN_TRY(wn_st_read(raw, entry, (uint64_t)(first + done), (uint64_t)n));
    for (int64_t i = 0; i < n; i++) out[done + i] = wn_f32_from_e8m0(raw[i]);
  }
  return NULL;
}

wn_status wn_hf_read_scales(float *out, const wn_hf_weight *weight, int64_t first, int64_t count) {
  const wn_st_entry *scale = weight->scale;
  WN_TRY(scale->dtype == WN_F8_E8M0 ? read_powers(out, scale, first, count)
                                    : read_plain(out, scale, first, count, false));
  for (int64_t i = 0; i < count; i++)
    if (!(out[i] > 0 && out[i] <= MOST_SCALE))
      return WN_FAIL(WN_E_INPUT, "%s: tensor %s: scale [%lld, %lld] is %g; scales lie above 0 and below 7.6e35",
                     wn_safetensors_path(scale->file), scale->name, (long long)((first + i) / scale->dim[1]),
                     (long long)((first + i) % scale->dim[1]), (double)out[i]);
  return NULL;
}

/* codes: of elements from `first` on, one of which is NaN. */
static wn_status holds_nan(const wn_st_entry *entry, const uint8_t *codes, int64_t first) {
  while ((*codes & 0x7f) != 0x7f) codes++, first++;
  return WN_FAIL(WN_E_INPUT, "%s: tensor %s holds NaN at [%lld, %lld]", wn_safetensors_path(entry->file), entry->name,
                 (long long)(first / entry->dim[1]), (long long)(first % entry->dim[1]));
}

static wn_status read_codes(uint8_t *out, const wn_st_entry *entry, int64_t first, int64_t count) {
  WN_TRY(wn_st_read(out, entry, (uint64_t)first, (uint64_t)count));
  uint8_t most = 0; /* a maximum of bytes stays bytes in vector code */
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; i++) {
    uint8_t magnitude = out[i] & 0x7f;
    most = magnitude > most ? magnitude : most;
  }
  return most == 0x7f ? holds_nan(entry, out, first) : NULL;
}

typedef struct source {
  const wn_st_entry *entry;
  float *scales;     /* NULL: not FP8; else from a row of blocks on */
  int64_t block_row; /* that one */
} source;

static wn_status read_floats(float *out, const source *in, int64_t first, int64_t count) {
  const wn_st_entry *entry = in->entry;
  uint8_t raw[CHUNK];
  if (!in->scales) return read_plain(out, entry, first, count, true);
  int64_t skipped = in->block_row * WN_F8_BLOCK * entry->dim[1];
  for (int64_t done = 0, n; done < count; done += n) { /* while it is in the cache */
    n = count - done < CHUNK ? count - done : CHUNK;
    WN_TRY(read_codes(raw, entry, first + done, n));
    wn_f8_dequantise(out + done, raw, in->scales, entry->dim[1], first + done - skipped, n);
    wn_f32s_round_to_bf16(out + done, n);
  }
  return NULL;
}

static wn_status read_as(void *out, wn_dtype dtype, const source *in, int64_t first, int64_t count) {
  float buffer[CHUNK];
  if (dtype == WN_F32) return read_floats(out, in, first, count);
  if (dtype == in->entry->dtype) {
    WN_TRY(wn_st_read(out, in->entry, 2 * (uint64_t)first, 2 * (uint64_t)count));
    return check_halves(in->entry, largest_of(out, count), out, first);
  }
  for (int64_t done = 0, n; done < count; done += n) {
    n = count - done < CHUNK ? count - done : CHUNK;
    WN_TRY(read_floats(buffer, in, first + done, n));
    if (dtype == WN_BF16) {
      wn_bf16s_from_f32((uint16_t *)out + done, buffer, n);
      WN_TRY(check_range(in->entry, (const uint16_t *)out + done, buffer, first + done, n));
    } else {
      for (int64_t i = 0; i < n; i++) ((double *)out)[done + i] = (double)buffer[i];
    }
  }
  return NULL;
}

/* The scales of all rows that the elements touch. */
static wn_status open_scales(source *in, const wn_hf_weight *weight, int64_t first, int64_t count) {
  const wn_st_entry *entry = weight->entry;
  int64_t across = weight->scale->dim[1], band = WN_F8_BLOCK * entry->dim[1];
  in->block_row = first / band;
  int64_t rows = (first + count - 1) / band - in->block_row + 1;
  in->scales = malloc((size_t)(rows * across) * sizeof *in->scales);
  if (!in->scales) return WN_FAIL(WN_E_MEMORY, "out of memory for the scales of %s", entry->name);
  return wn_hf_read_scales(in->scales, weight, in->block_row * across, rows * across);
}

wn_status wn_hf_read(void *out, wn_dtype dtype, const wn_hf_weight *weight, int64_t first, int64_t count) {
  const wn_st_entry *entry = weight->entry;
  bool fp8 = entry->dtype == WN_F8_E4M3 && weight->scale;
  WN_ASSERT(dtype == WN_F32 || dtype == WN_F64 || dtype == WN_BF16 || (dtype == WN_F8_E4M3 && fp8), "%s wanted as %s",
            entry->name, wn_dtype_name(dtype));
  if (!fp8 && entry->dtype != WN_F32 && entry->dtype != WN_F16 && entry->dtype != WN_BF16)
    return WN_FAIL_HINT(WN_E_INPUT, "weights are read from F32, F16, BF16, and F8_E4M3 with scales",
                        "%s: tensor %s is stored as %s", wn_safetensors_path(entry->file), entry->name,
                        wn_dtype_name(entry->dtype));
  int64_t total = (int64_t)entry->bytes / wn_dtype_bytes(entry->dtype);
  WN_ASSERT(first >= 0 && count >= 0 && first <= total && count <= total - first, "%s: elements %lld + %lld of %lld",
            entry->name, (long long)first, (long long)count, (long long)total);
  if (count == 0) return NULL;
  if (dtype == WN_F8_E4M3) return read_codes(out, entry, first, count);
  source in = {.entry = entry};
  wn_status status = fp8 ? open_scales(&in, weight, first, count) : NULL;
  if (!status) status = read_as(out, dtype, &in, first, count);
  free(in.scales);
  return status;
}
