"""Which positions of a batch count, from a mask or from lengths: checked, or one clear error.

Callers find these checks in `_validation`, beside those of other arguments.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from bnfast._arrays import booleans, integers_of_samples
from bnfast._scalars import choice
from bnfast._typing import Array

# What outputs are where values do not count: 0, or what the input is there.
PADDING = ZEROS, INPUT = "zeros", "input"


def mask_or_lengths() -> NoReturn:
    """Refuse both at once."""
    raise ValueError("mask and lengths must not both be given, got both")


def nothing_counts(name: str) -> NoReturn:
    """Refuse a batch of which nothing is left that statistics could be made of."""
    wanted, came = ("be True", "all False") if name == "mask" else ("be above 0", "all 0")
    raise ValueError(
        f"{name} must somewhere {wanted}, for statistics of the values that count, got {came}"
    )


def positions(name: str, value: object, x: Array, axis: int) -> NDArray[np.bool_]:
    """Return booleans of all axes of x but `axis`, that of the channels.

    With as many axes as x, a mask has a single element along that axis; with fewer it is broadcast
    to the others.
    """
    array = booleans(name, value)
    given = array.shape
    others = tuple(size for d, size in enumerate(x.shape) if d != axis)
    if array.ndim == x.ndim and array.shape[axis] == 1:
        array = array.reshape([size for d, size in enumerate(array.shape) if d != axis])
    try:
        if array.ndim == x.ndim:
            raise ValueError
        return np.broadcast_to(array, others)
    except ValueError:
        whole = tuple(1 if d == axis else size for d, size in enumerate(x.shape))
        raise ValueError(
            f"{name} must broadcast to the shape of x without its channels, {others} or {whole}, "
            f"got shape {given}"
        ) from None


class CheckedLengths(NamedTuple):
    """Lengths, as what they say: `within_lengths` has checked them."""

    within: NDArray[np.bool_]


def within_lengths(value: object, x: Array, axis: int) -> NDArray[np.bool_]:
    """Return booleans (N, L), True at the first `length` positions of each sample."""
    if isinstance(value, CheckedLengths):
        return value.within
    if x.ndim != 3 or axis == 0:
        raise ValueError(
            "lengths must be those of samples along axis 0 of x, of shape (N, C, L) or (N, L, C), "
            f"got x of shape {x.shape} with channels along axis {axis}; other batches take a mask"
        )
    samples, most = x.shape[0], x.shape[3 - axis]
    array = integers_of_samples("lengths", value, samples)
    wrong = array[(array < 0) | (array > most)]
    if wrong.size:
        raise ValueError(f"lengths must be from 0 to {most}, got {wrong[0]}")
    return np.asarray(np.arange(most) < array.astype(np.intp)[:, None])


def counted(
    mask: object, lengths: object, padding: object, x: Array, axis: int
) -> NDArray[np.bool_] | None:
    """Return booleans of all axes of x but `axis`, from one of the two, or None of neither."""
    choice("padding", padding, PADDING)
    if mask is None and lengths is None:
        return None
    if mask is not None and lengths is not None:
        mask_or_lengths()
    return within_lengths(lengths, x, axis) if mask is None else positions("mask", mask, x, axis)
