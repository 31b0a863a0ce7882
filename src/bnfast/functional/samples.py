"""Instance and group normalization: what they mean, their defaults, their documentation."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives, _validation
from bnfast._activations import activation_of, gradients
from bnfast._float_mode import in_default_float_mode
from bnfast._masks import ZEROS
from bnfast._primitives import GROUPS, PER_SAMPLE
from bnfast._typing import Array, ArrayLikeOf, Float


@in_default_float_mode
def instance_norm(
    x: ArrayLikeOf[Float],
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    padding: str = ZEROS,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Normalize every channel of every sample, as ``torch.nn.functional.instance_norm`` does.

    Parameters
    ----------
    x : array (N, C, ...) of float16, bfloat16, float32 or float64, at least 2-d
        N samples along axis 0, C channels along `axis`, P values in each. Any strides.
    running_mean, running_var : array (C,) of float16, bfloat16, float32 or float64, or None
        With `use_input_stats` they are updated in place, or both None; without it they are what `x`
        is normalized with, and required.
    weight, bias : array (C,) of float16, bfloat16, float32 or float64, optional
        gamma and beta; 1 and 0 where None.
    use_input_stats : bool
        Normalize with the statistics of `x` itself rather than the running ones.
    momentum : float
        The weight of the NEW batch in the running statistics, as in PyTorch.
    eps : float
        Added to the variance: positive with `use_input_stats`, else not negative.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC; not 0.
    activation, negative_slope, residual
        As in `batch_norm`.
    mask, lengths, padding
        As in `batch_norm`: which values count, and what the output is where they do not.
    out : array like `x`, optional
        Where to write: `x` or `residual` itself, or an array that shares no element with either.

    Returns
    -------
    array like `x`
        `out`, or a new array laid out like `x`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value, or where each sample has one value
        per channel and running_var, which is unbiased, is updated; before anything is written.

    Warns
    -----
    RuntimeWarning
        As `batch_norm`.

    Notes
    -----
    With `use_input_stats`, over all axes but 0 and `axis`::

        mu[n]  = mean(x[n])
        var[n] = mean((x[n] - mu[n])**2)
        y[n]   = weight * (x[n] - mu[n]) / sqrt(var[n] + eps) + bias
        running_mean = (1 - momentum) * running_mean + momentum * mean_n(mu[n])
        running_var  = (1 - momentum) * running_var  + momentum * mean_n(var[n]) * P / (P - 1)

    and, where they are asked for, y[n] = activation(y[n] + residual[n]).

    The running variance knows nothing of how the samples differ from each other. Without
    `use_input_stats` this is `batch_norm` in evaluation.

    With a mask each sample has as many values P as count, and those without any have the mean 0 and
    the variance 0, and leave nothing in the running statistics: these average the others.

    References
    ----------
    D. Ulyanov, A. Vedaldi, V. Lempitsky, 2016, "Instance Normalization: The Missing Ingredient for
    Fast Stylization", arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[[1.0, 3.0]], [[10.0, 30.0]]], dtype=np.float32)
    >>> bnfast.instance_norm(x).round(3)
    array([[[-1.,  1.]],
    <BLANKLINE>
           [[-1.,  1.]]], dtype=float32)
    """
    chosen = None if activation is None else activation_of(activation, negative_slope)
    if not _validation.flag("use_input_stats", use_input_stats):
        _validation.channel_axis_of_samples(x, axis)
        _validation.real("momentum", momentum)
        return _primitives.scale_shift(
            x,
            axis,
            running_mean,
            running_var,
            weight,
            bias,
            eps,
            None,
            out,
            activation=chosen,
            residual=residual,
            masked=(mask, lengths, padding),
        )
    y, _, _ = _primitives.normalize(
        *(x, axis, weight, bias, eps, running_mean, running_var, momentum, True, out, PER_SAMPLE),
        activation=chosen,
        residual=residual,
        masked=(mask, lengths, padding),
    )
    return y


