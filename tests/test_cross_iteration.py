"""Cross-iteration batch norm: derivatives by weights, compensation, gradients; the layer."""

import numpy as np
import pytest

import bnfast
from bnfast import CrossIterationBatchNorm, IterationStatistics, _filter_derivatives
from bnfast import _reference_cross_batch as reference
from bnfast.functional import CrossIterated
from cases import in_layout, misaligned
from oracle import WIDE, central_differences
from tolerances import CLOSE_F64, FINITE_DIFFERENCES, OUTPUT, eps_of

# Shape of the inputs, NCHW or alike; shape of the filters; the rest of the layer before.
LAYERS = {
    "linear": ((7, 4), (6, 4), {}),
    "linear, grouped": ((7, 4), (6, 2), {"groups": 2}),
    "linear at every position": ((3, 4, 5, 2), (6, 4), {}),
    "1x1": ((3, 4, 5, 2), (6, 4, 1, 1), {}),
    "3x3": ((3, 4, 6, 5), (6, 4, 3, 3), {"padding": 1}),
    "strided": ((3, 4, 7, 8), (6, 4, 3, 2), {"stride": 2, "padding": 1}),
    "dilated": ((2, 4, 9, 8), (6, 4, 3, 3), {"dilation": 2, "padding": 3}),
    "depthwise": ((3, 6, 5, 5), (6, 1, 3, 3), {"groups": 6, "padding": 1}),
    "grouped": ((3, 4, 6, 5), (6, 2, 3, 3), {"groups": 2, "stride": 2}),
    "wide padding": ((2, 3, 3, 2), (6, 3, 2, 2), {"padding": 4, "stride": 3}),
    "signal": ((3, 4, 11), (6, 4, 5), {"padding": 2}),
    "volume": ((2, 3, 4, 4, 3), (6, 3, 2, 2, 2), {"stride": 2, "padding": 1}),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]


def made(inputs, filters, geometry, precision=np.float64):
    """What the layer makes, NCHW."""
    kernel = filters.shape[2:] or (1,) * (inputs.ndim - 2)
    return reference.convolution(
        inputs, filters.reshape(*filters.shape[:2], *kernel), precision=precision, **geometry
    )


def entries(rng, layer, count=3, mean=0.0):
    """Iterations: inputs, x (NCHW, float64) and filters that move a little, the latest last."""
    shape, filter_shape, geometry = layer
    filters = rng.normal(size=filter_shape)
    for _ in range(count):
        inputs = rng.normal(mean, 1, shape)
        yield inputs, made(inputs, filters, geometry), filters.copy()
        filters += rng.normal(0, 0.05, filter_shape)


def window_of(rng, layer, axis=1, count=3, mean=0.0):
    """The last iteration's x and filters, and the statistics of those before, the latest first."""
    *before, (_, x, filters) = entries(rng, layer, count, mean)
    window = [
        IterationStatistics.of(
            *(in_layout(old_x, axis), in_layout(inputs, axis), old), axis=axis, **layer[2]
        )
        for inputs, old_x, old in reversed(before)
    ]
    return in_layout(x, axis), filters, window


def as_in_the_paper(entry):
    """(filters, mu, nu, dmu, dnu), whose mean square stands for the variance."""
    inner = (slice(None),) + (None,) * (entry.filters.ndim - 1)
    mean = entry.mean.astype(WIDE)
    return (
        *(entry.filters, mean, entry.var + mean**2, entry.dmean),
        entry.dvar + 2 * mean[inner] * entry.dmean,
    )


