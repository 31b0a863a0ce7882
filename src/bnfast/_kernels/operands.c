/* Odd strides, misaligned elements and other storage types, chunk by chunk: memcpy moves single elements, so
   nothing is assumed of addresses. */
#include "operands.h"

#include <string.h>

#include "portability.h"

/* A position on some axes, the last the fastest, and its offset in bytes. */
typedef struct {
    size_t axes;
    const size_t *sizes;
    const ptrdiff_t *strides;
    size_t index[BN_MAX_AXES];
    ptrdiff_t offset;
} position;

static void go_to(position *at, size_t axes, const size_t *sizes, const ptrdiff_t *strides,
                  size_t index)
{
    at->axes = axes;
    at->sizes = sizes;
    at->strides = strides;
    at->offset = 0;
    for (size_t axis = axes; axis-- > 0;) {
        at->index[axis] = index % sizes[axis];
        at->offset += (ptrdiff_t)at->index[axis] * strides[axis];
        index /= sizes[axis];
    }
}

/* Of BN_MAX_AXES no more than there are: to copy all took longer than to convert a short run. */
static void go_back(position *at, const position *to)
{
    at->axes = to->axes;
    at->sizes = to->sizes;
    at->strides = to->strides;
    at->offset = to->offset;
    for (size_t axis = 0; axis < to->axes; axis++) {
        at->index[axis] = to->index[axis];
    }
}

static void go_on(position *at)
{
    for (size_t axis = at->axes; axis-- > 0;) {
        at->offset += at->strides[axis];
        if (++at->index[axis] < at->sizes[axis]) {
            return;
        }
        at->offset -= (ptrdiff_t)at->sizes[axis] * at->strides[axis];
        at->index[axis] = 0;
    }
}

/* Constant arguments, so that each of the steps below gets a loop of its own. */
BN_INLINE void copy_elements(const ptrdiff_t itemsize, char *to, const ptrdiff_t to_step,
                             const char *from, const ptrdiff_t from_step, size_t count)
{
    for (ptrdiff_t i = 0; i < (ptrdiff_t)count; i++) {
        memcpy(to + i * to_step * itemsize, from + i * from_step * itemsize, (size_t)itemsize);
    }
}

BN_INLINE void copy_run(const ptrdiff_t itemsize, char *to, ptrdiff_t to_step, const char *from,
                        ptrdiff_t from_step, size_t count)
{
    if (to_step == itemsize && from_step == itemsize) {
        memcpy(to, from, count * (size_t)itemsize);
    } else if (to_step == itemsize && from_step == 2 * itemsize) {
        copy_elements(itemsize, to, 1, from, 2, count);
    } else if (to_step == itemsize && from_step == -itemsize) {
        copy_elements(itemsize, to, 1, from, -1, count);
    } else if (to_step == -itemsize && from_step == itemsize) {
        copy_elements(itemsize, to, -1, from, 1, count);
    } else {
        for (size_t i = 0; i < count; i++, to += to_step, from += from_step) {
            memcpy(to, from, (size_t)itemsize);
        }
    }
}

/* One strided run of the operand, and as many neighbours of scratch. */
typedef struct {
    const bn_kernels *kernels; /* which convert what is stored in another type */
    bn_stored stored;
    size_t itemsize; /* of scratch */
    int to_scratch;
    bn_stores stores; /* of what is converted */
} copying;

static char *copy_to_or_from(const copying *how, char *run, ptrdiff_t step, char *scratch, size_t count)
{
    const ptrdiff_t dense = (ptrdiff_t)how->itemsize;
    char *to = how->to_scratch ? scratch : run;
    const char *from = how->to_scratch ? run : scratch;
    const ptrdiff_t to_step = how->to_scratch ? dense : step, from_step = how->to_scratch ? step : dense;
    if (how->stored != BN_as_computed) {
        if (how->to_scratch) {
            how->kernels->widen[how->stored](count, run, step, scratch);
        } else {
            how->kernels->narrow[how->stored](count, scratch, run, step, how->stores);
        }
    } else if (how->itemsize == 1) {
        copy_run(1, to, to_step, from, from_step, count);
    } else if (how->itemsize == 2) {
        copy_run(2, to, to_step, from, from_step, count);
    } else if (how->itemsize == 4) {
        copy_run(4, to, to_step, from, from_step, count);
    } else {
        copy_run(8, to, to_step, from, from_step, count);
    }
    return scratch + count * how->itemsize;
}

/* From the first channel to another one, in bytes. */
static ptrdiff_t channel_offset(const bn_plan *plan, const bn_operand *layout, size_t channel)
{
    ptrdiff_t offset = 0;
    for (size_t axis = plan->channel_axes; axis-- > 1;) {
        const size_t size = plan->channel_axis_sizes[axis];
        offset += (ptrdiff_t)(channel % size) * layout->channel_axis_strides[axis];
        channel /= size;
    }
    return offset + (ptrdiff_t)channel * layout->channel_axis_strides[0];
}

