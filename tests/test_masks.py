"""Batch, instance and group norm of the values that a mask, or lengths, let count."""

import itertools
import warnings

import numpy as np
import pytest

import bnfast
from bnfast import _masks
from bnfast import _reference as reference
from cases import BUFFERS, in_layout
from oracle import (
    CURVES,
    PIECEWISE,
    SLOPE,
    activated,
    assert_within,
    central_differences,
    close,
    through,
    wider_than,
)
from tolerances import (
    CLOSE_F32,
    CLOSE_F64,
    CURVE_GRADIENT,
    CURVE_ULPS,
    FINITE_DIFFERENCES,
    GRADIENT_SUMS,
    INPUT_GRADIENT,
    MOMENTS,
    OUTPUT,
    eps_of,
)

GROUPS = 2

# (N, C, ...) whose chunks hold several samples, one, or a part of one; lines of less than a cache
# line, and longer than what is gathered; rows of few channels, which are summed side by side; rows
# of many, which scratch cannot hold; several blocks.
SHAPES = [
    *[(3, 4, 7, 7), (5, 6, 300), (2, 4, 1000), (40, 2, 49), (30, 64, 10), (700, 4, 3), (9, 2)],
    *[(3, 2, 9000), (300, 130, 2), (70, 16, 12), (1, 2, 50)],
]
SEVERAL_BLOCKS = (2, 2, 140000)


def every(mask, rng):
    mask[...] = True


def half(mask, rng):
    mask[...] = rng.random(mask.shape) < 0.5


def prefixes(mask, rng):
    rows = mask.reshape(len(mask), -1)
    rows[...] = np.arange(rows.shape[1]) < rng.integers(0, rows.shape[1] + 1, (len(rows), 1))


