# The only Cython room: buffers in, GIL off, prange over the tasks of each phase.
# It knows neither the formulas nor the strides: jobs are made here, done in block_tasks.c.
"""Compiled core of bnfast. Private: call it through ``_primitives`` only."""

cimport numpy as cnp
from cython.parallel cimport prange
from libc.stddef cimport ptrdiff_t, size_t
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

cnp.import_array()


cdef extern from "kernels.h" nogil:
    ctypedef enum bn_dtype:
        BN_f32
        BN_f64

    ctypedef enum bn_layout:
        BN_contiguous
        BN_channels_last

    ctypedef struct bn_scale_shift_coefficients:
        void *mean_high
        void *mean_low
        void *scale
        void *shift

    ctypedef struct bn_gradient_coefficients:
        void *mean_high
        void *mean_low
        void *dy_mean
        void *slope
        void *scale

    ctypedef float bn_memory_probe(size_t lines, const float *start, float *to) noexcept

    ctypedef struct bn_kernels:
        const char *isa
        const char *flags
        bn_memory_probe *probe_copy
        bn_memory_probe *probe_streaming_copy
        bn_memory_probe *probe_read
        bn_memory_probe *probe_in_place


cdef extern from "geometry.h" nogil:
    enum:
        BN_MAX_OPERANDS
        BN_MAX_AXES

    ctypedef struct bn_operand:
        int packed
        ptrdiff_t outer_stride
        ptrdiff_t channel_stride
        ptrdiff_t *outer_axis_strides
        ptrdiff_t *inner_axis_strides

    ctypedef struct bn_geometry:
        bn_layout layout
        bn_dtype dtype
        size_t itemsize
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
        size_t phases
        int any_packed
        bn_operand *operand

    size_t bn_coefficients(const bn_geometry *geometry)


cdef extern from "cache_sizes.h" nogil:
    ctypedef struct bn_caches:
        size_t level2
        size_t last_level

    bn_caches bn_cache_sizes()


cdef extern from "packing.h" nogil:
    enum:
        BN_SCRATCH_BYTES


cdef extern from "block_tasks.h" nogil:
    ctypedef struct bn_job:
        const bn_kernels *kernels
        const bn_geometry *geometry
        bn_caches caches
        char *x
        char *y
        char *dy
        char *dx
        const double *weight
        const double *bias
        double eps
        double *mean
        double *mean_low
        double *m2
        double *invstd
        const double *variance
        double *sum_dy
        double *sum_dy_deviation
        int constant_statistics
        double *partials
        bn_scale_shift_coefficients scale_shift
        bn_gradient_coefficients gradient

    ctypedef void bn_task(const bn_job *job, size_t number) noexcept

    ctypedef struct bn_phase:
        bn_task *task
        size_t tasks

    enum:
        BN_MAX_PHASES
        BN_SUMS

    size_t bn_moments_phases(bn_job *job, size_t threads, bn_phase *phases)
    size_t bn_normalize_phases(bn_job *job, size_t threads, bn_phase *phases)
    size_t bn_scale_shift_phases(bn_job *job, size_t threads, bn_phase *phases)
    size_t bn_gradient_phases(bn_job *job, size_t threads, bn_phase *phases)
    void bn_parameter_gradients(const bn_job *job, bn_dtype dtype, void *dweight, void *dbias)
    void bn_update_running(const bn_kernels *kernels, bn_dtype dtype, size_t channels,
                           double momentum, const double *divided, double divisor, void *running)


cdef extern from "dispatch.h" nogil:
    const bn_kernels *bn_built_kernels(size_t index)
    bint bn_runs_here(size_t index)
    const char *bn_kernel_name(size_t index)


cdef extern from "openmp_runtime.h" nogil:
    int bn_openmp_max_threads()
    int bn_openmp_version()
    const char *bn_openmp_library()
    const char *bn_compiler()


HAS_OPENMP = bn_openmp_version() > 0

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


def kernel_names():
    """Return the name of every kernel that each variant has."""
    cdef size_t index = 0
    names = []
    while bn_kernel_name(index) is not NULL:
        names.append(bn_kernel_name(index).decode())
        index += 1
    return tuple(names)


