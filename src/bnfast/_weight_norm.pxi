# Weight normalization, for _primitives.pyx: with K elements in each filter, a normalization around
# 0 whose invrms is sqrt(K) / ||v||, and whose weight is g / sqrt(K).

cdef Reduction _LENGTHS = Reduction(centred=False)


def weight_norm(v_, g_, dim, eps, out):
    """Return w = g * v / max(||v||, eps), and the lengths ||v|| of the filters (float64)."""
    cdef cnp.ndarray v = _data_in_full("v", v_)
    cdef cnp.ndarray w = _output(out, v, ("v", "g"), (v, g_), None, 1)
    cdef int axis = _axis_of_filters(dim, v)
    cdef cnp.ndarray filters = _as_filters(v, axis), written = _as_filters(w, axis), norm
    cdef cnp.ndarray lengths = _widened(_lengths(g_, filters, axis))
    cdef double least = _eps(eps, False, False)
    cdef bint in_place = out is not None and _is_same_memory(w, v)
    axis = max(axis, 0)
    if cnp.PyArray_SIZE(v) == 0:
        return w, _zero_doubles(cnp.PyArray_DIM(filters, axis))
    norm = _new_doubles(cnp.PyArray_DIM(filters, axis))
    special = None
    if in_place:  # copied while they are there
        special = _special_filters(filters, axis, _norms(filters, axis), least)
    _give_lengths(filters, axis, lengths, written, norm)
    if not in_place:
        special = _special_filters(filters, axis, norm, least)
    if special is not None:
        _give_lengths_again(special, axis, lengths, least, written, norm)
    return w, norm


def weight_norm_gradient(dw, v_, g_, norm_, dim, eps, out):
    """Return the gradients of the directions and of the lengths."""
    cdef cnp.ndarray v = _data_in_full("v", v_)
    cdef cnp.ndarray upstream = _upstream(dw, v, ("dw", "v"))
    cdef cnp.ndarray dv = _output(
        out, v, ("dw", "v", "g", "norm"), (upstream, v, g_, norm_), None, 2
    )
    cdef int axis = _axis_of_filters(dim, v)
    cdef cnp.ndarray filters = _as_filters(v, axis), written = _as_filters(dv, axis)
    cdef cnp.ndarray g = _lengths(g_, filters, axis), lengths = _widened(g)
    cdef double least = _eps(eps, False, False)
    cdef cnp.npy_intp count = cnp.PyArray_DIM(filters, max(axis, 0))
    cdef cnp.ndarray norm = _widened(_required_of_filters("norm", norm_, count))
    cdef cnp.ndarray dlengths = _zero_doubles(count)
    upstream = _as_filters(upstream, axis)
    axis = max(axis, 0)
    if cnp.PyArray_SIZE(v) > 0:
        special = _special_filters(filters, axis, norm, least)
        if special is not None:
            dw_of_copies = numpy.moveaxis(upstream, axis, 0)[special.which]  # dw may be overwritten
        _gradient_of_lengths(upstream, filters, axis, lengths, norm, written, dlengths)
        if special is not None:
            _gradient_of_lengths_again(
                dw_of_copies, special, axis, lengths, norm, least, written, dlengths
            )
    return dv, _of_parameter("g", g_, g, _rounded(
        _doubles(dlengths), cnp.PyArray_NDIM(g), cnp.PyArray_DIMS(g), cnp.PyArray_TYPE(g)
    ))


# arguments

cdef int _axis_of_filters(dim, cnp.ndarray v) except -2:
    """The axis of the filters, or -1 where the whole array is one."""
    cdef int beyond
    cdef Py_ssize_t axis
    if dim is None:
        return -1
    if type(dim) is int:
        axis = PyLong_AsLongAndOverflow(dim, &beyond)
        if not beyond and 0 <= axis < cnp.PyArray_NDIM(v):
            return <int>axis
    return _validation.axis_of_filters("v", v, dim)


cdef cnp.ndarray _as_filters(cnp.ndarray array, int axis):
    """The array with an axis of filters, the first where it is -1, and at least one other."""
    if axis < 0:
        return array.reshape((1, *((<object>array).shape or (1,))))
    return array if cnp.PyArray_NDIM(array) > 1 else array[:, None]


cdef cnp.ndarray _lengths(g, cnp.ndarray filters, int axis):
    """One for each filter, dense, and of any shape that g may have."""
    cdef int d, ndim = cnp.PyArray_NDIM(filters)
    cdef cnp.npy_intp count = cnp.PyArray_DIM(filters, max(axis, 0))
    cdef bint is_shaped = axis >= 0 and _is_dense(g) and cnp.PyArray_NDIM(<cnp.ndarray>g) == ndim
    for d in range(ndim if is_shaped else 0):
        is_shaped = is_shaped and cnp.PyArray_DIM(<cnp.ndarray>g, d) == (count if d == axis else 1)
    if is_shaped or _is_of_channels(g, count):
        return g
    return _validation.lengths("g", g, (<object>filters).shape, None if axis < 0 else axis)


# the steps, also of copies

cdef int _give_lengths(
    cnp.ndarray v, int axis, cnp.ndarray lengths, cnp.ndarray w, cnp.ndarray norm
) except -1:
    """Write filters of these lengths, and those that they had."""
    cdef double root = _root_of_each(v, axis)
    cdef double *value = _doubles(norm)
    cdef Py_ssize_t i
    _core.normalize(
        _plan(axis, _LENGTHS, v, w, None), v, w, _over(lengths, root), None, 0.0, None, norm, None,
        1, False, None, None, 0.0, 0.0, None, None, None, _threads_for(v, 3)
    )
    for i in range(cnp.PyArray_SIZE(norm)):  # the invrms until here
        value[i] = root / value[i]
    return 0


