/* What a layer promises beside its arithmetic (tests/gradient/model.c, tests/parity/oracle.c): replay, recompute,
 * detached indexer, independence of rows, agreement of forms, measures, scratch. */
#include "support/model.h"

/* One layer's worth of fixtures: model, text, pass, in FP64 unless a test says otherwise. */
typedef struct scene {
  wn_test_model model;
  wn_test_text text;
  wn_test_run run;
  wn_pass pass;
} scene;

static scene set_up_of(wn_device *d, int32_t sequence, const int32_t *lengths, int32_t n_documents,
                       wn_selection selection, wn_attention_form form, int32_t topk) {
  scene s = {0};
  wn_model_config config = wn_test_config();
  s.model = wn_test_model_create(d, &config);
  wn_test_model_fill(&s.model, 11, 1.2);
  s.text = wn_test_text_create(d, config.vocab_size, 3, sequence, lengths, n_documents);
  s.pass = (wn_pass){.selection = selection,
                     .topk = topk,
                     .form = form,
                     .kl_coeff = 1,
                     .rows_per_sequence = sequence,
                     .balance_coeff = 0.01,
                     .seed = 5};
  s.run = wn_test_run_create(&s.model, s.text.rows.n_rows, topk);
  return s;
}

static const int32_t documents[] = {13, 1, 18};

static scene set_up(wn_selection selection, wn_attention_form form, int32_t topk) {
  return set_up_of(wn_test_cpu_f64(), 32, documents, 3, selection, form, topk);
}

static void tear_down(scene *s) {
  wn_test_model_free(&s->model);
  wn_cpu_free_f64(s->model.device);
}

static void expect_same(const char *what, const wn_tensor *a, const wn_tensor *b) {
  if (!wn_test_same_bits(a, b)) fail_msg("%s: bits differ", what);
}

static void expect_same_grads(const scene *a, const scene *b) {
  for (int32_t i = 0; i < a->model.model->table.n; i++)
    if (a->model.grads[i].data)
      expect_same(a->model.model->table.params[i].hf_name, &a->model.grads[i], &b->model.grads[i]);
}

/* A forward that no backward follows. */
static void forward_alone(scene *s) {
  OK(wn_model_embed(s->model.model, &s->model.weight_of[0], &s->run.h[0], &s->text.tokens));
  for (int32_t l = 0; l < 3; l++)
    OK(wn_layer_forward(s->model.model, l, &s->model.weight_of[l + 1], NULL, &s->pass, &s->text.rows, &s->run.h[l + 1],
                        NULL, &s->run.h[l], &s->run.replay[l], &s->run.measures[l]));
}

/* Experts take rows in turn, so many at once: each row's sums are its own, but for what a product of fewer rows rounds
 * otherwise. So a forward that a backward follows takes all at once, as the backward does. */
static void experts_take_rows_in_turn(void **state) {
  (void)state;
  static const int32_t rows[] = {31, 16, 7, 1};
  scene whole = set_up(WN_SELECT_DENSE, WN_FORM_AUTO, 0);
  wn_test_forward(&whole.model, &whole.run, &whole.text, &whole.pass, false);
  for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
    scene s = set_up(WN_SELECT_DENSE, WN_FORM_AUTO, 0);
    s.model.model->moe_rows = rows[i];
    wn_test_forward(&s.model, &s.run, &s.text, &s.pass, false);
    for (int32_t l = 0; l < 3; l++) expect_same("hidden states", &s.run.h[l + 1], &whole.run.h[l + 1]);
    for (int32_t l = 0; l < 3; l++) OK(s.model.device->ops->zero(s.model.device, &s.run.measures[l].load));
    forward_alone(&s);
    for (int32_t l = 0; l < 3; l++) {
      wn_test_close("hidden states", &s.run.h[l + 1], &whole.run.h[l + 1], 1e-12, 1e-12);
      expect_same("choices", &s.run.replay[l].expert, &whole.run.replay[l].expert);
      expect_same("loads", &s.run.measures[l].load, &whole.run.measures[l].load);
    }
    tear_down(&s);
  }
  tear_down(&whole);
}

