#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/flags.h"
#include "io/csv.h"
#include "train/evaluate.h"
#include "train/inference.h"

typedef struct eval_flags {
  const char *data, *selections, *csv, *sequences, *device;
  int64_t topk, seq_len, seqs, sample_rows, seed, threads;
  bool no_document_mask;
} eval_flags;

static const char selections_hint[] = "selections are dense, indexer, best, recent, sink, random";

/* "dense,best" -> bits; every name is checked before anything runs. */
static wn_status parse_selections(const char *list, const wn_model_config *config, bool wanted[WN_N_SELECTIONS]) {
  memset(wanted, 0, WN_N_SELECTIONS * sizeof *wanted);
  if (!list) {
    for (int s = 0; s < WN_N_SELECTIONS; s++) wanted[s] = s != WN_SELECT_INDEXER || config->has_indexer;
    return NULL;
  }
  if (!*list) return WN_FAIL_HINT(WN_E_USAGE, selections_hint, "--selection names none");
  for (const char *at = list; *at;) {
    size_t length = strcspn(at, ",");
    int found = -1;
    for (int s = 0; s < WN_N_SELECTIONS; s++) {
      const char *name = wn_selection_name((wn_selection)s);
      if (strlen(name) == length && strncmp(name, at, length) == 0) found = s;
    }
    if (found < 0) return WN_FAIL_HINT(WN_E_USAGE, selections_hint, "unknown selection '%.*s'", (int)length, at);
    wanted[found] = true;
    at += length + (at[length] == ',');
  }
  if (wanted[WN_SELECT_INDEXER] && !config->has_indexer)
    return WN_FAIL_HINT(WN_E_CONFIG, "run `winnow warmup` on it first", "the model has no indexer to select with");
  return NULL;
}

static const char *const result_columns[] = {"step",        "split",     "selection", "tokens",     "loss",
                                             "loss_scored", "mass_at_k", "mass_best", "recall_at_k"};
static const char *const sequence_columns[] = {"selection", "sequence", "tokens", "loss_sum", "scored", "scored_sum"};

static wn_status write_rows(wn_csv *csv, wn_csv *sequences, const char *split, const char *name,
                            const wn_eval_result *r) {
  if (csv) {
    wn_csv_int(csv, 0);
    wn_csv_text(csv, split);
    wn_csv_text(csv, name);
    wn_csv_int(csv, r->tokens);
    const double cells[] = {r->loss, r->loss_scored, r->stats[WN_STAT_MASS_AT_K], r->stats[WN_STAT_MASS_BEST],
                            r->stats[WN_STAT_RECALL_AT_K]};
    for (size_t i = 0; i < sizeof cells / sizeof *cells; i++) wn_csv_real(csv, cells[i]);
    WN_TRY(wn_csv_end_row(csv));
  }
  for (int64_t i = 0; sequences && i < r->n_seqs; i++) {
    wn_csv_text(sequences, name);
    wn_csv_int(sequences, i);
    wn_csv_int(sequences, r->sequences[i].tokens);
    wn_csv_real(sequences, r->sequences[i].loss_sum);
    wn_csv_int(sequences, r->sequences[i].scored);
    wn_csv_real(sequences, r->sequences[i].scored_sum);
    WN_TRY(wn_csv_end_row(sequences));
  }
  return NULL;
}

static wn_status open_csv(wn_csv **out, const char *path, const char *const *columns, int32_t n) {
  *out = NULL;
  if (!path) return NULL;
  return wn_csv_open(out, path, columns, n);
}

static wn_status run(const eval_flags *f, wn_inference *in, const wn_dataset *dataset, wn_csv *csv, wn_csv *sequences) {
  const wn_model_config *config = &in->model->config;
  bool wanted[WN_N_SELECTIONS];
  int64_t topk = f->topk ? f->topk : config->index_topk;
  WN_TRY(parse_selections(f->selections, config, wanted));
  for (int s = 0; s < WN_N_SELECTIONS; s++)
    if (wanted[s] && s != WN_SELECT_DENSE && topk < 1)
      return WN_FAIL_HINT(WN_E_USAGE, "give --topk K",
                          "selection %s needs a number of keys, and the model's config.json has no index_topk",
                          wn_selection_name((wn_selection)s));
  wn_eval_settings settings = {
      .world = in->world,
      .device = in->device,
      .model = in->model,
      .store = in->store,
      .dataset = dataset,
      .seq_len = (int32_t)f->seq_len,
      .document_mask = !f->no_document_mask,
      .n_seqs = f->seqs,
      .topk = (int32_t)(topk > 0 ? topk : 1),
      .sample_rows = (int32_t)f->sample_rows,
      .seed = (uint64_t)f->seed,
  };
  bool root = wn_world_rank(in->world) == 0;
  if (root)
    printf("%-10s %10s %10s %12s %10s %10s %10s\n", "selection", "tokens", "loss", "loss_scored", "mass_at_k",
           "mass_best", "recall");
  for (int s = 0; s < WN_N_SELECTIONS; s++) {
    if (!wanted[s]) continue;
    wn_eval_result r;
    const char *name = wn_selection_name((wn_selection)s);
    WN_TRY(wn_evaluate(&r, &settings, (wn_selection)s));
    if (root)
      printf("%-10s %10lld %10.4f %12.4f %10.4f %10.4f %10.4f\n", name, (long long)r.tokens, r.loss, r.loss_scored,
             r.stats[WN_STAT_MASS_AT_K], r.stats[WN_STAT_MASS_BEST], r.stats[WN_STAT_RECALL_AT_K]);
    wn_status status = root ? write_rows(csv, sequences, wn_dataset_prefix(dataset), name, &r) : NULL;
    wn_eval_result_free(&r);
    WN_TRY(wn_world_agree(in->world, status));
  }
  return NULL;
}

