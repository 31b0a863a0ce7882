"""autograd: derivatives of any order, in reverse and forward mode, by bnfast's kernels."""

import doctest
import itertools
import subprocess
import sys

import numpy as np
import pytest

import bnfast
from tolerances import CLOSE_F32, CLOSE_F64, FINITE_DIFFERENCES, HIGHER_DERIVATIVES

pytest.importorskip("autograd")

import autograd.numpy as anp
from autograd import grad, hessian, make_hvp, make_jvp, make_vjp
from autograd.test_util import check_grads

from bnfast.integrations.autograd import (
    _calls,
    batch_norm,
    functions,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
)

SHAPE = (4, 6, 3, 2)
STATISTICS = np.arange(6.0) / 4, np.arange(6.0) + 0.5


class Member:
    """A function of x and its parameters, and what it computes in autograd's own NumPy."""

    def __init__(self, stem, function, over, parameter_axes=(1,), shape=SHAPE, parameters=2):
        self.stem, self.function = stem, function
        self.over, self.parameter_axes, self.shape = over, parameter_axes, shape
        self.parameters = parameters

    def arguments(self, rng, dtype=np.float64):
        own = [self.shape[d] for d in self.parameter_axes]
        arrays = rng.normal(size=self.shape), *rng.normal(size=(self.parameters, *own))
        return tuple(array.astype(dtype) for array in arrays)

    def decomposed(self, x, *parameters):
        """The same, of operations whose derivatives are autograd's."""
        xhat = self.normalized(x)
        order = np.argsort(self.parameter_axes)
        sizes = [n if d in self.parameter_axes else 1 for d, n in enumerate(self.shape)]
        spread = [anp.reshape(anp.transpose(p, order), sizes) for p in parameters]
        return sum(spread[1:], spread[0] * xhat)

    def normalized(self, x):
        if self.stem == "evaluation":
            mean, variance = (a.reshape(1, -1, 1, 1) for a in STATISTICS)
            return (x - mean) / np.sqrt(variance + 1e-5)
        groups = anp.reshape(x, (4, 3, 2, 3, 2)) if self.stem == "group_norm" else x
        if self.stem == "rms_norm":
            eps = np.finfo(float).eps
            return x / anp.sqrt(anp.mean(x**2, self.over, keepdims=True) + eps)
        centred = groups - anp.mean(groups, self.over, keepdims=True)
        variance = anp.mean(centred**2, self.over, keepdims=True)
        return anp.reshape(centred / anp.sqrt(variance + 1e-5), self.shape)


LAST = (4, 3, 2, 6)
MEMBERS = {
    "batch": Member("batch_norm", lambda x, w, b: batch_norm(x, None, None, w, b, True), (0, 2, 3)),
    "batch, channels last": Member(
        "batch_norm",
        lambda x, w, b: batch_norm(x, None, None, w, b, training=True, axis=-1),
        (0, 1, 2),
        (3,),
        LAST,
    ),
    "evaluation": Member("evaluation", lambda x, w, b: batch_norm(x, *STATISTICS, w, b), None),
    "instance, running": Member(
        "evaluation", lambda x, w, b: instance_norm(x, *STATISTICS, w, b, False), None
    ),
    "instance": Member("instance_norm", lambda x, w, b: instance_norm(x, None, None, w, b), (2, 3)),
    "instance, channels last": Member(
        "instance_norm",
        lambda x, w, b: instance_norm(x, weight=w, bias=b, axis=3),
        (1, 2),
        (3,),
        LAST,
    ),
    "group": Member("group_norm", lambda x, w, b: group_norm(x, 3, w, b), (2, 3, 4)),
    "layer": Member("layer_norm", lambda x, w, b: layer_norm(x, (3, 2), w, b), (2, 3), (2, 3)),
    "layer, axes in turn": Member(
        "layer_norm",
        lambda x, w, b: layer_norm(x, (2, 6), w, b, axis=(-1, 1)),
        (1, 3),
        (3, 1),
    ),
    "layer, all axes": Member(
        "layer_norm", lambda x, w, b: layer_norm(x, x.shape, w, b), (0, 1, 2, 3), (0, 1, 2, 3)
    ),
    "rms": Member("rms_norm", lambda x, w: rms_norm(x, 2, w), 3, (3,), parameters=1),
    "rms, channels": Member(
        "rms_norm", lambda x, w: rms_norm(x, 6, w, axis=1), 1, (1,), parameters=1
    ),
}


