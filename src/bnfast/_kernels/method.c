/* The one place that asks what kind of job it is: which kernels it calls, on which operands, and what it makes of
   their sums. */
#include "coefficients.h"
#include "kernel_calls.h"

/* Every kernel of elements, with its operands, as kernel_list.h says them. */
#define ID(operation, ...) operation##_id,
#define CALL(operation, to, ...)                                        \
    [operation##_id] = {offsetof(bn_kernels, operation),                \
                        sizeof((bn_role[]){__VA_ARGS__}) / sizeof(bn_role), \
                        {__VA_ARGS__}, to},
enum { BN_FOR_EACH_ELEMENT_OPERATION(ID) OPERATIONS };
static const bn_output calls[] = {BN_FOR_EACH_ELEMENT_OPERATION(CALL)};

/* dx = dy * weight * invstd, where the statistics did not come from x: a scale_shift that never reads x. */
static const bn_output scaled_upstream = {offsetof(bn_kernels, scale_shift), 1, {BN_DY}, BN_DX};

static const bn_output *output_of(const bn_job *job)
{
    const int weighted = job->operand[BN_ELEMENT_WEIGHT] != NULL;
    if (job->operand[BN_DX]) {
        return job->constant_statistics ? &scaled_upstream
               : weighted               ? &calls[weighted_input_gradient_id]
               : job->clamp_min             ? &calls[clamped_input_gradient_id]
               : job->per_group > 1        ? &calls[grouped_input_gradient_id]
                                        : &calls[input_gradient_id];
    }
    return job->operand[BN_ELEMENT_BIAS] ? &calls[affine_id]
           : weighted                    ? &calls[scaled_id]
           : job->clamp_min                  ? &calls[clamped_scale_shift_id]
                                         : &calls[scale_shift_id];
}

/* Elements are read once for the sums of rows and of columns where rows are neighbours. */
static int has_columns(const bn_job *job)
{
    const bn_plan *plan = job->plan;
    return job->column_sums && job->operand[BN_ELEMENT_WEIGHT] && plan->layout == BN_channels_last &&
           !plan->any_staged && !job->scaled;
}

void bn_choose_method(bn_job *job)
{
    const int columns = has_columns(job);
    job->method = (bn_method){
        .moments = job->uncentred ? bn_squares_of_box : bn_moments_of_box,
        .gradient_sums = columns                             ? bn_weighted_sums_and_columns_of_box
                         : job->operand[BN_ELEMENT_WEIGHT] ? bn_weighted_gradient_sums_of_box
                         : job->clamp_min                        ? bn_clamped_gradient_sums_of_box
                                                             : bn_gradient_sums_of_box,
        .prepare = job->clamp_min || job->column_sums ? bn_make_output_again : bn_round_mean,
        .finish = job->constant_statistics ? bn_constant_coefficients
                  : job->per_group > 1        ? bn_grouped_coefficients
                                           : bn_gradient_coefficients,
        .has_columns = columns,
        .output = output_of(job),
    };
}
