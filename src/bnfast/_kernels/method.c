/* Which kernels a job calls, on which operands, and what it makes of their sums: chosen by the kind of the job. */
#include "coefficients.h"
#include "kernel_calls.h"

/* Every kernel of elements, with its operands, as kernel_list.h says them. */
#define ID(operation, ...) operation##_id,
#define CALL(operation, to, ...)                                            \
    [operation##_id] = {offsetof(bn_kernels, operation),                    \
                        sizeof((bn_role[]){__VA_ARGS__}) / sizeof(bn_role), \
                        {__VA_ARGS__}, to},
enum { BN_FOR_EACH_ELEMENT_OPERATION(ID) OPERATIONS };
static const bn_output calls[] = {BN_FOR_EACH_ELEMENT_OPERATION(CALL)};

/* With an activation, or none. */
#define ROW(unused, name)                                                                      \
    [BN_activation_##name] = {&calls[name##_scale_shift_id], &calls[name##_input_gradient_id], \
                              &calls[name##_upstream_id]},
static const struct {
    const bn_output *output, *input_gradient, *upstream;
} of_activation[] = {
    [BN_no_activation] = {&calls[scale_shift_id], &calls[input_gradient_id], NULL},
    BN_FOR_EACH_ACTIVATION(ROW, )
};

/* dx = dy * weight * invstd, where the statistics did not come from x: a scale_shift that never reads x. */
static const bn_output scaled_upstream = {offsetof(bn_kernels, scale_shift), 1, {BN_DY}, BN_DX};

/* Elements are read once for the sums of rows and of columns where rows are neighbours. */
static int has_columns(const bn_job *job)
{
    const bn_plan *plan = job->plan;
    return job->column_sums && job->operand[BN_ELEMENT_WEIGHT] && plan->layout == BN_channels_last &&
           !plan->any_staged && !job->scaled;
}

static void choose_output(bn_job *job)
{
    const int weighted = job->operand[BN_ELEMENT_WEIGHT] != NULL;
    job->method.output = job->operand[BN_ELEMENT_BIAS] ? &calls[affine_id]
                         : weighted                    ? &calls[scaled_id]
                                                       : of_activation[job->activation].output;
    job->method.coefficients = BN_OUTPUT_COEFFICIENTS;
}

static void choose_gradient(bn_job *job)
{
    bn_method *method = &job->method;
    const int weighted = job->operand[BN_ELEMENT_WEIGHT] != NULL, grouped = job->per_group > 1;
    const int made_again = job->activation || job->column_sums; /* y, or xhat */
    method->has_columns = has_columns(job);
    method->gradient_sums = method->has_columns ? bn_weighted_sums_and_columns_of_box
                            : weighted          ? bn_weighted_gradient_sums_of_box
                                                : bn_gradient_sums_of_box;
    method->upstream = of_activation[job->activation].upstream;
    method->output_reads_upstream = job->activation && grouped;
    method->prepare = made_again ? bn_make_output_again : bn_round_mean;
    if (!job->operand[BN_DX]) {
        method->coefficients = BN_SET(BN_ROUNDED_MEAN);
    } else if (job->constant_statistics && !job->activation) {
        method->output = &scaled_upstream;
        method->finish = bn_constant_coefficients;
        method->coefficients = BN_OUTPUT_COEFFICIENTS;
    } else {
        method->output = weighted  ? &calls[weighted_input_gradient_id]
                         : grouped ? &calls[grouped_input_gradient_id]
                                   : of_activation[job->activation].input_gradient;
        method->finish = job->constant_statistics ? bn_frozen_coefficients
                         : grouped                ? bn_grouped_coefficients
                                                  : bn_gradient_coefficients;
        method->coefficients = BN_GRADIENT_COEFFICIENTS | (grouped ? BN_SET(BN_WEIGHT) : 0);
    }
    method->coefficients |= (made_again ? BN_SET(BN_FORWARD_SHIFT) : 0) |
                            (method->output_reads_upstream ? BN_SET(BN_FORWARD_SCALE) : 0);
}

/* Whether there are kernels for the stored type of 16 bits. */
static int reads_halves(const bn_job *job)
{
    const bn_method *method = &job->method;
    const size_t layout = job->plan->layout, type = (size_t)job->plan->element_type;
    const int has_output = method->output == NULL || method->output->kernel == offsetof(bn_kernels, scale_shift) ||
                           method->output->kernel == offsetof(bn_kernels, input_gradient);
    return job->kernels->moments[layout][type] && has_output && !job->activation &&
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
    };
    if (job->operand[BN_DY]) {
        choose_gradient(job);
    } else if (job->operand[BN_Y]) {
        choose_output(job);
    }
    if (job->activation) {
        job->method.coefficients |= BN_SET(BN_ACTIVATION_PARAMETER);
    }
    if (job->plan->converted && !reads_halves(job)) {
        job->plan = job->plan->converted;
    }
}
