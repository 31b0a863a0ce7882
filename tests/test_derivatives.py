"""Derivatives along a direction, and gradients of the backward passes."""

import tracemalloc

import numpy as np
import pytest

import bnfast
from test_gradients import central_differences
from tolerances import CLOSE_F64, FINITE_DIFFERENCES, HIGHER_DERIVATIVES, INPUT_GRADIENT, eps_of


class Member:
    """A normalization of x: its passes, with all of their arguments but x and the parameters."""

    def __init__(self, stem, *arguments, has_mean=True, **keywords):
        self.stem, self.arguments, self.keywords = stem, arguments, keywords
        self.shape = ()  # of parameters
        self.has_mean = has_mean

    def _call(self, form, *given):
        return getattr(bnfast, f"{self.stem}_{form}")(*given, **self.keywords)

    def _geometry(self):
        return () if self.stem == "group_norm" else self.arguments

    def forward(self, x, *parameters):
        return self._call("forward", x, *self.arguments, *parameters)

    def saved(self, x):
        return self.forward(x)[1:]

    def backward(self, dy, x, saved, weight):
        return self._call("backward", dy, x, *self._geometry(), *saved, weight)

    def jvp(self, dx, x, saved, weight):
        return self._call("jvp", dx, x, *self._geometry(), *saved, weight)

    def double_backward(self, upstream, dy, x, saved, weight):
        return self._call("double_backward", *upstream, dy, x, *self._geometry(), *saved, weight)

    def parameters(self, rng):
        return rng.normal(size=(1 + self.has_mean, *self.shape))