/* Choices recorded and then forced give the same bits, and so does a backward that has to choose again. */
static void replay_and_recompute(void **state) {
  (void)state;
  static const wn_attention_form forms[2] = {WN_FORM_ABSORBED, WN_FORM_MASKED};
  for (int f = 0; f < 2; f++) {
    scene a = set_up(WN_SELECT_INDEXER, forms[f], 5), b = set_up(WN_SELECT_INDEXER, forms[f], 5);
    a.pass.indexer_grads = b.pass.indexer_grads = true;
    wn_test_forward(&a.model, &a.run, &a.text, &a.pass, false);
    wn_test_backward(&a.model, &a.run, &a.text, &a.pass);
    wn_test_run forced = wn_test_run_create(&a.model, a.text.rows.n_rows, 5);
    for (int32_t l = 0; l < 3; l++) forced.replay[l] = a.run.replay[l];
    wn_test_force(&forced, true);
    wn_test_forward(&a.model, &forced, &a.text, &a.pass, false);
    for (int32_t l = 0; l <= 3; l++) expect_same("forced forward", &forced.h[l], &a.run.h[l]);

    for (int32_t l = 0; l < 3; l++) b.run.replay[l].expert.data = b.run.replay[l].selection.data = NULL;
    wn_test_forward(&b.model, &b.run, &b.text, &b.pass, false);
    wn_test_backward(&b.model, &b.run, &b.text, &b.pass);
    for (int32_t l = 0; l <= 3; l++) expect_same("forward without replay", &b.run.h[l], &a.run.h[l]);
    for (int32_t l = 0; l < 3; l++) expect_same("kl", &b.run.measures[l].kl, &a.run.measures[l].kl);
    expect_same_grads(&a, &b);
    tear_down(&a);
    tear_down(&b);
  }
}

/* Forced choices are taken even where they are not what the layer would choose. */
static void forced_choices_are_taken(void **state) {
  (void)state;
  scene a = set_up(WN_SELECT_INDEXER, WN_FORM_MASKED, 5), b = set_up(WN_SELECT_RECENT, WN_FORM_MASKED, 5);
  wn_test_forward(&b.model, &b.run, &b.text, &b.pass, false);
  for (int32_t l = 0; l < 3; l++) a.run.replay[l] = b.run.replay[l];
  wn_test_force(&a.run, true);
  wn_test_forward(&a.model, &a.run, &a.text, &a.pass, false);
  for (int32_t l = 0; l <= 3; l++) expect_same("hidden states", &a.run.h[l], &b.run.h[l]);
  tear_down(&a);
  tear_down(&b);
}

/* The backward takes a replay's choices without being told to, and leaves them alone: here they are choices that the
 * layer would not make, so that a backward which chooses again is found. */
static void backward_keeps_the_choices(void **state) {
  (void)state;
  scene a = set_up(WN_SELECT_INDEXER, WN_FORM_MASKED, 5), b = set_up(WN_SELECT_RECENT, WN_FORM_MASKED, 5);
  wn_test_forward(&b.model, &b.run, &b.text, &b.pass, false);
  wn_replay kept[3];
  for (int32_t l = 0; l < 3; l++) {
    wn_replay *r = &b.run.replay[l];
    for (int64_t i = 0; i < wn_tensor_count(&r->expert); i++) /* another expert, and still distinct ones in a row */
      wn_test_set(&r->expert, i, (double)(((int64_t)wn_test_get(&r->expert, i) + 3) % 8));
    a.run.replay[l] = *r;
    kept[l].expert = wn_test_role(b.model.device, WN_INDEX, 2, 32, 3, 0);
    kept[l].selection = wn_test_role(b.model.device, WN_INDEX, 2, 32, 5, 0);
    OK(b.model.device->ops->cast(b.model.device, &kept[l].expert, &r->expert));
    OK(b.model.device->ops->cast(b.model.device, &kept[l].selection, &r->selection));
  }
  wn_test_force(&a.run, true);
  wn_test_force(&b.run, true);
  wn_test_forward(&a.model, &a.run, &a.text, &a.pass, false);
  wn_test_forward(&b.model, &b.run, &b.text, &b.pass, false);
  wn_test_force(&a.run, false);
  wn_test_backward(&a.model, &a.run, &a.text, &a.pass); /* of a pass that selects by the indexer */
  wn_test_backward(&b.model, &b.run, &b.text, &b.pass);
  expect_same_grads(&a, &b);
  for (int32_t l = 0; l < 3; l++) {
    expect_same("selection after the backward", &a.run.replay[l].selection, &kept[l].selection);
    expect_same("experts after the backward", &a.run.replay[l].expert, &kept[l].expert);
  }
  tear_down(&a);
  tear_down(&b);
}

