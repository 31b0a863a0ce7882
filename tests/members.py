"""Every normalization that has statistics of its input, called alike, beside its definition."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import bnfast
from bnfast import _reference as reference
from bnfast import _reference_cross_batch as reference_cross_batch
from bnfast.functional import MovingAveraged
from oracle import WIDE

GROUPS = 2


class Member(NamedTuple):
    """Functions of arrays (N, C, ...) whose channels are along an axis, and GROUPS divides C.

    ``forward(x, weight, bias, eps, axis, out)`` returns y, mean and invstd, and
    ``backward(dy, x, mean, invstd, weight, axis, out)`` dx, dweight and dbias, None where there are
    none; the definitions do the same in long double. ``parameters(shape, axis)`` is their shape.
    """

    forward: Callable
    backward: Callable
    defined_forward: Callable
    defined_backward: Callable
    parameters: Callable
    centred: bool = True


def per_channel(shape, axis):
    return (shape[axis],)


def _batch():
    def forward(x, weight, bias, eps, axis, out=None):
        return bnfast.batch_norm_forward(x, weight, bias, eps, axis=axis, out=out)

    def backward(dy, x, mean, invstd, weight, axis, out=None):
        return bnfast.batch_norm_backward(dy, x, mean, invstd, weight, axis=axis, out=out)

    return Member(forward, backward, _defined_batch, _defined_batch_backward, per_channel)


def _defined_batch(x, weight, bias, eps, axis):
    return reference.batch_norm_forward(x, weight, bias, eps, axis=axis, precision=WIDE)


def _defined_batch_backward(dy, x, mean, invstd, weight, axis):
    return reference.batch_norm_backward(dy, x, mean, invstd, weight, axis=axis, precision=WIDE)


def _ghost():
    """Of one ghost, which is the batch."""

    def forward(x, weight, bias, eps, axis, out=None):
        got = bnfast.ghost_batch_norm_forward(x, len(x), weight, bias, eps, axis=axis, out=out)
        return got[0], got[1][0], got[2][0]

    def backward(dy, x, mean, invstd, weight, axis, out=None):
        saved = mean[None], invstd[None]
        return bnfast.ghost_batch_norm_backward(dy, x, len(x), *saved, weight, axis=axis, out=out)

    return Member(forward, backward, _defined_batch, _defined_batch_backward, per_channel)


def _conditional():
    def forward(x, weight, bias, eps, axis, out=None):
        return bnfast.conditional_batch_norm_forward(x, weight, bias, eps, axis=axis, out=out)

    def backward(dy, x, mean, invstd, weight, axis, out=None):
        saved = mean, invstd, weight
        return bnfast.conditional_batch_norm_backward(dy, x, *saved, axis=axis, out=out)

    def defined_forward(x, weight, bias, eps, axis):
        return reference.conditional_batch_norm_forward(
            x, weight, bias, eps, axis=axis, precision=WIDE
        )

    def defined_backward(dy, x, mean, invstd, weight, axis):
        return reference.conditional_batch_norm_backward(
            dy, x, mean, invstd, weight, axis=axis, precision=WIDE
        )

    def parameters(shape, axis):
        return shape[0], shape[axis]

    return Member(forward, backward, defined_forward, defined_backward, parameters)


def _group(groups):
    """Instance norm has as many groups as channels."""

    def forward(x, weight, bias, eps, axis, out=None):
        if groups is None:
            return bnfast.instance_norm_forward(x, weight, bias, eps, axis=axis, out=out)
        return bnfast.group_norm_forward(x, groups, weight, bias, eps, axis=axis, out=out)

    def backward(dy, x, mean, invstd, weight, axis, out=None):
        function = bnfast.group_norm_backward if groups else bnfast.instance_norm_backward
        return function(dy, x, mean, invstd, weight, axis=axis, out=out)

    def defined_forward(x, weight, bias, eps, axis):
        count = groups or x.shape[axis]
        return reference.group_norm_forward(x, count, weight, bias, eps, axis=axis, precision=WIDE)

    def defined_backward(dy, x, mean, invstd, weight, axis):
        return reference.group_norm_backward(dy, x, mean, invstd, weight, axis=axis, precision=WIDE)

    return Member(forward, backward, defined_forward, defined_backward, per_channel)


def _rows(of_channels, centred):
    """Over all axes but the first, or over the channels of each pixel."""

    def axes(shape, axis):
        return (axis % len(shape),) if of_channels else tuple(range(1, len(shape)))

    def parameters(shape, axis):
        return tuple(shape[d] for d in axes(shape, axis))

    def forward(x, weight, bias, eps, axis, out=None):
        sizes, over = parameters(x.shape, axis), axes(x.shape, axis)
        if centred:
            return bnfast.layer_norm_forward(x, sizes, weight, bias, eps, axis=over, out=out)
        y, invrms = bnfast.rms_norm_forward(x, sizes, weight, eps, axis=over, out=out)
        return y, np.zeros_like(invrms), invrms

    def backward(dy, x, mean, invstd, weight, axis, out=None):
        sizes, over = parameters(x.shape, axis), axes(x.shape, axis)
        if centred:
            saved = mean, invstd, weight
            return bnfast.layer_norm_backward(dy, x, sizes, *saved, axis=over, out=out)
        return *bnfast.rms_norm_backward(dy, x, sizes, invstd, weight, axis=over, out=out), None

    def defined_forward(x, weight, bias, eps, axis):
        return reference.layer_norm_forward(
            *(x, axes(x.shape, axis), weight, bias if centred else None, eps),
            centred=centred,
            precision=WIDE,
        )

    def defined_backward(dy, x, mean, invstd, weight, axis):
        dx, dweight, dbias = reference.layer_norm_backward(
            *(dy, x, axes(x.shape, axis), mean, invstd, weight), centred=centred, precision=WIDE
        )
        return dx, dweight, dbias if centred else None

    return Member(forward, backward, defined_forward, defined_backward, parameters, centred)


def _response():
    def forward(x, weight, bias, eps, axis, out=None):
        y, invrms = bnfast.filter_response_norm_forward(
            x, weight, bias, eps=eps, axis=axis, out=out
        )
        return y, np.zeros_like(invrms), invrms

    def backward(dy, x, mean, invrms, weight, axis, out=None):
        return bnfast.filter_response_norm_backward(dy, x, invrms, weight, axis=axis, out=out)[:3]

    def defined_forward(x, weight, bias, eps, axis):
        y, _, invrms = reference.filter_response_norm(
            x, weight, bias, eps=eps, axis=axis, precision=WIDE
        )
        return y, np.zeros_like(invrms), invrms

    def defined_backward(dy, x, mean, invrms, weight, axis):
        return reference.filter_response_norm_backward(
            dy, x, x, invrms, weight, axis=axis, precision=WIDE
        )[:3]

    return Member(forward, backward, defined_forward, defined_backward, per_channel, centred=False)


def _moving_average():
    """Of the first batch, which is normalized by its own root mean square."""
    own = {"averaged": False}

    def forward(x, weight, bias, eps, axis, out=None):
        var, squares = np.ones(x.shape[axis]), np.ones((1, x.shape[axis]))
        y, saved = bnfast.moving_average_batch_norm_forward(
            *(x, var, squares, weight, bias, 0.0, eps), **own, r_max=1.0, axis=axis, out=out
        )
        return y, np.zeros_like(saved.invrms), saved.invrms

    def backward(dy, x, mean, invrms, weight, axis, out=None):
        saved = MovingAveraged(invrms, np.ones_like(invrms), 0, False)
        products = np.ones((1, len(invrms)))
        return bnfast.moving_average_batch_norm_backward(
            dy, x, saved, products, weight, axis=axis, out=out
        )

    def defined_forward(x, weight, bias, eps, axis):
        ones = np.ones(x.shape[axis], WIDE)
        y, invrms, *_ = reference_cross_batch.moving_average_batch_norm_forward(
            *(x, ones, ones[None], weight, bias, 0.0, eps),
            **own,
            r_max=1.0,
            axis=axis,
            precision=WIDE,
        )
        return y, np.zeros_like(invrms), invrms

    def defined_backward(dy, x, mean, invrms, weight, axis):
        ones = np.ones_like(invrms)
        return reference_cross_batch.moving_average_batch_norm_backward(
            dy, x, invrms, ones, ones[None], weight, **own, axis=axis, precision=WIDE
        )[:3]

    return Member(forward, backward, defined_forward, defined_backward, per_channel, centred=False)


MEMBERS = {
    "batch": _batch(),
    "ghost": _ghost(),
    "moving average": _moving_average(),
    "conditional": _conditional(),
    "instance": _group(None),
    "group": _group(GROUPS),
    "layer": _rows(of_channels=False, centred=True),
    "layer of channels": _rows(of_channels=True, centred=True),
    "rms": _rows(of_channels=False, centred=False),
    "rms of channels": _rows(of_channels=True, centred=False),
    "filter response": _response(),
}
