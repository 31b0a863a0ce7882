"""Batch norm in evaluation, folded into the weight of the linear layer or convolution beside it.

In evaluation batch norm is y = x * scale + shift, channel by channel. A linear layer or convolution
right before it or right after it can absorb both, so that one layer remains of two.

`fold_into_previous` and `fold_into_next` return the weight and bias of that layer, `scale_shift`
returns scale and shift. All three take arrays and return new ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array

__all__ = ["fold_into_next", "fold_into_previous", "scale_shift"]

_OUTPUT, _INPUT = "output", "input"


@in_default_float_mode
def scale_shift(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    bn_weight: ArrayLike | None,
    bn_bias: ArrayLike | None,
    eps: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what batch norm in evaluation multiplies each channel by, and what it then adds.

    Parameters
    ----------
    running_mean, running_var : array (C,)
        The running statistics, of float16, bfloat16, float32 or float64.
    bn_weight, bn_bias : array (C,) or None
        gamma and beta, of the same types; None for 1 and 0.
    eps : float
        Added to the variance. It has no default, because the defaults of frameworks differ, and a
        wrong eps changes the result completely where variances are as small.

    Returns
    -------
    scale, shift : array (C,) of float64

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype or shape, a value that is not finite, or a variance
        that is not positive after `eps` has been added.

    Notes
    -----
    ::

        y     = x * scale + shift
        scale = bn_weight / sqrt(running_var + eps)
        shift = bn_bias - running_mean * scale

    References
    ----------
    B. Jacob et al., 2017, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 3.2.

    Examples
    --------
    >>> import bnfast
    >>> bnfast.folding.scale_shift([3.0], [4.0], [10.0], [1.0], eps=0.0)
    (array([5.]), array([-14.]))
    """
    norm = _evaluation(running_mean, running_var, bn_weight, bn_bias, eps)
    return norm.scale, norm.shift


@in_default_float_mode
def fold_into_previous(
    weight: ArrayLike,
    bias: ArrayLike | None,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    bn_weight: ArrayLike | None,
    bn_bias: ArrayLike | None,
    eps: float,
    *,
    layout: str = "OI...",
    groups: int = 1,
) -> tuple[Array, Array]:
    """Fold batch norm into the linear layer or convolution whose output it normalizes.

    Nothing may stand between the two, no activation either, and nothing else may read the output of
    the layer. Convolutions may be of any stride, padding, dilation and groups, and transposed.

    Parameters
    ----------
    weight : array of float16, bfloat16, float32 or float64, at least 2-d
        Of the layer.
    bias : array (O,) or None
        Of the layer, of any of these types.
    running_mean, running_var, bn_weight, bn_bias, eps
        As in `scale_shift`: C is O, the number of the layer's output channels.
    layout : str
        The axes of `weight`: O has the output channels, I the input channels, other letters (or
        ``...``, any number of axes) are those of the kernel. See the table below.
    groups : int
        The groups of the convolution.

    Returns
    -------
    weight : array like `weight`
    bias : array (O,) of the same dtype

    Raises
    ------
    TypeError, ValueError
        As `scale_shift`; and for a `weight` that does not fit `layout`, `groups` and the number of
        channels, or whose type has no room for the folded values.

    Notes
    -----
    Computed in float64, and rounded once, with o for an output channel::

        weight'[o] = weight[o] * scale[o]
        bias'[o]   = (bias[o] - running_mean[o]) * scale[o] + bn_bias[o]

    ================================  ==================================  ===================
    layer                             ``layout``                          ``groups``
    ================================  ==================================  ===================
    PyTorch, ``Linear``               ``"OI..."``, the default
    PyTorch and ONNX, convolution     ``"OI..."``, the default: OIHW      its own
    PyTorch and ONNX, transposed      ``"IO..."``: IOHW                   its own
    ONNX, ``Gemm`` and ``MatMul``     ``"IO"``, with ``transB`` ``"OI"``
    Keras, ``Dense``                  ``"IO"``
    Keras and Flax, convolution       ``"...IO"``: HWIO                   its own
    Keras, transposed                 ``"...OI"``: HWOI
    Keras, depthwise                  ``"...IO"``                         ``weight.shape[-2]``
    Keras, separable: its pointwise   ``"...IO"``
    ================================  ==================================  ===================

    One of O and I is the axis of the channels of all groups, the other of those of one group. Which
    one follows from the number of channels.

    Batch norm and a linear layer must have the same channel axis: after a ``Linear``,
    ``BatchNorm1d`` can be folded where the output has the shape (N, C), but not where it is
    (N, L, C), because there its channels are along axis 1.

    References
    ----------
    B. Jacob et al., 2017, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", arXiv:1712.05877, section 3.2.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> weight = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    >>> mean, var = [0.0, 1.0], [0.25, 1.0]
    >>> bnfast.folding.fold_into_previous(weight, None, mean, var, None, None, eps=0.0)
    (array([[2., 4.],
           [3., 4.]], dtype=float32), array([ 0., -1.], dtype=float32))
    """
    norm = _evaluation(running_mean, running_var, bn_weight, bn_bias, eps)
    folded = _weight(weight, norm, _OUTPUT, layout, groups)
    old_bias = _bias(bias, len(norm.scale))
    with np.errstate(over="ignore"):  # refused where it is rounded
        folded.multiply(norm.scale)
        new_bias = (old_bias - norm.mean) * norm.scale + norm.bias
    return folded.rounded(new_bias)


