/* From boxes to kernel calls: which kernel, with which operands, in which order. */
#include "coefficients.h"
#include "kernel_calls.h"
#include "masked.h"

#include <math.h>

#include "portability.h"

/* one box: one kernel call */

/* Copies the pointer to a kernel of a layout and the job's dtype out of the table. */
static void find_kernel(const bn_job *job, const bn_output *output, bn_layout layout, void *kernel, size_t size)
{
    const size_t place = (size_t)layout * BN_ELEMENT_TYPES + (size_t)job->plan->element_type;
    memcpy(kernel, (const char *)job->kernels + output->kernel + place * size, size);
}

/* The last channels have nothing after them that could be prefetched. */
static ptrdiff_t prefetch_distance_of(const bn_job *job, const bn_box *box)
{
    const size_t at = box->outer * job->plan->inner + box->inner;
    const int is_last = box->channel + job->slab >= job->plan->channels;
    return is_last || at >= job->prefetch_count ? 0 : job->prefetch_distance;
}

bn_input bn_input_of(const bn_job *job, const bn_box *box)
{
    return (bn_input){job->plan->interleave, job->place, job->prefetch_in_sums ? prefetch_distance_of(job, box) : 0};
}

/* Runs of a box that are neighbours in all of some views: `runs` in each of `rows`. */
typedef struct {
    size_t rows, runs, length;
} common_runs;

static common_runs runs_in_common(const bn_job *job, const bn_box *box, const bn_view *views, size_t count)
{
    const bn_extent extent = box->extent;
    common_runs common = {extent.outer, extent.channels, extent.inner};
    int channels_follow = 1, rows_follow = 1;
    for (size_t i = 0; i < count; i++) {
        channels_follow &= job->plan->layout == BN_channels_last || views[i].strides.channel == (ptrdiff_t)extent.inner;
        rows_follow &= views[i].strides.outer == (ptrdiff_t)(extent.channels * extent.inner);
    }
    if (channels_follow) {
        common.length *= common.runs;
        common.runs = 1;
        if (rows_follow) {
            common.length *= common.rows;
            common.rows = 1;
        }
    }
    return common;
}

static void *run_of(const bn_job *job, bn_view view, size_t row, size_t run)
{
    const ptrdiff_t elements = (ptrdiff_t)row * view.strides.outer + (ptrdiff_t)run * view.strides.channel;
    return (char *)view.data + elements * (ptrdiff_t)job->plan->itemsize;
}

/* x or, where y was written over it, what the activation was given, made of that in scratch. */
static bn_view x_view(const bn_job *job, const bn_box *box)
{
    const bn_view x = input_view(job, BN_X, box);
    if (!job->x_is_output || job->activation.kind == BN_no_activation) {
        return x;
    }
    const bn_view views[] = {x, bn_dense_view(box, buffer_of(job, BN_X))};
    const common_runs common = runs_in_common(job, box, views, 2);
    for (size_t row = 0; row < common.rows; row++) {
        for (size_t run = 0; run < common.runs; run++) {
            job->kernels->unbend[job->plan->dtype](common.length, run_of(job, views[0], row, run),
                                                   job->activation.slope, run_of(job, views[1], row, run));
        }
    }
    return views[1];
}

/* What is summed in the place of x where that left the range, in the scratch that x may already lie in: x
   times a power of two or, for the gradient, how far it is from the mean in about standard deviations. */
static bn_view scaled_view(const bn_job *job, const bn_box *box, bn_view x, char *scratch)
{
    const bn_view scaled = bn_dense_view(box, scratch);
    for (size_t o = 0; o < box->extent.outer; o++) {
        for (size_t c = 0; c < box->extent.channels; c++) {
            const size_t channel = box->channel + c;
            const double centre = job->operand[BN_DY] ? job->statistic[BN_MEAN][channel] : 0.0;
            const double factor = job->operand[BN_DY] ? power_of_two(job->statistic[BN_INVSTD][channel]) : job->factor;
            const double *from = (const double *)x.data + (ptrdiff_t)o * x.strides.outer +
                                 (ptrdiff_t)c * x.strides.channel;
            double *to = (double *)scaled.data + (ptrdiff_t)o * scaled.strides.outer +
                         (ptrdiff_t)c * scaled.strides.channel;
            for (size_t i = 0; i < box->extent.inner; i++) {
                to[i] = (from[i] - centre) * factor;
            }
        }
    }
    return scaled;
}

