/* Which kernels a job calls, on which operands, and what it makes of their sums: chosen by the kind of the job. */
#include "coefficients.h"
#include "kernel_calls.h"

#include <math.h>

/* Every kernel of elements, with its operands, as kernel_list.h says them. */
#define ID(operation, ...) operation##_id,
#define CALL(operation, to, ...)                                            \
    [operation##_id] = {offsetof(bn_kernels, operation),                    \
                        sizeof((bn_role[]){__VA_ARGS__}) / sizeof(bn_role), \
                        {__VA_ARGS__}, to},
enum { BN_FOR_EACH_ELEMENT_OPERATION(ID) OPERATIONS };
static const bn_output calls[] = {BN_FOR_EACH_ELEMENT_OPERATION(CALL)};

/* Activations that are curves. */
#define ROW(unused, name) [BN_activation_##name] = {offsetof(bn_kernels, name), offsetof(bn_kernels, name##_gradient)},
static const bn_curve curves[BN_ACTIVATIONS] = {BN_FOR_EACH_CURVE(ROW, )};

/* dx = dy * weight * invstd, where the statistics did not come from x: a scale_shift that never reads x. */
static const bn_output scaled_upstream = {offsetof(bn_kernels, scale_shift), 1, {BN_DY}, BN_DX};

/* The same where a mask says which values count. */
static const bn_output masked_upstream = {offsetof(bn_kernels, masked_scale_shift), 2, {BN_DY, BN_MASK}, BN_DX};

static const bn_output *masked_of(const bn_output *output)
{
    return output == &scaled_upstream                 ? &masked_upstream
           : output == &calls[scale_shift_id]            ? &calls[masked_scale_shift_id]
           : output == &calls[input_gradient_id]         ? &calls[masked_input_gradient_id]
           : output == &calls[grouped_input_gradient_id] ? &calls[masked_grouped_input_gradient_id]
                                                         : NULL;
}

static int is_piecewise(const bn_job *job) { return job->activation.kind == BN_activation_piecewise; }

static int is_curved(const bn_job *job) { return job->activation.kind > BN_activation_piecewise; }

/* Elements are read once for the sums of rows and of columns where rows are neighbours. */
static int has_columns(const bn_job *job)
{
    const bn_plan *plan = job->plan;
    return job->column_sums && is_weighted(job) && plan->layout == BN_channels_last &&
           !plan->any_staged && !job->scaled && job->activation.kind == BN_no_activation;
}

/* Where elements have parameters, what these make of x has its residual and its activation in a second kernel. */
static const bn_output *second_kernel(const bn_job *job, int bends)
{
    return !job->operand[BN_ELEMENT_WEIGHT] ? NULL
           : job->operand[BN_RESIDUAL]      ? &calls[activated_sum_id]
           : bends                          ? &calls[activated_id]
                                            : NULL;
}

static const bn_output *of_element_parameters(const bn_job *job)
{
    return job->operand[BN_ELEMENT_BIAS] ? &calls[affine_id] : &calls[scaled_id];
}

static void choose_output(bn_job *job)
{
    const int weighted = job->operand[BN_ELEMENT_WEIGHT] != NULL, residual = job->operand[BN_RESIDUAL] != NULL;
    job->method.output = weighted            ? of_element_parameters(job)
                         : residual          ? &calls[activated_sum_id]
                         : is_piecewise(job) ? &calls[activated_id]
                                             : &calls[scale_shift_id];
    job->method.second = second_kernel(job, is_piecewise(job));
    job->method.output_in_scratch = is_curved(job) || job->method.second;
    job->method.coefficients =
        BN_OUTPUT_COEFFICIENTS | (!weighted && (residual || is_piecewise(job)) ? BN_SET(BN_FLOOR) : 0);
    job->coefficients.slope = is_piecewise(job) ? job->activation.slope : 1.0;
    job->coefficients.ceiling = is_piecewise(job) ? job->activation.ceiling : INFINITY;
}

/* Of dy or 0, which the other piecewise linear activations let through, nothing is rounded. */
static int is_rounded_to_be_stored(const bn_job *job)
{
    return job->plan->stored_itemsize != job->plan->itemsize && (is_curved(job) || job->coefficients.slope != 0.0);
}

/* Where the sums leave what goes through. Without a place of its own that is dx, if the columns want it as well: if
   nothing is rounded there, and nothing of x overwritten. */
static bn_role kept_upstream(const bn_job *job)
{
    const bn_plan *plan = job->plan;
    const int is_kept_in_dx = job->column_sums && plan->stored_itemsize == plan->itemsize &&
                              !plan->operand[BN_DX].staged && bn_channel_run(plan) == plan->channels &&
                              job->operand[BN_DX] != job->operand[BN_X];
    return job->method.keeps_with_output ? BN_NONE
           : job->operand[BN_DRESIDUAL]  ? BN_DRESIDUAL
           : is_kept_in_dx               ? BN_DX
                                         : BN_NONE;
}

