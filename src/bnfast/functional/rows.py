"""Layer and RMS normalization: what they mean, their defaults, their documentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives, _validation
from bnfast._activations import activation_of, upstream_of
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float


@in_default_float_mode
def layer_norm(
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int | Sequence[int] | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | None = None,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Normalize the elements of each row, as ``torch.nn.functional.layer_norm`` does.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64
        Any strides.
    normalized_shape : int or sequence of int
        The sizes of the axes that make a row: the last ones, unless `axis` says which.
    weight, bias : array of `normalized_shape`, of float16, bfloat16, float32 or float64, optional
        gamma and beta of each element of a row; 1 and 0 where None. They are rounded to the dtype
        of `x`.
    eps : float
        Added to the variance. As in PyTorch any number will do; a sum below 0 gives NaN.
    axis : int or sequence of int, optional
        Which axes make a row, in the order of `normalized_shape`; need not be the last ones, nor
        neighbours, as in Keras.
    activation, negative_slope, residual
        As in `batch_norm`.
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
    For every row, over its elements::

        mu  = mean(x)
        var = mean((x - mu)**2)
        y   = weight * (x - mu) / sqrt(var + eps) + bias

    and, where they are asked for, y = activation(y + residual).

    References
    ----------
    J. L. Ba, J. R. Kiros, G. E. Hinton, 2016, "Layer Normalization", arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]], dtype=np.float32)
    >>> bnfast.layer_norm(x, 2).round(3)
    array([[-1.,  1.],
           [-1.,  1.]], dtype=float32)
    """
    y, _, _ = layer_norm_forward(
        x,
        normalized_shape,
        weight,
        bias,
        eps,
        axis=axis,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        out=out,
    )
    return y


@in_default_float_mode
def layer_norm_forward(
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int | Sequence[int] | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | None = None,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], NDArray[np.float64], NDArray[np.float64]]:
    """Normalize the elements of each row; return the statistics for the backward pass.

    Parameters
    ----------
    x, normalized_shape, weight, bias, eps, axis, activation, negative_slope, residual, out
        As in `layer_norm`.

    Returns
    -------
    y : array like `x`
        The normalized rows.
    mean, invstd : array of float64
        mu and 1 / sqrt(var + eps) of every row, of the shape of the axes that are not normalized.

    Raises
    ------
    TypeError, ValueError
        As `layer_norm`.

    Notes
    -----
    The formula stands in `layer_norm`.

    References
    ----------
    J. L. Ba, J. R. Kiros, G. E. Hinton, 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]], dtype=np.float32)
    >>> y, mean, invstd = bnfast.layer_norm_forward(x, 2)
    >>> mean
    array([ 2., 20.])
    """
    chosen = None if activation is None else activation_of(activation, negative_slope)
    return _primitives.normalize_rows(
        x, normalized_shape, axis, weight, bias, eps, True, out, chosen, residual
    )


def _fused_gradients(
    given: tuple[Any, Any, Any, Any, Any, Any, Any, bool, bool, Any],
    activation: object,
    negative_slope: object,
    bias: object,
    residual: object,
    y: object,
) -> tuple[Any, ...]:
    """Return dx, dweight, dbias and, where there was a residual, its gradient."""
    chosen = activation_of(activation, negative_slope)
    added, output, keeps = upstream_of(chosen, residual, y)
    return _primitives.row_gradient(*given, bias, chosen, added, output, keeps)


@overload
def layer_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] | None = None,
    parameters: bool = ...,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = ...,
    residual: Literal[False] | None = None,
    y: ArrayLikeOf[Float] | None = None,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array | None, Array | None]: ...
@overload
def layer_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] | None = None,
    parameters: bool = ...,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = ...,
    residual: ArrayLikeOf[Float] | Literal[True],
    y: ArrayLikeOf[Float] | None = None,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array | None, Array | None, NDArray[Float]]: ...
@in_default_float_mode
def layer_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] | None = None,
    parameters: bool = True,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | bool | None = None,
    y: ArrayLikeOf[Float] | None = None,
    out: NDArray[Float] | None = None,
) -> tuple[Any, ...]:
    """Return the gradients of layer normalization: of its input, weight and bias.

    Parameters
    ----------
    dy : array like `x`
        The gradient of the output.
    x : array of float16, bfloat16, float32 or float64
        The input of the forward pass.
    normalized_shape, axis
        As in the forward pass.
    mean, invstd : array of float32 or float64
        What the forward pass returned.
    weight : array of `normalized_shape`, optional
        gamma; 1 where None.
    parameters : bool
        False leaves out dweight and dbias, which cost as much again as dx.
    bias : array of `normalized_shape`, optional
        beta, which only an activation needs, and no `y`.
    activation, negative_slope, residual, y
        As in `batch_norm_backward`.
    out : array like `x`, optional
        Where to write dx: `dy` or `x` itself, or an array that shares no element with either.

    Returns
    -------
    dx : array like `x`
        The gradient of the input.
    dweight, dbias : array of `normalized_shape`, or None
        The gradients of weight and bias, of the dtype of `weight`; where it is None of that of `x`,
        but float32 for one of 16 bits.
    dresidual : array like `x`
        Only where there was a residual: its gradient; without an activation `dy` itself.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    With g = dy * weight, xhat = (x - mean) * invstd, and means over the elements of a row::

        dx      = invstd * (g - mean(g) - xhat * mean(g * xhat))
        dweight = sum(dy * xhat), dbias = sum(dy) over all rows

    with an activation of dz, as in `batch_norm_backward`, in the place of dy.

    References
    ----------
    J. L. Ba, J. R. Kiros, G. E. Hinton, 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]])
    >>> y, mean, invstd = bnfast.layer_norm_forward(x, 2)
    >>> dx, dweight, dbias = bnfast.layer_norm_backward(np.ones_like(x), x, 2, mean, invstd)
    >>> dbias
    array([2., 2.])
    """
    wanted = _validation.flag("parameters", parameters)
    given = dy, x, normalized_shape, axis, mean, invstd, weight, True, wanted, out
    if activation is None and residual is None and bias is None and y is None:
        return _primitives.row_gradient(*given)
    return _fused_gradients(given, activation, negative_slope, bias, residual, y)


