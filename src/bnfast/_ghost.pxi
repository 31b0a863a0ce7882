# Ghost batch normalization, for _primitives.pyx: some neighbouring samples, a ghost, have their
# statistics together.
#
# To the core, the whole ghosts are the samples of an array with one more axis, (ghosts, samples of
# a ghost, ...); the last ghost, where it has fewer samples, is the only one of another such array.

def ghost_normalize(
    x_, axis_, ghost_size, weight, bias, eps, running_mean=None, running_var=None,
    weight_of_ghost=None, bint unbiased=True, out=None
):
    """As `normalize`, with a mean and invstd for each of the ghosts: (B, C).

    The running statistics take one ghost after the other. The function says what each, counted from
    1, weighs in them.
    """
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch_of_ghosts(x_, axis_, &axis), some_x, some_y
    cdef Py_ssize_t channels = _channels(x, axis), samples = cnp.PyArray_DIM(x, 0), ghost, values
    cdef cnp.npy_intp shape[2]
    cdef int piece
    tracked = _tracked(running_mean, running_var, x, channels, _MEAN_AND_VAR)
    cdef Py_ssize_t size = _samples_per_ghost(ghost_size, samples)
    cdef double epsilon = _eps(eps, False, True)
    scale, shift = _of_channels("weight", weight, channels), _of_channels("bias", bias, channels)
    y = _output(
        out, x, ("x", "weight", "bias", "running_mean", "running_var"),
        (x, weight, bias, running_mean, running_var), None, 1
    )
    shape[0], shape[1] = _ghosts(samples, size), channels
    if cnp.PyArray_SIZE(x) == 0:
        return y, _zeros(2, shape, cnp.NPY_FLOAT64), _zeros(2, shape, cnp.NPY_FLOAT64)
    mean = _empty(2, shape, cnp.NPY_FLOAT64)
    invstd = _empty(2, shape, cnp.NPY_FLOAT64)
    m2 = weights = None
    values = cnp.PyArray_SIZE(x) // (samples * channels)  # of a channel of a sample
    if tracked is not None:
        if values == 1 and (size == 1 or samples % size == 1):
            _validation.enough_values("x", x, 1, "channel of a ghost", unbiased=unbiased)
        m2 = _empty(2, shape, cnp.NPY_FLOAT64)
        weights = [_real("momentum", weight_of_ghost(n)) for n in range(1, shape[0] + 1)]
    for piece in range(_pieces(samples, size)):
        some_x, some_y = _of_ghosts(x, size, piece), _of_ghosts(y, size, piece)
        ghost = piece * (samples // size)
        _core.normalize(
            _plan(axis + 1, PER_SAMPLE, some_x, some_y, None), some_x, some_y, scale, shift,
            epsilon, _from_ghost(mean, ghost), _from_ghost(invstd, ghost), _from_ghost(m2, ghost),
            1, True, None, None, 0.0, 0.0, None, None, None, _threads_for(some_x, 3)
        )
    if tracked is not None:
        _track_ghosts(
            tracked, weights, mean, m2, values * size, values * samples, 1.0 if unbiased else 0.0
        )
    return y, mean, invstd


cdef int _track_ghosts(
    tuple tracked, list weights, mean, m2, Py_ssize_t of_ghost, Py_ssize_t of_all,
    double correction
) except -1:
    """Update the running statistics; channels have so many values in a whole ghost, and in all."""
    cdef int too_large = 0
    cdef Py_ssize_t ghost
    running_mean, running_var = _contiguous_or_copy(tracked[0]), _contiguous_or_copy(tracked[1])
    for ghost in range(len(weights)):
        new, count = weights[ghost], min(of_ghost, of_all - ghost * of_ghost)
        if _core.update_running(running_mean, _from_ghost(mean, ghost), new, 1.0):
            too_large |= <int>core.MEAN_TOO_LARGE
        if _core.update_running(running_var, _from_ghost(m2, ghost), new, count - correction):
            too_large |= <int>core.VAR_TOO_LARGE
    too_large |= <int>core.MEAN_TOO_LARGE * _put_back(running_mean, tracked[0])
    too_large |= <int>core.VAR_TOO_LARGE * _put_back(running_var, tracked[1])
    return _warn_of(too_large)


def ghost_gradient(dy, x_, axis_, ghost_size, mean, invstd, weight, out=None):
    """As `gradient`, of statistics that `ghost_normalize` returned."""
    cdef Py_ssize_t axis
    cdef cnp.ndarray x = _batch_of_ghosts(x_, axis_, &axis), some_x, some_dy, some_dx
    cdef cnp.npy_intp channels = _channels(x, axis)
    cdef Py_ssize_t samples = cnp.PyArray_DIM(x, 0), ghost
    cdef cnp.npy_intp shape[2]
    cdef int piece, kind
    upstream = _upstream(dy, x, ("dy", "x"))
    cdef Py_ssize_t size = _samples_per_ghost(ghost_size, samples)
    shape[0], shape[1] = _ghosts(samples, size), channels
    centre, inverse = _saved("mean", mean, 2, shape), _saved("invstd", invstd, 2, shape)
    scale = _of_channels("weight", weight, channels)
    dx = _output(
        out, x, ("dy", "x", "weight", "mean", "invstd"), (upstream, x, weight, mean, invstd), None,
        2
    )
    kind = _parameter_type(x) if scale is None else cnp.PyArray_TYPE(<cnp.ndarray>scale)
    dweight, dbias = _zeros(1, &channels, kind), _zeros(1, &channels, kind)
    if cnp.PyArray_SIZE(x) == 0:
        return (
            dx, _of_parameter("weight", weight, scale, dweight),
            _of_parameter("weight", weight, scale, dbias)
        )
    sum_dy = _empty(2, shape, cnp.NPY_FLOAT64)
    sum_dy_xhat = _empty(2, shape, cnp.NPY_FLOAT64)
    for piece in range(_pieces(samples, size)):
        some_x, some_dy = _of_ghosts(x, size, piece), _of_ghosts(upstream, size, piece)
        some_dx = _of_ghosts(dx, size, piece)
        ghost = piece * (samples // size)
        _core.gradient(
            _plan(axis + 1, PER_SAMPLE, some_x, some_dy, some_dx), some_x, some_dy, some_dx, scale,
            _from_ghost(centre, ghost), _from_ghost(inverse, ghost), None, None, 1, False, None,
            None, None, None, None, _from_ghost(sum_dy, ghost), _from_ghost(sum_dy_xhat, ghost),
            _threads_for(some_x, 5)
        )
    _core.parameter_gradient(sum_dy_xhat, dweight)
    _core.parameter_gradient(sum_dy, dbias)
    return (
        dx, _of_parameter("weight", weight, scale, dweight),
        _of_parameter("weight", weight, scale, dbias)
    )


cdef inline Py_ssize_t _ghosts(Py_ssize_t samples, Py_ssize_t size) noexcept:
    """How many there are of so many samples; the last may have fewer."""
    return (samples + size - 1) // size


cdef inline int _pieces(Py_ssize_t samples, Py_ssize_t size) noexcept:
    """Of how many pieces a batch is: the whole ghosts and, where there is one, a smaller one."""
    return 1 if samples % size == 0 else 2


cdef cnp.ndarray _of_ghosts(cnp.ndarray x, Py_ssize_t size, int piece):
    """A view of such a piece, with an axis of ghosts before that of their samples."""
    cdef cnp.npy_intp shape[BN_MAX_AXES]
    cdef cnp.npy_intp strides[BN_MAX_AXES]
    cdef int d, ndim = cnp.PyArray_NDIM(x)
    cdef Py_ssize_t samples = cnp.PyArray_DIM(x, 0), whole = samples // size
    cdef char *memory = <char *>cnp.PyArray_DATA(x)
    for d in range(ndim):
        shape[d + 1], strides[d + 1] = cnp.PyArray_DIM(x, d), cnp.PyArray_STRIDE(x, d)
    shape[0], shape[1], strides[0] = whole, size, size * strides[1]
    if piece == 1:
        memory += whole * strides[0]
        shape[0], shape[1] = 1, samples % size
    view = cnp.PyArray_New(
        cnp.ndarray, ndim + 1, shape, cnp.PyArray_TYPE(x), strides, memory, 0,
        cnp.PyArray_FLAGS(x), None
    )
    cnp.set_array_base(view, x)
    return view


cdef inline object _from_ghost(statistic, Py_ssize_t ghost):
    """The rows from this ghost on: the core takes as many of them as it needs."""
    return statistic if statistic is None or ghost == 0 else statistic[ghost:]
