"""Synchronized batch norm, on ranks that are threads: the joined batch, agreement, failures."""

import copy
import dataclasses
import inspect
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bnfast
from bnfast import _reference as reference
from bnfast.distributed import (
    Communicator,
    MPICommunicator,
    SyncBatchNorm,
    Synchronized,
    TorchCommunicator,
    sync_batch_norm_backward,
    sync_batch_norm_forward,
)
from bnfast.distributed.exchange import exchanged
from ranks import on_ranks, without_errors

OF_DOUBLE = 1e-12  # of statistics, outputs and gradients of float64, in their own size
OF_SINGLE = 1e-6  # the promise of float32 outputs and gradients


def cut(x, sizes, along):
    """Parts of so many neighbours along an axis that has no channels."""
    return np.split(x, np.cumsum(sizes)[:-1], along)


def step_of(part, dy, weight, bias, axis, running, **keywords):
    """Forward and backward of a rank, and what it tracked."""

    def step(communicator):
        rank, tracked = communicator.rank, [statistic.copy() for statistic in running]
        tracks = dict(zip(("running_mean", "running_var"), tracked, strict=True))
        y, saved = sync_batch_norm_forward(
            part[rank], communicator, weight, bias, axis=axis, **tracks, **keywords
        )
        gradients = sync_batch_norm_backward(
            dy[rank], part[rank], saved, communicator, weight, axis=axis
        )
        return y, saved, tracked, *gradients

    return step


def numbers(saved):
    return saved.mean, saved.invstd, saved.count, saved.mean_low


def same_bits(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def close(got, expected, bound, size=None):
    largest = np.max(np.abs(expected), initial=1.0) if size is None else size
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound * largest)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_split_into_ranks_makes_what_the_joined_batch_makes(data):
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5), "sizes")
    channels = data.draw(st.integers(1, 5), "channels")
    inner = data.draw(st.lists(st.integers(1, 5), max_size=2), "inner")
    axis = data.draw(st.sampled_from([1, -1]), "axis")
    dtype = data.draw(st.sampled_from([np.float32, np.float64]), "dtype")
    mean = data.draw(st.sampled_from([0.0, 3.0, -1e3, 1e6]), "mean")
    unbiased = data.draw(st.booleans(), "unbiased")
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32), "seed"))
    shape = (sum(sizes), channels, *inner) if axis == 1 else (sum(sizes), *inner, channels)
    x, dy = rng.normal(mean, 2, shape).astype(dtype), rng.normal(size=shape).astype(dtype)
    weight, bias = rng.normal(size=(2, channels))
    running = np.full(channels, 0.5), np.full(channels, 2.0)
    count = x.size // channels
    step = step_of(
        *(cut(x, sizes, 0), cut(dy, sizes, 0), weight, bias, axis, running), unbiased=unbiased
    )
    results = on_ranks(len(sizes), step)
    if count == 1 and unbiased:
        assert all("more than one value" in str(error) for error in results)
        return
    y, saved, tracked, dx, dweight, dbias = zip(*without_errors(results), strict=True)
    for other, statistics in zip(saved, tracked, strict=True):
        same_bits(numbers(other), numbers(saved[0]))
        same_bits(statistics, tracked[0])
    assert saved[0].count == count
    tracks = {"running_mean": running[0].copy(), "running_var": running[1].copy()}
    expected = bnfast.batch_norm_forward(x, weight, bias, axis=axis, unbiased=unbiased, **tracks)
    bound = OF_SINGLE if dtype == np.float32 else OF_DOUBLE
    size = np.abs(weight).max() * count**0.5 + np.abs(bias).max()
    close(np.concatenate(y), expected[0], bound, size)
    close(saved[0].mean, expected[1], bound, 1 + abs(mean))
    if count:
        close(saved[0].invstd * (1 / expected[2]), 1.0, bound)
    for got, wanted in zip(tracked[0], tracks.values(), strict=True):
        close(got, wanted, bound)
    # float64 gradients of a mean that was rounded, as the core finds it again.
    whole = bnfast.batch_norm_backward(dy, x, *expected[1:], weight, axis=axis)
    sums = count * np.max(np.abs(dy), initial=1.0) * max(1.0, count**0.5)
    scale = np.max(expected[2], initial=1.0) * (1 + np.abs(weight).max()) * sums
    close(np.concatenate(dx), whole[0], bound, scale)
    close(sum(dweight), whole[1], bound, scale)
    close(sum(dbias), whole[2], bound, scale)


