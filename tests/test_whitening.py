"""Whitening: decorrelated and iterative batch normalization, as functions and as layers."""

import copy
import pickle
import tracemalloc

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from bnfast import _whitening
from cases import BUFFERS, in_layout
from oracle import assert_within, central_differences
from states import filled
from tolerances import (
    FINITE_DIFFERENCES,
    ILL_CONDITIONED,
    INPUT_GRADIENT,
    OUTPUT,
    ROUNDED_STATISTICS,
    RUNNING,
    WHITENED,
    WHITENING,
    eps_of,
)

FUNCTIONS = {
    "decorrelated": (
        bnfast.decorrelated_batch_norm,
        bnfast.decorrelated_batch_norm_forward,
        bnfast.decorrelated_batch_norm_backward,
        bnfast.Whitened,
    ),
    "iterative": (
        bnfast.iterative_norm,
        bnfast.iterative_norm_forward,
        bnfast.iterative_norm_backward,
        bnfast.IterativelyWhitened,
    ),
}
ITERATIONS = {"decorrelated": None, "iterative": 5}
LAYERS = {"decorrelated": bnfast.DecorrelatedBatchNorm, "iterative": bnfast.IterNorm}

# Shapes with the channels along axis 1, and how many groups they have.
CASES = [
    ((6, 4, 3, 5), 1),
    ((6, 4, 3, 5), 2),
    ((6, 4, 3, 5), 4),
    ((3, 6, 2, 3, 2), 2),
    ((50, 6), 3),
    ((40, 32), 2),  # columns are neighbours
    ((2, 3), 1),  # fewer values than channels
    ((1, 4, 7), 2),
    ((9, 1, 4), 1),
    ((1000, 4, 2), 1),
]


@pytest.fixture(params=FUNCTIONS)
def kind(request):
    return request.param


@pytest.fixture
def few_columns(monkeypatch):
    """Pieces of a few columns, so that small batches are cut, too."""
    monkeypatch.setattr(_whitening, "PIECE_BYTES", 8 * 4 * 7)
    monkeypatch.setattr(_whitening, "COLUMNS_OF_A_ROW", 1)


def inputs(rng, shape, axis, dtype, mean=3.0):
    """Correlated channels, an upstream gradient, weight and bias."""
    channels = shape[1]
    mixed = np.tensordot(rng.normal(size=(channels, channels)), rng.normal(size=shape), (1, 1))
    x = in_layout((np.moveaxis(mixed, 0, 1) + mean).astype(dtype), axis)
    dy = in_layout(rng.normal(size=shape).astype(dtype), axis)
    weight, bias = rng.normal(size=(2, channels)).astype(dtype)
    return x, dy, weight, bias


def close(actual, expected, dtype=np.float64):
    """As exact as the data's type and the arithmetic in float64 are, relative to the largest."""
    rounding = WHITENED * eps_of(dtype) if dtype == np.float32 else 0.0
    assert_within(actual, expected, (WHITENING + rounding) * (np.abs(expected).max(initial=0) + 1))


@pytest.mark.parametrize(("shape", "groups"), CASES, ids=str)
def test_values_are_those_of_the_definition(kind, dtype, rng, axis, shape, groups):
    _, forward, _, statistics = FUNCTIONS[kind]
    x, _, weight, bias = inputs(rng, shape, axis, dtype)
    y, saved = forward(x, weight, bias, 1e-3, num_groups=groups, axis=axis)
    expected, mean, matrix, _ = reference.whitening_forward(
        *(x, weight, bias, 1e-3), num_groups=groups, iterations=ITERATIONS[kind], axis=axis
    )
    assert y.dtype == dtype and isinstance(saved, statistics)
    close(y, expected, dtype)
    close(saved.mean, mean)
    close(saved.matrix, matrix)


@pytest.mark.parametrize("shape", [(37, 4), (5, 4, 3, 5), (3, 4, 2, 3, 2), (2, 4, 40)], ids=str)
def test_where_a_batch_is_cut_changes_nothing(kind, dtype, rng, axis, shape, few_columns):
    function, forward, backward, _ = FUNCTIONS[kind]
    x, dy, weight, bias = inputs(rng, shape, axis, dtype)
    got = forward(x, weight, bias, num_groups=2, axis=axis)
    gradients = backward(dy, x, got[1], weight, axis=axis)
    whole = reference.whitening_forward(
        *(x, weight, bias), num_groups=2, iterations=ITERATIONS[kind], axis=axis
    )
    close(got[0], whole[0], dtype)
    constant = function(x, got[1].mean, got[1].matrix, weight, bias, num_groups=2, axis=axis)
    close(constant, whole[0], dtype)
    # The gradients, of float64 copies in one piece.
    _whitening.PIECE_BYTES = 1 << 20
    wide = x.astype(np.float64)
    expected = backward(dy.astype(np.float64), wide, got[1], weight, axis=axis)
    for a, b in zip(gradients, expected, strict=True):
        close(a, b, dtype)


