"""What the commands print and draw: tables, JSON, a plot."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnfast._cli.failure import Failure, missing, reason_of
from bnfast._cli.onnx.health import MEANINGS
from bnfast._typing import Array

if TYPE_CHECKING:
    from bnfast._cli.onnx.inspection import Layer
    from bnfast._cli.onnx.recalibration import Recalibration

_MOST_CHANNELS = 5  # that are named of a layer; JSON has all


def showing(
    as_json: bool, json_of: Callable[..., str], table_of: Callable[..., str]
) -> Callable[..., str]:
    """Return what makes the text, or refuse before anything is read."""
    if as_json:
        return json_of
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise missing("rich for tables, unlike --json", "onnx", error) from error
    return table_of


def drawing(path: Path | None) -> Callable[[Sequence[Layer]], None]:
    """Return what draws the plot, or nothing, or refuse before anything is read."""
    if path is None:
        return lambda layers: None
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise missing("matplotlib for --plot", "onnx", error) from error
    return lambda layers: _plot(layers, path)


def _dumped(values: dict[str, Any]) -> str:
    """Return JSON with a line for each item of a list; null stands for what is not finite."""
    lines = []
    for name, value in values.items():
        text = json.dumps(_finite(value))
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(json.dumps(_finite(item)) for item in value) + "\n ]"
        lines.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}"


def _finite(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], end: str) -> str:
    from bnfast._cli.onnx.text_table import text_table  # needs rich, which JSON does not

    return text_table(headings, rows, ("layer", "kind", "unusual", "can be folded"), title, end)


def _kind(operator: str) -> str:
    return operator.removesuffix("Normalization")


def _title(path: Path, layers: Sequence[Layer]) -> str:
    counts = Counter(layer.normalization.operator for layer in layers)
    listed = ", ".join(f"{count} {operator}" for operator, count in counts.items())
    return f"{path}: {listed or 'no normalization layer'}"


def _words(found: dict[str, list[int]] | None) -> str:
    """Say of how many channels something is unusual, and of which."""
    parts = []
    for kind, channels in (found or {}).items():
        named = ", ".join(map(str, channels[:_MOST_CHANNELS]))
        more = ", ..." if len(channels) > _MOST_CHANNELS else ""
        parts.append(f"{len(channels)} {kind} ({named}{more})")
    return "; ".join(parts)


def _range(values: Array | None) -> str:
    if values is None or not values.size:
        return ""
    return f"{np.min(values):.3g} to {np.max(values):.3g}"


def _legend(kinds: set[str]) -> str:
    return "\n".join(f"{kind}: {text}" for kind, text in MEANINGS.items() if kind in kinds)


def layers_as_table(path: Path, layers: Sequence[Layer]) -> str:
    """Return a row for every layer, and what the words in it mean."""
    rows = []
    for layer in layers:
        one = layer.normalization
        rows.append(
            (
                f"{one.name}, in {one.where}" if one.where else one.name,
                _kind(one.operator),
                "" if layer.channels is None else str(layer.channels),
                f"{one.epsilon:.3g}",
                _range(layer.variance),
                _words(layer.unusual) or one.computed,
                layer.fold,
            )
        )
    if not rows:
        return _title(path, layers)
    headings = ("layer", "kind", "channels", "eps", "variance", "unusual", "can be folded")
    kinds = {kind for layer in layers for kind in layer.unusual or ()}
    return _table(_title(path, layers), headings, rows, _legend(kinds))


def layers_as_json(path: Path, layers: Sequence[Layer]) -> str:
    """Return all numbers."""
    listed = []
    for layer in layers:
        one = layer.normalization
        values: dict[str, Any] = {
            "name": one.name,
            "operator": one.operator,
            "where": one.where or None,
            "opset": one.opset,
            "epsilon": one.epsilon,
            "channels": layer.channels,
            "computed": one.computed or None,
            "scale": layer.scale,
        }
        if layer.verdict is not None:
            values |= {
                "mean": layer.mean,
                "variance": layer.variance,
                "unusual": layer.unusual,
                "foldable": layer.verdict.folded,
                "fold": layer.fold,
            }
        listed.append(values)
    return _dumped({"model": str(path), "layers": listed})


def _plot(layers: Sequence[Layer], path: Path) -> None:
    """Draw the statistics of all batch norm layers whose statistics are constants."""
    from matplotlib.figure import Figure

    shown = [layer for layer in layers if layer.variance is not None]
    figure = Figure(figsize=(max(6.0, 0.18 * len(shown)), 6.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for number, layer in enumerate(shown):
        assert layer.variance is not None
        color = "tab:red" if layer.unusual else "tab:blue"
        _bar(above, number, np.sqrt(np.maximum(layer.variance, 0.0)), color)
        epsilon = max(layer.normalization.epsilon, 0.0)
        above.plot(number, math.sqrt(epsilon), "_", color="black")
        if layer.scale is not None:
            divisor = np.sqrt(np.maximum(layer.variance + epsilon, 0.0))
            with np.errstate(all="ignore"):
                _bar(below, number, np.abs(layer.scale) / divisor, color)
    above.set_ylabel("running deviation (black: root of eps)")
    below.set_ylabel("factor of the channel")
    below.set_xlabel("batch norm layer, in the order of the graph; red: something is unusual")
    for axes in (above, below):
        axes.set_yscale("log")
        axes.grid(axis="y", alpha=0.3)
    part = path.with_name(path.name + ".part")
    try:
        figure.savefig(part, format="png")
        part.replace(path)
    except OSError as error:
        raise Failure(f"{path}: cannot be written: {reason_of(error)}") from error
    finally:
        part.unlink(missing_ok=True)


def _bar(axes: Any, place: int, values: Array, color: str) -> None:
    """Draw smallest, median and largest of the values that a logarithm has."""
    values = values[np.isfinite(values) & (values > 0)]
    if values.size:
        axes.plot([place, place], [values.min(), values.max()], color=color, alpha=0.5)
        axes.plot(place, np.median(values), ".", color=color)


def changes_as_table(path: Path, done: Recalibration) -> str:
    """Return a row for every layer, with statistics of the channel that moves furthest."""
    rows = []
    for layer in done.layers:
        difference = np.nan_to_num(layer.difference, nan=np.inf)
        worst = int(np.argmax(difference)) if difference.size else 0
        row = [
            layer.normalization.name,
            str(difference.size),
            f"{_root_mean_square(difference):.3g}",
            str(worst),
        ]
        for before, after, root in zip(layer.before, layer.after, (False, True), strict=True):
            pair = [float(both.astype(np.float64).ravel()[worst]) for both in (before, after)]
            if root:
                pair = [math.sqrt(value) if value >= 0 else math.nan for value in pair]
            row.append(" to ".join(f"{value:.4g}" for value in pair))
        rows.append([*row, _words(layer.unusual)])
    counts = (
        _counted(len(rows), "layer", "layers"),
        _counted(done.samples, "sample", "samples"),
        _counted(done.passes, "pass", "passes"),
    )
    title = f"{path}: {', '.join(counts)} over the data"
    headings = ("layer", "channels", "moved", "furthest", "its mean", "its deviation", "unusual")
    kinds = {kind for layer in done.layers for kind in layer.unusual}
    meaning = (
        "moved: how far the output of the layer moves where the scale is 1 (root mean square); "
        "furthest: the channel that moves furthest, with its statistics before and after"
    )
    return _table(title, headings, rows, "\n".join(filter(None, [meaning, _legend(kinds)])))


def _counted(number: int, one: str, more: str) -> str:
    return f"{number:,} {one if number == 1 else more}"


def _root_mean_square(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0


def changes_as_json(path: Path, done: Recalibration) -> str:
    """Return all numbers."""
    layers = []
    for layer in done.layers:
        assert layer.moments is not None
        layers.append(
            {
                "name": layer.normalization.name,
                "count": int(np.max(layer.moments.count)),
                "moved": layer.difference,
                "mean": {"before": layer.before[0], "after": layer.after[0]},
                "variance": {"before": layer.before[1], "after": layer.after[1]},
                "unusual": layer.unusual,
            }
        )
    return _dumped(
        {
            "model": str(path),
            "samples": done.samples,
            "passes": done.passes,
            "left": done.left,
            "layers": layers,
        }
    )
