"""Calls so small that nothing but the call is measured: rows of 64 channels, a batch of two."""

import subprocess
import sys

import numpy as np
import pytest

import bnfast
from bnfast._cli.bench.rivals import numpy_formulas

pytestmark = pytest.mark.benchmark(max_time=0.3, group="call overhead and import")

X = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
OUT = np.empty_like(X)
MEAN, VAR, WEIGHT, BIAS = np.random.default_rng(0).uniform(0.5, 1, (4, 64)).astype(np.float32)


def bench_inference(benchmark):
    benchmark(bnfast.batch_norm, X, MEAN, VAR, WEIGHT, BIAS)


def bench_inference_out(benchmark):
    benchmark(lambda: bnfast.batch_norm(X, MEAN, VAR, WEIGHT, BIAS, out=OUT))


def bench_inference_numpy(benchmark):
    benchmark(numpy_formulas.batch_norm_inference, X, MEAN, VAR, WEIGHT, BIAS)


def bench_training(benchmark):
    benchmark(bnfast.batch_norm_forward, X, WEIGHT, BIAS)


def bench_training_with_running_statistics(benchmark):
    mean, var = MEAN.copy(), VAR.copy()
    benchmark(lambda: bnfast.batch_norm(X, mean, var, WEIGHT, BIAS, training=True))


def bench_training_numpy(benchmark):
    benchmark(numpy_formulas.batch_norm_forward, X, WEIGHT, BIAS)


def bench_layer_inference(benchmark):
    layer = bnfast.BatchNorm(64).eval()
    benchmark(layer, X)


def bench_multiply_add_numpy(benchmark):
    benchmark(lambda: X * WEIGHT + BIAS)


# The family: forward and backward into memory that is there. Planes of 2 x 2, filters of 16.
IMAGES = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 4, 2, 2)
WRITTEN = np.empty_like(IMAGES)
FEW_WEIGHT, FEW_BIAS = WEIGHT[:4].copy(), BIAS[:4].copy()
OF_SAMPLES = np.ones((2, 4), np.float32)
FILTERS = np.linspace(-1, 1, 128, dtype=np.float32).reshape(8, 16)
OF_FILTERS = np.ones(8, np.float32)


