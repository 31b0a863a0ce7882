"""The same values in memory of many kinds, within guards that must stay as they are."""

from __future__ import annotations

import array
import math
from typing import Any, NamedTuple

import numpy as np

GUARD = 0xA5  # what the memory around the values is full of


class Tagged(np.ndarray):
    """A subclass, as users have them."""


class Buffer(NamedTuple):
    """What is given to a call, the array that sees its values, and all the memory it lies in."""

    given: Any
    view: np.ndarray
    memory: np.ndarray
    kind: str

    def snapshot(self) -> bytes:
        return self.memory.tobytes()


def _in_memory(
    values: np.ndarray, order: tuple[int, ...], steps: tuple[int, ...], shift: int
) -> tuple[np.ndarray, np.ndarray]:
    """A view whose axes lie in this order, the slowest first, with these steps, and its memory."""
    item, strides, reach = values.itemsize, [0] * values.ndim, values.itemsize
    for d in reversed(order):
        strides[d] = reach * steps[d]
        reach *= max(abs(steps[d]) * values.shape[d], 1)
    ends = [(n - 1) * s for n, s in zip(values.shape, strides, strict=True) if n > 1]
    low, high = (sum(f(e, 0) for e in ends) for f in (min, max))
    before = 64 + shift
    memory = np.full(before + high - low + item + 64, GUARD, np.uint8)
    view = np.ndarray(values.shape, values.dtype, memory, before - low, strides)
    view[...] = values
    return view, memory


