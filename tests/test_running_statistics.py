"""Running statistics: momentum, bias, dtypes, and what leaves them alone."""

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from tolerances import CLOSE_F64, ROUNDED_F32, RUNNING, eps_of


def statistics(channels, dtype):
    return np.linspace(-1, 1, channels).astype(dtype), np.linspace(1, 2, channels).astype(dtype)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0, 1.5, -0.1, -1.2])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("buffer_dtype", [np.float32, np.float64])
def test_the_update_is_the_formula(isa, dtype, rng, axis, momentum, unbiased, buffer_dtype):
    x = rng.normal(3, 2, (5, 6, 4)).astype(dtype)
    mean, var = statistics(x.shape[axis], buffer_dtype)
    expected = reference.update_running(mean, var, x, momentum, axis=axis, unbiased=unbiased)
    bnfast.batch_norm(x, mean, var, training=True, momentum=momentum, axis=axis, unbiased=unbiased)
    eps = RUNNING * max(eps_of(buffer_dtype), eps_of(dtype) if dtype == np.float32 else 0)
    np.testing.assert_allclose(mean, expected[0], rtol=eps, atol=eps * 10)
    np.testing.assert_allclose(var, expected[1], rtol=eps, atol=eps * 20)


def test_zero_momentum_leaves_them_alone(dtype, rng):
    mean, var = statistics(6, dtype)
    kept = mean.copy(), var.copy()
    bnfast.batch_norm(rng.normal(size=(5, 6)).astype(dtype), mean, var, training=True, momentum=0)
    np.testing.assert_array_equal(mean, kept[0])
    np.testing.assert_array_equal(var, kept[1])


def test_momentum_one_is_the_batch(rng):
    x = rng.normal(size=(50, 6))
    mean, var = statistics(6, np.float64)
    bnfast.batch_norm(x, mean, var, training=True, momentum=1.0)
    np.testing.assert_allclose(mean, x.mean(0), rtol=CLOSE_F64)
    np.testing.assert_allclose(var, x.var(0, ddof=1), rtol=CLOSE_F64)


def test_evaluation_leaves_them_alone(dtype, rng, axis):
    mean, var = statistics(6, dtype)
    kept = mean.copy(), var.copy()
    bnfast.batch_norm(rng.normal(size=(5, 6, 6)).astype(dtype), mean, var, axis=axis)
    np.testing.assert_array_equal(mean, kept[0])
    np.testing.assert_array_equal(var, kept[1])


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 3), (4, 6, 0)])
def test_an_empty_batch_leaves_them_alone(dtype, shape):
    mean, var = statistics(6, dtype)
    kept = mean.copy(), var.copy()
    y = bnfast.batch_norm(np.empty(shape, dtype), mean, var, training=True, momentum=1.0)
    assert y.shape == shape
    np.testing.assert_array_equal(mean, kept[0])
    np.testing.assert_array_equal(var, kept[1])


def test_training_works_without_them(dtype, rng):
    x = rng.normal(size=(5, 6, 3)).astype(dtype)
    y = bnfast.batch_norm(x, None, None, training=True)
    np.testing.assert_array_equal(y, bnfast.batch_norm_forward(x)[0])


def test_two_values_a_channel_are_enough(dtype, rng):
    x = np.array([[1.0, 5.0], [3.0, 5.0]], dtype)
    mean, var = np.zeros(2, dtype), np.zeros(2, dtype)
    bnfast.batch_norm(x, mean, var, training=True, momentum=1.0)
    np.testing.assert_array_equal(mean, [2.0, 5.0])
    np.testing.assert_array_equal(var, [2.0, 0.0])


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_large_mean_does_not_spoil_the_running_variance(isa, rng, axis, offset):
    x = rng.normal(offset, 1, (20, 30, 30)).astype(np.float32)
    mean, var = np.zeros(30, np.float32), np.zeros(30, np.float32)
    bnfast.batch_norm(x, mean, var, training=True, momentum=1.0, axis=axis)
    axes = (0, 2) if axis == 1 else (0, 1)
    np.testing.assert_allclose(var, x.astype(np.float64).var(axes, ddof=1), rtol=ROUNDED_F32)
