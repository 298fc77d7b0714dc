/* What lies at a path: a model directory, a checkpoint, one safetensors file, a dataset, a run directory. */
#ifndef WN_TRAIN_INSPECT_H
#define WN_TRAIN_INSPECT_H

#include <stdbool.h>

#include "io/json.h"

/* Facts as a JSON object, which the caller releases: "kind" ("model configuration", "model directory", "checkpoint",
 * "safetensors file", "dataset", "run directory"), "path", and the members that docs/formats.md lists ("Inspection").
 * Of a checkpoint every byte is compared with its manifest, unless `quick`: then names and lengths only; "verifies"
 * says what came out, and what does not hold is no error. WN_E_INPUT, WN_E_CONFIG or WN_E_IO with one sentence for
 * what cannot be read, or is none of these. */
WN_MUST_USE wn_status wn_inspect(json_t **out, const char *path, bool quick);

#endif
