"""Inputs of a workload, and what is noted beside a time."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

import bnfast
from workloads import CASES, in_layout


@pytest.fixture(autouse=True)
def threads():
    bnfast.set_num_threads(int(os.environ.get("BNFAST_BENCH_THREADS", "1")))
    yield
    bnfast.set_num_threads(None)


@pytest.fixture(
    params=CASES, ids=[f"{w.name}-{'x'.join(map(str, w.shape))}-{layout}" for w, layout in CASES]
)
def data(request):
    """Arrays for one workload, the statistics of its x, and an array to write to."""
    workload, layout = request.param
    shape, axis = in_layout(workload, layout)
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32) * np.float32(2) + np.float32(3)
    dy = rng.standard_normal(shape, np.float32)
    weight, bias = rng.standard_normal((2, shape[axis]), np.float32)
    moments = bnfast.moments(x, axis)
    return SimpleNamespace(
        **{"x": x, "dy": dy, "weight": weight, "bias": bias, "axis": axis},
        mean=moments.mean.astype(np.float32),
        var=moments.var.astype(np.float32),
        invstd=1 / np.sqrt(moments.var + 1e-5),
        exact_mean=moments.mean,
        out=np.empty_like(x),
    )


@pytest.fixture
def measure(request, benchmark, data):
    """Time a call and note its necessary traffic and its error against a float64 result."""
    benchmark.group = f"{request.node.originalname[6:]} {request.node.callspec.id}".rsplit("-", 1)[
        0
    ]

    def run(call, arrays_moved, expected, trusted):
        result = benchmark(call)
        error = float(np.abs(result - expected()).max())
        benchmark.extra_info["max_error"] = error
        if benchmark.stats:  # none with --benchmark-disable
            traffic = arrays_moved * data.x.nbytes
            benchmark.extra_info["GB/s"] = traffic / benchmark.stats.stats.median / 1e9
        # A benchmark of a wrong answer is worth nothing; a rival's error stands beside its time.
        assert error < 2e-6 or not trusted

    return run
