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

/* One curve: a column of a table. `y` is what is drawn of it, NULL for the column itself. */
typedef struct series {
  const char *table, *column, *y, *style;
} series;

typedef struct plot {
  const char *name, *setup, *x;
  series series[5];
} plot;

/* A table without values in a column has nothing to plot, and gnuplot stops at it: such curves are left out. `stats`
 * looks at the ranges that are set, so it comes before them. */
static const plot plots[] = {
    {"loss",
     "set title 'token loss'\nset xlabel 'step'\nset ylabel 'nats'\n",
     "step",
     {{"train", "lm_loss", NULL, "lines title 'train'"},
      {"eval", "loss", NULL, "linespoints title 'valid'"},
      {"eval", "loss_scored", NULL, "linespoints title 'valid, scored'"}}},
    {"kl",
     "set title 'indexer KL, mean over layers'\nset xlabel 'step'\nset ylabel 'nats'\nset logscale y\n",
     "step",
     {{"train", "indexer_kl", NULL, "lines title 'KL'"}}},
    {"mass",
     "set title 'attention mass on the picked keys, last measured step'\nset xlabel 'layer'\nset ylabel 'share'\n"
     "stats layers using 'step' nooutput\nlast = STATS_max\nset yrange [0:1.05]\nset key outside\n"
     "at(name) = column('step') == last ? column(name) : NaN\n",
     "layer",
     {{"layers", "mass_best", "(at('mass_best'))", "linespoints title 'best possible'"},
      {"layers", "mass_at_k", "(at('mass_at_k'))", "linespoints title 'indexer'"},
      {"layers", "mass_recent", "(at('mass_recent'))", "linespoints title 'recent window'"},
      {"layers", "mass_sink", "(at('mass_sink'))", "linespoints title 'window and sink'"},
      {"layers", "mass_random", "(at('mass_random'))", "linespoints title 'chance'"}}},
    {"recall",
     "set title 'recall of the best k keys'\nset xlabel 'step'\nset ylabel 'share'\n"
     "stats layers using 'layer' nooutput\nset yrange [0:1.05]\nset key outside\n",
     "step",
     {{"for [l=0:int(STATS_max)] layers", "recall_at_k", "(column('layer') == l ? column('recall_at_k') : NaN)",
       "points title sprintf('layer %d', l)"}}},
};
enum { N_PLOTS = sizeof plots / sizeof *plots, N_SERIES = sizeof plots[0].series / sizeof plots[0].series[0] };
static const char *const tables[] = {"train", "eval", "layers"};
enum { N_TABLES = sizeof tables / sizeof *tables };

/* Single quotes are doubled inside gnuplot's single-quoted strings. */
static void quote(FILE *out, const char *text) {
  fputc('\'', out);
  for (; *text; text++) {
    if (*text == '\'') fputc('\'', out);
    fputc(*text, out);
  }
  fputc('\'', out);
}

/* The next cell of a line; quoted cells may hold commas, and no line ends in these tables. */
static char *next_cell(char **line) {
  char *cell = *line, *at = cell;
  bool quoted = false;
  if (!cell) return NULL;
  for (; *at && *at != '\n' && (*at != ',' || quoted); at++)
    if (*at == '"') quoted = !quoted;
  *line = *at == ',' ? at + 1 : NULL;
  *at = 0;
  return cell;
}

/* Whether a table of the run has a value in a column. */
static bool has_values(const char *run_dir, const char *table, const char *column) {
  char path[WN_PATH_BYTES], *line = NULL;
  size_t room = 0;
  int32_t wanted = -1;
  bool found = false;
  snprintf(path, sizeof path, "%s/metrics/%s.csv", run_dir, table);
  FILE *in = fopen(path, "r");
  if (!in) return false;
  for (int64_t row = 0; !found && getline(&line, &room, in) > 0; row++) {
    char *rest = line, *cell;
    for (int32_t i = 0; (cell = next_cell(&rest)); i++) {
      if (row == 0 && strcmp(cell, column) == 0) wanted = i;
      if (row > 0 && i == wanted && *cell && strstr(cell, "inf") == NULL) found = true;
    }
  }
  free(line);
  fclose(in);
  return found;
}

