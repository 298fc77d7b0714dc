/* What reading and writing config.json share. Internal to src/config. */
#ifndef WN_CONFIG_MODEL_CONFIG_KEYS_H
#define WN_CONFIG_MODEL_CONFIG_KEYS_H

#include <jansson.h>
#include <stddef.h>

#include "config/model_config.h"

typedef struct wn_model_int {
  const char *key; /* NULL ends a table */
  size_t offset;
  int32_t low, high;
} wn_model_int;

extern const wn_model_int
    wn_model_ints[]; /* whole numbers that every model has, but for first_k_dense_replace and q_lora_rank */
extern const wn_model_int wn_model_index_ints[]; /* those of a model with an indexer */

static inline int32_t *wn_model_int_at(wn_model_config *config, const wn_model_int *field) {
  return (int32_t *)(void *)((char *)config + field->offset);
}

/* What YaRN multiplies cos and sin by where no attention_factor is given. Source: transformers modeling_rope_utils.py,
 * _compute_yarn_parameters. */
double wn_model_config_attention_factor(const wn_model_config *config);

/* The file as a JSON object, which the caller releases. */
WN_MUST_USE wn_status wn_model_config_parse(json_t **out, const char *path);

#endif
