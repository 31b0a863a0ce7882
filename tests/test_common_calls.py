"""Common calls are done at once in the core, with the same bits; anything else goes another way."""

import numpy as np
import pytest

import bnfast
from bnfast import _core, _threads
from cases import small_batches
from test_same_bits import assert_same, everything, inputs

MOST = 1 << 20, _threads.threads_for
SHAPE = (6, 5, 3)


@pytest.fixture
def planned(rng, dtype):
    """Arguments of a common call, whose shape the core knows."""
    x, dy, weight, bias, _ = inputs(rng, SHAPE, 1, dtype)
    mean, var = np.zeros(5, dtype), np.ones(5, dtype)
    bnfast.batch_norm(x, mean, var, weight, bias)
    bnfast.batch_norm_backward(dy, x, mean, var, weight)
    return {"x": x, "dy": dy, "mean": mean, "variance": var, "weight": weight, "bias": bias}


def inference(arguments, **changed):
    a = {**arguments, "axis": 1, "eps": 1e-5, "out": None} | changed
    return _core.scale_shift_at_once(
        *(a["x"], a["axis"], a["mean"], a["variance"], a["weight"], a["bias"], a["eps"]),
        *(None, a["out"], *MOST),
    )


def training(arguments, **changed):
    a = {**arguments, "axis": 1, "eps": 1e-5, "momentum": 0.1, "out": None} | changed
    return _core.normalize_at_once(
        *(a["x"], a["axis"], a["weight"], a["bias"], a["eps"], a["mean"], a["variance"]),
        *(a["momentum"], True, a["out"], *MOST, pytest.fail),
    )


def backward(arguments, **changed):
    a = {**arguments, "axis": 1, "out": None} | changed
    return _core.gradient_at_once(
        *(a["dy"], a["x"], a["axis"], a["mean"], a["variance"], a["weight"], False, a["out"]),
        *MOST,
    )


def never_at_once(monkeypatch):
    """Let every call go through the checks and the plan."""
    for name in dir(_core):
        if name.endswith("_at_once"):
            monkeypatch.setattr(_core, name, lambda *arguments: None)


@pytest.mark.parametrize(("shape", "axis"), small_batches(), ids=str)
def test_both_ways_give_the_same_bits(isa, dtype, rng, monkeypatch, shape, axis):
    arguments = inputs(rng, shape, axis, dtype)
    everything(*arguments)  # plans
    at_once = everything(*arguments)
    never_at_once(monkeypatch)
    assert_same(at_once, everything(*arguments))


def everything_of_rows(x, dy, weight, bias, last):
    y, mean, invstd = bnfast.layer_norm_forward(x, last, weight, bias)
    plain = bnfast.layer_norm_forward(x, last)
    z, invrms = bnfast.rms_norm_forward(x, last, weight)
    gradients = bnfast.layer_norm_backward(dy, x, last, mean, invstd, weight)
    alone = bnfast.layer_norm_backward(dy, x, last, mean, invstd, parameters=False)[:1]
    of_rms = bnfast.rms_norm_backward(dy, x, last, invrms, weight)
    return [y, mean, invstd, *plain, z, invrms, *gradients, *alone, *of_rms]


ROWS = [
    ((5, 7), 7),
    ((5, 7), (7,)),
    ((4, 3, 6), (3, 6)),
    ((2, 3), (2, 3)),
    ((300, 513), 513),
    ((4,), 4),
]


@pytest.mark.parametrize(("shape", "last"), ROWS, ids=str)
def test_both_ways_give_rows_the_same_bits(isa, dtype, rng, monkeypatch, shape, last):
    x, dy = rng.normal(2, 3, (2, *shape)).astype(dtype)
    weight, bias = rng.normal(size=(2, *np.atleast_1d(last))).astype(dtype)
    everything_of_rows(x, dy, weight, bias, last)  # plans
    at_once = everything_of_rows(x, dy, weight, bias, last)
    never_at_once(monkeypatch)
    assert_same(at_once, everything_of_rows(x, dy, weight, bias, last))


@pytest.fixture
def rows(rng, dtype):
    """Arguments of common calls on rows, whose shape the core knows."""
    x, dy = rng.normal(2, 3, (2, 6, 5)).astype(dtype)
    weight, bias = rng.normal(size=(2, 5)).astype(dtype)
    _, mean, invstd = bnfast.layer_norm_forward(x, 5, weight, bias)
    bnfast.layer_norm_backward(dy, x, 5, mean, invstd, weight)
    return {"x": x, "dy": dy, "weight": weight, "bias": bias, "mean": mean, "invstd": invstd}


def rows_forward(arguments, **changed):
    a = {**arguments, "sizes": 5, "eps": 1e-5, "out": None} | changed
    return _core.normalize_rows_at_once(
        *(a["x"], a["sizes"], a["weight"], a["bias"], a["eps"], False, a["out"], *MOST)
    )


def rows_backward(arguments, **changed):
    a = {**arguments, "sizes": 5, "parameters": True, "out": None} | changed
    return _core.row_gradient_at_once(
        *(a["dy"], a["x"], a["sizes"], a["mean"], a["invstd"], a["weight"], False),
        *(a["parameters"], a["out"], *MOST),
    )