def single(mask, rng):
    mask.reshape(-1)[mask.size // 2] = True


def alternating(mask, rng):
    mask.reshape(-1)[::2] = True


def runs(mask, rng):
    """Of 100 positions, on average, which begin and end anywhere."""
    changes = rng.random(mask.size) < 0.01
    mask.reshape(-1)[...] = changes.cumsum() % 2 == 0


def samples(mask, rng):
    mask[::2] = True


def all_but_one(mask, rng):
    mask[...] = True
    mask.reshape(-1)[mask.size // 3] = False


MASKS = [half, prefixes, single, alternating, runs, samples, all_but_one]
LARGE_MASKS = [half, prefixes, runs]  # of several blocks: SHAPES try all that one chunk can meet


def masks_of(shape, make, rng):
    mask = np.zeros((shape[0], *shape[2:]), bool)
    make(mask, rng)
    mask.reshape(-1)[0] |= not mask.any()
    return mask


def inputs(rng, shape, axis, dtype, mask):
    """x, dy with NaN and infinity in the padding; weight, bias."""
    x, dy = rng.normal(3, 2, (2, *shape)).astype(dtype)
    counts = np.broadcast_to(np.expand_dims(mask, 1), shape)
    for array, padding in itertools.product((x, dy), (np.nan, np.inf)):
        some = ~counts & (rng.random(shape) < 0.5)
        array[some] = padding
    weight, bias = rng.normal(size=(2, shape[1])).astype(dtype)
    return in_layout(x, axis), in_layout(dy, axis), weight, bias


# (forward of x, weight, bias; backward of dy, x, mean, invstd, weight; groups of the definition)
NORMS = {
    "batch": (bnfast.batch_norm_forward, bnfast.batch_norm_backward, lambda c: None),
    "instance": (bnfast.instance_norm_forward, bnfast.instance_norm_backward, lambda c: c),
    "group": (
        lambda x, *parameters, **keywords: bnfast.group_norm_forward(
            x, GROUPS, *parameters, **keywords
        ),
        bnfast.group_norm_backward,
        lambda c: GROUPS,
    ),
}


@pytest.fixture(params=NORMS)
def norm(request):
    return NORMS[request.param]


def finite_max(array, axes=None):
    return np.nanmax(np.abs(np.where(np.isfinite(array), array, 0)), axes, initial=0)


def check(norm, x, dy, weight, bias, mask, axis, padding="zeros", out=None, **given):
    """Compare with the definition; return all that was computed."""
    forward, backward, groups_of = norm
    channels = x.shape[axis]
    groups = groups_of(channels)
    given = given or {"mask": mask}
    keywords = {"axis": axis, "padding": padding, **given}
    definition = {"axis": axis, "padding": padding, "precision": wider_than(x.dtype)}
    y, mean, invstd = forward(x, weight, bias, **keywords, out=None if out is None else out())
    expected = reference.masked_norm_forward(x, mask, groups, weight, bias, **definition)
    eps = eps_of(x.dtype)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(expected[0]))
    size = finite_max(expected[0]) + 1
    assert_within(np.nan_to_num(y), np.nan_to_num(expected[0].astype(y.dtype)), OUTPUT * eps * size)
    scale = np.abs(expected[1]) + 1 / expected[3]
    assert_within(mean, expected[1], MOMENTS * eps * scale)
    assert_within(invstd, expected[3], 4 * MOMENTS * eps * expected[3])
    dx, dweight, dbias = backward(
        dy, x, mean, invstd, weight, **keywords, out=None if out is None else out()
    )
    wanted = reference.masked_norm_backward(
        dy, x, mask, expected[1], invstd, groups, weight, **definition
    )
    np.testing.assert_array_equal(np.isfinite(dx), np.isfinite(wanted[0]))
    largest = finite_max(dy) * np.abs(weight).max() * invstd.max() + finite_max(wanted[0])
    assert_within(
        np.nan_to_num(dx), np.nan_to_num(wanted[0].astype(dx.dtype)), INPUT_GRADIENT * eps * largest
    )
    norms = reference.masked_norm_backward(np.abs(dy), x, mask, mean, invstd, groups, axis=axis)[2]
    zeros = reference.masked_norm_forward(x, mask, groups, axis=axis)[0]
    most = np.abs(zeros).max() + 1
    assert_within(dweight, wanted[1], GRADIENT_SUMS * eps * norms * most)
    assert_within(dbias, wanted[2], GRADIENT_SUMS * eps * norms)
    return y, mean, invstd, dx, dweight, dbias


# Of one instruction set: long double is slow, and the others have the same bits (below).
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(dtype, rng, axis, norm, shape):
    for make in MASKS:
        mask = masks_of(shape, make, rng)
        check(norm, *inputs(rng, shape, axis, dtype, mask), mask, axis)


@pytest.mark.parametrize("make", LARGE_MASKS)
def test_values_of_several_blocks(dtype, rng, axis, norm, make):
    mask = masks_of(SEVERAL_BLOCKS, make, rng)
    check(norm, *inputs(rng, SEVERAL_BLOCKS, axis, dtype, mask), mask, axis)


def everything(norm, x, dy, weight, bias, axis, **masked):
    forward, backward, _ = norm
    y, mean, invstd = forward(x, weight, bias, axis=axis, **masked)
    return y, mean, invstd, *backward(dy, x, mean, invstd, weight, axis=axis, **masked)


def assert_same_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mask_of_all_values_changes_no_bit(dtype, rng, axis, norm, shape):
    mask = masks_of(shape, every, rng)
    x, dy, weight, bias = inputs(rng, shape, axis, dtype, mask)
    expected = everything(norm, x, dy, weight, bias, axis)
    for padding in ("zeros", "input"):
        got = everything(norm, x, dy, weight, bias, axis, mask=mask, padding=padding)
        assert_same_bits(got, expected)


@pytest.mark.parametrize("shape", [*SHAPES, (3, 2, 50000)], ids=str)
def test_threads_caches_and_instruction_sets_change_no_bit(
    dtype, rng, assert_same_bits_everywhere, axis, norm, shape
):
    masks = [masks_of(shape, make, rng) for make in (MASKS if shape in SHAPES else LARGE_MASKS)]
    given = [inputs(rng, shape, axis, dtype, mask) for mask in masks]

    def all_of_it():
        return [
            array
            for arrays, mask in zip(given, masks, strict=True)
            for array in everything(norm, *arrays, axis, mask=mask)
        ]

    assert_same_bits_everywhere(all_of_it)


@pytest.mark.parametrize("make", [half, prefixes, runs])
@pytest.mark.parametrize("shape", [(4, 6, 7, 9), (70, 6, 11)], ids=str)
def test_padding_decides_no_bit(dtype, rng, axis, norm, shape, make):
    mask = masks_of(shape, make, rng)
    x, dy, weight, bias = inputs(rng, shape, axis, dtype, mask)
    counts = in_layout(np.broadcast_to(np.expand_dims(mask, 1), shape), axis)
    others = [np.where(counts, array, dtype.type(1e30)) for array in (x, dy)]
    expected = everything(norm, x, dy, weight, bias, axis, mask=mask)
    assert_same_bits(everything(norm, *others, weight, bias, axis, mask=mask), expected)


@pytest.mark.parametrize("shape", [(5, 7, 300), (40, 7, 49), (2, 7, 9000)], ids=str)
def test_channels_out_of_range_or_of_equal_values_disturb_no_other(isa, dtype, rng, shape):
    mask = masks_of(shape, half, rng)
    x, dy, weight, bias = inputs(rng, shape, 1, dtype, mask)
    plain = everything(NORMS["batch"], x, dy, weight, bias, 1, mask=mask)
    channel = np.moveaxis(x, 1, 0)
    largest = 1e25 if dtype == np.float32 else 1e200
    n, i = np.argwhere(mask)[7]
    channel[1][mask] = 3.25
    channel[2] *= largest
    channel[3] /= largest
    channel[4, n, i] = np.inf
    channel[5, n, i] = np.nan
    dy[:, 6] = 0
    y, mean, invstd, dx, dweight, dbias = everything(
        NORMS["batch"], x, dy, weight, bias, 1, mask=mask
    )
    counted = np.ascontiguousarray(channel[:, mask])[None]
    expected = bnfast.batch_norm_forward(counted, weight, bias)
    finite = [0, 1, 2, 3, 6]
    np.testing.assert_allclose(mean[finite], expected[1][finite], 16 * eps_of(dtype))
    np.testing.assert_allclose(invstd[finite], expected[2][finite], 16 * eps_of(dtype))
    assert not np.isfinite(mean[4]) and np.isnan(mean[5])
    np.testing.assert_array_equal(np.moveaxis(y, 1, 0)[1][mask], bias[1])
    np.testing.assert_array_equal(np.moveaxis(y, 1, 0)[:, ~mask], 0)
    assert dbias[6] == dweight[6] == 0 and not dx[:, 6].any()
    for got, want in zip((y, dx), (plain[0], plain[3]), strict=True):
        np.testing.assert_array_equal(got[:, 0], want[:, 0])
    for got, want in zip(
        (mean, invstd, dweight, dbias), (plain[k] for k in (1, 2, 4, 5)), strict=True
    ):
        assert got[0] == want[0]


@pytest.mark.parametrize("padding", ["zeros", "input"])
@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("shape", [(3, 6, 7, 11), (4, 6, 2, 3, 5), (5, 6), (2, 6, 400)], ids=str)
def test_any_strides(dtype, rng, axis, norm, buffer, shape, padding):
    make = BUFFERS[buffer]
    for pattern in (half, prefixes):
        mask = masks_of(shape, pattern, rng)
        x, dy, weight, bias = inputs(rng, shape, axis, dtype, mask)
        check(
            *(norm, make(x), make(dy), weight, bias, mask, axis, padding),
            out=lambda like=x: make(np.full_like(like, 7)),
        )


@pytest.mark.parametrize(
    "view", ["reversed", "every other", "fortran", "broadcast", "sparse bytes"]
)
def test_any_strides_of_the_mask(dtype, rng, axis, norm, view):
    shape = (4, 6, 8, 10)
    mask = masks_of(shape, half, rng)
    expected_mask = mask
    if view == "reversed":
        mask = mask[::-1, ::-1, ::-1]
        expected_mask = mask.copy()
    elif view == "every other":
        memory = np.zeros((8, 16, 20), bool)
        memory[::2, ::2, ::2] = mask
        mask = memory[::2, ::2, ::2]
    elif view == "fortran":
        mask = np.asfortranarray(mask)
    elif view == "broadcast":
        mask = mask[:, :1]
        expected_mask = np.broadcast_to(mask, (4, 8, 10))
    else:  # bytes that are neither 0 nor 1 count
        mask = (mask * np.uint8(7)).view(bool)
    given = inputs(rng, shape, axis, dtype, expected_mask)
    expected = everything(norm, *given, axis, mask=np.ascontiguousarray(expected_mask))
    assert_same_bits(everything(norm, *given, axis, mask=mask), expected)
    with_channels = np.expand_dims(mask, axis)
    assert_same_bits(everything(norm, *given, axis, mask=with_channels), expected)


@pytest.mark.parametrize("padding", ["zeros", "input"])
@pytest.mark.parametrize("make", [half, prefixes, samples])
@pytest.mark.parametrize("shape", [(3, 6, 9, 9), (2, 6, 1300), (4, 2, 5000)], ids=str)
def test_in_place(isa, dtype, rng, axis, norm, shape, make, padding):
    forward, backward, _ = norm
    mask = masks_of(shape, make, rng)
    x, dy, weight, bias = inputs(rng, shape, axis, dtype, mask)
    masked = {"axis": axis, "mask": mask, "padding": padding}
    y, *saved = forward(x, weight, bias, **masked)
    dx, *_ = backward(dy, x, *saved, weight, **masked)
    over_x, over_dy = x.copy(), dy.copy()
    assert backward(dy, over_x, *saved, weight, **masked, out=over_x)[0] is over_x
    backward(over_dy, x, *saved, weight, **masked, out=over_dy)
    np.testing.assert_array_equal(over_x, dx)
    np.testing.assert_array_equal(over_dy, dx)
    assert forward(x, weight, bias, **masked, out=x)[0] is x
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("padding", ["zeros", "input"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_those_of_central_differences(rng, axis, norm, training, padding):
    shape = (3, 4, 5)
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]], bool)
    x, dy = (in_layout(array, axis) for array in rng.normal(size=(2, *shape)))
    weight, bias = rng.normal(size=(2, 4))
    mean, var = rng.normal(size=4), rng.uniform(1, 2, 4)
    masked = {"axis": axis, "mask": mask, "padding": padding}
    forward, backward, _ = norm
    if not training:
        forward, backward = None, bnfast.batch_norm_backward

    def loss():
        if forward is None:
            return (bnfast.batch_norm(x, mean, var, weight, bias, **masked) * dy).sum()
        return (forward(x, weight, bias, **masked)[0] * dy).sum()

    if training:
        _, *saved = forward(x, weight, bias, **masked)
        gradients = backward(dy, x, *saved, weight, **masked)
    else:
        saved = mean, 1 / np.sqrt(var + 1e-5)
        gradients = backward(dy, x, *saved, weight, training=False, **masked)
    for array, gradient in zip((x, weight, bias), gradients, strict=True):
        numeric = central_differences(loss, array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


@pytest.mark.parametrize("make", [half, prefixes])
def test_gradients_are_those_of_autograd(rng, axis, make):
    torch = pytest.importorskip("torch")
    shape = (4, 3, 9)
    mask = masks_of(shape, make, rng)
    x, dy = (in_layout(array, axis) for array in rng.normal(size=(2, *shape)))
    weight, bias = rng.normal(size=(2, 3))
    t_x, t_weight, t_bias = (torch.tensor(a, requires_grad=True) for a in (x, weight, bias))
    m = torch.tensor(np.expand_dims(mask, axis))
    along = [1, -1, 1] if axis == 1 else [1, 1, -1]
    axes = (0, 2) if axis == 1 else (0, 1)
    values = torch.where(m, t_x, torch.zeros(()).double())
    mean = values.sum(axes, keepdim=True) / mask.sum()
    var = (torch.where(m, t_x - mean, torch.zeros(()).double()) ** 2).sum(axes, keepdim=True)
    y = (t_x - mean) / torch.sqrt(var / mask.sum() + 1e-5)
    y = (y * t_weight.reshape(along) + t_bias.reshape(along)) * m
    y.backward(torch.tensor(dy))
    got, *saved = bnfast.batch_norm_forward(x, weight, bias, axis=axis, mask=mask)
    close(got, y.detach().numpy())
    gradients = bnfast.batch_norm_backward(dy, x, *saved, weight, axis=axis, mask=mask)
    for gradient, tensor in zip(gradients, (t_x, t_weight, t_bias), strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), CLOSE_F64 * 10, CLOSE_F64 * 10)


