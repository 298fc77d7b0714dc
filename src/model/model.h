/* The model without autograd: forward and hand-written backward of every layer, written once against the operation
 * table. Weights and gradients come as tensors by parameter (from the store, or from a test). Rows, not batches: a
 * pass runs over the rows of one or more whole sequences laid end to end; wn_rows says what each sees. All gradients
 * are sums. */
#ifndef WN_MODEL_MODEL_H
#define WN_MODEL_MODEL_H

#include "kernels/kernels.h"
#include "model/params.h"

typedef enum wn_selection {
  WN_SELECT_DENSE, /* no selection: dense attention */
  WN_SELECT_INDEXER,
  WN_SELECT_BEST,
  WN_SELECT_RECENT,
  WN_SELECT_SINK,
  WN_SELECT_RANDOM,
  WN_N_SELECTIONS
} wn_selection;
const char *wn_selection_name(wn_selection selection);

typedef enum wn_attention_form {
  WN_FORM_AUTO,     /* in a pass: wn_model_attention_form decides */
  WN_FORM_ABSORBED, /* keys and values are the latents, shared by all heads */
  WN_FORM_MASKED    /* a head's own keys and values, made from the latents */
} wn_attention_form;

typedef struct wn_model {
  wn_model_config config;
  wn_param_table table;
  wn_device *device;
  float *inv_freq;        /* [rope / 2] */
  double softmax_scale;   /* attention's, with mscale^2 */
  double index_scale;     /* index_head_dim^-0.5 */
  int64_t *expert_offset; /* [n_routed_experts + 1], working memory of MoE layers: a model runs one pass at a time */
  int32_t moe_rows;       /* WN_MOE_ROWS: rows whose copies for experts exist at once in a forward without a backward */
} wn_model;

/* 8 copies each of 7168 columns in and out, and 3 of 2048 between: 10.7 GB for V3.1 in BF16, less than its attention
 * takes at 128K. */
enum { WN_MOE_ROWS = 1 << 15 };

/* WN_E_CONFIG: widths that a GPU's operations are not built for; WN_E_MEMORY. */
WN_MUST_USE wn_status wn_model_create(wn_model **out, wn_device *device, const wn_model_config *config,
                                      wn_param_settings settings);
void wn_model_free(wn_model *model);
/* A pure function of the sizes: ABSORBED when it takes fewer multiplications. Making k_nope and v from the latents
 * (kv_b, a row) costs as much as absorbing q and un-absorbing o, so what differs, a row, is
 *
 * - absorbed: max(heads, head_tile) * picked * (2 latent + rope), with picked = min(topk, n_keys); head_tile: the heads
 *   that a device computes at least where all share a key (wn_device);
 * - masked: heads * visible * (nope + rope + v), with visible = (n_keys + 1) / 2, a causal row's mean: it reads every
 *   tile.
 *
 * With V3.2's sizes and 2048 picks, absorbed from 13926 keys on. n_keys: the length of a sequence. */
wn_attention_form wn_model_attention_form(const wn_model_config *config, int32_t head_tile, int32_t n_keys,
                                          int32_t topk);

/* What a pass does; the same for all layers and all micro-batches of a step. */
typedef struct wn_pass {
  wn_selection selection;
  int32_t topk;           /* picks a row; for selection other than dense, and for stats */
  wn_attention_form form; /* of a sparse pass; leave it AUTO (0) but in tests */
  bool indexer_kl;        /* make kl: over all visible keys when dense, over the selection when sparse */
  bool indexer_grads;     /* and the indexer's gradients, times kl_coeff */
  double kl_coeff;
  int32_t rows_per_sequence; /* for the sequence-wise balance loss */
  double balance_coeff;      /* gradient of balance_coeff * sum over sequences of sum_e f_e P_e */
  uint64_t seed;             /* WN_SELECT_RANDOM */
} wn_pass;

/* Whether attention in such a pass runs over a head's own keys, dense or masked, so that a replay can keep its result.
 * The absorbed form's is latent wide a head, four times as much with V3.2's sizes: it is computed again. */
bool wn_model_keeps_attention(const wn_model *model, const wn_pass *pass, int32_t n_keys);

/* What one layer's forward leaves for its backward, besides hidden states: its choices and, where it can be kept,
 * attention's result, which is then not computed again; the same bits either way. Tensors from the caller; data NULL
 * where not kept. */
