# A batch in parts, for _primitives.pyx: its sums are made part by part, and a part is written once
# those of all parts are known.

cdef class PartOfBatch:
    """A `normalize` of a part: the arguments, checked, and its own moments; nothing is written.

    `moments`, (3, C) of float64, are the mean, what rounding left of it, and m2.
    """

    cdef readonly cnp.ndarray x, moments
    cdef readonly Py_ssize_t channels, count  # values of each channel
    cdef Py_ssize_t axis
    cdef object y, scale, shift
    cdef tuple tracked
    cdef double epsilon, momentum
    cdef bint unbiased

    def __init__(
        self, x_, axis_, weight, bias, eps, running_mean, running_var, momentum, bint unbiased, out
    ):
        cdef cnp.npy_intp shape[2]
        self.x = _batch(x_, axis_, &self.axis, BATCH)
        cdef cnp.ndarray x = self.x
        self.channels = channels = _channels(x, self.axis)
        self.epsilon, self.momentum = _eps(eps, False, True), _real("momentum", momentum)
        self.unbiased = unbiased
        self.scale = _of_channels("weight", weight, channels)
        self.shift = _of_channels("bias", bias, channels)
        self.tracked = _tracked(running_mean, running_var, x, channels, _MEAN_AND_VAR)
        self.y = _output(
            out, x, ("x", "weight", "bias", "running_mean", "running_var"),
            (x, weight, bias, running_mean, running_var), None, 1
        )
        shape[0], shape[1] = 3, channels
        self.moments = moments = _zeros(2, shape, cnp.NPY_FLOAT64)
        self.count = 0
        if cnp.PyArray_SIZE(x) > 0:
            self.count = cnp.PyArray_SIZE(x) // channels
            _core.moments(
                _plan(self.axis, BATCH, x, None, None), x, moments[0], moments[1], moments[2],
                _threads_for(x, 1)
            )

    def normalize(self, count, cnp.ndarray moments, bint track):
        """Return y and invstd, from the count and the moments of all parts together.

        The running statistics, if any, are left as they are unless `track`.
        """
        cdef cnp.npy_intp channels = self.channels
        cdef cnp.ndarray x = self.x
        track = track and self.tracked is not None and count > 0
        if track and count < 2:
            _validation.enough_values("x", x, count, "channel", unbiased=self.unbiased)
        invstd = _empty(1, &channels, cnp.NPY_FLOAT64)
        variance = moments[2] / max(count, 1)
        _core.invstd(variance, self.epsilon, invstd)
        if cnp.PyArray_SIZE(x) > 0:
            _core.normalize_part(
                _plan(self.axis, BATCH, x, self.y, None), x, self.y, self.scale, self.shift,
                moments[0], moments[1], invstd, _threads_for(x, 2)
            )
        if track:
            _update_running(
                self.tracked, self.momentum, moments[0], moments[2],
                count - (1.0 if self.unbiased else 0.0), _MEAN_AND_VAR
            )
        return self.y, invstd


def merge_moments(cnp.ndarray counts, cnp.ndarray moments):
    """Return the moments of all parts together, (3, C): of each part (parts, 3, C), in this order.

    `counts`, int64, are its values of each channel.
    """
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(moments)
    merged = _zeros(2, shape + 1, cnp.NPY_FLOAT64)
    _core.merge_moments(counts, moments, merged)
    return merged


