# One call: each argument as the core needs it, the plan, the threads, the job.
#
# Here are predicates alone: is this argument as the core needs it? One that is not goes to
# _validation, on its own, which converts it or raises: no sentence of an error stands here. Nothing
# is written before everything has been checked.
"""The primitives on arrays: moments, scale_shift, gradient, and normalize: the first two in one.

The only room that hands arrays to ``_core``.
"""

cimport numpy as cnp
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.long cimport PyLong_AsLongAndOverflow

from bnfast cimport _core
from bnfast._core cimport Evaluation as _Evaluation
from bnfast._core cimport (
    BN_DX,
    BN_DY,
    BN_ELEMENT_BIAS,
    BN_ELEMENT_WEIGHT,
    BN_MAX_AXES,
    BN_X,
    BN_Y,
    Geometry,
)

import numpy

from bnfast import _core as core
from bnfast import _threads, _validation
from bnfast._layout import plan_layout, plan_rows

cnp.import_array()

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


# predicates

cdef inline bint _is_array(value) noexcept:
    """An array, no subclass, of native float32 or float64."""
    if not cnp.PyArray_CheckExact(value):
        return False
    cdef cnp.ndarray array = value
    cdef int kind = cnp.PyArray_TYPE(array)
    return (kind == cnp.NPY_FLOAT32 or kind == cnp.NPY_FLOAT64) and cnp.PyArray_ISNOTSWAPPED(array)


cdef inline bint _is_dense(value) noexcept:
    """Such an array, C-contiguous and aligned."""
    return _is_array(value) and cnp.PyArray_CHKFLAGS(<cnp.ndarray>value, cnp.NPY_ARRAY_CARRAY_RO)


cdef inline bint _is_of_channels(value, Py_ssize_t channels) noexcept:
    return (
        _is_dense(value)
        and cnp.PyArray_NDIM(<cnp.ndarray>value) == 1
        and cnp.PyArray_DIM(<cnp.ndarray>value, 0) == channels
    )


cdef bint _is_of_shape(value, int ndim, const cnp.npy_intp *shape) noexcept:
    cdef int d
    if not _is_dense(value) or cnp.PyArray_NDIM(<cnp.ndarray>value) != ndim:
        return False
    for d in range(ndim):
        if cnp.PyArray_DIM(<cnp.ndarray>value, d) != shape[d]:
            return False
    return True


cdef inline bint _is_like(value, cnp.ndarray x) noexcept:
    """An array of the shape and dtype of x."""
    return (
        _is_array(value)
        and cnp.PyArray_TYPE(<cnp.ndarray>value) == cnp.PyArray_TYPE(x)
        and cnp.PyArray_SAMESHAPE(<cnp.ndarray>value, x)
    )


cdef inline bint _is_writable(cnp.ndarray array) noexcept:
    return cnp.PyArray_CHKFLAGS(array, cnp.NPY_ARRAY_WRITEABLE)


cdef bint _has_a_place_for_each(cnp.ndarray array) noexcept:
    """Whether no two indices can name the same memory; in doubt, no."""
    cdef cnp.npy_intp steps[BN_MAX_AXES]
    cdef cnp.npy_intp sizes[BN_MAX_AXES]
    cdef cnp.npy_intp step, reach = cnp.PyArray_ITEMSIZE(array)
    cdef int d, place, axes = 0
    if cnp.PyArray_CHKFLAGS(array, cnp.NPY_ARRAY_C_CONTIGUOUS):
        return True
    for d in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_DIM(array, d) < 2:
            continue
        step = abs(cnp.PyArray_STRIDE(array, d))
        place = axes
        while place > 0 and steps[place - 1] > step:
            steps[place], sizes[place] = steps[place - 1], sizes[place - 1]
            place -= 1
        steps[place], sizes[place] = step, cnp.PyArray_DIM(array, d)
        axes += 1
    for d in range(axes):
        if steps[d] < reach:
            return False
        reach += steps[d] * (sizes[d] - 1)
    return True


cdef void _bounds(cnp.ndarray array, char **first, char **end) noexcept:
    """Between which addresses the memory of an array lies."""
    cdef int d
    cdef cnp.npy_intp reach
    first[0] = end[0] = <char *>cnp.PyArray_DATA(array)
    end[0] += cnp.PyArray_ITEMSIZE(array)
    for d in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_DIM(array, d) == 0:
            end[0] = first[0]
            return
        reach = (cnp.PyArray_DIM(array, d) - 1) * cnp.PyArray_STRIDE(array, d)
        if reach < 0:
            first[0] += reach
        else:
            end[0] += reach


