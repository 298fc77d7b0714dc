/* The operation table: every operation's contract, once. The CPU and the CUDA device each fill it; model code is
 * written once against it.
 *
 * Conventions, for every operation:
 * - Outputs first, then inputs, then sizes and constants in a params struct.
 * - Letters: n rows (queries), m keys, D width, O outputs, H heads, HI indexer heads, dI indexer width, k top-k,
 *   E experts, K experts a token, V vocabulary. Shapes stand in brackets; [ACT] [STAT] [WGRAD] [INDEX] is the role
 *   (base/device.h). Weights come in ACT, except where marked. Row strides are free (slices are views); the last
 *   dimension is dense; where heads are a dimension, the head stride is free too.
 * - "+=" means accumulated into what is there; everything else is overwritten, whole, whatever it held.
 * - "may be null" means the wn_tensor pointer may be NULL.
 * - Temporaries come from device->scratch and are released on return. Scratch and memory are O(n + m) times widths.
 * - Shape, dtype and layout are asserted (programmer errors). A status means the device failed or scratch ran out.
 * - Results do not depend on the number of threads, and repeat bit for bit: work is cut by fixed chunks, sums run in
 *   a fixed order.
 * - Softmax, log-sum-exp, KL, router, norms, indexer weights and all reductions are in STAT precision or better.
 * - Gradients are sums over rows; no operation divides by a count.
 * - On a dry device (device->dry) operations check and allocate as ever and do nothing else: they read and write no
 *   operand. What goes to the host is 0; experts get equal shares of the rows. */
#ifndef WN_KERNELS_H
#define WN_KERNELS_H

#include "base/device.h"

/* Row i sees keys first_key[i] .. last_key[i] (inclusive, key coordinates 0 .. n_keys-1). first > last: an empty row:
 * output 0, lse -inf, gradients 0, picks all -1. position[i] is the row's rope position. Arrays live on the device. */
typedef struct wn_rows {
  int32_t n_rows, n_keys;
  const int32_t *first_key, *last_key, *position;
} wn_rows;

/* ---- products ------------------------------------------------------------------------------------------------ */

typedef struct wn_accumulate {
  bool accumulate;
} wn_accumulate; /* true: y += instead of y = */

/* W of one head each: head h is w[h] as [rows, cols] (strides free but for the last). transpose false: y = x W
 * (absorb W_UK: rows = nope, cols = latent); true: y = x W^T (un-absorb W_UV: rows = v, cols = latent). */
typedef struct wn_per_head_params {
  bool transpose, accumulate;
} wn_per_head_params;

/* ---- norms, rope, elementwise -------------------------------------------------------------------------------- */

typedef struct wn_norm_params {
  double eps;
  bool accumulate; /* backward: dx += */
} wn_norm_params;

/* Angles are position * inv_freq[j], both in FP32, product in FP32 (as the reference implementations).
 * interleaved: pairs (2j, 2j+1) (MLA); else pairs (j, j + r/2) (indexer). inverse: rotate by the negative angle,
 * which is the backward. */
typedef struct wn_rope_params {
  const float *inv_freq; /* [r/2], host memory; r = x's last dimension */
  bool interleaved, inverse;
} wn_rope_params;

/* ---- head ---------------------------------------------------------------------------------------------------- */

typedef struct wn_head_params {
  int32_t chunk_rows; /* logits exist for this many rows at a time */
} wn_head_params;

/* ---- mixture of experts -------------------------------------------------------------------------------------- */

/* s = sigmoid(x Wg^T); b = s + bias (selection only); group score = sum of the two largest b of a group (the one, when
 * groups hold one expert); keep topk_group groups; the K largest b of the kept groups, lowest expert on ties;
 * w = s[chosen] (/ (sum + 1e-20) when norm_topk) * scale. Source: DeepSeek-V3 report 2.1.2, HF DeepseekV3TopkRouter. */
typedef struct wn_router_params {
  int32_t n_group, topk_group;
  bool norm_topk;
  double scale;
  bool forced;               /* index is an input (replay): choose nothing, take those experts */
  int32_t rows_per_sequence; /* for the sequence-wise balance loss: rows come as whole sequences of this length */
  double balance_coeff;      /* alpha of the balance loss; 0: none. Backward scales its gradient by it */
} wn_router_params;

