/* What a kernel is: the words it is described with, the signature of each operation, and the table
   that holds one instruction set's kernels.

   A kernel is static, single-threaded and allocation-free, assumes no alignment beyond the
   element's own, and knows neither threads nor tasks. Counts are elements; strides are elements. */
#ifndef BN_KERNELS_H
#define BN_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "kernel_list.h"

/* What arithmetic is done in. */
typedef enum { BN_f32, BN_f64, BN_DTYPES } bn_dtype;

/* What kernels read and write: that, or types whose arithmetic is float32's. */
typedef enum { BN_f16 = BN_DTYPES, BN_bf16, BN_ELEMENT_TYPES } bn_half;

/* How the elements of an operand are stored: in the type of the arithmetic, or in one of the list's. */
#define BN_MEMBER(stored, arithmetic) BN_stored_##stored,
typedef enum { BN_as_computed, BN_FOR_EACH_STORED_TYPE(BN_MEMBER) BN_STORED_TYPES } bn_stored;
#undef BN_MEMBER

/* contiguous: `inner` is a run of neighbours (NCHW, rows).
   channels_last: the channels are neighbours and `inner` is 1 (NHWC, NC). */
typedef enum { BN_contiguous, BN_channels_last, BN_LAYOUTS } bn_layout;

/* A box of elements; every channel of it holds outer * inner values. */
typedef struct {
    size_t outer, channels, inner;
} bn_extent;

/* The step of the remaining axis is 1: inner in contiguous, channel in channels_last. */
typedef struct {
    ptrdiff_t outer, channel;
} bn_strides;

/* Where a box of an array begins, and its strides. */
typedef struct {
    void *data;
    bn_strides strides;
} bn_view;

/* Per channel, in the element type. What the rounded mean leaves of the mean is in the constant term: in
   the shift, the offset. Arrays are [channels]; with a period, channels_last ones go on up to that and
   recur, so that rows which follow each other closely can be walked as one. */
typedef enum {
    BN_ROUNDED_MEAN,
    BN_SCALE,
    BN_SHIFT,         /* of the output */
    BN_SLOPE,         /* of the gradient */
    BN_OFFSET,
    BN_WEIGHT,        /* of channels that share their statistics */
    BN_FORWARD_SHIFT, /* that of the output, in a gradient which makes y or xhat again */
    BN_FORWARD_SCALE, /* where the gradient's is another: y of channels that share their statistics */
    BN_FLOOR,         /* of an activated output */
    BN_KEPT_FROM,     /* what of dy goes through an activation as it is: where x, or another input, is between */
    BN_KEPT_TO,
    BN_COEFFICIENTS
} bn_coefficient;

/* The arrays of a job, as a set; what a kernel does not use may be NULL. */
#define BN_SET(coefficient) (1u << (coefficient))
#define BN_OUTPUT_COEFFICIENTS (BN_SET(BN_ROUNDED_MEAN) | BN_SET(BN_SCALE) | BN_SET(BN_SHIFT))
#define BN_GRADIENT_COEFFICIENTS \
    (BN_SET(BN_ROUNDED_MEAN) | BN_SET(BN_SCALE) | BN_SET(BN_SLOPE) | BN_SET(BN_OFFSET))

typedef struct {
    void *array[BN_COEFFICIENTS];
    size_t period;
    double slope, ceiling; /* of an activation, for all channels; of a gradient, the slope where dy is not kept; of a
                              mask, not 0 where padding is what the input is */
} bn_coefficients;

/* How an input is summed. interleave: rows of channels_last that are summed side by side, of at most BN_WIDE_ROW
   elements together (see row_sums.inc). place: the memory that the input comes from, which decides the walk.
   prefetch_distance: in elements, into the second level of cache; 0: none. */
#define BN_WIDE_ROW 64

/* Rows of at most so many bytes are narrow: read as one stream, and from memory in the order in which they
   lie, where registers or the first level of cache hold their lanes. */
#define BN_NARROW_ROW_BYTES ((size_t)576)

typedef enum { BN_IN_LEVEL2, BN_IN_LAST_LEVEL, BN_IN_MEMORY } bn_place;