cdef bint _are_apart(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether the memory of one array ends before that of the other; in doubt, no."""
    cdef char *a_first
    cdef char *a_end
    cdef char *b_first
    cdef char *b_end
    _bounds(a, &a_first, &a_end)
    _bounds(b, &b_first, &b_end)
    return a_end <= b_first or b_end <= a_first


cdef bint _is_same_memory(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether every index of two arrays of one shape names the same element."""
    cdef int d
    if cnp.PyArray_DATA(a) != cnp.PyArray_DATA(b):
        return False
    for d in range(cnp.PyArray_NDIM(a)):
        if (
            cnp.PyArray_DIM(a, d) > 1
            and cnp.PyArray_STRIDE(a, d) != cnp.PyArray_STRIDE(b, d)
        ):
            return False
    return True


# each argument: as the core needs it, or what _validation makes of it

cdef inline cnp.ndarray _batch(x, axis_, Py_ssize_t *axis, Reduction over):
    """The input, with `axis` counted from 0; per sample, it is not 0."""
    cdef int beyond, ndim
    if _is_array(x) and type(axis_) is int:
        ndim = cnp.PyArray_NDIM(<cnp.ndarray>x)
        axis[0] = PyLong_AsLongAndOverflow(axis_, &beyond)
        if not beyond and -ndim <= axis[0] < ndim and ndim >= 2:
            axis[0] += ndim if axis[0] < 0 else 0
            if axis[0] > 0 or not over.per_sample:
                return x
    array, axis[0], _ = _validation.batch("x", x, axis_)
    if over.per_sample:
        _validation.channel_axis_of_samples(array, axis_)
    return array


cdef inline Py_ssize_t _channels(cnp.ndarray x, Py_ssize_t axis) noexcept:
    return cnp.PyArray_DIM(x, <int>axis) if cnp.PyArray_NDIM(x) > 1 else 0


cdef inline object _of_channels(str name, value, Py_ssize_t channels):
    if value is None or _is_of_channels(value, channels):
        return value
    return _validation.channel_parameter(name, value, channels)


cdef object _of_samples(str name, value, cnp.ndarray x, Py_ssize_t channels):
    """One value for each channel of each sample."""
    cdef cnp.npy_intp shape[2]
    shape[0], shape[1] = cnp.PyArray_DIM(x, 0), channels
    if value is None or _is_of_shape(value, 2, shape):
        return value
    return _validation.sample_parameter(name, value, shape[0], channels)


cdef inline object _required(str name, value, Py_ssize_t channels):
    if _is_of_channels(value, channels):
        return value
    return _validation.required_channel_parameter(name, value, channels)


cdef object _saved(str name, value, int ndim, const cnp.npy_intp *shape):
    """A statistic that a forward pass returned."""
    if _is_of_shape(value, ndim, shape):
        return value
    return _validation.saved_statistic(name, value, tuple([shape[d] for d in range(ndim)]))


cdef object _of_elements(str name, value, cnp.ndarray x, int rows, tuple axes, bint finite):
    """One value for each element of a row, which are all axes from `rows` on, or else `axes`."""
    cdef int ndim = cnp.PyArray_NDIM(x)
    if value is None:
        return None
    if (
        axes is None
        and _is_of_shape(value, ndim - rows, cnp.PyArray_DIMS(x) + rows)
        and cnp.PyArray_TYPE(<cnp.ndarray>value) == cnp.PyArray_TYPE(x)
    ):
        return value
    shape = _elements_shape(x, rows, axes)
    return _validation.element_parameter(name, value, shape, x.dtype, finite)


cdef inline double _eps(eps, bint any_number, bint positive) except? -1.0:
    cdef double number
    if type(eps) is float:
        number = <double>eps
        if number - number == 0.0 and (any_number or number > 0.0):
            return number
        if number == 0.0 and not positive:
            return number
    if any_number:
        return _validation.real("eps", eps)
    return _validation.epsilon(eps, training=positive)


cdef inline double _real(str name, value) except? -1.0:
    cdef double number
    if type(value) is float:
        number = <double>value
        if number - number == 0.0:
            return number
    return _validation.real(name, value)


cdef Py_ssize_t _channels_per_group(num_groups, Py_ssize_t channels) except -1:
    cdef int beyond
    cdef Py_ssize_t groups
    if num_groups is None:
        return 1
    if type(num_groups) is int and channels > 0:
        groups = PyLong_AsLongAndOverflow(num_groups, &beyond)
        if not beyond and groups > 0 and channels % groups == 0:
            return channels // groups
    return _validation.channels_of_group(num_groups, channels)


cdef object _groups_of(mean):
    """How many groups the saved statistics of a group normalization have."""
    if _is_array(mean) and cnp.PyArray_NDIM(<cnp.ndarray>mean) == 2:
        return cnp.PyArray_DIM(<cnp.ndarray>mean, 1)
    return _validation.groups_of_statistics("mean", mean)


cdef inline object _upstream(dy, cnp.ndarray x):
    return dy if _is_like(dy, x) else _validation.upstream_gradient(dy, x)


cdef object _tracked(mean, var, cnp.ndarray x, Py_ssize_t channels):
    """Both running statistics, to be updated in place, or None for none."""
    if mean is None and var is None:
        return None
    if (
        _is_of_channels(mean, channels)
        and _is_of_channels(var, channels)
        and _is_writable(mean)
        and _is_writable(var)
        and _are_apart(mean, var)
        and _are_apart(mean, x)
        and _are_apart(var, x)
    ):
        return mean, var
    return _validation.running_statistics(mean, var, x, channels)


cdef object _output(out, cnp.ndarray x, tuple names, tuple values, reads, int in_place):
    """Where to write: a new array like x, or `out`, where that shares no memory with the others.

    It may be one of the first `in_place` of the values, element by element. `reads` are more that
    are read, by name, or None.
    """
    cdef bint known
    if out is None:
        return _core.empty_output(x)
    known = (
        _is_like(out, x)
        and _is_writable(out)
        and _has_a_place_for_each(out)
        and _may_be_written(out, values, in_place)
        and (reads is None or _may_be_written(out, tuple(reads.values()), 0))
    )
    if known:
        return out
    others = dict(zip(names, values))
    if reads is not None:
        others.update(reads)
    return _validation.output(out, x, others, ("dy", "x"))


cdef bint _may_be_written(cnp.ndarray out, tuple values, int in_place):
    cdef int k
    for k, value in enumerate(values):
        if value is None:
            continue
        if not cnp.PyArray_CheckExact(value):
            return False
        if not _are_apart(out, value) and not (k < in_place and _is_same_memory(out, value)):
            return False
    return True


# plans, of arrays of one dtype, with the same sizes and strides

cdef dict _plans = {}
cdef Py_ssize_t _MOST_PLANS = 1024


cdef enum:
    MOST_OPERANDS = 3


cdef bytes _key(
    cnp.ndarray x, Py_ssize_t axes, Py_ssize_t kind, cnp.ndarray second, cnp.ndarray third
):
    """What a plan depends on. The stride of an axis of one element is moot, and counts as 0."""
    cdef cnp.npy_intp words[4 + BN_MAX_AXES * (1 + MOST_OPERANDS)]
    cdef cnp.ndarray operand
    cdef int d, k, ndim = cnp.PyArray_NDIM(x), count = 4
    cdef bint aligned
    words[0] = cnp.PyArray_TYPE(x)
    words[1] = axes
    words[2] = kind
    words[3] = 0
    for d in range(ndim):
        words[count] = cnp.PyArray_DIM(x, d)
        count += 1
    for k in range(MOST_OPERANDS):
        operand = x if k == 0 else second if k == 1 else third
        if operand is None:
            break
        aligned = cnp.PyArray_CHKFLAGS(operand, cnp.NPY_ARRAY_ALIGNED)
        words[3] |= <cnp.npy_intp>(3 if aligned else 2) << 2 * k
        for d in range(ndim):
            words[count] = cnp.PyArray_STRIDE(operand, d) if cnp.PyArray_DIM(x, d) > 1 else 0
            count += 1
    return PyBytes_FromStringAndSize(<char *>words, count * sizeof(cnp.npy_intp))


cdef object _layout_of(cnp.ndarray second, cnp.ndarray third, cnp.ndarray x):
    """(strides, aligned) of all operands."""
    operands = [operand for operand in (x, second, third) if operand is not None]
    return (
        tuple([operand.strides for operand in operands]),
        tuple([operand.flags.aligned for operand in operands]),
    )


# Of calls on so many arrays.
cdef tuple _ROLES = ((), (BN_X,), (BN_X, BN_Y), (BN_X, BN_DY, BN_DX))


cdef Geometry _kept(key, plan, tuple roles):
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = geometry = Geometry(plan, roles)
    return geometry


cdef Geometry _geometry(
    Py_ssize_t axis, Reduction over, cnp.ndarray x, cnp.ndarray second, cnp.ndarray third
):
    """The plan of a call with statistics of channels."""
    cdef bytes key = _key(x, axis, over.per_sample, second, third)
    cdef Geometry found = _plans.get(key)
    if found is not None:
        return found
    strides, aligned = _layout_of(second, third, x)
    repeated = (0,) if over.per_sample else ()
    plan = plan_layout((<object>x).shape, (axis,), repeated, x.itemsize, strides, aligned)
    return _kept(key, plan, _ROLES[len(strides)])


cdef Geometry _geometry_of_rows(
    int rows, tuple axes, int parameters, cnp.ndarray x, cnp.ndarray second, cnp.ndarray third
):
    """The plan of a call with statistics of rows: of all axes from `rows` on, or else of `axes`."""
    cdef object key = _key(x, -1 - rows, 2 + parameters, second, third)
    if axes is not None:
        key = key, axes
    cdef Geometry found = _plans.get(key)
    if found is not None:
        return found
    strides, aligned = _layout_of(second, third, x)
    normalized = tuple(range(rows, x.ndim)) if axes is None else axes
    inputs = len(strides) - 1  # all but the output
    plan = plan_rows(
        (<object>x).shape, normalized, x.itemsize, strides, aligned, inputs, parameters
    )
    of_elements = (BN_ELEMENT_WEIGHT, BN_ELEMENT_BIAS)[:parameters]
    return _kept(key, plan, _ROLES[len(strides)] + of_elements)


cdef int _threads_for(cnp.ndarray x, int passes) except -1:
    """For a call that reads and writes memory as large as x so many times."""
    cdef Py_ssize_t moved = passes * cnp.PyArray_NBYTES(x)
    return 1 if moved < <Py_ssize_t>_threads.SERIAL_BYTES else _threads.threads_for(moved)


# new arrays

cdef inline cnp.ndarray _empty(int ndim, const cnp.npy_intp *shape, int kind):
    return cnp.PyArray_EMPTY(ndim, <cnp.npy_intp *>shape, kind, 0)


cdef inline cnp.ndarray _zeros(int ndim, const cnp.npy_intp *shape, int kind):
    return cnp.PyArray_ZEROS(ndim, <cnp.npy_intp *>shape, kind, 0)


def invstd_of_nothing(double eps):
    """Return 1 / sqrt(0 + eps)."""
    if eps > 0:
        return eps**-0.5
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


# the primitives

def moments(x_, axis_, mean_low=None):
    """Return the count, and the mean and m2 of each channel (float64).

    `mean_low`, a float64 array of the shape of the mean, receives what rounding left of it.
    """
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, BATCH)
    cdef cnp.npy_intp channels = _channels(x, axis)
    mean = _zeros(1, &channels, cnp.NPY_FLOAT64)
    m2 = _zeros(1, &channels, cnp.NPY_FLOAT64)
    if cnp.PyArray_SIZE(x) == 0:
        return 0, mean, m2
    _core.moments(_geometry(axis, BATCH, x, None, None), x, mean, mean_low, m2, _threads_for(x, 1))
    return cnp.PyArray_SIZE(x) // channels, mean, m2


