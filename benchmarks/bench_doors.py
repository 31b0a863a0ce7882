"""What bnfast gains within other libraries: the table of docs/README.md.

``python benchmarks/bench_doors.py`` measures and prints it, and writes it with ``--write``. Each
library is measured in a process of its own, with one thread, in CPU time where nothing else is said
in its benchmark; pytest runs the quick measurements once.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import bench_integrations
from bench_integrations import in_turn
from bnfast._cli.bench.run import machine
from make_tables import DOCS, filled, write_between
from statistics_of_arrays import table

os.environ["KERAS_BACKEND"] = "numpy"


def times_as_fast(calls, turns, theirs, ours):
    times = in_turn(calls, turns, time.process_time)
    return f"{times[theirs] / times[ours]:.1f}"


def keras(turns):
    """Batch norm layers within a network, at batch 8, and the network."""
    import bench_keras

    name = "DenseNet121" if turns > 1 else "8 blocks with group norm"
    line = bench_keras.model_times(name, bench_keras.MODELS[name], 8, turns)
    return f"{line[7]} (in {name})", f"{line[4]} (`predict`)"


def torch(turns):
    """Batch norm layers within a network in training, and the step."""
    import bench_torch

    bench_torch.torch.set_num_threads(1)
    bench_torch.clock()
    layers, steps = [], []
    for layout in bench_torch.FORMATS:
        found = bench_torch.measure(
            "ResNet-18", layout, *((16, 112) if turns > 1 else (2, 32)), turns
        )
        stock, ours = found["PyTorch, clocked"], found["bnfast"]
        layers.append(f"{sum(stock[1:]) / sum(ours[1:]):.2f}")
        steps.append(f"{found['PyTorch'][0] / ours[0]:.2f}")
    return (
        f"{layers[0]} NCHW, {layers[1]} channels_last (in ResNet-18)",
        f"{steps[0]}, {steps[1]} (a step)",
    )


def autograd(turns):
    """Value and gradient of batch norm."""
    calls = bench_integrations.autograd_calls()
    return times_as_fast(calls, turns, "the formula", "bnfast batch_norm"), "—"


def thinc(turns):
    """LayerNorm forward and backward, and a step of an encoder."""
    layer = bench_integrations.thinc_calls()
    encoder = bench_integrations.encoder_calls()
    return (
        times_as_fast(layer, 10 * turns, "thinc LayerNorm", "bnfast LayerNorm"),
        f"{times_as_fast(encoder, turns, 'thinc encoder', 'bnfast encoder')} (a step)",
    )


def dask(turns):
    """Standard deviations of columns."""
    x = bench_integrations.table(1_000_000 if turns > 1 else 1000)
    calls = bench_integrations.dask_calls(x, 1)
    return times_as_fast(calls, turns, "da.std", "bnfast moments"), "—"


def sklearn(turns):
    """StandardScaler's fit."""
    x = bench_integrations.table(1_000_000 if turns > 1 else 1000)
    calls = bench_integrations.scaler_calls(x)
    return times_as_fast(calls, turns, "scikit-learn fit", "bnfast fit"), "—"


def onnx(turns):
    """The largest error of the reference evaluator's batch norm at opset 9."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    from bnfast.integrations.onnx import NORM_OPS

    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 4, 5, 5)).astype(np.float32)
    names = ("scale", "bias", "mean", "var")
    statistics = dict(zip(names, rng.uniform(0.5, 2, (4, 4)).astype(np.float32), strict=True))
    value = helper.make_tensor_value_info
    inputs = [value("x", 1, x.shape), *(value(name, 1, (4,)) for name in names)]
    node = helper.make_node("BatchNormalization", ["x", *names], ["y"])
    graph = helper.make_graph([node], "one", inputs, [value("y", 1, x.shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=8)
    scale, bias, mean, var = (
        statistics[name].astype(np.float64).reshape(-1, 1, 1) for name in names
    )
    exact = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    errors = [
        np.abs(
            ReferenceEvaluator(model, new_ops=new).run(None, {"x": x, **statistics})[0] - exact
        ).max()
        for new in (None, NORM_OPS)
    ]
    return f"error at opset 9: {errors[1]:.0e} instead of {errors[0]:.1f}", "—"


# The page, the packages whose versions are told, what bnfast computes, and what the library does.
DOORS = {
    keras: (
        "[Keras on NumPy](keras.md)",
        ["keras"],
        "batch, layer, group, RMS and unit norm",
        "masks and renorm in training, half precision",
    ),
    torch: (
        "[PyTorch](pytorch.md)",
        ["torch"],
        "batch norm in training; group, instance, RMS norm",
        "layer norm; evaluation; what is compiled; half precision",
    ),
    autograd: (
        "[autograd](autograd.md)",
        ["autograd"],
        "five normalizations, of any order",
        "—",
    ),
    thinc: ("[thinc](autograd.md#thinc)", ["thinc"], "LayerNorm", "GPUs, other types"),
    onnx: (
        "[ONNX, reference evaluator](onnx.md)",
        ["onnx"],
        "all normalizations of opsets 1 to 23",
        "—",
    ),
    dask: ("[Dask](data_sets.md)", ["dask"], "statistics, normalization", "—"),
    sklearn: (
        "[scikit-learn](data_sets.md)",
        ["scikit-learn"],
        "`StandardScaler`",
        "sparse matrices, weights",
    ),
}


def measured(door, turns):
    """Return what a door gains, of a layer and of a model: measured in a process of its own."""
    command = [sys.executable, __file__, "--door", door.__name__, "--turns", str(turns)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return json.loads(done.stdout.splitlines()[-1])


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "BNFAST_NUM_THREADS": "1",
}


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def bench_door(benchmark, door):
    for package in DOORS[door][1]:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed")
    assert len(benchmark.pedantic(lambda: measured(door, 1), rounds=1)) == 2


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/README.md")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--door", choices=[door.__name__ for door in DOORS], help="this one alone")
    options = parser.parse_args()
    if options.door:
        (door,) = (door for door in DOORS if door.__name__ == options.door)
        print(json.dumps(door(options.turns)))
        return
    lines = []
    for door, (page, packages, ours, theirs) in DOORS.items():
        versions = " ".join(map(importlib.metadata.version, packages))
        lines.append([f"{page} {versions}", ours, theirs, *measured(door, options.turns)])
    headings = ["library", "bnfast computes", "left to the library"]
    headings += ["times as fast: layers", "whole models"]
    here = machine()
    about = filled(
        f"{here['cpu']}, {here['instruction set']}, one thread, float32 (autograd: float64)."
    )
    parts = [table(headings, 5, lines), about]
    if options.write:
        write_between(DOCS / "README.md", "doors", parts)
    else:
        print(*parts, sep="\n\n")


if __name__ == "__main__":
    main()