def openmp_max_threads():
    """Return OpenMP's own thread setting, read now; 1 without OpenMP."""
    return bn_openmp_max_threads()


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

    cdef bn_geometry c

    def __init__(self, plan):
        cdef bn_geometry *c = &self.c
        cdef bn_operand *operand
        cdef Py_ssize_t k, axis, itemsize = plan.itemsize
        if len(plan.operands) > BN_MAX_OPERANDS or max(
            len(plan.outer_axis_sizes), len(plan.inner_axis_sizes)
        ) > BN_MAX_AXES:
            raise ValueError("the plan has too many operands or axes")
        if plan.chunk_outer * plan.chunk_inner * itemsize > BN_SCRATCH_BYTES:
            raise ValueError("the plan's chunks do not fit the scratch memory of packing.h")
        memset(c, 0, sizeof(bn_geometry))
        c.layout = BN_contiguous if plan.layout == "contiguous" else BN_channels_last
        c.dtype = BN_f32 if itemsize == 4 else BN_f64
        c.itemsize = itemsize
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
        for k, layout in enumerate(plan.operands):
            operand = &c.operand[k]
            operand.packed = not layout.direct
            c.any_packed |= operand.packed
            if layout.direct:
                operand.outer_stride = <ptrdiff_t>layout.outer_stride // itemsize
                operand.channel_stride = <ptrdiff_t>layout.channel_stride // itemsize
            else:
                operand.channel_stride = layout.channel_stride
                for axis, stride in enumerate(layout.outer_axis_strides):
                    operand.outer_axis_strides[axis] = stride
                for axis, stride in enumerate(layout.inner_axis_strides):
                    operand.inner_axis_strides[axis] = stride


cdef class _Workspace:
    """Channel arrays of one call, each on its own cache lines, freed together."""

    cdef char *memory
    cdef size_t used

    def __cinit__(self, size_t channels, size_t arrays, size_t coefficient_bytes=0):
        self.used = 0
        self.memory = <char *>malloc(
            arrays * _padded(channels * sizeof(double)) + coefficient_bytes + 64
        )
        if self.memory is NULL:
            raise MemoryError(f"no memory for the statistics of {channels} channels")

    def __dealloc__(self):
        free(self.memory)

    cdef void *take(self, size_t bytes_) noexcept:
        cdef uintptr_t start = (<uintptr_t>self.memory + 63) // 64 * 64 + self.used
        self.used += _padded(bytes_)
        return <void *>start

    cdef double *doubles(self, size_t channels) noexcept:
        return <double *>self.take(channels * sizeof(double))

    cdef const double *widened(self, parameter, size_t channels):
        """The parameter as float64, NULL for None: a 1-d aligned contiguous float32 or float64."""
        cdef cnp.ndarray array
        cdef double *wide
        cdef const float *narrow
        cdef size_t c
        if parameter is None:
            return NULL
        array = parameter
        if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64:
            return <const double *>cnp.PyArray_DATA(array)
        wide = self.doubles(channels)
        narrow = <const float *>cnp.PyArray_DATA(array)
        for c in range(channels):
            wide[c] = narrow[c]
        return wide


cdef size_t _padded(size_t bytes_) noexcept nogil:
    return (bytes_ + 63) // 64 * 64


cdef size_t _coefficient_bytes(bn_geometry *c, size_t arrays) noexcept:
    return arrays * _padded(bn_coefficients(c) * c.itemsize)


cdef bn_scale_shift_coefficients _scale_shift_arrays(_Workspace workspace, bn_geometry *c):
    cdef bn_scale_shift_coefficients arrays
    cdef size_t bytes_ = bn_coefficients(c) * c.itemsize
    arrays.mean_high = workspace.take(bytes_)
    arrays.mean_low = workspace.take(bytes_)
    arrays.scale = workspace.take(bytes_)
    arrays.shift = workspace.take(bytes_)
    return arrays


cdef bn_gradient_coefficients _gradient_arrays(_Workspace workspace, bn_geometry *c):
    cdef bn_gradient_coefficients arrays
    cdef size_t bytes_ = bn_coefficients(c) * c.itemsize
    arrays.mean_high = workspace.take(bytes_)
    arrays.mean_low = workspace.take(bytes_)
    arrays.dy_mean = workspace.take(bytes_)
    arrays.slope = workspace.take(bytes_)
    arrays.scale = workspace.take(bytes_)
    return arrays


cdef char *_data(cnp.ndarray array) noexcept:
    return <char *>cnp.PyArray_DATA(array)


cdef double *_doubles(cnp.ndarray array) noexcept:
    return <double *>cnp.PyArray_DATA(array)


ctypedef size_t (*bn_phases)(bn_job *job, size_t threads, bn_phase *phases) noexcept nogil


cdef bn_job _new_job(const bn_geometry *geometry) noexcept:
    cdef bn_job job
    memset(&job, 0, sizeof(bn_job))
    job.kernels, job.geometry, job.caches = active, geometry, caches
    return job


cdef void _do(bn_job *job, bn_phases phases_of, int threads) noexcept nogil:
    cdef bn_phase phases[BN_MAX_PHASES]
    cdef size_t phase
    for phase in range(phases_of(job, threads, phases)):
        _run_phase(job, phases[phase].task, <Py_ssize_t>phases[phase].tasks, threads)


