# One call: each argument as the core needs it (_arguments.pxi), the plan (_plans.pxi), the threads,
# the job. Nothing is written before everything has been checked.
"""The primitives on arrays: moments, scale_shift, gradient, and normalize: the first two in one.

And what is composed of several in one call.

The only room that hands arrays to ``_core``.
"""

cimport numpy as cnp
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.long cimport PyLong_AsLongAndOverflow
from libc.math cimport INFINITY, NAN, fabs, fma, frexp, ldexp, sqrt

from bnfast cimport _core
from bnfast._core cimport Activation as _Activation
from bnfast._core cimport Evaluation as _Evaluation
from bnfast._core cimport (
    BN_DRESIDUAL,
    BN_DX,
    BN_DY,
    BN_ELEMENT_BIAS,
    BN_ELEMENT_WEIGHT,
    BN_MASK,
    BN_MAX_AXES,
    BN_RESIDUAL,
    BN_X,
    BN_Y,
    Plan,
    bn_given_mask,
)

import numpy

from bnfast import _core as core
from bnfast import _dtypes, _scaling, _threads, _validation
from bnfast._layout import plan_layout, plan_rows

cnp.import_array()

Activation = core.Activation  # what follows a `normalize`, and its gradient
Evaluation = core.Evaluation  # what a layer keeps from one `scale_shift` to the next
empty_output = core.empty_output  # a new array that begins at a cache line


cdef class Reduction:
    """Which elements have their statistics together: those of one channel, over all other axes."""

    cdef readonly bint per_sample  # ... but for axis 0, each of whose indices has its own
    cdef readonly bint centred  # statistics around the mean rather than 0
    cdef readonly bint any_eps  # rather than positive ones

    def __init__(self, *, per_sample=False, centred=True, any_eps=True):
        self.per_sample, self.centred, self.any_eps = per_sample, centred, any_eps


BATCH = Reduction(any_eps=False)
PER_SAMPLE = Reduction(per_sample=True, any_eps=False)
GROUPS = Reduction(per_sample=True)


include "_plans.pxi"
include "_arguments.pxi"


# new arrays

cdef inline cnp.ndarray _empty(int ndim, const cnp.npy_intp *shape, int kind):
    return cnp.PyArray_EMPTY(ndim, <cnp.npy_intp *>shape, kind, 0)


cdef inline cnp.ndarray _zeros(int ndim, const cnp.npy_intp *shape, int kind):
    return cnp.PyArray_ZEROS(ndim, <cnp.npy_intp *>shape, kind, 0)


def invstd_of_nothing(double eps):
    """Return 1 / sqrt(0 + eps)."""
    if eps > 0:
        return 1.0 / sqrt(eps)
    return numpy.inf if eps == 0 else numpy.nan


cdef int _statistics_shape(
    cnp.ndarray x, Py_ssize_t axis, Reduction over, Py_ssize_t per_group, cnp.npy_intp *shape
) noexcept:
    """(C / channels of a group,), per sample (N, ...); returns how many axes these are."""
    cdef int count = 0
    if over.per_sample:
        shape[0] = cnp.PyArray_DIM(x, 0)
        count = 1
    shape[count] = _channels(x, axis) // per_group
    return count + 1


cdef Py_ssize_t _values(
    cnp.ndarray x, Py_ssize_t axis, Reduction over, Py_ssize_t per_group
) noexcept:
    """How many elements have their statistics together."""
    cdef Py_ssize_t d, values = per_group
    for d in range(cnp.PyArray_NDIM(x)):
        if d != axis and not (d == 0 and over.per_sample):
            values *= cnp.PyArray_DIM(x, <int>d)
    return values


include "_channels.pxi"


include "_summaries.pxi"


include "_masks.pxi"


# the primitives

