# What evaluation has prepared from call to call, for _core.pyx.

cdef size_t _OUTPUT_COEFFICIENTS = bin(BN_OUTPUT_COEFFICIENTS).count("1")


cdef class _Prepared:
    """Copies of parameters and statistics, and the coefficients made of them; immutable."""

    def __cinit__(self, Plan plan, weight, bias, double eps, mean, variance):
        cdef bn_plan *c = &plan.c
        cdef _Workspace arrays
        cdef size_t bytes_ = _OUTPUT_COEFFICIENTS * _padded(_coefficient_bytes(c)) + 64
        self.weight, self.bias = _copied(weight), _copied(bias)
        self.mean, self.variance = _copied(mean), _copied(variance)
        self.invstd = _empty_channels(<Py_ssize_t>c.channels, cnp.NPY_FLOAT64)
        self.eps, self.dtype, self.length = eps, c.dtype, bn_coefficients_length(c)
        self.memory = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>bytes_)
        arrays = _begin(<char *>self.memory, bytes_)
        _take_coefficients(&arrays, c, BN_OUTPUT_COEFFICIENTS, &self.coefficients)

    cdef bint is_of(self, Plan plan, weight, bias, double eps, mean, variance) noexcept:
        cdef bn_plan *c = &plan.c
        return (
            self.dtype == c.dtype
            and self.length == bn_coefficients_length(c)
            and self.eps == eps
            and _is_same(self.mean, mean)
            and _is_same(self.variance, variance)
            and _is_same(self.weight, weight)
            and _is_same(self.bias, bias)
        )


cdef inline cnp.ndarray _empty_channels(Py_ssize_t channels, int kind):
    cdef cnp.npy_intp size = channels
    return cnp.PyArray_EMPTY(1, &size, kind, 0)


cdef object _copied(array):
    return None if array is None else cnp.PyArray_NewCopy(array, cnp.NPY_CORDER)


cdef inline bint _is_same(saved, current) noexcept:
    """Two plain arrays of the same bytes and dtype, or None twice."""
    if saved is None or current is None:
        return saved is current
    cdef cnp.ndarray a = saved, b = current
    return (
        cnp.PyArray_TYPE(a) == cnp.PyArray_TYPE(b)
        and cnp.PyArray_NBYTES(a) == cnp.PyArray_NBYTES(b)
        and memcmp(_data(a), _data(b), <size_t>cnp.PyArray_NBYTES(a)) == 0
    )


cdef class Evaluation:
    """What `scale_shift` has prepared, for as long as parameters and statistics stay the same.

    They may be changed in place: each call compares them with copies, which costs far less than to
    prepare them again.
    """

    @property
    def saved(self):
        """(mean, invstd, weight) of the last call, never written again; None before the first."""
        cdef _Prepared prepared
        with cython.critical_section(self):
            prepared = self.prepared
        return None if prepared is None else (prepared.mean, prepared.invstd, prepared.weight)

    def __reduce__(self):
        return Evaluation, ()
