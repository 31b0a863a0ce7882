"""Weight normalization: what it means, its defaults, its documentation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from bnfast import _primitives, _validation
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
from bnfast._typing import Array, Float, Parameter

_LENGTH = Reduction(centred=False)


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
    with np.errstate(all="ignore"):
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