/* moe_permute's offsets where nobody chose: equal shares. */
static inline void wn_even_offsets(int64_t *offset, int64_t pairs, int32_t n_experts) {
  for (int32_t e = 0; e <= n_experts; e++) offset[e] = pairs * e / n_experts;
}

/* ---- attention ----------------------------------------------------------------------------------------------- */

typedef struct wn_attention_params {
  double scale;    /* softmax scale, with YaRN's mscale^2 where the model has it */
  int32_t v_width; /* attention_sparse only: values are the first v_width columns of kv */
} wn_attention_params;

typedef struct wn_indexer_params {
  double scale;           /* dI^-0.5, applied to q.k; the weights already carry HI^-0.5 */
  double attention_scale; /* indexer_kl_dense and selection_stats: softmax scale of the attention */
  double coeff;           /* KL gradients are multiplied by it; values never are */
} wn_indexer_params;

typedef enum wn_pattern { WN_PATTERN_RECENT, WN_PATTERN_SINK, WN_PATTERN_RANDOM } wn_pattern;

typedef struct wn_pattern_params {
  wn_pattern pattern;
  uint64_t seed; /* random: a row's picks are a pure function of (seed, row position, layer) */
  int32_t layer;
} wn_pattern_params;

/* Columns of selection_stats, one row per sampled row; formulas in docs/formats.md (layers.csv). A row that sees at
 * most k keys has WN_STAT_COUNTED 0 and its other columns 0. */
typedef enum wn_stat_column {
  WN_STAT_COUNTED,  /* 1: the row sees more than k keys */
  WN_STAT_KL_DENSE, /* KL(p || softmax(I)) over all visible keys */
  WN_STAT_KL_UNIFORM,
  WN_STAT_MASS_AT_K,
  WN_STAT_MASS_BEST,
  WN_STAT_MASS_RECENT,
  WN_STAT_MASS_SINK,   /* the first 4 visible keys and the last k - 4 */
  WN_STAT_MASS_RANDOM, /* k / visible */
  WN_STAT_RECALL_AT_K,
  WN_STAT_TOP1_HIT,
  WN_STAT_ENTROPY_TARGET, /* of p, nats */
  WN_STAT_ENTROPY_INDEX,  /* of softmax(I), nats */
  WN_STAT_SELECT_DIST,    /* mean over picks of (row's last key - pick) */
  WN_STAT_SELECT_LOCAL,   /* share of picks with distance under 128 */
  WN_STAT_IOU_PREV,       /* Jaccard with previous picks; NaN where picks_prev is null */
  WN_STAT_DENSITY,        /* picked / visible */
  WN_N_STATS
} wn_stat_column;

/* ---- optimizer ----------------------------------------------------------------------------------------------- */

typedef struct wn_adamw_params {
  double lr, beta1, beta2, eps, weight_decay; /* decoupled decay: w -= lr * weight_decay * w; 0 for no decay */
  double grad_scale;                          /* g = grad * grad_scale (divisor and clip in one) */
  int64_t step;                               /* this group's Adam clock, from 1: bias corrections 1 - beta^step */
} wn_adamw_params;

struct wn_ops {
  const char *name; /* "cpu", "cuda" */

  /* ---- memory ---- */
  wn_status (*zero)(wn_device *, wn_tensor *x);
  /* dst = src with conversion between F32, F64, BF16 (any pair) or a plain copy of equal dtypes; same shape, any
   * strides. */
  wn_status (*cast)(wn_device *, wn_tensor *dst, const wn_tensor *src);
  /* w[O,I] [ACT] = BF16(codes[O,I] * scale[ceil(O/128), ceil(I/128)]): E4M3 codes times the F32 scale of their 128 x
   * 128 block, in FP32, rounded to BF16 whatever ACT is, so that every device computes with the same weights. All
   * dense. NaN codes and scales give NaN. Source: weight_dequant of the DeepSeek-V3 release. */
  wn_status (*dequantise)(wn_device *, wn_tensor *w, const wn_tensor *codes, const wn_tensor *scale);
  /* Dense host memory to device and back, dtype as the tensor's; download waits for the device. */
  wn_status (*upload)(wn_device *, wn_tensor *dst, const void *host);
  wn_status (*download)(wn_device *, void *host, const wn_tensor *src);

