"""How the statistics of a layer's output depend on its weights: of a linear or convolutional layer.

By NumPy's matrix products, as in `_whitening`: outputs and inputs are copied to float64 piece by
piece, so that no temporary is as large as either, and the BLAS decides the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from bnfast import _validation
from bnfast._typing import Array

# A piece has PIECE_BYTES of float64: enough for the BLAS to be fast, few enough for the caches.
# With many channels a piece is larger: it then has POSITIONS_OF_A_CHANNEL for each channel, so that
# adding up the products costs little beside making them. But no piece is larger than the batch
# divided by FEWEST_PIECES, unless that is less than PIECE_BYTES.
PIECE_BYTES = 2 << 20
POSITIONS_OF_A_CHANNEL = 4
FEWEST_PIECES = 16


class Convolution(NamedTuple):
    """A layer, one value for each spatial axis; a linear one has a kernel of one position."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Piece(NamedTuple):
    """Samples, and positions along each spatial axis of the output."""

    samples: slice
    positions: tuple[slice, ...]


def convolution(
    x: Array,
    axis: int,
    inputs: Array,
    filters: Array,
    stride: object,
    padding: object,
    dilation: object,
    groups: object,
) -> Convolution:
    """Return the layer that makes x of the inputs with these filters, or refuse what cannot."""
    spatial = x.ndim - 2
    if filters.ndim not in (2, x.ndim):
        raise ValueError(
            f"filters must have 2 dimensions, those of a linear layer, or {x.ndim}, as x has, "
            f"got shape {filters.shape}"
        )
    kernel = filters.shape[2:] if filters.ndim == x.ndim else (1,) * spatial
    steps = _of_each_axis("stride", stride, spatial, 1)
    pads = _of_each_axis("padding", padding, spatial, 0)
    spacings = _of_each_axis("dilation", dilation, spatial, 1)
    parts = _validation.integer_from("groups", groups, 1)
    if len(filters) != x.shape[axis]:
        raise ValueError(
            f"filters must have one filter for each of the {x.shape[axis]} channels of x, got "
            f"shape {filters.shape}"
        )
    if len(filters) % parts:
        raise ValueError(f"groups must divide the {len(filters)} filters, got {parts}")
    if inputs.ndim != x.ndim or inputs.shape[axis] != filters.shape[1] * parts:
        raise ValueError(
            f"inputs must have {x.ndim} dimensions, and {filters.shape[1] * parts} channels along "
            f"axis {axis}, got shape {inputs.shape}"
        )
    sizes = np.moveaxis(inputs, axis, 1).shape
    made = tuple(
        (size + 2 * pad - spacing * (length - 1) - 1) // step + 1
        for size, length, step, pad, spacing in zip(
            sizes[2:], kernel, steps, pads, spacings, strict=True
        )
    )
    expected = np.moveaxis(x, axis, 1).shape
    if (sizes[0], *made) != (expected[0], *expected[2:]):
        raise ValueError(
            f"inputs must be what x, of shape {x.shape}, is made of: filters of shape "
            f"{filters.shape} make {(sizes[0], *made)} samples and positions of inputs of shape "
            f"{inputs.shape}"
        )
    return Convolution(kernel, steps, pads, spacings, parts)


def _of_each_axis(name: str, value: object, axes: int, least: int) -> tuple[int, ...]:
    numbers = _validation.integers_from(name, value, least)
    if len(numbers) == 1:
        numbers *= axes
    if len(numbers) != axes:
        raise ValueError(f"{name} must be one integer, or {axes} of them, got {value}")
    return numbers


def derivatives(
    x: Array, axis: int, mean: Array, inputs: Array, filters: Array, layer: Convolution
) -> tuple[Array, Array]:
    """Return those of the mean and of the variance of x, float64, of the shape of the filters.

    Each is that of a channel by the weights of its own filter. x must not be empty.
    """
    outputs, sources = np.moveaxis(x, axis, 1), np.moveaxis(inputs, axis, 1)
    if x.ndim == 2:
        outputs, sources = outputs[..., None], sources[..., None]
        layer = Convolution((1,), (1,), (0,), (1,), layer.groups)
    channels, inner = filters.shape[:2]
    sums = np.zeros((layer.groups, inner, *layer.kernel))
    products = np.zeros((channels, inner, *layer.kernel))
    centre = mean.reshape(-1, *(1,) * (outputs.ndim - 1))
    for piece in _pieces(outputs.shape, sources.shape[1]):
        output = outputs[(piece.samples, slice(None), *piece.positions)].swapaxes(0, 1)
        centred = np.subtract(output, centre, out=np.empty(output.shape))
        rows = centred.reshape(layer.groups, -1, output[0].size)
        source = np.empty((sources.shape[1], *output.shape[1:]))
        columns = source.reshape(layer.groups, inner, -1)
        for offset in np.ndindex(layer.kernel):
            _take(source, sources, piece, offset, layer)
            at = (slice(None), slice(None), *offset)
            sums[at] += columns.sum(2)
            products[at] += (rows @ columns.swapaxes(1, 2)).reshape(channels, inner)
    count = x.size // channels
    dmean = np.repeat(sums / count, channels // layer.groups, axis=0)
    return dmean.reshape(filters.shape), (2.0 / count * products).reshape(filters.shape)


def _pieces(shape: tuple[int, ...], inner: int) -> Iterator[_Piece]:
    """Cut outputs (N, C, ...): some samples, or part of the first spatial axis of one of them."""
    samples, channels, first_size, *others = shape
    positions = first_size * math.prod(others)  # of a sample
    wanted = min(
        POSITIONS_OF_A_CHANNEL * max(channels, inner), samples * positions // FEWEST_PIECES
    )
    largest = max(PIECE_BYTES // (8 * (channels + inner)), wanted, 1)
    together = max(largest // positions, 1)
    length = first_size if largest >= positions else max(largest // math.prod(others), 1)
    whole = [slice(0, size) for size in others]
    for n in range(0, samples, together):
        for start in range(0, first_size, length):
            part = slice(start, min(start + length, first_size))
            yield _Piece(slice(n, min(n + together, samples)), (part, *whole))


def _take(
    source: Array, sources: Array, piece: _Piece, offset: tuple[int, ...], layer: Convolution
) -> None:
    """Write what one weight of a filter is multiplied by at each position; 0 in the padding."""
    written, read = [], []
    for axis, positions in enumerate(piece.positions):
        step, size = layer.stride[axis], sources.shape[2 + axis]
        of_first = offset[axis] * layer.dilation[axis] - layer.padding[axis]
        first = max(positions.start, -(of_first // step))
        count = max(min(positions.stop, (size - 1 - of_first) // step + 1) - first, 0)
        begin = first * step + of_first
        written.append(slice(first - positions.start, first - positions.start + count))
        read.append(slice(begin, begin + count * step, step))
    taken = sources[(piece.samples, slice(None), *read)].swapaxes(0, 1)
    if taken.size < source.size:
        source.fill(0.0)
    source[(slice(None), slice(None), *written)] = taken
