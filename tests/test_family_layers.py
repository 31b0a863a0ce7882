"""Layers of the family: they do what the functions do, and own what belongs to them."""

import copy
import pickle

import numpy as np
import pytest

import bnfast
from bnfast import (
    BatchRenorm,
    CrossIterationBatchNorm,
    ExponentialAverage,
    FilterResponseNorm,
    GhostBatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    MovingAverageBatchNorm,
    RenormSchedule,
    RMSNorm,
)
from cases import in_layout
from oracle import central_differences
from states import filled
from tolerances import FINITE_DIFFERENCES

SHAPE = (4, 6, 5, 3)
AVERAGE = ExponentialAverage(old=0.75, bias_corrected=True)


LAYERS = {
    "instance": lambda **k: InstanceNorm(6, affine=True, **k),
    "instance, tracked": lambda **k: InstanceNorm(6, 1e-3, 0.3, True, True, **k),
    "instance, averaged": lambda **k: InstanceNorm(6, 1e-3, AVERAGE, True, True, **k),
    "instance, plain": lambda **k: InstanceNorm(6, **k),
    "group": lambda **k: GroupNorm(3, 6, **k),
    "group, plain": lambda **k: GroupNorm(2, 6, 1e-3, False, **k),
    "layer": lambda **k: LayerNorm((5, 3), **k),
    "layer, of channels": lambda **k: LayerNorm(6, axis=1, **k),
    "layer, without bias": lambda **k: LayerNorm(3, bias=False, **k),
    "layer, plain": lambda **k: LayerNorm((6, 5, 3), elementwise_affine=False, **k),
    "response": lambda **k: FilterResponseNorm(6, **k),
    "response, learned eps": lambda **k: FilterResponseNorm(6, learned_eps=1e-4, **k),
    "response, plain": lambda **k: FilterResponseNorm(6, 1e-3, False, False, **k),
    "rms": lambda **k: RMSNorm((5, 3), **k),
    "rms, plain": lambda **k: RMSNorm(3, 1e-3, False, **k),
    "ghosts": lambda **k: GhostBatchNorm(6, 3, **k),
    "ghosts, averaged": lambda **k: GhostBatchNorm(6, 3, 1e-3, AVERAGE, nonfinite="skip", **k),
    "ghosts, plain": lambda **k: GhostBatchNorm(6, 2, 1e-3, None, False, False, **k),
    "renormalized": lambda **k: BatchRenorm(6, schedule=RenormSchedule(1.5, 0.5, 0, 0, 0), **k),
    "renormalized, averaged": lambda **k: BatchRenorm(6, 1e-3, AVERAGE, nonfinite="raise", **k),
    "renormalized, plain": lambda **k: BatchRenorm(6, 1e-3, 0.3, False, **k),
    "averaged": lambda **k: MovingAverageBatchNorm(6, 1, warm_up=0, **k),
    "averaged, warming up": lambda **k: MovingAverageBatchNorm(6, 4, 1e-3, 0.3, False, **k),
    "averaged, skipping": lambda **k: MovingAverageBatchNorm(
        6, 2, 1e-3, AVERAGE, nonfinite="skip", **k
    ),
    "cross iteration": lambda **k: CrossIterationBatchNorm((6, 2), 1, **k),
    "cross iteration, averaged": lambda **k: CrossIterationBatchNorm(
        (6, 2), 1, 1e-3, AVERAGE, nonfinite="raise", **k
    ),
    "cross iteration, plain": lambda **k: CrossIterationBatchNorm((6, 2), 1, 1e-3, 0.3, False, **k),
}


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


def test_reset_statistics_are_as_at_first(make, dtype, rng):
    layer = filled(make(dtype=dtype), rng)
    first, own = make(dtype=dtype).state_dict(), layer.state_dict()
    layer.reset_running_stats()
    for name, array in layer.state_dict().items():
        tracked = name.startswith(("running", "num", "window")) or name.endswith("buffer")
        np.testing.assert_array_equal(array, first[name] if tracked else own[name])


