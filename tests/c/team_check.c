/* team.c: when a team is late, and for how long its caller works alone then; by a clock of the test's own. */
#define _OPENMP 1 /* what is tested needs no runtime */
#include <stdint.h>
#include <stdio.h>

#include "team.c"

#define MS ((uint64_t)1000000)

static uint64_t wall, computing;

uint64_t bn_time_passed(void) { return wall; }
uint64_t bn_time_computed(void) { return computing; }

/* The system lets so many threads run besides this one: those of the last region, and those on trial. */
static int room = 1000, of_region;

int bn_try_threads(int wanted) { return wanted < room - of_region ? wanted : room - of_region; }

static int failed;

static void expect(int is_so, const char *what)
{
    if (!is_so) {
        failed = 1;
        printf("not so: %s\n", what);
    }
}

/* A region of two threads, of which the calling one computes one of two tasks in so many nanoseconds. */
static void region(uint64_t own_work, uint64_t took)
{
    bn_region_times times;
    bn_begin_region(&times, 2);
    computing += own_work;
    wall += own_work;
    bn_end_own_tasks(&times);
    computing += took - own_work; /* it spins while it waits */
    wall += took - own_work;
    bn_end_region(&times, 1, 2);
}

/* How long it computes alone before the team is tried again. */
static uint64_t alone(void)
{
    uint64_t passed = 0;
    wall += 1000 * MS; /* which another process has */
    while (bn_team_was_late()) {
        passed += MS / 10;
        computing += MS / 10;
        wall += MS / 10;
    }
    return passed;
}

/* Starts a region of so many threads, whose team the runtime then keeps. */
static void start_region(int threads)
{
    bn_region_times times;
    of_region = threads - 1;
    bn_begin_region(&times, threads);
}

static void check_teams(void)
{
    expect(bn_startable_threads(3) == 3, "three threads can be started here");
    room = 0;
    expect(bn_startable_threads(3) == 3, "who was tried is not tried again");
    room = 1000;
    start_region(3);
    expect(bn_startable_threads(2) == 2, "and two of them");
    room = 3;
    expect(bn_startable_threads(16) == 4, "a limit leaves those that it allows");
    start_region(4);
    expect(bn_startable_threads(16) == 4, "and these are not forgotten by the next call");
    start_region(2);
    room = 1;
    expect(bn_startable_threads(4) == 2, "a team that was cut down is tried again");
    room = 0, of_region = 0;
    start_region(1);
    expect(bn_startable_threads(4) == 1, "no thread but the calling one");
    room = 1000;
}

int main(void)
{
    check_teams();
    wall = 5 * MS, computing = 3 * MS;
    region(1 * MS, 60 * MS);
    expect(alone() == 0, "a region whose threads are started is not judged");
    region(1 * MS, 1 * MS);
    expect(alone() == 0, "a team that ends with its caller is not late");
    region(1 * MS, 2 * MS);
    expect(alone() == 0, "as long as alone is not late");
    region(1 * MS, 6 * MS);
    expect(alone() == 4 * MS, "alone for as long as was lost");
    region(1 * MS, 6 * MS);
    expect(alone() == 16 * MS, "four times as long the second time");
    region(1 * MS, 6 * MS);
    expect(alone() == 64 * MS, "sixteen times the third time");
    region(1 * MS, 6 * MS);
    expect(alone() == 64 * MS, "and no more");
    region(1 * MS, 100 * MS);
    expect(alone() == 1000 * MS, "a second at most");
    for (int times = 0; times < 4; times++) {
        region(1 * MS, 1 * MS);
    }
    region(1 * MS, 6 * MS);
    expect(alone() == 4 * MS, "a team that is in time again has its credit back");
    bn_region_times times;
    bn_begin_region(&times, 2);
    wall += 50 * MS;
    bn_end_own_tasks(&times);
    bn_end_region(&times, 0, 1);
    expect(alone() == 0, "who had no task of its own cannot tell");
    return failed;
}
