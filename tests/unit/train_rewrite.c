/* A base without low-rank queries, read as a model of V3.2's form: every value, the stated bound against FP64, and what
 * is refused by name. */
#include <math.h>

#include "support/checkpoint.h"
#include "support/one_world.h"
#include "train/rewrite.h"

static const wn_param_settings warmup = {.train_indexer = true, .file_dtype = WN_F32};

/* What the base is, and what it becomes. */
static wn_model_config whole(void) {
  wn_model_config config = test_config;
  config.q_lora_rank = 0;
  config.has_indexer = false;
  return config;
}

static wn_model_config rewritten(void) {
  wn_model_config config = test_config;
  config.q_lora_rank = config.hidden_size;
  return config;
}

static const float *find(const test_rig *rig, const char *name, int64_t *count) {
  for (int32_t i = 0; i < wn_store_pieces(rig->store); i++) {
    wn_piece *piece = wn_store_piece(rig->store, i);
    for (int32_t s = 0; s < piece->n_segments; s++) {
      if (strcmp(rig->model->table.params[piece->segments[s].param].hf_name, name) != 0) continue;
      *count = piece->segments[s].count;
      return (const float *)piece->master.data + piece->segments[s].offset;
    }
  }
  fail_msg("no %s", name);
  return NULL;
}

static const float *of_layer(const test_rig *rig, int32_t layer, const char *name, int64_t *count) {
  char full[WN_NAME_BYTES];
  snprintf(full, sizeof full, "model.layers.%d.%s.weight", layer, name);
  return find(rig, full, count);
}

static test_rig load(void **state, const char *init) {
  test_rig rig;
  wn_model_config config = rewritten();
  OK(test_rig_create(&rig, world, &config, warmup, WN_STAGE_WARMUP, *state, init));
  OK(wn_init_load(&rig.plan, init, true));
  return rig;
}

static void every_value(void **state) {
  wn_temp_path init = wn_temp(state, "init");
  wn_model_config base = whole();
  test_dir_write(init.text, &base, (test_dir){.dtype = WN_F32, .shards = 3, .mtp = true}, 5);
  test_rig rig = load(state, init.text);
  wn_hf_dir *dir;
  OK(wn_hf_dir_open(&dir, init.text));
  for (int32_t p = 0; p < rig.model->table.n; p++) {
    const wn_param *param = &rig.model->table.params[p];
    char name[WN_NAME_BYTES];
    int64_t n, hidden = base.hidden_size;
    const float *got = find(&rig, param->hf_name, &n), *norm;
    if (param->kind == WN_INDEXER) continue;
    snprintf(name, sizeof name, "model.layers.%d.input_layernorm.weight", param->layer);
    norm = param->layer >= 0 && param->layer < base.num_hidden_layers ? wn_hf_dir_find(dir, name, NULL)->data : NULL;
    snprintf(name, sizeof name, "model.layers.%d.self_attn.q_proj.weight", param->layer);
    const wn_st_entry *entry = wn_hf_dir_find(dir, param->slot == WN_P_Q_B ? name : param->hf_name, NULL);
    if (entry) {
      assert_memory_equal(got, entry->data, entry->bytes);
      continue;
    }
    for (int64_t i = 0; i < n; i++) {
      int64_t channel = param->rank == 1 ? i : i / hidden;
      float d = wn_f32_from_bf16(wn_bf16_from_f32(1 / norm[channel])), want = d;
      if (param->slot == WN_P_Q_A_NORM)
        want = wn_f32_from_bf16(wn_bf16_from_f32(1 / d));
      else if (i % hidden != channel)
        want = 0;
      if (got[i] != want)
        fail_msg("%s[%lld] is %g instead of %g", param->hf_name, (long long)i, (double)got[i], (double)want);
    }
  }
  wn_hf_dir_close(dir);
  test_rig_free(&rig);
}

