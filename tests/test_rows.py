"""Statistics of each row, whose elements have parameters of their own."""

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from cases import BUFFERS
from oracle import WIDE, assert_within, central_differences, mean_of_gradient
from tolerances import CLOSE_F32, FINITE_DIFFERENCES, GRADIENT_SUMS, INPUT_GRADIENT, OUTPUT, eps_of

# Over the channels of images: neighbouring rows. Pixels around lanes, wide rows and what is summed
# before lanes are emptied (256 and 128); around what is walked at a time (1024 and 512), and beyond
# what is cut for the caches; channels around pairs, what a lane takes, a chunk, and beyond a block;
# many samples.
OVER_CHANNELS = [
    *[((2, 5, pixels), (1,)) for pixels in (2, 3, 7, 8, 9, 15, 16, 17, 49, 63, 64, 65)],
    *[((2, 5, pixels), (1,)) for pixels in (127, 128, 129, 255, 256, 257, 520)],
    *[((1, 5, 1100), (1,)), ((2, 20, 2100), (1,))],
    *[((3, channels, 40), (1,)) for channels in (2, 3, 15, 16, 17, 33, 257)],
    *[((1, 800, 70), (1,)), ((40, 3, 20), (1,)), ((2, 3, 4, 70), (1, 2))],
]

# (shape, axes). Around lanes and lines; one row, many; rows of one element; rows that are cut into
# chunks and blocks; more rows than a block of them has; axes that are not the last ones.
CASES = [
    *OVER_CHANNELS,
    *[((5, inner), (1,)) for inner in (1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300)],
    *[((rows, 40), (1,)) for rows in (1, 15, 16, 17, 33, 600)],
    *[((3, 4, 5, 6), (3,)), ((3, 4, 5, 6), (2, 3)), ((3, 4, 5, 6), (1, 2, 3)), ((7, 6), (0, 1))],
    *[((3, 4, 5, 6), (1,)), ((3, 4, 5, 6), (1, 3)), ((3, 4, 5, 6), (0,)), ((3, 4, 5), (2, 1))],
    *[((2, 5000), (1,)), ((1, 140000), (1,)), ((3, 70, 20, 20), (1,)), ((9,), (0,))],
    ((2, 1, 8, 1), (1, 2, 3)),
]


def inputs(rng, shape, axes, dtype, mean=3):
    x, dy = rng.normal(mean, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
    sizes = tuple(shape[d] for d in axes)
    weight, bias = rng.normal(size=(2, *sizes)).astype(dtype)
    return x, dy, sizes, weight, bias


def largest_of_rows(values, axes):
    return np.abs(values).max(axes, keepdims=True)


def results_of(x, dy, axes, weight, bias, centred=True, make=np.asarray):
    """All results of both directions, with arrays of any layout."""
    sizes = tuple(x.shape[d] for d in axes)
    x, dy = make(x), make(dy)
    out, dx_out = make(np.zeros_like(x)), make(np.zeros_like(x))
    if centred:
        forward = bnfast.layer_norm_forward(x, sizes, weight, bias, axis=axes, out=out)
        backward = bnfast.layer_norm_backward(
            dy, x, sizes, *forward[1:], weight, axis=axes, out=dx_out
        )
    else:
        forward = bnfast.rms_norm_forward(x, sizes, weight, 1e-5, axis=axes, out=out)
        backward = bnfast.rms_norm_backward(
            dy, x, sizes, *forward[1:], weight, axis=axes, out=dx_out
        )
    assert forward[0] is out and backward[0] is dx_out
    return [*forward, *backward]


def check(x, dy, axes, weight, bias, centred=True, make=np.asarray):
    """Compare both directions with the reference; return all results."""
    eps = eps_of(x.dtype)
    got = results_of(x, dy, axes, weight, bias, centred, make)
    if centred:
        y, mean, inverse, dx, dweight, dbias = got
    else:
        y, inverse, dx, dweight = got
        mean = np.zeros_like(inverse)
    want = reference.layer_norm_forward(x, axes, weight, bias, centred=centred, precision=WIDE)
    most = 1 if bias is None else 1 + np.abs(bias).max()
    assert_within(y, want[0], OUTPUT * eps * (largest_of_rows(want[0], axes) + most))
    assert_within(inverse, want[2], 16 * eps * want[2])
    exact = mean_of_gradient(x, mean, axes) if centred else mean
    want = reference.layer_norm_backward(
        dy, x, axes, exact, inverse, weight, centred=centred, precision=WIDE
    )
    gamma = 1 if weight is None else np.abs(weight).max()
    scale = np.expand_dims(inverse, tuple(sorted(axes))) * gamma
    xhat = largest_of_rows(reference.layer_norm_forward(x, axes, centred=centred)[0], axes) + 1
    assert_within(dx, want[0], INPUT_GRADIENT * eps * largest_of_rows(dy, axes) * scale * xhat)
    total = reference.layer_norm_backward(np.abs(dy), x, axes, mean, inverse)[2]
    assert dweight.dtype == (x.dtype if weight is None else weight.dtype)
    assert_within(dweight, want[1], GRADIENT_SUMS * eps * total * xhat.max())
    if centred:
        assert_within(dbias, want[2], GRADIENT_SUMS * eps * total)
    return got


@pytest.mark.parametrize(("shape", "axes"), CASES, ids=str)
def test_layer_norm(isa, dtype, rng, shape, axes):
    x, dy, _, weight, bias = inputs(rng, shape, axes, dtype)
    check(x, dy, axes, weight, bias)
    check(x, dy, axes, None, None)
    check(x, dy, axes, weight, None)
    check(x, dy, axes, None, bias)


@pytest.mark.parametrize(("shape", "axes"), CASES, ids=str)
def test_rms_norm(isa, dtype, rng, shape, axes):
    x, dy, _, weight, _ = inputs(rng, shape, axes, dtype)
    check(x, dy, axes, weight, None, centred=False)
    check(x, dy, axes, None, None, centred=False)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("shape", "axes"), CASES, ids=str)
