#define _GNU_SOURCE /* MAP_ANONYMOUS, mremap, madvise, dladdr, syscall */
#define _DARWIN_C_SOURCE

#include "system.h"

#include <sys/mman.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif

/* A page of the system's lies before the memory. */
static size_t head_bytes(void) { return (size_t)sysconf(_SC_PAGESIZE); }

static void unmap(char *from, const char *to)
{
    if (from < to) {
        (void)munmap(from, (size_t)(to - from));
    }
}

/* From a multiple of a huge page on, so that the system can give huge pages. */
void *bn_map_memory(size_t bytes)
{
    const size_t head = head_bytes();
    if (bytes > SIZE_MAX - BN_HUGE_PAGE - head) {
        return NULL;
    }
    const size_t mapped = head + bytes + BN_HUGE_PAGE;
    char *begin = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) {
        return NULL;
    }
    char *memory = begin + head;
    memory += (BN_HUGE_PAGE - (uintptr_t)memory % BN_HUGE_PAGE) % BN_HUGE_PAGE;
    unmap(begin, memory - head);
    unmap(memory + bytes, begin + mapped);
#if defined(__linux__)
    (void)madvise(memory, bytes, MADV_HUGEPAGE); /* a wish */
#endif
    return memory;
}

void bn_unmap_memory(void *memory, size_t bytes) { unmap((char *)memory - head_bytes(), (char *)memory + bytes); }

void *bn_remap_memory(void *memory, size_t before, size_t bytes)
{
#if defined(__linux__)
    const size_t head = head_bytes();
    char *begin = mremap((char *)memory - head, head + before, head + bytes, MREMAP_MAYMOVE);
    return begin == MAP_FAILED ? NULL : begin + head;
#else
    (void)memory, (void)before, (void)bytes;
    return NULL;
#endif
}

size_t bn_allowed_processors(void)
{
    size_t processors = 0;
#if defined(__linux__)
    /* The system call returns the length of Linux's mask in bytes; a mask has at most 8192 bits, one a processor. */
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

#ifdef _OPENMP /* who has OpenMP has the library of threads, too */

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>

const char *bn_file_of_code(const void *address)
{
    Dl_info info;
    return dladdr(address, &info) != 0 ? info.dli_fname : NULL;
}

void bn_at_fork(void (*in_child)(void)) { (void)pthread_atfork(NULL, NULL, in_child); }

/* A thread waits here until all of the others have been started, too. */
static void *wait_at(void *gate)
{
    (void)pthread_mutex_lock(gate);
    (void)pthread_mutex_unlock(gate);
    return NULL;
}

int bn_try_threads(int wanted)
{
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_t *threads = malloc((size_t)wanted * sizeof *threads);
    int started = 0;
    if (threads == NULL) {
        return 0;
    }
    (void)pthread_mutex_lock(&gate);
    while (started < wanted && pthread_create(&threads[started], NULL, wait_at, &gate) == 0) {
        started++;
    }
    (void)pthread_mutex_unlock(&gate);
    for (int i = 0; i < started; i++) {
        (void)pthread_join(threads[i], NULL);
    }
    free(threads);
    return started;
}

static uint64_t nanoseconds(clockid_t clock)
{
    struct timespec time;
    (void)clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

uint64_t bn_time_passed(void) { return nanoseconds(CLOCK_MONOTONIC); }
uint64_t bn_time_computed(void) { return nanoseconds(CLOCK_THREAD_CPUTIME_ID); }

#endif
