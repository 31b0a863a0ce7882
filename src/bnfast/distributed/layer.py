"""Synchronized batch normalization as a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float
from bnfast.distributed.batch import Synchronized, backward_of_rank, forward_of_rank
from bnfast.distributed.communicators import Communicator
from bnfast.distributed.exchange import Term, exchanged, failures_told, named
from bnfast.functional import moments
from bnfast.layers._layer import Gradients
from bnfast.layers._tracking import PROPAGATE, RankLayer
from bnfast.running_averages import Momentum
from bnfast.statistics import Moments


class SyncBatchNorm(RankLayer):
    """Batch normalization of a batch that several processes have parts of.

    In training as `bnfast.BatchNorm` of the parts joined, on every rank; in evaluation it is a
    `bnfast.BatchNorm` of its own rank, and exchanges nothing.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    communicator : Communicator
        Reaches the other ranks: all must make the same layers with it, in the same order.
    eps : float
        Added to the variance; 0 will do for evaluation only.
    momentum : float, None, or function
        The weight of the NEW batch in the running statistics; None for the plain average of all
        batches; a function of the number of the batch, as in `bnfast.BatchNorm`, whose weights must
        be the same on all ranks. A `bnfast.LearnableMomentum` is refused.
    affine : bool
        Whether there are a weight and a bias.
    track_running_stats : bool
        Whether there are running statistics. Without them evaluation uses those of the part that
        its own rank has, as in PyTorch.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC.
    unbiased : bool
        Divide by M - 1 for running_var, as PyTorch does, rather than by M, the values that all
        ranks have of a channel.
    dtype : dtype
        Of the parameters and running statistics: float32 or float64. The input may be either, the
        same on all ranks.
    frozen : bool
        Normalize with the running statistics in training, too, and leave them as they are; weight
        and bias are still trained, and nothing is exchanged. An attribute that may be changed at
        any time, on all ranks at once.
    nonfinite : str
        What training does with a batch whose statistics, those of all ranks together, are NaN or
        infinite: "propagate" them into the running statistics, "skip" the batch there, or "raise",
        on every rank, before anything is written. No further exchange and no further pass are made.

    Attributes
    ----------
    weight, bias : array (C,) or None
        gamma (ones at first) and beta (zeros at first): the same on all ranks, as long as all train
        them alike.
    running_mean, running_var : array (C,) or None
        Zeros and ones at first: the same on all ranks, which track the same statistics.
    num_batches_tracked : int or None
        How many batches the running statistics have seen. One that is empty on all ranks is none.
    weight_grad, bias_grad : array (C,) or None
        Of the last `backward`: what this rank adds to the gradients, as
        `sync_batch_norm_backward` says; add up those of all ranks, or average them.
    training : bool
        True at first; see `train` and `eval`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    A call in training, and its `backward`, are made by all ranks or none: of a rank that has no
    values, with an empty array. Their errors are those of `sync_batch_norm_forward`. Where a layer
    is in training on one rank, and in evaluation or frozen on another, they meet in different
    layers or calls, or after being frozen on some ranks only, and raise an error; or, where the
    other has no exchange any more, the one waits until the timeout of the communicator.

    `bnfast.recalibrating` takes the joined batches, on all ranks at once, and `bnfast.monitoring`
    the data of each rank; both say what they exchange.

    What `bnfast.BatchNorm` does besides, an activation and a residual, is left to other layers.

    States are those of `bnfast.BatchNorm`.

    References
    ----------
    C. Peng et al., 2018, "MegDet: A Large Mini-Batch Object Detector", arXiv:1711.07240.

    Examples
    --------
    Under ``mpiexec``, each rank with its own x::

        layer = SyncBatchNorm(64, MPICommunicator())
        y = layer(x)
        dx = layer.backward(dy)
        comm.Allreduce(MPI.IN_PLACE, layer.weight_grad)
    """

    _learns_momentum = False
    _shown = (
        *("num_features", "communicator", "eps", "momentum", "affine", "track_running_stats"),
        *("axis", "unbiased", "dtype"),
    )

    def __init__(
        self,
        num_features: int,
        communicator: Communicator,
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
        _validation.instance("communicator", communicator, Communicator)
        self.communicator = communicator
        self._number = communicator._number_of_layer()
        self._meets_again = False  # whether a call in training is made again
        self._synchronized = False  # whether the last call met those of the other ranks
        self._frozen_until_now = False  # in training, since the last call that met the others'
        self._recalibrated = False

    def _batch(self, x: object) -> Array:
        if not self._recalibrated and (self.frozen or not self.training):
            self._frozen_until_now |= self.training
            return super()._batch(x)
        with failures_told(self.communicator):
            return super()._batch(x)

    def _recomputes(self, recompute: bool) -> bool:
        trains = self.training and not self.frozen
        self._meets_again = False
        if recompute is not False:
            with failures_told(self.communicator) if trains else nullcontext():
                self._meets_again = super()._recomputes(recompute) and trains
        return self._meets_again

    def _normalize(self, x: Array, out: Array | None, training: bool, *_: Any) -> Array:
        if not training and not self._meets_again:
            return super()._normalize(x, out, training)
        with failures_told(self.communicator):
            tracked: tuple[Array | None, Array | None] = None, None
            momentum, nonfinite = 0.0, None
            if training and self.track_running_stats:
                tracked, momentum = self._running_statistics(), self._weight_of_new_batch()
                nonfinite = self._checked_nonfinite()
            terms: dict[str, Term] = {
                "layer": self._number,
                "nonfinite": nonfinite,
                "frozen until now": self._frozen_until_now,
                "recompute": self._meets_again,
            }
            self._frozen_until_now = False
        y, saved, taken = forward_of_rank(
            *(x, self.communicator, self.weight, self.bias, self.eps, self.axis),
            *(*tracked, momentum, self.unbiased, out),
            *(terms, self._takes_parts),
        )
        if taken and saved.count > 0:
            self._count()
        self._save(x, out, saved, self._kept_weight(), by=SyncBatchNorm._gradients_of_part)
        return y

    def _takes_parts(self, parts: Array, merged: Array) -> bool:
        """Whether the running statistics take a batch: the same on every rank."""
        if self.nonfinite == PROPAGATE:
            return True
        ranks = [
            rank for rank, (mean, _, m2) in enumerate(parts) if not self._are_finite(mean, m2).all()
        ]
        return self._takes_statistics(
            merged[0], merged[2], f"x of {named(ranks)}" if ranks else "x of all ranks"
        )

    def _joined(
        self, x: Array, samples: int, terms: Mapping[str, Any]
    ) -> tuple[Moments, int] | None:
        with failures_told(self.communicator):
            own = moments(x, self.axis)
            all_terms: dict[str, Term] = {
                "call": "recalibrating",
                "layer": self._number,
                "channels": self.num_features,
                "dtype": x.dtype.name,
                "nonfinite": self._checked_nonfinite(),
                **terms,
            }
        values = np.concatenate((own.mean, own._low, own.m2, [samples]))
        counts, found = exchanged(self.communicator, all_terms, int(own.count), values)
        parts = found[:, :-1].reshape(len(counts), 3, self.num_features)
        merged = _primitives.merge_moments(counts, np.ascontiguousarray(parts))
        count = sum(counts.tolist())
        if not self._takes_parts(parts, merged) or count == 0:
            return None
        return Moments._of(count, *merged), int(found[:, -1].sum())

    @contextmanager
    def _leaving_together(self, terms: Mapping[str, Any]) -> Iterator[None]:
        with failures_told(self.communicator):
            yield
        end = {"call": "end of recalibrating", **terms}
        exchanged(self.communicator, end, 0, np.zeros(0))

    def _save(
        self, x: Array, out: Array | None, *more: Any, by: Callable[..., Gradients] | None = None
    ) -> None:
        super()._save(x, out, *more, by=by)
        self._synchronized = by is not None

    @in_default_float_mode
    def backward(
        self, dy: ArrayLikeOf[Float], *, out: NDArray[Float] | None = None
    ) -> NDArray[Float]:
        """Return the gradient of the last input: see `bnfast.BatchNorm.backward`.

        Parameters
        ----------
        dy : array like the last output
            The gradient of the output of this rank.
        out : array like `dy`, optional
            Where to write: `dy` itself will do.

        Returns
        -------
        array like `dy`

        Raises
        ------
        RuntimeError, TypeError, ValueError, OSError
            As `bnfast.BatchNorm.backward`; after a call in training, as `sync_batch_norm_backward`.
        """
        if self._synchronized and isinstance(self._saved, str):  # there is nothing to work with
            with failures_told(self.communicator):
                return super().backward(dy, out=out)
        return super().backward(dy, out=out)

    def _gradients_of_part(
        self,
        dy: Array,
        out: Array | None,
        x: Array,
        statistics: Synchronized,
        weight: Array | None,
    ) -> Gradients:
        dx, dweight, dbias = backward_of_rank(
            dy, x, statistics, self.communicator, weight, self.axis, out, self._number
        )
        return dx, None if weight is None else dweight, dbias
