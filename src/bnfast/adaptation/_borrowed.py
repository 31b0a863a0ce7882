"""Layers that are told to behave otherwise for a while, and then get back what was theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from bnfast._scalars import describe
from bnfast._typing import Array
from bnfast.functional import moments
from bnfast.layers import MovingAverageBatchNorm
from bnfast.layers._tracking import Averaging, ChannelLayer
from bnfast.statistics import Moments


class Borrowed:
    """A layer that tells of its batches, and whose attributes come back.

    Parameters
    ----------
    name : str
        What messages and reports call it.
    layer : Averaging
        With running statistics.
    """

    def __init__(self, name: str, layer: Averaging) -> None:
        self.name = name
        self.layer = layer
        self._kept: dict[str, Any] = {}

    def begin(self, settings: Mapping[str, Any], see: Callable[[Array], None]) -> None:
        """Take these attributes at each call, whatever users set meanwhile, and tell of each batch.

        Parameters
        ----------
        settings : mapping
            Values of attributes, whatever their own checks.
        see : callable
            Is given each batch before it is normalized.
        """
        attributes = vars(self.layer)
        names = {"training", "num_batches_tracked", "_warned", *settings, *self.layer._running}
        self._kept = {name: attributes[name] for name in names if name in attributes}

        def observe(x: Array) -> None:
            attributes.update(settings)
            see(x)

        attributes.update(settings)
        self.layer._observer = observe

    def end(self) -> None:
        """Give back what was the layer's."""
        vars(self.layer).pop("_observer", None)
        vars(self.layer).update(self._kept)
        self._kept = {}

    def own(self, name: str) -> Any:
        """Return an attribute as it was before."""
        return self._kept[name] if name in self._kept else getattr(self.layer, name)

    @property
    def statistics(self) -> tuple[Array, ...]:
        """The running statistics that are the layer's own."""
        return tuple(self.own(name) for name in self.layer._running)


def borrowed(layers: object) -> list[Borrowed]:
    """Return layers with running statistics, each once.

    Parameters
    ----------
    layers : layer, iterable of layers, or mapping of names to layers
        As the user gave them.

    Returns
    -------
    list of Borrowed

    Raises
    ------
    TypeError, ValueError
        For something else, or what has no running statistics, or nothing at all.
    RuntimeError
        For a layer that is borrowed already.
    """
    if isinstance(layers, Averaging):
        named = [(type(layers).__name__, layers)]
    elif isinstance(layers, Mapping):
        named = [(str(name), layer) for name, layer in layers.items()]
    elif isinstance(layers, Iterable):
        named = [(str(number), layer) for number, layer in enumerate(layers)]
    else:
        raise TypeError(
            f"layers must be a layer with running statistics, or several, got {describe(layers)}"
        )
    found: list[Borrowed] = []
    for name, layer in named:
        if not isinstance(layer, Averaging):
            raise TypeError(
                f"layers must have running statistics, layer {name} is {describe(layer)}"
            )
        if any(getattr(layer, statistic) is None for statistic in layer._running):
            raise ValueError(f"layers must have running statistics, layer {name} has none: {layer}")
        if layer._observer is not None:
            raise RuntimeError(
                f"layer {name} is already being recalibrated or monitored: a {type(layer).__name__}"
            )
        if all(layer is not other.layer for other in found):
            found.append(Borrowed(name, layer))
    if not found:
        raise ValueError("layers must be at least one, got none")
    return found


def samples(x: Array, axis: int) -> int:
    """Return how many samples a batch has, whichever axis the channels are along."""
    return int(x.shape[1 if axis % x.ndim == 0 else 0])


def moments_as_seen(layer: ChannelLayer, x: Array) -> Moments:
    """Return the moments of a batch: around 0 for a layer that subtracts no mean."""
    found = moments(x, layer.axis)
    if not isinstance(layer, MovingAverageBatchNorm):
        return found
    with np.errstate(all="ignore"):
        m2 = found.m2 + found.count * found.mean**2
    return Moments(found.count, np.zeros(layer.num_features), m2)


def first_statistics(layer: Averaging) -> dict[str, Array]:
    """Return what the running statistics of a layer begin as, in float64."""
    first = layer._first_statistics()
    channels: int = layer.num_features  # type: ignore[attr-defined]  # every such layer has them
    return {
        name: np.full(np.shape(first[name]) or (channels,), first[name], np.float64)
        for name in layer._running
    }
