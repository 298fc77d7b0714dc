/* config.json: the input is the file. What is accepted is written out, and reads back as the same model. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "config/model_config.h"
#include "fuzz.h"
#include "model/flops.h"
#include "model/params.h"

#define PATH FUZZ_ROOT "/config.json"

/* What model/params.c has for models with weights, which nothing here is. */
wn_status wn_store_acquire(wn_store *store, int32_t layer, wn_tensor *by_param) {
  WN_ASSERT(!store && !by_param, "layer %d of a configuration", layer);
  return NULL;
}

static void use(const wn_model_config *config) {
  int32_t half = config->qk_rope_head_dim / 2;
  float *inv_freq = malloc((size_t)half * sizeof *inv_freq);
  WN_ASSERT(inv_freq, "no memory for %d angles", half);
  wn_model_config_inv_freq(config, inv_freq);
  for (int32_t i = 0; i < half; i++) FUZZ_CHECK(isfinite(inv_freq[i]));
  free(inv_freq);
  FUZZ_CHECK(isfinite(wn_model_config_softmax_scale(config)));
  if ((int64_t)config->num_hidden_layers * config->n_routed_experts > 256) return; /* a table takes its time */
  wn_param_table table;
  wn_param_settings settings = {.train_base = true, .train_indexer = true, .file_dtype = WN_BF16};
  wn_status status = wn_param_table_create(&table, config, settings);
  if (status) return fuzz_refused(status, WN_E_CONFIG);
  for (int32_t i = 0; i < table.n; i++)
    for (int32_t axis = 0; axis < table.params[i].rank; axis++) FUZZ_CHECK(table.params[i].dim[axis] > 0);
  wn_param_table_free(&table);
  FUZZ_CHECK(wn_flops(config, &(wn_flops_work){.rows = 1, .visible_pairs = 1, .head = true}) > 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  wn_model_config config, again;
  memset(&config, 0, sizeof config);
  memset(&again, 0, sizeof again);
  fuzz_file(PATH, data, size);
  wn_status status = wn_model_config_load(&config, FUZZ_ROOT);
  if (status) return fuzz_refused(status, WN_E_CONFIG), 0;
  use(&config);
  status = wn_model_config_save(&config, FUZZ_ROOT, FUZZ_ROOT, "bfloat16");
  if (!status) status = wn_model_config_load(&again, FUZZ_ROOT);
  WN_ASSERT(!status, "what was written is not read: %s", wn_status_text(status));
  FUZZ_CHECK(!memcmp(&config, &again, sizeof config));
  return 0;
}