def test_threads_caches_and_instruction_sets_change_no_bit(
    dtype, rng, assert_same_bits_everywhere, shape, axes, centred
):
    x, dy, _, weight, bias = inputs(rng, shape, axes, dtype, 300)
    given = x, dy, axes, weight, bias if centred else None, centred
    check(*given)
    assert_same_bits_everywhere(lambda: results_of(*given))


@pytest.mark.parametrize("make", [np.asfortranarray, lambda x: np.ascontiguousarray(x.T).T])
@pytest.mark.parametrize("shape", [(300, 64), (40, 900)], ids=str)
def test_rows_that_are_neighbours_have_the_same_bits_whatever_the_caches(
    isa, dtype, rng, use_threads, use_caches, make, shape
):
    x, dy, sizes, weight, _ = inputs(rng, shape, (1,), dtype)
    x, dy = make(x), make(dy)
    _, mean, invstd = bnfast.layer_norm_forward(x, sizes)
    for parameters in ((), (weight,)):
        results = []
        for num_threads, caches in ((1, (1 << 12, 1 << 20)), (1, (1 << 21, 1 << 25)), (3, (0, 0))):
            use_threads(num_threads)
            use_caches(*caches)
            results.append(bnfast.layer_norm_backward(dy, x, sizes, mean, invstd, *parameters))
        for other in results[1:]:
            for a, b in zip(other, results[0], strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [((3, 200), (1,)), ((5, 3, 40, 40), (1, 2, 3)), ((3, 40, 300), (1,)), ((2, 700, 9), (1,))],
    ids=str,
)
def test_gradients_without_those_of_parameters_have_the_same_bits(
    isa, dtype, rng, use_threads, shape, axes
):
    x, dy, sizes, weight, _ = inputs(rng, shape, axes, dtype)
    _, mean, invstd = bnfast.layer_norm_forward(x, sizes, axis=axes)
    for num_threads in (1, 3):
        use_threads(num_threads)
        for own in (weight, None):
            arguments = (dy, x, sizes, mean, invstd, own)
            whole = bnfast.layer_norm_backward(*arguments, axis=axes)
            got = bnfast.layer_norm_backward(*arguments, axis=axes, parameters=False)
            np.testing.assert_array_equal(got[0], whole[0])


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        *[((3, 6, 7, 11), axes) for axes in ((3,), (1,), (1, 2), (1, 3), (2, 1))],
        *[((20, 70), (1,)), ((2, 19, 300), (1,))],
    ],
    ids=str,
)
def test_any_strides(isa, dtype, rng, buffer, shape, axes):
    x, dy, _, weight, bias = inputs(rng, shape, axes, dtype)
    check(x, dy, axes, weight, bias, make=BUFFERS[buffer])
    check(x, dy, axes, BUFFERS[buffer](weight[None])[0], None, centred=False)


