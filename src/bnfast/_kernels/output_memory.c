/* Writing to new memory takes longer than normalizing: the system clears every page of it first. So the
   memory that outputs of bnfast leave is kept, up to a limit, for the next output of the same size.

   Nobody waits for the pool: who finds another thread at it goes without. So a process that was forked
   in the middle of things cannot hang on it either: in such a one it stays unused. */
#define _GNU_SOURCE /* posix_memalign, in a build for sanitizers */

#include "output_memory.h"

#include "system.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Blocks are whole huge pages, mapped, so that all of one goes back to the system when it is freed: of what
   malloc had cut up, 1.2 GiB stayed with a process that resized its outputs. What is smaller than a page (an
   output that was resized) is no block, and comes from malloc. Before the first byte of either lies how many
   bytes there are: realloc is not told. */
#define PAGE BN_HUGE_PAGE
#define BLOCKS 16
#define TRIES 10000
#define SMALL_HEAD ((size_t)64) /* a line, at whose end lies the number of bytes */

typedef struct {
    void *memory;
    size_t bytes;
} block;

static struct {
    atomic_flag busy;
    atomic_size_t limit;
    block blocks[BLOCKS]; /* the oldest first */
    size_t count, bytes;
} pool = {.busy = ATOMIC_FLAG_INIT};

static int enter(void)
{
    return !atomic_flag_test_and_set_explicit(&pool.busy, memory_order_acquire);
}

static void leave(void) { atomic_flag_clear_explicit(&pool.busy, memory_order_release); }

/* 0 for more than there can be. */
static size_t block_bytes(size_t bytes)
{
    const size_t pages = bytes / PAGE + (bytes % PAGE != 0 || bytes == 0);
    return pages > SIZE_MAX / PAGE ? 0 : pages * PAGE;
}

static block remove_block(size_t index)
{
    const block removed = pool.blocks[index];
    pool.count--;
    pool.bytes -= removed.bytes;
    memmove(pool.blocks + index, pool.blocks + index + 1,
            (pool.count - index) * sizeof *pool.blocks);
    return removed;
}

/* Takes out the oldest blocks until so many more fit; returns how many came out. */
static size_t make_room(size_t limit, size_t blocks, size_t bytes, block *out)
{
    size_t removed = 0;
    while (pool.count > 0 && (pool.bytes + bytes > limit || pool.count + blocks > BLOCKS)) {
        out[removed++] = remove_block(0);
    }
    return removed;
}

static size_t *capacity_of(void *memory) { return (size_t *)memory - 1; }

/* Maps `bytes`, whole huge pages. */
static void *new_block(size_t bytes)
{
    void *memory = bn_map_memory(bytes);
    if (memory != NULL) {
        *capacity_of(memory) = bytes;
    }
    return memory;
}

static void free_block(void *memory) { bn_unmap_memory(memory, *capacity_of(memory)); }

static void free_blocks(const block *blocks, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        free_block(blocks[i].memory);
    }
}

/* Memory of fewer bytes than a page. */
static void *new_small(size_t bytes)
{
    char *before = malloc(SMALL_HEAD + bytes);
    if (before == NULL) {
        return NULL;
    }
    void *memory = before + SMALL_HEAD;
    *capacity_of(memory) = bytes;
    return memory;
}

/* Gives back what is kept beyond `limit`; 0 where another thread is at the pool. */
static int trim(size_t limit)
{
    block removed[BLOCKS];
    if (!enter()) {
        return 0;
    }
    const size_t count = make_room(limit, 0, 0, removed);
    leave();
    free_blocks(removed, count);
    return 1;
}

void *bn_take_output(size_t bytes)
{
    const size_t wanted = block_bytes(bytes);
    void *memory = NULL;
    if (bytes < PAGE || wanted == 0) {
        return wanted == 0 ? NULL : new_small(bytes);
    }
    if (enter()) {
        for (size_t i = pool.count; i-- > 0 && memory == NULL;) {
            if (pool.blocks[i].bytes == wanted) {
                memory = remove_block(i).memory;
            }
        }
        leave();
    }
    if (memory == NULL) {
        memory = new_block(wanted);
    }
    if (memory == NULL && trim(0)) {
        memory = new_block(wanted);
    }
    return memory;
}

void bn_return_output(void *memory)
{
    block removed[BLOCKS + 1];
    size_t count = 0;
    const block returned = {memory, *capacity_of(memory)};
    if (returned.bytes < PAGE) {
        free((char *)memory - SMALL_HEAD);
        return;
    }
    if (!enter()) {
        free_block(memory);
        return;
    }
    const size_t limit = atomic_load(&pool.limit);
    const int fits_limit = returned.bytes <= limit;
    count = make_room(limit, (size_t)fits_limit, fits_limit ? returned.bytes : 0, removed);
    if (fits_limit) {
        pool.blocks[pool.count++] = returned;
        pool.bytes += returned.bytes;
    } else {
        removed[count++] = returned;
    }
    leave();
    free_blocks(removed, count);
}

