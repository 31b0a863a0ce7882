"""Keras 3 on NumPy (``KERAS_BACKEND=numpy``): its normalization layers, computed by bnfast."""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import bnfast
from bnfast._conventions import KERAS
from bnfast._scalars import describe
from bnfast._typing import Array
from bnfast.integrations._report import Entry, Report

_NEEDS = (
    "bnfast.integrations.keras needs Keras 3.14 or newer with its NumPy backend (the extra "
    '"keras"): python -m pip install "keras>=3.14" jax, and KERAS_BACKEND=numpy in the '
    "environment before Keras is imported"
)

try:
    import keras
    from keras.src.backend.common.symbolic_scope import in_symbolic_scope
except ImportError as error:
    raise ImportError(f"{_NEEDS}; importing Keras raised {error!r}") from error
if keras.config.backend() != "numpy":
    raise ImportError(f"{_NEEDS}; got the backend {keras.config.backend()!r}")

__all__ = ["Entry", "Report", "accelerate", "patched", "restore"]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def accelerate(model: Any) -> Report:
    """Let bnfast compute the normalization layers of a Keras model, from now on.

    The layers stay the objects that they are: the ``call`` of each is replaced, and nothing else.
    Weights, names, configurations and saved files are unchanged; a copy, and a model that was
    loaded, is computed by Keras until it is accelerated itself. `restore` takes it back.

    Parameters
    ----------
    model : keras.Model, or another keras.Layer
        Built. Layers are found wherever Keras finds their weights: in nested models, wrappers
        (TimeDistributed, Bidirectional), attributes, lists and dictionaries.

    Returns
    -------
    Report
        The normalization layers that were swapped, and those that were not, each with the reason.

    Raises
    ------
    TypeError
        Where `model` is no Keras layer.
    ValueError
        Where it is not built: what its ``build`` makes could not be found.

    Notes
    -----
    BatchNormalization, LayerNormalization, GroupNormalization, RMSNormalization and
    UnitNormalization are swapped, with the meaning that Keras gives to ``training``, ``trainable``
    and masks. A call that bnfast has no kernel for runs Keras's own code: training with a mask or
    with renorm, half precision, inputs without values.

    Examples
    --------
    >>> import keras  # with KERAS_BACKEND=numpy
    >>> from bnfast.integrations.keras import accelerate
    >>> layers = [keras.Input((8,)), keras.layers.Dense(4), keras.layers.BatchNormalization()]
    >>> model = keras.Sequential(layers)
    >>> print(accelerate(model))
    bnfast computes 1 of 1 normalization layers
      1 BatchNormalization
    """
    _refuse_other_models(model)
    if not model.built:
        raise ValueError(
            f"model must be built, got {model.name!r}, which is not: call it on a batch first"
        )
    swapped, left = [], []
    for layer in model._flatten_layers():  # nothing public enters wrappers and attributes
        if not isinstance(layer, _NORMALIZATIONS):
            continue
        entry = Entry(layer.path or layer.name, type(layer).__name__, _reason_to_leave(layer))
        if entry.reason:
            left.append(entry)
        else:
            layer.call = types.MethodType(_CALLS[type(layer)], layer)
            swapped.append(entry)
    return Report("Keras", tuple(swapped), tuple(left))


def restore(model: Any) -> None:
    """Let Keras compute the normalization layers of a model again.

    Parameters
    ----------
    model : keras.Model, or another keras.Layer
        Changed in place.

    Raises
    ------
    TypeError
        Where `model` is no Keras layer.
    """
    _refuse_other_models(model)
    for layer in model._flatten_layers():
        if _is_swapped(layer):
            del layer.call


def _refuse_other_models(model: Any) -> None:
    if not isinstance(model, keras.Layer):
        raise TypeError(f"model must be a Keras model or layer, got {describe(model)}")


