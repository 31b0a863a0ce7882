"""Moments and summaries of any array: axes, types, masks, extremes."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnfast
from tolerances import CLOSE_F64, STATISTICS_OF_ANY_DATA

INTEGERS = "?bBhHiIlLqQ"
SHAPES = [(7, 5), (33, 3, 17, 9), (2, 64, 50, 5), (300, 70), (5, 1, 3), (2500, 3)]
AXES = [1, -1, 0, None, (0, 1), (-1, 0), "all"]


def expected(x, axis, where=True):
    """Count, mean and m2 in long double, of two passes; minimum and maximum."""
    wide = x.astype(np.longdouble)
    kept = {d % x.ndim for d in (() if axis is None else np.atleast_1d(axis))}
    reduced = tuple(d for d in range(x.ndim) if d not in kept)
    where = np.broadcast_to(where, x.shape)
    count = where.sum(reduced)
    mean = np.where(where, wide, 0).sum(reduced) / np.maximum(count, 1)
    deviations = np.where(where, wide - np.expand_dims(mean, reduced), 0)
    least = np.where(where, wide, np.inf).min(reduced, initial=np.inf)
    greatest = np.where(where, wide, -np.inf).max(reduced, initial=-np.inf)
    return count, mean, (deviations**2).sum(reduced), least, greatest


def data(rng, code, shape):
    if code in "fd":
        return rng.normal(100, 3, shape).astype(code)
    if code == "?":
        return rng.integers(0, 2, shape).astype(bool)
    limits = np.iinfo(code)
    low, high = max(limits.min, -(10**9)), min(limits.max, 10**9)
    return rng.integers(low, high, shape, endpoint=True).astype(code)


def check(got, x, axis, where=True):
    count, mean, m2, least, greatest = expected(x, axis, where)
    tolerance = STATISTICS_OF_ANY_DATA[1] if x.dtype == np.float32 else CLOSE_F64
    np.testing.assert_array_equal(np.broadcast_to(got.count, count.shape), count)
    assert np.shape(got.mean) == np.shape(got.m2) == mean.shape
    deviation = np.sqrt(m2 / np.maximum(count, 1))
    error = np.abs(got.mean - mean) - np.spacing(np.abs(mean.astype(np.float64)))
    assert (error <= tolerance * deviation).all()
    np.testing.assert_allclose(np.asarray(got.m2, np.longdouble), m2, rtol=tolerance, atol=1e-300)
    if isinstance(got, bnfast.Summary):
        some = count > 0
        np.testing.assert_array_equal(np.where(some, got.minimum, np.inf), least)
        np.testing.assert_array_equal(np.where(some, got.maximum, -np.inf), greatest)
        assert np.isnan(got.minimum[~some] if some.ndim else got.minimum).all() or some.all()
        np.testing.assert_array_equal(got.nonfinite, np.zeros(mean.shape, int))


def all_axes(shape):
    return [tuple(range(len(shape))) if axis == "all" else axis for axis in AXES]


@pytest.mark.parametrize("code", [*"fd", *INTEGERS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_type_and_any_axes(rng, code, shape):
    x = data(rng, code, shape)
    for axis in all_axes(shape):
        check(bnfast.moments(x, axis), x, axis)
        check(bnfast.summary(x, axis), x, axis)


@pytest.mark.parametrize("code", "fd?BhiQ")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["values", "rows", "columns", "none", "all"])
def test_values_that_a_mask_leaves_out_do_not_count(rng, code, shape, kind):
    x = data(rng, code, shape)
    mask = {
        "values": rng.random(shape) < 0.6,
        "rows": rng.random((shape[0],) + (1,) * (len(shape) - 1)) < 0.5,
        "columns": rng.random(shape[-1]) < 0.5,
        "none": np.zeros((), bool),
        "all": np.ones(shape, bool),
    }[kind]
    for axis in all_axes(shape):
        check(bnfast.moments(x, axis, where=mask), x, axis, mask)
        check(bnfast.summary(x, axis, where=mask), x, axis, mask)
    if code in "fd":  # not even NaN
        x[~np.broadcast_to(mask, shape)] = np.nan
        check(bnfast.summary(x, where=mask), np.nan_to_num(x), 1, mask)


def test_masked_float32_is_exact_where_few_values_count_and_the_mean_is_large(isa, rng):
    x = (1e6 + rng.normal(size=(4096, 20))).astype(np.float32)
    x[:50] -= 1e6  # of which none counts, though all come first
    mask = rng.random(x.shape) < 0.01
    mask[:50] = False
    _, mean, m2, _, _ = expected(x, 1, mask)
    got = bnfast.moments(x, where=mask)
    np.testing.assert_allclose(got.m2, m2.astype(float), rtol=STATISTICS_OF_ANY_DATA[0])
    np.testing.assert_allclose(got.mean, mean.astype(float), rtol=1e-12)


@pytest.mark.parametrize("shape", [(2000, 3), (40, 5, 300), (3, 2, 40000)], ids=str)
@pytest.mark.parametrize("code", "fdBh")
def test_the_same_bits_with_any_threads_instructions_and_strides(
    use_isa, use_threads, rng, code, shape
):
    x, mask = data(rng, code, shape), rng.random(shape) < 0.7
    every_other = np.empty((*shape[:-1], 2 * shape[-1]), x.dtype)[..., ::2]
    every_other[...] = x
    results = []
    for isa in bnfast.available_isas():
        use_isa(isa)
        for threads in (1, 3):
            use_threads(threads)
            for array in (x, every_other):
                results.append(
                    [
                        bnfast.summary(array),
                        bnfast.summary(array, where=mask),
                        bnfast.moments(array, None),
                    ]
                )
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("code", "?bBhH")
def test_sums_of_small_integers_are_exact(isa, rng, code):
    limits = (0, 1) if code == "?" else (np.iinfo(code).min, np.iinfo(code).max)
    x = np.full((300_000, 3), limits[1], code)  # the largest squares
    x[:, 1] = rng.choice(limits, len(x))
    x[::7, 2] = limits[0]
    got = bnfast.moments(x)
    for channel, (mean, m2) in enumerate(zip(got.mean, got.m2, strict=True)):
        column = x[:, channel].astype(object)
        total, squares = int(column.sum()), int((column**2).sum())
        assert mean == total / len(x)
        assert m2 == (len(x) * squares - total**2) / len(x)


def test_sums_of_integers_beyond_what_float64_holds_stay_exact():
    x = np.broadcast_to(np.array([65535, 1], np.uint16), (2**22, 2))
    one = bnfast.moments(x)
    assert one.m2.tolist() == [0.0, 0.0]
    apart = one + bnfast.moments(np.array([[65534, 0]], np.uint16))
    n = 2**22
    assert apart.mean[0] == (n * 65535 + 65534) / (n + 1)
    assert apart.m2.tolist() == [n / (n + 1)] * 2  # by float64 sums it would be far off
    for value in (one, apart):
        assert bnfast.Moments.from_bytes(value.to_bytes()) == value


@pytest.mark.parametrize("size", [6, 2**22])  # the sums of the larger one leave float64
def test_one_value_of_integers_is_merged(size):
    x = np.broadcast_to(np.array([65535, 65534], np.uint16), (size, 2))
    for kind in (bnfast.moments, bnfast.summary):
        assert kind(x, None) + kind(x[:5], None) == kind(np.concatenate([x, x[:5]]), None)


def test_nonfinite_values_are_counted_and_left_out_on_request(isa, dtype, rng):
    x = rng.normal(size=(500, 6, 7)).astype(dtype)
    x[3, 1, 0] = x[7, 1, 3] = np.nan
    x[8, 2, 2], x[9, 2, 2], x[9, 3, 1] = np.inf, -np.inf, np.inf
    x[:, 5] = np.nan
    everything = bnfast.summary(x)
    np.testing.assert_array_equal(everything.nonfinite, [0, 2, 2, 1, 0, 3500])
    np.testing.assert_array_equal(
        np.isfinite(everything.mean), [True, False, False, False, True, False]
    )
    assert everything.mean[3] == np.inf
    np.testing.assert_array_equal(everything.minimum[:3], [*np.nanmin(x[:, :2], (0, 2)), -np.inf])
    assert everything.maximum[3] == np.inf
    assert np.isnan(everything.minimum[5])
    assert everything.mean[0] == bnfast.moments(x).mean[0]
    finite = bnfast.summary(x, finite=True)
    np.testing.assert_array_equal(finite.count, [3500, 3498, 3498, 3499, 3500, 0])
    np.testing.assert_array_equal(finite.nonfinite, everything.nonfinite)
    some = np.isfinite(x)
    _, mean, m2, least, greatest = expected(np.where(some, x, 0), 1, some)
    close = STATISTICS_OF_ANY_DATA[0] if dtype == np.float32 else CLOSE_F64
    np.testing.assert_allclose(finite.mean, mean.astype(float), atol=close)
    np.testing.assert_allclose(finite.m2, m2.astype(float), rtol=close)
    np.testing.assert_array_equal(finite.minimum[:5], least[:5])
    np.testing.assert_array_equal(finite.maximum[:5], greatest[:5])
    few = rng.random(x.shape) < 0.3
    both = bnfast.summary(x, where=few, finite=True)
    np.testing.assert_array_equal(both.count, (few & some).sum((0, 2)))
    np.testing.assert_array_equal(both.nonfinite, (few & ~some).sum((0, 2)))


def test_finite_changes_nothing_where_all_values_are(dtype, rng):
    x = rng.normal(size=(70, 5)).astype(dtype)
    assert bnfast.summary(x, finite=True) == bnfast.summary(x)


def test_constant_channels_have_no_variance_whatever_is_masked(isa, dtype, rng):
    x = np.full((3000, 4), 0.1, dtype)
    got = bnfast.moments(x, where=rng.random(x.shape) < 0.5)
    np.testing.assert_array_equal(got.m2, np.zeros(4))
    np.testing.assert_array_equal(got.mean, x[0].astype(np.float64))


def test_one_value_of_the_whole_array_is_a_number(rng):
    x = rng.normal(size=(3, 4, 5))
    whole = bnfast.summary(x, None)
    for value in (whole.mean, whole.m2, whole.var, whole.std, whole.minimum, whole.maximum):
        assert isinstance(value, np.float64)
    assert whole.std == pytest.approx(x.std())
    assert bnfast.moments(np.float64(3.0), None) == bnfast.Moments(1, 3.0, 0.0)
    assert bnfast.moments([1.0, 2.0], 0) == bnfast.Moments(1, [1.0, 2.0], [0.0, 0.0])


def test_axes_that_are_kept_keep_their_order(rng):
    x = rng.normal(size=(3, 4, 5))
    for axis in [(0, 2), (2, 0), (-1, -3), [0, 2]]:
        np.testing.assert_allclose(bnfast.moments(x, axis).mean, x.mean(1))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("code", "fdBi")
def test_no_values_have_moments_of_zero_and_no_extremes(shape, code):
    x = np.empty(shape, code)
    for axis in (0, -1, None):
        for got in (bnfast.moments(x, axis), bnfast.summary(x, axis)):
            assert got.count == 0
            assert not np.any(got.mean) and not np.any(got.m2)
        assert np.isnan(got.minimum).all() and np.isnan(got.maximum).all()
        assert bnfast.moments(x, axis, where=np.zeros(shape, bool)).count == 0


def test_memory_stays_small_for_large_integer_arrays(rng):
    x = rng.integers(0, 255, (1000, 1000, 8), dtype=np.uint8)
    tracemalloc.start()
    bnfast.moments(x, -1)
    bnfast.summary(x, None, where=np.ones(8, bool))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@st.composite
def parts(draw):
    """An array, its cuts, and the order of its parts."""
    code = draw(st.sampled_from("bhBHdf"))
    rows, channels = draw(st.integers(1, 60)), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    ratio = draw(st.sampled_from([0.0, 1.0, 1e3, 1e7]))
    if code in "fd":
        x = (ratio + rng.normal(size=(rows, channels))).astype(code)
    else:
        x = data(rng, code, (rows, channels))
    mask = rng.random(x.shape) < draw(st.sampled_from([0.2, 1.0]))
    cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=5)))
    order = draw(st.permutations(range(len(cuts) + 1)))
    return x, mask, cuts, order


@given(parts())
@settings(deadline=None, max_examples=150)
def test_any_split_in_any_order_gives_the_same_statistics(case):
    x, mask, cuts, order = case
    whole = bnfast.summary(x, where=mask)
    pieces = list(zip(np.split(x, cuts), np.split(mask, cuts), strict=True))
    merged = sum(bnfast.summary(pieces[i][0], where=pieces[i][1]) for i in order)
    if x.dtype.kind in "iu":
        assert merged == whole
        return
    np.testing.assert_array_equal(
        np.broadcast_to(merged.count, (x.shape[1],)), np.broadcast_to(whole.count, (x.shape[1],))
    )
    np.testing.assert_array_equal(merged.minimum, whole.minimum)
    np.testing.assert_array_equal(merged.maximum, whole.maximum)
    close = 1e-12 if x.dtype == np.float64 else 2 * STATISTICS_OF_ANY_DATA[1]
    _, mean, m2, _, _ = expected(x, 1, mask)
    for got in (merged, whole):
        allowed = np.spacing(np.abs(mean.astype(float))) + close * whole.std
        assert (np.abs(got.mean - mean) <= allowed).all()
        np.testing.assert_allclose(got.m2, m2.astype(float), rtol=close)


def refuse(error, message, *arguments, **keywords):
    for function in (bnfast.moments, bnfast.summary):
        with pytest.raises(error, match=message):
            function(*arguments, **keywords)


def test_what_is_refused():
    x = np.ones((4, 3))
    refuse(ValueError, r"axis must be from -2 to 1 for x of shape \(4, 3\), got 2", x, 2)
    refuse(ValueError, r"axis must not name an axis twice, got \(1, -1\)", x, (1, -1))
    refuse(TypeError, "axis must be an integer", x, 1.5)
    refuse(ValueError, "axis must be None for x of shape", np.float32(3), 0)
    refuse(ValueError, r"of shape \(3,\), got 1; axis=None keeps none", np.ones(3))
    refuse(TypeError, "where must be a boolean array, got", x, where=np.ones((4, 3)))
    refuse(
        ValueError,
        r"where must broadcast to x, of shape \(4, 3\), got shape \(4,\)",
        x,
        where=np.ones(4, bool),
    )
    integers_only = (
        "x must be float16, bfloat16, float32, float64, integers or booleans in native byte order, "
        "got "
    )
    refuse(TypeError, integers_only + r".*complex128", x + 1j)
    refuse(TypeError, integers_only + r".*; numpy\.asarray\(x, numpy\.float16\)", x.astype(">f2"))
    refuse(TypeError, integers_only + r".*; numpy\.asarray\(x, numpy\.int16\)", x.astype(">i2"))
    refuse(TypeError, integers_only, x.astype(object))
    refuse(TypeError, "x must be a floating-point, integer or boolean array, got None", None)
    refuse(TypeError, "an array without a mask", np.ma.masked_array(x))
    with pytest.raises(TypeError, match="finite must be True or False"):
        bnfast.summary(x, finite="no")
