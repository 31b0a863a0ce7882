"""``python -m bnfast bench``: what it measures, and what it says of it. No speed is tested."""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

import bnfast
from bnfast import _cli, _core
from bnfast import _reference as reference
from bnfast._cli.bench import cell as cells
from bnfast._cli.bench import limit, normalizations, regime, rivals, timing, workloads
from bnfast._cli.bench.normalizations import NORMALIZATIONS, exact_result, make_data
from bnfast._cli.bench.rivals import numpy_formulas
from tolerances import CLOSE_F32, CLOSE_F64, RIVAL, ROUNDED_F32

NEEDED = ("matplotlib", "rich", "threadpoolctl")
HALVES = ("float16", "bfloat16")
HALF = ("batch", "layer", "rms", "group", "instance")
FAMILY = tuple(name for name, norm in NORMALIZATIONS.items() if "forward" in norm.operations)


def bench(*arguments, **keywords):
    return subprocess.run(
        [sys.executable, "-m", "bnfast", "bench", *arguments],
        capture_output=True,
        text=True,
        timeout=600,  # a machine may be busy with other things
        **keywords,
    )


def parsed(*arguments):
    """What the arguments say."""
    _, parser = _cli.command("bench")
    return parser.parse(arguments)


@pytest.fixture
def run():
    """The module of a run, which needs what draws its results."""
    for package in NEEDED:
        pytest.importorskip(package)
    from bnfast._cli.bench import run

    yield run
    bnfast.set_num_threads(None)


class Stub(rivals.Rival):
    """Prepares what it is made with, or raises it."""

    def __init__(self, made, **about):
        super().__init__(1)
        self.made, self.about = made, about

    @property
    def version(self):
        return "0"

    def prepare(self, cell, fresh):
        if isinstance(self.made, Exception):
            raise self.made
        return rivals.Contender(lambda: self.made(cell), **self.about)


def raising(error, after):
    """A call that works so many times."""
    calls = []

    def call(cell):
        calls.append(1)
        if len(calls) > after:
            raise error
        return cell.data.x

    return call


def test_every_set_of_shapes_parses():
    for name, shapes in workloads.SETS.items():
        assert workloads.parse(name) == shapes
        assert len(set(shapes)) == len(shapes)


def test_shapes_mix_with_sets_each_once():
    assert workloads.parse("2x64,call,8x3x5x7,2x64") == ((2, 64), (1, 64), (8, 3, 5, 7))


@pytest.mark.parametrize("text", ["", "nonsense", "3", "2x", "2x0", "2x-3", "2 x 3", "call,,odd"])
def test_bad_shapes_are_refused(text):
    with pytest.raises(ValueError, match="is neither NxC, NxCxHxW nor one of: resnet50, small"):
        workloads.parse(text)


def test_layouts():
    assert workloads.in_layout((2, 3, 4, 5), "nchw") == ((2, 3, 4, 5), 1)
    assert workloads.in_layout((2, 3, 4, 5), "nhwc") == ((2, 4, 5, 3), -1)
    assert workloads.layouts_of((2, 3)) == workloads.layouts_of((2, 3, 1, 1)) == ("nchw",)
    assert workloads.layouts_of((2, 3, 1, 2), ("nhwc", "nchw")) == ("nhwc", "nchw")


@pytest.mark.parametrize("offset", [0, 8, 16, 72, cells.PAGE - 8])
def test_memory_begins_where_it_is_told(offset, dtype):
    for size in (1, 7, 1000, 100_000):
        array = cells.aligned_empty((size, 3), dtype, offset)
        assert array.ctypes.data % cells.PAGE == offset
        assert array.shape == (size, 3) and array.dtype == dtype
        array.fill(1)  # it is all there
    assert cells.aligned_empty((3,), dtype).ctypes.data % cells.PAGE == 0


def begin(*arrays):
    """Where arrays begin in a page."""
    return {array.ctypes.data % cells.PAGE for array in arrays}


@pytest.mark.parametrize("offset", [0, 24, 4000])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_all_arrays_begin_at_the_offset(normalization, offset, dtype):
    norm = NORMALIZATIONS[normalization]
    for layout in norm.layouts_of((4, 6, 5, 7), workloads.LAYOUTS):
        for choice, expected in (({"offset": offset}, offset), ({}, 16)):
            data = make_data(normalization, (4, 6, 5, 7), layout, dtype, **choice)
            large = [a for a in vars(data).values() if getattr(a, "size", 0) == data.x.size]
            arrays = {"moments": 1, "batch-relu": 4, "batch-add-relu": 5}
            assert len(large) == arrays.get(normalization, 3)
            assert begin(*large, data.empty((3, 5))) == {expected}
            assert data.empty((3, 5)).dtype == dtype


@pytest.mark.parametrize("regime", ["out", "fresh"])
def test_what_is_made_for_onednn_begins_at_the_offset(regime, monkeypatch):
    if rivals.PEERS["onednn"].missing():
        pytest.skip("onednn is not installed")
    from bnfast._cli.bench.rivals import onednn

    seen = []
    memory = onednn.Work.memory

    def watched(work, description, array):
        seen.append(array)
        return memory(work, description, array)

    monkeypatch.setattr(onednn.Work, "memory", watched)
    data = make_data("batch", (4, 6, 5, 7), "nchw", np.float32, offset=24)
    cell = cells.Cell("batch", "backward", data)
    for rival in (onednn.OneDnn, onednn.OneDnnBlocked):
        threads = bnfast.get_num_threads()  # which stay as they are: its OpenMP is bnfast's too
        contender = rival(threads).prepare(cell, regime == "fresh")
        large = [array for array in seen if array.size >= data.x.size]
        assert len(large) >= 3 and begin(*large, contender.call()) == {24}
        assert contender.own_buffers(regime == "fresh") == []


@pytest.mark.parametrize("operation", NORMALIZATIONS["batch"].operations)
def test_exact_results_in_slices_are_the_reference(operation, axis, dtype, monkeypatch):
    monkeypatch.setattr(cells, "_SLICE_BYTES", 8 * 4 * 25 * 2)  # two channels
    layout = "nchw" if axis == 1 else "nhwc"
    b = batch = make_data("batch", (4, 5, 5, 5), layout, dtype, mean=3)
    expected = {
        "inference": lambda: reference.scale_shift(b.x, b.mean, b.var, b.weight, b.bias, axis=axis),
        "training": lambda: reference.batch_norm_forward(b.x, b.weight, b.bias, axis=axis)[0],
        "backward": lambda: reference.batch_norm_backward(
            b.dy, b.x, b.exact_mean, b.exact_invstd, b.weight, axis=axis
        )[0],
    }[operation]()
    exact = exact_result(cells.Cell("batch", operation, batch))
    np.testing.assert_allclose(exact, expected, rtol=CLOSE_F64, atol=CLOSE_F64)
    wrong = exact.copy()
    wrong.flat[-1] += 0.25
    assert cells.largest_error(wrong, exact) == 0.25
    wrong.flat[3] = np.nan
    with pytest.raises(ValueError, match="not a number"):
        cells.largest_error(wrong, exact)


