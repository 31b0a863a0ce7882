"""Sequences of what users do to a layer, held against the oracle after each step."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from fuzz import buffers, case, draws
from fuzz.judge import HALVES, complaint, same_bits
from fuzz.layer_models import LAYERS, Plan, Step

LONGEST = 12

# What BatchNorm says of few values.
WARNED = ("values per channel", "value per channel", "infinite from now on")

WRONG_INPUTS: tuple[Any, ...] = (
    *(None, "text", {1.0}, 1.5, np.zeros((2, 3), np.int64), np.zeros((2, 3), ">f4")),
    *(np.zeros((29, 31), np.float32), np.zeros((23, 29, 31)), np.zeros(0, ">f2"), object()),
)


class Sequence:
    """A layer, and what it is to be like."""

    def __init__(self, plan: Plan, rng: np.random.Generator, outcome: case.Outcome) -> None:
        self.plan, self.rng, self.outcome = plan, rng, outcome
        self.layer = plan.make()
        self.last: Step | None = None  # whose backward may come
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
        arguments = self.plan.inputs(self.rng)
        before, counted = self.state(), self.layer.num_batches_tracked
        with np.errstate(all="ignore"):
            step = self.plan.step(self.layer, *arguments)
        given = list(arguments)
        out, in_place, twin, wide = {}, False, None, None
        if arguments:
            in_place = draws.chance(self.rng, 0.1)
            make = buffers.to_write if in_place else buffers.to_read
            kept = make(arguments[0], self.rng, draws.chance(self.rng, 0.5))
            given[0] = kept.given
            if kept.view.dtype in HALVES:
                twin, wide = copy.deepcopy(self.layer), buffers.widened(kept.view)
            if in_place:
                out = {"out": kept.given}
        try:
            y = self.layer(*given, **out)
        except Exception as error:
            if step is not None:
                self.complain(f"refused: {type(error).__name__}: {error}")
            case.complain_of_error(self.outcome, error, ("x",) if step is None else ())
            self.complain_of_state(before, "by a call that raised")
            return
        if step is None:
            self.complain("was not refused")
            return
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
        self.last, self.twin = None if in_place and y.size else step, twin
        if twin is not None:
            self.compare("y", y, twin(wide, *given[1:]))
            self.complain_of_state(self.state(twin), "otherwise than by float32 copies")

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
        if draws.chance(self.rng, 0.2) and dy.size:
            wrong = dy.astype(np.float64 if dy.dtype == np.float32 else np.float32)
            self.refused(lambda: self.layer.backward(wrong), ("dy",))
        with np.errstate(all="ignore"):
            expected = self.last.gradients(dy)
        out = buffers.to_write(dy, self.rng, False) if draws.chance(self.rng, 0.3) else None
        wide = None if self.twin is None else buffers.widened(dy if out is None else out.view)
        dx = self.layer.backward(
            dy if out is None else out.given, **({} if out is None else {"out": out.given})
        )
        for name, quantity in expected.items():
            found = dx if name == "dx" else getattr(self.layer, name)
            if quantity is None or found is None:
                if (quantity is None) != (found is None):
                    self.complain(f"{name} is {found!r}")
            else:
                self.complain(complaint(name, found, quantity))
        if self.twin is not None:
            self.compare("dx", dx, self.twin.backward(wide))
            self.complain_of_state(self.state(self.twin), "otherwise than by float32 copies")
        self.last = self.twin = None

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

    def reset(self) -> None:
        if not hasattr(self.layer, "reset_running_stats"):
            return
        self.twin = None
        self.layer.reset_running_stats()
        first = self.plan.make().state_dict()
        for name, value in self.layer.state_dict().items():
            if name.startswith(("running", "num_batches")) and not np.array_equal(
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
            names = ("x", "w", "axis", "normalized_shape", "labels")
            self.refused(lambda: self.layer(value, *more), names)

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
    "reset",
    "wrong",
    "flags",
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
