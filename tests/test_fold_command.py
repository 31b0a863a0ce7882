"""``python -m bnfast fold``: batch norms of ONNX models, folded into the layers beside them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bnfast import folding
from bnfast._cli import main
from trained_models import trained_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("rich")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

from bnfast._cli.onnx import model_file  # noqa: E402
from bnfast._cli.onnx.folds import fold_all  # noqa: E402
from bnfast.integrations.onnx import NORM_OPS  # noqa: E402

CHANNELS = 4


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


class Builder:
    """A model made node by node, with random weights of one type."""

    def __init__(self, shape=(2, CHANNELS, 6, 6), dtype=np.float32, seed=0):
        self.rng, self.dtype = np.random.default_rng(seed), np.dtype(dtype)
        self.kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        self.inputs, self.nodes, self.initializers = [value("x", shape, self.kind)], [], []
        self.outputs, self.functions, self.last = [], [], "x"

    def constant(self, name, values):
        array = np.asarray(values, self.dtype)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def random(self, name, *shape):
        return self.constant(name, self.rng.normal(size=shape))

    def node(self, kind, *more, name=None, inputs=None, outputs=None, **attributes):
        name = name or f"{kind.lower()}{len(self.nodes)}"
        inputs = [self.last, *more] if inputs is None else inputs
        outputs = [f"{name}_y"] if outputs is None else outputs
        self.nodes.append(helper.make_node(kind, inputs, outputs, name, **attributes))
        self.last = outputs[0]
        return self

    def norm(self, channels=CHANNELS, mean=None, var=None, name="bn", bias=None, **attributes):
        stored = (
            self.random(f"{name}_scale", channels),
            self.random(f"{name}_bias", channels)
            if bias is None
            else self.constant(f"{name}_bias", bias),
            self.constant(f"{name}_mean", self.rng.normal(size=channels) if mean is None else mean),
            self.constant(
                f"{name}_var", self.rng.uniform(0.5, 2, channels) if var is None else var
            ),
        )
        return self.node("BatchNormalization", *stored, name=name, **{"epsilon": 1e-3} | attributes)

    def conv(self, outputs=CHANNELS, inputs=CHANNELS, name="conv", bias=True, **attributes):
        weights = [self.random(f"{name}_w", outputs, inputs, 3, 3)]
        weights += [self.random(f"{name}_b", outputs)] if bias else []
        return self.node("Conv", *weights, name=name, **attributes)

    def output(self, name=None, kind=None):
        self.outputs.append(value(name or self.last, None, kind or self.kind))
        return self

    def model(self, opset=17, ir_version=8):
        if not self.outputs:
            self.output()
        graph = helper.make_graph(self.nodes, "graph", self.inputs, self.outputs, self.initializers)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("local", 1)]
        model = helper.make_model(
            graph, opset_imports=opsets[: 1 + bool(self.functions)], functions=self.functions
        )
        model.ir_version = ir_version
        return onnx.shape_inference.infer_shapes(model)


def save(model, path="model.onnx", **options):
    onnx.save(model, path, **options)
    return path


def outputs_of(path, inputs=None):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if inputs is None:
        rng = np.random.default_rng(1)
        inputs = {
            each.name: rng.normal(size=each.shape).astype(
                {"tensor(float)": np.float32, "tensor(double)": float}.get(each.type, np.float16)
            )
            for each in session.get_inputs()
            if each.type != "tensor(bool)"
        } | {e.name: np.array(True) for e in session.get_inputs() if e.type == "tensor(bool)"}
    return session.run(None, inputs)


def kinds(path="out.onnx"):
    return [node.op_type for node in onnx.load(path).graph.node]


def results(text):
    """The results of the table, by the name of the batch norm."""
    rows = [line.split(maxsplit=3) for line in text.splitlines() if "BatchNormalization" in line]
    return {row[1]: row[-1] if row[2].isdigit() else " ".join(row[2:]) for row in rows}


@pytest.fixture
def fold(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty folder; returns what it printed, or failed with."""
    monkeypatch.chdir(tmp_path)

    def run(model, *arguments, fails=False):
        path = model if isinstance(model, (str, Path)) else save(model)
        before = sorted(Path().rglob("*"))
        status = main(["fold", str(path), "-o", "out.onnx", *map(str, arguments)])
        printed = capsys.readouterr()
        assert status == (1 if fails else 0), printed.err
        if fails:
            assert sorted(Path().rglob("*")) == before  # no file, and no part of one
            assert printed.out == "" and printed.err.count("\n") == 1
            assert printed.err.startswith("python -m bnfast fold: ")
            return printed.err
        return printed.out

    return run