@pytest.mark.parametrize(
    "name", [name for name in LAYERS if name.startswith(("group", "layer", "response", "rms"))]
)
def test_layers_that_keep_nothing_compute_the_same_in_both_modes(name, rng):
    layer = filled(LAYERS[name](dtype=np.float64), rng)
    x, dy = rng.normal(3, 2, (2, *SHAPE))
    before = layer.state_dict()
    results = [(mode()(x), layer.backward(dy)) for mode in (layer.train, layer.eval)]
    np.testing.assert_array_equal(*results)
    assert set(before) <= {"weight", "bias", "tau", "learned_eps"}
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def function_of(layer, x, dy):
    """What the functions give: y, then dx, dweight and dbias."""
    weight, bias, eps = layer.weight, layer.bias, layer.eps
    if isinstance(layer, InstanceNorm):
        y, *saved = bnfast.instance_norm_forward(x, weight, bias, eps)
        return y, *bnfast.instance_norm_backward(dy, x, *saved, weight)
    if isinstance(layer, GroupNorm):
        y, *saved = bnfast.group_norm_forward(x, layer.num_groups, weight, bias, eps)
        return y, *bnfast.group_norm_backward(dy, x, *saved, weight)
    if isinstance(layer, FilterResponseNorm):
        more = {"learned_eps": layer.learned_eps}
        y, invrms = bnfast.filter_response_norm_forward(x, weight, bias, layer.tau, eps, **more)
        return y, *bnfast.filter_response_norm_backward(
            dy, x, invrms, weight, bias, layer.tau, **more
        )
    if isinstance(layer, GhostBatchNorm):
        y, *saved = bnfast.ghost_batch_norm_forward(x, layer.ghost_size, weight, bias, eps)
        return y, *bnfast.ghost_batch_norm_backward(dy, x, layer.ghost_size, *saved, weight)
    if isinstance(layer, MovingAverageBatchNorm):
        state = layer.running_var.copy(), layer.square_buffer.copy()
        y, saved = bnfast.moving_average_batch_norm_forward(
            x, *state, weight, bias, eps=eps, averaged=False, r_max=1.0
        )
        products = layer.gradient_buffer.copy()
        return y, *bnfast.moving_average_batch_norm_backward(dy, x, saved, products, weight)
    if isinstance(layer, CrossIterationBatchNorm):
        y, saved = bnfast.cross_iteration_batch_norm_forward(x, weight=weight, bias=bias, eps=eps)
        return y, *bnfast.cross_iteration_batch_norm_backward(dy, x, saved, weight)
    if isinstance(layer, BatchRenorm):
        running = layer.running_mean.copy(), layer.running_std.copy()
        r_max, d_max = layer.schedule.at(layer.num_batches_tracked)
        y, saved = bnfast.batch_renorm_forward(
            x, *running, weight, bias, eps=eps, r_max=r_max, d_max=d_max
        )
        return y, *bnfast.batch_renorm_backward(dy, x, saved, weight)
    rows = {"normalized_shape": layer.normalized_shape, "axis": layer.axis}
    if isinstance(layer, LayerNorm):
        y, mean, invstd = bnfast.layer_norm_forward(x, weight=weight, bias=bias, eps=eps, **rows)
        saved = {"mean": mean, "invstd": invstd, "weight": weight}
        return y, *bnfast.layer_norm_backward(dy, x, **saved, **rows)
    y, invrms = bnfast.rms_norm_forward(x, weight=weight, eps=eps, **rows)
    return y, *bnfast.rms_norm_backward(dy, x, invrms=invrms, weight=weight, **rows), None


def same_or_none(a, b):
    if a is not None:
        np.testing.assert_array_equal(a, b)


def test_layers_do_what_functions_do(make, dtype, rng):
    layer = filled(make(dtype=dtype), rng)
    x, dy = rng.normal(2, 3, (2, *SHAPE)).astype(dtype)
    y, dx, dweight, dbias, *more = function_of(layer, x, dy)
    np.testing.assert_array_equal(layer(x), y)
    np.testing.assert_array_equal(layer.backward(dy), dx)
    assert (layer.weight_grad is None) == (layer.weight is None)
    assert (layer.bias_grad is None) == (layer.bias is None)
    same_or_none(layer.weight_grad, dweight)
    same_or_none(layer.bias_grad, dbias)
    for gradient, name in zip(more, ("tau_grad", "learned_eps_grad"), strict=False):
        np.testing.assert_array_equal(getattr(layer, name), gradient)
    with pytest.raises(RuntimeError, match="the last one has had its backward"):
        layer.backward(dy)
    out = np.empty_like(x)
    assert layer(x, out=out) is out


def test_parameters_as_they_were_at_the_call_make_the_gradient(make, rng):
    layer, other = (filled(make(), np.random.default_rng(0)) for _ in range(2))
    x, dy = rng.normal(2, 3, (2, *SHAPE)).astype(np.float32)
    layer(x), other(x)
    if layer.weight is not None:
        layer.weight *= 2
    np.testing.assert_array_equal(layer.backward(dy), other.backward(dy))


