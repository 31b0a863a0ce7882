"""How far training and evaluation differ, layer by layer, on given data, and why."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bnfast._float_mode import in_default_float_mode
from bnfast._moving_average import correction
from bnfast._scalars import describe
from bnfast._typing import Array
from bnfast.adaptation._borrowed import Borrowed, borrowed, first_statistics, moments_as_seen
from bnfast.functional.cross_iteration import average_of_iterations
from bnfast.layers import (
    BatchRenorm,
    CrossIterationBatchNorm,
    InstanceNorm,
    MovingAverageBatchNorm,
)
from bnfast.layers._blend import share_of_batch
from bnfast.layers._tracking import Averaging, TrackingLayer
from bnfast.layers.batch import FEW_VALUES
from bnfast.running_averages import LearnableMomentum, weight_of_new_batch
from bnfast.statistics import Moments

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What is worth a word. Half a standard deviation moves the output of evaluation as far, and a
# variance that is off by 2 stretches it by 1.4: both are more than the noise of batches of a dozen
# values, which training has got used to.
DRIFTED_MEAN = 0.5
DRIFTED_VARIANCE = math.log(2.0)
# Of running statistics, what they began as; of the variance, what lies between batches (of n values
# drawn alike, 1 / n).
MUCH_OF_THE_START, NOTHING_OF_THE_START = 0.05, 1e-9
MUCH_BETWEEN_BATCHES = 0.1

Doubles = NDArray[np.float64]
MONITORED = (TrackingLayer, BatchRenorm, CrossIterationBatchNorm, MovingAverageBatchNorm)
Monitored: TypeAlias = (
    TrackingLayer | BatchRenorm | CrossIterationBatchNorm | MovingAverageBatchNorm
)


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What a monitor saw of one layer.

    Attributes
    ----------
    name : str
        Of the layer among those that were monitored.
    kind : str
        Its class.
    batches : int
        How many went through it (parts, of `bnfast.GhostBatchNorm`). Without any, all arrays are
        NaN.
    fewest_values : int
        Per channel, of the smallest batch.
    difference : array (C,)
        The root mean square difference between the outputs of training and of evaluation, on these
        data, where weight is 1.
    mean_drift : array (C,)
        (mean of the data - running mean) / running standard deviation.
    variance_drift : array (C,)
        The natural logarithm of (variance of the data + eps) / (running variance + eps).
    between_batches : array (C,)
        The share of the variance of the data that lies between batches: about 1 / n of batches of n
        values drawn alike.
    remaining_start : float
        The share of the running statistics that is still what they began as, according to
        `momentum` and num_batches_tracked. 0 after `bnfast.recalibrating` without a prior,
        until a state is loaded, which does not say that its statistics were recalibrated.
    constant, nonfinite : array (C,) of bool
        Channels whose values were all equal, or not all finite.
    reasons : tuple of str
        Why training and evaluation differ, or what else is wrong, in words.
    """

    name: str
    kind: str
    batches: int
    fewest_values: int
    difference: Doubles
    mean_drift: Doubles
    variance_drift: Doubles
    between_batches: Doubles
    remaining_start: float
    constant: NDArray[np.bool_]
    nonfinite: NDArray[np.bool_]
    reasons: tuple[str, ...]


