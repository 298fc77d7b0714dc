/* A base without low-rank queries (q_lora_rank null) through all stages: trained as it is, rewritten where the indexer
 * is added, and from there on a V3.2 model like any other. */
#include "support/tiny.h"

enum { N_TOKENS = 40 };

static wn_model_config whole_queries(void) {
  wn_model_config config = tiny_config();
  config.q_lora_rank = 0;
  config.n_group = 1;
  return config;
}

static int set_up(void **state) {
  if (tiny_setup(state)) return -1;
  wn_model_config config = whole_queries();
  tiny_model(wn_temp(state, "whole").text, &config, 3, 3, NULL);
  return 0;
}

static void train(void **state, int ranks, const char *stage, const char *init, const char *run, const char *more) {
  const char *dir = *state;
  wn_winnow_ends(0, ranks, "%s %s/job.yaml init=%s run_dir=%s/%s %s", stage, dir, init, dir, run, more);
}

static wn_hf_dir *open_model(const char *path) {
  wn_hf_dir *dir;
  OK(wn_hf_dir_open(&dir, path));
  return dir;
}

static bool low_rank(const char *name) {
  return strstr(name, ".q_a_") || strstr(name, ".q_b_");
}

static void the_dense_model_trains_as_it_is(void **state) {
  wn_temp_path base = wn_temp(state, "whole"), after = tiny_step(state, "dense", 3);
  train(state, 1, "pretrain", base.text, "dense", "training.steps=3 metrics.eval_every=0");
  wn_model_config config;
  OK(wn_model_config_load(&config, after.text));
  assert_int_equal(config.q_lora_rank, 0);
  wn_hf_dir *a = open_model(base.text), *b = open_model(after.text);
  assert_int_equal(wn_hf_dir_count(a), wn_hf_dir_count(b));
  for (int64_t i = 0; i < wn_hf_dir_count(b); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(b, i, NULL), *before = wn_hf_dir_find(a, entry->name, NULL);
    assert_false(low_rank(entry->name));
    assert_true(before && tiny_bits_differ(entry, before)); /* everything learns, q_proj too */
  }
  wn_hf_dir_close(a);
  wn_hf_dir_close(b);
}

/* The warm-up's checkpoint: V3.2's names and configuration, the base's bytes; the same on 2 ranks. */
static void the_warm_up_rewrites(void **state) {
  wn_temp_path base = wn_temp(state, "whole"), after = tiny_step(state, "warm", 4), two = tiny_step(state, "two", 4);
  train(state, 1, "warmup", base.text, "warm", "training.steps=4 checkpoint.interval=2");
  train(state, 2, "warmup", base.text, "two", "training.steps=4 checkpoint.interval=2 training.micro_batch_seqs=1");
  wn_model_config config;
  OK(wn_model_config_load(&config, after.text));
  assert_int_equal(config.q_lora_rank, config.hidden_size);
  wn_hf_dir *a = open_model(base.text), *b = open_model(after.text), *c = open_model(two.text);
  int64_t made = 0;
  for (int64_t i = 0; i < wn_hf_dir_count(b); i++) {
    char name[256];
    const wn_st_entry *entry = wn_hf_dir_at(b, i, NULL), *before = wn_hf_dir_find(a, entry->name, NULL);
    char *at = strstr(strcpy(name, entry->name), ".q_b_");
    if (at) memmove(at + 2, at + 4, strlen(at + 4) + 1);
    if (at) before = wn_hf_dir_find(a, name, NULL);
    assert_null(strstr(entry->name, ".q_proj."));
    if (strstr(entry->name, ".q_a_"))
      made++;
    else if (!tiny_is_indexer(entry->name) && (!before || tiny_bits_differ(entry, before)))
      fail_msg("%s is not the base's", entry->name);
    if (!tiny_is_indexer(entry->name) && tiny_bits_differ(entry, wn_hf_dir_find(c, entry->name, NULL)))
      fail_msg("%s differs on 2 ranks", entry->name);
  }
  assert_int_equal(made, 2 * 3);
  wn_hf_dir_close(a);
  wn_hf_dir_close(b);
  wn_hf_dir_close(c);
}

/* Stopped at step 2 and gone on without its base: the same checkpoint, to the byte. */
static void resumed_without_its_base(void **state) {
  wn_temp_path base = wn_temp(state, "whole"), aside = wn_temp(state, "aside");
  train(state, 1, "warmup", base.text, "halves", "training.steps=2 checkpoint.interval=2");
  assert_int_equal(rename(base.text, aside.text), 0);
  train(state, 1, "warmup", base.text, "halves", "training.steps=4 checkpoint.interval=2");
  assert_int_equal(rename(aside.text, base.text), 0);
  tiny_expect_same_tree(tiny_step(state, "halves", 4).text, tiny_step(state, "warm", 4).text);
}

static wn_safetensors *forward(void **state, const char *model, const char *name) {
  char tokens[N_TOKENS * 4];
  size_t used = 0;
  wn_temp_path dump = wn_temp(state, name);
  wn_safetensors *file;
  for (int i = 0; i < N_TOKENS; i++)
    used +=
        (size_t)snprintf(tokens + used, sizeof tokens - used, "%s%d", i ? "," : "", (i * 29 + i * i * 7) % TINY_VOCAB);
  wn_winnow_ends(0, 1, "forward %s --tokens %s --threads 1 --dump %s", model, tokens, dump.text);
  OK(wn_safetensors_open(&file, dump.text));
  return file;
}

