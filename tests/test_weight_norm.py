"""Weight norm: values, gradients, the ends of the range, what is refused, the layer."""

import numpy as np
import pytest

import bnfast
from bnfast import WeightNorm
from bnfast import _reference as reference
from cases import BUFFERS, EXTREMES
from oracle import WIDE, central_differences, close, close_to_largest, of_scaled, other_axes
from tolerances import FINITE_DIFFERENCES, OUTPUT, eps_of

SHAPES = [(4, 3, 3, 3), (5, 7), (1, 40), (6, 1), (3, 2, 900)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm_gives_every_filter_its_length(isa, dtype, rng, shape, dim):
    v = rng.normal(3, 2, shape).astype(dtype)
    g = rng.normal(size=shape[dim]).astype(dtype)
    w, norm = bnfast.weight_norm_forward(v, g, dim)
    expected, lengths = reference.weight_norm_forward(v, g, dim, precision=WIDE)
    close(norm, lengths, dtype)
    close(w, expected, dtype)
    kept = np.expand_dims(g, other_axes(v, dim))
    np.testing.assert_array_equal(bnfast.weight_norm(v, kept, dim), w)
    dw = rng.normal(size=shape).astype(dtype)
    dv, dg = bnfast.weight_norm_backward(dw, v, kept, norm, dim)
    assert dg.shape == kept.shape and dg.dtype == dtype and dv.dtype == dtype
    gradients = reference.weight_norm_backward(dw, v, g, lengths, dim, precision=WIDE)
    for gradient, wide in zip((dv, dg.ravel()), gradients, strict=True):
        close_to_largest(gradient, wide, dtype)
    total = np.abs(dv.astype(np.float64) * v).sum(other_axes(v, dim))
    assert (
        np.abs((dv.astype(np.float64) * v).sum(other_axes(v, dim))) <= 1e-6 * total + 1e-5
    ).all()


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)], ids=str)
def test_weight_norm_of_the_whole_array_and_of_vectors(dtype, rng, shape):
    v = rng.normal(3, 2, shape).astype(dtype)
    w, norm = bnfast.weight_norm_forward(v, np.array(2.0), None)
    close(w, 2 * v / np.sqrt((v.astype(np.float64) ** 2).sum()), dtype)
    dv, dg = bnfast.weight_norm_backward(v, v, np.array(2.0), norm, None)
    assert dv.shape == shape and dg.shape == ()
    if len(shape) == 1:
        close(bnfast.weight_norm(v, np.ones(5)), np.sign(v), dtype)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_gradients_of_weight_norm(rng, dim):
    v, dw = rng.normal(size=(2, 3, 4, 2))
    g = rng.normal(size=() if dim is None else v.shape[dim])
    _, norm = bnfast.weight_norm_forward(v, g, dim)
    gradients = bnfast.weight_norm_backward(dw, v, g, norm, dim)
    for array, gradient in zip((v, g), gradients, strict=True):
        numeric = central_differences(lambda: (bnfast.weight_norm(v, g, dim) * dw).sum(), array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=FINITE_DIFFERENCES)


@pytest.mark.parametrize("buffer", BUFFERS)
def test_any_strides(dtype, rng, buffer):
    v, dw = rng.normal(3, 2, (2, 4, 3, 5)).astype(dtype)
    g = rng.normal(size=4).astype(dtype)
    make = BUFFERS[buffer]
    w, norm = bnfast.weight_norm_forward(v, g)
    out = make(np.zeros_like(v))
    assert bnfast.weight_norm(make(v), g, out=out) is out
    close(out, w, dtype)
    dv, _ = bnfast.weight_norm_backward(dw, v, g, norm)
    close(bnfast.weight_norm_backward(make(dw), make(v), g, norm)[0], dv, dtype)
    y = bnfast.weight_standardization(v, g)
    assert bnfast.weight_standardization(make(v), g, out=out) is out
    close(out, y, dtype)


