# Arrays of a float64 for each channel, for _primitives.pyx: a loop over as many values as there are
# channels takes less time than a call of NumPy.

cdef inline double *_doubles(cnp.ndarray array) noexcept:
    return <double *>cnp.PyArray_DATA(array)


cdef inline cnp.ndarray _new_doubles(cnp.npy_intp count):
    return _empty(1, &count, cnp.NPY_FLOAT64)


cdef inline cnp.ndarray _zero_doubles(cnp.npy_intp count):
    return _zeros(1, &count, cnp.NPY_FLOAT64)


cdef inline double _at(cnp.ndarray values, Py_ssize_t i, double otherwise) noexcept:
    """An element of a dense array of float32 or float64; of None, what is there otherwise."""
    if values is None:
        return otherwise
    if cnp.PyArray_TYPE(values) == cnp.NPY_FLOAT64:
        return _doubles(values)[i]
    return (<const float *>cnp.PyArray_DATA(values))[i]


cdef cnp.ndarray _widened(cnp.ndarray values):
    """A dense array of float32 or float64 as one of float64, which may be the array itself."""
    cdef const float *singles
    cdef double *doubles
    cdef cnp.ndarray array
    cdef Py_ssize_t i
    if cnp.PyArray_TYPE(values) == cnp.NPY_FLOAT64:
        return values
    array = _empty(cnp.PyArray_NDIM(values), cnp.PyArray_DIMS(values), cnp.NPY_FLOAT64)
    singles, doubles = <const float *>cnp.PyArray_DATA(values), _doubles(array)
    for i in range(cnp.PyArray_SIZE(values)):
        doubles[i] = singles[i]
    return array


cdef cnp.ndarray _rounded(const double *values, int ndim, const cnp.npy_intp *shape, int kind):
    """A new array of this type, float32 or float64."""
    cdef cnp.ndarray array = _empty(ndim, shape, kind)
    cdef float *singles = <float *>cnp.PyArray_DATA(array)
    cdef double *doubles = _doubles(array)
    cdef Py_ssize_t i, size = cnp.PyArray_SIZE(array)
    if kind == cnp.NPY_FLOAT32:
        for i in range(size):
            singles[i] = <float>values[i]
    else:
        for i in range(size):
            doubles[i] = values[i]
    return array


cdef bint _are_between(cnp.ndarray values, double lower, double upper) noexcept:
    """Whether all of these float64 are; NaN is not."""
    cdef const double *value = _doubles(values)
    cdef Py_ssize_t i
    for i in range(cnp.PyArray_SIZE(values)):
        if not (lower < value[i] < upper):
            return False
    return True


# Of float32 and float64 data: see _scaling.
cdef int _MODEST_EXPONENT_SINGLE = _scaling.MODEST_EXPONENT[numpy.dtype(numpy.float32)]
cdef int _MODEST_EXPONENT_DOUBLE = _scaling.MODEST_EXPONENT[numpy.dtype(numpy.float64)]


cdef inline int _modest_exponent(cnp.ndarray x) noexcept:
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT32:
        return _MODEST_EXPONENT_SINGLE
    return _MODEST_EXPONENT_DOUBLE