typedef struct wn_replay {
  wn_tensor expert;                   /* [n,K] INDEX */
  wn_tensor selection;                /* [n,k] INDEX */
  wn_tensor o, lse;                   /* [n,H,v] STAT, unrounded, since delta comes from it; [n,H] STAT */
  struct wn_kept *kept;               /* all else that a backward needs, from wn_model_keep; NULL: computed again */
  bool force_expert, force_selection; /* take what is there; else it is written */
} wn_replay;

/* Room in `replay` for all that the forward of a layer computes and its backward needs: the forward then puts it into
 * the stash, where it stays, and the backward computes nothing again. The table itself is in device->host. */
WN_MUST_USE wn_status wn_model_keep(const wn_model *model, wn_replay *replay);

/* What one layer's pass measures. Tensors from the caller; data NULL: not wanted. */
typedef struct wn_layer_measures {
  wn_tensor kl;                /* [n] STAT, = */
  wn_tensor load;              /* [E] INDEX, += */
  wn_tensor balance;           /* [1] STAT, += */
  wn_tensor sample;            /* [s] INDEX, input: rows for stats */
  wn_tensor stats;             /* [s, WN_N_STATS] STAT, = */
  wn_tensor picks, picks_prev; /* [s,k] INDEX: output; input (data NULL at the first layer) */
  wn_tensor attention;         /* [n,D] ACT, =: the attention block's output after o_proj */
  wn_tensor index_scores;      /* [n,n] STAT, = (dumps only) */
  wn_tensor topk;              /* [n,k] INDEX, =: the indexer's picks even in a dense pass (dumps only) */
} wn_layer_measures;

/* h_out[n,D] from h_in[n,D] (may not overlap); h_mid[n,D] (the residual between attention and MLP) may be NULL
 * where no backward follows. The rows are the keys: rows->n_rows == rows->n_keys. With pass->indexer_grads in a DENSE
 * pass (stage 1) the indexer's gradients are added to `grads` here, where `grads` has them: a dense pass that also runs
 * the backward gives `grads` to one of the two only. With a sparse pass, indexer_kl in a forward makes kl (p costs one
 * more pass); set it only where no backward follows. grads, replay, measures may be NULL. Hidden states depend on the
 * indexer only through the selection of WN_SELECT_INDEXER. WN_E_MEMORY when scratch runs out. */
WN_MUST_USE wn_status wn_layer_forward(wn_model *model, int32_t layer, const wn_layer_tensors *weights,
                                       wn_layer_tensors *grads, const wn_pass *pass, const wn_rows *rows,
                                       wn_tensor *h_out, wn_tensor *h_mid, const wn_tensor *h_in, wn_replay *replay,
                                       wn_layer_measures *measures);
/* Recomputes the layer from h_in and h_mid (the MLP first, from h_mid; then attention, with the choices of replay
 * forced where it holds them: selection and experts are exactly those of the forward). dh[n,D] comes in as the
 * gradient of h_out and leaves as that of h_in. Gradients that exist in `grads` are added to; the base's must exist.
 * Of the measures only kl is made (loads and the like are the forward's). The indexer's leaf follows the attention:
 * from p (sparse) or, in a dense pass with indexer_grads, from indexer_kl_dense; no gradient flows from it into the
 * base. */
WN_MUST_USE wn_status wn_layer_backward(wn_model *model, int32_t layer, const wn_layer_tensors *weights,
                                        wn_layer_tensors *grads, const wn_pass *pass, const wn_rows *rows,
                                        wn_tensor *dh, const wn_tensor *h_in, const wn_tensor *h_mid, wn_replay *replay,
                                        wn_layer_measures *measures);

/* h[n,D] = embedding of tokens[n]; and its gradient. weights bound for layer -1. */
WN_MUST_USE wn_status wn_model_embed(wn_model *model, const wn_layer_tensors *weights, wn_tensor *h,
                                     const wn_tensor *tokens);
WN_MUST_USE wn_status wn_model_embed_backward(wn_model *model, wn_layer_tensors *grads, const wn_tensor *dh,
                                              const wn_tensor *tokens);
/* Final norm and head: logp[n] of target[n] (-1: none). With dh (may be NULL): dh[n,D] = gradient of -sum weight logp
 * with respect to h, and head and norm gradients added. weights bound for layer L. */
WN_MUST_USE wn_status wn_model_head(wn_model *model, const wn_layer_tensors *weights, wn_layer_tensors *grads,
                                    wn_tensor *logp, wn_tensor *dh, const wn_tensor *h, const wn_tensor *target,
                                    const wn_tensor *weight);
/* Full logits [n,V] (dumps only). */
WN_MUST_USE wn_status wn_model_logits(wn_model *model, const wn_layer_tensors *weights, wn_tensor *logits,
                                      const wn_tensor *h);

#endif