@pytest.fixture(params=MEMBERS.values(), ids=MEMBERS.keys())
def member(request):
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    np.random.seed(0)  # noqa: NPY002  # check_grads draws directions from it


@pytest.fixture
def calls(count_calls):
    stems = "batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"
    kinds = "forward", "backward", "double_backward", "jvp"
    return count_calls(f"{stem}_{kind}" for stem, kind in itertools.product(stems, kinds))


def directional(function, order):
    """The derivative of that order of sum(w * function(x + t * v)) at t = 0, of x, v and w."""

    def derivative(x, v, w, t=0.0):
        value = lambda t: anp.sum(function(x + t * v) * w)  # noqa: E731
        for _ in range(order):
            value = grad(value)
        return value(t)

    return derivative


def nested_forward(function, order, t):
    """The derivative of that order of a function of t, by forward mode within forward mode."""
    for _ in range(order):
        function = lambda t, f=function: make_jvp(f)(t)(1.0)[1]  # noqa: E731
    return function(t)


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_first_and_second_derivatives(member, mode, rng):
    arguments = member.arguments(rng)
    everything = tuple(range(len(arguments)))
    check_grads(member.function, everything, modes=[mode], order=2)(*arguments)


def test_modes_mixed_three_deep(member, rng):
    arguments = member.arguments(rng)
    everything = tuple(range(len(arguments)))
    check_grads(member.function, everything, modes=["fwd", "rev"], order=3)(*arguments)


@pytest.mark.parametrize("order", range(5))
def test_any_order_equals_that_of_the_decomposition(member, order, rng):
    x, *parameters = member.arguments(rng)
    v, w = rng.normal(size=(2, *member.shape))
    ours, theirs = (
        directional(lambda x, f=f: anp.sin(f(x, *parameters)), order)(x, v, w)
        for f in (member.function, member.decomposed)
    )
    np.testing.assert_allclose(ours, theirs, rtol=HIGHER_DERIVATIVES, atol=HIGHER_DERIVATIVES)


@pytest.mark.parametrize("order", range(1, 4))
def test_any_order_of_the_parameters_too(member, order, rng):
    """Along a line through x and the parameters at once, in nested forward mode and in reverse."""
    arguments, directions = member.arguments(rng), member.arguments(rng)
    w = rng.normal(size=member.shape)

    def along(function):
        def value(t):
            points = (a + t * d for a, d in zip(arguments, directions, strict=True))
            return anp.sum(anp.sin(function(*points)) * w)

        return value

    expected = nested_forward(along(member.decomposed), order, 0.25)
    forward = nested_forward(along(member.function), order, 0.25)
    reverse = along(member.function)
    for _ in range(order):
        reverse = grad(reverse)
    np.testing.assert_allclose(
        [forward, reverse(0.25)],
        expected,
        rtol=10 * HIGHER_DERIVATIVES,
        atol=10 * HIGHER_DERIVATIVES,
    )


# Functions of a number t of which public reports say that PyTorch differentiated them wrongly.


@pytest.mark.parametrize("order", [3, 4])
def test_repeated_gradients_of_batch_norm(order, rng):
    """PyTorch's issue 186256: wrong from the third derivative on."""
    x, v, w = rng.normal(size=(3, 5, 3, 2))
    member = Member("batch_norm", lambda x: batch_norm(x, None, None, training=True), (0, 2))
    member.shape = x.shape
    derivative = directional(member.function, order)(x, v, w)
    expected = directional(member.normalized, order)(x, v, w)
    np.testing.assert_allclose(derivative, expected, rtol=HIGHER_DERIVATIVES)
    assert abs(expected) > 1


@pytest.mark.parametrize("order", [3, 4])
def test_repeated_gradients_of_layer_norm(order, rng):
    """PyTorch's issue 175754: wrong from the third derivative on."""
    x, v, w = rng.normal(size=(3, 4, 6))
    member = Member("layer_norm", lambda x: layer_norm(x, 6), (1,), shape=x.shape)
    derivative = directional(member.function, order)(x, v, w)
    expected = directional(member.normalized, order)(x, v, w)
    np.testing.assert_allclose(derivative, expected, rtol=HIGHER_DERIVATIVES)
    assert abs(expected) > 1


