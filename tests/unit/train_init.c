/* Weights for a fresh run: what is read exactly, what is drawn, and every refusal by name. */
#include "base/float8.h"
#include "support/checkpoint.h"
#include "support/one_world.h"

static const wn_param_settings adapt = {.train_base = true, .train_indexer = true, .file_dtype = WN_F32};
static const wn_param_settings warmup = {.train_indexer = true, .file_dtype = WN_F32};

static wn_model_config without_indexer(void) {
  wn_model_config config = test_config;
  config.has_indexer = false;
  return config;
}

/* The value of element `e` of parameter `p` as this rank (the only one) holds it. */
static float held(test_rig *rig, int32_t p, int64_t e) {
  for (int32_t i = 0; i < wn_store_pieces(rig->store); i++) {
    wn_piece *piece = wn_store_piece(rig->store, i);
    for (int32_t s = 0; s < piece->n_segments; s++)
      if (piece->segments[s].param == p) return ((float *)piece->master.data)[piece->segments[s].offset + e];
  }
  fail_msg("parameter %d is nowhere", p);
  return 0;
}

/* What a rank then holds of element e, `code` times `scale` rounded as weight_dequant does. */
static float dequantised(int32_t p, int64_t e) {
  return wn_f32_from_bf16(wn_bf16_from_f32(wn_f32_from_e4m3(test_code(p, e)) * test_scale(p)));
}

static void reads(void **state, wn_dtype dtype, int32_t shards, const char *fp8) {
  test_rig rig;
  wn_temp_path init = wn_temp(state, "init");
  test_dir_write(init.text, &test_config, (test_dir){.dtype = dtype, .shards = shards, .mtp = true, .fp8 = fp8}, 5);
  OK(test_rig_create(&rig, world, &test_config, adapt, WN_STAGE_ADAPT, *state, init.text));
  OK(test_values(&rig, TEST_CLEAR, 0, true, false));
  OK(wn_init_load(&rig.plan, init.text, false));
  for (int32_t p = 0; p < rig.model->table.n; p++) {
    const wn_param *param = &rig.model->table.params[p];
    bool wide =
        param->slot == WN_P_ROUTER_BIAS || param->slot == WN_P_INDEX_K_NORM || param->slot == WN_P_INDEX_K_NORM_BIAS;
    for (int64_t e = 0; e < wn_param_elements(param); e++) {
      float want = test_value(5, p, WN_FIELD_WEIGHT, e);
      if (!wide && dtype == WN_BF16) want = wn_f32_from_bf16(wn_bf16_from_f32(want));
      if (!wide && dtype == WN_F16) want = 1 + (float)(e % 1024) / 1024;
      if (param->rank == 2 && test_named(param->hf_name, fp8)) want = dequantised(p, e);
      if (held(&rig, p, e) != want)
        fail_msg("%s[%lld] is %g instead of %g", param->hf_name, (long long)e, (double)held(&rig, p, e), (double)want);
    }
  }
  test_rig_free(&rig);
}

static void reads_f32(void **state) {
  reads(state, WN_F32, 1, NULL);
}
static void reads_bf16(void **state) {
  reads(state, WN_BF16, 3, NULL);
}
static void reads_f16(void **state) {
  reads(state, WN_F16, 2, NULL);
}
static void reads_fp8(void **state) {
  reads(state, WN_BF16, 5, "proj");
}

