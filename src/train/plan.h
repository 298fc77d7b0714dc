/* What a job would take, without taking it: memory by the allocator's own account, bytes on disk, traffic, time.
 *
 * The figures of memory are no second account. The trainer's own code runs one step (and one evaluation) in a dry
 * world on a dry device: operations allocate as ever and compute nothing, arenas count and hold nothing. So a plan
 * needs neither the memory nor the machine, only config.json. What depends on data takes a stated case: every
 * sequence is one document (the most work), experts get equal shares. */
#ifndef WN_TRAIN_PLAN_H
#define WN_TRAIN_PLAN_H

#include "kernels/cuda/card.h"
#include "train/trainer.h"

/* What each rank has. Zero: not known. */
typedef struct wn_machine {
  char name[64];
  bool gpu;
  int32_t multiprocessors;
  double memory_bytes;
  double flops;          /* dense BF16 peak of a GPU; a CPU's own product rate */
  double link_bytes_s;   /* between the GPUs of a host */
  double fabric_bytes_s; /* between hosts, a rank */
  int32_t ranks_a_host;  /* as many as link_bytes_s holds for */
  double own_bytes;      /* what CUDA, cuBLAS and the kernels' code take */
  double nccl_bytes;     /* what NCCL takes where there are several ranks */
} wn_machine;

/* "h200", "h100", "gh200", "cpu" (the one this process runs on; measures its rate). WN_E_USAGE for another name. */
WN_MUST_USE wn_status wn_machine_named(wn_machine *out, const char *name, int32_t threads);

/* What the job would run on here: the card that is there, a CPU without its rate, or an H200 for a job for GPUs where
 * there are none. WN_E_DEVICE for a card that this build does not run on. */
WN_MUST_USE wn_status wn_machine_here(wn_machine *out, const wn_job *job);
/* A card with its own memory; with the rates of the machine above that it is, by its name, else without rates. */
void wn_machine_of_card(wn_machine *out, const wn_cuda_card *card);

typedef struct wn_plan {
  wn_world *world;
  wn_run *run; /* after its rehearsal: the device's arenas hold the table */
  wn_machine machine;
  int32_t ranks;
  wn_traffic traffic;           /* of a step, a rank */
  double arena_bytes;           /* of the machine's memory, a rank: arenas in whole pages (on a CPU with the host's) */
  double own_bytes;             /* beside the arenas, NCCL's among them */
  double total_bytes;           /* both */
  bool fits;                    /* true too where the machine's memory is not known */
  double flops;                 /* counted work of a step, all ranks */
  double share;                 /* of the machine's rate, measured for this stage */
  double compute_s, transfer_s; /* a step's work and traffic, which run side by side */
  double step_s;                /* the larger of the two */
  double hours, rank_hours;     /* of the whole job */
  double written_bytes, linked_bytes; /* a checkpoint: new bytes; bytes linked from the base */
} wn_plan;

/* WN_E_CONFIG as wn_run_create; WN_E_DEVICE for a GPU in a build without the CUDA half. share 0: the measured one. */
WN_MUST_USE wn_status wn_plan_create(wn_plan **out, wn_recipe recipe, const wn_job *job, int32_t ranks,
                                     const wn_machine *machine, double share);
void wn_plan_free(wn_plan *plan); /* NULL is fine */

/* One change that may make a job fit, and what it comes to. */
typedef struct wn_remedy {
  char change[96]; /* "training.micro_batch_seqs=1", "--ranks 16" */
  double total_bytes;
  bool fits;
} wn_remedy;
enum { WN_MOST_REMEDIES = 10 };
/* Plans the job with one change each. *n of them, those that lower the memory. */
WN_MUST_USE wn_status wn_plan_remedies(wn_remedy out[WN_MOST_REMEDIES], int32_t *n, const wn_plan *plan);

#endif
