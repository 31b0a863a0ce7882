/* Some channels: before the sums of their blocks, and from the sums to the coefficients. */
#include "coefficients.h"

#include <math.h>

#include "kernel_calls.h"
#include "portability.h"

void bn_merge_moments(const bn_job *job, block_sums block, range channels)
{
    const size_t c = channels.first, counted = counted_of_block(job, block.number);
    if (counted == 0) {
        return;
    }
    job->kernels->merge_moments(
        channels.count, block.count, job->statistic[BN_MEAN] + c, job->statistic[BN_MEAN_LOW] + c,
        job->statistic[BN_M2] + c, counted, sums_of_block(job, BN_MEAN, block.number, c),
        sums_of_block(job, BN_MEAN_LOW, block.number, c), sums_of_block(job, BN_M2, block.number, c));
}

void bn_merge_blocks(const bn_job *job, range channels)
{
    block_sums block = {1, counted_of_block(job, 0), channels.first};
    for (; block.number < job->plan->blocks; block.number++) {
        job->method.merge(job, block, channels);
        block.count += counted_of_block(job, block.number);
    }
}

/* Copies the moments of groups that were summed as runs, which lie side by side, to every channel of the group. */
static void spread_moments(size_t channels, size_t per_group, double *moments)
{
    for (size_t group = channels / per_group; group-- > 0;) {
        const double group_moment = moments[group];
        for (size_t c = group * per_group; c < (group + 1) * per_group; c++) {
            moments[c] = group_moment;
        }
    }
}

static void merge_gradient(const bn_job *job, range channels)
{
    static const bn_statistic sums[] = {BN_SUM_DY, BN_SUM_DY_XHAT, BN_SUM_ACTIVATION};
    const size_t c = channels.first;
    for (size_t block = 1; block < job->plan->blocks; block++) {
        for (size_t i = 0; i < sizeof sums / sizeof *sums; i++) {
            if (job->statistic[sums[i]]) {
                job->kernels->merge_sums(channels.count, job->statistic[sums[i]] + c,
                                         sums_of_block(job, sums[i], block, c));
            }
        }
    }
}

/* Pools the moments of the channels that share statistics; each of these channels then holds the pooled
   moments. */
static void share_moments(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    if (groups_are_runs(job)) {
        spread_moments(channels.count, job->per_group, job->statistic[BN_MEAN] + c);
        spread_moments(channels.count, job->per_group, job->statistic[BN_MEAN_LOW] + c);
        spread_moments(channels.count, job->per_group, job->statistic[BN_M2] + c);
    } else if (job->per_group > 1) {
        job->kernels->pool_moments(channels.count / job->per_group, job->per_group,
                                   counted_values(job), job->statistic[BN_MEAN] + c,
                                   job->statistic[BN_MEAN_LOW] + c, job->statistic[BN_M2] + c);
    }
}

static void moments_again(const bn_job *job, range channels)
{
    for (size_t block = 0; block < job->plan->blocks; block++) {
        bn_sum_moments(job, block, channels);
    }
    bn_merge_blocks(job, channels);
    share_moments(job, channels);
}

/* the ends of float64's range, from which there is no wider type to retreat to (float32 has float64) */

/* Whether there is nothing to mend: asked of every channel, and so by vectors. */
static int are_within(size_t count, const double *values, double lower, double upper)
{
    int64_t outside = 0;
    BN_SIMD_ANY(outside)
    for (size_t c = 0; c < count; c++) {
        outside |= values[c] >= lower && values[c] <= upper ? 0 : 1;
    }
    return outside == 0;
}

/* What x must be multiplied by before it is summed, so that no square leaves the range: 0 where none did.
   Where all of the variance is tiny, eps is, too; a large mean then says that values are all equal. */
#define SMALLER 0x1p-600
#define LARGER 0x1p600
#define SMALL_INVSTD 0x1p-510
#define LARGE_INVSTD 0x1p450

static double factor_needed(const bn_job *job, size_t c)
{
    if (!job->statistic[BN_INVSTD]) {
        return job->statistic[BN_M2][c] <= DBL_MAX ? 0.0 : SMALLER;
    }
    if (!(job->statistic[BN_INVSTD][c] > 0.0)) {
        return SMALLER;
    }
    return job->statistic[BN_INVSTD][c] > LARGE_INVSTD && fabs(job->statistic[BN_MEAN][c]) < 0x1p-350 ? LARGER : 0.0;
}

