/* From task numbers to kernel calls, and the order of the phases. */
#include "block_tasks.h"

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "packing.h"
#include "portability.h"
#include "thresholds.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

static size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

typedef struct {
    size_t first, count;
} range;

/* chunks and blocks */

static bn_box box_of_chunk(const bn_geometry *geometry, size_t chunk, range channels)
{
    bn_box box = {.channel = channels.first, .extent = {.channels = channels.count}};
    if (geometry->chunks_per_run > 1) {
        box.outer = chunk / geometry->chunks_per_run;
        box.inner = chunk % geometry->chunks_per_run * geometry->chunk_inner;
        box.extent.outer = 1;
        box.extent.inner = MIN(geometry->chunk_inner, geometry->inner - box.inner);
    } else {
        box.outer = chunk * geometry->chunk_outer;
        box.extent.outer = MIN(geometry->chunk_outer, geometry->outer - box.outer);
        box.extent.inner = geometry->inner;
    }
    return box;
}

static range chunks_of_block(const bn_geometry *geometry, size_t block)
{
    const size_t first = block * geometry->chunks_per_block;
    return (range){first, MIN(geometry->chunks_per_block, geometry->chunks - first)};
}

static size_t values_per_channel(const bn_geometry *geometry)
{
    return geometry->outer * geometry->inner;
}

static size_t values_of_block(const bn_geometry *geometry, size_t block)
{
    const range chunks = chunks_of_block(geometry, block);
    size_t values = 0;
    for (size_t i = 0; i < chunks.count; i++) {
        const bn_box box = box_of_chunk(geometry, chunks.first + i, (range){0, 1});
        values += box.extent.outer * box.extent.inner;
    }
    return values;
}

static range channels_of_group(const bn_job *job, size_t group)
{
    const size_t first = group * job->group;
    return (range){first, MIN(job->group, job->geometry->channels - first)};
}

/* How many channels of a box go to a kernel at a time: all, unless scratch must hold them. */
static size_t channels_at_once(const bn_geometry *geometry, const bn_box *box, int in_scratch)
{
    const size_t each = box->extent.outer * box->extent.inner * geometry->itemsize;
    return in_scratch ? MAX((size_t)1, BN_SCRATCH_BYTES / each) : box->extent.channels;
}

static void *element_at(const bn_geometry *geometry, void *array, size_t index)
{
    return (char *)array + index * geometry->itemsize;
}

static const double *parameter_from(const double *parameter, size_t channel)
{
    return parameter ? parameter + channel : NULL;
}

/* A box of all channels may be walked as one run where its rows are dense. */
static size_t period_of(const bn_geometry *geometry, size_t channels)
{
    return channels == geometry->channels ? bn_period(geometry) : 0;
}

static bn_coefficients coefficients_from(const bn_job *job, size_t channel)
{
    bn_coefficients from = job->coefficients;
    for (size_t i = 0; i < BN_COEFFICIENTS; i++) {
        if (from.array[i]) {
            from.array[i] = element_at(job->geometry, from.array[i], channel);
        }
    }
    return from;
}

/* The sums of one block: those of the first lie in the job's own arrays. */
static double *sums_of_block(const bn_job *job, double *own, size_t which, size_t block)
{
    const size_t channels = job->geometry->channels;
    return block == 0 ? own : job->partials + ((block - 1) * BN_SUMS + which) * channels;
}

static void clear(double *array, range channels)
{
    for (size_t c = channels.first; c < channels.first + channels.count; c++) {
        array[c] = 0.0;
    }
}

/* A kernel of the layout and type of a job. */
#define KERNEL_OF(job, name) \
    ((job)->kernels->name[(job)->geometry->layout][(job)->geometry->dtype])

/* The scratch of an operand. */
static char *buffer_of(const bn_job *job, bn_role role)
{
    return job->scratch ? job->scratch + role * job->scratch_bytes : NULL;
}

/* Whether an output takes the place of an input. */
static int is_in_place(const bn_job *job, bn_role output)
{
    const char *to = job->operand[output];
    return to == job->operand[BN_X] || to == job->operand[BN_DY];
}

/* A box of an operand to read. */
static bn_view input_view(const bn_job *job, bn_role role, const bn_box *box)
{
    return bn_view_to_read(job->geometry, role, job->operand[role], box, buffer_of(job, role));
}

/* one box: one kernel call */

/* `count` is the number of values that the block has summed before this box. */
typedef void visit(const bn_job *job, const bn_box *box, size_t block, size_t count);

/* The last channels have nothing after them that could be fetched ahead. */
static ptrdiff_t ahead_of(const bn_job *job, const bn_box *box)
{
    const size_t at = box->outer * job->geometry->inner + box->inner;
    const int last = box->channel + job->group >= job->geometry->channels;
    return last || at >= job->fetched ? 0 : job->ahead;
}

static bn_input input_of(const bn_job *job, const bn_box *box)
{
    return (bn_input){job->geometry->phases, job->place, job->sums_fetch ? ahead_of(job, box) : 0};
}

#define BN_JOINED_BYTES ((size_t)32768)

/* Whether the channels that share their statistics follow each other as one run, of a single chunk each:
   the group is then summed as that run, and its moments stand where those of the first channels would
   until `spread_moments`. A single chunk is a single block, so that the same task does both. Not of more than
   BN_JOINED_BYTES: the sums of float64, which have nothing wider to be emptied into, round once more for every
   kilobyte (32 planes of 784: 31 ulps). */
static int are_joined(const bn_job *job)
{
    const bn_geometry *geometry = job->geometry;
    const bn_operand *x = &geometry->operand[BN_X];
    const size_t bytes = job->shared * geometry->inner * geometry->itemsize;
    if (bytes > BN_JOINED_BYTES) {
        return 0;
    }
    return job->shared > 1 && !job->uncentred && geometry->layout == BN_contiguous &&
           geometry->chunks == 1 && geometry->outer == 1 && !x->packed && !job->scaled &&
           x->channel_stride == (ptrdiff_t)geometry->inner;
}

/* The largest power of two up to a positive number, or the smallest one that is normal. */
static double power_of_two(double number)
{
    double power;
    uint64_t bits;
    memcpy(&bits, &number, sizeof bits);
    bits &= UINT64_C(0x7ff0000000000000);
    memcpy(&power, &bits, sizeof power);
    return MAX(power, DBL_MIN);
}

/* What is summed in the place of x where that left the range, in the scratch that x may already lie in: x
   times a power of two or, for the gradient, how far it is from the mean in about standard deviations. */