def member(stem, shape, axis):
    channels = shape[axis]
    if stem in ("layer_norm", "rms_norm"):
        made = Member(stem, shape[2:], has_mean=stem == "layer_norm")
        made.shape = shape[2:]
        return made
    arguments = (channels // 2,) if stem == "group_norm" else ()
    made = Member(stem, *arguments, axis=axis)
    made.shape = (channels,)
    return made


STEMS = ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"]
SHAPES = [(3, 4, 3, 2), (2, 6, 4), (5, 2, 1, 3, 2)]


@pytest.fixture(params=STEMS)
def stem(request):
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_jvp_is_the_derivative_of_the_forward_pass(stem, shape, rng):
    of = member(stem, shape, 1)
    x, dx = rng.normal(2, 1, (2, *shape))
    parameters = of.parameters(rng)
    step = 1e-6

    def output(t):
        return of.forward(x + t * dx, *parameters)[0]

    expected = (output(step) - output(-step)) / (2 * step)
    got = of.jvp(dx, x, of.saved(x), parameters[0])
    size = 1 + np.abs(expected).max()
    np.testing.assert_allclose(got, expected, atol=FINITE_DIFFERENCES * size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("axis", [1, -1], ids=["nchw", "nhwc"])
def test_the_double_backward_is_the_derivative_of_the_backward_pass(stem, shape, axis, rng):
    of = member(stem, shape, axis)
    x, dy, ddx = rng.normal(2, 1, (3, *shape))
    weight = of.parameters(rng)[0]
    of_parameters = of.parameters(rng)

    def loss():
        dx, *gradients = of.backward(dy, x, of.saved(x), weight)
        pairs = zip(gradients, of_parameters, strict=True)
        return (dx * ddx).sum() + sum((a * b).sum() for a, b in pairs)

    got = of.double_backward((ddx, *of_parameters), dy, x, of.saved(x), weight)
    for gradient, array in zip(got, (dy, x, weight), strict=True):
        expected = central_differences(loss, array)
        size = 1 + np.abs(expected).max()
        np.testing.assert_allclose(gradient, expected, atol=FINITE_DIFFERENCES * size)


@pytest.mark.parametrize("axis", [1, -1], ids=["nchw", "nhwc"])
def test_in_evaluation_statistics_are_constants(axis, rng):
    x, dy, ddx = rng.normal(2, 1, (3, 3, 4, 3, 2))
    channels = x.shape[axis]
    weight, ddweight, ddbias, mean = rng.normal(size=(4, channels))
    invstd = rng.uniform(0.5, 2, channels)
    given = {"axis": axis, "training": False}

    def loss():
        dx, dweight, dbias = bnfast.batch_norm_backward(dy, x, mean, invstd, weight, **given)
        return (dx * ddx).sum() + (dweight * ddweight).sum() + (dbias * ddbias).sum()

    got = bnfast.batch_norm_double_backward(
        ddx, ddweight, ddbias, dy, x, mean, invstd, weight, **given
    )
    for gradient, array in zip(got, (dy, x, weight), strict=True):
        expected = central_differences(loss, array)
        size = 1 + np.abs(expected).max()
        np.testing.assert_allclose(gradient, expected, atol=FINITE_DIFFERENCES * size)
    shape = [-1 if d == axis % 4 else 1 for d in range(4)]
    jvp = bnfast.batch_norm_jvp(ddx, x, mean, invstd, weight, **given)
    np.testing.assert_allclose(jvp, ddx * (weight * invstd).reshape(shape), rtol=CLOSE_F64 / 10)


def test_a_gradient_that_is_none_is_zero(stem, rng):
    shape = (3, 4, 3, 2)
    of = member(stem, shape, 1)
    x, dy, ddx = rng.normal(size=(3, *shape))
    weight = of.parameters(rng)[0]
    upstream = ddx, *of.parameters(rng)
    for kept in range(len(upstream)):
        nones = [a if n == kept else None for n, a in enumerate(upstream)]
        zeros = [a if n == kept else np.zeros_like(a) for n, a in enumerate(upstream)]
        for got, expected in zip(
            of.double_backward(nones, dy, x, of.saved(x), weight),
            of.double_backward(zeros, dy, x, of.saved(x), weight),
            strict=True,
        ):
            np.testing.assert_array_equal(got, expected)


def test_weights_of_zero_and_none(stem, rng):
    shape = (3, 4, 3, 2)
    of = member(stem, shape, 1)
    x, dy, ddx = rng.normal(size=(3, *shape))
    upstream = ddx, *of.parameters(rng)
    saved = of.saved(x)
    ones, zeros = np.ones(of.shape), np.zeros(of.shape)
    for got, expected in zip(
        of.double_backward(upstream, dy, x, saved, None),
        of.double_backward(upstream, dy, x, saved, ones),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)
    # Of the linear function of weight, what is left at 0 and at twice the weight.
    at = [of.double_backward(upstream, dy, x, saved, w)[1] for w in (zeros, ones, 2 * ones)]
    np.testing.assert_allclose(
        at[2] - at[1], at[1] - at[0], rtol=10 * HIGHER_DERIVATIVES, atol=10 * CLOSE_F64
    )
    np.testing.assert_array_equal(of.jvp(ddx, x, saved, zeros), 0)


@pytest.mark.parametrize("mean", [0, 1000])
def test_float32_is_as_exact_as_the_backward_pass(stem, mean, rng):
    shape = (8, 16, 12, 12)
    of = member(stem, shape, 1)
    x, dy, ddx = rng.normal(size=(3, *shape)).astype(np.float32)
    x += np.float32(mean)
    weight = of.parameters(rng)[0].astype(np.float32)
    upstream = ddx, *of.parameters(rng).astype(np.float32)
    single = of.double_backward(upstream, dy, x, of.saved(x), weight)
    jvp = of.jvp(ddx, x, of.saved(x), weight)
    x, dy, ddx, weight = (a.astype(np.float64) for a in (x, dy, ddx, weight))
    upstream = [a.astype(np.float64) for a in upstream]
    double = of.double_backward(upstream, dy, x, of.saved(x), weight)
    for got, expected in zip(
        (*single, jvp), (*double, of.jvp(ddx, x, of.saved(x), weight)), strict=True
    ):
        assert got.dtype == np.float32
        size = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=INPUT_GRADIENT * eps_of(got.dtype) * size)


@pytest.mark.parametrize("axis", [1, -1], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("weighted", [True, False])
def test_one_weight_for_each_group(axis, weighted, rng):
    x, dy, ddx = rng.normal(size=(3, 3, 6, 5, 6))
    weight, ddweight, ddbias = rng.normal(size=(3, 3))
    weight = weight if weighted else None
    _, mean, invstd = bnfast.group_norm_forward(x, 3, axis=axis)

    def of_channels(parameter):
        return None if parameter is None else np.repeat(parameter, 2)

    jvp = bnfast.group_norm_jvp(ddx, x, mean, invstd, weight, axis=axis, per_group=True)
    expected = bnfast.group_norm_jvp(ddx, x, mean, invstd, of_channels(weight), axis=axis)
    np.testing.assert_array_equal(jvp, expected)
    ddy, dx, dweight = bnfast.group_norm_double_backward(
        *(ddx, ddweight, ddbias, dy, x, mean, invstd, weight), axis=axis, per_group=True
    )
    upstream = ddx, of_channels(ddweight), of_channels(ddbias)
    expected = bnfast.group_norm_double_backward(
        *upstream, dy, x, mean, invstd, of_channels(weight), axis=axis
    )
    np.testing.assert_allclose(ddy, expected[0], rtol=CLOSE_F64, atol=CLOSE_F64)
    np.testing.assert_allclose(dx, expected[1], rtol=CLOSE_F64, atol=CLOSE_F64)
    of_groups = expected[2].reshape(3, 2).sum(1)
    np.testing.assert_allclose(dweight, of_groups, rtol=10 * CLOSE_F64, atol=CLOSE_F64)
    for wrong in (np.ones(6), np.ones(1)):
        given = (mean, invstd, wrong)
        message = r"weight must have one value for each of the 3 groups, shape \(3,\)"
        with pytest.raises(ValueError, match=message):
            bnfast.group_norm_jvp(ddx, x, *given, axis=axis, per_group=True)
        with pytest.raises(ValueError, match=message):
            bnfast.group_norm_double_backward(
                *(None, None, None, dy, x, *given), axis=axis, per_group=True
            )


def test_any_strides(stem, rng):
    shape = (3, 4, 3, 2)
    of = member(stem, shape, 1)
    plain = rng.normal(size=(3, *shape))
    weight, upstream = of.parameters(rng)[0], of.parameters(rng)
    spread = np.empty((3, 4, 3, 4))[..., ::2]
    spread[...] = plain[1]
    strided = np.asfortranarray(plain[0]), spread, plain[2, ::-1].copy()[::-1]

    def derivatives(x, dy, ddx):
        saved = of.saved(x)
        jvp = of.jvp(ddx, x, saved, weight)
        return *of.double_backward((ddx, *upstream), dy, x, saved, weight), jvp

    for got, expected in zip(derivatives(*strided), derivatives(*plain), strict=True):
        np.testing.assert_allclose(got, expected, rtol=10 * CLOSE_F64, atol=CLOSE_F64)


def test_no_temporary_is_as_large_as_the_input(stem, rng):
    shape = (12, 12, 90, 90)
    of = member(stem, shape, 1)
    x, dy, ddx = rng.normal(size=(3, *shape))
    weight, upstream, saved = of.parameters(rng)[0], of.parameters(rng), of.saved(x)
    tracemalloc.start()
    of.double_backward((ddx, *upstream), dy, x, saved, weight)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * x.nbytes  # two are the results


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0)], ids=str)
def test_empty_batches(stem, shape):
    of = member(stem, shape, 1)
    x, weight = np.zeros(shape), np.ones(of.shape)
    saved = of.saved(x)
    ddy, dx, dweight = of.double_backward((x, *[weight] * (1 + of.has_mean)), x, x, saved, weight)
    assert ddy.shape == dx.shape == of.jvp(x, x, saved, weight).shape == shape
    np.testing.assert_array_equal(dweight, np.zeros(of.shape))


