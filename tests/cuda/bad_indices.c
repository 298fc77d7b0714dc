/* Indices that name nothing, as from a damaged replay: the operation fails, and says where, before memory is touched.
 * A GPU that has met one is of no further use to its process, so each case is a process of its own: this program, with
 * the case's number. */
#include <stdio.h>

#include "support/gpu.h"
#include "support/program.h"
#include "support/twin.h"

enum { N = 40, K = 4, M = 90, HEADS = 3, WIDTH = 32, EXPERTS = 8, FAILED_AS_IT_SHOULD = 42 };

/* [N,K] of 0 .. K - 1, one of them `bad`. */
static twin indices(twin_bench *b, int32_t bad) {
  int32_t x[N * K];
  for (int i = 0; i < N * K; i++) x[i] = i % K;
  x[17 * K + 2] = bad;
  return twin_ints(b, x, 2, N, K);
}

static wn_status route(twin_bench *b, int32_t bad, bool backward) {
  twin index = indices(b, bad), x = twin_random(b, WN_ACT, 1, 1, 0, 2, N, WIDTH, 0),
       w = twin_random(b, WN_ACT, 2, 1, 0, 2, EXPERTS, WIDTH, 0), bias = twin_tensor(b, WN_STAT, 1, EXPERTS, 0, 0),
       scores = twin_random(b, WN_STAT, 3, 0.1, 0, 2, N, EXPERTS, 0),
       weight = twin_random(b, WN_STAT, 4, 1, 0, 2, N, K, 0), load = twin_tensor(b, WN_INDEX, 1, EXPERTS, 0, 0),
       dw = twin_tensor(b, WN_WGRAD, 2, EXPERTS, WIDTH, 0);
  wn_router_params params = {.n_group = 1,
                             .topk_group = 1,
                             .norm_topk = true,
                             .scale = 1,
                             .forced = true,
                             .rows_per_sequence = N,
                             .balance_coeff = bad < 0 ? 1 : 0};
  if (backward)
    return b->cuda->ops->router_backward(b->cuda, &x.cuda, &dw.cuda, &weight.cuda, &scores.cuda, &index.cuda, &x.cuda,
                                         &w.cuda, &params);
  return b->cuda->ops->router(b->cuda, &scores.cuda, &index.cuda, &weight.cuda, &load.cuda, NULL, &x.cuda, &w.cuda,
                              &bias.cuda, &params);
}

static wn_status routed(twin_bench *b) {
  return route(b, EXPERTS, false);
}
static wn_status routed_below(twin_bench *b) {
  return route(b, -1, false);
}
static wn_status routed_backward(twin_bench *b) {
  return route(b, EXPERTS, true);
}
static wn_status balanced_backward(twin_bench *b) {
  return route(b, -1, true);
}

static wn_status permuted(twin_bench *b) {
  twin index = indices(b, 1 << 20), x = twin_random(b, WN_ACT, 1, 1, 0, 2, N, WIDTH, 0),
       xp = twin_tensor(b, WN_ACT, 2, N * K, WIDTH, 0), slot = twin_tensor(b, WN_INDEX, 1, N * K, 0, 0);
  int64_t offset[EXPERTS + 1];
  return b->cuda->ops->moe_permute(b->cuda, &xp.cuda, &slot.cuda, offset, &x.cuda, &index.cuda, EXPERTS);
}

typedef enum part { FORWARD, BACKWARD, P_ALONE } part;

static wn_status attend(twin_bench *b, int64_t heads, int64_t width, int32_t v_width, part what) {
  twin picks = indices(b, M), q = twin_random(b, WN_ACT, 1, 1, 0, 3, N, heads, width),
       kv = twin_random(b, WN_ACT, 2, 1, 0, 2, M, width, 0), o = twin_random(b, WN_ACT, 3, 1, 0, 3, N, heads, v_width),
       lse = twin_random(b, WN_STAT, 4, 1, 0, 2, N, heads, 0), delta = twin_random(b, WN_STAT, 5, 1, 0, 2, N, heads, 0),
       dq = twin_tensor(b, WN_ACT, 3, N, heads, width), dkv = twin_tensor(b, WN_WGRAD, 2, M, width, 0),
       p = twin_tensor(b, WN_STAT, 2, N, K, 0);
  twin_rows rows = twin_causal_end(b, N, M, 0, false);
  wn_attention_params params = {.scale = 0.1, .v_width = v_width};
  const wn_ops *ops = b->cuda->ops;
  if (what == FORWARD)
    return ops->attention_sparse(b->cuda, &o.cuda, &lse.cuda, NULL, NULL, &q.cuda, &kv.cuda, &picks.cuda, &rows.cuda,
                                 &params);
  const bool all = what == BACKWARD;
  return ops->attention_sparse_backward(b->cuda, all ? &dq.cuda : NULL, all ? &dkv.cuda : NULL, &p.cuda,
                                        all ? &o.cuda : NULL, &q.cuda, &kv.cuda, &picks.cuda, &lse.cuda,
                                        all ? &delta.cuda : NULL, &rows.cuda, &params);
}

static wn_status attended(twin_bench *b) {
  return attend(b, HEADS, WIDTH, WIDTH - 8, FORWARD);
}
static wn_status attended_wide(twin_bench *b) {
  return attend(b, 64, 576, 512, FORWARD);
}
static wn_status attended_backward(twin_bench *b) {
  return attend(b, HEADS, WIDTH, WIDTH - 8, BACKWARD);
}
static wn_status attended_wide_backward(twin_bench *b) {
  return attend(b, 64, 576, 512, BACKWARD);
}
static wn_status attended_p(twin_bench *b) {
  return attend(b, 64, 576, 512, P_ALONE);
}