def test_no_temporary_is_as_large_as_the_batch(kind, rng, axis, monkeypatch):
    _, forward, backward, _ = FUNCTIONS[kind]
    x, dy, *_ = inputs(rng, (4, 16, 70, 30), axis, np.float32)
    out = np.empty_like(x)
    monkeypatch.setattr(_whitening, "PIECE_BYTES", 1 << 15)
    _, saved = forward(x, axis=axis, out=out)
    tracemalloc.start()
    try:
        forward(x, axis=axis, out=out)
        backward(dy, x, saved, axis=axis, out=out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < x.nbytes / 3


def test_a_batch_of_many_channels_and_few_samples_is_cut_all_the_same():
    x = np.zeros((4, 1024, 16, 16), np.float32)
    pieces = _whitening._Pieces(((x, None),), 1, 1)
    assert pieces.max_columns * 8 * x.shape[1] <= x.nbytes / 2


def test_every_sample_is_in_one_piece(rng, few_columns):
    for shape in [(7, 4), (3, 4, 5, 2), (2, 4, 1, 9), (1, 4, 3), (2, 4, 3, 3, 3)]:
        x = np.zeros(shape)
        pieces = _whitening._Pieces(((x, None),), 1, 2)
        seen = pieces.view(x)
        for columns, index in pieces:
            assert columns.shape[2] <= pieces.max_columns
            seen[index] += 1
        np.testing.assert_array_equal(x, 1)


def test_whitened_channels_have_unit_covariance(dtype, rng, axis):
    x, *_ = inputs(rng, (40, 6, 5, 4), axis, dtype, mean=1e3)
    y = bnfast.decorrelated_batch_norm(x, training=True, eps=1e-12, num_groups=2, axis=axis)
    columns = np.moveaxis(y, axis, 0).reshape(2, 3, -1).astype(np.float64)
    tolerance = OUTPUT * eps_of(dtype) + WHITENING
    np.testing.assert_allclose(columns.mean(2), 0, atol=tolerance)
    covariance = columns @ columns.swapaxes(1, 2) / columns.shape[2]
    np.testing.assert_allclose(covariance, np.stack([np.eye(3)] * 2), atol=tolerance)


def test_what_eps_leaves_of_the_variance(rng):
    x, *_ = inputs(rng, (60, 4), 1, np.float64)
    y, saved = bnfast.decorrelated_batch_norm_forward(x, eps=0.5)
    in_eigenbasis = y @ saved.eigenvectors[0]
    covariance = in_eigenbasis.T @ in_eigenbasis / len(y)
    shifted = saved.eigenvalues[0]
    close(covariance, np.diag((shifted - 0.5) / shifted))


@pytest.mark.parametrize(("shape", "axis"), [((9, 5, 3, 2), 1), ((30, 20), -1)], ids=str)
def test_a_channel_of_its_own_group_is_batch_normalized(dtype, rng, shape, axis):
    x, dy, weight, bias = inputs(rng, shape, axis, dtype)
    expected, *statistics = bnfast.batch_norm_forward(x, weight, bias, axis=axis)
    gradients = bnfast.batch_norm_backward(dy, x, *statistics, weight, axis=axis)
    forward, backward = FUNCTIONS["decorrelated"][1:3]
    y, saved = forward(x, weight, bias, num_groups=shape[axis], axis=axis)
    got = (y, *backward(dy, x, saved, weight, axis=axis))
    tolerance = INPUT_GRADIENT * eps_of(dtype) + WHITENING
    for a, b in zip(got, (expected, *gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_many_iterations_are_as_good_as_eigenvalues(rng):
    x, dy, weight, bias = inputs(rng, (50, 5), 1, np.float64)
    y, saved = bnfast.decorrelated_batch_norm_forward(x, weight, bias, 1e-3)
    iterated, other = bnfast.iterative_norm_forward(x, weight, bias, 1e-3, iterations=60)
    close(iterated, y)
    expected = bnfast.decorrelated_batch_norm_backward(dy, x, saved, weight)
    for a, b in zip(bnfast.iterative_norm_backward(dy, x, other, weight), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("iterations", [1, 2, 6])
def test_values_and_gradients_of_so_many_iterations(rng, iterations):
    x, dy, weight, bias = inputs(rng, (7, 3, 2), 1, np.float64)

    def run():
        return bnfast.iterative_norm_forward(x, weight, bias, iterations=iterations)

    y, saved = run()
    close(y, reference.whitening_forward(x, weight, bias, iterations=iterations)[0])
    dx, _, _ = bnfast.iterative_norm_backward(dy, x, saved, weight)
    numeric = central_differences(lambda: (run()[0] * dy).sum(), x)
    np.testing.assert_allclose(dx, numeric, rtol=0, atol=FINITE_DIFFERENCES)


@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((5, 4, 2, 1), 1),
        ((5, 4, 2, 1), 2),
        ((6, 3), 3),
        ((2, 3), 1),
        ((2, 4, 2, 2, 2), 2),
        ((3, 16), 4),
    ],
    ids=str,
)
def test_gradients(kind, rng, axis, shape, groups):
    _, forward, backward, _ = FUNCTIONS[kind]
    x, dy, weight, bias = inputs(rng, shape, axis, np.float64, 0)
    options = {"eps": 0.1, "num_groups": groups, "axis": axis}
    _, saved = forward(x, weight, bias, **options)
    gradients = backward(dy, x, saved, weight, axis=axis)
    for array, gradient in zip((x, weight, bias), gradients, strict=True):
        numeric = central_differences(
            lambda: (forward(x, weight, bias, **options)[0] * dy).sum(), array
        )
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


def test_gradients_where_eigenvalues_are_equal(kind, rng):
    _, forward, backward, _ = FUNCTIONS[kind]
    corners = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], np.float64)
    dy = rng.normal(size=corners.shape)
    _, saved = forward(corners)
    dx, *_ = backward(dy, corners, saved)
    numeric = central_differences(lambda: (forward(corners)[0] * dy).sum(), corners)
    np.testing.assert_allclose(dx, numeric, rtol=0, atol=FINITE_DIFFERENCES)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_autograd(kind, dtype, rng, axis, groups):
    torch = pytest.importorskip("torch")
    _, forward, backward, _ = FUNCTIONS[kind]
    x, dy, weight, bias = inputs(rng, (6, 4, 3, 5), axis, dtype)
    tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (x, weight, bias)]
    columns = tensors[0].movedim(axis, 0).reshape(groups, 4 // groups, -1)
    centred = columns - columns.mean(2, keepdim=True)
    unit = torch.eye(4 // groups, dtype=torch.float64)
    covariance = centred @ centred.mT / columns.shape[2] + 1e-3 * unit
    if kind == "decorrelated":
        eigenvalues, vectors = torch.linalg.eigh(covariance)
        matrix = vectors / eigenvalues.sqrt()[:, None] @ vectors.mT
    else:
        trace = covariance.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        matrix = unit
        for _ in range(5):
            matrix = 1.5 * matrix - 0.5 * matrix @ matrix @ matrix @ covariance / trace
        matrix = matrix / trace.sqrt()
    last = (matrix @ centred).reshape(4, -1).mT * tensors[1] + tensors[2]
    last.backward(torch.tensor(dy, dtype=torch.float64).movedim(axis, 0).reshape(4, -1).mT)
    _, saved = forward(x, weight, bias, 1e-3, num_groups=groups, axis=axis)
    gradients = backward(dy, x, saved, weight, axis=axis)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        assert gradient.dtype == dtype
        close(gradient, tensor.grad.numpy(), dtype)


@pytest.mark.parametrize("buffer", BUFFERS)
def test_any_strides_in_any_place(kind, dtype, rng, axis, buffer):
    _, forward, backward, _ = FUNCTIONS[kind]
    x, dy, weight, bias = inputs(rng, (5, 4, 3, 6), axis, dtype)
    make = BUFFERS[buffer]
    y, saved = forward(x, weight, bias, num_groups=2, axis=axis)
    out = make(np.zeros_like(x))
    got, _ = forward(make(x), weight, bias, num_groups=2, axis=axis, out=out)
    assert got is out
    close(out, y, dtype)
    dx, *_ = backward(dy, x, saved, weight, axis=axis)
    got, *_ = backward(make(dy), make(x), saved, weight, axis=axis, out=out)
    assert got is out
    close(out, dx, dtype)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_channels_along_any_axis(kind, rng, axis):
    _, forward, backward, _ = FUNCTIONS[kind]
    x, dy, weight, bias = inputs(rng, (5, 4, 3, 6), 1, np.float64)
    expected = forward(x, weight, bias)
    gradients = backward(dy, x, expected[1], weight)
    moved, moved_dy = np.moveaxis(x, 1, axis), np.moveaxis(dy, 1, axis)
    y, saved = forward(np.ascontiguousarray(moved), weight, bias, axis=axis)
    close(np.moveaxis(y, axis, 1), expected[0])
    dx, dweight, dbias = backward(moved_dy, moved, saved, weight, axis=axis)
    for a, b in zip((np.moveaxis(dx, axis, 1), dweight, dbias), gradients, strict=True):
        close(a, b)


def test_in_place(kind, dtype, rng, axis, few_columns):
    _, forward, backward, _ = FUNCTIONS[kind]
    x, dy, weight, bias = inputs(rng, (5, 4, 3, 6), axis, dtype)
    y, saved = forward(x, weight, bias, axis=axis)
    overwritten = x.copy()
    forward(overwritten, weight, bias, axis=axis, out=overwritten)
    np.testing.assert_array_equal(overwritten, y)
    for training in (True, False):
        dx, *_ = backward(dy, x, saved, weight, axis=axis, training=training)
        upstream, own = dy.copy(), x.copy()
        backward(upstream, x, saved, weight, axis=axis, training=training, out=upstream)
        backward(dy, own, saved, weight, axis=axis, training=training, out=own)
        np.testing.assert_array_equal(upstream, dx)
        np.testing.assert_array_equal(own, dx)


@pytest.mark.parametrize("averaged", ["whitening", "covariance"])
def test_running_statistics_take_the_batch_in(kind, dtype, rng, axis, averaged):
    function, forward, _, _ = FUNCTIONS[kind]
    x, _, weight, bias = inputs(rng, (6, 4, 3, 5), axis, dtype)
    mean, matrix = rng.normal(size=4).astype(dtype), rng.normal(size=(2, 2, 2)).astype(dtype)
    before = mean.astype(np.float64), matrix.astype(np.float64)
    _, batch_mean, whitening, covariance = reference.whitening_forward(
        x, num_groups=2, iterations=ITERATIONS[kind], axis=axis
    )
    y = function(
        *(x, mean, matrix, weight, bias, True, 0.3), num_groups=2, averaged=averaged, axis=axis
    )
    np.testing.assert_array_equal(y, forward(x, weight, bias, num_groups=2, axis=axis)[0])
    batch = whitening if averaged == "whitening" else covariance
    close(mean, 0.7 * before[0] + 0.3 * batch_mean, dtype)
    close(matrix, 0.7 * before[1] + 0.3 * batch, dtype)


def test_running_statistics_may_have_any_strides(kind, rng):
    function = FUNCTIONS[kind][0]
    x, *_ = inputs(rng, (6, 4, 5), 1, np.float64)
    expected = np.zeros(4), np.zeros((2, 2, 2))
    function(x, *expected, training=True, num_groups=2)
    mean, matrix = np.zeros(8)[::2], np.zeros((2, 2, 4))[::-1, :, ::2]
    function(x, mean, matrix, training=True, num_groups=2)
    np.testing.assert_array_equal(mean, expected[0])
    np.testing.assert_array_equal(matrix, expected[1])


def test_evaluation_applies_the_running_matrix(kind, dtype, rng, axis):
    function = FUNCTIONS[kind][0]
    x, _, weight, bias = inputs(rng, (6, 4, 3, 5), axis, dtype)
    mean, matrix = rng.normal(size=4), rng.normal(size=(2, 2, 2))
    got = function(x, mean, matrix, weight, bias, num_groups=2, axis=axis)
    columns = np.moveaxis(x, axis, -1).astype(np.float64) - mean
    each = [columns[..., 2 * g : 2 * g + 2] @ matrix[g].T for g in range(2)]
    expected = np.moveaxis(np.concatenate(each, -1) * weight + bias, -1, axis)
    close(got, expected, dtype)


def test_evaluation_makes_the_matrix_of_the_running_covariance(kind, rng, axis):
    function, forward, backward, statistics = FUNCTIONS[kind]
    x, dy, weight, bias = inputs(rng, (6, 4, 3, 5), axis, np.float64)
    *_, covariance = reference.whitening_forward(x, num_groups=2, axis=axis)
    expected, saved = forward(x, weight, bias, num_groups=2, axis=axis)
    options = {"num_groups": 2, "axis": axis, "averaged": "covariance"}
    close(function(x, saved.mean, covariance, weight, bias, **options), expected)
    made = statistics.of_covariance(saved.mean, covariance)
    close(made.matrix, saved.matrix)
    constant = statistics(saved.mean, saved.matrix)
    got = backward(dy, x, made, weight, axis=axis, training=False)
    for a, b in zip(got, backward(dy, x, constant, weight, axis=axis, training=False), strict=True):
        close(a, b)


def test_gradients_with_constant_statistics(kind, rng, axis):
    function, _, backward, statistics = FUNCTIONS[kind]
    x, dy, weight, bias = inputs(rng, (3, 4, 2), axis, np.float64)
    mean, matrix = rng.normal(size=4), rng.normal(size=(2, 2, 2))
    saved = statistics(mean, matrix)
    gradients = backward(dy, x, saved, weight, axis=axis, training=False)
    for array, gradient in zip((x, weight, bias), gradients, strict=True):
        numeric = central_differences(
            lambda: (function(x, mean, matrix, weight, bias, num_groups=2, axis=axis) * dy).sum(),
            array,
        )
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


def test_saved_statistics_may_be_float32(kind, rng):
    _, forward, backward, _ = FUNCTIONS[kind]
    x, dy, weight, _ = inputs(rng, (6, 4, 5), 1, np.float32)
    _, saved = forward(x, weight)
    narrow = type(saved)(*[a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in saved])
    expected = backward(dy, x, saved, weight)
    for a, b in zip(backward(dy, x, narrow, weight), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=ROUNDED_STATISTICS, atol=ROUNDED_STATISTICS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (60, 32)], ids=str)
def test_what_is_not_finite_changes_no_bit_of_another_group(kind, dtype, rng, axis, bad, shape):
    function, forward, backward, _ = FUNCTIONS[kind]
    x, dy, weight, bias = inputs(rng, shape, axis, dtype)
    half = shape[1] // 2
    mean, matrix = np.zeros(shape[1]), np.zeros((2, half, half))

    def run():
        y, saved = forward(x, weight, bias, num_groups=2, axis=axis)
        dx, dweight, dbias = backward(dy, x, saved, weight, axis=axis)
        running = mean.copy(), matrix.copy()
        function(x, *running, training=True, num_groups=2, axis=axis)
        evaluated = function(x, *clean, num_groups=2, axis=axis)
        by_channel = [np.moveaxis(a, axis, 0) for a in (y, dx, evaluated)]
        return [*by_channel, dweight, dbias, saved.mean, running[0]], [saved.matrix, running[1]]

    _, saved = forward(x, num_groups=2, axis=axis)
    clean = saved.mean, saved.matrix
    channels, groups = run()
    np.moveaxis(x, axis, 0)[half + 1].flat[7] = bad
    spoiled_channels, spoiled_groups = run()
    for a, b in zip(channels, spoiled_channels, strict=True):
        np.testing.assert_array_equal(a[:half], b[:half])
    for a, b in zip(groups, spoiled_groups, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert np.isnan(b[1]).all()
    y, dx, evaluated = spoiled_channels[:3]
    assert np.isnan(y[half:]).all() and np.isnan(dx[half:]).all()
    spoiled = ~np.isfinite(evaluated[half:].reshape(half, -1)).all(0)
    np.testing.assert_array_equal(np.flatnonzero(spoiled), 7)  # this sample alone


def test_a_large_mean_costs_nothing(kind, rng):
    x, _, weight, bias = inputs(rng, (40, 4, 5), 1, np.float64)
    far = np.round(x * 2**20) / 2**20 + 2.0**30
    expected, _ = FUNCTIONS[kind][1](far - 2.0**30, weight, bias)
    y, _ = FUNCTIONS[kind][1](far, weight, bias)
    close(y, expected)


def test_data_that_drift_cost_nothing(kind, rng, few_columns):
    x = rng.normal(size=(300, 3)) + np.linspace(-1e4, 1e4, 300)[:, None] * [1, 0, -1]
    y, saved = FUNCTIONS[kind][1](x)
    expected, _, matrix, _ = reference.whitening_forward(x, iterations=ITERATIONS[kind])
    condition = np.linalg.cond(np.cov(x.T))
    tolerance = ILL_CONDITIONED * eps_of(np.float64) * condition
    np.testing.assert_allclose(saved.matrix[0], matrix[0], rtol=0, atol=tolerance)
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)


def test_eigenvalues_below_rounding_count_as_nothing():
    x = np.outer(np.linspace(-1e9, 1e9, 50), [1.0, 2.0, 3.0])
    y, saved = bnfast.decorrelated_batch_norm_forward(x, eps=1e-5)
    assert np.isfinite(y).all()
    assert (saved.eigenvalues >= 1e-5).all()


def test_a_constant_batch_is_its_bias(kind, dtype, axis):
    forward = FUNCTIONS[kind][1]
    x, bias = np.full((3, 4, 4), 7.0, dtype), np.arange(4.0)
    y, saved = forward(x, None, bias, 1e-4, axis=axis)
    np.testing.assert_array_equal(np.moveaxis(y, axis, -1), np.broadcast_to(bias, (3, 4, 4)))
    if kind == "decorrelated":
        close(saved.matrix, 100 * np.eye(4)[None])


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 4, 0), (5, 0, 3), (0,)], ids=str)
def test_an_empty_batch(kind, dtype, shape):
    function, forward, backward, statistics = FUNCTIONS[kind]
    channels = shape[1] if len(shape) > 1 else 0
    groups = 2 if channels else 1
    each = channels // groups
    x, mean, matrix = np.empty(shape, dtype), np.ones(channels), np.ones((groups, each, each))
    y = function(x, mean, matrix, training=True, num_groups=groups)
    assert y.shape == shape and y.dtype == dtype
    assert function(x, mean, matrix, num_groups=groups).shape == shape
    np.testing.assert_array_equal(matrix, 1)
    np.testing.assert_array_equal(mean, 1)
    y, saved = forward(x, num_groups=groups)
    assert isinstance(saved, statistics) and saved.matrix.shape == matrix.shape
    dx, dweight, dbias = backward(x, x, saved)
    assert dx.shape == shape
    np.testing.assert_array_equal(dweight, np.zeros(channels))
    np.testing.assert_array_equal(dbias, np.zeros(channels))


