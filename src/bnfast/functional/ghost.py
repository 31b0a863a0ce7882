"""Ghost batch normalization: what it means, its defaults, its documentation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float


@in_default_float_mode
def ghost_batch_norm(
    x: ArrayLikeOf[Float],
    ghost_size: int,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
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
    x : array (N, C, ...) of float16, bfloat16, float32 or float64, at least 2-d
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
    unbiased = _validation.flag("unbiased", unbiased)
    training = _validation.flag("training", training)
    new = _validation.real("momentum", momentum)
    if training:
        y, _, _ = _primitives.ghost_normalize(
            *(x, axis, ghost_size, weight, bias, eps, running_mean, running_var),
            *(lambda _: new, unbiased, out),
        )
        return y
    _validation.channel_axis_of_samples(x, axis)
    _validation.integer_from("ghost_size", ghost_size, 1)
    return _primitives.scale_shift(x, axis, running_mean, running_var, weight, bias, eps, None, out)


@in_default_float_mode
def ghost_batch_norm_forward(
    x: ArrayLikeOf[Float],
    ghost_size: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
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
    return _primitives.ghost_normalize(x, axis, ghost_size, weight, bias, eps, out=out)


@in_default_float_mode
def ghost_batch_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    ghost_size: int,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array]:
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
        The gradients of weight and bias, of the dtype of `weight`; where it is None of that of `x`,
        but float32 for one of 16 bits.

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
    return _primitives.ghost_gradient(dy, x, axis, ghost_size, mean, invstd, weight, out)
