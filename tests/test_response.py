"""Filter response normalization, and its threshold."""

import math

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from cases import BUFFERS, in_layout
from oracle import WIDE, assert_within, central_differences
from tolerances import (
    EQUAL_SUMS,
    FINITE_DIFFERENCES,
    GRADIENT_SUMS,
    INPUT_GRADIENT,
    MOMENTS,
    OUTPUT,
    eps_of,
)

# (batch, channels, ...): around lanes and lines, one sample, one channel, one value for each
# channel of each sample, rows of few channels, planes that are cut into chunks and blocks.
SEVERAL_BLOCKS = (2, 2, 140000)
SHAPES = [
    *[(3, 6, 7, 7), (2, 4, 30, 30), (5, 1, 3), (1, 1, 40), (4, 32), (2, 70, 49), (20, 33, 5)],
    *[(2, 4, inner) for inner in (1, 2, 15, 16, 17, 63, 64, 65, 129)],
    *[(2, 3, 70, 70), SEVERAL_BLOCKS, (700, 2, 3), (1, 300)],
]


def inputs(rng, shape, axis, dtype, mean=0.3):
    x = in_layout(rng.normal(mean, 2, shape).astype(dtype), axis)
    dy = in_layout(rng.normal(size=shape).astype(dtype), axis)
    weight, bias = rng.normal(size=(2, shape[1])).astype(dtype)
    tau = rng.normal(0, 0.5, shape[1]).astype(dtype)
    return x, dy, {"weight": weight, "bias": bias, "tau": tau}


def axes_of(x, axis):
    return tuple(d for d in range(1, x.ndim) if d != axis % x.ndim)


def check(x, dy, parameters, axis, learned_eps=None, out=None, dx_out=None):
    """Forward and backward against the reference, at the same kept elements."""
    learned = {} if learned_eps is None else {"learned_eps": learned_eps}
    z, invrms = bnfast.filter_response_norm_forward(x, **parameters, **learned, axis=axis, out=out)
    expected, y, inverse = reference.filter_response_norm(
        x, **parameters, **learned, axis=axis, precision=WIDE
    )
    eps = eps_of(x.dtype)
    assert z.dtype == x.dtype and invrms.dtype == np.float64
    assert_within(z, expected, OUTPUT * eps * (np.abs(y).max() + 1))
    assert_within(invrms, inverse, 4 * MOMENTS * eps * inverse)

    got = bnfast.filter_response_norm_backward(
        dy, x, invrms, **parameters, **learned, axis=axis, out=dx_out
    )
    weight, tau = parameters.get("weight"), parameters.get("tau")
    # What is next to the threshold may be kept or not, by a rounding: as z says.
    shape = [1] * x.ndim
    shape[axis] = -1
    if tau is not None:
        y = np.where(z == tau.reshape(shape), -np.inf, np.inf)
    dx, dweight, dbias, dtau, deps = reference.filter_response_norm_backward(
        dy, x, y, invrms, weight, tau, axis=axis, precision=WIDE
    )
    axes = axes_of(x, axis)
    gamma = np.ones(x.shape[axis]) if weight is None else np.abs(weight)
    wide = np.expand_dims(invrms, axes)
    largest = np.abs(dy).max(axes, keepdims=True) * gamma.reshape(shape) * wide
    xhat = np.abs(x * wide)
    every, sums = (0, *axes), GRADIENT_SUMS * eps
    assert_within(got[0], dx, INPUT_GRADIENT * eps * largest * (1 + xhat.max()))
    assert_within(got[1], dweight, sums * (np.abs(dy) * xhat).sum(every))
    assert_within(got[2], dbias, sums * np.abs(dy).sum(every))
    if tau is None:
        assert got[3] is None
    else:
        assert_within(got[3], dtau, sums * np.abs(dy).sum(every))
    if learned_eps is None:
        assert got[4] is None
    else:
        most = sums * gamma * (np.abs(dy) * xhat * wide**2).sum(every)
        deps, most = np.sign(learned_eps) * deps, most
        if len(learned_eps) == 1:
            deps, most = deps.sum(keepdims=True), most.sum(keepdims=True)
        assert_within(got[4], deps, most)
    return z, invrms, *got[:4]


def check_values(dtype, rng, axis, shape):
    x, dy, parameters = inputs(rng, shape, axis, dtype)
    check(x, dy, parameters, axis)
    check(x, dy, parameters, axis, rng.normal(size=shape[1]).astype(dtype))
    check(x, dy, {}, axis, rng.normal(size=1).astype(dtype))
    check(x, dy, {"tau": parameters["tau"]}, axis)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s != SEVERAL_BLOCKS], ids=str)
def test_values(isa, dtype, rng, axis, shape):
    check_values(dtype, rng, axis, shape)


