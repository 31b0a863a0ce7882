# Standardizations of weights, for _primitives.pyx: y = gain * (w - mean) / value, where a `Divisor`
# makes the value of the deviation of each filter.

# Of deviations in units of their invstd: the gradient of a normalization by its statistics has the
# square of that, which is lost in any sum.
cdef double _NEXT_TO_NOTHING = ldexp(1.0, -40)


cdef class Divisor:
    """What the deviations of filters are divided by."""

    cdef double eps
    cdef int power_of_eps  # 2 where it is added to a square
    cdef int lost  # values of each filter that do not count in the variance

    cdef double least(self) noexcept:
        """About what a constant filter is divided by."""
        return sqrt(self.eps) if self.power_of_eps == 2 else self.eps

    cdef void divide(
        self, double std, double count, int exponent, double *value, double *strength
    ) noexcept:
        """Write the divisor of a filter of `count` values, times a power of two as its std is.

        Its gradient is that of a normalization whose invstd is the strength: one to which
        deviations are next to nothing where the value is constant.
        """


cdef class Deviation(Divisor):
    """That of weight standardization: the deviation, with eps under the root or added to it."""

    def __init__(self, eps, inside, unbiased):
        self.eps = _eps(eps, False, False)
        self.power_of_eps = 2 if _flag("eps_inside", inside) else 1
        self.lost = _flag("unbiased", unbiased)

    cdef void divide(
        self, double std, double count, int exponent, double *value, double *strength
    ) noexcept:
        cdef double counted = sqrt(count / (count - self.lost))
        cdef double eps = ldexp(self.eps, self.power_of_eps * exponent)
        if self.power_of_eps == 2:
            value[0] = sqrt(std * std + eps)
            strength[0] = counted / value[0]
            return
        value[0] = std + eps
        # Without a deviation there is eps alone, a constant: as PyTorch has the gradient.
        if std > value[0] * (_NEXT_TO_NOTHING * _NEXT_TO_NOTHING):
            strength[0] = counted / sqrt(value[0] * std)
        else:
            strength[0] = 1.0 / value[0]


cdef class Length(Divisor):
    """That of scaled weight standardization: the length, which has a floor or eps added."""

    cdef double gamma
    cdef bint floor

    def __init__(self, gamma, eps, floor):
        self.gamma = _real("gamma", gamma)
        self.eps, self.power_of_eps = _eps(eps, False, False), 2
        self.floor = _flag("floor", floor)

    cdef void divide(
        self, double std, double count, int exponent, double *value, double *strength
    ) noexcept:
        cdef double squares = count * (std * std), eps = ldexp(self.eps, 2 * exponent)
        cdef double length, root = sqrt(count)
        if not self.floor:
            length = sqrt(squares + count * eps)
        elif squares < eps:
            length = sqrt(eps)
        else:
            length = sqrt(squares)
        if self.floor and not squares > eps:
            root = _NEXT_TO_NOTHING if std > length * _NEXT_TO_NOTHING else 1.0
        value[0], strength[0] = length / self.gamma, root / length


def standardize(w_, gain, Divisor divisor not None, axis_, out):
    """Return y, and the mean and std (float64) of the filters."""
    cdef Py_ssize_t axis
    cdef cnp.ndarray w = _filters(w_, axis_, &axis, divisor.lost)
    cdef Py_ssize_t filters = _channels(w, axis)
    gains = _of_filters("gain", gain, filters)
    cdef cnp.ndarray y = _output(out, w, ("w", "gain"), (w, gain), None, 1)
    cdef cnp.ndarray mean = _new_doubles(filters), std = _new_doubles(filters)
    _standardize(w, axis, divisor, None if gains is None else _widened(gains), None, y, mean, std)
    return y, mean, std


def standardize_gradient(dy, w_, mean, std, gain, Divisor divisor not None, axis_, out):
    """Return dw = gain / value * (dy - mean(dy) - c * strength**2 / K * sum(dy * c)), and dgain."""
    cdef Py_ssize_t axis
    cdef cnp.ndarray w = _filters(w_, axis_, &axis, divisor.lost)
    cdef cnp.npy_intp filters = _channels(w, axis)
    cdef cnp.ndarray upstream = _upstream(dy, w, ("dy", "w"))
    centre = _required_of_filters("mean", mean, filters)
    cdef cnp.ndarray deviation = _widened(_required_of_filters("std", std, filters))
    gains = _of_filters("gain", gain, filters)
    cdef cnp.ndarray dw = _output(
        out, w, ("dy", "w", "gain", "mean", "std"), (upstream, w, gain, mean, std), None, 2
    )
    cdef cnp.ndarray factors = None if gains is None else _widened(gains)
    cdef cnp.ndarray dgain = _zero_doubles(filters)
    if cnp.PyArray_SIZE(w) > 0:
        extreme = _extreme_filters(w, axis, deviation, divisor)
        if extreme is not None:
            dy_of_copies = numpy.moveaxis(upstream, axis, 0)[extreme.which]  # dy may be overwritten
        _gradient_of_filters(
            upstream, w, axis, centre, deviation, factors, divisor, None, dw, dgain
        )
        if extreme is not None:
            _gradient_of_filters_again(dy_of_copies, extreme, axis, factors, divisor, dw, dgain)
    kind = _parameter_type(w) if gains is None else cnp.PyArray_TYPE(<cnp.ndarray>gains)
    return dw, _of_parameter("gain", gain, gains, _rounded(_doubles(dgain), 1, &filters, kind))


# arguments

