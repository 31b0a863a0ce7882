"""Batch norm that writes its output over its input: the gradient is made of the output alone."""

import pickle

import numpy as np
import pytest

import bnfast
from bnfast import _dtypes
from bnfast._cli.kept_memory import kept_bytes
from test_fused import laid_out
from tolerances import eps_of

SLOPE = 0.25
SHAPES = {"large": (3, 6, 40, 100), "planes": (5, 12, 4, 5), "rows": (70, 6), "none": (0, 4, 3)}


def made(channels, axis=1, activation="leaky_relu", **options):
    return bnfast.BatchNorm(
        channels, axis=axis, activation=activation, negative_slope=SLOPE, **options
    )


def with_parameters(layer, rng):
    """Of both signs, and of about the size of xhat."""
    layer.weight[...] = rng.uniform(0.5, 2.0, layer.num_features) * rng.choice(
        [-1, 1], layer.num_features
    )
    layer.bias[...] = rng.normal(size=layer.num_features)
    return layer


def pair(rng, channels, **options):
    """A layer that works in place, and one that does not."""
    inplace = with_parameters(made(channels, inplace=True, **options), rng)
    plain = made(channels, **options)
    plain.load_state_dict(inplace.state_dict())
    return inplace, plain


def results(layer, dy):
    return layer.backward(dy), layer.weight_grad, layer.bias_grad


@pytest.mark.parametrize("activation", ["leaky_relu", None])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_it_is_the_layer_that_keeps_its_input(rng, dtype, shape, layout, activation):
    x, dy = rng.normal(1, 3, (2, *shape)).astype(dtype)
    x, dy = laid_out(x, layout), laid_out(dy, layout)
    inplace, plain = pair(rng, shape[1], activation=activation, dtype=dtype)
    given = laid_out(x.copy(), layout)
    y = inplace(x)
    assert y is x
    np.testing.assert_array_equal(y, plain(given))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        np.testing.assert_array_equal(getattr(inplace, name), getattr(plain, name))
    before = y.copy()
    got, expected = results(inplace, dy), results(plain, dy)
    np.testing.assert_array_equal(y, before)
    tolerance = 30 * eps_of(dtype)
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=tolerance * 20)
    np.testing.assert_array_equal(got[2], expected[2])
    size = np.abs(dy).sum(dtype=np.float64) if dy.size else 1.0
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=tolerance * size)
    assert [a.dtype for a in got] == [a.dtype for a in expected]


@pytest.mark.parametrize("mode", ["evaluation", "frozen", "without a weight"])
def test_every_mode_of_the_layer(rng, mode):
    x, dy = rng.normal(1, 3, (2, 8, 5, 6, 6))
    inplace, plain = pair(rng, 5, dtype=np.float64)
    layers = inplace, plain
    before = rng.normal(1, 3, (8, 5, 6, 6))
    for layer in layers:
        layer(before.copy())
        if mode == "evaluation":
            layer.eval()
        elif mode == "frozen":
            layer.frozen = True
    if mode == "without a weight":
        layers = made(5, affine=False, inplace=True), made(5, affine=False)
    outputs = [layer(x.copy()) for layer in layers]
    np.testing.assert_array_equal(*outputs)
    for got, expected in zip(*(results(layer, dy) for layer in layers), strict=True):
        if expected is None:
            assert got is None
        else:
            np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)