@in_default_float_mode
def fold_into_next(
    weight: ArrayLike,
    bias: ArrayLike | None,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    bn_weight: ArrayLike | None,
    bn_bias: ArrayLike | None,
    eps: float,
    *,
    padded: bool,
    layout: str = "OI...",
    groups: int = 1,
) -> tuple[Array, Array]:
    """Fold batch norm into the linear layer or convolution that reads its output.

    Nothing may stand between the two, no activation either, and nothing else may read the output of
    batch norm.

    Parameters
    ----------
    weight, bias
        As in `fold_into_previous`.
    running_mean, running_var, bn_weight, bn_bias, eps
        As in `scale_shift`: C is I, the number of the layer's input channels.
    padded : bool
        Whether the layer reads zeros beside its input: True for a convolution that pads with zeros,
        and for every transposed convolution; False for a linear layer, and for a convolution that
        does not pad, or that pads with what it reads (reflected, replicated, circular).
    layout, groups
        As in `fold_into_previous`.

    Returns
    -------
    weight : array like `weight`
    bias : array (O,) of the same dtype

    Raises
    ------
    TypeError, ValueError
        As `fold_into_previous`; and with `padded`, unless shift is 0 in every channel: the zeros of
        the padding come after batch norm, which would have to leave them zeros.

    Notes
    -----
    Computed in float64, and rounded once, with o for an output channel, i for an input channel and
    k for an element of the kernel::

        weight'[o, i, k] = weight[o, i, k] * scale[i]
        bias'[o]         = bias[o] + sum(weight[o, i, k] * shift[i] over i, k)

    The folded layer multiplies x, not x - running_mean. With means of up to two standard deviations
    from zero, float32 outputs were at most twice as far off as before; with means further from
    zero, products and their rounding errors are larger in proportion.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> weight = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    >>> mean, var = [0.0, 1.0], [0.25, 1.0]
    >>> bnfast.folding.fold_into_next(weight, None, mean, var, None, None, eps=0.0, padded=False)
    (array([[2., 2.],
           [6., 4.]], dtype=float32), array([-2., -4.], dtype=float32))
    """
    norm = _evaluation(running_mean, running_var, bn_weight, bn_bias, eps)
    folded = _weight(weight, norm, _INPUT, layout, groups)
    number_of_outputs = folded.by_group.shape[0] * folded.by_group.shape[1]
    old_bias = _bias(bias, number_of_outputs)
    shift = norm.shift
    if _validation.flag("padded", padded) and np.any(shift):
        channel = int(np.flatnonzero(shift)[0])
        raise ValueError(
            f"batch norm cannot be folded into a layer that pads its input with zeros: they come "
            f"after batch norm, whose shift, bn_bias - running_mean * scale, must be 0 in every "
            f"channel for that, got {shift[channel]} in channel {channel}"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # refused where it is rounded
        added = folded.by_group * folded.of_channels(shift)
        new_bias = old_bias + added.sum(axis=tuple(range(2, added.ndim))).ravel()
        folded.multiply(norm.scale)
    return folded.rounded(new_bias)


class _Evaluation(NamedTuple):
    """Batch norm in evaluation, y = (x - mean) * scale + bias."""

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]
    bias: NDArray[np.float64]

    @property
    def shift(self) -> NDArray[np.float64]:
        """What y is where x is 0."""
        return self.bias - self.mean * self.scale


def _evaluation(
    running_mean: object, running_var: object, bn_weight: object, bn_bias: object, eps: object
) -> _Evaluation:
    mean = _validation.finite_floats("running_mean", running_mean).astype(np.float64)
    if mean.ndim != 1:
        raise ValueError(f"running_mean must have 1 dimension, got shape {mean.shape}")

    def of_channels(name: str, value: object) -> NDArray[np.float64]:
        return _validation.finite_channel_parameter(name, value, len(mean))

    var = of_channels("running_var", running_var) + _validation.epsilon(eps, training=False)
    if not np.all(var > 0.0):
        channel = int(np.argmin(var))
        raise ValueError(
            f"running_var + eps must be positive, got {var[channel]} in channel {channel}"
        )
    scale = 1.0 if bn_weight is None else of_channels("bn_weight", bn_weight)
    bias = np.zeros_like(mean) if bn_bias is None else of_channels("bn_bias", bn_bias)
    return _Evaluation(mean, scale / np.sqrt(var), bias)


