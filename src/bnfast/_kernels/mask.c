/* A mask in the order of a plan's walk, and what it says of chunks. */
#include "mask.h"

#include <string.h>

#include "boxes.h"

/* Whole lines that count, or do not, are worth a kernel call of their own from FEWEST_BYTES on. A line is looked at in
   parts from FEWEST_LINE_OF_PARTS positions on: in MOST_IN_LINE parts at most, of FEWEST_IN_LINE positions at least.
   Lines that are mixed go to kernels that ask of each position. */
#define FEWEST_BYTES ((size_t)4096)
#define FEWEST_LINE_OF_PARTS ((size_t)512)
#define FEWEST_IN_LINE ((size_t)64)
#define MOST_IN_LINE ((size_t)8)

/* From the mask of a caller */

/* Goes to the next of the runs along the last axis; whether there is one. */
static int next_run(const bn_given_mask *given, const unsigned char **run, size_t *index)
{
    for (size_t axis = given->axes - 1; axis-- > 0;) {
        *run += given->strides[axis];
        if (++index[axis] < given->sizes[axis]) {
            return 1;
        }
        *run -= (ptrdiff_t)given->sizes[axis] * given->strides[axis];
        index[axis] = 0;
    }
    return 0;
}

/* Returns how many values count. */
static size_t copy_run(unsigned char *to, const unsigned char *from, ptrdiff_t stride, size_t length)
{
    size_t count = 0;
    if (stride == 1) {
        for (size_t i = 0; i < length; i++) {
            to[i] = from[i] != 0;
            count += to[i];
        }
    } else {
        for (size_t i = 0; i < length; i++) {
            to[i] = from[(ptrdiff_t)i * stride] != 0;
            count += to[i];
        }
    }
    return count;
}

static size_t copy_repeat(const bn_given_mask *given, size_t repeat, unsigned char *to)
{
    const unsigned char *run = given->data + (ptrdiff_t)repeat * given->repeat_stride;
    size_t index[BN_MAX_AXES] = {0}, count = 0;
    if (given->axes == 0) {
        return copy_run(to, run, 1, 1);
    }
    const size_t last = given->axes - 1, length = given->sizes[last];
    do {
        count += copy_run(to, run, given->strides[last], length);
        to += length;
    } while (next_run(given, &run, index));
    return count;
}

static int run_is_full(const unsigned char *run, ptrdiff_t stride, size_t length)
{
    if (stride == 1) {
        return !memchr(run, 0, length);
    }
    for (size_t i = 0; i < length; i++) {
        if (!run[(ptrdiff_t)i * stride]) {
            return 0;
        }
    }
    return 1;
}

/* Axes along which the mask says the same are asked of once. */
int bn_mask_is_full(const bn_plan *plan, const bn_given_mask *given)
{
    bn_given_mask different = *given;
    different.axes = 0;
    for (size_t axis = 0; axis < given->axes; axis++) {
        if (given->strides[axis] != 0) {
            different.sizes[different.axes] = given->sizes[axis];
            different.strides[different.axes++] = given->strides[axis];
        }
    }
    for (size_t repeat = 0; repeat < (given->repeat_stride ? plan->repeats : 1); repeat++) {
        const unsigned char *run = given->data + (ptrdiff_t)repeat * given->repeat_stride;
        size_t index[BN_MAX_AXES] = {0};
        if (different.axes == 0) {
            if (!*run) {
                return 0;
            }
            continue;
        }
        const size_t last = different.axes - 1;
        do {
            if (!run_is_full(run, different.strides[last], different.sizes[last])) {
                return 0;
            }
        } while (next_run(&different, &run, index));
    }
    return 1;
}

/* Chunks and their stretches */

/* What is found of a chunk, listed where there is room for it. */
typedef struct {
    const unsigned char *counts; /* from the chunk's first position on */
    bn_masked_chunk chunk;
    bn_stretch last;
    bn_stretch *stretches; /* NULL: for none */
} survey;

static void end_stretch(survey *found)
{
    const bn_stretch last = found->last;
    if (last.end == last.first) {
        return;
    }
    if (found->stretches) {
        found->stretches[found->chunk.stretches] = last;
    }
    found->chunk.stretches++;
    found->chunk.count += last.count;
}

/* Adds the next `size` positions, of which `count` count: to the last stretch, if that is of the same kind, else as a
   new stretch. */
static void add_positions(survey *found, size_t size, size_t count)
{
    const bn_stretch last = found->last;
    const size_t before = (size_t)(last.end - last.first);
    const int is_mixed = count > 0 && count < size, was_mixed = last.count > 0 && last.count < before;
    if (before > 0 && is_mixed == was_mixed && (is_mixed || (count > 0) == (last.count > 0))) {
        found->last.end = (uint16_t)(last.end + size);
        found->last.count = (uint16_t)(last.count + count);
        return;
    }
    end_stretch(found);
    found->last = (bn_stretch){last.end, (uint16_t)(last.end + size), (uint16_t)count};
}

