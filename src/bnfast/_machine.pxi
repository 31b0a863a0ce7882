# What was built and what runs here, for _core.pyx: instruction sets, caches, float mode, OpenMP.

HAS_OPENMP = bn_openmp_version() > 0
SERIAL_BYTES = BN_SERIAL_BYTES
BYTES_PER_THREAD = BN_BYTES_PER_THREAD

# Set once at import by _configuration, before anything can run; use_isa is for tests only.
cdef const bn_kernels *active = bn_built_kernels(0)

cdef bn_caches caches = bn_cache_sizes()


def built_isas():
    """Return ``{name: flags}`` of the variants in this build, best first."""
    cdef size_t index = 0
    built = {}
    while bn_built_kernels(index) is not NULL:
        built[bn_built_kernels(index).isa.decode()] = bn_built_kernels(index).flags.decode()
        index += 1
    return built


def available_isas():
    """Return the names of the variants that this machine can run, best first."""
    return tuple(isa for index, isa in enumerate(built_isas()) if bn_runs_here(index))


def active_isa():
    """Return the name of the variant in use."""
    return active.isa.decode()


def activate(isa):
    """Use the variant called `isa`; it must be one of `available_isas`."""
    global active
    names = list(built_isas())
    if isa not in available_isas():
        raise ValueError(f"isa must be one of {available_isas()}, got {isa!r}")
    active = bn_built_kernels(<size_t>names.index(isa))


def cache_sizes():
    """Return the bytes of the second and of the last level of cache that schedules go by."""
    return caches.level2, caches.last_level


def assume_cache_sizes(size_t level2, size_t last_level):
    """Go by other sizes of the caches: for tests, which make all schedules run on any machine."""
    caches.level2, caches.last_level = level2, last_level


GuardedFunction = bn_new_guarded_function_type()  # see _float_mode


def float_mode():
    """Return this thread's float mode, as its control register says it; 0 where that is unknown."""
    return bn_read_float_mode() & BN_MODE_BITS


def assume_float_mode(bn_float_mode mode):
    """Write that register: for tests, which call from any mode."""
    bn_write_float_mode(mode)


def kernel_names():
    """Return the name of every kernel that each variant has."""
    cdef size_t index = 0
    names = []
    while bn_kernel_name(index) is not NULL:
        names.append(bn_kernel_name(index).decode())
        index += 1
    return tuple(names)


bn_mark_forked_children()


def is_forked_child():
    """Return whether this process was forked, by Python or not, after bnfast had been imported."""
    return bn_is_forked_child()


def allowed_processors():
    """Return how many processors this thread may run on, now; 0 where the system does not say."""
    return bn_allowed_processors()


def openmp_max_threads():
    """Return OpenMP's own thread setting, read now; 1 without OpenMP."""
    return bn_openmp_max_threads()


def startable_threads(int wanted):
    """Return how many of so many threads the system lets this thread's team have."""
    return bn_startable_threads(wanted)


def team_was_late():
    """Return whether this thread had better work alone for now: its team made calls longer."""
    return bn_team_was_late()


def build_facts():
    """Return the compiler, the OpenMP version (0 without) and the OpenMP library in use."""
    library = bn_openmp_library()
    return {
        "compiler": bn_compiler().decode(),
        "openmp_version": bn_openmp_version(),
        "openmp_library": None if library is NULL else library.decode(),
    }


def probe_memory(kind, x, y, int threads):
    """Read and write whole cache lines and compute nothing: for benchmarks.

    `x` and `y` begin at cache lines and are as large; "copy" and "streaming_copy" read x and write
    y, "read" reads x, "in_place" changes the sign of y.
    """
    cdef bn_memory_probe *probe
    cdef cnp.ndarray source = x, target = y
    cdef Py_ssize_t lines = cnp.PyArray_NBYTES(source) // 64, part
    cdef float *start = <float *>cnp.PyArray_DATA(source)
    cdef float *to = <float *>cnp.PyArray_DATA(target)
    if kind == "copy":
        probe = active.probe_copy
    elif kind == "streaming_copy":
        probe = active.probe_streaming_copy
    elif kind == "read":
        probe = active.probe_read
    elif kind == "in_place":
        probe = active.probe_in_place
    else:
        raise ValueError(f"no such probe: {kind!r}")
    if (<uintptr_t>start | <uintptr_t>to) % 64 or source.nbytes != target.nbytes:
        raise ValueError("x and y must begin at cache lines and be as large")
    with nogil:
        if threads == 1:
            probe(<size_t>lines, start, to)
        else:
            for part in prange(threads, num_threads=threads, schedule="static"):
                probe(<size_t>((part + 1) * lines // threads - part * lines // threads),
                      start + 16 * (part * lines // threads), to + 16 * (part * lines // threads))
