# Conditional batch normalization, for _primitives.pyx: each sample has a weight and a bias of its
# own, (N, C), or None for 1 and 0.

cdef cnp.ndarray _samples_in_full(x_, axis_, Py_ssize_t *axis):
    """The input, of more than 16 bits: what is normalized is written before it is scaled."""
    cdef cnp.ndarray x = _batch(x_, axis_, axis, PER_SAMPLE)
    if _is_half(x):
        _validation.full_precision("x", x)
    return x


def conditional_normalize(
    x_, axis_, weight, bias, eps, running_mean=None, running_var=None, momentum=0.0,
    bint unbiased=True, out=None
):
    """As `normalize` of a batch: what it writes is then scaled and shifted in place."""
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _samples_in_full(x_, axis_, &axis)
    cdef Py_ssize_t channels = _channels(x, axis)
    scale = _of_samples("weight", weight, x, channels)
    shift = _of_samples("bias", bias, x, channels)
    cdef double epsilon = _eps(eps, False, True), new = _real("momentum", momentum)
    tracked = _tracked(running_mean, running_var, x, channels, _MEAN_AND_VAR)
    if tracked is not None:
        _keep_apart(tracked, "weight", weight, channels)
        _keep_apart(tracked, "bias", bias, channels)
    y = _output(
        out, x, ("x", "weight", "bias", "running_mean", "running_var"),
        (x, weight, bias, running_mean, running_var), None, 1
    )
    normalized = _normalized(
        x, axis, y, None, None, epsilon, tracked, new, unbiased, BATCH, 1, None, None, None, None
    )
    if cnp.PyArray_SIZE(x) > 0 and (scale is not None or shift is not None):
        _core.scale_shift(
            _plan(axis, PER_SAMPLE, y, y, None), y, y, scale, shift, 0.0, None, None, True, None,
            _threads_for(x, 2)
        )
    return normalized


def conditional_scale_shift(x_, axis_, mean, variance, weight, bias, eps, out=None):
    """As `scale_shift`."""
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _samples_in_full(x_, axis_, &axis)
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
            _plan(axis, PER_SAMPLE, x, y, None), x, y, scale, shift, epsilon, centre, spread,
            True, None, _threads_for(x, 2)
        )
    return y


def conditional_gradient(
    dy, x_, axis_, mean, invstd, weight, bint constant_statistics, out=None
):
    """As `gradient`, with dweight and dbias of each sample.

    dx is written twice: as dy * weight, and as the gradient of that through the statistics. In
    between x is read once more.
    """
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _samples_in_full(x_, axis_, &axis)
    cdef cnp.npy_intp channels = _channels(x, axis)
    cdef cnp.npy_intp shape[2]
    upstream = _upstream(dy, x, ("dy", "x"))
    centre = _required("mean", mean, channels)
    inverse = _required("invstd", invstd, channels)
    scale = _of_samples("weight", weight, x, channels)
    once = "x" if constant_statistics else "x, which training reads once more"
    dx = _output(
        out, x, ("dy", once, "weight", "mean", "invstd"), (upstream, x, weight, mean, invstd),
        None, 2 if constant_statistics else 1
    )
    cdef int kind = _parameter_type(x)
    if scale is not None:
        kind = cnp.PyArray_TYPE(<cnp.ndarray>scale)
    shape[0], shape[1] = cnp.PyArray_DIM(x, 0), channels
    if cnp.PyArray_SIZE(x) == 0:
        dbias = _of_parameter("weight", weight, scale, _zeros(2, shape, kind))
        return dx, dbias.copy(), dbias
    power = _empty(1, &channels, cnp.NPY_FLOAT64)
    factor = _empty(2, shape, cnp.NPY_FLOAT64)
    sum_dy = _empty(2, shape, cnp.NPY_FLOAT64)
    sum_dy_xhat = _empty(2, shape, cnp.NPY_FLOAT64)
    _set_factors(inverse, scale, constant_statistics, power, factor)
    _core.gradient_of_samples(
        _plan(axis, PER_SAMPLE, x, upstream, dx), x, upstream, dx, factor, centre, power, sum_dy,
        sum_dy_xhat, _threads_for(x, 5)
    )
    _make_up_for_powers(inverse, power, sum_dy_xhat)
    if not constant_statistics:
        _core.gradient(
            _plan(axis, BATCH, x, dx, dx), x, dx, dx, None, centre, inverse, None, None, 1, False,
            None, None, None, None, None, None, None, _threads_for(x, 5)
        )
    return (
        dx, _of_parameter(
            "weight", weight, scale, _rounded(_doubles(sum_dy_xhat), 2, shape, kind)
        ),
        _of_parameter("weight", weight, scale, _rounded(_doubles(sum_dy), 2, shape, kind))
    )


cdef void _set_factors(
    cnp.ndarray inverse, cnp.ndarray scale, bint constant_statistics, cnp.ndarray power,
    cnp.ndarray factor
) noexcept:
    """What `gradient_of_samples` is told as invstd and weight.

    Their product, which dy is multiplied by, is the weight, times invstd where statistics are
    constant. A power of two in place of invstd keeps products with x within range.
    """
    cdef double *powers = <double *>cnp.PyArray_DATA(power)
    cdef double *factors = <double *>cnp.PyArray_DATA(factor)
    cdef Py_ssize_t n, c, i = 0, channels = cnp.PyArray_DIM(factor, 1)
    cdef int exponent
    cdef double value
    for c in range(channels):
        frexp(_at(inverse, c, 1.0), &exponent)
        powers[c] = ldexp(1.0, exponent - 1)
    for n in range(cnp.PyArray_DIM(factor, 0)):
        for c in range(channels):
            value = _at(scale, i, 1.0)
            if constant_statistics:
                value *= _at(inverse, c, 1.0)
            factors[i] = value / powers[c]
            i += 1


cdef void _make_up_for_powers(
    cnp.ndarray inverse, cnp.ndarray power, cnp.ndarray sum_dy_xhat
) noexcept:
    """From sums with powers of two to those with invstd."""
    cdef const double *powers = <const double *>cnp.PyArray_DATA(power)
    cdef double *sums = <double *>cnp.PyArray_DATA(sum_dy_xhat)
    cdef Py_ssize_t n, c, i = 0
    for n in range(cnp.PyArray_DIM(sum_dy_xhat, 0)):
        for c in range(cnp.PyArray_DIM(sum_dy_xhat, 1)):
            sums[i] *= _at(inverse, c, 1.0) / powers[c]
            i += 1
