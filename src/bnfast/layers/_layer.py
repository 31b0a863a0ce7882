"""What every layer has: a call and its backward, gradients of parameters, two modes, a state."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnfast import _validation
from bnfast._conventions import PYTORCH
from bnfast._float_mode import in_default_float_mode
from bnfast._typing import Array, ArrayLikeOf, ArrayOrNone, Float

AnyTrainable = TypeVar("AnyTrainable", bound="Trainable")
Gradients = tuple[Any, ...]  # of the input, and of each parameter: an array or None

_COUNTER = PYTORCH.counter

# Why `backward` has nothing to work with, where that is so.
NONE_YET = "there has been none"
_DONE = "the last one has had its backward"
IN_PLACE = "the last call wrote over its input"
_RELEASED = "what the last one kept has been released"


def _prefixes_that_fit(state: Mapping[Any, Any], own: Mapping[str, Array]) -> str:
    """Return, for a message, where in the state of a whole model such arrays are, if anywhere."""

    def fits(prefix: str) -> bool:
        others = (getattr(state.get(f"{prefix}{name}"), "shape", None) for name in own)
        return all(
            theirs == array.shape for theirs, array in zip(others, own.values(), strict=True)
        )

    last = f".{list(own)[-1]}" if own else "?"
    found = [name[: 1 - len(last)] for name in map(str, state) if name.endswith(last)]
    fitting = [repr(prefix) for prefix in found if fits(prefix)]
    return f"; of a whole model, prefix={' or '.join(fitting[:3])}" if fitting else ""


class Flag:
    """An attribute that is True or False, and nothing else.

    A fixed one has decided which arrays a layer has, and keeps its value.
    """

    # Without __get__, an attribute is read from the instance, as fast as any other.
    def __init__(self, *, fixed: bool = False) -> None:
        self._fixed = fixed

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, instance: object, value: object) -> None:
        checked, attributes = _validation.flag(self._name, value), instance.__dict__
        if self._fixed and attributes.get(self._name, checked) != checked:
            raise AttributeError(
                f"{self._name} cannot be changed: a layer has its arrays from when it was made"
            )
        attributes[self._name] = checked

    if TYPE_CHECKING:

        def __get__(self, instance: object, owner: type) -> bool: ...


class Trainable(ABC):
    """What is called, and then its `backward`: a normalization of data, or of weights.

    Attributes
    ----------
    num_batches_tracked : int or None
        How many batches its statistics have seen; None where it has none.
    training : bool
        True at first.
    """

    num_batches_tracked: int | None = None
    training = Flag()

    _parameters: tuple[str, ...] = ()  # attributes with a gradient, `<name>_grad`
    _arrays: ClassVar[Mapping[str, str]] = {}  # of the state: PyTorch's names of the attributes
    _may_be_missing: ClassVar[tuple[str, ...]] = ()  # from a state that is loaded
    _shown: ClassVar[tuple[str, ...]] = ()  # attributes of the repr, by the names of the arguments
    _shown_if_not: ClassVar[Mapping[str, Any]] = {}  # ... and those shown unless they are these

    # Whether the statistics were recalibrated, and nothing is left of what they began as.
    _made_of_data = False

    # Of the last call: what makes its gradients, x, and its other arguments. Or why there is none.
    _saved: tuple[Any, ...] | str = NONE_YET

    def __new__(cls: type[AnyTrainable], *_: Any, **__: Any) -> AnyTrainable:
        layer = super().__new__(cls)
        layer.training = True
        return layer

    def train(self: AnyTrainable, mode: bool = True) -> AnyTrainable:
        """Put the layer in training mode, as it is at first; return the layer itself.

        In this mode a call updates what the layer keeps of the data: running statistics, or the
        singular vectors of spectral norm. Layer, RMS, group and filter response norm, weight norm
        and weight standardization keep nothing, and compute the same in both modes.

        Parameters
        ----------
        mode : bool
            False is `eval`.

        Returns
        -------
        Layer

        Examples
        --------
        >>> import bnfast
        >>> bnfast.BatchNorm(3).train().training
        True
        """
        self.training = _validation.flag("mode", mode)
        return self

    def eval(self: AnyTrainable) -> AnyTrainable:
        """Put the layer in evaluation mode; return the layer itself.

        In this mode a call uses what the layer keeps of the data, running statistics or the
        singular vectors of spectral norm, and leaves that as it is. Where nothing is kept, both
        modes compute the same, unless the class says otherwise.

        Returns
        -------
        Layer

        Examples
        --------
        >>> import bnfast
        >>> bnfast.BatchNorm(3).eval().training
        False
        """
        return self.train(False)

    def _save(
        self, x: Array, out: Array | None, *more: Any, by: Callable[..., Gradients] | None = None
    ) -> None:
        """Keep what `_gradients` takes, or a function of the class that stands in for it."""
        # x is not copied; where it was overwritten, there can be no backward.
        overwritten = out is not None and _validation.shares_memory(x, out)
        self._saved = IN_PLACE if overwritten else (by, x, *more)

    @abstractmethod
    def _gradients(self, dy: Any, out: Array | None, x: Array, *saved: Any) -> Gradients:
        """Return the gradients of the input and of the parameters from what was saved."""

    @in_default_float_mode
    def backward(
        self, dy: ArrayLikeOf[Float], *, out: NDArray[Float] | None = None
    ) -> NDArray[Float]:
        """Return the gradient of the last input, and set those of parameters, as ``<name>_grad``.

        Parameters
        ----------
        dy : array like the last output
            The gradient of the output.
        out : array like `dy`, optional
            Where to write: `dy` itself will do.

        Returns
        -------
        array like `dy`

        Raises
        ------
        RuntimeError
            If no call came before, or its input was overwritten, or used by another `backward`.
        TypeError, ValueError
            If `dy` has not the shape and dtype of the output.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> layer = bnfast.BatchNorm(1)
        >>> y = layer(np.arange(8.0, dtype=np.float32).reshape(8, 1))
        >>> dx = layer.backward(np.ones_like(y))
        >>> bool(np.abs(dx).max() < 1e-6)
        True
        >>> layer.bias_grad
        array([8.], dtype=float32)
        """
        if isinstance(self._saved, str):
            raise RuntimeError(
                f"backward needs a call of the layer before it, not in place: {self._saved}"
            )
        by, *saved = self._saved
        if by is None:
            gradients = self._gradients(dy, out, *saved)
        else:
            gradients = by(self, dy, out, *saved)
        dx: Array = gradients[0]
        # A call may have had no use for the last ones.
        for name in self._parameters[len(gradients) - 1 :]:
            setattr(self, f"{name}_grad", np.zeros_like(getattr(self, name)))
        for name, gradient in zip(self._parameters, gradients[1:], strict=False):
            parameter = getattr(self, name)
            kept = None
            if parameter is not None and gradient is not None:
                with np.errstate(all="ignore"):  # where no other parameter said the dtype
                    kept = gradient.astype(parameter.dtype, copy=False)
            setattr(self, f"{name}_grad", kept)
        self._saved = _DONE
        return dx

    def release(self) -> None:
        """Let go of the arrays that the last call kept for `backward`.

        For checkpointed training, whose first pass keeps nothing: the call is made once more before
        its `backward`, with ``recompute=True`` where the layer takes it.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> layer, x = bnfast.BatchNorm(1), np.arange(8.0, dtype=np.float32).reshape(8, 1)
        >>> y = layer(x)
        >>> layer.release()  # layer keeps neither x nor y alive
        >>> y = layer(x, recompute=True)
        >>> dx = layer.backward(np.ones_like(y))
        """
        self._saved = _RELEASED

    def _state(self) -> dict[str, Array]:
        """Return the arrays that the layer has, by PyTorch's names."""
        arrays = {name: getattr(self, attribute) for name, attribute in self._arrays.items()}
        return {name: array for name, array in arrays.items() if array is not None}

    def state_dict(self, *, prefix: str = "") -> dict[str, Array]:
        """Return copies of parameters and statistics, with PyTorch's names and dtypes.

        Parameters
        ----------
        prefix : str
            With which all names begin, as in the state of a whole model: ``"layer1.0.bn1."``.

        Returns
        -------
        dict of str to array
            ``weight``, ``bias``, ``running_mean``, ``running_var`` and ``num_batches_tracked``
            (int64, 0-d), or what else the class says; those that the layer has not are left out.

        Examples
        --------
        PyTorch wants tensors: ``{name: torch.as_tensor(array) for name, array in state.items()}``.

        >>> import bnfast
        >>> list(bnfast.BatchNorm(3).state_dict())
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
        """
        before = _validation.text("prefix", prefix)
        state = {f"{before}{name}": array.copy() for name, array in self._state().items()}
        if self.num_batches_tracked is not None:
            state[f"{before}{_COUNTER}"] = np.array(self.num_batches_tracked, np.int64)
        return state

    @in_default_float_mode
    def load_state_dict(self, state_dict: Mapping[str, ArrayLike], *, prefix: str = "") -> None:
        """Take parameters and statistics from `state_dict`, in place.

        Parameters
        ----------
        state_dict : mapping of str to array
            As `state_dict` returns it; PyTorch's tensors will do. As in PyTorch,
            ``num_batches_tracked`` may be missing, and is then left as it is; so may
            ``momentum_logit``, which PyTorch has not. It has no eps, momentum or axis:
            ``from_torch`` and ``from_keras`` take these from the layer of the framework.
        prefix : str
            With which the names of this layer begin in the state of a whole model, the last dot
            included: ``"layer1.0.bn1."``. Names that begin otherwise are others' and are left out.

        Raises
        ------
        TypeError, ValueError
            If a name is missing or unexpected, or an array is of integers or has the wrong shape;
            the layer is left as it was. Floats, of 16 bits (float16, bfloat16) as well, are rounded
            to the layer's dtype.

        Examples
        --------
        >>> import bnfast
        >>> layer, other = bnfast.BatchNorm(3), bnfast.BatchNorm(3)
        >>> layer.load_state_dict(other.state_dict())
        >>> model = {"fc.weight": [[1.0]], **other.state_dict(prefix="bn1.")}
        >>> layer.load_state_dict(model, prefix="bn1.")
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must map names to arrays, got {type(state_dict).__name__}")
        _validation.text("prefix", prefix)
        own = {f"{prefix}{name}": array for name, array in self._state().items()}
        counter = f"{prefix}{_COUNTER}"
        names = [*own] if self.num_batches_tracked is None else [*own, counter]
        optional = {f"{prefix}{name}" for name in self._may_be_missing}
        given = [name for name in state_dict if not prefix or str(name).startswith(prefix)]
        missing = [name for name in own if name not in state_dict and name not in optional]
        unexpected = [name for name in given if name not in names]
        if missing or unexpected:
            wrong = [f"missing {missing}"] * bool(missing)
            wrong += [f"unexpected {reprlib.repr(unexpected)}"] * bool(unexpected)
            needed = {n: a for n, a in self._state().items() if n not in self._may_be_missing}
            raise ValueError(
                f"state_dict must have the names {names}: {', '.join(wrong)}"
                f"{_prefixes_that_fit(state_dict, needed)}"
            )
        new = {
            name: _validation.state(name, state_dict[name], array.shape).astype(array.dtype)
            for name, array in own.items()
            if name in state_dict
        }
        tracked = self.num_batches_tracked
        if counter in state_dict:
            tracked = _validation.counter(counter, state_dict[counter])
        for name, array in new.items():
            own[name][...] = array
        self.num_batches_tracked = tracked
        self._made_of_data = False  # as far as a state says

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_saved": NONE_YET}

    def __repr__(self) -> str:
        first, *others = self._shown
        unusual = self._shown_if_not.items()
        names = [*others, *(name for name, usual in unusual if getattr(self, name) != usual)]
        shown = [
            str(getattr(self, first)),
            *[f"{name}={self._shown_value(name)}" for name in names],
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _shown_value(self, name: str) -> object:
        return getattr(self, name)


class Layer(Trainable):
    """A layer of data: call it, and then its `backward`.

    Attributes
    ----------
    weight, bias, running_mean, running_var : array or None
        What the layer has of them.
    num_batches_tracked : int or None
        How many batches the running statistics have seen.
    weight_grad, bias_grad : array or None
        Of the last `backward`.
    training : bool
        True at first.
    """

    weight: ArrayOrNone = None
    bias: ArrayOrNone = None
    running_mean: ArrayOrNone = None
    running_var: ArrayOrNone = None
    weight_grad: ArrayOrNone = None
    bias_grad: ArrayOrNone = None

    _parameters: tuple[str, ...] = ("weight", "bias")
    _arrays: ClassVar[Mapping[str, str]] = {
        PYTORCH.weight: "weight",
        PYTORCH.bias: "bias",
        PYTORCH.mean: "running_mean",
        PYTORCH.var: "running_var",
    }

    @abstractmethod
    def __call__(
        self, x: ArrayLikeOf[Float], *, out: NDArray[Float] | None = None
    ) -> NDArray[Float]:
        """Normalize a batch."""

    def _first_statistics(self) -> dict[str, Array | float]:
        """Return what running statistics begin as."""
        return {"running_mean": 0.0, "running_var": 1.0}

    @in_default_float_mode
    def reset_running_stats(self) -> None:
        """Forget all batches: the running statistics that the layer has are as at first.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> layer = bnfast.BatchNorm(1)
        >>> y = layer(np.arange(8.0, dtype=np.float32).reshape(8, 1))
        >>> layer.reset_running_stats()
        >>> layer.running_mean, layer.running_var, layer.num_batches_tracked
        (array([0.], dtype=float32), array([1.], dtype=float32), 0)
        """
        for name, first in self._first_statistics().items():
            statistic = getattr(self, name)
            if statistic is not None:
                statistic[...] = first
        self._made_of_data = False
        if self.num_batches_tracked is not None:
            self.num_batches_tracked = 0

    def _kept_weight(self) -> Array | None:
        """Return the weight as it is now: it may change before backward comes."""
        return None if self.weight is None else self.weight.copy()
