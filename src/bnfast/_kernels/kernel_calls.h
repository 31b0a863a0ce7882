/* Kernel calls over the boxes of a block, or of a piece of the output. */
#ifndef BN_KERNEL_CALLS_H
#define BN_KERNEL_CALLS_H

#include "boxes.h"

/* x, as it is summed. */
bn_view bn_x_to_sum(const bn_job *job, const bn_box *box);
/* What the sums have read in the place of dy, for what comes after them. Where they have not kept it, it is made once
   more: in the operand `keeper` or, for BN_NONE, in scratch. */
bn_view bn_upstream_to_read(const bn_job *job, const bn_box *box, bn_role keeper);

bn_input bn_input_of(const bn_job *job, const bn_box *box);

/* The sums of a box; the last two are of summaries. */
bn_sum_box bn_moments_of_box, bn_squares_of_box, bn_gradient_sums_of_box, bn_weighted_gradient_sums_of_box,
    bn_weighted_sums_and_columns_of_box, bn_summary_of_box, bn_counted_summary_of_box;

/* The same sums, of the `count` positions of a box that count, for at most BN_COUNTED_CHANNELS contiguous channels.
   They return the set of channels of which the caller must make the sums of gathered values. */
typedef uint64_t bn_sum_counted_box(const bn_job *job, const bn_box *box, block_sums block, size_t count);
bn_sum_counted_box bn_counted_moments_of_box, bn_counted_gradient_sums_of_box;

/* Moments of a box of x. */
void bn_add_moments(const bn_job *job, const bn_box *box, block_sums block, bn_view x);

/* Block by block: of moments, and of summaries. */
bn_merge_block bn_merge_moments, bn_merge_summaries;

/* The sums of a block for some channels: of moments, or of the gradient. */
void bn_clear_moments(const bn_job *job, size_t block, range channels);
void bn_sum_moments(const bn_job *job, size_t block, range channels);
void bn_sum_gradient(const bn_job *job, size_t block, range channels);

/* Of some channels of a box, whose first values are added to `block.count` others; with places, it is all of a chunk
   that these do not leave out. As many channels at a time as scratch holds, where it must. */
void bn_sum_channels(const bn_job *job, bn_box box, size_t max_channels, block_sums block, bn_sum_box *sum_box);

/* The output of a box, at most `max_channels` channels at a time. */
typedef void bn_write_part(const bn_job *job, const bn_box *part);
void bn_write_parts(const bn_job *job, const bn_box *box, size_t max_channels, bn_write_part *write_part);
bn_write_part bn_write_values;

/* The output of a block, from its end, or of a piece. */
void bn_write_block(const bn_job *job, size_t block, range channels);
void bn_write_piece(const bn_job *job, size_t number);

#endif