  /* ---- products ---- */
  /* y[n,O] (+)= x[n,I] w[O,I]^T */
  wn_status (*linear)(wn_device *, wn_tensor *y, const wn_tensor *x, const wn_tensor *w, const wn_accumulate *);
  /* dx[n,I] (+)= dy[n,O] w[O,I] */
  wn_status (*linear_backward_input)(wn_device *, wn_tensor *dx, const wn_tensor *dy, const wn_tensor *w,
                                     const wn_accumulate *);
  /* dw[O,I] [WGRAD] += dy[n,O]^T x[n,I] */
  wn_status (*linear_backward_weight)(wn_device *, wn_tensor *dw, const wn_tensor *dy, const wn_tensor *x);
  /* transpose false: y[n,H,cols] (+)= x[n,H,rows] w[H,rows,cols]; true: y[n,H,rows] (+)= x[n,H,cols] w[H,rows,cols]^T.
   * The backward with respect to x is the same operation with transpose flipped. */
  wn_status (*per_head_linear)(wn_device *, wn_tensor *y, const wn_tensor *x, const wn_tensor *w,
                               const wn_per_head_params *);
  /* dw[H,rows,cols] [WGRAD] += a[n,H,rows]^T b[n,H,cols]  (transpose false: a = x, b = dy; true: a = dy, b = x) */
  wn_status (*per_head_linear_backward_weight)(wn_device *, wn_tensor *dw, const wn_tensor *a, const wn_tensor *b);

  /* ---- norms, rope, elementwise ---- */
  /* y[n,D] = x * r * w[D], r[n] [STAT] = (mean(x^2) + eps)^-0.5, saved for the backward */
  wn_status (*rms_norm)(wn_device *, wn_tensor *y, wn_tensor *r, const wn_tensor *x, const wn_tensor *w,
                        const wn_norm_params *);
  /* dx[n,D] (+)=, dw[D] [WGRAD] += (may be null) */
  wn_status (*rms_norm_backward)(wn_device *, wn_tensor *dx, wn_tensor *dw, const wn_tensor *dy, const wn_tensor *x,
                                 const wn_tensor *r, const wn_tensor *w, const wn_norm_params *);
  /* y[n,D] = (x - mean) * r * w[D] + b[D]; stat[n,2] [STAT] = (mean, r), r = (variance + eps)^-0.5 */
  wn_status (*layer_norm)(wn_device *, wn_tensor *y, wn_tensor *stat, const wn_tensor *x, const wn_tensor *w,
                          const wn_tensor *b, const wn_norm_params *);
  /* dx may be null; dw, db [WGRAD] += */
  wn_status (*layer_norm_backward)(wn_device *, wn_tensor *dx, wn_tensor *dw, wn_tensor *db, const wn_tensor *dy,
                                   const wn_tensor *x, const wn_tensor *stat, const wn_tensor *w,
                                   const wn_norm_params *);
  /* in place, x[n,h,r] (a view: the rope slice of each head), r even; position [n] int32 on the device */
  wn_status (*rope)(wn_device *, wn_tensor *x, const int32_t *position, const wn_rope_params *);
  /* y[n,D] = a + b; y may be a or b */
  wn_status (*add)(wn_device *, wn_tensor *y, const wn_tensor *a, const wn_tensor *b);
  /* y[...] = x * factor; y may be x */
  wn_status (*scale)(wn_device *, wn_tensor *y, const wn_tensor *x, double factor);
  /* y[n,D] (+)= sum over h of x[n,h,D] (k_pe's gradient from all heads) */
  wn_status (*sum_heads)(wn_device *, wn_tensor *y, const wn_tensor *x, const wn_accumulate *);
  /* y[n,h,D] = x[n,D] for every head (k_pe to all heads) */
  wn_status (*broadcast_heads)(wn_device *, wn_tensor *y, const wn_tensor *x);
  /* y[n,F] = silu(gate[n,F]) * up[n,F] */
  wn_status (*swiglu)(wn_device *, wn_tensor *y, const wn_tensor *gate, const wn_tensor *up);
  /* dgate, dup [n,F]; they may be gate and up themselves */
  wn_status (*swiglu_backward)(wn_device *, wn_tensor *dgate, wn_tensor *dup, const wn_tensor *dy,
                               const wn_tensor *gate, const wn_tensor *up);
  /* h[n,D] = w[V,D][token]; tokens [n] INDEX, each in 0 .. V-1 (asserted; data checks its files) */
  wn_status (*embedding)(wn_device *, wn_tensor *h, const wn_tensor *tokens, const wn_tensor *w);
  /* dw[V,D] [WGRAD] += */
  wn_status (*embedding_backward)(wn_device *, wn_tensor *dw, const wn_tensor *dh, const wn_tensor *tokens);

