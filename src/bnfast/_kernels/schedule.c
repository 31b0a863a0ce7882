/* How a job is done by so many threads: its slabs, its stores, its prefetches, its stages. */
#include "tasks.h"

#include "coefficients.h"

/* All tensors of a call, its output among them. */
static size_t bytes_of_call(const bn_job *job, size_t tensors)
{
    const bn_plan *plan = job->plan;
    return tensors * plan->repeats * plan->outer * plan->channels * plan->inner *
           plan->stored_itemsize;
}

static void choose_stores(bn_job *job, size_t threads, bn_role output, size_t tensors)
{
    /* In place, a line has been read already, or written; what is copied as it is goes element by element. */
    const bn_operand *to = &job->plan->operand[output];
    const int streamed = bytes_of_call(job, tensors) >= bn_streamed_from(job->caches, threads, tensors) &&
                         !is_in_place(job, output) && job->method.kept != output &&
                         !(to->staged && to->stored == BN_as_computed);
    job->stores = streamed ? BN_streamed : BN_stored;
}

/* The level of memory that holds `tensors` tensors of a call after the previous pass over these tensors. */
static bn_place place_of(const bn_job *job, size_t tensors, size_t threads)
{
    const bn_plan *plan = job->plan;
    const size_t row = plan->interleave * plan->channels * plan->stored_itemsize;
    const int is_narrow = plan->layout == BN_channels_last && row <= BN_NARROW_ROW_BYTES;
    const size_t bytes = bytes_of_call(job, tensors);
    return bytes <= bn_level2_bytes(job->caches, threads) ? BN_IN_LEVEL2
           : bytes <= bn_last_level_bytes(job->caches, is_narrow && tensors == 1) ? BN_IN_LAST_LEVEL
                                                                                  : BN_IN_MEMORY;
}

/* Whether the sums' inputs, so many tensors, are still in the last level of cache when the output is made. */
static int stays_near(const bn_job *job, size_t tensors)
{
    return bytes_of_call(job, tensors + 1) < bn_whole_bytes(job->caches);
}

/* Cuts the channels into slabs for so many threads, which read so many tensors; whether its tasks had
   better be fused. Sums alone are read once: no slab of theirs must stay in a cache, and images whose planes are no
   longer than a chunk are walked as they lie (moments of 32x64x56x56 took 0.45 of the time). */
static int cut_into_slabs(bn_job *job, size_t threads, size_t tensors, int sums_alone)
{
    const bn_plan *plan = job->plan;
    const size_t channels = plan->channels;
    const size_t wanted = threads > 1 ? divide_up(2 * threads, plan->repeats) : 1;
    const int repeats_suffice = threads <= plan->repeats; /* every thread has a repeat */
    int fused;
    if (plan->layout == BN_contiguous) {
        const size_t run = plan->inner * plan->stored_itemsize;
        const int are_rows = plan->outer == 1, near = stays_near(job, tensors);
        const int nearest = bytes_of_call(job, tensors + 1) <= bn_level2_bytes(job->caches, threads);
        const size_t neighbouring_bytes = !are_rows ? BN_NEIGHBOURING_BYTES
                                          : near    ? bn_near_rows_bytes(job->caches)
                                                    : BN_ROWS_BYTES;
        const size_t max_channels = MAX((size_t)1, neighbouring_bytes / run);
        const size_t fair_share = MAX((size_t)1, channels / wanted);
        const size_t channel = values_per_channel(plan) * plan->stored_itemsize * tensors;
        const size_t slab = MAX(bn_slab_bytes(job->caches) / channel, BN_FEWEST_BYTES / run);
        const int whole = (sums_alone && plan->chunks_per_run == 1) || (are_rows ? nearest : near);
        job->slab = whole ? fair_share : MIN(MIN(max_channels, fair_share), MAX((size_t)1, slab));
        fused = plan->blocks == 1 || repeats_suffice || channels / job->slab >= wanted;
    } else {
        const size_t fair_share = divide_up(channels, divide_up(wanted, plan->blocks));
        job->slab = divide_up(fair_share, BN_CHANNEL_UNIT) * BN_CHANNEL_UNIT;
        fused = plan->blocks == 1 || repeats_suffice;
        if (fused && channels * plan->stored_itemsize > BN_LONG_ROW_BYTES) {
            const size_t lines = plan->outer * plan->stored_itemsize * tensors * BN_CHANNEL_UNIT;
            const size_t slab = bn_slab_bytes(job->caches) / lines * BN_CHANNEL_UNIT;
            job->slab = MIN(job->slab, MAX(slab, BN_NEIGHBOURING_BYTES / plan->stored_itemsize));
        }
        job->slab = MIN(job->slab, channels);
    }
    job->slab = MIN(divide_up(job->slab, job->per_group) * job->per_group, channels);
    job->slabs = divide_up(channels, job->slab);
    job->place = place_of(job, tensors, threads);
    return fused;
}

