/* What tests of `winnow plan` share, on either device: the plan as JSON, what a run took by its own table, and both
 * compared within a hundredth. */
#ifndef WN_TEST_PLAN_H
#define WN_TEST_PLAN_H

#include <sys/stat.h>

#include "io/json.h"
#include "support/tiny.h"

static const char *const plan_arenas[] = {"weights", "stash", "scratch", "host"};
enum { PLAN_ARENAS = 4 };

/* DIR/sparse: the tiny base with an indexer, which counts as trained. */
static inline int plan_setup(void **state) {
  if (tiny_setup(state)) return -1;
  wn_model_config config = tiny_sparse_config();
  tiny_model(wn_temp(state, "sparse").text, &config, 1, 1, NULL);
  return 0;
}

static inline json_t *plan_of(const char *words) {
  wn_program p;
  json_error_t error;
  wn_winnow(&p, 1, "plan %s --json", words);
  if (p.code != 0) fail_msg("plan %s ended with %d: %s", words, p.code, p.err);
  json_t *root = json_loads(p.out, JSON_REJECT_DUPLICATES, &error);
  if (!root) fail_msg("plan %s: %s in %s", words, error.text, p.out);
  return root;
}

static inline double plan_number(const json_t *root, const char *key) {
  const json_t *value = json_object_get(root, key);
  if (!json_is_number(value)) fail_msg("%s is not a number", key);
  return json_number_value(value);
}

static inline const json_t *planned_arena(const json_t *root, const char *arena) {
  size_t i;
  json_t *one;
  json_array_foreach(json_object_get(root, "arenas"), i, one) {
    if (strcmp(json_string_value(json_object_get(one, "arena")), arena) == 0) return one;
  }
  fail_msg("no arena %s", arena);
  return NULL;
}

static inline double planned_bytes(const json_t *root, const char *arena, const char *name) {
  const json_t *at = planned_arena(root, arena);
  size_t i;
  json_t *one;
  if (strcmp(name, "(peak)") == 0) return plan_number(at, "peak_bytes");
  json_array_foreach(json_object_get(at, "uses"), i, one) {
    if (strcmp(json_string_value(json_object_get(one, "name")), name) == 0) return plan_number(one, "peak_bytes");
  }
  return 0;
}

static inline void expect_planned(const char *what, double planned, double taken) {
  if (!(fabs(planned - taken) <= 0.01 * taken)) fail_msg("%s: planned %.0f bytes, taken %.0f", what, planned, taken);
}

/* Every name of RUN/memory.txt, "scratch    logits    123 bytes", and the peak of each arena; and no name is planned
 * that the run does not have. */
static inline void expect_planned_arenas(void **state, const json_t *plan, const char *run) {
  char path[WN_PATH_BYTES], what[256], *text;
  OK(wn_path(path, "%s/%s/memory.txt", (const char *)*state, run));
  OK(wn_read_file(&text, NULL, path, 1 << 20));
  size_t taken = 0, planned = 0;
  for (int a = 0; a < PLAN_ARENAS; a++)
    planned += json_array_size(json_object_get(planned_arena(plan, plan_arenas[a]), "uses")) + 1;
  for (char *rest = text, *line; (line = strsep(&rest, "\n"));) {
    static const char unit[] = " bytes";
    char arena[32], name[128];
    size_t length = strlen(line);
    if (length < sizeof unit || strcmp(line + length - (sizeof unit - 1), unit) != 0) continue;
    line[length - (sizeof unit - 1)] = 0;
    assert_int_equal(sscanf(line, "%31s %127[^\n]", arena, name), 2);
    char *number = strrchr(name, ' ');
    double bytes = strtod(number, NULL);
    while (number > name && *number == ' ') *number-- = 0;
    snprintf(what, sizeof what, "%s: %s in the %s arena", run, name, arena);
    expect_planned(what, planned_bytes(plan, arena, name), bytes);
    taken++;
  }
  free(text);
  if (taken != planned) fail_msg("%s: %zu names are planned, %zu taken", run, planned, taken);
}

#endif
