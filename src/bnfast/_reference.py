"""Every operation in plain NumPy: the readable definition, and the oracle of the tests.

Stands apart: it shares no code with the rest, and only the tests and the benchmark use it. All
arithmetic is done in `precision`, float64 unless a wider one is asked for, with two passes for the
statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]


def _along(axis: int, ndim: int, values: Array) -> Array:
    """One value a channel, shaped to broadcast against the batch."""
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def _other_axes(axis: int, ndim: int) -> tuple[int, ...]:
    return tuple(d for d in range(ndim) if d != axis % ndim)


def _per_channel(value: ArrayLike | None, default: float, channels: int, precision: Any) -> Array:
    return np.full(channels, default, precision) if value is None else np.asarray(value, precision)


def moments(x: ArrayLike, axis: int = 1, precision: Any = np.float64) -> tuple[int, Array, Array]:
    """count, mean = sum(x) / count, m2 = sum((x - mean)**2)."""
    x = np.asarray(x, precision)
    axes = _other_axes(axis, x.ndim)
    mean = x.mean(axes)
    m2 = ((x - _along(axis, x.ndim, mean)) ** 2).sum(axes)
    return x.size // mean.size, mean, m2


def batch_norm_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """Y = weight * (x - mean) * invstd + bias, invstd = 1 / sqrt(var + eps), var = m2 / count."""
    count, mean, m2 = moments(x, axis, precision)
    var = m2 / precision(count)
    y = scale_shift(x, mean, var, weight, bias, eps, axis=axis, precision=precision)
    return y, mean, 1 / np.sqrt(var + precision(eps))


def scale_shift(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    precision: Any = np.float64,
) -> Array:
    """Y = weight * (x - mean) / sqrt(var + eps) + bias."""
    x = np.asarray(x, precision)
    mean, var = np.asarray(mean, precision), np.asarray(var, precision)
    gamma = _per_channel(weight, 1.0, mean.size, precision)
    beta = _per_channel(bias, 0.0, mean.size, precision)
    scale = _along(axis, x.ndim, gamma / np.sqrt(var + precision(eps)))
    y: Array = (x - _along(axis, x.ndim, mean)) * scale + _along(axis, x.ndim, beta)
    return y


def _share(weight: float, values: ArrayLike) -> Array:
    """Weighted values, where 0 * inf is 0."""
    values = np.asarray(values, np.float64)
    return weight * values if weight != 0 else np.zeros(values.shape)


def update_running(
    running_mean: Array,
    running_var: Array,
    x: ArrayLike,
    momentum: float = 0.1,
    *,
    axis: int = 1,
    unbiased: bool = True,
) -> tuple[Array, Array]:
    """Blend the batch in: running = (1 - momentum) * running + momentum * batch.

    The variance of the batch is m2 / (count - 1), or m2 / count.
    """
    count, mean, m2 = moments(x, axis)
    var = m2 / (count - 1 if unbiased else count)
    return (
        _share(1 - momentum, running_mean) + _share(momentum, mean),
        _share(1 - momentum, running_var) + _share(momentum, var),
    )


def activate(
    y: ArrayLike,
    activation: str | None = None,
    negative_slope: float = 0.01,
    *,
    residual: ArrayLike | None = None,
    precision: Any = np.float64,
) -> Array:
    """activation(z), with z = y + residual."""
    z = np.asarray(y, precision)
    if residual is not None:
        z = z + np.asarray(residual, precision)
    if activation is None:
        return z
    with np.errstate(over="ignore"):
        values: dict[str, Callable[[], Array]] = {
            "relu": lambda: np.maximum(z, 0),
            "leaky_relu": lambda: np.where(z < 0, precision(negative_slope) * z, z),
            "relu6": lambda: np.minimum(np.maximum(z, 0), 6),
            "silu": lambda: z / (1 + np.exp(-z)),
            "hardswish": lambda: z * np.minimum(np.maximum(z + 3, 0), 6) / 6,
        }
        return values[activation]()


def activate_backward(
    dy: ArrayLike,
    y: ArrayLike,
    activation: str | None = None,
    negative_slope: float = 0.01,
    *,
    residual: ArrayLike | None = None,
    precision: Any = np.float64,
) -> Array:
    """Dz = dy * activation'(z), the gradient of y and of the residual."""
    dy, z = np.asarray(dy, precision), activate(y, residual=residual, precision=precision)
    if activation is None:
        return dy
    with np.errstate(over="ignore"):
        sigmoid = 1 / (1 + np.exp(-z))
    slopes: dict[str, Callable[[], Array]] = {
        "relu": lambda: np.where(z > 0, 1, 0),
        "leaky_relu": lambda: np.where(z > 0, 1, precision(negative_slope)),
        "relu6": lambda: np.where((z > 0) & (z < 6), 1, 0),
        "silu": lambda: sigmoid * (1 + z * (1 - sigmoid)),
        "hardswish": lambda: np.where(z <= -3, 0, np.where(z < 3, z / 3 + 0.5, 1)),
    }
    return dy * slopes[activation]()


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    training: bool = True,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """dx, dweight and dbias; with xmu = x - mean.

    dbias = sum(dy), dweight = sum(dy * xmu) * invstd, and dx is
    weight * invstd * (dy - dbias / count - xmu * invstd * dweight / count) in training,
    weight * invstd * dy in evaluation.
    """
    dy, x = np.asarray(dy, precision), np.asarray(x, precision)
    mean, invstd = np.asarray(mean, precision), np.asarray(invstd, precision)
    gamma = _per_channel(weight, 1.0, mean.size, precision)
    axes = _other_axes(axis, x.ndim)
    count = precision(x.size // mean.size)
    xmu = x - _along(axis, x.ndim, mean)
    dbias = dy.sum(axes)
    dweight = (dy * xmu).sum(axes) * invstd
    dx = dy
    if training:
        dx = dx - _along(axis, x.ndim, dbias / count)
        dx = dx - xmu * _along(axis, x.ndim, invstd * dweight / count)
    return dx * _along(axis, x.ndim, gamma * invstd), dweight, dbias


def _per_sample(
    value: ArrayLike | None, default: float, x: Array, axis: int, precision: Any
) -> Array:
    """One value for each channel of each sample, shaped to broadcast against the batch."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = x.shape[0], x.shape[axis]
    given = np.full(shape, default) if value is None else np.asarray(value)
    return given.reshape(shape).astype(precision)


def conditional_batch_norm_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    statistics: tuple[ArrayLike, ArrayLike] | None = None,
    axis: int = 1,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """Y[n] = weight[n] * (x[n] - mean) * invstd + bias[n], invstd = 1 / sqrt(var + eps).

    mean and var are those of the batch, or given `statistics`.
    """
    x = np.asarray(x, precision)
    axes = _other_axes(axis, x.ndim)
    given = (x.mean(axes), x.var(axes)) if statistics is None else statistics
    mean, var = (np.asarray(statistic, precision) for statistic in given)
    invstd = 1 / np.sqrt(var + precision(eps))
    gamma, beta = (
        _per_sample(value, default, x, axis, precision)
        for value, default in ((weight, 1.0), (bias, 0.0))
    )
    xhat = (x - _along(axis, x.ndim, mean)) * _along(axis, x.ndim, invstd)
    return gamma * xhat + beta, mean, invstd


def conditional_batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    training: bool = True,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """dx, dweight and dbias; with xhat = (x - mean) * invstd, and sums over pixels.

    dbias[n] = sum(dy[n]), dweight[n] = sum(dy[n] * xhat[n]), and dx[n] is
    invstd * (weight[n] * dy[n] - sum_k(weight[k] * dbias[k]) / count
    - xhat[n] * sum_k(weight[k] * dweight[k]) / count) in training,
    invstd * weight[n] * dy[n] in evaluation.
    """
    dy, x = np.asarray(dy, precision), np.asarray(x, precision)
    centre, scale = (
        _along(axis, x.ndim, np.asarray(statistic, precision)) for statistic in (mean, invstd)
    )
    gamma = _per_sample(weight, 1.0, x, axis, precision)
    pixels = tuple(d for d in range(1, x.ndim) if d != axis % x.ndim)
    count = precision(x.size // x.shape[axis])
    xhat = (x - centre) * scale
    dbias = dy.sum(pixels, keepdims=True)
    dweight = (dy * xhat).sum(pixels, keepdims=True)
    dx = gamma * dy
    if training:
        dx = dx - (gamma * dbias).sum(0, keepdims=True) / count
        dx = dx - xhat * (gamma * dweight).sum(0, keepdims=True) / count
    return scale * dx, dweight.squeeze(pixels), dbias.squeeze(pixels)


def _in_groups(x: Array, num_groups: int, axis: int) -> Array:
    """(N, G, C / G, rest) of an array whose channels are along `axis`."""
    x = np.moveaxis(x, axis, 1)
    return x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups, -1)


def _out_of_groups(grouped: Array, like: Array, axis: int) -> Array:
    return np.moveaxis(grouped.reshape(np.moveaxis(like, axis, 1).shape), 1, axis)


def group_norm_forward(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """Of every sample and group of channels: y = weight * (x - mean) * invstd + bias.

    Instance normalization is the case of as many groups as channels.
    """
    x = np.asarray(x, precision)
    grouped = _in_groups(x, num_groups, axis)
    mean = grouped.mean((2, 3))
    xmu = grouped - mean[:, :, None, None]
    invstd = 1 / np.sqrt((xmu**2).mean((2, 3)) + precision(eps))
    channels = x.shape[axis]
    gamma = _per_channel(weight, 1.0, channels, precision).reshape(num_groups, -1, 1)
    beta = _per_channel(bias, 0.0, channels, precision).reshape(num_groups, -1, 1)
    y = xmu * invstd[:, :, None, None] * gamma + beta
    return _out_of_groups(y, x, axis), mean, invstd


def group_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """dx, dweight and dbias; with g = dy * weight and xhat = (x - mean) * invstd.

    dx = invstd * (g - mean(g) - xhat * mean(g * xhat)) over every sample and group,
    dweight = sum(dy * xhat) and dbias = sum(dy) over all axes but `axis`.
    """
    dy, x = np.asarray(dy, precision), np.asarray(x, precision)
    mean, invstd = np.asarray(mean, precision), np.asarray(invstd, precision)
    num_groups = mean.shape[1]
    grouped, upstream = _in_groups(x, num_groups, axis), _in_groups(dy, num_groups, axis)
    scale = invstd[:, :, None, None]
    xhat = (grouped - mean[:, :, None, None]) * scale
    gamma = _per_channel(weight, 1.0, x.shape[axis], precision).reshape(num_groups, -1, 1)
    g = upstream * gamma
    dx = scale * (g - g.mean((2, 3), keepdims=True) - xhat * (g * xhat).mean((2, 3), keepdims=True))
    dweight = (upstream * xhat).sum((0, 3)).reshape(-1)
    return _out_of_groups(dx, x, axis), dweight, upstream.sum((0, 3)).reshape(-1)


def _masked_groups(
    x: ArrayLike, mask: ArrayLike, num_groups: int | None, axis: int, precision: Any
) -> tuple[Array, Array, Array, tuple[int, ...]]:
    """X as (N, G, C / G, P), 0 where the mask (N, ...) is; the mask; M, and the axes summed over.

    Batch norm, of no groups, has those of one channel each, over all samples.
    """
    x = np.asarray(x, precision)
    samples, channels = x.shape[0], x.shape[axis]
    groups = channels if num_groups is None else num_groups
    m = np.asarray(mask, bool).reshape(samples, 1, 1, -1)
    grouped = np.moveaxis(x, axis, 1).reshape(samples, groups, channels // groups, -1)
    axes = (0, 2, 3) if num_groups is None else (2, 3)
    values = np.where(m, grouped, precision(0))
    count = np.broadcast_to(m, grouped.shape).sum(axes, keepdims=True)
    return values, m, np.maximum(count, 1).astype(precision), axes


def _unmasked(grouped: Array, m: Array, like: ArrayLike, axis: int, padding: str) -> Array:
    """Return grouped values in the shape of x, with the padding where the mask says so."""
    like = np.asarray(like)
    shape = np.moveaxis(like, axis, 1).shape
    moved = np.moveaxis(grouped.reshape(shape), 1, axis)
    counts = np.moveaxis(np.broadcast_to(m, grouped.shape).reshape(shape), 1, axis)
    return np.where(counts, moved, like.astype(moved.dtype) if padding == "input" else 0)


def masked_norm_forward(
    x: ArrayLike,
    mask: ArrayLike,
    num_groups: int | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    padding: str = "zeros",
    precision: Any = np.float64,
) -> tuple[Array, Array, Array, Array]:
    """Y, mean, var and invstd of the values that count, m being the mask and M = sum(m).

    mean = sum(m * x) / M, var = sum(m * (x - mean)**2) / M, y = weight * (x - mean) * invstd + bias
    where m is 1; over each sample's groups of channels, or without groups over each channel. Of no
    values mean and var are 0.
    """
    values, m, count, axes = _masked_groups(x, mask, num_groups, axis, precision)
    channels = np.shape(x)[axis]
    mean = values.sum(axes, keepdims=True) / count
    var = (np.where(m, values - mean, 0) ** 2).sum(axes, keepdims=True) / count
    invstd = 1 / np.sqrt(var + precision(eps))
    shape = (1, values.shape[1], values.shape[2], 1)
    gamma = _per_channel(weight, 1.0, channels, precision).reshape(shape)
    beta = _per_channel(bias, 0.0, channels, precision).reshape(shape)
    y = (values - mean) * invstd * gamma + beta
    saved_shape = mean.shape[:2] if num_groups is not None else (channels,)
    return (
        _unmasked(y, m, x, axis, padding),
        *(statistic.reshape(saved_shape) for statistic in (mean, var, invstd)),
    )


def masked_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mask: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    num_groups: int | None = None,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    training: bool = True,
    padding: str = "zeros",
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """Dx, dweight and dbias of `masked_norm_forward`; sums are over the values that count.

    With g = dy * weight: dx = invstd * (g - sum(g) / M - xhat * sum(g * xhat) / M) where m is 1, or
    invstd * g of constant statistics; dweight = sum(dy * xhat), dbias = sum(dy).
    """
    values, m, count, axes = _masked_groups(x, mask, num_groups, axis, precision)
    upstream = _masked_groups(dy, mask, num_groups, axis, precision)[0]
    shape = (-1 if num_groups is not None else 1, values.shape[1], 1, 1)
    center, inverse = (np.asarray(saved, precision).reshape(shape) for saved in (mean, invstd))
    xhat = np.where(m, (values - center) * inverse, 0)
    gamma = _per_channel(weight, 1.0, np.shape(x)[axis], precision).reshape(
        1, *values.shape[1:3], 1
    )
    g = upstream * gamma
    dx = g
    if training:
        sums = (term.sum(axes, keepdims=True) / count for term in (g, g * xhat))
        dx = g - next(sums) - xhat * next(sums)
    return (
        _unmasked(dx * inverse, m, dy, axis, padding),
        (upstream * xhat).sum((0, 3)).reshape(-1),
        upstream.sum((0, 3)).reshape(-1),
    )


def _for_rows(value: ArrayLike | None, default: float, x: Array, axes: tuple[int, ...]) -> Array:
    """One value for each element of a row, shaped to broadcast against x."""
    if value is None:
        return np.full((), default, x.dtype)
    order = sorted(range(len(axes)), key=axes.__getitem__)
    shape = [x.shape[d] if d in axes else 1 for d in range(x.ndim)]
    return np.asarray(value, x.dtype).transpose(order).reshape(shape)


def layer_norm_forward(
    x: ArrayLike,
    axes: tuple[int, ...],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    centred: bool = True,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """Y = weight * (x - mean) * invstd + bias over `axes`; mean is 0 where it is not `centred`."""
    x = np.asarray(x, precision)
    mean = x.mean(axes, keepdims=True)
    mean = mean if centred else np.zeros_like(mean)
    invstd = 1 / np.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + precision(eps))
    y = (x - mean) * invstd * _for_rows(weight, 1.0, x, axes) + _for_rows(bias, 0.0, x, axes)
    return y, mean.squeeze(axes), invstd.squeeze(axes)


def layer_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    axes: tuple[int, ...],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    centred: bool = True,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """dx, dweight and dbias; with g = dy * weight and xhat = (x - mean) * invstd.

    dx = invstd * (g - mean(g) - xhat * mean(g * xhat)) over every row, without mean(g) where it is
    not `centred`; dweight = sum(dy * xhat) and dbias = sum(dy) over all rows.
    """
    dy, x = np.asarray(dy, precision), np.asarray(x, precision)
    row_axes = tuple(sorted(axes))
    mean = np.expand_dims(np.asarray(mean, precision), row_axes)
    scale = np.expand_dims(np.asarray(invstd, precision), row_axes)
    xhat = (x - mean) * scale
    g = dy * _for_rows(weight, 1.0, x, axes)
    dx = g - xhat * (g * xhat).mean(axes, keepdims=True)
    if centred:
        dx = dx - g.mean(axes, keepdims=True)
    rows = tuple(d for d in range(x.ndim) if d not in axes)
    turn = [sorted(axes).index(d) for d in axes]
    return dx * scale, (dy * xhat).sum(rows).transpose(turn), dy.sum(rows).transpose(turn)


def filter_response_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    tau: ArrayLike | None = None,
    eps: float = 1e-6,
    learned_eps: ArrayLike = 0.0,
    *,
    axis: int = 1,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """Z = max(y, tau), y = weight * x * invrms + bias, and invrms of every channel and sample."""
    x = np.asarray(x, precision)
    channels = x.shape[axis]
    axes = tuple(d for d in range(1, x.ndim) if d != axis % x.ndim)
    added_eps = np.broadcast_to(np.abs(np.asarray(learned_eps, precision)), channels)
    nu2 = (x**2).mean(axes, keepdims=True)
    invrms = 1 / np.sqrt(nu2 + precision(eps) + _along(axis, x.ndim, added_eps))
    gamma = _along(axis, x.ndim, _per_channel(weight, 1.0, channels, precision))
    y = gamma * x * invrms + _along(axis, x.ndim, _per_channel(bias, 0.0, channels, precision))
    least = _per_channel(tau, -np.inf, channels, precision)
    return np.maximum(y, _along(axis, x.ndim, least)), y, invrms.squeeze(axes)


def filter_response_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    invrms: ArrayLike,
    weight: ArrayLike | None = None,
    tau: ArrayLike | None = None,
    *,
    axis: int = 1,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array, Array, Array]:
    """dx, dweight, dbias, dtau, and the gradient of the eps of each channel; y is before tau.

    With g = weight * dy where y >= tau, else 0, and xhat = x * invrms:
    dx = invrms * (g - xhat * mean(g * xhat)), deps = sum(-invrms**2 / 2 * g * xhat).
    """
    dy, x = np.asarray(dy, precision), np.asarray(x, precision)
    channels = x.shape[axis]
    axes = tuple(d for d in range(1, x.ndim) if d != axis % x.ndim)
    scale = np.expand_dims(np.asarray(invrms, precision), axes)
    gamma = _along(axis, x.ndim, _per_channel(weight, 1.0, channels, precision))
    mask = np.asarray(y) >= _along(axis, x.ndim, _per_channel(tau, -np.inf, channels, precision))
    d, xhat = np.where(mask, dy, 0), x * scale
    products = (gamma * d * xhat).mean(axes, keepdims=True)
    dx = scale * (gamma * d - xhat * products)
    all_axes = (0, *axes)
    deps = (-(scale**2) / 2 * gamma * d * xhat).sum(all_axes)
    return dx, (d * xhat).sum(all_axes), d.sum(all_axes), (dy - d).sum(all_axes), deps


def _columns(x: Array, num_groups: int, axis: int) -> Array:
    """(G, C / G, samples) of an array whose channels are along `axis`."""
    channels = x.shape[axis]
    return np.moveaxis(x, axis, 0).reshape(num_groups, channels // num_groups, -1)


def root_by_eigenvalues(covariance: Array) -> Array:
    """W = D diag(1 / sqrt(l)) D.T, the symmetric one with W covariance W = I."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
    root: Array = (vectors / np.sqrt(eigenvalues)) @ vectors.T
    return root


def root_by_iterations(covariance: Array, iterations: int) -> Array:
    """sqrt(r) P_T, where P_k = (3 P_(k-1) - P_(k-1)**3 S) / 2, S = r covariance, r = 1 / trace."""
    trace = np.trace(covariance)
    iterate = np.eye(len(covariance))
    for _ in range(iterations):
        cube = np.linalg.matrix_power(iterate, 3)
        iterate = (3 * iterate - cube @ covariance / trace) / 2
    root: Array = iterate / np.sqrt(trace)
    return root


def whitening_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    num_groups: int = 1,
    iterations: int | None = None,
    axis: int = 1,
) -> tuple[Array, Array, Array, Array]:
    """Y = weight * (W (x - mean)) + bias for the columns of each group; mean, W and covariance.

    W is the inverse root of covariance + eps I: by so many iterations, or by eigenvalues.
    """
    x = np.asarray(x, np.float64)
    columns = _columns(x, num_groups, axis)
    mean = columns.mean(2)
    centred = columns - mean[..., None]
    covariance = centred @ centred.swapaxes(1, 2) / columns.shape[2]
    shifted = covariance + eps * np.eye(columns.shape[1])
    if iterations is None:
        matrix = np.stack([root_by_eigenvalues(group) for group in shifted])
    else:
        matrix = np.stack([root_by_iterations(group, iterations) for group in shifted])
    whitened = (matrix @ centred).reshape(np.moveaxis(x, axis, 0).shape)
    channels = x.shape[axis]
    gamma = _along(axis, x.ndim, _per_channel(weight, 1.0, channels, np.float64))
    beta = _along(axis, x.ndim, _per_channel(bias, 0.0, channels, np.float64))
    y: Array = gamma * np.moveaxis(whitened, 0, axis) + beta
    return y, mean.reshape(-1), matrix, covariance


