"""What is said of other frameworks is so, and layers are built on it."""

import dataclasses
import inspect

import numpy as np
import pytest

import bnfast
from bnfast._conventions import FLAX, KERAS, ONNX, PYTORCH
from tolerances import CLOSE_F64

CONVENTIONS = {"pytorch": PYTORCH, "keras": KERAS, "flax": FLAX, "onnx": ONNX}

MEAN, VAR = np.array([1.0, -2.0]), np.array([3.0, 0.5])


def test_conventions_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PYTORCH.eps = 0.0


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_layer_ages_its_statistics_as_the_framework_says(name, rng):
    convention = CONVENTIONS[name]
    x = rng.normal(3, 2, (4, 2, 3))
    layer = bnfast.BatchNorm(
        *(2, convention.eps, convention.weight_of_new_batch(convention.momentum)),
        axis=convention.axis,
        unbiased=convention.unbiased,
        dtype=np.float64,
    )
    layer.running_mean[...], layer.running_var[...] = MEAN, VAR
    layer(np.moveaxis(x, 1, convention.axis))
    new = {"pytorch": 0.1, "keras": 0.01, "flax": 0.01, "onnx": 0.1}[name]
    mean = (1 - new) * MEAN + new * x.mean((0, 2))
    var = (1 - new) * VAR + new * x.var((0, 2), ddof=int(name == "pytorch"))
    np.testing.assert_allclose(layer.running_mean, mean, rtol=CLOSE_F64)
    np.testing.assert_allclose(layer.running_var, var, rtol=CLOSE_F64)


def test_states_have_the_names_of_pytorch():
    names = [PYTORCH.weight, PYTORCH.bias, PYTORCH.mean, PYTORCH.var, PYTORCH.counter]
    assert list(bnfast.BatchNorm(2).state_dict()) == names


def test_from_keras_has_the_names_and_defaults_of_keras():
    parameters = inspect.signature(bnfast.BatchNorm.from_keras).parameters
    assert list(parameters)[:4] == [KERAS.weight, KERAS.bias, KERAS.mean, KERAS.var]
    layer = bnfast.BatchNorm.from_keras(*np.ones((4, 2)))
    assert (layer.momentum, layer.eps, layer.axis) == (0.01, KERAS.eps, KERAS.axis)
    assert (KERAS.momentum, KERAS.eps, KERAS.axis) == (0.99, 1e-3, -1)
    assert layer.unbiased == KERAS.unbiased


def test_pytorch_is_as_it_says_itself(rng):
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm2d(2, dtype=torch.float64)
    names = [PYTORCH.weight, PYTORCH.bias, PYTORCH.mean, PYTORCH.var, PYTORCH.counter]
    assert list(theirs.state_dict()) == names
    assert (theirs.momentum, theirs.eps) == (PYTORCH.momentum, PYTORCH.eps)
    x = rng.normal(3, 2, (4, 2, 3, 1))
    theirs(torch.as_tensor(x))
    of_new = PYTORCH.weight_of_new_batch(PYTORCH.momentum)
    var = 1 - of_new + of_new * x.var((0, 2, 3), ddof=int(PYTORCH.unbiased))
    np.testing.assert_allclose(theirs.state_dict()[PYTORCH.var].numpy(), var, rtol=CLOSE_F64)


def test_onnx_is_as_its_schema_and_its_reference_say(rng):
    onnx = pytest.importorskip("onnx")
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    schema = onnx.defs.get_schema("BatchNormalization", 15)
    assert [i.name for i in schema.inputs] == ["X", ONNX.weight, ONNX.bias, ONNX.mean, ONNX.var]
    for name, default in (("momentum", ONNX.momentum), ("epsilon", ONNX.eps)):
        assert np.float32(schema.attributes[name].default_value.f) == np.float32(default)
    inputs = {i.name: None for i in schema.inputs}
    node = onnx.helper.make_node(
        "BatchNormalization", list(inputs), ["Y", "mean", "var"], training_mode=1
    )
    x = rng.normal(3, 2, (4, 2, 3))
    inputs |= {"X": x, ONNX.weight: np.ones(2), ONNX.bias: np.zeros(2)}
    inputs |= {ONNX.mean: MEAN, ONNX.var: VAR}
    _, mean, var = evaluator(node).run(None, inputs)
    of_new = ONNX.weight_of_new_batch(ONNX.momentum)
    expected = (1 - of_new) * MEAN + of_new * x.mean((0, 2))
    np.testing.assert_allclose(mean, expected, rtol=1e-6)  # its momentum is of float32
    expected = (1 - of_new) * VAR + of_new * x.var((0, 2), ddof=int(ONNX.unbiased))
    np.testing.assert_allclose(var, expected, rtol=1e-6)
