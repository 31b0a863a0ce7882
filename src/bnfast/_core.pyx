# The only Cython room: buffers in, GIL off, prange over the tasks of each stage.
# It knows neither the formulas nor the strides: jobs are made here, done in schedule.c and tasks.c.
"""Compiled core of bnfast. Private: call it through ``_primitives`` only."""

cimport cython
cimport numpy as cnp
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.object cimport PyObject
from cpython.pycapsule cimport PyCapsule_New
from cpython.ref cimport Py_INCREF
from cython.parallel cimport prange
from libc.math cimport INFINITY
from libc.stddef cimport ptrdiff_t, size_t
from libc.stdint cimport uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset, strcpy

import numpy

cnp.import_array()

include "_headers.pxi"
include "_machine.pxi"


_STORED = {
    bn_stored_name(<bn_stored>stored).decode(): stored
    for stored in range(BN_as_computed + 1, BN_STORED_TYPES)
}


# Types of 16 bits that there are kernels for.
_HALVES = {"f16": BN_f16, "bf16": BN_bf16}

# Operands of the type that the data is stored in; others have that of the arithmetic, or a mask's.
_DATA = (BN_X, BN_DY, BN_RESIDUAL, BN_Y, BN_DX, BN_DRESIDUAL)


_ACTIVATIONS = {
    bn_activation_name(<bn_activation>number).decode(): number
    for number in range(BN_no_activation + 1, BN_ACTIVATIONS)
}


cdef class Activation:
    """What follows a normalization: immutable."""

    def __init__(
        self, str kind, str parameter="parameter", *, double slope=1.0, double floor=0.0,
        double ceiling=float("inf"), bint closed=False
    ):
        """Of a kind in kernels.h: a curve, or "piecewise" linear, as kernels.h says (bn_activated).

        Channels may have a floor each, called `parameter` in messages; 0 without a floor of theirs.
        """
        self.c.kind = <bn_activation><int>_ACTIVATIONS[kind]
        self.c.slope, self.c.floor, self.c.ceiling = slope, floor, ceiling
        self.c.closed = closed
        self.parameter = parameter

    @property
    def is_curve(self):
        """Whether the gradient needs more than the output."""
        return self.c.kind != BN_activation_piecewise

    @property
    def is_gated_by_output(self):
        """Whether the output says on which side of its bounds the input was."""
        return not self.is_curve and self.c.slope > 0.0

    @property
    def is_invertible(self):
        """Whether the output says what the input was."""
        cdef bint is_bounded = self.c.floor > -INFINITY or self.c.ceiling < INFINITY
        return self.is_gated_by_output and not is_bounded


cdef bn_plan _plan_in_c(plan, roles, stored, size_t stored_itemsize):
    """The plan in C; what is `stored` otherwise than it is computed is staged."""
    cdef bn_plan c
    cdef bn_operand *operand
    cdef Py_ssize_t role, axis, itemsize = plan.itemsize
    cdef bint direct
    memset(&c, 0, sizeof(bn_plan))
    c.layout = BN_contiguous if plan.layout == "contiguous" else BN_channels_last
    c.dtype = BN_f32 if itemsize == 4 else BN_f64
    c.itemsize, c.stored_itemsize = itemsize, stored_itemsize
    c.element_type, c.element_bytes = <int>c.dtype, itemsize
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
    c.interleave = plan.interleave
    c.rows_of_block = plan.rows_of_block
    for role, layout in zip(roles, plan.operands, strict=True):
        operand = &c.operand[role]
        is_converted = stored is not None and role in _DATA
        direct = layout.direct and not is_converted
        operand.staged = not direct
        operand.stored = <bn_stored><int>_STORED[stored] if is_converted else BN_as_computed
        c.any_staged |= operand.staged
        for axis, stride in enumerate(layout.repeat_axis_strides):
            operand.repeat_axis_strides[axis] = stride
        for axis, stride in enumerate(layout.channel_axis_strides):
            operand.channel_axis_strides[axis] = stride
        if direct:
            size = stored_itemsize if role in _DATA else itemsize
            operand.outer_stride = <ptrdiff_t>layout.outer_stride // size
            operand.channel_stride = <ptrdiff_t>layout.channel_stride // size
        else:
            operand.channel_stride = layout.channel_stride
            for axis, stride in enumerate(layout.outer_axis_strides):
                operand.outer_axis_strides[axis] = stride
            for axis, stride in enumerate(layout.inner_axis_strides):
                operand.inner_axis_strides[axis] = stride
    return c


