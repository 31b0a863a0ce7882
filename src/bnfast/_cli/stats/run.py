"""The order of a run: open everything, read everything, and only then write and print."""

from __future__ import annotations

import os
import warnings
from argparse import Namespace
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from bnfast._cli.failure import Failure, cannot_be_read, missing
from bnfast._cli.stats import arrays, report
from bnfast._cli.stats.source import Axis, DataSet, LeftOut, Open, Source
from bnfast.statistics import Summary

_IMAGES = (
    *(".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGES and not path.name.startswith(".")


def _images_in(folder: Path) -> list[Path]:
    """Return all images of a folder, and of the folders within it."""

    def refuse(error: OSError) -> None:
        raise cannot_be_read(str(error.filename), error) from error

    found = [
        Path(within, name)
        for within, _, names in os.walk(folder, onerror=refuse)
        for name in names
        if _is_image(Path(name))
    ]
    if not found:
        raise Failure(f"{folder}: expected a folder with images, or of zarr, got one without")
    return sorted(found)


def _images_of(path: Path) -> list[Path]:
    """Return the images that a path stands for: none for arrays."""
    try:
        path.stat()
        if path.is_dir():
            return [] if arrays.is_zarr(path) else _images_in(path)
    except OSError as error:
        raise cannot_be_read(str(path), error) from error
    return [path] if _is_image(path) else []


def _arrays_of(path: Path, options: Namespace) -> Iterator[Open]:
    if path.is_dir():
        return arrays.open_zarr(path, options.member, options.axis)
    if path.suffix == ".npz":
        return arrays.open_npz(path, options.member, options.axis)
    if path.suffix == ".npy":
        return arrays.open_npy(path, options.axis)
    raise Failure(f"{path}: expected .npy, .npz, zarr, an image or a folder of images")


def _check_used(options: Namespace, images: Collection[Path]) -> None:
    """Refuse options that nothing would be done with."""
    if options.member and not any(arrays.is_zarr(p) or p.suffix == ".npz" for p in options.paths):
        raise Failure("--member expects .npz or zarr, got neither")
    if options.convert and not images:
        raise Failure("--convert expects images, got none")
    if options.divide_by and options.form != "normalize":
        raise Failure("--divide-by expects --normalize, which prints what is divided")


def _open_images(paths: list[Path], convert: str | None, axis: Axis, left_out: LeftOut) -> Source:
    try:
        from bnfast._cli.stats.images import Images
    except ImportError as error:
        raise missing("pillow for images", "stats", error) from error
    return Images(paths, convert, axis, left_out)


def _openers(options: Namespace, left_out: LeftOut) -> list[Open]:
    """Return what opens each source: all images are one, in the place of the first of them."""
    openers: list[Open] = []
    images: list[Path] = []
    for path in options.paths:
        try:
            found = _images_of(path)
            if found and not images:
                named = options.convert, options.axis, left_out
                openers.append(partial(_open_images, images, *named))
            images += found
            openers += [] if found else _arrays_of(path, options)
        except Failure as failure:
            left_out.add(failure)
    _check_used(options, images)
    return openers


def _open_all(options: Namespace, left_out: LeftOut) -> list[Source]:
    """Read all headers: what does not fit is found before anything large is read."""
    sources: list[Source] = []
    for open_source in _openers(options, left_out):
        try:
            source = open_source()
            if sources:
                _check_alike(source, sources[0])
            sources.append(source)
        except Failure as failure:
            left_out.add(failure)
    return sources


def _check_alike(source: Source, first: Source) -> None:
    if source.channels != first.channels:
        raise Failure(
            f"{source.name}: expected {_many(first)} as in {first.name}, "
            f"got {_many(source)} ({source.kind}); see --axis, --member and --skip"
        )


def _many(source: Source) -> str:
    if len(source.channels) == 1:
        return f"{source.channels[0]} channels"
    return f"channels of shape {source.channels}" if source.channels else "no channels"


def _read(sources: list[Source], finite: bool, left_out: LeftOut) -> DataSet:
    total: Summary | None = None
    read: list[Source] = []
    with report.progress_bar(sum(source.size for source in sources)) as advance:
        for source in sources:
            try:
                part = source.summarize(finite, advance)
                total = part if total is None else _merged(total, part, source.name)
                read.append(source)
            except Failure as failure:
                left_out.add(failure)
    if total is None:
        raise Failure(f"nothing could be read: {left_out.reasons[0]}")
    return DataSet(total, read, left_out.reasons)


def _merged(total: Summary, part: Summary, name: str) -> Summary:
    try:
        return total.merge(part)
    except ValueError as error:  # more values than can be counted
        raise Failure(f"{name}: {error}") from error


def _save(statistics: Summary, path: Path) -> None:
    """Write all of the file, or nothing."""
    part = path.with_name(path.name + ".part")
    try:
        statistics.save(part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise Failure(f"{path}: cannot be written: {error.strerror}") from error


def run(options: Namespace) -> int:
    """Read everything, write and print; return the exit status."""
    left_out = LeftOut(options.skip)
    show = report.showing(options.form, options.divide_by)
    # Readers of zarr and of images warn of what they read, in lines of code.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = _read(_open_all(options, left_out), options.finite, left_out)
    text = show(data)
    if options.save is not None:
        _save(data.statistics, options.save)
    report.print_left_out(left_out.reasons)
    print(text)
    return 0
