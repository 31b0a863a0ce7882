"""ONNX's reference evaluator with bnfast's operators: ONNX's tests, onnxruntime, definitions."""

import doctest
import glob
import os
import re
import subprocess
import sys
import unittest
import warnings

import numpy as np
import pytest

from bnfast import _reference as reference
from tolerances import CLOSE_F64, HALF_AN_ULP, ROUNDED_F32

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, inliner, numpy_helper, parser  # noqa: E402  # where there is onnx
from onnx.reference import ReferenceEvaluator  # noqa: E402

import bnfast.integrations.onnx as integration  # noqa: E402
from bnfast.integrations.onnx import NORM_OPS  # noqa: E402

KERNELS = (
    *("batch_norm", "batch_norm_forward", "instance_norm", "group_norm", "layer_norm_forward"),
    *("rms_norm", "weight_norm", "weight_standardization"),
)
NAMES = {operator.__name__ for operator in NORM_OPS}
DTYPES = [
    helper.tensor_dtype_to_np_dtype(number)
    for number in (
        *(TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE),
    )
]
# Older definitions left open what becomes of zeros, and their tests expected NaN.
ZERO_IS_DEFINED = "zero" in onnx.defs.get_schema("LpNormalization").doc
EPS = 2.0**-7  # which float32, the type of attributes, holds exactly
TRAINED_BY_OUTPUTS, TRAINED_BY_MODE = [7, 8, 9, 13], [14, 15, 21]


@pytest.fixture
def calls(count_calls):
    """How often the operators called bnfast's functions, in all."""
    counts = count_calls(KERNELS)
    return lambda: sum(counts.values())


@pytest.fixture(params=DTYPES, ids=str)
def float_type(request):
    return request.param


def model_of(operator, opset, arrays, outputs, **attributes):
    """A model of one node, which leaves out what is None of its inputs and "" of its outputs."""
    inputs = ["" if array is None else f"x{i}" for i, array in enumerate(arrays)]
    typed = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in zip(inputs, arrays, strict=True)
        if x is not None
    ]
    untyped = [onnx.ValueInfoProto(name=name) for name in outputs if name]
    node = helper.make_node(operator, inputs, outputs, **attributes)
    return helper.make_model(
        helper.make_graph([node], "graph", typed, untyped),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )


def feeds(arrays):
    return {f"x{i}": array for i, array in enumerate(arrays) if array is not None}


def evaluate(operator, opset, arrays, outputs=1, **attributes):
    """What the evaluator makes of a node: one array, or a list of them."""
    model = model_of(operator, opset, arrays, [f"y{i}" for i in range(outputs)], **attributes)
    got = ReferenceEvaluator(model, new_ops=NORM_OPS).run(None, feeds(arrays))
    return got if outputs > 1 else got[0]


def check(got, expected, dtype):
    """Compare with a definition in float64, which is rounded once more: to the output's type."""
    assert got.dtype == dtype
    assert got.shape == np.shape(expected)
    close = ROUNDED_F32 if dtype.itemsize < 8 else CLOSE_F64
    np.testing.assert_allclose(
        got.astype(np.float64),
        expected,
        rtol=close + HALF_AN_ULP.get(dtype.name, 0.0),
        atol=close,
    )


def wide(*arrays):
    return [array.astype(np.float64) for array in arrays]


def batch(rng, shape, dtype):
    return rng.normal(1, 2, shape).astype(dtype)


def parameters(rng, shape, dtype):
    """A scale and a bias."""
    return rng.uniform(0.5, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)


def statistics(rng, shape, dtype):
    """A mean and a variance."""
    return rng.normal(size=shape).astype(dtype), rng.uniform(0.5, 2, shape).astype(dtype)


# ONNX's own tests