/* The same job with x scaled in scratch: its own, or `rare` where it has none. */
static bn_job scaled_job(const bn_job *job, double factor, char *rare)
{
    bn_job scaled = *job;
    scaled.scaled = 1;
    scaled.factor = factor;
    scaled.statistic[BN_MINIMUM] = NULL; /* which are right already */
    bn_choose_method(&scaled);
    if (!job->scratch) {
        scaled.scratch = rare;
        scaled.scratch_bytes = BN_SCRATCH_BYTES;
    }
    return scaled;
}

BN_NOINLINE void scaled_moments(const bn_job *job, range channels, double factor)
{
    const double size = (double)(MAX(counted_values(job), (size_t)1) * job->per_group);
    _Alignas(64) char rare[BN_SCRATCH_BYTES];
    const bn_job scaled = scaled_job(job, factor, rare);
    moments_again(&scaled, channels);
    for (size_t c = channels.first; c < channels.first + channels.count; c++) {
        const double eps = job->eps + (job->channel_eps ? job->channel_eps[c] : 0.0);
        if (job->statistic[BN_INVSTD]) {
            job->kernels->invstd(1, job->statistic[BN_M2] + c, size, eps * factor * factor, NULL,
                                 job->statistic[BN_INVSTD] + c);
            job->statistic[BN_INVSTD][c] *= factor;
        }
        job->statistic[BN_MEAN][c] /= factor;
        job->statistic[BN_MEAN_LOW][c] /= factor;
        /* Infinite, where float64 does not hold it. */
        job->statistic[BN_M2][c] = job->statistic[BN_M2][c] / factor / factor;
    }
}

/* Neighbours that need the same factor are summed together. */
void bn_mend_moments(const bn_job *job, range channels)
{
    const size_t end = channels.first + channels.count;
    range neighbours = {channels.first, 0};
    if (job->plan->dtype == BN_f32 ||
        (job->statistic[BN_INVSTD] &&
         are_within(channels.count, job->statistic[BN_INVSTD] + channels.first, SMALL_INVSTD,
                    LARGE_INVSTD))) {
        return;
    }
    for (; neighbours.first < end; neighbours.first += neighbours.count) {
        const double factor = factor_needed(job, neighbours.first);
        neighbours.count = job->per_group;
        while (neighbours.first + neighbours.count < end &&
               factor_needed(job, neighbours.first + neighbours.count) == factor) {
            neighbours.count += job->per_group;
        }
        if (factor != 0.0) {
            scaled_moments(job, neighbours, factor);
        }
    }
}

/* 1 / standard deviation of a channel. Outside these bounds dy * (x - mean) may leave the range of float64
   although dy * xhat does not. */
#define LEAST_INVSTD 0x1p-64
#define MOST_INVSTD 0x1p64

static int is_extreme(double invstd)
{
    return invstd > 0.0 && invstd <= DBL_MAX && !(invstd >= LEAST_INVSTD && invstd <= MOST_INVSTD);
}

/* Sums of dy * xhat with x made xhat, but for a factor, before it is summed. */
BN_NOINLINE void scaled_gradient(const bn_job *job, range channels)
{
    _Alignas(64) char rare[BN_SCRATCH_BYTES];
    const bn_job scaled = scaled_job(job, 1.0, rare);
    for (size_t block = 0; block < job->plan->blocks; block++) {
        bn_sum_gradient(&scaled, block, channels);
    }
    merge_gradient(&scaled, channels);
    for (size_t c = channels.first; c < channels.first + channels.count; c++) {
        const double factor = power_of_two(job->statistic[BN_INVSTD][c]);
        const double low = job->statistic[BN_MEAN_LOW] ? job->statistic[BN_MEAN_LOW][c] * factor : 0.0;
        const double sum = job->statistic[BN_SUM_DY_XHAT][c] - (low == 0.0 ? 0.0 : low * job->statistic[BN_SUM_DY][c]);
        job->statistic[BN_SUM_DY_XHAT][c] = sum * (job->statistic[BN_INVSTD][c] / factor);
    }
}