class _Weight(NamedTuple):
    """A float64 copy of a weight, and a view of that copy: (groups, outputs, inputs, *kernel)."""

    values: NDArray[np.float64]
    by_group: NDArray[np.float64]
    side: str
    dtype: np.dtype[Any]

    def multiply(self, scale: NDArray[np.float64]) -> None:
        """Multiply each of batch norm's channels."""
        np.multiply(self.by_group, self.of_channels(scale), out=self.by_group)

    def of_channels(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return values of batch norm's channels in a shape that broadcasts to `by_group`."""
        ones = (1,) * (self.by_group.ndim - 3)
        sides = (-1, 1) if self.side == _OUTPUT else (1, -1)
        return values.reshape(len(self.by_group), *sides, *ones)

    def rounded(self, bias: NDArray[np.float64]) -> tuple[Array, Array]:
        """Return weight and bias in the dtype of the weight."""
        return _rounded("weight", self.values, self.dtype), _rounded("bias", bias, self.dtype)


def _weight(
    weight: object, norm: _Evaluation, side: str, layout: object, groups: object
) -> _Weight:
    """Return a weight of which one side, the outputs or the inputs, are batch norm's channels."""
    array = _validation.finite_floats("weight", weight)
    shape, channels = array.shape, len(norm.scale)
    axes = _channel_axes(layout, shape)
    own, other = axes if side == _OUTPUT else axes[::-1]
    number = _validation.integer_from("groups", groups, 1)
    # The groups are along one of the axes: the other one has the channels of a single group.
    axis_of_groups = {}
    for axis, count in ((other, shape[own] * number), (own, shape[own])):
        if shape[axis] % number == 0:
            axis_of_groups[count] = axis
    if not axis_of_groups:
        raise ValueError(
            f"groups must divide the channels of weight, which has the shape {shape} and the "
            f"layout {layout!r}, got {number}"
        )
    if channels not in axis_of_groups:
        wanted = " or ".join(map(str, sorted(axis_of_groups)))
        raise ValueError(
            f"running_mean must have one value for each {side} channel of weight, {wanted} for the "
            f"shape {shape}, layout {layout!r} and groups {number}, got {channels}"
        )
    axis = axis_of_groups[channels]
    values = array.astype(np.float64)
    view = np.moveaxis(values, (axis, sum(axes) - axis), (0, 1))
    view = view.reshape(number, shape[axis] // number, *view.shape[1:])
    by_group = view if axis == axes[0] else view.swapaxes(1, 2)
    return _Weight(values, by_group, side, array.dtype)


def _channel_axes(layout: object, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the axes of a weight that have its output and its input channels."""
    wanted = (
        "layout must name the axes of weight, O and I once each and others by letters or by one "
        "'...', such as 'OIHW' or '...IO'"
    )
    if not isinstance(layout, str):
        raise TypeError(f"{wanted}, got {layout!r}")
    before, dots, after = layout.partition("...")
    letters = before + after
    if not letters.isalpha() or letters.count("O") != 1 or letters.count("I") != 1:
        raise ValueError(f"{wanted}, got {layout!r}")
    more = len(shape) - len(letters)
    if more < 0 or (more > 0 and not dots):
        raise ValueError(f"{wanted}, got {layout!r} for a weight of shape {shape}")
    letters = before + more * "." + after
    return letters.index("O"), letters.index("I")


def _bias(bias: object, channels: int) -> NDArray[np.float64]:
    if bias is None:
        return np.zeros(channels)
    return _validation.finite_channel_parameter("bias", bias, channels, "output channels")


def _rounded(name: str, values: NDArray[np.float64], dtype: np.dtype[Any]) -> Array:
    """Round once, and refuse what leaves the range of the dtype."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = (_single_of_odd(values) if dtype.name == "bfloat16" else values).astype(dtype)
    if not np.all(np.isfinite(rounded)):
        raise ValueError(
            f"the folded {name} must be in the range of {dtype}, the dtype of weight, got values "
            f"of up to {np.max(np.abs(values)):.3g}"
        )
    return rounded


def _single_of_odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Round to float32 such that rounding to fewer bits gives what the values themselves would.

    Values between two float32 become the one whose last bit is set (S. Boldo, G. Melquiond, 2008,
    "Emulation of a FMA and correctly rounded sums").
    """
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    inexact = single != values
    bits -= np.abs(single) > np.abs(values)  # toward zero
    bits |= inexact
    return single