static bn_view scaled_view(const bn_job *job, const bn_box *box, bn_view x, char *scratch)
{
    const bn_view scaled = bn_dense_view(box, scratch);
    for (size_t o = 0; o < box->extent.outer; o++) {
        for (size_t c = 0; c < box->extent.channels; c++) {
            const size_t channel = box->channel + c;
            const double centre = job->operand[BN_DY] ? job->mean[channel] : 0.0;
            const double factor = job->operand[BN_DY] ? power_of_two(job->invstd[channel]) : job->factor;
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

static bn_view x_to_sum(const bn_job *job, const bn_box *box)
{
    const bn_view x = input_view(job, BN_X, box);
    return job->scaled ? scaled_view(job, box, x, buffer_of(job, BN_X)) : x;
}

static void moments_of_box(const bn_job *job, const bn_box *box, size_t block, size_t count)
{
    bn_view x = x_to_sum(job, box);
    bn_extent extent = box->extent;
    if (job->uncentred) { /* the mean remains 0 */
        KERNEL_OF(job, square_sums)(
            extent, x.data, x.strides, input_of(job, box),
            sums_of_block(job, job->m2, 2, block) + box->channel);
        return;
    }
    if (are_joined(job)) {
        extent.channels /= job->shared;
        extent.inner *= job->shared;
        x.strides.channel *= (ptrdiff_t)job->shared;
    }
    KERNEL_OF(job, moments)(
        extent, x.data, x.strides, input_of(job, box), count,
        sums_of_block(job, job->mean, 0, block) + box->channel,
        sums_of_block(job, job->mean_low, 1, block) + box->channel,
        sums_of_block(job, job->m2, 2, block) + box->channel);
}

/* dy where y was not below its floor, made in scratch; the rest is added up. */
static bn_view kept_upstream(const bn_job *job, const bn_box *box, size_t block)
{
    const bn_view inputs[] = {
        input_view(job, BN_DY, box),
        input_view(job, BN_X, box),
    };
    const bn_view kept = bn_dense_view(box, buffer_of(job, BN_DX)); /* which is not written yet */
    KERNEL_OF(job, keep_above_floor)(
        box->extent, inputs, coefficients_from(job, box->channel), kept,
        sums_of_block(job, job->sum_floored, 2, block) + box->channel);
    return kept;
}

static void gradient_sums_of_box(const bn_job *job, const bn_box *box, size_t block, size_t count)
{
    const bn_view dy = job->floor ? kept_upstream(job, box, block) : input_view(job, BN_DY, box);
    const bn_view x = x_to_sum(job, box);
    (void)count;
    KERNEL_OF(job, gradient_sums)(
        box->extent, dy.data, dy.strides, x.data, x.strides, input_of(job, box),
        coefficients_from(job, box->channel),
        sums_of_block(job, job->sum_dy, 0, block) + box->channel,
        sums_of_block(job, job->sum_dy_xhat, 1, block) + box->channel);
}

static void weighted_gradient_sums_of_box(const bn_job *job, const bn_box *box, size_t block,
                                          size_t count)
{
    const bn_view inputs[] = {
        input_view(job, BN_DY, box),
        x_to_sum(job, box),
        input_view(job, BN_ELEMENT_WEIGHT, box),
    };
    (void)count;
    KERNEL_OF(job, weighted_gradient_sums)(
        box->extent, inputs, input_of(job, box), coefficients_from(job, box->channel),
        sums_of_block(job, job->sum_dy, 0, block) + box->channel,
        sums_of_block(job, job->sum_dy_xhat, 1, block) + box->channel);
}

static void weighted_sums_and_columns_of_box(const bn_job *job, const bn_box *box, size_t block,
                                             size_t count)
{
    const bn_geometry *geometry = job->geometry;
    const size_t columns = geometry->outer * geometry->inner;
    const bn_view inputs[] = {
        input_view(job, BN_DY, box),
        input_view(job, BN_X, box),
        input_view(job, BN_ELEMENT_WEIGHT, box),
    };
    (void)count;
    KERNEL_OF(job, weighted_sums_and_columns)(
        box->extent, inputs, input_of(job, box), coefficients_from(job, box->channel),
        sums_of_block(job, job->sum_dy, 0, block) + box->channel,
        sums_of_block(job, job->sum_dy_xhat, 1, block) + box->channel,
        job->column_sums + box->outer, job->column_sums + columns + box->outer);
}

/* Whether elements are read once for the sums of rows and of columns: where rows are neighbours. */
static int sums_with_columns(const bn_job *job)
{
    const bn_geometry *geometry = job->geometry;
    return job->column_sums && job->operand[BN_ELEMENT_WEIGHT] && geometry->layout == BN_channels_last &&
           !geometry->any_packed && !job->scaled;
}

static visit *gradient_sums_visit(const bn_job *job)
{
    return sums_with_columns(job)  ? weighted_sums_and_columns_of_box
           : job->operand[BN_ELEMENT_WEIGHT] ? weighted_gradient_sums_of_box
                                 : gradient_sums_of_box;
}

static bn_manner manner_of(const bn_job *job, const bn_box *box)
{
    return (bn_manner){job->stores, job->sums_fetch ? 0 : ahead_of(job, box)};
}

/* How an output is made: the kernel, what it reads in its order, and what it writes. */
typedef struct {
    bn_output_kernel *kernel;
    size_t inputs;
    bn_role input[BN_MOST_INPUTS], output;
} output_method;

static output_method forward_method(const bn_job *job)
{
    if (job->operand[BN_ELEMENT_BIAS]) {
        return (output_method){KERNEL_OF(job, affine), 3,
                               {BN_X, BN_ELEMENT_WEIGHT, BN_ELEMENT_BIAS}, BN_Y};
    }
    if (job->operand[BN_ELEMENT_WEIGHT]) {
        return (output_method){KERNEL_OF(job, scaled), 2, {BN_X, BN_ELEMENT_WEIGHT}, BN_Y};
    }
    return (output_method){
        job->floor ? KERNEL_OF(job, floored_scale_shift) : KERNEL_OF(job, scale_shift), 1, {BN_X}, BN_Y};
}

static output_method gradient_method(const bn_job *job)
{
    if (job->constant_statistics) { /* dx = dy * weight * invstd: a scale_shift that never reads x */
        return (output_method){KERNEL_OF(job, scale_shift), 1, {BN_DY}, BN_DX};
    }
    if (job->operand[BN_ELEMENT_WEIGHT]) {
        return (output_method){KERNEL_OF(job, weighted_input_gradient), 3,
                               {BN_DY, BN_X, BN_ELEMENT_WEIGHT}, BN_DX};
    }
    return (output_method){job->floor        ? KERNEL_OF(job, floored_input_gradient)
                           : job->shared > 1 ? KERNEL_OF(job, shared_input_gradient)
                                             : KERNEL_OF(job, input_gradient),
                           2, {BN_DY, BN_X}, BN_DX};
}

static void write_part(const bn_job *job, const bn_box *box, const output_method *method)
{
    const bn_geometry *geometry = job->geometry;
    char *to = job->operand[method->output], *scratch = buffer_of(job, method->output);
    bn_view inputs[BN_MOST_INPUTS];
    for (size_t i = 0; i < method->inputs; i++) {
        inputs[i] = input_view(job, method->input[i], box);
    }
    const bn_view output = bn_view_to_write(geometry, method->output, to, box, scratch);
    bn_coefficients coefficients = coefficients_from(job, box->channel);
    coefficients.period = period_of(geometry, box->extent.channels);
    method->kernel(box->extent, inputs, coefficients, output, manner_of(job, box));
    bn_written(geometry, method->output, to, box, scratch);
}

/* The output of a call: y, or dx. */
static void output_of_box(const bn_job *job, const bn_box *box, size_t block, size_t count)
{
    const output_method method = job->operand[BN_DX] ? gradient_method(job) : forward_method(job);
    const size_t run = bn_channel_run(job->geometry), end = box->channel + box->extent.channels;
    bn_box part = *box;
    (void)block, (void)count;
    for (; part.channel < end; part.channel += part.extent.channels) {
        part.extent.channels = MIN(run - part.channel % run, end - part.channel);
        write_part(job, &part, &method);
    }
}

/* one block: its chunks in order for sums; the last first for outputs, because that is the one
   which the sums have left in the cache */

static size_t visit_chunk(const bn_job *job, size_t block, size_t chunk, range channels,
                          size_t count, int in_scratch, visit *visit_box)
{
    bn_box box = box_of_chunk(job->geometry, chunk, channels);
    const size_t step = channels_at_once(job->geometry, &box, in_scratch);
    const size_t end = channels.first + channels.count;
    for (; box.channel < end; box.channel += step) {
        box.extent.channels = MIN(step, end - box.channel);
        visit_box(job, &box, block, count);
    }
    return box.extent.outer * box.extent.inner;
}

static void sum_block(const bn_job *job, size_t block, range channels, int in_scratch,
                      visit *visit_box)
{
    const range chunks = chunks_of_block(job->geometry, block);
    size_t count = 0;
    for (size_t i = 0; i < chunks.count; i++) {
        count += visit_chunk(job, block, chunks.first + i, channels, count, in_scratch, visit_box);
    }
}

/* Chunks are for sums alone: as many as make a step are written at once where they are neighbours. */
static void write_block(const bn_job *job, size_t block, range channels, visit *visit_box)
{
    const bn_geometry *geometry = job->geometry;
    const range chunks = chunks_of_block(geometry, block);
    const size_t bytes =
        geometry->chunk_outer * geometry->chunk_inner * channels.count * geometry->itemsize;
    const int apart = geometry->any_packed || geometry->chunks_per_run > 1 ||
                      (job->ahead != 0 && job->fetched < values_per_channel(geometry));
    const size_t together = apart ? 1 : MAX((size_t)1, BN_STEP_BYTES / bytes);
    for (size_t end = chunks.count; end > 0;) {
        const size_t some = MIN(together, end);
        bn_box box;
        end -= some;
        if (some == 1) {
            visit_chunk(job, block, chunks.first + end, channels, 0, geometry->any_packed,
                        visit_box);
            continue;
        }
        box = box_of_chunk(geometry, chunks.first + end, channels);
        box.extent.outer =
            MIN(some * geometry->chunk_outer, geometry->outer - box.outer);
        visit_box(job, &box, block, 0);
    }
    BN_FENCE_STREAMS();
}

static void clear_moments(const bn_job *job, size_t block, range channels)
{
    clear(sums_of_block(job, job->mean, 0, block), channels);
    clear(sums_of_block(job, job->mean_low, 1, block), channels);
    clear(sums_of_block(job, job->m2, 2, block), channels);
}

static void sum_moments(const bn_job *job, size_t block, range channels)
{
    clear_moments(job, block, channels);
    sum_block(job, block, channels, job->geometry->operand[BN_X].packed || job->scaled,
              moments_of_box);
}

static void sum_gradient(const bn_job *job, size_t block, range channels)
{
    clear(sums_of_block(job, job->sum_dy, 0, block), channels);
    clear(sums_of_block(job, job->sum_dy_xhat, 1, block), channels);
    if (job->floor) {
        clear(sums_of_block(job, job->sum_floored, 2, block), channels);
    }
    /* What is kept of dy is made in scratch. */
    sum_block(job, block, channels, job->geometry->any_packed || job->floor || job->scaled,
              gradient_sums_visit(job));
}

/* one piece of an output: a part of outer by a part of the channels by a part of inner */

static range part(size_t whole, size_t parts, size_t number)
{
    const size_t first = whole / parts * number + MIN(whole % parts, number);
    return (range){first, whole / parts + (number < whole % parts)};
}

/* How many channels are cut off together. */
static size_t channel_unit(const bn_geometry *geometry)
{
    return geometry->layout == BN_channels_last ? BN_CHANNELS_TOGETHER : 1;
}

static range channel_part(const bn_geometry *geometry, size_t parts, size_t number)
{
    const size_t unit = channel_unit(geometry);
    const range units = part(divide_up(geometry->channels, unit), parts, number);
    const size_t first = units.first * unit;
    return (range){first, MIN(units.count * unit, geometry->channels - first)};
}

static void write_piece(const bn_job *job, size_t number, visit *visit_box)
{
    const bn_geometry *geometry = job->geometry;
    const bn_extent pieces = job->pieces;
    const range inner = part(geometry->inner, pieces.inner, number % pieces.inner);
    number /= pieces.inner;
    const range channels = channel_part(geometry, pieces.channels, number % pieces.channels);
    const range outer = part(geometry->outer, pieces.outer, number / pieces.channels);

    const size_t most =
        (geometry->any_packed ? BN_SCRATCH_BYTES : BN_STEP_BYTES) / geometry->itemsize;
    const size_t inner_step = geometry->any_packed ? MIN(inner.count, most) : inner.count;
    const size_t channel_step = geometry->any_packed
                                    ? MIN(channels.count, MAX((size_t)1, most / inner_step))
                                    : channels.count;
    const size_t fewest = geometry->any_packed ? 1 : BN_FEWEST_ROWS;
    const size_t outer_step = MAX(fewest, most / (inner_step * channel_step));
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
                visit_box(job, &box, 0, 0);
            }
        }
    }
    BN_FENCE_STREAMS();
}