cdef class Plan:
    """A `LayoutPlan` in C; immutable."""

    def __init__(self, plan, roles, stored=None, stored_itemsize=None, bint converts=False):
        """Of a plan whose operands have these roles.

        The data is `stored` as the type of this name (`_dtypes`), with elements of so many bytes,
        or in that of the arithmetic; a mask as bytes. The plan of a type that there are kernels for
        has another one with it, which `converts`.
        """
        cdef Py_ssize_t itemsize = plan.itemsize
        if BN_MAX_AXES < max(
            map(len, (plan.repeat_axis_sizes, plan.channel_axis_sizes, plan.outer_axis_sizes,
                      plan.inner_axis_sizes))
        ):
            raise ValueError("the plan has too many axes")
        if plan.chunk_outer * plan.chunk_inner * itemsize > BN_SCRATCH_BYTES:
            raise ValueError("the plan's chunks do not fit the scratch memory of operands.h")
        width = plan.interleave * plan.channels
        if plan.interleave < 1 or (plan.interleave > 1 and width > BN_WIDE_ROW):
            raise ValueError("the plan's wide rows do not fit those of kernels.h")
        self.walked = plan.walked
        self.in_order = plan.walked == tuple(sorted(plan.walked))
        size = itemsize if stored is None else stored_itemsize
        if converts or stored not in _HALVES:
            self.c = _plan_in_c(plan, roles, stored, size)
        else:
            self.converted = Plan(plan, roles, stored, size, True)
            self.c = _plan_in_c(plan, roles, None, size)
            self.c.element_type, self.c.element_bytes = _HALVES[stored], size
            self.c.converted, self.converted.c.as_stored = &self.converted.c, &self.c

    @property
    def row_blocks(self):
        """How many blocks of rows have sums of their own."""
        return bn_row_blocks(&self.c)


include "_mask.pxi"
include "_workspace.pxi"


ctypedef size_t (*bn_stages)(bn_job *job, size_t threads, bn_stage *stages) noexcept nogil


cdef bn_job _new_job(const bn_plan *plan) noexcept:
    cdef bn_job job
    memset(&job, 0, sizeof(bn_job))
    job.kernels, job.plan, job.caches = active, plan, caches
    job.per_group, job.centred, job.partial_sums = 1, True, BN_SUMS
    return job


cdef int _do_all(
    bn_job *job, _Workspace *workspace, bn_stages stages_of, int threads
) except -1:
    """Do a job, if all of its memory was to be had."""
    cdef const bn_plan *c = job.plan
    if workspace.failed:
        return _end(workspace)
    if threads == 1 and c.repeats * _bytes_of_repeat(c) < BN_KEEP_GIL_BYTES:
        _do(job, stages_of, 1)
    else:
        with nogil:
            _do(job, stages_of, threads)
    return 0


cdef void _do(bn_job *job, bn_stages stages_of, int threads) noexcept nogil:
    cdef bn_stage stages[BN_MAX_STAGES]
    cdef size_t stage
    for stage in range(stages_of(job, threads, stages)):
        _run_stage(job, &stages[stage], threads)


