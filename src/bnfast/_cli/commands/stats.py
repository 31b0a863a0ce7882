"""The arguments of ``python -m bnfast stats``."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

from bnfast._cli.arguments import Parser, number, one_of


def _axes(text: str) -> tuple[int, ...]:
    try:
        return () if text == "none" else tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ArgumentTypeError(
            f"expected integers with commas between them, or none, got {text!r}"
        ) from None


def add_arguments(parser: Parser) -> None:
    """Add the arguments of the command."""
    parser.description = (
        "Print count, mean, standard deviation, extremes and the number of values that are not "
        "finite, of each channel of a data set of any size: of all files together."
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help=".npy, .npz, zarr, an image, a folder of images, or what --save wrote",
    )
    parser.add_argument(
        "--axis",
        type=_axes,
        metavar="AXIS,...|none",
        help="the axes that are kept: that of the channels, several (-2,-1), or none for one value "
        "of all (default: 1, or none for arrays of one axis; of images, the colours)",
    )
    # What argparse takes for a negative number, and not for an option; Python 3.14 does it so.
    parser._negative_number_matcher = re.compile(r"-\d")
    parser.add_argument(
        "--member",
        action="append",
        default=[],
        metavar="NAME",
        help="an array in .npz or in a group of zarr; may be repeated (default: all)",
    )
    parser.add_argument(
        "--finite", action="store_true", help="leave out values that are NaN or infinite"
    )
    modes = ("L", "RGB", "RGBA")
    parser.add_argument(
        "--convert",
        type=one_of(modes),
        metavar="MODE",
        help=f"convert images to this mode first, of {', '.join(modes)}",
    )
    parser.add_argument(
        "--skip",
        action="store_true",
        help="leave out what cannot be read, or differs from the first in mode or channels",
    )
    parser.add_output(
        "--save",
        suffix=".npz",
        metavar="FILE.npz",
        help="write the statistics, to be merged later",
    )
    forms = parser.add_mutually_exclusive_group()
    for form, text in (
        ("json", "print JSON, with all digits"),
        ("normalize", "print the lines that normalize such data in torchvision and in Keras"),
    ):
        forms.add_argument(
            f"--{form}", dest="form", action="store_const", const=form, default="table", help=text
        )
    parser.add_argument(
        "--divide-by",
        type=number(float, above=0),
        metavar="NUMBER",
        help="for --normalize, the value that counts as 1 (default: 255 and 65535 for unsigned "
        "integers of 8 and 16 bits, 1 for others)",
    )


def run(options: Namespace) -> int:
    """Read, write and print; return the exit status."""
    from bnfast._cli.stats import run as stats

    return stats.run(options)