static void mend_gradient(const bn_job *job, range channels)
{
    const size_t end = channels.first + channels.count;
    range neighbours = {channels.first, 0};
    if (job->plan->dtype == BN_f32 ||
        are_within(channels.count, job->statistic[BN_INVSTD] + channels.first, LEAST_INVSTD, MOST_INVSTD)) {
        return;
    }
    for (; neighbours.first < end; neighbours.first += neighbours.count) {
        const int extreme = is_extreme(job->statistic[BN_INVSTD][neighbours.first]);
        neighbours.count = 1;
        while (neighbours.first + neighbours.count < end &&
               is_extreme(job->statistic[BN_INVSTD][neighbours.first + neighbours.count]) == extreme) {
            neighbours.count++;
        }
        if (extreme) {
            scaled_gradient(job, neighbours);
        }
    }
}

/* In standard deviations: where the mean is larger, what rounding it to one float64 has left is no less
   than other roundings of the gradient are. */
#define NOTICED_MEAN 4.0

static int is_noticed(const bn_job *job, size_t c)
{
    return fabs(job->statistic[BN_MEAN][c] * job->statistic[BN_INVSTD][c]) > NOTICED_MEAN;
}

int bn_any_noticed(const bn_job *job, range channels)
{
    int64_t any = 0;
    BN_SIMD_ANY(any)
    for (size_t c = channels.first; c < channels.first + channels.count; c++) {
        any |= is_noticed(job, c) ? 1 : 0;
    }
    return any != 0;
}

/* The sums of the forward pass, made again from x, give what rounding left of the mean. A task sums all of its
   channels where one needs this, because channels may be neighbours in memory, but keeps the result only for the
   channels that do. The sums stand where the sums of the gradient will. */
static bn_job job_of_mean_low(const bn_job *job)
{
    bn_job forward_job = *job;
    forward_job.statistic[BN_MEAN] = job->statistic[BN_SUM_DY];
    forward_job.statistic[BN_M2] = job->statistic[BN_SUM_DY_XHAT];
    return forward_job;
}

void bn_sum_mean_low(const bn_job *job, size_t block, range channels)
{
    const bn_job forward_job = job_of_mean_low(job);
    if (bn_any_noticed(job, channels)) {
        bn_sum_moments(&forward_job, block, channels);
    } else {
        bn_clear_moments(&forward_job, block, channels);
    }
}

/* Keeps the low part where the caller's mean is the mean of x, rounded. Any other mean is used as given, and has
   no low part. */
static void finish_mean_low(const bn_job *job, range channels)
{
    const bn_job forward_job = job_of_mean_low(job);
    if (!bn_any_noticed(job, channels)) {
        clear(job->statistic[BN_MEAN_LOW], channels);
        return;
    }
    bn_merge_blocks(&forward_job, channels);
    share_moments(&forward_job, channels);
    for (size_t c = channels.first; c < channels.first + channels.count; c++) {
        const double mean = job->statistic[BN_MEAN][c];
        const double rest = (forward_job.statistic[BN_MEAN][c] - mean) + job->statistic[BN_MEAN_LOW][c];
        const int is_rounding_error = is_noticed(job, c) && fabs(rest) <= DBL_EPSILON * fabs(mean);
        job->statistic[BN_MEAN_LOW][c] = is_rounding_error ? rest : 0.0;
    }
}

/* Tiles the coefficients until they cover one wide row. */
static void tile(const bn_plan *plan, void *array)
{
    const size_t length = bn_coefficients_length(plan);
    for (size_t set = plan->channels; set < length;) {
        const size_t count = MIN(set, length - set);
        memcpy(element_at(plan, array, set), array, count * plan->itemsize);
        set += count;
    }
}

/* Coefficients recur where a box may have all channels; a task then has all of them, too. */
static void tile_coefficients(const bn_job *job, range channels)
{
    const int is_whole_row = channels.count == job->plan->channels;
    for (size_t i = 0; is_whole_row && i < BN_COEFFICIENTS; i++) {
        if (job->coefficients.array[i]) {
            tile(job->plan, job->coefficients.array[i]);
        }
    }
}

/* Without an activation that has one, or where what it was given is made again, there is no floor. */
void bn_set_floors(const bn_job *job, range channels, bn_coefficient shift)
{
    const bn_coefficients coefficients = coefficients_from(job, channels.first);
    const int has_floor = job->activation.kind == BN_activation_piecewise && !job->method.again;
    if (coefficients.array[BN_FLOOR]) {
        job->kernels->activation_coefficients[job->plan->dtype](
            channels.count, has_floor ? parameter_from(job->floors, channels.first) : NULL,
            has_floor ? job->activation.floor : -INFINITY, coefficients.array[shift], coefficients.array[BN_FLOOR]);
    }
}

