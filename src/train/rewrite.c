#include "train/rewrite.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WHOLE ".self_attn.q_proj."
#define SECOND ".self_attn.q_b_proj."

/* How far from 1 a number times its inverse in BF16 may be: half a unit of 8 bits, and FP32's own rounding. */
#define NEAR_ONE 0x1.01p-8f

wn_status wn_source_open(wn_hf_dir **out, const char *path, const wn_model_config *config) {
  wn_hf_dir *dir;
  wn_status status = NULL;
  int64_t n = 0;
  WN_TRY(wn_hf_dir_open(&dir, path));
  bool whole = config->has_indexer && wn_hf_dir_find(dir, "model.layers.0" WHOLE "weight", NULL);
  for (int64_t i = 0; whole && !status && i < wn_hf_dir_count(dir); i++) {
    const char *name = wn_hf_dir_at(dir, i, NULL)->name;
    if (strstr(name, WHOLE) && wn_name_layer(name) >= config->num_hidden_layers)
      status =
          WN_FAIL_HINT(WN_E_INPUT, "leave the layers for multi-token prediction out of the directory",
                       "%s: tensor %s of a prediction layer has no place in a model with low-rank queries", path, name);
  }
  if (whole && !status) status = wn_hf_dir_rename(dir, WHOLE, SECOND, &n);
  if (status) {
    wn_hf_dir_close(dir);
    return status;
  }
  *out = dir;
  return NULL;
}

bool wn_rewrite_makes(const wn_hf_dir *source, const wn_param *p) {
  int32_t shard;
  char name[WN_NAME_BYTES];
  if ((p->slot != WN_P_Q_A && p->slot != WN_P_Q_A_NORM) || wn_hf_dir_find(source, p->hf_name, NULL)) return false;
  snprintf(name, sizeof name, "model.layers.%d" SECOND "weight", p->layer);
  return wn_hf_dir_find(source, name, &shard) && wn_hf_dir_renamed(source, shard);
}

/* d[hidden] of a layer: 1 / g in BF16. */
static wn_status read_inverses(float *d, int64_t hidden, int32_t layer, const wn_hf_dir *source) {
  char name[WN_NAME_BYTES];
  wn_hf_weight norm;
  snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", layer);
  WN_TRY(wn_hf_weight_find(&norm, source, name));
  WN_ASSERT(norm.entry && norm.entry->rank == 1 && norm.entry->dim[0] == hidden, "%s was not checked", name);
  WN_TRY(wn_hf_read(d, WN_F32, &norm, 0, hidden));
  for (int64_t i = 0; i < hidden; i++) {
    float g = d[i];
    d[i] = wn_f32_from_bf16(wn_bf16_from_f32(1 / g));
    float back = wn_f32_from_bf16(wn_bf16_from_f32(1 / d[i]));
    if (!(fabsf(d[i] * g - 1) <= NEAR_ONE && fabsf(back * d[i] - 1) <= NEAR_ONE))
      return WN_FAIL_HINT(WN_E_INPUT, "the rewriting of queries without a low rank (q_lora_rank null) needs 1 / g",
                          "%s: element %lld of %s is %g, which has no inverse in BF16", wn_hf_dir_path(source),
                          (long long)i, name, (double)g);
  }
  return NULL;
}

static float element(const wn_param *p, const float *d, int64_t hidden, int64_t i) {
  if (p->slot == WN_P_Q_A_NORM) return wn_f32_from_bf16(wn_bf16_from_f32(1 / d[i]));
  return i / hidden == i % hidden ? d[i / hidden] : 0;
}

wn_status wn_rewrite_make(wn_device *device, const wn_part *part, const wn_param *p, const wn_hf_dir *source,
                          float *buffer) {
  int64_t hidden = p->dim[0];
  WN_ASSERT(p->rank == 1 || p->dim[1] == hidden, "%s is no diagonal", p->hf_name);
  float *d = malloc((size_t)hidden * sizeof *d);
  if (!d) return WN_FAIL(WN_E_MEMORY, "out of memory for %s", p->hf_name);
  wn_status status = read_inverses(d, hidden, p->layer, source); /* on all ranks, whatever part they hold */
  for (int64_t done = 0, n; part->piece && !status && done < part->count; done += n) {
    n = part->count - done < WN_COPY_ELEMENTS ? part->count - done : WN_COPY_ELEMENTS;
    for (int64_t i = 0; i < n; i++) buffer[i] = element(p, d, hidden, part->first + done + i);
    wn_tensor place = wn_tensor_slice(part->piece->master, 0, part->offset + done, n);
    status = wn_floats_upload(device, &place, buffer);
  }
  free(d);
  return status;
}
