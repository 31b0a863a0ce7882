"""Conditional batch normalization: a weight and a bias for each sample, or for each class."""

import copy
import pickle

import numpy as np
import pytest

import bnfast
from bnfast import ConditionalBatchNorm
from bnfast import _reference as reference
from cases import BUFFERS, in_layout
from oracle import WIDE, assert_within, central_differences, mean_of_gradient, other_axes
from states import filled
from tolerances import (
    CLOSE_F64,
    FINITE_DIFFERENCES,
    GRADIENT_SUMS,
    INPUT_GRADIENT,
    OUTPUT,
    eps_of,
)

# With their channel axis: NC, NCHW, NHWC and others; one sample, channel or pixel; long runs.
CASES = [
    *[((6, 4), 1), ((70, 33), -1), ((1, 3, 7, 9), 1), ((1, 7, 9, 3), -1), ((5, 1, 6), 1)],
    *[((5, 6, 1), -1), ((4, 3, 5, 6), 1), ((4, 5, 6, 3), -1), ((4, 5, 3, 6), 2)],
    *[((4, 3, 5), -2), ((2, 3, 4, 5, 6), 1), ((2, 4, 5, 6, 3), -1), ((5, 3, 1, 1), 1)],
    *[((3, 2, 4097), 1), ((20, 40, 49), 1), ((13, 17, 5, 7), -3), ((3, 300, 66), -1)],
]
SOME = [((6, 4), 1), ((13, 5, 7, 11), 1), ((3, 7, 11, 5), -1), ((3, 2, 4097), 1), ((3, 900, 5), 2)]
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def inputs(rng, shape, axis, dtype, mean=300):
    """x, dy, and a weight and a bias for each sample."""
    x, dy = rng.normal(mean, 2, shape), rng.normal(size=shape)
    weight, bias = rng.normal(size=(2, shape[0], shape[axis]))
    return tuple(array.astype(dtype) for array in (x, dy, weight, bias))


def running(rng, channels, dtype=np.float64, mean=300):
    return rng.normal(mean, 1, channels).astype(dtype), rng.uniform(1, 5, channels).astype(dtype)


def spread(values, x, axis):
    """(N, C) shaped to broadcast against x."""
    return values.reshape([n if d in (0, axis % x.ndim) else 1 for d, n in enumerate(x.shape)])


def everything(x, dy, weight, bias, axis):
    """All results of all operations, as one list."""
    mean, var = np.zeros(x.shape[axis], x.dtype), np.ones(x.shape[axis], x.dtype)
    y, *saved = bnfast.conditional_batch_norm_forward(x, weight, bias, axis=axis)
    trained = bnfast.conditional_batch_norm(x, weight, bias, mean, var, True, axis=axis)
    evaluated = bnfast.conditional_batch_norm(x, weight, bias, mean, var, axis=axis)
    results = [y, *saved, trained, mean, var, evaluated]
    for training in (True, False):
        results += bnfast.conditional_batch_norm_backward(
            dy, x, *saved, weight, axis=axis, training=training
        )
    return results


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def check(x, dy, weight, bias, axis, training, statistics, out=None):
    """Compare forward and backward with the definition, in long double."""
    given = None if training else statistics
    expected, *saved = reference.conditional_batch_norm_forward(
        x, weight, bias, statistics=given, axis=axis, precision=WIDE
    )
    y = bnfast.conditional_batch_norm(*(x, weight, bias, *statistics, training), axis=axis, out=out)
    axes, eps = other_axes(x, axis), eps_of(x.dtype)
    assert y.dtype == x.dtype
    xhat, _, _ = reference.conditional_batch_norm_forward(
        x, statistics=given, axis=axis, precision=WIDE
    )
    largest = np.abs(xhat).max(axes, keepdims=True)
    if weight is not None:
        largest = largest * np.abs(spread(weight, x, axis))
    if bias is not None:
        largest = largest + np.abs(spread(bias, x, axis))
    writes = 2 if training else 1  # normalized, and then scaled and shifted
    assert_within(y, expected, writes * OUTPUT * eps * largest)

    saved = [statistic.astype(np.float64) for statistic in saved]
    # The sums of samples are made of given statistics, and have only the rounded mean.
    exact = mean_of_gradient(x, saved[0], axes) if training else saved[0]
    gradients = [
        reference.conditional_batch_norm_backward(
            dy, x, mean, saved[1], weight, axis=axis, training=training, precision=WIDE
        )[part]
        for mean, part in ((exact, 0), (saved[0], slice(1, 3)))
    ]
    dx, dweight, dbias = bnfast.conditional_batch_norm_backward(
        dy, x, *saved, weight, axis=axis, training=training, out=out
    )
    assert dx.dtype == x.dtype
    assert dweight.dtype == dbias.dtype == (x.dtype if weight is None else weight.dtype)
    g = np.abs(dy if weight is None else dy * spread(weight, x, axis))
    scale = saved[1].reshape([-1 if d == axis % x.ndim else 1 for d in range(x.ndim)])
    assert_within(dx, gradients[0], INPUT_GRADIENT * eps * g.max(axes, keepdims=True) * scale)
    pixels = tuple(d for d in axes if d != 0)
    for got, sums, terms in zip((dweight, dbias), gradients[1], (dy * xhat, dy), strict=True):
        assert_within(got, sums, GRADIENT_SUMS * eps * np.abs(terms).sum(pixels))


