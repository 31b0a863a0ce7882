"""Filter response normalization with its thresholded linear unit."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._primitives import Activation, Reduction
from bnfast._typing import Array, ArrayLikeOf, Float

_RESPONSES = Reduction(per_sample=True, centred=False, any_eps=False)
_THRESHOLD = Activation("piecewise", "tau", closed=True)


@in_default_float_mode
def filter_response_norm(
    x: ArrayLikeOf[Float],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    tau: ArrayLike | None = None,
    eps: float = 1e-6,
    *,
    learned_eps: ArrayLike | None = None,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Divide every channel of every sample by its root mean square, and keep it above a threshold.

    Parameters
    ----------
    x : array (N, C, ...) of float16, bfloat16, float32 or float64, at least 2-d
        N samples along axis 0, C channels along `axis`. Any strides.
    weight, bias : array (C,) of float16, bfloat16, float32 or float64, optional
        gamma and beta; 1 and 0 where None.
    tau : array (C,) of float16, bfloat16, float32 or float64, optional
        The threshold of the linear unit, below which no output goes; zeros make it ReLU, None for
        no threshold.
    eps : float
        Added to the mean square; positive.
    learned_eps : array (C,) or (1,) of float16, bfloat16, float32 or float64, optional
        Its absolute value is added to `eps`: for channels of one value in each sample, which are
        only signs without it. One for each channel, or one for all.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC; not 0.
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

    Notes
    -----
    With means over all axes but 0 and `axis`::

        nu2[n] = mean(x[n]**2)
        y[n]   = weight * x[n] / sqrt(nu2[n] + eps + abs(learned_eps)) + bias
        z      = max(y, tau)

    A y that is NaN stays so. Training and evaluation are the same: nothing depends on the batch.

    References
    ----------
    S. Singh, S. Krishnan, 2019, "Filter Response Normalization Layer: Eliminating Batch Dependence
    in the Training of Deep Neural Networks", arXiv:1911.09737.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[[1.0, -7.0]], [[10.0, 70.0]]], dtype=np.float32)
    >>> bnfast.filter_response_norm(x, tau=np.zeros(1, np.float32)).round(3)
    array([[[0.2, 0. ]],
    <BLANKLINE>
           [[0.2, 1.4]]], dtype=float32)
    """
    z, _ = filter_response_norm_forward(
        x, weight, bias, tau, eps, learned_eps=learned_eps, axis=axis, out=out
    )
    return z


@in_default_float_mode
def filter_response_norm_forward(
    x: ArrayLikeOf[Float],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    tau: ArrayLike | None = None,
    eps: float = 1e-6,
    *,
    learned_eps: ArrayLike | None = None,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], NDArray[np.float64]]:
    """Divide channels by their root mean square, and return what the backward pass needs.

    Parameters
    ----------
    x, weight, bias, tau, eps, learned_eps, axis, out
        As in `filter_response_norm`.

    Returns
    -------
    z : array like `x`
        The normalized batch, not below the threshold.
    invrms : array (N, C) of float64
        1 / sqrt(nu2 + eps + abs(learned_eps)).

    Raises
    ------
    TypeError, ValueError
        As `filter_response_norm`.

    Notes
    -----
    The formula stands in `filter_response_norm`.

    References
    ----------
    S. Singh, S. Krishnan, 2019, arXiv:1911.09737.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[[1.0, -7.0]], [[10.0, 70.0]]])
    >>> z, invrms = bnfast.filter_response_norm_forward(x)
    >>> invrms.round(3)
    array([[0.2 ],
           [0.02]])
    """
    more = reads = None
    if learned_eps is not None:
        _, channels = _validation.channel_axis_of_samples(x, axis)
        learned = _learned_eps(learned_eps, channels)
        more = np.abs(np.broadcast_to(learned, channels)).copy()
        reads = {"learned_eps": learned_eps}
    z, _, invrms = _primitives.normalize(
        *(x, axis, weight, bias, eps),
        out=out,
        over=_RESPONSES,
        activation=None if tau is None else _THRESHOLD,
        parameter=tau,
        channel_eps=more,
        reads=reads,
    )
    return z, invrms