typedef struct {
    size_t interleave;
    bn_place place;
    ptrdiff_t prefetch_distance;
} bn_input;

/* moments: folds the box into a running (count, mean + mean_low, m2) per channel. count is how many
   values each channel has seen; with count == 0 the others must be zero. */
typedef void bn_moments_kernel(bn_extent extent, const void *x, bn_strides x_strides,
                               bn_input input, size_t count, double *mean, double *mean_low,
                               double *m2);

/* square_sums: adds sum(x^2) of the box to an array of [channels]. */
typedef void bn_square_sums_kernel(bn_extent extent, const void *x, bn_strides x_strides,
                                   bn_input input, double *m2);

/* integer_sums: adds sum(x) and sum(x^2) of integers to arrays of [channels]; the latter to the sum of two. */
typedef void bn_integer_sums_kernel(bn_extent extent, const void *x, bn_strides x_strides, bn_input input,
                                    double *sum, double *rest, double *sum_of_squares);

/* What summaries find in some channels, arrays of [channels]: the extremes are those so far and of the box, NaN aside;
   how many values are not finite is added up; how many count, and their centre, which is near the mean of these, are
   those of the box. */
typedef struct {
    double *count, *centre, *minimum, *maximum, *nonfinite;
} bn_tally;

typedef void bn_extremes_kernel(bn_extent extent, const void *x, bn_strides x_strides, bn_tally tally);

/* tally: all but the extremes. Values count where the mask, if there is any, is not 0 and, with `finite_only`, where
   they are finite. */
typedef void bn_tally_kernel(bn_extent extent, const void *x, bn_strides x_strides, const unsigned char *mask,
                             bn_strides mask_strides, int finite_only, bn_tally tally);

/* fill_in: makes the values that do not count the rounded centre. */
typedef void bn_fill_in_kernel(bn_extent extent, void *x, bn_strides x_strides, const unsigned char *mask,
                               bn_strides mask_strides, int finite_only, const double *centre);

/* Whether an output may stay in the caches, or had better go around them. */
typedef enum { BN_stored, BN_streamed } bn_stores;

/* How an output is written: through the caches or around them, and the prefetch distance of its inputs in elements;
   0: none. */
typedef struct {
    bn_stores stores;
    ptrdiff_t prefetch_distance;
} bn_store_hint;

/* Writes an output from at most BN_MAX_INPUTS inputs; the output may overwrite one of the inputs:
     scale_shift, from x:         y  = (x - mean) * scale + shift
     input_gradient, from dy, x:  dx = ((dy - offset) - (x - mean) * slope) * scale
     grouped_input_gradient:       dx = ((dy * weight - offset) - (x - mean) * slope) * scale
   where channels of different weight share their statistics; and where each element has a weight and
   bias of its own, read as arrays, of which channels_last has one value for each row:
     affine, from x, weight, bias:  y = ((x - mean) * scale + shift) * weight + bias
     scaled, from x, weight:        y = (x * scale) * weight
     weighted_input_gradient, from dy, x, weight: as grouped_input_gradient
   or where a mask, read in the same way, says which values count:
     masked_scale_shift, masked_input_gradient, masked_grouped_input_gradient: see masked.inc
   or where a piecewise linear activation follows:
     activated, from x:                  y = bend((x - mean) * scale + shift)
     activated_sum, from x, residual:    y = bend(((x - mean) * scale + shift) + residual)
     gated_input_gradient, from dy, x:   input_gradient of what of dy goes through; see activations.inc */
#define BN_MAX_INPUTS 3

typedef void bn_output_kernel(bn_extent extent, const bn_view *inputs,
                              bn_coefficients coefficients, bn_view output, bn_store_hint hint);
typedef bn_output_kernel bn_scale_shift_kernel, bn_input_gradient_kernel,
    bn_grouped_input_gradient_kernel, bn_affine_kernel, bn_scaled_kernel,
    bn_weighted_input_gradient_kernel, bn_masked_scale_shift_kernel, bn_masked_input_gradient_kernel,
    bn_masked_grouped_input_gradient_kernel, bn_activated_kernel, bn_activated_sum_kernel,
    bn_gated_input_gradient_kernel;

