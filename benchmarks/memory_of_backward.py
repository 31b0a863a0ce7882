"""What each layer keeps alive between a forward pass and its backward, in bytes per element.

    python benchmarks/memory_of_backward.py            print the tables of docs/memory.md
    python benchmarks/memory_of_backward.py --write    write them there

Measured by walking all that a layer refers to, before a call and after it; of PyTorch by
``saved_tensors_hooks``. No clock is read, and the figures are the same on every machine.
"""

import argparse

import numpy as np

import bnfast
from bnfast import _dtypes
from bnfast._cli import digits
from bnfast._cli.demo import FUSED
from bnfast._cli.kept_memory import kept_arrays, kept_bytes
from make_tables import DOCS, write_between
from statistics_of_arrays import table

SHAPE = (32, 64, 28, 28)
CHANNELS = SHAPE[1]
LEAKY = {"activation": "leaky_relu"}


def layers():
    """Give a name, a layer, and whether its calls add a residual."""
    yield "batch norm", bnfast.BatchNorm(CHANNELS), False
    yield "batch norm, evaluation", bnfast.BatchNorm(CHANNELS).eval(), False
    for activation in ("relu", "leaky_relu", "relu6", "silu", "hardswish"):
        yield f"batch norm + {activation}", bnfast.BatchNorm(CHANNELS, activation=activation), False
    for activation in ("relu", "silu"):
        layer = bnfast.BatchNorm(CHANNELS, activation=activation)
        yield f"batch norm + residual + {activation}", layer, True
    yield "batch norm in place", bnfast.BatchNorm(CHANNELS, inplace=True), False
    layer = bnfast.BatchNorm(CHANNELS, **LEAKY, inplace=True)
    yield "batch norm + leaky_relu, in place", layer, False
    yield "ghost batch norm", bnfast.GhostBatchNorm(CHANNELS, 8), False
    yield "batch renormalization", bnfast.BatchRenorm(CHANNELS), False
    yield "instance norm + relu", bnfast.InstanceNorm(CHANNELS, activation="relu"), False
    yield "group norm + relu", bnfast.GroupNorm(8, CHANNELS, activation="relu"), False
    yield "layer norm", bnfast.LayerNorm(SHAPE[1:]), False
    for activation in ("relu", "silu"):
        layer = bnfast.LayerNorm(SHAPE[1:], activation=activation)
        yield f"layer norm + residual + {activation}", layer, True
    yield "RMS norm", bnfast.RMSNorm(SHAPE[1:]), False
    yield "filter response norm", bnfast.FilterResponseNorm(CHANNELS), False


def kept_of_layer(layer, adds):
    """Return what is kept, in bytes per element: all, and all but y; and which arrays it is."""
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    more = (x.copy(),) if adds else ()
    before = kept_arrays(layer)
    y = layer(x, *more)
    kept = kept_arrays(layer)
    new = {key: array.nbytes for key, array in kept.items() if key not in before}
    which = [
        name
        for name, array in (("x", x), ("residual", more[0] if more else None), ("y", y))
        if array is not None and kept_bytes([array]) and set(kept_arrays(array)) <= set(kept)
    ]
    if layer.__dict__.get("inplace"):
        which = ["y"]  # in the memory of x
    of_y = kept_bytes(y) if "y" in which else 0
    return sum(new.values()) / x.size, (sum(new.values()) - of_y) / x.size, " and ".join(which)


def kept_by_pytorch(*stages):
    """Return the first two for modules one after the other: what their graph has saved."""
    import torch

    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.zeros(SHAPE, requires_grad=True) * 1.0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = x
        for stage in stages:
            y = stage(y)
    of_y = saved.get(y.untyped_storage().data_ptr(), 0)
    total = sum(saved.values())
    return total / x.numel(), (total - of_y) / x.numel()


def table_of_layers():
    rows = [
        [name, f"{kept:.2f}", which, f"{beside:.2f}"]
        for name, layer, adds in layers()
        for kept, beside, which in [kept_of_layer(layer, adds)]
    ]
    try:
        from torch import nn
    except ImportError:
        pass
    else:
        for name, stages in {
            "PyTorch: batch norm": [nn.BatchNorm2d(CHANNELS)],
            "PyTorch: batch norm, ReLU": [nn.BatchNorm2d(CHANNELS), nn.ReLU()],
            "PyTorch: batch norm, leaky ReLU": [nn.BatchNorm2d(CHANNELS), nn.LeakyReLU()],
            "PyTorch: batch norm, SiLU": [nn.BatchNorm2d(CHANNELS), nn.SiLU()],
        }.items():
            kept, beside = kept_by_pytorch(*stages)
            rows.append([name, f"{kept:.2f}", "", f"{beside:.2f}"])
    return table(["layer, of float32", "bytes kept", "which are", "besides y"], 1, rows)


def network(dtype, fused):
    def normalize(channels):
        return digits.Normalization(bnfast.BatchNorm(channels, axis=-1, **FUSED[fused]))

    return digits.Network(0, normalize, fused=fused is not None, dtype=_dtypes.named(dtype))


def table_of_demo():
    x = digits.load().images[:64]
    rows = []
    elements = sum(
        size * size * channels for size, channels in zip((8, 4, 2), digits.CHANNELS, strict=True)
    )
    for dtype in ("float32", "bfloat16"):
        for fused, name in {
            None: "batch norm, then ReLU",
            "fused": "both in one pass",
            "inplace": "with a leaky ReLU, in place",
        }.items():
            kept = network(dtype, fused).kept_bytes(x) / (len(x) * elements)
            rows.append([name, dtype, f"{kept:.2f}"])
    return table(["network of the demo", "activations", "bytes kept per element"], 2, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/memory.md")
    options = parser.parse_args()
    for name, text in {"layers": table_of_layers(), "demo": table_of_demo()}.items():
        print(text, end="\n\n")
        if options.write:
            write_between(DOCS / "memory.md", name, [text])


if __name__ == "__main__":
    main()