bn_view bn_x_to_sum(const bn_job *job, const bn_box *box)
{
    const bn_view x = x_view(job, box);
    return job->scaled ? scaled_view(job, box, x, buffer_of(job, BN_X)) : x;
}

void bn_squares_of_box(const bn_job *job, const bn_box *box, block_sums block)
{
    const bn_view x = bn_x_to_sum(job, box);
    KERNEL_OF(job, square_sums)(box->extent, x.data, x.strides, bn_input_of(job, box),
                                sums_of_block(job, BN_M2, block.number, box->channel)); /* the mean remains 0 */
}

void bn_add_moments(const bn_job *job, const bn_box *box, block_sums block, bn_view x)
{
    bn_extent extent = box->extent;
    size_t place = box->channel;
    if (groups_are_runs(job)) {
        extent.channels /= job->per_group;
        extent.inner *= job->per_group;
        x.strides.channel *= (ptrdiff_t)job->per_group;
        place = block.first + (box->channel - block.first) / job->per_group;
    }
    KERNEL_OF(job, moments)(extent, x.data, x.strides, bn_input_of(job, box), block.count,
                            sums_of_block(job, BN_MEAN, block.number, place),
                            sums_of_block(job, BN_MEAN_LOW, block.number, place),
                            sums_of_block(job, BN_M2, block.number, place));
}

void bn_moments_of_box(const bn_job *job, const bn_box *box, block_sums block)
{
    bn_add_moments(job, box, block, bn_x_to_sum(job, box));
}

/* The mean of what is summed: 0 where that has been made xhat. */
static bn_coefficients mean_to_sum(const bn_job *job, const bn_box *box)
{
    static double zeros[BN_ROW_SCRATCH_BYTES / sizeof(double)]; /* never written: as many as scratch has channels */
    bn_coefficients mean = coefficients_from(job, box->channel);
    if (job->scaled) {
        mean.array[BN_ROUNDED_MEAN] = zeros;
    }
    return mean;
}

/* An activation that leaves everything as it is. */
static const bn_activated unbent = {.slope = 1.0, .floor = -INFINITY, .ceiling = INFINITY};

/* A coefficient of one channel, in either type. */
typedef union {
    float f32;
    double f64;
} one_coefficient;

static one_coefficient coefficient_of(const bn_job *job, double number)
{
    return job->plan->dtype == BN_f32 ? (one_coefficient){.f32 = (float)number} : (one_coefficient){.f64 = number};
}

/* Of z in scratch: adds the residual if there is one, and bends. To the kernel all neighbours are one channel, with a
   mean of 0, a scale of 1 and a shift of -0, which change nothing. */
static void write_second(const bn_job *job, const bn_box *box, bn_view z, bn_activated bent, bn_view y,
                         bn_stores stores)
{
    const bn_output *second = job->method.second;
    const int adds = second->inputs > 1;
    const bn_view views[] = {z, y, adds ? input_view(job, BN_RESIDUAL, box) : z};
    const common_runs common = runs_in_common(job, box, views, 3);
    one_coefficient mean = coefficient_of(job, 0.0), scale = coefficient_of(job, 1.0),
                    shift = coefficient_of(job, -0.0), floor = coefficient_of(job, bent.floor);
    bn_coefficients coefficients = {.slope = bent.slope, .ceiling = bent.ceiling};
    coefficients.array[BN_ROUNDED_MEAN] = &mean;
    coefficients.array[BN_SCALE] = &scale;
    coefficients.array[BN_SHIFT] = &shift;
    coefficients.array[BN_FLOOR] = &floor;
    bn_output_kernel *kernel;
    find_kernel(job, second, BN_contiguous, &kernel, sizeof kernel);
    for (size_t row = 0; row < common.rows; row++) {
        for (size_t run = 0; run < common.runs; run++) {
            const bn_view inputs[] = {{run_of(job, z, row, run), {0, 0}}, {run_of(job, views[2], row, run), {0, 0}}};
            kernel((bn_extent){1, 1, common.length}, inputs, coefficients,
                   (bn_view){run_of(job, y, row, run), {0, 0}}, (bn_store_hint){stores, 0});
        }
    }
}