/* some channels: before the sums of their blocks, and from the sums to the coefficients */

static void merge_blocks(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    size_t count = values_of_block(job->geometry, 0);
    for (size_t block = 1; block < job->geometry->blocks; block++) {
        const size_t more = values_of_block(job->geometry, block);
        job->kernels->merge_moments(channels.count, count, job->mean + c, job->mean_low + c,
                                    job->m2 + c, more, sums_of_block(job, NULL, 0, block) + c,
                                    sums_of_block(job, NULL, 1, block) + c,
                                    sums_of_block(job, NULL, 2, block) + c);
        count += more;
    }
}

/* From groups that were summed as runs, whose moments follow each other, to all of their channels. */
static void spread_moments(size_t channels, size_t shared, double *moments)
{
    for (size_t group = channels / shared; group-- > 0;) {
        const double of_all = moments[group];
        for (size_t c = group * shared; c < (group + 1) * shared; c++) {
            moments[c] = of_all;
        }
    }
}

static void merge_gradient(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    for (size_t block = 1; block < job->geometry->blocks; block++) {
        job->kernels->merge_sums(channels.count, job->sum_dy + c,
                                 sums_of_block(job, NULL, 0, block) + c);
        job->kernels->merge_sums(channels.count, job->sum_dy_xhat + c,
                                 sums_of_block(job, NULL, 1, block) + c);
        if (job->floor) {
            job->kernels->merge_sums(channels.count, job->sum_floored + c,
                                     sums_of_block(job, NULL, 2, block) + c);
        }
    }
}

