"""Moving average batch normalization as a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bnfast import _moving_average, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, Float
from bnfast.functional import MovingAveraged
from bnfast.layers._layer import Gradients
from bnfast.layers._tracking import PROPAGATE, Averaging, ChannelLayer
from bnfast.running_averages import Momentum, checked_momentum


class MovingAverageBatchNorm(ChannelLayer, Averaging):
    """Batch normalization by moving averages, forward and backward, for small batches.

    Parameters
    ----------
    num_features : int
        C, the number of channels.
    buffer_size : int
        m, how many batches the simple moving averages are of, forward and backward: the batch size
        to simulate, divided by that of a batch.
    eps : float
        Added to the mean square; 0 will do for evaluation only.
    momentum : float or function
        The weight of the NEW batch in `running_var`; the authors call its complement momentum. A
        function as in `BatchNorm`.
    affine : bool
        Whether there are a weight and a bias.
    warm_up : int
        How many batches are normalized by their own mean square at first; at least m are.
    renormalized_from : int
        How many batches there are before batches are corrected towards `running_var`; they are not
        during the warm-up.
    r_max : float
        How far they are corrected then: at least 1, which is not at all.
    axis : int
        The channel axis: 1 for NCHW, -1 for NHWC.
    dtype : dtype
        Of the parameters and statistics: float32 or float64. The input may be either.
    frozen, nonfinite
        As in `BatchNorm`. A batch that is skipped leaves both buffers as they are, too.

    Attributes
    ----------
    weight, bias : array (C,) or None
        gamma (ones at first) and beta (zeros at first).
    running_var : array (C,)
        The exponential moving average of the mean square: ones at first.
    square_buffer, gradient_buffer : array (m, C)
        The mean squares of the last batches, and the statistics of their gradients: zeros at first.
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
    The formulas stand in `bnfast.moving_average_batch_norm` and
    `bnfast.moving_average_batch_norm_backward`. The weights of the layer before are to be
    centralized: `bnfast.weight_centralization`. Every batch in training needs its `backward`: the
    row of one without it keeps the statistics of the batch m batches before.

    The layer keeps a reference to its last input until `backward` or the next call, and does not
    copy it.

    References
    ----------
    J. Yan, R. Wan, X. Zhang, W. Zhang, Y. Wei, J. Sun, 2020, "Towards Stabilizing Batch Statistics
    in Backward Propagation of Batch Normalization", arXiv:2001.06838; the defaults are those of the
    authors' code, github.com/megvii-model/MABN, whose warm-up is one batch shorter.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.MovingAverageBatchNorm(1, 2, warm_up=0)
    >>> for size in (1.0, 3.0, 5.0):
    ...     y = layer(np.array([[size], [-size]], np.float32))
    >>> y.round(3)  # divided by the root of (9 + 25) / 2
    array([[ 1.213],
           [-1.213]], dtype=float32)
    >>> layer.square_buffer, layer.num_batches_tracked
    (array([[25.],
           [ 9.]], dtype=float32), 3)
    """

    running_var: Array
    square_buffer: Array
    gradient_buffer: Array
    num_batches_tracked: int

    _arrays: ClassVar[Mapping[str, str]] = {
        name: name for name in ("weight", "bias", "running_var", "square_buffer", "gradient_buffer")
    }
    _running = ("running_var",)
    _buffers: ClassVar[tuple[str, ...]] = ("square_buffer", "gradient_buffer")
    _shown = (
        *("num_features", "buffer_size", "eps", "momentum", "affine", "warm_up"),
        *("renormalized_from", "r_max", "axis", "dtype"),
    )

    def __init__(
        self,
        num_features: int,
        buffer_size: int = 16,
        eps: float = 1e-5,
        momentum: Momentum = 0.02,
        affine: bool = True,
        *,
        warm_up: int = 100,
        renormalized_from: int = 1000,
        r_max: float = 5.0,
        axis: int = 1,
        dtype: DTypeLike = np.float32,
        frozen: bool = False,
        nonfinite: str = PROPAGATE,
    ) -> None:
        super().__init__(num_features, eps, affine, axis, dtype)
        self.buffer_size = _validation.size("buffer_size", buffer_size, 1)
        _validation.sizes("buffer_size by num_features", (self.buffer_size, self.num_features))
        self._set_averaging(checked_momentum(momentum, none=False), frozen, nonfinite)
        self.warm_up = _validation.integer_from("warm_up", warm_up, 0)
        self.renormalized_from = _validation.integer_from("renormalized_from", renormalized_from, 0)
        self.r_max = _validation.factor_limit("r_max", r_max)
        self.running_var = np.ones(self.num_features, self.dtype)
        self.square_buffer = np.zeros((self.buffer_size, self.num_features), self.dtype)
        self.gradient_buffer = np.zeros((self.buffer_size, self.num_features), self.dtype)
        self.num_batches_tracked = 0

    @in_default_float_mode
    def __call__(
        self, x: ArrayLikeOf[Float], *, out: NDArray[Float] | None = None
    ) -> NDArray[Float]:
        """Normalize a batch.

        Parameters
        ----------
        x : array of float32 or float64
            With `num_features` channels along `axis`. Keep its values for `backward`.
        out : array like `x`, optional
            Where to write. In place, where it is `x` itself, there can be no `backward`.

        Returns
        -------
        array like `x`

        Raises
        ------
        TypeError, ValueError
            As `bnfast.moving_average_batch_norm`; the layer is left as it was.
        """
        array = self._batch(x)
        if self._observer is not None:
            self._observe(array, out)
        if not self.training or self.frozen:
            zeros = np.zeros(self.num_features)
            return self._evaluate(array, out, zeros, self.running_var, self.eps)
        takes = self._takes(array, self.axis)
        new = self._weight_of_new_batch() if takes else 0.0
        seen, weight = self.num_batches_tracked, self._kept_weight()
        y, saved = _moving_average.normalize(
            *(array, self.running_var, self.square_buffer, self.weight, self.bias, new, self.eps),
            *(seen % self.buffer_size, self._averages(), self._largest_correction()),
            *(self.axis, out, takes),
        )
        if takes and array.size > 0:
            self.num_batches_tracked += 1
        kept = MovingAveraged(*saved), self.gradient_buffer, weight, takes
        self._save(array, out, *kept, by=MovingAverageBatchNorm._gradients_of_batch)
        return y

    def _averages(self) -> bool:
        """Whether the next batch is normalized by the average of the buffer."""
        return self.num_batches_tracked >= max(self.warm_up, self.buffer_size)

    def _largest_correction(self) -> float:
        """Return how far the next batch is corrected."""
        corrects = self.num_batches_tracked >= max(self.warm_up, self.renormalized_from)
        return self.r_max if corrects else 1.0

    def _are_finite(self, mean: Array, m2: Array) -> NDArray[np.bool_]:
        with np.errstate(all="ignore"):
            finite: NDArray[np.bool_] = np.isfinite(mean**2 + m2)
        return finite

    def _first_statistics(self) -> dict[str, Array | float]:
        return {"running_var": 1.0, "square_buffer": 0.0, "gradient_buffer": 0.0}

    def _gradients_of_batch(
        self,
        dy: Array,
        out: Array | None,
        x: Array,
        of_batch: MovingAveraged,
        buffer: Array,
        weight: Array | None,
        tracks: bool,
    ) -> Gradients:
        dx, dweight, dbias = _moving_average.gradient(
            dy, x, of_batch, buffer, weight, self.axis, out, tracks
        )
        return dx, None if weight is None else dweight, dbias
