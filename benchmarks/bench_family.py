"""Layer, RMS, group, instance, weight, spectral norm: bnfast, with and without out=, and NumPy."""

import numpy as np
import pytest

from bnfast._cli.bench.cell import ARRAYS_MOVED, Cell
from bnfast._cli.bench.normalizations import NORMALIZATIONS, exact_result, make_data
from bnfast._cli.bench.rivals import first, numpy_formulas
from bnfast._cli.bench.workloads import LAYOUTS, SETS, name_of

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2)

IMPLEMENTATIONS = ["bnfast", "bnfast_out", "numpy"]

CASES = [
    (name, shape, layout)
    for name, norm in NORMALIZATIONS.items()
    if "forward" in norm.operations
    for shape in SETS[norm.tracked_shapes]
    for layout in norm.layouts_of(shape, LAYOUTS)
]


@pytest.fixture(
    params=CASES, ids=[f"{name}-{name_of(shape)}-{layout}" for name, shape, layout in CASES]
)
def case(request):
    """A normalization, a shape and a layout."""
    return request.param


@pytest.fixture
def data(case):
    """Arrays for one workload, the statistics of its x, and an array to write to."""
    return make_data(*case, np.float32, mean=1.5)


def bench(measure, cell, implementation):
    norm = NORMALIZATIONS[cell.normalization]
    if implementation == "numpy":
        compute = numpy_formulas.FORMULAS[cell.normalization](cell)
    else:
        out = cell.data.out if implementation == "bnfast_out" else None
        compute = norm.ours(cell.operation, cell.data, out)
    measure(
        lambda: first(compute()),
        ARRAYS_MOVED[cell.operation],
        lambda: exact_result(cell),
        implementation != "numpy",
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_forward(measure, case, data, implementation):
    bench(measure, Cell(case[0], "forward", data), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_backward(measure, case, data, implementation):
    bench(measure, Cell(case[0], "backward", data), implementation)
