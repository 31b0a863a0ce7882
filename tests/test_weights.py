"""Normalizations of weights: values, gradients, PyTorch's conventions, what is refused."""

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from cases import BUFFERS
from oracle import WIDE, central_differences
from tolerances import (
    CLOSE_F32,
    CLOSE_F64,
    FINITE_DIFFERENCES,
    INPUT_GRADIENT,
    OUTPUT,
    ROUNDED_F32,
    eps_of,
)

SHAPES = [(4, 3, 3, 3), (5, 7), (1, 40), (6, 1), (3, 2, 900)]


def close(a, b, dtype=np.float64):
    tolerance = 2 * ROUNDED_F32 if np.dtype(dtype) == np.float32 else CLOSE_F64
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def close_to_largest(gradient, expected, dtype):
    """Within a rounding of the largest value: gradients are sums of what may cancel."""
    size = max(1, np.abs(expected).max(initial=0))
    close(gradient / size, np.asarray(expected, np.float64) / float(size), dtype)


def others(w, axis):
    return tuple(d for d in range(w.ndim) if d != axis % w.ndim)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_weight_norm_gives_every_filter_its_length(isa, dtype, rng, shape, dim):
    v = rng.normal(3, 2, shape).astype(dtype)
    g = rng.normal(size=shape[dim]).astype(dtype)
    w, norm = bnfast.weight_norm_forward(v, g, dim)
    expected, lengths = reference.weight_norm_forward(v, g, dim, precision=WIDE)
    close(norm, lengths, dtype)
    close(w, expected, dtype)
    kept = np.expand_dims(g, others(v, dim))
    np.testing.assert_array_equal(bnfast.weight_norm(v, kept, dim), w)
    dw = rng.normal(size=shape).astype(dtype)
    dv, dg = bnfast.weight_norm_backward(dw, v, kept, norm, dim)
    assert dg.shape == kept.shape and dg.dtype == dtype and dv.dtype == dtype
    gradients = reference.weight_norm_backward(dw, v, g, lengths, dim, precision=WIDE)
    for gradient, wide in zip((dv, dg.ravel()), gradients, strict=True):
        close_to_largest(gradient, wide, dtype)
    total = np.abs(dv.astype(np.float64) * v).sum(others(v, dim))
    assert (np.abs((dv.astype(np.float64) * v).sum(others(v, dim))) <= 1e-6 * total + 1e-5).all()


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


# Powers of two: integers below 2048 times these are exact, denormal or not.
EXTREMES = {
    "f32": (2.0**-149, 2.0**-138, 2.0**-60, 2.0**60, 2.0**100),
    "f64": (2.0**-1074, 2.0**-1063, 2.0**-600, 2.0**600, 2.0**1000),
}


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
    exact = dv.astype(np.longdouble)
    exact[chosen] /= np.longdouble(scale)
    lost = np.abs(exact) > np.finfo(dtype).max
    np.testing.assert_array_equal(np.isinf(gradient), lost)
    exact[lost] = gradient[lost] = 0
    for part in (gradient, exact):
        part[chosen] *= dtype.type(scale)
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


STANDARDIZATIONS = {
    "inside": ("weight_standardization", {}),
    "inside, unbiased": ("weight_standardization", {"unbiased": True}),
    "outside": ("weight_standardization", {"eps_inside": False}),
    "outside, unbiased": ("weight_standardization", {"eps_inside": False, "unbiased": True}),
    "scaled": ("scaled_weight_standardization", {"gamma": 1.7}),
    "scaled, reversed": ("scaled_weight_standardization", {"gamma": -1.7}),
    "scaled, floored": ("scaled_weight_standardization", {"eps": 1e3}),
    "scaled, added": ("scaled_weight_standardization", {"floor": False, "eps": 0.1}),
}


@pytest.fixture(params=STANDARDIZATIONS)
def standardization(request):
    """The name of one, and options."""
    return STANDARDIZATIONS[request.param]


def forms(name):
    """The function, its forward and its backward; and the latter two of the reference."""
    names = [f"{name}_forward", f"{name}_backward"]
    ours = [getattr(bnfast, one) for one in (name, *names)]
    return *ours, *(getattr(reference, one) for one in names)


