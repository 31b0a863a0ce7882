"""Weight normalization as a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bnfast import _validation, functional
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayOrNone
from bnfast.layers._layer import Gradients, Trainable


def _lengths_of_filters(weight: Array, dim: int | None) -> Array:
    """Return them in PyTorch's shape, and in the dtype of the weight."""
    array = _validation.data_array("weight", weight, half=False)
    kept = []
    if dim is not None:
        axis = _validation.axis_of_filters("weight", array, dim)
        kept = [size if d == axis else 1 for d, size in enumerate(array.shape)]
    _, norm = functional.weight_norm_forward(array, np.ones(kept), dim)
    with np.errstate(all="ignore"):
        return norm.astype(array.dtype).reshape(kept)


class WeightNorm(Trainable):
    """Weight normalization: every filter with a length of its own.

    As ``torch.nn.utils.parametrizations.weight_norm``.

    Parameters
    ----------
    weight : array of float32 or float64
        The weights at first. They are copied: as directions, and their lengths.
    dim : int or None
        The axis of the filters: 0, or 1 for a transposed convolution; None for one length of the
        whole array. Not negative.
    eps : float
        The least length by which a filter is divided; 0, as in PyTorch, for no such limit.

    Attributes
    ----------
    g : array
        The lengths, of the shape of the weights with all sizes but that of `dim` 1, as in PyTorch;
        of the shape () where `dim` is None.
    v : array like `weight`
        The directions, of any length: of 0 only with `eps`.
    g_grad, v_grad : array or None
        Of the last `backward`, which also returns the latter; a new call replaces them.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.weight_norm` and `bnfast.weight_norm_backward`. Training and
    evaluation are the same. Do not change `v` between a call and its `backward`.

    The state has g as ``original0`` and v as ``original1``. That of a PyTorch module with a
    parametrized weight is loaded by::

        layer.load_state_dict(module.state_dict(), prefix="parametrizations.weight.")

    References
    ----------
    T. Salimans, D. P. Kingma, 2016, "Weight Normalization: A Simple Reparameterization to
    Accelerate Training of Deep Neural Networks", arXiv:1602.07868.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.WeightNorm(np.array([[3.0, 4.0], [0.0, 2.0]]))
    >>> layer.g[0] = 10
    >>> layer()
    array([[6., 8.],
           [0., 2.]])
    >>> dv = layer.backward(np.array([[1.0, 0.0], [0.0, 0.0]]))
    >>> layer.g_grad
    array([[0.6],
           [0. ]])
    """

    g_grad: ArrayOrNone = None
    v_grad: ArrayOrNone = None

    _parameters = ("g", "v")
    _arrays: ClassVar[Mapping[str, str]] = {"original0": "g", "original1": "v"}

    @in_default_float_mode
    def __init__(self, weight: Array, dim: int | None = 0, eps: float = 0.0) -> None:
        self.g = _lengths_of_filters(weight, dim)
        self.v = np.array(weight)
        self.dim = dim
        self.eps = _validation.epsilon(eps, training=False)

    @in_default_float_mode
    def __call__(self, *, out: Array | None = None) -> Array:
        """Return the weights.

        Parameters
        ----------
        out : array like `v`, optional
            Where to write.

        Returns
        -------
        array like `v`

        Raises
        ------
        TypeError, ValueError
            As `bnfast.weight_norm`.
        """
        g = self.g.copy()
        w, norm = functional.weight_norm_forward(self.v, g, self.dim, self.eps, out=out)
        self._save(self.v, out, g, norm, self.dim, self.eps)
        return w

    def _gradients(self, dy: Array, out: Array | None, x: Array, *saved: Any) -> Gradients:
        _validation.upstream_gradient(dy, x, ("dy", "v"))  # by the name that it has here
        dv, dg = functional.weight_norm_backward(dy, x, *saved, out=out)
        return dv, dg, dv.copy()  # the first is for the caller to change

    def __repr__(self) -> str:
        return (
            f"WeightNorm({self.v.dtype} array of shape {self.v.shape}, dim={self.dim}, "
            f"eps={self.eps})"
        )