def _over_filters(w: Array, axis: int | None) -> tuple[int, ...]:
    return tuple(range(w.ndim)) if axis is None else _other_axes(axis, w.ndim)


def weight_norm_forward(
    v: ArrayLike,
    g: ArrayLike,
    dim: int | None = 0,
    eps: float = 0.0,
    *,
    precision: Any = np.float64,
) -> tuple[Array, Array]:
    """W = g * v / max(norm, eps), norm = sqrt(sum(v**2)) over all axes but `dim`, or over all."""
    v = np.asarray(v, precision)
    norm = np.sqrt((v**2).sum(_over_filters(v, dim), keepdims=True))
    w = np.asarray(g, precision).reshape(norm.shape) * v / np.maximum(norm, precision(eps))
    return w, norm.ravel()


def weight_norm_backward(
    dw: ArrayLike,
    v: ArrayLike,
    g: ArrayLike,
    norm: ArrayLike,
    dim: int | None = 0,
    eps: float = 0.0,
    *,
    precision: Any = np.float64,
) -> tuple[Array, Array]:
    """dv, dg = g / norm * (dw - v * sum(dw * v) / norm**2), sum(dw * v) / norm.

    Where norm is less than eps: g / eps * dw, sum(dw * v) / eps.
    """
    dw, v = np.asarray(dw, precision), np.asarray(v, precision)
    products = (dw * v).sum(_over_filters(v, dim), keepdims=True)
    length = np.asarray(norm, precision).reshape(products.shape)
    divisor = np.maximum(length, precision(eps))
    scale = np.asarray(g, precision).reshape(products.shape) / divisor
    pulled = np.where(length < precision(eps), 0, v * products / divisor**2)
    return scale * (dw - pulled), (products / divisor).ravel()


