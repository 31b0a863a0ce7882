# Part of _core.pyx: common calls, checked and done at once.
#
# They are C-contiguous, on a shape that has been planned before. Whatever is anything else gives
# None, and comes again through the checks and the plan of _primitives. Those that move at least
# `serial_bytes` ask `threads_for` how many threads that is worth.

# {itemsize, axis, operands, parameters and shape, as bytes: Geometry}, of arrays that are
# C-contiguous and aligned; the last axes of rows are counted below 0.
cdef dict _planned = {}
cdef Py_ssize_t _MOST_PLANNED = 1024


cdef bytes _key(cnp.ndarray x, Py_ssize_t axis, Py_ssize_t operands, Py_ssize_t parameters):
    cdef Py_ssize_t words[BN_MAX_AXES + 4]
    cdef int d, ndim = cnp.PyArray_NDIM(x)
    words[0] = cnp.PyArray_ITEMSIZE(x)
    words[1] = axis
    words[2] = operands
    words[3] = parameters
    for d in range(ndim):
        words[4 + d] = cnp.PyArray_DIM(x, d)
    return PyBytes_FromStringAndSize(<char *>words, (4 + ndim) * sizeof(Py_ssize_t))


def remember(x, Py_ssize_t axis, Py_ssize_t operands, Geometry geometry):
    """Keep the geometry of calls on so many C-contiguous arrays like x."""
    _remember(_key(x, axis, operands, 0), geometry)


def remember_rows(
    x, Py_ssize_t last_axes, Py_ssize_t operands, Py_ssize_t parameters, Geometry geometry
):
    """And that of rows of their last axes, whose elements have so many parameters besides."""
    _remember(_key(x, -last_axes, operands, parameters), geometry)


cdef void _remember(bytes key, Geometry geometry):
    if len(_planned) >= _MOST_PLANNED:
        _planned.clear()
    _planned[key] = geometry


cdef inline bint _is_plain(array) noexcept:
    """An array, no subclass, of native floats that follow each other."""
    if not cnp.PyArray_CheckExact(array):
        return False
    cdef cnp.ndarray a = array
    cdef int kind = cnp.PyArray_TYPE(a)
    return (
        (kind == cnp.NPY_FLOAT32 or kind == cnp.NPY_FLOAT64)
        and cnp.PyArray_CHKFLAGS(a, cnp.NPY_ARRAY_CARRAY_RO)
        and cnp.PyArray_ISNOTSWAPPED(a)
    )


cdef inline bint _is_like(array, cnp.ndarray x) noexcept:
    """Another plain array of the shape and dtype of x."""
    if not _is_plain(array):
        return False
    cdef cnp.ndarray a = array
    return cnp.PyArray_TYPE(a) == cnp.PyArray_TYPE(x) and cnp.PyArray_SAMESHAPE(a, x)


cdef inline bint _is_parameter(array, Py_ssize_t channels) noexcept:
    if not _is_plain(array):
        return False
    cdef cnp.ndarray a = array
    return cnp.PyArray_NDIM(a) == 1 and cnp.PyArray_DIM(a, 0) == channels


cdef inline bint _is_parameter_or_none(array, Py_ssize_t channels) noexcept:
    return array is None or _is_parameter(array, channels)


cdef inline bint _apart(a, b) noexcept:
    """Whether two plain arrays share no byte; None shares nothing."""
    if a is None or b is None:
        return True
    cdef char *a_data = _data(a)
    cdef char *b_data = _data(b)
    return (
        a_data + cnp.PyArray_NBYTES(<cnp.ndarray>a) <= b_data
        or b_data + cnp.PyArray_NBYTES(<cnp.ndarray>b) <= a_data
    )


cdef inline bint _writable(array) noexcept:
    return cnp.PyArray_CHKFLAGS(<cnp.ndarray>array, cnp.NPY_ARRAY_WRITEABLE)


cdef inline bint _is_output(out, cnp.ndarray x) noexcept:
    """None, or a plain array that is x itself or apart from it."""
    return out is None or (
        _is_like(out, x) and _writable(out) and (_data(out) == _data(x) or _apart(out, x))
    )


