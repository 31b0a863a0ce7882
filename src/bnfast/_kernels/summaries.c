/* Summaries: counts of each channel, extremes, sums of integers. */
#include <math.h>

#include "kernel_calls.h"
#include "portability.h"

/* How many channels are summarized at a time, with their sums on the stack. */
#define CHANNELS_AT_ONCE ((size_t)64)

/* A first level of cache. */
#define BYTES_AT_ONCE ((size_t)32768)

typedef struct {
    double count[CHANNELS_AT_ONCE], centre[CHANNELS_AT_ONCE], nonfinite[CHANNELS_AT_ONCE];
    double mean[CHANNELS_AT_ONCE], mean_low[CHANNELS_AT_ONCE], m2[CHANNELS_AT_ONCE];
    double minimum[CHANNELS_AT_ONCE], maximum[CHANNELS_AT_ONCE];
} box_summary;

/* From one channel of a box to the next, in elements. */
static ptrdiff_t channel_step(const bn_job *job, bn_strides strides)
{
    return job->plan->layout == BN_contiguous ? strides.channel : 1;
}

static bn_view from_channel(const bn_job *job, bn_view x, size_t channel)
{
    const ptrdiff_t elements = (ptrdiff_t)channel * channel_step(job, x.strides);
    return (bn_view){(char *)x.data + elements * (ptrdiff_t)job->plan->itemsize, x.strides};
}

/* Where all values count */

/* Values that are not finite leave a mean or m2 that is not, and are looked for only then. */
static void count_nonfinite(const bn_job *job, const bn_box *box, block_sums block, bn_view x)
{
    for (size_t c = 0; c < box->extent.channels; c++) {
        const double mean = *sums_of_block(job, BN_MEAN, block.number, box->channel + c);
        const double m2 = *sums_of_block(job, BN_M2, block.number, box->channel + c);
        if (mean - mean != 0.0 || m2 - m2 != 0.0) {
            double count, centre;
            const bn_view channel = from_channel(job, x, c);
            const bn_tally tally = {.count = &count,
                                    .centre = &centre,
                                    .nonfinite = sums_of_block(job, BN_NONFINITE, block.number, box->channel + c)};
            KERNEL_OF(job, tally)((bn_extent){box->extent.outer, 1, box->extent.inner}, channel.data,
                                  channel.strides, NULL, (bn_strides){0, 0}, 0, tally);
        }
    }
}

static void summarize_all(const bn_job *job, const bn_box *box, block_sums block)
{
    const bn_view x = bn_x_to_sum(job, box);
    if (job->integers) {
        KERNEL_OF(job, integer_sums)(box->extent, x.data, x.strides, bn_input_of(job, box),
                                     sums_of_block(job, BN_MEAN, block.number, box->channel),
                                     sums_of_block(job, BN_MEAN_LOW, block.number, box->channel),
                                     sums_of_block(job, BN_M2, block.number, box->channel));
    } else {
        bn_add_moments(job, box, block, x);
    }
    if (job->statistic[BN_MINIMUM]) {
        const bn_tally tally = {.minimum = sums_of_block(job, BN_MINIMUM, block.number, box->channel),
                                .maximum = sums_of_block(job, BN_MAXIMUM, block.number, box->channel)};
        KERNEL_OF(job, extremes)(box->extent, x.data, x.strides, tally);
        if (!job->integers) {
            count_nonfinite(job, box, block, x);
        }
    }
}

/* A few of the planes of an image at a time, which the sums leave in the cache for the extremes. */
void bn_summary_of_box(const bn_job *job, const bn_box *box, block_sums block)
{
    const bn_extent extent = box->extent;
    const size_t run = extent.inner * job->plan->itemsize;
    const int by_planes = job->statistic[BN_MINIMUM] && job->plan->layout == BN_contiguous && extent.outer == 1;
    const size_t channels = by_planes ? MAX(BYTES_AT_ONCE / run, (size_t)1) : extent.channels;
    for (size_t c = 0; c < extent.channels; c += channels) {
        bn_box part = *box;
        part.channel += c;
        part.extent.channels = MIN(channels, extent.channels - c);
        summarize_all(job, &part, block);
    }
}

/* Where some values do not count: in a copy these become the mean of the others, and are removed from the moments
   afterwards. In the place of another number than the mean they would drown the squares of the others. */

