"""What is public besides functions of arrays and calls of layers."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

import bnfast
from fuzz import case, draws, oracle, oracle_of_whitening
from fuzz.bad_arguments import FLAGS, OF_FLAGS, OF_INTEGERS, OF_REALS
from fuzz.judge import DOUBLE, Quantity, complaint

Random = np.random.Generator


def refused(
    outcome: case.Outcome, name: str, call: Callable[[], Any], names: tuple[str, ...]
) -> None:
    """Complain unless the call raises one error that names an argument."""
    outcome.called(name)
    try:
        call()
    except Exception as error:
        case.complain_of_error(outcome, error, names)
    else:
        outcome.complain(f"was not refused: wrong is {names}")


def _merge(rng: Random, outcome: case.Outcome) -> None:
    """Moments of parts, joined in any order, are those of the whole."""
    dtype, channels = draws.data_dtype(rng), int(rng.integers(1, 9))
    x = draws.values(rng, (int(rng.integers(1, 400)), channels), dtype)
    cuts = np.sort(rng.integers(0, len(x) + 1, int(rng.integers(1, 5))))
    parts = [bnfast.moments(part) for part in np.split(x, cuts)]
    outcome.description = f"moments of {len(parts)} parts of {case.text_of(x)}, merged"
    merged = parts[0]
    for k in rng.permutation(np.arange(1, len(parts))):
        outcome.called("Moments.merge")
        merged = merged.merge(parts[k]) if draws.chance(rng, 0.5) else parts[k].merge(merged)
    fold = oracle.of_channels(x.shape, 1)
    of = oracle.statistics(x, fold)
    var = fold.statistic(oracle.unjudged(of.var, of.usable & oracle.moderate(of.var, DOUBLE)))
    mean, rounding = fold.statistic(of.mean), np.spacing(np.abs(x).max().astype(DOUBLE))
    # Each part has the promise relative to its own deviation, which may be larger than the whole's
    # only as far as the part is smaller.
    size = 2 * len(parts) * np.sqrt(var * len(x))
    known = {"known": np.full(channels, 4.0 * len(parts) * rounding)}
    outcome.complain(
        complaint("mean", merged.mean, Quantity(mean, {"statistics": size} | known, dtype, DOUBLE))
    )
    sizes = {"statistics": 2 * len(parts) * var * len(x), "known": len(x) * rounding**2}
    sizes["known"] = sizes["known"] + 4 * len(x) * rounding * np.sqrt(var)
    m2 = Quantity(fold.statistic(of.var) * len(x), sizes, dtype, DOUBLE)
    outcome.complain(complaint("m2", merged.m2, m2))
    if merged.count != len(x):
        outcome.complain(f"count is {merged.count}, not {len(x)}")
    wrong = draws.pick(rng, (None, 3, (1, 2, 3), bnfast.moments(np.zeros((2, channels + 1)))))
    refused(outcome, "Moments.merge", lambda: merged.merge(wrong), ("other",))


def _of_covariance(rng: Random, outcome: case.Outcome) -> None:
    """What whitens data of a covariance, and its gradient."""
    groups, each, eps = int(rng.integers(1, 4)), int(rng.integers(1, 5)), 1e-3
    iterations = draws.pick(rng, (None, 1, 4))
    kind = bnfast.Whitened if iterations is None else bnfast.IterativelyWhitened
    more = {} if iterations is None else {"iterations": iterations}
    roots = rng.normal(size=(groups, each, each))
    covariance = (roots @ roots.transpose(0, 2, 1)).astype(draws.dtype(rng))
    mean = rng.normal(size=groups * each)
    name = f"{kind.__name__}.of_covariance"
    outcome.description = f"{name}({case.text_of(mean)}, {case.text_of(covariance)}, {eps}, {more})"
    outcome.called(name)
    found = kind.of_covariance(mean, covariance, eps, **more)
    wide = covariance.astype(DOUBLE)
    symmetric = (wide + wide.transpose(0, 2, 1)) / 2
    by = oracle_of_whitening.of_covariance(mean, symmetric, eps, iterations)
    outcome.complain(complaint("matrix", found.matrix, oracle_of_whitening.matrices(by.matrix, by)))
    through = rng.normal(size=covariance.shape)
    outcome.called(f"{kind.__name__}.covariance_gradient")
    gradient = found.covariance_gradient(through)
    expected = oracle_of_whitening.covariance_gradients(by, through, eps, iterations)
    # Of a symmetric matrix only the symmetric part of its gradient means something.
    symmetrized = (gradient + gradient.transpose(0, 2, 1)) / 2
    outcome.complain(complaint("gradient", symmetrized, expected))
    wrong = draws.pick(rng, (None, "text", np.zeros((1, 2, 3)), np.zeros(covariance.shape, int)))
    refused(outcome, name, lambda: kind.of_covariance(mean, wrong, eps), ("covariance",))
    refused(
        outcome,
        name,
        lambda: kind.of_covariance(mean, covariance, draws.pick(rng, OF_REALS)),
        ("eps",),
    )


def _settings(rng: Random, outcome: case.Outcome) -> None:
    """What is set is got, and what is wrong changes nothing."""
    outcome.description = "set_num_threads, set_output_pool_limit, show_config"
    before = bnfast.get_output_pool_limit()
    for name, set_, get, least in (
        ("set_num_threads", bnfast.set_num_threads, bnfast.get_num_threads, 1),
        ("set_output_pool_limit", bnfast.set_output_pool_limit, bnfast.get_output_pool_limit, 0),
    ):
        number = int(rng.integers(least, 5 if least else 1 << 30))
        outcome.called(name)
        set_(number)
        kept = get()
        wrong = draws.pick(rng, (*OF_INTEGERS, least - 1, -(1 << 70)))
        refused(outcome, name, lambda s=set_, w=wrong: s(w), ("num_threads", "limit"))
        if get() != kept or kept > number:
            outcome.complain(f"{name} of {number}, and then of {wrong!r}, left {get()}")
    bnfast.set_num_threads(None)
    bnfast.set_output_pool_limit(before)
    mode = draws.pick(rng, ("text", None, 3, []))
    refused(outcome, "show_config", lambda: bnfast.show_config(mode), ("mode",))


# Of each layer, arguments that are right.
CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "BatchNorm": {"num_features": 3},
    "InstanceNorm": {"num_features": 3},
    "GhostBatchNorm": {"num_features": 3, "ghost_size": 2},
    "ConditionalBatchNorm": {"num_features": 3, "num_classes": 2},
    "BatchRenorm": {"num_features": 3},
    "MovingAverageBatchNorm": {"num_features": 3, "buffer_size": 2},
    "CrossIterationBatchNorm": {"filter_shape": (3, 2), "window": 3},
    "GroupNorm": {"num_groups": 2, "num_channels": 4},
    "LayerNorm": {"normalized_shape": (3,)},
    "RMSNorm": {"normalized_shape": (3,)},
    "FilterResponseNorm": {"num_features": 3},
    "DecorrelatedBatchNorm": {"num_features": 4, "num_groups": 2},
    "IterNorm": {"num_features": 4, "num_groups": 2, "iterations": 3},
    "WeightStandardization": {"num_filters": 3},
    "ScaledWeightStandardization": {"num_filters": 3},
    "WeightNorm": {"weight": np.ones((2, 3))},
    "SpectralNorm": {"weight": np.ones((2, 3)), "n_power_iterations": 1},
}

SIZES = {
    *("num_features", "num_channels", "num_groups", "num_classes", "ghost_size", "num_filters"),
    *("iterations", "n_power_iterations", "dim", "buffer_size", "window", "warm_up", "burn_in"),
    *("renormalized_from", "stride", "padding", "dilation", "groups"),
}
OF_LAYERS = FLAGS | {"affine", "track_running_stats", "elementwise_affine", "bias", "thresholded"}
OF_DTYPES: tuple[Any, ...] = (np.float16, int, "text", object(), ">f4", np.complex64, 3)


def _wrong_for(rng: Random, layer: str, name: str) -> Any:
    """A value that no argument of this name may have; the layer says which argument it is."""
    if name in OF_LAYERS or (name == "gain" and layer != "WeightNorm"):
        return draws.pick(rng, OF_FLAGS)
    if name in SIZES:
        return draws.pick(rng, (*OF_INTEGERS, -9))
    if name == "axis":
        return draws.pick(rng, OF_INTEGERS[:2])
    if name == "dtype":
        return draws.pick(rng, OF_DTYPES)
    if name == "averaged":
        return draws.pick(rng, ("mean", None, 3))
    if name == "weight":
        return draws.pick(rng, (None, "text", np.zeros((2, 3), int), object()))
    if name == "schedule":
        return draws.pick(rng, (3, "text", (1, 2, 3, 4, 5), bnfast.RenormSchedule(0.5, 1.0)))
    if name in ("normalized_shape", "filter_shape"):
        return draws.pick(rng, (None, "text", -1, (), (2.5,), [1] * 70, (1 << 40, 1 << 40)))
    return draws.pick(rng, OF_REALS)


WRONG = {
    *("eps", "momentum", "gamma", "learned_eps", "dtype", "axis", "affine", "averaged", "gain"),
    *("track_running_stats", "unbiased", "elementwise_affine", "thresholded", "schedule", "floor"),
    *("eps_inside", "v_first", "weight", "normalized_shape", "filter_shape", "r_max", *SIZES),
}


def _constructors(rng: Random, outcome: case.Outcome) -> None:
    """A layer is not made of what is wrong."""
    layer = draws.pick(rng, tuple(CONSTRUCTORS))
    given = dict(CONSTRUCTORS[layer])
    parameters = case.parameters_of(getattr(bnfast, layer))
    name = draws.pick(rng, [key for key in parameters if key in WRONG])
    given[name] = _wrong_for(rng, layer, name)
    outcome.description = f"bnfast.{layer}({case.text_of(given)})"
    names = (name, "r_max") if name == "schedule" else (name,)
    refused(outcome, layer, lambda: getattr(bnfast, layer)(**given), names)


def _from_keras(rng: Random, outcome: case.Outcome) -> None:
    """Weights come in, or one error."""
    channels, dtype = int(rng.integers(1, 6)), draws.dtype(rng)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    given = {name: np.abs(rng.normal(size=channels)).astype(dtype) + 1 for name in names}
    for name in names[:2]:
        if draws.chance(rng, 0.3):
            given[name] = None
    outcome.description = f"BatchNorm.from_keras({channels} channels of {dtype})"
    outcome.called("BatchNorm.from_keras")
    if draws.chance(rng, 0.5):
        theirs = types.SimpleNamespace(**given, momentum=0.9, epsilon=1e-3, axis=-1)
        layer = bnfast.BatchNorm.from_keras(theirs)
    else:
        layer = bnfast.BatchNorm.from_keras(**given, momentum=0.9)
    kept = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    for name, array in zip(names, kept, strict=True):
        if (array is None) != (given[name] is None) or (
            array is not None and not np.array_equal(array, given[name])
        ):
            outcome.complain(f"{name} was not taken")
    x = rng.normal(size=(4, channels)).astype(dtype)
    y = oracle.evaluate(
        x,
        oracle.of_channels(x.shape, 1),
        given["moving_mean"],
        given["moving_variance"],
        given["gamma"],
        given["beta"],
        layer.eps,
    )
    outcome.complain(complaint("y", layer.eval()(x), y))
    name = draws.pick(rng, names)
    wrong = draws.pick(rng, ("text", np.zeros((2, 3, 4)), np.zeros(channels, int), object()))
    refused(
        outcome,
        "BatchNorm.from_keras",
        lambda: bnfast.BatchNorm.from_keras(**(given | {name: wrong})),
        (name,),
    )


OTHERS: dict[str, Callable[[Random, case.Outcome], None]] = {
    "Moments.merge": _merge,
    "of_covariance": _of_covariance,
    "settings": _settings,
    "constructors": _constructors,
    "from_keras": _from_keras,
}


def run(name: str, rng: np.random.Generator) -> case.Outcome:
    """One of them; none of them warns."""
    outcome = case.Outcome()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with np.errstate(all="ignore"):
            OTHERS[name](rng, outcome)
    for warning in caught:
        outcome.complain(f"warned: {warning.message}")
    return outcome
