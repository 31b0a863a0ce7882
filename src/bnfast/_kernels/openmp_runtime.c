/* Every direct use of the OpenMP library stands here, so that a build without it needs nothing. */
#if !defined(_WIN32)
#define _GNU_SOURCE /* dladdr, syscall */
#include <dlfcn.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "openmp_runtime.h"

#include <string.h>

/* Written by the fork itself, before the child has a second thread. */
static int is_forked_child;

int bn_is_forked_child(void) { return is_forked_child; }

#if defined(_OPENMP) && !defined(_WIN32) /* who has OpenMP has the library of threads, too */

#include <pthread.h>

static void note_the_fork(void) { is_forked_child = 1; }
void bn_mark_forked_children(void) { (void)pthread_atfork(NULL, NULL, note_the_fork); }

#else

void bn_mark_forked_children(void) {}

#endif

size_t bn_allowed_processors(void)
{
    size_t processors = 0;
#if defined(__linux__)
    /* The system call itself says how long the kernel's mask is; that of Linux has 8192 at most. */
    unsigned long mask[8192 / 8 / sizeof(unsigned long)];
    const long bytes = syscall(SYS_sched_getaffinity, 0, sizeof mask, mask);
    for (size_t i = 0; bytes > 0 && i < (size_t)bytes / sizeof *mask; i++) {
        for (unsigned long rest = mask[i]; rest != 0; rest &= rest - 1) {
            processors++;
        }
    }
#endif
    return processors;
}

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
