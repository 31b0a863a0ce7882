"""Running statistics made anew, of the data that a trained model is to be used with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, ClassVar

import numpy as np

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array
from bnfast.adaptation._borrowed import Borrowed, borrowed, first_statistics, samples
from bnfast.adaptation._pools import OfChannels, pool_of
from bnfast.functional import RenormSchedule
from bnfast.layers import (
    BatchRenorm,
    CrossIterationBatchNorm,
    InstanceNorm,
    MovingAverageBatchNorm,
)
from bnfast.layers._tracking import PROPAGATE, SKIP, Averaging, RankLayer
from bnfast.running_averages import CumulativeAverage

POOLED, AVERAGE_OF_BATCHES = "pooled", "average_of_batches"
METHODS = (POOLED, AVERAGE_OF_BATCHES)

# Of batch renormalization: no correction towards what is being made anew.
_UNCORRECTED = RenormSchedule(1.0, 0.0, 0, 0, 0)

# How these go on depends on how many batches they have been trained on.
_BY_STEP = (BatchRenorm, CrossIterationBatchNorm, MovingAverageBatchNorm)


def recalibrating(
    layers: object, *, method: str = POOLED, prior: float | None = None
) -> Recalibration:
    """Make the running statistics of layers anew, of the data that they see in a ``with`` block.

    Run your data through the network inside: in whatever mode, batch by batch. At the end of the
    block the running statistics are those of all the batches. Weights, biases and modes stay.

    Parameters
    ----------
    layers : layer, iterable of layers, or mapping of names to layers
        With running statistics.
    method : str
        "pooled": the exact mean and variance of all values together, however they were cut into
        batches. "average_of_batches": the plain average of the statistics of each batch, as
        PyTorch's ``update_bn`` makes it; what the means of batches differ by, it leaves out of the
        variance.
    prior : float, optional
        N, how many samples the running statistics count as that are there already. With None, they
        are replaced.

    Returns
    -------
    Recalibration
        For ``with``.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value, or layers without running statistics that can be
        written to.
    RuntimeError
        For a layer in two such blocks at once, and, at the end of the block, for layers that saw no
        data.

    Warns
    -----
    RuntimeWarning
        Where a running statistic of float32 becomes infinite, though that of the data is finite;
        and where one is not finite because that of the data is not. All layers have their new
        statistics by then.

    Notes
    -----
    What the data are normalized with inside the block:

    - without a prior, each batch with its own statistics, as in training. So what a layer sees does
      not depend on the statistics that are being made anew in the layers before it.
    - with a prior, each batch with what the running statistics would be if the block ended with it:
      with n samples so far, of mean mu and variance var (as the layer divides it)::

          running_mean = (N * running_mean + n * mu)  / (N + n)
          running_var  = (N * running_var  + n * var) / (N + n)

      A block of one batch is the test-time adaptation of Schneider et al.; N = 16 suits batches of
      some tens of images there. The output of this batch is that of evaluation after the block.

    If an exception leaves the block, the running statistics are as before it. They change at the
    end of the block only, all layers together. Inside, a layer has other settings and running
    statistics for the time being: copy and save it outside.

    ``num_batches_tracked`` counts the batches of the block afterwards, with a prior in addition to
    those before. `BatchRenorm`, `MovingAverageBatchNorm` and `CrossIterationBatchNorm`, whose
    schedule, warm-up and window it is the step of, keep theirs, and so does `InstanceNorm`, which
    counts nothing. A layer's `nonfinite` decides about batches that are not finite: by default they
    make the running statistics NaN or infinite.

    A `bnfast.distributed.SyncBatchNorm` is recalibrated by all ranks together, to the same
    statistics, those of the joined batches: all make the same calls inside, a rank without data
    with empty arrays, in whatever mode, and leave the block together. Each call has two exchanges
    (with a prior one), and the end of the block one for all layers. Where a rank leaves by an
    exception of its own, those that wait for it raise after the timeout of the communicator.

    Layers other than `BatchNorm` pool what they keep: `GhostBatchNorm` takes all values together
    rather than parts, `BatchRenorm` has the deviation, `MovingAverageBatchNorm` the mean square,
    whitening layers have the matrix made of the pooled covariance, and `InstanceNorm` the average
    of the statistics of single samples. Batches before the block have no part in what is done
    inside: buffers and windows are neither read nor written, so that `CrossIterationBatchNorm`
    needs neither inputs nor filters there.

    References
    ----------
    Y. Li, N. Wang, J. Shi, J. Liu, X. Hou, 2016, "Revisiting Batch Normalization For Practical
    Domain Adaptation", arXiv:1603.04779. Y. Wu, J. Johnson, 2021, "Rethinking 'Batch' in
    BatchNorm", arXiv:2105.07576 ("precise BN"). S. Schneider et al., 2020, "Improving robustness
    against common corruptions by covariate shift adaptation", arXiv:2006.16971. P. Izmailov et al.,
    2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407
    (``update_bn``).

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.BatchNorm(3).eval()
    >>> data = np.random.default_rng(0).normal(5.0, 2.0, (4, 16, 3)).astype(np.float32)
    >>> with bnfast.recalibrating(layer):
    ...     for x in data:
    ...         y = layer(x)
    >>> bool(np.allclose(layer.running_mean, data.mean((0, 1))))
    True
    >>> layer.training, layer.num_batches_tracked
    (False, 4)
    """
    return Recalibration(layers, method, prior)


class Recalibration:
    """What `bnfast.recalibrating` returns, for ``with``."""

    def __init__(self, layers: object, method: str, prior: float | None) -> None:
        _validation.choice("method", method, METHODS)
        self._prior = None
        if prior is not None:
            self._prior = _validation.real("prior", prior)
            if self._prior < 0.0:
                raise ValueError(f"prior must not be negative, got {prior}")
            if method != POOLED:
                raise ValueError(f"prior needs method={POOLED!r}, got method={method!r}")
        self._layers, self._method = layers, method
        self._parts: list[_Part] = []

    def __enter__(self) -> None:
        """Begin."""
        if self._parts:
            raise RuntimeError("this recalibration has begun already")
        parts = [
            (_PartOfRank if isinstance(one.layer, RankLayer) else _Part)(
                one, self._method, self._prior
            )
            for one in borrowed(self._layers)
        ]
        for part in parts:
            part.begin()
        self._parts = parts

    @in_default_float_mode
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write the new statistics, unless there was an exception."""
        parts, self._parts = self._parts, []
        try:
            if kind is None:
                found = self._found(parts)
        finally:
            for part in parts:
                part.borrowed.end()
        if kind is None:
            _write(parts, found)

    def _found(self, parts: list[_Part]) -> list[tuple[Array, ...]]:
        """Return the new statistics, once all ranks of all layers have theirs."""
        layers = [part.borrowed.layer for part in parts]
        of_ranks = [layer for layer in layers if isinstance(layer, RankLayer)]
        groups: dict[int, list[RankLayer]] = {}
        for layer in of_ranks:
            groups.setdefault(id(layer.communicator), []).append(layer)
        with ExitStack() as together:
            for group in groups.values():
                numbers = ", ".join(str(layer._number) for layer in group)
                together.enter_context(group[0]._leaving_together({"layers": numbers}))
            blind = [part.borrowed for part in parts if part.batches == 0]
            if blind:
                skips = any(one.layer.nonfinite == SKIP for one in blind)
                but = ", or only batches that nonfinite='skip' leaves out" if skips else ""
                raise RuntimeError(
                    f"no data went through {_named(blind)}{but}: all running statistics are as "
                    f"before"
                )
            return [part.statistics() for part in parts]


