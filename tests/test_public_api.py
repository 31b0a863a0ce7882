"""Names, signatures and documentation."""

import doctest
import importlib
import importlib.resources
import inspect
import re

import numpy as np
import pytest

import bnfast
from bnfast import _core, functional

MODULES = [
    "bnfast.distributed.communicators",
    "bnfast._configuration",
    "bnfast._conventions",
    "bnfast._memory",
    "bnfast._threads",
    "bnfast.adaptation.monitor",
    "bnfast.adaptation.recalibration",
    "bnfast.folding",
    "bnfast.functional.batch",
    "bnfast.functional.conditional",
    "bnfast.functional.cross_iteration",
    "bnfast.functional.ghost",
    "bnfast.functional.moving_average",
    "bnfast.functional.renorm",
    "bnfast.functional.response",
    "bnfast.functional.rows",
    "bnfast.functional.samples",
    "bnfast.functional.spectral",
    "bnfast.functional.standardization",
    "bnfast.functional.weight_norm",
    "bnfast.functional.whitening",
    "bnfast.layers._layer",
    "bnfast.layers.batch",
    "bnfast.layers.conditional",
    "bnfast.layers.cross_iteration",
    "bnfast.layers.ghost",
    "bnfast.layers.moving_average",
    "bnfast.layers.renorm",
    "bnfast.layers.response",
    "bnfast.layers.rows",
    "bnfast.layers.samples",
    "bnfast.layers.spectral",
    "bnfast.layers.standardization",
    "bnfast.layers.weight_norm",
    "bnfast.layers.whitening",
    "bnfast.running_averages",
    "bnfast.statistics",
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_documentation_run(name):
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0


def test_all_names_are_there_and_documented():
    for name in bnfast.__all__:
        thing = getattr(bnfast, name)
        if name != "__version__":
            assert inspect.getdoc(thing)


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (
            bnfast.batch_norm,
            "x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, "
            "eps=1e-05, *, axis=1, unbiased=True, activation=None, negative_slope=0.01, "
            "residual=None, mask=None, lengths=None, padding='zeros', out=None",
        ),
        (
            bnfast.batch_norm_forward,
            "x, weight=None, bias=None, eps=1e-05, *, axis=1, running_mean=None, running_var=None, "
            "momentum=0.1, unbiased=True, activation=None, negative_slope=0.01, residual=None, "
            "mask=None, lengths=None, padding='zeros', out=None",
        ),
        (bnfast.batch_norm_backward_sums, "dy, x, mean, invstd, *, axis=1"),
        (
            bnfast.batch_norm_backward_input,
            "dy, x, mean, invstd, weight, sum_dy, sum_dy_xhat, count, *, axis=1, out=None",
        ),
        (
            bnfast.batch_norm_backward,
            "dy, x, mean, invstd, weight=None, *, axis=1, training=True, bias=None, "
            "activation=None, negative_slope=0.01, residual=None, y=None, mask=None, "
            "lengths=None, padding='zeros', out=None",
        ),
        (bnfast.batch_norm_jvp, "dx, x, mean, invstd, weight=None, *, axis=1, training=True"),
        (
            bnfast.batch_norm_double_backward,
            "ddx, ddweight, ddbias, dy, x, mean, invstd, weight=None, *, axis=1, training=True",
        ),
        (
            bnfast.layer_norm_double_backward,
            "ddx, ddweight, ddbias, dy, x, normalized_shape, mean, invstd, weight=None, *, "
            "axis=None",
        ),
        (bnfast.moments, "x, axis=1, *, where=None"),
        (bnfast.summary, "x, axis=1, *, where=None, finite=False"),
        (
            bnfast.instance_norm,
            "x, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, "
            "momentum=0.1, eps=1e-05, *, axis=1, activation=None, negative_slope=0.01, "
            "residual=None, mask=None, lengths=None, padding='zeros', out=None",
        ),
        (
            bnfast.group_norm,
            "x, num_groups, weight=None, bias=None, eps=1e-05, *, axis=1, per_group=False, "
            "activation=None, negative_slope=0.01, residual=None, mask=None, lengths=None, "
            "padding='zeros', out=None",
        ),
        (
            bnfast.layer_norm,
            "x, normalized_shape, weight=None, bias=None, eps=1e-05, *, axis=None, "
            "activation=None, negative_slope=0.01, residual=None, out=None",
        ),
        (
            bnfast.rms_norm,
            "x, normalized_shape, weight=None, eps=None, *, axis=None, "
            "activation=None, negative_slope=0.01, residual=None, out=None",
        ),
        (
            bnfast.BatchNorm,
            "num_features, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, *, "
            f"axis=1, unbiased=True, dtype={np.float32!r}, frozen=False, nonfinite='propagate', "
            "activation=None, negative_slope=0.01, inplace=False",
        ),
        (
            bnfast.conditional_batch_norm,
            "x, weight, bias, running_mean=None, running_var=None, training=False, momentum=0.1, "
            "eps=1e-05, *, axis=1, unbiased=True, out=None",
        ),
        (
            bnfast.conditional_batch_norm_forward,
            "x, weight, bias, eps=1e-05, *, axis=1, out=None",
        ),
        (
            bnfast.conditional_batch_norm_backward,
            "dy, x, mean, invstd, weight=None, *, axis=1, training=True, out=None",
        ),
        (
            bnfast.ConditionalBatchNorm,
            "num_features, num_classes, eps=1e-05, momentum=0.1, track_running_stats=True, *, "
            f"axis=1, unbiased=True, dtype={np.float32!r}, frozen=False, nonfinite='propagate'",
        ),
        (
            bnfast.decorrelated_batch_norm,
            "x, running_mean=None, running_matrix=None, weight=None, bias=None, training=False, "
            "momentum=0.1, eps=1e-05, *, num_groups=1, averaged='whitening', axis=1, out=None",
        ),
        (
            bnfast.iterative_norm,
            "x, running_mean=None, running_matrix=None, weight=None, bias=None, training=False, "
            "momentum=0.1, eps=1e-05, *, iterations=5, num_groups=1, averaged='whitening', axis=1, "
            "out=None",
        ),
        (
            bnfast.moving_average_batch_norm,
            "x, running_var, square_buffer=None, weight=None, bias=None, training=False, "
            "momentum=0.02, eps=1e-05, *, row=0, averaged=True, r_max=5.0, axis=1, out=None",
        ),
        (
            bnfast.moving_average_batch_norm_backward,
            "dy, x, saved, gradient_buffer, weight=None, *, axis=1, out=None",
        ),
        (
            bnfast.MovingAverageBatchNorm,
            "num_features, buffer_size=16, eps=1e-05, momentum=0.02, affine=True, *, warm_up=100, "
            f"renormalized_from=1000, r_max=5.0, axis=1, dtype={np.float32!r}, "
            "frozen=False, nonfinite='propagate'",
        ),
        (
            bnfast.cross_iteration_batch_norm,
            "x, running_mean, running_var, filters=None, window=(), weight=None, bias=None, "
            "training=False, momentum=0.1, eps=1e-05, *, axis=1, unbiased=True, out=None",
        ),
        (
            bnfast.cross_iteration_batch_norm_forward,
            "x, filters=None, window=(), weight=None, bias=None, eps=1e-05, *, axis=1, out=None",
        ),
        (
            bnfast.cross_iteration_batch_norm_backward,
            "dy, x, saved, weight=None, *, axis=1, out=None",
        ),
        (
            bnfast.CrossIterationBatchNorm,
            "filter_shape, window=4, eps=1e-05, momentum=0.1, affine=True, *, burn_in=0, stride=1, "
            f"padding=0, dilation=1, groups=1, axis=1, unbiased=True, dtype={np.float32!r}, "
            "frozen=False, nonfinite='propagate'",
        ),
        (bnfast.weight_centralization_forward, "w, axis=0, *, out=None"),
        (bnfast.weight_norm_forward, "v, g, dim=0, eps=0.0, *, out=None"),
        (bnfast.weight_norm_backward, "dw, v, g, norm, dim=0, eps=0.0, *, out=None"),
        (
            bnfast.weight_standardization_forward,
            "w, gain=None, eps=1e-05, *, axis=0, eps_inside=True, unbiased=False, out=None",
        ),
        (
            bnfast.weight_standardization_backward,
            "dy, w, mean, std, gain=None, eps=1e-05, *, axis=0, eps_inside=True, unbiased=False, "
            "out=None",
        ),
        (
            bnfast.scaled_weight_standardization_forward,
            "w, gain=None, gamma=1.0, eps=0.0001, *, axis=0, floor=True, out=None",
        ),
        (
            bnfast.scaled_weight_standardization_backward,
            "dy, w, mean, std, gain=None, gamma=1.0, eps=0.0001, *, axis=0, floor=True, out=None",
        ),
        (
            bnfast.spectral_norm_forward,
            "w, u, v, n_power_iterations=1, eps=1e-12, *, dim=0, v_first=False, out=None",
        ),
        (bnfast.spectral_norm_backward, "dy, w, sigma, u, v, eps=1e-12, *, dim=0, out=None"),
        (bnfast.recalibrating, "layers, *, method='pooled', prior=None"),
        (bnfast.monitoring, "layers"),
        (bnfast.set_num_threads, "num_threads"),
        (bnfast.get_num_threads, ""),
        (bnfast.set_output_pool_limit, "limit"),
        (bnfast.get_output_pool_limit, ""),
        (bnfast.available_isas, ""),
        (bnfast.show_config, "mode='stdout'"),
    ],
)
def test_signatures(function, signature):
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(bare)) == f"({signature})"