/* What an activation was given, made again in scratch as the forward pass made it. */
static bn_view view_made_again(const bn_job *job, const bn_box *box)
{
    const bn_output *again = job->method.again;
    const bn_view z = bn_dense_view(box, buffer_of(job, BN_Y));
    bn_coefficients coefficients = coefficients_from(job, box->channel);
    bn_view inputs[BN_MAX_INPUTS];
    bn_output_kernel *kernel;
    for (size_t i = 0; i < again->inputs; i++) {
        inputs[i] = input_view(job, again->reads[i], box);
    }
    coefficients.array[BN_SHIFT] = coefficients.array[shift_of_z(job)];
    if (coefficients.array[BN_FORWARD_SCALE]) {
        coefficients.array[BN_SCALE] = coefficients.array[BN_FORWARD_SCALE];
    }
    coefficients.slope = 1.0;
    coefficients.ceiling = INFINITY;
    coefficients.period = period_of(job->plan, box->extent.channels);
    find_kernel(job, again, job->plan->layout, &kernel, sizeof kernel);
    kernel(box->extent, inputs, coefficients, z, (bn_store_hint){BN_stored, 0});
    if (job->method.second) {
        write_second(job, box, z, unbent, z, BN_stored);
    }
    return z;
}

/* Copies the pointer to a curve's kernel out of the table. */
static void find_curve(const bn_job *job, size_t place, void *kernel, size_t size)
{
    memcpy(kernel, (const char *)job->kernels + place + (size_t)job->plan->dtype * size, size);
}

static void write_curve(const bn_job *job, const bn_box *box, bn_view z, bn_view y)
{
    const bn_view views[] = {z, y};
    const common_runs common = runs_in_common(job, box, views, 2);
    bn_curve_kernel *curve;
    find_curve(job, job->method.curve->value, &curve, sizeof curve);
    for (size_t row = 0; row < common.rows; row++) {
        for (size_t run = 0; run < common.runs; run++) {
            curve(common.length, run_of(job, z, row, run), run_of(job, y, row, run), job->stores);
        }
    }
}

static void write_curve_gradient(const bn_job *job, const bn_box *box, bn_view z, bn_view dy, bn_view dz)
{
    const bn_view views[] = {z, dy, dz};
    const common_runs common = runs_in_common(job, box, views, 3);
    bn_curve_gradient_kernel *gradient;
    find_curve(job, job->method.curve->gradient, &gradient, sizeof gradient);
    for (size_t row = 0; row < common.rows; row++) {
        for (size_t run = 0; run < common.runs; run++) {
            gradient(common.length, run_of(job, z, row, run), run_of(job, dy, row, run), run_of(job, dz, row, run));
        }
    }
}

/* dy, or the part of it that goes through an activation: made in an operand that is to keep it, or, for BN_NONE, in
   scratch. What goes to the floors is added to the sums, unless these are NULL. */
static bn_view upstream_view(const bn_job *job, const bn_box *box, double *sums_of_floors, bn_role keeper)
{
    const bn_view dy = input_view(job, BN_DY, box);
    if (!job->method.has_upstream) {
        return dy;
    }
    const int keeps = keeper != BN_NONE;
    char *kept = keeps ? job->operand[keeper] : NULL, *scratch = buffer_of(job, keeps ? keeper : BN_DY);
    const bn_view made = keeps ? bn_view_to_write(job->plan, keeper, kept, box, scratch) : bn_dense_view(box, scratch);
    const bn_role gate = job->method.gate;
    const bn_view input = gate == BN_NONE ? view_made_again(job, box) : input_view(job, gate, box);
    if (job->method.curve) {
        write_curve_gradient(job, box, input, dy, made);
    } else {
        const bn_view inputs[] = {dy, input};
        KERNEL_OF(job, upstream)(box->extent, inputs, coefficients_from(job, box->channel), made, sums_of_floors);
    }
    if (keeps) {
        bn_written(job->kernels, job->plan, keeper, kept, box, scratch, BN_stored);
    }
    return made;
}

