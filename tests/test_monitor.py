"""The monitor: how far training and evaluation differ, and why, without touching a layer."""

import copy
import sys

import numpy as np
import pytest

import bnfast
from bnfast import LearnableMomentum, RenormSchedule
from cases import in_layout
from test_running_statistics import CHANNELS, call
from tolerances import CLOSE_F64

SCHEDULE = RenormSchedule(1.2, 0.3, 0, 0, 0)
MONITORED = {
    "batch": bnfast.BatchNorm,
    "batch, biased": lambda channels, **k: bnfast.BatchNorm(channels, unbiased=False, **k),
    "batch, frozen": lambda channels, **k: bnfast.BatchNorm(channels, frozen=True, **k),
    "conditional": lambda channels, **k: bnfast.ConditionalBatchNorm(channels, 2, **k),
    "ghost": lambda channels, **k: bnfast.GhostBatchNorm(channels, 3, **k),
    "renormalized": lambda channels, **k: bnfast.BatchRenorm(channels, schedule=SCHEDULE, **k),
    "cross iteration": lambda channels, **k: bnfast.CrossIterationBatchNorm((channels, 2), 1, **k),
    "moving average": lambda channels, **k: bnfast.MovingAverageBatchNorm(
        channels, 1, warm_up=0, r_max=1.2, **k
    ),
    "learned": lambda channels, **k: bnfast.BatchNorm(
        channels, momentum=LearnableMomentum(0.3, True), **k
    ),
}


@pytest.fixture(params=MONITORED)
def make(request):
    return MONITORED[request.param]


def used(make, rng, **options):
    """A layer whose running statistics are of some other data."""
    layer = make(CHANNELS, eps=0.1, **options)
    if layer.running_mean is not None:
        layer.running_mean[...] = rng.normal(size=CHANNELS)
    second = layer.running_std if hasattr(layer, "running_std") else layer.running_var
    second[...] = rng.uniform(0.5, 2, CHANNELS)
    layer.num_batches_tracked = 1000
    return layer


def in_mode(layer, x, training):
    other = copy.deepcopy(layer).train(training)
    other.frozen = False
    return call(other, x)


def test_the_difference_is_that_of_the_outputs(make, axis, rng):
    layer = used(make, rng, axis=axis, dtype=np.float64)
    data = [in_layout(rng.normal(k, 1 + k, (n, CHANNELS, 4)), axis) for k, n in enumerate((6, 9))]
    with bnfast.monitoring(layer) as report:
        for x in data:
            call(layer.eval(), x)
    squares = [(in_mode(layer, x, True) - in_mode(layer, x, False)) ** 2 for x in data]
    axes = (0, 2) if axis == 1 else (0, 1)
    expected = np.sqrt(np.concatenate(squares).mean(axes))
    (row,) = report.rows
    np.testing.assert_allclose(row.difference, expected, rtol=1e-11)


def test_drift_is_told_in_running_standard_deviations(make, rng):
    layer, x = used(make, rng, dtype=np.float64), rng.normal(3, 2, (12, CHANNELS, 4))
    if isinstance(layer, bnfast.BatchRenorm):
        variance = layer.running_std**2
    else:
        variance = layer.running_var + layer.eps
    with bnfast.monitoring(layer) as report:
        for part in np.split(x, [3, 6]):
            call(layer, part)
    (row,) = report.rows
    if isinstance(layer, bnfast.MovingAverageBatchNorm):
        shift, own = np.zeros(CHANNELS), (x**2).mean((0, 2))
    else:
        shift, own = x.mean((0, 2)) - layer.running_mean, x.var((0, 2))
    np.testing.assert_allclose(row.mean_drift, shift / np.sqrt(variance), rtol=1e-11)
    np.testing.assert_allclose(
        row.variance_drift, np.log((own + 0.1) / variance), rtol=0, atol=1e-11
    )
    assert (row.batches, row.fewest_values) == ((4, 12) if "Ghost" in row.kind else (3, 12))


