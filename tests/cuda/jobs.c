/* Whole jobs on a GPU: every stage, evaluation and dumps, against the CPU's; repeated and resumed byte for byte. */
#include "io/safetensors.h"
#include "model/model.h"
#include "support/gpu.h"
#include "support/tiny.h"

/* A trained model, so that what BF16 leaves equal can be asked for: the random one of the other tests amplifies a
 * rounding to a percent. Its vocabulary holds theirs. */
static const char trained[] = "checkpoints/demo-base";

/* init: a model of the test's directory, or the trained one. */
static void run_job(void **state, const char *stage, const char *device, const char *init, const char *run,
                    int64_t steps, const char *options) {
  const char *dir = *state;
  bool own = init != trained;
  wn_winnow_ends(0, 1, "%s %s/job.yaml device=%s init=%s%s%s run_dir=%s/%s training.steps=%lld %s", stage, dir, device,
                 own ? dir : "", own ? "/" : "", init, dir, run, (long long)steps, options);
}

/* Same data, same weights, same arithmetic but for BF16: the first `rows` steps agree to its rounding (0: all). */
static void expect_near(void **state, const char *run, const char *other, const char *column, int64_t rows,
                        double bar) {
  double worst = 0;
  if (rows == 0) tiny_cell(state, run, "train", 0, column, &rows);
  for (int64_t row = 0; row < rows; row++) {
    double a = tiny_cell(state, run, "train", row, column, NULL),
           b = tiny_cell(state, other, "train", row, column, NULL), error = fabs(a - b) / fabs(b);
    if (!(error <= bar))
      fail_msg("step %lld: %s is %.6g on the GPU, %.6g on the CPU", (long long)row + 1, column, a, b);
    worst = fmax(worst, error);
  }
  print_message("  %-18s %-8s differs from the CPU's by %.2g at most in %lld steps\n", column, run, worst,
                (long long)rows);
}

static void stages_agree_with_the_cpu(void **state) {
  wn_needs_gpus(1);
  const char *dir = *state;
  char steady[WN_PATH_BYTES + 128], calm[WN_PATH_BYTES + 256], wide[WN_PATH_BYTES + 256];
  /* On text, which the model knows: on the other tests' random tokens its gradients are so large and so curved that
   * roundings show as percents of the loss. With so large an eps an update is in proportion to its gradient: Adam's own
   * first steps have the size of lr whatever the gradient, and so turn the rounding of one near zero into a step the
   * other way. Adapting picks half of 64 keys, not 6 of 32: a pick that a rounding turns over then weighs little in a
   * loss.
   */
  wn_winnow_ends(0, 1, "data pack --out %s/text --tokenizer %s/tokenizer.json docs/guide.md docs/formats.md", dir,
                 trained);
  snprintf(steady, sizeof steady, "data.train=%s/text optimizer.eps=1 optimizer.lr=0.1", dir);
  snprintf(calm, sizeof calm, "%s optimizer.indexer_lr=0.1 dsa.index_head_dim=32 dsa.index_topk=%d", steady, TINY_TOPK);
  snprintf(wide, sizeof wide, "%s optimizer.indexer_lr=0.1 dsa.index_head_dim=32 dsa.index_topk=32 data.seq_len=64",
           steady);
  for (int gpu = 0; gpu < 2; gpu++) {
    const char *device = gpu ? "cuda" : "cpu";
    run_job(state, "pretrain", device, trained, gpu ? "pre-gpu" : "pre-cpu", 6, steady);
    run_job(state, "warmup", device, trained, gpu ? "warm-gpu" : "warm-cpu", 6, calm);
    if (!gpu) run_job(state, "warmup", device, trained, "warm-wide", 6, wide);
    run_job(state, "adapt", device, "warm-wide/checkpoints/step-000006", gpu ? "adapt-gpu" : "adapt-cpu", 6, wide);
  }
  expect_near(state, "pre-gpu", "pre-cpu", "lm_loss", 0, 1e-2);
  expect_near(state, "pre-gpu", "pre-cpu", "grad_norm", 1, 2e-2);
  expect_near(state, "warm-gpu", "warm-cpu", "indexer_kl", 0, 2e-2);
  expect_near(state, "warm-gpu", "warm-cpu", "indexer_grad_norm", 1, 2e-2);
  expect_near(state, "adapt-gpu", "adapt-cpu", "lm_loss", 0, 1e-2);
  expect_near(state, "adapt-gpu", "adapt-cpu", "grad_norm", 1, 5e-2);
  expect_near(state, "adapt-gpu", "adapt-cpu", "indexer_kl", 0, 5e-2);
}