X = np.arange(24, dtype=np.float32).reshape(3, 4, 2) ** 1.5
EYES = np.stack([np.eye(2)] * 2)
SAVED = {name: functions[1](X, num_groups=2)[1] for name, functions in FUNCTIONS.items()}


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_groups": 3}, ValueError, "num_groups must divide the 4 channels"),
        ({"num_groups": 0}, ValueError, "num_groups must be at least 1"),
        ({"num_groups": 2.0}, TypeError, "num_groups must be an integer"),
        ({"averaged": "mean"}, ValueError, "averaged must be 'whitening' or 'covariance', got 'me"),
        ({"averaged": None}, ValueError, "averaged must be 'whitening' or 'covariance', got None"),
        ({"eps": -1.0}, ValueError, "eps must"),
        ({"momentum": np.nan}, ValueError, "momentum must be finite"),
        ({"axis": 3}, ValueError, "axis must be from -3 to 2"),
        ({"training": 1}, TypeError, "training must be True or False"),
        ({"weight": np.ones(3)}, ValueError, "weight must have one value for each of the 4"),
        ({"bias": np.ones(4, int)}, TypeError, "bias must be float16, bfloat16, float32"),
        ({"running_mean": np.ones(3)}, ValueError, "running_mean must have one value for each"),
        ({"running_matrix": np.ones((4, 4))}, ValueError, r"running_matrix must have the shape \("),
        ({"running_matrix": np.ones((1, 4, 4))}, ValueError, r"running_matrix .* \(2, 2, 2\)"),
        ({"running_matrix": EYES.astype(int)}, TypeError, "running_matrix must be float16"),
        ({"running_mean": None}, (ValueError, TypeError), "running_mean.*got None"),
        ({"running_matrix": None}, (ValueError, TypeError), "running_matrix.*got None"),
        ({"x": np.zeros(4, np.float32)}, ValueError, "x must have at least 2 dimensions"),
        ({"x": X.astype(int)}, TypeError, "x must be float16, bfloat16, float32"),
        ({"x": X.astype(np.float16)}, TypeError, "x must be float32 or float64.*got float16"),
        ({"out": np.zeros(3)}, ValueError, "out must have the shape and dtype of x"),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_bad_arguments_are_refused_before_anything_is_written(
    kind, options, error, message, training
):
    out = np.full_like(X, 7)
    good = {"x": X, "running_mean": np.ones(4), "running_matrix": EYES.copy(), "num_groups": 2}
    given = good | {"training": training, "out": out} | options
    kept = {name: a.copy() for name, a in given.items() if isinstance(a, np.ndarray)}
    with pytest.raises(error, match=message):
        FUNCTIONS[kind][0](**given)
    for name, array in kept.items():
        np.testing.assert_array_equal(given[name], array)
    np.testing.assert_array_equal(out, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps must be positive in training"),
        ({"running_matrix": read_only(EYES.copy())}, "running_matrix is updated in place"),
        (
            {"running_matrix": np.broadcast_to(np.ones(2), (2, 2, 2))},
            "running_matrix is updated in place and must be writable",
        ),
    ],
)
def test_what_only_training_refuses(kind, options, message):
    mean = np.ones(4)
    good = {"x": X, "running_mean": mean, "running_matrix": EYES.copy(), "num_groups": 2}
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[kind][0](**(good | {"training": True} | options))
    np.testing.assert_array_equal(mean, 1)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_matrix"])