@pytest.mark.parametrize("buffer", ["misaligned", "offset_by_one", "reversed", "record_field"])
@pytest.mark.parametrize("shape", [(2, 19, 300), (3, 300, 20)], ids=str)
def test_over_channels_odd_strides_give_the_bits_of_a_packed_copy(isa, dtype, rng, buffer, shape):
    x, dy, _, weight, bias = inputs(rng, shape, (1,), dtype, 300)
    expected = check(x, dy, (1,), weight, bias)
    got = check(x, dy, (1,), weight, bias, make=BUFFERS[buffer])
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("strides", ["contiguous", "fortran", "channels_last"])
@pytest.mark.parametrize("axes", [(1, 2), (2, 1)], ids=str)
def test_parameters_belong_to_their_elements_whatever_the_order_of_the_walk(
    isa, dtype, strides, axes
):
    x = BUFFERS[strides](np.ones((5, 3, 4, 6), dtype))
    weight = np.arange(12, dtype=dtype).reshape([x.shape[d] for d in axes])
    y = bnfast.rms_norm(x, weight.shape, weight, 0.0, axis=axes)
    expected = weight if axes == (1, 2) else weight.T
    np.testing.assert_array_equal(y, np.broadcast_to(expected[..., None], x.shape))


@pytest.mark.parametrize("shape", [(40, 70), (2, 70, 20), (2, 7, 300)], ids=str)
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e37])
def test_sums_of_parameters_hold_what_float32_does_not(isa, rng, size, shape):
    x, dy, sizes, weight, _ = inputs(rng, shape, (1,), np.float32)
    dy = (np.abs(dy) * size).astype(np.float32)
    dy[:, 3] = 0
    _, mean, invstd = bnfast.layer_norm_forward(x, sizes, axis=1)
    got = bnfast.layer_norm_backward(dy, x, sizes, mean, invstd, weight.astype(np.float64), axis=1)
    expected = reference.layer_norm_backward(dy, x, (1,), mean, invstd, weight)
    others = tuple(d for d in range(x.ndim) if d != 1)
    total = np.abs(dy.astype(np.float64)).sum(others)
    assert_within(got[1], expected[1], 1e-5 * total)
    assert_within(got[2], expected[2], 1e-6 * total)