@TRAINING
@pytest.mark.parametrize(("shape", "axis"), CASES, ids=str)
def test_values_and_gradients_are_the_definitions(isa, dtype, rng, shape, axis, training):
    arrays = inputs(rng, shape, axis, dtype)
    check(*arrays, axis, training, running(rng, shape[axis]))


@TRAINING
@pytest.mark.parametrize("buffer", BUFFERS)
def test_buffers_of_any_strides(dtype, rng, axis, buffer, training):
    x, dy, weight, bias = inputs(rng, (7, 3, 5, 4), 1, dtype)
    make = BUFFERS[buffer]
    arrays = *(make(in_layout(array, axis)) for array in (x, dy)), make(weight), make(bias)
    out = make(in_layout(np.zeros_like(x), axis))
    check(*arrays, axis, training, running(rng, 3), out)


@TRAINING
@pytest.mark.parametrize("given", ["weight", "bias", "neither"])
def test_without_a_weight_or_a_bias_there_is_1_or_0(dtype, rng, axis, given, training):
    x, dy, weight, bias = inputs(rng, (7, 3, 5, 4), 1, dtype)
    arrays = in_layout(x, axis), in_layout(dy, axis)
    parameters = weight if given == "weight" else None, bias if given == "bias" else None
    check(*arrays, *parameters, axis, training, running(rng, 3))


def test_parameters_may_have_another_dtype_than_the_data(dtype, rng, axis):
    other = np.float64 if dtype == np.float32 else np.float32
    x, dy, weight, bias = inputs(rng, (4, 3, 5, 6), 1, dtype)
    x, dy = in_layout(x, axis), in_layout(dy, axis)
    weight, bias = weight.astype(other), bias.astype(other)
    expected = everything(x, dy, weight.astype(np.float64), bias.astype(np.float64), axis)
    got = everything(x, dy, weight, bias, axis)
    assert [array.dtype for array in got[-2:]] == [other, other]
    assert_same(got, [e.astype(g.dtype) for e, g in zip(expected, got, strict=True)])


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(("shape", "axis"), SOME, ids=str)
def test_running_statistics_have_the_bits_of_batch_norms(dtype, rng, shape, axis, unbiased):
    x, _, weight, bias = inputs(rng, shape, axis, dtype)
    mine = running(rng, shape[axis], dtype)
    plain = tuple(statistic.copy() for statistic in mine)
    options = {"axis": axis, "unbiased": unbiased}
    bnfast.conditional_batch_norm(x, weight, bias, *mine, True, 0.3, 1e-3, **options)
    bnfast.batch_norm(x, *plain, None, None, True, 0.3, 1e-3, **options)
    assert_same(mine, plain)
    _, *saved = bnfast.conditional_batch_norm_forward(x, weight, bias, 1e-3, axis=axis)
    assert_same(saved, bnfast.batch_norm_forward(x, None, None, 1e-3, axis=axis)[1:])