@pytest.mark.parametrize("call", [rows_forward, rows_backward])
def test_other_rows_go_through_the_checks(rows, call):
    x = rows["x"]
    for sizes in (5, (5,)):
        assert call(rows, sizes=sizes) is not None
        for out in (np.empty_like(x), x.copy()):
            assert call(rows, sizes=sizes, out=out)[0] is out
    for sizes in (6, 1 << 70, (6, 5), (), [5], (5.0,), 5.0, True, None, (1, 6, 5)):
        assert call(rows, sizes=sizes) is None, sizes
    for other in [*odd_arrays(x), np.float32(3)]:
        assert call(rows, x=other) is None, type(other)
    others = odd_parameters(rows["weight"])
    for other in [*others, rows["weight"].astype(np.longdouble), np.ones(6, x.dtype)]:
        assert call(rows, weight=other) is None, other
    memory = np.ones(2 * x.size, x.dtype)
    partly, inside = memory[: x.size].reshape(x.shape), memory[:5]
    assert call(rows, weight=inside, out=partly) is None
    assert call(rows, x=partly, out=memory[1 : x.size + 1].reshape(x.shape)) is None


def test_other_statistics_of_rows_go_through_the_checks(rows):
    for name in ("mean", "invstd"):
        for other in (rows[name][:-1], rows[name][:, None], rows[name].tolist(), None):
            assert rows_backward(rows, **{name: other}) is None
    assert rows_backward(rows, dy=rows["dy"][:3]) is None
    assert rows_backward(rows, parameters=1) is None
    for eps in (-1e-5, np.inf, np.nan, 1, None):
        assert rows_forward(rows, eps=eps) is None


def test_a_planned_shape_is_done_at_once(planned):
    for call in (inference, training, backward):
        assert call(planned) is not None
        assert call(planned, axis=-2) is not None
        assert call(planned, weight=None) is not None
        assert call(planned, weight=planned["weight"].astype(np.float64)) is not None


def test_out_is_what_is_returned(planned):
    x = planned["x"]
    for out in (np.empty_like(x), x.copy()):
        assert inference(planned, out=out) is out
        assert training(planned, out=out)[0] is out
        assert backward(planned, out=out)[0] is out
    expected = inference(planned)
    np.testing.assert_array_equal(inference(planned, out=x), expected)


def odd_arrays(x):
    """Arrays that a common call does not take in the place of x."""
    yield np.ma.array(x)
    yield x.tolist()
    yield x.astype(x.dtype.newbyteorder())
    yield x.astype(np.float16)
    yield x.astype(np.int64)
    yield np.asfortranarray(x)
    yield np.stack([x, x], -1)[..., 0]
    yield x[:3]  # another shape, not planned
    yield x[0, 0]
    yield None


def odd_parameters(parameter):
    yield parameter[:-1].copy()
    yield np.stack([parameter, parameter], 1)[:, 0]
    yield parameter[None]
    yield parameter.tolist()
    yield parameter.astype(np.float16)
    yield np.ma.array(parameter)


@pytest.mark.parametrize("call", [inference, training, backward])
def test_anything_else_goes_through_the_checks(planned, call):
    x = planned["x"]
    for other in odd_arrays(x):
        assert call(planned, x=other) is None, type(other)
    for name in ("weight", "mean", "variance"):
        for other in odd_parameters(planned[name]):
            assert call(planned, **{name: other}) is None, (name, other)
    for axis in (3, -4, 1.0, True, np.int64(1), None):
        assert call(planned, axis=axis) is None, axis
    read_only = np.empty_like(x)
    read_only.flags.writeable = False
    memory = np.empty(2 * x.size, x.dtype)
    partly = memory[: x.size].reshape(SHAPE)
    for out in (read_only, x.tolist(), np.empty(3, x.dtype), np.empty(SHAPE, np.float16)):
        assert call(planned, out=out) is None
    for start in (1, x.size - 1):
        overlapping = memory[start : start + x.size].reshape(SHAPE)
        assert call(planned, x=partly, out=overlapping) is None
    for name in ("weight", "mean", "variance"):
        inside = memory[:5]
        inside[:] = 1
        assert call(planned, **{name: inside}, out=partly) is None, name


def test_odd_numbers_go_through_the_checks(planned):
    for eps in (-1e-5, np.inf, np.nan, 1, "1", None, np.float32(1)):
        assert inference(planned, eps=eps) is None
        assert training(planned, eps=eps) is None
    assert inference(planned, eps=0.0) is not None
    assert training(planned, eps=0.0) is None
    for momentum in (-0.5, np.inf, np.nan, 1, None):
        assert training(planned, momentum=momentum) is None


def test_running_statistics_that_share_memory_go_through_the_checks(planned):
    x, mean = planned["x"], planned["mean"]
    assert training(planned, variance=mean) is None
    assert training(planned, mean=None) is None
    assert training(planned, mean=x.reshape(-1)[:5]) is None
    mean.flags.writeable = False
    assert training(planned) is None


def test_one_value_per_channel_goes_through_the_checks(dtype):
    x = np.ones((1, 5), dtype)
    mean, var = np.zeros(5, dtype), np.ones(5, dtype)
    bnfast.batch_norm(x, mean, var)
    with pytest.raises(ValueError, match="more than one value per channel"):
        bnfast.batch_norm(x, mean, var, training=True)


def test_much_work_goes_to_the_threads(planned):
    x, asked = planned["x"], []

    def threads_for(moved):
        asked.append(moved)
        return 1

    arguments = x, 1, planned["mean"], planned["variance"], None, None, 1e-5, None, None
    assert _core.scale_shift_at_once(*arguments, 2 * x.nbytes + 1, threads_for) is not None
    assert asked == []
    assert _core.scale_shift_at_once(*arguments, 2 * x.nbytes, threads_for) is not None
    assert asked == [2 * x.nbytes]