  /* ---- head ---- */
  /* logp[n] [STAT] = log softmax(h w^T)[target]; target[n] INDEX, -1: no target (logp 0, weight ignored).
   * With dh: dh[n,D] = and dw[V,D] [WGRAD] += gradients of -sum_i weight[i] logp[i]; weight[n] [STAT].
   * dh, dw, weight may be null together. Logits [chunk_rows, V] are the only ones that ever exist. */
  wn_status (*head_loss)(wn_device *, wn_tensor *logp, wn_tensor *dh, wn_tensor *dw, const wn_tensor *h,
                         const wn_tensor *w, const wn_tensor *target, const wn_tensor *weight, const wn_head_params *);

  /* ---- mixture of experts ---- */
  /* scores[n,E] [STAT], index[n,K] INDEX (descending by biased score; an input when forced), weight[n,K] [STAT],
   * load[E] [INDEX] += tokens of each expert, balance[1] [STAT] += sum over sequences of
   * sum_e f_e P_e (f_e = E/(K T) count_e, P_e = mean_t s_e / sum_j s_j; coefficient not applied; may be null).
   * x[n,D], w[E,D], bias[E] [STAT]. */
  wn_status (*router)(wn_device *, wn_tensor *scores, wn_tensor *index, wn_tensor *weight, wn_tensor *load,
                      wn_tensor *balance, const wn_tensor *x, const wn_tensor *w, const wn_tensor *bias,
                      const wn_router_params *);
  /* dx[n,D] +=, dw[E,D] [WGRAD] +=, from dweight[n,K] [STAT] and the balance loss (sum over sequences of
   * balance_coeff * sum_e f_e P_e; f_e is a count and has no gradient). */
  wn_status (*router_backward)(wn_device *, wn_tensor *dx, wn_tensor *dw, const wn_tensor *dweight,
                               const wn_tensor *scores, const wn_tensor *index, const wn_tensor *x, const wn_tensor *w,
                               const wn_router_params *);
  /* Sorts (row, choice) pairs by expert, then row: xp[n*K,D] = x[row], slot[n*K] INDEX: place of pair row*K+choice in
   * xp; offset[E+1] host memory: expert e owns places offset[e] .. offset[e+1]-1 (the one host read of an MoE layer).
   */
  wn_status (*moe_permute)(wn_device *, wn_tensor *xp, wn_tensor *slot, int64_t *offset, const wn_tensor *x,
                           const wn_tensor *index, int32_t n_experts);
  /* dx[n,D] += sum over choices of dxp[slot] */
  wn_status (*moe_permute_backward)(wn_device *, wn_tensor *dx, const wn_tensor *dxp, const wn_tensor *slot);
  /* for each expert e: y[offset[e]..] = x[offset[e]..] w[e]^T; w is an array of E tensors [O,I] */
  wn_status (*grouped_linear)(wn_device *, wn_tensor *y, const wn_tensor *x, const wn_tensor *w, int32_t n_experts,
                              const int64_t *offset, const wn_accumulate *);
  wn_status (*grouped_linear_backward_input)(wn_device *, wn_tensor *dx, const wn_tensor *dy, const wn_tensor *w,
                                             int32_t n_experts, const int64_t *offset, const wn_accumulate *);
  /* dw[e] [WGRAD] += dy^T x */
  wn_status (*grouped_linear_backward_weight)(wn_device *, wn_tensor *dw, const wn_tensor *dy, const wn_tensor *x,
                                              int32_t n_experts, const int64_t *offset);
  /* y[n,D] += sum over choices of weight[n,K] * yp[slot], in choice order */
  wn_status (*moe_combine)(wn_device *, wn_tensor *y, const wn_tensor *yp, const wn_tensor *slot,
                           const wn_tensor *weight);
  /* dyp[n*K,D] = weight * dy[row], dweight[n,K] [STAT] = dy[row] . yp[slot] */
  wn_status (*moe_combine_backward)(wn_device *, wn_tensor *dyp, wn_tensor *dweight, const wn_tensor *dy,
                                    const wn_tensor *yp, const wn_tensor *slot, const wn_tensor *weight);