@pytest.mark.parametrize("mean", [0.0, 1e4, 1e7])
@pytest.mark.parametrize("axis", [1, -1])
def test_a_large_mean_is_as_exact_as_in_one_process(dtype, rng, mean, axis):
    x = (rng.normal(size=(12, 9, 8, 9)) + mean).astype(dtype)
    dy = rng.normal(size=x.shape).astype(dtype)
    running = np.zeros(9), np.ones(9)
    sizes = [1, 7, 0, 4]
    step = step_of(cut(x, sizes, 0), cut(dy, sizes, 0), None, None, axis, running)
    y, _, _, dx, dweight, _ = zip(*without_errors(on_ranks(4, step)), strict=True)
    wide = x.astype(np.longdouble) - mean  # exactly
    expected, *statistics = reference.batch_norm_forward(wide, axis=axis, precision=np.longdouble)
    gradients = reference.batch_norm_backward(
        dy, wide, *statistics, axis=axis, precision=np.longdouble
    )
    bound = OF_SINGLE if dtype == np.float32 else 1e-14
    close(np.concatenate(y), expected, bound, 4.0)
    close(np.concatenate(dx), gradients[0], bound, 4.0)
    close(sum(dweight.astype(np.float64) for dweight in dweight), gradients[1], bound, 1e3)


@pytest.mark.parametrize("empty", [[], [0], [1], [0, 2]])
def test_one_rank_with_values_makes_the_bits_of_one_process(dtype, rng, axis, empty):
    x, dy = rng.normal(5, 2, (2, 6, 4, 7, 7)).astype(dtype)
    weight, bias = rng.normal(size=(2, x.shape[axis])).astype(dtype)
    running = np.zeros(x.shape[axis]), np.ones(x.shape[axis])
    ranks = 1 + len(empty)
    along = 0 if axis else 1
    nothing = x.take([], along)
    part = [nothing if rank in empty else x for rank in range(ranks)]
    upstream = [nothing if rank in empty else dy for rank in range(ranks)]
    full = next(rank for rank in range(ranks) if rank not in empty)
    step = step_of(part, upstream, weight, bias, axis, running)
    got = without_errors(on_ranks(ranks, step))
    y, saved, tracked, dx, dweight, dbias = got[full]
    tracks = {"running_mean": running[0], "running_var": running[1]}
    expected = bnfast.batch_norm_forward(x, weight, bias, axis=axis, **tracks)
    gradients = bnfast.batch_norm_backward(dy, x, *expected[1:], weight, axis=axis)
    same_bits((y, saved.mean, saved.invstd, *tracked), (*expected, *running))
    if dtype == np.float32:  # float64 keeps what rounding left of any mean, not of large ones alone
        same_bits((dx, dweight, dbias), gradients)
    for rank in empty:
        y, other, tracked, dx, *of_parameters = got[rank]
        assert y.shape == dx.shape == nothing.shape
        same_bits(numbers(other), numbers(saved))
        np.testing.assert_array_equal(tracked, running)
        np.testing.assert_array_equal(of_parameters, np.zeros((2, x.shape[axis])))


def test_a_batch_that_is_empty_on_all_ranks_changes_nothing(dtype):
    x, running = np.zeros((0, 3, 4), dtype), (np.full(3, 0.5), np.full(3, 2.0))
    got = without_errors(on_ranks(2, step_of([x] * 2, [x] * 2, None, None, 1, running)))
    for y, saved, tracked, dx, *gradients in got:
        assert y.shape == dx.shape == x.shape
        assert saved.count == 0
        np.testing.assert_array_equal(tracked, running)
        np.testing.assert_array_equal(saved.invstd, bnfast.batch_norm_forward(x)[2])
        np.testing.assert_array_equal(gradients, np.zeros((2, 3)))


def test_the_order_in_which_ranks_arrive_changes_no_bit(dtype, rng):
    x, dy = rng.normal(100, 1, (2, 11, 5, 6)).astype(dtype)
    running, sizes = (np.zeros(5), np.ones(5)), [2, 5, 1, 3]
    step = step_of(cut(x, sizes, 0), cut(dy, sizes, 0), None, None, 1, running)

    def late():
        time.sleep(random.random() / 200)

    expected = without_errors(on_ranks(4, step))
    for _ in range(5):
        for got, wanted in zip(
            without_errors(on_ranks(4, step, before=late)), expected, strict=True
        ):
            same_bits((*got[2], got[0], *got[3:]), (*wanted[2], wanted[0], *wanted[3:]))
            same_bits(numbers(got[1]), numbers(wanted[1]))


def test_counts_are_exact_beyond_float64():
    counts = np.array([2**53, 1, 0, 2], np.int64)
    moments = np.zeros((4, 3, 2))

    def count(communicator):
        found, _ = exchanged(communicator, {}, int(counts[communicator.rank]), moments[0])
        return sum(found.tolist())

    assert without_errors(on_ranks(4, count)) == [2**53 + 3] * 4