cdef class PartOfGradient:
    """A `gradient` of a part: the arguments, checked, and its own sums; no dx is written.

    `sums`, (2, C) of float64, are sum(dy) and sum(dy * xhat). `mean_low` is what rounding left of
    the mean; where it is None, it is found again in x as `gradient` does.
    """

    cdef readonly cnp.ndarray x, sums
    cdef readonly Py_ssize_t channels
    cdef Py_ssize_t axis
    cdef object dy, dx, mean, mean_low, invstd, weight, scale
    cdef int kind

    def __init__(self, dy, x_, axis_, mean, mean_low, invstd, weight, out):
        cdef cnp.npy_intp channels
        self.x = _batch(x_, axis_, &self.axis, BATCH)
        cdef cnp.ndarray x = self.x
        self.channels = channels = _channels(x, self.axis)
        self.dy, self.mean, self.invstd = _of_gradient(dy, x, channels, mean, invstd)
        if mean_low is not None and _arithmetic(x) == cnp.NPY_FLOAT64:
            self.mean_low = _widened(_saved("mean_low", mean_low, 1, &channels))
        self.weight, self.scale = weight, _of_channels("weight", weight, channels)
        self.dx = _output(
            out, x, ("dy", "x", "weight", "mean", "invstd"), (self.dy, x, weight, mean, invstd),
            None, 2
        )
        self.kind = _parameter_type(x)
        if self.scale is not None:
            self.kind = cnp.PyArray_TYPE(<cnp.ndarray>self.scale)
        self.sums = _gradient_sums(self.axis, x, self.dy, self.mean, self.mean_low, self.invstd)

    def parameter_gradients(self):
        """Return dweight and dbias of this part, of the dtype of the weight, or of x without."""
        cdef cnp.npy_intp channels = self.channels
        cdef double *sums = _doubles(self.sums)
        dweight = _rounded(sums + channels, 1, &channels, self.kind)
        dbias = _rounded(sums, 1, &channels, self.kind)
        return (
            _of_parameter("weight", self.weight, self.scale, dweight),
            _of_parameter("weight", self.weight, self.scale, dbias)
        )

    def input_gradient(self, double count, cnp.ndarray sums):
        """Return dx, from the count and the sums of all parts together."""
        _write_dx(
            self.axis, self.x, self.dy, self.dx, self.scale, self.mean, self.mean_low, self.invstd,
            sums[0], sums[1], count
        )
        return self.dx


def gradient_sums(dy, x_, axis_, mean, invstd):
    """Return sum(dy) and sum(dy * xhat) of each channel, float64."""
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, BATCH)
    upstream, centre, inverse = _of_gradient(dy, x, _channels(x, axis), mean, invstd)
    sums = _gradient_sums(axis, x, upstream, centre, None, inverse)
    return sums[0], sums[1]


def input_gradient(dy, x_, axis_, mean, invstd, weight, sum_dy, sum_dy_xhat, count, out=None):
    """Return dx, from such sums over all parts, which have `count` values of each channel."""
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, BATCH)
    cdef Py_ssize_t channels = _channels(x, axis)
    upstream, centre, inverse = _of_gradient(dy, x, channels, mean, invstd)
    scale = _of_channels("weight", weight, channels)
    sum_of_dy = _required("sum_dy", sum_dy, channels)
    sum_of_products = _required("sum_dy_xhat", sum_dy_xhat, channels)
    cdef double values = _count(count)
    dx = _output(
        out, x, ("dy", "x", "weight", "mean", "invstd", "sum_dy", "sum_dy_xhat"),
        (upstream, x, weight, mean, invstd, sum_dy, sum_dy_xhat), None, 2
    )
    _write_dx(
        axis, x, upstream, dx, scale, centre, None, inverse, sum_of_dy, sum_of_products, values
    )
    return dx


cdef tuple _of_gradient(dy, cnp.ndarray x, cnp.npy_intp channels, mean, invstd):
    """dy, mean and invstd, as the core needs them."""
    return (
        _upstream(dy, x, ("dy", "x")), _saved("mean", mean, 1, &channels),
        _saved("invstd", invstd, 1, &channels)
    )


cdef cnp.ndarray _gradient_sums(
    Py_ssize_t axis, cnp.ndarray x, dy, mean, mean_low, invstd
):
    cdef cnp.npy_intp shape[2]
    shape[0], shape[1] = 2, _channels(x, axis)
    sums = _zeros(2, shape, cnp.NPY_FLOAT64)
    if cnp.PyArray_SIZE(x) > 0:
        _core.gradient_sums(
            _plan_of_sums(axis, x, dy), x, dy, mean, mean_low, invstd, sums[0], sums[1],
            _threads_for(x, 2)
        )
    return sums


cdef int _write_dx(
    Py_ssize_t axis, cnp.ndarray x, dy, dx, scale, mean, mean_low, invstd, sum_dy, sum_dy_xhat,
    double count
) except -1:
    if cnp.PyArray_SIZE(x) == 0:
        return 0
    return _core.input_gradient(
        _plan(axis, BATCH, x, dy, dx), x, dy, dx, scale, mean, mean_low, invstd, sum_dy,
        sum_dy_xhat, count, _threads_for(x, 3)
    )