/* x = g h / sqrt(ms + eps), x' = w d x / sqrt(mean (d x)^2 + 1e-6), in FP64. Largest and mean |x' / x - 1|. */
static void shift(const double *g, const double *d, const double *w, int64_t n, double ms, double eps, uint64_t seed,
                  double *largest, double *mean) {
  double h[64], x[64], squares = 0, inner = 0;
  assert_true(n <= 64);
  for (int64_t i = 0; i < n; i++) {
    h[i] = wn_rng_normal(seed, WN_RNG_TEST, (uint64_t)i);
    squares += h[i] * h[i];
  }
  for (int64_t i = 0; i < n; i++) x[i] = g[i] * h[i] * sqrt(ms / (squares / (double)n)) / sqrt(ms + eps);
  for (int64_t i = 0; i < n; i++) inner += d[i] * x[i] * d[i] * x[i];
  *largest = *mean = 0;
  for (int64_t i = 0; i < n; i++) {
    double off = w[i] * d[i] / sqrt(inner / (double)n + 1e-6) - 1;
    *largest = fmax(*largest, fabs(off));
    *mean += off / (double)n;
  }
}

/* The header's bound, for rows from where eps rules to where it is nothing; and without BF16's rounding the shift is
 * eps / (2 ms) itself, but for the terms left out. */
static void the_bound(void **state) {
  wn_temp_path init = wn_temp(state, "init");
  wn_model_config base = whole();
  test_dir_write(init.text, &base, (test_dir){.dtype = WN_F32, .shards = 1}, 5);
  test_rig rig = load(state, init.text);
  int64_t hidden = base.hidden_size, n;
  double worst = 0;
  for (int32_t layer = 0; layer < base.num_hidden_layers; layer++) {
    const float *norm = of_layer(&rig, layer, "input_layernorm", &n),
                *qa = of_layer(&rig, layer, "self_attn.q_a_proj", &n);
    const float *second = of_layer(&rig, layer, "self_attn.q_a_layernorm", &n);
    double g[64], d[64], w[64], exact_d[64], exact_w[64], largest, mean;
    for (int64_t i = 0; i < hidden; i++) {
      g[i] = exact_w[i] = (double)norm[i];
      d[i] = (double)qa[i * hidden + i];
      w[i] = (double)second[i];
      exact_d[i] = 1 / g[i];
    }
    for (int e = 0; e < 2; e++)
      for (int row = 0; row < 40; row++) {
        double eps = e ? 1e-5 : 1e-6, ms = pow(10, -4 + row % 8), first = eps / (2 * ms);
        shift(g, d, w, hidden, ms, eps, (uint64_t)(row + 100 * layer), &largest, &mean);
        if (!(largest <= (first + 0x1p-7 + 1e-6) * 1.01))
          fail_msg("layer %d, ms %g, eps %g: off by %g", layer, ms, eps, largest);
        worst = fmax(worst, largest - first);
        shift(g, exact_d, exact_w, hidden, ms, eps, (uint64_t)(row + 100 * layer), &largest, &mean);
        if (!(fabs(mean - (first - 5e-7)) <= 1e-3 * first + first * first + 1e-12))
          fail_msg("layer %d, ms %g, eps %g: the exact inverse is off by %g, stated %g", layer, ms, eps, mean, first);
      }
  }
  print_message("largest |x' / x - 1| - eps / (2 ms): %.2e of 2^-7 = %.2e\n", worst, 0x1p-7);
  assert_true(worst > 0x1p-10); /* BF16 is in it */
  test_rig_free(&rig);
}

/* Saved, the model is V3.2-legal, and comes back the same; nothing of the source's shards with q_proj is linked. */
static void saved(void **state) {
  wn_temp_path init = wn_temp(state, "init");
  wn_model_config base = whole(), read;
  char path[WN_PATH_BYTES];
  wn_hf_dir *dir, *source;
  test_dir_write(init.text, &base, (test_dir){.dtype = WN_BF16, .shards = 4, .mtp = true}, 5);
  test_rig rig = load(state, init.text), again;
  OK(wn_checkpoint_save(&rig.plan, &test_state));
  OK(wn_path(path, "%s/checkpoints/" WN_STEP_FORMAT, (const char *)*state, (long long)test_state.step));
  OK(wn_model_config_load(&read, path));
  assert_int_equal(read.q_lora_rank, base.hidden_size);
  assert_true(read.has_indexer);
  OK(wn_hf_dir_open(&dir, path));
  OK(wn_hf_dir_open(&source, init.text));
  for (int64_t i = 0; i < wn_hf_dir_count(dir); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(dir, i, NULL);
    assert_null(strstr(entry->name, ".q_proj."));
    if (strstr(entry->name, ".q_a_")) assert_int_equal(entry->dtype, WN_BF16);
  }
  assert_true(test_same_bytes(wn_hf_dir_find(dir, "model.layers.2.self_attn.q_b_proj.weight", NULL),
                              wn_hf_dir_find(source, "model.layers.2.self_attn.q_proj.weight", NULL)));
  assert_true(test_same_bytes(wn_hf_dir_find(dir, "model.layers.3.eh_proj.weight", NULL),
                              wn_hf_dir_find(source, "model.layers.3.eh_proj.weight", NULL)));
  wn_hf_dir_close(dir);
  wn_hf_dir_close(source);
  wn_model_config config = rewritten();
  wn_state back;
  OK(test_rig_create(&again, world, &config, warmup, WN_STAGE_WARMUP, *state, init.text));
  OK(wn_checkpoint_load(&again.plan, path, &back));
  for (int32_t i = 0; i < wn_store_pieces(rig.store); i++) {
    const wn_tensor *a = &wn_store_piece(rig.store, i)->master, *b = &wn_store_piece(again.store, i)->master;
    assert_memory_equal(a->data, b->data, (size_t)wn_tensor_bytes(a));
  }
  test_rig_free(&again);
  test_rig_free(&rig);
}