/* A new indexer is drawn beside a base that is read; the same numbers as in a wholly random model. */
static void draws(void **state) {
  test_rig rig;
  wn_temp_path init = wn_temp(state, "init");
  wn_model_config base = without_indexer();
  test_dir_write(init.text, &base, (test_dir){.dtype = WN_F32, .shards = 1}, 5);
  OK(test_rig_create(&rig, world, &test_config, warmup, WN_STAGE_WARMUP, *state, init.text));
  for (int32_t pass = 0; pass < 2; pass++) {
    OK(test_values(&rig, TEST_CLEAR, 0, true, false));
    OK(pass ? wn_init_load(&rig.plan, init.text, true) : wn_init_random(&rig.plan));
    for (int32_t p = 0; p < rig.model->table.n; p++) {
      const wn_param *param = &rig.model->table.params[p];
      if (pass && param->kind != WN_INDEXER) continue;
      for (int64_t e = 0; e < wn_param_elements(param); e++)
        assert_true(held(&rig, p, e) == (float)wn_param_initial(param, &test_config, rig.plan.seed, e));
    }
  }
  test_rig_free(&rig);
}

/* As on a GPU: what is frozen is there in BF16 alone, what trains twice, the router's bias in FP32. */
static void rounds_for_a_device_of_bf16(void **state) {
  test_rig rig;
  wn_temp_path init = wn_temp(state, "init");
  test_dir_write(init.text, &test_config, (test_dir){.dtype = WN_F32, .shards = 1}, 5);
  for (int32_t base = 0; base < 2; base++) {
    OK(test_rig_create_taking(WN_BF16, &rig, world, &test_config, base ? adapt : warmup, WN_STAGE_ADAPT, *state,
                              init.text));
    OK(wn_init_load(&rig.plan, init.text, false));
    for (int32_t i = 0; i < wn_store_pieces(rig.store); i++) {
      const wn_piece *piece = wn_store_piece(rig.store, i);
      bool copy = wn_kind_trains(piece->kind), narrow = piece->role == WN_ACT;
      assert_true((piece->weight.data != piece->master.data) == copy);
      assert_int_equal(piece->master.dtype, narrow && !copy ? WN_BF16 : WN_F32);
      assert_int_equal(piece->weight.dtype, narrow ? WN_BF16 : WN_F32);
      for (int32_t s = 0; s < piece->n_segments; s++)
        for (int64_t e = 0; e < piece->segments[s].count; e++) {
          wn_segment at = piece->segments[s];
          float want = test_value(5, at.param, WN_FIELD_WEIGHT, at.first + e);
          uint16_t rounded = wn_bf16_from_f32(want);
          const void *weight = (const char *)piece->weight.data + (at.offset + e) * (narrow ? 2 : 4);
          if (copy) assert_memory_equal((const float *)piece->master.data + at.offset + e, &want, sizeof want);
          assert_memory_equal(weight, narrow ? (const void *)&rounded : &want, narrow ? 2 : 4);
        }
    }
    test_rig_free(&rig);
  }
}

/* What is frozen and lies in FP8 stays FP8: its codes and scales. */
static void keeps_fp8(void **state) {
  test_rig rig;
  int32_t kept = 0;
  wn_temp_path init = wn_temp(state, "init");
  test_dir_write(init.text, &test_config, (test_dir){.dtype = WN_BF16, .shards = 4, .fp8 = "mlp."}, 5);
  OK(test_rig_create(&rig, world, &test_config, warmup, WN_STAGE_WARMUP, *state, init.text));
  OK(wn_init_load(&rig.plan, init.text, false));
  for (int32_t i = 0; i < wn_store_pieces(rig.store); i++) {
    const wn_piece *piece = wn_store_piece(rig.store, i);
    for (int32_t s = 0; s < piece->n_segments; s++) {
      wn_segment at = piece->segments[s];
      const wn_param *param = &rig.model->table.params[at.param];
      assert_int_equal(piece->fp8, param->rank == 2 && test_named(param->hf_name, "mlp."));
      if (!piece->fp8) continue;
      kept++;
      wn_tensor scales = wn_store_scales(rig.store, at.param);
      assert_true(wn_tensor_count(&scales) == 1 && *(const float *)scales.data == test_scale(at.param));
      for (int64_t e = 0; e < at.count; e++)
        assert_int_equal(((const uint8_t *)piece->master.data)[at.offset + e], test_code(at.param, at.first + e));
    }
  }
  assert_int_equal(kept, 3 + 2 * (1 + 3 + 4 * 3));
  test_rig_free(&rig);
}

