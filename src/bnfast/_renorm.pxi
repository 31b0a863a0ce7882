# Batch renormalization, for _primitives.pyx.

cdef tuple _MEAN_AND_STD = ("running_mean", "running_std")

# Smaller running deviations, 0 among them, stand for this one: its inverse times a weight must not
# be infinite, which would make NaN of an x that is equal to its mean.
cdef double _SMALLEST_STD = 1e-290


def renormalize(
    x_, running_mean, running_std, weight, bias, momentum, eps, r_max, d_max, axis_, out
):
    """Return y, and the mean, invstd, r and d (float64) that made it.

    The running statistics, both of which must be given, are updated.
    """
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, BATCH)
    cdef Py_ssize_t c, channels = _channels(x, axis)
    cdef double epsilon = _eps(eps, False, True), new = _real("momentum", momentum)
    cdef double largest = _real("r_max", r_max), furthest = _real("d_max", d_max)
    if largest < 1.0 or furthest < 0.0:
        _validation.renorm_limits(r_max, d_max)
    cdef tuple tracked = _tracked(running_mean, running_std, x, channels, _MEAN_AND_STD)
    cdef cnp.ndarray gamma = _of_channels("weight", weight, channels)
    cdef cnp.ndarray beta = _of_channels("bias", bias, channels)
    cdef cnp.ndarray y = _output(
        out, x, ("x", "weight", "bias", "running_mean", "running_std"),
        (x, weight, bias, running_mean, running_std), None, 1
    )
    cdef cnp.ndarray mean = _new_doubles(channels), invstd = _new_doubles(channels)
    cdef cnp.ndarray r = _new_doubles(channels), d = _new_doubles(channels)
    if cnp.PyArray_SIZE(x) == 0:
        for array, value in (
            (mean, 0.0), (invstd, invstd_of_nothing(epsilon)), (r, 1.0), (d, 0.0)
        ):
            array.fill(value)
        return y, mean, invstd, r, d
    cdef cnp.ndarray mean_low = _new_mean_low(x, channels)
    cdef cnp.ndarray scale = _new_doubles(channels), shift = _new_doubles(channels)
    cdef cnp.ndarray sigma = _new_doubles(channels)
    cdef cnp.ndarray before = _contiguous_or_copy(tracked[0]), std = _contiguous_or_copy(tracked[1])
    cdef double distance, factor
    _deviations_with_eps(x, axis, epsilon, mean, mean_low, sigma, invstd)
    for c in range(channels):
        distance = _doubles(mean)[c] - _at(before, c, 0.0)
        if mean_low is not None:
            distance += _doubles(mean_low)[c]
        _doubles(invstd)[c] = 1.0 / _doubles(sigma)[c]
        _doubles(r)[c] = _between(1.0 / largest, _doubles(sigma)[c], _at(std, c, 0.0), largest)
        _doubles(d)[c] = _between(-furthest, distance, _at(std, c, 0.0), furthest)
        factor = _at(gamma, c, 1.0)
        _doubles(scale)[c] = factor * _doubles(r)[c] * _doubles(invstd)[c]
        _doubles(shift)[c] = factor * _doubles(d)[c] + _at(beta, c, 0.0)
    _scale_deviations(x, axis, mean, mean_low, scale, shift, y)
    _update_running(tracked, new, mean, sigma, 1.0, _MEAN_AND_STD)
    return y, mean, invstd, r, d


cdef double _between(double lower, double divided, double std, double upper) noexcept:
    """divided / std within limits: its own limit where the running deviation goes to 0.

    0 / 0 is 0 then: a batch of the running mean is not off. Limits that leave no choice decide,
    even if a running statistic is NaN.
    """
    cdef double quotient
    if lower == upper:
        return upper
    quotient = 0.0 if divided == 0.0 else divided / std
    return lower if quotient < lower else upper if quotient > upper else quotient


