"""Data of 16 bits, float16 and bfloat16: computed in float32 and rounded once."""

import functools
import importlib
import itertools

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from cases import in_layout
from members import GROUPS, MEMBERS
from tolerances import HALF_ROUNDED_OTHERWISE, HALF_TERMS

ml_dtypes = pytest.importorskip("ml_dtypes")

HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# What is normalized by channels of samples is written before it is scaled, and moving averages are
# NumPy's: these members refuse data of 16 bits.
FULL_ONLY = {"conditional", "moving average"}
HALF_MEMBERS = {name: member for name, member in MEMBERS.items() if name not in FULL_ONLY}

EPS = 1e-5

# Shapes, the axis of the channels, and how memory is ordered.
LAYOUTS = {
    "nchw": ((3, 8, 9, 13), 1, (0, 1, 2, 3)),
    "channels_last memory": ((3, 8, 9, 13), 1, (0, 2, 3, 1)),
    "nhwc": ((5, 9, 7, 24), -1, (0, 1, 2, 3)),
    "nc": ((70, 6), 1, (0, 1)),
    "nc of many": ((33, 130), 1, (0, 1)),
    "long runs": ((2, 4, 5000), 1, (0, 1, 2)),
    "axes mixed": ((4, 6, 10, 9), 1, (3, 1, 0, 2)),
    "groups beyond scratch": ((2, 24, 23, 29), 1, (0, 1, 2, 3)),
    "single values": ((1, 4, 3), 1, (0, 1, 2)),
}


@pytest.fixture(params=HALVES)
def half(request):
    return HALVES[request.param]


def laid_out(array, order, dtype, step=1):
    """The array in this order in memory, and with gaps between its elements."""
    wide = np.zeros((*(array.shape[d] for d in order[:-1]), array.shape[order[-1]] * step), dtype)
    view = wide[..., ::step].transpose(np.argsort(order))
    view[...] = array
    return view


def assert_same(got, want):
    """Of one type and all values alike: NaN is NaN."""
    assert got.dtype == want.dtype
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


def run(member, x, dy, weight, bias, axis, out):
    y, mean, invstd = member.forward(x, weight, bias, EPS, axis, out)
    dx, dweight, dbias = member.backward(dy, x, mean, invstd, weight, axis)
    return [y.copy(), mean, invstd, dx, dweight, dbias]


