"""What the arrays of signatures are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float = TypeVar("Float", np.float16, np.float32, np.float64)  # of an input, and so of its output
# Of any of these types, whatever the input's.
Parameter = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.float64]
Function = TypeVar("Function", bound=Callable[..., Any])  # what a decorator gives back
