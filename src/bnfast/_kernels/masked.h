/* Sums and outputs where a mask says which values count. */
#ifndef BN_MASKED_H
#define BN_MASKED_H

#include "kernel_calls.h"

/* Adds a block's values that count. */
void bn_sum_masked_block(const bn_job *job, size_t number, range channels, int in_scratch, bn_sum_box *sum_box);

/* The output of a box: of what counts; the rest of it is padding. */
void bn_write_masked(const bn_job *job, const bn_box *box, size_t max_channels);

/* The mask of a box to write, as kernels read it: see masked.inc. */
bn_view bn_padding_view(const bn_job *job, const bn_box *box);

/* Puts a box of the output, made of all values, in its place, with the padding where values do not count. */
void bn_write_merged(const bn_job *job, const bn_box *box, bn_view made);

#endif
