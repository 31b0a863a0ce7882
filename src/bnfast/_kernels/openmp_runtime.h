/* The OpenMP runtime behind prange, and the compiler: facts for show_config. */
#ifndef BN_OPENMP_RUNTIME_H
#define BN_OPENMP_RUNTIME_H

int bn_openmp_max_threads(void); /* 1 without OpenMP */
int bn_openmp_version(void);     /* yyyymm of the specification, 0 without OpenMP */
const char *bn_openmp_library(void); /* file that the runtime was loaded from, or NULL */
const char *bn_compiler(void);

#endif
