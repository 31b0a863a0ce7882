"""What each layer is to do at a call, and at its backward, by the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import bnfast
from fuzz import (
    call,
    draws,
    masks,
    oracle,
    oracle_of_activations,
    oracle_of_averages,
    oracle_of_cross_iteration,
    oracle_of_learned_momentum,
    oracle_of_masks,
    oracle_of_members,
    oracle_of_whitening,
)
from fuzz.call import Array, Random
from fuzz.case import text_of
from fuzz.judge import DOUBLE, Quantity, arithmetic

# Gradients of layers have the rounding of the statistics that the layer made, besides their own.
OF_OWN_STATISTICS = 4


class Step(NamedTuple):
    """What one call does: its output, the state after it, and the gradients for a dy.

    `of_output` has the gradients, for a dy and the output as it came, where they follow from that.
    """

    y: Quantity
    updated: dict[str, Quantity]
    batches: int
    gradients: Callable[[Array], dict[str, Quantity | None]]
    of_output: Callable[[Array, Array], dict[str, Quantity | None]] | None = None


class Plan(NamedTuple):
    """A layer of some shape: how it is made, given inputs, and what it is to do.

    `step` takes the layer, whose public attributes say all that counts, and the arguments of its
    call; it returns None where the call is to be refused, or what the error may name. `options` are
    keywords of a call. A layer that is `fused` has activations and residuals; one that is `masked`
    takes masks, which `step` has as `drawn`.
    """

    make: Callable[[], Any]
    inputs: Callable[[Random], tuple[Any, ...]]
    step: Callable[..., Step | call.Refused | None]
    description: str
    options: Callable[[Random], dict[str, Any]] = lambda rng: {}
    fused: bool = False
    masked: bool = False


def _loosened(quantity: Quantity | None) -> Quantity | None:
    if quantity is None:
        return None
    sizes = {kind: size * OF_OWN_STATISTICS for kind, size in quantity.sizes.items()}
    return quantity._replace(sizes=sizes)


def _gradients(found: Any, parameters: tuple[str, ...], layer_dtypes: dict[str, Any]) -> Any:
    """By attribute, in the dtypes of the parameters; None where there is no parameter."""
    dx, *others = found
    named = {"dx": _loosened(dx)}
    for name, quantity in zip(parameters, others, strict=False):
        dtype = layer_dtypes[name]
        loose = _loosened(quantity)
        named[f"{name}_grad"] = None if dtype is None else loose._replace(dtype=dtype)
    return named


def _dtypes(layer: Any, parameters: tuple[str, ...]) -> dict[str, Any]:
    arrays = {name: getattr(layer, name) for name in parameters}
    return {name: None if array is None else array.dtype for name, array in arrays.items()}


def _copies(*arrays: Array | None) -> list[Array | None]:
    return [None if array is None else array.copy() for array in arrays]


OF_CHANNELS = ("weight", "bias")
ACTIVATIONS = ("relu", "leaky_relu", "relu6", "silu", "hardswish")
NONFINITE = ("propagate", "propagate", "skip", "raise")
AVERAGES = (
    bnfast.ExponentialAverage(old=0.75, bias_corrected=True),
    bnfast.CumulativeAverage(),
)


def _momentum(layer: Any, number: int) -> float:
    """The weight of the next batch."""
    if callable(layer.momentum):
        return layer.momentum(number)
    return 1.0 / number if layer.momentum is None else layer.momentum


def _learns(layer: Any) -> bool:
    return type(layer.momentum) is bnfast.LearnableMomentum


def _trains(layer: Any) -> bool:
    """Whether the layer normalizes by the batch, if it has a choice."""
    return layer.training and not layer.frozen


def _is_finite(x: Array, axis: int, centred: bool = True) -> bool:
    """Whether the statistics of a batch are such that nonfinite='skip' takes it."""
    of = oracle.statistics(x, oracle.of_channels(x.shape, axis), centred)
    most, values = np.finfo(DOUBLE).max, x.size / max(x.shape[axis], 1)
    return bool(((np.abs(of.mean) <= most) & (of.var * values <= most)).all())


class Fused(NamedTuple):
    """What a call of a layer has besides an input, and what the layer is set to."""

    residual: Array | None
    recompute: bool
    activation: str | None
    negative_slope: float
    inplace: bool

    def arguments(self) -> dict[str, Any]:
        """As a function has them."""
        return self._asdict()

    def is_told_by_output(self) -> bool:
        """Whether the layer keeps y rather than the residual."""
        if self.activation is None or self.residual is None:
            return False
        return call.is_told_by_output(self.arguments())


def _fused(layer: Any, residual: Array | None, recompute: bool = False) -> Fused:
    chosen = layer.activation, layer.negative_slope
    return Fused(residual, recompute, *chosen, getattr(layer, "inplace", False))


def _names_of_refusal(layer: Any, x: Array, fused: Fused) -> tuple[str, ...]:
    """What a call of a layer is refused for, besides its input."""
    names = []
    if fused.activation not in (None, *ACTIVATIONS):
        names.append("activation")
    learns = _learns(layer)
    if fused.recompute and layer.training and learns:
        names.append("recompute")
    plain = fused.activation is None and fused.residual is None and not fused.inplace
    if learns and _trains(layer) and not plain:
        if layer.nonfinite == "propagate" or _is_finite(x, layer.axis):
            names.append("momentum")
    if fused.inplace:
        leaky = fused.activation == "leaky_relu" and fused.negative_slope > 0
        if fused.activation is not None and not leaky:
            names.append("activation")
        if fused.residual is not None:
            names.append("residual")
        if layer.weight is not None and not layer.weight.all():
            names.append("weight")
    return tuple(names)


def _with_gradients(
    step: Step,
    fused: Fused,
    given: tuple[Array, oracle.Fold, Array, Quantity, Array | None, Array | None],
    dtypes: dict[str, Any],
    constant: bool,
) -> Step:
    """A step whose output is activated; `given` are x, mean, invstd, weight and bias."""
    x, fold, mean, invstd, weight, bias = given
    arguments = fused.arguments()

    def named(found: dict[str, Quantity]) -> dict[str, Quantity | None]:
        gradients = (found[name] for name in ("dx", "dweight", "dbias"))
        made = _gradients(tuple(gradients), OF_CHANNELS, dtypes)
        return made | {"dresidual": found.get("dresidual")}

    def of_input(dy: Array) -> dict[str, Quantity | None]:
        parameters = invstd.value, weight, bias, arguments
        return named(
            oracle_of_activations.backward(dy, x, fold, mean, *parameters, constant=constant)
        )

    def of_output(dy: Array, y: Array) -> dict[str, Quantity | None]:
        if not fused.inplace:
            arguments["y"] = y
            return of_input(dy)
        parameters = invstd, weight, bias, arguments
        return named(
            oracle_of_activations.backward_of_output(dy, y, fold, *parameters, constant=constant)
        )

    y = oracle.activated(step.y, arguments)
    by_output = fused.inplace or fused.is_told_by_output()
    return step._replace(y=y, gradients=of_input, of_output=of_output if by_output else None)


def _by_running(
    x: Array,
    fold: oracle.Fold,
    mean: Array,
    var: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    dtypes: dict[str, Any],
) -> Step:
    """A layer of channels in evaluation, or frozen."""
    with np.errstate(all="ignore"):
        inverse = 1 / np.sqrt(var.astype(oracle.WIDE) + eps)

    def gradients(dy: Array) -> dict[str, Quantity | None]:
        found = oracle.backward(dy, x, fold, mean, inverse, weight, constant=True)
        return _gradients(found, OF_CHANNELS, dtypes)

    return Step(oracle.evaluate(x, fold, mean, var, weight, bias, eps), {}, 0, gradients)


def _with_logit(layer: Any, step: Step | call.Refused | None) -> Step | call.Refused | None:
    """What learns its momentum has a gradient of it after any call: 0 where it had no use."""
    if not isinstance(step, Step) or not _learns(layer):
        return step
    zeros = np.zeros(layer.momentum_logit.shape)
    unused = Quantity(zeros, {"sums": zeros}, DOUBLE, layer.momentum_logit.dtype)

    def with_logit(gradients: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: {"momentum_logit_grad": unused} | gradients(*given)

    of_output = None if step.of_output is None else with_logit(step.of_output)
    return step._replace(gradients=with_logit(step.gradients), of_output=of_output)


def _of_statistics(
    layer: Any,
    x: Array,
    folds: list[tuple[slice, oracle.Fold]],
    unbiased: bool,
    conditions: Array | None = None,
    fused: Fused | None = None,
) -> Step | call.Refused | None:
    """A layer of channels whose statistics are those of parts of a batch, or of samples."""
    if fused is not None:
        names = _names_of_refusal(layer, x, fused)
        if names:
            return call.Refused((*names, "x"))
    weight, bias = _copies(layer.weight, layer.bias)
    if conditions is not None:
        weight, bias = weight[conditions], bias[conditions]
    dtypes = _dtypes(layer, OF_CHANNELS)
    tracks = _trains(layer) and layer.track_running_stats
    tracks = tracks and not (fused is not None and fused.recompute)
    if not _trains(layer) and layer.running_mean is not None:
        mean, var = _copies(layer.running_mean, layer.running_var)
        fold = oracle.of_channels(x.shape, layer.axis)
        if conditions is not None:
            fold = oracle.of_conditions(x.shape, layer.axis)
        y = oracle.evaluate(x, fold, mean, var, weight, bias, layer.eps)

        def evaluated(dy: Array) -> dict[str, Quantity | None]:
            with np.errstate(all="ignore"):
                inverse = 1 / np.sqrt(var.astype(oracle.WIDE) + layer.eps)
            found = oracle.backward(dy, x, fold, mean, inverse, weight, constant=True)
            return _gradients(_of_classes(found, layer, conditions), OF_CHANNELS, dtypes)

        step = Step(y, {}, 0, evaluated)
        if fused is None:
            return step
        with np.errstate(all="ignore"):
            inverse = 1 / np.sqrt(var.astype(oracle.WIDE) + layer.eps)
        invstd = Quantity(inverse, {"statistics": inverse}, x.dtype, DOUBLE)
        return _with_gradients(step, fused, (x, fold, mean, invstd, weight, bias), dtypes, True)
    parts, running, updated, number = [], None, None, 0
    if tracks:
        running = _copies(layer.running_mean, layer.running_var)
        number = layer.num_batches_tracked
    taken = [not tracks or _is_finite(x[part], layer.axis) for part, _ in folds]
    if layer.nonfinite == "propagate":
        taken = [True] * len(folds)
    elif layer.nonfinite == "raise" and not all(taken):
        return None
    # Only ghosts are tracked where some are skipped.
    only_all = _learns(layer) or not isinstance(layer, bnfast.GhostBatchNorm)
    tracks = tracks and (all(taken) or not only_all)
    if tracks and unbiased and any(fold.count == 1 for _, fold in folds):
        return None
    if tracks and _learns(layer) and x.size:
        return _blended(layer, x, folds, unbiased, (weight, bias), conditions)
    for (part, fold), takes in zip(folds, taken, strict=True):
        found = oracle.forward(x[part], fold, weight, bias, layer.eps)
        parts.append((part, fold, found))
        if tracks and x.size and takes:
            number += 1
            own = isinstance(layer, bnfast.InstanceNorm) and layer.momentum is None
            momentum = 0.0 if own else _momentum(layer, number)
            now = call.tracked(found.of, fold, x, *running, momentum, unbiased)
            updated = now if updated is None else call.carried(updated, now, momentum)
            running = [quantity.value.astype(quantity.dtype) for quantity in now]
    y = oracle.concatenated([found.y for *_, found in parts])
    state = {} if updated is None else {"running_mean": updated.mean, "running_var": updated.var}
    counts = not isinstance(layer, bnfast.InstanceNorm) or callable(layer.momentum)
    counted = sum(taken) if tracks and counts else 0

    def gradients(dy: Array) -> dict[str, Quantity | None]:
        each = [
            oracle.backward(dy[part], x[part], fold, found.mean.value, found.invstd.value, weight)
            for part, fold, found in parts
        ]
        whole = (
            oracle.concatenated([of.dx for of in each]),
            oracle.added([of.dweight for of in each]),
            oracle.added([of.dbias for of in each]),
        )
        return _gradients(_of_classes(whole, layer, conditions), OF_CHANNELS, dtypes)

    step = Step(y, state, counted if x.size else 0, gradients)
    if fused is None:
        return step
    ((_, fold, found),) = parts
    given = x, fold, found.mean.value, found.invstd, weight, bias
    return _with_gradients(step, fused, given, dtypes, False)


def _blended(
    layer: Any,
    x: Array,
    folds: list[tuple[slice, oracle.Fold]],
    unbiased: bool,
    parameters: tuple[Array | None, Array | None],
    conditions: Array | None,
) -> Step:
    """A layer whose momentum is learned: each part is blended into the running statistics."""
    (weight, bias), seen = parameters, layer.num_batches_tracked
    channels, logit = layer.num_features, layer.momentum_logit.astype(oracle.WIDE)
    learned = np.broadcast_to(1 / (1 + np.exp(-logit)), channels)
    running = _copies(layer.running_mean, layer.running_var)
    doubt: tuple[Array, Array] = (np.zeros(channels), np.zeros(channels))
    parts, outputs = [], []
    for number, (part, fold) in enumerate(folds, seen):
        share = learned if number else np.ones(channels)
        of = oracle_of_learned_momentum.blended(x[part], fold, running, doubt, share, unbiased)
        parts.append((part, fold, of))
        outputs.append(
            oracle_of_learned_momentum.normalized(x[part], fold, of, weight, bias, layer.eps)
        )
        running = [quantity.value.astype(quantity.dtype) for quantity in of.running]
        doubt = oracle_of_learned_momentum.doubts(of.running)
    dtypes = _dtypes(layer, (*OF_CHANNELS, "momentum_logit"))
    eps = layer.eps

    def gradients(dy: Array) -> dict[str, Quantity | None]:
        each = [
            oracle_of_learned_momentum.backward(dy[part], x[part], fold, of, weight, eps)
            for part, fold, of in parts
        ]
        whole = (
            oracle.concatenated([of_part.dx for of_part, _ in each]),
            oracle.added([of_part.dweight for of_part, _ in each]),
            oracle.added([of_part.dbias for of_part, _ in each]),
        )
        of_logit = oracle.added([of_part for _, of_part in each])
        if len(logit) < channels:
            sizes = {kind: size.sum(keepdims=True) for kind, size in of_logit.sizes.items()}
            of_logit = of_logit._replace(value=of_logit.value.sum(keepdims=True), sizes=sizes)
        named = _gradients(_of_classes(whole, layer, conditions), OF_CHANNELS, dtypes)
        of_logit = _loosened(of_logit._replace(dtype=dtypes["momentum_logit"]))
        return named | {"momentum_logit_grad": of_logit}

    updated = dict(zip(("running_mean", "running_var"), of.running, strict=True))
    return Step(oracle.concatenated(outputs), updated, len(folds), gradients)


def _of_counts(
    layer: Any,
    x: Array,
    drawn: masks.Drawn,
    fused: Fused,
    counted: oracle_of_masks.Masked,
    unbiased: bool = False,
) -> Step | call.Refused:
    """A layer that is told which values count; `counted` has those of which it makes statistics."""
    tracking = hasattr(layer, "frozen")
    learns = tracking and _learns(layer)
    unknown = fused.activation not in (None, *ACTIVATIONS)
    name = "mask" if "mask" in drawn.arguments else "lengths"
    reasons = name, "activation", "residual", "weight", "momentum", "recompute"
    if learns or fused.inplace or unknown:
        return call.Refused(reasons)
    weight, bias = _copies(layer.weight, layer.bias)
    constant = tracking and not _trains(layer) and layer.running_mean is not None
    whole = oracle_of_masks.of_batch(drawn.counts, x.shape, counted.axis, counted.padding)
    tracks = tracking and _trains(layer) and layer.track_running_stats and not fused.recompute
    updated, number = {}, 0
    if constant:
        counted, (mean, var) = whole, _copies(layer.running_mean, layer.running_var)
        fold = oracle.of_channels(x.shape, counted.axis)
        y = oracle.evaluate(x, fold, mean, var, weight, bias, layer.eps)
        with np.errstate(all="ignore"):
            invstd = 1 / np.sqrt(var.astype(oracle.WIDE) + layer.eps)
    else:
        counts_of_channel = whole.values_of(whole.parts[0], x)
        takes = not tracks or layer.nonfinite == "propagate" or _is_finite(counts_of_channel, 1)
        if not takes and layer.nonfinite == "raise":
            return call.Refused((name, "x"))
        tracks = tracks and takes
        of_samples = isinstance(layer, bnfast.InstanceNorm)
        together = drawn.counts.shape[1 if of_samples else 0 :]
        if tracks and unbiased and np.prod(together) == 1:
            return call.Refused(("x", name))
        refused = call.refused_mask(counted, x, drawn.arguments, tracks and unbiased)
        if refused:
            return refused
        y, of_mean, of_invstd, of = counted.forward(x, weight, bias, layer.eps)
        mean, invstd = of_mean.value, of_invstd.value
        if tracks and x.size:
            momentum = 0.0
            if not of_samples or layer.momentum is not None:
                momentum = _momentum(layer, layer.num_batches_tracked + 1)
            running = _copies(layer.running_mean, layer.running_var)
            after = counted.tracked(of, x, running, momentum, unbiased)
            updated = dict(zip(("running_mean", "running_var"), after, strict=True))
            number = int(not of_samples or callable(layer.momentum))
    dtypes = _dtypes(layer, OF_CHANNELS)

    def gradients(dy: Array, made: Array | None = None) -> dict[str, Quantity | None]:
        arguments = fused.arguments() | ({} if made is None else {"y": made})
        found = counted.backward(dy, x, mean, invstd, weight, bias, arguments, constant)
        of_x = (found[name] for name in ("dx", "dweight", "dbias"))
        of_residual = {"dresidual": found.get("dresidual")}
        return _gradients(tuple(of_x), OF_CHANNELS, dtypes) | of_residual

    y = counted.padded(oracle.activated(y, fused.arguments()), x)
    of_output = gradients if fused.is_told_by_output() else None
    return Step(y, updated, number, gradients, of_output)


def _counted(
    x: Array, axis: int, drawn: masks.Drawn, groups: int | None = None
) -> oracle_of_masks.Masked:
    """Of layers whose samples have their statistics."""
    padding = drawn.arguments.get("padding", masks.PADDINGS[0])
    return oracle_of_masks.of_samples(drawn.counts, x.shape, axis, padding, groups)


def _of_classes(found: Any, layer: Any, conditions: Array | None) -> Any:
    """The gradients of samples, added up by class."""
    if conditions is None:
        return found
    dx, *others = found
    members = (conditions[:, None] == np.arange(layer.num_classes)).astype(oracle.WIDE).T
    summed = []
    for quantity in others:
        finite = {
            kind: np.where(
                members @ np.isinf(size) > 0, np.inf, members @ np.where(np.isinf(size), 0, size)
            )
            for kind, size in quantity.sizes.items()
        }
        summed.append(quantity._replace(value=members @ quantity.value, sizes=finite))
    return dx, *summed


def _channel_inputs(
    channels: int,
    axis: int,
    ndim: int,
    draw: Callable[..., Array] = draws.values,
    dtype: Callable[[Random], np.dtype] = draws.dtype,
) -> Callable[[Random], tuple[Any, ...]]:
    def inputs(rng: Random) -> tuple[Any, ...]:
        sizes = [int(rng.integers(1, 7)) for _ in range(ndim)]
        if draws.chance(rng, 0.03):
            sizes[(axis + 1) % ndim] = 0
        sizes[axis] = channels
        return (draw(rng, tuple(sizes), dtype(rng)),)

    return inputs


def _data_inputs(channels: int, axis: int, ndim: int) -> Callable[[Random], tuple[Any, ...]]:
    """Of layers that take 16 bits."""
    return _channel_inputs(channels, axis, ndim, dtype=draws.data_dtype)


def _sometimes_nonfinite(inputs: Callable[[Random], tuple[Any, ...]]) -> Any:
    """Of what has a choice about such batches."""

    def drawn(rng: Random) -> tuple[Any, ...]:
        x, *others = inputs(rng)
        if x.size and draws.chance(rng, 0.15):
            x.flat[int(rng.integers(x.size))] = draws.pick(rng, (np.nan, np.inf, -np.inf))
        return x, *others

    return drawn


def _tracking(rng: Random) -> dict[str, Any]:
    return {
        "eps": draws.pick(rng, (1e-5, 1e-3)),
        "momentum": draws.pick(rng, (0.1, None, 0.5, 1.0, 0.0, *AVERAGES)),
        "frozen": draws.chance(rng, 0.1),
        "nonfinite": draws.pick(rng, NONFINITE),
        "track_running_stats": draws.chance(rng, 0.8),
        "dtype": draws.dtype(rng),
    }


def _learned_momentum(rng: Random) -> dict[str, Any]:
    """Sometimes instead of another one."""
    if not draws.chance(rng, 0.3):
        return {}
    momentum = bnfast.LearnableMomentum(draws.pick(rng, (0.1, 0.5)), draws.chance(rng, 0.5))
    return {"momentum": momentum, "track_running_stats": True}


def _activation(rng: Random) -> dict[str, Any]:
    """Often none."""
    return call.activation(rng) if draws.chance(rng, 0.5) else {}


def _with_residuals(inputs: Callable[[Random], tuple[Any, ...]]) -> Any:
    """Of layers whose calls may add a residual."""

    def drawn(rng: Random) -> tuple[Any, ...]:
        (x,) = inputs(rng)
        if draws.chance(rng, 0.3):
            return x, rng.normal(size=x.shape).astype(x.dtype)
        return (x,)

    return drawn


def _recompute(rng: Random) -> dict[str, Any]:
    return {"recompute": draws.chance(rng, 0.6)} if draws.chance(rng, 0.4) else {}


def _made(name: str, *arguments: Any, **keywords: Any) -> tuple[Callable[[], Any], str]:
    shown = [text_of(a) for a in arguments]
    shown += [f"{key}={text_of(value)}" for key, value in keywords.items()]
    return lambda: getattr(bnfast, name)(*arguments, **keywords), f"{name}({', '.join(shown)})"


def _counted_of_batch(x: Array, axis: int, drawn: masks.Drawn) -> oracle_of_masks.Masked:
    padding = drawn.arguments.get("padding", masks.PADDINGS[0])
    return oracle_of_masks.of_batch(drawn.counts, x.shape, axis, padding)


def _activated_step(
    axis: int,
    fold_of: Callable[[tuple[int, ...], int], oracle.Fold],
    counted_of: Callable[[Array, int, masks.Drawn], oracle_of_masks.Masked],
) -> Callable[..., Step | call.Refused | None]:
    """That of a layer of channels with activations and masks, whose statistics have this fold."""

    def step(
        layer: Any,
        x: Array,
        residual: Array | None = None,
        *,
        recompute: bool = False,
        drawn: masks.Drawn | None = None,
    ) -> Step | call.Refused | None:
        fused = _fused(layer, residual, recompute)
        if drawn is not None:
            counted = counted_of(x, axis, drawn)
            return _of_counts(layer, x, drawn, fused, counted, layer.unbiased)
        folds = [(slice(None), fold_of(x.shape, axis))]
        return _with_logit(layer, _of_statistics(layer, x, folds, layer.unbiased, None, fused))

    return step


def _batch_norm(rng: Random) -> Plan:
    ndim = int(rng.integers(2, 5))
    channels, axis = int(rng.integers(1, 9)), draws.axis(rng, ndim)
    more = _tracking(rng) | _activation(rng)
    if draws.chance(rng, 0.3):
        more["inplace"] = True
        slope = draws.pick(rng, (0.01, 0.3, 1.0))
        more |= draws.pick(rng, ({"activation": None}, {"activation": "leaky_relu"}))
        more["negative_slope"] = slope
    learned = _learned_momentum(rng)
    more |= learned
    if learned and draws.chance(rng, 0.8):  # others refuse it
        more |= {"activation": None, "inplace": False}
    make, text = _made(
        "BatchNorm",
        channels,
        axis=axis,
        affine=draws.chance(rng, 0.7),
        unbiased=draws.chance(rng, 0.7),
        **more,
    )

    step = _activated_step(axis, oracle.of_channels, _counted_of_batch)
    inputs = _with_residuals(_sometimes_nonfinite(_data_inputs(channels, axis, ndim)))
    return Plan(make, inputs, step, text, _recompute, True, True)


def _instance_norm(rng: Random) -> Plan:
    ndim = int(rng.integers(2, 5))
    channels, axis = int(rng.integers(1, 9)), draws.axis(rng, ndim, 1)
    make, text = _made(
        "InstanceNorm",
        channels,
        axis=axis,
        affine=draws.chance(rng, 0.6),
        **_tracking(rng),
        **_activation(rng),
    )

    step = _activated_step(axis, oracle.of_planes, _counted)
    inputs = _with_residuals(_sometimes_nonfinite(_data_inputs(channels, axis, ndim)))
    return Plan(make, inputs, step, text, _recompute, True, True)


def _ghost(rng: Random) -> Plan:
    ndim = int(rng.integers(2, 5))
    channels, axis = int(rng.integers(1, 9)), draws.axis(rng, ndim, 1)
    size = int(rng.integers(1, 5))
    make, text = _made(
        "GhostBatchNorm",
        channels,
        size,
        axis=axis,
        affine=draws.chance(rng, 0.7),
        unbiased=draws.chance(rng, 0.5),
        **(_tracking(rng) | _learned_momentum(rng)),
    )

    def step(layer: Any, x: Array) -> Step | call.Refused | None:
        folds = [
            (part, oracle.of_channels(x[part].shape, axis)) for part in oracle.ghosts(len(x), size)
        ]
        return _with_logit(layer, _of_statistics(layer, x, folds, layer.unbiased))

    inputs = _sometimes_nonfinite(_not_empty(_data_inputs(channels, axis, ndim)))
    return Plan(make, inputs, step, text)


def _not_empty(inputs: Callable[[Random], tuple[Any, ...]]) -> Any:
    def drawn(rng: Random) -> tuple[Any, ...]:
        found = inputs(rng)
        while not found[0].size:
            found = inputs(rng)
        return found

    return drawn


def _conditional(rng: Random) -> Plan:
    ndim = int(rng.integers(2, 5))
    channels, axis = int(rng.integers(1, 9)), draws.axis(rng, ndim, 1)
    classes = int(rng.integers(1, 5))
    make, text = _made(
        "ConditionalBatchNorm",
        channels,
        classes,
        axis=axis,
        unbiased=draws.chance(rng, 0.7),
        **(_tracking(rng) | _learned_momentum(rng)),
    )
    of_x = _not_empty(_channel_inputs(channels, axis, ndim, draws.mild_values))

    def inputs(rng: Random) -> tuple[Any, ...]:
        (x,) = of_x(rng)
        return x, rng.integers(0, classes, len(x))

    inputs = _sometimes_nonfinite(inputs)

    def step(layer: Any, x: Array, labels: Array) -> Step | call.Refused | None:
        folds = [(slice(None), oracle.of_conditions(x.shape, axis))]
        return _with_logit(layer, _of_statistics(layer, x, folds, layer.unbiased, labels))

    return Plan(make, inputs, step, text)


def _renorm(rng: Random) -> Plan:
    ndim = int(rng.integers(2, 5))
    channels, axis = int(rng.integers(1, 9)), draws.axis(rng, ndim)
    schedule = draws.pick(
        rng,
        (None, bnfast.RenormSchedule(3.0, 5.0, 0, 0, 0), bnfast.RenormSchedule(2.0, 1.0, 1, 6, 3)),
    )
    make, text = _made(
        "BatchRenorm",
        channels,
        axis=axis,
        affine=draws.chance(rng, 0.7),
        schedule=schedule,
        momentum=draws.pick(rng, (0.01, 0.5, 1.0, *AVERAGES)),
        frozen=draws.chance(rng, 0.1),
        nonfinite=draws.pick(rng, NONFINITE),
        dtype=draws.dtype(rng),
    )
    limits = schedule or bnfast.RenormSchedule()

    def step(layer: Any, x: Array) -> Step | None:
        fold, dtypes = oracle.of_channels(x.shape, axis), _dtypes(layer, OF_CHANNELS)
        weight, bias, mean, std = _copies(
            layer.weight, layer.bias, layer.running_mean, layer.running_std
        )
        if not _trains(layer):
            wide = std.astype(oracle.WIDE)
            return _by_running(x, fold, mean, wide**2, weight, bias, 0.0, dtypes)
        takes = layer.nonfinite == "propagate" or _is_finite(x, axis)
        if layer.nonfinite == "raise" and not takes:
            return None
        at = layer.num_batches_tracked
        r_max, d_max = _limits(limits, at)
        found = oracle_of_members.corrected(
            x, fold, mean, std, weight, bias, layer.eps, r_max, d_max
        )
        momentum = _momentum(layer, at + 1)
        size = found.sigma + 0 * found.invstd.sizes["statistics"]
        of_mean = found.mean.sizes["statistics"]
        updated = {
            "running_mean": oracle.blended(mean, found.mean.value, momentum, of_mean, x.dtype),
            "running_std": oracle.blended(std, found.sigma, momentum, size, x.dtype),
        }

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            back = oracle_of_members.corrected_backward(
                dy,
                x,
                fold,
                found.mean.value,
                found.invstd.value,
                found.r.value,
                found.d.value,
                weight,
            )
            # d has the rounding of the mean and of the deviation, times their ratio to the old.
            dweight = _with_rounding_of(back.dweight, back.dbias, found.d)
            return _gradients((back.dx, dweight, back.dbias), OF_CHANNELS, dtypes)

        return Step(found.y, updated if takes else {}, int(takes), gradients)

    inputs = _sometimes_nonfinite(_not_empty(_data_inputs(channels, axis, ndim)))
    return Plan(make, inputs, step, text)


def _with_rounding_of(dweight: Quantity, dbias: Quantity, d: Quantity) -> Quantity:
    more = np.abs(dbias.value) * d.sizes["statistics"]
    return dweight._replace(sizes={**dweight.sizes, "statistics": more})


def _limits(schedule: Any, step: int) -> tuple[float, float]:
    """How far the batch of a step may be corrected."""

    def gone(end: int) -> float:
        if step < schedule.begin:
            return 0.0
        return 1.0 if step >= end else (step - schedule.begin) / (end - schedule.begin)

    r_max = 1.0 + (schedule.r_max - 1.0) * gone(schedule.r_end)
    return r_max, schedule.d_max * gone(schedule.d_end)


def _moving_average(rng: Random) -> Plan:
    ndim = int(rng.integers(2, 5))
    channels, axis = int(rng.integers(1, 9)), draws.axis(rng, ndim)
    size, warm_up, later = (int(rng.integers(low, 5)) for low in (1, 0, 0))
    make, text = _made(
        *("MovingAverageBatchNorm", channels, size),
        axis=axis,
        affine=draws.chance(rng, 0.7),
        momentum=draws.pick(rng, (0.02, 0.5, 1.0, *AVERAGES)),
        warm_up=warm_up,
        renormalized_from=later,
        r_max=draws.pick(rng, (1.0, 2.0, 1e3)),
        frozen=draws.chance(rng, 0.1),
        nonfinite=draws.pick(rng, NONFINITE),
        dtype=draws.dtype(rng),
    )

    def step(layer: Any, x: Array) -> Step | None:
        fold, dtypes = oracle.of_channels(x.shape, axis), _dtypes(layer, OF_CHANNELS)
        weight, bias, var, squares = _copies(
            layer.weight, layer.bias, layer.running_var, layer.square_buffer
        )
        nothing = np.zeros(channels)
        if not _trains(layer):
            return _by_running(x, fold, nothing, var, weight, bias, layer.eps, dtypes)
        takes = layer.nonfinite == "propagate" or _is_finite(x, axis, centred=False)
        if layer.nonfinite == "raise" and not takes:
            return None
        seen = layer.num_batches_tracked
        row, averaged = seen % size, seen >= max(warm_up, size)
        r_max = layer.r_max if seen >= max(warm_up, later) else 1.0
        found = oracle_of_averages.moving_average(
            *(x, fold, var, squares, weight, bias, _momentum(layer, seen + 1), layer.eps),
            *(row, averaged, r_max),
        )

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            # The buffer as it is by then: a state may have been loaded since the call.
            *of_layer, buffer = oracle_of_averages.moving_average_backward(
                *(dy, x, fold, found.invrms.value, found.r.value, row, averaged),
                *(layer.gradient_buffer.copy(), weight),
            )
            named = _gradients(of_layer, OF_CHANNELS, dtypes)
            return named | {"gradient_buffer": _loosened(buffer)} if takes else named

        updated = {"running_var": found.running_var, "square_buffer": found.square_buffer}
        return Step(found.y, updated if takes else {}, int(takes), gradients)

    inputs = _sometimes_nonfinite(_not_empty(_channel_inputs(channels, axis, ndim)))
    return Plan(make, inputs, step, text)


WINDOW = tuple(f"window_{name}" for name in ("filters", "mean", "var", "dmean", "dvar"))


def _window_of(layer: Any) -> list[Array]:
    return [getattr(layer, name) for name in WINDOW]


def _cross_iteration(rng: Random) -> Plan:
    spatial, groups = int(rng.integers(3)), draws.pick(rng, (1, 1, 2))
    channels, axis = groups * int(rng.integers(1, 4)), draws.axis(rng, 2 + spatial, 1)
    kernel = tuple(int(n) for n in rng.integers(1, 4, spatial)) if draws.chance(rng, 0.8) else ()
    filter_shape = (channels, int(rng.integers(1, 4)), *kernel)

    def numbers(low: int, high: int) -> tuple[int, ...]:
        """One for each axis; often the same."""
        found = tuple(int(n) for n in rng.integers(low, high, spatial))
        return found if draws.chance(rng, 0.4) else found[:1] * spatial

    of = oracle_of_cross_iteration.Layer(
        filter_shape, numbers(1, 3), numbers(0, 2), numbers(1, 3), groups
    )
    window, burn_in = int(rng.integers(1, 5)), draws.pick(rng, (0, 0, 1, 3))
    settings = _tracking(rng)
    del settings["track_running_stats"]
    steps = ((name, getattr(of, name)) for name in ("stride", "padding", "dilation") if spatial)
    geometry = {name: each[0] if len(set(each)) == 1 else each for name, each in steps}
    make, text = _made(
        *("CrossIterationBatchNorm", filter_shape, window),
        axis=axis,
        affine=draws.chance(rng, 0.7),
        burn_in=burn_in,
        groups=groups,
        unbiased=draws.chance(rng, 0.7),
        **geometry,
        **settings,
    )
    first, rate = rng.normal(size=filter_shape), draws.pick(rng, (0.0, 1e-3, 0.1))

    def inputs(rng: Random) -> tuple[Any, ...]:
        sizes = of.sizes_of(tuple(int(n) for n in rng.integers(1, 6, spatial)))
        samples = 0 if draws.chance(rng, 0.03) else int(rng.integers(1, 7))
        shape = samples, filter_shape[1] * groups, *sizes
        sources = draws.mild_values(rng, shape, draws.dtype(rng))
        filters = (first + rate * rng.normal(size=filter_shape)).astype(draws.dtype(rng))
        x = np.moveaxis(of.output(sources, filters), 1, axis).astype(draws.dtype(rng))
        return np.ascontiguousarray(x), np.moveaxis(sources, 1, axis), filters

    def step(layer: Any, x: Array, sources: Array, filters: Array) -> Step | None:
        fold, dtypes = oracle.of_channels(x.shape, axis), _dtypes(layer, OF_CHANNELS)
        weight, bias, mean, var = _copies(
            layer.weight, layer.bias, layer.running_mean, layer.running_var
        )
        if not _trains(layer):
            return _by_running(x, fold, mean, var, weight, bias, layer.eps, dtypes)
        if layer.unbiased and fold.count == 1:
            return None
        takes = layer.nonfinite == "propagate" or _is_finite(x, axis)
        if layer.nonfinite == "raise" and not takes:
            return None
        takes = takes and x.size > 0
        seen = layer.num_batches_tracked
        past, rows = seen - burn_in, window - 1
        kept = [number % rows for number in range(max(past - rows, 0), past)]
        entries = [
            bnfast.IterationStatistics(*(array[row] for array in _copies(*_window_of(layer))))
            for row in reversed(kept)
        ]
        found: Any = oracle.forward(x, fold, weight, bias, layer.eps)
        of_batch = found.of
        if entries and x.size:
            found = oracle_of_cross_iteration.normalized(
                *(x, fold, filters, entries, weight, bias, layer.eps)
            )
        updated = {}
        if takes:
            after = call.tracked(
                *(of_batch, fold, x, mean, var, _momentum(layer, seen + 1), layer.unbiased)
            )
            updated = {"running_mean": after.mean, "running_var": after.var}
        if takes and rows and past >= 0:
            of_iteration = oracle_of_cross_iteration.iteration(x, fold, axis, sources, filters, of)
            for name, buffer, new in zip(
                WINDOW, _copies(*_window_of(layer)), of_iteration, strict=True
            ):
                updated[name] = oracle_of_averages.with_row(buffer, past % rows, new)

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            back = oracle_of_cross_iteration.backward_of_layer(
                *(dy, x, fold, found, 1 + len(entries), weight)
            )
            return _gradients(back, OF_CHANNELS, dtypes)

        return Step(found.y, updated, int(takes), gradients)

    return Plan(make, _sometimes_nonfinite(inputs), step, text)


def _group_norm(rng: Random) -> Plan:
    ndim, groups = int(rng.integers(2, 5)), int(rng.integers(1, 4))
    channels, axis = groups * int(rng.integers(1, 4)), draws.axis(rng, ndim, 1)
    make, text = _made(
        "GroupNorm",
        groups,
        channels,
        axis=axis,
        affine=draws.chance(rng, 0.7),
        dtype=draws.dtype(rng),
        **_activation(rng),
    )

    def step(
        layer: Any,
        x: Array,
        residual: Array | None = None,
        *,
        drawn: masks.Drawn | None = None,
    ) -> Step | call.Refused:
        fold, fused = oracle.of_groups(x.shape, axis, groups), _fused(layer, residual)
        if drawn is not None:
            return _of_counts(layer, x, drawn, fused, _counted(x, axis, drawn, groups))
        if fused.activation not in (None, *ACTIVATIONS):
            return call.Refused(("activation",))
        weight, bias = _copies(layer.weight, layer.bias)
        found = oracle.forward(x, fold, weight, bias, layer.eps)
        plain = _plain(layer, x, fold, weight, bias, layer.eps)
        given = x, fold, found.mean.value, found.invstd, weight, bias
        return _with_gradients(plain, fused, given, _dtypes(layer, OF_CHANNELS), False)

    inputs = _with_residuals(_data_inputs(channels, axis, ndim))
    return Plan(make, inputs, step, text, fused=True, masked=True)


def _plain(
    layer: Any,
    x: Array,
    fold: oracle.Fold,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    centred: bool = True,
) -> Step:
    """A layer that is the same in training and evaluation."""
    parameters = OF_CHANNELS
    dtypes = _dtypes(layer, parameters)
    y, mean, invstd, _ = oracle.forward(x, fold, weight, bias, eps, centred)

    def gradients(dy: Array) -> dict[str, Quantity | None]:
        found = oracle.backward(dy, x, fold, mean.value if centred else None, invstd.value, weight)
        return _gradients(found, parameters, dtypes)

    return Step(y, {}, 0, gradients)


def _rows(rng: Random, name: str) -> Plan:
    ndim = int(rng.integers(1, 5))
    sizes = tuple(int(rng.integers(1, 9)) for _ in range(ndim))
    number = int(rng.integers(1, ndim + 1))
    axes = tuple(range(ndim - number, ndim))
    given: Any = None
    if draws.chance(rng, 0.4):
        axes = tuple(int(d) for d in rng.permutation(ndim)[:number])
        given = axes if number > 1 or draws.chance(rng, 0.5) else axes[0]
    rms, of_row = name == "RMSNorm", tuple(sizes[d] for d in axes)
    more = {} if rms else {"bias": draws.chance(rng, 0.7)}
    make, text = _made(
        name,
        of_row,
        axis=given,
        elementwise_affine=draws.chance(rng, 0.7),
        dtype=draws.dtype(rng),
        **more,
    )

    def inputs(rng: Random) -> tuple[Any, ...]:
        shape = [n if d in axes else int(rng.integers(1, 7)) for d, n in enumerate(sizes)]
        return (draws.values(rng, tuple(shape), draws.data_dtype(rng)),)

    def step(layer: Any, x: Array) -> Step:
        weight, bias = (
            None if p is None else p.astype(arithmetic(x.dtype)) for p in (layer.weight, layer.bias)
        )
        eps = float(np.finfo(arithmetic(x.dtype)).eps) if layer.eps is None else layer.eps
        return _plain(layer, x, oracle.of_rows(x.shape, axes), weight, bias, eps, not rms)

    return Plan(make, inputs, step, text)


def _response(rng: Random) -> Plan:
    ndim = int(rng.integers(2, 5))
    channels, axis = int(rng.integers(1, 9)), draws.axis(rng, ndim, 1)
    make, text = _made(
        "FilterResponseNorm",
        channels,
        axis=axis,
        affine=draws.chance(rng, 0.7),
        thresholded=draws.chance(rng, 0.6),
        learned_eps=draws.pick(rng, (None, 1e-4)),
        dtype=draws.dtype(rng),
    )
    parameters = ("weight", "bias", "tau", "learned_eps")

    def step(layer: Any, x: Array) -> Step:
        given = _copies(*(getattr(layer, name) for name in parameters))
        *first, learned = given
        dtypes = _dtypes(layer, parameters)
        y, inverse = oracle_of_members.response(x, axis, *first, layer.eps, learned)

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            found = oracle_of_members.response_backward(dy, x, axis, inverse.value, *first, learned)
            return _gradients(found, parameters, dtypes)

        return Step(y, {}, 0, gradients)

    return Plan(make, _data_inputs(channels, axis, ndim), step, text)


def _whitening(rng: Random, name: str) -> Plan:
    ndim, groups = int(rng.integers(2, 5)), int(rng.integers(1, 3))
    channels, axis = groups * int(rng.integers(1, 4)), draws.axis(rng, ndim)
    more = {"iterations": int(rng.integers(1, 7))} if name == "IterNorm" else {}
    iterations = more.get("iterations")
    make, text = _made(
        name,
        channels,
        groups,
        axis=axis,
        affine=draws.chance(rng, 0.7),
        averaged=draws.pick(rng, ("whitening", "covariance")),
        **more,
        **(_tracking(rng) | {"eps": draws.pick(rng, (1e-3, 0.1))}),
    )

    def step(layer: Any, x: Array) -> Step:
        weight, bias, mean, matrix = _copies(
            layer.weight, layer.bias, layer.running_mean, layer.running_matrix
        )
        dtypes, eps = _dtypes(layer, OF_CHANNELS), layer.eps
        constant = not _trains(layer) and mean is not None
        if constant:
            by = oracle_of_whitening.evaluation_of(mean, matrix, layer.averaged, eps, iterations)
        else:
            by = oracle_of_whitening.whitening(x, axis, groups, eps, iterations)
        y = oracle_of_whitening.whitened(x, axis, by, weight, bias)
        updated: dict[str, Quantity] = {}
        tracks = _trains(layer) and layer.track_running_stats
        if tracks:
            momentum = _momentum(layer, layer.num_batches_tracked + 1)
            updated = oracle_of_whitening.tracked_matrix(
                by, x, mean, matrix, momentum, layer.averaged
            )

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            found = oracle_of_whitening.gradients(
                dy, x, axis, by, weight, eps, iterations, constant
            )
            return _gradients(found, OF_CHANNELS, dtypes)

        return Step(y, updated, int(tracks), gradients)

    inputs = _not_empty(_channel_inputs(channels, axis, ndim, draws.mild_values))
    return Plan(make, inputs, step, text)


def _filters(rng: Random) -> tuple[tuple[int, ...], int, np.dtype]:
    ndim = int(rng.integers(2, 5))
    shape = tuple(int(rng.integers(2, 7)) for _ in range(ndim))
    return shape, draws.pick(rng, (0, ndim - 1, -1)), draws.dtype(rng)


def _standardization(rng: Random, name: str) -> Plan:
    shape, axis, _ = _filters(rng)
    if name.startswith("Scaled"):
        gamma, floor = draws.pick(rng, (1.0, 1.7)), draws.chance(rng, 0.6)
        rule = oracle_of_members.Rule(1e-4, gamma=gamma, floor=floor)
        more = {"gamma": gamma, "eps": 1e-4, "floor": floor}
    else:
        rule = oracle_of_members.Rule(1e-5, draws.chance(rng, 0.6), draws.chance(rng, 0.4))
        more = {"eps": 1e-5, "eps_inside": rule.inside, "unbiased": rule.unbiased}
    make, text = _made(
        name, shape[axis], gain=draws.chance(rng, 0.6), axis=axis, dtype=draws.dtype(rng), **more
    )

    def inputs(rng: Random) -> tuple[Any, ...]:
        return (draws.values(rng, shape, draws.dtype(rng)),)

    def step(layer: Any, w: Array) -> Step:
        (gain,) = _copies(layer.gain)
        y, mean, std = oracle_of_members.standardized(w, axis, gain, rule)

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            found = oracle_of_members.standardized_backward(
                dy, w, axis, mean.value, std.value, gain, rule
            )
            return _gradients(found, ("gain",), _dtypes(layer, ("gain",)))

        return Step(y, {}, 0, gradients)

    return Plan(make, inputs, step, text)


def _weight_norm(rng: Random) -> Plan:
    shape, axis, dtype = _filters(rng)
    dim = draws.pick(rng, (None, axis % len(shape)))
    eps = draws.pick(rng, (0.0, 1e-3))
    make, text = _made("WeightNorm", draws.mild_values(rng, shape, dtype), dim, eps)

    def step(layer: Any) -> Step:
        v, g = layer.v.copy(), layer.g.copy()
        y = oracle_of_members.with_lengths(v, g, dim, eps)

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            norm = oracle_of_members.lengths(v, dim).value
            dv, dg = oracle_of_members.with_lengths_backward(dy, v, g, norm, dim, eps)
            return {"dx": _loosened(dv), "g_grad": _loosened(dg), "v_grad": _loosened(dv)}

        return Step(y, {}, 0, gradients)

    return Plan(make, lambda rng: (), step, text)


def _spectral(rng: Random) -> Plan:
    shape, dim, dtype = _filters(rng)
    first = draws.mild_values(rng, shape, dtype)
    iterations, v_first = int(rng.integers(1, 4)), draws.chance(rng, 0.4)
    make, text = _made("SpectralNorm", first, iterations, dim=dim, v_first=v_first)

    def inputs(rng: Random) -> tuple[Any, ...]:
        return (draws.mild_values(rng, shape, draws.dtype(rng)),)

    def step(layer: Any, w: Array) -> Step:
        u, v = _copies(layer.u, layer.v)
        number = iterations if layer.training else 0
        found = oracle_of_members.divided(w, u, v, number, layer.eps, dim, v_first)
        updated = {}
        if layer.training:
            updated = {name: getattr(found, name)._replace(dtype=u.dtype) for name in ("u", "v")}

        def gradients(dy: Array) -> dict[str, Quantity | None]:
            dw = oracle_of_members.divided_backward(
                dy, w, found.sigma.value, found.u.value, found.v.value, layer.eps, dim
            )
            doubtful = np.isinf(np.asarray(found.sigma.sizes["matrices"]))
            sizes = {kind: oracle.unjudged(s, ~doubtful) for kind, s in dw.sizes.items()}
            return {"dx": _loosened(dw._replace(sizes=sizes))}

        return Step(found.y, updated, 0, gradients)

    return Plan(make, inputs, step, text)


LAYERS: dict[str, Callable[[Random], Plan]] = {
    "BatchNorm": _batch_norm,
    "InstanceNorm": _instance_norm,
    "GhostBatchNorm": _ghost,
    "ConditionalBatchNorm": _conditional,
    "BatchRenorm": _renorm,
    "MovingAverageBatchNorm": _moving_average,
    "CrossIterationBatchNorm": _cross_iteration,
    "GroupNorm": _group_norm,
    "LayerNorm": lambda rng: _rows(rng, "LayerNorm"),
    "RMSNorm": lambda rng: _rows(rng, "RMSNorm"),
    "FilterResponseNorm": _response,
    "DecorrelatedBatchNorm": lambda rng: _whitening(rng, "DecorrelatedBatchNorm"),
    "IterNorm": lambda rng: _whitening(rng, "IterNorm"),
    "WeightStandardization": lambda rng: _standardization(rng, "WeightStandardization"),
    "ScaledWeightStandardization": lambda rng: _standardization(rng, "ScaledWeightStandardization"),
    "WeightNorm": _weight_norm,
    "SpectralNorm": _spectral,
}
