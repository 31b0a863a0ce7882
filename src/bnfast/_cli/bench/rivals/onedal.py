"""oneDAL: what scikit-learn-intelex's BasicStatistics ends in, without the checks before it."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import daal4py
import numpy as np
from numpy.typing import NDArray
from onedal.basic_statistics import BasicStatistics

from bnfast._cli.bench.cell import Cell, mean_and_std
from bnfast._cli.bench.rivals import Contender, NotOffered, Rival


class OneDal(Rival):
    """Its mean and variance of the columns of the table itself."""

    takes_halves = False

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        daal4py.daalinit(threads)

    @property
    def version(self) -> str:
        """What is measured."""
        return metadata.version("scikit-learn-intelex")

    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return a fit."""
        if cell.normalization != "moments":
            raise NotOffered("moments alone are driven here")
        rows = cell.data.rows
        count = len(rows)
        statistics = BasicStatistics(result_options=["mean", "variance"])

        def call() -> Any:
            statistics.fit(rows)
            return statistics.mean_, statistics.variance_

        def read(results: Any) -> NDArray[Any]:
            mean, unbiased = results
            return mean_and_std(mean, np.asarray(unbiased, np.longdouble) * (count - 1) / count)

        return Contender(call, read)