/* The indexer learns from a sparse pass in its backward only, once, even where the forward is given the gradients. */
static void sparse_forward_does_not_learn(void **state) {
  (void)state;
  scene s = set_up(WN_SELECT_INDEXER, WN_FORM_ABSORBED, 5);
  s.pass.indexer_grads = s.pass.indexer_kl = true;
  wn_test_forward(&s.model, &s.run, &s.text, &s.pass, true);
  for (int32_t i = 0; i < s.model.model->table.n; i++)
    if (s.model.grads[i].data && wn_test_largest(&s.model.grads[i]) != 0)
      fail_msg("%s has a gradient after a forward", s.model.model->table.params[i].hf_name);
  tear_down(&s);
}

static void dense_pass(scene *s, wn_tensor hidden[4]) {
  wn_test_forward(&s->model, &s->run, &s->text, &s->pass, s->pass.indexer_grads);
  for (int32_t l = 0; l <= 3; l++) {
    hidden[l] = wn_test_role(s->model.device, WN_ACT, 2, s->run.h[l].dim[0], s->run.h[l].dim[1], 0);
    OK(s->model.device->ops->cast(s->model.device, &hidden[l], &s->run.h[l]));
  }
}

/* Stage 1: whatever the indexer holds, and whether it learns, the hidden states are the dense model's, bit for bit. */
static void stage_1_hidden_states(void **state) {
  (void)state;
  scene s = set_up(WN_SELECT_DENSE, WN_FORM_AUTO, 1);
  wn_tensor plain[4], learning[4], other[4];
  dense_pass(&s, plain);
  s.pass.indexer_grads = s.pass.indexer_kl = true;
  for (int32_t l = 0; l < 3; l++) {
    s.run.measures[l].topk = wn_test_role(s.model.device, WN_INDEX, 2, 32, 1, 0);
    s.run.measures[l].index_scores = wn_test_role(s.model.device, WN_STAT, 2, 32, 32, 0);
  }
  dense_pass(&s, learning);
  for (int32_t i = 0; i < s.model.model->table.n; i++)
    if (s.model.model->table.params[i].kind == WN_INDEXER) wn_test_fill(&s.model.weights[i], 900 + (uint64_t)i, 2, 1);
  dense_pass(&s, other);
  for (int32_t l = 0; l <= 3; l++) {
    expect_same("learning", &learning[l], &plain[l]);
    expect_same("another indexer", &other[l], &plain[l]);
  }
  tear_down(&s);
}

