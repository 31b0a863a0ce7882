"""What layers of channels share, and those with running statistics."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._primitives import Reduction
from bnfast._typing import Array
from bnfast.layers._layer import Flag, Gradients, Layer


class ChannelLayer(Layer):
    """A layer with a weight and a bias for each channel, which evaluates by given statistics."""

    affine = Flag(fixed=True)

    _over: ClassVar[Reduction] = _primitives.BATCH  # whose statistics are made together

    def __init__(
        self, num_features: int, eps: float, affine: bool, axis: int, dtype: DTypeLike
    ) -> None:
        self.num_features = _validation.size("num_features", num_features)
        self.eps = _validation.epsilon(eps, training=False)
        self.affine = affine
        self.axis = _validation.integer("axis", axis)
        self.dtype = _validation.floating_dtype("dtype", dtype)
        if self.affine:
            self.weight = np.ones(self.num_features, self.dtype)
            self.bias = np.zeros(self.num_features, self.dtype)
        self._evaluation = _primitives.Evaluation()  # what each call in evaluation may use again

    def _batch(self, x: Array) -> Array:
        """Return the input as an array with the channels of this layer."""
        axis = self.axis
        if type(x) is np.ndarray and x.dtype.char in "fd" and x.dtype.isnative:
            shape = x.shape
            if -len(shape) <= axis < len(shape) > 1 and shape[axis] == self.num_features:
                return x
        array, _, _ = _validation.batch("x", x, axis)
        _validation.same_channels("x", array, axis, self.num_features)
        return array

    def _evaluate(
        self, x: Array, out: Array | None, mean: Array, variance: Array, eps: float
    ) -> Array:
        """Return y from the running statistics, and save what the backward pass needs."""
        y = _primitives.scale_shift(
            *(x, self.axis, mean, variance, self.weight, self.bias, eps, self._evaluation, out)
        )
        statistics = self._evaluation.saved
        if statistics is None:  # x is empty: nothing was prepared, and there is no gradient
            statistics = mean, variance, self.weight
        self._save(x, y, *statistics, True)
        return y

    def _gradients(self, dy: Array, out: Array | None, x: Array, *saved: Any) -> Gradients:
        mean, invstd, weight, constant = saved
        over = _primitives.BATCH if constant else self._over
        dx, dweight, dbias = _primitives.gradient(
            dy, x, self.axis, mean, invstd, weight, constant, out, over
        )
        return dx, None if weight is None else dweight, dbias

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_evaluation": _primitives.Evaluation()}


class Tracking(Layer):
    """A layer that may have running statistics, which it tracks unless told otherwise."""

    track_running_stats = Flag()

    _running: ClassVar[tuple[str, str]] = ("running_mean", "running_var")

    def _running_statistics(self) -> tuple[Array | None, Array | None]:
        """Return both, or None twice: of a layer that has none, and tracks none."""
        first, second = (getattr(self, name) for name in self._running)
        if (first is None or second is None) and (self.track_running_stats or first is not second):
            missing = self._running[0 if first is None else 1]
            raise ValueError(f"{missing} must be an array, of a layer with running statistics")
        return first, second

    def _statistics_to_track(self) -> tuple[Array | None, Array | None]:
        return self._running_statistics() if self.track_running_stats else (None, None)


class TrackingLayer(ChannelLayer, Tracking):
    """A layer of channels: in training by the statistics of the input, else by the running ones."""

    unbiased = Flag()

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        axis: int,
        unbiased: bool,
        dtype: DTypeLike,
    ) -> None:
        super().__init__(num_features, eps, affine, axis, dtype)
        self.momentum = None if momentum is None else _validation.real("momentum", momentum)
        self.track_running_stats = track_running_stats
        self.unbiased = unbiased
        if self.track_running_stats:
            self.running_mean = np.zeros(self.num_features, self.dtype)
            self.running_var = np.ones(self.num_features, self.dtype)
            self.num_batches_tracked = 0

    @in_default_float_mode
    def __call__(self, x: Array, *, out: Array | None = None) -> Array:
        """Normalize a batch.

        Parameters
        ----------
        x : array of float32 or float64
            With `num_features` channels along `axis`. Keep its values for `backward`.
        out : array like `x`, optional
            Where to write. In place, where it is `x` itself, there can be no `backward`.

        Returns
        -------
        array like `x`

        Raises
        ------
        TypeError, ValueError
            As the function of the same name; the layer is left as it was.

        Warns
        -----
        UserWarning
            `BatchNorm`, once per layer, for a training batch with fewer than 8 values per channel:
            their statistics are mostly noise.
        RuntimeWarning
            Where a running statistic of float32 becomes infinite, though that of the batch is
            finite: the layer needs ``dtype=numpy.float64``.
        """
        array = self._batch(x)
        if self.training:
            self._before_training(array)
            return self._normalize(array, out, True)
        running_mean, running_var = self._running_statistics()
        if running_mean is None or running_var is None:
            return self._normalize(array, out, False)
        return self._evaluate(array, out, running_mean, running_var, self.eps)

    def _before_training(self, x: Array) -> None:
        """See a batch before the layer is trained on it."""

    def _normalize(self, x: Array, out: Array | None, training: bool) -> Array:
        """Return y from the statistics of x, which training tracks and the backward pass needs."""
        given = x, self.axis, self.weight, self.bias, self.eps
        if training:
            y, mean, invstd = _primitives.normalize(
                *given,
                *self._statistics_to_track(),
                self._weight_of_new_batch(),
                self.unbiased,
                out,
                self._over,
            )
            if x.size > 0 and self.track_running_stats:
                self._count()
        else:
            y, mean, invstd = _primitives.normalize(*given, out=out, over=self._over)
        self._save(x, y, mean, invstd, self._kept_weight(), False)
        return y

    def _weight_of_new_batch(self) -> float:
        """Return what the next batch weighs in the running statistics."""
        return 0.0 if self.momentum is None else self.momentum

    def _count(self) -> None:
        """Note that the running statistics have seen a batch."""
