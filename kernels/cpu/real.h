/* The one place that knows there are two builds: the scalar type, the BLAS names, and the suffix of every symbol
 * that leaves a file. Operations are declared in operations.h, attention.h and indexer.h; table.c lists them all. */
#ifndef WN_KERNELS_CPU_REAL_H
#define WN_KERNELS_CPU_REAL_H

#include <cblas.h>
#include <math.h>

#include "kernels/kernels.h"

/* glibc has vector forms of these (libmvec, within 4 ulp) but declares them under -ffast-math only, which we do not
 * want for anything else. With these lines loops over them vectorise, with and without `omp simd`. */
#if defined __x86_64__ && defined __GLIBC__
#pragma omp declare simd notinbranch
extern double exp(double x);
#pragma omp declare simd notinbranch
extern float expf(float x);
#pragma omp declare simd notinbranch
extern double sin(double x);
#pragma omp declare simd notinbranch
extern double cos(double x);
#endif

#ifdef WN_REAL64
typedef double wn_real;
#define WN_REAL_DTYPE WN_F64
#define WN_CPU(name) wn_cpu_##name##_f64
#define wn_gemm cblas_dgemm
#define wn_gemv cblas_dgemv
#define wn_real_exp exp
#define wn_real_log log
#define wn_real_sqrt sqrt
#else
typedef float wn_real;
#define WN_REAL_DTYPE WN_F32
#define WN_CPU(name) wn_cpu_##name##_f32
#define wn_gemm cblas_sgemm
#define wn_gemv cblas_sgemv
#define wn_real_exp expf
#define wn_real_log logf
#define wn_real_sqrt sqrtf
#endif

#endif
