"""Recalibration and test-time adaptation of layers with running statistics."""

import copy
import warnings

import numpy as np
import pytest

import bnfast
from cases import in_layout
from test_running_averages import assert_close, batches, running
from test_running_statistics import CHANNELS, LAYERS, call, running_names
from tolerances import CLOSE_F64, PEER_OUTPUT, ROUNDED_F32

OF_CHANNELS = ("batch", "ghost", "conditional", "cross iteration")


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


def trained(kind, rng, **options):
    """A layer that has seen some batches."""
    layer = LAYERS[kind](CHANNELS, **options)
    for x in batches(rng, dtype=layer.dtype):
        call(layer, x)
    return layer


def shifted(rng, dtype=np.float64, sizes=(3, 6, 2, 5)):
    """Batches of other sizes, means and variances."""
    return [rng.normal(-k, 2 + k, (n, CHANNELS, 4)).astype(dtype) for k, n in enumerate(sizes)]


def feed(layer, data):
    return [call(layer, x) for x in data]


def expected_of(kind, layer, data):
    """The statistics of all batches together, by definition."""
    x = np.concatenate(data).astype(np.float64)
    if kind == "instance":
        return {"running_mean": x.mean((0, 2)), "running_var": x.var(2, ddof=1).mean(0)}
    if kind == "moving average":
        return {"running_var": (x**2).mean((0, 2))}
    mean = x.mean((0, 2))
    if kind == "renormalized":
        return {"running_mean": mean, "running_std": np.sqrt(x.var((0, 2)) + layer.eps)}
    if kind in OF_CHANNELS:
        return {"running_mean": mean, "running_var": x.var((0, 2), ddof=1)}
    rows = x.transpose(0, 2, 1).reshape(-1, CHANNELS) - mean
    covariance = (rows.T @ rows / len(rows))[None]
    if kind == "covariance":
        return {"running_mean": mean, "running_matrix": covariance}
    values, vectors = np.linalg.eigh(covariance[0] + layer.eps * np.eye(CHANNELS))
    return {
        "running_mean": mean,
        "running_matrix": (vectors / np.sqrt(values) @ vectors.T)[None],
    }


def assert_near(found, expected, tolerance=1e-11):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        size = np.abs(array).max()
        np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance * size)


def test_recalibrated_statistics_are_those_of_all_batches_together(kind, rng):
    layer, data = trained(kind, rng, dtype=np.float64), shifted(rng)
    with bnfast.recalibrating(layer):
        feed(layer, data)
    assert_near(running(layer), expected_of(kind, layer, data))


def test_a_batch_that_is_refused_is_not_seen(kind, rng):
    layer, data = trained(kind, rng, dtype=np.float64), shifted(rng)
    bad = [{"out": np.zeros((3, CHANNELS, 5))}, {"out": "out"}]
    if kind in ("batch", "instance"):
        bad.append({"residual": np.zeros((3, CHANNELS, 5))})
    with bnfast.recalibrating(layer):
        feed(layer, data)
        for arguments in bad:
            with pytest.raises((TypeError, ValueError), match=r"out must be|must have the shape"):
                call(layer, 100 * data[0], **arguments)
    assert_near(running(layer), expected_of(kind, layer, data))


