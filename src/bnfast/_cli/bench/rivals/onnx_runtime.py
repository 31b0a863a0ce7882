"""ONNX Runtime: its BatchNormalization of inference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from bnfast._cli.bench.cell import EPS, Cell
from bnfast._cli.bench.rivals import Contender, NotOffered, Rival


class OnnxRuntime(Rival):
    """A graph of one node, its parameters constants; its kernel is serial whatever the threads."""

    @property
    def version(self) -> str:
        """What is measured."""
        return str(onnxruntime.__version__)

    def prepare(self, cell: Cell, fresh: bool) -> Contender:
        """Return a session's run, into the cell's output through IO binding."""
        b = cell.batch
        if cell.operation != "inference":
            raise NotOffered("inference alone")
        if b.axis != 1:
            raise NotOffered("NCHW alone")
        element = helper.np_dtype_to_tensor_dtype(b.dtype)
        parameters = {"scale": b.weight, "B": b.bias, "mean": b.mean, "var": b.var}
        graph = helper.make_graph(
            [helper.make_node("BatchNormalization", ["x", *parameters], ["y"], epsilon=EPS)],
            "batch_norm",
            [helper.make_tensor_value_info("x", element, b.x.shape)],
            [helper.make_tensor_value_info("y", element, b.x.shape)],
            [
                helper.make_tensor(name, element, values.shape, values.tobytes(), raw=True)
                for name, values in parameters.items()
            ],
        )
        # Versions as of the operator, which any ONNX Runtime of the last years reads.
        opset = helper.make_opsetid("", 15)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        # Its idle threads would spin on the processors that the next contender needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        if fresh:
            return Contender(lambda: session.run(None, {"x": b.x})[0])
        binding = session.io_binding()

        def bind(method: Any, name: str, array: NDArray[Any]) -> None:
            method(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

        bind(binding.bind_input, "x", b.x)
        bind(binding.bind_output, "y", b.out)

        def run() -> NDArray[Any]:
            session.run_with_iobinding(binding)
            return b.out

        return Contender(run, np.asarray)
