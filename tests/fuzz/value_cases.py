"""A call of a function, with arguments in any memory, held against the oracle."""

from __future__ import annotations

import threading
import warnings
from typing import Any, NamedTuple

import numpy as np

import bnfast
from fuzz import buffers, case, draws, machines, masks
from fuzz.buffers import Buffer
from fuzz.call import Call, Expected, Refused
from fuzz.calls import CALLS
from fuzz.judge import HALVES, arithmetic, complaint, same_bits

# What a BLAS has a part in, which may choose another order for other memory.
OF_MATRICES = ("decorrelated", "iterative", "spectral")

# What is said of a running statistic that has left its dtype.
WARNED = "infinite from now on"

OUT = ("none", "none", "none", "another", "another", "in place", "overlapping", "of a parameter")


class Prepared(NamedTuple):
    """A call with its arguments in memory."""

    positional: list[Any]
    keywords: dict[str, Any]
    buffers: dict[str, Buffer]
    out: Buffer | None
    is_input: str | None  # the argument that `out` is
    doubtful: bool  # `out` shares memory, so that the call may refuse

    def describe(self, name: str) -> str:
        def text(key: str, value: Any) -> str:
            return buffers.described(value, self.buffers.get(key))

        parameters = list(case.parameters_of(getattr(bnfast, name)))
        given = [text(key, value) for key, value in zip(parameters, self.positional, strict=False)]
        given += [f"{key}={text(key, value)}" for key, value in self.keywords.items()]
        return f"bnfast.{name}({', '.join(given)})"


def prepare(
    call: Call, seed: int, plain: bool, arguments: dict[str, Any] | None = None
) -> Prepared:
    """The same call, in fresh memory, each time that the seed is the same."""
    rng = np.random.default_rng(seed)
    values, kept = arguments or call.arguments, {}
    how = (
        "none"
        if plain or "out" not in case.parameters_of(getattr(bnfast, call.name))
        else draws.pick(rng, OUT)
    )
    x, is_input, given = call.inputs[-1], None, {}
    if how == "in place":
        is_input = draws.pick(rng, call.inputs)
    for name, value in values.items():
        if not isinstance(value, np.ndarray):
            given[name] = value
            continue
        written = name in call.updated or name == is_input
        make = buffers.to_write if written else buffers.to_read
        kept[name] = make(value, rng, plain)
        given[name] = kept[name].given
    out, doubtful = None, False
    if how == "another":
        out = buffers.to_write(np.full(values[x].shape, np.nan, values[x].dtype), rng, plain)
    elif is_input is not None:
        out, doubtful = kept[is_input], is_input not in call.in_place
    elif how == "overlapping":
        source = kept[draws.pick(rng, call.inputs)]
        overlapping = buffers.shifted(source, rng)
        if overlapping is not None:
            out, doubtful = Buffer(overlapping, overlapping, source.memory, "overlapping"), True
    elif how == "of a parameter":
        out = _around_parameter(call, values[x], given, kept, rng)
        doubtful = out is not None
    if out is not None:
        given["out"] = out.given
        kept["out"] = out
    positional, keywords = [], {}
    may_be_positional = True
    for name, parameter in case.parameters_of(getattr(bnfast, call.name)).items():
        may_be_positional &= name in given and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        may_be_positional &= draws.chance(rng, 0.9)
        if may_be_positional:
            positional.append(given[name])
        elif name in given:
            keywords[name] = given[name]
    return Prepared(positional, keywords, kept, out, is_input, doubtful)


def _around_parameter(
    call: Call,
    x: np.ndarray,
    given: dict[str, Any],
    kept: dict[str, Buffer],
    rng: np.random.Generator,
) -> Buffer | None:
    """An `out` in whose memory another argument lies, which is replaced by that; or None."""
    smaller = [
        name
        for name, buffer in kept.items()
        if name not in call.inputs and 0 < buffer.view.nbytes <= x.nbytes
    ]
    if not smaller:
        return None
    name = draws.pick(rng, smaller)
    values = kept[name].view.copy()
    view, memory = buffers.contiguous(np.zeros(x.shape, x.dtype), rng)
    inside = np.ndarray(values.shape, values.dtype, memory, 64)
    inside[...] = values
    given[name], kept[name] = inside, Buffer(inside, inside, memory, "within out")
    return Buffer(view, view, memory, "around a parameter")


