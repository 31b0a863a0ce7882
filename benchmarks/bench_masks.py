"""Masked batch norm, alone, with a ReLU, of 16 bits: bnfast, and the formula in NumPy and PyTorch.

Beside bnfast without a mask. The formulas compute 16 bits with float32 copies, as bnfast does
within.
"""

import os

import numpy as np
import pytest

import bnfast
from bnfast import _dtypes
from bnfast import _reference as reference

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2)

# (N, C, L): within the caches, and past them.
SHAPES = [(16, 64, 196), (64, 256, 128), (32, 64, 3136)]
LAYOUTS = {"ncl": 1, "nlc": -1}


def lengths_of(shape):
    return np.random.default_rng(0).integers(0, shape[2] + 1, shape[0])


def within(lengths, shape):
    return np.arange(shape[2]) < np.reshape(lengths, (-1, 1))


MASKS = {
    "none": lambda shape: None,
    "all": lambda shape: np.ones((shape[0], shape[2]), bool),
    "first_half": lambda shape: within([shape[2] // 2] * shape[0], shape),
    "lengths": lambda shape: within(lengths_of(shape), shape),
    "random_half": lambda shape: np.random.default_rng(1).random((shape[0], shape[2])) < 0.5,
}


def formula(where, sqrt, x, mask, count, axis, relu):
    """Masked batch norm of float32 arrays of either library."""
    axes = (0, 2) if axis == 1 else (0, 1)
    mean = where(mask, x, 0).sum(axes, keepdims=True) / count
    centred = where(mask, x - mean, 0)
    variance = (centred * centred).sum(axes, keepdims=True) / count
    y = centred / sqrt(variance + 1e-5)
    return y.clip(0) if relu else y


def bnfast_call(x, mask, axis, relu):
    out, activation = np.empty_like(x), "relu" if relu else None
    return lambda: bnfast.batch_norm_forward(
        x, axis=axis, mask=mask, activation=activation, out=out
    )[0]


def numpy_call(x, mask, axis, relu):
    m, count = np.expand_dims(mask, axis), int(mask.sum())

    def call():
        wide = x.astype(np.float32, copy=False)
        return formula(np.where, np.sqrt, wide, m, count, axis, relu).astype(x.dtype, copy=False)

    return call


def torch_call(x, mask, axis, relu):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(int(os.environ.get("BNFAST_BENCH_THREADS", "1")))
    bits = torch.from_numpy(x if x.dtype == np.float32 else x.view(np.int16))
    t = bits if x.dtype == np.float32 else bits.view(getattr(torch, x.dtype.name))
    m, count = torch.from_numpy(np.expand_dims(mask, axis)), int(mask.sum())

    def call():
        return formula(torch.where, torch.sqrt, t.float(), m, count, axis, relu).to(t.dtype)

    return lambda: call().view(bits.dtype).numpy().view(x.dtype)


IMPLEMENTATIONS = {"bnfast": bnfast_call, "numpy": numpy_call, "torch": torch_call}


@pytest.fixture
def measure(benchmark, largest_error):
    def run(group, shape, layout, which, implementation, dtype, *, relu):
        mask, axis = MASKS[which](shape), LAYOUTS[layout]
        if mask is None and implementation != "bnfast":
            pytest.skip("the formulas are those of masks")
        x = np.random.default_rng(2).normal(1.5, 1, shape).astype(dtype)
        x = x if axis == 1 else np.ascontiguousarray(x.transpose(0, 2, 1))
        benchmark.group = f"{group} {layout} {shape}"
        y = benchmark(IMPLEMENTATIONS[implementation](x, mask, axis, relu))
        everything = np.ones((shape[0], shape[2]), bool)
        wide = x.astype(np.float64)
        expected, *_ = reference.masked_norm_forward(
            wide, everything if mask is None else mask, axis=axis
        )
        expected = np.maximum(expected, 0) if relu else expected
        error = float(np.abs(y.astype(np.float64) - expected).max())
        benchmark.extra_info["max_error"] = error
        assert error < largest_error[np.dtype(dtype).name] or implementation != "bnfast"

    return run


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_masked_batch_norm(measure, shape, layout, which, implementation):
    given = shape, layout, which, implementation
    measure("masked", *given, np.float32, relu=False)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", ["none", "lengths", "random_half"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "relu"), [("float32", True), ("float16", False), ("bfloat16", False)]
)
def bench_masked_relu_and_halves(measure, dtype, relu, layout, which, implementation):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    group = f"masked {dtype}" + ", relu" * relu
    given = SHAPES[1], layout, which, implementation
    measure(group, *given, _dtypes.named(dtype), relu=relu)
