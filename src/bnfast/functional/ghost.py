"""Ghost batch normalization: what it means, its defaults, its documentation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._primitives import PER_SAMPLE
from bnfast._typing import Array, Float, Parameter


@in_default_float_mode
def ghost_batch_norm(
    x: NDArray[Float],
    ghost_size: int,
    running_mean: Parameter | None = None,
    running_var: Parameter | None = None,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    unbiased: bool = True,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Normalize parts of a batch as if each were a batch: a large batch trained like small ones.

    Parameters
    ----------
    x : array (N, C, ...) of float32 or float64, at least 2-d
        N samples along axis 0, C channels along `axis`. Any strides.
    ghost_size : int
        How many samples make a part: neighbouring ones; the last part may have fewer.
    running_mean, running_var, weight, bias, training, momentum, eps, axis, unbiased, out
        As in `batch_norm`; the running statistics take one part after the other.

    Returns
    -------
    array like `x`
        `out`, or a new array laid out like `x`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value, or one value per channel of a part
        where there is a running_var to update and it is unbiased; before anything is written.

    Warns
    -----
    RuntimeWarning
        As `batch_norm`.

    Notes
    -----
    In training, `batch_norm` of ``x[:ghost_size]``, ``x[ghost_size : 2 * ghost_size]`` and so on;
    in evaluation, `batch_norm`.

    References
    ----------
    E. Hoffer, I. Hubara, D. Soudry, 2017, "Train longer, generalize better: closing the
    generalization gap in large batch training of neural networks", arXiv:1705.08741.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0], [3.0], [10.0], [30.0]], dtype=np.float32)
    >>> bnfast.ghost_batch_norm(x, 2, training=True).round(3)
    array([[-1.],
           [ 1.],
           [-1.],
           [ 1.]], dtype=float32)
    """
    array, channels = _validation.channel_axis_of_samples(x, axis)
    unbiased = _validation.flag("unbiased", unbiased)
    if not _validation.flag("training", training):
        _validation.integer_from("ghost_size", ghost_size, 1)
        _validation.real("momentum", momentum)
        return _primitives.scale_shift(
            x, axis, running_mean, running_var, weight, bias, eps, None, out
        )
    new = _validation.real("momentum", momentum)
    tracked = _validation.running_statistics(running_mean, running_var, array, channels)
    y, _, _ = train_on_ghosts(
        array, ghost_size, tracked, weight, bias, lambda _: new, eps, axis, unbiased, out
    )
    return y


def train_on_ghosts(
    x: Array,
    ghost_size: object,
    tracked: tuple[Array, Array] | None,
    weight: object,
    bias: object,
    weight_of_new_ghost: Callable[[int], float],
    eps: object,
    axis: int,
    unbiased: bool,
    out: object,
) -> tuple[Array, Array, Array]:
    """Return y, mean and invstd of all parts, which the running statistics take one by one.

    A part, counted from 1, has the weight in them that the function says.
    """
    if tracked is not None and out is not None:
        statistics = {"running_mean": tracked[0], "running_var": tracked[1]}
        _validation.output(out, x, {"x": x, **statistics})
    tracks_unbiased = tracked is not None and bool(unbiased)
    y, *of_ghosts = _of_ghosts(x, ghost_size, weight, bias, eps, axis, tracks_unbiased, out)
    mean, invstd, m2, counts = of_ghosts
    if tracked is not None and x.size > 0:
        for number, count in enumerate(counts.tolist()):
            new, divisor = weight_of_new_ghost(number + 1), float(count - tracks_unbiased)
            _primitives.update_running(tracked, new, mean[number], m2[number], divisor)
    return y, mean, invstd


@in_default_float_mode
def ghost_batch_norm_forward(
    x: NDArray[Float],
    ghost_size: int,
    weight: Parameter | None = None,
    bias: Parameter | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], NDArray[np.float64], NDArray[np.float64]]:
    """Normalize parts of a batch, and return their statistics for the backward pass.

    Parameters
    ----------
    x, ghost_size, weight, bias, eps, axis, out
        As in `ghost_batch_norm` in training.

    Returns
    -------
    y : array like `x`
        The normalized batch.
    mean, invstd : array (B, C) of float64
        mu and 1 / sqrt(var + eps) of each of the B parts.

    Raises
    ------
    TypeError, ValueError
        As `ghost_batch_norm`.

    Notes
    -----
    What it does stands in `ghost_batch_norm`.

    References
    ----------
    E. Hoffer, I. Hubara, D. Soudry, 2017, arXiv:1705.08741.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> y, mean, invstd = bnfast.ghost_batch_norm_forward(np.array([[1.0], [3.0], [5.0], [9.0]]), 2)
    >>> mean
    array([[2.],
           [7.]])
    """
    array, _ = _validation.channel_axis_of_samples(x, axis)
    y, mean, invstd, _, _ = _of_ghosts(array, ghost_size, weight, bias, eps, axis, False, out)
    return y, mean, invstd