@pytest.mark.parametrize("with_gain", [True, False])
@pytest.mark.parametrize("axis", [0, -1])
def test_standardizations(isa, dtype, rng, standardization, axis, with_gain):
    name, options = standardization
    function, forward, backward, expected, gradients = forms(name)
    w = rng.normal(3, 2, (4, 3, 3, 5)).astype(dtype)
    dy = rng.normal(size=w.shape).astype(dtype)
    gain = rng.normal(size=w.shape[axis]).astype(dtype) if with_gain else None
    wide = {"axis": axis, "precision": WIDE, **options}
    y, *saved = forward(w, gain, axis=axis, **options)
    y_wide, *saved_wide = expected(w, gain, **wide)
    assert y.dtype == dtype
    close(y, y_wide, dtype)
    for statistic, exact in zip(saved, saved_wide, strict=True):
        assert statistic.dtype == np.float64
        close(statistic, exact, dtype)
    np.testing.assert_array_equal(function(w, gain, axis=axis, **options), y)
    got = backward(dy, w, *saved, gain, axis=axis, **options)
    for gradient, exact in zip(got, gradients(dy, w, *saved_wide, gain, **wide), strict=True):
        assert gradient.dtype == dtype
        close_to_largest(gradient, exact, dtype)


def test_gradients_of_standardizations(rng, standardization):
    name, options = standardization
    function, forward, backward, *_ = forms(name)
    w, dy = rng.normal(size=(2, 3, 4, 2))
    gain = rng.normal(size=3)
    _, *saved = forward(w, gain, **options)
    gradients = backward(dy, w, *saved, gain, **options)
    for array, gradient in zip((w, gain), gradients, strict=True):
        numeric = central_differences(lambda: (function(w, gain, **options) * dy).sum(), array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=5 * FINITE_DIFFERENCES)


def test_backward_takes_statistics_that_were_rounded(dtype, rng, standardization):
    name, options = standardization
    _, forward, backward, *_ = forms(name)
    w, dy = rng.normal(3, 2, (2, 4, 3, 5)).astype(dtype)
    _, *saved = forward(w, **options)
    exact = backward(dy, w, *saved, **options)
    rounded = [statistic.astype(np.float32) for statistic in saved]
    for gradient, expected in zip(backward(dy, w, *rounded, **options), exact, strict=True):
        np.testing.assert_allclose(
            gradient, expected, rtol=0, atol=CLOSE_F32 * np.abs(expected).max()
        )


def test_backward_takes_the_statistics_it_is_given(rng, standardization):
    name, options = standardization
    _, forward, backward, _, expected = forms(name)
    w, dy = rng.normal(3, 2, (2, 4, 3, 5))
    _, mean, std = forward(w, **options)
    saved = mean + 0.5, 2 * std
    got = backward(dy, w, *saved, **options)
    _, dgain = expected(dy, w, *saved, **options)
    close(got[1], dgain)
    assert (np.abs(got[1] - backward(dy, w, mean, std, **options)[1]) > 1e-3).all()


@pytest.mark.parametrize("buffer", BUFFERS)
def test_standardizations_of_any_strides(dtype, rng, standardization, buffer):
    name, options = standardization
    function, forward, backward, *_ = forms(name)
    w, dy = rng.normal(3, 2, (2, 4, 3, 5)).astype(dtype)
    gain = rng.normal(size=4).astype(dtype)
    make = BUFFERS[buffer]
    y, *saved = forward(w, gain, **options)
    dw, dgain = backward(dy, w, *saved, gain, **options)
    out = make(np.zeros_like(w))
    for call in (function, lambda *a, **k: forward(*a, **k)[0]):
        assert call(make(w), gain, out=out, **options) is out
        close(out, y, dtype)
    for out in (make(np.zeros_like(w)), make(dy)):
        given = out if np.array_equal(out, dy) else make(dy)
        got, of_gain = backward(given, make(w), *saved, gain, out=out, **options)
        assert got is out
        close_to_largest(out, dw, dtype)
        close_to_largest(of_gain, dgain, dtype)