@pytest.mark.parametrize("training", [True, False])
def test_monitoring_changes_no_bit_of_a_layer(make, dtype, rng, training):
    layer = used(make, rng, dtype=dtype).train(training)
    state, attributes = layer.state_dict(), dict(vars(layer))
    with bnfast.monitoring([layer]) as report:
        for x in rng.normal(3, 2, (3, 6, CHANNELS, 4)).astype(dtype):
            y = call(layer, x)
            if not training:
                np.testing.assert_array_equal(y, in_mode(layer, x, False))
    np.testing.assert_equal(layer.state_dict(), state)
    assert vars(layer).keys() - {"_saved"} == attributes.keys() - {"_saved"}
    for name, value in attributes.items():
        assert name == "_saved" or vars(layer)[name] is value
    assert report.rows[0].batches in (3, 6)


FILTERS = np.linspace(-1, 2, 2 * CHANNELS).reshape(CHANNELS, 2)


def of_several_batches(rng, which, **options):
    """A layer whose training takes three batches together; it has seen others."""
    if which == "cross iteration":
        layer = bnfast.CrossIterationBatchNorm((CHANNELS, 2), 3, dtype=np.float64, **options)
    else:
        layer = bnfast.MovingAverageBatchNorm(
            CHANNELS, 3, renormalized_from=2, r_max=1.2, dtype=np.float64, **options
        )
    for _ in range(4):
        trained_on(layer, rng.normal(3, 1, (6, 2)))
    return layer


def trained_on(layer, inputs):
    x = inputs @ FILTERS.T
    y = layer(x, inputs, FILTERS) if "Cross" in repr(layer) else layer(x)
    layer.backward(y)
    return y


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", ["cross iteration", "moving average"])
def test_training_that_takes_batches_together_takes_those_of_the_monitor(rng, which, training):
    layer = of_several_batches(rng, which, **({} if "cross" in which else {"warm_up": 0}))
    state, data = layer.state_dict(), rng.normal(0, 2, (6, 6, 2))
    with bnfast.monitoring(layer.train(training)) as report:
        for inputs in data:
            trained_on(layer, inputs)
    np.testing.assert_equal(layer.state_dict(), state)
    # The same, of batches that have nothing before them: three for each that is compared.
    squares = []
    for number in range(len(data)):
        alone = copy.deepcopy(layer).train()
        for inputs in [data[0]] * 3 + list(data[: number + 1]):
            alone.running_var[...] = layer.running_var
            y = trained_on(alone, inputs)
        if number >= 2:
            squares.append((y - layer.eval()(inputs @ FILTERS.T)) ** 2)
    with bnfast.monitoring(layer) as first:
        for inputs in data[:2]:
            layer(inputs @ FILTERS.T)
    (row,), (of_first,) = report.rows, first.rows
    total = 6 * row.difference**2 - 2 * of_first.difference**2
    np.testing.assert_allclose(total / 4, np.concatenate(squares).mean(0), rtol=1e-9)


@pytest.mark.parametrize("which", ["cross iteration", "moving average"])
def test_batches_at_first_are_taken_alone(rng, which):
    first = {"burn_in" if "cross" in which else "warm_up": 100}
    layer, inputs = of_several_batches(rng, which, **first), rng.normal(size=(3, 6, 2))
    with bnfast.monitoring(layer.eval()) as report:
        for some in inputs:
            layer(some @ FILTERS.T)
    (row,) = report.rows
    squares = [
        (trained_on(copy.deepcopy(layer).train(), some) - layer(some @ FILTERS.T)) ** 2
        for some in inputs
    ]
    np.testing.assert_allclose(row.difference, np.sqrt(np.mean(squares, (0, 1))), rtol=1e-11)


def test_batches_that_are_small_by_design_are_no_reason(rng):
    layers = {
        "batch": settled(),
        "cross": bnfast.CrossIterationBatchNorm((4, 2), 16, dtype=np.float64),
        "moving": bnfast.MovingAverageBatchNorm(4, 16, dtype=np.float64),
    }
    for layer in layers.values():
        layer.num_batches_tracked = 1000
    with bnfast.monitoring(layers) as report:
        for x in rng.normal(size=(100, 4, 4)):
            for layer in layers.values():
                layer.eval()(x)
    batch, cross, moving = report.rows
    assert batch.reasons == ("too few values: a batch had 4 per channel",)
    assert cross.reasons == moving.reasons == ()
    np.testing.assert_array_equal(moving.between_batches, 0)
    np.testing.assert_array_equal(cross.between_batches, batch.between_batches)


