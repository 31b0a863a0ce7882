"""The gradient of batch normalization in two halves: its sums, and dx from the sums."""

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from cases import BUFFERS, batches

LARGE = 1e6  # of a mean, in standard deviations: its rounding is found again


def whole_and_halves(dy, x, saved, weight, axis):
    whole = bnfast.batch_norm_backward(dy, x, *saved, weight, axis=axis)
    sum_dy, sum_dy_xhat = bnfast.batch_norm_backward_sums(dy, x, *saved, axis=axis)
    count = x.size // x.shape[axis]
    dx = bnfast.batch_norm_backward_input(
        dy, x, *saved, weight, sum_dy, sum_dy_xhat, count, axis=axis
    )
    assert sum_dy.dtype == sum_dy_xhat.dtype == np.float64
    kind = whole[1].dtype
    return whole, (dx, sum_dy_xhat.astype(kind), sum_dy.astype(kind))


def assert_same_bytes(got, expected):
    """Also where -0 stands for 0."""
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("mean", [0.0, LARGE])
@pytest.mark.parametrize("weight_dtype", [None, np.float32, np.float64], ids=str)
@pytest.mark.parametrize(("shape", "axis"), batches(), ids=str)
def test_the_halves_make_the_bits_of_the_whole(isa, dtype, rng, shape, axis, weight_dtype, mean):
    x, dy = (rng.normal(mean, 1, shape).astype(dtype), rng.normal(size=shape).astype(dtype))
    weight = None if weight_dtype is None else rng.normal(size=shape[axis]).astype(weight_dtype)
    saved = bnfast.batch_norm_forward(x, axis=axis)[1:]
    whole, halves = whole_and_halves(dy, x, saved, weight, axis)
    assert_same_bytes(halves, whole)
    whole, halves = whole_and_halves(-0.0 * dy, x, saved, weight, axis)
    assert_same_bytes(halves, whole)


@pytest.mark.parametrize("buffer", BUFFERS)
def test_the_halves_of_odd_strides_make_the_bits_of_the_whole(dtype, rng, axis, buffer):
    x, dy = rng.normal(LARGE, 1, (2, 6, 5, 7, 11)).astype(dtype)
    saved = bnfast.batch_norm_forward(x, axis=axis)[1:]
    make = BUFFERS[buffer]
    for given in ((make(dy), make(x)), (make(dy), x), (dy, make(x))):
        whole, halves = whole_and_halves(*given, saved, None, axis)
        assert_same_bytes(halves, whole)


@pytest.mark.parametrize("scale", [1e-160, 1e160])
def test_the_halves_at_the_ends_of_the_range_make_the_bits_of_the_whole(rng, scale, axis):
    x, dy = rng.normal(size=(2, 6, 5, 7, 11))
    saved = bnfast.batch_norm_forward(scale * x, eps=1e-300, axis=axis)[1:]
    whole, halves = whole_and_halves(dy, scale * x, saved, None, axis)
    assert_same_bytes(halves, whole)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_halves_make_the_bits_of_the_whole(dtype, rng, axis, threads, use_threads):
    use_threads(threads)
    x, dy = rng.normal(LARGE, 1, (2, 8, 6, 150, 90)).astype(dtype)
    saved = bnfast.batch_norm_forward(x, axis=axis)[1:]
    whole, halves = whole_and_halves(dy, x, saved, None, axis)
    assert_same_bytes(halves, whole)


