"""Spectral normalization of weights as a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bnfast import _validation, functional
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float
from bnfast.functional.spectral import columns_of, keep_singular_vectors
from bnfast.layers._layer import Flag, Gradients, Trainable

# How often u and v are improved before the first call, as in PyTorch.
_POWER_ITERATIONS_AT_FIRST = 15


class SpectralNorm(Trainable):
    """Spectral normalization: raw weights divided by their largest singular value.

    As ``torch.nn.utils.parametrizations.spectral_norm``.

    Parameters
    ----------
    weight : array of float32 or float64, at least 2-d
        The raw weights at first: what u and v are made of. They are not kept.
    n_power_iterations : int
        How often each call in training improves u and v.
    eps : float
        The least length by which a vector is divided, and the least sigma; see
        `bnfast.spectral_norm` for small weights.
    dim : int
        The axis of outputs: 0, or 1 for a transposed convolution.
    v_first : bool
        Improve v before u, as PyTorch's old hook and the authors did, rather than after it.
    rng : int or numpy.random.Generator
        What u and v are drawn with, before they are improved 15 times.

    Attributes
    ----------
    u : array (h,)
    v : array (k,)
        Approximate singular vectors of the weights, seen as a matrix with a row for each index of
        `dim`; of their dtype. Where they would come out as 0 or not finite, as those of weights of
        zero do, they are left.
    training : bool
        True at first. In evaluation u and v stay as they are.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.spectral_norm` and `bnfast.spectral_norm_backward`; there are no
    parameters. `backward` takes the gradient of the divided weights and returns that of the raw
    ones, to which the layer keeps a reference until then.

    The state has u as ``_u`` and v as ``_v``. That of a PyTorch module with a parametrized weight
    is loaded by::

        layer.load_state_dict(module.state_dict(), prefix="parametrizations.weight.0.")

    and its raw weight is ``module.state_dict()["parametrizations.weight.original"]``.

    References
    ----------
    T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida, 2018, "Spectral Normalization for Generative
    Adversarial Networks", arXiv:1802.05957.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> w = np.diag([3.0, 1.0])
    >>> layer = bnfast.SpectralNorm(w)
    >>> layer(w).round(3)
    array([[1.   , 0.   ],
           [0.   , 0.333]])
    >>> np.diag(layer.backward(np.diag([0.0, 1.0]))).round(3)
    array([-0.111,  0.333])
    """

    v_first = Flag()

    _arrays: ClassVar[Mapping[str, str]] = {"_u": "u", "_v": "v"}

    @in_default_float_mode
    def __init__(
        self,
        weight: Array,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        *,
        dim: int = 0,
        v_first: bool = False,
        rng: int | np.random.Generator = 0,
    ) -> None:
        array, axis, rows = _validation.weights("weight", weight, dim, "dim")
        self.n_power_iterations = _validation.integer_from(
            "n_power_iterations", n_power_iterations, 1
        )
        self.eps = _validation.real("eps", eps)
        self.dim = axis
        self.v_first = v_first
        self.shape = array.shape
        generator = np.random.default_rng(rng)
        u = generator.normal(size=rows)
        v = generator.normal(size=columns_of(array, axis))
        self.u, self.v = (
            (z / np.maximum(np.linalg.norm(z), self.eps)).astype(array.dtype) for z in (u, v)
        )
        _, _, u, v = self._divide(array, _POWER_ITERATIONS_AT_FIRST, None)
        keep_singular_vectors((self.u, self.v), (u, v))

    @in_default_float_mode
    def __call__(
        self, w: ArrayLikeOf[Float], *, out: NDArray[Float] | None = None
    ) -> NDArray[Float]:
        """Divide weights by their largest singular value.

        Parameters
        ----------
        w : array of float32 or float64
            The raw weights, of the shape of the first ones. Keep their values for `backward`.
        out : array like `w`, optional
            Where to write. In place, where it is `w` itself, there can be no `backward`.

        Returns
        -------
        array like `w`

        Raises
        ------
        TypeError, ValueError
            As `bnfast.spectral_norm`; the layer is left as it was.
        """
        array = _validation.shaped("w", _validation.data_array("w", w, half=False), self.shape)
        y, sigma, u, v = self._divide(array, self.n_power_iterations * self.training, out)
        if self.training:
            keep_singular_vectors((self.u, self.v), (u, v))
        self._save(array, out, sigma, u, v, self.eps)
        return y

    def _divide(
        self, w: Array, n_power_iterations: int, out: Array | None
    ) -> tuple[Array, float, Array, Array]:
        return functional.spectral_norm_forward(
            *(w, self.u, self.v, n_power_iterations, self.eps),
            dim=self.dim,
            v_first=self.v_first,
            out=out,
        )

    def _gradients(self, dy: Array, out: Array | None, x: Array, *saved: Any) -> Gradients:
        return (functional.spectral_norm_backward(dy, x, *saved, dim=self.dim, out=out),)

    def __repr__(self) -> str:
        return (
            f"SpectralNorm({self.u.dtype} array of shape {self.shape}, "
            f"n_power_iterations={self.n_power_iterations}, eps={self.eps}, dim={self.dim}, "
            f"v_first={self.v_first})"
        )
