/* A tiny model with a store, on the CPU, whose every value is a function of (seed, parameter, field, element): what a
 * checkpoint must bring back is known without keeping a copy. For tests of src/train; one process holds several of these. */
#ifndef WN_TEST_CHECKPOINT_H
#define WN_TEST_CHECKPOINT_H

#include "kernels/cpu/cpu.h"
#include "support/temp.h"
#include "train/checkpoint_dirs.h"
#include "train/checkpoint_parts.h"

static const wn_model_config test_config = {
    .vocab_size = 19, .hidden_size = 10, .intermediate_size = 7, .moe_intermediate_size = 3, .num_hidden_layers = 3,
    .first_k_dense_replace = 1, .num_attention_heads = 2, .n_routed_experts = 4, .n_shared_experts = 1, .num_experts_per_tok = 2,
    .n_group = 1, .topk_group = 1, .norm_topk_prob = true, .routed_scaling_factor = 1.5, .q_lora_rank = 6, .kv_lora_rank = 5,
    .qk_nope_head_dim = 4, .qk_rope_head_dim = 4, .v_head_dim = 3, .has_indexer = true, .index_n_heads = 3, .index_head_dim = 5,
    .index_topk = 4, .rms_norm_eps = 1e-6, .rope_theta = 10000, .initializer_range = 0.02, .max_position_embeddings = 64,
    .bos_token_id = 0, .eos_token_id = 1};

typedef struct test_rig {
  wn_world *world; /* borrowed */
  wn_device *device;
  wn_model *model;
  wn_store *store;
  wn_group *all;
  wn_checkpoint_plan plan;
} test_rig;

enum { TEST_STATE_VALUES = 7 };
static const wn_state test_state = {.step = 100, .tokens = 123456789012, .adam_base = 97, .adam_indexer = 98, .router_bias_updates = 96,
                                    .skipped = 3, .skipped_in_a_row = 1, .indexer_trained = true};

static inline wn_status test_rig_create(test_rig *rig, wn_world *world, const wn_model_config *config, wn_param_settings settings, wn_stage stage,
                                        const char *run_dir, const char *init_dir) {
  *rig = (test_rig){.world = world, .all = wn_world_all(world)};
  WN_TRY(wn_cpu_create_f32(&rig->device, (wn_cpu_settings){.threads = 1, .weights_bytes = 64 << 20, .stash_bytes = 1 << 20, .scratch_bytes = 1 << 20}));
  WN_TRY(wn_model_create(&rig->model, rig->device, config, settings));
  WN_TRY(wn_store_create(&rig->store, rig->device, world, &rig->all, 1, rig->model->table.params, rig->model->table.n));
  rig->plan = (wn_checkpoint_plan){.model = rig->model, .store = rig->store, .world = world, .stage = stage, .seed = 18446744073709551615u,
                                   .run_dir = run_dir, .init_dir = init_dir, .shard_bytes = 2500, .keep = 0};
  return NULL;
}

static inline void test_rig_free(test_rig *rig) {
  wn_store_free(rig->store);
  wn_model_free(rig->model);
  if (rig->device) wn_cpu_free_f32(rig->device);
}

static inline float test_value(uint64_t seed, int32_t param, wn_field field, int64_t element) {
  float x = (float)wn_rng_normal(seed, WN_RNG_TEST, (uint64_t)param << 40 | (uint64_t)field << 36 | (uint64_t)element);
  return field == WN_FIELD_V ? x * x : x;
}

typedef enum test_act { TEST_FILL, TEST_CLEAR, TEST_COMPARE } test_act;

/* Sets or compares every value this rank holds. In a comparison of masters `bf16` says that they went through a BF16 file. */
static inline wn_status test_values(test_rig *rig, test_act act, uint64_t seed, bool weights_only, bool bf16) {
  static const wn_field fields[] = {WN_FIELD_WEIGHT, WN_FIELD_M, WN_FIELD_V};
  for (int32_t i = 0; i < wn_store_pieces(rig->store); i++) {
    wn_piece *piece = wn_store_piece(rig->store, i);
    for (int32_t f = 0; f < 3; f++) {
      float *flat = wn_field_of(piece, fields[f])->data;
      if (!flat || (weights_only && f)) continue;
      for (int32_t s = 0; s < piece->n_segments; s++) {
        wn_segment at = piece->segments[s];
        const wn_param *p = &rig->model->table.params[at.param];
        for (int64_t e = 0; e < at.count; e++) {
          float want = test_value(seed, at.param, fields[f], at.first + e), *have = &flat[at.offset + e];
          if (bf16 && f == 0 && p->file_dtype == WN_BF16) want = wn_f32_from_bf16(wn_bf16_from_f32(want));
          if (act == TEST_FILL) *have = want;
          if (act == TEST_CLEAR) *have = -7.25f;
          if (act == TEST_COMPARE && memcmp(have, &want, sizeof want) != 0)
            return WN_FAIL(WN_E_CHECK, "%s%s[%lld] is %.9g instead of %.9g", p->hf_name, wn_field_suffix(fields[f]), (long long)(at.first + e),
                           (double)*have, (double)want);
        }
      }
    }
  }
  return NULL;
}

static inline wn_status test_same_state(const wn_state *a, const wn_state *b) {
  bool same = a->step == b->step && a->tokens == b->tokens && a->adam_base == b->adam_base && a->adam_indexer == b->adam_indexer &&
              a->router_bias_updates == b->router_bias_updates && a->skipped == b->skipped && a->skipped_in_a_row == b->skipped_in_a_row &&
              a->indexer_trained == b->indexer_trained;
  return same ? NULL : WN_FAIL(WN_E_CHECK, "the state came back different (step %lld)", (long long)a->step);
}

#endif