@pytest.fixture
def backend(calls):
    """ONNX's runner of backend tests, of an evaluator that must call bnfast once for each node."""
    import onnx.backend.base
    import onnx.backend.test

    class Prepared(onnx.backend.base.BackendRep):
        def __init__(self, model):
            self.evaluator = ReferenceEvaluator(model, new_ops=NORM_OPS)
            self.nodes = sum(node.op_type in NAMES for node in model.graph.node)
            constants = {tensor.name for tensor in model.graph.initializer}  # inputs too, once
            self.inputs = [n for n in self.evaluator.input_names if n not in constants]

        def run(self, inputs, **keywords):
            before = calls()
            outputs = self.evaluator.run(None, dict(zip(self.inputs, inputs, strict=True)))
            assert calls() - before == self.nodes > 0
            return outputs

    class Backend(onnx.backend.base.Backend):
        @classmethod
        def is_compatible(cls, model, device="CPU", **keywords):
            return True

        @classmethod
        def prepare(cls, model, device="CPU", **keywords):
            return Prepared(model)

        @classmethod
        def supports_device(cls, device):
            return device == "CPU"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the making of their data
        yield onnx.backend.test.BackendTest(Backend, __name__)


def test_their_backend_tests(backend, tmp_path, monkeypatch):
    """All that have normalization nodes, and of the large models the two quick ones."""
    monkeypatch.setenv("ONNX_MODELS", str(tmp_path))
    if not ZERO_IS_DEFINED:
        backend.exclude("l2normalization")
    selected = re.compile(
        r"test_(batchnorm|BatchNorm|instancenorm|InstanceNorm|layer_normalization"
        r"|rms_normalization|group_normalization|operator_symbolic_override(?!_nested)|mvn"
        r"|l2normalization|lpnormalization|resnet50|shufflenet)(?!.*expanded).*_cpu$"
    )
    suite = unittest.TestSuite(
        case(name)
        for case in backend.test_cases.values()
        for name in dir(case)
        if selected.match(name)
    )
    result = unittest.TestResult()
    suite.run(result)
    failed = [f"{case}: {text}" for case, text in result.errors + result.failures]
    assert not failed, "\n".join(failed)
    assert len(result.skipped) == (0 if ZERO_IS_DEFINED else 2)
    assert result.testsRun >= 58


def cases_of_onnx():
    """Of every test of theirs whose data are in the package: model, inputs and outputs."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [
            case
            for kind in ("node", "pytorch-converted", "pytorch-operator")
            for case in load_model_tests(kind=kind)
        ]
    for case in cases:
        if case.model is not None:
            for inputs, outputs in case.data_sets:
                yield case.name, case.model, inputs, outputs
            continue
        model = onnx.load(os.path.join(case.model_dir, "model.onnx"))
        for folder in sorted(glob.glob(os.path.join(case.model_dir, "test_data_set_*"))):
            if any(node.op_type in NAMES for node in model.graph.node):
                yield case.name, model, *(arrays_in(folder, what) for what in ("input", "output"))


def arrays_in(folder, what):
    files = sorted(glob.glob(os.path.join(folder, f"{what}_*.pb")))
    return [numpy_helper.to_array(onnx.load_tensor(file)) for file in files]


def test_their_node_cases_to_float32(calls):
    """Closer than their own tests ask for, which take 1e-3."""
    tried = 0
    for name, model, inputs, outputs in cases_of_onnx():
        if not any(node.op_type in NAMES for node in model.graph.node):
            continue
        evaluator = ReferenceEvaluator(model, new_ops=NORM_OPS)
        constants = {tensor.name for tensor in model.graph.initializer}
        names = [n for n in evaluator.input_names if n not in constants]
        before = calls()
        got = evaluator.run(None, dict(zip(names, inputs, strict=True)))
        assert calls() > before or "l1normalization" in name
        for one, expected in zip(got, outputs, strict=True):
            if not ZERO_IS_DEFINED and name.startswith("test_l2"):
                continue
            assert one.dtype == expected.dtype
            np.testing.assert_allclose(
                one, expected, rtol=5 * ROUNDED_F32, atol=5 * ROUNDED_F32, err_msg=name
            )
        tried += 1
    assert tried >= 53


def of_type(model, number):
    """A copy of a model whose float32 inputs and outputs are of another type."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = number
    return copy