/* Whether adding a run up takes longer than memory needs to bring the next one. */
static int sums_take_long(const bn_job *job, size_t tensors)
{
    const size_t run = job->plan->inner * job->plan->stored_itemsize;
    return tensors == 1 ? job->centred : run <= BN_SLOW_RUN_BYTES;
}

/* While a slab is normalized, the input of the next slab is prefetched: as much as the second level of cache
   has room for, or all of a slab that is too large for that level. (Outputs are written from their end, so that
   what is prefetched then is what is summed next.) */
static void prefetch_next_slab(bn_job *job, size_t tensors)
{
    const bn_plan *plan = job->plan;
    const size_t bytes = job->slab * plan->stored_itemsize * tensors;
    const int waits_near = plan->outer == 1 && stays_near(job, tensors);
    if (plan->layout == BN_contiguous && !plan->any_staged && !waits_near) {
        job->prefetch_distance = (ptrdiff_t)job->slab * plan->operand[BN_X].channel_stride;
        job->prefetch_in_sums = plan->outer == 1 && (!job->method.has_upstream || job->method.sums_have_gates) &&
                                sums_take_long(job, tensors);
        job->prefetch_count = values_per_channel(plan);
        if (bytes * job->prefetch_count <= bn_lost_slab_bytes(job->caches)) {
            job->prefetch_count = bn_slab_bytes(job->caches) / bytes;
        }
        if (job->prefetch_count >= values_per_channel(plan)) {
            job->place = BN_IN_LEVEL2;
        }
    }
}

static bn_stage channel_stage(const bn_job *job, bn_task *task)
{
    const bn_plan *plan = job->plan;
    const size_t channel_blocks = plan->repeats * plan->channels * plan->blocks;
    return (bn_stage){task, divide_up(plan->channels, bn_channels_per_task(job)), 0,
                      channel_blocks <= BN_CHANNELS_PER_TASK};
}

static bn_stage block_stage(const bn_job *job, bn_task *task)
{
    return (bn_stage){task, job->slabs * job->plan->blocks, 0, 0};
}

/* Cuts an output into as many pieces as there are threads for it, in memory order as far as it goes. */
static bn_stage piece_stage(bn_job *job, size_t threads, bn_task *task)
{
    const bn_plan *plan = job->plan;
    const size_t units = divide_up(plan->channels, channel_unit(plan));
    const size_t wanted = divide_up(threads, plan->repeats);
    bn_extent pieces;
    pieces.outer = MIN(wanted, plan->outer);
    pieces.channels = MIN(divide_up(wanted, pieces.outer), units);
    pieces.inner = MIN(divide_up(wanted, pieces.outer * pieces.channels), plan->inner);
    job->pieces = pieces;
    return (bn_stage){task, pieces.outer * pieces.channels * pieces.inner, 0, 0};
}

static bn_stage fused_stage(const bn_job *job, bn_task *task)
{
    return (bn_stage){task, job->slabs, 0, 0};
}

size_t bn_moments_stages(bn_job *job, size_t threads, bn_stage *stages)
{
    cut_into_slabs(job, threads, 1, 1);
    stages[0] = block_stage(job, bn_moments_task);
    stages[1] = channel_stage(job, bn_finish_moments_task);
    return 2;
}

