#ifndef WN_CLI_BLAS_H
#define WN_CLI_BLAS_H

/* Releases of OpenBLAS that do not know a newer CPU fall back to AVX2 kernels on machines with AVX-512, at half the
 * speed. The library chooses when it is loaded, so the one cure is its own OPENBLAS_CORETYPE in the environment before
 * the program starts: when that is unset and the choice is that fallback, this sets it and starts the program again,
 * once. Returns when there is nothing to do. */
void wn_blas_choose_kernels(char **argv);

#endif