def normalize(
    x_, axis_, weight, bias, eps, running_mean=None, running_var=None, momentum=0.0,
    bint unbiased=True, out=None, Reduction over=BATCH, num_groups=None, m2=None, tau=None,
    more_eps=None, reads=None
):
    """Return y, and the mean and invstd (float64) that made it.

    The running statistics, both given or neither, are updated with `momentum` as the weight of the
    batch: of the average of its samples, where each has its own. `m2`, a float64 array of the shape
    of the mean, receives that of the batch. Channels may have a floor `tau` that no output goes
    below, and a checked `more_eps` of their own, which is added to eps. `reads` are more arguments
    that `out` must share no memory with.
    """
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, over), mean, invstd
    cdef Py_ssize_t channels = _channels(x, axis)
    cdef Py_ssize_t per_group = _channels_per_group(num_groups, channels)
    cdef double epsilon = _eps(eps, over.any_eps, True), new = _real("momentum", momentum)
    scale, shift = _of_channels("weight", weight, channels), _of_channels("bias", bias, channels)
    floor = _of_channels("tau", tau, channels)
    tracked = _tracked(running_mean, running_var, x, channels)
    y = _output(
        out, x, ("x", "weight", "bias", "running_mean", "running_var", "tau"),
        (x, weight, bias, running_mean, running_var, tau), reads, 1
    )
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
    mean = _empty(ndim, shape, cnp.NPY_FLOAT64)
    invstd = _empty(ndim, shape, cnp.NPY_FLOAT64)
    written_mean = written_var = None
    if tracked is not None:
        written_mean, written_var = _contiguous_or_copy(tracked[0]), _contiguous_or_copy(tracked[1])
    too_large = _core.normalize(
        _geometry(axis, over, x, y, None), x, y, scale, shift, epsilon, mean, invstd, m2,
        <size_t>per_group, over.centred, written_mean, written_var, new, 1.0 if unbiased else 0.0,
        floor, more_eps, _threads_for(x, 3)
    )
    if tracked is not None:
        _put_back(written_mean, tracked[0])
        _put_back(written_var, tracked[1])
        if too_large:
            _warn_of(too_large)
    return y, mean, invstd


