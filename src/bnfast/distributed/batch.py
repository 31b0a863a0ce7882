"""Synchronized batch normalization: what it means, its defaults and its documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float
from bnfast.distributed.communicators import Communicator
from bnfast.distributed.exchange import Term, exchanged, failures_told


@dataclass(frozen=True, eq=False)
class Synchronized:
    """What `sync_batch_norm_backward` needs of the pass before it: the same on every rank.

    Parameters
    ----------
    mean, invstd : array (C,) of float64
        mu and 1 / sqrt(var + eps) of the batch of all ranks.
    count : int
        M, how many values of each channel that has.
    mean_low : array (C,) of float64
        What rounding to float64 left of mu.
    """

    mean: NDArray[np.float64]
    invstd: NDArray[np.float64]
    count: int
    mean_low: NDArray[np.float64]


@in_default_float_mode
def sync_batch_norm_forward(
    x: ArrayLikeOf[Float],
    communicator: Communicator,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    momentum: float = 0.1,
    unbiased: bool = True,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Synchronized]:
    """Normalize the part of a batch that this rank has with the statistics of all parts.

    As `bnfast.batch_norm_forward` of the parts joined, on every rank.

    Parameters
    ----------
    x : array of float32 or float64, at least 2-d
        The part of this rank: of any number of values per channel, also of none, but as many
        channels and the dtype of all others.
    communicator : Communicator
        Reaches the other ranks, which call this, too.
    weight, bias, eps, axis, out
        As in `bnfast.batch_norm_forward`.
    running_mean, running_var : array (C,) of float32 or float64, optional
        Both or neither, on all ranks alike: updated in place, with the statistics of all parts.
    momentum, unbiased
        As in `bnfast.batch_norm_forward`: M counts the values of all ranks.

    Returns
    -------
    y : array like `x`
        The normalized part.
    saved : Synchronized
        mean, invstd and count of all parts, for the backward pass: the same bits on every rank,
        whatever the order in which ranks arrive.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type, dtype, shape or value; or, on every rank, where ranks
        differ in what must be the same.
    RuntimeError
        On the others, where a rank has raised an error: theirs names it.
    OSError
        TimeoutError or ConnectionError, where a rank does not answer.

    Warns
    -----
    RuntimeWarning
        As `bnfast.batch_norm`.

    Notes
    -----
    Each rank makes count, mean and m2 of its part; one exchange later each merges those of all, in
    the order of the ranks, in float64, and normalizes its part. Whatever raises an error does so
    before any output or running statistic is written, on every rank. Float64 values whose squared
    deviations leave the range (1e154 apart) have an infinite variance here.

    References
    ----------
    T. Chan, G. Golub, R. LeVeque, 1979, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", Stanford STAN-CS-79-773.

    Examples
    --------
    Under ``mpiexec``, each rank with its own x::

        communicator = MPICommunicator()
        y, saved = sync_batch_norm_forward(x, communicator, weight, bias)
        dx, dweight, dbias = sync_batch_norm_backward(dy, x, saved, communicator, weight)
    """
    y, saved, _ = forward_of_rank(
        *(x, communicator, weight, bias, eps, axis, running_mean, running_var, momentum),
        *(unbiased, out),
    )
    return y, saved


def forward_of_rank(
    x: ArrayLike,
    communicator: Communicator,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    axis: int,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    unbiased: bool,
    out: Array | None,
    more_terms: Mapping[str, Term] = MappingProxyType({}),
    takes: Callable[[Array, Array], bool] | None = None,
) -> tuple[Array, Synchronized, bool]:
    """Do `sync_batch_norm_forward`, for one of the layers of a communicator.

    Given the moments of each rank and of all together, `takes` decides about the running
    statistics; whether they took the batch is returned as well.
    """
    _validation.instance("communicator", communicator, Communicator)
    with failures_told(communicator):
        flag = _validation.flag("unbiased", unbiased)
        part = _primitives.PartOfBatch(
            x, axis, weight, bias, eps, running_mean, running_var, momentum, flag, out
        )
        tracks = running_mean is not None
        terms: dict[str, Term] = {
            "call": "forward",
            "layer": None,
            "channels": part.channels,
            "dtype": part.x.dtype.name,
            "eps": float(eps),
            "running statistics": tracks,
            "momentum": float(momentum) if tracks else None,
            "unbiased": flag if tracks else None,
            **more_terms,
        }
    counts, moments = exchanged(communicator, terms, part.count, part.moments)
    count = sum(counts.tolist())
    mean, mean_low, _ = merged = _primitives.merge_moments(counts, moments)
    taken = tracks and (takes is None or takes(moments, merged))
    y, invstd = part.normalize(count, merged, taken)
    return y, Synchronized(mean, invstd, count, mean_low), taken


@in_default_float_mode
def sync_batch_norm_backward(
    dy: ArrayLikeOf[Float],
    x: ArrayLikeOf[Float],
    saved: Synchronized,
    communicator: Communicator,
    weight: ArrayLike | None = None,
    *,
    axis: int = 1,
    out: NDArray[Float] | None = None,
) -> tuple[NDArray[Float], Array, Array]:
    """Return the gradients of synchronized batch normalization on this rank.

    Parameters
    ----------
    dy : array like `x`
        The gradient of the output of this rank.
    x : array of float32 or float64, at least 2-d
        The input of this rank in the forward pass.
    saved : Synchronized
        What the forward pass returned.
    communicator : Communicator
        That of the forward pass.
    weight : array (C,) of float32 or float64, optional
        gamma; 1 where None.
    axis, out
        As in `bnfast.batch_norm_backward`.

    Returns
    -------
    dx : array like `x`
        The gradient of the input of this rank, by way of the statistics of all ranks.
    dweight, dbias : array (C,)
        What the part of this rank adds to the gradients of weight and bias: the gradients are the
        sums over all ranks, as of every other parameter, and it is for the training to add them up
        or, where the loss is a mean over ranks, to average them, as PyTorch's
        ``DistributedDataParallel`` does. Of the dtype of `weight`, or of `x` where it is None.

    Raises
    ------
    TypeError, ValueError, RuntimeError, OSError
        As `sync_batch_norm_forward`.

    Notes
    -----
    One exchange adds up sum(dy) and sum(dy * xhat), in the order of the ranks, in float64; the
    formulas are those of `bnfast.batch_norm_backward_sums` and `bnfast.batch_norm_backward_input`.

    References
    ----------
    S. Ioffe, C. Szegedy, 2015, arXiv:1502.03167, section 3.
    """
    return backward_of_rank(dy, x, saved, communicator, weight, axis, out)


def backward_of_rank(
    dy: ArrayLike,
    x: ArrayLike,
    saved: Synchronized,
    communicator: Communicator,
    weight: ArrayLike | None,
    axis: int,
    out: Array | None,
    layer: int | None = None,
) -> tuple[Array, Array, Array]:
    """Do `sync_batch_norm_backward`, for one of the layers of a communicator."""
    _validation.instance("communicator", communicator, Communicator)
    with failures_told(communicator):
        of = _validation.saved_value(saved, Synchronized, "sync_batch_norm_forward")
        part = _primitives.PartOfGradient(dy, x, axis, of.mean, of.mean_low, of.invstd, weight, out)
        terms: dict[str, Term] = {
            "call": "backward",
            "layer": layer,
            "channels": part.channels,
            "dtype": part.x.dtype.name,
            "count": _validation.integer_from("count", of.count, 0),
        }
    _, sums = exchanged(communicator, terms, 0, part.sums)
    dx = part.input_gradient(max(of.count, 1), _sum_over_ranks(sums))
    return dx, *part.parameter_gradients()


def _sum_over_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Add up one rank after the other: NumPy's sum has another order for one channel than many."""
    total: NDArray[np.float64] = values[0].copy()
    with np.errstate(all="ignore"):
        for each in values[1:]:
            total += each
    return total