/* Documents packed into one pass give what each gives alone at its own positions. */
static void packed_as_apart(void **state) {
  (void)state;
  static const struct {
    wn_selection selection;
    wn_attention_form form;
  } kinds[] = {
      {WN_SELECT_DENSE, WN_FORM_AUTO}, {WN_SELECT_INDEXER, WN_FORM_ABSORBED}, {WN_SELECT_INDEXER, WN_FORM_MASKED}};
  for (int kind = 0; kind < 3; kind++) {
    scene s = set_up(kinds[kind].selection, kinds[kind].form, 5);
    s.pass.indexer_kl = true;
    wn_test_forward(&s.model, &s.run, &s.text, &s.pass, false);
    for (int32_t i = 0, start = 0; i < 3; start += documents[i++]) {
      int32_t n = documents[i];
      wn_test_text alone = wn_test_text_create(s.model.device, 23, 3, n, &n, 1);
      wn_test_run run = wn_test_run_create(&s.model, n, 5);
      alone.tokens = wn_tensor_slice(s.text.tokens, 0, start, n);
      alone.target = wn_tensor_slice(s.text.target, 0, start, n);
      alone.rows.position = s.text.rows.position + start;
      wn_pass pass = s.pass;
      pass.rows_per_sequence = n;
      wn_test_forward(&s.model, &run, &alone, &pass, false);
      for (int32_t l = 0; l < 3; l++) {
        wn_tensor h = wn_tensor_slice(s.run.h[l + 1], 0, start, n),
                  kl = wn_tensor_slice(s.run.measures[l].kl, 0, start, n);
        wn_test_close("hidden states", &run.h[l + 1], &h, 1e-12, 1e-11);
        wn_test_close("kl", &run.measures[l].kl, &kl, 1e-12, 1e-10);
        for (int64_t e = 0; kinds[kind].selection != WN_SELECT_DENSE && e < (int64_t)n * 5; e++) {
          double pick = wn_test_get(&run.replay[l].selection, e);
          double packed = wn_test_get(&s.run.replay[l].selection, (int64_t)start * 5 + e);
          if (packed != (pick < 0 ? -1 : pick + start)) fail_msg("document %d, pick %lld", i, (long long)e);
        }
      }
    }
    tear_down(&s);
  }
}

/* Absorbed and masked are the same algebra; 300 rows cross the absorbed form's chunks. */
static void forms_agree(void **state) {
  (void)state;
  static const int32_t lengths[] = {270, 30};
  scene a = set_up_of(wn_test_cpu_f64(), 300, lengths, 2, WN_SELECT_INDEXER, WN_FORM_ABSORBED, 17);
  scene b = set_up_of(wn_test_cpu_f64(), 300, lengths, 2, WN_SELECT_INDEXER, WN_FORM_MASKED, 17);
  a.pass.indexer_grads = b.pass.indexer_grads = true;
  wn_test_forward(&a.model, &a.run, &a.text, &a.pass, false);
  wn_test_forward(&b.model, &b.run, &b.text, &b.pass, false);
  wn_test_backward(&a.model, &a.run, &a.text, &a.pass);
  wn_test_backward(&b.model, &b.run, &b.text, &b.pass);
  for (int32_t l = 0; l < 3; l++) {
    expect_same("selections", &a.run.replay[l].selection, &b.run.replay[l].selection);
    wn_test_close("hidden states", &a.run.h[l + 1], &b.run.h[l + 1], 1e-11, 1e-10);
    wn_test_close("kl", &a.run.measures[l].kl, &b.run.measures[l].kl, 1e-12, 1e-10);
  }
  for (int32_t i = 0; i < a.model.model->table.n; i++) {
    if (!a.model.grads[i].data) continue;
    double error = wn_test_relative_norm(&a.model.grads[i], &b.model.grads[i]);
    if (!(error < 1e-10)) fail_msg("%s: %g", a.model.model->table.params[i].hf_name, error);
  }
  /* kl of a forward (p from one more pass) is the backward's */
  wn_test_run again = wn_test_run_create(&a.model, 300, 17);
  a.pass.indexer_kl = true;
  wn_test_forward(&a.model, &again, &a.text, &a.pass, false);
  for (int32_t l = 0; l < 3; l++) expect_same("kl", &again.measures[l].kl, &a.run.measures[l].kl);
  tear_down(&a);
  tear_down(&b);
}

/* With room for every visible key, each selection is the dense attention. With less, only visible keys, ascending, as
 * many as there are, and the patterns what they say. */