static void refuse(void **state, const char *init, const char *part) {
  test_rig rig;
  wn_model_config config = rewritten();
  OK(test_rig_create(&rig, world, &config, warmup, WN_STAGE_WARMUP, *state, init));
  wn_status status = wn_init_load(&rig.plan, init, true);
  if (status) assert_non_null(strstr(wn_status_text(status), init));
  REFUSED(status, WN_E_INPUT, part);
  test_rig_free(&rig);
}

/* One element of a layer's norm in the file, in place. */
static void set_norm(const char *init, int64_t element, float value) {
  char path[WN_PATH_BYTES];
  wn_safetensors *file;
  OK(wn_path(path, "%s/model.safetensors", init));
  OK(wn_safetensors_open(&file, path));
  const wn_st_entry *entry = wn_safetensors_find(file, "model.layers.1.input_layernorm.weight");
  const wn_st_entry *first = wn_safetensors_at(file, 0);
  int64_t data_begin = 0, offset = (const char *)entry->data - (const char *)first->data + element * 4;
  char *text;
  size_t bytes;
  OK(wn_read_file(&text, &bytes, path, 1 << 20));
  for (int i = 7; i >= 0; i--) data_begin = data_begin << 8 | (unsigned char)text[i];
  memcpy(text + 8 + data_begin + offset, &value, sizeof value);
  wn_safetensors_close(file);
  OK(wn_write_file_atomic(path, text, bytes));
  free(text);
}

static void refusals(void **state) {
  wn_temp_path init = wn_temp(state, "init"), mtp = wn_temp(state, "mtp"), other = wn_temp(state, "other");
  wn_model_config base = whole();
  test_dir_write(init.text, &base, (test_dir){.dtype = WN_F32, .shards = 1}, 5);
  static const float bad[] = {0, -0.0f, NAN, INFINITY, 1e-39f, 3e38f};
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    set_norm(init.text, 7, bad[i]);
    refuse(state, init.text,
           isfinite(bad[i]) ? "element 7 of model.layers.1.input_layernorm.weight is "
                            : "tensor model.layers.1.input_layernorm.weight: element [7] is ");
  }
  set_norm(init.text, 7, -0.5f);
  test_rig rig = load(state, init.text);
  test_rig_free(&rig);
  test_dir_write(mtp.text, &base,
                 (test_dir){.dtype = WN_F32, .shards = 1, .extra = "model.layers.3.self_attn.q_proj.weight"}, 5);
  refuse(state, mtp.text, "tensor model.layers.3.self_attn.q_proj.weight of a prediction layer");
  test_dir_write(other.text, &base, (test_dir){.dtype = WN_F32, .shards = 1, .without = "layers.2.self_attn.q_proj"},
                 5);
  refuse(state, other.text, "model.layers.2.self_attn.q_a_proj.weight");
  test_dir_write(other.text, &base,
                 (test_dir){.dtype = WN_F32, .shards = 1, .extra = "model.layers.2.self_attn.q_b_proj.weight"}, 5);
  refuse(state, other.text, "1 tensor stands in two shards: model.layers.2.self_attn.q_b_proj.weight (");
}

int main(void) {
  const struct CMUnitTest tests[] = {TEMP_TEST(every_value), TEMP_TEST(the_bound), TEMP_TEST(saved),
                                     TEMP_TEST(refusals)};
  return cmocka_run_group_tests(tests, make_world, free_world);
}
