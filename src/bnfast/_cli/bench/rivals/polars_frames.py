"""polars: a data frame, whose columns lie one after the other."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnfast._cli.bench.cell import Cell, mean_and_std
from bnfast._cli.bench.rivals import Contender, NotOffered, Rival


class PolarsFrames(Rival):
    """Its mean and variance; nothing is said of the way of a table into columns."""

    takes_halves = False

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        # It has no setting for it, but reads this when it is imported.
        os.environ["POLARS_MAX_THREADS"] = str(threads)
        import polars

        if polars.thread_pool_size() != threads:
            raise RuntimeError(f"it was imported before, with {polars.thread_pool_size()} threads")
        self.polars = polars

    @property
    def version(self) -> str:
        """What is measured."""
        return str(self.polars.__version__)

    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return a selection."""
        if cell.normalization != "moments":
            raise NotOffered("moments alone are driven here")
        frame = self.polars.from_numpy(cell.data.rows)
        every = self.polars.all()
        mean, var = every.mean().name.suffix(" mean"), every.var(ddof=0).name.suffix(" var")

        def read(selected: Any) -> NDArray[Any]:
            return mean_and_std(*np.asarray(selected.row(0)).reshape(2, -1))

        return Contender(lambda: frame.select(mean, var), read, copies=True, note="by columns")