def test_a_filter_of_zeros_has_no_direction(dtype):
    v = np.array([[0, 0], [3, 4]], dtype)
    w = bnfast.weight_norm(v, np.ones(2, dtype))
    assert np.isnan(w[0]).all()
    close(w[1], [0.6, 0.8], dtype)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "fresh"])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("number", range(5))
def test_the_shortest_and_longest_filters_get_their_length(isa, dtype, rng, number, dim, in_place):
    scale = EXTREMES["f32" if dtype == np.float32 else "f64"][number]
    ordinary = rng.integers(1, 2000, (3, 4, 2)).astype(dtype)
    chosen = ... if dim is None else (slice(None),) * dim + (1,)
    v = ordinary.copy()
    v[chosen] *= dtype.type(scale)
    g = rng.uniform(1, 2, () if dim is None else v.shape[dim])
    w, norm = bnfast.weight_norm_forward(ordinary, g, dim)
    dw = rng.normal(size=v.shape).astype(dtype)
    dv, dg = bnfast.weight_norm_backward(dw, ordinary, g, norm, dim)
    given, upstream = v.copy(), dw.copy()
    got, lengths = bnfast.weight_norm_forward(v, g, dim, out=v if in_place else None)
    close(got, w, dtype)
    norm[... if dim is None else 1] *= scale
    close(lengths / norm, 1, dtype)
    gradient, got = bnfast.weight_norm_backward(
        *(upstream, given, g, lengths, dim), out=upstream if in_place else None
    )
    close(got, dg, dtype)
    gradient, exact = of_scaled(gradient, dv, chosen, scale)
    close(gradient, exact.astype(dtype), dtype)


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "fresh"])
def test_a_filter_shorter_than_eps_is_divided_by_it(isa, dtype, rng, dim, in_place):
    v, dw = rng.normal(1, 2, (2, 4, 5, 3)).astype(dtype)
    g = rng.normal(size=() if dim is None else v.shape[dim])
    unlimited = bnfast.weight_norm(v, g, dim)
    for index, size in enumerate((0.0, 1e-30, 1e-3) if dim is not None else (1e-3,)):
        v[... if dim is None else (slice(None),) * dim + (index,)] *= dtype.type(size)
    eps = 0.1
    expected, lengths = reference.weight_norm_forward(v, g, dim, eps, precision=WIDE)
    given, upstream = v.copy(), dw.copy()
    w, norm = bnfast.weight_norm_forward(given, g, dim, eps, out=given if in_place else None)
    close(w, expected, dtype)
    close(norm, lengths, dtype)
    np.testing.assert_array_equal(bnfast.weight_norm(v, g, dim, eps), w)
    if dim is not None:
        longer = (slice(None),) * dim + (slice(3, None),)
        np.testing.assert_array_equal(w[longer], unlimited[longer])
    gradients = bnfast.weight_norm_backward(
        *(upstream, v, g, norm, dim, eps), out=upstream if in_place else None
    )
    wide = reference.weight_norm_backward(dw, v, g, lengths, dim, eps, precision=WIDE)
    for gradient, exact in zip(gradients, wide, strict=True):
        close_to_largest(np.ravel(gradient), np.ravel(exact), dtype)


def test_eps_gives_filters_of_zeros_a_gradient_and_changes_no_other(dtype):
    v, g = np.array([[0, 0], [3, 4]], dtype), np.array([2, 5], dtype)
    w, norm = bnfast.weight_norm_forward(v, g, 0, 1e-12)
    np.testing.assert_array_equal(w[0], 0)
    np.testing.assert_array_equal(w[1], bnfast.weight_norm(v, g)[1])
    np.testing.assert_array_equal(norm, [0, 5])
    dw = np.array([[1, -3], [1, 0]], dtype)
    dv, dg = bnfast.weight_norm_backward(dw, v, g, norm, 0, 1e-12)
    np.testing.assert_allclose(dv[0], [2e12, -6e12], rtol=eps_of(dtype))
    assert dg[0] == 0
    unlimited = bnfast.weight_norm_backward(dw[1:], v[1:], g[1:], norm[1:])
    np.testing.assert_array_equal(dv[1:], unlimited[0])
    np.testing.assert_array_equal(dg[1:], unlimited[1])


