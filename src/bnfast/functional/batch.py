"""Batch normalization: what it means, its defaults and its documentation."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives, _validation
from bnfast._activations import activation_of, gradients
from bnfast._float_mode import in_default_float_mode
from bnfast._masks import ZEROS
from bnfast._typing import Array, ArrayLikeOf, Float


@in_default_float_mode
def batch_norm(
    x: ArrayLikeOf[Float],
    running_mean: ArrayLike | None,
    running_var: ArrayLike | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    unbiased: bool = True,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    padding: str = ZEROS,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Normalize every channel of a batch, as ``torch.nn.functional.batch_norm`` does.

    With the running statistics or, in training, with those of the batch; `batch_norm_forward` takes
    the latter always, and returns what the backward pass needs.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, at least 2-d
        The batch: whatever ``np.asarray`` makes such an array of. Any strides, those of the layouts
        being the fastest; C channels along `axis`, M values in each.
    running_mean, running_var : array (C,) of float16, bfloat16, float32 or float64, or None
        In training they are updated in place, or both None; in evaluation they are what `x` is
        normalized with, and required.
    weight, bias : array (C,) of float16, bfloat16, float32 or float64, optional
        gamma and beta; 1 and 0 where None.
    training : bool
        Normalize with the statistics of `x` itself rather than the running ones.
    momentum : float
        The weight of the NEW batch in the running statistics, as in PyTorch; Keras, Flax and ONNX
        call its complement, the weight of the old, momentum.
    eps : float
        Added to the variance: positive in training, not negative in evaluation.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC.
    unbiased : bool
        Give running_var the variance divided by M - 1, as PyTorch does, rather than by M, as Keras,
        Flax and ONNX do. The normalization itself always divides by M.
    activation : str, optional
        What follows, in the same pass: "relu", "leaky_relu", "relu6", "silu" or "hardswish".
    negative_slope : float
        The slope of leaky_relu below 0; at most 1.
    residual : array like `x`, optional
        What is added before the activation: `x` itself, `out` itself, or any other.
    mask : array of bool, optional
        Which values count, the same for all channels: of the shape of `x` with a size of 1 along
        `axis`, or without that axis; other axes are broadcast as NumPy does. What does not count is
        padding, and enters nothing, whatever it is. Only one of `mask` and `lengths` is given.
    lengths : array (N,) of integers, optional
        The same for `x` of shape (N, C, L) or (N, L, C): how many positions count of each sample,
        the first ones, from 0 to L.
    padding : str
        What the output is where values do not count: "zeros", or the "input".
    out : array like `x`, optional
        Where to write: `x` or `residual` itself, or an array that shares no element with either.

    Returns
    -------
    array like `x`
        `out`, or a new array laid out like `x`. An empty batch gives an empty array and leaves the
        running statistics alone.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value, or one value per channel where
        there is a running_var to update and it is unbiased; before anything is written.

    Warns
    -----
    RuntimeWarning
        Where a running statistic of float32 becomes infinite, though that of the batch is finite.

    Notes
    -----
    In training, over all axes but `axis`::

        mu  = mean(x)
        var = mean((x - mu)**2)
        y   = weight * (x - mu) / sqrt(var + eps) + bias
        running_mean = (1 - momentum) * running_mean + momentum * mu
        running_var  = (1 - momentum) * running_var  + momentum * var * M / (M - 1)

    in evaluation, mu = running_mean and var = running_var. Where they are asked for::

        y = activation(y + residual)

        relu(z) = max(z, 0)              leaky_relu(z) = max(z, negative_slope * z)
        relu6(z) = min(max(z, 0), 6)     hardswish(z) = z * min(max(z + 3, 0), 6) / 6
        silu(z) = z / (1 + exp(-z))

    The result has the bits of the two or three operations one after the other (those of silu and
    hardswish within 2 ulps of the exact ones): only the passes over memory are saved. Of 16 bits
    these are operations on float32, and only the last result is rounded.

    What has no weight leaves nothing in the running statistics: a momentum of 0 does not touch
    them, one of 1 forgets what they were, NaN and infinity too. One value per channel has the
    variance 0, as in Keras, and y is the bias; only with M - 1 it has none.

    With a mask m (0 or 1), M = sum(m) in all of this, sums are over the values that count, mu =
    sum(m * x) / M and var = sum(m * (x - mu)**2) / M, and y is m * y, or with padding="input"
    m * y + (1 - m) * x. Where all values count the bits are those of a call without a mask. In
    training at least one value must count.

    References
    ----------
    S. Ioffe, C. Szegedy, 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", arXiv:1502.03167. S. Elfwing, E. Uchibe, K. Doya, 2017,
    arXiv:1702.03118 (SiLU). A. Howard et al., 2019, arXiv:1905.02244 (hardswish).

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], dtype=np.float32)
    >>> mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> bnfast.batch_norm(x, mean, var, training=True).round(3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> mean, var
    (array([0.2, 2. ], dtype=float32), array([ 1.1, 20.9], dtype=float32))

    Sequences of different lengths, (N, L, C), whose padding is NaN:

    >>> x = np.array([[[1.0], [3.0]], [[5.0], [np.nan]]])
    >>> y = bnfast.batch_norm(x, None, None, training=True, axis=-1, lengths=[2, 1])
    >>> y[..., 0].round(3)
    array([[-1.225,  0.   ],
           [ 1.225,  0.   ]])
    """
    if unbiased is not True:
        unbiased = _validation.flag("unbiased", unbiased)
    chosen = None if activation is None else activation_of(activation, negative_slope)
    if training is not False and _validation.flag("training", training):
        y, _, _ = _primitives.normalize(
            x,
            axis,
            weight,
            bias,
            eps,
            running_mean,
            running_var,
            momentum,
            unbiased,
            out,
            activation=chosen,
            residual=residual,
            masked=(mask, lengths, padding),
        )
        return y
    if type(momentum) is not float or momentum - momentum != 0.0:
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


