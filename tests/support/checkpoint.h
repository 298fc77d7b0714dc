/* A tiny model with a store, on the CPU, whose every value is a function of (seed, parameter, field, element): what a
 * checkpoint must bring back is known without keeping a copy. For tests of src/train; one process holds several of
 * these. */
#ifndef WN_TEST_CHECKPOINT_H
#define WN_TEST_CHECKPOINT_H

#include <jansson.h>

#include "kernels/cpu/cpu.h"
#include "support/temp.h"
#include "train/checkpoint_dirs.h"
#include "train/checkpoint_parts.h"

static const wn_model_config test_config = {.vocab_size = 19,
                                            .hidden_size = 10,
                                            .intermediate_size = 7,
                                            .moe_intermediate_size = 3,
                                            .num_hidden_layers = 3,
                                            .first_k_dense_replace = 1,
                                            .num_attention_heads = 2,
                                            .n_routed_experts = 4,
                                            .n_shared_experts = 1,
                                            .num_experts_per_tok = 2,
                                            .n_group = 1,
                                            .topk_group = 1,
                                            .norm_topk_prob = true,
                                            .routed_scaling_factor = 1.5,
                                            .q_lora_rank = 6,
                                            .kv_lora_rank = 5,
                                            .qk_nope_head_dim = 4,
                                            .qk_rope_head_dim = 4,
                                            .v_head_dim = 3,
                                            .has_indexer = true,
                                            .index_n_heads = 3,
                                            .index_head_dim = 5,
                                            .index_topk = 4,
                                            .rms_norm_eps = 1e-6,
                                            .rope_theta = 10000,
                                            .initializer_range = 0.02,
                                            .max_position_embeddings = 64,
                                            .bos_token_id = 0,
                                            .eos_token_id = 1};

typedef struct test_rig {
  wn_world *world; /* borrowed */
  wn_device *device;
  wn_model *model;
  wn_store *store;
  wn_group *all;
  wn_checkpoint_plan plan;
} test_rig;

static const wn_state test_state = {.step = 100,
                                    .tokens = 123456789012,
                                    .adam_base = 97,
                                    .adam_indexer = 98,
                                    .router_bias_updates = 96,
                                    .skipped = 3,
                                    .skipped_in_a_row = 1,
                                    .indexer_trained = true};

/* act: what operations would take weights as. BF16 as on a GPU: good for everything that runs none. */
static inline wn_status test_rig_create_taking(wn_dtype act, test_rig *rig, wn_world *world,
                                               const wn_model_config *config, wn_param_settings settings,
                                               wn_stage stage, const char *run_dir, const char *init_dir) {
  *rig = (test_rig){.world = world, .all = wn_world_all(world)};
  WN_TRY(wn_cpu_create_f32(
      &rig->device,
      (wn_cpu_settings){.threads = 1, .weights_bytes = 64 << 20, .stash_bytes = 1 << 20, .scratch_bytes = 1 << 20}));
  rig->device->dtype_of[WN_ACT] = act;
  WN_TRY(wn_model_create(&rig->model, rig->device, config, settings));
  if (init_dir[0] && wn_path_exists(init_dir)) {
    wn_hf_dir *init;
    WN_TRY(wn_hf_dir_open(&init, init_dir));
    wn_params_keep_fp8(rig->model->table.params, rig->model->table.n, init);
    wn_hf_dir_close(init);
  }
  WN_TRY(wn_store_create(&rig->store, rig->device, world, &rig->all, 1, rig->model->table.params, rig->model->table.n));
  rig->plan = (wn_checkpoint_plan){.model = rig->model,
                                   .store = rig->store,
                                   .world = world,
                                   .stage = stage,
                                   .seed = 18446744073709551615u,
                                   .run_dir = run_dir,
                                   .init_dir = init_dir,
                                   .shard_bytes = 6000,
                                   .keep = 0};
  return NULL;
}

