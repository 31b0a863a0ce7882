"""PyTorch, eager: contiguous tensors for NCHW, channels_last ones for NHWC."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnfast._cli.bench.cell import EPS, Cell
from bnfast._cli.bench.rivals import Contender, Rival


class PyTorch(Rival):
    """Its native functions, which is what its layers end in, without the layers' own time."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)  # no graph is recorded

    @property
    def version(self) -> str:
        """What is measured."""
        return str(torch.__version__)

    def prepare(self, cell: Cell, fresh: bool) -> Contender:
        """Return a call on tensors that share the memory of the cell's arrays."""
        b = cell.batch

        def tensor(array: NDArray[Any]) -> Any:
            shared = torch.from_numpy(array)
            return shared if b.axis == 1 else shared.movedim(-1, 1)

        def read(results: Any) -> NDArray[Any]:
            y = results[0] if b.axis == 1 else results[0].movedim(1, -1)
            array: NDArray[Any] = y.numpy()
            return array

        x, weight, bias = tensor(b.x), torch.from_numpy(b.weight), torch.from_numpy(b.bias)
        if cell.operation == "backward":
            dy, mean, invstd = tensor(b.dy), torch.from_numpy(b.mean), torch.from_numpy(b.invstd)
            arguments = dy, x, weight, None, None, mean, invstd, True, EPS, [True, True, True]
            backward = torch.ops.aten.native_batch_norm_backward.default
            # Its .out overload makes a new tensor as well, and copies that: slower, so not used.
            return Contender(lambda: backward(*arguments), read, fresh=not fresh)
        training = cell.operation == "training"
        running = (None, None) if training else (torch.from_numpy(b.mean), torch.from_numpy(b.var))
        forward = (x, weight, bias, *running, training, 0.1, EPS)
        if fresh:
            native = torch.ops.aten.native_batch_norm.default
            return Contender(lambda: native(*forward), read)
        saved = np.empty((2, b.mean.size if training else 0), b.dtype)
        outputs = {
            "out": tensor(b.out),
            "save_mean": torch.from_numpy(saved[0]),
            "save_invstd": torch.from_numpy(saved[1]),
        }
        native_out = torch.ops.aten.native_batch_norm.out
        return Contender(lambda: native_out(*forward, **outputs), read)