@in_default_float_mode
def rms_norm(
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    axis: int | Sequence[int] | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | None = None,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Divide the elements of each row by their root mean square, as PyTorch's ``rms_norm`` does.

    Parameters
    ----------
    x, normalized_shape, axis, activation, negative_slope, residual, out
        As in `layer_norm`.
    weight : array of `normalized_shape`, of float16, bfloat16, float32 or float64, optional
        gamma of each element of a row; 1 where None. Rounded to the dtype of `x`.
    eps : float or None
        Added to the mean square; a sum below 0 gives NaN. None, as in PyTorch, for the machine
        epsilon of what is computed in: 2.22e-16 for float64, and 1.19e-7 for the other dtypes.

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
    For every row, over its elements::

        y = weight * x / sqrt(mean(x**2) + eps)

    and, where they are asked for, y = activation(y + residual).
    A row with infinities of both signs is NaN throughout.

    References
    ----------
    B. Zhang, R. Sennrich, 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 7.0], [-10.0, 70.0]], dtype=np.float32)
    >>> bnfast.rms_norm(x, 2).round(3)
    array([[ 0.2,  1.4],
           [-0.2,  1.4]], dtype=float32)
    """
    y, _ = rms_norm_forward(
        x,
        normalized_shape,
        weight,
        eps,
        axis=axis,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        out=out,
    )
    return y


@in_default_float_mode
def rms_norm_forward(
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    eps: float | None = None,
    *,
    axis: int | Sequence[int] | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | None = None,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], NDArray[np.float64]]:
    """Divide each row by its root mean square; return what the backward pass needs.

    Parameters
    ----------
    x, normalized_shape, weight, eps, axis, activation, negative_slope, residual, out
        As in `rms_norm`.

    Returns
    -------
    y : array like `x`
        The normalized rows.
    invrms : array of float64
        1 / sqrt(mean(x**2) + eps) of every row, of the shape of the axes that are not normalized.

    Raises
    ------
    TypeError, ValueError
        As `rms_norm`.

    Notes
    -----
    The formula stands in `rms_norm`.

    References
    ----------
    B. Zhang, R. Sennrich, 2019, arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> y, invrms = bnfast.rms_norm_forward(np.array([[1.0, 7.0], [-10.0, 70.0]]), 2)
    >>> invrms.round(3)
    array([0.2 , 0.02])
    """
    chosen = None if activation is None else activation_of(activation, negative_slope)
    y, _, invrms = _primitives.normalize_rows(
        x, normalized_shape, axis, weight, None, eps, False, out, chosen, residual
    )
    return y, invrms


@overload
def rms_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    invrms: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] | None = None,
    parameters: bool = ...,
    activation: str | None = None,
    negative_slope: float = ...,
    residual: Literal[False] | None = None,
    y: ArrayLikeOf[Float] | None = None,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array | None]: ...
@overload
def rms_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    invrms: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] | None = None,
    parameters: bool = ...,
    activation: str | None = None,
    negative_slope: float = ...,
    residual: ArrayLikeOf[Float] | Literal[True],
    y: ArrayLikeOf[Float] | None = None,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array | None, NDArray[Float]]: ...
@in_default_float_mode
def rms_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    normalized_shape: int | Sequence[int],
    invrms: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] | None = None,
    parameters: bool = True,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLikeOf[Float] | bool | None = None,
    y: ArrayLikeOf[Float] | None = None,
    out: NDArray[Float] | None = None,
) -> tuple[Any, ...]:
    """Return the gradients of RMS normalization: of its input and weight.

    Parameters
    ----------
    dy, x, normalized_shape, weight, axis, parameters, activation, negative_slope, residual, y, out
        As in `layer_norm_backward`.
    invrms : array of float32 or float64
        What the forward pass returned.

    Returns
    -------
    dx : array like `x`
        The gradient of the input.
    dweight : array of `normalized_shape`, or None
        The gradient of the weight, of its dtype, or of that of `x` where it is None.
    dresidual : array like `x`
        As in `layer_norm_backward`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    With g = dy * weight, xhat = x * invrms, and means over the elements of a row::

        dx      = invrms * (g - xhat * mean(g * xhat))
        dweight = sum(dy * xhat) over all rows

    with an activation of dz, as in `batch_norm_backward`, in the place of dy.

    References
    ----------
    B. Zhang, R. Sennrich, 2019, arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 7.0], [-10.0, 70.0]])
    >>> y, invrms = bnfast.rms_norm_forward(x, 2)
    >>> dx, dweight = bnfast.rms_norm_backward(np.ones_like(x), x, 2, invrms)
    >>> dweight.round(3)
    array([0. , 2.8])
    """
    wanted = _validation.flag("parameters", parameters)
    given = dy, x, normalized_shape, axis, None, invrms, weight, False, wanted, out
    if activation is None and residual is None and y is None:
        return _primitives.row_gradient(*given)[:2]
    made = _fused_gradients(given, activation, negative_slope, None, residual, y)
    return made[:2] + made[3:]