/* For the sums. When these are made once more, what goes through may have been kept where dy was. */
static bn_view upstream_to_sum(const bn_job *job, const bn_box *box, double *sums_of_floors)
{
    const bn_role kept = job->method.kept;
    return job->scaled && kept == BN_DX ? input_view(job, kept, box) : upstream_view(job, box, sums_of_floors, kept);
}

bn_view bn_upstream_to_read(const bn_job *job, const bn_box *box, bn_role keeper)
{
    const bn_role kept = job->method.kept;
    return kept != BN_NONE ? input_view(job, kept, box) : upstream_view(job, box, NULL, keeper);
}

void bn_gradient_sums_of_box(const bn_job *job, const bn_box *box, block_sums block)
{
    double *sums_of_floors = job->statistic[BN_SUM_ACTIVATION]
                                 ? sums_of_block(job, BN_SUM_ACTIVATION, block.number, box->channel)
                                 : NULL;
    const int gated = job->method.sums_have_gates;
    const bn_view dy = gated ? input_view(job, BN_DY, box) : upstream_to_sum(job, box, sums_of_floors);
    const bn_view x = bn_x_to_sum(job, box);
    bn_coefficients coefficients = mean_to_sum(job, box);
    if (!gated) {
        coefficients.array[BN_KEPT_FROM] = NULL;
    }
    KERNEL_OF(job, gradient_sums)(
        box->extent, dy.data, dy.strides, x.data, x.strides, bn_input_of(job, box), coefficients,
        sums_of_block(job, BN_SUM_DY, block.number, box->channel),
        sums_of_block(job, BN_SUM_DY_XHAT, block.number, box->channel));
}

uint64_t bn_counted_moments_of_box(const bn_job *job, const bn_box *box, block_sums block, size_t count)
{
    const bn_view x = x_view(job, box);
    return job->kernels->counted_moments[job->plan->dtype](
        box->extent, x.data, x.strides, bn_input_of(job, box), (bn_counted){box->counts, count}, block.count,
        sums_of_block(job, BN_MEAN, block.number, box->channel),
        sums_of_block(job, BN_MEAN_LOW, block.number, box->channel),
        sums_of_block(job, BN_M2, block.number, box->channel));
}

uint64_t bn_counted_gradient_sums_of_box(const bn_job *job, const bn_box *box, block_sums block, size_t count)
{
    const bn_view dy = upstream_view(job, box, NULL, BN_NONE);
    const bn_view x = x_view(job, box);
    return job->kernels->counted_gradient_sums[job->plan->dtype](
        box->extent, dy.data, dy.strides, x.data, x.strides, bn_input_of(job, box), (bn_counted){box->counts, count},
        coefficients_from(job, box->channel), sums_of_block(job, BN_SUM_DY, block.number, box->channel),
        sums_of_block(job, BN_SUM_DY_XHAT, block.number, box->channel));
}

void bn_weighted_gradient_sums_of_box(const bn_job *job, const bn_box *box, block_sums block)
{
    const bn_view upstream = upstream_to_sum(job, box, NULL); /* which may need the scratch of x */
    const bn_view inputs[] = {upstream, bn_x_to_sum(job, box), input_view(job, BN_ELEMENT_WEIGHT, box)};
    KERNEL_OF(job, weighted_gradient_sums)(
        box->extent, inputs, bn_input_of(job, box), mean_to_sum(job, box),
        sums_of_block(job, BN_SUM_DY, block.number, box->channel),
        sums_of_block(job, BN_SUM_DY_XHAT, block.number, box->channel));
}

void bn_weighted_sums_and_columns_of_box(const bn_job *job, const bn_box *box, block_sums block)
{
    const bn_plan *plan = job->plan;
    const size_t columns = plan->outer * plan->inner;
    const bn_view inputs[] = {
        input_view(job, BN_DY, box),
        input_view(job, BN_X, box),
        input_view(job, BN_ELEMENT_WEIGHT, box),
    };
    KERNEL_OF(job, weighted_sums_and_columns)(
        box->extent, inputs, bn_input_of(job, box), coefficients_from(job, box->channel),
        sums_of_block(job, BN_SUM_DY, block.number, box->channel),
        sums_of_block(job, BN_SUM_DY_XHAT, block.number, box->channel),
        job->column_sums + box->outer, job->column_sums + columns + box->outer);
}

