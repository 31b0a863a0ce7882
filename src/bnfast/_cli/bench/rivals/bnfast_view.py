"""bnfast once more, on views: what arrays of another order of axes cost beside plain ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import bnfast
from bnfast._cli.bench.cell import Cell
from bnfast._cli.bench.normalizations import NORMALIZATIONS
from bnfast._cli.bench.rivals import Contender, NotOffered, Rival
from bnfast._typing import Array


class ChannelsLastView(Rival):
    """On (N, C, H, W) views of NHWC memory, as PyTorch's channels_last tensors are."""

    @property
    def version(self) -> str:
        """What is measured."""
        return bnfast.__version__

    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return bnfast's call on views of the cell's arrays."""
        if cell.data.layout != "nhwc":
            raise NotOffered("views of NHWC arrays alone")
        norm = NORMALIZATIONS[cell.normalization]
        views: dict[str, Any] = {
            name: np.moveaxis(getattr(cell.data, name), -1, 1) for name in ("x", "dy", "out")
        }
        data = replace(cell.data, axis=1, **views)

        def read(results: Any) -> Array:
            return np.moveaxis(norm.read(results), 1, -1)

        call = norm.ours(cell.operation, data, None if fresh else data.out)
        return Contender(call, read, itself=True)
