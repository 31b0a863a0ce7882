"""Calls of derivatives along a direction, and of gradients of the backward passes."""

from __future__ import annotations

from typing import Any, NamedTuple

from fuzz import draws, oracle, oracle_of_derivatives
from fuzz.call import Array, Call, Expected, Random, draw_x, many, one, upstream, wide
from fuzz.calls_of_rows import of_rows
from fuzz.calls_of_samples import of_samples


class _Saved(NamedTuple):
    """An input, what its forward pass saved, and the other arguments of a pass of derivatives."""

    x: Array
    fold: oracle.Fold
    statistics: dict[str, Array]
    before: dict[str, Any]  # arguments between x and the statistics
    after: dict[str, Any]  # behind the weight
    constant: bool = False
    channels: int | None = None  # the axis along which nothing may leak

    @property
    def is_rms(self) -> bool:
        return "mean" not in self.statistics

    def parameter(self, rng: Random, share: float = 0.7) -> Array | None:
        return draws.parameter(rng, self.fold.parameter_shape, share)

    def rounded(self, parameter: Array | None) -> Array | None:
        """As the pass takes it: that of an element has the dtype of x."""
        is_of_elements = "normalized_shape" in self.before
        return (
            parameter.astype(self.x.dtype)
            if parameter is not None and is_of_elements
            else parameter
        )

    def given(self) -> tuple[Array | None, Array]:
        """Mean and invstd."""
        return self.statistics.get("mean"), list(self.statistics.values())[-1]


def _saved(rng: Random, x: Array, fold: oracle.Fold, rms: bool = False) -> dict[str, Array]:
    found = oracle.forward(x, fold, None, None, draws.eps(rng), not rms)
    mean, invstd = (draws.saved(rng, each) for each in wide(found.mean, found.invstd))
    return {"invrms": invstd} if rms else {"mean": mean, "invstd": invstd}


def _draw(rng: Random, name: str) -> _Saved:
    kind = name.partition("_")[0]
    if kind in ("layer", "rms"):
        x, how, fold = of_rows(rng, full=True)
        before = {"normalized_shape": how.pop("normalized_shape")}
        return _Saved(x, fold, _saved(rng, x, fold, kind == "rms"), before, how)
    if kind in ("instance", "group"):
        x, how, fold = of_samples(rng, kind, full=True)
        how.pop("num_groups", None)
        channels = None if kind == "group" else how["axis"]
        return _Saved(x, fold, _saved(rng, x, fold), {}, how, channels=channels)
    x, axis = draw_x(rng, full=True)
    fold, training = oracle.of_channels(x.shape, axis), draws.chance(rng, 0.7)
    statistics = _saved(rng, x, fold)
    if not training:
        channels = (x.shape[axis],)
        invstd = draws.running(rng, channels, positive=True)
        statistics = {"mean": draws.running(rng, channels), "invstd": invstd}
    return _Saved(x, fold, statistics, {}, {"axis": axis, "training": training}, not training, axis)


def jvp(rng: Random, name: str) -> Call:
    of = _draw(rng, name)
    dx, weight = upstream(rng, of.x), of.parameter(rng)
    arguments = {"dx": dx, "x": of.x, **of.before, **of.statistics, "weight": weight, **of.after}

    def expect() -> Expected:
        gradient = oracle.backward(dx, of.x, of.fold, *of.given(), None, constant=of.constant).dx
        return Expected({"dy": oracle_of_derivatives.along(gradient, of.fold, weight)})

    return Call(name, arguments, expect, one, ("dx", "x"), (), (), of.channels)


def double_backward(rng: Random, name: str) -> Call:
    of = _draw(rng, name)
    ddx = upstream(rng, of.x) if draws.chance(rng, 0.8) else None
    of_parameters = {"ddweight": of.parameter(rng, 0.8), "ddbias": of.parameter(rng, 0.8)}
    if of.is_rms:
        del of_parameters["ddbias"]
    dy, weight = upstream(rng, of.x), of.parameter(rng)
    arguments = {"ddx": ddx, **of_parameters, "dy": dy, "x": of.x, **of.before, **of.statistics}
    arguments |= {"weight": weight, **of.after}

    def expect() -> Expected:
        ddweight, ddbias = (of.rounded(of_parameters.get(key)) for key in ("ddweight", "ddbias"))
        found = oracle_of_derivatives.double_backward(
            *(ddx, ddweight, ddbias, dy, of.x, of.fold, *of.given(), of.rounded(weight)),
            constant=of.constant,
            dtype=of.x.dtype if weight is None else weight.dtype,
        )
        return Expected(found._asdict())

    inputs = ("dy", "x") if ddx is None else ("ddx", "dy", "x")
    return Call(name, arguments, expect, many, inputs, (), (), of.channels)
