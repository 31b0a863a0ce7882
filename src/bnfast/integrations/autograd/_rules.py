"""The derivatives of each pass.

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
from collections.abc import Sequence
from typing import Any

import autograd.numpy as anp
import numpy as np
from autograd import make_jvp, make_vjp
from autograd.builtins import tuple as traced_tuple
from autograd.extend import defjvp, defjvp_argnums, defvjp, defvjp_argnums, primitive, vspace

from bnfast.integrations.autograd._calls import Call


def _traced(name: str) -> Any:
    """Return a pass as a function of the call and its arrays, by which autograd differentiates."""

    def function(call: Call, *arrays: Any) -> Any:
        return getattr(call, name)(*arrays)

    return primitive(function)


traced_forward = _traced("forward")
_backward = _traced("backward")
_double_backward = _traced("double_backward")
_xhat = _traced("xhat")
_jacobian = _traced("jacobian")
_invstd = _traced("invstd")


def _second(call: Call, u: Any, v: Any, x: Any) -> Any:
    """Return H(u, v)."""
    if call.constant:
        return np.zeros(call.shape, call.dtype)
    values = _xhat(call, x), _jacobian(call, u, x), _jacobian(call, v, x), u, v
    xhat, of_u, of_v, u, v = (anp.reshape(value, call.split) for value in values)
    terms = call.mean(xhat * u) * of_v + call.mean(xhat * v) * of_u + xhat * call.mean(u * of_v)
    return anp.reshape(_invstd(call, x) * terms, call.shape)


def _double_backward_of(call: Call, upstream: Any, dy: Any, x: Any, weight: Any) -> Any:
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


def _invstd_vjp(ans: Any, call: Call, x: Any) -> Any:
    def vjp(g: Any) -> Any:
        xhat = anp.reshape(_xhat(call, x), call.split)
        return anp.reshape(-(_invstd(call, x) ** 2) * xhat * g / call.count, call.shape)

    return vjp


def _invstd_jvp(g: Any, ans: Any, call: Call, x: Any) -> Any:
    return -(_invstd(call, x) ** 2) * call.mean(anp.reshape(_xhat(call, x) * g, call.split))


defvjp_argnums(traced_forward, _forward_vjp)
defjvp(
    traced_forward,
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