def monitoring(layers: object) -> Monitor:
    """Compare training and evaluation of layers, on the data that they see in a ``with`` block.

    Run your data through the network inside, in evaluation mode as a rule: the report says how far
    the output of each layer would be from that in training, and why. Nothing of the layers changes,
    not even in training mode: running statistics are as before, bit for bit.

    Parameters
    ----------
    layers : layer, iterable of layers, or mapping of names to layers
        `BatchNorm`, `GhostBatchNorm`, `ConditionalBatchNorm`, `BatchRenorm`,
        `CrossIterationBatchNorm`, `MovingAverageBatchNorm` or
        `bnfast.distributed.SyncBatchNorm`, with running statistics. `InstanceNorm` and whitening
        layers are refused.

    Returns
    -------
    Monitor
        For ``with``, and then the report: printed, it is a table.

    Raises
    ------
    TypeError, ValueError
        For other layers.
    RuntimeError
        For a layer that is monitored or recalibrated already.

    Notes
    -----
    The difference is not sampled: of each batch it follows from the moments. With z the values
    normalized by the statistics mu and var of their batch, training makes z (times a weight, plus a
    bias) and evaluation makes ratio * z + shift::

        ratio = sqrt(var + eps) / sqrt(running_var + eps)
        shift = (mu - running_mean) / sqrt(running_var + eps)
        difference**2 = mean over values of shift**2 + (ratio - 1)**2 * z**2

    `BatchRenorm` and a `LearnableMomentum` make something else of z in training, which is taken
    into account. Whether a layer is frozen is not. Of a
    `bnfast.distributed.SyncBatchNorm`, each rank reports on its own data, as if its part were the
    batch, and nothing is exchanged for that.

    Training of `CrossIterationBatchNorm` and `MovingAverageBatchNorm` is taken to average the
    batches that the monitor has seen last, rather than those before the block. Of
    `MovingAverageBatchNorm`, everything is around 0 rather than a mean: the mean does not drift,
    the variance is the mean square, and constant is a channel of zeros.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer, rng = bnfast.BatchNorm(3, momentum=None), np.random.default_rng(0)
    >>> y = layer(rng.normal(5.0, 2.0, (256, 3)).astype(np.float32))
    >>> with bnfast.monitoring({"stem": layer}) as report:
    ...     y = layer.eval()(rng.normal([5.0, 5.0, 9.0], 2.0, (256, 3)).astype(np.float32))
    >>> report.rows[0].reasons
    ('mean drifted in 1 of 3 channels, channel 2 by 2.0 standard deviations',)
    """
    return Monitor(layers)


