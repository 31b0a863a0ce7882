/* What the operating system gives, under one name for all systems: setup.py compiles system_posix.c or
   system_windows.c. */
#ifndef BN_SYSTEM_H
#define BN_SYSTEM_H

#include <stddef.h>
#include <stdint.h>

#define BN_HUGE_PAGE ((size_t)2 << 20)

/* Maps memory of whole huge pages, set to 0; NULL if there is none. Unmapped, all of it goes back to the system. Before
   it lie as many bytes as a size_t has, for the caller. */
void *bn_map_memory(size_t bytes);
void bn_unmap_memory(void *memory, size_t bytes);

/* The same memory, and the size_t before it, with another number of bytes and perhaps at another address. NULL, and
   nothing has changed, where the system cannot do that without a copy. */
void *bn_remap_memory(void *memory, size_t before, size_t bytes);

/* How many processors the calling thread (on Windows, its process) may run on, 0 where the system does not say. It is
   asked on every call, because nobody is told of a change: another process may make one. */
size_t bn_allowed_processors(void);

/* The rest is there in builds with OpenMP alone. */

/* The file that the code at this address was loaded from, or NULL. */
const char *bn_file_of_code(const void *address);

/* Calls this function in all processes that are forked from now on, before they have a second thread. */
void bn_at_fork(void (*in_child)(void));

/* How many of `wanted` further threads the system lets run at once now: they are started and, then, ended. */
int bn_try_threads(int wanted);

/* Nanoseconds: those that have passed, and those that the calling thread has computed. Windows counts the latter in
   steps of 16 ms, too large for a call; there both are the time that has passed. */
uint64_t bn_time_passed(void);
uint64_t bn_time_computed(void);

#endif
