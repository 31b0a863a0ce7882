# The plans of calls, for _primitives.pyx: made once for a dtype, sizes and strides, and kept.

cdef dict _plans = {}
cdef Py_ssize_t _MOST_PLANS = 1024


cdef enum:
    MOST_OPERANDS = 3
    BUILT_IN_TYPES = 32  # of NumPy, more than there are

# By the number of the dtype that data is stored in: that of its arithmetic, 0 (bool) for none, and
# the name by which the core knows how to convert it. Integers can be summed, not normalized.
cdef int[BUILT_IN_TYPES] _computed_in
cdef bint[BUILT_IN_TYPES] _has_outputs
cdef dict _stored_names = {}
for _type in _dtypes.STORAGE_TYPES + _dtypes.INTEGER_TYPES:
    if _type.dtype.num >= BUILT_IN_TYPES:
        raise ValueError(f"{_type.dtype} is no dtype of NumPy's own")
    _computed_in[<int>_type.dtype.num] = _type.arithmetic.num
    _has_outputs[<int>_type.dtype.num] = _type in _dtypes.STORAGE_TYPES
    _stored_names[_type.dtype.num] = _type.name


def compute_in(stored, arithmetic):
    """Compute data of one dtype in another: for tests, which so convert what they can compare."""
    _computed_in[<int>numpy.dtype(stored).num] = numpy.dtype(arithmetic).num


# The number of bfloat16, which ml_dtypes has added to NumPy's types; -1 until such an array comes.
cdef int _bfloat16 = -1


cdef bint _is_bfloat16(cnp.ndarray x) noexcept:
    global _bfloat16
    cdef int kind = cnp.PyArray_TYPE(x)
    if _bfloat16 < 0 and _dtypes.is_bfloat16((<object>x).dtype):
        _bfloat16 = kind
    return kind == _bfloat16


cdef inline bint _is_half(cnp.ndarray data) noexcept:
    """Whether floats are of 16 bits."""
    return cnp.PyArray_ITEMSIZE(data) == 2


cdef inline int _arithmetic(cnp.ndarray x) noexcept:
    """The number of the dtype in which x is computed."""
    cdef int kind = cnp.PyArray_TYPE(x)
    if kind < BUILT_IN_TYPES:
        return _computed_in[kind]
    return cnp.NPY_FLOAT32 if _is_bfloat16(x) else 0


cdef object _name_of_storage(cnp.ndarray x):
    return _stored_names.get(cnp.PyArray_TYPE(x), _dtypes.BFLOAT16)


cdef inline int _parameter_type(cnp.ndarray x) noexcept:
    """The number of the dtype of gradients whose parameter was not given."""
    cdef int stored = cnp.PyArray_TYPE(x)
    if stored == cnp.NPY_FLOAT32 or stored == cnp.NPY_FLOAT64:
        return stored
    return _arithmetic(x)


cdef bytes _key(
    cnp.ndarray x, Py_ssize_t axes, Py_ssize_t kind, cnp.ndarray second, cnp.ndarray third
):
    """What a plan depends on. The stride of an axis of one element is moot, and counts as 0."""
    cdef cnp.npy_intp words[4 + BN_MAX_AXES * (1 + MOST_OPERANDS)]
    cdef cnp.ndarray operand
    cdef int d, k, ndim = cnp.PyArray_NDIM(x), count = 4
    cdef bint aligned
    words[0] = BUILT_IN_TYPES * cnp.PyArray_TYPE(x) + _arithmetic(x)
    words[1] = axes
    words[2] = kind
    words[3] = 0
    for d in range(ndim):
        words[count] = cnp.PyArray_DIM(x, d)
        count += 1
    for k in range(MOST_OPERANDS):
        operand = x if k == 0 else second if k == 1 else third
        if operand is None:
            break
        aligned = cnp.PyArray_CHKFLAGS(operand, cnp.NPY_ARRAY_ALIGNED)
        words[3] |= <cnp.npy_intp>(3 if aligned else 2) << 2 * k
        for d in range(ndim):
            words[count] = cnp.PyArray_STRIDE(operand, d) if cnp.PyArray_DIM(x, d) > 1 else 0
            count += 1
    return PyBytes_FromStringAndSize(<char *>words, count * sizeof(cnp.npy_intp))


