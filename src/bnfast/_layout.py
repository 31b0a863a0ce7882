"""Shape, strides and channel axis in; an immutable plan out, which _primitives keeps.

The plan sees an array as some repeats of ``(outer, channels, inner)``. Every channel of every
repeat has statistics of its own: ``outer`` are the reduced axes that step further than the channel
axis, ``inner`` those that step less. It then cuts every channel into chunks and blocks. What is
summed with what follows from the plan, and the plan from shape, strides and element size: not from
the machine, nor from the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

CONTIGUOUS = "contiguous"
CHANNELS_LAST = "channels_last"

# One channel's share of a chunk where a channel is a run. Fits the L1 cache next to the other
# operands.
CHUNK_BYTES = 16384

# The same where channels are neighbours: what the scratch buffers of operands.h hold.
MOST_CHUNK_BYTES = 2 * CHUNK_BYTES

# One channel's share of a block where a channel is a run: long enough that starting anew (the first
# chunk of a block is read twice) costs a thirtieth, short enough that one channel keeps all threads
# busy.
BLOCK_BYTES = 32 * CHUNK_BYTES

# The runs of a contiguous chunk are cut at multiples of this: whole lanes, whole cache lines.
RUN_MULTIPLE = 64

# Rows, or images of short planes, that kernels sum at a time.
ROWS_TOGETHER = 16

# Rows of a channels_last chunk, for each that is part of a wide row: so many that the merge at its
# end costs little; and twice as many of at most LONG_CHUNK_ROW_BYTES, because each merge lets
# memory wait (tables of 64 columns take 0.93 of the time). Longer chunks would want longer scratch.
CHUNK_ROWS = 256
LONG_CHUNK_ROW_BYTES = 640

# Rows of fewer bytes than STREAM_BYTES are summed several at a time, as one wide row. What a wide
# row costs, in vectors of VECTOR_BYTES: its own, some time for beginning, and more for a last one
# that is not whole. (Fitted to 1 to 63 channels: 16 channels took 1.5 times as long alone as four
# rows at a time.) Wider ones are not read as one stream: 28 channels from memory took twice as long
# eight rows at a time as two. row_sums.inc has room for as much.
VECTOR_BYTES = 64
STREAM_BYTES = 4 * VECTOR_BYTES
BEGINNING, BROKEN = 0.25, 0.5

# Rows of a channels_last block: so many that its partial sums, three float64 a channel, take less
# than a hundredth of the memory that it covers.
FEWEST_BLOCK_ROWS = 640

# A long array has about this many blocks, each longer than BLOCK_BYTES: every block begins with a
# first shift, which reads rows that lie apart (256 MB of 64 columns take 0.92 of the time in 64
# blocks, 0.94 in 128, 0.95 in 256). Few channels have no other tasks, and 48 threads, say, share
# these better than 64.
ENOUGH_BLOCKS = 128


# Sums over rows are made block by block: of so many rows that the blocks' own sums cost little, and
# so few that every thread finds a block. Neighbouring rows, those of channels_last, are summed
# along memory, by whole lanes.
MOST_ROW_BLOCKS = 32
FEWEST_BLOCK_OF_ROWS = 2 * ROWS_TOGETHER
FEWEST_BLOCK_OF_NEIGHBOURS = 256
LANES_BYTES = 256


class OperandLayout(NamedTuple):
    """How one array is walked: directly, or chunk by chunk through scratch memory.

    Elements that are not aligned, or of a type that there are no kernels for, go through scratch.

    Strides are bytes. ``outer_stride`` is meaningful for a direct operand only; repeats are walked
    with ``repeat_axis_strides`` either way, and channels with ``channel_axis_strides``, of which
    ``channel_stride`` is the last.
    """

    direct: bool
    outer_stride: int
    channel_stride: int
    repeat_axis_strides: tuple[int, ...]
    channel_axis_strides: tuple[int, ...]
    outer_axis_strides: tuple[int, ...]
    inner_axis_strides: tuple[int, ...]


class LayoutPlan(NamedTuple):
    """Where the elements of a call lie and how they are cut.

    ``walked`` are the reduced axes in the order of the walk.
    """

    layout: str
    itemsize: int
    repeats: int
    outer: int
    channels: int
    inner: int
    repeat_axis_sizes: tuple[int, ...]
    channel_axis_sizes: tuple[int, ...]
    outer_axis_sizes: tuple[int, ...]
    inner_axis_sizes: tuple[int, ...]
    chunk_outer: int
    chunk_inner: int
    chunks_per_run: int
    chunks: int
    chunks_per_block: int
    blocks: int
    interleave: int
    rows_of_block: int
    walked: tuple[int, ...]
    operands: tuple[OperandLayout, ...]


def _walking_order(axes: list[int], strides: tuple[int, ...]) -> list[int]:
    """Sort axes as an operand lies in memory, slowest first, repeated ones before all."""
    return sorted(axes, key=lambda axis: -abs(strides[axis]) if strides[axis] else -math.inf)


def _merge(
    axes: Sequence[int], shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Join neighbouring axes that every operand walks as one: (sizes, strides of each operand)."""
    sizes: list[int] = []
    steps: list[list[int]] = []
    for axis in [d for d in axes if shape[d] > 1]:
        step = [s[axis] for s in strides]
        if sizes and all(
            last == shape[axis] * now for last, now in zip(steps[-1], step, strict=True)
        ):
            sizes[-1] *= shape[axis]
            steps[-1] = step
        else:
            sizes.append(shape[axis])
            steps.append(step)
    return tuple(sizes), tuple(tuple(s[k] for s in steps) for k in range(len(strides)))