def _named(layers: list[Borrowed]) -> str:
    names = ", ".join(one.name for one in layers)
    return f"layer{'s' if len(layers) > 1 else ''} {names}"


def _write(parts: list[_Part], found: list[tuple[Array, ...]]) -> None:
    """Give all layers their new statistics, and then warn of what is wrong with them."""
    warned = []
    for part, statistics in zip(parts, found, strict=True):
        try:
            part.write(statistics)
        except Warning as error:  # where warnings are errors
            warned.append(error)
    if warned:
        raise warned[0]
    spoiled = [
        part.borrowed
        for part, statistics in zip(parts, found, strict=True)
        if not all(np.isfinite(statistic).all() for statistic in statistics)
    ]
    if spoiled:
        _validation.warn(
            f"the running statistics of {_named(spoiled)} are not all finite from now on; "
            f"nonfinite='skip' of a layer leaves out the batches that are not"
        )


class _Part:
    """One layer of a recalibration."""

    _more_settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, one: Borrowed, method: str, prior: float | None) -> None:
        self.borrowed, self.batches = one, 0
        self._method, self._prior = method, prior
        self._pool, self._samples = pool_of(one.layer), 0
        # What the layer has instead of its own running statistics.
        self._running = first_statistics(one.layer)
        for name, first in self._running.items():
            of_layer = f"{name} of layer {one.name}"
            _validation.running_statistic(of_layer, one.own(name), first.shape)
        adapts, averages = prior is not None, method == AVERAGE_OF_BATCHES
        if adapts:
            self._running = dict(zip(one.layer._running, self._own(), strict=True))
        self._settings = {
            **self._running,
            "training": not adapts,
            "frozen": False,
            "momentum": CumulativeAverage() if averages else 0.0,
            **_alone(one.layer, adapts or averages),
            **self._more_settings,
        }

    def begin(self) -> None:
        self.borrowed.begin(self._settings, self._see)
        if self._method == AVERAGE_OF_BATCHES:
            vars(self.borrowed.layer)["num_batches_tracked"] = 0

    def _own(self) -> list[Array]:
        return [statistic.astype(np.float64) for statistic in self.borrowed.statistics]

    @in_default_float_mode
    def _see(self, x: Array) -> None:
        if self._add(x) and self._prior is not None:
            names = self.borrowed.layer._running
            for name, new in zip(names, self.statistics(), strict=True):
                self._running[name][...] = new

    def _add(self, x: Array) -> bool:
        """Add what the running statistics take of a batch; return whether that is anything."""
        layer = self.borrowed.layer
        axis: int = layer.axis  # type: ignore[attr-defined]  # every such layer has one
        if x.size == 0:
            return False
        parts = [x[part] for part in layer._parts(x)]
        if layer.nonfinite != PROPAGATE:
            parts = [part for part in parts if layer._takes(part, axis)]
        self.batches += len(parts)
        self._samples += sum(samples(part, axis) for part in parts)
        if self._method == POOLED:
            for part in parts:
                self._pool.add(part)
        return len(parts) > 0

    def _blended(self, statistics: tuple[Array, ...]) -> tuple[Array, ...]:
        """Return statistics with those of the layer itself as the prior."""
        share = self._samples / ((self._prior or 0.0) + self._samples)
        with np.errstate(all="ignore"):
            # What has no weight is not there, even if it is NaN or infinite.
            if share == 1.0:
                return statistics
            pairs = zip(self._own(), statistics, strict=True)
            return tuple((1.0 - share) * old + share * new for old, new in pairs)

    def statistics(self) -> tuple[Array, ...]:
        """Return the running statistics as they are to be, in float64."""
        if self._method == AVERAGE_OF_BATCHES:
            return tuple(self._running[name] for name in self.borrowed.layer._running)
        found = self._pool.statistics()
        return found if self._prior is None else self._blended(found)

    def write(self, statistics: tuple[Array, ...]) -> None:
        """Give the layer the number of batches and its new statistics, in place."""
        layer = self.borrowed.layer
        if self._prior is None:
            layer._made_of_data = True
        if isinstance(layer, InstanceNorm):
            counts = callable(layer.momentum)
        else:
            counts = not isinstance(layer, _BY_STEP)
        if counts and layer.num_batches_tracked is not None:
            before = 0 if self._prior is None else layer.num_batches_tracked
            layer.num_batches_tracked = before + self.batches
        if isinstance(layer, MovingAverageBatchNorm):
            _primitives.blend(layer.running_var, 1.0, statistics[0], layer._running[0])
        else:
            first, second = layer._running
            arrays = getattr(layer, first), getattr(layer, second)
            mean, other = statistics
            _primitives.update_running(arrays, 1.0, mean, other, names=(first, second))


