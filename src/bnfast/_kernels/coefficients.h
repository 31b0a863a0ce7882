/* From the sums of some channels to their coefficients, and what is summed again on the way. */
#ifndef BN_COEFFICIENTS_H
#define BN_COEFFICIENTS_H

#include "boxes.h"

/* Of blocks that have been summed. */
void bn_merge_blocks(const bn_job *job, range channels);
void bn_mend_moments(const bn_job *job, range channels);

/* The low part of a mean, for the gradient: whether one is missed, and its sums. */
int bn_any_noticed(const bn_job *job, range channels);
void bn_sum_mean_low(const bn_job *job, size_t block, range channels);

/* The steps of a gradient, among which method.c chooses. Before its sums: the coefficients that the sums need. From the
   sums: the coefficients of dx, for statistics that did not come from x, for groups, and for single channels. */
bn_do_channels bn_round_mean, bn_make_output_again;
bn_do_channels bn_constant_coefficients, bn_frozen_coefficients, bn_grouped_coefficients, bn_gradient_coefficients;

/* Coefficients, before the sums and from them. */
void bn_prepare_scale_shift(const bn_job *job, range channels);
void bn_set_floors(const bn_job *job, range channels, bn_coefficient shift);
void bn_prepare_gradient(const bn_job *job, range channels);
void bn_finish_normalize(const bn_job *job, range channels);
void bn_finish_gradient(const bn_job *job, range channels);

#endif
