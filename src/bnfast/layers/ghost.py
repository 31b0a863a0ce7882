"""Ghost batch normalization as a layer."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from bnfast import _primitives, _validation, functional
from bnfast._typing import Array
from bnfast.layers._layer import Gradients
from bnfast.layers._tracking import PROPAGATE, TrackingLayer
from bnfast.running_averages import LearnableMomentum, Momentum, weight_of_new_batch


class GhostBatchNorm(TrackingLayer):
    """Batch normalization of parts of a batch: a large batch trained like small ones.

    As `BatchNorm`, called with one part after the other.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    ghost_size : int
        How many samples make a part: neighbouring ones; the last part may have fewer.
    eps : float
        Added to the variance; 0 will do for evaluation only.
    momentum : float, None, or function
        The weight of each NEW part in the running statistics; None for the plain average of all
        parts; or a function or `LearnableMomentum`, as in `BatchNorm`.
    affine : bool
        Whether there are a weight and a bias.
    track_running_stats : bool
        Whether there are running statistics. Without them evaluation, too, uses those of the parts.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC; samples are along axis 0.
    unbiased : bool
        Divide by M - 1 for running_var, as PyTorch does, rather than by M, the values that a part
        has of a channel.
    dtype : dtype
        Of the parameters and running statistics: float32 or float64, whatever the input's.
    frozen, nonfinite
        As in `BatchNorm`. Single parts are skipped; with a `LearnableMomentum`, all of them.

    Attributes
    ----------
    weight, bias : array (C,) or None
        gamma (ones at first) and beta (zeros at first).
    running_mean, running_var : array (C,) or None
        Zeros and ones at first.
    num_batches_tracked : int or None
        How many parts the running statistics have seen.
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
    What it does stands in `bnfast.ghost_batch_norm`. The layer keeps a reference to its last input
    until `backward` or the next call, and does not copy it.

    References
    ----------
    E. Hoffer, I. Hubara, D. Soudry, 2017, "Train longer, generalize better: closing the
    generalization gap in large batch training of neural networks", arXiv:1705.08741.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.GhostBatchNorm(3, 16)
    >>> y = layer(np.random.default_rng(0).normal(5.0, 2.0, (64, 3, 8, 8)).astype(np.float32))
    >>> layer.num_batches_tracked
    4
    """

    _shown = (
        *("num_features", "ghost_size", "eps", "momentum", "affine", "track_running_stats"),
        *("axis", "unbiased", "dtype"),
    )

    def __init__(
        self,
        num_features: int,
        ghost_size: int,
        eps: float = 1e-5,
        momentum: Momentum = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: int = 1,
        unbiased: bool = True,
        dtype: DTypeLike = np.float32,
        frozen: bool = False,
        nonfinite: str = PROPAGATE,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, axis, unbiased, dtype),
            *(frozen, nonfinite),
        )
        self.ghost_size = _validation.integer_from("ghost_size", ghost_size, 1)

    def _batch(self, x: object) -> Array:
        array = super()._batch(x)
        _validation.channel_axis_of_samples(array, self.axis)
        return array

    def _parts(self, x: Array) -> list[slice]:
        size = self.ghost_size
        return [slice(start, start + size) for start in range(0, len(x), size)]

    def _normalize(self, x: Array, out: Array | None, training: bool, *_: Any) -> Array:
        tracks, taken = training and self.track_running_stats, None
        if tracks and self.nonfinite != PROPAGATE:
            taken = [self._takes(x[part], self.axis) for part in self._parts(x)]
        if tracks and type(self.momentum) is LearnableMomentum:
            if x.size > 0 and (taken is None or all(taken)):
                return self._normalize_blended(x, out)
            tracks = False
        seen = self.num_batches_tracked if tracks else None
        numbers = None if taken is None else list(accumulate(taken, initial=0))

        def weight(number: int) -> float:
            if numbers is not None:
                if numbers[number] == numbers[number - 1]:
                    return 0.0  # it is skipped
                number = numbers[number]
            return weight_of_new_batch(self.momentum, (seen or 0) + number)

        y, mean, invstd = _primitives.ghost_normalize(
            *(x, self.axis, self.ghost_size, self.weight, self.bias, self.eps),
            *(self._running_statistics() if tracks else (None, None)),
            weight,
            self.unbiased,
            out,
        )
        if seen is not None and x.size > 0:
            self.num_batches_tracked = seen + (len(mean) if numbers is None else numbers[-1])
        kept = mean, invstd, self._kept_weight()
        self._save(x, out, *kept, by=GhostBatchNorm._gradients_of_ghosts)
        return y

    def _gradients_of_ghosts(
        self,
        dy: Array,
        out: Array | None,
        x: Array,
        mean: Array,
        invstd: Array,
        weight: Array | None,
    ) -> Gradients:
        dx, dweight, dbias = functional.ghost_batch_norm_backward(
            dy, x, self.ghost_size, mean, invstd, weight, axis=self.axis, out=out
        )
        return dx, None if weight is None else dweight, dbias
