# Which values of a call count, for _core.pyx.

cdef class Mask:
    """A mask in the order of a plan's walk; immutable."""

    def __dealloc__(self):
        free(self.memory)
        free(self.stretches)


cdef Mask new_mask(Plan plan, const bn_given_mask *given, bint keeps_input):
    """A mask of the plan's values; None where all count.

    What does not count stays as it is in outputs, or becomes 0.
    """
    cdef Mask mask
    cdef bn_mask_sizes sizes
    if bn_mask_is_full(&plan.c, given):
        return None
    mask = Mask()
    mask.memory = malloc(bn_mask_bytes(&plan.c))
    if mask.memory is NULL:
        raise MemoryError("no memory for the mask")
    mask.c = bn_new_mask(&plan.c, given, mask.memory, &sizes)
    mask.count, mask.c.keeps_input = sizes.count, keeps_input
    mask.stretches = malloc((sizes.stretches + 1) * sizeof(bn_stretch))
    if mask.stretches is NULL:
        raise MemoryError("no memory for the mask")
    bn_list_stretches(&plan.c, &mask.c, <bn_stretch *>mask.stretches)
    return mask


cdef inline void _set_mask(bn_job *job, Mask mask) noexcept:
    if mask is not None:
        job.mask = mask.c


cdef int _update_masked(
    _Workspace *workspace, bn_job *job, running_mean, running_var, double momentum,
    double correction
) noexcept:
    """As `normalize` does, of repeats that have different numbers of values.

    Those with none leave nothing; the variance of one that counts needs more than `correction`.
    """
    cdef const bn_plan *c = job.plan
    cdef double *mean = _take_doubles(workspace, c.channels)
    cdef double *variance = _take_doubles(workspace, c.channels)
    cdef size_t repeat, channel, repeats = 0
    cdef double count
    if workspace.failed:
        return 0
    memset(mean, 0, c.channels * sizeof(double))
    memset(variance, 0, c.channels * sizeof(double))
    for repeat in range(c.repeats):
        repeats += job.mask.total[repeat] > 0
    for repeat in range(c.repeats):
        count = <double>job.mask.total[repeat]
        if count > 0:
            for channel in range(c.channels):
                mean[channel] += job.statistic[BN_MEAN][repeat * c.channels + channel] / repeats
                variance[channel] += (
                    job.statistic[BN_M2][repeat * c.channels + channel]
                    / (count - correction) / repeats
                )
    cdef int too_large = 0
    if _update_running(running_mean, 1, momentum, mean, 1.0):
        too_large |= _MEAN_TOO_LARGE
    if _update_running(running_var, 1, momentum, variance, 1.0):
        too_large |= _VAR_TOO_LARGE
    return too_large
