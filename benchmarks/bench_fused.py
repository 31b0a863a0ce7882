"""Batch norm and ReLU, and with a residual between: bnfast in one pass, and one by one."""

import numpy as np
import pytest

from bnfast._cli.bench.cell import Cell
from bnfast._cli.bench.normalizations import NORMALIZATIONS, exact_result, make_data
from bnfast._cli.bench.rivals import ACTIVATED, first
from bnfast._cli.bench.rivals.bnfast_unfused import Unfused
from bnfast._cli.bench.workloads import SETS, layouts_of, name_of

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2)

CASES = [
    (name, shape, layout)
    for name in ACTIVATED
    for shape in SETS[NORMALIZATIONS[name].tracked_shapes]
    for layout in layouts_of(shape)
]


@pytest.fixture(
    params=CASES, ids=[f"{name}-{name_of(shape)}-{layout}" for name, shape, layout in CASES]
)
def case(request):
    """A normalization, a shape and a layout."""
    return request.param


@pytest.fixture
def data(case):
    """Arrays for one workload."""
    return make_data(*case, np.float32, mean=1.5)


@pytest.mark.parametrize("implementation", ["bnfast_out", "unfused"])
@pytest.mark.parametrize("operation", ["inference", "training", "backward"])
def bench_fused(measure, case, data, operation, implementation):
    cell = Cell(case[0], operation, data)
    if implementation == "unfused":
        call = Unfused(1).prepare(cell, fresh=False).call
    else:
        call = NORMALIZATIONS[case[0]].ours(operation, data, data.out)
    moved = cell.traffic // data.x.nbytes
    measure(lambda: first(call()), moved, lambda: exact_result(cell), True)
