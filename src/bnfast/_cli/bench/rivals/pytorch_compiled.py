"""PyTorch, compiled: what its compiler makes one loop of."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from bnfast._cli.bench.cell import EPS, Activated, Cell
from bnfast._cli.bench.rivals import ACTIVATED, Contender, NotOffered
from bnfast._cli.bench.rivals.pytorch import ALL, PyTorch, _reader, _tensor, aten, shared


class PyTorchCompiled(PyTorch):
    """Batch norm, the sum and ReLU as one function, by torch.compile; its outputs are new."""

    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return a compiled call on tensors that share the memory of the cell's arrays."""
        if cell.normalization not in ACTIVATED:
            raise NotOffered("nothing follows it")
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise NotOffered("no C++ compiler was found")
        b: Activated = cell.data
        weight, bias = shared(b.weight), shared(b.bias)
        mean, var, invstd = shared(b.mean), shared(b.var), shared(b.invstd)
        residual = None if b.residual is None else _tensor(b, b.residual)
        training = cell.operation == "training"

        def forward(x: Any, added: Any) -> Any:
            given = (None, None, True) if training else (mean, var, False)
            y, *saved = aten.native_batch_norm.default(x, weight, bias, *given, 0.1, EPS)
            return torch.relu(y if added is None else y + added), *saved

        def backward(dy: Any, x: Any, y: Any) -> Any:
            dz = aten.threshold_backward.default(dy, y, 0)
            saved = weight, None, None, mean, invstd, True, EPS, ALL
            gradients = aten.native_batch_norm_backward.default(dz, x, *saved)
            return gradients if b.residual is None else (*gradients, dz)

        if cell.operation == "backward":
            compiled = torch.compile(backward)
            arguments = tuple(_tensor(b, array) for array in (b.dy, b.x, b.y))
        else:
            compiled, arguments = torch.compile(forward), (_tensor(b, b.x), residual)
        compiled(*arguments)
        return Contender(lambda: compiled(*arguments), _reader(b), fresh=not fresh)
