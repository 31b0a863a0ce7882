"""The same bits for any number of threads, any instruction set, any run, any buffer."""

import numpy as np
import pytest

import bnfast
from cases import BUFFERS, batches, small_batches
from members import MEMBERS

EXTRA = [
    *[((3, 5, 40000), 1), ((9000, 7), 1), ((2, 3, 300000), 1), ((1300, 300), 1), ((5, 9000), 1)],
    *[((20, 70, 49), 1), ((5, 70, 49), 1)],
]


def everything(x, dy, weight, bias, axis):
    """All results of all operations, as one list."""
    channels = x.shape[axis]
    y, mean, invstd = bnfast.batch_norm_forward(x, weight, bias, axis=axis)
    running_mean, running_var = np.zeros(channels, x.dtype), np.ones(channels, x.dtype)
    trained = bnfast.batch_norm(x, running_mean, running_var, weight, bias, True, axis=axis)
    evaluated = bnfast.batch_norm(x, running_mean, running_var, weight, bias, axis=axis)
    moments = bnfast.moments(x, axis)
    sums = bnfast.batch_norm_backward_sums(dy, x, mean, invstd, axis=axis)
    count = x.size // channels
    return [
        *(y, mean, invstd, trained, running_mean, running_var, evaluated),
        *(moments.mean, moments.m2),
        *bnfast.batch_norm_backward(dy, x, mean, invstd, weight, axis=axis),
        *bnfast.batch_norm_backward(dy, x, mean, invstd, weight, axis=axis, training=False),
        *sums,
        bnfast.batch_norm_backward_input(dy, x, mean, invstd, weight, *sums, count, axis=axis),
    ]


def inputs(rng, shape, axis, dtype):
    x, dy = rng.normal(300, 2, (2, *shape)).astype(dtype)
    weight, bias = rng.normal(size=(2, shape[axis])).astype(dtype)
    return x, dy, weight, bias, axis


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("shape", "axis"), [*batches(), *EXTRA], ids=str)
def test_every_instruction_set_gives_the_same_bits(dtype, rng, use_isa, shape, axis):
    arguments = inputs(rng, shape, axis, dtype)
    use_isa("baseline")
    expected = everything(*arguments)
    for name in bnfast.available_isas():
        use_isa(name)
        assert_same(everything(*arguments), expected)


@pytest.mark.parametrize(("shape", "axis"), [*small_batches(), *EXTRA], ids=str)
def test_any_number_of_threads_gives_the_same_bits(isa, dtype, rng, use_threads, shape, axis):
    arguments = inputs(rng, shape, axis, dtype)
    use_threads(1)
    expected = everything(*arguments)
    for num_threads in (2, 3, 4, 7):
        use_threads(num_threads)
        assert_same(everything(*arguments), expected)


@pytest.mark.parametrize(("shape", "axis"), [*small_batches(), *EXTRA], ids=str)
def test_the_sizes_of_caches_change_no_bit(isa, dtype, rng, use_threads, use_caches, shape, axis):
    arguments = inputs(rng, shape, axis, dtype)
    use_threads(2)
    use_caches(1 << 50, 1 << 50)
    expected = everything(*arguments)
    for level2, last_level in ((0, 0), (1 << 14, 1 << 16), (1 << 50, 0)):
        use_caches(level2, last_level)
        assert_same(everything(*arguments), expected)


@pytest.mark.parametrize(("shape", "axis"), EXTRA, ids=str)
def test_every_run_gives_the_same_bits(dtype, rng, use_threads, shape, axis):
    arguments = inputs(rng, shape, axis, dtype)
    use_threads(4)
    expected = everything(*arguments)
    for _ in range(5):
        assert_same(everything(*arguments), expected)


@pytest.mark.parametrize(
    "buffer",
    ["misaligned", "offset_by_one", "in_larger_array", "cropped", "reversed", "record_field"],
)
@pytest.mark.parametrize(
    "shape",
    [(3, 5, 7, 11), (13, 5, 7, 11), (2, 3, 130, 33), (2, 2, 174, 25), (70, 20), (5, 4, 1, 1)],
    ids=str,
)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_odd_strides_give_the_bits_of_a_packed_copy(
    isa, dtype, rng, use_threads, axis, buffer, shape, num_threads
):
    x, dy, weight, bias, axis = inputs(rng, shape, axis, dtype)
    use_threads(num_threads)
    expected = everything(x, dy, weight, bias, axis)
    make = BUFFERS[buffer]
    assert_same(everything(make(x), make(dy), weight, bias, axis), expected)
    assert_same(everything(make(x), dy, weight, bias, axis), expected)
    assert_same(everything(x, make(dy), weight, bias, axis), expected)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("buffer", [name for name in BUFFERS if name != "contiguous"])
@pytest.mark.parametrize("member", MEMBERS)
def test_strides_of_the_output_change_no_bit(
    dtype, rng, use_threads, axis, member, buffer, repeated
):
    """Also where those of the input, repeated along some axes, leave the order of the walk open."""
    shape = (5, 6, 7, 4)
    x, dy = rng.normal(3, 2, (2, *shape)).astype(dtype)
    if repeated:
        x = np.broadcast_to(x[:1, :, :, :1], shape)
    forward, backward, _, _, parameters, _ = MEMBERS[member]
    weight, bias = rng.normal(size=(2, *parameters(shape, axis))).astype(dtype)
    use_threads(1)
    expected = forward(x, weight, bias, 1e-5, axis)
    gradients = backward(dy, x, *expected[1:], weight, axis)
    for num_threads in (1, 3):
        use_threads(num_threads)
        for make in (BUFFERS[buffer], lambda a: BUFFERS[buffer](a.T).T):
            out = make(np.zeros(shape, dtype))
            assert_same(forward(x, weight, bias, 1e-5, axis, out), expected)
            got = backward(dy, x, *expected[1:], weight, axis, out)
            assert_same(got, gradients)


@pytest.mark.filterwarnings("ignore:running_var is infinite")
@pytest.mark.parametrize(("shape", "axis"), [((6, 40, 900), 1), ((3000, 40), 1)], ids=str)
def test_a_channel_does_not_depend_on_the_values_of_its_neighbours(
    isa, dtype, rng, use_threads, shape, axis
):
    x, dy, weight, bias, axis = inputs(rng, shape, axis, dtype)
    use_threads(3)
    expected = everything(x, dy, weight, bias, axis)
    others = np.ones(40, bool)
    others[[0, 7, 17, 39]] = False
    for array in (x, dy):
        np.moveaxis(array, axis, 0)[others] *= 1e20
    for got, want in zip(everything(x, dy, weight, bias, axis), expected, strict=True):
        where = axis if got.ndim > 1 else 0
        np.testing.assert_array_equal(
            np.moveaxis(got, where, 0)[~others], np.moveaxis(want, where, 0)[~others]
        )