@pytest.mark.parametrize("half", ["FLOAT16", "BFLOAT16"])
def test_their_node_cases_in_16_bits(half):
    """Of inputs that are rounded: within one step of what ONNX's evaluator makes in float64."""
    number = getattr(TensorProto, half)
    dtype, tried = helper.tensor_dtype_to_np_dtype(number), 0
    for name, model, inputs, _ in cases_of_onnx():
        operators = [node.op_type for node in model.graph.node]
        if len(operators) > 1 or not NAMES.issuperset(operators) or model.graph.initializer:
            continue
        if not ZERO_IS_DEFINED and name.startswith("test_l2"):
            continue
        if operators == ["MeanVarianceNormalization"]:  # theirs adds a float32 constant to float64
            continue
        rounded = [x.astype(dtype) for x in inputs]
        names = [value.name for value in model.graph.input]
        ours = ReferenceEvaluator(of_type(model, number), new_ops=NORM_OPS)
        theirs = ReferenceEvaluator(of_type(model, TensorProto.DOUBLE))
        got = ours.run(None, dict(zip(names, rounded, strict=True)))
        with np.errstate(invalid="ignore"):  # theirs divides zeros by 0, and leaves the result out
            exact = theirs.run(None, dict(zip(names, wide(*rounded), strict=True)))
        for one, expected in zip(got, exact, strict=True):
            with np.errstate(all="ignore"):
                step = np.spacing(np.abs(np.asarray(expected).astype(one.dtype)))
            error = np.abs(one.astype(np.float64) - expected)
            assert (error <= step.astype(np.float64) + ROUNDED_F32).all(), name
        assert got[0].dtype == dtype
        tried += 1
    assert tried >= 40


# onnxruntime


def by_onnxruntime(model, arrays):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds(arrays))


@pytest.mark.parametrize("opset", range(7, 22))
def test_batch_norm_of_every_opset_is_that_of_onnxruntime(rng, calls, opset):
    arrays = [
        batch(rng, (4, 5, 6, 7), np.float32),
        *parameters(rng, 5, np.float32),
        *statistics(rng, 5, np.float32),
    ]
    model = model_of("BatchNormalization", opset, arrays, ["y"], epsilon=1e-3, momentum=0.8)
    (got,) = ReferenceEvaluator(model, new_ops=NORM_OPS).run(None, feeds(arrays))
    (theirs,) = by_onnxruntime(model, arrays)
    assert calls() == 1
    assert np.abs(got - theirs).max() <= 2e-6


OF_ONNXRUNTIME = {
    "InstanceNormalization": (9, (4, 6, 5, 7), 6, {"epsilon": 1e-3}),
    "LayerNormalization": (17, (4, 6, 5, 7), (5, 7), {"axis": 2}),
    "GroupNormalization": (21, (4, 6, 5, 7), 6, {"num_groups": 3}),
    "RMSNormalization": (23, (4, 6, 5, 7), (7,), {"axis": -1}),
    "LpNormalization": (1, (4, 6, 5, 7), None, {"axis": 1}),
    "MeanVarianceNormalization": (13, (4, 6, 5, 7), None, {"axes": [0, 2, 3]}),
}


@pytest.mark.parametrize("operator", OF_ONNXRUNTIME)
def test_the_others_are_those_of_onnxruntime(rng, calls, operator):
    opset, shape, of_parameters, attributes = OF_ONNXRUNTIME[operator]
    arrays = [batch(rng, shape, np.float32)]
    if of_parameters is not None:
        arrays += parameters(rng, of_parameters, np.float32)[: 1 + (operator[:3] != "RMS")]
    model = model_of(operator, opset, arrays, ["y"], **attributes)
    (got,) = ReferenceEvaluator(model, new_ops=NORM_OPS).run(None, feeds(arrays))
    (theirs,) = by_onnxruntime(model, arrays)
    assert calls() == 1
    assert np.abs(got - theirs).max() <= 2e-6


# Definitions


SHAPES = [(9,), (8, 5), (4, 5, 3), (2, 5, 3, 4), (2, 5, 2, 3, 2)]


