"""A layer of another framework, read by the names of its attributes; no framework is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from bnfast import _validation
from bnfast._conventions import PYTORCH, LayerClasses
from bnfast._scalars import describe
from bnfast._typing import Array
from bnfast.layers._layer import Layer

AnyLayer = TypeVar("AnyLayer", bound=Layer)

_ABSENT = object()
_AFFINE = "weight", "bias"
_RUNNING = "running_mean", "running_var"


class FrameworkLayer:
    """What bnfast reads of a layer of a framework, or of any object with the same attributes.

    Parameters
    ----------
    argument : str
        What the layer is called in messages; empty where its attributes are arguments themselves.
    value : object
        The layer.
    kinds : LayerClasses
        Those of the framework.
    ours : str
        The layer of bnfast that is made of it.

    Raises
    ------
    TypeError
        If it is another layer, or computes something else than the framework's own.
    ValueError
        If it has no parameters yet.
    """

    def __init__(self, argument: str, value: object, kinds: LayerClasses, ours: str) -> None:
        self._argument, self._value, self._kinds, self._ours = argument, value, kinds, ours
        is_lazy = getattr(value, "has_uninitialized_params", None)
        if (callable(is_lazy) and is_lazy()) or getattr(value, "built", True) is False:
            raise ValueError(
                f"{argument} must have its parameters, got {self._described()}, which has none "
                "yet: call it on a batch first"
            )
        self._refuse_other_classes()
        self.convention = convention = kinds.convention
        weight = kinds.rms_weight if ours == "RMSNorm" else convention.weight
        self._names = {
            "weight": weight,
            "bias": convention.bias,
            "running_mean": convention.mean,
            "running_var": convention.var,
        }

    def _refuse_other_classes(self) -> None:
        """Refuse a layer of the framework, or of bnfast, that may compute something else."""
        kinds, classes = self._kinds, type(self._value).__mro__
        packages = {"bnfast", *(home.partition(".")[0] for home in kinds.homes)}
        if not any(c.__module__.partition(".")[0] in packages for c in classes):
            return  # an object with the same attributes
        wanted = kinds.classes[self._ours]
        own = next(
            (c for c in classes if c.__name__ in wanted and c.__module__.startswith(kinds.homes)),
            None,
        )
        why = ""
        if own is not None:
            computes = next(c for c in classes if kinds.method in vars(c))
            # What bnfast.integrations makes of a class computes the same.
            if issubclass(own, computes) or computes.__module__.startswith("bnfast."):
                return
            why = f", which has a {kinds.method} of its own and may compute something else"
        raise TypeError(f"{self._argument} must be {self._wanted()}, got {self._described()}{why}")

    def _wanted(self) -> str:
        *others, last = self._kinds.classes[self._ours]
        names = f"{', '.join(others)} or {last}" if others else last
        return f"a {names} of {self._kinds.framework}"

    def _described(self) -> str:
        cls = type(self._value)
        return f"an instance of {cls.__module__}.{cls.__qualname__}"

    def called(self, name: str) -> str:
        """Return what messages call an attribute."""
        return f"{self._argument}.{name}" if self._argument else name

    def read(self, name: str, default: object = _ABSENT) -> Any:
        """Return an attribute, which must exist unless there is a default."""
        value = getattr(self._value, name, default)
        if value is _ABSENT:
            raise TypeError(
                f"{self._argument} must be {self._wanted()}, or have the same attributes, "
                f"got {describe(self._value)}, which has no {name}"
            )
        return value

    def size(self, name: str) -> int:
        """Return an attribute that is a number of channels or groups."""
        return _validation.size(self.called(name), self.read(name))

    @property
    def eps(self) -> Any:
        """What is added to the variance."""
        return self.read(self._kinds.eps)

    @property
    def momentum(self) -> float | None:
        """The weight of the new batch in the running statistics; None for what None means."""
        momentum = self.read("momentum")
        if momentum is None and self.convention is PYTORCH:
            return None
        share = _validation.share(self.called("momentum"), momentum)
        return self.convention.weight_of_new_batch(share)

    def has_running_statistics(self) -> bool:
        """Return whether the layer has running statistics, tracked or not."""
        return self.read(self._names["running_mean"]) is not None

    def tracks(self) -> bool:
        """Return whether training updates the running statistics."""
        if self.convention is not PYTORCH:
            return True
        name = "track_running_stats"
        return _validation.flag(self.called(name), self.read(name))

    def axis(self) -> int:
        """Return the one axis of the channels, which may be in a list."""
        axis = self.read("axis")
        axes = _validation.integers(self.called("axis"), axis)
        if len(axes) != 1:
            raise ValueError(
                f"{self.called('axis')} must be one integer, or a list of one, got {axis}"
            )
        return axes[0]

    def channels(self) -> int:
        """Return how many channels the running statistics have."""
        name = self._names["running_mean"]
        mean = _validation.floats_to_copy(self.called(name), self.read(name))
        if mean.ndim != 1:
            raise ValueError(f"{self.called(name)} must have 1 dimension, got shape {mean.shape}")
        return len(mean)

    def rows(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the sizes and the numbers of the axes that Keras normalizes."""
        name = self.called("axis")
        axes = tuple(sorted(_validation.integers(name, self.read("axis"))))
        if axes[0] < 0 <= axes[-1]:
            raise ValueError(
                f"{name} must count all axes from the first one, or all from the last, got {axes}"
            )
        return self.sizes(axes), axes

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of axes of the input that Keras has a parameter for."""
        for name in _AFFINE:
            parameter = self.read(self._names[name], None)
            if parameter is not None:
                return tuple(parameter.shape)
        shape = self.input_shape()
        if shape is None or any(shape[axis] is None for axis in axes):
            raise ValueError(
                f"{self._argument} must have a {self._names['weight']} or a {self._names['bias']}, "
                f"or be built for known sizes of the axes {list(axes)}: nothing else says these"
            )
        return tuple(shape[axis] for axis in axes)

    def input_shape(self) -> Any:
        """Return the shape that a Keras layer was built for, or None where it does not say."""
        config = self.read("get_build_config", None)
        return (config() or {}).get("input_shape") if callable(config) else None

    def arrays(
        self, shape: tuple[int, ...], *, tracked: bool = False, has_bias: bool = True
    ) -> dict[str, Array | None]:
        """Return copies of the parameters, and of the running statistics that are `tracked`."""
        names = _AFFINE if has_bias else _AFFINE[:1]
        values = {name: self.read(self._names[name]) for name in names}
        if tracked:
            values |= {name: self.read(self._names[name]) for name in _RUNNING}
        return {
            name: self._copy(name, value, shape) if value is not None or name in _RUNNING else None
            for name, value in values.items()
        }

    def _copy(self, name: str, value: object, shape: tuple[int, ...]) -> Array:
        return _validation.state(self.called(self._names[name]), value, shape).copy()

    def fill(self, layer: AnyLayer, arrays: dict[str, Array | None]) -> AnyLayer:
        """Give a layer these arrays, the number of batches and the mode; return it."""
        for name, array in arrays.items():
            dtype = layer.dtype  # type: ignore[attr-defined]
            setattr(layer, name, None if array is None else array.astype(dtype, copy=False))
        counter = self.convention.counter
        count = self.read(counter, None) if counter else None
        if layer.num_batches_tracked is not None and count is not None:
            layer.num_batches_tracked = _validation.counter(self.called(counter), count)
        if self.convention is PYTORCH:
            layer.train(_validation.flag(self.called("training"), self.read("training")))
        return layer


def dtype_of(arrays: dict[str, Array | None]) -> DTypeLike:
    """Return float64 if an array is of it, or else float32."""
    return np.result_type(np.float32, *(a.dtype for a in arrays.values() if a is not None))


def has_affine(arrays: dict[str, Array | None]) -> bool:
    """Return whether there is a weight or a bias."""
    return any(arrays.get(name) is not None for name in _AFFINE)
