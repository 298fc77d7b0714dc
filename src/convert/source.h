/* The directory that is read: every weight that its config.json promises, MTP layers too, found and checked. */
#ifndef WN_CONVERT_SOURCE_H
#define WN_CONVERT_SOURCE_H

#include "base/log.h"
#include "io/hf_dir.h"
#include "model/params.h"

/* How DeepSeek's release stores a weight. */
typedef enum wn_released { WN_RELEASED_F32, WN_RELEASED_BF16, WN_RELEASED_FP8 } wn_released;

typedef struct wn_convert_weight {
  const char *name;
  int32_t expert;    /* -1: not one */
  bool indexer, mtp; /* mtp: of a layer behind the model's last */
  wn_released released;
  int32_t rank; /* 1 or 2 */
  int64_t dim[2];
  wn_hf_weight from;
} wn_convert_weight;

typedef struct wn_convert_source {
  wn_hf_dir *dir;
  wn_model_config config;
  wn_convert_weight *weights; /* by layer, as the model runs */
  int64_t n;
  bool fp8;           /* some weight is */
  bool scale_ue8m0;   /* config.json says that FP8 scales are powers of two */
  int32_t mtp_layers; /* of those that config.json names, the ones that are there */
  wn_param_table table;
  char (*mtp_names)[WN_NAME_BYTES];
} wn_convert_source;

/* WN_E_CONFIG for config.json; WN_E_INPUT, with up to five names and the count, for tensors that are missing,
 * misshapen, of a type that cannot be read, or of no use to this model. An MTP layer is there whole (its copies of
 * embedding and head, and its indexer, may be absent) or not at all, which is warned about. */
WN_MUST_USE wn_status wn_convert_source_open(wn_convert_source *out, const char *path, wn_log *log);
void wn_convert_source_close(wn_convert_source *source);

#endif