def test_the_gradient_is_the_derivative(rng):
    x, dy = rng.normal(1, 2, (2, 6, 3, 4))
    layer = with_parameters(made(3, dtype=np.float64, inplace=True), rng)
    y = layer(x.copy())
    dx = layer.backward(dy)
    assert np.abs(y).min() > 1e-4  # no difference is across the kink
    step = 1e-6
    for index in [(0, 0, 0), (3, 1, 2), (5, 2, 3)]:
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        difference = ((layer(up) - layer(down)) * dy).sum() / (2 * step)
        np.testing.assert_allclose(dx[index], difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(16, 24, 30, 30), (200, 7), (4, 9, 5, 5)], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_same_bits_from_any_threads_and_instruction_sets(
    rng, dtype, use_threads, use_isa, shape, layout
):
    x, dy = (laid_out(a, layout) for a in rng.normal(1, 3, (2, *shape)).astype(dtype))
    layer = with_parameters(made(shape[1], dtype=dtype, inplace=True), rng)
    first = None
    for isa in bnfast.available_isas():
        use_isa(isa)
        for threads in (1, 3):
            use_threads(threads)
            layer(x.copy())
            got = results(layer, dy)
            first = first or got
            for one, other in zip(got, first, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_data_of_16_bits(rng, half, layout):
    if half == "bfloat16":
        pytest.importorskip("ml_dtypes")
    type_ = _dtypes.named(half)
    x, dy = (laid_out(a.astype(type_), layout) for a in rng.normal(1, 3, (2, 8, 6, 9, 9)))
    inplace, plain = pair(rng, 6)
    y = inplace(laid_out(x.copy(), layout))
    np.testing.assert_array_equal(y, plain(x))
    dx, dweight, dbias = results(inplace, dy)
    expected = results(plain, dy)
    step = 2.0**-11 if half == "float16" else 2.0**-8
    assert dx.dtype == type_
    np.testing.assert_allclose(
        dx.astype(np.float64), expected[0].astype(np.float64), rtol=0, atol=40 * step
    )
    size = np.abs(dy.astype(np.float64)).sum((0, 2, 3))
    assert (np.abs(dweight - expected[1]) <= 4 * step * size).all()
    assert (np.abs(dbias - expected[2]) <= 1e-5 * size).all()


def test_weights_and_statistics_of_any_size(rng):
    """What float64 holds of weight, bias and invstd, and a constant channel."""
    x, dy = rng.normal(size=(2, 50, 6))
    x *= 10.0 ** np.array([0, 0, 0, -30, 30, 0])
    x[:, 5] = 3.0
    inplace, plain = made(6, dtype=np.float64, eps=1e-300, inplace=True), None
    inplace.weight[...] = 1e-20, -1e20, 1, 1, 1, 1
    plain = made(6, dtype=np.float64, eps=1e-300)
    plain.load_state_dict(inplace.state_dict())
    np.testing.assert_array_equal(inplace(x.copy()), plain(x))
    got, expected = results(inplace, dy), results(plain, dy)
    size = np.abs(expected[0]).max(0)
    assert (np.abs(got[0] - expected[0]) <= 1e-12 * size).all()
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-12, atol=1e-12)


def test_gradients_may_take_the_place_of_dy_and_of_the_output(rng, dtype):
    x, dy = rng.normal(size=(2, 8, 4, 5, 5)).astype(dtype)
    layer = with_parameters(made(4, dtype=dtype, inplace=True), rng)
    layer(x.copy())
    expected = layer.backward(dy)
    layer(x.copy())
    given = dy.copy()
    assert layer.backward(given, out=given) is given
    np.testing.assert_array_equal(given, expected)
    y = layer(x.copy())
    assert layer.backward(dy, out=y) is y
    np.testing.assert_array_equal(y, expected)


