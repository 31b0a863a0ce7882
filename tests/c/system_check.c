/* What a system gives (system.h): memory that is zeroed, holds what is written and is given back; threads; clocks.
   And the pool of outputs on top of it. Compiled with system_<name>.c, output_memory.c, cache_sizes.c and -D_OPENMP: it
   needs no runtime. */
#include "system.h"

#include "cache_sizes.h"
#include "output_memory.h"

#include <stdio.h>
#include <string.h>

static int failed;

static void expect(int is_so, const char *what)
{
    if (!is_so) {
        failed = 1;
        printf("not so: %s\n", what);
    }
}

static int all_are(const unsigned char *memory, size_t bytes, unsigned char value)
{
    return memory[0] == value && memcmp(memory, memory + 1, bytes - 1) == 0;
}

static void check_memory(void)
{
    const size_t bytes = 2 * BN_HUGE_PAGE;
    size_t *memory = bn_map_memory(bytes);
    expect(memory != NULL, "there is memory");
    if (memory == NULL) {
        return;
    }
    expect((uintptr_t)memory % 4096 == 0, "memory begins at a page");
    expect(all_are((unsigned char *)memory, bytes, 0), "new memory is zeroed");
    memory[-1] = 12345;
    memset(memory, 7, bytes);
    size_t *larger = bn_remap_memory(memory, bytes, 3 * BN_HUGE_PAGE);
    if (larger != NULL) {
        expect(larger[-1] == 12345, "what lies before memory goes with it");
        expect(all_are((unsigned char *)larger + bytes, BN_HUGE_PAGE, 0), "what is added is zeroed");
        memory = larger;
    }
    expect(all_are((unsigned char *)memory, bytes, 7), "memory keeps what is written");
    bn_unmap_memory(memory, larger == NULL ? bytes : 3 * BN_HUGE_PAGE);
    expect(bn_map_memory(SIZE_MAX / BN_HUGE_PAGE * BN_HUGE_PAGE) == NULL, "no memory beyond all of it");
    for (int times = 0; times < 1000; times++) { /* 64 GB in all, more than most machines have */
        memory = bn_map_memory(32 * BN_HUGE_PAGE);
        expect(memory != NULL, "memory that was given back is to be had again");
        if (memory == NULL) {
            return;
        }
        memory[0] = 1;
        bn_unmap_memory(memory, 32 * BN_HUGE_PAGE);
    }
}

static void check_outputs(void)
{
    const size_t large = 5 * BN_HUGE_PAGE + 123;
    bn_limit_output_pool(16 * BN_HUGE_PAGE);
    unsigned char *output = bn_output_calloc(NULL, large, 1);
    expect(output != NULL && (uintptr_t)output % 64 == 0, "an output begins at a line");
    if (output == NULL) {
        return;
    }
    memset(output, 7, large);
    unsigned char *grown = bn_output_realloc(NULL, output, 2 * large);
    expect(grown != NULL && all_are(grown, large, 7), "an output that grows keeps its values");
    grown = bn_output_realloc(NULL, grown, 1000);
    expect(grown != NULL && all_are(grown, 1000, 7), "and one that shrinks to less than a page");
    bn_output_free(NULL, grown, 1000);
    bn_limit_output_pool(0);
    bn_limit_output_pool(16 * BN_HUGE_PAGE);
    output = bn_take_output(large);
    bn_return_output(output);
    expect(bn_output_pool_bytes() == 6 * BN_HUGE_PAGE, "the pool keeps what an output leaves");
    expect(bn_take_output(large) == output, "the next output of this size gets it");
    bn_return_output(output);
    bn_limit_output_pool(0);
    expect(bn_output_pool_bytes() == 0, "a limit of 0 empties the pool");
    unsigned char *line = bn_line_calloc(NULL, 100, 1);
    line = line == NULL ? NULL : memset(line, 7, 100);
    line = bn_line_realloc(NULL, line, 100000);
    expect(line != NULL && (uintptr_t)line % 64 == 0 && all_are(line, 100, 7), "a small output keeps its values");
    bn_line_free(NULL, line, 100000);
}

static void check_threads_and_clocks(void)
{
    const uint64_t passed = bn_time_passed(), computed = bn_time_computed();
    expect(bn_try_threads(7) == 7, "seven threads can be started");
    while (bn_time_computed() - computed < 1000000) {
    }
    expect(bn_time_passed() - passed >= 1000000, "a thread computes for no longer than time passes");
    expect(bn_time_passed() - passed < UINT64_C(100000000000), "clocks count nanoseconds");
}

static void nothing(void) {}

int main(void)
{
    const bn_caches caches = bn_cache_sizes();
    void (*function)(void) = nothing;
    void *address;
    memcpy(&address, &function, sizeof address);
    const char *file = bn_file_of_code(address);
    check_memory();
    check_outputs();
    check_threads_and_clocks();
    bn_at_fork(nothing);
    expect(bn_allowed_processors() < 100000, "there is a number of processors");
    expect(caches.level2 >= 1024 && caches.last_level >= caches.level2, "caches grow from level to level");
    expect(file != NULL && strstr(file, "system_check") != NULL, "code knows its file");
    return failed;
}
