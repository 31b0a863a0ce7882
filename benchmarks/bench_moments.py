"""The moments of tables: bnfast, and NumPy with and without float64 sums."""

import numpy as np
import pytest

from bnfast._cli.bench.cell import ARRAYS_MOVED, Cell
from bnfast._cli.bench.normalizations import NORMALIZATIONS, exact_result, make_data
from bnfast._cli.bench.rivals import numpy_formulas, read_moments
from bnfast._cli.bench.workloads import SETS, TABLE, name_of

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2)

NORM = NORMALIZATIONS["moments"]
IMPLEMENTATIONS = {
    "bnfast": (lambda data: NORM.ours("moments", data, None)(), NORM.read),
    "numpy": (lambda data: numpy_formulas.moments(data.rows), read_moments),
    "numpy_float64": (lambda data: numpy_formulas.moments(data.rows, np.float64), read_moments),
}


@pytest.fixture(params=SETS[NORM.tracked_shapes], ids=name_of)
def data(request):
    """A table."""
    return make_data("moments", request.param, TABLE, np.float32, mean=1.5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_moments(measure, data, implementation):
    compute, read = IMPLEMENTATIONS[implementation]
    measure(
        lambda: compute(data),
        ARRAYS_MOVED["moments"],
        lambda: exact_result(Cell("moments", "moments", data)),
        implementation == "bnfast",
        read,
    )
