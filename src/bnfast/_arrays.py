"""One argument as an array: of floats, numbers, booleans or counts, or one clear error."""

from __future__ import annotations

import importlib
import sys
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bnfast import _dtypes
from bnfast._scalars import describe, integers
from bnfast._typing import Array

# Devices whose memory NumPy reads, or that have none.
_NO_COPY = ("cpu", "meta")


def as_array(value: Any) -> Array:
    """Return the memory of an array, a tensor or a buffer as an array, or a copy of a list."""
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        return _of_bfloat16_tensor(value)
    if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
        return np.from_dlpack(value)
    return np.asarray(value)


def _of_bfloat16_tensor(tensor: Any) -> Array:
    """Return the memory of a tensor that PyTorch has no array for."""
    same_size = sys.modules[type(tensor.dtype).__module__].int16
    if tensor.requires_grad or tensor.device.type not in _NO_COPY:
        return np.asarray(tensor)  # PyTorch says why not
    try:
        bfloat16 = importlib.import_module("ml_dtypes").bfloat16
    except ImportError:
        raise TypeError("NumPy has no bfloat16 without ml_dtypes: pip install ml_dtypes") from None
    return np.asarray(tensor.view(same_size)).view(bfloat16)


def _array(name: str, value: object, wanted: str) -> Array:
    """Return an array of any type, without a copy where possible."""
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be an array without a mask (bnfast would ignore it), "
            f"got a masked {describe(value)}"
        )
    if value is None:
        raise TypeError(f"{name} must be a {wanted} array, got None")
    try:
        return as_array(value)
    except MemoryError:
        raise
    except Exception as error:
        hint = _instead(name, value, error)
        raise TypeError(f"{name} must be an array, got {describe(value)}{hint}") from error


def _instead(name: str, value: object, error: Exception) -> str:
    """Return what to write instead of a tensor that has no array, or why it has none."""
    steps = [".detach()"] * bool(getattr(value, "requires_grad", False))
    steps += [".cpu()"] * (getattr(getattr(value, "device", None), "type", "cpu") not in _NO_COPY)
    if steps:
        return f"; {name}{''.join(steps)} is one"
    reason = str(error).partition("\n")[0]
    return f": {reason}" if reason else ""


def on_the_cpu(name: str, value: object) -> object:
    """Return a tensor without its gradient, in main memory; what is no tensor, as it is."""
    try:
        for step in ("detach", "cpu"):
            method = getattr(value, step, None)
            value = method() if callable(method) else value
    except Exception as error:
        hint = _instead(name, value, error)
        raise TypeError(f"{name} must be an array, got {describe(value)}{hint}") from error
    return value


def floats_to_copy(name: str, value: object) -> Array:
    """Return floats of an array or tensor, wherever it is; those of fewer bits as float32."""
    if type(value) is np.ndarray and _dtypes.is_floating(value.dtype):
        return value
    value = on_the_cpu(name, value)
    is_bfloat16 = str(getattr(value, "dtype", "")) == "torch.bfloat16"
    return floating_array(name, cast("Any", value).float() if is_bfloat16 else value)


def data_array(name: str, value: object, *, half: bool = True) -> Array:
    """Return an array of a type that data may have, without a copy where possible.

    Where it may not be `half`, types of 16 bits are refused: what is made of them is NumPy's.
    """
    names = _dtypes.NAMES_OF_DATA if half else _dtypes.NAMES
    array = _array(name, value, names)
    dtype = array.dtype
    if not (_dtypes.is_floating(dtype) or (half and _dtypes.is_half(dtype))):
        is_number = _dtypes.is_half(dtype) or (np.can_cast(dtype, np.float64) and dtype.isnative)
        hint = f"; numpy.asarray({name}, numpy.float32) is such" if is_number else ""
        if type(value).__module__.startswith("autograd."):
            # What stands for x inside of autograd's grad.
            hint = "; bnfast.integrations.autograd has the functions that autograd differentiates"
        raise TypeError(f"{name} must be {names} in native byte order, got {describe(array)}{hint}")
    return array


def floating_array(name: str, value: object) -> Array:
    """Return parameters or statistics as float32 or float64, without a copy where possible."""
    array = data_array(name, value)
    return array.astype(np.float32) if _dtypes.is_half(array.dtype) else array


