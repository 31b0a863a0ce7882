"""What layers of channels share, and those with running statistics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._primitives import Reduction
from bnfast._typing import Array, ArrayLikeOf, ArrayOrNone, Float
from bnfast.layers._blend import Blend, blend, share_of_batch
from bnfast.layers._layer import Flag, Gradients, Layer
from bnfast.running_averages import (
    LearnableMomentum,
    Momentum,
    checked_momentum,
    weight_of_new_batch,
)
from bnfast.statistics import Moments

AnyAveraging = TypeVar("AnyAveraging", bound="Averaging")

# What batches with values that are not finite do to the running statistics.
PROPAGATE, SKIP, RAISE = "propagate", "skip", "raise"


class Besides(NamedTuple):
    """What a call has besides its input."""

    residual: Any = None
    masked: _primitives.Masked = None
    counted: NDArray[np.bool_] | None = None  # which positions, where a mask says so


NOTHING = Besides()

# What the gradients of a call need: its mean, invstd and weight, its mask, and whether the
# statistics did not come from x.
Statistics = tuple[Array, Array, Array | None, Any, bool]


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

    def _batch(self, x: object) -> Array:
        """Return the input as an array with the channels of this layer."""
        axis = self.axis
        if type(x) is np.ndarray and x.dtype.char in "efd" and x.dtype.isnative:
            shape = x.shape
            if -len(shape) <= axis < len(shape) > 1 and shape[axis] == self.num_features:
                return x
        array, _, _ = _validation.batch("x", x, axis)
        _validation.same_channels("x", array, axis, self.num_features)
        return array

    def _evaluate(
        self,
        x: Array,
        out: Array | None,
        mean: Array,
        variance: Array,
        eps: float,
        besides: Besides = NOTHING,
    ) -> Array:
        """Return y from the running statistics, and save what the backward pass needs."""
        y = _primitives.scale_shift(
            *(x, self.axis, mean, variance, self.weight, self.bias, eps, self._evaluation, out),
            masked=besides.masked,
        )
        self._save(x, out, (*self._of_evaluation(mean, variance), besides.masked, True))
        return y

    def _of_evaluation(self, mean: Array, variance: Array) -> tuple[Array, Array, Array | None]:
        """Return the first `Statistics` of a call by these running ones."""
        # Of an empty x nothing was prepared, and there is no gradient.
        return self._evaluation.saved or (mean, variance, self.weight)

    def _gradients(
        self, dy: Array, out: Array | None, x: Array, statistics: Statistics
    ) -> Gradients:
        mean, invstd, weight, masked, constant = statistics
        over = _primitives.BATCH if constant else self._over
        dx, dweight, dbias = _primitives.gradient(
            dy, x, self.axis, mean, invstd, weight, constant, out, over, masked=masked
        )
        return dx, None if weight is None else dweight, dbias

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_evaluation": _primitives.Evaluation()}


class Averaging(Layer):
    """A layer whose running statistics are averages of those of batches."""

    frozen = Flag()
    momentum: Momentum
    nonfinite: str

    _running: ClassVar[tuple[str, ...]] = ("running_mean", "running_var")
    _shown_if_not: ClassVar[Mapping[str, Any]] = {"frozen": False, "nonfinite": PROPAGATE}

    # Told of each batch, checked, before it is normalized.
    _observer: Callable[[Array], None] | None = None

    def __new__(cls: type[AnyAveraging], *_: Any, **__: Any) -> AnyAveraging:
        layer = super().__new__(cls)
        layer.frozen, layer.nonfinite = False, PROPAGATE  # pickles of 0.1 have neither
        return layer

    def _set_averaging(self, momentum: Momentum, frozen: bool, nonfinite: str) -> None:
        self.momentum = momentum
        self.frozen = frozen
        self.nonfinite = nonfinite
        self._checked_nonfinite()

    def _checked_nonfinite(self) -> str:
        return _validation.choice("nonfinite", self.nonfinite, (PROPAGATE, SKIP, RAISE))

    def _observe(self, x: Array, out: Array | None, residual: object = None) -> None:
        """Tell who watches of a batch, unless an array that came with it is to be refused."""
        if residual is not None:
            _validation.upstream_gradient(residual, x, ("residual", "x"))
        if out is not None:
            _validation.output(out, x, {"residual": residual, "x": x}, ("residual", "x"))
        assert self._observer is not None
        self._observer(x)

    def _parts(self, x: Array) -> list[slice]:
        """Return what the running statistics take as batches, along axis 0."""
        return [slice(None)]

    def _takes(self, x: Array, axis: int, counted: NDArray[np.bool_] | None = None) -> bool:
        """Whether the running statistics take a batch; raise if it is to be refused.

        Of all its positions, or of those that count.
        """
        if self.nonfinite == PROPAGATE:
            return True
        where = None if counted is None else np.expand_dims(counted, axis % x.ndim)
        _, mean, _, m2, *_ = _primitives.summarize(x, axis, where, False, False)
        return self._takes_statistics(mean, m2)

    def _takes_statistics(self, mean: Array, m2: Array, of: str = "x") -> bool:
        """Whether the running statistics take those of a batch; raise if it is to be refused."""
        choice = self._checked_nonfinite()
        wrong = np.flatnonzero(~self._are_finite(mean, m2))
        if choice == RAISE and wrong.size:
            raise ValueError(
                f"{of} must have finite statistics, as nonfinite='raise' asks: {wrong.size} of "
                f"{mean.size} channels have none, the first of them channel {wrong[0]}"
            )
        return choice == PROPAGATE or not wrong.size

    def _are_finite(self, mean: Array, m2: Array) -> NDArray[np.bool_]:
        """Return in which channels the statistics of a batch are finite."""
        finite: NDArray[np.bool_] = np.isfinite(mean) & np.isfinite(m2)
        return finite

    def _weight_of_new_batch(self) -> float:
        """Return what the next batch weighs in the running statistics."""
        momentum = self.momentum
        if type(momentum) is float and 0.0 <= momentum <= 1.0:
            return momentum
        return weight_of_new_batch(momentum, (self.num_batches_tracked or 0) + 1)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("_observer", None)
        return state


class Tracking(Averaging):
    """A layer that may have running statistics, which it tracks unless told otherwise."""

    track_running_stats = Flag()

    def _running_statistics(self) -> tuple[Array | None, Array | None]:
        """Return both, or None twice: of a layer that has none, and tracks none."""
        names = self._running
        first, second = getattr(self, names[0]), getattr(self, names[1])
        if first is not None and second is not None:
            return first, second
        if self.track_running_stats or first is not second:
            missing = names[0 if first is None else 1]
            raise ValueError(f"{missing} must be an array, of a layer with running statistics")
        return None, None


class TrackingLayer(ChannelLayer, Tracking):
    """A layer of channels: in training by the statistics of the input, else by the running ones."""

    unbiased = Flag()
    momentum_logit: ArrayOrNone = None
    momentum_logit_grad: ArrayOrNone = None

    _arrays: ClassVar[Mapping[str, str]] = {
        **ChannelLayer._arrays,
        "momentum_logit": "momentum_logit",
    }
    _may_be_missing = ("momentum_logit",)
    _learns_momentum: ClassVar[bool] = True

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: Momentum,
        affine: bool,
        track_running_stats: bool,
        axis: int,
        unbiased: bool,
        dtype: DTypeLike,
        frozen: bool,
        nonfinite: str,
    ) -> None:
        super().__init__(num_features, eps, affine, axis, dtype)
        checked = checked_momentum(momentum, learnable=self._learns_momentum)
        self._set_averaging(checked, frozen, nonfinite)
        self.track_running_stats = track_running_stats
        self.unbiased = unbiased
        if self.track_running_stats:
            self.running_mean = np.zeros(self.num_features, self.dtype)
            self.running_var = np.ones(self.num_features, self.dtype)
            self.num_batches_tracked = 0
        if isinstance(checked, LearnableMomentum):
            if not self.track_running_stats:
                raise ValueError("momentum is learned only with track_running_stats=True")
            size = self.num_features if checked.per_channel else 1
            self.momentum_logit = np.full(size, checked.initial_logit, self.dtype)
            self._parameters = (*self._parameters, "momentum_logit")

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
            The call is made again, of a batch that the layer has been trained on, because its
            output was not kept: the same bits, but the running statistics do not see it twice.
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
            `bnfast.BatchNorm`, once per layer, for a training batch with fewer than 8 values per
            channel: their statistics are mostly noise.
        RuntimeWarning
            Where a running statistic of float32 becomes infinite, though that of the batch is
            finite: the layer needs ``dtype=numpy.float64``.
        """
        return self._call(self._batch(x), out, recompute)

    def _call(
        self, x: Array, out: Array | None, recompute: bool, besides: Besides = NOTHING
    ) -> Array:
        """Normalize a checked batch by its own statistics, or by the running ones."""
        tracks = not self._recomputes(recompute)
        if tracks and self._observer is not None:
            self._observe(x, out, besides.residual)
        if self.training and not self.frozen:
            if tracks:
                self._before_training(x, besides.counted)
            return self._normalize(x, out, tracks, besides)
        running_mean, running_var = self._running_statistics()
        if running_mean is None or running_var is None:
            return self._normalize(x, out, False, besides)
        return self._evaluate(x, out, running_mean, running_var, self.eps, besides)

    def _recomputes(self, recompute: bool) -> bool:
        """Return the checked argument; raise where the first call has changed what it would do."""
        if recompute is False:
            return False
        asked = _validation.flag("recompute", recompute)
        if asked and self.training and type(self.momentum) is LearnableMomentum:
            raise ValueError(
                "recompute must be False with a LearnableMomentum, which normalizes with running "
                "statistics that the first call has changed"
            )
        return asked

    def _before_training(self, x: Array, counted: NDArray[np.bool_] | None = None) -> None:
        """See a batch, and which of its positions count, before the layer is trained on it."""

    def _normalize(
        self, x: Array, out: Array | None, training: bool, besides: Besides = NOTHING
    ) -> Array:
        """Return y from the statistics of x, which training tracks and the backward pass needs."""
        given, masked = (x, self.axis, self.weight, self.bias, self.eps), besides.masked
        tracks = (
            training and self.track_running_stats and self._takes(x, self.axis, besides.counted)
        )
        if tracks and type(self.momentum) is LearnableMomentum:
            if x.size > 0:
                return self._normalize_blended(x, out)
            tracks = False
        if tracks:
            y, mean, invstd = _primitives.normalize(
                *given,
                *self._running_statistics(),
                self._weight_of_new_batch(),
                self.unbiased,
                out,
                self._over,
                masked=masked,
            )
            if x.size > 0:
                self._count()
        else:
            y, mean, invstd = _primitives.normalize(*given, out=out, over=self._over, masked=masked)
        self._save(x, out, (mean, invstd, self._kept_weight(), masked, False))
        return y

    def _count(self) -> None:
        """Note that the running statistics have seen a batch."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1

    # With a momentum that is learned

    def _normalize_blended(self, x: Array, out: Array | None) -> Array:
        """Return y from the running statistics into which each part of x has been blended."""
        tracked, blends = self._blends(x)
        y = self._output_beside(out, x, tracked)
        for part, blended in zip(self._parts(x), blends, strict=True):
            _primitives.scale_shift(
                *(x[part], self.axis, blended.mean, blended.variance, self.weight, self.bias),
                *(self.eps, None, y[part]),
            )
        self._track(tracked, blends)
        self._save(x, out, blends, self._kept_weight(), by=TrackingLayer._blended_gradients)
        return y

    def _blends(self, x: Array) -> tuple[tuple[Array, Array], list[Blend]]:
        """Return the running statistics, and what the parts of x make of them, one by one."""
        _validation.epsilon(self.eps, training=True)
        tracked = _validation.running_statistics(*self._running_statistics(), x, self.num_features)
        assert tracked is not None  # what has a learned momentum, tracks
        learned = share_of_batch(self._logit(), self.num_features)
        seen, blends = self.num_batches_tracked or 0, []
        mean, variance = tracked
        with np.errstate(all="ignore"):
            for number, part in enumerate(self._parts(x), seen):
                share = learned if number else np.ones(self.num_features)
                blends.append(blend(x[part], self.axis, mean, variance, share, self.unbiased))
                # As the next part would find them, had this one been a batch of its own.
                mean = blends[-1].mean.astype(tracked[0].dtype)
                variance = blends[-1].variance.astype(tracked[1].dtype)
        return tracked, blends

    def _logit(self) -> Array:
        size = self.num_features if getattr(self.momentum, "per_channel", False) else 1
        return _validation.state("momentum_logit", self.momentum_logit, (size,))

    def _output_beside(self, out: Array | None, x: Array, tracked: tuple[Array, Array]) -> Array:
        if out is None:
            return _primitives.empty_output(x)
        reads = {"x": x, "weight": self.weight, "bias": self.bias}
        return _validation.output(out, x, reads | dict(zip(self._running, tracked, strict=True)))

    def _track(self, tracked: tuple[Array, Array], blends: list[Blend]) -> None:
        _primitives.update_running(tracked, 1.0, blends[-1].mean, blends[-1].variance)
        for _ in blends:
            self._count()

    def _blended_gradients(
        self,
        dy: Array,
        out: Array | None,
        x: Array,
        blends: list[Blend],
        weight: Array | None,
    ) -> Gradients:
        upstream = _validation.upstream_gradient(dy, x)
        dx = self._gradient_output(out, dy, x, weight)
        gamma = np.ones(self.num_features) if weight is None else weight.astype(np.float64)
        dweight, dbias, dlogit = np.zeros((3, self.num_features))
        for part, blended in zip(self._parts(x), blends, strict=True):
            some_dy, some_x, invstd = upstream[part], x[part], blended.invstd(self.eps)
            sum_dy, sum_dy_xhat = _primitives.gradient_sums(
                some_dy, some_x, self.axis, blended.mean, invstd
            )
            with np.errstate(all="ignore"):
                dlogit += blended.write_gradient(
                    *(dx[part], some_dy, gamma * invstd, some_x, self.axis, self.eps),
                    (gamma * sum_dy, gamma * sum_dy_xhat),
                )
                dweight += sum_dy_xhat
                dbias += sum_dy
        return dx, None if weight is None else dweight, dbias, self._of_logit(dlogit)

    def _gradient_output(
        self, out: Array | None, dy: Array, x: Array, weight: Array | None
    ) -> Array:
        """Return where to write dx, which is written before x is read for the last time."""
        if out is None:
            return _primitives.empty_output(x)
        reads = {"dy": dy, "x, which a learned momentum reads once more": x, "weight": weight}
        return _validation.output(out, x, reads)

    def _of_logit(self, of_channels: Array) -> Array:
        """Return the gradient of the logit from that of each channel."""
        of_each = len(self._logit()) == self.num_features
        return of_channels if of_each else of_channels.sum(keepdims=True)


class RankLayer(TrackingLayer):
    """A layer of a rank, which has a part of each batch and reaches the ranks with the others."""

    communicator: Any
    _number: int  # the same of the same layer on every rank

    _recalibrated = False  # whether `_joined` comes in each call

    def _observe(self, x: Array, out: Array | None, residual: object = None) -> None:
        """Tell who watches; what is to be refused is refused where all ranks learn of it."""
        assert self._observer is not None
        self._observer(x)

    @abstractmethod
    def _joined(
        self, x: Array, samples: int, terms: Mapping[str, Any]
    ) -> tuple[Moments, int] | None:
        """Return the moments and the number of samples of the batch that x is a part of.

        None where the running statistics do not take it, or it is empty. The terms must be the same
        on all ranks.
        """

    @abstractmethod
    def _leaving_together(self, terms: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return a context that all ranks leave with the same terms, or by an error on each."""
