"""Moving average batch normalization, written down once more from the paper."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fuzz.judge import DOUBLE, Quantity
from fuzz.oracle import (
    WIDE,
    Array,
    Fold,
    backward,
    blended,
    evaluate,
    mean_over,
    statistics,
    sums_of,
    unjudged,
)

# Mean squares are made of a mean and of m2, and their errors reach y through both factors.
OF_BOTH = 3


class Averaged(NamedTuple):
    """A forward pass, and the statistics after it."""

    y: Quantity
    invrms: Quantity
    r: Quantity
    running_var: Quantity
    square_buffer: Quantity


def with_row(buffer: Array, row: int, new: Quantity) -> Quantity:
    """A buffer with a row that was made anew."""
    value = buffer.astype(WIDE)
    value[row] = new.value
    sizes = {}
    for kind, size in new.sizes.items():
        sizes[kind] = np.zeros(buffer.shape, WIDE)
        sizes[kind][row] = size
    return Quantity(value, sizes, new.precision, buffer.dtype)


def moving_average(
    x: Array,
    fold: Fold,
    running_var: Array,
    square_buffer: Array,
    weight: Array | None,
    bias: Array | None,
    momentum: float,
    eps: float,
    row: int,
    averaged: bool,
    r_max: float,
) -> Averaged:
    """Of a batch that is not empty."""
    of = statistics(x, fold, centred=False)
    square = fold.statistic(of.var)
    # Mean squares that float64 does not hold have no promise.
    usable = fold.statistic(of.usable) & (square < np.finfo(DOUBLE).max / 64)
    error = OF_BOTH * unjudged(square, usable)
    own = Quantity(square, {"statistics": error}, x.dtype, DOUBLE)
    after = with_row(square_buffer, row, own)
    chi2 = after.value.mean(0) if averaged else square
    old = running_var.astype(WIDE)
    r = np.clip(np.sqrt((chi2 + WIDE(eps)) / (old + WIDE(eps))), 1 / WIDE(r_max), WIDE(r_max))
    invrms = 1 / np.sqrt(chi2 + WIDE(eps))
    scale = r if weight is None else weight.astype(WIDE) * r
    y = evaluate(x, fold, np.zeros(len(square)), chi2, scale, bias, eps)
    sizes = {kind: size * fold.keep(unjudged(OF_BOTH, usable)) for kind, size in y.sizes.items()}
    return Averaged(
        y._replace(sizes=sizes),
        Quantity(invrms, {"statistics": OF_BOTH * unjudged(invrms, usable)}, x.dtype, DOUBLE),
        Quantity(r, {"statistics": OF_BOTH * unjudged(r, usable)}, x.dtype, DOUBLE),
        blended(running_var, chi2, momentum, error, x.dtype),
        after,
    )


class Gradients(NamedTuple):
    """A backward pass, and the statistics after it."""

    dx: Quantity
    dweight: Quantity
    dbias: Quantity
    gradient_buffer: Quantity


def moving_average_backward(
    dy: Array,
    x: Array,
    fold: Fold,
    invrms: Array,
    r: Array,
    row: int,
    averaged: bool,
    gradient_buffer: Array,
    weight: Array | None,
) -> Gradients:
    """Of a batch that is not empty."""
    scale = r.astype(WIDE) * (1 if weight is None else weight.astype(WIDE))
    result = x.dtype if weight is None else weight.dtype
    plain = backward(dy, x, fold, None, invrms, None, dtype=result)
    own = backward(dy, x, fold, None, invrms, scale)
    product = sums_of(plain.dweight, scale / fold.count, plain.dbias, np.zeros(len(r)))
    after = with_row(gradient_buffer, row, product)
    psi = fold.keep(after.value.mean(0) if averaged else product.value)
    inverse = fold.keep(invrms)
    z = fold.fold(x) * inverse
    dx = inverse * (fold.fold(dy) * fold.keep(scale) - z * psi)
    more = np.abs(inverse * z) * (np.abs(psi) + mean_over(np.abs(z * fold.fold(dy)), fold))
    sizes = {**own.dx.sizes, "dx": own.dx.sizes["dx"] + more}
    dweight = sums_of(plain.dweight, r.astype(WIDE), plain.dbias, np.zeros(len(r)))
    return Gradients(own.dx._replace(value=dx, sizes=sizes), dweight, plain.dbias, after)
