"""Each argument of a call is as the core needs it, or converted on its own: with the same bits."""

import numpy as np
import pytest

import bnfast
from bnfast import _primitives, _threads

SHAPE = (6, 4, 3, 5)

# How x, dy and out may lie in memory.
MEMORY = {
    "plain": lambda x: x.copy(),
    "permuted": lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "strided": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
    "reversed": lambda x: np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1],
    "misaligned": lambda x: np.frombuffer(b"." + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
}


def of_batch(x, dy, weight, bias, eps, axis):
    y, mean, invstd = bnfast.batch_norm_forward(x, weight, bias, eps, axis=axis)
    z = bnfast.batch_norm(x, mean, invstd, weight, bias, eps=eps, axis=axis)
    gradients = bnfast.batch_norm_backward(dy, x, mean, invstd, weight, axis=axis)
    running = np.zeros(4), np.ones(4)
    tracked = bnfast.batch_norm(x, *running, weight, bias, True, eps=eps, axis=axis)
    tracks = {"running_mean": running[0], "running_var": running[1]}
    forward = bnfast.batch_norm_forward(x, weight, bias, eps, axis=axis, **tracks)
    sums = bnfast.batch_norm_backward_sums(dy, x, mean, invstd, axis=axis)
    dx = bnfast.batch_norm_backward_input(dy, x, mean, invstd, weight, *sums, 90.0, axis=axis)
    return [y, mean, invstd, z, *gradients, tracked, *running, *forward, *sums, dx]


def of_instances(x, dy, weight, bias, eps, axis):
    y, mean, invstd = bnfast.instance_norm_forward(x, weight, bias, eps, axis=axis)
    return [y, *bnfast.instance_norm_backward(dy, x, mean, invstd, weight, axis=axis)]


def of_groups(x, dy, weight, bias, eps, axis):
    y, mean, invstd = bnfast.group_norm_forward(x, 2, weight, bias, eps, axis=axis)
    return [y, *bnfast.group_norm_backward(dy, x, mean, invstd, weight, axis=axis)]


def of_responses(x, dy, weight, bias, eps, axis):
    y, invrms = bnfast.filter_response_norm_forward(x, weight, bias, bias, eps, axis=axis)
    given = dy, x, invrms, weight, bias, bias
    return [y, *bnfast.filter_response_norm_backward(*given, axis=axis)[:4]]


def of_ghosts(x, dy, weight, bias, eps, axis):
    y, mean, invstd = bnfast.ghost_batch_norm_forward(x, 4, weight, bias, eps, axis=axis)
    gradients = bnfast.ghost_batch_norm_backward(dy, x, 4, mean, invstd, weight, axis=axis)
    running = np.zeros(4), np.ones(4)
    tracked = bnfast.ghost_batch_norm(x, 3, *running, weight, bias, True, eps=eps, axis=axis)
    return [y, mean, invstd, *gradients, tracked, *running]


def of_conditions(x, dy, weight, bias, eps, axis):
    weight, bias = (np.tile(parameter, (len(x), 1)) for parameter in (weight, bias))
    running = np.zeros(4), np.ones(4)
    given, options = (x, weight, bias), {"eps": eps, "axis": axis}
    tracked = bnfast.conditional_batch_norm(*given, *running, True, **options)
    evaluated = bnfast.conditional_batch_norm(*given, *running, **options)
    y, *saved = bnfast.conditional_batch_norm_forward(*given, **options)
    gradients = bnfast.conditional_batch_norm_backward(dy, x, *saved, weight, axis=axis)
    constant = bnfast.conditional_batch_norm_backward(
        dy, x, *saved, weight, axis=axis, training=False
    )
    return [y, *saved, *gradients, *constant, tracked, evaluated, *running]


def of_corrected(x, dy, weight, bias, eps, axis):
    running, options = (np.zeros(4), np.ones(4)), {"r_max": 3.0, "d_max": 5.0, "axis": axis}
    y, saved = bnfast.batch_renorm_forward(x, *running, weight, bias, 0.1, eps, **options)
    z = bnfast.batch_renorm(x, *running, weight, bias, eps=eps, **options)
    gradients = bnfast.batch_renorm_backward(dy, x, saved, weight, axis=axis)
    return [y, *saved, z, *gradients, *running]


