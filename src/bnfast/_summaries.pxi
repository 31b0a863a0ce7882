# Statistics alone, for _primitives.pyx: moments of any axes and types, of some values, extremes.

cdef tuple _kept_axes(cnp.ndarray x, axis):
    """The axes whose indices have statistics of their own, in order."""
    cdef int beyond, ndim = cnp.PyArray_NDIM(x)
    cdef Py_ssize_t single
    if axis is None:
        return ()
    if type(axis) is int:
        single = PyLong_AsLongAndOverflow(axis, &beyond)
        if not beyond and -ndim <= single < ndim:
            return (single + ndim if single < 0 else single,)
    return _validation.kept_axes(x, axis)


# Float64 holds every integer up to this one.
cdef double _MOST_EXACT_SUM = 2.0**53
cdef Py_ssize_t _MOST_EXACT_BYTES = _dtypes.MOST_EXACT_BYTES


cdef tuple _exact_sums(cnp.ndarray sums, cnp.ndarray rests, cnp.ndarray squares):
    """Sums of integers and of their squares: as float64, or as Python's where these are larger."""
    cdef double *rest = <double *>cnp.PyArray_DATA(rests)
    cdef double *square = <double *>cnp.PyArray_DATA(squares)
    cdef Py_ssize_t i
    for i in range(cnp.PyArray_SIZE(squares)):
        if rest[i] != 0.0 or square[i] > _MOST_EXACT_SUM:
            as_int = numpy.frompyfunc(int, 1, 1)
            whole = as_int(squares) + as_int(rests)
            # Of a single value NumPy makes a number.
            return numpy.asarray(as_int(sums), object), numpy.asarray(whole, object)
    return sums, squares


cdef void _clear_extremes(cnp.ndarray minimum, cnp.ndarray maximum) noexcept:
    cdef Py_ssize_t i
    for i in range(cnp.PyArray_SIZE(minimum)):
        (<double *>cnp.PyArray_DATA(minimum))[i] = INFINITY
        (<double *>cnp.PyArray_DATA(maximum))[i] = -INFINITY


cdef void _end_extremes(cnp.ndarray minimum, cnp.ndarray maximum) noexcept:
    """Where no value came, the extremes are still the wrong way round."""
    cdef double *least = <double *>cnp.PyArray_DATA(minimum)
    cdef double *greatest = <double *>cnp.PyArray_DATA(maximum)
    cdef Py_ssize_t i
    for i in range(cnp.PyArray_SIZE(minimum)):
        if not least[i] <= greatest[i]:
            least[i] = greatest[i] = NAN


def moments(x_, axis_):
    """Return the count, and the mean and m2 of each channel of a batch (float64)."""
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch(x_, axis_, &axis, BATCH)
    count, mean, _, m2, _, _, _, _ = summarize(x, axis, None, False, False)
    return count, mean, m2


def summarize(x_, axis, where, bint extremes, bint finite_only):
    """Return the count, and float64 arrays: the mean, what rounding left of it, m2; exact sums.

    With `extremes` also minimum and maximum (float64), NaN where there is no value, and how many
    values are not finite; else None three times. The count is an int, or an int64 array with
    `where` or `finite_only`. The exact sums are those of integers of at most MOST_EXACT_BYTES, and
    of their squares: where there are any, mean, rest and m2 are None; else the sums are.
    """
    cdef cnp.ndarray x = x_ if _is_summable(x_) else _validation.numbers("x", x_)
    cdef tuple kept = _kept_axes(x, axis)
    cdef cnp.ndarray mask = None if where is None else _validation.mask("where", where, x)
    cdef cnp.npy_intp shape[BN_MAX_AXES]
    cdef int d, ndim = 0
    cdef Py_ssize_t statistics = 1
    cdef bint counted = mask is not None or finite_only
    cdef bint integers = not _is_data(x)
    integers = integers and cnp.PyArray_ITEMSIZE(x) <= _MOST_EXACT_BYTES
    for d in kept:
        shape[ndim] = cnp.PyArray_DIM(x, d)
        statistics *= shape[ndim]
        ndim += 1
    cdef object mean = _zeros(ndim, shape, cnp.NPY_FLOAT64)
    cdef object low = _zeros(ndim, shape, cnp.NPY_FLOAT64)
    cdef object m2 = _zeros(ndim, shape, cnp.NPY_FLOAT64)
    cdef object count = None, minimum = None, maximum = None, nonfinite = None
    if counted:
        count = _zeros(ndim, shape, cnp.NPY_FLOAT64)
    if extremes:
        minimum = _empty(ndim, shape, cnp.NPY_FLOAT64)
        maximum = _empty(ndim, shape, cnp.NPY_FLOAT64)
        nonfinite = _zeros(ndim, shape, cnp.NPY_FLOAT64)
        _clear_extremes(minimum, maximum)
    if cnp.PyArray_SIZE(x) > 0:
        plan = _plan_of_summary(kept, x, mask)
        threads = _threads_for(x, 1)
        if counted or extremes or integers:
            _core.summary(
                plan, x, mask, mean, low, m2, count, minimum, maximum, nonfinite, integers,
                finite_only, threads
            )
        else:
            _core.moments(plan, x, mean, low, m2, threads)
    if count is None:
        count = cnp.PyArray_SIZE(x) // max(statistics, 1)
    else:
        count = cnp.PyArray_Cast(count, cnp.NPY_INT64)
    if extremes:
        nonfinite = cnp.PyArray_Cast(nonfinite, cnp.NPY_INT64)
        _end_extremes(minimum, maximum)
    if integers:
        sums = _exact_sums(mean, low, m2)
        return count, None, None, None, sums, minimum, maximum, nonfinite
    return count, mean, low, m2, None, minimum, maximum, nonfinite


def moments_of_sums(count, sums, squares):
    """Return the mean and m2 of integers: float64, each rounded once or twice.

    As exact as sums are: m2 = (count * squares - sums**2) / count.
    """
    if sums.dtype == object:
        whole = numpy.maximum(numpy.asarray(count, object), 1)
        m2 = (count * squares - sums * sums) / whole
        return numpy.asarray(sums / whole, "float64"), numpy.asarray(m2, "float64")
    cdef cnp.ndarray counts = numpy.broadcast_to(numpy.asarray(count, "float64"), sums.shape)
    counts = numpy.ascontiguousarray(counts).reshape(sums.shape)
    cdef cnp.ndarray mean = numpy.empty_like(sums), m2_ = numpy.empty_like(sums)
    cdef const double *n = <double *>cnp.PyArray_DATA(counts)
    cdef const double *s = <double *>cnp.PyArray_DATA(<cnp.ndarray?>sums)
    cdef const double *q = <double *>cnp.PyArray_DATA(<cnp.ndarray?>squares)
    cdef double *to_mean = <double *>cnp.PyArray_DATA(mean)
    cdef double *to_m2 = <double *>cnp.PyArray_DATA(m2_)
    cdef double scaled, square, at_least
    cdef Py_ssize_t i
    for i in range(cnp.PyArray_SIZE(mean)):
        # Both products exactly, as a number and what rounding leaves of it.
        scaled, square, at_least = n[i] * q[i], s[i] * s[i], max(n[i], 1.0)
        to_mean[i] = s[i] / at_least
        to_m2[i] = (
            (scaled - square) + (fma(n[i], q[i], -scaled) - fma(s[i], s[i], -square))
        ) / at_least
    return mean, m2_
