"""Spectral norm: values, gradients, PyTorch's conventions, what is refused, the layer."""

import math

import numpy as np
import pytest

import bnfast
from bnfast import SpectralNorm
from bnfast import _reference as reference
from oracle import WIDE, central_differences, close, close_to_largest
from tolerances import FINITE_DIFFERENCES, INPUT_GRADIENT, POWER_ITERATIONS, eps_of


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_weights_of_zero_are_divided_by_eps(dtype, rng, steps, v_first):
    w, dy = np.zeros((2, 3), dtype), rng.normal(size=(2, 3)).astype(dtype)
    y, sigma, u, v = bnfast.spectral_norm_forward(
        *(w, np.ones(2), np.ones(3), steps, 1e-3), v_first=v_first
    )
    assert sigma == 0
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_array_equal((*u, *v), 1)
    dw = bnfast.spectral_norm_backward(dy, w, sigma, u, v, 1e-3)
    np.testing.assert_allclose(dw, 1e3 * dy, rtol=2 * eps_of(dtype))
    without = bnfast.spectral_norm(w, u, v, steps, 0.0, v_first=v_first)
    assert np.isnan(without).all()


def test_a_sigma_of_zero_is_limited_by_eps_times_the_size_of_the_weights(dtype):
    w, apart = np.diag([2.0**-60, 0.0]).astype(dtype), np.array([0.0, 1.0])
    y, sigma, u, v = bnfast.spectral_norm_forward(w, apart, apart, 0, 2.0**-20)
    assert sigma == 0
    np.testing.assert_array_equal(y, np.diag([2.0**19, 0.0]))  # the largest is 0.5 * 2**-59
    dw = bnfast.spectral_norm_backward(y, w, sigma, u, v, 2.0**-20)
    np.testing.assert_array_equal(dw, np.diag([2.0**98, 0.0]))


# Of normal values: what they become stays within the range, to the last bit.
SCALES = {"f32": (-100, -50, 50, 120), "f64": (-1000, -600, -530, -100, 505, 600, 1000)}


@pytest.mark.parametrize("eps", [1e-12, 0.0])
@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("steps", [0, 2])
def test_spectral_norm_has_the_same_bits_at_any_scale(dtype, rng, steps, dim, v_first, eps):
    w, dy = rng.normal(size=(2, 4, 5, 3)).astype(dtype)
    u, v = rng.normal(size=w.shape[dim]), rng.normal(size=w.size // w.shape[dim])
    options = {"dim": dim, "v_first": v_first}
    y, sigma, *vectors = bnfast.spectral_norm_forward(w, u, v, steps, eps, **options)
    dw = bnfast.spectral_norm_backward(dy, w, sigma, *vectors, eps, dim=dim)
    for power in SCALES["f32" if dtype == np.float32 else "f64"]:
        scaled = np.ldexp(w, power)
        out = scaled.copy()
        got, length, *improved = bnfast.spectral_norm_forward(
            *(out, u, v, steps, eps), **options, out=out
        )
        np.testing.assert_array_equal(got, y)
        assert length == float(np.ldexp(sigma, power))
        np.testing.assert_array_equal(np.concatenate(improved), np.concatenate(vectors))
        gradient = bnfast.spectral_norm_backward(dy, scaled, length, *improved, eps, dim=dim)
        exact = np.ldexp(dw, -power)
        tolerance = INPUT_GRADIENT * eps_of(dtype) * np.abs(exact).max()
        np.testing.assert_allclose(gradient, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e-13, 1e100, 1e160, 1e300])
