/* Counted work: against the number of parameters that a token meets, and in what it must not count. */
#include "model/flops.h"

#include <math.h>

#include "kernels/cpu/cpu.h"
#include "model/params.h"
#include "support/test.h"

static const wn_model_config config = {.vocab_size = 50,
                                       .hidden_size = 20,
                                       .intermediate_size = 30,
                                       .moe_intermediate_size = 6,
                                       .num_hidden_layers = 3,
                                       .first_k_dense_replace = 1,
                                       .num_attention_heads = 4,
                                       .n_routed_experts = 8,
                                       .n_shared_experts = 2,
                                       .num_experts_per_tok = 3,
                                       .n_group = 2,
                                       .topk_group = 1,
                                       .q_lora_rank = 12,
                                       .kv_lora_rank = 10,
                                       .qk_nope_head_dim = 8,
                                       .qk_rope_head_dim = 4,
                                       .v_head_dim = 5,
                                       .has_indexer = true,
                                       .index_n_heads = 2,
                                       .index_head_dim = 6,
                                       .index_topk = 4};

static void close_to(const char *what, double got, double want) {
  if (!(fabs(got - want) <= 1e-12 * want)) fail_msg("%s: %.17g instead of %.17g", what, got, want);
}

/* Elements of the matrices that a token is multiplied with: K of E experts, no embedding. */
static double met(const wn_model_config *c, bool head) {
  wn_param_table table;
  double n = 0;
  OK(wn_param_table_create(&table, c, (wn_param_settings){.file_dtype = WN_F32}));
  for (int32_t i = 0; i < table.n; i++) {
    const wn_param *p = &table.params[i];
    bool indexer = p->slot >= WN_P_INDEX_Q_B && p->slot <= WN_P_INDEX_WEIGHTS;
    if (p->rank < 2 || indexer || p->slot == WN_P_EMBED || (p->slot == WN_P_HEAD && !head)) continue;
    double share = p->expert < 0 ? 1 : (double)c->num_experts_per_tok / c->n_routed_experts;
    n += share * (double)(p->dim[0] * p->dim[1]);
  }
  wn_param_table_free(&table);
  return n;
}

static double flops(double rows, double visible, double selected, bool backward, bool indexer, bool head) {
  wn_flops_work work = {rows, visible, selected, backward, indexer, head};
  return wn_flops(&config, &work);
}

static void linear_layers(void **state) {
  (void)state;
  wn_model_config whole = config; /* queries from x itself */
  whole.q_lora_rank = 0;
  whole.has_indexer = false;
  close_to("without a query latent", wn_flops(&whole, &(wn_flops_work){.rows = 7}), 2 * 7 * met(&whole, false));
  close_to("forward", flops(7, 0, 0, false, false, false), 2 * 7 * met(&config, false));
  close_to("with the head", flops(7, 0, 0, false, false, true), 2 * 7 * met(&config, true));
  close_to("backward", flops(7, 0, 0, true, false, true), 3 * 2 * 7 * met(&config, true));
}

/* 4 heads, keys of 12 and values of 5, over the visible pairs; or 14 and 10 over the selected ones. */
static void attention(void **state) {
  (void)state;
  double layers = 3;
  close_to("dense forward", flops(0, 100, 0, false, false, false), layers * 2 * 4 * 100 * (12 + 5));
  close_to("dense training", flops(0, 100, 0, true, false, false), layers * 2 * 4 * 100 * (12 + 5 + 3 * 12 + 2 * 5));
  close_to("sparse forward", flops(0, 100, 30, false, false, false), layers * 2 * 4 * 30 * (14 + 10));
  close_to("sparse training", flops(0, 100, 30, true, false, false), layers * 2 * 4 * 30 * (14 + 10 + 3 * 14 + 2 * 10));
  close_to("sparse, longer rows", flops(0, 1000, 30, true, false, false), flops(0, 100, 30, true, false, false));
}

/* 2 indexer heads of 6 over queries of 12; a wider target in stage 1, which no attention backward gives. */
static void indexer(void **state) {
  (void)state;
  double layers = 3, projections = 2 * 2 * (12.0 * 12 + 20 * (6 + 2));
  close_to("projections", flops(7, 0, 0, false, true, false) - flops(7, 0, 0, false, false, false),
           layers * 7 * projections);
  close_to("stage 1", flops(0, 100, 0, false, true, false) - flops(0, 100, 0, false, false, false),
           layers * 100 * (2 * 12 + 3 * 2 * 12 + 2 * 4 * 12));
  close_to("stage 2", flops(0, 100, 30, true, true, false) - flops(0, 100, 30, true, false, false),
           layers * (100 * 2 * 12 + 30 * 3 * 2 * 12));
}

/* The released model activates 37 billion of its parameters for a token, of which the embedding multiplies nothing. */
static void the_released_model(void **state) {
  (void)state;
  wn_model_config v3;
  OK(wn_model_config_load(&v3, "configs/models/deepseek-v3.1"));
  wn_flops_work work = {.rows = 1, .head = true};
  double activated = wn_flops(&v3, &work) / 2 + (double)v3.vocab_size * v3.hidden_size;
  if (!(fabs(activated - 37e9) < 1e9)) fail_msg("%.4g parameters activated", activated);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(linear_layers),
      cmocka_unit_test(attention),
      cmocka_unit_test(indexer),
      cmocka_unit_test(the_released_model),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
