/* The relatives' shapes on a GPU against the CPU: heads of 192 + 64 and 256 (GLM-4.7-Flash) through dense, masked and
 * absorbed attention, the indexer's dense target, selections and statistics; queries without a low rank (Moonlight),
 * and their rewriting. One layer without a router, so that what BF16 rounds is not amplified: transformers' own classes
 * in BF16 differ from their FP32 by up to 1.5% in these outputs and 3.3% in gradients (a single row that is routed
 * elsewhere makes 5% of it). */
#include "io/safetensors.h"
#include "model/model.h"
#include "support/gpu.h"
#include "support/tiny.h"

enum { N_TOKENS = 150 };
static const double rounding = 6e-2;

static wn_model_config glm(void) {
  wn_model_config config = tiny_config();
  config.hidden_size = 64;
  config.num_hidden_layers = 1;
  config.first_k_dense_replace = 1;
  config.num_attention_heads = 4;
  config.n_group = 1;
  config.q_lora_rank = 48;
  config.kv_lora_rank = 32;
  config.qk_nope_head_dim = 192;
  config.qk_rope_head_dim = 64;
  config.v_head_dim = 256;
  config.rms_norm_eps = 1e-5;
  config.rope_theta = 1e6;
  return config;
}

/* Every visible key is picked, so that no tie is decided by a rounding. */
static wn_model_config with_indexer(wn_model_config config) {
  config.has_indexer = true;
  config.index_n_heads = 4;
  config.index_head_dim = 64;
  config.index_topk = N_TOKENS;
  return config;
}

/* So narrow a latent that the absorbed form has fewer multiplications. */
static wn_model_config absorbed(void) {
  wn_model_config config = with_indexer(glm());
  config.num_attention_heads = 20;
  config.kv_lora_rank = 8;
  return config;
}

static wn_model_config whole_queries(void) {
  wn_model_config config = tiny_config();
  config.hidden_size = 64;
  config.num_hidden_layers = 1;
  config.first_k_dense_replace = 1;
  config.q_lora_rank = 0;
  return config;
}

static int set_up(void **state) {
  if (tiny_setup(state)) return -1;
  wn_model_config configs[] = {glm(), with_indexer(glm()), absorbed(), whole_queries()};
  const char *const names[] = {"glm", "glm-indexer", "absorbed", "whole"};
  for (uint64_t i = 0; i < 4; i++) tiny_model(wn_temp(state, names[i]).text, &configs[i], 7 + i, 2, NULL);
  return 0;
}

static wn_safetensors *forward(void **state, const char *model, const char *device, const char *options) {
  char list[N_TOKENS * 4];
  size_t used = 0;
  wn_temp_path tokens = wn_temp(state, "tokens"), dump = wn_temp(state, device);
  wn_safetensors *file;
  for (int i = 0; i < N_TOKENS; i++)
    used += (size_t)snprintf(list + used, sizeof list - used, "%d ", (i * 29 + i * i * 7) % TINY_VOCAB);
  tiny_write(tokens.text, list);
  wn_winnow_ends(0, 1, "forward %s --tokens %s --documents 0,70 --dump %s --device %s %s", wn_temp(state, model).text,
                 tokens.text, dump.text, device, options);
  OK(wn_safetensors_open(&file, dump.text));
  return file;
}

/* |a - b| / |b| over the finite elements; infinities in the same places. */
static double distance(const wn_st_entry *a, const wn_st_entry *b) {
  double squares = 0, gaps = 0;
  assert_true(a && a->bytes == b->bytes);
  for (uint64_t i = 0; i < a->bytes / 4; i++) {
    double x = (double)((const float *)a->data)[i], y = (double)((const float *)b->data)[i];
    if (isinf(x) && x == y) continue;
    squares += y * y;
    gaps += (x - y) * (x - y);
  }
  if (squares == 0) return gaps == 0 ? 0 : INFINITY;
  return sqrt(gaps / squares);
}

static void compare(void **state, const char *model, const char *options) {
  wn_safetensors *cpu = forward(state, model, "cpu", options), *cuda = forward(state, model, "cuda", options);
  double worst = 0;
  assert_int_equal(wn_safetensors_count(cpu), wn_safetensors_count(cuda));
  for (int64_t i = 0; i < wn_safetensors_count(cpu); i++) {
    const wn_st_entry *want = wn_safetensors_at(cpu, i);
    if (want->dtype != WN_F32) continue;
    double off = distance(wn_safetensors_find(cuda, want->name), want);
    if (!(off <= rounding)) fail_msg("%s %s: %s is off by %.3g", model, options, want->name, off);
    worst = fmax(worst, off);
  }
  print_message("  %-12s %-36s differs from the CPU's by %.2g at most in %lld tensors\n", model, options, worst,
                (long long)wn_safetensors_count(cpu));
  wn_safetensors_close(cpu);
  wn_safetensors_close(cuda);
}