def scale_shift(
    x_, axis_, mean, variance, weight, bias, eps, _Evaluation kept=None, out=None, reads=None
):
    """Return y from given statistics, called running_mean and running_var in messages.

    What statistics and parameters are turned into is `kept` for the next call, if there is such an
    object, and used again where they are the same then; an empty x needs none. `reads` are more
    arguments that `out` must share no memory with.
    """
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, BATCH)
    cdef Py_ssize_t channels = _channels(x, axis)
    cdef double epsilon = _eps(eps, False, False)
    centre = _required("running_mean", mean, channels)
    spread = _required("running_var", variance, channels)
    scale, shift = _of_channels("weight", weight, channels), _of_channels("bias", bias, channels)
    y = _output(
        out, x, ("x", "weight", "bias", "running_mean", "running_var"),
        (x, weight, bias, mean, variance), reads, 1
    )
    if cnp.PyArray_SIZE(x) > 0:
        _core.scale_shift(
            _geometry(axis, BATCH, x, y, None), x, y, scale, shift, epsilon, centre, spread, False,
            kept, _threads_for(x, 2)
        )
    return y


def scale_shift_samples(x_, axis_, mean, variance, weight, bias, eps, out=None):
    """As `scale_shift`, with a weight and a bias for channels of samples: (N, C), or None."""
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, PER_SAMPLE)
    cdef Py_ssize_t channels = _channels(x, axis)
    cdef double epsilon = _eps(eps, False, False)
    scale = _of_samples("weight", weight, x, channels)
    shift = _of_samples("bias", bias, x, channels)
    centre = _required("running_mean", mean, channels)
    spread = _required("running_var", variance, channels)
    y = _output(
        out, x, ("x", "weight", "bias", "running_mean", "running_var"),
        (x, weight, bias, mean, variance), None, 1
    )
    if cnp.PyArray_SIZE(x) > 0:
        _core.scale_shift(
            _geometry(axis, PER_SAMPLE, x, y, None), x, y, scale, shift, epsilon, centre, spread,
            True, None, _threads_for(x, 2)
        )
    return y


