# Which values of a batch count, for _primitives.pyx: the same for all channels.
#
# Functions hand on `masked`, their arguments (mask, lengths, padding).

cdef object _ZEROS, _INPUT  # what padding may be
_ZEROS, _INPUT = _validation.PADDING


# Of an input, checked: booleans of the positions, and whether padding stays as it is.
cdef class _Counted:
    cdef cnp.ndarray positions  # of the axes of x but that of the channels, which may be left out
    cdef bint keeps_input
    cdef str name  # of the argument


cdef bint _is_of_positions(value, cnp.ndarray x, Py_ssize_t axis) noexcept:
    """A boolean array with as many axes as x, or one less, each of one element or as many as x."""
    cdef int d, skipped, ndim = cnp.PyArray_NDIM(x)
    cdef cnp.npy_intp size, wanted
    if not cnp.PyArray_CheckExact(value) or cnp.PyArray_TYPE(<cnp.ndarray>value) != cnp.NPY_BOOL:
        return False
    skipped = ndim - cnp.PyArray_NDIM(<cnp.ndarray>value)
    if not 0 <= skipped <= 1:
        return False
    for d in range(ndim):
        wanted = 1 if d == axis else cnp.PyArray_DIM(x, d)
        if d == axis and skipped:
            continue
        size = cnp.PyArray_DIM(<cnp.ndarray>value, d - (skipped if d > axis else 0))
        if size != 1 and size != wanted:
            return False
    return True


cdef _Counted _counted(masked, cnp.ndarray x, Py_ssize_t axis):
    """What these arguments say of x; None for all."""
    cdef _Counted counted
    if masked is None:
        return None
    mask, lengths, padding = <tuple>masked
    if mask is None and lengths is None and padding is _ZEROS:
        return None
    _validation.choice("padding", padding, _validation.PADDING)
    if mask is None and lengths is None:
        return None
    if mask is not None and lengths is not None:
        _validation.mask_or_lengths()
    counted = _Counted.__new__(_Counted)
    counted.keeps_input = padding == _INPUT
    if cnp.PyArray_NDIM(x) < 2:
        return None  # no channels, no values
    if mask is None:
        counted.name, counted.positions = "lengths", _validation.within_lengths(lengths, x, axis)
    elif _is_of_positions(mask, x, axis):
        counted.name, counted.positions = "mask", mask
    else:
        counted.name, counted.positions = "mask", _validation.positions("mask", mask, x, axis)
    return counted


cdef cnp.npy_intp _stride_of_positions(
    _Counted counted, cnp.ndarray x, Py_ssize_t axis, int d
) noexcept:
    """From one index of an axis of x, which is not that of the channels, to the next."""
    cdef int skipped = cnp.PyArray_NDIM(x) - cnp.PyArray_NDIM(counted.positions)
    d -= skipped if d > axis else 0
    if cnp.PyArray_DIM(counted.positions, d) == 1:
        return 0
    return cnp.PyArray_STRIDE(counted.positions, d)


cdef _core.Mask _mask_of(
    _Counted counted, cnp.ndarray x, Py_ssize_t axis, Reduction over, Plan plan,
    bint own_statistics
):
    """The mask of a plan, None for all values; of its own statistics some value must count."""
    cdef bn_given_mask given
    cdef _core.Mask mask
    if counted is None:
        return None
    given.data = <const unsigned char *>cnp.PyArray_DATA(counted.positions)
    given.repeat_stride = _stride_of_positions(counted, x, axis, 0) if over.per_sample else 0
    given.axes = 0
    for d in plan.walked:
        given.sizes[given.axes] = <size_t>cnp.PyArray_DIM(x, <int>d)
        given.strides[given.axes] = _stride_of_positions(counted, x, axis, <int>d)
        given.axes += 1
    mask = _core.new_mask(plan, &given, counted.keeps_input)
    if own_statistics and mask is not None and mask.count == 0:
        _validation.nothing_counts(counted.name)
    return mask


cdef int _enough_masked_values(
    _Counted counted, Reduction over, Plan plan, _core.Mask mask, Py_ssize_t per_group,
    bint unbiased
) except -1:
    """Raise where an unbiased variance that is tracked would be of a single value."""
    cdef size_t repeat
    for repeat in range(plan.c.repeats):
        if unbiased and mask.c.total[repeat] == 1 and per_group == 1:
            what = "channel of each sample" if over.per_sample else "channel"
            raise ValueError(
                f"{counted.name} must leave more than one value per {what} for an unbiased "
                "variance, got one"
            )
    return 0


cdef object _also_read(reads, masked, _Counted counted):
    """Arguments by name that the output shares no memory with, and what counts: None for none."""
    if counted is None:
        return reads
    mask, lengths, _ = <tuple>masked
    named = {counted.name: lengths if mask is None else mask}
    return named if reads is None else {**reads, **named}


cdef cnp.ndarray _without_padding(cnp.ndarray dy, _Counted counted, Py_ssize_t axis):
    """A copy that is 0 where values do not count."""
    made = numpy.zeros_like(dy)
    positions = counted.positions
    if cnp.PyArray_NDIM(counted.positions) < cnp.PyArray_NDIM(dy):
        positions = numpy.expand_dims(positions, axis)
    numpy.copyto(made, dy, where=positions)
    return made
