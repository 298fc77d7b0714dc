/* Names, shapes, order and counts of the parameter table, against the released models' inventories. */
#include <math.h>
#include <string.h>

#include "model/params.h"
#include "support/test.h"

static wn_model_config v31(void) {
  return (wn_model_config){.vocab_size = 129280,
                           .hidden_size = 7168,
                           .intermediate_size = 18432,
                           .moe_intermediate_size = 2048,
                           .num_hidden_layers = 61,
                           .first_k_dense_replace = 3,
                           .num_attention_heads = 128,
                           .n_routed_experts = 256,
                           .n_shared_experts = 1,
                           .num_experts_per_tok = 8,
                           .n_group = 8,
                           .topk_group = 4,
                           .q_lora_rank = 1536,
                           .kv_lora_rank = 512,
                           .qk_nope_head_dim = 128,
                           .qk_rope_head_dim = 64,
                           .v_head_dim = 128,
                           .initializer_range = 0.02};
}

static wn_model_config v32(void) {
  wn_model_config c = v31();
  c.has_indexer = true;
  c.index_n_heads = 64;
  c.index_head_dim = 128;
  c.index_topk = 2048;
  return c;
}

static const wn_param_settings both = {.train_base = true, .train_indexer = true, .file_dtype = WN_BF16};

static wn_param_table table_of(wn_model_config config, wn_param_settings settings) {
  wn_param_table table;
  OK(wn_param_table_create(&table, &config, settings));
  return table;
}

static int64_t elements(const wn_param_table *table) {
  int64_t sum = 0;
  for (int32_t i = 0; i < table->n; i++) {
    int64_t count = 1;
    for (int32_t axis = 0; axis < table->params[i].rank; axis++) count *= table->params[i].dim[axis];
    sum += count;
  }
  return sum;
}

static const wn_param *find(const wn_param_table *table, const char *name) {
  for (int32_t i = 0; i < table->n; i++)
    if (strcmp(table->params[i].hf_name, name) == 0) return &table->params[i];
  fail_msg("no parameter '%s'", name);
  return NULL;
}

static void counts_of_the_released_models(void **state) {
  (void)state;
  wn_param_table dense = table_of(v31(), both), sparse = table_of(v32(), both);
  assert_int_equal(elements(&dense), 671026419200);
  assert_int_equal(elements(&sparse), 671877944064);
  /* the released 90,427 and 90,854 tensors include a scale beside each FP8 weight */
  int32_t attention_fp8 = 61 * 5, mlp_fp8 = 3 * 3 + 58 * 257 * 3, indexer_fp8 = 61 * 2;
  assert_int_equal(dense.n + attention_fp8 + mlp_fp8, 90427);
  assert_int_equal(sparse.n + attention_fp8 + mlp_fp8 + indexer_fp8, 90854);
  wn_param_table_free(&dense);
  wn_param_table_free(&sparse);
}

/* A configuration that would be all of the memory before a single weight is looked at. */
static void too_many(void **state) {
  (void)state;
  wn_model_config c = v31();
  wn_param_table table;
  c.num_hidden_layers = 100;
  c.n_routed_experts = 1 << 14;
  REFUSED(wn_param_table_create(&table, &c, both), WN_E_CONFIG, "at most 4194304 are possible");
}

/* Moonlight's queries come from x itself. */
static void queries_without_a_latent(void **state) {
  (void)state;
  wn_model_config c = v31();
  c.q_lora_rank = 0;
  wn_param_table table = table_of(c, both), low_rank = table_of(v31(), both);
  const wn_param *q = find(&table, "model.layers.60.self_attn.q_proj.weight");
  assert_int_equal(q->dim[0], 24576);
  assert_int_equal(q->dim[1], 7168);
  assert_true(q->decay);
  assert_int_equal(table.n, low_rank.n - 2 * 61);
  for (int32_t i = 0; i < table.n; i++)
    if (strstr(table.params[i].hf_name, "q_a_") || strstr(table.params[i].hf_name, "q_b_"))
      fail_msg("%s without a latent", table.params[i].hf_name);
  for (int32_t i = 0; i < low_rank.n; i++) assert_null(strstr(low_rank.params[i].hf_name, ".q_proj"));
  wn_param_table_free(&table);
  wn_param_table_free(&low_rank);
}