static void expect_same_run(void **state, const char *run, const char *other, int64_t steps) {
  tiny_expect_same_tree(tiny_step(state, run, steps).text, tiny_step(state, other, steps).text);
  tiny_expect_same_tables(state, run, other);
}

static void expect_repeats_and_resumes(void **state, const char *stage, const char *init, const char *options) {
  char run[3][32];
  static const char letters[] = "abc";
  for (int i = 0; i < 3; i++) snprintf(run[i], sizeof run[i], "%s-%c", stage, letters[i]);
  run_job(state, stage, "cuda", init, run[0], 9, options);
  run_job(state, stage, "cuda", init, run[1], 9, options);
  expect_same_run(state, run[0], run[1], 9);
  run_job(state, stage, "cuda", init, run[2], 4, options);
  run_job(state, stage, "cuda", init, run[2], 9, options);
  tiny_expect_same_tree(tiny_step(state, run[0], 9).text, tiny_step(state, run[2], 9).text);
}

static void pretrain_repeats_and_resumes(void **state) {
  wn_needs_gpus(1);
  expect_repeats_and_resumes(state, "pretrain", "base", "");
}

static void warmup_repeats_and_resumes(void **state) {
  wn_needs_gpus(1);
  expect_repeats_and_resumes(state, "warmup", "base", "");
}

static void adapt_repeats_and_resumes(void **state) {
  wn_needs_gpus(1);
  expect_repeats_and_resumes(state, "adapt", "warmup-a/checkpoints/step-000009", "");
}

/* The same in the absorbed form, which sequences of this length take. */
static void absorbed_adapt_repeats_and_resumes(void **state) {
  wn_needs_gpus(1);
  static const char longer[] = "data.seq_len=448 training.micro_batch_seqs=1 training.seed=9";
  wn_model_config config = tiny_config();
  assert_int_equal(wn_model_attention_form(&config, 64, 448, TINY_TOPK), WN_FORM_ABSORBED);
  const char *dir = *state;
  wn_program p;
  for (int run = 0; run < 2; run++) {
    wn_winnow(
        &p, 1,
        "adapt %s/job.yaml device=cuda init=%s/warmup-a/checkpoints/step-000009 run_dir=%s/long-%d training.steps=6 %s",
        dir, dir, dir, run, longer);
    if (p.code != 0 || !strstr(p.err, "absorbed")) fail_msg("it ended with %d and said: %s", p.code, p.err);
  }
  expect_same_run(state, "long-0", "long-1", 6);
}

static void expect_keeps_the_bits(void **state, const char *stage, const char *init, const char *options) {
  static const char *const keep[] = {"inputs", "attention", "all"};
  char run[3][32], with[160];
  for (int kept = 0; kept < 3; kept++) {
    snprintf(run[kept], sizeof run[kept], "kept-%s-%d", stage, kept);
    snprintf(with, sizeof with, "%s training.keep=%s", options, keep[kept]);
    run_job(state, stage, "cuda", init, run[kept], 6, with);
    if (kept > 0) expect_same_run(state, run[0], run[kept], 6);
  }
}

/* A backward that takes attention's output, or all, from the forward makes the bits of one that computes it again. */
static void what_is_kept_changes_nothing(void **state) {
  wn_needs_gpus(1);
  expect_keeps_the_bits(state, "pretrain", "base", "data.seq_len=200");
  expect_keeps_the_bits(state, "adapt", "warmup-a/checkpoints/step-000009", "data.seq_len=200");
}