@pytest.mark.parametrize(("length", "size"), [(1e-315, 1e6), (1e-300, 1e308), (1e-310, 1e-300)])
def test_a_share_of_eps_is_rounded_once_at_the_ends_of_the_range(rng, length, size):
    v, dw = rng.uniform(0.5, 1, (2, 1, 17)) * [[[length]], [[size]]]
    g, eps = np.array([size]), 3.0
    w, norm = bnfast.weight_norm_forward(v, g, 0, eps)
    wide = v.astype(np.longdouble)
    np.testing.assert_allclose(w, wide / eps * size, rtol=4e-16, atol=5e-324)
    _, dg = bnfast.weight_norm_backward(dw, v, g, norm, 0, eps)
    np.testing.assert_allclose(dg, [(dw * wide).sum() / eps], rtol=2e-15, atol=5e-324)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_filter_that_is_not_finite_changes_no_other(rng, value):
    v, dw = rng.normal(size=(2, 3, 4))
    w, norm = bnfast.weight_norm_forward(v, np.ones(3))
    dv, _ = bnfast.weight_norm_backward(dw, v, np.ones(3), norm)
    v[1, 2] = value
    got, lengths = bnfast.weight_norm_forward(v, np.ones(3))
    gradient, _ = bnfast.weight_norm_backward(dw, v, np.ones(3), lengths)
    assert np.isnan(got[1, 2])
    for a, b in ((got, w), (lengths, norm), (gradient, dv)):
        np.testing.assert_array_equal(a[::2], b[::2])


def test_weight_norm_of_a_single_number_is_its_length(dtype):
    v = np.array(-3.0, dtype)
    w, norm = bnfast.weight_norm_forward(v, np.float64(2), None)
    assert w.shape == () and w == -2 and norm == 3
    dv, dg = bnfast.weight_norm_backward(v, v, np.float64(2), norm, None)
    assert dv.shape == () and dv == 0 and dg == 3


W = np.arange(12, dtype=np.float32).reshape(3, 4)
U, V = np.ones(3, np.float32), np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bnfast.weight_norm(W, U, -1), ValueError, "dim must not be negative.*dim=None"),
        (lambda: bnfast.weight_norm(W, U, 2), ValueError, "dim must be less than 2"),
        (lambda: bnfast.weight_norm(W, V), ValueError, "g must have one value for each of the 3"),
        (lambda: bnfast.weight_norm(W.astype(int), U), TypeError, "v must be float32 or float64"),
        (lambda: bnfast.weight_norm(W, U, None, out=[1]), TypeError, "out must be a numpy array"),
        (
            lambda: bnfast.weight_norm(W, [1, 2, 3]),
            TypeError,
            "g must be float16, bfloat16, float32 or float64",
        ),
        (
            lambda: bnfast.weight_norm_backward(W[:, :2], 0 * W, U, U),
            *(ValueError, "dw must have the shape and dtype of v"),
        ),
        (
            lambda: bnfast.weight_norm(W, U, out=W.astype(np.float64)),
            *(ValueError, "out must have the shape and dtype of v"),
        ),
        (
            lambda: bnfast.weight_norm(W[:, :2], U, out=W[:, 1:3]),
            *(ValueError, "out must be v itself or share no element with it"),
        ),
        (
            lambda: bnfast.weight_norm_backward(W[:, :2], 0 * W[:, :2], U, U, out=W[:, 1:3]),
            *(ValueError, "out must be dw itself or share no element with it"),
        ),
        (
            lambda: bnfast.weight_norm_backward(W, 0 * W, U, V),
            *(ValueError, "norm must have one value for each of the 3 filters"),
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bad", [{"g": V}, {"dim": 5}])
def test_what_is_refused_leaves_all_as_it_was(bad):
    out = np.full_like(W, 7)
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(bad))} must"):
        bnfast.weight_norm_forward(W, **{"g": U} | bad, out=out)
    np.testing.assert_array_equal(out, 7)
    with pytest.raises(ValueError, match="out must have the shape"):
        bnfast.weight_norm_forward(W, U, out=out[:2])