@pytest.mark.parametrize(("shape", "axis"), SOME, ids=str)
def test_samples_with_the_same_parameters_are_batch_norm(dtype, rng, shape, axis):
    x, dy, weight, bias = inputs(rng, shape, axis, dtype)
    weight[...], bias[...] = weight[0], bias[0]
    mean, var = running(rng, shape[axis], dtype)
    evaluated = bnfast.conditional_batch_norm(x, weight, bias, mean, var, axis=axis)
    expected = bnfast.batch_norm(x, mean, var, weight[0], bias[0], axis=axis)
    np.testing.assert_array_equal(evaluated, expected)
    y, *saved = bnfast.conditional_batch_norm_forward(x, weight, bias, axis=axis)
    expected, *_ = bnfast.batch_norm_forward(x, weight[0], bias[0], axis=axis)
    assert_within(y, expected, 3 * OUTPUT * eps_of(dtype) * np.abs(expected).max())
    of_all = bnfast.batch_norm_backward(dy, x, *saved, weight[0], axis=axis)
    dx, *gradients = bnfast.conditional_batch_norm_backward(dy, x, *saved, weight, axis=axis)
    assert_within(dx, of_all[0], 2 * INPUT_GRADIENT * eps_of(dtype) * np.abs(of_all[0]).max())
    for rows, whole in zip(gradients, of_all[1:], strict=True):
        size = 8 * np.abs(dy).sum(other_axes(x, axis))  # xhat is within 8
        assert_within(rows.sum(0), whole, 2 * GRADIENT_SUMS * eps_of(dtype) * size)


def test_a_sample_is_evaluated_as_if_it_were_alone(dtype, rng, axis):
    x, _, weight, bias = inputs(rng, (6, 3, 5, 4), 1, dtype)
    x, statistics = in_layout(x, axis), running(rng, 3, dtype)
    y = bnfast.conditional_batch_norm(x, weight, bias, *statistics, axis=axis)
    for n in range(6):
        alone = bnfast.batch_norm(x[n : n + 1], *statistics, weight[n], bias[n], axis=axis)
        np.testing.assert_array_equal(y[n : n + 1], alone)


def test_a_constant_channel_gives_the_bias_of_each_sample(dtype, rng, axis):
    x, _, weight, bias = inputs(rng, (4, 3, 5, 6), 1, dtype)
    x[:, 1] = 1e4 / 3
    y, _, _ = bnfast.conditional_batch_norm_forward(in_layout(x, axis), weight, bias, axis=axis)
    channel = np.moveaxis(y, axis, 0)[1]
    np.testing.assert_array_equal(channel, np.broadcast_to(bias[:, 1, None, None], channel.shape))


@TRAINING
def test_gradients_are_central_differences(rng, axis, training):
    x, dy, weight, bias = inputs(rng, (3, 2, 2, 2), 1, np.float64, 0)
    x, dy = in_layout(x, axis), in_layout(dy, axis) / 10
    mean, var = running(rng, 2, mean=0)

    def loss():
        y, _, _ = reference.conditional_batch_norm_forward(
            x, weight, bias, statistics=None if training else (mean, var), axis=axis
        )
        return (y * dy).sum()

    saved = mean, 1 / np.sqrt(var + 1e-5)
    if training:
        _, *saved = bnfast.conditional_batch_norm_forward(x, weight, bias, axis=axis)
    gradients = bnfast.conditional_batch_norm_backward(
        dy, x, *saved, weight, axis=axis, training=training
    )
    for array, gradient in zip((x, weight, bias), gradients, strict=True):
        numeric = central_differences(loss, array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


@TRAINING
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 4, 5, 6)], ids=str)
def test_values_and_gradients_are_autograds(rng, shape, training):
    torch = pytest.importorskip("torch")
    x, dy, weight, bias = inputs(rng, shape, 1, np.float64, 3)
    mean, var = running(rng, 3, mean=0)
    theirs = [torch.from_numpy(array.copy()).requires_grad_() for array in (x, weight, bias)]
    statistics = [torch.from_numpy(array.copy()) for array in (mean, var)]
    plain = torch.nn.functional.batch_norm(theirs[0], *statistics, training=training)
    of_samples = [p.reshape(*p.shape, *[1] * (x.ndim - 2)) for p in theirs[1:]]
    expected = of_samples[0] * plain + of_samples[1]
    expected.backward(torch.from_numpy(dy))
    saved = mean.copy(), 1 / np.sqrt(var + 1e-5)
    y = bnfast.conditional_batch_norm(x, weight, bias, mean, var, training)
    if training:
        _, *saved = bnfast.conditional_batch_norm_forward(x, weight, bias)
    got = bnfast.conditional_batch_norm_backward(dy, x, *saved, weight, training=training)
    close = {"rtol": 1e-9, "atol": 1e-11}
    np.testing.assert_allclose(y, expected.detach().numpy(), **close)
    for ours, tensor in zip((mean, var), statistics, strict=True):
        np.testing.assert_allclose(ours, tensor.numpy(), **close)
    for gradient, tensor in zip(got, theirs, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), **close)


