"""Running statistics: momentum, bias, dtypes, and what leaves them alone."""

import signal
import warnings

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from cases import in_larger_array
from tolerances import CLOSE_F64, ROUNDED_F32, RUNNING, eps_of


def statistics(channels, dtype):
    return np.linspace(-1, 1, channels).astype(dtype), np.linspace(1, 2, channels).astype(dtype)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0, 1.5, -0.1, -1.2])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("buffer_dtype", [np.float32, np.float64])
def test_the_update_is_the_formula(isa, dtype, rng, axis, momentum, unbiased, buffer_dtype):
    x = rng.normal(3, 2, (5, 6, 4)).astype(dtype)
    mean, var = statistics(x.shape[axis], buffer_dtype)
    expected = reference.update_running(mean, var, x, momentum, axis=axis, unbiased=unbiased)
    bnfast.batch_norm(x, mean, var, training=True, momentum=momentum, axis=axis, unbiased=unbiased)
    eps = RUNNING * max(eps_of(buffer_dtype), eps_of(dtype) if dtype == np.float32 else 0)
    np.testing.assert_allclose(mean, expected[0], rtol=eps, atol=eps * 10)
    np.testing.assert_allclose(var, expected[1], rtol=eps, atol=eps * 20)


def test_zero_momentum_leaves_them_alone(dtype, rng):
    mean, var = statistics(6, dtype)
    kept = mean.copy(), var.copy()
    bnfast.batch_norm(rng.normal(size=(5, 6)).astype(dtype), mean, var, training=True, momentum=0)
    np.testing.assert_array_equal(mean, kept[0])
    np.testing.assert_array_equal(var, kept[1])


def test_momentum_one_is_the_batch(rng):
    x = rng.normal(size=(50, 6))
    mean, var = statistics(6, np.float64)
    bnfast.batch_norm(x, mean, var, training=True, momentum=1.0)
    np.testing.assert_allclose(mean, x.mean(0), rtol=CLOSE_F64)
    np.testing.assert_allclose(var, x.var(0, ddof=1), rtol=CLOSE_F64)


@pytest.mark.parametrize("samples", [3, 33, 1025])
def test_the_average_of_equal_samples_is_exact(isa, rng, samples):
    # Equal values round alike: added one sample after the other, they were 100 ulps off.
    one = rng.normal(size=(1, 40, 2))
    (mean, var), (mean_of_one, var_of_one) = statistics(40, np.float64), statistics(40, np.float64)
    bnfast.instance_norm(np.repeat(one, samples, 0), mean, var, momentum=1.0)
    bnfast.instance_norm(one, mean_of_one, var_of_one, momentum=1.0)
    eps = RUNNING * eps_of(np.float64)
    np.testing.assert_allclose(mean, mean_of_one, rtol=eps)
    np.testing.assert_allclose(var, var_of_one, rtol=eps)


def test_evaluation_leaves_them_alone(dtype, rng, axis):
    mean, var = statistics(6, dtype)
    kept = mean.copy(), var.copy()
    bnfast.batch_norm(rng.normal(size=(5, 6, 6)).astype(dtype), mean, var, axis=axis)
    np.testing.assert_array_equal(mean, kept[0])
    np.testing.assert_array_equal(var, kept[1])


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 3), (4, 6, 0)])
def test_an_empty_batch_leaves_them_alone(dtype, shape):
    mean, var = statistics(6, dtype)
    kept = mean.copy(), var.copy()
    y = bnfast.batch_norm(np.empty(shape, dtype), mean, var, training=True, momentum=1.0)
    assert y.shape == shape
    np.testing.assert_array_equal(mean, kept[0])
    np.testing.assert_array_equal(var, kept[1])


def test_training_works_without_them(dtype, rng):
    x = rng.normal(size=(5, 6, 3)).astype(dtype)
    y = bnfast.batch_norm(x, None, None, training=True)
    np.testing.assert_array_equal(y, bnfast.batch_norm_forward(x)[0])