static size_t tensors_of_output(const bn_job *job) { return 2 + (job->operand[BN_RESIDUAL] != NULL); }

size_t bn_normalize_stages(bn_job *job, size_t threads, bn_stage *stages)
{
    choose_stores(job, threads, BN_Y, tensors_of_output(job));
    if (cut_into_slabs(job, threads, 1, 0)) {
        prefetch_next_slab(job, 1);
        stages[0] = fused_stage(job, bn_fused_normalize_task);
        return 1;
    }
    stages[0] = block_stage(job, bn_moments_task);
    stages[1] = channel_stage(job, bn_finish_normalize_task);
    stages[2] = piece_stage(job, threads, bn_output_task);
    return 3;
}

size_t bn_scale_shift_stages(bn_job *job, size_t threads, bn_stage *stages)
{
    size_t count = 0;
    choose_stores(job, threads, BN_Y, tensors_of_output(job));
    if (!job->prepared) {
        stages[count++] = channel_stage(job, bn_prepare_scale_shift_task);
    } else {
        bn_set_floors(job, (range){0, bn_coefficients_length(job->plan)}, BN_SHIFT); /* of the only repeat */
    }
    stages[count++] = piece_stage(job, threads, bn_output_task);
    return count;
}

size_t bn_gradient_stages(bn_job *job, size_t threads, bn_stage *stages)
{
    const bn_plan *plan = job->plan;
    const int makes_sums = !job->given_sum_dy, writes = job->operand[BN_DX] != NULL;
    const int reads_more = job->operand[BN_RESIDUAL] || job->operand[BN_Y], keeps = job->operand[BN_DRESIDUAL] != NULL;
    size_t count = 0;
    if (writes) {
        choose_stores(job, threads, BN_DX, (size_t)(3 + reads_more + keeps));
    }
    if (cut_into_slabs(job, threads, (size_t)(2 + keeps), !writes) && makes_sums && writes) {
        prefetch_next_slab(job, 2);
        stages[0] = fused_stage(job, bn_fused_gradient_task);
        return 1;
    }
    if (!job->mean_low_given) {
        if (job->statistic[BN_MEAN_LOW] && bn_any_noticed(job, (range){0, plan->repeats * plan->channels})) {
            stages[count++] = block_stage(job, bn_mean_low_task);
        } else {
            job->statistic[BN_MEAN_LOW] = NULL;
        }
    }
    stages[count++] = channel_stage(job, bn_prepare_gradient_task);
    if (makes_sums) {
        stages[count++] = block_stage(job, bn_gradient_sums_task);
    }
    stages[count++] = channel_stage(job, bn_finish_gradient_task);
    if (writes) {
        stages[count++] = piece_stage(job, threads, bn_output_task);
    }
    return count;
}

size_t bn_row_gradient_stages(bn_job *job, size_t threads, bn_stage *stages)
{
    const bn_plan *plan = job->plan;
    const size_t columns = plan->outer * plan->inner;
    const size_t unit = bn_row_unit(plan);
    const int reads_more = job->operand[BN_RESIDUAL] || job->operand[BN_Y], keeps = job->method.kept != BN_NONE;
    const size_t inputs = (size_t)(2 + reads_more + keeps);
    const size_t slab = bn_slab_bytes(job->caches) / (inputs * columns * plan->stored_itemsize);
    if (!job->column_sums) {
        return bn_gradient_stages(job, threads, stages);
    }
    choose_stores(job, threads, BN_DX, inputs + 1);
    job->place = place_of(job, 2, threads);
    job->slab = MAX((size_t)1, slab / unit) * unit;
    stages[0] = (bn_stage){bn_row_gradient_task, bn_row_blocks(plan), 1, 0};
    stages[1] = (bn_stage){bn_merge_columns_task, divide_up(2 * columns, BN_CHANNELS_PER_TASK), 1, 0};
    return 2;
}