def test_derivatives_of_statistics_are_the_papers(layer, dtype, rng, axis):
    shape, filter_shape, geometry = layer
    inputs, filters = rng.normal(1, 1, shape).astype(dtype), rng.normal(size=filter_shape)
    x = made(inputs, filters, geometry).astype(dtype)
    got = IterationStatistics.of(
        *(in_layout(x, axis), in_layout(inputs, axis), filters), axis=axis, **geometry
    )
    kernel = filter_shape[2:] or (1,) * (len(shape) - 2)
    expanded = filters.reshape(*filter_shape[:2], *kernel)
    dmu, dnu = reference.filter_derivatives(inputs, expanded, precision=WIDE, **geometry)
    mean = x.astype(WIDE).mean((0, *range(2, x.ndim)))
    dvar = dnu - 2 * mean[(slice(None),) + (None,) * (dmu.ndim - 1)] * dmu
    tolerance = 20 * eps_of(dtype)
    np.testing.assert_allclose(got.dmean, dmu.reshape(filter_shape).astype(float), atol=tolerance)
    np.testing.assert_allclose(got.dvar, dvar.reshape(filter_shape).astype(float), atol=tolerance)
    np.testing.assert_allclose(got.mean, mean.astype(float), atol=tolerance)
    np.testing.assert_array_equal(got.filters, filters)
    assert got.filters is not filters


def test_derivatives_of_statistics_by_central_differences(layer, rng):
    shape, filter_shape, geometry = layer
    inputs, filters = rng.normal(1, 1, shape), rng.normal(size=filter_shape)
    found = IterationStatistics.of(made(inputs, filters, geometry), inputs, filters, **geometry)
    others = (0, *range(2, inputs.ndim))
    # Channels depend on their own filter alone, so that a sum over them is as good as each.
    for derivative, statistic in ((found.dmean, np.mean), (found.dvar, np.var)):
        numeric = central_differences(
            lambda of=statistic: of(made(inputs, filters, geometry), others).sum(), filters
        )
        np.testing.assert_allclose(derivative, numeric, rtol=0, atol=FINITE_DIFFERENCES)


@pytest.mark.parametrize("piece", [1, 300, 2000])
def test_pieces_make_the_derivatives_of_the_whole(layer, rng, axis, monkeypatch, piece):
    shape, filter_shape, geometry = layer
    inputs, filters = rng.normal(1, 1, shape), rng.normal(size=filter_shape)
    x, sources = (in_layout(a, axis) for a in (made(inputs, filters, geometry), inputs))
    found = []
    for size in (piece, 1 << 30):
        monkeypatch.setattr(_filter_derivatives, "PIECE_BYTES", size)
        monkeypatch.setattr(_filter_derivatives, "POSITIONS_OF_A_CHANNEL", 0)
        found.append(IterationStatistics.of(x, sources, filters, axis=axis, **geometry))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=CLOSE_F64)


