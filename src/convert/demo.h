/* DeepSeek's demo: names, splits and configuration of its shards (model-spec 3; DeepSeek-V3.2-Exp,
 * inference/convert.py). */
#ifndef WN_CONVERT_DEMO_H
#define WN_CONVERT_DEMO_H

#include "base/log.h"
#include "convert/source.h"

/* "model.layers.3.mlp.experts.17.gate_proj.weight" -> "layers.3.ffn.experts.17.w1.weight"; its scales' name ends in
 * ".scale". `out` has room for WN_NAME_BYTES and more: no name grows. */
void wn_demo_name(char *out, const char *name, bool scale);
/* The dimension that is split over the shards; -1: every shard has all of it. */
int32_t wn_demo_axis(const wn_convert_weight *weight);
/* MTP layers are in none; experts in turn, E / of to a shard. */
bool wn_demo_has(const wn_model_config *config, const wn_convert_weight *weight, int32_t shard, int32_t of);

/* WN_E_CONFIG: `of` shards split a dimension unevenly, or FP8 inside a block that shares a scale; the sentence has the
 * numbers that do not. WN_E_INPUT: some weights that the demo wants in FP8 are, and some are not. */
WN_MUST_USE wn_status wn_demo_check(const wn_convert_source *source, int32_t of);
/* What the demo's model.py, as it is published, does otherwise than this model wants: warnings. */
void wn_demo_warn(const wn_convert_source *source, wn_log *log);
/* DIR/demo_config.json, for its --config. */
#define WN_DEMO_CONFIG_NAME "demo_config.json"
WN_MUST_USE wn_status wn_demo_write_config(const wn_convert_source *source, const char *dir);

#endif