class Monitor:
    """What `bnfast.monitoring` returns: for ``with``, and then a report.

    Attributes
    ----------
    rows : list of LayerReport
        One of each layer.
    """

    def __init__(self, layers: object) -> None:
        self._layers = layers
        self._watched: list[_Watched] | None = None

    def __enter__(self) -> Monitor:
        """Begin."""
        if self._watched is not None:
            raise RuntimeError("this monitor has begun already")
        self._watched = [_Watched(one) for one in borrowed(self._layers)]
        for watched in self._watched:
            watched.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End; the report is of what was seen."""
        for watched in self._watched or ():
            watched.borrowed.end()

    @property
    @in_default_float_mode
    def rows(self) -> list[LayerReport]:
        """What was seen of each layer so far."""
        return [watched.report() for watched in self._watched or ()]

    @in_default_float_mode
    def table(self) -> str:
        """Return the report as text: the worst channel of each layer, and reasons.

        Returns
        -------
        str

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> layer = bnfast.BatchNorm(2)
        >>> layer.running_var[...], layer.num_batches_tracked = 4, 100
        >>> with bnfast.monitoring(layer) as report:
        ...     y = layer.eval()(np.array([[-2.0], [2.0]] * 8, np.float32).repeat(2, 1))
        >>> print(report.table())
        layer      class      batches  values  difference  mean drift  variance
        BatchNorm  BatchNorm        1      16        0.00       +0.00     x1.00
        """
        rows = self.rows
        head = ("layer", "class", "batches", "values", "difference", "mean drift", "variance")
        cells = [head, *map(_cells, rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        reasons = [(), *(row.reasons for row in rows)]
        text = []
        for line, why in zip(cells, reasons, strict=True):
            padded = [
                cell.ljust(width) if number < 2 else cell.rjust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
            text += ["  ".join(padded), *(f"    {reason}" for reason in why)]
        return "\n".join(text)

    def __str__(self) -> str:
        return self.table()

    @in_default_float_mode
    def plot(self, where: str | os.PathLike[str] | Axes) -> Axes:
        """Draw how far each layer has drifted.

        Parameters
        ----------
        where : path or matplotlib.axes.Axes
            The file to write, in the format of its suffix, or where to draw.

        Returns
        -------
        matplotlib.axes.Axes
            With the median of the channels as a point, and a line up to the furthest of them.

        Raises
        ------
        TypeError
            If `where` is neither.
        ImportError
            Without matplotlib, an optional dependency.
        """
        try:
            from matplotlib.axes import Axes
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "the plot needs matplotlib: python -m pip install matplotlib"
            ) from error
        rows = [row for row in self.rows if row.batches]
        is_path = isinstance(where, (str, os.PathLike))
        if not is_path and not isinstance(where, Axes):
            raise TypeError(
                f"where must be a path or a matplotlib.axes.Axes, got {describe(where)}"
            )
        axes: Any = where
        if is_path:
            figure = Figure(figsize=(3.0 + 0.9 * len(rows), 4.5), layout="constrained")
            axes = figure.add_subplot()
        series = {
            "output, evaluation - training (rms)": [row.difference for row in rows],
            "mean (running standard deviations)": [np.abs(row.mean_drift) for row in rows],
            "variance (log ratio)": [np.abs(row.variance_drift) for row in rows],
        }
        for number, (label, values) in enumerate(series.items()):
            finite = [value[np.isfinite(value)] for value in values]
            places = [k + 0.2 * (number - 1) for k, some in enumerate(finite) if some.size]
            middle = [float(np.median(some)) for some in finite if some.size]
            furthest = [float(some.max()) for some in finite if some.size]
            axes.vlines(places, middle, furthest, color=f"C{number}")
            axes.plot(places, middle, "o", color=f"C{number}", label=label)
        axes.set_xticks(range(len(rows)), [row.name for row in rows])
        axes.set_xlim(-0.6, max(len(rows), 1) - 0.4)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("layer")
        axes.set_ylabel("drift: median and furthest channel")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)
        if is_path:
            axes.figure.savefig(where)
        return axes  # type: ignore[no-any-return]


def _cells(row: LayerReport) -> tuple[str, ...]:
    """Return a line of the table."""
    if row.batches == 0:
        return row.name, row.kind, "0", "0", "-", "-", "-"
    return (
        *(row.name, row.kind, str(row.batches), str(row.fewest_values)),
        f"{_largest(row.difference):.2f}",
        f"{_largest(row.mean_drift):+.2f}",
        f"x{math.exp(_largest(row.variance_drift)):.2f}",
    )


def _largest(values: Doubles) -> float:
    """Return the value that is furthest from 0, with its sign; NaN where none is finite."""
    finite = values[np.isfinite(values)]
    return float(finite[np.abs(finite).argmax()]) if finite.size else math.nan


class _Watched:
    """What is added up of one layer."""

    def __init__(self, one: Borrowed) -> None:
        layer = one.layer
        if isinstance(layer, InstanceNorm) or not isinstance(layer, MONITORED):
            raise TypeError(
                f"layers to be monitored must be neither InstanceNorm nor whitening layers, layer "
                f"{one.name} is {layer}"
            )
        self.borrowed, self._layer = one, layer
        self._batches, self._fewest = 0, 0
        self._last: list[Moments] = []  # those that training averages, the latest first
        self._pooled: Moments | None = None
        # Sums over all values: squared differences, and squared deviations within batches.
        self._squares, self._within = np.zeros((2, layer.num_features))
        self._running = self._statistics_of(layer)
        # The layer tracks these, so that its own statistics stay as they are.
        self._copies = {name: getattr(layer, name).copy() for name in layer._first_statistics()}

    @staticmethod
    def _statistics_of(layer: Monitored) -> tuple[Doubles, Doubles]:
        """Return the running mean, and variance + eps, in float64."""
        mean = np.zeros(layer.num_features)
        if layer.running_mean is not None:
            mean = layer.running_mean.astype(np.float64)
        with np.errstate(all="ignore"):
            if isinstance(layer, BatchRenorm):
                return mean, layer.running_std.astype(np.float64) ** 2
            assert layer.running_var is not None
            return mean, layer.running_var + np.float64(layer.eps)

    def begin(self) -> None:
        self.borrowed.begin(self._copies, self._see)

    @in_default_float_mode
    def _see(self, x: Array) -> None:
        if x.size == 0:
            return
        for part in self._layer._parts(x):
            of_part = moments_as_seen(self._layer, x[part])
            count = int(of_part.count)
            with np.errstate(all="ignore"):
                averaged = self._averaged(of_part)
                slope, offset = self._of_training(of_part, *averaged)
                ratio, shift = self._of_evaluation(of_part)
                # The mean of z**2, which eps makes less than 1.
                size = of_part.var / (of_part.var + self._layer.eps)
                self._squares += count * ((shift - offset) ** 2 + (ratio - slope) ** 2 * size)
                self._within += of_part.m2
            self._fewest = count if self._batches == 0 else min(self._fewest, count)
            self._batches += 1
            self._pooled = of_part if self._pooled is None else self._pooled.merge(of_part)

    def _of_evaluation(self, of_batch: Moments) -> tuple[Doubles, Doubles]:
        """Return what evaluation multiplies values normalized by their batch with, and adds."""
        mean, variance = self._running
        return _line(of_batch, self._layer.eps, mean, variance)

    def _averaged(self, of_batch: Moments) -> tuple[Doubles, Doubles]:
        """Return the mean and the variance of the batches that training takes together."""
        self._last = [of_batch, *self._last][: self._batches_together()]
        if len(self._last) == 1:
            return of_batch.mean, of_batch.m2 / of_batch.count
        means, variances = ([one.mean for one in self._last], [one.var for one in self._last])
        return average_of_iterations(np.stack(means), np.stack(variances))

    def _batches_together(self) -> int:
        """Return how many batches training normalizes together, once there are as many."""
        layer = self._layer
        if isinstance(layer, CrossIterationBatchNorm):
            return 1 if layer._burns_in() else layer.window
        if isinstance(layer, MovingAverageBatchNorm):
            return layer.buffer_size if layer._averages() else 1
        return 1

    def _of_training(
        self, of_batch: Moments, together_mean: Doubles, together_var: Doubles
    ) -> tuple[Doubles, Doubles]:
        """Return the same of training, by the statistics of the batches taken together."""
        layer, eps = self._layer, self._layer.eps
        mean, variance = self._running
        ones, zeros = np.ones(layer.num_features), np.zeros(layer.num_features)
        if isinstance(layer, BatchRenorm):
            r_max, d_max = layer.schedule.at(layer.num_batches_tracked)
            ratio, shift = _line(of_batch, eps, mean, variance)
            return np.clip(ratio, 1.0 / r_max, r_max), np.clip(shift, -d_max, d_max)
        if isinstance(layer, (CrossIterationBatchNorm, MovingAverageBatchNorm)):
            slope, offset = _line(of_batch, eps, together_mean, together_var + eps)
            if isinstance(layer, MovingAverageBatchNorm):
                limit = layer._largest_correction()
                slope *= correction(together_var + eps, variance, limit)
            return slope, offset
        if isinstance(layer.momentum, LearnableMomentum) and layer.num_batches_tracked:
            share = share_of_batch(layer._logit(), layer.num_features)
            own = of_batch.m2 / (of_batch.count - 1 if layer.unbiased else of_batch.count) + eps
            blended = (
                (1 - share) * mean + share * of_batch.mean,
                (1 - share) * variance + share * own,
            )
            return _line(of_batch, eps, *blended)
        return ones, zeros

    def report(self) -> LayerReport:
        """Return what was seen."""
        layer, name = self._layer, self.borrowed.name
        start = _remaining_start(self.borrowed)
        nothing = np.full(layer.num_features, np.nan)
        if self._pooled is None:
            no = np.zeros(layer.num_features, np.bool_)
            return LayerReport(
                *(name, type(layer).__name__, 0, 0, *(nothing,) * 4, start, no, no),
                ("no data went through it",),
            )
        pooled = self._pooled
        mean, variance = self._running
        with np.errstate(all="ignore"):
            difference = np.sqrt(self._squares / pooled.count)
            mean_drift = (pooled.mean - mean) / np.sqrt(variance)
            variance_drift = np.log((pooled.var + layer.eps) / variance)
            between = np.where(pooled.m2 > 0, 1.0 - self._within / pooled.m2, 0.0)
        nonfinite = ~(np.isfinite(pooled.mean) & np.isfinite(pooled.m2))
        between = np.where(nonfinite, np.nan, np.maximum(between, 0.0))
        constant = pooled.m2 == 0.0
        reasons = _reasons(
            *(mean_drift, variance_drift, between, start, constant, nonfinite),
            *(self._fewest, self._batches_together()),
        )
        return LayerReport(
            *(name, type(layer).__name__, self._batches, self._fewest, difference, mean_drift),
            *(variance_drift, between, start, constant, nonfinite, reasons),
        )


def _line(
    of_batch: Moments, eps: float, mean: Doubles, variance: Doubles
) -> tuple[Doubles, Doubles]:
    """Return the factor and the summand that make up for another mean and variance (with eps)."""
    deviation = np.sqrt(variance)
    return np.sqrt(of_batch.var + eps) / deviation, (of_batch.mean - mean) / deviation


def _remaining_start(one: Borrowed) -> float:
    """Return what the running statistics still weigh of what they began as."""
    layer: Averaging = one.layer
    batches = one.own("num_batches_tracked") or 0
    if layer._made_of_data:
        return 0.0
    if batches == 0:  # untouched, or brought from elsewhere
        first = first_statistics(layer).values()
        pairs = zip(first, one.statistics, strict=True)
        return float(all(np.array_equal(begun, now) for begun, now in pairs))
    momentum = layer.momentum
    if isinstance(momentum, LearnableMomentum):
        return 0.0  # the first batch weighs 1
    if isinstance(momentum, float):
        return float(np.clip(1.0 - momentum, 0.0, 1.0) ** batches)
    remaining = 1.0
    for number in range(1, batches + 1):
        remaining *= 1.0 - weight_of_new_batch(momentum, number)
        if remaining < NOTHING_OF_THE_START:
            return 0.0
    return remaining


def _reasons(
    mean_drift: Doubles,
    variance_drift: Doubles,
    between: Doubles,
    start: float,
    constant: NDArray[np.bool_],
    nonfinite: NDArray[np.bool_],
    fewest: int,
    together: int,
) -> tuple[str, ...]:
    """Return in words what is worth some."""
    channels, found = len(mean_drift), []
    if nonfinite.any():
        found.append(f"values that are not finite in {nonfinite.sum()} of {channels} channels")
    drifted = _beyond(mean_drift, DRIFTED_MEAN)
    if len(drifted):
        found.append(
            f"mean drifted in {len(drifted)} of {channels} channels, channel {drifted[0]} by "
            f"{abs(mean_drift[drifted[0]]):.1f} standard deviations"
        )
    drifted = _beyond(variance_drift, DRIFTED_VARIANCE)
    if len(drifted):
        found.append(
            f"variance drifted in {len(drifted)} of {channels} channels, channel {drifted[0]} to "
            f"{math.exp(variance_drift[drifted[0]]):.2g} times the running one"
        )
    if start > MUCH_OF_THE_START:
        found.append(
            f"too few batches in training: running statistics are {start:.0%} what they began as"
        )
    if fewest * together < FEW_VALUES:
        found.append(f"too few values: a batch had {fewest} per channel")
    elif len(_beyond(between / together, MUCH_BETWEEN_BATCHES)):
        found.append(
            f"batches are small or unlike each other: {np.nanmax(between):.0%} of the variance of "
            f"a channel lies between them"
        )
    if constant.any():
        found.append(f"all values equal in {constant.sum()} of {channels} channels")
    return tuple(found)


def _beyond(values: Doubles, limit: float) -> Sequence[int]:
    """Return the channels whose finite values are beyond a limit, the furthest first."""
    size = np.where(np.isfinite(values), np.abs(values), 0.0)
    order = np.argsort(-size, kind="stable")
    return [int(channel) for channel in order if size[channel] > limit]