def test_state_goes_from_layer_to_layer(make, rng):
    layer, other = filled(make(), rng), make()
    x = rng.normal(2, 3, SHAPE).astype(np.float32)
    other.load_state_dict(layer.state_dict())
    for copied in (other, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert list(copied.state_dict()) == list(layer.state_dict())
        np.testing.assert_array_equal(copied.eval()(x), layer.eval()(x))


def test_a_state_of_another_shape_is_refused():
    layer = LayerNorm((5, 3))
    with pytest.raises(ValueError, match=r"weight must have the shape \(5, 3\)"):
        layer.load_state_dict({"weight": np.ones(5), "bias": np.zeros((5, 3))})


def test_the_representation_says_how_to_make_it():
    assert repr(InstanceNorm(6)) == (
        "InstanceNorm(6, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False, "
        "axis=1, dtype=float32)"
    )
    assert repr(GroupNorm(2, 6)) == (
        "GroupNorm(2, num_channels=6, eps=1e-05, affine=True, axis=1, dtype=float32)"
    )
    assert repr(GhostBatchNorm(6, 4)) == (
        "GhostBatchNorm(6, ghost_size=4, eps=1e-05, momentum=0.1, affine=True, "
        "track_running_stats=True, axis=1, unbiased=True, dtype=float32)"
    )
    assert repr(BatchRenorm(6)) == (
        "BatchRenorm(6, eps=1e-05, momentum=0.01, affine=True, schedule=RenormSchedule(r_max=3.0, "
        "d_max=5.0, begin=5000, r_end=40000, d_end=25000), axis=1, dtype=float32)"
    )
    assert repr(MovingAverageBatchNorm(6)) == (
        "MovingAverageBatchNorm(6, buffer_size=16, eps=1e-05, momentum=0.02, affine=True, "
        "warm_up=100, renormalized_from=1000, r_max=5.0, axis=1, dtype=float32)"
    )
    assert repr(CrossIterationBatchNorm((6, 3, 3, 3), padding=1, stride=(2, 1))) == (
        "CrossIterationBatchNorm((6, 3, 3, 3), window=4, eps=1e-05, momentum=0.1, affine=True, "
        "burn_in=0, stride=(2, 1), padding=1, dilation=1, groups=1, axis=1, unbiased=True, "
        "dtype=float32)"
    )
    assert repr(LayerNorm(3)) == (
        "LayerNorm((3,), eps=1e-05, elementwise_affine=True, bias=True, axis=None, dtype=float32)"
    )
    assert repr(FilterResponseNorm(3, learned_eps=1e-4)) == (
        "FilterResponseNorm(3, eps=1e-06, affine=True, thresholded=True, learned_eps=0.0001, "
        "axis=1, dtype=float32)"
    )
    assert repr(RMSNorm(3)) == (
        "RMSNorm((3,), eps=None, elementwise_affine=True, axis=None, dtype=float32)"
    )


@pytest.mark.parametrize(
    ("make_bad", "error", "message"),
    [
        (lambda: GroupNorm(4, 6), ValueError, "num_groups must divide the 6 channels"),
        (lambda: GroupNorm(2, -6), ValueError, "num_channels must be at least 0"),
        (lambda: InstanceNorm(6.0), TypeError, "num_features must be an integer"),
        (lambda: InstanceNorm(6, axis=0)(np.ones(SHAPE)), ValueError, "6 channels along axis 0"),
        (lambda: InstanceNorm(4, axis=0)(np.ones(SHAPE)), ValueError, "axis must not be 0"),
        (lambda: FilterResponseNorm(6, eps=0.0), ValueError, "eps must be positive"),
        (lambda: FilterResponseNorm(4)(np.ones(SHAPE)), ValueError, "x must have 4 channels"),
        (lambda: LayerNorm(()), ValueError, "normalized_shape must have at least one size"),
        (lambda: LayerNorm((3, -1)), ValueError, "normalized_shape must have no negative size"),
        (lambda: LayerNorm(3, eps=None), TypeError, "eps must be a real number"),
        (lambda: RMSNorm(3, dtype=np.float16), TypeError, "dtype must be float32 or float64"),
        (lambda: LayerNorm(4)(np.ones((2, 3))), ValueError, "normalized_shape must be the sizes"),
        (lambda: GroupNorm(2, 4)(np.ones(SHAPE)), ValueError, "x must have 4 channels"),
        (lambda: GhostBatchNorm(6, 0), ValueError, "ghost_size must be at least 1"),
        (lambda: GhostBatchNorm(6, 2.0), TypeError, "ghost_size must be an integer"),
        (lambda: GhostBatchNorm(4, 2, axis=0)(np.ones(SHAPE)), ValueError, "axis must not be 0"),
        (lambda: GhostBatchNorm(4, 2)(np.ones(SHAPE)), ValueError, "x must have 4 channels"),
        (lambda: BatchRenorm(6, momentum=None), TypeError, "momentum must be a real number"),
        (
            lambda: BatchRenorm(6, schedule=(3, 5)),
            TypeError,
            "schedule must be an instance of RenormSchedule",
        ),
        (
            lambda: BatchRenorm(6, schedule=RenormSchedule(r_max=0.5)),
            *(ValueError, "r_max must be at least 1"),
        ),
        (lambda: BatchRenorm(4)(np.ones(SHAPE)), ValueError, "x must have 4 channels"),
    ],
)
def test_bad_arguments_are_refused(make_bad, error, message):
    with pytest.raises(error, match=message):
        make_bad()


# Limits that every batch of the tests goes beyond: r and d are then constants.
NARROW = RenormSchedule(1.1, 0.1, 0, 0, 0)


OF_SMALL_BATCHES = {
    "ghosts": lambda channels, **k: GhostBatchNorm(channels, 3, **k),
    "renormalized": lambda channels, **k: BatchRenorm(channels, schedule=NARROW, **k),
    "averaged": lambda channels, **k: MovingAverageBatchNorm(channels, 1, warm_up=0, **k),
    "cross iteration": lambda channels, **k: CrossIterationBatchNorm((channels, 4), 1, **k),
}


@pytest.fixture(params=OF_SMALL_BATCHES)
def make_of_small_batches(request):
    return OF_SMALL_BATCHES[request.param]


def images(rng, dtype=np.float64, shape=(7, 3, 4, 5)):
    return rng.normal(3, 2, shape).astype(dtype)


def test_evaluation_uses_the_running_statistics_and_leaves_them_alone(
    make_of_small_batches, dtype, rng, axis
):
    layer = make_of_small_batches(3, axis=axis, dtype=dtype)
    layer.weight[...], layer.bias[...] = rng.normal(size=(2, 3))
    layer(in_layout(images(rng, dtype), axis))
    before = layer.state_dict()
    x, dy = (in_layout(images(rng, dtype), axis) for _ in range(2))
    if isinstance(layer, BatchRenorm):
        variance, eps = layer.running_std.astype(np.float64) ** 2, 0.0
    else:
        variance, eps = layer.running_var, layer.eps
    mean = np.zeros(3, dtype) if layer.running_mean is None else layer.running_mean
    expected = bnfast.batch_norm(x, mean, variance, layer.weight, layer.bias, eps=eps, axis=axis)
    np.testing.assert_array_equal(layer.eval()(x), expected)
    invstd = 1 / np.sqrt(variance.astype(np.float64) + eps)
    gradients = bnfast.batch_norm_backward(
        dy, x, mean, invstd, layer.weight, axis=axis, training=False
    )
    got = layer.backward(dy), layer.weight_grad, layer.bias_grad
    for a, b in zip(got, gradients, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_equal(layer.state_dict(), before)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_through_the_layer(make_of_small_batches, rng, axis, training):
    layer = make_of_small_batches(2, axis=axis, dtype=np.float64)
    layer.weight[...], layer.bias[...] = rng.normal(size=(2, 2))
    if layer.running_mean is not None:
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


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_empty_batch_counts_for_nothing(make_of_small_batches, training):
    layer = make_of_small_batches(3).train(training)
    before = layer.state_dict()
    y = layer(np.empty((0, 3, 5), np.float32))
    assert y.shape == (0, 3, 5)
    np.testing.assert_equal(layer.state_dict(), before)
    assert layer.backward(y).shape == y.shape
    np.testing.assert_array_equal(layer.weight_grad, 0)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (
            np.ones((4, 3, 5), np.int64),
            TypeError,
            "x must be float16, bfloat16, float32 or float64",
        ),
        (np.ones((4, 2, 5), np.float32), ValueError, "x must have 3 channels"),
    ],
    ids=["dtype", "channels"],
)
def test_a_bad_batch_leaves_the_layer_as_it_was(make_of_small_batches, rng, bad, error, message):
    layer = make_of_small_batches(3)
    x = images(rng, np.float32)
    layer(x)
    before = layer.state_dict()
    with pytest.raises(error, match=message):
        layer(bad)
    with pytest.raises(ValueError, match="out must have the shape"):
        layer(x, out=x[:1])
    np.testing.assert_equal(layer.state_dict(), before)
    assert layer.backward(x).shape == x.shape


def test_in_place_leaves_nothing_to_go_back_from(make_of_small_batches, rng):
    layer, other = make_of_small_batches(3), make_of_small_batches(3)
    for _ in range(2):
        x = images(rng, np.float32)
        expected = other(x)
        np.testing.assert_array_equal(layer(x, out=x), expected)
        with pytest.raises(RuntimeError, match="not in place"):
            layer.backward(x)
        layer.eval()
        other.eval()