/* ---- refusals ---- */

static void refuse(void **state, wn_model_config written, test_dir how, bool allow_new_indexer, const char *sentence) {
  test_rig rig;
  wn_temp_path init = wn_temp(state, "init");
  how.shards = how.shards ? how.shards : 1;
  test_dir_write(init.text, &written, how, 5);
  OK(test_rig_create(&rig, world, &test_config, warmup, WN_STAGE_WARMUP, *state, init.text));
  REFUSED(wn_init_load(&rig.plan, init.text, allow_new_indexer), WN_E_INPUT, sentence);
  test_rig_free(&rig);
}

static void missing_one(void **state) {
  refuse(state, test_config, (test_dir){.without = "layers.1.self_attn.kv_b_proj"}, false,
         "1 tensor missing: model.layers.1.self_attn.kv_b_proj.weight");
}

static void missing_many(void **state) {
  refuse(state, test_config, (test_dir){.without = "layernorm"}, false,
         "12 tensors missing: model.layers.0.input_layernorm.weight, model.layers.0.self_attn.q_a_layernorm.weight, "
         "model.layers.0.self_attn.kv_a_layernorm.weight, model.layers.0.post_attention_layernorm.weight, "
         "model.layers.1.input_layernorm.weight, ...");
}

static void missing_indexer(void **state) {
  refuse(state, without_indexer(), (test_dir){.dtype = WN_F32}, false, "15 tensors missing");
}

/* Half an indexer is a damaged directory, not a base. */
static void missing_half_an_indexer(void **state) {
  refuse(state, test_config, (test_dir){.without = "k_norm.bias"}, true,
         "3 tensors missing: model.layers.0.self_attn.indexer.k_norm.bias");
}

static void misshapen(void **state) {
  refuse(state, test_config, (test_dir){.misshapen = "layers.0.mlp.up_proj"}, false,
         "1 tensor misshapen: model.layers.0.mlp.up_proj.weight [8, 10] instead of [7, 10]");
}

static void surplus(void **state) {
  refuse(state, test_config, (test_dir){.extra = "model.layers.2.mlp.gate.weights"}, false,
         "1 tensor that this model does not have: model.layers.2.mlp.gate.weights");
}

static void surplus_layer(void **state) {
  wn_model_config deeper = test_config;
  deeper.num_hidden_layers = 2;
  test_rig rig;
  wn_temp_path init = wn_temp(state, "init");
  test_dir_write(init.text, &test_config, (test_dir){.shards = 1}, 5);
  OK(test_rig_create(&rig, world, &deeper, warmup, WN_STAGE_WARMUP, *state, init.text));
  OK(wn_init_load(&rig.plan, init.text, false)); /* a layer behind the last is an MTP layer: passed over */
  test_rig_free(&rig);
}

/* What is carried goes into files of ours, at the first save; that it cannot is said before the first step. */
static void a_name_that_no_checkpoint_takes(void **state) {
  wn_temp_path init = wn_temp(state, "init"), file = wn_temp(state, "init/model.safetensors");
  char name[WN_FIELD_NAME_BYTES + 1] = "model.layers.3.";
  test_rig rig;
  for (size_t longer = 0; longer < 2; longer++) {
    memset(name + 15, 'x', sizeof name - 17 + longer);
    const wn_st_spec spec = {.name = name, .dtype = WN_F32};
    const void *data = &(float){1};
    test_dir_write(init.text, &test_config, (test_dir){.shards = 1}, 5);
    OK(wn_safetensors_write(file.text, &spec, &data, 1));
    OK(test_rig_create(&rig, world, &test_config, warmup, WN_STAGE_WARMUP, *state, init.text));
    REFUSED(wn_init_load(&rig.plan, init.text, false), WN_E_INPUT,
            longer ? "xxx... is longer than 167 bytes" : "tensors missing: ");
    test_rig_free(&rig);
  }
}

