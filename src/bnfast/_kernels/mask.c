/* A mask in the order of a plan's walk, and what it says of chunks. */
#include "mask.h"

#include <string.h>

#include "boxes.h"

/* Whole lines, which all count or do not, are worth a kernel call of their own if they are so many bytes; those that are
   mixed go to kernels that ask of each position. */
#define FEWEST_BYTES ((size_t)4096)

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

static int is_uniform(const unsigned char *counts, size_t size) { return !memchr(counts, !*counts, size); }

/* What is found of a chunk, written where stretches and places are not NULL. */
typedef struct {
    const unsigned char *counts; /* from the chunk's first position on */
    bn_masked_chunk chunk;
    size_t places;
    bn_stretch last;
    bn_stretch *stretches;
    uint16_t *place;
} survey;

static int has_places(bn_stretch stretch)
{
    return stretch.count > 0 && stretch.count < stretch.end - stretch.first;
}

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
    if (has_places(last)) {
        for (size_t at = last.first; found->place && at < last.end; at++) {
            *found->place = (uint16_t)at;
            found->place += found->counts[at];
        }
        found->places += last.count;
    }
}

/* The next positions, all alike or not: they belong to the stretch before where that is so, too. */
static void add_positions(survey *found, size_t size, int uniform)
{
    const size_t first = found->last.end;
    const bn_stretch last = found->last;
    const int is_first = last.end == last.first;
    size_t count = 0;
    if (uniform) {
        count = found->counts[first] ? size : 0;
    } else {
        for (size_t i = first; i < first + size; i++) {
            count += found->counts[i];
        }
    }
    if (!is_first && (uniform ? !has_places(last) && (last.count > 0) == (count > 0) : has_places(last))) {
        found->last.end = (uint16_t)(last.end + size);
        found->last.count = (uint16_t)(last.count + count);
        return;
    }
    end_stretch(found);
    found->last = (bn_stretch){(uint16_t)first, (uint16_t)(first + size), (uint16_t)count, (uint16_t)found->places};
}

static survey survey_chunk(const bn_plan *plan, const unsigned char *counts, size_t size, bn_stretch *stretches,
                           uint16_t *places)
{
    const size_t line = MIN(plan->inner, plan->chunk_inner);
    const size_t unit = divide_up(FEWEST_BYTES, line * plan->channels * plan->itemsize) * line;
    survey found = {.counts = counts, .stretches = stretches, .place = places};
    for (size_t at = 0, count; at < size; at += count) {
        count = MIN(unit, size - at);
        add_positions(&found, count, is_uniform(counts + at, count));
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
        mask.chunks += repeat * plan->chunks;
        mask.total += repeat;
    }
    return mask;
}

size_t bn_mask_bytes(const bn_plan *plan)
{
    return plan->repeats * (sizeof(size_t) + plan->chunks * sizeof(bn_masked_chunk) + values_per_channel(plan));
}

bn_mask bn_new_mask(const bn_plan *plan, const bn_given_mask *given, void *memory, bn_mask_sizes *sizes)
{
    size_t *total = memory;
    bn_masked_chunk *chunk = (bn_masked_chunk *)(total + plan->repeats);
    unsigned char *counts = (unsigned char *)(chunk + plan->repeats * plan->chunks);
    const bn_mask mask = {.counts = counts, .chunks = chunk, .total = total};
    *sizes = (bn_mask_sizes){0, 0, 0};
    for (size_t repeat = 0; repeat < plan->repeats; repeat++) {
        total[repeat] = copy_repeat(given, repeat, counts);
        sizes->count += total[repeat];
        for (size_t number = 0; number < plan->chunks; number++, chunk++) {
            const size_t size = chunk_size(plan, number);
            const survey found = survey_chunk(plan, counts, size, NULL, NULL);
            *chunk = found.chunk;
            chunk->first_stretch = sizes->stretches;
            chunk->first_place = sizes->places;
            sizes->stretches += chunk->stretches;
            sizes->places += found.places;
            counts += size;
        }
    }
    return mask;
}

void bn_list_stretches(const bn_plan *plan, bn_mask *mask, bn_stretch *stretches, uint16_t *places)
{
    const unsigned char *counts = mask->counts;
    for (size_t number = 0; number < plan->repeats * plan->chunks; number++) {
        const bn_masked_chunk chunk = mask->chunks[number];
        const size_t size = chunk_size(plan, number % plan->chunks);
        survey_chunk(plan, counts, size, stretches + chunk.first_stretch, places + chunk.first_place);
        counts += size;
    }
    mask->stretches = stretches;
    mask->places = places;
}
