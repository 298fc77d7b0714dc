#include "io/hf_faults.h"

void wn_hf_misshapen(wn_hf_faults *found, const wn_st_entry *entry, int32_t rank, const int64_t *dim) {
  char theirs[WN_SHAPE_TEXT_BYTES], ours[WN_SHAPE_TEXT_BYTES];
  wn_shape_text(theirs, entry->rank, entry->dim);
  wn_shape_text(ours, rank, dim);
  wn_name_list_add(&found->shape, "%s %s instead of %s", entry->name, theirs, ours);
}

void wn_hf_mistyped(wn_hf_faults *found, const wn_st_entry *entry) {
  wn_name_list_add(&found->dtype, "%s (%s)", entry->name, wn_dtype_name(entry->dtype));
}

static wn_status refuse(const wn_hf_dir *dir, const char *what, const wn_name_list *list, const char *hint) {
  if (list->n == 0) return NULL;
  return WN_FAIL_HINT(WN_E_INPUT, hint, "%s: %lld %s%s: %s", wn_hf_dir_path(dir), (long long)list->n,
                      list->n == 1 ? "tensor " : "tensors ", what, list->text);
}

wn_status wn_hf_refuse(const wn_hf_faults *found, const wn_hf_dir *dir) {
  static const char another[] = "config.json may be another model's";
  WN_TRY(refuse(dir, "of a type that cannot be read", &found->dtype,
                "weights are read from F32, F16, BF16, and F8_E4M3 with scales in F32, BF16 or F8_E8M0"));
  WN_TRY(refuse(dir, "missing", &found->missing, "config.json may be another model's, or the directory incomplete"));
  WN_TRY(refuse(dir, "misshapen", &found->shape, another));
  return refuse(dir, "that this model does not have", &found->surplus, another);
}
