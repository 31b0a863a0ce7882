"""A layer of another framework, read by the names of its attributes; no framework is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from bnfast import _validation
from bnfast._conventions import KERAS, PYTORCH, LayerClasses
from bnfast._scalars import describe
from bnfast._typing import Array
from bnfast.layers._layer import Layer

AnyLayer = TypeVar("AnyLayer", bound=Layer)

_ABSENT = object()
_WEIGHT, _BIAS = "weight", "bias"


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
        self._parameters = {_WEIGHT: convention.weight, _BIAS: convention.bias}
        if ours == "RMSNorm":
            self._parameters = {_WEIGHT: kinds.rms_weight}
        self._running = {"running_mean": convention.mean, "running_var": convention.var}

    def _refuse_other_classes(self) -> None:
        """Refuse a layer of the framework, or of bnfast, that may compute something else."""
        kinds, classes = self._kinds, type(self._value).__mro__
        packages = {"bnfast", *(home.partition(".")[0] for home in kinds.homes)}
        if not any(c.__module__.partition(".")[0] in packages for c in classes):
            return  # an object with the same attributes
        theirs = [c for c in classes if c.__module__.startswith(kinds.homes)]
        wanted = kinds.classes[self._ours]
        own = next((c for c in theirs if c.__name__ in wanted), None)
        takers = [
            f"{ours}.{kinds.taken_by}"
            for ours, names in kinds.classes.items()
            if any(c.__name__ in names for c in theirs)
        ]
        why = f", for {' or '.join(takers)}" if takers else ""
        if own is not None:
            of_class = next(c for c in classes if kinds.method in vars(c))
            computes = vars(self._value).get(kinds.method, of_class)
            is_theirs = computes is of_class and issubclass(own, of_class)
            # What bnfast.integrations makes of a class or an object computes the same.
            is_ours = str(getattr(computes, "__module__", "")).startswith("bnfast.")
            if is_theirs or is_ours:
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
                f"got {describe(self._value)}, which has no {name}{self._instead()}"
            )
        return value

    def _instead(self) -> str:
        """Return where arrays without their layer belong."""
        if isinstance(self._value, Mapping):
            return "; a state goes into a layer by load_state_dict"
        takes_weights = self.convention is KERAS and self._ours == "BatchNorm"
        if takes_weights and isinstance(self._value, (list, tuple)):
            return "; weights alone are from_keras(*weights)"
        return ""

    def size(self, name: str) -> int:
        """Return an attribute that is a number of channels or groups."""
        return _validation.size(self.called(name), self.read(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return an attribute that is the sizes of axes."""
        return _validation.sizes(self.called(name), self.read(name))

    @property
    def eps(self) -> Any:
        """What is added to the variance; None as PyTorch means it, not as Keras does."""
        eps = self.read(self._kinds.eps)
        if eps is None and self.convention is PYTORCH:
            return None
        return _validation.real(self.called(self._kinds.eps), eps)

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
        return self.read(self._running["running_mean"]) is not None

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
        name = self._running["running_mean"]
        mean = _validation.floats_to_copy(self.called(name), self.read(name))
        if mean.ndim != 1:
            raise ValueError(f"{self.called(name)} must have 1 dimension, got shape {mean.shape}")
        return len(mean)

    def groups(self) -> tuple[int, int, int]:
        """Return how many groups and channels a group normalization of Keras has, and its axis."""
        axis = self.axis()
        (channels,) = self.sizes((axis,))
        groups = _validation.integer(self.called("groups"), self.read("groups"))
        return channels if groups == -1 else groups, channels, axis

    def rows(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the sizes and the numbers of the axes that Keras normalizes."""
        name = self.called("axis")
        axes = tuple(sorted(_validation.integers(name, self.read("axis"))))
        if not axes:
            raise ValueError(f"{name} must have at least one axis, got none")
        if axes[0] < 0 <= axes[-1]:
            raise ValueError(
                f"{name} must count all axes from the first one, or all from the last, got {axes}"
            )
        return self.sizes(axes), axes

    def refuse_other_than_last(self, axes: tuple[int, ...]) -> None:
        """Refuse axes with others behind them: with the last ones Keras aligns an RMS weight."""
        ndim = 0 if axes[0] < 0 else len(self.input_shape() or ())
        if axes != tuple(range(ndim - len(axes), ndim)):
            raise ValueError(
                f"{self.called('axis')} must name the last axes of the input, counted from the end "
                f"unless the layer says what it was built for: Keras multiplies the last axes by "
                f"{self._parameters[_WEIGHT]}, whichever it normalizes, got {axes}"
            )

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of axes of the input that Keras has a parameter for."""
        for name in self._parameters.values():
            parameter = self.read(name, None)
            if parameter is not None:
                sizes = _validation.floats_to_copy(self.called(name), parameter).shape
                if len(sizes) != len(axes):
                    raise ValueError(
                        f"{self.called(name)} must have a dimension for each of the axes "
                        f"{list(axes)}, got shape {sizes}"
                    )
                return sizes
        shape = self.input_shape()
        if shape is None or any(shape[axis] is None for axis in axes):
            raise ValueError(
                f"{self._argument} must have a {' or a '.join(self._parameters.values())}, or be "
                f"built for known sizes of the axes {list(axes)}: nothing else says these"
            )
        return tuple(shape[axis] for axis in axes)

    def input_shape(self) -> Any:
        """Return the shape that a Keras layer was built for, or None where it does not say."""
        config = self.read("get_build_config", None)
        return (config() or {}).get("input_shape") if callable(config) else None

    def arrays(self, shape: tuple[int, ...], *, tracked: bool = False) -> dict[str, Array | None]:
        """Return copies of the parameters, and of the running statistics if they are `tracked`."""
        parameters = {name: self.read(theirs) for name, theirs in self._parameters.items()}
        copies = {
            name: None if value is None else self._copy(self._parameters[name], value, shape)
            for name, value in parameters.items()
        }
        running = self._running if tracked else {}
        return copies | {
            name: self._copy(theirs, self.read(theirs), shape) for name, theirs in running.items()
        }

    def _copy(self, name: str, value: object, shape: tuple[int, ...]) -> Array:
        return _validation.state(self.called(name), value, shape).copy()

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


def _affine_and_dtype(arrays: dict[str, Array | None]) -> tuple[bool, DTypeLike]:
    """Return whether there are parameters; and float64 if an array is of it, or else float32."""
    dtypes = [a.dtype for a in arrays.values() if a is not None]
    has_parameters = any(arrays.get(name) is not None for name in (_WEIGHT, _BIAS))
    return has_parameters, np.result_type(np.float32, *dtypes)


def of_channels(
    make: Callable[..., AnyLayer],
    source: FrameworkLayer,
    num_features: int,
    axis: int,
    *,
    tracked: bool = False,
    **others: Any,
) -> AnyLayer:
    """Return a layer of channels, with the running statistics of the source if they are `tracked`.

    `others` are arguments of the layer besides.
    """
    arrays = source.arrays((num_features,), tracked=tracked)
    affine, dtype = _affine_and_dtype(arrays)
    layer = make(
        num_features,
        source.eps,
        affine=affine,
        track_running_stats=tracked,
        axis=axis,
        dtype=dtype,
        **others,
    )
    return source.fill(layer, arrays)


def of_groups(
    make: Callable[..., AnyLayer],
    source: FrameworkLayer,
    num_groups: int,
    num_channels: int,
    axis: int,
) -> AnyLayer:
    """Return a layer of groups of channels."""
    arrays = source.arrays((num_channels,))
    affine, dtype = _affine_and_dtype(arrays)
    layer = make(num_groups, num_channels, source.eps, affine, axis=axis, dtype=dtype)
    return source.fill(layer, arrays)


def of_rows(
    make: Callable[..., AnyLayer],
    source: FrameworkLayer,
    shape: tuple[int, ...],
    axis: tuple[int, ...] | None,
) -> AnyLayer:
    """Return a layer of rows, which `axis` makes up: the last axes where it is None."""
    arrays = source.arrays(shape)
    affine, dtype = _affine_and_dtype(arrays)
    return source.fill(make(shape, source.eps, affine, axis=axis, dtype=dtype), arrays)
