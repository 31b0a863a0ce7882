/* Odd strides and misaligned elements, chunk by chunk: memcpy moves single elements, so nothing is
   assumed of addresses. */
#include "packing.h"

#include <string.h>

static ptrdiff_t offset_along(size_t axes, const size_t *sizes, const ptrdiff_t *strides,
                              size_t index)
{
    ptrdiff_t offset = 0;
    for (size_t axis = axes; axis-- > 0 && index > 0;) {
        offset += (ptrdiff_t)(index % sizes[axis]) * strides[axis];
        index /= sizes[axis];
    }
    return offset;
}

static void copy_run(size_t itemsize, char *to, ptrdiff_t to_step, const char *from,
                     ptrdiff_t from_step, size_t count)
{
    if (itemsize == 4) {
        for (size_t i = 0; i < count; i++, to += to_step, from += from_step) {
            memcpy(to, from, 4);
        }
    } else {
        for (size_t i = 0; i < count; i++, to += to_step, from += from_step) {
            memcpy(to, from, 8);
        }
    }
}

/* Visits the box in the order of scratch, (outer, channel, inner), one strided run at a time. */
static void copy_box(const bn_geometry *geometry, size_t operand, char *data, const bn_box *box,
                     char *scratch, int to_scratch)
{
    const bn_operand *layout = &geometry->operand[operand];
    const size_t itemsize = geometry->itemsize, axes = geometry->inner_axes;
    const ptrdiff_t dense = (ptrdiff_t)itemsize;
    for (size_t o = 0; o < box->extent.outer; o++) {
        char *step = data + (ptrdiff_t)box->channel * layout->channel_stride +
                     offset_along(geometry->outer_axes, geometry->outer_axis_sizes,
                                  layout->outer_axis_strides, box->outer + o);
        if (geometry->inner == 1) {
            const size_t count = box->extent.channels;
            if (to_scratch) {
                copy_run(itemsize, scratch, dense, step, layout->channel_stride, count);
            } else {
                copy_run(itemsize, step, layout->channel_stride, scratch, dense, count);
            }
            scratch += count * itemsize;
            continue;
        }
        const size_t last_size = geometry->inner_axis_sizes[axes - 1];
        const ptrdiff_t last_stride = layout->inner_axis_strides[axes - 1];
        for (size_t c = 0; c < box->extent.channels; c++, step += layout->channel_stride) {
            size_t i = box->inner, left = box->extent.inner;
            while (left > 0) {
                const size_t in_run = last_size - i % last_size;
                const size_t count = left < in_run ? left : in_run;
                char *run = step + offset_along(axes, geometry->inner_axis_sizes,
                                                layout->inner_axis_strides, i);
                if (to_scratch) {
                    copy_run(itemsize, scratch, dense, run, last_stride, count);
                } else {
                    copy_run(itemsize, run, last_stride, scratch, dense, count);
                }
                scratch += count * itemsize;
                i += count;
                left -= count;
            }
        }
    }
}

bn_view bn_view_to_write(const bn_geometry *geometry, size_t operand, char *data,
                         const bn_box *box, char *scratch)
{
    const bn_operand *layout = &geometry->operand[operand];
    if (layout->packed) {
        const size_t run = box->extent.inner;
        return (bn_view){scratch, {(ptrdiff_t)(box->extent.channels * run), (ptrdiff_t)run}};
    }
    const ptrdiff_t offset = (ptrdiff_t)box->outer * layout->outer_stride +
                             (ptrdiff_t)box->channel * layout->channel_stride +
                             (ptrdiff_t)box->inner;
    return (bn_view){data + (ptrdiff_t)geometry->itemsize * offset,
                     {layout->outer_stride, layout->channel_stride}};
}

bn_view bn_view_to_read(const bn_geometry *geometry, size_t operand, char *data,
                        const bn_box *box, char *scratch)
{
    if (geometry->operand[operand].packed) {
        copy_box(geometry, operand, data, box, scratch, 1);
    }
    return bn_view_to_write(geometry, operand, data, box, scratch);
}

void bn_written(const bn_geometry *geometry, size_t operand, char *data, const bn_box *box,
                char *scratch)
{
    if (geometry->operand[operand].packed) {
        copy_box(geometry, operand, data, box, scratch, 0);
    }
}
