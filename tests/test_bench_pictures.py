"""The pictures and pages of benchmark results, made of made-up results: nothing is measured."""

import importlib.util
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
for package in ("matplotlib", "rich", "threadpoolctl"):
    pytest.importorskip(package)

from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

from bnfast._cli.bench import figure, report  # noqa: E402
from bnfast._cli.bench.workloads import name_of  # noqa: E402

SIZES = (4, 100, 3000)
# The ratios of a rival in the cells of an operation, by size.
FORWARD, FAST = (9.0, 11.0, 10.0), (0.5, 0.9, 1.1)
RATIOS = {
    "slow": {"training": FORWARD, "forward": FORWARD, "backward": (8.0, 12.0, 10.5)},
    "fast": {"training": FAST, "forward": FAST, "backward": (0.8, 2.0, 0.7)},
    "half": {"backward": (1.5, 3.0, 4.0)},
    "nothing": {},
}
MEDIANS = [0.85, 3.0, 10.25]  # of training and backward


def ratios_of(title):
    """Those of batch norm."""
    return {name: list(some) for name, some in RATIOS[title].items() if name != "forward"}


def row(normalization, operation, number):
    traffic = SIZES[number] << 20
    outcomes = {
        title: {"seconds": ratios[operation][number], "ratio": ratios[operation][number]}
        | {"spread": 0.02, "error": 1e-7}
        if operation in ratios
        else {"not offered": "no such operation"}
        for title, ratios in RATIOS.items()
    }
    mine = {"seconds": 1.0, "spread": 0.01, "error": 2e-7, "GB/s": 5.0 + number}
    return {
        "normalization": normalization,
        "operation": operation,
        "shape": [SIZES[number], 8],
        "layout": "nchw",
        "traffic": traffic,
        "bnfast": mine | {"fraction of limit": 0.5},
        "limit": {"GB/s": 2 * mine["GB/s"]},
        "rivals": outcomes,
    }


def made_up(*normalizations, operations=("training", "backward")):
    rows = [row(*what) for what in product(normalizations, operations, range(len(SIZES)))]
    return {
        "command": "python -m bnfast bench",
        "machine": {"cpu": "A CPU", "instruction set": "avx2", "caches": {}},
        "versions": {"bnfast": "0"},
        "rivals": {title: {"version": "0"} for title in RATIOS},
        "normalizations": list(normalizations),
        "dtype": "float32",
        "threads": 1,
        "regime": "out",
        "load": None,
        "offset": 16,
        "rows": rows,
        "geometric means": report.geometric_means(rows),
        "losses": report.losses(rows),
    }


def test_strips_are_sorted_by_their_medians_and_have_all_ratios():
    found = figure.strips(made_up("instance", "batch"))
    assert list(found) == ["batch", "instance"]
    for strips in found.values():
        assert [strip.title for strip in strips] == ["fast", "half", "slow"]
        assert [strip.median for strip in strips] == pytest.approx(MEDIANS)
        assert all(strip.ratios == ratios_of(strip.title) for strip in strips)


def axes_of(part, results):
    drawn = Figure().subfigures()
    figure.PARTS[part].draw(drawn, results)
    return drawn.axes


def test_there_is_a_dot_for_each_ratio_and_a_bar_for_each_median():
    (axes,) = axes_of("ratios", made_up("batch"))
    dots = sorted(x for some in axes.collections for x, _ in some.get_offsets().data)
    assert dots == sorted(x for title in RATIOS for some in ratios_of(title).values() for x in some)
    bars = [line.get_xdata()[0] for line in axes.lines if line.get_linewidth() == 3]
    assert bars == pytest.approx(MEDIANS)
    lowest, highest = axes.get_xlim()
    assert lowest < min(dots) < max(dots) < highest
    said = {text.get_text().strip(): text.get_position()[0] for text in axes.texts}
    assert said["← rival is faster"] == said["bnfast is faster →"] == 1
    assert {"0.85", "3.00", "10"} <= said.keys()


def test_operations_have_colours_of_their_own_in_every_picture():
    results = made_up("batch")
    for part in figure.PARTS:
        colours = {
            tuple(dots.get_facecolor()[0][:3])
            for axes in axes_of(part, results)
            for dots in axes.collections
        }
        assert len(colours) == 2


def test_bandwidths_and_limits_are_points_without_lines():
    for axes, operation in zip(
        axes_of("bandwidth", made_up("batch")), ratios_of("fast"), strict=True
    ):
        assert axes.get_title() == operation
        ((limits,), (points,)) = axes.lines, axes.collections
        assert limits.get_linestyle() == "None"
        assert limits.get_xydata().tolist() == [[4, 10], [100, 12], [3000, 14]]
        assert points.get_offsets().data.tolist() == [[4, 5], [100, 6], [3000, 7]]