# Of one instruction set: long double is slow, and the others have the same bits (below).
def test_values_of_several_blocks(dtype, rng, axis):
    check_values(dtype, rng, axis, SEVERAL_BLOCKS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_threads_caches_and_instruction_sets_change_no_bit(
    dtype, rng, assert_same_bits_everywhere, axis, shape
):
    x, dy, parameters = inputs(rng, shape, axis, dtype)

    def everything():
        z, invrms = bnfast.filter_response_norm_forward(x, **parameters, axis=axis)
        gradients = bnfast.filter_response_norm_backward(dy, x, invrms, **parameters, axis=axis)
        return z, invrms, *gradients[:4]

    assert_same_bits_everywhere(everything)


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("shape", [(3, 6, 7, 11), (4, 6, 2, 3, 5), (5, 6)], ids=str)
def test_any_strides(isa, dtype, rng, axis, buffer, shape):
    x, dy, parameters = inputs(rng, shape, axis, dtype)
    make = BUFFERS[buffer]
    out, dx_out = (make(np.zeros_like(x)) for _ in range(2))
    check(make(x), make(dy), parameters, axis, None, out, dx_out)


def test_in_place(isa, dtype, rng, axis):
    x, dy, parameters = inputs(rng, (3, 6, 9, 9), axis, dtype)
    z, invrms = bnfast.filter_response_norm_forward(x, **parameters, axis=axis)
    backward = bnfast.filter_response_norm_backward
    expected = backward(dy, x, invrms, **parameters, axis=axis)
    for into in ("dy", "x"):
        given = {"dy": dy.copy(), "x": x.copy()}
        got = backward(**given, invrms=invrms, **parameters, axis=axis, out=given[into])
        assert got[0] is given[into]
        for a, b in zip(got[:4], expected[:4], strict=True):
            np.testing.assert_array_equal(a, b)
    assert bnfast.filter_response_norm(x, **parameters, axis=axis, out=x) is x
    np.testing.assert_array_equal(x, z)


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 2, 2, 2), (3, 2), (4, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["one eps", "an eps each"])
def test_gradients_are_those_of_central_differences(rng, axis, shape, shared):
    x, dy, parameters = inputs(rng, shape, axis, np.float64)
    learned = rng.uniform(-1, 1, 1 if shared else shape[1])

    def loss():
        z = bnfast.filter_response_norm(x, **parameters, learned_eps=learned, axis=axis)
        return (z * dy).sum()

    _, invrms = bnfast.filter_response_norm_forward(x, **parameters, learned_eps=learned, axis=axis)
    gradients = bnfast.filter_response_norm_backward(
        dy, x, invrms, **parameters, learned_eps=learned, axis=axis
    )
    for array, gradient in zip((x, *parameters.values(), learned), gradients, strict=True):
        numeric = central_differences(loss, array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


def test_gradients_are_those_of_pytorch(rng, axis):
    torch = pytest.importorskip("torch")
    x, dy, parameters = inputs(rng, (4, 5, 6, 3), axis, np.float64)
    learned = rng.uniform(-1, 1, 5)
    leaves = [torch.tensor(a, requires_grad=True) for a in (x, *parameters.values(), learned)]
    tx, weight, bias, tau, eps = leaves
    turned = tx.movedim(axis, 1)
    nu2 = turned.square().mean((2, 3), keepdim=True)
    of = (1, 5, 1, 1)
    xhat = turned * torch.rsqrt(nu2 + 1e-6 + eps.abs().reshape(of))
    y = xhat * weight.reshape(of) + bias.reshape(of)
    z = torch.where(y >= tau.reshape(of), y, tau.reshape(of)).movedim(1, axis)
    z.backward(torch.tensor(dy))
    got, invrms = bnfast.filter_response_norm_forward(
        x, **parameters, learned_eps=learned, axis=axis
    )
    gradients = bnfast.filter_response_norm_backward(
        dy, x, invrms, **parameters, learned_eps=learned, axis=axis
    )
    eps64 = eps_of(np.float64)
    assert_within(got, z.detach().numpy(), OUTPUT * eps64 * np.abs(got).max())
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert_within(gradient, leaf.grad.numpy(), FINITE_DIFFERENCES)


def test_at_the_threshold_the_gradient_goes_to_y(dtype, axis):
    x = in_layout(np.array([[[2.0, -2.0, 2.0, -2.0]]], dtype), axis)
    tau, dy = np.zeros(1, dtype), np.ones_like(x)
    none = np.zeros(1, dtype)  # a weight of 0: every y is at the threshold
    z, invrms = bnfast.filter_response_norm_forward(x, none, None, tau, axis=axis)
    gradients = bnfast.filter_response_norm_backward(dy, x, invrms, none, None, tau, axis=axis)
    np.testing.assert_array_equal(z, np.zeros_like(x))
    assert gradients[2] == 4 and gradients[3] == 0


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_specials_stay_in_their_channel_and_sample(isa, dtype, rng, axis, special):
    x, dy, parameters = inputs(rng, (3, 4, 7, 7), axis, dtype)

    def everything():
        z, invrms = bnfast.filter_response_norm_forward(x, **parameters, axis=axis)
        gradients = bnfast.filter_response_norm_backward(dy, x, invrms, **parameters, axis=axis)
        return [np.moveaxis(a, axis, 1) for a in (z, gradients[0])]

    clean = everything()
    np.moveaxis(x, axis, 1)[1, 2, 3, 3] = special
    spoiled = everything()
    others = np.ones((3, 4), bool)
    others[1, 2] = False
    for a, b in zip(spoiled, clean, strict=True):
        np.testing.assert_array_equal(a[others], b[others])
    assert np.isnan(spoiled[0][1, 2, 3, 3])


def test_a_threshold_that_is_nan_makes_its_channel_nan(dtype, rng, axis):
    x, _, parameters = inputs(rng, (2, 3, 9), axis, dtype)
    clean = bnfast.filter_response_norm(x, **parameters, axis=axis)
    parameters["tau"][1] = np.nan
    z = np.moveaxis(bnfast.filter_response_norm(x, **parameters, axis=axis), axis, 1)
    assert np.isnan(z[:, 1]).all()
    np.testing.assert_array_equal(z[:, [0, 2]], np.moveaxis(clean, axis, 1)[:, [0, 2]])


def test_no_threshold_is_the_lowest_one(dtype, rng, axis):
    x, _, parameters = inputs(rng, (2, 3, 9, 9), axis, dtype)
    parameters["tau"][:] = -np.inf
    z = bnfast.filter_response_norm(x, **parameters, axis=axis)
    del parameters["tau"]
    np.testing.assert_array_equal(z, bnfast.filter_response_norm(x, **parameters, axis=axis))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (0, 4), (3, 0, 2)], ids=str)