def test_nested_forward_mode_of_batch_norm():
    """PyTorch's issue 196699: -2.13 there."""
    n, weight, bias = np.arange(8.0), np.array([1.5, -0.5]), np.array([0.25, 1.0])
    w = np.arange(1.0, 9.0).reshape(2, 2, 2)

    def f(t):
        x = anp.reshape((n + 1) * t + (n % 3 - 1) * t * t + n, (2, 2, 2))
        return anp.sum(w * batch_norm(x, None, None, weight, bias, training=True, eps=0.25))

    np.testing.assert_allclose(
        nested_forward(f, 2, -6.0), -0.20703015646993195, rtol=10 * HIGHER_DERIVATIVES
    )


def test_nested_forward_mode_of_layer_norm():
    """PyTorch's issue 196700: -0.38 there."""

    def f(t):
        x = anp.reshape(anp.array([t, 0.0]), (1, 2))
        return anp.sum(layer_norm(x, 2, np.array([1.0, 2.0]), np.zeros(2), eps=0.25))

    np.testing.assert_allclose(f(0.7), -0.7 / np.sqrt(1 + 0.7**2), rtol=10 * CLOSE_F64)
    np.testing.assert_allclose(nested_forward(f, 2, 0.7), 0.7749142079590942, rtol=10 * CLOSE_F64)


def test_values_are_the_bits_of_bnfast(member, rng, dtype):
    x, *parameters = member.arguments(rng, dtype)
    direct = member.function(x, *parameters)
    _, traced = make_vjp(member.function)(x, *parameters)
    np.testing.assert_array_equal(direct, traced)
    assert type(direct) is np.ndarray and direct.dtype == dtype
    np.testing.assert_allclose(
        direct, member.decomposed(x, *parameters), rtol=CLOSE_F32, atol=CLOSE_F32
    )


def test_each_pass_is_one_call_of_its_kernel(member, rng, calls):
    stem = "batch_norm" if member.stem == "evaluation" else member.stem
    arguments = member.arguments(rng)
    everything = tuple(range(len(arguments)))
    loss = lambda *arguments: anp.sum(member.function(*arguments) ** 3)  # noqa: E731
    grad(loss, everything)(*arguments)
    assert calls[f"{stem}_backward"] == 1
    forward = member.stem not in ("evaluation", "instance_norm")  # which have no such function
    assert sum(calls.values()) == 1 + forward
    calls.clear()

    make_hvp(loss)(*arguments)[0](arguments[0])
    assert calls[f"{stem}_double_backward"] == 1
    assert calls[f"{stem}_jvp"] == 0
    calls.clear()

    make_jvp(loss)(*arguments)(arguments[0])
    assert calls[f"{stem}_jvp"] == 1
    calls.clear()

    make_jvp(grad(loss))(*arguments)(arguments[0])  # forward mode over reverse
    assert calls[f"{stem}_double_backward"] == 1


def test_gradients_of_parameters_are_left_out_where_nobody_wants_them(rng, monkeypatch):
    asked, backward = [], bnfast.layer_norm_backward

    def noting(*arguments, parameters, **keywords):
        asked.append(parameters)
        return backward(*arguments, parameters=parameters, **keywords)

    monkeypatch.setattr(bnfast, "layer_norm_backward", noting)
    x, w = rng.normal(size=(3, 4)), rng.normal(size=4)
    loss = lambda x, w: anp.sum(layer_norm(x, 4, w) ** 3)  # noqa: E731
    for by in (0, 1, (0, 1)):
        grad(loss, by)(x, w)
    assert asked == [False, True, True]


def test_gradients_of_one_argument_are_those_of_all(member, rng):
    arguments = member.arguments(rng)
    loss = lambda *arguments: anp.sum(anp.sin(member.function(*arguments)))  # noqa: E731
    everything = tuple(range(len(arguments)))
    together = grad(loss, everything)(*arguments)
    for n in everything:
        np.testing.assert_array_equal(grad(loss, n)(*arguments), together[n])
        np.testing.assert_allclose(
            together[n],
            grad(lambda *a: anp.sum(anp.sin(member.decomposed(*a))), n)(*arguments),
            rtol=HIGHER_DERIVATIVES,
            atol=10 * CLOSE_F64,
        )


