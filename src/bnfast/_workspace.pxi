# The memory of a call, for _core.pyx: statistics, coefficients and scratch.

cdef extern from *:
    """
    #include <stdlib.h>
    /* For sanitizers each array has a block of its own, which ends where the array does. */
    #ifdef BN_EXACT_MEMORY
    #define BN_SMALL_WORKSPACE 1
    static void *bn_new_block(size_t bytes)
    {
        void *block;
        return posix_memalign(&block, 64, 64 + bytes) == 0 ? block : NULL;
    }
    #else
    #define BN_SMALL_WORKSPACE 12288
    static void *bn_new_block(size_t bytes) { return malloc(bytes + sizeof(void *) + 63); }
    #endif
    """
    enum:
        BN_SMALL_WORKSPACE  # bytes, on the stack

    void *bn_new_block(size_t bytes_) noexcept

# Memory of one call: each array begins at a cache line, in the `small` memory of the caller as long
# as there is room, and then in a block of its own. `blocks` is the last of these, which begins with
# the address of the one before. Nothing between _begin and _end may raise.
ctypedef struct _Workspace:
    char *next
    char *end
    void *blocks
    bint failed


cdef inline _Workspace _begin(char *small, size_t bytes_) noexcept:
    cdef _Workspace workspace
    workspace.next, workspace.end = _at_line(small), small + bytes_
    workspace.blocks, workspace.failed = NULL, False
    return workspace


cdef int _end(_Workspace *workspace) except -1:
    """Give the memory back, and raise if there was none."""
    cdef void *before
    while workspace.blocks is not NULL:
        before = (<void **>workspace.blocks)[0]
        free(workspace.blocks)
        workspace.blocks = before
    if workspace.failed:
        raise MemoryError("no memory for the statistics of the channels")
    return 0


cdef void *_take(_Workspace *workspace, size_t bytes_) noexcept:
    """Memory for an array; NULL, and the call has `failed`, where there is none."""
    cdef void *taken = workspace.next
    cdef char *block
    if workspace.end >= workspace.next and bytes_ <= <size_t>(workspace.end - workspace.next):
        workspace.next = _at_line(workspace.next + bytes_)
        return taken
    block = <char *>bn_new_block(bytes_)
    if block is NULL:
        workspace.failed = True
        return NULL
    (<void **>block)[0] = workspace.blocks
    workspace.blocks = block
    return _at_line(block + sizeof(void *))


cdef void _take_scratch(
    _Workspace *workspace, bn_job *job, int threads, bint made, bint of_rows=False
) noexcept:
    """Of all threads of a job: for staged operands, or where an input is `made`.

    Made `of_rows`, it is of whole ones in channels_last.
    """
    cdef size_t wanted = bn_scratch_bytes(job.plan)
    if of_rows and job.plan.layout == BN_channels_last:
        wanted = max(wanted, <size_t>BN_ROW_SCRATCH_BYTES)
    if made or job.plan.any_staged:
        job.scratch_bytes = _padded(min(wanted, _bytes_of_repeat(job.plan)))
        job.scratch = <char *>_take(workspace, <size_t>threads * BN_BUFFERS * job.scratch_bytes)


cdef inline size_t _bytes_of_repeat(const bn_plan *c) noexcept:
    return c.outer * c.channels * c.inner * c.itemsize