@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize("normalization", ["layer", "rms"])
def test_exact_rows_in_slices_are_the_reference(normalization, operation, dtype, monkeypatch):
    monkeypatch.setattr(cells, "_SLICE_BYTES", 8 * 7 * 2)  # two rows
    b = make_data(normalization, (3, 5, 7), "rows", dtype, mean=3)
    centred = normalization == "layer"
    y, mean, invstd = reference.layer_norm_forward(
        b.x, (2,), b.weight, b.bias if centred else None, centred=centred
    )
    dx, _, _ = reference.layer_norm_backward(
        b.dy, b.x, (2,), mean, invstd, b.weight, centred=centred
    )
    exact = exact_result(cells.Cell(normalization, operation, b))
    np.testing.assert_allclose(
        exact, y if operation == "forward" else dx, rtol=CLOSE_F64, atol=CLOSE_F64
    )
    np.testing.assert_allclose(b.exact_mean, mean, rtol=CLOSE_F64)
    np.testing.assert_allclose(b.exact_invstd, invstd, rtol=CLOSE_F64)
    np.testing.assert_allclose(1 / np.sqrt(b.var + cells.EPS), invstd, rtol=ROUNDED_F32)


@pytest.mark.parametrize("operation", ["forward", "backward"])
@pytest.mark.parametrize("normalization, num_groups", [("group", 3), ("instance", 6)])
def test_exact_groups_in_slices_are_the_reference(
    normalization, num_groups, operation, axis, dtype, monkeypatch
):
    monkeypatch.setattr(normalizations.GroupNorm, "most", 5)  # of 6 channels, 3 groups
    monkeypatch.setattr(cells, "_SLICE_BYTES", 8 * 4 * 35 * 2)  # two channels
    layout = "nchw" if axis == 1 else "nhwc"
    b = make_data(normalization, (4, 6, 5, 7), layout, dtype, mean=3)
    y, mean, invstd = reference.group_norm_forward(b.x, num_groups, b.weight, b.bias, axis=axis)
    dx, _, _ = reference.group_norm_backward(b.dy, b.x, mean, invstd, b.weight, axis=axis)
    exact = exact_result(cells.Cell(normalization, operation, b))
    np.testing.assert_allclose(
        exact, y if operation == "forward" else dx, rtol=CLOSE_F64, atol=CLOSE_F64
    )
    np.testing.assert_allclose(b.exact_mean, mean, rtol=CLOSE_F64)
    np.testing.assert_allclose(b.exact_invstd, invstd, rtol=CLOSE_F64)
    assert b.num_groups == num_groups
    grouped = b.in_groups
    together = b.x.reshape(grouped.shape).mean((grouped.plane, *grouped.channels), keepdims=True)
    assert together.shape == grouped.statistics
    np.testing.assert_allclose(together.ravel(), mean.ravel(), rtol=CLOSE_F32)
    assert np.broadcast_shapes(grouped.parameters, together.shape)


def test_exact_weights_are_the_reference(dtype):
    d = make_data("weight", (6, 5, 3, 2), "filters", dtype, mean=3)
    w, norm = reference.weight_norm_forward(d.x, d.g)
    dv, _ = reference.weight_norm_backward(d.dy, d.x, d.g, norm)
    np.testing.assert_array_equal(d.exact_norm, norm)
    np.testing.assert_allclose(d.norm, norm, rtol=ROUNDED_F32)
    for operation, expected in (("forward", w), ("backward", dv)):
        exact = exact_result(cells.Cell("weight", operation, d))
        np.testing.assert_array_equal(exact, expected)
        assert exact.dtype == np.float64
    assert {a.dtype for a in (d.x, d.dy, d.out, d.g, d.norm)} == {np.dtype(dtype)}


def test_exact_spectra_are_the_reference(dtype):
    d = make_data("spectral", (6, 5, 3, 2), "filters", dtype, mean=3)
    y, *saved = reference.spectral_norm_forward(d.x, d.u, d.v, 1, cells.LEAST_LENGTH)
    for exact, found, expected in zip(d.exact, d.found, saved, strict=True):
        np.testing.assert_array_equal(exact, expected)
        np.testing.assert_allclose(found, expected, rtol=ROUNDED_F32, atol=ROUNDED_F32)
        assert found.dtype == dtype
    dw = reference.spectral_norm_backward(d.dy, d.x, *saved)
    for operation, expected in (("forward", y), ("backward", dw)):
        exact = exact_result(cells.Cell("spectral", operation, d))
        np.testing.assert_array_equal(exact, expected)
        assert exact.dtype == np.float64


@pytest.mark.parametrize("mean", [3, 1e6])
@pytest.mark.parametrize("shape", [(35, 3), (5, 7, 3)])
def test_exact_tables_in_slices_are_the_reference(shape, mean, dtype, monkeypatch):
    monkeypatch.setattr(cells, "_SLICE_BYTES", 16 * 3 * 4)  # four rows
    data = make_data("moments", shape, "table", dtype, mean=mean)
    assert data.rows.shape == (35, 3)
    cell = cells.Cell("moments", "moments", data)
    count, expected, m2 = reference.moments(data.rows, -1, np.longdouble)
    exact = exact_result(cell)
    assert exact.dtype == np.longdouble
    np.testing.assert_allclose(exact[0], expected, rtol=CLOSE_F64)
    # Around a mean that is its own rounding off, of values whose deviation is 1.
    np.testing.assert_allclose(exact[1], np.sqrt(m2 / count), rtol=CLOSE_F64)
    norm, numpy = NORMALIZATIONS["moments"], numpy_formulas.NumPyInFloat64(1)
    results = [norm.read(norm.ours("moments", data, None)())]
    if dtype == np.float32:
        contender = numpy.prepare(cell, False)
        results.append(contender.read(contender.call()))
    for result in results:
        np.testing.assert_allclose(result, exact, rtol=ROUNDED_F32)


@pytest.mark.parametrize("normalization", ["weight", "spectral"])
@pytest.mark.parametrize("operation", ["forward", "backward"])
def test_calls_on_weights_can_be_repeated(normalization, operation, dtype):
    """What power iterations find must not be where the next call begins."""
    data = make_data(normalization, (6, 5, 3, 2), "filters", dtype)
    cell = cells.Cell(normalization, operation, data)
    exact = exact_result(cell)
    for call in (
        NORMALIZATIONS[normalization].ours(operation, data, data.out),
        numpy_formulas.NumPyFormulas(1).prepare(cell, False).call,
    ):
        for _ in range(3):
            data.out.fill(np.nan)
            call()
            assert cells.largest_error(data.out, exact) < RIVAL[np.dtype(dtype).name]


@pytest.mark.parametrize(
    "channels, groups", [(320, 32), (512, 32), (48, 24), (54, 27), (97, 1), (20, 20)]
)
def test_groups_are_32_or_the_most_below_that_divide_the_channels(channels, groups):
    assert NORMALIZATIONS["group"].shape_of_statistics((2, channels, 3, 3)) == (2, groups)


def test_turns_rotate(monkeypatch):
    monkeypatch.setattr(timing, "TURN", 0)  # one call a turn
    monkeypatch.setattr(timing, "WARM_UP", 0)  # and one before
    turns = []
    calls = {name: lambda name=name: turns.append(name) for name in "abc"}
    results = timing.take_turns(calls, 0)
    rounds = ["".join(turns[i : i + 6]) for i in range(0, len(turns), 6)]
    assert rounds == ["aabbcc", *["aabbcc", "bbccaa", "ccaabb", "aabbcc", "bbccaa"]]
    assert list(results) == ["a", "b", "c"]
    assert all(result.rounds == timing.FEWEST_ROUNDS for result in results.values())


def test_short_calls_are_timed_many_at_a_time():
    times = []
    timing.take_turns({"a": lambda: times.append(1)}, 0)
    assert len(times) > 100 * timing.FEWEST_ROUNDS


