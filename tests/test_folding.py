"""Batch norm in evaluation, folded into the linear layer or convolution beside it."""

import inspect
import itertools
import os

import numpy as np
import pytest

import bnfast
from bnfast.folding import fold_into_next, fold_into_previous, scale_shift
from tolerances import CLOSE_F32, CLOSE_F64

EPS = 1e-3


def random_norm(rng, channels):
    """Arguments of batch norm; gammas are negative and 0 as well, variances as small as eps."""
    weight, bias, mean = rng.normal(size=(3, channels))
    weight[0] = 0
    return mean, rng.choice([1e-3, 0.3, 4.0], channels), weight, bias, EPS


def batch_norm(x, mean, var, weight, bias, eps):
    """In the type of x, with the channels along axis 1."""
    shape = (1, -1, *(1,) * (x.ndim - 2))
    scale = (1 if weight is None else weight) / np.sqrt(var + eps)
    mean, scale, bias = (np.reshape(a, shape) for a in (mean, scale, 0 if bias is None else bias))
    return ((x - mean) * scale + bias).astype(x.dtype)


def plain_convolution(x, weight, bias, *, padding=0, stride=1, dilation=1, groups=1):
    """PyTorch's convolution of any rank, OIHW, loop by loop."""
    spatial = x.ndim - 2
    x = np.pad(x, [(0, 0)] * 2 + [(padding, padding)] * spatial)
    outputs, inputs, *kernel = weight.shape
    reach = [dilation * (k - 1) + 1 for k in kernel]
    size = [(n - r) // stride + 1 for n, r in zip(x.shape[2:], reach, strict=True)]
    y = np.empty((len(x), outputs, *size), x.dtype)
    for o, place in itertools.product(range(outputs), np.ndindex(*size)):
        first = o // (outputs // groups) * inputs
        ends = zip(place, reach, strict=True)
        window = tuple(slice(p * stride, p * stride + r, dilation) for p, r in ends)
        seen = x[(slice(None), slice(first, first + inputs), *window)]
        y[(slice(None), o, *place)] = (seen * weight[o]).sum(axis=tuple(range(1, x.ndim)))
    return y + np.reshape(bias, (-1, *(1,) * spatial))


def transposed_convolution(x, weight, bias, *, padding=0, stride=1, groups=1):
    """PyTorch's transposed convolution of any rank, IOHW, loop by loop."""
    spatial = x.ndim - 2
    inputs, outputs, *kernel = weight.shape
    size = [(n - 1) * stride + k for n, k in zip(x.shape[2:], kernel, strict=True)]
    y = np.zeros((len(x), outputs * groups, *size), x.dtype)
    for i, place in itertools.product(range(inputs), np.ndindex(*x.shape[2:])):
        first = i // (inputs // groups) * outputs
        ends = zip(place, kernel, strict=True)
        window = tuple(slice(p * stride, p * stride + k) for p, k in ends)
        value = x[(slice(None), i, *place)].reshape(-1, *(1,) * (spatial + 1))
        y[(slice(None), slice(first, first + outputs), *window)] += value * weight[i]
    inside = (slice(None), slice(None), *(slice(padding, n - padding) for n in size))
    return y[inside] + np.reshape(bias, (-1, *(1,) * spatial))


CONVOLUTIONS = {
    "linear": ((6, 4), {}),
    "1d": ((6, 4, 3), {"dilation": 2}),
    "2d": ((6, 4, 3, 2), {"stride": 2}),
    "3d": ((3, 2, 2, 1, 2), {}),
    "grouped": ((6, 2, 3, 2), {"groups": 2}),
    "depthwise": ((4, 1, 3, 2), {"groups": 4}),
    "depthwise, two each": ((8, 1, 3), {"groups": 4}),
}


def number_of_inputs(shape, options):
    return shape[1] * options.get("groups", 1)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_takes_over_the_batch_norm_after_it(rng, name, padding, biased):
    shape, options = CONVOLUTIONS[name]
    weight, bias, norm = (
        rng.normal(size=shape),
        rng.normal(size=shape[0]),
        random_norm(rng, shape[0]),
    )
    x = rng.normal(size=(2, number_of_inputs(shape, options), *(6,) * (len(shape) - 2)))
    options = {"padding": padding, **options}
    want = batch_norm(plain_convolution(x, weight, bias if biased else 0, **options), *norm)
    folded = fold_into_previous(weight, bias if biased else None, *norm)
    got = plain_convolution(x, *folded, **options)
    np.testing.assert_allclose(got, want, rtol=CLOSE_F64, atol=CLOSE_F64 * np.abs(want).max())


TRANSPOSED = {
    "1d": ((4, 3, 3), {"padding": 1}),
    "2d": ((4, 3, 2, 3), {"stride": 2}),
    "grouped": ((6, 2, 3, 2), {"groups": 3, "stride": 2, "padding": 1}),
    "a group with one output": ((6, 1, 3, 2), {"groups": 2}),
    "depthwise": ((4, 1, 2, 2), {"groups": 4, "stride": 2}),
    "depthwise, two each": ((4, 2, 2), {"groups": 4}),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_convolution_takes_over_the_batch_norm_after_it(rng, name):
    shape, options = TRANSPOSED[name]
    groups = options.get("groups", 1)
    outputs = shape[1] * groups
    weight, bias, norm = rng.normal(size=shape), rng.normal(size=outputs), random_norm(rng, outputs)
    x = rng.normal(size=(2, shape[0], *(4,) * (len(shape) - 2)))
    want = batch_norm(transposed_convolution(x, weight, bias, **options), *norm)
    folded = fold_into_previous(weight, bias, *norm, layout="IO...", groups=groups)
    got = transposed_convolution(x, *folded, **options)
    np.testing.assert_allclose(got, want, rtol=CLOSE_F64, atol=CLOSE_F64 * np.abs(want).max())


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_without_padding_takes_over_the_batch_norm_before_it(rng, name, biased):
    shape, options = CONVOLUTIONS[name]
    inputs = number_of_inputs(shape, options)
    weight, bias, norm = rng.normal(size=shape), rng.normal(size=shape[0]), random_norm(rng, inputs)
    x = rng.normal(size=(2, inputs, *(6,) * (len(shape) - 2)))
    want = plain_convolution(batch_norm(x, *norm), weight, bias if biased else 0, **options)
    groups = options.get("groups", 1)
    folded = fold_into_next(weight, bias if biased else None, *norm, padded=False, groups=groups)
    got = plain_convolution(x, *folded, **options)
    np.testing.assert_allclose(got, want, rtol=CLOSE_F64, atol=CLOSE_F64 * np.abs(want).max())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_layer_that_pads_takes_over_a_batch_norm_that_leaves_zeros_alone(rng, transposed):
    convolution = transposed_convolution if transposed else plain_convolution
    layout = "IO..." if transposed else "OI..."
    weight, bias = rng.normal(size=(4, 4, 3)), rng.normal(size=4)
    mean, var, gamma, beta, eps = random_norm(rng, 4)
    x = rng.normal(size=(2, 4, 6))
    with pytest.raises(ValueError, match=r"pads its input with zeros.* must be 0 .* in channel 0"):
        fold_into_next(weight, bias, mean, var, gamma, beta, eps, padded=True, layout=layout)
    for norm in (
        (np.zeros(4), var, gamma, None, eps),
        (2 * np.ones(4), 4 * np.ones(4), 3 * np.ones(4), 3 * np.ones(4), 0.0),
    ):
        want = convolution(batch_norm(x, *norm), weight, bias, padding=1)
        folded = fold_into_next(weight, bias, *norm, padded=True, layout=layout)
        got = convolution(x, *folded, padding=1)
        np.testing.assert_allclose(got, want, rtol=CLOSE_F64, atol=CLOSE_F64 * np.abs(want).max())


LAYOUTS = {
    "OIHW": (0, 1, 2, 3),
    "IO...": (1, 0, 2, 3),
    "...IO": (2, 3, 1, 0),
    "HWIO": (2, 3, 1, 0),
    "HWOI": (2, 3, 0, 1),
    "O...I": (0, 2, 3, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_moves_the_axes_and_nothing_else(rng, layout):
    weight, bias, axes = rng.normal(size=(4, 6, 3, 2)), rng.normal(size=4), LAYOUTS[layout]
    moved = weight.transpose(axes)
    norms = random_norm(rng, 4), random_norm(rng, 6)
    for want, got in (
        (
            fold_into_previous(weight, bias, *norms[0]),
            fold_into_previous(moved, bias, *norms[0], layout=layout),
        ),
        (
            fold_into_next(weight, bias, *norms[1], padded=False),
            fold_into_next(moved.copy(), bias, *norms[1], padded=False, layout=layout),
        ),
    ):
        np.testing.assert_array_equal(got[0], want[0].transpose(axes))
        np.testing.assert_allclose(got[1], want[1], rtol=CLOSE_F64)


@pytest.mark.parametrize("multiplier", [1, 3])
def test_the_depthwise_weight_of_keras_has_a_group_for_each_input(rng, multiplier):
    of_keras = rng.normal(size=(3, 2, 4, multiplier))  # HWIM
    outputs = 4 * multiplier
    as_oihw = np.moveaxis(of_keras.reshape(3, 2, outputs), -1, 0)[:, None]
    bias, after, before = rng.normal(size=outputs), random_norm(rng, outputs), random_norm(rng, 4)
    for want, got in (
        (
            fold_into_previous(as_oihw, bias, *after, groups=4),
            fold_into_previous(of_keras, bias, *after, layout="HWIO", groups=4),
        ),
        (
            fold_into_next(as_oihw, bias, *before, padded=False, groups=4),
            fold_into_next(of_keras, bias, *before, padded=False, layout="HWIO", groups=4),
        ),
    ):
        moved = np.moveaxis(got[0].reshape(3, 2, outputs), -1, 0)[:, None]
        np.testing.assert_array_equal(moved, want[0])
        np.testing.assert_allclose(got[1], want[1], rtol=CLOSE_F64)


def test_scale_and_shift_are_those_of_batch_norm(rng):
    x, norm = rng.normal(size=(5, 4)), random_norm(rng, 4)
    for weight, bias in itertools.product((norm[2], None), (norm[3], None)):
        scale, shift = scale_shift(*norm[:2], weight, bias, EPS)
        assert scale.dtype == shift.dtype == np.float64
        want = batch_norm(x, *norm[:2], weight, bias, EPS)
        np.testing.assert_allclose(x * scale + shift, want, rtol=CLOSE_F64, atol=CLOSE_F64)


@pytest.mark.parametrize("folded_into", ["previous", "next"])
@pytest.mark.parametrize("groups", [1, 4])
def test_float32_outputs_are_as_exact_as_those_of_both_layers(rng, folded_into, groups):
    """The folded one may be off by twice what the unfolded one is off."""
    weight = rng.normal(size=(8, 8 // groups, 3, 3)).astype(np.float32)
    bias, x = rng.normal(size=8).astype(np.float32), rng.normal(size=(4, 8, 9, 9))
    norm = [a.astype(np.float32) for a in random_norm(rng, 8)[:4]]

    def unfolded(dtype):
        arrays = [a.astype(dtype) for a in (weight, bias, *norm)]
        steps = [
            lambda x: plain_convolution(x, *arrays[:2], groups=groups),
            lambda x: batch_norm(x, *arrays[2:], dtype(EPS)),
        ]
        y = x.astype(np.float32).astype(dtype)
        for step in steps if folded_into == "previous" else reversed(steps):
            y = step(y)
        return y

    if folded_into == "previous":
        folded = fold_into_previous(weight, bias, *norm, EPS, groups=groups)
    else:
        folded = fold_into_next(weight, bias, *norm, EPS, padded=False, groups=groups)
    assert folded[0].dtype == folded[1].dtype == np.float32
    exact, own = unfolded(np.float64), unfolded(np.float32)
    got = plain_convolution(x.astype(np.float32), *folded, groups=groups)
    assert np.abs(got - exact).max() <= 2 * np.abs(own - exact).max()


def float_types():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    return [np.dtype(t) for t in (np.float16, bfloat16, np.float32, np.float64)]


def test_each_array_may_be_of_any_float_type(rng):
    for of_weight, of_norm in itertools.product(float_types(), repeat=2):
        weight, bias = rng.normal(size=(4, 4)).astype(of_weight), rng.normal(size=4).astype(of_norm)
        norm = [a.astype(of_norm) for a in random_norm(rng, 4)[:4]]
        for fold in (fold_into_previous, lambda *a: fold_into_next(*a, padded=False)):
            wide = fold(*(a.astype(np.float64) for a in (weight, bias, *norm)), EPS)
            got = fold(weight, bias, *norm, EPS)
            assert [a.dtype for a in got] == [of_weight] * 2
            for a, b in zip(got, wide, strict=True):
                np.testing.assert_array_equal(a.astype(float), nearest(b, of_weight))


def nearest(values, dtype):
    """Float64 values, rounded to the nearest of a type; to the even one of two."""
    digits = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}[dtype.name]
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, digits)), exponent - digits)


def test_values_are_rounded_once():
    for dtype in float_types()[:3]:
        ulp = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}[dtype.name]
        # Just above and below the middle of two neighbours: float32, of less digits, is the middle.
        for scale in (1 + ulp / 2 + 2.0**-45, 1 + 3 * ulp / 2 - 2.0**-45):
            for sign in (1, -1):
                one, zeros = np.ones((1, 1), dtype), np.zeros(1)
                weight, bias = fold_into_previous(
                    one, None, zeros, zeros + 1, [sign * scale], [sign * scale], 0.0
                )
                want = sign * (1 + ulp)
                assert weight[0, 0] == want and bias[0] == want


def test_subnormal_and_largest_values_of_bfloat16_are_kept():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    ones, zeros = np.ones(1), np.zeros(1)
    for value in (2.0**-133, 3 * 2.0**-133, (2 - 2.0**-7) * 2.0**127):
        weight, _ = fold_into_previous(
            np.ones((1, 1), bfloat16), None, zeros, ones, [value], None, 0.0
        )
        assert float(weight[0, 0]) == value


@pytest.mark.parametrize("order", ["C", "F", "strided", "broadcast", "read-only", "lists"])
def test_arguments_of_any_strides_stay_as_they_are_and_share_no_memory(rng, order):
    weight = rng.normal(size=(4, 4, 3)).astype(np.float32)
    if order == "F":
        weight = np.asfortranarray(weight)
    elif order == "strided":
        weight = np.repeat(weight, 2, axis=-1)[::-1, :, ::-2]
    elif order == "broadcast":
        weight = np.broadcast_to(weight[:, :1], (4, 4, 3))
    bias, mean, var, gamma, beta = (rng.random(4).astype(np.float32) for _ in range(5))
    gamma[:] = np.sqrt(var.astype(np.float64) + EPS)  # scales of 1 are no reason to return a view
    arguments = [weight, bias, mean, var, gamma, beta]
    if order == "read-only":
        for array in arguments:
            array.flags.writeable = False
    before = [array.copy() for array in arguments]
    given = [weight, *(a.tolist() for a in arguments[1:])] if order == "lists" else arguments
    for fold, more in ((fold_into_previous, {}), (fold_into_next, {"padded": False})):
        got = fold(*given, EPS, **more)
        want = fold(*before, EPS, **more)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.flags.writeable
            assert not any(np.shares_memory(a, array) for array in arguments)
    for array, copy in zip(arguments, before, strict=True):
        np.testing.assert_array_equal(array, copy)


ONES = np.ones(4, np.float32)
WEIGHT = np.ones((4, 2, 3), np.float32)


def at(index, value, array=ONES):
    changed = array.copy()
    changed[index] = value
    return changed


BAD = [
    ({"weight": np.ones((4, 4), np.int64)}, TypeError, "weight must be float16.*got int64 array"),
    ({"weight": WEIGHT.astype(">f4")}, TypeError, "weight must be .* native byte order"),
    ({"weight": None}, TypeError, "weight must be a floating-point array, got None"),
    ({"weight": np.ones(4)}, ValueError, r"layout .*got 'OI...' for a weight of shape \(4,\)"),
    ({"weight": at((1, 0, 2), np.nan, WEIGHT)}, ValueError, r"weight must be .*nan at \[1, 0, 2"),
    ({"bias": np.ones(3)}, ValueError, "bias .*4 output channels"),
    ({"bias": at(1, np.inf)}, ValueError, r"bias must be finite, got inf at \[1\]"),
    ({"running_mean": None}, TypeError, "running_mean must be a floating-point array, got None"),
    ({"running_mean": np.ones((1, 4))}, ValueError, r"running_mean must have 1 dim.*\(1, 4\)"),
    ({"running_mean": at(2, np.nan)}, ValueError, r"running_mean must be finite, got nan at \[2\]"),
    ({"running_mean": np.ones(3)}, ValueError, "running_var .*3 channels"),
    ({"running_var": np.ones(5)}, ValueError, "running_var .*4 channels"),
    ({"running_var": at(3, -1.0)}, ValueError, r"var \+ eps must be positive.* -0.9.* channel 3"),
    ({"running_var": at(3, 0.0), "eps": 0.0}, ValueError, "must be positive, got 0.0 in channel 3"),
    ({"running_var": at(3, np.inf)}, ValueError, "running_var must be finite, got inf"),
    ({"bn_weight": np.ones(3)}, ValueError, "bn_weight .*4 channels"),
    ({"bn_bias": np.ones((4, 1))}, ValueError, "bn_bias .*4 channels"),
    ({"eps": -1.0}, ValueError, "eps must not be negative"),
    ({"eps": None}, TypeError, "eps must be a real number"),
    ({"layout": "OHW"}, ValueError, "O and I once each.*got 'OHW'"),
    ({"layout": "OIO"}, ValueError, "O and I once each.*got 'OIO'"),
    ({"layout": "O...I..."}, ValueError, "O and I once each"),
    ({"layout": ""}, ValueError, "O and I once each"),
    ({"layout": "OIHW"}, ValueError, r"got 'OIHW' for a weight of shape \(4, 2, 3\)"),
    ({"layout": 1}, TypeError, "layout must name the axes .*got 1"),
    ({"groups": 0}, ValueError, "groups must be at least 1"),
    ({"groups": 3}, ValueError, r"groups must divide the channels of weight.*\(4, 2, 3\).*got 3"),
    ({"groups": 2.0}, TypeError, "groups must be an integer"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_what_does_not_fit_is_refused(changed, error, message):
    arguments = {
        **dict.fromkeys(("bias", "running_mean", "running_var", "bn_weight", "bn_bias"), ONES),
        **{"weight": WEIGHT, "eps": EPS, "groups": 2, **changed},
    }
    with pytest.raises(error, match=message):
        fold_into_previous(**arguments)
    with pytest.raises(error, match=message):
        fold_into_next(**arguments, padded=False)


def test_channels_of_the_other_side_are_refused():
    fold_into_next(WEIGHT, None, ONES, ONES, None, None, EPS, groups=2, padded=False)
    six = np.ones(6)
    with pytest.raises(ValueError, match=r"output channel of weight, 4 for the shape.*got 6"):
        fold_into_previous(WEIGHT, None, six, six, None, None, EPS)
    with pytest.raises(ValueError, match=r"output channel of weight, 4 or 8 for the shape.*got 6"):
        fold_into_previous(WEIGHT, None, six, six, None, None, EPS, groups=2)
    with pytest.raises(ValueError, match=r"input channel of weight, 2 for the shape.*got 4"):
        fold_into_next(WEIGHT, None, ONES, ONES, None, None, EPS, padded=False)


@pytest.mark.parametrize("padded", [None, 0, "valid", (0, 0)])
def test_padded_is_true_or_false(padded):
    with pytest.raises(TypeError, match="padded must be True or False"):
        fold_into_next(np.ones((4, 4)), None, ONES, ONES, None, None, EPS, padded=padded)


def test_values_beyond_the_range_of_the_weight_are_refused():
    weight = np.full((4, 4), 1e4, np.float16)
    norm = ONES, 0 * ONES, 10 * ONES, ONES, 1e-4
    message = "folded weight must be in the range of float16, .* values of up to 1e"
    with pytest.raises(ValueError, match=message):
        fold_into_previous(weight, None, *norm)
    with pytest.raises(ValueError, match=message):
        fold_into_next(weight, None, *norm, padded=False)
    with pytest.raises(ValueError, match="folded bias must be in the range of float16"):
        fold_into_previous(weight / 1e4, [6e4] * 4, *norm[:2], -ONES, *norm[3:])


def test_layers_without_channels_stay_without():
    none, weight = np.ones(0), np.ones((0, 3))
    weight, bias = fold_into_previous(weight, None, none, none, None, None, EPS)
    assert weight.shape == (0, 3) and bias.shape == (0,)
    weight, bias = fold_into_next(weight.T, None, none, none, None, None, EPS, padded=False)
    assert weight.shape == (3, 0)
    np.testing.assert_array_equal(bias, np.zeros(3))


def test_signatures():
    norm = "running_mean, running_var, bn_weight, bn_bias, eps"
    for function, wanted in (
        (scale_shift, norm),
        (fold_into_previous, f"weight, bias, {norm}, *, layout='OI...', groups=1"),
        (fold_into_next, f"weight, bias, {norm}, *, padded, layout='OI...', groups=1"),
    ):
        parameters = inspect.signature(function).parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        assert str(inspect.Signature(bare)) == f"({wanted})"
        assert getattr(bnfast.folding, function.__name__) is function


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def arrays_of_torch(module):
    parameters = module.weight, module.bias
    return [None if p is None else p.detach().numpy() for p in parameters]


def fill(torch, module, seed):
    """Give a module random parameters and running statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.dtype.is_floating_point:
                tensor.normal_(generator=generator)
            if name.endswith("running_var"):
                tensor.abs_().add_(1e-3)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_pytorch(torch, transposed, groups):
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    layer = kind(6, 12, 3, stride=2, padding=1, groups=groups, bias=groups == 2).double()
    norm = torch.nn.BatchNorm2d(12, eps=EPS).double()
    both = torch.nn.Sequential(layer, norm).eval()
    fill(torch, both, groups)
    x = torch.randn(2, 6, 7, 7, generator=torch.Generator().manual_seed(1)).double()
    weight, bias = fold_into_previous(
        *arrays_of_torch(layer),
        *(norm.running_mean, norm.running_var, *arrays_of_torch(norm), norm.eps),
        layout="IO..." if transposed else "OI...",
        groups=groups,
    )
    options = {"stride": 2, "padding": 1, "groups": groups}
    convolve = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    got = convolve(x, torch.from_numpy(weight), torch.from_numpy(bias), **options)
    want = both(x).detach()
    torch.testing.assert_close(got, want, rtol=CLOSE_F64, atol=CLOSE_F64 * want.abs().max())


def test_a_network_of_pytorch_loses_its_batch_norms_and_no_digits(torch):
    """Convolutions in three ways, then batch norm before a convolution and a linear layer."""
    nn = torch.nn
    network = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.ConvTranspose2d(16, 8, 2, stride=2, groups=4), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.AvgPool2d(12), nn.Flatten()),
        *(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 5)),
    )
    fill(torch, network, 0)
    network.eval()
    x = torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    own = network(x).detach()
    exact = network.double()(x.double()).detach()
    network.float()

    modules = list(network)
    for number, norm in enumerate(modules):
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        before, after = modules[number - 1], modules[number + 1]
        layer = before if isinstance(before, nn.modules.conv._ConvNd) else after
        arguments = (
            *arrays_of_torch(layer),
            *(norm.running_mean, norm.running_var, *arrays_of_torch(norm), norm.eps),
        )
        options = {"groups": getattr(layer, "groups", 1)}
        if isinstance(layer, nn.ConvTranspose2d):
            options["layout"] = "IO..."
        if layer is before:
            weight, bias = fold_into_previous(*arguments, **options)
        else:
            weight, bias = fold_into_next(*arguments, padded=False, **options)
        layer.weight = nn.Parameter(torch.from_numpy(weight))
        layer.bias = nn.Parameter(torch.from_numpy(bias))
        network[number] = nn.Identity()
    got = network(x).detach()
    assert (got - exact).abs().max() <= 2 * (own - exact).abs().max()


def keras_layers():
    os.environ.setdefault("KERAS_BACKEND", "numpy")
    layers = pytest.importorskip("keras", exc_type=ImportError).layers
    return {
        "dense": (layers.Dense(5), "IO", 1, (4,)),
        "convolution": (layers.Conv2D(6, 3, strides=2), "HWIO", 1, (7, 7, 4)),
        "grouped": (layers.Conv2D(6, (2, 3), groups=2), "...IO", 2, (6, 6, 4)),
        "depthwise": (layers.DepthwiseConv2D(3, depth_multiplier=2), "...IO", 4, (6, 6, 4)),
        "transposed": (layers.Conv2DTranspose(6, 3, strides=2), "...OI", 1, (4, 4, 4)),
        "1d": (layers.Conv1D(6, 3), "...IO", 1, (7, 4)),
    }


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own
@pytest.mark.parametrize(
    "name", ["dense", "convolution", "grouped", "depthwise", "transposed", "1d"]
)
def test_layers_of_keras(rng, name):
    layer, layout, groups, shape = keras_layers()[name]
    x = rng.normal(size=(2, *shape)).astype(np.float32)

    def computed(x):
        return np.asarray(layer(x))

    computed(x)
    weight, bias = (rng.normal(size=w.shape).astype(np.float32) for w in layer.get_weights())
    layer.set_weights([weight, bias])
    mean, var, gamma, beta, eps = random_norm(rng, len(bias))
    scale, shift = scale_shift(mean, var, gamma, beta, eps)
    want = computed(x) * scale + shift
    layer.set_weights(
        fold_into_previous(weight, bias, mean, var, gamma, beta, eps, layout=layout, groups=groups)
    )
    np.testing.assert_allclose(computed(x), want, rtol=CLOSE_F32, atol=CLOSE_F32 * abs(want).max())
    if name == "transposed":
        return
    norm = random_norm(rng, 4)
    scale, shift = scale_shift(*norm)
    layer.set_weights([weight, bias])
    want = computed((x * scale + shift).astype(np.float32))
    folded = fold_into_next(weight, bias, *norm, padded=False, layout=layout, groups=groups)
    layer.set_weights(folded)
    np.testing.assert_allclose(computed(x), want, rtol=CLOSE_F32, atol=CLOSE_F32 * abs(want).max())