static void every_selection(void **state) {
  (void)state;
  scene dense = set_up(WN_SELECT_DENSE, WN_FORM_AUTO, 1);
  wn_test_forward(&dense.model, &dense.run, &dense.text, &dense.pass, false);
  for (int32_t selection = WN_SELECT_INDEXER; selection < WN_N_SELECTIONS; selection++) {
    for (int32_t form = WN_FORM_ABSORBED; form <= WN_FORM_MASKED; form++) {
      scene all = set_up((wn_selection)selection, (wn_attention_form)form, 20);
      wn_test_forward(&all.model, &all.run, &all.text, &all.pass, false);
      for (int32_t l = 0; l < 3; l++)
        wn_test_close(wn_selection_name((wn_selection)selection), &all.run.h[l + 1], &dense.run.h[l + 1], 1e-11, 1e-10);
      tear_down(&all);
      scene some = set_up((wn_selection)selection, (wn_attention_form)form, 6);
      wn_test_forward(&some.model, &some.run, &some.text, &some.pass, false);
      const wn_rows *rows = &some.text.rows;
      for (int32_t row = 0; row < 32; row++) {
        int32_t visible = rows->last_key[row] - rows->first_key[row] + 1, previous = rows->first_key[row] - 1;
        for (int32_t i = 0; i < 6; i++) {
          int32_t pick = (int32_t)wn_test_get(&some.run.replay[2].selection, row * 6 + i);
          if (i >= visible) assert_int_equal(pick, -1);
          if (i >= visible) continue;
          assert_true(pick > previous && pick <= rows->last_key[row]);
          if (selection == WN_SELECT_RECENT && visible > 6) assert_int_equal(pick, rows->last_key[row] - 5 + i);
          previous = pick;
        }
      }
      tear_down(&some);
    }
  }
  tear_down(&dense);
}

/* What each measure is by its definition, from the hidden states and selections of the same pass. */
static void measures(void **state) {
  (void)state;
  enum { SAMPLES = 3, TOPK = 5 };
  static const int32_t sampled[SAMPLES] = {12, 13, 31};
  scene s = set_up(WN_SELECT_INDEXER, WN_FORM_ABSORBED, TOPK);
  wn_device *d = s.model.device;
  for (int32_t l = 0; l < 3; l++) {
    wn_layer_measures *m = &s.run.measures[l];
    m->attention = wn_test_role(d, WN_ACT, 2, 32, 20, 0);
    m->index_scores = wn_test_role(d, WN_STAT, 2, 32, 32, 0);
    m->topk = wn_test_role(d, WN_INDEX, 2, 32, TOPK, 0);
    m->sample = wn_test_role(d, WN_INDEX, 1, SAMPLES, 0, 0);
    for (int32_t i = 0; i < SAMPLES; i++) wn_test_set(&m->sample, i, sampled[i]);
    m->stats = wn_test_role(d, WN_STAT, 2, SAMPLES, WN_N_STATS, 0);
    m->picks = wn_test_role(d, WN_INDEX, 2, SAMPLES, TOPK, 0);
    if (l > 0) m->picks_prev = s.run.measures[l - 1].picks;
  }
  wn_test_forward(&s.model, &s.run, &s.text, &s.pass, false);
  for (int32_t l = 0; l < 3; l++) {
    wn_layer_measures *m = &s.run.measures[l];
    wn_tensor sum = wn_test_role(d, WN_ACT, 2, 32, 20, 0);
    OK(d->ops->add(d, &sum, &m->attention, &s.run.h[l]));
    expect_same("attention + h_in", &sum, &s.run.h_mid[l]);
    expect_same("topk", &m->topk, &s.run.replay[l].selection);
    double load = 0;
    for (int32_t e = 0; e < 8; e++) load += wn_test_get(&m->load, e);
    assert_int_equal((int64_t)load, l == 0 ? 0 : 32 * 3);
    for (int32_t i = 0; i < SAMPLES; i++) {
      for (int32_t j = 0; j < TOPK; j++)
        assert_int_equal((int64_t)wn_test_get(&m->picks, i * TOPK + j),
                         (int64_t)wn_test_get(&m->topk, sampled[i] * TOPK + j));
      bool counted = sampled[i] != 13; /* the document of one row */
      assert_int_equal((int64_t)wn_test_get(&m->stats, i * WN_N_STATS + WN_STAT_COUNTED), counted);
      double iou = wn_test_get(&m->stats, i * WN_N_STATS + WN_STAT_IOU_PREV);
      if (counted) assert_true(l == 0 ? isnan(iou) : iou >= 0 && iou <= 1);
    }
    for (int32_t row = 0; row < 32; row++)
      for (int32_t key = 0; key < 32; key++) {
        bool visible = key >= s.text.rows.first_key[row] && key <= s.text.rows.last_key[row];
        assert_int_equal(isfinite(wn_test_get(&m->index_scores, row * 32 + key)) != 0, visible);
      }
  }
  tear_down(&s);
}