static wn_status attend_masked(twin_bench *b, bool backward) {
  twin picks = indices(b, M), q = twin_random(b, WN_ACT, 1, 1, 0, 3, N, HEADS, WIDTH),
       k = twin_random(b, WN_ACT, 2, 1, 0, 3, M, HEADS, WIDTH), o = twin_random(b, WN_ACT, 3, 1, 0, 3, N, HEADS, WIDTH),
       lse = twin_random(b, WN_STAT, 4, 1, 0, 2, N, HEADS, 0), p = twin_tensor(b, WN_STAT, 2, N, K, 0);
  twin_rows rows = twin_causal_end(b, N, M, 0, false);
  wn_attention_params params = {.scale = 0.1};
  const wn_ops *ops = b->cuda->ops;
  if (backward)
    return ops->attention_masked_backward(b->cuda, NULL, NULL, NULL, &p.cuda, NULL, &q.cuda, &k.cuda, &k.cuda,
                                          &picks.cuda, &lse.cuda, NULL, &rows.cuda, &params);
  return ops->attention_masked(b->cuda, &o.cuda, &lse.cuda, NULL, NULL, &q.cuda, &k.cuda, &k.cuda, &picks.cuda,
                               &rows.cuda, &params);
}
static wn_status attended_masked(twin_bench *b) {
  return attend_masked(b, false);
}
static wn_status attended_masked_backward(twin_bench *b) {
  return attend_masked(b, true);
}

static wn_status learnt(twin_bench *b) {
  twin picks = indices(b, M), q = twin_random(b, WN_ACT, 1, 1, 0, 3, N, HEADS, WIDTH),
       k = twin_random(b, WN_ACT, 2, 1, 0, 2, M, WIDTH, 0), w = twin_random(b, WN_STAT, 3, 1, 0, 2, N, HEADS, 0),
       p = twin_tensor(b, WN_STAT, 2, N, K, 0), kl = twin_tensor(b, WN_STAT, 1, N, 0, 0);
  twin_constant(b, &p, 1.0 / K);
  twin_rows rows = twin_causal_end(b, N, M, 0, false);
  wn_indexer_params params = {.scale = 0.1, .coeff = 1};
  return b->cuda->ops->indexer_kl_sparse(b->cuda, &kl.cuda, NULL, NULL, NULL, &q.cuda, &k.cuda, &w.cuda, &picks.cuda,
                                         &p.cuda, &rows.cuda, &params);
}

static wn_status sampled(twin_bench *b) {
  int32_t number[K] = {0, 1, N, 3};
  twin sample = twin_ints(b, number, 1, K, 0), q = twin_random(b, WN_ACT, 1, 1, 0, 3, N, HEADS, WIDTH),
       k = twin_random(b, WN_ACT, 2, 1, 0, 2, N, WIDTH, 0), w = twin_random(b, WN_STAT, 3, 1, 0, 2, N, HEADS, 0),
       keys = twin_random(b, WN_ACT, 4, 1, 0, 3, N, HEADS, WIDTH), stats = twin_tensor(b, WN_STAT, 2, K, WN_N_STATS, 0),
       picks = twin_tensor(b, WN_INDEX, 2, K, 2, 0);
  twin_rows rows = twin_causal(b, N, 0, false);
  wn_indexer_params params = {.scale = 0.1, .attention_scale = 0.1};
  return b->cuda->ops->selection_stats(b->cuda, &stats.cuda, &picks.cuda, &sample.cuda, NULL, &q.cuda, &k.cuda, &w.cuda,
                                       &q.cuda, &keys.cuda, &rows.cuda, &params);
}

static const struct misuse {
  const char *name;
  wn_status (*run)(twin_bench *b);
} misuses[] = {
    {"router", routed},
    {"router, below 0", routed_below},
    {"router_backward", routed_backward},
    {"router_backward, balanced", balanced_backward},
    {"moe_permute", permuted},
    {"attention_sparse", attended},
    {"attention_sparse of V3.1's width", attended_wide},
    {"attention_sparse_backward", attended_backward},
    {"attention_sparse_backward of V3.1's width", attended_wide_backward},
    {"p alone", attended_p},
    {"attention_masked", attended_masked},
    {"attention_masked_backward", attended_masked_backward},
    {"indexer_kl_sparse", learnt},
    {"selection_stats", sampled},
};

/* In the process of its own. */
static int misuse(size_t i) {
  void *state;
  twin_setup(&state);
  twin_bench *b = state;
  wn_status status = misuses[i].run(b);
  if (!status) status = wn_cuda_synchronize(b->cuda);
  fprintf(stderr, "%s\n", status ? wn_status_text(status) : "nothing was noticed");
  return status && wn_status_code(status) == WN_E_DEVICE ? FAILED_AS_IT_SHOULD : 1;
}

static void the_device_refuses(void **state) {
  (void)state;
  wn_needs_gpus(1);
  for (size_t i = 0; i < sizeof misuses / sizeof *misuses; i++) {
    wn_program p;
    wn_winnow_wait(wn_command_start(1, "/proc/self/exe", "%zu", i), &p);
    print_message("  %s: code %d\n", misuses[i].name, p.code);
    if (p.code != FAILED_AS_IT_SHOULD || !strstr(p.out, "Assertion") + !strstr(p.err, "Assertion") > 1)
      fail_msg("%s: code %d, said %s%s", misuses[i].name, p.code, p.out, p.err);
  }
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(the_device_refuses)};
  if (argc > 1) return misuse((size_t)atoi(argv[1]));
  return cmocka_run_group_tests(tests, NULL, NULL);
}
