"""The plan alone: pure Python, no data."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnfast
from bnfast import _core, _layout, _primitives
from bnfast._layout import CHANNELS_LAST, CONTIGUOUS, plan_layout, plan_rows


def plan_of(*arrays, axis=1, repeated=()):
    first = arrays[0]
    return plan_layout(
        *(first.shape, (axis,), repeated, first.itemsize),
        tuple(a.strides for a in arrays),
        tuple(a.flags.aligned for a in arrays),
    )


def rows_of(*arrays, normalized):
    first = arrays[0]
    return plan_rows(
        *(first.shape, normalized, first.itemsize),
        tuple(a.strides for a in arrays),
        tuple(a.flags.aligned for a in arrays),
        len(arrays) - 1,
    )


def cuts(plan):
    """All that sums depend on."""
    names = ("layout", "outer", "inner", "walked", "rows_of_block", "interleave")
    return [
        *[getattr(plan, name) for name in names],
        *[value for name, value in plan._asdict().items() if "chunk" in name or "block" in name],
    ]


def extent(plan):
    return plan.layout, plan.outer, plan.channels, plan.inner


def test_nchw_is_contiguous():
    plan = plan_of(np.empty((4, 3, 5, 6), np.float32))
    assert extent(plan) == (CONTIGUOUS, 4, 3, 30)
    assert plan.operands[0].direct
    assert (plan.operands[0].outer_stride, plan.operands[0].channel_stride) == (360, 120)


def test_nhwc_is_channels_last():
    plan = plan_of(np.empty((4, 5, 6, 3), np.float32), axis=3)
    assert extent(plan) == (CHANNELS_LAST, 120, 3, 1)
    assert plan.operands[0].direct
    assert plan.operands[0].outer_stride == 12


def test_nhwc_in_memory_under_nchw_indices_is_channels_last():
    x = np.empty((4, 5, 6, 3), np.float32).transpose(0, 3, 1, 2)
    assert extent(plan_of(x)) == (CHANNELS_LAST, 120, 3, 1)
    assert plan_of(x).operands[0].direct


@pytest.mark.parametrize("shape", [(8, 16), (8, 16, 1), (8, 16, 1, 1), (1, 16, 8)])
def test_axes_of_length_one_vanish(shape):
    plan = plan_of(np.empty(shape, np.float32))
    assert plan.outer * plan.inner == 8
    assert plan.operands[0].direct


def test_fortran_order_is_contiguous_over_the_batch():
    plan = plan_of(np.asfortranarray(np.empty((4, 3, 5, 6), np.float32)))
    assert extent(plan) == (CONTIGUOUS, 30, 3, 4)
    assert plan.operands[0].direct


def test_a_single_channel_is_one_run():
    assert extent(plan_of(np.empty((4, 1, 5, 6), np.float32))) == (CONTIGUOUS, 1, 1, 120)
    assert extent(plan_of(np.empty((4, 5, 6, 1), np.float32), axis=3)) == (CONTIGUOUS, 1, 1, 120)


@pytest.mark.parametrize(
    "window",
    [
        np.s_[1:3],
        np.s_[::-1],
        np.s_[::2],
        np.s_[:, 1:],
        np.s_[:, ::2],
        np.s_[:, ::-1],
        np.s_[:, :, 2:],
    ],
    ids=str,
)
def test_common_slices_are_walked_directly(window):
    plan = plan_of(np.empty((4, 3, 5, 6), np.float32)[window])
    assert plan.layout == CONTIGUOUS
    assert plan.operands[0].direct


@pytest.mark.parametrize("window", [np.s_[..., 1:], np.s_[..., ::-1], np.s_[..., ::2]], ids=str)
def test_odd_slices_are_packed_and_cut_like_a_copy(window):
    x = np.empty((4, 3, 5, 6), np.float32)[window]
    plan, copy = plan_of(x), plan_of(np.ascontiguousarray(x))
    assert not plan.operands[0].direct
    assert copy.operands[0].direct
    ours = plan._replace(operands=(), inner_axis_sizes=(), outer_axis_sizes=())
    theirs = copy._replace(operands=(), inner_axis_sizes=(), outer_axis_sizes=())
    assert ours == theirs


def test_a_repeated_batch_axis_is_the_slowest_and_direct():
    x = np.broadcast_to(np.empty((1, 3, 5, 6), np.float32), (4, 3, 5, 6))
    plan = plan_of(x)
    assert extent(plan) == (CONTIGUOUS, 4, 3, 30)
    assert plan.operands[0].direct
    assert plan.operands[0].outer_stride == 0


def test_operands_are_packed_one_by_one():
    x = np.empty((4, 3, 5, 6), np.float32)
    other = np.empty((4, 5, 6, 3), np.float32).transpose(0, 3, 1, 2)
    plan = plan_of(x, other)
    assert [operand.direct for operand in plan.operands] == [True, False]
    assert [operand.direct for operand in plan_of(other, x).operands] == [True, False]


def test_no_sum_depends_on_where_an_output_lies():
    repeated = np.broadcast_to(np.empty((3, 1, 1), np.float32), (3, 5, 7))  # any order would do
    for x in (np.empty((3, 5, 7), np.float32), repeated):
        outputs = [np.empty((3, 5, 7), np.float32), np.empty((7, 5, 3), np.float32).T]
        plans = [plan_of(x, y, axis=0) for y in outputs]
        assert cuts(plans[0]) == cuts(plans[1])


@pytest.mark.parametrize("normalized", [(3,), (0,), (1, 3)], ids=str)
def test_an_output_may_walk_rows_that_inputs_join_axis_by_axis(normalized):
    x, y = np.empty((3, 5, 7, 9), np.float32), np.empty((4, 6, 8, 10), np.float32)[:3, :5, :7, :9]
    plan, plain = (rows_of(x, out, normalized=normalized) for out in (y, x))
    assert cuts(plan) == cuts(plain)
    assert (plan.repeats, plan.channels) == (plain.repeats, plain.channels)
    assert len(plan.channel_axis_sizes) > len(plain.channel_axis_sizes) or plain.repeats > 1
    assert math.prod(plan.channel_axis_sizes) == plan.channels


def test_misaligned_memory_is_packed():
    x = np.empty(4 * 12 + 1, np.uint8)[1:].view(np.float32).reshape(4, 3)
    assert not plan_of(x).operands[0].direct


def test_the_plan_is_immutable():
    x = np.empty((4, 3, 5, 6), np.float32)
    with pytest.raises(AttributeError):
        plan_of(x).outer = 7


@pytest.fixture
def planned(monkeypatch):
    """The shapes and strides that are planned from now on."""
    seen = []

    def plan_layout(shape, axes, repeated, itemsize, strides, *more):
        seen.append((shape, *strides))
        return _layout.plan_layout(shape, axes, repeated, itemsize, strides, *more)

    def plan_rows(shape, reduced, itemsize, strides, *more, **by_name):
        seen.append((shape, *strides))
        return _layout.plan_rows(shape, reduced, itemsize, strides, *more, **by_name)

    monkeypatch.setattr(_primitives, "plan_layout", plan_layout)
    monkeypatch.setattr(_primitives, "plan_rows", plan_rows)
    return seen


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
def test_arrays_of_the_same_shape_and_strides_are_planned_once(planned, order):
    x = np.ones([(4, 3, 71, 6)[d] for d in order], np.float32).transpose(np.argsort(order))
    for _ in range(3):
        bnfast.moments(x.copy(order="K"))
    assert planned == [((4, 3, 71, 6), x.strides)]


def test_another_dtype_shape_stride_axis_or_reduction_is_planned_anew(planned):
    x = np.ones((4, 3, 73, 8), np.float32)
    for array in (x, x.astype(np.float64), x[:3], x[:, :, ::2], np.moveaxis(x, 3, 2)):
        bnfast.moments(array)
    bnfast.moments(x, axis=2)
    bnfast.instance_norm_forward(x)
    bnfast.group_norm_forward(x, 3)  # as instance normalization
    assert len(planned) == 7


def test_the_stride_of_an_axis_of_one_element_is_moot(planned):
    x = np.ones((4, 3, 1, 79), np.float32)
    other = np.lib.stride_tricks.as_strided(x, strides=(*x.strides[:2], 4, 4))
    bnfast.moments(x)
    bnfast.moments(other)
    assert len(planned) == 1


def c_plan_of(plan):
    return _core.Plan(plan, range(len(plan.operands)))


def test_chunks_beyond_the_scratch_memory_are_refused():
    plan = plan_of(np.empty((4, 3, 5, 6), np.float32))
    with pytest.raises(ValueError, match="do not fit the scratch memory"):
        c_plan_of(plan._replace(chunk_inner=_layout.MOST_CHUNK_BYTES))


@pytest.mark.parametrize("interleave", [0, 300])
def test_wide_rows_beyond_those_of_the_kernels_are_refused(interleave):
    plan = plan_of(np.zeros((70, 3), np.float32), axis=1)
    with pytest.raises(ValueError, match="wide rows do not fit"):
        c_plan_of(plan._replace(interleave=interleave))


def test_cuts_do_not_depend_on_the_number_of_channels_where_a_channel_is_a_run():
    few = plan_of(np.empty((50, 3, 30, 30), np.float32))
    many = plan_of(np.empty((50, 300, 30, 30), np.float32))
    # Blocks of rows are of sums over channels, and so depend on how many there are.
    assert cuts(few._replace(rows_of_block=many.rows_of_block)) == cuts(many)


@settings(max_examples=300, deadline=None)
@given(
    layout=st.sampled_from([CONTIGUOUS, CHANNELS_LAST]),
    itemsize=st.sampled_from([4, 8]),
    outer=st.integers(1, 5000) | st.integers(1, 10_000_000),
    channels=st.integers(1, 5000),
    inner=st.integers(2, 300_000),
)
def test_chunks_tile_the_channel_and_fit_the_scratch_memory(
    layout, itemsize, outer, channels, inner
):
    if layout == CHANNELS_LAST:
        inner = 1
    cut = _layout._cut(layout, itemsize, outer, channels, inner)
    chunk_outer, chunk_inner, chunks_per_run, chunks, chunks_per_block, blocks, interleave = cut
    assert 1 <= chunk_outer * chunk_inner * itemsize <= _layout.MOST_CHUNK_BYTES
    assert chunks_per_run == 1 or chunk_outer == 1
    assert (chunks_per_run - 1) * chunk_inner < inner <= chunks_per_run * chunk_inner
    rows = chunks // chunks_per_run
    assert (rows - 1) * chunk_outer < outer <= rows * chunk_outer
    assert chunks == rows * chunks_per_run
    assert (blocks - 1) * chunks_per_block < chunks <= blocks * chunks_per_block
    if layout == CHANNELS_LAST:
        assert blocks <= _layout.ENOUGH_BLOCKS + 1
    if layout == CHANNELS_LAST:
        assert chunks_per_block * chunk_outer >= _layout.FEWEST_BLOCK_ROWS
    if layout == CHANNELS_LAST and channels * itemsize < _layout.STREAM_BYTES:
        assert 1 <= interleave <= outer and interleave * channels * itemsize <= _layout.STREAM_BYTES
    else:
        assert interleave == 1


def vectors_filled(channels, interleave, itemsize):
    row = interleave * channels * itemsize
    return row / (-(-row // _layout.VECTOR_BYTES) * _layout.VECTOR_BYTES)


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7, 12, 20, 24, 33, 48])
def test_rows_of_few_channels_fill_vectors(channels, itemsize):
    interleave = _layout._cut(CHANNELS_LAST, itemsize, 5000, channels, 1)[-1]
    assert vectors_filled(channels, interleave, itemsize) >= vectors_filled(channels, 1, itemsize)
    assert interleave * channels * itemsize > _layout.STREAM_BYTES / 2


@settings(max_examples=300, deadline=None)
@given(
    layout=st.sampled_from([CONTIGUOUS, CHANNELS_LAST]),
    itemsize=st.sampled_from([4, 8]),
    repeats=st.integers(1, 300),
    channels=st.integers(1, 20_000),
)
def test_a_block_of_rows_is_a_part_of_one_repeat_or_all_of_some(
    layout, itemsize, repeats, channels
):
    rows = _layout._rows_of_block(layout, itemsize, repeats, channels)
    if rows < channels:
        assert repeats * math.ceil(channels / rows) <= _layout.MOST_ROW_BLOCKS
    else:
        assert rows % channels == 0
        assert math.ceil(repeats * channels / rows) <= _layout.MOST_ROW_BLOCKS
    assert rows >= min(_layout.FEWEST_BLOCK_OF_ROWS, channels * repeats)


@pytest.mark.parametrize(
    ("shape", "blocks"), [((2, 3, 40), 2), ((8, 3, 3136), 32), ((1, 3, 300), 2), ((100, 3, 9), 25)]
)
def test_neighbouring_rows_are_summed_in_parts_of_a_sample_or_in_some_samples(shape, blocks):
    x = np.empty(shape, np.float32)
    plan = plan_rows(shape, (1,), 4, (x.strides,), (True,), 1)
    assert extent(plan) == (CHANNELS_LAST, 3, shape[2], 1)
    assert c_plan_of(plan).row_blocks == blocks


@pytest.mark.parametrize("axis", [1, 3])
def test_what_follows_rows_changes_no_cut_and_is_staged_where_it_walks_rows_otherwise(axis):
    x = np.empty((4, 6, 5, 7), np.float32)
    like_x, turned = np.empty_like(x), np.empty((5, 6, 4, 7), np.float32).swapaxes(0, 2)
    arrays = x, np.empty_like(x), like_x, turned
    plan = plan_rows(x.shape, (axis,), 4, tuple(a.strides for a in arrays), (True,) * 4, 1)
    assert cuts(plan) == cuts(rows_of(*arrays[:2], normalized=(axis,)))
    assert [operand.direct for operand in plan.operands] == [True, True, True, False]


@pytest.mark.parametrize("window", [np.s_[:], np.s_[..., ::-1]], ids=["plain", "reversed"])
def test_parameters_of_elements_are_direct_and_the_same_for_all_rows(window):
    x = np.empty((2, 3, 4, 5), np.float32)[window]
    plan = plan_rows(x.shape, (1, 2), 4, (x.strides,), (True,), 1, 2)
    for operand in plan.operands[1:]:
        assert operand.direct
        assert operand.channel_stride == 0
        assert operand.outer_stride == 4 * plan.inner


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_every_element_is_visited_once(data):
    """Walks the merged axes as operands.c does."""
    ndim = data.draw(st.integers(2, 5))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    axis = data.draw(st.integers(0, ndim - 1))
    order = data.draw(st.permutations(range(ndim)))
    signs = data.draw(st.lists(st.sampled_from([1, -1, 2]), min_size=ndim, max_size=ndim))
    big = np.arange(math.prod(2 * n for n in shape)).reshape([2 * shape[d] for d in order])
    big = big.transpose(np.argsort(order))
    window = tuple(
        {1: slice(0, n), -1: slice(n - 1, None, -1), 2: slice(0, 2 * n, 2)}[sign]
        for n, sign in zip(shape, signs, strict=True)
    )
    x = big[window]
    assert x.shape == shape
    plan = plan_of(x, axis=axis)
    operand = plan.operands[0]
    start = x[(0,) * ndim] * 8

    def offsets(sizes, strides):
        return [
            sum(i * s for i, s in zip(index, strides, strict=True)) for index in np.ndindex(*sizes)
        ]

    for c in range(plan.channels):
        visited = [
            (start + c * operand.channel_stride + o + i) // 8
            for o in offsets(plan.outer_axis_sizes, operand.outer_axis_strides)
            for i in offsets(plan.inner_axis_sizes, operand.inner_axis_strides)
        ]
        assert sorted(visited) == sorted(np.moveaxis(x, axis, 0)[c].ravel())
        if operand.direct:
            inner_step = 8 if plan.inner > 1 else 0
            direct = [
                (start + c * operand.channel_stride + o * operand.outer_stride + i * inner_step)
                // 8
                for o in range(plan.outer)
                for i in range(plan.inner)
            ]
            assert direct == visited
