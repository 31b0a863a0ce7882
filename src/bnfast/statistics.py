"""Statistics as values: `Moments`, mergeable; and the policies of running statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bnfast._float_mode import in_default_float_mode


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of every channel.

    Parameters
    ----------
    count : int
        Values in each channel.
    mean : array (C,) of float64
        Their mean.
    m2 : array (C,) of float64
        The sum of their squared deviations from it.
    """

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]

    @property
    @in_default_float_mode
    def var(self) -> NDArray[np.float64]:
        """The biased variance, m2 / count; 0 where there are no values."""
        return self.m2 / max(self.count, 1)

    @property
    @in_default_float_mode
    def std(self) -> NDArray[np.float64]:
        """The square root of `var`."""
        return np.sqrt(self.var)

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
            Exact up to float64 rounding, in any order; empty moments change nothing.

        Raises
        ------
        TypeError, ValueError
            If `other` is something else, or the numbers of channels differ.

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
        if not isinstance(other, Moments):
            raise TypeError(f"other must be Moments, got {type(other).__name__}")
        if self.mean.shape != other.mean.shape:
            raise ValueError(
                f"other must have {self.mean.shape[0]} channels, got {other.mean.shape[0]}"
            )
        if other.count == 0:
            return self
        if self.count == 0:
            return other
        count = self.count + other.count
        share = other.count / count
        with np.errstate(all="ignore"):
            difference = other.mean - self.mean
            merged = self.mean + difference * share
            # An infinite mean stays infinite: inf - inf would make it NaN.
            mean = np.where(np.isfinite(difference), merged, self.mean + other.mean)
            m2 = self.m2 + other.m2 + difference**2 * (self.count * share)
        return Moments(count, mean, m2)


def weight_of_new_batch(momentum: float | None, num_batches_tracked: int) -> float:
    """Return the weight of a batch in the running statistics.

    Parameters
    ----------
    momentum : float or None
        The weight of the new batch; None for the plain average of all batches so far.
    num_batches_tracked : int
        How many batches there are, the new one included.

    Returns
    -------
    float
        `momentum`, or 1 / `num_batches_tracked`.
    """
    return 1.0 / num_batches_tracked if momentum is None else momentum
