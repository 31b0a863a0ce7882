/* How a job is done by so many threads: its groups of channels, its stores, what is fetched ahead, its phases. */
#include "tasks.h"

#include "coefficients.h"

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

static bn_phase channel_phase(const bn_job *job, bn_task *task)
{
    const bn_geometry *geometry = job->geometry;
    const size_t all = geometry->repeats * geometry->channels * geometry->blocks;
    return (bn_phase){task, divide_up(geometry->channels, bn_channels_per_task(job)), 0,
                      all <= BN_CHANNELS_PER_TASK};
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
    bn_choose_method(job);
    group_channels(job, threads, 1);
    phases[0] = block_phase(job, bn_moments_task);
    phases[1] = channel_phase(job, bn_finish_moments_task);
    return 2;
}

size_t bn_normalize_phases(bn_job *job, size_t threads, bn_phase *phases)
{
    bn_choose_method(job);
    choose_stores(job, threads, BN_Y, 2);
    if (group_channels(job, threads, 1)) {
        fetch_ahead(job, 1);
        phases[0] = fused_phase(job, bn_fused_normalize_task);
        return 1;
    }
    phases[0] = block_phase(job, bn_moments_task);
    phases[1] = channel_phase(job, bn_finish_normalize_task);
    phases[2] = piece_phase(job, threads, bn_output_task);
    return 3;
}

size_t bn_scale_shift_phases(bn_job *job, size_t threads, bn_phase *phases)
{
    size_t count = 0;
    bn_choose_method(job);
    choose_stores(job, threads, BN_Y, 2);
    if (!job->prepared) {
        phases[count++] = channel_phase(job, bn_prepare_scale_shift_task);
    }
    phases[count++] = piece_phase(job, threads, bn_output_task);
    return count;
}

size_t bn_gradient_phases(bn_job *job, size_t threads, bn_phase *phases)
{
    const bn_geometry *geometry = job->geometry;
    size_t count = 0;
    bn_choose_method(job);
    choose_stores(job, threads, BN_DX, 3);
    if (group_channels(job, threads, 2)) {
        fetch_ahead(job, 2);
        phases[0] = fused_phase(job, bn_fused_gradient_task);
        return 1;
    }
    if (job->statistic[BN_MEAN_LOW] && bn_any_noticed(job, (range){0, geometry->repeats * geometry->channels})) {
        phases[count++] = block_phase(job, bn_mean_low_task);
    } else {
        job->statistic[BN_MEAN_LOW] = NULL;
    }
    phases[count++] = channel_phase(job, bn_prepare_gradient_task);
    phases[count++] = block_phase(job, bn_gradient_sums_task);
    phases[count++] = channel_phase(job, bn_finish_gradient_task);
    phases[count++] = piece_phase(job, threads, bn_output_task);
    return count;
}

size_t bn_row_gradient_phases(bn_job *job, size_t threads, bn_phase *phases)
{
    const bn_geometry *geometry = job->geometry;
    const size_t columns = geometry->outer * geometry->inner;
    const size_t together = bn_rows_together(geometry);
    const size_t slab = bn_slab_bytes(job->caches) / (2 * columns * geometry->itemsize);
    bn_choose_method(job);
    if (!job->column_sums) {
        return bn_gradient_phases(job, threads, phases);
    }
    choose_stores(job, threads, BN_DX, 3);
    job->place = place_of(job, 2, threads);
    job->group = MAX((size_t)1, slab / together) * together;
    phases[0] = (bn_phase){bn_row_gradient_task, bn_row_blocks(geometry), 1, 0};
    phases[1] = (bn_phase){bn_merge_columns_task, divide_up(2 * columns, BN_CHANNELS_PER_TASK), 1, 0};
    return 2;
}

void bn_parameter_gradients(const bn_job *job, bn_dtype dtype, void *dweight, void *dbias)
{
    job->kernels->parameter_gradients[dtype](job->geometry->channels, job->geometry->repeats,
                                             job->statistic[BN_SUM_DY], job->statistic[BN_SUM_DY_XHAT], dweight, dbias);
}
