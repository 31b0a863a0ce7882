"""Whitening, written down once more: roots of covariances, and gradients by other ways.

The gradient of the symmetric root solves Sylvester's equation, and that of Newton's iterations is
taken by complex steps: neither is how bnfast does it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fuzz.judge import DOUBLE, Quantity
from fuzz.oracle import Array, blended, unjudged

STEP = 1e-150  # of a complex step: nothing is subtracted, so it may be as small as it likes
LARGEST_CONDITION = 1e6
LARGEST_VARIANCE, LEAST_VARIANCE = 1e100, 1e-9  # gradients have their roots to the third power


class Whitening(NamedTuple):
    """What whitens each group: its mean, covariance, matrix, and how ill-conditioned it is."""

    mean: Array
    covariance: Array  # without eps
    matrix: Array
    condition: Array


def columns(x: Array, axis: int, groups: int) -> Array:
    """Channels by values, in groups: (groups, channels of a group, values), in float64."""
    moved = np.moveaxis(x.astype(DOUBLE), axis, 0)
    channels = moved.shape[0]
    return moved.reshape(groups, channels // groups, int(np.prod(moved.shape[1:])))


def back(folded: Array, x: Array, axis: int) -> Array:
    moved = np.moveaxis(x, axis, 0).shape
    return np.moveaxis(folded.reshape(moved), 0, axis)


def inverse_root(sigma: Array) -> Array:
    """The symmetric one, of a matrix that has eps on its diagonal."""
    values, vectors = np.linalg.eigh(sigma)
    return (vectors / np.sqrt(values)) @ vectors.T


def newton(sigma: Array, iterations: int) -> Array:
    """sqrt(r) P_T, of real or complex matrices."""
    size = len(sigma)
    share = 1 / np.trace(sigma)
    p, q = np.eye(size, dtype=sigma.dtype), share * sigma
    for _ in range(iterations):
        step = 1.5 * np.eye(size) - 0.5 * (p @ q)
        p, q = p @ step, q @ step
    return np.sqrt(share) * p


def with_eps(covariance: Array, eps: float, iterations: int | None) -> Array:
    """Of one group, the covariance with eps on its diagonal.

    A covariance that was rounded to float32 may have a negative eigenvalue, larger than eps or not:
    0 stands for it, but for Newton's iterations, which have no eigenvalues.
    """
    if iterations is None and np.isfinite(covariance).all():
        values, vectors = np.linalg.eigh(covariance)
        if values.min(initial=0) < 0:
            covariance = (vectors * np.maximum(values, 0)) @ vectors.T
    return covariance + eps * np.eye(len(covariance))


def root_of(sigma: Array, iterations: int | None) -> Array:
    return inverse_root(sigma) if iterations is None else newton(sigma, iterations)


def whitening(x: Array, axis: int, groups: int, eps: float, iterations: int | None) -> Whitening:
    """Of a batch that is not empty; `iterations` are Newton's, None for the root itself."""
    c = columns(x, axis, groups)
    mean = c.mean(2)
    centred = c - mean[:, :, None]
    mean, centred = mean + centred.mean(2), centred - centred.mean(2, keepdims=True)
    covariance = centred @ centred.transpose(0, 2, 1) / c.shape[2]
    return of_covariance(mean, covariance, eps, iterations)


def of_covariance(mean: Array, covariance: Array, eps: float, iterations: int | None) -> Whitening:
    matrices, conditions = [], []
    for each in covariance.astype(DOUBLE):
        sigma = with_eps(each, eps, iterations)
        if not np.isfinite(sigma).all():
            matrices.append(np.full_like(sigma, np.nan))
            conditions.append(np.inf)
            continue
        values = np.linalg.eigvalsh(sigma)
        least = values.min(initial=np.inf)
        good = least > 0 and values.max() < LARGEST_CONDITION * least
        usable = good and least > LEAST_VARIANCE and values.max() < LARGEST_VARIANCE
        conditions.append(values.max() / least if usable else np.inf)
        matrices.append(root_of(sigma, iterations) if good else np.full_like(sigma, np.nan))
    shape = covariance.shape
    return Whitening(
        mean, covariance, np.array(matrices).reshape(shape), np.array(conditions).reshape(-1)
    )