def test_every_operation_has_a_forward_and_a_backward():
    other = {"moments", "summary", "batch_norm_backward_sums", "batch_norm_backward_input"}
    functions = [
        name
        for name in functional.__all__
        if name[0].islower() and name not in other and not name.endswith(("jvp", "double_backward"))
    ]
    assert set(functions) <= set(bnfast.__all__)
    operations = {re.sub("_(forward|backward)$", "", name) for name in functions}
    forms = {f"{name}{form}" for name in operations for form in ("", "_forward", "_backward")}
    assert set(functions) == forms
    for name in operations:
        plain, forward = (
            list(inspect.signature(getattr(bnfast, f"{name}{form}")).parameters)
            for form in ("", "_forward")
        )
        assert set(forward) <= set(plain)
        assert "out" in forward


def test_the_stub_names_what_the_core_has():
    text = (importlib.resources.files("bnfast") / "_core.pyi").read_text()
    named = set(re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", text, re.MULTILINE))
    there = {name for name in vars(_core) if name[0] != "_" and callable(getattr(_core, name))}
    assert named == there


def test_show_config_as_data():
    config = bnfast.show_config(mode="dicts")
    assert config["bnfast"]["version"] == bnfast.__version__
    assert config["instruction sets"]["active"] in config["instruction sets"]["available"]
    assert set(config["build"]["flags"]) == set(config["instruction sets"]["built"])
    assert config["threads"]["used for large work"] == bnfast.get_num_threads()
    assert set(config["environment"]) == {
        "BNFAST_ISA",
        "BNFAST_NUM_THREADS",
        "BNFAST_OUTPUT_POOL_LIMIT",
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
    }


def test_show_config_prints(capsys):
    assert bnfast.show_config() is None
    printed = capsys.readouterr().out
    for word in (bnfast.__version__, "compiler", "active", "OpenMP", "threads", "caches"):
        assert word in printed
