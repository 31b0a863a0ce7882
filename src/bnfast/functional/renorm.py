"""Batch renormalization: what it means, its defaults, its documentation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float


class RenormSchedule(NamedTuple):
    """How far batch renormalization may correct a batch, step by step.

    Parameters
    ----------
    r_max, d_max : float
        The limits in the end.
    begin : int
        The steps of plain batch normalization before, with limits of 1 and 0.
    r_end, d_end : int
        The steps at which the limits reach their ends, after growing linearly from `begin` on;
        where that is not after `begin`, they are there at `begin`.

    References
    ----------
    S. Ioffe, 2017, arXiv:1702.03275, section 4.1, whose values are the defaults.

    Examples
    --------
    >>> import bnfast
    >>> bnfast.RenormSchedule().at(15000)
    (1.5714285714285714, 2.5)
    >>> bnfast.RenormSchedule(3.0, 5.0, 0, 0, 0).at(0)  # the same limits at every step
    (3.0, 5.0)
    """

    r_max: float = 3.0
    d_max: float = 5.0
    begin: int = 5000
    r_end: int = 40000
    d_end: int = 25000

    @in_default_float_mode
    def at(self, step: int) -> tuple[float, float]:
        """Return r_max and d_max of a step, counted from 0."""

        def gone(end: int) -> float:
            if step < self.begin:
                return 0.0
            return 1.0 if step >= end else (step - self.begin) / (end - self.begin)

        return 1.0 + (self.r_max - 1.0) * gone(self.r_end), self.d_max * gone(self.d_end)


class Renormalized(NamedTuple):
    """What `batch_renorm_backward` needs of the pass before it.

    Attributes
    ----------
    mean, invstd : array (C,) of float64
        mu and 1 / sigma of the batch.
    r, d : array (C,) of float64
        The corrections towards the running statistics, within their limits.
    """

    mean: NDArray[np.float64]
    invstd: NDArray[np.float64]
    r: NDArray[np.float64]
    d: NDArray[np.float64]


@in_default_float_mode
def batch_renorm(
    x: ArrayLikeOf[Float],
    running_mean: ArrayLike,
    running_std: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-5,
    *,
    r_max: float = 1.0,
    d_max: float = 0.0,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Normalize a batch, corrected towards the running statistics.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, at least 2-d
        The batch. Any strides; C channels along `axis`, M values in each.
    running_mean, running_std : array (C,) of float16, bfloat16, float32 or float64
        Of all batches: updated in place in training, used as they are in evaluation. It is the
        standard deviation that is kept, not the variance.
    weight, bias : array (C,) of float16, bfloat16, float32 or float64, optional
        gamma and beta; 1 and 0 where None.
    training : bool
        Normalize with the statistics of `x` itself rather than the running ones.
    momentum : float
        The weight of the NEW batch in the running statistics.
    eps : float
        Added to the variance of the batch; positive.
    r_max, d_max : float
        How far a batch may be corrected: at least 1, and at least 0. At 1 and 0, the defaults, this
        is batch normalization; see `RenormSchedule`.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC.
    out : array like `x`, optional
        Where to write: `x` itself, or an array that shares no element with it.

    Returns
    -------
    array like `x`
        `out`, or a new array laid out like `x`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Warns
    -----
    RuntimeWarning
        As `batch_norm`.

    Notes
    -----
    In training, with mu and sigma = sqrt(var + eps) of the batch, and the running statistics as
    they were before it::

        r = clip(sigma / running_std, 1 / r_max, r_max)
        d = clip((mu - running_mean) / running_std, -d_max, d_max)
        y = weight * ((x - mu) / sigma * r + d) + bias
        running_mean += momentum * (mu - running_mean)
        running_std  += momentum * (sigma - running_std)

    in evaluation, ``y = weight * (x - running_mean) / running_std + bias``. A running_std of 0,
    which constant channels and a tiny `eps` make, stands for its limit: r and d are at their own,
    and 0 / 0 is 0, so that evaluation makes the bias of a channel that is still constant. As in
    `batch_norm`, what has no weight leaves nothing in the running statistics.

    References
    ----------
    S. Ioffe, 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models", arXiv:1702.03275.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0], [3.0]], dtype=np.float32)
    >>> mean, std = np.zeros(1, np.float32), np.ones(1, np.float32)
    >>> bnfast.batch_renorm(x, mean, std, training=True, r_max=3, d_max=5).round(3)
    array([[1.],
           [3.]], dtype=float32)
    """
    if _validation.flag("training", training):
        y, _ = batch_renorm_forward(
            *(x, running_mean, running_std, weight, bias, momentum, eps),
            r_max=r_max,
            d_max=d_max,
            axis=axis,
            out=out,
        )
        return y
    _validation.real("momentum", momentum)
    _validation.epsilon(eps, training=False)
    _validation.renorm_limits(r_max, d_max)
    y, _ = _primitives.evaluate_renorm(x, axis, running_mean, running_std, weight, bias, None, out)
    return y


