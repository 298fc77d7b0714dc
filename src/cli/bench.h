/* `winnow bench`: one operation of the table at a time, on operands made for it, timed, its outputs looked at. What
 * cmd_bench.c, bench.c, the case files and bench_layer.c share. */
#ifndef WN_CLI_BENCH_H
#define WN_CLI_BENCH_H

#include "kernels/kernels.h"

/* 0: the default of the device (cmd_bench.c) */
typedef struct wn_bench_sizes {
  int64_t seq, rows, document; /* keys; queries, the last of them; keys of a document */
  int64_t hidden, heads, nope, rope, v, latent, q_latent;
  int64_t index_heads, index_width, topk, sampled;
  int64_t experts, experts_a_token, expert_width, vocab;
  int64_t elements; /* of flat pieces (optimizer) */
} wn_bench_sizes;

typedef enum wn_bench_out {
  WN_BENCH_SET,   /* written whole: NaN before */
  WN_BENCH_ADD,   /* added to: zeros before */
  WN_BENCH_KEEP,  /* changed in place: random before */
  WN_BENCH_PICKS, /* a selection */
  WN_BENCH_COUNT  /* other integers: not looked at */
} wn_bench_out;

enum { WN_BENCH_TENSORS = 10 };

typedef struct wn_bench {
  wn_device *device;
  const wn_ops *ops;
  wn_bench_sizes s;
  int32_t repeats;
  double seconds;                 /* no more repeats once they took this long, but for three */
  bool recent;                    /* picks are the last keys, not random ones */
  float *noise;                   /* normal numbers, host */
  double copy_rate, product_rate; /* bytes/s, FLOP/s, measured in this run */

  /* the operation at hand */
  wn_tensor in[WN_BENCH_TENSORS], out[WN_BENCH_TENSORS];
  wn_bench_out kind[WN_BENCH_TENSORS];
  int64_t not_finite[WN_BENCH_TENSORS]; /* how many elements of an output are expected so */
  int32_t n_in, n_out;
  double work; /* bytes, counted from the operands; or FLOP, which a case sets with `flops` */
  bool flops;
  wn_rows rows;         /* on the device */
  double pairs, picked; /* (row, visible key) and (row, picked key) pairs */
  int64_t *offset;      /* host, [experts + 1] */
  wn_tensor *expert;    /* host, [experts] */
} wn_bench;

/* Makes `noise`; before anything else. */
WN_MUST_USE wn_status wn_bench_noise(wn_bench *b);
/* Operand `i`: random normal numbers times `deviation` (0: zeros), from the stash; its bytes count as work. */
WN_MUST_USE wn_status wn_bench_in(wn_bench *b, wn_role role, double deviation, int32_t rank, int64_t d0, int64_t d1,
                                  int64_t d2);
WN_MUST_USE wn_status wn_bench_out_of(wn_bench *b, wn_role role, wn_bench_out kind, int32_t rank, int64_t d0,
                                      int64_t d1, int64_t d2);
/* An input of integers; `host` is dense. */
WN_MUST_USE wn_status wn_bench_ints(wn_bench *b, const int32_t *host, int32_t rank, int64_t d0, int64_t d1);
/* Random numbers, zeros or NaN into any tensor of the device. */
WN_MUST_USE wn_status wn_bench_fill(wn_bench *b, wn_tensor *t, double deviation);
WN_MUST_USE wn_status wn_bench_poison(wn_bench *b, wn_tensor *t);
/* Elements that are not finite. */
WN_MUST_USE wn_status wn_bench_not_finite(wn_bench *b, int64_t *count, const wn_tensor *t);
/* Host memory until the next operation. */
WN_MUST_USE wn_status wn_bench_host(wn_bench *b, void **out, int64_t bytes);
/* Makes `rows`, the last s.rows of s.seq causal ones, each within its document; counts pairs, and picks of s.topk. */
WN_MUST_USE wn_status wn_bench_causal(wn_bench *b);
/* The first key that one of them sees, and how many it sees. */
int64_t wn_bench_first(const wn_bench *b, int64_t row);
int64_t wn_bench_visible(const wn_bench *b, int64_t row);
/* A tensor's elements as doubles in host memory, row-major. */
WN_MUST_USE wn_status wn_bench_values(wn_bench *b, double **out, wn_tensor t);
/* WN_E_CHECK unless ||got - expected|| is within the device's rounding of ||expected||. */
WN_MUST_USE wn_status wn_bench_close(const wn_bench *b, const char *what, const double *got, const double *expected,
                                     int64_t n);

/* Runs `run` until it has been warmed up and timed: *times gets *n seconds in ascending order (host memory). */
WN_MUST_USE wn_status wn_bench_time(wn_bench *b, wn_status (*run)(wn_bench *, void *), void *context, double **times,
                                    int32_t *n);
/* What the host waits for before it looks at a clock. */
WN_MUST_USE wn_status wn_bench_start(wn_bench *b, double *mark);
WN_MUST_USE wn_status wn_bench_stop(wn_bench *b, double mark, double *seconds);
/* Measures copy_rate and product_rate (NaN where the operation is absent). */
WN_MUST_USE wn_status wn_bench_limits(wn_bench *b);

typedef struct wn_bench_case {
  const char *name;
  size_t entry; /* offset of the function in wn_ops */
  wn_status (*make)(wn_bench *);
  wn_status (*run)(wn_bench *);
  wn_status (*check)(wn_bench *); /* one row in FP64; NULL: outputs are only seen to be written and finite */
} wn_bench_case;
#define WN_BENCH_CASE(name, check)                                                                                     \
  { #name, offsetof(struct wn_ops, name), name##_make, name##_run, check }

extern const wn_bench_case wn_bench_dense[], wn_bench_attention[]; /* end with a name of NULL */

/* One cell after another; `real` NaN is an empty cell. */
typedef struct wn_bench_cell {
  const char *name, *text; /* text NULL: a number */
  double real;
} wn_bench_cell;
/* A CSV row on standard output (before the first, the header), and in the file `csv` where it is not NULL. */
WN_MUST_USE wn_status wn_bench_row(const wn_bench_cell *cells, int32_t n, bool first, const char *csv);

/* One MoE layer of these sizes, whole: stage 1 (dense forward and the indexer's KL) or 2 (sparse forward, backward).
 * memory: the table of its scratch on standard error. */
WN_MUST_USE wn_status wn_bench_layer(wn_bench *b, int32_t stage, const char *csv, bool memory);

#endif