def gradient(
    dy, x, axis, mean, invstd, weight, bint constant_statistics, out=None, Reduction over=BATCH,
    bint grouped=False, reads=None
):
    """Return dx, dweight and dbias, the latter of the dtype of `weight`, or of x without one.

    The mean of what is not centred is None. `grouped` statistics are those of as many groups as
    they have. `reads` are more arguments that `out` must share no memory with.
    """
    return _gradient(
        dy, x, axis, mean, invstd, weight, constant_statistics, out, over, grouped, None, None,
        None, reads
    )[:3]


def gradient_above_floors(
    dy, x, axis, invrms, weight, bias, tau, out, Reduction over, sums, reads
):
    """Return dx, dweight, dbias and dtau: those of what is not centred, and was kept above tau.

    dy counts where y was not below tau, and for dtau where it was; without a tau, that is None.
    `sums`, float64 (2, *shape of invrms) or None, receives what dtau is the sum of, and
    sum(dy * x * invrms). `reads` are more arguments that `out` must share no memory with.
    """
    return _gradient(
        dy, x, axis, None, invrms, weight, False, out, over, False, bias, tau, sums, reads
    )


def gradient_of_samples(dy, x_, axis_, mean, invstd, weight, sums, cnp.ndarray dx):
    """Write dx = dy * weight * invstd, with a weight (float64) for each channel of each sample.

    `sums`, float64 (2, N, C), receives sum(dy) and sum(dy * (x - mean) * invstd). Everything has
    been checked.
    """
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, PER_SAMPLE)
    if cnp.PyArray_SIZE(x) > 0:
        _core.gradient_of_samples(
            _geometry(axis, PER_SAMPLE, x, dy, dx), x, dy, dx, weight, mean, invstd, sums[0],
            sums[1], _threads_for(x, 5)
        )


