/* Tasks by number: see job.h. */
#ifndef BN_TASKS_H
#define BN_TASKS_H

#include "boxes.h"

/* The same job, with the repeat's part of every array that has one for each repeat. */
bn_job bn_job_of_repeat(const bn_job *job, size_t repeat);

/* By slab and block. */
void bn_moments_task(const bn_job *job, size_t number);
void bn_mean_low_task(const bn_job *job, size_t number);
void bn_gradient_sums_task(const bn_job *job, size_t number);

/* By piece. */
void bn_output_task(const bn_job *job, size_t number);

/* By slab: sums of all blocks, and the output. */
void bn_fused_normalize_task(const bn_job *job, size_t number);
void bn_fused_gradient_task(const bn_job *job, size_t number);
void bn_sum_gradient_of_all_blocks(const bn_job *job, range channels);

/* By channels alone, so many at a time. */
size_t bn_channels_per_task(const bn_job *job);
void bn_finish_moments_task(const bn_job *job, size_t number);
void bn_prepare_scale_shift_task(const bn_job *job, size_t number);
void bn_prepare_gradient_task(const bn_job *job, size_t number);
void bn_finish_normalize_task(const bn_job *job, size_t number);
void bn_finish_gradient_task(const bn_job *job, size_t number);

/* By blocks of rows, whose elements have parameters. */
size_t bn_row_unit(const bn_plan *plan);
void bn_row_gradient_task(const bn_job *job, size_t number);
void bn_merge_columns_task(const bn_job *job, size_t number);

#endif
