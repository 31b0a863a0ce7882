"""Derivatives besides the backward pass: along a direction (jvp), and of that pass itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives, _second_order, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._primitives import GROUPS, PER_SAMPLE
from bnfast._second_order import Groups, Upstream
from bnfast._typing import Array, ArrayLikeOf, Float


@in_default_float_mode
def batch_norm_jvp(
    dx: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    training: bool = True,
) -> NDArray[Float]:
    """Return the derivative of batch normalization along a direction of its input.

    Parameters
    ----------
    dx : array like `x`
        The direction, forward mode's tangent of `x`.
    x, mean, invstd, weight, axis, training
        As in `batch_norm_backward`.

    Returns
    -------
    array like `x`
        The tangent of the output. Those of the parameters add ``xhat * dweight + dbias`` to it.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    With xhat = (x - mean) * invstd and means over all axes but `axis`::

        dy = weight * invstd * (dx - mean(dx) - xhat * mean(dx * xhat))

    the backward pass's formula, because the Jacobian of xhat is symmetric. In evaluation, without
    the means.

    References
    ----------
    S. Ioffe, C. Szegedy, 2015, arXiv:1502.03167, section 3.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x, dx = np.array([[1.0], [2.0], [6.0]]), np.array([[0.0], [0.0], [1.0]])
    >>> y, mean, invstd = bnfast.batch_norm_forward(x)
    >>> step = bnfast.batch_norm_forward(x + 1e-6 * dx)[0] - y
    >>> np.allclose(bnfast.batch_norm_jvp(dx, x, mean, invstd), step / 1e-6, atol=1e-5)
    True
    """
    array, _, _ = _validation.batch("x", x, axis)
    _validation.full_precision("x", array)
    tangent = _validation.upstream_gradient(dx, array, ("dx", "x"))
    constant = not _validation.flag("training", training)
    dy, _, _ = _primitives.gradient(tangent, array, axis, mean, invstd, weight, constant, None)
    return dy


@in_default_float_mode
def layer_norm_jvp(
    dx: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] | None = None,
) -> NDArray[Float]:
    """Return the derivative of layer normalization along a direction of its input.

    Parameters
    ----------
    dx : array like `x`
        The direction, forward mode's tangent of `x`.
    x, normalized_shape, mean, invstd, weight, axis
        As in `layer_norm_backward`.

    Returns
    -------
    array like `x`
        The tangent of the output. Those of the parameters add ``xhat * dweight + dbias`` to it.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    The formula of `batch_norm_jvp`, with means over the elements of a row.

    References
    ----------
    J. L. Ba, J. R. Kiros, G. E. Hinton, 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]])
    >>> y, mean, invstd = bnfast.layer_norm_forward(x, 2)
    >>> bnfast.layer_norm_jvp(np.ones_like(x), x, 2, mean, invstd)
    array([[0., 0.],
           [0., 0.]])
    """
    return _row_jvp(dx, x, normalized_shape, axis, mean, invstd, weight, True)


@in_default_float_mode
def rms_norm_jvp(
    dx: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    invrms: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] | None = None,
) -> NDArray[Float]:
    """Return the derivative of RMS normalization along a direction of its input.

    Parameters
    ----------
    dx : array like `x`
        The direction, forward mode's tangent of `x`.
    x, normalized_shape, invrms, weight, axis
        As in `rms_norm_backward`.

    Returns
    -------
    array like `x`
        The tangent of the output. That of the weight adds ``xhat * dweight`` to it.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    With xhat = x * invrms and means over the elements of a row::

        dy = weight * invrms * (dx - xhat * mean(dx * xhat))

    References
    ----------
    B. Zhang, R. Sennrich, 2019, arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[3.0, 4.0]])
    >>> y, invrms = bnfast.rms_norm_forward(x, 2, eps=0.0)
    >>> bnfast.rms_norm_jvp(x, x, 2, invrms).round(12)  # a longer row has the same output
    array([[0., 0.]])
    """
    return _row_jvp(dx, x, normalized_shape, axis, None, invrms, weight, False)


@in_default_float_mode
def group_norm_jvp(
    dx: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    per_group: bool = False,
) -> NDArray[Float]:
    """Return the derivative of group normalization along a direction of its input.

    Parameters
    ----------
    dx : array like `x`
        The direction, forward mode's tangent of `x`.
    x, mean, invstd, weight, axis, per_group
        As in `group_norm_backward`.

    Returns
    -------
    array like `x`
        The tangent of the output. Those of the parameters add ``xhat * dweight + dbias`` to it.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    The formula of `batch_norm_jvp`, with means over the values of a group of a sample.

    References
    ----------
    Y. Wu, K. He, 2018, arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> y, mean, invstd = bnfast.group_norm_forward(x, 2)
    >>> bnfast.group_norm_jvp(np.ones_like(x), x, mean, invstd)
    array([[0., 0., 0., 0.]])
    """
    if _validation.flag("per_group", per_group):
        _, channels = _validation.channel_axis_of_samples(x, axis)
        groups = _validation.groups_of_statistics("mean", mean, channels) if channels else 1
        together = max(channels // groups, 1)
        weight = _validation.of_each_channel("weight", weight, channels, together)
    return _sample_jvp(dx, x, axis, mean, invstd, weight, grouped=True)


@in_default_float_mode
def instance_norm_jvp(
    dx: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
) -> NDArray[Float]:
    """Return the derivative of instance normalization along a direction of its input.

    Parameters
    ----------
    dx : array like `x`
        The direction, forward mode's tangent of `x`.
    x, mean, invstd, weight, axis
        As in `instance_norm_backward`.

    Returns
    -------
    array like `x`
        The tangent of the output. Those of the parameters add ``xhat * dweight + dbias`` to it.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    The formula of `batch_norm_jvp`, with means over the values of a channel of a sample.

    References
    ----------
    D. Ulyanov, A. Vedaldi, V. Lempitsky, 2016, arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[[1.0, 2.0, 6.0]]])
    >>> y, mean, invstd = bnfast.instance_norm_forward(x)
    >>> bnfast.instance_norm_jvp(np.ones_like(x), x, mean, invstd)
    array([[[0., 0., 0.]]])
    """
    return _sample_jvp(dx, x, axis, mean, invstd, weight, grouped=False)


@in_default_float_mode
def batch_norm_double_backward(
    ddx: ArrayLikeOf[Float] | None,
    ddweight: ArrayLike | None,
    ddbias: ArrayLike | None,
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    training: bool = True,
) -> tuple[NDArray[Float], NDArray[Float], Array]:
    """Return the gradients of `batch_norm_backward`: of its dy, x and weight.

    A loss that has gradients in it, such as a gradient penalty, needs them.

    Parameters
    ----------
    ddx : array like `x`, or None
        The gradient of the loss by dx; None for 0, as for the next two.
    ddweight, ddbias : array (C,) of float32 or float64, or None
        The gradients of the loss by dweight and dbias.
    dy, x, mean, invstd, weight, axis, training
        What `batch_norm_backward` was given.

    Returns
    -------
    ddy, dx : array like `x`
        The gradients of the loss by `dy`, and by `x` through dx and dweight; mean and invstd count
        as functions of x unless in evaluation.
    dweight : array (C,)
        The gradient by `weight`, of its dtype, or that of `x` where it is None.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    With xhat = (x - mean) * invstd, means over the M values of a channel, and
    J(g) = invstd * (g - mean(g) - xhat * mean(g * xhat))::

        ddy     = weight * J(ddx) + ddweight * xhat + ddbias
        dx      = J(dy * (ddweight - weight * invstd * mean(ddx * xhat)))
                  - weight * invstd * (J(ddx) * mean(dy * xhat) + xhat * mean(dy * J(ddx)))
        dweight = sum(dy * J(ddx))

    References
    ----------
    S. Ioffe, C. Szegedy, 2015, arXiv:1502.03167, section 3, differentiated once more. A gradient
    penalty: I. Gulrajani et al., 2017, "Improved Training of Wasserstein GANs", arXiv:1704.00028.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> y, mean, invstd = bnfast.batch_norm_forward(x)
    >>> gradient, _, _ = bnfast.batch_norm_backward(dy, x, mean, invstd)
    >>> # of the penalty sum(gradient**2)
    >>> ddy, dx, dweight = bnfast.batch_norm_double_backward(
    ...     2 * gradient, None, None, dy, x, mean, invstd
    ... )
    >>> dx.round(4).ravel()
    array([-0.0102,  0.0128, -0.0026])
    """
    array, channel_axis, channels = _validation.batch("x", x, axis)
    _validation.full_precision("x", array)
    upstream = _validation.upstream_gradient(dy, array)
    own = _validation.channel_parameter("weight", weight, channels)
    ddy, dx, dweight = _second_order.of_channels(
        Upstream(
            _tangent("ddx", ddx, array),
            _wide(_validation.channel_parameter("ddweight", ddweight, channels), (channels,)),
            _wide(_validation.channel_parameter("ddbias", ddbias, channels), (channels,)),
        ),
        upstream,
        array,
        channel_axis,
        _wide(_validation.required_channel_parameter("mean", mean, channels), (channels,)),
        _wide(_validation.required_channel_parameter("invstd", invstd, channels), (channels,)),
        _wide(own, (channels,), 1.0),
        _validation.flag("training", training),
    )
    return ddy, dx, _validation.rounded_gradient("weight", weight, dweight, array)


@in_default_float_mode
def layer_norm_double_backward(
    ddx: ArrayLikeOf[Float] | None,
    ddweight: ArrayLike | None,
    ddbias: ArrayLike | None,
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] | None = None,
) -> tuple[NDArray[Float], NDArray[Float], Array]:
    """Return the gradients of `layer_norm_backward`: of its dy, x and weight.

    Parameters
    ----------
    ddx : array like `x`, or None
        The gradient of the loss by dx; None for 0, as for the next two.
    ddweight, ddbias : array of `normalized_shape`, of float32 or float64, or None
        The gradients of the loss by dweight and dbias.
    dy, x, normalized_shape, mean, invstd, weight, axis
        What `layer_norm_backward` was given.

    Returns
    -------
    ddy, dx : array like `x`
        The gradients of the loss by `dy`, and by `x`, of which mean and invstd are functions.
    dweight : array of `normalized_shape`
        The gradient by `weight`, of its dtype, or that of `x` where it is None.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    With g = dy * weight, xhat = (x - mean) * invstd, means over the elements of a row, and
    J(u) = invstd * (u - mean(u) - xhat * mean(u * xhat))::

        ddy     = weight * J(ddx) + ddweight * xhat + ddbias
        dx      = J(dy * ddweight - invstd * (g * mean(ddx * xhat) + ddx * mean(g * xhat)))
                  - invstd * xhat * mean(g * J(ddx))
        dweight = sum(dy * J(ddx)) over all rows

    References
    ----------
    J. L. Ba, J. R. Kiros, G. E. Hinton, 2016, arXiv:1607.06450, differentiated twice.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 2.0, 6.0]])
    >>> dy = np.array([[1.0, 0.0, 0.0]])
    >>> y, mean, invstd = bnfast.layer_norm_forward(x, 3)
    >>> gradient, _, _ = bnfast.layer_norm_backward(dy, x, 3, mean, invstd)
    >>> ddy, dx, dweight = bnfast.layer_norm_double_backward(
    ...     2 * gradient, None, None, dy, x, 3, mean, invstd
    ... )
    >>> dx.round(4)
    array([[-0.0102,  0.0128, -0.0026]])
    """
    return _of_rows(
        ddx, ddweight, ddbias, dy, x, normalized_shape, axis, mean, invstd, weight, True
    )


@in_default_float_mode
def rms_norm_double_backward(
    ddx: ArrayLikeOf[Float] | None,
    ddweight: ArrayLike | None,
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    invrms: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] | None = None,
) -> tuple[NDArray[Float], NDArray[Float], Array]:
    """Return the gradients of `rms_norm_backward`: of its dy, x and weight.

    Parameters
    ----------
    ddx : array like `x`, or None
        The gradient of the loss by dx; None for 0.
    ddweight : array of `normalized_shape`, of float32 or float64, or None
        The gradient of the loss by dweight; None for 0.
    dy, x, normalized_shape, invrms, weight, axis
        What `rms_norm_backward` was given.

    Returns
    -------
    ddy, dx : array like `x`
        The gradients of the loss by `dy`, and by `x`, of which invrms is a function.
    dweight : array of `normalized_shape`
        The gradient by `weight`, of its dtype, or that of `x` where it is None.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    As `layer_norm_double_backward`, with xhat = x * invrms, J(u) = invrms * (u - xhat *
    mean(u * xhat)), and no bias.

    References
    ----------
    B. Zhang, R. Sennrich, 2019, arXiv:1910.07467, differentiated twice.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x, dy = np.array([[3.0, 4.0]]), np.array([[1.0, 0.0]])
    >>> y, invrms = bnfast.rms_norm_forward(x, 2)
    >>> ddy, dx, dweight = bnfast.rms_norm_double_backward(x, None, dy, x, 2, invrms)
    >>> ddy.round(6)
    array([[0., 0.]])
    """
    return _of_rows(ddx, ddweight, None, dy, x, normalized_shape, axis, None, invrms, weight, False)


@in_default_float_mode
def group_norm_double_backward(
    ddx: ArrayLikeOf[Float] | None,
    ddweight: ArrayLike | None,
    ddbias: ArrayLike | None,
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    per_group: bool = False,
) -> tuple[NDArray[Float], NDArray[Float], Array]:
    """Return the gradients of `group_norm_backward`: of its dy, x and weight.

    Parameters
    ----------
    ddx : array like `x`, or None
        The gradient of the loss by dx; None for 0, as for the next two.
    ddweight, ddbias : array (C,) of float32 or float64, or None
        The gradients of the loss by dweight and dbias; of shape (G,) with `per_group`.
    dy, x, mean, invstd, weight, axis, per_group
        What `group_norm_backward` was given.

    Returns
    -------
    ddy, dx : array like `x`
        The gradients of the loss by `dy`, and by `x`, of which mean and invstd are functions.
    dweight : array (C,), or (G,) with `per_group`
        The gradient by `weight`, of its dtype, or that of `x` where it is None.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    The formula of `layer_norm_double_backward`, with means over the values of a group of a sample.

    References
    ----------
    Y. Wu, K. He, 2018, arXiv:1803.08494, differentiated twice.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x, dy = np.array([[1.0, 3.0, 10.0, 30.0]]), np.array([[1.0, 0.0, 0.0, 0.0]])
    >>> y, mean, invstd = bnfast.group_norm_forward(x, 2)
    >>> ddy, dx, dweight = bnfast.group_norm_double_backward(
    ...     None, None, np.ones(4), dy, x, mean, invstd
    ... )
    >>> ddy
    array([[1., 1., 1., 1.]])
    """
    array, channels = _validation.channel_axis_of_samples(x, axis)
    _validation.full_precision("x", array)
    groups = _validation.groups_of_statistics("mean", mean, channels) if channels else 0
    given = ddx, ddweight, ddbias, dy, array, axis, mean, invstd, weight, groups
    return _of_samples(*given, per_group=_validation.flag("per_group", per_group))


@in_default_float_mode
def instance_norm_double_backward(
    ddx: ArrayLikeOf[Float] | None,
    ddweight: ArrayLike | None,
    ddbias: ArrayLike | None,
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
) -> tuple[NDArray[Float], NDArray[Float], Array]:
    """Return the gradients of `instance_norm_backward`: of its dy, x and weight.

    Parameters
    ----------
    ddx, ddweight, ddbias
        As in `group_norm_double_backward`.
    dy, x, mean, invstd, weight, axis
        What `instance_norm_backward` was given.

    Returns
    -------
    ddy, dx : array like `x`
        The gradients of the loss by `dy`, and by `x`, of which mean and invstd are functions.
    dweight : array (C,)
        The gradient by `weight`, of its dtype, or that of `x` where it is None.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    The formula of `layer_norm_double_backward`, with means over the values of a channel of a
    sample.

    References
    ----------
    D. Ulyanov, A. Vedaldi, V. Lempitsky, 2016, arXiv:1607.08022, differentiated twice.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x, dy = np.array([[[1.0, 2.0, 6.0]]]), np.array([[[1.0, 0.0, 0.0]]])
    >>> y, mean, invstd = bnfast.instance_norm_forward(x)
    >>> ddy, dx, dweight = bnfast.instance_norm_double_backward(
    ...     None, None, np.ones(1), dy, x, mean, invstd
    ... )
    >>> ddy
    array([[[1., 1., 1.]]])
    """
    array, channels = _validation.channel_axis_of_samples(x, axis)
    _validation.full_precision("x", array)
    return _of_samples(ddx, ddweight, ddbias, dy, array, axis, mean, invstd, weight, channels)


def _row_jvp(
    dx: object,
    x: object,
    normalized_shape: object,
    axis: object,
    mean: object,
    invstd: object,
    weight: object,
    centred: bool,
) -> Array:
    array, axes = _validation.normalized_axes(x, normalized_shape, axis)
    _validation.full_precision("x", array)
    tangent = _validation.upstream_gradient(dx, array, ("dx", "x"))
    shape = tuple(array.shape[d] for d in axes)
    own = _validation.element_parameter("weight", weight, shape, array.dtype, finite=True)
    dy: Array = _primitives.row_gradient(
        tangent, array, normalized_shape, axis, mean, invstd, None, centred, False, None
    )[0]
    if own is not None:
        rows = _rows(axes, centred).arrange(dy)
        with np.errstate(all="ignore"):
            rows *= own
    return dy


def _sample_jvp(
    dx: object,
    x: object,
    axis: int,
    mean: object,
    invstd: object,
    weight: object,
    *,
    grouped: bool,
) -> Array:
    array, channels = _validation.channel_axis_of_samples(x, axis)
    _validation.full_precision("x", array)
    tangent = _validation.upstream_gradient(dx, array, ("dx", "x"))
    own = _validation.channel_parameter("weight", weight, channels)
    over = GROUPS if grouped else PER_SAMPLE
    dy, _, _ = _primitives.gradient(
        tangent, array, axis, mean, invstd, None, False, None, over, grouped=grouped
    )
    if own is not None:
        shape = [-1 if d == axis % dy.ndim else 1 for d in range(dy.ndim)]
        with np.errstate(all="ignore"):
            dy *= own.astype(dy.dtype).reshape(shape)
    return dy


def _rows(axes: tuple[int, ...], centred: bool) -> Groups:
    last = tuple(range(-len(axes), 0))
    return Groups(lambda array: np.moveaxis(array, axes, last), len(axes), centred)


def _of_rows(
    ddx: object,
    ddweight: object,
    ddbias: object,
    dy: object,
    x: object,
    normalized_shape: object,
    axis: object,
    mean: object,
    invstd: object,
    weight: object,
    centred: bool,
) -> tuple[Array, Array, Array]:
    array, axes = _validation.normalized_axes(x, normalized_shape, axis)
    _validation.full_precision("x", array)
    shape = tuple(array.shape[d] for d in axes)
    numbering = tuple(n for d, n in enumerate(array.shape) if d not in axes)
    inside, outside = (1,) * len(axes), (1,) * len(numbering)

    def parameter(name: str, value: object) -> Array | None:
        return _validation.element_parameter(name, value, shape, array.dtype, finite=True)

    def statistic(name: str, value: object) -> Array:
        return _wide(_validation.saved_statistic(name, value, numbering), numbering + inside)

    upstream = _validation.upstream_gradient(dy, array)
    own = parameter("weight", weight)
    ddy, by_x, by_weight = _second_order.of_groups(
        Upstream(
            _tangent("ddx", ddx, array),
            _wide(parameter("ddweight", ddweight), outside + shape),
            _wide(parameter("ddbias", ddbias), outside + shape),
        ),
        upstream,
        array,
        _rows(axes, centred),
        statistic("mean", mean) if centred else np.zeros(outside + inside),
        statistic("invstd" if centred else "invrms", invstd),
        _wide(own, outside + shape, 1.0),
    )
    dweight = _validation.rounded_gradient("weight", weight, by_weight.reshape(shape), array)
    return ddy, by_x, dweight


def _of_samples(
    ddx: object,
    ddweight: object,
    ddbias: object,
    dy: object,
    x: Array,
    axis: int,
    mean: object,
    invstd: object,
    weight: object,
    groups: int,
    *,
    per_group: bool = False,
) -> tuple[Array, Array, Array]:
    """Return them where a group is channels and all further axes: views (N, G, C / G, ...)."""
    samples, channels = x.shape[0], x.shape[axis]
    together = channels // groups if groups else 1
    inside = (1,) * (x.ndim - 2)
    parameters = groups if per_group else channels
    broadcast = (1, groups, 1 if per_group else together, *inside)

    def arrange(array: Array) -> Array:
        moved = np.moveaxis(array, axis, 1)
        return moved.reshape(samples, groups, together, *moved.shape[2:])

    def parameter(name: str, value: object) -> Array | None:
        called = "groups" if per_group else "channels"
        return _validation.channel_parameter(name, value, parameters, called)

    def statistic(name: str, value: object) -> Array:
        array = _validation.saved_statistic(name, value, (samples, groups))
        return _wide(array, (samples, groups, 1, *inside))

    upstream = _validation.upstream_gradient(dy, x)
    own = parameter("weight", weight)
    ddy, by_x, by_weight = _second_order.of_groups(
        Upstream(
            _tangent("ddx", ddx, x),
            _wide(parameter("ddweight", ddweight), broadcast),
            _wide(parameter("ddbias", ddbias), broadcast),
        ),
        upstream,
        x,
        Groups(arrange, x.ndim - 1, True),
        statistic("mean", mean),
        statistic("invstd", invstd),
        _wide(own, broadcast, 1.0),
    )
    dweight = _validation.rounded_gradient("weight", weight, by_weight.reshape(parameters), x)
    return ddy, by_x, dweight


def _tangent(name: str, value: object, x: Array) -> Array:
    """Return an array like x; 0 for None, which takes no memory."""
    if value is None:
        return np.broadcast_to(np.zeros((), x.dtype), x.shape)
    return _validation.upstream_gradient(value, x, (name, "x"))


def _wide(array: Array | None, shape: tuple[int, ...], default: float = 0.0) -> Array:
    """Return float64 of this shape."""
    return np.full(shape, default) if array is None else array.astype(np.float64).reshape(shape)
