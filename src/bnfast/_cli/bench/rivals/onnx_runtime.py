"""ONNX Runtime: its operators of inference."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import helper

from bnfast._cli.bench.cell import EPS, Batch, Cell
from bnfast._cli.bench.rivals import Contender, NotOffered, Rival


class Node(NamedTuple):
    """An operator, with the versions that brought it, so that old ONNX Runtimes read them."""

    operator: str
    opset: int
    ir_version: int


NODES = {
    "batch": Node("BatchNormalization", 15, 8),
    "layer": Node("LayerNormalization", 17, 8),
    "rms": Node("RMSNormalization", 23, 11),
    "group": Node("GroupNormalization", 21, 10),  # a function, which it expands
    "instance": Node("InstanceNormalization", 15, 8),
}


class OnnxRuntime(Rival):
    """A graph of one node, its parameters constants; batch norm is serial whatever the threads."""

    takes_halves = False

    @property
    def version(self) -> str:
        """What is measured."""
        return str(onnxruntime.__version__)

    def prepare(self, cell: Cell[Any], fresh: bool) -> Contender:
        """Return a session's run, into the cell's output through IO binding."""
        if cell.normalization not in NODES:
            raise NotOffered("it has no such operator")
        b: Batch = cell.data
        if cell.operation not in ("inference", "forward"):
            raise NotOffered("no gradients, nor training")
        if b.layout == "nhwc":
            raise NotOffered("NCHW alone")
        node = NODES[cell.normalization]
        element = helper.np_dtype_to_tensor_dtype(b.dtype)
        parameters = {"scale": b.weight, "B": b.bias}
        attributes: dict[str, Any] = {"epsilon": EPS}
        if cell.normalization == "batch":
            parameters |= {"mean": b.mean, "var": b.var}
        elif cell.normalization == "rms":
            del parameters["B"]
        elif cell.normalization == "group":  # in float32 unless it is told otherwise
            attributes |= {"num_groups": b.num_groups, "stash_type": element}
        elif cell.normalization == "instance" and b.dtype != np.float32:
            raise NotOffered("no float64")
        graph = helper.make_graph(
            [helper.make_node(node.operator, ["x", *parameters], ["y"], **attributes)],
            "normalization",
            [helper.make_tensor_value_info("x", element, b.x.shape)],
            [helper.make_tensor_value_info("y", element, b.x.shape)],
            [
                helper.make_tensor(name, element, values.shape, values.tobytes(), raw=True)
                for name, values in parameters.items()
            ],
        )
        opset = helper.make_opsetid("", node.opset)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=node.ir_version)
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