def without_eps(options):
    """Options with which a standardization does not depend on the size of the weights."""
    return options | {"eps": 0.0}


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "fresh"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("number", range(5))
def test_the_smallest_and_largest_filters_are_standardized(
    isa, dtype, rng, standardization, number, axis, in_place
):
    name, options = standardization
    options = without_eps(options) | {"axis": axis}
    _, forward, backward, *_ = forms(name)
    scale = EXTREMES["f32" if dtype == np.float32 else "f64"][number]
    ordinary = rng.integers(1, 2000, (3, 4, 2)).astype(dtype)
    dy, gain = rng.normal(size=ordinary.shape).astype(dtype), rng.normal(size=3 + axis)
    y, mean, std = forward(ordinary, gain, **options)
    dw, dgain = backward(dy, ordinary, mean, std, gain, **options)
    chosen = (slice(None),) * axis + (1,)
    w = ordinary.copy()
    w[chosen] *= dtype.type(scale)
    given, upstream = w.copy(), dy.copy()
    got, *saved = forward(given, gain, **options, out=given if in_place else None)
    close(got, y, dtype)
    for statistic, expected in zip(saved, (mean, std), strict=True):
        expected[1] *= scale
        half_a_step = scale / 2 if number < 2 and dtype == np.float64 else 0.0  # a denormal
        close((statistic - expected) / np.maximum(expected, half_a_step / CLOSE_F64), 0, dtype)
    gradient, of_gain = backward(
        upstream, w, *saved, gain, **options, out=upstream if in_place else None
    )
    close_to_largest(of_gain, dgain, dtype)
    exact = dw.astype(np.longdouble)
    exact[chosen] /= np.longdouble(scale)
    lost = np.abs(exact) > np.finfo(dtype).max
    np.testing.assert_array_equal(np.isinf(gradient), lost)
    exact[lost] = gradient[lost] = 0
    for part in (gradient, exact):
        part[chosen] *= dtype.type(scale)
    close_to_largest(gradient, exact, dtype)


@pytest.mark.parametrize("spread", [1e-300, 1e-200, 1e-100])
def test_eps_beside_the_tiniest_spreads(rng, standardization, spread):
    name, options = standardization
    _, forward, backward, expected, gradients = forms(name)
    w, dy = rng.normal(size=(2, 3, 20))
    w *= spread
    y, *saved = forward(w, **options)
    y_wide, *wide = expected(w, precision=WIDE, **options)
    np.testing.assert_allclose(y / spread, y_wide / WIDE(spread), rtol=CLOSE_F64)
    np.testing.assert_allclose(saved[1] / spread, wide[1] / WIDE(spread), rtol=CLOSE_F64)
    dw, dgain = backward(dy, w, *saved, **options)
    dw_wide, dgain_wide = gradients(dy, w, *wide, precision=WIDE, **options)
    close_to_largest(dw, dw_wide, np.float64)
    close_to_largest(dgain / spread, dgain_wide / WIDE(spread), np.float64)


def test_eps_counts_as_much_beside_filters_and_deviations_scaled_alike(dtype, rng, standardization):
    name, options = standardization
    _, forward, backward, *_ = forms(name)
    w, dy = rng.normal(size=(2, 3, 20)).astype(dtype)
    eps = options.get("eps", 0.25)
    power = -44 if dtype == np.float32 else -420  # beyond what is done without copies
    y, *saved = forward(w, **options | {"eps": eps})
    dw, dgain = backward(dy, w, *saved, **options | {"eps": eps})
    eps = np.ldexp(eps, power if options.get("eps_inside") is False else 2 * power)
    small = np.ldexp(w, power)
    got, *saved = forward(small, **options | {"eps": eps})
    close(got, y, dtype)
    gradient, of_gain = backward(dy, small, *saved, **options | {"eps": eps})
    close_to_largest(np.ldexp(gradient, power), dw, dtype)
    close_to_largest(of_gain, dgain, dtype)


def test_two_values_are_standardized_whatever_their_size():
    for low in (5e159, 5e-201, 5e-309):
        y = bnfast.weight_standardization(np.array([[2 * low, low]]), eps=0.0)
        np.testing.assert_allclose(y, [[1, -1]], rtol=OUTPUT * eps_of(np.float64))


@pytest.mark.parametrize("ratio", [1e2, 1e6, 1e10])
def test_float64_filters_are_exact_whatever_their_mean(isa, rng, standardization, ratio):
    name, options = standardization
    function, *_, expected, _ = forms(name)
    w = rng.normal(ratio, 1, (4, 600))
    around_0 = w.astype(WIDE) - w[:, :1]  # exactly, unlike a mean in long double
    exact, *_ = expected(around_0, precision=WIDE, **options)
    y = function(w, **options)
    tolerance = OUTPUT * eps_of(np.float64) * np.abs(exact).max()
    np.testing.assert_allclose(y, exact.astype(np.float64), rtol=0, atol=tolerance)