/* upstream: writes the part of dy that goes through a piecewise linear activation, and adds up, channel by channel,
   what goes to its floor, if there is where to. It may write dy itself. The inputs are dy, and what the bounds in
   the coefficients are of: x, what the activation was given, or what it made of that. */
typedef void bn_upstream_kernel(bn_extent extent, const bn_view *inputs, bn_coefficients coefficients,
                                bn_view to_y, double *sum_to_parameter);

/* unbend: finds z of `count` neighbouring y = max(z, slope * z), for a slope above 0; z may overwrite y. */
typedef void bn_unbend_kernel(size_t count, const void *y, double slope, void *z);

/* A curve: y of so many neighbouring z, which it may overwrite; and dz of these z and of dy, likewise. */
typedef void bn_curve_kernel(size_t count, const void *z, void *y, bn_stores stores);
typedef void bn_curve_gradient_kernel(size_t count, const void *z, const void *dy, void *dz);

#define BN_TYPES(unused, name)                    \
    typedef bn_curve_kernel bn_##name##_kernel; \
    typedef bn_curve_gradient_kernel bn_##name##_gradient_kernel;
BN_FOR_EACH_CURVE(BN_TYPES, )
#undef BN_TYPES

#define BN_MEMBER(unused, name) BN_activation_##name,
typedef enum {
    BN_no_activation,
    BN_activation_piecewise,
    BN_FOR_EACH_CURVE(BN_MEMBER, ) BN_ACTIVATIONS
} bn_activation;
#undef BN_MEMBER

/* What follows a normalization: y = max(z, slope * z), but not below the floor nor above the ceiling; or a curve. The
   gradient at the bounds themselves goes on to z where they are `closed`. */
typedef struct {
    bn_activation kind;
    double slope, floor, ceiling;
    int closed;
} bn_activated;

/* gradient_sums: adds sum(dy) and sum(dy * (x - mean)) of the box to two arrays of [channels]; the mean is
   the rounded one. With bounds of x among the coefficients, dy is what upstream makes of it, with the same bits. */
typedef void bn_gradient_sums_kernel(bn_extent extent, const void *dy, bn_strides dy_strides,
                                     const void *x, bn_strides x_strides, bn_input input,
                                     bn_coefficients coefficients, double *sum_dy,
                                     double *sum_dy_deviation);

/* weighted_gradient_sums: the same of dy * weight, where each element has a weight of its own, and
   channels_last one for each row. The inputs are dy, x and weight. */
typedef void bn_weighted_gradient_sums_kernel(bn_extent extent, const bn_view *inputs,
                                              bn_input input, bn_coefficients coefficients,
                                              double *sum_dy, double *sum_dy_deviation);

/* column_sums: adds sum(dy * xhat) and sum(dy) over the channels of a box, which are rows, to two arrays
   of its elements; xhat = (x - mean) * scale + forward_shift. The inputs are dy and x. Lanes are emptied
   after so many rows (or of channels_last, where rows are neighbours, so many bytes of them) or a part of these:
   boxes of a multiple of them change no sum. */
#define BN_ADDED_ROWS ((size_t)16)
#define BN_ADDED_NEIGHBOURS_BYTES ((size_t)1024)
typedef void bn_column_sums_kernel(bn_extent extent, const bn_view *inputs,
                                   bn_coefficients coefficients, double *products, double *sums);

/* weighted_sums_and_columns: weighted_gradient_sums and column_sums of the same elements, which are read
   once for both. The inputs are dy, x and weight. */
typedef void bn_weighted_sums_and_columns_kernel(bn_extent extent, const bn_view *inputs,
                                                 bn_input input, bn_coefficients coefficients,
                                                 double *sum_dy, double *sum_dy_deviation,
                                                 double *products, double *sums);

/* columns_and_gradient: column_sums, and weighted_input_gradient of the same elements, which are read once
   for both. The inputs are dy, x and weight; the weights of a row are neighbours, the same for all rows,
   and the output is no input. */