cdef tuple _gradient(
    dy, x_, axis_, mean, invstd, weight, bint constant_statistics, out, Reduction over,
    bint grouped, bias, tau, sums, reads
):
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, over)
    cdef cnp.npy_intp channels = _channels(x, axis)
    cdef Py_ssize_t per_group = 1
    cdef cnp.npy_intp shape[2]
    cdef int ndim, kind
    upstream = _upstream(dy, x)
    if grouped:
        groups = _groups_of(mean)
        if channels > 0:
            per_group = _channels_per_group(groups, channels)
    ndim = _statistics_shape(x, axis, over, per_group, shape)
    centre = _saved("mean", mean, ndim, shape) if over.centred else None
    cdef str saved = "invstd" if over.centred else "invrms"
    inverse = _saved(saved, invstd, ndim, shape)
    scale, shift = _of_channels("weight", weight, channels), _of_channels("bias", bias, channels)
    floor = _of_channels("tau", tau, channels)
    dx = _output(
        out, x, ("dy", "x", "weight", "mean", saved, "bias", "tau"),
        (upstream, x, weight, mean, invstd, bias, tau), reads, 2
    )
    kind = cnp.PyArray_TYPE(x if scale is None else <cnp.ndarray>scale)
    dweight, dbias = _zeros(1, &channels, kind), _zeros(1, &channels, kind)
    dtau = None
    if floor is not None:
        dtau = _zeros(1, &channels, cnp.PyArray_TYPE(<cnp.ndarray>floor))
    if cnp.PyArray_SIZE(x) > 0:
        _core.gradient(
            _geometry(axis, over, x, upstream, dx), x, upstream, dx, scale,
            centre, inverse, dweight, dbias, <size_t>per_group,
            constant_statistics, shift, floor, dtau, None if sums is None else sums[0],
            None if sums is None else sums[1], _threads_for(x, 5)
        )
    return dx, dweight, dbias, dtau


cdef int _first_normalized(cnp.ndarray x, sizes) noexcept:
    """The first of the last axes that have these sizes, an integer or a tuple; -1 if not so."""
    cdef int d, beyond, count, ndim = cnp.PyArray_NDIM(x)
    if type(sizes) is int:
        if ndim > 0 and PyLong_AsLongAndOverflow(sizes, &beyond) == cnp.PyArray_DIM(x, ndim - 1):
            return -1 if beyond else ndim - 1
        return -1
    if type(sizes) is not tuple:
        return -1
    count = <int>len(<tuple>sizes)
    if not 0 < count <= ndim:
        return -1
    for d in range(count):
        size = (<tuple>sizes)[d]
        if type(size) is not int:
            return -1
        if PyLong_AsLongAndOverflow(size, &beyond) != cnp.PyArray_DIM(x, ndim - count + d):
            return -1
        if beyond:
            return -1
    return ndim - count


cdef tuple _elements_shape(cnp.ndarray x, int rows, tuple axes):
    """The sizes of a row."""
    if axes is None:
        return (<object>x).shape[rows:]
    return tuple([x.shape[d] for d in axes])


cdef tuple _rows_shape(cnp.ndarray x, int rows, tuple axes):
    if axes is None:
        return (<object>x).shape[:rows]
    return tuple([size for d, size in enumerate((<object>x).shape) if d not in axes])


