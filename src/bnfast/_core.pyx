# The only Cython room: buffers in, GIL off, prange over the tasks of each phase.
# It knows neither the formulas nor the strides: jobs are made here, done in schedule.c and tasks.c.
"""Compiled core of bnfast. Private: call it through ``_primitives`` only."""

cimport cython
cimport numpy as cnp
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_INCREF
from cython.parallel cimport prange
from libc.stddef cimport ptrdiff_t, size_t
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset, strcpy

import numpy

cnp.import_array()


cdef extern from "cache_sizes.h" nogil:
    ctypedef struct bn_caches:
        size_t level2
        size_t last_level

    bn_caches bn_cache_sizes()


cdef extern from "thresholds.h" nogil:
    size_t BN_SERIAL_BYTES
    size_t BN_BYTES_PER_THREAD
    size_t BN_BRIEF_BYTES


cdef extern from "operands.h" nogil:
    enum:
        BN_SCRATCH_BYTES


cdef extern from "job.h" nogil:
    ctypedef struct bn_job:
        const bn_kernels *kernels
        const bn_geometry *geometry
        bn_caches caches
        char **operand
        const double *weight
        const double *bias
        const double *floor
        double eps
        const double *more_eps
        double *mean
        double *mean_low
        double *m2
        double *invstd
        const double *variance
        double *sum_dy
        double *sum_dy_xhat
        double *sum_floored
        int constant_statistics
        size_t parameters_of_repeat
        size_t shared
        int uncentred
        double *column_sums
        double *partials
        bn_coefficients coefficients
        char *scratch
        size_t scratch_bytes
        int prepared

    ctypedef void bn_task(const bn_job *job, size_t number) noexcept

    ctypedef struct bn_phase:
        bn_task *task
        size_t tasks
        int of_all
        int brief

    enum:
        BN_MAX_PHASES
        BN_SUMS
        BN_BUFFERS

    void bn_do_tasks(
        const bn_job *job, const bn_phase *phase, size_t thread, size_t first, size_t end
    ) noexcept
    size_t bn_moments_phases(bn_job *job, size_t threads, bn_phase *phases)
    size_t bn_normalize_phases(bn_job *job, size_t threads, bn_phase *phases)
    size_t bn_scale_shift_phases(bn_job *job, size_t threads, bn_phase *phases)
    size_t bn_gradient_phases(bn_job *job, size_t threads, bn_phase *phases)
    size_t bn_row_gradient_phases(bn_job *job, size_t threads, bn_phase *phases)
    void bn_parameter_gradients(const bn_job *job, bn_dtype dtype, void *dweight, void *dbias)


cdef extern from "dispatch.h" nogil:
    const bn_kernels *bn_built_kernels(size_t index)
    bint bn_runs_here(size_t index)
    const char *bn_kernel_name(size_t index)


cdef extern from "openmp_runtime.h" nogil:
    void bn_mark_forked_children()
    bint bn_is_forked_child()
    size_t bn_allowed_processors()
    int bn_openmp_max_threads()
    int bn_openmp_version()
    const char *bn_openmp_library()
    const char *bn_compiler()


cdef extern from "team.h" nogil:
    ctypedef struct bn_region_times:
        pass

    int bn_startable_threads(int wanted)
    void bn_begin_region(bn_region_times *times)
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


HAS_OPENMP = bn_openmp_version() > 0
SERIAL_BYTES = BN_SERIAL_BYTES
BYTES_PER_THREAD = BN_BYTES_PER_THREAD

# Set once at import by _configuration, before anything can run; use_isa is for tests only.
cdef const bn_kernels *active = bn_built_kernels(0)

cdef bn_caches caches = bn_cache_sizes()


def built_isas():
    """Return ``{name: flags}`` of the variants in this build, best first."""
    cdef size_t index = 0
    built = {}
    while bn_built_kernels(index) is not NULL:
        built[bn_built_kernels(index).isa.decode()] = bn_built_kernels(index).flags.decode()
        index += 1
    return built


def available_isas():
    """Return the names of the variants that this machine can run, best first."""
    return tuple(isa for index, isa in enumerate(built_isas()) if bn_runs_here(index))


def active_isa():
    """Return the name of the variant in use."""
    return active.isa.decode()


def activate(isa):
    """Use the variant called `isa`; it must be one of `available_isas`."""
    global active
    names = list(built_isas())
    if isa not in available_isas():
        raise ValueError(f"isa must be one of {available_isas()}, got {isa!r}")
    active = bn_built_kernels(<size_t>names.index(isa))


def cache_sizes():
    """Return the bytes of the second and of the last level of cache that schedules go by."""
    return caches.level2, caches.last_level


def assume_cache_sizes(size_t level2, size_t last_level):
    """Go by other sizes of the caches: for tests, which make all schedules run on any machine."""
    caches.level2, caches.last_level = level2, last_level


GuardedFunction = bn_new_guarded_function_type()  # see _float_mode