/* Of bytes of 0 and 1. */
static size_t sum_of(const unsigned char *counts, size_t size)
{
    const uint64_t ones = UINT64_C(0x0101010101010101);
    size_t sum = 0, i = 0;
    for (; i + 64 <= size; i += 64) {
        uint64_t words[8], columns = 0;
        memcpy(words, counts + i, sizeof words);
        for (size_t j = 0; j < 8; j++) {
            columns += words[j];
        }
        sum += (size_t)(columns * ones >> 56);
    }
    for (; i < size; i++) {
        sum += counts[i];
    }
    return sum;
}

static survey survey_chunk(const bn_plan *plan, const unsigned char *counts, size_t size, bn_stretch *stretches)
{
    const size_t line = MIN(plan->inner, plan->chunk_inner);
    const size_t unit = divide_up(FEWEST_BYTES, line * plan->channels * plan->itemsize) * line;
    const size_t in_line = MAX(divide_up(line, MOST_IN_LINE * FEWEST_IN_LINE), (size_t)1) * FEWEST_IN_LINE;
    survey found = {.counts = counts, .stretches = stretches};
    for (size_t at = 0, part; at < size; at += part) {
        part = MIN(unit, size - at);
        const size_t count = sum_of(counts + at, part);
        if (count == 0 || count == part || line < FEWEST_LINE_OF_PARTS) {
            add_positions(&found, part, count);
            continue;
        }
        for (size_t first = at, some; first < at + part; first += some) {
            some = MIN(MIN(in_line, line - first % line), at + part - first);
            add_positions(&found, some, sum_of(counts + first, some));
        }
    }
    end_stretch(&found);
    return found;
}

static size_t chunk_size(const bn_plan *plan, size_t number)
{
    const bn_box box = box_of_chunk(plan, number, (range){0, 1});
    return box.extent.outer * box.extent.inner;
}

/* Repeats */

bn_mask bn_mask_of_repeat(const bn_plan *plan, bn_mask mask, size_t repeat)
{
    if (mask.counts) {
        mask.counts += repeat * values_per_channel(plan);
        mask.numbers += repeat * values_per_channel(plan) * plan->itemsize;
        mask.chunks += repeat * plan->chunks;
        mask.total += repeat;
    }
    return mask;
}

size_t bn_mask_bytes(const bn_plan *plan)
{
    return plan->repeats * (sizeof(size_t) + plan->chunks * sizeof(bn_masked_chunk) +
                            values_per_channel(plan) * (plan->itemsize + 1));
}

static void make_numbers(bn_dtype dtype, const unsigned char *counts, size_t size, void *numbers)
{
    float *floats = numbers;
    double *doubles = numbers;
    for (size_t i = 0; dtype == BN_f32 && i < size; i++) {
        floats[i] = (float)counts[i];
    }
    for (size_t i = 0; dtype == BN_f64 && i < size; i++) {
        doubles[i] = (double)counts[i];
    }
}

bn_mask bn_new_mask(const bn_plan *plan, const bn_given_mask *given, void *memory, bn_mask_sizes *sizes)
{
    size_t *total = memory;
    bn_masked_chunk *chunk = (bn_masked_chunk *)(total + plan->repeats);
    char *numbers = (char *)(chunk + plan->repeats * plan->chunks);
    unsigned char *counts = (unsigned char *)numbers + plan->repeats * values_per_channel(plan) * plan->itemsize;
    const bn_mask mask = {.counts = counts, .numbers = numbers, .chunks = chunk, .total = total};
    *sizes = (bn_mask_sizes){0, 0};
    for (size_t repeat = 0; repeat < plan->repeats; repeat++) {
        total[repeat] = copy_repeat(given, repeat, counts);
        sizes->count += total[repeat];
        for (size_t number = 0; number < plan->chunks; number++, chunk++) {
            const size_t size = chunk_size(plan, number);
            const survey found = survey_chunk(plan, counts, size, NULL);
            *chunk = found.chunk;
            chunk->first_stretch = sizes->stretches;
            sizes->stretches += chunk->stretches;
            counts += size;
        }
    }
    make_numbers(plan->dtype, mask.counts, plan->repeats * values_per_channel(plan), numbers);
    return mask;
}

void bn_list_stretches(const bn_plan *plan, bn_mask *mask, bn_stretch *stretches)
{
    const unsigned char *counts = mask->counts;
    for (size_t number = 0; number < plan->repeats * plan->chunks; number++) {
        const bn_masked_chunk chunk = mask->chunks[number];
        const size_t size = chunk_size(plan, number % plan->chunks);
        survey_chunk(plan, counts, size, stretches + chunk.first_stretch);
        counts += size;
    }
    mask->stretches = stretches;
}