def check(path="out.onnx", original="model.onnx", close=1e-5):
    """The folded model is valid, lists no value that is gone, has the outputs of the original."""
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.load(path).graph
    made = {name for node in graph.node for name in node.output}
    assert {value.name for value in graph.value_info} <= made
    for got, want in zip(outputs_of(path), outputs_of(original), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=close, atol=close * np.abs(want).max())


def conv(**attributes):
    return lambda b: b.conv(**attributes)


def grouped(b):
    return b.node("Conv", b.random("w", 6, 2, 3, 3), group=2, pads=[1, 1, 1, 1], strides=[2, 2])


def transposed(b):
    weights = b.random("w", CHANNELS, 3, 2, 3), b.random("b", 6)
    return b.node("ConvTranspose", *weights, group=2, strides=[2, 2])


def gemm(transposed, bias):
    def add(b):
        b.node("Flatten")
        shape = (3, 144) if transposed else (144, 3)
        more = [] if bias is None else [b.random("c", *bias)]
        return b.node("Gemm", b.random("w", *shape), *more, transB=int(transposed))

    return add


def matmul(b):
    return b.node("Flatten").node("MatMul", b.random("w", 144, 3))


BEFORE = {
    "conv": (conv(), CHANNELS),
    "padded, no bias": (conv(bias=False, pads=[1, 1, 1, 1]), CHANNELS),
    "grouped": (grouped, 6),
    "transposed": (transposed, 6),
    "gemm": (gemm(False, None), 3),
    "transposed gemm": (gemm(True, (3,)), 3),
    "gemm, one bias": (gemm(False, ()), 3),
    "gemm, a row of biases": (gemm(False, (1, 3)), 3),
    "matmul": (matmul, 3),
}


@pytest.mark.parametrize("name", BEFORE)
def test_a_layer_takes_over_the_batch_norm_after_it(fold, name):
    layer, channels = BEFORE[name]
    text = fold(layer(Builder()).norm(channels).node("Relu").model())
    check()
    assert "BatchNormalization" not in kinds() and "1 of 1 batch norms folded" in text
    assert results(text)["bn"].startswith("folded into ") and "before it" in results(text)["bn"]
    assert ("Gemm" in kinds()) == ("gemm" in name or name == "matmul")
    model = onnx.load("out.onnx")
    # Nothing is left of what only batch norm read; the layer's own keep their names.
    names = {tensor.name for tensor in model.graph.initializer}
    assert not any(each.startswith("bn") for each in names)
    assert len(names) == 2 and len(names & {"conv_w", "w"}) == 1


def flat(b):
    return b.node("Flatten")


AFTER = {
    "conv": (conv(), False),
    "auto_pad": (conv(auto_pad="VALID"), False),
    "grouped": (lambda b: b.node("Conv", b.random("w", 6, 2, 3, 3), b.random("b", 6), group=2), 0),
    "1x1, SAME": (lambda b: b.node("Conv", b.random("w", 6, 4, 1, 1), auto_pad="SAME_UPPER"), 0),
    "gemm": (lambda b: b.node("Gemm", b.random("w", CHANNELS, 3), b.random("c", 3)), True),
    "transposed gemm": (lambda b: b.node("Gemm", b.random("w", 3, CHANNELS), transB=1), True),
    "matmul": (lambda b: b.node("MatMul", b.random("w", CHANNELS, 3)), True),
}


@pytest.mark.parametrize("name", AFTER)
def test_a_layer_takes_over_the_batch_norm_before_it(fold, name):
    layer, of_matrices = AFTER[name]
    builder = Builder((2, CHANNELS)) if of_matrices else Builder()
    mean = [0.5, -1, 0.2, 0.1]
    text = fold(layer(builder.node("Relu").norm(mean=mean)).model())
    check()
    assert "BatchNormalization" not in kinds()
    assert "after it" in results(text)["bn"]