@pytest.mark.parametrize("integer", [np.int64, np.uint8, list])
def test_lengths_are_a_mask_of_prefixes(dtype, rng, axis, norm, integer):
    shape = (5, 4, 30)
    lengths = [30, 0, 7, 1, 29]
    mask = np.arange(30) < np.array(lengths)[:, None]
    given = inputs(rng, shape, axis, dtype, mask)
    expected = everything(norm, *given, axis, mask=mask)
    lengths = lengths if integer is list else np.array(lengths, integer)
    assert_same_bits(everything(norm, *given, axis, lengths=lengths), expected)


@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics_of_a_batch_count_what_counts(isa, dtype, rng, axis, unbiased):
    shape = (6, 5, 40)
    mask = masks_of(shape, prefixes, rng)
    x, *_ = inputs(rng, shape, axis, dtype, mask)
    mean, var = rng.normal(size=5).astype(dtype), rng.uniform(1, 2, 5).astype(dtype)
    values = np.moveaxis(x, axis, 1).transpose(0, 2, 1)[mask].astype(np.float64)
    expected_mean = 0.7 * mean + 0.3 * values.mean(0)
    expected_var = 0.7 * var + 0.3 * values.var(0, ddof=int(unbiased))
    bnfast.batch_norm(x, mean, var, None, None, True, 0.3, axis=axis, unbiased=unbiased, mask=mask)
    np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=2e-6)
    np.testing.assert_allclose(var, expected_var, rtol=2e-6)


