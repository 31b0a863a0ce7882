"""Normalizations for autograd (github.com/HIPS/autograd), differentiable any number of times.

Values, gradients and gradients of gradients are computed by bnfast's kernels, and further
derivatives by compositions of these. With xhat the normalized x, J(u) its derivative along u, and
means over the values that share statistics, all follow from three rules::

    d(xhat)   = J(dx)
    d(J(u))   = J(du) - H(u, dx)
    d(invstd) = -invstd**2 * mean(xhat * dx)

    H(u, v) = invstd * (mean(xhat * u) * J(v) + mean(xhat * v) * J(u) + xhat * mean(u * J(v)))

J is symmetric, sum(u * J(v)) = sum(v * J(u)), and so is H: sum(w * H(u, v)) stays the same however
u, v and w are exchanged. Therefore reverse and forward mode have the same formulas. Around 0, as in
RMS norm, the rules are the same; in evaluation J(u) = invstd * u, and H is 0.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import bnfast
from bnfast import _primitives, _validation
from bnfast._float_mode import in_default_float_mode
from bnfast._primitives import PER_SAMPLE
from bnfast._typing import Array

try:
    import autograd.numpy as anp
    from autograd import make_jvp, make_vjp
    from autograd.builtins import tuple as traced_tuple
    from autograd.extend import defjvp, defjvp_argnums, defvjp, defvjp_argnums, primitive, vspace
    from autograd.tracer import getval, isbox
except ImportError as error:
    raise ImportError(
        "bnfast.integrations.autograd needs autograd: python -m pip install autograd"
    ) from error

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


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
    The formula stands in `bnfast.batch_norm`, those of the derivatives in
    `bnfast.batch_norm_backward`, `bnfast.batch_norm_double_backward` and this module. A derivative
    has the dtype of what it is the derivative by; a gradient of another dtype than that of `x` is
    converted.

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

        return _forward(_Evaluation(evaluate, axis=axis), x, weight, bias)

    def forward(x: Any, weight: Any = None, bias: Any = None, **tracking: Any) -> Any:
        return bnfast.batch_norm_forward(x, weight, bias, eps, axis=axis, **tracking)

    tracking = {
        "running_mean": running_mean,
        "running_var": running_var,
        "momentum": momentum,
        "unbiased": unbiased,
    }
    return _forward(_Batch("batch_norm", forward, tracking, axis=axis), x, weight, bias)


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

        return _forward(_Evaluation(evaluate, axis=axis), x, weight, bias)

    @in_default_float_mode
    def forward(x: Any, weight: Any = None, bias: Any = None, **tracking: Any) -> Any:
        given = x, axis, weight, bias, eps
        return _primitives.normalize(*given, momentum=momentum, over=PER_SAMPLE, **tracking)

    tracking = {"running_mean": running_mean, "running_var": running_var}
    return _forward(_Samples("instance_norm", forward, tracking, axis=axis), x, weight, bias)


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

    return _forward(_Samples("group_norm", forward, axis=axis), x, weight, bias)


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

    call = _Rows("layer_norm", forward, normalized_shape=normalized_shape, axis=axis)
    return _forward(call, x, weight, bias)


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

    call = _RootMeanSquares("rms_norm", forward, normalized_shape=normalized_shape, axis=axis)
    return _forward(call, x, weight, None)


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


class _Call(ABC):
    """One call of a normalization: its passes, with the statistics that `forward` found.

    All further passes, of derivatives of any order, are given the same x.
    """

    statistics: tuple[str, ...] = ("mean", "invstd")  # as the passes call them
    upstream: tuple[str, ...] = ("ddx", "ddweight", "ddbias")
    constant = False  # whether the statistics do not depend on x
    parameter_axes: tuple[int, ...]
    split: tuple[int, ...]  # the shape of x, with an axis of groups and one of their channels
    over: tuple[int, ...]  # the axes of that along which statistics are shared

    def __init__(
        self,
        stem: str,
        run: Callable[..., Any],
        tracking: dict[str, Any] | None = None,
        **geometry: Any,
    ) -> None:
        self._stem = stem
        self._run = run
        self._tracking = tracking or {}
        self._geometry = geometry

    @abstractmethod
    def arrange(self, x: Any) -> None:
        """Set axes and shapes, of arguments that the forward pass has taken."""

    def forward(self, x: Any, weight: Any, bias: Any) -> Array:
        y: Array
        y, *saved = self._run(x, weight, bias, **self._tracking)
        self.shape, self.dtype = y.shape, y.dtype
        self._saved = dict(zip(self.statistics, saved, strict=True))
        self.arrange(x)
        self.count = max(1, math.prod(self.split[d] for d in self.over))
        return y

    def backward(self, dy: Any, x: Any, weight: Any, parameters: int) -> tuple[Array, ...]:
        """Return the gradients of x and of the first `parameters` of weight and bias."""
        found: tuple[Array, ...] = self._pass("backward", dy=self._like_x(dy), x=x, weight=weight)
        return found[: 1 + parameters]

    def double_backward(self, upstream: Any, dy: Any, x: Any, weight: Any) -> tuple[Array, ...]:
        """Return the gradients of dy, x and weight; upstream are those of what backward gave."""
        given = dict.fromkeys(self.upstream) | dict(zip(self.upstream, upstream, strict=False))
        given["ddx"] = self._like_x(upstream[0])
        given |= {"dy": self._like_x(dy), "x": x, "weight": weight}
        found: tuple[Array, ...] = self._pass("double_backward", **given)
        return found

    def jacobian(self, u: Any, x: Any) -> Array:
        """Return J(u)."""
        found: Array = self._pass("jvp", dx=self._like_x(u), x=x)
        return found

    def xhat(self, x: Any) -> Array:
        found: Array = self._run(x)[0]
        return found

    def invstd(self, x: Any) -> Array:
        """Return invstd, such that it broadcasts against the split x."""
        shape = [1 if d in self.over else n for d, n in enumerate(self.split)]
        invstd: Array = self._saved[self.statistics[-1]]
        return invstd.astype(self.dtype).reshape(shape)

    def _pass(self, kind: str, **given: Any) -> Any:
        return getattr(bnfast, f"{self._stem}_{kind}")(**given, **self._saved, **self._geometry)

    def _like_x(self, values: Any) -> Array:
        return np.asarray(values, self.dtype)

    def mean(self, values: Any) -> Any:
        """Return the means, over a split array, of what shares statistics; they broadcast."""
        return anp.sum(values, axis=self.over, keepdims=True) / self.count

    def spread(self, parameter: Any) -> Any:
        """Return a parameter such that it broadcasts against x."""
        if parameter is None:
            return 1.0
        axes = self.parameter_axes
        sizes = [1] * (len(self.shape) - len(axes)) + [self.shape[d] for d in axes]
        moved = anp.moveaxis(anp.reshape(parameter, sizes), _last(len(axes)), axes)
        return _cast(moved, self.dtype)

    def gather(self, values: Any) -> Any:
        """Return the sums of what shares a parameter."""
        axes = self.parameter_axes
        moved = anp.moveaxis(values, axes, _last(len(axes)))
        return anp.sum(moved, axis=tuple(range(len(self.shape) - len(axes))))


def _last(axes: int) -> tuple[int, ...]:
    return tuple(range(-axes, 0))


class _Batch(_Call):
    def arrange(self, x: Any) -> None:
        axis = self._geometry["axis"] % len(self.shape)
        self.parameter_axes = (axis,)
        self.split = self.shape
        self.over = tuple(d for d in range(len(self.split)) if d != axis)


class _Evaluation(_Batch):
    constant = True

    def __init__(self, run: Callable[..., Any], axis: int) -> None:
        super().__init__("batch_norm", run, axis=axis, training=False)

    def xhat(self, x: Any) -> Array:
        mean, invstd = self._saved.values()
        with np.errstate(all="ignore"):
            variance = invstd**-2.0
        return bnfast.batch_norm(x, mean, variance, eps=0.0, axis=self._geometry["axis"])


class _Samples(_Call):
    def arrange(self, x: Any) -> None:
        axis = self._geometry["axis"] % len(self.shape)
        groups = self._saved["mean"].shape[1]
        self.parameter_axes = (axis,)
        self.split = (
            *self.shape[:axis],
            groups,
            self.shape[axis] // max(1, groups),
            *self.shape[axis + 1 :],
        )
        self.over = tuple(d for d in range(len(self.split)) if d not in (0, axis))


class _Rows(_Call):
    def arrange(self, x: Any) -> None:
        _, self.parameter_axes = _validation.normalized_axes(x, **self._geometry)
        self.split, self.over = self.shape, self.parameter_axes

    def backward(self, dy: Any, x: Any, weight: Any, parameters: int) -> tuple[Array, ...]:
        given = {"dy": self._like_x(dy), "x": x, "weight": weight}
        found: tuple[Array, ...] = self._pass("backward", **given, parameters=parameters > 0)
        return found[: 1 + parameters]


class _RootMeanSquares(_Rows):
    statistics = ("invrms",)
    upstream = ("ddx", "ddweight")


# autograd's own has no forward mode.
_cast = primitive(lambda values, dtype: np.asarray(values, dtype))


def _traced(name: str) -> Any:
    """Return a pass as a function of the call and its arrays, by which autograd differentiates."""

    def function(call: _Call, *arrays: Any) -> Any:
        return getattr(call, name)(*arrays)

    return primitive(function)


_forward = _traced("forward")
_backward = _traced("backward")
_double_backward = _traced("double_backward")
_xhat = _traced("xhat")
_jacobian = _traced("jacobian")
_invstd = _traced("invstd")


def _second(call: _Call, u: Any, v: Any, x: Any) -> Any:
    """Return H(u, v)."""
    if call.constant:
        return np.zeros(call.shape, call.dtype)
    values = _xhat(call, x), _jacobian(call, u, x), _jacobian(call, v, x), u, v
    xhat, of_u, of_v, u, v = (anp.reshape(value, call.split) for value in values)
    terms = call.mean(xhat * u) * of_v + call.mean(xhat * v) * of_u + xhat * call.mean(u * of_v)
    return anp.reshape(_invstd(call, x) * terms, call.shape)


def _double_backward_of(call: _Call, upstream: Any, dy: Any, x: Any, weight: Any) -> Any:
    """Return what `_double_backward` does, of functions whose derivatives are known."""
    ddx, scale = upstream[0], call.spread(weight)
    of_ddx = _jacobian(call, ddx, x)
    ddy = scale * of_ddx
    dx = -_second(call, scale * dy, ddx, x)
    if len(upstream) > 1:
        ddweight = call.spread(upstream[1])
        ddy = ddy + ddweight * _xhat(call, x)
        dx = dx + _jacobian(call, ddweight * dy, x)
    if len(upstream) > 2:
        ddy = ddy + call.spread(upstream[2])
    return traced_tuple((ddy, dx, call.gather(dy * of_ddx)))


def _forward_vjp(argnums: Sequence[int], ans: Any, args: Any, kwargs: Any) -> Any:
    call, x, weight, _ = args

    def vjp(g: Any) -> list[Any]:
        gradients = _backward(call, g, x, weight, max(argnums) - 1)
        return [gradients[n - 1] for n in argnums]

    return vjp


def _backward_vjp(argnums: Sequence[int], ans: Any, args: Any, kwargs: Any) -> Any:
    call, dy, x, weight, _ = args

    def vjp(g: Any) -> list[Any]:
        gradients = _double_backward(call, g, dy, x, weight)
        return [gradients[n - 1] for n in argnums]

    return vjp


def _backward_jvp(argnums: Sequence[int], gs: Any, ans: Any, args: Any, kwargs: Any) -> Any:
    """Return the tangents of gradients.

    Second derivatives of sum(dy * y) are symmetric: along directions of x and weight they are the
    gradients by x and weight of what backward returned, times these directions.
    """
    call, dy, x, weight, parameters = args
    along = dict(zip(argnums, gs, strict=True))
    tangents = []
    if 1 in along:
        tangents.append(_backward(call, along[1], x, weight, parameters))
    if 2 in along or 3 in along:
        upstream = [along.get(2, np.zeros(call.shape, call.dtype))]
        if 3 in along:
            upstream.append(along[3])
        _, of_x, of_weight = _double_backward(call, traced_tuple(upstream), dy, x, weight)
        of_bias = np.zeros([call.shape[d] for d in call.parameter_axes], call.dtype)
        tangents.append(traced_tuple([of_x, of_weight, of_bias][: 1 + parameters]))
    return functools.reduce(vspace(ans).add, tangents)


def _double_backward_vjp(argnums: Sequence[int], ans: Any, args: Any, kwargs: Any) -> Any:
    def vjp(g: Any) -> Any:
        return make_vjp(_double_backward_of, argnums)(*args)[0](g)

    return vjp


def _double_backward_jvp(argnums: Sequence[int], gs: Any, ans: Any, args: Any, kwargs: Any) -> Any:
    _, tangent = make_jvp(_double_backward_of, argnums)(*args)(tuple(gs))
    return tangent


def _invstd_vjp(ans: Any, call: _Call, x: Any) -> Any:
    def vjp(g: Any) -> Any:
        xhat = anp.reshape(_xhat(call, x), call.split)
        return anp.reshape(-(_invstd(call, x) ** 2) * xhat * g / call.count, call.shape)

    return vjp


def _invstd_jvp(g: Any, ans: Any, call: _Call, x: Any) -> Any:
    return -(_invstd(call, x) ** 2) * call.mean(anp.reshape(_xhat(call, x) * g, call.split))


defvjp(_cast, lambda ans, values, dtype: lambda g: _cast(g, values.dtype))
defjvp(_cast, lambda g, ans, values, dtype: _cast(g, dtype))
defvjp_argnums(_forward, _forward_vjp)
defjvp(
    _forward,
    None,
    lambda g, ans, call, x, weight, bias: call.spread(weight) * _jacobian(call, g, x),
    lambda g, ans, call, x, weight, bias: call.spread(g) * _xhat(call, x),
    lambda g, ans, call, x, weight, bias: anp.broadcast_to(call.spread(g), call.shape),
)
defvjp_argnums(_backward, _backward_vjp)
defjvp_argnums(_backward, _backward_jvp)
defvjp_argnums(_double_backward, _double_backward_vjp)
defjvp_argnums(_double_backward, _double_backward_jvp)
defvjp(_xhat, None, lambda ans, call, x: lambda g: _jacobian(call, g, x))
defjvp(_xhat, None, lambda g, ans, call, x: _jacobian(call, g, x))
defvjp(
    _jacobian,
    None,
    lambda ans, call, u, x: lambda g: _jacobian(call, g, x),
    lambda ans, call, u, x: lambda g: -_second(call, u, g, x),
)
defjvp(
    _jacobian,
    None,
    lambda g, ans, call, u, x: _jacobian(call, g, x),
    lambda g, ans, call, u, x: -_second(call, u, g, x),
)
defvjp(_invstd, None, _invstd_vjp)
defjvp(_invstd, None, _invstd_jvp)