/* Of a leaky one the edge is 0, where its slopes meet. */
static void set_gates(const bn_job *job, range channels, bn_coefficients forward)
{
    const bn_activated activation = job->activation;
    const int of_x = job->method.gate == BN_X;
    const double edge = activation.slope == 1.0 ? activation.floor : 0.0;
    job->kernels->gate_coefficients[job->plan->dtype](
        channels.count, parameter_from(job->floors, channels.first), edge, activation.ceiling, activation.closed,
        forward.array[BN_ROUNDED_MEAN], of_x ? forward.array[BN_SCALE] : NULL, forward.array[BN_SHIFT],
        coefficients_from(job, channels.first));
}

void bn_prepare_scale_shift(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    if (job->statistic[BN_VARIANCE]) {
        job->kernels->invstd(channels.count, job->statistic[BN_VARIANCE] + c, 1.0, job->eps, NULL,
                             job->statistic[BN_INVSTD] + c);
    } else if (!job->invstd_given) {
        for (size_t i = c; i < c + channels.count; i++) {
            job->statistic[BN_INVSTD][i] = 1.0;
        }
    }
    job->kernels->scale_shift_coefficients[job->plan->dtype](
        channels.count, 0, parameter_from(job->statistic[BN_MEAN], c), parameter_from(job->statistic[BN_MEAN_LOW], c),
        job->statistic[BN_INVSTD] + c, parameter_from(job->weight, c), parameter_from(job->bias, c),
        coefficients_from(job, c));
    bn_set_floors(job, channels, BN_SHIFT);
    tile_coefficients(job, channels);
}

void bn_round_mean(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    job->kernels->round_mean[job->plan->dtype](channels.count, job->statistic[BN_MEAN] + c,
                                               coefficients_from(job, c));
}

/* The coefficients of the forward pass; its shift is stored as `shift`, apart from the gradient's. */
static bn_coefficients forward_coefficients(const bn_job *job, range channels, bn_coefficient shift)
{
    bn_coefficients forward = coefficients_from(job, channels.first);
    forward.array[BN_SHIFT] = forward.array[shift];
    if (forward.array[BN_FORWARD_SCALE]) {
        forward.array[BN_SCALE] = forward.array[BN_FORWARD_SCALE];
    }
    return forward;
}

static void make_forward_coefficients(const bn_job *job, range channels, bn_coefficient shift, int skip_remainder)
{
    const size_t c = channels.first;
    if (job->coefficients.array[shift]) {
        job->kernels->scale_shift_coefficients[job->plan->dtype](
            channels.count, skip_remainder, job->statistic[BN_MEAN] + c,
            parameter_from(job->statistic[BN_MEAN_LOW], c), job->statistic[BN_INVSTD] + c,
            parameter_from(job->weight, c), parameter_from(job->bias, c), forward_coefficients(job, channels, shift));
    }
}

/* And what y and xhat are made of again; where dy goes through an activation. */
void bn_make_output_again(const bn_job *job, range channels)
{
    const bn_coefficient shift = shift_of_z(job);
    if (job->column_sums) {
        make_forward_coefficients(job, channels, BN_FORWARD_SHIFT, 1);
    } else if (!job->coefficients.array[shift]) {
        bn_round_mean(job, channels);
    }
    make_forward_coefficients(job, channels, shift, 0);
    if (job->coefficients.array[BN_KEPT_FROM]) {
        set_gates(job, channels, forward_coefficients(job, channels, shift));
    }
    if (job->coefficients.array[shift]) {
        bn_set_floors(job, channels, shift);
    }
    if (job->method.again) {
        tile_coefficients(job, channels);
    }
}

/* Once the low part of the mean is known. */
void bn_prepare_gradient(const bn_job *job, range channels)
{
    if (job->statistic[BN_MEAN_LOW] && !job->mean_low_given) {
        finish_mean_low(job, channels);
    }
    job->method.prepare(job, channels);
}