@in_default_float_mode
def instance_norm_forward(
    x: ArrayLikeOf[Float],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    padding: str = ZEROS,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], NDArray[np.float64], NDArray[np.float64]]:
    """Normalize every channel of every sample and return the statistics for the backward pass.

    Parameters
    ----------
    x, weight, bias, eps, axis, activation, negative_slope, residual, mask, lengths, padding, out
        As in `instance_norm`.

    Returns
    -------
    y : array like `x`
        The normalized batch.
    mean, invstd : array (N, C) of float64
        mu and 1 / sqrt(var + eps).

    Raises
    ------
    TypeError, ValueError
        As `instance_norm`.

    Notes
    -----
    The formula stands in `instance_norm`; the mean and invstd of a sample have the bits that
    `batch_norm_forward` gives for a batch of it alone.

    References
    ----------
    D. Ulyanov, A. Vedaldi, V. Lempitsky, 2016, arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[[1.0, 3.0]], [[10.0, 30.0]]], dtype=np.float32)
    >>> y, mean, invstd = bnfast.instance_norm_forward(x)
    >>> mean
    array([[ 2.],
           [20.]])
    """
    chosen = None if activation is None else activation_of(activation, negative_slope)
    return _primitives.normalize(
        *(x, axis, weight, bias, eps),
        out=out,
        over=PER_SAMPLE,
        activation=chosen,
        residual=residual,
        masked=(mask, lengths, padding),
    )


@overload
def instance_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = ...,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = ...,
    residual: Literal[False] | None = None,
    y: ArrayLikeOf[Float] | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    padding: str = ...,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array]: ...
@overload
def instance_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = ...,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = ...,
    residual: ArrayLikeOf[Float] | Literal[True],
    y: ArrayLikeOf[Float] | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    padding: str = ...,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array, NDArray[Float]]: ...
@in_default_float_mode
def instance_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | bool | None = None,
    y: ArrayLikeOf[Float] | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    padding: str = ZEROS,
    out: NDArray[Float] | None = None,
) -> tuple[Array, ...]:
    """Return the gradients of instance normalization: of its input, weight and bias.

    Parameters
    ----------
    dy : array like `x`
        The gradient of the output.
    x : array of float16, bfloat16, float32 or float64
        The input of the forward pass.
    mean, invstd : array (N, C) of float32 or float64
        What the forward pass returned.
    weight : array (C,) of float16, bfloat16, float32 or float64, optional
        gamma; 1 where None.
    axis : int
        The channel axis.
    bias, activation, negative_slope, residual, y
        As in `batch_norm_backward`.
    mask, lengths, padding
        As the forward pass had them. Where values do not count, dx is 0, or with padding="input"
        dy.
    out : array like `x`, optional
        Where to write dx: `dy` or `x` itself, or an array that shares no element with either.

    Returns
    -------
    dx : array like `x`
        The gradient of the input.
    dweight, dbias : array (C,)
        The gradients of weight and bias, of the dtype of `weight`; where it is None of that of `x`,
        but float32 for one of 16 bits.
    dresidual : array like `x`
        Only where there was a residual: its gradient.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    With xmu = x[n] - mean[n], and sums over all axes but 0 and `axis`, P values each::

        s[n]    = sum(dy[n])
        p[n]    = sum(dy[n] * xmu) * invstd[n]
        dx[n]   = weight * invstd[n] * (dy[n] - s[n] / P - xmu * invstd[n] * p[n] / P)
        dweight = sum_n(p[n])
        dbias   = sum_n(s[n])

    with an activation of dz, as in `batch_norm_backward`, in the place of dy.

    References
    ----------
    D. Ulyanov, A. Vedaldi, V. Lempitsky, 2016, arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[[1.0, 2.0, 6.0]]])
    >>> y, mean, invstd = bnfast.instance_norm_forward(x)
    >>> dx, dweight, dbias = bnfast.instance_norm_backward(np.ones_like(x), x, mean, invstd)
    >>> dbias
    array([3.])
    """
    given = dy, x, axis, mean, invstd, weight, False
    return gradients(
        *(given, out, PER_SAMPLE, activation, negative_slope, bias, residual, y),
        masked=(mask, lengths, padding),
    )