def whitened(
    x: Array, axis: int, by: Whitening, weight: Array | None, bias: Array | None
) -> Quantity:
    """weight * (W (x - mu)) + bias."""
    groups = len(by.matrix)
    c = columns(x, axis, groups) - by.mean.reshape(groups, -1, 1)
    factor, shift = _of_channels(weight, 1, by), _of_channels(bias, 0, by)
    value = factor * (by.matrix @ c) + shift
    large = np.abs(by.mean).reshape(groups, -1, 1)
    size = np.abs(factor) * (np.abs(by.matrix) @ (np.abs(c) + large)) + np.abs(shift)
    steep = np.abs(factor) * np.abs(by.matrix).sum(2, keepdims=True) + 0 * c
    sizes = {
        "matrices": back(_conditioned(size, by), x, axis),
        "smallest": back(1 + _conditioned(steep, by), x, axis),
    }
    return Quantity(back(value, x, axis).astype(np.longdouble), sizes, x.dtype, x.dtype)


def _of_channels(parameter: Array | None, default: float, by: Whitening) -> Array:
    groups, each = by.matrix.shape[:2]
    if parameter is None:
        return np.full((groups, each, 1), float(default))
    return parameter.astype(DOUBLE).reshape(groups, each, 1)


def _conditioned(size: Array, by: Whitening) -> Array:
    """Errors grow with the condition, and each is as large as the largest of its group."""
    condition = by.condition.reshape(-1, *[1] * (size.ndim - 1))
    largest = size.max(tuple(range(1, size.ndim)), keepdims=True, initial=0)
    return unjudged((largest + 0 * size) * condition, np.isfinite(condition + 0 * size))


def matrices(values: Array, by: Whitening, dtype: np.dtype = DOUBLE) -> Quantity:
    """Matrices of each group as what was returned."""
    size = _conditioned(np.abs(values) + np.abs(by.matrix).max(initial=0), by)
    return Quantity(values.astype(np.longdouble), {"matrices": size}, DOUBLE, dtype)


def gradients(
    dy: Array,
    x: Array,
    axis: int,
    by: Whitening,
    weight: Array | None,
    eps: float,
    iterations: int | None,
    constant: bool,
) -> tuple[Quantity, Quantity, Quantity]:
    groups = len(by.matrix)
    result = x.dtype if weight is None else weight.dtype
    c = columns(x, axis, groups) - by.mean.reshape(groups, -1, 1)
    upstream = columns(dy, axis, groups)
    values = max(c.shape[2], 1)
    g = upstream * _of_channels(weight, 1, by)
    whitened_c = by.matrix @ c
    transposed = by.matrix.transpose(0, 2, 1)
    if constant:
        dx = transposed @ g
        size = np.abs(transposed) @ np.abs(g)
    else:
        through = g @ c.transpose(0, 2, 1)
        d_sigma = np.zeros_like(through)
        for k in np.flatnonzero(np.isfinite(by.condition)):
            sigma = with_eps(by.covariance[k], eps, iterations)
            d_sigma[k] = _covariance_gradient(sigma, through[k], iterations)
        both = d_sigma + d_sigma.transpose(0, 2, 1)
        dx = transposed @ (g - g.mean(2, keepdims=True)) + both @ c / values
        size = np.abs(transposed) @ (np.abs(g) + np.abs(g).mean(2, keepdims=True))
        spread = np.abs(g) @ np.abs(c).transpose(0, 2, 1)
        largest = [np.abs(part).max((1, 2), keepdims=True) for part in (by.matrix, spread, c)]
        size = size + largest[0] ** 3 * largest[1] * largest[2] * c.shape[1] / values
    size = _conditioned(size, by)
    lost = _conditioned(np.abs(transposed).sum(2, keepdims=True) + 0 * size, by)
    dweight, dbias = (upstream * whitened_c).sum(2), upstream.sum(2)
    large = np.abs(by.mean).reshape(groups, -1, 1)
    terms = np.abs(upstream) * (np.abs(by.matrix) @ (np.abs(c) + large))
    of_weight = _conditioned(terms.sum(2) + 0 * dweight, by)
    rounded = np.abs(upstream).sum(2) * np.abs(by.matrix).sum(2)

    def flat(array: Array) -> Array:
        return array.reshape(-1).astype(np.longdouble)

    return (
        Quantity(
            back(dx, x, axis).astype(np.longdouble),
            {"matrices": back(size, x, axis), "smallest": back(1 + lost, x, axis)},
            x.dtype,
            x.dtype,
        ),
        Quantity(
            flat(dweight),
            {"matrices": flat(of_weight), "smallest": flat(1 + rounded)},
            x.dtype,
            result,
        ),
        Quantity(flat(dbias), {"matrices": flat(np.abs(upstream).sum(2))}, x.dtype, result),
    )