static void wide_heads(void **state) {
  wn_needs_gpus(1);
  wn_model_config narrow = absorbed(), wide = with_indexer(glm());
  assert_int_equal(wn_model_attention_form(&narrow, 64, N_TOKENS, N_TOKENS), WN_FORM_ABSORBED);
  assert_int_equal(wn_model_attention_form(&wide, 64, N_TOKENS, N_TOKENS), WN_FORM_MASKED);
  compare(state, "glm", "--grads base");
  compare(state, "glm-indexer", "--grads indexer"); /* the dense target, of 256-wide heads */
  compare(state, "glm-indexer", "--attention sparse --grads base");
  compare(state, "glm-indexer", "--attention sparse --grads indexer");
  compare(state, "absorbed", "--attention sparse --grads base");
  compare(state, "absorbed", "--attention sparse --grads indexer");
}

static void queries_without_a_low_rank(void **state) {
  wn_needs_gpus(1);
  compare(state, "whole", "--grads base");
}

static void run_job(void **state, const char *stage, const char *device, const char *init, const char *run) {
  const char *dir = *state;
  wn_winnow_ends(0, 1, "%s %s/job.yaml device=%s init=%s/%s run_dir=%s/%s training.steps=3 dsa.index_head_dim=64",
                 stage, dir, device, dir, init, dir, run);
}

static void near(void **state, const char *run, const char *table, const char *column, double bar) {
  char gpu[64], cpu[64];
  snprintf(gpu, sizeof gpu, "%s-cuda", run);
  snprintf(cpu, sizeof cpu, "%s-cpu", run);
  double a = tiny_cell(state, gpu, table, 0, column, NULL), b = tiny_cell(state, cpu, table, 0, column, NULL);
  print_message("  %-12s %-18s %.5g on the GPU, %.5g on the CPU\n", run, column, a, b);
  if (!(fabs(a - b) <= bar * fabs(b))) fail_msg("%s of %s", column, run);
}

/* Stages on both devices; on the GPU twice, to the byte. The statistics are those of 256-wide heads. */
static void stages(void **state) {
  wn_needs_gpus(1);
  static const char *const models[] = {"glm", "whole"};
  for (int m = 0; m < 2; m++) {
    char warm[64], sparse[64], init[64];
    for (int i = 0; i < 3; i++) {
      const char *device = i ? "cuda" : "cpu", *suffix = i == 0 ? "cpu" : i == 1 ? "cuda" : "again";
      snprintf(warm, sizeof warm, "%s-warm-%s", models[m], suffix);
      snprintf(sparse, sizeof sparse, "%s-sparse-%s", models[m], suffix);
      snprintf(init, sizeof init, "%s-warm-cpu/checkpoints/step-000003", models[m]);
      run_job(state, "warmup", device, models[m], warm);
      run_job(state, "adapt", device, init, sparse);
    }
    const char *const parts[] = {"warm", "sparse"};
    for (int p = 0; p < 2; p++) {
      char run[32], a[64], b[64];
      snprintf(run, sizeof run, "%s-%s", models[m], parts[p]);
      snprintf(a, sizeof a, "%s-cuda", run);
      snprintf(b, sizeof b, "%s-again", run);
      near(state, run, "train", "indexer_kl", 3e-2);
      near(state, run, "layers", "mass_best", 3e-2);
      near(state, run, "layers", "kl_uniform", 3e-2);
      tiny_expect_same_tree(tiny_step(state, a, 3).text, tiny_step(state, b, 3).text);
    }
    wn_hf_dir *x, *y; /* a frozen base is the same, whatever device the indexer learned on */
    snprintf(warm, sizeof warm, "%s-warm-cpu", models[m]);
    OK(wn_hf_dir_open(&x, tiny_step(state, warm, 3).text));
    snprintf(warm, sizeof warm, "%s-warm-cuda", models[m]);
    OK(wn_hf_dir_open(&y, tiny_step(state, warm, 3).text));
    for (int64_t i = 0; i < wn_hf_dir_count(x); i++) {
      const wn_st_entry *entry = wn_hf_dir_at(x, i, NULL);
      if (!tiny_is_indexer(entry->name) && tiny_bits_differ(entry, wn_hf_dir_find(y, entry->name, NULL)))
        fail_msg("%s differs between the devices", entry->name);
    }
    wn_hf_dir_close(x);
    wn_hf_dir_close(y);
  }
}

static void best_selection(void **state) {
  wn_needs_gpus(1);
  static const char *const devices[] = {"cpu", "cuda"};
  const char *dir = *state;
  char metrics[WN_PATH_BYTES];
  for (int i = 0; i < 2; i++) { /* the table stands where tiny_cell looks */
    OK(wn_path(metrics, "%s/best-%s/metrics", dir, devices[i]));
    OK(wn_make_dirs(metrics));
    wn_winnow_ends(
        0, 1,
        "eval %s/glm-indexer --data %s/valid --seq-len 32 --selection best --topk 6 --device %s --csv %s/eval.csv", dir,
        dir, devices[i], metrics);
  }
  near(state, "best", "eval", "loss", 1e-2);
  near(state, "best", "eval", "mass_best", 1e-2);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(wide_heads),
      cmocka_unit_test(queries_without_a_low_rank),
      cmocka_unit_test(stages),
      cmocka_unit_test(best_selection),
  };
  return cmocka_run_group_tests(tests, set_up, wn_temp_teardown);
}
