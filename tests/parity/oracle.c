/* Every case of tests/fixtures/oracle (tests/oracle/README.md: transformers' forward, and KL and gradients of an
 * independent T x T form in FP64) against the model, in FP32 and FP64 and, where the pass is sparse, in both attention
 * forms. Selections must be identical; errors are relative to a tensor's largest finite value; zeros must be exact. */
#include <jansson.h>

#include "io/hf_dir.h"
#include "support/model.h"

/* FP32: ten times the difference between the reference's own FP32 and FP64 runs. FP64: the FP32 run of transformers is
 * what the forward is compared with; the gradients were made in FP64 and rounded to FP32 once. */
static const double forward_tolerance[2] = {4e-5, 1e-5}, gradient_tolerance[2] = {6e-5, 1e-6};
/* Indexer gradients where softmax(I) - p cancels. In FP64 too: the reference's cosines and sines are rounded to FP32.
 */
static const double near_tolerance[2] = {6e-4, 2e-5};

static const char *const cases[] = {
    "v3_dense_small",  "v3_dense_whole_queries", "v3_dense_glm4_lite",   "v32_sparse_wide", "v3_dense_yarn_docs",
    "v32_dense",       "v32_dense_docs",         "v32_dense_near",       "v32_sparse_docs", "v32_sparse_large",
    "v32_sparse_long", "v32_sparse_near",        "v32_sparse_small_eps", "v32_sparse_short"};

typedef struct oracle {
  const char *name;
  int32_t wide; /* 1: FP64 */
  wn_device *device;
  wn_test_model model;
  wn_safetensors *expected;
  wn_test_text text;
  int32_t n, rows_with_two, layers;
  bool sparse, near;
  wn_pass pass;
  double worst_forward, worst_gradient;
} oracle;

static void in_case(char path[512], const char *name, const char *file) {
  snprintf(path, 512, "tests/fixtures/oracle/%s/%s", name, file);
}

static void load_weights(oracle *o) {
  char path[512];
  wn_hf_dir *dir = NULL;
  wn_model_config config;
  in_case(path, o->name, "model");
  OK(wn_model_config_load(&config, path));
  OK(wn_hf_dir_open(&dir, path));
  o->layers = config.num_hidden_layers;
  o->model = wn_test_model_create(o->device, &config);
  assert_int_equal(wn_hf_dir_count(dir), o->model.model->table.n);
  for (int32_t i = 0; i < o->model.model->table.n; i++) {
    const wn_param *p = &o->model.model->table.params[i];
    const wn_st_entry *entry = wn_hf_dir_find(dir, p->hf_name, NULL);
    if (!entry) fail_msg("%s has no %s", path, p->hf_name);
    assert_int_equal(entry->rank, p->rank);
    for (int32_t axis = 0; axis < p->rank; axis++) assert_int_equal(entry->dim[axis], p->dim[axis]);
    wn_tensor *t = &o->model.weights[i];
    OK(wn_hf_read(t->data, t->dtype, &(wn_hf_weight){.entry = entry}, 0, wn_tensor_count(t)));
  }
  wn_hf_dir_close(dir);
}

/* The case's tokens and documents; the loss is the mean over all T-1 predictions, into the next document too. */
static void load_case(oracle *o) {
  char path[512];
  json_error_t error;
  in_case(path, o->name, "case.json");
  json_t *root = json_load_file(path, 0, &error);
  if (!root) fail_msg("%s: %s", path, error.text);
  json_t *tokens = json_object_get(root, "tokens"), *documents = json_object_get(root, "documents");
  o->n = (int32_t)json_array_size(tokens);
  int32_t n_documents = (int32_t)json_array_size(documents), lengths[WN_TEST_DOCUMENTS];
  assert_true(n_documents <= WN_TEST_DOCUMENTS);
  for (int32_t i = 0; i < n_documents; i++) {
    int32_t end = i + 1 < n_documents ? (int32_t)json_integer_value(json_array_get(documents, (size_t)i + 1)) : o->n;
    lengths[i] = end - (int32_t)json_integer_value(json_array_get(documents, (size_t)i));
  }
  o->text = wn_test_text_create(o->device, 2, 0, o->n, lengths, n_documents);
  o->rows_with_two = o->n - n_documents;
  for (int32_t i = 0; i < o->n; i++) {
    json_int_t next = i + 1 < o->n ? json_integer_value(json_array_get(tokens, (size_t)i + 1)) : -1;
    wn_test_set(&o->text.tokens, i, (double)json_integer_value(json_array_get(tokens, (size_t)i)));
    wn_test_set(&o->text.target, i, (double)next);
    wn_test_set(&o->text.weight, i, 1.0 / (o->n - 1));
  }
  o->sparse = strcmp(json_string_value(json_object_get(root, "attention")), "sparse") == 0;
  o->near = strstr(o->name, "near") != NULL;
  json_decref(root);
}