@pytest.mark.parametrize("training", [True, False])
def test_out_must_not_hold_a_parameter(kind, name, training):
    out = np.zeros((6, 4, 2))
    shape = (2, 2, 2) if name == "running_matrix" else (4,)
    given = {"weight": np.ones(4), "bias": np.ones(4), "running_mean": np.ones(4)}
    given |= {"running_matrix": EYES.copy(), name: out.reshape(-1)[: np.prod(shape)].reshape(shape)}
    with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
        FUNCTIONS[kind][0](np.ones((6, 4, 2)), training=training, num_groups=2, out=out, **given)
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("name", ["mean", "matrix", "weight"])
def test_out_of_backward_must_not_hold_a_parameter(kind, name):
    _, _, backward, statistics = FUNCTIONS[kind]
    out = np.zeros((6, 4, 2))
    shape = (2, 2, 2) if name == "matrix" else (4,)
    held = out.reshape(-1)[: np.prod(shape)].reshape(shape)
    given = {"mean": np.ones(4), "matrix": EYES, "weight": np.ones(4), name: held}
    weight = given.pop("weight")
    with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
        backward(np.ones_like(out), np.ones_like(out), statistics(**given), weight, out=out)


def test_iterations_are_refused_where_there_are_none():
    for function in (bnfast.iterative_norm, bnfast.iterative_norm_forward):
        with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
            function(X, iterations=0)
    with pytest.raises(TypeError, match="iterations must be an integer"):
        bnfast.IterNorm(4, iterations=5.0)
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        bnfast.iterative_norm_backward(X, X, SAVED["iterative"]._replace(iterations=0))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"mean": np.zeros(3)}, ValueError, "mean must have one value for each of the 4 channels"),
        ({"matrix": np.zeros((4, 4))}, ValueError, "matrix must have a square matrix for each"),
        ({"matrix": np.zeros((2, 4, 4))}, ValueError, "matrix must have a square matrix for each"),
        ({"matrix": np.zeros((2, 1, 2))}, ValueError, "matrix must have a square matrix for each"),
        ({"matrix": None}, TypeError, "matrix must be a float16, bfloat16.* array, got None"),
    ],
)
def test_what_is_saved_is_checked(kind, changed, error, message):
    backward = FUNCTIONS[kind][2]
    with pytest.raises(error, match=message):
        backward(X, X, SAVED[kind]._replace(**changed))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("decorrelated", "eigenvalues"),
        ("decorrelated", "eigenvectors"),
        ("iterative", "covariance"),
    ],
)
def test_constant_statistics_are_not_enough_in_training(kind, name):
    backward = FUNCTIONS[kind][2]
    out = np.full_like(X, 7)
    with pytest.raises(TypeError, match=f"{name} must be an array of shape .*, got None"):
        backward(X, X, SAVED[kind]._replace(**{name: None}), out=out)
    with pytest.raises(ValueError, match=f"{name} must be as forward returned it"):
        backward(X, X, SAVED[kind]._replace(**{name: np.ones((2, 3))}), out=out)
    np.testing.assert_array_equal(out, 7)
    backward(X, X, SAVED[kind]._replace(**{name: None}), training=False)


