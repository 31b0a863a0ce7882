/* Where the elements of one call lie: an array seen as some repeats of (outer, channels, inner), cut
   into chunks and blocks. _layout.py makes it, knowing shape, strides and dtype only; here it is
   read. */
#ifndef BN_PLAN_H
#define BN_PLAN_H

#include <stddef.h>
#include <stdint.h>

#include "kernels.h"

/* What an operand is to a call. X is the first: see scaled_job. */
typedef enum {
    BN_X,
    BN_DY,
    BN_ELEMENT_WEIGHT,
    BN_ELEMENT_BIAS,
    BN_MASK, /* one byte for each element, 0 for those that do not count */
    BN_RESIDUAL, /* added to the output before its activation */
    BN_Y,
    BN_DX,
    BN_DRESIDUAL,
    BN_ROLES,
    BN_NONE = BN_ROLES
} bn_role;

#define BN_MAX_AXES 64

/* An operand is walked directly, with these strides in elements, or staged: its chunks are gathered
   into (and scattered from) scratch memory along the plan's axes, with strides in bytes. What is stored in
   another type than that of the arithmetic is staged, and converted on the way. */
typedef struct {
    int staged;
    bn_stored stored;
    ptrdiff_t outer_stride, channel_stride;
    ptrdiff_t outer_axis_strides[BN_MAX_AXES], inner_axis_strides[BN_MAX_AXES];
    /* In bytes, whether staged or not. */
    ptrdiff_t repeat_axis_strides[BN_MAX_AXES], channel_axis_strides[BN_MAX_AXES];
} bn_operand;

typedef struct bn_plan {
    bn_layout layout;
    bn_dtype dtype;  /* of the arithmetic */
    size_t itemsize; /* of that */
    size_t stored_itemsize; /* of x, dy and the output, in memory */

    /* What kernels read: a bn_dtype, or a bn_half, and its size. Where that is a half, and a job calls kernels that
       there are none of, its plan is the converted one. */
    int element_type;
    size_t element_bytes;
    const struct bn_plan *converted; /* NULL where elements are of the type of the arithmetic */
    const struct bn_plan *as_stored; /* of a converted plan: the other one */
    /* Each channel of each repeat has statistics of its own; what else is said here holds for each
       repeat. */
    size_t repeats;
    size_t repeat_axes, repeat_axis_sizes[BN_MAX_AXES];
    size_t outer, channels, inner;

    /* Inputs walk all channels with one stride. An output that cannot has more axes of them, the last of
       which it walks so. */
    size_t channel_axes, channel_axis_sizes[BN_MAX_AXES];

    /* The axes that make up outer and inner, slowest first: needed where an operand is staged. */
    size_t outer_axes, inner_axes;
    size_t outer_axis_sizes[BN_MAX_AXES], inner_axis_sizes[BN_MAX_AXES];

    /* A chunk is chunk_outer steps of outer by chunk_inner of inner; inner is cut into
       chunks_per_run pieces only where chunk_outer is 1. A block is some neighbouring chunks.
       What is summed with what follows from these numbers alone. */
    size_t chunk_outer, chunk_inner, chunks_per_run, chunks;
    size_t chunks_per_block, blocks;
    size_t interleave; /* rows of channels_last that are summed side by side, lane by lane */

    /* Sums over rows, which are the channels of all repeats, are made in blocks of this many rows: a part of the
       rows of one repeat, or all rows of several repeats. */
    size_t rows_of_block;

    int any_staged;
    bn_operand operand[BN_ROLES]; /* of those that the call has */
} bn_plan;

/* Coefficients of dense channels_last rows recur with this period, so that a few channels make long
   runs too; 0 where they do not. */
static inline size_t bn_period(const bn_plan *plan)
{
    return plan->layout == BN_channels_last ? plan->interleave * plan->channels : 0;
}

/* So many neighbouring channels, from a multiple of that on, are walked with one stride by all operands. */
static inline size_t bn_channel_run(const bn_plan *plan)
{
    const size_t axes = plan->channel_axes;
    return axes > 1 ? plan->channel_axis_sizes[axes - 1] : plan->channels;
}

/* How many elements a coefficient array must hold. */
static inline size_t bn_coefficients_length(const bn_plan *plan)
{
    const size_t period = bn_period(plan);
    return period ? period : plan->channels;
}

/* The number of blocks of rows in each repeat, and in all repeats. */
static inline size_t bn_row_blocks_of_repeat(const bn_plan *plan)
{
    return (plan->channels + plan->rows_of_block - 1) / plan->rows_of_block;
}

static inline size_t bn_row_blocks(const bn_plan *plan)
{
    const size_t parts = bn_row_blocks_of_repeat(plan);
    const size_t repeats_per_block = parts > 1 ? 1 : plan->rows_of_block / plan->channels; /* repeats */
    return (plan->repeats + repeats_per_block - 1) / repeats_per_block * parts;
}

#endif