def test_running_statistics_of_instances_average_the_samples_that_have_values(dtype, rng, axis):
    shape = (4, 5, 40)
    mask = np.arange(40) < np.array([40, 0, 13, 2])[:, None]
    x, *_ = inputs(rng, shape, axis, dtype, mask)
    mean, var = np.zeros(5, dtype), np.ones(5, dtype)
    bnfast.instance_norm(x, mean, var, momentum=1.0, axis=axis, mask=mask)
    samples = [np.moveaxis(x, axis, 1)[n][:, mask[n]].astype(np.float64) for n in (0, 2, 3)]
    expected = [np.mean([s.mean(1) for s in samples], 0)]
    expected.append(np.mean([s.var(1, ddof=1) for s in samples], 0))
    np.testing.assert_allclose(mean, expected[0], CLOSE_F32, CLOSE_F32)
    np.testing.assert_allclose(var, expected[1], CLOSE_F32, CLOSE_F32)


def test_a_sample_without_values_is_padding(isa, dtype, rng, axis):
    shape = (3, 4, 20)
    mask = np.arange(20) < np.array([20, 0, 5])[:, None]
    x, dy, weight, bias = inputs(rng, shape, axis, dtype, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("instance", "group"):
            y, mean, invstd, dx, dweight, dbias = everything(
                NORMS[name], x, dy, weight, bias, axis, mask=mask
            )
            assert not y[1].any() and not dx[1].any()
            np.testing.assert_array_equal(mean[1], 0.0)
            close(invstd[1], 1 / np.sqrt(1e-5))
            assert np.isfinite(dweight).all() and np.isfinite(dbias).all()


@pytest.mark.parametrize("padding", ["zeros", "input"])
def test_evaluation_normalizes_what_counts(isa, dtype, rng, axis, padding):
    shape = (4, 6, 5, 7)
    mask = masks_of(shape, half, rng)
    x, _, weight, bias = inputs(rng, shape, axis, dtype, mask)
    mean, var = rng.normal(size=6).astype(dtype), rng.uniform(1, 2, 6).astype(dtype)
    running = mean.copy(), var.copy()
    counts = in_layout(np.broadcast_to(np.expand_dims(mask, 1), shape), axis)
    with np.errstate(all="ignore"):
        expected = bnfast.batch_norm(x, mean, var, weight, bias, axis=axis)
    expected = np.where(counts, expected, x if padding == "input" else 0)
    for some in (mask, np.zeros_like(mask)):
        y = bnfast.batch_norm(x, *running, weight, bias, axis=axis, mask=some, padding=padding)
        wanted = expected if some.any() else (x if padding == "input" else np.zeros_like(x))
        np.testing.assert_array_equal(y, wanted)
    y = bnfast.instance_norm(
        x, *running, weight, bias, False, axis=axis, mask=mask, padding=padding
    )
    np.testing.assert_array_equal(y, expected)
    assert_same_bits(running, (mean, var))


# Masks with what else a call may have


def everywhere(mask, shape, axis):
    return in_layout(np.broadcast_to(np.expand_dims(mask, 1), shape), axis)


# The last has lines of several chunks, and longer than scratch.
FUSED_SHAPES = [(3, 6, 7, 9), (2, 4, 1300), (40, 6, 5), (9, 66), (2, 2, 9000)]


@pytest.mark.parametrize("padding", ["zeros", "input"])
@pytest.mark.parametrize("name", [*PIECEWISE, *CURVES, None])
@pytest.mark.parametrize("shape", FUSED_SHAPES, ids=str)
def test_activations_and_residuals_are_of_what_counts(dtype, rng, axis, norm, shape, name, padding):
    forward, backward, _ = norm
    for make in (half, prefixes, runs, samples):
        mask = masks_of(shape, make, rng)
        x, dy, weight, bias = inputs(rng, shape, axis, dtype, mask)
        residual = in_layout(inputs(rng, shape, 1, dtype, mask)[0], axis)
        counts = everywhere(mask, shape, axis)
        masked = {"mask": mask, "padding": padding, "axis": axis}
        plain, *saved = forward(x, weight, bias, **masked)
        for added in (None, BUFFERS["in_larger_array"](residual)):
            fused = {"activation": name, "negative_slope": SLOPE, "residual": added}
            y, *statistics = forward(x, weight, bias, **masked, **fused)
            assert_same_bits(statistics, saved)
            with np.errstate(all="ignore"):
                z = plain if added is None else plain + added
                z = np.where(counts, z, 0)
                wanted = z if name is None else activated(z, name)
                dz = np.where(counts, dy if name is None else through(dy, z, name), 0)
            wanted = np.where(counts, wanted, x if padding == "input" else 0)
            exact = name not in CURVES
            if exact:
                np.testing.assert_array_equal(y, wanted)
            else:
                tolerance = CURVE_ULPS * eps_of(dtype)
                np.testing.assert_allclose(y, wanted, rtol=tolerance, atol=1e-30)
            expected = list(backward(dz, x, *saved, weight, **masked))
            expected[0] = np.where(counts, expected[0], dy if padding == "input" else 0)
            ways = [{"bias": bias, "residual": added}]
            if name in PIECEWISE:
                ways.append({"y": y, "residual": added is not None})
            for way in ways:
                given = {**masked, **fused, **way}
                got = backward(dy, x, *saved, weight, **given)
                if added is not None:
                    expected_of_residual = dz
                    *got, of_residual = got
                    if exact:
                        np.testing.assert_array_equal(of_residual, expected_of_residual)
                    else:
                        size = finite_max(dz) + 1
                        assert_within(of_residual, dz, CURVE_GRADIENT * eps_of(dtype) * size)
                if exact:
                    assert_same_bits(got, expected)
                    continue
                np.testing.assert_array_equal(np.isfinite(got[0]), np.isfinite(expected[0]))
                for a, b in zip(got, expected, strict=True):
                    size = finite_max(b) + 1
                    a, b = np.nan_to_num(a), np.nan_to_num(b)
                    np.testing.assert_allclose(a, b, rtol=0, atol=64 * eps_of(dtype) * size)


@pytest.mark.parametrize("padding", ["zeros", "input"])
@pytest.mark.parametrize("name", ["relu", "silu"])
@pytest.mark.parametrize("training", [True, False])
def test_fused_gradients_are_those_of_central_differences(rng, axis, norm, name, training, padding):
    shape = (3, 4, 5)
    mask = np.array([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]], bool)
    x, dy, residual = (in_layout(array, axis) for array in rng.normal(size=(3, *shape)))
    weight, bias = rng.normal(size=(2, 4))
    mean, var = rng.normal(size=4), rng.uniform(1, 2, 4)
    given = {"axis": axis, "mask": mask, "padding": padding, "activation": name}
    forward, backward, _ = norm

    def loss():
        added = {**given, "residual": residual}
        if training:
            return (forward(x, weight, bias, **added)[0] * dy).sum()
        return (bnfast.batch_norm(x, mean, var, weight, bias, **added) * dy).sum()

    added = {**given, "bias": bias, "residual": residual}
    if training:
        _, *saved = forward(x, weight, bias, **given, residual=residual)
        gradients = backward(dy, x, *saved, weight, **added)
    else:
        saved = mean, 1 / np.sqrt(var + 1e-5)
        gradients = bnfast.batch_norm_backward(dy, x, *saved, weight, training=False, **added)
    for array, gradient in zip((x, weight, bias, residual), gradients, strict=True):
        numeric = central_differences(loss, array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


@pytest.mark.parametrize("padding", ["zeros", "input"])
def test_fused_evaluation_is_of_what_counts(isa, dtype, rng, axis, padding):
    shape = (4, 6, 5, 7)
    mask = masks_of(shape, half, rng)
    x, _, weight, bias = inputs(rng, shape, axis, dtype, mask)
    residual = in_layout(inputs(rng, shape, 1, dtype, mask)[0], axis)
    mean, var = rng.normal(size=6).astype(dtype), rng.uniform(1, 2, 6).astype(dtype)
    counts = everywhere(mask, shape, axis)
    with np.errstate(all="ignore"):
        z = bnfast.batch_norm(x, mean, var, weight, bias, axis=axis) + residual
        wanted = np.where(counts, np.clip(z, 0, None), x if padding == "input" else 0)
    given = {"axis": axis, "mask": mask, "padding": padding, "activation": "relu"}
    y = bnfast.batch_norm(x, mean, var, weight, bias, **given, residual=residual)
    np.testing.assert_array_equal(y, wanted)
    for over in (x.copy(), residual.copy()):
        others = {"x": over if over[counts].tobytes() == x[counts].tobytes() else x}
        added = residual if others["x"] is over else over
        y = bnfast.batch_norm(
            others["x"], mean, var, weight, bias, **given, residual=added, out=over
        )
        assert y is over
        np.testing.assert_array_equal(y, wanted)


HALVES = ["float16", "bfloat16"]


@pytest.mark.parametrize("name", [None, "relu", "silu"])
@pytest.mark.parametrize("padding", ["zeros", "input"])
@pytest.mark.parametrize("half_type", HALVES)
@pytest.mark.parametrize(
    "shape", [(3, 6, 7, 9), (2, 4, 1300), (40, 6, 5), (9, 130), (2, 2, 9000)], ids=str
)
def test_data_of_16_bits_has_the_result_of_float32_rounded_once(
    isa, rng, axis, norm, shape, half_type, padding, name
):
    if half_type == "bfloat16":
        half_type = pytest.importorskip("ml_dtypes").bfloat16
    forward, backward, _ = norm
    for make in (half, prefixes, samples):
        mask = masks_of(shape, make, rng)
        x, dy, weight, bias = inputs(rng, shape, axis, np.dtype(np.float32), mask)
        residual = inputs(rng, shape, axis, np.dtype(np.float32), mask)[0]

        def results(dtype, mask=mask, given=(x, dy, residual), weight=weight, bias=bias):
            narrow = [array.astype(half_type).astype(dtype) for array in given]
            x, dy, residual = narrow
            masked = {"axis": axis, "mask": mask, "padding": padding, "activation": name}
            added = None if name is None else residual
            y, *saved = forward(x, weight, bias, **masked, residual=added)
            return y, *saved, *backward(dy, x, *saved, weight, **masked, bias=bias, residual=added)

        narrow, wide = results(half_type), results(np.float32)
        assert narrow[0].dtype == narrow[3].dtype == half_type
        for got, want in zip(narrow, wide, strict=True):
            with np.errstate(all="ignore"):
                want = want.astype(got.dtype).astype(np.float64)
            np.testing.assert_array_equal(got.astype(np.float64), want)


X = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
MASK = np.array([[1, 1, 0], [1, 0, 0]], bool)
CALLS = {
    "batch_norm": lambda **masked: bnfast.batch_norm(X, None, None, training=True, **masked),
    "batch_norm_forward": lambda **masked: bnfast.batch_norm_forward(X, **masked),
    "batch_norm_backward": lambda **masked: bnfast.batch_norm_backward(
        X, X, np.zeros(4), np.ones(4), **masked
    ),
    "instance_norm": lambda **masked: bnfast.instance_norm(X, **masked),
    "instance_norm_backward": lambda **masked: bnfast.instance_norm_backward(
        X, X, np.zeros((2, 4)), np.ones((2, 4)), **masked
    ),
    "group_norm": lambda **masked: bnfast.group_norm(X, 2, **masked),
    "group_norm_backward": lambda **masked: bnfast.group_norm_backward(
        X, X, np.zeros((2, 2)), np.ones((2, 2)), **masked
    ),
    "BatchNorm": lambda **masked: bnfast.BatchNorm(4)(X, **masked),
    "GroupNorm": lambda **masked: bnfast.GroupNorm(2, 4)(X, **masked),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("masked", "error", "message"),
    [
        ({"mask": MASK.astype(int)}, TypeError, "mask must be a boolean array, got int64"),
        ({"mask": [[1, 1, 0]]}, TypeError, "mask must be a boolean array"),
        ({"mask": MASK[:, :2]}, ValueError, r"mask must broadcast to .*\(2, 3\) or \(2, 1, 3\)"),
        ({"mask": np.ones((2, 4, 3), bool)}, ValueError, "mask must broadcast to the shape of x"),
        ({"mask": MASK[None, None]}, ValueError, "mask must broadcast to the shape of x"),
        ({"mask": ~np.ones_like(MASK)}, ValueError, "mask must somewhere be True.*got all False"),
        ({"mask": "valid"}, TypeError, "mask must be"),
        ({"lengths": [0, 0]}, ValueError, "lengths must somewhere be above 0"),
        ({"lengths": [1, 4]}, ValueError, "lengths must be from 0 to 3, got 4"),
        ({"lengths": [-1, 2]}, ValueError, "lengths must be from 0 to 3, got -1"),
        ({"lengths": [1.0, 2.0]}, TypeError, "lengths must be integers"),
        ({"lengths": [True, False]}, TypeError, "lengths must be integers"),
        ({"lengths": [1, 2, 3]}, ValueError, "lengths must be integers, one for each of the 2"),
        ({"lengths": 2}, ValueError, "lengths must be integers, one for each of the 2"),
        ({"lengths": [1, 2], "mask": MASK}, ValueError, "mask and lengths must not both be given"),
        ({"mask": MASK, "padding": "zero"}, ValueError, "padding must be 'zeros' or 'input', got"),
        ({"padding": None}, ValueError, "padding must be 'zeros' or 'input', got None"),
    ],
)
def test_bad_masks_are_refused(call, masked, error, message):
    with pytest.raises(error, match=message):
        CALLS[call](**masked)


def test_lengths_are_of_sequences():
    x = np.zeros((2, 3, 4, 5), np.float32)
    for call in (bnfast.batch_norm_forward, bnfast.BatchNorm(3)):
        with pytest.raises(ValueError, match=r"lengths must be those of samples.*a mask"):
            call(x, lengths=[1, 2])
    with pytest.raises(ValueError, match="lengths must be those of samples"):
        bnfast.batch_norm_forward(x[0], axis=0, lengths=[1, 2, 3])


def test_what_is_refused_leaves_all_as_it_was():
    mean, var, out = np.zeros(4, np.float32), np.ones(4, np.float32), np.full_like(X, 7)
    one = np.zeros_like(MASK)
    one[0, 0] = True
    for mask in (~np.ones_like(MASK), one, MASK[:1, :2]):
        with pytest.raises(ValueError, match="must"):
            bnfast.batch_norm(X, mean, var, training=True, mask=mask, out=out)
    of_samples = np.array([[1, 1, 1], [1, 0, 0]], bool)
    with pytest.raises(ValueError, match="more than one value per channel of each sample"):
        bnfast.instance_norm(X, mean, var, mask=of_samples, out=out)
    assert (mean == 0).all() and (var == 1).all() and (out == 7).all()


def test_nothing_to_normalize_needs_no_values_that_count(dtype):
    x = np.empty((0, 4, 3), dtype)
    mask = np.empty((0, 3), bool)
    y, mean, _ = bnfast.batch_norm_forward(x, mask=mask)
    assert y.shape == x.shape and mean.shape == (4,)
    assert bnfast.batch_norm_forward(x, lengths=[])[0].shape == x.shape
    dx, *_ = bnfast.batch_norm_backward(x, x, np.zeros(4), np.ones(4), mask=mask)
    assert dx.shape == x.shape


LAYERS = {
    "batch": lambda: bnfast.BatchNorm(6),
    "instance": lambda: bnfast.InstanceNorm(6, affine=True, track_running_stats=True),
    "group": lambda: bnfast.GroupNorm(GROUPS, 6),
}


@pytest.mark.parametrize("padding", ["zeros", "input"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_remember_the_mask_for_backward(rng, name, padding):
    shape = (4, 6, 50)
    mask = np.arange(50) < np.array([50, 13, 2, 30])[:, None]
    x, dy, weight, bias = inputs(rng, shape, 1, np.dtype(np.float32), mask)
    layer = LAYERS[name]()
    layer.weight[...], layer.bias[...] = weight, bias
    forward, backward, _ = NORMS[name]
    y, *saved = forward(x, weight, bias, mask=mask, padding=padding)
    gradients = backward(dy, x, *saved, weight, mask=mask, padding=padding)
    for given in ({"mask": mask}, {"lengths": [50, 13, 2, 30]}):
        np.testing.assert_array_equal(layer(x, **given, padding=padding), y)
        got = layer.backward(dy), layer.weight_grad, layer.bias_grad
        assert_same_bits(got, gradients)
    if name == "batch":
        running = np.zeros(6, np.float32), np.ones(6, np.float32)
        for _ in range(2):
            bnfast.batch_norm(x, *running, training=True, mask=mask)
        assert_same_bits((layer.running_mean, layer.running_var), running)
        assert layer.num_batches_tracked == 2
        layer.eval()
        y = layer(x, mask=mask, padding=padding)
        expected = bnfast.batch_norm(x, *running, weight, bias, mask=mask, padding=padding)
        np.testing.assert_array_equal(y, expected)
        invstd = 1 / np.sqrt(running[1].astype(np.float64) + 1e-5)
        dx, *_ = bnfast.batch_norm_backward(
            *(dy, x, running[0], invstd, weight), training=False, mask=mask, padding=padding
        )
        np.testing.assert_array_equal(layer.backward(dy), dx)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_an_activation_and_a_residual_remember_the_mask(rng, name):
    shape = (4, 6, 50)
    mask = np.arange(50) < np.array([50, 13, 2, 30])[:, None]
    x, dy, weight, bias = inputs(rng, shape, 1, np.dtype(np.float32), mask)
    residual = inputs(rng, shape, 1, np.dtype(np.float32), mask)[0]
    layer = LAYERS[name]()
    forward, backward, _ = NORMS[name]
    layer.weight[...], layer.bias[...] = weight, bias
    for activation in ("relu", "silu", None):
        layer.activation = activation
        given = {"activation": activation, "residual": residual}
        y, *saved = forward(x, weight, bias, mask=mask, **given)
        expected = backward(dy, x, *saved, weight, bias=bias, mask=mask, **given)
        np.testing.assert_array_equal(layer(x, residual, lengths=[50, 13, 2, 30]), y)
        dx, dresidual = layer.backward(dy)
        assert_same_bits((dx, layer.weight_grad, layer.bias_grad, dresidual), expected)
    if name == "batch":
        assert layer.num_batches_tracked == 3
        layer.eval()
        running = layer.running_mean, layer.running_var
        y = bnfast.batch_norm(x, *running, weight, bias, mask=mask, residual=residual)
        np.testing.assert_array_equal(layer(x, residual, mask=mask), y)
        invstd = 1 / np.sqrt(running[1].astype(np.float64) + 1e-5)
        expected = bnfast.batch_norm_backward(
            *(dy, x, running[0], invstd, weight), training=False, mask=mask, residual=True
        )
        assert_same_bits(layer.backward(dy), (expected[0], expected[3]))


def test_layers_warn_of_few_values_that_count(rng):
    x = rng.normal(size=(4, 3, 50)).astype(np.float32)
    with pytest.warns(UserWarning, match="4 values per channel"):
        bnfast.BatchNorm(3)(x, lengths=[1, 1, 1, 1])


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_padding_does_not_make_a_batch_nonfinite(rng, nonfinite):
    x = rng.normal(size=(4, 3, 50)).astype(np.float32)
    x[:, :, 30:] = np.nan
    layer = bnfast.BatchNorm(3, nonfinite=nonfinite)
    layer(x, lengths=[30] * 4)
    assert layer.num_batches_tracked == 1 and layer.running_mean.any()
    if nonfinite == "raise":
        with pytest.raises(ValueError, match="finite statistics"):
            layer(x, lengths=[31] * 4)


def test_a_learned_momentum_and_an_observer_take_no_mask(rng):
    x = rng.normal(size=(4, 3, 50)).astype(np.float32)
    layer = bnfast.BatchNorm(3, momentum=bnfast.LearnableMomentum())
    with pytest.raises(ValueError, match="must be None with a LearnableMomentum"):
        layer(x, lengths=[30] * 4)
    layer = bnfast.BatchNorm(3)
    with bnfast.monitoring(layer), pytest.raises(ValueError, match="recalibrated or monitored"):
        layer(x, lengths=[30] * 4)


def test_a_sample_without_values_adds_nothing_to_gradients_whatever_its_invstd(rng):
    x, dy = rng.normal(size=(2, 2, 4, 3))
    saved = bnfast.group_norm_forward(x, 2, eps=0.0, lengths=[3, 0])[1:]
    assert np.isinf(saved[1][1]).all()
    dx, *of_parameters = bnfast.group_norm_backward(dy, x, *saved, lengths=[3, 0])
    alone = bnfast.group_norm_backward(dy[:1], x[:1], *(a[:1] for a in saved))
    np.testing.assert_array_equal(dx, np.concatenate((alone[0], np.zeros((1, 4, 3)))))
    for got, expected in zip(of_parameters, alone[1:], strict=True):
        np.testing.assert_array_equal(got, expected)


def test_lengths_of_a_layer_are_checked_once_and_may_be_changed_before_backward(monkeypatch, rng):
    def counting(*arguments):
        checks.append(arguments)
        return right(*arguments)

    checks, right = [], _masks.integers_of_samples
    monkeypatch.setattr(_masks, "integers_of_samples", counting)
    x, dy = rng.normal(size=(2, 4, 3, 9)).astype(np.float32)
    lengths = np.array([9, 4, 0, 7])
    layer = bnfast.BatchNorm(3)
    layer(x, lengths=lengths)
    lengths[:] = 1
    dx = layer.backward(dy)
    assert len(checks) == 1
    layer(x, lengths=[9, 4, 0, 7])
    np.testing.assert_array_equal(dx, layer.backward(dy))
