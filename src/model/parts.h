/* The parts of a layer, as layer.c puts them together. Private to src/model.
 *
 * Memory: what a part returns in its struct lies in c->state, in scratch above the caller's mark unless it is kept, and
 * goes when the layer releases it; a part's own temporaries are gone when it returns. */
#ifndef WN_MODEL_PARTS_H
#define WN_MODEL_PARTS_H

#include "model/model.h"

/* q_a_layernorm, kv_a_layernorm and the indexer's k_norm ignore rms_norm_eps, as transformers' do. */
#define WN_LATENT_EPS 1e-6

/* What every part of one layer's pass needs. n rows, which are the n keys too. */
typedef struct wn_call {
  wn_model *model;
  wn_device *device;
  const wn_ops *ops;
  const wn_model_config *config;
  const wn_layer_tensors *weights;
  wn_layer_tensors *grads; /* may be NULL */
  const wn_pass *pass;
  const wn_rows *rows;
  int32_t layer;
  int64_t n;
  int64_t moe_rows; /* rows that experts take at once in a forward: all, where a backward follows */
  bool sparse;
  wn_attention_form form; /* of a sparse pass: ABSORBED or MASKED */
  wn_arena *state;        /* of what the backward needs too: the stash in a forward that keeps it, else scratch */
  struct wn_kept *kept;   /* NULL: nothing but replay's tensors is kept */
} wn_call;

WN_MUST_USE wn_status wn_scratch(wn_call *c, wn_tensor *out, const char *name, wn_role role, int32_t rank, int64_t d0,
                                 int64_t d1, int64_t d2);
/* The same from c->state. */
WN_MUST_USE wn_status wn_state(wn_call *c, wn_tensor *out, const char *name, wn_role role, int32_t rank, int64_t d0,
                               int64_t d1, int64_t d2);
/* The gradient of a weight, or NULL where it is not wanted. */
wn_tensor *wn_call_grad(wn_call *c, wn_slot slot);
/* grads[slot] += dy^T x, where that gradient is wanted. */
WN_MUST_USE wn_status wn_call_weight_grad(wn_call *c, wn_slot slot, const wn_tensor *dy, const wn_tensor *x);
/* Rotates x[n,h,rope] in place (a view), or back. */
WN_MUST_USE wn_status wn_call_rope(wn_call *c, wn_tensor *x, bool interleaved, bool inverse);

/* ---- latent projections (mla.c) ---- */
typedef struct wn_mla {
  wn_tensor x, x_inv;      /* [n,D] normed input; [n] STAT inverse deviation */
  wn_tensor qa, qa_inv;    /* [n,q_lora]; [n] STAT; absent without a low-rank latent */
  wn_tensor qr;            /* [n,q_lora] normed, or x: what queries and the indexer's queries are made from */
  wn_tensor q;             /* [n,H,nope+rope], rotated */
  wn_tensor kv_raw, c_inv; /* [n,latent+rope] as projected; [n] STAT */
  wn_tensor kv;            /* [n,latent+rope]: normed latent | rotated k_pe */
} wn_mla;

WN_MUST_USE wn_status wn_mla_project(wn_call *c, wn_mla *m, const wn_tensor *h_in);
/* dh[n,D] += gradient of h_in through q and kv. dq[n,H,nope+rope] and dkv[n,latent+rope] are rotated back in place. */
WN_MUST_USE wn_status wn_mla_project_backward(wn_call *c, wn_tensor *dh, wn_tensor *dq, wn_tensor *dkv, const wn_mla *m,
                                              const wn_tensor *h_in);

/* ---- attention in its three forms (attention.c) ---- */
typedef struct wn_attention {
  wn_tensor up, k;      /* [n,H,nope+v]: k_nope | v; [n,H,nope+rope]. Absent in the absorbed form unless asked for */
  wn_tensor o;          /* [n,H,v] */
  wn_tensor lse, delta; /* [n,H] STAT; delta in the backward only */
  wn_tensor kept;       /* [n,H,v] STAT, and lse with it, from the caller: o unrounded, made by the forward and taken by
                           the backward; data NULL: not kept */
} wn_attention;

/* up and k, from the latents. */
WN_MUST_USE wn_status wn_attention_keys(wn_call *c, wn_attention *a, const wn_mla *m);
/* o and lse. selection[n,k] in a sparse pass, else NULL. p[n,k] STAT = mean over heads of the probabilities on the
 * selection (may be NULL; sparse only). up and k must be there in the dense and masked forms. */
