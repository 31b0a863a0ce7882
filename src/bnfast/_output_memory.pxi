# The memory of outputs, for _core.pyx: where it begins, and who has it next.

cdef enum:
    MOST_AXES = 64  # of NumPy's arrays

# The memory of smaller outputs is not kept: the system has their pages ready.
cdef size_t _POOLED_BYTES = 4 << 20

cdef PyDataMem_Handler _pool_handler, _line_handler
memset(&_pool_handler, 0, sizeof(_pool_handler))
strcpy(_pool_handler.name, b"bnfast_outputs")
_pool_handler.version = 1
_pool_handler.allocator.malloc = bn_output_malloc
_pool_handler.allocator.calloc = bn_output_calloc
_pool_handler.allocator.realloc = bn_output_realloc
_pool_handler.allocator.free = bn_output_free
memset(&_line_handler, 0, sizeof(_line_handler))
strcpy(_line_handler.name, b"bnfast_small_outputs")
_line_handler.version = 1
_line_handler.allocator.malloc = bn_line_malloc
_line_handler.allocator.calloc = bn_line_calloc
_line_handler.allocator.realloc = bn_line_realloc
_line_handler.allocator.free = bn_line_free

cdef unsigned int _traced = numpy.lib.tracemalloc_domain
cdef object _pool_capsule = PyCapsule_New(&_pool_handler, b"mem_handler", NULL)
cdef object _line_capsule = PyCapsule_New(&_line_handler, b"mem_handler", NULL)


def limit_output_pool(size_t bytes_):
    """Keep at most so many bytes of the memory that large outputs leave."""
    bn_limit_output_pool(bytes_)


def output_pool_bytes():
    """Return how many bytes are kept now."""
    return bn_output_pool_bytes()


cpdef cnp.ndarray empty_output(cnp.ndarray x):
    """Return a new array laid out like x, as `numpy.empty_like`, that begins at a cache line.

    The array owns its memory, which another large output may have left; NumPy gives it back to the
    allocator it came from (NEP 49). To set that for NumPy's own function would take 0.1 us.
    """
    cdef cnp.npy_intp strides[MOST_AXES]
    cdef cnp.npy_intp *given = NULL
    cdef size_t bytes_ = <size_t>cnp.PyArray_NBYTES(x)
    cdef bint large = bytes_ >= _POOLED_BYTES
    cdef PyDataMemAllocator *allocator = &(_pool_handler if large else _line_handler).allocator
    cdef int flags = cnp.NPY_ARRAY_CARRAY
    cdef void *memory = allocator.malloc(allocator.ctx, bytes_)
    cdef cnp.ndarray array
    if memory is NULL:
        raise MemoryError(f"no memory for an output of {bytes_} bytes")
    if not cnp.PyArray_CHKFLAGS(x, cnp.NPY_ARRAY_C_CONTIGUOUS):
        if cnp.PyArray_CHKFLAGS(x, cnp.NPY_ARRAY_F_CONTIGUOUS):
            flags = cnp.NPY_ARRAY_FARRAY
        else:
            _without_gaps(x, strides)
            given = strides
    try:
        array = cnp.PyArray_New(
            cnp.ndarray, cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), given,
            memory, 0, flags, None
        )
    except BaseException:
        allocator.free(allocator.ctx, memory, bytes_)
        raise
    PyTraceMalloc_Track(_traced, <uintptr_t>memory, bytes_)
    handler = _pool_capsule if large else _line_capsule
    Py_INCREF(handler)
    (<PyArrayObject_fields *>array).mem_handler = <PyObject *>handler
    cnp.PyArray_ENABLEFLAGS(array, cnp.NPY_ARRAY_OWNDATA)
    return array


cdef inline cnp.npy_intp _size(cnp.npy_intp stride) noexcept:
    return -stride if stride < 0 else stride


cdef void _without_gaps(cnp.ndarray x, cnp.npy_intp *strides) noexcept:
    """The strides of an array whose axes follow each other in memory as those of x do."""
    cdef int order[MOST_AXES]
    cdef int axis, place, ndim = cnp.PyArray_NDIM(x)
    cdef cnp.npy_intp step = cnp.PyArray_ITEMSIZE(x)
    for axis in range(ndim):
        place = axis
        while place > 0 and (
            _size(cnp.PyArray_STRIDE(x, order[place - 1])) < _size(cnp.PyArray_STRIDE(x, axis))
        ):
            order[place] = order[place - 1]
            place -= 1
        order[place] = axis
    for place in range(ndim - 1, -1, -1):
        strides[order[place]] = step
        step *= cnp.PyArray_DIM(x, order[place])