def test_an_empty_batch_gives_an_empty_array(dtype, shape):
    x, tau = np.empty(shape, dtype), np.zeros(shape[1], dtype)
    z, invrms = bnfast.filter_response_norm_forward(x, tau=tau)
    assert z.shape == shape and invrms.shape == shape[:2]
    gradients = bnfast.filter_response_norm_backward(
        x, x, invrms, tau=tau, learned_eps=np.ones(1, dtype)
    )
    assert gradients[0].shape == shape
    for gradient in gradients[1:4]:
        np.testing.assert_array_equal(gradient, np.zeros(shape[1]))
    np.testing.assert_array_equal(gradients[4], [0])


def test_one_learned_eps_may_come_as_a_list(dtype, rng, axis):
    x, _, parameters = inputs(rng, (2, 3, 9), axis, dtype)
    z = bnfast.filter_response_norm(x, **parameters, learned_eps=[0.5], axis=axis)
    expected = bnfast.filter_response_norm(x, **parameters, learned_eps=np.full(3, 0.5), axis=axis)
    np.testing.assert_array_equal(z, expected)


X = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
TAU, INVRMS = np.zeros(4, np.float32), np.ones((2, 4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bnfast.filter_response_norm(X, axis=0), ValueError, "axis must not be 0"),
        (lambda: bnfast.filter_response_norm(X, eps=0.0), ValueError, "eps must be positive"),
        (
            lambda: bnfast.filter_response_norm(X, tau=TAU[:3]),
            *(ValueError, "tau must have one value for each of the 4"),
        ),
        (
            lambda: bnfast.filter_response_norm(X, learned_eps=TAU[:2]),
            *(ValueError, "learned_eps must have one value for each of the 4"),
        ),
        (
            lambda: bnfast.filter_response_norm(X, learned_eps=1e-4),
            *(ValueError, "learned_eps must have one value for each of the 4"),
        ),
        (
            lambda: bnfast.filter_response_norm(X, tau=X.ravel()[:4], out=X),
            *(ValueError, "out must not share memory with tau"),
        ),
        (
            lambda: bnfast.filter_response_norm_backward(X, X, INVRMS[0]),
            *(ValueError, r"invrms must be as forward returned it, shape \(2, 4\)"),
        ),
        (
            lambda: bnfast.filter_response_norm_backward(X[0], X, INVRMS),
            *(ValueError, "dy must have the shape and dtype of x"),
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("axis", [1, -1], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("values", [15, 17, 3104, 100_000])
def test_the_gradient_of_a_threshold_is_exact_for_equal_values(isa, values, axis):
    # Equal values round alike in every addition: summed one after the other, 4e-13 were off.
    dy = in_layout(np.full((1, 3, values), 1.1), axis)
    dtau = bnfast.filter_response_norm_backward(
        *(dy, -np.ones_like(dy), np.ones((1, 3)), None, None, np.zeros(3)), axis=axis
    )[3]
    exact = math.fsum([1.1] * values)
    np.testing.assert_allclose(dtau, exact, rtol=EQUAL_SUMS * eps_of(np.float64))