def contiguous(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return _in_memory(values, tuple(range(values.ndim)), (1,) * values.ndim, 0)


def exact(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Memory of its own, that ends where the values do: sanitizers see what goes beyond."""
    own = np.array(values, order="C")
    return own, own.reshape(-1).view(np.uint8) if own.ndim else own


def permuted(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    order = tuple(int(d) for d in rng.permutation(values.ndim))
    return _in_memory(values, order, (1,) * values.ndim, 0)


def channels_last(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    order = tuple(range(values.ndim))
    order = (order[0], *order[2:], 1) if values.ndim > 2 else order[::-1]
    return _in_memory(values, order, (1,) * values.ndim, 0)


def fortran(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return _in_memory(values, tuple(range(values.ndim))[::-1], (1,) * values.ndim, 0)


def stepped(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    steps = tuple(int(s) for s in rng.integers(1, 4, values.ndim))
    return _in_memory(values, tuple(range(values.ndim)), steps, 0)


def negative(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    steps = tuple(int(s) for s in rng.choice([-2, -1, 1], values.ndim))
    order = tuple(int(d) for d in rng.permutation(values.ndim))
    return _in_memory(values, order, steps, 0)


def offset(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shift = values.itemsize * int(rng.integers(1, 16))
    return _in_memory(values, tuple(range(values.ndim)), (1,) * values.ndim, shift)


def unaligned(values: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    shift = int(rng.integers(1, max(values.itemsize, 2)))
    order = tuple(int(d) for d in rng.permutation(values.ndim))
    return _in_memory(values, order, (1,) * values.ndim, shift)


# Where results may be written, too.
WRITABLE = {
    function.__name__: function
    for function in (
        *(contiguous, exact, permuted, channels_last, fortran, stepped, negative, offset),
        unaligned,
    )
}


def _read_only(view: np.ndarray) -> np.ndarray:
    view = view.view()
    view.flags.writeable = False
    return view


# What only reads may be given, made of a view; None where that cannot be.
def _memoryview(view: np.ndarray) -> Any:
    return memoryview(view) if view.flags.aligned and view.dtype.kind in "fbiu" else None


def _list(view: np.ndarray) -> Any:
    return view.tolist() if view.dtype in (np.float64, bool) and view.size else None


def _array(view: np.ndarray) -> Any:
    has_type = view.dtype.char in array.typecodes
    return array.array(view.dtype.char, view.tolist()) if view.ndim == 1 and has_type else None


READ = {
    "read-only": _read_only,
    "subclass": lambda view: view.view(Tagged),
    "memoryview": _memoryview,
    "list": _list,
    "array.array": _array,
}


def _broadcast(values: np.ndarray, rng: np.random.Generator) -> Buffer | None:
    """A view with a stride of 0, along an axis where all is equal."""
    for d in rng.permutation(values.ndim):
        first = values.take([0], d) if values.shape[d] > 1 else None
        if first is not None and np.array_equal(np.broadcast_to(first, values.shape), values):
            kept, memory = contiguous(first, rng)
            view = np.lib.stride_tricks.as_strided(
                kept, values.shape, [0 if k == d else s for k, s in enumerate(kept.strides)]
            )
            return Buffer(view, view, memory, "broadcast")
    return None


def to_read(values: np.ndarray, rng: np.random.Generator, plain: bool) -> Buffer:
    """Values as an argument that is read: an array as most are, unless anything will do."""
    if plain:
        view, memory = contiguous(values, rng)
        return Buffer(view, view, memory, "contiguous")
    broadcast = _broadcast(values, rng) if rng.random() < 0.5 else None
    if broadcast is not None:
        return broadcast
    name = str(rng.choice(list(WRITABLE)))
    view, memory = WRITABLE[name](values, rng)
    if rng.random() < 0.2:
        how = str(rng.choice(list(READ)))
        given = READ[how](view)
        if given is not None:
            return Buffer(given, view, memory, f"{name} {how}")
    return Buffer(view, view, memory, name)


def to_write(values: np.ndarray, rng: np.random.Generator, plain: bool) -> Buffer:
    """Values in memory that may be written: of `out`, or of running statistics."""
    name = "contiguous" if plain else str(rng.choice(list(WRITABLE)))
    view, memory = WRITABLE[name](values, rng)
    if not plain and rng.random() < 0.1:
        return Buffer(view.view(Tagged), view, memory, f"{name} subclass")
    return Buffer(view, view, memory, name)


def copied(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A copy of a wider dtype or the same: with these strides in elements, aligned or not."""
    factor = dtype.itemsize // view.itemsize
    strides = [factor * stride for stride in view.strides]
    ends = [(n - 1) * s for n, s in zip(view.shape, strides, strict=True) if n > 1]
    low, high = (sum(f(e, 0) for e in ends) for f in (min, max))
    shift = 0 if view.flags.aligned else 1
    memory = np.zeros(shift + high - low + dtype.itemsize, np.uint8)
    copy = np.ndarray(view.shape, dtype, memory, shift - low, strides)
    copy[...] = view
    return copy


def widened(view: np.ndarray) -> np.ndarray:
    """A float32 copy of values of 16 bits."""
    return copied(view, np.dtype(np.float32))


def shifted(buffer: Buffer, rng: np.random.Generator) -> np.ndarray | None:
    """An array like a buffer's view that shares some of its memory, or None."""
    view = buffer.view
    if view.size < 2 or 0 in view.strides:
        return None
    if rng.random() < 0.4:
        flips = tuple(
            slice(None, None, -1) if n > 1 and rng.random() < 0.5 else slice(None)
            for n in view.shape
        )
        return view[flips]
    step = view.itemsize * int(rng.integers(1, 4))
    address = view.__array_interface__["data"][0] - buffer.memory.__array_interface__["data"][0]
    ends = [(n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)]
    low, high = (address + sum(f(e, 0) for e in ends) for f in (min, max))
    for move in (step, -step):
        if 0 <= low + move and high + move + view.itemsize <= len(buffer.memory):
            return np.ndarray(view.shape, view.dtype, buffer.memory, address + move, view.strides)
    return None


def written(buffer: Buffer, before: bytes, values: np.ndarray) -> bytes:
    """What the memory is like where only the values of the view were written."""
    memory = np.frombuffer(bytearray(before), np.uint8)
    view = buffer.view
    start = view.__array_interface__["data"][0] - buffer.memory.__array_interface__["data"][0]
    target = np.ndarray(view.shape, view.dtype, memory, start, view.strides)
    if math.prod(view.shape):
        target[...] = values
    return memory.tobytes()


def described(value: Any, buffer: Buffer | None = None) -> str:
    """Shape, dtype and strides, for a message."""
    if buffer is not None:
        view = buffer.view
        return f"<{view.dtype} {view.shape}, {buffer.kind}, strides {view.strides}>"
    if isinstance(value, np.ndarray):
        return f"<{value.dtype} {value.shape}>"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(described, value))}]"
    return repr(value)
