/* Whether a team of threads can be had, and whether it is worth waiting for. */
#ifndef BN_TEAM_H
#define BN_TEAM_H

#include <stddef.h>
#include <stdint.h>

/* How many of `wanted` threads, the calling one included, the system lets run now. OpenMP's runtimes end the process
   where a thread cannot be started (a limit of processes or of memory), so a team that must grow is tried first with
   threads of our own. */
int bn_startable_threads(int wanted);

/* Of a region: when it began, and how long the calling thread computed its own tasks, in nanoseconds. */
typedef struct {
    uint64_t begun, own_work;
    int grown; /* the runtime starts threads for it */
} bn_region_times;

void bn_begin_region(bn_region_times *times, int threads);
void bn_end_own_tasks(bn_region_times *times);

/* At the end of a region in which the calling thread did `own_tasks` of the tasks: notes whether the team was late. */
void bn_end_region(const bn_region_times *times, size_t own_tasks, size_t tasks);

/* Whether the calling thread should work alone for now. On a busy machine a region ends only when the system has run
   its last thread: milliseconds, for work of microseconds. */
int bn_team_was_late(void);

#endif
