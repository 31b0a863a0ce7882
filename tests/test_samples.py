"""Statistics of each sample: of every channel, or of groups of channels."""

import numpy as np
import pytest

import bnfast
from bnfast import InstanceNorm
from bnfast import _reference as reference
from cases import BUFFERS, in_layout
from oracle import WIDE, assert_within, central_differences, wider_than
from tolerances import (
    CLOSE_F32,
    CLOSE_F64,
    FINITE_DIFFERENCES,
    GRADIENT_SUMS,
    INPUT_GRADIENT,
    MOMENTS,
    OUTPUT,
    eps_of,
)

# (batch, channels, ...) and the number of groups. Around lanes and lines; one sample, one channel,
# one value for each channel; rows of few channels; planes that are cut into chunks and blocks; the
# channels of a group pooled in lanes, and more than these hold.
SEVERAL_BLOCKS = ((2, 4, 140000), 2)
CASES = [
    *[((3, 6, 7, 7), groups) for groups in (1, 2, 3, 6)],
    *[((2, 4, inner), 2) for inner in (1, 2, 15, 16, 17, 63, 64, 65, 129)],
    *[((1, 1, 40), 1), ((5, 1, 3), 1), ((1, 8, 30, 30), 4), ((4, 32), 8), ((2, 70, 49), 35)],
    *[((20, 33, 5), 33), ((2, 3, 70, 70), 1), SEVERAL_BLOCKS, ((3, 130, 9, 9), 26)],
    *[((700, 2, 3), 1), ((3, 60, 5, 5), 3)],
]
INSTANCES = [(shape, shape[1]) for shape, _ in CASES if len(shape) > 2 and shape[2:] != (1,)]


def inputs(rng, shape, axis, dtype, mean=3):
    x = in_layout(rng.normal(mean, 2, shape).astype(dtype), axis)
    dy = in_layout(rng.normal(size=shape).astype(dtype), axis)
    weight, bias = rng.normal(size=(2, shape[1])).astype(dtype)
    return x, dy, weight, bias


def sample_axes(x):
    return tuple(range(1, x.ndim))


def check_forward(x, groups, weight=None, bias=None, axis=1, **keywords):
    got = bnfast.group_norm_forward(x, groups, weight, bias, axis=axis, **keywords)
    y, mean, invstd = got
    expected = reference.group_norm_forward(
        x, groups, weight, bias, axis=axis, precision=wider_than(x.dtype)
    )
    assert y.dtype == x.dtype and mean.shape == invstd.shape == (x.shape[0], groups)
    eps = eps_of(x.dtype)
    size = np.abs(expected[0]).max(sample_axes(x), keepdims=True) + 1
    assert_within(y, expected[0], OUTPUT * eps * size)
    assert_within(mean, expected[1], MOMENTS * eps * (np.abs(expected[1]) + 1 / expected[2]))
    assert_within(invstd, expected[2], 4 * MOMENTS * eps * expected[2])
    return got


def check_backward(dy, x, groups, weight=None, axis=1, **keywords):
    _, mean, invstd = bnfast.group_norm_forward(x, groups, axis=axis)
    got = bnfast.group_norm_backward(dy, x, mean, invstd, weight, axis=axis, **keywords)
    centre = mean
    if x.dtype == np.float64:  # what rounding left of it is found again
        centre = reference.group_norm_forward(x, groups, axis=axis, precision=WIDE)[1]
    expected = reference.group_norm_backward(
        dy, x, centre, invstd, weight, axis=axis, precision=wider_than(x.dtype)
    )
    eps = eps_of(x.dtype)
    gamma = 1.0 if weight is None else np.abs(weight).max()
    shape = (-1,) + (1,) * (x.ndim - 1)
    largest = np.abs(dy).max(sample_axes(x)) * gamma * invstd.max(1)
    assert got[0].dtype == x.dtype
    assert_within(got[0], expected[0], INPUT_GRADIENT * eps * largest.reshape(shape))
    channels = x.shape[axis]
    norms = reference.group_norm_backward(np.abs(dy), x, mean, invstd, axis=axis)[2]
    most = np.abs(reference.group_norm_forward(x, groups, axis=axis)[0]).max()
    assert got[1].shape == got[2].shape == (channels,)
    assert_within(got[1], expected[1], GRADIENT_SUMS * eps * norms * most)
    assert_within(got[2], expected[2], GRADIENT_SUMS * eps * norms)
    return got