static oracle open_case(const char *name, int32_t wide, wn_attention_form form) {
  char path[512];
  oracle o = {.name = name, .wide = wide, .device = wide ? wn_test_cpu_f64() : wn_test_cpu_f32()};
  load_weights(&o);
  load_case(&o);
  in_case(path, name, "expected.safetensors");
  OK(wn_safetensors_open(&o.expected, path));
  const wn_model_config *f = &o.model.model->config;
  o.pass = (wn_pass){.selection = o.sparse ? WN_SELECT_INDEXER : WN_SELECT_DENSE,
                     .topk = f->index_topk < o.n ? f->index_topk : o.n,
                     .form = form,
                     .kl_coeff = 1.0 / o.rows_with_two};
  return o;
}

static void close_case(oracle *o) {
  wn_safetensors_close(o->expected);
  wn_test_model_free(&o->model);
  if (o->wide)
    wn_cpu_free_f64(o->device);
  else
    wn_cpu_free_f32(o->device);
}

static const wn_st_entry *entry_of(const oracle *o, const char *format, ...) WN_PRINTF(2, 3);
static const wn_st_entry *entry_of(const oracle *o, const char *format, ...) {
  char name[256];
  va_list args;
  va_start(args, format);
  vsnprintf(name, sizeof name, format, args);
  va_end(args);
  const wn_st_entry *entry = wn_safetensors_find(o->expected, name);
  if (!entry) fail_msg("%s: nothing expected for %s", o->name, name);
  return entry;
}

/* Largest difference relative to the largest finite expected value; infinities in the same places, zeros exact. */
static double compare(const oracle *o, const wn_tensor *got, const wn_st_entry *entry, double tolerance) {
  const float *want = entry->data;
  int64_t n = wn_tensor_count(got), bad = -1;
  double size = 0, worst = 0;
  assert_int_equal(entry->dtype, WN_F32);
  if (entry->bytes != (uint64_t)n * 4) fail_msg("%s: %s has another size", o->name, entry->name);
  for (int64_t i = 0; i < n; i++)
    if (isfinite(want[i])) size = fmax(size, fabs((double)want[i]));
  for (int64_t i = 0; i < n; i++) {
    double a = wn_test_get(got, i), b = (double)want[i];
    if (a == b) continue;
    double gap = size > 0 ? fabs(a - b) / size : INFINITY; /* an infinity against a number gives infinity */
    if (isnan(gap)) gap = INFINITY;                        /* a NaN would be forgotten at the next element */
    if (gap > worst) {
      worst = gap;
      bad = i;
    }
  }
  if (!(worst <= tolerance))
    fail_msg("%s: %s[%lld] is %.9g, expected %.9g: off by %.2g of the largest %.3g", o->name, entry->name,
             (long long)bad, wn_test_get(got, bad), (double)want[bad], worst, size);
  return worst;
}

static void compare_forward(oracle *o, const wn_tensor *got, const wn_st_entry *entry) {
  o->worst_forward = fmax(o->worst_forward, compare(o, got, entry, forward_tolerance[o->wide]));
}

static void check_selection(const oracle *o, const wn_tensor *got, const wn_st_entry *entry) {
  const int32_t *want = entry->data;
  assert_int_equal(entry->dtype, WN_I32);
  assert_int_equal(entry->bytes, (uint64_t)wn_tensor_bytes(got));
  for (int64_t i = 0; i < wn_tensor_count(got); i++)
    if ((int32_t)wn_test_get(got, i) != want[i])
      fail_msg("%s: %s[%lld,%lld] is %d, expected %d", o->name, entry->name, (long long)(i / got->dim[1]),
               (long long)(i % got->dim[1]), (int)wn_test_get(got, i), want[i]);
}

static void check_kl(oracle *o, const wn_tensor *kl, int32_t layer) {
  double sum = 0;
  for (int32_t i = 0; i < o->n; i++) sum += wn_test_get(kl, i);
  sum /= o->rows_with_two;
  wn_tensor mean = wn_tensor_of(&sum, WN_F64, 1, 1, 0, 0, 0);
  /* near convergence the KL itself is a small difference */
  const wn_st_entry *entry = entry_of(o, "kl.%d", layer);
  if (o->near)
    compare(o, &mean, entry, 10 * forward_tolerance[o->wide]);
  else
    compare_forward(o, &mean, entry);
}

