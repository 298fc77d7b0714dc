/* The whole model's hand-written backward against finite differences in FP64, tensor by tensor: base parameters against
 * the token loss with the balance loss, indexer parameters against the KL. One dense MLP layer and two MoE layers,
 * groups, shared experts, several documents in two sequences. Choices (experts, selections, and with them the balance
 * loss's f) are forced by replay. And the zeros: what a loss must not reach stays exactly zero. */
#include "support/gradient.h"
#include "support/model.h"

static const int32_t documents[] = {7, 1, 8, 16}; /* two sequences of 16 */

typedef struct scene {
  const char *name;
  wn_selection selection;
  wn_attention_form form;
  double gain;
  bool yarn, norm_topk, latent_queries; /* without these there is no indexer */
  double base_step, index_step;         /* small for the indexer: a step must not carry a q.k across ReLU's kink */
} scene;

static const scene scenes[] = {
    {"dense, small weights", WN_SELECT_DENSE, WN_FORM_AUTO, 0.3, false, true, true, 1e-4, 1e-6},
    {"dense, large weights, YaRN", WN_SELECT_DENSE, WN_FORM_AUTO, 1.5, true, true, true, 2e-5, 2e-5},
    {"absorbed, small weights, YaRN", WN_SELECT_INDEXER, WN_FORM_ABSORBED, 0.3, true, true, true, 1e-4, 1e-6},
    {"absorbed, large weights", WN_SELECT_INDEXER, WN_FORM_ABSORBED, 1.5, false, false, true, 2e-5, 2e-5},
    {"masked, small weights", WN_SELECT_INDEXER, WN_FORM_MASKED, 0.3, false, true, true, 1e-4, 1e-6},
    {"masked, large weights, YaRN", WN_SELECT_INDEXER, WN_FORM_MASKED, 1.5, true, true, true, 2e-5, 2e-5},
    {"dense, queries from x itself", WN_SELECT_DENSE, WN_FORM_AUTO, 1.5, true, true, false, 2e-5, 0},
    {"absorbed, queries from x itself", WN_SELECT_RECENT, WN_FORM_ABSORBED, 0.3, false, true, false, 1e-4, 0},
};

typedef struct stage {
  wn_test_model model;
  wn_test_text text;
  wn_test_run run;
  wn_pass pass;
  bool kl; /* which loss */
} stage;

static stage set_up(const scene *s, uint64_t seed) {
  stage t = {0};
  wn_model_config config = wn_test_config();
  config.yarn = s->yarn;
  config.norm_topk_prob = s->norm_topk;
  if (!s->latent_queries) config.q_lora_rank = 0;
  config.has_indexer = s->latent_queries;
  wn_device *d = wn_test_cpu_f64();
  t.model = wn_test_model_create(d, &config);
  wn_test_model_fill(&t.model, seed, s->gain);
  t.text = wn_test_text_create(d, config.vocab_size, seed + 7, 16, documents, 4);
  t.pass = (wn_pass){.selection = s->selection,
                     .topk = config.index_topk,
                     .form = s->form,
                     .indexer_grads = config.has_indexer,
                     .kl_coeff = 0.7,
                     .rows_per_sequence = 16,
                     .balance_coeff = 0.05};
  t.run = wn_test_run_create(&t.model, t.text.rows.n_rows, config.index_topk);
  return t;
}

static void tear_down(stage *t) {
  wn_test_model_free(&t->model);
  wn_cpu_free_f64(t->model.device);
}

/* Gradients of both losses, as the trainer makes them: a dense pass learns the indexer in its forward. */
static void gradients(stage *t) {
  bool dense = t->pass.selection == WN_SELECT_DENSE;
  wn_pass backward = t->pass;
  if (dense) backward.indexer_grads = false;
  wn_test_model_zero_grads(&t->model);
  wn_test_forward(&t->model, &t->run, &t->text, &t->pass, dense);
  wn_test_backward(&t->model, &t->run, &t->text, &backward);
}

static double loss(void *context) {
  stage *t = context;
  wn_pass pass = t->pass;
  pass.indexer_grads = false;
  pass.indexer_kl = t->kl;
  wn_test_forward(&t->model, &t->run, &t->text, &pass, false);
  return t->kl ? wn_test_kl_loss(&t->model, &t->run, &pass) : wn_test_token_loss(&t->model, &t->run, &t->text, &pass);
}

static void check_every_tensor(void **state) {
  const scene *s = *state;
  stage t = set_up(s, 1);
  gradients(&t);
  wn_test_force(&t.run, true);
  int32_t tensors = 0;
  double worst[WN_N_KINDS] = {0};
  for (int32_t i = 0; i < t.model.model->table.n; i++) {
    const wn_param *p = &t.model.model->table.params[i];
    if (!t.model.grads[i].data) continue;
    t.kl = p->kind == WN_INDEXER;
    bool reached = p->expert < 0 || wn_test_get(&t.run.measures[p->layer].load, p->expert) > 0;
    if ((wn_test_largest(&t.model.grads[i]) > 0) != reached)
      fail_msg("%s: %s", p->hf_name, reached ? "no gradient" : "a gradient for an expert that no row chose");
    tensors++;
    double error = wn_test_gradient(
        p->hf_name, &t.model.weights[i], &t.model.grads[i], loss, &t,
        (wn_test_gradient_settings){
            .directions = 1, .step = t.kl ? s->index_step : s->base_step, .tolerance = 1e-6, .seed = (uint64_t)i});
    worst[p->kind] = fmax(worst[p->kind], error);
  }
  print_message("%s: worst error %.1e in %d tensors; base %.1e, indexer %.1e\n", s->name,
                fmax(worst[WN_BASE], worst[WN_INDEXER]), tensors, worst[WN_BASE], worst[WN_INDEXER]);
  tear_down(&t);
}