/* What goes through scratch is streamed from there, if at all. */
static bn_store_hint store_hint_of(const bn_job *job, const bn_box *box)
{
    return job->plan->operand[job->method.output->writes].staged
               ? (bn_store_hint){BN_stored, 0}
               : (bn_store_hint){job->stores, job->prefetch_in_sums ? 0 : prefetch_distance_of(job, box)};
}

/* Where some values do not count, the kernel knows, or an output is made in scratch, and merged with what stands for
   these. */
void bn_write_values(const bn_job *job, const bn_box *box)
{
    const bn_plan *plan = job->plan;
    const bn_output *output = box->counts && job->method.masked ? job->method.masked : job->method.output;
    const int merged = box->counts && !job->method.masked;
    /* In the place of an input, unless that is read again to be merged. */
    char *to = job->operand[output->writes], *scratch = buffer_of(job, merged ? output->writes : output->reads[0]);
    bn_view inputs[BN_MAX_INPUTS];
    for (size_t i = 0; i < output->inputs; i++) {
        inputs[i] = output->reads[i] == BN_MASK ? bn_padding_view(job, box)
                    : job->method.output_reads_upstream && output->reads[i] == BN_DY
                        ? bn_upstream_to_read(job, box, job->method.keeps_with_output ? BN_DRESIDUAL : BN_NONE)
                    : output->reads[i] == BN_X ? x_view(job, box)
                                               : input_view(job, output->reads[i], box);
    }
    const int writes_y = output->writes == BN_Y, curved = job->method.curve && writes_y;
    const int goes_on = curved || (job->method.second && writes_y);
    const bn_view view = merged ? bn_dense_view(box, scratch)
                                : bn_view_to_write(plan, output->writes, to, box, scratch);
    const bn_view made = goes_on ? bn_dense_view(box, scratch) : view;
    bn_coefficients coefficients = coefficients_from(job, box->channel);
    if (job->method.finish == bn_frozen_coefficients) { /* the mean is that of z, which is made again */
        coefficients.array[BN_ROUNDED_MEAN] = coefficients.array[BN_OFFSET];
        coefficients.array[BN_SHIFT] = coefficients.array[BN_SLOPE];
    }
    coefficients.period = period_of(plan, box->extent.channels);
    if (output == job->method.masked) {
        coefficients.slope = job->mask.keeps_input;
    }
    bn_output_kernel *kernel;
    find_kernel(job, output, job->plan->layout, &kernel, sizeof kernel);
    bn_store_hint hint = store_hint_of(job, box);
    const bn_stores stores = hint.stores;
    hint.stores = goes_on || merged ? BN_stored : stores;
    kernel(box->extent, inputs, coefficients, made, hint);
    if (goes_on && job->method.second) {
        write_second(job, box, made, job->activation.kind == BN_activation_piecewise ? job->activation : unbent,
                     curved ? made : view, curved ? BN_stored : stores);
    }
    if (curved) {
        write_curve(job, box, made, view);
    }
    if (merged) {
        bn_write_merged(job, box, view);
    } else {
        bn_written(job->kernels, plan, output->writes, to, box, scratch, job->stores);
    }
}

void bn_write_parts(const bn_job *job, const bn_box *box, size_t max_channels, bn_write_part *write_part)
{
    const size_t run = bn_channel_run(job->plan), end = box->channel + box->extent.channels;
    bn_box part;
    if (run == job->plan->channels && max_channels >= box->extent.channels) {
        /* Copied, what has just been written in words would have to wait for the stores of the output before it. */
        write_part(job, box);
        return;
    }
    part = *box;
    for (; part.channel < end; part.channel += part.extent.channels) {
        part.extent.channels = MIN(MIN(run - part.channel % run, end - part.channel), max_channels);
        write_part(job, &part);
    }
}

/* The output of a call, y or dx: at most `max_channels` channels at a time. */
static void output_of_box(const bn_job *job, const bn_box *box, size_t max_channels)
{
    if (job->mask.counts) {
        bn_write_masked(job, box, max_channels);
    } else {
        bn_write_parts(job, box, max_channels, bn_write_values);
    }
}