cdef inline cnp.ndarray _output(out, cnp.ndarray x):
    if out is not None:
        return out
    return empty_output(x)


cdef inline cnp.ndarray _empty_channels(Py_ssize_t channels, int kind):
    cdef cnp.npy_intp size = channels
    return cnp.PyArray_EMPTY(1, &size, kind, 0)


cdef inline double _finite(number) noexcept:
    """A float that is finite, or -1."""
    if type(number) is not float:
        return -1.0
    cdef double value = <double>number
    return value if value - value == 0.0 else -1.0


cdef Geometry _geometry_of_plain(x_, axis_, int operands):
    """The geometry of calls on arrays like x, or None where this is no common call."""
    if type(axis_) is not int or not _is_plain(x_):
        return None
    cdef cnp.ndarray x = x_
    cdef int beyond
    cdef Py_ssize_t axis = PyLong_AsLongAndOverflow(axis_, &beyond), ndim = cnp.PyArray_NDIM(x)
    if beyond or ndim < 2 or not -ndim <= axis < ndim:
        return None
    return _planned.get(_key(x, axis if axis >= 0 else axis + ndim, operands, 0))


cdef int _threads_for(cnp.ndarray x, int passes, Py_ssize_t serial_bytes, threads_for) except -1:
    """For a call that reads and writes memory as large as x so many times."""
    cdef Py_ssize_t moved = passes * cnp.PyArray_NBYTES(x)
    return 1 if moved < serial_bytes else threads_for(moved)


def scale_shift_at_once(
    x, axis, mean, variance, weight, bias, eps, kept, out, Py_ssize_t serial_bytes, threads_for
):
    """Return y, or None."""
    cdef Geometry geometry = _geometry_of_plain(x, axis, 2)
    cdef double epsilon = _finite(eps)
    if geometry is None or epsilon < 0.0:
        return None
    cdef Py_ssize_t channels = geometry.c.channels
    if not (
        _is_parameter(mean, channels)
        and _is_parameter(variance, channels)
        and _is_parameter_or_none(weight, channels)
        and _is_parameter_or_none(bias, channels)
        and _is_output(out, x)
    ):
        return None
    for other in (mean, variance, weight, bias):
        if not _apart(out, other):
            return None
    y = _output(out, x)
    scale_shift(geometry, x, y, weight, bias, epsilon, mean, variance, kept,
                _threads_for(x, 2, serial_bytes, threads_for))
    return y


def normalize_at_once(
    x, axis, weight, bias, eps, running_mean, running_var, momentum, bint unbiased, out,
    Py_ssize_t serial_bytes, threads_for, warn_of
):
    """Return (y, mean, invstd), or None; `warn_of` what is too large."""
    cdef Geometry geometry = _geometry_of_plain(x, axis, 2)
    cdef double epsilon = _finite(eps), new_weight = _finite(momentum)
    cdef bint tracked = running_mean is not None
    if geometry is None or epsilon <= 0.0 or new_weight < 0.0:
        return None
    cdef Py_ssize_t channels = geometry.c.channels
    if not (
        _is_parameter_or_none(weight, channels)
        and _is_parameter_or_none(bias, channels)
        and _is_output(out, x)
        and tracked == (running_var is not None)
        and cnp.PyArray_SIZE(x) > channels
    ):
        return None
    if tracked and not (
        _is_parameter(running_mean, channels)
        and _is_parameter(running_var, channels)
        and _writable(running_mean)
        and _writable(running_var)
        and _apart(running_mean, running_var)
        and _apart(running_mean, x)
        and _apart(running_var, x)
    ):
        return None
    for other in (weight, bias, running_mean, running_var):
        if not _apart(out, other):
            return None
    y = _output(out, x)
    mean = _empty_channels(channels, cnp.NPY_FLOAT64)
    invstd = _empty_channels(channels, cnp.NPY_FLOAT64)
    cdef int too_large = normalize(
        geometry, x, y, weight, bias, epsilon, mean, invstd, None, 1, False, running_mean,
        running_var, new_weight, 1.0 if unbiased else 0.0,
        _threads_for(x, 3, serial_bytes, threads_for)
    )
    if too_large:
        warn_of(too_large)
    return y, mean, invstd


