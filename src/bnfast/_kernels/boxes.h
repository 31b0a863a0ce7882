/* What a job is made of: chunks and blocks of its channels, and of each operand, coefficient and sum the part
   that belongs to a box. */
#ifndef BN_BOXES_H
#define BN_BOXES_H

#include <float.h>
#include <stdint.h>
#include <string.h>

#include "job.h"
#include "operands.h"
#include "thresholds.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

static inline size_t divide_up(size_t a, size_t b) { return (a + b - 1) / b; }

/* chunks and blocks */

static inline bn_box box_of_chunk(const bn_plan *plan, size_t chunk, range channels)
{
    bn_box box = {.channel = channels.first, .extent = {.channels = channels.count}};
    if (plan->chunks_per_run > 1) {
        box.outer = chunk / plan->chunks_per_run;
        box.inner = chunk % plan->chunks_per_run * plan->chunk_inner;
        box.extent.outer = 1;
        box.extent.inner = MIN(plan->chunk_inner, plan->inner - box.inner);
    } else {
        box.outer = chunk * plan->chunk_outer;
        box.extent.outer = MIN(plan->chunk_outer, plan->outer - box.outer);
        box.extent.inner = plan->inner;
    }
    return box;
}

static inline range chunks_of_block(const bn_plan *plan, size_t block)
{
    const size_t first = block * plan->chunks_per_block;
    return (range){first, MIN(plan->chunks_per_block, plan->chunks - first)};
}

static inline size_t values_per_channel(const bn_plan *plan)
{
    return plan->outer * plan->inner;
}

/* How many values of each channel count. */
static inline size_t counted_values(const bn_job *job)
{
    return job->mask.counts ? *job->mask.total : values_per_channel(job->plan);
}

static inline size_t counted_of_block(const bn_job *job, size_t block)
{
    const bn_plan *plan = job->plan;
    const range chunks = chunks_of_block(plan, block);
    size_t values = 0;
    for (size_t i = chunks.first; i < chunks.first + chunks.count; i++) {
        const bn_box box = box_of_chunk(plan, i, (range){0, 1});
        values += job->mask.counts ? job->mask.chunks[i].count : box.extent.outer * box.extent.inner;
    }
    return values;
}

static inline range channels_of_slab(const bn_job *job, size_t slab)
{
    const size_t first = slab * job->slab;
    return (range){first, MIN(job->slab, job->plan->channels - first)};
}

/* How many channels of a box go to a kernel at a time: all, unless scratch must hold them. */
static inline size_t channels_at_once(const bn_job *job, const bn_box *box, int in_scratch)
{
    const size_t bytes_per_channel = box->extent.outer * box->extent.inner * job->plan->itemsize;
    const size_t scratch_bytes = job->scratch ? job->scratch_bytes : BN_SCRATCH_BYTES;
    return in_scratch ? MAX((size_t)1, scratch_bytes / bytes_per_channel) : box->extent.channels;
}

static inline void *element_at(const bn_plan *plan, void *array, size_t index)
{
    return (char *)array + index * plan->itemsize;
}

static inline const double *parameter_from(const double *parameter, size_t channel)
{
    return parameter ? parameter + channel : NULL;
}

/* A box of all channels may be walked as one run where its rows are dense. */
static inline size_t period_of(const bn_plan *plan, size_t channels)
{
    return channels == plan->channels ? bn_period(plan) : 0;
}

static inline bn_coefficients coefficients_from(const bn_job *job, size_t channel)
{
    bn_coefficients from = job->coefficients;
    for (size_t i = 0; i < BN_COEFFICIENTS; i++) {
        if (from.array[i]) {
            from.array[i] = element_at(job->plan, from.array[i], channel);
        }
    }
    return from;
}

/* The sums of one block, for these channels on: block 0 has the job's own arrays, each later block a part of
   `partials`. */