def test_the_spectral_norm_is_one_whatever_it_was(rng, size):
    w = size * rng.normal(size=(5, 7))
    y = bnfast.spectral_norm(w, rng.normal(size=5), rng.normal(size=7), 100)
    np.testing.assert_allclose(np.linalg.svd(y)[1][0], 1, rtol=1e-9)


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_spectral_norm_is_the_reference(dtype, rng, dim, v_first, steps):
    w, dy = rng.normal(size=(2, 5, 4, 3)).astype(dtype)
    rows = w.shape[dim]
    u, v = rng.normal(size=rows).astype(dtype), rng.normal(size=w.size // rows).astype(dtype)
    before = u.copy(), v.copy()
    y, *saved = bnfast.spectral_norm_forward(w, u, v, steps, dim=dim, v_first=v_first)
    np.testing.assert_array_equal((*u, *v), np.concatenate(before))
    expected, *saved_wide = reference.spectral_norm_forward(
        w, u, v, steps, dim=dim, v_first=v_first, precision=WIDE
    )
    close(y, expected, dtype)
    for statistic, exact in zip(saved, saved_wide, strict=True):
        close(statistic, np.asarray(exact, np.float64))
    assert isinstance(saved[0], float) and saved[1].dtype == saved[2].dtype == np.float64
    dw = bnfast.spectral_norm_backward(dy, w, *saved, dim=dim)
    gradient = reference.spectral_norm_backward(dy, w, *saved_wide, dim=dim, precision=WIDE)
    close_to_largest(dw, gradient, dtype)
    sigma, *vectors = saved
    rounded = [vector.astype(np.float32) for vector in vectors]
    close_to_largest(
        bnfast.spectral_norm_backward(dy, w, np.float32(sigma), *rounded, dim=dim),
        *(gradient, np.float32),
    )


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_spectral_norm_of_weights_larger_than_a_piece(dtype, rng, monkeypatch, dim, v_first):
    monkeypatch.setattr("bnfast.functional.spectral._PIECE_ELEMENTS", 30)
    w = rng.normal(size=(7, 5, 3)).astype(dtype)[::-1]
    dy = rng.normal(size=w.shape).astype(dtype)
    u, v = rng.normal(size=w.shape[dim]), rng.normal(size=w.size // w.shape[dim])
    y, *saved = bnfast.spectral_norm_forward(w, u, v, 2, dim=dim, v_first=v_first)
    expected, *saved_wide = reference.spectral_norm_forward(w, u, v, 2, dim=dim, v_first=v_first)
    close(y, expected, dtype)
    dw = bnfast.spectral_norm_backward(dy, w, *saved, dim=dim)
    close(dw, reference.spectral_norm_backward(dy, w, *saved_wide, dim=dim), dtype)


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_spectral_norm_finds_the_largest_singular_value(dtype, rng, dim, v_first):
    w = rng.normal(size=(5, 4, 3)).astype(dtype)
    rows = w.shape[dim]
    u, v = rng.normal(size=rows), rng.normal(size=w.size // rows)
    matrix = np.moveaxis(w, dim, 0).reshape(rows, -1)
    y, sigma, left, right = bnfast.spectral_norm_forward(w, u, v, 300, dim=dim, v_first=v_first)
    close(sigma, np.linalg.norm(matrix.astype(np.float64), 2), np.float32)
    close(y, w / sigma, dtype)
    once = bnfast.spectral_norm_forward(w, left, right, 0, dim=dim, v_first=v_first)
    close(once[0], y, dtype)  # of BLAS's products, whose bits depend on where arrays begin
    np.testing.assert_array_equal(once[2], left)
    dw = bnfast.spectral_norm_backward(y, w, sigma, left, right, dim=dim)
    for out in (np.empty_like(w), y.copy(), w.copy()):
        dy, weights = (out if np.array_equal(out, a) else a for a in (y, w))
        got = bnfast.spectral_norm_backward(dy, weights, sigma, left, right, dim=dim, out=out)
        assert got is out
        close(out, dw, dtype)
    for out in (np.empty_like(w), w.copy()):
        weights = out if np.array_equal(out, w) else w
        assert (
            bnfast.spectral_norm_forward(
                weights, left, right, 0, dim=dim, v_first=v_first, out=out
            )[0]
            is out
        )
        close(out, y, dtype)
    assert bnfast.spectral_norm(w, left, right, 0, dim=dim, v_first=v_first, out=w) is w
    close(w, y, dtype)


@pytest.mark.parametrize("v_first", [False, True])
def test_spectral_norm_improves_its_vectors_in_place(dtype, rng, v_first):
    w = rng.normal(size=(5, 4, 3))
    u, v = rng.normal(size=5).astype(dtype), rng.normal(size=24)[::2]  # v has strides
    for steps in (1, 2):
        y, _, *improved = bnfast.spectral_norm_forward(w, u, v, steps, v_first=v_first)
        np.testing.assert_array_equal(bnfast.spectral_norm(w, u, v, steps, v_first=v_first), y)
        for vector, expected in zip((u, v), improved, strict=True):
            np.testing.assert_array_equal(vector, expected.astype(vector.dtype))
    before = u.copy()
    u.flags.writeable = False  # and need not be
    bnfast.spectral_norm(w, u, v, 0)
    np.testing.assert_array_equal(u, before)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_weights_that_have_no_singular_vectors_leave_those_given(rng, bad):
    w = np.full((3, 4), bad)
    u, v = rng.normal(size=3), rng.normal(size=4)
    before = u.copy(), v.copy()
    y = bnfast.spectral_norm(w, u, v)
    np.testing.assert_array_equal(y, 0) if bad == 0 else np.testing.assert_array_equal(y, np.nan)
    np.testing.assert_array_equal((*u, *v), np.concatenate(before))


@pytest.mark.parametrize("dim", [0, 1])
def test_gradient_of_spectral_norm(rng, dim):
    w, dy = rng.normal(size=(2, 3, 4, 2))
    rows = w.shape[dim]
    u, v = rng.normal(size=rows), rng.normal(size=w.size // rows)
    _, sigma, u, v = bnfast.spectral_norm_forward(w, u, v, 3, dim=dim)
    gradient = bnfast.spectral_norm_backward(dy, w, sigma, u, v, dim=dim)
    numeric = central_differences(lambda: (bnfast.spectral_norm(w, u, v, 0, dim=dim) * dy).sum(), w)
    np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


def test_spectral_norm_of_weights_with_nan_has_a_gradient_of_nan(dtype):
    w = np.ones((3, 4), dtype)
    w[0, 0] = np.nan
    y, sigma, u, v = bnfast.spectral_norm_forward(w, np.ones(3), np.ones(4))
    assert np.isnan(y).all() and np.isnan(sigma)
    assert np.isnan(bnfast.spectral_norm_backward(y, w, sigma, u, v)).all()


@pytest.mark.parametrize("size", [3e38, 1e-45])
def test_spectral_norm_at_the_ends_of_the_range(size):
    w = np.full((3, 3), size, np.float32)
    y, *saved = bnfast.spectral_norm_forward(w, np.ones(3), np.ones(3), eps=0.0)
    np.testing.assert_array_equal(y, np.full((3, 3), 1 / 3, np.float32))
    dy = np.float32(size) * np.eye(3, dtype=np.float32)
    dw = bnfast.spectral_norm_backward(dy, w, *saved)
    np.testing.assert_allclose(dw, (np.eye(3) - 1 / 3) / 3, rtol=1e-6)


def test_the_gradient_of_spectral_norm_is_held_where_a_factor_of_it_is_not():
    w, dy = np.full((1, 10_000), 1e-36, np.float32), np.full((1, 10_000), 1e3, np.float32)
    _, *saved = bnfast.spectral_norm_forward(w, np.ones(1), np.ones(10_000), eps=0.0)
    dw = bnfast.spectral_norm_backward(dy, w, *saved)
    assert np.abs(dw).max() <= 1e-6 * 1e3 / saved[0]  # of two terms that cancel


@pytest.mark.parametrize(("shape", "dim"), [((0, 4), 0), ((4, 0), 0), ((4, 0, 2), 1)])
def test_spectral_norm_of_nothing_is_nothing(shape, dim):
    w, rows = np.ones(shape), shape[dim]
    columns = math.prod(shape[:dim] + shape[dim + 1 :])
    u, v = np.ones(rows), np.ones(columns)
    y, sigma, *improved = bnfast.spectral_norm_forward(w, u, v, dim=dim)
    assert y.shape == shape and sigma == 0
    for vector, given in zip(improved, (u, v), strict=True):
        np.testing.assert_array_equal(vector, given)
    assert bnfast.spectral_norm_backward(y, w, sigma, u, v, dim=dim).shape == shape
    layer = bnfast.SpectralNorm(w, dim=dim)
    assert layer(w).shape == shape and layer.backward(w).shape == shape
    assert (layer.u.shape, layer.v.shape) == ((rows,), (columns,))
    with pytest.raises(ValueError, match=f"v must have one value for each of the {columns} col"):
        bnfast.spectral_norm(w, u, np.ones(columns + 1), dim=dim)


W = np.arange(12, dtype=np.float32).reshape(3, 4)
U, V, UNIT = np.ones(3, np.float32), np.ones(4, np.float32), np.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bnfast.spectral_norm(W, V, U), ValueError, "u must have one value for each of"),
        (
            lambda: bnfast.spectral_norm_forward(W, U, V, out=W[:2]),
            *(ValueError, "out must have the shape and dtype of w"),
        ),
        (
            lambda: bnfast.spectral_norm_backward(W[:2], W, 1.0, U, V),
            *(ValueError, "dy must have the shape and dtype of w"),
        ),
        (
            lambda: bnfast.spectral_norm(W, U, V, -1),
            *(ValueError, "n_power_iterations must be at least 0"),
        ),
        (lambda: bnfast.spectral_norm(W, U, V, dim=2), ValueError, "dim must be from -2 to 1"),
        (lambda: bnfast.spectral_norm(W, None, V), TypeError, "u must be an array of shape"),
        (
            lambda: bnfast.spectral_norm(W, U, [1.0] * 4),
            *(TypeError, "v is updated in place and must be a numpy array"),
        ),
        (
            lambda: bnfast.spectral_norm(np.ones((3, 3)), UNIT, UNIT),
            *(ValueError, "u and v must not share memory"),
        ),
        (
            lambda: bnfast.spectral_norm(W, U, W[1]),
            *(ValueError, "v is updated in place and must not share memory with w"),
        ),
        (
            lambda: bnfast.spectral_norm_forward(W, U, V, eps=None),
            *(TypeError, "eps must be a real number"),
        ),
        (
            lambda: bnfast.spectral_norm_backward(W, W, None, U, V),
            *(TypeError, "sigma must be a real number"),
        ),
        (
            lambda: bnfast.spectral_norm_backward(W, W, 1.0, V, U),
            *(ValueError, "u must have one value for each of the 3"),
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["eps", "n_power_iterations", "dim"])
def test_what_is_refused_leaves_all_as_it_was(name):
    out, u, v = np.full_like(W, 7), U.copy(), V.copy()
    with pytest.raises((TypeError, ValueError), match=f"{name} must"):
        bnfast.spectral_norm(W, u, v, out=out, **{name: "no"})
    np.testing.assert_array_equal(out, 7)
    with pytest.raises(ValueError, match="out must have the shape"):
        bnfast.spectral_norm(W, u, v, out=out[:2])
    np.testing.assert_array_equal((*u, *v), 1)


SHAPE = (4, 3, 2, 3)


LAYERS = {
    "spectral": SpectralNorm,
    "spectral, transposed": lambda w: SpectralNorm(w, 2, dim=1, v_first=True, rng=3),
}


def weights(rng, dtype=np.float64):
    return rng.normal(1, 2, SHAPE).astype(dtype)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("power", [-100, -43, 100])
def test_spectral_norm_is_the_same_layer_at_any_scale(dtype, rng, name, power):
    w, dy = rng.normal(size=(2, *SHAPE)).astype(dtype)
    layer, scaled = LAYERS[name](w), LAYERS[name](np.ldexp(w, power))
    for _ in range(3):
        y, got = layer(w), scaled(np.ldexp(w, power))
    np.testing.assert_array_equal(got, y)
    np.testing.assert_equal(scaled.state_dict(), layer.state_dict())
    dw, gradient = np.ldexp(layer.backward(dy), -power), scaled.backward(dy)
    tolerance = INPUT_GRADIENT * eps_of(dtype) * np.abs(dw).max()
    np.testing.assert_allclose(gradient, dw, rtol=0, atol=tolerance)


def test_weights_that_begin_as_zeros_are_normalized_once_there_are_some(dtype, rng):
    w = weights(rng, dtype)
    layer = SpectralNorm(np.zeros_like(w), 30, 1e-3)
    np.testing.assert_array_equal(layer(np.zeros_like(w)), 0)
    np.testing.assert_allclose(layer.backward(w), 1e3 * w, rtol=2 * eps_of(dtype))
    y = layer(w).reshape(SHAPE[0], -1)
    np.testing.assert_allclose(np.linalg.svd(y)[1][0], 1, rtol=POWER_ITERATIONS)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_only_training_improves_the_singular_vectors(rng, dim):
    w = rng.normal(size=(5, 4, 6))
    layer = SpectralNorm(w, dim=dim).eval()
    before = layer.state_dict()
    layer(w)
    np.testing.assert_equal(layer.state_dict(), before)
    w = rng.normal(size=w.shape)  # other singular vectors, to be found by and by
    largest = np.linalg.norm(np.moveaxis(w, dim, 0).reshape(w.shape[dim], -1), 2)
    layer.train()
    for _ in range(300):
        y = layer(w)
    np.testing.assert_allclose(y, w / largest, rtol=1e3 * eps_of(np.float64))
    assert np.abs(layer.u - before["_u"]).max() > 0.01


def test_singular_vectors_are_drawn_with_a_seed(rng):
    w = weights(rng)
    for a, b, same in ((0, 0, True), (0, 1, False), (np.random.default_rng(0), 0, True)):
        states = [SpectralNorm(w, rng=seed).state_dict()["_u"] for seed in (a, b)]
        assert np.array_equal(*states) == same


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_weights_that_have_no_singular_vectors_leave_those_there_are(rng, bad):
    w = weights(rng)
    hopeless = np.full_like(w, bad)
    layer = SpectralNorm(w)
    before = layer.state_dict()
    np.testing.assert_array_equal(layer(hopeless), 0.0 if bad == 0 else np.nan)
    np.testing.assert_equal(layer.state_dict(), before)
    begun = SpectralNorm(hopeless)
    assert np.isfinite(begun(w)).all()


def test_a_layer_refuses_weights_of_half_precision(rng):
    w = rng.normal(size=(4, 3)).astype(np.float32)
    with pytest.raises(TypeError, match="w must be float32 or float64"):
        bnfast.SpectralNorm(w)(w.astype(np.float16))