cdef void _run_stage(const bn_job *job, const bn_stage *stage, int threads) noexcept nogil:
    cdef size_t repeats = 1 if stage.once else job.plan.repeats
    cdef Py_ssize_t part, tasks = <Py_ssize_t>(repeats * stage.tasks)
    cdef bn_region_times times
    if threads == 1 or tasks == 1 or stage.serial:
        # No OpenMP region at all: cheaper, and safe in a forked child.
        bn_do_tasks(job, stage, 0, 0, <size_t>tasks)
    else:
        # All threads, also of fewer tasks: see thresholds.h.
        bn_begin_region(&times, threads)
        for part in prange(threads, num_threads=threads, schedule="static"):
            _do_part(job, stage, <size_t>part, <size_t>tasks, <size_t>threads)
            if part == 0:  # the calling thread's
                bn_end_own_tasks(&times)
        bn_end_region(&times, <size_t>(tasks // threads), <size_t>tasks)


cdef void _do_part(
    const bn_job *job, const bn_stage *stage, size_t part, size_t tasks, size_t parts
) noexcept nogil:
    """Do some tasks in a thread of OpenMP's, which may have inherited any float mode."""
    cdef bn_float_mode before = bn_enter_default_float_mode()
    bn_do_tasks(job, stage, part, part * tasks // parts, (part + 1) * tasks // parts)
    bn_leave_default_float_mode(before)


cdef int moments(Plan plan, x, mean, mean_low, m2, int threads) except -1:
    """Write the mean and m2 of every channel of x (float64), and what rounding left of the mean.

    `mean_low` may be None.
    """
    cdef bn_plan *c = &plan.c
    cdef bn_job job = _new_job(c)
    cdef char small[BN_SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, BN_SMALL_WORKSPACE)
    job.operand[BN_X] = _data(x)
    job.statistic[BN_MEAN], job.statistic[BN_M2] = _doubles(mean), _doubles(m2)
    job.statistic[BN_MEAN_LOW] = _doubles_or_null(mean_low)
    _choose_and_take(&workspace, &job, _OF_MOMENTS, threads)
    _do_all(&job, &workspace, bn_moments_stages, threads)
    _end(&workspace)
    return 0


cdef int summary(
    Plan plan, x, mask, mean, mean_low, m2, count, minimum, maximum, nonfinite, bint integers,
    bint finite_only, int threads
) except -1:
    """Write what `moments` does, and more that is not None (float64 all).

    Of `integers` of at most 16 bits the sum, its squares (m2) and what is left of these (mean_low).
    With a `mask`, or of `finite_only`, not all values count; `count` is then an array.
    """
    cdef bn_job job = _new_job(&plan.c)
    cdef char small[BN_SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, BN_SMALL_WORKSPACE)
    job.operand[BN_X] = _data(x)
    if mask is not None:
        job.operand[BN_MASK] = _data(mask)
    job.statistic[BN_MEAN], job.statistic[BN_MEAN_LOW] = _doubles(mean), _doubles(mean_low)
    job.statistic[BN_M2], job.statistic[BN_COUNT] = _doubles(m2), _doubles_or_null(count)
    job.statistic[BN_MINIMUM] = _doubles_or_null(minimum)
    job.statistic[BN_MAXIMUM] = _doubles_or_null(maximum)
    job.statistic[BN_NONFINITE] = _doubles_or_null(nonfinite)
    job.integers, job.finite_only, job.partial_sums = integers, finite_only, BN_SUMS_OF_SUMMARY
    _choose_and_take(&workspace, &job, _OF_MOMENTS, threads, made=count is not None)
    _do_all(&job, &workspace, bn_moments_stages, threads)
    _end(&workspace)
    return 0


cdef int normalize(
    Plan plan, x, y, weight, bias, double eps, mean, invstd, m2, size_t per_group,
    bint centred, running_mean, running_var, double momentum, double correction,
    Activation activation, floors, channel_eps, int threads, residual=None, Mask mask=None
) except -1:
    """Write y, mean and invstd (float64) from the statistics of x, and update the running ones.

    Return MEAN_TOO_LARGE or VAR_TOO_LARGE, or both, of those whose dtype has become too small for a
    finite value; else 0.

    Mean and invstd have one value for each channel of each repeat, or for each group of `per_group`
    neighbours; m2, which may be None as the mean of channels may, for each channel. The running
    variance takes m2 / (count - correction), averaged over the repeats as the mean is: over those
    of which a mask leaves something. Channels may have a floor of the activation, and an eps of
    their own besides. A residual, which may be None, is added before the activation.
    """
    cdef bn_plan *c = &plan.c
    cdef bn_job job = _new_job(c)
    cdef char small[BN_SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, BN_SMALL_WORKSPACE)
    cdef double divisor
    cdef int too_large = 0
    cdef size_t i
    _set_mask(&job, mask)
    job.operand[BN_X], job.operand[BN_Y] = _data(x), _data(y)
    job.operand[BN_RESIDUAL] = _data_or_null(residual)
    job.weight = _widened(&workspace, weight, c.channels)
    job.bias = _widened(&workspace, bias, c.channels)
    _set_activation(&workspace, &job, activation, floors)
    job.eps, job.channel_eps = eps, _widened(&workspace, channel_eps, c.channels)
    if per_group == 1:
        job.statistic[BN_MEAN] = _doubles_or_null(mean)
        job.statistic[BN_INVSTD] = _doubles(invstd)
    job.statistic[BN_M2] = _doubles_or_null(m2)
    job.per_group, job.centred = per_group, centred
    _choose_and_take(
        &workspace, &job, _OF_NORMALIZE, threads,
        made=activation is not None and activation.is_curve
    )
    _do_all(&job, &workspace, bn_normalize_stages, threads)
    if per_group > 1:
        for i in range(_statistics(c) // per_group):
            _doubles(mean)[i] = job.statistic[BN_MEAN][i * per_group]
            _doubles(invstd)[i] = job.statistic[BN_INVSTD][i * per_group]
    if mask is not None and running_mean is not None:
        too_large = _update_masked(
            &workspace, &job, running_mean, running_var, momentum, correction
        )
        _end(&workspace)
        return too_large
    if running_mean is not None:
        if _update_running(running_mean, c.repeats, momentum, job.statistic[BN_MEAN], 1.0):
            too_large |= _MEAN_TOO_LARGE
    if running_var is not None:
        divisor = <double>(c.outer * c.inner) - correction
        if _update_running(running_var, c.repeats, momentum, job.statistic[BN_M2], divisor):
            too_large |= _VAR_TOO_LARGE
    _end(&workspace)
    return too_large


cdef void _set_activation(
    _Workspace *workspace, bn_job *job, Activation activation, floors
) noexcept:
    if activation is not None:
        job.activation = activation.c
        job.floors = _widened(workspace, floors, job.plan.channels)


cdef inline char *_data_or_null(array) noexcept:
    return NULL if array is None else _data(array)


cdef inline double *_doubles_or_null(array) noexcept:
    return NULL if array is None else _doubles(array)


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


include "_evaluation.pxi"


cdef int scale_shift(
    Plan plan, x, y, weight, bias, double eps, mean, variance, bint of_samples,
    Evaluation evaluation, int threads, Activation activation=None, residual=None, Mask mask=None
) except -1:
    """Write y from given statistics; `evaluation`, which may be None, keeps what is prepared.

    Where weight and bias are those `of_samples`, the repeats, these have the same statistics. Where
    nothing is kept, mean and variance may be None: the mean is then 0, and invstd 1. A residual,
    which may be None, is added before the activation.
    """
    cdef bn_plan *c = &plan.c
    cdef bn_job job = _new_job(c)
    cdef char small[BN_SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, BN_SMALL_WORKSPACE)
    cdef _Prepared prepared = None
    if evaluation is not None:
        with cython.critical_section(evaluation):
            prepared = evaluation.prepared  # a reference: another thread may replace it meanwhile
        job.prepared = (
            prepared is not None and prepared.is_of(plan, weight, bias, eps, mean, variance)
        )
        if not job.prepared:
            prepared = _Prepared(plan, weight, bias, eps, mean, variance)
            weight, bias, mean, variance = (
                prepared.weight, prepared.bias, prepared.mean, prepared.variance
            )
    _set_mask(&job, mask)
    job.operand[BN_X], job.operand[BN_Y] = _data(x), _data(y)
    job.operand[BN_RESIDUAL] = _data_or_null(residual)
    _set_activation(&workspace, &job, activation, None)
    job.eps = eps
    if prepared is not None:
        job.statistic[BN_INVSTD] = _doubles(prepared.invstd)
        job.coefficients = prepared.coefficients
    _choose_and_take(
        &workspace, &job, 1 << BN_INVSTD, threads,
        made=activation is not None and activation.is_curve
    )
    if not job.prepared:
        if of_samples:
            job.parameters_of_repeat = c.channels
        job.weight = _widened(&workspace, weight, _statistics(c) if of_samples else c.channels)
        job.bias = _widened(&workspace, bias, _statistics(c) if of_samples else c.channels)
        job.statistic[BN_MEAN] = _of_each_repeat(&workspace, mean, c)
        job.statistic[BN_VARIANCE] = _of_each_repeat(&workspace, variance, c)
    _do_all(&job, &workspace, bn_scale_shift_stages, threads)
    _end(&workspace)
    if evaluation is not None and not job.prepared:
        with cython.critical_section(evaluation):
            evaluation.prepared = prepared
    return 0


cdef int gradient(
    Plan plan, x, dy, dx, weight, mean, invstd, dweight, dbias, size_t per_group,
    bint constant_statistics, bias, Activation activation, floors, dfloors, sum_activation, sum_dy,
    sum_dy_xhat, int threads, residual=None, y=None, dresidual=None, Mask mask=None,
    bint x_is_output=False
) except -1:
    """Write dx, dweight and dbias; mean and invstd are as `normalize` writes them, or mean is None.

    With an activation dy is the gradient of what that made; it needs what it made, y, or else the
    bias and the residual, if there was one, whose gradient `dresidual` receives. `dfloors` receives
    the gradient of its floors; where `x_is_output`, x is y, of which what the activation was given
    is made; `sum_activation`, `sum_dy` and `sum_dy_xhat` (float64, as large as
    invstd) receive that gradient for each repeat, sum(dy) and sum(dy * (x - mean) * invstd). What
    is written but dx may be None.
    """
    cdef bn_plan *c = &plan.c
    cdef unsigned int wanted = _OF_GRADIENT
    cdef bint centred = mean is not None
    cdef bn_job job = _new_job(c)
    cdef char small[BN_SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, BN_SMALL_WORKSPACE)
    # Else the kernels make of dy what goes through.
    cdef bint made = activation is not None and (
        activation.is_curve or residual is not None or y is not None or floors is not None
        or per_group > 1 or constant_statistics or c.dtype == BN_f64
    )
    _set_mask(&job, mask)
    job.operand[BN_X], job.operand[BN_DY], job.operand[BN_DX] = _data(x), _data(dy), _data(dx)
    job.weight = _widened(&workspace, weight, c.channels)
    job.statistic[BN_MEAN] = _statistic(&workspace, mean, c, per_group)
    job.statistic[BN_INVSTD] = _statistic(&workspace, invstd, c, per_group)
    job.statistic[BN_SUM_DY] = _doubles_or_null(sum_dy)
    job.statistic[BN_SUM_DY_XHAT] = _doubles_or_null(sum_dy_xhat)
    if activation is not None:
        _set_activation(&workspace, &job, activation, floors)
        job.bias = _widened(&workspace, bias, c.channels)
        job.operand[BN_RESIDUAL], job.operand[BN_Y] = _data_or_null(residual), _data_or_null(y)
        job.operand[BN_DRESIDUAL] = _data_or_null(dresidual)
        job.statistic[BN_SUM_ACTIVATION] = _doubles_or_null(sum_activation)
        if dfloors is not None:
            wanted |= 1 << BN_SUM_ACTIVATION
    if c.dtype == BN_f64 and centred and not constant_statistics:
        wanted |= 1 << BN_MEAN_LOW
    job.constant_statistics, job.x_is_output = constant_statistics, x_is_output
    job.per_group, job.centred = per_group, centred
    _choose_and_take(&workspace, &job, wanted, threads, made=made, of_rows=made)
    _do_all(&job, &workspace, bn_gradient_stages, threads)
    _parameter_gradient(c.repeats, job.statistic[BN_SUM_DY_XHAT], dweight)
    _parameter_gradient(c.repeats, job.statistic[BN_SUM_DY], dbias)
    _parameter_gradient(c.repeats, job.statistic[BN_SUM_ACTIVATION], dfloors)
    _end(&workspace)
    return 0


cdef void _parameter_gradient(size_t repeats, const double *sums, gradient) noexcept:
    """Write the gradient, unless it is None: the sums of all repeats."""
    if gradient is not None:
        active.parameter_gradient[<int>_dtype(gradient)](
            <size_t>cnp.PyArray_SIZE(gradient), repeats, sums, _data(gradient)
        )


cdef int parameter_gradient(sums, gradient) except -1:
    """Write a gradient from the sums of each repeat, the first axis, that `gradient` has made."""
    _parameter_gradient(<size_t>cnp.PyArray_DIM(sums, 0), _doubles(sums), gradient)
    return 0


cdef int gradient_of_samples(
    Plan plan, x, dy, dx, weight, mean, invstd, sum_dy, sum_dy_xhat, int threads
) except -1:
    """Write dx = dy * weight * invstd, with a weight (float64) for each channel of each repeat.

    All repeats have the same statistics, which did not come from x; `sum_dy` and `sum_dy_xhat`
    (float64, as large as the weight) receive sum(dy) and sum(dy * (x - mean) * invstd) of each.
    """
    cdef bn_plan *c = &plan.c
    cdef bn_job job = _new_job(c)
    cdef char small[BN_SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, BN_SMALL_WORKSPACE)
    job.operand[BN_X], job.operand[BN_DY], job.operand[BN_DX] = _data(x), _data(dy), _data(dx)
    job.weight, job.parameters_of_repeat = _doubles(weight), c.channels
    job.statistic[BN_MEAN] = _of_each_repeat(&workspace, mean, c)
    job.statistic[BN_INVSTD] = _of_each_repeat(&workspace, invstd, c)
    job.statistic[BN_SUM_DY] = _doubles(sum_dy)
    job.statistic[BN_SUM_DY_XHAT] = _doubles(sum_dy_xhat)
    job.constant_statistics = True
    _choose_and_take(&workspace, &job, _OF_GRADIENT, threads)
    _do_all(&job, &workspace, bn_gradient_stages, threads)
    _end(&workspace)
    return 0


include "_row_jobs.pxi"
include "_part_jobs.pxi"
include "_output_memory.pxi"