def gradient_at_once(
    dy, x, axis, mean, invstd, weight, bint constant_statistics, out, Py_ssize_t serial_bytes,
    threads_for
):
    """Return (dx, dweight, dbias), or None."""
    cdef Geometry geometry = _geometry_of_plain(x, axis, 3)
    if geometry is None or not _is_like(dy, x):
        return None
    cdef Py_ssize_t channels = geometry.c.channels
    if not (
        _is_parameter(mean, channels)
        and _is_parameter(invstd, channels)
        and _is_parameter_or_none(weight, channels)
        and _is_output(out, x)
        and _is_output(out, dy)
    ):
        return None
    for other in (mean, invstd, weight):
        if not _apart(out, other):
            return None
    cdef int kind = cnp.PyArray_TYPE(<cnp.ndarray>(x if weight is None else weight))
    dx = _output(out, x)
    dweight = _empty_channels(channels, kind)
    dbias = _empty_channels(channels, kind)
    gradient(geometry, x, dy, dx, weight, mean, invstd, dweight, dbias, 1, False,
             constant_statistics, _threads_for(x, 5, serial_bytes, threads_for))
    return dx, dweight, dbias


cdef bint _are_sizes(object sizes, cnp.ndarray x, int first, int end) noexcept:
    """A tuple of plain integers, those of some axes of x."""
    cdef int d, beyond
    if len(<tuple>sizes) != end - first:
        return False
    for d in range(first, end):
        size = (<tuple>sizes)[d - first]
        if type(size) is not int:
            return False
        if PyLong_AsLongAndOverflow(size, &beyond) != cnp.PyArray_DIM(x, d) or beyond:
            return False
    return True


cdef int _last_axes(x_, sizes) noexcept:
    """How many last axes of a plain array have these sizes, an integer or a tuple; 0 if not so."""
    if not _is_plain(x_):
        return 0
    cdef cnp.ndarray x = x_
    cdef int ndim = cnp.PyArray_NDIM(x), beyond, count
    if type(sizes) is int:
        if ndim < 1 or PyLong_AsLongAndOverflow(sizes, &beyond) != cnp.PyArray_DIM(x, ndim - 1):
            return 0
        return not beyond
    if type(sizes) is not tuple:
        return 0
    count = <int>len(<tuple>sizes)
    return count if 0 < count <= ndim and _are_sizes(sizes, x, ndim - count, ndim) else 0


cdef bint _has_axes(array, cnp.ndarray x, int first, int end) noexcept:
    """A plain array of the sizes of some axes of x."""
    if not _is_plain(array):
        return False
    cdef cnp.ndarray a = array
    cdef int d
    if cnp.PyArray_NDIM(a) != end - first:
        return False
    for d in range(first, end):
        if cnp.PyArray_DIM(a, d - first) != cnp.PyArray_DIM(x, d):
            return False
    return True


cdef bint _is_of_elements(array, cnp.ndarray x, int rows) noexcept:
    """A plain array of the dtype of x, and of the sizes of all its axes after those of rows."""
    return (
        _has_axes(array, x, rows, cnp.PyArray_NDIM(x))
        and cnp.PyArray_TYPE(<cnp.ndarray>array) == cnp.PyArray_TYPE(x)
    )


cdef inline cnp.ndarray _zeros(cnp.ndarray x, int first, int end, int kind):
    """Zeros of the sizes of some axes of x."""
    return cnp.PyArray_ZEROS(end - first, cnp.PyArray_DIMS(x) + first, kind, 0)


cdef inline cnp.ndarray _empty(cnp.ndarray x, int first, int end, int kind):
    return cnp.PyArray_EMPTY(end - first, cnp.PyArray_DIMS(x) + first, kind, 0)