def float_mode():
    """Return this thread's float mode, as its control register says it; 0 where that is unknown."""
    return bn_read_float_mode() & BN_MODE_BITS


def assume_float_mode(bn_float_mode mode):
    """Write that register: for tests, which call from any mode."""
    bn_write_float_mode(mode)


def kernel_names():
    """Return the name of every kernel that each variant has."""
    cdef size_t index = 0
    names = []
    while bn_kernel_name(index) is not NULL:
        names.append(bn_kernel_name(index).decode())
        index += 1
    return tuple(names)


bn_mark_forked_children()


def is_forked_child():
    """Return whether this process was forked, by Python or not, after bnfast had been imported."""
    return bn_is_forked_child()


def allowed_processors():
    """Return how many processors this thread may run on, now; 0 where the system does not say."""
    return bn_allowed_processors()


def openmp_max_threads():
    """Return OpenMP's own thread setting, read now; 1 without OpenMP."""
    return bn_openmp_max_threads()


def startable_threads(int wanted):
    """Return how many of so many threads the system lets this thread's team have."""
    return bn_startable_threads(wanted)


def team_was_late():
    """Return whether this thread had better work alone for now: its team made calls longer."""
    return bn_team_was_late()


def build_facts():
    """Return the compiler, the OpenMP version (0 without) and the OpenMP library in use."""
    library = bn_openmp_library()
    return {
        "compiler": bn_compiler().decode(),
        "openmp_version": bn_openmp_version(),
        "openmp_library": None if library is NULL else library.decode(),
    }


cdef class Geometry:
    """A `LayoutPlan` in C; immutable."""

    def __init__(self, plan, roles):
        """Of a plan whose operands have these roles."""
        cdef bn_geometry *c = &self.c
        cdef bn_operand *operand
        cdef Py_ssize_t role, axis, itemsize = plan.itemsize
        if BN_MAX_AXES < max(
            map(len, (plan.repeat_axis_sizes, plan.channel_axis_sizes, plan.outer_axis_sizes,
                      plan.inner_axis_sizes))
        ):
            raise ValueError("the plan has too many axes")
        if plan.chunk_outer * plan.chunk_inner * itemsize > BN_SCRATCH_BYTES:
            raise ValueError("the plan's chunks do not fit the scratch memory of operands.h")
        if plan.phases < 1 or (plan.phases > 1 and plan.phases * plan.channels > BN_WIDE_ROW):
            raise ValueError("the plan's wide rows do not fit those of kernels.h")
        memset(c, 0, sizeof(bn_geometry))
        c.layout = BN_contiguous if plan.layout == "contiguous" else BN_channels_last
        c.dtype = BN_f32 if itemsize == 4 else BN_f64
        c.itemsize = itemsize
        c.repeats = plan.repeats
        c.repeat_axes = len(plan.repeat_axis_sizes)
        for axis, size in enumerate(plan.repeat_axis_sizes):
            c.repeat_axis_sizes[axis] = size
        c.channel_axes = len(plan.channel_axis_sizes)
        for axis, size in enumerate(plan.channel_axis_sizes):
            c.channel_axis_sizes[axis] = size
        c.outer, c.channels, c.inner = plan.outer, plan.channels, plan.inner
        c.outer_axes = len(plan.outer_axis_sizes)
        c.inner_axes = len(plan.inner_axis_sizes)
        for axis, size in enumerate(plan.outer_axis_sizes):
            c.outer_axis_sizes[axis] = size
        for axis, size in enumerate(plan.inner_axis_sizes):
            c.inner_axis_sizes[axis] = size
        c.chunk_outer, c.chunk_inner = plan.chunk_outer, plan.chunk_inner
        c.chunks_per_run, c.chunks = plan.chunks_per_run, plan.chunks
        c.chunks_per_block, c.blocks = plan.chunks_per_block, plan.blocks
        c.phases = plan.phases
        c.rows_of_block = plan.rows_of_block
        self.walked = plan.walked
        self.in_order = plan.walked == tuple(sorted(plan.walked))
        for role, layout in zip(roles, plan.operands, strict=True):
            operand = &c.operand[role]
            operand.packed = not layout.direct
            c.any_packed |= operand.packed
            for axis, stride in enumerate(layout.repeat_axis_strides):
                operand.repeat_axis_strides[axis] = stride
            for axis, stride in enumerate(layout.channel_axis_strides):
                operand.channel_axis_strides[axis] = stride
            if layout.direct:
                operand.outer_stride = <ptrdiff_t>layout.outer_stride // itemsize
                operand.channel_stride = <ptrdiff_t>layout.channel_stride // itemsize
            else:
                operand.channel_stride = layout.channel_stride
                for axis, stride in enumerate(layout.outer_axis_strides):
                    operand.outer_axis_strides[axis] = stride
                for axis, stride in enumerate(layout.inner_axis_strides):
                    operand.inner_axis_strides[axis] = stride

    @property
    def row_blocks(self):
        """How many blocks of rows have sums of their own."""
        return bn_row_blocks(&self.c)


