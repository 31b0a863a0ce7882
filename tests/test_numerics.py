"""Exactness: large means, constant channels, specials, denormals, extreme ranges."""

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from cases import SMALL_CHANNELS_LAST, SMALL_CONTIGUOUS, batches, small_batches
from oracle import WIDE, along, check_moments, other_axes
from tolerances import CLOSE_F32, MOMENTS, PROMISED_OUTPUT_ERROR, ROUNDED_F32, eps_of

RATIOS = [0.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("shape", [(16, 8, 56, 56), (64, 32, 7, 7), (4096, 16), (50, 70, 3)])
def test_output_error_is_at_most_1e_6_whatever_the_mean(isa, rng, axis, shape, ratio):
    x = rng.normal(ratio, 1.0, shape).astype(np.float32)
    y, _, _ = bnfast.batch_norm_forward(x, axis=axis)
    expected, _, _ = reference.batch_norm_forward(x, axis=axis, precision=WIDE)
    assert np.abs(y - expected).max() <= PROMISED_OUTPUT_ERROR


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_float32_statistics_are_as_good_as_a_float64_two_pass(isa, rng, axis, ratio, scale):
    x = (scale * rng.normal(ratio, 1.0, (9, 13, 31, 13))).astype(np.float32)
    check_moments(x, axis)


@pytest.mark.parametrize("ratio", RATIOS)
def test_float64_is_as_exact_for_its_precision(isa, rng, axis, ratio):
    offset = 1e3 * ratio
    x = offset + rng.normal(0.0, 1.0, (9, 13, 31, 13))
    shifted = x - offset  # exact, and easier for the reference than x is
    _, mean, m2 = reference.moments(shifted, axis, WIDE)
    got = bnfast.moments(x, axis)
    np.testing.assert_allclose(got.m2, m2.astype(np.float64), rtol=1e-14)
    np.testing.assert_allclose(got.mean, (mean + offset).astype(np.float64), rtol=2e-16, atol=1e-15)
    y, _, _ = bnfast.batch_norm_forward(x, axis=axis)
    expected, _, _ = reference.batch_norm_forward(shifted, axis=axis, precision=WIDE)
    assert np.abs(y - expected).max() <= 1e-14


@pytest.mark.parametrize("case", ["outlier first", "outliers", "drift", "alternating", "steps"])
def test_the_running_shift_is_safe_for_any_order_of_values(isa, rng, axis, case):
    values = rng.normal(0, 1, (60, 4096)).astype(np.float32)
    if case == "outlier first":
        values[0, 0] = 1e7
    elif case == "outliers":
        values[:, 0] = 1e4  # where every chunk begins
    elif case == "drift":
        values += np.linspace(-1e4, 1e4, values.size, dtype=np.float32).reshape(values.shape)
    elif case == "alternating":
        values += np.where(np.arange(60) % 2, 1e6, -1e6).astype(np.float32)[:, None]
    else:
        values += (np.arange(60, dtype=np.float32) ** 3)[:, None]
    shape = (60, 1, 4096)
    x = values.reshape(shape)
    if axis == -1:
        x = np.repeat(values.reshape(-1, 1), 3, axis=1)
    count, mean, m2 = reference.moments(x, axis, WIDE)
    got = bnfast.moments(x, axis)
    # A lane that holds the outlier's square rounds each of its 15 other additions.
    ulps = 2 * MOMENTS if "outlier" in case else MOMENTS
    np.testing.assert_allclose(got.m2, m2.astype(np.float64), rtol=ulps * eps_of(np.float32))
    error = np.abs(got.mean - mean.astype(np.float64)).max()
    assert error <= MOMENTS * eps_of(np.float32) * float(np.sqrt(m2.max() / count))


@pytest.mark.parametrize("value", [1.7, 2.2, 3.1])
def test_an_outlier_costs_the_other_values_of_its_lane_little(isa, value):
    x = np.zeros((1, 1, 1024), np.float32)
    x[0, 0, 64::64] = value
    x[0, 0, 0] = 100
    _, _, m2 = reference.moments(x, 1, WIDE)
    np.testing.assert_allclose(bnfast.moments(x).m2, m2.astype(np.float64), rtol=ROUNDED_F32)


@pytest.mark.parametrize(("shape", "axis"), batches(), ids=str)
def test_a_constant_channel_gives_exactly_the_bias(isa, dtype, rng, shape, axis):
    weight, bias = rng.normal(size=(2, shape[axis])).astype(dtype)
    for value in (0.0, 1.0, -0.1, 1e-3, 12345.678, 3e7, 1e-30, 1e-40, 1e30):
        x = np.full(shape, value, dtype)
        y, mean, _ = bnfast.batch_norm_forward(x, weight, bias, axis=axis)
        assert (mean == dtype.type(value)).all(), value
        assert (y == along(bias, x, axis)).all(), value
        assert (bnfast.moments(x, axis).m2 == 0).all(), value


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("shape", "axis"), [case for case in small_batches() if case[0][case[1]] > 1], ids=str
)
def test_specials_stay_in_their_channel(isa, dtype, rng, shape, axis, special):
    x = rng.normal(3, 2, shape).astype(dtype)
    dy = rng.normal(size=shape).astype(dtype)
    channels = shape[axis]
    clean = bnfast.batch_norm_forward(x, axis=axis)
    clean_gradient = bnfast.batch_norm_backward(dy, x, *clean[1:], axis=axis)
    for channel in {0, channels // 2, channels - 1}:
        spoiled = x.copy()
        view = np.moveaxis(spoiled, axis, 0)[channel].copy()
        view.reshape(-1)[: view.size // 2 : 3] = special
        np.moveaxis(spoiled, axis, 0)[channel] = view
        got = bnfast.batch_norm_forward(spoiled, axis=axis)
        gradient = bnfast.batch_norm_backward(dy, spoiled, *got[1:], axis=axis)
        others = np.arange(channels) != channel
        for a, b in zip(got[1:] + gradient[1:], clean[1:] + clean_gradient[1:], strict=True):
            np.testing.assert_array_equal(a[others], b[others])
        for a, b in ((got[0], clean[0]), (gradient[0], clean_gradient[0])):
            np.testing.assert_array_equal(
                np.moveaxis(a, axis, 0)[others], np.moveaxis(b, axis, 0)[others]
            )
        assert np.isnan(np.moveaxis(got[0], axis, 0)[channel]).all()
        np.testing.assert_array_equal(got[1][channel], special)
        assert np.isnan(got[2][channel])


@pytest.mark.parametrize("axis", [1, -1])
def test_an_infinite_running_mean_is_subtracted(isa, dtype, rng, axis):
    x = rng.normal(size=(2, 3, 5, 3)).astype(dtype)
    mean = np.array([np.inf, -np.inf, 0])
    y = np.moveaxis(bnfast.batch_norm(x, mean, np.ones(3), axis=axis), axis, 0)
    np.testing.assert_array_equal(y[0], -np.inf)
    np.testing.assert_array_equal(y[1], np.inf)
    assert np.isfinite(y[2]).all()


def test_statistics_and_parameters_beyond_the_range_of_x(isa):
    x = np.ones((2, 2, 4), np.float32)
    mean, var, bias = np.array([1e39, 0]), np.array([1e78, 1]), np.array([0, 1e39])
    y = bnfast.batch_norm(x, mean, var, None, bias)
    np.testing.assert_allclose(y[:, 0], -1, rtol=1e-5)  # the scale has few bits
    np.testing.assert_array_equal(y[:, 1], np.inf)


@pytest.mark.parametrize("shape", [*SMALL_CONTIGUOUS, *SMALL_CHANNELS_LAST], ids=str)
def test_both_infinities_make_the_mean_nan(isa, dtype, rng, shape):
    x = rng.normal(3, 2, shape).astype(dtype)
    x[0], x[-1] = np.inf, -np.inf
    assert np.isnan(bnfast.moments(x).mean).all()


def test_an_infinity_in_one_chunk_only_is_the_mean_of_all(isa, dtype, rng):
    for where in (0, 5000, 300_000, 399_999):
        x = rng.normal(size=(1, 1, 400_000)).astype(dtype)
        x[0, 0, where] = np.inf
        assert bnfast.moments(x).mean[0] == np.inf
        rows = x.reshape(-1, 1).repeat(2, axis=1)
        np.testing.assert_array_equal(bnfast.moments(rows).mean, np.inf)


@pytest.mark.parametrize("magnitude", [1e-44, 1e-40, 1e-38, 1e-30, 1e-22, 1e15, 1e19, 1e25, 3e38])
@pytest.mark.parametrize("shape", [*SMALL_CONTIGUOUS, *SMALL_CHANNELS_LAST], ids=str)
def test_float32_moments_hold_over_the_whole_range(isa, rng, shape, magnitude):
    x = (rng.uniform(-1, 1, shape) * magnitude).astype(np.float32)
    check_moments(x)


def test_one_extreme_channel_among_ordinary_ones(isa, rng, axis):
    x = rng.normal(size=(40, 21, 21)).astype(np.float32)
    view = np.moveaxis(x, axis, 0)
    view[3] *= 1e30
    view[9] *= 1e-35
    view[11] = 0
    view[20] *= 1e-42
    check_moments(x, axis)


@pytest.mark.parametrize("channels", [7, 16, 27, 70, 130])
def test_channels_of_all_kinds_side_by_side(isa, rng, axis, channels):
    """Constant, tiny, once different and ordinary ones: each is what it is alone."""
    x, dy = rng.normal(0, 1, (2, 6, channels, 5, 5)).astype(np.float32)
    x[:, 0::4] = rng.normal(0, 1, (channels + 3) // 4)[:, None, None]
    x[:, 1::4] *= 1e-30
    x[:, 2::8] = 0
    x[-1, 2::8, -1, -1] = 1e-30
    dy[:, 1::3] = 0
    dy[-1, 4::9, -1, -1] = 3e-39
    weight = np.ones(channels)  # float64, and with it dweight
    y, mean, invstd = reference.batch_norm_forward(x, axis=1)
    _, dweight, dbias = reference.batch_norm_backward(dy, x, mean, invstd, axis=1)
    m2 = reference.moments(x, 1, WIDE)[2].astype(np.float64)

    x, dy = (np.ascontiguousarray(np.moveaxis(array, 1, axis)) for array in (x, dy))
    statistics = bnfast.moments(x, axis)
    gradients = bnfast.batch_norm_backward(dy, x, mean, invstd, weight, axis=axis)

    x, dy = (np.moveaxis(np.float64(array), axis, 1) for array in (x, dy))
    x_size, product_size, dy_size = (np.abs(a).sum((0, 2, 3)) for a in (x, dy * y, dy))
    assert (np.abs(statistics.mean - mean) <= 1e-5 * x_size).all()
    assert (np.abs(statistics.m2 - m2) <= 1e-5 * m2).all()
    assert (np.abs(gradients[1] - dweight) <= 1e-5 * product_size).all()
    assert (np.abs(gradients[2] - dbias) <= 1e-5 * dy_size).all()


def test_denormals_are_kept(isa, dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.full((2, 3, 5), tiny, dtype)
    zeros, ones = np.zeros(3, dtype), np.ones(3, dtype)
    y = bnfast.batch_norm(x, zeros, ones, eps=0.0)
    np.testing.assert_array_equal(y, tiny)


def test_a_denormal_variance_without_eps(isa):
    x = np.float32([[1e-22], [3e-22]])
    got = bnfast.moments(x)
    y = bnfast.batch_norm(x, got.mean, got.var, eps=0.0)
    np.testing.assert_allclose(y, [[-1], [1]], rtol=ROUNDED_F32)


def test_zero_variance_without_eps_divides_by_zero(isa, dtype):
    x = np.array([[0.0, -1.0, 1.0]], dtype)
    y = bnfast.batch_norm(x, np.zeros(3), np.zeros(3), eps=0.0)
    np.testing.assert_array_equal(y, [[np.nan, -np.inf, np.inf]])


def test_evaluation_gradient_does_not_read_x(isa, dtype, rng, axis):
    x = np.full((3, 5, 5), np.nan, dtype)
    dy = rng.normal(size=x.shape).astype(dtype)
    dx, _, dbias = bnfast.batch_norm_backward(
        dy, x, np.zeros(5), np.ones(5), axis=axis, training=False
    )
    np.testing.assert_array_equal(dx, dy)
    assert np.isfinite(dbias).all()


def test_sums_of_dy_beyond_float32_are_made_in_float64(isa, axis):
    x = np.full((40, 20, 20), 1, np.float32)
    x[::2] = 1.002  # deviations so small that the products stay within float32
    dy = np.full(x.shape, 2e38, np.float32)
    dy[:20] *= -1
    weight = np.full(20, 1e-3, np.float32)
    _, mean, invstd = bnfast.batch_norm_forward(x, axis=axis)
    dx, _, dbias = bnfast.batch_norm_backward(dy, x, mean, invstd, weight, axis=axis)
    assert np.isfinite(dx).all()
    np.testing.assert_array_equal(dbias, 0)


@pytest.mark.parametrize(("x_size", "dy_size"), [(1e-3, 1e-40), (1e-20, 1e-23), (1.0, 1e-38)])
def test_products_below_float32_are_summed_in_float64(isa, axis, rng, x_size, dy_size):
    x = (rng.normal(size=(40, 20, 20)) * x_size).astype(np.float32)
    dy = (rng.normal(size=x.shape) * dy_size).astype(np.float32)
    weight = np.ones(20)  # float64, and with it dweight
    _, mean, invstd = bnfast.batch_norm_forward(x, weight, eps=1e-60, axis=axis)
    _, dweight, _ = bnfast.batch_norm_backward(dy, x, mean, invstd, weight, axis=axis)
    expected = reference.batch_norm_backward(dy, x, mean, invstd, axis=axis)[1]
    np.testing.assert_allclose(dweight, expected, rtol=CLOSE_F32)


def test_a_dead_dy_has_no_gradient(isa, dtype, rng, axis):
    x = rng.normal(size=(40, 20, 20)).astype(dtype)
    dy = np.zeros_like(x)
    _, mean, invstd = bnfast.batch_norm_forward(x, axis=axis)
    for got in bnfast.batch_norm_backward(dy, x, mean, invstd, axis=axis):
        np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("eps", [1e-5, 1e-40, 1e-80, 1e-300])
def test_a_constant_channel_gives_the_bias_for_any_eps(isa, dtype, axis, eps):
    x = np.full((4, 5, 5), 0.1, dtype)
    bias = np.arange(5).astype(dtype)
    weight = np.full(5, -1e10, dtype)
    y, _, _ = bnfast.batch_norm_forward(x, weight, bias, eps, axis=axis)
    np.testing.assert_array_equal(y, np.broadcast_to(along(bias, x, axis), x.shape))


def test_products_beyond_float32_are_summed_in_float64(isa, axis, rng):
    x = rng.uniform(1e20, 2e20, (40, 20, 20)).astype(np.float32)
    dy = rng.uniform(1e20, 2e20, x.shape).astype(np.float32)
    _, mean, invstd = bnfast.batch_norm_forward(x, axis=axis)
    _, dweight, _ = bnfast.batch_norm_backward(dy, x, mean, invstd, np.ones(20), axis=axis)
    xhat = (x - along(mean, x, axis)) * along(invstd, x, axis)
    expected = (dy * xhat).sum(other_axes(x, axis))
    np.testing.assert_allclose(dweight, expected, rtol=CLOSE_F32)


def test_the_variance_of_a_few_rows_is_exact(isa):
    # Found by the search: around the mean of half of these rows the variance was 6.3e-7 off.
    different = [-273.92712, -249.82683, -273.92712, -267.3907, -2.6361847, -2.926987, -246.2393]
    different += [-249.82683, -273.3427]
    values = np.repeat(np.float32(different), [1, 2, 1, 2, 1, 1, 1, 1, 1])
    exact = float(np.var(values.astype(np.longdouble)))
    variance = bnfast.moments(np.repeat(values[:, None], 64, axis=1)).var
    np.testing.assert_allclose(variance, np.full(64, exact), rtol=5e-7)