cdef object _layout_of(cnp.ndarray second, cnp.ndarray third, cnp.ndarray x):
    """Item size of the arithmetic; strides of all operands, and which may lie as they are."""
    operands = [operand for operand in (x, second, third) if operand is not None]
    cdef int computed = _arithmetic(x), stored = cnp.PyArray_TYPE(x)
    cdef bint has_kernels = stored == computed or _is_half(x)
    return (
        cnp.PyArray_DescrFromType(computed).itemsize,
        tuple([operand.strides for operand in operands]),
        tuple([
            has_kernels and operand.flags.aligned and operand.dtype.num == stored
            for operand in operands
        ]),
    )


# Kinds of calls with statistics of channels: 0 for those over all samples, and
cdef enum:
    _KIND_PER_SAMPLE = 1
    _KIND_OF_SUMS = 2
    _KIND_OF_SUMMARY = 3
    _KIND_OF_SUM = 4  # with a residual, and more for each set of operands

# Of calls on so many arrays.
cdef tuple _ROLES = ((), (BN_X,), (BN_X, BN_Y), (BN_X, BN_DY, BN_DX))
cdef tuple _ROLES_OF_SUMS = (BN_X, BN_DY)
cdef tuple _ROLES_OF_RESIDUAL = (BN_RESIDUAL,)  # besides


cdef Plan _stored(key, plan, tuple roles, cnp.ndarray x):
    name = None if _arithmetic(x) == cnp.PyArray_TYPE(x) else _name_of_storage(x)
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = new_plan = Plan(plan, roles, name, cnp.PyArray_ITEMSIZE(x))
    return new_plan


cdef Plan _plan(
    Py_ssize_t axis, Reduction over, cnp.ndarray x, cnp.ndarray second, cnp.ndarray third
):
    """The plan of a call with statistics of channels."""
    return _plan_of_channels(axis, over.per_sample, x, second, third)


cdef Plan _plan_of_sums(Py_ssize_t axis, cnp.ndarray x, cnp.ndarray dy):
    """The plan of a call that makes the sums of a gradient, and writes no dx."""
    return _plan_of_channels(axis, _KIND_OF_SUMS, x, dy, None)


cdef Plan _plan_of_sum(
    Py_ssize_t axis, Reduction over, cnp.ndarray x, cnp.ndarray y, residual
):
    """The plan of a call with statistics of channels that may add a residual to its output."""
    if residual is None:
        return _plan_of_channels(axis, over.per_sample, x, y, None)
    return _plan_of_more(axis, over, (x, y), (BN_X, BN_Y), (residual,), _ROLES_OF_RESIDUAL)


cdef Plan _plan_of_activated(
    Py_ssize_t axis, Reduction over, cnp.ndarray x, cnp.ndarray dy, cnp.ndarray dx, residual, y,
    dresidual
):
    """The plan of the gradient of an activated output."""
    more, roles = _more_of_activated(residual, y, dresidual)
    if not more:
        return _plan_of_channels(axis, over.per_sample, x, dy, dx)
    return _plan_of_more(axis, over, (x, dy, dx), (BN_X, BN_DY, BN_DX), more, roles)


cdef tuple _more_of_activated(residual, y, dresidual):
    """What such a gradient needs besides, and the roles: y is read in the place of the residual."""
    role = BN_RESIDUAL
    if y is not None:
        residual, role = y, BN_Y
    if dresidual is not None:
        return (residual, dresidual), (role, BN_DRESIDUAL)
    if residual is not None:
        return (residual,), (role,)
    return (), ()


