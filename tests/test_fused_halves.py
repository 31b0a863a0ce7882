"""Data of 16 bits with activations and residuals: computed in float32 and rounded once."""

import itertools

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from test_fused import MEMBERS, NAMES, PIECEWISE, SLOPE, backward, forward, laid_out
from tolerances import HALF_ROUNDED_OTHERWISE, HALF_TERMS

ml_dtypes = pytest.importorskip("ml_dtypes")

HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SINGLE = np.dtype(np.float32)

# More than is staged at once, small planes, and a batch without planes.
SHAPES = {"large": (3, 6, 40, 100), "planes": (5, 12, 4, 5), "rows": (70, 6)}


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


@pytest.fixture(params=SHAPES)
def data(request, rng, half):
    """x, dy and a residual of 16 bits, and weight and bias of float32."""
    shape = SHAPES[request.param]
    arrays = rng.normal(1, 3, (3, *shape)).astype(half)
    return *arrays, *rng.normal(size=(2, shape[1])).astype(np.float32)


def floats(array):
    return array.astype(np.float32)


def assert_rounded_once(narrow, wide):
    """Of results of 16 bits, and those of float32 copies."""
    assert wide.dtype == SINGLE or wide.dtype == narrow.dtype
    np.testing.assert_array_equal(floats(narrow), floats(wide.astype(narrow.dtype)))


@pytest.mark.parametrize("layouts", [("nchw", "nhwc"), ("nhwc", "nchw"), ("strided", "strided")])
@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize("member", MEMBERS)
def test_the_result_is_that_of_float32_data_rounded_once(isa, data, member, name, layouts):
    *arrays, weight, bias = data
    results = {}
    for dtype in (arrays[0].dtype, SINGLE):
        x, dy, residual = (
            laid_out(a.astype(dtype), layouts[k]) for a, k in zip(arrays, (0, 0, 1), strict=True)
        )
        for added in (None, residual):
            fused = {"activation": name, "negative_slope": SLOPE, "residual": added}
            y, *saved = forward(member, x, weight, bias, **fused)
            gradients = backward(member, dy, x, saved, weight, bias=bias, **fused)
            results[dtype, added is None] = [y, gradients[0], *saved, *gradients[1:]]
    for alone in (True, False):
        narrow, wide = (results[dtype, alone] for dtype in (arrays[0].dtype, SINGLE))
        assert narrow[0].dtype == narrow[1].dtype == arrays[0].dtype
        for a, b in zip(narrow, wide, strict=True):
            assert_rounded_once(a, b)


@pytest.mark.parametrize("name", PIECEWISE)
@pytest.mark.parametrize("member", MEMBERS)
def test_an_output_of_16_bits_tells_what_goes_through(isa, data, member, name):
    """With y, whose own rounding decides; the same of a float32 copy of it."""
    x, dy, residual, weight, bias = data
    fused = {"activation": name, "negative_slope": SLOPE}
    y, *saved = forward(member, x, weight, bias, **fused, residual=residual)
    narrow = backward(member, dy, x, saved, weight, y=y, residual=True, **fused)
    wide_y, wide_dy, wide_x = (floats(a) for a in (y, dy, x))
    wide = backward(member, wide_dy, wide_x, saved, weight, y=wide_y, residual=True, **fused)
    closed = (wide_y <= 0) | (wide_y >= 6) if name == "relu6" else wide_y <= 0
    slope = np.float32(SLOPE if name == "leaky_relu" else 0)
    np.testing.assert_array_equal(wide[-1], np.where(closed, slope * wide_dy, wide_dy))
    for a, b in zip(narrow, wide, strict=True):
        assert_rounded_once(a, b)


def test_what_is_rounded_to_6_lets_no_gradient_through_as_in_pytorch():
    half = HALVES["bfloat16"]
    x, residual, dy = (np.full((1, 1), value, half) for value in (5.75, 0.24609375, 1))
    layer = bnfast.BatchNorm(1, eps=0, activation="relu6").eval()
    assert layer(x, residual) == 6  # rounded: the sum is less
    dx, dresidual = layer.backward(dy)
    assert dx == dresidual == 0
    exact = {"training": False, "activation": "relu6", "residual": residual}
    assert bnfast.batch_norm_backward(dy, x, np.zeros(1), np.ones(1), **exact)[0] == 1


def assert_nearly_always_rounded_right(got, exact):
    """The nearest number in all but a few elements, and within one of them everywhere."""
    half = got.dtype
    assert (got != exact.astype(half)).mean() <= HALF_ROUNDED_OTHERWISE
    error = np.abs(got.astype(np.longdouble) - exact)
    # Where terms cancel, what float32 rounds of them may be more than a step of the rest.
    of_terms = HALF_TERMS * np.abs(exact).max()
    step = np.spacing(np.abs(exact.astype(half))).astype(np.longdouble)
    assert (error <= step + of_terms).all()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", PIECEWISE)
