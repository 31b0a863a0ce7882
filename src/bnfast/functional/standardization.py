"""Standardizations of weights: what they mean, their defaults, their documentation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float


@in_default_float_mode
def weight_standardization(
    w: ArrayLikeOf[Float],
    gain: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 0,
    eps_inside: bool = True,
    unbiased: bool = False,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Give every filter the mean 0 and the deviation 1.

    Parameters
    ----------
    w : array of float32 or float64, at least 2-d
        The weights, K of them in each filter. Any strides.
    gain : array (D,) of float32 or float64, optional
        What each filter is multiplied by; 1 where None.
    eps : float
        Added to the variance or, without `eps_inside`, to the deviation; not negative.
    axis : int
        The axis of the filters: 0 for OIHW, -1 for HWIO.
    eps_inside : bool
        Add `eps` under the root, as most libraries do, or to the root, as the authors did.
    unbiased : bool
        Divide by K - 1 in the variance, as the authors' PyTorch code did, rather than by K; then K
        must be more than 1.
    out : array like `w`, optional
        Where to write: `w` itself, or an array that shares no element with it.

    Returns
    -------
    array like `w`

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    With mu and var of each filter::

        y = gain * (w - mu) / sqrt(var + eps)        or        gain * (w - mu) / (sqrt(var) + eps)

    References
    ----------
    S. Qiao, H. Wang, C. Liu, W. Shen, A. Yuille, 2019, "Micro-Batch Training with Batch-Channel
    Normalization and Weight Standardization", arXiv:1903.10520.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> bnfast.weight_standardization(np.array([[1.0, 3.0], [10.0, 30.0]])).round(3)
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    y, _, _ = weight_standardization_forward(
        w, gain, eps, axis=axis, eps_inside=eps_inside, unbiased=unbiased, out=out
    )
    return y


@in_default_float_mode
def weight_standardization_forward(
    w: ArrayLikeOf[Float],
    gain: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 0,
    eps_inside: bool = True,
    unbiased: bool = False,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], NDArray[np.float64], NDArray[np.float64]]:
    """Standardize every filter; return the statistics it had for the backward pass.

    Parameters
    ----------
    w, gain, eps, axis, eps_inside, unbiased, out
        As in `weight_standardization`.

    Returns
    -------
    y : array like `w`
        The standardized weights.
    mean, std : array (D,) of float64
        mu and sqrt(var), without `eps`: what the latter is added to is an option of backward too.

    Raises
    ------
    TypeError, ValueError
        As `weight_standardization`.

    Notes
    -----
    The formulas stand in `weight_standardization`.

    References
    ----------
    S. Qiao et al., 2019, arXiv:1903.10520.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> y, mean, std = bnfast.weight_standardization_forward(np.array([[1.0, 3.0], [10.0, 30.0]]))
    >>> mean, std
    (array([ 2., 20.]), array([ 1., 10.]))
    """
    deviation = _primitives.Deviation(eps, eps_inside, unbiased)
    return _primitives.standardize(w, gain, deviation, axis, out)


@in_default_float_mode
def weight_standardization_backward(
    dy: ArrayLikeOf[Float],
    w: ArrayLikeOf[Float],
    mean: ArrayLike,
    std: ArrayLike,
    gain: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 0,
    eps_inside: bool = True,
    unbiased: bool = False,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array]:
    """Return the gradients of weight standardization: of weights and gain.

    Parameters
    ----------
    dy : array like `w`
        The gradient of the standardized weights.
    w, gain, eps, axis, eps_inside, unbiased
        As in the forward pass.
    mean, std : array (D,) of float32 or float64
        What the forward pass returned.
    out : array like `w`, optional
        Where to write dw: `dy` or `w` itself, or an array that shares no element with either.

    Returns
    -------
    dw : array like `w`
        The gradient of the weights.
    dgain : array (D,)
        The gradient of the gain, of its dtype, or of that of `w` where it is None.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    With c = w - mu, K' = K - 1 or K, and D = sqrt(var + eps) or sqrt(var) + eps::

        dgain = sum(dy * c) / D
        dw    = gain / D * (dy - mean(dy) - c * sum(dy * c) / (K' * D * E))

    where E = D with eps inside, and sqrt(var) with eps outside.

    References
    ----------
    S. Qiao et al., 2019, arXiv:1903.10520.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> w, dy = np.array([[1.0, 3.0, 5.0]]), np.array([[1.0, 0.0, 0.0]])
    >>> y, mean, std = bnfast.weight_standardization_forward(w)
    >>> dw, dgain = bnfast.weight_standardization_backward(dy, w, mean, std)
    >>> bool(abs(dw.sum()) < 1e-12), dgain.round(3)
    (True, array([-1.225]))
    """
    deviation = _primitives.Deviation(eps, eps_inside, unbiased)
    return _primitives.standardize_gradient(dy, w, mean, std, gain, deviation, axis, out)


@in_default_float_mode
def scaled_weight_standardization(
    w: ArrayLikeOf[Float],
    gain: ArrayLike | None = None,
    gamma: float = 1.0,
    eps: float = 1e-4,
    *,
    axis: int = 0,
    floor: bool = True,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Give every filter the mean 0 and the length `gamma`, as networks without normalization do.

    Parameters
    ----------
    w : array of float32 or float64, at least 2-d
        The weights, K of them in each filter. Any strides.
    gain : array (D,) of float32 or float64, optional
        What each filter is multiplied by; 1 where None.
    gamma : float
        The gain of the activation that follows: 1.7139588594436646 for ReLU.
    eps : float
        With `floor` the least of K * var; else added to var; not negative.
    axis : int
        The axis of the filters: 0 for OIHW, -1 for HWIO.
    floor : bool
        As in the authors' code; False as in timm, whose default `eps` is 1e-6.
    out : array like `w`, optional
        Where to write: `w` itself, or an array that shares no element with it.

    Returns
    -------
    array like `w`

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    With mu and var (over K) of each filter::

        y = gain * gamma * (w - mu) / sqrt(max(K * var, eps))
        y = gain * gamma * (w - mu) / sqrt(K * (var + eps))          without floor

    References
    ----------
    A. Brock, S. De, S. L. Smith, 2021, "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv:2101.08692.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> bnfast.scaled_weight_standardization(np.array([[1.0, 3.0]])).round(3)
    array([[-0.707,  0.707]])
    """
    y, _, _ = scaled_weight_standardization_forward(
        w, gain, gamma, eps, axis=axis, floor=floor, out=out
    )
    return y


@in_default_float_mode
def scaled_weight_standardization_forward(
    w: ArrayLikeOf[Float],
    gain: ArrayLike | None = None,
    gamma: float = 1.0,
    eps: float = 1e-4,
    *,
    axis: int = 0,
    floor: bool = True,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], NDArray[np.float64], NDArray[np.float64]]:
    """Give every filter the length `gamma`; return the statistics it had for the backward pass.

    Parameters
    ----------
    w, gain, gamma, eps, axis, floor, out
        As in `scaled_weight_standardization`.

    Returns
    -------
    y : array like `w`
        The standardized weights.
    mean, std : array (D,) of float64
        mu and sqrt(var), as they were: neither floored nor with `eps` added.

    Raises
    ------
    TypeError, ValueError
        As `scaled_weight_standardization`.

    Notes
    -----
    The formulas stand in `scaled_weight_standardization`.

    References
    ----------
    A. Brock, S. De, S. L. Smith, 2021, arXiv:2101.08692.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> y, mean, std = bnfast.scaled_weight_standardization_forward(np.array([[1.0, 3.0]]))
    >>> mean, std
    (array([2.]), array([1.]))
    """
    length = _primitives.Length(gamma, eps, floor)
    return _primitives.standardize(w, gain, length, axis, out)


@in_default_float_mode
def scaled_weight_standardization_backward(
    dy: ArrayLikeOf[Float],
    w: ArrayLikeOf[Float],
    mean: ArrayLike,
    std: ArrayLike,
    gain: ArrayLike | None = None,
    gamma: float = 1.0,
    eps: float = 1e-4,
    *,
    axis: int = 0,
    floor: bool = True,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array]:
    """Return the gradients of scaled weight standardization: of weights and gain.

    Parameters
    ----------
    dy : array like `w`
        The gradient of the standardized weights.
    w, gain, gamma, eps, axis, floor
        As in the forward pass.
    mean, std : array (D,) of float32 or float64
        What the forward pass returned.
    out : array like `w`, optional
        Where to write dw: `dy` or `w` itself, or an array that shares no element with either.

    Returns
    -------
    dw : array like `w`
        The gradient of the weights.
    dgain : array (D,)
        The gradient of the gain, of its dtype, or of that of `w` where it is None.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    As `weight_standardization_backward` with D = sqrt(max(K * var, eps)) / gamma and so on; where
    `eps` is the larger, D is a constant, and the term with c vanishes.

    References
    ----------
    A. Brock, S. De, S. L. Smith, 2021, arXiv:2101.08692.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> w = np.array([[1.0, 3.0, 5.0]])
    >>> y, mean, std = bnfast.scaled_weight_standardization_forward(w)
    >>> dw, dgain = bnfast.scaled_weight_standardization_backward(np.ones_like(w), w, mean, std)
    >>> bool(np.abs(dw).max() < 1e-12)
    True
    """
    length = _primitives.Length(gamma, eps, floor)
    return _primitives.standardize_gradient(dy, w, mean, std, gain, length, axis, out)
