"""The ends of the range of each dtype, for every member of the family and in both directions."""

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from cases import cropped
from members import MEMBERS
from oracle import WIDE, along, assert_within
from tolerances import GRADIENT_SUMS, INPUT_GRADIENT, MOMENTS_F64, OUTPUT, eps_of

# Where squares, and products with a gradient as extreme, leave the range; up to its very ends.
SIZES = {
    "f32": [1e-33, 1e-25, 1e20, 3.4e38],
    "f64": [1e-302, 1e-200, 1e-155, 1e155, 1e200, 1.7e308],
}
EXTREMES = [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]

# Runs; a dozen images of short planes, which are rows; two values in each plane. More than a block.
SHAPES = [(3, 4, 5, 8), (13, 2, 5, 4), (40, 6, 1, 2)]
LONG = [(1, 2, 300, 256), (34000, 2, 1, 2)]

# What batch norm needs a positive eps for, where it is the smallest.
ANY_EPS = [name for name in MEMBERS if name.split()[0] in ("group", "layer", "rms")]


def results(member, x, dy, weight, bias, eps, axis):
    """All of both directions."""
    y, mean, invstd = member.forward(x, weight, bias, eps, axis)
    return [y, mean, invstd, *member.backward(dy, x, mean, invstd, weight, axis)]


def check(member, x, dy, weight, bias, eps, axis, centre=0.0):
    """Compare both directions with the definition, made of x - centre, which must be exact."""
    y, mean, invstd, dx, dweight, dbias = got = results(member, x, dy, weight, bias, eps, axis)
    shifted = x.astype(WIDE) - WIDE(centre)
    want = member.defined_forward(shifted, weight, bias, eps, axis)
    least, precision = WIDE(np.finfo(x.dtype).smallest_subnormal), eps_of(x.dtype)
    largest = np.abs(want[0]).max() + 1
    assert_within(y, want[0], OUTPUT * precision * largest)
    assert_within(invstd, want[2], OUTPUT * precision * want[2] + least)
    size = np.abs(x).max().astype(WIDE)
    assert_within(mean.astype(WIDE) - WIDE(centre), want[1], MOMENTS_F64 * precision * size)
    expected = member.defined_backward(dy, shifted, *want[1:], weight, axis)
    upstream = np.abs(dy).max().astype(WIDE) * (np.abs(weight).max() + 1) * largest
    assert_within(dx, expected[0], INPUT_GRADIENT * precision * upstream * want[2].max() + least)
    ones = np.abs(dy).astype(WIDE)
    total = member.defined_backward(ones, shifted, *want[1:], weight, axis)[2]
    total = ones.sum() if total is None else total
    # The sums of samples are made of given statistics, and have only the rounded mean.
    ulps = GRADIENT_SUMS + (centre if member is MEMBERS["conditional"] else 0)
    assert_within(dweight, expected[1], ulps * precision * total * largest + least)
    if dbias is not None:
        assert_within(dbias, expected[2], GRADIENT_SUMS * precision * total + least)
    return got


def inputs(rng, member, shape, axis, dtype, size, dy_size=1.0):
    x = (rng.uniform(0.5, 1, shape) * size).astype(dtype)
    dy = (rng.normal(size=shape) * dy_size).astype(dtype)
    return x, dy, *rng.normal(size=(2, *member.parameters(shape, axis))).astype(dtype)


def smallest_eps(name, size):
    return 0.0 if name in ANY_EPS else 1e-320 if size < 1 else 1e-5


def extremes_of(name):
    """Without those of which even the smallest eps would be the variance."""
    return [e for e in EXTREMES if name in ANY_EPS or not 0 < e[1] < 1e-160]


CASES = [(name, *extreme) for name in MEMBERS for extreme in extremes_of(name)]


@pytest.mark.parametrize("like_x", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "kind", "size"), CASES)
def test_both_directions_hold_up_to_the_ends_of_the_range(
    isa, rng, axis, name, kind, size, shape, like_x
):
    """Of a gradient of ordinary size, and of one whose products with x leave the range."""
    dtype = np.dtype(kind.replace("f", "float"))
    dy_size = size ** (1 / 3) if like_x else 1.0
    case = inputs(rng, MEMBERS[name], shape, axis, dtype, size, dy_size)
    check(MEMBERS[name], *case, smallest_eps(name, size), axis)


@pytest.mark.parametrize("shape", LONG, ids=str)
@pytest.mark.parametrize("size", [1e-160, 1e200])
@pytest.mark.parametrize("name", ["batch", "layer", "rms"])
def test_they_hold_over_blocks_and_odd_strides(rng, axis, name, size, shape):
    x, dy, *parameters = inputs(rng, MEMBERS[name], shape, axis, np.float64, size)
    eps = smallest_eps(name, size)
    expected = check(MEMBERS[name], x, dy, *parameters, eps, axis)
    got = results(MEMBERS[name], cropped(x), cropped(dy), *parameters, eps, axis)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [1e-160, 1e200])
