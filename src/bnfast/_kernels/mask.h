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

/* Neighbouring positions of a chunk, counted from its first one: all of them count, none, or some here and there. */
typedef struct {
    uint16_t first, end;
    uint16_t count; /* of positions that count */
} bn_stretch;

typedef struct bn_masked_chunk {
    size_t count; /* of positions that count */
    size_t first_stretch, stretches;
} bn_masked_chunk;

/* In the order of the walk, [repeats][...]: positions are those of outer and inner. */
typedef struct {
    const unsigned char *counts; /* of each position: 1 or 0 */
    const bn_masked_chunk *chunks;
    const bn_stretch *stretches; /* of all chunks of all repeats */
    const size_t *total; /* how many positions count */
    char *numbers; /* of each position, in the type of the arithmetic: 1 or 0, as kernels of outputs read them */
    int keeps_input;     /* what does not count stays as it is; else it becomes 0 */
} bn_mask;

/* Of a plan's values: bytes of memory for all but the stretches. */
size_t bn_mask_bytes(const bn_plan *plan);

/* Whether all count, so that there is no need of a mask. */
int bn_mask_is_full(const bn_plan *plan, const bn_given_mask *given);

/* Fills that memory, aligned to size_t, and says how many positions count, in all repeats, and how many stretches there
   are, which are then listed. */
typedef struct {
    size_t count, stretches;
} bn_mask_sizes;

bn_mask bn_new_mask(const bn_plan *plan, const bn_given_mask *given, void *memory, bn_mask_sizes *sizes);
void bn_list_stretches(const bn_plan *plan, bn_mask *mask, bn_stretch *stretches);

bn_mask bn_mask_of_repeat(const bn_plan *plan, bn_mask mask, size_t repeat);

#endif
