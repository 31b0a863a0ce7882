"""Every argument that is True or False, of functions and layers, and what it does to a layer."""

import copy
import inspect
import pickle

import numpy as np
import pytest

import bnfast
from public_calls import public_calls

NO_FLAGS = ["no", "False", 1, 0, None, np.ones(2, bool)]

LAYERS = {
    "BatchNorm": (4,),
    "ConditionalBatchNorm": (4, 2),
    "InstanceNorm": (4,),
    "GroupNorm": (2, 4),
    "FilterResponseNorm": (4,),
    "LayerNorm": (4,),
    "RMSNorm": (4,),
    "GhostBatchNorm": (4, 2),
    "BatchRenorm": (4,),
    "MovingAverageBatchNorm": (4,),
    "CrossIterationBatchNorm": ((4, 3), 1),
    "DecorrelatedBatchNorm": (4, 2),
    "IterNorm": (4, 2),
    "WeightNorm": (np.ones((4, 4), np.float32),),
    "WeightStandardization": (4,),
    "ScaledWeightStandardization": (4,),
    "SpectralNorm": (np.ones((4, 4), np.float32),),
}


def flags_of(function):
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.annotation in (bool, "bool")
    ]


@pytest.mark.parametrize("value", NO_FLAGS, ids=repr)
@pytest.mark.parametrize(
    ("name", "flag"),
    [
        (name, flag)
        for name in bnfast.functional.__all__
        for flag in flags_of(getattr(bnfast, name))
    ],
)
def test_a_flag_of_a_function_is_true_or_false(monkeypatch, rng, name, flag, value):
    x, dy = rng.normal(size=(2, 8, 4, 4, 4)).astype(np.float32)
    calls = public_calls(x, dy, np.ones(4, np.float32), np.zeros(4, np.float32))
    function = getattr(bnfast, name)

    def called(*arguments, **keywords):
        bound = inspect.signature(function).bind(*arguments, **keywords)
        bound.arguments[flag] = value
        return function(*bound.args, **bound.kwargs)

    monkeypatch.setattr(bnfast, name, called)
    with pytest.raises(TypeError, match=rf"^{flag} must be True or False, got "):
        calls[name]()


@pytest.mark.parametrize("value", NO_FLAGS, ids=repr)
@pytest.mark.parametrize(
    ("name", "flag"),
    [(name, flag) for name in LAYERS for flag in flags_of(getattr(bnfast, name))],
)
def test_a_flag_of_a_layer_is_true_or_false(name, flag, value):
    with pytest.raises(TypeError, match=rf"^{flag} must be True or False, got "):
        getattr(bnfast, name)(*LAYERS[name], **{flag: value})


@pytest.mark.parametrize("value", NO_FLAGS, ids=repr)
@pytest.mark.parametrize("name", LAYERS)
def test_the_mode_of_a_layer_is_true_or_false(name, value):
    layer = getattr(bnfast, name)(*LAYERS[name]).eval()
    with pytest.raises(TypeError, match=r"^mode must be True or False, got "):
        layer.train(value)
    with pytest.raises(TypeError, match=r"^training must be True or False, got "):
        layer.training = value
    assert layer.training is False


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        (name, flag)
        for name in LAYERS
        for flag in flags_of(getattr(bnfast, name))
        if flag in ("affine", "elementwise_affine", "thresholded")
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_what_arrays_a_layer_has_cannot_be_changed(name, flag, first):
    layer = getattr(bnfast, name)(*LAYERS[name], **{flag: first})
    setattr(layer, flag, first)
    with pytest.raises(AttributeError, match=rf"^{flag} cannot be changed"):
        setattr(layer, flag, not first)
    assert getattr(layer, flag) is first


TRACKING = {
    name: arguments
    for name, arguments in LAYERS.items()
    if "track_running_stats" in flags_of(getattr(bnfast, name))
}


@pytest.fixture(params=TRACKING)
def tracking(request):
    """A layer that has seen a batch, and a call of it."""
    layer = getattr(bnfast, request.param)(*TRACKING[request.param], track_running_stats=True)
    more = (np.arange(12) % 2,) if request.param == "ConditionalBatchNorm" else ()

    def call(x):
        return layer(x, *more)

    call(np.random.default_rng(1).normal(size=(12, 4, 3)).astype(np.float32))
    return layer, call


def test_statistics_that_are_no_longer_tracked_stay(tracking, rng):
    layer, call = tracking
    x = rng.normal(3, 2, size=(12, 4, 3)).astype(np.float32)
    tracked = call(x)
    layer.track_running_stats = False
    before = layer.state_dict()
    np.testing.assert_array_equal(call(x), tracked)  # by the batch, as before
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    evaluated = layer.eval() and call(x)  # by what had been tracked, as in PyTorch
    layer.track_running_stats = True
    np.testing.assert_array_equal(call(x), evaluated)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", ["first", "second", "both"])
def test_statistics_that_were_taken_away_are_missed(tracking, rng, training, which):
    layer, call = tracking
    names = [name for name in layer.state_dict() if name.startswith("running")]
    for name in names[which == "second" : 1 + (which != "first")]:
        setattr(layer, name, None)
    layer.train(training)
    x = rng.normal(size=(12, 4, 3)).astype(np.float32)
    with pytest.raises(ValueError, match=r"^running_(mean|var|matrix) must be an array"):
        call(x)
    if which == "both":
        layer.track_running_stats = False
        by_the_batch = call(x)
        np.testing.assert_array_equal(layer.train() and call(x), by_the_batch)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_of_a_layer_have_its_flags(name):
    layer = getattr(bnfast, name)(*LAYERS[name]).eval()
    for copied in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.training is False
        assert repr(copied) == repr(layer)