def test_backward_wants_what_its_own_forward_returned(kind):
    other = next(saved for name, saved in SAVED.items() if name != kind)
    backward = FUNCTIONS[kind][2]
    for saved in (other, tuple(SAVED[kind]), None):
        with pytest.raises(TypeError, match=r"saved must be what .*_forward returned, got"):
            backward(X, X, saved)
    with pytest.raises(ValueError, match="dy must have the shape and dtype of x"):
        backward(X[:2], X, SAVED[kind])


def test_of_a_covariance_the_symmetric_part_counts(kind):
    of_covariance = FUNCTIONS[kind][3].of_covariance
    symmetric, turned = np.array([[[2.0, 0.5], [0.5, 1.0]]]), np.array([[[0.0, 0.3], [-0.3, 0.0]]])
    expected = of_covariance(np.zeros(2), symmetric).matrix
    close(of_covariance(np.zeros(2), symmetric + turned).matrix, expected)


def test_statistics_of_a_covariance_are_checked(kind):
    of_covariance = FUNCTIONS[kind][3].of_covariance
    with pytest.raises(ValueError, match="covariance must have a square matrix for each group"):
        of_covariance(np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="mean must have one value for each of the 4 channels"):
        of_covariance(np.zeros(3), EYES)
    with pytest.raises(ValueError, match="eps must not be negative"):
        of_covariance(np.zeros(4), EYES, -1.0)
    with pytest.raises(ValueError, match="dmatrix must have the shape"):
        of_covariance(np.zeros(4), EYES).covariance_gradient(np.zeros((4, 4)))