static inline wn_status test_rig_create(test_rig *rig, wn_world *world, const wn_model_config *config,
                                        wn_param_settings settings, wn_stage stage, const char *run_dir,
                                        const char *init_dir) {
  return test_rig_create_taking(WN_F32, rig, world, config, settings, stage, run_dir, init_dir);
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

/* Sets or compares every value this rank holds. In a comparison of masters `bf16` says that they went through a BF16
 * file. */
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
            return WN_FAIL(WN_E_CHECK, "%s%s[%lld] is %.9g instead of %.9g", p->hf_name, wn_field_suffix(fields[f]),
                           (long long)(at.first + e), (double)*have, (double)want);
        }
      }
    }
  }
  return NULL;
}

static inline wn_status test_same_state(const wn_state *a, const wn_state *b) {
  bool same = a->step == b->step && a->tokens == b->tokens && a->adam_base == b->adam_base &&
              a->adam_indexer == b->adam_indexer && a->router_bias_updates == b->router_bias_updates &&
              a->skipped == b->skipped && a->skipped_in_a_row == b->skipped_in_a_row &&
              a->indexer_trained == b->indexer_trained;
  return same ? NULL : WN_FAIL(WN_E_CHECK, "the state came back different (step %lld)", (long long)a->step);
}

/* ---- a Hugging Face directory ---- */

typedef struct test_dir {
  wn_dtype dtype;        /* of the weights; F32 tensors stay F32 */
  int32_t shards;        /* 1: model.safetensors; more: files with an index, tensors dealt out in runs */
  bool mtp;              /* a layer behind the last, in the last shard */
  const char *without;   /* a parameter whose name holds this is left out */
  const char *misshapen; /* gets one row more */
  const char *fp8;       /* matrices whose names hold this become F8_E4M3, with one scale beside each */
  const char *unscaled;  /* of these, those that have none */
  const char *misscaled; /* and those that have two */
  const char *extra;     /* a tensor that no model has */
} test_dir;

enum { TEST_MOST_TENSORS = 256 };
typedef struct test_tensors {
  wn_st_spec spec[TEST_MOST_TENSORS];
  void *data[TEST_MOST_TENSORS];
  char name[TEST_MOST_TENSORS][WN_FIELD_NAME_BYTES];
  int64_t n;
} test_tensors;

/* What element e of an FP8 weight of `param` holds, all of which lie in one block: code and scale. */
static inline uint8_t test_code(int32_t param, int64_t e) {
  return (uint8_t)((param + e) % 127 + (e % 3 ? 128 : 0));
}
static inline float test_scale(int32_t param) {
  return 0.001f * (float)(param + 1);
}

/* Element e holds test_value(seed, param, weight, e) in `dtype`. */
static inline void test_add(test_tensors *t, uint64_t seed, const char *name, int32_t param, wn_dtype dtype,
                            int32_t rank, int64_t d0, int64_t d1) {
  assert_true(t->n < TEST_MOST_TENSORS);
  int64_t count = rank == 1 ? d0 : d0 * d1;
  void *data = calloc((size_t)count, (size_t)wn_dtype_bytes(dtype));
  assert_non_null(data);
  for (int64_t e = 0; e < count; e++) {
    float x = test_value(seed, param, WN_FIELD_WEIGHT, e);
    if (dtype == WN_F32) ((float *)data)[e] = x;
    if (dtype == WN_BF16) ((uint16_t *)data)[e] = wn_bf16_from_f32(x);
    if (dtype == WN_F8_E4M3) ((uint8_t *)data)[e] = test_code(param, e);
    if (dtype == WN_F16) ((uint16_t *)data)[e] = (uint16_t)(0x3c00 + e % 1024); /* 1 + (e mod 1024) / 1024 */
  }
  assert_true(strlen(name) < WN_FIELD_NAME_BYTES);
  memcpy(t->name[t->n], name, strlen(name) + 1);
  t->spec[t->n] = (wn_st_spec){.name = t->name[t->n], .dtype = dtype, .rank = rank, .dim = {d0, d1}};
  t->data[t->n++] = data;
}