def test_a_contender_that_raises_leaves_the_rounds(monkeypatch):
    monkeypatch.setattr(timing, "TURN", 0)
    monkeypatch.setattr(timing, "WARM_UP", 0)
    error = RuntimeError("no more")
    calls = []

    def sometimes():
        calls.append(1)
        if len(calls) == 9:
            raise error

    def never():
        raise error

    results = timing.take_turns({"a": lambda: None, "b": sometimes, "c": never}, 0)
    assert results["a"].rounds == timing.FEWEST_ROUNDS
    assert results["b"] is error
    assert results["c"] is error
    assert len(calls) == 9


class Clock:
    """Time that passes only where it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def taking(self, *seconds):
        """A call that takes these times in turn."""
        times = itertools.cycle(seconds)

        def call():
            self.now += next(times)

        return call


def test_what_goes_before_a_call_is_not_timed(monkeypatch):
    clock = Clock(monkeypatch)
    a, b, log = clock.taking(0.25), clock.taking(0.5), []

    def before():
        log.append("-")
        clock.now += 100

    calls = {"a": lambda: (log.append("a"), a()), "b": lambda: (log.append("b"), b())}
    results = timing.take_turns(calls, 0, turn=0, before=before)
    rounds = ["-a-b" if number % 2 == 0 else "-b-a" for number in range(timing.FEWEST_ROUNDS)]
    assert "".join(log) == "aabb" + "".join(rounds)  # twice before the first turn
    assert (results["a"].median, results["b"].median) == (0.25, 0.5)
    assert results["a"].rounds == timing.FEWEST_ROUNDS


def test_own_calls_come_before_what_goes_before_the_timed_one(monkeypatch):
    clock, log = Clock(monkeypatch), []
    a = clock.taking(timing.WARM_UP)
    timing.take_turns(
        {"a": lambda: (log.append("a"), a())}, 0, turn=0, before=lambda: log.append("-")
    )
    assert "".join(log) == "aa" + "a-a" * timing.FEWEST_ROUNDS


def test_percentiles_are_those_of_single_calls(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr(timing, "WARM_UP", 0)
    times = [2.0**-10] * 18 + [0.5] * 2  # a turn of 20 calls and a bit more than a second
    call = clock.taking(*times)
    for _ in times[3:]:  # so that the first turn begins with the first of them
        call()
    result = timing.take_turns({"a": call}, 0, turn=1.01, before=lambda: None)["a"]
    assert result.rounds == timing.FEWEST_ROUNDS
    assert result.median == result.lower_quartile == result.upper_quartile == 2.0**-10
    assert result.p95 == 0.5


def test_many_calls_at_a_time_have_no_95th_percentile():
    assert timing.take_turns({"a": lambda: None}, 0)["a"].p95 is None


@pytest.mark.parametrize("threads", [1, 3])
def test_in_a_network_every_thread_touches_other_data(monkeypatch, threads):
    touched, negative = [], np.negative

    def watched(part, out):
        touched.append((part.nbytes, part is out))
        return negative(part, out=out)

    monkeypatch.setattr(np, "negative", watched)
    monkeypatch.setattr(regime, "OTHER_BYTES", 1 << 12)
    with regime.REGIMES["network"].meanwhile(threads) as before:
        assert touched == []
        before()
    assert len(touched) == threads and all(in_place for _, in_place in touched)
    assert sum(size for size, _ in touched) == 1 << 12


@pytest.fixture
def spinning(monkeypatch):
    """The processes that were started to spin, two at a time."""
    started = []

    class Watched(subprocess.Popen):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            started.append(self)

    monkeypatch.setattr(regime.subprocess, "Popen", Watched)
    monkeypatch.setattr(regime, "allowed_threads", lambda: 2)
    return started


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_spinning_processes_are_ended(spinning, error):
    ending = contextlib.nullcontext() if error is None else pytest.raises(error)
    with ending, regime.REGIMES["busy"].meanwhile(1) as before:
        before()
        assert [process.poll() for process in spinning] == [None, None]
        if error is not None:
            raise error
    assert len(spinning) == 2 and all(process.returncode for process in spinning)


def test_spinning_processes_are_ended_where_one_cannot_be_started(spinning, monkeypatch):
    start = regime.subprocess.Popen

    def one_only(*arguments, **keywords):
        if spinning:
            raise OSError("no more processes")
        return start(*arguments, **keywords)

    monkeypatch.setattr(regime.subprocess, "Popen", one_only)
    with pytest.raises(OSError, match="no more"), regime.REGIMES["busy"].meanwhile(1):
        pass
    assert len(spinning) == 1 and spinning[0].returncode


ORPHAN = """
import os, subprocess, sys
from bnfast._cli.bench import regime
child = subprocess.Popen([sys.executable, "-c", regime.SPIN], stdout=subprocess.PIPE)
child.stdout.read(1)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="orphans keep their parent's number there")
def test_spinning_processes_end_with_who_started_them():
    # The orphan holds standard error open: that this returns is that it has ended.
    subprocess.run([sys.executable, "-c", ORPHAN], check=True, capture_output=True, timeout=60)


def test_the_limit_is_the_best_that_fits():
    rates = {"copy": 2.0, "streaming_copy": 4.0, "in_place": 3.0, "read": 16.0}
    assert limit.best("training", rates) == (4, "streaming_copy")
    rate, set_by = limit.best("backward", rates)
    assert rate == pytest.approx(3 / (1 / 4 + 1 / 4 + 1 / 16))
    assert set_by == "streaming_copy and read"
    assert limit.best("moments", {"read": 2.0, "maximum": 3.0}) == (3, "maximum")
    assert limit.best("moments", {"read": 4.0, "maximum": 3.0}) == (4, "read")


@pytest.mark.parametrize("operation, arrays", [("training", 2), ("backward", 3)])
def test_probes_touch_what_the_operation_touches(operation, arrays, dtype, monkeypatch):
    probed = []
    monkeypatch.setattr(
        limit._primitives, "probe_memory", lambda *arguments: probed.append(arguments)
    )
    cell = cells.Cell("batch", operation, make_data("batch", (8, 16, 5, 5), "nchw", dtype))
    probes = limit.Probes(cell, 3)
    for call in probes.calls.values():
        call()
    assert probes.moved["copy"] == cell.traffic == arrays * cell.data.x.nbytes
    by_kind = {kind: (x.nbytes, y.nbytes, threads) for kind, x, y, threads in probed}
    half = cell.traffic // 2
    assert by_kind["copy"] == by_kind["streaming_copy"] == (half, half, 3)
    assert by_kind["in_place"] == by_kind["read"] == (cell.traffic, cell.traffic, 3)
    rates = probes.rates(dict.fromkeys(probes.calls, 0.5))
    moved = 2.0 * cell.traffic
    assert rates == {"copy": moved, "streaming_copy": moved, "in_place": 2 * moved, "read": moved}


def test_what_only_reads_is_held_against_reading(dtype, monkeypatch):
    probed = []
    monkeypatch.setattr(
        limit._primitives, "probe_memory", lambda *arguments: probed.append(arguments)
    )
    cell = cells.Cell("moments", "moments", make_data("moments", (64, 32), "table", dtype))
    probes = limit.Probes(cell, 3)
    assert list(probes.calls) == ["read", "maximum"]
    assert probes.calls["maximum"]() == cell.data.x.max()
    probes.calls["read"]()
    ((kind, x, _, threads),) = probed
    assert (kind, x.nbytes, threads) == ("read", cell.traffic, 3)
    rates = probes.rates({"read": 0.5, "maximum": 0.25})
    assert rates == {"read": 2 * cell.traffic, "maximum": 4 * cell.traffic}


