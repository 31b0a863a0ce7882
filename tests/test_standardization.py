"""Standardizations of weights: values, gradients, PyTorch's conventions, what is refused."""

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from cases import BUFFERS, EXTREMES
from oracle import WIDE, central_differences, close, close_to_largest, of_scaled
from tolerances import CLOSE_F32, CLOSE_F64, FINITE_DIFFERENCES, OUTPUT, eps_of

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
    gradient, exact = of_scaled(gradient, dw, chosen, scale)
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


@pytest.mark.parametrize("eps", [1e-5, 1e-300])
def test_filters_without_elements_have_gradients_of_nothing(standardization, eps):
    name, options = standardization
    options = {**options, "eps": eps}
    _, forward, backward, _, _ = forms(name)
    w, gain = np.zeros((3, 0)), np.ones(3)
    _, mean, std = forward(w, gain, **options)
    dw, dgain = backward(w, w, mean, std, gain, **options)
    assert dw.shape == (3, 0)
    np.testing.assert_array_equal(dgain, 0.0)


W = np.arange(12, dtype=np.float32).reshape(3, 4)
U, V = np.ones(3, np.float32), np.ones(4, np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
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
            *(TypeError, "std must be float16, bfloat16, float32 or float64"),
        ),
        (
            lambda: bnfast.scaled_weight_standardization_forward(W, eps=np.nan),
            *(ValueError, "eps must be finite"),
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *[
            (name, argument)
            for name in ("weight_standardization", "scaled_weight_standardization")
            for argument in ("eps", "gain")
        ],
        ("scaled_weight_standardization", "gamma"),
    ],
)
def test_what_is_refused_leaves_all_as_it_was(name, argument):
    forward = getattr(bnfast, f"{name}_forward")
    out = np.full_like(W, 7)
    with pytest.raises((TypeError, ValueError), match=f"{argument} must"):
        forward(W, out=out, **{argument: None if argument == "gamma" else "no"})
    np.testing.assert_array_equal(out, 7)
    with pytest.raises(ValueError, match="out must have the shape"):
        forward(W, out=out[:2])