static inline void test_add_scale(test_tensors *t, const char *name, int32_t param, int64_t rows) {
  char scale[WN_FIELD_NAME_BYTES + 16];
  snprintf(scale, sizeof scale, "%.*s" WN_HF_SCALE_SUFFIX, WN_FIELD_NAME_BYTES, name);
  test_add(t, 0, scale, 0, WN_F32, 2, rows, 1);
  *(float *)t->data[t->n - 1] = test_scale(param);
}

static inline bool test_named(const char *name, const char *part) {
  return part && strstr(name, part);
}

static inline void test_dir_write(const char *path, const wn_model_config *config, test_dir how, uint64_t seed) {
  wn_param_table table;
  test_tensors *t = calloc(1, sizeof *t);
  char file[WN_PATH_BYTES];
  OK(wn_param_table_create(&table, config, (wn_param_settings){.file_dtype = WN_F32}));
  for (int32_t i = 0; i < table.n; i++) {
    const wn_param *p = &table.params[i];
    bool always = p->slot == WN_P_ROUTER_BIAS || p->slot == WN_P_INDEX_K_NORM || p->slot == WN_P_INDEX_K_NORM_BIAS;
    if (test_named(p->hf_name, how.without)) continue;
    bool fp8 = p->rank == 2 && test_named(p->hf_name, how.fp8);
    wn_dtype dtype = fp8 ? WN_F8_E4M3 : always ? WN_F32 : how.dtype;
    test_add(t, seed, p->hf_name, i, dtype, p->rank, p->dim[0] + (test_named(p->hf_name, how.misshapen) ? 1 : 0),
             p->dim[1]);
    if (fp8 && !test_named(p->hf_name, how.unscaled))
      test_add_scale(t, p->hf_name, i, test_named(p->hf_name, how.misscaled) ? 2 : 1);
  }
  if (how.extra) test_add(t, seed, how.extra, 901, WN_F32, 1, 3, 0);
  if (how.mtp) {
    snprintf(file, sizeof file, "model.layers.%d.eh_proj.weight", config->num_hidden_layers);
    test_add(t, seed, file, 902, WN_BF16, 2, 3, 5);
    snprintf(file, sizeof file, "model.layers.%d.enorm.weight", config->num_hidden_layers);
    test_add(t, seed, file, 903, WN_F32, 1, 7, 0);
  }
  if (how.mtp && how.fp8) {
    snprintf(file, sizeof file, "model.layers.%d.mlp.down_proj.weight", config->num_hidden_layers);
    test_add(t, seed, file, 904, WN_F8_E4M3, 2, 3, 5);
    if (!test_named(file, how.unscaled)) test_add_scale(t, file, 904, 1);
  }
  OK(wn_make_dirs(path));
  OK(wn_model_config_save(config, path, NULL, "float32"));
  json_t *map = json_object();
  for (int32_t s = 0; s < how.shards; s++) {
    char name[64];
    int64_t from = t->n * s / how.shards, to = t->n * (s + 1) / how.shards;
    if (how.shards == 1)
      snprintf(name, sizeof name, "model.safetensors");
    else
      snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", s + 1, how.shards);
    OK(wn_path(file, "%s/%s", path, name));
    OK(wn_safetensors_write(file, t->spec + from, (const void *const *)t->data + from, to - from));
    for (int64_t i = from; i < to; i++) json_object_set_new(map, t->name[i], json_string(name));
  }
  json_t *root = json_pack("{so}", "weight_map", map);
  OK(wn_path(file, "%s/" WN_INDEX_NAME, path));
  if (how.shards > 1) assert_int_equal(json_dump_file(root, file, 0), 0);
  json_decref(root);
  for (int64_t i = 0; i < t->n; i++) free(t->data[i]);
  free(t);
  wn_param_table_free(&table);
}

static inline bool test_same_bytes(const wn_st_entry *a, const wn_st_entry *b) {
  return a && b && a->dtype == b->dtype && a->bytes == b->bytes && memcmp(a->data, b->data, a->bytes) == 0;
}

#endif