def normalize(
    x_, axis_, weight, bias, eps, running_mean=None, running_var=None, momentum=0.0,
    bint unbiased=True, out=None, Reduction over=BATCH, num_groups=None, m2=None,
    _Activation activation=None, parameter=None, channel_eps=None, reads=None, residual=None,
    masked=None
):
    """Return y, and the mean and invstd (float64) that made it.

    The running statistics, both given or neither, are updated with `momentum` as the weight of the
    batch: of the average of its samples, where each has its own. `m2`, a float64 array of the shape
    of the mean, receives that of the batch. Channels may have a `parameter` of the activation, and
    a checked `channel_eps` of their own, which is added to eps. `reads` are more arguments that
    `out` must share no memory with. A `residual` like x is added before the activation. `masked`
    says which values count: see _masks.pxi.
    """
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, over)
    cdef Py_ssize_t channels = _channels(x, axis)
    cdef Py_ssize_t per_group = 1
    if over is GROUPS:
        per_group = _channels_per_group(num_groups, channels)
    cdef double epsilon = _eps(eps, over.any_eps, True), new = _real("momentum", momentum)
    cdef _Counted counted = _counted(masked, x, axis)
    scale, shift = _of_channels("weight", weight, channels), _of_channels("bias", bias, channels)
    cdef str called = _parameter_name(activation)
    given = parameter
    parameter = _of_channels(called, given, channels)
    tracked = _tracked(running_mean, running_var, x, channels, _MEAN_AND_VAR)
    added = None if residual is None else _upstream(residual, x, ("residual", "x"))
    y = _output(
        out, x, ("residual", "x", "weight", "bias", "running_mean", "running_var", called),
        (residual, x, weight, bias, running_mean, running_var, given),
        _also_read(reads, masked, counted), 2
    )
    return _normalized(
        x, axis, y, scale, shift, epsilon, tracked, new, unbiased, over, per_group, m2, activation,
        parameter, channel_eps, added, counted
    )


cdef tuple _normalized(
    cnp.ndarray x, Py_ssize_t axis, y, scale, shift, double epsilon, tuple tracked, double new,
    bint unbiased, Reduction over, Py_ssize_t per_group, m2, _Activation activation, parameter,
    channel_eps, residual=None, _Counted counted=None
):
    """What `normalize` returns, of checked arguments."""
    cdef cnp.ndarray mean, invstd
    cdef cnp.npy_intp shape[2]
    cdef int ndim = _statistics_shape(x, axis, over, per_group, shape), too_large
    if tracked is not None and cnp.PyArray_NDIM(x) > 1:
        values = _values(x, axis, over, per_group)
        if 0 < values < 2:
            what = "channel of each sample" if over.per_sample else "channel"
            _validation.enough_values("x", x, values, what, unbiased=unbiased)
    if cnp.PyArray_SIZE(x) == 0:
        return (
            y, _zeros(ndim, shape, cnp.NPY_FLOAT64),
            numpy.full([shape[d] for d in range(ndim)], invstd_of_nothing(epsilon))
        )
    cdef Plan plan = _plan_of_sum(axis, over, x, y, residual)
    cdef _core.Mask mask = _mask_of(counted, x, axis, over, plan, True)
    if mask is not None and tracked is not None:
        _enough_masked_values(counted, over, plan, mask, per_group, unbiased)
    mean = _empty(ndim, shape, cnp.NPY_FLOAT64)
    invstd = _empty(ndim, shape, cnp.NPY_FLOAT64)
    written_mean = written_var = None
    if tracked is not None:
        written_mean, written_var = _contiguous_or_copy(tracked[0]), _contiguous_or_copy(tracked[1])
    too_large = _core.normalize(
        plan, x, y, scale, shift, epsilon, mean, invstd, m2, <size_t>per_group, over.centred,
        written_mean, written_var, new, 1.0 if unbiased else 0.0, activation, parameter,
        channel_eps, _threads_for(x, 3 if residual is None else 4), residual, mask
    )
    if tracked is not None:
        too_large |= <int>core.MEAN_TOO_LARGE * _put_back(written_mean, tracked[0])
        too_large |= <int>core.VAR_TOO_LARGE * _put_back(written_var, tracked[1])
        if too_large:
            _warn_of(too_large)
    return y, mean, invstd


def scale_shift(
    x_, axis_, mean, variance, weight, bias, eps, _Evaluation evaluation=None, out=None, reads=None,
    _Activation activation=None, residual=None, masked=None
):
    """Return y from given statistics, called running_mean and running_var in messages.

    `evaluation`, which may be None, keeps what statistics and parameters are turned into for the
    next call, which uses it again where they are the same; an empty x needs none. `reads` are more
    arguments that `out` must share no memory with. A `residual` like x is added, and the activation
    follows. `masked` says which values count.
    """
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, BATCH)
    cdef Py_ssize_t channels = _channels(x, axis)
    cdef double epsilon = _eps(eps, False, False)
    cdef _Counted counted = _counted(masked, x, axis)
    cdef Plan plan
    centre = _required("running_mean", mean, channels)
    spread = _required("running_var", variance, channels)
    scale, shift = _of_channels("weight", weight, channels), _of_channels("bias", bias, channels)
    added = None if residual is None else _upstream(residual, x, ("residual", "x"))
    y = _output(
        out, x, ("residual", "x", "weight", "bias", "running_mean", "running_var"),
        (residual, x, weight, bias, mean, variance), _also_read(reads, masked, counted), 2
    )
    if cnp.PyArray_SIZE(x) > 0:
        plan = _plan_of_sum(axis, BATCH, x, y, added)
        _core.scale_shift(
            plan, x, y, scale, shift, epsilon, centre, spread, False, evaluation,
            _threads_for(x, 2 if added is None else 3), activation, added,
            _mask_of(counted, x, axis, BATCH, plan, False)
        )
    return y