def test_two_values_a_channel_are_enough(dtype, rng):
    x = np.array([[1.0, 5.0], [3.0, 5.0]], dtype)
    mean, var = np.zeros(2, dtype), np.zeros(2, dtype)
    bnfast.batch_norm(x, mean, var, training=True, momentum=1.0)
    np.testing.assert_array_equal(mean, [2.0, 5.0])
    np.testing.assert_array_equal(var, [2.0, 0.0])


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_large_mean_does_not_spoil_the_running_variance(isa, rng, axis, offset):
    x = rng.normal(offset, 1, (20, 30, 30)).astype(np.float32)
    mean, var = np.zeros(30, np.float32), np.zeros(30, np.float32)
    bnfast.batch_norm(x, mean, var, training=True, momentum=1.0, axis=axis)
    axes = (0, 2) if axis == 1 else (0, 1)
    np.testing.assert_allclose(var, x.astype(np.float64).var(axes, ddof=1), rtol=ROUNDED_F32)


# What updates running statistics, a mean and another one.
MEMBERS = {
    "batch": lambda x, m, s, **k: bnfast.batch_norm(x, m, s, training=True, **k),
    "conditional": lambda x, m, s, **k: bnfast.conditional_batch_norm(
        x, None, None, m, s, training=True, **k
    ),
    "instance": bnfast.instance_norm,
    "ghost": lambda x, m, s, **k: bnfast.ghost_batch_norm(x, 3, m, s, training=True, **k),
    "renormalized": lambda x, m, s, **k: bnfast.batch_renorm(x, m, s, training=True, **k),
    "cross iteration": lambda x, m, s, **k: bnfast.cross_iteration_batch_norm(
        x, m, s, training=True, **k
    ),
    "whitening": lambda x, m, s, **k: bnfast.decorrelated_batch_norm(x, m, s, training=True, **k),
    "covariance": lambda x, m, s, **k: bnfast.iterative_norm(
        x, m, s, training=True, averaged="covariance", **k
    ),
}
SECOND = {"whitening": "running_matrix", "covariance": "running_matrix"}
SECOND["renormalized"] = "running_std"
CHANNELS = 9  # more than what is done at a time, and not a multiple of it


@pytest.fixture(params=MEMBERS)
def member(request):
    return request.param


def poisoned(member, dtype):
    """Statistics of which some are NaN, infinite or -0."""
    mean = np.ones(CHANNELS, dtype)
    shape = (1, CHANNELS, CHANNELS) if member in ("whitening", "covariance") else (CHANNELS,)
    second = np.ones(shape, dtype)
    for array in (mean, second):
        array.flat[:5] = np.nan, np.inf, -np.inf, -0.0, 5e-324
    return mean, second


@pytest.mark.parametrize("in_memory", [np.array, in_larger_array], ids=["plain", "with gaps"])
@pytest.mark.parametrize("value", [1.0, np.nan, np.inf])
def test_a_weight_of_0_leaves_every_bit(isa, member, dtype, rng, in_memory, value):
    x = rng.normal(size=(6, CHANNELS, 4)).astype(dtype)
    x[0, ::2] = value
    statistics = [in_memory(array) for array in poisoned(member, dtype)]
    kept = [array.tobytes() for array in statistics]
    MEMBERS[member](x, *statistics, momentum=0.0)
    assert [array.tobytes() for array in statistics] == kept


@pytest.mark.parametrize("in_memory", [np.array, in_larger_array], ids=["plain", "with gaps"])
def test_a_weight_of_1_forgets_what_they_were(isa, member, dtype, rng, in_memory):
    x = rng.normal(size=(6, CHANNELS, 4)).astype(dtype)
    statistics = [in_memory(array) for array in poisoned(member, dtype)]
    expected = [np.ones_like(array) for array in statistics]
    for arrays in (statistics, expected):
        MEMBERS[member](x, *arrays, momentum=1.0)
    for array, fresh in zip(statistics, expected, strict=True):
        assert np.isfinite(fresh).all()
        np.testing.assert_array_equal(array, fresh)


