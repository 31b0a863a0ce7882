"""Activations and residuals in the same pass as a normalization, of functions and layers.

What is piecewise linear has the bits of the operations one after the other, forward and backward.
"""

import pickle

import numpy as np
import pytest

import bnfast
from bnfast import functional
from oracle import CURVES, PIECEWISE, SLOPE, activated, through
from tolerances import CURVE_GRADIENT, CURVE_ULPS, FINITE_DIFFERENCES, eps_of

EPS = 1e-5
NAMES = (*PIECEWISE, *CURVES)

# Of each member whose channels have parameters: its arguments between x and weight.
CHANNELS = {"batch_norm": (), "instance_norm": (), "group_norm": (3,)}
# Of each whose elements have them: which axes of x are its rows.
ROWS = {
    "layer_norm": slice(1, None),
    "layer_norm of channels": slice(1, 2),
    "rms_norm": slice(1, None),
    "rms_norm of channels": slice(1, 2),
}
MEMBERS = (*CHANNELS, *ROWS)
# More than a chunk, small planes, and a batch without planes.
SHAPES = {"large": (3, 6, 40, 100), "planes": (5, 12, 4, 5), "rows": (70, 6)}


def laid_out(array, layout):
    """The same values, elsewhere in memory."""
    if layout == "nchw":
        return array
    if layout == "nhwc":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(array, 1, -1)), -1, 1)
    view = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)[..., ::2]
    view[...] = array
    return view


@pytest.fixture(params=SHAPES)
def data(request, rng, dtype):
    """x, dy and a residual, and weight and bias."""
    shape = SHAPES[request.param]
    arrays = rng.normal(1, 3, (3, *shape)).astype(dtype)
    return *arrays, *rng.normal(size=(2, shape[1])).astype(dtype)


def axes_of(member, x):
    return tuple(range(x.ndim))[ROWS[member]]


def elements(parameter, channels, sizes):
    """A parameter of channels, repeated for elements; another one as it is."""
    if parameter is None or parameter.shape != (channels,):
        return parameter
    return np.resize(parameter, sizes)


def forward(member, x, weight, bias, **fused):
    name = member.partition(" ")[0]
    function = getattr(functional, f"{name}_forward")
    if member in CHANNELS:
        return function(x, *CHANNELS[member], weight, bias, EPS, **fused)
    axes = axes_of(member, x)
    sizes = tuple(x.shape[d] for d in axes)
    given = [elements(p, x.shape[1], sizes) for p in (weight, bias)]
    given = given[:1] if name == "rms_norm" else given
    return function(x, sizes, *given, EPS, axis=axes, **fused)


def backward(member, dy, x, saved, weight, **fused):
    name = member.partition(" ")[0]
    function = getattr(functional, f"{name}_backward")
    if member in CHANNELS:
        return function(dy, x, *saved, weight, **fused)
    axes = axes_of(member, x)
    sizes = tuple(x.shape[d] for d in axes)
    bias = elements(fused.pop("bias", None), x.shape[1], sizes)
    if name == "layer_norm":
        fused["bias"] = bias
    return function(dy, x, sizes, *saved, elements(weight, x.shape[1], sizes), axis=axes, **fused)


def ulps(found, expected):
    return np.abs(found - expected) / np.spacing(np.abs(expected))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layouts", [("nchw", "nhwc"), ("nhwc", "nhwc"), ("strided", "nchw")])
@pytest.mark.parametrize("member", MEMBERS)
def test_forward_is_the_activated_sum(isa, data, member, layouts, name):
    x, _, residual, weight, bias = data
    x, residual = laid_out(x, layouts[0]), laid_out(residual, layouts[1])
    y, *saved = forward(member, x, weight, bias)
    for added in (None, residual):
        z = y if added is None else y + added
        fused = {"activation": name, "negative_slope": SLOPE, "residual": added}
        found, *statistics = forward(member, x, weight, bias, **fused)
        for a, b in zip(statistics, saved, strict=True):
            np.testing.assert_array_equal(a, b)
        if name in PIECEWISE:
            np.testing.assert_array_equal(found, activated(z, name))
        else:
            assert ulps(found, activated(z, name)).max() <= CURVE_ULPS