def test_a_step_has_one_exchange_forward_and_one_backward(rng):
    x = rng.normal(size=(4, 300, 3)).astype(np.float32)
    few = rng.normal(size=(4, 7, 3)).astype(np.float32)

    def steps(communicator):
        wide, narrow = SyncBatchNorm(300, communicator), SyncBatchNorm(7, communicator)
        counts = []
        for _ in range(4):
            before = communicator.exchanges
            wide(x)
            narrow(few)
            narrow.backward(few)
            wide.backward(x)
            counts.append(communicator.exchanges - before)
        return counts

    for counts in without_errors(on_ranks(3, steps)):
        assert counts[2:] == [4, 4]  # once the lengths of messages are foreseen


def agrees_not(results):
    for error in results:
        assert isinstance(error, ValueError)
        assert str(error) == str(results[0])
    return str(results[0])


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        ({"channels": 4}, "channels: 3 on ranks 0, 2, 4 on rank 1"),
        ({"dtype": np.float64}, "dtype: float32 on ranks 0, 2, float64 on rank 1"),
        ({"eps": 1e-3}, "eps: 1e-05 on ranks 0, 2, 0.001 on rank 1"),
        ({"momentum": 0.2}, "momentum: 0.1 on ranks 0, 2, 0.2 on rank 1"),
        ({"unbiased": False}, "unbiased: True on ranks 0, 2, False on rank 1"),
        ({"tracks": False}, "running statistics: True on ranks 0, 2, False on rank 1"),
        ({"channels": 4000}, "channels: 3 on ranks 0, 2, 4000 on rank 1"),
    ],
    ids=str,
)
def test_what_ranks_differ_in_is_named_on_every_rank(differs, message):
    running = [(np.zeros(3), np.ones(3)) for _ in range(3)]

    def step(communicator):
        mine = {"channels": 3, "dtype": np.float32, "tracks": True}
        mine |= differs if communicator.rank == 1 else {}
        channels, tracks = mine.pop("channels"), mine.pop("tracks")
        if channels != 3:
            running[1] = np.zeros(channels), np.ones(channels)
        x = np.ones((2, channels, 4), mine.pop("dtype"))
        given = zip(("running_mean", "running_var"), running[communicator.rank], strict=True)
        return sync_batch_norm_forward(x, communicator, **(dict(given) if tracks else {}), **mine)

    assert message in agrees_not(on_ranks(3, step))
    for mean, var in running:
        np.testing.assert_array_equal(mean, 0)
        np.testing.assert_array_equal(var, 1)


def test_a_layer_in_evaluation_on_one_rank_is_found_where_the_ranks_meet(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)

    def step(communicator):
        first, second = SyncBatchNorm(3, communicator), SyncBatchNorm(3, communicator)
        first.train(communicator.rank != 1)
        before = first.state_dict()
        try:
            second(first(x))
        finally:
            for name, value in first.state_dict().items():
                np.testing.assert_array_equal(value, before[name])

    message = agrees_not(on_ranks(2, step))
    assert "layer: 0 on rank 0, 1 on rank 1" in message
    assert "the same mode" in message


def test_a_call_that_meets_a_backward_is_named(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)

    def step(communicator):
        layer = SyncBatchNorm(3, communicator)
        layer(x)
        return layer.backward(x) if communicator.rank else layer(x)

    message = agrees_not(on_ranks(2, step))
    assert "differ in call: forward on rank 0, backward on rank 1 (all ranks" in message


def test_a_layer_that_meets_the_function_is_named(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)

    def step(communicator):
        if communicator.rank:
            return sync_batch_norm_forward(
                x, communicator, running_mean=np.zeros(3), running_var=np.ones(3)
            )
        return SyncBatchNorm(3, communicator)(x)

    message = agrees_not(on_ranks(2, step))
    assert "differ in layer: 0 on rank 0, None on rank 1 (all ranks" in message


def test_counts_that_differ_in_backward_are_named(rng):
    x = rng.normal(size=(4, 3))

    def step(communicator):
        _, saved = sync_batch_norm_forward(x, communicator)
        saved = dataclasses.replace(saved, count=saved.count + communicator.rank)
        return sync_batch_norm_backward(x, x, saved, communicator)

    assert "count: 8 on rank 0, 9 on rank 1" in agrees_not(on_ranks(2, step))


