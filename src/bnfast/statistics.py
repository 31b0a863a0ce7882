"""Statistics as values: `Moments` and `Summary`, mergeable."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._scalars import describe
from bnfast._typing import Array

if TYPE_CHECKING:
    from typing_extensions import Self

# What users see: an array, or a number where there is only one, which type checkers let be.
Statistic = NDArray[np.float64] | Any
Count = int | NDArray[np.int64]  # an array only where channels differ
Sums = tuple[Array, Array]  # of integers and of their squares: float64, or Python's integers

MOST_VALUES = 2**62
_LARGEST_EXACT = 2.0**53  # float64 holds every integer up to this one


def _as_value(array: Array) -> Any:
    """Return what users see of a statistic: an array, or a number where there is only one."""
    return array[()]


def _simplified(count: Count) -> Count:
    """Return one number for channels that all have as many values."""
    if isinstance(count, int):
        return count
    first = int(count.flat[0]) if count.size else 0
    return first if count.size == 0 or bool((count == first).all()) else count


def _is_empty(count: Count) -> bool:
    return count == 0 if isinstance(count, int) else not count.any()


def _total(first: Count, second: Count) -> Count:
    """Return how many values both have, refusing what int64 cannot hold."""
    largest = int(np.max(first, initial=0)) + int(np.max(second, initial=0))
    if largest > MOST_VALUES:
        raise ValueError(f"count must be at most 2**62 in all, got {largest}")
    return first + second


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return the rounded sum, and what rounding left of it (D. Knuth)."""
    rounded = a + b
    b_part = rounded - a
    return rounded, (a - (rounded - b_part)) + (b - b_part)


