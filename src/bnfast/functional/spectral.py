"""Spectral normalization of weights: what it means, its defaults, its documentation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._scaling import MODEST_EXPONENT, exponents_to_one
from bnfast._typing import Array, ArrayLikeOf, Float


@in_default_float_mode
def spectral_norm(
    w: ArrayLikeOf[Float],
    u: Array,
    v: Array,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    *,
    dim: int = 0,
    v_first: bool = False,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Divide weights by their largest singular value, as PyTorch's ``spectral_norm`` does.

    Parameters
    ----------
    w : array of float32 or float64, at least 2-d
        The weights; seen as a matrix W of shape (h, k), whose rows are the indices of `dim`. Where
        h or k is 0, sigma is 0, and u and v are left.
    u : array (h,) of float32 or float64
    v : array (k,) of float32 or float64
        Approximate singular vectors, at first any that are not 0; improved in place, with
        `n_power_iterations`. Where they would come out as 0 or not finite, as those of weights of
        zero do, they are left.
    n_power_iterations : int
        How often u and v are improved: 0 in evaluation.
    eps : float
        The least length by which a vector is divided, and the least sigma.
    dim : int
        The axis of outputs: 0, or 1 for a transposed convolution.
    v_first : bool
        Improve v before u, as PyTorch's old hook and the authors did, rather than after it.
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
    ``u = n(W v), v = n(W.T u)`` so many times, where ``n(z) = z / max(||z||, eps)``; then
    ``sigma = u . W v``, which is too small until u and v have converged, and ``y = w / sigma``. In
    float64 by NumPy's own matrix products, whose last bits may differ from machine to machine.

    Where a length or sigma is less than `eps`, or its square is at an end of the range, the weights
    are multiplied by the power of two that brings the largest to between 0.5 and 1. y does not
    change by that, but its divisor is then at least `eps`: weights of zero stay zero, and others
    are divided by their norm, be they small or large.

    References
    ----------
    T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida, 2018, "Spectral Normalization for Generative
    Adversarial Networks", arXiv:1802.05957.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> w, u, v = np.diag([3.0, 1.0]), np.ones(2), np.ones(2)
    >>> bnfast.spectral_norm(w, u, v, 20).round(3)
    array([[1.   , 0.   ],
           [0.   , 0.333]])
    >>> u.round(3)
    array([1., 0.])
    """
    array, axis, _ = _validation.weights("w", w, dim, "dim")
    steps = _validation.integer_from("n_power_iterations", n_power_iterations, 0)
    left, right = _singular_vectors(u, v, array, axis)
    if steps:
        _validation.running_statistics(
            *(u, v, array, len(left), ("u", "v"), right.shape), called="w"
        )
    y, _, *improved = spectral_norm_forward(
        w, u, v, n_power_iterations, eps, dim=dim, v_first=v_first, out=out
    )
    if steps:
        keep_singular_vectors((u, v), improved)
    return y


@in_default_float_mode
def spectral_norm_forward(
    w: ArrayLikeOf[Float],
    u: ArrayLike,
    v: ArrayLike,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    *,
    dim: int = 0,
    v_first: bool = False,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], float, NDArray[np.float64], NDArray[np.float64]]:
    """Divide weights by their largest singular value; return what the backward pass needs of it.

    Parameters
    ----------
    w, n_power_iterations, eps, dim, v_first, out
        As in `spectral_norm`.
    u, v
        As in `spectral_norm`, but left as they are.

    Returns
    -------
    y : array like `w`
        The divided weights.
    sigma : float
        The estimate of the largest singular value: 0 for weights of zero.
    u, v : array of float64
        The improved vectors, which the next call begins with; or those given, where there is no
        improvement to be had.

    Raises
    ------
    TypeError, ValueError
        As `spectral_norm`.

    Notes
    -----
    The formulas stand in `spectral_norm`.

    References
    ----------
    T. Miyato et al., 2018, arXiv:1802.05957.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> w = np.diag([3.0, 1.0])
    >>> y, sigma, u, v = bnfast.spectral_norm_forward(w, np.ones(2), np.ones(2), 20)
    >>> round(sigma, 6)
    3.0
    """
    array, axis, _ = _validation.weights("w", w, dim, "dim")
    least = _validation.real("eps", eps)
    steps = _validation.integer_from("n_power_iterations", n_power_iterations, 0)
    v_first = _validation.flag("v_first", v_first)
    left, right = _singular_vectors(u, v, array, axis)
    if out is None:
        y = _primitives.empty_output(array)
    else:
        y = _validation.output(out, array, {"w": array, "u": u, "v": v}, ("w",))
    with np.errstate(all="ignore"):
        sigma, improved, lengths = _power_iterations(
            _Matrix(array, axis), (left, right), steps, least, v_first
        )
        if min(lengths) >= least and _are_modest(lengths) and abs(sigma) >= least:
            _divide(array, sigma, y)
            left, right = improved
            return y, sigma, left, right
        exponent = exponents_to_one(_largest(array))
        matrix = _Matrix(array, axis, exponent)
        sigma, improved, _ = _power_iterations(matrix, (left, right), steps, least, v_first)
        matrix.divide(_at_least(least, sigma), np.moveaxis(y, axis, 0))
        sigma = float(np.ldexp(sigma, -exponent))
    if all(np.isfinite(z).all() and z.any() for z in improved):
        left, right = improved
    return y, sigma, left, right