typedef void bn_columns_and_gradient_kernel(bn_extent extent, const bn_view *inputs,
                                            bn_coefficients coefficients, bn_view dx,
                                            double *products, double *sums);

/* Arithmetic on [channels] arrays: float64 in, coefficients in the element type out.
   A NULL weight is 1; a NULL mean, mean_low or bias is 0. With `skip_remainder`, channels do without what their rounded
   mean leaves, where nobody would notice: without a bias the shift is then -0, which adds nothing. */
typedef void bn_scale_shift_coefficients_kernel(size_t channels, int skip_remainder, const double *mean,
                                                const double *mean_low, const double *invstd,
                                                const double *weight, const double *bias,
                                                bn_coefficients coefficients);

/* The rounded mean, all that the sums need. */
typedef void bn_round_mean_kernel(size_t channels, const double *mean,
                                  bn_coefficients coefficients);

/* Makes sum(dy * xhat) of sum(dy * (x - rounded mean)), where xhat = (x - mean) * invstd. The gradient's formula
   goes on with sum(dy * xhat), which is about as large as dy, because squares of invstd may leave the range. */
typedef void bn_standardize_kernel(size_t channels, const double *mean, const double *mean_low,
                                   const double *invstd, const double *sum_dy, double *sum_dy_xhat);

/* The rest, once the sums over `count` values are known. */
typedef void bn_gradient_coefficients_kernel(size_t channels, double count, const double *mean,
                                             const double *mean_low, const double *invstd,
                                             const double *weight, const double *sum_dy,
                                             const double *sum_dy_xhat,
                                             bn_coefficients coefficients);

/* The same for groups of `per_group` channels, of `count` values each, which share their statistics:
   sum_dy and sum_dy_xhat are summed over a group with the weights of its channels. */
typedef void bn_grouped_gradient_coefficients_kernel(size_t groups, size_t per_group, size_t count,
                                                     const double *mean, const double *mean_low,
                                                     const double *invstd, const double *weight,
                                                     const double *sum_dy,
                                                     const double *sum_dy_xhat,
                                                     bn_coefficients coefficients);

/* The floor of each channel, or one for all where `floors` is NULL, in the type of the elements; the shift becomes NaN
   where that is. */
typedef void bn_activation_coefficients_kernel(size_t channels, const double *floors, double floor, void *shift,
                                               void *rounded);

/* Between which values an input is where dy is kept: where the output, (input - mean) * scale + shift in the type of
   the elements, is between `edge` and `ceiling`; or, without a scale, the input itself. */
typedef void bn_gate_coefficients_kernel(size_t channels, const double *edges, double edge, double ceiling, int closed,
                                         const void *mean, const void *scale, const void *shift,
                                         bn_coefficients coefficients);

/* The gradient of a parameter, in the parameter's own type: its sums over all repeats. */
typedef void bn_parameter_gradient_kernel(size_t channels, size_t repeats, const double *sums,
                                          void *gradient);

/* running = (1 - momentum) * running + momentum * batch, which has the element type; batch is the
   average of divided / divisor over the repeats. A weight of 0 leaves nothing of what it weighs, NaN and
   infinity neither. Returns whether a finite value left the range of the type. */
typedef int bn_update_running_kernel(size_t channels, size_t repeats, double momentum,
                                     const double *divided, double divisor, void *running);

/* compress: writes those of `count` neighbours whose byte in `counts` is 1 (the others' is 0) one after the other, and
   nothing beyond `room` elements. Returns how many bytes are 1; the elements behind those are undefined. */
typedef size_t bn_compress_kernel(size_t count, const unsigned char *counts, const void *from, void *to, size_t room);

/* What of a box of runs counts: bytes of 0 and 1, [outer][inner] for all channels, and how many are 1, at least one. */
typedef struct {
    const unsigned char *counts;
    size_t count;
} bn_counted;

/* counted_moments, counted_gradient_sums: of at most BN_COUNTED_CHANNELS contiguous channels, moments and gradient_sums
   of what counts; without bounds. Return a set of channels, the first one the lowest bit: those whose sums leave the
   range of the type, or may, and to which nothing has been added. */