def test_all_bandwidths_are_within_their_axes():
    results = made_up("batch", "layer")
    results["rows"][-1]["limit"]["GB/s"] = 100.0  # of the last operation alone
    for axes in axes_of("bandwidth", results):
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        x, y = np.concatenate(
            [axes.lines[0].get_xydata(), *(c.get_offsets() for c in axes.collections)]
        ).T
        assert left < x.min() < x.max() < right
        assert bottom == 0 and y.max() < top


@pytest.mark.parametrize("parts", [("ratios",), ("bandwidth",), ("ratios", "bandwidth")], ids=str)
def test_pictures_are_small_and_the_same_bytes_each_time(parts, tmp_path):
    results = made_up("batch", "layer")
    for name in "ab":
        figure.draw(results, tmp_path / name, parts)
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes()
    assert len(first) < 100_000
    for chunk in (b"tEXt", b"iTXt", b"tIME"):
        assert chunk not in first
    with Image.open(tmp_path / "a") as picture:
        assert picture.format == "PNG" and picture.width == 1200
        pixels = np.asarray(picture.convert("RGB"), int)
    assert np.all(pixels[2, 2] == 255)  # on dark pages, too
    for operation in ("training", "backward") if "ratios" in parts else ():
        off = abs(pixels - 255 * np.array(to_rgb(figure.COLOURS[operation]))).max(-1)
        assert off.min() < 6  # the palette has the colours of the legend


def test_without_rivals_the_bandwidth_is_drawn_alone(tmp_path):
    results = made_up("batch")
    for one in results["rows"]:
        one["rivals"] = {}
    figure.draw(results | {"rivals": {}}, tmp_path / "alone")
    figure.draw(results, tmp_path / "bandwidth", ("bandwidth",))
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "bandwidth").read_bytes()


@pytest.fixture
def make_tables(tmp_path, monkeypatch):
    """The program, with copies of the pages that it writes."""
    path = ROOT / "benchmarks" / "make_tables.py"
    if not path.is_file():
        pytest.skip("needs a clone or an sdist")
    spec = importlib.util.spec_from_file_location("make_tables", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for page in (module.README, module.NOTES, *module.DOCS.glob("*benchmark.md")):
        (tmp_path / page.name).write_bytes(page.read_bytes())
    for name, page in (("README", "README.md"), ("NOTES", "notes.md"), ("MEASURED", "m.json")):
        monkeypatch.setattr(module, name, tmp_path / page)
    monkeypatch.setattr(module, "DOCS", tmp_path)
    return module


def measured():
    calls = {name: {"seconds": 1e-6, "error": 1e-7} for name in ("bnfast", "NumPy")}
    batch = {"cells": made_up("batch"), "far": made_up("batch"), "calls": calls}
    operations = {"operations": ("forward", "backward")}
    return {"batch": batch, "family": {"cells": made_up("group", **operations)}}


def run(program, monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["make_tables.py", *map(str, arguments)])
    program.main()


def test_tables_and_pictures_are_made_of_what_was_kept(make_tables, monkeypatch, tmp_path):
    make_tables.keep({"batch": measured()["batch"]})
    make_tables.keep({"family": measured()["family"]})
    kept = make_tables.MEASURED
    assert json.loads(kept.read_text(encoding="utf-8")) == measured()
    monkeypatch.setattr(make_tables, "bench", None)  # nothing is measured
    run(make_tables, monkeypatch, "--from", kept)
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.md")}
    for name, operation in (("benchmark", "training"), ("family_benchmark", "forward")):
        page = pages[f"{name}.md"]
        assert f"{operation} | {name_of((SIZES[1], 8))} | NCHW | 1e+03 ms" in page
        for picture in (f"{name}.png", f"{name}_bandwidth.png"):
            assert f"]({picture})" in page
            assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert "A CPU, avx2, one thread" in pages["README.md"]
    faster = " ".join(pages["notes.md"].split())  # without its line breaks
    assert "in no geometric mean" not in faster
    assert "group norm forward in NCHW, fast 0.79." in faster
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run(make_tables, monkeypatch, "--from", kept)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_what_was_not_kept_is_refused(make_tables, monkeypatch, capsys):
    make_tables.keep({"batch": measured()["batch"]})
    with pytest.raises(SystemExit):
        run(make_tables, monkeypatch, "weights", "--from", make_tables.MEASURED)
    assert "has nothing of weights, but of batch" in capsys.readouterr().err
