"""Standardizations of weights as layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bnfast import _validation, functional
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, ArrayOrNone, Float
from bnfast.layers._layer import Flag, Gradients, Trainable


class _Standardization(Trainable):
    """A standardization of filters, with or without a gain for each."""

    gain: ArrayOrNone = None
    gain_grad: ArrayOrNone = None

    _parameters = ("gain",)
    _arrays: ClassVar[Mapping[str, str]] = {"gain": "gain"}

    def __init__(
        self, num_filters: int, eps: float, gain: bool, axis: int, dtype: DTypeLike
    ) -> None:
        self.num_filters = _validation.size("num_filters", num_filters)
        self.eps = _validation.epsilon(eps, training=False)
        self.axis = _validation.integer("axis", axis)
        self.dtype = _validation.floating_dtype("dtype", dtype)
        if _validation.flag("gain", gain):
            self.gain = np.ones(self.num_filters, self.dtype)

    @in_default_float_mode
    def __call__(
        self, w: ArrayLikeOf[Float], *, out: NDArray[Float] | None = None
    ) -> NDArray[Float]:
        """Standardize weights.

        Parameters
        ----------
        w : array of float32 or float64, at least 2-d
            The raw weights, `num_filters` filters along `axis`. Keep their values for `backward`.
        out : array like `w`, optional
            Where to write. In place, where it is `w` itself, there can be no `backward`.

        Returns
        -------
        array like `w`

        Raises
        ------
        TypeError, ValueError
            As the function of the same name; the layer is left as it was.
        """
        array, axis, _ = _validation.weights("w", w, self.axis)
        _validation.same_channels("w", array, axis, self.num_filters, "filters")
        gain = None if self.gain is None else self.gain.copy()
        y, mean, std = self._standardize(array, gain, out)
        self._save(array, out, mean, std, gain)
        return y

    @abstractmethod
    def _standardize(
        self, w: Array, gain: Array | None, out: Array | None
    ) -> tuple[Array, Array, Array]:
        """Return the standardized weights, and mean and std."""

    def __repr__(self) -> str:
        first, *others = self._shown
        values = {name: getattr(self, name) for name in others} | {"gain": self.gain is not None}
        shown = [f"{name}={values[name]}" for name in others]
        return f"{type(self).__name__}({', '.join([str(getattr(self, first)), *shown])})"


class WeightStandardization(_Standardization):
    """Weight standardization: filters of mean 0 and deviation 1, from raw weights.

    Parameters
    ----------
    num_filters : int
        D, the number of filters.
    eps : float
        Added to the variance or, without `eps_inside`, to the deviation; not negative.
    gain : bool
        Whether each filter is multiplied by a number of its own.
    axis : int
        The axis of the filters: 0 for OIHW, -1 for HWIO.
    eps_inside : bool
        Add `eps` under the root, as most libraries do, or to the root, as the authors did.
    unbiased : bool
        Divide by K - 1 in the variance, as the authors' PyTorch code did, rather than by K.
    dtype : dtype
        Of the gain: float32 or float64. The weights may be of either.

    Attributes
    ----------
    gain : array (D,) or None
        Ones at first.
    gain_grad : array (D,) or None
        Of the last `backward`; a new call replaces it.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.weight_standardization` and
    `bnfast.weight_standardization_backward`. Training and evaluation are the same. `backward` takes
    the gradient of the standardized weights and returns that of the raw ones, to which the layer
    keeps a reference until then.

    References
    ----------
    S. Qiao, H. Wang, C. Liu, W. Shen, A. Yuille, 2019, "Micro-Batch Training with Batch-Channel
    Normalization and Weight Standardization", arXiv:1903.10520.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.WeightStandardization(2)
    >>> layer(np.array([[1.0, 3.0], [10.0, 30.0]])).round(3)
    array([[-1.,  1.],
           [-1.,  1.]])
    >>> layer.backward(np.array([[1.0, 1.0], [0.0, 0.0]])).round(3)
    array([[0., 0.],
           [0., 0.]])
    """

    eps_inside = Flag()
    unbiased = Flag()

    _shown = ("num_filters", "eps", "gain", "axis", "eps_inside", "unbiased", "dtype")

    def __init__(
        self,
        num_filters: int,
        eps: float = 1e-5,
        gain: bool = False,
        *,
        axis: int = 0,
        eps_inside: bool = True,
        unbiased: bool = False,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(num_filters, eps, gain, axis, dtype)
        self.eps_inside, self.unbiased = eps_inside, unbiased

    def _standardize(
        self, w: Array, gain: Array | None, out: Array | None
    ) -> tuple[Array, Array, Array]:
        return functional.weight_standardization_forward(
            *(w, gain, self.eps),
            axis=self.axis,
            eps_inside=self.eps_inside,
            unbiased=self.unbiased,
            out=out,
        )

    def _gradients(self, dy: Array, out: Array | None, x: Array, *saved: Any) -> Gradients:
        *_, gain = saved
        dw, dgain = functional.weight_standardization_backward(
            *(dy, x, *saved, self.eps),
            axis=self.axis,
            eps_inside=self.eps_inside,
            unbiased=self.unbiased,
            out=out,
        )
        return dw, None if gain is None else dgain


class ScaledWeightStandardization(_Standardization):
    """Scaled weight standardization: filters of mean 0 and length gamma, from raw weights.

    Parameters
    ----------
    num_filters : int
        D, the number of filters.
    gamma : float
        The gain of the activation that follows: 1.7139588594436646 for ReLU.
    eps : float
        With `floor` the least of K * var; else added to var; not negative.
    gain : bool
        Whether each filter is multiplied by a number of its own.
    axis : int
        The axis of the filters: 0 for OIHW, -1 for HWIO.
    floor : bool
        As in the authors' code; False as in timm, whose default `eps` is 1e-6.
    dtype : dtype
        Of the gain: float32 or float64. The weights may be of either.

    Attributes
    ----------
    gain : array (D,) or None
        Ones at first.
    gain_grad : array (D,) or None
        Of the last `backward`; a new call replaces it.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.scaled_weight_standardization` and its backward. Training and
    evaluation are the same. `backward` takes the gradient of the standardized weights and returns
    that of the raw ones, to which the layer keeps a reference until then.

    References
    ----------
    A. Brock, S. De, S. L. Smith, 2021, "Characterizing signal propagation to close the performance
    gap in unnormalized ResNets", arXiv:2101.08692.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.ScaledWeightStandardization(1)
    >>> layer(np.array([[1.0, 3.0]])).round(3)
    array([[-0.707,  0.707]])
    >>> dw = layer.backward(np.array([[1.0, 0.0]]))
    >>> layer.gain_grad.round(3)
    array([-0.707], dtype=float32)
    """

    floor = Flag()

    _shown = ("num_filters", "gamma", "eps", "gain", "axis", "floor", "dtype")

    def __init__(
        self,
        num_filters: int,
        gamma: float = 1.0,
        eps: float = 1e-4,
        gain: bool = True,
        *,
        axis: int = 0,
        floor: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(num_filters, eps, gain, axis, dtype)
        self.gamma = _validation.real("gamma", gamma)
        self.floor = floor

    def _standardize(
        self, w: Array, gain: Array | None, out: Array | None
    ) -> tuple[Array, Array, Array]:
        return functional.scaled_weight_standardization_forward(
            *(w, gain, self.gamma, self.eps), axis=self.axis, floor=self.floor, out=out
        )

    def _gradients(self, dy: Array, out: Array | None, x: Array, *saved: Any) -> Gradients:
        *_, gain = saved
        dw, dgain = functional.scaled_weight_standardization_backward(
            *(dy, x, *saved, self.gamma, self.eps), axis=self.axis, floor=self.floor, out=out
        )
        return dw, None if gain is None else dgain
