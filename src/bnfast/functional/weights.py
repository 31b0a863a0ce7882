"""Lengths and standardizations of weights: what they mean, their defaults, their documentation."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

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
    largest_values,
    scaled,
    scaled_channels,
)

Array = NDArray[Any]
Float = TypeVar("Float", np.float32, np.float64)
Parameter = NDArray[np.float32] | NDArray[np.float64]

_LENGTH = Reduction(centred=False)
_DEVIATION = Reduction()

# Of deviations in units of their invstd: the gradient of a normalization by its statistics has the
# square of that, which is lost in any sum.
_NEXT_TO_NOTHING = 2.0**-40


@in_default_float_mode
def weight_norm(
    v: NDArray[Float],
    g: Parameter,
    dim: int | None = 0,
    eps: float = 0.0,
    *,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Give every filter a length of its own, as ``torch.nn.utils.parametrizations.weight_norm``.

    Parameters
    ----------
    v : array of float32 or float64
        The directions. Any strides.
    g : array of float32 or float64
        The lengths: one for each index of `dim`, of the shape (D,) or, as in PyTorch, that of `v`
        with all other sizes 1; with ``dim=None`` a single one.
    dim : int or None
        The axis of the filters; None for one length of the whole array. Not negative: PyTorch takes
        -1 for None, not for the last axis, so here it is neither.
    eps : float
        The least length by which a filter is divided; 0, as in PyTorch, for no such limit.
    out : array like `v`, optional
        Where to write: `v` itself, or an array that shares no element with it.

    Returns
    -------
    array like `v`

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    ``w = g * v / max(||v||, eps)``, the norm over all axes but `dim`. A filter of zeros has no
    direction: without `eps` it gives NaN, with it zeros. Filters at the ends of the range of their
    dtype are multiplied by a power of two.

    References
    ----------
    T. Salimans, D. P. Kingma, 2016, "Weight Normalization: A Simple Reparameterization to
    Accelerate Training of Deep Neural Networks", arXiv:1602.07868.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> v = np.array([[3.0, 4.0], [0.0, 2.0]])
    >>> bnfast.weight_norm(v, np.array([1.0, 5.0]))
    array([[0.6, 0.8],
           [0. , 5. ]])
    """
    w, _ = weight_norm_forward(v, g, dim, eps, out=out)
    return w


@in_default_float_mode
def weight_norm_forward(
    v: NDArray[Float],
    g: Parameter,
    dim: int | None = 0,
    eps: float = 0.0,
    *,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], NDArray[np.float64]]:
    """Give every filter a length of its own; return the lengths it had for the backward pass.

    Parameters
    ----------
    v, g, dim, eps, out
        As in `weight_norm`.

    Returns
    -------
    w : array like `v`
        The weights.
    norm : array (D,) of float64
        ``||v||``.

    Raises
    ------
    TypeError, ValueError
        As `weight_norm`.

    Notes
    -----
    The formula stands in `weight_norm`.

    References
    ----------
    T. Salimans, D. P. Kingma, 2016, arXiv:1602.07868.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> w, norm = bnfast.weight_norm_forward(np.array([[3.0, 4.0], [0.0, 2.0]]), np.ones(2))
    >>> norm
    array([5., 2.])
    """
    filters, target = _as_filters("v", v, dim, out, ("v",), g=g)
    lengths, root = _lengths(g, filters, dim)
    least = _validation.epsilon(eps, training=False)
    axis = 0 if dim is None else dim
    in_place = target is not None and _validation.shares_memory(target, filters)
    if in_place:  # copied while they are there
        special = _special_filters(filters, axis, _norms(filters, axis), least)
    w, _, invrms = _primitives.normalize(
        filters, axis, lengths / root, None, 0.0, out=target, over=_LENGTH
    )
    with np.errstate(divide="ignore"):
        norm = root / invrms
    if not in_place:
        special = _special_filters(filters, axis, norm, least)
    if special is not None:
        which, copies, exponent = special
        again, _, invrms = _primitives.normalize(
            copies, 0, lengths[which] / root, None, 0.0, over=_LENGTH
        )
        with np.errstate(all="ignore"):
            norm[which] = np.ldexp(root / invrms, -exponent)
            short = norm[which] < least
            again[short] = _shares_of(
                least, scaled(copies[short], -exponent[short]), lengths[which][short]
            )
        np.moveaxis(w, axis, 0)[which] = again
    return w.reshape(np.shape(v)) if out is None else out, norm