def as_channels(x):
    return x.astype(np.float64)[:, np.newaxis] if x.ndim == 1 else x.astype(np.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("opset", [6, *TRAINED_BY_OUTPUTS, *TRAINED_BY_MODE])
def test_batch_norm_in_evaluation(rng, float_type, opset, shape):
    channels = 1 if len(shape) == 1 else shape[1]
    arrays = [
        batch(rng, shape, float_type),
        *parameters(rng, channels, float_type),
        *statistics(rng, channels, float_type),
    ]
    attributes = {"is_test": 1} if opset == 6 else {}
    got = evaluate("BatchNormalization", opset, arrays, epsilon=EPS, **attributes)
    _, scale, bias, mean, var = wide(*arrays)
    expected = reference.scale_shift(as_channels(arrays[0]), mean, var, scale, bias, EPS)
    check(got, expected.reshape(shape), float_type)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("opset", [6, *TRAINED_BY_OUTPUTS, *TRAINED_BY_MODE])
def test_batch_norm_in_training(rng, float_type, opset, shape):
    channels = 1 if len(shape) == 1 else shape[1]
    given = statistics(rng, channels, float_type)
    arrays = [batch(rng, shape, float_type), *parameters(rng, channels, float_type), *given]
    before = [array.copy() for array in arrays]
    attributes = {"training_mode": 1} if opset in TRAINED_BY_MODE else {}
    outputs = 3 if opset in TRAINED_BY_MODE else 5
    got = evaluate(
        "BatchNormalization", opset, arrays, outputs, epsilon=EPS, momentum=0.75, **attributes
    )
    x = as_channels(arrays[0])
    y, mean, _ = reference.batch_norm_forward(x, *wide(*arrays[1:3]), EPS)
    count, _, m2 = reference.moments(x)
    running = [
        0.75 * old.astype(np.float64) + 0.25 * new
        for old, new in zip(given, (mean, m2 / count), strict=True)
    ]
    for one, expected in zip(got, [y.reshape(shape), *running, mean, m2 / count], strict=False):
        check(one, expected, float_type)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_batch_norm_of_opset_6_trains_unless_told_otherwise(rng):
    arrays = [batch(rng, (8, 3), np.float32), *parameters(rng, 3, np.float32)]
    arrays += statistics(rng, 3, np.float32)
    expected, _, _ = reference.batch_norm_forward(*wide(*arrays[:3]))
    check(evaluate("BatchNormalization", 6, arrays), expected, np.dtype(np.float32))


@pytest.mark.parametrize("outputs", [1, 3])
def test_batch_norm_of_elements(rng, outputs):
    """spatial=0, of opsets 1 to 8: every element of a sample is a channel."""
    shape = (5, 2, 3)
    arrays = [batch(rng, (8, *shape), np.float32), *parameters(rng, shape, np.float32)]
    arrays += statistics(rng, shape, np.float32)
    x, *rest = wide(*arrays)
    scale, bias, mean, var = (array.ravel() for array in rest)
    rows = x.reshape(8, -1)
    if outputs == 1:
        expected = [reference.scale_shift(rows, mean, var, scale, bias)]
        got = [evaluate("BatchNormalization", 8, arrays, spatial=0)]
    else:
        y, new_mean, _ = reference.batch_norm_forward(rows, scale, bias)
        expected = [y, 0.9 * mean + 0.1 * new_mean, 0.9 * var + 0.1 * rows.var(0)]
        got = evaluate("BatchNormalization", 8, arrays, outputs, spatial=0)
    for one, wanted in zip(got, expected, strict=True):
        check(one, wanted.reshape(one.shape), np.dtype(np.float32))


def test_batch_norm_of_mixed_types(rng):
    """Since opset 15, scale and statistics have types of their own."""
    half, single, double = (np.dtype(code) for code in "efd")
    arrays = [batch(rng, (6, 4, 3), half), *parameters(rng, 4, single), *statistics(rng, 4, double)]
    y, mean, var = evaluate("BatchNormalization", 15, arrays, 3, training_mode=1)
    expected, new_mean, _ = reference.batch_norm_forward(*wide(*arrays[:3]))
    check(y, expected, half)
    assert mean.dtype == var.dtype == double
    momentum = float(np.float32(0.9))
    np.testing.assert_allclose(
        mean, momentum * arrays[3] + (1 - momentum) * new_mean, rtol=ROUNDED_F32
    )


def test_an_empty_batch_leaves_running_statistics_alone(rng):
    arrays = [np.zeros((0, 3, 2), np.float32), *parameters(rng, 3, np.float32)]
    arrays += statistics(rng, 3, np.float32)
    y, mean, var = evaluate("BatchNormalization", 15, arrays, 3, training_mode=1)
    assert y.shape == (0, 3, 2)
    np.testing.assert_allclose((mean, var), arrays[3:], rtol=ROUNDED_F32 / 10)


@pytest.mark.parametrize("opset", [1, 6, 22])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (2, 5, 3, 4)], ids=str)
def test_instance_norm(rng, float_type, opset, shape):
    arrays = [batch(rng, shape, float_type), *parameters(rng, 5, float_type)]
    got = evaluate("InstanceNormalization", opset, arrays, epsilon=EPS)
    expected, _, _ = reference.group_norm_forward(*wide(arrays[0]), 5, *wide(*arrays[1:]), EPS)
    check(got, expected, float_type)


