/* Every direct use of the OpenMP library stands here, so that a build without it needs nothing. */
#if !defined(_WIN32)
#define _GNU_SOURCE /* dladdr */
#include <dlfcn.h>
#endif

#include "openmp_runtime.h"

#include <stddef.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>

int bn_openmp_max_threads(void) { return omp_get_max_threads(); }
int bn_openmp_version(void) { return _OPENMP; }

const char *bn_openmp_library(void)
{
#if !defined(_WIN32)
    Dl_info info;
    int (*runtime)(void) = omp_get_max_threads;
    void *address;
    memcpy(&address, &runtime, sizeof address);
    if (dladdr(address, &info) != 0) {
        return info.dli_fname;
    }
#endif
    return NULL;
}

#else

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