void bn_finish_normalize(const bn_job *job, range channels)
{
    const size_t c = channels.first, values = MAX(counted_values(job), (size_t)1);
    bn_merge_blocks(job, channels);
    share_moments(job, channels);
    job->kernels->invstd(channels.count, job->statistic[BN_M2] + c, (double)(values * job->per_group), job->eps,
                         parameter_from(job->channel_eps, c), job->statistic[BN_INVSTD] + c);
    bn_mend_moments(job, channels);
    job->kernels->scale_shift_coefficients[job->plan->dtype](
        channels.count, 0, job->statistic[BN_MEAN] + c, job->statistic[BN_MEAN_LOW] + c, job->statistic[BN_INVSTD] + c,
        parameter_from(job->weight, c), parameter_from(job->bias, c), coefficients_from(job, c));
    bn_set_floors(job, channels, BN_SHIFT);
    tile_coefficients(job, channels);
}

void bn_constant_coefficients(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    job->kernels->scale_shift_coefficients[job->plan->dtype](
        channels.count, 0, NULL, NULL, job->statistic[BN_INVSTD] + c, parameter_from(job->weight, c), NULL,
        coefficients_from(job, c));
}

/* The same where the mean, the scale and the shift make z again: elsewhere stand a mean of 0 and a shift of -0, which
   adds nothing. */
void bn_frozen_coefficients(const bn_job *job, range channels)
{
    const bn_coefficients coefficients = coefficients_from(job, channels.first);
    memset(coefficients.array[BN_OFFSET], 0, channels.count * job->plan->itemsize);
    for (size_t c = 0; c < channels.count; c++) {
        if (job->plan->dtype == BN_f32) {
            ((float *)coefficients.array[BN_SLOPE])[c] = -0.0f;
        } else {
            ((double *)coefficients.array[BN_SLOPE])[c] = -0.0;
        }
    }
}

void bn_grouped_coefficients(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    job->kernels->grouped_gradient_coefficients[job->plan->dtype](
        channels.count / job->per_group, job->per_group, MAX(counted_values(job), (size_t)1),
        job->statistic[BN_MEAN] + c, parameter_from(job->statistic[BN_MEAN_LOW], c),
        job->statistic[BN_INVSTD] + c, parameter_from(job->weight, c), job->statistic[BN_SUM_DY] + c,
        job->statistic[BN_SUM_DY_XHAT] + c, coefficients_from(job, c));
}

void bn_gradient_coefficients(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    const double count = job->given_sum_dy ? job->count : (double)MAX(counted_values(job), (size_t)1);
    job->kernels->gradient_coefficients[job->plan->dtype](
        channels.count, count, job->statistic[BN_MEAN] + c,
        parameter_from(job->statistic[BN_MEAN_LOW], c), job->statistic[BN_INVSTD] + c,
        parameter_from(job->weight, c), job->statistic[BN_SUM_DY] + c, job->statistic[BN_SUM_DY_XHAT] + c,
        coefficients_from(job, c));
}

static void finish_gradient_sums(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    merge_gradient(job, channels);
    if (counted_values(job) == 0) {
        return; /* 0 times an invstd that may be infinite would be NaN */
    }
    job->kernels->standardize[job->plan->dtype](
        channels.count, job->statistic[BN_MEAN] + c, parameter_from(job->statistic[BN_MEAN_LOW], c),
        job->statistic[BN_INVSTD] + c, job->statistic[BN_SUM_DY] + c, job->statistic[BN_SUM_DY_XHAT] + c);
    mend_gradient(job, channels);
}

static void take_given_sums(const bn_job *job, range channels)
{
    const size_t c = channels.first, bytes = channels.count * sizeof(double);
    memcpy(job->statistic[BN_SUM_DY] + c, job->given_sum_dy + c, bytes);
    memcpy(job->statistic[BN_SUM_DY_XHAT] + c, job->given_sum_dy_xhat + c, bytes);
}

void bn_finish_gradient(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    if (job->given_sum_dy) {
        take_given_sums(job, channels);
    } else {
        finish_gradient_sums(job, channels);
    }
    if (!job->operand[BN_DX]) {
        return;
    }
    job->method.finish(job, channels);
    if (!job->centred && job->coefficients.array[BN_OFFSET]) {
        memset(coefficients_from(job, c).array[BN_OFFSET], 0, channels.count * job->plan->itemsize);
    }
    tile_coefficients(job, channels);
}
