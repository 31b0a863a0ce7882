#include "team.h"

#ifdef _OPENMP

#include "system.h"

/* The threads of the calling thread's last region: each thread that calls has a team of its own, which the runtime
   keeps, and cuts down for a smaller region. */
static _Thread_local int team = 1;

/* And so many threads have been tried since: a call may have no region after all, and need not try again. */
static _Thread_local int tried = 1;

int bn_startable_threads(int wanted)
{
    if (wanted > tried) {
        tried = team + bn_try_threads(wanted - team);
        return tried;
    }
    return wanted;
}

/* A region is late if it took more than LATE / LATE_OF of the time that the calling thread alone would have computed.
   The thread then works alone for the time that was lost, times 1, 4, 16 for regions that are late in a row (half of
   that for each region that is not), and never for more than MOST_ALONE nanoseconds. So trying the team costs a busy
   machine a sixteenth of its time where a try costs 60 ms or less, and the team is back a second after the machine is
   free. Time alone is time that the thread computes, whatever it computes: more may pass before the system lets it run
   again.

   Measured on two cores beside two processes that never rest (training, two threads; mean of a call without and with
   this rule, and of one thread): 800 KB 0.7 and 0.08 ms (0.05); 13 MB 12 and 1.7 ms (1.3); 26 MB 12 and 4 ms (3). With
   a LATE of 1, a free machine found its team late in 5 % of the calls on 13 MB. */
#define LATE 5
#define LATE_OF 4
#define FACTOR_STEP 4
#define MOST_FACTOR 16
#define MOST_ALONE ((uint64_t)1000000000)
static _Thread_local uint64_t alone_until;
static _Thread_local unsigned factor = 1;

void bn_begin_region(bn_region_times *times, int threads)
{
    times->grown = threads > team;
    team = tried = threads;
    times->begun = bn_time_passed();
    times->own_work = bn_time_computed();
}

void bn_end_own_tasks(bn_region_times *times) { times->own_work = bn_time_computed() - times->own_work; }

void bn_end_region(const bn_region_times *times, size_t own_tasks, size_t tasks)
{
    const uint64_t took = bn_time_passed() - times->begun;
    if (own_tasks == 0 || times->grown) {
        return;
    }
    const uint64_t alone = times->own_work * tasks / own_tasks;
    if (LATE_OF * took > LATE * alone) {
        const uint64_t wait = (took - alone) * factor;
        alone_until = bn_time_computed() + (wait < MOST_ALONE ? wait : MOST_ALONE);
        factor = factor < MOST_FACTOR ? FACTOR_STEP * factor : MOST_FACTOR;
    } else if (factor > 1) {
        factor /= 2;
    }
}

int bn_team_was_late(void)
{
    if (alone_until != 0 && bn_time_computed() >= alone_until) {
        alone_until = 0;
    }
    return alone_until != 0;
}

#else

int bn_startable_threads(int wanted) { return wanted; }
void bn_begin_region(bn_region_times *times, int threads)
{
    times->begun = times->own_work = 0;
    times->grown = threads > 1;
}
void bn_end_own_tasks(bn_region_times *times) { (void)times; }
void bn_end_region(const bn_region_times *times, size_t own_tasks, size_t tasks)
{
    (void)times, (void)own_tasks, (void)tasks;
}
int bn_team_was_late(void) { return 0; }

#endif