def test_batches_may_be_cut_in_any_way(kind, rng):
    layer = trained(kind, rng, dtype=np.float64)
    whole = np.concatenate(shifted(rng))
    found = []
    for cuts in ([16], [2, 14], [4, 4, 8], [5, 5, 6]):
        with bnfast.recalibrating(layer):
            feed(layer, np.split(whole, np.cumsum(cuts)[:-1]))
        found.append(running(layer))
    for other in found[1:]:
        assert_near(other, found[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("prior", [None, 16])
@pytest.mark.parametrize("method", ["pooled", "average_of_batches"])
def test_recalibration_leaves_everything_else_alone(kind, dtype, rng, training, prior, method):
    if prior is not None and method != "pooled":
        return
    layer = trained(kind, rng, dtype=dtype).train(training)
    before, settings = layer.state_dict(), copy.deepcopy(vars(layer))
    arrays = [getattr(layer, name) for name in running_names(kind)]
    with bnfast.recalibrating(layer, method=method, prior=prior):
        feed(layer.train(), shifted(rng, dtype))
        layer.eval()
    assert vars(layer).keys() - {"_made_of_data"} == settings.keys()
    for name, value in settings.items():
        if not isinstance(value, np.ndarray) and name[0] != "_" and name != "num_batches_tracked":
            assert getattr(layer, name) == value
    for array, name in zip(arrays, running_names(kind), strict=True):
        assert array is getattr(layer, name)
    for name, array in layer.state_dict().items():
        same = np.array_equal(array, before[name])
        assert same != name.startswith("running") or name == "num_batches_tracked"
    by_step = ("renormalized", "moving average", "cross iteration")
    counted = {**dict.fromkeys(by_step, 4), "instance": 0}.get(kind)
    if counted is None:
        parts = 6 if kind == "ghost" else 4
        counted = parts if prior is None else 4 + parts
    assert layer.num_batches_tracked == counted


def test_batches_are_normalized_by_themselves(kind, dtype, rng):
    layer, data = trained(kind, rng, dtype=dtype).eval(), shifted(rng, dtype)
    alone = copy.deepcopy(layer).train()
    if kind == "renormalized":
        alone.schedule = bnfast.RenormSchedule(1.0, 0.0, 0, 0, 0)
    with bnfast.recalibrating(layer):
        got = feed(layer, data)
    for y, x in zip(got, data, strict=True):
        np.testing.assert_array_equal(y, call(alone, x))


def test_backward_works_inside(kind, rng):
    layer, x = trained(kind, rng, dtype=np.float64), shifted(rng)[0]
    alone = copy.deepcopy(layer)
    if kind == "renormalized":
        alone.schedule = bnfast.RenormSchedule(1.0, 0.0, 0, 0, 0)
    call(alone, x)
    with bnfast.recalibrating(layer):
        call(layer, x)
        np.testing.assert_array_equal(layer.backward(x), alone.backward(x))


def test_the_average_of_batches_is_that_of_momentum_none(kind, rng):
    layer, data = trained(kind, rng, dtype=np.float64).eval(), shifted(rng)
    average = LAYERS[kind](CHANNELS, momentum=bnfast.CumulativeAverage(), dtype=np.float64)
    feed(average, data)
    with bnfast.recalibrating(layer, method="average_of_batches"):
        feed(layer, data)
    assert_close(running(layer), running(average))


def test_the_average_of_batches_is_that_of_pytorch(rng):
    torch = pytest.importorskip("torch")
    x = [rng.normal(k, 1 + k, (n, 3, 4, 4)).astype(np.float32) for k, n in enumerate((5, 7, 2))]
    module = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.ReLU(), torch.nn.BatchNorm2d(3))
    layers = [bnfast.BatchNorm(3) for _ in range(2)]
    torch.optim.swa_utils.update_bn([torch.as_tensor(batch) for batch in x], module)
    with bnfast.recalibrating(layers, method="average_of_batches"):
        for batch in x:
            layers[1](np.maximum(layers[0](batch), 0))
    for layer, peer in zip(layers, (module[0], module[2]), strict=True):
        for name in ("running_mean", "running_var"):
            np.testing.assert_allclose(
                getattr(layer, name), getattr(peer, name).numpy(), **PEER_OUTPUT
            )
        assert layer.num_batches_tracked == int(peer.num_batches_tracked) == 3


def test_a_large_mean_leaves_pooled_variances_exact(rng):
    # fvcore's precise BN loses these: it subtracts the square of the mean from a mean of squares.
    layer = bnfast.BatchNorm(4)
    data = [rng.normal(1e6 + k, 1, (1000, 4)).astype(np.float32) for k in range(3)]
    with bnfast.recalibrating(layer):
        feed(layer, data)
    expected = np.concatenate(data).astype(np.float64).var(0, ddof=1)
    np.testing.assert_allclose(layer.running_var, expected, rtol=ROUNDED_F32)


@pytest.mark.parametrize("prior", [0, 1, 16.5, 1e9])
@pytest.mark.parametrize("axis", [1, -1, 0])
def test_a_prior_counts_as_samples(rng, axis, prior):
    layer = bnfast.BatchNorm(3, axis=axis, dtype=np.float64)
    source, x = rng.normal(3, 2, (2, 5, 3, 4))
    source, x = (np.moveaxis(a, 1, axis) for a in (source, x))
    layer(source)
    old_mean, old_var = layer.running_mean.copy(), layer.running_var.copy()
    pooled = bnfast.moments(x, axis)
    n = 5
    mean = (prior * old_mean + n * pooled.mean) / (prior + n)
    var = (prior * old_var + n * pooled.m2 / (pooled.count - 1)) / (prior + n)
    with bnfast.recalibrating(layer, prior=prior):
        y = layer(x)
    assert_near(running(layer), {"running_mean": mean, "running_var": var}, CLOSE_F64)
    expected = bnfast.batch_norm(x, mean, var, axis=axis)
    np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-11)


