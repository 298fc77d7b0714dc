/* A job file: the input is the file, its length chooses the command. What is accepted is written out resolved, reads
 * back as the same job, and may be resumed. */
#include "config/job.h"

#include <string.h>

#include "fuzz.h"

#define PATH FUZZ_ROOT "/job.yaml"
#define RESOLVED FUZZ_ROOT "/config.resolved.yaml"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static wn_job job, again; /* large: not on the stack */
  wn_job_source *source;
  wn_stage stage = (wn_stage)(size % WN_N_STAGES);
  fuzz_file(PATH, data, size);
  wn_status status = wn_job_load(&job, &source, stage, PATH, NULL, 0);
  if (status) return fuzz_refused(status, WN_E_CONFIG), 0;
  status = wn_job_save(&job, source, RESOLVED);
  WN_ASSERT(!status, "a job is not written: %s", wn_status_text(status));
  wn_job_source_free(source);
  status = wn_job_check_resume(&job, RESOLVED);
  WN_ASSERT(!status, "a job differs from itself: %s", wn_status_text(status));
  status = wn_job_load(&again, &source, stage, RESOLVED, NULL, 0);
  WN_ASSERT(!status, "a resolved job is refused: %s", wn_status_text(status));
  wn_job_source_free(source);
  return 0;
}
