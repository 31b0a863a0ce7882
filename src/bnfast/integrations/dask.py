"""Statistics and normalization of Dask arrays: of data larger than memory, and on clusters.

Each chunk is a task, of whatever scheduler Dask is set to: threads, processes, a cluster.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import threading
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

import bnfast
from bnfast import _dtypes, _threads, _validation
from bnfast._scalars import describe
from bnfast.statistics import Moments, Summary

try:
    import dask
    import dask.array as da
except ImportError as error:
    raise ImportError(
        'bnfast.integrations.dask needs Dask: python -m pip install "dask[array,distributed]"'
    ) from error

__all__ = ["moments", "normalize", "summary"]

Some = TypeVar("Some", bound=Moments)

# How many statistics a task merges. A number of bnfast's own, because it decides the order: by
# Dask's setting of the same name, bits would depend on who computes them.
_SPLIT_EVERY = 16


def moments(
    x: da.Array,
    axis: int | tuple[int, ...] | None = 1,
    *,
    where: da.Array | NDArray[Any] | None = None,
    compute: bool = True,
) -> Moments | Any:
    """Return what `bnfast.moments` does, of a Dask array.

    One pass over the data, chunk by chunk; the moments of the chunks are merged in a tree.

    Parameters
    ----------
    x : dask.array.Array
        Of floats of at most 64 bits, integers or booleans; chunks of any sizes along any axes,
        unknown ones too.
    axis : int, tuple of int, or None
        The axes that are kept, as in `bnfast.moments`.
    where : array of bool, optional
        Which values count: a Dask or NumPy array that broadcasts to `x`.
    compute : bool
        Compute at once. Otherwise the result is a ``dask.delayed.Delayed`` of it.

    Returns
    -------
    Moments
        The same bits whatever computes it, and for any chunks the same up to the rounding of
        `bnfast.moments` (float64 1e-14; integers of 8 and 16 bits exactly).

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value, before anything is computed. What
        a chunk raises is raised as it is.

    Notes
    -----
    A task uses one thread, because Dask runs as many tasks at once as there are processors: an
    array should have more chunks than that. Dask's synchronous scheduler runs one task at a time,
    with the threads that `bnfast.set_num_threads` allows.

    Examples
    --------
    >>> import dask.array as da
    >>> from bnfast.integrations.dask import moments
    >>> x = da.arange(12, chunks=5).reshape(6, 2)
    >>> moments(x)
    Moments(count=6, mean=array([5., 6.]), m2=array([70., 70.]))
    >>> moments(x, where=x > 2).count
    array([4, 5])
    """
    return _statistics(Moments, x, axis, where, compute)


def summary(
    x: da.Array,
    axis: int | tuple[int, ...] | None = 1,
    *,
    where: da.Array | NDArray[Any] | None = None,
    finite: bool = False,
    compute: bool = True,
) -> Summary | Any:
    """Return what `bnfast.summary` does, of a Dask array.

    Parameters
    ----------
    x, axis, where, compute
        As in `moments`.
    finite : bool
        Let only finite values count.

    Returns
    -------
    Summary
        As `moments`, and ``minimum``, ``maximum`` and ``nonfinite``.

    Raises
    ------
    TypeError, ValueError
        As `moments`.

    Examples
    --------
    >>> import dask.array as da
    >>> from bnfast.integrations.dask import summary
    >>> summary(da.arange(12, chunks=5).reshape(6, 2)).maximum
    array([10., 11.])
    """
    return _statistics(Summary, x, axis, where, compute, finite=_validation.flag("finite", finite))


def normalize(
    x: da.Array, moments: Moments | None = None, axis: int = 1, eps: float = 0.0
) -> da.Array:
    """Return a Dask array of zero mean and unit variance in every channel.

    Parameters
    ----------
    x : dask.array.Array
        Of floats of at most 64 bits, integers or booleans; chunks of known sizes along `axis`.
    moments : Moments, optional
        Of the channels: those of `x`, of a part of it, or of other data. By default those of `x`,
        which are computed at once: in a pass of its own, so that chunks need not stay in memory
        until their statistics are known.
    axis : int
        The channel axis.
    eps : float
        Added to the variance.

    Returns
    -------
    dask.array.Array
        Not computed yet, of the chunks of `x`; float32 for floats of 16 and 32 bits, booleans and
        integers of at most 16 bits, else float64. ``to_zarr`` writes it chunk by chunk.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value, before anything is computed.

    Notes
    -----
    y = (x - mean) / sqrt(var + eps), by `bnfast.batch_norm`. A channel whose var + eps is 0 is
    divided by 1: where all its values are equal, it becomes 0.

    Examples
    --------
    >>> import dask.array as da
    >>> from bnfast.integrations.dask import normalize
    >>> x = da.arange(12, chunks=5).reshape(6, 2)
    >>> y = normalize(x)
    >>> y.mean(axis=0).compute(), y.std(axis=0).compute()
    (array([0., 0.]), array([1., 1.]))
    """
    _check(x)
    channel_axis = _validation.integer("axis", axis)
    (channel_axis,) = _validation.kept_axes(x, channel_axis)
    epsilon = _validation.epsilon(eps, training=False)
    chunks = x.chunks[channel_axis]
    if any(math.isnan(size) for size in chunks):
        raise ValueError(
            f"x must have chunks of known sizes along axis {channel_axis}: "
            "x.compute_chunk_sizes() finds them out"
        )
    if moments is None:
        moments = _statistics(Moments, x, channel_axis, None, True)
    _validation.instance("moments", moments, Moments)
    channels = sum(chunks)
    if np.shape(moments.mean) != (channels,):
        raise ValueError(
            f"moments must be of {channels} channels, got shape {np.shape(moments.mean)}"
        )
    variance = np.array(moments.var)
    if epsilon == 0.0:
        variance[variance == 0.0] = 1.0
    small = x.dtype.itemsize <= _dtypes.MOST_EXACT_BYTES  # integers, and floats of 16 bits
    dtype = np.dtype(np.float32 if small or x.dtype == np.float32 else np.float64)
    indices = tuple(range(x.ndim))
    of_channels = [
        argument
        for statistic in (moments.mean, variance)
        for argument in (da.from_array(statistic, chunks=(chunks,)), (channel_axis,))
    ]
    return da.blockwise(
        _normalized_chunk,
        indices,
        x,
        indices,
        *of_channels,
        axis=channel_axis,
        eps=epsilon,
        to=dtype,
        token="bnfast-normalize",
        dtype=dtype,
        meta=np.empty((0,) * x.ndim, dtype),
    )


def _check(x: Any) -> None:
    """Refuse what is no Dask array of numbers."""
    if not isinstance(x, da.Array):
        raise TypeError(f"x must be a Dask array, got {describe(x)}")
    shape = tuple(0 if math.isnan(size) else size for size in x.shape)
    like_x = np.broadcast_to(np.empty((), x.dtype), shape)
    masked = isinstance(x._meta, np.ma.MaskedArray)
    _validation.numbers("x", np.ma.asarray(like_x) if masked else like_x)


def _mask(where: Any, x: da.Array) -> da.Array:
    """Return a boolean Dask array that broadcasts to x, as far as sizes are known."""
    if not isinstance(where, da.Array):
        where = da.from_array(np.asarray(where))
    if where.dtype != bool:
        raise TypeError(f"where must be a boolean array, got {where.dtype} of shape {where.shape}")
    sizes = zip(reversed(where.shape), reversed(x.shape), strict=False)
    fits = all(size in (1, of_x) or math.isnan(size + of_x) for size, of_x in sizes)
    if where.ndim > x.ndim or not fits:
        raise ValueError(f"where must broadcast to x, of shape {x.shape}, got shape {where.shape}")
    return where


def _statistics(
    kind: type[Moments], x: da.Array, axis: Any, where: Any, compute: bool, **options: bool
) -> Any:
    """Return the Moments or the Summary of x, or a Delayed of it."""
    _check(x)
    kept = () if axis is None else _validation.kept_axes(x, axis)
    _validation.flag("compute", compute)
    indices = tuple(range(x.ndim))
    arguments: list[Any] = [x, indices]
    if where is not None:
        mask = _mask(where, x)
        arguments += [mask, indices[x.ndim - mask.ndim :]]
    meta = np.empty((0,) * x.ndim, object)
    chunks = da.blockwise(
        _statistics_of_chunk,
        indices,
        *arguments,
        kind=kind,
        axis=kept,
        options=options,
        token=f"bnfast-{kind.__name__.lower()}",
        dtype=object,
        meta=meta,
    )
    merged = da.reduction(
        chunks,
        _as_it_is,
        _merged,
        axis=tuple(d for d in indices if d not in kept),
        dtype=object,
        split_every=_SPLIT_EVERY,
        concatenate=False,
        meta=np.empty((0,) * len(kept), object),
    )
    delayed = dask.delayed(_joined)(merged.to_delayed().tolist(), len(kept))
    return delayed.compute() if compute else delayed


def _threads_of_task() -> contextlib.AbstractContextManager[None]:
    """Return what keeps this task to one thread, where the scheduler runs several at once."""
    alone = threading.current_thread() is threading.main_thread()
    if alone and multiprocessing.parent_process() is None:  # the synchronous scheduler
        return contextlib.nullcontext()
    return _threads.one_thread()


def _statistics_of_chunk(
    chunk: Any, mask: Any = None, *, kind: type[Moments], axis: Any, options: dict[str, bool]
) -> Moments:
    function = bnfast.summary if kind is Summary else bnfast.moments
    with _threads_of_task():
        return function(chunk, axis or None, where=mask, **options)


def _as_it_is(chunk: Any, axis: Any, keepdims: Any) -> Any:
    return chunk


def _flat(nested: Any) -> list[Any]:
    if isinstance(nested, list):
        return [item for part in nested for item in _flat(part)]
    return [nested]


def _merged(parts: Any, axis: Any, keepdims: Any) -> Any:
    """Merge lists of lists of statistics, in the order of the chunks."""
    return sum(_flat(parts))


def _joined(parts: Any, depth: int) -> Any:
    """Join the statistics of channels: lists of lists of them, a level for each kept axis."""
    if depth == 0:
        return parts
    return _concatenated([_joined(part, depth - 1) for part in parts], -depth)


def _concatenated(parts: Sequence[Some], axis: int) -> Some:
    """Return the statistics of the channels of all parts, which follow each other along an axis."""
    if len(parts) == 1:
        return parts[0]

    def one(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        if any(array.dtype == object for array in arrays):  # exact sums, of which some are large
            arrays = [np.asarray(np.frompyfunc(int, 1, 1)(array), object) for array in arrays]
        return np.concatenate(arrays, axis)

    count = one([np.broadcast_to(part._count, part._mean.shape) for part in parts])
    values: list[Any]
    if all(part._sums is not None for part in parts):
        sums = [part._sums for part in parts if part._sums is not None]
        values = [None, None, None, (one([s[0] for s in sums]), one([s[1] for s in sums]))]
    else:
        names = ("_mean", "_low", "_m2")
        values = [*(one([getattr(part, name) for part in parts]) for name in names), None]
    if isinstance(parts[0], Summary):
        names = ("_minimum", "_maximum", "_nonfinite")
        values += [one([getattr(part, name) for part in parts]) for name in names]
    return type(parts[0])._of(count, *values)


def _normalized_chunk(
    chunk: Any, mean: Any, variance: Any, *, axis: int, eps: float, to: np.dtype[Any]
) -> NDArray[Any]:
    given = _validation.numbers("x", chunk)
    x = given.astype(to, copy=False)[np.newaxis]  # a single axis is no batch
    with _threads_of_task():
        y = bnfast.batch_norm(
            x, mean, variance, eps=eps, axis=axis + 1, out=None if given.dtype == to else x
        )
    result: NDArray[Any] = y[0]
    return result
