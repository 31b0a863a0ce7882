"""Any shape, any strides, any axis."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import bnfast
from oracle import check_backward, check_forward, check_moments


@st.composite
def arrays(draw):
    """An array of 2 to 5 axes, a view with any order, steps and direction, and a channel axis."""
    ndim = draw(st.integers(2, 5))
    shape = draw(st.lists(st.integers(1, 9), min_size=ndim, max_size=ndim))
    axis = draw(st.integers(-ndim, ndim - 1))
    if np.prod(shape) == shape[axis]:
        shape[(axis + 1) % ndim] += 1
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    seed = draw(st.integers(0, 2**32 - 1))
    offset = draw(st.sampled_from([0.0, 3.0, -1e3]))

    def one():
        order = draw(st.permutations(range(ndim)))
        steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, -1, -2]), min_size=ndim, max_size=ndim))
        memory = np.zeros([shape[d] * abs(steps[d]) for d in order], dtype)
        view = memory.transpose(np.argsort(order))[tuple(slice(None, None, s) for s in steps)]
        view[...] = np.random.default_rng(seed).normal(offset, 2, shape)
        return view

    return one(), one(), axis


@settings(max_examples=200, deadline=None)
@given(arrays())
def test_forward_and_backward_for_any_view(case):
    x, dy, axis = case
    check_moments(x, axis)
    check_forward(x, axis=axis)
    check_backward(dy, x, axis=axis)
    check_backward(dy, x, axis=axis, training=False)


@settings(max_examples=200, deadline=None)
@given(arrays())
def test_a_view_gives_what_its_transpose_gives(case):
    """The channel axis moves along with the axes: only the order of summation may differ."""
    x, _, axis = case
    axis %= x.ndim
    y, _, _ = bnfast.batch_norm_forward(x, axis=axis)
    moved, _, _ = bnfast.batch_norm_forward(np.moveaxis(x, axis, 0), axis=0)
    np.testing.assert_array_equal(np.moveaxis(moved, 0, axis), y)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=3, min_side=2, max_side=6),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
def test_moments_of_any_finite_values(x):
    check_moments(x)
