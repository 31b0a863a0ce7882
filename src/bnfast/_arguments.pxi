# The arguments of a call, for _primitives.pyx: each as the core needs it, or what _validation makes
# of it.
#
# Here are predicates alone: is this argument as the core needs it? One that is not goes to
# _validation, on its own, which converts it or raises: no sentence of an error stands here.

# Rows of an array, which have a mean and invstd each: the shapes of these, and of their elements.
ctypedef struct _Rows:
    int first  # the elements are all axes from this one on; -1 where they are others
    int statistics
    int elements
    cnp.npy_intp statistics_shape[BN_MAX_AXES]
    cnp.npy_intp elements_shape[BN_MAX_AXES]


# predicates

cdef inline bint _is_summable(value) noexcept:
    """An array, no subclass, of a native type that there is arithmetic for."""
    return (
        cnp.PyArray_CheckExact(value)
        and _arithmetic(<cnp.ndarray>value) != 0
        and cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray>value)
    )


cdef inline bint _is_data(value) noexcept:
    """Such an array, of a type that outputs can have as well."""
    cdef int kind
    if not _is_summable(value):
        return False
    kind = cnp.PyArray_TYPE(<cnp.ndarray>value)
    return kind >= BUILT_IN_TYPES or _has_outputs[kind]


cdef inline bint _is_array(value) noexcept:
    """A parameter or statistic: an array, no subclass, of native float32 or float64."""
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
        _is_data(value)
        and cnp.PyArray_TYPE(<cnp.ndarray>value) == cnp.PyArray_TYPE(x)
        and cnp.PyArray_SAMESHAPE(<cnp.ndarray>value, x)
    )


cdef inline bint _is_batch(x, axis_, Py_ssize_t *axis) noexcept:
    """At least 2-d, with an axis of these: then `axis` is that, counted from 0."""
    cdef int beyond, ndim
    if not _is_data(x) or type(axis_) is not int:
        return False
    ndim = cnp.PyArray_NDIM(<cnp.ndarray>x)
    axis[0] = PyLong_AsLongAndOverflow(axis_, &beyond)
    if beyond or not -ndim <= axis[0] < ndim or ndim < 2:
        return False
    axis[0] += ndim if axis[0] < 0 else 0
    return True


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


cdef bint _are_disjoint(cnp.ndarray a, cnp.ndarray b) noexcept:
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
    if _is_batch(x, axis_, axis) and (axis[0] > 0 or not over.per_sample):
        return x
    array, axis[0], _ = _validation.batch("x", x, axis_)
    if over.per_sample:
        _validation.channel_axis_of_samples(array, axis_)
    return array


cdef int _MOST_AXES = _validation.MOST_AXES


cdef inline cnp.ndarray _batch_of_ghosts(x_, axis_, Py_ssize_t *axis):
    """The input, with room for one more axis."""
    cdef cnp.ndarray x = _batch(x_, axis_, axis, PER_SAMPLE)
    if cnp.PyArray_NDIM(x) >= _MOST_AXES:
        _validation.room_for_axes("x", x, 1)
    return x


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


cdef object _of_filters(str name, value, Py_ssize_t filters):
    if value is None or _is_of_channels(value, filters):
        return value
    return _validation.channel_parameter(name, value, filters, "filters")


cdef object _required_of_filters(str name, value, Py_ssize_t filters):
    if _is_of_channels(value, filters):
        return value
    return _validation.required_channel_parameter(name, value, filters, "filters")


cdef object _saved(str name, value, int ndim, const cnp.npy_intp *shape):
    """A statistic that a forward pass returned."""
    if _is_of_shape(value, ndim, shape):
        return value
    return _validation.saved_statistic(name, value, _shape(ndim, shape))


cdef tuple _shape(int ndim, const cnp.npy_intp *shape):
    return tuple([shape[d] for d in range(ndim)])