@pytest.mark.parametrize("member", MEMBERS)
def test_a_residual_alone_is_added(isa, data, member):
    x, dy, residual, weight, bias = data
    y, *saved = forward(member, x, weight, bias)
    found, *_ = forward(member, x, weight, bias, residual=residual)
    np.testing.assert_array_equal(found, y + residual)
    *gradients, dresidual = backward(member, dy, x, saved, weight, residual=residual)
    assert dresidual is dy
    for a, b in zip(gradients, backward(member, dy, x, saved, weight), strict=True):
        np.testing.assert_array_equal(a, b)
    out = dy.copy()
    *_, dresidual = backward(member, out, x, saved, weight, residual=residual, out=out)
    np.testing.assert_array_equal(dresidual, dy)
    np.testing.assert_array_equal(out, gradients[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layouts", [("nchw", "nhwc"), ("nhwc", "nhwc"), ("strided", "nchw")])
@pytest.mark.parametrize("member", MEMBERS)
def test_backward_is_that_of_what_goes_through(isa, data, member, layouts, name):
    x, dy, residual, weight, bias = data
    x, dy = (laid_out(a, layouts[0]) for a in (x, dy))
    residual = laid_out(residual, layouts[1])
    y, *saved = forward(member, x, weight, bias)
    for added in (None, residual):
        fused = {"activation": name, "negative_slope": SLOPE}
        z = y if added is None else y + added
        dz = through(dy, z, name)
        expected = [*backward(member, dz, x, saved, weight), *[dz] * (added is not None)]
        of_y = forward(member, x, weight, bias, **fused, residual=added)[0]
        ways = [{"bias": bias, "residual": added}]
        if name in PIECEWISE:
            ways.append({"y": of_y, "residual": added is not None})
        for way in ways:
            found = backward(member, dy, x, saved, weight, **fused, **way)
            for a, b in zip(found, expected, strict=True):
                if name in PIECEWISE:
                    np.testing.assert_array_equal(a, b)
                else:
                    largest = max(np.abs(b).max(), np.abs(dz).max() * saved[-1].max())
                    assert np.abs(a - b).max() <= CURVE_GRADIENT * eps_of(dy.dtype) * largest


@pytest.mark.parametrize("mean", [0.1, 600])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("member", MEMBERS)
def test_what_an_activation_was_given_is_made_again_to_the_bit(
    isa, rng, member, shape, layout, mean
):
    """A residual takes all of it away, or all but the last bit."""
    x, dy = rng.normal(mean, 1, (2, *SHAPES[shape])).astype(np.float32)
    x, dy = laid_out(x, layout), np.abs(laid_out(dy, layout))
    weight, bias = rng.normal(size=(2, x.shape[1])).astype(np.float32)
    y, *saved = forward(member, x, weight, bias)
    for residual, expected in ((-y, 0), (-np.nextafter(y, np.float32(-np.inf)), dy)):
        fused = {"activation": "relu", "bias": bias, "residual": residual}
        dresidual = backward(member, dy, x, saved, weight, **fused)[-1]
        np.testing.assert_array_equal(dresidual, expected)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_passes_through_constant_statistics(isa, data, name, adds):
    x, dy, residual, weight, bias = data
    y, *saved = forward("batch_norm", x, weight, bias)
    added = residual if adds else None
    z = y + residual if adds else y
    expected = backward("batch_norm", through(dy, z, name), x, saved, weight, training=False)
    fused = {"activation": name, "negative_slope": SLOPE, "training": False}
    found = backward("batch_norm", dy, x, saved, weight, bias=bias, residual=added, **fused)
    for a, b in zip(found[:3], expected, strict=True):
        if name in PIECEWISE:
            np.testing.assert_array_equal(a, b)
        else:
            largest = max(np.abs(b).max(), np.abs(dy).max() * saved[1].max())
            assert np.abs(a - b).max() <= CURVE_GRADIENT * eps_of(dy.dtype) * largest


def everything(member, x, dy, residual, parameters, name):
    """All results, with a residual and without."""
    weight, bias = parameters
    y, *saved = forward(member, x, weight, bias)
    made = [y, *saved]
    for added in (None, residual):
        fused = {"activation": name, "negative_slope": SLOPE, "residual": added}
        made.append(forward(member, x, weight, bias, **fused)[0])
        made += backward(member, dy, x, saved, weight, bias=bias, **fused)
        if member in ROWS:
            more = {"bias": bias, "parameters": False, **fused}
            dx, *_ = backward(member, dy, x, saved, weight, **more)
            # Written over x, it is made of what goes through once more.
            over_x = x.copy(order="K")
            made += [dx, backward(member, dy, over_x, saved, weight, out=over_x, **more)[0]]
            over_x = x.copy(order="K")
            more["parameters"] = True
            made += backward(member, dy, over_x, saved, weight, out=over_x, **more)
        if member == "batch_norm":
            made.append(functional.batch_norm(x, *saved, weight, bias, **fused))
            constant = {"bias": bias, "training": False, **fused}
            made += backward(member, dy, x, saved, weight, **constant)
    return [array for array in made if array is not None]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("member", ["batch_norm", *ROWS])
def test_neither_isa_nor_threads_nor_caches_change_a_bit(
    rng, dtype, use_isa, use_threads, use_caches, member, name, layout
):
    arrays = rng.normal(size=(3, 9, 5, 30, 31)).astype(dtype)
    x, dy, residual = (laid_out(a, layout) for a in arrays)
    parameters = rng.normal(size=(2, 5)).astype(dtype) if member in ROWS else (None, None)
    use_threads(1)
    use_isa("baseline")
    expected = everything(member, x, dy, residual, parameters, name)
    for isa in bnfast.available_isas():
        use_isa(isa)
        for threads, caches in (
            (1, (1 << 20, 1 << 25)),
            (2, (4096, 4096)),
            (3, (1 << 16, 1 << 18)),
        ):
            use_threads(threads)
            use_caches(*caches)
            found = everything(member, x, dy, residual, parameters, name)
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)


def turned(array):
    """Whose rows lie in another order than those of x, so that nothing walks both as one."""
    return np.ascontiguousarray(array.swapaxes(0, -1)).swapaxes(0, -1)


@pytest.mark.parametrize("has_parameters", [False, True])
@pytest.mark.parametrize("name", [None, *NAMES])
@pytest.mark.parametrize("shape", [(6, 70, 5, 9), (40, 300), (3, 900, 9)], ids=str)
@pytest.mark.parametrize("member", ROWS)
def test_strides_of_what_follows_rows_change_no_bit(
    rng, dtype, use_threads, member, shape, name, has_parameters
):
    x, dy, residual = rng.normal(size=(3, *shape)).astype(dtype)
    weight, bias = rng.normal(size=(2, shape[1])).astype(dtype)
    if not has_parameters:
        weight = bias = None
    fused = {"activation": name, "negative_slope": SLOPE}

    def results(make):
        added, given = make(residual), {"bias": bias, **fused}
        y, *saved = forward(member, x, weight, bias, residual=added, **fused)
        made = [y, *saved, *backward(member, dy, x, saved, weight, residual=added, **given)]
        if name in PIECEWISE:
            more = {"y": make(y), "residual": True, **fused}
            made += backward(member, dy, x, saved, weight, **more)
        out = make(np.zeros_like(x))
        return [*made, *backward(member, dy, x, saved, weight, out=out, **given)]

    expected = results(np.asarray)
    for num_threads in (1, 3):
        use_threads(num_threads)
        for make in (turned, lambda a: laid_out(a, "strided"), lambda a: laid_out(a, "nhwc")):
            for a, b in zip(results(make), expected, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", PIECEWISE)
@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("member", ROWS)
def test_rows_of_one_parameter_or_none(isa, data, member, given, name):
    x, dy, residual, *parameters = data
    weight, bias = (p if has else None for p, has in zip(parameters, given, strict=True))
    fused = {"activation": name, "negative_slope": SLOPE, "residual": residual}
    y, *saved = forward(member, x, weight, bias)
    z = y + residual
    np.testing.assert_array_equal(forward(member, x, weight, bias, **fused)[0], activated(z, name))
    dz = through(dy, z, name)
    found = backward(member, dy, x, saved, weight, bias=bias, **fused)
    for a, b in zip(found, (*backward(member, dz, x, saved, weight), dz), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ends", [1e-80, 1e80])
@pytest.mark.parametrize("member", ROWS)
def test_sums_of_extreme_rows_are_made_again_of_what_went_through(rng, member, ends, name):
    """Also where dx has been written over dy by then."""
    x, dy = rng.normal(size=(2, 9, 5, 4))
    weight, bias = rng.normal(size=(2, 5))
    x[1:4] *= ends
    _, *saved = forward(member, x, weight, bias)
    fused = {"activation": name, "negative_slope": SLOPE, "bias": bias}
    z = forward(member, x, weight, bias)[0]
    expected = backward(member, through(dy, z, name), x, saved, weight)
    found = backward(member, dy, x, saved, weight, out=dy, **fused)
    assert found[0] is dy
    for a, b in zip(found, expected, strict=True):
        if name in PIECEWISE:
            np.testing.assert_array_equal(a, b)
        else:
            largest = np.abs(b).max(tuple(range(1, b.ndim)), keepdims=True)
            assert (np.abs(a - b) <= 1e-10 * largest).all()


@pytest.mark.parametrize("where", ["x", "residual", "twice"])
@pytest.mark.parametrize("member", MEMBERS)
def test_the_output_may_take_the_place_of_an_input(data, member, where):
    x, _, residual, weight, bias = data
    residual = x if where == "twice" else residual
    fused = {"activation": "relu"}
    expected = forward(member, x, weight, bias, residual=residual.copy(), **fused)[0]
    x, residual = x.copy(), residual.copy()
    if where == "twice":
        residual = x
    out = residual if where == "residual" else x
    found = forward(member, x, weight, bias, residual=residual, out=out, **fused)[0]
    assert found is out
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("place", ["dy", "x"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("member", MEMBERS)
def test_the_gradient_may_take_the_place_of_an_input(data, member, name, place):
    x, dy, residual, weight, bias = data
    _, *saved = forward(member, x, weight, bias)
    for added in (None, residual):
        fused = {"activation": name, "bias": bias, "residual": added}
        expected = backward(member, dy, x, saved, weight, **fused)
        given = {"dy": dy.copy(), "x": x.copy()}
        found = backward(member, *given.values(), saved, weight, out=given[place], **fused)
        assert found[0] is given[place]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("member", ["batch_norm", *ROWS])
def test_gradients_are_central_differences(rng, member, name):
    x, residual, dy = rng.normal(size=(3, 6, 2, 3))
    sizes = tuple(x.shape[d] for d in axes_of(member, x)) if member in ROWS else (2,)
    weight, bias = rng.normal(1, 0.3, (2, *sizes))
    step = 1e-6
    given = [x, weight, residual] if member.startswith("rms") else [x, weight, bias, residual]

    def loss(x, weight, *bias_and_residual):
        *bias, residual = bias_and_residual
        fused = {"activation": name, "residual": residual}
        return np.sum(forward(member, x, weight, *bias or [None], **fused)[0] * dy)

    _, *saved = forward(member, x, weight, bias)
    fused = {"bias": bias, "activation": name, "residual": residual}
    found = backward(member, dy, x, saved, weight, **fused)
    assert len(found) == len(given)
    for k, gradient in enumerate(found):
        differences = np.empty_like(gradient)
        for index in np.ndindex(gradient.shape):
            moved = [[a.copy() for a in given] for _ in range(2)]
            moved[0][k][index] += step
            moved[1][k][index] -= step
            differences[index] = (loss(*moved[0]) - loss(*moved[1])) / (2 * step)
        np.testing.assert_allclose(gradient, differences, atol=10 * FINITE_DIFFERENCES)


def applied(name, z, dtype):
    """An activation of these values: of a channel whose mean is 0 and variance 1, in evaluation."""
    x = np.array(z, dtype).reshape(-1, 1)
    zeros, ones = np.zeros(1, dtype), np.ones(1, dtype)
    y = functional.batch_norm(x, zeros, ones, eps=0.0, activation=name, negative_slope=SLOPE)
    dx, *_ = functional.batch_norm_backward(
        np.ones_like(x), x, zeros, ones, training=False, activation=name, negative_slope=SLOPE
    )
    return y.ravel(), dx.ravel()


@pytest.mark.parametrize("name", NAMES)
def test_the_ends_of_the_range(isa, dtype, name):
    largest, least = np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal
    z = [-np.inf, -largest, -least, -0.0, 0.0, least, largest, np.inf, np.nan]
    y, dx = applied(name, z, dtype)
    ceiling = 6 if name == "relu6" else largest
    below = [-np.inf, -dtype.type(SLOPE) * largest] if name == "leaky_relu" else [0, 0]
    half = 0 if name in CURVES else least  # of the least number, rounded to even
    expected = [*below, y[2], 0, 0, half, ceiling, np.inf if ceiling == largest else 6, np.nan]
    np.testing.assert_array_equal(y, np.array(expected, dtype))
    assert abs(y[2]) <= least
    outside, middle = {"leaky_relu": (SLOPE, SLOPE)}.get(name, (0, 0.5 if name in CURVES else 0))
    inside = 0 if name == "relu6" else 1
    slopes = [
        outside,
        outside,
        middle,
        middle,
        middle,
        0.5 if name in CURVES else 1,
        inside,
        inside,
    ]
    np.testing.assert_array_equal(dx[:8], np.array(slopes, dtype))


def test_a_slope_of_zero_is_relu(isa, dtype):
    x = np.array([-np.inf, -1, -0.0, 0, 1, np.inf, np.nan], dtype).reshape(-1, 1)
    dy, zeros, ones = np.full_like(x, np.inf), np.zeros(1, dtype), np.ones(1, dtype)
    results = []
    for name in ("relu", "leaky_relu"):
        fused = {"activation": name, "negative_slope": 0.0}
        y = functional.batch_norm(x, zeros, ones, **fused)
        dx, *_ = functional.batch_norm_backward(dy, x, zeros, ones, training=False, **fused)
        results.append((y, dx))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_silu_is_within_ulps_of_the_exact_one(isa, rng, dtype):
    low = -104 if dtype == np.float32 else -751
    z = np.concatenate(
        [np.linspace(low, 40, 20001), rng.normal(size=5000), -np.geomspace(1e-30, 1)]
    )
    z = z.astype(dtype)
    wide = z.astype(np.longdouble)
    exact = wide / (1 + np.exp(-wide))
    y, dx = applied("silu", z, dtype)
    spacing = np.spacing(np.abs(exact.astype(dtype))).astype(np.longdouble)
    assert np.max(np.abs(y - exact) / spacing) <= CURVE_ULPS
    sigmoid = 1 / (1 + np.exp(-wide))
    slope = sigmoid * (1 + wide * (1 - sigmoid))
    assert np.max(np.abs(dx - slope)) <= 2 * np.finfo(dtype).eps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("has_parameters", [False, True])
@pytest.mark.parametrize("member", ["layer_norm", "rms_norm"])
def test_a_nan_stays_in_its_row(isa, data, member, has_parameters, name, layout):
    x, dy, residual, weight, bias = data
    if not has_parameters:
        weight = bias = None
    x, fused = laid_out(x, layout), {"activation": name, "residual": residual}
    spoiled = x.copy(order="K")
    spoiled[1].flat[2] = np.nan
    made = []
    for array in (x, spoiled):
        y, *saved = forward(member, array, weight, bias, **fused)
        gradients = backward(member, dy, array, saved, weight, bias=bias, **fused)
        made.append([y, gradients[0], gradients[-1]])
    assert np.isnan(made[1][0][1]).all() and np.isnan(made[1][1][1]).all()
    for clean, other in zip(*made, strict=True):
        np.testing.assert_array_equal(np.delete(clean, 1, 0), np.delete(other, 1, 0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_nan_stays_in_its_channel(isa, data, name, layout):
    x, dy, residual, weight, bias = data
    x, fused = laid_out(x, layout), {"activation": name, "residual": residual}
    spoiled = x.copy(order="K")
    spoiled[1, 2] = np.nan
    made = []
    for array in (x, spoiled):
        y, *saved = forward("batch_norm", array, weight, bias, **fused)
        made.append([y, *backward("batch_norm", dy, array, saved, weight, bias=bias, **fused)])
    assert np.isnan(made[1][0][:, 2]).all()
    for clean, other in zip(*made, strict=True):
        axis = 1 if clean.ndim > 1 else 0
        np.testing.assert_array_equal(np.delete(clean, 2, axis), np.delete(other, 2, axis))


def test_an_infinite_gradient_does_not_go_through_a_closed_gate(isa, dtype):
    x, dy = np.array([[-1.0], [2.0]], dtype), np.array([[np.inf], [1.0]], dtype)
    zeros, ones = np.zeros(1, dtype), np.ones(1, dtype)
    for way in ({}, {"y": np.maximum(x, 0)}, {"residual": np.zeros_like(x)}):
        found = functional.batch_norm_backward(
            dy, x, zeros, ones, training=False, activation="relu", **way
        )
        np.testing.assert_array_equal(found[0], [[0], [1]])
        np.testing.assert_array_equal(found[2], [1])


@pytest.mark.parametrize("scale", [1.7, -1.7, 1e-30, -1e-30, 3e4, 0.0])
@pytest.mark.parametrize("mean", [0.0, 0.3, -1e4, 1e-30])
@pytest.mark.parametrize("name", PIECEWISE)
def test_gates_of_x_are_those_of_the_output(isa, dtype, name, mean, scale):
    """Around the place where the output passes 0 or 6, number by number."""
    mean, weight = np.array([mean], dtype), np.array([scale], dtype)
    bias, ones = np.array([0.7], dtype), np.ones(1, dtype)
    edges = [mean[0]]
    if scale:
        edges += [dtype.type((edge - 0.7) / scale + mean[0]) for edge in (0, 6)]
    steps = np.arange(-300, 300)
    x = np.concatenate([e + steps * np.spacing(dtype.type(e)) for e in edges]).astype(dtype)[
        :, None
    ]
    fused = {"activation": name, "negative_slope": SLOPE}
    z = functional.batch_norm(x, mean, ones, weight, bias, eps=0.0)
    y = functional.batch_norm(x, mean, ones, weight, bias, eps=0.0, **fused)
    np.testing.assert_array_equal(y, activated(z, name))
    dy = np.ones_like(x)
    given = dy, x, mean, ones, weight
    # Statistics that count as those of x, so that the kernel with the bounds writes dx.
    sums = functional.batch_norm_backward(*given, bias=bias, **fused)
    expected = functional.batch_norm_backward(through(dy, z, name), *given[1:])
    for a, b in zip(sums, expected, strict=True):
        np.testing.assert_array_equal(a, b)


# refused


@pytest.mark.parametrize(
    ("fused", "message"),
    [
        ({"activation": "gelu"}, "activation must be 'relu' or .* or None, got 'gelu'"),
        ({"activation": 3}, "activation must be 'relu' or .* or None, got 3"),
        ({"activation": "leaky_relu", "negative_slope": 1.5}, "negative_slope must be at most 1"),
        (
            {"activation": "leaky_relu", "negative_slope": "a"},
            "negative_slope must be a real number",
        ),
        ({"residual": np.zeros((4, 3, 2))}, "residual must have the shape and dtype of x"),
        ({"residual": np.zeros((4, 3, 5), np.float32)}, "residual must have the shape and dtype"),
        ({"residual": "overlapping"}, "out must be residual itself or share no element with it"),
    ],
)
@pytest.mark.parametrize("member", MEMBERS)
def test_wrong_arguments_are_refused_before_anything_is_written(member, fused, message):
    memory = np.full((5, 3, 5), 7.0)
    out, fused = memory[:4], dict(fused)
    if isinstance(fused.get("residual"), str):
        fused["residual"] = memory[1:]
    running = (
        {"running_mean": np.zeros(3), "running_var": np.ones(3)} if member == "batch_norm" else {}
    )
    x = np.random.default_rng(0).normal(size=(4, 3, 5))
    with pytest.raises((ValueError, TypeError), match=message):
        forward(member, x, None, None, out=out, **running, **fused)
    assert (memory == 7.0).all()
    assert not running or (running["running_mean"] == 0).all()


@pytest.mark.parametrize(
    ("fused", "message"),
    [
        ({"activation": "gelu"}, "activation must be"),
        ({"activation": "silu", "y": np.zeros((4, 3, 5))}, "y does not tell what silu"),
        (
            {"activation": "leaky_relu", "negative_slope": -0.1, "y": np.zeros((4, 3, 5))},
            "y does not tell the gradient of leaky_relu",
        ),
        ({"activation": "relu", "residual": True}, "residual must be the array that was added"),
        ({"activation": "relu", "residual": np.zeros((4, 3))}, "residual must have the shape"),
        ({"activation": "relu", "y": np.zeros((4, 3))}, "y must have the shape and dtype of x"),
        ({"activation": "relu", "y": "out"}, "out must not share memory with y"),
        ({"activation": "relu", "residual": "out"}, "out must not share memory with residual"),
        ({"activation": "relu", "bias": np.zeros(2)}, "bias must have"),
        ({"bias": np.zeros(2)}, "bias must have"),
        ({"y": np.zeros((4, 3))}, "y must have the shape and dtype of x"),
        ({"y": "nonsense"}, "y must be float16"),
    ],
)
@pytest.mark.parametrize("member", MEMBERS)
def test_wrong_arguments_of_a_gradient_are_refused(member, fused, message):
    if "bias" in fused and member.startswith("rms"):
        pytest.skip("RMS norm has no bias")
    out = np.full((4, 3, 5), 7.0)
    fused = {
        name: out if type(value) is str and value == "out" else value
        for name, value in fused.items()
    }
    x, dy = np.random.default_rng(0).normal(size=(2, 4, 3, 5))
    _, *saved = forward(member, x, None, None)
    with pytest.raises((ValueError, TypeError), match=message):
        backward(member, dy, x, saved, None, out=out, **fused)
    assert (out == 7.0).all()


@pytest.mark.parametrize("member", MEMBERS)
def test_empty_batches_have_empty_gradients(member):
    x = np.zeros((0, 3, 4), np.float32)
    y, *saved = forward(member, x, None, None, activation="relu", residual=x)
    dx, *gradients, dresidual = backward(member, x, x, saved, None, activation="relu", residual=x)
    assert y.shape == dx.shape == dresidual.shape == x.shape
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


# layers


def layers(activation, **more):
    fused = {"activation": activation, "negative_slope": SLOPE, **more}
    return [
        bnfast.BatchNorm(6, **fused),
        bnfast.BatchNorm(6, **fused).eval(),
        bnfast.BatchNorm(6, frozen=True, **fused),
        bnfast.InstanceNorm(6, affine=True, **fused),
        bnfast.InstanceNorm(6, affine=True, track_running_stats=True, **fused).eval(),
        bnfast.GroupNorm(3, 6, **fused),
        bnfast.LayerNorm(6, axis=1, **fused),
        bnfast.LayerNorm((6, 5, 5), **fused),
        bnfast.RMSNorm(6, axis=1, **fused),
    ]


def set_parameters(layer):
    """To others than the first ones, those that the layer has."""
    for parameter, end in ((layer.weight, 1), (layer.bias, 0.5)):
        if parameter is not None:
            parameter[...] = np.linspace(-end, end, parameter.size).reshape(parameter.shape)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_layers_pass_it_on(rng, name, adds):
    x, dy, residual = rng.normal(size=(3, 4, 6, 5, 5)).astype(np.float32)
    added = residual if adds else None
    for layer, plain in zip(layers(name), layers(None), strict=True):
        for each in (layer, plain):
            set_parameters(each)
        y = plain(x)
        found = layer(x, added)
        z = y + residual if adds else y
        expected = z if name is None else activated(z, name)
        if name in CURVES:
            assert ulps(found, expected).max() <= CURVE_ULPS
        else:
            np.testing.assert_array_equal(found, expected)
        if layer.bias is not None:
            layer.bias[...] = 3.0  # backward has the bias of the call
        dz = dy if name is None else through(dy, z, name)
        gradients = layer.backward(dy)
        dx, dresidual = gradients if adds else (gradients, dz)
        tolerance = 1e-4 if name in CURVES else 0
        np.testing.assert_allclose(dx, plain.backward(dz), rtol=0, atol=tolerance)
        np.testing.assert_allclose(dresidual, dz, rtol=0, atol=tolerance)
        np.testing.assert_allclose(layer.weight_grad, plain.weight_grad, rtol=0, atol=tolerance)
        if layer.bias is not None:
            np.testing.assert_allclose(layer.bias_grad, plain.bias_grad, rtol=0, atol=tolerance)
        if layer.running_mean is not None:
            np.testing.assert_array_equal(layer.running_mean, plain.running_mean)
            np.testing.assert_array_equal(layer.running_var, plain.running_var)


def test_a_layer_keeps_no_copy_as_large_as_its_input(rng):
    x, residual = rng.normal(size=(2, 4, 6, 5, 5)).astype(np.float32)
    for name in NAMES:
        for layer in layers(name):
            for added in (None, residual):
                y = layer(x, added)
                kept = [
                    a for a in flat(layer._saved) if isinstance(a, np.ndarray) and a.size >= x.size
                ]
                assert all(any(a is b for b in (x, y, residual)) for a in kept)
                assert len(kept) == (1 if added is None else 2)


def flat(saved):
    return [a for part in saved for a in (flat(part) if isinstance(part, tuple) else [part])]


@pytest.mark.parametrize("make", [bnfast.BatchNorm, bnfast.LayerNorm, bnfast.RMSNorm])
def test_a_curve_over_its_residual_has_no_backward(rng, make):
    x, residual = rng.normal(size=(2, 9, 6)).astype(np.float32)
    layer = make(6, activation="silu")
    y = layer(x, residual, out=residual)
    with pytest.raises(RuntimeError, match="wrote over its input"):
        layer.backward(np.ones_like(y))
    layer.activation = "relu"
    y = layer(x, residual, out=residual)
    assert len(layer.backward(np.ones_like(y))) == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [bnfast.BatchNorm, bnfast.LayerNorm])
def test_a_residual_may_be_any_buffer(rng, make, name):
    x, dy, residual = rng.normal(size=(3, 9, 6))
    for given in (residual.tolist(), memoryview(residual)):
        results = []
        for added in (residual, given):
            layer = make(6, dtype=np.float64, activation=name)
            results.append([layer(x, added), *layer.backward(dy)])
            assert layer.num_batches_tracked == (1 if make is bnfast.BatchNorm else None)
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("way", [{"activation": "relu"}, {"inplace": True}])
def test_running_statistics_are_those_of_the_function(rng, way, unbiased):
    x = rng.normal(size=(9, 6))
    mean, var = np.zeros(6), np.ones(6)
    layer = bnfast.BatchNorm(6, momentum=0.3, dtype=np.float64, unbiased=unbiased, **way)
    layer(x.copy())
    functional.batch_norm(x, mean, var, training=True, momentum=0.3, unbiased=unbiased)
    np.testing.assert_array_equal(layer.running_mean, mean)
    np.testing.assert_array_equal(layer.running_var, var)
    assert layer.num_batches_tracked == 1
    layer.frozen = True
    y = layer(x.copy())
    np.testing.assert_array_equal(layer.running_mean, mean)
    expected = functional.batch_norm(x, mean, var, np.ones(6), np.zeros(6))
    np.testing.assert_array_equal(y, activated(expected, "relu") if layer.activation else expected)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("way", [{"activation": "relu"}, {"inplace": True}])
def test_batches_that_are_not_finite_are_skipped_or_refused(rng, way):
    x = rng.normal(size=(9, 6))
    x[4, 2] = np.inf
    layer = bnfast.BatchNorm(6, dtype=np.float64, nonfinite="skip", **way)
    y = layer(x.copy())
    assert np.isnan(y[:, 2]).any()
    assert layer.num_batches_tracked == 0
    np.testing.assert_array_equal([layer.running_mean, layer.running_var], [[0] * 6, [1] * 6])
    layer.nonfinite, given = "raise", x.copy()
    with pytest.raises(ValueError, match="x must have finite statistics"):
        layer(given)
    np.testing.assert_array_equal(given, x)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("way", [{"activation": "relu"}, {"inplace": True}])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_of_parameters_are_there_where_these_are(rng, way, mode):
    for samples, affine in ((9, False), (0, True), (0, False)):
        x = rng.normal(size=(samples, 6))
        layer = bnfast.BatchNorm(6, affine=affine, **way).train(mode == "train")
        layer.backward(np.ones_like(layer(x)))
        for gradient in (layer.weight_grad, layer.bias_grad):
            assert (gradient is None) is not affine
            if affine:
                np.testing.assert_array_equal(gradient, np.zeros(6, np.float32), strict=True)


def test_layers_show_and_pickle_their_activation():
    layer = bnfast.BatchNorm(2, activation="leaky_relu", negative_slope=0.2)
    assert "activation=leaky_relu, negative_slope=0.2" in repr(layer)
    assert "activation" not in repr(bnfast.GroupNorm(1, 2)) + repr(bnfast.LayerNorm(2))
    shown = repr(bnfast.LayerNorm(2, bias=False, activation="silu"))
    assert "bias=False" in shown and "activation=silu" in shown
    again = pickle.loads(pickle.dumps(layer))
    assert (again.activation, again.negative_slope) == ("leaky_relu", 0.2)
    with pytest.raises(ValueError, match="activation must be"):
        bnfast.GroupNorm(1, 2, activation="tanh")
    with pytest.raises(ValueError, match="negative_slope must be at most 1, got 5"):
        bnfast.InstanceNorm(2, negative_slope=5)
    layer.activation = "tanh"
    with pytest.raises(ValueError, match="activation must be"):
        layer(np.ones((9, 2), np.float32))


def test_a_learned_momentum_is_refused(rng):
    x = rng.normal(size=(9, 2)).astype(np.float32)
    layer = bnfast.BatchNorm(2, momentum=bnfast.LearnableMomentum(0.1), activation="relu")
    with pytest.raises(ValueError, match="momentum must be no LearnableMomentum"):
        layer(x)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("member", ["layer_norm", "rms_norm"])
def test_torch_agrees_of_rows(rng, member, name, adds):
    torch = pytest.importorskip("torch")
    x, dy, residual = rng.normal(size=(3, 4, 6, 5))
    weight, bias = rng.normal(size=(2, 6, 5))
    parameters = [weight] if member == "rms_norm" else [weight, bias]
    given = [torch.tensor(a, requires_grad=True) for a in (x, *parameters, residual)]
    z = getattr(torch.nn.functional, member)(given[0], (6, 5), *given[1:-1], eps=EPS)
    z = z + given[-1] if adds else z
    function = getattr(torch.nn.functional, name)
    y = function(z, SLOPE) if name == "leaky_relu" else function(z)
    y.backward(torch.tensor(dy))
    fused = {"activation": name, "negative_slope": SLOPE, "residual": residual if adds else None}
    found, *saved = forward(member, x, weight, bias, **fused)
    np.testing.assert_allclose(found, y.detach().numpy(), atol=1e-13)
    gradients = backward(member, dy, x, saved, weight, bias=bias, **fused)
    for a, b in zip(gradients, given if adds else given[:-1], strict=True):
        np.testing.assert_allclose(a, b.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adds", [False, True])
def test_torch_agrees(rng, name, adds):
    torch = pytest.importorskip("torch")
    x, dy, residual = rng.normal(size=(3, 4, 6, 5, 5))
    weight, bias = rng.normal(size=(2, 6))
    given = [torch.tensor(a, requires_grad=True) for a in (x, weight, bias, residual)]
    z = torch.nn.functional.batch_norm(given[0], None, None, *given[1:3], training=True)
    z = z + given[3] if adds else z
    function = getattr(torch.nn.functional, name)
    y = function(z, SLOPE) if name == "leaky_relu" else function(z)
    y.backward(torch.tensor(dy))
    fused = {"activation": name, "negative_slope": SLOPE, "residual": residual if adds else None}
    found, *saved = functional.batch_norm_forward(x, weight, bias, **fused)
    np.testing.assert_allclose(found, y.detach().numpy(), atol=1e-13)
    gradients = functional.batch_norm_backward(dy, x, *saved, weight, bias=bias, **fused)
    for a, b in zip(gradients, given if adds else given[:3], strict=True):
        np.testing.assert_allclose(a, b.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("residual", [None, -np.zeros((2, 3))], ids=["alone", "added"])
def test_rows_keep_the_sign_of_zero(isa, dtype, residual):
    weight, bias = -np.ones(3, dtype), -np.zeros(3, dtype)
    added = None if residual is None else residual.astype(dtype)
    x = np.full((2, 3), 5, dtype)
    y = bnfast.layer_norm(x, 3, weight, bias, activation="leaky_relu", residual=added)
    assert np.signbit(y).all() and not y.any()
