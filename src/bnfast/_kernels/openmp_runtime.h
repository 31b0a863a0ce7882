/* The OpenMP runtime behind prange, who may use it, and the compiler. */
#ifndef BN_OPENMP_RUNTIME_H
#define BN_OPENMP_RUNTIME_H

#include <stddef.h>

/* Marks all processes that are forked from now on, and says whether this is one: never without OpenMP.
   The threads of its runtime do not survive a fork, and the next parallel region would wait for them. */
void bn_mark_forked_children(void);
int bn_is_forked_child(void);

int bn_openmp_max_threads(void); /* 1 without OpenMP */
int bn_openmp_version(void);     /* yyyymm of the specification, 0 without OpenMP */
const char *bn_openmp_library(void); /* file that the runtime was loaded from, or NULL */
const char *bn_compiler(void);

#endif