def test_means_are_moved_exactly_and_mean_squares_to_the_first_degree(layer, rng):
    """With inputs that stay the same: x is linear in the filters, and x**2 is not."""
    shape, filter_shape, geometry = layer
    inputs, filters = rng.normal(1, 1, shape), rng.normal(size=filter_shape)
    step = rng.normal(0, 0.1, filter_shape)
    before, after, moved = (made(inputs, w, geometry) for w in (filters, filters + step, step))
    entry = IterationStatistics.of(before, inputs, filters, **geometry)
    _, saved = bnfast.cross_iteration_batch_norm_forward(after, filters + step, [entry])
    others = (0, *range(2, after.ndim))
    np.testing.assert_allclose(saved.mean, after.mean(others), rtol=1e-12, atol=CLOSE_F64)
    square = (after**2).mean(others) - (moved**2).mean(others)
    compensated = np.maximum(square - after.mean(others) ** 2, 0)
    expected = (after.var(others) + compensated) / 2
    np.testing.assert_allclose(saved.invstd, 1 / np.sqrt(expected + 1e-5), rtol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_forward_and_backward_are_the_papers(isa, layer, dtype, rng, axis, count):
    x, filters, window = window_of(rng, layer, axis, count)
    x, dy = x.astype(dtype), rng.normal(size=x.shape).astype(dtype)
    weight, bias = rng.normal(size=(2, 6)).astype(dtype)
    y, mean, invstd = reference.cross_iteration_batch_norm_forward(
        *(x, filters, [as_in_the_paper(entry) for entry in window], weight, bias, 1e-3),
        axis=axis,
        precision=WIDE,
    )
    gradients = reference.cross_iteration_batch_norm_backward(
        dy, x, mean, invstd, count, weight, axis=axis, precision=WIDE
    )
    got, saved = bnfast.cross_iteration_batch_norm_forward(
        x, filters, window, weight, bias, 1e-3, axis=axis
    )
    found = bnfast.cross_iteration_batch_norm_backward(dy, x, saved, weight, axis=axis)
    assert saved.iterations == count
    for array, expected in zip(
        (got, saved.mean, saved.invstd, *found), (y, mean, invstd, *gradients), strict=True
    ):
        size = np.abs(expected).max() + 1
        np.testing.assert_allclose(
            array, expected.astype(float), rtol=0, atol=float(64 * OUTPUT * eps_of(dtype) * size)
        )
    assert got.dtype == found[0].dtype == found[1].dtype == dtype


def test_a_window_of_nothing_is_batch_norm_to_the_bit(dtype, rng, axis):
    x, dy = (in_layout(a, axis).astype(dtype) for a in rng.normal(3, 2, (2, 6, 3, 5, 4)))
    weight, bias = rng.normal(size=(2, 3)).astype(dtype)
    expected = bnfast.batch_norm_forward(x, weight, bias, axis=axis)
    y, saved = bnfast.cross_iteration_batch_norm_forward(x, weight=weight, bias=bias, axis=axis)
    gradients = bnfast.batch_norm_backward(dy, x, *expected[1:], weight, axis=axis)
    found = bnfast.cross_iteration_batch_norm_backward(dy, x, saved, weight, axis=axis)
    for a, b in zip((y, *saved[:2], *found), (*expected, *gradients), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradients_with_the_window_frozen(layer, rng, axis):
    """The compensated statistics of earlier iterations are constants; those of x are not."""
    x, filters, window = window_of(rng, layer, axis)
    weight, bias = rng.normal(size=(2, 6))
    dy = rng.normal(0, 0.1, x.shape)
    as_papers = [as_in_the_paper(entry) for entry in window]
    as_papers = [tuple(np.asarray(array, np.float64) for array in entry) for entry in as_papers]
    _, saved = bnfast.cross_iteration_batch_norm_forward(
        x, filters, window, weight, bias, axis=axis
    )
    gradients = bnfast.cross_iteration_batch_norm_backward(dy, x, saved, weight, axis=axis)

    def loss():
        y, *_ = reference.cross_iteration_batch_norm_forward(
            x, filters, as_papers, weight, bias, axis=axis
        )
        return (y * dy).sum()

    for array, gradient in zip((x, weight, bias), gradients, strict=True):
        numeric = central_differences(loss, array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


def test_a_variance_that_compensation_makes_negative_is_0(rng):
    x = rng.normal(size=(5, 3))
    given = np.ones((3, 1)), np.zeros(3), np.full(3, 0.1), np.zeros((3, 1))
    window = [IterationStatistics(*given, np.full((3, 1), -1.0))]
    _, saved = bnfast.cross_iteration_batch_norm_forward(x, np.full((3, 1), 2.0), window)
    centre = x.mean(0) / 2
    var = (x.var(0) + 0) / 2 + ((x.mean(0) - centre) ** 2 + centre**2) / 2
    np.testing.assert_allclose(saved.invstd, 1 / np.sqrt(var + 1e-5), rtol=1e-12)


@pytest.mark.parametrize("ratio", [1e3, 1e6])
def test_a_large_mean_leaves_the_variance_as_it_is(rng, axis, ratio):
    """Which the difference of mean squares would not."""
    inputs = np.concatenate([rng.normal(size=(64, 3)), np.ones((64, 1))], 1)
    filters = np.concatenate([rng.normal(size=(5, 3)), np.full((5, 1), ratio)], 1)
    step = 1e-6 * rng.normal(size=(5, 4))
    entry = IterationStatistics.of(inputs @ filters.T, inputs, filters)
    x = (inputs @ (filters + step).T).astype(np.float64)
    y, saved = bnfast.cross_iteration_batch_norm_forward(x, filters + step, [entry])
    expected, _, invstd = bnfast.batch_norm_forward(x)
    np.testing.assert_allclose(saved.invstd, invstd, rtol=1e-8)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_channel(dtype, rng, axis, bad):
    layer = LAYERS["3x3"]
    inputs = in_layout(rng.normal(size=layer[0]), axis)
    x, filters, window = window_of(rng, layer, axis)
    x, results = x.astype(dtype), []
    for value in (x.flat[0], bad):
        x.flat[0] = value  # of channel 0
        entry = IterationStatistics.of(x, inputs, filters, axis=axis, **layer[2])
        y, saved = bnfast.cross_iteration_batch_norm_forward(
            x, filters, [entry, *window], axis=axis
        )
        gradients = bnfast.cross_iteration_batch_norm_backward(x, x, saved, axis=axis)
        moved = [np.moveaxis(array, axis, 0) for array in (y, gradients[0])]
        results.append([*moved, *gradients[1:], *entry, saved.mean, saved.invstd])
    for good, other in zip(*results, strict=True):
        np.testing.assert_array_equal(good[1:], other[1:])


def test_awkward_memory_makes_the_same(dtype, rng, axis):
    layer = LAYERS["strided"]
    x, filters, window = window_of(rng, layer, axis)
    x, filters = x.astype(dtype), filters.astype(dtype)
    inputs = in_layout(rng.normal(size=layer[0]).astype(dtype), axis)
    dy, results = rng.normal(size=x.shape).astype(dtype), []
    for change in (lambda a: a, misaligned, lambda a: np.repeat(a, 2, -1)[..., ::2]):
        given = [change(a) for a in (x, dy, filters, inputs)]
        old = [IterationStatistics(*[change(a) for a in entry]) for entry in window]
        out, dx_out = (np.full_like(a, 7) for a in given[:2])
        entry = IterationStatistics.of(given[0], given[3], given[2], axis=axis, **layer[2])
        y, saved = bnfast.cross_iteration_batch_norm_forward(
            given[0], given[2], [entry, *old], axis=axis, out=out
        )
        found = bnfast.cross_iteration_batch_norm_backward(
            given[1], given[0], saved, axis=axis, out=dx_out
        )
        assert y is out and found[0] is dx_out
        results.append([y, *found, *entry])
    for plain, misplaced, strided in zip(*results, strict=True):
        for other in (misplaced, strided):
            np.testing.assert_allclose(other, plain, rtol=0, atol=64 * eps_of(dtype))


@pytest.mark.parametrize("shape", [(6, 40, 30, 31), (3000, 40)], ids=str)
def test_bits_depend_on_neither_threads_nor_instruction_set(
    dtype, rng, use_isa, use_threads, axis, shape
):
    x, dy = (in_layout(a, axis) for a in rng.normal(300, 2, (2, *shape)).astype(dtype))
    filters, weight = rng.normal(size=(40, 3)), rng.normal(size=40).astype(dtype)
    given = [rng.normal(300, 1, 40), rng.uniform(2, 6, 40), *rng.normal(size=(2, 40, 3))]
    window, expected = [IterationStatistics(filters - 0.01, *given)] * 3, None
    for isa in bnfast.available_isas():
        use_isa(isa)
        for num_threads in (1, 2, 5):
            use_threads(num_threads)
            y, saved = bnfast.cross_iteration_batch_norm_forward(
                x, filters, window, weight, axis=axis
            )
            gradients = bnfast.cross_iteration_batch_norm_backward(dy, x, saved, weight, axis=axis)
            got = [y, *gradients, *saved]
            expected = expected or got
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a, b)


def test_running_statistics_are_those_of_batches(dtype, rng, axis):
    x, filters, window = window_of(rng, LAYERS["3x3"], axis)
    x = x.astype(dtype)
    for unbiased in (True, False):
        got, expected = ([np.zeros(6, dtype), np.ones(6, dtype)] for _ in range(2))
        y = bnfast.cross_iteration_batch_norm(
            x, *got, filters, window, None, None, True, 0.3, axis=axis, unbiased=unbiased
        )
        again, _ = bnfast.cross_iteration_batch_norm_forward(x, filters, window, axis=axis)
        bnfast.batch_norm(x, *expected, None, None, True, 0.3, axis=axis, unbiased=unbiased)
        np.testing.assert_array_equal(y, again)
        np.testing.assert_allclose(got, expected, rtol=2 * eps_of(dtype))
    evaluated = bnfast.cross_iteration_batch_norm(x, *got, filters, window, axis=axis)
    np.testing.assert_array_equal(evaluated, bnfast.batch_norm(x, *got, axis=axis))


def test_an_empty_batch_changes_nothing(dtype):
    x, filters, running = np.empty((0, 3, 5), dtype), np.ones((3, 2)), np.ones((2, 3))
    entry = IterationStatistics.of(x, np.empty((0, 2, 5)), filters)
    assert not any(np.any(array) for array in entry[1:])
    y = bnfast.cross_iteration_batch_norm(x, *running, filters, [entry], training=True)
    _, saved = bnfast.cross_iteration_batch_norm_forward(x, filters, [entry])
    dx, dweight, dbias = bnfast.cross_iteration_batch_norm_backward(x, x, saved)
    assert y.shape == dx.shape == x.shape
    for array, value in ((running, 1), (dweight, 0), (dbias, 0)):
        np.testing.assert_array_equal(array, value)


def test_filters_without_weights_have_no_derivatives():
    x = np.arange(12.0).reshape(4, 3)
    found = IterationStatistics.of(x, np.empty((4, 0)), np.empty((3, 0)))
    np.testing.assert_array_equal(found.mean, x.mean(0))
    assert found.dmean.shape == found.dvar.shape == (3, 0)


X = np.arange(12, dtype=np.float32).reshape(4, 3)
FILTERS = np.ones((3, 2))
ENTRY = IterationStatistics(FILTERS, np.ones(3), np.ones(3), FILTERS, FILTERS)
SAVED = CrossIterated(np.ones(3), np.ones(3), 2, np.ones(3), np.ones(3))
IMAGES = np.ones((2, 3, 4, 5))


def forward(**changed):
    return bnfast.cross_iteration_batch_norm_forward(
        **{"x": X, "filters": FILTERS, "window": [ENTRY], **changed}
    )


def statistics_of(**changed):
    given = {"x": IMAGES, "inputs": IMAGES[:, :2], "filters": np.ones((3, 2, 3, 3)), "padding": 1}
    return IterationStatistics.of(**{**given, **changed})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: forward(window=None), TypeError, "window must be a sequence of IterationStat"),
        (lambda: forward(window=ENTRY), TypeError, "window must be a sequence of IterationStat"),
        (lambda: forward(window=[(1, 2)]), TypeError, r"window\[0\] must be an instance of Iter"),
        (
            lambda: forward(filters=None),
            TypeError,
            "filters must be a float16, bfloat16, float32 or float64 array",
        ),
        (lambda: forward(filters=np.ones((2, 2))), ValueError, "one filter for each of the 3"),
        (
            lambda: forward(filters=np.ones((3, 4))),
            *(ValueError, r"window\[0\].filters must have the shape \(3, 4\)"),
        ),
        (
            lambda: forward(window=[ENTRY, ENTRY._replace(var=np.ones(2))]),
            *(ValueError, r"window\[1\].var must have one value for each of the 3 channels"),
        ),
        (
            lambda: forward(window=[ENTRY._replace(dvar=np.ones(3))]),
            *(ValueError, r"window\[0\].dvar must have the shape \(3, 2\)"),
        ),
        (lambda: forward(eps=0.0), ValueError, "eps must be positive in training"),
        (
            lambda: bnfast.cross_iteration_batch_norm(X, None, None),
            *(TypeError, "running_mean must be an array"),
        ),
        (
            lambda: bnfast.cross_iteration_batch_norm(
                X[:1], np.zeros(3), np.ones(3), training=True
            ),
            *(ValueError, "x must have more than one value per channel for an unbiased variance"),
        ),
        (
            lambda: bnfast.cross_iteration_batch_norm_backward(X, X, (1, 2)),
            *(TypeError, "saved must be what cross_iteration_batch_norm_forward returned"),
        ),
        (
            lambda: bnfast.cross_iteration_batch_norm_backward(
                X, X, SAVED._replace(mean=np.ones(2))
            ),
            *(ValueError, "mean must have one value for each of the 3 channels"),
        ),
        (
            lambda: bnfast.cross_iteration_batch_norm_backward(X, X, SAVED._replace(iterations=0)),
            *(ValueError, "iterations must be at least 1"),
        ),
        (lambda: statistics_of(axis=0), ValueError, "axis must not be 0"),
        (lambda: statistics_of(filters=np.ones((3, 2, 3))), ValueError, "filters must have 2 dim"),
        (lambda: statistics_of(filters=np.ones((4, 2))), ValueError, "each of the 3 channels of x"),
        (lambda: statistics_of(groups=2), ValueError, "groups must divide the 3 filters"),
        (lambda: statistics_of(groups=3), ValueError, "inputs must have 4 dimensions, and 6 chan"),
        (lambda: statistics_of(inputs=X), ValueError, "inputs must have 4 dimensions, and 2 chan"),
        (lambda: statistics_of(padding=0), ValueError, "inputs must be what x, of shape"),
        (lambda: statistics_of(stride=0), ValueError, "stride must be at least 1"),
        (lambda: statistics_of(dilation=1.0), TypeError, "dilation must be an integer"),
        (lambda: statistics_of(padding=(1, 1, 1)), ValueError, "padding must be one integer, or 2"),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "bad", [{"bias": np.ones(2)}, {"out": X[:2]}, {"filters": X}, {"window": [1]}]
)
def test_a_refused_call_writes_nothing(bad):
    running, out = np.ones((2, 3)), np.full_like(X, 7)
    given = {"filters": FILTERS, "window": [ENTRY], "out": out, "training": True, **bad}
    with pytest.raises((TypeError, ValueError)):
        bnfast.cross_iteration_batch_norm(X, *running, **given)
    np.testing.assert_array_equal(running, 1)
    np.testing.assert_array_equal(out, 7)
    with pytest.raises(ValueError, match="out must not share memory with filters"):
        memory = np.ones((3, 3))
        forward(x=np.ones((3, 3)), filters=memory, window=[], out=memory)