cdef enum:
    SMALL_WORKSPACE = 16384  # bytes, on the stack

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
    block = <char *>malloc(bytes_ + sizeof(void *) + 63)
    if block is NULL:
        workspace.failed = True
        return NULL
    (<void **>block)[0] = workspace.blocks
    workspace.blocks = block
    return _at_line(block + sizeof(void *))


cdef void _take_scratch(
    _Workspace *workspace, bn_job *job, int threads, bint made=False
) noexcept:
    """Of all threads of a job: for packed operands, or where an input is `made`."""
    if made or job.geometry.any_packed:
        job.scratch_bytes = _padded(min(<size_t>BN_SCRATCH_BYTES, _bytes_of_repeat(job.geometry)))
        job.scratch = <char *>_take(workspace, <size_t>threads * BN_BUFFERS * job.scratch_bytes)


cdef inline size_t _bytes_of_repeat(const bn_geometry *c) noexcept:
    return c.outer * c.channels * c.inner * c.itemsize


cdef inline char *_at_line(char *memory) noexcept:
    return <char *>((<uintptr_t>memory + 63) // 64 * 64)


cdef double *_take_doubles(_Workspace *workspace, size_t count) noexcept:
    return <double *>_take(workspace, count * sizeof(double))


cdef const double *_widened(_Workspace *workspace, parameter, size_t count) noexcept:
    """The parameter as float64, NULL for None: a 1-d aligned contiguous float32 or float64."""
    cdef double *wide
    if parameter is None:
        return NULL
    if cnp.PyArray_TYPE(<cnp.ndarray>parameter) == cnp.NPY_FLOAT64:
        return <const double *>_data(parameter)
    wide = _take_doubles(workspace, count)
    if wide is not NULL:
        active.widen(count, <const float *>_data(parameter), wide)
    return wide


cdef double *_statistic(
    _Workspace *workspace, statistic, const bn_geometry *c, size_t shared
) noexcept:
    """A statistic as float64 of each channel: 0 for None; of neighbours that have it together."""
    cdef size_t i, count = _statistics(c)
    cdef double *spread
    cdef const double *given = NULL
    if statistic is not None and shared == 1:
        return <double *>_widened(workspace, statistic, count)
    spread = _take_doubles(workspace, count)
    if statistic is not None:
        given = _widened(workspace, statistic, count // shared)
    for i in range(0 if workspace.failed else count):
        spread[i] = 0.0 if given is NULL else given[i // shared]
    return spread


cdef double *_of_each_repeat(_Workspace *workspace, statistic, const bn_geometry *c) noexcept:
    """Statistics of channels as float64, for all repeats the same."""
    cdef double *given = <double *>_widened(workspace, statistic, c.channels)
    cdef double *repeated
    cdef size_t repeat
    if c.repeats == 1:
        return given
    repeated = _take_doubles(workspace, _statistics(c))
    for repeat in range(0 if workspace.failed else c.repeats):
        memcpy(repeated + repeat * c.channels, given, c.channels * sizeof(double))
    return repeated


cdef size_t _padded(size_t bytes_) noexcept nogil:
    return (bytes_ + 63) // 64 * 64


# Channels of all repeats: each has statistics of its own.
cdef inline size_t _statistics(const bn_geometry *c) noexcept:
    return c.repeats * c.channels


cdef inline size_t _partials(const bn_geometry *c) noexcept:
    return (c.blocks - 1) * BN_SUMS * _statistics(c)


cdef inline size_t _coefficient_bytes(const bn_geometry *c) noexcept:
    return c.repeats * bn_coefficients_length(c) * c.itemsize


cdef void _take_coefficients(
    _Workspace *workspace, const bn_geometry *c, unsigned int wanted, bn_coefficients *coefficients
) noexcept:
    """Arrays for a set of coefficients."""
    cdef int i
    for i in range(BN_COEFFICIENTS):
        if wanted >> i & 1:
            coefficients.array[i] = _take(workspace, _coefficient_bytes(c))


cdef char *_data(cnp.ndarray array) noexcept:
    return <char *>cnp.PyArray_DATA(array)


cdef double *_doubles(cnp.ndarray array) noexcept:
    return <double *>cnp.PyArray_DATA(array)


ctypedef size_t (*bn_phases)(bn_job *job, size_t threads, bn_phase *phases) noexcept nogil


cdef bn_job _new_job(const bn_geometry *geometry) noexcept:
    cdef bn_job job
    memset(&job, 0, sizeof(bn_job))
    job.kernels, job.geometry, job.caches = active, geometry, caches
    job.shared = 1
    return job


cdef int _do_all(
    bn_job *job, _Workspace *workspace, bn_phases phases_of, int threads
) except -1:
    """Do a job, if all of its memory was to be had."""
    cdef const bn_geometry *c = job.geometry
    if workspace.failed:
        return _end(workspace)
    if threads == 1 and c.repeats * _bytes_of_repeat(c) < BN_BRIEF_BYTES:
        _do(job, phases_of, 1)
    else:
        with nogil:
            _do(job, phases_of, threads)
    return 0


cdef void _do(bn_job *job, bn_phases phases_of, int threads) noexcept nogil:
    cdef bn_phase phases[BN_MAX_PHASES]
    cdef size_t phase
    for phase in range(phases_of(job, threads, phases)):
        _run_phase(job, &phases[phase], threads)


cdef void _run_phase(const bn_job *job, const bn_phase *phase, int threads) noexcept nogil:
    cdef size_t repeats = 1 if phase.of_all else job.geometry.repeats
    cdef Py_ssize_t part, tasks = <Py_ssize_t>(repeats * phase.tasks)
    cdef bn_region_times times
    if threads == 1 or tasks == 1 or phase.brief:
        # No OpenMP region at all: cheaper, and safe in a forked child.
        bn_do_tasks(job, phase, 0, 0, <size_t>tasks)
    else:
        # All threads, also of fewer tasks: see thresholds.h.
        bn_begin_region(&times)
        for part in prange(threads, num_threads=threads, schedule="static"):
            _do_part(job, phase, <size_t>part, <size_t>tasks, <size_t>threads)
            if part == 0:  # the calling thread's
                bn_end_own_tasks(&times)
        bn_end_region(&times, <size_t>(tasks // threads), <size_t>tasks)


cdef void _do_part(
    const bn_job *job, const bn_phase *phase, size_t part, size_t tasks, size_t parts
) noexcept nogil:
    """Do some tasks in a thread of OpenMP's, which may have inherited any float mode."""
    cdef bn_float_mode before = bn_enter_default_float_mode()
    bn_do_tasks(job, phase, part, part * tasks // parts, (part + 1) * tasks // parts)
    bn_leave_default_float_mode(before)


cdef int moments(Geometry geometry, x, mean, mean_low, m2, int threads) except -1:
    """Write the mean and m2 of every channel of x (float64), and what rounding left of the mean.

    `mean_low` may be None.
    """
    cdef bn_geometry *c = &geometry.c
    cdef bn_job job = _new_job(c)
    cdef char small[SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, SMALL_WORKSPACE)
    _take_scratch(&workspace, &job, threads)
    job.operand[BN_X] = _data(x)
    job.mean, job.m2 = _doubles(mean), _doubles(m2)
    if mean_low is None:
        job.mean_low = _take_doubles(&workspace, _statistics(c))
    else:
        job.mean_low = _doubles(mean_low)
    job.partials = _take_doubles(&workspace, _partials(c))
    _do_all(&job, &workspace, bn_moments_phases, threads)
    _end(&workspace)
    return 0


cdef int normalize(
    Geometry geometry, x, y, weight, bias, double eps, mean, invstd, m2, size_t shared,
    bint centred, running_mean, running_var, double momentum, double correction, floor, more_eps,
    int threads
) except -1:
    """Write y, mean and invstd (float64) from the statistics of x, and update the running ones.

    Return MEAN_TOO_LARGE or VAR_TOO_LARGE, or both, of those whose dtype has become too small for a
    finite value; else 0.

    Mean and invstd have one value for each channel of each repeat, or for each `shared` neighbours
    that have their statistics together; m2, which may be None, for each channel. The running
    variance takes m2 / (count - correction), averaged over the repeats as the mean is. Channels may
    have a floor, and an eps of their own besides.
    """
    cdef bn_geometry *c = &geometry.c
    cdef bn_job job = _new_job(c)
    cdef char small[SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, SMALL_WORKSPACE)
    cdef double values
    cdef int too_large = 0
    cdef size_t i
    cdef unsigned int coefficients = (
        BN_OUTPUT_COEFFICIENTS if floor is None else BN_FLOORED_OUTPUT_COEFFICIENTS
    )
    _take_scratch(&workspace, &job, threads)
    job.operand[BN_X], job.operand[BN_Y] = _data(x), _data(y)
    job.weight = _widened(&workspace, weight, c.channels)
    job.bias = _widened(&workspace, bias, c.channels)
    job.floor = _widened(&workspace, floor, c.channels)
    job.eps, job.more_eps = eps, _widened(&workspace, more_eps, c.channels)
    if shared == 1:
        job.mean, job.invstd = _doubles(mean), _doubles(invstd)
    else:
        job.mean = _take_doubles(&workspace, _statistics(c))
        job.invstd = _take_doubles(&workspace, _statistics(c))
    job.mean_low = _take_doubles(&workspace, _statistics(c))
    if m2 is None:
        job.m2 = _take_doubles(&workspace, _statistics(c))
    else:
        job.m2 = _doubles(m2)
    _take_coefficients(&workspace, c, coefficients, &job.coefficients)
    job.partials = _take_doubles(&workspace, _partials(c))
    job.shared, job.uncentred = shared, not centred
    _do_all(&job, &workspace, bn_normalize_phases, threads)
    if shared > 1:
        for i in range(_statistics(c) // shared):
            _doubles(mean)[i] = job.mean[i * shared]
            _doubles(invstd)[i] = job.invstd[i * shared]
    if running_mean is not None:
        if _update_running(running_mean, c.repeats, momentum, job.mean, 1.0):
            too_large |= _MEAN_TOO_LARGE
    if running_var is not None:
        values = <double>(c.outer * c.inner)
        if _update_running(running_var, c.repeats, momentum, job.m2, values - correction):
            too_large |= _VAR_TOO_LARGE
    _end(&workspace)
    return too_large


cdef bn_dtype _dtype(cnp.ndarray array) noexcept:
    return BN_f32 if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32 else BN_f64


cdef enum:
    _MEAN_TOO_LARGE = 1
    _VAR_TOO_LARGE = 2

MEAN_TOO_LARGE = _MEAN_TOO_LARGE
VAR_TOO_LARGE = _VAR_TOO_LARGE


cdef int _update_running(
    cnp.ndarray running, size_t repeats, double momentum, const double *divided, double divisor
) noexcept:
    return active.update_running[<int>_dtype(running)](
        <size_t>cnp.PyArray_SIZE(running), repeats, momentum, divided, divisor, _data(running)
    )


cdef int update_running(running, divided, double momentum, double divisor) except -1:
    """Blend divided / divisor, float64 and as large, into a running statistic.

    Return whether its dtype has become too small for a finite value.
    """
    return _update_running(running, 1, momentum, _doubles(divided), divisor) != 0


cdef size_t _OUTPUT_COEFFICIENTS = bin(BN_OUTPUT_COEFFICIENTS).count("1")


cdef class _Prepared:
    """Copies of parameters and statistics, and the coefficients made of them; immutable."""

    def __cinit__(self, Geometry geometry, weight, bias, double eps, mean, variance):
        cdef bn_geometry *c = &geometry.c
        cdef _Workspace arrays
        cdef size_t bytes_ = _OUTPUT_COEFFICIENTS * _padded(_coefficient_bytes(c)) + 64
        self.weight, self.bias = _copied(weight), _copied(bias)
        self.mean, self.variance = _copied(mean), _copied(variance)
        self.invstd = _empty_channels(<Py_ssize_t>c.channels, cnp.NPY_FLOAT64)
        self.eps, self.dtype, self.length = eps, c.dtype, bn_coefficients_length(c)
        self.memory = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>bytes_)
        arrays = _begin(<char *>self.memory, bytes_)
        _take_coefficients(&arrays, c, BN_OUTPUT_COEFFICIENTS, &self.coefficients)

    cdef bint is_of(self, Geometry geometry, weight, bias, double eps, mean, variance) noexcept:
        cdef bn_geometry *c = &geometry.c
        return (
            self.dtype == c.dtype
            and self.length == bn_coefficients_length(c)
            and self.eps == eps
            and _is_same(self.mean, mean)
            and _is_same(self.variance, variance)
            and _is_same(self.weight, weight)
            and _is_same(self.bias, bias)
        )


cdef inline cnp.ndarray _empty_channels(Py_ssize_t channels, int kind):
    cdef cnp.npy_intp size = channels
    return cnp.PyArray_EMPTY(1, &size, kind, 0)


cdef object _copied(array):
    return None if array is None else cnp.PyArray_NewCopy(array, cnp.NPY_CORDER)


cdef inline bint _is_same(kept, now) noexcept:
    """Two plain arrays of the same bytes and dtype, or None twice."""
    if kept is None or now is None:
        return kept is now
    cdef cnp.ndarray a = kept, b = now
    return (
        cnp.PyArray_TYPE(a) == cnp.PyArray_TYPE(b)
        and cnp.PyArray_NBYTES(a) == cnp.PyArray_NBYTES(b)
        and memcmp(_data(a), _data(b), <size_t>cnp.PyArray_NBYTES(a)) == 0
    )


cdef class Evaluation:
    """What `scale_shift` has prepared, for as long as parameters and statistics stay the same.

    They may be changed in place: each call compares them with copies, which costs far less than to
    prepare them again.
    """

    @property
    def saved(self):
        """(mean, invstd, weight) of the last call, never written again; None before the first."""
        cdef _Prepared prepared
        with cython.critical_section(self):
            prepared = self.prepared
        return None if prepared is None else (prepared.mean, prepared.invstd, prepared.weight)

    def __reduce__(self):
        return Evaluation, ()


cdef int scale_shift(
    Geometry geometry, x, y, weight, bias, double eps, mean, variance, bint of_samples,
    Evaluation kept, int threads
) except -1:
    """Write y from given statistics; what is prepared for it is kept, unless `kept` is None.

    Where weight and bias are those `of_samples`, the repeats, these have the same statistics.
    """
    cdef bn_geometry *c = &geometry.c
    cdef bn_job job = _new_job(c)
    cdef char small[SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, SMALL_WORKSPACE)
    cdef _Prepared prepared = None
    if kept is not None:
        with cython.critical_section(kept):
            prepared = kept.prepared  # a reference: another thread may replace it meanwhile
        job.prepared = (
            prepared is not None and prepared.is_of(geometry, weight, bias, eps, mean, variance)
        )
        if not job.prepared:
            prepared = _Prepared(geometry, weight, bias, eps, mean, variance)
            weight, bias, mean, variance = (
                prepared.weight, prepared.bias, prepared.mean, prepared.variance
            )
    _take_scratch(&workspace, &job, threads)
    job.operand[BN_X], job.operand[BN_Y] = _data(x), _data(y)
    job.eps = eps
    if prepared is not None:
        job.invstd, job.coefficients = _doubles(prepared.invstd), prepared.coefficients
    else:
        job.invstd = _take_doubles(&workspace, _statistics(c))
        _take_coefficients(&workspace, c, BN_OUTPUT_COEFFICIENTS, &job.coefficients)
    if not job.prepared:
        if of_samples:
            job.parameters_of_repeat = c.channels
        job.weight = _widened(&workspace, weight, _statistics(c) if of_samples else c.channels)
        job.bias = _widened(&workspace, bias, _statistics(c) if of_samples else c.channels)
        job.mean = _of_each_repeat(&workspace, mean, c)
        job.variance = _of_each_repeat(&workspace, variance, c)
    _do_all(&job, &workspace, bn_scale_shift_phases, threads)
    _end(&workspace)
    if kept is not None and not job.prepared:
        with cython.critical_section(kept):
            kept.prepared = prepared
    return 0


cdef int gradient(
    Geometry geometry, x, dy, dx, weight, mean, invstd, dweight, dbias, size_t shared,
    bint constant_statistics, bias, floor, dfloor, sum_floored, sum_dy_xhat, int threads
) except -1:
    """Write dx, dweight and dbias; mean and invstd are as `normalize` writes them, or mean is None.

    With a floor, which needs the bias, dy counts where y was not below it; `dfloor` receives its
    sum where y was. `sum_floored` and `sum_dy_xhat` (float64, as large as the mean) receive that
    sum for each repeat, and sum(dy * (x - mean) * invstd). All three may be None.
    """
    cdef bn_geometry *c = &geometry.c
    cdef unsigned int coefficients = BN_GRADIENT_COEFFICIENTS
    cdef bint centred = mean is not None
    if constant_statistics:
        coefficients = BN_CONSTANT_GRADIENT_COEFFICIENTS
    elif floor is not None:
        coefficients = BN_FLOORED_GRADIENT_COEFFICIENTS
    elif shared > 1:
        coefficients = BN_SHARED_GRADIENT_COEFFICIENTS
    cdef bn_job job = _new_job(c)
    cdef char small[SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, SMALL_WORKSPACE)
    _take_scratch(&workspace, &job, threads, floor is not None)
    job.operand[BN_X], job.operand[BN_DY], job.operand[BN_DX] = _data(x), _data(dy), _data(dx)
    job.weight = _widened(&workspace, weight, c.channels)
    job.mean = _statistic(&workspace, mean, c, shared)
    job.invstd = _statistic(&workspace, invstd, c, shared)
    job.sum_dy = _take_doubles(&workspace, _statistics(c))
    if sum_dy_xhat is None:
        job.sum_dy_xhat = _take_doubles(&workspace, _statistics(c))
    else:
        job.sum_dy_xhat = _doubles(sum_dy_xhat)
    if floor is not None:
        job.bias = _widened(&workspace, bias, c.channels)
        job.floor = _widened(&workspace, floor, c.channels)
        if sum_floored is None:
            job.sum_floored = _take_doubles(&workspace, _statistics(c))
        else:
            job.sum_floored = _doubles(sum_floored)
    if c.dtype == BN_f64 and centred and not constant_statistics:
        job.mean_low = _take_doubles(&workspace, _statistics(c))
    job.constant_statistics = constant_statistics
    job.shared, job.uncentred = shared, not centred
    _take_coefficients(&workspace, c, coefficients, &job.coefficients)
    job.partials = _take_doubles(&workspace, _partials(c))
    _do_all(&job, &workspace, bn_gradient_phases, threads)
    bn_parameter_gradients(&job, _dtype(dweight), _data(dweight), _data(dbias))
    if dfloor is not None:
        job.kernels.parameter_gradients[<int>_dtype(dfloor)](
            c.channels, c.repeats, job.sum_floored, job.sum_floored, _data(dfloor), _data(dfloor)
        )
    _end(&workspace)
    return 0


cdef int gradient_of_samples(
    Geometry geometry, x, dy, dx, weight, mean, invstd, sum_dy, sum_dy_xhat, int threads
) except -1:
    """Write dx = dy * weight * invstd, with a weight (float64) for each channel of each repeat.

    All repeats have the same statistics, which did not come from x; `sum_dy` and `sum_dy_xhat`
    (float64, as large as the weight) receive sum(dy) and sum(dy * (x - mean) * invstd) of each.
    """
    cdef bn_geometry *c = &geometry.c
    cdef bn_job job = _new_job(c)
    cdef char small[SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, SMALL_WORKSPACE)
    _take_scratch(&workspace, &job, threads)
    job.operand[BN_X], job.operand[BN_DY], job.operand[BN_DX] = _data(x), _data(dy), _data(dx)
    job.weight, job.parameters_of_repeat = _doubles(weight), c.channels
    job.mean = _of_each_repeat(&workspace, mean, c)
    job.invstd = _of_each_repeat(&workspace, invstd, c)
    job.sum_dy, job.sum_dy_xhat = _doubles(sum_dy), _doubles(sum_dy_xhat)
    job.constant_statistics = True
    _take_coefficients(&workspace, c, BN_CONSTANT_GRADIENT_COEFFICIENTS, &job.coefficients)
    job.partials = _take_doubles(&workspace, _partials(c))
    _do_all(&job, &workspace, bn_gradient_phases, threads)
    _end(&workspace)
    return 0


cdef int normalize_rows(
    Geometry geometry, x, y, weight, bias, double eps, mean, invstd, int threads
) except -1:
    """Write y, mean and invstd (float64) from the statistics of the rows of x.

    Without a mean, which may be None, they are around 0. Rows are the channels of the geometry's
    repeats; weight and bias are operands of the dtype of x: both or neither or, where statistics
    are around 0, weight alone.
    """
    cdef bn_geometry *c = &geometry.c
    cdef bn_job job = _new_job(c)
    cdef char small[SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, SMALL_WORKSPACE)
    _take_scratch(&workspace, &job, threads)
    job.operand[BN_X], job.operand[BN_Y] = _data(x), _data(y)
    if weight is not None:
        job.operand[BN_ELEMENT_WEIGHT] = _data(weight)
    if bias is not None:
        job.operand[BN_ELEMENT_BIAS] = _data(bias)
    job.eps, job.uncentred = eps, mean is None
    job.invstd = _doubles(invstd)
    job.mean = _take_doubles(&workspace, _statistics(c)) if mean is None else _doubles(mean)
    job.mean_low = _take_doubles(&workspace, _statistics(c))
    job.m2 = _take_doubles(&workspace, _statistics(c))
    _take_coefficients(&workspace, c, BN_OUTPUT_COEFFICIENTS, &job.coefficients)
    job.partials = _take_doubles(&workspace, _partials(c))
    _do_all(&job, &workspace, bn_normalize_phases, threads)
    _end(&workspace)
    return 0


cdef int row_gradient(
    Geometry geometry, x, dy, dx, weight, mean, invstd, sums, int threads
) except -1:
    """Write dx, and to sums[0] the gradients of weight and bias; `sums` may be None.

    They are float64, [blocks of rows][2][elements of a row in the order of the walk]. Mean and
    invstd are as `normalize_rows` writes them.
    """
    cdef bn_geometry *c = &geometry.c
    cdef bn_job job = _new_job(c)
    cdef char small[SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, SMALL_WORKSPACE)
    cdef size_t rows = _statistics(c)
    _take_scratch(&workspace, &job, threads)
    job.operand[BN_X], job.operand[BN_DY], job.operand[BN_DX] = _data(x), _data(dy), _data(dx)
    if weight is not None:
        job.operand[BN_ELEMENT_WEIGHT] = _data(weight)
    job.uncentred = mean is None
    if c.dtype == BN_f64 and mean is not None:
        job.mean_low = _take_doubles(&workspace, rows)
    job.mean = _statistic(&workspace, mean, c, 1)
    job.invstd = _statistic(&workspace, invstd, c, 1)
    job.sum_dy = _take_doubles(&workspace, rows)
    job.sum_dy_xhat = _take_doubles(&workspace, rows)
    _take_coefficients(&workspace, c, BN_ROW_GRADIENT_COEFFICIENTS, &job.coefficients)
    job.partials = _take_doubles(&workspace, _partials(c))
    if sums is not None:
        job.column_sums = _doubles(sums)
    _do_all(&job, &workspace, bn_row_gradient_phases, threads)
    _end(&workspace)
    return 0


cdef enum:
    MOST_AXES = 64  # of NumPy's arrays

# The memory of smaller outputs is not kept: the system has their pages ready.
cdef size_t _POOLED_BYTES = 4 << 20

cdef PyDataMem_Handler _pool_handler, _line_handler
memset(&_pool_handler, 0, sizeof(_pool_handler))
strcpy(_pool_handler.name, b"bnfast_outputs")
_pool_handler.version = 1
_pool_handler.allocator.malloc = bn_output_malloc
_pool_handler.allocator.calloc = bn_output_calloc
_pool_handler.allocator.realloc = bn_output_realloc
_pool_handler.allocator.free = bn_output_free
memset(&_line_handler, 0, sizeof(_line_handler))
strcpy(_line_handler.name, b"bnfast_small_outputs")
_line_handler.version = 1
_line_handler.allocator.malloc = bn_line_malloc
_line_handler.allocator.calloc = bn_line_calloc
_line_handler.allocator.realloc = bn_line_realloc
_line_handler.allocator.free = bn_line_free

cdef unsigned int _traced = numpy.lib.tracemalloc_domain
cdef object _pool_capsule = PyCapsule_New(&_pool_handler, b"mem_handler", NULL)
cdef object _line_capsule = PyCapsule_New(&_line_handler, b"mem_handler", NULL)


def limit_output_pool(size_t bytes_):
    """Keep at most so many bytes of the memory that large outputs leave."""
    bn_limit_output_pool(bytes_)


def output_pool_bytes():
    """Return how many bytes are kept now."""
    return bn_output_pool_bytes()


cpdef cnp.ndarray empty_output(cnp.ndarray x):
    """Return a new array laid out like x, as `numpy.empty_like`, that begins at a cache line.

    The array owns its memory, which another large output may have left; NumPy gives it back to the
    allocator it came from (NEP 49). To set that for NumPy's own function would take 0.1 us.
    """
    cdef cnp.npy_intp strides[MOST_AXES]
    cdef cnp.npy_intp *given = NULL
    cdef size_t bytes_ = <size_t>cnp.PyArray_NBYTES(x)
    cdef bint large = bytes_ >= _POOLED_BYTES
    cdef PyDataMemAllocator *allocator = &(_pool_handler if large else _line_handler).allocator
    cdef int flags = cnp.NPY_ARRAY_CARRAY
    cdef void *memory = allocator.malloc(allocator.ctx, bytes_)
    cdef cnp.ndarray array
    if memory is NULL:
        raise MemoryError(f"no memory for an output of {bytes_} bytes")
    if not cnp.PyArray_CHKFLAGS(x, cnp.NPY_ARRAY_C_CONTIGUOUS):
        if cnp.PyArray_CHKFLAGS(x, cnp.NPY_ARRAY_F_CONTIGUOUS):
            flags = cnp.NPY_ARRAY_FARRAY
        else:
            _without_gaps(x, strides)
            given = strides
    try:
        array = cnp.PyArray_New(
            cnp.ndarray, cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), given,
            memory, 0, flags, None
        )
    except BaseException:
        allocator.free(allocator.ctx, memory, bytes_)
        raise
    PyTraceMalloc_Track(_traced, <uintptr_t>memory, bytes_)
    handler = _pool_capsule if large else _line_capsule
    Py_INCREF(handler)
    (<PyArrayObject_fields *>array).mem_handler = <PyObject *>handler
    cnp.PyArray_ENABLEFLAGS(array, cnp.NPY_ARRAY_OWNDATA)
    return array


cdef inline cnp.npy_intp _size(cnp.npy_intp stride) noexcept:
    return -stride if stride < 0 else stride


cdef void _without_gaps(cnp.ndarray x, cnp.npy_intp *strides) noexcept:
    """The strides of an array whose axes follow each other in memory as those of x do."""
    cdef int order[MOST_AXES]
    cdef int axis, place, ndim = cnp.PyArray_NDIM(x)
    cdef cnp.npy_intp step = cnp.PyArray_ITEMSIZE(x)
    for axis in range(ndim):
        place = axis
        while place > 0 and (
            _size(cnp.PyArray_STRIDE(x, order[place - 1])) < _size(cnp.PyArray_STRIDE(x, axis))
        ):
            order[place] = order[place - 1]
            place -= 1
        order[place] = axis
    for place in range(ndim - 1, -1, -1):
        strides[order[place]] = step
        step *= cnp.PyArray_DIM(x, order[place])


def probe_memory(kind, x, y, int threads):
    """Read and write whole cache lines and compute nothing: for benchmarks.

    `x` and `y` begin at cache lines and are as large; "copy" and "streaming_copy" read x and write
    y, "read" reads x, "in_place" changes the sign of y.
    """
    cdef bn_memory_probe *probe
    cdef cnp.ndarray source = x, target = y
    cdef Py_ssize_t lines = cnp.PyArray_NBYTES(source) // 64, part
    cdef float *start = <float *>cnp.PyArray_DATA(source)
    cdef float *to = <float *>cnp.PyArray_DATA(target)
    if kind == "copy":
        probe = active.probe_copy
    elif kind == "streaming_copy":
        probe = active.probe_streaming_copy
    elif kind == "read":
        probe = active.probe_read
    elif kind == "in_place":
        probe = active.probe_in_place
    else:
        raise ValueError(f"no such probe: {kind!r}")
    if (<uintptr_t>start | <uintptr_t>to) % 64 or source.nbytes != target.nbytes:
        raise ValueError("x and y must begin at cache lines and be as large")
    with nogil:
        if threads == 1:
            probe(<size_t>lines, start, to)
        else:
            for part in prange(threads, num_threads=threads, schedule="static"):
                probe(<size_t>((part + 1) * lines // threads - part * lines // threads),
                      start + 16 * (part * lines // threads), to + 16 * (part * lines // threads))
