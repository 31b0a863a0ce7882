/* Every kernel of one variant on fixed inputs, without Python: prints a hash of all bits it makes.

   For sanitizers (every array is allocated to its exact size) and for machines that are emulated.
   Compile with -DBN_TABLE=bn_kernels_<isa> and the variant's object. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "plan.h"
#include "kernels.h"
#include "portability.h"

extern const bn_kernels BN_TABLE;

/* Which operations of the list were called: main fails if one was not. */
#define ID(operation, ...) ID_##operation,
#define PROBE_ID(kind) ID_probe_##kind,
#define WIDEN_ID(stored, arithmetic) ID_widen_##stored,
#define NARROW_ID(stored, arithmetic) ID_narrow_##stored,
#define NAME(operation, ...) #operation,
#define WIDEN_NAME(stored, arithmetic) "widen_" #stored,
#define NARROW_NAME(stored, arithmetic) "narrow_" #stored,
enum {
    BN_FOR_EACH_ELEMENT_OPERATION(ID) BN_FOR_EACH_COEFFICIENT_OPERATION(ID)
        BN_FOR_EACH_CURVE(BN_KERNELS_OF_CURVE, ID) BN_FOR_EACH_CHANNEL_OPERATION(ID) BN_FOR_EACH_STORED_TYPE(WIDEN_ID)
            BN_FOR_EACH_WRITTEN_TYPE(NARROW_ID) BN_FOR_EACH_MEMORY_PROBE(PROBE_ID) OPERATIONS
};
static const char *const names[] = {BN_FOR_EACH_ELEMENT_OPERATION(NAME)
                                        BN_FOR_EACH_COEFFICIENT_OPERATION(NAME)
                                        BN_FOR_EACH_CURVE(BN_KERNELS_OF_CURVE, NAME)
                                            BN_FOR_EACH_CHANNEL_OPERATION(NAME)
                                                BN_FOR_EACH_STORED_TYPE(WIDEN_NAME)
                                                    BN_FOR_EACH_WRITTEN_TYPE(NARROW_NAME)
                                                        BN_FOR_EACH_MEMORY_PROBE(NAME)};