def test_a_constant_filter_stays_zero_without_eps(dtype, standardization):
    name, options = standardization
    _, forward, backward, *_ = forms(name)
    w = np.array([[3, 3, 3], [1, 2, 6]], dtype)
    dy = np.array([[1, 2, 4], [1, 2, 4]], dtype)
    y, *saved = forward(w, **without_eps(options))
    np.testing.assert_array_equal(y[0], 0)
    dw, dgain = backward(dy, w, *saved, **without_eps(options))
    np.testing.assert_array_equal(dw[0], 0)
    assert dgain[0] == 0
    assert np.isfinite(dw).all() and dw[1].any()


@pytest.mark.parametrize("deviation", [0.0, 2e-323])  # of four of the smallest steps
def test_a_constant_filter_has_the_gradient_of_pytorch(deviation):
    w = np.array([[0.0, deviation, 0.0]])
    y, mean, std = bnfast.weight_standardization_forward(w, eps_inside=False)
    for next_to_zeros in (y, mean, std):
        np.testing.assert_allclose(next_to_zeros, 0, atol=1e5 * deviation)
    dw, dgain = bnfast.weight_standardization_backward(
        np.array([[1.0, 0.0, 0.0]]), w, mean, std, eps_inside=False
    )
    np.testing.assert_allclose(dw, [[2e5 / 3, -1e5 / 3, -1e5 / 3]])
    np.testing.assert_allclose(dgain, 0, atol=1e5 * deviation)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_filter_that_is_not_finite_is_standardized_alone(rng, standardization, value):
    name, options = standardization
    _, forward, backward, *_ = forms(name)
    w, dy = rng.normal(size=(2, 3, 4))

    def all_of_it():
        y, *saved = forward(w, **options)
        return y, *saved, *backward(dy, w, *saved, **options)

    before = all_of_it()
    w[1, 2] = value
    after = all_of_it()
    assert not np.isfinite(after[0][1]).any()
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a[::2], b[::2])


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
    np.testing.assert_array_equal(once[0], y)
    np.testing.assert_array_equal(once[2], left)
    dw = bnfast.spectral_norm_backward(y, w, sigma, left, right, dim=dim)
    for out in (np.empty_like(w), y.copy(), w.copy()):
        dy, weights = (out if np.array_equal(out, a) else a for a in (y, w))
        got = bnfast.spectral_norm_backward(dy, weights, sigma, left, right, dim=dim, out=out)
        assert got is out
        np.testing.assert_array_equal(out, dw)
    for out in (np.empty_like(w), w.copy()):
        weights = out if np.array_equal(out, w) else w
        assert (
            bnfast.spectral_norm_forward(
                weights, left, right, 0, dim=dim, v_first=v_first, out=out
            )[0]
            is out
        )
        np.testing.assert_array_equal(out, y)
    assert bnfast.spectral_norm(w, left, right, 0, dim=dim, v_first=v_first, out=w) is w
    np.testing.assert_array_equal(w, y)


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