/* The same with BF16 checkpoints, whose masters stand beside. */
static void bf16_checkpoints_resume(void **state) {
  wn_needs_gpus(1);
  run_job(state, "pretrain", "cuda", "base", "half-a", 8, "checkpoint.dtype=bf16");
  run_job(state, "pretrain", "cuda", "base", "half-b", 3, "checkpoint.dtype=bf16");
  run_job(state, "pretrain", "cuda", "base", "half-b", 8, "checkpoint.dtype=bf16");
  tiny_expect_same_tree(tiny_step(state, "half-a", 8).text, tiny_step(state, "half-b", 8).text);
}

static void every_selection_evaluates(void **state) {
  wn_needs_gpus(1);
  static const char *const selections[] = {"dense", "indexer", "best", "recent", "sink", "random"};
  const char *dir = *state;
  for (int gpu = 0; gpu < 2; gpu++)
    for (size_t i = 0; i < sizeof selections / sizeof *selections; i++)
      wn_winnow_ends(0, 1,
                     "eval %s/warm-cpu/checkpoints/step-000006 --data %s/valid --seq-len 32 --selection %s "
                     "--device %s --csv %s/eval-%s.csv",
                     dir, dir, selections[i], gpu ? "cuda" : "cpu", dir, gpu ? "cuda" : "cpu");
  char path[WN_PATH_BYTES];
  for (int gpu = 0; gpu < 2; gpu++) { /* where tiny_cell looks */
    char to[WN_PATH_BYTES];
    OK(wn_path(path, "%s/evals-%s/metrics", dir, gpu ? "cuda" : "cpu"));
    OK(wn_make_dirs(path));
    OK(wn_path(path, "%s/eval-%s.csv", dir, gpu ? "cuda" : "cpu"));
    OK(wn_path(to, "%s/evals-%s/metrics/eval.csv", dir, gpu ? "cuda" : "cpu"));
    OK(wn_copy_file(path, to));
  }
  for (int64_t row = 0; row < (int64_t)(sizeof selections / sizeof *selections); row++) {
    double a = tiny_cell(state, "evals-cuda", "eval", row, "loss", NULL),
           b = tiny_cell(state, "evals-cpu", "eval", row, "loss", NULL);
    print_message("  %-8s loss %.5f on the GPU, %.5f on the CPU\n", selections[row], a, b);
    assert_true(fabs(a - b) <= 1e-2 * b);
  }
}

/* ---- dumps ---- */

/* Documents of seven, one after another, of which the last row alone has to leave a key out of its six picks. */
enum { DUMP_DOCUMENT = TINY_TOPK + 1, DUMP_TOKENS = 6 * DUMP_DOCUMENT, DUMPS = 12, DUMPS_THAT_AGREE = 2 };

static double cosine(const wn_st_entry *a, const wn_st_entry *b) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a->bytes / sizeof(float); i++) {
    double x = (double)((const float *)a->data)[i], y = (double)((const float *)b->data)[i];
    if (!isfinite(y)) continue;
    ab += x * y;
    aa += x * x;
    bb += y * y;
  }
  return aa == 0 && bb == 0 ? 1 : aa == 0 || bb == 0 ? 0 : ab / sqrt(aa * bb);
}

/* What no rounding changes: names, types and shapes; which numbers are finite (scores of keys that a row does not see
 * are not); that a loss reaches either the indexer's gradients or the others. */