cdef inline char *_at_line(char *memory) noexcept:
    return <char *>((<uintptr_t>memory + 63) // 64 * 64)


cdef double *_take_doubles(_Workspace *workspace, size_t count) noexcept:
    return <double *>_take(workspace, count * sizeof(double))


cdef const double *_widened(_Workspace *workspace, parameter, size_t count) noexcept:
    """The parameter as float64, NULL for None: a 1-d aligned contiguous float32 or float64."""
    cdef double *doubles
    if parameter is None:
        return NULL
    if cnp.PyArray_TYPE(<cnp.ndarray>parameter) == cnp.NPY_FLOAT64:
        return <const double *>_data(parameter)
    doubles = _take_doubles(workspace, count)
    if doubles is not NULL:
        active.widen[<int>BN_stored_f32](count, _data(parameter), sizeof(float), doubles)
    return doubles


cdef double *_statistic(
    _Workspace *workspace, statistic, const bn_plan *c, size_t per_group
) noexcept:
    """A statistic as float64 of each channel: 0 for None; of neighbours that have it together."""
    cdef size_t i, count = _statistics(c)
    cdef double *spread
    cdef const double *given = NULL
    if statistic is not None and per_group == 1:
        return <double *>_widened(workspace, statistic, count)
    spread = _take_doubles(workspace, count)
    if statistic is not None:
        given = _widened(workspace, statistic, count // per_group)
    for i in range(0 if workspace.failed else count):
        spread[i] = 0.0 if given is NULL else given[i // per_group]
    return spread


cdef double *_of_each_repeat(_Workspace *workspace, statistic, const bn_plan *c) noexcept:
    """Statistics of channels as float64, for all repeats the same; NULL for None."""
    cdef double *given = <double *>_widened(workspace, statistic, c.channels)
    cdef double *repeated
    cdef size_t repeat
    if c.repeats == 1 or statistic is None:
        return given
    repeated = _take_doubles(workspace, _statistics(c))
    for repeat in range(0 if workspace.failed else c.repeats):
        memcpy(repeated + repeat * c.channels, given, c.channels * sizeof(double))
    return repeated


cdef size_t _padded(size_t bytes_) noexcept nogil:
    return (bytes_ + 63) // 64 * 64


# Channels of all repeats: each has statistics of its own.
cdef inline size_t _statistics(const bn_plan *c) noexcept:
    return c.repeats * c.channels


cdef inline size_t _partials(const bn_job *job) noexcept:
    return (job.plan.blocks - 1) * job.partial_sums * _statistics(job.plan)


cdef inline size_t _coefficient_bytes(const bn_plan *c) noexcept:
    return c.repeats * bn_coefficients_length(c) * c.itemsize


cdef void _take_coefficients(
    _Workspace *workspace, const bn_plan *c, unsigned int wanted, bn_coefficients *coefficients
) noexcept:
    """Arrays for those of a set that are not there."""
    cdef int i
    for i in range(BN_COEFFICIENTS):
        if wanted >> i & 1 and coefficients.array[i] is NULL:
            coefficients.array[i] = _take(workspace, _coefficient_bytes(c))


# Sets of the statistics that jobs need.
cdef enum:
    _OF_MOMENTS = 1 << BN_MEAN | 1 << BN_MEAN_LOW | 1 << BN_M2
    _OF_NORMALIZE = _OF_MOMENTS | 1 << BN_INVSTD
    _OF_GRADIENT = 1 << BN_SUM_DY | 1 << BN_SUM_DY_XHAT


cdef void _choose_and_take(
    _Workspace *workspace, bn_job *job, unsigned int wanted, int threads, bint made=False,
    bint of_rows=False
) noexcept:
    """Choose the method of a job that says all else, and take memory for what it needs.

    For scratch, where operands are staged, an input is `made` or there is a mask; for the wanted
    statistics that the caller has not given, for their sums of blocks, and for the coefficients of
    the method.
    """
    cdef const bn_plan *c = job.plan
    cdef int i
    bn_choose_method(job)
    _take_scratch(workspace, job, threads, made or job.mask.counts is not NULL, of_rows)
    for i in range(BN_STATISTICS):
        if wanted >> i & 1 and job.statistic[i] is NULL:
            job.statistic[i] = _take_doubles(workspace, _statistics(c))
    if wanted & (1 << BN_M2 | 1 << BN_SUM_DY):
        job.partials = _take_doubles(workspace, _partials(job))
    _take_coefficients(workspace, c, job.method.coefficients, &job.coefficients)


cdef char *_data(cnp.ndarray array) noexcept:
    return <char *>cnp.PyArray_DATA(array)


cdef double *_doubles(cnp.ndarray array) noexcept:
    return <double *>cnp.PyArray_DATA(array)