@pytest.mark.parametrize("given", [(), (0,), (1,)], ids=["none", "weight", "bias"])
def test_parameters_may_be_left_out(given, rng):
    x, *parameters = rng.normal(size=SHAPE), *rng.normal(size=(2, 6))
    functions = [
        lambda x, w, b: batch_norm(x, None, None, w, b, True),
        lambda x, w, b: batch_norm(x, *STATISTICS, w, b),
        lambda x, w, b: instance_norm(x, weight=w, bias=b),
        lambda x, w, b: group_norm(x, 2, w, b),
        lambda x, w, b: layer_norm(x, 6, w, b, axis=1),
    ]
    for function in functions:

        def f(x, *own, function=function):
            places = [None, None]
            for n, array in zip(given, own, strict=True):
                places[n] = array
            return function(x, *places)

        own = [parameters[n] for n in given]
        check_grads(f, tuple(range(1 + len(own))), order=2)(x, *own)


def test_a_hessian_is_symmetric_and_that_of_the_decomposition(rng):
    x, a = rng.normal(size=(2, 2, 5))
    member = Member("layer_norm", lambda x: layer_norm(x, 5), (1,), shape=x.shape)
    ours, theirs = (
        hessian(lambda x, f=f: anp.sum(a * anp.tanh(f(x))))(x).reshape(10, 10)
        for f in (member.function, member.normalized)
    )
    np.testing.assert_allclose(ours, theirs, rtol=HIGHER_DERIVATIVES, atol=10 * CLOSE_F64)
    np.testing.assert_allclose(ours, ours.T, rtol=HIGHER_DERIVATIVES, atol=10 * CLOSE_F64)


def test_float32_stays_float32(member, rng):
    arguments = member.arguments(rng, np.float32)
    everything = tuple(range(len(arguments)))
    directions = member.arguments(rng, np.float32)

    def penalty(*arguments):
        gradients = grad(lambda *a: anp.sum(member.function(*a) ** 3), everything)(*arguments)
        return sum(anp.sum(gradients[n] ** 2) for n in everything)

    wide = [a.astype(np.float64) for a in arguments]
    for got, expected in zip(
        grad(penalty, everything)(*arguments), grad(penalty, everything)(*wide), strict=True
    ):
        assert got.dtype == np.float32
        size = np.abs(expected).max()
        np.testing.assert_allclose(got, expected, atol=100 * CLOSE_F32 * size)
    y, tangent = make_jvp(member.function, everything)(*arguments)(directions)
    assert y.dtype == tangent.dtype == np.float32


def test_gradients_of_another_dtype_are_converted(member, rng):
    arguments = member.arguments(rng, np.float32)
    everything = tuple(range(len(arguments)))
    vjp, y = make_vjp(member.function, everything)(*arguments)
    g = rng.normal(size=y.shape)
    for got, expected in zip(vjp(g), vjp(g.astype(np.float32)), strict=True):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected)


def test_float16_has_values_and_gradients_but_no_other_derivatives(member, rng):
    arguments = member.arguments(rng, np.float16)
    everything = tuple(range(len(arguments)))
    results = []
    for dtype in (np.float16, np.float32):
        vjp, y = make_vjp(member.function, everything)(*(a.astype(dtype) for a in arguments))
        results.append((y, *vjp(np.ones_like(y))))
    for a, b in zip(*results, strict=True):
        assert a.dtype == np.float16
        np.testing.assert_array_equal(a, b.astype(np.float16))
    with pytest.raises(TypeError, match=r"must be float32 or float64.*float16"):
        make_jvp(member.function)(*arguments)(arguments[0])


def test_parameters_of_another_dtype(member, rng):
    x, *parameters = member.arguments(rng)
    x = x.astype(np.float32)
    everything = tuple(range(1 + len(parameters)))
    loss = lambda *arguments: anp.sum(member.function(*arguments) ** 2)  # noqa: E731
    assert [g.dtype for g in grad(loss, everything)(x, *parameters)] == [
        np.float32,
        *[np.float64] * len(parameters),
    ]
    directions = member.arguments(rng)
    _, tangent = make_jvp(member.function, everything)(x, *parameters)(directions)
    assert tangent.dtype == np.float32


def test_a_gradient_through_a_cast_has_the_dtype_from_before():
    vjp, _ = make_vjp(lambda w: _calls._cast(w, np.float64))(np.ones(3, np.float32))
    assert vjp(np.ones(3)).dtype == np.float32


