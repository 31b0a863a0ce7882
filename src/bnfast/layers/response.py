"""Filter response normalization, as a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bnfast import _validation, functional
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, ArrayOrNone, Float
from bnfast.layers._layer import Flag, Gradients, Layer


class FilterResponseNorm(Layer):
    """Filter response normalization with its thresholded linear unit.

    It takes the place of a normalization and of the activation after it.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the mean square; positive.
    affine : bool
        Whether there are a weight and a bias.
    thresholded : bool
        Whether there is a threshold, `tau`.
    learned_eps : float or None
        What `learned_eps` is at first, for channels of one value in each sample: 1e-4 in the paper.
        None for a fixed `eps` alone.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC; samples are along axis 0.
    dtype : dtype
        Of the parameters: float32 or float64, whatever the input's.

    Attributes
    ----------
    weight, bias, tau, learned_eps : array (C,) or None
        gamma (ones at first), beta and tau (zeros at first), and what is learned of eps.
    weight_grad, bias_grad, tau_grad, learned_eps_grad : array (C,) or None
        Of the last `backward`; a new call replaces them.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.filter_response_norm` and `bnfast.filter_response_norm_backward`.
    Training and evaluation are the same. The layer keeps a reference to its last input until
    `backward` or the next call, and does not copy it.

    References
    ----------
    S. Singh, S. Krishnan, 2019, "Filter Response Normalization Layer: Eliminating Batch Dependence
    in the Training of Deep Neural Networks", arXiv:1911.09737.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.FilterResponseNorm(2)
    >>> z = layer(np.array([[[3.0, -3.0], [1.0, 7.0]]], dtype=np.float32))
    >>> z.round(3)
    array([[[1. , 0. ],
            [0.2, 1.4]]], dtype=float32)
    >>> dx = layer.backward(np.ones_like(z))
    >>> layer.tau_grad
    array([1., 0.], dtype=float32)
    """

    affine = Flag(fixed=True)
    thresholded = Flag(fixed=True)

    tau: ArrayOrNone = None
    learned_eps: ArrayOrNone = None
    tau_grad: ArrayOrNone = None
    learned_eps_grad: ArrayOrNone = None

    _parameters = ("weight", "bias", "tau", "learned_eps")
    _arrays: ClassVar[Mapping[str, str]] = {name: name for name in _parameters}

    @in_default_float_mode
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        thresholded: bool = True,
        learned_eps: float | None = None,
        *,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_features = _validation.size("num_features", num_features)
        self.eps = _validation.epsilon(eps, training=True)
        self.affine, self.thresholded = affine, thresholded
        self.axis = _validation.integer("axis", axis)
        self.dtype = _validation.floating_dtype("dtype", dtype)
        self._first_eps = (
            None if learned_eps is None else _validation.real("learned_eps", learned_eps)
        )
        if self.affine:
            self.weight = np.ones(self.num_features, self.dtype)
            self.bias = np.zeros(self.num_features, self.dtype)
        if self.thresholded:
            self.tau = np.zeros(self.num_features, self.dtype)
        if self._first_eps is not None:
            self.learned_eps = np.full(self.num_features, self._first_eps, self.dtype)

    @in_default_float_mode
    def __call__(
        self, x: ArrayLikeOf[Float], *, recompute: bool = False, out: NDArray[Float] | None = None
    ) -> NDArray[Float]:
        """Normalize a batch.

        Parameters
        ----------
        x : array of float16, bfloat16, float32 or float64
            With `num_features` channels along `axis`. Keep its values for `backward`.
        recompute : bool
            Whether the call is made again, as of `bnfast.BatchNorm`: it makes no difference here.
        out : array like `x`, optional
            Where to write. In place, where it is `x` itself, there can be no `backward`.

        Returns
        -------
        array like `x`

        Raises
        ------
        TypeError, ValueError
            As `bnfast.filter_response_norm`; the layer is left as it was.
        """
        array, axis, _ = _validation.batch("x", x, self.axis)
        _validation.same_channels("x", array, axis, self.num_features)
        _validation.flag("recompute", recompute)
        parameters = self.weight, self.bias, self.tau
        z, invrms = functional.filter_response_norm_forward(
            array, *parameters, self.eps, learned_eps=self.learned_eps, axis=axis, out=out
        )
        kept = (None if p is None else p.copy() for p in (*parameters, self.learned_eps))
        self._save(array, out, invrms, *kept)
        return z

    def _gradients(self, dy: Array, out: Array | None, x: Array, *saved: Any) -> Gradients:
        invrms, weight, bias, tau, learned_eps = saved
        return functional.filter_response_norm_backward(
            *(dy, x, invrms, weight, bias, tau),
            learned_eps=learned_eps,
            axis=self.axis,
            out=out,
        )

    def __repr__(self) -> str:
        return (
            f"FilterResponseNorm({self.num_features}, eps={self.eps}, affine={self.affine}, "
            f"thresholded={self.thresholded}, learned_eps={self._first_eps}, axis={self.axis}, "
            f"dtype={self.dtype})"
        )