#define BN_COUNTED_CHANNELS ((size_t)64)
typedef uint64_t bn_counted_moments_kernel(bn_extent extent, const void *x, bn_strides x_strides, bn_input input,
                                           bn_counted counted, size_t count, double *mean, double *mean_low,
                                           double *m2);
typedef uint64_t bn_counted_gradient_sums_kernel(bn_extent extent, const void *dy, bn_strides dy_strides, const void *x,
                                                 bn_strides x_strides, bn_input input, bn_counted counted,
                                                 bn_coefficients coefficients, double *sum_dy,
                                                 double *sum_dy_deviation);

/* Chan's merge of b into a. */
typedef void bn_merge_moments_kernel(size_t channels, size_t count_a, double *mean_a,
                                     double *mean_low_a, double *m2_a, size_t count_b,
                                     const double *mean_b, const double *mean_low_b,
                                     const double *m2_b);

/* merge_moments where each channel has a count of its own. */
typedef void bn_merge_counted_moments_kernel(size_t channels, double *count_a, double *mean_a, double *mean_low_a,
                                             double *m2_a, const double *count_b, const double *mean_b,
                                             const double *mean_low_b, const double *m2_b);

/* Adds the sums that integer_sums made of some values (b) to those of other values (a). */
typedef void bn_merge_integer_sums_kernel(size_t channels, double *sum_a, double *rest_a, double *squares_a,
                                          const double *sum_b, const double *rest_b, const double *squares_b);

/* Gives each of the `per_group` channels of a group, which have `count` values each, the moments of all of
   them. */
typedef void bn_pool_moments_kernel(size_t groups, size_t per_group, size_t count, double *mean,
                                    double *mean_low, double *m2);

/* sums += addends */
typedef void bn_merge_sums_kernel(size_t channels, double *sums, const double *addends);

/* invstd = 1 / sqrt(variance + (eps + channel_eps)), variance = divided / divisor; channel_eps may
   be NULL, for 0, but invstd is not `divided`. */
typedef void bn_invstd_kernel(size_t channels, const double *divided, double divisor, double eps,
                              const double *channel_eps, double *invstd);

/* Stored elements, each `step` bytes after the one before, as neighbours of the arithmetic type; and back, rounded
   once, to nearest even. Nothing is assumed of the addresses of what is stored. Neighbours may be streamed. */
typedef void bn_widen_kernel(size_t count, const char *from, ptrdiff_t step, void *to);
typedef void bn_narrow_kernel(size_t count, const void *from, char *to, ptrdiff_t step, bn_stores stores);

/* Reads and writes so many cache lines; see memory_probes.inc. */
typedef float bn_memory_probe(size_t lines, const float *from, float *to);

typedef struct {
    const char *isa;
    const char *flags;
#define BN_MEMBER(operation, ...) bn_##operation##_kernel *operation[BN_LAYOUTS][BN_ELEMENT_TYPES];
    BN_FOR_EACH_ELEMENT_OPERATION(BN_MEMBER)
#undef BN_MEMBER
#define BN_MEMBER(operation) bn_##operation##_kernel *operation[BN_DTYPES];
    BN_FOR_EACH_COEFFICIENT_OPERATION(BN_MEMBER)
    BN_FOR_EACH_CURVE(BN_KERNELS_OF_CURVE, BN_MEMBER)
#undef BN_MEMBER
#define BN_MEMBER(operation) bn_##operation##_kernel *operation;
    BN_FOR_EACH_CHANNEL_OPERATION(BN_MEMBER)
#undef BN_MEMBER
    bn_widen_kernel *widen[BN_STORED_TYPES];
    bn_narrow_kernel *narrow[BN_STORED_TYPES]; /* NULL for integers */
#define BN_MEMBER(kind) bn_memory_probe *probe_##kind;
    BN_FOR_EACH_MEMORY_PROBE(BN_MEMBER)
#undef BN_MEMBER
} bn_kernels;

#endif
