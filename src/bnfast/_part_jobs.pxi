# Jobs on a part of a batch, for _core.pyx: one makes the sums of the part, and another writes its
# output once the sums of all parts are merged. (The sums of `normalize` are those of `moments`.)

cdef int merge_moments(counts, moments, merged) except -1:
    """Write the moments of all parts (float64, mean, mean_low and m2), merged in their order.

    `moments` are (parts, 3, C), `counts` (parts,) of int64, and `merged` is (3, C), zeros.
    """
    cdef size_t total = 0, count, part, channels = <size_t>cnp.PyArray_DIM(merged, 1)
    cdef double *a = _doubles(merged)
    cdef double *b = _doubles(moments)
    for part in range(<size_t>cnp.PyArray_SIZE(counts)):
        count = <size_t>(<cnp.int64_t *>cnp.PyArray_DATA(counts))[part]
        if count > 0:
            active.merge_moments(
                channels, total, a, a + channels, a + 2 * channels, count, b, b + channels,
                b + 2 * channels
            )
        total += count
        b += 3 * channels
    return 0


cdef int invstd(variance, double eps, result) except -1:
    """Write 1 / sqrt(variance + eps), float64."""
    active.invstd(
        <size_t>cnp.PyArray_SIZE(variance), _doubles(variance), 1.0, eps, NULL, _doubles(result)
    )
    return 0


cdef int normalize_part(
    Plan plan, x, y, weight, bias, mean, mean_low, inverse_std, int threads
) except -1:
    """Write y from the statistics of all parts (float64)."""
    cdef bn_plan *c = &plan.c
    cdef bn_job job = _new_job(c)
    cdef char small[BN_SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, BN_SMALL_WORKSPACE)
    job.operand[BN_X], job.operand[BN_Y] = _data(x), _data(y)
    job.weight = _widened(&workspace, weight, c.channels)
    job.bias = _widened(&workspace, bias, c.channels)
    job.statistic[BN_MEAN], job.statistic[BN_MEAN_LOW] = _doubles(mean), _doubles(mean_low)
    job.statistic[BN_INVSTD], job.invstd_given = _doubles(inverse_std), True
    _choose_and_take(&workspace, &job, 0, threads)
    _do_all(&job, &workspace, bn_scale_shift_stages, threads)
    _end(&workspace)
    return 0


cdef void _set_statistics(_Workspace *workspace, bn_job *job, mean, mean_low, invstd) noexcept:
    """Statistics of a gradient; what rounding left of the mean is found again where it is None."""
    job.statistic[BN_MEAN] = _statistic(workspace, mean, job.plan, 1)
    job.statistic[BN_INVSTD] = _statistic(workspace, invstd, job.plan, 1)
    job.statistic[BN_MEAN_LOW] = _doubles_or_null(mean_low)
    job.mean_low_given = mean_low is not None


cdef unsigned int _wanted(const bn_job *job) noexcept:
    if job.plan.dtype == BN_f64 and not job.mean_low_given:
        return _OF_GRADIENT | 1 << BN_MEAN_LOW
    return _OF_GRADIENT


cdef int gradient_sums(
    Plan plan, x, dy, mean, mean_low, invstd, sum_dy, sum_dy_xhat, int threads
) except -1:
    """Write sum(dy) and sum(dy * (x - mean) * invstd) of each channel (float64)."""
    cdef bn_plan *c = &plan.c
    cdef bn_job job = _new_job(c)
    cdef char small[BN_SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, BN_SMALL_WORKSPACE)
    job.operand[BN_X], job.operand[BN_DY] = _data(x), _data(dy)
    _set_statistics(&workspace, &job, mean, mean_low, invstd)
    job.statistic[BN_SUM_DY] = _doubles(sum_dy)
    job.statistic[BN_SUM_DY_XHAT] = _doubles(sum_dy_xhat)
    _choose_and_take(&workspace, &job, _wanted(&job), threads)
    _do_all(&job, &workspace, bn_gradient_stages, threads)
    _end(&workspace)
    return 0


cdef int input_gradient(
    Plan plan, x, dy, dx, weight, mean, mean_low, invstd, sum_dy, sum_dy_xhat, double count,
    int threads
) except -1:
    """Write dx from such sums (float32 or float64) over all parts, of `count` values a channel."""
    cdef bn_plan *c = &plan.c
    cdef bn_job job = _new_job(c)
    cdef char small[BN_SMALL_WORKSPACE]
    cdef _Workspace workspace = _begin(small, BN_SMALL_WORKSPACE)
    job.operand[BN_X], job.operand[BN_DY], job.operand[BN_DX] = _data(x), _data(dy), _data(dx)
    job.weight = _widened(&workspace, weight, c.channels)
    _set_statistics(&workspace, &job, mean, mean_low, invstd)
    job.given_sum_dy = _widened(&workspace, sum_dy, c.channels)
    job.given_sum_dy_xhat = _widened(&workspace, sum_dy_xhat, c.channels)
    job.count = count
    _choose_and_take(&workspace, &job, _wanted(&job), threads)
    _do_all(&job, &workspace, bn_gradient_stages, threads)
    _end(&workspace)
    return 0