def check_values(dtype, rng, axis, shape, groups):
    x, dy, weight, bias = inputs(rng, shape, axis, dtype)
    check_forward(x, groups, weight, bias, axis)
    check_forward(x, groups, None, bias, axis)
    check_backward(dy, x, groups, weight, axis)
    check_backward(dy, x, groups, None, axis)


@pytest.mark.parametrize(
    ("shape", "groups"), [case for case in CASES if case != SEVERAL_BLOCKS], ids=str
)
def test_values(isa, dtype, rng, axis, shape, groups):
    check_values(dtype, rng, axis, shape, groups)


# Of one instruction set: long double is slow, and the others have the same bits (below).
def test_values_of_several_blocks(dtype, rng, axis):
    check_values(dtype, rng, axis, *SEVERAL_BLOCKS)


@pytest.mark.parametrize(("shape", "groups"), INSTANCES, ids=str)
def test_a_group_of_one_channel_is_an_instance(isa, dtype, rng, axis, shape, groups):
    x, dy, weight, bias = inputs(rng, shape, axis, dtype)
    y, mean, invstd = bnfast.instance_norm_forward(x, weight, bias, axis=axis)
    of_groups = bnfast.group_norm_forward(x, groups, weight, bias, axis=axis)
    gradients = bnfast.instance_norm_backward(dy, x, mean, invstd, weight, axis=axis)
    of_groups += bnfast.group_norm_backward(dy, x, mean, invstd, weight, axis=axis)
    for a, b in zip((y, mean, invstd, *gradients), of_groups, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(bnfast.instance_norm(x, None, None, weight, bias, axis=axis), y)


@pytest.mark.parametrize(("shape", "groups"), INSTANCES, ids=str)
def test_an_instance_has_the_bits_of_a_batch_of_one(isa, dtype, rng, axis, shape, groups):
    x, dy, weight, bias = inputs(rng, shape, axis, dtype)
    y, mean, invstd = bnfast.instance_norm_forward(x, weight, bias, axis=axis)
    dx, _, _ = bnfast.instance_norm_backward(dy, x, mean, invstd, weight, axis=axis)
    for n in range(len(x)):
        alone = bnfast.batch_norm_forward(x[n : n + 1], weight, bias, axis=axis)
        np.testing.assert_array_equal(y[n : n + 1], alone[0])
        np.testing.assert_array_equal(mean[n], alone[1])
        np.testing.assert_array_equal(invstd[n], alone[2])
        gradient = bnfast.batch_norm_backward(
            dy[n : n + 1], x[n : n + 1], mean[n], invstd[n], weight, axis=axis
        )
        np.testing.assert_array_equal(dx[n : n + 1], gradient[0])


def everything(x, dy, weight, bias, groups, axis):
    y, mean, invstd = bnfast.group_norm_forward(x, groups, weight, bias, axis=axis)
    return [y, mean, invstd, *bnfast.group_norm_backward(dy, x, mean, invstd, weight, axis=axis)]


@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_threads_caches_and_instruction_sets_change_no_bit(
    dtype, rng, assert_same_bits_everywhere, axis, shape, groups
):
    given = *inputs(rng, shape, axis, dtype, 300), groups, axis
    assert_same_bits_everywhere(lambda: everything(*given))


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("shape", [(3, 6, 7, 11), (4, 6, 2, 3, 5), (5, 6)], ids=str)
def test_any_strides(isa, dtype, rng, axis, buffer, shape):
    x, dy, weight, bias = inputs(rng, shape, axis, dtype)
    make = BUFFERS[buffer]
    for groups in (2, 6) if len(shape) > 2 else (2,):
        check_forward(make(x), groups, weight, bias, axis, out=make(np.zeros_like(x)))
        check_backward(make(dy), make(x), groups, weight, axis, out=make(np.zeros_like(x)))
        check_backward(dy, make(x), groups, weight, axis)


def test_in_place(isa, dtype, rng, axis):
    x, dy, weight, bias = inputs(rng, (3, 6, 9, 9), axis, dtype)
    expected = bnfast.group_norm_forward(x, 3, weight, bias, axis=axis)
    gradients = bnfast.group_norm_backward(dy, x, *expected[1:], weight, axis=axis)
    got = bnfast.group_norm_backward(dy, x, *expected[1:], weight, axis=axis, out=dy)
    assert got[0] is dy
    np.testing.assert_array_equal(dy, gradients[0])
    assert bnfast.group_norm(x, 3, weight, bias, axis=axis, out=x) is x
    np.testing.assert_array_equal(x, expected[0])


@pytest.mark.parametrize("ratio", [1e4, 1e7])
@pytest.mark.parametrize("groups", [4, 8])
def test_output_error_is_at_most_1e_6_whatever_the_mean(isa, rng, axis, ratio, groups):
    x = in_layout(rng.normal(ratio, 1.0, (4, 8, 28, 28)).astype(np.float32), axis)
    y = bnfast.group_norm(x, groups, axis=axis)
    expected, _, _ = reference.group_norm_forward(x, groups, axis=axis, precision=WIDE)
    assert np.abs(y - expected).max() <= 1e-6


@pytest.mark.parametrize("groups", [2, 8])
def test_float64_is_as_exact_for_its_precision(isa, rng, axis, groups):
    x = in_layout(rng.normal(1e10, 1.0, (2, 8, 9, 9)) + np.arange(8.0)[:, None, None], axis)
    shifted = x - 1e10  # exact, and easier for the reference than x is
    y = bnfast.group_norm(x, groups, axis=axis)
    expected, _, _ = reference.group_norm_forward(shifted, groups, axis=axis, precision=WIDE)
    assert np.abs(y - expected).max() <= 1e-14


def test_a_constant_group_gives_exactly_the_bias(isa, dtype, rng, axis):
    x = in_layout(np.full((2, 6, 5, 5), 12345.678, dtype), axis)
    bias = rng.normal(size=6).astype(dtype)
    y = bnfast.group_norm(x, 2, None, bias, axis=axis)
    np.testing.assert_array_equal(np.moveaxis(y, axis, -1), np.broadcast_to(bias, (2, 5, 5, 6)))


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_specials_stay_in_their_sample_and_group(isa, dtype, rng, axis, special):
    x, dy, weight, _ = inputs(rng, (3, 6, 7, 7), axis, dtype)
    clean = everything(x, dy, weight, None, 3, axis)
    np.moveaxis(x, axis, 1)[1, 2, 3, 3] = special
    spoiled = everything(x, dy, weight, None, 3, axis)
    for a, b in ((spoiled[0], clean[0]), (spoiled[3], clean[3])):
        a, b = np.moveaxis(a, axis, 1), np.moveaxis(b, axis, 1)
        others = np.ones((3, 6), bool)
        others[1, 2:4] = False
        np.testing.assert_array_equal(a[others], b[others])
        assert np.isnan(a[~others]).all()


def test_a_weight_of_zero_passes_no_gradient_of_its_channel(isa, dtype, rng, axis):
    x, dy, weight, _ = inputs(rng, (3, 6, 7, 7), axis, dtype)
    weight[2] = 0
    check_backward(dy, x, 2, weight, axis)
    check_backward(dy, x, 6, weight, axis)


@pytest.mark.parametrize(("shape", "groups"), [((2, 4, 5), 2), ((1, 3, 2, 2), 3), ((3, 6), 2)])
def test_gradients_are_those_of_central_differences(rng, axis, shape, groups):
    x, dy, weight, bias = inputs(rng, shape, axis, np.float64, 0)
    _, mean, invstd = bnfast.group_norm_forward(x, groups, axis=axis)
    gradients = bnfast.group_norm_backward(dy, x, mean, invstd, weight, axis=axis)

    def loss():
        return (bnfast.group_norm(x, groups, weight, bias, axis=axis) * dy).sum()

    for array, gradient in zip((x, weight, bias), gradients, strict=True):
        numeric = central_differences(loss, array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


@pytest.mark.parametrize("parameters", [np.float32, np.float64])
def test_running_statistics_are_averages_over_the_samples(isa, dtype, rng, axis, parameters):
    x, _, _, _ = inputs(rng, (4, 5, 6, 7), axis, dtype)
    mean, var = rng.normal(size=5).astype(parameters), rng.uniform(1, 2, 5).astype(parameters)
    planes = np.moveaxis(x, axis, 1).astype(np.float64).reshape(4, 5, -1)
    expected_mean = 0.7 * mean + 0.3 * planes.mean((0, 2))
    expected_var = 0.7 * var + 0.3 * planes.var(2, ddof=1).mean(0)
    bnfast.instance_norm(x, mean, var, momentum=0.3, axis=axis)
    np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=2e-6)
    np.testing.assert_allclose(var, expected_var, rtol=2e-6)


def test_without_the_statistics_of_the_input_it_is_batch_norm(dtype, rng, axis):
    x, _, weight, bias = inputs(rng, (4, 5, 6, 7), axis, dtype)
    mean, var = rng.normal(size=5).astype(dtype), rng.uniform(1, 2, 5).astype(dtype)
    y = bnfast.instance_norm(x, mean, var, weight, bias, False, axis=axis)
    expected = bnfast.batch_norm(x, mean, var, weight, bias, axis=axis)
    np.testing.assert_array_equal(y, expected)


def test_one_weight_for_each_group(dtype, rng, axis):
    x, dy, _, _ = inputs(rng, (3, 6, 5, 5), axis, dtype)
    weight, bias = rng.normal(size=(2, 3)).astype(dtype)
    for_channels = np.repeat(weight, 2), np.repeat(bias, 2)
    y, mean, invstd = bnfast.group_norm_forward(x, 3, weight, bias, axis=axis, per_group=True)
    np.testing.assert_array_equal(y, bnfast.group_norm(x, 3, *for_channels, axis=axis))
    dx, dweight, dbias = bnfast.group_norm_backward(
        dy, x, mean, invstd, weight, axis=axis, per_group=True
    )
    expected = bnfast.group_norm_backward(dy, x, mean, invstd, for_channels[0], axis=axis)
    np.testing.assert_array_equal(dx, expected[0])
    tolerance = CLOSE_F32 if dtype == np.float32 else CLOSE_F64
    np.testing.assert_allclose(dweight, expected[1].reshape(3, 2).sum(1), tolerance, tolerance)
    np.testing.assert_allclose(dbias, expected[2].reshape(3, 2).sum(1), tolerance, tolerance)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_gradients_of_groups_are_rounded_once(isa, rng, axis, weighted):
    x, dy, _, _ = inputs(rng, (3, 60, 5, 5), axis, np.float32)
    weight = rng.normal(size=3).astype(np.float32) if weighted else None
    wide = np.ones(60) if weight is None else np.repeat(weight, 20).astype(np.float64)
    _, mean, invstd = bnfast.group_norm_forward(x, 3, axis=axis)
    got = bnfast.group_norm_backward(dy, x, mean, invstd, weight, axis=axis, per_group=True)
    expected = bnfast.group_norm_backward(dy, x, mean, invstd, wide, axis=axis)
    for of_groups, of_channels in zip(got[1:], expected[1:], strict=True):
        rounded = of_channels.reshape(3, 20).sum(1).astype(np.float32)
        np.testing.assert_array_equal(of_groups, rounded)


def test_no_channels_are_nothing_to_normalize(dtype):
    x = np.empty((3, 0, 2), dtype)
    y, mean, invstd = bnfast.group_norm_forward(x, 2)
    assert y.shape == x.shape
    dx, dweight, dbias = bnfast.group_norm_backward(x, x, mean, invstd)
    assert dx.shape == x.shape and dweight.shape == dbias.shape == (0,)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (0, 4)], ids=str)