  /* ---- attention ---- */
  /* s = scale q.k over visible keys; o[n,H,dv] = softmax(s) v; lse[n,H] [STAT] natural log.
   * q[n,H,dq], k[m,H,dq], v[m,H,dv]. With d_o[n,H,dv]: delta[n,H] [STAT] = sum(d_o * o), from the unrounded o
   * (delta and d_o may be null together). o is [ACT], or without d_o also [STAT]: unrounded, for attention_delta.
   * What is not finite: on a GPU a row with a score that is NaN or +inf is NaN in o, lse and delta. Rows that do not
   * see the value may be NaN too, since tiles of 64 to 256 rows and 64 or 128 keys are multiplied whole, and 0 * NaN is
   * NaN: for a v in o, for k, v, q and d_o in the gradients. It cannot pass unseen: a step whose loss or norm is not
   * finite moves nothing. */
  wn_status (*attention_dense)(wn_device *, wn_tensor *o, wn_tensor *lse, wn_tensor *delta, const wn_tensor *d_o,
                               const wn_tensor *q, const wn_tensor *k, const wn_tensor *v, const wn_rows *,
                               const wn_attention_params *);
  /* dq = , dk +=, dv += (so that row chunks add up) */
  wn_status (*attention_dense_backward)(wn_device *, wn_tensor *dq, wn_tensor *dk, wn_tensor *dv, const wn_tensor *d_o,
                                        const wn_tensor *q, const wn_tensor *k, const wn_tensor *v,
                                        const wn_tensor *lse, const wn_tensor *delta, const wn_rows *,
                                        const wn_attention_params *);
  /* The same over selection[n,k] INDEX only (distinct visible keys, ascending, -1 only at the end; a masked key or -1
   * is never read). Absorbed: q[n,H,c+r], kv[m,c+r] shared by all heads, values its first v_width columns. */
  wn_status (*attention_sparse)(wn_device *, wn_tensor *o, wn_tensor *lse, wn_tensor *delta, const wn_tensor *d_o,
                                const wn_tensor *q, const wn_tensor *kv, const wn_tensor *selection, const wn_rows *,
                                const wn_attention_params *);
  /* dq =, dkv [WGRAD] +=, p[n,k] [STAT] = mean over heads of the probabilities, 0 at -1 (p may be null; dq, dkv, d_o,
   * delta may be null together: then p alone is made). */
  wn_status (*attention_sparse_backward)(wn_device *, wn_tensor *dq, wn_tensor *dkv, wn_tensor *p, const wn_tensor *d_o,
                                         const wn_tensor *q, const wn_tensor *kv, const wn_tensor *selection,
                                         const wn_tensor *lse, const wn_tensor *delta, const wn_rows *,
                                         const wn_attention_params *);
  /* The same selection in the per-head form of attention_dense. */
  wn_status (*attention_masked)(wn_device *, wn_tensor *o, wn_tensor *lse, wn_tensor *delta, const wn_tensor *d_o,
                                const wn_tensor *q, const wn_tensor *k, const wn_tensor *v, const wn_tensor *selection,
                                const wn_rows *, const wn_attention_params *);
  wn_status (*attention_masked_backward)(wn_device *, wn_tensor *dq, wn_tensor *dk, wn_tensor *dv, wn_tensor *p,
                                         const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k,
                                         const wn_tensor *v, const wn_tensor *selection, const wn_tensor *lse,
                                         const wn_tensor *delta, const wn_rows *, const wn_attention_params *);
  /* From an unrounded o[n,H,dv] [STAT] that attention_dense or attention_masked left: delta[n,H] [STAT] and o [ACT],
   * the same bits that they make with d_o[n,H,dv]. */
  wn_status (*attention_delta)(wn_device *, wn_tensor *delta, wn_tensor *o, const wn_tensor *unrounded,
                               const wn_tensor *d_o);