static void expect_same_tensors(const wn_safetensors *cpu, const wn_safetensors *gpu, const char *grads) {
  assert_int_equal(wn_safetensors_count(cpu), wn_safetensors_count(gpu));
  for (int64_t i = 0; i < wn_safetensors_count(cpu); i++) {
    const wn_st_entry *a = wn_safetensors_at(cpu, i), *b = wn_safetensors_find(gpu, a->name);
    if (!b || a->dtype != b->dtype || !wn_st_shaped(b, a->rank, a->dim)) fail_msg("%s is another tensor", a->name);
    if (a->dtype != WN_F32) continue;
    bool reached = strncmp(a->name, "grad.", 5) || !strstr(a->name, ".indexer.") == !strcmp(grads, "base");
    for (size_t e = 0; e < a->bytes / sizeof(float); e++) {
      float x = ((const float *)a->data)[e], y = ((const float *)b->data)[e];
      if (isfinite(x) ? !isfinite(y) : x != y) fail_msg("%s[%zu] is %g, and %g", a->name, e, (double)x, (double)y);
      if (!reached && (x != 0 || y != 0)) fail_msg("%s[%zu] is %g, and %g", a->name, e, (double)x, (double)y);
    }
  }
}

/* The picks of a row as a set. Ascending, of keys that the row sees, -1 at the end. */
static int32_t read_picks(bool picked[DUMP_TOKENS], const int32_t *picks, int64_t k, const float *scores) {
  int32_t n = 0;
  memset(picked, 0, DUMP_TOKENS * sizeof *picked);
  for (int64_t i = 0; i < k; i++) {
    if (picks[i] == -1) continue;
    assert_true(i == n && picks[i] >= 0 && picks[i] < DUMP_TOKENS && (i == 0 || picks[i] > picks[i - 1]));
    assert_true(isfinite(scores[picks[i]]));
    picked[picks[i]] = true;
    n++;
  }
  return n;
}

/* Whether a row of k picks has other ones on the GPU: as many as on the CPU, and each that differs as near to the row's
 * threshold as the two's scores x and y allow, which move it by their largest difference at most. */
static bool row_turned(const int32_t *cpu, const int32_t *gpu, int64_t k, const float *x, const float *y) {
  bool mine[DUMP_TOKENS], theirs[DUMP_TOKENS], turned = false;
  const int32_t n = read_picks(mine, cpu, k, x);
  assert_int_equal(n, read_picks(theirs, gpu, k, x));
  double error = 0, threshold = INFINITY;
  for (int32_t key = 0; key < DUMP_TOKENS; key++) {
    if (isfinite(x[key])) error = fmax(error, fabs((double)x[key] - (double)y[key]));
    if (mine[key]) threshold = fmin(threshold, (double)x[key]);
  }
  for (int32_t key = 0; key < DUMP_TOKENS; key++) {
    if (mine[key] == theirs[key]) continue;
    turned = true;
    if (!(fabs((double)x[key] - threshold) <= 2 * error))
      fail_msg("key %d is %.3g from the threshold, scores differ by %.3g", key, fabs((double)x[key] - threshold),
               error);
  }
  return turned;
}

/* How many rows of all layers have other picks. */
static int rows_turned(const wn_safetensors *cpu, const wn_safetensors *gpu) {
  int turned = 0;
  for (int layer = 0;; layer++) {
    char picks[64], scores[64];
    snprintf(picks, sizeof picks, "topk.%d", layer);
    snprintf(scores, sizeof scores, "index_scores.%d", layer);
    const wn_st_entry *a = wn_safetensors_find(cpu, picks), *b = wn_safetensors_find(gpu, picks);
    const wn_st_entry *x = wn_safetensors_find(cpu, scores), *y = wn_safetensors_find(gpu, scores);
    if (!a) return turned;
    for (int64_t t = 0, k = a->dim[1]; t < DUMP_TOKENS; t++)
      turned += row_turned((const int32_t *)a->data + t * k, (const int32_t *)b->data + t * k, k,
                           (const float *)x->data + t * DUMP_TOKENS, (const float *)y->data + t * DUMP_TOKENS);
  }
}

/* Two dumps of a pass over one of several sequences: the same tensors, and picks that each side's scores allow. Returns
 * whether all picks are the same and every tensor points the same way: after a pick, or an expert, that a rounding
 * turns what follows is something else. */