def test_an_exception_leaves_the_layer_as_it_was(make, rng):
    layer = used(make, rng)
    state = layer.state_dict()
    with pytest.raises(KeyError), bnfast.monitoring(layer):
        call(layer, rng.normal(size=(6, CHANNELS, 4)).astype(np.float32))
        raise KeyError
    np.testing.assert_equal(layer.state_dict(), state)
    call(layer, rng.normal(size=(6, CHANNELS, 4)).astype(np.float32))


def row_of(layer, *batches):
    with bnfast.monitoring(layer.eval()) as report:
        for x in batches:
            call(layer, x)
    return report.rows[0]


def settled(**options):
    """A layer of 4 channels that fits standard normal data."""
    layer = bnfast.BatchNorm(4, dtype=np.float64, **options)
    layer.num_batches_tracked = 1000
    return layer


def test_data_that_fit_give_no_reason(rng):
    row = row_of(settled(), *rng.normal(size=(4, 500, 4)))
    assert row.reasons == () and row.remaining_start < 1e-40
    assert row.difference.max() < 0.1 and row.between_batches.max() < 0.02


def test_drift_is_a_reason(rng):
    x = rng.normal(size=(500, 4)) * [1, 1, 3, 1] + [0, -2, 0, 0]
    assert row_of(settled(), x).reasons == (
        "mean drifted in 1 of 4 channels, channel 1 by 2.0 standard deviations",
        f"variance drifted in 1 of 4 channels, channel 2 to {x[:, 2].var():.2g} times the running "
        f"one",
    )


def test_constant_and_nonfinite_channels_are_reasons(rng):
    x = rng.normal(size=(500, 4))
    x[:, 0], x[7, 2] = 0.5, np.nan
    row = row_of(settled(), x)
    np.testing.assert_array_equal(row.constant, [True, False, False, False])
    np.testing.assert_array_equal(row.nonfinite, [False, False, True, False])
    assert row.reasons[0] == "values that are not finite in 1 of 4 channels"
    assert row.reasons[-1] == "all values equal in 1 of 4 channels"


def test_few_values_are_a_reason(rng):
    row = row_of(settled(), *rng.normal(size=(100, 5, 4)))
    assert row.reasons == ("too few values: a batch had 5 per channel",)


def test_batches_unlike_each_other_are_a_reason(rng):
    means = np.resize([-0.7, 0.7], (8, 1, 1))
    data = 0.7 * rng.normal(size=(8, 50, 4)) + means
    row = row_of(settled(), *data)
    share = row.between_batches
    total = np.concatenate(data).var(0)
    within = data.var(1).mean(0)
    np.testing.assert_allclose(share, 1 - within / total, rtol=CLOSE_F64)
    assert row.reasons == (
        f"batches are small or unlike each other: {share.max():.0%} of the variance of a channel "
        f"lies between them",
    )


@pytest.mark.parametrize(
    ("momentum", "batches", "remaining"),
    [
        (0.1, 10, 0.9**10),
        (None, 1, 0.0),
        (bnfast.ExponentialAverage(old=0.99), 3, 0.99**3),
        (bnfast.ExponentialAverage(old=0.99, bias_corrected=True), 3, 0.0),
        (lambda number: 0.1 / number, 2, 0.9 * 0.95),
        (bnfast.ExponentialAverage(new=0.1), 100, 0.9**100),  # also where little is left
        (lambda number: 0.5, 10**9, 0.0),  # at once
        (LearnableMomentum(0.01), 5, 0.0),
    ],
)
def test_few_batches_in_training_are_a_reason(rng, momentum, batches, remaining):
    layer = settled(momentum=momentum)
    layer.num_batches_tracked = batches
    row = row_of(layer, rng.normal(size=(500, 4)))
    assert row.remaining_start == pytest.approx(remaining)
    told = "too few batches in training: running statistics are"
    assert [reason[: len(told)] for reason in row.reasons] == [told] * (remaining > 0.05)