void bn_limit_output_pool(size_t bytes)
{
    atomic_store(&pool.limit, bytes);
    for (int tries = 0; tries < TRIES && !trim(bytes); tries++) {
        /* Another thread is moving a pointer or two; the next block that is returned trims, too. */
    }
}

size_t bn_output_pool_bytes(void)
{
    size_t bytes = 0;
    if (enter()) {
        bytes = pool.bytes;
        leave();
    }
    return bytes;
}

void *bn_output_malloc(void *context, size_t bytes)
{
    (void)context;
    return bn_take_output(bytes);
}

void *bn_output_calloc(void *context, size_t count, size_t size)
{
    void *memory = size > 0 && count > SIZE_MAX / size ? NULL : bn_take_output(count * size);
    (void)context;
    return memory == NULL ? NULL : memset(memory, 0, count * size);
}

/* The block itself, grown or shrunk by whole pages, or NULL. */
static void *resized_block(void *memory, size_t wanted)
{
    void *resized = bn_remap_memory(memory, *capacity_of(memory), wanted);
    if (resized != NULL) {
        *capacity_of(resized) = wanted;
    }
    return resized;
}

void *bn_output_realloc(void *context, void *memory, size_t bytes)
{
    const size_t wanted = block_bytes(bytes);
    void *moved;
    (void)context;
    if (memory == NULL || wanted == 0) {
        return wanted == 0 ? NULL : bn_take_output(bytes);
    }
    const size_t before = *capacity_of(memory);
    moved = before >= PAGE && bytes >= PAGE ? resized_block(memory, wanted) : NULL;
    if (moved == NULL && (moved = bn_take_output(bytes)) != NULL) {
        memcpy(moved, memory, before < bytes ? before : bytes);
        bn_return_output(memory);
    }
    return moved;
}

void bn_output_free(void *context, void *memory, size_t bytes)
{
    (void)context;
    (void)bytes;
    if (memory != NULL) {
        bn_return_output(memory);
    }
}

/* Memory that begins at a line has the address that malloc gave before it: aligned_alloc takes five
   times as long (60 ns) where the library has memory of this size at hand. */
#define LINE ((size_t)64)
#define LINE_BYTES(bytes) ((bytes) + LINE + sizeof(void *))

static char *first_line(void *memory)
{
    char *after_address = (char *)memory + sizeof memory;
    return after_address + (LINE - (uintptr_t)after_address % LINE) % LINE;
}

static char *at_line(void *memory)
{
    char *line = first_line(memory);
    memcpy(line - sizeof memory, &memory, sizeof memory);
    return line;
}

static void *malloced(const void *line)
{
    void *memory;
    memcpy(&memory, (const char *)line - sizeof memory, sizeof memory);
    return memory;
}

/* In a build for sanitizers arrays end where their memory does: what goes beyond is seen. */
static void *memory_for_line(size_t bytes)
{
#ifdef BN_EXACT_MEMORY
    void *memory;
    return posix_memalign(&memory, LINE, LINE + bytes) == 0 ? memory : NULL;
#else
    return malloc(LINE_BYTES(bytes));
#endif
}

void *bn_line_malloc(void *context, size_t bytes)
{
    void *memory = bytes > SIZE_MAX - LINE_BYTES(0) ? NULL : memory_for_line(bytes);
    (void)context;
    return memory == NULL ? NULL : at_line(memory);
}

void *bn_line_calloc(void *context, size_t count, size_t size)
{
    void *line = size > 0 && count > SIZE_MAX / size ? NULL : bn_line_malloc(context, count * size);
    return line == NULL ? NULL : memset(line, 0, count * size);
}

void *bn_line_realloc(void *context, void *line, size_t bytes)
{
    (void)context;
    if (line == NULL) {
        return bn_line_malloc(context, bytes);
    }
    const size_t before = (uintptr_t)line - (uintptr_t)malloced(line);
    char *memory =
        bytes > SIZE_MAX - LINE_BYTES(0) ? NULL : realloc(malloced(line), LINE_BYTES(bytes));
    if (memory == NULL) {
        return NULL;
    }
    /* The new memory may begin elsewhere between two lines. Beyond the old values, and within the new
       memory, what is moved is whatever is there. */
    memmove(first_line(memory), memory + before, bytes);
    return at_line(memory);
}

void bn_line_free(void *context, void *line, size_t bytes)
{
    (void)context;
    (void)bytes;
    if (line != NULL) {
        free(malloced(line));
    }
}
