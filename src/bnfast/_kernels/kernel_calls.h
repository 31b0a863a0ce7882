/* Kernel calls over the boxes of a block, or of a piece of the output. */
#ifndef BN_KERNEL_CALLS_H
#define BN_KERNEL_CALLS_H

#include "boxes.h"

/* The sums of a box. */
bn_sum_box bn_moments_of_box, bn_squares_of_box, bn_gradient_sums_of_box, bn_weighted_gradient_sums_of_box,
    bn_weighted_sums_and_columns_of_box;

/* The sums of a block for some channels: of moments, or of the gradient. */
void bn_clear_moments(const bn_job *job, size_t block, range channels);
void bn_sum_moments(const bn_job *job, size_t block, range channels);
void bn_sum_gradient(const bn_job *job, size_t block, range channels);

/* The output of a block, from its end, or of a piece. */
void bn_write_block(const bn_job *job, size_t block, range channels);
void bn_write_piece(const bn_job *job, size_t number);

#endif
