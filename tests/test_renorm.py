"""Batch renormalization: values, gradients, limits and their schedule, the layer."""

import numpy as np
import pytest

import bnfast
from bnfast import BatchRenorm, RenormSchedule
from cases import in_layout
from oracle import central_differences
from tolerances import CLOSE_F64, FINITE_DIFFERENCES, OUTPUT, ROUNDED_F32, eps_of


def inputs(rng, shape, axis, dtype, mean=3):
    x = in_layout(rng.normal(mean, 2, shape).astype(dtype), axis)
    dy = in_layout(rng.normal(size=shape).astype(dtype), axis)
    weight, bias = rng.normal(size=(2, shape[1])).astype(dtype)
    return x, dy, weight, bias


def definition(x, mean, std, gamma, beta, r_max, d_max, axis, eps=1e-5, frozen=None):
    """The paper's, in the precision of x; r and d may be given."""
    others = tuple(d for d in range(x.ndim) if d != axis % x.ndim)

    def along(values):
        return np.expand_dims(values, others)

    mu = x.mean(others)
    sigma = np.sqrt(((x - along(mu)) ** 2).mean(others) + eps)
    r, d = frozen or (
        np.clip(sigma / std, 1 / r_max, r_max),
        np.clip((mu - mean) / std, -d_max, d_max),
    )
    y = along(gamma) * ((x - along(mu)) / along(sigma) * along(r) + along(d)) + along(beta)
    return y, mu, sigma, r, d


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.5, 0.5), (1e6, 1e6)])
def test_batch_renorm(isa, dtype, rng, axis, r_max, d_max):
    x, _, weight, bias = inputs(rng, (6, 3, 5, 4), axis, dtype)
    mean, std = rng.normal(size=3).astype(dtype), rng.uniform(0.5, 3, 3).astype(dtype)
    y, mu, sigma, _, _ = definition(
        *(a.astype(np.longdouble) for a in (x, mean, std, weight, bias)), r_max, d_max, axis
    )
    after = mean + 0.2 * (mu - mean), std + 0.2 * (sigma - std)
    got = bnfast.batch_renorm(
        *(x, mean, std, weight, bias, True, 0.2), r_max=r_max, d_max=d_max, axis=axis
    )
    tolerance = 4e-6 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(got, y.astype(np.float64), rtol=tolerance, atol=tolerance)
    for running, expected in zip((mean, std), after, strict=True):
        np.testing.assert_allclose(
            running, expected.astype(np.float64), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("ratio", [1e2, 1e6, 1e10])
def test_float64_batches_are_corrected_exactly_whatever_their_mean(isa, rng, axis, ratio):
    x = in_layout(rng.normal(ratio, 1, (50, 3, 12)), axis)
    first = np.moveaxis(x, axis, 1)[:1, :, :1]
    around_0 = x.astype(np.longdouble) - np.moveaxis(first, 1, axis)
    given = np.ones(3), np.full(3, 2.0), np.ones(3)  # std, weight, bias
    exact, _, sigma, _, _ = definition(around_0, np.zeros(3), *given, 1.0, 5.0, axis)
    running = first.flatten(), given[0].copy()
    y, _ = bnfast.batch_renorm_forward(x, *running, *given[1:], d_max=5.0, axis=axis)
    tolerance = OUTPUT * eps_of(np.float64) * np.abs(exact).max()
    np.testing.assert_allclose(y, exact.astype(np.float64), rtol=0, atol=tolerance)
    np.testing.assert_allclose(running[1], 1 + 0.01 * (sigma - 1), rtol=CLOSE_F64)


@pytest.mark.parametrize("size", [1e160, 1e300])
def test_batches_whose_squares_leave_the_range_are_corrected(rng, axis, size):
    x = in_layout(rng.normal(2, 1, (6, 3, 5)), axis)
    limits = {"r_max": 1.5, "d_max": 0.5}
    mean, std = np.ones(3), np.full(3, 2.0)
    expected, saved = bnfast.batch_renorm_forward(x, mean, std, eps=1e-300, **limits, axis=axis)
    large_mean, large_std = np.full(3, size), np.full(3, 2.0 * size)
    y, large = bnfast.batch_renorm_forward(x * size, large_mean, large_std, **limits, axis=axis)
    for got, wanted in (
        (y, expected),
        (large_mean / size, mean),
        (large_std / size, std),
        (large.mean / size, saved.mean),
        (large.invstd * size, saved.invstd),
        (large.r, saved.r),
        (large.d, saved.d),
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


def test_without_correction_batch_renorm_is_batch_norm(rng, axis):
    x, dy, weight, bias = inputs(rng, (6, 3, 5, 4), axis, np.float64)
    y, saved = bnfast.batch_renorm_forward(x, np.zeros(3), np.ones(3), weight, bias, axis=axis)
    expected = bnfast.batch_norm_forward(x, weight, bias, axis=axis)
    gradients = bnfast.batch_norm_backward(dy, x, *expected[1:], weight, axis=axis)
    got = bnfast.batch_renorm_backward(dy, x, saved, weight, axis=axis)
    for a, b in zip((y, *got), (expected[0], *gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_batch_renorm_evaluates_with_its_running_statistics(dtype, rng, axis):
    x, _, weight, bias = inputs(rng, (6, 3, 5, 4), axis, dtype)
    mean, std = rng.normal(size=3).astype(dtype), rng.uniform(0.5, 3, 3).astype(dtype)
    got = bnfast.batch_renorm(x, mean, std, weight, bias, axis=axis)
    shape = [1, -1, 1, 1] if axis == 1 else [-1]
    wide = (a.astype(np.longdouble).reshape(shape) for a in (mean, std, weight, bias))
    centre, spread, scale, shift = wide
    expected = (x - centre) / spread * scale + shift
    np.testing.assert_allclose(
        got, expected.astype(dtype), atol=OUTPUT * eps_of(dtype), rtol=4 * eps_of(dtype)
    )


@pytest.mark.parametrize("size", [1e-200, 1e-160, 1e160, 1e200, 1e300])
def test_batch_renorm_evaluates_at_the_ends_of_the_range(size):
    x, dy = np.array([[3.0], [1.0]]) * size, np.array([[1.0], [2.0]])
    mean, std = np.array([size]), np.array([2 * size])
    np.testing.assert_allclose(bnfast.batch_renorm(x, mean, std), [[1.0], [0.0]], rtol=1e-15)
    layer = bnfast.BatchRenorm(1, dtype=np.float64).eval()
    layer.running_mean, layer.running_std = mean, std
    np.testing.assert_allclose(layer(x), [[1.0], [0.0]], rtol=1e-15)
    np.testing.assert_allclose(layer.backward(dy), dy / std, rtol=1e-15)
    np.testing.assert_allclose(layer.weight_grad, [1.0], rtol=1e-15)


def test_gradients_of_batch_renorm_with_r_and_d_frozen(rng, axis):
    x, dy, weight, bias = inputs(rng, (3, 2, 2, 2), axis, np.float64, 0)
    mean, std = rng.normal(size=2), rng.uniform(0.5, 3, 2)
    before = mean.copy(), std.copy()
    _, saved = bnfast.batch_renorm_forward(
        x, mean, std, weight, bias, r_max=1.5, d_max=2, axis=axis
    )
    gradients = bnfast.batch_renorm_backward(dy, x, saved, weight, axis=axis)
    frozen = saved.r, saved.d

    def loss():
        y, *_ = definition(x, *before, weight, bias, 1.5, 2, axis, frozen=frozen)
        return (y * dy).sum()

    for array, gradient in zip((x, weight, bias), gradients, strict=True):
        numeric = central_differences(loss, array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


@pytest.mark.parametrize("buffer_dtype", [np.float32, np.float64])
def test_a_running_deviation_of_0_stands_for_its_limit(dtype, axis, buffer_dtype):
    # Above, below and around the running mean; and constant, at it: nothing divided by nothing.
    x = np.array([[1.0, -1.0, 2.0, 5.0], [5.0, -5.0, 8.0, 5.0]], dtype)
    x = in_layout(np.stack([x, x], 2), axis)
    mean, std = np.array([1, 1, 5, 5], buffer_dtype), np.zeros(4, buffer_dtype)
    y, saved = bnfast.batch_renorm_forward(
        x, mean, std, None, None, 0.0, 1e-300, r_max=3.0, d_max=5.0, axis=axis
    )
    np.testing.assert_array_equal(saved.r, 3)
    np.testing.assert_array_equal(saved.d, [5, -5, 0, 0])
    expected = np.array([[2.0, 8.0], [-2.0, -8.0], [-3.0, 3.0], [0.0, 0.0]])
    got = np.moveaxis(y, axis, 0).reshape(4, 2, 2)[..., 0]
    np.testing.assert_allclose(got, expected, rtol=ROUNDED_F32)
    gradients = bnfast.batch_renorm_backward(np.ones_like(x), x, saved, axis=axis)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("buffer_dtype", [np.float32, np.float64])
def test_a_channel_that_stays_constant_has_the_bias_in_training_and_evaluation(
    isa, dtype, axis, buffer_dtype
):
    x = in_layout(np.full((4, 3, 5), np.float32(0.1), dtype), axis)
    mean, std = np.zeros(3, np.float64), np.ones(3, buffer_dtype)
    bias = np.array([1, -2, 3], dtype)
    options = {"axis": axis, "eps": 1e-300, "momentum": 1.0, "r_max": 3.0, "d_max": 0.0}
    expected = np.broadcast_to(bias, (4, 5, 3))
    for training in (True, True, False):
        y = bnfast.batch_renorm(x, mean, std, None, bias, training, **options)
        np.testing.assert_array_equal(np.moveaxis(y, axis, -1), expected)
    np.testing.assert_array_equal(std, np.full(3, 1e-150, buffer_dtype))  # 0 of float32
    layer = bnfast.BatchRenorm(3, 1e-300, 1.0, axis=axis, dtype=buffer_dtype)
    layer.bias[...] = bias
    for training in (True, False):
        y = layer.train(training)(x)
        np.testing.assert_array_equal(np.moveaxis(y, axis, -1), expected)
        assert np.isfinite(layer.backward(np.ones_like(x))).all()


def test_without_correction_running_statistics_do_not_matter(rng, axis):
    x = in_layout(rng.normal(size=(6, 3, 5)), axis)
    expected, *_ = bnfast.batch_norm_forward(x, axis=axis)
    for mean, std in ((np.nan, 1), (0, np.nan), (np.inf, 0), (0, np.inf)):
        y, _ = bnfast.batch_renorm_forward(
            x, np.full(3, mean, float), np.full(3, std, float), axis=axis
        )
        np.testing.assert_allclose(y, expected, rtol=CLOSE_F64, atol=CLOSE_F64)


def test_the_schedule_is_the_papers():
    schedule = bnfast.RenormSchedule()
    assert schedule.at(0) == schedule.at(5000) == (1.0, 0.0)
    assert schedule.at(22500) == (2.0, 4.375)
    assert schedule.at(40000) == schedule.at(10**9) == (3.0, 5.0)
    assert bnfast.RenormSchedule(2.0, 1.0, 0, 10, 10).at(5) == (1.5, 0.5)


X = np.arange(12, dtype=np.float32).reshape(4, 3)


SAVED = bnfast.batch_renorm_forward(X, np.zeros(3), np.ones(3))[1]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: bnfast.batch_renorm_backward(X, X, (1, 2, 3, 4)),
            *(TypeError, "saved must be what batch_renorm_forward returned"),
        ),
        (
            lambda: bnfast.batch_renorm_backward(X, X, SAVED._replace(d=np.zeros(2))),
            *(ValueError, "d must have one value for each of the 3 channels"),
        ),
        (
            lambda: bnfast.batch_renorm(X, None, None, training=True),
            *(TypeError, "running_mean and running_std must be arrays"),
        ),
        (
            lambda: bnfast.batch_renorm(X, np.zeros(3), None, training=True),
            *(ValueError, "got None for running_std"),
        ),
        (
            lambda: bnfast.batch_renorm(X, np.zeros(3), np.ones(3), training=True, r_max=0.5),
            *(ValueError, "r_max must be at least 1"),
        ),
        (
            lambda: bnfast.batch_renorm(X, np.zeros(3), np.ones(2), training=True),
            *(ValueError, "running_std must have one value for each of the 3 channels"),
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def images(rng, dtype=np.float64, shape=(7, 3, 4, 5)):
    return rng.normal(3, 2, shape).astype(dtype)


def test_the_schedule_goes_on_with_the_batches_and_the_state(rng, axis):
    schedule = RenormSchedule(2.0, 1.0, 1, 3, 5)

    def new():
        return BatchRenorm(3, momentum=0.2, schedule=schedule, axis=axis, dtype=np.float64)

    layer, mean, std = new(), np.zeros(3), np.ones(3)
    for step in range(6):
        x = in_layout(images(rng), axis)
        r_max, d_max = schedule.at(step)
        expected = bnfast.batch_renorm(
            *(x, mean, std, None, None, True, 0.2), r_max=r_max, d_max=d_max, axis=axis
        )
        other = new()
        other.load_state_dict(layer.state_dict())
        for trained in (other, layer):
            np.testing.assert_array_equal(trained(x), expected)
            np.testing.assert_array_equal(trained.running_mean, mean)
            np.testing.assert_array_equal(trained.running_std, std)
            assert trained.num_batches_tracked == step + 1
    assert list(layer.state_dict()) == [
        *("weight", "bias", "running_mean", "running_std", "num_batches_tracked"),
    ]


def test_the_schedule_is_the_papers_where_none_is_given():
    assert BatchRenorm(3).schedule == RenormSchedule()


def test_a_schedule_without_time_to_grow_jumps():
    at_once = RenormSchedule(3.0, 5.0, 0, 0, 0)
    assert at_once.at(0) == at_once.at(9) == (3.0, 5.0)
    late = RenormSchedule(3.0, 5.0, 4, 2, 4)
    assert late.at(3) == (1.0, 0.0)
    assert late.at(4) == (3.0, 5.0)
