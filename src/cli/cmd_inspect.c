/* What a directory or a file is, for people or as JSON. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/flags.h"
#include "train/inspect.h"

static int64_t int_of(const json_t *object, const char *key) {
  return (int64_t)json_integer_value(json_object_get(object, key));
}

/* 671877944064 -> "671.9B" */
static const char *short_count(char out[32], int64_t n) {
  static const struct {
    double unit;
    const char *letter;
  } units[] = {{1e12, "T"}, {1e9, "B"}, {1e6, "M"}, {1e3, "K"}};
  for (size_t i = 0; i < sizeof units / sizeof *units; i++)
    if ((double)n >= units[i].unit) {
      snprintf(out, 32, "%.1f%s", (double)n / units[i].unit, units[i].letter);
      return out;
    }
  snprintf(out, 32, "%lld", (long long)n);
  return out;
}

static void print_count(const char *label, int64_t n, const char *note) {
  char text[32];
  printf("  %-18s %19lld  %8s%s%s\n", label, (long long)n, short_count(text, n), *note ? "  " : "", note);
}

static void print_model(const json_t *model) {
  const char *part;
  json_t *value;
  printf("model       %s: %lld layers, width %lld, %lld heads, %lld routed experts (%lld a token), vocabulary %lld, "
         "%lld positions\n",
         json_string_value(json_object_get(model, "model_type")), (long long)int_of(model, "layers"),
         (long long)int_of(model, "hidden_size"), (long long)int_of(model, "attention_heads"),
         (long long)int_of(model, "routed_experts"), (long long)int_of(model, "experts_per_token"),
         (long long)int_of(model, "vocab_size"), (long long)int_of(model, "max_position_embeddings"));
  if (json_object_get(model, "index_topk"))
    printf("indexer     %lld heads of %lld, the %lld best keys\n", (long long)int_of(model, "index_heads"),
           (long long)int_of(model, "index_head_dim"), (long long)int_of(model, "index_topk"));
  else
    puts("indexer     none: attention is dense");
  puts("parameters, as config.json says");
  json_object_foreach(json_object_get(model, "parts"), part, value) print_count(part, json_integer_value(value), "");
  print_count("main model", int_of(model, "main"), "their sum");
  print_count("active per token", int_of(model, "active_per_token"), "of these: without the experts not taken");
  if (int_of(model, "mtp_layers")) {
    print_count("MTP module", int_of(model, "mtp_own"), "predicts one token further; not in the main model");
    print_count("its copies", int_of(model, "mtp_copies"), "of embedding and head");
  }
  print_count("in all", int_of(model, "parameters"), "what the files of a release hold, block scales apart");
}

static void print_weights(const json_t *weights) {
  size_t i;
  json_t *one;
  char text[32];
  printf("weights     %lld tensors in %lld file%s, %.3f GB, %s parameters", (long long)int_of(weights, "tensors"),
         (long long)int_of(weights, "files"), int_of(weights, "files") == 1 ? "" : "s",
         (double)int_of(weights, "bytes") * 1e-9, short_count(text, int_of(weights, "parameters")));
  if (int_of(weights, "scales")) printf(" and %s block scales", short_count(text, int_of(weights, "scales")));
  putchar('\n');
  json_array_foreach(json_object_get(weights, "dtypes"), i, one)
      printf("  %-18s %19lld tensors  %19lld bytes\n", json_string_value(json_object_get(one, "dtype")),
             (long long)int_of(one, "tensors"), (long long)int_of(one, "bytes"));
  const char *fits = json_string_value(json_object_get(weights, "fits_config"));
  if (fits) printf("as config   %s\n", fits);
}

static void print_checkpoint(const json_t *checkpoint) {
  const char *stage = json_string_value(json_object_get(checkpoint, "stage"));
  if (stage)
    printf("state       %s, step %lld, %lld tokens, indexer %s\n", stage, (long long)int_of(checkpoint, "step"),
           (long long)int_of(checkpoint, "tokens"),
           json_is_true(json_object_get(checkpoint, "indexer_trained")) ? "trained" : "not trained");
  printf("verifies    %s\n", json_string_value(json_object_get(checkpoint, "verifies")));
}

static void print_run(const json_t *root) {
  const char *key;
  json_t *value;
  size_t i;
  json_object_foreach(json_object_get(root, "job"), key, value) printf("  %-26s %s\n", key, json_string_value(value));
  const json_t *checkpoints = json_object_get(root, "checkpoints");
  if (!json_array_size(checkpoints)) puts("checkpoints none");
  json_array_foreach(checkpoints, i, value)
      printf("checkpoint  step %lld, %.3f GB%s\n", (long long)int_of(value, "step"),
             (double)int_of(value, "bytes") * 1e-9, i == 0 ? " (newest)" : "");
}

static void print_dataset(const json_t *dataset) {
  printf("dtype       %s\ndocuments   %lld, the longest of %lld tokens\ntokens      %lld%s\n",
         json_string_value(json_object_get(dataset, "dtype")), (long long)int_of(dataset, "documents"),
         (long long)int_of(dataset, "longest_document"), (long long)int_of(dataset, "tokens"),
         json_is_true(json_object_get(dataset, "marked")) ? ", with marks" : "");
}

static void print_all(const json_t *root) {
  static const struct {
    const char *key;
    void (*print)(const json_t *);
  } sections[] = {
      {"model", print_model}, {"weights", print_weights}, {"dataset", print_dataset}, {"checkpoint", print_checkpoint}};
  printf("%s: %s\n", json_string_value(json_object_get(root, "path")),
         json_string_value(json_object_get(root, "kind")));
  if (json_object_get(root, "checkpoints")) print_run(root);
  for (size_t i = 0; i < sizeof sections / sizeof *sections; i++) {
    const json_t *section = json_object_get(root, sections[i].key);
    if (section) sections[i].print(section);
  }
}

wn_status wn_cmd_inspect(int argc, char **argv) {
  bool helped, as_json = false, quick = false;
  int32_t n;
  json_t *root;
  const wn_flag flags[] = {{.name = "--json", .kind = WN_FLAG_SWITCH, .value = &as_json, .help = "facts as JSON"},
                           {.name = "--quick",
                            .kind = WN_FLAG_SWITCH,
                            .value = &quick,
                            .help = "of a checkpoint, compare names and lengths with its manifest, not every byte"}};
  const wn_command_help help = {
      "winnow inspect PATH [--json] [--quick]",
      "Says what a model directory, a checkpoint, a safetensors file, a dataset (PREFIX) or a run directory is: "
      "parameters and where they are, dtypes, stage, whether it verifies. A directory with a config.json alone will "
      "do."};
  WN_TRY(wn_flags_parse(argc, argv, flags, 2, &help, &n, &helped));
  if (helped) return NULL;
  if (n != 1) return WN_FAIL_HINT(WN_E_USAGE, help.usage, "inspect wants one path");
  WN_TRY(wn_inspect(&root, argv[1], quick));
  if (as_json) {
    json_dumpf(root, stdout, JSON_INDENT(2));
    putchar('\n');
  } else
    print_all(root);
  json_decref(root);
  return fflush(stdout) == 0 && !ferror(stdout) ? NULL : WN_FAIL(WN_E_IO, "cannot write to standard output");
}