@pytest.mark.parametrize("name", ["conv", "transposed"])
def test_a_layer_that_pads_takes_over_a_batch_norm_without_shift(fold, name):
    layer = transposed if name == "transposed" else conv(pads=[1, 1, 1, 1])
    text = fold(layer(Builder().norm(mean=[0] * 4, bias=[0] * 4)).model())
    check()
    assert "1 of 1" in text


def test_a_layer_takes_over_all_batch_norms_around_it(fold):
    builder = Builder().norm(name="bn0", mean=[0.1] * 4).conv().norm(name="bn1").norm(name="bn2")
    text = fold(builder.node("Relu").model())
    check()
    assert kinds() == ["Conv", "Relu"] and "3 of 3 batch norms folded" in text


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_models_of_other_types_keep_their_type(fold, dtype):
    text = fold(gemm(False, (3,))(Builder(dtype=dtype)).norm(3).model())
    check(close={np.float16: 1e-2, np.float64: 1e-12}[dtype])
    assert "1 of 1" in text
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    assert {tensor.data_type for tensor in onnx.load("out.onnx").graph.initializer} == {kind}


def training(b):
    bn = ["bn_y", "running_mean", "running_var"]
    return b.conv().norm(outputs=bn, training_mode=1)


def computed_statistics(b):
    b.conv().norm()
    statistic = b.nodes[-1].input[4]
    b.nodes[-1].input[4] = "computed"
    b.nodes.insert(0, helper.make_node("Abs", [statistic], ["computed"]))
    return b


def replaceable_statistics(b):
    b.conv().norm()
    b.inputs.append(value("bn_var", [CHANNELS]))
    return b


def computed_weight(b):
    b.conv().norm()
    b.nodes[0].input[1] = "computed"
    b.nodes.insert(0, helper.make_node("Neg", ["conv_w"], ["computed"]))
    return b


def also_an_output(b):
    return b.conv().output().norm().output()


def read_twice(b):
    return b.conv().norm().node("Add", "conv_y")


def read_within_if(b):
    b.conv().norm()
    b.inputs.append(value("which", [], TensorProto.BOOL))
    branches = [
        helper.make_graph(
            [helper.make_node(kind, ["conv_y"], [kind])], kind, [], [value(kind, None)]
        )
        for kind in ("Abs", "Neg")
    ]
    b.node("If", inputs=["which"], then_branch=branches[0], else_branch=branches[1])
    return b.node("Add", "bn_y")


def within_if(b):
    b.norm(name="unused").last = "x"
    unused = b.nodes.pop()
    b.inputs.append(value("which", [], TensorProto.BOOL))
    inner = helper.make_node("BatchNormalization", ["x", *unused.input[1:]], ["inner_y"], "inner")
    branches = [
        helper.make_graph([inner], "then", [], [value("inner_y", None)]),
        helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "else", [], [value("y", None)]),
    ]
    return b.node(
        "If", inputs=["which"], then_branch=branches[0], else_branch=branches[1], name="if"
    )


def within_function(b):
    b.norm(name="unused").last = "x"
    unused = b.nodes.pop()
    names = ["x", "s", "b", "m", "v"]
    inner = helper.make_node("BatchNormalization", names, ["y"], "inner")
    opsets = [helper.make_opsetid("", 17)]
    b.functions.append(helper.make_function("local", "Block", names, ["y"], [inner], opsets))
    return b.node("Block", *unused.input[1:], domain="local")


def far_mean(b):
    return b.node("Relu").norm(mean=[0, 0, -70, 0], var=[1, 1, 4, 1]).conv()


def in_front_of_padding(b):
    return b.node("Relu").norm(mean=[0] * 4).conv(pads=[0, 0, 0, 1])


def in_front_of_same(b):
    return b.node("Relu").norm(mean=[0] * 4).conv(auto_pad="SAME_LOWER")


def in_front_of_transposed(b):
    return transposed(b.node("Relu").norm(mean=[0] * 4))


def on_rows(b):
    # MatMul's channels are along the last axis, those of batch norm along axis 1.
    return b.node("MatMul", b.random("w", 6, 6)).norm()


def in_front_of_rows(b):
    return b.node("Relu").norm().node("MatMul", b.random("w", 6, 6))


def samples_differ(b):
    return gemm(False, (2, 3))(b).norm(3)


