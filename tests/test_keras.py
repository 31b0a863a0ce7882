"""Keras's layers, computed by bnfast: as stock Keras, in any model; and Keras's own tests.

No test here convolves or pools: Keras does that with JAX, whose threads would be in the way of the
tests that fork.
"""

import copy
import doctest
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from tolerances import ROUNDED_F32, WHOLE_MODEL

keras = pytest.importorskip("keras", minversion="3.14")

import bnfast.integrations.keras as integration  # noqa: E402  # where there is Keras
from bnfast.integrations.keras import accelerate, patched, restore  # noqa: E402

pytestmark = [
    # Keras's own: of variables that know NumPy 1's protocol, and of an argument that is tested.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy"),
    pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`"),
]

LAYERS = keras.layers
KERNELS = ("batch_norm", "layer_norm", "group_norm", "rms_norm", "rms_norm_forward", "moments")
CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # of E[x**2] - E[x]**2 in float32: Keras rounds float64 to it

# Layers, their arguments, the shape of their input.
CASES = [
    (LAYERS.BatchNormalization, {}, (7, 5)),
    (LAYERS.BatchNormalization, {"axis": 1}, (6, 3, 8)),
    (LAYERS.BatchNormalization, {"epsilon": 1.001e-5, "momentum": 0.9}, (4, 5, 6, 3)),
    (LAYERS.BatchNormalization, {"axis": 1, "scale": False}, (4, 3, 5, 6)),
    (LAYERS.BatchNormalization, {"axis": -3, "center": False}, (2, 3, 4, 3, 2)),
    (LAYERS.BatchNormalization, {"axis": 0, "center": False, "scale": False}, (4, 9)),
    (LAYERS.LayerNormalization, {}, (7,)),
    (LAYERS.LayerNormalization, {}, (6, 8)),
    (LAYERS.LayerNormalization, {"axis": 1, "scale": False}, (6, 8, 3)),
    (LAYERS.LayerNormalization, {"axis": (1, 3), "center": False}, (4, 5, 6, 3)),
    (LAYERS.LayerNormalization, {"axis": (3, 2, 1), "epsilon": 1e-6}, (4, 5, 6, 3)),
    (LAYERS.LayerNormalization, {"axis": (-1, -2), "scale": False, "center": False}, (3, 4, 2, 5)),
    (LAYERS.LayerNormalization, {"axis": [2, 0, 1]}, (3, 4, 5, 2, 3)),
    (LAYERS.LayerNormalization, {"rms_scaling": True}, (6, 8)),
    (LAYERS.LayerNormalization, {"rms_scaling": True, "axis": (1, 3)}, (4, 5, 6, 3)),
    (LAYERS.LayerNormalization, {"rms_scaling": True, "axis": (0, 1)}, (4, 5)),
    (LAYERS.GroupNormalization, {"groups": 2}, (5, 6)),
    (LAYERS.GroupNormalization, {"groups": 3, "axis": 1}, (3, 6, 5)),
    (LAYERS.GroupNormalization, {"groups": -1, "scale": False}, (3, 5, 4, 6)),
    (LAYERS.GroupNormalization, {"groups": 1, "axis": -2, "center": False}, (3, 5, 4, 6)),
    (LAYERS.GroupNormalization, {"groups": 2, "epsilon": 1e-6}, (2, 3, 3, 2, 4)),
    (LAYERS.RMSNormalization, {}, (7,)),
    (LAYERS.RMSNormalization, {}, (6, 8)),
    (LAYERS.RMSNormalization, {"axis": (1, 2, 3), "epsilon": 1e-3}, (4, 5, 6, 3)),
    (LAYERS.RMSNormalization, {"axis": (-1, -2)}, (2, 3, 4, 5, 6)),
    (LAYERS.UnitNormalization, {}, (6, 8)),
    (LAYERS.UnitNormalization, {"axis": 1}, (6, 8, 3)),
    (LAYERS.UnitNormalization, {"axis": (1, 3)}, (4, 5, 6, 3)),
    (LAYERS.UnitNormalization, {"axis": [0, 1, -1]}, (2, 3, 4, 3, 2)),
]
IDS = [f"{kind.__name__}-{arguments}-{len(shape)}d" for kind, arguments, shape in CASES]


@pytest.fixture
def calls(count_calls):
    return count_calls(KERNELS)


def build(kind, arguments, shape, rng, dtype="float32"):
    """Return a built layer with weights of its own."""
    layer = kind(dtype=dtype, **arguments)
    layer.build(shape)
    layer.set_weights([rng.uniform(0.5, 2, w.shape) for w in layer.weights])
    return layer


def twin(layer, shape):
    """Return a stock layer with the same weights."""
    other = type(layer).from_config(layer.get_config())
    other.build(shape)
    other.set_weights(layer.get_weights())
    return other


def swapped(model):
    report = accelerate(model)
    assert report.swapped and not report.left, str(report)
    return model


def copy_of(model):
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    return other


def weights_of(model):
    """Return the weights of a model, each other than it begins as, and different from the rest."""
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.weights])
    return model


def assert_close(got, expected):
    assert type(got) is np.ndarray and got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("kind", "arguments", "shape"), CASES, ids=IDS)
def test_a_layer_computes_what_it_did(kind, arguments, shape, dtype, rng, calls):
    stock = build(kind, arguments, shape, rng, dtype)
    ours = swapped(twin(stock, shape))
    x = rng.normal(1, 2, shape).astype(dtype)
    before = x.copy()
    assert_close(ours(x), stock(x))
    np.testing.assert_array_equal(x, before)
    float32_alone = kind is LAYERS.UnitNormalization  # where Keras makes float32 of float64
    assert sum(calls.values()) == (0 if float32_alone and dtype == "float64" else 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("arguments", "shape"), [(a, s) for kind, a, s in CASES if kind is LAYERS.BatchNormalization]
)
def test_training_updates_the_moving_statistics_as_keras_does(arguments, shape, dtype, rng, calls):
    stock = build(LAYERS.BatchNormalization, arguments, shape, rng, dtype)
    ours = swapped(twin(stock, shape))
    held = ours.moving_mean.value, ours.moving_mean.value.copy()
    for _ in range(3):
        x = rng.normal(1, 2, shape).astype(dtype)
        assert_close(ours(x, training=True), stock(x, training=True))
    for got, expected in zip(ours.get_weights(), stock.get_weights(), strict=True):
        assert_close(got, expected)
    assert_close(ours(x), stock(x))
    np.testing.assert_array_equal(*held)  # the variable has a new array
    assert calls["batch_norm"] == 4


@pytest.mark.parametrize("training", [False, True])
def test_a_frozen_layer_uses_its_statistics_and_leaves_them(training, rng, calls):
    stock = build(LAYERS.BatchNormalization, {}, (6, 4), rng)
    ours = swapped(twin(stock, (6, 4)))
    stock.trainable = ours.trainable = False
    x = rng.normal(3, 2, (6, 4)).astype(np.float32)
    before = ours.get_weights()
    assert_close(ours(x, training=training), stock(x, training=training))
    for got, expected in zip(ours.get_weights(), before, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert calls["batch_norm"] == 1


def test_a_mask_counts_in_training_alone(rng, calls):
    stock = build(LAYERS.BatchNormalization, {}, (6, 5, 4), rng)
    ours = swapped(twin(stock, (6, 5, 4)))
    x = rng.normal(3, 2, (6, 5, 4)).astype(np.float32)
    mask = rng.random((6, 5)) < 0.5
    assert_close(ours(x, mask=mask), stock(x, mask=mask))
    assert calls["batch_norm"] == 1
    expected = stock(x, training=True, mask=mask)
    np.testing.assert_array_equal(ours(x, training=True, mask=mask), expected)
    for got, expected in zip(ours.get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_array_equal(got, expected)
    for training in (False, True):
        with pytest.raises(ValueError, match="one dimension less"):
            ours(x, mask=mask[0], training=training)


@pytest.mark.parametrize("kind", [LAYERS.BatchNormalization, LAYERS.LayerNormalization])
def test_masks_go_on_to_later_layers(kind):
    tokens = np.array([[3, 0, 1, 0, 2], [4, 5, 0, 0, 0]])
    layers = [LAYERS.Embedding(9, 4, mask_zero=True), kind(), LAYERS.GlobalAveragePooling1D()]
    stock = weights_of(keras.Sequential([keras.Input((5,), dtype="int32"), *layers]))
    ours = swapped(copy_of(stock))
    assert_close(ours(tokens), stock(tokens))
    assert np.abs(ours(tokens) - ours(np.where(tokens == 0, 1, tokens))).max() > 1e-2


def test_statistics_are_exact_whatever_the_mean(rng):
    x = rng.normal(1000, 1, (64, 8)).astype(np.float32)
    for kind, arguments, axis in (
        (LAYERS.BatchNormalization, {"epsilon": 1e-6}, 0),
        (LAYERS.LayerNormalization, {"epsilon": 1e-6}, 1),
        (LAYERS.GroupNormalization, {"epsilon": 1e-6, "groups": 1}, 1),
    ):
        layer = kind(**arguments)
        layer.build(x.shape)
        y = swapped(layer)(x, **({"training": True} if axis == 0 else {}))
        wide = x.astype(float)
        deviation = np.sqrt(wide.var(axis, keepdims=True) + 1e-6)
        expected = (wide - wide.mean(axis, keepdims=True)) / deviation
        np.testing.assert_allclose(y, expected, atol=ROUNDED_F32)


def test_rows_that_are_zero_short_or_infinite_are_divided_as_keras_does():
    x = np.ones((5, 4), np.float32)
    x[0], x[1], x[2], x[3, 0] = 0, 1e-14, np.nan, np.inf
    layer = LAYERS.UnitNormalization()
    with np.errstate(all="ignore"):
        expected = layer(x)
    np.testing.assert_allclose(swapped(LAYERS.UnitNormalization())(x), expected, rtol=ROUNDED_F32)


# What bnfast has no kernel for.


def test_calls_that_are_left_to_keras_are_as_before(rng, calls):
    def same(kind, arguments, shape, x, **keywords):
        stock = build(kind, arguments, shape, rng)
        ours = swapped(twin(stock, shape))
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = stock(x, **keywords)
            got = ours(x, **keywords)
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype
        for a, b in zip(ours.get_weights(), stock.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

    wide = rng.normal(size=(6, 4))
    x = wide.astype(np.float32)
    nothing = x[:0]
    same(LAYERS.BatchNormalization, {}, (6, 4), nothing, training=True)
    same(LAYERS.BatchNormalization, {"epsilon": 0.0}, (6, 4), x, training=True)
    same(LAYERS.LayerNormalization, {}, (6, 4), nothing)
    same(LAYERS.LayerNormalization, {}, (6, 4), x.astype(np.float16))
    same(LAYERS.RMSNormalization, {}, (6, 4), nothing)
    same(LAYERS.UnitNormalization, {}, (6, 4), nothing)
    same(LAYERS.GroupNormalization, {"groups": 2, "axis": 0}, (6, 4), x)
    # Negative axes are sorted as such: gamma is of the shape (4, 3), of axes 2 and 1.
    same(LAYERS.LayerNormalization, {"axis": [-1, 1]}, (2, 3, 4), x.reshape(2, 3, 4))
    # The scale is along the last axis, whichever is normalized.
    same(LAYERS.RMSNormalization, {"axis": 1}, (2, 3, 3), x[:, :3].reshape(2, 3, 3))
    assert not calls


@pytest.mark.skipif(
    "renorm" not in inspect.signature(LAYERS.BatchNormalization.__init__).parameters,
    reason="this Keras has no renorm",
)
def test_renorm_is_swapped_in_inference_alone(rng, calls):
    stock = build(LAYERS.BatchNormalization, {"renorm": True}, (6, 4), rng)
    ours = swapped(twin(stock, (6, 4)))
    x = rng.normal(size=(6, 4)).astype(np.float32)
    np.testing.assert_array_equal(ours(x, training=True), stock(x, training=True))
    assert not calls
    assert_close(ours(x), stock(x))
    assert calls["batch_norm"] == 1


def test_float64_is_computed_as_such_and_rounded_to_the_dtype_of_the_layer(rng, calls):
    x = rng.normal(1000, 1e-3, (6, 4))
    stock = build(LAYERS.LayerNormalization, {"epsilon": 1e-9}, x.shape, rng)
    y = swapped(twin(stock, x.shape))(x)
    assert y.dtype == stock(x).dtype == np.float32
    deviations = x - x.mean(1, keepdims=True)
    normalized = deviations / np.sqrt((deviations**2).mean(1, keepdims=True) + 1e-9)
    gamma, beta = stock.get_weights()
    np.testing.assert_allclose(y, normalized * gamma + beta, rtol=ROUNDED_F32, atol=ROUNDED_F32)
    assert calls == {"layer_norm": 1}


# Models.


@keras.saving.register_keras_serializable("bnfast tests")
class Attention(keras.layers.Layer):
    """A layer that has its norms as attributes: alone, in a list, in a dictionary."""

    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.first = LAYERS.LayerNormalization()
        self.more = [LAYERS.RMSNormalization(), LAYERS.Dense(4)]
        self.named = {"last": LAYERS.UnitNormalization()}

    def build(self, shape):
        for layer in (self.first, *self.more):
            layer.build(shape)

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        for layer in (self.first, *self.more, self.named["last"]):
            x = layer(x)
        return x


@keras.saving.register_keras_serializable("bnfast tests")
class Cell(keras.layers.Layer):
    """A recurrent cell with a norm inside."""

    state_size = output_size = 4

    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.dense, self.norm = LAYERS.Dense(4), LAYERS.LayerNormalization()

    def build(self, shape):
        self.dense.build((shape[0], shape[-1] + 4))
        self.norm.build((shape[0], 4))

    def call(self, x, states):
        y = self.norm(self.dense(keras.ops.concatenate([x, states[0]], -1)))
        return y, [y]


class Network(keras.Model):
    """A subclassed model, with a nested one, whose norms see `training`."""

    def __init__(self, **keywords):
        super().__init__(**keywords)
        inner = [LAYERS.Dense(4), LAYERS.BatchNormalization()]
        self.inner = keras.Sequential([keras.Input((5, 4)), *inner])
        self.norm = LAYERS.BatchNormalization()

    def call(self, x):
        return self.norm(self.inner(x))


def functional():
    x = inputs = keras.Input((5, 4))
    y = LAYERS.GroupNormalization(2)(LAYERS.Dense(4)(x))
    return keras.Model(inputs, LAYERS.Add()([x, y]))


MODELS = {
    "sequential": (lambda: [LAYERS.Dense(6), LAYERS.BatchNormalization()], 1),
    "nested": (lambda: [functional(), functional(), LAYERS.BatchNormalization()], 3),
    "shared": (lambda: [LAYERS.LayerNormalization(name="one")] * 2, 1),
    "attributes": (lambda: [Attention()], 3),
    "time distributed": (
        lambda: [
            LAYERS.TimeDistributed(LAYERS.BatchNormalization()),
            LAYERS.TimeDistributed(keras.Sequential([LAYERS.LayerNormalization()])),
        ],
        2,
    ),
    "bidirectional": (
        lambda: [LAYERS.Bidirectional(LAYERS.RNN(Cell(), return_sequences=True))],
        2,
    ),
}


def model_of(name):
    layers, norms = MODELS[name]
    x = inputs = keras.Input((5, 4))
    for layer in layers():
        x = layer(x)
    return weights_of(keras.Model(inputs, x)), norms


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_of_a_model_is_found(name, rng, calls):
    model, norms = model_of(name)
    x = rng.normal(size=(3, 5, 4)).astype(np.float32)
    expected = model.predict(x, verbose=0)
    assert not calls
    report = accelerate(model)
    assert len(report.swapped) == norms and not report.left
    # A recurrence enlarges what rounds in Keras's own code.
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, atol=WHOLE_MODEL)
    assert sum(calls.values()) >= norms


@pytest.mark.parametrize("trainable", [True, False])
def test_a_subclassed_model_hands_on_training_and_trainable(trainable, rng, calls):
    x = rng.normal(2, 1, (3, 5, 4)).astype(np.float32)
    stock, ours = Network(), Network()
    for model in (stock, ours):
        model(x)
        weights_of(model)
        model.trainable = trainable
    swapped(ours)
    for keywords in ({}, {"training": True}, {"training": False}):
        assert_close(ours(x, **keywords), stock(x, **keywords))
    for got, expected in zip(ours.get_weights(), stock.get_weights(), strict=True):
        assert_close(got, expected)
    assert calls["batch_norm"] == 6


def test_a_stateless_call_changes_no_variable(rng, calls):
    stock = weights_of(keras.Sequential([keras.Input((4,)), LAYERS.BatchNormalization()]))
    ours = swapped(copy_of(stock))
    x = rng.normal(3, 2, (6, 4)).astype(np.float32)
    own = ours.get_weights()
    given = [v.value for v in ours.trainable_variables]
    states = [np.float32([5, 6, 7, 8]), np.float32([1, 2, 3, 4])]
    for training in (True, False):
        y, after = ours.stateless_call(given, states, x, training=training)
        y_stock, after_stock = stock.stateless_call(given, states, x, training=training)
        assert_close(y, y_stock)
        for got, expected in zip(after, after_stock, strict=True):
            assert_close(got, expected)
    for got, expected in zip(ours.get_weights(), own, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert calls["batch_norm"] == 2


def test_tracing_a_model_changes_no_variable_and_warns_of_nothing(monkeypatch):
    old = np.array([1e38, -1e38, 0], np.float32)  # what memory may hold from before
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.resize(old, shape).astype(dtype))
    norm = LAYERS.BatchNormalization()
    inner = keras.Sequential([keras.Input((4,)), norm])
    swapped(inner)
    before = norm.get_weights()
    outer = LAYERS.Lambda(lambda x: inner(x, training=True))
    assert outer(keras.Input((4,), batch_size=3)).shape == (3, 4)
    for got, expected in zip(norm.get_weights(), before, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_the_layers_stay_the_same_objects_with_the_same_weights():
    model, _ = model_of("nested")
    layers, weights = list(model.layers), [v.value for v in model.weights]
    config = model.get_config()
    swapped(model)
    assert all(a is b for a, b in zip(model.layers, layers, strict=True))
    assert all(a.value is b for a, b in zip(model.weights, weights, strict=True))
    assert model.get_config() == config


def test_saved_models_load_where_there_is_no_bnfast(rng, tmp_path):
    pytest.importorskip("h5py")
    model = weights_of(functional())
    swapped(model)
    x = rng.normal(size=(3, 5, 4)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    model.save(tmp_path / "model.keras")
    model.save(tmp_path / "model.h5")
    model.save_weights(tmp_path / "model.weights.h5")
    (tmp_path / "model.json").write_text(model.to_json())
    code = """
import sys; sys.modules["bnfast"] = None
import numpy as np
from keras import models
of_weights = models.model_from_json(open("model.json").read())
of_weights.load_weights("model.weights.h5")
loaded = [of_weights, models.load_model("model.keras"), models.load_model("model.h5")]
np.save("y.npy", [model.predict(np.load("x.npy"), verbose=0) for model in loaded])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
    for y in np.load(tmp_path / "y.npy"):
        assert_close(y, model(x))


@pytest.mark.parametrize(
    "copied",
    [copy_of, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["clone_model", "deepcopy", "pickle"],
)
def test_a_copy_is_stock_until_it_is_accelerated(copied, rng, calls):
    pytest.importorskip("h5py")
    model = swapped(weights_of(functional()))
    x = rng.normal(size=(3, 5, 4)).astype(np.float32)
    expected = model(x)
    calls.clear()
    other = copied(model)
    assert_close(other(x), expected)
    assert not calls
    np.testing.assert_array_equal(swapped(other)(x), expected)


def test_a_second_time_changes_nothing(rng, calls):
    model = weights_of(functional())
    assert accelerate(model) == accelerate(model)
    model(rng.normal(size=(3, 5, 4)).astype(np.float32))
    assert calls == {"group_norm": 1}


@pytest.mark.parametrize("name", MODELS)
def test_a_restored_model_is_computed_by_keras(name, rng, calls):
    model, _ = model_of(name)
    x = rng.normal(size=(3, 5, 4)).astype(np.float32)
    expected = model.predict(x, verbose=0)
    restore(model)  # which was not accelerated
    first = accelerate(model)
    restore(model)
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)
    assert not calls
    assert accelerate(model) == first


def test_a_call_of_the_users_own_is_left_by_restore():
    layer = LAYERS.LayerNormalization()
    layer.build((None, 4))
    layer.call = own = lambda inputs: inputs
    restore(layer)
    assert layer.call is own


# The report, and what is refused.


class Own(LAYERS.LayerNormalization):
    def call(self, inputs):
        return -super().call(inputs)


def test_the_report_says_what_was_left_and_why(rng):
    replaced = LAYERS.LayerNormalization(name="replaced")
    replaced.call = lambda inputs: inputs
    synchronized = LAYERS.BatchNormalization(name="synchronized")
    synchronized.synchronized = True
    half = LAYERS.RMSNormalization(dtype="mixed_float16", name="half")
    layers = [
        LAYERS.BatchNormalization(name="swapped"),
        *(replaced, synchronized, half, Own(name="own")),
        LAYERS.SpectralNormalization(LAYERS.Dense(4), name="spectral"),
        LAYERS.LayerNormalization(name="second"),
    ]
    model = keras.Sequential([keras.Input((4,)), *layers], name="net")
    x = rng.normal(size=(6, 4)).astype(np.float32)
    expected = model(x)
    report = accelerate(model)
    np.testing.assert_allclose(
        model(x), expected, atol=10 * WHOLE_MODEL
    )  # float16 enlarges roundings
    assert [entry.path for entry in report.swapped] == ["net/swapped", "net/second"]
    assert str(report).splitlines() == [
        "bnfast computes 2 of 7 normalization layers",
        "  1 BatchNormalization",
        "  1 LayerNormalization",
        "left to Keras",
        "  net/replaced (LayerNormalization): its call was replaced before",
        "  net/synchronized (BatchNormalization): synchronized=True, which Keras has with "
        "TensorFlow alone",
        "  net/half (RMSNormalization): it computes in float16 (dtype policy 'mixed_float16')",
        "  net/own (Own): its class is not Keras's own, and may compute something else",
        "  net/spectral (SpectralNormalization): its matrix products are left to NumPy",
    ]
    assert all(entry.reason for entry in report.left)
    assert not any(entry.reason for entry in report.swapped)


def test_a_model_without_norms_has_an_empty_report():
    report = accelerate(keras.Sequential([keras.Input((4,)), LAYERS.Dense(2)]))
    assert report == integration.Report("Keras", (), ())
    assert str(report) == repr(report) == "bnfast computes 0 of 0 normalization layers"


def test_what_is_no_model_or_is_not_built_is_refused():
    with pytest.raises(TypeError, match=r"model must be a Keras model or layer, got \[\] of type"):
        accelerate([])
    with pytest.raises(TypeError, match=r"model must be a Keras model or layer, got \[\] of type"):
        restore([])
    model = keras.Sequential([LAYERS.BatchNormalization()], name="without_input")
    with pytest.raises(ValueError, match="must be built, got 'without_input', which is not"):
        accelerate(model)
    assert "call" not in vars(model.layers[0])


# Functions.

OPS = {
    "batch_normalization": lambda x, w: keras.ops.batch_normalization(
        x, w, w, -1, offset=w, scale=w, epsilon=1e-2
    ),
    "moments": lambda x, w: keras.ops.moments(x, [0, -1]),
    "moments kept": lambda x, w: keras.ops.moments(x, 1, keepdims=True),
    "moments of all": lambda x, w: keras.ops.moments(x, [0, 1, 2]),
    "layer_normalization": lambda x, w: keras.ops.layer_normalization(x, w, w),
    "layer_normalization of lists": lambda x, w: keras.ops.layer_normalization(x, list(w)),
    "rms_normalization": lambda x, w: keras.ops.rms_normalization(x, w, epsilon=1e-3),
    "normalize": lambda x, w: keras.ops.normalize(x, (0, 1)),
    "normalize by the sum": lambda x, w: keras.ops.normalize(x, order=1),
    "normalize all": lambda x, w: keras.ops.normalize(x, axis=None),
}
LEFT = {"normalize by the sum", "normalize all"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPS)
def test_a_patched_function_computes_what_it_did(name, dtype, rng, calls):
    x, w = rng.normal(1, 2, (3, 5, 4)).astype(dtype), rng.uniform(0.5, 2, 4).astype(dtype)
    expected = OPS[name](x, w)
    assert not calls
    with patched():
        got = OPS[name](x, w)
    for a, b in zip(*((r if type(r) is tuple else (r,)) for r in (got, expected)), strict=True):
        assert a.shape == b.shape
        assert_close(np.asarray(a), np.asarray(b))
    float32_alone = name == "normalize" and dtype == "float64"
    assert bool(calls) == (name not in LEFT and not float32_alone)


@pytest.mark.parametrize("name", ["moments", "layer_normalization", "rms_normalization"])
@pytest.mark.parametrize("dtype", ["int32", "float16"])
def test_other_types_go_to_keras(name, dtype, rng, calls):
    x, w = rng.integers(1, 9, (3, 5, 4)).astype(dtype), np.ones(4, np.float32)
    expected = OPS[name](x, w)
    with patched():
        got = OPS[name](x, w)
    np.testing.assert_allclose(got, expected, rtol=WHOLE_MODEL)
    assert set(calls) <= {"moments"}  # of what Keras makes float32


def test_what_was_patched_is_put_back(rng, calls):
    x = rng.normal(size=(3, 4)).astype(np.float32)
    with pytest.raises(RuntimeError, match="inside"), patched():
        with patched():
            keras.ops.moments(x, [0])
        keras.ops.moments(x, [0])
        raise RuntimeError("inside")
    assert calls["moments"] == 2
    keras.ops.moments(x, [0])
    assert calls["moments"] == 2


def test_wrong_arguments_raise_what_keras_raises():
    x = np.ones((3, 4), np.float32)
    wrong = [
        lambda: keras.ops.layer_normalization(x, axis=2),
        lambda: keras.ops.moments(x, [0, 0]),
        lambda: keras.ops.moments(x, [0], synchronized=True),
        lambda: keras.ops.normalize(x, order=0),
        lambda: keras.ops.rms_normalization(x, axis=(0, -2)),
    ]
    for call in wrong:
        with pytest.raises(Exception) as theirs:
            call()
        with patched(), pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
            call()


# Keras's own tests, and how Keras is found.


@pytest.fixture(scope="module")
def their_tests(tmp_path_factory):
    """What Keras's tests of normalization came to, and all that they printed."""
    root = Path(keras.__file__).parent / "src"
    paths = [root / "layers" / "normalization", root / "ops" / "nn_test.py"]
    if not (paths[0] / "batch_normalization_test.py").is_file():
        pytest.skip(f"Keras {keras.__version__} has no tests in its wheel")
    folder = tmp_path_factory.mktemp("keras")
    (folder / "pytest.ini").write_text("[pytest]\n")
    program = Path(__file__).parent / "keras_own_tests.py"
    # Without -P the folder of the program would be where modules are looked for first.
    command = [sys.executable, "-P", str(program), "-c", str(folder / "pytest.ini")]
    command += ["--rootdir", str(root), "-q", "-p", "no:cacheprovider", *map(str, paths)]
    selected = "normalization or moments or batch_norm or layer_norm or rms_norm or normalize"
    done = subprocess.run(
        [*command, "-k", selected], capture_output=True, text=True, cwd=folder, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.parametrize(
    ("through", "kernels"),
    [
        ("stock", ()),
        ("patched", ("batch_norm", "layer_norm", "rms_norm", "rms_norm_forward", "moments")),
        ("swapped", KERNELS),
    ],
    ids=["stock", "patched", "swapped"],
)
def test_the_tests_of_keras_pass(their_tests, through, kernels):
    outcomes, printed = their_tests
    outcome = outcomes[through]
    assert outcome["status"] == 0, printed
    assert outcome["passed"] >= 80
    assert outcome["called"] == sorted(kernels)


def test_the_examples_of_the_documentation_run():
    failed, tried = doctest.testmod(integration)
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize(
    ("before", "backend", "said"),
    [
        ("sys.modules['keras'] = None", "numpy", "importing Keras raised ModuleNotFoundError"),
        ("sys.modules['jax'] = None", "numpy", "importing Keras raised ModuleNotFoundError"),
        ("sys.modules['tensorflow'] = None", "tensorflow", "ModuleNotFoundError"),
        ("", "jax", "got the backend 'jax'"),
    ],
    ids=["no Keras", "no JAX", "no TensorFlow", "another backend"],
)
def test_without_keras_on_numpy_what_is_needed_is_said(before, backend, said):
    code = f"import sys; {before}\nimport bnfast.integrations.keras"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": backend},
    )
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: bnfast.integrations.keras needs Keras 3.14 or newer")
    for part in ('the extra "keras"', "KERAS_BACKEND=numpy", said):
        assert part in message
