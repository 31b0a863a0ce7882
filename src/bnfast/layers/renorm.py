"""Batch renormalization as a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bnfast import _primitives, _validation, functional
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float
from bnfast.functional import Renormalized, RenormSchedule
from bnfast.layers._layer import Gradients
from bnfast.layers._tracking import PROPAGATE, Averaging, ChannelLayer
from bnfast.running_averages import Momentum, checked_momentum


class BatchRenorm(ChannelLayer, Averaging):
    """Batch renormalization: batches corrected towards the running statistics, more and more.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance of the batch; 0 will do for evaluation only.
    momentum : float or function
        The weight of the NEW batch in the running statistics; a function as in `BatchNorm`.
    affine : bool
        Whether there are a weight and a bias.
    schedule : RenormSchedule, optional
        How far each batch may be corrected. The paper's where None: 5000 batches of plain batch
        normalization, then limits that grow up to batch 40000; scale it to shorter training.
        ``RenormSchedule(r_max, d_max, 0, 0, 0)`` has the same limits from the first batch on.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC.
    dtype : dtype
        Of the parameters and running statistics: float32 or float64, whatever the input's.
    frozen, nonfinite
        As in `BatchNorm`.

    Attributes
    ----------
    weight, bias : array (C,) or None
        gamma (ones at first) and beta (zeros at first).
    running_mean, running_std : array (C,)
        Zeros and ones at first. It is the standard deviation that is kept, not the variance.
    num_batches_tracked : int
        How many batches the running statistics have seen: the step of the schedule, part of the
        state.
    weight_grad, bias_grad : array (C,) or None
        Of the last `backward`; a new call replaces them.
    training : bool
        True at first; see `train` and `eval`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.batch_renorm` and `bnfast.batch_renorm_backward`. The layer keeps
    a reference to its last input until `backward` or the next call, and does not copy it.

    References
    ----------
    S. Ioffe, 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models", arXiv:1702.03275.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.BatchRenorm(1, momentum=0.1, schedule=bnfast.RenormSchedule(3, 5, 0, 0, 0))
    >>> layer(np.array([[1.0], [3.0]], np.float32)).round(3)
    array([[1.],
           [3.]], dtype=float32)
    >>> layer.running_mean, layer.num_batches_tracked
    (array([0.2], dtype=float32), 1)
    """

    running_mean: Array
    running_std: Array
    num_batches_tracked: int

    _arrays: ClassVar[Mapping[str, str]] = {
        name: name for name in ("weight", "bias", "running_mean", "running_std")
    }
    _running = ("running_mean", "running_std")
    _shown = ("num_features", "eps", "momentum", "affine", "schedule", "axis", "dtype")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = 0.01,
        affine: bool = True,
        *,
        schedule: RenormSchedule | None = None,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        frozen: bool = False,
        nonfinite: str = PROPAGATE,
    ) -> None:
        super().__init__(num_features, eps, affine, axis, dtype)
        self._set_averaging(checked_momentum(momentum, none=False), frozen, nonfinite)
        self.schedule = RenormSchedule() if schedule is None else schedule
        _validation.instance("schedule", self.schedule, RenormSchedule)
        _validation.renorm_limits(self.schedule.r_max, self.schedule.d_max)
        self.running_mean = np.zeros(self.num_features, self.dtype)
        self.running_std = np.ones(self.num_features, self.dtype)
        self.num_batches_tracked = 0

    @in_default_float_mode
    def __call__(
        self, x: ArrayLikeOf[Float], *, out: NDArray[Float] | None = None
    ) -> NDArray[Float]:
        """Normalize a batch.

        Parameters
        ----------
        x : array of float16, bfloat16, float32 or float64
            With `num_features` channels along `axis`. Keep its values for `backward`.
        out : array like `x`, optional
            Where to write. In place, where it is `x` itself, there can be no `backward`.

        Returns
        -------
        array like `x`

        Raises
        ------
        TypeError, ValueError
            As `bnfast.batch_renorm`; the layer is left as it was.
        """
        array = self._batch(x)
        if self._observer is not None:
            self._observe(array, out)
        mean, std = self.running_mean, self.running_std
        if not self.training or self.frozen:
            given = array, self.axis, mean, std, self.weight, self.bias
            y, inverse_std = _primitives.evaluate_renorm(*given, self._evaluation, out)
            self._save(array, out, (mean.copy(), inverse_std, self._kept_weight(), None, True))
            return y
        r_max, d_max = self.schedule.at(self.num_batches_tracked)
        weight = self._kept_weight()
        takes = self.nonfinite == PROPAGATE or self._takes(array, self.axis)
        new = self._weight_of_new_batch() if takes else 0.0
        y, saved = functional.batch_renorm_forward(
            *(array, mean, std, self.weight, self.bias, new, self.eps),
            r_max=r_max,
            d_max=d_max,
            axis=self.axis,
            out=out,
        )
        if takes and array.size > 0:
            self.num_batches_tracked += 1
        self._save(array, out, saved, weight, by=BatchRenorm._gradients_of_batch)
        return y

    def _first_statistics(self) -> dict[str, Array | float]:
        return {"running_mean": 0.0, "running_std": 1.0}

    def _gradients_of_batch(
        self,
        dy: Array,
        out: Array | None,
        x: Array,
        of_batch: Renormalized,
        weight: Array | None,
    ) -> Gradients:
        dx, dweight, dbias = functional.batch_renorm_backward(
            dy, x, of_batch, weight, axis=self.axis, out=out
        )
        return dx, None if weight is None else dweight, dbias
