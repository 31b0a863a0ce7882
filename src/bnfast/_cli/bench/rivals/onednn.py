"""oneDNN itself, through its C API: plain layouts, and the one that it was made for."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float
from typing import Any, NamedTuple

import numpy as np

from bnfast._cli.bench.cell import EPS, Batch, Cell
from bnfast._cli.bench.rivals import Contender, NotOffered, Rival
from bnfast._cli.bench.rivals.onednn_library import (
    AROUND_ZERO,
    BACKWARD,
    DIFF_DST,
    DIFF_SCALE,
    DIFF_SHIFT,
    DIFF_SRC,
    DST,
    FORWARD_INFERENCE,
    FORWARD_TRAINING,
    FUSE_RELU,
    MEAN,
    QUERY_IMPLEMENTATION,
    QUERY_WORKSPACE,
    SCALE,
    SHIFT,
    SRC,
    USE_GLOBAL_STATS,
    USE_SCALE,
    USE_SHIFT,
    VARIANCE,
    WORKSPACE,
    Unimplemented,
    Work,
    arguments_of,
    library,
)
from bnfast._typing import Array


class Kind(NamedTuple):
    """What its primitive for a normalization is called, and is told beside its data."""

    name: str
    shape: tuple[int, ...]  # of the data
    last: int | None  # the axis of neighbours, where it is not the last
    more: tuple[Any, ...] = ()
    flags: int = USE_SCALE | USE_SHIFT


# The primitives of the normalizations.
PRIMITIVES = {
    "batch": "batch_normalization",
    "batch-relu": "batch_normalization",
    "layer": "layer_normalization",
    "rms": "layer_normalization",
    "group": "group_normalization",
    "instance": "group_normalization",
}


def _kind(cell: Cell[Batch], work: Work) -> Kind:
    b = cell.data
    name = PRIMITIVES[cell.normalization]
    if name == "layer_normalization":
        if len(b.shape) > 5:
            raise NotOffered("no more than five dimensions")
        around_zero = cell.normalization == "rms"
        # Its gradient, up to 3.13 at least, subtracts a mean of dy * weight too: see its error.
        if around_zero and library().version < (3, 9):
            raise NotOffered("RMS norm came with 3.9")
        statistics = work.described(b.mean.shape, None)
        flags = USE_SCALE | (AROUND_ZERO if around_zero else USE_SHIFT)
        return Kind(name, b.shape, None, (statistics,), flags)
    n, c, *plane = b.shape
    if len(plane) > 2:
        raise NotOffered("only NCHW and NHWC are driven here")
    shape, last = (n, c, *(*plane, 1, 1)[:2]), None if b.axis == 1 else 1
    if name == "batch_normalization":
        fuses = FUSE_RELU if cell.normalization == "batch-relu" else 0
        return Kind(name, shape, last, flags=USE_SCALE | USE_SHIFT | fuses)
    if "group" not in library().normalizations:
        raise NotOffered("group norm came with 3.3")
    return Kind(name, shape, last, (b.num_groups,))


class OneDnn(Rival):
    """Its primitives on the cell's own memory."""

    blocked = False

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        library().set_threads(threads)

    @property
    def version(self) -> str:
        """What is measured."""
        return ".".join(map(str, library().version))

    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return the execution of a primitive."""
        try:
            return self._prepare(cell, fresh)
        except Unimplemented as error:
            raise NotOffered(f"{error}: no {cell.data.dtype} on this machine") from None

    def _prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        if cell.normalization not in PRIMITIVES:
            raise NotOffered("it has no such primitive")
        b: Batch = cell.data
        if b.dtype == np.float64:
            raise NotOffered("no float64")
        if self.blocked and PRIMITIVES[cell.normalization] != "batch_normalization":
            raise NotOffered("batch norm alone is driven in blocks")
        work = Work()
        kind = _kind(cell, work)
        shape = kind.shape
        if kind.name == "batch_normalization" and shape[2:] == (1, 1) and not self.blocked:
            shape = shape[:2]  # as NCHW this would get the kernels for planes, 30 times as slow
        plain = work.described(shape, kind.last, b.dtype.name)
        layout = work.blocked(shape, b.dtype.name) if self.blocked else plain
        size = library().c.dnnl_memory_desc_get_size(layout) // b.dtype.itemsize

        def own(array: Array) -> Array:
            """Return the array in the layout of the primitive."""
            if not self.blocked:
                return array
            other = b.empty((size,))
            work.reorder((plain, array), (layout, other))
            return other

        x = own(b.x)
        out = own(b.out)
        used = {SCALE: b.weight, SHIFT: b.bias, MEAN: b.mean, VARIANCE: b.var}
        engine, flags = library().engine, kind.flags
        if cell.operation == "inference":
            flags |= USE_GLOBAL_STATS
            direction = FORWARD_INFERENCE
        else:
            direction = FORWARD_TRAINING
        rest = *kind.more, c_float(EPS), flags
        primitive, description = work.primitive(
            f"{kind.name}_forward", engine, direction, layout, layout, *rest, None
        )
        data, output = {SRC: x}, DST
        told = []  # which outputs were 0: forward says it to backward
        if flags & FUSE_RELU and direction == FORWARD_TRAINING:
            query = library().c.dnnl_primitive_desc_query_md
            zeros = ctypes.c_void_p(query(description, QUERY_WORKSPACE, 0))
            of_zeros = np.zeros(library().c.dnnl_memory_desc_get_size(zeros), np.uint8)
            told = [(WORKSPACE, work.memory(zeros, of_zeros))]
            if cell.operation == "backward":
                statistics = {MEAN: np.empty_like(b.mean), VARIANCE: np.empty_like(b.var)}
                before = {SCALE: b.weight, SHIFT: b.bias, **statistics}
                work.run(
                    primitive,
                    arguments_of(
                        (
                            *((i, work.memory(layout, a)) for i, a in ((SRC, x), (DST, out))),
                            *(
                                (i, work.memory(work.described(a.shape, None), a))
                                for i, a in before.items()
                            ),
                            *told,
                        )
                    ),
                )
        if cell.operation in ("training", "forward"):
            used |= {MEAN: np.empty_like(b.mean), VARIANCE: np.empty_like(b.var)}
        elif cell.operation == "backward":
            primitive, description = work.primitive(
                *(f"{kind.name}_backward", engine, BACKWARD, layout, layout, layout),
                *(*rest, description, None),
            )
            used |= {DIFF_SCALE: np.empty_like(b.weight), DIFF_SHIFT: np.empty_like(b.bias)}
            data, output = {SRC: x, DIFF_DST: own(b.dy)}, DIFF_SRC
            if kind.name == "batch_normalization":
                del used[SHIFT]  # the others insist on it
        if flags & AROUND_ZERO:
            for index in (MEAN, SHIFT, DIFF_SHIFT):
                used.pop(index, None)
        target = work.memory(layout, out)
        arguments = arguments_of(
            (
                *((index, work.memory(layout, array)) for index, array in data.items()),
                *(
                    (index, work.memory(work.described(array.shape, None), array))
                    for index, array in used.items()
                ),
                (output, target),
                *told,
            )
        )
        set_handle = library().c.dnnl_memory_set_data_handle
        kept = data, used, told and of_zeros  # by the call, as long as it may be made

        def call(kept: Any = kept) -> Array:
            y = out
            if fresh:  # there is no other way with oneDNN than to be given memory
                y = b.empty(out.shape)
                set_handle(target, y.ctypes.data)
            work.run(primitive, arguments)
            return y

        def read(y: Array) -> Array:
            if not self.blocked:
                return y.reshape(b.x.shape)
            result = np.empty_like(b.x)
            work.reorder((layout, y), (plain, result))
            return result

        name = ctypes.c_char_p()
        library().call("primitive_desc_query", description, QUERY_IMPLEMENTATION, 0, byref(name))
        return Contender(call, read, own_output=False, note=(name.value or b"").decode())


class OneDnnBlocked(OneDnn):
    """In blocks of channels, which its convolutions use; nothing is said of the way there."""

    blocked = True