def _power_iterations(
    matrix: _Matrix, vectors: tuple[Array, Array], steps: int, least: float, v_first: bool
) -> tuple[float, tuple[Array, Array], list[float]]:
    """Return sigma, the improved u and v, and the lengths of the products that they are made of."""
    left, right = vectors
    lengths: list[float] = []

    def divisor(z: Array) -> float:
        lengths.append(math.sqrt(z @ z))
        return max(lengths[-1], least)

    # sigma is made of a step's last product, W v or W.T u: without a step, of the same.
    product = None
    for _ in range(steps):
        if v_first:
            right = matrix.transposed_times(left)
            right = right / divisor(right)
            product = matrix.times(right)
            left = product / divisor(product)
        else:
            left, product = matrix.times_and_back(right)
            length = divisor(left)
            left, product = left / length, product / length
            right = product / divisor(product)
    if product is None:
        product = matrix.times(right) if v_first else matrix.transposed_times(left)
        divisor(product)
    return float(product @ (left if v_first else right)), (left, right), lengths


@in_default_float_mode
def spectral_norm_backward(
    dy: ArrayLikeOf[Float],
    w: ArrayLikeOf[Float],
    sigma: float,
    u: ArrayLike,
    v: ArrayLike,
    eps: float = 1e-12,
    *,
    dim: int = 0,
    out: NDArray[Float] | None = None,
) -> NDArray[Float]:
    """Return the gradient of spectral normalization: of the weights.

    Parameters
    ----------
    dy : array like `w`
        The gradient of the divided weights.
    w, eps, dim
        As in the forward pass.
    sigma : float
    u, v : array of float32 or float64
        What the forward pass returned; u and v are constants to the gradient.
    out : array like `w`, optional
        Where to write: `dy` or `w` itself, or an array that shares no element with either.

    Returns
    -------
    dw : array like `w`
        The gradient of the weights.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; before anything is written.

    Notes
    -----
    ``dw = (dy - <dy, w / sigma> * u v.T) / sigma``, the product over all elements; where `eps` was
    the larger, ``dw = dy / eps``, or that times the power of two by which w was multiplied.

    References
    ----------
    T. Miyato et al., 2018, arXiv:1802.05957.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> w = np.diag([3.0, 1.0])
    >>> y, sigma, u, v = bnfast.spectral_norm_forward(w, np.ones(2), np.ones(2), 30)
    >>> dw = bnfast.spectral_norm_backward(w, w, sigma, u, v)
    >>> round(float(np.abs(dw).max()), 2)
    0.33
    """
    array, axis, rows = _validation.weights("w", w, dim, "dim")
    upstream = _validation.upstream_gradient(dy, array, ("dy", "w"))
    length = np.float64(_validation.estimate("sigma", sigma))
    least = _validation.real("eps", eps)
    left, right = _singular_vectors(u, v, array, axis)
    if out is None:
        dw = _primitives.empty_output(array)
    else:
        others = {"dy": upstream, "w": array, "u": u, "v": v}
        dw = _validation.output(out, array, others, ("dy", "w"))
    with np.errstate(all="ignore"):
        reciprocal = 1 / length
        if abs(length) >= least and _are_modest([length]) and _is_held(reciprocal, array.dtype):
            # dy / sigma and the product of each row with its gradient, in one pass.
            constant = np.zeros(rows), np.ones(rows), np.full(rows, reciprocal)
            _, products, _ = _primitives.gradient(upstream, array, axis, *constant, True, dw)
            wide = left * (products.sum() * reciprocal**2)
            shares = wide.astype(array.dtype)
            shares = shares if np.isfinite(shares).all() else wide  # times v they may be held
            _subtract_outer(dw, axis, shares, right.astype(array.dtype))
            return dw
        exponent = exponents_to_one(_largest(array) if abs(length) < least else abs(length))
        scaled_length = float(np.ldexp(length, exponent))
        divisor = _at_least(least, scaled_length)
        gradient, matrix = _Matrix(upstream, axis), _Matrix(array, axis, exponent)
        shares = np.zeros(rows)
        if divisor == scaled_length:
            shares = left * (gradient.inner(matrix) / divisor)
        target = np.moveaxis(dw, axis, 0)
        for which, piece in gradient.pieces():
            made = (piece - np.multiply.outer(shares[which], right)) / divisor
            target[which] = np.ldexp(made, exponent).reshape(target[which].shape)
    return dw