FAILURES = {
    "input": lambda c, x: sync_batch_norm_forward(x[0, 0], c),
    "integers": lambda c, x: sync_batch_norm_forward(x.astype(int), c),
    "weight": lambda c, x: sync_batch_norm_forward(x, c, np.ones(5)),
    "eps": lambda c, x: sync_batch_norm_forward(x, c, eps=-1.0),
    "flag": lambda c, x: sync_batch_norm_forward(x, c, unbiased=1),
    "running": lambda c, x: sync_batch_norm_forward(x, c, running_mean=np.zeros(3)),
    "out": lambda c, x: sync_batch_norm_forward(x, c, out=x[:, :2]),
    "dy": lambda c, x: sync_batch_norm_backward(x[:1], x, SAVED, c),
    "saved": lambda c, x: sync_batch_norm_backward(x, x, None, c),
    "layer": lambda c, x: SyncBatchNorm(4, c)(x),
    "layer without mean": lambda c, x: _without_mean(c)(x),
}
SAVED = Synchronized(np.zeros(3), np.ones(3), 6, np.zeros(3))


def _without_mean(communicator):
    layer = SyncBatchNorm(3, communicator)
    layer.running_mean = None
    return layer


@pytest.mark.parametrize("failure", FAILURES)
def test_an_error_of_one_rank_is_raised_on_all(failure):
    x = np.ones((2, 3, 1))
    running = np.zeros(3), np.ones(3)
    tracks = dict(zip(("running_mean", "running_var"), running, strict=True))

    def step(communicator):
        if communicator.rank == 1:
            return FAILURES[failure](communicator, x)
        return sync_batch_norm_forward(x, communicator, **tracks)

    first, own, last = on_ranks(3, step)
    assert isinstance(own, (TypeError, ValueError))
    for told in (first, last):
        assert isinstance(told, RuntimeError)
        assert str(told) == f"rank 1 failed: {type(own).__name__}: {own}"
    np.testing.assert_array_equal(running, [np.zeros(3), np.ones(3)])


def test_ranks_go_on_after_an_error(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)

    def steps(communicator):
        layer = SyncBatchNorm(3, communicator)
        with pytest.raises((TypeError, RuntimeError)):
            layer(None if communicator.rank else x)
        assert layer.num_batches_tracked == 0
        layer(x)
        return layer.num_batches_tracked

    assert without_errors(on_ranks(2, steps)) == [1, 1]


@pytest.mark.parametrize("in_place", [(0,), (0, 1)])
def test_a_backward_that_has_nothing_to_work_with_is_told(rng, in_place):
    x = rng.normal(size=(4, 3)).astype(np.float32)

    def step(communicator):
        layer, mine = SyncBatchNorm(3, communicator), x.copy()
        layer(mine, out=mine if communicator.rank in in_place else None)
        return layer.backward(x)

    for rank, error in enumerate(on_ranks(2, step)):
        assert isinstance(error, RuntimeError)
        assert ("rank 0 failed" in str(error)) == (rank not in in_place)


def test_a_rank_that_does_not_answer_ends_the_wait_and_the_communicator(rng):
    x = rng.normal(size=(4, 3))

    def step(communicator):
        if communicator.rank:
            return None
        with pytest.raises(TimeoutError):
            sync_batch_norm_forward(x, communicator)
        with pytest.raises(RuntimeError, match=r"an earlier exchange .* failed: TimeoutError: a"):
            sync_batch_norm_forward(x, communicator)
        return True

    assert on_ranks(2, step, timeout=0.2) == [True, None]


def test_what_is_no_communicator_is_refused():
    for call in (
        lambda: SyncBatchNorm(3, None),
        lambda: sync_batch_norm_forward(np.ones((2, 3)), 5),
        lambda: sync_batch_norm_backward(np.ones((2, 3)), np.ones((2, 3)), SAVED, "mpi"),
    ):
        with pytest.raises(
            TypeError, match=r"^communicator must be an instance of Communicator, got "
        ):
            call()


@pytest.mark.parametrize("returned", [lambda block: block, bytes, lambda block: None])
def test_an_allgather_that_returns_something_else_is_named(returned):
    class Wrong(Communicator):
        rank, size = 0, 2

        def allgather(self, block):
            return returned(block)

    with pytest.raises(TypeError, match=r"allgather of Wrong must return .* \(2, "):
        sync_batch_norm_forward(np.ones((2, 3)), Wrong())


class Alone(Communicator):
    rank, size = 0, 1

    def allgather(self, block):
        return block[np.newaxis]


