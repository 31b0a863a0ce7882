# Jobs on rows whose elements may have parameters, layer and RMS norm, for _core.pyx.

cdef int normalize_rows(
    Plan plan, x, y, weight, bias, double eps, mean, invstd, Activation activation, residual,
    int threads
) except -1:
    """Write y, mean and invstd (float64) from the statistics of the rows of x.

    Without a mean, which may be None, they are around 0. Rows are the channels of the plan's
    repeats; weight and bias are operands of the dtype of x: both or neither or, where statistics
    are around 0, weight alone. A residual, which may be None, is added before the activation.
    """
    cdef bn_plan *c = &plan.c
    cdef bn_job job = _new_job(c)
    cdef char small[BN_SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, BN_SMALL_WORKSPACE)
    cdef bint is_curved = activation is not None and activation.is_curve
    cdef bint goes_on = activation is not None or residual is not None
    job.operand[BN_X], job.operand[BN_Y] = _data(x), _data(y)
    job.operand[BN_ELEMENT_WEIGHT] = _data_or_null(weight)
    job.operand[BN_ELEMENT_BIAS] = _data_or_null(bias)
    job.operand[BN_RESIDUAL] = _data_or_null(residual)
    _set_activation(&workspace, &job, activation, None)
    job.eps, job.centred = eps, mean is not None
    job.statistic[BN_INVSTD] = _doubles(invstd)
    job.statistic[BN_MEAN] = _doubles_or_null(mean)
    _choose_and_take(
        &workspace, &job, _OF_NORMALIZE, threads,
        made=is_curved or (goes_on and weight is not None)
    )
    _do_all(&job, &workspace, bn_normalize_stages, threads)
    _end(&workspace)
    return 0


cdef int row_gradient(
    Plan plan, x, dy, dx, weight, bias, mean, invstd, sums, Activation activation, residual, y,
    dresidual, bint has_no_weight, int threads
) except -1:
    """Write dx, and to sums[0] the gradients of weight and bias; `sums` may be None.

    They are float64, [blocks of rows][2][elements of a row in the order of the walk]. Weight, bias,
    mean and invstd are as `normalize_rows` takes and writes them. With an activation dy is the
    gradient of what that made; it needs what it made, y, or else the bias and the residual, if
    there was one, whose gradient `dresidual` receives; each of them may be None. Where it
    `has_no_weight`, a bias has one of ones with it.
    """
    cdef bn_plan *c = &plan.c
    cdef bn_job job = _new_job(c)
    cdef char small[BN_SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, BN_SMALL_WORKSPACE)
    cdef unsigned int wanted = _OF_GRADIENT
    cdef bint made = activation is not None
    job.operand[BN_X], job.operand[BN_DY], job.operand[BN_DX] = _data(x), _data(dy), _data(dx)
    job.operand[BN_ELEMENT_WEIGHT] = _data_or_null(weight)
    if made:
        _set_activation(&workspace, &job, activation, None)
        job.operand[BN_ELEMENT_BIAS] = _data_or_null(bias)
        job.operand[BN_RESIDUAL], job.operand[BN_Y] = _data_or_null(residual), _data_or_null(y)
        job.operand[BN_DRESIDUAL] = _data_or_null(dresidual)
        job.has_no_weight = has_no_weight
    job.centred = mean is not None
    if c.dtype == BN_f64 and mean is not None:
        wanted |= 1 << BN_MEAN_LOW
    job.statistic[BN_MEAN] = _statistic(&workspace, mean, c, 1)
    job.statistic[BN_INVSTD] = _statistic(&workspace, invstd, c, 1)
    if sums is not None:
        job.column_sums = _doubles(sums)
    _choose_and_take(&workspace, &job, wanted, threads, made=made, of_rows=made)
    _do_all(&job, &workspace, bn_row_gradient_stages, threads)
    _end(&workspace)
    return 0