def normalize_rows(x_, normalized_shape, axis, weight, bias, eps, bint centred, out=None):
    """Return y, and the mean and invstd (float64) of every row: over the last axes, or `axis`.

    `weight` and `bias` have their sizes. Around 0 where they are not `centred`, and then the mean
    is None, and an eps of None the step of the dtype at 1.
    """
    cdef cnp.ndarray x = _rows_input(x_)
    cdef int rows = _first_normalized(x, normalized_shape) if axis is None else -1
    cdef tuple axes = None
    cdef double epsilon
    if rows < 0:
        _, axes = _validation.normalized_axes(x, normalized_shape, axis)
    if eps is None and not centred:
        epsilon = 2.0**-23 if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32 else 2.0**-52
    else:
        epsilon = _eps(eps, True, True)
    # 0 times infinity would make NaN of what is equal to its mean.
    scale = _of_elements("weight", weight, x, rows, axes, True)
    shift = _of_elements("bias", bias, x, rows, axes, False)
    y = _output(out, x, ("x", "weight", "bias"), (x, weight, bias), None, 1)
    cdef Geometry geometry
    if axes is None:
        mean = _empty(rows, cnp.PyArray_DIMS(x), cnp.NPY_FLOAT64) if centred else None
        invstd = _empty(rows, cnp.PyArray_DIMS(x), cnp.NPY_FLOAT64)
    else:
        shape = _rows_shape(x, rows, axes)
        mean, invstd = numpy.empty(shape) if centred else None, numpy.empty(shape)
    if cnp.PyArray_SIZE(x) == 0:
        if centred:
            mean.fill(0.0)
        invstd.fill(invstd_of_nothing(epsilon))
        return y, mean, invstd
    if scale is None and shift is not None:
        scale = numpy.ones_like(shift)
    elif shift is None and scale is not None and centred:
        shift = cnp.PyArray_ZEROS(
            cnp.PyArray_NDIM(<cnp.ndarray>scale), cnp.PyArray_DIMS(<cnp.ndarray>scale),
            cnp.PyArray_TYPE(x), 0
        )
    geometry = _geometry_of_rows(rows, axes, 0 if scale is None else 2, x, y, None)
    if not geometry.in_order:
        scale, shift = _as_walked(scale, geometry.walked), _as_walked(shift, geometry.walked)
    _core.normalize_rows(
        geometry, x, y, scale, shift, epsilon, mean, invstd, _threads_for(x, 3)
    )
    return y, mean, invstd


cdef inline cnp.ndarray _rows_input(x):
    return x if _is_array(x) else _validation.floating_array("x", x)


def row_gradient(
    dy, x_, normalized_shape, axis, mean, invstd, weight, bint centred, bint parameters, out=None
):
    """Return dx, and where `parameters` have gradients dweight and dbias, of the dtype of `weight`.

    The mean of what is not `centred` is None.
    """
    cdef cnp.ndarray x = _rows_input(x_)
    cdef int rows = _first_normalized(x, normalized_shape) if axis is None else -1
    cdef tuple axes = None
    cdef Geometry geometry
    if rows < 0:
        _, axes = _validation.normalized_axes(x, normalized_shape, axis)
    upstream = _upstream(dy, x)
    cdef str saved = "invstd" if centred else "invrms"
    if axes is None:
        inverse = _saved(saved, invstd, rows, cnp.PyArray_DIMS(x))
        centre = _saved("mean", mean, rows, cnp.PyArray_DIMS(x)) if centred else None
    else:
        shape = _rows_shape(x, rows, axes)
        inverse = _validation.saved_statistic(saved, invstd, shape)
        centre = _validation.saved_statistic("mean", mean, shape) if centred else None
    # 0 times infinity would make NaN of what is equal to its mean.
    scale = _of_elements("weight", weight, x, rows, axes, True)
    dx = _output(
        out, x, ("dy", "x", "weight", "mean", saved), (upstream, x, weight, mean, invstd), None, 2
    )
    cdef int kind = cnp.PyArray_TYPE(x)
    if weight is not None:
        kind = cnp.PyArray_TYPE(<cnp.ndarray>(weight if scale is weight else numpy.asarray(weight)))
    if cnp.PyArray_SIZE(x) == 0:
        if not parameters:
            return dx, None, None
        zeros = numpy.zeros((2, *_elements_shape(x, rows, axes)), cnp.PyArray_DescrFromType(kind))
        return dx, zeros[0], zeros[1]
    geometry = _geometry_of_rows(rows, axes, 0 if scale is None else 1, x, upstream, dx)
    cdef cnp.npy_intp size = <cnp.npy_intp>(geometry.c.outer * geometry.c.inner)
    cdef cnp.npy_intp all_sums = 2 * size * <cnp.npy_intp>geometry.row_blocks
    sums = _empty(1, &all_sums, cnp.NPY_FLOAT64) if parameters else None
    if not geometry.in_order:
        scale = _as_walked(scale, geometry.walked)
    _core.row_gradient(
        geometry, x, upstream, dx, scale, centre, inverse, sums, _threads_for(x, 5)
    )
    if sums is None:
        return dx, None, None
    if geometry.in_order and axes is None:
        return dx, _rounded(sums, 0, x, rows, kind), _rounded(sums, size, x, rows, kind)
    columns = _in_order(
        sums[: 2 * size].reshape(2, size), geometry.walked, _elements_shape(x, rows, axes)
    )
    with numpy.errstate(all="ignore"):
        return dx, cnp.PyArray_Cast(columns[0], kind), cnp.PyArray_Cast(columns[1], kind)