/* As published: 16 B, 30 B (31 B with the layer for multi-token prediction, which is not counted here) and 1 T. */
static void counts_of_relatives(void **state) {
  (void)state;
  static const struct {
    const char *dir;
    double billions;
  } models[] = {
      {"configs/models/moonlight", 15.96}, {"configs/models/glm-4.7-flash", 30}, {"configs/models/kimi-k2", 1026}};
  for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
    wn_model_config c;
    OK(wn_model_config_load(&c, models[i].dir));
    wn_param_table table = table_of(c, both);
    double billions = (double)elements(&table) * 1e-9;
    if (fabs(billions / models[i].billions - 1) > 0.005) fail_msg("%s: %.3f B parameters", models[i].dir, billions);
    wn_param_table_free(&table);
  }
}

static void names_and_shapes(void **state) {
  (void)state;
  static const struct {
    const char *name;
    int64_t d0, d1; /* d1 0: a vector */
    wn_dtype dtype;
    wn_kind kind;
  } expected[] = {
      {"model.embed_tokens.weight", 129280, 7168, WN_BF16, WN_BASE},
      {"model.norm.weight", 7168, 0, WN_BF16, WN_BASE},
      {"lm_head.weight", 129280, 7168, WN_BF16, WN_BASE},
      {"model.layers.60.input_layernorm.weight", 7168, 0, WN_BF16, WN_BASE},
      {"model.layers.0.post_attention_layernorm.weight", 7168, 0, WN_BF16, WN_BASE},
      {"model.layers.0.self_attn.q_a_proj.weight", 1536, 7168, WN_BF16, WN_BASE},
      {"model.layers.0.self_attn.q_a_layernorm.weight", 1536, 0, WN_BF16, WN_BASE},
      {"model.layers.0.self_attn.q_b_proj.weight", 24576, 1536, WN_BF16, WN_BASE},
      {"model.layers.0.self_attn.kv_a_proj_with_mqa.weight", 576, 7168, WN_BF16, WN_BASE},
      {"model.layers.0.self_attn.kv_a_layernorm.weight", 512, 0, WN_BF16, WN_BASE},
      {"model.layers.0.self_attn.kv_b_proj.weight", 32768, 512, WN_BF16, WN_BASE},
      {"model.layers.0.self_attn.o_proj.weight", 7168, 16384, WN_BF16, WN_BASE},
      {"model.layers.2.mlp.gate_proj.weight", 18432, 7168, WN_BF16, WN_BASE},
      {"model.layers.2.mlp.up_proj.weight", 18432, 7168, WN_BF16, WN_BASE},
      {"model.layers.2.mlp.down_proj.weight", 7168, 18432, WN_BF16, WN_BASE},
      {"model.layers.3.mlp.gate.weight", 256, 7168, WN_BF16, WN_BASE},
      {"model.layers.3.mlp.gate.e_score_correction_bias", 256, 0, WN_F32, WN_BUFFER},
      {"model.layers.3.mlp.experts.0.gate_proj.weight", 2048, 7168, WN_BF16, WN_BASE},
      {"model.layers.60.mlp.experts.255.up_proj.weight", 2048, 7168, WN_BF16, WN_BASE},
      {"model.layers.60.mlp.experts.17.down_proj.weight", 7168, 2048, WN_BF16, WN_BASE},
      {"model.layers.60.mlp.shared_experts.gate_proj.weight", 2048, 7168, WN_BF16, WN_BASE},
      {"model.layers.60.mlp.shared_experts.up_proj.weight", 2048, 7168, WN_BF16, WN_BASE},
      {"model.layers.60.mlp.shared_experts.down_proj.weight", 7168, 2048, WN_BF16, WN_BASE},
      {"model.layers.60.self_attn.indexer.wq_b.weight", 8192, 1536, WN_BF16, WN_INDEXER},
      {"model.layers.60.self_attn.indexer.wk.weight", 128, 7168, WN_BF16, WN_INDEXER},
      {"model.layers.60.self_attn.indexer.k_norm.weight", 128, 0, WN_F32, WN_INDEXER},
      {"model.layers.60.self_attn.indexer.k_norm.bias", 128, 0, WN_F32, WN_INDEXER},
      {"model.layers.60.self_attn.indexer.weights_proj.weight", 64, 7168, WN_BF16, WN_INDEXER},
  };
  wn_param_table table = table_of(v32(), both);
  for (size_t i = 0; i < sizeof expected / sizeof *expected; i++) {
    const wn_param *p = find(&table, expected[i].name);
    assert_int_equal(p->rank, expected[i].d1 ? 2 : 1);
    assert_int_equal(p->dim[0], expected[i].d0);
    assert_int_equal(p->dim[1], expected[i].d1);
    assert_int_equal(p->file_dtype, expected[i].dtype);
    assert_int_equal(p->kind, expected[i].kind);
    assert_int_equal(p->decay, p->rank == 2);
  }
  wn_param_table_free(&table);
}