static void fp8_without_scales(void **state) {
  refuse(state, test_config, (test_dir){.fp8 = "mlp", .unscaled = "experts.2."}, false,
         "6 tensors missing: model.layers.1.mlp.experts.2.gate_proj.weight_scale_inv, "
         "model.layers.1.mlp.experts.2.up_proj.weight_scale_inv");
}

static void fp8_with_other_blocks(void **state) {
  refuse(state, test_config, (test_dir){.fp8 = "layers.1", .misscaled = "kv_b_proj"}, false,
         "1 tensor misshapen: model.layers.1.self_attn.kv_b_proj.weight_scale_inv [2, 1] instead of [1, 1]");
}

static void scales_of_nothing(void **state) {
  refuse(state, test_config,
         (test_dir){.dtype = WN_BF16, .fp8 = "mlp", .extra = "model.layers.1.self_attn.kv_b_proj.weight_scale_inv"},
         false, "1 tensor that this model does not have: model.layers.1.self_attn.kv_b_proj.weight_scale_inv");
}

static void other_types(void **state) {
  refuse(state, test_config, (test_dir){.dtype = WN_I32, .fp8 = "proj"}, false,
         "23 tensors of a type that cannot be read: model.embed_tokens.weight (I32), "
         "model.layers.0.input_layernorm.weight (I32)");
}

static void absent(void **state) {
  test_rig rig;
  wn_temp_path init = wn_temp(state, "nowhere");
  OK(test_rig_create(&rig, world, &test_config, warmup, WN_STAGE_WARMUP, *state, init.text));
  REFUSED(wn_init_load(&rig.plan, init.text, false), WN_E_INPUT, "is absent");
  test_rig_free(&rig);
}

/* An init that is a checkpoint: its weights are compared with its manifest, its other files are not. */
static void a_damaged_checkpoint(void **state) {
  test_rig rig;
  char path[WN_PATH_BYTES], file[WN_PATH_BYTES];
  OK(test_rig_create(&rig, world, &test_config, adapt, WN_STAGE_ADAPT, *state, ""));
  OK(test_values(&rig, TEST_FILL, 1, false, false));
  OK(wn_checkpoint_save(&rig.plan, &test_state));
  OK(wn_path(path, "%s/checkpoints/step-000100", (const char *)*state));
  OK(wn_path(file, "%s/note.txt", path));
  wn_temp_write(file, "hello", 5);
  OK(wn_init_load(&rig.plan, path, false));
  OK(wn_path(file, "%s/model-00002-of-00003.safetensors", path));
  wn_temp_flip(file, 1, 1);
  REFUSED(wn_init_load(&rig.plan, path, false), WN_E_INPUT, "model-00002-of-00003.safetensors differs from its digest");
  test_rig_free(&rig);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEMP_TEST(reads_f32),
      TEMP_TEST(reads_bf16),
      TEMP_TEST(reads_f16),
      TEMP_TEST(reads_fp8),
      TEMP_TEST(keeps_fp8),
      TEMP_TEST(draws),
      TEMP_TEST(rounds_for_a_device_of_bf16),
      TEMP_TEST(missing_one),
      TEMP_TEST(missing_many),
      TEMP_TEST(missing_indexer),
      TEMP_TEST(missing_half_an_indexer),
      TEMP_TEST(misshapen),
      TEMP_TEST(surplus),
      TEMP_TEST(surplus_layer),
      TEMP_TEST(a_name_that_no_checkpoint_takes),
      TEMP_TEST(fp8_without_scales),
      TEMP_TEST(fp8_with_other_blocks),
      TEMP_TEST(scales_of_nothing),
      TEMP_TEST(other_types),
      TEMP_TEST(absent),
      TEMP_TEST(a_damaged_checkpoint),
  };
  return cmocka_run_group_tests(tests, make_world, free_world);
}