def test_backward_has_the_parameters_of_the_call(rng):
    x, dy = rng.normal(size=(2, 8, 4)).astype(np.float32)
    layer = with_parameters(made(4, inplace=True), rng)
    layer(x.copy())
    expected = results(layer, dy)
    layer(x.copy())
    layer.weight[...], layer.bias[...], layer.activation = 3.0, 2.0, None
    for one, other in zip(results(layer, dy), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_output_elsewhere_leaves_the_input_as_it_is(rng):
    x, dy = rng.normal(size=(2, 8, 4)).astype(np.float32)
    layer, given, out = made(4, inplace=True), x.copy(), np.empty_like(x)
    assert layer(given, out=out) is out
    np.testing.assert_array_equal(given, x)
    given[...] = np.nan
    assert np.isfinite(layer.backward(dy)).all()


def test_only_the_output_is_kept(rng):
    x = rng.normal(size=(8, 4, 100)).astype(np.float32)
    layer = made(4, inplace=True)
    before = kept_bytes(layer)
    y = layer(x)
    assert kept_bytes(layer, but=[y]) - before <= 1000
    layer.backward(np.ones_like(y))
    assert kept_bytes(layer) - before <= 1000


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish"])
def test_what_cannot_be_inverted_is_refused(activation, rng):
    with pytest.raises(ValueError, match=f"inplace=True can invert.*got {activation}"):
        bnfast.BatchNorm(3, activation=activation, inplace=True)
    with pytest.raises(ValueError, match=r"negative_slope above 0, got leaky_relu with 0\.0"):
        bnfast.BatchNorm(3, activation="leaky_relu", negative_slope=0.0, inplace=True)
    layer = made(3, inplace=True)
    layer.activation = activation
    assert_refused(layer, rng.normal(size=(8, 3)), "inplace=True can invert")


@pytest.mark.parametrize(
    ("dtype", "least"), [("float16", 2.0**-14), ("bfloat16", 2.0**-126), ("float32", 2.0**-126)]
)
def test_a_slope_that_loses_what_is_below_0_is_refused(rng, dtype, least):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x, dy = (a.astype(_dtypes.named(dtype)) for a in rng.normal(size=(2, 200, 3)))
    layer = bnfast.BatchNorm(
        3, activation="leaky_relu", negative_slope=0.9 * least, inplace=True, affine=False
    )
    assert_refused(layer, x, "negative_slope must be at least .* data of")
    plain = bnfast.BatchNorm(3, activation="leaky_relu", negative_slope=least, affine=False)
    plain(x)
    expected = plain.backward(dy)
    layer.negative_slope = least
    layer(x)
    step = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[dtype]
    difference = layer.backward(dy).astype(np.float64) - expected.astype(np.float64)
    assert np.abs(difference).max() <= 10 * step


def assert_refused(layer, x, message, error=ValueError, **arguments):
    before, state = x.copy(), layer.state_dict()
    with pytest.raises(error, match=message):
        layer(x, **arguments)
    np.testing.assert_array_equal(x, before)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, state[name])


def test_bad_calls_write_nothing(rng):
    x = rng.normal(size=(8, 3))
    layer = made(3, inplace=True)
    assert_refused(layer, x, "residual must be None with inplace", residual=np.zeros_like(x))
    assert_refused(
        layer, x, "mask and lengths must be None with inplace", mask=np.ones((8, 1), bool)
    )
    for bad in (0.0, np.nan, np.inf, 1e-120):
        double = made(3, dtype=np.float64, inplace=True)
        double.weight[1] = bad
        assert_refused(double, x, "weight must not be 0 .* in channel 1")
    learned = bnfast.LearnableMomentum()
    assert_refused(made(3, momentum=learned, inplace=True), x, "no LearnableMomentum")
    x.flags.writeable = False
    with pytest.raises(
        ValueError, match=r"x must be writable with inplace=True.*read-only float64"
    ):
        layer(x)
    with pytest.raises(TypeError, match="inplace must be True or False"):
        bnfast.BatchNorm(3, inplace="yes")


def test_it_is_shown_and_pickled():
    layer = made(3, inplace=True)
    assert "inplace=True" in repr(layer)
    assert pickle.loads(pickle.dumps(layer)).inplace
    assert "inplace" not in repr(bnfast.BatchNorm(3))


def test_a_pickle_without_the_settings_is_of_a_layer_without_them():
    state = bnfast.BatchNorm(3).__getstate__()
    for name in ("inplace", "activation", "negative_slope"):
        del state[name]
    layer = bnfast.BatchNorm.__new__(bnfast.BatchNorm)
    layer.__dict__.update(state)
    again = pickle.loads(pickle.dumps(layer))
    x = np.linspace(-1, 1, 24).reshape(8, 3)
    before = x.copy()
    np.testing.assert_array_equal(again(x), bnfast.BatchNorm(3)(before))
    np.testing.assert_array_equal(x, before)