wn_status wn_cmd_eval(int argc, char **argv, wn_world *world, wn_log *log) {
  eval_flags f = {.device = "auto", .seq_len = 512, .sample_rows = 64, .seed = 1};
  const wn_flag flags[] = {
      {.name = "--data",
       .kind = WN_FLAG_TEXT,
       .value = &f.data,
       .argument = "PREFIX",
       .help = "dataset (PREFIX.bin, PREFIX.idx)"},
      {.name = "--selection",
       .kind = WN_FLAG_TEXT,
       .value = &f.selections,
       .argument = "LIST",
       .help = "of dense,indexer,best,recent,sink,random (default: all the model can do)"},
      {.name = "--topk",
       .kind = WN_FLAG_INT,
       .value = &f.topk,
       .least = 1,
       .most = 1 << 24,
       .argument = "K",
       .help = "keys a row (default: the model's index_topk)"},
      {.name = "--seq-len",
       .kind = WN_FLAG_INT,
       .value = &f.seq_len,
       .least = 1,
       .most = 1 << 24,
       .argument = "T",
       .help = "tokens a window (default 512)"},
      {.name = "--seqs",
       .kind = WN_FLAG_INT,
       .value = &f.seqs,
       .least = 1,
       .most = 1e9,
       .argument = "N",
       .help = "windows, spread evenly (default: all)"},
      {.name = "--sample-rows",
       .kind = WN_FLAG_INT,
       .value = &f.sample_rows,
       .least = 0,
       .most = 1 << 24,
       .argument = "N",
       .help = "rows a window for mass and recall (default 64)"},
      {.name = "--seed",
       .kind = WN_FLAG_INT,
       .value = &f.seed,
       .least = 0,
       .most = 9e15,
       .argument = "N",
       .help = "of the random selection and the sampled rows (default 1)"},
      WN_FLAG_DEVICE(&f.device),
      WN_FLAG_THREADS(&f.threads, "CPU threads a rank (default: all cores)"),
      {.name = "--no-document-mask",
       .kind = WN_FLAG_SWITCH,
       .value = &f.no_document_mask,
       .help = "rows see earlier documents of their window too"},
      {.name = "--csv", .kind = WN_FLAG_TEXT, .value = &f.csv, .argument = "FILE", .help = "append a row a selection"},
      {.name = "--sequences",
       .kind = WN_FLAG_TEXT,
       .value = &f.sequences,
       .argument = "FILE",
       .help = "append a row a window (for standard errors)"},
  };
  const wn_command_help help = {
      "winnow eval MODEL_DIR --data PREFIX [flags]",
      "Mean next-token loss of a model on held-out data, with attention dense or restricted to a selection of keys."};
  int32_t n;
  bool helped;
  WN_TRY(wn_flags_parse(argc, argv, flags, (int32_t)(sizeof flags / sizeof *flags), &help, &n, &helped));
  if (helped) return NULL;
  if (n != 1 || !f.data) return WN_FAIL_HINT(WN_E_USAGE, help.usage, "eval wants one model directory and --data");
  wn_job_device device;
  WN_TRY(wn_flag_device(&device, f.device));
  wn_status status = NULL;
  wn_inference in = {0};
  wn_dataset *dataset = NULL;
  wn_csv *csv = NULL, *sequences = NULL;
  WN_TRY_GOTO(status, done, wn_world_agree(world, wn_dataset_open(&dataset, f.data)));
  WN_TRY_GOTO(status, done, wn_inference_open(&in, argv[1], device, (int32_t)f.threads, false, world, log));
  status = wn_dataset_check_vocab(dataset, in.model->config.vocab_size);
  if (!status && wn_dataset_windows(dataset, (int32_t)f.seq_len) < 1)
    status = WN_FAIL(WN_E_INPUT, "%s holds too few tokens for one window of %lld", f.data, (long long)f.seq_len);
  if (!status && wn_world_rank(world) == 0) {
    WN_KEEP_FIRST(status,
                  open_csv(&csv, f.csv, result_columns, (int32_t)(sizeof result_columns / sizeof *result_columns)));
    WN_KEEP_FIRST(status, open_csv(&sequences, f.sequences, sequence_columns,
                                   (int32_t)(sizeof sequence_columns / sizeof *sequence_columns)));
  }
  WN_TRY_GOTO(status, done, wn_world_agree(world, status));
  WN_TRY_GOTO(status, done, run(&f, &in, dataset, csv, sequences));
done:
  if (csv) WN_KEEP_FIRST(status, wn_csv_close(csv));
  if (sequences) WN_KEEP_FIRST(status, wn_csv_close(sequences));
  wn_dataset_close(dataset);
  wn_inference_close(&in);
  return status;
}