def test_with_a_prior_outputs_are_those_of_evaluation_if_the_block_ended_there(kind, rng):
    layer, data = trained(kind, rng, dtype=np.float64).eval(), shifted(rng)
    with bnfast.recalibrating(layer, prior=4):
        outputs = feed(layer, data)
    size = np.abs(outputs[-1]).max()
    np.testing.assert_allclose(call(layer, data[-1]), outputs[-1], rtol=0, atol=1e-10 * size)
    fresh = trained(kind, np.random.default_rng(0), dtype=np.float64)
    old = running(fresh)
    with bnfast.recalibrating(fresh, prior=4):
        feed(fresh, data)
    own = expected_of(kind, fresh, data)
    assert_near(running(fresh), {name: (4 * old[name] + 16 * own[name]) / 20 for name in own})


def test_an_exception_leaves_the_old_statistics(kind, rng):
    layers = [trained(kind, rng) for _ in range(2)]
    before = [layer.state_dict() for layer in layers]
    kept = [dict(vars(layer)) for layer in layers]
    for options in ({}, {"prior": 3}, {"method": "average_of_batches"}):
        with pytest.raises(KeyboardInterrupt), bnfast.recalibrating(layers, **options):
            call(layers[0], shifted(rng, np.float32)[0])
            raise KeyboardInterrupt
        np.testing.assert_equal([layer.state_dict() for layer in layers], before)
        for layer, attributes in zip(layers, kept, strict=True):
            found = {**vars(layer), "_saved": attributes["_saved"]}
            assert all(found[name] is value for name, value in attributes.items())


def test_layers_that_saw_no_data_are_named_and_nothing_changes(kind, rng):
    layers = {name: trained(kind, rng) for name in ("stem", "head")}
    before = {name: layer.state_dict() for name, layer in layers.items()}
    with pytest.raises(RuntimeError, match="no data went through layer head:"):
        with bnfast.recalibrating(layers):
            call(layers["stem"], shifted(rng, np.float32)[0])
            call(layers["head"], np.empty((0, CHANNELS, 4), np.float32))
    np.testing.assert_equal({name: a.state_dict() for name, a in layers.items()}, before)


def test_a_layer_cannot_be_recalibrated_twice_at_once(rng):
    layer = trained("batch", rng)
    with bnfast.recalibrating(layer):
        for watch in (bnfast.recalibrating, bnfast.monitoring):
            # Without the settings that it has for the time being.
            with pytest.raises(RuntimeError, match=r"recalibrated or monitored: a BatchNorm$"):
                with watch(layer):
                    pass
        feed(layer, shifted(rng, np.float32))
    with bnfast.recalibrating([layer, layer]):  # each once
        feed(layer, shifted(rng, np.float32))
    assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("choice", ["propagate", "skip", "raise"])
def test_batches_that_are_not_finite_are_the_layers_choice(kind, rng, choice):
    layer, data = trained(kind, rng, nonfinite=choice, dtype=np.float64), shifted(rng)
    before, bad = running(layer), data[0].copy()
    bad[0, 0] = np.nan
    if choice == "raise":
        with pytest.raises(ValueError, match="finite statistics"), bnfast.recalibrating(layer):
            feed(layer, [*data, bad])
        np.testing.assert_equal(running(layer), before)
        return
    if choice == "skip":
        with bnfast.recalibrating(layer):
            feed(layer, [*data, bad])
        assert_near(running(layer), expected_of(kind, layer, data))
        return
    with pytest.warns(RuntimeWarning, match="not all finite from now on; nonfinite='skip'") as told:
        with bnfast.recalibrating({"stem": layer}):
            feed(layer, [*data, bad])
    assert "of layer stem are" in str(told[0].message) and told[0].filename == __file__
    first = getattr(layer, running_names(kind)[0])
    assert np.isnan(first[0]) and np.isfinite(first[1:]).all()


