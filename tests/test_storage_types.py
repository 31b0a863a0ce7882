"""Data that is computed in another type than it is stored in: float32 in float64, member by member.

The result is that of float64 data, rounded once: every operand has then been converted on its way.
"""

import numpy as np
import pytest

import bnfast
from bnfast import _dtypes, _primitives
from members import MEMBERS

EPS = 1e-5

# How x, dy and out may lie in memory.
ORDERS = {"nchw": (0, 1, 2, 3), "nhwc": (0, 2, 3, 1), "mixed": (3, 1, 0, 2)}


@pytest.fixture
def in_double():
    """Compute float32 data in float64."""
    _primitives.compute_in(np.float32, np.float64)
    yield
    _primitives.compute_in(np.float32, np.float32)


def laid_out(array, order, dtype, step):
    """The array with its axes in this order in memory, and gaps between its elements."""
    spread = np.zeros((*(array.shape[d] for d in order[:-1]), array.shape[order[-1]] * step), dtype)
    view = spread[..., ::step].transpose(np.argsort(order))
    view[...] = array
    return view


def run(member, x, dy, weight, bias, out):
    y, mean, invstd = member.forward(x, weight, bias, EPS, 1, out)
    dx, dweight, dbias = member.backward(dy, x, mean, invstd, weight, 1)
    return [y.copy(), mean, invstd, dx, dweight, dbias]


# Training with parameters of samples writes the standardized values first, and reads them again.
ROUNDED_ONCE = {name: member for name, member in MEMBERS.items() if name != "conditional"}


@pytest.mark.parametrize("step", [1, 2], ids=["dense", "strided"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("member", ROUNDED_ONCE)
def test_the_result_is_that_of_the_wide_data_rounded_once(isa, rng, in_double, member, order, step):
    shape = (6, 8, 7, 10)
    x, dy = (rng.normal(3, 2, shape).astype(np.float32) for _ in range(2))
    size = MEMBERS[member].parameters(shape, 1)
    weight, bias = rng.normal(size=(2, *size)).astype(np.float32)

    def arrays(dtype):
        # With gaps on both sides of the comparison: groups of runs without any are summed as one.
        wide = step if dtype is np.float32 else 2
        return (laid_out(a, ORDERS[order], dtype, wide) for a in (x, dy, np.zeros(shape)))

    narrow_x, narrow_dy, narrow_out = arrays(np.float32)
    wide_x, wide_dy, wide_out = arrays(np.float64)
    got = run(MEMBERS[member], narrow_x, narrow_dy, weight, bias, narrow_out)
    want = run(MEMBERS[member], wide_x, wide_dy, weight, bias, wide_out)
    assert got[0].dtype == got[3].dtype == np.float32
    for a, b in zip(got, want, strict=True):
        if a is not None:
            np.testing.assert_array_equal(a, b.astype(a.dtype))


def test_evaluation_and_parts_of_a_channel_that_two_threads_share(rng, in_double, use_threads):
    x = rng.normal(3, 2, (3, 2, 40_000)).astype(np.float32)
    mean, var, weight, bias = rng.uniform(1, 2, (4, 2)).astype(np.float32)
    for threads in (1, 2):
        use_threads(threads)
        got = bnfast.batch_norm(x, mean, var, weight, bias)
        want = bnfast.batch_norm(x.astype(np.float64), mean, var, weight, bias)
        np.testing.assert_array_equal(got, want.astype(np.float32))
        moments, exact = bnfast.moments(x), bnfast.moments(x.astype(np.float64))
        np.testing.assert_array_equal(moments.mean, exact.mean)
        np.testing.assert_array_equal(moments.m2, exact.m2)


def test_in_place(rng, in_double):
    x = rng.normal(3, 2, (5, 6, 9)).astype(np.float32)
    want = bnfast.batch_norm_forward(x)[0]
    bnfast.batch_norm_forward(x, out=x)
    np.testing.assert_array_equal(x, want)


def test_every_storage_type_is_computed_in_a_type_that_has_kernels():
    for storage in _dtypes.STORAGE_TYPES:
        assert _dtypes.is_floating(storage.arithmetic)
