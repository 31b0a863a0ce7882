"""Training forward, inference and backward: bnfast, with and without out=, and NumPy."""

import pytest

import bnfast
from bnfast import _reference as reference
from bnfast._cli.bench.rivals import numpy_formulas

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2)

IMPLEMENTATIONS = ["bnfast", "bnfast_out", "numpy"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_training(measure, data, implementation):
    d = data
    out = d.out if implementation == "bnfast_out" else None

    def call():
        if implementation == "numpy":
            return numpy_formulas.batch_norm_forward(d.x, d.weight, d.bias, axis=d.axis)[0]
        return bnfast.batch_norm_forward(d.x, d.weight, d.bias, axis=d.axis, out=out)[0]

    def expected():
        return reference.batch_norm_forward(d.x, d.weight, d.bias, axis=d.axis)[0]

    measure(call, 2, expected, implementation != "numpy")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_inference(measure, data, implementation):
    d = data
    out = d.out if implementation == "bnfast_out" else None
    arguments = d.x, d.mean, d.var, d.weight, d.bias

    def call():
        if implementation == "numpy":
            return numpy_formulas.batch_norm_inference(*arguments, axis=d.axis)
        return bnfast.batch_norm(*arguments, axis=d.axis, out=out)

    measure(
        call, 2, lambda: reference.scale_shift(*arguments, axis=d.axis), implementation != "numpy"
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def bench_backward(measure, data, implementation):
    d = data
    out = d.out if implementation == "bnfast_out" else None
    narrow = d.mean, d.invstd, d.weight
    wide = d.exact_mean, d.exact_invstd, d.weight

    def call():
        if implementation == "numpy":
            return numpy_formulas.batch_norm_backward(d.dy, d.x, *narrow, axis=d.axis)[0]
        return bnfast.batch_norm_backward(d.dy, d.x, *wide, axis=d.axis, out=out)[0]

    measure(
        call,
        3,
        lambda: reference.batch_norm_backward(d.dy, d.x, *wide, axis=d.axis)[0],
        implementation != "numpy",
    )
