"""PyTorch's networks, trained with its own normalizations and with bnfast's, step by step in turn.

``python benchmarks/bench_torch.py`` prints, for each network and memory format, the CPU time of
normalization within the network, forward and backward, and of a whole step; ``--write`` writes the
table of docs/pytorch.md.
"""

import argparse
import copy
import statistics
import time

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from bnfast._cli.bench.run import machine  # noqa: E402
from bnfast.integrations.torch import accelerate, functions  # noqa: E402
from make_tables import DOCS, filled, write_between  # noqa: E402
from statistics_of_arrays import table  # noqa: E402


def convolution(inputs, outputs, size, stride=1, groups=1, activation=None):
    """A convolution, batch norm and an activation."""
    layers = [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([activation(inplace=True)] if activation else []))


class Residual(nn.Module):
    """What is added to its input, or to a projection of that where the shape changes."""

    def __init__(self, body, shortcut=None, activation=None):
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x):
        y = self.body(x) + (x if self.shortcut is None else self.shortcut(x))
        return y if self.activation is None else self.activation(y)


def resnet18():
    """K. He et al., 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385."""
    blocks, inputs = [], 64
    for outputs, first_stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for stride in (first_stride, 1):
            same = stride == 1 and inputs == outputs
            body = nn.Sequential(
                convolution(inputs, outputs, 3, stride, activation=nn.ReLU),
                convolution(outputs, outputs, 3),
            )
            shortcut = None if same else convolution(inputs, outputs, 1, stride)
            blocks.append(Residual(body, shortcut, nn.ReLU(inplace=True)))
            inputs = outputs
    stem = convolution(3, 64, 7, 2, activation=nn.ReLU), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*stem, *blocks, *classifier(512))


def mobilenet_v2():
    """M. Sandler et al., 2018, "MobileNetV2", arXiv:1801.04381, table 2."""
    blocks, inputs = [], 32
    for expansion, outputs, count, first_stride in (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for n in range(count):
            stride, wide = first_stride if n == 0 else 1, expansion * inputs
            body = nn.Sequential(
                *([convolution(inputs, wide, 1, activation=nn.ReLU6)] if expansion > 1 else []),
                convolution(wide, wide, 3, stride, groups=wide, activation=nn.ReLU6),
                convolution(wide, outputs, 1),
            )
            same = stride == 1 and inputs == outputs
            blocks.append(Residual(body) if same else body)
            inputs = outputs
    ends = (
        convolution(3, 32, 3, 2, activation=nn.ReLU6),
        convolution(320, 1280, 1, activation=nn.ReLU6),
    )
    return nn.Sequential(ends[0], *blocks, ends[1], *classifier(1280))


def classifier(channels):
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)


NETWORKS = {"ResNet-18": resnet18, "MobileNetV2": mobilenet_v2}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class Stopwatch:
    """The time that the passes of a normalization take."""

    def __init__(self):
        self.forward = self.backward = 0.0

    def timed(self, name, function):
        def call(*arguments):
            begin = time.process_time()
            result = function(*arguments)
            setattr(self, name, getattr(self, name) + time.process_time() - begin)
            return result

        return call


WATCH = Stopwatch()


class Stock(torch.autograd.Function):
    """PyTorch's own kernels, called from where the stopwatch stands for bnfast's."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, momentum, eps):
        y, *saved = torch.native_batch_norm(x, weight, bias, mean, var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, var, *saved)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy):
        gradients = torch.ops.aten.native_batch_norm_backward(
            dy, *ctx.saved_tensors, True, ctx.eps, [True] * 3
        )
        return *gradients, None, None, None, None


def stock_forward(module, x):
    module.num_batches_tracked.add_(1)
    running = module.running_mean, module.running_var
    parameters = module.weight, module.bias
    return Stock.apply(x, *parameters, *running, module.momentum, module.eps)


def clocked(model):
    """Let PyTorch's modules call its kernels through `Stock`."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.forward = stock_forward.__get__(module)
    return model


def step(model, optimizer, x, labels):
    optimizer.zero_grad(set_to_none=True)
    loss = torch.nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()


def measure(network, layout, batch, pixels, turns):
    """Return the medians of every model: of a step, forward, backward."""
    torch.manual_seed(0)
    base = NETWORKS[network]().to(memory_format=FORMATS[layout])
    x = torch.randn(batch, 3, pixels, pixels).to(memory_format=FORMATS[layout])
    labels = torch.randint(0, 1000, (batch,))
    trained = {name: copy.deepcopy(base) for name in ("PyTorch", "PyTorch, clocked", "bnfast")}
    clocked(trained["PyTorch, clocked"])
    accelerate(trained["bnfast"])
    optimizers = {
        name: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        for name, model in trained.items()
    }
    times = {name: [] for name in trained}
    for turn in range(turns + 1):
        for name, model in trained.items():
            WATCH.forward = WATCH.backward = 0.0
            begin = time.process_time()
            step(model, optimizers[name], x, labels)
            if turn:
                times[name].append((time.process_time() - begin, WATCH.forward, WATCH.backward))
    return {name: [statistics.median(c) for c in zip(*t, strict=True)] for name, t in times.items()}


def clock():
    for kind in (Stock, functions._Normalize):
        for name in ("forward", "backward"):
            setattr(kind, name, staticmethod(WATCH.timed(name, getattr(kind, name))))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("computed_by", ["PyTorch", "bnfast"])
def bench_step(benchmark, computed_by, layout):
    """A step of MobileNetV2 on tiny images."""
    torch.manual_seed(0)
    model = mobilenet_v2().to(memory_format=FORMATS[layout])
    if computed_by == "bnfast":
        accelerate(model)
    x = torch.randn(4, 3, 32, 32).to(memory_format=FORMATS[layout])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    benchmark(step, model, optimizer, x, torch.arange(4))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=112)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write docs/pytorch.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock()
    lines = []
    for network in NETWORKS:
        for layout in FORMATS:
            found = measure(network, layout, options.batch, options.pixels, options.turns)
            stock, ours = found["PyTorch, clocked"], found["bnfast"]
            pairs = [*zip(stock[1:], ours[1:], strict=True), (sum(stock[1:]), sum(ours[1:]))]
            passes = [f"{1e3 * a:.1f} / {1e3 * b:.1f} = {a / b:.2f}" for a, b in pairs]
            step_of_both = found["PyTorch"][0], ours[0]
            step_text = f"{1e3 * step_of_both[0]:.0f} / {1e3 * step_of_both[1]:.0f}"
            ratio = step_of_both[0] / step_of_both[1]
            lines.append([network, layout, *passes, f"{step_text} = {ratio:.2f}"])
    headings = ["network", "format", "forward", "backward", "both", "whole step"]
    here = machine()
    about = filled(
        f"CPU time in ms, PyTorch / bnfast; {here['cpu']}, {here['instruction set']}, "
        f"{options.threads} thread(s), images of {options.pixels} px in batches of "
        f"{options.batch}, PyTorch {torch.__version__}."
    )
    parts = [table(headings, 2, lines), about]
    if options.write:
        write_between(DOCS / "pytorch.md", "networks", parts)
    else:
        print(*parts, sep="\n\n")


if __name__ == "__main__":
    main()