def scaled_gemm(b):
    b.node("Flatten")
    return b.node("Gemm", b.random("w", 144, 3), alpha=0.5).norm(3)


def used_as_bias(b):
    b.node("Flatten").norm(144)
    b.initializers += [numpy_helper.from_array(np.ones((2, 3), np.float32), "left")]
    return b.node("Gemm", inputs=["left", b.random("w", 3, 144), b.last])


def transposed_input(b):
    b.node("Flatten").norm(144)
    return b.node("Gemm", b.random("w", 2, 3), transA=1)


STAYS = {
    training: "it is in training mode",
    computed_statistics: "its input_var (computed) is computed in the graph",
    replaceable_statistics: "its input_var (bn_var) is an input of the model",
    computed_weight: "the weight of Conv conv (computed) is computed in the graph; "
    "its output is an output of the model",
    also_an_output: "the output of Conv conv is an output of the model; "
    "its output is an output of the model",
    read_twice: "the output of Conv conv is read more than once; Add add2 after it",
    read_within_if: "the output of Conv conv is read more than once; Add add3 after it",
    within_if: "within If if",
    within_function: "within function Block",
    far_mean: "Relu relu0 before it; in Conv conv after it digits would be lost, with a mean 35 "
    "standard deviations from zero",
    in_front_of_padding: "Relu relu0 before it; Conv conv after it pads with zeros",
    in_front_of_same: "Relu relu0 before it; Conv conv after it pads with zeros",
    in_front_of_transposed: "Relu relu0 before it; ConvTranspose convtranspose2 after it pads with "
    "zeros",
    on_rows: "MatMul matmul0 before it is not known to be of two matrices; "
    "its output is an output of the model",
    in_front_of_rows: "Relu relu0 before it; "
    "MatMul matmul2 after it is not known to be of two matrices",
    samples_differ: "the bias of Gemm gemm1 differs between samples; "
    "its output is an output of the model",
    scaled_gemm: "Gemm gemm1 has a factor (alpha, beta); its output is an output of the model",
    transposed_input: "Flatten flatten0 before it; Gemm gemm2 after it transposes it",
    used_as_bias: "Flatten flatten0 before it; Gemm gemm2 after it",
}


@pytest.mark.parametrize("build", STAYS, ids=lambda build: build.__name__)
def test_what_cannot_be_folded_stays_as_it_is_with_a_reason(fold, build):
    model = build(Builder()).model()
    text = fold(model)
    assert list(results(text).values()) == [f"stays: {STAYS[build]}"]
    assert "0 of 1 batch norms folded" in text and "differ by at most 0 of" in text
    assert onnx.load("out.onnx") == model


def test_batch_norm_of_elements_in_old_opsets_stays(fold):
    builder = Builder(shape=(2, 144)).node("Identity")
    model = gemm(False, (3,))(builder).norm(3, spatial=0).model(opset=7)
    assert results(fold(model))["bn"].startswith("stays: each element has statistics of its own")


def test_batch_norm_in_training_in_old_opsets_stays(tmp_path):
    """Its other outputs say so. onnxruntime refuses it, so it is looked at before that."""
    builder = Builder().conv()
    builder.norm(outputs=["bn_y", "mean", "var", "saved_mean", "saved_var"])
    path = save(builder.model(opset=9), tmp_path / "model.onnx")
    (verdict,) = fold_all(model_file.ModelFile(path))
    assert (verdict.folded, verdict.text) == (False, "stays: it is in training mode")


def test_what_does_not_stay_finite_stays(fold):
    builder = Builder(dtype=np.float16).conv().norm(var=[0] * 4, epsilon=1e-7)
    builder.initializers[2] = numpy_helper.from_array(np.full(4, 1e4, np.float16), "bn_scale")
    builder.constant("zero", 0)
    text = fold(builder.node("Mul", "zero").model())
    assert "the folded weight must be in the range of float16" in results(text)["bn"]


def test_a_negative_variance_stays(fold):
    builder = Builder().conv().norm(var=[1, 1, -1, 1])
    text = fold(builder.model())
    assert "running_var + eps must be positive, got -0.9989" in results(text)["bn"]