cdef cnp.ndarray _filters(w, axis_, Py_ssize_t *axis, int lost):
    """Weights, with `axis` counted from 0; `lost` values of a filter do not count in variances."""
    cdef cnp.ndarray array = w if _is_batch(w, axis_, axis) and not _is_half(w) else None
    cdef Py_ssize_t filters
    if array is None:
        array, axis[0], _ = _validation.weights("w", w, axis_)
    filters = _channels(array, axis[0])
    if lost and filters and cnp.PyArray_SIZE(array) == filters:
        _validation.enough_values("w", array, 1, "filter", unbiased=True)
    return array


# the steps, also of copies, which are the filters times powers of two

cdef inline double _elements_per_filter(cnp.ndarray w, Py_ssize_t filters) noexcept:
    return <double>(cnp.PyArray_SIZE(w) // filters)


cdef inline int _power(cnp.ndarray exponent, Py_ssize_t filter) noexcept:
    return 0 if exponent is None else (<int *>cnp.PyArray_DATA(exponent))[filter]


cdef int _standardize(
    cnp.ndarray w, Py_ssize_t axis, Divisor divisor, cnp.ndarray gain, cnp.ndarray exponent,
    cnp.ndarray y, cnp.ndarray mean, cnp.ndarray std
) except -1:
    cdef Py_ssize_t f, filters = cnp.PyArray_SIZE(std)
    cdef cnp.ndarray mean_low = _new_mean_low(w, filters), scale = _new_doubles(filters)
    cdef double value, strength, factor, count
    _deviations(w, axis, divisor.lost, mean, mean_low, scale, std)  # the variance is not needed
    if cnp.PyArray_SIZE(w) == 0:
        return 0
    count = _elements_per_filter(w, filters)
    extreme = None if exponent is not None else _extreme_filters(w, axis, std, divisor)
    for f in range(filters):
        divisor.divide(_doubles(std)[f], count, _power(exponent, f), &value, &strength)
        factor = 1.0 if gain is None else _doubles(gain)[f]
        # What is divided by 0 is 0, and stays so.
        _doubles(scale)[f] = 0.0 if value == 0.0 else factor / value
    _scale_deviations(w, axis, mean, mean_low, scale, None, y)
    if extreme is not None:
        which, copies, exponents = extreme
        y_of_copies, gain_of_copies = empty_output(copies), None if gain is None else gain[which]
        _standardize(
            copies, 0, divisor, gain_of_copies, exponents, y_of_copies, _new_doubles(len(which)),
            _new_doubles(len(which))
        )
        numpy.moveaxis(y, axis, 0)[which] = y_of_copies
    return 0


cdef int _gradient_of_filters(
    cnp.ndarray dy, cnp.ndarray w, Py_ssize_t axis, mean, cnp.ndarray std, cnp.ndarray gain,
    Divisor divisor, cnp.ndarray exponent, cnp.ndarray dw, cnp.ndarray dgain
) except -1:
    """Write the gradient of a normalization, whose invstd is the strength of the divisor."""
    cdef Py_ssize_t f, filters = cnp.PyArray_SIZE(std)
    cdef cnp.ndarray invstd = _new_doubles(filters), weight = _new_doubles(filters)
    cdef cnp.ndarray ratio = _new_doubles(filters)  # of 1 / value to the strength
    cdef double value, strength, count = _elements_per_filter(w, filters)
    for f in range(filters):
        divisor.divide(_doubles(std)[f], count, _power(exponent, f), &value, &strength)
        _doubles(invstd)[f] = 1.0 if value == 0.0 else strength
        _doubles(ratio)[f] = 0.0 if value == 0.0 else 1.0 / (value * strength)
        _doubles(weight)[f] = _doubles(ratio)[f]
        if gain is not None:
            _doubles(weight)[f] *= _doubles(gain)[f]
    _core.gradient(
        _plan(axis, BATCH, w, dy, dw), w, dy, dw, weight, mean, invstd, dgain,
        None, 1, False, None, None, None, None, None, None, None,
        _threads_for(w, 5)
    )
    for f in range(filters):
        _doubles(dgain)[f] *= _doubles(ratio)[f]
    return 0


# filters whose divisor is at an end of the range, from copies: rare, and so in NumPy

cdef object _extreme_filters(cnp.ndarray w, Py_ssize_t axis, cnp.ndarray std, Divisor divisor):
    """Return those, made near 1, if there are some."""
    cdef int furthest = _modest_exponent(w)
    cdef double largest = ldexp(1.0, furthest), smallest = divisor.least()
    if _are_between(std, -1.0 if 1.0 / largest < smallest < largest else 1.0 / largest, largest):
        return None
    return _scaling.channels_far_from_one(w, axis, numpy.maximum(std, smallest), furthest)


cdef int _gradient_of_filters_again(
    upstream, extreme, Py_ssize_t axis, gain, Divisor divisor, dw, dgain
) except -1:
    which, copies, exponent = extreme
    dw_of_copies, products = empty_output(copies), _new_doubles(len(which))
    mean, variance, std = [_new_doubles(len(which)) for _ in range(3)]
    mean_low = _new_mean_low(copies, len(which))
    # Made again: the statistics that the caller gave may have lost bits.
    _deviations(copies, 0, divisor.lost, mean, mean_low, variance, std)
    gain_of_copies = None if gain is None else gain[which]
    _gradient_of_filters(
        upstream, copies, 0, mean, std, gain_of_copies, divisor, exponent, dw_of_copies, products
    )
    numpy.moveaxis(dw, axis, 0)[which] = _scaling.scaled(dw_of_copies, exponent)
    dgain[which] = products
    return 0