@pytest.mark.parametrize("num_groups", [1, 2, 6])
@pytest.mark.parametrize("opset", [18, 20, 21, 22])
def test_group_norm_has_parameters_of_groups_before_opset_21(rng, float_type, opset, num_groups):
    of_parameters = 6 if opset >= 21 else num_groups
    arrays = [batch(rng, (3, 6, 4, 2), float_type), *parameters(rng, of_parameters, float_type)]
    got = evaluate("GroupNormalization", opset, arrays, num_groups=num_groups, epsilon=EPS)
    x, *affine = wide(*arrays)
    scale, bias = (np.repeat(array, 6 // of_parameters) for array in affine)
    expected, _, _ = reference.group_norm_forward(x, num_groups, scale, bias, EPS)
    check(got, expected, float_type)


# Parameters of rows that are (3, 4, 5), or their ends: some are the same for all rows, some not.
OF_ROWS = [
    (),
    (1,),
    (5,),
    (4, 5),
    (4, 1),
    (1, 1, 5),
    (3, 4, 5),
    (3, 1, 1),
    (2, 3, 4, 5),
    (2, 1, 1, 1),
]


@pytest.mark.parametrize("of_parameters", OF_ROWS, ids=str)
@pytest.mark.parametrize("axis", [-4, -1, 1, 2])
def test_layer_norm_with_parameters_that_broadcast(rng, float_type, axis, of_parameters):
    x = batch(rng, (2, 3, 4, 5), float_type)
    scale, bias = parameters(rng, of_parameters, float_type)
    axes = tuple(range(axis % 4, 4))
    plain, mean, invstd = reference.layer_norm_forward(*wide(x), axes, eps=EPS)
    for shift in (bias, bias.ravel()[:1].reshape(()), None):
        got = evaluate("LayerNormalization", 17, [x, scale, shift], 3, axis=axis, epsilon=EPS)
        expected = plain * scale.astype(np.float64)
        expected += 0 if shift is None else shift.astype(np.float64)
        check(got[0], expected, float_type)
        for one, statistic in zip(got[1:], (mean, invstd), strict=True):
            kept = (*x.shape[: axis % 4], *(1 for _ in axes))
            check(one, statistic.reshape(kept), np.dtype(np.float32))


@pytest.mark.parametrize("stash_type", ["FLOAT", "BFLOAT16", "DOUBLE"])
def test_the_stash_type_is_that_of_the_statistics(rng, stash_type):
    number = getattr(TensorProto, stash_type)
    x = batch(rng, (6, 5), np.float16)
    arrays = [x, np.ones(5, np.float16)]
    y, mean, invstd = evaluate("LayerNormalization", 17, [*arrays, None], 3, stash_type=number)
    assert y.dtype == np.float16
    assert mean.dtype == invstd.dtype == helper.tensor_dtype_to_np_dtype(number)
    exact = x.astype(np.float64).mean(1, keepdims=True)
    np.testing.assert_allclose(mean.astype(np.float64), exact, rtol=HALF_AN_ULP["bfloat16"])


@pytest.mark.parametrize("of_scale", OF_ROWS, ids=str)
@pytest.mark.parametrize("axis", [-4, -1, 1, 2])
def test_rms_norm_with_a_scale_that_broadcasts(rng, float_type, axis, of_scale):
    x = batch(rng, (2, 3, 4, 5), float_type)
    scale, _ = parameters(rng, of_scale, float_type)
    axes = tuple(range(axis % 4, 4))
    plain, _, _ = reference.layer_norm_forward(*wide(x), axes, eps=EPS, centred=False)
    got = evaluate("RMSNormalization", 23, [x, scale], axis=axis, epsilon=EPS)
    check(got, plain * scale.astype(np.float64), float_type)


@pytest.mark.parametrize("scale_type", DTYPES, ids=str)
def test_rms_norm_is_of_the_type_of_its_scale(rng, float_type, scale_type):
    x = batch(rng, (4, 5), float_type)
    scale, _ = parameters(rng, 5, scale_type)
    plain, _, _ = reference.layer_norm_forward(*wide(x), (1,), eps=EPS, centred=False)
    got = evaluate("RMSNormalization", 23, [x, scale], epsilon=EPS)
    check(got, plain * scale.astype(np.float64), scale_type)


@pytest.mark.parametrize("opset", [1, 22])
@pytest.mark.parametrize("axis", [-1, 0, 1, 2])
@pytest.mark.parametrize("p", [1, 2])
def test_lp_norm(rng, float_type, p, axis, opset):
    x = batch(rng, (3, 4, 5), float_type)
    x[:, 0, 0] = 0
    x[0, :, 1] = 0
    x[1, 1, :] = 0
    got = evaluate("LpNormalization", opset, [x], axis=axis, p=p)
    exact = x.astype(np.float64)
    norm = np.linalg.norm(exact, p, axis, keepdims=True)
    check(got, np.divide(exact, norm, out=np.zeros(x.shape), where=norm > 0), float_type)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lp_norm_of_values_whose_squares_leave_float32(rng, scale):
    x = (scale * rng.normal(size=(3, 7))).astype(np.float32)
    exact = x.astype(np.float64)
    expected = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    check(evaluate("LpNormalization", 22, [x]), expected, np.dtype(np.float32))


@pytest.mark.parametrize("opset", [9, 13])
@pytest.mark.parametrize("axes", [None, [0], [1], [3, 1], [0, 1], [0, 1, 2, 3], [2, 3]], ids=str)
def test_mean_variance_norm(rng, float_type, axes, opset):
    x = batch(rng, (4, 3, 2, 5), float_type)
    attributes = {} if axes is None else {"axes": axes}
    got = evaluate("MeanVarianceNormalization", opset, [x], **attributes)
    over = (0, 2, 3) if axes is None else tuple(axes)
    exact = x.astype(np.float64)
    centred = exact - exact.mean(over, keepdims=True)
    check(got, centred / (exact.std(over, keepdims=True) + 1e-9), float_type)


def test_mean_variance_norm_far_from_zero_and_of_a_constant(rng):
    x = rng.normal(1e4, 1, (8, 2, 4, 4)).astype(np.float32)
    x[:, 1] = 1e4
    exact = x.astype(np.float64)
    std = exact.std((0, 2, 3), keepdims=True)
    expected = (exact - exact.mean((0, 2, 3), keepdims=True)) / (std + 1e-9)
    got = evaluate("MeanVarianceNormalization", 13, [x])
    check(got, expected, np.dtype(np.float32))
    assert (got[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("operator", "opset", "attributes"),
    [
        ("BatchNormalization", 15, {"training_mode": 1}),
        ("InstanceNormalization", 6, {}),
        ("GroupNormalization", 21, {"num_groups": 3}),
        ("LayerNormalization", 17, {"axis": 1}),
    ],
)
def test_an_epsilon_of_0_gives_constants_their_bias(rng, operator, opset, attributes):
    x = np.full((4, 3, 5), 7.0, np.float32)
    of_parameters = (3, 1) if operator == "LayerNormalization" else 3
    scale, bias = parameters(rng, of_parameters, np.float32)
    arrays = [x, scale, bias]
    if operator == "BatchNormalization":
        arrays += statistics(rng, 3, np.float32)
    got = evaluate(operator, opset, arrays, epsilon=0.0, **attributes)
    np.testing.assert_array_equal(got, np.broadcast_to(bias.reshape(3, 1), x.shape))


# Places of a node in a model


IN_A_FUNCTION = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
main (float[N, 3] x, float[3] ones) => (float[N, 3] y) { y = own.scaled <e = 0.5> (x, ones) }
<domain: "own", opset_import: ["" : 17]>
scaled <e> (x, scale) => (y) { y = LayerNormalization <epsilon: float = @e> (x, scale) }"""


def test_a_node_of_a_function_once_that_is_inlined(rng, calls):
    x, ones = batch(rng, (4, 3), np.float32), np.ones(3, np.float32)
    model = inliner.inline_local_functions(parser.parse_model(IN_A_FUNCTION))
    evaluator = ReferenceEvaluator(model, new_ops=NORM_OPS)
    (got,) = evaluator.run(None, {"x": x, "ones": ones})
    expected, _, _ = reference.layer_norm_forward(*wide(x), (1,), eps=0.5)
    check(got, expected, np.dtype(np.float32))
    assert calls() == 1


IN_A_BRANCH = """<ir_version: 8, opset_import: ["" : 9]>
main (float[N, 3] x, float[3] one, float[3] zero, bool flag) => (float[N, 3] y) {
  y = If (flag) <
    then_branch = then () => (float[N, 3] a) { a = BatchNormalization (x, one, zero, zero, one) },
    else_branch = other () => (float[N, 3] b) { b = Identity (x) }
  >
}"""


def test_a_node_of_a_branch(rng, calls):
    x = batch(rng, (4, 3), np.float32)
    arrays = {"x": x, "one": np.ones(3, np.float32), "zero": np.zeros(3, np.float32)}
    evaluator = ReferenceEvaluator(parser.parse_model(IN_A_BRANCH), new_ops=NORM_OPS)
    (got,) = evaluator.run(None, {**arrays, "flag": np.array(True)})
    np.testing.assert_allclose(got, x / np.sqrt(1 + 1e-5), rtol=ROUNDED_F32)
    assert calls() == 1
    (got,) = evaluator.run(None, {**arrays, "flag": np.array(False)})
    np.testing.assert_array_equal(got, x)


LEAVES_OUT_AN_OUTPUT = """<ir_version: 8, opset_import: ["" : 17]>
main (float[N, 3] x, float[3] ones) => (float[N, 3] y, float[N, 1] invstd) {
  a, , invstd = LayerNormalization (x, ones)
  y = Clip (a, , zero)
}"""


def test_an_output_that_is_left_out_is_no_input_of_others(rng):
    model = parser.parse_model(LEAVES_OUT_AN_OUTPUT)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "zero"))
    x, ones = batch(rng, (4, 3), np.float32), np.ones(3, np.float32)
    got, invstd = ReferenceEvaluator(model, new_ops=NORM_OPS).run(None, {"x": x, "ones": ones})
    y, _, expected = reference.layer_norm_forward(*wide(x), (1,))
    check(got, np.minimum(y, 0), np.dtype(np.float32))
    check(invstd, expected.reshape(4, 1), np.dtype(np.float32))


# What is refused


def refused(rng):
    x = batch(rng, (4, 3, 2), np.float32)
    scale, bias = parameters(rng, 3, np.float32)
    few, _ = parameters(rng, 2, np.float32)
    return {
        "p must be 1 or 2, got 3": ("LpNormalization", 1, [x], {"p": 3}),
        "axis must be an axis of x, which has 3, got 3": ("LpNormalization", 1, [x], {"axis": 3}),
        "axis must be an axis of x, which has 3, got -4": (
            *("LayerNormalization", 17, [x, scale]),
            {"axis": -4},
        ),
        "axis must be an axis of x, which has 3, got 5": (
            *("MeanVarianceNormalization", 13, [x]),
            {"axes": [0, 5]},
        ),
        "stash_type must be a float type, got 7": (
            *("LayerNormalization", 17, [x, few]),
            {"stash_type": 7},
        ),
        "weight must have one value for each of the 3 channels": (
            "InstanceNormalization",
            6,
            [x, few, bias],
            {},
        ),
        "running_mean must have one value for each of the 3 channels": (
            *("BatchNormalization", 9, [x, scale, bias, few, scale]),
            {},
        ),
        "num_groups": ("GroupNormalization", 21, [x, scale, bias], {"num_groups": 2}),
        "could not be broadcast": ("LayerNormalization", 17, [x, scale], {}),
        "non-broadcastable": ("RMSNormalization", 23, [x[:1], np.ones((4, 1, 1), np.float32)], {}),
    }


@pytest.mark.parametrize("message", refused(np.random.default_rng(0)))
def test_what_a_node_cannot_be_is_said(rng, message):
    operator, opset, arrays, attributes = refused(rng)[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate(operator, opset, arrays, **attributes)


def test_the_example_of_the_documentation_runs():
    failed, tried = doctest.testmod(integration)
    assert (failed, tried > 0) == (0, True)


def test_without_onnx_the_command_that_installs_it_is_named():
    code = "import sys; sys.modules['onnx'] = None; import bnfast.integrations.onnx"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "python -m pip install onnx" in done.stderr