@in_default_float_mode
def batch_norm_forward(
    x: ArrayLikeOf[Float],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    momentum: float = 0.1,
    unbiased: bool = True,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | None = None,
    mask: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    padding: str = ZEROS,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], NDArray[np.float64], NDArray[np.float64]]:
    """Normalize with the statistics of the batch and return them for the backward pass.

    As `batch_norm` with ``training=True``, in one call.

    Parameters
    ----------
    x, weight, bias, eps, axis, activation, negative_slope, residual, out
        As in `batch_norm` with ``training=True``.
    running_mean, running_var : array (C,) of float16, bfloat16, float32 or float64, optional
        Both or neither: updated in place.
    momentum, unbiased
        As in `batch_norm`: the weight of the NEW batch in the running statistics, and whether
        running_var takes the variance divided by M - 1.
    mask, lengths, padding
        As in `batch_norm`: which values count, and what the output is where they do not.

    Returns
    -------
    y : array like `x`
        The normalized batch.
    mean, invstd : array (C,) of float64
        mu and 1 / sqrt(var + eps). Float64 for float32 data too: rounding them would lose what a
        large mean leaves of the deviations.

    Raises
    ------
    TypeError, ValueError
        As `batch_norm`.

    Warns
    -----
    RuntimeWarning
        As `batch_norm`.

    Notes
    -----
    Over all axes but `axis`::

        mu  = mean(x)
        var = mean((x - mu)**2)
        y   = weight * (x - mu) / sqrt(var + eps) + bias

    and the running statistics, the residual and the activation as in `batch_norm`.

    For float32 x, mu and var are within 6e-7 of the exact ones, relative to the standard deviation
    and to var, whatever the mean (1e-6 where a few outliers make up the variance); what is left of
    a large mean after rounding to float64 still enters y. Values up to half of the largest of their
    dtype are safe, 1.7e38 or 8.9e307, however small their squares are or how large: the difference
    of larger ones may overflow. Beyond range is what a weight / sqrt(var + eps) beyond the dtype of
    `x` would multiply: it counts as the largest finite number (where float32 values differ by less
    than 3e-39 and eps by as little, or float64 ones by less than 6e-309; a constant channel gives
    its bias all the same).

    References
    ----------
    S. Ioffe, C. Szegedy, 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], dtype=np.float32)
    >>> y, mean, invstd = bnfast.batch_norm_forward(x)
    >>> mean, invstd.round(4)
    (array([ 2., 20.]), array([1. , 0.1]))
    """
    if unbiased is not True:
        unbiased = _validation.flag("unbiased", unbiased)
    chosen = None if activation is None else activation_of(activation, negative_slope)
    return _primitives.normalize(
        x,
        axis,
        weight,
        bias,
        eps,
        running_mean,
        running_var,
        momentum,
        unbiased,
        out,
        activation=chosen,
        residual=residual,
        masked=(mask, lengths, padding),
    )