/* Whether the elements of a box lie in memory as they do in scratch, each as far from the one before. */
static int is_one_run(const bn_plan *plan, const bn_operand *layout, const bn_box *box)
{
    const bn_extent extent = box->extent;
    const ptrdiff_t run = (ptrdiff_t)extent.inner;
    ptrdiff_t step = layout->channel_stride, channel = step;
    if (plan->inner > 1) {
        step = layout->inner_axis_strides[0];
        channel = run * step;
        if (plan->inner_axes > 1 || extent.inner < plan->inner ||
            (extent.channels > 1 && (plan->channel_axes > 1 || layout->channel_stride != channel))) {
            return 0;
        }
    } else if (extent.channels < plan->channels || plan->channel_axes > 1) {
        return 0;
    }
    return extent.outer == 1 ||
           (plan->outer_axes == 1 && layout->outer_axis_strides[0] == (ptrdiff_t)extent.channels * channel);
}

/* Some channels of a box, which have one stride; returns the scratch that follows theirs. */
static char *copy_channels(const copying *how, const bn_plan *plan, const bn_operand *layout, char *channel,
                           size_t channels, const bn_box *box, const position *first_row, char *scratch)
{
    if (plan->inner == 1) {
        return copy_to_or_from(how, channel, layout->channel_stride, scratch, channels);
    }
    const size_t rows = plan->inner_axes - 1; /* all inner axes but the run */
    const size_t length = plan->inner_axis_sizes[rows];
    const ptrdiff_t step = layout->inner_axis_strides[rows];
    for (size_t c = 0; c < channels; c++, channel += layout->channel_stride) {
        position row;
        go_back(&row, first_row);
        size_t column = box->inner % length;
        for (size_t remainder = box->extent.inner; remainder > 0;) {
            const size_t count = remainder < length - column ? remainder : length - column;
            scratch = copy_to_or_from(how, channel + row.offset + (ptrdiff_t)column * step, step, scratch, count);
            remainder -= count;
            column = 0;
            go_on(&row);
        }
    }
    return scratch;
}

/* Visits the box in the order of scratch, (outer, channel, inner), one strided run at a time. */
static void copy_box(const bn_kernels *kernels, const bn_plan *plan, bn_role role, char *data,
                     const bn_box *box, char *scratch, int to_scratch, bn_stores stores)
{
    const bn_operand *layout = &plan->operand[role];
    const copying how = {kernels, layout->stored, role == BN_MASK ? 1 : plan->element_bytes, to_scratch, stores};
    position outer;
    go_to(&outer, plan->outer_axes, plan->outer_axis_sizes, layout->outer_axis_strides,
          box->outer);
    if (is_one_run(plan, layout, box)) {
        const ptrdiff_t step = plan->inner == 1 ? layout->channel_stride : layout->inner_axis_strides[0];
        copy_to_or_from(&how, data + channel_offset(plan, layout, box->channel) + outer.offset, step, scratch,
                        box->extent.outer * box->extent.channels * box->extent.inner);
        return;
    }
    const size_t rows = plan->inner > 1 ? plan->inner_axes - 1 : 0;
    position first_row;
    go_to(&first_row, rows, plan->inner_axis_sizes, layout->inner_axis_strides,
          plan->inner > 1 ? box->inner / plan->inner_axis_sizes[rows] : 0);
    const size_t run = bn_channel_run(plan), end = box->channel + box->extent.channels;
    for (size_t o = 0; o < box->extent.outer; o++, go_on(&outer)) {
        for (size_t c = box->channel, count; c < end; c += count) {
            const size_t rest = run < plan->channels ? run - c % run : end - c;
            count = rest < end - c ? rest : end - c;
            scratch = copy_channels(&how, plan, layout, data + channel_offset(plan, layout, c) + outer.offset, count,
                                    box, &first_row, scratch);
        }
    }
}

bn_view bn_dense_view(const bn_box *box, char *scratch)
{
    const size_t run = box->extent.inner;
    return (bn_view){scratch, {(ptrdiff_t)(box->extent.channels * run), (ptrdiff_t)run}};
}

bn_view bn_view_to_write(const bn_plan *plan, bn_role role, char *data,
                         const bn_box *box, char *scratch)
{
    const bn_operand *layout = &plan->operand[role];
    if (layout->staged) {
        return bn_dense_view(box, scratch);
    }
    const ptrdiff_t offset = (ptrdiff_t)box->outer * layout->outer_stride + (ptrdiff_t)box->inner;
    return (bn_view){data + channel_offset(plan, layout, box->channel) +
                         (ptrdiff_t)plan->element_bytes * offset,
                     {layout->outer_stride, layout->channel_stride}};
}

bn_view bn_view_to_read(const bn_kernels *kernels, const bn_plan *plan, bn_role role, char *data,
                        const bn_box *box, char *scratch)
{
    if (plan->operand[role].staged) {
        copy_box(kernels, plan, role, data, box, scratch, 1, BN_stored);
    }
    return bn_view_to_write(plan, role, data, box, scratch);
}

void bn_written(const bn_kernels *kernels, const bn_plan *plan, bn_role role, char *data,
                const bn_box *box, char *scratch, bn_stores stores)
{
    if (plan->operand[role].staged) {
        copy_box(kernels, plan, role, data, box, scratch, 0, stores);
    }
}