/* h_mid is an output that may be left out; a V3 model has no indexer and needs none. */
static void without_h_mid_or_indexer(void **state) {
  (void)state;
  scene s = set_up(WN_SELECT_DENSE, WN_FORM_AUTO, 5);
  wn_test_forward(&s.model, &s.run, &s.text, &s.pass, false);
  wn_model_config config = wn_test_config();
  config.has_indexer = false;
  wn_test_model v3 = wn_test_model_create(s.model.device, &config);
  for (int32_t i = 0; i < v3.model->table.n; i++) {
    const wn_param *p = &v3.model->table.params[i];
    for (int32_t j = 0; j < s.model.model->table.n; j++)
      if (strcmp(p->hf_name, s.model.model->table.params[j].hf_name) == 0) v3.weights[i] = s.model.weights[j];
  }
  wn_test_model_bind(&v3);
  wn_tensor h = wn_test_role(s.model.device, WN_ACT, 2, 32, 20, 0);
  for (int32_t l = 0; l < 3; l++) {
    OK(wn_layer_forward(v3.model, l, &v3.weight_of[l + 1], NULL, &s.pass, &s.text.rows, &h, NULL, &s.run.h[l], NULL,
                        NULL));
    expect_same("hidden states", &h, &s.run.h[l + 1]);
  }
  wn_test_model_free(&v3);
  tear_down(&s);
}

static size_t scratch_peak(int32_t n, wn_selection selection, wn_attention_form form, bool learn) {
  scene s = set_up_of(wn_test_cpu_f64(), n, &n, 1, selection, form, 8);
  s.pass.indexer_grads = learn;
  wn_test_forward(&s.model, &s.run, &s.text, &s.pass, learn);
  wn_test_backward(&s.model, &s.run, &s.text, &s.pass);
  assert_int_equal(wn_arena_used_bytes(s.model.device->scratch), 0);
  size_t peak = wn_arena_peak_bytes(s.model.device->scratch);
  tear_down(&s);
  return peak;
}

/* Twice the rows, at most twice the scratch: nothing is n by n. */
static void scratch_is_linear(void **state) {
  (void)state;
  static const struct {
    wn_selection selection;
    wn_attention_form form;
  } kinds[] = {
      {WN_SELECT_DENSE, WN_FORM_AUTO}, {WN_SELECT_INDEXER, WN_FORM_ABSORBED}, {WN_SELECT_INDEXER, WN_FORM_MASKED}};
  for (int kind = 0; kind < 3; kind++) {
    size_t one = scratch_peak(300, kinds[kind].selection, kinds[kind].form, true);
    size_t two = scratch_peak(600, kinds[kind].selection, kinds[kind].form, true);
    if (two > one * 2) fail_msg("kind %d: %zu bytes for 300 rows, %zu for 600", kind, one, two);
  }
}

/* Wherever scratch runs out, the error names the arena and scratch is empty again. */
static void scratch_runs_out(void **state) {
  (void)state;
  int failures = 0;
  size_t bytes = 4096;
  for (bool fits = false; !fits; bytes += bytes / 2) {
    wn_device *d = NULL;
    OK(wn_cpu_create_f64(&d, (wn_cpu_settings){.threads = 1, .scratch_bytes = bytes}));
    scene s = set_up_of(d, 32, documents, 3, WN_SELECT_INDEXER, WN_FORM_ABSORBED, 5);
    s.pass.indexer_grads = true;
    wn_status status = wn_layer_forward(s.model.model, 1, &s.model.weight_of[2], NULL, &s.pass, &s.text.rows,
                                        &s.run.h[1], &s.run.h_mid[1], &s.run.h[0], &s.run.replay[1], NULL);
    if (!status)
      status = wn_layer_backward(s.model.model, 1, &s.model.weight_of[2], &s.model.grad_of[2], &s.pass, &s.text.rows,
                                 &s.run.dh, &s.run.h[0], &s.run.h_mid[1], &s.run.replay[1], NULL);
    fits = !status;
    if (status) {
      failures++;
      REFUSED(status, WN_E_MEMORY, "scratch");
    }
    assert_int_equal(wn_arena_used_bytes(d->scratch), 0);
    tear_down(&s);
  }
  assert_true(failures > 5);
}