cdef void _run_phase(
    const bn_job *job, bn_task *task, Py_ssize_t tasks, int threads
) noexcept nogil:
    cdef Py_ssize_t number
    cdef int team = threads if threads < tasks else <int>tasks
    if team == 1:
        # No OpenMP region at all: cheaper, and safe in a forked child.
        for number in range(tasks):
            task(job, <size_t>number)
    else:
        for number in prange(tasks, num_threads=team, schedule="static"):
            task(job, <size_t>number)


def moments(Geometry geometry, x, mean, m2, int threads):
    """Write the mean and m2 of every channel of x (float64)."""
    cdef bn_geometry *c = &geometry.c
    cdef bn_job job = _new_job(c)
    cdef _Workspace workspace = _Workspace(c.channels, 1 + BN_SUMS * (c.blocks - 1))
    job.x = _data(x)
    job.mean, job.m2 = _doubles(mean), _doubles(m2)
    job.mean_low = workspace.doubles(c.channels)
    job.partials = <double *>workspace.take(0)
    with nogil:
        _do(&job, bn_moments_phases, threads)


def normalize(
    Geometry geometry, x, y, weight, bias, double eps, mean, invstd,
    running_mean, running_var, double momentum, double correction, int threads
):
    """Write y, mean and invstd (float64) from the statistics of x, and update the running ones.

    The running variance takes m2 / (count - correction).
    """
    cdef bn_geometry *c = &geometry.c
    cdef bn_job job = _new_job(c)
    cdef _Workspace workspace = _Workspace(
        c.channels, 4 + BN_SUMS * (c.blocks - 1), _coefficient_bytes(c, 4)
    )
    job.x, job.y = _data(x), _data(y)
    job.weight = workspace.widened(weight, c.channels)
    job.bias = workspace.widened(bias, c.channels)
    job.eps = eps
    job.mean, job.invstd = _doubles(mean), _doubles(invstd)
    job.mean_low = workspace.doubles(c.channels)
    job.m2 = workspace.doubles(c.channels)
    job.scale_shift = _scale_shift_arrays(workspace, c)
    job.partials = <double *>workspace.take(0)
    with nogil:
        _do(&job, bn_normalize_phases, threads)
    if running_mean is not None:
        bn_update_running(active, _dtype(running_mean), c.channels, momentum, job.mean, 1.0,
                          _data(running_mean))
    if running_var is not None:
        bn_update_running(active, _dtype(running_var), c.channels, momentum, job.m2,
                          <double>(c.outer * c.inner) - correction, _data(running_var))


cdef bn_dtype _dtype(cnp.ndarray array) noexcept:
    return BN_f32 if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32 else BN_f64


def scale_shift(
    Geometry geometry, x, y, weight, bias, double eps, mean, variance, invstd, int threads
):
    """Write y from given statistics, and invstd (float64) unless it is None."""
    cdef bn_geometry *c = &geometry.c
    cdef bn_job job = _new_job(c)
    cdef _Workspace workspace = _Workspace(c.channels, 5, _coefficient_bytes(c, 4))
    job.x, job.y = _data(x), _data(y)
    job.weight = workspace.widened(weight, c.channels)
    job.bias = workspace.widened(bias, c.channels)
    job.eps = eps
    job.mean = <double *>workspace.widened(mean, c.channels)
    job.variance = workspace.widened(variance, c.channels)
    job.invstd = workspace.doubles(c.channels) if invstd is None else _doubles(invstd)
    job.scale_shift = _scale_shift_arrays(workspace, c)
    with nogil:
        _do(&job, bn_scale_shift_phases, threads)


def gradient(
    Geometry geometry, x, dy, dx, weight, mean, invstd, dweight, dbias,
    bint constant_statistics, int threads
):
    """Write dx, dweight and dbias."""
    cdef bn_geometry *c = &geometry.c
    cdef bn_job job = _new_job(c)
    cdef _Workspace workspace = _Workspace(
        c.channels, 5 + BN_SUMS * (c.blocks - 1), _coefficient_bytes(c, 9)
    )
    job.x, job.dy, job.dx = _data(x), _data(dy), _data(dx)
    job.weight = workspace.widened(weight, c.channels)
    job.mean = <double *>workspace.widened(mean, c.channels)
    job.invstd = <double *>workspace.widened(invstd, c.channels)
    job.sum_dy = workspace.doubles(c.channels)
    job.sum_dy_deviation = workspace.doubles(c.channels)
    job.constant_statistics = constant_statistics
    job.scale_shift = _scale_shift_arrays(workspace, c)
    job.gradient = _gradient_arrays(workspace, c)
    job.partials = <double *>workspace.take(0)
    with nogil:
        _do(&job, bn_gradient_phases, threads)
    bn_parameter_gradients(&job, _dtype(dweight), _data(dweight), _data(dbias))


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