/* Frozen experts of large layers come in parts: V3.1's 24 at a time, the last part smaller. */
static void experts_in_parts(void **state) {
  (void)state;
  wn_model_config config;
  wn_param_table table;
  OK(wn_model_config_load(&config, "configs/models/deepseek-v3.1"));
  OK(wn_param_table_create(&table, &config, (wn_param_settings){.train_indexer = true, .file_dtype = WN_BF16}));
  assert_int_equal(table.experts_a_part, 24);
  for (int32_t i = 0; i < table.n; i++) {
    const wn_param *p = &table.params[i];
    assert_int_equal(p->part, p->expert < 0 ? 0 : 1 + p->expert / 24);
  }
  wn_param_table_free(&table);
  OK(wn_param_table_create(&table, &config, (wn_param_settings){.train_base = true, .file_dtype = WN_BF16}));
  assert_int_equal(table.experts_a_part, 0); /* experts that train are reduced with their layer */
  wn_param_table_free(&table);
  static const struct {
    int64_t most;
    int32_t a_part;
  } cases[] = {{1, 1},
               {3 * 2048 * 7168, 1},
               {2 * 3 * 2048 * 7168, 2},
               {(int64_t)255 * 3 * 2048 * 7168, 128},
               {(int64_t)256 * 3 * 2048 * 7168, 0}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    OK(wn_param_table_create(&table, &config,
                             (wn_param_settings){.file_dtype = WN_BF16, .most_gathered = cases[i].most}));
    assert_int_equal(table.experts_a_part, cases[i].a_part);
    wn_param_table_free(&table);
  }
}

static void order_and_bind(void **state) {
  (void)state;
  wn_model_config config = v32();
  wn_param_table table = table_of(config, both);
  for (int32_t i = 1; i < table.n; i++) {
    const wn_param *a = &table.params[i - 1], *b = &table.params[i];
    bool later_slot = a->layer == b->layer && a->slot < b->slot;
    bool next_expert = a->layer == b->layer && a->slot == b->slot && a->expert + 1 == b->expert;
    if (a->layer >= b->layer && !later_slot && !next_expert) fail_msg("%s stands before %s", a->hf_name, b->hf_name);
  }
  assert_int_equal(table.first[0], 0);
  assert_int_equal(table.first[config.num_hidden_layers + 2], table.n);
  wn_tensor *by_param = test_calloc((size_t)table.n, sizeof *by_param);
  for (int32_t i = 0; i < table.n; i++) by_param[i].dim[0] = i;
  wn_layer_tensors bound;
  wn_layer_bind(&bound, &table, 4, by_param);
  assert_string_equal(table.params[bound.slot[WN_P_KV_B].dim[0]].hf_name, "model.layers.4.self_attn.kv_b_proj.weight");
  assert_string_equal(table.params[bound.expert_up[255].dim[0]].hf_name,
                      "model.layers.4.mlp.experts.255.up_proj.weight");
  assert_string_equal(table.params[bound.expert_down[0].dim[0]].hf_name,
                      "model.layers.4.mlp.experts.0.down_proj.weight");
  assert_int_equal(bound.slot[WN_P_MLP_GATE].dim[0], 0); /* absent in a MoE layer */
  wn_layer_bind(&bound, &table, 2, by_param);
  assert_null(bound.expert_gate);
  assert_string_equal(table.params[bound.slot[WN_P_MLP_UP].dim[0]].hf_name, "model.layers.2.mlp.up_proj.weight");
  wn_layer_bind(&bound, &table, 61, by_param);
  assert_string_equal(table.params[bound.slot[WN_P_HEAD].dim[0]].hf_name, "lm_head.weight");
  test_free(by_param);
  wn_param_table_free(&table);
}