def test_the_sums_of_parts_make_dx_of_the_batch(dtype, rng, axis):
    x, dy = rng.normal(3, 2, (2, 9, 5, 6, 7)).astype(dtype)
    channels = x.shape[axis]
    weight = rng.normal(size=channels)
    mean, invstd = bnfast.batch_norm_forward(x, axis=axis)[1:]
    # Neither the channel axis nor its place matters to how a batch is cut.
    along = 0 if axis else 1
    parts = np.array_split(np.arange(x.shape[along]), 3)
    pieces = [(dy.take(part, along), x.take(part, along)) for part in parts]
    sums = sum(
        np.array(bnfast.batch_norm_backward_sums(*piece, mean, invstd, axis=axis))
        for piece in pieces
    )
    dx = [
        bnfast.batch_norm_backward_input(
            *piece, mean, invstd, weight, *sums, x.size // channels, axis=axis
        )
        for piece in pieces
    ]
    expected = reference.batch_norm_backward(dy, x, mean, invstd, weight, axis=axis)
    bound = 1e-12 if dtype == np.float64 else 2e-6
    np.testing.assert_allclose(np.concatenate(dx, along), expected[0], rtol=bound, atol=bound)
    np.testing.assert_allclose(sums, expected[:0:-1], rtol=bound, atol=100 * bound)


def test_sums_may_be_float32_and_the_count_any_positive_number(rng):
    x, dy = rng.normal(size=(2, 8, 3))
    saved = bnfast.batch_norm_forward(x)[1:]
    sums = [s.astype(np.float32) for s in bnfast.batch_norm_backward_sums(dy, x, *saved)]
    wide = [s.astype(np.float64) for s in sums]
    halves = bnfast.batch_norm_backward_input
    for count in (8, 8.0, np.int64(8), np.float32(8)):
        np.testing.assert_array_equal(
            halves(dy, x, *saved, None, *sums, count), halves(dy, x, *saved, None, *wide, 8)
        )
    got = halves(dy, x, *saved, None, *wide, 7.5)
    xhat = (x - saved[0]) * saved[1]
    expected = (dy - wide[0] / 7.5 - xhat * wide[1] / 7.5) * saved[1]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("in_place", ["dy", "x", "other"])
def test_dx_may_be_written_over_dy_or_x(dtype, rng, axis, in_place):
    x, dy = rng.normal(size=(2, 4, 3, 5, 6)).astype(dtype)
    saved = bnfast.batch_norm_forward(x, axis=axis)[1:]
    sums = bnfast.batch_norm_backward_sums(dy, x, *saved, axis=axis)
    count = x.size // x.shape[axis]
    expected = bnfast.batch_norm_backward(dy, x, *saved, axis=axis)[0]
    out = {"dy": dy, "x": x, "other": np.empty_like(x)}[in_place]
    given = dy, x, *saved, None, *sums, count
    assert bnfast.batch_norm_backward_input(*given, axis=axis, out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_an_empty_part_has_sums_of_zero_and_an_empty_dx(dtype):
    x, ones = np.zeros((0, 3, 4), dtype), np.ones(3)
    sums = bnfast.batch_norm_backward_sums(x, x, ones, ones)
    np.testing.assert_array_equal(sums, np.zeros((2, 3)))
    dx = bnfast.batch_norm_backward_input(x, x, ones, ones, None, ones, ones, 12)
    assert dx.shape == x.shape
    assert dx.dtype == dtype


def test_the_forward_pass_tracks_in_the_same_call(dtype, rng, axis):
    x = rng.normal(3, 2, (4, 3, 5, 6)).astype(dtype)
    channels = x.shape[axis]
    weight, bias = rng.normal(size=(2, channels))
    running, tracked = ([np.zeros(channels), np.ones(channels)] for _ in range(2))
    for unbiased in (True, False):
        tracks = dict(zip(("running_mean", "running_var"), tracked, strict=True))
        got = bnfast.batch_norm_forward(
            x, weight, bias, 1e-3, axis=axis, **tracks, momentum=0.3, unbiased=unbiased
        )
        expected = bnfast.batch_norm_forward(x, weight, bias, 1e-3, axis=axis)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        y = bnfast.batch_norm(
            x, *running, weight, bias, True, 0.3, 1e-3, axis=axis, unbiased=unbiased
        )
        np.testing.assert_array_equal(got[0], y)
        np.testing.assert_array_equal(tracked, running)
