"""ONNX's normalizations for its reference evaluator, computed by bnfast.

``onnx.reference.ReferenceEvaluator(model, new_ops=NORM_OPS)`` computes these operators with bnfast,
in the graph of the model and in the bodies of If, Loop and Scan. (onnx hands new operators to no
function of the model: ``onnx.inliner.inline_local_functions(model)`` makes nodes of them first.)

=========================  =======================================================================
BatchNormalization         of all opsets: inference; training, with running statistics and, up to
                           opset 13, the saved ones; ``spatial=0``; an x of one axis, as one channel
InstanceNormalization      of all opsets
LayerNormalization         with ``Mean`` and ``InvStdDev``; ``Scale`` and ``B`` may broadcast
GroupNormalization         a scale and a bias for each group (opset 18), or for each channel (21)
RMSNormalization           ``scale`` may broadcast, and be of another type than x
LpNormalization            p = 2; NumPy computes p = 1, in float64
MeanVarianceNormalization  over any axes
=========================  =======================================================================

float16 and bfloat16 are computed in float32 and rounded once, at the end; float64 is computed in
float64, whatever ``stash_type`` says: that decides the type of ``Mean`` and ``InvStdDev`` alone. An
epsilon of 0 counts as the smallest normal float64: a constant channel gives its bias, not NaN.

Errors are those of bnfast's functions, and name the arguments of these: `bnfast.batch_norm` calls
the scale ``weight``, the mean ``running_mean`` and the variance ``running_var``.

The formulas are ONNX's own: https://onnx.ai/onnx/operators.

>>> import numpy as np, onnx
>>> from onnx.reference import ReferenceEvaluator
>>> from bnfast.integrations.onnx import NORM_OPS
>>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["" : 9]>
... normalize (float[N, 2] x, float[2] scale, float[2] bias, float[2] mean, float[2] var)
...     => (float[N, 2] y) { y = BatchNormalization (x, scale, bias, mean, var) }''')
>>> arrays = {name: np.array([1, 4], np.float32) for name in ("scale", "bias", "mean", "var")}
>>> x = np.array([[2, 4], [1, 6]], np.float32)
>>> y, = ReferenceEvaluator(model, new_ops=NORM_OPS).run(None, {"x": x, **arrays})
>>> y.round(3)
array([[2., 4.],
       [1., 8.]], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

import bnfast
from bnfast._typing import Array

try:
    from onnx import TensorProto, helper
    from onnx.reference.op_run import OpRun
except ImportError as error:
    raise ImportError(
        "bnfast.integrations.onnx needs onnx 1.19 or newer: python -m pip install onnx"
    ) from error

__all__ = ["NORM_OPS"]

_SMALLEST = float(np.finfo(np.float64).tiny)  # in place of an epsilon of 0
_EPSILON_OF_MVN = 1e-9  # added to the deviation by the function that ONNX defines it with
_STASH_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


def _wide(array: Array) -> Array:
    """Return float32 for float16 and bfloat16, where more than one step follows before rounding."""
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def _rounded(array: Array, dtype: Any) -> Array:
    """Round to the type of an output; what leaves its range becomes infinite."""
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def _for_rows(parameter: Array, x: Array, first: int) -> Array | None:
    """Return a parameter that broadcasts to x with a value for each element of a row.

    Rows are of the axes from `first` on. None where the parameter differs between rows.
    """
    before = max(0, parameter.ndim - (x.ndim - first))
    if any(size != 1 for size in parameter.shape[:before]):
        return None
    of_rows = parameter.reshape(parameter.shape[before:])
    return np.array(np.broadcast_to(of_rows, x.shape[first:]))


def _row_axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis must be an axis of x, which has {ndim}, got {axis}")
    return axis % ndim


def _as_rows(x: Array, axes: Sequence[int]) -> tuple[Array, Callable[[Array], Array]]:
    """Return a matrix with a row for each index of the other axes, and what undoes that."""
    axes = [_row_axis(axis, x.ndim) for axis in axes]
    order = [*(d for d in range(x.ndim) if d not in axes), *axes]
    moved = x.transpose(order)
    columns = prod(x.shape[d] for d in axes)
    rows = prod(x.shape[d] for d in order[: -len(axes)])
    back = np.argsort(order)
    return moved.reshape(rows, columns), lambda y: y.reshape(moved.shape).transpose(back)


class _Norm(OpRun):  # type: ignore[misc]  # it has no types
    """An operator: the evaluator finds it by the name of its class, whatever the opset."""

    op_domain = ""

    @property
    def _opset(self) -> int:
        """The opset of the graph: defaults of attributes are those of the newest one."""
        return int(self.run_params["opsets"][self.op_domain])

    def run(self, *inputs: Any, **keywords: Any) -> tuple[Array | None, ...]:
        """Return the outputs that the node has.

        One that it leaves out has the name of inputs that other nodes leave out, and must be None.
        """
        outputs = super().run(*inputs, **keywords)
        return tuple(
            value if name else None for name, value in zip(self.output, outputs, strict=False)
        )


def is_training(opset: int, outputs: Sequence[str], training_mode: int, is_test: int) -> bool:
    """Whether a node of batch norm normalizes with the statistics of the batch."""
    if opset >= 14:
        return training_mode != 0
    return sum(map(bool, outputs)) > 1 if opset >= 7 else is_test == 0


class BatchNormalization(_Norm):
    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        mean: Array,
        var: Array,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        training_mode: int = 0,
        is_test: int = 0,
        spatial: int = 1,
        consumed_inputs: Sequence[int] = (),
    ) -> tuple[Array, ...]:
        # A single axis is that of the samples; without `spatial` all elements are channels.
        batch = x.reshape(len(x), scale.size) if x.ndim == 1 or not spatial else x
        weight, shift, old_mean, old_var = (a.ravel() for a in (scale, bias, mean, var))
        if not is_training(self._opset, self.output, training_mode, is_test):
            y = bnfast.batch_norm(batch, old_mean, old_var, weight, shift, eps=float(epsilon))
            return (y.reshape(x.shape),)
        new = old_mean.astype(np.float64), old_var.astype(np.float64)
        y, _, _ = bnfast.batch_norm_forward(
            batch,
            weight,
            shift,
            max(float(epsilon), _SMALLEST),
            running_mean=new[0],
            running_var=new[1],
            momentum=1.0,
            unbiased=False,
        )
        old_share = float(momentum)
        blended = (
            old_share * _wide(old) + (1.0 - old_share) * batch_statistic
            for old, batch_statistic in zip((old_mean, old_var), new, strict=True)
        )
        statistics = (
            _rounded(statistic.reshape(like.shape), like.dtype)
            for statistic, like in zip((*blended, *new), (mean, var, mean, var), strict=True)
        )
        return (y.reshape(x.shape), *statistics)


class InstanceNormalization(_Norm):
    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        epsilon: float = 1e-5,
        consumed_inputs: Sequence[int] = (),
    ) -> tuple[Array, ...]:
        eps = max(float(epsilon), _SMALLEST)
        return (bnfast.instance_norm(x, None, None, scale, bias, eps=eps),)


class GroupNormalization(_Norm):
    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array,
        epsilon: float = 1e-5,
        num_groups: int = 1,
        stash_type: int = 1,
    ) -> tuple[Array, ...]:
        eps, per_group = max(float(epsilon), _SMALLEST), self._opset < 21
        return (bnfast.group_norm(x, num_groups, scale, bias, eps, per_group=per_group),)


class LayerNormalization(_Norm):
    def _run(
        self,
        x: Array,
        scale: Array,
        bias: Array | None = None,
        axis: int = -1,
        epsilon: float = 1e-5,
        stash_type: int = 1,
    ) -> tuple[Array, ...]:
        if stash_type not in _STASH_TYPES:
            raise ValueError(f"stash_type must be a float type, got {stash_type}")
        first = _row_axis(axis, x.ndim)
        shape = x.shape[first:]
        eps = max(float(epsilon), _SMALLEST)
        weight = _for_rows(scale, x, first)
        shift = None if bias is None else _for_rows(bias, x, first)
        by_rows = weight is not None and (bias is None or shift is not None)
        affine = (weight, shift) if by_rows else (None, None)
        rows = x if by_rows else _wide(x)
        y, mean, invstd = bnfast.layer_norm_forward(rows, shape, *affine, eps)
        if not by_rows:
            y *= _wide(scale)
            y += 0.0 if bias is None else _wide(bias)
        kept = (*x.shape[:first], *(1 for _ in shape))
        stash = helper.tensor_dtype_to_np_dtype(stash_type)
        statistics = (_rounded(statistic.reshape(kept), stash) for statistic in (mean, invstd))
        return (_rounded(y, x.dtype), *statistics)


class RMSNormalization(_Norm):
    def _run(
        self,
        x: Array,
        scale: Array,
        axis: int = -1,
        epsilon: float = 1e-5,
        stash_type: int = 1,
    ) -> tuple[Array, ...]:
        first = _row_axis(axis, x.ndim)
        shape = x.shape[first:]
        eps = max(float(epsilon), _SMALLEST)
        rows = x.astype(np.result_type(_wide(x), _wide(scale)), copy=False)
        weight = _for_rows(scale, x, first)
        y = bnfast.rms_norm(rows, shape, weight, eps)
        if weight is None:
            y *= _wide(scale)
        return (_rounded(y, scale.dtype),)


class LpNormalization(_Norm):
    def _run(self, x: Array, axis: int = -1, p: int = 2) -> tuple[Array, ...]:
        if p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, got {p}")
        rows, undo = _as_rows(_wide(x), [axis])
        if p == 2:
            y = bnfast.weight_norm(rows, np.ones(len(rows), rows.dtype), eps=_SMALLEST)
        else:
            norm = np.abs(rows).sum(axis=1, keepdims=True, dtype=np.float64)
            y = rows / np.maximum(norm, _SMALLEST)
        return (_rounded(undo(y), x.dtype),)


class MeanVarianceNormalization(_Norm):
    def _run(self, x: Array, axes: Sequence[int] = (0, 2, 3)) -> tuple[Array, ...]:
        rows, undo = _as_rows(_wide(x), axes or range(x.ndim))
        y = bnfast.weight_standardization(rows, eps=_EPSILON_OF_MVN, eps_inside=False)
        return (_rounded(undo(y), x.dtype),)


#: The operators, for the ``new_ops`` of a ``ReferenceEvaluator``.
NORM_OPS: list[type[_Norm]] = [
    BatchNormalization,
    InstanceNormalization,
    LayerNormalization,
    GroupNormalization,
    RMSNormalization,
    LpNormalization,
    MeanVarianceNormalization,
]
