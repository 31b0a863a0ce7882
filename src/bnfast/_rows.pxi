# Layer and RMS normalization, for _primitives.pyx: rows, whose elements may have parameters.

def normalize_rows(
    x_, normalized_shape, axis, weight, bias, eps, bint centred, out=None,
    _Activation activation=None, residual=None
):
    """Return y, and the mean and invstd (float64) of every row: over the last axes, or `axis`.

    `weight` and `bias` have their sizes. Around 0 where they are not `centred`, and then the mean
    is None, and an eps of None the step at 1 of the dtype that is computed in. A `residual` like x
    is added before the activation.
    """
    cdef cnp.ndarray x = _data_of("x", x_)
    cdef _Rows rows
    cdef tuple axes = _rows_of(x, normalized_shape, axis, &rows)
    cdef double epsilon
    if eps is None and not centred:
        epsilon = _step_at_one(x)
    else:
        epsilon = _eps(eps, True, True)
    # 0 times infinity would make NaN of what is equal to its mean.
    scale = _of_elements("weight", weight, x, &rows, True)
    shift = _of_elements("bias", bias, x, &rows, False)
    added = None if residual is None else _upstream(residual, x, ("residual", "x"))
    y = _output(
        out, x, ("residual", "x", "weight", "bias"), (residual, x, weight, bias), None, 2
    )
    cdef Plan plan
    cdef tuple more = (), roles = ()
    if added is not None:
        more, roles = (added,), _ROLES_OF_RESIDUAL
    mean = None
    if centred:
        mean = _empty(rows.statistics, rows.statistics_shape, cnp.NPY_FLOAT64)
    invstd = _empty(rows.statistics, rows.statistics_shape, cnp.NPY_FLOAT64)
    if cnp.PyArray_SIZE(x) == 0:
        if centred:
            mean.fill(0.0)
        invstd.fill(invstd_of_nothing(epsilon))
        return y, mean, invstd
    scale, shift = _both_or_neither(scale, shift, centred)
    plan = _plan_of_rows(rows.first, axes, 0 if scale is None else 2, x, y, None, more, roles)
    if not plan.in_order:
        scale, shift = _as_walked(scale, plan.walked), _as_walked(shift, plan.walked)
    _core.normalize_rows(
        plan, x, y, scale, shift, epsilon, mean, invstd, activation, added,
        _threads_for(x, 3 if added is None else 4)
    )
    return y, mean, invstd


cdef tuple _both_or_neither(scale, shift, bint centred):
    """The parameters of elements that there are kernels for, where there may be one of them."""
    if scale is None and shift is not None:
        return numpy.ones_like(shift), shift
    if scale is not None and shift is None and centred:
        return scale, _zeros(
            cnp.PyArray_NDIM(<cnp.ndarray>scale), cnp.PyArray_DIMS(<cnp.ndarray>scale),
            cnp.PyArray_TYPE(<cnp.ndarray>scale)
        )
    return scale, shift