def _is_swapped(layer: Any) -> bool:
    ours = _CALLS.get(type(layer))
    return ours is not None and getattr(vars(layer).get("call"), "__func__", None) is ours


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Let bnfast compute Keras's normalization functions, inside ``with patched():``.

    These are ``keras.ops.batch_normalization``, ``layer_normalization``, ``rms_normalization``,
    ``normalize`` and ``moments``, and so what Keras's layers make of them. For models, `accelerate`
    is faster: Keras's layers copy their input before they call a function.

    Notes
    -----
    In all threads, and by names that are private to Keras. Arguments that bnfast has no kernel for
    go to Keras's own functions.

    Examples
    --------
    >>> import keras, numpy as np  # with KERAS_BACKEND=numpy
    >>> from bnfast.integrations.keras import patched
    >>> x = np.array([[999, 1000, 1001]], np.float32)
    >>> with patched():
    ...     mean, variance = keras.ops.moments(x, [1])
    >>> variance.round(3)
    array([0.667], dtype=float32)
    """
    from keras.src import backend
    from keras.src.ops import nn

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (backend.nn, "batch_normalization", _batch_normalization),
        (backend.nn, "moments", _moments),
        (nn, "_layer_normalization", _layer_normalization),
        (nn, "_rms_normalization", _rms_normalization),
        (nn, "_normalize", _normalize),
    ]
    theirs = [getattr(module, name) for module, name, _ in replaced]
    try:
        for (module, name, ours), function in zip(replaced, theirs, strict=True):
            setattr(module, name, _ours_or_theirs(ours, function))
        yield
    finally:
        for (module, name, _), function in zip(replaced, theirs, strict=True):
            setattr(module, name, function)


def _ours_or_theirs(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def function(*args: Any, **kwargs: Any) -> Any:
        result = ours(*args, **kwargs)
        return theirs(*args, **kwargs) if result is None else result

    return function


# Functions with the arguments of those of Keras. None says that this call is for Keras's own.
#
# Outputs are in NumPy's memory (`out`). Keras keeps all outputs of a network until its end, so the
# memory that bnfast keeps for the next output runs out, and new blocks take longer to get than
# NumPy's memory, which the other layers have left.


def _batch_normalization(
    x: Any,
    mean: Any,
    variance: Any,
    axis: int,
    offset: Any = None,
    scale: Any = None,
    epsilon: float = 1e-3,
) -> Array | None:
    if not _is_plain(x) or x.ndim < 2 or not epsilon >= 0:
        return None
    parameters = [mean, variance, *(p for p in (offset, scale) if p is not None)]
    if not all(_is_plain(p) and p.dtype == x.dtype for p in parameters):
        return None
    if any(p.shape != (x.shape[axis],) for p in parameters):
        return None
    return bnfast.batch_norm(
        x, mean, variance, scale, offset, eps=epsilon, axis=axis, out=np.empty_like(x)
    )


def _moments(
    x: Any, axes: Any, keepdims: bool = False, synchronized: bool = False
) -> tuple[Array, Array] | None:
    reduced = _sorted_axes(x, axes)
    if reduced is None or synchronized:
        return None
    moments = bnfast.moments(x, _others(x, reduced))
    mean, variance = (np.array(a, x.dtype) for a in (moments.mean, moments.var))
    if keepdims:
        return np.expand_dims(mean, reduced), np.expand_dims(variance, reduced)
    return mean, variance


def _layer_normalization(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    axis: Any = -1,
    epsilon: float | None = None,
    rms_scaling: bool = False,
) -> Array | None:
    axes = _sorted_axes(x, axis)
    if axes is None:
        return None
    shape = tuple(x.shape[a] for a in axes)
    gamma, beta = _value(gamma), _value(beta)
    if not (_fits(gamma, shape) and _fits(beta, shape)):
        return None
    eps = keras.config.epsilon() if epsilon is None else epsilon
    if not rms_scaling:
        return bnfast.layer_norm(x, shape, gamma, beta, eps, axis=axes, out=np.empty_like(x))
    # Keras divides by the deviation here, but does not subtract the mean.
    others = _others(x, axes)
    factor = 1.0 / np.sqrt(bnfast.moments(x, others).var + eps)
    y: Array = x * np.expand_dims(factor, axes).astype(x.dtype)
    if gamma is not None:
        y *= np.expand_dims(gamma, others)
    return y


def _rms_normalization(
    x: Any, scale: Any = None, axis: Any = -1, epsilon: float | None = None
) -> Array | None:
    axes = _sorted_axes(x, axis)
    if axes is None:
        return None
    shape = tuple(x.shape[a] for a in axes)
    scale = _value(scale)
    if not _fits(scale, shape):
        return None
    # Keras aligns the scale with the last axes, whichever axes are normalized.
    if scale is not None and axes != tuple(range(x.ndim - len(axes), x.ndim)):
        return None
    eps = keras.config.epsilon() if epsilon is None else epsilon
    return bnfast.rms_norm(x, shape, scale, eps, axis=axes, out=np.empty_like(x))


def _normalize(
    x: Any, axis: Any = -1, order: int = 2, epsilon: float | None = None
) -> Array | None:
    axes = _sorted_axes(x, axis)
    shortest = keras.config.epsilon() if epsilon is None else epsilon
    # Keras makes float32 of float64 here, and nowhere else of what it returns.
    if axes is None or x.dtype != np.float32 or order != 2 or not shortest > 0:
        return None
    shape = tuple(x.shape[a] for a in axes)
    root = math.sqrt(math.prod(shape))  # of the number of values: the norm is rms * root
    weight = np.full(shape, 1.0 / root, x.dtype)
    out = np.empty_like(x)
    y, invrms = bnfast.rms_norm_forward(x, shape, weight, 0.0, axis=axes, out=out)
    short = invrms > root / shortest
    if short.any():
        np.copyto(y, x * x.dtype.type(1.0 / shortest), where=np.expand_dims(short, axes))
    return y


def _is_plain(x: Any) -> bool:
    """Whether x is an array that bnfast computes as Keras does."""
    return type(x) is np.ndarray and x.dtype in _FLOATS and x.size > 0


def _sorted_axes(x: Any, axis: Any) -> tuple[int, ...] | None:
    """Return the axes as numbers from 0 on; None where x is not plain or has no such axes."""
    axes = axis if isinstance(axis, (list, tuple)) else (axis,)
    if not _is_plain(x) or not all(type(a) is int and -x.ndim <= a < x.ndim for a in axes):
        return None
    found = sorted({a % x.ndim for a in axes})
    return tuple(found) if found and len(found) == len(axes) else None


def _others(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a in range(x.ndim) if a not in axes)


def _value(parameter: Any) -> Any:
    """Return the array of a variable: inside stateless calls, the one that was passed for it."""
    return parameter.value if isinstance(parameter, keras.Variable) else parameter


def _fits(parameter: Any, shape: tuple[int, ...]) -> bool:
    return parameter is None or (_is_plain(parameter) and parameter.shape == shape)


# The `call` of layers.


def _or_their_own(compute: Callable[..., Array | None]) -> Callable[..., Any]:
    """Return a `call` that computes, or runs the `call` of the layer's class."""

    @functools.wraps(compute)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if in_symbolic_scope():  # Keras asks for the shape, with memory that nobody has written to
            with np.errstate(all="ignore"):
                return type(self).call(self, *args, **kwargs)
        y = compute(self, *args, **kwargs)
        return type(self).call(self, *args, **kwargs) if y is None else y

    return call


