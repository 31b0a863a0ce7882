/* Every kernel, once: the table, the list that Python sees and the tests all come from here.

   Element operations exist for every layout and dtype, <operation>_<layout>_<dtype>, and some for types of 16 bits;
   coefficient operations, and what works on runs of neighbours, for every dtype, <operation>_<dtype>;
   channel operations work on float64 channel arrays, <operation>;
   storage types are converted to the arithmetic type beside them, widen_<stored>, and back, narrow_<stored>, but for
   integers, which are read alone;
   memory probes compute nothing: the benchmark asks with them what memory can do, probe_<kind>. */
#ifndef BN_KERNEL_LIST_H
#define BN_KERNEL_LIST_H

/* The kernel, the operand that it writes (BN_NONE: sums alone), and those that it reads, in its order. */
#define BN_FOR_EACH_ELEMENT_OPERATION(X)                                  \
    X(moments, BN_NONE, BN_X)                                             \
    X(square_sums, BN_NONE, BN_X)                                         \
    X(integer_sums, BN_NONE, BN_X)                                        \
    X(extremes, BN_NONE, BN_X)                                            \
    X(tally, BN_NONE, BN_X, BN_MASK)                                      \
    X(fill_in, BN_X, BN_X, BN_MASK)                                       \
    X(gradient_sums, BN_NONE, BN_DY, BN_X)                                \
    X(weighted_gradient_sums, BN_NONE, BN_DY, BN_X, BN_ELEMENT_WEIGHT)    \
    X(column_sums, BN_NONE, BN_DY, BN_X)                                  \
    X(weighted_sums_and_columns, BN_NONE, BN_DY, BN_X, BN_ELEMENT_WEIGHT) \
    X(scale_shift, BN_Y, BN_X)                                            \
    X(affine, BN_Y, BN_X, BN_ELEMENT_WEIGHT, BN_ELEMENT_BIAS)             \
    X(scaled, BN_Y, BN_X, BN_ELEMENT_WEIGHT)                              \
    X(input_gradient, BN_DX, BN_DY, BN_X)                                 \
    X(grouped_input_gradient, BN_DX, BN_DY, BN_X)                         \
    X(masked_scale_shift, BN_Y, BN_X, BN_MASK)                            \
    X(masked_input_gradient, BN_DX, BN_DY, BN_X, BN_MASK)                 \
    X(masked_grouped_input_gradient, BN_DX, BN_DY, BN_X, BN_MASK)         \
    X(weighted_input_gradient, BN_DX, BN_DY, BN_X, BN_ELEMENT_WEIGHT)     \
    X(columns_and_gradient, BN_DX, BN_DY, BN_X, BN_ELEMENT_WEIGHT)        \
    X(activated, BN_Y, BN_X)                                              \
    X(activated_sum, BN_Y, BN_X, BN_RESIDUAL)                             \
    X(upstream, BN_NONE, BN_DY, BN_X)                                     \
    X(gated_input_gradient, BN_DX, BN_DY, BN_X)

/* Those that exist for float16 and bfloat16 as well. */
#define BN_FOR_EACH_HALF_OPERATION(X) \
    X(moments)                        \
    X(gradient_sums)                  \
    X(scale_shift)                    \
    X(input_gradient)

/* Activations that are curves, on neighbours that a kernel has just written; for every dtype, <name>_<dtype> and
   <name>_gradient_<dtype>. */
#define BN_FOR_EACH_CURVE(DO, X) \
    DO(X, silu)                  \
    DO(X, hardswish)

#define BN_KERNELS_OF_CURVE(X, name) X(name) X(name##_gradient)

#define BN_FOR_EACH_COEFFICIENT_OPERATION(X) \
    X(scale_shift_coefficients)              \
    X(round_mean)                            \
    X(standardize)                           \
    X(gradient_coefficients)                 \
    X(grouped_gradient_coefficients)         \
    X(activation_coefficients)               \
    X(gate_coefficients)                     \
    X(unbend)                                \
    X(parameter_gradient)                    \
    X(update_running)                        \
    X(compress)                              \
    X(counted_moments)                       \
    X(counted_gradient_sums)

#define BN_FOR_EACH_CHANNEL_OPERATION(X) \
    X(merge_moments)                     \
    X(merge_counted_moments)             \
    X(merge_integer_sums)                \
    X(pool_moments)                      \
    X(merge_sums)                        \
    X(invstd)

#define BN_FOR_EACH_STORED_TYPE(X) \
    BN_FOR_EACH_WRITTEN_TYPE(X)    \
    BN_FOR_EACH_INTEGER_TYPE(X)

#define BN_FOR_EACH_WRITTEN_TYPE(X) \
    X(f16, f32)                     \
    X(bf16, f32)                    \
    X(f32, f64)

#define BN_FOR_EACH_INTEGER_TYPE(X) \
    X(i8, f32)                      \
    X(u8, f32)                      \
    X(i16, f64)                     \
    X(u16, f64)                     \
    X(i32, f64)                     \
    X(u32, f64)                     \
    X(i64, f64)                     \
    X(u64, f64)

#define BN_FOR_EACH_MEMORY_PROBE(X) \
    X(copy)                         \
    X(streaming_copy)               \
    X(read)                         \
    X(in_place)

#endif
