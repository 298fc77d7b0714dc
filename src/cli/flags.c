#include "cli/flags.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void print_help(const wn_flag *flags, int32_t n, const wn_command_help *help) {
  printf("usage: %s\n\n%s\n", help->usage, help->about);
  if (n) printf("\nflags:\n");
  for (int32_t i = 0; i < n; i++) {
    char left[64];
    snprintf(left, sizeof left, "%s%s%s", flags[i].name, flags[i].argument ? " " : "",
             flags[i].argument ? flags[i].argument : "");
    printf("  %-28s %s\n", left, flags[i].help);
  }
}

/* Letters that two names share in order from the front: enough to find a typing slip. */
static const wn_flag *nearest(const wn_flag *flags, int32_t n, const char *name) {
  const wn_flag *best = NULL;
  size_t most = 3;
  for (int32_t i = 0; i < n; i++) {
    size_t same = 0;
    while (flags[i].name[same] && flags[i].name[same] == name[same]) same++;
    if (same > most) {
      most = same;
      best = &flags[i];
    }
  }
  return best;
}

static wn_status in_range(const wn_flag *flag, double value, const char *text) {
  if (flag->least == flag->most || (value >= flag->least && value <= flag->most)) return NULL;
  return WN_FAIL(WN_E_USAGE, "%s is %s, but must be between %g and %g", flag->name, text, flag->least, flag->most);
}

static wn_status read_int(const wn_flag *flag, const char *text, const char *end_of, int64_t *out) {
  char *end;
  errno = 0;
  long long value = strtoll(text, &end, 10);
  if (end == text || *end != *end_of || errno)
    return WN_FAIL(WN_E_USAGE, "%s wants a whole number, not '%s'", flag->name, text);
  *out = value;
  return in_range(flag, (double)value, text);
}

static wn_status read_value(const wn_flag *flag, const char *text) {
  switch (flag->kind) {
  case WN_FLAG_SWITCH: *(bool *)flag->value = true; return NULL;
  case WN_FLAG_TEXT: *(const char **)flag->value = text; return NULL;
  case WN_FLAG_INT: return read_int(flag, text, "", flag->value);
  case WN_FLAG_REAL: {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || value != value)
      return WN_FAIL(WN_E_USAGE, "%s wants a number, not '%s'", flag->name, text);
    *(double *)flag->value = value;
    return in_range(flag, value, text);
  }
  case WN_FLAG_RANGE: {
    int64_t *range = flag->value;
    const char *colon = strchr(text, ':');
    WN_TRY(read_int(flag, text, colon ? ":" : "", &range[0]));
    range[1] = range[0];
    if (colon) WN_TRY(read_int(flag, colon + 1, "", &range[1]));
    if (range[1] < range[0]) return WN_FAIL(WN_E_USAGE, "%s wants MIN:MAX, but %s runs backwards", flag->name, text);
    return NULL;
  }
  }
  return NULL;
}

static const wn_flag *find(const wn_flag *flags, int32_t n, const char *name, size_t length) {
  for (int32_t i = 0; i < n; i++)
    if (strlen(flags[i].name) == length && strncmp(flags[i].name, name, length) == 0) return &flags[i];
  return NULL;
}

wn_status wn_flags_parse(int argc, char **argv, const wn_flag *flags, int32_t n_flags, const wn_command_help *help,
                         int32_t *n_positional, bool *helped) {
  int32_t kept = 0;
  bool only_positional = false;
  *helped = false;
  for (int i = 1; i < argc; i++) {
    char *word = argv[i];
    if (only_positional || word[0] != '-' || !word[1]) {
      argv[1 + kept++] = word;
      continue;
    }
    if (strcmp(word, "--") == 0) {
      only_positional = true;
      continue;
    }
    if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) {
      print_help(flags, n_flags, help);
      *helped = true;
      return NULL;
    }
    const char *equals = strchr(word, '=');
    const wn_flag *flag = find(flags, n_flags, word, equals ? (size_t)(equals - word) : strlen(word));
    if (!flag) {
      const wn_flag *near = nearest(flags, n_flags, word);
      return WN_FAIL_HINT(WN_E_USAGE, help->usage, "unknown flag %s%s%s%s", word, near ? "; did you mean " : "",
                          near ? near->name : "", near ? "?" : "");
    }
    if (flag->kind == WN_FLAG_SWITCH) {
      if (equals) return WN_FAIL(WN_E_USAGE, "%s takes no value", flag->name);
      WN_TRY(read_value(flag, ""));
    } else if (equals) {
      WN_TRY(read_value(flag, equals + 1));
    } else {
      if (i + 1 >= argc) return WN_FAIL_HINT(WN_E_USAGE, help->usage, "%s wants a value", flag->name);
      WN_TRY(read_value(flag, argv[++i]));
    }
  }
  *n_positional = kept;
  return NULL;
}

wn_status wn_flag_device(wn_job_device *out, const char *text) {
  for (int i = 0; wn_job_device_names[i]; i++) {
    *out = (wn_job_device)i;
    if (strcmp(text, wn_job_device_names[i]) == 0) return NULL;
  }
  return WN_FAIL(WN_E_USAGE, "--device is auto, cpu or cuda, not '%s'", text);
}