@pytest.mark.parametrize(
    "kind", ["batch", "conditional", "instance", "ghost", "renormalized", "cross iteration"]
)
def test_a_batch_that_is_not_finite_spoils_its_own_channels_only(kind, rng):
    x = rng.normal(size=(6, CHANNELS, 4))
    x[2, 0, 1], x[4, 1, 3] = np.nan, np.inf
    mean, second = np.ones(CHANNELS), np.ones(CHANNELS)
    MEMBERS[kind](x, mean, second, momentum=0.5)
    np.testing.assert_array_equal(mean[:2], [np.nan, np.inf])
    assert np.isnan(second[:2]).all()
    assert np.isfinite(mean[2:]).all() and np.isfinite(second[2:]).all()


LAYERS = {
    "batch": bnfast.BatchNorm,
    "conditional": lambda channels, **k: bnfast.ConditionalBatchNorm(channels, 2, **k),
    "instance": lambda channels, **k: bnfast.InstanceNorm(channels, track_running_stats=True, **k),
    "ghost": lambda channels, **k: bnfast.GhostBatchNorm(channels, 3, **k),
    "renormalized": bnfast.BatchRenorm,
    "cross iteration": lambda channels, **k: bnfast.CrossIterationBatchNorm((channels, 1), 1, **k),
    "moving average": lambda channels, **k: bnfast.MovingAverageBatchNorm(channels, 2, **k),
    "whitening": bnfast.DecorrelatedBatchNorm,
    "covariance": lambda channels, **k: bnfast.IterNorm(channels, averaged="covariance", **k),
}
AVERAGING = [name for name in LAYERS if name not in ("instance", "renormalized", "moving average")]


def call(layer, x, **more):
    labelled = isinstance(layer, bnfast.ConditionalBatchNorm)
    return layer(x, np.zeros(len(x), int), **more) if labelled else layer(x, **more)


def running_names(kind):
    second = SECOND.get(kind, "running_var")
    return (second,) if kind == "moving average" else ("running_mean", second)


@pytest.mark.parametrize(
    ("kind", "momentum"),
    [(name, 1.0) for name in LAYERS] + [(name, None) for name in AVERAGING],
)
def test_a_layer_recovers_from_statistics_that_are_not_finite(kind, momentum, dtype, rng):
    layer, fresh = (LAYERS[kind](CHANNELS, momentum=momentum, dtype=dtype) for _ in range(2))
    names = running_names(kind)
    for name, bad in zip(names, poisoned(kind, dtype)[-len(names) :], strict=True):
        getattr(layer, name)[...] = bad
    for _ in range(2):
        x = rng.normal(size=(6, CHANNELS, 4)).astype(dtype)
        call(layer, x)
        call(fresh, x)
        np.testing.assert_equal(layer.state_dict(), fresh.state_dict())
    x = rng.normal(size=(6, CHANNELS, 4)).astype(dtype)
    np.testing.assert_array_equal(call(layer.eval(), x), call(fresh.eval(), x))


