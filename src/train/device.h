/* The device that a job or a command runs on. */
#ifndef WN_TRAIN_DEVICE_H
#define WN_TRAIN_DEVICE_H

#include "base/device.h"
#include "base/log.h"
#include "config/job.h"
#include "dist/world.h"

/* What `choice` comes to on this machine. */
bool wn_chooses_gpu(wn_job_device choice);
/* auto: a GPU where this process sees one and the build has CUDA, else the CPU. With several processes on a host each
 * takes the GPU of its place there. Collective: the ranks agree on a failure, and on the kind of device. */
WN_MUST_USE wn_status wn_open_device(wn_device **out, wn_job_device choice, int32_t threads, wn_world *world,
                                     wn_log *log);
void wn_close_device(wn_device *device); /* NULL is fine */
/* FLOP/s of an n^3 product in ACT on this device, the best of some. */
WN_MUST_USE wn_status wn_device_product_rate(wn_device *device, int64_t n, double *flops_a_s);
/* GiB in use at most so far: of the GPU as its driver counts them, or of this process. */
WN_MUST_USE wn_status wn_device_peak_gib(wn_device *device, double *gib);

#endif