def family():
    """Each member's name: forward and backward, as functions of `out`."""
    f, dy = bnfast, IMAGES
    parameters = FEW_WEIGHT, FEW_BIAS
    batch = f.batch_norm_forward(IMAGES, *parameters)[1:]
    sums = f.batch_norm_backward_sums(dy, IMAGES, *batch)
    count = IMAGES.size // FEW_WEIGHT.size
    tracks = {"running_mean": np.zeros(4, np.float32), "running_var": np.ones(4, np.float32)}
    instance = f.instance_norm_forward(IMAGES, *parameters)[1:]
    group = f.group_norm_forward(IMAGES, 2, *parameters)[1:]
    response = f.filter_response_norm_forward(IMAGES, *parameters)[1]
    conditional = f.conditional_batch_norm_forward(IMAGES, OF_SAMPLES, OF_SAMPLES)[1:]
    ghost = f.ghost_batch_norm_forward(IMAGES, 2, *parameters)[1:]
    running = np.zeros(4, np.float32), np.ones(4, np.float32)
    renorm = f.batch_renorm_forward(IMAGES, *running, *parameters)[1]
    lengths = f.weight_norm_forward(FILTERS, OF_FILTERS)[1]
    standard = f.weight_standardization_forward(FILTERS)[1:]
    layer = f.layer_norm_forward(X, 64, WEIGHT, BIAS)[1:]
    rms = f.rms_norm_forward(X, 64, WEIGHT)[1]
    return {
        "batch": (
            lambda out: f.batch_norm_forward(IMAGES, *parameters, out=out),
            lambda out: f.batch_norm_backward(dy, IMAGES, *batch, FEW_WEIGHT, out=out),
        ),
        "batch, tracking and in halves": (
            lambda out: f.batch_norm_forward(IMAGES, *parameters, **tracks, out=out),
            lambda out: (
                f.batch_norm_backward_sums(dy, IMAGES, *batch),
                f.batch_norm_backward_input(dy, IMAGES, *batch, FEW_WEIGHT, *sums, count, out=out),
            ),
        ),
        "instance": (
            lambda out: f.instance_norm_forward(IMAGES, *parameters, out=out),
            lambda out: f.instance_norm_backward(dy, IMAGES, *instance, FEW_WEIGHT, out=out),
        ),
        "group": (
            lambda out: f.group_norm_forward(IMAGES, 2, *parameters, out=out),
            lambda out: f.group_norm_backward(dy, IMAGES, *group, FEW_WEIGHT, out=out),
        ),
        "filter response": (
            lambda out: f.filter_response_norm_forward(IMAGES, *parameters, FEW_BIAS, out=out),
            lambda out: f.filter_response_norm_backward(
                dy, IMAGES, response, *parameters, FEW_BIAS, out=out
            ),
        ),
        "conditional": (
            lambda out: f.conditional_batch_norm_forward(IMAGES, OF_SAMPLES, OF_SAMPLES, out=out),
            lambda out: f.conditional_batch_norm_backward(
                dy, IMAGES, *conditional, OF_SAMPLES, out=out
            ),
        ),
        "ghost": (
            lambda out: f.ghost_batch_norm_forward(IMAGES, 2, *parameters, out=out),
            lambda out: f.ghost_batch_norm_backward(dy, IMAGES, 2, *ghost, FEW_WEIGHT, out=out),
        ),
        "renormalized": (
            lambda out: f.batch_renorm_forward(IMAGES, *running, *parameters, out=out),
            lambda out: f.batch_renorm_backward(dy, IMAGES, renorm, FEW_WEIGHT, out=out),
        ),
        "weight": (
            lambda out: f.weight_norm_forward(FILTERS, OF_FILTERS, out=out),
            lambda out: f.weight_norm_backward(FILTERS, FILTERS, OF_FILTERS, lengths, out=out),
        ),
        "standardized weight": (
            lambda out: f.weight_standardization_forward(FILTERS, out=out),
            lambda out: f.weight_standardization_backward(FILTERS, FILTERS, *standard, out=out),
        ),
        "layer": (
            lambda out: f.layer_norm_forward(X, 64, WEIGHT, BIAS, out=out),
            lambda out: f.layer_norm_backward(X, X, 64, *layer, WEIGHT, out=out),
        ),
        "rms": (
            lambda out: f.rms_norm_forward(X, 64, WEIGHT, out=out),
            lambda out: f.rms_norm_backward(X, X, 64, rms, WEIGHT, out=out),
        ),
    }


MEMBERS = family()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("member", MEMBERS)
def bench_member(benchmark, member, backward):
    of_rows, of_filters = member in ("layer", "rms"), member.endswith("weight")
    out = np.empty_like(X if of_rows else FILTERS if of_filters else IMAGES)
    benchmark(MEMBERS[member][backward], out)


ODD = {
    "permuted": np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "strided": np.repeat(IMAGES, 2, axis=3)[..., ::2],
}


@pytest.mark.parametrize("memory", ODD)
def bench_odd_strides(benchmark, memory):
    x, out = ODD[memory], np.empty_like(ODD[memory])
    benchmark(lambda: bnfast.batch_norm_forward(x, FEW_WEIGHT, FEW_BIAS, out=out))


def bench_eps_of_numpy(benchmark):
    eps = np.float32(1e-5)
    benchmark(lambda: bnfast.batch_norm_forward(IMAGES, FEW_WEIGHT, FEW_BIAS, eps, out=WRITTEN))


@pytest.mark.parametrize("module", ["numpy", "bnfast"])
def bench_import(benchmark, module):
    benchmark.pedantic(
        subprocess.run,
        ([sys.executable, "-c", f"import {module}"],),
        {"check": True},
        rounds=15,
        warmup_rounds=2,
    )