@_or_their_own
def _call_batch_normalization(
    self: Any, inputs: Any, training: Any = None, mask: Any = None
) -> Array | None:
    gamma = _value(self.gamma) if self.scale else None
    beta = _value(self.beta) if self.center else None
    mean, variance = _value(self.moving_mean), _value(self.moving_variance)
    if not (training and self.trainable):
        if mask is not None and len(mask.shape) != len(inputs.shape) - 1:
            return None  # for Keras to refuse
        y = _batch_normalization(inputs, mean, variance, self.axis, beta, gamma, self.epsilon)
        return None if y is None else y.astype(self.compute_dtype, copy=False)
    if mask is not None or getattr(self, "renorm", False) or not self.epsilon > 0:
        return None
    if not _is_plain(inputs) or inputs.ndim < 2:
        return None
    # Copies, because `assign` says where they go: in stateless calls, not into the variables.
    mean, variance = np.array(mean), np.array(variance)
    y = bnfast.batch_norm(
        *(inputs, mean, variance, gamma, beta, True),
        momentum=KERAS.weight_of_new_batch(self.momentum),
        eps=self.epsilon,
        axis=self.axis,
        unbiased=KERAS.unbiased,
        out=np.empty_like(inputs),
    )
    self.moving_mean.assign(mean)
    self.moving_variance.assign(variance)
    return y.astype(self.compute_dtype, copy=False)


@_or_their_own
def _call_layer_normalization(self: Any, inputs: Any) -> Array | None:
    y = _layer_normalization(
        inputs, self.gamma, self.beta, self.axis, self.epsilon, self.rms_scaling
    )
    return None if y is None else y.astype(self.compute_dtype, copy=False)


@_or_their_own
def _call_group_normalization(self: Any, inputs: Any) -> Array | None:
    if not _is_plain(inputs) or inputs.ndim < 2 or self.axis % inputs.ndim == 0:
        return None
    gamma = _value(self.gamma) if self.scale else None
    beta = _value(self.beta) if self.center else None
    y = bnfast.group_norm(
        *(inputs, self.groups, gamma, beta, self.epsilon), axis=self.axis, out=np.empty_like(inputs)
    )
    return y.astype(self.compute_dtype, copy=False)


@_or_their_own
def _call_rms_normalization(self: Any, x: Any) -> Array | None:
    return _rms_normalization(x, self.scale, self.axis, self.epsilon)


@_or_their_own
def _call_unit_normalization(self: Any, inputs: Any) -> Array | None:
    return _normalize(inputs, self.axis, 2, 1e-12)  # the shortest norm that Keras divides by


_CALLS: dict[type, Callable[..., Any]] = {
    keras.layers.BatchNormalization: _call_batch_normalization,
    keras.layers.LayerNormalization: _call_layer_normalization,
    keras.layers.GroupNormalization: _call_group_normalization,
    keras.layers.RMSNormalization: _call_rms_normalization,
    keras.layers.UnitNormalization: _call_unit_normalization,
}
_NORMALIZATIONS = (*_CALLS, keras.layers.SpectralNormalization)


def _reason_to_leave(layer: Any) -> str:
    """Return why bnfast does not compute a layer; nothing where it does."""
    if isinstance(layer, keras.layers.SpectralNormalization):
        return "its matrix products are left to NumPy"
    if type(layer) not in _CALLS:
        return "its class is not Keras's own, and may compute something else"
    if "call" in vars(layer) and not _is_swapped(layer):
        return "its call was replaced before"
    if layer.compute_dtype not in ("float32", "float64"):
        return f"it computes in {layer.compute_dtype} (dtype policy {layer.dtype_policy.name!r})"
    if getattr(layer, "synchronized", False):
        return "synchronized=True, which Keras has with TensorFlow alone"
    return ""