@pytest.mark.parametrize("name", MEMBERS)
def test_their_bits_depend_on_neither_threads_nor_instruction_set(
    rng, use_isa, use_threads, axis, name, size
):
    case = inputs(rng, MEMBERS[name], (20, 6, 70, 4), axis, np.float64, size)
    expected = None
    for isa in bnfast.available_isas():
        use_isa(isa)
        for num_threads in (1, 2, 3):
            use_threads(num_threads)
            got = results(MEMBERS[name], *case, smallest_eps(name, size), axis)
            expected = expected or got
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(6, 40, 7, 7), (300, 40)], ids=str)
def test_a_channel_is_what_it_is_among_others_of_its_size(isa, rng, axis, shape):
    x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in rng.normal(3, 2, (2, *shape)))
    sizes = np.ones(40)
    sizes[[1, 2, 9, 17, 18, 33]] = 1e200, 1e155, 1e-150, 1e300, np.nan, 1e-140
    parameters = np.ones(40), np.zeros(40), 1e-320, axis
    got = results(MEMBERS["batch"], x * along(sizes, x, axis), dy, *parameters)
    for size in np.unique(sizes):
        expected = results(MEMBERS["batch"], x * size, dy, *parameters)
        own = (sizes == size) | (np.isnan(sizes) & np.isnan(size))
        for a, b in zip(got, expected, strict=True):
            where = axis if a.ndim > 1 else 0
            np.testing.assert_array_equal(np.compress(own, a, where), np.compress(own, b, where))


@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4, 1e7, 1e10])
@pytest.mark.parametrize("shape", [*SHAPES[:2], (9, 4, 31, 12)], ids=str)
@pytest.mark.parametrize("name", [name for name in MEMBERS if MEMBERS[name].centred])
def test_float64_gradients_are_as_exact_whatever_the_mean(isa, rng, axis, name, shape, ratio):
    """The mean is saved as one float64, and rounding it would leave |mean| / std ulps."""
    member = MEMBERS[name]
    x, dy = ratio + rng.normal(0, 1, shape), rng.normal(0.5, 1, shape)
    dy += (x - ratio) * 0.7  # so that sum(dy * xhat) is about as large as it may be
    weight, bias = rng.normal(size=(2, *member.parameters(shape, axis)))
    check(member, x, dy, weight, bias, 1e-5, axis, centre=ratio)


@pytest.mark.parametrize("other", [1e6, np.inf, np.nan])
@pytest.mark.parametrize("shape", [(6, 40, 7, 7), (300, 40)], ids=str)
def test_a_large_mean_changes_no_gradient_of_its_neighbours(isa, rng, axis, shape, other):
    x, dy = (np.ascontiguousarray(np.moveaxis(a, 1, axis)) for a in rng.normal(3, 2, (2, *shape)))
    parameters = np.ones(40), np.zeros(40), 1e-5, axis
    expected = results(MEMBERS["batch"], x, dy, *parameters)
    offsets = np.where(np.arange(40) % 7 == 2, other, 0.0)
    got = results(MEMBERS["batch"], x + along(offsets, x, axis), dy, *parameters)
    for a, b in zip(got, expected, strict=True):
        where = axis if a.ndim > 1 else 0
        kept = np.arange(40) % 7 != 2
        np.testing.assert_array_equal(np.compress(kept, a, where), np.compress(kept, b, where))


def test_a_mean_that_is_not_that_of_x_is_what_the_caller_says(isa, rng, axis):
    x, dy = 1e4 + rng.normal(size=(8, 6, 6)), rng.normal(size=(8, 6, 6))
    mean, invstd = np.full(6, 1e4 + 0.5), np.ones(6)
    expected = reference.batch_norm_backward(dy, x, mean, invstd, axis=axis, precision=WIDE)
    got = bnfast.batch_norm_backward(dy, x, mean, invstd, axis=axis)
    for a, b in zip(got, expected, strict=True):
        assert_within(a, b, 1e-12)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_gradients_of_constant_statistics_hold_at_the_ends(isa, rng, axis, size):
    x, dy = rng.normal(size=(40, 6, 6)) * size, rng.normal(size=(40, 6, 6)) * size
    mean, invstd = rng.normal(size=6) * size, rng.uniform(1, 2, 6) / size
    got = bnfast.batch_norm_backward(dy, x, mean, invstd, axis=axis, training=False)
    expected = reference.batch_norm_backward(
        dy, x, mean, invstd, axis=axis, training=False, precision=WIDE
    )
    for a, b, largest in zip(got, expected, (1, size, size), strict=True):
        assert_within(a, b, 1e-12 * largest)


@pytest.mark.parametrize("size", [1e155, 1e300, 1.7e308])
def test_the_mean_holds_where_m2_does_not(isa, rng, axis, size):
    x = rng.uniform(0.5, 1, (4, 3, 50, 3)) * size
    got = bnfast.moments(x, axis)
    expected = reference.moments(x, axis, WIDE)[1]
    assert_within(got.mean, expected, MOMENTS_F64 * eps_of(np.float64) * size)
    np.testing.assert_array_equal(got.m2, np.inf)


@pytest.mark.parametrize("size", [1e30, 1e300])
@pytest.mark.parametrize("name", [name for name in MEMBERS if MEMBERS[name].centred])
def test_weights_beyond_float32_leave_a_constant_input_its_bias(isa, rng, axis, name, size):
    member = MEMBERS[name]
    x = np.full((4, 6, 5, 4), 0.1, np.float32)
    weight = rng.normal(size=member.parameters(x.shape, axis))
    y, mean, invstd = member.forward(x, weight * size, np.ones_like(weight), 1e-5, axis)
    np.testing.assert_array_equal(y, 1)
    dx, dweight, _ = member.backward(np.zeros_like(x), x, mean, invstd, weight * size, axis)
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_array_equal(dweight, 0)
