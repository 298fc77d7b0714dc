#include "model/counts.h"

#include "model/params.h"

const char *wn_model_part_name(wn_model_part part) {
  static const char *const names[WN_N_PARTS] = {
      [WN_PART_EMBEDDING] = "embedding",
      [WN_PART_ATTENTION] = "attention",
      [WN_PART_INDEXER] = "indexer",
      [WN_PART_DENSE_MLP] = "dense MLP",
      [WN_PART_EXPERTS] = "routed experts",
      [WN_PART_SHARED_EXPERTS] = "shared experts",
      [WN_PART_ROUTER] = "router",
      [WN_PART_NORMS] = "norms",
      [WN_PART_HEAD] = "head",
  };
  WN_ASSERT((unsigned)part < WN_N_PARTS, "part %d", (int)part);
  return names[part];
}

static wn_model_part part_of(const wn_param *p) {
  switch ((wn_slot)p->slot) {
  case WN_P_EMBED: return WN_PART_EMBEDDING;
  case WN_P_HEAD: return WN_PART_HEAD;
  case WN_P_MLP_GATE:
  case WN_P_MLP_UP:
  case WN_P_MLP_DOWN: return WN_PART_DENSE_MLP;
  case WN_P_ROUTER:
  case WN_P_ROUTER_BIAS: return WN_PART_ROUTER;
  case WN_P_SHARED_GATE:
  case WN_P_SHARED_UP:
  case WN_P_SHARED_DOWN: return WN_PART_SHARED_EXPERTS;
  case WN_P_EXPERT_GATE:
  case WN_P_EXPERT_UP:
  case WN_P_EXPERT_DOWN: return WN_PART_EXPERTS;
  case WN_P_INDEX_Q_B:
  case WN_P_INDEX_K:
  case WN_P_INDEX_K_NORM:
  case WN_P_INDEX_K_NORM_BIAS:
  case WN_P_INDEX_WEIGHTS: return WN_PART_INDEXER;
  case WN_P_INPUT_NORM:
  case WN_P_Q_A_NORM:
  case WN_P_KV_A_NORM:
  case WN_P_POST_NORM:
  case WN_P_FINAL_NORM: return WN_PART_NORMS;
  default: return WN_PART_ATTENTION;
  }
}

/* The layer that would follow the last one is what a layer for multi-token prediction is made of. */
wn_status wn_model_count(wn_model_counts *out, const wn_model_config *config, int32_t mtp_layers) {
  wn_model_config with_one = *config;
  wn_param_table table;
  int64_t one_layer = 0, hidden = config->hidden_size;
  *out = (wn_model_counts){0};
  with_one.num_hidden_layers++;
  WN_TRY(wn_param_table_create(&table, &with_one, (wn_param_settings){.file_dtype = WN_F32}));
  for (int32_t i = 0; i < table.n; i++) {
    const wn_param *p = &table.params[i];
    int64_t elements = wn_param_elements(p);
    if (p->layer == config->num_hidden_layers) {
      one_layer += elements;
      continue;
    }
    out->part[part_of(p)] += elements;
    out->main += elements;
    if (p->expert < config->num_experts_per_tok) out->active += elements;
  }
  wn_param_table_free(&table);
  out->mtp_own = mtp_layers * (one_layer + 3 * hidden + 2 * hidden * hidden);
  out->mtp_copies = mtp_layers * (out->part[WN_PART_EMBEDDING] + out->part[WN_PART_HEAD]);
  out->total = out->main + out->mtp_own + out->mtp_copies;
  return NULL;
}
