/* A box of an operand as something a kernel can walk: where it lies, or staged in scratch, in
   the type of the arithmetic. */
#ifndef BN_OPERANDS_H
#define BN_OPERANDS_H

#include "plan.h"

/* Most bytes of one scratch buffer; a chunk of one channel must fit, and Plan sees to it. */
#define BN_SCRATCH_BYTES ((size_t)32768)

/* ... but for whole rows of another storage type, which are converted in the order in which they lie: the second
   level of cache has room for so much. */
#define BN_SCRATCH_OF_ROWS ((size_t)131072)
/* Of what an activation lets through, whole rows are made: boxes of a few channels of each row took twice as long. */
#define BN_ROW_SCRATCH_BYTES ((size_t)262144)

/* Of a plan: rows that are summed side by side are not taken apart, so that what is read is one run. */
static inline size_t bn_scratch_bytes(const bn_plan *plan)
{
    const size_t chunk = plan->chunk_outer * plan->channels * plan->itemsize;
    const int is_converted = plan->layout == BN_channels_last && plan->stored_itemsize != plan->itemsize;
    if (chunk <= BN_SCRATCH_BYTES || !(is_converted || plan->interleave > 1)) {
        return BN_SCRATCH_BYTES;
    }
    return plan->interleave > 1 || chunk < BN_SCRATCH_OF_ROWS ? chunk : BN_SCRATCH_OF_ROWS;
}

typedef struct {
    size_t outer, channel, inner; /* where the box begins */
    bn_extent extent;
    /* Under a mask, NULL where all values count. A box to sum has values gathered from this chunk, which come after
       `first_gathered` others of the chunk; a box to write has a byte for each position, 0 where it does not count. */
    const struct bn_masked_chunk *gathered;
    size_t first_gathered;
    const unsigned char *counts;
} bn_box;

/* As much memory as a box, without gaps. */
bn_view bn_dense_view(const bn_box *box, char *scratch);

/* A box to read: the operand's own elements, or scratch filled with them. */
bn_view bn_view_to_read(const bn_kernels *kernels, const bn_plan *plan, bn_role role, char *data,
                        const bn_box *box, char *scratch);

/* A box to write: the operand's own elements, or scratch. bn_written puts scratch in its place, and
   does nothing for a direct operand. */
bn_view bn_view_to_write(const bn_plan *plan, bn_role role, char *data,
                         const bn_box *box, char *scratch);
void bn_written(const bn_kernels *kernels, const bn_plan *plan, bn_role role, char *data,
                const bn_box *box, char *scratch, bn_stores stores);

#endif
