"""Any data: distributions to draw from, the calls that take them, and how far off results are.

A trial is what statistics are made of: a channel of a batch, a channel or group of a sample, a row.
Trials do not know of each other, so that one call judges hundreds: they come as an array
(trials, values), each in the order in which its values are walked.
"""

from __future__ import annotations

import base64
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

import bnfast
from tolerances import (
    FLOAT64_OF_ANY_DATA,
    GRADIENT_SUMS_OF_ANY_DATA,
    INPUT_GRADIENT_OF_ANY_DATA,
    LARGEST_EXPONENT,
    LARGEST_RATIO,
    OUTLIERS,
    OUTPUT_OF_ANY_DATA,
    PROMISED_OUTPUT_ERROR,
    STATISTICS_OF_ANY_DATA,
    eps_of,
)

# What is exact for each: the differences of float32 values are float64 numbers, or nearly.
WIDE = {np.dtype(np.float32): np.float64, np.dtype(np.float64): np.longdouble}

# So small that it adds nothing to a variance, and so takes nothing of an error.
NO_EPS = 1e-300

# What each is relative to stands in `judge`.
PROMISED = {
    "mean": STATISTICS_OF_ANY_DATA,
    "variance": STATISTICS_OF_ANY_DATA,
    "output": OUTPUT_OF_ANY_DATA,
    "output of normal values": (PROMISED_OUTPUT_ERROR, PROMISED_OUTPUT_ERROR),
    "dx": INPUT_GRADIENT_OF_ANY_DATA,
    "dweight": GRADIENT_SUMS_OF_ANY_DATA,
    "dbias": GRADIENT_SUMS_OF_ANY_DATA,
}


def promised(quantity: str, outliers: bool, dtype: Any) -> float:
    """The largest error allowed."""
    in_float32 = PROMISED[quantity][outliers]
    if np.dtype(dtype) == np.float32:
        return in_float32
    return FLOAT64_OF_ANY_DATA * in_float32 * eps_of(np.float64) / eps_of(np.float32)


# The calls