WN_MUST_USE wn_status wn_attention_forward(wn_call *c, wn_attention *a, wn_tensor *p, const wn_mla *m,
                                           const wn_tensor *selection);
/* o and delta, lse too where it is not kept, and with them dq[n,H,nope+rope] =, dkv[n,latent+rope] =, kv_b's gradient
 * +=, p = (may be NULL). d_o[n,H,v]. */
WN_MUST_USE wn_status wn_attention_backward(wn_call *c, wn_attention *a, wn_tensor *dq, wn_tensor *dkv, wn_tensor *p,
                                            const wn_tensor *d_o, const wn_mla *m, const wn_tensor *selection);

/* ---- lightning indexer (indexer.c) ---- */
typedef struct wn_index_state {
  wn_tensor q;             /* [n,HI,dI], rotated */
  wn_tensor k_raw, k_stat; /* [n,dI] as projected; [n,2] STAT */
  wn_tensor k;             /* [n,dI], normed and rotated */
  wn_tensor w;             /* [n,HI] STAT, times HI^-0.5 */
} wn_index_state;

WN_MUST_USE wn_status wn_indexer_project(wn_call *c, wn_index_state *s, const wn_mla *m);
wn_indexer_params wn_indexer_constants(const wn_call *c);
/* kl[n] = KL of the pass: over all visible keys (selection NULL; needs a->k and a->lse) or on the selection, from p.
 * With `learn` the indexer's gradients, times kl_coeff, are added to grads. Nothing reaches the base. */
WN_MUST_USE wn_status wn_indexer_kl(wn_call *c, wn_tensor *kl, bool learn, const wn_index_state *s, const wn_mla *m,
                                    const wn_attention *a, const wn_tensor *selection, const wn_tensor *p);

/* ---- MLP and mixture of experts (moe.c) ---- */
typedef struct wn_gated {
  wn_tensor gate, up, act;
} wn_gated; /* [rows,F] each */

typedef struct wn_routed {
  wn_tensor scores, weight; /* [n,E], [n,K] STAT */
  wn_tensor xp, slot;       /* [n*K,D] rows sorted by expert; [n*K] INDEX */
  wn_gated g;               /* [n*K,F] */
  wn_tensor yp;             /* [n*K,D] outputs of the experts */
} wn_routed;

/* All that a layer's forward leaves for its backward, where everything is kept. */
typedef struct wn_kept {
  wn_mla mla;
  wn_attention attention;
  wn_index_state index; /* absent where the forward needs none */
  wn_tensor x, x_inv;   /* of the MLP: [n,D] normed input; [n] STAT */
  wn_gated gated;       /* of the layer's own MLP, or of its shared experts */
  wn_routed routed;
  int64_t *expert_offset; /* [n_routed_experts + 1] */
} wn_kept;

/* y[n,D] += MLP(x[n,D]), with the three weights from slot `gate` on (gate, up, down). */
WN_MUST_USE wn_status wn_mlp_forward(wn_call *c, wn_tensor *y, const wn_tensor *x, wn_slot gate);
/* dx[n,D] (+)= */
WN_MUST_USE wn_status wn_mlp_backward(wn_call *c, wn_tensor *dx, bool accumulate, const wn_tensor *dy,
                                      const wn_tensor *x, wn_slot gate);

typedef struct wn_moe_choice {
  wn_tensor expert; /* [n,K] INDEX: written, or read when forced */
  bool forced;
  wn_tensor load, balance; /* [E] INDEX +=; [1] STAT += (data NULL: not wanted) */
} wn_moe_choice;

/* Starts gathering the first part of a layer's experts, where they come in parts. */
WN_MUST_USE wn_status wn_moe_prefetch(const wn_layer_tensors *weights);
/* y[n,D] += experts and shared experts of x[n,D]. */
WN_MUST_USE wn_status wn_moe_forward(wn_call *c, wn_tensor *y, const wn_tensor *x, wn_moe_choice *choice);
/* dx[n,D] =, from dy and the balance loss. Recomputes from x; choice as in the forward. */
WN_MUST_USE wn_status wn_moe_backward(wn_call *c, wn_tensor *dx, const wn_tensor *dy, const wn_tensor *x,
                                      wn_moe_choice *choice);

#endif