/* How the part of dy that goes through the activation is made; returns the set of coefficients for it. */
static unsigned choose_upstream(bn_job *job)
{
    bn_method *method = &job->method;
    const int residual = job->operand[BN_RESIDUAL] != NULL, weighted = job->operand[BN_ELEMENT_WEIGHT] != NULL;
    method->has_upstream = job->activation.kind != BN_no_activation;
    if (!method->has_upstream) {
        return 0;
    }
    job->coefficients.slope = job->activation.slope == 1.0 ? 0.0 : job->activation.slope;
    /* Sums leave out what does not count; and dx is not made of what was rounded to be stored. */
    method->keeps_with_output = job->operand[BN_DRESIDUAL] && (job->mask.counts || is_rounded_to_be_stored(job));
    method->kept = kept_upstream(job);
    method->gate = is_curved(job) ? BN_NONE : job->operand[BN_Y] ? BN_Y : residual || weighted ? BN_NONE : BN_X;
    method->sums_have_gates = method->gate == BN_X && !job->floors && !job->scaled && method->kept == BN_NONE &&
                              !job->mask.counts;
    if (method->gate == BN_NONE) {
        method->again = weighted   ? of_element_parameters(job)
                        : residual ? &calls[activated_sum_id]
                                   : &calls[scale_shift_id];
        method->second = second_kernel(job, 0);
    }
    return (method->gate != BN_Y ? BN_SET(shift_of_z(job)) : 0) |
           (method->again && job->per_group > 1 ? BN_SET(BN_FORWARD_SCALE) : 0) |
           (method->again && residual && !weighted ? BN_SET(BN_FLOOR) : 0) |
           (is_piecewise(job) ? BN_SET(BN_KEPT_FROM) | BN_SET(BN_KEPT_TO) : 0);
}

static void choose_gradient(bn_job *job)
{
    bn_method *method = &job->method;
    const int weighted = is_weighted(job), grouped = job->per_group > 1;
    const unsigned upstream_coefficients = choose_upstream(job);
    const int gated = method->has_upstream && method->gate == BN_X && method->kept == BN_NONE && !grouped &&
                      !job->constant_statistics;
    method->has_columns = has_columns(job);
    method->gradient_sums = method->has_columns ? bn_weighted_sums_and_columns_of_box
                            : weighted          ? bn_weighted_gradient_sums_of_box
                                                : bn_gradient_sums_of_box;
    method->output_reads_upstream = method->has_upstream && !gated;
    method->output_in_scratch = method->output_reads_upstream && method->kept == BN_NONE;
    method->prepare = method->has_upstream || job->column_sums ? bn_make_output_again : bn_round_mean;
    if (!job->operand[BN_DX]) {
        method->coefficients = BN_SET(BN_ROUNDED_MEAN);
    } else if (job->constant_statistics) {
        const int makes_z = method->kept == BN_NONE && method->again;
        method->output = &scaled_upstream;
        method->finish = makes_z ? bn_frozen_coefficients : bn_constant_coefficients;
        method->coefficients =
            makes_z ? BN_SET(BN_ROUNDED_MEAN) | BN_SET(BN_SCALE) | BN_SET(BN_OFFSET) | BN_SET(BN_SLOPE)
                    : BN_OUTPUT_COEFFICIENTS;
    } else {
        method->output = weighted  ? &calls[weighted_input_gradient_id]
                         : grouped ? &calls[grouped_input_gradient_id]
                         : gated   ? &calls[gated_input_gradient_id]
                                   : &calls[input_gradient_id];
        method->finish = grouped ? bn_grouped_coefficients : bn_gradient_coefficients;
        method->coefficients = BN_GRADIENT_COEFFICIENTS | (grouped ? BN_SET(BN_WEIGHT) : 0);
    }
    method->coefficients |= upstream_coefficients | (job->column_sums ? BN_SET(BN_FORWARD_SHIFT) : 0);
}

/* Whether there are kernels for the stored type of 16 bits: none adds the columns of rows, none knows masks. */
static int reads_halves(const bn_job *job)
{
    const bn_method *method = &job->method;
    const size_t layout = job->plan->layout, type = (size_t)job->plan->element_type;
    const int has_output = method->output == NULL || method->output->kernel == offsetof(bn_kernels, scale_shift) ||
                           method->output->kernel == offsetof(bn_kernels, input_gradient);
    return job->kernels->moments[layout][type] && has_output && !job->mask.counts &&
           job->activation.kind == BN_no_activation && !job->column_sums &&
           (job->operand[BN_DY] ? method->gradient_sums == bn_gradient_sums_of_box
                                : method->moments == bn_moments_of_box);
}

void bn_choose_method(bn_job *job)
{
    const int is_summary = job->integers || job->statistic[BN_COUNT] || job->statistic[BN_MINIMUM];
    job->method = (bn_method){
        .moments = job->statistic[BN_COUNT] ? bn_counted_summary_of_box
                   : is_summary             ? bn_summary_of_box
                   : job->centred           ? bn_moments_of_box
                                            : bn_squares_of_box,
        .merge = is_summary ? bn_merge_summaries : bn_merge_moments,
        .kept = BN_NONE,
    };
    if (job->operand[BN_DY]) {
        choose_gradient(job);
    } else if (job->operand[BN_Y]) {
        choose_output(job);
    }
    if (is_curved(job)) {
        job->method.curve = &curves[job->activation.kind];
    }
    if (job->mask.counts && job->activation.kind == BN_no_activation) {
        job->method.masked = masked_of(job->method.output);
    }
    if (job->plan->converted && !reads_halves(job)) {
        job->plan = job->plan->converted;
    }
}
