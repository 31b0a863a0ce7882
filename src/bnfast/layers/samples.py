"""Normalizations of each sample by itself, as layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bnfast import _primitives, _validation
from bnfast._activations import activation_of
from bnfast._conventions import KERAS_LAYERS, PYTORCH_LAYERS
from bnfast._float_mode import in_default_float_mode
from bnfast._masks import ZEROS
from bnfast._primitives import GROUPS, PER_SAMPLE
from bnfast._typing import Array, ArrayLikeOf, Float
from bnfast.layers._framework import FrameworkLayer, of_channels, of_groups
from bnfast.layers._fused import SHOWN_IF_NOT, FusedChannels, FusedTrackingLayer
from bnfast.layers._layer import Flag
from bnfast.layers._tracking import PROPAGATE
from bnfast.running_averages import Momentum


class InstanceNorm(FusedTrackingLayer):
    """Instance normalization: every channel of every sample by its own statistics.

    ``torch.nn.InstanceNorm1d``, ``2d`` and ``3d`` in one, for batches of any rank.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    eps : float
        Added to the variance; positive.
    momentum : float, None, or function
        The weight of the NEW batch in the running statistics, as in PyTorch; None, as there, leaves
        them alone; a function as in `BatchNorm`.
    affine : bool
        Whether there are a weight and a bias.
    track_running_stats : bool
        Whether there are running statistics, which evaluation then normalizes with.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC; samples are along axis 0.
    dtype : dtype
        Of the parameters and running statistics: float32 or float64, whatever the input's.
    frozen, nonfinite, activation, negative_slope
        As in `BatchNorm`.

    Attributes
    ----------
    weight, bias : array (C,) or None
        gamma (ones at first) and beta (zeros at first).
    running_mean, running_var : array (C,) or None
        Zeros and ones at first.
    num_batches_tracked : int or None
        0, as in PyTorch, which keeps it for the state alone; how many batches the running
        statistics have seen, where momentum is a function of that.
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
    The formulas stand in `bnfast.instance_norm` and `bnfast.instance_norm_backward`. The layer
    keeps references until `backward` or the next call as `BatchNorm` does.

    References
    ----------
    D. Ulyanov, A. Vedaldi, V. Lempitsky, 2016, "Instance Normalization: The Missing Ingredient for
    Fast Stylization", arXiv:1607.08022.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.InstanceNorm(3)
    >>> y = layer(np.random.default_rng(0).normal(5.0, 2.0, (4, 3, 8, 8)).astype(np.float32))
    >>> bool(np.abs(y.mean(axis=(2, 3))).max() < 1e-6)
    True
    """

    _shown = (
        *("num_features", "eps", "momentum", "affine", "track_running_stats", "axis", "dtype"),
    )
    _over = PER_SAMPLE
    _learns_momentum = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        frozen: bool = False,
        nonfinite: str = PROPAGATE,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            *(num_features, eps, momentum, affine, track_running_stats, axis, True, dtype),
            *(frozen, nonfinite),
        )
        self._set_activation(activation, negative_slope)

    @classmethod
    @in_default_float_mode
    def from_torch(cls, module: Any) -> InstanceNorm:
        """Return a layer that computes what a ``torch.nn.InstanceNorm1d``, ``2d`` or ``3d`` does.

        Parameters
        ----------
        module : InstanceNorm1d, InstanceNorm2d or InstanceNorm3d of ``torch.nn``
            Or any object with the same attributes; PyTorch is not imported.

        Returns
        -------
        InstanceNorm
            As `BatchNorm.from_torch` says. Running statistics that the module no longer tracks are
            left out: PyTorch does not normalize with them.

        Raises
        ------
        TypeError, ValueError
            As `BatchNorm.from_torch`.

        Examples
        --------
        >>> import types, numpy as np, bnfast
        >>> module = types.SimpleNamespace(
        ...     num_features=2, eps=1e-3, momentum=0.1, training=True, track_running_stats=False,
        ...     weight=None, bias=None, running_mean=None, running_var=None,
        ... )
        >>> bnfast.InstanceNorm.from_torch(module).eps
        0.001
        """
        source = FrameworkLayer("module", module, PYTORCH_LAYERS, "InstanceNorm")
        tracked = source.tracks() and source.has_running_statistics()
        size = source.size("num_features")
        return of_channels(cls, source, size, 1, tracked=tracked, momentum=source.momentum)

    @classmethod
    @in_default_float_mode
    def from_keras(cls, layer: Any) -> InstanceNorm:
        """Return a layer that computes what ``keras.layers.GroupNormalization(groups=-1)`` does.

        Parameters
        ----------
        layer : GroupNormalization
            With a group for each channel; built. Or any object with the same attributes; Keras is
            not imported.

        Returns
        -------
        InstanceNorm
            Without running statistics.

        Raises
        ------
        TypeError, ValueError
            As `BatchNorm.from_keras`; where groups have several channels.

        Examples
        --------
        >>> import types, numpy as np, bnfast
        >>> keras_layer = types.SimpleNamespace(
        ...     groups=-1, axis=-1, epsilon=1e-3, gamma=np.ones(4), beta=np.zeros(4)
        ... )
        >>> layer = bnfast.InstanceNorm.from_keras(keras_layer)
        >>> layer.num_features, layer.axis, layer.eps
        (4, -1, 0.001)
        """
        source = FrameworkLayer("layer", layer, KERAS_LAYERS, "InstanceNorm")
        groups, channels, axis = source.groups()
        if groups != channels:
            raise ValueError(
                f"layer.groups must be -1 or the number of channels, {channels}, got {groups}: "
                "bnfast.GroupNorm.from_keras takes such a layer"
            )
        return of_channels(cls, source, channels, axis)

    def _batch(self, x: object) -> Array:
        array = super()._batch(x)
        _validation.channel_axis_of_samples(array, self.axis)
        return array

    def _weight_of_new_batch(self) -> float:
        return 0.0 if self.momentum is None else super()._weight_of_new_batch()

    def _count(self) -> None:
        if callable(self.momentum):
            super()._count()


class GroupNorm(FusedChannels):
    """Group normalization: groups of neighbouring channels of every sample.

    As ``torch.nn.GroupNorm``.

    Parameters
    ----------
    num_groups : int
        G, which divides the number of channels.
    num_channels : int
        C, the number of channels.
    eps : float
        Added to the variance.
    affine : bool
        Whether there are a weight and a bias.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC; samples are along axis 0.
    dtype : dtype
        Of the parameters: float32 or float64, whatever the input's.
    activation, negative_slope
        As in `BatchNorm`.

    Attributes
    ----------
    weight, bias : array (C,) or None
        gamma (ones at first) and beta (zeros at first).
    weight_grad, bias_grad : array (C,) or None
        Of the last `backward`; a new call replaces them.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.group_norm` and `bnfast.group_norm_backward`. Training and
    evaluation are the same. The layer keeps references until `backward` or the next call as
    `BatchNorm` does.

    References
    ----------
    Y. Wu, K. He, 2018, "Group Normalization", arXiv:1803.08494.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.GroupNorm(2, 4)
    >>> y = layer(np.random.default_rng(0).normal(5.0, 2.0, (3, 4, 8, 8)).astype(np.float32))
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.bias_grad
    array([192., 192., 192., 192.], dtype=float32)
    """

    affine = Flag(fixed=True)

    _over = GROUPS
    _grouped = True
    _shown = ("num_groups", "num_channels", "eps", "affine", "axis", "dtype")
    _shown_if_not: ClassVar[Mapping[str, Any]] = SHOWN_IF_NOT

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        self._set_activation(activation, negative_slope)
        self.num_channels = _validation.size("num_channels", num_channels)
        _validation.channels_of_group(num_groups, self.num_channels)
        self.num_groups = int(num_groups)
        self.eps = _validation.real("eps", eps)
        self.affine = affine
        self.axis = _validation.integer("axis", axis)
        self.dtype = _validation.floating_dtype("dtype", dtype)
        if self.affine:
            self.weight = np.ones(self.num_channels, self.dtype)
            self.bias = np.zeros(self.num_channels, self.dtype)

    @classmethod
    @in_default_float_mode
    def from_torch(cls, module: Any) -> GroupNorm:
        """Return a layer that computes what a ``torch.nn.GroupNorm`` does.

        Parameters
        ----------
        module : torch.nn.GroupNorm
            Or any object with the same attributes; PyTorch is not imported.

        Returns
        -------
        GroupNorm
            As `BatchNorm.from_torch` says.

        Raises
        ------
        TypeError, ValueError
            As `BatchNorm.from_torch`.

        Examples
        --------
        >>> import types, numpy as np, bnfast
        >>> module = types.SimpleNamespace(
        ...     num_groups=2, num_channels=4, eps=1e-3, weight=np.ones(4), bias=np.zeros(4),
        ...     training=True,
        ... )
        >>> bnfast.GroupNorm.from_torch(module)
        GroupNorm(2, num_channels=4, eps=0.001, affine=True, axis=1, dtype=float64)
        """
        source = FrameworkLayer("module", module, PYTORCH_LAYERS, "GroupNorm")
        return of_groups(cls, source, source.size("num_groups"), source.size("num_channels"), 1)

    @classmethod
    @in_default_float_mode
    def from_keras(cls, layer: Any) -> GroupNorm:
        """Return a layer that computes what a ``keras.layers.GroupNormalization`` does.

        Parameters
        ----------
        layer : GroupNormalization
            Built. Or any object with the same attributes; Keras is not imported.

        Returns
        -------
        GroupNorm
            Of ``groups=-1``, with a group for each channel.

        Raises
        ------
        TypeError, ValueError
            As `BatchNorm.from_keras`.

        Examples
        --------
        >>> import types, numpy as np, bnfast
        >>> keras_layer = types.SimpleNamespace(
        ...     groups=2, axis=-1, epsilon=1e-3, gamma=np.ones(4), beta=np.zeros(4)
        ... )
        >>> bnfast.GroupNorm.from_keras(keras_layer)
        GroupNorm(2, num_channels=4, eps=0.001, affine=True, axis=-1, dtype=float64)
        """
        source = FrameworkLayer("layer", layer, KERAS_LAYERS, "GroupNorm")
        return of_groups(cls, source, *source.groups())

    @in_default_float_mode
    def __call__(
        self,
        x: ArrayLikeOf[Float],
        residual: ArrayLikeOf[Float] | None = None,
        *,
        mask: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        padding: str = ZEROS,
        recompute: bool = False,
        out: NDArray[Float] | None = None,
    ) -> NDArray[Float]:
        """Normalize a batch.

        Parameters
        ----------
        x : array of float16, bfloat16, float32 or float64
            With `num_channels` channels along `axis`. Keep its values for `backward`, and those of
            the output where there is a residual.
        residual : array like `x`, optional
            What is added before the activation, of any strides; `backward` then returns its
            gradient as well.
        mask, lengths, padding
            As in `bnfast.batch_norm`: which values count, and what the output is where they do not.
            Keep them for `backward`, too, which has the same.
        recompute : bool
            Whether the call is made again, as of `bnfast.BatchNorm`: it makes no difference here.
        out : array like `x`, optional
            Where to write. In place, where it is `x` itself, there can be no `backward`; nor where
            it is the residual itself, if the activation is silu, hardswish, or leaky_relu with a
            `negative_slope` below 0.

        Returns
        -------
        array like `x`

        Raises
        ------
        TypeError, ValueError
            As `bnfast.group_norm`; the layer is left as it was.
        """
        array, axis, _ = _validation.batch("x", x, self.axis)
        _validation.same_channels("x", array, axis, self.num_channels)
        _validation.flag("recompute", recompute)
        chosen = activation_of(self.activation, self.negative_slope)
        y, mean, invstd = _primitives.normalize(
            *(array, axis, self.weight, self.bias, self.eps),
            out=out,
            over=GROUPS,
            num_groups=self.num_groups,
            activation=chosen,
            residual=residual,
            masked=(mask, lengths, padding),
        )
        statistics = mean, invstd, self._kept_weight(), (mask, lengths, padding), False
        self._save_fused(array, y, out, statistics, chosen, residual)
        return y

    _gradients = FusedChannels._fused_gradients
