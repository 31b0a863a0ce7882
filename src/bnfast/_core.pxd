# What rooms above may call in C: _primitives.

cimport numpy as cnp
from libc.stddef cimport ptrdiff_t, size_t


cdef extern from "kernels.h" nogil:
    enum:
        BN_WIDE_ROW

    ctypedef enum bn_dtype:
        BN_f32
        BN_f64

    enum:
        BN_f16
        BN_bf16

    ctypedef enum bn_stored:
        BN_as_computed
        BN_stored_f32
        BN_STORED_TYPES

    ctypedef enum bn_activation:
        BN_no_activation
        BN_activation_piecewise
        BN_ACTIVATIONS

    ctypedef struct bn_activated:
        bn_activation kind
        double slope
        double floor
        double ceiling
        int closed

    ctypedef enum bn_layout:
        BN_contiguous
        BN_channels_last

    enum:
        BN_COEFFICIENTS
        BN_OUTPUT_COEFFICIENTS

    ctypedef struct bn_coefficients:
        void **array

    ctypedef void bn_widen_kernel(size_t count, const char *from_, ptrdiff_t step,
                                  void *to) noexcept
    ctypedef int bn_update_running_kernel(size_t channels, size_t repeats, double momentum,
                                          const double *divided, double divisor,
                                          void *running) noexcept
    ctypedef void bn_parameter_gradient_kernel(size_t channels, size_t repeats,
                                               const double *sums, void *gradient) noexcept
    ctypedef void bn_merge_moments_kernel(size_t channels, size_t count_a, double *mean_a,
                                          double *mean_low_a, double *m2_a, size_t count_b,
                                          const double *mean_b, const double *mean_low_b,
                                          const double *m2_b) noexcept
    ctypedef void bn_invstd_kernel(size_t channels, const double *divided, double divisor,
                                   double eps, const double *channel_eps,
                                   double *result) noexcept
    ctypedef float bn_memory_probe(size_t lines, const float *start, float *to) noexcept

    ctypedef struct bn_kernels:
        const char *isa
        const char *flags
        bn_widen_kernel **widen
        bn_update_running_kernel *update_running[2]
        bn_parameter_gradient_kernel *parameter_gradient[2]
        bn_merge_moments_kernel *merge_moments
        bn_invstd_kernel *invstd
        bn_memory_probe *probe_copy
        bn_memory_probe *probe_streaming_copy
        bn_memory_probe *probe_read
        bn_memory_probe *probe_in_place


cdef extern from "plan.h" nogil:
    enum:
        BN_X
        BN_DY
        BN_ELEMENT_WEIGHT
        BN_ELEMENT_BIAS
        BN_MASK
        BN_RESIDUAL
        BN_Y
        BN_DX
        BN_DRESIDUAL
        BN_MAX_AXES

    ctypedef struct bn_operand:
        int staged
        bn_stored stored
        ptrdiff_t outer_stride
        ptrdiff_t channel_stride
        ptrdiff_t *outer_axis_strides
        ptrdiff_t *inner_axis_strides
        ptrdiff_t *repeat_axis_strides
        ptrdiff_t *channel_axis_strides

    ctypedef struct bn_plan:
        bn_layout layout
        bn_dtype dtype
        size_t itemsize
        size_t stored_itemsize
        int element_type
        size_t element_bytes
        const bn_plan *converted
        const bn_plan *as_stored
        size_t repeats
        size_t repeat_axes
        size_t *repeat_axis_sizes
        size_t channel_axes
        size_t *channel_axis_sizes
        size_t outer
        size_t channels
        size_t inner
        size_t outer_axes
        size_t inner_axes
        size_t *outer_axis_sizes
        size_t *inner_axis_sizes
        size_t chunk_outer
        size_t chunk_inner
        size_t chunks_per_run
        size_t chunks
        size_t chunks_per_block
        size_t blocks
        size_t interleave
        size_t rows_of_block
        int any_staged
        bn_operand *operand

    size_t bn_coefficients_length(const bn_plan *plan)
    size_t bn_row_blocks(const bn_plan *plan)


cdef extern from "mask.h" nogil:
    ctypedef struct bn_given_mask:
        const unsigned char *data
        ptrdiff_t repeat_stride
        size_t axes
        size_t *sizes
        ptrdiff_t *strides

    ctypedef struct bn_mask:
        const unsigned char *counts
        const size_t *total
        int keeps_input


cdef class Plan:
    cdef bn_plan c
    cdef Plan converted
    cdef readonly tuple walked
    cdef readonly bint in_order


cdef class Mask:
    cdef bn_mask c
    cdef readonly size_t count  # values that count of each channel, over all repeats
    cdef void *memory
    cdef void *stretches


cdef Mask new_mask(Plan plan, const bn_given_mask *given, bint keeps_input)


cdef class Activation:
    cdef bn_activated c
    cdef readonly str parameter


cdef class _Prepared:
    cdef object weight, bias, mean, variance, invstd, memory
    cdef double eps
    cdef bn_dtype dtype
    cdef size_t length
    cdef bn_coefficients coefficients

    cdef bint is_of(self, Plan plan, weight, bias, double eps, mean, variance) noexcept


cdef class Evaluation:
    cdef _Prepared prepared


cpdef cnp.ndarray empty_output(cnp.ndarray x)

cdef int moments(Plan plan, x, mean, mean_low, m2, int threads) except -1
cdef int summary(
    Plan plan, x, mask, mean, mean_low, m2, count, minimum, maximum, nonfinite, bint integers,
    bint finite_only, int threads
) except -1
cdef int normalize(
    Plan plan, x, y, weight, bias, double eps, mean, invstd, m2, size_t per_group,
    bint centred, running_mean, running_var, double momentum, double correction,
    Activation activation, floors, channel_eps, int threads, residual=*, Mask mask=*
) except -1
cdef int scale_shift(
    Plan plan, x, y, weight, bias, double eps, mean, variance, bint of_samples,
    Evaluation evaluation, int threads, Activation activation=*, residual=*,
    Mask mask=*
) except -1
cdef int gradient(
    Plan plan, x, dy, dx, weight, mean, invstd, dweight, dbias, size_t per_group,
    bint constant_statistics, bias, Activation activation, floors, dfloors, sum_activation, sum_dy,
    sum_dy_xhat, int threads, residual=*, y=*, dresidual=*, Mask mask=*, bint x_is_output=*
) except -1
cdef int parameter_gradient(sums, gradient) except -1
cdef int gradient_of_samples(
    Plan plan, x, dy, dx, weight, mean, invstd, sum_dy, sum_dy_xhat, int threads
) except -1
cdef int normalize_rows(
    Plan plan, x, y, weight, bias, double eps, mean, invstd, Activation activation, residual,
    int threads
) except -1
cdef int row_gradient(
    Plan plan, x, dy, dx, weight, bias, mean, invstd, sums, Activation activation, residual, y,
    dresidual, bint has_no_weight, int threads
) except -1
cdef int invstd(variance, double eps, result) except -1
cdef int normalize_part(
    Plan plan, x, y, weight, bias, mean, mean_low, inverse_std, int threads
) except -1
cdef int gradient_sums(
    Plan plan, x, dy, mean, mean_low, invstd, sum_dy, sum_dy_xhat, int threads
) except -1
cdef int input_gradient(
    Plan plan, x, dy, dx, weight, mean, mean_low, invstd, sum_dy, sum_dy_xhat, double count,
    int threads
) except -1
cdef int merge_moments(counts, moments, merged) except -1
cdef int update_running(running, divided, double momentum, double divisor) except -1