def test_moments_have_an_error_of_the_mean_and_one_of_the_deviation(run):
    def off(cell):
        rows = cell.data.rows
        return np.add(rows.mean(0), [0, 0.5, 0]), np.multiply(rows.var(0), [1, 1, 4])

    class Off(Stub):
        def prepare(self, cell, fresh):
            return rivals.Contender(lambda: off(cell), rivals.read_moments)

    selection = run.Selection(("moments",), shapes="50x3,7x3", quick=True)
    stubs = {"off": Off(None), "NumPy": numpy_formulas.NumPyFormulas(1)}
    results = run.measure(selection, stubs, budget=1e-9)
    first, _ = results["rows"]
    x = make_data("moments", (50, 3), "table", np.float32).x.astype(np.float64)
    errors = first["rivals"]["off"]["errors"]
    assert errors["mean"] == pytest.approx(0.5, rel=CLOSE_F32)
    assert errors["std"] == pytest.approx(x.std(0)[2], rel=CLOSE_F32)
    assert first["rivals"]["off"]["error"] == max(errors.values())
    ours = bnfast.moments(x.astype(np.float32))
    assert first["bnfast"]["errors"] == {
        "mean": pytest.approx(np.abs(ours.mean - x.mean(0)).max(), rel=CLOSE_F32),
        "std": pytest.approx(np.abs(ours.std - x.std(0)).max(), rel=CLOSE_F32),
    }
    (mean,) = results["geometric means"]
    for part in ("mean", "std"):
        worst = max(row["rivals"]["off"]["errors"][part] for row in results["rows"])
        assert mean["rivals"]["off"]["errors"][part] == worst
    text = run.report.markdown(results)
    assert f"({errors['mean']:.0e}, {errors['std']:.0e})" in text
    assert "against sums in long double" in text
    assert "The limit is" not in text
    assert "statistics alone" in text


def test_the_error_column_is_the_largest_error(run):
    selection = run.Selection(shapes="3x4x5x5", quick=True)
    results = run.measure(selection, {"NumPy": numpy_formulas.NumPyFormulas(1)}, budget=1e-9)
    assert [(row["operation"], row["layout"]) for row in results["rows"]] == [
        (operation, layout)
        for layout in workloads.LAYOUTS
        for operation in NORMALIZATIONS["batch"].operations
    ]
    training = results["rows"][1]
    b = make_data("batch", (3, 4, 5, 5), "nchw", np.float32)
    exact = reference.batch_norm_forward(b.x, b.weight, b.bias)[0]
    formula = numpy_formulas.batch_norm_forward(b.x, b.weight, b.bias)[0]
    y = bnfast.batch_norm_forward(b.x, b.weight, b.bias)[0]
    assert training["rivals"]["NumPy"]["error"] == np.abs(formula - exact).max()
    assert training["bnfast"]["error"] == np.abs(y - exact).max()


def test_failures_are_reported(run):
    stubs = {
        "right": numpy_formulas.NumPyFormulas(1),
        "elsewhere": Stub(rivals.NotOffered("not here")),
        "at once": Stub(ValueError("will not prepare")),
        "first": Stub(raising(RuntimeError("will not run"), 0)),
        "later": Stub(raising(RuntimeError("gave up"), 5)),
        "wrong shape": Stub(lambda cell: cell.data.x[:1]),
        "lazy": Stub(lambda cell: cell.data.out),  # writes nothing
        "unloadable": "ImportError: no such library",
    }
    selection = run.Selection(
        operations=("inference",), layouts=("nchw",), shapes="3x4x5x5", quick=True
    )
    results = run.measure(selection, stubs, budget=1e-9)
    (row,) = results["rows"]
    outcomes = row["rivals"]
    assert list(outcomes) == list(stubs)
    assert outcomes["right"]["ratio"] > 0
    assert outcomes["elsewhere"] == {"not offered": "not here"}
    assert outcomes["at once"] == {"failed": "ValueError: will not prepare"}
    assert outcomes["first"] == {"failed": "RuntimeError: will not run"}
    assert outcomes["later"] == {"failed": "RuntimeError: gave up"}
    assert "has shape (1, 4, 5, 5)" in outcomes["wrong shape"]["failed"]
    assert "not a number" in outcomes["lazy"]["failed"]
    assert outcomes["unloadable"] == {"failed": "ImportError: no such library"}
    text = run.report.markdown(results)
    line = next(line for line in text.splitlines() if line.startswith("| inference | 3x4x5x5"))
    assert [cell.strip() for cell in line.split("|")][-7:-1] == ["failed"] * 6
    assert "elsewhere has nothing of batch norm: not here." in text
    assert "first failed (inference, 3x4x5x5, NCHW): RuntimeError: will not run" in text
    assert "unloadable failed: ImportError: no such library" in text


def test_means_and_losses(run):
    def row(operation, ratio, error):
        outcome = {"ratio": ratio, "error": error, "fresh": ratio == 3.0}
        return {
            **{"normalization": "batch", "operation": operation},
            **{"shape": [2, 3], "layout": "nchw"},
            "bnfast": {"error": 1e-7},
            "rivals": {"a": outcome, "b": {"not offered": "no"}},
        }

    rows = [row("training", 0.5, 1e-3), row("training", 8.0, 1e-6), row("inference", 3.0, 0.0)]
    inference, training = run.report.geometric_means(rows)
    of_a = {"ratio": pytest.approx(2), "error": 1e-3, "cells": 2, "fresh": False}
    assert training["rivals"] == {"a": of_a}
    assert inference["rivals"]["a"]["cells"] == 1 and inference["rivals"]["a"]["fresh"]
    (loss,) = run.report.losses(rows)
    assert (loss["rival"], loss["ratio"], loss["error"]) == ("a", 0.5, 1e-3)


def test_one_value_per_channel_has_no_training(run):
    selection = run.Selection(shapes="1x64,1x64x1x1,1x64x2x1")
    assert [operations for _, _, operations in selection.cells_of("batch")] == [
        *[("inference",)] * 2,
        *[NORMALIZATIONS["batch"].operations] * 2,
    ]


def test_single_values_have_no_statistics_but_in_rows(run):
    selection = run.Selection(normalizations=FAMILY, shapes="1x20,2x20,1x64x1x1,2x3x2x1")
    measured = {
        name: [shape for shape, _, operations in selection.cells_of(name) if operations]
        for name in FAMILY
    }
    assert measured["layer"] == measured["rms"] == [(1, 20), (2, 20), (1, 64, 1, 1), (2, 3, 2, 1)]
    assert measured["group"] == [(2, 20), (1, 64, 1, 1), *[(2, 3, 2, 1)] * 2]
    assert measured["instance"] == [(2, 3, 2, 1)] * 2
    assert measured["weight"] == measured["spectral"] == measured["layer"]


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"normalizations": ("layer",), "operations": ("training",)}, "layer norm has no training"),
        ({"operations": ("forward",)}, "batch norm has no forward, but inference, training"),
        (
            {"normalizations": ("batch", "rms"), "operations": ("inference", "training")},
            "rms norm has no inference or training, but forward, backward",
        ),
        ({"normalizations": ("instance",), "shapes": "2x64"}, "instance norm of 2x64: nothing to"),
        ({"operations": ("training",), "shapes": "1x64"}, "batch norm of 1x64: nothing to measure"),
        ({"normalizations": ("moments",), "shapes": "1x64"}, "moments of 1x64: nothing to measure"),
    ],
)
def test_what_leaves_nothing_to_measure_is_refused(run, choice, message):
    with pytest.raises(run.NothingToMeasure, match=message):
        run.Selection(**choice).count_cells()


