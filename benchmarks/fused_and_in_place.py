"""How much of a plain normalization's time a fused one takes, and batch norm in place.

    python benchmarks/fused_and_in_place.py           about three minutes
    python benchmarks/fused_and_in_place.py --quick   small arrays, short turns

Medians of calls that take turns, all writing to given memory, as multiples of the call without an
activation; of in place, a layer's call and its backward beside those of the layer that keeps x. Of
layer and RMS norm, "apart" is the plain call and NumPy's operations after it, or before it in
backward.
"""

import argparse
from statistics import median
from time import perf_counter

import numpy as np

import bnfast
from statistics_of_arrays import table

SHAPES = ((8, 64, 28, 28), (32, 64, 56, 56), (64, 64, 112, 112))
TOKENS = (8, 256, 768)


def multiples(seconds, first, *others):
    """Return the median times of calls in turn, as multiples of the first one's."""
    calls = (first, *others)
    times = [[] for _ in calls]
    for call in calls:
        call()
    end = perf_counter() + seconds * len(calls)
    while perf_counter() < end or not times[0]:
        for call, taken in zip(calls, times, strict=True):
            start = perf_counter()
            call()
            taken.append(perf_counter() - start)
    return [f"{median(taken) / median(times[0]):.2f}" for taken in times[1:]]


def measured(shape, axis, seconds):
    n, c, h, w = shape
    rng = np.random.default_rng(0)
    x, dy, residual = rng.standard_normal((3, *(shape if axis == 1 else (n, h, w, c))), np.float32)
    out, mean, var = np.empty_like(x), np.zeros(c), np.ones(c)
    weight, bias = np.ones(c, np.float32), np.zeros(c, np.float32)
    relu = {"activation": "relu"}

    def forward(**fused):
        return lambda: bnfast.batch_norm_forward(x, weight, bias, axis=axis, out=out, **fused)

    def inference(**fused):
        given = x, mean, var, weight, bias
        return lambda: bnfast.batch_norm(*given, axis=axis, out=out, **fused)

    y = forward(**relu)()[0].copy()
    dx = np.empty_like(x)

    def backward(**fused):
        given = dy, x, mean, var, weight
        return lambda: bnfast.batch_norm_backward(*given, axis=axis, out=dx, **fused)

    def step(given, **options):
        layer = bnfast.BatchNorm(c, axis=axis, activation="leaky_relu", **options)
        return lambda: (layer(given), layer.backward(dy, out=dx))

    adds = {**relu, "residual": residual}
    silu = forward(activation="silu")
    return [
        *multiples(seconds, forward(), forward(**relu), forward(**adds), silu),
        *multiples(seconds, inference(), inference(**relu), inference(**adds)),
        *multiples(
            *(seconds, backward(), backward(**relu, bias=bias)),
            backward(**relu, residual=True, y=y),
        ),
        *multiples(seconds, step(x), step(out, inplace=True)),
    ]


def measured_rows(norm, seconds):
    rng = np.random.default_rng(0)
    x, dy, residual = rng.standard_normal((3, *TOKENS), np.float32)
    out, dx, dz = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    width = TOKENS[-1]
    weight = np.ones(width, np.float32)
    parameters = (weight, np.zeros(width, np.float32)) if norm == "layer_norm" else (weight,)
    bias = {"bias": parameters[1]} if norm == "layer_norm" else {}
    function, gradient = (getattr(bnfast, f"{norm}_{kind}") for kind in ("forward", "backward"))

    def forward(**fused):
        return lambda: function(x, width, *parameters, out=out, **fused)

    def forward_apart(adds):
        def call():
            forward()()
            if adds:
                np.add(out, residual, out=out)
            np.maximum(out, 0, out=out)

        return call

    y, *saved = function(x, width, *parameters, activation="relu", residual=residual)

    def backward(given=dy, **fused):
        return lambda: gradient(given, x, width, *saved, weight, out=dx, **fused)

    def backward_apart():
        np.multiply(dy, y > 0, out=dz)
        backward(dz)()

    relu = {"activation": "relu"}
    adds = {**relu, "residual": residual}
    silu = {"activation": "silu"}
    return [
        *multiples(
            *(seconds, forward(), forward(**relu), forward_apart(False), forward(**adds)),
            *(forward_apart(True), forward(**silu)),
        ),
        *multiples(
            *(seconds, backward(), backward(**relu, **bias), backward(**relu, y=y)),
            *(backward_apart, backward(**relu, y=y, residual=True), backward(**adds, **bias)),
            backward(**silu, **bias),
        ),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small arrays, short turns")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    options = parser.parse_args()
    headings = ["layout", "shape", "threads", "training: ReLU", "add, ReLU", "SiLU"]
    headings += ["inference: ReLU", "add, ReLU", "backward: ReLU", "add, ReLU", "step in place"]
    rows = []
    for threads in options.threads:
        bnfast.set_num_threads(threads)
        for shape in SHAPES[:1] if options.quick else SHAPES:
            for layout, axis in (("NCHW", 1), ("NHWC", -1)):
                found = measured(shape, axis, 0.01 if options.quick else 0.4)
                rows.append([layout, "x".join(map(str, shape)), str(threads), *found])
    print(table(headings, 3, rows))
    headings = ["normalization", "shape", "threads", "forward: ReLU", "apart", "add, ReLU", "apart"]
    headings += ["SiLU", "backward: ReLU", "of y", "of y, apart", "add, of y", "add", "SiLU"]
    rows = []
    for threads in options.threads:
        bnfast.set_num_threads(threads)
        for norm in ("layer_norm", "rms_norm"):
            found = measured_rows(norm, 0.01 if options.quick else 0.4)
            rows.append([norm, "x".join(map(str, TOKENS)), str(threads), *found])
    print()
    print(table(headings, 3, rows))


if __name__ == "__main__":
    main()