def of_lengths(x, dy, weight, bias, eps, axis):
    del bias
    dim = axis if axis >= 0 else axis + x.ndim
    w, norm = bnfast.weight_norm_forward(x, weight, dim, eps)
    return [w, norm, *bnfast.weight_norm_backward(dy, x, weight, norm, dim, eps)]


def of_filters(x, dy, weight, bias, eps, axis):
    del bias
    found = []
    for standardization in ("weight_standardization", "scaled_weight_standardization"):
        forward = getattr(bnfast, f"{standardization}_forward")
        backward = getattr(bnfast, f"{standardization}_backward")
        y, *saved = forward(x, weight, eps=eps, axis=axis)
        found += [y, *saved, *backward(dy, x, *saved, weight, eps=eps, axis=axis)]
    return found


def of_rows(x, dy, weight, bias, eps, axis):
    del axis
    weight, bias = (np.resize(parameter, x.shape[2:]) for parameter in (weight, bias))
    weight, bias = weight.astype(x.dtype), bias.astype(x.dtype)
    y, mean, invstd = bnfast.layer_norm_forward(x, x.shape[2:], weight, bias, eps)
    z, invrms = bnfast.rms_norm_forward(x, x.shape[2:], weight, eps)
    gradients = bnfast.layer_norm_backward(dy, x, x.shape[2:], mean, invstd, weight)
    return [y, z, *gradients, *bnfast.rms_norm_backward(dy, x, x.shape[2:], invrms, weight)]


def of_pixels(x, dy, weight, bias, eps, axis):
    sizes = (x.shape[axis],)
    y, mean, invstd = bnfast.layer_norm_forward(x, sizes, weight, bias, eps, axis=(1,))
    z, invrms = bnfast.rms_norm_forward(x, sizes, weight, eps, axis=1)
    gradients = bnfast.layer_norm_backward(dy, x, sizes, mean, invstd, weight, axis=(1,))
    return [y, z, *gradients, *bnfast.rms_norm_backward(dy, x, sizes, invrms, weight, axis=1)]


OF_CHANNELS = [of_batch, of_instances, of_groups, of_responses, of_ghosts, of_corrected]
CALLS = [*OF_CHANNELS, of_conditions, of_lengths, of_filters, of_rows, of_pixels]


@pytest.fixture
def arguments(rng, dtype):
    x, dy = rng.normal(2, 3, (2, *SHAPE)).astype(dtype)
    weight, bias = rng.normal(size=(2, 4)).astype(dtype)
    return {"x": x, "dy": dy, "weight": weight, "bias": bias, "eps": 1e-3, "axis": 1}


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def nothing_to_convert(monkeypatch):
    class Untouchable:
        def __getattr__(self, name):
            pytest.fail(f"_validation.{name} was asked")

    monkeypatch.setattr(_primitives, "_validation", Untouchable())


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("call", CALLS)
def test_any_strides_are_as_the_core_needs_them(arguments, call, memory, nothing_to_convert):
    lying = {name: MEMORY[memory](arguments[name]) for name in ("x", "dy")}
    assert all(np.isfinite(array).all() for array in call(**{**arguments, **lying}))


@pytest.mark.parametrize("memory", MEMORY)
def test_out_of_any_strides_is_as_the_core_needs_it(arguments, memory, nothing_to_convert):
    x, weight = (arguments[name] for name in ("x", "weight"))
    expected = bnfast.batch_norm_forward(x, weight)[0]
    out = MEMORY[memory](np.zeros(2 * len(x) * x[0].size, x.dtype)[: x.size].reshape(SHAPE))
    if not out.flags.writeable:
        out = np.frombuffer(bytearray(out.nbytes + 1), x.dtype, offset=1).reshape(SHAPE)
    assert bnfast.batch_norm_forward(x, weight, out=out)[0] is out
    np.testing.assert_array_equal(out, expected)
    lying = MEMORY[memory](x).copy(order="K")
    assert bnfast.batch_norm_forward(lying, weight, out=lying)[0] is lying