def test_every_normalization_measures_its_own_operations(run):
    selection = run.Selection(
        normalizations=("batch", *FAMILY), operations=("training", "forward"), shapes="4x32x2x2"
    )
    assert {name: {ops for _, _, ops in selection.cells_of(name)} for name in NORMALIZATIONS} == {
        **{name: {("training",)} for name in ("batch", *rivals.ACTIVATED)},
        **{name: {("forward",)} for name in FAMILY},
        "moments": {()},
    }
    assert selection.count_cells() == 2 * 3 + 4  # rows and weights have one layout


def test_matrix_products_have_as_many_threads_as_the_rest(run):
    from threadpoolctl import threadpool_info, threadpool_limits

    def threads():
        return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]

    seen = []
    selection = run.Selection(
        normalizations=("spectral",), operations=("forward",), shapes="6x8", quick=True
    )
    watching = {"watching": Stub(lambda cell: seen.append(threads()) or cell.data.out)}
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        if not before:
            pytest.skip("threadpoolctl does not know this BLAS")
        run.measure(selection, watching, budget=1e-9)
        assert threads() == before
    assert 2 in before and seen[0] == [1] * len(before)


def test_views_of_channels_last_memory_are_measured_beside_plain_arrays(run, monkeypatch):
    monkeypatch.setattr(regime, "OTHER_BYTES", 1 << 12)
    selection = run.Selection(
        ("batch", "group", "layer"), shapes="3x64x5x5", regime="network", peers=(), quick=True
    )
    results = run.measure(selection, run.ready(selection), budget=1e-9)
    assert list(results["rivals"]) == ["bnfast view"]
    assert not results["losses"]  # whatever its ratio
    for row in results["rows"]:
        view = row["rivals"]["bnfast view"]
        if row["layout"] == "nhwc":
            assert view["error"] < RIVAL["float32"]
            assert view["ratio"] == view["seconds"] / row["bnfast"]["seconds"]
            assert view["itself"]
        else:
            assert view == {"not offered": "views of NHWC arrays alone"}
    text = run.report.markdown(results)
    assert "bnfast view has nothing of layer norm: views of NHWC arrays alone." in text
    assert "**" not in text.partition("Regime network: ")[0]  # the best rival is not bnfast


def test_views_share_the_memory_of_the_arrays():
    from bnfast._cli.bench.rivals.bnfast_view import ChannelsLastView

    data = make_data("batch", (3, 4, 5, 6), "nhwc", np.float32)
    contender = ChannelsLastView(1).prepare(cells.Cell("batch", "inference", data), False)
    data.out.fill(np.nan)
    y = contender.call()
    assert y.shape == (3, 4, 5, 6) and np.shares_memory(y, data.out)
    np.testing.assert_array_equal(contender.read(y), data.out)


