"""What of oneDNN's C API is needed to call its normalizations."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from functools import cache
from importlib import metadata
from typing import Any

from bnfast._typing import Array

# Values of dnnl_types.h and dnnl_common_types.h, version 3.
CPU, IN_ORDER, UNIMPLEMENTED = 1, 1, 3
TYPES = {"float16": 1, "bfloat16": 2, "float32": 3}
FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
USE_GLOBAL_STATS, USE_SCALE, USE_SHIFT, AROUND_ZERO = 1, 2, 4, 0x20  # the last: dnnl_rms_norm
FUSE_RELU = 0x8
SRC, DST, MEAN, VARIANCE, SCALE, SHIFT = 1, 17, 49, 50, 51, 52
DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 129, 145, 255, 256
QUERY_IMPLEMENTATION, QUERY_WORKSPACE, WORKSPACE = 8, 135, 64
ISA_AVX512 = 0x27
BLOCKS_OF_16, BLOCKS_OF_8 = 78, 102  # dnnl_aBcd16b, dnnl_aBcd8b


class Argument(Structure):
    """dnnl_exec_arg_t."""

    _fields_ = (("index", c_int), ("memory", c_void_p))


class Unimplemented(Exception):
    """The library has no such primitive on this machine."""


class Version(Structure):
    """The beginning of dnnl_version_t."""

    _fields_ = (("major", c_int), ("minor", c_int), ("patch", c_int))


def _open_library() -> ctypes.CDLL:
    for file in metadata.files("onednn-cpu-gomp") or ():
        if file.name in ("libdnnl.so.3", "libdnnl.3.dylib"):
            return ctypes.CDLL(str(file.locate()))
    raise OSError("onednn-cpu-gomp is installed, but has no library of version 3")


class Library:
    """The loaded library, an engine and a stream."""

    def __init__(self) -> None:
        self.c = _open_library()
        handle, handles, pointer = c_void_p, POINTER(c_void_p), c_void_p
        descriptor, sizes = c_void_p, POINTER(c_int64)
        # What a normalization is told beside its data: where its statistics lie, how many groups.
        between: dict[str, tuple[Any, ...]] = {"batch": (), "layer": (descriptor,)}
        if hasattr(self.c, "dnnl_group_normalization_forward_primitive_desc_create"):
            between["group"] = (c_int64,)
        self.normalizations = tuple(between)
        for name, arguments in {
            "engine_create": (handles, c_int, c_size_t),
            "stream_create": (handles, handle, c_uint),
            "stream_wait": (handle,),
            "memory_desc_create_with_strides": (handles, c_int, sizes, c_int, sizes),
            "memory_desc_create_with_tag": (handles, c_int, sizes, c_int, c_int),
            "memory_desc_destroy": (descriptor,),
            "memory_create": (handles, descriptor, handle, pointer),
            "memory_set_data_handle": (handle, pointer),
            "memory_destroy": (handle,),
            **{
                f"{kind}_normalization_forward_primitive_desc_create": (
                    *(handles, handle, c_int, descriptor, descriptor, *more),
                    *(c_float, c_uint, handle),
                )
                for kind, more in between.items()
            },
            **{
                f"{kind}_normalization_backward_primitive_desc_create": (
                    *(handles, handle, c_int, descriptor, descriptor, descriptor, *more),
                    *(c_float, c_uint, handle, handle),
                )
                for kind, more in between.items()
            },
            "reorder_primitive_desc_create": (
                *(handles, descriptor, handle, descriptor, handle, handle),
            ),
            "primitive_desc_query": (handle, c_int, c_int, c_void_p),
            "primitive_desc_destroy": (handle,),
            "primitive_create": (handles, handle),
            "primitive_destroy": (handle,),
            "primitive_execute": (handle, handle, c_int, POINTER(Argument)),
        }.items():
            function = getattr(self.c, f"dnnl_{name}")
            function.argtypes = arguments
            function.restype = c_int
        self.c.dnnl_memory_desc_get_size.argtypes = (descriptor,)
        self.c.dnnl_memory_desc_get_size.restype = c_size_t
        self.c.dnnl_primitive_desc_query_md.argtypes = (c_void_p, c_int, c_int)
        self.c.dnnl_primitive_desc_query_md.restype = c_void_p
        self.c.dnnl_version.restype = POINTER(Version)
        self.engine = self.create("engine", CPU, 0)
        self.stream = self.create("stream", self.engine, IN_ORDER)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function, and raise what it reports."""
        status = getattr(self.c, f"dnnl_{name}")(*arguments)
        if status == UNIMPLEMENTED:
            raise Unimplemented(f"dnnl_{name}")
        if status:
            raise RuntimeError(f"dnnl_{name} returned status {status}")

    def create(self, what: str, *arguments: Any) -> c_void_p:
        """Return a new handle of this kind."""
        handle = c_void_p()
        self.call(f"{what}_create", byref(handle), *arguments)
        return handle

    def set_threads(self, threads: int) -> None:
        """Set them in the OpenMP runtime that the library was linked with."""
        self.c.omp_set_num_threads(threads)

    @property
    def version(self) -> tuple[int, int, int]:
        """As the library itself says."""
        v = self.c.dnnl_version().contents
        return v.major, v.minor, v.patch