@pytest.mark.parametrize("kind", AVERAGING)
def test_momentum_none_is_the_plain_average_of_all_batches(kind, rng):
    # Batches of one part, so that ghosts are batches, whose means and variances differ.
    batches = [rng.normal(k, k + 1, (3, CHANNELS, 4)) for k in range(5)]
    layer = LAYERS[kind](CHANNELS, momentum=None, dtype=np.float64)
    single = [LAYERS[kind](CHANNELS, momentum=1.0, dtype=np.float64) for _ in batches]
    for x, alone in zip(batches, single, strict=True):
        call(layer, x)
        call(alone, x)
    for name in ("running_mean", SECOND.get(kind, "running_var")):
        average = np.mean([getattr(alone, name) for alone in single], 0)
        np.testing.assert_allclose(
            getattr(layer, name), average, rtol=CLOSE_F64, atol=CLOSE_F64 * np.abs(average).max()
        )
    assert layer.num_batches_tracked == 5


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize(("unbiased", "variance"), [(True, 28), (False, 56 / 3)])
def test_momentum_is_the_weight_of_the_new_batch(momentum, unbiased, variance):
    x, mean, var = np.array([[0.0], [2.0], [10.0]]), np.array([1.0]), np.array([2.0])
    y = bnfast.batch_norm(x, mean, var, training=True, momentum=momentum, unbiased=unbiased)
    np.testing.assert_allclose(mean, (1 - momentum) * 1 + momentum * 4, rtol=CLOSE_F64)
    np.testing.assert_allclose(var, (1 - momentum) * 2 + momentum * variance, rtol=CLOSE_F64)
    expected = np.array([-4, -2, 6]) / np.sqrt(56 / 3 + 1e-5)  # whatever the momentum
    np.testing.assert_allclose(y[:, 0], expected, rtol=CLOSE_F64)


def test_a_negative_running_variance_is_nan_in_its_channel_only(isa, dtype, axis):
    x = np.arange(24, dtype=dtype).reshape(4, 2, 3) if axis == 1 else np.ones((4, 3, 2), dtype)
    mean, var = np.zeros(2, dtype), np.array([-1, 1], dtype)
    y = np.moveaxis(bnfast.batch_norm(x, mean, var, axis=axis), axis, 0)
    assert np.isnan(y[0]).all()
    expected = np.moveaxis(x, axis, 0)[1] / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(y[1], expected, rtol=ROUNDED_F32)


@pytest.mark.parametrize("shape", [(0, CHANNELS, 3), (4, CHANNELS, 0)])
def test_an_empty_batch_leaves_every_member_alone(member, dtype, shape):
    statistics = poisoned(member, dtype)
    kept = [array.tobytes() for array in statistics]
    assert MEMBERS[member](np.empty(shape, dtype), *statistics, momentum=1.0).shape == shape
    assert [array.tobytes() for array in statistics] == kept
    layer = LAYERS[member](CHANNELS, momentum=1.0, dtype=dtype)
    before = layer.state_dict()
    call(layer, np.empty(shape, dtype))
    np.testing.assert_equal(layer.state_dict(), before)


# The size and dtype of data, and which of its statistics float32 does not hold: squares, or all.
WIDE_DATA = (1e25, np.float32)
WIDER_DATA = (1e50, np.float64)
TOO_LARGE = {
    **dict.fromkeys(
        ("batch", "conditional", "instance", "ghost", "cross iteration"),
        (*WIDE_DATA, "running_var"),
    ),
    "renormalized": (*WIDER_DATA, "running_mean|running_std"),
    "covariance": (*WIDE_DATA, "running_matrix"),
}


@pytest.mark.parametrize("layer", [False, True], ids=["function", "layer"])
@pytest.mark.parametrize("kind", TOO_LARGE)
def test_a_statistic_too_large_for_float32_is_warned_about(isa, kind, rng, layer):
    size, dtype, name = TOO_LARGE[kind]
    x = (size * rng.normal(size=(6, CHANNELS, 4))).astype(dtype)
    made = LAYERS[kind](CHANNELS, momentum=0.5)
    second = getattr(made, SECOND.get(kind, "running_var"))

    def train():
        if layer:
            call(made, x)
        else:
            MEMBERS[kind](x, made.running_mean, second, momentum=0.5)

    with pytest.warns(RuntimeWarning, match=f"({name}) is infinite from now on.*float64") as caught:
        train()
    assert {warning.filename for warning in caught} == {__file__}
    assert len({str(warning.message) for warning in caught}) == len(name.split("|"))
    assert np.isinf(second).any()
    call(made, x)  # it is infinite already: the filter turns another warning into an error


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_float64_statistics_hold_what_float32_does_not(kind, rng):
    size, dtype, _ = TOO_LARGE[kind]
    x = (size * rng.normal(size=(6, CHANNELS, 4))).astype(dtype)
    layer = LAYERS[kind](CHANNELS, momentum=1.0, dtype=np.float64)
    call(layer, x)
    assert np.isfinite(getattr(layer, SECOND.get(kind, "running_var"))).all()
    y = call(layer.eval(), x)
    assert 0.5 < y.std() < 1.5


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_was_not_finite_before_is_not_warned_about(member, dtype, rng, value):
    x = rng.normal(size=(6, CHANNELS, 4)).astype(dtype)
    statistics = poisoned(member, dtype)
    MEMBERS[member](x, *statistics, momentum=0.5)
    x[1] = value
    MEMBERS[member](x, *(np.ones_like(array) for array in statistics), momentum=0.5)