cdef int _deviations_with_eps(
    cnp.ndarray x, Py_ssize_t axis, double eps, cnp.ndarray mean, cnp.ndarray mean_low,
    cnp.ndarray sigma, cnp.ndarray std
) except -1:
    """As `_deviations`, with sqrt(variance + eps) rather than the variance."""
    cdef Py_ssize_t c, channels = cnp.PyArray_SIZE(mean)
    extreme = _deviations(x, axis, 0, mean, mean_low, sigma, std)
    for c in range(channels):
        _doubles(sigma)[c] = sqrt(_doubles(sigma)[c] + eps)
    if extreme is not None:
        with numpy.errstate(all="ignore"):
            std_of_extreme = std[extreme]
            exponent = _scaling.exponents_to_one(numpy.maximum(std_of_extreme, sqrt(eps)))
            scaled = numpy.ldexp(std_of_extreme, exponent) ** 2 + numpy.ldexp(eps, 2 * exponent)
            sigma[extreme] = numpy.ldexp(numpy.sqrt(scaled), -exponent)
    return 0


def evaluate_renorm(
    x_, axis_, running_mean, running_std, weight, bias, _Evaluation evaluation=None, out=None
):
    """Return y, and the 1 / std (float64) that made it, whose squares float64 need not hold.

    `evaluation` keeps what y is made of, as in `scale_shift`.
    """
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, BATCH)
    cdef Py_ssize_t c, channels = _channels(x, axis)
    centre = _required("running_mean", running_mean, channels)
    cdef cnp.ndarray std = _required("running_std", running_std, channels)
    cdef cnp.ndarray gamma = _of_channels("weight", weight, channels)
    shift = _of_channels("bias", bias, channels)
    y = _output(
        out, x, ("x", "weight", "bias", "running_mean", "running_std"),
        (x, weight, bias, running_mean, running_std), None, 1
    )
    cdef cnp.ndarray inverse = _new_doubles(channels), scale = _new_doubles(channels)
    cdef double deviation
    for c in range(channels):
        deviation = _at(std, c, 0.0)
        if fabs(deviation) < _SMALLEST_STD:
            deviation = _SMALLEST_STD
        _doubles(inverse)[c] = 1.0 / deviation
        _doubles(scale)[c] = _at(gamma, c, 1.0) * _doubles(inverse)[c]
    if cnp.PyArray_SIZE(x) > 0:
        _core.scale_shift(
            _plan(axis, BATCH, x, y, None), x, y, scale, shift, 0.0, centre, None, False,
            evaluation, _threads_for(x, 2)
        )
    return y, inverse


def renorm_gradient(dy, x_, mean, invstd, r, d, weight, axis_, out):
    """Return dx, dweight and dbias, the latter of the dtype of `weight`, or of x without one."""
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, BATCH)
    cdef cnp.npy_intp c, channels = _channels(x, axis)
    cdef cnp.ndarray weights = _of_channels("weight", weight, channels)
    cdef cnp.ndarray slope = _required("r", r, channels), offset = _required("d", d, channels)
    cdef cnp.ndarray upstream = _upstream(dy, x, ("dy", "x"))
    centre, inverse = _required("mean", mean, channels), _required("invstd", invstd, channels)
    cdef cnp.ndarray dx = _output(
        out, x, ("dy", "x", "weight", "r", "d", "mean", "invstd"),
        (upstream, x, weight, r, d, mean, invstd), None, 2
    )
    cdef int kind = _parameter_type(x) if weights is None else cnp.PyArray_TYPE(weights)
    cdef cnp.ndarray dweight = _zero_doubles(channels), dbias = _zero_doubles(channels)
    cdef cnp.ndarray gamma = _new_doubles(channels)
    for c in range(channels):
        _doubles(gamma)[c] = _at(weights, c, 1.0) * _at(slope, c, 1.0)
    if cnp.PyArray_SIZE(x) > 0:
        _core.gradient(
            _plan(axis, BATCH, x, upstream, dx), x, upstream, dx, gamma, centre, inverse, dweight,
            dbias, 1, False, None, None, None, None, None, None, None,
            _threads_for(x, 5)
        )
    for c in range(channels):
        _doubles(dweight)[c] = (
            _at(slope, c, 1.0) * _doubles(dweight)[c] + _at(offset, c, 0.0) * _doubles(dbias)[c]
        )
    scaled = _rounded(_doubles(dweight), 1, &channels, kind)
    shifted = _rounded(_doubles(dbias), 1, &channels, kind)
    return (
        dx, _of_parameter("weight", weight, weights, scaled),
        _of_parameter("weight", weight, weights, shifted)
    )