library = cache(Library)


class Work:
    """The handles of one cell, destroyed with it."""

    def __init__(self) -> None:
        self.library = library()
        self._owned: list[tuple[Any, c_void_p]] = []
        weakref.finalize(self, _destroy, self._owned)

    def own(self, kind: str, handle: c_void_p) -> c_void_p:
        """Keep a handle until the end."""
        self._owned.append((getattr(self.library.c, f"dnnl_{kind}_destroy"), handle))
        return handle

    def described(
        self, shape: tuple[int, ...], last: int | None, dtype: str = "float32"
    ) -> c_void_p:
        """Describe an array by its strides, where the elements along axis `last` are neighbours."""
        order = [d for d in range(len(shape)) if d != last] + ([] if last is None else [last])
        strides, stride = [0] * len(shape), 1
        for d in reversed(order):
            strides[d] = stride
            stride *= shape[d]
        sizes = c_int64 * len(shape)
        arguments = len(shape), sizes(*shape), TYPES[dtype], sizes(*strides)
        handle = c_void_p()
        self.library.call("memory_desc_create_with_strides", byref(handle), *arguments)
        return self.own("memory_desc", handle)

    def blocked(self, shape: tuple[int, ...], dtype: str) -> c_void_p:
        """Describe (N, C, H, W) in blocks of as many channels as a vector of this machine holds."""
        isa = self.library.c.dnnl_get_effective_cpu_isa()
        tag = BLOCKS_OF_16 if isa & ISA_AVX512 == ISA_AVX512 else BLOCKS_OF_8
        handle = c_void_p()
        sizes = (c_int64 * len(shape))(*shape)
        self.library.call(
            "memory_desc_create_with_tag", byref(handle), len(shape), sizes, TYPES[dtype], tag
        )
        return self.own("memory_desc", handle)

    def memory(self, description: c_void_p, array: Array) -> c_void_p:
        """Return an array as oneDNN sees it; the array must be kept."""
        handle = self.library.create("memory", description, self.library.engine, array.ctypes.data)
        return self.own("memory", handle)

    def primitive(self, kind: str, *arguments: Any) -> tuple[c_void_p, c_void_p]:
        """Return a primitive and its description."""
        create = f"{kind}_primitive_desc"
        description = self.own("primitive_desc", self.library.create(create, *arguments))
        return self.own("primitive", self.library.create("primitive", description)), description

    def run(self, primitive: c_void_p, arguments: Any) -> None:
        """Execute and wait."""
        c = self.library.c
        if c.dnnl_primitive_execute(primitive, self.library.stream, len(arguments), arguments):
            raise RuntimeError("dnnl_primitive_execute failed")
        c.dnnl_stream_wait(self.library.stream)

    def reorder(self, source: tuple[c_void_p, Array], target: tuple[c_void_p, Array]) -> None:
        """Copy from one layout to another."""
        engine = self.library.engine
        primitive, _ = self.primitive("reorder", source[0], engine, target[0], engine, None)
        memories = self.memory(*source), self.memory(*target)
        self.run(primitive, arguments_of(zip((SRC, DST), memories, strict=True)))


def _destroy(owned: list[tuple[Any, c_void_p]]) -> None:
    for destroy, handle in reversed(owned):
        destroy(handle)


def arguments_of(pairs: Iterable[tuple[int, c_void_p]]) -> Any:
    """Return an array of dnnl_exec_arg_t."""
    arguments = [Argument(index, memory) for index, memory in pairs]
    return (Argument * len(arguments))(*arguments)
