"""Every kernel of every instruction set against the reference, on awkward sizes."""

import numpy as np
import pytest

import bnfast
from cases import batches, small_batches
from oracle import check_backward, check_forward, check_moments
from tolerances import CLOSE_F32, ROUNDED_F32


@pytest.mark.parametrize(("shape", "axis"), batches(), ids=str)
def test_moments_agree_with_the_reference(isa, dtype, rng, shape, axis):
    check_moments(rng.normal(3, 2, shape).astype(dtype), axis)


@pytest.mark.parametrize(("shape", "axis"), batches(), ids=str)
def test_forward_agrees_with_the_reference(isa, dtype, rng, shape, axis):
    x = rng.normal(3, 2, shape).astype(dtype)
    weight, bias = rng.normal(size=(2, shape[axis])).astype(dtype)
    check_forward(x, weight, bias, axis=axis)


@pytest.mark.parametrize(("shape", "axis"), batches(), ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_backward_agrees_with_the_reference(isa, dtype, rng, shape, axis, training):
    x = rng.normal(3, 2, shape).astype(dtype)
    dy = rng.normal(0.5, 1, shape).astype(dtype)
    weight = rng.normal(size=shape[axis]).astype(dtype)
    check_backward(dy, x, weight, axis, training)


@pytest.mark.parametrize(("shape", "axis"), batches(), ids=str)
def test_evaluation_is_the_formula_to_the_bit(isa, dtype, rng, shape, axis):
    x = rng.normal(3, 2, shape).astype(dtype)
    channels = shape[axis]
    mean, weight, bias = rng.normal(size=(3, channels)).astype(dtype)
    var = rng.uniform(0.5, 2, channels).astype(dtype)
    invstd = 1 / np.sqrt(var.astype(np.float64) + 1e-5)
    along = [1] * len(shape)
    along[axis] = channels
    scale = (weight.astype(np.float64) * invstd).astype(dtype).reshape(along)
    expected = (x - mean.reshape(along)) * scale + bias.reshape(along)
    np.testing.assert_array_equal(
        bnfast.batch_norm(x, mean, var, weight, bias, axis=axis), expected
    )


@pytest.mark.parametrize(("shape", "axis"), small_batches(), ids=str)
@pytest.mark.parametrize("given", ["both", "weight", "bias", "neither"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_weight_and_bias_are_each_optional(dtype, rng, shape, axis, given, training):
    x = rng.normal(3, 2, shape).astype(dtype)
    channels = shape[axis]
    mean, var = np.zeros(channels, dtype), np.ones(channels, dtype)
    weight, bias = rng.normal(size=(2, channels)).astype(dtype)
    if given in ("bias", "neither"):
        weight = np.ones_like(weight)
    if given in ("weight", "neither"):
        bias = np.zeros_like(bias)
    expected = bnfast.batch_norm(x, mean.copy(), var.copy(), weight, bias, training, axis=axis)
    y = bnfast.batch_norm(
        *(x, mean, var),
        weight if given in ("both", "weight") else None,
        bias if given in ("both", "bias") else None,
        *(training,),
        axis=axis,
    )
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("parameter_dtype", [np.float32, np.float64])
def test_parameters_of_either_dtype_for_data_of_either_dtype(isa, dtype, rng, parameter_dtype):
    x = rng.normal(3, 2, (4, 5, 9)).astype(dtype)
    dy = rng.normal(size=x.shape).astype(dtype)
    weight, bias = rng.normal(size=(2, 5)).astype(np.float32).astype(parameter_dtype)
    y = check_forward(x, weight, bias)
    same = bnfast.batch_norm_forward(x, weight.astype(np.float32), bias.astype(np.float64))[0]
    np.testing.assert_array_equal(y, same)
    check_backward(dy, x, weight)


def test_float32_mean_and_invstd_are_taken_by_backward(dtype, rng):
    x = rng.normal(3, 2, (4, 5, 9)).astype(dtype)
    dy = rng.normal(size=x.shape).astype(dtype)
    _, mean, invstd = bnfast.batch_norm_forward(x)
    narrow = bnfast.batch_norm_backward(dy, x, mean.astype(np.float32), invstd.astype(np.float32))
    wide = bnfast.batch_norm_backward(dy, x, mean, invstd)
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(a, b, atol=CLOSE_F32)


@pytest.mark.parametrize("ndim", range(2, 8))
def test_any_rank_and_any_channel_axis(isa, dtype, rng, ndim):
    shape = (3, 2, 4, 2, 3, 2, 2)[:ndim]
    x = rng.normal(3, 2, shape).astype(dtype)
    dy = rng.normal(size=shape).astype(dtype)
    for axis in range(-ndim, ndim):
        weight, bias = rng.normal(size=(2, shape[axis])).astype(dtype)
        check_moments(x, axis)
        check_forward(x, weight, bias, axis=axis)
        check_backward(dy, x, weight, axis)


def test_a_hand_computed_batch():
    x = np.array([[1.0, 10.0], [3.0, 30.0]], np.float32)
    y, mean, invstd = bnfast.batch_norm_forward(x, np.float32([2, 1]), np.float32([0, 5]), eps=3.0)
    np.testing.assert_array_equal(mean, [2.0, 20.0])
    np.testing.assert_array_equal(invstd, [0.5, 1 / np.sqrt(103.0)])
    np.testing.assert_array_equal(y[:, 0], [-1.0, 1.0])


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3), (3, 3, 0), (0, 3), (0,)])
def test_an_empty_batch_gives_an_empty_array(dtype, shape):
    x = np.empty(shape, dtype)
    channels = shape[1] if len(shape) > 1 else 0
    y, mean, invstd = bnfast.batch_norm_forward(x)
    assert y.shape == shape
    assert y.dtype == dtype
    assert mean.shape == invstd.shape == (channels,)
    assert np.isfinite(invstd).all()
    assert bnfast.moments(x).count == 0
    dx, dweight, dbias = bnfast.batch_norm_backward(x, x, mean, invstd)
    assert dx.shape == shape
    np.testing.assert_array_equal(dweight, np.zeros(channels))
    np.testing.assert_array_equal(dbias, np.zeros(channels))
    y = bnfast.batch_norm(x, np.zeros(channels), np.ones(channels))
    assert y.shape == shape


def test_more_values_than_an_int_can_count(rng):
    image = rng.normal(5, 1, (1, 2, 32768)).astype(np.float32)
    got = bnfast.moments(np.broadcast_to(image, (70000, 2, 32768)))
    assert got.count == 70000 * 32768 > 2**31
    np.testing.assert_allclose(got.mean, image.mean((0, 2), np.float64), rtol=1e-7)
    np.testing.assert_allclose(got.var, image.var((0, 2), np.float64), rtol=ROUNDED_F32)


def test_array_likes_are_accepted_as_input():
    class Wrapper:
        def __array__(self, dtype=None, copy=None):
            return np.array([[1.0], [3.0]])

    np.testing.assert_allclose(bnfast.batch_norm_forward(Wrapper())[0], [[-1], [1]], rtol=CLOSE_F32)
    np.testing.assert_allclose(
        bnfast.batch_norm_forward([[1.0], [3.0]])[0], [[-1], [1]], rtol=CLOSE_F32
    )
