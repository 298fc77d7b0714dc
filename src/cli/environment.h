#ifndef WN_CLI_ENVIRONMENT_H
#define WN_CLI_ENVIRONMENT_H

/* Two libraries read the environment when they are loaded, before main runs, and choose badly here:
 * - OpenBLAS releases that do not know a newer CPU fall back to AVX2 kernels on machines with AVX-512, at half the speed. OPENBLAS_CORETYPE is the
 *   one cure.
 * - GNU's OpenMP spins for milliseconds at the end of each parallel region. Where other processes share the cores the spinning thread keeps the
 *   core that the thread it waits for needs: steps were measured 20 times slower on a busy machine. GOMP_SPINCOUNT makes it short.
 * Sets what is not set, and starts the program again, once. Returns when there is nothing to do. */
void wn_environment_prepare(char **argv);

#endif