/* A copy of some channels, which may be filled. */
static bn_view copied(const bn_job *job, bn_extent extent, bn_view x, char *scratch)
{
    const size_t length = (job->plan->layout == BN_contiguous ? extent.inner : extent.channels) * job->plan->itemsize;
    const size_t runs = job->plan->layout == BN_contiguous ? extent.channels : 1;
    const bn_box box = {.extent = extent};
    char *to = scratch;
    for (size_t o = 0; o < extent.outer; o++) {
        for (size_t c = 0; c < runs; c++, to += length) {
            const ptrdiff_t from = (ptrdiff_t)o * x.strides.outer + (ptrdiff_t)c * x.strides.channel;
            memcpy(to, (const char *)x.data + from * (ptrdiff_t)job->plan->itemsize, length);
        }
    }
    return bn_dense_view(&box, scratch);
}

static double as_stored(const bn_job *job, double value)
{
    return job->plan->dtype == BN_f32 ? (double)(float)value : value;
}

/* Removes from the moments the values that do not count, all of which are the centre. */
static void remove_filled(const bn_job *job, size_t channels, double size, box_summary *sums)
{
    for (size_t c = 0; c < channels; c++) {
        const double filled = size - sums->count[c];
        const double distance = (as_stored(job, sums->centre[c]) - sums->mean[c]) - sums->mean_low[c];
        if (filled > 0.0 && sums->count[c] > 0.0 && distance - distance == 0.0) {
            const double ratio = filled / sums->count[c], mean = sums->mean[c];
            const double moved = sums->mean_low[c] - distance * ratio;
            const double m2 = sums->m2[c] - distance * distance * ratio * size;
            sums->mean[c] = mean + moved;
            sums->mean_low[c] = (mean - sums->mean[c]) + moved;
            sums->m2[c] = m2 < 0.0 ? 0.0 : m2;
        }
    }
}

static void add_to_block(const bn_job *job, size_t block, size_t first, size_t channels, const box_summary *sums)
{
    if (job->integers) {
        job->kernels->merge_integer_sums(channels, sums_of_block(job, BN_MEAN, block, first),
                                         sums_of_block(job, BN_MEAN_LOW, block, first),
                                         sums_of_block(job, BN_M2, block, first), sums->mean, sums->mean_low,
                                         sums->m2);
        job->kernels->merge_sums(channels, sums_of_block(job, BN_COUNT, block, first), sums->count);
    } else {
        job->kernels->merge_counted_moments(channels, sums_of_block(job, BN_COUNT, block, first),
                                            sums_of_block(job, BN_MEAN, block, first),
                                            sums_of_block(job, BN_MEAN_LOW, block, first),
                                            sums_of_block(job, BN_M2, block, first), sums->count, sums->mean,
                                            sums->mean_low, sums->m2);
    }
    for (size_t c = 0; job->statistic[BN_MINIMUM] && c < channels; c++) {
        double *minimum = sums_of_block(job, BN_MINIMUM, block, first + c);
        double *maximum = sums_of_block(job, BN_MAXIMUM, block, first + c);
        *sums_of_block(job, BN_NONFINITE, block, first + c) += sums->nonfinite[c];
        if (sums->count[c] > 0.0) {
            *minimum = MIN(*minimum, sums->minimum[c]);
            *maximum = MAX(*maximum, sums->maximum[c]);
        }
    }
}

