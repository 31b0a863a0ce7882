# Deviations of channels from their means, for _primitives.pyx: for normalizations with a scale of
# their own, at any size of values.

# Of float64. An m2 beyond these may be made of squares that have left the range, or lost bits in
# it; not where the largest value is modest: there it is 0, of equal values.
cdef double _SMALLEST_M2 = ldexp(1.0, -900), _LARGEST_M2 = ldexp(1.0, 1000)


cdef inline cnp.ndarray _new_mean_low(cnp.ndarray x, Py_ssize_t channels):
    """Of float64 data, which would lose |mean| / std ulps without it; others have float64 sums."""
    return _new_doubles(channels) if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64 else None


cdef object _deviations(
    cnp.ndarray x, Py_ssize_t axis, int lost, cnp.ndarray mean, cnp.ndarray mean_low,
    cnp.ndarray variance, cnp.ndarray std
):
    """Write what is known of each channel; the low part of the mean may be None.

    `lost` of the values do not count in the variance. Return the channels whose variance may have
    left the range, if there are some; their std has not.
    """
    cdef Py_ssize_t c, channels = cnp.PyArray_SIZE(mean)
    cdef double counted
    extreme = None
    if cnp.PyArray_SIZE(x) == 0:
        for statistic in (mean, mean_low, variance):
            if statistic is not None:
                statistic.fill(0.0)
    else:
        _core.moments(
            _plan(axis, BATCH, x, None, None), x, mean, mean_low, variance, _threads_for(x, 1)
        )
        if mean_low is not None and not _are_between(variance, _SMALLEST_M2, _LARGEST_M2):
            extreme = _scaling.channels_not_between(
                x, axis, variance, _SMALLEST_M2, _LARGEST_M2, _modest_exponent(x)
            )
    counted = <double>(cnp.PyArray_SIZE(x) // channels if channels else 0) - lost
    for c in range(channels):
        _doubles(variance)[c] /= counted  # the m2 until here
        _doubles(std)[c] = sqrt(_doubles(variance)[c])
    if extreme is None:
        return None
    which, copies, exponent = extreme
    centre, low, m2, deviation = [_new_doubles(len(which)) for _ in range(4)]
    _deviations(copies, 0, lost, centre, low, m2, deviation)
    with numpy.errstate(all="ignore"):
        for statistic, values in ((mean, centre), (mean_low, low), (std, deviation)):
            statistic[which] = numpy.ldexp(values, -exponent)
    return which


cdef int _scale_deviations(
    cnp.ndarray x, Py_ssize_t axis, cnp.ndarray mean, cnp.ndarray mean_low, cnp.ndarray scale,
    cnp.ndarray shift, cnp.ndarray y
) except -1:
    """Write (x - mean) * scale + shift; the shift, which may be None, is written to as well."""
    cdef Py_ssize_t c, channels = cnp.PyArray_SIZE(scale)
    if cnp.PyArray_SIZE(x) == 0:
        return 0
    if mean_low is not None:
        if shift is None:
            shift = _zero_doubles(channels)
        for c in range(channels):
            _doubles(shift)[c] -= _doubles(mean_low)[c] * _doubles(scale)[c]
    _core.scale_shift(
        _plan(axis, BATCH, x, y, None), x, y, scale, shift, 0.0, mean, None, False, None,
        _threads_for(x, 2)
    )
    return 0