def row_gradient(
    dy, x_, normalized_shape, axis, mean, invstd, weight, bint centred, bint parameters, out=None,
    bias=None, _Activation activation=None, residual=None, y_=None, bint keeps=False
):
    """Return dx, dweight, dbias and, where it `keeps` that, the gradient of the residual.

    The mean of what is not `centred` is None. Gradients of parameters have the dtype of `weight`,
    and without `parameters` are None. What the activation was given is made again of x, bias and
    residual, or taken from y: see `fused_gradient`.
    """
    cdef cnp.ndarray x = _data_of("x", x_)
    cdef _Rows rows
    cdef tuple axes = _rows_of(x, normalized_shape, axis, &rows)
    cdef Plan plan
    upstream = _upstream(dy, x, ("dy", "x"))
    cdef str saved = "invstd" if centred else "invrms"
    inverse = _saved(saved, invstd, rows.statistics, rows.statistics_shape)
    centre = None
    if centred:
        centre = _saved("mean", mean, rows.statistics, rows.statistics_shape)
    # 0 times infinity would make NaN of what is equal to its mean.
    scale = _of_elements("weight", weight, x, &rows, True)
    shift = _of_elements("bias", bias, x, &rows, False)
    added = None if residual is None else _upstream(residual, x, ("residual", "x"))
    y = None if y_ is None else _upstream(y_, x, ("y", "x"))
    dx = _output(
        out, x, ("dy", "x", "weight", "mean", saved, "bias", "residual", "y"),
        (upstream, x, weight, mean, invstd, bias, residual, y_), None, 2
    )
    dresidual = None
    if keeps:
        dresidual = _gradient_of_residual(x, upstream, dx, activation is not None)
    cdef int kind = _parameter_type(x)
    if weight is not None:
        kind = _type_of_gradient(weight if scale is weight else _validation.as_array(weight))
    if cnp.PyArray_SIZE(x) == 0:
        if not parameters:
            return _gradients_of_rows(dx, None, None, keeps, dresidual)
        dbias = _zeros(rows.elements, rows.elements_shape, kind)
        dbias = _of_parameter("weight", weight, scale, dbias)
        return _gradients_of_rows(dx, dbias.copy(), dbias, keeps, dresidual)
    cdef object checked = scale
    cdef tuple more = (), roles = ()
    if activation is None or y is not None:  # nothing is made again
        shift = None
    else:
        scale, shift = _both_or_neither(scale, shift, centred)
    if activation is not None:
        more, roles = _more_of_activated(added, y, dresidual)
    cdef int given = (scale is not None) + (shift is not None)
    plan = _plan_of_rows(rows.first, axes, given, x, upstream, dx, more, roles)
    cdef cnp.npy_intp size = <cnp.npy_intp>(plan.c.outer * plan.c.inner)
    cdef cnp.npy_intp all_sums = 2 * size * <cnp.npy_intp>plan.row_blocks
    sums = _empty(1, &all_sums, cnp.NPY_FLOAT64) if parameters else None
    if not plan.in_order:
        scale, shift = _as_walked(scale, plan.walked), _as_walked(shift, plan.walked)
    _core.row_gradient(
        plan, x, upstream, dx, scale, shift, centre, inverse, sums, activation,
        None if y is not None else added, y, None if activation is None else dresidual,
        checked is None, _threads_for(x, 5)
    )
    if sums is None:
        return _gradients_of_rows(dx, None, None, keeps, dresidual)
    if plan.in_order:
        dweight = _rounded(_doubles(sums), rows.elements, rows.elements_shape, kind)
        dbias = _rounded(_doubles(sums) + size, rows.elements, rows.elements_shape, kind)
    else:
        columns = _in_order(
            sums[: 2 * size].reshape(2, size), plan.walked,
            _shape(rows.elements, rows.elements_shape)
        )
        with numpy.errstate(all="ignore"):
            dweight, dbias = cnp.PyArray_Cast(columns[0], kind), cnp.PyArray_Cast(columns[1], kind)
    return _gradients_of_rows(
        dx, _of_parameter("weight", weight, checked, dweight),
        _of_parameter("weight", weight, checked, dbias), keeps, dresidual
    )


cdef inline tuple _gradients_of_rows(dx, dweight, dbias, bint keeps, dresidual):
    return (dx, dweight, dbias, dresidual) if keeps else (dx, dweight, dbias)


def _as_walked(parameter, walked):
    """Return the parameter of the elements of a row in the order in which they are walked."""
    if parameter is None:
        return None
    single_axes = [d for d in range(parameter.ndim) if d not in walked]  # of a single element
    return numpy.ascontiguousarray(parameter.transpose(*walked, *single_axes))


def _in_order(columns, walked, shape):
    """Return sums of the elements of a row, in the order of `shape` rather than of the walk."""
    sizes = [shape[d] for d in walked]
    order = sorted(range(len(walked)), key=walked.__getitem__)
    turned = columns.reshape(len(columns), *sizes).transpose(0, *[d + 1 for d in order])
    return turned.reshape(len(columns), *shape)