cdef object _of_elements(str name, value, cnp.ndarray x, const _Rows *rows, bint finite):
    """One value for each element of a row.

    An operand of the kernels: of the type of the arithmetic.
    """
    if value is None or (
        _is_of_shape(value, rows.elements, rows.elements_shape)
        and cnp.PyArray_TYPE(<cnp.ndarray>value) == _arithmetic(x)
    ):
        return value
    computed = cnp.PyArray_DescrFromType(_arithmetic(x))
    return _validation.element_parameter(
        name, value, _shape(rows.elements, rows.elements_shape), computed, finite
    )


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


cdef inline double _count(value) except? -1.0:
    cdef int beyond
    cdef double number
    if type(value) is int:
        number = <double>PyLong_AsLongAndOverflow(value, &beyond)
        if not beyond and number > 0.0:
            return number
    elif type(value) is float:
        number = <double>value
        if number > 0.0 and number - number == 0.0:
            return number
    return _validation.positive("count", value)


cdef inline bint _flag(str name, value) except -1:
    if value is True or value is False:
        return value is True
    return _validation.flag(name, value)


cdef Py_ssize_t _channels_per_group(num_groups, Py_ssize_t channels) except -1:
    cdef int beyond
    cdef Py_ssize_t groups
    if type(num_groups) is int and channels > 0:
        groups = PyLong_AsLongAndOverflow(num_groups, &beyond)
        if not beyond and groups > 0 and channels % groups == 0:
            return channels // groups
    return _validation.channels_of_group(num_groups, channels)


cdef Py_ssize_t _samples_per_ghost(ghost_size, Py_ssize_t samples) except -1:
    """At least 1, and of so many samples no more than there are."""
    cdef int beyond
    cdef Py_ssize_t size, max_size = max(samples, 1)
    if type(ghost_size) is int:
        size = PyLong_AsLongAndOverflow(ghost_size, &beyond)
        if not beyond and size > 0:
            return min(size, max_size)
    return min(_validation.integer_from("ghost_size", ghost_size, 1), max_size)


cdef Py_ssize_t _channels_per_saved_group(mean, Py_ssize_t channels) except -1:
    """Of as many groups as the saved statistics of a group normalization have."""
    cdef Py_ssize_t groups = 0
    if channels == 0:
        return 1
    if _is_array(mean) and cnp.PyArray_NDIM(<cnp.ndarray>mean) == 2:
        groups = cnp.PyArray_DIM(<cnp.ndarray>mean, 1)
    if groups == 0 or channels % groups:
        groups = _validation.groups_of_statistics("mean", mean, channels)
    return channels // groups


cdef inline object _upstream(dy, cnp.ndarray x, tuple names):
    return dy if _is_like(dy, x) else _validation.upstream_gradient(dy, x, names)


cdef object _tracked(mean, var, cnp.ndarray x, Py_ssize_t channels, tuple names):
    """Both running statistics, to be updated in place, or None for none."""
    if mean is None and var is None:
        return None
    if (
        _is_of_channels(mean, channels)
        and _is_of_channels(var, channels)
        and _is_writable(mean)
        and _is_writable(var)
        and _are_disjoint(mean, var)
        and _are_disjoint(mean, x)
        and _are_disjoint(var, x)
    ):
        return mean, var
    return _validation.running_statistics(mean, var, x, channels, names)


cdef int _keep_apart(tuple tracked, str name, parameter, Py_ssize_t channels) except -1:
    """Running statistics share no memory with a parameter that is read after their update."""
    if parameter is None or (
        cnp.PyArray_CheckExact(parameter)
        and _are_disjoint(parameter, tracked[0])
        and _are_disjoint(parameter, tracked[1])
    ):
        return 0
    memory = _validation.memory_of(parameter)
    if memory is not None:
        _validation.running_statistics(*tracked, memory, channels, called=name)
    return 0


