"""Normalizations that whiten, as layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bnfast import _validation, _whitening
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, ArrayOrNone, Float
from bnfast._whitening import WHITENING
from bnfast.functional import IterativelyWhitened, Whitened
from bnfast.layers._layer import Flag, Gradients
from bnfast.layers._tracking import PROPAGATE, Tracking
from bnfast.running_averages import Momentum, checked_momentum


class WhiteningLayer(Tracking):
    """A layer that whitens: in training by the statistics of the input, else by the running ones.

    Attributes
    ----------
    running_matrix : array or None
        Beside the running mean.
    """

    running_matrix: ArrayOrNone = None
    affine = Flag(fixed=True)

    _running: ClassVar[tuple[str, str]] = ("running_mean", "running_matrix")
    _arrays: ClassVar[Mapping[str, str]] = {
        name: name for name in ("weight", "bias", "running_mean", "running_matrix")
    }

    def __init__(
        self,
        num_features: int,
        num_groups: int,
        eps: float,
        momentum: Momentum,
        affine: bool,
        track_running_stats: bool,
        averaged: str,
        axis: int,
        dtype: DTypeLike,
        frozen: bool,
        nonfinite: str,
    ) -> None:
        self.num_features = _validation.size("num_features", num_features)
        _validation.channels_of_group(num_groups, self.num_features)
        self.num_groups = int(num_groups)
        self.eps = _validation.epsilon(eps, training=False)
        self._set_averaging(checked_momentum(momentum), frozen, nonfinite)
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.averaged = _validation.choice("averaged", averaged, _whitening.AVERAGED)
        self.axis = _validation.integer("axis", axis)
        self.dtype = _validation.floating_dtype("dtype", dtype)
        if self.affine:
            self.weight = np.ones(self.num_features, self.dtype)
            self.bias = np.zeros(self.num_features, self.dtype)
        if self.track_running_stats:
            each = self.num_features // self.num_groups
            self.running_mean = np.zeros(self.num_features, self.dtype)
            self.running_matrix = np.tile(np.eye(each, dtype=self.dtype), (self.num_groups, 1, 1))
            self.num_batches_tracked = 0

    @abstractmethod
    def _whiten(self, mean: Array, covariance: Array) -> Whitened | IterativelyWhitened:
        """Return what whitens data of this mean and covariance."""

    @in_default_float_mode
    def __call__(
        self, x: ArrayLikeOf[Float], *, recompute: bool = False, out: NDArray[Float] | None = None
    ) -> NDArray[Float]:
        """Whiten a batch.

        Parameters
        ----------
        x : array of float32 or float64
            With `num_features` channels along `axis`. Keep its values for `backward`.
        recompute : bool
            As in `bnfast.BatchNorm`: the running statistics do not see the batch twice.
        out : array like `x`, optional
            Where to write. In place, where it is `x` itself, there can be no `backward`.

        Returns
        -------
        array like `x`

        Raises
        ------
        TypeError, ValueError
            As the function that the layer is named after; the layer is left as it was.
        """
        array, _, _ = _validation.batch("x", x, self.axis)
        _validation.same_channels("x", array, self.axis, self.num_features)
        first = not _validation.flag("recompute", recompute)
        if first and self._observer is not None:
            self._observe(array, out)
        common = array, self.axis, self.num_groups, self._whiten, self.weight, self.bias
        mean, matrix = self._running_statistics()
        training = self.training and not self.frozen
        if not training and mean is not None and matrix is not None:
            y, statistics = _whitening.evaluate(*common, mean, matrix, self.averaged, out)
            self._save(array, out, statistics, self._kept_weight(), True)
            return y
        _validation.epsilon(self.eps, training=True)
        tracks = first and training and self.track_running_stats
        tracks = tracks and self._takes(array, self.axis)
        tracked = (mean, matrix) if tracks else (None, None)
        new = self._weight_of_new_batch() if tracks else 0.0
        y, saved = _whitening.normalize(*common, *tracked, new, self.averaged, out)
        if tracks and self.num_batches_tracked is not None and array.size > 0:
            self.num_batches_tracked += 1
        self._save(array, out, saved, self._kept_weight(), False)
        return y

    def _first_statistics(self) -> dict[str, Array | float]:
        unit = np.eye(self.num_features // self.num_groups)
        return {"running_mean": 0.0, "running_matrix": np.tile(unit, (self.num_groups, 1, 1))}

    def _gradients(self, dy: Array, out: Array | None, x: Array, *saved: Any) -> Gradients:
        statistics, weight, constant = saved
        through = None if constant else statistics.covariance_gradient
        dx, dweight, dbias = _whitening.gradient(
            dy, x, self.axis, statistics.mean, statistics.matrix, through, weight, out
        )
        return dx, None if weight is None else dweight, dbias


class DecorrelatedBatchNorm(WhiteningLayer):
    """Decorrelated batch normalization with its parameters, running statistics and gradients.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    num_groups : int
        G, which divides C: neighbouring channels are whitened together.
    eps : float
        Added to the diagonal of the covariance; 0 will do for evaluation only.
    momentum : float, None, or function
        The weight of the NEW batch in the running statistics; None for the plain average of all
        batches; a function as in `BatchNorm`.
    affine : bool
        Whether there are a weight and a bias.
    track_running_stats : bool
        Whether there are running statistics. Without them evaluation, too, uses those of the batch.
    averaged : str
        What the running matrix is: "whitening", the average of the matrices that whitened, or
        "covariance", that of the covariances.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC.
    dtype : dtype
        Of the parameters and running statistics: float32 or float64. The input may be either.
    frozen, nonfinite
        As in `BatchNorm`.

    Attributes
    ----------
    weight, bias : array (C,) or None
        gamma (ones at first) and beta (zeros at first).
    running_mean : array (C,) or None
        Zeros at first.
    running_matrix : array (G, C / G, C / G) or None
        Unit matrices at first.
    num_batches_tracked : int or None
        How many batches the running statistics have seen. An empty batch is none.
    weight_grad, bias_grad : array (C,) or None
        Of the last `backward`; a new call replaces them.
    training : bool
        True at first; see `train` and `eval`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.decorrelated_batch_norm` and its backward pass. The layer keeps a
    reference to its last input until `backward` or the next call, and does not copy it.

    References
    ----------
    L. Huang, D. Yang, B. Lang, J. Deng, 2018, "Decorrelated Batch Normalization", arXiv:1804.08450.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.DecorrelatedBatchNorm(4, num_groups=2)
    >>> y = layer(np.random.default_rng(0).normal(5.0, 2.0, (16, 4, 8, 8)).astype(np.float32))
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.bias_grad
    array([1024., 1024., 1024., 1024.], dtype=float32)
    >>> layer.running_matrix.shape
    (2, 2, 2)
    """

    _shown = (
        *("num_features", "num_groups", "eps", "momentum", "affine", "track_running_stats"),
        *("averaged", "axis", "dtype"),
    )

    def __init__(
        self,
        num_features: int,
        num_groups: int = 1,
        eps: float = 1e-5,
        momentum: Momentum = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        averaged: str = WHITENING,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        frozen: bool = False,
        nonfinite: str = PROPAGATE,
    ) -> None:
        super().__init__(
            *(num_features, num_groups, eps, momentum, affine, track_running_stats),
            *(averaged, axis, dtype, frozen, nonfinite),
        )

    def _whiten(self, mean: Array, covariance: Array) -> Whitened:
        return Whitened.of_covariance(mean, covariance, self.eps)


class IterNorm(WhiteningLayer):
    """Iterative normalization with its parameters, running statistics and gradients.

    Parameters
    ----------
    num_features, num_groups, eps, momentum, affine, track_running_stats
        As in `DecorrelatedBatchNorm`.
    iterations : int
        T, at least 1.
    averaged, axis, dtype, frozen, nonfinite
        As in `DecorrelatedBatchNorm`.

    Attributes
    ----------
    weight, bias, running_mean, running_matrix, num_batches_tracked
        As in `DecorrelatedBatchNorm`.
    weight_grad, bias_grad, training
        Likewise.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.iterative_norm` and its backward pass.

    References
    ----------
    L. Huang, Y. Zhou, F. Zhu, L. Liu, L. Shao, 2019, "Iterative Normalization: Beyond
    Standardization towards Efficient Whitening", arXiv:1904.03441.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.IterNorm(4, iterations=7)
    >>> y = layer(np.random.default_rng(0).normal(5.0, 2.0, (16, 4, 8, 8)).astype(np.float32))
    >>> bool(np.abs(y.mean(axis=(0, 2, 3))).max() < 1e-6)
    True
    """

    _shown = (
        *("num_features", "num_groups", "eps", "momentum", "affine", "track_running_stats"),
        *("iterations", "averaged", "axis", "dtype"),
    )

    def __init__(
        self,
        num_features: int,
        num_groups: int = 1,
        eps: float = 1e-5,
        momentum: Momentum = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        iterations: int = 5,
        averaged: str = WHITENING,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        frozen: bool = False,
        nonfinite: str = PROPAGATE,
    ) -> None:
        super().__init__(
            *(num_features, num_groups, eps, momentum, affine, track_running_stats),
            *(averaged, axis, dtype, frozen, nonfinite),
        )
        self.iterations = _validation.integer_from("iterations", iterations, 1)

    def _whiten(self, mean: Array, covariance: Array) -> IterativelyWhitened:
        return IterativelyWhitened.of_covariance(mean, covariance, self.eps, self.iterations)