static void what_trains(void **state) {
  (void)state;
  wn_param_table table = table_of(v32(), (wn_param_settings){.train_indexer = true, .file_dtype = WN_F32});
  for (int32_t i = 0; i < table.n; i++) {
    bool indexer = strstr(table.params[i].hf_name, ".indexer.") != NULL;
    assert_int_equal(table.params[i].kind, indexer ? WN_INDEXER : WN_FROZEN);
  }
  wn_param_table_free(&table);
  table = table_of(v32(), (wn_param_settings){.train_base = true, .file_dtype = WN_F32, .expert_group = 1});
  for (int32_t i = 0; i < table.n; i++) {
    const wn_param *p = &table.params[i];
    assert_int_equal(p->kind, strstr(p->hf_name, ".indexer.")         ? WN_FROZEN
                              : strstr(p->hf_name, "correction_bias") ? WN_BUFFER
                                                                      : WN_BASE);
    assert_int_equal(p->group, strstr(p->hf_name, ".experts.") != NULL);
  }
  wn_param_table_free(&table);
}

static void initial_values(void **state) {
  (void)state;
  wn_model_config dense = v31(), sparse = v32();
  wn_param_table a = table_of(dense, both), b = table_of(sparse, both);
  const char *name = "model.layers.7.self_attn.o_proj.weight";
  double sum = 0, squares = 0;
  for (int64_t i = 0; i < 10000; i++) {
    double value = wn_param_initial(find(&a, name), &dense, 5, i);
    if (i < 10)
      assert_true(value == wn_param_initial(find(&b, name), &sparse, 5, i)); /* knows nothing of other parameters */
    sum += value;
    squares += value * value;
  }
  assert_true(fabs(sum / 10000) < 4 * 0.02 / 100);
  assert_true(fabs(sqrt(squares / 10000) / 0.02 - 1) < 0.03);
  const wn_param *expert = find(&a, "model.layers.7.mlp.experts.0.up_proj.weight");
  const wn_param *other = find(&a, "model.layers.7.mlp.experts.1.up_proj.weight");
  assert_true(wn_param_initial(expert, &dense, 5, 0) != wn_param_initial(other, &dense, 5, 0));
  assert_true(wn_param_initial(expert, &dense, 5, 0) != wn_param_initial(expert, &dense, 6, 0));
  assert_true(wn_param_initial(find(&b, "model.layers.7.self_attn.indexer.k_norm.weight"), &sparse, 5, 3) == 1);
  assert_true(wn_param_initial(find(&b, "model.layers.7.self_attn.indexer.k_norm.bias"), &sparse, 5, 3) == 0);
  assert_true(wn_param_initial(find(&b, "model.layers.7.mlp.gate.e_score_correction_bias"), &sparse, 5, 3) == 0);
  wn_param_table_free(&a);
  wn_param_table_free(&b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(counts_of_the_released_models),
      cmocka_unit_test(names_and_shapes),
      cmocka_unit_test(queries_without_a_latent),
      cmocka_unit_test(too_many),
      cmocka_unit_test(counts_of_relatives),
      cmocka_unit_test(experts_in_parts),
      cmocka_unit_test(order_and_bind),
      cmocka_unit_test(what_trains),
      cmocka_unit_test(initial_values),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
