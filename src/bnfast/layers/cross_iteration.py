"""Cross-iteration batch normalization as a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from bnfast import _primitives, _validation, functional
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float
from bnfast.functional import CrossIterated, IterationStatistics
from bnfast.layers._layer import Flag, Gradients
from bnfast.layers._tracking import PROPAGATE, Averaging, ChannelLayer
from bnfast.running_averages import Momentum, checked_momentum


class CrossIterationBatchNorm(ChannelLayer, Averaging):
    """Batch normalization by the statistics of the last iterations, for small batches.

    Parameters
    ----------
    filter_shape : tuple of int
        The shape of the weights of the layer before: (C, K) of a linear layer, and of a convolution
        (C, K / groups, ...), as in PyTorch.
    window : int
        k, how many iterations are averaged, the present one included: 1 is batch norm.
    eps : float
        Added to the variance; 0 will do for evaluation only.
    momentum : float, None, or function
        The weight of the NEW batch in the running statistics; None for the plain average of all
        batches; a function as in `BatchNorm`.
    affine : bool
        Whether there are a weight and a bias.
    burn_in : int
        How many batches are normalized by their own statistics at first, while weights change fast;
        the window is filled after that. The authors take 8 epochs of 12.
    stride, padding, dilation : int, or one for each spatial axis
        Those of the convolution before; padded with zeros.
    groups : int
        The groups of that convolution.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC; samples are along axis 0.
    unbiased : bool
        Divide by M - 1 for running_var, as PyTorch does, rather than by M.
    dtype : dtype
        Of the parameters and running statistics: float32 or float64. The input may be either.
    frozen, nonfinite
        As in `BatchNorm`. A batch that is skipped leaves the window as it is, too.

    Attributes
    ----------
    weight, bias : array (C,) or None
        gamma (ones at first) and beta (zeros at first).
    running_mean, running_var : array (C,)
        Of single batches, not of the window: zeros and ones at first.
    window_filters, window_mean, window_var, window_dmean, window_dvar : array of float64
        What `bnfast.IterationStatistics` says of each of k - 1 iterations: zeros at first, and
        those that are there follow from num_batches_tracked.
    num_batches_tracked : int
        How many batches the statistics have seen, part of the state. An empty batch is none.
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
    The formulas stand in `bnfast.cross_iteration_batch_norm` and
    `bnfast.cross_iteration_batch_norm_backward`. The memory of the window is that of 3 (k - 1)
    copies of the weights, in float64. The layer keeps a reference to its last input until
    `backward` or the next call, and does not copy it.

    References
    ----------
    Z. Yao, Y. Cao, S. Zheng, G. Huang, S. Lin, 2021, "Cross-Iteration Batch Normalization",
    arXiv:2002.05712.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> rng = np.random.default_rng(0)
    >>> filters = rng.normal(size=(3, 5)).astype(np.float32)
    >>> layer = bnfast.CrossIterationBatchNorm(filters.shape, window=4)
    >>> for _ in range(10):
    ...     inputs = rng.normal(size=(2, 5)).astype(np.float32)  # of two samples
    ...     y = layer(inputs @ filters.T, inputs, filters)  # normalized as one of eight
    ...     dx = layer.backward(y)
    ...     filters -= 0.01 * dx.T @ inputs
    >>> layer.num_batches_tracked
    10
    """

    running_mean: Array
    running_var: Array
    window_filters: Array
    window_mean: Array
    window_var: Array
    window_dmean: Array
    window_dvar: Array
    num_batches_tracked: int

    unbiased = Flag()

    _window: ClassVar[Mapping[str, str]] = {
        name: f"window_{name}" for name in IterationStatistics._fields
    }
    _arrays: ClassVar[Mapping[str, str]] = {
        name: name for name in ("weight", "bias", "running_mean", "running_var", *_window.values())
    }
    _shown = (
        *("filter_shape", "window", "eps", "momentum", "affine", "burn_in", "stride", "padding"),
        *("dilation", "groups", "axis", "unbiased", "dtype"),
    )

    def __init__(
        self,
        filter_shape: tuple[int, ...],
        window: int = 4,
        eps: float = 1e-5,
        momentum: Momentum = 0.1,
        affine: bool = True,
        *,
        burn_in: int = 0,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        axis: int = 1,
        unbiased: bool = True,
        dtype: DTypeLike = np.float32,
        frozen: bool = False,
        nonfinite: str = PROPAGATE,
    ) -> None:
        shape = _validation.sizes("filter_shape", filter_shape)
        if len(shape) < 2:
            raise ValueError(
                f"filter_shape must have at least 2 sizes, those of weights, got {filter_shape}"
            )
        super().__init__(shape[0], eps, affine, axis, dtype)
        self.filter_shape = shape
        self.window = _validation.size("window", window, 1)
        self._set_averaging(checked_momentum(momentum), frozen, nonfinite)
        self.burn_in = _validation.integer_from("burn_in", burn_in, 0)
        self.stride, self.padding, self.dilation = (
            numbers[0] if len(numbers) == 1 else numbers
            for numbers in (
                _validation.integers_from("stride", stride, 1),
                _validation.integers_from("padding", padding, 0),
                _validation.integers_from("dilation", dilation, 1),
            )
        )
        self.groups = _validation.integer_from("groups", groups, 1)
        self.unbiased = unbiased
        self.running_mean = np.zeros(self.num_features, self.dtype)
        self.running_var = np.ones(self.num_features, self.dtype)
        kept = self.window - 1
        _validation.sizes("window - 1 by filter_shape", (kept, *shape))
        for name in ("filters", "dmean", "dvar"):
            setattr(self, self._window[name], np.zeros((kept, *shape)))
        for name in ("mean", "var"):
            setattr(self, self._window[name], np.zeros((kept, self.num_features)))
        self.num_batches_tracked = 0

    @in_default_float_mode
    def __call__(
        self,
        x: ArrayLikeOf[Float],
        inputs: ArrayLike | None = None,
        filters: ArrayLike | None = None,
        *,
        out: NDArray[Float] | None = None,
    ) -> NDArray[Float]:
        """Normalize a batch that the layer before has made of its inputs.

        Parameters
        ----------
        x : array of float32 or float64
            With C channels along `axis`. Keep its values for `backward`.
        inputs : array of float32 or float64
            What the layer before made `x` of, with its channels along `axis`. Not read in
            evaluation, nor of a frozen layer, nor by a window of 1.
        filters : array of float32 or float64
            The weights that made `x`, of the shape `filter_shape`. Not read either then.
        out : array like `x`, optional
            Where to write. In place, where it is `x` itself, there can be no `backward`.

        Returns
        -------
        array like `x`

        Raises
        ------
        TypeError, ValueError
            As `bnfast.cross_iteration_batch_norm` and `bnfast.IterationStatistics.of`; the layer is
            left as it was.

        Warns
        -----
        RuntimeWarning
            As `bnfast.batch_norm`.
        """
        array = self._batch(x)
        if self._observer is not None:
            self._observe(array, out)
        if not self.training or self.frozen:
            return self._evaluate(array, out, self.running_mean, self.running_var, self.eps)
        values = array.size // max(self.num_features, 1)
        _validation.enough_values("x", array, values, "channel", unbiased=self.unbiased)
        tracked = _validation.running_statistics(
            self.running_mean, self.running_var, array, self.num_features
        )
        takes = self._takes(array, self.axis)
        new = self._weight_of_new_batch() if takes else 0.0
        current = None
        if self.window > 1:
            _validation.shaped("filters", filters, self.filter_shape)
            if takes and not self._burns_in():
                current = self._statistics_of(array, inputs, filters)
        weight = self._kept_weight()
        y, saved = functional.cross_iteration_batch_norm_forward(
            *(array, filters if self.window > 1 else None, self._entries()),
            *(self.weight, self.bias, self.eps),
            axis=self.axis,
            out=out,
        )
        if takes and array.size > 0:
            self._track(tracked, new, saved, values, current)
        self._save(array, out, saved, weight, by=CrossIterationBatchNorm._gradients_of_batch)
        return y

    def _burns_in(self) -> bool:
        """Whether the next batch is left out of the window, and normalized by its own."""
        return self.num_batches_tracked < self.burn_in

    def _statistics_of(self, x: Array, inputs: object, filters: object) -> IterationStatistics:
        return IterationStatistics.of(
            *(x, inputs, filters),  # type: ignore[arg-type]  # checked there
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            axis=self.axis,
        )

    def _entries(self) -> list[IterationStatistics]:
        """Return the iterations of the window, the latest first."""
        past = self.num_batches_tracked - self.burn_in
        rows = [
            number % (self.window - 1) for number in range(max(past - self.window + 1, 0), past)
        ]
        return [
            IterationStatistics(*[getattr(self, name)[row] for name in self._window.values()])
            for row in reversed(rows)
        ]

    def _track(
        self,
        tracked: tuple[Array, Array] | None,
        new: float,
        saved: CrossIterated,
        values: int,
        current: IterationStatistics | None,
    ) -> None:
        """Take a batch into the running statistics and, where it is kept, into the window."""
        seen = self.num_batches_tracked
        if tracked is not None:
            m2, divisor = saved.batch_var * values, float(values - self.unbiased)
            _primitives.update_running(tracked, new, saved.batch_mean, m2, divisor)
        if current is not None:
            row = (seen - self.burn_in) % (self.window - 1)
            for name, array in current._asdict().items():
                getattr(self, self._window[name])[row] = array
        self.num_batches_tracked = seen + 1

    def _first_statistics(self) -> dict[str, Array | float]:
        return {
            "running_mean": 0.0,
            "running_var": 1.0,
            **dict.fromkeys(self._window.values(), 0.0),
        }

    def _gradients_of_batch(
        self,
        dy: Array,
        out: Array | None,
        x: Array,
        of_batch: CrossIterated,
        weight: Array | None,
    ) -> Gradients:
        dx, dweight, dbias = functional.cross_iteration_batch_norm_backward(
            dy, x, of_batch, weight, axis=self.axis, out=out
        )
        return dx, None if weight is None else dweight, dbias