def finite_floats(name: str, value: object) -> Array:
    """Return an array of finite floats of 16 (bfloat16 too), 32 or 64 bits, in native byte order.

    For what is converted once, rather than by kernels.
    """
    array = _array(name, value, "floating-point")
    dtype = array.dtype
    if not (_dtypes.is_floating(dtype) or _dtypes.is_half(dtype)):
        raise TypeError(
            f"{name} must be {_dtypes.NAMES_OF_DATA} in native byte order, got {describe(array)}"
        )
    wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        where = tuple(wrong[0].tolist())
        raise ValueError(f"{name} must be finite, got {array[where]} at {list(where)}")
    return array


def numbers(name: str, value: object) -> Array:
    """Return an array of numbers that can be summed, without a copy where possible."""
    array = _array(name, value, "floating-point, integer or boolean")
    dtype = array.dtype
    is_float = _dtypes.is_floating(dtype) or _dtypes.is_half(dtype)
    if not (is_float or (dtype.isnative and dtype.kind in "biu")):
        hint = ""
        if dtype.kind in "fbiu":
            hint = f"; numpy.asarray({name}, numpy.{dtype.newbyteorder('=').name}) is such"
        raise TypeError(
            f"{name} must be {_dtypes.NAMES_OF_DATA.replace(' or', ',')}, integers or booleans in "
            f"native byte order, got {describe(array)}{hint}"
        )
    return array


def kept_axes(x: Array, axis: object) -> tuple[int, ...]:
    """Return axes of x, an integer or several, none of them negative, in order."""
    if x.shape == (0,):
        return (0,)  # an empty batch, as in `batch`
    wanted = f"from {-x.ndim} to {x.ndim - 1}" if x.ndim else "None"
    axes = integers("axis", axis)
    if any(not -x.ndim <= d < x.ndim for d in axes):
        hint = "; axis=None keeps none, for one value of the whole array" if x.ndim < 2 else ""
        raise ValueError(f"axis must be {wanted} for x of shape {x.shape}, got {axis}{hint}")
    kept = sorted(d % x.ndim for d in axes)
    if len(set(kept)) != len(kept):
        raise ValueError(f"axis must not name an axis twice, got {axis}")
    return tuple(kept)


def integers_of_samples(name: str, value: object, samples: int) -> NDArray[Any]:
    """Return an array (N,) of integers, one for each sample, without a copy where possible."""
    wanted = f"{name} must be integers, one for each of the {samples} samples, shape ({samples},)"
    try:
        array: NDArray[Any] = as_array(value)
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(f"{wanted}, got {describe(value)}") from error
    if isinstance(value, np.ma.MaskedArray) or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{wanted}, got {describe(value)}")
    if array.shape != (samples,):
        raise ValueError(f"{wanted}, got {describe(array)}")
    return array


def booleans(name: str, value: object) -> Array:
    """Return a boolean array, without a copy where possible."""
    array = _array(name, value, "boolean")
    if array.dtype != bool:
        raise TypeError(f"{name} must be a boolean array, got {describe(array)}")
    return array


def mask(name: str, value: object, x: Array) -> Array:
    """Return a boolean array of the shape of x."""
    array = booleans(name, value)
    try:
        return np.broadcast_to(array, x.shape)
    except ValueError:
        raise ValueError(
            f"{name} must broadcast to x, of shape {x.shape}, got shape {array.shape}"
        ) from None


def of_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape."""
    if array.shape != shape:
        raise ValueError(f"{name} must have the shape {shape}, got {describe(array)}")


def statistics(name: str, value: object, shape: tuple[int, ...] | None = None) -> Array:
    """Return a copy of float64 statistics, of this shape if any."""
    array = np.array(floating_array(name, value), np.float64)
    if shape is not None:
        of_shape(name, array, shape)
    return array


def counts(name: str, value: object, shape: tuple[int, ...], most: int) -> NDArray[np.int64]:
    """Return a copy of how many values there are: one number, or of this shape."""
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an integer or an array of integers, got {describe(value)}")
    if array.shape not in ((), shape):
        raise ValueError(f"{name} must be an integer or of shape {shape}, got {describe(array)}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= most:
        raise ValueError(f"{name} must be from 0 to {most}, got {array}")
    return array.astype(np.int64)
