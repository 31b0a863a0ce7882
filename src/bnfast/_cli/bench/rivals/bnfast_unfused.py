"""bnfast once more, in two or three operations: what fusing them saves."""

from __future__ import annotations

from typing import Any

import numpy as np

import bnfast
from bnfast._cli.bench.cell import EPS, Activated, Cell
from bnfast._cli.bench.rivals import ACTIVATED, Contender, NotOffered, Rival


class Unfused(Rival):
    """Batch norm, and NumPy for what comes after it, in place."""

    @property
    def version(self) -> str:
        """What is measured."""
        return bnfast.__version__

    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return the calls one after the other."""
        if cell.normalization not in ACTIVATED:
            raise NotOffered("nothing follows it")
        b: Activated = cell.data
        out = None if fresh else b.out

        def forward() -> Any:
            if cell.operation == "inference":
                given = b.x, b.mean, b.var, b.weight, b.bias
                y = bnfast.batch_norm(*given, eps=EPS, axis=b.axis, out=out)
            else:
                y, *_ = bnfast.batch_norm_forward(b.x, b.weight, b.bias, EPS, axis=b.axis, out=out)
            if b.residual is not None:
                np.add(y, b.residual, out=y)
            return np.maximum(y, 0, out=y)

        def backward() -> Any:
            dz = np.multiply(b.dy, b.y > 0)
            saved = b.exact_mean, b.exact_invstd, b.weight
            return *bnfast.batch_norm_backward(dz, b.x, *saved, axis=b.axis, out=out), dz

        return Contender(
            backward if cell.operation == "backward" else forward, self._read, itself=True
        )

    @staticmethod
    def _read(results: Any) -> Any:
        return results[0] if isinstance(results, tuple) else results