def _is_one_axis(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return all(strides[d] == sizes[d + 1] * strides[d + 1] for d in range(len(sizes) - 1))


def _operand_layout(
    layout: str,
    stored_itemsize: int,
    directly: bool,
    channel_strides: tuple[int, ...],
    repeat_strides: tuple[int, ...],
    outer: tuple[tuple[int, ...], tuple[int, ...]],
    inner: tuple[tuple[int, ...], tuple[int, ...]],
) -> OperandLayout:
    outer_sizes, outer_strides = outer
    inner_sizes, inner_strides = inner
    outer_stride = outer_strides[-1] if outer_strides else 0
    channel_stride = channel_strides[-1] if channel_strides else 0
    if layout == CONTIGUOUS:
        unit_run = inner_strides[-1] == stored_itemsize and _is_one_axis(inner_sizes, inner_strides)
    else:
        unit_run = not channel_strides or channel_stride == stored_itemsize
    direct = (
        directly
        and unit_run
        and _is_one_axis(outer_sizes, outer_strides)
        and all(
            step % stored_itemsize == 0
            for step in (outer_stride, *channel_strides, *repeat_strides)
        )
    )
    return OperandLayout(
        direct,
        outer_stride,
        channel_stride,
        repeat_strides,
        channel_strides,
        outer_strides,
        inner_strides,
    )


def _ceil_divide(a: int, b: int) -> int:
    return -(-a // b)


def _interleave(channels: int, itemsize: int) -> int:
    """How many rows of so few channels are summed at a time: those that take least time a value."""

    def cost(interleave: int) -> float:
        row = interleave * channels * itemsize
        whole, broken = divmod(row, VECTOR_BYTES)
        return (whole + (1 + BROKEN if broken else 0) + BEGINNING) / row

    max_rows = STREAM_BYTES // (channels * itemsize)
    return min(range(1, max_rows + 1), key=cost, default=1)


def _cut(
    layout: str, itemsize: int, outer: int, channels: int, inner: int
) -> tuple[int, int, int, int, int, int, int]:
    """(chunk_outer, chunk_inner, chunks_per_run, chunks, chunks_per_block, blocks, interleave)."""
    interleave = 1
    if layout == CHANNELS_LAST:
        interleave = min(_interleave(channels, itemsize), outer)
        row_bytes = channels * itemsize
        narrow = interleave * row_bytes <= LONG_CHUNK_ROW_BYTES
        rows = min(CHUNK_ROWS * interleave * (2 if narrow else 1), MOST_CHUNK_BYTES // itemsize)
        chunk_outer, chunk_inner, chunks_per_run = rows, 1, 1
        block_rows = max(FEWEST_BLOCK_ROWS, BLOCK_BYTES // row_bytes, outer // ENOUGH_BLOCKS)
        chunks_per_block = _ceil_divide(block_rows, chunk_outer)
    else:
        chunk = CHUNK_BYTES // itemsize
        chunks_per_run = _ceil_divide(inner, chunk)
        if chunks_per_run > 1:
            chunk_outer = 1
            piece = _ceil_divide(inner, chunks_per_run)
            chunk_inner = _ceil_divide(piece, RUN_MULTIPLE) * RUN_MULTIPLE
            chunks_per_run = _ceil_divide(inner, chunk_inner)
        else:
            chunk_outer, chunk_inner = max(1, chunk // inner), inner
            if chunk_outer > ROWS_TOGETHER:
                chunk_outer -= chunk_outer % ROWS_TOGETHER
        chunks_per_block = BLOCK_BYTES // (chunk_outer * chunk_inner * itemsize)
    chunks = _ceil_divide(outer, chunk_outer) * chunks_per_run
    blocks = _ceil_divide(chunks, chunks_per_block)
    return chunk_outer, chunk_inner, chunks_per_run, chunks, chunks_per_block, blocks, interleave


def _rows_of_block(layout: str, itemsize: int, repeats: int, channels: int) -> int:
    """How many rows make a block: a part of one repeat's, or all of some repeats."""
    fewest = unit = FEWEST_BLOCK_OF_ROWS
    if layout == CHANNELS_LAST:
        fewest, unit = FEWEST_BLOCK_OF_NEIGHBOURS, LANES_BYTES // itemsize
    parts = min(MOST_ROW_BLOCKS // repeats, _ceil_divide(channels, fewest))
    if parts > 1:
        return _ceil_divide(_ceil_divide(channels, parts), unit) * unit
    enough = _ceil_divide(FEWEST_BLOCK_OF_ROWS, channels)
    return max(enough, _ceil_divide(repeats, MOST_ROW_BLOCKS)) * channels


def plan_layout(
    shape: tuple[int, ...],
    channel_axes: tuple[int, ...],
    repeated: tuple[int, ...],
    itemsize: int,
    strides: tuple[tuple[int, ...], ...],
    directly: tuple[bool, ...],
    stored_itemsize: int | None = None,
) -> LayoutPlan:
    """Plan a call over arrays of one shape, with statistics for each index of some of its axes.

    ``itemsize`` is that of the arithmetic, ``stored_itemsize`` that of the arrays where it differs.
    ``strides`` (bytes) and ``directly`` have one entry for each operand: whether its elements can
    be read and written where they are, being aligned and of a type that there are kernels for. The
    first operand's strides alone choose the layout and the order of the walk, so that no sum
    depends on where an output lies; an operand that cannot be walked that way is staged. No axis
    may be empty, none is negative. The statistics are wanted in the order of ``repeated`` and then
    ``channel_axes``, one axis or some that all inputs walk as one.
    """
    channel_sizes, channel_strides = _merge(channel_axes, shape, strides)
    channels = math.prod(channel_sizes)
    last = [d for d in channel_axes if shape[d] > 1][-1:]
    statistic_axes = {*channel_axes, *repeated}
    reduced = [d for d in range(len(shape)) if d not in statistic_axes and shape[d] > 1]
    # With a single channel everything is one run.
    order = _walking_order([*reduced, *last], strides[0])
    cut_at = order.index(last[0]) if last else -1
    repeat_sizes, repeat_strides = _merge(repeated, shape, strides)
    outer_sizes, outer_strides = _merge(order[: max(cut_at, 0)], shape, strides)
    inner_sizes, inner_strides = _merge(order[cut_at + 1 :], shape, strides)
    outer, inner = math.prod(outer_sizes), math.prod(inner_sizes)
    layout = CONTIGUOUS if inner > 1 else CHANNELS_LAST
    cuts = _cut(layout, itemsize, outer, channels, inner)
    operands = tuple(
        _operand_layout(
            layout,
            stored_itemsize or itemsize,
            directly[k],
            channel_strides[k],
            repeat_strides[k],
            (outer_sizes, outer_strides[k]),
            (inner_sizes, inner_strides[k]),
        )
        for k in range(len(strides))
    )
    repeats = math.prod(repeat_sizes)
    walked = tuple(d for d in order if d not in last)
    return LayoutPlan(
        layout,
        itemsize,
        repeats,
        outer,
        channels,
        inner,
        repeat_sizes,
        channel_sizes,
        outer_sizes,
        inner_sizes,
        *cuts,
        _rows_of_block(layout, itemsize, repeats, channels),
        walked,
        operands,
    )


def plan_rows(
    shape: tuple[int, ...],
    normalized: tuple[int, ...],
    itemsize: int,
    strides: tuple[tuple[int, ...], ...],
    directly: tuple[bool, ...],
    inputs: int,
    parameters: int = 0,
    stored_itemsize: int | None = None,
) -> LayoutPlan:
    """Plan a call over arrays of one shape, with statistics for each row: over `normalized` axes.

    Rows are numbered in C order of the other axes. Those that the first operands, so many
    ``inputs``, walk as one are the channels of the plan, those that step further its repeats;
    ``walked`` counts in `normalized`. An output follows, and then operands that change no cut:
    staged, unless they walk these rows as one. So many ``parameters`` come last: one value for each
    element of a row, the same for all rows, in the order in which a row is walked. In channels_last
    that is one for all channels.
    """
    row_axes = [d for d in range(len(shape)) if d not in normalized and shape[d] > 1]
    cut = len(row_axes)
    while cut > 0 and len(_merge(row_axes[cut - 1 :], shape, strides[:inputs])[0]) == 1:
        cut -= 1
    rows = tuple(row_axes[cut:]), tuple(row_axes[:cut])
    direct = tuple(
        directly[k] and (k <= inputs or len(_merge(rows[0], shape, (strides[k],))[0]) <= 1)
        for k in range(len(strides))
    )
    plan = plan_layout(shape, *rows, itemsize, strides, direct, stored_itemsize)
    parameter = OperandLayout(
        True, plan.inner * itemsize, 0, (0,) * len(plan.repeat_axis_sizes), (), (), ()
    )
    return plan._replace(
        walked=tuple(normalized.index(d) for d in plan.walked),
        operands=plan.operands + (parameter,) * parameters,
    )
