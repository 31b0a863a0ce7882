"""Activations of the kernels, after every member whose channels have the parameters.

The result is that of the member and then of the activation, bit by bit: forward, and backward with
the part of dy that goes through.
"""

import numpy as np
import pytest

import bnfast
from bnfast import _primitives
from bnfast._primitives import BATCH, GROUPS, PER_SAMPLE, Activation, Reduction

CLAMP = Activation("piecewise", "least", closed=True)
RESPONSES = Reduction(per_sample=True, centred=False)
EPS = 1e-5

# Of each member: what has its statistics together, and the options of its forward and backward.
MEMBERS = {
    "batch": (BATCH, {}, {}),
    "instance": (PER_SAMPLE, {}, {}),
    "response": (RESPONSES, {}, {}),
    "group": (GROUPS, {"num_groups": 3}, {"grouped": True}),
}
# More than the first level of cache holds, many small planes, and a batch without planes.
SHAPES = {"large": (3, 6, 40, 100), "planes": (5, 12, 4, 5), "rows": (70, 6)}


@pytest.fixture(params=SHAPES)
def data(request, rng, dtype):
    """x and dy, and per channel weight, bias and the parameter of the activation."""
    shape = SHAPES[request.param]
    x, dy = rng.normal(3, 2, (2, *shape)).astype(dtype)
    weight, bias, least = rng.normal(size=(3, shape[1])).astype(dtype)
    return x, dy, weight, bias, least


def of_channels(values, x):
    return np.reshape(values, (-1, *[1] * (x.ndim - 2)))


def laid_out(array, layout):
    if layout == "nchw":
        return array
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)


def strided(array):
    spread = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    view = spread[..., ::2]
    view[...] = array
    return view


def forward(data, member, **activated):
    x, _, weight, bias, _ = data
    over, options, _ = MEMBERS[member]
    return _primitives.normalize(x, 1, weight, bias, EPS, over=over, **options, **activated)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("member", MEMBERS)
def test_forward_is_the_activated_output(isa, data, member, layout):
    x, dy, weight, bias, least = data
    data = laid_out(x, layout), dy, weight, bias, least
    y, mean, invstd = forward(data, member)
    z, *statistics = forward(data, member, activation=CLAMP, parameter=least)
    np.testing.assert_array_equal(z, np.maximum(y, of_channels(least, x)))
    np.testing.assert_array_equal(statistics, [mean, invstd])


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize("member", MEMBERS)
def test_backward_is_that_of_what_goes_through(isa, data, member, layout):
    x, dy, weight, bias, least = data
    x, dy = (strided(a) if layout == "strided" else laid_out(a, layout) for a in (x, dy))
    data = x, dy, weight, bias, least
    over, _, options = MEMBERS[member]
    y, mean, invstd = forward(data, member)
    below = y < of_channels(least, x)
    passed = np.where(below, 0, dy).astype(x.dtype)
    expected = _primitives.gradient(passed, x, 1, mean, invstd, weight, False, over=over, **options)
    others = tuple(d for d in range(x.ndim) if d != 1)
    dleast = np.where(below, dy, 0).astype(np.longdouble).sum(others)

    given = x, 1, mean, invstd, weight, bias, CLAMP, least
    size = np.abs(dy).astype(np.longdouble).sum(others)
    for out in (None, dy.copy(order="K")):
        upstream = dy if out is None else out
        *found, dparameter = _primitives.activated_gradient(
            *(upstream, *given), over=over, out=out, **options
        )
        for name, a, b in zip(("dx", "dweight", "dbias"), found, expected, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
        assert np.all(np.abs(dparameter - dleast) <= 4 * np.finfo(x.dtype).eps * size)


def test_two_threads_give_the_bits_of_one(rng, dtype, monkeypatch):
    monkeypatch.setattr("bnfast._threads.SERIAL_BYTES", 0)
    monkeypatch.setattr("bnfast._threads.BYTES_PER_THREAD", 1)
    x, dy = rng.normal(size=(2, 4, 9, 30, 31)).astype(dtype)
    _, mean, invstd = _primitives.normalize(x, 1, None, None, EPS, over=GROUPS, num_groups=3)
    made = []
    for threads in (1, 2):
        bnfast.set_num_threads(threads)
        made.append(
            _primitives.activated_gradient(
                dy, x, 1, mean, invstd, None, None, CLAMP, None, over=GROUPS, grouped=True
            )
        )
    for one, two in zip(*made, strict=True):
        np.testing.assert_array_equal(one, two)


def test_without_a_parameter_it_is_zero(data):
    x, dy, weight, bias, _ = data
    zeros = np.zeros_like(weight)
    for parameter in (None, zeros):
        z, mean, invstd = forward(data, "batch", activation=CLAMP, parameter=parameter)
        np.testing.assert_array_equal(z, np.maximum(forward(data, "batch")[0], 0))
    given = dy, x, 1, mean, invstd, weight, bias, CLAMP
    *found, dparameter = _primitives.activated_gradient(*given, None)
    *expected, dzeros = _primitives.activated_gradient(*given, zeros)
    assert dparameter is None
    assert dzeros.shape == zeros.shape
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_gradient_passes_through_constant_statistics(isa, data):
    x, dy, weight, bias, least = data
    y, mean, invstd = forward(data, "batch")
    passed = np.where(y < of_channels(least, x), 0, dy).astype(x.dtype)
    expected = _primitives.gradient(passed, x, 1, mean, invstd, weight, True)
    found = _primitives.activated_gradient(
        dy, x, 1, mean, invstd, weight, bias, CLAMP, least, constant_statistics=True
    )
    for a, b in zip(found[:3], expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1e30, 1e150])
def test_ends_of_the_range_are_those_of_the_member(isa, rng, size):
    """Their sums are made again, of x around 0, which must not change what goes through."""
    x, dy = rng.normal(2, 1, (2, 5, 3, 40))
    x[:, [0, 2]] *= size  # beside an ordinary channel
    weight, bias, least = rng.normal(size=(3, 3))
    over = Reduction()  # batch normalization of any eps
    y, mean, invstd = _primitives.normalize(x, 1, weight, bias, 0.0, over=over)
    passed = np.where(y < of_channels(least, x), 0, dy)
    expected = _primitives.gradient(passed, x, 1, mean, invstd, weight, False, over=over)
    given = dy, x, 1, mean, invstd, weight, bias, CLAMP, least
    found = _primitives.activated_gradient(*given, over=over)
    for a, b in zip(found[:3], expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert 0.1 < np.mean(passed == 0) < 0.9


def test_a_parameter_that_is_nan_makes_its_channel_nan(data):
    least = data[4].copy()
    least[1] = np.nan
    z, _, _ = forward(data, "batch", activation=CLAMP, parameter=least)
    assert np.isnan(z[:, 1]).all()
    assert np.isfinite(np.delete(z, 1, 1)).all()


def test_messages_call_the_parameter_by_its_own_name(data):
    with pytest.raises(
        ValueError, match=r"^least must have one value for each of the \d+ channels"
    ):
        forward(data, "batch", activation=CLAMP, parameter=np.zeros(1, np.float32))


def test_an_unknown_activation_is_refused():
    with pytest.raises(KeyError, match="softmax"):
        Activation("softmax", "beta")