def gradient(
    dy, x, axis, mean, invstd, weight, bint constant_statistics, out=None, Reduction over=BATCH,
    bint grouped=False, reads=None, masked=None
):
    """Return dx, dweight and dbias, the latter of the dtype of `weight`, or of x without one.

    The mean of what is not centred is None. `grouped` statistics are those of as many groups as
    they have. `reads` are more arguments that `out` must share no memory with; `masked` says which
    values count.
    """
    return _gradient(
        dy, x, axis, mean, invstd, weight, constant_statistics, out, over, grouped, None, None,
        None, None, reads, None, None, False, masked
    )[:3]


def activated_gradient(
    dy, x, axis, mean, invstd, weight, bias, _Activation activation, parameter, out=None,
    Reduction over=BATCH, bint constant_statistics=False, bint grouped=False, sums=None, reads=None
):
    """Return dx, dweight and dbias of a `normalize` with this activation, and that of `parameter`.

    The latter is None where there is no parameter. `sums`, float64 (2, *shape of invstd) or None,
    receives what it is the sum of, and sum(dy * xhat) of what of dy the activation leaves.
    """
    return _gradient(
        dy, x, axis, mean, invstd, weight, constant_statistics, out, over, grouped, bias,
        activation, parameter, sums, reads, None, None, False
    )[:4]


def fused_gradient(
    dy, x, axis, mean, invstd, weight, bint constant_statistics, out, Reduction over, bint grouped,
    bias, _Activation activation, residual, y, bint keeps, reads=None, masked=None
):
    """Return dx, dweight, dbias and, where it `keeps` that, the gradient of the residual, or None.

    What the activation was given is made again of x, the bias and the residual, None for none; or,
    where `y` is given, and the activation is no curve, taken from that. Without an activation the
    gradient of the residual is dy itself. `masked` says which values count.
    """
    made = _gradient(
        dy, x, axis, mean, invstd, weight, constant_statistics, out, over, grouped, bias,
        activation, None, None, reads, residual, y, keeps, masked
    )
    return made[0], made[1], made[2], made[4]


def gradient_of_output(
    dy, y, axis, mean, invstd, weight, bint constant_statistics, out, _Activation activation
):
    """Return dx, dweight and dbias of what wrote y over its input, of which only y is left.

    What the activation was given is made of y; the mean (the bias of the forward pass), invstd and
    weight are what they are of that.
    """
    return _gradient(
        dy, y, axis, mean, invstd, weight, constant_statistics, out, BATCH, False, None, activation,
        None, None, None, None, None if activation is None else y, False, None, True
    )[:3]


cdef object _gradient_of_residual(cnp.ndarray x, upstream, dx, bint is_made):
    """Where it will be written, or dy itself, where there is no activation that it goes through."""
    if is_made:
        return _core.empty_output(x)
    return upstream if _are_disjoint(dx, upstream) else upstream.copy()


cdef inline str _parameter_name(_Activation activation):
    return "parameter" if activation is None else activation.parameter


