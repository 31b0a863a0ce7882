"""thinc: models whose LayerNorm bnfast computes."""

import copy
import doctest
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tolerances import CLOSE_F32, WHOLE_MODEL

pytest.importorskip("thinc")

import thinc
from thinc.api import (
    Adam,
    LayerNorm,
    Linear,
    Maxout,
    Mish,
    NumpyOps,
    Ops,
    Relu,
    Softmax,
    chain,
    clone,
    residual,
    with_array,
    with_debug,
)

import bnfast.integrations.thinc as integration
from bnfast.integrations.thinc import accelerate, restore


@pytest.fixture
def calls(count_calls):
    return count_calls(("layer_norm_forward", "layer_norm_backward"))


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def layer(rng, width):
    made = LayerNorm(nI=width).initialize()
    made.set_param("G", normal(rng, width))
    made.set_param("b", normal(rng, width))
    return made


def network(rng):
    made = chain(
        Maxout(12, 8, normalize=True, dropout=0.0),
        residual(chain(Relu(12, normalize=True), Linear(12))),
        clone(Mish(12, normalize=True), 2),
        Softmax(3),
    )
    made.initialize(normal(rng, 4, 8), normal(rng, 4, 3))
    for node in made.walk():  # their initial values are random, and not seeded
        for name in node.param_names:
            if node.name != "layernorm":
                node.set_param(name, normal(rng, *node.get_param(name).shape))
    return made


@pytest.mark.parametrize("shape", [(5, 8), (1, 96), (300, 33), (0, 8), (4, 1)], ids=str)
def test_values_and_gradients_are_those_of_thinc(shape, rng, calls):
    theirs = layer(rng, shape[1])
    ours = theirs.copy()
    accelerate(ours)
    x = normal(rng, *shape)
    for _ in range(2):  # gradients are added up
        dy = normal(rng, *shape)
        results = []
        for model in (ours, theirs):
            y, backprop = model(x, is_train=True)
            results.append((y, backprop(dy), model.get_grad("G"), model.get_grad("b")))
        for got, expected in zip(*results, strict=True):
            assert got.dtype == np.float32 and got.shape == expected.shape
            np.testing.assert_allclose(got, expected, rtol=CLOSE_F32, atol=10 * CLOSE_F32)
    assert calls == {"layer_norm_forward": 2, "layer_norm_backward": 2}


@pytest.mark.parametrize("deviation", [1, 1e-4])  # of which the square is thinc's eps
def test_prediction_is_computed_too(rng, calls, deviation):
    model = layer(rng, 8)
    x = deviation * normal(rng, 5, 8)
    expected = model.predict(x)
    accelerate(model)
    np.testing.assert_allclose(model.predict(x), expected, rtol=CLOSE_F32, atol=CLOSE_F32)
    assert calls == {"layer_norm_forward": 1}


def test_rows_far_from_zero_stay_exact(rng):
    model = layer(rng, 96)
    accelerate(model)
    x = normal(rng, 20, 96) + np.float32(1e5)
    wide = x.astype(np.float64)
    xhat = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-8)
    expected = xhat * model.get_param("G") + model.get_param("b")
    np.testing.assert_allclose(model.predict(x), expected, rtol=CLOSE_F32, atol=CLOSE_F32)


def path_of(node):
    return f"{node.name} {node.id}"


def test_all_nodes_of_a_model_are_found(rng):
    model = network(rng)
    report = accelerate(model)
    expected = [path_of(node) for node in model.walk() if node.name == "layernorm"]
    assert [entry.path for entry in report.swapped] == expected and len(expected) == 4
    assert report.left == ()
    assert str(report) == "bnfast computes 4 of 4 normalization layers\n  4 LayerNorm"


def test_training_goes_as_in_thinc(rng, calls):
    theirs = network(rng)
    ours = theirs.copy()
    accelerate(ours)
    x, target = normal(rng, 30, 8), np.eye(3, dtype=np.float32)[rng.integers(0, 3, 30)]
    optimizers = Adam(0.01), Adam(0.01)
    for _ in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            y, backprop = model.begin_update(x)
            backprop((y - target) / 30)
            model.finish_update(optimizer)
    np.testing.assert_allclose(ours.predict(x), theirs.predict(x), atol=WHOLE_MODEL)
    assert calls["layer_norm_backward"] == 5 * 4


def test_a_second_time_changes_nothing(rng):
    model = network(rng)
    first = accelerate(model)
    assert accelerate(model) == first


def test_a_restored_model_is_computed_by_thinc(rng, calls):
    model = network(rng)
    functions = [node._func for node in model.walk()]
    with_debug_node = with_debug(layer(rng, 8))
    accelerate(model)
    restore(model)
    assert [node._func for node in model.walk()] == functions
    model.predict(normal(rng, 5, 8))
    assert not calls
    own = with_debug_node._func
    restore(with_debug_node)
    assert with_debug_node._func is own


def test_nodes_keep_all_but_their_forward_function(rng):
    model = network(rng)
    before = [(n.id, n.name, n.init, n.ops, n.param_names, dict(n.attrs)) for n in model.walk()]
    accelerate(model)
    after = [(n.id, n.name, n.init, n.ops, n.param_names, dict(n.attrs)) for n in model.walk()]
    assert after == before


