"""Files of images, which Pillow reads, as one data set of pixels."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from bnfast import summary
from bnfast._cli.failure import Failure, cannot_be_read
from bnfast._cli.stats.source import UNITS, Advance, Axis, LeftOut, Source, bytes_of_block
from bnfast._threads import allowed_threads
from bnfast._typing import Array
from bnfast.statistics import Summary

_GREY_16 = "I;16"  # of any byte order
_DTYPES = {_GREY_16: np.uint16, "I": np.int32, "F": np.float32, "1": np.bool_}


def _mode_of(path: Path, image: Image.Image, convert: str | None) -> str:
    """Return the mode in which pixels are read: of palettes, that of their colours."""
    mode = image.mode
    if mode.startswith(_GREY_16):
        mode = _GREY_16
    elif mode in ("P", "PA"):
        mode = "RGBA" if image.has_transparency_data else "RGB"
    if convert and mode in (_GREY_16, "I", "F"):
        raise Failure(f"{path}: expected 8 bits for --convert, got {mode}")
    return convert or mode


def _read_mode(path: Path, convert: str | None) -> str:
    """Return the mode of an image, of which the header alone is read."""
    try:
        with Image.open(path) as image:
            return _mode_of(path, image, convert)
    except Failure:
        raise
    except Exception as error:  # the readers of formats raise anything
        raise cannot_be_read(str(path), error) from error


def _read(path: Path, convert: str | None) -> tuple[str, Array]:
    """Return the mode and the pixels, of shape (height, width[, channels])."""
    try:
        with Image.open(path) as image:
            mode = _mode_of(path, image, convert)
            as_it_is = mode in (image.mode, _GREY_16)
            pixels = np.asarray(image if as_it_is else image.convert(mode))
    except Failure:
        raise
    except Exception as error:
        raise cannot_be_read(str(path), error) from error
    return mode, pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nothing, say, which the reader will report
        return 0


class Images(Source):
    """Images of one mode and of any size, whose pixels are one data set.

    Parameters
    ----------
    paths : sequence of Path
        The files.
    convert : str or None
        The mode that all are converted to.
    axis : tuple of int or None
        The channels, (-1,), or (), for one value of all.
    left_out : LeftOut
        Takes what cannot be read, and what has another mode than the first.
    """

    def __init__(
        self, paths: Sequence[Path], convert: str | None, axis: Axis, left_out: LeftOut
    ) -> None:
        if axis not in (None, (), (-1,)):
            given = ",".join(map(str, axis or ()))
            raise Failure(f"{paths[0]}: expected --axis -1 or none for images, got {given}")
        self._convert, self._left_out = convert, left_out
        self._number = 0
        self._paths, self._mode = self._from_first_readable(paths)
        bands = Image.getmodebandnames(self._mode)
        self._kept = () if axis == () else (1,)
        super().__init__(
            str(self._paths[0]),
            sum(map(_size, self._paths)),
            (len(bands),) if self._kept else (),
            f"{self._mode} images",
            UNITS.get(np.dtype(_DTYPES.get(self._mode, np.uint8)), 1.0),
            (-1,) if self._kept else (),
            bands if self._kept else None,
        )

    @property
    def title(self) -> str:
        """Say how many there are, too."""
        return f"{self._number:,} {self.kind}"

    def _from_first_readable(self, paths: Sequence[Path]) -> tuple[Sequence[Path], str]:
        for number, path in enumerate(paths):
            try:
                return paths[number:], _read_mode(path, self._convert)
            except Failure as failure:
                self._left_out.add(failure)
        raise Failure(f"{paths[0]}: expected images, got {len(paths):,} that cannot be read")

    def summarize(self, finite: bool, advance: Advance) -> Summary:
        """Read all images, and sum the pixels of many at once."""
        total: Summary | None = None
        for pixels in self._batches(advance):
            part = summary(pixels, self._kept or None, finite=finite)
            total = part if total is None else total.merge(part)
        if total is None:  # headers alone could be read
            raise Failure(f"{self.name}: expected images, got none whose pixels can be read")
        return total

    def _batches(self, advance: Advance) -> Iterator[Array]:
        batch: list[Array] = []
        size, most = 0, bytes_of_block(self.channels)
        for pixels in self._pixels(advance):
            batch.append(pixels.reshape(-1, self.channels[0] if self.channels else 1))
            size += pixels.nbytes
            if size >= most:
                yield np.concatenate(batch)
                batch, size = [], 0
        if batch:
            yield np.concatenate(batch)

    def _pixels(self, advance: Advance) -> Iterator[Array]:
        for number, (path, future) in enumerate(self._futures(), 1):
            try:
                mode, pixels = future.result()
                if mode != self._mode:
                    raise Failure(self._differs(path, mode))
                self._number += 1
                yield pixels
            except Failure as failure:
                self._left_out.add(failure)
            advance(_size(path), f"{number:,} of {len(self._paths):,} images")

    def _futures(self) -> Iterator[tuple[Path, Future[tuple[str, Array]]]]:
        """Yield all images in order, of which a few are being read ahead."""
        threads = allowed_threads()
        ahead: deque[tuple[Path, Future[tuple[str, Array]]]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            for path in self._paths:
                ahead.append((path, pool.submit(_read, path, self._convert)))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft()
            yield from ahead

    def _differs(self, path: Path, mode: str) -> str:
        """Say that an image has another mode; and what all have, if the run ends with that."""
        text = f"{path}: expected {self._mode} as in {self.name}, got {mode}"
        if self._left_out.skip:
            return text
        modes: Counter[str] = Counter()
        for other in self._paths:
            try:
                modes[_read_mode(other, self._convert)] += 1
            except Failure:
                modes["unreadable"] += 1
        counted = ", ".join(f"{number:,} {name}" for name, number in modes.most_common())
        return f"{text}; of all images: {counted}; see --skip and --convert"