@pytest.mark.parametrize("step", [1, 3], ids=["dense", "gaps"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", HALF_MEMBERS)
def test_the_result_is_that_of_float32_data_rounded_once(isa, rng, half, name, layout, step):
    (shape, axis, order), member = LAYOUTS[layout], MEMBERS[name]
    x, dy = (rng.normal(3, 2, shape).astype(half) for _ in range(2))
    weight, bias = rng.normal(size=(2, *member.parameters(shape, axis))).astype(np.float32)

    def results(dtype, gaps):
        arrays = (laid_out(a, order, dtype, gaps) for a in (x, dy, np.zeros(shape)))
        narrow_x, narrow_dy, out = arrays
        return run(member, narrow_x, narrow_dy, weight, bias, axis, out)

    got, want = results(half, step), results(np.float32, step)
    assert got[0].dtype == got[3].dtype == half
    assert got[4] is None or got[4].dtype == np.float32
    for a, b in zip(got, want, strict=True):
        if a is not None:
            np.testing.assert_array_equal(a, b.astype(a.dtype))


@pytest.mark.parametrize("name", HALF_MEMBERS)
def test_bits_do_not_depend_on_threads_strides_or_out(rng, half, use_threads, name):
    shape, member = (6, 8, 130, 131), MEMBERS[name]
    x, dy = (rng.normal(size=shape).astype(half) for _ in range(2))
    weight, bias = rng.normal(size=(2, *member.parameters(shape, 1))).astype(np.float32)
    results = []
    for threads, step in itertools.product((1, 3), (1, 2)):
        use_threads(threads)
        spread = (laid_out(a, (0, 1, 2, 3), half, step) for a in (x, dy))
        results.append(run(member, *spread, weight, bias, 1, None))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            if first is not None:
                np.testing.assert_array_equal(first, second)


def test_streamed_outputs_are_those_that_are_stored(rng, half, use_caches):
    x = rng.normal(size=(8, 16, 33, 35)).astype(half)
    weight, bias = rng.normal(size=(2, 16))
    results = []
    for last_level in (1 << 14, 1 << 30):
        use_caches(1 << 13, last_level)
        y, mean, invstd = bnfast.batch_norm_forward(x, weight, bias)
        dx = bnfast.batch_norm_backward(y, x, mean, invstd, weight)[0]
        results.append((y, dx, bnfast.batch_norm(x, mean, invstd)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def test_out_may_be_x(rng, half):
    for shape, axis in (((4, 6, 50, 3), 1), ((40, 3, 6), -1)):
        x = rng.normal(3, 2, shape).astype(half)
        want = bnfast.batch_norm_forward(x, axis=axis)[0]
        assert bnfast.batch_norm_forward(x, axis=axis, out=x)[0] is x
        np.testing.assert_array_equal(x, want)


@pytest.mark.parametrize("axis", [1, -1])
def test_nearly_all_elements_are_the_exact_value_rounded(isa, rng, half, axis):
    shape = (16, 16, 31, 17) if axis == 1 else (16, 31, 17, 16)
    x, dy = (rng.normal(1, 2, shape).astype(half) for _ in range(2))
    weight, bias = rng.normal(size=(2, 16)).astype(np.float32)
    y, mean, invstd = bnfast.batch_norm_forward(x, weight, bias, axis=axis)
    dx = bnfast.batch_norm_backward(dy, x, mean, invstd, weight, axis=axis)[0]
    wide_x, wide_dy = x.astype(np.longdouble), dy.astype(np.longdouble)
    exact, *saved = reference.batch_norm_forward(
        wide_x, weight, bias, EPS, axis=axis, precision=np.longdouble
    )
    exact_dx = reference.batch_norm_backward(
        wide_dy, wide_x, *saved, weight, axis=axis, precision=np.longdouble
    )[0]
    for got, want in ((y, exact), (dx, exact_dx)):
        assert (got != want.astype(half)).mean() <= HALF_ROUNDED_OTHERWISE
        error = np.abs(got.astype(np.longdouble) - want)
        # Where terms cancel, what float32 rounds of them may be more than a step of the rest.
        of_terms = HALF_TERMS * np.abs(want).max()
        step = np.spacing(np.abs(want.astype(half))).astype(np.longdouble)
        assert (error <= step + of_terms).all()


def test_every_value_survives(isa, half):
    """Whatever its bits are: subnormals, infinities, and NaN, as long as nothing is done to it."""
    values = np.arange(2**16, dtype=np.uint16).view(half)
    weight, zero, one = (np.full(1, value) for value in (1.0, 0.0, 1.0))
    for x in (values, np.repeat(values, 2)[::2], values[::-1]):
        y = bnfast.batch_norm(x[:, None], zero, one, weight, None, eps=0.0)[:, 0]
        assert_same(y, x)
        assert np.isnan(y.astype(np.float32)).sum() > 100


def test_products_are_rounded_to_nearest_even(isa, half):
    """Of float32 values that lie between two of the type, many of them halfway."""
    values = np.arange(2**16, dtype=np.uint16).view(half)
    for factor in (1.0 + 2.0**-11, 1.0 + 2.0**-8, 1.5, 1 / 3, 2.0**-10, 2.0**-14 * 1.5, 1e3):
        y = bnfast.batch_norm(
            values[:, None], np.zeros(1), np.ones(1), np.full(1, factor), None, eps=0.0
        )[:, 0]
        with np.errstate(all="ignore"):
            product = values.astype(np.float32) * np.float32(factor)
            rounded = product.astype(half)
        assert_same(y, rounded)


def test_the_largest_values_overflow_nowhere_inside(half):
    # Of bfloat16 a quarter: as in float32, the difference of the largest values leaves the range.
    largest = float(ml_dtypes.finfo(half).max) / (1 if half == np.float16 else 4)
    x = np.tile(np.array([[1.0], [-1.0], [1.0], [0.5]]) * largest, (64, 3)).astype(half)
    y, mean, invstd = bnfast.batch_norm_forward(x)
    exact, exact_mean, exact_invstd = reference.batch_norm_forward(
        x.astype(np.longdouble), None, None, EPS, axis=1, precision=np.longdouble
    )
    np.testing.assert_allclose(mean, exact_mean.astype(float), rtol=1e-6)
    np.testing.assert_allclose(invstd, exact_invstd.astype(float), rtol=1e-6)
    np.testing.assert_array_equal(y, exact.astype(half))
    dx = bnfast.batch_norm_backward(y, x, mean, invstd)[0]
    assert np.isfinite(dx.astype(np.float32)).all()


def test_nan_and_infinity_stay_in_their_channel(half):
    x = np.random.default_rng(5).normal(size=(6, 4, 20)).astype(half)
    clean, *_ = bnfast.batch_norm_forward(x)
    x[1, 1, 3], x[2, 2, 5] = np.nan, np.inf
    y, *_ = bnfast.batch_norm_forward(x)
    np.testing.assert_array_equal(y[:, [0, 3]], clean[:, [0, 3]])
    assert np.isnan(y[:, [1, 2]].astype(np.float32)).all()


@pytest.mark.parametrize("name", HALF_MEMBERS)
def test_parameters_of_the_same_type_have_gradients_of_it(rng, half, name):
    shape, member = (6, 4, 5, 3), MEMBERS[name]
    x, dy = (rng.normal(size=shape).astype(half) for _ in range(2))
    weight, bias = rng.normal(size=(2, *member.parameters(shape, 1))).astype(half)
    got = run(member, x, dy, weight, bias, 1, None)
    want = run(member, x, dy, weight.astype(np.float32), bias.astype(np.float32), 1, None)
    for a, b in zip(got, want, strict=True):
        if a is not None:
            np.testing.assert_array_equal(a, b.astype(a.dtype))
    assert got[4].dtype == half
    assert got[5] is None or got[5].dtype == half


@pytest.mark.parametrize("axis", [(1,), (-1,), (0, 2)], ids=str)
@pytest.mark.parametrize("member", ["layer_norm", "rms_norm"])
def test_rows_without_a_weight_have_the_gradients_of_float32_data(isa, rng, half, member, axis):
    x, dy = (rng.normal(3, 2, (3, 4, 40)).astype(half) for _ in range(2))
    forward, backward = (getattr(bnfast, f"{member}_{way}") for way in ("forward", "backward"))
    sizes = tuple(x.shape[d] for d in axis)
    results = []
    for dtype in (half, np.dtype(np.float32)):
        wide_x, wide_dy = x.astype(dtype), dy.astype(dtype)
        _, *saved = forward(wide_x, sizes, axis=axis)
        results.append(backward(wide_dy, wide_x, sizes, *saved, axis=axis))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b.astype(a.dtype))


def gradients_of_parameters(weight):
    """Of what refuses data of 16 bits, and of parameters that few normalizations have."""
    channels = weight.size
    x = np.random.default_rng(4).normal(size=(8, channels, 5)).astype(np.float32)
    of_samples = np.broadcast_to(weight, (8, channels))
    _, mean, invstd = bnfast.conditional_batch_norm_forward(x, None, None)
    yield bnfast.conditional_batch_norm_backward(x, x, mean, invstd, of_samples)[1:]
    nothing = x[:0]
    yield bnfast.conditional_batch_norm_backward(nothing, nothing, mean, invstd, of_samples[:0])[1:]
    none = np.ones((0, channels))  # of no ghosts
    yield bnfast.ghost_batch_norm_backward(nothing, nothing, 2, none, none, weight)[1:]
    buffers = np.ones((2, channels))
    _, saved = bnfast.moving_average_batch_norm_forward(x, np.ones(channels), buffers)
    yield bnfast.moving_average_batch_norm_backward(x, x, saved, buffers, weight)[1:]
    _, saved = bnfast.decorrelated_batch_norm_forward(x)
    yield bnfast.decorrelated_batch_norm_backward(x, x, saved, weight)[1:]
    yield bnfast.decorrelated_batch_norm_backward(nothing, nothing, saved, weight)[1:]
    _, invrms = bnfast.filter_response_norm_forward(x, learned_eps=weight)
    found = bnfast.filter_response_norm_backward(x, x, invrms, learned_eps=weight)
    yield found[-1:]
    _, mean, invstd = bnfast.group_norm_forward(x, channels, weight, per_group=True)
    yield bnfast.group_norm_backward(x, x, mean, invstd, weight, per_group=True)[1:]
    filters = x[:channels]
    _, *saved = bnfast.weight_standardization_forward(filters, weight)
    yield bnfast.weight_standardization_backward(filters, filters, *saved, weight)[1:]
    _, norm = bnfast.weight_norm_forward(filters, weight)
    yield bnfast.weight_norm_backward(filters, filters, weight, norm)[1:]
    zeros, ones = np.zeros(channels), np.ones(channels)
    yield bnfast.batch_norm_double_backward(x, None, None, x, x, zeros, ones, weight)[2:]
    given = filters, None, filters, filters, channels, np.ones((channels, 5)), weight
    yield bnfast.rms_norm_double_backward(*given, axis=1)[2:]


def test_parameters_of_16_bits_have_gradients_of_their_type(half):
    weight = np.linspace(0.5, 2, 4).astype(half)
    narrow, wide = (gradients_of_parameters(w) for w in (weight, weight.astype(np.float32)))
    for got, expected in zip(narrow, wide, strict=True):
        for a, b in zip(got, expected, strict=True):
            assert (a.dtype, b.dtype) == (half, np.float32)
            np.testing.assert_array_equal(a, b.astype(half))


@pytest.mark.parametrize("name", HALF_MEMBERS)
def test_without_a_weight_gradients_of_parameters_are_float32(rng, half, name):
    x, dy = (rng.normal(size=(6, 4, 5, 3)).astype(half) for _ in range(2))
    for got in run(HALF_MEMBERS[name], x, dy, None, None, 1, None)[4:]:
        assert got is None or got.dtype == np.float32


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("value", [-0.28, 0.0, 2.0**-14])
def test_constant_channels_have_the_bits_of_float32_data(isa, rng, half, axis, value):
    """Where products of gradients are 0, sums of float32 data are made again in float64."""
    x = np.full((64, 17, 8) if axis == 1 else (64, 8, 17), value, half)
    dy = rng.normal(size=x.shape).astype(half)
    mean, invstd = np.full(17, x.flat[0], np.float64), np.ones(17)
    got = bnfast.batch_norm_backward_sums(dy, x, mean, invstd, axis=axis)
    wide = (a.astype(np.float32) for a in (dy, x))
    for a, b in zip(
        got, bnfast.batch_norm_backward_sums(*wide, mean, invstd, axis=axis), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_running_statistics_of_the_type_are_updated_in_place(rng, half):
    x = rng.normal(3, 2, (6, 4, 5)).astype(half)
    mean, var = rng.uniform(0.5, 2, (2, 4)).astype(half)
    wide_mean, wide_var = mean.astype(np.float32), var.astype(np.float32)
    for running in ((mean, var), (wide_mean, wide_var)):
        bnfast.batch_norm(x, *running, training=True)
    np.testing.assert_array_equal(mean, wide_mean.astype(half))
    np.testing.assert_array_equal(var, wide_var.astype(half))
    np.testing.assert_array_equal(
        bnfast.batch_norm(x, mean, var),
        bnfast.batch_norm(x, mean.astype(np.float32), var.astype(np.float32)),
    )


def test_a_running_variance_beyond_float16_warns():
    x = np.array([[60000.0], [-60000.0]], np.float16)
    mean, var = np.zeros(1, np.float16), np.ones(1, np.float16)
    with pytest.warns(RuntimeWarning, match="running_var is infinite from now on"):
        bnfast.batch_norm(x, mean, var, training=True)
    assert np.isinf(var).all()


def test_rms_norm_without_eps_takes_that_of_float32_as_pytorch_does(half):
    x = np.array([[1e-3, 2e-3, -1e-3, 0]]).astype(half)
    got = bnfast.rms_norm(x, 4)
    np.testing.assert_array_equal(got, bnfast.rms_norm(x, 4, eps=2.0**-23))
    torch = pytest.importorskip("torch")
    tensor = torch.tensor(x.astype(np.float32)).to(getattr(torch, half.name))
    theirs = torch.nn.functional.rms_norm(tensor, (4,)).float().numpy()
    np.testing.assert_array_equal(got.astype(np.float32), theirs)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_moments_and_summaries_are_those_of_float32_values(rng, half, axis):
    x = rng.normal(3, 2, (700, 9)).astype(half)
    x[5, 3] = np.nan
    for function in (bnfast.moments, bnfast.summary):
        got, want = function(x, axis), function(x.astype(np.float32), axis)
        np.testing.assert_array_equal(got.mean, want.mean)
        np.testing.assert_array_equal(got.m2, want.m2)
    where = rng.random(x.shape) < 0.7
    got, want = (bnfast.moments(a, axis, where=where) for a in (x, x.astype(np.float32)))
    np.testing.assert_array_equal(got.m2, want.m2)


LAYERS = {
    "batch": lambda: bnfast.BatchNorm(6),
    "instance": lambda: bnfast.InstanceNorm(6, affine=True),
    "group": lambda: bnfast.GroupNorm(GROUPS, 6),
    "layer": lambda: bnfast.LayerNorm(5),
    "rms": lambda: bnfast.RMSNorm(5, eps=1e-5),
    "response": lambda: bnfast.FilterResponseNorm(6),
    "ghost": lambda: bnfast.GhostBatchNorm(6, 2),
    "renorm": lambda: bnfast.BatchRenorm(6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_train_and_evaluate(rng, half, name):
    x, dy = rng.normal(size=(2, 4, 6, 5)).astype(half)
    results = []
    for dtype in (half, np.dtype(np.float32)):
        layer = LAYERS[name]()
        y = layer(x.astype(dtype))
        dx = layer.backward(dy.astype(dtype))
        assert y.dtype == dx.dtype == dtype
        results.append((y, dx, layer.eval()(x.astype(dtype)), layer.weight_grad))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b.astype(a.dtype))


def test_a_bfloat16_tensor_is_read_where_it_lies():
    torch = pytest.importorskip("torch")
    tensor = torch.arange(24, dtype=torch.bfloat16).reshape(4, 3, 2)
    array = bnfast._arrays.as_array(tensor)
    assert array.ctypes.data == tensor.data_ptr()
    assert array.dtype == HALVES["bfloat16"]
    y = bnfast.batch_norm(tensor, None, None, training=True)
    np.testing.assert_array_equal(y, bnfast.batch_norm(array, None, None, training=True))
    with pytest.raises(TypeError, match=r"x\.detach\(\) is one"):
        bnfast.batch_norm(tensor.requires_grad_(), None, None, training=True)


def test_a_bfloat16_tensor_without_ml_dtypes_says_what_to_install(monkeypatch):
    torch = pytest.importorskip("torch")
    found = importlib.import_module

    def missing(name, *rest):
        if name == "ml_dtypes":
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    out = np.zeros((4, 3), np.float32)
    with pytest.raises(TypeError, match=r"x must be an array.*pip install ml_dtypes"):
        bnfast.batch_norm_forward(torch.zeros(4, 3, dtype=torch.bfloat16), out=out)


X = np.random.default_rng(3).normal(size=(4, 6, 3, 3)).astype(np.float16)
IN_FULL = {
    "conditional_batch_norm_forward": lambda x: bnfast.conditional_batch_norm_forward(
        x, None, None
    ),
    "moving_average_batch_norm": lambda x: bnfast.MovingAverageBatchNorm(6)(x),
    "decorrelated_batch_norm": lambda x: bnfast.DecorrelatedBatchNorm(6)(x),
    "weight_norm": lambda x: bnfast.weight_norm(x, np.ones(4, np.float32)),
    "weight_standardization": lambda x: bnfast.weight_standardization(x),
    "batch_norm_jvp": lambda x: bnfast.batch_norm_jvp(x, x, np.zeros(6), np.ones(6)),
    "layer_norm_double_backward": lambda x: bnfast.layer_norm_double_backward(
        x, None, None, x, x, (3,), np.zeros((4, 6, 3)), np.ones((4, 6, 3))
    ),
}


@pytest.mark.parametrize("name", IN_FULL)
def test_what_kernels_do_not_compute_wants_more_bits(name):
    with pytest.raises(TypeError, match=r"must be float32 or float64.*float16"):
        IN_FULL[name](X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X.astype(">f2")}, "x must be float16, bfloat16, float32 or float64 in native"),
        ({"dy": X.astype(np.float32)}, "dy must have the shape and dtype of x, float16"),
        ({"out": np.zeros(X.shape, np.float32)}, "out must have the shape and dtype of x, float16"),
        ({"weight": np.ones(6, ">f2")}, "weight must be float16, bfloat16, float32 or float64 in"),
        ({"weight": np.ones(5, np.float16)}, "weight must have one value for each of the 6"),
    ],
    ids=["byte order", "dy", "out", "weight", "size of weight"],
)
def test_other_types_are_refused_before_anything_is_written(arguments, message):
    out = np.full_like(X, 7)
    call = {"dy": X, "x": X, "mean": np.zeros(6), "invstd": np.ones(6), "out": out, **arguments}
    with pytest.raises((TypeError, ValueError), match=message):
        bnfast.batch_norm_backward(**call)
    assert (out == 7).all()


@pytest.mark.parametrize("ghosts", [False, True])
def test_gradients_through_a_learned_momentum_are_rounded_once(half, axis, rng, ghosts):
    kind = functools.partial(bnfast.GhostBatchNorm, ghost_size=3) if ghosts else bnfast.BatchNorm
    momentum = bnfast.LearnableMomentum(0.3)
    layer, wide = (kind(4, momentum=momentum, axis=axis) for _ in range(2))
    for _ in range(2):
        x, dy = (in_layout(rng.normal(1, 2, (20, 4, 9)), axis).astype(half) for _ in range(2))
        assert_same(layer(x), wide(x.astype(np.float32)).astype(half))
        of_float32 = wide.backward(dy.astype(np.float32))
        assert_same(layer.backward(dy, out=dy), of_float32.astype(half))
    for name, value in wide.state_dict().items():
        np.testing.assert_array_equal(layer.state_dict()[name], value)