@pytest.mark.parametrize(("shape", "axis"), SOME, ids=str)
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(
    dtype, rng, use_isa, use_threads, shape, axis
):
    arrays = inputs(rng, shape, axis, dtype)
    use_isa("baseline")
    expected = everything(*arrays, axis)
    for name in bnfast.available_isas():
        use_isa(name)
        for num_threads in (1, 2, 3, 7):
            use_threads(num_threads)
            assert_same(everything(*arrays, axis), expected)


@pytest.mark.parametrize(
    "buffer",
    ["misaligned", "offset_by_one", "in_larger_array", "cropped", "reversed", "record_field"],
)
@pytest.mark.parametrize(
    "shape", [(13, 5, 7, 11), (2, 3, 130, 33), (70, 20), (20, 3, 2), (5, 4, 1, 1)], ids=str
)
def test_odd_strides_give_the_bits_of_a_packed_copy(isa, dtype, rng, axis, buffer, shape):
    x, dy, weight, bias = inputs(rng, shape, 1, dtype)
    x, dy = in_layout(x, axis), in_layout(dy, axis)
    expected = everything(x, dy, weight, bias, axis)
    make = BUFFERS[buffer]
    assert_same(everything(make(x), make(dy), make(weight), make(bias), axis), expected)
    assert_same(everything(x, make(dy), weight, bias, axis), expected)


@pytest.mark.parametrize(("shape", "axis"), SOME, ids=str)
def test_a_nan_stays_in_its_channel(dtype, rng, shape, axis):
    x, dy, weight, bias = inputs(rng, shape, axis, dtype)
    expected = everything(x, dy, weight, bias, axis)
    np.moveaxis(x, axis, 0)[1, 0] = np.nan
    for got, want in zip(everything(x, dy, weight, bias, axis), expected, strict=True):
        where = {1: 0, 2: 1}.get(got.ndim, axis)
        a, b = (np.moveaxis(array, where, 0) for array in (got, want))
        np.testing.assert_array_equal(np.delete(a, 1, 0), np.delete(b, 1, 0))


@TRAINING
@pytest.mark.parametrize("make", [np.array, BUFFERS["in_larger_array"]], ids=["packed", "gaps"])
def test_in_place_is_as_elsewhere(dtype, rng, axis, training, make):
    x, dy, weight, bias = inputs(rng, (6, 3, 5, 4), 1, dtype)
    x, dy = in_layout(x, axis), in_layout(dy, axis)
    mean, var = running(rng, 3, dtype)
    options = {"axis": axis, "training": training}

    def forward(x, out=None):
        statistics = mean.copy(), var.copy()
        return bnfast.conditional_batch_norm(x, weight, bias, *statistics, **options, out=out)

    def backward(dy, x, out=None):
        return bnfast.conditional_batch_norm_backward(dy, x, mean, var, weight, **options, out=out)[
            0
        ]

    out = make(x)
    assert forward(out, out) is out
    np.testing.assert_array_equal(out, forward(x))
    out = make(dy)
    assert backward(out, make(x), out) is out
    np.testing.assert_array_equal(out, backward(dy, x))
    if not training:
        out = make(x)
        assert backward(make(dy), out, out) is out
        np.testing.assert_array_equal(out, backward(dy, x))


