"""Moving average batch normalization on arrays: its two passes, and where their averages are kept.

As in `_primitives`, each validates first, and writes nothing before everything has been checked.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bnfast import _primitives, _validation
from bnfast._primitives import Reduction
from bnfast._typing import Array

# Of each channel the inverse root mean square, and how far it is corrected; the row of the batch,
# and whether it was averaged with the others.
Saved: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64], int, bool]

_AROUND_0 = Reduction(centred=False, any_eps=False)


def normalize(
    x: object,
    running_var: object,
    square_buffer: object,
    weight: object,
    bias: object,
    momentum: object,
    eps: object,
    row: object,
    averaged: object,
    r_max: object,
    axis: object,
    out: object,
    tracks: bool = True,
) -> tuple[Array, Saved]:
    """Return y, and what its gradient needs; keep the mean squares.

    A batch that it does not track leaves `running_var` and `square_buffer` as they are.
    """
    array, channel_axis, channels = _validation.batch("x", x, axis)
    _validation.full_precision("x", array)
    new, epsilon = _validation.real("momentum", momentum), _validation.epsilon(eps, training=True)
    is_averaged = _validation.flag("averaged", averaged)
    largest = _validation.factor_limit("r_max", r_max)
    apart = {"x": array}
    running = _validation.updated_in_place("running_var", running_var, channels, apart)
    apart["running_var"] = running
    squares = _validation.updated_in_place(
        "square_buffer", square_buffer, channels, apart, rows=True
    )
    position = _row(row, squares)
    gamma = _validation.channel_parameter("weight", weight, channels)
    reads = {"weight": weight, "running_var": running_var, "square_buffer": square_buffer}
    count = array.size // max(channels, 1)
    if count == 0 or not (is_averaged or largest > 1.0):
        squares_of_batch = np.zeros(channels)
        y, _, invrms = _primitives.normalize(
            *(array, channel_axis, gamma, bias, epsilon),
            out=out,
            over=_AROUND_0,
            m2=squares_of_batch,
            reads=reads,
        )
        square = chi2 = squares_of_batch / max(count, 1)
        r = np.ones(channels)
    else:
        _, mean, m2 = _primitives.moments(array, channel_axis)
        with np.errstate(all="ignore"):
            square = mean**2 + m2 / count
            chi2 = _average(squares, position, square) if is_averaged else square
            invrms = 1.0 / np.sqrt(chi2 + epsilon)
            r = correction(chi2 + epsilon, running.astype(np.float64) + epsilon, largest)
            scale = r if gamma is None else gamma * r
        zeros = np.zeros(channels)
        y = _primitives.scale_shift(
            array, channel_axis, zeros, chi2, scale, bias, epsilon, None, out, reads
        )
    if count and tracks:
        _primitives.blend(squares[position], 1.0, square, "square_buffer")
        _primitives.blend(running, new, chi2, "running_var")
    return y, (invrms, r, position, is_averaged)


def gradient(
    dy: object,
    x: object,
    saved: tuple[object, object, object, object],
    gradient_buffer: object,
    weight: object,
    axis: object,
    out: object,
    tracks: bool = True,
) -> tuple[Array, Array, Array]:
    """Return dx, dweight and dbias; keep the statistics of the gradient, if it tracks them."""
    array, channel_axis, channels = _validation.batch("x", x, axis)
    _validation.full_precision("x", array)
    invrms, r, row, averaged = saved
    upstream = _validation.upstream_gradient(dy, array)
    inverse = _validation.required_channel_parameter("invrms", invrms, channels).astype(np.float64)
    factor = _validation.required_channel_parameter("r", r, channels).astype(np.float64)
    gamma = _validation.channel_parameter("weight", weight, channels)
    is_averaged = _validation.flag("averaged", averaged)
    apart = {"x": array, "dy": upstream}
    products = _validation.updated_in_place(
        "gradient_buffer", gradient_buffer, channels, apart, rows=True
    )
    position = _row(row, products)
    reads = {"dy": upstream, "x": array, "weight": weight, "invrms": invrms, "r": r}
    reads["gradient_buffer"] = gradient_buffer
    if out is not None:
        _validation.output(out, array, reads)
    zeros, count = np.zeros(channels), max(array.size // max(channels, 1), 1)
    sum_dy, sum_dy_z = _primitives.gradient_sums(upstream, array, channel_axis, zeros, inverse)
    with np.errstate(all="ignore"):
        scale = factor if gamma is None else gamma * factor
        product = scale * sum_dy_z / count
        psi = _average(products, position, product) if is_averaged else product
        small = (psi != 0.0) & (np.abs(scale) < _least_scale(array.dtype, psi))
        of_small = _input_gradient(upstream, array, channel_axis, small, inverse, scale, psi)
        shares = np.where(small | (psi == 0.0), 0.0, psi / scale * count)
    dx = _primitives.input_gradient(
        upstream, array, channel_axis, zeros, inverse, scale, zeros, shares, count, out
    )
    if array.size > 0 and tracks:
        _primitives.blend(products[position], 1.0, product, "gradient_buffer")
    with np.errstate(all="ignore"):
        for channel, own in of_small.items():
            np.moveaxis(dx, channel_axis, 0)[channel] = own
        sums = factor * sum_dy_z, sum_dy
    dweight, dbias = (_validation.rounded_gradient("weight", weight, s, array) for s in sums)
    return dx, dweight, dbias


def _least_scale(dtype: np.dtype[Any], psi: Array) -> Array:
    """Return how large a scale must be so that psi / scale, and scale itself, are in range."""
    least: Array = np.sqrt(np.finfo(dtype).tiny) * np.maximum(np.abs(psi), 1.0)
    return least


def _input_gradient(
    dy: Array, x: Array, axis: int, which: Array, invrms: Array, scale: Array, psi: Array
) -> dict[int, Array]:
    """Return dx of some channels, by number, without a division by their scale, which may be 0."""
    slopes, pulls = scale * invrms, invrms**2 * psi
    of_dy, of_x = np.moveaxis(dy, axis, 0), np.moveaxis(x, axis, 0)
    return {
        c: (of_dy[c] * slopes[c] - of_x[c] * pulls[c]).astype(x.dtype)
        for c in np.flatnonzero(which).tolist()
    }


def _row(value: object, buffer: Array) -> int:
    row = _validation.integer_from("row", value, 0)
    if row >= len(buffer):
        raise ValueError(f"row must be less than {len(buffer)}, the rows of the buffer, got {row}")
    return row


def correction(chi2: Array, running: Array, largest: float) -> Array:
    """Return r, where a limit that leaves no choice decides even if a statistic is NaN."""
    if largest == 1.0:
        return np.ones(len(chi2))
    return np.clip(np.sqrt(chi2 / running), 1.0 / largest, largest)


def _average(buffer: Array, row: int, values: Array) -> Array:
    """Return the mean of the rows of a buffer, with values in the place of one of them."""
    rows = buffer.astype(np.float64)
    rows[row] = values
    average: Array = rows.sum(0) / len(rows)
    return average