cdef int _gradient_of_lengths(
    cnp.ndarray dw, cnp.ndarray v, int axis, cnp.ndarray lengths, cnp.ndarray norm,
    cnp.ndarray dv, cnp.ndarray dlengths
) except -1:
    """Write the gradients of directions and lengths, from the lengths that the filters had."""
    cdef double root = _root_of_each(v, axis)
    cdef Py_ssize_t i, count = cnp.PyArray_SIZE(norm)
    cdef cnp.ndarray weight = _over(lengths, root), invrms = _new_doubles(count)
    for i in range(count):
        _doubles(invrms)[i] = root / _doubles(norm)[i]
    _core.gradient(
        _plan(axis, _LENGTHS, v, dw, dv), v, dw, dv, weight, None, invrms, dlengths,
        None, 1, False, None, None, None, None, None, None, None, _threads_for(v, 5)
    )
    for i in range(count):
        _doubles(dlengths)[i] /= root
    return 0


cdef double _root_of_each(cnp.ndarray filters, int axis) noexcept:
    """The root of how many elements a filter has."""
    return sqrt(<double>(cnp.PyArray_SIZE(filters) // cnp.PyArray_DIM(filters, axis)))


cdef cnp.ndarray _over(cnp.ndarray lengths, double root):
    cdef Py_ssize_t i, count = cnp.PyArray_SIZE(lengths)
    cdef cnp.ndarray weight = _new_doubles(count)
    for i in range(count):
        _doubles(weight)[i] = _doubles(lengths)[i] / root
    return weight


cdef cnp.ndarray _norms(cnp.ndarray filters, int axis):
    """The lengths of filters before anything is written."""
    cdef Py_ssize_t i, count = cnp.PyArray_DIM(filters, axis)
    cdef double elements_per_filter = <double>(cnp.PyArray_SIZE(filters) // count)
    cdef cnp.ndarray mean = _new_doubles(count), m2 = _new_doubles(count)
    cdef double *value = _doubles(mean)
    _core.moments(
        _plan(axis, BATCH, filters, None, None), filters, mean, None, m2, _threads_for(filters, 1)
    )
    for i in range(count):
        value[i] = sqrt(_doubles(m2)[i] + elements_per_filter * (value[i] * value[i]))
    return mean


# filters shorter than eps, or at an end of the range, from copies: rare, and so in NumPy

cdef object _special_filters(cnp.ndarray filters, int axis, cnp.ndarray norm, double least):
    """Return those, scaled, if there are some."""
    cdef double longest = ldexp(1.0, _modest_exponent(filters))
    cdef double shortest = max(1.0 / longest, least)
    if _are_between(norm, shortest, longest):
        return None
    return _scaling.channels_not_between(filters, axis, norm, shortest, longest)


cdef int _give_lengths_again(
    special, int axis, lengths, double least, w, cnp.ndarray norm
) except -1:
    which, copies, exponent = special
    lengths_of_copies, w_of_copies = lengths.reshape(-1)[which], empty_output(copies)
    norm_of_copies = _new_doubles(len(which))
    _give_lengths(copies, 0, lengths_of_copies, w_of_copies, norm_of_copies)
    with numpy.errstate(all="ignore"):
        norm[which] = numpy.ldexp(norm_of_copies, -exponent)
        short = norm[which] < least
        w_of_copies[short] = _shares_of(
            least, copies[short], exponent[short], lengths_of_copies[short]
        )
    numpy.moveaxis(w, axis, 0)[which] = w_of_copies
    return 0


cdef int _gradient_of_lengths_again(
    upstream, special, int axis, lengths, norm, double least, dv, dlengths
) except -1:
    which, copies, exponent = special
    lengths_of_copies, short = lengths.reshape(-1)[which], norm[which] < least
    dv_of_copies, products = empty_output(copies), _new_doubles(len(which))
    # With their norms of now: those given may be rounded to a few bits.
    _gradient_of_lengths(
        upstream, copies, 0, lengths_of_copies, _norms(copies, 0), dv_of_copies, products
    )
    with numpy.errstate(all="ignore"):
        dv_of_copies = _scaling.scaled(dv_of_copies, exponent)
        of_eps = upstream[short].astype(numpy.float64)
        dv_of_copies[short] = _shares_of(least, of_eps, 0, lengths_of_copies[short])
        others = tuple(range(1, of_eps.ndim))
        _, power = numpy.frexp(numpy.abs(of_eps).max(others, initial=0.0))
        along = (_scaling.scaled(of_eps, -power) * copies[short]).sum(others)
        products[short] = _shares_of(least, along, exponent[short] - power)
        numpy.moveaxis(dv, axis, 0)[which], dlengths[which] = dv_of_copies, products
    return 0


def _shares_of(length, values, exponent, factors=1.0):
    """Return values times 2 ** -exponent, divided by `length` and times a factor each.

    Powers of two come last: what is denormal is rounded once, and nothing on the way leaves the
    range.
    """
    mantissa, power = numpy.frexp(length)
    factor, power_of_factor = numpy.frexp(factors)
    powers = power_of_factor - power + 1 - exponent
    each = (-1, *[1] * (values.ndim - 1))
    shares = values.astype(numpy.float64) / (2 * mantissa) * numpy.reshape(factor, each)
    return numpy.ldexp(shares, numpy.reshape(powers, each))
