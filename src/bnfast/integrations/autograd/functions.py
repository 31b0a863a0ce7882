"""What users call: the functions of bnfast, of what autograd traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd.tracer import getval, isbox

import bnfast
from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._primitives import PER_SAMPLE
from bnfast._typing import Array
from bnfast.integrations.autograd._calls import Batch, Evaluation, RootMeanSquares, Rows, Samples
from bnfast.integrations.autograd._rules import traced_forward


def batch_norm(
    x: Any,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    unbiased: bool = True,
) -> Any:
    """Return what `bnfast.batch_norm` does, differentiable by `x`, `weight` and `bias`.

    Parameters
    ----------
    x : array of float32 or float64, at least 2-d
        The batch.
    running_mean, running_var : array (C,) of float32 or float64, or None
        Plain arrays, and constants of all derivatives. In training they are updated in place each
        time the function is called.
    weight, bias : array (C,) of float32 or float64, optional
        gamma and beta.
    training, momentum, eps, axis, unbiased
        As in `bnfast.batch_norm`.

    Returns
    -------
    array like `x`
        The normalized batch.

    Raises
    ------
    TypeError, ValueError
        As `bnfast.batch_norm`.

    Notes
    -----
    The formula stands in `bnfast.batch_norm`, those of the first two derivatives in
    `bnfast.batch_norm_backward` and `bnfast.batch_norm_double_backward`, and the rules of all
    further ones in ``bnfast/integrations/autograd/_rules.py``. A derivative has the dtype of what
    it is the derivative by; a gradient of another dtype than that of `x` is converted.

    References
    ----------
    S. Ioffe, C. Szegedy, 2015, arXiv:1502.03167.

    Examples
    --------
    >>> import autograd.numpy as anp
    >>> from autograd import grad
    >>> from bnfast.integrations.autograd import batch_norm
    >>> x = anp.array([[1.0], [2.0], [6.0]])
    >>> loss = lambda x: anp.sum(batch_norm(x, None, None, training=True)[0] ** 3)
    >>> grad(loss)(x).round(4).ravel()
    array([ 0.4535, -0.5668,  0.1134])
    """
    _refuse_traced(running_mean=running_mean, running_var=running_var)
    if not _validation.flag("training", training):

        def evaluate(x: Any, weight: Any = None, bias: Any = None) -> tuple[Array, Array, Array]:
            y = bnfast.batch_norm(
                *(x, running_mean, running_var, weight, bias, False, momentum, eps),
                axis=axis,
                unbiased=unbiased,
            )
            return y, *_copies(running_mean, running_var, eps)

        return traced_forward(Evaluation(evaluate, axis=axis), x, weight, bias)

    def forward(x: Any, weight: Any = None, bias: Any = None, **tracking: Any) -> Any:
        return bnfast.batch_norm_forward(x, weight, bias, eps, axis=axis, **tracking)

    tracking = {
        "running_mean": running_mean,
        "running_var": running_var,
        "momentum": momentum,
        "unbiased": unbiased,
    }
    return traced_forward(Batch("batch_norm", forward, tracking, axis=axis), x, weight, bias)


def instance_norm(
    x: Any,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
) -> Any:
    """Return what `bnfast.instance_norm` does, differentiable by `x`, `weight` and `bias`.

    Parameters
    ----------
    x : array (N, C, ...) of float32 or float64, at least 2-d
        The samples.
    running_mean, running_var : array (C,) of float32 or float64, or None
        As in `batch_norm`, with `use_input_stats` for `training`.
    weight, bias : array (C,) of float32 or float64, optional
        gamma and beta.
    use_input_stats, momentum, eps, axis
        As in `bnfast.instance_norm`.

    Returns
    -------
    array like `x`
        The normalized samples.

    Raises
    ------
    TypeError, ValueError
        As `bnfast.instance_norm`.

    Notes
    -----
    The formula stands in `bnfast.instance_norm`; for the derivatives see `batch_norm`.

    References
    ----------
    D. Ulyanov, A. Vedaldi, V. Lempitsky, 2016, arXiv:1607.08022.

    Examples
    --------
    >>> import autograd.numpy as anp
    >>> from autograd import grad
    >>> from bnfast.integrations.autograd import instance_norm
    >>> x = anp.array([[[1.0, 2.0, 6.0]]])
    >>> grad(lambda x: instance_norm(x)[0, 0, 0])(x).round(4)
    array([[[ 0.1763, -0.2204,  0.0441]]])
    """
    _refuse_traced(running_mean=running_mean, running_var=running_var)
    if not _validation.flag("use_input_stats", use_input_stats):

        def evaluate(x: Any, weight: Any, bias: Any) -> tuple[Array, Array, Array]:
            y = bnfast.instance_norm(
                *(x, running_mean, running_var, weight, bias, False, momentum, eps), axis=axis
            )
            return y, *_copies(running_mean, running_var, eps)

        return traced_forward(Evaluation(evaluate, axis=axis), x, weight, bias)

    @in_default_float_mode
    def forward(x: Any, weight: Any = None, bias: Any = None, **tracking: Any) -> Any:
        given = x, axis, weight, bias, eps
        return _primitives.normalize(*given, momentum=momentum, over=PER_SAMPLE, **tracking)

    tracking = {"running_mean": running_mean, "running_var": running_var}
    return traced_forward(Samples("instance_norm", forward, tracking, axis=axis), x, weight, bias)


def group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    per_group: bool = False,
) -> Any:
    """Return what `bnfast.group_norm` does, differentiable by `x`, `weight` and `bias`.

    Parameters
    ----------
    x : array (N, C, ...) of float32 or float64, at least 2-d
        The samples.
    num_groups : int
        G, which divides C.
    weight, bias : array (C,) of float32 or float64, or (G,) with `per_group`, optional
        gamma and beta.
    eps, axis, per_group
        As in `bnfast.group_norm`.

    Returns
    -------
    array like `x`
        The normalized samples.

    Raises
    ------
    TypeError, ValueError
        As `bnfast.group_norm`.

    Notes
    -----
    The formula stands in `bnfast.group_norm`; for the derivatives see `batch_norm`.

    References
    ----------
    Y. Wu, K. He, 2018, arXiv:1803.08494.

    Examples
    --------
    >>> import autograd.numpy as anp
    >>> from autograd import grad
    >>> from bnfast.integrations.autograd import group_norm
    >>> x = anp.array([[1.0, 3.0, 10.0, 31.0]])
    >>> grad(lambda w: anp.sum(group_norm(x, 2, w) ** 2))(anp.ones(4)).round(3)
    array([2., 2., 2., 2.])
    """
    if _validation.flag("per_group", per_group):
        _, channels = _validation.channel_axis_of_samples(getval(x), axis)
        together = _validation.channels_of_group(num_groups, channels)
        weight, bias = (
            _of_channels(name, parameter, channels, together)
            for name, parameter in (("weight", weight), ("bias", bias))
        )

    def forward(x: Any, weight: Any = None, bias: Any = None) -> Any:
        return bnfast.group_norm_forward(x, num_groups, weight, bias, eps, axis=axis)

    return traced_forward(Samples("group_norm", forward, axis=axis), x, weight, bias)


def layer_norm(
    x: Any,
    normalized_shape: int | Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *,
    axis: int | Sequence[int] | None = None,
) -> Any:
    """Return what `bnfast.layer_norm` does, differentiable by `x`, `weight` and `bias`.

    Parameters
    ----------
    x : array of float32 or float64
        The rows.
    weight, bias : array of `normalized_shape`, of float32 or float64, optional
        gamma and beta.
    normalized_shape, eps, axis
        As in `bnfast.layer_norm`.

    Returns
    -------
    array like `x`
        The normalized rows.

    Raises
    ------
    TypeError, ValueError
        As `bnfast.layer_norm`.

    Notes
    -----
    The formula stands in `bnfast.layer_norm`; for the derivatives see `batch_norm`.

    References
    ----------
    J. L. Ba, J. R. Kiros, G. E. Hinton, 2016, arXiv:1607.06450.

    Examples
    --------
    >>> import autograd.numpy as anp
    >>> from autograd import grad
    >>> from bnfast.integrations.autograd import layer_norm
    >>> x = anp.array([[1.0, 2.0, 6.0]])
    >>> grad(lambda x: layer_norm(x, 3)[0, 0])(x).round(4)
    array([[ 0.1763, -0.2204,  0.0441]])
    """

    def forward(x: Any, weight: Any = None, bias: Any = None) -> Any:
        return bnfast.layer_norm_forward(x, normalized_shape, weight, bias, eps, axis=axis)

    call = Rows("layer_norm", forward, normalized_shape=normalized_shape, axis=axis)
    return traced_forward(call, x, weight, bias)


def rms_norm(
    x: Any,
    normalized_shape: int | Sequence[int],
    weight: Any = None,
    eps: float | None = None,
    *,
    axis: int | Sequence[int] | None = None,
) -> Any:
    """Return what `bnfast.rms_norm` does, differentiable by `x` and `weight`.

    Parameters
    ----------
    x : array of float32 or float64
        The rows.
    weight : array of `normalized_shape`, of float32 or float64, optional
        gamma.
    normalized_shape, eps, axis
        As in `bnfast.rms_norm`.

    Returns
    -------
    array like `x`
        The normalized rows.

    Raises
    ------
    TypeError, ValueError
        As `bnfast.rms_norm`.

    Notes
    -----
    The formula stands in `bnfast.rms_norm`; for the derivatives see `batch_norm`.

    References
    ----------
    B. Zhang, R. Sennrich, 2019, arXiv:1910.07467.

    Examples
    --------
    >>> import autograd.numpy as anp
    >>> from autograd import grad
    >>> from bnfast.integrations.autograd import rms_norm
    >>> x = anp.array([[3.0, 4.0]])
    >>> grad(lambda x: rms_norm(x, 2)[0, 0])(x).round(4)
    array([[ 0.181 , -0.1358]])
    """

    def forward(x: Any, weight: Any = None, bias: None = None) -> Any:
        return bnfast.rms_norm_forward(x, normalized_shape, weight, eps, axis=axis)

    call = RootMeanSquares("rms_norm", forward, normalized_shape=normalized_shape, axis=axis)
    return traced_forward(call, x, weight, None)


def _refuse_traced(**statistics: Any) -> None:
    for name, statistic in statistics.items():
        if isbox(statistic):
            raise TypeError(f"{name} must be a plain array, got one to differentiate by")


def _copies(mean: Any, variance: Any, eps: float) -> tuple[Array, Array]:
    """Return mean and invstd of running statistics, which training may change before they serve."""
    with np.errstate(all="ignore"):
        return np.array(mean, np.float64), 1.0 / np.sqrt(np.asarray(variance, np.float64) + eps)


def _of_channels(name: str, parameter: Any, channels: int, together: int) -> Any:
    """Return the parameter of each group for each of its channels."""
    if _validation.of_each_channel(name, getval(parameter), channels, together) is None:
        return None
    return anp.repeat(parameter, together)
