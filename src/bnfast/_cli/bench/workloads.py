"""The shapes that are measured: (batch, channels, height, width), (batch, channels), rows, weights.

Rows are arrays of any rank whose last axis is normalized; tables have their columns along it;
weights have their filters first.
"""

from __future__ import annotations

import math

from bnfast._cli.failure import did_you_mean

Shape = tuple[
    int, ...
]  # channels second, however the layout has it; rows, tables, weights as they are

SETS: dict[str, tuple[Shape, ...]] = {
    # Every normalization of ResNet-50, a batch of 50 images of 224 by 224.
    "resnet50": (
        *((50, 64, 112, 112), (50, 256, 56, 56), (50, 64, 56, 56)),
        *((50, 512, 28, 28), (50, 128, 28, 28), (50, 1024, 14, 14)),
        *((50, 256, 14, 14), (50, 2048, 7, 7), (50, 512, 7, 7)),
    ),
    # Some of ResNet-50, BN-Inception and Inception-v3, in the batches they are trained with.
    "small": (
        *((50, 64, 112, 112), (50, 256, 56, 56), (50, 128, 28, 28)),
        *((50, 1024, 14, 14), (50, 512, 7, 7), (96, 224, 14, 14)),
        *((96, 320, 7, 7), (96, 64, 147, 147), (96, 80, 73, 73)),
        *((96, 96, 35, 35), (96, 160, 17, 17), (96, 384, 8, 8)),
    ),
    # ResNet-18, a batch of 16 images of 112 by 112, each shape once.
    "resnet18": (
        *((16, 64, 56, 56), (16, 64, 28, 28), (16, 128, 14, 14), (16, 256, 7, 7)),
        (16, 512, 4, 4),
    ),
    # Channels that fill no vector.
    "odd": (
        *((8, 3, 224, 224), (32, 23, 35, 35), (32, 27, 33, 33), (32, 33, 28, 28)),
        *((16, 54, 42, 42), (32, 257, 14, 14), (32, 810, 7, 7)),
    ),
    # Small batches.
    "few": ((1, 64, 56, 56), (2, 128, 28, 28), (1, 256, 14, 14), (8, 256, 14, 14), (2, 512, 7, 7)),
    # Planes of 1, 4, 49 and 196 elements.
    "planes": ((50, 4096, 1, 1), (50, 2048, 2, 2), (50, 512, 7, 7), (50, 256, 14, 14)),
    # Input and output together: 32 KiB, 400 KiB, 3 MiB and 12 MiB of float32.
    "cache": ((4, 16, 8, 8), (4, 64, 14, 14), (8, 64, 28, 28), (16, 128, 28, 28)),
    # Nothing but the call.
    "call": ((1, 64), (2, 64)),
    # What `pytest benchmarks` keeps track of.
    "tracked": (
        *((32, 64, 56, 56), (50, 64, 112, 112), (50, 128, 28, 28), (50, 256, 14, 14)),
        *((50, 2048, 7, 7), (96, 96, 35, 35), (32, 27, 33, 33), (8, 3, 224, 224)),
        *((1, 257, 28, 28), (1, 256, 14, 14), (8, 256, 14, 14), (16, 512), (256, 2048)),
    ),
    "quick": ((50, 128, 28, 28), (50, 512, 7, 7), (2, 64)),
    # Rows of transformers and others: an even and an odd number of them, far from and in a cache.
    "rows": (
        *((256, 768), (257, 768), (5120, 1024), (128, 40, 1024), (64, 30, 512), (31, 301), (15, 3)),
    ),
    # Of the networks that draw pictures, 32 groups each.
    "groups": ((2, 320, 96, 96), (2, 640, 48, 48), (2, 1280, 24, 24), (1, 512, 192, 192)),
    "tracked-rows": ((256, 768), (5120, 1024), (64, 30, 512), (31, 301)),
    "tracked-groups": ((2, 320, 96, 96), (2, 1280, 24, 24), (50, 512, 7, 7), (8, 54, 21, 21)),
    "quick-rows": ((256, 768), (64, 30, 512), (31, 301)),
    "quick-groups": ((2, 1280, 24, 24), (50, 128, 28, 28), (50, 512, 7, 7)),
    # Of ResNet-50 (its first, two of 3x3, two of 1x1, its last) and of transformers.
    "weights": (
        *((64, 3, 7, 7), (64, 64, 3, 3), (512, 512, 3, 3), (512, 2048, 1, 1), (2048, 512, 1, 1)),
        *((1000, 2048), (768, 768), (768, 3072), (4096, 1024)),
    ),
    "tracked-weights": ((64, 3, 7, 7), (512, 512, 3, 3), (768, 3072)),
    "quick-weights": ((64, 3, 7, 7), (512, 512, 3, 3), (768, 768)),
    # Of data sets, 3 to 80 columns: past the caches, in the last level, in the second; and images.
    "tables": (
        *((5_000_000, 3), (3_000_000, 5), (1_000_000, 27), (1_500_000, 48), (1_000_000, 64)),
        *((600_000, 72), (700_000, 80), (300_000, 3), (60_000, 64), (60_000, 3), (3000, 64)),
        (32, 224, 224, 3),
    ),
    "tracked-tables": ((300_000, 3), (200_000, 64), (60_000, 64), (50_000, 80)),
    "quick-tables": ((300_000, 3), (60_000, 64), (50_000, 80)),
}

LAYOUTS = ("nchw", "nhwc")
ROWS = "rows"  # the one layout that rows have
FILTERS = "filters"  # and that weights have, one filter after the other
TABLE = "table"  # and that tables have, one row after the other
ALL_LAYOUTS = (*LAYOUTS, ROWS, FILTERS, TABLE)


def name_of(shape: Shape) -> str:
    """Return the shape as it is written on the command line."""
    return "x".join(map(str, shape))


def in_layout(shape: Shape, layout: str) -> tuple[Shape, int]:
    """Return the shape in memory and the axis of channels, or of the elements of a row."""
    if layout == "nchw":
        return shape, 1
    if layout == ROWS:
        return shape, -1
    n, c, *spatial = shape
    return (n, *spatial, c), -1


def layouts_of(shape: Shape, layouts: tuple[str, ...] = LAYOUTS) -> tuple[str, ...]:
    """Return the layouts, or one of them where both are the same: planes of one element."""
    return layouts if math.prod(shape[2:]) > 1 else layouts[:1]


def parse(text: str) -> tuple[Shape, ...]:
    """Return the shapes of a list of sets and shapes, each once: ``call,odd,8x64x28x28``."""
    shapes: list[Shape] = []
    for name in text.split(","):
        if name in SETS:
            shapes += SETS[name]
            continue
        sizes = name.split("x")
        if len(sizes) < 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ValueError(
                f"{name!r} is neither NxC, NxCxHxW nor one of: {', '.join(SETS)}"
                f"{did_you_mean(name, SETS)}"
            )
        shapes.append(tuple(map(int, sizes)))
    return tuple(dict.fromkeys(shapes))