class Subclass(np.ndarray):
    """Of the same memory."""


def odd_forms(parameter):
    yield parameter.tolist()
    yield np.repeat(parameter, 2)[::2]
    yield parameter[::-1].copy()[::-1]
    yield np.frombuffer(b"." + parameter.tobytes(), parameter.dtype, offset=1)
    yield parameter.view(Subclass)
    yield memoryview(parameter)


@pytest.mark.parametrize("call", OF_CHANNELS)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameters_in_odd_forms_are_converted(arguments, call, name):
    wide = {key: arguments[key].astype(np.float64) for key in ("weight", "bias")}
    expected = call(**{**arguments, **wide})
    for other in odd_forms(wide[name]):
        assert_same(call(**{**arguments, **wide, name: other}), expected)


@pytest.mark.parametrize("call", CALLS)
def test_numbers_in_odd_forms_are_converted(arguments, call):
    arguments["eps"] = 0.5
    expected = call(**arguments)
    for eps in (np.float32(0.5), np.float64(0.5), np.array(0.5), np.float16(0.5)):
        assert_same(call(**{**arguments, "eps": eps}), expected)
    for axis in (np.int64(1), -3, np.int8(-3)):
        assert_same(call(**{**arguments, "axis": axis}), expected)


@pytest.mark.parametrize("call", CALLS)
def test_input_in_odd_forms_is_converted(arguments, call):
    expected = call(**arguments)
    x, dy = arguments["x"], arguments["dy"]
    for a, b in ((x.view(Subclass), dy), (memoryview(x), dy), (x, dy.view(Subclass))):
        assert_same(call(**{**arguments, "x": np.asarray(a), "dy": b}), expected)
    y = bnfast.batch_norm_forward(x.view(Subclass))[0]
    assert type(y) is np.ndarray
    np.testing.assert_array_equal(y, bnfast.batch_norm_forward(x)[0])


@pytest.mark.parametrize("groups", [4, 2, 1, np.int64(2)])
def test_the_number_of_groups_may_be_any_integer(arguments, groups):
    x = arguments["x"]
    _, mean, invstd = bnfast.group_norm_forward(x, groups)
    assert mean.shape == invstd.shape == (len(x), groups)
    grouped = x.astype(np.float64).reshape(len(x), groups, -1)
    np.testing.assert_allclose(mean, grouped.mean(2), rtol=1e-6)


def test_sizes_of_rows_may_be_any_integers(arguments):
    x = arguments["x"]
    expected = bnfast.layer_norm_forward(x, (3, 5))
    for sizes in ([3, 5], (np.int64(3), 5), np.array([3, 5]).tolist()):
        assert_same(bnfast.layer_norm_forward(x, sizes), expected)
    assert_same(bnfast.layer_norm_forward(x, (3, 5), axis=(2, 3)), expected)
    assert_same(bnfast.layer_norm_forward(x, np.int64(5)), bnfast.layer_norm_forward(x, 5))


def test_running_statistics_that_are_not_contiguous_are_updated_in_place(arguments):
    x = arguments["x"]
    plain = np.zeros(4), np.ones(4)
    mean, var = np.zeros(8)[::2], np.ones(4)[::-1]
    expected = bnfast.batch_norm(x, *plain, training=True)
    np.testing.assert_array_equal(bnfast.batch_norm(x, mean, var, training=True), expected)
    assert_same([mean, var], plain)


def test_much_work_asks_for_threads(arguments, monkeypatch):
    x, asked = arguments["x"], []
    monkeypatch.setattr(_threads, "threads_for", lambda moved: asked.append(moved) or 1)
    for serial, expected in ((3 * x.nbytes + 1, []), (3 * x.nbytes, [3 * x.nbytes])):
        monkeypatch.setattr(_threads, "SERIAL_BYTES", serial)
        bnfast.batch_norm_forward(x)
        assert asked == expected