  /* ---- lightning indexer: I[t,s] = sum_h w[t,h] relu(scale q[t,h].k[s]) ---- */
  /* scores[n,m] [STAT], -inf where not visible: for dumps and tests only (T x T) */
  wn_status (*indexer_scores)(wn_device *, wn_tensor *scores, const wn_tensor *q, const wn_tensor *k,
                              const wn_tensor *w, const wn_rows *, const wn_indexer_params *);
  /* selection[n,k] INDEX: the k visible keys of largest score, lowest key on ties (-0 equals 0; NaN counts as -inf),
   * written ascending, -1 at the end. q[n,HI,dI], k[m,dI] [ACT], w[n,HI] [STAT]. */
  wn_status (*indexer_select)(wn_device *, wn_tensor *selection, const wn_tensor *q, const wn_tensor *k,
                              const wn_tensor *w, const wn_rows *, const wn_indexer_params *);
  /* p[t,s] = mean over heads of exp(attention_scale qa.ka - lse) over visible keys. kl[n] [STAT] = sum_s p (log p -
   * log softmax(I)), 0 for rows that see fewer than two keys. Gradients of coeff * sum of kl: g = coeff (softmax(I) -
   * p); dq[n,HI,dI] =, dk[m,dI] [WGRAD] +=, dw[n,HI] [STAT] = (null together: value only). Source:
   * DeepSeek-V3.2 report (arXiv 2512.02556), eq. (3). qa[n,H,dq], ka[m,H,dq] (or [m,1,dq], shared), lse[n,H].
   * A value that is not finite shows in kl of the rows that see it and of no others; in the gradients it may also reach
   * rows and keys nearby that do not see it, as 0 times it. */
  wn_status (*indexer_kl_dense)(wn_device *, wn_tensor *kl, wn_tensor *dq, wn_tensor *dk, wn_tensor *dw,
                                const wn_tensor *q, const wn_tensor *k, const wn_tensor *w, const wn_tensor *qa,
                                const wn_tensor *ka, const wn_tensor *lse, const wn_rows *, const wn_indexer_params *);
  /* The same over selection[n,k], given p[n,k] from the attention's backward. Source: eq. (4). kl of a row with fewer
   * than two picks is 0. */
  wn_status (*indexer_kl_sparse)(wn_device *, wn_tensor *kl, wn_tensor *dq, wn_tensor *dk, wn_tensor *dw,
                                 const wn_tensor *q, const wn_tensor *k, const wn_tensor *w, const wn_tensor *selection,
                                 const wn_tensor *p, const wn_rows *, const wn_indexer_params *);
  /* For s sampled rows: stats[s, WN_N_STATS] [STAT], picks[s,k] INDEX = the indexer's picks, computed exactly from p
   * and I over all visible keys. sample[s] INDEX: row numbers. picks_prev may be null. qa[n,H,dq], ka[m,H,dq] or
   * [m,1,dq]. */
  wn_status (*selection_stats)(wn_device *, wn_tensor *stats, wn_tensor *picks, const wn_tensor *sample,
                               const wn_tensor *picks_prev, const wn_tensor *q, const wn_tensor *k, const wn_tensor *w,
                               const wn_tensor *qa, const wn_tensor *ka, const wn_rows *, const wn_indexer_params *);
  /* selection[n,k]: the k visible keys of largest p (dense, head-averaged), lowest key on ties: eval's upper bound. */
  wn_status (*select_best)(wn_device *, wn_tensor *selection, const wn_tensor *qa, const wn_tensor *ka, const wn_rows *,
                           const wn_attention_params *);
  /* selection[n,k]: recent = last k visible keys; sink = first 4 visible and last k-4; random = k distinct visible
   * keys. */
  wn_status (*select_pattern)(wn_device *, wn_tensor *selection, const wn_rows *, const wn_pattern_params *);

  /* ---- optimizer, on flat pieces ---- */
  /* master [MASTER], m, v [MOMENT] [n] updated from grad[n] [WGRAD]; weight[n] [ACT] = rounded master (null where
   * master is the weight itself). BF16 moments are rounded to nearest even as they are stored; the update itself takes
   * them before that. */
  wn_status (*adamw)(wn_device *, wn_tensor *master, wn_tensor *m, wn_tensor *v, wn_tensor *weight,
                     const wn_tensor *grad, const wn_adamw_params *);
  /* Of each of n tensors x[i]: sum[i] = the sum of squares in double, in fixed chunks; non_finite[i] = the number of
   * elements that are not finite, which are left out of the sum. Host results: waits for the device, once. */
  wn_status (*sum_squares)(wn_device *, double *sum, int64_t *non_finite, const wn_tensor *x, int32_t n);
};

#endif
