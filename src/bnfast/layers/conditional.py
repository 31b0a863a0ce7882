"""Conditional batch normalization as a layer: a weight and a bias for each class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bnfast import _primitives, _validation, functional
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float
from bnfast.layers._blend import Blend
from bnfast.layers._layer import Gradients
from bnfast.layers._tracking import PROPAGATE, TrackingLayer
from bnfast.running_averages import LearnableMomentum, Momentum


class ConditionalBatchNorm(TrackingLayer):
    """Batch normalization whose weight and bias are those of the class of each sample.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    num_classes : int
        K, the number of classes: at least 1.
    eps : float
        Added to the variance; 0 will do for evaluation only.
    momentum : float, None, or function
        The weight of the NEW batch in the running statistics, as in PyTorch; None for the plain
        average of all batches; or a function or `LearnableMomentum`, as in `BatchNorm`.
    track_running_stats : bool
        Whether there are running statistics. Without them evaluation, too, uses those of the batch.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC; samples are along axis 0.
    unbiased : bool
        Divide by M - 1 for running_var, as PyTorch does, rather than by M.
    dtype : dtype
        Of the parameters and running statistics: float32 or float64. The input may be either.
    frozen, nonfinite
        As in `BatchNorm`.

    Attributes
    ----------
    weight, bias : array (K, C)
        gamma (ones at first) and beta (zeros at first) of each class.
    running_mean, running_var : array (C,) or None
        Of all classes together: zeros and ones at first.
    num_batches_tracked : int or None
        How many batches the running statistics have seen. An empty batch is none.
    weight_grad, bias_grad : array (K, C) or None
        Of the last `backward`: 0 for a class that no sample was of. A new call replaces them.
    training : bool
        True at first; see `train` and `eval`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.conditional_batch_norm` and
    `bnfast.conditional_batch_norm_backward`, to which this layer gives ``weight[labels]`` and
    ``bias[labels]``; the gradients of a class are the sums of those of its samples. Where the
    parameters are made by another network, use these functions.

    The layer keeps a reference to its last input until `backward` or the next call, and does not
    copy it.

    References
    ----------
    V. Dumoulin, J. Shlens, M. Kudlur, 2017, "A Learned Representation For Artistic Style",
    arXiv:1610.07629; H. de Vries et al., 2017, "Modulating early visual processing by language",
    arXiv:1707.00683.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.ConditionalBatchNorm(1, 3)
    >>> layer.bias[2] = 5
    >>> y = layer(np.array([[1.0], [3.0]], np.float32), [0, 2])
    >>> y.round(3)
    array([[-1.],
           [ 6.]], dtype=float32)
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.bias_grad
    array([[1.],
           [0.],
           [1.]], dtype=float32)
    """

    _shown = (
        *("num_features", "num_classes", "eps", "momentum", "track_running_stats", "axis"),
        *("unbiased", "dtype"),
    )

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        eps: float = 1e-5,
        momentum: Momentum = 0.1,
        track_running_stats: bool = True,
        *,
        axis: int = 1,
        unbiased: bool = True,
        dtype: DTypeLike = np.float32,
        frozen: bool = False,
        nonfinite: str = PROPAGATE,
    ) -> None:
        features = _validation.size("num_features", num_features)
        self.num_classes = _validation.size("num_classes", num_classes, 1)
        _validation.sizes("num_classes by num_features", (self.num_classes, features))
        super().__init__(
            *(features, eps, momentum, True, track_running_stats, axis, unbiased, dtype),
            *(frozen, nonfinite),
        )
        self.weight = np.ones((self.num_classes, self.num_features), self.dtype)
        self.bias = np.zeros((self.num_classes, self.num_features), self.dtype)

    @in_default_float_mode
    def __call__(  # type: ignore[override]  # no batch without its labels
        self,
        x: ArrayLikeOf[Float],
        labels: ArrayLike,
        *,
        recompute: bool = False,
        out: NDArray[Float] | None = None,
    ) -> NDArray[Float]:
        """Normalize a batch of samples of known classes.

        Parameters
        ----------
        x : array of float32 or float64
            With `num_features` channels along `axis`. Keep its values for `backward`.
        labels : array (N,) of integers
            The class of each sample, from 0 to K - 1; copied.
        recompute : bool
            As in `bnfast.BatchNorm`: the running statistics do not see the batch twice.
        out : array like `x`, optional
            Where to write. In place, where it is `x` itself, there can be no `backward`.

        Returns
        -------
        array like `x`

        Raises
        ------
        TypeError, ValueError
            As `bnfast.conditional_batch_norm`, or for labels that are not such; the layer is left
            as it was.
        """
        array, _ = _validation.channel_axis_of_samples(self._batch(x), self.axis)
        chosen = _validation.class_labels(labels, len(array), self.num_classes)
        weight, bias = (self._of_samples(name, chosen) for name in ("weight", "bias"))
        tracks = not self._recomputes(recompute)
        if tracks and self._observer is not None:
            self._observe(array, out)
        running_mean, running_var = self._running_statistics()
        training = self.training and not self.frozen
        if training or running_mean is None or running_var is None:
            tracks = tracks and training and self.track_running_stats
            tracks = tracks and self._takes(array, self.axis)
            if tracks and type(self.momentum) is LearnableMomentum:
                if array.size > 0:
                    return self._normalize_and_blend(array, chosen, weight, bias, out)
                tracks = False
            tracked = (running_mean, running_var) if tracks else (None, None)
            new = self._weight_of_new_batch() if tracks else 0.0
            y, *statistics = _primitives.conditional_normalize(
                array, self.axis, weight, bias, self.eps, *tracked, new, self.unbiased, out
            )
            if tracks and array.size > 0:
                self._count()
            self._save(array, out, *statistics, weight, chosen, True)
            return y
        y = functional.conditional_batch_norm(
            *(array, weight, bias, running_mean, running_var),
            eps=self.eps,
            axis=self.axis,
            out=out,
        )
        with np.errstate(all="ignore"):
            invstd = 1.0 / np.sqrt(running_var.astype(np.float64) + self.eps)
        self._save(array, out, running_mean.astype(np.float64), invstd, weight, chosen, False)
        return y

    def _normalize_and_blend(
        self,
        x: Array,
        labels: NDArray[np.intp],
        weight: Array | None,
        bias: Array | None,
        out: Array | None,
    ) -> Array:
        """As `_normalize_blended`, with a weight and a bias for each sample."""
        tracked, (blended,) = self._blends(x)
        y = _primitives.conditional_scale_shift(
            *(x, self.axis, blended.mean, blended.variance, weight, bias, self.eps),
            self._output_beside(out, x, tracked),
        )
        self._track(tracked, [blended])
        self._save(x, out, blended, weight, labels)
        return y

    def _of_samples(self, name: str, labels: NDArray[np.intp]) -> Array | None:
        """Return the rows of a table of parameters, copied: it may change before backward."""
        table = getattr(self, name)
        if table is None:
            return None
        shape = self.num_classes, self.num_features
        rows: Array = _validation.state(name, table, shape)[labels]
        return rows

    def _gradients(self, dy: Array, out: Array | None, x: Array, *saved: Any) -> Gradients:
        blended = saved[0] if isinstance(saved[0], Blend) else None
        if blended is None:
            mean, invstd, weight, labels, of_batch = saved
        else:
            mean, invstd, of_batch = blended.mean, blended.invstd(self.eps), False
            _, weight, labels = saved
            out = self._gradient_output(out, dy, x, weight)
        # Float64, so that the gradients of samples are not rounded before they are added up.
        wide = None if weight is None else weight.astype(np.float64)
        dx, *of_samples = functional.conditional_batch_norm_backward(
            *(dy, x, mean, invstd, wide),
            axis=self.axis,
            training=of_batch,
            out=out,
        )
        dweight, dbias = np.zeros((2, self.num_classes, self.num_features))
        with np.errstate(all="ignore"):
            for table, rows in zip((dweight, dbias), of_samples, strict=True):
                np.add.at(table, labels, rows)
            if blended is None:
                return dx, None if weight is None else dweight, dbias
            gamma = 1.0 if wide is None else wide
            sum_g_xhat, sum_g = ((gamma * rows.astype(np.float64)).sum(0) for rows in of_samples)
            dlogit = blended.write_gradient(
                *(dx, dx, np.ones(self.num_features), x, self.axis, self.eps), (sum_g, sum_g_xhat)
            )
        return dx, None if weight is None else dweight, dbias, self._of_logit(dlogit)
