"""What the arrays of signatures are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

# The type of an input's values, and so of its output's: what is no array becomes one of float64.
if TYPE_CHECKING:
    # Type checkers know this without the package; Python has had the default since 3.13.
    from typing_extensions import TypeVar as TypeVarWithDefault

    Float = TypeVarWithDefault("Float", bound=np.floating[Any], default=np.float64)
else:
    Float = TypeVar("Float", bound=np.floating[Any])
_Float_co = TypeVar("_Float_co", bound=np.floating[Any], covariant=True)


class _SupportsArray(Protocol[_Float_co]):
    """An array, or a tensor that NumPy makes one of."""

    def __array__(self) -> NDArray[_Float_co]: ...


ArrayLikeOf = (
    _SupportsArray[Float]
    | Sequence[float]
    | Sequence[Sequence[float]]
    | Sequence[Sequence[Sequence[float]]]
    | Sequence[Sequence[Sequence[Sequence[float]]]]
)
Array = NDArray[Any]
# An attribute that a layer may be without. `| None` would make type checkers ask before each use
# whether there is one; with `| Any` they know an array's methods, and let it be None.
ArrayOrNone = NDArray[Any] | Any
Function = TypeVar("Function", bound=Callable[..., Any])  # what a decorator gives back