@pytest.mark.parametrize("averaged", ["whitening", "covariance"])
@pytest.mark.parametrize("affine", [True, False])
def test_layers_do_what_functions_do(kind, dtype, rng, axis, averaged, affine):
    function, forward, backward, statistics = FUNCTIONS[kind]
    options = {"averaged": averaged, "axis": axis, "dtype": dtype}
    layer = filled(LAYERS[kind](4, 2, 1e-3, 0.3, affine, **options), rng)
    x, dy, *_ = inputs(rng, (6, 4, 3, 5), axis, dtype)
    parameters = layer.weight, layer.bias
    y, saved = forward(x, *parameters, 1e-3, num_groups=2, axis=axis)
    dx, dweight, dbias = backward(dy, x, saved, layer.weight, axis=axis)
    running = layer.running_mean.copy(), layer.running_matrix.copy()
    function(x, *running, *parameters, True, 0.3, 1e-3, num_groups=2, averaged=averaged, axis=axis)
    np.testing.assert_array_equal(layer(x), y)
    np.testing.assert_array_equal(layer.running_mean, running[0])
    np.testing.assert_array_equal(layer.running_matrix, running[1])
    assert layer.num_batches_tracked == layer.state_dict()["num_batches_tracked"] == 1
    np.testing.assert_array_equal(layer.backward(dy), dx)
    if affine:
        np.testing.assert_array_equal(layer.weight_grad, dweight)
        np.testing.assert_array_equal(layer.bias_grad, dbias)
    else:
        assert layer.weight_grad is None and layer.bias_grad is None

    constant = statistics(*running)
    if averaged == "covariance":
        constant = statistics.of_covariance(*running, 1e-3)
    expected = function(
        *(x, *running, *parameters, False, 0.3, 1e-3),
        num_groups=2,
        averaged=averaged,
        axis=axis,
    )
    np.testing.assert_array_equal(layer.eval()(x), expected)
    layer.running_matrix *= 2  # what the call used is what counts
    dx, *_ = backward(dy, x, constant, layer.weight, axis=axis, training=False)
    np.testing.assert_array_equal(layer.backward(dy), dx)