@TRAINING
@pytest.mark.parametrize(
    ("shape", "axis"), [((0, 3), 1), ((0, 3, 4), 1), ((2, 3, 0), 1), ((2, 3, 0), -1), ((0,), 1)]
)
def test_an_empty_batch_gives_empty_arrays_and_no_gradient(dtype, shape, axis, training):
    x = np.empty(shape, dtype)
    channels = x.shape[axis] if x.ndim > 1 else 0
    mean, var, weight = np.zeros(channels), np.ones(channels), np.ones((len(x), channels))
    y = bnfast.conditional_batch_norm(x, weight, weight, mean, var, training, axis=axis)
    assert y.shape == shape
    np.testing.assert_array_equal(var, 1)
    dx, dweight, dbias = bnfast.conditional_batch_norm_backward(
        x, x, mean, var, weight, axis=axis, training=training
    )
    assert dx.shape == shape
    for gradient in (dweight, dbias):
        np.testing.assert_array_equal(gradient, np.zeros_like(weight))


X = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
ROWS = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
ONES = np.ones(3)


def refusals():
    """Calls that are refused, each given an output and running statistics, with the message."""
    train = bnfast.conditional_batch_norm
    back = bnfast.conditional_batch_norm_backward
    ends = ValueError, "one value for each of the 3 channels of each of the 4 samples"
    return {
        "one weight": (lambda o, m, v: train(X, ONES, None, m, v, True, out=o), *ends),
        "few weights": (lambda o, m, v: train(X, ROWS[:3], None, m, v, True, out=o), *ends),
        "turned bias": (lambda o, m, v: train(X, None, ROWS.T, m, v, out=o), *ends),
        "integers": (
            lambda o, m, v: train(X, np.ones((4, 3), int), None, m, v, True, out=o),
            *(TypeError, "weight must be float16, bfloat16, float32 or float64"),
        ),
        "axis 0": (
            lambda o, m, v: train(X, None, None, m, v, True, axis=0, out=o),
            *(ValueError, "axis must not be 0"),
        ),
        "axis": (
            lambda o, m, v: train(X, ROWS, None, m, v, True, axis=3, out=o),
            *(ValueError, "axis must be from -3 to 2"),
        ),
        "training": (
            lambda o, m, v: train(X, ROWS, None, m, v, 1, out=o),
            *(TypeError, "training must be True or False"),
        ),
        "eps": (
            lambda o, m, v: train(X, ROWS, ROWS, m, v, True, eps=0.0, out=o),
            *(ValueError, "eps must be positive in training"),
        ),
        "eps in evaluation": (
            lambda o, m, v: train(X, ROWS, ROWS, m, v, eps=-1.0, out=o),
            *(ValueError, "eps must not be negative"),
        ),
        "momentum": (
            lambda o, m, v: train(X, ROWS, ROWS, m, v, momentum=np.nan, out=o),
            *(ValueError, "momentum must be finite"),
        ),
        "no statistics": (
            lambda o, m, v: train(X, ROWS, ROWS, out=o),
            *(TypeError, "running_mean must be an array of shape"),
        ),
        "half of the statistics": (
            lambda o, m, v: train(X, ROWS, ROWS, m, None, True, out=o),
            *(ValueError, "got None for running_var"),
        ),
        "one value": (
            lambda o, m, v: train(X[:1, :, 0], ROWS[:1], None, m, v, True, out=o[:1, :, 0]),
            *(ValueError, "more than one value per channel"),
        ),
        "out": (
            lambda o, m, v: train(X, ROWS, ROWS, m, v, True, out=o[:2]),
            *(ValueError, "out must have the shape and dtype of x"),
        ),
        "weight in out": (
            lambda o, m, v: train(X, o[:, :, 0], None, m, v, True, out=o),
            *(ValueError, "out must not share memory with weight"),
        ),
        "bias in out, evaluation": (
            lambda o, m, v: train(X, None, o[:, :, 0], m, v, out=o),
            *(ValueError, "out must not share memory with bias"),
        ),
        "statistics in the weight": (
            lambda o, m, v: train(X[:1], m[None], None, m, v, True, out=o[:1]),
            *(ValueError, "running_mean is updated in place and must not share memory with weight"),
        ),
        "dy": (
            lambda o, m, v: back(X[:2], X, m, v, ROWS, out=o),
            *(ValueError, "dy must have the shape and dtype of x"),
        ),
        "mean": (
            lambda o, m, v: back(X, X, m[:2], v, ROWS, out=o),
            *(ValueError, "mean must have one value for each of the 3 channels"),
        ),
        "invstd": (
            lambda o, m, v: back(X, X, m, None, ROWS, out=o),
            *(TypeError, "invstd must be an array of shape"),
        ),
        "weight backward": (lambda o, m, v: back(X, X, m, v, ONES, out=o), *ends),
        "weight in dx": (
            lambda o, m, v: back(X, X, m, v, o[:, :, 0], out=o),
            *(ValueError, "out must not share memory with weight"),
        ),
        "x in dx": (
            lambda o, m, v: back(X, o, m, v, ROWS, out=o),
            *(ValueError, "out must not share memory with x, which training reads once more"),
        ),
        "part of dy": (
            lambda o, m, v: back(o[:2], X[:2], m, v, ROWS[:2], out=o[1:3]),
            *(ValueError, "out must be dy itself or share no element with it"),
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_is_refused_writes_nothing(name):
    call, error, message = refusals()[name]
    out, mean, var = np.full_like(X, 7), np.full(3, 2.0, np.float32), np.full(3, 3.0, np.float32)
    with pytest.raises(error, match=message):
        call(out, mean, var)
    for array, value in ((out, 7), (mean, 2), (var, 3)):
        np.testing.assert_array_equal(array, value)


LABELS = np.array([3, 0, 3, 1, 3, 0, 1])  # of 5 classes, two of which have no sample


@TRAINING
def test_the_layer_adds_up_the_gradients_of_the_samples_of_a_class(dtype, rng, axis, training):
    layer = filled(ConditionalBatchNorm(3, 5, 1e-3, axis=axis, dtype=dtype), rng).train(training)
    x, dy, _, _ = inputs(rng, (7, 3, 5, 4), 1, dtype)
    x, dy = in_layout(x, axis), in_layout(dy, axis)
    weight, bias = layer.weight[LABELS], layer.bias[LABELS]
    statistics = layer.running_mean.copy(), layer.running_var.copy()
    expected = bnfast.conditional_batch_norm(
        x, weight, bias, *statistics, training, 0.1, 1e-3, axis=axis
    )
    mean, invstd = statistics[0], 1 / np.sqrt(statistics[1].astype(np.float64) + 1e-3)
    if training:
        _, mean, invstd = bnfast.conditional_batch_norm_forward(x, weight, bias, 1e-3, axis=axis)
    np.testing.assert_array_equal(layer(x, LABELS), expected)
    layer.weight *= 2  # backward is of what it was
    dx, *gradients = bnfast.conditional_batch_norm_backward(
        dy, x, mean, invstd, weight.astype(np.float64), axis=axis, training=training
    )
    np.testing.assert_array_equal(layer.backward(dy), dx)
    np.testing.assert_array_equal(layer.running_mean, statistics[0])
    np.testing.assert_array_equal(layer.running_var, statistics[1])
    assert layer.num_batches_tracked == int(training)
    for table, rows in zip((layer.weight_grad, layer.bias_grad), gradients, strict=True):
        assert table.shape == (5, 3)
        assert table.dtype == dtype
        for k in range(5):
            np.testing.assert_array_equal(table[k], rows[LABELS == k].sum(0).astype(dtype))


@TRAINING
def test_gradients_of_the_tables_are_central_differences(rng, axis, training):
    layer = filled(ConditionalBatchNorm(2, 3, axis=axis, dtype=np.float64), rng).train(training)
    x, dy, _, _ = inputs(rng, (4, 2, 2, 2), 1, np.float64, 0)
    x, dy = in_layout(x, axis), in_layout(dy, axis) / 10
    as_it_was = copy.deepcopy(layer)
    layer(x, [2, 0, 2, 2])
    gradients = layer.backward(dy), layer.weight_grad, layer.bias_grad

    def loss():
        return (copy.deepcopy(as_it_was)(x, [2, 0, 2, 2]) * dy).sum()

    for array, gradient in zip((x, as_it_was.weight, as_it_was.bias), gradients, strict=True):
        numeric = central_differences(loss, array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics_of_the_layer_are_batch_norms(dtype, rng, axis, momentum, unbiased):
    options = {"axis": axis, "unbiased": unbiased, "dtype": dtype}
    layer = ConditionalBatchNorm(3, 5, 1e-3, momentum, **options)
    plain = bnfast.BatchNorm(3, 1e-3, momentum, affine=False, **options)
    for _ in range(3):
        x = in_layout(inputs(rng, (7, 3, 5, 4), 1, dtype)[0], axis)
        layer(x, LABELS), plain(x)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", *plain.state_dict()]
    for name, array in plain.state_dict().items():
        np.testing.assert_array_equal(state[name], array)


def test_without_running_statistics_evaluation_is_training(rng, axis):
    layer = ConditionalBatchNorm(3, 5, track_running_stats=False, axis=axis)
    x, dy, _, _ = (in_layout(a, axis) for a in inputs(rng, (7, 3, 5, 4), 1, np.float32))
    y, dx = layer(x, LABELS), layer.backward(dy)
    np.testing.assert_array_equal(layer.eval()(x, LABELS), y)
    np.testing.assert_array_equal(layer.backward(dy), dx)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_state_goes_from_layer_to_layer(rng):
    layer = filled(ConditionalBatchNorm(3, 5), rng)
    other = ConditionalBatchNorm(3, 5)
    other.load_state_dict(layer.state_dict())
    x = inputs(rng, (7, 3, 5, 4), 1, np.float32)[0]
    for copied in (other, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        np.testing.assert_array_equal(copied.eval()(x, LABELS), layer.eval()(x, LABELS))
    with pytest.raises(ValueError, match=r"weight must have the shape \(4, 3\)"):
        ConditionalBatchNorm(3, 4).load_state_dict(layer.state_dict())


def test_the_representation_says_how_to_make_the_layer():
    assert repr(ConditionalBatchNorm(6, 10)) == (
        "ConditionalBatchNorm(6, num_classes=10, eps=1e-05, momentum=0.1, "
        "track_running_stats=True, axis=1, unbiased=True, dtype=float32)"
    )


@TRAINING
def test_an_empty_batch_counts_for_nothing(training):
    layer = ConditionalBatchNorm(3, 5).train(training)
    before = layer.state_dict()
    y = layer(np.empty((0, 3, 4), np.float32), np.empty(0, int))
    np.testing.assert_equal(layer.state_dict(), before)
    assert layer.backward(y).shape == y.shape
    np.testing.assert_array_equal(layer.weight_grad, np.zeros((5, 3)))


@TRAINING
def test_in_place_leaves_nothing_to_go_back_from(rng, training):
    layer, other = (ConditionalBatchNorm(3, 5).train(training) for _ in range(2))
    x = inputs(rng, (7, 3, 5, 4), 1, np.float32)[0]
    expected = other(x, LABELS)
    np.testing.assert_array_equal(layer(x, LABELS, out=x), expected)
    with pytest.raises(RuntimeError, match="not in place"):
        layer.backward(x)


@TRAINING
@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (LABELS.astype(np.float32), TypeError, "labels must be integers, .* got float32 array"),
        (LABELS > 1, TypeError, "labels must be integers, .* got bool array"),
        (np.ma.array(LABELS), TypeError, "labels must be integers, .* got"),
        ([[1], [1, 2]], TypeError, r"labels must be integers, .* shape \(7,\), got"),
        (None, TypeError, "labels must be integers, .* got None"),
        (LABELS[:6], ValueError, r"one for each of the 7 samples, shape \(7,\), got int64 array"),
        (LABELS[:, None], ValueError, r"got int64 array of shape \(7, 1\)"),
        (2, ValueError, r"shape \(7,\), got int64 array of shape \(\)"),
        (LABELS + 2, ValueError, "labels must be from 0 to 4, for 5 classes, got 5"),
        (LABELS - 1, ValueError, "labels must be from 0 to 4, for 5 classes, got -1"),
        (LABELS.astype(np.uint64) - np.uint64(1), ValueError, "got 18446744073709551615"),
    ],
)
def test_bad_labels_leave_the_layer_as_it_was(rng, labels, error, message, training):
    layer = ConditionalBatchNorm(3, 5)
    x = inputs(rng, (7, 3, 5, 4), 1, np.float32)[0]
    layer(x, LABELS)
    layer.train(training)
    before, out = layer.state_dict(), np.full_like(x, 7)
    with pytest.raises(error, match=message):
        layer(x, labels, out=out)
    np.testing.assert_array_equal(out, 7)
    np.testing.assert_equal(layer.state_dict(), before)
    assert layer.backward(x).shape == x.shape


def test_a_batch_without_samples_needs_no_labels():
    layer, x = ConditionalBatchNorm(3, 5), np.ones((0, 3, 4), np.float32)
    assert layer(x, []).shape == x.shape


def test_labels_of_any_integer_dtype_are_copied(rng):
    layer, other = ConditionalBatchNorm(3, 5), ConditionalBatchNorm(3, 5)
    x, dy, _, _ = inputs(rng, (7, 3, 5, 4), 1, np.float32)
    labels = LABELS.astype(np.uint8)
    np.testing.assert_array_equal(layer(x, labels), other(x, list(LABELS)))
    labels[...] = 4
    layer.backward(dy), other.backward(dy)
    np.testing.assert_array_equal(layer.weight_grad, other.weight_grad)


@pytest.mark.parametrize(
    ("make_bad", "error", "message"),
    [
        (lambda: ConditionalBatchNorm(3, 0), ValueError, "num_classes must be at least 1"),
        (lambda: ConditionalBatchNorm(3, 2.0), TypeError, "num_classes must be an integer"),
        (lambda: ConditionalBatchNorm(-3, 2), ValueError, "num_features must be at least 0"),
        (
            lambda: ConditionalBatchNorm(4, 2)(X, [0, 0, 1, 1]),
            *(ValueError, "x must have 4 channels along axis 1"),
        ),
        (
            lambda: ConditionalBatchNorm(4, 2, axis=0)(X, [0, 0, 1, 1]),
            *(ValueError, "axis must not be 0"),
        ),
    ],
)
def test_bad_arguments_of_the_layer_are_refused(make_bad, error, message):
    with pytest.raises(error, match=message):
        make_bad()


def test_a_backward_that_is_refused_may_be_tried_again(rng):
    layer = ConditionalBatchNorm(3, 5, dtype=np.float64)
    x, dy, _, _ = inputs(rng, (7, 3, 5, 4), 1, np.float64)
    y, kept = layer(x, LABELS), x.copy()
    with pytest.raises(ValueError, match="out must not share memory with x, which training reads"):
        layer.backward(dy, out=x)
    np.testing.assert_array_equal(x, kept)
    dx = layer.backward(dy, out=dy)
    assert dx is dy
    assert np.abs(dx.sum((0, 2, 3))).max() < CLOSE_F64 * np.abs(y).sum()


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_nothing_are_zero_whatever_the_statistics(training):
    x = np.zeros((2, 3, 0), np.float32)
    saved = np.zeros(3), np.full(3, np.inf)
    _, dweight, dbias = bnfast.conditional_batch_norm_backward(x, x, *saved, training=training)
    np.testing.assert_array_equal(dweight, np.zeros((2, 3)))
    np.testing.assert_array_equal(dbias, np.zeros((2, 3)))