/* The table that a series reads: the last word of it. */
static const char *table_of(const series *s) {
  const char *blank = strrchr(s->table, ' ');
  return blank ? blank + 1 : s->table;
}

static bool is_there(const char *run_dir, const series *s) {
  return s->table && has_values(run_dir, table_of(s), s->column);
}

static bool has_curves(const char *run_dir, const plot *p) {
  for (int k = 0; k < N_SERIES; k++)
    if (is_there(run_dir, &p->series[k])) return true;
  return false;
}

static void write_plot(FILE *out, const char *run_dir, const plot *p, const char *suffix, const char *terminal) {
  char path[WN_PATH_BYTES];
  const char *between = "plot ";
  snprintf(path, sizeof path, "%s/report/%s.%s", run_dir, p->name, suffix);
  fprintf(out, "reset\nset datafile separator ','\nset datafile missing ''\nset grid\nset key autotitle columnhead\n");
  fprintf(out, "set terminal %s\nset output ", terminal);
  quote(out, path);
  fprintf(out, "\n%s", p->setup);
  for (int k = 0; k < N_SERIES; k++) {
    const series *s = &p->series[k];
    if (!is_there(run_dir, s)) continue;
    fprintf(out, "%s%s using '%s':", between, s->table, p->x);
    if (s->y)
      fputs(s->y, out);
    else
      quote(out, s->column);
    fprintf(out, " with %s", s->style);
    between = ", ";
  }
  fputc('\n', out);
}

/* `drawn`: the names of the plots, apart by commas. */
static wn_status write_script(const char *run_dir, const char *script, char drawn[64]) {
  char path[WN_PATH_BYTES];
  size_t used = 0;
  FILE *out = fopen(script, "w");
  if (!out) return WN_FAIL(WN_E_IO, "cannot write %s: %s", script, strerror(errno));
  for (int t = 0; t < N_TABLES; t++) {
    snprintf(path, sizeof path, "%s/metrics/%s.csv", run_dir, tables[t]);
    fprintf(out, "%s = ", tables[t]);
    quote(out, path);
    fputc('\n', out);
  }
  drawn[0] = 0;
  for (int i = 0; i < N_PLOTS; i++) {
    if (!has_curves(run_dir, &plots[i])) continue;
    write_plot(out, run_dir, &plots[i], "svg", "svg size 960,600 background 'white'");
    write_plot(out, run_dir, &plots[i], "png", "pngcairo size 960,600");
    used += (size_t)snprintf(drawn + used, 64 - used, "%s%s", used ? ", " : "", plots[i].name);
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
  char path[WN_PATH_BYTES], script[WN_PATH_BYTES], drawn[64];
  const wn_command_help help = {
      "winnow report RUN_DIR",
      "Plots of what a run measured: RUN_DIR/report/{loss,kl,mass,recall}.{svg,png}, and the gnuplot script that made "
      "them."};
  WN_TRY(wn_flags_parse(argc, argv, NULL, 0, &help, &n, &helped));
  if (helped) return NULL;
  if (n != 1) return WN_FAIL_HINT(WN_E_USAGE, help.usage, "report wants one run directory");
  if (!has_values(argv[1], "train", "step"))
    return WN_FAIL(WN_E_INPUT, "%s/metrics/train.csv is not there or has no rows: not a run directory?", argv[1]);
  WN_TRY(wn_path(path, "%s/report", argv[1]));
  WN_TRY(wn_make_dirs(path));
  WN_TRY(wn_path(script, "%s/plot.gp", path));
  WN_TRY(write_script(argv[1], script, drawn));
  if (!drawn[0]) return WN_FAIL(WN_E_INPUT, "%s/metrics holds no loss and no KL to draw", argv[1]);
  WN_TRY(run_gnuplot(script));
  wn_info(log, "%s: %s (.svg, .png)", path, drawn);
  return NULL;
}