/* Pools the moments of the channels that share statistics; each of these channels then holds the pooled
   moments. */
static void share_moments(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    if (are_joined(job)) {
        spread_moments(channels.count, job->shared, job->mean + c);
        spread_moments(channels.count, job->shared, job->mean_low + c);
        spread_moments(channels.count, job->shared, job->m2 + c);
    } else if (job->shared > 1) {
        job->kernels->pool_moments(channels.count / job->shared, job->shared,
                                   values_per_channel(job->geometry), job->mean + c,
                                   job->mean_low + c, job->m2 + c);
    }
}

static void moments_again(const bn_job *job, range channels)
{
    for (size_t block = 0; block < job->geometry->blocks; block++) {
        sum_moments(job, block, channels);
    }
    merge_blocks(job, channels);
    share_moments(job, channels);
}

/* the ends of float64's range, from which there is no wider type to retreat to (float32 has float64) */

/* Whether there is nothing to mend: asked of every channel, and so by vectors. */
static int are_within(size_t count, const double *values, double least, double most)
{
    int64_t outside = 0;
    BN_SIMD_ANY(outside)
    for (size_t c = 0; c < count; c++) {
        outside |= values[c] >= least && values[c] <= most ? 0 : 1;
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
    if (!job->invstd) {
        return job->m2[c] <= DBL_MAX ? 0.0 : SMALLER;
    }
    if (!(job->invstd[c] > 0.0)) {
        return SMALLER;
    }
    return job->invstd[c] > LARGE_INVSTD && fabs(job->mean[c]) < 0x1p-350 ? LARGER : 0.0;
}

/* The same job with x scaled in scratch: its own, or `rare` where it has none. */
static bn_job scaled_job(const bn_job *job, double factor, char *rare)
{
    bn_job scaled = *job;
    scaled.scaled = 1;
    scaled.factor = factor;
    if (!job->scratch) {
        scaled.scratch = rare;
        scaled.scratch_bytes = BN_SCRATCH_BYTES;
    }
    return scaled;
}

BN_NOINLINE void scaled_moments(const bn_job *job, range channels, double factor)
{
    const double size = (double)(values_per_channel(job->geometry) * job->shared);
    _Alignas(64) char rare[BN_SCRATCH_BYTES];
    const bn_job scaled = scaled_job(job, factor, rare);
    moments_again(&scaled, channels);
    for (size_t c = channels.first; c < channels.first + channels.count; c++) {
        const double eps = job->eps + (job->more_eps ? job->more_eps[c] : 0.0);
        if (job->invstd) {
            job->kernels->invstd(1, job->m2 + c, size, eps * factor * factor, NULL,
                                 job->invstd + c);
            job->invstd[c] *= factor;
        }
        job->mean[c] /= factor;
        job->mean_low[c] /= factor;
        job->m2[c] = job->m2[c] / factor / factor; /* infinite, where float64 does not hold it */
    }
}

/* Neighbours that need the same factor are summed together. */
static void mend_moments(const bn_job *job, range channels)
{
    const size_t end = channels.first + channels.count;
    range some = {channels.first, 0};
    if (job->geometry->dtype == BN_f32 ||
        (job->invstd && are_within(channels.count, job->invstd + channels.first, SMALL_INVSTD,
                                   LARGE_INVSTD))) {
        return;
    }
    for (; some.first < end; some.first += some.count) {
        const double factor = factor_needed(job, some.first);
        some.count = job->shared;
        while (some.first + some.count < end &&
               factor_needed(job, some.first + some.count) == factor) {
            some.count += job->shared;
        }
        if (factor != 0.0) {
            scaled_moments(job, some, factor);
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

/* Sums of dy * xhat with x made xhat, but for a factor, before it is summed. Nothing but the sums may need the
   mean meanwhile: it is 0 for them, as that of xhat is. (What is above a floor is told by it: such jobs, those
   of filter response norm, are uncentred.) */
BN_NOINLINE void scaled_gradient(const bn_job *job, range channels)
{
    const bn_coefficients coefficients = coefficients_from(job, channels.first);
    _Alignas(64) char rare[BN_SCRATCH_BYTES];
    const bn_job scaled = scaled_job(job, 1.0, rare);
    memset(coefficients.array[BN_MEAN], 0, channels.count * sizeof(double));
    for (size_t block = 0; block < job->geometry->blocks; block++) {
        sum_gradient(&scaled, block, channels);
    }
    merge_gradient(&scaled, channels);
    job->kernels->round_mean[BN_f64](channels.count, job->mean + channels.first, coefficients);
    for (size_t c = channels.first; c < channels.first + channels.count; c++) {
        const double factor = power_of_two(job->invstd[c]);
        const double low = job->mean_low ? job->mean_low[c] * factor : 0.0;
        const double sum = job->sum_dy_xhat[c] - (low == 0.0 ? 0.0 : low * job->sum_dy[c]);
        job->sum_dy_xhat[c] = sum * (job->invstd[c] / factor);
    }
}

static void mend_gradient(const bn_job *job, range channels)
{
    const size_t end = channels.first + channels.count;
    range some = {channels.first, 0};
    if (job->geometry->dtype == BN_f32 ||
        are_within(channels.count, job->invstd + channels.first, LEAST_INVSTD, MOST_INVSTD)) {
        return;
    }
    for (; some.first < end; some.first += some.count) {
        const int extreme = is_extreme(job->invstd[some.first]);
        some.count = 1;
        while (some.first + some.count < end &&
               is_extreme(job->invstd[some.first + some.count]) == extreme) {
            some.count++;
        }
        if (extreme) {
            scaled_gradient(job, some);
        }
    }
}

/* In standard deviations: where the mean is larger, what rounding it to one float64 has left is no less
   than other roundings of the gradient are. */
#define NOTICED_MEAN 4.0

static int is_noticed(const bn_job *job, size_t c)
{
    return fabs(job->mean[c] * job->invstd[c]) > NOTICED_MEAN;
}

static int any_noticed(const bn_job *job, range channels)
{
    int64_t any = 0;
    BN_SIMD_ANY(any)
    for (size_t c = channels.first; c < channels.first + channels.count; c++) {
        any |= is_noticed(job, c) ? 1 : 0;
    }
    return any != 0;
}

/* What rounding has left of the mean is found again from x, by the sums that the forward pass made: of all
   channels of a task where one needs it, because they may be neighbours in memory, but kept for those alone
   that do. These sums stand where those of the gradient will. */
static bn_job job_of_mean_low(const bn_job *job)
{
    bn_job again = *job;
    again.mean = job->sum_dy;
    again.m2 = job->sum_dy_xhat;
    return again;
}

static void sum_mean_low(const bn_job *job, size_t block, range channels)
{
    const bn_job again = job_of_mean_low(job);
    if (any_noticed(job, channels)) {
        sum_moments(&again, block, channels);
    } else {
        clear_moments(&again, block, channels);
    }
}

/* A mean that differs by more than rounding is not that of x, and is what the caller says. */
static void finish_mean_low(const bn_job *job, range channels)
{
    const bn_job again = job_of_mean_low(job);
    if (!any_noticed(job, channels)) {
        clear(job->mean_low, channels);
        return;
    }
    merge_blocks(&again, channels);
    share_moments(&again, channels);
    for (size_t c = channels.first; c < channels.first + channels.count; c++) {
        const double rest = (again.mean[c] - job->mean[c]) + job->mean_low[c];
        const int own = is_noticed(job, c) && fabs(rest) <= DBL_EPSILON * fabs(job->mean[c]);
        job->mean_low[c] = own ? rest : 0.0;
    }
}

/* Lets a coefficient array go on beyond its channels and recur. */
static void repeat(const bn_geometry *geometry, void *array)
{
    const size_t length = bn_coefficients_length(geometry);
    for (size_t set = geometry->channels; set < length;) {
        const size_t more = MIN(set, length - set);
        memcpy(element_at(geometry, array, set), array, more * geometry->itemsize);
        set += more;
    }
}

/* They recur where a box may have all channels: so does the task, then. */
static void repeat_coefficients(const bn_job *job, range channels)
{
    const int all = channels.count == job->geometry->channels;
    for (size_t i = 0; all && i < BN_COEFFICIENTS; i++) {
        if (job->coefficients.array[i]) {
            repeat(job->geometry, job->coefficients.array[i]);
        }
    }
}

static void set_floors(const bn_job *job, range channels, bn_coefficient shift)
{
    const bn_coefficients coefficients = coefficients_from(job, channels.first);
    job->kernels->floor_coefficients[job->geometry->dtype](
        channels.count, job->floor + channels.first, coefficients.array[shift],
        coefficients.array[BN_FLOOR]);
}

static void prepare_scale_shift(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    job->kernels->invstd(channels.count, job->variance + c, 1.0, job->eps, NULL,
                         job->invstd + c);
    job->kernels->scale_shift_coefficients[job->geometry->dtype](
        channels.count, 0, job->mean + c, NULL, job->invstd + c,
        parameter_from(job->weight, c), parameter_from(job->bias, c), coefficients_from(job, c));
    repeat_coefficients(job, channels);
}

/* Once the low part of the mean is known. */
static void prepare_gradient(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    if (job->mean_low) {
        finish_mean_low(job, channels);
    }
    if (!job->floor && !job->column_sums) {
        job->kernels->round_mean[job->geometry->dtype](channels.count, job->mean + c,
                                                       coefficients_from(job, c));
        return;
    }
    /* And what y, or xhat, is made of again. */
    bn_coefficients forward = coefficients_from(job, c);
    forward.array[BN_SHIFT] = forward.array[BN_FORWARD_SHIFT];
    job->kernels->scale_shift_coefficients[job->geometry->dtype](
        channels.count, job->column_sums != NULL, job->mean + c, parameter_from(job->mean_low, c),
        job->invstd + c,
        parameter_from(job->weight, c), parameter_from(job->bias, c), forward);
    if (job->floor) {
        set_floors(job, channels, BN_FORWARD_SHIFT);
    }
}

static void finish_normalize(const bn_job *job, range channels)
{
    const size_t c = channels.first, each = values_per_channel(job->geometry);
    merge_blocks(job, channels);
    share_moments(job, channels);
    job->kernels->invstd(channels.count, job->m2 + c, (double)(each * job->shared), job->eps,
                         parameter_from(job->more_eps, c), job->invstd + c);
    mend_moments(job, channels);
    job->kernels->scale_shift_coefficients[job->geometry->dtype](
        channels.count, 0, job->mean + c, job->mean_low + c, job->invstd + c,
        parameter_from(job->weight, c), parameter_from(job->bias, c), coefficients_from(job, c));
    if (job->floor) {
        set_floors(job, channels, BN_SHIFT);
    }
    repeat_coefficients(job, channels);
}

static void finish_gradient(const bn_job *job, range channels)
{
    const size_t c = channels.first;
    merge_gradient(job, channels);
    job->kernels->standardize[job->geometry->dtype](channels.count, job->mean + c,
                                                    parameter_from(job->mean_low, c),
                                                    job->invstd + c, job->sum_dy + c,
                                                    job->sum_dy_xhat + c);
    mend_gradient(job, channels);
    if (job->constant_statistics) {
        job->kernels->scale_shift_coefficients[job->geometry->dtype](
            channels.count, 0, NULL, NULL, job->invstd + c, parameter_from(job->weight, c), NULL,
            coefficients_from(job, c));
        repeat_coefficients(job, channels);
        return;
    }
    if (job->shared > 1) {
        job->kernels->shared_gradient_coefficients[job->geometry->dtype](
            channels.count / job->shared, job->shared, values_per_channel(job->geometry),
            job->mean + c, parameter_from(job->mean_low, c), job->invstd + c,
            parameter_from(job->weight, c), job->sum_dy + c, job->sum_dy_xhat + c,
            coefficients_from(job, c));
    } else {
        job->kernels->gradient_coefficients[job->geometry->dtype](
            channels.count, values_per_channel(job->geometry), job->mean + c,
            parameter_from(job->mean_low, c), job->invstd + c, parameter_from(job->weight, c),
            job->sum_dy + c, job->sum_dy_xhat + c, coefficients_from(job, c));
    }
    if (job->uncentred) {
        memset(coefficients_from(job, c).array[BN_OFFSET], 0,
               channels.count * job->geometry->itemsize);
    }
    repeat_coefficients(job, channels);
}

/* one repeat: the same job, with its part of everything that repeats have of their own */

static char *operand_of_repeat(const bn_geometry *geometry, bn_role role, char *data,
                               size_t repeat)
{
    for (size_t axis = geometry->repeat_axes; data && axis-- > 0;) {
        const size_t size = geometry->repeat_axis_sizes[axis];
        data += (ptrdiff_t)(repeat % size) * geometry->operand[role].repeat_axis_strides[axis];
        repeat /= size;
    }
    return data;
}

static double *statistics_of_repeat(double *statistics, size_t each, size_t repeat)
{
    return statistics ? statistics + repeat * each : NULL;
}

static bn_job job_of_repeat(const bn_job *job, size_t repeat)
{
    const bn_geometry *geometry = job->geometry;
    const size_t channels = geometry->channels;
    bn_job own = *job;
    for (size_t role = 0; role < BN_ROLES; role++) {
        own.operand[role] =
            operand_of_repeat(geometry, (bn_role)role, job->operand[role], repeat);
    }
    own.weight = parameter_from(job->weight, repeat * job->parameters_of_repeat);
    own.bias = parameter_from(job->bias, repeat * job->parameters_of_repeat);
    own.mean = statistics_of_repeat(job->mean, channels, repeat);
    own.mean_low = statistics_of_repeat(job->mean_low, channels, repeat);
    own.m2 = statistics_of_repeat(job->m2, channels, repeat);
    own.invstd = statistics_of_repeat(job->invstd, channels, repeat);
    own.variance = job->variance ? job->variance + repeat * channels : NULL;
    own.sum_dy = statistics_of_repeat(job->sum_dy, channels, repeat);
    own.sum_dy_xhat = statistics_of_repeat(job->sum_dy_xhat, channels, repeat);
    own.sum_floored = statistics_of_repeat(job->sum_floored, channels, repeat);
    own.partials = statistics_of_repeat(
        job->partials, (geometry->blocks - 1) * BN_SUMS * channels, repeat);
    for (size_t i = 0; i < BN_COEFFICIENTS; i++) {
        if (job->coefficients.array[i]) {
            own.coefficients.array[i] = element_at(geometry, job->coefficients.array[i],
                                                   repeat * bn_coefficients_length(geometry));
        }
    }
    return own;
}

static void do_task(const bn_job *job, const bn_phase *phase, size_t number)
{
    if (job->geometry->repeats == 1 || phase->of_all) {
        phase->task(job, number);
    } else {
        const bn_job own = job_of_repeat(job, number / phase->tasks);
        phase->task(&own, number % phase->tasks);
    }
}

void bn_do_tasks(const bn_job *job, const bn_phase *phase, size_t thread, size_t first, size_t end)
{
    bn_job own;
    if (thread > 0 && job->scratch) {
        own = *job;
        own.scratch += thread * BN_BUFFERS * job->scratch_bytes;
        job = &own;
    }
    for (size_t number = first; number < end; number++) {
        do_task(job, phase, number);
    }
}

/* tasks: number -> group and, unless the task is fused, block */

static range task_channels(const bn_job *job, size_t number)
{
    return channels_of_group(job, number % job->groups);
}

static size_t task_block(const bn_job *job, size_t number) { return number / job->groups; }

static void moments_task(const bn_job *job, size_t number)
{
    sum_moments(job, task_block(job, number), task_channels(job, number));
}

static void mean_low_task(const bn_job *job, size_t number)
{
    sum_mean_low(job, task_block(job, number), task_channels(job, number));
}

static void gradient_sums_task(const bn_job *job, size_t number)
{
    sum_gradient(job, task_block(job, number), task_channels(job, number));
}

static void scale_shift_task(const bn_job *job, size_t number)
{
    write_piece(job, number, output_of_box);
}

static void input_gradient_task(const bn_job *job, size_t number)
{
    write_piece(job, number, output_of_box);
}

static void fused_normalize_task(const bn_job *job, size_t number)
{
    const range channels = channels_of_group(job, number);
    const size_t blocks = job->geometry->blocks;
    for (size_t block = 0; block < blocks; block++) {
        sum_moments(job, block, channels);
    }
    finish_normalize(job, channels);
    for (size_t block = blocks; block-- > 0;) {
        write_block(job, block, channels, output_of_box);
    }
}

/* From the statistics to the coefficients of dx, for some channels alone. */
static void sum_gradient_of_all_blocks(const bn_job *job, range channels)
{
    const size_t blocks = job->geometry->blocks;
    for (size_t block = 0; job->mean_low && block < blocks; block++) {
        sum_mean_low(job, block, channels);
    }
    prepare_gradient(job, channels);
    for (size_t block = 0; block < blocks; block++) {
        sum_gradient(job, block, channels);
    }
    finish_gradient(job, channels);
}

static void fused_gradient_task(const bn_job *job, size_t number)
{
    const range channels = channels_of_group(job, number);
    const size_t blocks = job->geometry->blocks;
    sum_gradient_of_all_blocks(job, channels);
    for (size_t block = blocks; block-- > 0;) {
        write_block(job, block, channels, output_of_box);
    }
}

/* rows: channels of repeats, whose elements have parameters */

/* So many at a time where they go through scratch, and the multiple of which a group of them is: groups then
   change no sum. */
static size_t rows_together(const bn_geometry *geometry)
{
    return geometry->layout == BN_contiguous ? BN_ADDED_ROWS
                                             : BN_ADDED_NEIGHBOURS_BYTES / geometry->itemsize;
}

/* The rows of a block: a part of one repeat's, or all of some repeats. */
static range rows_of_block(const bn_geometry *geometry, size_t number)
{
    const size_t each = geometry->rows_of_block, parts = bn_row_blocks_of_repeat(geometry);
    const size_t covered = parts > 1 ? geometry->channels : each; /* by so many blocks */
    const size_t start = number / parts * covered, first = start + number % parts * each;
    const size_t all = geometry->repeats * geometry->channels;
    return (range){first, MIN(MIN(first + each, start + covered), all) - first};
}

/* Adds the sums over some rows of dy * xhat and dy, column by column. */
static void add_columns(const bn_job *job, range rows, double *sums)
{
    const bn_geometry *geometry = job->geometry;
    const size_t columns = geometry->outer * geometry->inner;
    const size_t *const walked =
        geometry->layout == BN_contiguous ? &geometry->inner : &geometry->outer;
    const size_t most_rows = geometry->any_packed ? rows_together(geometry) : rows.count;
    const size_t most_columns = geometry->any_packed
                                    ? BN_SCRATCH_BYTES / rows_together(geometry) / geometry->itemsize
                                    : columns;
    for (size_t row = 0; row < rows.count; row += most_rows) {
        for (size_t column = 0, some; column < columns; column += some) {
            some = MIN(most_columns, *walked - column % *walked);
            const bn_box box = {
                .outer = column / geometry->inner,
                .channel = rows.first + row,
                .inner = column % geometry->inner,
                .extent = {walked == &geometry->outer ? some : 1,
                           MIN(most_rows, rows.count - row),
                           walked == &geometry->inner ? some : 1},
            };
            const bn_view inputs[] = {
                input_view(job, BN_DY, &box),
                input_view(job, BN_X, &box),
            };
            KERNEL_OF(job, column_sums)(
                box.extent, inputs, coefficients_from(job, box.channel), sums + column,
                sums + columns + column);
        }
    }
}

/* Whether elements can be read once for the sums of columns and for dx: of plain rows, where dx stays in
   the cache (streams want their lines in order) and nothing that may be read again is overwritten. */
static int may_write_with_columns(const bn_job *job)
{
    const bn_geometry *geometry = job->geometry;
    return job->operand[BN_ELEMENT_WEIGHT] && geometry->layout == BN_contiguous && geometry->outer == 1 &&
           !geometry->any_packed && bn_channel_run(geometry) == geometry->channels &&
           job->stores == BN_stored && !is_in_place(job, BN_DX);
}

static void add_columns_and_write(const bn_job *job, range rows, double *sums)
{
    const bn_geometry *geometry = job->geometry;
    const bn_box box = {.channel = rows.first, .extent = {1, rows.count, geometry->inner}};
    const bn_view inputs[] = {
        input_view(job, BN_DY, &box),
        input_view(job, BN_X, &box),
        input_view(job, BN_ELEMENT_WEIGHT, &box),
    };
    KERNEL_OF(job, columns_and_gradient)(
        box.extent, inputs, coefficients_from(job, box.channel),
        bn_view_to_write(geometry, BN_DX, job->operand[BN_DX], &box, NULL), sums, sums + geometry->inner);
}

/* Some rows in one go, while they are in the cache. The job has the column sums of the task's own block. */
static void row_gradient(const bn_job *job, range rows)
{
    const size_t blocks = job->geometry->blocks;
    sum_gradient_of_all_blocks(job, rows);
    if (may_write_with_columns(job)) {
        add_columns_and_write(job, rows, job->column_sums);
        return;
    }
    if (!sums_with_columns(job)) {
        add_columns(job, rows, job->column_sums);
    }
    for (size_t block = blocks; block-- > 0;) {
        write_block(job, block, rows, output_of_box);
    }
}

static void row_gradient_task(const bn_job *job, size_t number)
{
    const bn_geometry *geometry = job->geometry;
    const size_t columns = geometry->outer * geometry->inner;
    const range rows = rows_of_block(geometry, number);
    const size_t end = rows.first + rows.count;
    double *sums = job->column_sums + number * 2 * columns;
    clear(sums, (range){0, 2 * columns});
    for (size_t row = rows.first, some; row < end; row += some) {
        const size_t repeat = row / geometry->channels, first = row % geometry->channels;
        bn_job own = job_of_repeat(job, repeat);
        own.column_sums = sums;
        some = MIN(MIN(job->group, end - row), geometry->channels - first);
        row_gradient(&own, (range){first, some});
    }
}

static void merge_columns_task(const bn_job *job, size_t number)
{
    const bn_geometry *geometry = job->geometry;
    const size_t columns = 2 * geometry->outer * geometry->inner;
    const size_t first = number * BN_CHANNELS_PER_TASK;
    const size_t blocks = bn_row_blocks(geometry);
    for (size_t block = 1; block < blocks; block++) {
        job->kernels->merge_sums(MIN(BN_CHANNELS_PER_TASK, columns - first),
                                 job->column_sums + first,
                                 job->column_sums + block * columns + first);
    }
}

/* tasks over channels alone */

/* As near to BN_CHANNELS_PER_TASK as channels that share their statistics allow, and those of a wide row,
   whose coefficients recur. */
static size_t channels_per_task(const bn_job *job)
{
    const size_t wanted = divide_up(BN_CHANNELS_PER_TASK, job->geometry->blocks);
    return divide_up(MAX(wanted, BN_WIDE_ROW), job->shared) * job->shared;
}

static range channels_of_task(const bn_job *job, size_t number)
{
    const size_t first = number * channels_per_task(job);
    return (range){first, MIN(channels_per_task(job), job->geometry->channels - first)};
}

static bn_phase channel_phase(const bn_job *job, bn_task *task)
{
    const bn_geometry *geometry = job->geometry;
    const size_t all = geometry->repeats * geometry->channels * geometry->blocks;
    return (bn_phase){task, divide_up(geometry->channels, channels_per_task(job)), 0,
                      all <= BN_CHANNELS_PER_TASK};
}

static void finish_moments_task(const bn_job *job, size_t number)
{
    merge_blocks(job, channels_of_task(job, number));
    mend_moments(job, channels_of_task(job, number));
}

static void prepare_scale_shift_task(const bn_job *job, size_t number)
{
    prepare_scale_shift(job, channels_of_task(job, number));
}

static void prepare_gradient_task(const bn_job *job, size_t number)
{
    prepare_gradient(job, channels_of_task(job, number));
}

static void finish_normalize_task(const bn_job *job, size_t number)
{
    finish_normalize(job, channels_of_task(job, number));
}

static void finish_gradient_task(const bn_job *job, size_t number)
{
    finish_gradient(job, channels_of_task(job, number));
}

/* the schedule */

/* All tensors of a call, its output among them. */
static size_t bytes_of_call(const bn_job *job, size_t tensors)
{
    const bn_geometry *geometry = job->geometry;
    return tensors * geometry->repeats * geometry->outer * geometry->channels * geometry->inner *
           geometry->itemsize;
}

static void choose_stores(bn_job *job, size_t threads, bn_role output, size_t tensors)
{
    /* In place, a line has been read already; scratch is read again at once. */
    const int streamed = bytes_of_call(job, tensors) >= bn_streamed_from(job->caches, threads, tensors) &&
                         !is_in_place(job, output) && !job->geometry->operand[output].packed;
    job->stores = streamed ? BN_streamed : BN_stored;
}

/* The level of memory that holds `tensors` tensors of a call after the previous pass over these tensors. */
static bn_place place_of(const bn_job *job, size_t tensors, size_t threads)
{
    const bn_geometry *geometry = job->geometry;
    const size_t row = geometry->phases * geometry->channels * geometry->itemsize;
    const int narrow = geometry->layout == BN_channels_last && row <= BN_NARROW_ROW_BYTES;
    const size_t bytes = bytes_of_call(job, tensors);
    return bytes <= bn_level2_bytes(job->caches, threads) ? BN_IN_LEVEL2
           : bytes <= bn_last_level_bytes(job->caches, narrow && tensors == 1) ? BN_IN_LAST_LEVEL
                                                                                : BN_IN_MEMORY;
}

/* Cuts the channels into groups for so many threads, which read so many tensors; whether its tasks had
   better be fused. */
static int group_channels(bn_job *job, size_t threads, size_t tensors)
{
    const bn_geometry *geometry = job->geometry;
    const size_t channels = geometry->channels;
    const size_t wanted = threads > 1 ? divide_up(2 * threads, geometry->repeats) : 1;
    const int enough = threads <= geometry->repeats; /* of the repeats alone, for all threads */
    int fused;
    if (geometry->layout == BN_contiguous) {
        const size_t run = geometry->inner * geometry->itemsize;
        const size_t neighbouring =
            geometry->outer == 1 ? BN_ROWS_BYTES : BN_NEIGHBOURING_BYTES;
        const size_t together = MAX((size_t)1, neighbouring / run);
        const size_t fair = MAX((size_t)1, channels / wanted);
        const size_t channel = values_per_channel(geometry) * geometry->itemsize * tensors;
        const size_t slab = MAX(bn_slab_bytes(job->caches) / channel, BN_FEWEST_BYTES / run);
        const int whole = bytes_of_call(job, tensors + 1) < bn_whole_bytes(job->caches);
        job->group = whole ? fair : MIN(MIN(together, fair), MAX((size_t)1, slab));
        fused = geometry->blocks == 1 || enough || channels / job->group >= wanted;
    } else {
        const size_t groups = divide_up(wanted, geometry->blocks);
        const size_t fair = divide_up(channels, groups);
        job->group = divide_up(fair, BN_CHANNELS_TOGETHER) * BN_CHANNELS_TOGETHER;
        fused = geometry->blocks == 1 || enough;
        if (fused && channels * geometry->itemsize > BN_LONG_ROW_BYTES) {
            const size_t lines = geometry->outer * geometry->itemsize * tensors * BN_CHANNELS_TOGETHER;
            const size_t slab = bn_slab_bytes(job->caches) / lines * BN_CHANNELS_TOGETHER;
            job->group = MIN(job->group, MAX(slab, BN_NEIGHBOURING_BYTES / geometry->itemsize));
        }
        job->group = MIN(job->group, channels);
    }
    job->group = MIN(divide_up(job->group, job->shared) * job->shared, channels);
    job->groups = divide_up(channels, job->group);
    job->place = place_of(job, tensors, threads);
    return fused;
}

/* Whether adding a run up takes longer than memory needs to bring the next one. */
static int sums_take_long(const bn_job *job, size_t tensors)
{
    const size_t run = job->geometry->inner * job->geometry->itemsize;
    return tensors == 1 ? !job->uncentred : run <= BN_SLOW_RUN_BYTES;
}

/* While a group is normalized, the input of the next group is prefetched: as much as the second level of cache
   has room for, or all of a slab that is too large for that level. (Outputs are written from their end, so that
   what is prefetched then is what is summed next.) */
static void fetch_ahead(bn_job *job, size_t tensors)
{
    const bn_geometry *geometry = job->geometry;
    const size_t bytes = job->group * geometry->itemsize * tensors;
    if (geometry->layout == BN_contiguous && !geometry->any_packed) {
        job->ahead = (ptrdiff_t)job->group * geometry->operand[BN_X].channel_stride;
        job->sums_fetch = geometry->outer == 1 && !job->floor && sums_take_long(job, tensors);
        job->fetched = values_per_channel(geometry);
        if (bytes * job->fetched <= bn_lost_slab_bytes(job->caches)) {
            job->fetched = bn_slab_bytes(job->caches) / bytes;
        }
        if (job->fetched >= values_per_channel(geometry)) {
            job->place = BN_IN_LEVEL2;
        }
    }
}

static bn_phase block_phase(const bn_job *job, bn_task *task)
{
    return (bn_phase){task, job->groups * job->geometry->blocks, 0, 0};
}

/* Cuts an output into as many pieces as there are threads for it, in memory order as far as it goes. */
static bn_phase piece_phase(bn_job *job, size_t threads, bn_task *task)
{
    const bn_geometry *geometry = job->geometry;
    const size_t units = divide_up(geometry->channels, channel_unit(geometry));
    const size_t wanted = divide_up(threads, geometry->repeats);
    bn_extent pieces;
    pieces.outer = MIN(wanted, geometry->outer);
    pieces.channels = MIN(divide_up(wanted, pieces.outer), units);
    pieces.inner = MIN(divide_up(wanted, pieces.outer * pieces.channels), geometry->inner);
    job->pieces = pieces;
    return (bn_phase){task, pieces.outer * pieces.channels * pieces.inner, 0, 0};
}

static bn_phase fused_phase(const bn_job *job, bn_task *task)
{
    return (bn_phase){task, job->groups, 0, 0};
}

size_t bn_moments_phases(bn_job *job, size_t threads, bn_phase *phases)
{
    group_channels(job, threads, 1);
    phases[0] = block_phase(job, moments_task);
    phases[1] = channel_phase(job, finish_moments_task);
    return 2;
}

size_t bn_normalize_phases(bn_job *job, size_t threads, bn_phase *phases)
{
    choose_stores(job, threads, BN_Y, 2);
    if (group_channels(job, threads, 1)) {
        fetch_ahead(job, 1);
        phases[0] = fused_phase(job, fused_normalize_task);
        return 1;
    }
    phases[0] = block_phase(job, moments_task);
    phases[1] = channel_phase(job, finish_normalize_task);
    phases[2] = piece_phase(job, threads, scale_shift_task);
    return 3;
}

size_t bn_scale_shift_phases(bn_job *job, size_t threads, bn_phase *phases)
{
    size_t count = 0;
    choose_stores(job, threads, BN_Y, 2);
    if (!job->prepared) {
        phases[count++] = channel_phase(job, prepare_scale_shift_task);
    }
    phases[count++] = piece_phase(job, threads, scale_shift_task);
    return count;
}

size_t bn_gradient_phases(bn_job *job, size_t threads, bn_phase *phases)
{
    const bn_geometry *geometry = job->geometry;
    size_t count = 0;
    choose_stores(job, threads, BN_DX, 3);
    if (group_channels(job, threads, 2)) {
        fetch_ahead(job, 2);
        phases[0] = fused_phase(job, fused_gradient_task);
        return 1;
    }
    if (job->mean_low && any_noticed(job, (range){0, geometry->repeats * geometry->channels})) {
        phases[count++] = block_phase(job, mean_low_task);
    } else {
        job->mean_low = NULL;
    }
    phases[count++] = channel_phase(job, prepare_gradient_task);
    phases[count++] = block_phase(job, gradient_sums_task);
    phases[count++] = channel_phase(job, finish_gradient_task);
    phases[count++] = piece_phase(job, threads, input_gradient_task);
    return count;
}

size_t bn_row_gradient_phases(bn_job *job, size_t threads, bn_phase *phases)
{
    const bn_geometry *geometry = job->geometry;
    const size_t columns = geometry->outer * geometry->inner;
    const size_t together = rows_together(geometry);
    const size_t slab = bn_slab_bytes(job->caches) / (2 * columns * geometry->itemsize);
    if (!job->column_sums) {
        return bn_gradient_phases(job, threads, phases);
    }
    choose_stores(job, threads, BN_DX, 3);
    job->place = place_of(job, 2, threads);
    job->group = MAX((size_t)1, slab / together) * together;
    phases[0] = (bn_phase){row_gradient_task, bn_row_blocks(geometry), 1, 0};
    phases[1] = (bn_phase){merge_columns_task, divide_up(2 * columns, BN_CHANNELS_PER_TASK), 1, 0};
    return 2;
}

void bn_parameter_gradients(const bn_job *job, bn_dtype dtype, void *dweight, void *dbias)
{
    job->kernels->parameter_gradients[dtype](job->geometry->channels, job->geometry->repeats,
                                             job->sum_dy, job->sum_dy_xhat, dweight, dbias);
}