@in_default_float_mode
def batch_renorm_forward(
    x: ArrayLikeOf[Float],
    running_mean: ArrayLike,
    running_std: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    momentum: float = 0.01,
    eps: float = 1e-5,
    *,
    r_max: float = 1.0,
    d_max: float = 0.0,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Renormalized]:
    """Normalize a batch, corrected, and return what the backward pass needs.

    Parameters
    ----------
    x, running_mean, running_std, weight, bias, momentum, eps, r_max, d_max, axis, out
        As in `batch_renorm` in training: the running statistics are updated in place.

    Returns
    -------
    y : array like `x`
        The normalized batch.
    saved : Renormalized
        mean, invstd, r and d.

    Raises
    ------
    TypeError, ValueError
        As `batch_renorm`.

    Notes
    -----
    The formulas stand in `batch_renorm`. Two passes over `x`: r and d must be known between them.

    References
    ----------
    S. Ioffe, 2017, arXiv:1702.03275.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0], [3.0]])
    >>> y, saved = bnfast.batch_renorm_forward(x, np.zeros(1), np.ones(1))
    >>> saved.r, saved.d
    (array([1.]), array([0.]))
    """
    if running_mean is None and running_std is None:
        raise TypeError("running_mean and running_std must be arrays, got None")
    y, mean, invstd, r, d = _primitives.renormalize(
        x, running_mean, running_std, weight, bias, momentum, eps, r_max, d_max, axis, out
    )
    return y, Renormalized(mean, invstd, r, d)


@in_default_float_mode
def batch_renorm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    saved: Renormalized,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array]:
    """Return the gradients of batch renormalization: of its input, weight and bias.

    Parameters
    ----------
    dy : array like `x`
        The gradient of the output.
    x : array of float16, bfloat16, float32 or float64, at least 2-d
        The input of the forward pass.
    saved : Renormalized
        What the forward pass returned; r and d are constants to the gradient.
    weight : array (C,) of float16, bfloat16, float32 or float64, optional
        gamma; 1 where None.
    axis : int
        The channel axis.
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
    With u = (x - mu) / sigma, and sums over all axes but `axis`::

        dbias   = sum(dy)
        dweight = r * sum(dy * u) + d * sum(dy)
        dx      = weight * r / sigma * (dy - sum(dy) / M - u * sum(dy * u) / M)

    References
    ----------
    S. Ioffe, 2017, arXiv:1702.03275.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, saved = bnfast.batch_renorm_forward(x, np.zeros(1), np.ones(1), r_max=3, d_max=5)
    >>> dx, dweight, dbias = bnfast.batch_renorm_backward(np.ones_like(x), x, saved)
    >>> dbias, dweight.round(6)
    (array([3.]), array([9.]))
    """
    mean, invstd, r, d = _validation.saved_value(saved, Renormalized, "batch_renorm_forward")
    return _primitives.renorm_gradient(dy, x, mean, invstd, r, d, weight, axis, out)
