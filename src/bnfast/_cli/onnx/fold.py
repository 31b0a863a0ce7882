"""The order of a run of ``fold``: read, fold, write beside, compare, and only then put in place."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from bnfast._cli.failure import Failure
from bnfast._cli.onnx.folds import Verdict, fold_all
from bnfast._cli.onnx.inference import Session
from bnfast._cli.onnx.model_file import ModelFile
from bnfast._cli.onnx.text_table import text_table


def run(options: Namespace) -> int:
    """Fold a model, compare, write and print; return the exit status."""
    path, output, data = options.model, options.output, options.data
    file = ModelFile(path)
    file.check_output(output, options.force)
    if data is not None and data.exists() and output.exists() and data.samefile(output):
        raise Failure(f"{output}: is what --data names, which is not overwritten")
    original = Session(path, str(path))
    inputs = original.random_inputs() if data is None else original.inputs_of(data)
    hint = "; --data gives it others" if data is None else ""
    before = original.run(inputs, hint)
    del original
    _check_outputs(before, f"{path} with {data or 'random inputs'}", hint)
    verdicts = fold_all(file)
    with file.written(output, options.force) as part:
        after = Session(part, f"{path}, folded").run(inputs)

        @cache
        def optimized() -> dict[str, Any]:
            return Session(path, str(path), optimized=True).run(inputs)

        difference = _compared(before, after, optimized, options.tolerance)
    folded = sum(verdict.folded for verdict in verdicts)
    summary = (
        f"{folded} of {len(verdicts)} batch norms folded. Outputs differ by at most {difference}. "
        f"The model is in {output}."
    )
    print(f"{_table(verdicts)}\n\n{summary}" if verdicts else summary)
    return 0


def _check_outputs(outputs: dict[str, Any], run: str, hint: str) -> None:
    """Refuse outputs that cannot be compared: of another type, or without a finite value."""
    for output, a in outputs.items():
        if not isinstance(a, np.ndarray) or a.dtype.kind not in "fbiu":
            raise Failure(
                f"expected outputs to be arrays of numbers, got another type for {output}"
            )
    if not any(np.any(np.isfinite(a)) for a in outputs.values()):
        raise Failure(f"{run}: expected finite outputs to compare, got none{hint}")


def _compared(
    before: dict[str, Any],
    after: dict[str, Any],
    optimized: Callable[[], dict[str, Any]],
    tolerance: float | None,
) -> str:
    """Return by how much outputs differ, in words, or refuse what is too much.

    Where outputs are tiny beside what they are made of, all of their digits may be rounding errors.
    Then they may differ by twice as much as they do in the optimized model, unless the user has
    said by how much.
    """
    worst, text = -1.0, ""
    for name, a in before.items():
        found = _relative(a, after[name])
        allowed = _allowed(a.dtype) if tolerance is None else tolerance
        remark = ""
        if not found <= allowed:
            own = 0.0
            if tolerance is None:
                own = _relative(a, optimized()[name])
                remark = f" (that of onnxruntime's own optimizations: {own:.2g})"
            if not (np.isfinite(found) and found <= 2 * own):
                raise Failure(
                    f"nothing was written: output {name} would differ by {found:.2g} of its "
                    f"largest value{remark}, more than the --tolerance of {allowed:.2g}"
                )
        if found > worst:
            worst, text = found, f"{found:.2g} of the largest value{remark}"
    return text


def _relative(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> float:
    if before.shape != after.shape:
        return np.inf
    a, b = (array.astype(np.float64) for array in (before, after))
    differs = (a != b) & ~(np.isnan(a) & np.isnan(b))
    if not np.any(differs):
        return 0.0
    if not np.all(np.isfinite(a[differs]) & np.isfinite(b[differs])):
        return np.inf
    largest = np.max(np.abs(a[np.isfinite(a)]))
    return float(np.max(np.abs(a - b)[differs]) / largest) if largest else np.inf


def _allowed(dtype: np.dtype[Any]) -> float:
    """Return the default tolerance: half of the digits of floats, and no difference of others."""
    return float(np.sqrt(np.finfo(dtype).eps)) if dtype.kind == "f" else 0.0


def _table(verdicts: list[Verdict]) -> str:
    rows = [
        (
            verdict.name,
            "" if verdict.channels is None else f"{verdict.channels:,}",
            verdict.text,
        )
        for verdict in verdicts
    ]
    return text_table(("batch norm", "channels", "result"), rows, ("batch norm", "result"))
