/* The option table as a resolved job file, as help, and as a page of documentation. */
#include <stdlib.h>
#include <string.h>

#include "config/job.h"
#include "config/job_source.h"
#include "config/options.h"

/* Length of the section's name; 0 at the top level. */
static size_t section_of(const char *key) {
  const char *dot = strchr(key, '.');
  return dot ? (size_t)(dot - key) : 0;
}

static bool same_section(const char *a, const char *b) {
  size_t n = section_of(a);
  return n == section_of(b) && !strncmp(a, b, n);
}

/* Double quotes, which every path survives. */
static void print_quoted(FILE *out, const char *text) {
  fputc('"', out);
  for (; *text; text++) {
    if (*text == '"' || *text == '\\') fputc('\\', out);
    if ((unsigned char)*text < 0x20 || *text == 0x7f)
      fprintf(out, "\\x%02X", (unsigned)*text);
    else
      fputc(*text, out);
  }
  fputc('"', out);
}

static void print_comment(FILE *out, const char *text) {
  fputs("  # ", out);
  for (; *text; text++) fputc((unsigned char)*text < 0x20 || *text == 0x7f ? '?' : *text, out);
  fputc('\n', out);
}

wn_status wn_job_save(const wn_job *job, const wn_job_source *source, const char *path) {
  char *text = NULL, value[WN_PATH_BYTES];
  size_t bytes = 0;
  FILE *out = open_memstream(&text, &bytes);
  if (!out) return WN_FAIL(WN_E_MEMORY, "out of memory writing %s", path);
  fputs("# Every option of this run, and where its value came from.\n", out);
  for (int32_t i = 0; i < wn_option_count(); i++) {
    const wn_option *option = wn_option_at(i);
    size_t section = section_of(option->key);
    if (section && !same_section(option->key, wn_option_at(i - 1)->key))
      fprintf(out, "%.*s:\n", (int)section, option->key);
    fprintf(out, "%s%s: ", section ? "  " : "", option->key + section + (section ? 1 : 0));
    wn_option_value(option, job, value);
    if (option->type == WN_PATH)
      print_quoted(out, value);
    else
      fputs(value, out);
    print_comment(out, source->place[i]);
  }
  wn_status status = NULL;
  if (fclose(out) != 0)
    status = WN_FAIL(WN_E_MEMORY, "out of memory writing %s", path);
  else
    status = wn_write_file_atomic(path, text, bytes);
  free(text);
  return status;
}

static void default_text(const wn_option *option, char out[WN_PATH_BYTES]) {
  if (!option->fallback)
    snprintf(out, WN_PATH_BYTES, "%s", strcmp(option->key, "stage") ? "must be given" : "the command");
  else if (option->same_as)
    snprintf(out, WN_PATH_BYTES, "that of %s", option->fallback);
  else
    snprintf(out, WN_PATH_BYTES, "%s", option->fallback[0] ? option->fallback : "none");
}

wn_status wn_job_print_options(FILE *out, bool markdown) {
  char allowed[WN_PATH_BYTES], fallback[WN_PATH_BYTES];
  if (markdown)
    fputs("# Options of a job file\n\n"
          "Written by `winnow options --markdown`. On the command line an option is `section.name=value`, and wins "
          "over the "
          "file.\nOptions marked * may change when a run is resumed; for any other, a changed value is refused.\n",
          out);
  for (int32_t i = 0; i < wn_option_count(); i++) {
    const wn_option *option = wn_option_at(i);
    size_t section = section_of(option->key);
    wn_option_allowed(option, allowed);
    default_text(option, fallback);
    const char *unit = option->unit ? option->unit : "";
    if (!markdown) {
      fprintf(out, "  %-30s %s%s%s%s; default: %s\n      %s\n", option->key, allowed, *unit ? " (" : "", unit,
              *unit ? ")" : "", fallback, option->help);
      continue;
    }
    if (i == 0 || !same_section(option->key, wn_option_at(i - 1)->key))
      fprintf(out, "\n## %.*s\n\n| key | allowed | unit | default | meaning |\n|---|---|---|---|---|\n",
              section ? (int)section : 9, section ? option->key : "top level");
    fprintf(out, "| `%s`%s | %s | %s | %s | %s |\n", option->key, option->may_change ? " *" : "", allowed, unit,
            fallback, option->help);
  }
  return ferror(out) ? WN_FAIL(WN_E_IO, "cannot write the list of options") : NULL;
}
