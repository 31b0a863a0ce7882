"""Draw which values share a statistic, for docs/choosing.md: python docs/draw_axes.py [FILE.png].

Data are cubes of images, channels and pixels; weights are cubes of filters, the channels that they
read, and places of the kernel. Small letters would be lost on small screens, so there are few.
"""

import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from PIL import Image

PICTURE = Path(__file__).parent / "axes.png"

SIDE = 4  # of a cube, in values
PART = 2  # of them, for ghost batches and groups of channels
DEPTH = np.array([0.42, 0.36])  # where the next image is drawn, behind and to the right
OTHERS = "0.82"
BLUE, ORANGE = "#0072B2", "#E69F00"
OF_DATA, OF_WEIGHTS = (BLUE, ("N", "C", "H, W")), (ORANGE, ("out", "in", "k, k"))

Which = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class Member(NamedTuple):
    """A cube: its name, what is said of it, its colour and axes, which values share a statistic."""

    name: str
    said: str
    kind: tuple[str, tuple[str, str, str]]
    shares: Which  # of image, channel and pixel, whose first, last and first are seen


MEMBERS = (
    Member("batch", "one channel, all images", OF_DATA, lambda n, c, p: c == SIDE - 1),
    Member(
        "ghost batch",
        "one channel, some images",
        OF_DATA,
        lambda n, c, p: (c == SIDE - 1) & (n < PART),
    ),
    Member("whitening", "some channels, all images", OF_DATA, lambda n, c, p: c >= SIDE - PART),
    Member(
        "instance, filter response",
        "one channel, one image",
        OF_DATA,
        lambda n, c, p: (c == SIDE - 1) & (n == 0),
    ),
    Member(
        "group",
        "some channels, one image",
        OF_DATA,
        lambda n, c, p: (c >= SIDE - PART) & (n == 0),
    ),
    Member("layer, RMS: of an image", "all channels, one image", OF_DATA, lambda n, c, p: n == 0),
    Member(
        "layer, RMS: of a pixel",
        "all channels, one place",
        OF_DATA,
        lambda n, c, p: (n == 0) & (p == 0),
    ),
    Member(
        "weight norm, weight\nstandardization",
        "one filter",
        OF_WEIGHTS,
        lambda n, c, p: n == 0,
    ),
    Member("spectral norm", "all filters", OF_WEIGHTS, lambda n, c, p: n >= 0),
)


def shared(member: Member) -> np.ndarray:
    """Return which values of (images, channels, pixels) share a statistic with the value seen."""
    return np.broadcast_to(member.shares(*np.ogrid[:SIDE, :SIDE, :SIDE]), (SIDE, SIDE, SIDE))


def draw_cube(axes: Axes, member: Member) -> None:
    """Draw the three faces that are seen: the first image, the last channel, the first pixels."""
    colour, (images, channels, pixels) = member.kind
    is_shared = shared(member)
    right, up = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    # Of each face: its corner, the directions of its rows and columns, its values, its brightness.
    faces = (
        (SIDE * up, right, -up, is_shared[0].T, 1.0),
        (SIDE * up, right, DEPTH, is_shared[:, :, 0], 1.1),
        (SIDE * (right + up), DEPTH, -up, is_shared[:, -1].T, 0.86),
    )
    for corner, along, across, values, brightness in faces:
        for (i, j), value in np.ndenumerate(values):
            start = corner + j * along + i * across
            corners = [start, start + along, start + along + across, start + across]
            face = np.clip(np.array(to_rgb(colour if value else OTHERS)) * brightness, 0, 1)
            axes.add_patch(Polygon(corners, facecolor=face, edgecolor="white", linewidth=1.2))
    axes.text(SIDE / 2, -0.2, channels, ha="center", va="top")
    axes.text(-0.25, SIDE / 2, pixels, ha="center", va="center", rotation=90)
    axes.text(*(SIDE * right + 0.5 * SIDE * DEPTH + [0.25, -0.1]), images, va="top")
    axes.set_title(member.name, fontweight="bold", pad=5)
    axes.text(SIDE * (1 + DEPTH[0]) / 2, -0.95, member.said, ha="center", va="top")
    axes.set(aspect="equal", xlim=(-1, 6.9), ylim=(-1.6, SIDE * (1 + DEPTH[1]) + 0.1))
    axes.set_axis_off()


def draw(path: Path) -> None:
    """Write a PNG, the same bytes each time."""
    with rc_context({"font.size": 12, "axes.titlesize": 12}):
        figure = Figure(figsize=(8, 7.6), dpi=150, layout="constrained", facecolor="white")
        for axes, member in zip(figure.subplots(3, 3).flat, MEMBERS, strict=True):
            draw_cube(axes, member)
        figure.get_layout_engine().set(hspace=0.09)
        figure.suptitle("Which values share one statistic", fontweight="bold", fontsize=15)
        drawn = BytesIO()
        figure.savefig(drawn, format="png")
    picture = Image.open(drawn).convert("RGB")  # with a palette it is half as large
    picture = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    picture.save(path, format="png", optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else PICTURE)