def _standardized(
    w: Array, mean: Array, divisor: Array, gain: ArrayLike | None, axis: int
) -> Array:
    weight = _per_channel(gain, 1.0, mean.size, w.dtype)
    y: Array = _along(axis, w.ndim, weight / divisor) * (w - _along(axis, w.ndim, mean))
    return y


def _standardized_backward(
    dy: ArrayLike,
    w: Array,
    mean: ArrayLike,
    divisor: Array,
    slope: Array,
    gain: ArrayLike | None,
    axis: int,
) -> tuple[Array, Array]:
    """(dw, dgain); the derivative of the divisor is `slope` times w - mean."""
    dy = np.asarray(dy, w.dtype)
    axes = _other_axes(axis, w.ndim)
    centred = w - _along(axis, w.ndim, np.asarray(mean, w.dtype))
    products = (dy * centred).sum(axes)
    weight = _per_channel(gain, 1.0, products.size, w.dtype)
    pulled = centred * _along(axis, w.ndim, products * slope / divisor)
    dw = dy - dy.mean(axes, keepdims=True) - pulled
    return _along(axis, w.ndim, weight / divisor) * dw, products / divisor


def weight_standardization_forward(
    w: ArrayLike,
    gain: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 0,
    eps_inside: bool = True,
    unbiased: bool = False,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """Y = gain * (w - mean) / sqrt(std**2 + eps), or / (std + eps); std**2 = m2 / (K or K - 1)."""
    w = np.asarray(w, precision)
    count, mean, m2 = moments(w, axis, precision)
    std = np.sqrt(m2 / precision(count - unbiased))
    divisor = np.sqrt(std**2 + precision(eps)) if eps_inside else std + precision(eps)
    return _standardized(w, mean, divisor, gain, axis), mean, std


def weight_standardization_backward(
    dy: ArrayLike,
    w: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike,
    gain: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 0,
    eps_inside: bool = True,
    unbiased: bool = False,
    precision: Any = np.float64,
) -> tuple[Array, Array]:
    """dw, dgain = gain / D * (dy - mean(dy) - c * sum(dy * c) * d / D), sum(dy * c) / D.

    c = w - mean, D = sqrt(std**2 + eps) or std + eps, and d * c is the derivative of D.
    """
    w, std = np.asarray(w, precision), np.asarray(std, precision)
    counted = precision(w.size // std.size - unbiased)
    divisor = np.sqrt(std**2 + precision(eps)) if eps_inside else std + precision(eps)
    slope = 1 / (counted * (divisor if eps_inside else std))
    return _standardized_backward(dy, w, mean, divisor, slope, gain, axis)


def scaled_weight_standardization_forward(
    w: ArrayLike,
    gain: ArrayLike | None = None,
    gamma: float = 1.0,
    eps: float = 1e-4,
    *,
    axis: int = 0,
    floor: bool = True,
    precision: Any = np.float64,
) -> tuple[Array, Array, Array]:
    """Y = gain * gamma * (w - mean) / sqrt(max(K std**2, eps)), or / sqrt(K (std**2 + eps))."""
    w = np.asarray(w, precision)
    count, mean, m2 = moments(w, axis, precision)
    least = precision(eps)
    squares = np.maximum(m2, least) if floor else m2 + precision(count) * least
    divisor = np.sqrt(squares) / precision(gamma)
    return _standardized(w, mean, divisor, gain, axis), mean, np.sqrt(m2 / precision(count))


def scaled_weight_standardization_backward(
    dy: ArrayLike,
    w: ArrayLike,
    mean: ArrayLike,
    std: ArrayLike,
    gain: ArrayLike | None = None,
    gamma: float = 1.0,
    eps: float = 1e-4,
    *,
    axis: int = 0,
    floor: bool = True,
    precision: Any = np.float64,
) -> tuple[Array, Array]:
    """As `weight_standardization_backward`, D = sqrt(max(K std**2, eps)) / gamma and so on.

    Where eps is the larger, D is a constant: d = 0.
    """
    w, least = np.asarray(w, precision), precision(eps)
    count = precision(w.size // np.size(std))
    m2 = count * np.asarray(std, precision) ** 2
    squares = np.maximum(m2, least) if floor else m2 + count * least
    divisor = np.sqrt(squares) / precision(gamma)
    constant = (m2 <= least) & floor
    slope = np.where(constant, 0, 1 / (divisor * precision(gamma) ** 2))
    return _standardized_backward(dy, w, mean, divisor, slope, gain, axis)


def _as_matrix(w: Array, dim: int) -> Array:
    return np.moveaxis(w, dim, 0).reshape(w.shape[dim], -1)


def spectral_norm_forward(
    w: ArrayLike,
    u: ArrayLike,
    v: ArrayLike,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    *,
    dim: int = 0,
    v_first: bool = False,
    precision: Any = np.float64,
) -> tuple[Array, Any, Array, Array]:
    """Y = w / sigma, sigma = u . W v, after u = n(W v), v = n(W.T u) so many times; and u and v.

    n(z) = z / max(||z||, eps); W has a row for each index of `dim`.
    """
    w, u, v = (np.asarray(a, precision) for a in (w, u, v))
    matrix = _as_matrix(w, dim)

    def normalized(z: Array) -> Array:
        unit: Array = z / np.maximum(np.sqrt((z**2).sum()), precision(eps))
        return unit

    for _ in range(n_power_iterations):
        if v_first:
            v = normalized(matrix.T @ u)
        u = normalized(matrix @ v)
        if not v_first:
            v = normalized(matrix.T @ u)
    sigma = u @ (matrix @ v)
    return w / sigma, sigma, u, v


def spectral_norm_backward(
    dy: ArrayLike,
    w: ArrayLike,
    sigma: ArrayLike,
    u: ArrayLike,
    v: ArrayLike,
    *,
    dim: int = 0,
    precision: Any = np.float64,
) -> Array:
    """dw, which is (dy - sum(dy * w) / sigma * u v.T) / sigma."""
    dy, w, u, v = (np.asarray(a, precision) for a in (dy, w, u, v))
    length = np.asarray(sigma, precision)
    along = (dy * w).sum() / length
    made = (_as_matrix(dy, dim) - along * np.outer(u, v)) / length
    moved = np.moveaxis(dy, dim, 0)
    return np.moveaxis(made.reshape(moved.shape), 0, dim)
