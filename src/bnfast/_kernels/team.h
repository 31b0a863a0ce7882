/* Whether a team of threads can be had, and whether it is worth waiting for. */
#ifndef BN_TEAM_H
#define BN_TEAM_H

#include <stddef.h>
#include <stdint.h>

/* How many of so many threads can run at once, the calling one among them. OpenMP's runtimes end the process
   where a thread cannot be started (a limit of processes or of memory): who needs a larger team than before
   starts as many threads on trial. */
int bn_startable_threads(int wanted);

/* Nanoseconds of a region: when it began, and how long the calling thread computed its own tasks. */
typedef struct {
    uint64_t begun, own_work;
} bn_region_times;

void bn_begin_region(bn_region_times *times);
void bn_end_own_tasks(bn_region_times *times);

/* At the end of a region in which the calling thread did `own` of the tasks: notes whether the team was
   late. */
void bn_end_region(const bn_region_times *times, size_t own, size_t tasks);

/* Whether the calling thread had better work alone for now. On a busy machine the end of a region waits until
   the system lets the last thread run, for milliseconds where the work takes microseconds. */
int bn_team_was_late(void);

#endif