@in_default_float_mode
def ghost_batch_norm_backward(
    dy: NDArray[Float],
    x: NDArray[Float],
    ghost_size: int,
    mean: Parameter,
    invstd: Parameter,
    weight: Parameter | None = None,
    *,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Parameter, Parameter]:
    """Return the gradients of ghost batch normalization: of its input, weight and bias.

    Parameters
    ----------
    dy : array like `x`
        The gradient of the output.
    x, ghost_size, weight, axis
        As in the forward pass.
    mean, invstd : array (B, C) of float32 or float64
        What the forward pass returned.
    out : array like `x`, optional
        Where to write dx: `dy` or `x` itself, or an array that shares no element with either.

    Returns
    -------
    dx : array like `x`
        The gradient of the input.
    dweight, dbias : array (C,)
        The gradients of weight and bias, of the dtype of `weight`, or of `x` where it is None.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    `batch_norm_backward` of each part; dweight and dbias are the sums of theirs.

    References
    ----------
    E. Hoffer, I. Hubara, D. Soudry, 2017, arXiv:1705.08741.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0], [3.0], [5.0], [9.0]])
    >>> y, mean, invstd = bnfast.ghost_batch_norm_forward(x, 2)
    >>> dx, dweight, dbias = bnfast.ghost_batch_norm_backward(y, x, 2, mean, invstd)
    >>> dbias
    array([0.])
    """
    array, channels = _validation.channel_axis_of_samples(x, axis)
    upstream = _validation.upstream_gradient(dy, array)
    size = min(_validation.integer_from("ghost_size", ghost_size, 1), max(len(array), 1))
    parts = -(-len(array) // size)
    centre = _validation.saved_statistic("mean", mean, (parts, channels))
    inverse = _validation.saved_statistic("invstd", invstd, (parts, channels))
    own = _validation.channel_parameter("weight", weight, channels)
    if out is None:
        dx = _primitives.empty_output(array)
    else:
        others = {"dy": upstream, "x": array, "weight": weight, "mean": mean, "invstd": invstd}
        dx = _validation.output(out, array, others)
    whole = len(array) // size
    sums = np.zeros((2, channels))
    # Float64, so that the gradients of parts are not rounded before they are added up.
    wide = np.ones(channels) if own is None else own.astype(np.float64)
    for taken, x_part, dy_part, dx_part in zip(
        (slice(whole), slice(whole, None)),
        *(_split(a, size) for a in (array, upstream, dx)),
        strict=True,
    ):
        if x_part.size:
            _, *gradients = _primitives.gradient(
                *(dy_part, x_part, _moved(array, axis), centre[taken], inverse[taken], wide),
                *(False, dx_part, PER_SAMPLE),
            )
            with np.errstate(all="ignore"):
                sums += gradients
    dtype = array.dtype if own is None else own.dtype
    with np.errstate(all="ignore"):
        dweight, dbias = sums.astype(dtype)
    return dx, dweight, dbias


def _split(x: Array, size: int) -> tuple[Array, Array]:
    """Return views: the whole parts, and the rest as one part, each with an axis of parts first."""
    _validation.room_for_axes("x", x, 1)
    whole = len(x) // size
    return x[: whole * size].reshape(whole, size, *x.shape[1:]), x[None, whole * size :]


def _moved(x: Array, axis: int) -> int:
    """Return the channel axis beside an axis of parts."""
    return axis % x.ndim + 1


def _of_ghosts(
    x: Array,
    ghost_size: object,
    weight: object,
    bias: object,
    eps: object,
    axis: int,
    unbiased: bool,
    out: object,
) -> tuple[Array, Array, Array, Array, Array]:
    """Return y, and of every part the mean, invstd and m2 (float64), and the values per channel."""
    size = min(_validation.integer_from("ghost_size", ghost_size, 1), max(len(x), 1))
    epsilon = _validation.epsilon(eps, training=True)
    channels = x.shape[axis] if x.ndim > 1 else 0
    scale = _validation.channel_parameter("weight", weight, channels)
    shift = _validation.channel_parameter("bias", bias, channels)
    if out is None:
        y = _primitives.empty_output(x)
    else:
        y = _validation.output(out, x, {"x": x, "weight": weight, "bias": bias})
    parts = -(-len(x) // size)
    mean, invstd, m2 = np.zeros((3, parts, channels))
    counts = np.zeros(parts, np.intp)
    pieces = list(
        zip(
            (slice(len(x) // size), slice(len(x) // size, None)),
            _split(x, size),
            _split(y, size),
            strict=True,
        )
    )
    each = x[0].size // channels if channels and len(x) else 0
    for taken, x_part, _ in pieces:
        counts[taken] = values = each * x_part.shape[1] if len(x_part) else 0
        _validation.enough_values("x", x, values, "channel of a ghost", unbiased=unbiased)
    for taken, x_part, y_part in pieces:
        if x_part.size:
            _, mean[taken], invstd[taken] = _primitives.normalize(
                *(x_part, _moved(x, axis), scale, shift, epsilon),
                out=y_part,
                over=PER_SAMPLE,
                m2=m2[taken],
            )
    return y, mean, invstd, m2, counts
