"""Gradients by central differences in float64, and the identities they obey."""

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from tolerances import EQUAL_SUMS, FINITE_DIFFERENCES, eps_of

STEP = 1e-6
SHAPES = [(2, 3), (5, 2, 3), (2, 3, 2, 2), (3, 2, 2, 1, 2)]


def central_differences(loss, array):
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + STEP
        above = loss()
        array[index] = kept - STEP
        below = loss()
        array[index] = kept
        gradient[index] = (above - below) / (2 * STEP)
    return gradient


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training_gradients_are_those_of_the_forward_pass(isa, rng, axis, shape):
    x, dy = rng.normal(size=(2, *shape))
    weight, bias = rng.normal(size=(2, shape[axis]))

    def loss():
        return (dy * bnfast.batch_norm_forward(x, weight, bias, axis=axis)[0]).sum()

    _, mean, invstd = bnfast.batch_norm_forward(x, weight, bias, axis=axis)
    dx, dweight, dbias = bnfast.batch_norm_backward(dy, x, mean, invstd, weight, axis=axis)
    for got, array in ((dx, x), (dweight, weight), (dbias, bias)):
        expected = central_differences(loss, array)
        size = 1 + np.abs(expected).max()
        # With two values a channel invstd may be large, and the truncation error with it.
        np.testing.assert_allclose(
            got, expected, atol=FINITE_DIFFERENCES * size * invstd.max() ** 2
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_evaluation_gradients_are_those_of_the_forward_pass(isa, rng, axis, shape):
    x, dy = rng.normal(size=(2, *shape))
    weight, bias, mean = rng.normal(size=(3, shape[axis]))
    var = rng.uniform(0.5, 2, shape[axis])

    def loss():
        return (dy * bnfast.batch_norm(x, mean, var, weight, bias, axis=axis)).sum()

    dx, dweight, dbias = bnfast.batch_norm_backward(
        dy, x, mean, 1 / np.sqrt(var + 1e-5), weight, axis=axis, training=False
    )
    for got, array in ((dx, x), (dweight, weight), (dbias, bias)):
        expected = central_differences(loss, array)
        np.testing.assert_allclose(
            got, expected, atol=FINITE_DIFFERENCES * (1 + abs(expected).max())
        )


def test_the_reference_backward_is_the_derivative_of_the_reference_forward(rng):
    x, dy = rng.normal(size=(2, 4, 3, 5))
    weight, bias = rng.normal(size=(2, 3))

    def loss():
        return (dy * reference.batch_norm_forward(x, weight, bias)[0]).sum()

    _, mean, invstd = reference.batch_norm_forward(x, weight, bias)
    got = reference.batch_norm_backward(dy, x, mean, invstd, weight)
    for gradient, array in zip(got, (x, weight, bias), strict=True):
        np.testing.assert_allclose(gradient, central_differences(loss, array), atol=1e-7)


def test_the_input_gradient_sums_to_zero(isa, dtype, rng, axis):
    x, dy = rng.normal(size=(2, 6, 20, 20)).astype(dtype)
    _, mean, invstd = bnfast.batch_norm_forward(x, axis=axis)
    dx, _, _ = bnfast.batch_norm_backward(dy, x, mean, invstd, axis=axis)
    axes = (0, 2) if axis == 1 else (0, 1)
    total = dx.sum(axes, dtype=np.float64)
    assert np.abs(total).max() < 4 * eps_of(dtype) * np.abs(dx).sum(axes).max()


def test_a_constant_dy_has_no_input_gradient(isa, dtype, rng, axis):
    x = rng.normal(5, 2, (6, 20, 20)).astype(dtype)
    _, mean, invstd = bnfast.batch_norm_forward(x, axis=axis)
    dx, _, dbias = bnfast.batch_norm_backward(np.ones_like(x), x, mean, invstd, axis=axis)
    assert np.abs(dx).max() < 4 * eps_of(dtype)
    np.testing.assert_array_equal(dbias, 120)


def test_gradients_are_linear_in_dy(dtype, rng):
    x, a, b = rng.normal(size=(3, 4, 3, 7)).astype(dtype)
    _, mean, invstd = bnfast.batch_norm_forward(x)
    for training in (True, False):

        def gradients(dy, training=training):
            return bnfast.batch_norm_backward(dy, x, mean, invstd, training=training)

        for whole, first, second in zip(
            gradients(2 * a + b), gradients(a), gradients(b), strict=True
        ):
            np.testing.assert_allclose(whole, 2 * first + second, atol=500 * eps_of(dtype))


@pytest.mark.parametrize("samples", [3, 33, 1025, 4096])
def test_gradients_of_parameters_are_exact_for_equal_samples(isa, rng, axis, samples):
    # Equal values round alike: added one sample after the other, 1025 were 100 ulps off.
    x, dy = rng.normal(size=(2, 1, 40, 40))
    _, mean, invstd = bnfast.instance_norm_forward(x, axis=axis)
    one = bnfast.instance_norm_backward(dy, x, mean, invstd, axis=axis)
    many = [np.repeat(array, samples, 0) for array in (dy, x, mean, invstd)]
    for got, single in zip(
        bnfast.instance_norm_backward(*many, axis=axis)[1:], one[1:], strict=True
    ):
        np.testing.assert_allclose(got, samples * single, rtol=EQUAL_SUMS * eps_of(np.float64))