cdef Plan _plan_of_more(
    Py_ssize_t axis, Reduction over, tuple operands, tuple roles, tuple more, tuple more_roles
):
    """The plan of a call on more operands than a key has room for."""
    cdef cnp.ndarray x = operands[0]
    third = operands[2] if len(operands) > 2 else None
    cdef tuple key = (
        _key(x, axis, _KIND_OF_SUM + over.per_sample, operands[1], third),
        _key(x, axis, 0, more[0], more[1] if len(more) > 1 else None), more_roles,
    )
    cdef Plan found = _plans.get(key)
    if found is not None:
        return found
    itemsize, strides, directly = _layout_of(operands[1], third, x)
    _, more_strides, more_directly = _layout_of(more[0], more[1] if len(more) > 1 else None, x)
    repeated = (0,) if over.per_sample else ()
    plan = plan_layout(
        (<object>x).shape, (axis,), repeated, itemsize, strides + more_strides[1:],
        directly + more_directly[1:], cnp.PyArray_ITEMSIZE(x)
    )
    return _stored(key, plan, roles + more_roles, x)


cdef Plan _plan_of_channels(
    Py_ssize_t axis, Py_ssize_t kind, cnp.ndarray x, cnp.ndarray second, cnp.ndarray third
):
    cdef bytes key = _key(x, axis, kind, second, third)
    cdef Plan found = _plans.get(key)
    if found is not None:
        return found
    itemsize, strides, directly = _layout_of(second, third, x)
    repeated = (0,) if kind == _KIND_PER_SAMPLE else ()
    plan = plan_layout(
        (<object>x).shape, (axis,), repeated, itemsize, strides, directly, cnp.PyArray_ITEMSIZE(x)
    )
    roles = _ROLES_OF_SUMS if kind == _KIND_OF_SUMS else _ROLES[len(strides)]
    return _stored(key, plan, roles, x)


cdef Plan _plan_of_rows(
    int rows, tuple axes, int parameters, cnp.ndarray x, cnp.ndarray second, cnp.ndarray third,
    tuple more=(), tuple more_roles=()
):
    """The plan of a call with statistics of rows: of all axes from `rows` on, or else of `axes`.

    `more` are one or two operands that what follows a normalization needs, or none.
    """
    cdef object key = _key(x, -1 - rows, 2 + parameters, second, third)
    if axes is not None or more:
        key = key, axes, more_roles
    if more:
        key += (_key(x, 0, 0, more[0], more[1] if len(more) > 1 else None),)
    cdef Plan found = _plans.get(key)
    if found is not None:
        return found
    itemsize, strides, directly = _layout_of(second, third, x)
    normalized = tuple(range(rows, x.ndim)) if axes is None else axes
    cdef tuple roles = _ROLES[len(strides)] + more_roles
    inputs = len(strides) - 1  # all but the output
    if more:
        _, more_strides, more_directly = _layout_of(more[0], more[1] if len(more) > 1 else None, x)
        strides, directly = strides + more_strides[1:], directly + more_directly[1:]
    plan = plan_rows(
        (<object>x).shape, normalized, itemsize, strides, directly, inputs, parameters,
        cnp.PyArray_ITEMSIZE(x)
    )
    of_elements = (BN_ELEMENT_WEIGHT, BN_ELEMENT_BIAS)[:parameters]
    return _stored(key, plan, roles + of_elements, x)


cdef Plan _plan_of_summary(tuple kept, cnp.ndarray x, cnp.ndarray mask):
    """The plan of a call with statistics for these axes, of what a mask selects, or all."""
    cdef tuple key = (_key(x, 0, _KIND_OF_SUMMARY, mask, None), kept)
    cdef Plan found = _plans.get(key)
    if found is not None:
        return found
    itemsize, strides, directly = _layout_of(mask, None, x)
    reduced = tuple([d for d in range(cnp.PyArray_NDIM(x)) if d not in kept])
    plan = plan_rows(
        (<object>x).shape, reduced, itemsize, strides, directly, len(strides),
        stored_itemsize=cnp.PyArray_ITEMSIZE(x)
    )
    return _stored(key, plan, (BN_X, BN_MASK)[: len(strides)], x)


cdef int _threads_for(cnp.ndarray x, int passes) except -1:
    """For a call that reads and writes memory as large as x so many times."""
    cdef Py_ssize_t moved = passes * cnp.PyArray_NBYTES(x)
    return 1 if moved < <Py_ssize_t>_threads.SERIAL_BYTES else _threads.threads_for(moved)