@pytest.mark.parametrize("method", ["pooled", "average_of_batches"])
def test_ghosts_that_are_not_finite_are_left_out_alone(rng, method):
    skipping, plain = (bnfast.GhostBatchNorm(CHANNELS, 3, dtype=np.float64) for _ in range(2))
    skipping.nonfinite = "skip"
    x = rng.normal(size=(12, CHANNELS, 4))
    bad = x.copy()
    bad[4, 2, 0] = np.inf
    with bnfast.recalibrating([skipping, plain], method=method):
        skipping(bad)
        plain(np.delete(x, slice(3, 6), 0))
    np.testing.assert_equal(skipping.state_dict(), plain.state_dict())
    assert skipping.num_batches_tracked == 3


def test_a_layer_that_skips_all_its_batches_is_told_from_one_without_data(kind, rng):
    layer = trained(kind, rng, nonfinite="skip")
    before = layer.state_dict()
    with pytest.raises(RuntimeError, match="or only batches that nonfinite='skip' leaves out: all"):
        with bnfast.recalibrating(layer):
            call(layer, np.full((3, CHANNELS, 4), np.nan, np.float32))
    np.testing.assert_equal(layer.state_dict(), before)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (read_only, ValueError, "of layer head is updated in place and must be writable, got a"),
        (lambda array: array[..., :-1], ValueError, "of layer head must have"),
        (list, TypeError, "of layer head is updated in place and must be a numpy array"),
    ],
)
def test_statistics_that_cannot_be_written_are_refused_at_once(kind, rng, change, error, message):
    layers = {name: trained(kind, rng) for name in ("stem", "head")}
    last = running_names(kind)[-1]
    setattr(layers["head"], last, change(getattr(layers["head"], last)))
    with pytest.raises(error, match=f"{last} {message}"):
        with bnfast.recalibrating(layers):
            pytest.fail("data would have gone through")
    with bnfast.recalibrating(layers["stem"]):  # is not being recalibrated still
        feed(layers["stem"], shifted(rng, np.float32))


def test_a_pooled_variance_too_large_for_float32_is_warned_about(rng):
    layer = bnfast.BatchNorm(3)
    with pytest.warns(RuntimeWarning, match="running_var is infinite from now on") as caught:
        with bnfast.recalibrating(layer):
            layer((1e25 * rng.normal(size=(16, 3))).astype(np.float32))
    assert {warning.filename for warning in caught} == {__file__}


def test_all_layers_have_their_statistics_where_a_warning_is_an_error(rng):
    layers, x = [bnfast.BatchNorm(3) for _ in range(2)], rng.normal(3, 1, (16, 3))
    with pytest.raises(RuntimeWarning, match="running_var is infinite"):
        with bnfast.recalibrating(layers):
            layers[0]((1e25 * x).astype(np.float32))
            layers[1](x.astype(np.float32))
    assert np.isinf(layers[0].running_var).all()
    np.testing.assert_allclose(layers[1].running_mean, x.mean(0), rtol=ROUNDED_F32)
    assert [layer.num_batches_tracked for layer in layers] == [1, 1]


@pytest.mark.parametrize("kind", ["batch", "cross iteration"])
def test_one_value_per_channel_has_no_unbiased_variance(kind):
    layer = LAYERS[kind](3)
    before = layer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="BatchNorm must see more than one value"):
            with bnfast.recalibrating(layer):
                layer(np.ones((1, 3), np.float32))
        np.testing.assert_equal(layer.state_dict(), before)
        with bnfast.recalibrating(layer):
            for value in (1, 3):
                layer(np.full((1, 3), value, np.float32))
    np.testing.assert_array_equal(layer.running_var, 2)


