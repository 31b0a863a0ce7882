/* Which values of a call count: the same positions of all channels. */
#ifndef BN_MASK_H
#define BN_MASK_H

#include <stdint.h>

#include "plan.h"

/* A mask as the caller has it: one byte, 0 for what does not count, at each index of the repeats and of the plan's
   walked axes, slowest first; strides in bytes. */
typedef struct {
    const unsigned char *data;
    ptrdiff_t repeat_stride;
    size_t axes, sizes[BN_MAX_AXES];
    ptrdiff_t strides[BN_MAX_AXES];
} bn_given_mask;

/* Neighbouring positions of a chunk, counted from its first one: all of them count, none, or some here and there, whose
   places are then listed. */
typedef struct {
    uint16_t first, end;
    uint16_t count;       /* of positions that count */
    uint16_t first_place; /* of the chunk's places */
} bn_stretch;

typedef struct bn_masked_chunk {
    size_t count; /* of positions that count */
    size_t first_stretch, stretches;
    size_t first_place;
} bn_masked_chunk;

/* In the order of the walk, [repeats][...]: positions are those of outer and inner. */
typedef struct {
    const unsigned char *counts; /* of each position: 1 or 0 */
    const bn_masked_chunk *chunks;
    const bn_stretch *stretches; /* these two are of all chunks of all repeats */
    const uint16_t *places;
    const size_t *total; /* how many positions count */
    int keeps_input;     /* what does not count stays as it is; else it becomes 0 */
} bn_mask;

/* Of a plan's values: bytes of memory for `counts`, `chunks` and `total`. */
size_t bn_mask_bytes(const bn_plan *plan);

/* Whether all count, so that there is no need of a mask. */
int bn_mask_is_full(const bn_plan *plan, const bn_given_mask *given);

/* Fills that memory, aligned to size_t, and says how many positions count, in all repeats, how many stretches there are
   and how many places; then these are filled, with room for one place more. */
typedef struct {
    size_t count, stretches, places;
} bn_mask_sizes;

bn_mask bn_new_mask(const bn_plan *plan, const bn_given_mask *given, void *memory, bn_mask_sizes *sizes);
void bn_list_stretches(const bn_plan *plan, bn_mask *mask, bn_stretch *stretches, uint16_t *places);

bn_mask bn_mask_of_repeat(const bn_plan *plan, bn_mask mask, size_t repeat);

#endif
