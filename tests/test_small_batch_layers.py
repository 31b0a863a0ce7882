"""Ghost batches and batch renormalization as layers: modes, statistics, gradients, state."""

import copy

import numpy as np
import pytest

import bnfast
from bnfast import BatchNorm, BatchRenorm, GhostBatchNorm, RenormSchedule
from oracle import central_differences
from tolerances import FINITE_DIFFERENCES, GRADIENT_SUMS, RUNNING, eps_of

# Limits that every batch of the tests goes beyond: r and d are then constants.
NARROW = RenormSchedule(1.1, 0.1, 0, 0, 0)

LAYERS = {
    "ghosts": lambda channels, **k: GhostBatchNorm(channels, 3, **k),
    "renormalized": lambda channels, **k: BatchRenorm(channels, schedule=NARROW, **k),
}


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


def images(rng, dtype=np.float64, shape=(7, 3, 4, 5)):
    return rng.normal(3, 2, shape).astype(dtype)


def in_layout(x, axis):
    return x if axis == 1 else np.ascontiguousarray(np.moveaxis(x, 1, -1))


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("unbiased", [True, False])
def test_ghosts_are_batches_one_after_the_other(dtype, rng, axis, momentum, unbiased):
    options = {"axis": axis, "unbiased": unbiased, "dtype": dtype}
    layer = GhostBatchNorm(3, 3, 1e-3, momentum, **options)
    alone = BatchNorm(3, 1e-3, momentum, **options)
    layer.weight[...] = alone.weight[...] = rng.normal(size=3)
    for _ in range(2):
        x, dy = (in_layout(images(rng, dtype), axis) for _ in range(2))
        sums, sizes = np.zeros((2, 3)), np.zeros((2, 3))
        y, dx = layer(x), layer.backward(dy)
        for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
            np.testing.assert_array_equal(y[part], alone(x[part]))
            np.testing.assert_array_equal(dx[part], alone.backward(dy[part]))
            gradients = np.array([alone.weight_grad, alone.bias_grad])
            sums += gradients
            sizes += np.abs(gradients)
        allowed = GRADIENT_SUMS * eps_of(dtype) * sizes
        assert (np.abs(np.array([layer.weight_grad, layer.bias_grad]) - sums) <= allowed).all()
    tolerance = RUNNING * eps_of(dtype)
    for name, array in alone.state_dict().items():
        np.testing.assert_allclose(layer.state_dict()[name], array, rtol=tolerance, err_msg=name)
    assert layer.num_batches_tracked == 6


def test_ghosts_without_running_statistics_are_ghosts_in_evaluation(rng, axis):
    layer = GhostBatchNorm(3, 3, track_running_stats=False, axis=axis, dtype=np.float64)
    x, dy = (in_layout(images(rng), axis) for _ in range(2))
    y, dx = layer(x), layer.backward(dy)
    np.testing.assert_array_equal(layer.eval()(x), y)
    np.testing.assert_array_equal(layer.backward(dy), dx)
    assert layer.num_batches_tracked is None


def test_evaluation_uses_the_running_statistics_and_leaves_them_alone(make, dtype, rng, axis):
    layer = make(3, axis=axis, dtype=dtype)
    layer.weight[...], layer.bias[...] = rng.normal(size=(2, 3))
    layer(in_layout(images(rng, dtype), axis))
    before = layer.state_dict()
    x, dy = (in_layout(images(rng, dtype), axis) for _ in range(2))
    if isinstance(layer, BatchRenorm):
        variance, eps = layer.running_std.astype(np.float64) ** 2, 0.0
    else:
        variance, eps = layer.running_var, layer.eps
    expected = bnfast.batch_norm(
        x, layer.running_mean, variance, layer.weight, layer.bias, eps=eps, axis=axis
    )
    np.testing.assert_array_equal(layer.eval()(x), expected)
    invstd = 1 / np.sqrt(variance.astype(np.float64) + eps)
    gradients = bnfast.batch_norm_backward(
        dy, x, layer.running_mean, invstd, layer.weight, axis=axis, training=False
    )
    got = layer.backward(dy), layer.weight_grad, layer.bias_grad
    for a, b in zip(got, gradients, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_equal(layer.state_dict(), before)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_through_the_layer(make, rng, axis, training):
    layer = make(2, axis=axis, dtype=np.float64)
    layer.weight[...], layer.bias[...] = rng.normal(size=(2, 2))
    layer.running_mean[...] = -7.0
    x, dy = (in_layout(images(rng, shape=(5, 2, 2, 2)), axis) for _ in range(2))
    dy /= 10  # the loss, and its rounding, are small
    layer.train(training)
    as_it_was = copy.deepcopy(layer)
    layer(x)
    gradients = layer.backward(dy), layer.weight_grad, layer.bias_grad

    def loss():
        other = copy.deepcopy(as_it_was)
        return (other(x) * dy).sum()

    arrays = x, as_it_was.weight, as_it_was.bias
    for array, gradient in zip(arrays, gradients, strict=True):
        numeric = central_differences(loss, array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


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


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_empty_batch_counts_for_nothing(make, training):
    layer = make(3).train(training)
    before = layer.state_dict()
    y = layer(np.empty((0, 3, 5), np.float32))
    assert y.shape == (0, 3, 5)
    np.testing.assert_equal(layer.state_dict(), before)
    assert layer.backward(y).shape == y.shape
    np.testing.assert_array_equal(layer.weight_grad, 0)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.ones((4, 3, 5), np.int64), TypeError, "x must be float32 or float64"),
        (np.ones((4, 2, 5), np.float32), ValueError, "x must have 3 channels"),
    ],
    ids=["dtype", "channels"],
)
def test_a_bad_batch_leaves_the_layer_as_it_was(make, rng, bad, error, message):
    layer = make(3)
    x = images(rng, np.float32)
    layer(x)
    before = layer.state_dict()
    with pytest.raises(error, match=message):
        layer(bad)
    with pytest.raises(ValueError, match="out must have the shape"):
        layer(x, out=x[:1])
    np.testing.assert_equal(layer.state_dict(), before)
    assert layer.backward(x).shape == x.shape


def test_in_place_leaves_nothing_to_go_back_from(make, rng):
    layer, other = make(3), make(3)
    for _ in range(2):
        x = images(rng, np.float32)
        expected = other(x)
        np.testing.assert_array_equal(layer(x, out=x), expected)
        with pytest.raises(RuntimeError, match="not in place"):
            layer.backward(x)
        layer.eval()
        other.eval()


def test_a_last_ghost_of_one_value_is_refused_before_anything_is_written(rng):
    layer = GhostBatchNorm(3, 2)
    before = layer.state_dict()
    out = np.full((5, 3), 7, np.float32)
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(images(rng, np.float32, (5, 3)), out=out)
    np.testing.assert_array_equal(out, 7)
    np.testing.assert_equal(layer.state_dict(), before)
