/* From task numbers to the work of some channels. */
#include "tasks.h"

#include "coefficients.h"
#include "kernel_calls.h"

/* one repeat: the same job, with the repeat's part of every array that has one for each repeat */

static char *operand_of_repeat(const bn_plan *plan, bn_role role, char *data,
                               size_t repeat)
{
    for (size_t axis = plan->repeat_axes; data && axis-- > 0;) {
        const size_t size = plan->repeat_axis_sizes[axis];
        data += (ptrdiff_t)(repeat % size) * plan->operand[role].repeat_axis_strides[axis];
        repeat /= size;
    }
    return data;
}

static double *statistics_of_repeat(double *statistics, size_t values_per_repeat, size_t repeat)
{
    return statistics ? statistics + repeat * values_per_repeat : NULL;
}

bn_job bn_job_of_repeat(const bn_job *job, size_t repeat)
{
    const bn_plan *plan = job->plan;
    const size_t channels = plan->channels;
    bn_job repeat_job = *job;
    for (size_t role = 0; role < BN_ROLES; role++) {
        repeat_job.operand[role] =
            operand_of_repeat(plan, (bn_role)role, job->operand[role], repeat);
    }
    repeat_job.weight = parameter_from(job->weight, repeat * job->parameters_of_repeat);
    repeat_job.bias = parameter_from(job->bias, repeat * job->parameters_of_repeat);
    for (size_t i = 0; i < BN_STATISTICS; i++) {
        repeat_job.statistic[i] = statistics_of_repeat(job->statistic[i], channels, repeat);
    }
    repeat_job.partials = statistics_of_repeat(
        job->partials, (plan->blocks - 1) * job->partial_sums * channels, repeat);
    repeat_job.mask = bn_mask_of_repeat(plan, job->mask, repeat);
    for (size_t i = 0; i < BN_COEFFICIENTS; i++) {
        if (job->coefficients.array[i]) {
            repeat_job.coefficients.array[i] = element_at(plan, job->coefficients.array[i],
                                                          repeat * bn_coefficients_length(plan));
        }
    }
    return repeat_job;
}

static void do_task(const bn_job *job, const bn_stage *stage, size_t number)
{
    if (job->plan->repeats == 1 || stage->once) {
        stage->task(job, number);
    } else {
        const bn_job repeat_job = bn_job_of_repeat(job, number / stage->tasks);
        stage->task(&repeat_job, number % stage->tasks);
    }
}

void bn_do_tasks(const bn_job *job, const bn_stage *stage, size_t thread, size_t first, size_t end)
{
    bn_job thread_job;
    if (thread > 0 && job->scratch) {
        thread_job = *job;
        thread_job.scratch += thread * BN_BUFFERS * job->scratch_bytes;
        job = &thread_job;
    }
    for (size_t number = first; number < end; number++) {
        do_task(job, stage, number);
    }
}

/* tasks: number -> slab and, unless the task is fused, block */

static range task_channels(const bn_job *job, size_t number)
{
    return channels_of_slab(job, number % job->slabs);
}

static size_t task_block(const bn_job *job, size_t number) { return number / job->slabs; }

void bn_moments_task(const bn_job *job, size_t number)
{
    bn_sum_moments(job, task_block(job, number), task_channels(job, number));
}

void bn_mean_low_task(const bn_job *job, size_t number)
{
    bn_sum_mean_low(job, task_block(job, number), task_channels(job, number));
}

void bn_gradient_sums_task(const bn_job *job, size_t number)
{
    bn_sum_gradient(job, task_block(job, number), task_channels(job, number));
}

void bn_output_task(const bn_job *job, size_t number)
{
    bn_write_piece(job, number);
}

void bn_fused_normalize_task(const bn_job *job, size_t number)
{
    const range channels = channels_of_slab(job, number);
    const size_t blocks = job->plan->blocks;
    for (size_t block = 0; block < blocks; block++) {
        bn_sum_moments(job, block, channels);
    }
    bn_finish_normalize(job, channels);
    for (size_t block = blocks; block-- > 0;) {
        bn_write_block(job, block, channels);
    }
}

/* From the statistics to the coefficients of dx, for some channels alone. */
void bn_sum_gradient_of_all_blocks(const bn_job *job, range channels)
{
    const size_t blocks = job->plan->blocks;
    for (size_t block = 0; job->statistic[BN_MEAN_LOW] && block < blocks; block++) {
        bn_sum_mean_low(job, block, channels);
    }
    bn_prepare_gradient(job, channels);
    for (size_t block = 0; block < blocks; block++) {
        bn_sum_gradient(job, block, channels);
    }
    bn_finish_gradient(job, channels);
}

void bn_fused_gradient_task(const bn_job *job, size_t number)
{
    const range channels = channels_of_slab(job, number);
    const size_t blocks = job->plan->blocks;
    bn_sum_gradient_of_all_blocks(job, channels);
    for (size_t block = blocks; block-- > 0;) {
        bn_write_block(job, block, channels);
    }
}

/* tasks over channels alone */

/* As near to BN_CHANNELS_PER_TASK as channels that share their statistics allow, and those of a wide row,
   whose coefficients recur. */
size_t bn_channels_per_task(const bn_job *job)
{
    const size_t wanted = divide_up(BN_CHANNELS_PER_TASK, job->plan->blocks);
    return divide_up(MAX(wanted, BN_WIDE_ROW), job->per_group) * job->per_group;
}

static range channels_of_task(const bn_job *job, size_t number)
{
    const size_t first = number * bn_channels_per_task(job);
    return (range){first, MIN(bn_channels_per_task(job), job->plan->channels - first)};
}

void bn_finish_moments_task(const bn_job *job, size_t number)
{
    bn_merge_blocks(job, channels_of_task(job, number));
    bn_mend_moments(job, channels_of_task(job, number));
}

void bn_prepare_scale_shift_task(const bn_job *job, size_t number)
{
    bn_prepare_scale_shift(job, channels_of_task(job, number));
}

void bn_prepare_gradient_task(const bn_job *job, size_t number)
{
    bn_prepare_gradient(job, channels_of_task(job, number));
}

void bn_finish_normalize_task(const bn_job *job, size_t number)
{
    bn_finish_normalize(job, channels_of_task(job, number));
}

void bn_finish_gradient_task(const bn_job *job, size_t number)
{
    bn_finish_gradient(job, channels_of_task(job, number));
}
