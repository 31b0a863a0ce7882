"""Standardizations of weights: what they mean, their defaults, their documentation."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bnfast import _primitives, _validation
from bnfast._deviations import deviations, scale_deviations
from bnfast._float_mode import in_default_float_mode
from bnfast._primitives import Reduction
from bnfast._scaling import (
    MODEST_EXPONENT,
    ScaledChannels,
    exponents_to_one,
    scaled,
    scaled_channels,
)
from bnfast._typing import Array, Float, Parameter

_DEVIATION = Reduction()

# Of deviations in units of their invstd: the gradient of a normalization by its statistics has the
# square of that, which is lost in any sum.
_NEXT_TO_NOTHING = 2.0**-40


@in_default_float_mode
def weight_standardization(
    w: NDArray[Float],
    gain: Parameter | None = None,
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
    w: NDArray[Float],
    gain: Parameter | None = None,
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
    deviation = _Deviation(
        _validation.epsilon(eps, training=False), _validation.flag("eps_inside", eps_inside)
    )
    return _forward(w, gain, deviation, int(_validation.flag("unbiased", unbiased)), axis, out)


@in_default_float_mode
def weight_standardization_backward(
    dy: NDArray[Float],
    w: NDArray[Float],
    mean: Parameter,
    std: Parameter,
    gain: Parameter | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 0,
    eps_inside: bool = True,
    unbiased: bool = False,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Parameter]:
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
    deviation = _Deviation(
        _validation.epsilon(eps, training=False), _validation.flag("eps_inside", eps_inside)
    )
    return _backward(
        dy, w, mean, std, gain, deviation, int(_validation.flag("unbiased", unbiased)), axis, out
    )


@in_default_float_mode
def scaled_weight_standardization(
    w: NDArray[Float],
    gain: Parameter | None = None,
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
    w: NDArray[Float],
    gain: Parameter | None = None,
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
    return _forward(w, gain, _scaled(gamma, eps, floor), 0, axis, out)


@in_default_float_mode
def scaled_weight_standardization_backward(
    dy: NDArray[Float],
    w: NDArray[Float],
    mean: Parameter,
    std: Parameter,
    gain: Parameter | None = None,
    gamma: float = 1.0,
    eps: float = 1e-4,
    *,
    axis: int = 0,
    floor: bool = True,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Parameter]:
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
    return _backward(dy, w, mean, std, gain, _scaled(gamma, eps, floor), 0, axis, out)


class _Divisor(NamedTuple):
    """Of every filter (float64): y = (w - mean) / value, and what the value's gradient is.

    That of a normalization whose invstd is `strength`: one to which deviations are next to nothing
    where the value is constant.
    """

    value: Array
    strength: Array

    def scale(self, gain: Array | None) -> Array:
        """Return what w - mean is multiplied by: where it is divided by 0 it is 0, and stays so."""
        factor = 1.0 if gain is None else gain
        return np.where(self.value == 0, 0.0, factor / self.value)

    def as_normalization(self) -> tuple[Array, Array]:
        """Return the invstd of one with this gradient, and 1 / value as a multiple of it."""
        nothing = self.value == 0
        ratio = np.where(nothing, 0.0, 1.0 / (self.value * self.strength))
        return np.where(nothing, 1.0, self.strength), ratio


class _Deviation(NamedTuple):
    """Weight standardization divides by the deviation, with eps under the root or added to it."""

    eps: float | Array
    inside: bool

    def least(self) -> float:
        """Return about what a constant filter is divided by."""
        return math.sqrt(self.eps) if self.inside else float(self.eps)

    def scaled(self, exponent: Array) -> _Deviation:
        """Return the same for filters that have been multiplied by powers of two."""
        return self._replace(eps=np.ldexp(self.eps, 2 * exponent if self.inside else exponent))

    def divisor(self, std: Array, each: int, lost: int) -> _Divisor:
        """Return it, where of `each` values `lost` do not count in the variance."""
        counted = np.sqrt(np.float64(each) / np.float64(each - lost))
        if self.inside:
            value = np.sqrt(std**2 + self.eps)
            return _Divisor(value, counted / value)
        value = std + self.eps
        # Without a deviation there is eps alone, a constant: as PyTorch has the gradient.
        deviates = std > value * _NEXT_TO_NOTHING**2
        return _Divisor(value, np.where(deviates, counted / np.sqrt(value * std), 1 / value))


class _ScaledLength(NamedTuple):
    """Scaled weight standardization divides by the length, which has a floor or eps added."""

    gamma: float
    eps: float | Array
    floor: bool

    def least(self) -> float:
        """As that of `_Deviation`."""
        return math.sqrt(self.eps)

    def scaled(self, exponent: Array) -> _ScaledLength:
        """As that of `_Deviation`."""
        return self._replace(eps=np.ldexp(self.eps, 2 * exponent))

    def divisor(self, std: Array, each: int, lost: int) -> _Divisor:
        """As that of `_Deviation`."""
        squares, root = each * std**2, math.sqrt(each)
        if not self.floor:
            length = np.sqrt(squares + each * self.eps)
            return _Divisor(length / self.gamma, root / length)
        length = np.sqrt(np.maximum(squares, self.eps))
        constant = np.where(std > length * _NEXT_TO_NOTHING, _NEXT_TO_NOTHING, 1.0)
        strength = np.where(squares > self.eps, root, constant) / length
        return _Divisor(length / self.gamma, strength)


def _scaled(gamma: object, eps: object, floor: object) -> _ScaledLength:
    scale = _validation.real("gamma", gamma)
    return _ScaledLength(
        scale, _validation.epsilon(eps, training=False), _validation.flag("floor", floor)
    )


def _extreme_filters(
    w: Array, axis: int, std: Array, by: _Deviation | _ScaledLength
) -> ScaledChannels | None:
    """Return those whose divisor is at an end of the range, made near 1; if there are some."""
    furthest, least = MODEST_EXPONENT[w.dtype], by.least()
    most = 2.0**furthest
    if not std.size or (std.max() < most and (1 / most < least < most or std.min() > 1 / most)):
        return None
    exponent = exponents_to_one(np.maximum(std, least))
    which = np.flatnonzero(np.abs(exponent) > furthest)
    return scaled_channels(w, axis, which, exponent[which]) if which.size else None


def _filters(w: object, axis: object, lost: int) -> tuple[Array, int, int]:
    """Return weights, their axis of filters, its size; `lost` values do not count in variances."""
    array, own, filters = _validation.weights("w", w, axis)
    each = array.size // filters if filters else 0
    _validation.enough_values("w", array, each, "filter", unbiased=lost > 0)
    return array, own, filters


def _forward(
    w: NDArray[Float],
    gain: Parameter | None,
    by: _Deviation | _ScaledLength,
    lost: int,
    axis: int,
    out: NDArray[Float] | None,
) -> tuple[NDArray[Float], NDArray[np.float64], NDArray[np.float64]]:
    """Return y, and mean and std, in whose variance `lost` of the values do not count."""
    array, axis, filters = _filters(w, axis, lost)
    own = _validation.channel_parameter("gain", gain, filters, "filters")
    if out is not None:
        _validation.output(out, array, {"w": array, "gain": gain}, ("w",))
    of = deviations(array, axis, lost)
    each = of.values
    extreme = _extreme_filters(array, axis, of.std, by)
    with np.errstate(all="ignore"):
        scale = by.divisor(of.std, each, lost).scale(own)
        y = scale_deviations(array, axis, of, scale, out=out)
        if extreme is not None:
            which, copies, exponent = extreme
            anew = deviations(copies, 0, lost)
            divisor = by.scaled(exponent).divisor(anew.std, each, lost)
            scale = divisor.scale(None if own is None else own[which])
            np.moveaxis(y, axis, 0)[which] = scale_deviations(copies, 0, anew, scale)
    return y, of.mean, of.std


def _backward(
    dy: NDArray[Float],
    w: NDArray[Float],
    mean: Parameter,
    std: Parameter,
    gain: Parameter | None,
    by: _Deviation | _ScaledLength,
    lost: int,
    axis: int,
    out: NDArray[Float] | None,
) -> tuple[NDArray[Float], Parameter]:
    """Return dw = gain / value * (dy - mean(dy) - c * strength**2 / K * sum(dy * c)), and dgain."""
    array, axis, filters = _filters(w, axis, lost)
    upstream = _validation.upstream_gradient(dy, array, ("dy", "w"))
    centre = _validation.required_channel_parameter("mean", mean, filters, "filters")
    given = _validation.required_channel_parameter("std", std, filters, "filters")
    own = _validation.channel_parameter("gain", gain, filters, "filters")
    if out is not None:
        others = {"dy": upstream, "w": array, "gain": gain, "mean": mean, "std": std}
        _validation.output(out, array, others, ("dy", "w"))
    deviation = given.astype(np.float64)
    each = array.size // filters if filters else 0
    extreme = _extreme_filters(array, axis, deviation, by)
    if extreme is not None:
        their_upstream = np.moveaxis(upstream, axis, 0)[extreme.which]  # it may be overwritten
    with np.errstate(all="ignore"):
        divisor = by.divisor(deviation, each, lost)
        if not each:  # nothing was divided by nothing
            divisor = _Divisor(np.ones(filters), np.ones(filters))
        strength, ratio = divisor.as_normalization()
        weight = ratio if own is None else own * ratio
        dw, dgain, _ = _primitives.gradient(
            upstream, array, axis, centre, strength, weight, False, out, _DEVIATION
        )
        dgain *= ratio
        if extreme is not None:
            which, copies, exponent = extreme
            anew = deviations(copies, 0, lost)  # those given may have lost bits
            strength, ratio = by.scaled(exponent).divisor(anew.std, each, lost).as_normalization()
            weight = ratio if own is None else own[which] * ratio
            again, products, _ = _primitives.gradient(
                *(their_upstream, copies, 0, anew.mean, strength, weight, False, None, _DEVIATION)
            )
            np.moveaxis(dw, axis, 0)[which] = scaled(again, exponent)
            dgain[which] = products * ratio
        return dw, dgain.astype(array.dtype if own is None else own.dtype)