def covariance_gradients(
    by: Whitening, through: Array, eps: float, iterations: int | None
) -> Quantity:
    """The symmetric part of the gradient of each covariance, of a gradient of the matrices."""
    found = np.zeros_like(through)
    for k in np.flatnonzero(np.isfinite(by.condition)):
        sigma = with_eps(by.covariance[k], eps, iterations)
        found[k] = _covariance_gradient(sigma, through[k], iterations)
    found = (found + found.transpose(0, 2, 1)) / 2
    largest = [np.abs(part).max((1, 2), keepdims=True, initial=0) for part in (by.matrix, through)]
    size = _conditioned(largest[0] ** 3 * largest[1] * through.shape[1] + 0 * through, by)
    return Quantity(found.astype(np.longdouble), {"matrices": size}, DOUBLE, DOUBLE)


def _covariance_gradient(sigma: Array, through: Array, iterations: int | None) -> Array:
    """The gradient of <through, W> with respect to each entry of the covariance."""
    size = len(sigma)
    if iterations is None:
        root = np.linalg.inv(inverse_root(sigma))
        inverse = inverse_root(sigma)
        # d(S**-1/2) = -W dR W with R dR + dR R = dS, whose adjoint is the same equation.
        right = inverse @ (through + through.T) / 2 @ inverse
        system = np.kron(root, np.eye(size)) + np.kron(np.eye(size), root)
        return -np.linalg.solve(system, right.reshape(-1)).reshape(size, size)
    found = np.zeros((size, size))
    scale = np.abs(sigma).max()
    for index in np.ndindex(size, size):
        moved = sigma.astype(np.complex128)
        moved[index] += 1j * STEP * scale
        found[index] = (through * newton(moved, iterations).imag).sum() / (STEP * scale)
    return found


def evaluation_of(
    mean: Array, matrix: Array, averaged: str, eps: float, iterations: int | None
) -> Whitening:
    """What whitens in evaluation."""
    wide = mean.astype(DOUBLE), matrix.astype(DOUBLE)
    if averaged == "covariance":
        symmetric = (wide[1] + wide[1].transpose(0, 2, 1)) / 2
        return of_covariance(wide[0], symmetric, eps, iterations)
    return Whitening(wide[0], wide[1], wide[1], np.ones(len(matrix)))


def tracked_matrix(
    by: Whitening,
    x: Array,
    mean: Array,
    matrix: Array,
    momentum: float,
    averaged: str,
) -> dict[str, Quantity]:
    """Running statistics after one batch."""
    new = by.covariance if averaged == "covariance" else by.matrix
    of_matrix = matrices(new, by).sizes["matrices"]
    sizes = np.abs(x.astype(DOUBLE)).max(initial=0) * np.ones(mean.shape)
    found = {}
    for name, old, now, size in (
        ("running_mean", mean, by.mean.reshape(-1), sizes),
        ("running_matrix", matrix, new, of_matrix),
    ):
        plain = blended(old, now, momentum, np.zeros(old.shape), x.dtype)
        by_matrices = {"matrices": np.abs(momentum) * size} if momentum else {}
        found[name] = plain._replace(sizes={"running": plain.sizes["running"], **by_matrices})
    return found