def test_initializers_of_old_models_are_inputs_too(fold):
    builder = (
        Builder()
        .conv(bias=False)
        .norm()
        .node("Relu")
        .norm(name="bn2", mean=[0] * 4)
        .conv(name="next", bias=False)
    )
    builder.inputs += [value(t.name, t.dims) for t in builder.initializers]
    text = fold(builder.model(opset=9, ir_version=3))
    check()
    assert "2 of 2" in text
    graph = onnx.load("out.onnx").graph
    assert {i.name for i in graph.input} == {"x"} | {t.name for t in graph.initializer}
    assert len(graph.initializer) == 4


def test_constants_may_be_nodes(fold):
    model = Builder().conv().norm().node("Relu").model(opset=12)
    constants = [
        helper.make_node("Constant", [], [f"{tensor.name}_stored"], value=tensor)
        for tensor in model.graph.initializer
    ]
    constants += [
        helper.make_node("Identity", [f"{tensor.name}_stored"], [tensor.name])
        for tensor in model.graph.initializer
    ]
    nodes = [*constants, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    fold(model)
    check()
    assert kinds() == ["Conv", "Relu"]


def test_a_weight_that_others_read_is_not_changed_for_them(fold):
    builder = Builder().conv().norm()
    first = builder.last
    builder.node("Conv", inputs=["x", "conv_w", "conv_b"]).norm(name="bn2")
    builder.node("Conv", inputs=["x", "conv_w", "conv_b"])
    builder.node("Sum", first, "bn2_y", "bn_scale")
    builder.initializers[2].dims[:] = [4, 1, 1]  # bn_scale
    builder.nodes[1].input[1] = builder.constant("scale", [1, 2, 3, 4])
    text = fold(builder.model())
    check()
    assert "2 of 2" in text
    assert {"conv_w", "bn_scale"} <= {t.name for t in onnx.load("out.onnx").graph.initializer}


def test_all_else_of_a_model_is_kept(fold):
    model = Builder().conv().norm().node("Relu").model()
    model.producer_name, model.doc_string, model.model_version = "someone", "words", 7
    helper.set_model_props(model, {"labels": "cat,dog"})
    model.graph.node[2].doc_string = "kept"
    model.opset_import.append(helper.make_opsetid("others", 3))
    fold(model)
    folded = onnx.load("out.onnx")
    for field in ("producer_name", "doc_string", "model_version", "metadata_props", "opset_import"):
        assert getattr(folded, field) == getattr(model, field)
    assert folded.graph.node[1].doc_string == "kept" and folded.graph.node[0].name == "conv"
    assert (folded.graph.input, folded.graph.output) == (model.graph.input, model.graph.output)


def external(path="model.onnx"):
    model = Builder().conv().norm().node("Relu").conv(name="next").model()
    options = {"location": "weights.bin", "size_threshold": 100}
    return save(model, path, save_as_external_data=True, **options)


def test_external_data_stays_external_and_the_original_as_it_is(fold, tmp_path):
    (tmp_path / "in").mkdir()
    path = external("in/model.onnx")
    before = {file: file.read_bytes() for file in Path("in").iterdir()}
    fold(path)
    assert {file: file.read_bytes() for file in Path("in").iterdir()} == before
    assert sorted(file.name for file in Path().iterdir()) == ["in", "out.onnx", "out.onnx.data"]
    check(original=path)
    model = onnx.load("out.onnx", load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }
    assert set(places) == {"conv_w", "next_w"}
    for place in places.values():
        assert place["location"] == "out.onnx.data" and int(place["offset"]) % 4096 == 0
    assert not any(tensor.raw_data for tensor in model.graph.initializer if tensor.name in places)


def test_a_model_can_be_folded_where_its_data_lies(fold):
    fold(external())
    check()
    fold("out.onnx", fails=True)  # which is the output
    assert {"model.onnx", "weights.bin"} < {file.name for file in Path().iterdir()}


def overwriting(fold, path, message):
    before = {file: file.read_bytes() for file in Path().iterdir() if file.is_file()}
    assert message in fold(path, "--force", fails=True)
    assert {file: file.read_bytes() for file in Path().iterdir() if file.is_file()} == before


def test_nothing_of_the_input_is_overwritten(fold):
    model = Builder().conv().norm().model()
    message = "out.onnx: belongs to model.onnx, which is not overwritten"
    save(model)
    Path("out.onnx").symlink_to("model.onnx")
    overwriting(fold, "model.onnx", message)
    Path("out.onnx").unlink()
    Path("out.onnx").hardlink_to("model.onnx")
    overwriting(fold, "model.onnx", message)
    Path("out.onnx").unlink()
    save(model, save_as_external_data=True, location="out.onnx", size_threshold=0)
    overwriting(fold, "model.onnx", message)
    Path("out.onnx").unlink()
    model = Builder().conv().norm().model()
    save(model, save_as_external_data=True, location="out.onnx.data", size_threshold=0)
    overwriting(fold, "model.onnx", "out.onnx.data: belongs to model.onnx")
    save(Builder().conv().norm().model())
    np.savez("data.npz", x=np.ones((2, CHANNELS, 6, 6), np.float32))
    Path("data.npz").rename("out.onnx")
    before = Path("out.onnx").read_bytes()
    assert "out.onnx: is what --data names" in fold(
        "model.onnx", "--data", "out.onnx", "--force", fails=True
    )
    assert Path("out.onnx").read_bytes() == before


def test_the_output_must_be_a_file_in_a_folder(fold, capsys):
    path = save(Builder().conv().norm().model())
    Path("out.onnx").mkdir()
    assert "out.onnx: expected a file to write to" in fold(path, fails=True)
    assert main(["fold", path, "-o", "nowhere/out.onnx"]) == 1
    folder = Path("nowhere").absolute()
    assert f"nowhere/out.onnx: the folder {folder} does not exist" in capsys.readouterr().err


def test_a_file_that_is_there_is_written_over_by_force_alone(fold):
    path = save(Builder().conv().norm().model())
    Path("out.onnx").touch()
    expected = "python -m bnfast fold: out.onnx exists, and is not written over without --force\n"
    assert fold(path, fails=True) == expected
    assert Path("out.onnx").read_bytes() == b""
    fold(path, "--force")
    check()
    save(Builder().conv().norm().model(), save_as_external_data=True, size_threshold=0)
    Path("out.onnx").unlink()
    Path("out.onnx.data").touch()
    assert "out.onnx.data exists, and is not" in fold(path, fails=True)
    fold(path, "--force")
    check()


def cut(path, size):
    Path(path).write_bytes(Path(path).read_bytes()[:size])


def test_a_file_that_is_no_whole_model_is_named(fold):
    assert "nowhere.onnx: cannot be read: No such file" in fold("nowhere.onnx", fails=True)
    Path("folder").mkdir()
    assert "folder: cannot be read: Is a directory" in fold("folder", fails=True)
    path = save(Builder().conv().norm().model())
    whole = Path(path).read_bytes()
    for content in (b"", b"some text", whole[:-1], whole[:100], b"\x89PNG\r\n\x1a\n"):
        Path(path).write_bytes(content)
        message = fold(path, fails=True)
        assert "model.onnx: expected an ONNX model, got another file, or a part of one" in message


def test_models_that_nobody_can_read_are_named(fold):
    builder = Builder().conv().norm()
    for opset in (6, 99):
        message = fold(builder.model(opset), fails=True)
        assert "model.onnx: expected opset 7 to " in message and f"got {opset}" in message
    assert "not a valid ONNX model" in fold(builder.model(ir_version=99), fails=True)
    wrong = builder.model()
    wrong.graph.node[1].op_type = "NoSuchOperator"
    assert "not a valid ONNX model: No Op registered for NoSuchOperator" in fold(wrong, fails=True)
    wrong.graph.node[1].domain = "elsewhere"
    wrong.opset_import.append(helper.make_opsetid("elsewhere", 1))
    assert "model.onnx: onnxruntime cannot load it:" in fold(wrong, fails=True)


def test_external_data_that_is_not_all_there_is_named(fold):
    path = external()
    cut("weights.bin", 100)
    message = fold(path, fails=True)
    assert "model.onnx" in message and "cannot" in message
    Path("weights.bin").unlink()
    assert "not a valid ONNX model: Data of TensorProto" in fold(path, fails=True)


def test_external_data_that_onnx_reads_too_little_of_is_named(fold, monkeypatch):
    def reads_less(tensor, folder):
        load(tensor, folder)
        tensor.raw_data = tensor.raw_data[:-4]

    load = model_file.load_external_data_for_tensor
    monkeypatch.setattr(model_file, "load_external_data_for_tensor", reads_less)
    message = fold(external(), fails=True)
    assert "external data of 'conv_w': truncated: expected 576 bytes, got 572" in message


def test_a_result_that_differs_is_refused(fold, monkeypatch):
    def wrong(*arguments, **options):
        weight, bias = right(*arguments, **options)
        return weight, bias + np.float32(0.01)

    right = folding.fold_into_previous
    monkeypatch.setattr(folding, "fold_into_previous", wrong)
    path = save(Builder().conv().norm().model())
    message = fold(path, fails=True)
    assert "nothing was written: output bn_y would differ by 0.0" in message
    assert "more than the --tolerance of 0.00035" in message
    assert "1 of 1" in fold(path, "--tolerance", 0.1)


@pytest.mark.parametrize("error", [np.nan, np.inf, -100])
def test_a_result_that_is_not_finite_or_of_another_shape_is_refused(fold, monkeypatch, error):
    def wrong(*arguments, **options):
        weight, bias = right(*arguments, **options)
        return weight, bias + np.float32(error)

    right = folding.fold_into_previous
    monkeypatch.setattr(folding, "fold_into_previous", wrong)
    builder = Builder().conv().norm().node("Relu")
    if np.isfinite(error):  # then only the number of these places differs
        builder.node("NonZero").output(kind=TensorProto.INT64)
    message = fold(save(builder.model()), "--tolerance", 1e6, fails=True)
    assert "would differ by inf of its largest value" in message


def test_outputs_that_are_rounding_errors_may_differ_as_they_do_in_the_optimized_model(fold):
    builder = Builder().conv().norm()
    (y,) = outputs_of(save(builder.model()), x := {"x": np.ones((2, CHANNELS, 6, 6), np.float32)})
    builder.outputs.clear()
    builder.node("Sub", builder.constant("nearly_the_same", np.nextafter(y, np.float32(np.inf))))
    np.savez("data.npz", **x)
    path = save(builder.model())
    text = fold(path, "--data", "data.npz")
    assert "(that of onnxruntime's own optimizations: " in text
    Path("out.onnx").unlink()
    message = fold(path, "--data", "data.npz", "--tolerance", 0.01, fails=True)
    assert message.endswith(" of its largest value, more than the --tolerance of 0.01\n")


@pytest.mark.parametrize("x", [np.full((2, CHANNELS, 6, 6), np.inf), np.zeros((0, CHANNELS, 6, 6))])
def test_outputs_without_a_finite_value_prove_nothing(fold, x):
    path = save(Builder(shape=("n", CHANNELS, 6, 6)).conv().norm().model())
    np.savez("data.npz", x=x.astype(np.float32))
    message = fold(path, "--data", "data.npz", fails=True)
    assert "model.onnx with data.npz: expected finite outputs to compare, got none\n" in message


def test_random_inputs_whose_outputs_are_not_finite_ask_for_data(fold):
    builder = Builder().conv().norm()
    path = save(builder.node("Div", builder.constant("zero", 0)).model())
    message = fold(path, fails=True)
    assert "with random inputs: expected finite outputs to compare, got none; --data" in message


def test_data_of_the_users_decide_where_sizes_are_open(fold):
    builder = Builder(shape=("n", CHANNELS, "h", "w")).conv().norm()
    path = save(builder.node("Reshape", "shape").model())
    shape = numpy_helper.from_array(np.array([-1, CHANNELS * 9]), "shape")
    builder.initializers.append(shape)
    path = save(builder.model())
    assert "onnxruntime cannot run it:" in (message := fold(path, fails=True))
    assert message.endswith("; --data gives it others\n")
    np.savez("data.npz", x=np.ones((2, CHANNELS, 5, 5), np.float32))
    assert "1 of 1" in fold(path, "--data", "data.npz")
    for values in (np.ones((2, CHANNELS, 5, 5), np.uint8), np.ones(3)):
        np.savez("data.npz", x=values)
        assert "onnxruntime cannot run it:" in fold(
            path, "--data", "data.npz", "--force", fails=True
        )
    for wrong in ("nowhere.npz", path):
        assert f"{wrong}: cannot be read:" in fold(path, "--data", wrong, "--force", fails=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_single_input_takes_a_single_array_of_any_name_and_floats_of_any_size(fold, dtype):
    path = save(Builder(shape=(1, CHANNELS, 6, 6)).conv().norm().model())
    x = np.ones((1, CHANNELS, 6, 6), dtype)
    np.save("data.npy", x)
    np.savez("unnamed.npz", x)
    np.savez("named.npz", images=x)
    np.savez("more.npz", x=x, labels=np.zeros(1, np.int64))
    for file in ("data.npy", "unnamed.npz", "named.npz", "more.npz"):
        assert "1 of 1" in fold(path, "--data", file)
        Path("out.onnx").unlink()


def test_data_that_the_inputs_are_not_found_in_are_refused_with_the_names_of_both(fold):
    builder = Builder().conv().norm()
    builder.inputs.append(value("other", (2, CHANNELS, 1, 1)))
    path = save(builder.node("Add", "other").model())
    x = np.ones((2, CHANNELS, 6, 6), np.float32)
    np.savez("data.npz", x=x, other=x[:, :, :1, :1])
    assert "1 of 1" in fold(path, "--data", "data.npz")
    Path("out.onnx").unlink()
    np.save("data.npy", x)
    np.savez("one.npz", x=x)
    np.savez("others.npz", x, x)
    np.savez("empty.npz")
    for file, names in {
        "data.npy": "one without a name, as an .npy file has it; "
        "an .npz file has several, with names",
        "one.npz": "x",
        "others.npz": "arr_0, arr_1",
        "empty.npz": "none",
    }.items():
        message = fold(path, "--data", file, "--force", fails=True)
        assert message.endswith(f": {file}: expected arrays x, other, got {names}\n")


def test_a_model_without_batch_norm_is_copied(fold):
    model = Builder().conv().model()
    assert fold(model).startswith("0 of 0 batch norms folded.")
    assert onnx.load("out.onnx") == model


FULL_DISK = """
import resource, sys
from bnfast._cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
sys.exit(main(["fold", "model.onnx", "-o", "out.onnx", "--force"]))
"""


@pytest.mark.parametrize("data", [False, True])
def test_on_a_full_disk_what_was_there_stays(tmp_path, data):
    builder = Builder().conv(outputs=30).norm(30)
    save(builder.model(), tmp_path / "model.onnx", save_as_external_data=data)
    for name in ("out.onnx", "out.onnx.data"):
        (tmp_path / name).write_text("what was there")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    command = [sys.executable, "-c", FULL_DISK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.endswith("out.onnx: cannot be written: File too large\n")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "rich"])
def test_what_is_missing_is_named_with_the_command_that_installs_it(capsys, monkeypatch, package):
    for name in list(sys.modules):
        if name.partition(".")[0] == package or name.startswith("bnfast._cli.onnx"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["fold", "model.onnx", "-o", "out.onnx"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m bnfast fold: needs onnx, onnxruntime and rich (")
    assert line.endswith('): python -m pip install "bnfast[onnx]"')


def as_double(model):
    """The same model with float64 in the place of float32."""

    def widen(tensor):
        if tensor.data_type == TensorProto.FLOAT:
            wide = numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))

    for tensor in model.graph.initializer:
        widen(tensor)
    for each in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if each.type.tensor_type.elem_type == TensorProto.FLOAT:
            each.type.tensor_type.elem_type = TensorProto.DOUBLE
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                widen(attribute.t)
            elif attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
    return model


def test_a_real_model_differs_by_at_most_twice_its_own_error(fold):
    """Which way up text is, of rapidocr-onnxruntime: 35 batch norms, opset 11."""
    model = trained_model("ch_ppocr_mobile_v2.0_cls_infer.onnx")
    assert "35 of 35 batch norms folded" in fold(model)
    exact = ReferenceEvaluator(as_double(onnx.load(model)), new_ops=NORM_OPS)
    x = np.random.default_rng(0).normal(size=(4, 3, 48, 192)).astype(np.float32)
    (own,), (folded,) = (outputs_of(path, {"x": x}) for path in (model, "out.onnx"))
    (want,) = exact.run(None, {"x": x.astype(np.float64)})
    assert want.dtype == np.float64
    assert np.abs(folded - own).max() <= 2 * np.abs(own - want).max() <= 1e-5
