"""Statistics of an array: of its channels, of any of its axes, of some of its values."""

from __future__ import annotations

from numpy.typing import ArrayLike

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast.statistics import Moments, Summary


@in_default_float_mode
def moments(
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = 1,
    *,
    where: ArrayLike | None = None,
) -> Moments:
    """Return the count, mean and sum of squared deviations of every channel.

    Of float32 data too they are those of an exact computation, whatever the mean; no copy of the
    data is made.

    Parameters
    ----------
    x : array of float16, bfloat16, float32, float64, integers or booleans
        Any shape and strides; whatever ``np.asarray`` makes such an array of.
    axis : int, tuple of int, or None
        The axes that are KEPT, each of whose indices has statistics of its own, unlike NumPy's,
        which are those that are summed over: the axis of the channels (1 for NCHW and for the
        columns of a table, -1 for NHWC), several axes, or none, for one value of the whole array.
    where : array of bool, optional
        Which values count: broadcast to the shape of `x`. (``summary(x, finite=True)`` leaves out
        what is NaN or infinite.)

    Returns
    -------
    Moments
        With ``count``, ``mean``, ``m2``, ``var`` and ``std`` (float64) of the shape of the kept
        axes, in the order in which `x` has them; with `where`, the count is an array.
        `Moments.merge`, ``+`` and ``sum`` join those of the parts of a data set. Where there are no
        values, all are 0.

        Of float32 data m2 is within a relative 6e-7 of the exact one, and the mean within 6e-7
        standard deviations, whatever the mean (1e-6 where a few outliers make up the variance); of
        float64 data both within 1e-14. The sums of integers of 8 and 16 bits are exact; integers
        of 32 bits are taken as float64, and those of 64 bits rounded to it.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    mean = sum(x) / count, m2 = sum((x - mean)**2), over all axes that are not kept.

    References
    ----------
    T. Chan, G. Golub, R. LeVeque, 1979, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", Stanford STAN-CS-79-773.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> bnfast.moments(x)
    Moments(count=2, mean=array([ 2., 20.]), m2=array([  2., 200.]))
    >>> images = np.full((8, 32, 32, 3), 255, np.uint8)
    >>> bnfast.moments(images, axis=-1).mean
    array([255., 255., 255.])
    >>> bnfast.moments(x, axis=None, where=x > 2).count
    3
    """
    return Moments._of(*_primitives.summarize(x, axis, where, False, False)[:5])


@in_default_float_mode
def summary(
    x: ArrayLike,
    axis: int | tuple[int, ...] | None = 1,
    *,
    where: ArrayLike | None = None,
    finite: bool = False,
) -> Summary:
    """Return the moments of every channel, its extremes, and how many values are not finite.

    All in the pass that `moments` takes.

    Parameters
    ----------
    x, axis, where
        As in `moments`.
    finite : bool
        Let only finite values count: then count, mean, m2, minimum and maximum are those of the
        finite values, and ``nonfinite`` says how many were left out.

    Returns
    -------
    Summary
        `Moments` with ``minimum`` and ``maximum`` (float64; NaN where there are no values) and
        ``nonfinite`` (int64), all of the shape of the kept axes. NaN is in no extreme, infinities
        are, unless they do not count.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value.

    Notes
    -----
    Where values are not finite, `finite` reads `x` twice.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> x = np.array([[1.0, 10.0], [3.0, np.inf], [np.nan, 30.0]])
    >>> bnfast.summary(x).nonfinite
    array([1, 1])
    >>> bnfast.summary(x, finite=True).mean
    array([ 2., 20.])
    """
    if not _validation.flag("finite", finite):
        return Summary._of(*_primitives.summarize(x, axis, where, True, False))
    if where is None:
        everything = Summary._of(*_primitives.summarize(x, axis, None, True, False))
        if not everything._nonfinite.any():
            return everything
    return Summary._of(*_primitives.summarize(x, axis, where, True, True))