class Site(NamedTuple):
    """A shape of one operation.

    `trials` of `size` values, reshaped to `folded` and transposed to `order`, are the array of
    `shape`; `axis` has its channels. Without `centred`, statistics are around 0; without `alone`,
    the gradients of parameters are sums over several trials, and not judged.
    """

    member: str
    layout: str
    trials: int
    size: int
    folded: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    axis: int
    centred: bool = True
    alone: bool = True

    @property
    def columns(self) -> bool:
        """Whether trials are the columns whose sums are the gradients of parameters."""
        return self.member.endswith("columns")

    @property
    def name(self) -> str:
        return f"{self.member} {self.layout} {'x'.join(map(str, self.shape))}"

    def arrange(self, trials: np.ndarray) -> np.ndarray:
        turned = trials.reshape(self.folded).transpose(self.order)
        return np.ascontiguousarray(turned).reshape(self.shape)

    def collect(self, array: np.ndarray) -> np.ndarray:
        turned = array.reshape([self.folded[d] for d in self.order])
        return turned.transpose(np.argsort(self.order)).reshape(self.trials, self.size)

    def forward(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Statistics and output of each trial."""
        array, (mean, invstd, y) = self.arrange(x), (None, None, None)
        if self.member == "moments":
            moments = bnfast.moments(array, self.axis)
            return {"mean": moments.mean, "variance": moments.m2 / moments.count}
        if self.member == "batch":
            y, mean, invstd = bnfast.batch_norm_forward(array, eps=NO_EPS, axis=self.axis)
        elif self.member == "instance":
            y, mean, invstd = bnfast.instance_norm_forward(array, eps=NO_EPS, axis=self.axis)
        elif self.member == "group":
            groups = self.folded[1]
            y, mean, invstd = bnfast.group_norm_forward(array, groups, eps=NO_EPS, axis=self.axis)
        elif self.member == "layer":
            row = self.shape[self.axis]
            y, mean, invstd = bnfast.layer_norm_forward(array, row, eps=NO_EPS, axis=self.axis)
        elif self.member == "rms":
            row = self.shape[self.axis]
            y, invstd = bnfast.rms_norm_forward(array, row, eps=NO_EPS, axis=self.axis)
        else:
            y, invstd = bnfast.filter_response_norm_forward(array, eps=NO_EPS, axis=self.axis)
        with np.errstate(all="ignore"):
            found = {"variance": invstd.reshape(-1) ** -2.0, "output": self.collect(y)}
        return found if mean is None else {"mean": mean.reshape(-1), **found}

    def backward(
        self, dy: np.ndarray, x: np.ndarray, mean: np.ndarray, invstd: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The gradients of each trial, those of parameters in float64."""
        dy_array, array = self.arrange(dy), self.arrange(x)
        row = self.shape[self.axis]
        if self.columns:  # as if x were xhat, so that no row knows of another
            weight, zeros, ones = np.ones(row), np.zeros(self.size), np.ones(self.size)
            if self.member == "rms columns":
                found = bnfast.rms_norm_backward(dy_array, array, row, ones, weight)
                return {"dweight": found[1]}
            found = bnfast.layer_norm_backward(dy_array, array, row, zeros, ones, weight)
            return {"dweight": found[1], "dbias": found[2]}
        if self.member in ("layer", "rms"):
            kept = tuple(n for d, n in enumerate(self.shape) if d != self.axis % len(self.shape))
            of_rows = (mean.reshape(kept), invstd.reshape(kept))
            backward = bnfast.layer_norm_backward if self.centred else bnfast.rms_norm_backward
            of_rows = of_rows if self.centred else of_rows[1:]
            dx = backward(dy_array, array, row, *of_rows, axis=self.axis, parameters=False)[0]
            return {"dx": self.collect(dx)}
        weight, kept = np.ones(row), self.folded[:2]
        if self.member == "batch":
            found = bnfast.batch_norm_backward(
                dy_array, array, mean, invstd, weight, axis=self.axis
            )
        elif self.member == "instance":
            of_planes = (mean.reshape(kept), invstd.reshape(kept), weight)
            found = bnfast.instance_norm_backward(dy_array, array, *of_planes, axis=self.axis)
        elif self.member == "group":
            of_groups = (mean.reshape(kept), invstd.reshape(kept))
            found = bnfast.group_norm_backward(dy_array, array, *of_groups, axis=self.axis)
        else:
            found = bnfast.filter_response_norm_backward(
                dy_array, array, invstd.reshape(kept), weight, axis=self.axis
            )
        gradients = {"dx": self.collect(found[0])}
        return {**gradients, "dweight": found[1], "dbias": found[2]} if self.alone else gradients


def of_batch(member: str, outer: int, channels: int, inner: int) -> Site:
    """NCHW, of planes of `inner`."""
    return Site(
        *(member, "nchw", channels, outer * inner),
        *((channels, outer, inner), (1, 0, 2), (outer, channels, inner), 1),
    )


def of_table(member: str, rows: int, channels: int) -> Site:
    """NHWC, or NC."""
    return Site(
        *(member, "channels_last", channels, rows),
        *((channels, rows), (1, 0), (rows, channels), 1, not member.endswith("columns")),
    )


def of_samples(member: str, layout: str, samples: int, channels: int, plane: int) -> Site:
    last = layout == "channels_last"
    folded = (samples, channels, plane)
    order = (0, 2, 1) if last else (0, 1, 2)
    return Site(
        *(member, layout, samples * channels, plane, folded, order),
        *(tuple(folded[d] for d in order), -1 if last else 1),
        *(member != "filter response", samples == 1),
    )


def of_groups(layout: str, samples: int, groups: int, per_group: int, plane: int) -> Site:
    channels, last = groups * per_group, layout == "channels_last"
    return Site(
        *("group", layout, samples * groups, per_group * plane),
        *((samples, groups, per_group, plane), (0, 3, 1, 2) if last else (0, 1, 2, 3)),
        *((samples, plane, channels) if last else (samples, channels, plane), -1 if last else 1),
        *(True, False),
    )


def of_rows(member: str, rows: int, size: int) -> Site:
    return Site(
        *(member, "rows", rows, size, (rows, size), (0, 1), (rows, size), -1),
        *(member == "layer", False),
    )


def of_pixels(member: str, samples: int, channels: int, plane: int) -> Site:
    """The channels of NCHW data are normalized, at each pixel."""
    return Site(
        *(member, "nchw", samples * plane, channels),
        *((samples, plane, channels), (0, 2, 1), (samples, channels, plane), 1),
        *(member == "layer", False),
    )


# Around lanes (64), what a lane takes before it is emptied (1024), chunks (4096 values, 256 or 512
# rows), and blocks (131,072 values, or 640 rows and more).
def sites() -> Iterator[Site]:
    for rows, channels in (
        *(
            (128, 64),
            (128, 256),
            (8, 256),
            (9, 64),
            (10, 64),
            (11, 64),
            (12, 512),
            (13, 64),
            (15, 64),
            (32, 128),
            (17, 64),
            (37, 130),
            (49, 512),
            (64, 4096),
            (256, 64),
        ),
        *((300, 100), (1000, 64), (1024, 16), (600, 3), (5000, 3), (2000, 1), (2304, 256)),
        *((900, 1024), (140000, 4)),
    ):
        yield of_table("batch", rows, channels)
        yield of_table("moments", rows, channels)
    for outer, channels, inner in (
        *((1, 256, 1024), (1, 256, 64), (2, 256, 49), (16, 256, 49), (12, 64, 128), (32, 256, 4)),
        *((3, 256, 7), (1, 64, 4096), (1, 32, 8200), (4, 64, 784), (2, 64, 3136), (1, 256, 100)),
        *((130, 64, 49), (1, 1, 1500), (1, 2, 140000)),
    ):
        yield of_batch("batch", outer, channels, inner)
    for channels, plane in ((64, 49), (64, 64), (64, 196), (32, 1024), (16, 3136), (64, 4)):
        for member in ("instance", "filter response"):
            for samples in (1, 8):
                yield of_samples(member, "nchw", samples, channels, plane)
                yield of_samples(member, "channels_last", samples, channels, plane)
    for member in ("instance", "filter response"):
        yield of_samples(member, "channels_last", 8, 3, 1024)
    for layout in ("nchw", "channels_last"):
        for samples, groups, per_group, plane in (
            *((16, 8, 2, 49), (8, 16, 4, 256), (32, 8, 8, 1), (4, 8, 16, 196), (2, 2, 32, 784)),
        ):
            yield of_groups(layout, samples, groups, per_group, plane)
    for member in ("layer", "rms"):
        for size in (8, 17, 48, 64, 100, 192, 256, 768, 1000, 1024, 1280, 4096, 8192):
            yield of_rows(member, max(8, 65536 // size), size)
        for channels in (32, 96, 384):
            yield of_pixels(member, 2, channels, 196)
        for rows, columns in ((32, 256), (64, 768), (200, 64), (1000, 100), (4096, 17)):
            yield of_table(f"{member} columns", rows, columns)


# What is exact


class Exact(NamedTuple):
    """Deviations from the mean (or from 0) of each trial, and what follows from them, all wide."""

    deviation: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    outliers: np.ndarray
    usable: np.ndarray


def has_outliers(terms: np.ndarray) -> np.ndarray:
    """Whether a few terms of each sum, none negative, are most of it.

    n * sum(t**2) / sum(t)**2 is 1 for equal terms, 3 for the squares of normal deviates, and 1 / p
    where a share p of the terms is all of the sum.
    """
    total = terms.sum(1)
    squares = np.einsum("ij,ij->i", terms, terms)
    with np.errstate(all="ignore"):
        return terms.shape[1] * squares > OUTLIERS * total**2


def exact(x: np.ndarray, centred: bool = True) -> Exact:
    """Two passes around the first value, in a type so wide that its rounding does not count."""
    wide = WIDE[x.dtype]
    first = x[:, :1].astype(wide) if centred else np.zeros((len(x), 1), wide)
    deviation = x - first
    offset = np.zeros_like(first)
    for _ in range(2 if centred else 0):  # the second takes what rounding left in the first
        more = deviation.mean(1, keepdims=True)
        offset += more
        deviation -= more
    squares = deviation**2
    variance = squares.mean(1)
    mean = (first + offset)[:, 0]
    std = np.sqrt(variance)
    usable = moderate(std, x.dtype) & (np.abs(mean) <= LARGEST_RATIO[x.dtype] * std)
    return Exact(deviation, mean, variance, has_outliers(squares), usable)


def moderate(sizes: np.ndarray, dtype: np.dtype) -> np.ndarray:
    largest = 2.0 ** LARGEST_EXPONENT[dtype]
    return (sizes >= 1 / largest) & (sizes <= largest)


class Errors(NamedTuple):
    """Of each trial, NaN where it is not judged; and whether its sums have outliers."""

    error: np.ndarray
    outliers: np.ndarray

    def of_promised(self, quantity: str, dtype: Any) -> np.ndarray:
        """Above 1 where the promise is broken."""
        allowed = [promised(quantity, outliers, dtype) for outliers in (False, True)]
        return self.error / np.where(self.outliers, allowed[1], allowed[0])


def saved_statistics(true: Exact) -> tuple[np.ndarray, np.ndarray]:
    """Mean and invstd as a forward pass without error would save them."""
    with np.errstate(all="ignore"):
        invstd = np.where(true.usable, 1 / np.sqrt(true.variance), 1)
    return true.mean.astype(np.float64), invstd.astype(np.float64)


def run(site: Site, x: np.ndarray, dy: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What bnfast makes of the trials, in as many calls as they need."""
    operands = (x,) if dy is None else (dy, x, *saved_statistics(exact(x, site.centred)))
    call = site.forward if dy is None else site.backward
    starts = range(0, len(x), site.trials)
    parts = [call(*(values[at : at + site.trials] for values in operands)) for at in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def judge(
    site: Site, x: np.ndarray, dy: np.ndarray | None = None, normal: bool = False
) -> dict[str, Errors]:
    """How far off the results of each trial are, in its own natural size.

    mean: of the standard deviation, besides its own rounding; variance: of itself; output: absolute
    up to |y| = 2 (with outliers 1), and as much of |y| from there on, whose ulps grow too;
    where values are `normal`, absolute.
    dbias: of sum(|dy|); dweight: of sum(|dy * xhat|) where the mean is held by float64, else (of
    float64 data with a large mean, itself found again to a rounding of the standard deviation) of
    sum(|dy| * (1 + |xhat|)); dx, element by element: of the terms that it is the sum of,
    (|dy| + mean|dy| + |xhat| mean|dy * xhat|) * invstd. Sizes near the smallest numbers, such as
    those of products of which one factor is always 0, count as larger: see `fewest_bits`.

    What is usable and has made NaN is infinitely far off.
    """
    true, found = exact(x, site.centred), run(site, x, dy)
    with np.errstate(all="ignore"):
        if dy is None:
            errors = _forward_errors(true, found)
        else:
            errors = _backward_errors(site, true, found, x, dy)
    usable = true.usable if dy is None else true.usable & moderate(np.abs(dy).mean(1), dy.dtype)
    return {
        name: Errors(_of_usable(usable, error), outliers)
        for name, (error, outliers) in errors.items()
        if normal == (name == "output of normal values")
    }


def _of_usable(usable: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Errors that no comparison passes over."""
    known = np.where(np.isnan(error), np.inf, error)
    return np.where(usable, known, np.nan).astype(np.float64)


def _forward_errors(true: Exact, found: dict[str, np.ndarray]) -> dict[str, Any]:
    errors: dict[str, Any] = {}
    std = np.sqrt(true.variance)
    if "mean" in found:
        rounding = np.spacing(np.abs(true.mean).astype(np.float64)) / 2
        off = np.maximum(np.abs(found["mean"] - true.mean) - rounding, 0)
        errors["mean"] = off / std, true.outliers
    variance = found["variance"].astype(true.variance.dtype)
    errors["variance"] = np.abs(variance - true.variance) / true.variance, true.outliers
    if "output" in found:
        y = true.deviation / std[:, None]
        off = np.abs(found["output"] - y)
        small = np.where(true.outliers, 1, 2)[:, None]
        errors["output"] = (off / np.maximum(1, np.abs(y) / small)).max(1), true.outliers
        errors["output of normal values"] = off.max(1), np.zeros(len(y), bool)
    return errors


LARGE_MEAN = 4  # standard deviations, as the notes of batch_norm_backward say


def fewest_bits(dtype: np.dtype, factor: np.ndarray) -> np.ndarray:
    """The least size of a gradient that products and results can have all bits of.

    `factor` is what these are multiplied by to become the gradient.
    """
    return float(np.finfo(dtype).tiny) * 2.0**10 * np.maximum(1, factor)


def _backward_errors(
    site: Site, true: Exact, found: dict[str, np.ndarray], x: np.ndarray, dy: np.ndarray
) -> dict[str, Any]:
    errors: dict[str, Any] = {}
    upstream = dy.astype(true.deviation.dtype)
    mean, invstd = saved_statistics(true)
    xhat = x.astype(upstream.dtype)
    if site.centred:
        xhat -= mean[:, None]
    large = np.full(len(x), site.centred and x.dtype == np.float64)
    large &= np.abs(mean * invstd) > LARGE_MEAN
    xhat[large] = true.deviation[large]  # what rounding left of large means is found again
    if not site.columns:
        xhat = xhat * invstd[:, None]
    products = upstream * xhat
    terms, weights = np.abs(upstream), np.abs(products)
    few_terms, few_weights = has_outliers(terms), has_outliers(weights)
    least = fewest_bits(x.dtype, invstd)
    if "dbias" in found:
        errors["dbias"] = np.abs(found["dbias"] - upstream.sum(1)) / terms.sum(1), few_terms
    if "dweight" in found:
        off = np.abs(found["dweight"] - products.sum(1))
        size = weights.sum(1) + np.where(large, terms.sum(1), 0)
        errors["dweight"] = off / np.maximum(size, least), few_weights
    if "dx" in found:
        slope, steep = products.mean(1, keepdims=True), weights.mean(1, keepdims=True)
        dx, size = upstream - xhat * slope, terms + np.abs(xhat) * steep
        if site.centred:
            dx, size = dx - upstream.mean(1, keepdims=True), size + terms.mean(1, keepdims=True)
        off = np.abs(found["dx"] / invstd[:, None] - dx)
        size = np.maximum(size, fewest_bits(x.dtype, 1 / invstd)[:, None])
        errors["dx"] = (off / size).max(1), few_terms | few_weights
    return errors


# Distributions: each makes the values of one trial.


def pick(rng: np.random.Generator, from_these: Sequence[Any]) -> Any:
    """As rng.choice, in a fifth of the time."""
    return from_these[rng.integers(len(from_these))]


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def length(rng: np.random.Generator, most: int) -> int:
    return int(log_uniform(rng, 1, most + 1))


def coins(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.random(size) < log_uniform(rng, 0.5 / size, 0.5)


def blocks(rng: np.random.Generator, size: int) -> np.ndarray:
    """Runs of equal values, as long as each other or not."""
    longest = length(rng, 256)
    lengths = rng.integers(1, longest + 1, size)
    if rng.random() < 0.5:
        lengths[:] = longest
    ends = np.cumsum(lengths[: np.searchsorted(np.cumsum(lengths), size) + 1])
    return np.searchsorted(ends, np.arange(size), side="right") % 2 == 1


def periodic(rng: np.random.Generator, size: int) -> np.ndarray:
    """One different value in each period, or a few."""
    period = length(rng, min(size, 256))
    pattern = np.zeros(period, bool)
    pattern[rng.integers(0, period, 1 if rng.random() < 0.7 else length(rng, period))] = True
    return np.resize(pattern, size)


def first_ones(rng: np.random.Generator, size: int) -> np.ndarray:
    """The first values, from which shifts are taken, are not like the others."""
    pattern = PATTERNS[rng.integers(len(PATTERNS) - 1)](rng, size)
    few = length(rng, min(size, 300))
    pattern[:few] = coins(rng, few) if rng.random() < 0.5 else rng.random() < 0.5
    if rng.random() < 0.5:
        pattern[few:] = not pattern[0]
    return pattern


PATTERNS: tuple[Callable[..., np.ndarray], ...] = (coins, blocks, periodic, first_ones)

# Values that lie so far apart are the next additions of one lane: of runs, quarters of them, rows
# of few channels.
STRIDES = (1, 1, 1, 2, 4, 8, 16, 22, 32, 64, 64, 128, 1024)


def pattern(rng: np.random.Generator, size: int) -> np.ndarray:
    stride = int(pick(rng, STRIDES))
    if stride >= size:
        stride = 1
    short = pick(rng, PATTERNS)(rng, -(-size // stride))
    return np.repeat(short, stride)[:size]


def palette(rng: np.random.Generator, count: int) -> np.ndarray:
    """A few values: around 0 or not, near each other or not."""
    kind = rng.integers(6)
    if kind == 0:
        values = rng.uniform(1, 2, count) * (np.arange(count) != rng.integers(2))
    elif kind == 1:
        values = rng.uniform(1, 2, count)
    elif kind == 2:
        values = rng.normal(0, 1, count)
    elif kind == 3:
        values = rng.uniform(1, 2, count) + 10 ** rng.uniform(0, 6) * pick(rng, (-1, 1))
    elif kind == 4:
        values = rng.uniform(1, 2, count) * 10 ** rng.uniform(-8, 0, count)
    else:
        values = rng.integers(0, 256, count).astype(np.float64)
    return values if rng.random() < 0.9 else values * 2.0 ** rng.integers(-40, 41)


def two_valued(rng: np.random.Generator, size: int) -> np.ndarray:
    return palette(rng, 2)[pattern(rng, size).astype(int)]


def few_valued(rng: np.random.Generator, size: int) -> np.ndarray:
    codes = pattern(rng, size) + 2 * pattern(rng, size).astype(int)
    return palette(rng, 4)[codes]


def normal(rng: np.random.Generator, size: Any) -> np.ndarray:
    return rng.normal(pick(rng, (0, 1)) * 10 ** rng.uniform(0, 7), 1, size)


def lognormal(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.lognormal(0, rng.uniform(0.5, 3), size)


def uniform(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.uniform(pick(rng, (0, -1, 0.99)), 1, size)


def quantised(rng: np.random.Generator, size: int) -> np.ndarray:
    steps = pick(rng, (2, 3, 16, 256))
    values = rng.integers(0, steps, size) / pick(rng, (1, 255))
    return values + pick(rng, (0, 0, 1e4))


def ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linspace(*rng.normal(0, 1, 2), size) ** int(pick(rng, (1, 1, 2, 3)))


def sorted_values(rng: np.random.Generator, size: int) -> np.ndarray:
    values = np.sort(CONTINUOUS[rng.integers(4)](rng, size))
    return values[:: pick(rng, (-1, 1))]


def drifting(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.normal(0, 1, size) + 10 ** rng.uniform(0, 4) * ramp(rng, size)


def one_outlier(rng: np.random.Generator, size: int) -> np.ndarray:
    values = pick(rng, (normal, two_valued, np.random.Generator.standard_normal))(rng, size)
    at = pick(rng, (0, size - 1, int(rng.integers(size))))
    values[at] += 10 ** rng.uniform(0.5, 7) * (np.abs(values - values[0]).max() or 1)
    return values


def clipped(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.maximum(rng.normal(rng.uniform(-2, 1), 1, size), 0)


CONTINUOUS: tuple[Callable[..., np.ndarray], ...] = (
    *(normal, lognormal, uniform, quantised, ramp, sorted_values, drifting, one_outlier, clipped),
)


def draw(rng: np.random.Generator, size: int) -> np.ndarray:
    """The values of one trial, in float64."""
    if rng.random() < 0.7:
        return (two_valued if rng.random() < 0.7 else few_valued)(rng, size)
    return pick(rng, CONTINUOUS)(rng, size)


def draw_upstream(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """A dy for these values: as they lie, or on its own."""
    kind = rng.integers(4)
    if kind == 0:
        return np.where(x == x[0], *palette(rng, 2))
    if kind == 1:
        return rng.uniform(1, 2) * x
    if kind == 2:
        return np.full(x.shape, rng.uniform(1, 2))
    return draw(rng, len(x))


# How a trial is written down: an expression of NumPy, to be evaluated with `np`, `zlib`, `base64`.


def _of_values(values: np.ndarray) -> str:
    listed = ", ".join(str(value) for value in values.tolist())
    if values.dtype == np.float32:
        listed = ", ".join(str(value) for value in values)
    return f"np.{values.dtype.name}([{listed}])"


def _of_blocks(x: np.ndarray) -> str | None:
    begins = np.flatnonzero(np.concatenate([[True], x[1:] != x[:-1]]))
    lengths = np.diff(np.append(begins, len(x)))
    if len(begins) > 32:
        return None
    if (lengths == 1).all():
        return _of_values(x)
    return f"np.repeat({_of_values(x[begins])}, {lengths.tolist()})"


def expression(x: np.ndarray) -> str:
    """The shortest of some ways to write x."""
    whole = _of_blocks(x)
    if whole is not None:
        return whole
    for period in range(2, min(1024, len(x) // 2) + 1):
        if (x[period:] == x[:-period]).all():
            part = _of_blocks(x[:period])
            if part is not None:
                return f"np.resize({part}, {len(x)})"
            break
    packed = base64.b64encode(zlib.compress(x.tobytes(), 9)).decode()
    return f"np.frombuffer(zlib.decompress(base64.b64decode('{packed}')), np.{x.dtype.name})"


def evaluated(text: str) -> np.ndarray:
    return np.asarray(eval(text, {"np": np, "zlib": zlib, "base64": base64}))


@functools.cache
def all_sites() -> dict[str, Site]:
    return {site.name: site for site in sites()}