@pytest.mark.parametrize(("size", "size_of_dy"), [(1, 1e37), (1e-12, 1e-30)])
def test_over_channels_sums_of_rows_hold_what_float32_does_not(isa, rng, size, size_of_dy):
    x, dy, sizes, weight, _ = inputs(rng, (2, 70, 40), (1,), np.float32, 0)
    x, dy = x * np.float32(size), (np.abs(dy) * size_of_dy).astype(np.float32)
    dy[:, :, 5] = 0
    _, mean, invstd = bnfast.layer_norm_forward(x, sizes, eps=0.0, axis=1)
    dx = bnfast.layer_norm_backward(dy, x, sizes, mean, invstd, weight, axis=1)[0]
    expected = reference.layer_norm_backward(dy, x, (1,), mean, invstd, weight)[0]
    np.testing.assert_array_equal(dx[:, :, 5], 0)
    assert_within(dx, expected, 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("shape", [(40, 70), (2, 19, 300)], ids=str)
def test_in_place(isa, dtype, rng, shape):
    x, dy, sizes, weight, bias = inputs(rng, shape, (1,), dtype)
    expected = bnfast.layer_norm_forward(x, sizes, weight, bias, axis=1)
    gradients = bnfast.layer_norm_backward(dy, x, sizes, *expected[1:], weight, axis=1)
    got = bnfast.layer_norm_backward(dy, x, sizes, *expected[1:], weight, axis=1, out=dy)
    for a, b in zip(got, gradients, strict=True):
        np.testing.assert_array_equal(a, b)
    assert bnfast.layer_norm(x, sizes, weight, bias, axis=1, out=x) is x
    np.testing.assert_array_equal(x, expected[0])


@pytest.mark.parametrize("ratio", [1e4, 1e7])
def test_output_error_is_at_most_1e_6_whatever_the_mean(isa, rng, ratio):
    x = rng.normal(ratio, 1.0, (50, 768)).astype(np.float32)
    expected, _, _ = reference.layer_norm_forward(x, (1,), precision=WIDE)
    assert np.abs(bnfast.layer_norm(x, 768) - expected).max() <= 1e-6


def test_a_constant_row_gives_exactly_the_bias(isa, dtype, rng):
    x, bias = np.full((3, 70), 12345.678, dtype), rng.normal(size=70).astype(dtype)
    np.testing.assert_array_equal(bnfast.layer_norm(x, 70, None, bias), np.tile(bias, (3, 1)))


def test_a_row_of_zeros_has_an_rms_norm_of_zeros(isa, dtype):
    np.testing.assert_array_equal(bnfast.rms_norm(np.zeros((2, 5), dtype), 5), 0)


def test_without_eps_rms_norm_takes_that_of_the_dtype(dtype, rng):
    x = rng.normal(size=(4, 5)).astype(dtype)
    expected = bnfast.rms_norm(x, 5, eps=float(np.finfo(dtype).eps))
    np.testing.assert_array_equal(bnfast.rms_norm(x, 5), expected)


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_specials_stay_in_their_row(isa, dtype, rng, special):
    x, dy, sizes, weight, bias = inputs(rng, (20, 70), (1,), dtype)
    clean = bnfast.layer_norm_forward(x, sizes, weight, bias)
    clean += bnfast.layer_norm_backward(dy, x, sizes, *clean[1:], weight)
    x[7, 3] = special
    got = bnfast.layer_norm_forward(x, sizes, weight, bias)
    got += bnfast.layer_norm_backward(dy, x, sizes, *got[1:], weight)
    others = np.arange(20) != 7
    for a, b in zip(got[:4], clean[:4], strict=True):
        np.testing.assert_array_equal(a[others], b[others])
    assert np.isnan(got[0][7]).all() and np.isnan(got[3][7]).all()
    np.testing.assert_allclose(got[5], clean[5], rtol=0, atol=CLOSE_F32)  # summed again, in float64


@pytest.mark.parametrize("special", [np.nan, np.inf])
def test_over_channels_specials_stay_in_their_pixel(isa, dtype, rng, special):
    x, dy, sizes, weight, bias = inputs(rng, (2, 19, 300), (1,), dtype)
    clean = bnfast.layer_norm_forward(x, sizes, weight, bias, axis=1)
    clean += bnfast.layer_norm_backward(dy, x, sizes, *clean[1:], weight, axis=1)
    x[1, 3, 7] = special
    got = bnfast.layer_norm_forward(x, sizes, weight, bias, axis=1)
    got += bnfast.layer_norm_backward(dy, x, sizes, *got[1:], weight, axis=1)
    others = np.ones((2, 300), bool)
    others[1, 7] = False
    for k in (0, 3):
        a, b = (np.moveaxis(results[k], 1, -1) for results in (got, clean))
        np.testing.assert_array_equal(a[others], b[others])
        assert np.isnan(a[~others]).all()
    for k in (1, 2):
        np.testing.assert_array_equal(got[k][others], clean[k][others])
    np.testing.assert_allclose(got[5], clean[5], rtol=0, atol=CLOSE_F32)  # summed again, in float64


def test_beside_an_infinity_a_row_has_an_rms_norm_of_zeros(isa, dtype, rng):
    x, _, sizes, weight, _ = inputs(rng, (3, 70), (1,), dtype)
    x[1, 3] = -np.inf
    with np.errstate(invalid="ignore"):
        expected, _, _ = reference.layer_norm_forward(x, (1,), weight, centred=False)
    got = bnfast.rms_norm(x, sizes, weight, 1e-5)
    np.testing.assert_allclose(got, expected, rtol=0, atol=CLOSE_F32)
    assert np.isnan(got[1, 3]) and np.count_nonzero(got[1]) == 1


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(
    ("shape", "axes"), [((3, 5), (1,)), ((1, 4), (1,)), ((2, 3, 4), (1,)), ((3, 1), (1,))], ids=str
)
def test_gradients_are_those_of_central_differences(rng, shape, axes, centred):
    x, dy, sizes, weight, bias = inputs(rng, shape, axes, np.float64, 0)
    bias = bias if centred else None
    gradients = check(x, dy, axes, weight, bias, centred)[-3 if centred else -2 :]

    def loss():
        if centred:
            return (bnfast.layer_norm(x, sizes, weight, bias, axis=axes) * dy).sum()
        return (bnfast.rms_norm(x, sizes, weight, 1e-5, axis=axes) * dy).sum()

    for array, gradient in zip((x, weight, bias), gradients, strict=centred):
        numeric = central_differences(loss, array)
        np.testing.assert_allclose(gradient, numeric, rtol=0, atol=3 * FINITE_DIFFERENCES)


def test_gradients_of_parameters_may_be_left_out(dtype, rng):
    x, dy, sizes, weight, _ = inputs(rng, (40, 70), (1,), dtype)
    _, mean, invstd = bnfast.layer_norm_forward(x, sizes)
    dx, _, _ = bnfast.layer_norm_backward(dy, x, sizes, mean, invstd, weight)
    got = bnfast.layer_norm_backward(dy, x, sizes, mean, invstd, weight, parameters=False)
    np.testing.assert_array_equal(got[0], dx)
    assert got[1] is got[2] is None


@pytest.mark.parametrize(("shape", "sizes"), [((0, 4), 4), ((3, 0), 0), ((2, 0, 4), (0, 4))])
def test_an_empty_array_gives_an_empty_array(dtype, shape, sizes):
    x = np.empty(shape, dtype)
    y, mean, invstd = bnfast.layer_norm_forward(x, sizes)
    assert y.shape == shape and mean.shape == invstd.shape
    dx, dweight, dbias = bnfast.layer_norm_backward(x, x, sizes, mean, invstd)
    assert dx.shape == shape
    assert not dweight.any() and not dbias.any()


X = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
W = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bnfast.layer_norm(X, 4), ValueError, "normalized_shape must be the sizes of the"),
        (lambda: bnfast.layer_norm(X.T, 3), ValueError, "of channels first it is axis=0"),
        (lambda: bnfast.layer_norm(X, (2, 2, 4, 3)), ValueError, "normalized_shape must be"),
        (lambda: bnfast.layer_norm(X, ()), ValueError, "normalized_shape must have at least one"),
        (lambda: bnfast.layer_norm(X, 3.0), TypeError, "normalized_shape must be an integer"),
        (lambda: bnfast.layer_norm(X, 3, axis=3), ValueError, "axis must be from -3 to 2"),
        (lambda: bnfast.layer_norm(X, (3, 3), axis=(2, -1)), ValueError, "axis must not name"),
        (lambda: bnfast.layer_norm(X, 3, np.ones(4)), ValueError, "weight must have one value for"),
        (
            lambda: bnfast.layer_norm(X, 3, None, [1]),
            TypeError,
            "bias must be float16, bfloat16, float32 or float64",
        ),
        (lambda: bnfast.layer_norm(X, 3, eps=np.nan), ValueError, "eps must be finite"),
        (lambda: bnfast.rms_norm(X, 3, eps="0"), TypeError, "eps must be a real number"),
        (
            lambda: bnfast.layer_norm(X[0], (4, 3), W, out=W),
            ValueError,
            "out must not share memory",
        ),
        (
            lambda: bnfast.rms_norm(X.astype(int), 3),
            TypeError,
            "x must be float16, bfloat16, float32 or float64",
        ),
        (
            lambda: bnfast.layer_norm_backward(X, X, 3, np.zeros((2, 3)), np.ones((2, 4))),
            *(ValueError, r"mean must be as forward returned it, shape \(2, 4\)"),
        ),
        (
            lambda: bnfast.rms_norm_backward(X[:1], X, 3, np.ones((2, 4))),
            *(ValueError, "dy must have the shape and dtype of x"),
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
