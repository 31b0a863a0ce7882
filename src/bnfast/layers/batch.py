"""Batch normalization as a layer."""

from __future__ import annotations

import types
import warnings
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bnfast import _validation
from bnfast._conventions import KERAS, KERAS_LAYERS, PYTORCH_LAYERS
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array
from bnfast.layers._framework import FrameworkLayer, of_channels
from bnfast.layers._inplace import InPlaceLayer
from bnfast.layers._tracking import PROPAGATE
from bnfast.running_averages import Momentum

# Below this the statistics of a batch are mostly noise: the standard error of the variance of 8
# normal values is half of the variance.
FEW_VALUES = 8


class BatchNorm(InPlaceLayer):
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
        Of the parameters and running statistics: float32 or float64, whatever the input's.
    frozen : bool
        Normalize with the running statistics in training, too, and leave them as they are; weight
        and bias are still trained. An attribute that may be changed at any time.
    nonfinite : str
        What training does with a batch whose statistics are NaN or infinite: "propagate" them into
        the running statistics, "skip" the batch there, or "raise" before anything is written. The
        latter two read the batch once more.
    activation : str, optional
        What follows, in the same pass: "relu", "leaky_relu", "relu6", "silu" or "hardswish". An
        attribute that may be changed at any time, as `negative_slope` may.
    negative_slope : float
        The slope of leaky_relu below 0; at most 1.
    inplace : bool
        Write the output over the input, and keep it alone for `backward`, which finds there what
        the input was: for an activation that can be undone, leaky_relu with a slope above 0 or
        none. With `out` another array is written to and kept. An attribute that may be changed at
        any time.

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

    Until `backward` or the next call the layer keeps, without copying them, a reference to its last
    input, in evaluation too, and after a call with a residual one to its output, which tells what
    goes through the activation (with silu and hardswish one to the residual instead): of float32 4
    bytes an element of an array that networks keep anyway. Change one of these in between and the
    gradients are those of something else. Copies and pickles of the layer leave them out.

    With ``inplace=True`` it keeps the output, in the memory of the input, and nothing besides. The
    gradients are those of xhat = (z - bias) / weight, where z is what the activation was given:
    what rounding left of that in y, an error of xhat of 6e-8 * (abs(xhat) + abs(bias / weight))
    where y is float32, with 5e-4 of float16 and 4e-3 of bfloat16. A weight of 0 is refused, and so
    are a residual, a mask, and a slope below the smallest normal number of y (6.1e-5 of float16).

    Two threads that train one layer at once race for its running statistics.

    References
    ----------
    S. Ioffe, C. Szegedy, 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", arXiv:1502.03167. S. Rota Bulò, L. Porzi, P. Kontschieder, 2018,
    "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs", arXiv:1712.02616.

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
        activation: str | None = None,
        negative_slope: float = 0.01,
        inplace: bool = False,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, axis, unbiased, dtype),
            *(frozen, nonfinite),
        )
        self._set_activation(activation, negative_slope)
        self.inplace = inplace
        if self.inplace:
            self._check_invertible()
        self._warned = False

    @classmethod
    @in_default_float_mode
    def from_torch(cls, module: Any) -> BatchNorm:
        """Return a layer that computes what a ``torch.nn.BatchNorm1d``, ``2d`` or ``3d`` does.

        Parameters
        ----------
        module : BatchNorm1d, BatchNorm2d, BatchNorm3d or SyncBatchNorm of ``torch.nn``
            Or any object with the same attributes; PyTorch is not imported. Its arrays are copied,
            from any device. Of a SyncBatchNorm the layer is one for a single process.

        Returns
        -------
        BatchNorm
            With the eps, momentum, weight, bias, running statistics, number of batches and mode of
            the module; ``axis=1``. Its dtype is float64 where the module's is, else float32, which
            has every value of float16 and bfloat16.

        Raises
        ------
        TypeError
            For another module: one of the user's own that overrides ``forward``, a quantized one.
        ValueError
            For a lazy module that has seen no batch yet, or an array of the wrong shape.

        Examples
        --------
        >>> import types, numpy as np, bnfast
        >>> module = types.SimpleNamespace(  # in real life network.bn1, for example
        ...     num_features=2, eps=1e-3, momentum=0.1, training=False, track_running_stats=True,
        ...     weight=np.ones(2), bias=np.zeros(2), running_mean=np.array([1.0, 2.0]),
        ...     running_var=np.full(2, 1e-3), num_batches_tracked=7,
        ... )
        >>> layer = bnfast.BatchNorm.from_torch(module)
        >>> layer.eps, layer.running_mean, layer.num_batches_tracked, layer.training
        (0.001, array([1., 2.]), 7, False)
        """
        source = FrameworkLayer("module", module, PYTORCH_LAYERS, "BatchNorm")
        return cls._from(source, source.size("num_features"), 1)

    @overload
    @classmethod
    def from_keras(cls, layer: Any, /) -> BatchNorm: ...

    @overload
    @classmethod
    def from_keras(
        cls,
        gamma: ArrayLike | None,
        beta: ArrayLike | None,
        moving_mean: ArrayLike | None = None,
        moving_variance: ArrayLike | None = None,
        *,
        momentum: float | None = None,
        epsilon: float | None = None,
        axis: int | Sequence[int] | None = None,
    ) -> BatchNorm: ...

    @classmethod
    @in_default_float_mode
    def from_keras(
        cls,
        gamma: Any,
        beta: ArrayLike | None = None,
        moving_mean: ArrayLike | None = None,
        moving_variance: ArrayLike | None = None,
        *,
        momentum: float | None = None,
        epsilon: float | None = None,
        axis: int | Sequence[int] | None = None,
    ) -> BatchNorm:
        """Return a layer that computes what a ``keras.layers.BatchNormalization`` does.

        ``from_keras(layer)`` takes all of the layer. ``from_keras(*layer.get_weights())`` takes
        weights alone, which say nothing of epsilon, momentum and axis.

        Parameters
        ----------
        gamma : BatchNormalization, or array (C,) or None
            The layer, built, with no other argument: of Keras with any backend, of ``tf_keras``, or
            any object with the same attributes; Keras is not imported. Or the first weight, None
            for ``scale=False``.
        beta, moving_mean, moving_variance : array (C,)
            In the order of Keras's ``get_weights()``; copied. beta is None for ``center=False``.
        momentum : float, optional
            The weight of the OLD statistics, as in Keras; 0.99 by default, as there.
        epsilon, axis
            Keras's; 1e-3 and -1 by default. An axis in a list, as ``tf.keras`` keeps it, will do.

        Returns
        -------
        BatchNorm
            With ``momentum=1 - momentum`` and ``unbiased=False``, in training mode: Keras has modes
            of calls, not of layers. ``frozen=True`` of a layer with ``trainable=False``, as Keras
            means it. Its dtype is float64 where an array's is, else float32.

        Raises
        ------
        TypeError, ValueError
            For an argument of the wrong dtype or shape; another layer, one with a ``call`` of its
            own, one that is not built, or one with ``renorm=True``.

        Examples
        --------
        >>> import types, numpy as np, bnfast
        >>> zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
        >>> keras_layer = types.SimpleNamespace(  # in real life model.get_layer("bn1"), for example
        ...     axis=-1, momentum=0.9, epsilon=1e-5, gamma=ones, beta=zeros, moving_mean=zeros,
        ...     moving_variance=ones,
        ... )
        >>> layer = bnfast.BatchNorm.from_keras(keras_layer)
        >>> layer.axis, layer.eps, layer.momentum, layer.unbiased
        (-1, 1e-05, 0.1, False)
        >>> layer = bnfast.BatchNorm.from_keras(ones, zeros, zeros, ones)
        >>> layer.axis, layer.eps, layer.unbiased
        (-1, 0.001, False)
        """
        settings = {"momentum": momentum, "epsilon": epsilon, "axis": axis}
        if beta is moving_mean is moving_variance is None:
            given = [name for name, value in settings.items() if value is not None]
            if given:
                raise TypeError(f"from_keras(layer) takes {' and '.join(given)} from the layer")
            source = FrameworkLayer("layer", gamma, KERAS_LAYERS, "BatchNorm")
        elif moving_mean is None or moving_variance is None:
            raise TypeError(
                "gamma, beta, moving_mean and moving_variance are wanted: gamma is None of a layer "
                "with scale=False, beta of one with center=False"
            )
        else:
            defaults = {"momentum": KERAS.momentum, "epsilon": KERAS.eps, "axis": KERAS.axis}
            weights = types.SimpleNamespace(
                **{KERAS.weight: gamma, KERAS.bias: beta},
                **{KERAS.mean: moving_mean, KERAS.var: moving_variance},
                **{n: defaults[n] if value is None else value for n, value in settings.items()},
            )
            source = FrameworkLayer("", weights, KERAS_LAYERS, "BatchNorm")
        if source.read("renorm", False):
            raise ValueError(
                "layer must have renorm=False, got one that trains by batch renormalization: "
                "bnfast.BatchRenorm is such a layer"
            )
        layer = cls._from(source, source.channels(), source.axis())
        layer.frozen = not source.read("trainable", True)
        return layer

    @classmethod
    def _from(cls, source: FrameworkLayer, num_features: int, axis: int) -> BatchNorm:
        layer = of_channels(
            *(cls, source, num_features, axis),
            tracked=source.has_running_statistics(),
            momentum=source.momentum,
            unbiased=source.convention.unbiased,
        )
        layer.track_running_stats = layer.track_running_stats and source.tracks()
        return layer

    def _before_training(self, x: Array, counted: NDArray[np.bool_] | None = None) -> None:
        if self._warned:
            return
        values = x.size // max(self.num_features, 1)
        if counted is not None:
            values = min(values, int(counted.sum()))
        if not 0 < values < FEW_VALUES:
            return
        if values >= _validation.fewest_values(self.unbiased and self.running_var is not None):
            self._warned = True
            warnings.warn(
                f"x of shape {x.shape} has {values} value{'s' * (values > 1)} per channel: their "
                f"statistics are mostly noise. Use a larger batch, or eval() to normalize with the "
                f"running statistics, or a normalization that does not depend on the batch (layer, "
                f"group or RMS normalization)",
                stacklevel=4,
            )