W = np.arange(12, dtype=np.float32).reshape(3, 4)
U, V, UNIT = np.ones(3, np.float32), np.ones(4, np.float32), np.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bnfast.weight_norm(W, U, -1), ValueError, "dim must not be negative.*dim=None"),
        (lambda: bnfast.weight_norm(W, U, 2), ValueError, "dim must be less than 2"),
        (lambda: bnfast.weight_norm(W, V), ValueError, "g must have one value for each of the 3"),
        (lambda: bnfast.weight_norm(W.astype(int), U), TypeError, "v must be float32 or float64"),
        (lambda: bnfast.weight_norm(W, U, None, out=[1]), TypeError, "out must be a numpy array"),
        (lambda: bnfast.weight_norm(W, [1, 2, 3]), TypeError, "g must be float32 or float64"),
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
        (
            lambda: bnfast.weight_standardization(W, V),
            *(ValueError, "gain must have one value for each of the 3 filters"),
        ),
        (
            lambda: bnfast.weight_standardization(W, out=W[:2]),
            *(ValueError, "out must have the shape and dtype of w"),
        ),
        (
            lambda: bnfast.weight_standardization(W, eps=-1.0),
            ValueError,
            "eps must not be negative",
        ),
        (
            lambda: bnfast.weight_standardization(W[0]),
            *(ValueError, "w must have at least 2 dimensions, filters and what they are made of"),
        ),
        (
            lambda: bnfast.scaled_weight_standardization(W, gamma="1"),
            *(TypeError, "gamma must be a real number"),
        ),
        (
            lambda: bnfast.weight_standardization_backward(W[:2], W, U, U),
            *(ValueError, "dy must have the shape and dtype of w"),
        ),
        (
            lambda: bnfast.weight_standardization_forward(W, axis=2),
            *(ValueError, "axis must be from -2 to 1 for w of shape"),
        ),
        (
            lambda: bnfast.weight_standardization_backward(W, W, None, U),
            *(TypeError, r"mean must be an array of shape \(3,\), got None"),
        ),
        (
            lambda: bnfast.scaled_weight_standardization_backward(W, W, U, V),
            *(ValueError, "std must have one value for each of the 3 filters"),
        ),
        (
            lambda: bnfast.scaled_weight_standardization_backward(W, W, U, U.astype(int)),
            *(TypeError, "std must be float32 or float64"),
        ),
        (
            lambda: bnfast.scaled_weight_standardization_forward(W, eps=np.nan),
            *(ValueError, "eps must be finite"),
        ),
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


FORWARDS = {
    "weight norm": lambda out, **bad: bnfast.weight_norm_forward(W, **{"g": U} | bad, out=out),
    "standardization": lambda out, **bad: bnfast.weight_standardization_forward(W, out=out, **bad),
    "scaled": lambda out, **bad: bnfast.scaled_weight_standardization_forward(W, out=out, **bad),
    "spectral": lambda out, **bad: bnfast.spectral_norm(W, *VECTORS, out=out, **bad),
}
VECTORS = U.copy(), V.copy()


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        ("weight norm", {"g": V}),
        ("weight norm", {"dim": 5}),
        *[
            (kind, {name: "no"})
            for kind in ("standardization", "scaled")
            for name in ("eps", "gain")
        ],
        ("scaled", {"gamma": None}),
        *[("spectral", {name: "no"}) for name in ("eps", "n_power_iterations", "dim")],
    ],
)
def test_what_is_refused_leaves_all_as_it_was(kind, bad):
    out = np.full_like(W, 7)
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(bad))} must"):
        FORWARDS[kind](out, **bad)
    np.testing.assert_array_equal(out, 7)
    with pytest.raises(ValueError, match="out must have the shape"):
        FORWARDS[kind](out[:2])
    np.testing.assert_array_equal((*VECTORS[0], *VECTORS[1]), 1)


def test_spectral_norm_of_weights_with_nan_has_a_gradient_of_nan(dtype):
    w = np.ones((3, 4), dtype)
    w[0, 0] = np.nan
    y, sigma, u, v = bnfast.spectral_norm_forward(w, np.ones(3), np.ones(4))
    assert np.isnan(y).all() and np.isnan(sigma)
    assert np.isnan(bnfast.spectral_norm_backward(y, w, sigma, u, v)).all()


def test_filters_without_elements_have_gradients_of_nothing(standardization):
    name, options = standardization
    _, forward, backward, _, _ = forms(name)
    w, gain = np.zeros((3, 0)), np.ones(3)
    _, mean, std = forward(w, gain, **options)
    dw, dgain = backward(w, w, mean, std, gain, **options)
    assert dw.shape == (3, 0)
    np.testing.assert_array_equal(dgain, 0.0)


def test_weight_norm_of_a_single_number_is_its_length(dtype):
    v = np.array(-3.0, dtype)
    w, norm = bnfast.weight_norm_forward(v, np.float64(2), None)
    assert w.shape == () and w == -2 and norm == 3
    dv, dg = bnfast.weight_norm_backward(v, v, np.float64(2), norm, None)
    assert dv.shape == () and dv == 0 and dg == 3


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


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_spectral_norm_of_nothing_is_nothing(shape):
    y, sigma, _, _ = bnfast.spectral_norm_forward(
        np.ones(shape), np.ones(shape[0]), np.ones(shape[1] if shape[0] else 0)
    )
    assert y.shape == shape and sigma == 0
