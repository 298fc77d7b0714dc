#ifndef WN_CLI_ENVIRONMENT_H
#define WN_CLI_ENVIRONMENT_H

/* GNU's OpenMP spins for milliseconds at the end of each parallel region, and reads how long when it is loaded, before
 * main runs. Where other processes share the cores the spinning thread keeps the core that the thread it waits for
 * needs: steps were measured 20 times slower on a busy machine. Unless the user chose (GOMP_SPINCOUNT,
 * OMP_WAIT_POLICY), this sets a short spin and starts the program again, once. */
void wn_environment_prepare(char **argv);

#endif
