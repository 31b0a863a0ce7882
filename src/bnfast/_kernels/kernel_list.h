/* Every kernel, once: the table, the list that Python sees and the tests all come from here.

   Element operations exist for every layout and dtype, <operation>_<layout>_<dtype>;
   coefficient operations for every dtype, <operation>_<dtype>;
   channel operations work on float64 channel arrays, <operation>;
   storage types are converted to the arithmetic type beside them, widen_<stored> and narrow_<stored>;
   memory probes compute nothing: the benchmark asks with them what memory can do, probe_<kind>. */
#ifndef BN_KERNEL_LIST_H
#define BN_KERNEL_LIST_H

#define BN_FOR_EACH_ELEMENT_OPERATION(X) \
    X(moments)                           \
    X(square_sums)                       \
    X(scale_shift)                       \
    X(gradient_sums)                     \
    X(input_gradient)                    \
    X(shared_input_gradient)             \
    X(affine)                            \
    X(scaled)                            \
    X(weighted_gradient_sums)            \
    X(weighted_input_gradient)           \
    X(column_sums)                       \
    X(weighted_sums_and_columns)         \
    X(columns_and_gradient)              \
    X(floored_scale_shift)               \
    X(floored_input_gradient)            \
    X(keep_above_floor)

#define BN_FOR_EACH_COEFFICIENT_OPERATION(X) \
    X(scale_shift_coefficients)              \
    X(round_mean)                            \
    X(standardize)                           \
    X(gradient_coefficients)                 \
    X(shared_gradient_coefficients)          \
    X(floor_coefficients)                    \
    X(parameter_gradients)                   \
    X(update_running)

#define BN_FOR_EACH_CHANNEL_OPERATION(X) \
    X(merge_moments)                     \
    X(pool_moments)                      \
    X(merge_sums)                        \
    X(invstd)

#define BN_FOR_EACH_STORED_TYPE(X) X(f32, f64)

#define BN_FOR_EACH_MEMORY_PROBE(X) \
    X(copy)                         \
    X(streaming_copy)               \
    X(read)                         \
    X(in_place)

#endif
