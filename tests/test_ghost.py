"""Ghost batch norm: each ghost is a batch of its own, of functions and of the layer."""

import numpy as np
import pytest

import bnfast
from bnfast import BatchNorm, GhostBatchNorm
from bnfast import _reference as reference
from cases import BUFFERS, in_layout
from tolerances import CLOSE_F32, CLOSE_F64, GRADIENT_SUMS, ROUNDED_F32, RUNNING, eps_of

SHAPES = [(8, 3, 5, 4), (7, 3, 5, 4), (6, 4), (3, 2, 9), (1, 3, 4), (9, 70, 3)]


def inputs(rng, shape, axis, dtype, mean=3):
    x = in_layout(rng.normal(mean, 2, shape).astype(dtype), axis)
    dy = in_layout(rng.normal(size=shape).astype(dtype), axis)
    weight, bias = rng.normal(size=(2, shape[1])).astype(dtype)
    return x, dy, weight, bias


def parts(x, size):
    return [slice(n, n + size) for n in range(0, len(x), size)]


@pytest.mark.parametrize("size", [2, 3, 100])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_ghost_has_the_bits_of_a_batch(isa, dtype, rng, axis, shape, size):
    x, dy, weight, bias = inputs(rng, shape, axis, dtype)
    if x.ndim == 2 and len(x) % size == 1:
        return
    y, mean, invstd = bnfast.ghost_batch_norm_forward(x, size, weight, bias, axis=axis)
    dx, dweight, dbias = bnfast.ghost_batch_norm_backward(
        dy, x, size, mean, invstd, weight, axis=axis
    )
    sums = np.zeros((2, shape[1]))
    for n, part in enumerate(parts(x, size)):
        alone = bnfast.batch_norm_forward(x[part], weight, bias, axis=axis)
        for a, b in zip((y[part], mean[n], invstd[n]), alone, strict=True):
            np.testing.assert_array_equal(a, b)
        gradient, *of_parameters = bnfast.batch_norm_backward(
            dy[part], x[part], mean[n], invstd[n], weight.astype(np.float64), axis=axis
        )
        np.testing.assert_array_equal(dx[part], gradient)
        sums += of_parameters
    tolerance = ROUNDED_F32 if dtype == np.float32 else CLOSE_F64
    np.testing.assert_allclose(dweight, sums[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dbias, sums[1], rtol=tolerance, atol=tolerance)


def test_gradients_without_a_weight_are_those_of_ones(isa, dtype, rng, axis):
    """And so are rounded once, after all parts."""
    x, dy, _, _ = inputs(rng, (40, 30, 5, 4), axis, dtype)
    _, mean, invstd = bnfast.ghost_batch_norm_forward(x, 3, axis=axis)
    got = bnfast.ghost_batch_norm_backward(dy, x, 3, mean, invstd, axis=axis)
    ones = np.ones(30, dtype)
    expected = bnfast.ghost_batch_norm_backward(dy, x, 3, mean, invstd, ones, axis=axis)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == dtype


@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics_take_one_ghost_after_the_other(rng, axis, unbiased):
    x, _, weight, bias = inputs(rng, (7, 3, 5, 4), axis, np.float64)
    mean, var = rng.normal(size=3), rng.uniform(1, 2, 3)
    expected = mean, var
    y = bnfast.ghost_batch_norm(
        *(x, 3, mean := mean.copy(), var := var.copy(), weight, bias, True, 0.3),
        axis=axis,
        unbiased=unbiased,
    )
    for part in parts(x, 3):
        expected = reference.update_running(*expected, x[part], 0.3, axis=axis, unbiased=unbiased)
    np.testing.assert_allclose(mean, expected[0], rtol=CLOSE_F64)
    np.testing.assert_allclose(var, expected[1], rtol=CLOSE_F64)
    forward = bnfast.ghost_batch_norm_forward(x, 3, weight, bias, axis=axis)
    np.testing.assert_array_equal(y, forward[0])
    evaluated = bnfast.ghost_batch_norm(x, 3, mean, var, weight, bias, axis=axis)
    expected = bnfast.batch_norm(x, mean, var, weight, bias, axis=axis)
    np.testing.assert_array_equal(evaluated, expected)


@pytest.mark.parametrize("buffer", BUFFERS)
def test_ghosts_of_any_strides_in_any_place(dtype, rng, axis, buffer):
    x, dy, weight, bias = inputs(rng, (7, 3, 5, 4), axis, dtype)
    make = BUFFERS[buffer]
    expected = bnfast.ghost_batch_norm_forward(x, 3, weight, bias, axis=axis)
    out = make(np.zeros_like(x))
    got = bnfast.ghost_batch_norm_forward(make(x), 3, weight, bias, axis=axis, out=out)
    assert got[0] is out
    tolerance = CLOSE_F32 if dtype == np.float32 else CLOSE_F64
    np.testing.assert_allclose(out, expected[0], rtol=tolerance, atol=tolerance)
    gradients = bnfast.ghost_batch_norm_backward(dy, x, 3, *expected[1:], weight, axis=axis)
    got = bnfast.ghost_batch_norm_backward(
        make(dy), make(x), 3, *expected[1:], weight, axis=axis, out=out
    )
    np.testing.assert_allclose(got[0], gradients[0], rtol=tolerance, atol=tolerance)


def test_a_ghost_of_one_value_is_refused_before_anything_is_written(rng):
    x, out = rng.normal(size=(5, 3)), np.full((5, 3), 7.0)
    mean, var = np.zeros(3), np.ones(3)
    with pytest.raises(ValueError, match="more than one value per channel"):
        bnfast.ghost_batch_norm(x, 2, mean, var, training=True, out=out)
    np.testing.assert_array_equal(out, 7)
    np.testing.assert_array_equal(mean, 0)


@pytest.mark.filterwarnings("error")
def test_a_warning_of_one_ghost_comes_after_the_update_by_all():
    x = np.zeros((6, 1))
    x[0] = 1e40
    mean, var = np.zeros(1, np.float32), np.ones(1, np.float32)
    with pytest.raises(RuntimeWarning, match="running_mean is infinite from now on"):
        bnfast.ghost_batch_norm(x, 2, mean, var, momentum=1.0, training=True)
    np.testing.assert_array_equal((mean, var), 0)


def test_what_a_ghost_weighs_is_asked_before_anything_is_written(rng):
    layer = GhostBatchNorm(3, 2)
    before, out = layer.state_dict(), np.full((4, 3), 7, np.float32)
    layer.momentum = "nothing"
    with pytest.raises(TypeError, match="momentum must be a real number"):
        layer(images(rng, np.float32, (4, 3)), out=out)
    np.testing.assert_array_equal(out, 7)
    np.testing.assert_equal(layer.state_dict(), before)


def test_an_empty_batch_of_ghosts(dtype):
    x, mean, var = np.empty((0, 3, 4), dtype), np.zeros(3), np.ones(3)
    assert bnfast.ghost_batch_norm(x, 2, mean, var, training=True).shape == x.shape
    np.testing.assert_array_equal(var, 1)


@pytest.mark.parametrize("size", [6, 7, 2**40, 2**63, 10**30])
def test_a_ghost_has_no_more_samples_than_the_batch(dtype, rng, size):
    x, dy = rng.normal(size=(2, 6, 4)).astype(dtype)
    y, mean, invstd = bnfast.ghost_batch_norm_forward(x, size)
    expected, *_ = bnfast.batch_norm_forward(x)
    np.testing.assert_array_equal(y, expected)
    assert mean.shape == (1, 4)
    dx, *_ = bnfast.ghost_batch_norm_backward(dy, x, size, mean, invstd)
    np.testing.assert_array_equal(dx, bnfast.batch_norm_backward(dy, x, mean[0], invstd[0])[0])


X = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bnfast.ghost_batch_norm(X, 0, training=True), ValueError, "ghost_size must be at"),
        (
            lambda: bnfast.ghost_batch_norm(X, 2.0, training=True),
            TypeError,
            "ghost_size must be an",
        ),
        (
            lambda: bnfast.ghost_batch_norm(X, 2, np.zeros(4), np.ones(4), axis=0),
            *(ValueError, "axis must not be 0"),
        ),
        (lambda: bnfast.ghost_batch_norm(X, 2, training=1), TypeError, "training must be True"),
        (lambda: bnfast.ghost_batch_norm_forward(X, 2, axis=0), ValueError, "axis must not be 0"),
        (
            lambda: bnfast.ghost_batch_norm_backward(X, X, 2, np.zeros((1, 3)), np.ones((2, 3))),
            *(ValueError, r"mean must be as forward returned it, shape \(2, 3\)"),
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def images(rng, dtype=np.float64, shape=(7, 3, 4, 5)):
    return rng.normal(3, 2, shape).astype(dtype)


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("unbiased", [True, False])
def test_ghosts_are_batches_one_after_the_other(dtype, rng, axis, momentum, unbiased):
    options = {"axis": axis, "unbiased": unbiased, "dtype": dtype}
    layer = GhostBatchNorm(3, 3, 1e-3, momentum, **options)
    alone = BatchNorm(3, 1e-3, momentum, **options)
    layer.weight[...] = alone.weight[...] = rng.normal(size=3)
    for _ in range(2):
        x, dy = (in_layout(images(rng, dtype), axis) for _ in range(2))
        sums, sizes = np.zeros((2, 3)), np.zeros((2, 3))
        y, dx = layer(x), layer.backward(dy)
        for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
            np.testing.assert_array_equal(y[part], alone(x[part]))
            np.testing.assert_array_equal(dx[part], alone.backward(dy[part]))
            gradients = np.array([alone.weight_grad, alone.bias_grad])
            sums += gradients
            sizes += np.abs(gradients)
        allowed = GRADIENT_SUMS * eps_of(dtype) * sizes
        assert (np.abs(np.array([layer.weight_grad, layer.bias_grad]) - sums) <= allowed).all()
    tolerance = RUNNING * eps_of(dtype)
    for name, array in alone.state_dict().items():
        np.testing.assert_allclose(layer.state_dict()[name], array, rtol=tolerance, err_msg=name)
    assert layer.num_batches_tracked == 6


def test_ghosts_without_running_statistics_are_ghosts_in_evaluation(rng, axis):
    layer = GhostBatchNorm(3, 3, track_running_stats=False, axis=axis, dtype=np.float64)
    x, dy = (in_layout(images(rng), axis) for _ in range(2))
    y, dx = layer(x), layer.backward(dy)
    np.testing.assert_array_equal(layer.eval()(x), y)
    np.testing.assert_array_equal(layer.backward(dy), dx)
    assert layer.num_batches_tracked is None


def test_a_last_ghost_of_one_value_is_refused_before_anything_is_written(rng):
    layer = GhostBatchNorm(3, 2)
    before = layer.state_dict()
    out = np.full((5, 3), 7, np.float32)
    with pytest.raises(ValueError, match="more than one value per channel"):
        layer(images(rng, np.float32, (5, 3)), out=out)
    np.testing.assert_array_equal(out, 7)
    np.testing.assert_equal(layer.state_dict(), before)


@pytest.mark.filterwarnings("error")
def test_gradients_that_are_not_finite_raise_no_warning():
    x, dy = np.array([[1.0], [1.0], [-1.0]]), np.ones((3, 1))
    saved = np.zeros((2, 1)), np.full((2, 1), np.inf)
    _, dweight, _ = bnfast.ghost_batch_norm_backward(dy, x, 2, *saved)
    assert not np.isfinite(dweight).any()
