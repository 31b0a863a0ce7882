"""Calls made again for the backward pass, whose batches running statistics do not see twice."""

import numpy as np
import pytest

import bnfast
from bnfast._cli.kept_memory import kept_bytes
from bnfast.distributed import Communicator, SyncBatchNorm


class Alone(Communicator):
    rank, size = 0, 1

    def allgather(self, block):
        return block[np.newaxis]


LABELS = np.array([0, 1, 1, 0, 1, 0, 0, 1])

STATELESS = {
    "group": lambda: bnfast.GroupNorm(2, 4),
    "layer": lambda: bnfast.LayerNorm(3),
    "RMS": lambda: bnfast.RMSNorm(3),
    "filter response": lambda: bnfast.FilterResponseNorm(4),
}

# Layers of 4 channels, and what they are called with besides a batch of 8.
LAYERS = {
    "batch": (lambda **o: bnfast.BatchNorm(4, **o), ()),
    "activated": (lambda **o: bnfast.BatchNorm(4, activation="relu", **o), ()),
    "residual": (lambda **o: bnfast.BatchNorm(4, **o), (np.ones((8, 4, 3), np.float32),)),
    "instance": (lambda **o: bnfast.InstanceNorm(4, track_running_stats=True, **o), ()),
    "ghost": (lambda **o: bnfast.GhostBatchNorm(4, 4, **o), ()),
    "conditional": (lambda **o: bnfast.ConditionalBatchNorm(4, 2, **o), (LABELS,)),
    "decorrelated": (lambda **o: bnfast.DecorrelatedBatchNorm(4, 2, **o), ()),
    "iterative": (lambda **o: bnfast.IterNorm(4, 2, **o), ()),
    "synchronized": (lambda **o: SyncBatchNorm(4, Alone(), **o), ()),
}


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


@pytest.fixture
def batches(rng):
    return rng.normal(1, 3, (3, 8, 4, 3)).astype(np.float32)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpointed_training_is_training(make, batches, rng, momentum):
    """As a segment whose outputs are dropped, and made again before its backward pass."""
    new, more = make
    plain, checkpointed = new(momentum=momentum), new(momentum=momentum)
    dy = rng.normal(size=batches[0].shape).astype(np.float32)
    for x in batches:
        y = plain(x, *more)
        first = checkpointed(x, *more)
        checkpointed.release()
        np.testing.assert_array_equal(first, y)
        np.testing.assert_array_equal(checkpointed(x, *more, recompute=True), y)
        got, expected = checkpointed.backward(dy), plain.backward(dy)
        for one, other in zip(np.atleast_1d(got), np.atleast_1d(expected), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(checkpointed.weight_grad, plain.weight_grad)
    for name, array in plain.state_dict().items():
        np.testing.assert_array_equal(checkpointed.state_dict()[name], array)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_layer_that_released_keeps_nothing(make, batches, mode):
    new, more = make
    layer = new()
    layer(batches[0], *more)
    layer.train(mode == "training")
    layer.release()
    before = kept_bytes(layer)
    layer(batches[1], *more)
    assert kept_bytes(layer) - before >= batches[1].nbytes
    layer.release()
    assert kept_bytes(layer) - before < batches[1].nbytes // 2  # of evaluation, its coefficients
    with pytest.raises(RuntimeError, match="what the last one kept has been released"):
        layer.backward(batches[1])


def test_any_batch_may_be_made_again(make, batches):
    """Not only the last one, as where the gradients of several are added up."""
    new, more = make
    layer = new()
    outputs = [layer(x, *more) for x in batches]
    state = layer.state_dict()
    for x, y in zip(batches, outputs, strict=True):
        np.testing.assert_array_equal(layer(x, *more, recompute=True), y)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, state[name])


def test_in_place(batches):
    layer = bnfast.BatchNorm(4, activation="leaky_relu", inplace=True)
    y = layer(batches[0].copy())
    state = layer.state_dict()
    np.testing.assert_array_equal(layer(batches[0].copy(), recompute=True), y)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, state[name])


def test_in_evaluation_there_is_nothing_to_be_seen_twice(make, batches):
    new, more = make
    layer = new().eval()
    np.testing.assert_array_equal(
        layer(batches[0], *more, recompute=True), layer(batches[0], *more)
    )


@pytest.mark.parametrize("name", sorted({*LAYERS} - {"synchronized"}))
def test_what_watches_batches_sees_them_once(batches, name):
    new, more = LAYERS[name]
    layer, other = new(), new()
    layer(batches[0], *more)
    with bnfast.recalibrating(layer):
        layer(batches[1], *more)
        layer(batches[1], *more, recompute=True)
        layer(batches[2], *more)
    with bnfast.recalibrating(other):
        other(batches[1], *more)
        other(batches[2], *more)
    for key in ("running_mean", "running_var", "running_matrix"):
        np.testing.assert_array_equal(getattr(layer, key, None), getattr(other, key, None))


@pytest.mark.filterwarnings("error")
def test_no_warning_of_small_batches(batches):
    bnfast.BatchNorm(4)(batches[0, :2, :, :1], recompute=True)


def test_what_the_first_call_has_changed_cannot_be_made_again(batches):
    layer = bnfast.BatchNorm(4, momentum=bnfast.LearnableMomentum())
    layer(batches[0])
    with pytest.raises(ValueError, match="recompute must be False with a LearnableMomentum"):
        layer(batches[0], recompute=True)
    layer.eval()
    y = layer(batches[0])
    np.testing.assert_array_equal(layer(batches[0], recompute=True), y)
    for other in (bnfast.BatchRenorm(4), bnfast.MovingAverageBatchNorm(4)):
        with pytest.raises(TypeError, match="recompute"):
            other(batches[0], recompute=True)


@pytest.mark.parametrize("stateless", STATELESS)
def test_layers_without_running_statistics_take_it_too(stateless, batches):
    layer = STATELESS[stateless]()
    np.testing.assert_array_equal(layer(batches[0], recompute=True), layer(batches[0]))
    with pytest.raises(TypeError, match="recompute must be True or False, got"):
        layer(batches[0], recompute=None)


def test_anything_but_true_and_false_is_refused(make, batches):
    new, more = make
    layer = new()
    with pytest.raises(TypeError, match="recompute must be True or False, got"):
        layer(batches[0], *more, recompute=1)
    assert layer.num_batches_tracked == 0