static inline double *sums_of_block(const bn_job *job, bn_statistic sum, size_t block, size_t channel)
{
    static const size_t place[BN_STATISTICS] = {
        [BN_MEAN] = 0,   [BN_MEAN_LOW] = 1,    [BN_M2] = 2,
        [BN_SUM_DY] = 0, [BN_SUM_DY_XHAT] = 1, [BN_SUM_ACTIVATION] = 2,
        [BN_COUNT] = 3,  [BN_MINIMUM] = 4,     [BN_MAXIMUM] = 5,        [BN_NONFINITE] = 6,
    };
    const size_t channels = job->plan->channels;
    double *sums = block == 0 ? job->statistic[sum]
                              : job->partials + ((block - 1) * job->partial_sums + place[sum]) * channels;
    return sums + channel;
}

static inline void clear(double *array, range channels)
{
    for (size_t c = channels.first; c < channels.first + channels.count; c++) {
        array[c] = 0.0;
    }
}

/* Whether elements have a weight that a gradient is multiplied by. */
static inline int is_weighted(const bn_job *job) { return job->operand[BN_ELEMENT_WEIGHT] && !job->has_no_weight; }

/* The shift with which z is made again, which an activation was given. Where columns are summed, BN_FORWARD_SHIFT is
   taken: by the shift that makes xhat, without a remainder that nobody notices. */
static inline bn_coefficient shift_of_z(const bn_job *job)
{
    return job->column_sums ? BN_SHIFT : BN_FORWARD_SHIFT;
}

/* A kernel of the layout and type of a job. */
#define KERNEL_OF(job, name) \
    ((job)->kernels->name[(job)->plan->layout][(job)->plan->element_type])

/* The scratch of an operand. */
static inline char *buffer_of(const bn_job *job, bn_role role)
{
    return job->scratch ? job->scratch + role * job->scratch_bytes : NULL;
}

/* Whether an output takes the place of an input. */
static inline int is_in_place(const bn_job *job, bn_role output)
{
    const char *to = job->operand[output];
    return to == job->operand[BN_X] || to == job->operand[BN_DY] || to == job->operand[BN_RESIDUAL];
}

/* What a box of an operand has gathered, in scratch: see masked.c. */
bn_view bn_gathered_view(const bn_job *job, bn_role role, const bn_box *box);

/* A box of an operand to read. */
static inline bn_view input_view(const bn_job *job, bn_role role, const bn_box *box)
{
    if (box->gathered) {
        return bn_gathered_view(job, role, box);
    }
    return bn_view_to_read(job->kernels, job->plan, role, job->operand[role], box, buffer_of(job, role));
}

#define BN_GROUP_RUN_BYTES ((size_t)32768)

/* Whether the channels of a group are contiguous, of a single chunk each: the group is then summed as one run, and its
   moments stand where those of the first channels would until `spread_moments` copies them to every channel. A single
   chunk is a single block, so that the same task does both. Not of more than
   BN_GROUP_RUN_BYTES: the sums of float64, which have nothing wider to be emptied into, round once more for every
   kilobyte (32 planes of 784: 31 ulps). */
static inline int groups_are_runs(const bn_job *job)
{
    const bn_plan *plan = job->plan, *as_stored = plan->as_stored ? plan->as_stored : plan;
    const bn_operand *x = &as_stored->operand[BN_X]; /* converted, runs that follow each other do so in scratch */
    const size_t bytes = job->per_group * plan->inner * plan->itemsize;
    if (bytes > BN_GROUP_RUN_BYTES) {
        return 0;
    }
    return job->per_group > 1 && job->centred && !job->mask.counts && plan->layout == BN_contiguous &&
           plan->chunks == 1 && plan->outer == 1 && !x->staged && !job->scaled &&
           x->channel_stride == (ptrdiff_t)plan->inner;
}

/* The largest power of two up to a positive number, or the smallest one that is normal. */
static inline double power_of_two(double number)
{
    double power;
    uint64_t bits;
    memcpy(&bits, &number, sizeof bits);
    bits &= UINT64_C(0x7ff0000000000000);
    memcpy(&power, &bits, sizeof power);
    return MAX(power, DBL_MIN);
}

/* How many channels are cut off together. */
static inline size_t channel_unit(const bn_plan *plan)
{
    return plan->layout == BN_channels_last ? BN_CHANNEL_UNIT : 1;
}

#endif
