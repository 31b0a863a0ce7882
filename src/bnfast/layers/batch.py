"""Batch normalization as a layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from bnfast import _validation
from bnfast._conventions import KERAS
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array
from bnfast.layers._tracking import PROPAGATE, TrackingLayer
from bnfast.running_averages import Momentum

# Below this the statistics of a batch are mostly noise: the standard error of the variance of 8
# normal values is half of the variance.
FEW_VALUES = 8


class BatchNorm(TrackingLayer):
    """Batch normalization with its parameters, running statistics and gradients.

    ``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` in one, for NumPy arrays of any rank.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance; 0 will do for evaluation only.
    momentum : float, None, or function
        The weight of the NEW batch in the running statistics, from 0 to 1, as in PyTorch (Keras,
        Flax and ONNX call its complement momentum); None for the plain average of all batches; a
        function of the number of the batch, from 1 on, which returns its weight:
        `ExponentialAverage`, `CumulativeAverage`, or one of your own; or a `LearnableMomentum`.
    affine : bool
        Whether there are a weight and a bias.
    track_running_stats : bool
        Whether there are running statistics. Without them evaluation, too, uses those of the batch.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC.
    unbiased : bool
        Divide by M - 1 for running_var, as PyTorch does, rather than by M (Keras, Flax, ONNX).
    dtype : dtype
        Of the parameters and running statistics: float32 or float64. The input may be either.
    frozen : bool
        Normalize with the running statistics in training, too, and leave them as they are; weight
        and bias are still trained. An attribute that may be changed at any time.
    nonfinite : str
        What training does with a batch whose statistics are NaN or infinite: "propagate" them into
        the running statistics, "skip" the batch there, or "raise" before anything is written. The
        latter two read the batch once more.

    Attributes
    ----------
    weight, bias : array (C,) or None
        gamma (ones at first) and beta (zeros at first). Change them in place, or assign arrays.
    running_mean, running_var : array (C,) or None
        Zeros and ones at first.
    num_batches_tracked : int or None
        How many batches the running statistics have seen. An empty batch is none.
    weight_grad, bias_grad : array (C,) or None
        Of the last `backward`; a new call replaces them.
    momentum_logit, momentum_logit_grad : array (1,) or (C,), or None
        The parameter of a `LearnableMomentum`, and its gradient.
    training : bool
        True at first; see `train` and `eval`.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.batch_norm` and `bnfast.batch_norm_backward`.

    The layer keeps a reference to its last input until `backward` or the next call, in evaluation
    too, and does not copy it: change the input in between and the gradients are those of something
    else. Copies and pickles of the layer leave it out.

    Two threads that train one layer at once race for its running statistics.

    References
    ----------
    S. Ioffe, C. Szegedy, 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", arXiv:1502.03167.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.BatchNorm(3)
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (16, 3, 8, 8)).astype(np.float32)
    >>> y = layer(x)
    >>> bool(np.abs(y.mean(axis=(0, 2, 3))).max() < 1e-6)
    True
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.bias_grad
    array([1024., 1024., 1024.], dtype=float32)
    >>> y = layer.eval()(x)
    """

    _shown = (
        *("num_features", "eps", "momentum", "affine", "track_running_stats", "axis"),
        *("unbiased", "dtype"),
    )

    def __init__(
        self,
        num_features: int,
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
        self._warned = False

    @classmethod
    @in_default_float_mode
    def from_keras(
        cls,
        gamma: ArrayLike | None,
        beta: ArrayLike | None,
        moving_mean: ArrayLike | None = None,
        moving_variance: ArrayLike | None = None,
        *,
        momentum: float = KERAS.momentum,
        epsilon: float = KERAS.eps,
        axis: int | Sequence[int] = KERAS.axis,
    ) -> BatchNorm:
        """Return a layer with the weights of a ``keras.layers.BatchNormalization``.

        Parameters
        ----------
        gamma, beta, moving_mean, moving_variance : array (C,)
            In the order of Keras's ``get_weights()``; copied. gamma is None for ``scale=False``,
            beta for ``center=False``.
        momentum : float
            The weight of the OLD statistics, as in Keras.
        epsilon, axis
            Keras's, with Keras's defaults; an axis in a list, as ``tf.keras`` keeps it, will do.

        Returns
        -------
        BatchNorm
            With ``momentum=1 - momentum`` and ``unbiased=False``.

        Raises
        ------
        TypeError, ValueError
            For an argument of the wrong dtype or shape.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
        >>> layer = bnfast.BatchNorm.from_keras(ones, zeros, zeros, ones)
        >>> layer.axis, layer.eps, layer.unbiased
        (-1, 0.001, False)
        """
        if moving_mean is None or moving_variance is None:
            raise TypeError(
                "gamma, beta, moving_mean and moving_variance are wanted: gamma is None of a layer "
                "with scale=False, beta of one with center=False"
            )
        axes = _validation.integers("axis", axis)
        if len(axes) != 1:
            raise ValueError(f"axis must be one integer, or a list of one, got {axis}")
        mean = _validation.floating_array("moving_mean", moving_mean)
        if mean.ndim != 1:
            raise ValueError(f"moving_mean must have 1 dimension, got shape {mean.shape}")
        channels = mean.shape[0]
        var = _validation.required_channel_parameter("moving_variance", moving_variance, channels)
        weight = _validation.channel_parameter("gamma", gamma, channels)
        bias = _validation.channel_parameter("beta", beta, channels)
        layer = cls(
            channels,
            epsilon,
            KERAS.weight_of_new_batch(_validation.share("momentum", momentum)),
            affine=gamma is not None or beta is not None,
            axis=axes[0],
            unbiased=KERAS.unbiased,
            dtype=mean.dtype,
        )
        layer.weight = None if weight is None else weight.copy()
        layer.bias = None if bias is None else bias.copy()
        layer.running_mean, layer.running_var = mean.copy(), var.copy()
        return layer

    def _before_training(self, x: Array) -> None:
        if self._warned or not 0 < x.size < FEW_VALUES * self.num_features:
            return
        values = x.size // self.num_features
        if values >= _validation.fewest_values(self.unbiased and self.running_var is not None):
            self._warned = True
            warnings.warn(
                f"x of shape {x.shape} has {values} value{'s' * (values > 1)} per channel: their "
                f"statistics are mostly noise. Use a larger batch, or eval() to normalize with the "
                f"running statistics, or a normalization that does not depend on the batch (layer, "
                f"group or RMS normalization)",
                stacklevel=3,
            )
