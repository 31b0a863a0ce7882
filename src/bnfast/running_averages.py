"""Running averages: what each batch weighs in the running statistics of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from bnfast import _validation
from bnfast._conventions import KERAS
from bnfast._float_mode import in_default_float_mode

AnyByName = TypeVar("AnyByName", bound="_ByName")


class _ByName:
    """What takes a weight by its name only: frameworks mean different weights by momentum."""

    def __new__(cls: type[AnyByName], *unnamed: Any, **_: Any) -> AnyByName:
        if unnamed:
            raise TypeError(
                f"the weight must be given by name, new= of the new batch or old= of the old "
                f"statistics, got {unnamed[0]!r} without a name"
            )
        return super().__new__(cls)


@dataclass(frozen=True, kw_only=True)
class ExponentialAverage(_ByName):
    """Running statistics that forget old batches exponentially, as the `momentum` of a layer.

    Parameters
    ----------
    new : float, optional
        The weight of the NEW batch, from 0 to 1: what PyTorch calls momentum.
    old : float, optional
        The weight of the OLD statistics, from 0 to 1: what Keras, Flax and ONNX call momentum.
        Either `new` or `old` is given.
    bias_corrected : bool
        Leave out what the running statistics began as, as Adam and Haiku do: the first batch
        weighs 1, later ones less and less, down to `new`, which must be above 0.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value; or both weights, neither, or one without its
        name.

    Notes
    -----
    Of batch number t = 1, 2, ..., with the weight a of the new batch::

        running = (1 - a) * running + a * batch

    The bias-corrected average is s_t / (1 - (1 - a)**t), where s_0 = 0 and
    s_t = (1 - a) * s_(t-1) + a * batch. It is the same as giving batch t the weight::

        a_t = a / (1 - (1 - a)**t)

    so that the running statistics themselves are the corrected ones, and need no further state than
    the number of batches.

    References
    ----------
    D. Kingma, J. Ba, 2014, "Adam: A Method for Stochastic Optimization", arXiv:1412.6980,
    section 3.

    Examples
    --------
    >>> import bnfast
    >>> bnfast.ExponentialAverage(old=0.75)(1)
    0.25
    >>> corrected = bnfast.ExponentialAverage(new=0.5, bias_corrected=True)
    >>> [round(corrected(number), 3) for number in (1, 2, 3)]
    [1.0, 0.667, 0.571]
    >>> layer = bnfast.BatchNorm(3, momentum=corrected)
    """

    new: float | None = None
    old: float | None = None
    bias_corrected: bool = False

    def __post_init__(self) -> None:
        if (self.new is None) == (self.old is None):
            raise TypeError("either new or old must be given, the weight of one of the two")
        _validation.flag("bias_corrected", self.bias_corrected)
        weight = self._weight()
        if self.bias_corrected and weight == 0.0:
            raise ValueError("the weight of the new batch must be above 0 to be bias-corrected")

    def _weight(self) -> float:
        if self.old is None:
            return _validation.share("new", self.new)
        return KERAS.weight_of_new_batch(_validation.share("old", self.old))

    @in_default_float_mode
    def __call__(self, number: int) -> float:
        """Return the weight of a batch, counted from 1."""
        weight = self._weight()
        if not self.bias_corrected or weight == 1.0:
            return weight
        # The quotient of the first batch may round to just above 1.
        return min(weight / -math.expm1(number * math.log1p(-weight)), 1.0)


@dataclass(frozen=True)
class CumulativeAverage:
    """Running statistics that are the plain average of all batches, as the `momentum` of a layer.

    The same as ``momentum=None``, where that means this.

    Examples
    --------
    >>> import bnfast
    >>> bnfast.CumulativeAverage()(4)
    0.25
    """

    @in_default_float_mode
    def __call__(self, number: int) -> float:
        """Return the weight of a batch, counted from 1."""
        return 1.0 / number


@dataclass(frozen=True)
class LearnableMomentum:
    """A momentum that is trained with the weight and the bias, as the `momentum` of a layer.

    A construct of this library, which no paper describes. `BatchNorm`, `GhostBatchNorm` and
    `ConditionalBatchNorm` take it.

    Parameters
    ----------
    initial : float
        The weight of the new batch at first, between 0 and 1.
    per_channel : bool
        Whether each channel has a momentum of its own.

    Raises
    ------
    TypeError, ValueError
        For an argument of the wrong type or value.

    Notes
    -----
    The layer has the parameter ``momentum_logit``, (1,) or (C,), part of its state, and
    ``backward`` sets ``momentum_logit_grad``. In training the loss sees the running statistics
    once the batch has been blended in, just what evaluation would see after that batch::

        a            = 1 / (1 + exp(-momentum_logit))
        running_mean = (1 - a) * running_mean + a * mu
        running_var  = (1 - a) * running_var  + a * var     (divided as the layer's `unbiased` says)
        y            = weight * (x - running_mean) / sqrt(running_var + eps) + bias

    The first batch has nothing to be blended with, and weighs 1. The gradient is that of this step:
    what the running statistics were before is a constant to it. With g = weight * dy and
    s = 1 / sqrt(running_var + eps), sums over all axes but that of the channels (for one momentum,
    over that as well), and old for before::

        dmean  = -s * sum(g)
        dvar   = -s**2 / 2 * sum(g * (x - running_mean) * s)
        dlogit = a * (1 - a) * (dmean * (mu - old_mean) + dvar * (var - old_var))
        dx     = s * g + a * dmean / M + a * dvar * 2 * (x - mu) / (M - 1)

    (M where the layer is not `unbiased`). In evaluation and of a first batch, dlogit is 0. Momentum
    batch normalization is related, whose momentum follows a schedule.

    References
    ----------
    Related: H. Yong, J. Huang, D. Meng, X. Hua, L. Zhang, 2020, "Momentum Batch Normalization for
    Deep Learning with Small Batch Size", ECCV.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> layer = bnfast.BatchNorm(3, momentum=bnfast.LearnableMomentum(0.25, per_channel=True))
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (2, 16, 3)).astype(np.float32)
    >>> y = layer(x[0]), layer(x[1])
    >>> dx = layer.backward(x[0])
    >>> layer.momentum_logit -= 0.1 * layer.momentum_logit_grad
    """

    initial: float = 0.1
    per_channel: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < _validation.real("initial", self.initial) < 1.0:
            raise ValueError(f"initial must be between 0 and 1, got {self.initial}")
        _validation.flag("per_channel", self.per_channel)

    @property
    @in_default_float_mode
    def initial_logit(self) -> float:
        """The logit of `initial`."""
        return math.log(self.initial) - math.log1p(-self.initial)


# A number, from 0 to 1, is the weight of the new batch; a function returns that of a batch, counted
# from 1.
Momentum: TypeAlias = float | Callable[[int], float] | LearnableMomentum | None


def checked_momentum(momentum: object, *, learnable: bool = False, none: bool = True) -> Momentum:
    """Return the momentum of a layer, or refuse it.

    Parameters
    ----------
    momentum : Momentum
        Of any kind.
    learnable : bool
        Whether the layer can learn it.
    none : bool
        Whether it may be None, which means two things in other layers.

    Returns
    -------
    Momentum
    """
    if isinstance(momentum, type):
        raise TypeError(
            f"momentum must be an object of a class, such as CumulativeAverage(), got the class "
            f"{momentum.__name__} itself"
        )
    if isinstance(momentum, LearnableMomentum):
        if not learnable:
            raise TypeError(
                "momentum can be a LearnableMomentum of BatchNorm, GhostBatchNorm and "
                "ConditionalBatchNorm only"
            )
        return momentum
    if callable(momentum) or (none and momentum is None):
        return momentum
    return _validation.share("momentum", momentum)


def weight_of_new_batch(momentum: Momentum, number: int) -> float:
    """Return the weight of a batch in the running statistics.

    Parameters
    ----------
    momentum : Momentum
        A number, a function of the number of the batch, or None for the plain average of all
        batches so far.
    number : int
        How many batches there are, the new one included.

    Returns
    -------
    float
    """
    if momentum is None:
        return 1.0 / number
    if callable(momentum):
        return _validation.share(f"momentum({number})", momentum(number))
    return _validation.share("momentum", momentum)