cdef tuple _gradient(
    dy, x_, axis_, mean, invstd, weight, bint constant_statistics, out, Reduction over,
    bint grouped, bias, _Activation activation, given, sums, reads, residual, y_, bint keeps,
    masked=None, bint x_is_output=False
):
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, over)
    cdef cnp.npy_intp channels = _channels(x, axis)
    cdef Py_ssize_t per_group = 1
    cdef cnp.npy_intp shape[2]
    cdef int ndim, kind
    cdef _Counted counted = _counted(masked, x, axis)
    cdef _core.Mask mask
    cdef Plan plan
    upstream = _upstream(dy, x, ("dy", "x"))
    if grouped:
        per_group = _channels_per_saved_group(mean, channels)
    ndim = _statistics_shape(x, axis, over, per_group, shape)
    centre = _saved("mean", mean, ndim, shape) if over.centred else None
    cdef str saved = "invstd" if over.centred else "invrms"
    inverse = _saved(saved, invstd, ndim, shape)
    scale, shift = _of_channels("weight", weight, channels), _of_channels("bias", bias, channels)
    cdef str called = _parameter_name(activation)
    parameter = _of_channels(called, given, channels)
    added = None if residual is None else _upstream(residual, x, ("residual", "x"))
    y = None if y_ is None else _upstream(y_, x, ("y", "x"))
    dx = _output(
        out, x, ("dy", "x", "weight", "mean", saved, "bias", called, "residual", "y"),
        (upstream, x, weight, mean, invstd, bias, given, residual, None if x_is_output else y_),
        _also_read(reads, masked, counted), 2
    )
    dresidual = None
    if keeps:
        dresidual = _gradient_of_residual(x, upstream, dx, activation is not None)
    kind = _parameter_type(x) if scale is None else cnp.PyArray_TYPE(<cnp.ndarray>scale)
    dweight, dbias = _zeros(1, &channels, kind), _zeros(1, &channels, kind)
    dparameter = None
    if parameter is not None:
        dparameter = _zeros(1, &channels, cnp.PyArray_TYPE(<cnp.ndarray>parameter))
    if cnp.PyArray_SIZE(x) > 0:
        if activation is None:
            plan = _plan(axis, over, x, upstream, dx)
        else:
            plan = _plan_of_activated(axis, over, x, upstream, dx, added, y, dresidual)
        mask = _mask_of(counted, x, axis, over, plan, not constant_statistics)
        if keeps and activation is None and mask is not None:
            dresidual = _without_padding(upstream, counted, axis)
        _core.gradient(
            plan, x, upstream, dx, scale, centre, inverse, dweight, dbias, <size_t>per_group,
            constant_statistics, shift, activation, parameter, dparameter,
            None if sums is None else sums[0], None, None if sums is None else sums[1],
            _threads_for(x, 5), None if y is not None else added, y,
            None if activation is None else dresidual, mask, x_is_output
        )
    return (
        dx, _of_parameter("weight", weight, scale, dweight),
        _of_parameter("weight", weight, scale, dbias),
        _of_parameter(called, given, parameter, dparameter), dresidual
    )


cdef double _step_at_one(cnp.ndarray x) noexcept:
    """From 1 to the next number of the dtype in which x is computed."""
    return 2.0**-23 if _arithmetic(x) == cnp.NPY_FLOAT32 else 2.0**-52


include "_rows.pxi"
include "_conditional.pxi"
include "_ghost.pxi"
include "_parts.pxi"


# running statistics

cdef int _warn_of(int too_large) except -1:
    """Warn of running statistics that the core found too large for their dtype."""
    if too_large & <int>core.MEAN_TOO_LARGE:
        _validation.warn_too_large("running_mean")
    if too_large & <int>core.VAR_TOO_LARGE:
        _validation.warn_too_large("running_var")
    return 0


cdef tuple _MEAN_AND_VAR = ("running_mean", "running_var")


def update_running(
    tuple tracked, double momentum, mean, second, double divisor=1.0, tuple names=_MEAN_AND_VAR
):
    """Blend the mean and second / divisor (float64) into both checked running statistics.

    As `normalize` does. A weight of 0 leaves nothing of what it weighs, also of NaN and infinity:
    with a `momentum` of 0 a statistic stays as it is, with 1 it is that of the batch. Nothing of
    Python's runs between the two: an exception from a signal handler leaves both or none updated.
    """
    _update_running(
        tracked, momentum, numpy.ascontiguousarray(mean), numpy.ascontiguousarray(second), divisor,
        names
    )


cdef int _update_running(
    tuple tracked, double momentum, cnp.ndarray mean, cnp.ndarray second, double divisor,
    tuple names
) except -1:
    first, other = _contiguous_or_copy(tracked[0]), _contiguous_or_copy(tracked[1])
    cdef bint mean_too_large = _core.update_running(first, mean, momentum, 1.0)
    cdef bint second_too_large = _core.update_running(other, second, momentum, divisor)
    mean_too_large |= _put_back(first, tracked[0])
    second_too_large |= _put_back(other, tracked[1])
    if mean_too_large:
        _validation.warn_too_large(names[0])
    if second_too_large:
        _validation.warn_too_large(names[1])
    return 0


def blend(running, double momentum, values, str name):
    """As `update_running`, of a single checked statistic and values (float64)."""
    array = _contiguous_or_copy(running)
    cdef bint too_large = _core.update_running(
        array, numpy.ascontiguousarray(values), momentum, 1.0
    )
    too_large |= _put_back(array, running)
    if too_large:
        _validation.warn_too_large(name)


# what is composed of them

include "_deviations.pxi"
include "_weight_norm.pxi"
include "_standardization.pxi"
include "_renorm.pxi"


def probe_memory(kind, x, y, int num_threads):
    """Move memory and compute nothing, for the benchmark: see ``_core.probe_memory``."""
    threads = core.startable_threads(min(num_threads, _threads.get_num_threads()))
    core.probe_memory(kind, x, y, threads)