def _alone(layer: Averaging, tracks: bool) -> dict[str, Any]:
    """Return what makes a layer normalize each batch by itself, and track its statistics or not."""
    if isinstance(layer, BatchRenorm):
        return {"schedule": _UNCORRECTED}
    if isinstance(layer, MovingAverageBatchNorm):
        buffers = {name: np.zeros_like(getattr(layer, name)) for name in layer._buffers}
        return {"warm_up": sys.maxsize, **buffers}
    if isinstance(layer, CrossIterationBatchNorm):
        # A single value has no unbiased variance; where nothing is tracked, none is needed.
        return {"window": 1, "unbiased": tracks and layer.unbiased}
    return {"track_running_stats": tracks}


class _PartOfRank(_Part):
    """One layer whose batches are those of all ranks."""

    _more_settings: ClassVar[Mapping[str, Any]] = {"_recalibrated": True}

    def _add(self, x: Array) -> bool:
        layer, pool = self.borrowed.layer, self._pool
        assert isinstance(layer, RankLayer)
        assert isinstance(pool, OfChannels)
        ways = {"method": self._method, "prior": self._prior}
        joined = layer._joined(x, samples(x, layer.axis), ways)
        if joined is None:
            return False
        of_batch, count = joined
        self.batches += 1
        self._samples += count
        if self._method == POOLED:
            pool.merge(of_batch)
        return True