def test_layers_count_batches(kind, rng):
    layer = LAYERS[kind](4, momentum=None)
    batches = [rng.normal(n, 1, (8, 4)).astype(np.float32) for n in range(3)]
    for x in batches:
        layer(x)
    layer(batches[0][:0])
    assert layer.num_batches_tracked == 3
    means = np.mean([x.mean(0, dtype=np.float64) for x in batches], 0)
    np.testing.assert_allclose(layer.running_mean, means, rtol=RUNNING * eps_of(np.float32))


def test_a_layer_without_running_statistics_whitens_by_the_batch(kind, rng):
    layer = LAYERS[kind](4, 2, track_running_stats=False)
    x, dy, *_ = inputs(rng, (6, 4, 5), 1, np.float32)
    y = layer(x)
    dx = layer.backward(dy)
    np.testing.assert_array_equal(layer.eval()(x), y)
    np.testing.assert_array_equal(layer.backward(dy), dx)
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_state_goes_from_layer_to_layer(kind, rng):
    layer, other = filled(LAYERS[kind](4, 2), rng), LAYERS[kind](4, 2)
    x, *_ = inputs(rng, (6, 4, 5), 1, np.float32)
    names = ["weight", "bias", "running_mean", "running_matrix", "num_batches_tracked"]
    assert list(layer.state_dict()) == names
    other.load_state_dict(layer.state_dict())
    for copied in (other, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        np.testing.assert_array_equal(copied.eval()(x), layer.eval()(x))
    with pytest.raises(ValueError, match=r"running_matrix must have the shape \(1, 4, 4\)"):
        LAYERS[kind](4).load_state_dict(layer.state_dict())


def test_a_layer_that_refuses_is_left_as_it_was(kind):
    layer = LAYERS[kind](4)
    for bad in (X[:, :2], X.astype(int)):
        with pytest.raises((TypeError, ValueError)):
            layer(bad)
    with pytest.raises(ValueError, match="eps must be positive in training"):
        LAYERS[kind](4, eps=0.0)(X)
    np.testing.assert_array_equal(layer.running_matrix, np.eye(4)[None])
    assert layer.num_batches_tracked == 0
    with pytest.raises(RuntimeError, match="there has been none"):
        layer.backward(X)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_features": -1}, ValueError, "num_features must be at least 0"),
        ({"num_groups": 3}, ValueError, "num_groups must divide the 4 channels"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
        ({"momentum": "x"}, TypeError, "momentum must be a real number"),
        ({"averaged": "x"}, ValueError, "averaged must be 'whitening' or 'covariance'"),
        ({"axis": 1.0}, TypeError, "axis must be an integer"),
        ({"dtype": np.float16}, TypeError, "dtype must be float32 or float64"),
    ],
)
def test_bad_layers_are_refused(kind, options, error, message):
    with pytest.raises(error, match=message):
        LAYERS[kind](**({"num_features": 4} | options))


def test_the_representation_says_how_to_make_it():
    assert repr(bnfast.DecorrelatedBatchNorm(4)) == (
        "DecorrelatedBatchNorm(4, num_groups=1, eps=1e-05, momentum=0.1, affine=True, "
        "track_running_stats=True, averaged=whitening, axis=1, dtype=float32)"
    )
    assert repr(bnfast.IterNorm(4, 2, iterations=7)) == (
        "IterNorm(4, num_groups=2, eps=1e-05, momentum=0.1, affine=True, "
        "track_running_stats=True, iterations=7, averaged=whitening, axis=1, dtype=float32)"
    )