class Moments:
    """Count, mean and sum of squared deviations of every channel: an immutable value.

    What `moments` returns; `merge`, ``+`` and ``sum`` join those of the parts of a data set.

    Parameters
    ----------
    count : int, or array of integers
        Values in each channel, at most 2**62; an array of the shape of `mean` where channels
        differ in it.
    mean : array of float64
        Their mean: of shape (C,), or another one.
    m2 : array of float64
        The sum of their squared deviations from it, of the shape of `mean`.

    Raises
    ------
    TypeError, ValueError
        For arrays of another type or shape, counts that are negative or too large.

    Notes
    -----
    Of integers of at most 16 bits `moments` keeps the exact sums as well, and so do all Moments
    that are merged of such: their mean and m2 do not depend on how the data was split.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> parts = np.array_split(np.arange(12.0).reshape(6, 2), 3)
    >>> whole = sum(bnfast.moments(part) for part in parts)
    >>> whole
    Moments(count=6, mean=array([5., 6.]), m2=array([70., 70.]))
    >>> whole.variance(correction=1)
    array([14., 14.])
    """

    __slots__ = ("_count", "_low", "_m2", "_mean", "_sums")
    __hash__ = None  # type: ignore[assignment]  # values, as arrays are

    _count: Count
    _mean: Array
    _low: Array  # what rounding left of the mean
    _m2: Array
    _sums: Sums | None

    def __init__(self, count: ArrayLike, mean: ArrayLike, m2: ArrayLike) -> None:
        means, m2s = _validation.statistics("mean", mean), _validation.statistics("m2", m2)
        if m2s.shape != means.shape:
            raise ValueError(f"m2 must have the shape of mean, {means.shape}, got {m2s.shape}")
        self._set(_validation.counts("count", count, means.shape, MOST_VALUES), means, None, m2s)

    def _set(
        self,
        count: Count,
        mean: Array | None,
        low: Array | None,
        m2: Array | None,
        sums: Sums | None = None,
    ) -> None:
        if mean is None or m2 is None:
            mean, m2 = _primitives.moments_of_sums(count, *sums or ())
        count = _simplified(count)
        low = np.zeros_like(mean) if low is None else low
        if not isinstance(count, int):
            count.flags.writeable = False
        mean.flags.writeable = low.flags.writeable = m2.flags.writeable = False
        self._count, self._mean, self._low, self._m2, self._sums = count, mean, low, m2, sums

    @classmethod
    def _of(cls, *statistics: Any) -> Self:
        """Return a value of new arrays, which nobody else has: see `_set`."""
        value = cls.__new__(cls)
        value._set(*statistics)
        return value

    @property
    def count(self) -> Count:
        """How many values each channel has: an int, or an array where channels differ."""
        return self._count

    @property
    def mean(self) -> Statistic:
        """The mean of each channel, float64; 0 where there are no values."""
        return _as_value(self._mean)

    @property
    def m2(self) -> Statistic:
        """The sum of squared deviations from the mean, float64."""
        return _as_value(self._m2)

    @property
    @in_default_float_mode
    def var(self) -> Statistic:
        """The biased variance, m2 / count; 0 where there are no values."""
        return self.variance()

    @property
    @in_default_float_mode
    def std(self) -> Statistic:
        """The square root of `var`."""
        return np.sqrt(self.variance())

    @in_default_float_mode
    def variance(self, correction: float = 0) -> Statistic:
        """Return m2 / (count - correction): with 1 the unbiased variance.

        Parameters
        ----------
        correction : float
            What is subtracted from the count.

        Returns
        -------
        array of float64
            NaN where that leaves nothing to divide by; 0 where there are no values and the
            correction is 0.

        Raises
        ------
        TypeError, ValueError
            If the correction is no finite number.
        """
        number = _validation.real("correction", correction)
        divisor = np.maximum(self._count, 1) if number == 0 else np.asarray(self._count - number)
        with np.errstate(all="ignore"):
            return _as_value(np.where(divisor > 0, self._m2 / divisor, np.nan))

    @in_default_float_mode
    def merge(self, other: Moments) -> Moments:
        """Return the moments of both parts together.

        Parameters
        ----------
        other : Moments
            Of as many channels.

        Returns
        -------
        Moments
            Exact up to float64 rounding, in any order (of integers of at most 16 bits, exact);
            empty moments change nothing.

        Raises
        ------
        TypeError, ValueError
            If `other` is something else, the numbers of channels differ, or there are more than
            2**62 values.

        Notes
        -----
        With n = n_a + n_b and d = mean_b - mean_a::

            mean = mean_a + d * n_b / n
            m2   = m2_a + m2_b + d**2 * n_a * n_b / n

        References
        ----------
        T. Chan, G. Golub, R. LeVeque, 1979, Stanford STAN-CS-79-773.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> x = np.arange(12.0).reshape(6, 2)
        >>> whole = bnfast.moments(x[:2]).merge(bnfast.moments(x[2:]))
        >>> np.allclose(whole.var, x.var(axis=0))
        True
        """
        self._check_mergeable(other)
        if _is_empty(other._count):
            return self
        if _is_empty(self._count):
            return other
        return Moments._of(*self._merged(other))

    def _check_mergeable(self, other: object) -> None:
        if not isinstance(other, Moments):
            raise TypeError(f"other must be Moments, got {type(other).__name__}")
        if other._mean.shape != self._mean.shape:
            ours, theirs = self._mean.shape, other._mean.shape
            if len(ours) == len(theirs) == 1:
                raise ValueError(f"other must have {ours[0]} channels, got {theirs[0]}")
            raise ValueError(f"other must be of shape {ours}, got {theirs}")

    def _merged(self, other: Moments) -> tuple[Any, ...]:
        """Return what `_set` takes, of two that are not empty."""
        count = _total(self._count, other._count)
        if self._sums is not None and other._sums is not None:
            return count, None, None, None, _added(self._sums, other._sums)
        with np.errstate(all="ignore"):
            share = other._count / np.maximum(count, 1)
            difference = (other._mean - self._mean) + (other._low - self._low)
            mean, low = _two_sum(self._mean, self._low + difference * share)
            m2 = self._m2 + other._m2 + difference**2 * (self._count * share)
            # An infinite mean stays infinite: inf - inf would make it NaN.
            finite = np.isfinite(difference)
            mean = np.where(finite, mean, self._mean + other._mean)
            low = np.where(finite, low, 0.0)
        if not isinstance(count, int):  # channels that one of both has no value of
            for channels, part in ((self._count == 0, other), (other._count == 0, self)):
                mean = np.where(channels, part._mean, mean)
                low = np.where(channels, part._low, low)
                m2 = np.where(channels, part._m2, m2)
        return count, np.asarray(mean), np.asarray(low), np.asarray(m2)

    def __add__(self, other: object) -> Moments:
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def __radd__(self, other: object) -> Moments:
        """``sum`` begins with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def _visible(self) -> dict[str, Any]:
        """Return what makes up the value."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(
            np.array_equal(ours, theirs, equal_nan=True)
            for ours, theirs in zip(
                self._visible().values(), other._visible().values(), strict=True
            )
        )

    def __repr__(self) -> str:
        visible = ", ".join(f"{name}={value!r}" for name, value in self._visible().items())
        return f"{type(self).__name__}({visible})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_bytes, (self.to_bytes(),)

    def _saved(self) -> dict[str, Array]:
        """Return the arrays of an .npz file."""
        arrays = {"count": np.asarray(self._count), "mean": self._mean, "m2": self._m2}
        if self._sums is None:
            return {**arrays, "mean_low": self._low}
        as_text = np.vectorize(lambda number: str(int(number)), otypes=[str])
        sums, squares = (as_text(s) if s.size else np.zeros(s.shape, str) for s in self._sums)
        return {**arrays, "sum": sums, "sum_of_squares": squares}

    @classmethod
    def _loaded(cls, arrays: dict[str, Array]) -> Self:
        checked = Moments(arrays["count"], arrays["mean"], arrays["m2"])
        return cls._of(*checked._with_rest(arrays))

    def _with_rest(self, arrays: dict[str, Array]) -> tuple[Any, ...]:
        """Return what `_set` takes, with what a file has besides count, mean and m2."""
        shape = self._mean.shape
        if "sum" not in arrays:
            low = _validation.statistics("mean_low", arrays["mean_low"], shape)
            return self._count, self._mean, low, self._m2
        sums, squares = (_integers(name, arrays[name], shape) for name in ("sum", "sum_of_squares"))
        return self._count, None, None, None, _narrowed((sums, squares))

    def to_bytes(self) -> bytes:
        """Return the value as bytes, those of an .npz file, for `from_bytes`."""
        file = io.BytesIO()
        arrays: dict[str, Any] = {type(self).__name__: np.array(_FORMAT), **self._saved()}
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    @in_default_float_mode
    def from_bytes(cls, data: bytes) -> Self:
        """Return the value that `to_bytes` made bytes of.

        Parameters
        ----------
        data : bytes
            As `to_bytes` returns, or the contents of a file as `save` writes.

        Returns
        -------
        Moments or Summary
            Equal to what was saved.

        Raises
        ------
        TypeError, ValueError
            For what is no bytes; for bytes that are truncated, or hold something else.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data must be bytes, got {type(data).__name__}")
        expected = f"data must be of saved {cls.__name__}"
        try:
            with np.lib.npyio.NpzFile(io.BytesIO(data)) as file:
                arrays = {name: np.asarray(file[name]) for name in file.files}
        except _UNREADABLE as error:
            raise ValueError(f"{expected}, got {len(data)} bytes of something else") from error
        if cls.__name__ not in arrays:
            raise ValueError(
                f"{expected}, got a file with {', '.join(sorted(arrays)) or 'nothing'}"
            )
        saved_as = arrays[cls.__name__].tolist()
        if saved_as != _FORMAT:
            raise ValueError(f"{expected} of format {_FORMAT}, got {saved_as}")
        try:
            return cls._loaded(arrays)
        except KeyError as error:
            raise ValueError(f"{expected}, got a file without {error.args[0]}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{expected}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an .npz file, which `load` reads, and NumPy's `load` as well.

        Parameters
        ----------
        path : str or path
            The file, which is written anew.
        """
        with open(path, "wb") as file:
            file.write(self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return what `save` wrote.

        Parameters
        ----------
        path : str or path
            The file.

        Returns
        -------
        Moments or Summary
            Equal to what was saved.

        Raises
        ------
        ValueError, OSError
            For a file that is truncated, or holds something else; that cannot be read.
        """
        with open(path, "rb") as file:
            data = file.read()
        try:
            return cls.from_bytes(data)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


_FORMAT = 1
_UNREADABLE = (  # what bytes that are no .npz file, or a damaged one, raise
    *(ValueError, OSError, EOFError, KeyError),
    *(zipfile.BadZipFile, zlib.error, RuntimeError),
)


def _integers(name: str, text: Array, shape: tuple[int, ...]) -> Array:
    """Return the exact sums that were saved as text, as Python's integers."""
    if text.dtype.kind != "U" or text.shape != shape:
        raise ValueError(
            f"{name} must be the text of integers, of shape {shape}, got {describe(text)}"
        )
    # Of a single value NumPy would make an integer of its own.
    return np.asarray(np.frompyfunc(int, 1, 1)(text), object)


def _added(first: Sums, second: Sums) -> Sums:
    """Add exact sums, in Python's integers while float64 might not be exact."""
    if any(
        sums.dtype == object or (sums.size and np.abs(sums).max() >= _LARGEST_EXACT / 2)
        for sums in (*first, *second)
    ):
        as_int = np.frompyfunc(int, 1, 1)
        totals, squares = (
            np.asarray(as_int(a) + as_int(b), object) for a, b in zip(first, second, strict=True)
        )
        return _narrowed((totals, squares))
    # NumPy makes a number of a single value.
    return np.asarray(first[0] + second[0]), np.asarray(first[1] + second[1])


def _narrowed(sums: Sums) -> Sums:
    """Return the same as float64, where that holds them."""
    if any(s.size and max(abs(v) for v in s.flat) > _LARGEST_EXACT for s in sums):
        return sums
    return np.asarray(sums[0], np.float64), np.asarray(sums[1], np.float64)


class Summary(Moments):
    """`Moments`, and the extremes of every channel, and how many values are not finite.

    What `summary` returns; merged as `Moments` are.

    Parameters
    ----------
    count, mean, m2
        As of `Moments`.
    minimum, maximum : array of float64
        The least and the greatest value that is not NaN, of the shape of `mean`; NaN where there
        is none.
    nonfinite : array of integers
        How many values are NaN or infinite, of the shape of `mean`.

    Raises
    ------
    TypeError, ValueError
        As of `Moments`.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> bnfast.summary(np.array([[1.0, 10.0], [3.0, np.inf]])).maximum
    array([ 3., inf])
    """

    __slots__ = ("_maximum", "_minimum", "_nonfinite")

    _minimum: Array
    _maximum: Array
    _nonfinite: Array

    def __init__(
        self,
        count: ArrayLike,
        mean: ArrayLike,
        m2: ArrayLike,
        minimum: ArrayLike,
        maximum: ArrayLike,
        nonfinite: ArrayLike,
    ) -> None:
        super().__init__(count, mean, m2)
        shape = self._mean.shape
        extremes = (
            _validation.statistics("minimum", minimum, shape),
            _validation.statistics("maximum", maximum, shape),
        )
        numbers = _validation.counts("nonfinite", nonfinite, shape, MOST_VALUES)
        self._set_extremes(*extremes, np.array(np.broadcast_to(numbers, shape)))

    def _set_extremes(self, minimum: Array, maximum: Array, nonfinite: Array) -> None:
        for array in (minimum, maximum, nonfinite):
            array.flags.writeable = False
        self._minimum, self._maximum, self._nonfinite = minimum, maximum, nonfinite

    @classmethod
    def _of(cls, *statistics: Any) -> Self:
        *moments, minimum, maximum, nonfinite = statistics
        value = super()._of(*moments)
        value._set_extremes(minimum, maximum, nonfinite)
        return value

    @property
    def minimum(self) -> Statistic:
        """The least value of each channel that is not NaN, float64; NaN where there is none."""
        return _as_value(self._minimum)

    @property
    def maximum(self) -> Statistic:
        """The greatest value of each channel that is not NaN; NaN where there is none."""
        return _as_value(self._maximum)

    @property
    def nonfinite(self) -> NDArray[np.int64] | Any:
        """How many values of each channel are NaN or infinite, int64."""
        return _as_value(self._nonfinite)

    @in_default_float_mode
    def merge(self, other: Moments) -> Summary:
        """Return the summary of both parts together.

        Parameters
        ----------
        other : Summary
            Of as many channels.

        Returns
        -------
        Summary
            As `Moments.merge`; the extremes and the numbers of values are exact.

        Raises
        ------
        TypeError, ValueError
            If `other` is something else, the numbers of channels differ, or there are more than
            2**62 values.
        """
        if not isinstance(other, Summary):
            raise TypeError(f"other must be a Summary, got {type(other).__name__}")
        self._check_mergeable(other)
        if _is_empty(other._count) and not other._nonfinite.any():
            return self
        if _is_empty(self._count) and not self._nonfinite.any():
            return other
        merged = self._merged(other)
        return Summary._of(
            *merged,
            *(None,) * (5 - len(merged)),
            np.asarray(np.fmin(self._minimum, other._minimum)),
            np.asarray(np.fmax(self._maximum, other._maximum)),
            np.asarray(self._nonfinite + other._nonfinite),
        )

    def _visible(self) -> dict[str, Any]:
        return {
            **super()._visible(),
            "minimum": self.minimum,
            "maximum": self.maximum,
            "nonfinite": self.nonfinite,
        }

    def _saved(self) -> dict[str, Array]:
        return {
            **super()._saved(),
            "minimum": self._minimum,
            "maximum": self._maximum,
            "nonfinite": self._nonfinite,
        }

    @classmethod
    def _loaded(cls, arrays: dict[str, Array]) -> Self:
        names = ("count", "mean", "m2", "minimum", "maximum", "nonfinite")
        checked = Summary(*(arrays[name] for name in names))
        rest = checked._with_rest(arrays)
        rest += (None,) * (5 - len(rest))
        return cls._of(*rest, checked._minimum, checked._maximum, checked._nonfinite)