/* one block: its chunks in order for sums; the last first for outputs, because that is the one
   which the sums have left in the cache */

/* How many rows of a chunk make a box where values are counted one by one: as many as scratch holds with all of their
   channels, but at least FEWEST_COUNTED_ROWS. Every such box has moments of its own, so that its rows decide bits: they
   must not depend on slabs. */
#define FEWEST_COUNTED_ROWS ((size_t)16)

static size_t rows_at_once(const bn_job *job, const bn_box *box)
{
    const bn_plan *plan = job->plan;
    const size_t rows = BN_SCRATCH_BYTES / (plan->channels * plan->itemsize);
    const int by_rows = job->statistic[BN_COUNT] && plan->layout == BN_channels_last && plan->interleave == 1;
    return by_rows ? MIN(box->extent.outer, MAX(rows, FEWEST_COUNTED_ROWS)) : box->extent.outer;
}

void bn_sum_channels(const bn_job *job, bn_box box, size_t max_channels, block_sums block, bn_sum_box *sum_box)
{
    const size_t end = box.channel + box.extent.channels;
    for (; box.channel < end; box.channel += max_channels) {
        box.extent.channels = MIN(max_channels, end - box.channel);
        sum_box(job, &box, block);
    }
}

static void sum_block(const bn_job *job, size_t number, range channels, int in_scratch, bn_sum_box *sum_box)
{
    const range chunks = chunks_of_block(job->plan, number);
    block_sums block = {number, 0, channels.first};
    if (job->mask.counts) {
        bn_sum_masked_block(job, number, channels, in_scratch, sum_box);
        return;
    }
    for (size_t i = 0; i < chunks.count; i++) {
        bn_box box = box_of_chunk(job->plan, chunks.first + i, channels);
        const size_t rows = box.extent.outer, max_rows = rows_at_once(job, &box);
        for (const size_t end_of_rows = box.outer + rows; box.outer < end_of_rows; box.outer += max_rows) {
            box.extent.outer = MIN(max_rows, end_of_rows - box.outer);
            size_t max_channels = channels_at_once(job, &box, in_scratch);
            if (groups_are_runs(job)) {
                max_channels -= max_channels % job->per_group; /* scratch holds a group: see BN_GROUP_RUN_BYTES */
            }
            bn_sum_channels(job, box, max_channels, block, sum_box);
        }
        block.count += rows * box.extent.inner;
    }
}

/* Of channels_last, scratch holds whole rows: a few channels of each are runs too short (SiLU took 3 times as long). */
static void write_rows(const bn_job *job, bn_box box, int in_scratch)
{
    const size_t first = box.outer, rows = box.extent.outer, row = box.extent.channels * job->plan->itemsize;
    const int cut = in_scratch && job->plan->layout == BN_channels_last;
    const size_t step = cut ? MIN(rows, MAX(BN_FEWEST_ROWS, BN_SCRATCH_BYTES / row)) : rows;
    for (size_t n = divide_up(rows, step); n-- > 0;) {
        box.outer = first + n * step;
        box.extent.outer = MIN(step, rows - n * step);
        output_of_box(job, &box, channels_at_once(job, &box, in_scratch));
    }
}

/* Chunks are for sums alone: where they are neighbours, as many chunks as make a step are written at once. */
void bn_write_block(const bn_job *job, size_t block, range channels)
{
    const bn_plan *plan = job->plan;
    const range chunks = chunks_of_block(plan, block);
    const size_t bytes = plan->chunk_outer * plan->chunk_inner * channels.count * plan->itemsize;
    const int in_scratch = plan->any_staged || job->method.output_in_scratch;
    const int chunk_by_chunk = in_scratch || plan->chunks_per_run > 1 ||
                               (job->prefetch_distance != 0 && job->prefetch_count < values_per_channel(plan));
    const size_t chunks_per_step = chunk_by_chunk ? 1 : MAX((size_t)1, BN_STEP_BYTES / bytes);
    for (size_t end = chunks.count; end > 0;) {
        const size_t count = MIN(chunks_per_step, end);
        end -= count;
        bn_box box = box_of_chunk(plan, chunks.first + end, channels);
        box.extent.outer = MIN(count * plan->chunk_outer, plan->outer - box.outer);
        write_rows(job, box, in_scratch);
    }
    BN_FENCE_STREAMS();
}

