/* Internal to src/config: where each option's value came from ("job.yaml:7", "command line", "default"). */
#ifndef WN_CONFIG_JOB_SOURCE_H
#define WN_CONFIG_JOB_SOURCE_H

struct wn_job_source {
  char **place; /* by index in the option table */
};

#endif