def test_statistics_from_elsewhere_are_not_what_they_began_as(rng):
    layer = bnfast.BatchNorm(4, dtype=np.float64)
    x = rng.normal(size=(500, 4))
    assert row_of(layer, x).remaining_start == 1
    layer.running_mean += 0.01  # as of a Keras layer, which counts no batches
    assert row_of(layer, x).remaining_start == 0


@pytest.mark.parametrize(
    "layer",
    [bnfast.InstanceNorm(3, track_running_stats=True), bnfast.IterNorm(3)],
    ids=["instance", "whitening"],
)
def test_layers_that_cannot_be_monitored_say_so(layer):
    with pytest.raises(TypeError, match=f"neither InstanceNorm .* 1 is {type(layer).__name__}"):
        with bnfast.monitoring([bnfast.BatchNorm(3), layer]):
            pass
    with bnfast.recalibrating(layer):  # nothing was left behind
        layer(np.arange(24.0, dtype=np.float32).reshape(4, 3, 2) ** 2)


def report_of(rng):
    layers = {"stem": settled(), "body": settled(), "head": settled()}
    with bnfast.monitoring(layers) as report:
        layers["stem"].eval()(rng.normal(2, 1, (50, 4)))
        layers["body"].eval()(rng.normal(0, 1, (50, 4)))
    return report


def test_the_table_has_a_line_for_each_layer_and_its_reasons(rng):
    report = report_of(rng)
    lines = report.table().split("\n")
    assert str(report) == report.table()
    assert lines[0].split() == [
        *("layer", "class", "batches", "values", "difference", "mean", "drift", "variance"),
    ]
    stem, body, head = [line.split() for line in lines[1:] if line[0] != " "]
    assert stem[:4] == ["stem", "BatchNorm", "1", "50"]
    assert body[:4] == ["body", "BatchNorm", "1", "50"]
    assert head == ["head", "BatchNorm", "0", "0", "-", "-", "-"]
    assert lines[2].startswith("    mean drifted in 4 of 4 channels")
    assert lines[-1] == "    no data went through it"
    assert np.isnan(report.rows[2].difference).all()


def test_the_plot_goes_to_a_file_or_to_axes(rng, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    report = report_of(rng)
    report.plot(tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")
    axes = Figure().add_subplot()
    assert report.plot(axes) is axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["stem", "body"]
    points = axes.lines[1].get_ydata()
    medians = [np.median(np.abs(row.mean_drift)) for row in report.rows[:2]]
    np.testing.assert_array_equal(points, medians)


@pytest.mark.parametrize("where", [None, 3, {}])
def test_the_plot_goes_nowhere_else(rng, where):
    pytest.importorskip("matplotlib")
    with pytest.raises(TypeError, match=r"where must be a path or a matplotlib\.axes\.Axes, got"):
        report_of(rng).plot(where)


def test_the_plot_says_what_it_needs(rng, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.axes", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="needs matplotlib: python -m pip install matplotlib"):
        report_of(rng).plot(tmp_path / "drift.png")
    assert not list(tmp_path.iterdir())


def test_recalibrated_statistics_keep_nothing_of_their_beginning(rng):
    layer = bnfast.BatchNorm(4).eval()
    data = [rng.normal(3, 2, (64, 4)).astype(np.float32) for _ in range(3)]
    with bnfast.recalibrating(layer):
        for batch in data:
            layer(batch)
    with bnfast.monitoring(layer) as report:
        for batch in data:
            layer(batch)
    assert report.rows[0].remaining_start == 0.0
    assert report.rows[0].reasons == ()
    other = bnfast.BatchNorm(4)
    other.num_batches_tracked = 1
    layer.load_state_dict(other.state_dict())
    assert row_of(layer, data[0]).remaining_start == 0.9
    layer.reset_running_stats()
    assert row_of(layer, data[0]).remaining_start == 1.0


def test_a_layer_without_its_arrays_leaves_the_others_alone(rng):
    whole, broken = settled(), bnfast.MovingAverageBatchNorm(4)
    broken.gradient_buffer = None
    with pytest.raises(AttributeError), bnfast.monitoring([whole, broken]):
        pass
    row_of(whole, rng.normal(size=(8, 4)))  # is not being monitored still