def test_bytes_are_those_of_thinc(rng):
    model = network(rng)
    saved = model.to_bytes()
    accelerate(model)
    assert model.to_bytes() == saved
    others = network(rng), network(rng)
    accelerate(others[0])
    x = normal(rng, 5, 8)
    for other in others:
        other.from_bytes(saved)
        assert other.to_bytes() == saved
        np.testing.assert_allclose(
            other.predict(x), model.predict(x), rtol=CLOSE_F32, atol=CLOSE_F32
        )


@pytest.mark.parametrize(
    "copied",
    [lambda m: m.copy(), copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_are_accelerated(copied, rng, calls):
    model = layer(rng, 8)
    accelerate(model)
    x = normal(rng, 5, 8)
    np.testing.assert_array_equal(copied(model).predict(x), model.predict(x))
    assert calls == {"layer_norm_forward": 2}


def test_nodes_of_other_operations_are_left(rng, calls):
    class OtherOps(Ops):
        name = "other"
        xp = np

    model = chain(layer(rng, 8), layer(rng, 8))
    first, second = model.layers
    second.ops = OtherOps()
    report = accelerate(model)
    assert [entry.path for entry in report.swapped] == [path_of(first)]
    assert str(report).splitlines() == [
        "bnfast computes 1 of 2 normalization layers",
        "  1 LayerNorm",
        "left to thinc",
        f"  {path_of(second)} (LayerNorm): its operations are OtherOps, not NumpyOps",
    ]
    model.predict(normal(rng, 5, 8))
    assert calls == {"layer_norm_forward": 1}
    first.ops = OtherOps()  # as a model that is moved to a GPU
    assert accelerate(model).swapped == ()


def test_operations_that_extend_those_of_numpy_are_not_others(rng):
    class MyOps(NumpyOps):
        name = "mine"

    model = layer(rng, 8)
    model.ops = MyOps()
    assert accelerate(model).left == ()


def test_nodes_with_a_forward_function_of_their_own_are_left(rng, calls):
    seen = []
    model = with_debug(layer(rng, 8), on_forward=lambda *arguments: seen.append(arguments))
    (left,) = accelerate(model).left
    assert left.path == path_of(model) and "forward function" in left.reason
    model.predict(normal(rng, 5, 8))
    assert len(seen) == 1 and not calls


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_types_are_left_to_thinc(dtype, rng, calls):
    theirs = layer(rng, 8)
    ours = theirs.copy()
    accelerate(ours)
    x, dy = (normal(rng, 5, 8).astype(dtype) for _ in range(2))
    results = [model(x, True) for model in (ours, theirs)]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1](dy), results[1][1](dy))
    assert not calls


def test_gradients_of_any_type_and_strides(rng):
    model = layer(rng, 8)
    accelerate(model)
    x, dy = normal(rng, 5, 8), normal(rng, 5, 8)
    _, backprop = model(x, True)
    expected = backprop(dy)
    for other in (dy.astype(np.float64), np.asfortranarray(dy), np.repeat(dy, 2, 1)[:, ::2]):
        np.testing.assert_allclose(backprop(other), expected, rtol=CLOSE_F32, atol=CLOSE_F32)


def test_inputs_of_any_strides(rng):
    model = with_array(layer(rng, 8))
    accelerate(model)
    x = normal(rng, 6, 8)
    expected = model.predict(x)
    for other in (np.asfortranarray(x), np.repeat(x, 2, 1)[:, ::2]):
        np.testing.assert_allclose(model.predict(other), expected, rtol=CLOSE_F32, atol=CLOSE_F32)


def test_bad_input_is_refused(rng):
    with pytest.raises(TypeError, match="model must be a thinc model, got "):
        accelerate([layer(rng, 8)])
    with pytest.raises(TypeError, match="model must be a thinc model, got "):
        restore([layer(rng, 8)])
    model = LayerNorm(nI=8)
    accelerate(model)
    with pytest.raises(KeyError, match="'G'"):  # as in thinc
        model.predict(normal(rng, 5, 8))
    model.initialize()
    with pytest.raises(ValueError, match=r"weight must .* got"):
        model.predict(normal(rng, 5, 7))


def test_their_tests_of_layers_and_models(tmp_path):
    """thinc's own tests, unchanged, of models that are accelerated when they are initialized."""
    root = Path(thinc.__file__).parent / "tests"
    if not root.is_dir():
        pytest.skip("this thinc came without its tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    command += ["-m", "pytest", "-c", str(tmp_path / "pytest.ini"), "--rootdir", str(root)]
    command += ["-p", "thinc_plugin", "-p", "no:cacheprovider", "-q"]
    command += [str(root / "layers" / "test_layers_api.py"), str(root / "model")]
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) >= 150
    for name in ("layer_norm_forward", "layer_norm_backward"):
        (called,) = re.findall(rf"(\d+) calls of {name}", done.stdout)
        assert int(called) >= 5


def test_data_is_validated_as_in_thinc(rng):
    models = LayerNorm(nI=8), LayerNorm(nI=8)
    accelerate(models[0])
    refused = []
    for model in models:
        with thinc.util.data_validation(True):
            model.initialize(X=normal(rng, 5, 8))
            with pytest.raises(ValueError) as error:
                model.initialize(X=normal(np.random.default_rng(0), 5))
        refused.append((type(error.value), str(error.value)))
    assert refused[0] == refused[1]


def test_the_examples_of_the_documentation_run():
    failed, tried = doctest.testmod(integration)
    assert (failed, tried > 0) == (0, True)


def test_without_thinc_the_command_that_installs_it_is_named():
    code = "import sys; sys.modules['thinc.api'] = None; import bnfast.integrations.thinc"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "needs thinc: python -m pip install thinc" in done.stderr
