"""Sequences of what users do to a layer, held against the oracle after each step."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from fuzz import buffers, call, case, draws, masks
from fuzz.judge import HALVES, arithmetic, complaint, same_bits
from fuzz.layer import Plan, Step
from fuzz.layers import LAYERS

LONGEST = 12

# What BatchNorm says of few values.
WARNED = ("values per channel", "value per channel", "infinite from now on")

WRONG_INPUTS: tuple[Any, ...] = (
    *(None, "text", {1.0}, 1.5, np.zeros((2, 3), np.int64), np.zeros((2, 3), ">f4")),
    *(np.zeros((29, 31), np.float32), np.zeros((23, 29, 31)), np.zeros(0, ">f2"), object()),
)


# Attributes that may be changed at any time, and that copies keep.
SETTINGS = ("activation", "negative_slope", "inplace", "frozen", "nonfinite")

PIECEWISE = (None, "relu", "leaky_relu", "relu6")


class Composition:
    """A call as that of a layer without an activation, and the operations after it, in NumPy."""

    def __init__(
        self, layer: Any, x: np.ndarray, residual: Any, options: dict[str, Any], counts: Any
    ) -> None:
        self.plain, self.dtype = copy.deepcopy(layer), x.dtype
        self.counts = np.ones(x.shape, bool) if counts is None else counts
        self.padding = x if options.get("padding") == "input" else np.zeros_like(x)
        self.name, self.slope, self.inplace = layer.activation, layer.negative_slope, False
        if hasattr(layer, "inplace"):
            self.inplace, self.plain.inplace = layer.inplace, False
        self.plain.activation = None
        self.wide = arithmetic(x.dtype)
        self.z = self.plain(buffers.copied(x, self.wide), **options)
        self.adds = residual is not None
        if self.adds:
            self.z = self.z + residual.astype(self.wide)

    def closed(self, z: np.ndarray) -> np.ndarray:
        return (z <= 0) | (z >= 6) if self.name == "relu6" else z <= 0

    def output(self) -> np.ndarray:
        z, slope = self.z, self.wide.type(self.slope)
        if self.name == "leaky_relu" and slope:
            z = np.where(z < 0, slope * z, z)
        elif self.name is not None:
            z = np.clip(z, 0, 6 if self.name == "relu6" else None)
        return np.where(self.counts, z.astype(self.dtype), self.padding)

    def gradients(self, dy: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray | None] | None:
        """Of an output y; None where they may have other bits."""
        dz, told = dy.astype(self.wide), True
        if self.name is not None:
            fused = {"activation": self.name, "negative_slope": self.slope, "residual": self.adds}
            told = self.adds and call.is_told_by_output(fused)
            slope = self.wide.type(self.slope if self.name == "leaky_relu" else 0)
            closed = self.closed(y.astype(self.wide) if told else self.z)
            dz = np.where(closed, slope * dz if slope else self.wide.type(0), dz)
        # Of float64 data z is made again with a mean that has been rounded.
        if self.inplace or (self.wide == np.float64 and not told):
            return None
        upstream = buffers.copied(dy, self.wide)
        np.copyto(upstream, dz, where=self.counts)
        dx = self.plain.backward(upstream)
        made = {name: getattr(self.plain, name) for name in ("weight_grad", "bias_grad")}
        of_residual = np.where(self.counts, dz, 0).astype(self.wide)
        return {"dx": dx, "dresidual": of_residual if self.adds else None, **made}


class Sequence:
    """A layer, and what it is to be like."""

    def __init__(self, plan: Plan, rng: np.random.Generator, outcome: case.Outcome) -> None:
        self.plan, self.rng, self.outcome = plan, rng, outcome
        self.layer = plan.make()
        self.last: Step | None = None  # whose backward may come
        self.output: Any = None  # of the last call
        self.counts: Any = None  # which values of its input a mask let count
        self.composition: Composition | None = None  # the last call, otherwise
        self.twin: Any = None  # a copy that was called with float32 copies, where x had 16 bits

    def complain(self, what: str | None) -> None:
        if what is not None:
            self.outcome.complain(what)

    def state(self, layer: Any = None) -> dict[str, Any]:
        """All that is public and may change, of the layer or another one."""
        layer = layer or self.layer
        return {
            **layer.state_dict(),
            "training": self.layer.training,
            **{name: getattr(layer, name) for name in SETTINGS if hasattr(layer, name)},
            **{name: value for name, value in vars(layer).items() if name.endswith("_grad")},
        }

    def complain_of_state(self, before: dict[str, Any], when: str) -> None:
        after = self.state()
        if before.keys() != after.keys():
            self.complain(f"the state has other names {when}")
            return
        for name, value in before.items():
            same = np.array_equal(value, after[name], equal_nan=isinstance(value, np.ndarray))
            if not same:
                self.complain(f"{name} was changed {when}")

    # The steps

    def call(self) -> None:
        arguments, options = self.plan.inputs(self.rng), self.plan.options(self.rng)
        before, counted = self.state(), self.layer.num_batches_tracked
        arguments, drawn, counts = self._masked(arguments)
        with np.errstate(all="ignore"):
            by_mask = {} if drawn is None else {"drawn": drawn}
            step = self.plan.step(self.layer, *arguments, **options, **by_mask)
        options |= {} if drawn is None else drawn.arguments
        overwrites = bool(getattr(self.layer, "inplace", False)) and bool(arguments)
        out, kept = self._in_memory(arguments, overwrites)
        given = [kept[k].given if k in kept else value for k, value in enumerate(arguments)]
        target = None if out is None else kept[out]
        where = {} if target is None else {"out": target.given}
        twin, wide = None, None
        if kept and kept[0].view.dtype in HALVES:
            twin = copy.deepcopy(self.layer)
            wide = [buffers.widened(kept[k].view) if k in kept else v for k, v in enumerate(given)]
        again = copy.deepcopy(self.layer) if self.plan.fused else None
        arrays = [np.asarray(each.given) for each in kept.values()]
        copies = [buffers.copied(array, array.dtype) for array in arrays]
        seen = case.witnesses({f"argument {k}": buffer for k, buffer in kept.items()})
        try:
            y = self.layer(*given, **options, **where)
        except Exception as error:
            names = step.names if isinstance(step, call.Refused) else ("x",)
            if isinstance(step, Step):
                self.complain(f"refused: {type(error).__name__}: {error}")
                names = ()
            case.complain_of_error(self.outcome, error, names)
            self.complain_of_state(before, "by a call that raised")
            case.complain_of_changes(self.outcome, seen, "by a call that raised")
            return
        if not isinstance(step, Step):
            self.complain("was not refused")
            return
        if overwrites and target is None:
            target = kept[0]
        case.complain_of_changes(
            self.outcome, [each for each in seen if each.buffer is not target], "by a call"
        )
        if target is not None and not same_bits(np.asarray(y), target.view):
            self.complain("the output was written elsewhere")
        self.complain(complaint("y", y, step.y))
        for name, quantity in step.updated.items():
            self.complain(complaint(name, getattr(self.layer, name), quantity))
        if self.layer.num_batches_tracked is not None:
            if self.layer.num_batches_tracked != counted + step.batches:
                self.complain(f"num_batches_tracked is {self.layer.num_batches_tracked}")
        untouched = {"_u": "u", "_v": "v"}
        for name, value in before.items():
            if untouched.get(name, name) not in step.updated and name != "num_batches_tracked":
                if not np.array_equal(
                    value, self.state()[name], equal_nan=isinstance(value, np.ndarray)
                ):
                    self.complain(f"{name} was changed by a call")
        self.last, self.twin = step, twin
        if out is not None and y.size and not overwrites and self._lost(out):
            self.last = None
        self.output, self.composition, self.counts = np.array(y), None, counts
        if again is not None and self.layer.activation in PIECEWISE:
            self._compose(again, copies, options)
        if twin is not None:
            self.compare("y", y, twin(*wide, **options))
            self.complain_of_state(self.state(twin), "otherwise than by float32 copies")
            if overwrites:  # which has its gradients from an output that was rounded
                self.twin = None

    def _masked(
        self, arguments: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], masks.Drawn | None, np.ndarray | None]:
        """Sometimes a mask, what it lets count, and arguments with anything in the padding."""
        if not self.plan.masked or draws.chance(self.rng, 0.65):
            return arguments, None, None
        x, axis = arguments[0], self.layer.axis
        drawn = masks.draw(self.rng, x.shape, axis)
        channels = np.ones((*drawn.counts.shape, x.shape[axis]), bool) & drawn.counts[..., None]
        counts = np.moveaxis(channels, -1, axis)
        filled = [masks.filled(self.rng, array, counts) for array in arguments]
        return tuple(filled), drawn, counts

    def _in_memory(
        self, arguments: tuple[Any, ...], overwrites: bool
    ) -> tuple[int | None, dict[int, buffers.Buffer]]:
        """Which argument is `out`, if any, and the memory of all that are like an output."""
        if not arguments:
            return None, {}
        like_output = range(len(arguments)) if self.plan.fused else range(1)
        out = draws.pick(self.rng, like_output) if draws.chance(self.rng, 0.1) else None
        kept = {}
        for k in like_output:
            written = k == out or (overwrites and k == 0)
            make = buffers.to_write if written else buffers.to_read
            kept[k] = make(arguments[k], self.rng, draws.chance(self.rng, 0.5))
        return out, kept

    def _lost(self, out: int) -> bool:
        """Whether a call that wrote over this argument can have no backward."""
        settings = {name: getattr(self.layer, name, None) for name in SETTINGS}
        return out == 0 or not (settings["activation"] is None or call.is_told_by_output(settings))

    def _compose(self, layer: Any, copies: list[Any], options: dict[str, Any]) -> None:
        """Hold the last call against its composition."""
        x, residual = copies if len(copies) > 1 else (copies[0], None)
        with np.errstate(all="ignore"):
            self.composition = Composition(layer, x, residual, options, self.counts)
            expected = self.composition.output()
        if not np.array_equal(_floats(self.output), _floats(expected), equal_nan=True):
            self.complain("y is not what its operations make one after the other")
        plain = self.composition.plain.state_dict()
        for name, value in self.layer.state_dict().items():
            if not np.array_equal(value, plain[name], equal_nan=True):
                self.complain(f"{name} is not that of a layer without an activation")

    def compare(self, name: str, found: Any, of_float32: Any) -> None:
        """With what came of float32 copies."""
        with np.errstate(all="ignore"):
            rounded = of_float32.astype(found.dtype)
        if not same_bits(found, rounded):
            self.complain(f"{name} is not that of float32 copies, rounded once")

    def backward(self) -> None:
        if self.last is None:
            self.refused(lambda: self.layer.backward(np.zeros((2, 2))), (), RuntimeError)
            return
        y = self.last.y
        dy = self.rng.normal(size=y.value.shape).astype(y.dtype)
        if self.counts is not None:
            dy = masks.filled(self.rng, dy, self.counts)
        if draws.chance(self.rng, 0.2) and dy.size:
            with np.errstate(all="ignore"):
                wrong = dy.astype(np.float64 if dy.dtype == np.float32 else np.float32)
            self.refused(lambda: self.layer.backward(wrong), ("dy",))
        with np.errstate(all="ignore"):
            if self.last.of_output is None:
                expected = self.last.gradients(dy)
            else:
                expected = self.last.of_output(dy, self.output)
        out = buffers.to_write(dy, self.rng, False) if draws.chance(self.rng, 0.3) else None
        wide = None if self.twin is None else buffers.widened(dy if out is None else out.view)
        given = dy if out is None else buffers.copied(out.view, out.view.dtype)
        made = self.layer.backward(
            dy if out is None else out.given, **({} if out is None else {"out": out.given})
        )
        dx, dresidual = made if isinstance(made, tuple) else (made, None)
        results = {"dx": dx, "dresidual": dresidual}
        for name, quantity in expected.items():
            found = results[name] if name in results else getattr(self.layer, name)
            if quantity is None or found is None:
                if (quantity is None) != (found is None):
                    self.complain(f"{name} is {found!r}")
            else:
                self.complain(complaint(name, found, quantity))
        if self.composition is not None:
            self._compare_gradients(given, results)
        if self.twin is not None and self._gates_alike():
            of_twin = self.twin.backward(wide)
            wide_dx = of_twin[0] if isinstance(of_twin, tuple) else of_twin
            self.compare("dx", dx, wide_dx)
            self.complain_of_state(self.state(self.twin), "otherwise than by float32 copies")
        self.last = self.twin = None

    def _compare_gradients(self, dy: np.ndarray, results: dict[str, Any]) -> None:
        """With those of the composition."""
        with np.errstate(all="ignore"):
            expected = self.composition.gradients(dy, self.output)
        for name, value in (expected or {}).items():
            found = results[name] if name in results else getattr(self.layer, name)
            if (value is None) != (found is None):
                self.complain(f"{name} is {found!r}, and {value!r} of the composition")
            elif value is not None:
                with np.errstate(all="ignore"):
                    rounded = _floats(value.astype(found.dtype))
                if not np.array_equal(_floats(found), rounded, equal_nan=True):
                    self.complain(f"{name} has not the bits of the composition")

    def _gates_alike(self) -> bool:
        """Whether an output of 16 bits lets through what that of float32 copies does."""
        composition = self.composition
        if composition is None or composition.name is None or not composition.adds:
            return True
        wide = composition.z
        found = self.output.astype(wide.dtype)
        closed = (composition.closed(z)[composition.counts] for z in (found, wide))
        return np.array_equal(*closed)

    def train(self) -> None:
        mode = draws.chance(self.rng, 0.5)
        if self.layer.train(mode) is not self.layer:
            self.complain("train returns something else than the layer")
        if self.layer.training is not mode:
            self.complain("train does not set training")

    def evaluate(self) -> None:
        self.layer.eval()

    def load(self) -> None:
        """Load another state, or one that is wrong."""
        state = self.layer.state_dict()
        other = {
            name: np.asarray(
                np.abs(self.rng.normal(size=a.shape)) + 0.1 if a.dtype.kind == "f" else 3, a.dtype
            )
            for name, a in state.items()
        }
        if "running_matrix" in other:
            other["running_matrix"] = state["running_matrix"]
        if state and draws.chance(self.rng, 0.5):
            name = draws.pick(self.rng, tuple(state))
            wrong = dict(other)
            kind = int(self.rng.integers(4))
            if kind == 0:
                wrong["unexpected"] = np.zeros(2)
            elif kind == 1:
                wrong[name] = "text"
            elif kind == 2:
                wrong[name] = np.zeros((1, 2, 3, 4))
            else:
                wrong[name] = np.zeros(np.shape(state[name]), np.complex64)
            self.refused(lambda: self.layer.load_state_dict(wrong), ("unexpected", name))
        elif draws.chance(self.rng, 0.1):
            self.refused(lambda: self.layer.load_state_dict([("weight", 1)]), ("state_dict",))
        else:
            self.twin = None
            self.layer.load_state_dict(other)
            for name, value in self.layer.state_dict().items():
                if not np.array_equal(value, other[name]):
                    self.complain(f"{name} was not loaded")
            if "original1" in state:  # v, which must not change between a call and its backward
                self.last, self.layer = None, copy.deepcopy(self.layer)

    def copied(self) -> None:
        """Copies have the same state, and no last call."""
        before = self.state()
        make = draws.pick(self.rng, (copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))))
        self.layer, self.last, self.twin = make(self.layer), None, None
        self.complain_of_state(before, "by a copy")

    def released(self) -> None:
        """Nothing else changes, and there is no backward any more."""
        before = self.state()
        self.layer.release()
        self.last = self.twin = None
        self.complain_of_state(before, "by release")

    def reset(self) -> None:
        if not hasattr(self.layer, "reset_running_stats"):
            return
        self.twin = None
        self.layer.reset_running_stats()
        first = self.plan.make().state_dict()
        for name, value in self.layer.state_dict().items():
            if name.startswith(("running", "window", "num_batches")) and not np.array_equal(
                value, first[name]
            ):
                self.complain(f"{name} is not as at first")

    def wrong(self) -> None:
        """An input that no layer takes."""
        value = draws.pick(self.rng, WRONG_INPUTS)
        more = self.plan.inputs(self.rng)[1:]
        if not self.plan.inputs(self.rng):
            self.refused(lambda: self.layer(out=value if value is not None else 3), ("out",))
        else:
            # The layer's own activation may be wrong, too.
            names = ("x", "w", "axis", "normalized_shape", "labels", "activation")
            self.refused(lambda: self.layer(value, *more), names)

    def settings(self) -> None:
        """Change what may be changed at any time; values that are wrong are refused by a call."""
        if not self.plan.fused:
            return
        layer, self.twin = self.layer, None
        kind = draws.pick(self.rng, ("activation", "activation", "weight", "inplace", "frozen"))
        if kind == "activation":
            chosen = call.activation(self.rng)
            layer.negative_slope = chosen["negative_slope"]
            layer.activation = chosen["activation"]
            if draws.chance(self.rng, 0.2):
                layer.activation = None
            elif draws.chance(self.rng, 0.1):
                layer.activation = "tanh"
        elif kind == "weight" and layer.weight is not None:
            layer.weight[...] = self.rng.normal(size=layer.weight.shape)
            if layer.bias is not None:
                layer.bias[...] = self.rng.normal(size=layer.bias.shape)
            if draws.chance(self.rng, 0.1):
                layer.weight.flat[0] = 0
        elif hasattr(layer, kind) and kind != "weight":
            wrong = draws.pick(self.rng, (1, None, "no", 0.0))
            self.refused(lambda: setattr(layer, kind, wrong), (kind,))
            setattr(layer, kind, not getattr(layer, kind))

    def recomputed(self) -> None:
        """Neither 1 nor "yes" is True."""
        if not self.plan.options(self.rng):
            return
        x = self.plan.inputs(self.rng)[0]
        before, value = x.copy(), draws.pick(self.rng, (1, None, "yes", 0))
        # What a layer in place cannot invert is refused before.
        names = ("recompute", "activation", "weight")
        self.refused(lambda: self.layer(x, recompute=value), names)
        if not same_bits(x, before):
            self.complain("x was changed by something that is refused")

    def wrong_masks(self) -> None:
        """A mask that no layer takes."""
        if not self.plan.masked:
            return
        x = self.plan.inputs(self.rng)[0]
        if not x.size:  # of which any lengths are none
            return
        before, lengths = x.copy(), [0] * len(x)
        wrong = draws.pick(
            self.rng,
            (
                {"mask": np.ones(1, np.int8)},
                {"mask": np.ones([1] * (x.ndim + 1), bool)},
                {"mask": np.ones(max(x.shape) + 1, bool)},
                {"mask": "text"},
                {"lengths": [-1, *lengths[1:]]},
                {"lengths": np.array(lengths) + max(x.shape) + 1.0},
                {"lengths": [*lengths, 0]},
                {"mask": np.ones(1, bool), "lengths": lengths},
                {"padding": draws.pick(self.rng, (None, "zero", 0))},
            ),
        )
        # What an activation, or a layer in place, does not do is refused before.
        names = (*wrong, "activation", "weight", "momentum")
        self.refused(lambda: self.layer(x, **wrong), names)
        if not same_bits(x, before):
            self.complain("x was changed by something that is refused")

    def flags(self) -> None:
        """Modes are True or False."""
        value = draws.pick(self.rng, (1, None, "no", 0.0))
        if draws.chance(self.rng, 0.5):
            self.refused(lambda: self.layer.train(value), ("mode",))
        else:
            self.refused(lambda: setattr(self.layer, "training", value), ("training",))

    def refused(
        self, call: Callable[[], Any], names: tuple[str, ...], kind: type | None = None
    ) -> None:
        before = self.state()
        self.outcome.called(type(self.layer).__name__)
        try:
            call()
        except Exception as error:
            if kind is None:
                case.complain_of_error(self.outcome, error, names)
            elif not isinstance(error, kind):
                self.complain(f"raised {error!r}, not {kind.__name__}")
            else:
                self.outcome.refused += 1
        else:
            self.complain(f"was not refused: wrong is {names}")
        self.complain_of_state(before, "by something that is refused")


def _floats(array: np.ndarray) -> np.ndarray:
    """What NumPy compares, of whatever type."""
    return array.astype(arithmetic(array.dtype))


STEPS = (
    "call",
    "call",
    "call",
    "call",
    "backward",
    "backward",
    "backward",
    "train",
    "evaluate",
    "load",
    "copied",
    "released",
    "reset",
    "wrong",
    "flags",
    "settings",
    "settings",
    "recomputed",
    "wrong_masks",
)


def run(name: str, rng: np.random.Generator) -> case.Outcome:
    """Make a layer, and do to it whatever comes."""
    outcome = case.Outcome()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with np.errstate(all="ignore"):
            plan = LAYERS[name](rng)
        sequence, done = Sequence(plan, rng, outcome), []
        for _ in range(int(rng.integers(2, LONGEST))):
            step = draws.pick(rng, STEPS)
            done.append(step)
            outcome.called(name)
            getattr(sequence, step)()
            if outcome.complaints:
                break
        repr(sequence.layer)
    outcome.description = f"bnfast.{plan.description}: {', '.join(done)}"
    for warning in caught:
        text = str(warning.message)
        if not any(part in text for part in WARNED):
            outcome.complain(f"warned: {text} ({warning.filename}:{warning.lineno})")
    return outcome
