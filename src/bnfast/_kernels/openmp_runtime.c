/* Every direct use of the OpenMP library stands here, so that a build without it needs nothing. */
#include "openmp_runtime.h"

#include <string.h>

/* Written by the fork itself, before the child has a second thread. */
static int is_forked_child;

int bn_is_forked_child(void) { return is_forked_child; }

#ifdef _OPENMP

#include "system.h"

#include <omp.h>

static void note_the_fork(void) { is_forked_child = 1; }
void bn_mark_forked_children(void) { bn_at_fork(note_the_fork); }

int bn_openmp_max_threads(void) { return omp_get_max_threads(); }
int bn_openmp_version(void) { return _OPENMP; }

#if defined(_WIN32)
/* On Windows the name of an imported function is a jump within this module; the linker stores its address here. */
extern int (*__imp_omp_get_max_threads)(void);
#define FUNCTION_OF_RUNTIME __imp_omp_get_max_threads
#else
#define FUNCTION_OF_RUNTIME omp_get_max_threads
#endif

const char *bn_openmp_library(void)
{
    int (*function)(void) = FUNCTION_OF_RUNTIME;
    void *address;
    memcpy(&address, &function, sizeof address);
    return bn_file_of_code(address);
}

#else

void bn_mark_forked_children(void) {}
int bn_openmp_max_threads(void) { return 1; }
int bn_openmp_version(void) { return 0; }
const char *bn_openmp_library(void) { return NULL; }

#endif

const char *bn_compiler(void)
{
#if defined(__clang__)
    return "Clang " __clang_version__;
#elif defined(__GNUC__)
    return "GCC " __VERSION__;
#else
    return "unknown";
#endif
}
