"""Conditional batch normalization: each sample has a weight and a bias of its own."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float


@in_default_float_mode
def conditional_batch_norm(
    x: ArrayLikeOf[Float],
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    running_mean: ArrayLike | None = None,
    running_var: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    unbiased: bool = True,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Normalize every channel of a batch, then scale and shift each sample by its own parameters.

    Parameters
    ----------
    x : array (N, C, ...) of float32 or float64, at least 2-d
        N samples along axis 0, C channels along `axis`, M values in each channel of the batch. Any
        strides.
    weight, bias : array (N, C) of float32 or float64, or None
        gamma and beta of each sample; 1 and 0 where None.
    running_mean, running_var : array (C,) of float32 or float64, or None
        In training they are updated in place, or both None; in evaluation they are what `x` is
        normalized with, and required.
    training : bool
        Normalize with the statistics of `x` itself rather than the running ones.
    momentum : float
        The weight of the NEW batch in the running statistics, as in PyTorch.
    eps : float
        Added to the variance: positive in training, not negative in evaluation.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC; not 0.
    unbiased : bool
        Give running_var the variance divided by M - 1 rather than by M. The normalization itself
        always divides by M.
    out : array like `x`, optional
        Where to write: `x` itself, or an array that shares no element with it.

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
        As `batch_norm`.

    Notes
    -----
    In training, over all axes but `axis`, those of `batch_norm`::

        mu   = mean(x)
        var  = mean((x - mu)**2)
        y[n] = weight[n] * (x[n] - mu) / sqrt(var + eps) + bias[n]

    and the running statistics take mu and var as they do there; in evaluation, mu = running_mean
    and var = running_var.

    References
    ----------
    V. Dumoulin, J. Shlens, M. Kudlur, 2017, "A Learned Representation For Artistic Style",
    arXiv:1610.07629, where the statistics are those of each sample; H. de Vries et al., 2017,
    "Modulating early visual processing by language", arXiv:1707.00683.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0], [3.0]], dtype=np.float32)
    >>> weight, bias = np.array([[1.0], [10.0]]), np.array([[0.0], [5.0]])
    >>> bnfast.conditional_batch_norm(x, weight, bias, training=True).round(3)
    array([[-1.],
           [15.]], dtype=float32)
    """
    unbiased = _validation.flag("unbiased", unbiased)
    if _validation.flag("training", training):
        y, _, _ = _primitives.conditional_normalize(
            x, axis, weight, bias, eps, running_mean, running_var, momentum, unbiased, out
        )
        return y
    _validation.real("momentum", momentum)
    return _primitives.conditional_scale_shift(
        x, axis, running_mean, running_var, weight, bias, eps, out
    )


@in_default_float_mode
def conditional_batch_norm_forward(
    x: ArrayLikeOf[Float],
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], NDArray[np.float64], NDArray[np.float64]]:
    """Normalize with the statistics of the batch and return them for the backward pass.

    Parameters
    ----------
    x, weight, bias, eps, axis, out
        As in `conditional_batch_norm` with ``training=True``.

    Returns
    -------
    y : array like `x`
        The normalized batch, each sample scaled and shifted by its own parameters.
    mean, invstd : array (C,) of float64
        mu and 1 / sqrt(var + eps).

    Raises
    ------
    TypeError, ValueError
        As `conditional_batch_norm`.

    Notes
    -----
    The formula stands in `conditional_batch_norm`. The normalized batch is written, and then
    scaled and shifted in place: one rounding more than in `batch_norm_forward`.

    References
    ----------
    V. Dumoulin, J. Shlens, M. Kudlur, 2017, arXiv:1610.07629; H. de Vries et al., 2017,
    arXiv:1707.00683.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x, weight = np.array([[1.0], [3.0]]), np.array([[1.0], [10.0]])
    >>> y, mean, invstd = bnfast.conditional_batch_norm_forward(x, weight, None)
    >>> mean, invstd.round(4)
    (array([2.]), array([1.]))
    """
    return _primitives.conditional_normalize(x, axis, weight, bias, eps, out=out)


@in_default_float_mode
def conditional_batch_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    training: bool = True,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array]:
    """Return the gradients of conditional batch normalization: of its input, weight and bias.

    Parameters
    ----------
    dy : array like `x`
        The gradient of the output.
    x : array (N, C, ...) of float32 or float64, at least 2-d
        The input of the forward pass.
    mean, invstd : array (C,) of float32 or float64
        What the forward pass returned; in evaluation, running_mean and
        1 / sqrt(running_var + eps).
    weight : array (N, C) of float32 or float64, optional
        gamma of each sample; 1 where None.
    axis : int
        The channel axis, not 0.
    training : bool
        Whether mean and invstd came from `x`. If not they are constants, and the gradient does not
        pass through them.
    out : array like `x`, optional
        Where to write dx: `dy` itself, or an array that shares no element with it. In evaluation it
        may be `x`, which training reads once more after it has begun to write.

    Returns
    -------
    dx : array like `x`
        The gradient of the input.
    dweight, dbias : array (N, C)
        The gradients of weight and bias, of the dtype of `weight`, or of `x` where it is None.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    With xhat = (x - mean) * invstd, sums over all axes but 0 and `axis`, and means over all but
    `axis`::

        dbias[n]   = sum(dy[n])
        dweight[n] = sum(dy[n] * xhat[n])
        g[n]       = weight[n] * dy[n]
        dx         = invstd * (g - mean(g) - xhat * mean(g * xhat))    in training
        dx         = invstd * g                                        in evaluation

    Of float64 data, dweight has what one float64 holds of the mean: it loses ``|mean| / std`` ulps.

    References
    ----------
    V. Dumoulin, J. Shlens, M. Kudlur, 2017, arXiv:1610.07629; H. de Vries et al., 2017,
    arXiv:1707.00683.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x, weight = np.array([[1.0], [3.0]]), np.array([[1.0], [10.0]])
    >>> y, mean, invstd = bnfast.conditional_batch_norm_forward(x, weight, None)
    >>> dy = np.array([[2.0], [1.0]])
    >>> dx, dweight, dbias = bnfast.conditional_batch_norm_backward(dy, x, mean, invstd, weight)
    >>> dbias
    array([[2.],
           [1.]])
    """
    constant_statistics = not _validation.flag("training", training)
    return _primitives.conditional_gradient(
        dy, x, axis, mean, invstd, weight, constant_statistics, out
    )