def test_empty_batches_of_an_infinite_invstd():
    x = np.zeros((0, 3), np.float32)
    mean, invstd = np.zeros(3), np.full(3, np.inf)
    _, _, dweight = bnfast.batch_norm_double_backward(x, None, None, x, x, mean, invstd)
    np.testing.assert_array_equal(dweight, np.zeros(3, np.float32))


@pytest.mark.parametrize("per_group", [True, False])
def test_no_channels_have_no_groups(per_group):
    x, none = np.zeros((3, 0, 2)), np.zeros(0)
    _, mean, invstd = bnfast.group_norm_forward(x, 2)
    given = (x, mean, invstd, none)
    assert bnfast.group_norm_jvp(x, *given, per_group=per_group).shape == x.shape
    ddy, dx, dweight = bnfast.group_norm_double_backward(
        x, none, none, x, *given, per_group=per_group
    )
    assert (ddy.shape, dx.shape, dweight.shape) == (x.shape, x.shape, (0,))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e308])
@pytest.mark.parametrize("name", ["x", "dy", "ddx"])
def test_a_value_that_is_not_finite_stays_in_its_statistics(stem, name, value, rng):
    shape = (3, 4, 6, 2)
    of = member(stem, shape, 1)
    weight, upstream = of.parameters(rng)[0], of.parameters(rng)
    arrays = dict(zip(("x", "dy", "ddx"), rng.normal(size=(3, *shape)), strict=True))

    def derivatives():
        x, dy, ddx = arrays.values()
        saved = of.saved(x)
        jvp = of.jvp(ddx, x, saved, weight)
        return [jvp, *of.double_backward((ddx, *upstream), dy, x, saved, weight)]

    with np.errstate(all="raise"):
        expected = derivatives()
        arrays[name][1, 1, 2, 1] = value
        got = derivatives()
    apart = [2, 3] if stem == "group_norm" else [0, 2, 3]  # channels of other statistics
    for mine, other in zip(got[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(mine[:, apart], other[:, apart])
    if of.shape == shape[1:2]:
        np.testing.assert_array_equal(got[3][apart], expected[3][apart])


def test_bits_do_not_depend_on_threads(stem, use_threads, rng):
    shape = (4, 8, 24, 24)
    of = member(stem, shape, 1)
    x, dy, ddx = rng.normal(size=(3, *shape)).astype(np.float32)
    weight, upstream = of.parameters(rng)[0], of.parameters(rng)
    found = []
    for threads in (1, 2, 3):
        use_threads(threads)
        saved = of.saved(x)
        jvp = of.jvp(ddx, x, saved, weight)
        found.append([jvp, *of.double_backward((ddx, *upstream), dy, x, saved, weight)])
    for results in zip(*found, strict=True):
        for result in results[1:]:
            np.testing.assert_array_equal(result, results[0])


# Values from public reports (PyTorch's issues 196699 and 196700), of functions of a number t whose
# second derivative nested forward mode got wrong: d2/dt2 of sum(w * y(x(t))).


def test_second_derivative_of_batch_norm_as_reported():
    t, n = -6.0, np.arange(8.0)
    x, dx, d2x = (
        a.reshape(2, 2, 2)
        for a in (
            (n + 1) * t + (n % 3 - 1) * t * t + n,
            (n + 1) + 2 * (n % 3 - 1) * t,
            2 * (n % 3 - 1),
        )
    )
    weight, w = np.array([1.5, -0.5]), np.arange(1.0, 9.0).reshape(2, 2, 2)
    _, mean, invstd = bnfast.batch_norm_forward(x, eps=0.25)
    gradient, _, _ = bnfast.batch_norm_backward(w, x, mean, invstd, weight)
    _, along, _ = bnfast.batch_norm_double_backward(dx, None, None, w, x, mean, invstd, weight)
    second = (along * dx).sum() + (gradient * d2x).sum()
    np.testing.assert_allclose(second, -0.20703015646993195, rtol=10 * HIGHER_DERIVATIVES)


def test_second_derivative_of_layer_norm_as_reported():
    x, dx, w = np.array([[0.7, 0.0]]), np.array([[1.0, 0.0]]), np.ones((1, 2))
    weight = np.array([1.0, 2.0])
    _, mean, invstd = bnfast.layer_norm_forward(x, 2, eps=0.25)
    _, along, _ = bnfast.layer_norm_double_backward(dx, None, None, w, x, 2, mean, invstd, weight)
    np.testing.assert_allclose((along * dx).sum(), 0.7749142079590942, rtol=10 * CLOSE_F64)
