"""thinc's LayerNorm, computed by bnfast."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

import bnfast
from bnfast._scalars import describe
from bnfast.integrations._report import Entry, Report

try:
    from thinc.api import Model, NumpyOps
    from thinc.layers import layernorm
except ImportError as error:
    raise ImportError(
        "bnfast.integrations.thinc needs thinc: python -m pip install thinc"
    ) from error

__all__ = ["Entry", "Report", "accelerate", "restore"]

_NAME = "layernorm"  # of the nodes that LayerNorm makes
_EPS = 1e-8  # what thinc adds to the variance


def accelerate(model: Any) -> Report:
    """Let bnfast compute the layer normalizations of a thinc model, from now on.

    The nodes stay the objects that they are, with their parameters, names and attributes: the
    forward function of each is replaced, and nothing else. ``to_bytes`` and the like write what
    they wrote before, and a model that loads it is thinc's until it is accelerated itself;
    ``copy`` makes an accelerated copy. `restore` takes it back.

    Parameters
    ----------
    model : thinc.api.Model
        Initialized or not; all nodes that ``model.walk()`` finds.

    Returns
    -------
    Report
        The nodes that were swapped, by name and id, and those that were not: with operations of a
        GPU, or with a forward function that is not thinc's.

    Raises
    ------
    TypeError
        Where `model` is no thinc model.

    Notes
    -----
    thinc's formula, forward and backward, with the parameters ``G`` and ``b``::

        Y = G * (X - mean(X)) / sqrt(var(X) + 1e-8) + b

    where mean and variance are those of a row. Arrays other than 2-d of float32 are left to thinc's
    own code.

    References
    ----------
    J. L. Ba, J. R. Kiros, G. E. Hinton, 2016, "Layer Normalization", arXiv:1607.06450.

    Examples
    --------
    >>> from thinc.api import Maxout, Softmax, chain
    >>> from bnfast.integrations.thinc import accelerate
    >>> model = chain(Maxout(16, normalize=True), Softmax(3))
    >>> print(accelerate(model))
    bnfast computes 1 of 1 normalization layers
      1 LayerNorm
    """
    _refuse_other_models(model)
    swapped, left = [], []
    for node in model.walk():
        if node._func not in (layernorm.forward, _forward) and node.name != _NAME:
            continue
        entry = Entry(f"{node.name} {node.id}", "LayerNorm", _reason_to_leave(node))
        if entry.reason:
            left.append(entry)
        else:
            node._func = _forward
            swapped.append(entry)
    return Report("thinc", tuple(swapped), tuple(left))


def restore(model: Any) -> None:
    """Let thinc compute the layer normalizations of a model again.

    Parameters
    ----------
    model : thinc.api.Model
        Changed in place.

    Raises
    ------
    TypeError
        Where `model` is no thinc model.
    """
    _refuse_other_models(model)
    for node in model.walk():
        if node._func is _forward:
            node._func = layernorm.forward


def _refuse_other_models(model: Any) -> None:
    if not isinstance(model, Model):
        raise TypeError(f"model must be a thinc model, got {describe(model)}")


def _reason_to_leave(node: Any) -> str:
    if node._func not in (layernorm.forward, _forward):
        return "its forward function is not that of thinc's LayerNorm"
    if not isinstance(node.ops, NumpyOps):
        return f"its operations are {type(node.ops).__name__}, not NumpyOps"
    return ""


def _forward(model: Any, X: Any, is_train: bool) -> tuple[Any, Callable[[Any], Any]]:
    # A model may be moved to a GPU after it was accelerated.
    if not (isinstance(X, np.ndarray) and X.dtype == np.float32 and X.ndim == 2):
        theirs: tuple[Any, Callable[[Any], Any]] = layernorm.forward(model, X, is_train)
        return theirs
    G = model.get_param("G")
    Y, mean, invstd = bnfast.layer_norm_forward(X, X.shape[1], G, model.get_param("b"), _EPS)

    def backprop(dY: Any) -> Any:
        dX, dG, db = bnfast.layer_norm_backward(
            np.asarray(dY, np.float32), X, X.shape[1], mean, invstd, G
        )
        model.inc_grad("b", db)
        model.inc_grad("G", dG)
        return dX

    return Y, backprop


# thinc validates data by the annotations of the forward function.
_forward.__signature__ = inspect.signature(layernorm.forward)  # type: ignore[attr-defined]
