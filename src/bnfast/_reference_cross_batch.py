"""As `_reference`: the normalizations whose statistics are of several batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from bnfast._reference import Array, _along, _other_axes, _per_channel


def _with_row(buffer: ArrayLike, row: int, values: Array) -> Array:
    """Return a copy of a buffer with other values in a row."""
    after = np.array(buffer, values.dtype)
    after[row] = values
    return after


def moving_average_batch_norm_forward(
    x: ArrayLike,
    running_var: ArrayLike,
    square_buffer: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    momentum: float = 0.02,
    eps: float = 1e-5,
    *,
    row: int = 0,
    averaged: bool = True,
    r_max: float = 5.0,
    axis: int = 1,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array, Array, Array]:
    """Y = weight * r * x / sqrt(chi2 + eps) + bias, 1 / sqrt(chi2 + eps), r; and both averages.

    chi2 is the mean of the buffer, one row of which becomes mean(x**2), or mean(x**2) itself;
    r = clip(sqrt((chi2 + eps) / (running_var + eps)), 1 / r_max, r_max).
    """
    x, old = np.asarray(x, precision), np.asarray(running_var, precision)
    square = (x**2).mean(_other_axes(axis, x.ndim))
    buffer = _with_row(square_buffer, row, square)
    chi2 = buffer.mean(0) if averaged else square
    invrms = 1 / np.sqrt(chi2 + precision(eps))
    r = np.sqrt((chi2 + precision(eps)) / (old + precision(eps)))
    r = np.clip(r, 1 / precision(r_max), precision(r_max))
    gamma = _per_channel(weight, 1.0, old.size, precision)
    beta = _per_channel(bias, 0.0, old.size, precision)
    y = _along(axis, x.ndim, gamma * r * invrms) * x + _along(axis, x.ndim, beta)
    return y, invrms, r, (1 - precision(momentum)) * old + precision(momentum) * chi2, buffer


def moving_average_batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    invrms: ArrayLike,
    r: ArrayLike,
    gradient_buffer: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    row: int = 0,
    averaged: bool = True,
    axis: int = 1,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array, Array]:
    """Dx, dweight, dbias and the buffer; with z = x * invrms and g = weight * r * dy.

    dx = invrms * (g - z * psi), psi the mean of the buffer, one row of which becomes mean(g * z),
    or mean(g * z) itself; dweight = r * sum(dy * z), dbias = sum(dy).
    """
    dy, x = np.asarray(dy, precision), np.asarray(x, precision)
    inverse, factor = np.asarray(invrms, precision), np.asarray(r, precision)
    axes = _other_axes(axis, x.ndim)
    gamma = _per_channel(weight, 1.0, inverse.size, precision)
    z = x * _along(axis, x.ndim, inverse)
    g = dy * _along(axis, x.ndim, gamma * factor)
    buffer = _with_row(gradient_buffer, row, (g * z).mean(axes))
    psi = buffer.mean(0) if averaged else buffer[row]
    dx = _along(axis, x.ndim, inverse) * (g - z * _along(axis, x.ndim, psi))
    return dx, factor * (dy * z).sum(axes), dy.sum(axes), buffer


def _patches(
    inputs: ArrayLike,
    kernel: tuple[int, ...],
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    precision: Any = np.float64,
) -> Array:
    """(N, K, *kernel, *positions): what each weight of a filter is multiplied by."""
    spatial = len(kernel)
    margins = [(0, 0), (0, 0), *[(padding, padding)] * spatial]
    padded = np.pad(np.asarray(inputs, precision), margins)
    parts = []
    for offset in np.ndindex(kernel):
        cuts = []
        for at, length, size in zip(offset, kernel, padded.shape[2:], strict=True):
            count = (size - dilation * (length - 1) - 1) // stride + 1
            begin = at * dilation
            cuts.append(slice(begin, begin + (count - 1) * stride + 1, stride))
        parts.append(padded[(slice(None), slice(None), *cuts)])
    found = np.stack(parts, 2)
    return found.reshape(*found.shape[:2], *kernel, *found.shape[3:])


def convolution(
    inputs: ArrayLike,
    filters: ArrayLike,
    *,
    groups: int = 1,
    precision: Any = np.float64,
    **geometry: int,
) -> Array:
    """(N, C, ...) of inputs (N, K, ...) and filters (C, K / groups, *kernel)."""
    filters = np.asarray(filters, precision)
    patches = _patches(inputs, filters.shape[2:], precision=precision, **geometry)
    axes = tuple(range(1, filters.ndim))
    made = [
        np.tensordot(of_inputs, of_filters, (axes, axes))
        for of_inputs, of_filters in zip(
            np.split(patches, groups, 1), np.split(filters, groups), strict=True
        )
    ]
    return np.moveaxis(np.concatenate(made, -1), -1, 1)


def filter_derivatives(
    inputs: ArrayLike,
    filters: ArrayLike,
    *,
    groups: int = 1,
    precision: Any = np.float64,
    **geometry: int,
) -> tuple[Array, Array]:
    """Of the means mu and the mean squares nu of what a convolution makes, by its filters.

    With a row of P for each value of a channel x = P w: dmu = mean(P), dnu = 2 * mean(x * P).
    """
    filters = np.asarray(filters, precision)
    made = convolution(inputs, filters, groups=groups, precision=precision, **geometry)
    patches = _patches(inputs, filters.shape[2:], precision=precision, **geometry)
    count = made.size // len(filters)
    dmu, dnu = np.empty_like(filters), np.empty_like(filters)
    for channel in range(len(filters)):
        part = np.split(patches, groups, 1)[channel // (len(filters) // groups)]
        x = made[:, channel].reshape(len(made), *(1,) * (filters.ndim - 1), *made.shape[2:])
        axes = (0, *range(filters.ndim, part.ndim))
        dmu[channel] = part.sum(axes) / count
        dnu[channel] = 2 * (x * part).sum(axes) / count
    return dmu, dnu


def cross_iteration_batch_norm_forward(
    x: ArrayLike,
    filters: ArrayLike | None = None,
    window: Sequence[tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike, ArrayLike]] = (),
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """Y = weight * (x - mu) * invstd + bias, mu, invstd = 1 / sqrt(nu - mu**2 + eps).

    mu and nu are means of mu[t] and max(nu[t], mu[t]**2) over x and the window, whose entries
    (filters, mu, nu, dmu, dnu) are moved to the filters of now.
    """
    x = np.asarray(x, precision)
    axes = _other_axes(axis, x.ndim)
    means, squares = [x.mean(axes)], [(x**2).mean(axes)]
    for old, mu, nu, dmu, dnu in window:
        step = np.asarray(filters, precision) - np.asarray(old, precision)
        inner = tuple(range(1, step.ndim))
        means.append(mu + (dmu * step).sum(inner))
        squares.append(np.maximum(nu + (dnu * step).sum(inner), means[-1] ** 2))
    mean = np.mean(means, 0)
    var = np.mean(squares, 0) - mean**2
    invstd = 1 / np.sqrt(var + precision(eps))
    gamma = _per_channel(weight, 1.0, mean.size, precision)
    beta = _per_channel(bias, 0.0, mean.size, precision)
    y = _along(axis, x.ndim, gamma * invstd) * (x - _along(axis, x.ndim, mean))
    return y + _along(axis, x.ndim, beta), mean, invstd


def cross_iteration_batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    iterations: int,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """Dx, dweight and dbias, where the statistics of x are one of k in each average.

    By nu and mu: dnu = -invstd**3 / 2 * sum(g * (x - mean)), dmu = -invstd * sum(g)
    - 2 * mean * dnu, and dx = invstd * g + (dmu + 2 * x * dnu) / (k * count), g = weight * dy.
    """
    dy, x = np.asarray(dy, precision), np.asarray(x, precision)
    mean, inverse = np.asarray(mean, precision), np.asarray(invstd, precision)
    axes = _other_axes(axis, x.ndim)
    gamma = _per_channel(weight, 1.0, mean.size, precision)
    count = precision(iterations * (x.size // mean.size))
    g, centred = dy * _along(axis, x.ndim, gamma), x - _along(axis, x.ndim, mean)
    dnu = -(inverse**3) / 2 * (g * centred).sum(axes)
    dmu = -inverse * g.sum(axes) - 2 * mean * dnu
    shares = _along(axis, x.ndim, dmu) + 2 * x * _along(axis, x.ndim, dnu)
    dx = _along(axis, x.ndim, inverse) * g + shares / count
    return dx, (dy * centred).sum(axes) * inverse, dy.sum(axes)