void bn_clear_moments(const bn_job *job, size_t block, range channels)
{
    clear(sums_of_block(job, BN_MEAN, block, 0), channels);
    clear(sums_of_block(job, BN_MEAN_LOW, block, 0), channels);
    clear(sums_of_block(job, BN_M2, block, 0), channels);
    if (job->statistic[BN_COUNT]) {
        clear(sums_of_block(job, BN_COUNT, block, 0), channels);
    }
    if (job->statistic[BN_MINIMUM]) {
        clear(sums_of_block(job, BN_NONFINITE, block, 0), channels);
        for (size_t c = channels.first; c < channels.first + channels.count; c++) {
            *sums_of_block(job, BN_MINIMUM, block, c) = INFINITY;
            *sums_of_block(job, BN_MAXIMUM, block, c) = -INFINITY;
        }
    }
}

void bn_sum_moments(const bn_job *job, size_t block, range channels)
{
    const int in_scratch =
        job->plan->operand[BN_X].staged || job->scaled || job->statistic[BN_COUNT] || job->x_is_output;
    bn_clear_moments(job, block, channels);
    sum_block(job, block, channels, in_scratch, job->method.moments);
}

void bn_sum_gradient(const bn_job *job, size_t block, range channels)
{
    clear(sums_of_block(job, BN_SUM_DY, block, 0), channels);
    clear(sums_of_block(job, BN_SUM_DY_XHAT, block, 0), channels);
    if (job->statistic[BN_SUM_ACTIVATION]) {
        clear(sums_of_block(job, BN_SUM_ACTIVATION, block, 0), channels);
    }
    sum_block(job, block, channels,
              job->plan->any_staged || (job->method.has_upstream && !job->method.sums_have_gates) || job->scaled,
              job->method.gradient_sums);
}

/* one piece of an output: a part of outer by a part of the channels by a part of inner */

static range part(size_t whole, size_t parts, size_t number)
{
    const size_t first = whole / parts * number + MIN(whole % parts, number);
    return (range){first, whole / parts + (number < whole % parts)};
}

static range channel_part(const bn_plan *plan, size_t parts, size_t number)
{
    const size_t unit = channel_unit(plan);
    const range units = part(divide_up(plan->channels, unit), parts, number);
    const size_t first = units.first * unit;
    return (range){first, MIN(units.count * unit, plan->channels - first)};
}

void bn_write_piece(const bn_job *job, size_t number)
{
    const bn_plan *plan = job->plan;
    const bn_extent pieces = job->pieces;
    const range inner = part(plan->inner, pieces.inner, number % pieces.inner);
    number /= pieces.inner;
    const range channels = channel_part(plan, pieces.channels, number % pieces.channels);
    const range outer = part(plan->outer, pieces.outer, number / pieces.channels);

    const int in_scratch = plan->any_staged || job->method.output_in_scratch;
    const size_t max_elements = (in_scratch ? BN_SCRATCH_BYTES : BN_STEP_BYTES) / plan->itemsize;
    const size_t inner_step = in_scratch ? MIN(inner.count, max_elements) : inner.count;
    const size_t channel_step =
        in_scratch ? MIN(channels.count, MAX((size_t)1, max_elements / inner_step)) : channels.count;
    const size_t min_outer = in_scratch ? 1 : BN_FEWEST_ROWS;
    const size_t outer_step = MAX(min_outer, max_elements / (inner_step * channel_step));
    for (size_t o = divide_up(outer.count, outer_step); o-- > 0;) {
        for (size_t c = 0; c < channels.count; c += channel_step) {
            for (size_t i = 0; i < inner.count; i += inner_step) {
                const bn_box box = {
                    .outer = outer.first + o * outer_step,
                    .channel = channels.first + c,
                    .inner = inner.first + i,
                    .extent = {.outer = MIN(outer_step, outer.count - o * outer_step),
                               .channels = MIN(channel_step, channels.count - c),
                               .inner = MIN(inner_step, inner.count - i)},
                };
                output_of_box(job, &box, channel_step);
            }
        }
    }
    BN_FENCE_STREAMS();
}