/* The sizes of V3.2 and 2048 picks: absorbed from 13926 keys on; never for as many picks as keys. */
static void form_by_size(void **state) {
  (void)state;
  wn_model_config c = {.num_attention_heads = 128,
                       .kv_lora_rank = 512,
                       .qk_nope_head_dim = 128,
                       .qk_rope_head_dim = 64,
                       .v_head_dim = 128};
  assert_int_equal(wn_model_attention_form(&c, 1, 13925, 2048), WN_FORM_MASKED);
  assert_int_equal(wn_model_attention_form(&c, 1, 13926, 2048), WN_FORM_ABSORBED);
  assert_int_equal(wn_model_attention_form(&c, 1, 131072, 2048), WN_FORM_ABSORBED);
  assert_int_equal(wn_model_attention_form(&c, 1, 2048, 2048), WN_FORM_MASKED);
  assert_int_equal(wn_model_attention_form(&c, 1, 100, 1 << 20), WN_FORM_MASKED);
  /* a device whose tile of heads is wider than the model: the absorbed form pays for the whole tile */
  assert_int_equal(wn_model_attention_form(&c, 128, 13926, 2048), WN_FORM_ABSORBED);
  assert_int_equal(wn_model_attention_form(&c, 256, 13926, 2048), WN_FORM_MASKED);
  assert_int_equal(wn_model_attention_form(&c, 256, 27852, 2048), WN_FORM_ABSORBED);
}

static wn_tensor last_hidden(scene *s, int32_t sequence, wn_attention_form form) {
  s->pass.form = form;
  s->pass.rows_per_sequence = sequence;
  wn_test_forward(&s->model, &s->run, &s->text, &s->pass, false);
  wn_tensor h = wn_test_role(s->model.device, WN_ACT, 2, s->run.h[3].dim[0], s->run.h[3].dim[1], 0);
  OK(s->model.device->ops->cast(s->model.device, &h, &s->run.h[3]));
  return h;
}

/* The form follows the length of a sequence, not how many of them share a pass: a micro-batch's size changes no bit. */
static void form_ignores_the_micro_batch(void **state) {
  (void)state;
  static const int32_t lengths[] = {16, 16};
  scene s = set_up_of(wn_test_cpu_f64(), 16, lengths, 2, WN_SELECT_INDEXER, WN_FORM_AUTO, 8);
  assert_int_equal(wn_model_attention_form(&s.model.model->config, 1, 16, 8), WN_FORM_MASKED);
  assert_int_equal(wn_model_attention_form(&s.model.model->config, 1, 32, 8), WN_FORM_ABSORBED);
  wn_tensor masked = last_hidden(&s, 16, WN_FORM_MASKED), absorbed = last_hidden(&s, 16, WN_FORM_ABSORBED);
  assert_false(wn_test_same_bits(&masked, &absorbed));
  wn_tensor two_of_16 = last_hidden(&s, 16, WN_FORM_AUTO), one_of_32 = last_hidden(&s, 32, WN_FORM_AUTO);
  expect_same("two sequences of 16", &two_of_16, &masked);
  expect_same("one sequence of 32", &one_of_32, &absorbed);
  tear_down(&s);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(experts_take_rows_in_turn),
      cmocka_unit_test(replay_and_recompute),
      cmocka_unit_test(forced_choices_are_taken),
      cmocka_unit_test(backward_keeps_the_choices),
      cmocka_unit_test(sparse_forward_does_not_learn),
      cmocka_unit_test(stage_1_hidden_states),
      cmocka_unit_test(packed_as_apart),
      cmocka_unit_test(forms_agree),
      cmocka_unit_test(every_selection),
      cmocka_unit_test(measures),
      cmocka_unit_test(without_h_mid_or_indexer),
      cmocka_unit_test(scratch_is_linear),
      cmocka_unit_test(scratch_runs_out),
      cmocka_unit_test(form_by_size),
      cmocka_unit_test(form_ignores_the_micro_batch),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