/* Of a box of few channels. `mask` is NULL where it excludes no value. */
static void summarize(const bn_job *job, const bn_box *box, block_sums block, bn_view x, const unsigned char *mask,
                      bn_strides mask_strides)
{
    const bn_extent extent = box->extent;
    const size_t size = extent.outer * extent.inner;
    const bn_input input = {job->plan->interleave, BN_IN_LEVEL2, 0};
    box_summary sums;
    const bn_tally tally = {sums.count, sums.centre, sums.minimum, sums.maximum, sums.nonfinite};
    int all_count = 1, any_nonfinite = 0;
    for (size_t c = 0; c < extent.channels; c++) {
        sums.count[c] = (double)size;
        sums.mean[c] = sums.mean_low[c] = sums.m2[c] = sums.nonfinite[c] = 0.0;
        sums.minimum[c] = INFINITY;
        sums.maximum[c] = -INFINITY;
    }
    if (mask || job->finite_only) {
        KERNEL_OF(job, tally)(extent, x.data, x.strides, mask, mask_strides, job->finite_only, tally);
    }
    for (size_t c = 0; c < extent.channels; c++) {
        all_count &= sums.count[c] == (double)size;
    }
    if (!all_count) {
        x = copied(job, extent, x, buffer_of(job, BN_Y));
        KERNEL_OF(job, fill_in)(extent, x.data, x.strides, mask, mask_strides, job->finite_only, sums.centre);
    }
    if (job->statistic[BN_MINIMUM]) {
        KERNEL_OF(job, extremes)(extent, x.data, x.strides, tally);
    }
    if (job->integers) {
        if (!all_count) {
            memset(sums.centre, 0, sizeof sums.centre);
            KERNEL_OF(job, fill_in)(extent, x.data, x.strides, mask, mask_strides, 0, sums.centre);
        }
        KERNEL_OF(job, integer_sums)(extent, x.data, x.strides, input, sums.mean, sums.mean_low, sums.m2);
    } else {
        KERNEL_OF(job, moments)(extent, x.data, x.strides, input, 0, sums.mean, sums.mean_low, sums.m2);
        remove_filled(job, extent.channels, (double)size, &sums);
    }
    for (size_t c = 0; c < extent.channels; c++) {
        any_nonfinite |= sums.mean[c] - sums.mean[c] != 0.0 || sums.m2[c] - sums.m2[c] != 0.0;
    }
    if (any_nonfinite && job->statistic[BN_MINIMUM] && !mask && !job->finite_only) {
        KERNEL_OF(job, tally)(extent, x.data, x.strides, NULL, mask_strides, 0, tally);
    }
    add_to_block(job, block.number, box->channel, extent.channels, &sums);
}

void bn_counted_summary_of_box(const bn_job *job, const bn_box *box, block_sums block)
{
    const bn_view x = bn_x_to_sum(job, box);
    const bn_strides dense = bn_dense_view(box, NULL).strides;
    const unsigned char *mask = NULL;
    if (job->operand[BN_MASK]) {
        const size_t values = box->extent.outer * box->extent.channels * box->extent.inner;
        mask = input_view(job, BN_MASK, box).data;
        mask = memchr(mask, 0, values) ? mask : NULL;
    }
    for (size_t c = 0; c < box->extent.channels; c += CHANNELS_AT_ONCE) {
        bn_box part = *box;
        part.channel += c;
        part.extent.channels = MIN(CHANNELS_AT_ONCE, box->extent.channels - c);
        summarize(job, &part, block, from_channel(job, x, c),
                  mask ? mask + (ptrdiff_t)c * channel_step(job, dense) : NULL, dense);
    }
}

/* Blocks */

void bn_merge_summaries(const bn_job *job, block_sums block, range channels)
{
    const size_t c = channels.first;
    double *count = job->statistic[BN_COUNT];
    double *mean = job->statistic[BN_MEAN] + c, *mean_low = job->statistic[BN_MEAN_LOW] + c;
    double *m2 = job->statistic[BN_M2] + c;
    const double *block_mean = sums_of_block(job, BN_MEAN, block.number, c);
    const double *block_mean_low = sums_of_block(job, BN_MEAN_LOW, block.number, c);
    const double *block_m2 = sums_of_block(job, BN_M2, block.number, c);
    if (job->integers) {
        job->kernels->merge_integer_sums(channels.count, mean, mean_low, m2, block_mean, block_mean_low, block_m2);
        if (count) {
            job->kernels->merge_sums(channels.count, count + c, sums_of_block(job, BN_COUNT, block.number, c));
        }
    } else if (count) {
        job->kernels->merge_counted_moments(channels.count, count + c, mean, mean_low, m2,
                                            sums_of_block(job, BN_COUNT, block.number, c), block_mean,
                                            block_mean_low, block_m2);
    } else {
        bn_merge_moments(job, block, channels);
    }
    for (size_t j = c; job->statistic[BN_MINIMUM] && j < c + channels.count; j++) {
        job->statistic[BN_MINIMUM][j] =
            MIN(job->statistic[BN_MINIMUM][j], *sums_of_block(job, BN_MINIMUM, block.number, j));
        job->statistic[BN_MAXIMUM][j] =
            MAX(job->statistic[BN_MAXIMUM][j], *sums_of_block(job, BN_MAXIMUM, block.number, j));
        job->statistic[BN_NONFINITE][j] += *sums_of_block(job, BN_NONFINITE, block.number, j);
    }
}
