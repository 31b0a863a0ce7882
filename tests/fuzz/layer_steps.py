"""What a call of a layer of channels is to do, whichever values share statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import bnfast
from fuzz import (
    call,
    masks,
    oracle,
    oracle_of_activations,
    oracle_of_learned_momentum,
    oracle_of_masks,
)
from fuzz.call import Array
from fuzz.judge import DOUBLE, Quantity
from fuzz.layer import (
    OF_CHANNELS,
    Step,
    copies,
    dtypes_of,
    gradients_by_name,
    is_finite,
    learns_momentum,
    loosened,
    momentum_of,
    trains,
)

ACTIVATIONS = ("relu", "leaky_relu", "relu6", "silu", "hardswish")


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


def fused_of(layer: Any, residual: Array | None, recompute: bool = False) -> Fused:
    chosen = layer.activation, layer.negative_slope
    return Fused(residual, recompute, *chosen, getattr(layer, "inplace", False))


def _names_of_refusal(layer: Any, x: Array, fused: Fused) -> tuple[str, ...]:
    """What a call of a layer is refused for, besides its input."""
    names = []
    if fused.activation not in (None, *ACTIVATIONS):
        names.append("activation")
    learns = learns_momentum(layer)
    if fused.recompute and layer.training and learns:
        names.append("recompute")
    plain = fused.activation is None and fused.residual is None and not fused.inplace
    if learns and trains(layer) and not plain:
        if layer.nonfinite == "propagate" or is_finite(x, layer.axis):
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


def activated(
    step: Step,
    fused: Fused,
    given: tuple[Array, oracle.Fold, Array | None, Quantity, Array | None, Array | None],
    dtypes: dict[str, Any],
    constant: bool,
) -> Step:
    """A step whose output is activated; `given` are x, mean, invstd, weight and bias."""
    x, fold, mean, invstd, weight, bias = given
    arguments = fused.arguments()

    def named(found: dict[str, Quantity]) -> dict[str, Quantity | None]:
        gradients = (found[name] for name in ("dx", "dweight", "dbias"))
        made = gradients_by_name(tuple(gradients), OF_CHANNELS, dtypes)
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


def activated_step(
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
        fused = fused_of(layer, residual, recompute)
        if drawn is not None:
            counted = counted_of(x, axis, drawn)
            return step_of_masked(layer, x, drawn, fused, counted, layer.unbiased)
        folds = [(slice(None), fold_of(x.shape, axis))]
        return with_logit(layer, step_by_statistics(layer, x, folds, layer.unbiased, None, fused))

    return step


def step_by_input(
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
    dtypes = dtypes_of(layer, parameters)
    y, mean, invstd, _ = oracle.forward(x, fold, weight, bias, eps, centred)

    def gradients(dy: Array) -> dict[str, Quantity | None]:
        found = oracle.backward(dy, x, fold, mean.value if centred else None, invstd.value, weight)
        return gradients_by_name(found, parameters, dtypes)

    return Step(y, {}, 0, gradients)


def step_by_running(
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
        return gradients_by_name(found, OF_CHANNELS, dtypes)

    return Step(oracle.evaluate(x, fold, mean, var, weight, bias, eps), {}, 0, gradients)


def step_by_statistics(
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
    weight, bias = copies(layer.weight, layer.bias)
    if conditions is not None:
        weight, bias = weight[conditions], bias[conditions]
    dtypes = dtypes_of(layer, OF_CHANNELS)
    tracks = trains(layer) and layer.track_running_stats
    tracks = tracks and not (fused is not None and fused.recompute)
    if not trains(layer) and layer.running_mean is not None:
        mean, var = copies(layer.running_mean, layer.running_var)
        fold = oracle.of_channels(x.shape, layer.axis)
        if conditions is not None:
            fold = oracle.of_conditions(x.shape, layer.axis)
        y = oracle.evaluate(x, fold, mean, var, weight, bias, layer.eps)

        def evaluated(dy: Array) -> dict[str, Quantity | None]:
            with np.errstate(all="ignore"):
                inverse = 1 / np.sqrt(var.astype(oracle.WIDE) + layer.eps)
            found = oracle.backward(dy, x, fold, mean, inverse, weight, constant=True)
            return gradients_by_name(_of_classes(found, layer, conditions), OF_CHANNELS, dtypes)

        step = Step(y, {}, 0, evaluated)
        if fused is None:
            return step
        with np.errstate(all="ignore"):
            inverse = 1 / np.sqrt(var.astype(oracle.WIDE) + layer.eps)
        invstd = Quantity(inverse, {"statistics": inverse}, x.dtype, DOUBLE)
        return activated(step, fused, (x, fold, mean, invstd, weight, bias), dtypes, True)
    parts, running, updated, number = [], None, None, 0
    if tracks:
        running = copies(layer.running_mean, layer.running_var)
        number = layer.num_batches_tracked
    taken = [not tracks or is_finite(x[part], layer.axis) for part, _ in folds]
    if layer.nonfinite == "propagate":
        taken = [True] * len(folds)
    elif layer.nonfinite == "raise" and not all(taken):
        return None
    # Only ghosts are tracked where some are skipped.
    only_all = learns_momentum(layer) or not isinstance(layer, bnfast.GhostBatchNorm)
    tracks = tracks and (all(taken) or not only_all)
    if tracks and unbiased and any(fold.count == 1 for _, fold in folds):
        return None
    if tracks and learns_momentum(layer) and x.size:
        return _blended(layer, x, folds, unbiased, (weight, bias), conditions)
    for (part, fold), takes in zip(folds, taken, strict=True):
        found = oracle.forward(x[part], fold, weight, bias, layer.eps)
        parts.append((part, fold, found))
        if tracks and x.size and takes:
            number += 1
            own = isinstance(layer, bnfast.InstanceNorm) and layer.momentum is None
            momentum = 0.0 if own else momentum_of(layer, number)
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
        return gradients_by_name(_of_classes(whole, layer, conditions), OF_CHANNELS, dtypes)

    step = Step(y, state, counted if x.size else 0, gradients)
    if fused is None:
        return step
    ((_, fold, found),) = parts
    given = x, fold, found.mean.value, found.invstd, weight, bias
    return activated(step, fused, given, dtypes, False)


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
    running = copies(layer.running_mean, layer.running_var)
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
    dtypes = dtypes_of(layer, (*OF_CHANNELS, "momentum_logit"))
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
        named = gradients_by_name(_of_classes(whole, layer, conditions), OF_CHANNELS, dtypes)
        of_logit = loosened(of_logit._replace(dtype=dtypes["momentum_logit"]))
        return named | {"momentum_logit_grad": of_logit}

    updated = dict(zip(("running_mean", "running_var"), of.running, strict=True))
    return Step(oracle.concatenated(outputs), updated, len(folds), gradients)


def with_logit(layer: Any, step: Step | call.Refused | None) -> Step | call.Refused | None:
    """What learns its momentum has a gradient of it after any call: 0 where it had no use."""
    if not isinstance(step, Step) or not learns_momentum(layer):
        return step
    zeros = np.zeros(layer.momentum_logit.shape)
    unused = Quantity(zeros, {"sums": zeros}, DOUBLE, layer.momentum_logit.dtype)

    def extended(gradients: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: {"momentum_logit_grad": unused} | gradients(*given)

    of_output = None if step.of_output is None else extended(step.of_output)
    return step._replace(gradients=extended(step.gradients), of_output=of_output)


def step_of_masked(
    layer: Any,
    x: Array,
    drawn: masks.Drawn,
    fused: Fused,
    counted: oracle_of_masks.Masked,
    unbiased: bool = False,
) -> Step | call.Refused:
    """A layer that is told which values count; `counted` has those of which it makes statistics."""
    tracking = hasattr(layer, "frozen")
    learns = tracking and learns_momentum(layer)
    unknown = fused.activation not in (None, *ACTIVATIONS)
    name = "mask" if "mask" in drawn.arguments else "lengths"
    reasons = name, "activation", "residual", "weight", "momentum", "recompute"
    if learns or fused.inplace or unknown:
        return call.Refused(reasons)
    weight, bias = copies(layer.weight, layer.bias)
    constant = tracking and not trains(layer) and layer.running_mean is not None
    whole = oracle_of_masks.of_batch(drawn.counts, x.shape, counted.axis, counted.padding)
    tracks = tracking and trains(layer) and layer.track_running_stats and not fused.recompute
    updated, number = {}, 0
    if constant:
        counted, (mean, var) = whole, copies(layer.running_mean, layer.running_var)
        fold = oracle.of_channels(x.shape, counted.axis)
        y = oracle.evaluate(x, fold, mean, var, weight, bias, layer.eps)
        with np.errstate(all="ignore"):
            invstd = 1 / np.sqrt(var.astype(oracle.WIDE) + layer.eps)
    else:
        counts_of_channel = whole.values_of(whole.parts[0], x)
        takes = not tracks or layer.nonfinite == "propagate" or is_finite(counts_of_channel, 1)
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
                momentum = momentum_of(layer, layer.num_batches_tracked + 1)
            running = copies(layer.running_mean, layer.running_var)
            after = counted.tracked(of, x, running, momentum, unbiased)
            updated = dict(zip(("running_mean", "running_var"), after, strict=True))
            number = int(not of_samples or callable(layer.momentum))
    dtypes = dtypes_of(layer, OF_CHANNELS)

    def gradients(dy: Array, made: Array | None = None) -> dict[str, Quantity | None]:
        arguments = fused.arguments() | ({} if made is None else {"y": made})
        found = counted.backward(dy, x, mean, invstd, weight, bias, arguments, constant)
        of_x = (found[name] for name in ("dx", "dweight", "dbias"))
        of_residual = {"dresidual": found.get("dresidual")}
        return gradients_by_name(tuple(of_x), OF_CHANNELS, dtypes) | of_residual

    y = counted.padded(oracle.activated(y, fused.arguments()), x)
    of_output = gradients if fused.is_told_by_output() else None
    return Step(y, updated, number, gradients, of_output)


def counted_of_batch(x: Array, axis: int, drawn: masks.Drawn) -> oracle_of_masks.Masked:
    padding = drawn.arguments.get("padding", masks.PADDINGS[0])
    return oracle_of_masks.of_batch(drawn.counts, x.shape, axis, padding)


def counted_of_samples(
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
