/* Draws a run's metrics with gnuplot: loss, KL, and captured attention mass by layer, as SVG and PNG. The script stays
 * beside the pictures, to be changed and run again. */
#include <errno.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "cli/commands.h"
#include "cli/flags.h"

extern char **environ;

static const struct {
  const char *name, *body;
} plots[] = {
    {"loss", "set title 'token loss'\nset xlabel 'step'\nset ylabel 'nats'\n"
             "plot train using 'step':'lm_loss' with lines title 'train', eval using 'step':'loss' with linespoints "
             "title 'valid', "
             "eval using 'step':'loss_scored' with linespoints title 'valid, scored'\n"},
    {"kl", "set title 'indexer KL, mean over layers'\nset xlabel 'step'\nset ylabel 'nats'\nset logscale y\n"
           "plot train using 'step':'indexer_kl' with lines title 'KL'\n"},
    {"mass", "set title 'attention mass on the picked keys, last measured step'\nset xlabel 'layer'\nset ylabel "
             "'share'\nset yrange [0:1.05]\nset key outside\n"
             "last = 0\nstats layers using 'step' nooutput\nlast = STATS_max\n"
             "at(column_name) = column('step') == last ? column(column_name) : NaN\n"
             "plot layers using 'layer':(at('mass_best')) with linespoints title 'best possible', layers using "
             "'layer':(at('mass_at_k')) with linespoints title 'indexer', "
             "layers using 'layer':(at('mass_recent')) with linespoints title 'recent window', layers using "
             "'layer':(at('mass_sink')) with linespoints title 'window and sink', "
             "layers using 'layer':(at('mass_random')) with linespoints title 'chance'\n"},
    {"recall", "set title 'recall of the best k keys'\nset xlabel 'step'\nset ylabel 'share'\nset yrange [0:1.05]\nset "
               "key outside\n"
               "stats layers using 'layer' nooutput\n"
               "plot for [l=0:int(STATS_max)] layers using 'step':(column('layer') == l ? column('recall_at_k') : NaN) "
               "with points title sprintf('layer %d', l)\n"},
};
enum { N_PLOTS = sizeof plots / sizeof *plots };

/* Single quotes are doubled inside gnuplot's single-quoted strings. */
static void quote(FILE *out, const char *text) {
  fputc('\'', out);
  for (; *text; text++) {
    if (*text == '\'') fputc('\'', out);
    fputc(*text, out);
  }
  fputc('\'', out);
}

static void set_file(FILE *out, const char *variable, const char *run_dir, const char *file) {
  char path[WN_PATH_BYTES];
  snprintf(path, sizeof path, "%s/%s", run_dir, file);
  fprintf(out, "%s = ", variable);
  quote(out, path);
  fputc('\n', out);
}

/* A table with a header and no rows has nothing to plot, and gnuplot would stop at it. */
static bool has_rows(const char *run_dir, const char *file) {
  char path[WN_PATH_BYTES], line[4096];
  snprintf(path, sizeof path, "%s/%s", run_dir, file);
  FILE *in = fopen(path, "r");
  if (!in) return false;
  bool rows = fgets(line, sizeof line, in) && fgets(line, sizeof line, in);
  fclose(in);
  return rows;
}

static wn_status write_script(const char *run_dir, const char *script) {
  FILE *out = fopen(script, "w");
  if (!out) return WN_FAIL(WN_E_IO, "cannot write %s: %s", script, strerror(errno));
  bool layers = has_rows(run_dir, "metrics/layers.csv"), eval = has_rows(run_dir, "metrics/eval.csv");
  fprintf(out, "set datafile separator ','\nset datafile missing ''\nset grid\n");
  set_file(out, "train", run_dir, "metrics/train.csv");
  set_file(out, "layers", run_dir, "metrics/layers.csv");
  set_file(out, "eval", run_dir, eval ? "metrics/eval.csv" : "metrics/train.csv");
  for (int p = 0; p < N_PLOTS; p++) {
    if (strstr(plots[p].body, "layers") && !layers) continue;
    for (int k = 0; k < 2; k++) {
      char file[128];
      fprintf(out,
              "reset\nset datafile separator ','\nset datafile missing ''\nset grid\nset key autotitle columnhead\n");
      fprintf(out, k ? "set terminal pngcairo size 960,600\n" : "set terminal svg size 960,600 background 'white'\n");
      snprintf(file, sizeof file, "report/%s.%s", plots[p].name, k ? "png" : "svg");
      char path[WN_PATH_BYTES];
      snprintf(path, sizeof path, "%s/%s", run_dir, file);
      fprintf(out, "set output ");
      quote(out, path);
      fputc('\n', out);
      if (p == 0 && !eval)
        fprintf(out, "set title 'token loss'\nset xlabel 'step'\nset ylabel 'nats'\nplot train using 'step':'lm_loss' "
                     "with lines title 'train'\n");
      else
        fputs(plots[p].body, out);
    }
  }
  if (fclose(out) != 0) return WN_FAIL(WN_E_IO, "cannot write %s: %s", script, strerror(errno));
  return NULL;
}

static wn_status run_gnuplot(const char *script) {
  char *argv[] = {(char *)(uintptr_t) "gnuplot", (char *)(uintptr_t)script, NULL};
  pid_t child;
  int outcome, error = posix_spawnp(&child, "gnuplot", NULL, NULL, argv, environ);
  if (error)
    return WN_FAIL_HINT(WN_E_IO, "install gnuplot-nox (make deps)", "cannot start gnuplot: %s", strerror(error));
  while (waitpid(child, &outcome, 0) < 0)
    if (errno != EINTR) return WN_FAIL(WN_E_IO, "cannot wait for gnuplot: %s", strerror(errno));
  if (!WIFEXITED(outcome) || WEXITSTATUS(outcome) != 0) return WN_FAIL(WN_E_IO, "gnuplot failed on %s", script);
  return NULL;
}

wn_status wn_cmd_report(int argc, char **argv, wn_log *log) {
  int32_t n;
  bool helped;
  char path[WN_PATH_BYTES], script[WN_PATH_BYTES];
  const wn_command_help help = {
      "winnow report RUN_DIR",
      "Plots of a run: RUN_DIR/report/{loss,kl,mass,recall}.{svg,png}, and the gnuplot script that made them."};
  WN_TRY(wn_flags_parse(argc, argv, NULL, 0, &help, &n, &helped));
  if (helped) return NULL;
  if (n != 1) return WN_FAIL_HINT(WN_E_USAGE, help.usage, "report wants one run directory");
  if (!has_rows(argv[1], "metrics/train.csv"))
    return WN_FAIL(WN_E_INPUT, "%s/metrics/train.csv is not there or has no rows: not a run directory?", argv[1]);
  WN_TRY(wn_path(path, "%s/report", argv[1]));
  WN_TRY(wn_make_dirs(path));
  WN_TRY(wn_path(script, "%s/plot.gp", path));
  WN_TRY(write_script(argv[1], script));
  WN_TRY(run_gnuplot(script));
  wn_info(log, "%s: loss, kl, mass, recall (.svg, .png)", path);
  return NULL;
}