SHAPE = (4, 3, 2, 3)


def weights(rng, dtype=np.float64):
    return rng.normal(1, 2, SHAPE).astype(dtype)


def test_what_backward_returns_is_the_callers(rng):
    layer = WeightNorm(weights(rng))
    dv = layer.backward(layer())
    kept = layer.v_grad.copy()
    dv[...] = 7
    np.testing.assert_array_equal(layer.v_grad, kept)


def test_a_length_beyond_the_range_is_infinite_without_a_warning():
    with np.errstate(all="raise"):
        assert np.isinf(WeightNorm(np.full((1, 4), 3e38, np.float32)).g).all()


@pytest.mark.parametrize(
    ("dim", "shape"), [(0, (4, 1, 1, 1)), (1, (1, 3, 1, 1)), (3, (1, 1, 1, 3)), (None, ())]
)
def test_weight_norm_begins_with_the_weight_it_was_made_of(dtype, rng, dim, shape):
    w = weights(rng, dtype)
    layer = WeightNorm(w, dim)
    assert layer.g.shape == shape
    assert layer.g.dtype == layer.v.dtype == dtype
    assert not np.shares_memory(layer.v, w)
    tolerance = OUTPUT * eps_of(dtype)
    np.testing.assert_allclose(layer(), w, rtol=tolerance)
    vector = WeightNorm(w[:, 0, 0, 0])
    assert vector.g.shape == (4,)
    np.testing.assert_allclose(vector(), w[:, 0, 0, 0], rtol=tolerance)


def test_weight_norm_makes_the_length_a_parameter(rng):
    layer = WeightNorm(weights(rng))
    layer.g[...] = 3.0
    lengths = np.sqrt((layer() ** 2).sum((1, 2, 3)))
    np.testing.assert_allclose(lengths, 3.0, rtol=OUTPUT * eps_of(np.float64))


def test_filters_of_zeros_begin_with_zeros_and_learn(dtype):
    v = np.array([[0, 0, 0], [1, 2, 2]], dtype)
    layer = WeightNorm(v, eps=1e-12)
    np.testing.assert_allclose(layer.g, [[0], [3]], rtol=eps_of(dtype))
    np.testing.assert_allclose(layer(), v, rtol=OUTPUT * eps_of(dtype))
    dv = layer.backward(np.ones_like(v))
    np.testing.assert_array_equal(dv[0], 0)  # times g
    assert layer.g_grad[0] == 0 and np.isfinite(layer.g_grad).all() and np.isfinite(dv).all()
    layer.v[0] = [0, 3, 4]
    layer.g[0] = 1
    np.testing.assert_allclose(layer()[0], [0, 0.6, 0.8], rtol=2 * eps_of(dtype))


def test_a_bad_state_changes_nothing(rng):
    w = weights(rng)
    layer = WeightNorm(w)
    before = layer.state_dict()
    for change, error, message in (
        ({"original0": np.ones(4)}, ValueError, r"original0 must have the shape \(4, 1, 1, 1\)"),
        (
            {"original1": np.ones(SHAPE, int)},
            TypeError,
            "original1 must be float16, bfloat16, float32 or float64",
        ),
        ({"original": w}, ValueError, r"unexpected \['original'\]"),
    ):
        bad = {name: array + 1 for name, array in before.items()} | change
        with pytest.raises(error, match=message):
            layer.load_state_dict(bad)
        np.testing.assert_equal(layer.state_dict(), before)


@pytest.mark.filterwarnings("error")
def test_a_filter_longer_than_float64_can_hold_raises_no_warning():
    v = np.full((2, 400), np.finfo(np.float64).max)
    w, norm = bnfast.weight_norm_forward(v, np.ones(2))
    np.testing.assert_allclose(w, 1 / 20, rtol=OUTPUT * eps_of(np.float64))
    assert np.isinf(norm).all()
