#if !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L /* clock_gettime */
#define _DARWIN_C_SOURCE
#endif

#include "team.h"

#if defined(_OPENMP) && !defined(_WIN32)

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

/* A thread waits here until all of the others have been started, too. */
static void *pass(void *gate)
{
    (void)pthread_mutex_lock(gate);
    (void)pthread_mutex_unlock(gate);
    return NULL;
}

int bn_startable_threads(int wanted)
{
    /* Each thread that calls has a team of its own. */
    static _Thread_local int started = 1;
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_t *threads;
    int count = 0;
    if (wanted <= started) {
        return wanted;
    }
    threads = malloc((size_t)wanted * sizeof *threads);
    if (threads == NULL) {
        return 1;
    }
    (void)pthread_mutex_lock(&gate);
    while (count < wanted - 1 && pthread_create(&threads[count], NULL, pass, &gate) == 0) {
        count++;
    }
    (void)pthread_mutex_unlock(&gate);
    for (int i = 0; i < count; i++) {
        (void)pthread_join(threads[i], NULL);
    }
    free(threads);
    started = count + 1;
    return started;
}

/* A team is late when its region took more than LATE times as long as the calling thread alone would have computed.
   Then the thread works alone for as long as was lost, and four times as long each time that the team is late
   again (half as long each time that it is not): up to MOST_TIMES, so that trying costs a busy machine a sixteenth
   of its time, and for MOST_ALONE nanoseconds at most, so that the team is soon back when the machine is free.
   These are nanoseconds that the thread computes: others may pass before the system lets it run again.

   Measured on two cores with two other processes that never rest (training, two threads; mean of a call, without
   and with this rule, and with one thread): 800 KB 0.7 and 0.08 ms (0.05), 13 MB 12 and 1.7 ms (1.3), 26 MB 12 and 4 ms (3).
   With LATE 1, a free machine found its team late in 5 % of the calls of 13 MB. */
#define LATE 5 / 4
#define MOST_TIMES 16
#define MOST_ALONE ((uint64_t)100000000)
static _Thread_local uint64_t alone_until;
static _Thread_local unsigned times_alone = 1;

static uint64_t nanoseconds(clockid_t clock)
{
    struct timespec time;
    (void)clock_gettime(clock, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint64_t now(void) { return nanoseconds(CLOCK_MONOTONIC); }
static uint64_t computed(void) { return nanoseconds(CLOCK_THREAD_CPUTIME_ID); }

void bn_begin_region(bn_region_times *times)
{
    times->begun = now();
    times->own_work = computed();
}

void bn_end_own_tasks(bn_region_times *times) { times->own_work = computed() - times->own_work; }

void bn_end_region(const bn_region_times *times, size_t own, size_t tasks)
{
    const uint64_t took = now() - times->begun;
    const uint64_t alone = own > 0 ? times->own_work * tasks / own : took;
    if (took > alone * LATE) {
        const uint64_t wait = (took - alone) * times_alone;
        alone_until = computed() + (wait < MOST_ALONE ? wait : MOST_ALONE);
        times_alone = times_alone < MOST_TIMES ? 4 * times_alone : MOST_TIMES;
    } else if (own > 0 && times_alone > 1) {
        times_alone /= 2;
    }
}

int bn_team_was_late(void)
{
    if (alone_until != 0 && computed() >= alone_until) {
        alone_until = 0;
    }
    return alone_until != 0;
}

#else

int bn_startable_threads(int wanted) { return wanted; }
void bn_begin_region(bn_region_times *times) { times->begun = times->own_work = 0; }
void bn_end_own_tasks(bn_region_times *times) { (void)times; }
void bn_end_region(const bn_region_times *times, size_t own, size_t tasks)
{
    (void)times, (void)own, (void)tasks;
}
int bn_team_was_late(void) { return 0; }

#endif
