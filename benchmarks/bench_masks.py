"""Masked batch norm: bnfast, the formula in NumPy, and PyTorch's; beside bnfast without a mask."""

import os

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True, warmup_iterations=2)

# (N, C, L): within the caches, and past them.
SHAPES = [(16, 64, 196), (64, 256, 128), (32, 64, 3136)]


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


@pytest.fixture(autouse=True)
def threads():
    bnfast.set_num_threads(int(os.environ.get("BNFAST_BENCH_THREADS", "1")))
    yield
    bnfast.set_num_threads(None)


def bnfast_call(x, mask, axis):
    out = np.empty_like(x)
    return lambda: bnfast.batch_norm_forward(x, axis=axis, mask=mask, out=out)[0]


def numpy_call(x, mask, axis):
    m = np.expand_dims(mask, axis)
    axes = (0, 2) if axis == 1 else (0, 1)

    def call():
        count = mask.sum()
        mean = np.where(m, x, 0).sum(axes, keepdims=True) / count
        centred = np.where(m, x - mean, 0)
        var = (centred * centred).sum(axes, keepdims=True) / count
        return centred / np.sqrt(var + x.dtype.type(1e-5))

    return call


def torch_call(x, mask, axis):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(int(os.environ.get("BNFAST_BENCH_THREADS", "1")))
    t, m = torch.from_numpy(x), torch.from_numpy(np.expand_dims(mask, axis))
    axes = (0, 2) if axis == 1 else (0, 1)

    def call():
        count = m.sum()
        mean = torch.where(m, t, 0).sum(axes, keepdim=True) / count
        centred = torch.where(m, t - mean, 0)
        var = (centred * centred).sum(axes, keepdim=True) / count
        return (centred * torch.rsqrt(var + 1e-5)).numpy()

    return call


IMPLEMENTATIONS = {"bnfast": bnfast_call, "numpy": numpy_call, "torch": torch_call}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("layout", ["ncl", "nlc"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_masked_batch_norm(benchmark, shape, layout, which, implementation):
    mask, axis = MASKS[which](shape), 1 if layout == "ncl" else -1
    if mask is None and implementation != "bnfast":
        pytest.skip("the formulas are those of masks")
    x = np.random.default_rng(2).normal(1.5, 1, shape).astype(np.float32)
    x = x if axis == 1 else np.ascontiguousarray(x.transpose(0, 2, 1))
    benchmark.group = f"masked {layout} {shape}"
    y = benchmark(IMPLEMENTATIONS[implementation](x, mask, axis))
    everything = np.ones((shape[0], shape[2]), bool)
    expected, *_ = reference.masked_norm_forward(x, everything if mask is None else mask, axis=axis)
    error = float(np.abs(y - expected).max())
    benchmark.extra_info["max_error"] = error
    assert error < 2e-6 or implementation != "bnfast"
