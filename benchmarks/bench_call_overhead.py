"""Calls so small that nothing but the call is measured: one row of 64 channels, a batch of two."""

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


@pytest.mark.parametrize("module", ["numpy", "bnfast"])
def bench_import(benchmark, module):
    benchmark.pedantic(
        subprocess.run,
        ([sys.executable, "-c", f"import {module}"],),
        {"check": True},
        rounds=15,
        warmup_rounds=2,
    )
