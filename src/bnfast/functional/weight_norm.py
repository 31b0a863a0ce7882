"""Weight normalization: what it means, its defaults, its documentation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float


@in_default_float_mode
def weight_norm(
    v: ArrayLikeOf[Float],
    g: ArrayLike,
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
    v: ArrayLikeOf[Float],
    g: ArrayLike,
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
    return _primitives.weight_norm(v, g, dim, eps, out)


@in_default_float_mode
def weight_norm_backward(
    dw: ArrayLikeOf[Float],
    v: ArrayLikeOf[Float],
    g: ArrayLike,
    norm: ArrayLike,
    dim: int | None = 0,
    eps: float = 0.0,
    *,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array]:
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

    and, where ``||v||`` is less than `eps`, which divides instead, ``S / eps`` and
    ``g / eps * dw``.

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
    return _primitives.weight_norm_gradient(dw, v, g, norm, dim, eps, out)
