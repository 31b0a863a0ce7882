# Declarations of C, for _core.pyx alone: from _kernels/*.h, Python and NumPy. _core.pxd has those
# that _primitives.pyx needs as well.

cdef extern from "cache_sizes.h" nogil:
    ctypedef struct bn_caches:
        size_t level2
        size_t last_level

    bn_caches bn_cache_sizes()


cdef extern from "thresholds.h" nogil:
    size_t BN_SERIAL_BYTES
    size_t BN_BYTES_PER_THREAD
    size_t BN_KEEP_GIL_BYTES


cdef extern from "operands.h" nogil:
    enum:
        BN_SCRATCH_BYTES
        BN_ROW_SCRATCH_BYTES

    size_t bn_scratch_bytes(const bn_plan *plan)


cdef extern from "mask.h" nogil:
    ctypedef struct bn_stretch:
        pass

    ctypedef struct bn_mask_sizes:
        size_t count
        size_t stretches

    bint bn_mask_is_full(const bn_plan *plan, const bn_given_mask *given)
    size_t bn_mask_bytes(const bn_plan *plan)
    bn_mask bn_new_mask(
        const bn_plan *plan, const bn_given_mask *given, void *memory, bn_mask_sizes *sizes
    )
    void bn_list_stretches(const bn_plan *plan, bn_mask *mask, bn_stretch *stretches)


cdef extern from "job.h" nogil:
    enum:
        BN_MEAN
        BN_MEAN_LOW
        BN_M2
        BN_INVSTD
        BN_VARIANCE
        BN_COUNT
        BN_MINIMUM
        BN_MAXIMUM
        BN_NONFINITE
        BN_SUM_DY
        BN_SUM_DY_XHAT
        BN_SUM_ACTIVATION
        BN_STATISTICS

    ctypedef struct bn_method:
        unsigned int coefficients

    ctypedef struct bn_job:
        const bn_kernels *kernels
        const bn_plan *plan
        bn_caches caches
        char **operand
        int has_no_weight
        const double *weight
        const double *bias
        bn_activated activation
        int x_is_output
        const double *floors
        double eps
        const double *channel_eps
        double **statistic
        int constant_statistics
        const double *given_sum_dy
        const double *given_sum_dy_xhat
        double count
        int mean_low_given
        int invstd_given
        size_t parameters_of_repeat
        size_t per_group
        int centred
        double *column_sums
        double *partials
        size_t partial_sums
        int integers
        int finite_only
        bn_mask mask
        bn_coefficients coefficients
        char *scratch
        size_t scratch_bytes
        int prepared
        bn_method method

    ctypedef void bn_task(const bn_job *job, size_t number) noexcept

    ctypedef struct bn_stage:
        bn_task *task
        size_t tasks
        int once
        int serial

    void bn_choose_method(bn_job *job)

    enum:
        BN_MAX_STAGES
        BN_SUMS
        BN_SUMS_OF_SUMMARY
        BN_BUFFERS

    void bn_do_tasks(
        const bn_job *job, const bn_stage *stage, size_t thread, size_t first, size_t end
    ) noexcept
    size_t bn_moments_stages(bn_job *job, size_t threads, bn_stage *stages)
    size_t bn_normalize_stages(bn_job *job, size_t threads, bn_stage *stages)
    size_t bn_scale_shift_stages(bn_job *job, size_t threads, bn_stage *stages)
    size_t bn_gradient_stages(bn_job *job, size_t threads, bn_stage *stages)
    size_t bn_row_gradient_stages(bn_job *job, size_t threads, bn_stage *stages)


cdef extern from "dispatch.h" nogil:
    const bn_kernels *bn_built_kernels(size_t index)
    bint bn_runs_here(size_t index)
    const char *bn_kernel_name(size_t index)
    const char *bn_stored_name(bn_stored stored)
    const char *bn_activation_name(bn_activation activation)


cdef extern from "openmp_runtime.h" nogil:
    void bn_mark_forked_children()
    bint bn_is_forked_child()
    int bn_openmp_max_threads()
    int bn_openmp_version()
    const char *bn_openmp_library()
    const char *bn_compiler()


cdef extern from "system.h" nogil:
    size_t bn_allowed_processors()


cdef extern from "team.h" nogil:
    ctypedef struct bn_region_times:
        pass

    int bn_startable_threads(int wanted)
    void bn_begin_region(bn_region_times *times, int threads)
    void bn_end_own_tasks(bn_region_times *times)
    void bn_end_region(const bn_region_times *times, size_t own, size_t tasks)
    bint bn_team_was_late()


cdef extern from "float_mode.h" nogil:
    ctypedef unsigned long long bn_float_mode
    bn_float_mode BN_MODE_BITS

    bn_float_mode bn_read_float_mode()
    void bn_write_float_mode(bn_float_mode mode)
    bn_float_mode bn_enter_default_float_mode()
    void bn_leave_default_float_mode(bn_float_mode before)


cdef extern from "_guarded_function.h":
    object bn_new_guarded_function_type()


cdef extern from "output_memory.h" nogil:
    void *bn_output_malloc(void *context, size_t bytes)
    void *bn_output_calloc(void *context, size_t count, size_t size)
    void *bn_output_realloc(void *context, void *memory, size_t bytes)
    void bn_output_free(void *context, void *memory, size_t bytes)
    void bn_limit_output_pool(size_t bytes)
    size_t bn_output_pool_bytes()
    void *bn_line_malloc(void *context, size_t bytes)
    void *bn_line_calloc(void *context, size_t count, size_t size)
    void *bn_line_realloc(void *context, void *memory, size_t bytes)
    void bn_line_free(void *context, void *memory, size_t bytes)


cdef extern from "Python.h":
    int PyTraceMalloc_Track(unsigned int domain, uintptr_t memory, size_t bytes_)


cdef extern from "numpy/arrayobject.h":
    ctypedef struct PyDataMemAllocator:
        void *ctx
        void *(*malloc)(void *, size_t) noexcept nogil
        void *(*calloc)(void *, size_t, size_t) noexcept nogil
        void *(*realloc)(void *, void *, size_t) noexcept nogil
        void (*free)(void *, void *, size_t) noexcept nogil

    ctypedef struct PyDataMem_Handler:
        char name[127]
        unsigned char version
        PyDataMemAllocator allocator

    ctypedef struct PyArrayObject_fields:
        PyObject *mem_handler