@in_default_float_mode
def weight_norm_backward(
    dw: NDArray[Float],
    v: NDArray[Float],
    g: Parameter,
    norm: Parameter,
    dim: int | None = 0,
    eps: float = 0.0,
    *,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Parameter]:
    """Return the gradients of weight normalization: of directions and lengths.

    Parameters
    ----------
    dw : array like `v`
        The gradient of the weights.
    v, g, dim, eps
        As in the forward pass.
    norm : array (D,) of float32 or float64
        What the forward pass returned.
    out : array like `v`, optional
        Where to write dv: `dw` or `v` itself, or an array that shares no element with either.

    Returns
    -------
    dv : array like `v`
        The gradient of the directions, at right angles to them.
    dg : array like `g`
        The gradient of the lengths.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    With S = sum(dw * v) over all axes but `dim`::

        dg = S / ||v||
        dv = g / ||v|| * (dw - v * S / ||v||**2)

    and, where ||v|| is less than `eps`, which divides instead, ``S / eps`` and ``g / eps * dw``.

    References
    ----------
    T. Salimans, D. P. Kingma, 2016, arXiv:1602.07868.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> v, g = np.array([[3.0, 4.0]]), np.array([10.0])
    >>> w, norm = bnfast.weight_norm_forward(v, g)
    >>> dv, dg = bnfast.weight_norm_backward(np.array([[1.0, 0.0]]), v, g, norm)
    >>> dg, dv
    (array([0.6]), array([[ 1.28, -0.96]]))
    """
    filters, target = _as_filters("v", v, dim, out, ("dw", "v"), dw=dw, g=g, norm=norm)
    _validation.upstream_gradient(dw, _validation.floating_array("v", v), ("dw", "v"))
    upstream, _ = _as_filters("dw", dw, dim)
    lengths, root = _lengths(g, filters, dim)
    least = _validation.epsilon(eps, training=False)
    axis = 0 if dim is None else dim
    norms = _validation.required_channel_parameter("norm", norm, filters.shape[axis], "filters")
    wide = norms.astype(np.float64)
    special = _special_filters(filters, axis, wide, least)
    if special is not None:
        their_upstream = np.moveaxis(upstream, axis, 0)[special.which]  # it may be overwritten
    with np.errstate(all="ignore"):
        dv, dlengths, _ = _primitives.gradient(
            *(upstream, filters, axis, None, root / wide, lengths / root, False),
            target,
            _LENGTH,
        )
        dlengths /= root
        if special is not None:
            which, copies, exponent = special
            theirs, short = lengths[which], wide[which] < least
            invrms = root / _norms(copies, 0)  # those given may be rounded to a few bits
            again, products, _ = _primitives.gradient(
                *(their_upstream, copies, 0, None, invrms, theirs / root),
                *(False, None, _LENGTH),
            )
            again, products = scaled(again, exponent), products / root
            of_eps, along = their_upstream[short], scaled(copies[short], -exponent[short])
            again[short] = _shares_of(least, of_eps, theirs[short])
            others = tuple(range(1, along.ndim))
            products[short] = (of_eps * _shares_of(least, along)).sum(others)
            np.moveaxis(dv, axis, 0)[which], dlengths[which] = again, products
        dg = dlengths.astype(np.asarray(g).dtype).reshape(np.shape(g))
    return dv.reshape(np.shape(v)) if out is None else out, dg


def lengths_of_filters(name: str, weight: Array, dim: int | None) -> Array:
    """Return the lengths that the filters have, in PyTorch's shape and the dtype of the weight."""
    filters, _ = _as_filters(name, weight, dim)
    axis = 0 if dim is None else dim
    _, norm = weight_norm_forward(filters, np.ones(filters.shape[axis]), axis)
    shape = [1] * np.ndim(filters if dim is None else weight)
    shape[axis] = len(norm)
    with np.errstate(all="ignore"):
        lengths = norm.astype(filters.dtype)
    return lengths.reshape(() if dim is None else shape)


def _special_filters(filters: Array, axis: int, norm: Array, least: float) -> ScaledChannels | None:
    """Return those that are shorter than `least`, or at an end of the range; if there are some."""
    most = 2.0 ** MODEST_EXPONENT[filters.dtype]
    shortest = max(1 / most, least)
    if not norm.size or (norm.min() > shortest and norm.max() < most):
        return None
    which = np.flatnonzero(~((norm > shortest) & (norm < most)))
    exponent = exponents_to_one(largest_values(filters, axis, which))
    return scaled_channels(filters, axis, which, exponent)


def _shares_of(length: float, filters: Array, factors: Array | float = 1.0) -> Array:
    """Return filters that are no longer than `length`, divided by it and times a factor each."""
    each = np.reshape(factors, (-1, *[1] * (filters.ndim - 1)))
    return np.asarray(filters.astype(np.float64) / length * each)


def _norms(filters: Array, axis: int) -> Array:
    count, mean, m2 = _primitives.moments(filters, axis)
    with np.errstate(all="ignore"):
        return np.asarray(np.sqrt(m2 + count * mean**2))


def _as_filters(
    name: str,
    value: object,
    dim: int | None,
    out: Array | None = None,
    names: tuple[str, ...] = (),
    **others: object,
) -> tuple[Array, Array | None]:
    """Return the weights, and where to write, with an axis of filters and at least one other.

    Those in `names` may be `out`.
    """
    array = _validation.floating_array(name, value)
    if out is not None:
        _validation.output(out, array, {name: array, **others}, names)
    if dim is None:
        whole = (1, *(array.shape or (1,)))
        return array.reshape(whole), None if out is None else out.reshape(whole)
    axis = _validation.integer("dim", dim)
    if axis < 0:
        raise ValueError(
            f"dim must not be negative, got {dim}: in PyTorch -1 means the norm of the whole "
            f"array, which is dim=None here, and the last axis is {array.ndim - 1}"
        )
    if axis >= array.ndim:
        raise ValueError(
            f"dim must be less than {array.ndim} for {name} of shape {array.shape}, got {dim}"
        )
    if array.ndim > 1:
        return array, out
    return array[:, None], None if out is None else out[:, None]


def _lengths(g: object, filters: Array, dim: int | None) -> tuple[Array, float]:
    """Return the lengths of the filters (float64), and the root of how many elements they have."""
    lengths = _validation.floating_array("g", g)
    count = filters.shape[0 if dim is None else dim]
    kept = [1] * filters.ndim
    if dim is not None:
        kept[dim] = count
    if lengths.shape not in {(count,), tuple(kept), () if dim is None else (count,)}:
        raise ValueError(
            f"g must have one value for each of the {count} filters, shape ({count},) or "
            f"{tuple(kept)}, got shape {lengths.shape}"
        )
    each = filters.size // count if count else 0
    return lengths.reshape(-1).astype(np.float64), math.sqrt(each) if each else 1.0


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