cdef object _output(out, cnp.ndarray x, tuple names, tuple values, reads, int in_place):
    """Where to write: a new array like x, or `out`, where that shares no memory with the others.

    It may be one of the first `in_place` of the values, element by element: x is the last of these.
    `reads` are more that are read, by name, or None.
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
    named_arrays = dict(zip(names, values))
    if reads is not None:
        named_arrays.update(reads)
    return _validation.output(out, x, named_arrays, names[:in_place])


cdef bint _may_be_written(cnp.ndarray out, tuple values, int in_place):
    cdef int k
    for k, value in enumerate(values):
        if value is None:
            continue
        if not cnp.PyArray_CheckExact(value):
            return False
        if not _are_disjoint(out, value) and not (k < in_place and _is_same_memory(out, value)):
            return False
    return True


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


cdef bint _are_axes_of(cnp.ndarray x, sizes, axis) noexcept:
    """Whether `axis` is a tuple of different axes, counted from 0, that have these sizes."""
    cdef int d, other, beyond, ndim = cnp.PyArray_NDIM(x)
    cdef Py_ssize_t at
    if type(axis) is not tuple or not 0 < len(<tuple>axis) <= ndim:
        return False
    if type(sizes) is not tuple or len(<tuple>sizes) != len(<tuple>axis):
        return False
    for d in range(<int>len(<tuple>axis)):
        one, size = (<tuple>axis)[d], (<tuple>sizes)[d]
        if type(one) is not int or type(size) is not int:
            return False
        at = PyLong_AsLongAndOverflow(one, &beyond)
        if beyond or not 0 <= at < ndim:
            return False
        if PyLong_AsLongAndOverflow(size, &beyond) != cnp.PyArray_DIM(x, <int>at) or beyond:
            return False
        for other in range(d):
            if (<tuple>axis)[other] == one:
                return False
    return True


cdef tuple _rows_of(cnp.ndarray x, sizes, axis, _Rows *rows):
    """Set what rows there are; return the axes that make one, None where they are the last."""
    cdef int d, ndim = cnp.PyArray_NDIM(x)
    cdef tuple axes = None
    rows.first = _first_normalized(x, sizes) if axis is None else -1
    rows.statistics = rows.elements = 0
    if rows.first < 0:
        several = (axis,) if type(axis) is int else axis
        if _are_axes_of(x, (sizes,) if type(sizes) is int else sizes, several):
            axes = several
        else:
            _, axes = _validation.normalized_axes(x, sizes, axis)
        for one in axes:
            rows.elements_shape[rows.elements] = cnp.PyArray_DIM(x, <int>one)
            rows.elements += 1
    for d in range(ndim):
        if axes is None and d >= rows.first:
            rows.elements_shape[rows.elements] = cnp.PyArray_DIM(x, d)
            rows.elements += 1
        elif axes is None or d not in axes:
            rows.statistics_shape[rows.statistics] = cnp.PyArray_DIM(x, d)
            rows.statistics += 1
    return axes


cdef inline cnp.ndarray _data_of(str name, x):
    return x if _is_data(x) else _validation.data_array(name, x)


cdef cnp.ndarray _data_in_full(str name, x):
    """Data of more than 16 bits."""
    if _is_data(x) and not _is_half(x):
        return x
    return _validation.data_array(name, x, half=False)


# running statistics, which are updated in place

cdef object _contiguous_or_copy(cnp.ndarray statistic):
    """The statistic as the core needs it: contiguous and aligned, or a copy to put back."""
    if _is_half(statistic):
        return statistic.astype(numpy.float32)
    if cnp.PyArray_CHKFLAGS(statistic, cnp.NPY_ARRAY_CARRAY_RO):
        return statistic
    return statistic.copy()


cdef bint _put_back(updated, statistic) except -1:
    """Return whether the dtype of the statistic is too small for a finite value."""
    if updated is statistic:
        return False
    if not _is_half(statistic):
        statistic[...] = updated
        return False
    with numpy.errstate(all="ignore"):
        statistic[...] = updated
        return bool((numpy.isinf(statistic) & numpy.isfinite(updated)).any())


# gradients of parameters

cdef int _type_of_gradient(cnp.ndarray parameter) noexcept:
    """In which the gradient of a parameter is computed: float32 for those of 16 bits."""
    return cnp.NPY_FLOAT32 if _is_half(parameter) else cnp.PyArray_TYPE(parameter)


cdef inline object _of_parameter(str name, given, checked, gradient):
    """A gradient in the dtype of the parameter that was given."""
    if given is checked or gradient is None:
        return gradient
    return _validation.gradient_of(name, given, gradient)