def test_a_warning_comes_once_from_each_line(rng):
    x = (1e20 * rng.normal(size=(8, 3))).astype(np.float32)
    layer = bnfast.BatchNorm(3, momentum=1.0)  # so that every batch is one that is too large
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            layer.running_var[...] = 1
            layer(x)
    assert len(caught) == 1


def test_ghosts_leave_the_statistics_that_batches_leave(isa, dtype, rng, axis):
    x = rng.normal(3, 2, (7, 5, 5)).astype(dtype)
    alone, ghosts = statistics(5, dtype), statistics(5, dtype)
    for start in (0, 3, 6):
        bnfast.batch_norm(x[start : start + 3], *alone, training=True, axis=axis)
    bnfast.ghost_batch_norm(x, 3, *ghosts, training=True, axis=axis)
    np.testing.assert_array_equal(ghosts, alone)


@pytest.fixture
def interrupted():
    """Run a function until a signal has raised in it so many times."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("no signals of timers on this system")

    class Interrupt(Exception):
        pass

    armed = []

    def handler(*_):
        if armed:
            armed.clear()
            raise Interrupt

    def until(times, function, check):
        rng, raised = np.random.default_rng(0), 0
        while raised < times:
            try:
                armed.append(True)
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-6, 1e-4))
                for _ in range(50):
                    function()
                armed.clear()
            except Interrupt:
                raised += 1
            check()

    before = signal.signal(signal.SIGALRM, handler)
    yield until
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")
@pytest.mark.parametrize("step", [1, 2], ids=["contiguous", "strided"])
@pytest.mark.parametrize("member", ["batch", "ghost", "renormalized", "whitened"])
def test_an_exception_from_a_signal_handler_leaves_both_running_statistics_updated_or_none(
    interrupted, member, step
):
    x = np.arange(24, dtype=np.float64).reshape(6, 4)
    mean, spread = np.zeros(4 * step)[::step], np.ones(4 * step)[::step]
    matrix = np.tile(np.eye(2), (2 * step, 1, 1))[::step]
    calls = {
        "batch": lambda: bnfast.batch_norm(x, mean, spread, training=True),
        "ghost": lambda: bnfast.ghost_batch_norm(x, 6, mean, spread, training=True),
        "renormalized": lambda: bnfast.batch_renorm(x, mean, spread, training=True, momentum=0.1),
        "whitened": lambda: bnfast.iterative_norm(x, mean, matrix, training=True, num_groups=2),
    }
    second = matrix if member == "whitened" else spread
    steps = [(mean.tolist(), second.tolist())]
    for _ in range(400):  # a statistic that no longer moves is one that both have reached
        calls[member]()
        steps.append((mean.tolist(), second.tolist()))
    mean[...], second[...] = steps[0]
    interrupted(100, calls[member], lambda: both_are_of_one_step(mean, second, steps))


def both_are_of_one_step(mean, second, steps):
    assert (mean.tolist(), second.tolist()) in steps
    mean[...], second[...] = steps[0]