def test_the_layer_is_a_batch_norm_of_the_joined_batch(dtype, rng, axis):
    axis = axis or 1
    batches = rng.normal(2, 3, (3, 2, 8, 5, 5)).astype(dtype)
    options = {"momentum": None, "axis": axis, "dtype": dtype}
    layer = bnfast.BatchNorm(batches.shape[2:][axis - 1 if axis > 0 else axis], **options)

    def train(communicator):
        own = SyncBatchNorm(layer.num_features, communicator, **options)
        parts = []
        for x, dy in batches:
            cuts = [3, 0, 5]
            y = own(cut(x, cuts, 0)[communicator.rank])
            dx = own.backward(cut(dy, cuts, 0)[communicator.rank])
            parts.append((y, dx, own.weight_grad, own.bias_grad))
        evaluated = own.eval()(batches[0, 0])
        return parts, own.state_dict(), evaluated

    batches = rng.normal(2, 3, (3, 2, 8, layer.num_features, 5)).astype(dtype)
    if axis != 1:
        batches = batches.swapaxes(3, 2 + axis if axis > 0 else axis)
    got = without_errors(on_ranks(3, train))
    bound = OF_SINGLE if dtype == np.float32 else OF_DOUBLE
    for k, (x, dy) in enumerate(batches):
        close(np.concatenate([parts[k][0] for parts, *_ in got]), layer(x), bound, 4)
        close(np.concatenate([parts[k][1] for parts, *_ in got]), layer.backward(dy), bound, 4)
        close(sum(parts[k][2] for parts, *_ in got), layer.weight_grad, bound, 1e3)
        close(sum(parts[k][3] for parts, *_ in got), layer.bias_grad, bound, 1e3)
    for _, state, evaluated in got:
        for name, value in layer.state_dict().items():
            np.testing.assert_array_equal(state[name], got[0][1][name])
            close(state[name], value, bound)
        close(evaluated, layer.eval()(batches[0, 0]), bound, 4)
        layer.train()


def test_evaluation_exchanges_nothing(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)

    for tracks in (True, False):
        layer = SyncBatchNorm(3, Silent(), track_running_stats=tracks).eval()
        plain = bnfast.BatchNorm(3, track_running_stats=tracks).eval()
        np.testing.assert_array_equal(layer(x), plain(x))
        np.testing.assert_array_equal(layer.backward(x), plain.backward(x))
        np.testing.assert_array_equal(layer.weight_grad, plain.weight_grad)
        with pytest.raises(RuntimeError, match="backward needs a call"):
            layer.backward(x)


class Silent(Alone):
    def allgather(self, block):
        pytest.fail("an exchange")


NEIGHBOURS = {"activation", "negative_slope", "inplace"}


def test_the_arguments_are_those_of_batch_norm_but_for_what_follows_it():
    own = inspect.signature(SyncBatchNorm).parameters
    plain = inspect.signature(bnfast.BatchNorm).parameters
    shared = [plain[name] for name in plain if name not in NEIGHBOURS]
    assert [str(own[name]) for name in own if name != "communicator"] == [*map(str, shared)]