@pytest.mark.parametrize("name", ["linear", "strided", "grouped"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_layer_keeps_the_window(rng, axis, name, k):
    _, filter_shape, geometry = LAYERS[name]
    burn_in, window = 2, []

    def new():
        return CrossIterationBatchNorm(
            filter_shape, k, 1e-3, 0.3, burn_in=burn_in, axis=axis, dtype=np.float64, **geometry
        )

    layer, mean, var = new(), np.zeros(6), np.ones(6)
    layer.weight[...], layer.bias[...] = rng.normal(size=(2, 6))
    for step, (inputs, x, filters) in enumerate(entries(rng, LAYERS[name], 9)):
        inputs, x = in_layout(inputs, axis), in_layout(x, axis)
        y, saved = bnfast.cross_iteration_batch_norm_forward(
            x, filters, window, layer.weight, layer.bias, 1e-3, axis=axis
        )
        bnfast.batch_norm(x, mean, var, training=True, momentum=0.3, axis=axis)
        dx, *_ = bnfast.cross_iteration_batch_norm_backward(y, x, saved, layer.weight, axis=axis)
        if step >= burn_in:
            found = IterationStatistics.of(x, inputs, filters, axis=axis, **geometry)
            window = [found, *window][: k - 1]
        other = new()
        other.load_state_dict(layer.state_dict())
        for one in (other, layer):
            np.testing.assert_array_equal(one(x, inputs, filters), y)
            np.testing.assert_array_equal(one.backward(y), dx)
            np.testing.assert_allclose(one.running_mean, mean, rtol=1e-12, atol=CLOSE_F64)
            np.testing.assert_allclose(one.running_var, var, rtol=1e-12)
            assert one.num_batches_tracked == step + 1
        assert saved.iterations == min(max(step - burn_in, 0), k - 1) + 1
    expected = bnfast.batch_norm(
        *(x, layer.running_mean, layer.running_var, layer.weight, layer.bias),
        eps=1e-3,
        axis=axis,
    )
    np.testing.assert_array_equal(layer.eval()(x), expected)
    layer.train().reset_running_stats()
    plain, *_ = bnfast.batch_norm_forward(x, layer.weight, layer.bias, 1e-3, axis=axis)
    np.testing.assert_array_equal(layer(x, inputs, filters), plain)


def test_the_window_makes_small_batches_like_large_ones(rng):
    """What the normalization is for: batches of two, and weights that move."""
    filters = rng.normal(size=(3, 5))
    layer = CrossIterationBatchNorm(filters.shape, 8, dtype=np.float64)
    large = rng.normal(size=(4096, 5))
    errors = []
    for _ in range(200):
        inputs = rng.normal(size=(4, 5))
        x = inputs @ filters.T
        y, true = layer(x, inputs, filters), (x / (large @ filters.T).std(0))
        own, *_ = bnfast.batch_norm_forward(x)
        errors.append([np.abs(y - true).mean(), np.abs(own - true).mean()])
        filters += rng.normal(0, 0.01, filters.shape)
    ours, of_batches = np.mean(errors[20:], 0)
    assert ours < of_batches / 2


def test_a_refused_batch_leaves_the_layer_as_it_was(rng):
    layer = CrossIterationBatchNorm((6, 4), 3)
    inputs, filters = rng.normal(size=(7, 4)), rng.normal(size=(6, 4))
    x = inputs @ filters.T
    layer(x, inputs, filters)
    before = layer.state_dict()
    for given, message in (
        ((x,), "filters must be a float16, bfloat16, float32 or float64 array"),
        ((x, None, filters), "inputs must be a float16, bfloat16, float32 or float64 array"),
        ((x, inputs[:5], filters), "inputs must be what x"),
        ((x, inputs, filters[:5]), r"filters must have the shape \(6, 4\)"),
        ((x[:, :5], inputs, filters), "x must have 6 channels"),
        ((x[:1], inputs[:1], filters), "x must have more than one value"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            layer(*given)
    with pytest.raises(ValueError, match="out must have the shape"):
        layer(x, inputs, filters, out=x[:2])
    np.testing.assert_equal(layer.state_dict(), before)
    assert layer.backward(x).shape == x.shape


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"filter_shape": (3,)}, ValueError, "filter_shape must have at least 2 sizes"),
        ({"filter_shape": 3.0}, TypeError, "filter_shape must be an integer"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"burn_in": -1}, ValueError, "burn_in must be at least 0"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"groups": 0}, ValueError, "groups must be at least 1"),
        ({"unbiased": 1}, TypeError, "unbiased must be True or False"),
    ],
)
def test_a_layer_of_bad_arguments_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        CrossIterationBatchNorm(**{"filter_shape": (6, 4), **arguments})