/* 10 times the KL: not a bit of the base's gradient moves. No token loss: the base's gradient is exactly zero. No KL:
 * the indexer's is. */
static void losses_do_not_mix(void **state) {
  const scene *s = *state;
  stage t = set_up(s, 2), u = set_up(s, 2);
  gradients(&t);
  u.pass.kl_coeff *= 10;
  gradients(&u);
  const wn_param_table *table = &t.model.model->table;
  for (int32_t i = 0; i < table->n; i++) {
    if (table->params[i].kind == WN_BASE && !wn_test_same_bits(&t.model.grads[i], &u.model.grads[i]))
      fail_msg("%s changes with the KL's coefficient", table->params[i].hf_name);
    if (table->params[i].kind == WN_INDEXER && wn_test_same_bits(&t.model.grads[i], &u.model.grads[i]))
      fail_msg("%s does not change with the KL's coefficient", table->params[i].hf_name);
  }
  u.pass.kl_coeff = 0;
  gradients(&u);
  for (int32_t i = 0; i < table->n; i++)
    if (table->params[i].kind == WN_INDEXER && wn_test_largest(&u.model.grads[i]) != 0)
      fail_msg("the token loss reaches %s", table->params[i].hf_name);
  u.pass.kl_coeff = 0.7;
  u.pass.balance_coeff = 0;
  OK(u.model.device->ops->zero(u.model.device, &u.text.weight));
  gradients(&u);
  for (int32_t i = 0; i < table->n; i++) {
    if (table->params[i].kind == WN_BASE && wn_test_largest(&u.model.grads[i]) != 0)
      fail_msg("the KL reaches %s", table->params[i].hf_name);
    if (table->params[i].kind == WN_INDEXER && !wn_test_same_bits(&t.model.grads[i], &u.model.grads[i]))
      fail_msg("the token loss changes %s", table->params[i].hf_name);
  }
  tear_down(&t);
  tear_down(&u);
}

/* Gradients are sums: the same micro-batch twice, without zeroing in between, doubles every one. */
static void gradients_accumulate(void **state) {
  const scene *s = *state;
  stage t = set_up(s, 3), u = set_up(s, 3);
  gradients(&t);
  gradients(&u);
  bool dense = s->selection == WN_SELECT_DENSE;
  wn_pass backward = u.pass;
  if (dense) backward.indexer_grads = false;
  wn_test_forward(&u.model, &u.run, &u.text, &u.pass, dense);
  wn_test_backward(&u.model, &u.run, &u.text, &backward);
  for (int32_t i = 0; i < t.model.model->table.n; i++) {
    if (!t.model.grads[i].data) continue;
    OK(t.model.device->ops->scale(t.model.device, &t.model.grads[i], &t.model.grads[i], 2));
    double error = wn_test_relative_norm(&u.model.grads[i], &t.model.grads[i]);
    if (!(error < 1e-13)) fail_msg("%s: off by %g", t.model.model->table.params[i].hf_name, error);
  }
  tear_down(&t);
  tear_down(&u);
}

/* The two places that can learn the indexer in a dense pass give the same bits. */
static void dense_backward_learns_as_the_forward(void **state) {
  (void)state;
  stage t = set_up(&scenes[1], 4), u = set_up(&scenes[1], 4);
  gradients(&t);
  wn_test_forward(&u.model, &u.run, &u.text, &u.pass, false);
  wn_test_backward(&u.model, &u.run, &u.text, &u.pass);
  for (int32_t i = 0; i < t.model.model->table.n; i++)
    if (t.model.grads[i].data && !wn_test_same_bits(&t.model.grads[i], &u.model.grads[i]))
      fail_msg("%s differs", t.model.model->table.params[i].hf_name);
  tear_down(&t);
  tear_down(&u);
}

#define SCENE(function, i)                                                                                             \
  { #function " " #i, function, NULL, NULL, (void *)(uintptr_t)&scenes[i] }

int main(void) {
  const struct CMUnitTest tests[] = {
      SCENE(check_every_tensor, 0),
      SCENE(check_every_tensor, 1),
      SCENE(check_every_tensor, 2),
      SCENE(check_every_tensor, 3),
      SCENE(check_every_tensor, 4),
      SCENE(check_every_tensor, 5),
      SCENE(check_every_tensor, 6),
      SCENE(check_every_tensor, 7),
      SCENE(losses_do_not_mix, 1),
      SCENE(losses_do_not_mix, 3),
      SCENE(losses_do_not_mix, 5),
      SCENE(gradients_accumulate, 1),
      SCENE(gradients_accumulate, 3),
      SCENE(gradients_accumulate, 5),
      cmocka_unit_test(dense_backward_learns_as_the_forward),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
