"""Models run in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from bnfast._cli.failure import Failure, cannot_be_read
from bnfast._cli.onnx.data import by_input
from bnfast._typing import Array

# Sizes of random inputs where the model leaves them open: of the first axis, the batch; of others.
_BATCH, _SIZE = 1, 64

_FLOATS = ("float16", "float32", "float64")


class Session:
    """A model that onnxruntime runs on the CPU.

    Parameters
    ----------
    model : Path or bytes
        A file, or what a file would hold.
    name : str
        As messages call it.
    optimized : bool
        Whether onnxruntime changes the model first, as it does by default, or runs it operator by
        operator. Folding and fusing rounds what is inside otherwise.
    folder : Path, optional
        Where the external data of bytes lie.

    Attributes
    ----------
    inputs : set of str
        The names of those that have no default.

    Raises
    ------
    Failure
        For a model that onnxruntime cannot run.
    """

    def __init__(
        self,
        model: Path | bytes,
        name: str,
        *,
        optimized: bool = False,
        folder: Path | None = None,
    ) -> None:
        self._name = name
        levels = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
        )
        options.log_severity_level = 4  # what it refuses, it raises as well
        if folder is not None:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(folder)
            )
        source = str(model) if isinstance(model, Path) else model
        try:
            self._session = onnxruntime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # of classes of its own
            raise Failure(f"{name}: onnxruntime cannot load it: {_in_one_line(error)}") from error
        self.inputs = {each.name for each in self._session.get_inputs()}

    def random_inputs(self) -> dict[str, Array]:
        """Return an array for each input, the same in every run: normal numbers, zeros and ones."""
        rng = np.random.default_rng(0)
        return {each.name: self._random(rng, each) for each in self._session.get_inputs()}

    def _random(self, rng: np.random.Generator, wanted: Any) -> Array:
        dtype = _dtype_of(wanted)
        sizes = [
            size if isinstance(size, int) and size > 0 else _SIZE if axis else _BATCH
            for axis, size in enumerate(wanted.shape)
        ]
        if dtype in _FLOATS:
            return rng.normal(size=sizes).astype(dtype)
        if dtype == "bool" or dtype.removeprefix("u").startswith("int"):
            return rng.integers(0, 2, sizes).astype(dtype)
        raise Failure(f"{self._name}: --data is needed for input {wanted.name!r}, of {wanted.type}")

    def inputs_of(self, path: Path) -> dict[str, Array]:
        """Return the arrays of a file that are for this model, floats rounded to the type it takes.

        Arrays have the names of their inputs; where there is a single one of both, any name.
        """
        wanted = [each.name for each in self._session.get_inputs()]
        arrays = by_input(path, _arrays_of(path), wanted)
        takes = (*self._session.get_inputs(), *self._session.get_overridable_initializers())
        return {
            each.name: _rounded(arrays[each.name], _dtype_of(each))
            for each in takes
            if each.name in arrays
        }

    def run(self, inputs: dict[str, Array], hint: str = "") -> dict[str, Any]:
        """Return the outputs by name. The hint ends the message for inputs that do not fit."""
        names = [each.name for each in self._session.get_outputs()]
        try:
            outputs = self._session.run(names, inputs)
        except Exception as error:
            reason = _in_one_line(error)
            raise Failure(f"{self._name}: onnxruntime cannot run it: {reason}{hint}") from error
        return dict(zip(names, outputs, strict=True))


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _dtype_of(value: Any) -> str:
    """Return NumPy's name of the type of an input."""
    kind: str = value.type.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(kind, kind)


def _rounded(array: Array, dtype: str) -> Array:
    """Return floats as the floats that are wanted, and what else came as it is."""
    if array.dtype.kind != "f" or dtype not in _FLOATS:
        return array
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def _arrays_of(path: Path) -> dict[str | None, Array]:
    """Return the arrays of an .npz file by name, or that of an .npy file, by None."""
    try:
        arrays = np.load(path)
        if isinstance(arrays, np.ndarray):
            return {None: arrays}
        with arrays:
            return dict(arrays)
    except Exception as error:  # of zipfile, zlib and others, for a broken one
        raise cannot_be_read(str(path), error) from error