cdef object _rounded(const double *values, cnp.ndarray x, int first, int end):
    """A new array of the dtype of x and of the sizes of some of its axes."""
    cdef cnp.ndarray array = _empty(x, first, end, cnp.PyArray_TYPE(x))
    cdef Py_ssize_t i, size = cnp.PyArray_SIZE(array)
    cdef float *narrow = <float *>cnp.PyArray_DATA(array)
    cdef double *wide = <double *>cnp.PyArray_DATA(array)
    if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32:
        for i in range(size):
            narrow[i] = <float>values[i]
    else:
        for i in range(size):
            wide[i] = values[i]
    return array


def normalize_rows_at_once(
    x_, normalized_shape, weight, bias, eps, bint uncentred, out, Py_ssize_t serial_bytes,
    threads_for
):
    """Return (y, mean, invstd), or None."""
    cdef int last_axes = _last_axes(x_, normalized_shape)
    cdef double epsilon = _finite(eps)
    if last_axes == 0 or epsilon < 0.0:
        return None
    cdef cnp.ndarray x = x_
    cdef int ndim = cnp.PyArray_NDIM(x), rows = ndim - last_axes
    cdef bint parameters = weight is not None or bias is not None
    if not _is_output(out, x):
        return None
    if not (weight is None or _is_of_elements(weight, x, rows)):
        return None
    if not (bias is None or _is_of_elements(bias, x, rows)):
        return None
    if not (_apart(out, weight) and _apart(out, bias)):
        return None
    cdef Geometry geometry = _planned.get(_key(x, -last_axes, 2, 2 * parameters))
    if geometry is None:
        return None
    if parameters and bias is None and not uncentred:
        bias = _zeros(x, rows, ndim, cnp.PyArray_TYPE(x))
    elif parameters and weight is None:
        return None
    y = _output(out, x)
    mean = _empty(x, 0, rows, cnp.NPY_FLOAT64)
    invstd = _empty(x, 0, rows, cnp.NPY_FLOAT64)
    normalize_rows(geometry, x, y, weight, bias, epsilon, mean, invstd, uncentred,
                   _threads_for(x, 3, serial_bytes, threads_for))
    return y, mean, invstd


def row_gradient_at_once(
    dy, x_, normalized_shape, mean, invstd, weight, bint uncentred, parameters, out,
    Py_ssize_t serial_bytes, threads_for
):
    """Return (dx, dweight, dbias), or None."""
    cdef int last_axes = _last_axes(x_, normalized_shape)
    if last_axes == 0 or type(parameters) is not bool:
        return None
    cdef cnp.ndarray x = x_
    cdef int ndim = cnp.PyArray_NDIM(x), rows = ndim - last_axes
    if not _is_like(dy, x):
        return None
    if not (
        (uncentred or _has_axes(mean, x, 0, rows))
        and _has_axes(invstd, x, 0, rows)
        and (weight is None or _is_of_elements(weight, x, rows))
        and _is_output(out, x)
        and _is_output(out, dy)
    ):
        return None
    for other in (mean, invstd, weight):
        if not _apart(out, other):
            return None
    cdef Geometry geometry = _planned.get(_key(x, -last_axes, 3, weight is not None))
    if geometry is None:
        return None
    cdef cnp.npy_intp size = 2 * <cnp.npy_intp>(
        (<size_t>geometry.row_blocks) * geometry.c.outer * geometry.c.inner
    )
    dx = _output(out, x)
    sums = cnp.PyArray_EMPTY(1, &size, cnp.NPY_FLOAT64, 0) if parameters else None
    if uncentred:
        mean = _zeros(x, 0, rows, cnp.NPY_FLOAT64)
    row_gradient(geometry, x, dy, dx, weight, mean, invstd, sums, uncentred,
                 _threads_for(x, 5, serial_bytes, threads_for))
    if sums is None:
        return dx, None, None
    cdef double *columns = _doubles(sums)
    return (
        dx,
        _rounded(columns, x, rows, ndim),
        _rounded(columns + geometry.c.outer * geometry.c.inner, x, rows, ndim),
    )
