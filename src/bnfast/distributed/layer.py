"""Synchronized batch normalization as a layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from bnfast import _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array
from bnfast.distributed.batch import Synchronized, backward_of_rank, forward_of_rank
from bnfast.distributed.communicators import Communicator
from bnfast.distributed.exchange import failures_told
from bnfast.layers._layer import Gradients
from bnfast.layers._tracking import PROPAGATE, TrackingLayer


class SyncBatchNorm(TrackingLayer):
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
    momentum : float or None
        The weight of the NEW batch in the running statistics; None for the plain average of all
        batches.
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
    is in training on one rank and in evaluation on another, they meet in different layers or calls,
    and raise an error; or, where the other has no exchange any more, the one waits until the
    timeout of the communicator.

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

    _shown = (
        *("num_features", "communicator", "eps", "momentum", "affine", "track_running_stats"),
        *("axis", "unbiased", "dtype"),
    )

    def __init__(
        self,
        num_features: int,
        communicator: Communicator,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: int = 1,
        unbiased: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, axis, unbiased, dtype),
            *(False, PROPAGATE),
        )
        _validation.instance("communicator", communicator, Communicator)
        self.communicator = communicator
        self._number = communicator._number_of_layer()
        self._synchronized = False  # whether the last call met those of the other ranks

    def _batch(self, x: Array) -> Array:
        if not self.training:
            return super()._batch(x)
        with failures_told(self.communicator):
            return super()._batch(x)

    def _normalize(self, x: Array, out: Array | None, training: bool) -> Array:
        if not training:
            return super()._normalize(x, out, training)
        with failures_told(self.communicator):
            tracked = self._running_statistics() if self.track_running_stats else (None, None)
        y, saved = forward_of_rank(
            *(x, self.communicator, self.weight, self.bias, self.eps, self.axis),
            *(*tracked, self._weight_of_new_batch(), self.unbiased, out),
            self._number,
        )
        if saved.count > 0 and self.track_running_stats:
            self._count()
        self._save(x, y, saved, self._kept_weight())
        return y

    def _save(self, x: Array, y: Array, *more: Any) -> None:
        super()._save(x, y, *more)
        self._synchronized = isinstance(more[0], Synchronized)

    @in_default_float_mode
    def backward(self, dy: Array, *, out: Array | None = None) -> Array:
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

    def _gradients(self, dy: Array, out: Array | None, x: Array, *saved: Any) -> Gradients:
        statistics, weight, *_ = saved
        if not isinstance(statistics, Synchronized):
            return super()._gradients(dy, out, x, *saved)
        dx, dweight, dbias = backward_of_rank(
            dy, x, statistics, self.communicator, weight, self.axis, out, self._number
        )
        return dx, None if weight is None else dweight, dbias
