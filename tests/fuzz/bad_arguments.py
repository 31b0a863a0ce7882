"""Calls with one argument that is wrong: one error that names it, and nothing written."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

import bnfast
from fuzz import buffers, case, draws
from fuzz.buffers import Buffer
from fuzz.call import Call, Refused, takes_halves
from fuzz.calls import CALLS
from fuzz.judge import HALVES

Wrong = Callable[[Any], Any]  # from a good value to a bad one


def _masked(good: np.ndarray) -> Any:
    return np.ma.masked_array(good, np.zeros(good.shape, bool))


def _longer(good: np.ndarray) -> Any:
    return np.ones((*good.shape[:-1], good.shape[-1] + 1) if good.ndim else (2, 2), good.dtype)


def _nested(good: np.ndarray) -> Any:
    return np.ones((2, *good.shape, 3), good.dtype)


# In place of any array.
OF_ARRAYS: tuple[Wrong, ...] = (
    lambda good: "text",
    lambda good: b"bytes",
    lambda good: {1.0, 2.0},
    lambda good: {"a": 1.0},
    lambda good: object(),
    lambda good: len,
    lambda good: [[1.0], [1.0, 2.0]],
    lambda good: iter([1.0, 2.0]),
    lambda good: 1j,
    lambda good: good.astype(np.complex128),
    lambda good: good.astype(object),
    lambda good: np.zeros(good.shape, np.int64),
    lambda good: np.zeros(good.shape, ">f2"),
    lambda good: np.zeros(good.shape, np.longdouble),
    lambda good: np.zeros(good.shape, bool),
    lambda good: np.zeros(good.shape, "U3"),
    lambda good: np.zeros(good.shape, "M8[s]"),
    lambda good: np.zeros(good.shape, [("a", np.float32)]),
    lambda good: np.zeros(good.shape, good.dtype.newbyteorder()),
    _masked,
)

# In place of those of a shape that follows from that of x.
OF_SHAPES: tuple[Wrong, ...] = (_longer, _nested, lambda good: 1.5)

# Of those that are written, besides.
OF_WRITTEN: tuple[Wrong, ...] = (
    lambda good: good.tolist(),
    lambda good: tuple(good.tolist()) if good.ndim else (1.0,),
    lambda good: memoryview(np.ascontiguousarray(good).view(np.uint8)),
    lambda good: _read_only(good),
)


def _of_other_dtypes(good: np.ndarray) -> list[np.ndarray]:
    """Which must be that of x."""
    with np.errstate(all="ignore"):
        return [good.astype(d) for d in (*draws.DTYPES, *HALVES) if d != good.dtype]


def _read_only(good: np.ndarray) -> np.ndarray:
    copy = good.copy()
    copy.flags.writeable = False
    return copy


def _overlapping(good: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(np.zeros(1, good.dtype), good.shape, [0] * good.ndim)


OF_FLAGS: tuple[Any, ...] = (0, 1, None, "True", 1.0, [], np.array([True]), object())
OF_INTEGERS: tuple[Any, ...] = (1.5, "1", True, 1j, [[1]], object(), {1}, float("nan"))
OF_REALS: tuple[Any, ...] = (
    *("1e-5", True, 1j, [1e-5], object(), {1.0}),
    *(float("nan"), float("inf"), np.array([1e-5, 1e-5])),
)

NEGATIVE_EPS = (
    "batch",
    "instance",
    "ghost",
    "conditional",
    "cross",
    "weight",
    "scaled",
    "filter",
    "decor",
    "iter",
    "moving",
)

FLAGS = {
    *("training", "unbiased", "use_input_stats", "per_group", "parameters", "eps_inside"),
    *("floor", "v_first"),
}
OF_STATISTICS = ("moments", "summary")

# The least of each, where it has one.
INTEGERS = {"num_groups": 1, "ghost_size": 1, "iterations": 1, "n_power_iterations": 0, "row": 0}
REALS = {"eps", "momentum", "gamma", "r_max", "d_max"}
MAY_BE_NONE = {
    "weight",
    "bias",
    "tau",
    "learned_eps",
    "gain",
    "residual",
    "y",
    "running_mean",
    "running_var",
    "running_matrix",
    "ddx",
    "ddweight",
    "ddbias",
}


def wrong_values(call: Call, name: str) -> list[Any]:
    """What may not be given for an argument."""
    good = call.arguments.get(name)
    if name in FLAGS:
        return list(OF_FLAGS)
    if name in INTEGERS:
        return [*OF_INTEGERS, None, INTEGERS[name] - 1, -7]
    if name in ("axis", "dim"):
        found: list[Any] = [*OF_INTEGERS, 99, -99, 1 << 70]
        if name == "dim" and call.name.startswith("weight_norm"):
            found.append(-1)
        elif call.name.startswith(("layer", "rms")):
            found += [(0, 0), (0.5,), "ab"]
        elif call.name in OF_STATISTICS:
            found += [(0, 0), (0, 1.5), [99], "ab"]
        else:
            found += [None, (0,)]
        return found
    if name in REALS:
        found = list(OF_REALS)
        if name != "eps" or not call.name.startswith("rms"):
            found.append(None)
        if name == "eps" and call.name.startswith(NEGATIVE_EPS):
            found.append(-1e-5)
        if name in ("r_max", "d_max"):
            found.append(-1.0)
        return found
    if name == "normalized_shape":
        return [*OF_INTEGERS, None, (), -1, (1 << 40, 1 << 40), [1] * 70, (2.5,), 987654]
    if name == "activation":
        return ["gelu", "ReLU", b"relu", 3, True, ["relu"], object()]
    if name == "negative_slope":
        leaky = call.arguments["activation"] == "leaky_relu"
        return [*OF_REALS, None, 1.5] if leaky else []
    if name == "mask":
        return _wrong_masks(call, good)
    if name == "lengths":
        return _wrong_lengths(call, good)
    if name == "padding":
        return ["zero", "ZEROS", b"zeros", None, 0, True, ["zeros"], object()]
    if name == "averaged":
        return ["mean", None, 3, b"whitening", ["whitening"], object()]
    if name == "saved":
        return [None, 3, "saved", (), tuple(good), {}]
    if name == "window":
        return [None, 3, "text", {1}, [None], [()], *_wrong_windows(good)]
    if name == "sigma":
        return [None, "1", 1j, [1.0, 2.0], object()]
    if name == "out":
        x = call.arguments[call.inputs[-1]]
        made = [wrong(x) for wrong in (*OF_ARRAYS, *OF_SHAPES, *OF_WRITTEN)]
        made += _of_other_dtypes(x)
        return [*made, *([_overlapping(x)] if x.size > 1 else [])]
    if isinstance(good, np.ndarray):
        return _wrong_arrays(call, name, good)
    return []


def _needs_counts(call: Call) -> bool:
    """Whether statistics are made of what counts."""
    given = call.arguments
    return bool(given.get("training", True) and given.get("use_input_stats", True))


def _wrong_masks(call: Call, good: np.ndarray) -> list[Any]:
    """Of another dtype or shape, or nothing where something must count."""
    shape, axis = call.arguments["x"].shape, call.arguments["axis"] % call.counts.ndim
    kinds = {m: getattr(m(good), "dtype", np.dtype("U")).kind for m in OF_ARRAYS}
    makers = [m for m, kind in kinds.items() if kind != "b" or m is _masked]
    others = [n for d, n in enumerate(shape) if d != axis]
    found = [wrong(good) for wrong in makers]
    found += [good.astype(np.int8), good.astype(np.float32), good.astype(int).tolist()]
    found += [np.ones([1] * (len(shape) + 1), bool), np.ones([*others[:-1], others[-1] + 1], bool)]
    if shape[axis] > 1:
        found.append(np.ones(shape, bool))
    if _needs_counts(call):
        found.append(np.zeros_like(good))
    return found


def _wrong_lengths(call: Call, good: np.ndarray) -> list[Any]:
    """Of floats or another shape, negative, too long, or 0 where something must count."""
    most = call.arguments["x"].shape[3 - call.arguments["axis"] % 3]
    makers = [m for m in OF_ARRAYS if getattr(m(good), "dtype", np.dtype("U")).kind not in "iu"]
    found = [wrong(good) for wrong in makers]
    found += [good.astype(np.float64), good.astype(np.float32).tolist(), int(good[0])]
    found += [np.append(good, good[0]), good[:, None], good[:0], [True] * len(good)]
    for value in (-1, most + 1, -(1 << 60), 1 << 60):
        wrong = good.astype(np.int64)
        wrong[-1] = value
        found += [wrong, wrong.tolist()]
    wrong = good.astype(np.uint64)
    wrong[0] = (1 << 64) - 1
    found.append(wrong)
    if _needs_counts(call):
        found += [np.zeros_like(good), [0] * len(good)]
    return found


def _wrong_windows(good: list[Any]) -> list[Any]:
    """Windows of which one array of one iteration is wrong, and one iteration by itself."""
    if not good:
        return []
    *others, last = good
    made = [
        [*others, last._replace(**{field: wrong(array)})]
        for field, array in last._asdict().items()
        for wrong in (*OF_ARRAYS, *OF_SHAPES)
    ]
    return [*made, last]


def _wrong_arrays(call: Call, name: str, good: np.ndarray) -> list[Any]:
    makers = [*OF_ARRAYS]
    if call.name in OF_STATISTICS:  # which take integers
        makers = [m for m in makers if getattr(m(good), "dtype", np.dtype("U")).kind not in "bi"]
    # Where a single value will do, of whatever shape, no shape is wrong for sure.
    if name != call.inputs[-1] and name not in ("learned_eps", "g") and good.ndim:
        makers += OF_SHAPES
    if name in call.updated:
        makers += OF_WRITTEN
    found = [wrong(good) for wrong in makers]
    if name in call.updated and good.size > 1:
        found.append(_overlapping(good))
    if name not in MAY_BE_NONE or name in call.updated:
        found.append(None)
    if name in ("dy", "dx", "ddx", "residual", "y") and name != call.inputs[-1]:
        found += _of_other_dtypes(good)
    if name in call.inputs and not takes_halves(call.name):
        with np.errstate(all="ignore"):
            found += [good.astype(half) for half in HALVES]
    return found


# Arguments of which there are two, so that an error may be about the other one.
PAIRS = {
    **dict.fromkeys(
        ("running_mean", "running_var", "running_std", "running_matrix"),
        ("running_mean", "running_var", "running_std", "running_matrix"),
    ),
    "axis": ("axis", "normalized_shape"),
    "normalized_shape": ("axis", "normalized_shape"),
    "window": ("window", "filters"),  # a window needs filters, whatever is in it
    "mean": ("mean", "invstd", "num_groups"),  # the first says how many groups there are
}


def run(name: str, rng: np.random.Generator) -> case.Outcome:
    """One call with one wrong argument; sometimes one too many, or one too few."""
    outcome = case.Outcome()
    call = CALLS[name](rng)
    while 0 in call.arguments[call.inputs[-1]].shape:
        call = CALLS[name](rng)
    arguments, kept = {}, {}
    for key, value in call.arguments.items():
        arguments[key] = value
        if isinstance(value, np.ndarray):
            make = buffers.to_write if key in call.updated else buffers.to_read
            kept[key] = make(value, rng, draws.chance(rng, 0.5))
            arguments[key] = kept[key].given
    x = call.arguments[call.inputs[-1]]
    has_out = "out" in case.parameters_of(getattr(bnfast, name))
    if has_out and draws.chance(rng, 0.6):
        kept["out"] = buffers.to_write(np.full(x.shape, np.nan, x.dtype), rng, False)
        arguments["out"] = kept["out"].given
    names = _spoil(call, arguments, kept, has_out, rng)
    shown = [
        f"{key}={buffers.described(value, kept[key]) if key in kept else case.text_of(value)}"
        for key, value in arguments.items()
    ]
    outcome.description = f"bnfast.{name}({', '.join(shown)})"
    seen = case.witnesses(kept)
    outcome.called(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = call.expect()
    if isinstance(expected, Refused):
        names += expected.names
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(bnfast, name)(**arguments)
    except BaseException as error:
        case.complain_of_error(outcome, error, names)
    else:
        outcome.complain(f"was not refused: wrong is {names}")
    case.complain_of_changes(outcome, seen, "by a call that is wrong")
    return outcome


def _spoil(
    call: Call,
    arguments: dict[str, Any],
    kept: dict[str, Buffer],
    has_out: bool,
    rng: np.random.Generator,
) -> tuple[str, ...]:
    """Make the arguments wrong in one way; return the names that the error may have."""
    kind = rng.random()
    if kind < 0.03:
        arguments["no_such_argument"] = 1
        return ("no_such_argument",)
    if kind < 0.06:
        key = next(iter(arguments))
        del arguments[key]
        return (key,)
    if call.counts is not None and draws.chance(rng, 0.05):
        both = {"mask": np.ones([1] * call.counts.ndim, bool), "lengths": [0]}
        arguments |= {key: value for key, value in both.items() if key not in arguments}
        return ("mask", "lengths")
    choices = [key for key in arguments if key != "out" and wrong_values(call, key)]
    if call.counts is not None and draws.chance(rng, 0.4):
        choices = [key for key in choices if key in ("mask", "lengths", "padding")]
    key = "out" if has_out and draws.chance(rng, 0.15) else draws.pick(rng, choices)
    arguments[key] = draws.pick(rng, wrong_values(call, key))
    kept.pop(key, None)
    return PAIRS.get(key, (key,))