cdef cnp.ndarray _rounded(cnp.ndarray sums, cnp.npy_intp start, cnp.ndarray x, int rows, int kind):
    """A new array of this type for the elements of a row, from sums of float64."""
    cdef cnp.ndarray array = _empty(
        cnp.PyArray_NDIM(x) - rows, cnp.PyArray_DIMS(x) + rows, kind
    )
    cdef const double *values = <const double *>cnp.PyArray_DATA(sums) + start
    cdef float *narrow = <float *>cnp.PyArray_DATA(array)
    cdef double *wide = <double *>cnp.PyArray_DATA(array)
    cdef Py_ssize_t i, size = cnp.PyArray_SIZE(array)
    if kind == cnp.NPY_FLOAT32:
        for i in range(size):
            narrow[i] = <float>values[i]
    else:
        for i in range(size):
            wide[i] = values[i]
    return array


def _as_walked(parameter, walked):
    """Return the parameter of the elements of a row in the order in which they are walked."""
    if parameter is None:
        return None
    others = [d for d in range(parameter.ndim) if d not in walked]  # of a single element
    return numpy.ascontiguousarray(parameter.transpose(*walked, *others))


def _in_order(columns, walked, shape):
    """Return sums of the elements of a row, in the order of `shape` rather than of the walk."""
    sizes = [shape[d] for d in walked]
    order = sorted(range(len(walked)), key=walked.__getitem__)
    turned = columns.reshape(len(columns), *sizes).transpose(0, *[d + 1 for d in order])
    return turned.reshape(len(columns), *shape)


# running statistics

cdef object _contiguous_or_copy(cnp.ndarray statistic):
    """The statistic as the core needs it: contiguous and aligned, or a copy to put back."""
    if cnp.PyArray_CHKFLAGS(statistic, cnp.NPY_ARRAY_CARRAY_RO):
        return statistic
    return statistic.copy()


cdef int _put_back(updated, statistic) except -1:
    if updated is not statistic:
        statistic[...] = updated
    return 0


cdef int _warn_of(int too_large) except -1:
    """Warn of running statistics that the core found too large for their dtype."""
    if too_large & <int>core.MEAN_TOO_LARGE:
        _validation.warn_too_large("running_mean")
    if too_large & <int>core.VAR_TOO_LARGE:
        _validation.warn_too_large("running_var")
    return 0


def update_running(
    tuple tracked, double momentum, mean, second, double divisor=1.0,
    tuple names=("running_mean", "running_var")
):
    """Blend the mean and second / divisor (float64) into both checked running statistics.

    As `normalize` does. A weight of 0 leaves nothing of what it weighs, also of NaN and infinity:
    with a `momentum` of 0 a statistic stays as it is, with 1 it is that of the batch. Nothing of
    Python's runs between the two: an exception from a signal handler leaves both or none updated.
    """
    cdef cnp.ndarray first_new = numpy.ascontiguousarray(mean)
    cdef cnp.ndarray second_new = numpy.ascontiguousarray(second)
    first, other = _contiguous_or_copy(tracked[0]), _contiguous_or_copy(tracked[1])
    cdef bint mean_too_large = _core.update_running(first, first_new, momentum, 1.0)
    cdef bint second_too_large = _core.update_running(other, second_new, momentum, divisor)
    _put_back(first, tracked[0])
    _put_back(other, tracked[1])
    if mean_too_large:
        _validation.warn_too_large(names[0])
    if second_too_large:
        _validation.warn_too_large(names[1])


def probe_memory(kind, x, y, int num_threads):
    """Move memory and compute nothing, for the benchmark: see ``_core.probe_memory``."""
    core.probe_memory(kind, x, y, min(num_threads, _threads.get_num_threads()))