@in_default_float_mode
def filter_response_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    invrms: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    tau: ArrayLike | None = None,
    *,
    learned_eps: ArrayLike | None = None,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array, Array | None, Array | None]:
    """Return the gradients of filter response normalization.

    Parameters
    ----------
    dy : array like `x`
        The gradient of the output.
    x : array of float16, bfloat16, float32 or float64
        The input of the forward pass.
    invrms : array (N, C) of float32 or float64
        What the forward pass returned. In float32 an output next to its threshold may be taken for
        one on the other side.
    weight, bias, tau, learned_eps, axis
        As in the forward pass: y is made again, and held against `tau`.
    out : array like `x`, optional
        Where to write dx: `dy` or `x` itself, or an array that shares no element with either.

    Returns
    -------
    dx : array like `x`
        The gradient of the input.
    dweight, dbias : array (C,)
        The gradients of weight and bias, of the dtype of `weight`; where it is None of that of `x`,
        but float32 for one of 16 bits.
    dtau : array (C,), or None without `tau`
        The gradient of the threshold, of its dtype.
    dlearned_eps : array like `learned_eps`, or None without it
        Its gradient; 0 where it is 0.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    With kept = y >= tau, so that at the threshold itself the gradient goes to y, and sums and means
    over all axes but 0 and `axis`::

        xhat[n] = x[n] * invrms[n]
        g[n]    = weight * dy[n] where kept, else 0
        dx[n]   = invrms[n] * (g[n] - xhat[n] * mean(g[n] * xhat[n]))
        dweight = sum_n(sum(dy[n] * xhat[n] where kept))
        dbias   = sum_n(sum(dy[n] where kept))
        dtau    = sum_n(sum(dy[n] where not kept))
        dlearned_eps = sign(learned_eps) * sum_n(-invrms[n]**2 / 2 * sum(g[n] * xhat[n]))

    References
    ----------
    S. Singh, S. Krishnan, 2019, arXiv:1911.09737.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x, tau = np.array([[[1.0, -7.0]]]), np.zeros(1)
    >>> z, invrms = bnfast.filter_response_norm_forward(x, tau=tau)
    >>> gradients = bnfast.filter_response_norm_backward(np.ones_like(x), x, invrms, tau=tau)
    >>> gradients[3]
    array([1.])
    """
    threshold = None if tau is None else _THRESHOLD
    given = dy, x, axis, None, invrms, weight, bias, threshold, tau, out, _RESPONSES
    if learned_eps is None:
        dx, dweight, dbias, dtau = _primitives.activated_gradient(*given)
        return dx, dweight, dbias, dtau, None
    array, channels = _validation.channel_axis_of_samples(x, axis)
    learned = _learned_eps(learned_eps, channels)
    scale = _validation.channel_parameter("weight", weight, channels)
    sums = np.zeros((2, len(array), channels))
    reads = {"learned_eps": learned_eps}
    dx, dweight, dbias, dtau = _primitives.activated_gradient(*given, sums=sums, reads=reads)
    gamma = 1.0 if scale is None else scale.astype(np.float64)
    wide = np.asarray(invrms, np.float64)
    with np.errstate(all="ignore"):
        deps = -0.5 * gamma * (wide**2 * sums[1]).sum(0)
        own = deps if len(learned) == channels else deps.sum(keepdims=True)
        own = np.sign(learned) * own
    dlearned = _validation.rounded_gradient("learned_eps", learned_eps, own, array)
    return dx, dweight, dbias, dtau, dlearned


def _learned_eps(value: object, channels: int) -> Array:
    """Return one value for each channel, or one for all."""
    array = _validation.floating_array("learned_eps", value)
    one_for_all = array.shape == (1,)
    count = 1 if one_for_all else channels
    return _validation.required_channel_parameter("learned_eps", array, count)