def test_nearly_all_elements_are_the_exact_value_rounded(isa, rng, half, name, adds, layout):
    arrays = rng.normal(1, 2, (3, 16, 16, 31, 17)).astype(half)
    x, dy, residual = (laid_out(a, layout) for a in arrays)
    weight, bias = rng.normal(size=(2, 16)).astype(np.float32)
    fused = {"activation": name, "negative_slope": SLOPE, "residual": residual if adds else None}
    y, *saved = bnfast.batch_norm_forward(x, weight, bias, **fused)
    dx, *_, dz = bnfast.batch_norm_backward(dy, x, *saved, weight, bias=bias, **fused)
    precise = {"precision": np.longdouble}
    wide_x, wide_dy, added = (a.astype(np.longdouble) for a in (x, dy, residual))
    normalized, *statistics = reference.batch_norm_forward(wide_x, weight, bias, **precise)
    activation = name, SLOPE
    terms = {"residual": added if adds else None, **precise}
    exact_y = reference.activate(normalized, *activation, **terms)
    exact_dz = reference.activate_backward(wide_dy, normalized, *activation, **terms)
    exact_dx = reference.batch_norm_backward(exact_dz, wide_x, *statistics, weight, **precise)[0]
    assert_nearly_always_rounded_right(y, exact_y)
    if adds:
        assert_nearly_always_rounded_right(dz, exact_dz)
    assert_nearly_always_rounded_right(dx, exact_dx)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_results_may_take_the_place_of_what_they_are_made_of(data, name, layout):
    x, dy, residual, weight, bias = data
    x, dy, residual = (laid_out(a, layout) for a in (x, dy, residual))
    fused = {"activation": name, "negative_slope": SLOPE}
    expected, *saved = forward("batch_norm", x, weight, bias, residual=residual, **fused)
    given = {"x": x.copy(order="K"), "residual": residual.copy(order="K")}
    for place in given:
        arrays = {key: value.copy(order="K") for key, value in given.items()}
        parameters = {"weight": weight, "bias": bias, "out": arrays[place]}
        y = bnfast.batch_norm_forward(**arrays, **parameters, **fused)[0]
        assert y is arrays[place]
        np.testing.assert_array_equal(y, expected)
    more = {"bias": bias, "residual": residual, **fused}
    expected = backward("batch_norm", dy, x, saved, weight, **more)
    for place in (0, 1):
        arrays = dy.copy(order="K"), x.copy(order="K")
        found = backward("batch_norm", *arrays, saved, weight, out=arrays[place], **more)
        assert found[0] is arrays[place]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_neither_threads_nor_caches_nor_strides_change_a_bit(
    rng, half, use_threads, use_caches, name
):
    arrays = rng.normal(size=(3, 9, 5, 30, 31)).astype(half)
    results = []
    for threads, caches, layout in itertools.product(
        (1, 3), ((4096, 4096), (1 << 20, 1 << 25)), ("nchw", "strided")
    ):
        use_threads(threads)
        use_caches(*caches)
        x, dy, residual = (laid_out(a, layout) for a in arrays)
        fused = {"activation": name, "negative_slope": SLOPE, "residual": residual}
        y, *saved = bnfast.batch_norm_forward(x, **fused)
        results.append([y, *saved, *bnfast.batch_norm_backward(dy, x, *saved, **fused)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["leaky_relu", None])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "strided"])
def test_a_layer_in_place_has_the_gradients_of_its_rounded_output(
    isa, data, layout, activation, recompute
):
    """As a float32 layer has whose output is given those values."""
    x, dy, _, weight, bias = data
    outputs, gradients = [], []
    for dtype in (x.dtype, SINGLE):
        layer = bnfast.BatchNorm(
            weight.size, activation=activation, negative_slope=SLOPE, inplace=True
        )
        layer.weight[...], layer.bias[...] = weight, bias
        given = laid_out(x.astype(dtype), layout)
        y = layer(given, recompute=recompute)
        assert y is given
        outputs.append(y.copy())
        y[...] = outputs[0].astype(dtype)
        dx = layer.backward(laid_out(dy.astype(dtype), layout))
        gradients.append([dx, layer.weight_grad, layer.bias_grad])
        assert layer.num_batches_tracked == (0 if recompute else 1)
    assert_rounded_once(*outputs)
    for a, b in zip(*gradients, strict=True):
        assert_rounded_once(a, b)


@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("kind", ["BatchNorm", "InstanceNorm"])
def test_layers_pass_it_on(rng, half, kind, mode, adds, name):
    x, dy, residual = rng.normal(size=(3, 6, 4, 5)).astype(half)
    results = []
    for dtype in (half, SINGLE):
        options = {"affine": True, "track_running_stats": True, "frozen": mode == "frozen"}
        layer = getattr(bnfast, kind)(4, activation=name, negative_slope=SLOPE, **options)
        layer.train(mode != "eval")
        layer.weight[...] = np.linspace(-1, 2, 4)
        layer.bias[...] = np.linspace(1, -1, 4)
        y = layer(x.astype(dtype), residual.astype(dtype) if adds else None)
        made = layer.backward(dy.astype(dtype))
        dx, dresidual = made if adds else (made, made)
        state = [layer.running_mean, layer.running_var, layer.weight_grad, layer.bias_grad]
        results.append([dx, y, dresidual, *state])
    for a, b in zip(*results, strict=True):
        assert_rounded_once(a, b)


@pytest.mark.parametrize("name", ["silu", "hardswish"])
def test_zeros_have_the_sign_of_float32(name, half):
    x, residual, dy = (np.full((4, 1), value, half) for value in (0, -85, -0.88))
    constant = np.zeros(1), np.ones(1), np.full(1, -1, np.float32)
    fused = {"training": False, "bias": np.zeros(1, np.float32), "activation": name}
    narrow, wide = (
        bnfast.batch_norm_backward(
            *(a.astype(dtype) for a in (dy, x)), *constant, **fused, residual=residual.astype(dtype)
        )[0]
        for dtype in (half, SINGLE)
    )
    np.testing.assert_array_equal(np.signbit(floats(narrow)), np.signbit(floats(wide)))