static bool dump_agrees(void **state, const char *model, int sequence, const char *attention, const char *grads) {
  const char *dir = *state, *worst = "";
  wn_safetensors *dump[2];
  char path[2][WN_PATH_BYTES], tokens[DUMP_TOKENS * 4] = "", documents[DUMP_TOKENS * 4] = "";
  double least = 1;
  bool agrees = true;
  for (int i = 0; i < DUMP_TOKENS; i++) {
    size_t at = strlen(tokens), of = strlen(documents);
    snprintf(tokens + at, sizeof tokens - at, "%s%d", i ? "," : "", (7 + 13 * sequence + i * (i + sequence)) % 97);
    if (i % DUMP_DOCUMENT == 0) snprintf(documents + of, sizeof documents - of, "%s%d", i ? "," : "", i);
  }
  for (int gpu = 0; gpu < 2; gpu++) {
    OK(wn_path(path[gpu], "%s/dump-%d.safetensors", dir, gpu));
    wn_winnow_ends(0, 1, "forward %s/%s --tokens %s --documents %s --dump %s --attention %s --device %s --grads %s",
                   dir, model, tokens, documents, path[gpu], attention, gpu ? "cuda" : "cpu", grads);
    OK(wn_safetensors_open(&dump[gpu], path[gpu]));
  }
  expect_same_tensors(dump[0], dump[1], grads);
  int turned = rows_turned(dump[0], dump[1]);
  for (int64_t i = 0; i < wn_safetensors_count(dump[0]); i++) {
    const wn_st_entry *cpu = wn_safetensors_at(dump[0], i);
    if (cpu->dtype != WN_F32) continue;
    double c = cosine(wn_safetensors_find(dump[1], cpu->name), cpu);
    bool exact = strcmp(cpu->name, "logits") == 0 || strncmp(cpu->name, "hidden.", 7) == 0;
    agrees = agrees && c > (exact ? 0.999 : 0.98);
    if (c < least) least = c, worst = cpu->name;
  }
  print_message("  %s, gradients of %s, sequence %d: %d rows have other picks, smallest cosine %.6f %s\n", attention,
                grads, sequence, turned, least, worst);
  wn_safetensors_close(dump[0]);
  wn_safetensors_close(dump[1]);
  return turned == 0 && agrees;
}

/* In some of the sequences nothing turns. */
static void expect_agreement(void **state, const char *model, const char *attention, const char *grads) {
  int agree = 0;
  for (int sequence = 0; sequence < DUMPS && agree < DUMPS_THAT_AGREE; sequence++)
    agree += dump_agrees(state, model, sequence, attention, grads);
  if (agree < DUMPS_THAT_AGREE) fail_msg("%s, gradients of %s agree in %d sequences", attention, grads, agree);
}

/* The narrow model leaves out keys, the wide one none. */
static void dumps_agree_with_the_cpu(void **state) {
  wn_needs_gpus(1);
  static const char narrow[] = "warm-cpu/checkpoints/step-000006", wide[] = "warm-wide/checkpoints/step-000006";
  static const char *const grads[] = {"base", "indexer"};
  for (int i = 0; i < 2; i++) {
    expect_agreement(state, narrow, "dense", grads[i]);
    expect_agreement(state, narrow, "sparse", grads[i]);
    expect_agreement(state, wide, "sparse", grads[i]);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(stages_agree_with_the_cpu),          cmocka_unit_test(pretrain_repeats_and_resumes),
      cmocka_unit_test(warmup_repeats_and_resumes),         cmocka_unit_test(adapt_repeats_and_resumes),
      cmocka_unit_test(absorbed_adapt_repeats_and_resumes), cmocka_unit_test(bf16_checkpoints_resume),
      cmocka_unit_test(what_is_kept_changes_nothing),       cmocka_unit_test(every_selection_evaluates),
      cmocka_unit_test(dumps_agree_with_the_cpu),
  };
  return cmocka_run_group_tests(tests, tiny_setup, wn_temp_teardown);
}