def keep_singular_vectors(vectors: Sequence[Array], improved: Sequence[Array]) -> None:
    """Write the improved ones over those there were."""
    with np.errstate(all="ignore"):
        for vector, z in zip(vectors, improved, strict=True):
            vector[...] = z


def columns_of(w: Array, axis: int) -> int:
    """Return how many columns weights have, seen as a matrix: also where they have no rows."""
    return math.prod(n for d, n in enumerate(w.shape) if d != axis)


def _singular_vectors(u: object, v: object, w: Array, axis: int) -> tuple[Array, Array]:
    """Return copies in float64."""
    left = _validation.required_channel_parameter("u", u, w.shape[axis], "rows of w")
    right = _validation.required_channel_parameter("v", v, columns_of(w, axis), "columns of w")
    return left.astype(np.float64), right.astype(np.float64)


def _are_modest(lengths: Iterable[float]) -> bool:
    """Whether their squares and reciprocals are within the range of float64, to the last bit."""
    most = 2.0 ** MODEST_EXPONENT[np.dtype(np.float64)]
    return all(1 / most < abs(length) < most for length in lengths)


def _at_least(least: float, sigma: float) -> np.float64:
    """Return sigma, or `least` with its sign."""
    return np.float64(np.copysign(least, sigma) if abs(sigma) < least else sigma)


def _largest(w: Array) -> Array:
    return np.asarray(np.maximum(w.max(initial=0), -w.min(initial=0)))


def _is_held(value: float, dtype: np.dtype[Any]) -> bool:
    """Whether the type holds a number to its last bit."""
    return bool(np.finfo(dtype).tiny <= abs(dtype.type(value)) < np.inf)


def _divide(w: Array, sigma: float, y: Array) -> None:
    """Write w / sigma: in its own type, as long as that holds sigma to its last bit."""
    if _is_held(sigma, w.dtype):
        np.divide(w, w.dtype.type(sigma), out=y)
    else:
        np.divide(w, sigma, out=y, dtype=np.float64, casting="same_kind")


def _subtract_outer(w: Array, axis: int, left: Array, right: Array) -> None:
    """Subtract ``left right.T`` from weights seen as a matrix, a few rows at a time."""
    rows = np.moveaxis(w, axis, 0)
    step = max(1, _PIECE_ELEMENTS // max(1, len(right)))
    for first in range(0, len(left), step):
        some = rows[first : first + step]
        some -= np.multiply.outer(left[first : first + step], right).reshape(some.shape)


# What stays in a cache from its conversion to float64, or its making, to its use.
_PIECE_ELEMENTS = 1 << 17


class _Matrix:
    """Weights as rows, one for each index of an axis, in float64 a few at a time.

    They may be multiplied by a power of two.
    """

    def __init__(self, w: Array, axis: int, exponent: Array | None = None) -> None:
        self._rows = np.moveaxis(w, axis, 0)
        self._exponent = exponent
        self.shape = (len(self._rows), columns_of(w, axis))

    def pieces(self) -> Iterator[tuple[slice, Array]]:
        """Give some rows after the other, and which they are."""
        rows, columns = self.shape
        step = max(1, _PIECE_ELEMENTS // max(1, columns))
        for first in range(0, rows, step):
            which = slice(first, min(first + step, rows))
            some = self._rows[which].reshape(which.stop - first, columns)
            wide = some.astype(np.float64, copy=False)
            yield which, wide if self._exponent is None else np.ldexp(wide, self._exponent)

    def divide(self, divisor: np.float64, y: Array) -> None:
        """Write the rows, divided by a number, to those of y."""
        for which, piece in self.pieces():
            made = piece.astype(y.dtype, copy=False)
            _divide(made, divisor, made)
            y[which] = made.reshape(y[which].shape)

    def times(self, right: Array) -> Array:
        """Return W v."""
        made = np.empty(self.shape[0])
        for rows, piece in self.pieces():
            made[rows] = piece @ right
        return made

    def times_and_back(self, right: Array) -> tuple[Array, Array]:
        """Return W v and W.T W v, of each piece at once."""
        made, back = np.empty(self.shape[0]), np.zeros(self.shape[1])
        for rows, piece in self.pieces():
            made[rows] = piece @ right
            back += made[rows] @ piece
        return made, back

    def transposed_times(self, left: Array) -> Array:
        """Return W.T u."""
        made = np.zeros(self.shape[1])
        for rows, piece in self.pieces():
            made += left[rows] @ piece
        return made

    def inner(self, other: _Matrix) -> float:
        """Return the sum of the products of all elements with those of another."""
        made = 0.0
        for (_, ours), (_, theirs) in zip(self.pieces(), other.pieces(), strict=True):
            made += float(np.vdot(ours, theirs))
        return made
