/* A dense base without low-rank queries (q_lora_rank null), read as a model of V3.2's form, which must have them.
 *
 * The queries are q = W x with x = g xhat, g the layer's input_layernorm and RMS(xhat) = sqrt(ms / (ms + eps)) for an
 * input of mean square ms. As q_lora_rank = hidden_size, q_a_proj = diag(d), q_a_layernorm = w and q_b_proj = W with
 * d = bf16(1 / g) and w = bf16(1 / d) they become W x', x'_i = w_i d_i x_i / sqrt(mean_j (d_j x_j)^2 + 1e-6), and the
 * indexer's queries are made from x' as well. BF16 has 8 bits, so |w_i d_i - 1| <= 2^-8 and |d_j g_j - 1| <=
 * 2^-8, and with them
 *
 *     |x'_i / x_i - 1| <= eps / (2 ms) + 2^-7 + 1e-6        (second-order terms left out)
 *
 * of which eps / (2 ms) is the same for all channels. docs/relatives.md says what it comes to. */
#ifndef WN_TRAIN_REWRITE_H
#define WN_TRAIN_REWRITE_H

#include "train/checkpoint_parts.h"

/* Opens a directory to read the weights of `config` from. Where that has an indexer and the directory whole queries,
 * these are called q_b_proj. WN_E_INPUT beside what wn_hf_dir_open says: a prediction layer with whole queries. */
WN_MUST_USE wn_status wn_source_open(wn_hf_dir **out, const char *path, const wn_model_config *config);
/* Whether p is not in the directory because the rewriting makes it (q_a_proj, q_a_layernorm). */
bool wn_rewrite_makes(const wn_hf_dir *source, const wn_param *p);
/* This rank's part of such a parameter. WN_E_INPUT naming the norm and the channel that has no inverse in BF16: 0, not
 * a number, or beyond its range. `buffer` has WN_COPY_ELEMENTS floats. */
WN_MUST_USE wn_status wn_rewrite_make(wn_device *device, const wn_part *part, const wn_param *p,
                                      const wn_hf_dir *source, float *buffer);

#endif