@overload
def batch_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = ...,
    training: bool = ...,
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
def batch_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = ...,
    training: bool = ...,
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
def batch_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    training: bool = True,
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
    """Return the gradients of batch normalization: of its input, weight and bias.

    Parameters
    ----------
    dy : array like `x`
        The gradient of the output.
    x : array of float16, bfloat16, float32 or float64, at least 2-d
        The input of the forward pass.
    mean, invstd : array (C,) of float32 or float64
        What the forward pass returned; in evaluation, running_mean and
        1 / sqrt(running_var + eps).
    weight : array (C,) of float16, bfloat16, float32 or float64, optional
        gamma; 1 where None.
    axis : int
        The channel axis.
    training : bool
        Whether mean and invstd came from `x`. If not they are constants, and the gradient does not
        pass through them.
    bias : array (C,) of float16, bfloat16, float32 or float64, optional
        beta, which only an activation needs, and no `y`.
    activation, negative_slope
        As in the forward pass.
    residual : array like `x`, or bool, optional
        What was added in the forward pass; with `y`, or without an activation, True will do.
    y : array like `x`, optional
        The output of the forward pass, with relu, leaky_relu or relu6: it tells what goes through,
        so that neither `bias` nor `residual` need be kept. Without it their output is made again,
        from what is given, in the same pass.
    mask, lengths, padding
        As the forward pass had them. Where values do not count, dx is 0, or with padding="input"
        dy, as the output is the input there.
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
        Only where there was a residual: its gradient, 0 where values do not count; without an
        activation or a mask `dy` itself.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    With xmu = x - mean, and sums over all axes but `axis`::

        dbias   = sum(dy)
        dweight = sum(dy * xmu) * invstd
        dx      = weight * invstd * (dy - dbias / M - xmu * invstd * dweight / M)    in training
        dx      = weight * invstd * dy                                               in evaluation

    With an activation, of z, dz = dy * activation'(z) takes the place of dy in all of these, and is
    the gradient of the residual. The derivatives are PyTorch's: at 0 that of relu is 0 and that of
    leaky_relu its slope, at 0 and 6 that of relu6 is 0, at -3 and 3 that of hardswish 0 and 1. z is
    made again as the forward pass made it, to the bit, for float32 `x`; of float64 `x` with the
    mean rounded to float64.
    With a mask m the sums are over the values that count, M of them, and dx is m * dx, or with
    padding="input" m * dx + (1 - m) * dy.

    Of float64 `x`, what rounding left of a mean of more than 4 standard deviations is found again,
    which reads `x` once more, to a rounding of the standard deviation; a mean that is further off
    than rounding is taken as it is. Products with xmu may leave the range, those with xmu * invstd
    must not; nor must dbias. dx is rounded as its terms are: a constant in dy, which dx does not
    depend on, costs dx half of the constant's ulp (6e-8 of the constant in float32).

    References
    ----------
    S. Ioffe, C. Szegedy, 2015, arXiv:1502.03167, section 3.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, invstd = bnfast.batch_norm_forward(x)
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> dx, dweight, dbias = bnfast.batch_norm_backward(dy, x, mean, invstd)
    >>> dbias
    array([1.])
    >>> bool(abs(dx.sum()) < 1e-15)
    True
    """
    constant_statistics = not _validation.flag("training", training)
    given = dy, x, axis, mean, invstd, weight, constant_statistics
    return gradients(
        *(given, out, _primitives.BATCH, activation, negative_slope, bias, residual, y),
        masked=(mask, lengths, padding),
    )