class Done(NamedTuple):
    """What a call gave back."""

    returned: tuple[Any, ...]
    error: BaseException | None
    warned: list[str]


def carry_out(call: Call, prepared: Prepared, outcome: case.Outcome) -> Done:
    outcome.called(call.name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = getattr(bnfast, call.name)(*prepared.positional, **prepared.keywords)
            returned, error = call.unpack(result), None
        except Exception as raised:
            returned, error = (), raised
    return Done(returned, error, [str(warning.message) for warning in caught])


def bits_of(call: Call, prepared: Prepared, done: Done) -> list[np.ndarray]:
    """All numbers that a call made."""
    arrays = [np.array(array) for array in done.returned if array is not None]
    return arrays + [prepared.buffers[name].view.copy() for name in call.updated]


def run(name: str, rng: np.random.Generator) -> case.Outcome:
    """Draw a call, carry it out on several machines, and judge."""
    outcome = case.Outcome()
    call = CALLS[name](rng)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = call.expect()
    seed, plain = int(rng.integers(1 << 62)), draws.chance(rng, 0.2)
    prepared = prepare(call, seed, plain)
    outcome.description = prepared.describe(name)
    seen = case.witnesses(prepared.buffers)
    with machines.running_on(machines.usual()):
        done = carry_out(call, prepared, outcome)
    _judge(outcome, call, prepared, done, expected, seen)
    if done.error is not None or outcome.complaints:
        return outcome
    first = bits_of(call, prepared, done)
    if any(buffer.view.dtype in HALVES for buffer in prepared.buffers.values()):
        _widen(outcome, call, prepare(call, seed, plain), first)
    if not name.startswith(OF_MATRICES):
        _repeat(outcome, call, seed, plain, first, rng)
    if call.channels is not None and draws.chance(rng, 0.3):
        _poison(outcome, call, rng)
    if call.counts is not None and draws.chance(rng, 0.6):
        draws.pick(rng, (_fill, _fill, _count_all, _say_otherwise))(outcome, call, rng)
    return outcome


def _judge(
    outcome: case.Outcome,
    call: Call,
    prepared: Prepared,
    done: Done,
    expected: Expected | Refused,
    seen: list[case.Witness],
) -> None:
    if done.error is not None:
        names = expected.names if isinstance(expected, Refused) else ()
        if not names and not prepared.doubtful:
            outcome.complain(f"refused: {type(done.error).__name__}: {done.error}")
        case.complain_of_error(outcome, done.error, (*names, "out") if prepared.doubtful else names)
        case.complain_of_changes(outcome, seen, "by a call that raised")
        return
    if isinstance(expected, Refused):
        if expected.surely:
            outcome.complain(f"was not refused, though {expected.names} is wrong")
        return
    for text in done.warned:
        if WARNED not in text:
            outcome.complain(f"warned: {text}")
    found = dict(zip(expected.returned, done.returned, strict=False))
    for name, quantity in expected.returned.items():
        if quantity is None:
            if found[name] is not None:
                outcome.complain(f"{name} is not None")
        else:
            outcome.complain(complaint(name, found[name], quantity))
    for name, quantity in expected.updated.items():
        outcome.complain(complaint(name, prepared.buffers[name].view, quantity))
    _judge_memory(outcome, call, prepared, done, seen)


def _judge_memory(
    outcome: case.Outcome, call: Call, prepared: Prepared, done: Done, seen: list[case.Witness]
) -> None:
    """Nothing but results was written, and no result lies in the memory of an argument."""
    out = prepared.out
    if out is not None:
        first = done.returned[0]
        if not np.may_share_memory(first, out.view) and out.view.size:
            outcome.complain("the result is not out")
    for name, buffer, before in seen:
        if out is not None and buffer.memory is out.memory:
            if buffer is out and buffers.written(out, before, out.view.copy()) != buffer.snapshot():
                outcome.complain("something beside out was written")
        elif name in call.updated:
            if buffers.written(buffer, before, buffer.view.copy()) != buffer.snapshot():
                outcome.complain(f"something beside {name} was written")
        elif buffer.snapshot() != before:
            outcome.complain(f"{name} was changed")
    if call.name.startswith("spectral"):  # returns the vectors that it was given, if need be
        return
    for array in done.returned[0 if out is None else 1 :]:
        for name, buffer in prepared.buffers.items():
            if name == call.passed_on and out is not buffer:
                continue
            if isinstance(array, np.ndarray) and np.may_share_memory(array, buffer.memory):
                outcome.complain(f"a result shares memory with {name}")


def _widen(outcome: case.Outcome, call: Call, prepared: Prepared, first: list[np.ndarray]) -> None:
    """Of float32 copies of what has 16 bits: the same results, but for one rounding."""
    wide = {
        id(buffer.given): buffers.widened(buffer.view)
        for buffer in prepared.buffers.values()
        if buffer.view.dtype in HALVES
    }
    kept = {
        name: buffer._replace(view=wide.get(id(buffer.given), buffer.view))
        for name, buffer in prepared.buffers.items()
    }
    copied = prepared._replace(
        positional=[wide.get(id(value), value) for value in prepared.positional],
        keywords={name: wide.get(id(value), value) for name, value in prepared.keywords.items()},
        buffers=kept,
    )
    with machines.running_on(machines.usual()):
        done = carry_out(call, copied, outcome)
    if done.error is not None:
        outcome.complain(f"raised {done.error!r} with float32 copies")
        return
    for k, (a, b) in enumerate(zip(first, bits_of(call, copied, done), strict=True)):
        if b.dtype != arithmetic(a.dtype):
            outcome.complain(f"result {k} is {a.dtype}, and {b.dtype} of float32 copies")
        with np.errstate(all="ignore"):
            rounded = b.astype(a.dtype)
        if not same_bits(a, rounded):
            outcome.complain(f"result {k} is not that of float32 copies, rounded once")


def _repeat(
    outcome: case.Outcome,
    call: Call,
    seed: int,
    plain: bool,
    first: list[np.ndarray],
    rng: np.random.Generator,
) -> None:
    """On another machine, and by two Python threads at once: the same bits."""
    machine = machines.draw(rng)
    prepared = prepare(call, seed, plain)
    with machines.running_on(machine):
        done = carry_out(call, prepared, outcome)
    _compare(outcome, first, call, prepared, done, f"on {machine}")
    if draws.chance(rng, 0.03):
        twice = [prepare(call, seed, plain) for _ in range(2)]
        found: list[Done | None] = [None, None]

        def work(k: int) -> None:
            found[k] = Done(
                call.unpack(getattr(bnfast, call.name)(*twice[k].positional, **twice[k].keywords)),
                None,
                [],
            )

        threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
        with machines.running_on(machine._replace(flushing=False)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for prepared, done in zip(twice, found, strict=True):
            outcome.called(call.name)
            if done is None:
                outcome.complain("raised in one of two threads")
            else:
                _compare(outcome, first, call, prepared, done, "beside another thread")


def _compare(
    outcome: case.Outcome,
    first: list[np.ndarray],
    call: Call,
    prepared: Prepared,
    done: Done,
    where: str,
) -> None:
    if done.error is not None:
        outcome.complain(f"raised {done.error!r} {where}")
        return
    for k, (a, b) in enumerate(zip(first, bits_of(call, prepared, done), strict=True)):
        if not same_bits(a, b):
            outcome.complain(f"result {k} has other bits {where}")


def _poison(outcome: case.Outcome, call: Call, rng: np.random.Generator) -> None:
    """A NaN or an infinity changes no bit of another channel."""
    names, axis = call.inputs, call.channels
    shape = call.arguments[names[-1]].shape
    channels = shape[axis]
    if channels < 2 or 0 in shape:
        return
    bad, name = int(rng.integers(channels)), draws.pick(rng, names)
    poisoned = call.arguments[name].copy()
    cells = np.moveaxis(poisoned, axis, 0)[bad]
    value = draws.pick(rng, (np.nan, np.inf, -np.inf))
    cells[tuple(int(rng.integers(n)) for n in cells.shape)] = value
    results = []
    seed = int(rng.integers(1 << 62))
    for arguments in (call.arguments, call.arguments | {name: poisoned}):
        prepared = prepare(call, seed, True, arguments)
        with machines.running_on(machines.usual()):
            done = carry_out(call, prepared, outcome)
        if done.error is not None:
            outcome.complain(f"raised {done.error!r} with {value} in {name}")
            return
        results.append(bits_of(call, prepared, done))
    for k, (a, b) in enumerate(zip(*results, strict=True)):
        found = [_without(array, shape, axis, bad) for array in (a, b)]
        if not same_bits(*found):
            outcome.complain(f"{value} in channel {bad} of {name} changed others of result {k}")


def _without(array: np.ndarray, shape: tuple[int, ...], axis: int, channel: int) -> np.ndarray:
    """What of a result is of the other channels."""
    if array.shape == shape:
        return np.delete(array, channel, axis)
    if array.size == shape[axis]:
        return np.delete(array.reshape(-1), channel)
    if array.ndim and array.shape[-1] == shape[axis]:
        return np.delete(array, channel, -1)
    return array[:0] if array.ndim else np.zeros(0)


def _bits_of(
    outcome: case.Outcome, call: Call, seed: int, arguments: dict[str, Any], what: str
) -> list[np.ndarray] | None:
    """All numbers that a call with other arguments makes."""
    prepared = prepare(call, seed, True, arguments)
    with machines.running_on(machines.usual()):
        done = carry_out(call, prepared, outcome)
    if done.error is not None:
        outcome.complain(f"raised {done.error!r} {what}")
        return None
    return bits_of(call, prepared, done)


def _compare_calls(
    outcome: case.Outcome, call: Call, seed: int, others: tuple[dict[str, Any], ...], what: str
) -> None:
    """Two calls that are to make the same bits."""
    found = [_bits_of(outcome, call, seed, arguments, what) for arguments in others]
    if found[0] is None or found[1] is None:
        return
    for k, (a, b) in enumerate(zip(*found, strict=True)):
        if not same_bits(a, b):
            outcome.complain(f"result {k} has other bits {what}")


def _fill(outcome: case.Outcome, call: Call, rng: np.random.Generator) -> None:
    """What lies in the padding changes no bit, but for padding that is the input."""
    counts, seed = call.counts, int(rng.integers(1 << 62))
    arrays = {name: masks.filled(rng, call.arguments[name], counts) for name in call.inputs}
    filled = call.arguments | arrays
    source = filled["dy" if "dy" in call.inputs else "x"]
    if filled.get("padding") != "input":
        source = np.zeros_like(source)
    found = [
        _bits_of(outcome, call, seed, each, "with other padding")
        for each in (call.arguments, filled)
    ]
    if found[0] is None or found[1] is None:
        return
    for k, (a, b) in enumerate(zip(*found, strict=True)):
        if b.shape == counts.shape and b.dtype == source.dtype and k in (0, 3):
            padding = source if k == 0 else np.zeros_like(source)
            if not same_bits(b[~counts], padding[~counts]):
                outcome.complain(f"result {k} is not as it should be where values do not count")
            a, b = a[counts], b[counts]
        if not same_bits(a, b):
            outcome.complain(f"result {k} has other bits with other padding")


def _count_all(outcome: case.Outcome, call: Call, rng: np.random.Generator) -> None:
    """A mask that lets all count makes the bits of none."""
    arguments = dict(call.arguments)
    if "mask" in arguments:
        arguments["mask"] = np.ones_like(arguments["mask"])
    else:
        most = call.counts.shape[3 - arguments["axis"] % 3]
        arguments["lengths"] = np.full_like(arguments["lengths"], most)
    without = {k: v for k, v in arguments.items() if k not in ("mask", "lengths", "padding")}
    _compare_calls(
        outcome,
        call,
        int(rng.integers(1 << 62)),
        (arguments, without),
        "with a mask that lets all count",
    )


def _say_otherwise(outcome: case.Outcome, call: Call, rng: np.random.Generator) -> None:
    """Lengths, or a mask that is broadcast, make the bits of the mask that they say."""
    axis = call.arguments["axis"] % call.counts.ndim
    whole = call.counts.take(0, axis) if call.counts.shape[axis] else None
    if whole is None:
        return
    said = {k: v for k, v in call.arguments.items() if k not in ("mask", "lengths")}
    said["mask"] = masks.in_another_shape(rng, np.ascontiguousarray(whole), axis)
    seed = int(rng.integers(1 << 62))
    _compare_calls(
        outcome, call, seed, (call.arguments, said), "with the same mask, said otherwise"
    )