static int called[OPERATIONS];
#define CALL(operation) (called[ID_##operation] = 1, BN_TABLE.operation)
#define CONVERT(direction, stored) \
    (called[ID_##direction##_##stored] = 1, BN_TABLE.direction[BN_stored_##stored])

static uint64_t hash;

static void add_to_hash(const void *data, size_t bytes)
{
    const unsigned char *byte = data;
    for (size_t i = 0; i < bytes; i++) {
        hash = (hash ^ byte[i]) * UINT64_C(1099511628211);
    }
}

static uint64_t state = 1;

/* In [-1, 1), exact in float32, the same everywhere. */
static double next(void)
{
    state = state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (double)(int32_t)(state >> 32 & 0xffffff00u) / 2147483648.0;
}

static void *allocate(size_t bytes)
{
    void *memory = malloc(bytes ? bytes : 1);
    if (memory == NULL) {
        abort();
    }
    return memory;
}

/* NaNs are alike: their sign and payload are the machine's own affair. */
static void take_nans_out(void *values, size_t count, bn_dtype dtype)
{
    for (size_t i = 0; i < count; i++) {
        if (dtype == BN_f64 && isnan(((double *)values)[i])) {
            ((double *)values)[i] = 0.125;
        } else if (dtype == BN_f32 && isnan(((float *)values)[i])) {
            ((float *)values)[i] = 0.125f;
        }
    }
}

static size_t bytes_of(size_t count, bn_dtype dtype)
{
    return count * (dtype == BN_f64 ? sizeof(double) : sizeof(float));
}

static void add_elements(void *values, size_t count, bn_dtype dtype)
{
    take_nans_out(values, count, dtype);
    add_to_hash(values, bytes_of(count, dtype));
}

static void add_doubles(double *values, size_t count) { add_elements(values, count, BN_f64); }

/* Neither where an input lies, nor how an output is stored, nor whether its rows are walked as one
   changes a bit. */
static void expect_same(void *expected, void *made, size_t count, bn_dtype dtype)
{
    take_nans_out(expected, count, dtype);
    take_nans_out(made, count, dtype);
    if (memcmp(expected, made, bytes_of(count, dtype)) != 0) {
        fprintf(stderr, "another way to walk gave other bits\n");
        exit(1);
    }
}

enum values { ORDINARY, LARGE_MEAN, CONSTANT, TINY, HUGE_VALUES, INFINITE, ALL_VALUES };

static void *elements(size_t count, bn_dtype dtype, enum values values)
{
    void *memory = allocate(bytes_of(count, dtype));
    for (size_t i = 0; i < count; i++) {
        double value = next();
        switch (values) {
        case LARGE_MEAN: value += 1e4; break;
        case CONSTANT: value = 0.1; break;
        case TINY: value *= 1e-39; break;
        case HUGE_VALUES: value *= 1e30; break;
        case INFINITE: value = i % 17 == 5 ? HUGE_VAL : value; break;
        default: break;
        }
        if (dtype == BN_f64) {
            ((double *)memory)[i] = value;
        } else {
            ((float *)memory)[i] = (float)value;
        }
    }
    return memory;
}

static double *doubles(size_t count, double offset)
{
    double *memory = allocate(count * sizeof *memory);
    for (size_t i = 0; i < count; i++) {
        memory[i] = offset + next();
    }
    return memory;
}

static double *zeros(size_t count)
{
    double *memory = allocate(count * sizeof *memory);
    memset(memory, 0, count * sizeof *memory);
    return memory;
}

/* Lets a coefficient array recur, as whoever calls a channels_last kernel with a period must. */
static void recur(const bn_plan *plan, void *array)
{
    char *bytes = array;
    const size_t own = plan->channels * plan->itemsize;
    for (size_t i = own; i < bn_coefficients_length(plan) * plan->itemsize; i++) {
        bytes[i] = bytes[i - own];
    }
}

/* Writes an output, and again in every hint: the same comes out. */
static void check_output(bn_output_kernel *kernel, bn_extent extent, const bn_view *inputs,
                         bn_coefficients coefficients, bn_view output,
                         const bn_plan *plan)
{
    const size_t all = extent.outer * extent.channels * extent.inner;
    kernel(extent, inputs, coefficients, output, (bn_store_hint){BN_stored, 0});
    add_elements(output.data, all, plan->dtype);
    for (size_t i = 0; i < BN_COEFFICIENTS; i++) {
        if (coefficients.array[i]) {
            recur(plan, coefficients.array[i]);
        }
    }
    coefficients.period = bn_period(plan);
    for (int way = 0; way < 4; way++) {
        const bn_store_hint hint = {way % 2 ? BN_streamed : BN_stored, way / 2 ? 64 : 0};
        const bn_view same = {allocate(all * plan->itemsize), output.strides};
        kernel(extent, inputs, coefficients, same, hint);
        expect_same(output.data, same.data, all, plan->dtype);
        free(same.data);
    }
}

/* Back and forth, dense and with gaps, nothing changes. */
static void check_conversions(const float *values, size_t count)
{
    const ptrdiff_t steps[] = {4, 7, -12};
    double *wide = allocate(count * sizeof *wide);
    for (size_t k = 0; k < sizeof steps / sizeof *steps; k++) {
        const size_t step = (size_t)(steps[k] < 0 ? -steps[k] : steps[k]);
        char *stored = allocate((count - 1) * step + sizeof(float));
        char *first = steps[k] < 0 ? stored + (count - 1) * step : stored;
        CONVERT(widen, f32)(count, (const char *)values, sizeof(float), wide);
        CONVERT(narrow, f32)(count, wide, first, steps[k], k % 2 ? BN_streamed : BN_stored);
        for (size_t i = 0; i < count; i++) {
            if (memcmp(first + (ptrdiff_t)i * steps[k], values + i, sizeof(float)) != 0) {
                fprintf(stderr, "a float32 value was not converted back to itself\n");
                exit(1);
            }
        }
        memset(wide, 0, count * sizeof *wide);
        CONVERT(widen, f32)(count, first, steps[k], wide);
        for (size_t i = 0; i < count; i++) {
            const float again = (float)wide[i];
            if (memcmp(&again, values + i, sizeof again) != 0) {
                fprintf(stderr, "a float32 value with gaps was not widened\n");
                exit(1);
            }
        }
        free(stored);
    }
    free(wide);
}

/* Of values, those that count: every number of them, in memory that ends with them. */
static void check_compress(const double *from, size_t count, bn_dtype dtype)
{
    const size_t itemsize = dtype == BN_f32 ? sizeof(float) : sizeof(double);
    for (size_t apart = 1; apart < 5; apart++) {
        const size_t expected = (count + apart - 1) / apart;
        unsigned char *counts = allocate(count);
        char *values = allocate(count * itemsize), *kept = allocate(expected * itemsize);
        for (size_t i = 0; i < count; i++) {
            counts[i] = i % apart == 0;
            if (dtype == BN_f32) {
                ((float *)(void *)values)[i] = (float)from[i];
            } else {
                ((double *)(void *)values)[i] = from[i];
            }
        }
        const size_t made = CALL(compress)[dtype](count, counts, values, kept, expected);
        for (size_t i = 0; i < expected; i++) {
            if (made != expected || memcmp(kept + i * itemsize, values + i * apart * itemsize, itemsize) != 0) {
                fprintf(stderr, "compress\n");
                exit(1);
            }
        }
        free(counts);
        free(values);
        free(kept);
    }
}

/* Sums of what counts of a box: all values, and every third one. */
static void check_counted(bn_extent extent, const void *dy, const void *x, bn_strides strides, bn_coefficients mean_,
                          bn_dtype dtype)
{
    const size_t size = extent.outer * extent.inner;
    const bn_input input = {1, BN_IN_LEVEL2, 0};
    extent.channels = extent.channels < BN_COUNTED_CHANNELS ? extent.channels : BN_COUNTED_CHANNELS;
    for (size_t apart = 1; apart <= 3; apart += 2) {
        double *mean = zeros(extent.channels), *low = zeros(extent.channels), *m2 = zeros(extent.channels);
        unsigned char *counts = allocate(size);
        for (size_t i = 0; i < size; i++) {
            counts[i] = i % apart == 0;
        }
        const bn_counted counted = {counts, (size + apart - 1) / apart};
        for (size_t seen = 0; seen < 2 * counted.count; seen += counted.count) {
            double left_out = (double)CALL(counted_moments)[dtype](extent, x, strides, input, counted, seen, mean,
                                                                         low, m2);
            add_doubles(&left_out, 1);
        }
        add_doubles(mean, extent.channels);
        add_doubles(m2, extent.channels);
        double left_out = (double)CALL(counted_gradient_sums)[dtype](extent, dy, strides, x, strides, input,
                                                                           counted, mean_, low, m2);
        add_doubles(&left_out, 1);
        add_doubles(low, extent.channels);
        add_doubles(m2, extent.channels);
        free(mean);
        free(low);
        free(m2);
        free(counts);
    }
}

static void check(bn_layout layout, int dtype_, bn_extent extent, int values_)
{
    const bn_dtype dtype = (bn_dtype)dtype_;
    const enum values values = (enum values)values_;
    const size_t c = extent.channels, n = extent.outer * extent.inner, all = n * c;
    const size_t itemsize = dtype == BN_f64 ? sizeof(double) : sizeof(float);
    const size_t together = c % 3 == 0 ? 3 : c % 2 == 0 ? 2 : 1; /* channels, or repeats of some */
    const bn_strides strides = {(ptrdiff_t)(c * extent.inner), (ptrdiff_t)extent.inner};
    void *x = elements(all, dtype, values), *more = elements(all, dtype, values);
    void *dy = elements(all, dtype, values == CONSTANT ? ORDINARY : values);
    void *y = allocate(all * itemsize), *dx = allocate(all * itemsize);
    double *mean = zeros(c), *mean_low = zeros(c), *m2 = zeros(c), *invstd = zeros(c);
    double *sum_dy = zeros(c), *sum_dy_xhat = zeros(c);
    double *other_mean = doubles(c, 0), *other_low = zeros(c), *other_m2 = doubles(c, 2);
    double *weight = doubles(c, 1), *bias = doubles(c, 0);
    const size_t interleave = layout == BN_channels_last && c < 60 ? 60 / c - (60 / c > 2 ? c % 3 : 0) : 1;
    const bn_input near = {interleave, BN_IN_LEVEL2, 0}, far = {interleave, BN_IN_MEMORY, 64};
    const bn_plan plan = {.layout = layout, .dtype = dtype, .itemsize = itemsize,
                                  .channels = c, .interleave = interleave};
    bn_coefficients forward = {.period = 0}, backward = {.period = 0}, per_group = {.period = 0};
    bn_coefficients activated = {.period = 0}, activated_gradient = {.period = 0}, of_rows = {.period = 0};
    bn_coefficients *each[] = {&forward, &backward, &per_group, &activated, &activated_gradient, &of_rows};
    static const unsigned sets[] = {
        BN_OUTPUT_COEFFICIENTS,         BN_GRADIENT_COEFFICIENTS,
        BN_GRADIENT_COEFFICIENTS | BN_SET(BN_WEIGHT), BN_OUTPUT_COEFFICIENTS | BN_SET(BN_FLOOR),
        BN_GRADIENT_COEFFICIENTS | BN_SET(BN_FORWARD_SHIFT) | BN_SET(BN_KEPT_FROM) | BN_SET(BN_KEPT_TO),
        BN_GRADIENT_COEFFICIENTS | BN_SET(BN_FORWARD_SHIFT) | BN_OUTPUT_COEFFICIENTS,
    };
    for (size_t k = 0; k < sizeof sets / sizeof *sets; k++) {
        for (int i = 0; i < BN_COEFFICIENTS; i++) {
            if (sets[k] & BN_SET(i)) {
                each[k]->array[i] = allocate(bn_coefficients_length(&plan) * itemsize);
            }
        }
    }
    const bn_view x_view = {x, strides}, y_view = {y, strides}, dx_view = {dx, strides};
    const bn_view both[] = {{dy, strides}, x_view};

    CALL(moments)[layout][dtype](extent, x, strides, near, 0, mean, mean_low, m2);
    CALL(moments)[layout][dtype](extent, more, strides, near, n, mean, mean_low, m2);
    double *far_mean = zeros(c), *far_low = zeros(c), *far_m2 = zeros(c);
    CALL(moments)[layout][dtype](extent, x, strides, far, 0, far_mean, far_low, far_m2);
    CALL(moments)[layout][dtype](extent, more, strides, far, n, far_mean, far_low, far_m2);
    expect_same(mean, far_mean, c, BN_f64);
    expect_same(mean_low, far_low, c, BN_f64);
    expect_same(m2, far_m2, c, BN_f64);
    free(far_mean);
    free(far_low);
    free(far_m2);
    CALL(merge_moments)(c, 2 * n, mean, mean_low, m2, 3, other_mean, other_low, other_m2);
    CALL(invstd)(c, m2, (double)(2 * n + 3), 1e-5, weight, invstd);
    add_doubles(invstd, c);
    CALL(invstd)(c, m2, (double)(2 * n + 3), 1e-5, NULL, invstd);
    add_doubles(mean, c);
    add_doubles(mean_low, c);
    add_doubles(m2, c);
    add_doubles(invstd, c);

    CALL(scale_shift_coefficients)[dtype](c, 0, mean, mean_low, invstd, weight, bias, forward);
    check_output(CALL(scale_shift)[layout][dtype], extent, &x_view, forward, y_view, &plan);

    CALL(round_mean)[dtype](c, mean, backward);
    CALL(gradient_sums)[layout][dtype](extent, dy, strides, x, strides, near, backward, sum_dy,
                                       sum_dy_xhat);
    double *far_sum = zeros(c), *far_sum_deviation = zeros(c);
    CALL(gradient_sums)[layout][dtype](extent, dy, strides, x, strides, far, backward, far_sum,
                                       far_sum_deviation);
    expect_same(sum_dy, far_sum, c, BN_f64);
    expect_same(sum_dy_xhat, far_sum_deviation, c, BN_f64);
    free(far_sum);
    free(far_sum_deviation);
    CALL(standardize)[dtype](c, mean, mean_low, invstd, sum_dy, sum_dy_xhat);
    CALL(gradient_coefficients)[dtype](c, (double)n, mean, mean_low, invstd, weight, sum_dy,
                                       sum_dy_xhat, backward);
    add_doubles(sum_dy, c);
    add_doubles(sum_dy_xhat, c);
    check_output(CALL(input_gradient)[layout][dtype], extent, both, backward, dx_view, &plan);

    CALL(round_mean)[dtype](c, mean, per_group);
    CALL(grouped_gradient_coefficients)[dtype](c / together, together, n, mean, NULL, invstd, weight,
                                               sum_dy, sum_dy_xhat, per_group);
    check_output(CALL(grouped_input_gradient)[layout][dtype], extent, both, per_group, dx_view,
                 &plan);
    CALL(scale_shift_coefficients)[dtype](c, 0, mean, mean_low, invstd, weight, bias, activated);
    /* Leaky for some widths, with a ceiling for others. */
    activated.slope = c % 2 ? 1.0 : 0.25;
    activated.ceiling = c % 3 ? 0.75 : HUGE_VAL;
    CALL(activation_coefficients)[dtype](c, c % 4 ? other_mean : NULL, -0.125, activated.array[BN_SHIFT],
                                         activated.array[BN_FLOOR]);
    const bn_view sum[] = {x_view, both[0]};
    check_output(CALL(activated)[layout][dtype], extent, &x_view, activated, y_view, &plan);
    check_output(CALL(activated_sum)[layout][dtype], extent, sum, activated, y_view, &plan);
    bn_coefficients again = activated_gradient;
    again.array[BN_SHIFT] = again.array[BN_FORWARD_SHIFT];
    CALL(scale_shift_coefficients)[dtype](c, 0, mean, NULL, invstd, weight, bias, again);
    activated_gradient.slope = c % 2 ? 0.0 : 0.25;
    for (int closed = 0; closed < 2; closed++) { /* bounds of z, and of x */
        CALL(gate_coefficients)[dtype](c, NULL, 0.0, activated.ceiling, closed, NULL, NULL, NULL, activated_gradient);
        add_elements(activated_gradient.array[BN_KEPT_FROM], c, dtype);
        add_elements(activated_gradient.array[BN_KEPT_TO], c, dtype);
        CALL(gate_coefficients)[dtype](c, closed ? other_mean : NULL, -0.125, activated.ceiling, closed,
                                       again.array[BN_ROUNDED_MEAN], again.array[BN_SCALE], again.array[BN_SHIFT],
                                       activated_gradient);
        add_elements(activated_gradient.array[BN_KEPT_FROM], c, dtype);
        add_elements(activated_gradient.array[BN_KEPT_TO], c, dtype);
    }
    CALL(gradient_coefficients)[dtype](c, (double)n, mean, NULL, invstd, weight, sum_dy, sum_dy_xhat,
                                       activated_gradient);
    CALL(upstream)[layout][dtype](extent, both, activated_gradient, dx_view, other_low);
    add_elements(dx, all, dtype);
    add_doubles(other_low, c);
    /* Sums with bounds are those of what was made. */
    double *of_made[] = {zeros(c), zeros(c)}, *with_bounds[] = {zeros(c), zeros(c)};
    bn_coefficients without_bounds = activated_gradient;
    without_bounds.array[BN_KEPT_FROM] = NULL;
    CALL(gradient_sums)[layout][dtype](extent, dx, strides, x, strides, near, without_bounds, of_made[0], of_made[1]);
    CALL(gradient_sums)[layout][dtype](extent, dy, strides, x, strides, far, activated_gradient, with_bounds[0],
                                       with_bounds[1]);
    for (size_t i = 0; i < 2; i++) {
        expect_same(of_made[i], with_bounds[i], c, BN_f64);
        free(of_made[i]);
        free(with_bounds[i]);
    }
    check_output(CALL(gated_input_gradient)[layout][dtype], extent, both, activated_gradient, dx_view, &plan);
    CALL(unbend)[dtype](all, x, 0.25, y);
    for (size_t i = 0; i < all; i++) { /* powers of two divide exactly */
        if (dtype == BN_f32) {
            ((float *)dx)[i] = ((float *)x)[i] < 0.0f ? ((float *)x)[i] * 4.0f : ((float *)x)[i];
        } else {
            ((double *)dx)[i] = ((double *)x)[i] < 0.0 ? ((double *)x)[i] * 4.0 : ((double *)x)[i];
        }
    }
    expect_same(y, dx, all, dtype);
#define CHECK_CURVE(unused, name)                                                                       \
    CALL(name)[dtype](all, x, y, BN_stored);                                                            \
    CALL(name)[dtype](all, x, dx, BN_streamed);                                                         \
    expect_same(y, dx, all, dtype);                                                                     \
    add_elements(y, all, dtype);                                                                        \
    CALL(name##_gradient)[dtype](all, x, dy, dx);                                                       \
    add_elements(dx, all, dtype);
    BN_FOR_EACH_CURVE(CHECK_CURVE, )
#undef CHECK_CURVE
    /* Parameters of elements: those of a run, the same for all, or one for each row of channels_last. */
    const int of_run = layout == BN_contiguous;
    void *weights = elements(of_run ? extent.inner : extent.outer, dtype, ORDINARY);
    void *biases = elements(of_run ? extent.inner : extent.outer, dtype, ORDINARY);
    const bn_strides of_elements = {of_run ? 0 : 1, 0};
    const bn_view affine[] = {x_view, {weights, of_elements}, {biases, of_elements}};
    const bn_view weighted[] = {both[0], x_view, {weights, of_elements}};
    check_output(CALL(affine)[layout][dtype], extent, affine, forward, y_view, &plan);
    CALL(scale_shift_coefficients)[dtype](c, 1, mean, mean_low, invstd, NULL, NULL, of_rows);
    check_output(CALL(affine)[layout][dtype], extent, affine, of_rows, y_view, &plan);
    check_output(CALL(scaled)[layout][dtype], extent, affine, of_rows, y_view, &plan);
    check_output(CALL(weighted_input_gradient)[layout][dtype], extent, weighted, backward, dx_view,
                 &plan);
    /* A mask is such a parameter, of which 0 does not count. */
    const size_t positions = of_run ? extent.inner : extent.outer;
    void *mask = allocate(positions * itemsize);
    for (size_t i = 0; i < positions; i++) {
        if (dtype == BN_f32) {
            ((float *)mask)[i] = (float)(i % 3 != 1);
        } else {
            ((double *)mask)[i] = (double)(i % 3 != 1);
        }
    }
    const bn_view masked[] = {x_view, {mask, of_elements}}, masked_both[] = {both[0], x_view, {mask, of_elements}};
    bn_coefficients grouped = backward;
    grouped.array[BN_WEIGHT] = forward.array[BN_SCALE];
    for (int keeps = 0; keeps < 2; keeps++) {
        bn_coefficients to_y = forward, to_dx = backward, to_grouped = grouped;
        to_y.slope = to_dx.slope = to_grouped.slope = keeps;
        check_output(CALL(masked_scale_shift)[layout][dtype], extent, masked, to_y, y_view, &plan);
        check_output(CALL(masked_input_gradient)[layout][dtype], extent, masked_both, to_dx, dx_view, &plan);
        check_output(CALL(masked_grouped_input_gradient)[layout][dtype], extent, masked_both, to_grouped, dx_view,
                     &plan);
    }
    free(mask);
    check_compress(mean, c, dtype);
    if (layout == BN_contiguous) {
        check_counted(extent, dy, x, strides, backward, dtype);
    }
    CALL(weighted_gradient_sums)[layout][dtype](extent, weighted, near, backward, other_mean,
                                                other_low);
    add_doubles(other_mean, c);
    add_doubles(other_low, c);
    const size_t rows = of_run && c > 16 ? 16 : c;
    const bn_extent few = {extent.outer, rows, extent.inner};
    double *products = zeros(extent.outer * extent.inner);
    double *sums = zeros(extent.outer * extent.inner);
    if (!of_run || extent.outer == 1) {
        bn_coefficients shifted = of_rows, unshifted = of_rows;
        shifted.array[BN_FORWARD_SHIFT] = forward.array[BN_SHIFT];
        unshifted.array[BN_FORWARD_SHIFT] = of_rows.array[BN_SHIFT];
        CALL(column_sums)[layout][dtype](few, both, shifted, products, sums);
        CALL(column_sums)[layout][dtype](few, both, unshifted, products, sums);
        add_doubles(products, extent.outer * extent.inner);
        add_doubles(sums, extent.outer * extent.inner);
        /* Sums and gradients, and both kinds of sums, are those of two passes. */
        double *both_products = zeros(extent.outer * extent.inner);
        double *both_sums = zeros(extent.outer * extent.inner);
        const bn_view once = {allocate(all * itemsize), strides};
        memcpy(once.data, dx, all * itemsize);
        unshifted.array[BN_SLOPE] = backward.array[BN_SLOPE];
        unshifted.array[BN_OFFSET] = backward.array[BN_OFFSET];
        memset(products, 0, extent.outer * extent.inner * sizeof *products);
        memset(sums, 0, extent.outer * extent.inner * sizeof *sums);
        CALL(column_sums)[layout][dtype](few, both, unshifted, products, sums);
        CALL(weighted_input_gradient)[layout][dtype](few, weighted, unshifted, dx_view,
                                                     (bn_store_hint){BN_stored, 0});
        CALL(columns_and_gradient)[layout][dtype](few, weighted, unshifted, once, both_products,
                                                  both_sums);
        expect_same(products, both_products, extent.outer * extent.inner, BN_f64);
        expect_same(sums, both_sums, extent.outer * extent.inner, BN_f64);
        expect_same(dx, once.data, all, dtype);
        double *apart[] = {zeros(rows), zeros(rows)}, *with_columns[] = {zeros(rows), zeros(rows)};
        memset(both_products, 0, extent.outer * extent.inner * sizeof *products);
        memset(both_sums, 0, extent.outer * extent.inner * sizeof *sums);
        CALL(weighted_gradient_sums)[layout][dtype](few, weighted, near, unshifted, apart[0],
                                                    apart[1]);
        CALL(weighted_sums_and_columns)[layout][dtype](few, weighted, near, unshifted,
                                                       with_columns[0], with_columns[1],
                                                       both_products, both_sums);
        expect_same(products, both_products, extent.outer * extent.inner, BN_f64);
        expect_same(sums, both_sums, extent.outer * extent.inner, BN_f64);
        for (size_t i = 0; i < 2; i++) {
            expect_same(apart[i], with_columns[i], rows, BN_f64);
            free(apart[i]);
            free(with_columns[i]);
        }
        free(once.data);
        free(both_products);
        free(both_sums);
    }
    free(weights);
    free(biases);
    free(products);
    free(sums);

    CALL(pool_moments)(c / together, together, n, mean, mean_low, m2);
    add_doubles(mean, c);
    add_doubles(m2, c);
    CALL(square_sums)[layout][dtype](extent, x, strides, near, m2);
    double *far_squares = zeros(c), *near_squares = zeros(c);
    CALL(square_sums)[layout][dtype](extent, x, strides, near, near_squares);
    CALL(square_sums)[layout][dtype](extent, x, strides, far, far_squares);
    expect_same(near_squares, far_squares, c, BN_f64);
    add_doubles(near_squares, c);
    free(far_squares);
    free(near_squares);
    add_doubles(m2, c);

    CALL(update_running)[dtype](c, 1, 0.1, m2, (double)n, forward.array[0]);
    CALL(merge_sums)(c, sum_dy, other_mean);
    if (dtype == BN_f32) {
        CONVERT(widen, f32)(c, forward.array[0], sizeof(float), other_m2);
        add_doubles(other_m2, c);
        check_conversions(forward.array[0], c);
    }
    CALL(parameter_gradient)[dtype](c, 1, sum_dy_xhat, forward.array[1]);
    CALL(parameter_gradient)[dtype](c, 1, sum_dy, forward.array[2]);
    for (size_t i = 0; i < 3; i++) {
        add_elements(forward.array[i], c, dtype);
    }
    CALL(update_running)[dtype](c / together, together, 0.1, m2, (double)n, forward.array[0]);
    CALL(parameter_gradient)[dtype](c / together, together, sum_dy_xhat, forward.array[1]);
    CALL(parameter_gradient)[dtype](c / together, together, sum_dy, forward.array[2]);
    for (size_t i = 0; i < 3; i++) {
        add_elements(forward.array[i], c / together, dtype);
    }
    CALL(update_running)[dtype](1, c, 0.1, m2, (double)n, forward.array[0]);
    CALL(parameter_gradient)[dtype](1, c, sum_dy_xhat, forward.array[1]);
    CALL(parameter_gradient)[dtype](1, c, sum_dy, forward.array[2]);
    for (size_t i = 0; i < 3; i++) {
        add_elements(forward.array[i], 1, dtype);
    }
    /* Forgets what it was, and leaves the range of float32. */
    double too_large = CALL(update_running)[dtype](c, 1, 1.0, m2, 1e-200, forward.array[0]);
    add_doubles(&too_large, 1);
    add_elements(forward.array[0], c, dtype);

    for (size_t k = 0; k < sizeof sets / sizeof *sets; k++) {
        for (int i = 0; i < BN_COEFFICIENTS; i++) {
            free(each[k]->array[i]);
        }
    }
    void *rest[] = {x,          more,      dy,       y,      dx,   mean, mean_low, m2, invstd, sum_dy,
                    sum_dy_xhat, other_mean, other_low, other_m2, weight, bias};
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++) {
        free(rest[i]);
    }
}

/* A box where all values count, those of a mask, and the finite ones of these. */
static void check_summary(bn_layout layout, int dtype_, bn_extent extent, int values)
{
    const bn_dtype dtype = (bn_dtype)dtype_;
    const size_t c = extent.channels, n = extent.outer * extent.inner, all = n * c;
    const bn_strides strides = {(ptrdiff_t)(c * extent.inner), (ptrdiff_t)extent.inner};
    void *x = elements(all, dtype, (enum values)values), *filled = allocate(bytes_of(all, dtype));
    unsigned char *mask = allocate(all);
    double *statistic[8];
    for (size_t i = 0; i < 8; i++) {
        statistic[i] = zeros(c);
    }
    const bn_tally tally = {statistic[0], statistic[1], statistic[2], statistic[3], statistic[4]};
    for (size_t i = 0; i < all; i++) {
        mask[i] = next() < 0.0 ? 0 : (unsigned char)(1 + i % 255);
    }
    CALL(extremes)[layout][dtype](extent, x, strides, tally);
    add_doubles(tally.minimum, c);
    add_doubles(tally.maximum, c);
    for (int way = 0; way < 4; way++) {
        const unsigned char *some = way % 2 ? mask : NULL;
        CALL(tally)[layout][dtype](extent, x, strides, some, strides, way / 2, tally);
        add_doubles(tally.count, c);
        add_doubles(tally.nonfinite, c);
        if (way > 0) {
            memcpy(filled, x, bytes_of(all, dtype));
            CALL(fill_in)[layout][dtype](extent, filled, strides, some, strides, way / 2, tally.centre);
            add_elements(filled, all, dtype);
        }
        add_doubles(tally.centre, c);
    }
    /* The same of every other row, or run. */
    if (extent.outer % 2 == 0) {
        const bn_strides wide = {2 * strides.outer, strides.channel};
        CALL(tally)[layout][dtype]((bn_extent){extent.outer / 2, c, extent.inner}, x, wide, mask, wide, 0, tally);
        add_doubles(tally.centre, c);
    }
    /* Integers of 8 bits, or of 16. */
    for (size_t i = 0; i < all; i++) {
        const double integer = floor(next() * (dtype == BN_f32 ? 128 : 32768));
        if (dtype == BN_f32) {
            ((float *)x)[i] = (float)integer;
        } else {
            ((double *)x)[i] = integer;
        }
    }
    const bn_input near = {1, BN_IN_LEVEL2, 0}, far = {1, BN_IN_MEMORY, 0};
    double **sums = statistic + 2, **sums_again = statistic + 5;
    for (size_t i = 0; i < 3; i++) {
        memset(sums[i], 0, c * sizeof(double));
    }
    CALL(integer_sums)[layout][dtype](extent, x, strides, near, sums[0], sums[1], sums[2]);
    CALL(integer_sums)[layout][dtype](extent, x, strides, far, sums_again[0], sums_again[1], sums_again[2]);
    for (size_t i = 0; i < c; i++) {
        int64_t sum = 0, squares = 0;
        for (size_t k = 0; k < n; k++) {
            const size_t at = k / extent.inner * c * extent.inner + i * extent.inner + k % extent.inner;
            const int64_t value =
                dtype == BN_f32 ? (int64_t)((float *)x)[at] : (int64_t)((double *)x)[at];
            sum += value;
            squares += value * value;
        }
        if (sums[0][i] != (double)sum || sums[1][i] != 0.0 || sums[2][i] != (double)squares) {
            fprintf(stderr, "sums of integers are not exact\n");
            exit(1);
        }
    }
    for (size_t i = 0; i < 3; i++) {
        expect_same(sums[i], sums_again[i], c, BN_f64);
    }
    CALL(merge_integer_sums)(c, sums[0], sums[1], sums[2], sums_again[0], sums_again[1], sums_again[2]);
    add_doubles(sums[2], c);
    for (size_t i = 0; i < c; i++) {
        statistic[5][i] = (double)(i % 3); /* counts: some channels have no values in one of both */
        tally.count[i] = i % 2 ? tally.count[i] : 0.0;
    }
    CALL(merge_counted_moments)(c, statistic[5], statistic[6], statistic[7], sums[0], tally.count, tally.centre,
                                sums[1], sums[2]);
    for (size_t i = 0; i < 8; i++) {
        add_doubles(statistic[i], c);
        free(statistic[i]);
    }
    free(x);
    free(filled);
    free(mask);
}

/* What the kernels of a type of 16 bits make is what those of float32 make of its values, rounded once. */
static void check_half(bn_layout layout, int type, bn_extent extent, int values)
{
    const int half = type == 0 ? BN_f16 : BN_bf16;
    const bn_stored stored = type == 0 ? BN_stored_f16 : BN_stored_bf16;
    extent.outer = extent.outer * extent.inner > 8192 ? 8192 / extent.inner : extent.outer; /* a chunk at most */
    const size_t c = extent.channels, n = extent.outer * extent.inner, all = n * c;
    const bn_strides strides = {(ptrdiff_t)(c * extent.inner), (ptrdiff_t)extent.inner};
    const size_t interleave = layout == BN_channels_last && c < 60 ? 60 / c : 1;
    const bn_input near = {interleave, BN_IN_LEVEL2, 0}, far = {interleave, BN_IN_MEMORY, 64};
    const bn_plan plan = {.layout = layout, .dtype = BN_f32, .itemsize = sizeof(float), .channels = c,
                          .interleave = interleave};
    const int has_kernels = BN_TABLE.moments[layout][half] != NULL;
    float *wide[2];
    uint16_t *narrow[2], *y = allocate(all * sizeof *y), *expected = allocate(all * sizeof *y);
    float *made = allocate(all * sizeof *made);
    for (size_t i = 0; i < 2; i++) {
        wide[i] = elements(all, BN_f32, (enum values)values);
        narrow[i] = allocate(all * sizeof **narrow);
        BN_TABLE.narrow[stored](all, wide[i], (char *)narrow[i], 2, BN_stored);
        BN_TABLE.widen[stored](all, (const char *)narrow[i], 2, wide[i]);
    }
    double *sums[2][3], *products[2][2];
    bn_coefficients coefficients = {.period = 0};
    for (size_t i = 0; i < BN_COEFFICIENTS; i++) {
        float *array = allocate(bn_coefficients_length(&plan) * sizeof *array);
        for (size_t j = 0; j < c; j++) {
            array[j] = (float)next();
        }
        recur(&plan, array);
        coefficients.array[i] = array;
    }
    bn_coefficients without_bounds = coefficients;
    without_bounds.array[BN_KEPT_FROM] = NULL;
    for (size_t i = 0; i < 2; i++) { /* of float32, and of the type itself */
        const int element_type = i == 0 || !has_kernels ? BN_f32 : half;
        const void *x = element_type == BN_f32 ? (void *)wide[0] : narrow[0];
        const void *dy = element_type == BN_f32 ? (void *)wide[1] : narrow[1];
        for (size_t k = 0; k < 3; k++) {
            sums[i][k] = zeros(c);
        }
        for (size_t k = 0; k < 2; k++) {
            products[i][k] = zeros(c);
        }
        BN_TABLE.moments[layout][element_type](extent, x, strides, near, 0, sums[i][0], sums[i][1], sums[i][2]);
        BN_TABLE.moments[layout][element_type](extent, dy, strides, far, n, sums[i][0], sums[i][1], sums[i][2]);
        BN_TABLE.gradient_sums[layout][element_type](extent, dy, strides, x, strides, near, without_bounds,
                                                     products[i][0], products[i][1]);
        BN_TABLE.gradient_sums[layout][element_type](extent, x, strides, dy, strides, far, without_bounds,
                                                     products[i][0], products[i][1]);
    }
    for (size_t k = 0; k < 3; k++) {
        expect_same(sums[0][k], sums[1][k], c, BN_f64);
        add_doubles(sums[1][k], c);
    }
    for (size_t k = 0; k < 2; k++) {
        expect_same(products[0][k], products[1][k], c, BN_f64);
        add_doubles(products[1][k], c);
    }
    for (int gradient = 0; gradient < 2; gradient++) {
        bn_output_kernel *const *const kernels =
            gradient ? BN_TABLE.input_gradient[layout] : BN_TABLE.scale_shift[layout];
        const bn_view from_wide[] = {{wide[0], strides}, {wide[1], strides}};
        const bn_view from_narrow[] = {{narrow[0], strides}, {narrow[1], strides}};
        kernels[BN_f32](extent, from_wide, coefficients, (bn_view){made, strides}, (bn_store_hint){BN_stored, 0});
        BN_TABLE.narrow[stored](all, made, (char *)expected, 2, BN_stored);
        for (int way = 0; has_kernels && way < 8; way++) {
            const bn_store_hint hint = {way & 1 ? BN_streamed : BN_stored, way & 2 ? 64 : 0};
            coefficients.period = way & 4 ? bn_period(&plan) : 0;
            memset(y, 0, all * sizeof *y);
            kernels[half](extent, from_narrow, coefficients, (bn_view){y, strides}, hint);
            BN_FENCE_STREAMS();
            if (memcmp(y, expected, all * sizeof *y) != 0) {
                fprintf(stderr, "an output of 16 bits is not that of float32, rounded\n");
                exit(1);
            }
        }
        coefficients.period = 0;
    }
    for (size_t i = 0; i < 2; i++) {
        for (size_t k = 0; k < 3; k++) {
            free(sums[i][k]);
        }
        for (size_t k = 0; k < 2; k++) {
            free(products[i][k]);
        }
        free(wide[i]);
        free(narrow[i]);
    }
    for (size_t i = 0; i < BN_COEFFICIENTS; i++) {
        free(coefficients.array[i]);
    }
    free(y);
    free(expected);
    free(made);
}

/* Every integer type, dense and with gaps: as C converts it. */
#define CHECK_INTEGERS(stored, type, wide_type)                                                     \
    for (size_t k = 0; k < sizeof steps / sizeof *steps; k++) {                                     \
        const size_t step = steps[k] * sizeof(type);                                                \
        char *from = allocate((COUNT - 1) * step + sizeof(type));                                   \
        wide_type *to = allocate(COUNT * sizeof *to);                                               \
        for (size_t i = 0; i < (COUNT - 1) * step + sizeof(type); i++) {                            \
            from[i] = (char)(unsigned char)(next() * 128.0 + 128.0);                                \
        }                                                                                           \
        CONVERT(widen, stored)(COUNT, from, (ptrdiff_t)step, to);                                   \
        for (size_t i = 0; i < COUNT; i++) {                                                        \
            type value;                                                                             \
            memcpy(&value, from + i * step, sizeof value);                                          \
            if (to[i] != (wide_type)value) {                                                        \
                fprintf(stderr, "a value of " #type " was not widened\n");                          \
                exit(1);                                                                            \
            }                                                                                       \
        }                                                                                           \
        free(from);                                                                                 \
        free(to);                                                                                   \
    }

static void check_integers(void)
{
    enum { COUNT = 300 };
    const size_t steps[] = {1, 3};
    CHECK_INTEGERS(i8, int8_t, float)
    CHECK_INTEGERS(u8, uint8_t, float)
    CHECK_INTEGERS(i16, int16_t, double)
    CHECK_INTEGERS(u16, uint16_t, double)
    CHECK_INTEGERS(i32, int32_t, double)
    CHECK_INTEGERS(u32, uint32_t, double)
    CHECK_INTEGERS(i64, int64_t, double)
    CHECK_INTEGERS(u64, uint64_t, double)
}

/* Every value of a type of 16 bits becomes itself again, NaN a quiet one, whose bits are those of `quiet`. Rounding is
   hashed: of all exponents, with the bits behind the last one that is kept as they make it a tie, or nearly one. */
#define CHECK_HALVES(stored, infinity, quiet, dropped)                                                       \
    {                                                                                                        \
        enum { COUNT = 65536, ROUNDED = 512 * 64 * 3 };                                                      \
        uint16_t *halves = allocate(COUNT * sizeof *halves);                                                 \
        char *again = allocate(COUNT * 6 + 1);                                                               \
        float *wide = allocate((COUNT + ROUNDED) * sizeof *wide);                                            \
        for (size_t i = 0; i < COUNT; i++) {                                                                 \
            halves[i] = (uint16_t)i;                                                                         \
        }                                                                                                    \
        for (int way = 0; way < 3; way++) { /* neighbours, streamed, and with odd gaps */                    \
            const ptrdiff_t step = way < 2 ? 2 : 6;                                                          \
            char *to = again + (way == 2);                                                                   \
            CONVERT(widen, stored)(COUNT, (const char *)halves, 2, wide);                                    \
            CONVERT(narrow, stored)(COUNT, wide, to, step, way == 1 ? BN_streamed : BN_stored);              \
            BN_FENCE_STREAMS();                                                                              \
            CONVERT(widen, stored)(COUNT, to, step, wide);                                                   \
            for (size_t i = 0; i < COUNT; i++) {                                                             \
                const unsigned nan = (i & 0x7fff) > (infinity) ? (quiet) : 0;                                \
                uint16_t half;                                                                               \
                memcpy(&half, to + (ptrdiff_t)i * step, sizeof half);                                        \
                if (half != (uint16_t)(i | nan)) {                                                           \
                    fprintf(stderr, "%zx became %x as " #stored "\n", i, half);                              \
                    exit(1);                                                                                 \
                }                                                                                            \
            }                                                                                                \
            add_to_hash(wide, COUNT * sizeof *wide);                                                         \
        }                                                                                                    \
        for (size_t i = 0; i < ROUNDED; i++) {                                                               \
            const uint32_t kept = (uint32_t)(i / 3) << 17, tie = UINT32_C(1) << ((dropped) - 1);             \
            const uint32_t bits = kept | (((uint32_t)i & 1) << (dropped)) | (tie - 1 + (uint32_t)(i % 3));   \
            memcpy(wide + i, &bits, sizeof bits);                                                            \
        }                                                                                                    \
        CONVERT(narrow, stored)(ROUNDED, wide, again, 2, BN_stored);                                         \
        add_to_hash(again, ROUNDED * 2);                                                                     \
        printf("halves " #stored " %016llx\n", (unsigned long long)hash);                                    \
        free(halves);                                                                                        \
        free(again);                                                                                         \
        free(wide);                                                                                          \
    }

static void check_halves(void)
{
    hash = UINT64_C(14695981039346656037);
    CHECK_HALVES(f16, 0x7c00, 0x200, 13)
    CHECK_HALVES(bf16, 0x7f80, 0x40, 16)
}

/* Memory probes take whole cache lines. */
static void check_probes(void)
{
    enum { LINES = 37, ELEMENTS = LINES * 16 };
    _Alignas(64) float from[ELEMENTS], to[ELEMENTS];
    double sum = 0;
    for (size_t i = 0; i < ELEMENTS; i++) {
        from[i] = (float)(i % 7);
        sum += i < LINES / 4 * 64 ? (double)from[i] : 0;
    }
    CALL(probe_copy)(LINES, from, to);
    int wrong = memcmp(from, to, sizeof to) != 0;
    CALL(probe_in_place)(LINES, to, to);
    wrong |= to[ELEMENTS - 1] != -from[ELEMENTS - 1];
    CALL(probe_streaming_copy)(LINES, from, to);
    wrong |= memcmp(from, to, sizeof to) != 0;
    wrong |= CALL(probe_read)(LINES, from, to) != (float)sum;
    if (wrong) {
        fprintf(stderr, "a memory probe moved something else\n");
        exit(1);
    }
}

typedef void check_of_box(bn_layout layout, int dtype, bn_extent extent, int values);

static void check_boxes(const char *title, check_of_box *check_box, const char *const *types)
{
    static const size_t runs[] = {1,  2,  3,  15,  16,  17,  31,   32,   33,   49,
                                  63, 64, 65, 196, 511, 513, 1000, 1025, 2049, 4096};
    static const size_t widths[] = {1,  2,  3,  4,  5,  7,  8,  9,   15,
                                    16, 17, 31, 33, 63, 64, 65, 72, 130, 143, 1030};
    static const size_t rows[] = {1, 2, 15, 16, 17, 31, 32, 33, 70};
    static const size_t many[] = {3, 12, 13}; /* runs, and rows, of many channels */
    for (int dtype = 0; dtype < BN_DTYPES; dtype++) {
        for (int values = 0; values < ALL_VALUES; values++) {
            hash = UINT64_C(14695981039346656037);
            for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
                check_box(BN_contiguous, dtype, (bn_extent){1, 3, runs[i]}, values);
                check_box(BN_contiguous, dtype, (bn_extent){19, 2, runs[i]}, values);
            }
            for (size_t i = 0; i < sizeof many / sizeof *many; i++) {
                check_box(BN_contiguous, dtype, (bn_extent){many[i], 70, 49}, values);
            }
            printf("%scontiguous %s %d %016llx\n", title, types[dtype], values,
                   (unsigned long long)hash);
            hash = UINT64_C(14695981039346656037);
            for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
                for (size_t j = 0; j < sizeof rows / sizeof *rows; j++) {
                    check_box(BN_channels_last, dtype, (bn_extent){rows[j], widths[i], 1}, values);
                }
            }
            printf("%schannels_last %s %d %016llx\n", title, types[dtype], values,
                   (unsigned long long)hash);
        }
    }
}

int main(void)
{
    static const char *const computed[] = {"f32", "f64"}, *const halves[] = {"f16", "bf16"};
    check_boxes("", check, computed);
    check_boxes("summary ", check_summary, computed);
    check_boxes("", check_half, halves);
    check_integers();
    check_halves();
    check_probes();
    for (int i = 0; i < OPERATIONS; i++) {
        if (!called[i]) {
            fprintf(stderr, "%s is in kernel_list.h but is not checked here\n", names[i]);
            return 1;
        }
    }
    return 0;
}
