"""Normalizations of rows, whose elements have parameters of their own, as layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bnfast import _primitives, _validation
from bnfast._activations import activation_of
from bnfast._conventions import KERAS_LAYERS, PYTORCH_LAYERS
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float
from bnfast.layers._framework import FrameworkLayer, of_rows
from bnfast.layers._fused import SHOWN_IF_NOT, FusedLayer, Fusion
from bnfast.layers._layer import Flag, Gradients


class _RowLayer(FusedLayer):
    """A layer of rows, with a weight for each of their elements."""

    _centred: ClassVar[bool]  # whether statistics are around the mean
    _shown_if_not: ClassVar[Mapping[str, Any]] = SHOWN_IF_NOT

    elementwise_affine = Flag(fixed=True)

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None,
        elementwise_affine: bool,
        axis: int | Sequence[int] | None,
        dtype: DTypeLike,
        activation: str | None,
        negative_slope: float,
    ) -> None:
        self._set_activation(activation, negative_slope)
        self.normalized_shape = _validation.sizes("normalized_shape", normalized_shape)
        self.eps = None if eps is None else _validation.real("eps", eps)
        self.elementwise_affine = elementwise_affine
        self.axis = None if axis is None else _validation.integers("axis", axis)
        self.dtype = _validation.floating_dtype("dtype", dtype)
        if self.elementwise_affine:
            self.weight = np.ones(self.normalized_shape, self.dtype)

    @in_default_float_mode
    def __call__(
        self,
        x: ArrayLikeOf[Float],
        residual: ArrayLikeOf[Float] | None = None,
        *,
        recompute: bool = False,
        out: NDArray[Float] | None = None,
    ) -> NDArray[Float]:
        """Normalize rows.

        Parameters
        ----------
        x : array of float16, bfloat16, float32 or float64
            Keep its values for `backward`, and those of the output where there is a residual.
        residual : array like `x`, optional
            What is added before the activation, of any strides; `backward` then returns its
            gradient as well.
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
            As the function of the same name; the layer is left as it was.
        """
        array = _validation.data_array("x", x)
        _validation.flag("recompute", recompute)
        chosen = activation_of(self.activation, self.negative_slope)
        y, mean, inverse = _primitives.normalize_rows(
            *(array, self.normalized_shape, self.axis, self.weight, self.bias, self.eps),
            *(self._centred, out, chosen, residual),
        )
        self._save_fused(array, y, out, (mean, inverse, self._kept_weight()), chosen, residual)
        return y

    def _fused_gradients(
        self, dy: Array, out: Array | None, x: Array, statistics: Any, fusion: Fusion
    ) -> Gradients:
        mean, inverse, weight = statistics
        *_, adds = fusion
        has_parameters = weight is not None or self.bias is not None
        dx, dweight, dbias, *dresidual = _primitives.row_gradient(
            *(dy, x, self.normalized_shape, self.axis, mean, inverse, weight, self._centred),
            *(has_parameters, out, *fusion),
        )
        return (dx, *dresidual) if adds else dx, dweight, dbias

    _gradients = _fused_gradients


class LayerNorm(_RowLayer):
    """Layer normalization: every row by its own statistics.

    As ``torch.nn.LayerNorm``.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The sizes of the axes that make a row: the last ones, unless `axis` says which.
    eps : float
        Added to the variance.
    elementwise_affine : bool
        Whether there is a weight.
    bias : bool
        Whether there is a bias besides.
    axis : int or sequence of int, optional
        Which axes make a row, in the order of `normalized_shape`.
    dtype : dtype
        Of the parameters: float32 or float64, whatever the input's.
    activation, negative_slope
        As in `bnfast.batch_norm`.

    Attributes
    ----------
    weight, bias : array of `normalized_shape`, or None
        gamma (ones at first) and beta (zeros at first).
    weight_grad, bias_grad : array of `normalized_shape`, or None
        Of the last `backward`; a new call replaces them.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.layer_norm` and `bnfast.layer_norm_backward`. Training and
    evaluation are the same. The layer keeps a reference to its last input until `backward` or the
    next call, and does not copy it.

    References
    ----------
    J. L. Ba, J. R. Kiros, G. E. Hinton, 2016, "Layer Normalization", arXiv:1607.06450.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.LayerNorm(4)
    >>> y = layer(np.arange(12, dtype=np.float32).reshape(3, 4))
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.bias_grad
    array([3., 3., 3., 3.], dtype=float32)
    """

    _centred = True
    _shown = ("normalized_shape", "eps", "elementwise_affine", "bias", "axis", "dtype")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        axis: int | Sequence[int] | None = None,
        dtype: DTypeLike = np.float32,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            *(normalized_shape, _validation.real("eps", eps), elementwise_affine, axis, dtype),
            *(activation, negative_slope),
        )
        if _validation.flag("bias", bias) and self.elementwise_affine:
            self.bias = np.zeros(self.normalized_shape, self.dtype)

    @classmethod
    @in_default_float_mode
    def from_torch(cls, module: Any) -> LayerNorm:
        """Return a layer that computes what a ``torch.nn.LayerNorm`` does.

        Parameters
        ----------
        module : torch.nn.LayerNorm
            Or any object with the same attributes; PyTorch is not imported.

        Returns
        -------
        LayerNorm
            As `BatchNorm.from_torch` says.

        Raises
        ------
        TypeError, ValueError
            As `BatchNorm.from_torch`.

        Examples
        --------
        >>> import types, numpy as np, bnfast
        >>> module = types.SimpleNamespace(
        ...     normalized_shape=(4,), eps=1e-6, weight=np.ones(4), bias=None, training=True
        ... )
        >>> bnfast.LayerNorm.from_torch(module).eps
        1e-06
        """
        source = FrameworkLayer("module", module, PYTORCH_LAYERS, "LayerNorm")
        return of_rows(cls, source, source.shape("normalized_shape"), None)

    @classmethod
    @in_default_float_mode
    def from_keras(cls, layer: Any) -> LayerNorm:
        """Return a layer that computes what a ``keras.layers.LayerNormalization`` does.

        Parameters
        ----------
        layer : LayerNormalization
            Built, with one axis or a list of axes. Or any object with the same attributes; Keras is
            not imported.

        Returns
        -------
        LayerNorm
            With the axis of the Keras layer; without a weight for ``scale=False``, without a bias
            for ``center=False``.

        Raises
        ------
        TypeError, ValueError
            As `BatchNorm.from_keras`; for ``rms_scaling=True``.

        Examples
        --------
        >>> import types, numpy as np, bnfast
        >>> keras_layer = types.SimpleNamespace(
        ...     axis=[-1], epsilon=1e-3, gamma=np.ones(4), beta=np.zeros(4)
        ... )
        >>> layer = bnfast.LayerNorm.from_keras(keras_layer)
        >>> layer.normalized_shape, layer.axis, layer.eps
        ((4,), (-1,), 0.001)
        """
        source = FrameworkLayer("layer", layer, KERAS_LAYERS, "LayerNorm")
        if source.read("rms_scaling", False):
            raise ValueError(
                "layer must have rms_scaling=False, got one that divides by the standard deviation "
                "and does not subtract the mean, which no layer of bnfast does: RMSNormalization "
                "of Keras is bnfast.RMSNorm"
            )
        return of_rows(cls, source, *source.rows())

    def _shown_value(self, name: str) -> object:
        return self.bias is not None if name == "bias" else super()._shown_value(name)


class RMSNorm(_RowLayer):
    """RMS normalization: every row divided by its root mean square.

    As ``torch.nn.RMSNorm``.

    Parameters
    ----------
    normalized_shape, elementwise_affine, axis, dtype, activation, negative_slope
        As in `LayerNorm`.
    eps : float or None
        Added to the mean square; None for that of `bnfast.rms_norm`.

    Attributes
    ----------
    weight : array of `normalized_shape`, or None
        gamma: ones at first.
    weight_grad : array of `normalized_shape`, or None
        Of the last `backward`; a new call replaces it.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The formulas stand in `bnfast.rms_norm` and `bnfast.rms_norm_backward`. Training and evaluation
    are the same. The layer keeps a reference to its last input until `backward` or the next call,
    and does not copy it.

    References
    ----------
    B. Zhang, R. Sennrich, 2019, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.RMSNorm(4)
    >>> y = layer(np.ones((3, 4), np.float32))
    >>> dx = layer.backward(np.ones_like(y))
    >>> layer.weight_grad.round(3)
    array([3., 3., 3., 3.], dtype=float32)
    """

    _centred = False
    _shown = ("normalized_shape", "eps", "elementwise_affine", "axis", "dtype")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        axis: int | Sequence[int] | None = None,
        dtype: DTypeLike = np.float32,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(
            *(normalized_shape, eps, elementwise_affine, axis, dtype, activation, negative_slope)
        )

    @classmethod
    @in_default_float_mode
    def from_torch(cls, module: Any) -> RMSNorm:
        """Return a layer that computes what a ``torch.nn.RMSNorm`` does.

        Parameters
        ----------
        module : torch.nn.RMSNorm
            Or any object with the same attributes; PyTorch is not imported.

        Returns
        -------
        RMSNorm
            As `BatchNorm.from_torch` says; ``eps=None`` stays None.

        Raises
        ------
        TypeError, ValueError
            As `BatchNorm.from_torch`.

        Examples
        --------
        >>> import types, numpy as np, bnfast
        >>> module = types.SimpleNamespace(
        ...     normalized_shape=(4,), eps=1e-6, weight=np.ones(4, np.float32), training=True
        ... )
        >>> bnfast.RMSNorm.from_torch(module)
        RMSNorm((4,), eps=1e-06, elementwise_affine=True, axis=None, dtype=float32)
        """
        source = FrameworkLayer("module", module, PYTORCH_LAYERS, "RMSNorm")
        return of_rows(cls, source, source.shape("normalized_shape"), None)

    @classmethod
    @in_default_float_mode
    def from_keras(cls, layer: Any) -> RMSNorm:
        """Return a layer that computes what a ``keras.layers.RMSNormalization`` does.

        Parameters
        ----------
        layer : RMSNormalization
            Built, over the last axes. Or any object with the same attributes; Keras is not
            imported.

        Returns
        -------
        RMSNorm
            With the axis of the Keras layer.

        Raises
        ------
        TypeError, ValueError
            As `BatchNorm.from_keras`; for axes with others behind them, along which Keras does not
            multiply by its weight.

        Examples
        --------
        >>> import types, numpy as np, bnfast
        >>> keras_layer = types.SimpleNamespace(axis=-1, epsilon=1e-6, scale=np.ones(4, np.float32))
        >>> bnfast.RMSNorm.from_keras(keras_layer)
        RMSNorm((4,), eps=1e-06, elementwise_affine=True, axis=(-1,), dtype=float32)
        """
        source = FrameworkLayer("layer", layer, KERAS_LAYERS, "RMSNorm")
        shape, axes = source.rows()
        source.refuse_other_than_last(axes)
        return of_rows(cls, source, shape, axes)