@pytest.mark.parametrize("watch", ["recalibrating", "monitoring"])
@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (3, TypeError, "layers must be a layer with running statistics, or several, got 3"),
        ([], ValueError, "layers must be at least one"),
        (bnfast.LayerNorm(3), TypeError, "layers must be a layer with running statistics"),
        (
            {"a": bnfast.BatchNorm(3), "b": bnfast.LayerNorm(3)},
            *(TypeError, "layer b is LayerNorm"),
        ),
        (
            [bnfast.BatchNorm(3, track_running_stats=False)],
            *(ValueError, r"layer 0 has none: BatchNorm\(3"),
        ),
    ],
)
def test_what_has_no_running_statistics_is_refused(watch, layers, error, message):
    with pytest.raises(error, match=message):
        with getattr(bnfast, watch)(layers):
            pass


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "mean"}, ValueError, "method must be 'pooled' or 'average_of_batches'"),
        ({"prior": "x"}, TypeError, "prior must be a real number"),
        ({"prior": -1}, ValueError, "prior must not be negative"),
        ({"prior": np.nan}, ValueError, "prior must be finite"),
        (
            {"prior": 1, "method": "average_of_batches"},
            *(ValueError, "prior needs method='pooled', got method='average_of_batches'"),
        ),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        bnfast.recalibrating(bnfast.BatchNorm(3), **options)


def test_copies_made_inside_are_ordinary_layers(kind, rng):
    layer = trained(kind, rng)
    with bnfast.recalibrating(layer):
        copied = copy.deepcopy(layer)
        call(layer, shifted(rng, np.float32)[0])
    found = layer.state_dict()
    call(copied, shifted(rng, np.float32)[1])
    np.testing.assert_equal(layer.state_dict(), found)


def averaging_layers(rng, dtype=np.float64):
    """Layers whose training takes batches together, which they have seen."""
    filters = rng.normal(size=(CHANNELS, 2))
    moving = bnfast.MovingAverageBatchNorm(CHANNELS, 3, warm_up=0, renormalized_from=0, dtype=dtype)
    cross = bnfast.CrossIterationBatchNorm((CHANNELS, 2), 3, dtype=dtype)
    for inputs in rng.normal(size=(5, 6, 2)):
        x = (inputs @ filters.T).astype(dtype)
        moving(x)
        moving.backward(x)
        cross(x, inputs, filters)
        cross.backward(x)
    return moving, cross


@pytest.mark.parametrize("options", [{}, {"method": "average_of_batches"}, {"prior": 3}], ids=str)
def test_recalibration_leaves_buffers_and_windows_alone(dtype, rng, options):
    moving, cross = averaging_layers(rng, dtype)
    others = {name: a for name, a in moving.state_dict().items() if name != "running_var"}
    others |= {name: a for name, a in cross.state_dict().items() if name.startswith("window")}
    data = shifted(rng, dtype)
    with bnfast.recalibrating([moving, cross], **options):
        for x in data:
            y = moving(x)
            if "prior" not in options:
                alone = bnfast.MovingAverageBatchNorm(CHANNELS, dtype=dtype)
                np.testing.assert_array_equal(y, alone(x))
                np.testing.assert_array_equal(moving.backward(x), alone.backward(x))
                np.testing.assert_array_equal(cross(x), bnfast.batch_norm_forward(x)[0])
                assert cross.backward(x).shape == x.shape
            else:
                cross(x)
        moving(x)
    moving.backward(x)  # of a call inside
    found = moving.state_dict() | cross.state_dict()
    np.testing.assert_equal({name: found[name] for name in others}, others)
    assert cross.num_batches_tracked == moving.num_batches_tracked == 5


def test_recalibration_pools_channels_of_any_axis(axis, rng):
    layer = bnfast.BatchNorm(3, axis=axis, dtype=np.float64)
    x = rng.normal(2, 3, (6, 3, 4))
    with bnfast.recalibrating(layer):
        layer(in_layout(x[:2], axis))
        layer(in_layout(x[2:], axis))
    expected = {"running_mean": x.mean((0, 2)), "running_var": x.var((0, 2), ddof=1)}
    assert_near(running(layer), expected, CLOSE_F64)
