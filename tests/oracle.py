"""Comparison with ``bnfast._reference``, in long double."""

import numpy as np

import bnfast
from bnfast import _reference as reference
from tolerances import (
    CLOSE_F64,
    GRADIENT_SUMS,
    INPUT_GRADIENT,
    MOMENTS,
    MOMENTS_F64,
    OUTPUT,
    ROUNDED_F32,
    eps_of,
)

WIDE = np.longdouble


def wider_than(dtype):
    """What a definition is computed in: long double takes several times as long as float64."""
    return np.float64 if dtype == np.float32 else WIDE


def other_axes(x, axis):
    return tuple(d for d in range(x.ndim) if d != axis % x.ndim)


def along(values, x, axis):
    shape = [1] * x.ndim
    shape[axis] = -1
    return np.asarray(values).reshape(shape)


def assert_within(actual, expected, tolerance):
    """`tolerance` may be an array: the allowed absolute error."""
    wide = np.result_type(actual, expected, np.float64)
    actual, expected = np.asarray(actual, wide), np.asarray(expected, wide)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected)
    bad = ~(error <= tolerance)
    assert not bad.any(), (
        f"{bad.sum()} of {bad.size} off, worst by {error[bad].max()}, "
        f"allowed {np.broadcast_to(tolerance, bad.shape)[bad].min()}"
    )


def mean_of_gradient(x, mean, axes):
    """The mean that the gradient is around: of float64 data, also what one float64 cannot hold."""
    return x.astype(WIDE).mean(axes) if x.dtype == np.float64 else mean


def check_moments(x, axis=1):
    count, mean, m2 = reference.moments(x, axis, WIDE)
    got = bnfast.moments(x, axis)
    eps = eps_of(np.float64)
    assert got.count == count
    assert got.mean.dtype == got.m2.dtype == np.float64
    relative = MOMENTS * eps_of(x.dtype) if x.dtype == np.float32 else MOMENTS_F64 * eps
    std = np.sqrt(m2 / count)
    largest = np.abs(x).max(other_axes(x, axis)).astype(WIDE)
    assert_within(got.mean, mean, relative * std + MOMENTS_F64 * eps * largest)
    assert_within(got.m2, m2, relative * m2 + count * (MOMENTS_F64 * eps * largest) ** 2)


def check_forward(x, weight=None, bias=None, eps=1e-5, axis=1, out=None):
    y, mean, invstd = bnfast.batch_norm_forward(x, weight, bias, eps, axis=axis, out=out)
    expected, _, expected_invstd = reference.batch_norm_forward(
        x, weight, bias, eps, axis=axis, precision=WIDE
    )
    assert y.dtype == x.dtype
    assert mean.dtype == invstd.dtype == np.float64
    size = np.abs(expected).max(other_axes(x, axis), keepdims=True) + 1
    assert_within(y, expected, OUTPUT * eps_of(x.dtype) * size)
    assert_within(invstd, expected_invstd, 4 * MOMENTS * eps_of(x.dtype) * expected_invstd)
    return y


def check_backward(dy, x, weight=None, axis=1, training=True, out=None):
    if training:
        _, mean, invstd = bnfast.batch_norm_forward(x, weight, axis=axis)
    else:
        mean = np.linspace(-1, 1, x.shape[axis])
        invstd = np.linspace(0.5, 2, x.shape[axis])
    exact = mean_of_gradient(x, mean, other_axes(x, axis)) if training else mean
    expected = reference.batch_norm_backward(
        dy, x, exact, invstd, weight, axis=axis, training=training, precision=WIDE
    )
    dx, dweight, dbias = bnfast.batch_norm_backward(
        dy, x, mean, invstd, weight, axis=axis, training=training, out=out
    )
    axes, eps = other_axes(x, axis), eps_of(x.dtype)
    dtype = x.dtype if weight is None else weight.dtype
    assert dx.dtype == x.dtype
    assert dweight.dtype == dbias.dtype == dtype
    scale = np.abs(along(invstd if weight is None else invstd * weight, x, axis))
    largest = np.abs(dy).max(axes, keepdims=True) * scale
    assert_within(dx, expected[0], INPUT_GRADIENT * eps * largest)
    rounding = GRADIENT_SUMS * max(eps, eps_of(dtype))
    xhat = np.abs((x - along(mean, x, axis)) * along(invstd, x, axis))
    assert_within(dweight, expected[1], rounding * (np.abs(dy) * xhat).sum(axes))
    assert_within(dbias, expected[2], rounding * np.abs(dy).sum(axes))
    return dx


PIECEWISE = ("relu", "leaky_relu", "relu6")  # the activations of straight lines
CURVES = ("silu", "hardswish")
SLOPE = 0.3  # of leaky_relu, below 0


def activated(z, name):
    """In the dtype of z, as the activation is defined."""
    if name in CURVES:
        return reference.activate(z, name, precision=wider_than(z.dtype)).astype(z.dtype)
    if name == "leaky_relu":
        return np.where(z < 0, z.dtype.type(SLOPE) * z, z)
    return np.clip(z, 0, 6 if name == "relu6" else None).astype(z.dtype)


def through(dy, z, name):
    """What of dy goes through the activation, in its dtype."""
    if name == "leaky_relu":
        return np.where(z > 0, dy, dy * dy.dtype.type(SLOPE))
    wide = reference.activate_backward(dy, z, name, SLOPE, precision=wider_than(dy.dtype))
    return wide.astype(dy.dtype)


def central_differences(loss, array):
    """The gradient of a number, in float64, with respect to an array that is changed in place."""
    numeric = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        kept, ends = array[index], []
        for step in (1e-6, -1e-6):
            array[index] = kept + step
            ends.append(loss())
        array[index] = kept
        numeric[index] = (ends[0] - ends[1]) / 2e-6
    return numeric


def close(a, b, dtype=np.float64):
    tolerance = 2 * ROUNDED_F32 if np.dtype(dtype) == np.float32 else CLOSE_F64
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def of_scaled(gradient, of_ordinary, chosen, scale):
    """Gradients of filters times a scale, and exact ones of those of the filters as they were.

    Scaled filters have the gradient over the scale: both are given times the scale, so that they
    compare, and as 0 where a gradient leaves the range, as it must.
    """
    of_dtype = gradient.dtype.type
    exact = of_ordinary.astype(WIDE)
    exact[chosen] /= WIDE(scale)
    lost = np.abs(exact) > np.finfo(of_dtype).max
    np.testing.assert_array_equal(np.isinf(gradient), lost)
    gradient, exact = np.where(lost, 0, gradient), np.where(lost, 0, exact)
    for part in (gradient, exact):
        part[chosen] *= of_dtype(scale)
    return gradient, exact


def close_to_largest(gradient, expected, dtype):
    """Within a rounding of the largest value: gradients are sums of what may cancel."""
    size = max(1, np.abs(expected).max(initial=0))
    close(gradient / size, np.asarray(expected, np.float64) / float(size), dtype)