/* The dense output moves by what BF16's inverses are off, and no more. */
static void hidden_states_stay_near(void **state) {
  wn_safetensors *base = forward(state, wn_temp(state, "whole").text, "whole.safetensors");
  wn_safetensors *warm = forward(state, tiny_step(state, "warm", 4).text, "warm.safetensors");
  const wn_st_entry *a = wn_safetensors_find(base, "logits"), *b = wn_safetensors_find(warm, "logits");
  double squares = 0, gaps = 0;
  assert_int_equal(a->bytes, b->bytes);
  for (uint64_t i = 0; i < a->bytes / 4; i++) {
    double x = (double)((const float *)a->data)[i], y = (double)((const float *)b->data)[i];
    squares += x * x;
    gaps += (x - y) * (x - y);
  }
  print_message("logits move by %.2e of their norm\n", sqrt(gaps / squares));
  assert_true(gaps > 0 && sqrt(gaps / squares) < 0x1p-6);
  wn_safetensors_close(base);
  wn_safetensors_close(warm);
}

static void the_sparse_stage_follows(void **state) {
  train(state, 1, "adapt", tiny_step(state, "warm", 4).text, "sparse", "training.steps=2 metrics.eval_every=0");
  wn_winnow_ends(0, 1, "verify %s", tiny_step(state, "sparse", 2).text);
  wn_hf_dir *a = open_model(tiny_step(state, "warm", 4).text), *b = open_model(tiny_step(state, "sparse", 2).text);
  const char *learns[] = {"model.layers.1.self_attn.q_a_proj.weight", "model.layers.1.self_attn.q_b_proj.weight"};
  for (int i = 0; i < 2; i++)
    assert_true(tiny_bits_differ(wn_hf_dir_find(a, learns[i], NULL), wn_hf_dir_find(b, learns[i], NULL)));
  wn_hf_dir_close(a);
  wn_hf_dir_close(b);
}

/* GLM-4.7-Flash's heads, eps and theta under its own model_type: V3.2 from the warm-up on, to what another name would
 * have given byte for byte. */
static void another_name_is_v3(void **state) {
  wn_model_config config = tiny_config(), read;
  config.n_group = 1;
  config.qk_nope_head_dim = 192;
  config.qk_rope_head_dim = 64;
  config.v_head_dim = 256;
  config.rms_norm_eps = 1e-5;
  config.rope_theta = 1e6;
  wn_temp_path glm = wn_temp(state, "glm"), v3 = wn_temp(state, "same-as-v3"), path = wn_temp(state, "glm/config.json");
  tiny_model(glm.text, &config, 5, 2, NULL);
  tiny_model(v3.text, &config, 5, 2, NULL);
  tiny_file file = tiny_read(path.text);
  char *at = strstr(file.text, "\"deepseek_v3\""), text[8192];
  assert_non_null(at);
  snprintf(text, sizeof text, "%.*s\"glm4_moe_lite\"%s", (int)(at - file.text), file.text,
           at + strlen("\"deepseek_v3\""));
  free(file.text);
  tiny_write(path.text, text);
  const char *const names[] = {"glm", "same-as-v3"};
  for (int i = 0; i < 2; i++) {
    char warm[64];
    snprintf(warm, sizeof warm, "%s-warm", names[i]);
    train(state, 1, "warmup", wn_temp(state, names[i]).text, warm, "training.steps=2 dsa.index_head_dim=64");
  }
  OK(wn_model_config_load(&read, tiny_step(state, "glm-warm", 2).text));
  assert_true(read.has_indexer && read.q_lora_rank == config.q_lora_rank);
  tiny_expect_same_tree(tiny_step(state, "glm-warm", 2).text, tiny_step(state, "same-as-v3-warm", 2).text);
}

static void a_norm_of_zero(const wn_param_table *table, float **values) {
  for (int32_t i = 0; i < table->n; i++)
    if (table->params[i].slot == WN_P_INPUT_NORM && table->params[i].layer == 1) values[i][5] = 0;
}

static void a_norm_of_zero_is_refused(void **state) {
  wn_model_config config = whole_queries();
  const char *dir = *state;
  tiny_model(wn_temp(state, "zero").text, &config, 3, 3, a_norm_of_zero);
  for (int ranks = 1; ranks <= 2; ranks++)
    wn_winnow_ends(WN_E_INPUT, ranks, "warmup %s/job.yaml init=%s/zero run_dir=%s/never training.micro_batch_seqs=1",
                   dir, dir, dir);
  wn_winnow_refuses(WN_E_INPUT, "element 5 of model.layers.1.input_layernorm.weight is 0",
                    "warmup %s/job.yaml init=%s/zero run_dir=%s/never", dir, dir, dir);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(the_dense_model_trains_as_it_is), cmocka_unit_test(the_warm_up_rewrites),
      cmocka_unit_test(resumed_without_its_base),        cmocka_unit_test(hidden_states_stay_near),
      cmocka_unit_test(the_sparse_stage_follows),        cmocka_unit_test(another_name_is_v3),
      cmocka_unit_test(a_norm_of_zero_is_refused),
  };
  return cmocka_run_group_tests(tests, set_up, wn_temp_teardown);
}