@in_default_float_mode
def batch_norm_backward_sums(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    *,
    axis: int = 1,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sums of `batch_norm_backward`, of which `batch_norm_backward_input` makes dx.

    For a batch in parts: the sums of the parts add up to those of the batch.

    Parameters
    ----------
    dy, x, mean, invstd, axis
        As in `batch_norm_backward` with ``training=True``; `dy` and `x` may be a part of the batch
        that `mean` and `invstd` are of.

    Returns
    -------
    sum_dy, sum_dy_xhat : array (C,) of float64
        Rounded to the dtype of the weight, they are dbias and dweight.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    Over all axes but `axis`::

        sum_dy      = sum(dy)
        sum_dy_xhat = sum(dy * (x - mean)) * invstd

    Of a whole batch, this and `batch_norm_backward_input` make the bits that `batch_norm_backward`
    makes, in two passes over `dy` and `x`. Both find what rounding left of a large mean of float64
    `x` as that does, where the mean is that of `x`.

    References
    ----------
    S. Ioffe, C. Szegedy, 2015, arXiv:1502.03167, section 3.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, invstd = bnfast.batch_norm_forward(x)
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> sums = bnfast.batch_norm_backward_sums(dy, x, mean, invstd)
    >>> dx = bnfast.batch_norm_backward_input(dy, x, mean, invstd, None, *sums, count=3)
    >>> bool((dx == bnfast.batch_norm_backward(dy, x, mean, invstd)[0]).all())
    True
    """
    return _primitives.gradient_sums(dy, x, axis, mean, invstd)


@in_default_float_mode
def batch_norm_backward_input(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None,
    sum_dy: ArrayLike,
    sum_dy_xhat: ArrayLike,
    count: float,
    *,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Return the gradient of the input of batch normalization from sums that are known.

    Parameters
    ----------
    dy, x, mean, invstd, weight, axis, out
        As in `batch_norm_backward` with ``training=True``; `dy` and `x` may be a part of the batch
        that the statistics and sums are of.
    sum_dy, sum_dy_xhat : array (C,) of float32 or float64
        What `batch_norm_backward_sums` returns, of the batch: the sum over its parts.
    count : int or float
        M, how many values of each channel are in the batch; positive.

    Returns
    -------
    array like `x`
        dx: `out`, or a new array laid out like `x`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    ::

        dx = weight * invstd * (dy - sum_dy / M - (x - mean) * invstd * sum_dy_xhat / M)

    References
    ----------
    S. Ioffe, C. Szegedy, 2015, arXiv:1502.03167, section 3.

    Examples
    --------
    A batch in two parts:

    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, *saved = bnfast.batch_norm_forward(x)
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> parts = [slice(0, 2), slice(2, 3)]
    >>> sums = sum(
    ...     np.array(bnfast.batch_norm_backward_sums(dy[part], x[part], *saved)) for part in parts
    ... )
    >>> dx = [
    ...     bnfast.batch_norm_backward_input(dy[part], x[part], *saved, None, *sums, count=3)
    ...     for part in parts
    ... ]
    >>> np.allclose(np.concatenate(dx), bnfast.batch_norm_backward(dy, x, *saved)[0])
    True
    """
    return _primitives.input_gradient(
        dy, x, axis, mean, invstd, weight, sum_dy, sum_dy_xhat, count, out
    )