POLICIES = {
    "number": 0.25,
    "none": None,
    "cumulative": bnfast.CumulativeAverage(),
    "corrected": bnfast.ExponentialAverage(new=0.25, bias_corrected=True),
    "function": lambda number: 1 / (1 + number),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_momentum_of_any_kind_averages_as_in_one_process(rng, policy):
    batches, options = rng.normal(2, 3, (4, 9, 3)), {"momentum": POLICIES[policy], "dtype": "f8"}
    plain = bnfast.BatchNorm(3, **options)

    def train(communicator):
        layer = SyncBatchNorm(3, communicator, **options)
        for x in batches:
            layer(cut(x, [5, 4], 0)[communicator.rank])
        return layer.state_dict()

    for x in batches:
        plain(x)
    states = without_errors(on_ranks(2, train))
    for name, value in plain.state_dict().items():
        np.testing.assert_array_equal(states[0][name], states[1][name])
        close(states[0][name], value, OF_DOUBLE)


def test_momenta_that_differ_or_fail_are_an_error_on_every_rank(rng):
    x = rng.normal(size=(4, 3))

    def differ(communicator):
        layer = SyncBatchNorm(3, communicator, momentum=lambda number: 1 / (2 + communicator.rank))
        return layer(x)

    def fail(communicator):
        layer = SyncBatchNorm(3, communicator, momentum=lambda number: 1 / communicator.rank)
        return layer(x)

    assert "momentum: 0.5 on rank 0, 0.333" in agrees_not(on_ranks(2, differ))
    first, second = on_ranks(2, fail)
    assert isinstance(first, ZeroDivisionError)
    assert str(second) == "rank 0 failed: ZeroDivisionError: division by zero"


def test_a_learnable_momentum_is_refused():
    with pytest.raises(TypeError, match="LearnableMomentum of BatchNorm, GhostBatchNorm and"):
        SyncBatchNorm(3, Alone(), momentum=bnfast.LearnableMomentum())


@pytest.mark.parametrize("tracks", [True, False])
def test_a_frozen_layer_evaluates_and_exchanges_nothing(rng, tracks):
    x, options = rng.normal(size=(8, 3)).astype(np.float32), {"track_running_stats": tracks}
    layer = SyncBatchNorm(3, Silent(), frozen=True, **options)
    plain = bnfast.BatchNorm(3, frozen=True, **options)
    assert "frozen=True" in repr(layer)
    before = layer.state_dict()
    np.testing.assert_array_equal(layer(x), plain(x))
    np.testing.assert_array_equal(layer.backward(x), plain.backward(x))
    np.testing.assert_array_equal(layer.weight_grad, plain.weight_grad)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(RuntimeError, match="backward needs a call"):
        layer.backward(x)
    with pytest.raises(ValueError, match="x must have 3 channels"):
        layer(x[:, :2])


def test_a_layer_that_is_frozen_meanwhile_has_the_backward_of_its_call(rng):
    x = rng.normal(size=(4, 3))

    def step(communicator):
        layer = SyncBatchNorm(3, communicator, dtype=np.float64)
        layer(x)
        layer.frozen = True
        layer.backward(x)
        return communicator.exchanges

    assert without_errors(on_ranks(2, step)) == [2, 2]


def test_a_layer_that_is_frozen_on_one_rank_is_found_where_the_ranks_meet(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)

    def other_layer(communicator):
        first, second = SyncBatchNorm(3, communicator), SyncBatchNorm(3, communicator)
        first.frozen = communicator.rank == 1
        return second(first(x))

    def later(communicator):
        layer = SyncBatchNorm(3, communicator, frozen=communicator.rank == 1)
        if layer.frozen:
            layer(x)  # the others wait
            layer.frozen = False
        with pytest.raises(ValueError, match="frozen until now: False on rank 0, True on rank 1"):
            layer(x)
        layer(x)
        return layer.num_batches_tracked

    def never(communicator):
        return SyncBatchNorm(3, communicator, frozen=communicator.rank == 1)(x)

    message = agrees_not(on_ranks(2, other_layer))
    assert "layer: 0 on rank 0, 1 on rank 1" in message
    assert "frozen or not" in message
    assert without_errors(on_ranks(2, later)) == [1, 1]
    waited, frozen = on_ranks(2, never, timeout=0.2)
    assert isinstance(waited, TimeoutError)
    assert frozen.shape == x.shape


def test_layers_that_were_frozen_on_all_ranks_go_on(rng):
    x = rng.normal(size=(4, 3))

    def steps(communicator):
        layer = SyncBatchNorm(3, communicator, frozen=True)
        layer(x)
        layer.frozen = False
        layer(x)
        return layer.num_batches_tracked

    assert without_errors(on_ranks(3, steps)) == [1, 1, 1]


def spoiled(rng, value):
    """Three batches; channel 1 of the second has a value on rank 1."""
    batches = rng.normal(2, 3, (3, 12, 3))
    batches[1, 8, 1] = value
    return batches


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_ranks_decide_alike_about_batches_that_are_not_finite(rng, nonfinite, value):
    batches, options = spoiled(rng, value), {"nonfinite": nonfinite, "dtype": np.float64}
    plain = bnfast.BatchNorm(3, **options)

    def train(communicator):
        layer, outputs = SyncBatchNorm(3, communicator, **options), []
        for x in batches:
            part = cut(x, [6, 4, 2, 0], 0)[communicator.rank]
            out = np.full(part.shape, 7.0)
            try:
                layer(part, out=out)
            except ValueError as error:
                assert str(error) == (
                    "x of rank 1 must have finite statistics, as nonfinite='raise' asks: 1 of 3 "
                    "channels have none, the first of them channel 1"
                )
            outputs.append(out)
        return layer.state_dict(), outputs, communicator.exchanges

    expected = []
    for x in batches:
        expected.append(np.full(x.shape, 7.0))
        try:
            plain(x, out=expected[-1])
        except ValueError:
            assert nonfinite == "raise"
    results = without_errors(on_ranks(4, train))
    for state, _, exchanges in results:
        assert exchanges == 3
        for name, wanted in plain.state_dict().items():
            np.testing.assert_array_equal(state[name], results[0][0][name])
            np.testing.assert_allclose(state[name], wanted, rtol=OF_DOUBLE)
    for outputs, wanted in zip(zip(*[r[1] for r in results], strict=True), expected, strict=True):
        np.testing.assert_allclose(np.concatenate(outputs), wanted, rtol=0, atol=4 * OF_DOUBLE)


def test_statistics_that_are_infinite_only_together_are_refused_on_every_rank():
    def step(communicator):
        layer = SyncBatchNorm(1, communicator, nonfinite="raise", dtype=np.float64)
        try:
            layer(np.full((1, 1), -1e200 if communicator.rank else 1e200))
        finally:
            assert layer.num_batches_tracked == 0
            assert layer.running_mean[0] == 0.0

    assert agrees_not(on_ranks(2, step)).startswith("x of all ranks must have finite statistics")


def test_what_differs_in_nonfinite_is_named_on_every_rank(rng):
    x = rng.normal(size=(4, 3))

    def differ(communicator):
        return SyncBatchNorm(3, communicator, nonfinite=["skip", "raise"][communicator.rank])(x)

    def wrong(communicator):
        layer = SyncBatchNorm(3, communicator)
        layer.nonfinite = ["skip", "never"][communicator.rank]
        return layer(x)

    assert "nonfinite: skip on rank 0, raise on rank 1" in agrees_not(on_ranks(2, differ))
    first, second = on_ranks(2, wrong)
    assert isinstance(first, RuntimeError)
    assert str(first) == f"rank 1 failed: ValueError: {second}"


def network(layers, x):
    return layers[1](np.maximum(layers[0](x), 0))


@pytest.mark.parametrize("sizes", [[12], [6, 4, 2, 0]])
@pytest.mark.parametrize(
    "way", [{}, {"method": "average_of_batches"}, {"prior": 3}, {"prior": 0}], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_ranks_recalibrate_together_as_one_process(rng, sizes, way, training):
    batches = np.concatenate((rng.normal(2, 3, (2, 12, 3)), spoiled(rng, np.nan)[1:]))
    options = {"nonfinite": "skip", "dtype": np.float64}
    whole = [bnfast.BatchNorm(3, **options).train(training) for _ in range(2)]

    def recalibrate(communicator):
        layers = [SyncBatchNorm(3, communicator, **options).train(training) for _ in range(2)]
        outputs = []
        with bnfast.recalibrating(layers, **way):
            for number, x in enumerate(batches):
                # In one batch, the first rank has nothing instead of the last.
                order = sizes if number else sizes[::-1]
                outputs.append(network(layers, cut(x, order, 0)[communicator.rank]))
                layers[0].eval()  # whatever users set meanwhile
        states = [layer.state_dict() for layer in layers]
        return outputs, states, [layer.training for layer in layers], communicator.exchanges

    expected = []
    with bnfast.recalibrating(whole, **way):
        expected += [network(whole, x) for x in batches]
    results = without_errors(on_ranks(len(sizes), recalibrate))
    for number, wanted in enumerate(expected):
        got = np.concatenate([outputs[number] for outputs, *_ in results])
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-11)
    for _, states, modes, exchanges in results:
        assert modes == [training, training]
        assert exchanges == 4 * 2 * (1 if "prior" in way else 2) + 1
        for state, layer, first in zip(states, whole, results[0][1], strict=True):
            for name, wanted in layer.state_dict().items():
                np.testing.assert_array_equal(state[name], first[name])
                np.testing.assert_allclose(state[name], wanted, rtol=1e-11)


def recalibrated(communicator, act, also=(), **way):
    """Recalibrate a layer by what `act` does with it, which must fail and change nothing."""
    layer = SyncBatchNorm(3, communicator, dtype=np.float64).eval()
    before = layer.state_dict()
    try:
        with bnfast.recalibrating([layer, *also], **way):
            act(layer)
    finally:
        for name, value in layer.state_dict().items():
            np.testing.assert_array_equal(value, before[name])
        assert not layer.training


def test_ranks_that_recalibrate_in_different_ways_all_keep_their_statistics(rng):
    x = rng.normal(size=(4, 3))
    more = [
        lambda rank: {"method": ["pooled", "average_of_batches"][rank]},
        lambda rank: {"prior": [16, 17][rank]},
    ]
    for way, message in zip(
        more, ("method: pooled on rank 0", "prior: 16.0 on rank 0"), strict=True
    ):
        results = on_ranks(
            2,
            lambda communicator, way=way: recalibrated(
                communicator, lambda layer: layer(x), **way(communicator.rank)
            ),
        )
        assert message in agrees_not(results)

    def uneven(communicator):
        recalibrated(communicator, lambda layer: [layer(x) for _ in range(1 + communicator.rank)])

    def one_alone(communicator):
        if communicator.rank:
            return recalibrated(communicator, lambda layer: layer(x))
        return SyncBatchNorm(3, communicator)(x)

    message = "call: end of recalibrating on rank 0, recalibrating on rank 1"
    assert message in agrees_not(on_ranks(2, uneven))
    assert "call: forward on rank 0, recalibrating on rank 1" in agrees_not(on_ranks(2, one_alone))


@pytest.mark.parametrize("prior", [None, 16])
def test_an_error_of_one_rank_while_all_recalibrate_is_raised_on_all(rng, prior):
    x = rng.normal(size=(4, 3))

    def bad_input(communicator):
        wrong = x[:, :2] if communicator.rank else x
        recalibrated(communicator, lambda layer: layer.eval()(wrong), prior=prior)

    def blind(communicator):
        plain = bnfast.BatchNorm(3)

        def act(layer):
            layer(x)
            if communicator.rank == 0:
                plain(rng.normal(size=(8, 3)))

        recalibrated(communicator, act, [plain], prior=prior)

    for step, own in ((bad_input, ValueError), (blind, RuntimeError)):
        told, error = on_ranks(2, step)
        assert isinstance(error, own)
        assert isinstance(told, RuntimeError)
        assert str(told) == f"rank 1 failed: {own.__name__}: {error}"


def test_a_rank_that_leaves_a_recalibration_is_not_waited_for_for_ever(rng):
    x = rng.normal(size=(4, 3))

    def step(communicator):
        def act(layer):
            layer(x)
            if communicator.rank:
                raise KeyError("an error of the program")

        recalibrated(communicator, act)

    waited, left = on_ranks(2, step, timeout=0.2)
    assert isinstance(waited, TimeoutError)
    assert isinstance(left, KeyError)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_no_data_on_any_rank_is_an_error_on_all(shape):
    def step(communicator):
        layer = SyncBatchNorm(shape[1], communicator)
        with bnfast.recalibrating([layer]):
            layer(np.zeros(shape))

    for error in on_ranks(2, step):
        assert "no data went through layer 0" in str(error)


def test_batches_are_refused_alike_while_ranks_recalibrate(rng):
    batches = spoiled(rng, np.nan)

    def step(communicator):
        layer = SyncBatchNorm(3, communicator, nonfinite="raise", dtype=np.float64)
        with bnfast.recalibrating(layer):
            for x in batches:
                layer(cut(x, [6, 6], 0)[communicator.rank])

    assert agrees_not(on_ranks(2, step)).startswith("x of rank 1 must have finite statistics")


def test_a_rank_monitors_its_own_data(rng):
    batches = rng.normal(2, 3, (3, 9, 3))
    sizes = [5, 4, 0]

    def monitor(communicator):
        rank, reports = communicator.rank, []
        layer, plain = SyncBatchNorm(3, communicator, dtype="f8"), bnfast.BatchNorm(3, dtype="f8")
        before = layer.state_dict()
        for training in (False, True):
            with (
                bnfast.monitoring(layer.train(training)) as own,
                bnfast.monitoring(plain.eval()) as wanted,
            ):
                for x in batches:
                    part = cut(x, sizes, 0)[rank]
                    layer(part)
                    plain(part)
            reports.append(str(own).replace("SyncBatchNorm", "BatchNorm").split())
            assert reports[-1] == str(wanted).split()
            for name, value in layer.state_dict().items():
                np.testing.assert_array_equal(value, before[name])
        return communicator.exchanges, own.rows[0].batches

    assert without_errors(on_ranks(3, monitor)) == [(3, 3), (3, 3), (3, 0)]


def test_a_state_is_that_of_a_batch_norm(rng):
    layer, plain = SyncBatchNorm(3, Alone()), bnfast.BatchNorm(3)
    layer(rng.normal(size=(8, 3)).astype(np.float32))
    plain.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(plain.running_mean, layer.running_mean)
    assert list(plain.state_dict()) == list(layer.state_dict())


def test_a_copy_shares_the_communicator():
    layer = SyncBatchNorm(3, Alone())
    other = copy.deepcopy(layer)
    assert other.communicator is copy.copy(layer).communicator is layer.communicator
    assert repr(other) == repr(layer)
    assert "SyncBatchNorm(3, communicator=Alone(rank=0, size=1), eps=1e-05" in repr(layer)


def test_the_module_imports_no_transport():
    code = "import sys, bnfast.distributed\nassert not {'mpi4py', 'torch'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("module", "communicator"), [("mpi4py", MPICommunicator), ("torch", TorchCommunicator)]
)
def test_a_missing_transport_is_named(monkeypatch, module, communicator):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"needs .*: python -m pip install {module}"):
        communicator()
