/* What is wrong with the tensors of a Hugging Face directory, by kind, to be told in one sentence. */
#ifndef WN_IO_HF_FAULTS_H
#define WN_IO_HF_FAULTS_H

#include "base/name_list.h"
#include "io/hf_dir.h"

/* Zeroed: nothing. */
typedef struct wn_hf_faults {
  wn_name_list missing, shape, dtype, surplus;
} wn_hf_faults;

void wn_hf_misshapen(wn_hf_faults *found, const wn_st_entry *entry, int32_t rank, const int64_t *dim);
void wn_hf_mistyped(wn_hf_faults *found, const wn_st_entry *entry);
/* WN_E_INPUT with the count and up to five names of one kind: of types first, then what is missing, misshapen, surplus.
 */
WN_MUST_USE wn_status wn_hf_refuse(const wn_hf_faults *found, const wn_hf_dir *dir);

#endif