@in_default_float_mode
def group_norm(
    x: ArrayLikeOf[Float],
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    per_group: bool = False,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    padding: str = ZEROS,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Normalize groups of channels of every sample, as ``torch.nn.functional.group_norm`` does.

    Parameters
    ----------
    x : array (N, C, ...) of float16, bfloat16, float32 or float64, at least 2-d
        N samples along axis 0, C channels along `axis`. Any strides.
    num_groups : int
        G, which divides C: each group has C / G neighbouring channels.
    weight, bias : array (C,) of float16, bfloat16, float32 or float64, optional
        gamma and beta; 1 and 0 where None.
    eps : float
        Added to the variance. As in PyTorch any number will do; a sum below 0 gives NaN.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC; not 0.
    per_group : bool
        Take one weight and bias for each group, of shape (G,), as ONNX did in opset 18.
    activation, negative_slope, residual
        As in `batch_norm`.
    mask, lengths, padding
        As in `batch_norm`: which values count, and what the output is where they do not.
    out : array like `x`, optional
        Where to write: `x` or `residual` itself, or an array that shares no element with either.

    Returns
    -------
    array like `x`
        `out`, or a new array laid out like `x`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    For every sample and group, over its channels and all further axes::

        mu  = mean(x)
        var = mean((x - mu)**2)
        y   = weight * (x - mu) / sqrt(var + eps) + bias

    and, where they are asked for, y = activation(y + residual).
    With a mask, over the values that count; where a sample has none, mu and var are 0. At least one
    value of the batch must count.

    References
    ----------
    Y. Wu, K. He, 2018, "Group Normalization", arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]], dtype=np.float32)
    >>> bnfast.group_norm(x, 2).round(3)
    array([[-1.,  1., -1.,  1.]], dtype=float32)
    """
    y, _, _ = group_norm_forward(
        x,
        num_groups,
        weight,
        bias,
        eps,
        axis=axis,
        per_group=per_group,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        mask=mask,
        lengths=lengths,
        padding=padding,
        out=out,
    )
    return y


@in_default_float_mode
def group_norm_forward(
    x: ArrayLikeOf[Float],
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    per_group: bool = False,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    padding: str = ZEROS,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], NDArray[np.float64], NDArray[np.float64]]:
    """Normalize groups of channels of every sample; return the statistics for the backward pass.

    Parameters
    ----------
    x, num_groups, weight, bias, eps, axis, per_group, activation, negative_slope, residual
    mask, lengths, padding, out
        As in `group_norm`.

    Returns
    -------
    y : array like `x`
        The normalized batch.
    mean, invstd : array (N, G) of float64
        mu and 1 / sqrt(var + eps).

    Raises
    ------
    TypeError, ValueError
        As `group_norm`.

    Notes
    -----
    The formula stands in `group_norm`.

    References
    ----------
    Y. Wu, K. He, 2018, arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]], dtype=np.float32)
    >>> y, mean, invstd = bnfast.group_norm_forward(x, 2)
    >>> mean
    array([[ 2., 20.]])
    """
    reads = None
    if _validation.flag("per_group", per_group):
        _, channels = _validation.channel_axis_of_samples(x, axis)
        together = _validation.channels_of_group(num_groups, channels)
        reads = {"weight": weight, "bias": bias}
        weight = _validation.of_each_channel("weight", weight, channels, together)
        bias = _validation.of_each_channel("bias", bias, channels, together)
    chosen = None if activation is None else activation_of(activation, negative_slope)
    given = x, axis, weight, bias, eps
    return _primitives.normalize(
        *given,
        out=out,
        over=GROUPS,
        num_groups=num_groups,
        reads=reads,
        activation=chosen,
        residual=residual,
        masked=(mask, lengths, padding),
    )


@overload
def group_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = ...,
    per_group: bool = ...,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = ...,
    residual: Literal[False] | None = None,
    y: ArrayLikeOf[Float] | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    padding: str = ...,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array]: ...
@overload
def group_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = ...,
    per_group: bool = ...,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = ...,
    residual: ArrayLikeOf[Float] | Literal[True],
    y: ArrayLikeOf[Float] | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    padding: str = ...,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array, NDArray[Float]]: ...
@in_default_float_mode
def group_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    per_group: bool = False,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | bool | None = None,
    y: ArrayLikeOf[Float] | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    padding: str = ZEROS,
    out: NDArray[Float] | None = None,
) -> tuple[Array, ...]:
    """Return the gradients of group normalization: of its input, weight and bias.

    Parameters
    ----------
    dy : array like `x`
        The gradient of the output.
    x : array of float16, bfloat16, float32 or float64
        The input of the forward pass.
    mean, invstd : array (N, G) of float32 or float64
        What the forward pass returned.
    weight : array (C,) of float16, bfloat16, float32 or float64, optional
        gamma; 1 where None.
    axis : int
        The channel axis.
    per_group : bool
        As in the forward pass: weight, dweight and dbias have the shape (G,).
    bias, activation, negative_slope, residual, y
        As in `batch_norm_backward`.
    mask, lengths, padding
        As the forward pass had them. Where values do not count, dx is 0, or with padding="input"
        dy.
    out : array like `x`, optional
        Where to write dx: `dy` or `x` itself, or an array that shares no element with either.

    Returns
    -------
    dx : array like `x`
        The gradient of the input.
    dweight, dbias : array (C,)
        The gradients of weight and bias, of the dtype of `weight`; where it is None of that of `x`,
        but float32 for one of 16 bits.
    dresidual : array like `x`
        Only where there was a residual: its gradient.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    With g = dy * weight, xhat = (x - mean) * invstd, and means over the channels of a group and all
    further axes::

        dx      = invstd * (g - mean(g) - xhat * mean(g * xhat))
        dweight = sum(dy * xhat), dbias = sum(dy) over all axes but `axis`

    with an activation of dz, as in `batch_norm_backward`, in the place of dy.

    References
    ----------
    Y. Wu, K. He, 2018, arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> y, mean, invstd = bnfast.group_norm_forward(x, 2)
    >>> dx, dweight, dbias = bnfast.group_norm_backward(np.ones_like(x), x, mean, invstd)
    >>> dbias
    array([1., 1., 1., 1.])
    """
    masked = mask, lengths, padding
    if not _validation.flag("per_group", per_group):
        given = dy, x, axis, mean, invstd, weight, False
        return gradients(
            *(given, out, GROUPS, activation, negative_slope, bias, residual, y),
            grouped=True,
            masked=masked,
        )
    array, channels = _validation.channel_axis_of_samples(x, axis)
    groups = _validation.groups_of_statistics("mean", mean, channels) if channels else 1
    together = max(channels // groups, 1)
    own = _validation.of_each_channel("weight", weight, channels, together)
    # Float64, so that the gradients of channels are not rounded before they are added up.
    wide = np.ones(channels) if own is None else own.astype(np.float64)
    shift = _validation.of_each_channel("bias", bias, channels, together)
    dx, *of_channels = gradients(
        (dy, array, axis, mean, invstd, wide, False),
        *(out, GROUPS, activation, negative_slope, shift, residual, y),
        grouped=True,
        reads={"weight": weight, "bias": bias},
        masked=masked,
    )
    with np.errstate(all="ignore"):
        sums = [g.reshape(-1, together).sum(1) for g in of_channels[:2]]
    dweight, dbias = (_validation.rounded_gradient("weight", weight, s, array) for s in sums)
    return dx, dweight, dbias, *of_channels[2:]
