"""Inputs of a workload, and what is noted beside a time."""

import os

import numpy as np
import pytest

import bnfast
from bnfast._cli.bench.normalizations import NORMALIZATIONS, make_data
from bnfast._cli.bench.workloads import SETS, layouts_of, name_of

TRACKED = SETS[NORMALIZATIONS["batch"].tracked_shapes]
CASES = [(shape, layout) for shape in TRACKED for layout in layouts_of(shape)]

# Of values up to 16, which data of 16 bits can only round: by half of a step.
LARGEST_ERROR = {"float32": 2e-6, "float16": 4.1e-3, "bfloat16": 3.2e-2}


@pytest.fixture(autouse=True)
def threads():
    bnfast.set_num_threads(int(os.environ.get("BNFAST_BENCH_THREADS", "1")))
    yield
    bnfast.set_num_threads(None)


@pytest.fixture
def largest_error():
    """Of outputs, by the name of their type."""
    return LARGEST_ERROR


@pytest.fixture(params=CASES, ids=[f"{name_of(shape)}-{layout}" for shape, layout in CASES])
def data(request):
    """Arrays for one workload, the statistics of its x, and an array to write to."""
    return make_data("batch", *request.param, np.float32, mean=1.5)


@pytest.fixture
def measure(request, benchmark, data):
    """Time a call and note its necessary traffic and its error against a float64 result."""
    benchmark.group = f"{request.node.originalname[6:]} {request.node.callspec.id}".rsplit("-", 1)[
        0
    ]

    def run(call, arrays_moved, expected, trusted, read=np.asarray):
        result = read(benchmark(call))
        error = float(np.abs(result - expected()).max())
        benchmark.extra_info["max_error"] = error
        if benchmark.stats:  # none with --benchmark-disable
            traffic = arrays_moved * data.x.nbytes
            benchmark.extra_info["GB/s"] = traffic / benchmark.stats.stats.median / 1e9
        # A benchmark of a wrong answer is worth nothing; a rival's error stands beside its time.
        assert error < LARGEST_ERROR[data.dtype.name] or not trusted

    return run