def test_any_strides(member, rng):
    arguments = member.arguments(rng)
    strided = [np.repeat(a, 2, axis=-1)[..., ::2] for a in arguments]
    everything = tuple(range(len(arguments)))
    loss = lambda *arguments: anp.sum(anp.sin(member.function(*arguments)))  # noqa: E731
    for got, expected in zip(
        grad(loss, everything)(*strided), grad(loss, everything)(*arguments), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=HIGHER_DERIVATIVES / 10, atol=CLOSE_F64)


def running(rng):
    return rng.normal(size=6), rng.uniform(1, 2, 6)


@pytest.mark.parametrize(
    ("ours", "plain"),
    [(batch_norm, bnfast.batch_norm), (instance_norm, bnfast.instance_norm)],
    ids=["batch", "instance"],
)
@pytest.mark.parametrize("differentiated", [False, True])
def test_running_statistics_are_updated_once_for_each_call(ours, plain, differentiated, rng):
    x, mine = rng.normal(size=SHAPE), running(rng)
    expected = [a.copy() for a in mine]
    plain(x, *expected, None, None, True, 0.3)

    def f(x):
        return anp.sum(ours(x, *mine, None, None, True, 0.3) ** 3)

    if differentiated:
        make_hvp(f)(x)[0](x)
    else:
        f(x)
    for got, wanted in zip(mine, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_biased_running_variance_and_momentum(rng):
    x, mine = rng.normal(size=SHAPE), running(rng)
    expected = [a.copy() for a in mine]
    bnfast.batch_norm(x, *expected, None, None, True, 0.7, unbiased=False)
    batch_norm(x, *mine, None, None, True, 0.7, unbiased=False)
    np.testing.assert_array_equal(mine, expected)


def test_evaluation_keeps_the_statistics_that_it_was_called_with(rng):
    x, v, w = rng.normal(size=(3, *SHAPE))
    weight = rng.normal(size=6)
    mean, variance = running(rng)
    function = lambda x, weight: batch_norm(x, mean, variance, weight) ** 2  # noqa: E731
    vjp, _ = make_vjp(function, (0, 1))(x, weight)
    nested, _ = make_vjp(lambda x, weight: make_jvp(function)(x, weight)(v)[1], (0, 1))(x, weight)
    before = *vjp(w), *nested(w)
    mean += 1
    variance *= 2
    for got, expected in zip((*vjp(w), *nested(w)), before, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_weights_of_groups(rng):
    x, w, b = rng.normal(size=SHAPE), *rng.normal(size=(2, 3))
    f = lambda x, w, b: group_norm(x, 3, w, b, per_group=True)  # noqa: E731
    np.testing.assert_array_equal(f(x, w, b), bnfast.group_norm(x, 3, w, b, per_group=True))
    check_grads(f, (0, 1, 2), order=2)(x, w, b)
    loss = lambda *arguments: anp.sum(f(*arguments) ** 2)  # noqa: E731
    assert [g.shape for g in grad(loss, (1, 2))(x, w, b)] == [(3,), (3,)]


@pytest.mark.parametrize("shape", [(0, 6, 3, 2), (4, 6, 0, 2)], ids=str)
def test_empty_batches(shape):
    x, w = np.zeros(shape), np.ones(6)
    functions = [
        lambda x, w: batch_norm(x, None, None, w, training=True),
        lambda x, w: instance_norm(x, weight=w),
        lambda x, w: group_norm(x, 3, w),
        lambda x, w: layer_norm(x, 6, w, axis=1),
        lambda x, w: rms_norm(x, 6, w, axis=1),
    ]
    for function in functions:
        loss = lambda x, w, f=function: anp.sum(f(x, w) ** 3)  # noqa: E731
        of_x, of_w = grad(loss, (0, 1))(x, w)
        assert of_x.shape == shape
        np.testing.assert_array_equal(of_w, 0)
        value = directional(lambda x, f=function: f(x, w), 3)(x, x, x)
        assert value == 0


def test_a_constant_channel_has_the_gradient_of_bnfast():
    x, dy = np.ones((4, 2)), np.arange(8.0).reshape(4, 2)
    vjp, y = make_vjp(lambda x: batch_norm(x, None, None, training=True))(x)
    np.testing.assert_array_equal(y, 0)
    saved = bnfast.batch_norm_forward(x)[1:]
    np.testing.assert_array_equal(vjp(dy), bnfast.batch_norm_backward(dy, x, *saved)[0])


WRONG = [
    (lambda f, x: f.batch_norm(x[0, 0, 0], None, None, training=True), "x must"),
    (lambda f, x: f.batch_norm(x, None, None), "running_mean"),
    (lambda f, x: f.batch_norm(x, None, None, training=1), "training must be True or False"),
    (lambda f, x: f.batch_norm(x, None, None, training=True, axis=7), "axis"),
    (lambda f, x: f.batch_norm(x, None, None, training=True, unbiased=2), "unbiased must"),
    (lambda f, x: f.batch_norm(x, None, None, np.ones(5), training=True), "weight must"),
    (lambda f, x: f.batch_norm(x, None, None, training=True, eps=-1.0), "eps must"),
    (lambda f, x: f.batch_norm(x, None, None, None, None, True, "0.1"), "momentum must"),
    (lambda f, x: f.instance_norm(x, axis=0), "axis"),
    (lambda f, x: f.instance_norm(x, use_input_stats=None), "use_input_stats must"),
    (lambda f, x: f.instance_norm(x, momentum="0.1"), "momentum must"),
    (lambda f, x: f.group_norm(x, 4), "num_groups"),
    (lambda f, x: f.group_norm(x, 3, np.ones(6), per_group=True), "weight must"),
    (lambda f, x: f.group_norm(x, 3, None, [1, 2], per_group=True), "bias must"),
    (lambda f, x: f.layer_norm(x, 5), "normalized_shape must"),
    (lambda f, x: f.layer_norm(x, 2, axis=(2, 2)), "axis must not"),
    (lambda f, x: f.rms_norm(x, 2, np.ones(3)), "weight must"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("traced", [False, True])
def test_errors_are_those_of_bnfast(call, message, traced, rng):
    x = rng.normal(size=SHAPE)
    with pytest.raises((TypeError, ValueError), match=message) as expected:
        call(bnfast, x)
    with pytest.raises(type(expected.value)) as got:
        if traced:
            make_vjp(lambda x: call(functions, x))(x)
        else:
            call(functions, x)
    assert str(got.value) == str(expected.value)


def test_bnfasts_own_function_says_where_autograds_is(rng):
    x, mean, var = rng.normal(size=(6, 3)), np.zeros(3), np.ones(3)
    with pytest.raises(TypeError, match=r"x must be .*; bnfast\.integrations\.autograd has"):
        make_vjp(lambda x: bnfast.batch_norm(x, mean, var))(x)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [False, True])
def test_there_is_no_derivative_by_a_running_statistic(name, training, rng):
    given = dict(zip(("running_mean", "running_var"), running(rng), strict=True))
    x = rng.normal(size=SHAPE)

    def f(statistic):
        return anp.sum(batch_norm(x, **{**given, name: statistic}, training=training))

    with pytest.raises(TypeError, match=f"{name} must be a plain array"):
        grad(f)(given[name].copy())


def test_a_network_learns():
    """A few steps of Newton's method, whose Hessians go through the normalization."""
    rng = np.random.default_rng(3)
    x, target = rng.normal(size=(32, 4)), rng.normal(size=32)
    first = rng.normal(size=(4, 5))

    def loss(second):
        hidden = layer_norm(x @ first * anp.reshape(second, (1, 5)), 5)
        return anp.mean((anp.tanh(hidden) @ np.ones(5) / 2 - target) ** 2) + 0.1 * anp.sum(
            second**2
        )

    second, losses = np.ones(5), []
    for _ in range(4):
        losses.append(loss(second))
        curvature = hessian(loss)(second)
        second = second - 0.5 * np.linalg.solve(
            curvature @ curvature + 0.1 * np.eye(5), curvature @ grad(loss)(second)
        )
    assert losses == sorted(losses, reverse=True)
    step = 1e-5
    numeric = [(loss(second + step * e) - loss(second - step * e)) / (2 * step) for e in np.eye(5)]
    np.testing.assert_allclose(grad(loss)(second), numeric, atol=FINITE_DIFFERENCES)


def test_the_examples_of_the_documentation_run():
    failed, tried = doctest.testmod(functions)
    assert (failed, tried > 0) == (0, True)


def test_without_autograd_the_command_that_installs_it_is_named():
    code = "import sys; sys.modules['autograd'] = None; import bnfast.integrations.autograd"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs autograd: python -m pip install autograd" in done.stderr
