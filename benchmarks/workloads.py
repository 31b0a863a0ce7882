"""The shapes that are measured: (batch, channels, height, width), or (batch, channels)."""

from typing import NamedTuple


class Workload(NamedTuple):
    name: str
    shape: tuple[int, ...]  # channels second


IMAGES = [
    Workload("reference", (32, 64, 56, 56)),
    Workload("resnet50_stem", (50, 64, 112, 112)),
    Workload("resnet50_28", (50, 128, 28, 28)),
    Workload("resnet50_14", (50, 256, 14, 14)),
    Workload("resnet50_7", (50, 2048, 7, 7)),
    Workload("inception_35", (96, 96, 35, 35)),
    Workload("odd_channels", (32, 27, 33, 33)),
    Workload("three_channels", (8, 3, 224, 224)),
    Workload("one_image", (1, 257, 28, 28)),
]

ROWS = [Workload("mlp_512", (16, 512)), Workload("mlp_2048", (256, 2048))]

LAYOUTS = ("nchw", "nhwc")


def in_layout(workload: Workload, layout: str) -> tuple[tuple[int, ...], int]:
    """Return the shape in memory and the channel axis."""
    if layout == "nchw":
        return workload.shape, 1
    n, c, *spatial = workload.shape
    return (n, *spatial, c), -1


CASES = [
    *[(workload, layout) for workload in IMAGES for layout in LAYOUTS],
    *[(workload, "nchw") for workload in ROWS],
]
