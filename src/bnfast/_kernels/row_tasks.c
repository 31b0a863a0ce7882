/* Tasks over rows, which are the channels of repeats, whose elements have parameters. */
#include "tasks.h"

#include "kernel_calls.h"

/* Rows go through scratch this many at a time, and a slab is a multiple of this many rows, so that slabs change
   no sum. */
size_t bn_row_unit(const bn_plan *plan)
{
    return plan->layout == BN_contiguous ? BN_ADDED_ROWS : BN_ADDED_NEIGHBOURS_BYTES / plan->itemsize;
}

/* The rows of a block: a part of the rows of one repeat, or all rows of several repeats. */
static range rows_of_block(const bn_plan *plan, size_t number)
{
    const size_t rows_per_block = plan->rows_of_block, parts = bn_row_blocks_of_repeat(plan);
    const size_t covered = parts > 1 ? plan->channels : rows_per_block; /* rows of `parts` blocks */
    const size_t start = number / parts * covered, first = start + number % parts * rows_per_block;
    const size_t total_rows = plan->repeats * plan->channels;
    return (range){first, MIN(MIN(first + rows_per_block, start + covered), total_rows) - first};
}

/* Adds the sums over some rows of dy * xhat and dy, column by column. */
static void add_columns(const bn_job *job, range rows, double *sums)
{
    const bn_plan *plan = job->plan;
    const size_t columns = plan->outer * plan->inner;
    const size_t *const walked =
        plan->layout == BN_contiguous ? &plan->inner : &plan->outer;
    const int in_scratch = plan->any_staged || (job->method.has_upstream && job->method.kept == BN_NONE);
    const size_t max_rows = in_scratch ? bn_row_unit(plan) : rows.count;
    const size_t max_columns =
        in_scratch ? BN_SCRATCH_BYTES / bn_row_unit(plan) / plan->itemsize : columns;
    for (size_t row = 0; row < rows.count; row += max_rows) {
        for (size_t column = 0, width; column < columns; column += width) {
            width = MIN(max_columns, *walked - column % *walked);
            const bn_box box = {
                .outer = column / plan->inner,
                .channel = rows.first + row,
                .inner = column % plan->inner,
                .extent = {walked == &plan->outer ? width : 1,
                           MIN(max_rows, rows.count - row),
                           walked == &plan->inner ? width : 1},
            };
            const bn_view inputs[] = {
                bn_upstream_to_read(job, &box, BN_NONE),
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
    const bn_plan *plan = job->plan;
    return is_weighted(job) && plan->layout == BN_contiguous && plan->outer == 1 &&
           !plan->any_staged && bn_channel_run(plan) == plan->channels &&
           (!job->method.has_upstream || job->method.kept == BN_DRESIDUAL) && job->stores == BN_stored &&
           !is_in_place(job, BN_DX);
}

static void add_columns_and_write(const bn_job *job, range rows, double *sums)
{
    const bn_plan *plan = job->plan;
    const bn_box box = {.channel = rows.first, .extent = {1, rows.count, plan->inner}};
    const bn_view inputs[] = {
        bn_upstream_to_read(job, &box, BN_NONE),
        input_view(job, BN_X, &box),
        input_view(job, BN_ELEMENT_WEIGHT, &box),
    };
    KERNEL_OF(job, columns_and_gradient)(
        box.extent, inputs, coefficients_from(job, box.channel),
        bn_view_to_write(plan, BN_DX, job->operand[BN_DX], &box, NULL), sums, sums + plan->inner);
}

/* Some rows in one go, while they are in the cache. The job has the column sums of the task's own block. */
static void row_gradient(const bn_job *job, range rows)
{
    const size_t blocks = job->plan->blocks;
    bn_sum_gradient_of_all_blocks(job, rows);
    if (may_write_with_columns(job)) {
        add_columns_and_write(job, rows, job->column_sums);
        return;
    }
    if (!job->method.has_columns) {
        add_columns(job, rows, job->column_sums);
    }
    for (size_t block = blocks; block-- > 0;) {
        bn_write_block(job, block, rows);
    }
}

void bn_row_gradient_task(const bn_job *job, size_t number)
{
    const bn_plan *plan = job->plan;
    const size_t columns = plan->outer * plan->inner;
    const range rows = rows_of_block(plan, number);
    const size_t end = rows.first + rows.count;
    double *sums = job->column_sums + number * 2 * columns;
    clear(sums, (range){0, 2 * columns});
    for (size_t row = rows.first, count; row < end; row += count) {
        const size_t repeat = row / plan->channels, first = row % plan->channels;
        bn_job repeat_job = bn_job_of_repeat(job, repeat);
        repeat_job.column_sums = sums;
        count = MIN(MIN(job->slab, end - row), plan->channels - first);
        row_gradient(&repeat_job, (range){first, count});
    }
}

void bn_merge_columns_task(const bn_job *job, size_t number)
{
    const bn_plan *plan = job->plan;
    const size_t columns = 2 * plan->outer * plan->inner;
    const size_t first = number * BN_CHANNELS_PER_TASK;
    const size_t blocks = bn_row_blocks(plan);
    for (size_t block = 1; block < blocks; block++) {
        job->kernels->merge_sums(MIN(BN_CHANNELS_PER_TASK, columns - first),
                                 job->column_sums + first,
                                 job->column_sums + block * columns + first);
    }
}