static void check_forward(oracle *o) {
  const wn_model_config *f = &o->model.model->config;
  wn_test_run run = wn_test_run_create(&o->model, o->n, o->pass.topk ? o->pass.topk : 1);
  wn_pass pass = o->pass;
  pass.indexer_kl = f->has_indexer;
  for (int32_t l = 0; l < o->layers; l++) {
    run.measures[l].attention = wn_test_role(o->device, WN_ACT, 2, o->n, f->hidden_size, 0);
    if (!f->has_indexer) continue;
    run.measures[l].index_scores = wn_test_role(o->device, WN_STAT, 2, o->n, o->n, 0);
    run.measures[l].topk = wn_test_role(o->device, WN_INDEX, 2, o->n, pass.topk, 0);
  }
  wn_test_forward(&o->model, &run, &o->text, &pass, false);
  wn_tensor logits = wn_test_role(o->device, WN_STAT, 2, o->n, f->vocab_size, 0);
  OK(wn_model_logits(o->model.model, &o->model.weight_of[o->layers + 1], &logits, &run.h[o->layers]));
  compare_forward(o, &logits, entry_of(o, "logits"));
  for (int32_t l = 0; l <= o->layers; l++) compare_forward(o, &run.h[l], entry_of(o, "hidden.%d", l));
  for (int32_t l = 0; l < o->layers; l++) {
    compare_forward(o, &run.measures[l].attention, entry_of(o, "attn.%d", l));
    if (!f->has_indexer) continue;
    compare_forward(o, &run.measures[l].index_scores, entry_of(o, "index_scores.%d", l));
    check_selection(o, &run.measures[l].topk, entry_of(o, "topk.%d", l));
    if (o->sparse) check_selection(o, &run.replay[l].selection, entry_of(o, "topk.%d", l));
    check_kl(o, &run.measures[l].kl, l);
  }
}

/* `kind` names the loss: base, indexer. The other loss's parameters must be exactly zero (compare asks for it). */
static void check_gradients(oracle *o, const char *kind) {
  bool base = strcmp(kind, "base") == 0;
  for (int32_t i = 0; i < o->model.model->table.n; i++) {
    const wn_param *p = &o->model.model->table.params[i];
    if (p->kind == WN_BUFFER) continue;
    double tolerance = gradient_tolerance[o->wide];
    if (!base && o->near) tolerance = near_tolerance[o->wide];
    double error = compare(o, &o->model.grads[i], entry_of(o, "grad.%s.%s", kind, p->hf_name), tolerance);
    o->worst_gradient = fmax(o->worst_gradient, error);
  }
}

static void run_gradients(oracle *o, bool base, bool indexer) {
  wn_test_run run = wn_test_run_create(&o->model, o->n, o->pass.topk ? o->pass.topk : 1);
  wn_pass forward = o->pass, backward = o->pass;
  forward.indexer_grads = indexer && !o->sparse;
  backward.indexer_grads = indexer && o->sparse;
  wn_test_model_zero_grads(&o->model);
  if (!base) OK(o->device->ops->zero(o->device, &o->text.weight));
  wn_test_forward(&o->model, &run, &o->text, &forward, forward.indexer_grads);
  if (base || o->sparse) wn_test_backward(&o->model, &run, &o->text, &backward);
}

static void check_case(const char *name, int32_t wide, wn_attention_form form) {
  oracle o = open_case(name, wide, form);
  check_forward(&o);
  run_gradients(&o, true, false);
  check_gradients(&o, "base");
  if (o.model.model->config.has_indexer) {
    run_gradients(&o, false, true);
    check_gradients(&o, "indexer");
  }
  print_message("%-22s %s %-8s worst forward %.1e, gradient %.1e\n", name, wide ? "FP64" : "FP32",
                !o.sparse                  ? "dense"
                : form == WN_FORM_ABSORBED ? "absorbed"
                                           : "masked",
                o.worst_forward, o.worst_gradient);
  close_case(&o);
}

static void agrees(void **state) {
  const char *name = *state;
  bool sparse = strstr(name, "_sparse") != NULL;
  for (int32_t wide = 0; wide < 2; wide++) {
    check_case(name, wide, WN_FORM_MASKED);
    if (sparse) check_case(name, wide, WN_FORM_ABSORBED);
  }
}

/* cos and sin scaled by mscale / mscale_all_dim: no released model has it, and it is refused rather than ignored. */
static void refuses_the_yarn_ratio(void **state) {
  (void)state;
  wn_model_config config;
  REFUSED(wn_model_config_load(&config, "tests/fixtures/oracle/v32_sparse_yarn_ratio/model"), WN_E_CONFIG, "mscale");
}

int main(void) {
  enum { N = sizeof cases / sizeof *cases };
  struct CMUnitTest tests[N + 1];
  for (size_t i = 0; i < N; i++)
    tests[i] = (struct CMUnitTest){cases[i], agrees, NULL, NULL, (void *)(uintptr_t)cases[i]};
  tests[N] = (struct CMUnitTest)cmocka_unit_test(refuses_the_yarn_ratio);
  return cmocka_run_group_tests(tests, NULL, NULL);
}