@pytest.mark.parametrize("name", ["network", "busy"])
def test_regimes_are_reported_in_every_form(run, name, monkeypatch, tmp_path):
    monkeypatch.setattr(regime, "OTHER_BYTES", 1 << 12)
    monkeypatch.setattr(regime, "allowed_threads", lambda: 1)
    selection = run.Selection(
        ("batch", "moments"), ("training", "moments"), shapes="3x4x5x5", regime=name, quick=True
    )
    stubs = {"NumPy": numpy_formulas.NumPyFormulas(1)}
    results = run.measure(selection, stubs, budget=1e-9)
    assert results["regime"] == name
    assert f"--regime {name}" in results["command"]
    text = run.report.markdown(results)
    assert results["about the regime"].startswith(f"Regime {name}: ")
    assert results["about the regime"] in text
    busy = name == "busy"
    for row in results["rows"]:
        mine, numpy = row["bnfast"], row["rivals"]["NumPy"]
        assert mine["quartiles"][1] <= mine["p95"] and numpy["quartiles"][1] <= numpy["p95"]
        assert numpy["p95 ratio"] == numpy["p95"] / mine["p95"]
        assert ("limit" in row) == ("fraction of limit" in mine) == (not busy)
        both = f"{run.report.duration(numpy['seconds'])}, {run.report.duration(numpy['p95'])}"
        assert (both in text) == busy
    assert ("95th percentile (the shortest is marked)" in text) == busy
    assert ("of limit" in text, "The limit is" in text, "limit is the faster" in text) == (
        *(not busy,) * 3,
    )
    run.figure.draw(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_usual_regimes_say_nothing_of_percentiles(run):
    for name in ("out", "fresh"):
        selection = run.Selection(
            operations=("training",), shapes="3x4x5x5", regime=name, quick=True
        )
        results = run.measure(selection, {}, budget=1e-9)
        assert not regime.REGIMES[name].about()
        text = json.dumps(results) + run.report.markdown(results)
        assert "p95" not in text and "percentile" not in text and "Regime" not in text


@pytest.mark.parametrize("name", ["out", "busy"])
def test_the_report_says_what_shows_that_the_machine_was_busy(run, name, monkeypatch):
    monkeypatch.setattr(regime, "allowed_threads", lambda: 1)
    monkeypatch.setattr(run, "load", lambda: {"average": 1.5, "processors": 2})
    selection = run.Selection(
        operations=("training",), layouts=("nchw",), shapes="3x4x5x5,2x8", regime=name, quick=True
    )
    results = run.measure(selection, {"NumPy": numpy_formulas.NumPyFormulas(1)}, budget=1e-9)
    assert results["load"] == {"average": 1.5, "processors": 2}

    def said(average, *spreads):
        results["load"] = average and {"average": average, "processors": 2}
        outcomes = [r for row in results["rows"] for r in (row["bnfast"], row["rivals"]["NumPy"])]
        for outcome, spread in zip(outcomes, spreads, strict=True):
            outcome["spread"] = spread
        found = [note for note in run.report.notes(results) if "busy with other work" in note]
        return [note.partition("uncertain: ")[2] for note in found]

    loaded, wide = "a load average of 2.1 on 2 processors before the run", "± above 20% in 2 of 4"
    for average, spreads, signs in (
        (2.0, (0.1, 0.2, 0.0, 0.2), []),
        (None, (0.1, 0.2, 0.0, 0.2), []),
        (2.1, (0.1, 0.2, 0.0, 0.2), [f"{loaded}."]),
        (2.0, (0.1, 0.21, 0.3, 0.2), [f"{wide} measurements."]),
        (2.1, (0.1, 0.21, 0.3, 0.2), [f"{loaded}; {wide} measurements."]),
    ):
        assert said(average, *spreads) == (signs if name == "out" else [])


def test_a_busy_machine_is_told_before_anything_is_measured(run, monkeypatch, capsys):
    def end(selection):
        raise run.NothingToMeasure("enough")

    monkeypatch.setattr(run, "ready", end)
    for average, told in ((1.9, False), (2.5, True)):
        monkeypatch.setattr(run, "load", lambda a=average: {"average": a, "processors": 2})
        assert _cli.main(["bench"]) == 1
        lines = capsys.readouterr().err.splitlines()
        warning = "this machine is busy: a load average of 2.5 on 2 processors; times will be "
        assert lines == [f"{warning}uncertain"] * told + ["python -m bnfast bench: enough"]


def test_a_system_that_tells_no_load_is_measured_all_the_same(run, monkeypatch):
    if hasattr(os, "getloadavg"):
        assert run.load()["average"] >= 0 and run.load()["processors"] == os.cpu_count()
    monkeypatch.delattr(os, "getloadavg", raising=False)
    assert run.load() is None
    assert run.report.overload(None) == ""


def test_a_network_has_the_shapes_of_resnet18(run):
    def half(size, kernel, padding):
        return (size + 2 * padding - kernel) // 2 + 1

    size = half(112, 7, 3)  # the first convolution
    expected = [(16, 64, size, size)]
    size = half(size, 3, 1)  # pooled
    for channels in (64, 128, 256, 512):
        expected.append((16, channels, size, size))
        size = half(size, 3, 1)
    assert workloads.parse("resnet18") == tuple(expected)
    for quick in (False, True):
        selection = run.Selection(regime="network", quick=quick)
        shapes = dict.fromkeys(shape for shape, _, _ in selection.cells_of("batch"))
        assert list(shapes) == expected
    selection = run.Selection(regime="network", shapes="2x64")
    assert [shape for shape, _, _ in selection.cells_of("batch")] == [(2, 64)]


def test_regimes_are_chosen_and_explained_on_the_command_line():
    for name in regime.REGIMES:
        assert parsed("--regime", name).regime == name
    help_text = " ".join(bench("--help").stdout.split())
    assert "network: to given memory, each call after more other data" in help_text
    assert "resnet18 for batch in regime network" in help_text


def test_who_has_nothing_of_weights_says_so(run):
    names = [
        name for name in ("onednn", "onnxruntime", "numba") if not rivals.PEERS[name].missing()
    ]
    if not names:
        pytest.skip("none of them is installed")
    choice = {"normalizations": ["weight", "spectral"], "shapes": "6x8", "peers": names}
    child = [sys.executable, "-c", REPORT, json.dumps(choice)]
    done = subprocess.run(child, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name in names:
        title = rivals.PEERS[name].title
        assert f"{title} has nothing of weight, spectral norm: " in done.stdout
        assert f"| {title} |" not in done.stdout
    assert "failed" not in done.stdout


def test_default_shapes_are_those_of_each_normalization(run):
    for quick in (False, True):
        selection = run.Selection(normalizations=tuple(NORMALIZATIONS), quick=quick)
        for name, norm in NORMALIZATIONS.items():
            sets = norm.quick_shapes if quick else norm.shapes
            shapes = dict.fromkeys(shape for shape, _, _ in selection.cells_of(name))
            assert tuple(shapes) == workloads.parse(sets)


def test_the_command_says_how_to_measure_again(run):
    assert run.Selection().command() == "python -m bnfast bench"
    selection = run.Selection(
        *(("batch", "layer"), ("training", "forward"), ("nhwc",), "float64", "call", 2),
        *("fresh", ("jax",), 1e4, True, 0),
    )
    assert selection.command() == (
        "python -m bnfast bench --norm batch layer --op training forward --layout nhwc "
        "--dtype float64 --shapes call --threads 2 --regime fresh --mean 10000 --offset 0 "
        "--peers jax --quick"
    )


def test_a_missing_rival_is_said_with_the_way_to_get_it(monkeypatch):
    missing = rivals.Peer("Absent", "absent", "Absent", ("no-such-package", "numpy"))
    monkeypatch.setitem(rivals.PEERS, "absent", missing)
    assert "absent" not in rivals.choose(None, ("batch",))
    assert missing in rivals.missing(("batch",))
    assert list(rivals.choose(("numpy",), ("batch",))) == ["numpy"]
    with pytest.raises(rivals.NotInstalled, match=r"python -m pip install no-such-package$"):
        rivals.choose(("numpy", "absent"), ("batch",))


def test_a_rival_that_is_there_for_one_of_them_is_not_chosen_for_the_others(monkeypatch):
    missing = rivals.Peer("Absent", "absent", "Absent", ("no-such-package",), only=("moments",))
    monkeypatch.setitem(rivals.PEERS, "absent", missing)
    assert "numpy-float64" not in rivals.choose(None, ("batch", "layer"))
    assert "numpy-float64" in rivals.choose(None, ("batch", "moments"))
    assert "numpy-float64" in rivals.choose(("numpy-float64",), ("batch",))
    assert missing not in rivals.missing(("batch",))
    assert missing in rivals.missing(("moments",))


def test_who_is_missing_is_said_after_a_run(run, capsys, monkeypatch):
    missing = rivals.Peer("Absent", "absent", "Absent", ("no-such-package",))
    monkeypatch.setattr(run, "missing", lambda normalizations: [missing])
    monkeypatch.setattr(run, "choose", lambda *_: {"numpy": rivals.PEERS["numpy"]})
    monkeypatch.setattr(run, "QUICK_BUDGET", 1e-9)
    selection = run.Selection(("moments",), shapes="7x3", quick=True)
    assert run.run(selection, None, None, None) == 0
    assert "Not compared with Absent, for want of: no-such-package." in capsys.readouterr().err


@pytest.mark.parametrize(
    "names, expected",
    [
        (["moments"], "moments"),
        (["layer", "rms"], "layer, rms norm"),
        (["moments", "weight", "rms"], "weight, rms norm and moments"),
    ],
)
def test_how_they_are_called(names, expected):
    assert normalizations.called(names) == expected


def test_the_command_writes_the_same_in_every_form(run, tmp_path):
    arguments = "--quick --peers numpy --shapes 2x8,3x4x5x5 --json j --markdown m --plot p.png"
    done = bench(*arguments.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "j").read_text(encoding="utf-8"))
    assert results["command"].endswith("--shapes 2x8,3x4x5x5 --peers numpy --quick")
    assert results["versions"]["bnfast"] == bnfast.__version__
    assert results["rivals"] == {"NumPy": {"version": np.__version__}}
    assert results["offset"] == 16
    assert (results["dtype"], results["threads"], results["regime"]) == ("float32", 1, "out")
    assert len(results["rows"]) == 9
    for row in results["rows"]:
        mine, rival = row["bnfast"], row["rivals"]["NumPy"]
        assert mine["quartiles"][0] <= mine["seconds"] <= mine["quartiles"][1]
        assert mine["GB/s"] == pytest.approx(row["traffic"] / mine["seconds"] / 1e9)
        assert mine["fraction of limit"] == pytest.approx(mine["GB/s"] / row["limit"]["GB/s"])
        assert rival["ratio"] == pytest.approx(rival["seconds"] / mine["seconds"])
        assert mine["error"] < 1e-4
        assert set(row["limit"]["probes in GB/s"]) == set(limit.MOVED)
    text = (tmp_path / "m").read_text(encoding="utf-8")
    assert text == run.report.markdown(results) + "\n"
    for row in results["rows"]:
        name = f"| {row['operation']} | {'x'.join(map(str, row['shape']))} "
        assert name + f"| {row['layout'].upper()} |" in text
        ratio, spread, error = (row["rivals"]["NumPy"][of] for of in ("ratio", "spread", "error"))
        assert f"| **{ratio:.2f} ±{spread:.0%} ({error:.0e})** |" in text or ratio >= 10
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "Geometric means" in done.stdout
    assert results["command"] in done.stdout


@pytest.mark.parametrize("width", [60, 80, 300])
def test_tables_lose_nothing_in_narrow_terminals(run, capsys, monkeypatch, width):
    report = run.report
    selection = run.Selection(shapes="3x4x5x5", quick=True)
    results = run.measure(selection, {"NumPy": numpy_formulas.NumPyFormulas(1)}, budget=1e-9)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    report.show(results)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    words = " ".join(printed.replace("│", " ").split())
    for sheet in (report.all_cells(results), report.all_means(results)):
        for line in sheet.rows:
            assert all(text.text in words for text in line)


@pytest.mark.parametrize("arguments", [("training,backward",), ("training", "BACKWARD")])
def test_names_may_be_separated_by_commas(arguments):
    options = parsed("--op", *arguments, "--layout", "NHWC")
    assert [name for names in options.op for name in names] == ["training", "backward"]
    assert options.layout == [("nhwc",)]


def test_normalizations_are_words_or_lists():
    options = parsed("--norm", "layer,RMS", "group")
    assert options.norm == [("layer", "rms"), ("group",)]


def test_the_report_says_where_arrays_begin_and_whose_begin_elsewhere(run):
    stubs = {
        "copying": Stub(lambda cell: cell.data.x, copies=True),
        "reusing": Stub(lambda cell: cell.data.x, copies=True, own_output=True),
        "new": Stub(lambda cell: cell.data.x, fresh=True),
        "placing": Stub(lambda cell: cell.data.x, own_output=False),
    }

    def notes(**choice):
        selection = run.Selection(
            operations=("inference",), layouts=("nchw",), shapes="3x4x5x5", quick=True, **choice
        )
        results = run.measure(selection, stubs, budget=1e-9)
        assert results["offset"] == selection.offset
        (row,) = results["rows"]
        rival = {name: outcome.get("own buffers", []) for name, outcome in row["rivals"].items()}
        return row["bnfast"].get("own buffers", []), rival, "\n".join(run.report.notes(results))

    ours, theirs, text = notes()
    both = ["inputs", "outputs"]
    assert ours == []
    assert theirs == {"copying": both[:1], "reusing": both, "new": both[1:], "placing": []}
    assert "Arrays begin 16 bytes past a page" in text
    whose = "inputs of copying; inputs and outputs of reusing; outputs of new."
    assert f"Memory of their own, which begins where they like: {whose}" in text
    ours, theirs, text = notes(regime="fresh", offset=0)
    assert ours == both[1:]
    assert theirs == {"copying": both, "reusing": both, "new": both[1:], "placing": []}
    assert "Arrays begin at a page" in text
    whose = "outputs of bnfast, new; inputs and outputs of copying, reusing."
    assert f"Memory of their own, which begins where they like: {whose}" in text


def test_several_normalizations_are_told_apart_in_every_form(run, tmp_path):
    arguments = "--norm rms batch spectral --shapes 6x8 --quick --peers".split()
    partly = not rivals.PEERS["onnxruntime"].missing()
    arguments.append("numpy,onnxruntime" if partly else "numpy")
    done = bench(*arguments, "--json", "j", "--markdown", "m", "--plot", "p.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "j").read_text(encoding="utf-8"))
    assert results["command"].split()[4:8] == ["--norm", "rms", "batch", "spectral"]
    assert results["normalizations"] == ["rms", "batch", "spectral"]
    measured = [(row["normalization"], row["operation"]) for row in results["rows"]]
    assert measured == [
        *(("rms", operation) for operation in ("forward", "backward")),
        *(("batch", operation) for operation in ("inference", "training", "backward")),
        *(("spectral", operation) for operation in ("forward", "backward")),
    ]
    means = results["geometric means"]
    assert [(m["normalization"], m["operation"], m["layout"]) for m in means] == [
        *(("batch", operation, "nchw") for operation in ("inference", "training", "backward")),
        *(("rms", operation, "rows") for operation in ("forward", "backward")),
        *(("spectral", operation, "filters") for operation in ("forward", "backward")),
    ]
    text = (tmp_path / "m").read_text(encoding="utf-8")
    assert "| normalization | operation | shape | layout | bnfast |" in text
    assert "| rms | backward | 6x8 | ROWS |" in text
    assert "| batch | backward | 6x8 | NCHW |" in text
    assert "| spectral | forward | 6x8 | FILTERS |" in text
    assert ("ONNX Runtime has nothing of spectral norm: " in text) == partly
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_measure_is_said_before_anything_is_loaded(tmp_path):
    for package in NEEDED:
        pytest.importorskip(package)
    done = bench("--norm", "layer", "--op", "training", cwd=tmp_path)
    assert done.returncode == 1
    message = "layer norm has no training, but forward, backward"
    assert done.stderr == f"python -m bnfast bench: {message}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        *(("--op", "nonsense"), ("--layout", "chwn"), ("--dtype", "int8")),
        ("--norm", "weights"),
        ("--regime", "idle"),
        *(("--shapes", "3"), ("--threads", "0"), ("--threads", "1000000")),
        *(("--peers", "nobody"), ("--plot", "plot.xyz"), ("--json", "f", "--markdown", "f")),
        *(("--offset", "2"), ("--offset", "4096")),
        ("--offset", "4", "--dtype", "float64"),
        ("--offset", "1", "--dtype", "float16"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(arguments, capsys):
    assert _cli.main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m bnfast bench: ")
    assert arguments[0] in line or "got f twice" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mean", "nan"), "--mean: expected a finite number, got 'nan'"),
        (("--mean=-inf",), "--mean: expected a finite number, got '-inf'"),
        (("--mean", "high"), "--mean: expected a finite number, got 'high'"),
        (("--offset", "line"), "--offset: expected an integer, got 'line'"),
        (("--offset", "1.5"), "--offset: expected an integer, got '1.5'"),
        (("--offset", "-4"), "--offset: expected a multiple of 4, the bytes of a float32, from 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused_with_what_was_expected(arguments, message, capsys):
    assert _cli.main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m bnfast bench: argument {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nrom", "layer"), "unknown option '--nrom'; did you mean '--norm'?"),
        (("--norm", "layer,bach"), "got 'bach'; did you mean 'batch'?"),
        (("--op", "trainning"), "got 'trainning'; did you mean 'training'?"),
        (("--layout", "nchv"), "expected one of nchw, nhwc, got 'nchv'; did you mean 'nchw'?"),
        (("--dtype", "bf16"), "got 'bf16'; did you mean 'bfloat16'?"),
        (("--regime", "netwrok"), "got 'netwrok'; did you mean 'network'?"),
        (("--peers", "numpy,pytroch"), "got 'pytroch'; did you mean 'pytorch'?"),
        (("--shapes", "resnet5"), "one of: resnet50, small"),
        (("--shapes", "resnet5"), "; did you mean 'resnet50'?"),
    ],
)
def test_the_closest_word_is_asked_for(arguments, message, capsys):
    assert _cli.main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--markdown", "--plot"])
def test_outputs_that_cannot_be_written_are_refused_before_anything_is_measured(
    option, run, capsys, monkeypatch, tmp_path
):
    def measured(*arguments):
        raise AssertionError("it was to end before")

    monkeypatch.setattr(run, "ready", measured)
    path = tmp_path / "f.png"
    for reason in ("the folder ", "expected a file to write to, got a folder"):
        wrong = tmp_path / "nowhere" / "f.png" if reason == "the folder " else path
        if wrong is path:
            path.mkdir()
        assert _cli.main(["bench", option, str(wrong)]) == 1
        assert f"{wrong}: {reason}" in capsys.readouterr().err
    path.rmdir()
    path.write_text("what was there")
    assert _cli.main(["bench", option, str(path)]) == 1
    expected = f"python -m bnfast bench: {path} exists, and is not written over without --force\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(AssertionError, match="it was to end"):
        _cli.main(["bench", option, str(path), "--force"])
    assert path.read_text() == "what was there"


def test_markdown_for_the_terminal_is_no_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").touch()
    assert str(parsed("--markdown").markdown) == "-"


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_bfloat16_says_what_is_missing(command, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert _cli.main([command, "--dtype", "bfloat16"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m bnfast {command}: needs ml_dtypes for bfloat16 (")
    assert line.endswith('): python -m pip install "bnfast[half]"')


def test_weights_of_16_bits_are_not_measured(run, capsys):
    assert _cli.main(["bench", "--norm", "weight", "--dtype", "float16"]) == 1
    message = "weight norm is not measured in float16"
    assert capsys.readouterr().err == f"python -m bnfast bench: {message}\n"


@pytest.mark.parametrize("normalization", [n for n in NORMALIZATIONS if n in HALF])
def test_data_of_16_bits_have_parameters_of_32_that_they_could_have(normalization):
    b = make_data(normalization, (4, 6, 5, 7), "nchw", np.float16, mean=3)
    assert (b.x.dtype, b.out.dtype) == (np.float16, np.float16)
    assert 2 < b.x.mean() < 4
    for name in ("weight", "bias", "mean", "var", "invstd"):
        assert getattr(b, name).dtype == np.float32
    np.testing.assert_array_equal(b.weight, b.weight.astype(np.float16))


def test_it_says_what_is_missing(tmp_path):
    (tmp_path / "rich.py").write_text("raise ImportError('no rich here')")
    done = bench(cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "python -m bnfast bench: needs matplotlib, rich and threadpoolctl (no rich here): "
        'python -m pip install "bnfast[bench]"\n'
    )


def not_offered(peer, dtype, normalization, operation, layout):
    """What a rival has not, as it is installed here."""
    if dtype in HALVES and peer in ("onnxruntime", "numba", "onedal", "polars"):
        return True
    activated = normalization in rivals.ACTIVATED
    if rivals.PEERS[peer].only == rivals.ACTIVATED:
        return not activated
    if activated:
        fuses = normalization == "batch-relu" and peer.startswith("onednn") and dtype == "float32"
        return peer != "pytorch" and not fuses
    if rivals.PEERS[peer].only:
        return normalization != "moments" or (peer, dtype) == ("numpy-float64", "float64")
    if normalization == "moments":
        return peer in ("onnxruntime", "numba") or peer.startswith("onednn")
    if peer == "numba":
        return normalization != "batch"
    if normalization in ("weight", "spectral"):
        return peer == "onnxruntime" or peer.startswith("onednn")
    if peer == "onnxruntime":
        training = operation in ("training", "backward")
        return training or layout == "nhwc" or (normalization, dtype) == ("instance", "float64")
    if not peer.startswith("onednn"):
        return False
    if dtype == "float64" or (peer == "onednn-blocked" and normalization != "batch"):
        return True
    from bnfast._cli.bench.rivals.onednn_library import library

    came = {"rms": (3, 9), "group": (3, 3), "instance": (3, 3)}
    return library().version < came.get(normalization, (3,))


def has_no_kernel(peer, dtype, outcome):
    """Whether oneDNN has types of 16 bits on some processors alone."""
    reason = outcome.get("not offered", "")
    return dtype in HALVES and peer.startswith("onednn") and "on this machine" in reason


MEASURE = """
import json, sys
from bnfast._cli.bench import run, timing
timing.TURN = timing.WARM_UP = 0  # every call once a round
rows = []
for choice in json.loads(sys.argv[1]):
    selection = run.Selection(**choice)
    rows.append(run.measure(selection, run.ready(selection), budget=1e-9)["rows"])
json.dump(rows, sys.stdout)
"""


REPORT = """
import json, sys
from bnfast._cli.bench import run
selection = run.Selection(**json.loads(sys.argv[1]))
print(run.report.markdown(run.measure(selection, run.ready(selection), budget=1e-9)))
"""


# Rivals that compile take long for each shape: they are given two, one of them with planes; all
# four in either regime, and in types of 16 bits as in wider ones. The others are given all.
MEASURED = {
    ("out", "float32"): "16x20,6x19x5x7",
    ("fresh", "float64"): "9x24x1x1,3x66x2x6",
    ("out", "bfloat16"): "9x24x1x1,3x66x2x6",
    ("fresh", "float16"): "16x20,6x19x5x7",
}
ALL_SHAPES = "16x20,9x24x1x1,6x19x5x7,3x66x2x6"
COMPILING = ("jax", "numba", "pytorch-compiled")


@functools.cache
def rows_of(peer):
    """All rows that a rival has, for each regime and type.

    In one process for each rival, which takes a second to begin; and not in this one: JAX and
    PyTorch leave threads behind, which other tests fork.
    """
    choices = [
        {
            "normalizations": normalizations_in(dtype),
            "shapes": shapes if peer in COMPILING else ALL_SHAPES,
            **{"peers": [peer], "regime": regime, "dtype": dtype},
        }
        for (regime, dtype), shapes in MEASURED.items()
        if dtype != "bfloat16" or importlib.util.find_spec("ml_dtypes")
    ]
    child = [sys.executable, "-c", MEASURE, json.dumps(choices)]
    done = subprocess.run(child, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    keys = [(choice["regime"], choice["dtype"]) for choice in choices]
    return dict(zip(keys, json.loads(done.stdout), strict=True))


def normalizations_in(dtype):
    return [n for n, norm in NORMALIZATIONS.items() if norm.takes_halves or dtype not in HALVES]


@pytest.mark.parametrize("regime, dtype", MEASURED)
@pytest.mark.parametrize("peer", rivals.PEERS)
def test_every_rival_is_right(run, peer, regime, dtype):
    if rivals.PEERS[peer].missing():
        pytest.skip(f"{peer} is not installed")
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    rows = rows_of(peer)[regime, dtype]
    assert {row["normalization"] for row in rows} == set(normalizations_in(dtype))
    for row in rows:
        (outcome,) = row["rivals"].values()
        assert row["bnfast"]["error"] < RIVAL[dtype]
        if has_no_kernel(peer, dtype, outcome):
            continue
        cell = row["normalization"], row["operation"], row["layout"]
        missing = not_offered(peer, dtype, *cell)
        assert ("not offered" in outcome) == missing, (cell, row["shape"], outcome)
        assert missing or outcome["error"] < RIVAL[dtype], (cell, row["shape"], outcome)


THREADS = """
import polars
from bnfast._cli.bench.rivals import PEERS
peer = PEERS["polars"]
print(peer.load(polars.thread_pool_size()).version)
peer.load(polars.thread_pool_size() + 1)
"""


def test_threads_that_cannot_be_set_are_a_failure():
    if rivals.PEERS["polars"].missing():
        pytest.skip("polars is not installed")
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert done.stdout.strip() and done.returncode == 1
    assert "RuntimeError: it was imported before, with " in done.stderr


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("lines", [1, 5, 64, 1000])
def test_memory_probes_move_what_they_say(isa, threads, lines):
    x = cells.aligned_empty((16 * lines,), np.float32)
    y = cells.aligned_empty((16 * lines,), np.float32)
    x[:] = np.arange(x.size) + 1
    for kind in ("copy", "streaming_copy"):
        y[:] = 0
        _core.probe_memory(kind, x, y, threads)
        np.testing.assert_array_equal(y, x)
    _core.probe_memory("in_place", x, y, threads)
    np.testing.assert_array_equal(y, -x)
    _core.probe_memory("read", x, x, threads)
    np.testing.assert_array_equal(y, -x)


def test_memory_probes_refuse_what_they_cannot_move():
    x = cells.aligned_empty((64,), np.float32)
    with pytest.raises(ValueError, match="no such probe"):
        _core.probe_memory("swap", x, x, 1)
    for other in (x[1:], x[16:]):
        with pytest.raises(ValueError, match="cache lines"):
            _core.probe_memory("copy", x, other, 1)


def test_the_sizes_of_the_caches_are_known():
    level2, last_level = _core.cache_sizes()
    assert 1 << 15 <= level2 <= last_level
