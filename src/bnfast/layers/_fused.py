"""What layers share that add a residual and apply an activation in the same pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives, _validation
from bnfast._activations import LEAKY, activation_of
from bnfast._arrays import as_array
from bnfast._float_mode import in_default_float_mode
from bnfast._masks import ZEROS
from bnfast._primitives import Activation, Reduction
from bnfast._typing import Array, ArrayLikeOf, Float
from bnfast.layers._layer import IN_PLACE, Gradients, Layer
from bnfast.layers._masked import checked_once
from bnfast.layers._tracking import NOTHING, Besides, Statistics, TrackingLayer
from bnfast.running_averages import LearnableMomentum

SHOWN_IF_NOT: Mapping[str, Any] = {"activation": None, "negative_slope": 0.01}

# What the gradients of a call with an activation or a residual need besides statistics: the bias,
# the activation, the residual where z is made again of it, or y where that says enough, and whether
# there was a residual.
Fusion = tuple[Array | None, Activation | None, Array | None, Array | None, bool]


class FusedLayer(Layer):
    """A layer with an activation of its own, whose calls may add a residual before it."""

    activation: str | None = None  # pickles of 0.1 have none
    negative_slope: float = 0.01

    def _set_activation(self, activation: str | None, negative_slope: float) -> None:
        activation_of(activation, negative_slope)
        activation_of(LEAKY, negative_slope)  # it may become that later
        self.activation, self.negative_slope = activation, negative_slope

    def _save_fused(
        self,
        x: Array,
        y: Array,
        out: Array | None,
        statistics: Any,
        chosen: Activation | None,
        residual: Any,
    ) -> None:
        """Keep y for the backward pass rather than the residual: the network keeps it anyway."""
        adds = residual is not None
        from_y = adds and chosen is not None and chosen.is_gated_by_output
        again = adds and chosen is not None and not from_y
        if again:
            residual = as_array(residual)
            if out is not None and _validation.shares_memory(residual, out):
                self._saved = IN_PLACE
                return
        bias = None if self.bias is None or chosen is None or from_y else self.bias.copy()
        fusion = bias, chosen, residual if again else None, y if from_y else None, adds
        self._save(x, out, statistics, fusion, by=type(self)._fused_gradients)

    @abstractmethod
    def _fused_gradients(
        self, dy: Array, out: Array | None, x: Array, statistics: Any, fusion: Fusion
    ) -> Gradients:
        """Return those of a call with an activation or a residual."""


class FusedChannels(FusedLayer):
    """Such a layer whose channels have parameters."""

    axis: int
    _over: ClassVar[Reduction]  # whose statistics are made together
    _grouped: ClassVar[bool] = False  # whether channels of a group have their statistics in common

    def _fused_gradients(
        self, dy: Array, out: Array | None, x: Array, statistics: Statistics, fusion: Fusion
    ) -> Gradients:
        mean, invstd, weight, masked, constant = statistics
        *_, adds = fusion
        over = _primitives.BATCH if constant else self._over
        dx, dweight, dbias, dresidual = _primitives.fused_gradient(
            *(dy, x, self.axis, mean, invstd, weight, constant, out, over, self._grouped),
            *fusion,
            masked=masked,
        )
        return (dx, dresidual) if adds else dx, None if weight is None else dweight, dbias


class FusedTrackingLayer(FusedChannels, TrackingLayer):
    """Such a layer with running statistics or without."""

    _shown_if_not: ClassVar[Mapping[str, Any]] = {
        **TrackingLayer._shown_if_not,
        **SHOWN_IF_NOT,
    }

    @in_default_float_mode
    def __call__(
        self,
        x: ArrayLikeOf[Float],
        residual: ArrayLikeOf[Float] | None = None,
        *,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        padding: str = ZEROS,
        recompute: bool = False,
        out: NDArray[Float] | None = None,
    ) -> NDArray[Float]:
        """Normalize a batch.

        Parameters
        ----------
        x : array of float16, bfloat16, float32 or float64
            With `num_features` channels along `axis`. Keep its values for `backward`, and those of
            the output where there is a residual.
        residual : array like `x`, optional
            What is added before the activation, of any strides; `backward` then returns its
            gradient as well.
        mask, lengths, padding
            As in `bnfast.batch_norm`: which values count, and what the output is where they do not.
            Keep them for `backward`, too, which has the same.
        recompute : bool
            The call is made again, of a batch that the layer has been trained on, because its
            output was not kept: the same bits, but the running statistics do not see it twice.
        out : array like `x`, optional
            Where to write. In place, where it is `x` itself, there can be no `backward`, unless
            ``inplace=True``; nor where it is the residual itself, if the activation is silu,
            hardswish, or leaky_relu with a `negative_slope` below 0.

        Returns
        -------
        array like `x`

        Raises
        ------
        TypeError, ValueError
            As the function of the same name; where there is a mask with a momentum that is learned,
            or while the layer is recalibrated or monitored. The layer is left as it was.

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
        masked, counted = None, None
        if mask is not None or lengths is not None or padding != ZEROS:
            masked, counted = checked_once(self, array, mask, lengths, padding)
        out = self._destination(array, out, residual, counted)
        if residual is None and masked is None:
            return self._call(array, out, recompute)
        return self._call(array, out, recompute, Besides(residual, masked, counted))

    def _destination(
        self, x: Array, out: Array | None, residual: object, counted: Any
    ) -> Array | None:
        """Return where to write, None for a new array; raise where that cannot be."""
        return out

    def _is_plain(self, residual: object) -> bool:
        """Whether a call has nothing that a layer without activations would not have."""
        return self.activation is None and residual is None

    def _normalize(
        self, x: Array, out: Array | None, training: bool, besides: Besides = NOTHING
    ) -> Array:
        residual, masked, counted = besides
        if self._is_plain(residual):
            return super()._normalize(x, out, training, besides)
        chosen = activation_of(self.activation, self.negative_slope)
        tracks = training and self.track_running_stats and self._takes(x, self.axis, counted)
        if tracks and type(self.momentum) is LearnableMomentum:
            raise ValueError(
                "momentum must be no LearnableMomentum with a residual or an activation, nor with "
                "inplace=True"
            )
        tracked: dict[str, Any] = {}
        if tracks:
            tracked = dict(zip(self._running, self._running_statistics(), strict=True))
            tracked |= {"momentum": self._weight_of_new_batch(), "unbiased": self.unbiased}
        y, mean, invstd = _primitives.normalize(
            *(x, self.axis, self.weight, self.bias, self.eps),
            **tracked,
            out=out,
            over=self._over,
            activation=chosen,
            residual=residual,
            masked=masked,
        )
        if tracks and x.size > 0:
            self._count()
        statistics = mean, invstd, self._kept_weight(), masked, False
        self._save_fused(x, y, out, statistics, chosen, residual)
        return y

    def _evaluate(
        self,
        x: Array,
        out: Array | None,
        mean: Array,
        variance: Array,
        eps: float,
        besides: Besides = NOTHING,
    ) -> Array:
        residual, masked, _ = besides
        if self._is_plain(residual):
            return super()._evaluate(x, out, mean, variance, eps, besides)
        chosen = activation_of(self.activation, self.negative_slope)
        y = _primitives.scale_shift(
            *(x, self.axis, mean, variance, self.weight, self.bias, eps, self._evaluation, out),
            activation=chosen,
            residual=residual,
            masked=masked,
        )
        statistics = *self._of_evaluation(mean, variance), masked, True
        self._save_fused(x, y, out, statistics, chosen, residual)
        return y
