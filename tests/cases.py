"""Shapes and buffers that are awkward for a reason."""

import numpy as np

# (outer, channels, inner) of one NCHW call. Around a lane set (64 and 32), around what a lane takes
# before it is emptied (1024 and 512), around a chunk (4096 and 2048 elements), around a block.
CONTIGUOUS = [
    *[(3, 2, inner) for inner in (1, 2, 3, 7, 15, 16, 17, 31, 33, 49, 63, 64, 65, 97)],
    *[(2, 3, inner) for inner in (511, 512, 513, 1000, 1023, 1024, 1025)],
    *[(2, 1, inner) for inner in (2047, 2048, 2049, 4095, 4096, 4097, 8200)],
    *[(outer, 5, 4) for outer in (1, 2, 511, 512, 513, 1025)],
    *[(outer, 3, 49) for outer in (11, 12, 13)],  # planes that are rows, from so many on
    *[(12, 3, inner) for inner in (7, 8, 15, 16, 127, 128, 129)],  # and up to so long
    (1, 2, 2),
    (1, 70, 49),
    (7, 33, 49),
    (20, 70, 49),  # rows of more lanes than are walked at a time
    (3, 2, 3 * 4096 + 1),
    (85, 3, 49),
    (1, 2, 131072 + 4096 + 77),
    (40, 1, 10000),
]

# (rows, channels) of one NHWC call. Around rows summed together (16, 32), around a chunk (256, or
# 512 of narrow rows), a block (640 and more), around vectors and tiles of channels, and around the
# widest narrow rows (72 channels of float64, 144 of float32).
CHANNELS_LAST = [
    *[(rows, 5) for rows in (2, 3, 15, 16, 17, 31, 32, 33, 255, 256, 257, 511, 512, 513, 1100)],
    *[(37, channels) for channels in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33)],
    *[(33, channels) for channels in (63, 64, 65, 72, 73, 79, 127, 130, 144, 145, 257)],
    *[(rows, 66) for rows in (511, 512, 513, 1027)],
    (70, 2049),
    (40000, 3),
    (2100, 70),
]

SMALL_CONTIGUOUS = [(3, 2, 49), (2, 3, 1025), (5, 4, 4), (2, 1, 4097)]
SMALL_CHANNELS_LAST = [(33, 5), (37, 17), (300, 66)]


def batches(contiguous=CONTIGUOUS, channels_last=CHANNELS_LAST):
    """Pairs of a C-contiguous shape and its channel axis."""
    return [*[(shape, 1) for shape in contiguous], *[(shape, 1) for shape in channels_last]]


def small_batches():
    return batches(SMALL_CONTIGUOUS, SMALL_CHANNELS_LAST)


def misaligned(x):
    """The same values, one byte past an element boundary."""
    memory = np.empty(x.nbytes + 1, np.uint8)
    view = memory[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


def offset_by_one(x):
    """The same values, aligned to an element but not to a vector."""
    view = np.empty(x.size + 1, x.dtype)[1:].reshape(x.shape)
    view[...] = x
    return view


def in_larger_array(x):
    """A view with gaps along every axis."""
    big = np.empty([2 * n + 1 for n in x.shape], x.dtype)
    view = big[tuple(slice(1, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def cropped(x):
    """A view with a margin around every axis."""
    big = np.full([n + 2 for n in x.shape], np.nan, x.dtype)
    view = big[tuple(slice(1, -1) for _ in x.shape)]
    view[...] = x
    return view


def reversed_everywhere(x):
    flip = tuple(slice(None, None, -1) for _ in x.shape)
    return np.ascontiguousarray(x[flip])[flip]


def channels_last_memory(x):
    """NCHW to look at, NHWC in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


def record_field(x):
    """A field of a record: strides that are no multiple of the item size."""
    records = np.zeros(x.shape, [("flag", np.uint8), ("value", x.dtype)])
    records["value"] = x
    return records["value"]


BUFFERS = {
    "contiguous": np.array,
    "fortran": lambda x: np.array(x, order="F"),
    "misaligned": misaligned,
    "offset_by_one": offset_by_one,
    "in_larger_array": in_larger_array,
    "cropped": cropped,
    "reversed": reversed_everywhere,
    "channels_last": channels_last_memory,
    "record_field": record_field,
}


def in_layout(x, axis):
    """NCHW data, or the same as NHWC."""
    return x if axis == 1 else np.ascontiguousarray(np.moveaxis(x, 1, -1))


# Powers of two: integers below 2048 times these are exact, denormal or not.
EXTREMES = {
    "f32": (2.0**-149, 2.0**-138, 2.0**-60, 2.0**60, 2.0**100),
    "f64": (2.0**-1074, 2.0**-1063, 2.0**-600, 2.0**600, 2.0**1000),
}