def test_an_empty_batch_gives_an_empty_array(dtype, shape):
    x = np.empty(shape, dtype)
    y, mean, invstd = bnfast.group_norm_forward(x, 2)
    assert y.shape == shape and mean.shape == invstd.shape == (shape[0], 2)
    dx, dweight, dbias = bnfast.group_norm_backward(x, x, mean, invstd)
    assert dx.shape == shape
    np.testing.assert_array_equal(dweight, np.zeros(4))
    np.testing.assert_array_equal(dbias, np.zeros(4))
    if len(shape) > 2:
        running = np.zeros(4, dtype), np.ones(4, dtype)
        bnfast.instance_norm(x, *running)
        np.testing.assert_array_equal(running, [np.zeros(4), np.ones(4)])


X = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
D, INVSTD = np.ones((2, 4)), np.ones((2, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bnfast.group_norm(X, 3), ValueError, "num_groups must divide the 4 channels.*3"),
        (lambda: bnfast.group_norm(X, 0), ValueError, "num_groups must be at least 1"),
        (lambda: bnfast.group_norm(X, 2.0), TypeError, "num_groups must be an integer"),
        (lambda: bnfast.group_norm(X, None), TypeError, "num_groups must be an integer"),
        (lambda: bnfast.group_norm(X, 2, axis=0), ValueError, "axis must not be 0"),
        (lambda: bnfast.instance_norm(X, axis=-3), ValueError, "axis must not be 0"),
        (lambda: bnfast.group_norm(X, 2, np.ones(2)), ValueError, "weight must have one value"),
        (lambda: bnfast.group_norm(X, 2, eps=np.inf), ValueError, "eps must be finite"),
        (lambda: bnfast.instance_norm(X, eps=0), ValueError, "eps must be positive"),
        (
            lambda: bnfast.instance_norm(X[:, :, :1], np.zeros(4), np.ones(4)),
            *(ValueError, "x must have more than one value per channel of each sample for an"),
        ),
        (lambda: bnfast.group_norm(X, 2, per_group="no"), TypeError, "per_group must be True"),
        (lambda: bnfast.instance_norm(X, use_input_stats=1), TypeError, "use_input_stats must be"),
        (
            lambda: bnfast.group_norm_backward(D, D, np.zeros((2, 4)), INVSTD, out=INVSTD),
            *(ValueError, "out must not share memory with invstd"),
        ),
        (
            lambda: bnfast.instance_norm(X, use_input_stats=False),
            *(TypeError, "running_mean must be an array"),
        ),
        (
            lambda: bnfast.instance_norm(X, np.zeros(4, np.float32)),
            *(ValueError, "running_mean and running_var must both be given"),
        ),
        (
            lambda: bnfast.group_norm_backward(X, X, np.zeros(4), np.ones(4)),
            *(ValueError, r"mean must be as forward returned it, of shape \(N, G\)"),
        ),
        (
            lambda: bnfast.group_norm_backward(X, X, np.zeros((2, 3)), np.ones((2, 3))),
            *(ValueError, r"mean .* G groups divide the 4 channels, got float64 array of shape"),
        ),
        (
            lambda: bnfast.group_norm_backward(X, X, np.zeros((2, 2)), np.ones((2, 4))),
            *(ValueError, r"invstd must be as forward returned it, shape \(2, 2\)"),
        ),
        (
            lambda: bnfast.group_norm(X, 2, np.ones(4, np.float32), per_group=True),
            *(ValueError, "weight must have one value for each of the 2"),
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_instance_norm_evaluates_with_its_running_statistics(dtype, rng):
    layer = InstanceNorm(6, 1e-3, 0.3, True, True, dtype=dtype)
    for array in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
        array[...] = rng.uniform(0.5, 2, 6)
    x, dy = rng.normal(2, 3, (2, 4, 6, 5, 3)).astype(dtype)
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    layer(x)
    bnfast.instance_norm(x, mean, var, momentum=0.3)
    np.testing.assert_array_equal(layer.running_mean, mean)
    np.testing.assert_array_equal(layer.running_var, var)
    y = layer.eval()(x)
    expected = bnfast.batch_norm(x, mean, var, layer.weight, layer.bias, eps=1e-3)
    np.testing.assert_array_equal(y, expected)
    invstd = 1 / np.sqrt(var.astype(np.float64) + 1e-3)
    dx, dweight, _ = bnfast.batch_norm_backward(dy, x, mean, invstd, layer.weight, training=False)
    np.testing.assert_array_equal(layer.backward(dy), dx)
    np.testing.assert_array_equal(layer.weight_grad, dweight)


def test_without_momentum_instance_norm_leaves_its_statistics_alone(rng):
    layer = InstanceNorm(6, momentum=None, track_running_stats=True)
    layer(rng.normal(2, 3, (4, 6, 5, 3)).astype(np.float32))
    np.testing.assert_array_equal(layer.running_mean, np.zeros(6))
    assert layer.num_batches_tracked == 0
