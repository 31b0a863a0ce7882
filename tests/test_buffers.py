"""Awkward memory: strides, alignment, order, read-only, broadcast; where results are written."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

import bnfast
from bnfast import _reference as reference
from cases import BUFFERS
from oracle import check_backward, check_forward, check_moments
from tolerances import CLOSE_F32, ROUNDED_F32

SHAPES = [
    *[(4, 3, 5, 6), (13, 3, 5, 6), (2, 3, 40, 50), (1, 7, 3), (33, 20), (3, 1, 9, 9)],
    (2, 3, 2, 2, 2),
]


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_strides_of_the_input(isa, dtype, rng, axis, buffer, shape):
    x = BUFFERS[buffer](rng.normal(3, 2, shape).astype(dtype))
    dy = BUFFERS[buffer](rng.normal(size=shape).astype(dtype))
    weight, bias = rng.normal(size=(2, shape[axis])).astype(dtype)
    check_moments(x, axis)
    check_forward(x, weight, bias, axis=axis)
    check_backward(dy, x, weight, axis)
    check_backward(dy, x, weight, axis, training=False)


@pytest.mark.parametrize(("x_buffer", "other_buffer"), list(itertools.permutations(BUFFERS, 2)))
def test_every_pair_of_layouts(dtype, rng, axis, x_buffer, other_buffer):
    shape = (3, 4, 5, 6)
    x = BUFFERS[x_buffer](rng.normal(3, 2, shape).astype(dtype))
    dy = BUFFERS[other_buffer](rng.normal(size=shape).astype(dtype))
    out = BUFFERS[other_buffer](np.zeros(shape, dtype))
    assert check_forward(x, axis=axis, out=out) is out
    assert check_backward(dy, x, axis=axis, out=BUFFERS[x_buffer](np.zeros(shape, dtype))) is not x
    assert check_backward(dy, x, axis=axis, training=False, out=out) is out


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_every_transposition(dtype, rng, axis, order):
    x = rng.normal(3, 2, (3, 4, 5, 6)).astype(dtype).transpose(order)
    check_forward(x, axis=axis)
    check_backward(x[::-1], x, axis=axis)


WINDOWS = [np.s_[1:-1, 1:-1, 1:-1, 1:-1], np.s_[1:-1], np.s_[:, 1:-1], np.s_[:, :, :, 1:-1]]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("spatial", [(5, 6), (9, 31)], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_window_of_a_larger_output_is_all_that_is_written(
    isa, dtype, rng, use_threads, use_caches, axis, window, spatial, streamed
):
    if streamed:
        use_caches(0, 0)
    frame = np.full((5, 6, *spatial), 7, dtype)
    out = frame[window]
    x, dy = rng.normal(size=(2, *out.shape)).astype(dtype)
    for num_threads in (1, 3):
        use_threads(num_threads)
        check_forward(x, axis=axis, out=out)
        check_backward(dy, x, axis=axis, out=out)
        check_backward(dy, x, axis=axis, training=False, out=out)
    out[...] = 7
    np.testing.assert_array_equal(frame, 7)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("spatial", [(5, 6), (20, 31)], ids=str)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 7, 15])
def test_streamed_outputs_begin_anywhere_in_a_line(
    isa, dtype, rng, use_threads, use_caches, axis, num_threads, spatial, offset
):
    use_threads(num_threads)
    use_caches(0, 0)
    x, dy = rng.normal(3, 2, (2, 5, 9, *spatial)).astype(dtype)
    frame = np.full(x.size + 40, 7, dtype)
    out = frame[offset : offset + x.size].reshape(x.shape)
    check_forward(x, axis=axis, out=out)
    check_backward(dy, x, axis=axis, out=out)
    check_backward(dy, x, axis=axis, training=False, out=out)
    out[...] = 7
    np.testing.assert_array_equal(frame, 7)


@pytest.mark.parametrize("repeated", [0, 1, 2, (0, 2), (1, 2), (0, 1, 2)])
def test_broadcast_input(isa, dtype, rng, repeated):
    small = [4, 5, 6]
    for d in np.atleast_1d(repeated):
        small[d] = 1
    x = np.broadcast_to(rng.normal(size=small).astype(dtype), (4, 5, 6))
    for axis in (0, 1, 2):
        check_moments(x, axis)
        check_forward(x, axis=axis)
        check_backward(x, x, axis=axis)


def test_read_only_arguments(isa, dtype, rng, axis):
    x, dy = rng.normal(size=(2, 3, 4, 4)).astype(dtype)
    weight, bias = rng.normal(size=(2, 4)).astype(dtype)
    for array in (x, dy, weight, bias):
        array.flags.writeable = False
    check_forward(x, weight, bias, axis=axis)
    check_backward(dy, x, weight, axis)
    bnfast.batch_norm(x, bias, weight**2, weight, bias, axis=axis)


@pytest.mark.parametrize("buffer", BUFFERS)
def test_in_place_is_the_same(isa, dtype, rng, use_threads, axis, buffer):
    shape = (5, 6, 7, 8)
    make = BUFFERS[buffer]
    x, dy = rng.normal(3, 2, (2, *shape)).astype(dtype)
    weight, bias = rng.normal(size=(2, shape[axis])).astype(dtype)
    mean, var = np.zeros(shape[axis]), np.ones(shape[axis])
    expected, batch_mean, invstd = bnfast.batch_norm_forward(make(x), weight, bias, axis=axis)
    evaluated = bnfast.batch_norm(make(x), mean, var, weight, bias, axis=axis)
    saved = batch_mean, invstd, weight
    gradient = bnfast.batch_norm_backward(make(dy), make(x), *saved, axis=axis)[0]
    for num_threads in (1, 3):
        use_threads(num_threads)
        out = make(x)
        bnfast.batch_norm_forward(out, weight, bias, axis=axis, out=out)
        np.testing.assert_array_equal(out, expected)
        out = make(x)
        bnfast.batch_norm(out, mean, var, weight, bias, axis=axis, out=out)
        np.testing.assert_array_equal(out, evaluated)
        out = make(dy)
        bnfast.batch_norm_backward(out, make(x), *saved, axis=axis, out=out)
        np.testing.assert_array_equal(out, gradient)
        out = make(x)
        bnfast.batch_norm_backward(make(dy), out, *saved, axis=axis, out=out)
        np.testing.assert_array_equal(out, gradient)


def test_dy_may_be_x_itself(dtype, rng, axis):
    x = rng.normal(size=(5, 6, 6)).astype(dtype)
    check_backward(x, x, axis=axis)


def test_a_new_output_is_laid_out_like_the_input(dtype, rng):
    x = BUFFERS["channels_last"](rng.normal(size=(3, 4, 5, 6)).astype(dtype))
    y, mean, invstd = bnfast.batch_norm_forward(x)
    assert y.strides == x.strides
    assert bnfast.batch_norm(x, mean, invstd).strides == x.strides
    assert bnfast.batch_norm_backward(x, x, mean, invstd)[0].strides == x.strides


def test_a_new_output_is_a_plain_array(rng):
    class Labelled(np.ndarray):
        pass

    x = rng.normal(size=(3, 4)).view(Labelled)
    assert type(bnfast.batch_norm_forward(x)[0]) is np.ndarray


def test_strided_parameters_and_running_statistics(dtype, rng):
    x = rng.normal(size=(6, 5, 3)).astype(dtype)
    table = rng.uniform(1, 2, (5, 4)).astype(dtype)
    expected_mean, expected_var = reference.update_running(table[:, 2], table[:, 3], x)
    weight, bias = table[:, 0], table[::-1, 1]
    expected, _, _ = reference.batch_norm_forward(x, weight, bias)
    y = bnfast.batch_norm(x, table[:, 2], table[:, 3], weight, bias, training=True)
    np.testing.assert_allclose(y, expected, rtol=CLOSE_F32, atol=CLOSE_F32)
    np.testing.assert_allclose(table[:, 2], expected_mean, rtol=ROUNDED_F32)
    np.testing.assert_allclose(table[:, 3], expected_var, rtol=ROUNDED_F32)


def test_misaligned_running_statistics(rng):
    x = rng.normal(size=(6, 5, 3))
    mean = BUFFERS["misaligned"](np.zeros(5))
    var = BUFFERS["misaligned"](np.ones(5))
    bnfast.batch_norm(x, mean, var, training=True)
    expected_mean, expected_var = reference.update_running(np.zeros(5), np.ones(5), x)
    np.testing.assert_allclose(mean, expected_mean)
    np.testing.assert_allclose(var, expected_var)


MEMORY = """
import resource, sys
import numpy as np, bnfast
unit = 1 if sys.platform == "darwin" else 1024
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
memory, dy, out = (np.ones((16, 32, 128, 260), np.float32) for _ in range(3))
for axis in (1, 3):
    for step in (1, 2):
        arrays = [a[..., ::step] for a in (memory, dy, out)]
        small = [a[:2, :, :2] for a in arrays]
        for x, dy_, y in (small, arrays):
            before = peak()
            channels = x.shape[axis]
            mean, var = np.zeros(channels), np.ones(channels)
            bnfast.batch_norm(x, mean, var, training=True, axis=axis, out=y)
            bnfast.batch_norm(x, mean, var, axis=axis, out=y)
            bnfast.batch_norm_backward(dy_, x, mean, var, axis=axis, out=y)
        grown = peak() - before
        assert grown < max(arrays[0].nbytes // 100, 1 << 20), (axis, step, grown)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_no_copy_as_large_as_the_input_is_made():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
