"""What the arrays of signatures are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Float = TypeVar("Float", np.float32, np.float64)  # of an input, and so of its output
Parameter = NDArray[np.float32] | NDArray[np.float64]  # of either type, whatever the input's
Function = TypeVar("Function", bound=Callable[..., Any])  # what a decorator gives back
